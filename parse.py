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
always the same size), from the previous frame, from the current frame [paper: a pair of frames] and, ours,
from the pad at rest, which is the video's own median picture, and pressed, where that is known. Two narrow
SegFormers (arXiv 2105.15203): one reads a stick's close-ups into an 11 x 11 grid [paper: a segmentation, much
better than regression], one a button's into one logit. The answers are then smoothed over the whole video.
Buttons of a pad that no template shows are first looked for where the picture blinks between two colours.
Letters: n frames, k sticks, m buttons, S pixels a side of a close-up; B batch, N tokens, D width.
"""
import copy
import itertools
import json
import math
import textwrap
import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import extract                       # before torch, whose threads it keeps from spinning
import torch
from PIL import Image, ImageDraw, ImageOps
from safetensors.torch import load_file, save
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from extract import BUTTON, BUTTONS, LEGACY, STICKS, THUMB, Busy, UserError, number, overlap

GRID = 11                                  # cells a side of a stick's grid [paper]: -1, -0.8 ... 1
STRIDE, SUB = 4, 3                       # a token of the finest map covers 4 x 4 pixels and tells 3 x 3 cells
STICK_SIDE, BUTTON_SIDE = 57, 33   # pixels of a close-up: 4 k + 1, so the middle token is on the middle pixel
TRAVEL = (GRID - 1) / 2 * STRIDE / SUB     # pixels from rest to full tilt in a stick's close-up
BOX = 20                                   # pixels of a button's box in its close-up, both ways
LABEL_WIDTH = 0.12                        # sd of the grid's label: about half a cell (0.1 - 0.15 read best)
SAMPLES = 128                              # frames that the pad at rest is made from
PIECE, OVERLAP = 8192, 128            # frames smoothed at once, and frames looked at on both sides of them
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
        for _ in range(3):                                     # a foreign geometry's sticks may be far off
            if moved := pad.better_geometry():
                pad = Pad(model, moved, pads, drawn)
        if not pad.known:
            pad.watch(pads)
        actions, confidence = settle(pad, pad.read_all(pads))
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


def settle(pad, reads):
    """What Pad.read_all says of a whole video -> actions float32 (n, 25), confidence float32 (n,)."""
    closeups = pad.closeups
    actions = np.zeros((len(reads.likeness), extract.A), np.float32)
    sure = [1.6 - 3 * spread for spread in reads.spread.T]
    for i, side in enumerate(closeups.sticks):
        actions[:, STICKS[side]] = normalise(reads.places[:, i], pad.homes[i])
    if closeups.buttons:
        logits = reads.buttons.copy()
        for i, j in closeups.clicks.items():                   # the stick's net follows the moving cap
            logits[:, j] = (logits[:, j] + reads.clicks[:, i]) / 2
        logits = level(logits)
        p = [smooth_buttons(logits[low:high])[inner] for low, high, inner in pieces(len(logits))]
        actions[:, [BUTTON[b] for b in closeups.buttons]] = np.concatenate(p) > 0.5
        sure.append(1.1 * np.abs(np.tanh(reads.buttons / 2)).mean(1))
    seen = reads.likeness / max(pad.usual, 0.05)
    there = np.clip((seen - 0.25) / 0.4, 0, 1)
    most = 1.0 if pad.known else 0.89                          # a foreign pad's buttons may have other names
    certain = np.clip(np.min(sure, 0), 0, most)
    return actions, (there * certain).astype(np.float32)


class Reads(NamedTuple):
    """What the nets say of n frames."""
    places: np.ndarray                     # (n, k, 2) of the sticks, smoothed
    spread: np.ndarray                     # (n, k) of the places: 1 standard deviation
    clicks: np.ndarray                     # (n, k) logits
    buttons: np.ndarray                    # (n, m) logits
    likeness: np.ndarray                   # (n,) of each crop's edges to the pad's


class Pad:
    """One clip's pad: its controls, what they look like at rest in this video, and what tells a crop from one
    without it."""

    def __init__(self, model, geometry, pads, templates=()):
        """templates: read_templates()'s of the clip. In turn: sampled frames; is the template the very skin
        of the video; the pad at rest; how it looks pressed; where the sticks are, and how surely."""
        self.model, self.geometry = model, geometry
        at = np.unique(np.linspace(0, len(pads) - 1, SAMPLES).astype(int))
        crops = [pads[i] for i in at]
        self.closeups = closeups = Closeups(geometry, crops[0].shape[1::-1])
        sampled = closeups.all(pads[max(i - 1, 0)] for i in at), closeups.all(crops)
        picture = np.median(np.stack(crops[::2]), 0).astype(np.uint8)          # of the whole video
        self.rest = closeups(picture)
        self.pressed = [np.zeros_like(rest) for rest in self.rest]             # not known
        self.known = False                                     # is the template the very skin of the video
        self.placed = bool(templates)                          # has the geometry its place from a template
        drawn, *pressed = [closeups(t) for t in in_the_videos_light(templates, picture)] or [None]
        if drawn:
            alike = [likenesses(*kind) for kind in zip(drawn, self.rest)]
            self.known = np.median(np.concatenate(alike)) > ONE_SKIN
            pressed = pressed if self.known else []
            median = [cuts[None] for cuts in self.rest]
            *_, logits = net_reads(model, map(montages, median, median, drawn, *pressed))
            other = likenesses(pressed[0][1], self.rest[1]) if pressed else 0.95
            held = (logits > 2.5) & (alike[1] < other)         # most of the time, so that the median shows
            self.rest[1][held] = drawn[1][held]                # it pressed
        for _ in range(2):
            self.rest = at_rest(model, *sampled, self.rest)
        if self.known:
            self.rest[0] = drawn[0]                            # its caps rest; those in the video may never
        if pressed:                                            # what the video shows, changed as the skin is
            self.pressed = [(rest + (down.astype(int) - up)).clip(0, 255).astype(np.uint8)
                            for rest, up, down in zip(self.rest, drawn, *pressed)]
        still = [cuts[None] for cuts in self.rest]
        grids, *_ = net_reads(model, map(montages, still, still, self.rest, self.pressed))
        homes, _ = expect(np.exp(grids))                       # where it reads sticks that rest, (k, 2)
        self.homes = homes if templates else [None] * len(homes)
        grids, *_ = net_reads(model, map(montages, *sampled, self.rest, self.pressed))
        places, spread = expect(np.exp(grids))
        self.sampled = places.reshape(len(at), -1, 2)          # sticks of the sampled frames
        self.spread = spread.reshape(len(at), -1).mean(0)
        self.outline = edges(picture)
        self.usual = np.median([self.likeness(c) for c in crops])          # of crops that mostly show the pad

    def likeness(self, crop):
        """Of the crop's edges to those of the pad at rest: falls towards 0 where the overlay is gone or
        covered."""
        return likeness(edges(crop), self.outline)

    def better_geometry(self):
        """The geometry of a pad without a template, with each stick where it rests in the sampled frames, and
        with a travel that holds its reads; None where it is so already."""
        if self.placed:
            return None
        sticks = dict(self.geometry["sticks"])
        for i, side in enumerate(self.closeups.sticks):
            values = self.sampled[:, i]
            rest = resting_place(values)
            sharp = self.spread[i] < 0.4                       # a blurred read tells nothing
            center, travel = (np.array(sticks[side][k]) for k in ("center", "travel"))
            reach = np.percentile(np.hypot(*values.T), 97)
            if reach > 1.1:                                    # it goes out of its close-up
                sticks[side] = {**sticks[side], "travel": [*(1.3 * travel)]}
            elif sharp and rest is not None and np.hypot(*rest) > 0.25:
                sticks[side] = {**sticks[side], "center": [*(center + rest * travel)]}
        return None if sticks == self.geometry["sticks"] else {**self.geometry, "sticks": sticks}

    def watch(self, pads):
        """Take the box of each button that blinks, and how it looks at rest and pressed, from the video: for
        a pad that is no known skin."""
        at = watched_frames(len(pads))
        crops = [pads[i] for i in at]
        h, w = crops[0].shape[:2]
        half = [cv2.resize(crop, (w // 2, h // 2), interpolation=cv2.INTER_AREA) for crop in crops]
        found = find_spots(np.stack(half), at, self.geometry)
        named = named_spots(found, self.geometry)
        if not named:
            return
        boxes = {button: spot.box.tolist() for button, spot in named.items()}
        self.geometry = {**self.geometry, "buttons": self.geometry["buttons"] | boxes}
        self.closeups = Closeups(self.geometry, crops[0].shape[1::-1])
        _, buttons = self.closeups.all(crops)
        for button, spot in named.items():
            j = self.closeups.buttons.index(button)
            self.rest[1][j] = np.median(buttons[~spot.lit, j], 0)
            self.pressed[1][j] = np.median(buttons[spot.lit, j], 0)

    def read_all(self, pads):
        """All n frames -> Reads. Of the grids, which are 100 times as large, only a piece is held."""
        parts = []
        for low, high, inner in tqdm([*pieces(len(pads))], "read", disable=None):
            pads.data = extract.read_npy(pads.path, np.uint8, (None,))         # frees what was read
            grids, *others = self.read(pads, low, high)
            parts.append([*expect(smooth_grids(grids)[inner]), *(part[inner] for part in others)])
        return Reads(*map(np.concatenate, zip(*parts)))

    def read(self, pads, begin, end):
        """Frames begin .. end -> log probability of the sticks' places (n, k, 11, 11), logits of the clicks
        (n, k) and of the buttons (n, m), likeness (n,)."""
        parts = []
        last = self.closeups.all([pads[max(begin - 1, 0)]])    # the first frame is its own previous one
        for start in range(begin, end, 32):
            crops = [pads[i] for i in range(start, min(start + 32, end))]
            now = self.closeups.all(crops)
            before = [np.concatenate([b, c[:-1]]) for b, c in zip(last, now)]
            last = [c[-1:] for c in now]
            sticks, buttons = map(montages, before, now, self.rest, self.pressed)
            same = as_before(before[1], now[1])                # what looks as before is not read again
            new = same == np.arange(len(crops))[:, None]
            grids, clicks, logits = net_reads(self.model, [sticks, buttons[new.ravel()]])
            spots = np.cumsum(new).reshape(new.shape) - 1      # of each new read among them
            spots = np.take_along_axis(spots, same, 0)
            n, k = now[0].shape[:2]
            alike = [self.likeness(crop) for crop in crops]
            parts.append((grids.reshape(n, k, GRID, GRID), clicks.reshape(n, k), logits[spots], alike))
        return [*map(np.concatenate, zip(*parts))]


def as_before(before, now, most=0.5):
    """Close-ups of buttons in n frames and in the frames before them, (n, m, S, S, 3) each -> int (n, m): the
    first of these frames in which the button looked as it does now, to `most` grey levels on average."""
    pairs = np.stack([before, now], 2)[:, :, :, ::2, ::2]                      # a quarter of the pixels
    every = np.arange(now.shape[1])
    same = np.zeros(now.shape[:2], int)
    for t in range(1, len(now)):
        pair, old = pairs[t], pairs[same[t - 1], every]
        change = np.maximum(pair, old) - np.minimum(pair, old)                 # uint8 has no sign
        same[t] = np.where(change.mean((1, 2, 3, 4)) < most, same[t - 1], t)
    return same


def pieces(n):
    """n frames -> (low, high, inner) of each piece: low .. high are looked at, of which the slice `inner` is
    the piece; the frames around it are as many as smoothing remembers."""
    for begin in range(0, n, PIECE):
        low = max(begin - OVERLAP, 0)
        yield low, min(begin + PIECE + OVERLAP, n), slice(begin - low, begin - low + PIECE)


def at_rest(model, before, now, rest):
    """Each control's median over the frames in which the nets, given the old rest pictures, see it at rest ->
    new rest pictures; as it was where there are few such frames.

    before, now: close-ups of sampled frames, [(samples, k, S, S, 3), (samples, m, S, S, 3)] each.
    """
    n, k = now[0].shape[:2]
    grids, clicks, logits = net_reads(model, map(montages, before, now, rest))
    places, _ = expect(np.exp(grids))
    still = (np.hypot(*places.T) < 0.2) & (clicks < 0)
    quiets = still.reshape(n, k), logits.reshape(n, -1) < -0.5
    rest = [r.copy() for r in rest]
    for picture, closeups, quiet in zip(rest, now, quiets):
        for j in np.flatnonzero(quiet.sum(0) >= 8):
            picture[j] = np.median(closeups[quiet[:, j], j], 0)
    return rest


# ------------------------------------------------------------------------------------------------ what blinks
class Spot(NamedTuple):
    """A place of a pad that lights up now and then, as a button does."""
    box: np.ndarray                        # x0, y0, x1, y1 in template pixels
    lit: np.ndarray                        # (n,) bool, of the watched frames


def watched_frames(n):
    """Numbers of 512 frames of n, in 16 runs, as a press is some frames long."""
    starts = np.linspace(0, max(n - 32, 0), 16).astype(int)
    frames = starts[:, None] + np.arange(32)
    return np.unique(frames.clip(0, n - 1))


def find_spots(crops, at, geometry):
    """Crops uint8 (n, h, w, 3) of the frames `at` -> Spots: neighbouring pixels that have two colours and
    change them in the same frames. No net is asked, so it holds for a pad of any look; what lies over or
    shines through it seldom has two colours only."""
    n, h, w = crops.shape[:3]
    scale = np.divide((w, h), geometry["size"])
    median = np.median(crops[::2], 0).astype(np.uint8)
    away = np.stack([cv2.absdiff(crop, median).max(2) for crop in crops])      # (n, h, w), from rest
    high = np.sort(away, 0)[-max(n // 64, 4)].astype(int)                      # of a pixel that is lit
    lit = away > high / 2
    between = (np.abs(away - high / 2) < high / 5).sum(0)
    count = lit.sum(0)
    often = (count >= 4) & (count < 0.6 * n)
    blinks = np.uint8(often & (high > 18) & (between < count / 4))
    for stick in geometry["sticks"].values():                  # a cap changes what it moves over
        center = np.int32(stick["center"] * scale)
        reach = stick["radius"] + np.array(stick["travel"])
        axes = np.int32(1.25 * reach * scale)
        cv2.ellipse(blinks, center.tolist(), axes.tolist(), 0, 0, 360, 0, -1)
    count, numbers = cv2.connectedComponents(links(blinks, lit), connectivity=4)
    found = []
    for i in range(1, count):
        mask = numbers[::2, ::2] == i
        on = lit[:, mask].mean(1) > 0.5
        if mask.sum() >= 6 and mask.mean() < 0.08 and two_colours(crops[:, mask], on, at):
            x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
            corners = np.array([[x, y], [x + width, y + height]])
            found.append(Spot((corners / scale).ravel(), on))
    return found


def links(blinks, lit):
    """Pixels that blink uint8 (h, w), and when each is lit (n, h, w) -> uint8 (2 h - 1, 2 w - 1): the pixels,
    and between two neighbours 1 if they blink together."""
    h, w = blinks.shape
    grid = np.zeros((2 * h - 1, 2 * w - 1), np.uint8)
    grid[::2, ::2] = blinks
    across = blinks[:, 1:] & blinks[:, :-1]
    down = blinks[1:] & blinks[:-1]
    grid[::2, 1::2] = across & together(lit[:, :, 1:], lit[:, :, :-1])
    grid[1::2, ::2] = down & together(lit[:, 1:], lit[:, :-1])
    return grid


def together(a, b):
    """Are two series of lit frames (n, ...) one and the same, nearly (intersection over union)?"""
    both = (a & b).sum(0)
    either = (a | b).sum(0)
    return both > 0.7 * either


def two_colours(pixels, lit, at):
    """Does a spot, pixels uint8 (n, k, 3) in the frames `at`, look one way when lit and one way else, with
    nothing between, and does it change as often as fingers do?"""
    if not 4 <= lit.sum() < len(lit) / 2:
        return False
    rest = np.median(pixels[~lit], 0)
    change = np.median(pixels[lit], 0) - rest
    x = ((pixels - rest) * change).sum((1, 2)) / (change ** 2).sum()           # 0 at rest, 1 when lit
    apart = np.percentile(x[lit], 5) - np.percentile(x[~lit], 95)
    switched = lit[1:] != lit[:-1]
    switches = switched[np.diff(at) == 1].sum() / lit.sum()
    return apart > 0.75 and 0.03 < switches < 0.9


def named_spots(found, geometry):
    """Which spot is which button: the nearest that is about as large -> {button: Spot}."""
    def away(a, b):                                            # in widths of the pad
        return np.subtract(a, b).reshape(2, 2).mean(0) / geometry["size"][0]

    boxes = geometry["buttons"]
    pairs = []
    for button, box in boxes.items():
        for i, spot in enumerate(found):
            distance = np.hypot(*away(spot.box, box))
            larger = abs(math.log(extract.area(spot.box) / max(extract.area(box), 1))) / 2
            if distance < 0.2 and larger < 1.25:
                pairs.append((distance + 0.03 * larger, distance, button, i))
    named = {}
    for _, distance, button, i in sorted(pairs):
        part_of_another = any(together(found[i].lit, spot.lit) for spot in named.values())
        if button in named or part_of_another:
            continue
        shows_another = any(overlap(boxes[button], spot.box) for spot in named.values())
        swapped = shows_another and button.endswith(("SHOULDER", "TRIGGER"))
        if distance < 0.08 or swapped:
            named[button] = found[i]
    for out, side in (-1, "LEFT"), (1, "RIGHT"):
        low, high = f"{side}_SHOULDER", f"{side}_TRIGGER"
        if low in named and high in named:                     # a trigger is mostly further out and up
            way = away(boxes[high], boxes[low]) + (0.05 * out, -0.05)
            if away(named[high].box, named[low].box) @ way < 0:
                named[low], named[high] = named[high], named[low]
    return named


# --------------------------------------------------------------------------------------------------- decoding
def expect(p):
    """Grids of probability (..., 11, 11) -> their mean, values (..., 2), which has the least squared error
    and is finer than a cell, and its spread (...), 1 standard deviation."""
    cells = np.linspace(-1, 1, GRID)
    x = p.sum(-2)
    y = p.sum(-1)                                              # (..., 11) each
    mean = np.stack([x @ cells, y @ cells], -1)
    variance = (x + y) @ cells ** 2 - (mean ** 2).sum(-1)
    return mean.astype(np.float32), np.sqrt(np.maximum(variance, 0))


def smooth(e, transition, prior, trust, own):
    """Forward-backward: log likelihoods e (n, m, states) of m controls -> posterior (n, m, states) given all
    n frames.

    transition (states, states): row = state now, column = next; prior (states,): of the first frame. What the
    other frames say counts `trust` <= 1, since errors of neighbouring frames are alike (same skin, same scene
    behind); what the frame itself says counts `own`.
    """
    e = e - e.max(-1, keepdims=True)
    others = np.exp(trust * e) + e.dtype.type(1e-12)
    p = np.exp(own * e) + e.dtype.type(1e-12)
    forward = range(len(e)), transition, prior
    backward = range(len(e) - 1, -1, -1), transition.T, np.ones_like(prior)
    for order, matrix, message in (forward, backward):
        for t in order:
            p[t] *= message                                    # what the frames on this side say of frame t
            message = (message * others[t]) @ matrix
            message = message / message.sum(-1, keepdims=True)
    return p / p.sum(-1, keepdims=True)


def smooth_grids(log_p, trust=0.3, own=0.8):
    """Log grids (n, k, 11, 11) of k sticks -> posterior, same shape. A dark cap over a dark scene tells
    little in one frame; its neighbours tell the rest. From frame to frame a stick stays, moves by a cell or
    so, or goes anywhere, most often home. The net's answer contains how often the teacher's sticks are in a
    cell; that is divided out first, or home would win each doubt."""
    i = np.arange(GRID)
    near = np.exp(-0.5 * ((i[:, None] - i) / 1.2) ** 2)
    near /= near.sum(1, keepdims=True)
    home = labels(torch.zeros(1, 2)).numpy().ravel()
    prior = 0.36 * home + np.float32(0.64 / GRID ** 2)         # some 0.4 of the teacher's frames are at rest
    transition = 0.3 * np.eye(GRID ** 2) + 0.4 * np.kron(near, near) + 0.3 * prior
    e = log_p.reshape(*log_p.shape[:2], GRID ** 2) - np.log(prior)
    return smooth(e, transition.astype(np.float32), prior, trust, own).reshape(log_p.shape)


def smooth_buttons(logits, press=0.2, release=0.4, trust=0.8):
    """Logits (n, m) of m buttons -> probability of "pressed" (n, m) given all frames. press, release: how
    probable these are from one frame to the next; high enough that a tap of two frames, read plainly, is not
    smoothed away."""
    e = np.stack([np.zeros(logits.shape), np.clip(logits, -20, 20)], -1)       # (n, m, 2): off, on
    transition = np.array([[1 - press, press], [release, 1 - release]])
    prior = np.array([release, press]) / (press + release)
    return smooth(e, transition, prior, trust, 1.0)[..., 1]


def level(logits):
    """Logits (n, m) -> the same with each button's own threshold at 0. Where a video's logits fall into two
    groups far apart, it is their middle; but only if the net takes the upper group for nearly pressed and it
    comes more than once (a bright scene behind a see-through pad does not)."""
    out = logits.copy()
    for j, x in enumerate(logits.T if len(logits) >= 8 else ()):           # fewer hold no two presses
        low, high = two_groups(x)
        middle = (low.mean() + high.mean()) / 2
        apart = high.mean() - low.mean()
        spread = math.sqrt((low.var() * len(low) + high.var() * len(high)) / len(x))
        switches = np.count_nonzero(np.diff(x > middle))
        if apart > 6 * spread and high.mean() > -2 and switches >= 4:
            out[:, j] -= middle
    return out


def two_groups(x):
    """Values (n,) -> the lower and the upper group, sorted, at the split with the largest variance between
    (Otsu)."""
    ranked = np.sort(x)
    k = np.arange(1, len(x))                                   # values in the lower group
    total = np.cumsum(ranked)[:-1]
    gap = (ranked.sum() - total) / k[::-1] - total / k         # between the groups' means
    return np.split(ranked, [1 + (k * k[::-1] * gap ** 2).argmax()])


def normalise(values, home=None):
    """Per video [paper: centre at rest, 99th percentile as scale], guarded: values float32 (n, 2) of one
    stick -> the same, in [-1, 1]. One scale for both axes (an axis that is never used must not be blown up);
    a stick that hardly moves keeps its scale, one that never rests its centre too."""
    rest = resting_place(values, home)
    if rest is None:
        return values
    values = values - rest
    reach = np.percentile(np.hypot(*values.T), 99)
    return np.clip(values / reach if reach > 0.3 else values, -1, 1).astype(np.float32)


def resting_place(values, home=None):
    """Where a stick (n, 2) rests: its mode (a mean is wrong when it is pushed one way only). With a template,
    near its centre or near `home`, where the net reads the template's own stick at rest: it may lie aside in
    its well. Else places near the middle of where it goes count more, as a game may be played with a stick
    held to one side. None where it is too seldom there."""
    bins = np.linspace(-1, 1, 21)                              # their middles
    counts = np.histogram2d(*values.T, bins=21, range=[[-1.05, 1.05]] * 2)[0]
    middles = [np.percentile(values, (2, 98), 0).mean(0)] if home is None else [(0, 0), home]
    away = np.min([np.hypot(bins[:, None] - x, bins - y) for x, y in middles], 0)
    counts *= np.exp(-0.5 * (away / 0.3) ** 2) if home is None else away < 0.15
    mode = bins[list(np.unravel_index(counts.argmax(), counts.shape))]
    near = np.abs(values - mode).max(1) < 0.1
    often = len(values) >= 30 and near.mean() >= 0.05 and counts.any()
    return values[near].mean(0) if often else None


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
        self.maps = [], []                                     # of sticks, of buttons: close-up to crop
        for i, side in enumerate(self.sticks):
            stick = sticks[side]
            if box := boxes.get(THUMB[side]):
                beside = np.reshape(box, (2, 2)).mean(0) - stick["center"]
                if np.hypot(*beside) < stick["radius"]:        # on the stick itself, no label beside it
                    self.clicks[i] = self.buttons.index(THUMB[side])
            step = np.multiply(stick["travel"], scale) / TRAVEL
            self.maps[0].append(closeup_map(stick["center"] * scale, step, STICK_SIDE))
        for button in self.buttons:
            low, high = np.reshape(boxes[button], (2, 2)) * scale
            step = np.maximum(high - low, 4) / BOX
            self.maps[1].append(closeup_map((low + high) / 2, step, BUTTON_SIDE))

    def __call__(self, crop):
        """uint8 (h, w, 3) -> [sticks uint8 (k, 57, 57, 3), buttons uint8 (m, 33, 33, 3)]."""
        cuts = []
        for maps, side in zip(self.maps, (STICK_SIDE, BUTTON_SIDE)):
            controls = [warped(crop, to_crop, (side, side)) for to_crop in maps]
            cuts.append(np.array(controls, np.uint8).reshape(-1, side, side, 3))
        return cuts

    def all(self, crops):
        """Crops of n frames -> the same two arrays with n in front."""
        return [np.stack(kind) for kind in zip(*map(self, crops))]


def closeup_map(center, step, side):
    """The affine map (2, 3) from a close-up's pixels, `step` crop pixels apart, to the crop's."""
    return np.c_[np.diag(step), center - step * (side - 1) / 2 - 0.5]


def warped(picture, to_picture, size):
    """A picture of size (w, h) out of another, whose edge goes on for ever."""
    return cv2.warpAffine(picture, to_picture, size, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
                          borderMode=cv2.BORDER_REPLICATE)


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
    sticks, buttons = (torch.from_numpy(p).split(batch) for p in panels)
    grids, clicks = zip(*(both_ways(model, t.to(device)) for t in sticks))
    logits = [model.buttons(t.to(device)) for t in buttons]
    reads = [torch.cat(part).float().cpu().numpy() for part in (grids, clicks, logits)]
    if not all(np.isfinite(read).all() for read in reads):
        raise UserError("expected numbers from the reader, found NaN or infinity: "
                        "its weights are damaged, give another --ckpt")
    return reads


def both_ways(model, panels):
    """What Parser.sticks() says of panels and of their mirror images, on average."""
    (grid, click), (other, again) = model.sticks(panels), model.sticks(panels.flip(3))
    return torch.logaddexp(grid, other.flip(2)) - math.log(2), (click + again) / 2


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
        log_p = F.log_softmax(grid.flatten(1), 1)
        return log_p.view(grid.shape), out[:, -1].mean((1, 2))

    def buttons(self, panels):
        """uint8 (B, 4, S, S, 3) -> logit of "pressed" (B,)."""
        out = self.button(montage(panels))                               # (B, 1, S / 4, S / 4)
        return out[:, 0, 2:-2, 2:-2].mean((1, 2))                             # of the box, not its neighbours


def montage(panels):
    """Panels uint8 (B, 4, S, S, 3) -> float (B, 12, S, S): contrast is stretched over all panels together,
    so the same picture elements meet in the first convolution at one scale; what is not known stays 0."""
    known = panels.flatten(2).any(2)[:, :, None, None, None].float()           # (B, 4, 1, 1, 1)
    weight = known / known.sum(1, keepdim=True).clamp(min=1)
    x = panels.permute(0, 1, 4, 2, 3).float()                                  # (B, 4, 3, S, S)
    fewer = x[..., ::2, ::2]
    center = fewer.mean((3, 4), keepdim=True)
    center = (center * weight).sum(1, keepdim=True)        # each colour's mean over the panels that are there
    var = (fewer - center).square().mean((3, 4), keepdim=True)
    var = (var * weight).sum(1, keepdim=True).mean(2, keepdim=True)
    x = (x - center) * (known / (var.sqrt() + 6))              # 6 grey levels: noise is not blown up
    return x.flatten(1, 2)


class SegFormer(nn.Module):
    """SegFormer with the published files' names (`nvidia/mit-b0`), narrower: a CPU reads faster than real
    time. MiT has four stages at strides 4, 8, 16, 32, here of one block each; between them maps lie in memory
    with channels last, (B, h, w, D)."""

    def __init__(self, labels):
        super().__init__()
        sizes = [*zip(WIDTHS, HEADS, REDUCTION)]
        later = [Patches(a, b, 3, 2) for a, b in zip(WIDTHS, WIDTHS[1:])]
        self.segformer = nn.ModuleDict({"encoder": nn.ModuleDict({
            "patch_embeddings": nn.ModuleList([Patches(3 * PANELS, WIDTHS[0], 7, STRIDE), *later]),
            "block": nn.ModuleList(nn.ModuleList([Stage(*size)]) for size in sizes),
            "layer_norm": nn.ModuleList(map(nn.LayerNorm, WIDTHS))})})
        self.decode_head = Head(labels)

    def forward(self, x):                                                      # (B, C, H, W)
        maps = []
        for embed, (block,), norm in zip(*self.segformer["encoder"].values()):
            x = norm(block(embed(x))).permute(0, 3, 1, 2)                     # (B, D, H / stride, W / stride)
            maps.append(x)
        return self.decode_head(maps)                                          # (B, labels, H / 4, W / 4)


class Patches(nn.Module):
    """Overlapping patches: a strided convolution, then a norm over channels."""

    def __init__(self, cin, cout, kernel, stride):
        super().__init__()
        self.proj = nn.Conv2d(cin, cout, kernel, stride, kernel // 2)
        self.layer_norm = nn.LayerNorm(cout)

    def forward(self, x):                                                      # (B, C, H, W)
        return self.layer_norm(self.proj(x).permute(0, 2, 3, 1))               # (B, h, w, D)


class Stage(nn.Module):
    """x + attention, then x + feed-forward, each after its norm (arXiv 2105.15203, Sec. 3.1)."""

    def __init__(self, d, heads, reduction):
        super().__init__()
        self.layer_norm_1 = nn.LayerNorm(d)
        self.attention = ReducedAttention(d, heads, reduction)
        self.layer_norm_2 = nn.LayerNorm(d)
        self.mlp = MixFFN(d, MLP * d)

    def forward(self, x):                                                      # (B, h, w, D)
        x = x + self.attention(self.layer_norm_1(x))
        return x + self.mlp(self.layer_norm_2(x))


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

    def forward(self, x):                                                      # (B, h, w, D)
        kv = x
        if "sr" in self.self:
            kv = self.self["layer_norm"](over_map(self.self["sr"], x))        # (B, h, w / reduction, D)
        each = zip(self.self.values(), (x, kv, kv))
        each = (layer(t).flatten(1, 2).unflatten(2, (self.heads, -1)) for layer, t in each)
        q, k, v = (t.transpose(1, 2) for t in each)                            # (B, heads, N, D / heads)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.output["dense"](y.transpose(1, 2).reshape(x.shape))


class MixFFN(nn.Module):
    """An MLP with a 3 x 3 depthwise convolution inside: its zero padding is all that tells a token where it
    is."""

    def __init__(self, d, hidden):
        super().__init__()
        self.dense1 = nn.Linear(d, hidden)
        self.dense2 = nn.Linear(hidden, d)
        self.dwconv = nn.ModuleDict({"dwconv": nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden)})

    def forward(self, x):                                                      # (B, h, w, D)
        return self.dense2(F.gelu(over_map(self.dwconv["dwconv"], self.dense1(x))))


def over_map(conv, x):
    """A convolution of a map whose channels are last, (B, h, w, D)."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


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
            total = total + F.interpolate(x, maps[0].shape[2:], mode="bilinear")       # (B, 64, H / 4, W / 4)
        return self.classifier(F.relu(self.batch_norm(total)))                 # (B, labels, H / 4, W / 4)


# --------------------------------------------------------------------------------------------------- training
def train_net(args):
    """Train the reader, or with --locator the locator, on drawn scenes; what is checked and written every
    --every steps is the running mean of the weights."""
    kind = KINDS["locator" if args.locator else "reader"]
    steps = args.steps or (600 if args.skins and args.ckpt else 5000)
    peak = args.lr or (5e-4 if args.ckpt else 2e-3)
    extract.writable(args.out)
    skins = extract.load_skins(args.skins, 400) if args.skins else []
    skins = [s for s in skins if any(p.control for p in s.parts)]
    if args.skins and not skins:
        raise UserError(f"--skins {args.skins}: expected OBS input-overlay presets, "
                        "found pictures only: they do not show what is pressed")
    torch.set_num_threads(max(1, torch.get_num_threads() - args.workers))      # a core renders the scenes
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    model = kind.load(args.ckpt) if args.ckpt else kind.net()
    mean = copy.deepcopy(model)
    held = itertools.islice(Teacher(args.seed + 1000, skins, kind.scene, share=0), 16)
    held = [[*map(torch.cat, zip(*part))] for part in zip(*held)]
    curve = []

    @torch.no_grad()
    def record(step, losses):
        checked = kind.loss(mean.eval(), torch.Generator().manual_seed(0), *held)
        losses |= {f"held-out {k}": v for k, v in checked.items()}
        losses = {k: round(v.item(), 4) for k, v in losses.items()}
        curve.append({"step": step, **losses})
        tqdm.write(" | ".join(f"{k} {v}" for k, v in curve[-1].items()))
    if args.ckpt:
        record(0, {})                                          # before, to compare the last one with
    scenes = iter(torch.utils.data.DataLoader(
        Teacher(args.seed, skins, kind.scene), batch_size=None, num_workers=args.workers))
    pools = [deque(maxlen=math.ceil(args.pool * share)) for share in kind.pools]       # each is used often
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.02, betas=(0.9, 0.98))
    warmup = min(200, steps // 10 + 1)
    for step in tqdm(range(1, steps + 1), "train", mininterval=10):
        for _ in range(kind.scenes if step > 1 else 40):
            for pool, rendered in zip(pools, next(scenes)):
                pool.extend(zip(*(t.clone() for t in rendered)))               # out of the memory they share
        lr = peak * min(step / warmup, 0.5 + 0.5 * math.cos(math.pi * step / (steps + 1)))
        optimizer.param_groups[0]["lr"] = lr
        batches = [draw_rows(generator, pool, int(args.batch * share))
                   for pool, share in zip(pools, kind.batches)]
        losses = kind.loss(model.train(), generator, *batches)
        total = sum(losses.values())
        if not math.isfinite(total.item()):                    # or it would spoil the mean and the file
            raise UserError(f"expected a falling loss, found {total.item()} at step {step}: "
                            f"give a smaller --lr than {peak:g}")
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        follow(mean, model, min(0.998, step / (step + 10)))
        if step % args.every == 0 or step == steps:
            record(step, losses)
            save_parser(args.out, mean, step=step, curve=curve, args=str(vars(args)))


def draw_rows(generator, pool, count):
    """`count` random rows of a pool, with replacement -> a batch of each of their tensors."""
    rows = torch.randint(len(pool), (count,), generator=generator)
    return [*map(torch.stack, zip(*(pool[i] for i in rows)))]


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
    log_p, click = model.sticks(masked(generator, turned(panels, (2, 3))))
    grid = turned(labels(values), (1, 2))
    seen = ~clicks.isnan()
    logits = model.buttons(masked(generator, turned(buttons[0], (2, 3))))
    return {"grid": -(grid * log_p).sum((1, 2)).mean(),
            "click": F.binary_cross_entropy_with_logits(click[seen], clicks[seen]).nan_to_num(),   # of none
            "button": F.binary_cross_entropy_with_logits(logits, buttons[1])}


def labels(values):
    """Stick values (B, 2) -> the grid's label (B, 11, 11): a normal bump around the true place, summing to
    1."""
    return bump(values, torch.linspace(-1, 1, GRID), LABEL_WIDTH)


def bump(places, cells, width):
    """Places (..., 2), x and y -> grids (..., cells, cells) of a normal bump, summing to 1; cells (c,): where
    their middles are."""
    away = (cells - places[..., None]) / width
    x, y = torch.exp(-0.5 * away ** 2).unbind(-2)                              # (..., c) each
    grid = y[..., :, None] * x[..., None, :]
    return grid / grid.sum((-1, -2), keepdim=True).clamp(min=1e-6)


def turned(x, axes):
    """A batch, each eighth of it turned and mirrored its own way."""
    eighths = [torch.rot90(part, i, axes) for i, part in enumerate(x.chunk(8))]
    mirrored = [part.flip(axes[1]) for part in eighths[4:]]
    return torch.cat(eighths[:4] + mirrored)


def masked(generator, panels):
    """Panels (B, 4, S, S, 3), their colours sometimes inverted; now and then no previous frame, no pad at
    rest."""
    known = panels.flatten(2).any(2)
    known[:, ::2] &= torch.rand(len(panels), 2, generator=generator) > 0.12
    inverted = torch.rand(len(panels), 1, 1, 1, 1, generator=generator) < 0.15
    return torch.where(inverted, 255 - panels, panels) * known[:, :, None, None, None]


def locator_loss(model, generator, batch):
    """Cross-entropy of each place's heat map, in which "not here" is one more cell, and the log error of the
    sizes at the true place."""
    windows, places = batch                                                    # (B, 20, 4)
    log_p, sizes = model(windows)
    here = ~places[..., 0].isnan()
    cells = (torch.arange(extract.WINDOW // extract.CELL) + 0.5) * extract.CELL
    grid = bump(places[..., :2].nan_to_num(), cells, 0.6 * extract.CELL)
    grid = grid * here[..., None, None]
    label = torch.cat([grid.flatten(2), ~here[..., None]], 2)
    got = (sizes * grid[:, :, None]).sum((3, 4))
    true = places[..., 2:].clamp(min=1).log().nan_to_num()
    wrong = (got - true).abs().mean(2) * here
    wrong = wrong.sum(0) / here.sum(0).clamp(min=1)                            # (20,), the pad itself last
    return {"heat": -(label * log_p).sum(2).mean(),
            "size": wrong.mean(),
            "pad": wrong[-1]}


# ------------------------------------------------------------------------------------------------ the teacher
# A scene = one skin over one moving background, some frames of play, through one video codec: what a clip
# folder would hold, with the truth. What differs between channels is drawn per scene: skin, size, opacity ...
FRAMES, RESTS = 8, 5                       # frames of a scene; pictures that its pad at rest is the median of
SAMPLED = 10                               # frames of a scene of the locator's


@dataclass(eq=False)
class Teacher(torch.utils.data.IterableDataset):
    """Endless scenes as tensors, each of one of `skins` or, in a share that prevents forgetting, of one of
    our own pads; most are restyled."""
    seed: int
    skins: list
    scene: object
    share: float = 0.35                                        # of our own

    def __iter__(self):
        cv2.setNumThreads(1)
        rng = np.random.default_rng([self.seed, 7])
        ours = extract.our_pads()
        backdrops = [extract.backdrop(rng, 400, 600) for _ in range(24)]
        while True:
            if rng.random() < 0.25:
                backdrops[rng.integers(24)] = extract.backdrop(rng, 400, 600)
            own = not self.skins or rng.random() < self.share
            skins = ours if own else self.skins
            skin = skins[rng.integers(len(skins))]
            skin = restyle(rng, skin) if own or rng.random() < 0.6 else skin
            yield [[torch.from_numpy(a) for a in part] for part in self.scene(rng, skin, backdrops)]


def scene(rng, skin, backdrops):
    """One scene -> panels with truth: (sticks uint8 (8 k, 4, 57, 57, 3), values (8 k, 2), click (8 k,) (nan:
    not shown on this pad)), (buttons uint8 (8 m, 4, 33, 33, 3), pressed (8 m,)). The panels are previous,
    current, rest, pressed: in half of the scenes the reader knows the very skin, so how it looks pressed, and
    its geometry is right; in the others it has a foreign one or the locator's."""
    overlay = Overlay(rng, skin, 96, 380)
    film = Film(rng, backdrops, overlay.size)
    known = rng.random() < 0.5
    geometry = misplaced(rng, skin, rng.choice([0, 0.15] if known else [0.1, 0.5, 1, 1]))
    closeups = Closeups(geometry, overlay.pad)
    actions = random_play(rng, FRAMES)
    views = [film.step() for _ in actions]
    now = closeups.all(overlay.crops([*map(overlay.over, views, actions)]))
    before = [np.concatenate([cuts[:1], cuts[:-1]]) for cuts in now]
    overlay.passes *= rng.random() < 0.3                       # a median over a video hardly shows its codec
    # the pad at rest: a median over frames that mostly are at rest, over the same background or over others
    if rng.random() < 0.6:
        views = [film.cut() for _ in actions]
    asleep = rng.random(FRAMES) < rng.choice([0.3, 0.75, 0.95, 1, 1])
    rests = np.where(asleep[:, None], 0, actions)[:RESTS]
    rests = closeups.all(overlay.crops([*map(overlay.over, views, rests)]))
    rest = [*map(extract.median_image, rests)]
    down = np.uint8([0, 0])
    if known:
        behind, level = extract.median_image(views), light(rng)                # drawn, not seen: a little off
        drawn = overlay.crops([overlay.over(behind, state) for state in (extract.neutral(), None)])
        still, down = (closeups(cv2.convertScaleAbs(crop, None, *level)) for crop in drawn)
        rest[0] = still[0]                                     # of sticks, as the reader has it
    sticks, buttons = map(montages, before, now, rest, down)
    values = np.zeros((FRAMES, len(closeups.sticks), 2), np.float32)
    clicks = np.full((FRAMES, len(closeups.sticks)), np.nan, np.float32)
    pressed = actions[:, [BUTTON[b] for b in closeups.buttons]]
    for i, side in enumerate(closeups.sticks):
        true = np.divide(skin.sticks[side]["travel"], geometry["sticks"][side]["travel"])
        values[:, i] = np.clip(actions[:, STICKS[side]] * true, -1, 1)
    for i, j in closeups.clicks.items():
        clicks[:, i] = pressed[:, j]
    return (sticks, values.reshape(-1, 2), clicks.ravel()), (buttons, pressed.ravel())


def located_scene(rng, skin, backdrops):
    """One window for the locator -> ((picture uint8 (1, 192, 192, 5), places float32 (1, 20, 4)),): what
    extract.motion_picture() makes of ten frames; each place's x, y and two sizes, nan where it isn't seen."""
    film = Film(rng, backdrops, (extract.WINDOW, extract.WINDOW))
    move = film.cut if rng.random() < 0.4 else film.step       # sampled so far apart that nothing stays
    frames = [move() for _ in range(SAMPLED)]
    places = np.full((1, len(extract.TARGETS), 4), np.nan, np.float32)
    for _ in range(rng.choice([0, 0, 0, 1, 2, 4])):
        distract(rng, frames, film.cut())
    overlay = Overlay(rng, skin, 50, 180)
    if rng.random() < 0.8:
        spare = np.multiply(overlay.size, rng.choice([0, 0, 0, 0.1, 0.3]))     # so much of it may be cut off
        room = np.maximum(np.subtract(extract.WINDOW, overlay.size), 1)
        corner = rng.uniform(-spare, room + spare)
        lazy = rng.choice([1, 3, 12])                          # frames between two samples
        actions = random_play(rng, SAMPLED * lazy)[::lazy]
        actions *= rng.random(extract.A) < rng.uniform(0.2, 1.5)               # some are never used
        shown = rng.choice([1, 1, 1, 0.8, 0.6])                # in the others the overlay is not there yet
        frames = [overlay.over(frame, action, corner) if rng.random() < shown else frame
                  for frame, action in zip(frames, actions)]
        places[0] = places_of(skin, np.divide(overlay.size, skin.size), corner)
    if rng.random() < 0.3:
        distract(rng, frames, film.cut())
    return (extract.motion_picture(np.stack(overlay.seen(frames)))[None], places),


def places_of(skin, scale, corner):
    """Where a skin drawn at this scale and corner has extract.TARGETS in a window, float32 (20, 4): x, y and
    two sizes; nan where it does not show them."""
    boxes = {**skin.buttons, "pad": extract.visible_box(skin)}
    places = np.full((len(extract.TARGETS), 4), np.nan)
    for place, name in zip(places, extract.TARGETS):
        if name in boxes:
            low, high = np.reshape(boxes[name], (2, 2))
            place[:] = [*((low + high) / 2), *(high - low)]
        elif name in skin.sticks:
            stick = skin.sticks[name]
            travel = max(np.mean(stick["travel"]), 0.25 * stick["radius"])
            place[:] = [*stick["center"], travel, stick["radius"]]
    places = places * np.tile(scale, 2) + [*corner, 0, 0]
    xy = places[:, :2]
    outside = (xy < 0) | (xy >= extract.WINDOW)
    places[outside.any(1)] = np.nan
    return places


def distract(rng, frames, piece):
    """Draw something into the frames, in place, that stands still as an overlay does: a piece of another
    picture or none, and marks over it, which now and then are others, as keys light up."""
    x, y = rng.integers(0, extract.WINDOW - 8, 2)
    w, h = rng.integers((8, 6), (120, 70))
    inks = rng.integers(0, 256, (6, 3))
    seeds = rng.integers(1 << 32, size=2)
    often = rng.choice([0, 0.1, 0.4])
    opacity = rng.choice([0.5, 0.8, 1])
    solid = rng.random() < 0.4
    for frame in frames:
        hidden = frame[y:y + h, x:x + w]
        layer = piece[:h, :w][:len(hidden), :hidden.shape[1]] if solid else hidden
        layer = layer.copy()
        seed = seeds[int(rng.random() < often)]
        extract.marks(np.random.default_rng(seed), layer, inks)
        hidden[:] = cv2.addWeighted(layer, opacity, hidden, 1 - opacity, 0)


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
        speed = rng.choice([0.3, 0.6, 1])
        noise = rng.choice([0, 0, 0.03])
        at = goal = tilt(rng, idle)
        for t in range(n):
            goal = tilt(rng, idle) if rng.random() < 0.2 else goal
            at = at + (goal - at) * speed
            actions[t, s] = np.clip(at + rng.normal(0, 1, 2) * noise, -1, 1)
    return actions


def tilt(rng, idle):
    """Where a stick is pushed to: home, or often to full tilt, often along an axis, in a round or a square
    gate."""
    along = rng.integers(8) * np.pi / 4 + rng.normal(0, 0.08)
    angle = along if rng.random() < 0.4 else rng.uniform(0, 2 * np.pi)
    v = np.array([np.cos(angle), np.sin(angle)])
    v /= rng.choice([1, 1, np.abs(v).max()])
    v *= rng.choice([1, rng.uniform(0.1, 1)])
    return v * (rng.random() >= idle)


# -------------------------------------------------------------------------------------------------- machinery


# ------------------------------------------------------------------------------ what a drawn video is made of
def restyle(rng, skin):
    """A skin as another author might have made it: other colours, a thinner body, other pressed looks; caps
    that are darker or smaller, go further, tilt, change as they move, or rest aside in their wells."""
    order, gain = range(3), rng.uniform(0.6, 1.1)
    if rng.random() < 0.5:
        order, gain = rng.permutation(3), rng.uniform(0.5, 1.2, 3)
    recoloured, inverted = rng.random(2) < (0.7, 0.15)
    relit = rng.choice([0, 0, 0.3, 1])                         # the share of its controls
    body = rng.uniform(0.15, 0.8) if rng.random() < 0.3 else 1
    cap = rng.uniform(0.2, 0.6) if rng.random() < 0.15 else 1
    size = rng.uniform(0.5, 1.1) if rng.random() < 0.5 else 1  # of the caps
    body_size = rng.uniform(0.8, 1.1) if rng.random() < 0.3 else 1
    longer = rng.uniform(0.6, 1.4) if rng.random() < 0.5 else 1
    tilt = rng.uniform(0.15, 0.5) if rng.random() < 0.3 else 0
    aside = rng.uniform(-0.8, 0.8, 2) * (rng.random() < 0.5)   # of the caps in their wells, in travels

    def paint(sprite, share, opacity):
        rgb, alpha = np.split(sprite.astype(np.float32), [3], 2)
        if recoloured:
            rgb = (alpha - rgb if inverted else rgb)[..., order] * gain
        return np.uint8(np.dstack([np.minimum(rgb * share, alpha), alpha]) * opacity)

    parts = []
    for p in skin.parts:
        look = cap if p.control in STICKS else 1, 1 if p.control else body
        sprites = [s if s is None else paint(s, *look) for s in p.sprites]
        if len(sprites) == 2 and sprites[0] is not None and rng.random() < relit:
            sprites[-1] = relight(rng, sprites[0])             # pressed
        if not p.control:
            sprites = [zoomed(sprites[0], body_size)]
        elif p.control in STICKS:
            moved = [relight(rng, sprites[0])] if rng.random() < 0.2 else []
            sprites = [zoomed(s, size) for s in sprites + moved]
        p = replace(p, sprites=sprites, travel=np.multiply(p.travel, longer), tilt=tilt)
        parts.append(replace(p, at=p.at + p.travel * aside) if p.control in STICKS else p)
    sticks = {}
    for side, stick in skin.sticks.items():
        travel = np.multiply(stick["travel"], longer)
        sticks[side] = {**stick, "center": stick["center"] + travel * aside, "travel": travel,
                        "radius": stick["radius"] * size}
    return replace(skin, parts=parts, sticks=sticks)


def relight(rng, sprite):
    """A sprite, premultiplied, as another skin would show it pressed: smaller or larger, with a ring or a
    spot on it, or tinted."""
    h, w = sprite.shape[:2]
    rgb, alpha = np.split(sprite.astype(np.float32), [3], 2)
    how = rng.choice(["size", "spot", "spot", "tint", "tint"])
    if how == "size":
        return zoomed(sprite, rng.choice([0.8, 0.88, 1.12]))
    cover = alpha / 255
    if how == "spot":
        x, y, *size = cv2.boundingRect(np.uint8(sprite[..., 3] > 24))
        share = rng.uniform(0.15, 0.5)
        rx, ry = (int(side * share) + 1 for side in size)
        middle = x + size[0] // 2, y + size[1] // 2
        stroke = rng.choice([-1, -1, min(rx, ry) // 3 + 1])
        spot = np.zeros((h, w, 1))
        cover = cv2.ellipse(spot, middle, (rx, ry), 0, 0, 360, 1, int(stroke))
    cover = cover * rng.uniform(0.25, 1)
    inks = rng.uniform(0, 255, 3), rng.choice([0, 255]), 255 - rgb             # the last is the opposite
    rgb = rgb * (1 - cover) + inks[rng.integers(3)] * cover
    return np.uint8(np.dstack([rgb, alpha * (1 - cover) + 255 * cover]))


def zoomed(sprite, scale):
    """A sprite so many times as large about its middle, cut at its edge."""
    h, w = sprite.shape[:2]
    larger = cv2.getRotationMatrix2D(((w - 1) / 2, (h - 1) / 2), 0, scale)
    return cv2.warpAffine(sprite, larger, (w, h))


def misplaced(rng, skin, much):
    """The skin's geometry as a foreign template or the locator would tell it: boxes, centres and travels a
    little (much = 0.1) or far (1) off."""
    geometry = {"size": skin.size, "buttons": {}, "sticks": {}}
    off = lambda most: rng.uniform(-most, most, 2) * much
    for name, box in skin.buttons.items():
        low, high = np.reshape(box, (2, 2))
        middle = (low + high) / 2 + off(0.15) * (high - low)
        half = (high - low) / 2 * np.exp(off(0.2))
        geometry["buttons"][name] = [*(middle - half), *(middle + half)]
    for side, stick in skin.sticks.items():
        travel = np.maximum(stick["travel"], 1)
        longer = np.exp(rng.uniform(-0.16, 0.34) * much)
        geometry["sticks"][side] = {**stick, "center": stick["center"] + off(0.5) * travel,
                                    "travel": travel * longer}
    return geometry


class Film:
    """A moving picture behind the overlay: windows into backdrops that stand still, scroll, shake, zoom or
    cut, and pieces of other backdrops that move over it."""

    def __init__(self, rng, backdrops, size):
        self.rng = rng
        self.backdrops = backdrops
        self.size = size                                       # (w, h)
        self.velocity = rng.normal(0, rng.choice([0, 0, 0, 1, 4, 12]), 2)
        self.shake = rng.choice([0, 0, 0, 6])
        self.growth = rng.normal(1, rng.choice([0, 0, 0, 0.03]))
        self.cuts = rng.choice([0, 0, 0, 0.3])
        self.pieces = []
        for i in rng.integers(len(backdrops), size=rng.integers(0, 4)):
            side = rng.integers(6, 40)
            self.pieces.append((backdrops[i][:side, :side], rng.random(2) * size, rng.normal(0, 6, 2)))
        self.cut()

    def cut(self):
        """Another backdrop, or another place in it -> its window."""
        self.image = self.backdrops[self.rng.integers(len(self.backdrops))]
        self.zoom = self.rng.choice([0.6, 1, 1, 2, 3])
        room = self.image.shape[1::-1] - np.array(self.size) / self.zoom
        self.at = self.rng.random(2) * np.maximum(room, 1)
        return self.window()

    def window(self):
        """uint8 (h, w, 3): what is behind the overlay now."""
        m = np.c_[np.eye(2) / self.zoom, self.at]
        flags = self.rng.choice([cv2.INTER_LINEAR, cv2.INTER_NEAREST]) | cv2.WARP_INVERSE_MAP
        return cv2.warpAffine(self.image, m, self.size, flags=int(flags), borderMode=cv2.BORDER_REFLECT)

    def step(self):
        """The next frame's background."""
        if self.rng.random() < self.cuts:
            self.cut()
        self.at = self.at + self.velocity + self.rng.normal(0, 1, 2) * self.shake
        self.zoom = self.zoom * self.growth
        view = self.window()
        for piece, at, velocity in self.pieces:
            at += velocity
            x, y = at.astype(int) % self.size
            hidden = view[y:, x:][:len(piece), :len(piece)]
            hidden[:] = piece[:len(hidden), :hidden.shape[1]]
        return view


class Overlay:
    """How one video shows one skin: size, opacity, quality, and where the crop lies a little wrong."""

    def __init__(self, rng, skin, *widths):
        """widths: the least and the largest in the video."""
        self.rng = rng
        self.skin = skin
        stretched = rng.choice([1, rng.uniform(0.75, 1.25)])
        shape = np.divide(skin.size, skin.size[0]) * [1, stretched]
        width = np.exp(rng.uniform(*np.log(widths)))
        sizes = np.maximum([shape * width, shape * 320], 16).astype(int)
        self.size, self.pad = sizes.tolist()                   # in the video; of the crop
        self.opacity = 1.0 if rng.random() < 0.25 else rng.uniform(0.5, 1)
        middle = np.divide(self.size, 2) + rng.normal(0, 0.6, 2)               # a pose is a little wrong
        step = np.divide(self.size, self.pad) * rng.normal(1, 0.008)
        self.warp = closeup_map(middle, step, np.array(self.pad))              # crop -> video pixels
        self.passes = rng.choice([0, 1, 1, 2])                 # through a codec
        self.light = light(rng) if rng.random() < 0.4 else (1, 0)

    def over(self, view, action, corner=(0, 0)):
        """The skin in the state of an action (None: with every control pressed) over what is behind it, uint8
        (h, w, 3)."""
        rgba = extract.draw_pressed(self.skin) if action is None else extract.draw(self.skin, action)
        sprite = cv2.resize(extract.premultiply(rgba), self.size, interpolation=cv2.INTER_AREA)
        sprite = cv2.warpAffine(sprite, np.c_[np.eye(2), corner], view.shape[1::-1])
        sprite = sprite * np.float32(self.opacity)
        behind = view * (1 - sprite[..., 3:] / 255)
        return np.rint(sprite[..., :3] + behind).astype(np.uint8)

    def seen(self, frames):
        """Frames as the video shows them."""
        for _ in range(self.passes):
            frames = [*codec(self.rng, frames)]
        return [cv2.convertScaleAbs(frame, None, *self.light) for frame in frames]

    def crops(self, frames):
        """Frames -> crops as extract.py would cut them."""
        return [jpeg(warped(frame, self.warp, self.pad), extract.QUALITY) for frame in self.seen(frames)]


def light(rng):
    """Gain and lift of a video whose levels are a little off."""
    return rng.uniform(0.75, 1.1), rng.uniform(-10, 20)


def codec(rng, frames):
    """Frames as a video codec leaves them, one by one: blocks that change little stay as they were, the
    others are JPEG's."""
    quality = rng.integers(35, 95)
    keep = rng.choice([0, 1, 3, 6])
    last = jpeg(frames[0], quality)
    for frame in frames:
        change = cv2.absdiff(frame, last)
        blocks = cv2.resize(change, None, fx=1 / 8, fy=1 / 8, interpolation=cv2.INTER_AREA)
        moved = np.uint8(blocks.max(2) >= keep)
        moved = cv2.resize(moved, frame.shape[1::-1], interpolation=cv2.INTER_NEAREST)
        last = np.where(moved[..., None], jpeg(frame, quality), last)
        yield last


def jpeg(image, quality):
    """A picture as JPEG leaves it."""
    code = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, int(quality)])[1]
    return cv2.imdecode(code, cv2.IMREAD_COLOR)


# ------------------------------------------------------------------------------------ pictures, files, scores
def in_the_videos_light(templates, picture):
    """Templates, uint8 (h, w, 4), premultiplied, the first at rest, as they would look in the video whose
    median picture (h, w, 3) is given: by a line fitted where the first is opaque; where little is, as a share
    (the overlay's opacity) of it over the mean colour beside it -> list of uint8 (h, w, 3)."""
    drawn = []
    for template in templates:
        full, alpha = np.split(template.astype(float), [3], 2)
        alpha /= 255
        if not drawn:
            solid = alpha[..., 0] > 0.78
            rgb = full[solid] / alpha[solid]
            beside = alpha[..., 0] < 0.1
            behind = picture
            if len(rgb) >= 200 and rgb.std() >= 8:
                gain, lift = np.polyfit(rgb.ravel(), picture[solid].ravel(), 1)
            else:
                behind = picture[beside].mean(0) if beside.any() else np.full(3, 127.0)
                added = full - alpha * behind
                gain = ((picture - behind) * added).sum() / max((added ** 2).sum(), 1)
                lift = behind * (1 - gain)
        seen = np.clip(gain, 0.3, 1.1) * full + lift * alpha + (1 - alpha) * behind
        seen = np.where(alpha < 0.1, picture, seen)
        drawn.append(np.rint(seen).clip(0, 255).astype(np.uint8))
    return drawn


def likeness(a, b):
    """Correlation, -1..1, of two arrays that average 0."""
    scale = np.linalg.norm(a) * np.linalg.norm(b)
    return float(np.vdot(a, b) / (scale + 1e-6))


def likenesses(a, b):
    """likeness() of close-ups (k, S, S, 3) to others, each colour's mean in each taken off -> (k,)."""
    a, b = (closeups - closeups.mean((1, 2), keepdims=True) for closeups in (a, b))
    return np.array([*map(likeness, a, b)])


def edges(crop):
    """Sobel x and y of the crop in grey at half its size, float32 (2, h, w); strong edges are cut off, so
    that no single one decides."""
    grey = cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    slopes = [cv2.Sobel(small, cv2.CV_32F, *way) for way in ((1, 0), (0, 1))]
    return np.stack(slopes).clip(-80, 80)


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
    expected = f"{clip.get('n')} crops of {clip.get('pad')}, a geometry in clip.json (cut the clip again)"
    with extract.reading(folder, expected), np.errstate(all="ignore"):
        if pads and [len(pads), *pads[0].shape[1::-1]] != [clip["n"], *clip["pad"]]:
            raise ValueError(f"{len(pads)} of {pads[0].shape[1::-1]} in pads.npy")
        sticks, buttons = Closeups(clip["geometry"], clip["pad"]).maps         # all that reading asks of it
        if not np.isfinite([*sticks, *buttons]).all():
            raise ValueError("numbers that are not finite")
    return clip, pads


def read_templates(folder, clip):
    """template.png of a clip and, where it has one, pressed.png, uint8 (h, w, 4), premultiplied; none for a
    pad that the locator found: its template is the video's own picture."""
    pictures = []
    for path in (folder / "template.png", folder / "pressed.png"):
        if path.is_file() and clip.get("matcher") != "locator":
            picture = extract.read_rgba(path)
            size = list(picture.shape[1::-1])
            if size != clip["pad"]:
                raise UserError(f"{path}: expected a picture of {clip['pad']}, found {size}: "
                                "cut the clip again")
            pictures.append(extract.premultiply(picture))
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
    got, true = (rows[:, shown] > 0.5 for rows in (actions, truth))
    occurs = true.any(0)
    both = got.sum(0) + true.sum(0)
    f1 = 2 * (got & true).sum(0) / np.maximum(both, 1)
    sticks = {f"{s} R2": r2(actions[:, STICKS[s]], truth[:, STICKS[s]]) for s in geometry["sticks"]}
    return {**sticks, "stick R2": mean(sticks.values()),
            "accuracy": mean((got == true).mean(0)),
            "F1": mean(f1[occurs]),
            "false": got[:, ~occurs].sum()}


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
    with extract.video_writer(args.out, clips[folder]["fps"], (1600, 400)) as add:
        for rgb in tqdm(pictures(folder, 300), "film", clips[folder]["n"], disable=None):
            add(rgb)


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
    parts = np.array_split(np.arange(n), min(k or n, n))
    busy = np.abs(labels[0]).sum(1)
    w = high * 4 // 3
    for part in parts:
        i = part[busy[part].argmax()]
        now = np.searchsorted(frames.numbers[1:], i, "right")                  # --every K keeps each Kth
        title = f"{folder.name}   {i / clip['fps']:.2f} s   confidence {confidence[i]:.2f}"
        panels = {title: Image.fromarray(frames[now])}
        if pads:
            panels["the pad in the video"] = Image.fromarray(pads[i])
        for title, actions in zip(("read", "truth"), labels):
            names = ", ".join(b for b in geometry["buttons"] if actions[i, BUTTON[b]] > 0.5)
            picture = redrawn(ground.copy(), geometry, actions[i], labels[-1][i])
            panels[textwrap.fill(f"{title}: {names}", 30)] = picture
        page = Image.new("RGB", (4 * w, w))
        for x, (text, picture) in zip(range(0, 4 * w, w), panels.items()):
            page.paste(ImageOps.contain(picture, (w, high)), (x, 0))
            ImageDraw.Draw(page).text((x, high), text, font_size=high * 0.07)
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
    --batch; scenes: new ones a step."""
    net: object
    load: object
    scene: object
    loss: object
    pools: tuple
    batches: tuple
    scenes: int


KINDS = {
    "reader": Kind(Parser, load_parser, scene, parser_loss,
                   pools=(1, 8), batches=(1, 3), scenes=1),
    "locator": Kind(extract.locator_net, extract.load_locator, located_scene, locator_loss,
                    pools=(0.3,), batches=(0.25,), scenes=4)}


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
    p = verb("train", train_net, "train the reader on our own pads and yours")
    p.add_argument("--locator", action="store_true",
                   help="train extract.py's locator of unknown pads, not the reader")
    p.add_argument("--out", required=True, help="where the weights go (.safetensors)")
    p.add_argument("--skins", metavar="DIR",
                   help="OBS input-overlay presets (default: our own pads only)")
    p.add_argument("--ckpt", help="weights to start from (default: none, from scratch)")
    p.add_argument("--steps", type=number(int, 1),
                   help="optimiser steps (default: 5000; to fit --ckpt to --skins 600)")
    p.add_argument("--batch", type=number(int, 8), default=64,
                   help="sticks a step, three times as many buttons, a quarter of the windows (default: 64)")
    p.add_argument("--lr", type=number(float, 1e-9, 1),
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
