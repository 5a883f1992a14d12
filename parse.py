"""parse.py: read buttons and sticks from the overlay crops (NitroGen, arXiv 2601.02427, section 3.1).

    python parse.py run DATA [--ckpt weights/parser.safetensors]   read every clip folder of DATA
    python parse.py show CLIP --out FILE.mp4|FILE.png              look at what was read
    python parse.py eval DATA                                      score the clips that have truth.npy
    python parse.py train --out FILE [--skins DIR --ckpt FILE]     train the reader, or fit it to your skin

In, per clip folder (extract.py): clip.json with the template's geometry; pads.npy + pads_index.npy, one crop
a video frame; template.png uint8 (h, w, 4). Out, beside them:
    actions.npy     float32 (n, 25)   buttons 0 or 1, sticks in [-1, 1], y down; what no skin shows is 0
    confidence.npy  float32 (n,)      0..1: is the pad there, and is it read with certainty
    keep.npy        bool (n,)         the frame may start a training chunk [paper: half of its steps act]

How: each control is cut out of the crop at one scale ("close-up": a stick's travel, or a button's box, has
always the same size), from the previous frame, from the current frame [paper: a pair of frames] and from the
pad at rest, which is the video's own median picture [ours]. Two narrow SegFormers (arXiv 2105.15203): one
reads a stick's close-ups into an 11 x 11 grid [paper: a segmentation, much better than regression], one a
button's into one logit. The answers are then smoothed over the whole video.
Letters: n frames, k sticks, m buttons, S pixels a side of a close-up; B batch, N tokens, D width.
"""
import copy
import itertools
import json
import math
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from safetensors.torch import load_file, save
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import extract
from extract import BUTTON, BUTTONS, LEGACY, STICKS, THUMB, Busy, UserError, number, overlap

GRID = 11                                  # cells a side of a stick's grid [paper]: -1, -0.8 ... 1
STRIDE, SUB = 4, 3                       # a token of the finest map covers 4 x 4 pixels and tells 3 x 3 cells
STICK_SIDE, BUTTON_SIDE = 57, 33   # pixels of a close-up: 4 k + 1, so the middle token is on the middle pixel
TRAVEL = (GRID - 1) / 2 * STRIDE / SUB     # pixels from rest to full tilt in a stick's close-up
BOX = 20                                   # pixels of a button's box in its close-up, both ways
LABEL_WIDTH = 0.12                        # sd of the grid's label: about half a cell (0.1 - 0.15 decode best)
SAMPLES = 128                              # frames that the pad at rest is made from
PIECE, OVERLAP = 4096, 1024              # frames smoothed at once, and frames looked at on both sides of them
ONE_SKIN = 0.85                         # median likeness of template and video above which they show one skin
CKPT = Path(__file__).parent / "weights" / "parser.safetensors"


# --------------------------------------------------------------------------------------------- reading a clip
def label_clip(model, folder, clip, pads):
    """Read one clip's crops and write its three files -> one line that says what came out."""
    n = len(pads)
    began = time.time()
    geometry, drawn = clip["geometry"], read_templates(folder, clip)
    actions = np.zeros((n, extract.A), np.float32)
    confidence = np.zeros(n, np.float32)
    shown = bool(geometry["sticks"] or geometry["buttons"])
    if shown:
        pad = Pad(model, geometry, pads, drawn)
        while moved := pad.better_geometry():                  # a foreign geometry's sticks may be far off
            other = Pad(model, moved, pads, drawn)
            if other.spread >= pad.spread:
                break
            pad = other
        if not pad.known:
            pad.watch(pads)
        actions, confidence = settle(pad, *pad.read_all(pads))
    keep = extract.dense(actions, confidence)
    for name, array in (("keep", keep), ("confidence", confidence), ("actions", actions)):
        extract.write_npy(folder / f"{name}.npy", array)
    if not shown:
        return (f"template {clip.get('template')} has no geometry: confidence 0, nothing kept; "
                "give NAME.json with boxes and centres beside its PNG")
    speed = n / (time.time() - began)
    pressed = actions[:, :len(BUTTONS)].any(1).mean()
    advice = ("" if confidence.mean() >= 0.8 else " | unsure: give the overlay's skin with extract.py "
              "--templates, or fit the reader to it with parse.py train --skins")
    return (f"{n} frames | confidence {confidence.mean():.2f} | kept {keep.mean():.0%} | "
            f"pressed {pressed:.0%} | {speed:.0f} frames/s, {speed / clip['fps']:.1f} x real time{advice}")


def settle(pad, places, spread, reads):
    """What Pad.read_all says of a whole video -> actions float32 (n, 25), confidence float32 (n,)."""
    closeups = pad.closeups
    logits = reads.buttons.copy()
    sure = []
    actions = np.zeros((len(logits), extract.A), np.float32)
    for i, side in enumerate(closeups.sticks):
        actions[:, STICKS[side]] = normalise(places[:, i], pad.known)
        sure.append(1.6 - 3 * spread[:, i])
    for i, j in closeups.clicks.items():                       # the stick's net follows the moving cap
        logits[:, j] = (logits[:, j] + reads.clicks[:, i]) / 2
    if closeups.buttons:
        on_caps = np.isin(np.arange(len(closeups.buttons)), [*closeups.clicks.values()])
        logits = level(logits, fixed=~on_caps)
        p = np.concatenate([smooth_buttons(logits[low:high])[begin - low:end - low]
                            for low, begin, end, high in pieces(len(logits))])
        actions[:, [BUTTON[b] for b in closeups.buttons]] = p > 0.5
        sure.append(1.1 * np.abs(np.tanh(reads.buttons / 2)).mean(1))
    seen = reads.likeness / max(pad.usual, 0.05)
    there = np.clip((seen - 0.25) / 0.4, 0, 1)
    most = 1.0 if pad.known else 0.89                          # a foreign pad's buttons may have other names
    certain = np.clip(np.min(sure, 0), 0, most)
    return actions, (there * certain).astype(np.float32)


class Reads(NamedTuple):
    """What the net says of n frames, one at a time."""
    grids: np.ndarray                      # (n, k, 11, 11) log probability of the sticks' places
    clicks: np.ndarray                     # (n, k) logits
    buttons: np.ndarray                    # (n, m) logits
    likeness: np.ndarray                   # (n,) of each crop's edges to the pad's


class Pad:
    """One clip's pad: its controls, what they look like at rest in this video, and what tells a crop from one
    without it."""

    def __init__(self, model, geometry, pads, templates=()):
        """templates: read_templates()'s of the clip."""
        self.model, self.geometry = model, geometry
        at = np.unique(np.linspace(0, len(pads) - 1, SAMPLES).astype(int))
        crops = [pads[i] for i in at]
        self.closeups = closeups = Closeups(geometry, crops[0].shape[1::-1])
        before = closeups.all(pads[max(i - 1, 0)] for i in at)
        now = closeups.all(crops)
        picture = np.median(np.stack(crops[::2]), 0).astype(np.uint8)          # of the whole video
        median = closeups(picture)
        drawn, *pressed = [closeups(t) for t in in_the_videos_light(templates, picture)] or [None]
        alike = likenesses(drawn, median) if drawn else None
        self.rest = rest_pictures(model, before, now, median, drawn, alike)
        self.pressed = [np.uint8(0), np.uint8(0)]              # not known
        self.known = bool(drawn) and np.median(np.concatenate(alike)) > ONE_SKIN
        if self.known:
            looks = [self.rest[0], drawn[0]]                   # the caps of the video may never rest
            shown = [np.zeros_like(self.rest[0])]
            if pressed:
                self.pressed[1] = changed(self.rest[1], drawn[1], pressed[0][1])
                shown.append(pressed[0][0].astype(int) - drawn[0])
            options = [(rest, np.clip(rest + p, 0, 255).astype(np.uint8) if p.any() else p) for rest in looks for p in shown]
            self.rest[0], self.pressed[0] = surest(model, before[0], now[0], options)
        grids, *_ = net_reads(model, map(montages, before, now, self.rest, self.pressed))
        self.sampled = decode(np.exp(grids)).reshape(len(at), -1, 2)           # sticks of the sampled frames
        self.spread = expect(np.exp(grids))[1].mean() if len(grids) else 0.0
        self.outline = edges(picture)
        self.usual = np.median([self.likeness(c) for c in crops])          # of crops that mostly show the pad

    def likeness(self, crop):
        """Of the crop's edges to those of the pad at rest: falls towards 0 where the overlay is gone or
        covered."""
        return likeness(edges(crop), self.outline, centre=False)

    def better_geometry(self):
        """The geometry of a pad that is no known skin, with each stick where it rests in the sampled frames
        and a travel as long as it goes; None where it is so already."""
        if self.known:
            return None
        sticks = dict(self.geometry["sticks"])
        for values, side in zip(self.sampled.transpose(1, 0, 2), self.closeups.sticks):
            rest = resting_place(values, known=False)
            if rest is None:
                continue
            center, travel = (np.array(sticks[side][k]) for k in ("center", "travel"))
            reach = np.percentile(np.hypot(*(values - rest).T), 97)
            longer = reach / 0.9 if reach > 1.05 or 0.3 < reach < 0.6 else 1
            if np.hypot(*rest) > 0.25 or longer != 1:
                sticks[side] = {**sticks[side], "center": [*(center + rest * travel)],
                                "travel": [*(travel * longer)]}
        return None if sticks == self.geometry["sticks"] else {**self.geometry, "sticks": sticks}

    def watch(self, pads):
        """Take the box of each button that blinks, and how it looks at rest and pressed, from the video: for
        a pad that is no known skin."""
        at = watched_frames(len(pads))
        crops = [pads[i] for i in at]
        half = np.stack([cv2.resize(c, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA) for c in crops])
        named = named_spots(spots(half, at, self.geometry), self.geometry)
        if not named:
            return
        boxes = {button: spot.box for button, spot in named.items()}
        self.geometry = {**self.geometry, "buttons": {**self.geometry["buttons"], **boxes}}
        self.closeups = Closeups(self.geometry, crops[0].shape[1::-1])
        _, buttons = self.closeups.all(crops)
        self.pressed = [np.zeros_like(r) for r in self.rest]
        for button, spot in named.items():
            j = self.closeups.buttons.index(button)
            self.rest[1][j], self.pressed[1][j] = (np.median(buttons[on, j], 0) for on in (~spot.lit, spot.lit))

    def read(self, pads, begin, end):
        """Frames begin .. end -> Reads."""
        reads, alike = [], []
        last = self.closeups.all([pads[max(begin - 1, 0)]])    # the first frame is its own previous one
        for start in range(begin, end, 32):
            crops = [pads[i] for i in range(start, min(start + 32, end))]
            alike += [self.likeness(c) for c in crops]
            now = self.closeups.all(crops)
            before = [np.concatenate([b, c[:-1]]) for b, c in zip(last, now)]
            reads.append(net_reads(self.model, map(montages, before, now, self.rest, self.pressed)))
            last = [c[-1:] for c in now]
        grids, clicks, buttons = map(np.concatenate, zip(*reads))
        n = end - begin
        grids = grids.reshape(n, -1, GRID, GRID)
        return Reads(grids, clicks.reshape(n, -1), buttons.reshape(n, -1), np.array(alike))

    def read_all(self, pads):
        """All n frames -> places of the sticks float32 (n, k, 2), smoothed; their spread (n, k); Reads
        without grids, which are 100 times as large: only a piece of them is held."""
        k = len(self.closeups.sticks)
        reads, done = [], 0
        pads = copy.copy(pads)
        places = np.zeros((len(pads), k, 2), np.float32)
        spread = np.zeros((len(pads), k))
        grids = np.zeros((0, k, GRID, GRID), np.float32)
        for low, begin, end, high in tqdm([*pieces(len(pads))], "read", disable=None):
            if done < high:
                pads.data = extract.read_npy(pads.path, np.uint8, (None,))     # frees what was read
                more = self.read(pads, done, high)
                grids, done = np.concatenate([grids, more.grids]), high
                reads.append(more._replace(grids=grids[:0].copy()))         # a view would hold them all
            grids = grids[low - done:]
            smoothed = smooth_grids(grids) if k else grids
            for i in range(k):
                places[begin:end, i], spread[begin:end, i] = expect(smoothed[begin - low:end - low, i])
        return places, spread, Reads(*map(np.concatenate, zip(*reads)))


def pieces(n):
    """n frames -> (low, begin, end, high) of each piece: begin .. end is smoothed there, from what low ..
    high hold. Equal to one piece within 1e-12; within 1e-5 where a stick is seen in two far places all along
    the overlap."""
    for begin in range(0, n, PIECE):
        end = min(begin + PIECE, n)
        yield max(begin - OVERLAP, 0), begin, end, min(end + OVERLAP, n)


# ------------------------------------------------------------------------------------------------ what blinks
class Spot(NamedTuple):
    """A place of a pad that lights up now and then, as a button does."""
    box: np.ndarray                        # x0, y0, x1, y1 in template pixels
    lit: np.ndarray                        # (n,) bool, of the watched frames


def watched_frames(n):
    """Numbers of 512 frames of n, in 16 runs, as a press is some frames long."""
    starts = np.linspace(0, max(n - 32, 0), 16).astype(int)
    return np.unique((starts[:, None] + np.arange(32)).clip(0, n - 1))


def spots(crops, at, geometry):
    """Crops uint8 (n, h, w, 3) of the frames `at` -> Spots: neighbouring pixels that have two colours and
    change them in the same frames. No net is asked, so it holds for a pad of any look; what lies over or
    shines through it seldom has two colours only."""
    n, h, w = crops.shape[:3]
    scale = np.divide((w, h), geometry["size"])
    median = np.median(crops[::2], 0).astype(np.uint8)
    away = np.stack([cv2.absdiff(crop, median).max(2) for crop in crops])      # (n, h, w), from rest
    high = np.sort(away, 0)[-max(n // 64, 4)].astype(int)                      # when lit: 1 frame of 64 or more
    lit = away > high / 2
    between = (np.abs(away - high / 2) < high / 5).sum(0)
    count = lit.sum(0)
    blinks = (high > 18) & (count >= 4) & (count < 0.6 * n) & (between < count / 4)
    for stick in geometry["sticks"].values():                  # a cap changes what it moves over
        reach = (stick["radius"] + np.array(stick["travel"])) * scale * 1.25
        away_from = (np.indices((h, w))[::-1] + 0.5 - (stick["center"] * scale)[:, None, None]) / reach[:, None, None]
        blinks &= np.hypot(*away_from) > 1
    linked = np.zeros((2 * h - 1, 2 * w - 1), np.uint8)        # pixels; between two: do they blink together?
    linked[::2, ::2] = blinks
    linked[::2, 1::2] = blinks[:, 1:] & blinks[:, :-1] & together(lit[:, :, 1:], lit[:, :, :-1])
    linked[1::2, ::2] = blinks[1:] & blinks[:-1] & together(lit[:, 1:], lit[:, :-1])
    count, numbers = cv2.connectedComponents(linked, connectivity=4)
    found = []
    for number in range(1, count):
        mask = numbers[::2, ::2] == number
        y, x = np.nonzero(mask)
        on = lit[:, mask].mean(1) > 0.5
        if len(x) >= 6 and mask.mean() < 0.08 and two_colours(crops[:, mask], on, at):
            box = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1]) / np.tile(scale, 2)
            found.append(Spot(box, on))
    return found


def together(a, b, share=0.7):
    """Are two series of lit frames (n, ...) the same, up to this share (intersection over union)?"""
    return (a & b).sum(0) > share * (a | b).sum(0)


def two_colours(pixels, lit, at):
    """Does a spot, pixels uint8 (n, k, 3) in the frames `at`, look one way when lit and one way else, with
    nothing between, and does it change as often as fingers do?"""
    if not 4 <= lit.sum() < len(lit) / 2:
        return False
    rest, pressed = (np.median(pixels[on], 0) for on in (~lit, lit))
    change = pressed - rest
    x = ((pixels - rest) * change).sum((1, 2)) / (change ** 2).sum()           # 0 at rest, 1 when lit
    switches = (np.diff(lit.astype(int)) != 0)[np.diff(at) == 1].sum()
    apart = np.percentile(x[lit], 5) - np.percentile(x[~lit], 95)
    return apart > 0.75 and 0.03 < switches / lit.sum() < 0.9


def named_spots(found, geometry):
    """Which spot is which button: the nearest, if it is about as large -> {button: Spot}."""
    def side(box):
        return math.sqrt((box[2] - box[0]) * (box[3] - box[1]))

    pairs = []
    for button, box in geometry["buttons"].items():
        for i, spot in enumerate(found):
            away = np.hypot(*np.subtract(spot.box, box).reshape(2, 2).mean(0)) / geometry["size"][0]
            larger = abs(math.log(side(spot.box) / side(box)))
            if away < 0.2 and larger < 1.25:
                pairs.append((away + 0.03 * larger, away, button, i))
    named = {}
    for _, away, button, i in sorted(pairs):
        if button in named or any(together(found[i].lit, s.lit, 0.8) for s in named.values()):
            continue
        mistaken = button.endswith(("SHOULDER", "TRIGGER")) and any(
            overlap(geometry["buttons"][button], s.box) for s in named.values())       # for its neighbour
        if away < 0.08 or mistaken:
            named[button] = found[i]
    return named


# -------------------------------------------------------------------------------------------- the pad at rest
def rest_pictures(model, before, now, median, drawn, alike):
    """What each control looks like at rest -> [sticks uint8 (k, S, S, 3), buttons (m, S, S, 3)].

    before, now: close-ups of sampled frames, (samples, k or m, S, S, 3) each; median: those of the video's
    median picture; drawn: those of the template in the video's light, or None; alike: the likenesses() of
    both.
    """
    if drawn is None:
        rest, _ = at_rest(model, before, now, median)
        return at_rest(model, before, now, rest)[0]
    rest, doubted = beside_template(model, median, drawn, alike)
    rest, few = at_rest(model, before, now, rest)
    for picture, old, wrong in zip(rest, median, map(np.logical_and, doubted, few)):
        picture[wrong] = old[wrong]                       # seen at rest too seldom beside a template in doubt
    return at_rest(model, before, now, rest)[0]


def surest(model, before, now, options):
    """Of pictures of sticks at rest and pressed, (k, S, S, 3) each, those for each stick with which the net
    is surest of where it is in the sampled frames, (samples, k, S, S, 3): a template may not show the caps as
    this video does."""
    spreads = []
    for rest, pressed in options:
        grids, *_ = net_reads(model, [montages(before[::2], now[::2], rest, pressed), np.zeros((0, PANELS, BUTTON_SIDE, BUTTON_SIDE, 3), np.uint8)])
        spreads.append(expect(np.exp(grids))[1].reshape(-1, now.shape[1]).mean(0))
    best = np.argmin(spreads, 0)
    return [np.stack([options[o][kind][i] for i, o in enumerate(best)]) for kind in (0, 1)]


def likenesses(drawn, median):
    """likeness() of each close-up of two pictures -> [of sticks (k,), of buttons (m,)]."""
    return [np.array([likeness(a, b) for a, b in zip(*kinds)]) for kinds in zip(drawn, median)]


def changed(rest, drawn, pressed):
    """The pad at rest as the video shows it, changed as the template changes when it is pressed, uint8."""
    change = pressed.astype(int) - drawn
    return np.clip(rest + change, 0, 255).astype(np.uint8)


def beside_template(model, median, drawn, alike):
    """A control that the net, given the template as rest, sees deflected or pressed in the median picture
    seldom rests: its rest picture is the template's. -> rest pictures; bool (k,), (m,): replaced, but the
    template may be wrong, as it hardly differs there from the median picture, or is unlike the pad also where
    controls do rest."""
    grids, clicks, logits = net_reads(model, [montages(m[None], m[None], d) for m, d in zip(median, drawn)])
    plain = grids.max((1, 2)) > math.log(0.15)
    away = plain & (np.hypot(*decode(np.exp(grids)).T) > 0.5)
    seldom = [away | (clicks > 3), logits > 3]
    if len(logits):                                    # far less alike than the others: the net need say less
        seldom[1] |= (alike[1] < np.median(alike[1]) - 0.25) & (logits > 2)
    calm = np.concatenate([a[~s] for a, s in zip(alike, seldom)])
    replaced = [s & (a < 0.95) for a, s in zip(alike, seldom)]      # what looks as it does at rest is at rest
    rest = [np.where(r[:, None, None, None], d, m) for r, d, m in zip(replaced, drawn, median)]
    faithful = len(calm) > 0 and np.median(calm) > 0.8         # like the pad where controls do rest
    return rest, [r & (a > 0.85) for a, r in zip(alike, replaced)] if faithful else replaced


def at_rest(model, before, now, rest):
    """Each control's median over the frames in which the net, given the old rest pictures, sees it at rest
    -> new pictures; bool (k,), (m,): too few such frames, so left as it was."""
    n, k = now[0].shape[:2]
    grids, clicks, logits = net_reads(model, map(montages, before, now, rest))
    still = np.hypot(*decode(np.exp(grids)).T) < 0.2
    quiets = (still & (clicks < 0)).reshape(n, k), (logits < -0.5).reshape(n, -1)
    rest = [r.copy() for r in rest]
    for picture, closeups, quiet in zip(rest, now, quiets):
        for j in np.flatnonzero(quiet.sum(0) >= 8):
            picture[j] = np.median(closeups[quiet[:, j], j], 0)
    return rest, [quiet.sum(0) < 8 for quiet in quiets]


# --------------------------------------------------------------------------------------------------- decoding
def decode(p):
    """Grids of probability (n, 11, 11) -> sticks (n, 2): the mean place over the 3 x 3 cells around the peak.
    Better than argmax (steps of 0.2) and than the mean over all cells (drawn to 0 by diffuse mass)."""
    y, x = np.divmod(p.reshape(len(p), GRID ** 2).argmax(1), GRID)             # the peak
    cells = np.arange(GRID)
    rows = abs(cells - y[:, None]) <= 1
    columns = abs(cells - x[:, None]) <= 1
    w = (p + 1e-9) * rows[:, :, None] * columns[:, None, :]                # zero beyond the peak's neighbours
    w /= w.sum((1, 2), keepdims=True)
    xy = np.stack([w.sum(1) @ cells, w.sum(2) @ cells], 1)                     # in cells
    return np.clip(xy * 2 / (GRID - 1) - 1, -1, 1).astype(np.float32)


def labels(values):
    """Stick values (B, 2) -> the grid's label (B, 11, 11): a normal bump around the true place, summing to
    1."""
    cells = torch.linspace(-1, 1, GRID)
    bumps = torch.exp(-0.5 * ((cells - values[:, :, None]) / LABEL_WIDTH) ** 2)              # (B, xy, 11)
    grid = bumps[:, 1, :, None] * bumps[:, 0, None, :]
    return grid / grid.sum((1, 2), keepdim=True)


def expect(p):
    """Posterior grids (n, 11, 11) -> the mean over all cells, values (n, 2): the least squared error where
    there are several peaks (what smooth_grids leaves is free of diffuse mass); and their spread (n,), 1
    standard deviation."""
    cells = np.linspace(-1, 1, GRID)
    x = p.sum(1)
    y = p.sum(2)                                               # (n, 11) each
    mean = np.stack([x @ cells, y @ cells], 1)
    variance = (x + y) @ cells ** 2 - (mean ** 2).sum(1)
    return mean.astype(np.float32), np.sqrt(np.maximum(variance, 0))


def smooth(e, transition, prior, trust, own):
    """Forward-backward: log likelihoods e (n, k, states) of k controls -> posterior (n, k, states) given all
    n frames.

    transition (states, states): row = state now, column = next; prior (states,): of the first frame. What the
    other frames say counts `trust` <= 1, since errors of neighbouring frames are alike (same skin, same scene
    behind); what the frame itself says counts `own`.
    """
    e = e - e.max(-1, keepdims=True)
    others = np.exp(trust * e) + 1e-12
    forward = range(len(e)), transition, prior
    backward = range(len(e) - 1, -1, -1), transition.T, np.ones_like(prior)
    passes = []
    for order, matrix, message in (forward, backward):
        out = np.empty_like(others)
        for t in order:
            out[t] = message                                   # what the frames on this side say of frame t
            message = (message * others[t]) @ matrix
            message = message / message.sum(-1, keepdims=True)
        passes.append(out)
    p = passes[0] * passes[1] * (np.exp(own * e) + 1e-12)
    return p / p.sum(-1, keepdims=True)


def smooth_grids(log_p, trust=0.3, own=0.8):
    """Log grids (n, k, 11, 11) of k sticks -> posterior, same shape. A dark cap over a dark scene tells
    little in one frame; its neighbours tell the rest. From frame to frame a stick stays, moves by a cell or
    so, or goes anywhere, most often home. The net's answer contains how often the teacher's sticks are in a
    cell; that is divided out first, or home would win each doubt."""
    i = np.arange(GRID)
    near = np.exp(-0.5 * ((i[:, None] - i) / 1.2) ** 2)
    near /= near.sum(1, keepdims=True)
    home = labels(torch.zeros(1, 2)).numpy().ravel().astype(np.float64)
    prior = 0.36 * home + 0.64 / GRID ** 2                     # some 0.4 of the teacher's frames are at rest
    transition = 0.3 * np.eye(GRID ** 2) + 0.4 * np.kron(near, near) + 0.3 * prior
    e = log_p.reshape(*log_p.shape[:2], -1).astype(np.float64) - np.log(prior)
    return smooth(e, transition, prior, trust, own).reshape(log_p.shape)


def smooth_buttons(logits, press=0.2, release=0.4, trust=0.8):
    """Logits (n, m) of m buttons -> probability of "pressed" (n, m) given all frames. press, release: how
    probable these are from one frame to the next; high enough that a tap of two frames, read plainly, is not
    smoothed away."""
    e = np.stack([np.zeros(logits.shape), np.clip(logits, -20, 20)], -1)       # (n, m, 2): off, on
    transition = np.array([[1 - press, press], [release, 1 - release]])
    prior = np.array([release, press]) / (press + release)
    return smooth(e, transition, prior, trust, 1.0)[..., 1]


def level(logits, fixed):
    """Logits (n, m) -> the same with each button's own threshold at 0: where a video's logits fall into two
    groups, pressed and not, their middle is a better threshold than the net's. fixed bool (m,): the button
    has its place, it does not lie on a moving cap.

    Two groups are pressed and not where the net calls the upper one pressed and they are apart; or, whatever
    the net calls it, where they are tight, nothing lies between them and they come and go, as no scene behind
    a see-through pad does. Else a button stays as it is."""
    out = logits.copy()
    n = len(logits)
    for j, x in enumerate(logits.T if n >= 8 else ()):         # fewer are too few for two groups of four
        low, high = two_groups(x)
        middle = (low.mean() + high.mean()) / 2
        apart = high.mean() - low.mean()
        spread = math.sqrt((low.var() * len(low) + high.var() * len(high)) / n)
        fewer = min(len(low), len(high))
        between = (np.abs(x - middle) < apart / 6).sum()
        switches = np.count_nonzero(np.diff(x > middle))
        pressed = apart >= 2 and apart > 3.5 * spread and high.mean() > 1
        taps = (fixed[j] and apart > max(7 * spread, 0.8) and high.mean() > -2
                and between <= fewer / 20 and switches >= 8)
        if fewer >= 4 and (pressed or taps):
            shift = np.clip(middle, -2, 2) if pressed else middle
            out[:, j] = (x - shift) * max(1, 6 / apart)
    return out


def two_groups(x):
    """Values (n,) -> the lower and the upper group, sorted, at the split with the largest variance between
    (Otsu)."""
    ranked = np.sort(x)
    k = np.arange(1, len(x))                                   # values in the lower group
    total = np.cumsum(ranked)[:-1]
    gap = (ranked.sum() - total) / k[::-1] - total / k         # between the groups' means
    return np.split(ranked, [1 + (k * k[::-1] * gap ** 2).argmax()])


def normalise(values, known=False):
    """Per video [paper: centre at rest, 99th percentile as scale], guarded: values float32 (n, 2) of one
    stick -> the same, in [-1, 1]. One scale for both axes (an axis that is never used must not be blown up);
    a stick that hardly moves keeps its scale, one that never rests its centre too."""
    rest = resting_place(values, known)
    if rest is None:
        return values
    values = values - rest
    reach = np.percentile(np.hypot(*values.T), 99)
    if reach > 0.3:
        values = values / reach
    return np.clip(values, -1, 1).astype(np.float32)


def resting_place(values, known):
    """Where a stick (n, 2) rests: its mode (a mean is wrong when it is pushed one way only), in which places
    near the centre of a known skin, or else near the middle of where it goes, count more, as a game may be
    played with a stick held to one side; None where it is not often enough there to say."""
    bins = np.linspace(-1, 1, 21)                              # their middles
    counts = np.histogram2d(*values.T, bins=21, range=[[-1.05, 1.05]] * 2)[0]
    x, y = (0, 0) if known else np.percentile(values, (2, 98), 0).mean(0)
    away = np.hypot(bins[:, None] - x, bins - y)
    counts *= np.exp(-0.5 * (away / 0.3) ** 2)
    mode = bins[list(np.unravel_index(counts.argmax(), counts.shape))]
    near = np.abs(values - mode).max(1) < 0.1
    return values[near].mean(0) if len(values) >= 30 and near.mean() >= 0.05 else None


# ---------------------------------------------------------------------------------------------- the close-ups
class Closeups:
    """Cuts the close-ups of one geometry (template pixels) out of crops of one size, pad = (width,
    height)."""

    def __init__(self, geometry, pad):
        scale = np.divide(pad, geometry["size"])                               # template -> crop pixels
        sticks = geometry["sticks"]
        boxes = geometry["buttons"]
        self.sticks = [s for s in STICKS if s in sticks]
        self.buttons = [b for b in BUTTONS if b in boxes and b not in LEGACY]
        self.clicks = {}                                       # number of a stick -> of the button on its cap
        centers, travels = [], []
        for i, side in enumerate(self.sticks):
            stick = sticks[side]
            thumb = THUMB[side]
            if thumb in boxes and on_stick(boxes[thumb], stick):
                self.clicks[i] = self.buttons.index(thumb)
            half_cap = stick.get("radius", geometry["size"][0] / 16) / 2       # where the travel is not known
            centers.append(np.multiply(stick["center"], scale))
            travels.append(np.multiply(stick.get("travel") or half_cap, scale))
        self.stick_map = closeup_map(centers, np.divide(travels, TRAVEL), STICK_SIDE)
        boxes = np.float32([boxes[b] for b in self.buttons]).reshape(-1, 2, 2) * scale
        sides = np.maximum(boxes[:, 1] - boxes[:, 0], 4)
        self.button_map = closeup_map(boxes.mean(1), sides / BOX, BUTTON_SIDE)

    def __call__(self, crop):
        """uint8 (h, w, 3) -> [sticks uint8 (k, 57, 57, 3), buttons uint8 (m, 33, 33, 3)]."""
        return [cut(crop, self.stick_map, STICK_SIDE), cut(crop, self.button_map, BUTTON_SIDE)]

    def all(self, crops):
        """Crops of n frames -> the same two arrays with n in front."""
        return [np.stack(kind) for kind in zip(*map(self, crops))]


def closeup_map(centers, steps, side):
    """Where each pixel of the close-ups lies in the crop: two float32 (k side, side) maps for cv2.remap."""
    i = np.arange(side, dtype=np.float32) - (side - 1) / 2
    centers, steps = (np.float32(x).reshape(-1, 2, 1) for x in (centers, steps))
    at = centers + i * steps - 0.5                                    # (k, xy, side); a pixel's middle: + 0.5
    x = np.broadcast_to(at[:, 0, None, :], (len(at), side, side))
    y = np.broadcast_to(at[:, 1, :, None], (len(at), side, side))
    return np.ascontiguousarray(x.reshape(-1, side)), np.ascontiguousarray(y.reshape(-1, side))


def cut(crop, maps, side):
    """The close-ups that closeup_map laid out, uint8 (k, side, side, 3)."""
    if len(maps[0]) == 0:                                                      # remap takes no empty maps
        return np.zeros((0, side, side, 3), np.uint8)
    cuts = cv2.remap(crop, *maps, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return cuts.reshape(-1, side, side, 3)


def on_stick(box, stick):
    """Does this box of L3 / R3 lie on the stick itself, and not on a label beside it?"""
    return np.hypot(*np.reshape(box, (2, 2)).mean(0) - stick["center"]) < stick["radius"]


def montages(previous, current, rest, pressed=np.uint8(0)):
    """Close-ups of n frames, (n, k, S, S, 3) each, and those of the pad at rest and pressed (k, S, S, 3) ->
    panels (n k, 4, S, S, 3). A panel of zeros is one that is not known."""
    panels = [np.broadcast_to(panel, current.shape) for panel in (previous, current, rest, pressed)]
    return np.stack(panels, 2).reshape(-1, PANELS, *current.shape[2:])


@torch.inference_mode()
def net_reads(model, panels, batch=256):
    """Panels of sticks (k, 4, 57, 57, 3) and of buttons (m, 4, 33, 33, 3), uint8 -> log grids (k, 11, 11),
    click logits (k,), button logits (m,), float32. UserError where one is no number."""
    device = next(model.parameters()).device
    sticks, buttons = ([t.to(device) for t in torch.from_numpy(p).split(batch) if len(t)] for p in panels)
    places = [model.sticks(t) for t in sticks]

    def joined(parts, *shape):
        parts = [part.float().cpu() for part in parts]
        out = torch.cat([torch.zeros(0, *shape), *parts]).numpy()
        if not np.isfinite(out).all():
            raise UserError("expected numbers from the reader, found NaN or infinity: "
                            "its weights are damaged, give another --ckpt")
        return out
    return (joined([grid for grid, _ in places], GRID, GRID), joined([click for _, click in places]),
            joined([model.buttons(t) for t in buttons]))


# ------------------------------------------------------------------------------------ the net: two SegFormers
PANELS = 4                                 # previous, current, at rest, pressed: stacked as channels
WIDTHS = (24, 48, 80, 112)
HEADS = (1, 2, 4, 4)
REDUCTION = (4, 2, 1, 1)                   # of keys and values; one block a stage
MLP, JOINED = 3, 64                        # the feed-forward's hidden width in widths; the head's width


class Parser(nn.Module):
    """Two SegFormers, each over montages of four panels: one reads sticks (grid and click), one reads
    buttons."""

    def __init__(self):
        super().__init__()
        self.stick = SegFormer(SUB * SUB + 1)
        self.button = SegFormer(1)
        self.to(memory_format=torch.channels_last)

    def sticks(self, panels):
        """uint8 (B, 4, S, S, 3) -> log of the grid (B, 11, 11) [row = y, column = x], logit of the click
        (B,)."""
        out = self.stick(montage(panels))                                # (B, 9 + 1, S / 4, S / 4)
        cells = F.pixel_shuffle(out[:, :-1], SUB)[:, 0]                        # one cell = 0.2 of the travel
        edge = (cells.shape[-1] - GRID) // 2
        grid = cells[:, edge:edge + GRID, edge:edge + GRID]
        log_p = F.log_softmax(grid.flatten(1), 1).view(grid.shape)
        return log_p, out[:, -1].mean((1, 2))

    def buttons(self, panels):
        """uint8 (B, 4, S, S, 3) -> logit of "pressed" (B,)."""
        out = self.button(montage(panels))                               # (B, 1, S / 4, S / 4)
        return out[:, 0, 2:-2, 2:-2].mean((1, 2))                             # of the box, not its neighbours


def montage(panels):
    """Panels uint8 (B, 4, S, S, 3) -> float (B, 12, S, S): contrast is stretched over all panels together,
    so the same picture elements meet in the first convolution at one scale; what is not known stays 0."""
    mask = panels.flatten(2).any(2)[:, :, None, None, None].float()
    x = panels.float()
    weight = mask / mask.sum(1, keepdim=True).clamp(min=1)
    fewer = x[:, :, ::2, ::2]
    var, mean = torch.var_mean(fewer, (2, 3), correction=0, keepdim=True)                # (B, panel, 1, 1, C)
    center = (mean * weight).sum(1, keepdim=True)          # each colour's mean over the panels that are there
    var = var + (mean - center).square()
    var = (var * weight).sum(1, keepdim=True).mean(-1, keepdim=True)
    x = (x - center) * (mask / (var.sqrt() + 6))               # 6 grey levels: noise is not blown up
    return x.permute(0, 2, 3, 1, 4).flatten(3).permute(0, 3, 1, 2)


class SegFormer(nn.Module):
    """SegFormer with the published files' names (`nvidia/mit-b0`), narrower: a CPU reads faster than real
    time."""

    def __init__(self, labels):
        super().__init__()
        self.segformer = nn.ModuleDict({"encoder": Encoder()})
        self.decode_head = Head(labels)

    def forward(self, x):                                                      # (B, C, H, W)
        return self.decode_head(self.segformer["encoder"](x))                  # (B, labels, H / 4, W / 4)


class Encoder(nn.Module):
    """MiT: four stages at strides 4, 8, 16, 32, one block each."""

    def __init__(self):
        super().__init__()
        later = [Patches(a, b, 3, 2) for a, b in zip(WIDTHS, WIDTHS[1:])]
        self.patch_embeddings = nn.ModuleList([Patches(3 * PANELS, WIDTHS[0], 7, STRIDE), *later])
        self.block = nn.ModuleList(nn.ModuleList([Stage(*sizes)]) for sizes in zip(WIDTHS, HEADS, REDUCTION))
        self.layer_norm = nn.ModuleList(map(nn.LayerNorm, WIDTHS))

    def forward(self, x):                                                      # (B, C, H, W)
        maps = []
        for embed, (block,), norm in zip(self.patch_embeddings, self.block, self.layer_norm):
            x, hw = embed(x)
            x = as_map(norm(block(x, hw)), hw)                                # (B, D, H / stride, W / stride)
            maps.append(x)
        return maps


class Patches(nn.Module):
    """Overlapping patches: a strided convolution, then a norm over channels."""

    def __init__(self, cin, cout, kernel, stride):
        super().__init__()
        self.proj = nn.Conv2d(cin, cout, kernel, stride, kernel // 2)
        self.layer_norm = nn.LayerNorm(cout)

    def forward(self, x):                                                      # (B, C, H, W)
        x = self.proj(x)
        return self.layer_norm(x.flatten(2).transpose(1, 2)), x.shape[2:]      # (B, N, D)


class Stage(nn.Module):
    """x + attention, then x + feed-forward, each after its norm (arXiv 2105.15203, Sec. 3.1)."""

    def __init__(self, d, heads, reduction):
        super().__init__()
        self.layer_norm_1 = nn.LayerNorm(d)
        self.attention = ReducedAttention(d, heads, reduction)
        self.layer_norm_2 = nn.LayerNorm(d)
        self.mlp = MixFFN(d, MLP * d)

    def forward(self, x, hw):                                                  # (B, N, D)
        x = x + self.attention(self.layer_norm_1(x), hw)
        return x + self.mlp(self.layer_norm_2(x), hw)


class ReducedAttention(nn.Module):
    """Self-attention whose keys and values come from a map made `reduction` times smaller."""

    def __init__(self, d, heads, reduction):
        super().__init__()
        self.heads = heads
        self.self = nn.ModuleDict({name: nn.Linear(d, d) for name in ("query", "key", "value")})
        if reduction > 1:
            self.self["sr"] = nn.Conv2d(d, d, reduction, reduction)
            self.self["layer_norm"] = nn.LayerNorm(d)
        self.output = nn.ModuleDict({"dense": nn.Linear(d, d)})

    def forward(self, x, hw):                                                  # (B, N, D)
        kv = x
        if "sr" in self.self:
            kv = self.self["sr"](as_map(x, hw)).flatten(2).transpose(1, 2)
            kv = self.self["layer_norm"](kv)                                   # (B, N / reduction^2, D)
        each = zip(self.self.values(), (x, kv, kv))
        each = (layer(t).unflatten(2, (self.heads, -1)) for layer, t in each)
        q, k, v = (t.transpose(1, 2) for t in each)
        x = F.scaled_dot_product_attention(q, k, v)                            # (B, heads, N, D / heads)
        return self.output["dense"](x.transpose(1, 2).flatten(2))


class MixFFN(nn.Module):
    """An MLP with a 3 x 3 depthwise convolution inside: its zero padding is all that tells a token where it
    is."""

    def __init__(self, d, hidden):
        super().__init__()
        self.dense1 = nn.Linear(d, hidden)
        self.dense2 = nn.Linear(hidden, d)
        self.dwconv = nn.ModuleDict({"dwconv": nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden)})

    def forward(self, x, hw):                                                  # (B, N, D)
        x = self.dwconv["dwconv"](as_map(self.dense1(x), hw))                  # (B, hidden, h, w)
        return self.dense2(F.gelu(x.flatten(2).transpose(1, 2)))               # (B, N, D)


class Head(nn.Module):
    """All-MLP head. The published order is project, upsample, join, fuse; projection and fusion are both
    linear, so their product is applied at each stage's own resolution and the results are upsampled and
    summed: equal numbers at a tenth of the cost."""

    def __init__(self, labels):
        super().__init__()
        self.linear_c = nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(d, JOINED)}) for d in WIDTHS)
        self.linear_fuse = nn.Conv2d(JOINED * len(WIDTHS), JOINED, 1, bias=False)
        self.batch_norm = nn.BatchNorm2d(JOINED)
        self.classifier = nn.Conv2d(JOINED, labels, 1)

    def forward(self, maps):
        fuse = self.linear_fuse.weight[:, :, 0, 0].chunk(len(maps), 1)[::-1]   # joined coarse to fine
        total = 0
        for x, c, f in zip(maps, self.linear_c, fuse):
            weight = f @ c["proj"].weight
            x = F.conv2d(x, weight[..., None, None], f @ c["proj"].bias)
            if x.shape[2:] != maps[0].shape[2:]:
                x = F.interpolate(x, maps[0].shape[2:], mode="bilinear", align_corners=False)
            total = total + x                                                  # (B, 64, H / 4, W / 4)
        return self.classifier(F.relu(self.batch_norm(total)))                 # (B, labels, H / 4, W / 4)


def as_map(x, hw):
    """Tokens (B, N, D) -> map (B, D, h, w), a view: in memory the channels stay last, which a CPU's
    convolutions like."""
    return x.transpose(1, 2).unflatten(2, hw)


# --------------------------------------------------------------------------------------------------- training
def train_net(args):
    """Train the reader, or with --locator the locator, on drawn scenes; what is checked and written every
    --every steps is the running mean of the weights."""
    kind = KINDS["locator" if args.locator else "reader"]
    steps = args.steps or (600 if args.skins and args.ckpt else kind.steps)
    peak = (5e-4 if args.ckpt else 2e-3) if args.lr is None else args.lr
    extract.writable(args.out)
    skins = extract.load_skins(args.skins, kind.width) if args.skins else []
    skins = [s for s in skins if any(p.control for p in s.parts)]
    if args.skins and not skins:
        raise UserError(f"--skins {args.skins}: expected OBS input-overlay presets, "
                        "found pictures only: they do not show what is pressed")
    torch.set_num_threads(max(1, torch.get_num_threads() - args.workers))      # a core renders the scenes
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    model = kind.load(args.ckpt) if args.ckpt else kind.net()
    mean = copy.deepcopy(model)
    held = [*itertools.islice(Teacher(args.seed + 1000, skins, kind.scene, fresh=0), 16)]
    curve = []

    def record(step, **losses):
        curve.append({"step": step, **losses, **kind.check(mean.eval(), held)})
        tqdm.write(" | ".join(f"{k} {v}" for k, v in curve[-1].items()))
    if args.ckpt:
        record(0)                                              # before, to compare the last one with
    loader = torch.utils.data.DataLoader(
        Teacher(args.seed, skins, kind.scene), batch_size=None, num_workers=args.workers,
        prefetch_factor=8 if args.workers else None)
    scenes = iter(loader)
    pools = [Pool(int(args.pool * share)) for share in kind.pools]
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.02, betas=(0.9, 0.98))
    warmup = min(200, steps // 10 + 1)
    bar = tqdm(range(1, steps + 1), desc="train", mininterval=10)
    for step in bar:
        for _ in range(kind.scenes if pools[0].n else 40):                     # forty before the first step
            for pool, rendered in zip(pools, next(scenes)):
                pool.add(*rendered)
        lr = peak * min(step / warmup, 0.5 + 0.5 * math.cos(math.pi * step / (steps + 1)))
        # --- one step: everything below the next line is book-keeping
        model.train()
        counts = [int(args.batch * share) for share in kind.batches]
        batches = [pool.draw(generator, count) for pool, count in zip(pools, counts)]
        loss = kind.loss(model, generator, *batches)
        total = sum(loss.values())
        if not math.isfinite(total.item()):                    # or it would spoil the mean and the file
            raise UserError(f"expected a falling loss, found {total.item()} at step {step}: "
                            f"give a smaller --lr than {peak:g}")
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        follow(mean, model, min(0.998, step / (step + 10)))
        # ---
        losses = {k: round(v.item(), 4) for k, v in loss.items()}
        bar.set_postfix(losses | {"lr": lr}, refresh=False)
        if step % args.every == 0 or step == steps:
            record(step, **losses)
            given = {k: str(v) for k, v in vars(args).items() if k != "run"}
            save_parser(args.out, mean, step=step, curve=curve, args=given)


@torch.no_grad()
def follow(mean, model, decay):
    """The running mean of the weights goes towards the model's: mean = decay mean + (1 - decay) model."""
    for a, b in zip(mean.state_dict().values(), model.state_dict().values()):
        a.lerp_(b, 1 - decay) if a.is_floating_point() else a.copy_(b)


def parser_loss(model, generator, sticks, buttons):
    """Cross-entropy of the grids, binary cross-entropy of clicks and buttons. The teacher presses each button
    in a tenth to a half of the frames and only shows buttons that the skin has, so a head of all zeros can't
    win."""
    panels, values, clicks = sticks
    panels, grid = turn_and_mask(generator, panels, labels(values))
    log_p, click = model.sticks(panels)
    loss = {"grid": -(grid * log_p).sum((1, 2)).mean()}
    seen = ~clicks.isnan()
    if seen.any():
        loss["click"] = F.binary_cross_entropy_with_logits(click[seen], clicks[seen])
    panels, _ = turn_and_mask(generator, buttons[0])
    loss["button"] = F.binary_cross_entropy_with_logits(model.buttons(panels), buttons[1])
    return loss


def locator_loss(model, generator, batch):
    """Cross-entropy of each place's heat map, in which "not here" is one more cell, and the log error of the
    sizes at the true place."""
    seed = torch.randint(1 << 31, (), generator=generator)
    rng = np.random.default_rng(seed.item())
    pictures, truths = (part.numpy() for part in batch)
    pairs = (a_window(rng, *pair) for pair in zip(pictures, truths))
    windows, places = (torch.from_numpy(np.stack(part)) for part in zip(*pairs))           # (B, 20, 4)
    log_p, sizes = model(windows)
    here = ~places[..., 0].isnan()
    cells = (torch.arange(extract.WINDOW // extract.CELL) + 0.5) * extract.CELL
    away = (cells - torch.nan_to_num(places[..., :2, None])) / (0.6 * extract.CELL)
    bumps = torch.exp(-0.5 * away ** 2)                                        # (B, 20, xy, 48)
    grid = bumps[:, :, 1, :, None] * bumps[:, :, 0, None, :]
    grid = grid / grid.sum((2, 3), keepdim=True).clamp(min=1e-6)
    grid = grid * here[..., None, None]
    elsewhere = (~here).float()[..., None]
    label = torch.cat([grid.flatten(2), elsewhere], 2)
    got = (sizes * grid[:, :, None]).sum((3, 4))
    true = places[..., 2:].clamp(min=1).log().nan_to_num()
    wrong = (got - true).abs().mean(2) * here
    count = here.sum(0).clamp(min=1)                                           # (20,)
    return {"heat": -(label * log_p).sum(2).mean(),
            "size": wrong.sum() / count.sum(),
            "pad": wrong[:, -1].sum() / count[-1]}                             # once more: the overlay's box


def a_window(rng, picture, places):
    """One square out of a scene of the locator's, its colours sometimes inverted or exchanged -> uint8 (192,
    192, 5), places (20, 4) in it. In most cases the whole pad is in it."""
    whole, pad = len(picture), places[-1]
    first, last, smallest = np.zeros(2), np.full(2, whole), 130
    if not np.isnan(pad[0]) and rng.random() < 0.85:
        first = pad[:2] + pad[2:] / 2                                          # the window ends after it
        last = pad[:2] - pad[2:] / 2                                           # and begins before it
        smallest = min(max(1.05 * pad[2:].max(), smallest), whole - 2)
    side = rng.uniform(smallest, whole)
    first = np.clip(first - side, 0, whole - side)
    last = np.clip(last, 0, whole - side)
    corner = first + rng.random(2) * (last - first)
    cut = extract.window(picture, *corner, side)
    if rng.random() < 0.15:
        cut[..., :3] = 255 - cut[..., :3]
    if rng.random() < 0.3:
        cut[..., :3] = cut[..., rng.permutation(3)]
    if rng.random() < 0.1:
        cut[..., 3:] = 0                                                       # as if the game stood still
    k = extract.WINDOW / side
    places = k * np.hstack([places[:, :2] - corner, places[:, 2:]])
    return cut, only_inside(places, extract.WINDOW)


def only_inside(places, side):
    """The places (20, 4), nan where their middle is outside a square picture."""
    x, y = places[:, :2].T
    inside = (0 <= x) & (x < side) & (0 <= y) & (y < side)
    return np.where(inside[:, None], places, np.nan).astype(np.float32)


def turn_and_mask(generator, panels, grid=None):
    """Each eighth of the batch turned and mirrored its own way, colours sometimes inverted; now and then no
    previous frame, no pad at rest -> panels, grid."""
    known = panels.flatten(2).any(2)
    known[:, ::2] &= torch.rand(len(panels), 2, generator=generator) > 0.12
    def turned(part, i, axes):
        part = torch.rot90(part, i % 4, axes)
        return part.flip(axes[1]) if i >= 4 else part
    for i, rows in enumerate(torch.arange(len(panels)).chunk(8)):
        panels[rows] = turned(panels[rows], i, (2, 3))
        if grid is not None:
            grid[rows] = turned(grid[rows], i, (1, 2))
        if torch.rand((), generator=generator) < 0.15:
            panels[rows] = 255 - panels[rows]
    return panels * known[:, :, None, None, None], grid


class Pool:
    """The last `size` close-ups of one kind with their truth, drawn from at random: each slow rendering
    serves often."""

    def __init__(self, size):
        self.size = size
        self.n = 0
        self.at = 0
        self.data = None

    def add(self, *tensors):
        """Store these rows over the oldest."""
        if self.data is None:
            empty = lambda t: torch.empty((self.size, *t.shape[1:]), dtype=t.dtype)
            self.data = [*map(empty, tensors)]
        rows = (self.at + torch.arange(len(tensors[0]))) % self.size
        for store, t in zip(self.data, tensors):
            store[rows] = t
        self.at = (self.at + len(rows)) % self.size
        self.n = min(self.n + len(rows), self.size)

    def draw(self, generator, count):
        """`count` rows of each tensor, with replacement."""
        rows = torch.randint(self.n, (count,), generator=generator)
        return [store[rows] for store in self.data]


# ------------------------------------------------------------------------------------------------ the teacher
# A scene = one skin over one moving background, some frames of play, through one video codec: what a clip
# folder would hold, with the truth. What differs between channels is drawn per scene: skin, size, opacity ...
FRAMES, RESTS = 8, 5                       # frames of a scene; pictures that its pad at rest is the median of
SCENE, SAMPLED = 288, 10                   # pixels a side of the locator's scenes, and their frames


class Teacher(torch.utils.data.IterableDataset):
    """Endless scenes as tensors, each of a skin drawn anew or of one of `skins`; a share `fresh` of new ones
    prevents forgetting."""

    def __init__(self, seed, skins, scene, fresh=0.35):
        self.seed = seed
        self.skins = skins
        self.scene = scene
        self.fresh = fresh

    def __iter__(self):
        cv2.setNumThreads(1)
        rng = np.random.default_rng([self.seed, 7])
        backdrops = [extract.backdrop(rng, 400, 600) for _ in range(24)]
        while True:
            if rng.random() < 0.25:
                backdrops[rng.integers(24)] = extract.backdrop(rng, 400, 600)
            if not self.skins or rng.random() < self.fresh:
                skin = extract.random_skin(rng)
            else:
                skin = self.skins[rng.integers(len(self.skins))]
            if rng.random() < 0.6:
                skin = restyle(rng, skin)
            yield [[torch.from_numpy(a) for a in part] for part in self.scene(rng, skin, backdrops)]


def scene(rng, skin, backdrops):
    """One scene -> panels with truth: (sticks uint8 (8 k, 4, 57, 57, 3), values (8 k, 2), click (8 k,) (nan:
    not shown on this pad)), (buttons uint8 (8 m, 4, 33, 33, 3), pressed (8 m,)). The panels are previous,
    current, rest, pressed: in half of the scenes the reader knows the very skin, so how it looks pressed, and
    its geometry is right; in the others it has a foreign one or the locator's."""
    overlay = Overlay(rng, skin)
    actions = random_play(rng, FRAMES)
    film = Film(rng, backdrops, overlay.w, overlay.h)
    known = rng.random() < 0.5
    much = rng.choice([0, 0.15]) if known else rng.choice([0.1, 0.5, 1, 1])
    geometry = misplaced(rng, skin, much)
    closeups = Closeups(geometry, overlay.pad)
    sprites = [overlay.sprite(extract.draw(skin, a)) for a in actions]
    views = [film.step() for _ in actions]
    frames = [*map(overlay.over, sprites, views)]
    now = closeups.all(overlay.crops(frames))
    # the pad at rest: a median over frames that mostly are at rest, over the same background or over others
    asleep = overlay.sprite(extract.draw(skin))
    idle = rng.choice([0.3, 0.75, 0.95, 1, 1])
    same = rng.random() < 0.4
    rests = []
    for _ in range(RESTS):
        if not same:
            film.cut()
        sprite = asleep if rng.random() < idle else sprites[rng.integers(FRAMES)]
        rests.append(overlay.over(sprite, views[rng.integers(FRAMES)] if same else film.window()))
    ground = np.median(views if same else [film.window()], 0)
    down = overlay.over(overlay.sprite(extract.draw_pressed(skin)), ground)
    overlay.passes = overlay.passes * (rng.random() < 0.3)     # a median over a video hardly shows its codec
    rest = [np.sort(cuts, 0)[RESTS // 2] for cuts in closeups.all(overlay.crops(rests))]    # a fast np.median
    [down] = overlay.crops([down])
    gain = rng.uniform(0.85, 1.1)                              # drawn, not seen: its light is a little off
    lift = rng.uniform(-12, 12)
    down = cv2.convertScaleAbs(down, alpha=gain, beta=lift)
    down = closeups(down) if known else np.uint8([0, 0])
    before = [np.concatenate([cuts[:1], cuts[:-1]]) for cuts in now]
    sticks, buttons = map(montages, before, now, rest, down)
    values = np.zeros((FRAMES, len(closeups.sticks), 2), np.float32)
    clicks = np.full((FRAMES, len(closeups.sticks)), np.nan, np.float32)
    pressed = actions[:, [BUTTON[b] for b in closeups.buttons]]
    for i, side in enumerate(closeups.sticks):
        true = np.divide(skin.sticks[side]["travel"], geometry["sticks"][side]["travel"])
        values[:, i] = np.clip(actions[:, STICKS[side]] * true, -1, 1)
        thumb = THUMB[side]
        if thumb in skin.buttons and on_stick(skin.buttons[thumb], skin.sticks[side]):
            clicks[:, i] = actions[:, BUTTON[thumb]]
    return (sticks, values.reshape(-1, 2), clicks.ravel()), (buttons, pressed.ravel())


def located_scene(rng, skin, backdrops):
    """One scene for the locator -> ((picture uint8 (1, 288, 288, 5), places float32 (1, 20, 4)),): what
    extract.motion_picture() makes of ten frames; each place's x, y and two sizes, nan where it isn't seen."""
    film = Film(rng, backdrops, SCENE, SCENE)
    views = [film.step() for _ in range(SAMPLED)]
    if rng.random() < 0.4:                                     # sampled so far apart that nothing stays
        views = [film.cut() or film.window() for _ in range(SAMPLED)]
    frames = [view.copy() for view in views]
    places = np.full((len(extract.PLACES), 4), np.nan, np.float32)
    if rng.random() < 0.5:
        for _ in range(rng.integers(1, 6)):
            distract(rng, frames, views)
    if rng.random() < 0.86:
        place_pad(rng, skin, frames, places)
    if rng.random() < 0.3:
        distract(rng, frames, views)
    if rng.random() < 0.6:
        quality = rng.integers(40, 92)
        frames = [jpeg(frame, quality) for frame in frames]
    if rng.random() < 0.3:
        gain = rng.uniform(0.7, 1.1)
        lift = rng.uniform(-10, 20)
        frames = [cv2.convertScaleAbs(frame, alpha=gain, beta=lift) for frame in frames]
    return (extract.motion_picture(np.stack(frames))[None], places[None]),


def place_pad(rng, skin, frames, places):
    """Draw a skin into the frames, in place, at one place and size in some states, and fill in its places."""
    bounds = np.reshape(extract.visible_box(skin), (2, 2))
    w, h = bounds[1] - bounds[0]
    wide = np.exp(rng.uniform(*np.log([60, 230])))
    scale = wide / max(w, 0.8 * h)
    size = np.multiply(skin.size, (scale, scale * rng.uniform(0.85, 1.18)))
    size = np.maximum(size, 20).astype(int)
    k = size / skin.size                                       # template -> scene pixels
    room = np.maximum(SCENE - (w, h) * k, 1)
    spare = 0.1 * k * (w, h)                                   # so much of it may be cut off
    corner = rng.uniform(-spare, room + spare) - bounds[0] * k
    opacity = 1.0 if rng.random() < 0.3 else rng.uniform(0.45, 1)
    lazy = rng.choice([1, 3, 12])                              # frames between two samples
    actions = random_play(rng, len(frames) * lazy)[::lazy]
    actions[:, 21:] *= rng.choice([1, 1, 1, 0.3, 0])
    actions[:, :21] *= rng.random(21) < rng.uniform(0.2, 1.5)  # some are never pressed
    shown = rng.choice([1, 1, 1, 0.8, 0.6])
    blur = rng.uniform(0.3, 0.8) if rng.random() < 0.3 else 0
    for frame, action in zip(frames, actions):
        if rng.random() > shown:                               # the overlay is not there yet
            continue
        sprite = extract.premultiply(extract.draw(skin, action))
        sprite = cv2.resize(sprite, size.tolist(), interpolation=cv2.INTER_AREA)
        sprite = cv2.GaussianBlur(sprite, (0, 0), blur) if blur else sprite
        sprite = cv2.warpAffine(sprite, np.c_[np.eye(2), corner], (SCENE, SCENE))
        rgb, alpha = np.split(sprite * np.float32(opacity), [3], 2)
        frame[:] = np.rint(rgb + frame * (1 - alpha / 255))
    boxes = {name: np.reshape(box, (2, 2)) for name, box in skin.buttons.items()}
    boxes["pad"] = bounds
    for i, name in enumerate(extract.PLACES):
        if name in boxes:
            low, high = boxes[name]
            places[i, :2] = (low + high) / 2 * k + corner
            places[i, 2:] = (high - low) * k
        elif name in skin.sticks:
            stick = skin.sticks[name]
            travel = max(np.mean(stick["travel"]), 0.25 * stick["radius"])
            places[i, :2] = stick["center"] * k + corner
            places[i, 2:] = travel * k.mean(), stick["radius"] * k.mean()
    places[:] = only_inside(places, SCENE)


def distract(rng, frames, views):
    """Draw something into the frames, in place, that stands still as an overlay does: a piece of another
    scene, a panel, a word, keys that light up, a disc."""
    x, y = rng.integers(-20, SCENE, 2).tolist()
    w, h = rng.integers(8, 120), rng.integers(6, 70)
    kind = rng.choice(["piece", "panel", "word", "keys", "disc"])
    inks = rng.integers(0, 256, (2, 3)).tolist()
    opacity = rng.uniform(0.3, 1)
    piece = views[rng.integers(len(views))][:h, :w]
    letters = "".join(rng.choice([*"ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"], rng.integers(1, 18)))
    columns, step = rng.integers(1, 6), int(rng.integers(10, 34))
    size = rng.uniform(0.25, 1.2)
    often = rng.uniform(0, 0.4)
    write = lambda where, text, at, ink, size: cv2.putText(
        where, text, at, cv2.FONT_HERSHEY_SIMPLEX, size, ink, max(1, int(size * 2)), cv2.LINE_AA)
    for frame in frames:
        layer = frame.copy()
        ink, other = inks if rng.random() < often else inks[::-1]
        if kind == "piece":
            hidden = layer[max(y, 0):, max(x, 0):][:h, :w]
            hidden[:] = piece[:len(hidden), :hidden.shape[1]]
        elif kind == "panel":
            corners = (x, y), (x + w, y + h)
            cv2.rectangle(layer, *corners, inks[0], -1)
            cv2.rectangle(layer, *corners, inks[1], 2)
        elif kind == "word":
            write(layer, letters[:8], (x, y + 10), ink, size)
        elif kind == "keys":
            for i, letter in enumerate(letters):
                left, top = x + i % columns * step, y + i // columns * step
                key, label = inks if rng.random() < often else inks[::-1]
                right, bottom = left + step - 3, top + step - 3
                cv2.rectangle(layer, (left, top), (right, bottom), key, -1)
                write(layer, letter, (left + 2, top + step - 6), label, step / 40)
        else:
            filled = -1 if opacity > 0.6 else 2
            cv2.circle(layer, (x, y), int(h) // 2, ink, filled, cv2.LINE_AA)
        frame[:] = cv2.addWeighted(layer, opacity, frame, 1 - opacity, 0)


def random_play(rng, n):
    """Inputs with a person's dynamics, float32 (n, 25): taps, held buttons, chords; sticks that rest, ramp,
    stay tilted, tremble."""
    actions = np.zeros((n, extract.A), np.float32)
    share = rng.uniform(0.08, 0.45)
    dwell = rng.choice([2, 4, 10, 30], size=21)
    on = rng.random(21) < share
    for t in range(n):
        on = on ^ (rng.random(21) < np.where(on, 1, share / (1 - share)) / dwell)
        actions[t, :21] = on
    actions[:, [BUTTON[b] for b in LEGACY]] = 0
    for s in STICKS.values():
        idle = rng.choice([0.1, 0.35, 0.8])
        square = rng.random() < 0.3
        noise = rng.choice([0, 0, 0.03])
        at = np.zeros(2)
        goal = np.zeros(2)
        speed = 1.0
        if rng.random() > idle:
            at = goal = tilt(rng, square)
        for t in range(n):
            if rng.random() < 0.2:
                goal = np.zeros(2) if rng.random() < idle else tilt(rng, square)
                speed = rng.choice([0.3, 0.7, 3])
            step = goal - at
            at = at + step * min(1, speed / (np.hypot(*step) + 1e-6))
            actions[t, s] = np.clip(at + rng.normal(0, 1, 2) * noise, -1, 1)
    return actions


def tilt(rng, square):
    """Where a stick is pushed to: often full tilt, often along an axis."""
    along = rng.random() < 0.4
    angle = rng.uniform(0, 2 * np.pi)
    if along:
        angle = rng.integers(8) * np.pi / 4 + rng.normal(0, 0.08)
    v = np.array([np.cos(angle), np.sin(angle)])
    v = v / np.abs(v).max() if square else v
    return v * (1 if rng.random() < 0.5 else rng.uniform(0.1, 1))


# -------------------------------------------------------------------------------------------------- machinery
# ------------------------------------------------------------------------------ what a drawn video is made of
def restyle(rng, skin):
    """A skin as another author might have made it: other colours, a thinner body, other pressed looks, darker
    caps that go further or tilt."""
    order, gain = np.arange(3), np.full(3, rng.uniform(0.6, 1.1))
    if rng.random() < 0.5:
        order, gain = rng.permutation(3), rng.uniform(0.5, 1.2, 3)
    recoloured, inverted = rng.random(2) < (0.7, 0.15)
    thin = rng.uniform(0.15, 0.8) if rng.random() < 0.3 else 1
    dark = rng.uniform(0.2, 0.6) if rng.random() < 0.15 else 1
    longer = rng.uniform(0.6, 1.4) if rng.random() < 0.5 else 1
    relit, moved = rng.random(2) < (0.35, 0.2)
    tilt = rng.uniform(0.15, 0.5) if rng.random() < 0.3 else 0

    def paint(sprite, share=1.0):
        rgb, alpha = np.split(sprite.astype(np.float32), [3], 2)
        if recoloured:
            rgb = (alpha - rgb if inverted else rgb)[..., order] * gain
        return np.dstack([np.minimum(rgb * share, alpha), alpha]).astype(np.uint8)

    parts, sticks = [], dict(skin.sticks)
    for p in skin.parts:
        on_cap = p.control in STICKS
        sprites = [s if s is None else paint(s, dark if on_cap else 1) for s in p.sprites]
        travel = np.multiply(p.travel, longer)
        if not p.control and thin < 1:
            sprites = [s if s is None else np.uint8(s * thin) for s in sprites]
        elif on_cap and sprites[0] is not None:
            if rng.random() < 0.3 and THUMB[p.control] in skin.buttons:
                sprites[1] = relight(rng, sprites[0])
            if moved:
                sprites[2:] = [relight(rng, sprites[0])]
            if p.control in sticks:
                sticks[p.control] = {**sticks[p.control], "travel": travel.tolist()}
        elif relit and len(sprites) == 2 and sprites[0] is not None:
            sprites[1] = relight(rng, sprites[0])
        parts.append(replace(p, sprites=sprites, travel=travel, tilt=tilt))
    return replace(skin, parts=parts, sticks=sticks)


def relight(rng, sprite):
    """A sprite, premultiplied, as another skin would show it pressed: turned to its opposite colours, smaller
    or larger, with a ring, a spot or a see-through disc on it, or tinted."""
    h, w = sprite.shape[:2]
    rgb, alpha = np.split(sprite.astype(np.float32), [3], 2)
    ink = rng.choice([0, 255]) * np.ones(3)
    if rng.random() < 0.6:
        ink = rng.uniform(0, 255, 3)
    share = rng.uniform(0.35, 1)
    how = rng.integers(5)
    if how == 0:
        rgb = alpha - rgb
    elif how == 1:
        middle = (w - 1) / 2, (h - 1) / 2
        larger = cv2.getRotationMatrix2D(middle, 0, rng.choice([0.8, 0.88, 1.12]))
        return cv2.warpAffine(sprite, larger, (w, h), flags=cv2.INTER_LINEAR)
    elif how < 4:
        inked = cv2.boundingRect(np.uint8(sprite[..., 3] > 24))
        size = rng.uniform(0.3, 0.9) if how == 2 else rng.uniform(0.8, 1)
        rx, ry = (max(int(side / 2 * size), 1) for side in inked[2:])
        stroke = -1
        if how == 2 and rng.random() < 0.6:
            stroke = max(int(min(rx, ry) * rng.uniform(0.15, 0.5)), 1)
        spot = np.zeros((h, w), np.uint8)
        middle = inked[0] + inked[2] // 2, inked[1] + inked[3] // 2
        cv2.ellipse(spot, middle, (rx, ry), 0, 0, 360, 255, stroke, cv2.LINE_AA)
        cover = spot[..., None] / 255 * (share if how == 2 else rng.uniform(0.25, 0.7))
        rgb = rgb * (1 - cover) + ink * cover
        alpha = alpha * (1 - cover) + 255 * cover
    else:
        rgb = rgb * (1 - share) + ink * alpha / 255 * share
    painted = np.dstack([np.minimum(rgb, alpha), alpha])
    return painted.clip(0, 255).astype(np.uint8)


def misplaced(rng, skin, much):
    """The skin's geometry as a foreign template or the locator would tell it: boxes, centres and travels a
    little (much = 0.1) or far (1) off."""
    geometry = {"size": skin.size, "buttons": {}, "sticks": {}}
    for name, box in skin.buttons.items():
        corners = np.reshape(box, (2, 2))
        side = corners[1] - corners[0]
        middle = corners.mean(0) + rng.uniform(-0.15, 0.15, 2) * much * side
        half = side / 2 * np.exp(rng.uniform(-0.2, 0.2, 2) * much)
        geometry["buttons"][name] = [*(middle - half), *(middle + half)]
    for side, stick in skin.sticks.items():
        travel = np.maximum(stick["travel"], 1)
        center = stick["center"] + rng.uniform(-0.5, 0.5, 2) * much * travel
        longer = math.exp(rng.uniform(math.log(0.85), math.log(1.4)) * much)
        geometry["sticks"][side] = {**stick, "center": center, "travel": [*(travel * longer)]}
    return geometry


class Film:
    """A moving picture behind the overlay: windows into backdrops that stand still, scroll, shake, zoom or
    cut."""

    def __init__(self, rng, backdrops, w, h):
        self.rng = rng
        self.backdrops = backdrops
        self.size = (w, h)
        self.mode = rng.choice(["still", "still", "scroll", "shake", "zoom", "cut"])
        self.cut()
        self.velocity = rng.normal(0, 1, 2) * rng.choice([1, 4, 12])
        self.growth = rng.normal(0, 0.03)
        self.sprites = []                                      # pieces of other backdrops that move over it
        for _ in range(rng.integers(0, 4)):
            source = rng.integers(len(backdrops))
            at = rng.uniform(0, 1, 2) * (w, h)
            velocity = rng.normal(0, 6, 2)
            side = rng.integers(6, max(7, h // 3))
            self.sprites.append([source, at, velocity, side])

    def cut(self):
        """Another backdrop, or another place in it."""
        self.image = self.backdrops[self.rng.integers(len(self.backdrops))]
        self.zoom = self.rng.choice([0.6, 1, 1, 2, 3])
        H, W = self.image.shape[:2]
        room = (W, H) - np.array(self.size) / self.zoom
        self.at = self.rng.uniform(0, 1, 2) * np.maximum(room, 1)

    def window(self):
        """uint8 (h, w, 3): what is behind the overlay now."""
        m = np.c_[np.eye(2) / self.zoom, self.at]
        flags = cv2.INTER_LINEAR if self.zoom == 1 or self.rng.random() < 0.5 else cv2.INTER_NEAREST
        return cv2.warpAffine(self.image, m, self.size, flags=flags | cv2.WARP_INVERSE_MAP,
                              borderMode=cv2.BORDER_REFLECT)

    def step(self):
        """The next frame's background."""
        if self.mode == "cut" and self.rng.random() < 0.3:
            self.cut()
        shake = self.rng.normal(0, 1, 2) * np.abs(self.velocity)
        self.at = self.at + {"scroll": self.velocity, "shake": shake}.get(self.mode, 0)
        self.zoom *= 1 + self.growth if self.mode == "zoom" else 1
        view = self.window()
        for sprite in self.sprites:
            source, at, velocity, side = sprite
            sprite[1] = at = at + velocity
            x, y = at.astype(int) % self.size
            hidden = view[y:y + side, x:x + side]
            hidden[:] = self.backdrops[source][:hidden.shape[0], :hidden.shape[1]]
        return view


class Overlay:
    """How one video shows one skin: size, opacity, quality, and where the crop lies a little wrong."""

    def __init__(self, rng, skin):
        self.rng = rng
        self.skin = skin
        (W, H) = skin.size
        self.w = int(np.exp(rng.uniform(*np.log([96, 380]))))
        self.h = max(16, round(self.w * H / W))
        self.opacity = 1.0 if rng.random() < 0.25 else rng.uniform(0.5, 1)
        self.pad = (320, max(16, round(320 * H / W)))
        wrong = rng.choice([0.2, 1])                           # most poses are better than the worst allowed
        k = 1 + rng.uniform(-0.02, 0.02) * wrong
        shift = rng.uniform(-1.5, 1.5, 2) * wrong
        size = np.array([self.w, self.h])
        pad = np.array(self.pad)
        s = size / pad * k
        offset = size / 2 + shift - s * pad / 2 + s / 2 - 0.5
        self.warp = np.c_[np.diag(s), offset]                  # crop -> video pixels
        self.passes = rng.choice([0, 1, 1, 2])                 # through a codec
        self.blur = rng.uniform(0.4, 1.2) if rng.random() < 0.2 else 0
        gamma = np.exp(rng.normal(0, 0.2))
        gain = rng.uniform(0.75, 1.1)
        lift = rng.uniform(0, 20)
        grey = np.arange(256) / 255
        lut = np.clip(255 * gain * grey ** gamma + lift, 0, 255).astype(np.uint8)
        self.lut = lut if rng.random() < 0.4 else None
        self.jpeg = 90 if rng.random() < 0.6 else None

    def sprite(self, rgba):
        """A drawn skin at the video's size, premultiplied by its alpha and the opacity: float32 (h, w, 4)."""
        rgba = cv2.resize(extract.premultiply(rgba), (self.w, self.h), interpolation=cv2.INTER_AREA)
        return rgba.astype(np.float32) * np.float32(self.opacity)

    def over(self, sprite, view):
        """The sprite drawn over what is behind it, uint8 (h, w, 3)."""
        return np.rint(sprite[..., :3] + view * (1 - sprite[..., 3:] / 255)).astype(np.uint8)

    def crops(self, frames):
        """Frames -> crops as extract.py would cut them, one by one."""
        for _ in range(self.passes):
            frames = codec(self.rng, frames)
        for frame in frames:
            if self.blur:
                frame = cv2.GaussianBlur(frame, (0, 0), self.blur)
            if self.lut is not None:
                frame = self.lut[frame]
            crop = cv2.warpAffine(frame, self.warp, self.pad, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
                                  borderMode=cv2.BORDER_REPLICATE)
            yield jpeg(crop, self.jpeg) if self.jpeg else crop


def codec(rng, frames):
    """Frames as a video codec leaves them: a JPEG, then JPEGs of what changed; blocks with little change are
    kept."""
    quality = rng.integers(45, 95)
    inter = rng.integers(30, 92)
    keep = rng.choice([0, 1, 3, 6])
    out = [jpeg(frames[0], quality)]
    for frame in frames[1:]:
        last = out[-1]
        change = cv2.addWeighted(frame, 0.5, last, -0.5, 128)
        moved = cv2.absdiff(frame, last)
        blocks = cv2.resize(moved, None, fx=1 / 8, fy=1 / 8, interpolation=cv2.INTER_AREA)
        still = (blocks.max(2) < keep).astype(np.uint8)
        still = cv2.resize(still, frame.shape[1::-1], interpolation=cv2.INTER_NEAREST)
        change[still > 0] = 128
        out.append(cv2.addWeighted(last, 1, jpeg(change, inter), 2, -256))
    return out


def jpeg(image, quality):
    """A picture as JPEG leaves it."""
    code = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, int(quality)])[1]
    return cv2.imdecode(code, cv2.IMREAD_COLOR)


# ------------------------------------------------------------------------------------ pictures, files, scores
def as_wide_as(template, width):
    """The template, uint8 (h, w, 4), no sharper than a video that shows it so many pixels wide."""
    h, w = template.shape[:2]
    if width >= w:
        return template
    size = max(round(width), 1), max(round(width * h / w), 1)
    small = cv2.resize(extract.premultiply(template), size, interpolation=cv2.INTER_AREA)
    blurred = cv2.resize(small, (w, h), interpolation=cv2.INTER_LINEAR)
    alpha = np.maximum(blurred[..., 3:], 1)
    straight = np.minimum(blurred[..., :3] * (255 / alpha), 255)
    return np.dstack([straight.astype(np.uint8), blurred[..., 3:]])


def in_the_videos_light(templates, picture):
    """Templates, uint8 (h, w, 4), the first at rest, as they would look in the video whose median picture (h,
    w, 3) is given: by a line fitted where the first is opaque; where little is, as a share (the overlay's
    opacity) of it over the mean colour beside it -> list of uint8 (h, w, 3)."""
    drawn = []
    for template in templates:
        alpha = template[..., 3:] / 255.0
        rgb = template[..., :3].astype(float)
        if not drawn:
            solid = template[..., 3] > 200
            beside = template[..., 3] < 25
            ground = picture[beside].mean(0) if beside.any() else np.full(3, 127.0)
            full = alpha * (rgb - ground)
            share = ((picture - ground) * full).sum() / max((full ** 2).sum(), 1)
            opacity = np.clip(share, 0.3, 1)
            fitted = solid.sum() >= 200 and rgb[solid].std() >= 8
            if fitted:
                gain, lift = np.polyfit(rgb[solid].ravel(), picture[solid].ravel(), 1)
                gain = np.clip(gain, 0.3, 1.1)
        if fitted:
            lit = np.clip(gain * rgb + lift, 0, 255)
            seen = alpha * lit + (1 - alpha) * picture
        else:
            seen = np.clip(ground + opacity * alpha * (rgb - ground), 0, 255)
            beside = template[..., 3] < 25
            seen[beside] = picture[beside]
        drawn.append(np.rint(seen).astype(np.uint8))
    return drawn


def likeness(a, b, centre=True):
    """Correlation, -1..1, of two pictures, each colour's mean taken off; centre=False: of edge maps, which
    average 0."""
    if centre:
        a, b = (x - x.mean((0, 1), dtype=np.float32) for x in (a, b))
    scale = np.linalg.norm(a) * np.linalg.norm(b)
    return float((a * b).sum() / (scale + 1e-6))


def edges(crop):
    """Sobel x and y of the crop in grey at half its size, float32 (2, h, w); strong edges are cut off, so
    that no single one decides."""
    grey = cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    slopes = cv2.Sobel(small, cv2.CV_32F, 1, 0), cv2.Sobel(small, cv2.CV_32F, 0, 1)
    return np.clip(np.stack(slopes), -80, 80)


def run(args):
    """Read every clip folder of this process's share."""
    with extract.reading(f"--device {args.device}", "a device of this machine, such as cpu"):
        model = load_parser(args.ckpt).to(args.device)
    wrong = []
    folders = extract.shard(extract.clips_in(args.data))
    for i, folder in enumerate(folders, 1):
        try:
            line = run_clip(model, folder, args.again, args.drop_pads)
        except Busy:
            line = "passed over, another process reads it"
        except UserError as e:                                 # the other clips are read all the same
            wrong.append(line := str(e))
        print(f"clip {i}/{len(folders)} | {folder.name} | {line}", flush=True)
    if not folders:
        print("nothing to do: there are more processes than clips")
    if wrong:
        raise UserError(f"{wrong[0]} (clips that could not be read: {len(wrong)})")


def run_clip(model, folder, again=False, drop=False):
    """Read one clip folder -> one line that says what came out. again: also where it was read before; drop:
    then remove its crops. Busy where another process is at it."""
    clip, pads = open_pads(folder)
    if not clip.get("box"):
        return "recorded play, no overlay to read: left as it is"
    if not pads:
        return "read already, its pads were dropped: to read it anew, delete the clip and cut it again"
    line = "read already: --again reads it anew"
    again = again or unread(folder, clip["n"])
    if again or drop:
        with extract.lock(folder / ".lock"):
            if again:
                line = label_clip(model, folder, clip, pads)
            if drop:
                pads.data = None                               # Windows removes no file that is open
                for path in folder.glob("pads*.npy"):
                    path.unlink()
                line += " | pads dropped"
    return line


def open_pads(folder):
    """A clip folder -> clip.json as a dict, its crops (extract.Frames), checked against each other; None for
    the crops of a recorder's clip, which has no overlay, and of one that was read and whose pads were
    dropped."""
    clip = extract.read_clip(folder)
    if not clip.get("box"):
        return clip, None
    dropped = not (folder / "pads.npy").exists() and not unread(folder, clip.get("n"))
    pads = None if dropped else extract.Frames(folder, "pads")
    expected = (f"{clip.get('n')} crops of {clip.get('pad')}, a geometry and an affine in clip.json "
                "(cut the clip again)")
    with extract.reading(folder, expected), np.errstate(all="ignore"):
        if pads and [len(pads), *pads[0].shape[1::-1]] != [clip["n"], *clip["pad"]]:
            raise ValueError(f"{len(pads)} of {pads[0].shape[1::-1]} in pads.npy")
        closeups = Closeups(clip["geometry"], clip["pad"])   # all that reading asks of a geometry, tried once
        numbers = [*closeups.stick_map, *closeups.button_map, width_in_video(clip)]
        if not all(np.isfinite(x).all() for x in numbers):
            raise ValueError("numbers that are not finite")
    return clip, pads


def width_in_video(clip):
    """How many pixels of the video the template is wide."""
    return np.hypot(*np.array(clip["affine"])[:, 0]) * clip["geometry"]["size"][0]


def read_templates(folder, clip):
    """template.png of a clip and, where it has one, pressed.png, uint8 (h, w, 4), as sharp as the video shows
    them; none for a pad that the locator found: its template is the video's own picture."""
    pictures = []
    for path in (folder / "template.png", folder / "pressed.png"):
        if path.is_file() and clip.get("matcher") != "locator":
            picture = extract.read_rgba(path)
            size = list(picture.shape[1::-1])
            if size != clip["pad"]:
                raise UserError(f"{path}: expected a picture of {clip['pad']}, found {size}: "
                                "cut the clip again")
            pictures.append(as_wide_as(picture, width_in_video(clip)))
    return pictures


def unread(folder, n):
    """Is anything missing of what a reading writes? (A clip is whole when its three files are, with n rows
    each.)"""
    try:
        read_rows(folder, n, "actions", "confidence", "keep")
    except UserError:
        return True
    return False


def read_rows(folder, n, *names):
    """Files of a clip of n rows, by name: actions and truth float32 (n, 25), confidence (n,), keep bool."""
    arrays = []
    for name in names:
        path, wide = folder / f"{name}.npy", name in ("actions", "truth")
        dtype, shape = bool if name == "keep" else np.float32, (n, extract.A) if wide else (n,)
        arrays.append(extract.read_npy(path, dtype, shape))
        if wide:
            extract.check_actions(path, arrays[-1], n)
    return arrays


def r2(got, true):
    """R2 of one stick (n, 2), both axes together: an axis that hardly moves counts with the little it varies;
    nan: it never moves."""
    varies = ((true - true.mean(0)) ** 2).sum()
    if varies <= 4e-4 * len(true):
        return math.nan
    return float(1 - ((got - true) ** 2).sum() / varies)


FIGURES = ("left R2", "right R2", "stick R2", "accuracy", "F1", "false", "confidence", "right")
BANDS = ("0 - 0.5", "0.5 - 0.8", "0.8 - 0.9", "0.9 - 1")       # of confidence


def score(actions, truth, geometry):
    """Actions (n, 25) against the truth -> {figure: value} of the controls that the skin shows; F1 is the
    mean over the buttons that are pressed at all, "false" counts the frames in which others are read as
    pressed."""
    shown = [BUTTON[b] for b in geometry["buttons"] if b not in LEGACY]
    got = actions[:, shown] > 0.5
    true = truth[:, shown] > 0.5
    occurs = true.any(0)
    both = got.sum(0) + true.sum(0)
    f1 = 2 * (got & true).sum(0) / np.maximum(both, 1)
    sticks = {f"{s} R2": r2(actions[:, STICKS[s]], truth[:, STICKS[s]]) for s in geometry["sticks"]}
    return {**sticks, "stick R2": mean(sticks.values()), "accuracy": mean((got == true).mean(0)),
            "F1": mean(f1[occurs]), "false": got[:, ~occurs].sum()}


def mean(values):
    """The mean of the values that are not nan; nan where there is none."""
    present = [v for v in values if not math.isnan(v)]
    return np.mean(present) if present else math.nan


def mean_of(rows):
    """The mean over clips of every figure."""
    return {k: mean(r.get(k, math.nan) for r in rows) for k in FIGURES}


def evaluate(args):
    """Score every clip that has truth.npy, reading those not read yet; a line a clip, then the means over
    all, per family and per band of confidence. A clip is "right" from F1 .9 and stick R2 .85 on."""
    model = None
    table, groups = {}, {}
    for folder in extract.clips_in(args.data):
        clip = open_pads(folder)[0] if (folder / "truth.npy").is_file() else {}
        if not clip.get("box"):
            continue
        if unread(folder, clip["n"]):
            model = model or load_parser(args.ckpt)
            run_clip(model, folder)
        actions, truth, confidence = read_rows(folder, clip["n"], "actions", "truth", "confidence")
        row = score(actions, truth, clip["geometry"]) | {"confidence": confidence.mean()}
        row["right"] = not (row["F1"] < 0.9 or row["stick R2"] < 0.85)         # nan: nothing to get wrong
        table[folder.name] = row
        band = BANDS[np.searchsorted((0.5, 0.8, 0.9), row["confidence"], "right")]
        for group in "= all", f"= {clip.get('controller') or 'generic'}", f"confidence {band}":
            groups.setdefault(group, []).append(row)
    if not table:
        raise UserError(f"{args.data}: expected clips of extract.py with truth.npy, found none: "
                        "only rendered or recorded videos can be scored")
    table |= {f"{group} ({len(groups[group])})": mean_of(groups[group]) for group in sorted(groups)}
    width = max(map(len, table)) + 2
    print(" " * width + "".join(f"{name:>12}" for name in FIGURES))
    for name, row in table.items():
        print(f"{name:{width}}" + "".join(
            f"{row.get(k, math.nan):12.{0 if k == 'false' else 4}f}" for k in FIGURES))


# ----------------------------------------------------------------------------------- labels that can be seen
def show(args):
    """Write a film of one clip that was read, or a page (.png) of its busiest moments; of a folder of clips a
    page with three moments a clip, of 40 clips at most."""
    clips = {folder: extract.read_clip(folder) for folder in extract.clips_in(args.data)}
    read = [f for f, clip in clips.items() if clip.get("box") and not unread(f, clip.get("n"))]
    if not read:
        raise UserError(f"{args.data}: expected clips with an overlay, read by parse.py run; found none")
    if args.out.lower().endswith(".png"):
        axis = int(len(read) > 1)                              # moments of one clip stand below each other
        rows = [np.concatenate([*pictures(folder, 180, 3 if axis else 6)], axis)
                for folder in read[::len(read) // 40 + 1]]
        return extract.save_png(args.out, np.concatenate(rows))
    with extract.reading(args.data, "one clip that was read, for a film (of many: --out NAME.png)"):
        [folder] = read
    with extract.VideoWriter(args.out, clips[folder]["fps"], (1600, 400)) as film:
        for rgb in tqdm(pictures(folder, 300), "film", clips[folder]["n"], disable=None):
            film.add(rgb)


def pictures(folder, high, k=None):
    """A clip that was read -> yields uint8 (4 high / 3, 16 high / 3, 3) of every row, or of the row of each
    k-th of the clip in which most was read: the policy's frame, the crop, the pad as read and as it truly
    was, with pressed buttons in words."""
    clip, pads = open_pads(folder)
    n, geometry, frames = clip["n"], clip["geometry"], extract.Frames(folder)
    names = ["confidence", "actions"] + ["truth"] * (folder / "truth.npy").is_file()
    confidence, *labels = read_rows(folder, n, *names)
    ground = extract.over(32, extract.read_rgba(folder / "template.png"), 0.6)
    ground = Image.fromarray(ground).resize(geometry["size"])
    rows = np.arange(n)
    busy = np.abs(labels[0]).sum(1)
    w = high * 4 // 3
    if k:
        rows = [part[busy[part].argmax()] for part in np.array_split(rows, min(k, n))]
    for i in rows:
        now = np.searchsorted(frames.numbers[1:], i, "right")                  # --every K keeps each Kth
        panels = [(f"{folder.name}   {i / clip['fps']:.2f} s   confidence {confidence[i]:.2f}",
                   Image.fromarray(frames[now]))]
        if pads:
            panels.append(("the pad in the video", Image.fromarray(pads[i])))
        for title, actions in zip(("read", "truth"), labels):
            names = ", ".join(b for b in geometry["buttons"] if actions[i, BUTTON[b]] > 0.5)
            picture = redrawn(ground.copy(), geometry, actions[i], labels[-1][i])
            panels.append((textwrap.fill(f"{title}: {names}", 30), picture))
        page = Image.new("RGB", (4 * w, w))
        for x, (text, picture) in enumerate(panels):
            page.paste(ImageOps.contain(picture, (w, high)), (x * w, 0))
            ImageDraw.Draw(page).text((x * w, high), text, font_size=high * 0.07)
        yield np.asarray(page)


def redrawn(picture, geometry, action, truth):
    """Draw an action over the pad's picture, a PIL image: pressed buttons filled, sticks as pins; a button is
    red where the truth differs."""
    pen, reach = ImageDraw.Draw(picture), picture.width // 11
    thin = reach // 25 + 1
    for button, box in sorted(geometry["buttons"].items()):                    # triggers over bumpers
        pressed, true = (row[BUTTON[button]] > 0.5 for row in (action, truth))
        ink = "red" if pressed != true else "lime" if pressed else "gray"
        pen.rectangle(box, ink if pressed else None, ink, thin)
    for side, stick in geometry["sticks"].items():
        tip = stick["center"] + reach * action[STICKS[side]]
        pen.circle(stick["center"], reach, None, "gold", thin)
        pen.line([*stick["center"], *tip], "gold", 4 * thin)
        pen.circle(tip, reach / 5, "gold")
    return picture


def check_locator(net, scenes):
    """Of what drawn scenes hold: how much is found within a twentieth of the pad's width; of what they don't
    hold: how much is seen all the same."""
    pictures, places = (torch.cat(part) for part in zip(*(scene for scene, in scenes)))
    all_of_it = [(0, 0, SCENE)]
    looks = [extract.see_windows(net, picture.numpy(), all_of_it) for picture in pictures]
    there, seen = (np.concatenate(part) for part in zip(*looks))
    places = places.numpy()
    here = ~np.isnan(places[..., 0])
    x, y = (seen - places)[..., :2].transpose(2, 0, 1)
    near = np.hypot(x, y) < 0.05 * places[:, -1:, 2]
    found = there > 0.5
    return {"recall": round(float((near & found)[here].mean()), 4),
            "false": round(float(found[~here].mean()), 4)}


def check(model, scenes):
    """Single-frame score on drawn scenes: R2 of the sticks, F1 of clicks and buttons together."""
    sticks, buttons = zip(*scenes)
    sticks, values, clicks = (torch.cat(part).numpy() for part in zip(*sticks))
    buttons, pressed = (torch.cat(part).numpy() for part in zip(*buttons))
    grids, *logits = net_reads(model, [sticks, buttons])
    fit = r2(decode(np.exp(grids)), values) if len(grids) else math.nan
    true = np.concatenate([clicks, pressed])                   # a click that the pad does not show: nan
    read = (np.concatenate(logits) > 0) & ~np.isnan(true)
    held = true == 1
    f1 = 2 * (read & held).sum() / max(read.sum() + held.sum(), 1)
    return {"stick R2": round(fit, 4), "button F1": round(float(f1), 4)}


def save_parser(path, model, **about):
    """One safetensors file; its header holds what is told about it as one JSON string."""
    tensors = {k: v.contiguous() for k, v in model.state_dict().items()}
    extract.write_atomic(path, lambda tmp: tmp.write_bytes(save(tensors, {"parser": json.dumps(about)})))


def load_parser(path):
    """A file of save_parser -> Parser in eval mode. UserError names what does not fit."""
    model = Parser()
    if not Path(path).is_file():
        raise UserError(f"no weights at {path}: give --ckpt FILE, or train them: parse.py train --out {path}")
    with extract.reading(path, "parser weights of this version (parse.py train makes them)"):
        tensors = load_file(path)
        model.load_state_dict(tensors)
    for name, t in tensors.items():
        if not t.isfinite().all():
            raise UserError(f"{path}: tensor {name}: expected finite weights, found NaN or infinity: "
                            "copy it again or train it anew")
    return model.eval()


class Kind(NamedTuple):
    """What differs between training the reader and the locator. pools, batches: in shares of --pool and
    --batch; width: of the skins, as larger ones are slower to draw; scenes: new ones a step."""
    net: object
    load: object
    scene: object
    loss: object
    check: object
    pools: tuple
    batches: tuple
    width: int
    scenes: int
    steps: int


KINDS = {
    "reader": Kind(Parser, load_parser, scene, parser_loss, check,
                   pools=(1, 8), batches=(1, 3), width=480, scenes=1, steps=5000),
    "locator": Kind(extract.locator_net, extract.load_locator, located_scene, locator_loss, check_locator,
                    pools=(0.3,), batches=(0.25,), width=300, scenes=2, steps=5000)}


def main(argv=None):
    """Parse the command line."""
    parser = extract.ArgumentParser(prog="parse.py", allow_abbrev=False,
                                    description="Read buttons and sticks from the overlay crops.")
    verbs = parser.add_subparsers(required=True, metavar="run | show | eval | train")

    def verb(name, action, about, data=None):
        p = verbs.add_parser(name, help=about, allow_abbrev=False)
        p.set_defaults(run=action)
        if data:
            p.add_argument("data", help=data)
        return p
    p = verb("run", run, "read every clip folder of DATA",
             "folder of clip folders (or one of them), as extract.py leaves it")
    p.add_argument("--ckpt", default=CKPT, help="the reader's weights (default: those that ship)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="torch device (default: cuda where there is one)")
    p.add_argument("--again", action="store_true", help="also read clips that were read already")
    p.add_argument("--drop-pads", action="store_true",
                   help="remove a clip's crops once it is read: half of its size, and it can't be read again")
    p = verb("show", show, "a film or a page of what was read",
             "a clip folder that was read; for a page also a folder of such")
    p.add_argument("--out", required=True, help="NAME.mp4 or .webm: a film of the clip; NAME.png: a page")
    p = verb("eval", evaluate, "score the clips that have truth.npy",
             "folder of clip folders; those not read yet are read first")
    p.add_argument("--ckpt", default=CKPT, help="weights for clips not read yet (default: those that ship)")
    p = verb("train", train_net, "train the reader on drawn skins, or on yours")
    p.add_argument("--locator", action="store_true",
                   help="train extract.py's locator of unknown pads, not the reader")
    p.add_argument("--out", required=True, help="where the weights go (.safetensors)")
    p.add_argument("--skins", metavar="DIR",
                   help="OBS input-overlay presets (default: random skins only)")
    p.add_argument("--ckpt", help="weights to start from (default: none, from scratch)")
    p.add_argument("--steps", type=number(int, 1),
                   help="optimiser steps (default: 5000; to fit --ckpt to --skins 600)")
    p.add_argument("--batch", type=number(int, 8), default=64,
                   help="sticks a step, three times as many buttons, a quarter of the windows (default: 64)")
    p.add_argument("--lr", type=number(float, 0, 1),
                   help="peak learning rate of AdamW (default: 2e-3; with --ckpt 5e-4)")
    p.add_argument("--pool", type=number(int, 1, 1e6), default=12000,
                   help="stick close-ups kept to draw from, 8 x as many buttons: about 1.3 GB by default")
    p.add_argument("--every", type=number(int, 1), default=250,
                   help="steps between checks on held-out scenes; the file is written at each")
    p.add_argument("--workers", type=int, default=1, choices=(0, 1),
                   help="1: scenes are rendered by a process of their own (default)")
    p.add_argument("--seed", type=number(int, 0), default=0,
                   help="seed of scenes, initial weights and batches")
    return extract.cli(parser, argv)


if __name__ == "__main__":
    raise SystemExit(main())
