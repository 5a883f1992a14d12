"""extract.py: find gamepad overlays in gameplay videos, cut clips (NitroGen, arXiv 2601.02427, section 3.1).

    python extract.py VIDEO|DIR... --out DATA [--templates DIR] [--every K] [--matcher sift] [--sheet PNG]
    python extract.py VIDEO|DIR... --out DATA --labels DIR   NVIDIA's released labels instead of localisation
    python extract.py --labels DIR                           what they label, by game
    python extract.py VIDEO|DIR... --out DATA --plain        frames alone, where there is no overlay
    python extract.py templates --out DIR                    our 173 templates as PNG + JSON, to look at

In: videos (anything OpenCV's FFmpeg reads). Out: one folder per video under DATA (NAME_place2, NAME_place3
where the overlay moves; one per chunk with --labels), written whole or not at all:
    clip.json                      where the overlay is, which template it is, and that template's geometry
    frames.npy + frames_index.npy  uint8 (bytes,) + int64 (m+1, 2): 256 x 256 policy frames, overlay masked
    pads.npy + pads_index.npy      the same layout: the overlay in its template's frame, one a video frame
    template.png, pressed.png      uint8 (h, w, 4): the template at rest and, where it is known, with every
                                   control pressed, at the size of the crops
(with --labels, instead of the last two: actions.npy, confidence.npy, keep.npy), one line a video in
DATA/extract.jsonl, and an empty DATA/.lock-HASH a clip. The templates' features are kept in the user's cache
folder: nitrogen/templates-HASH.npz in $XDG_CACHE_HOME or ~/.cache, on Windows in %LOCALAPPDATA%.
This file is also the home of what every stage shares: the 25-dim action, the clip folder, video in and out,
shrink() and draw().
"""
import argparse
import errno
import functools
import hashlib
import io
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import signal
import sys
import threading
import time
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)    # we report errors ourselves, in one line
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
# torch's threads spin while they wait for each other: beside another busy process a step took 20 to 200 times
# as long. libgomp reads this once, when torch is imported: every script that uses it imports this one before.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

WEIGHTS = Path(__file__).parent / "weights"
OUR_PADS = WEIGHTS / "pads"          # templates of our own drawing, as OBS presets: 8 families


# ---- the action: 25 floats, 21 buttons in the released order, then left x, left y, right x, right y
# The paper says 20 (16 buttons + 4 axes) in its body and 16 x 24 in its appendix; the released labels have 17
# buttons + 4 axes; the checkpoint has the 25 below (its author, issue 43).
BUTTONS = ("BACK DPAD_DOWN DPAD_LEFT DPAD_RIGHT DPAD_UP EAST GUIDE LEFT_SHOULDER LEFT_THUMB LEFT_TRIGGER "
           "NORTH RIGHT_BOTTOM RIGHT_LEFT RIGHT_RIGHT RIGHT_SHOULDER RIGHT_THUMB RIGHT_TRIGGER RIGHT_UP "
           "SOUTH START WEST").split()
LEGACY = ("RIGHT_BOTTOM", "RIGHT_LEFT", "RIGHT_RIGHT", "RIGHT_UP")  # no control of a pad: 0 in labels
BUTTON = {name: i for i, name in enumerate(BUTTONS)}
STICKS = {"left": slice(21, 23), "right": slice(23, 25)}                # x right, y DOWN, both in [-1, 1]
THUMB = {"left": "LEFT_THUMB", "right": "RIGHT_THUMB"}                  # a stick's click
A = len(BUTTONS) + 4
SIDE = 256                                         # policy frames are SIDE x SIDE
HORIZON = 16                                       # steps of a training chunk [P]
PLAY_STEPS = 2          # Euler steps of a chunk that is played: completes as many tasks as 16 [P] do [O]
DEAD_ZONE, SURE = 0.15, 0.5             # a stick nearer to its centre does not act; least confidence used [O]


# ---- localisation and cutting [P: section 3.1; the rest is ours]
SAMPLES, MIN_INLIERS = 25, 20                      # [P]: 25 frames a video, accept from 20 inliers on
MIN_PLACE = 5                             # sampled frames without the overlay that make a second place likely
TEMPLATE_WIDTH, TEMPLATE_FEATURES = 400, 600       # templates are described at this width by so many features
VIEWS = ((2560, 4096), (1280, 2048))               # a picture, at two widths, each by its strongest features
COARSE_FEATURES, FINALISTS = 96, 10                # many templates: few features first, then all
MIN_COSINE, PIXELS = 0.7, 3.0           # of matched features; RANSAC's tolerance in pixels of the larger view
MIN_EDGES, SAME_SKIN = 0.30, 0.65     # edge agreement: of other pads up to 0.6, of the very skin from 0.65 on
THIN_SKIN, MANY = 0.5, 150        # thin lines agree from 0.5 on: with more inliers than another pad has
PAD_WIDTH = 320                                 # of the crops: as fine as the overlay is in most 1080p videos
PAUSE, BACK = 2000, 100       # a clock that leaps or runs back by so many milliseconds breaks: a cut
AHEAD = 8                                   # frames decoded ahead of the threads that shrink, warp and encode


def run_extract(args):
    """The main command: localise and cut every video, or cut along released labels."""
    if args.labels and not args.videos:
        return list_labels(args.labels)
    if not args.videos or not args.out:
        raise UserError("expected videos and --out DATA, or --labels DIR alone: extract.py --help tells more")
    if args.videos == ["templates"]:
        return run_templates(Path(args.out))
    videos, out = find_videos(args.videos)[:args.limit], Path(args.out)
    if args.sheet:
        if args.labels:
            raise UserError("--sheet shows the overlays that were found: expected no --labels beside it")
        writable(args.sheet)
    out.mkdir(parents=True, exist_ok=True)
    jobs = shard(label_jobs(videos, args.labels) if args.labels else videos)
    statuses = work_through(jobs, args) if jobs else []
    if not statuses:
        print(f"nothing to do: all {len(jobs)} of this share are done")
    if args.sheet:
        contact_sheet(args.sheet, shard(videos), out)
    if jobs and statuses.count("error") == len(jobs):        # torchrun ends all when one fails: a share may
        raise UserError(f"{len(jobs)} of {len(jobs)} can't be used: see the lines above")


def extract_one(video, name, matcher, args, settings):
    """One video: localise and cut -> what its line of extract.jsonl says of it; None where its last line and
    its clips are of these settings."""
    out, file = Path(args.out), video.stat()
    key = fingerprint(settings, file.st_size, file.st_mtime_ns)
    folders = [out / place for place in place_names(name)]
    with clip_lock(folders[0]):
        old = journal(out).get(str(video), {})
        if old.get("run") == key and all(made_by(key, f) for f in folders[:old.get("places", 0)]):
            return None
        for folder in folders:
            check_replaceable(folder)
        places, most = localise_all(*sample_frames(video), matcher) if matcher else ([None], 0)
        for unused in folders[len(places):]:
            discard(unused)
        clips = [cut_clip(video, folder, find, len(places), args, key)
                 for folder, find in zip(folders, places)]
    if not places:
        return {"status": "none", "run": key, "inliers": most,
                "reason": f"best of {len(matcher.skins)} templates has {most} inliers, {MIN_INLIERS} and "
                          "agreeing edges are needed"}
    told = {k: clips[0][k] for k in ("template", "box", "inliers", "edges", "places") if k in clips[0]}
    return {"status": "found" if matcher else "plain", "run": key, **told}


# ---- localisation
def localise_all(frames, pictures, matcher):
    """Every place that the overlay takes in turn: a scene switch moves it -> (list of Find, the most inliers
    of any pose).

    Localise, then again in the frames where it was absent. frames, pictures: sample_frames()'s. A video
    without an overlay in most of its frames still has one place. A find that is not surely a template's own
    skin must be seen by the locator too, and takes its controls.
    """
    places, most, numbers = [], 0, np.arange(len(frames))
    while len(places) < 3 and len(numbers) >= (MIN_PLACE if places else 1):
        grey, colour = ([every[i] for i in numbers] for every in (frames, pictures))
        find, inliers = localise(grey, matcher)
        most = max(most, inliers)
        known = find and (find.edges >= SAME_SKIN or find.edges >= THIN_SKIN and find.inliers >= MANY)
        if known:
            present = [p for p, there in zip(colour, find.there) if there]
            find = replace(find, skin=recolour(find, present, frames[0].shape[1], matcher.skins))
        if matcher.locator and not (known and (find.skin.buttons or find.skin.sticks)):
            located = locate(matcher.locator, grey, colour)
            if not known:
                find = located
            elif located and overlap(find.box, located.box) >= 0.5:      # the template is a mere picture
                k = np.diag(find.affine)
                seen = moved(located.skin, (find.affine - located.affine)[:, 2], 1 / k)
                find = replace(find, skin=replace(find.skin, buttons=seen.buttons, sticks=seen.sticks))
        if not find or any(overlap(find.box, p.box) > 0.5 for p in places):
            break
        places.append(find)
        numbers = numbers[~find.there]
    return places, most


def localise(frames, matcher):
    """The overlay in sampled grey frames -> (Find or None, the most inliers of any pose): in the median of
    all first, then of halves, then in one frame."""
    n, best, most = len(frames), None, 0
    for group in filter(None, [frames, frames[:n // 2], frames[n // 2:], frames[n // 2:][:1]]):
        picture = median_image(group)
        finds = matcher.search(picture)
        top = finds[0].inliers if finds else 0
        most, enough = max(most, top), max(MIN_INLIERS, top / 2, best.inliers + 1 if best else 0)
        close = [refine(picture, f) for f in finds[:4] if f.inliers >= enough]
        find = max(close, key=lambda f: f.edges, default=None)   # siblings share corners, but not edges
        if find and find.edges >= MIN_EDGES:
            there = np.array([edge_agreement(f, find.skin, find.affine) > find.edges / 2 for f in frames])
            if there.mean() >= 0.2:                                      # stands in at least 5 of 25 frames
                best = replace(find, there=there)
        if best and best.inliers >= 1.5 * MIN_INLIERS:
            break
    return best, most


@dataclass(frozen=True)
class Find:
    """One template at one pose."""
    skin: "Skin"
    affine: np.ndarray                         # (2, 3) template pixels -> video pixels, between pixel centres
    inliers: int                          # matches that agree on the pose; of the locator: controls
    edges: float = 0.0                             # edge_agreement() in the picture it was found in
    there: np.ndarray = None                       # bool (n,): the sampled frames in which it stands
    by: str = "locator"                            # or what matched: xfeat, sift

    @property
    def box(self):
        """[x0, y0, x1, y1] in video pixels."""
        return pose_box(self.affine, self.skin.size)


def sample_frames(path, n=SAMPLES):
    """At most n frames spread over a video -> (list of uint8 (h, w) grey, the same as uint8 (h', w', 3) RGB,
    1280 wide at most)."""
    capture, kept = open_video(path), []
    total = capture.get(cv2.CAP_PROP_FRAME_COUNT)
    if 100 * n < total < 1e9:                      # a seek costs the decoding of some 100 frames
        for number in np.linspace(0, total - 1, n + 2)[1:-1]:
            capture.set(cv2.CAP_PROP_POS_FRAMES, int(number))
            kept += grey_and_small(*capture.read())
    if len(kept) < n // 2:                         # a short video, or one without an index: read it through
        total, capture = sum(1 for _ in presented(open_video(path))), open_video(path)
        wanted = set(np.linspace(0, total - 1, n).astype(int))
        kept = [pictures for number, _ in enumerate(presented(capture)) if number in wanted
                for pictures in grey_and_small(*capture.retrieve())]
    if not kept:
        raise UserError(f"{path}: expected a video with frames, found none that decode: download it again")
    return list(zip(*kept))


def grey_and_small(ok, bgr):
    """Yields a frame as localise() wants it, and in colour for recolour() and locate(); nothing where it is
    not ok."""
    if ok:
        scale = min(1280 / bgr.shape[1], 1)
        small = cv2.resize(bgr, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        yield cv2.cvtColor(bgr, cv2.COLOR_BGR2GRAY), cv2.cvtColor(small, cv2.COLOR_BGR2RGB)


def median_image(frames):
    """Per-pixel median over time: what stands still (the overlay) stays, what moves (the game) blurs. uint8
    as the frames, of which there are 255 at most. Built bit by bit from the highest: a bit is set where at
    most half of the frames are darker than with it."""
    stack, out = np.stack(frames), np.zeros_like(frames[0])
    for top in range(0, len(out), 32):             # in parts that fit the cache
        rows, median = stack[:, top:top + 32], out[top:top + 32]
        for bit in (128, 64, 32, 16, 8, 4, 2, 1):
            darker = (rows < (median | bit)).sum(0, dtype=np.uint8)
            median |= np.uint8(bit) * (darker <= len(frames) // 2)
    return out


class Matcher:
    """Finds templates in pictures by local features: XFeat's where a net is given, else SIFT's, without
    torch."""

    def __init__(self, skins, net=None, locator=None, key=None):
        """net: load_xfeat()'s. locator: load_locator()'s. key: of what skins and net are made of; the skins'
        features are kept in the user's cache folder under it."""
        self.skins, self.net, self.locator = skins, net, locator
        arrays = from_cache(key, self.describe_skins) if key else self.describe_skins()
        self.features = list(zip(arrays[::2], arrays[1::2]))

    def describe_skins(self):
        """Features of each skin, one after the other: points (k, 2) in template pixels, descriptors (k, d),
        points .."""
        arrays = []
        for skin in self.skins:
            flat, scale = flat_template(skin)
            points, descriptors = self.describe(flat, ((TEMPLATE_WIDTH, TEMPLATE_FEATURES),))
            arrays += points / scale, descriptors
        return arrays

    def describe(self, gray, views=VIEWS):
        """Features of a grey picture brought to each width of views -> points (k, 2) in its own pixels,
        descriptors (k, d) of length 1."""
        points, descriptors = [], []
        for width, limit in views:
            scale = width / gray.shape[1]
            size = width, max(round(gray.shape[0] * scale), 32)
            how = cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA
            big = cv2.resize(gray, size, interpolation=how)
            found, d = xfeat(self.net, big, limit) if self.net else root_sift(big, limit)
            points.append((found + 0.5) / np.float32([scale, size[1] / gray.shape[0]]) - 0.5)
            descriptors.append(d)
        return np.concatenate(points).astype(np.float32), np.concatenate(descriptors)

    def search(self, gray):
        """The plausible poses of templates in one grey picture -> list of Find, most inliers first."""
        points, descriptors = self.describe(gray)
        finds = [self.pose(gray.shape, points, descriptors, i) for i in self.shortlist(points, descriptors)]
        return sorted(filter(None, finds), key=lambda f: -f.inliers)

    def shortlist(self, points, descriptors):
        """Which templates are worth a full look: those whose strongest features' nearest neighbours agree
        best. One by one, so that the products stay in the processor's cache."""
        if len(points) < 4:
            return []
        scores = []
        for ours, few in self.features:
            cosine = few[:COARSE_FEATURES] @ descriptors.T
            near = cosine.max(1) > MIN_COSINE
            pairs = ours[:COARSE_FEATURES][near], points[cosine.argmax(1)[near]]
            scores.append(consensus(*pairs, 500)[1].sum())
        return np.argsort(scores, kind="stable")[::-1][:FINALISTS]

    def pose(self, shape, points, descriptors, i):
        """RANSAC over template i's matches -> Find, or None where there is no plausible pose."""
        ours, theirs = mutual(self.features[i][1], descriptors)
        ours, theirs = self.features[i][0][ours], points[theirs]
        tolerance, size = PIXELS * shape[1] / VIEWS[1][0], self.skins[i].size
        affine, fits = consensus(ours, theirs, 3000, tolerance)
        if affine is None or not plausible(affine, size, shape):
            return None
        return Find(self.skins[i], affine, int(fits.sum()), by="xfeat" if self.net else "sift")


@functools.lru_cache(64)
def flat_template(skin):
    """A skin at rest over mid-grey -> (uint8 (h, TEMPLATE_WIDTH) grey, scale from template pixels)."""
    rgba = draw(skin)
    scale = TEMPLATE_WIDTH / rgba.shape[1]
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    rgba = cv2.resize(rgba, (TEMPLATE_WIDTH, max(round(rgba.shape[0] * scale), 1)), interpolation=how)
    return cv2.cvtColor(over(127, rgba), cv2.COLOR_RGB2GRAY), scale


def mutual(ours, theirs):
    """Rows of two sets of unit descriptors (k, d), (m, d) that are each other's nearest, and near enough ->
    (i, j)."""
    if not len(ours):                              # of a template without features
        return np.zeros((2, 0), int)
    cosine = ours @ theirs.T                                             # (k, m)
    i, j = np.arange(len(ours)), cosine.argmax(1)
    good = (cosine.argmax(0)[j] == i) & (cosine[i, j] > MIN_COSINE)
    return i[good], j[good]


def consensus(ours, theirs, rounds, tolerance=PIXELS):
    """RANSAC similarity ours -> theirs -> (affine (2, 3) or None, inlier mask bool (m,)). Seeded: the same
    points, the same pose."""
    affine, nobody = None, np.zeros(len(ours), bool)
    if len(ours) >= 4:
        cv2.setRNGSeed(0)
        affine, fits = cv2.estimateAffinePartial2D(
            ours, theirs, method=cv2.RANSAC, ransacReprojThreshold=tolerance, maxIters=rounds,
            confidence=0.999)
    return affine, nobody if affine is None else fits[:, 0].astype(bool)


def plausible(affine, size, shape):
    """Would a streamer choose this similarity: upright, 5-60 % of the frame's width, mostly inside?"""
    (cosine, _, x), (sine, _, y) = affine                                # of its angle, times its scale
    w, h = np.multiply(size, np.hypot(cosine, sine))
    shown = area([max(x, 0), max(y, 0), min(x + w, shape[1]), min(y + h, shape[0])])
    upright = abs(sine) <= math.tan(math.radians(4)) * cosine
    return upright and 0.05 * shape[1] <= w <= 0.6 * max(shape[:2]) and shown >= 0.6 * w * h


def refine(gray, find):
    """Sub-pixel pose: hill-climb edge agreement over shift, then scale of both axes, in steps down to 1/8
    pixel at the pad's edge -> Find."""
    affine, (w, h) = find.affine.copy(), find.skin.size
    affine[0, 1] = affine[1, 0] = 0                                      # overlays stand upright
    best = edge_agreement(gray, find.skin, affine)
    for step in (1.0, 0.5, 0.25, 0.125):
        moves = [(0, 2, step, 0), (1, 2, step, 0), (0, 0, step / w, w / 2), (1, 1, step / h, h / 2)]
        for _ in range(6):
            before = best
            for row, column, size, anchor in moves:
                for change in (size, -size):
                    trial = affine.copy()
                    trial[row, column] += change
                    trial[row, 2] -= change * anchor                     # scale about the middle
                    score = edge_agreement(gray, find.skin, trial)
                    if score > best:
                        affine, best = trial, score
            if best - before < 1e-4:
                break
    return replace(find, affine=affine, edges=best)


def edge_agreement(gray, skin, affine):
    """Do the template's edges run along edges of the picture? Mean cos(2 angle between gradients), weighted
    by the template's gradient: 1 = all parallel (either polarity: backgrounds and colour variants may invert
    it), 0 = chance.

    gray uint8 (h, w), affine template pixels -> the picture's, upright.
    """
    flat, scale = flat_template(skin)
    x0, y0, x1, y1 = whole_pixels(pose_box(affine, skin.size), gray.shape, 2)
    if x1 - x0 < 16 or y1 - y0 < 16:
        return 0.0
    to_video = affine @ np.diag([1 / scale, 1 / scale, 1])
    to_video[:, 2] -= x0, y0
    blur = max(0.45 / max(to_video[0, 0], 0.05) - 0.45, 0.01)            # as shrinking so far would
    soft = cv2.GaussianBlur(flat.astype(np.float32), (0, 0), blur)
    template = cv2.warpAffine(soft, to_video, (x1 - x0, y1 - y0), flags=cv2.INTER_LINEAR, borderValue=127)
    seen = cv2.GaussianBlur(inside(gray, (x0, y0, x1, y1)).astype(np.float32), (0, 0), 0.7)
    gradients = lambda p: (cv2.Sobel(p, cv2.CV_32F, 1, 0), cv2.Sobel(p, cv2.CV_32F, 0, 1))
    (tx, ty), (vx, vy) = gradients(template), gradients(seen)
    weight, strength = np.hypot(tx, ty), np.hypot(vx, vy)
    weight[weight < 0.15 * weight.max()] = 0
    cosine = (tx * vx + ty * vy) / np.maximum(weight * strength, 1e-6)
    parallel = (2 * cosine ** 2 - 1) * np.clip(strength / 12, 0, 1)
    return float((weight * parallel).sum() / max(weight.sum(), 1e-6))


def recolour(find, pictures, width, skins):
    """Features are grey, so templates of one shape find each other's overlays in any colour -> the skin, of
    all that share the found one's geometry, whose colours explain the median picture best.

    pictures: where it stands, small, uint8 (h, w, 3) RGB; width of the video. A pixel is taken for a mix of
    template and background, of whatever opacity the overlay has: what it differs by from the mean colour
    around the box points the way of the template's.
    """
    shape = lambda s: (s.size, s.buttons, s.sticks)
    siblings = [s for s in skins if s.family == find.skin.family and shape(s) == shape(find.skin)]
    picture = median_image(pictures).astype(np.float32)
    box = np.array(find.box) * picture.shape[1] / width
    near, box = (whole_pixels(box, picture.shape, margin) for margin in (12, 0))
    around = np.zeros(picture.shape[:2], bool)
    inside(around, near)[:] = True
    inside(around, box)[:] = False
    ground = picture[around].mean(0) if around.any() else np.full(3, 127.0)
    seen = inside(picture, box) - ground

    def alike(skin):
        rgba = cv2.resize(draw(skin), seen.shape[1::-1], interpolation=cv2.INTER_AREA).astype(np.float32)
        full = (rgba[..., :3] - ground) * rgba[..., 3:]        # at full opacity, less the background
        return (seen * full).sum() / max(np.linalg.norm(full), 1)
    return max(siblings, key=alike)


# ---- the locator: where a pad that no template knows has its controls [ours]
TARGETS = (*(b for b in BUTTONS if b not in LEGACY), *STICKS, "pad")      # 20 things that it looks for
WINDOW, CELL = 192, 4             # pixels a side of the windows that it sees and of a cell of its heat maps
MIN_CONTROLS, MIN_PRESENCE = 8, 0.9        # for a find: of 19, and how surely they are there on average
NEARER = ((1.3, 0, 0), (1.7, 0, 0))       # times the pad's size, moved by shares of that: the next windows
LAST_WINDOWS = ((1.25, 0.02, 0), (1.4, -0.03, 0.03), (1.5, 0, 0), (1.65, 0.05, -0.05), (1.5, 0.04, 0.04))


def locate(net, frames, pictures):
    """The pad in sampled frames by load_locator()'s net -> Find with the video's own median picture as its
    template, or None. It looks through windows of four sizes all over the picture, then twice more closely
    where it saw most; the result is the median of the last looks."""
    picture = motion_picture(np.stack(pictures))
    h, w = picture.shape[:2]
    windows = windows_over(w, h)
    for closest, looks in ((4, NEARER), (4, NEARER), (1, LAST_WINDOWS)):
        there, controls = see_windows(net, picture, windows)
        best = np.argsort(-there[:, -1] * there[:, :-1].sum(1))[:closest]
        windows = [(x + (dx - 0.5) * side, y + (dy - 0.5) * side, side) for x, y, *size in controls[best, -1]
                   for zoom, dx, dy in looks for side in [zoom * max(size)]]
    there, controls = (np.median(part, 0) for part in see_windows(net, picture, windows))
    sure = there > 0.5
    if not sure[-1] or sure.sum() - 1 < MIN_CONTROLS or there[sure].mean() < MIN_PRESENCE:
        return None
    skin, corner = located_skin(picture[..., :3], controls, sure, frames[0].shape[1] / w)
    find = Find(skin, np.c_[np.eye(2), corner], int(sure.sum()) - 1)
    edges = np.array([edge_agreement(f, find.skin, find.affine) for f in frames])
    middle = float(np.median(edges))
    return replace(find, edges=middle, there=edges > middle / 2)


def located_skin(picture, controls, sure, scale):
    """What locate() saw in its median picture uint8 (h, w, 3), the video's but for this scale -> Skin at the
    video's size, its corner (x, y) in video pixels. Around the controls a margin is left for the reader."""
    boxes = np.hstack([controls[:, :2] - controls[:, 2:] / 2, controls[:, :2] + controls[:, 2:] / 2])
    bounds = [*boxes[sure, :2].min(0), *boxes[sure, 2:].max(0)]          # what shows a control is part of it
    x0, y0, x1, y1 = whole_pixels(bounds, picture.shape, round(0.06 * controls[-1, 2]))
    size = round((x1 - x0) * scale), round((y1 - y0) * scale)
    rgb = cv2.resize(inside(picture, (x0, y0, x1, y1)), size, interpolation=cv2.INTER_LINEAR)
    part = Part("", (0, 0), [cv2.cvtColor(rgb, cv2.COLOR_RGB2RGBA)])
    seen = {name: i for i, name in enumerate(TARGETS) if sure[i]}
    buttons = {name: boxes[i] for name, i in seen.items() if name in BUTTON}
    sticks = {side: {"center": controls[i, :2], "travel": controls[i, [2, 2]], "radius": controls[i, 3]}
              for side, i in seen.items() if side in STICKS}
    skin = Skin("located", "generic", size, [part], {**buttons, "pad": bounds}, sticks)
    skin = moved(skin, (x0, y0), scale)
    skin.bbox = skin.buttons.pop("pad")
    return skin, np.array([x0, y0]) * scale


def moved(skin, corner, k):
    """The skin with its controls as they are on a canvas that begins at `corner` and is k (or k_x, k_y) times
    as large."""
    k = np.multiply(k, (1, 1))
    there = lambda points: ((np.reshape(points, (-1, 2)) - corner) * k).ravel().tolist()
    boxes = {name: there(box) for name, box in skin.buttons.items()}
    sticks = {side: {"center": there(stick["center"]), "travel": [*(stick["travel"] * k)],
                     "radius": stick["radius"] * k.mean()} for side, stick in skin.sticks.items()}
    return replace(skin, buttons=boxes, sticks=sticks)


def motion_picture(pictures):
    """Sampled frames uint8 (n, h, w, 3) -> uint8 (h, w, 5): their median, and how far they are from it, on
    average and at most: an overlay stands still, its caps move in small discs, its buttons blink."""
    median = median_image(pictures)
    away = np.stack([np.maximum.reduce(cv2.split(cv2.absdiff(picture, median))) for picture in pictures])
    return np.dstack([median, np.uint8(away.mean(0)), away.max(0)])


def windows_over(w, h):
    """Square windows (x, y, side) that overlap by half, in four sizes, all over a picture of (w, h)."""
    def starts(length, side):
        n = math.ceil(2 * length / side) - 1
        return np.linspace(0, length - side, n) if n > 1 else [(length - side) / 2]
    return [(x, y, side) for side in w * np.array([0.2, 0.4, 0.8, 1.2])
            for y in starts(h, side) for x in starts(w, side)]


def see_windows(net, picture, windows):
    """What the net sees in windows (x, y, side) of a motion_picture() -> there (k, 20) in 0..1, places (k,
    20, 4): x, y, width, height in the picture's pixels; of a stick x, y, travel, radius."""
    import torch
    small, seen = {1: picture}, []
    for x, y, side in np.array(windows):
        share = max(1, int(side / WINDOW / 1.4))                         # shrink large ones first
        if share not in small:
            size = picture.shape[1] // share, picture.shape[0] // share
            small[share] = in_halves(picture, cv2.resize, size, interpolation=cv2.INTER_AREA)
        cut = window(small[share], x / share, y / share, side / share)
        with torch.inference_mode():
            there, places = (part[0].numpy() for part in net.decode(torch.from_numpy(cut)[None]))
        places *= side / WINDOW
        places[:, :2] += x, y
        seen.append((there, places))
    return [np.stack(part) for part in zip(*seen)]


def window(picture, x, y, side):
    """A square of a picture uint8 (h, w, 5), beyond its edge as at it -> uint8 (192, 192, 5)."""
    near, k = whole_pixels((x, y, x + side, y + side), picture.shape, 2), WINDOW / side
    x, y = x - near[0], y - near[1]
    to_window = np.array([[k, 0, (0.5 - x) * k - 0.5], [0, k, (0.5 - y) * k - 0.5]])
    return in_halves(inside(picture, near), cv2.warpAffine, to_window, (WINDOW, WINDOW),
                     flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def in_halves(picture, change, *how, **more):
    """What an OpenCV function, which takes 4 channels at most, makes of a picture of 5."""
    halves = picture[..., :3], picture[..., 3:]
    return np.dstack([change(np.ascontiguousarray(half), *how, **more) for half in halves])


def conv(i, o, kernel=3, stride=1, affine=True):
    """A block of both nets: convolution, batch norm, ReLU."""
    from torch import nn
    return nn.Sequential(nn.Conv2d(i, o, kernel, stride, kernel // 2, bias=False),
                         nn.BatchNorm2d(o, affine=affine), nn.ReLU(True))


def locator_net():
    """The locator, 733 k parameters: convolutions down to stride 32 and up again to a heat map of 48 x 48
    cells for each of TARGETS; untrained."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Locator(nn.Module):
        def __init__(self):
            super().__init__()
            n, down = len(TARGETS), functools.partial(conv, stride=2)
            self.down = nn.ModuleList([nn.Sequential(down(5, 16), down(16, 32), conv(32, 32)),
                                       nn.Sequential(down(32, 64), conv(64, 64)),
                                       nn.Sequential(down(64, 96), conv(96, 96)),
                                       nn.Sequential(down(96, 128), conv(128, 128), conv(128, 128))])
            widths = ((32, 48), (64, 64), (96, 64), (128, 64))
            self.side = nn.ModuleList(nn.Conv2d(i, o, 1) for i, o in widths)
            self.up = nn.ModuleList([conv(48, 48), conv(64, 48), conv(64, 64)])
            self.heat, self.size = nn.Conv2d(48, n, 1), nn.Conv2d(48, 2 * n, 1)
            self.absent = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, n))

        def forward(self, windows):
            """uint8 (B, 192, 192, 5) -> log probability (B, 20, 2305) of each place's 2304 cells and "not
            here"; log sizes (B, 20, 2, 48, 48)."""
            x = windows.permute(0, 3, 1, 2).float()
            rgb, away = x[:, :3], x[:, 3:]
            rgb = rgb - rgb.mean((2, 3), keepdim=True)
            contrast = rgb.square().mean((1, 2, 3), keepdim=True).sqrt() + 6
            x, maps = torch.cat([rgb / contrast, (away / 24).clamp(max=3)], 1), []
            for block in self.down:                                      # strides 4, 8, 16, 32
                x = block(x)
                maps.append(x)
            absent = self.absent(x.mean((2, 3)))
            y = self.side[3](x)
            for i in (2, 1, 0):
                y = F.interpolate(y, maps[i].shape[2:], mode="bilinear")
                y = self.up[i](self.side[i](maps[i]) + y)
            heat = torch.cat([self.heat(y).flatten(2), absent[:, :, None]], 2)
            return F.log_softmax(heat, 2), self.size(y).unflatten(1, (-1, 2))

        def decode(self, windows):
            """-> there (B, 20), places (B, 20, 4) in window pixels, by the 3 x 3 cells at each peak."""
            log_p, sizes = self(windows)
            heat = log_p[..., :-1].exp().unflatten(2, sizes.shape[3:])
            peak = heat == heat.amax((2, 3), keepdim=True)
            near = heat * F.max_pool2d(peak.float(), 3, 1, 1)
            near = near / near.sum((2, 3), keepdim=True).clamp(min=1e-9)
            middles = (torch.arange(WINDOW // CELL) + 0.5) * CELL
            xy = torch.stack([near.sum(2) @ middles, near.sum(3) @ middles], 2)
            sizes = (sizes * near[:, :, None]).sum((3, 4)).exp()
            return 1 - log_p[..., -1].exp(), torch.cat([xy, sizes], 2)

    return Locator().to(memory_format=torch.channels_last)


def load_locator(path=WEIGHTS / "locator.safetensors"):
    """The trained locator (default: weights/locator.safetensors beside this script)."""
    return load_net(locator_net(), path, "weights of the locator (parse.py train --locator makes them)")


def load_net(net, path, expected):
    """The net with the weights of a .safetensors or, by their names there, of the official xfeat.pt."""
    import torch
    from safetensors.torch import load_file
    with reading(path, expected):
        ours = Path(path).suffix == ".safetensors"
        state = load_file(path) if ours else torch.load(path, map_location="cpu", weights_only=True)
        net.load_state_dict({name.replace(".layer.", "."): value for name, value in state.items()
                             if not name.startswith("fine_matcher.")})
    return net.eval()


def pose_box(affine, size):
    """[x0, y0, x1, y1] in video pixels of a template's canvas of `size` under an upright `affine`."""
    return [*affine[:, 2], *(affine @ (*size, 1))]


def whole_pixels(box, shape, margin):
    """The pixels x0, y0, x1, y1 of a picture of shape (h, w, ..) that a box and a margin around it touch; of
    a box beyond its edge those of the edge."""
    low, high = np.reshape(box, (2, 2)).astype(int)
    size = np.array(shape[1::-1])
    low = (low - margin).clip(0, size - 1)
    high = (high + 1 + margin).clip(low + 1, size)
    return [*low.tolist(), *high.tolist()]


def inside(picture, box):
    """The part of a picture (h, w, ..) in a box of whole pixels, not a copy."""
    x0, y0, x1, y1 = box
    return picture[y0:y1, x0:x1]


def area(box):
    """Of a box [x0, y0, x1, y1]; 0 where it is none."""
    return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)


def overlap(a, b):
    """Intersection over union of two boxes [x0, y0, x1, y1]."""
    common = area([*np.maximum(a[:2], b[:2]), *np.minimum(a[2:], b[2:])])
    return common / (area(a) + area(b) - common)


# ---- cutting the clip
def cut_clip(video, folder, find, places, args, key):
    """Write the clip folder of a found overlay, the first of so many places -> clip.json's dict. find None:
    the frames alone, for sample.py label."""
    film, truth = Decoder(video), video.with_suffix(".truth.npy")
    clip = film.clip(args.game or video.parent.name, args.every, key) | {"places": places}
    if find is None:
        clip["plain"], cutter, pictures = True, Cutter(film.size, args.every), {}
    else:
        skin, (x0, y0, x1, y1) = find.skin, visible_box(find.skin)
        affine = np.c_[find.affine[:, :2], find.affine @ (-0.5, -0.5, 1) + 0.5]      # between pixels' corners
        (ax, ay), (bx, by) = affine @ (x0, y0, 1), affine @ (x1, y1, 1)
        cutter = Cutter(film.size, args.every, [ax - 1, ay - 1, bx + 1, by + 1], skin, find.affine)
        clip |= {"box": rounded([ax, ay, bx - ax, by - ay], 2), "template": skin.name,
                 "controller": skin.family, "affine": rounded(affine, 6), "inliers": find.inliers,
                 "edges": round(find.edges, 3), "matcher": find.by, "hole": cutter.hole, "pad": cutter.pad}
        clip["geometry"] = {"size": skin.size, **rounded({"buttons": skin.buttons, "sticks": skin.sticks}, 2)}
        pictures = {"template": draw(skin)}
        if any(part.control for part in skin.parts):
            pictures["pressed"] = draw_pressed(skin)
    with new_folder(folder) as tmp:
        clip["n"] = cutter.run(film, tmp)
        if truth.exists():
            write_npy(tmp / "truth.npy", read_npy(truth, np.float32, (clip["n"], A)))
        for name, picture in pictures.items():
            how = cv2.INTER_AREA if picture.shape[1] > PAD_WIDTH else cv2.INTER_LINEAR
            save_png(tmp / f"{name}.png", cv2.resize(picture, cutter.pad, interpolation=how))
        write_json(tmp / "clip.json", clip)
    return clip


class Cutter:
    """What becomes of a frame of size (w, h): the policy's picture, and the overlay in its template's frame.
    Frames stay BGR from the decoder to the JPEG."""

    def __init__(self, size, every, box=(0, 0, 0, 0), skin=None, affine=None, window=None):
        """every: each Kth row gets a policy frame. box [x0, y0, x1, y1]: hidden from the policy; window,
        alike: the part of the frame that is the game. affine: template -> video pixels of the skin that is
        cut out, None: no crops."""
        self.every, self.game_area, self.pad = every, window or [0, 0, *size], None
        low, high = np.reshape(self.game_area, (2, 2))
        low, high = (np.reshape(box, (2, 2)) - low) / (high - low) * SIDE
        self.hole = np.clip([*np.floor(low), *np.ceil(high)], 0, SIDE).astype(int).tolist()
        if skin:
            self.pad = [PAD_WIDTH, max(round(skin.size[1] * PAD_WIDTH / skin.size[0]), 1)]
            k = np.divide(skin.size, self.pad)
            to_video = affine @ np.block([[np.diag(k), (k[:, None] - 1) / 2], [0, 0, 1]])    # from the crop
            self.shrunk = max(1, int(to_video[0, 0] / 1.5))          # shrink large ones first
            to_video[:, 2] = (to_video[:, 2] + 0.5) / self.shrunk - 0.5
            self.to_video = to_video / [self.shrunk, self.shrunk, 1]

    def policy(self, frame):
        """uint8 (256, 256, 3): what a model sees, the overlay's box black [P]."""
        small = np.array(shrink(inside(frame, self.game_area)))          # a copy: crop() needs the overlay
        inside(small, self.hole)[:] = 0
        return small

    def crop(self, frame):
        """uint8 (h, 320, 3): the overlay in its template's frame."""
        if self.shrunk > 1:
            share = 1 / self.shrunk
            frame = cv2.resize(frame, None, fx=share, fy=share, interpolation=cv2.INTER_AREA)
        return cv2.warpAffine(frame, self.to_video, self.pad, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
                              borderMode=cv2.BORDER_REPLICATE)

    def run(self, film, folder, first=0, end=math.inf):
        """Write frames (and pads) of rows [first, end) of a Decoder, and cuts.npy where its clock breaks,
        into `folder` -> how many rows."""
        frames, pads = FramesWriter(folder, "frames"), FramesWriter(folder, "pads") if self.pad else None
        waiting, n, cuts = deque(), 0, []

        def encode(rows, bgr):
            """In a thread: a decoded frame that fills rows -> a list of (writer, the rows it keeps, JPEG)."""
            kept = [row for row in rows if row % self.every == 0]
            jpegs = [(frames, kept, frames.encode(self.policy(bgr)))] if kept else []
            return jpegs + ([(pads, rows, pads.encode(self.crop(bgr)))] if pads else [])

        def write(most):
            while len(waiting) > most:
                for writer, rows, jpeg in waiting.popleft().result():
                    for row in rows:
                        writer.add_bytes(row, jpeg)

        with ThreadPoolExecutor(2) as pool:
            decoded, total = film.rows(first, end), min(film.n, end) - first
            for row, bgr, count, cut in tqdm(decoded, film.name, total, unit=" frames", position=1, **BAR):
                cuts += [row - first] if cut else []
                n = row + count - first
                waiting.append(pool.submit(encode, range(row - first, n), bgr))
                write(AHEAD)
            write(0)
        for writer in filter(None, (frames, pads)):
            writer.close(n)
        if cuts:
            write_npy(folder / "cuts.npy", np.isin(np.arange(n), cuts))
        return n


def rounded(value, digits):
    """Lists and dicts of numbers, all rounded."""
    if isinstance(value, dict):
        return {k: rounded(v, digits) for k, v in value.items()}
    return round(float(value), digits) if np.ndim(value) == 0 else [rounded(v, digits) for v in value]


def visible_box(skin):
    """[x0, y0, x1, y1] of what a skin shows at rest, in template pixels."""
    return skin.bbox or corners_of(draw(skin)[..., 3] > 20)


def corners_of(mask):
    """The box [x0, y0, x1, y1] around what is true in a mask bool (h, w)."""
    x, y, w, h = cv2.boundingRect(np.uint8(mask))
    return [x, y, x + w, y + h]


def dense(actions, confidence=None):
    """The quality filter [P 3.1]: may frame t start a training chunk? bool (n,): the frame is read surely,
    the chunk t .. t + HORIZON - 1 is whole, and in at least half of its steps something is pressed or a stick
    is out of its dead zone; an unsure step counts as none. actions float (n, 25), confidence float (n,) in
    0..1."""
    sure = np.ones(len(actions), bool) if confidence is None else confidence >= SURE
    tilt = np.hypot(actions[:, 21:25:2], actions[:, 22:25:2])            # (n, 2): of both sticks
    acts = (actions[:, :21] > 0.5).any(1) | (tilt > DEAD_ZONE).any(1)
    acting = np.convolve(np.pad(acts & sure, (0, HORIZON)), np.ones(HORIZON), "valid")[:-1]     # of a chunk
    whole = np.arange(len(actions)) <= len(actions) - HORIZON
    return sure & whole & (2 * acting >= HORIZON)


# ---- the released labels (CC BY-NC 4.0)
def label_jobs(videos, labels):
    """Every chunk under NVIDIA's SHARD/<video_id>/<video_id>_chunk_NNNN/ whose video is among `videos` ->
    list of (video, the chunk's folder)."""
    files, jobs = sorted(Path(labels).rglob("metadata.json")), []
    for path in files:
        with reading(path, "original_video.video_id"):
            wanted = read_json(path, dict)["original_video"]["video_id"]
            jobs += [(video, path.parent) for video, name in videos if wanted and wanted in name][:1]
    if not jobs:
        raise UserError(f"{labels}: expected SHARD/<video_id>/<video_id>_chunk_NNNN/metadata.json of these "
                        f"videos, found {len(files)} metadata.json, none of them: unpack the SHARD_*.tar.gz "
                        "there and name the videos <video_id>.mp4")
    return jobs


def list_labels(labels):
    """Print a line a video, by game: its id, where it is, how much of it is labelled, and acts."""
    videos = {}
    for path in sorted(Path(labels).rglob("metadata.json")):
        with reading(path, "original_video with video_id, url, start_time and end_time"):
            meta = read_json(path, dict)
            source = meta["original_video"]
            about = tuple(map(str, (meta.get("game"), source["video_id"], source.get("url"))))
            hours = (source["end_time"] - source["start_time"]) / 3600
            videos.setdefault(about, []).append((hours, dense(label_actions(path.parent)).mean()))
    if not videos:
        raise UserError(f"{labels}: found no metadata.json of the released labels: unpack the SHARD_*.tar.gz")
    for about, chunks in sorted(videos.items()):
        hours, kept = np.array(chunks).T
        print(*about, f"{len(chunks)} chunks, {hours.sum():.2f} h, {kept.mean():.0%} kept", sep=" | ")
    print(f"{len(videos)} videos: name those that you fetch <video_id>.mp4, and give them")


def label_one(video, folder, args):
    """One released chunk -> as extract_one()."""
    meta, target, file = read_json(folder / "metadata.json", dict), Path(args.out) / folder.name, video.stat()
    key = fingerprint(args.every, file.st_size, file.st_mtime_ns, meta)
    with clip_lock(target):
        if made_by(key, target):
            return None
        check_replaceable(target)
        clip = cut_labelled(folder, meta, video, target, args.every, key)
    return {"status": "found", "template": clip["template"], "box": clip["box"]}


def cut_labelled(folder, meta, video, out, every, key):
    """One released chunk + its video -> a clip folder with actions, at the video's own rate -> clip.json's
    dict."""
    actions, film = label_actions(folder), labelled_video(video)
    size = np.array(film.size)
    with reading(folder / "metadata.json", "original_video, chunk_size and bbox_controller_overlay"):
        source, chunk = meta["original_video"], int(meta["chunk_size"])
        times = np.array([float(source[when]) for when in ("start_time", "end_time")])
        limit = np.reshape(source["resolution"], 2)[::-1]                                # (w, h)
        low, span = np.reshape(meta["bbox_controller_overlay"], (2, 2))
        view = meta.get("bbox_game_area") or {"xtl": 0, "ytl": 0, "xbr": 1, "ybr": 1}    # shares of the frame
        edges = np.array([[view["xtl"], view["ytl"]], [view["xbr"], view["ybr"]]])
        window = np.clip(np.round(edges * size), 0, size)
        seen = (1 <= span) & (span <= limit) & (abs(low + span / 2 - limit / 2) <= limit / 2)
        if not seen.all() or not (window[0] < window[1]).all():                             # NaN is not
            raise ValueError(f"boxes {[*low, *span]} and {[*window.ravel()]} in a picture of {limit}")
        if len(actions) != chunk or not times[0] < times[1]:
            raise ValueError(f"{len(actions)} rows of actions over {times} s")
        first, end = (round(when * film.fps) for when in times.tolist())
    scale = size / limit
    box = [*low * scale, *(low + span) * scale]
    cutter = Cutter(film.size, every, box, window=window.astype(int).ravel().tolist())
    if film.row > first:                           # decoded further than that: from its beginning again
        labelled_video.cache_clear()
        film = labelled_video(video)
    with new_folder(out) as tmp:
        n = cutter.run(film, tmp, first, end)
        if n < 0.5 * (end - first):
            raise UserError(f"{video}: expected frames {first}-{end} of chunk {folder.name}, found {n}: "
                            "download the whole video")
        seconds = (np.arange(n) + 0.5) / film.fps                # frames and label rows may differ in rate
        actions = actions[np.minimum(seconds * chunk / np.ptp(times), chunk - 1).astype(int)]
        write_npy(tmp / "actions.npy", actions)
        write_npy(tmp / "confidence.npy", np.ones(n, np.float32))
        write_npy(tmp / "keep.npy", dense(actions))
        clip = film.clip(meta.get("game") or "other", every, key) | {
            "n": n, "box": [*box[:2], *span * scale], "affine": rounded(np.c_[np.diag(scale), box[:2]], 6),
            "template": "released labels", "controller": meta.get("controller_type", "generic"), "inliers": 0,
            "matcher": "labels", "hole": cutter.hole}
        write_json(tmp / "clip.json", clip)
    return clip


@functools.lru_cache(1)
def labelled_video(video):
    """The Decoder that the chunks of one video share, which come in its order: it is decoded once. Labels
    count a pause's seconds too."""
    return Decoder(video, math.inf)


def label_actions(folder):
    """One chunk's parquet -> float32 (rows, 25); the filtered and remapped table where it exists, else the
    raw one."""
    path = folder / "actions_processed.parquet"
    path = path if path.exists() else folder / "actions_raw.parquet"
    with reading(path, "17 button columns, j_left and j_right (by the package pyarrow)"):
        import pyarrow.parquet
        table = pyarrow.parquet.read_table(path).to_pydict()
        actions = np.zeros((len(table["j_left"]), A), np.float32)
        for name in (b for b in BUTTONS if b not in LEGACY):
            actions[:, BUTTON[name]] = table[name.lower()]
        for side in STICKS:
            actions[:, STICKS[side]] = table["j_" + side]
    check_actions(path, actions, len(actions))
    return actions


# ---- features: XFeat (arXiv 2404.19174) by hand, and SIFT
def xfeat(net, image, top_k):
    """Features of a grey image uint8 (h, w) -> keypoints float32 (k, 2) x, y in its pixels, descriptors (k,
    64) of length 1; the best k <= top_k first, by keypoint probability x reliability (Sec. 3.2)."""
    import torch
    import torch.nn.functional as F
    x = torch.from_numpy(image).float()[None, None] / 255
    h, w = (max(n // 32, 1) * 32 for n in image.shape)
    with torch.inference_mode():
        x = F.interpolate(x, (h, w), mode="bilinear")
        descriptors, logits, reliability = net(x)
        heat = keypoint_scores(logits)
        points = torch.from_numpy(peaks(heat[0, 0].numpy()))
        scores = sampled(heat, points, (h, w), "nearest") * sampled(reliability, points, (h, w), "bilinear")
        scores = scores[:, 0]
        order = scores.argsort(descending=True, stable=True)[:top_k]
        order = order[scores[order] > 0]
        found = F.normalize(sampled(descriptors, points[order], (h, w), "bicubic"), dim=1)
    scale = np.float32([image.shape[1] / w, image.shape[0] / h])
    return points[order].float().numpy() * scale, found.numpy()


def keypoint_scores(logits):
    """Keypoint logits (B, 65, h, w) -> probability of a keypoint at each pixel (B, 1, 8h, 8w): softmax over
    the cell's 64 pixels and "none", which is dropped."""
    import torch.nn.functional as F
    return F.pixel_shuffle(logits.softmax(1)[:, :64], 8)


def peaks(scores):
    """Local maxima of scores, float32 (H, W), in 5 x 5 windows, above 0.05, the release's threshold: int64
    (k, 2) x, y."""
    best = (scores == cv2.dilate(scores, np.ones((5, 5), np.uint8))) & (scores > 0.05)
    return np.argwhere(best)[:, ::-1].copy()


def sampled(maps, points, size, mode):
    """maps (1, C, h, w) at points (k, 2) in pixels of an image of size (H, W) -> (k, C). Normalised by W - 1
    but without align_corners, as in the release."""
    import torch
    import torch.nn.functional as F
    h, w = size
    grid = 2 * points.float() / torch.tensor([w - 1, h - 1], dtype=torch.float32) - 1
    return F.grid_sample(maps, grid[None, None], mode=mode, align_corners=False)[0, :, 0].T


def xfeat_net():
    """The network of XFeat (Sec. 3.1-3.2), 658 k parameters, with the official names, but for ".layer";
    untrained."""
    import torch
    import torch.nn.functional as F
    from torch import nn
    basic = functools.partial(conv, affine=False)

    class XFeat(nn.Module):
        def __init__(self):
            super().__init__()
            self.skip1 = nn.Sequential(nn.AvgPool2d(4, 4), nn.Conv2d(1, 24, 1))
            self.block1 = nn.Sequential(basic(1, 4), basic(4, 8, stride=2),
                                        basic(8, 8), basic(8, 24, stride=2))
            self.block2 = nn.Sequential(basic(24, 24), basic(24, 24))
            self.block3 = nn.Sequential(basic(24, 64, stride=2), basic(64, 64), basic(64, 64, 1))
            self.block4 = nn.Sequential(basic(64, 64, stride=2), basic(64, 64), basic(64, 64))
            self.block5 = nn.Sequential(basic(64, 128, stride=2), basic(128, 128),
                                        basic(128, 128), basic(128, 64, 1))
            self.block_fusion = nn.Sequential(basic(64, 64), basic(64, 64), nn.Conv2d(64, 64, 1))
            self.heatmap_head = nn.Sequential(basic(64, 64, 1), basic(64, 64, 1),
                                              nn.Conv2d(64, 1, 1), nn.Sigmoid())
            self.keypoint_head = nn.Sequential(*(basic(64, 64, 1) for _ in range(3)), nn.Conv2d(64, 65, 1))

        def forward(self, x):
            """Grey image (B, 1, H, W) of any range, H and W multiples of 32 -> unit descriptors (B, 64, H/8,
            W/8), keypoint logits (B, 65, H/8, W/8: the 64 pixels of each cell and "none"), reliability (B, 1,
            H/8, W/8)."""
            x = F.instance_norm(x)
            x2 = self.block2(self.block1(x) + self.skip1(x))             # (B, 24, H/4, W/4)
            x3 = self.block3(x2)                                         # (B, 64, H/8, W/8)
            x4 = self.block4(x3)                                         # (B, 64, H/16, W/16)
            x5 = self.block5(x4)                                         # (B, 64, H/32, W/32)
            wide = [F.interpolate(deep, x3.shape[2:], mode="bilinear") for deep in (x4, x5)]
            features = self.block_fusion(x3 + wide[0] + wide[1])
            cells = F.pixel_unshuffle(x, 8)                              # (B, 64, H/8, W/8)
            return F.normalize(features, dim=1), self.keypoint_head(cells), self.heatmap_head(features)

    return XFeat().to(memory_format=torch.channels_last)


def load_xfeat(path=WEIGHTS / "xfeat.safetensors"):
    """A trained network: ours (weights/xfeat.safetensors beside this script) or the official xfeat.pt."""
    return load_net(xfeat_net(), path, "XFeat weights (ours, or the official xfeat.pt)")


def root_sift(gray, limit):
    """RootSIFT of a grey uint8 picture: points float32 (k, 2), descriptors float32 (k, 128) of length 1,
    strongest first."""
    points, descriptors = cv2.SIFT_create(limit, contrastThreshold=0.02).detectAndCompute(gray, None)
    if not points:
        return np.zeros((0, 2), np.float32), np.zeros((0, 128), np.float32)
    order = np.argsort([-p.response for p in points], kind="stable")[:limit]
    descriptors = np.sqrt(descriptors / np.maximum(descriptors.sum(1, keepdims=True), 1e-9))
    return np.float32([points[i].pt for i in order]), descriptors[order].astype(np.float32)


# ------------------------------------------------------------------------------------------------ machinery
# ---- the clip folder
QUALITY = 90                         # JPEG: 1-2 GB an hour of frames
MOST_PIXELS = 1 << 26                              # of one picture: 8192 x 8192
CLIP_FILES = set("clip.json template.png pressed.png frames.npy frames_index.npy pads.npy pads_index.npy "
                 "actions.npy confidence.npy keep.npy truth.npy human.npy cuts.npy .lock .DS_Store "
                 "Thumbs.db".split())
REDO = "delete the clip folder and run its stage again"


class FramesWriter:
    """JPEGs back to back in NAME.npy, uint8 (bytes,), with NAME_index.npy, int64 (m+1, 2): [row number, byte
    offset], last [n, total]."""

    def __init__(self, folder, name):
        self.path, self.index, self.total = Path(folder) / f"{name}.npy", [], 0
        self.tmp = temporary(self.path)
        self.file = open(self.tmp, "wb")
        self._header()

    def _header(self):
        header = {"descr": "|u1", "fortran_order": False, "shape": (self.total,)}
        np.lib.format.write_array_header_1_0(self.file, header)

    def encode(self, bgr):
        """uint8 (h, w, 3) BGR -> JPEG bytes, uint8 (k,)."""
        return cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].ravel()

    def add(self, number, rgb):
        """Append one uint8 (h, w, 3) RGB frame as row `number`."""
        self.add_bytes(number, self.encode(cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR)))

    def add_bytes(self, number, jpeg):
        """Append one encoded frame as row `number`."""
        self.index.append((number, self.total))
        self.file.write(jpeg)
        self.total += len(jpeg)

    def close(self, n):
        """Finish both files for a clip of n rows and give them their names."""
        self.file.seek(0)
        self._header()                     # numpy pads headers: a longer shape fits
        self.file.close()
        sync(self.tmp)
        os.replace(self.tmp, self.path)
        index = np.array([*self.index, (n, self.total)], np.int64)
        write_npy(self.path.with_name(f"{self.path.stem}_index.npy"), index)


class Frames:
    """Random access to the JPEGs of a clip: len(frames), frames[i] -> uint8 (h, w, 3) RGB, frames.numbers ->
    int64 (m,) rows of the clip."""

    def __init__(self, folder, name="frames"):
        self.path = Path(folder) / f"{name}.npy"
        self.data = read_npy(self.path, np.uint8, (None,))
        index = np.array(read_npy(self.path.with_name(f"{name}_index.npy"), np.int64, (None, 2)))
        rises = len(index) and (index[0] >= 0).all() and (np.diff(index, axis=0) >= 0).all()
        if not rises or index[-1, 1] != len(self.data) or (index[:-1, 0] >= index[-1, 0]).any():
            raise UserError(f"{self.path}: expected an index that rises and fits its {len(self.data)} bytes, "
                            f"found another: {REDO}")
        self.numbers, self.offsets, self.n, self.shape = index[:-1, 0], index[:, 1], int(index[-1, 0]), None

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        bgr = decode_picture(np.asarray(self.data[self.offsets[i]:self.offsets[i + 1]]))
        self.shape = self.shape or np.shape(bgr)
        if bgr is None or bgr.shape != self.shape:
            raise UserError(f"{self.path}: expected JPEGs of one size, found frame {i} broken or of another "
                            f"size: {REDO}")
        return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)


def write_npy(path, array):
    """np.save, atomically. Through memory: numpy's own writing is silent on a full disk."""
    file = io.BytesIO()
    np.save(file, array)
    write_atomic(path, lambda tmp: tmp.write_bytes(file.getbuffer()))


def read_npy(path, dtype, shape):
    """A memory-mapped .npy of this dtype and shape (None: any length); UserError names the file."""
    lengths = str(shape).replace("None", "any")
    with reading(path, f"a whole .npy file, {np.dtype(dtype)} {lengths} ({REDO})"):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        fits = all(want in (None, n) for want, n in zip(shape, array.shape))
        if array.dtype != dtype or array.ndim != len(shape) or not fits:
            raise ValueError(f"{array.dtype} {array.shape}")
    return array


def check_actions(path, actions, n):
    """UserError where the array of `path` does not hold n actions: float (n, 25), buttons in 0..1, sticks in
    -1..1."""
    if actions.shape != (n, A):
        raise UserError(f"{path}: expected {n} x {A}, one row a video frame, found {actions.shape}: {REDO}")
    good = ((actions >= [0] * 21 + [-1.001] * 4) & (actions <= 1.001)).all(1)               # NaN is not
    if not good.all():
        raise UserError(f"{path}: expected buttons in 0..1 and sticks in -1..1, found NaN or others in row "
                        f"{good.argmin()}: {REDO}")


def read_clip(folder):
    """clip.json of a clip folder as a dict; "fps" is a number in it."""
    clip = read_json(Path(folder) / "clip.json", dict)
    fps = clip.get("fps")
    if type(fps) not in (int, float) or not 1 <= fps <= 1000:
        raise UserError(f"{folder}: expected 1 to 1000 frames a second as \"fps\" in clip.json, found "
                        f"{str(fps)[:20]}: mend it or delete the clip")
    return clip


def clips_in(data):
    """The whole clip folders under DATA, sorted by name, or DATA itself where it is one; UserError when there
    is none."""
    data = Path(data)
    folders = sorted(p.parent for p in data.glob("*/clip.json") if not p.parent.name.startswith(".tmp-"))
    if (data / "clip.json").is_file():
        folders = [data]
    if not folders:
        raise UserError(f"{data}: expected a folder of clips (each with clip.json), found none: make them "
                        "with extract.py or play.py --record")
    return list(map(unicode, folders))


def made_by(key, folder):
    """Whether a clip of the same video and settings is at `folder`. A clip has its name only once it is
    whole."""
    with suppress(UserError):
        return read_clip(folder).get("run") == key


def check_replaceable(folder):
    """UserError where anything stands at `folder` but a clip that extract.py cut, with clips' files only;
    Busy where parse.py is at it."""
    if not os.path.lexists(folder):
        return
    with reading(folder, "nothing there or a clip of extract.py's (move it away or give another --out)"):
        foreign = [e.name for e in os.scandir(folder) if e.is_dir(follow_symlinks=False)
                   or not (e.name in CLIP_FILES or e.name.startswith(".tmp-"))]
        if folder.is_symlink() or foreign:
            raise ValueError("a link" if folder.is_symlink() else f"{min(foreign)!r} in it")
        if "run" not in read_json(folder / "clip.json", dict):
            raise ValueError("a clip of another script")
    with lock(folder / ".lock"):
        pass


def discard(folder):
    """Remove a clip that is no longer true, whole or not at all; UserError where it is none of ours."""
    check_replaceable(folder)
    if os.path.lexists(folder):
        old = temporary(folder.with_name(folder.name + " before"))
        os.replace(folder, old)
        remove(old)


@contextmanager
def new_folder(folder):
    """A folder to write a clip into, under a temporary name; when the block ends well, it is `folder`."""
    tmp = temporary(folder)
    remove(tmp)                                    # of an earlier process of our number
    tmp.mkdir(parents=True)
    try:
        yield tmp
        discard(folder)
        os.replace(tmp, folder)
    finally:
        remove(tmp)


def clip_lock(folder):
    """lock() for the clip of this folder: DATA/.lock-HASH, whatever the length of its name."""
    return lock(folder.with_name(f".lock-{fingerprint(folder.name.casefold())}"))


def shard(items):
    """This process's share of a list of work, under torchrun (RANK, WORLD_SIZE) or srun (SLURM_PROCID,
    SLURM_NTASKS), in each task of a Slurm array; all of it alone."""
    env, rank, world = os.environ, 0, 1
    for name, count in (("SLURM_PROCID", "SLURM_NTASKS"), ("RANK", "WORLD_SIZE")):
        if name in env and count in env:
            rank, world = int(env[name]), int(env[count])
    words = "ID MIN MAX STEP COUNT".split()
    task, low, high, step, tasks = (int(env.get(f"SLURM_ARRAY_TASK_{word}", 1)) for word in words)
    if low + (tasks - 1) * step != high:
        raise UserError(f"SLURM_ARRAY_TASK_*: expected one range, found {tasks} tasks in {low}-{high}: give "
                        "--array=0-99 or the like")
    return list(items)[(task - low) // step * world + rank::world * tasks]


def cores():
    """The cores this process may use: a cluster's job is often given fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- video and pictures in and out
PROBED = 300                                       # frames that tell a video's rate
VIDEO_ENDINGS = ".mp4 .mkv .webm .avi .mov .m4v .flv .ts .mpg .mpeg .wmv .ogv .gif".split()


def open_video(path):
    """cv2.VideoCapture of a file with at least one picture stream; UserError otherwise."""
    capture = cv2.VideoCapture(str(unicode(path)), cv2.CAP_FFMPEG)
    if not capture.isOpened() or capture.get(cv2.CAP_PROP_FRAME_WIDTH) < 1:
        found = "no picture stream in it (sound only, cut off)" if Path(path).is_file() else "no file"
        raise UserError(f"{path}: expected a video, found {found}: check the path or download it again")
    return capture


def video_info(path):
    """{"fps": the rate at which a video's first frames are shown, "size": (w, h), "n": its frames as the
    container says, which may be wrong or 0}."""
    capture = open_video(path)
    fps, n = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
    size = int(capture.get(cv2.CAP_PROP_FRAME_WIDTH)), int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
    fps = usual_rate(list(islice(presented(capture), PROBED)), fps if 1 <= fps <= 1000 else 30.0)
    return {"fps": fps, "size": size, "n": int(n) if 0 < n < 1e9 else 0}


def usual_rate(times, fps):
    """Frames a second by the commonest interval between presentation times in milliseconds, which containers
    round; `fps`, the container's mean, where that says the same or no interval is common."""
    gaps = np.diff(times)
    gaps = gaps[(gaps >= 1) & (gaps <= 1000)]
    near = max((gaps[abs(gaps - gap) <= 1] for gap in gaps), key=len, default=gaps)
    if len(near) < 30 or abs(fps * near.mean() / 1000 - 1) < 0.002 + 1 / near.sum():
        return fps
    return round(1000 / float(near.mean()), 3)


def read_video(path):
    """Yields (row number, uint8 (h, w, 3) RGB) at the constant rate video_info(path)["fps"]."""
    for row, bgr, count, _ in Decoder(path).rows():
        rgb = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
        for k in range(count):
            yield row + k, rgb


class Decoder:
    """A video that is decoded once, in order: name, fps, size (w, h) and n as video_info() says; row: the
    next frame's."""

    def __init__(self, path, pause=PAUSE):
        """pause: slots()'s."""
        self.fps, self.size, self.n = video_info(path).values()
        self.name, self.row = Path(path).name, 0
        self.capture = open_video(path)
        self.slots = slots(presented(self.capture), self.fps, pause)

    def clip(self, game, every, key):
        """What clip.json says of it and of how it is cut."""
        return {"video": self.name, "game": game, "fps": self.fps, "size": self.size, "every": every,
                "lag": 0, "run": key}

    def rows(self, first=0, end=math.inf):
        """Yields (row number, uint8 (h, w, 3) BGR, number of rows it fills, whether the clock breaks before
        it) of rows [first, end); goes on where the last call ended."""
        for count, cut in self.slots:
            row, self.row = self.row, self.row + count
            if count and row >= first:
                ok, bgr = self.capture.retrieve()
                if not ok:
                    return
                yield row, bgr, min(self.row, end) - row, cut
            if self.row >= end:
                return


def presented(capture):
    """Grab the frames of an open capture one by one -> each one's presentation time in milliseconds;
    capture.retrieve() then has its picture."""
    while capture.grab():
        yield capture.get(cv2.CAP_PROP_POS_MSEC)


def slots(times, fps, pause=PAUSE):
    """Constant rate from presentation times in milliseconds: yields, for each of them, (how many rows of the
    clip its frame fills, whether the clock breaks before it).

    1 for every frame of a constant-rate video; 0 drops a frame, 2 or more repeat it, so that row i is what
    was seen at i / fps. Where the clock runs back or leaps by `pause` (joined segments, a recording that was
    paused), it breaks: one frame, one row, and time counts from there.
    """
    start, last, begin, filled = None, None, 0, 0
    for now in times:
        cut = last is not None and not -BACK <= now - last < pause
        if cut or last is None or now == start:    # a clock that has not begun to run gives each frame a row
            start, begin = now, filled
        count = max(begin + int(np.floor((now - start) * fps / 1000 + 0.5)) + 1 - filled, 0)
        filled, last = filled + count, now
        yield count, cut


@contextmanager
def video_writer(path, fps, size):
    """Write RGB frames of `size` (w, h) to .mp4 (mp4v), .webm (VP9, which browsers play) or .avi (MJPEG):
    yields add(uint8 (h, w, 3)). When the block ends well, the file gets its name; UserError where not all
    frames are in it: OpenCV's writer is silent on a full disk."""
    codec = {".mp4": "mp4v", ".webm": "VP90", ".avi": "MJPG"}.get(Path(path).suffix.lower())
    if codec is None:
        raise UserError(f"{path}: expected a name ending in .mp4, .webm or .avi: give another --out")
    writable(path)
    n = 0

    def add(rgb):
        nonlocal n
        writer.write(cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))
        n += 1
    with finished(path) as tmp:
        writer = cv2.VideoWriter(str(tmp), cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*codec), fps, size)
        if not writer.isOpened():
            raise UserError(f"{path}: can't open a {codec} encoder for {size} at {fps} frames/s: "
                            "try a name ending in .avi")
        try:
            yield add
        finally:
            writer.release()
        found = sum(1 for _ in presented(cv2.VideoCapture(str(tmp), cv2.CAP_FFMPEG)))
        if found != n:
            raise UserError(f"{path}: expected {n} frames in the finished video, found {found}: "
                            "make room on its disk")


def shrink(rgb):
    """uint8 (h, w, 3) -> uint8 (256, 256, 3): a plain stretch with area interpolation, as the release does,
    in training and in play. A picture of that size is returned itself, not a copy."""
    if rgb.shape[:2] == (SIDE, SIDE):
        return rgb
    return cv2.resize(rgb, (SIDE, SIDE), interpolation=cv2.INTER_AREA)


def decode_picture(data):
    """The bytes uint8 (k,) of a PNG or JPEG -> uint8 (h, w, 3) BGR; None for anything else."""
    with suppress(Exception), open_picture(io.BytesIO(data)):
        return cv2.imdecode(data, cv2.IMREAD_COLOR)


def read_rgba(path):
    """A PNG or JPEG file as uint8 (h, w, 4) RGBA, straight alpha. UserError when it is no picture."""
    expected = f"a PNG or JPEG picture of at most {MOST_PIXELS} pixels"
    with reading(path, expected), open_picture(path) as picture:
        return np.array(picture.convert("RGBA"))


def open_picture(file):
    """A PNG or JPEG, of which no more than the header is read; ValueError where that asks for more than
    MOST_PIXELS: a few bytes could take all memory."""
    picture = Image.open(file, formats=("PNG", "JPEG"))
    if picture.width * picture.height > MOST_PIXELS:
        raise ValueError(f"one of {picture.size}")
    return picture


def save_png(path, rgba):
    """Write a uint8 RGB(A) picture as PNG, atomically."""
    write_atomic(path, lambda tmp: Image.fromarray(rgba).save(tmp, "PNG"))


# ---- messages
# sample.py serve and play.py's Client exchange frames of multiprocessing.connection, as bytes (send_bytes,
# recv_bytes), never as pickles. One message = a JSON object, a newline, and a .npy of uint8 or float32, if
# any.
# {"do": "info"} -> {...}      {"do": "reset", "seed": 0, "game": "celeste"} -> {}      (seed and game may be
# left out)
#   {"do": "predict"} + pixels (h, w, 3) -> {} + actions (T, 25)
# A request that can't be served is answered by {"error": "why"}.
MESSAGE_LIMIT = 32 << 20                           # bytes: a 4K frame is 25 MB


def pack_message(header, array=None):
    """A JSON object and, if given, a uint8 or float32 array -> bytes."""
    body = io.BytesIO()
    if array is not None:
        np.save(body, array, allow_pickle=False)
    return json.dumps(header).encode() + b"\n" + body.getvalue()


def unpack_message(message):
    """bytes -> (header, array or None). UserError says what is wrong with bytes that nobody vouches for."""
    with reading("message", "a JSON object and a newline in 4096 bytes, then a .npy of uint8 or float32"):
        head, newline, _ = message[:4096].partition(b"\n")
        header, body = json.loads(head), io.BytesIO(message[len(head) + 1:])
        array = np.load(body, allow_pickle=False) if body.getbuffer().nbytes else None
        fits = array is None or array.dtype in (np.uint8, np.float32) and array.size and not body.read(1)
        if not newline or not isinstance(header, dict) or not fits:
            raise ValueError("others")
    return header, array


# ---- skins: what can be drawn
# A skin is a list of parts, each with small premultiplied RGBA pictures ("sprites") of its states. OBS
# presets, our own pads among them, and plain PNG templates become this one form, so there is one draw() for
# templates, parser training and pictures of predictions.
PRESETS = json.loads((WEIGHTS / "presets.json").read_text(encoding="utf-8"))       # codes, families' names
ARROWS = {"DPAD_UP": (0, -1), "DPAD_DOWN": (0, 1), "DPAD_LEFT": (-1, 0), "DPAD_RIGHT": (1, 0)}


@dataclass
class Part:
    """One thing drawn: control "" (always there), a button's name, "left" / "right" (stick) or "DPAD" (a
    sprite a state)."""
    control: str
    at: tuple                                      # top-left corner of the sprites on the canvas, pixels
    sprites: list                          # uint8 (h, w, 4) premultiplied or None: [at rest, pressed]; sticks
                                                   # [.., .., moved]; DPAD: presets.json's dpad_states
    travel: tuple = (0.0, 0.0)                     # sticks: displacement in pixels at full deflection
    tilt: float = 0.0                              # sticks: how much flatter the cap looks at full deflection


@dataclass(eq=False)
class Skin:
    """Anything that can be drawn. Boxes and centres are in template pixels; only what the skin shows is
    listed."""
    name: str
    family: str
    size: tuple                                    # canvas (w, h)
    parts: list
    buttons: dict = field(default_factory=dict)    # NAME -> [x0, y0, x1, y1]
    sticks: dict = field(default_factory=dict)     # left / right -> {"center", "travel", "radius"}
    bbox: list = None                            # [x0, y0, x1, y1] of the visible pad, where its JSON says it

    @functools.cached_property
    def base(self):
        """What is drawn once: (the always-there parts before the first control, the parts after them)."""
        first = next((i for i, p in enumerate(self.parts) if p.control), len(self.parts))
        canvas = np.zeros((*self.size[::-1], 4), np.uint8)
        for part in self.parts[:first]:
            blend(canvas, part.sprites[0], *part.at)
        return canvas, self.parts[first:]


def draw(skin, action=None):
    """The skin with `action` float (25,) pressed, None = at rest -> uint8 (h, w, 4) RGBA, straight alpha.

    Buttons and triggers show pressed from 0.5 on; sticks are in [-1, 1], y down.
    """
    action = neutral() if action is None else action
    base, parts = skin.base
    canvas = base.copy()
    for part in parts:
        draw_part(canvas, part, action)
    return by_alpha(cv2.divide, canvas, 255)


def draw_pressed(skin):
    """The skin with every control pressed, as draw(): left and right can't be shown at once, so two arms of
    the d-pad are taken from a second drawing."""
    all_but = lambda *arrows: [float(b not in arrows) for b in BUTTONS] + [0.0] * 4
    first = draw(skin, all_but("DPAD_DOWN", "DPAD_RIGHT"))
    second = draw(skin, all_but("DPAD_UP", "DPAD_LEFT"))
    for arrow in {"DPAD_DOWN", "DPAD_RIGHT"} & skin.buttons.keys():
        box = np.int32(skin.buttons[arrow]).clip(0)
        inside(first, box)[:] = inside(second, box)
    return first


def draw_part(canvas, part, action):
    """Draw one part in the state that `action` gives it."""
    x, y = part.at
    pressed = lambda name: int(action[BUTTON[name]] >= 0.5)
    if part.control in STICKS:
        dx, dy = map(float, action[STICKS[part.control]])
        free = 2 if len(part.sprites) > 2 and max(abs(dx), abs(dy)) > 0.1 else 0
        sprite = part.sprites[1 if pressed(THUMB[part.control]) else free]
        sprite = tilted(sprite, dx, dy, part.tilt) if part.tilt and (dx or dy) else sprite
        (x, dx), (y, dy) = divmod(x + dx * part.travel[0], 1), divmod(y + dy * part.travel[1], 1)
        (h, w), shift = sprite.shape[:2], np.float32([[1, 0, dx], [0, 1, dy]])
        sprite = cv2.warpAffine(sprite, shift, (w + 1, h + 1))           # sticks move by parts of a pixel
    elif part.control == "DPAD":
        state = [pressed("DPAD_RIGHT") - pressed("DPAD_LEFT"), pressed("DPAD_DOWN") - pressed("DPAD_UP")]
        sprite = part.sprites[PRESETS["dpad_states"].index(state)]
    else:
        sprite = part.sprites[pressed(part.control) if part.control else 0]
    if sprite is not None:
        blend(canvas, sprite, int(x), int(y))


def tilted(sprite, dx, dy, tilt):
    """A cap that turns away from the viewer as it is pushed: flatter along the way that it goes."""
    way, middle = np.array([[dx, dy]]), np.array(sprite.shape[1::-1]) / 2 - 0.5
    flat = np.eye(2) - tilt * way.T @ way / max(np.hypot(dx, dy), 1e-6)
    to_flat = np.c_[flat, middle - flat @ middle]
    return cv2.warpAffine(sprite, to_flat, sprite.shape[1::-1], flags=cv2.INTER_LINEAR)


def blend(canvas, sprite, x, y):
    """Premultiplied 'over' of sprite on canvas at (x, y), in place, cut at the canvas edge."""
    x0, y0 = max(x, 0), max(y, 0)
    under = canvas[y0:, x0:]
    sprite = sprite[y0 - y:, x0 - x:][:len(under), :under.shape[1]]
    if sprite.size:
        under = under[:sprite.shape[0], :sprite.shape[1]]
        clear = cv2.merge([cv2.bitwise_not(np.ascontiguousarray(sprite[..., 3]))] * 4)
        under[:] = cv2.add(cv2.multiply(under, clear, scale=1 / 255), sprite)


def by_alpha(operation, rgba, scale):
    """The colours of a picture uint8 (h, w, 4) multiplied or divided (cv2's operation) by its alpha."""
    alpha = np.ascontiguousarray(rgba[..., 3])
    return cv2.merge([*cv2.split(operation(rgba[..., :3], cv2.merge([alpha] * 3), scale=scale)), alpha])


def premultiply(rgba):
    """Straight -> premultiplied alpha, uint8."""
    return by_alpha(cv2.multiply, rgba, 1 / 255)


def over(ground, rgba, opacity=1.0):
    """A picture uint8 (h, w, 4), straight alpha, over a ground uint8 (h, w, 3) or a grey level -> uint8 (h,
    w, 3)."""
    alpha = rgba[..., 3:] / 255.0 * opacity
    return (rgba[..., :3] * alpha + ground * (1 - alpha)).astype(np.uint8)


# ---- skins from files: OBS presets and PNGs
OBS_GAP = 3                                        # pixels between related sprites in the atlas


def load_skins(path, width=None):
    """Every skin under `path`: an OBS layout .json, a .png, or a folder (searched at any depth) of either
    -> list of Skins, presets `width` pixels wide (None: their own size)."""
    path = Path(path)
    files = [path] if path.is_file() else template_files(path)
    layouts = [p for p in files if p.suffix == ".json" and b'"elements"' in p.read_bytes()]
    pictures = [p for p in files if p.suffix == ".png" and p.parent not in {q.parent for q in layouts}]
    skins = [load_preset(p, width) for p in layouts] + [load_picture(p) for p in pictures]
    if others := skins.count(None):
        print(f"{path}: layouts without a pad's control, passed over: {others}", file=sys.stderr)
    skins = list(filter(None, skins))
    if not skins:
        raise UserError(f"{path}: expected NAME.png templates or OBS preset folders, found none: "
                        "check --templates / --skins")
    return skins


@functools.cache
def our_pads():
    """Our own pads; reading them takes two seconds."""
    return load_skins(OUR_PADS)


@functools.cache
def shown_pad():
    """The pad of ours that pictures of actions are drawn with: its caps are bright."""
    return load_preset(OUR_PADS / "xbox_360_yellow_caps" / "pad.json")


def template_files(path):
    """The files that load_skins() may read under `path`, or beside it where it is one."""
    path = Path(path)
    files = path.rglob("*") if path.is_dir() else [path, *path.parent.glob("*.png")]
    return sorted(file for file in files if file.suffix in (".json", ".png"))


def load_picture(png):
    """NAME.png, a pad at rest (RGB or RGBA), with an optional NAME.json beside it, its geometry -> Skin,
    which draws nothing but the picture."""
    rgba, note = read_rgba(png), png.with_suffix(".json")
    skin = Skin(png.stem, family_of(png.stem), rgba.shape[1::-1], [Part("", (0, 0), [premultiply(rgba)])])
    if note.exists():
        with reading(note, "buttons.NAME.box and sticks.left.center/travel"):
            geometry = read_json(note, dict)
            skin.family = str(geometry.get("controller") or skin.family)
            boxes, sticks = geometry.get("buttons", {}), geometry.get("sticks", {})
            shown = geometry.get("visible_buttons", boxes)
            skin.buttons = {n: numbers(b["box"], 4) for n, b in boxes.items() if n in BUTTON and n in shown}
            for side in filter(sticks.get, STICKS):
                center, travel = (numbers(sticks[side][key], 2) for key in ("center", "travel"))
                [radius] = numbers([sticks[side].get("radius", max(travel))], 1)
                skin.sticks[side] = {"center": center, "travel": travel, "radius": radius}
            skin.bbox = numbers(geometry["bbox"], 4) if geometry.get("bbox") else None
    return skin


def numbers(values, n):
    """n finite numbers -> list; ValueError for anything else."""
    values = [float(v) for v in values]
    if len(values) != n or not all(abs(v) < 1e5 for v in values):
        raise ValueError(f"{values} where {n} numbers belong")
    return values


def load_preset(layout, width=None):
    """An OBS input-overlay preset: layout JSON + the atlas PNG beside it, of its name or of its size -> Skin;
    None for a layout without a pad's control (a keyboard)."""
    with reading(layout, "an OBS input-overlay layout with its atlas PNG beside it"):
        preset = read_json(layout, dict)
        elements = [e for e in preset["elements"] if e["type"] in (0, 2, 5, 6, 7, 8)]
        if not any(e["type"] for e in elements):
            return None
        own = preset.get("default_width"), preset.get("default_height")
        atlases = {png: read_rgba(png) for png in sorted(layout.parent.glob("*.png"))}
        fits = lambda png: (png.stem == layout.stem, atlases[png].shape[1::-1] == own)
        atlas = premultiply(atlases[max(atlases, key=fits)])
        right, below = np.max([np.add(e["pos"], e["mapping"][2:]) for e in elements], 0)
        size = int(preset.get("overlay_width") or right), int(preset.get("overlay_height") or below)
        parts = [p for e in elements if (p := preset_part(e, atlas)) and p.sprites[0] is not None]
        far = [*(v - 1 for v in size), *(p.travel[0] for p in parts)]
        if not parts or not all(0 <= v <= 1 << 13 for v in far):
            raise ValueError(f"{len(parts)} parts inside the atlas on a canvas of {size[0]} x {size[1]}")
    return measured(layout.parent.name, family_of(layout.parent.name + layout.stem), size, parts, width)


def preset_part(element, atlas):
    """One element of a preset -> Part, or None where the pad has no such button (paddles).

    Its type: 0 picture, 2 button, 5 stick, 6 trigger, 7 guide button (a sprite for each player), 8 d-pad.
    """
    x, y, w, h = map(int, element["mapping"])
    left, top = map(int, element["pos"][:2])
    at = left, top
    kind, side = element["type"], element.get("side", 0)

    def sprite(column, row=0):
        begin, above = x + column * (w + OBS_GAP), y + row * (h + OBS_GAP)
        cut = atlas[above:above + h, begin:begin + w]
        return cut if cut.size else None

    rest, pressed = sprite(0), sprite(0, 1)
    if kind == 0:
        return Part("", at, [rest])
    if kind == 2:
        name = PRESETS["obs_buttons"].get(str(element.get("code")))   # SDL's, or older ones
        return name and Part(name, at, [rest, pressed])
    if kind == 5:
        radius = float(element.get("stick_radius", w / 4))
        return Part([*STICKS][side], at, [rest, rest if pressed is None else pressed], (radius, radius))
    if kind == 6:
        control = ("LEFT_TRIGGER", "RIGHT_TRIGGER")[side]
        if pressed is not None and not element.get("trigger_mode"):      # analog: grows over it at rest
            pressed = rest.copy()
            blend(pressed, sprite(0, 1), 0, 0)
            if np.array_equal(rest, pressed):                    # an empty picture: this pad shows no trigger
                control = ""
        return Part(control, at, [rest, pressed])
    if kind == 7:
        return Part("GUIDE", at, [rest, sprite(4)])
    return Part("DPAD", at, [sprite(column) for column in range(9)])


def family_of(name):
    """The controller family that a skin's name speaks of, else "generic"."""
    words = PRESETS["families"]
    return next((family for family in words if any(w in name.lower() for w in words[family])), "generic")


def measured(name, family, size, parts, width=None):
    """Parts -> Skin at `width`, its geometry read off the parts, on a canvas with room for the sticks' whole
    travel."""
    scale = width / size[0] if width else 1
    parts = [scaled(part, scale) for part in parts]
    corners = [(0, 0), np.round(np.multiply(size, scale)).clip(1)]
    for part in parts:
        corners += stick_reach(part) if part.control in STICKS else []
    low, high = np.floor(np.min(corners, 0)).astype(int), np.ceil(np.max(corners, 0)).astype(int)
    parts = [replace(part, at=tuple((part.at - low).tolist())) for part in parts]
    skin = Skin(name, family, tuple((high - low).tolist()), parts)
    for part in filter(lambda part: part.control, parts):
        x0, y0, x1, y1 = box = ink_box(part)
        x, y, w, h = (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0
        if not w:
            continue
        if part.control in STICKS:
            stick = {"center": [x, y], "travel": list(part.travel), "radius": (w + h) / 4}
            skin.sticks[part.control] = stick
            if not np.array_equal(*part.sprites[:2]):
                skin.buttons.setdefault(THUMB[part.control], box)
        elif part.control == "DPAD":
            for arrow, (dx, dy) in ARROWS.items():
                left, top = x + (2 * dx - 1) * w / 6, y + (2 * dy - 1) * h / 6
                skin.buttons[arrow] = [left, top, left + w / 3, top + h / 3]
        else:
            skin.buttons[part.control] = box
    return skin


def ink_box(part):
    """The box [x0, y0, x1, y1] on the canvas where a part's sprites have ink; where only a small part of that
    changes when it is pressed (one arm of a d-pad), it is that part."""
    seen = [s for s in part.sprites if s is not None]
    h, w = np.max([s.shape[:2] for s in seen], 0)
    seen = np.stack([cv2.copyMakeBorder(s, 0, h - s.shape[0], 0, w - s.shape[1], cv2.BORDER_CONSTANT)
                     for s in seen])
    box, change = corners_of(seen[..., 3].max(0) > 24), corners_of(np.ptp(seen, 0).max(2) > 24)
    if part.control not in (*STICKS, "DPAD") and 0.05 < area(change) / max(area(box), 1) < 0.5:
        box = change
    return np.add(box, part.at * 2).tolist()


def stick_reach(part):
    """The corners (2, 2) of what a stick's cap covers at full travel, on the canvas."""
    low, high = np.reshape(ink_box(part), (2, 2))
    reach = np.add(part.travel, (high - low).sum() / 4)
    return [(low + high) / 2 - reach, (low + high) / 2 + reach]


def scaled(part, scale):
    """A part on a canvas `scale` times as large; its sprites keep their sub-pixel place."""
    if scale == 1:
        return part
    (left, dx), (top, dy) = (divmod(v * scale, 1) for v in part.at)
    shift = np.float32([[scale, 0, dx + (scale - 1) / 2], [0, scale, dy + (scale - 1) / 2]])

    def resize(sprite):
        h, w = sprite.shape[:2]
        blur = cv2.GaussianBlur(sprite, (0, 0), 0.4 / scale) if scale < 0.8 else sprite
        size = math.ceil(w * scale) + 2, math.ceil(h * scale) + 2
        return cv2.warpAffine(blur, shift, size, flags=cv2.INTER_LINEAR)

    sprites = [s if s is None else resize(s) for s in part.sprites]
    travel = tuple(v * scale for v in part.travel)
    return replace(part, at=(int(left), int(top)), sprites=sprites, travel=travel)


# ---- backdrops: pictures that could be any game
def backdrop(rng, h, w):
    """A random picture that could be a game's, uint8 (h, w, 3): one of two scenes, marks on it, then
    blur and light."""
    hue = rng.uniform(0, 180) + rng.normal(0, rng.uniform(2, 60), 6)     # colours that go together
    saturation, value = (255 * rng.beta(*rng.uniform(0.6, 4, 2), 6) for _ in range(2))
    hsv = np.stack([hue % 180, saturation, value], 1).astype(np.uint8)
    colours = cv2.cvtColor(hsv[None], cv2.COLOR_HSV2RGB)[0]
    image = (tiles, terrain)[rng.integers(2)](rng, h, w, colours)
    marks(rng, image, np.vstack([colours, rng.integers(0, 256, (4, 3)), [[255] * 3, [0] * 3]]))
    if rng.random() < 0.3:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 2.5))
    return cv2.convertScaleAbs(image, alpha=rng.uniform(0.5, 1.2), beta=rng.uniform(0, 40))


def clouds(rng, h, w):
    """Value noise, float32 (h, w) in [0, 1]: random grids, each twice as fine and about half as strong,
    enlarged and added."""
    total, cells, fade = np.zeros((h, w), np.float32), rng.integers(2, 9), rng.uniform(0.4, 0.9)
    how = cv2.INTER_LINEAR if rng.random() < 0.6 else cv2.INTER_NEAREST
    for octave in range(rng.integers(2, 8)):
        grid = rng.random((cells * h // w + 2, cells), np.float32) * fade ** octave
        total += cv2.resize(grid, (w, h), interpolation=how)
        cells *= 2
    return cv2.normalize(total, None, 0, 1, cv2.NORM_MINMAX)


def tile(rng, s, colours):
    """One uint8 (s, s, 3) tile of a tile set: bricks, checks or a symmetric figure of 8 x 8 pixels."""
    y, x = np.mgrid[:s, :s]
    half, joint = max(s // 2, 2), max(s // 12, 1)
    bricks = (y % half < joint) | ((x + y // half * (half // 2)) % half < joint)
    figure = rng.integers(0, rng.integers(1, 7), (8, 4), np.uint8)       # of one colour: plain
    figure = cv2.resize(np.hstack([figure, figure[:, ::-1]]), (s, s), interpolation=cv2.INTER_NEAREST)
    kinds = bricks.astype(int), (y // half + x // half) % 2, figure
    return rng.permutation(colours)[kinds[rng.integers(3)]]


def tiles(rng, h, w, colours):
    """A 2-D level: a map of random tiles whose regions follow noise."""
    s = int(rng.integers(h // 24 + 1, h // 6 + 4))
    rows, columns = h // s + 1, w // s + 1
    kit = np.stack([tile(rng, s, colours) for _ in range(6)])
    region = clouds(rng, rows, columns) + rng.normal(0, 0.1, (rows, columns))
    chosen = kit[np.clip(region * 6, 0, 5).astype(int)]                  # (rows, columns, s, s, 3)
    return chosen.swapaxes(1, 2).reshape(s * rows, s * columns, 3)[:h, :w].copy()


def terrain(rng, h, w, colours):
    """Seen from above or close by: grass, rock, water: noise through a gradient of the colours or in flat
    ones."""
    x = clouds(rng, h, w) * 5
    x = np.floor(x) if rng.random() < 0.4 else x
    return np.stack([np.interp(x, range(6), channel) for channel in colours.T], 2).astype(np.uint8)


def marks(rng, image, colours):
    """Draw, in place, what lies over games: text, crosses, discs and bars with letters. Like buttons, but no
    pad."""
    h, w = image.shape[:2]
    for kind in rng.integers(0, 4, rng.integers(0, 30)):
        x, y = rng.integers(0, (w, h)).tolist()
        s, fill = int(h * rng.choice([0.02, 0.04, 0.06, 0.12]) + 4), int(rng.choice([-1, 1, 2, 3]))
        colour, other = rng.choice(colours, 2).tolist()
        word = "".join(rng.choice([*"ABXYLR0123456789:%HPSCOTIME "], rng.integers(1, 8)))
        if kind == 0:
            cv2.drawMarker(image, (x, y), colour, cv2.MARKER_CROSS, 2 * s, max(s // 3, 1))
        elif kind == 1:
            cv2.circle(image, (x + s // 2, y - s // 2), s, colour, fill, cv2.LINE_AA)
        elif kind == 2:
            cv2.rectangle(image, (x - s // 4, y + s // 4), (x + s * len(word), y - s), colour, fill)
        if kind > 0:                               # the last has nothing but its word
            word = word[0] if kind == 1 else word
            cv2.putText(image, word, (x, y), int(rng.integers(8)), s / 30, other, 1 + s // 20, cv2.LINE_AA)


# ---- videos to work at, and what became of them
def find_videos(paths):
    """Files and folders -> list of (video path, clip name), a folder's sorted: the name is the file's, with
    its folder's where two would share clips or the name is too long."""
    videos = []
    for path in map(Path, paths):
        found = [path] if path.is_file() else sorted(
            p for p in path.rglob("*") if p.suffix.lower() in VIDEO_ENDINGS and p.is_file())
        videos += found
        if not found:
            raise UserError(f"{path}: expected a video or a folder with some ({' '.join(VIDEO_ENDINGS)}), "
                            "found none: check the path")
    videos = list(dict.fromkeys(unicode(p).absolute() for p in videos))
    stems = Counter(p.stem.casefold() for p in videos)                   # some disks mind no case

    def name(path):
        stem = path.stem
        if stems[stem.casefold()] == 1 and len(stem.encode()) <= 248 and stem[-7:-1].casefold() != "_place":
            return stem
        short = f"{path.parent.name}_{stem}".encode()[:230].decode(errors="ignore")        # of 255
        return f"{short}_{fingerprint(str(path))[:6]}"

    return [(path, name(path)) for path in videos]


def place_names(name):
    """The names of a video's clip folders: one for each place that its overlay may take."""
    return [name, f"{name}_place2", f"{name}_place3"]


def journal(out):
    """DATA/extract.jsonl -> {video: its last line's dict}; a line cut off by a kill is passed over."""
    path = out / "extract.jsonl"
    return read_journal(path, path.stat().st_size) if path.exists() else {}


@functools.lru_cache(1)
def read_journal(path, size):
    """journal() of a file of so many bytes: it only grows, and is asked for once a video."""
    lines, text = {}, path.read_text(encoding="utf-8", errors="replace")
    for line in text.split("\n"):                  # splitlines() would also cut at odd letters of a name
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            line = json.loads(line)
            lines[line["video"]] = line
    return lines


def log_line(out, line):
    """Append one line to DATA/extract.jsonl in a single write, so that several processes may share the
    file."""
    text = json.dumps(line, ensure_ascii=False) + "\n"
    with open(out / "extract.jsonl", "a+b", buffering=0) as f:
        f.seek(max(f.tell() - 1, 0))
        cut = f.read() not in (b"", b"\n")         # a kill cut the last line
        f.write(("\n" * cut + text).encode())


BAR = {"mininterval": 1, "leave": False, "disable": None}            # tqdm's, on a terminal only


def work_through(jobs, args):
    """Do all jobs (video, name of its clip or folder of its labels), and report -> the statuses of those
    that were not done before."""
    statuses = []
    if not (args.plain or args.labels):
        print("preparing the templates", flush=True)
    with closing(in_a_child(jobs, args)) as answers, tqdm(jobs, unit=" videos", **BAR) as bar:
        for i, ((video, name), (answer, seconds)) in enumerate(zip(bar, answers), 1):
            if answer is None:
                continue
            line = {"video": str(video), "template": None, "box": None, "inliers": 0,
                    "reason": "", **answer, "seconds": round(seconds, 2)}
            if args.labels:
                line["chunk"] = name.name
            if line["status"] != "busy":
                log_line(Path(args.out), line)
            statuses.append(line["status"])
            what = line["reason"]
            if line["status"] == "found":
                box = [round(v) for v in line["box"]]
                what = f"{line['template']} | box {box} | {line['inliers']} inliers"
            bar.clear()
            print(f"video {i}/{len(jobs)} | {video.name} | {line['status']} | {what} | {seconds:.1f} s",
                  flush=True)
    return statuses


def in_a_child(jobs, args):
    """Yields what do_job() says of each job and how long it took, in a child process, since a decoder is
    foreign code on foreign data: where it ends its process, that is an error of the job's video, and a new
    child goes on. The child ends with us."""
    others = multiprocessing.active_children()
    try:
        pool = new_child(args)
        for video, name in jobs:
            start = time.time()
            try:
                answer = pool.submit(do_job, video, name).result()
            except BrokenProcessPool:
                reason = (f"{video}: expected a video that OpenCV decodes, found one at which its process "
                          "ends: save it again with another program")
                answer = {"status": "error", "reason": reason}
                pool = new_child(args)
            yield answer, time.time() - start
    finally:
        for child in set(multiprocessing.active_children()) - set(others):
            child.kill()
            child.join()
        sweep(args.out)


def new_child(args):
    """A pool of one process that is ready for do_job()."""
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=end_with_parent)
    heed = signal.signal(signal.SIGINT, signal.SIG_IGN)                # the child inherits it: Ctrl-C is ours
    ready = pool.submit(make_ready, args)
    signal.signal(signal.SIGINT, heed)
    try:
        ready.result()
    except BrokenProcessPool:
        raise UserError("the process for videos ended at its start: make room in memory") from None
    return pool


def end_with_parent():
    """In the child: end when the parent ends, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)   # Windows lets no child inherit it
    tqdm.set_lock(threading.RLock())               # its own is for several processes, and outlives a kill
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(0)), daemon=True).start()


def make_ready(args):
    """In the child: what its jobs share."""
    do_job.work = work_for(args)


def do_job(video, name):
    """In the child: what work_for(args)(video, name) returns, or {"status": "error" or "busy", "reason":
    ..}."""
    try:
        return do_job.work(video, name)
    except (UserError, OSError) as e:
        reason = str(e) if isinstance(e, UserError) else file_trouble(e)
        return {"status": "busy" if isinstance(e, Busy) else "error", "reason": reason}


def work_for(args):
    """The function that does one job of these args."""
    if args.labels:
        return lambda video, folder: label_one(video, folder, args)
    settings, matcher = fingerprint("plain", args.every, args.game), None
    if not args.plain:
        skins = load_skins(args.templates)
        net = load_xfeat(args.xfeat) if args.matcher == "xfeat" else None
        files = template_files(args.templates)
        files += [Path(args.xfeat)] if net else []
        made_of = fingerprint([s.name for s in skins], *(np.fromfile(file, np.uint8) for file in files))
        key = fingerprint(args.matcher, made_of, np.fromfile(__file__, np.uint8))     # and how it is done
        matcher = Matcher(skins, net, load_locator() if net else None, key)
        settings = fingerprint(made_of, args.every, args.game)
    return lambda video, name: extract_one(video, name, matcher, args, settings)


def contact_sheet(path, videos, out):
    """One picture of every video's find for a person to check: a frame with the box, the template, the crop
    beside it."""
    lines = journal(out)
    shown = [(out / name, lines[str(video)]) for video, name in videos if str(video) in lines]
    page = Image.new("RGB", (1280, (len(shown) + 1) // 2 * 200), "#202020")
    for i, (folder, line) in enumerate(shown):
        left, top, pictures = i % 2 * 640, i // 2 * 200, []
        if line["status"] != "error":
            pictures = [sample_frames(line["video"], 2)[1][-1]]
        if line["status"] == "found":
            scale = pictures[0].shape[1] / read_clip(folder)["size"][0]
            cv2.rectangle(pictures[0], [round(v * scale) for v in line["box"]], (0, 255, 0), 4)
            pictures.append(over(96, read_rgba(folder / "template.png")))
            if (folder / "pads.npy").exists():     # else dropped when they were read
                pictures.append(Frames(folder, "pads")[0])
        for x, picture in enumerate(map(Image.fromarray, pictures)):
            picture.thumbnail((210, 176))
            page.paste(picture, (left + 213 * x, top))
        text = f"{folder.name}: {line['status']} {line['template'] or ''} {line['inliers']} inliers"
        ImageDraw.Draw(page).text((left + 6, top + 182), text)
    if shown:                                      # a share may have no videos
        save_png(path, np.asarray(page))


def run_templates(out):
    """Write our templates as NAME.png + NAME.json."""
    skins = our_pads()
    out.mkdir(parents=True, exist_ok=True)
    for skin in skins:
        save_png(out / f"{skin.name}.png", draw(skin))
        buttons = {name: {"center": [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2], "box": box}
                   for name, box in skin.buttons.items()}
        write_json(out / f"{skin.name}.json", {
            "name": skin.name, "controller": skin.family, "size": skin.size, "bbox": visible_box(skin),
            "buttons": buttons, "sticks": skin.sticks})
    print(f"wrote {len(skins)} templates to {out}")


# ---- what every script shares: mistakes, files, the command line
class UserError(ValueError):
    """A user's mistake: one line that says what was expected, what was found and what to do."""


class Busy(UserError):
    """Another process is at the same thing."""


@contextmanager
def reading(path, expected):
    """Whatever is wrong inside a file from elsewhere becomes one line that names the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:                         # parsers of foreign files raise what they like
        found = f"{type(e).__name__} {' '.join(str(e).split())[:150]}"
        raise UserError(f"{path}: expected {expected}, found {found}") from e


def read_json(path, kind):
    """A JSON file whose top level is `kind`; UserError names the file."""
    with reading(path, f"JSON, a {kind.__name__}"):
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        json.dumps(value, ensure_ascii=False).encode()               # half a letter can't be written
        if not isinstance(value, kind):
            raise ValueError(f"a {type(value).__name__}")
    return value


def write_json(path, value):
    """JSON under a temporary name, then renamed."""
    text = json.dumps(value, ensure_ascii=False) + "\n"
    write_atomic(path, lambda tmp: tmp.write_text(text, encoding="utf-8"))


def fingerprint(*parts):
    """A short hash of arrays, numbers and strings."""
    digest = hashlib.sha1()
    for part in parts:
        digest.update(part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
    return digest.hexdigest()[:16]


def from_cache(key, make):
    """The list of arrays that make() gives, from a file of this key in the user's cache folder
    ($XDG_CACHE_HOME or ~/.cache, on Windows %LOCALAPPDATA%); made anew where that is missing or broken."""
    home = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME")
    path = Path(home or os.path.expanduser("~/.cache"), "nitrogen", f"templates-{key}.npz")
    with suppress(Exception), np.load(path) as file:
        return [file[name] for name in file.files]
    arrays = make()
    with suppress(UserError, OSError):             # goes on without a home or room on its disk
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, lambda tmp: np.savez(tmp, *arrays))
    return arrays


def write_atomic(path, write):
    """write(tmp) makes the file under a temporary name; once it is on the disk, it is renamed: a name never
    holds half a file, not even after a power cut. It has a new file's usual rights, whatever `write` gave
    it."""
    try:
        with finished(path) as tmp:
            tmp.touch()
            rights = tmp.stat().st_mode
            write(tmp)
            tmp.chmod(rights)
    except OSError as e:
        raise UserError(f"can't write {path}: {e.strerror or e}: give another --out or make room") from None


@contextmanager
def finished(path):
    """A temporary name to write a file under; when the block ends well and the file is on the disk, it is
    `path`."""
    tmp = temporary(path)
    try:
        yield tmp
        sync(tmp)
        os.replace(tmp, path)
    finally:
        remove(tmp)


def sync(path):
    """Return once a file's bytes are on the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


HOST = re.sub("[^A-Za-z0-9-]", "-", platform.node())


def temporary(path):
    """The name, beside `path`, under which this process makes it: `.tmp-HOST-PID-HASH`, with path's ending.

    What processes of this host that run no longer left beside it under such names is removed.
    """
    path = Path(path)
    sweep(path.parent)
    return path.with_name(f".tmp-{HOST}-{os.getpid()}-{fingerprint(path.name)[:8]}{path.suffix[:8]}")


def sweep(folder):
    """Remove the temporary files and folders that killed processes of this host left in `folder`."""
    for path in Path(folder).glob(f".tmp-{HOST}-*"):
        made = re.fullmatch(rf"\.tmp-{HOST}-(\d+)-[0-9a-f]{{8}}(\..*)?", path.name)
        if made and not running(int(made[1])):
            remove(path)


def remove(path):
    """Remove a file or a folder of ours, where it is there and we may; a link is never followed."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def running(pid):
    """Whether a process of this number runs on this machine."""
    if os.name == "nt":
        import ctypes
        kernel = ctypes.windll.kernel32
        process = kernel.OpenProcess(0x100000, False, pid)               # SYNCHRONIZE
        ended = not process and kernel.GetLastError() == 87       # no such process, or another user's
        if process:
            ended = not kernel.WaitForSingleObject(process, 0)
            kernel.CloseHandle(process)
        return not ended
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:                        # it is another user's
        pass
    return True


@contextmanager
def lock(path):
    """Hold the small file `path` (made, and kept) for this process; Busy where another process holds it. The
    system lets go when the process ends, however it ends."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        try:
            if os.name == "nt":
                import msvcrt
                file.seek(0)
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise Busy(f"{path}: expected to be the only process at it, found another ({e.strerror}): "
                       "wait for its end or give another --out") from None
        yield


def writable(path):
    """Make the folder of a file that is written at the end of a long run; UserError now where it can't be."""
    if Path(path).is_dir():
        raise UserError(f"{path}: expected the name of a file to write, found a folder: give another --out")
    Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)


def neutral():
    """The pad at rest: float32 (25,) of zeros, in file convention."""
    return np.zeros(A, np.float32)


def unicode(path):
    """A path, or any word, that is Unicode as it is; UserError for other bytes: OpenCV ends the process over
    such names, and nothing can print them."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{ascii(str(path))}: expected a name in UTF-8, found others: rename it") from None
    return path


def number(kind, low=-1e18, high=1e18):
    """A type for argparse: a number in [low, high]; NaN lies nowhere."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected {low:g} to {high:g}, found {text}")
        return value
    parse.__name__ = kind.__name__                 # argparse says "invalid int value"
    return parse


class ArgumentParser(argparse.ArgumentParser):
    """argparse with its mistakes as one error line."""

    def error(self, message):
        """Raise UserError, where argparse prints a page and leaves."""
        raise UserError(f"{message}: {self.prog} --help tells more")


def cli(parser, argv, *mistakes):
    """Parse argv and call args.run(args) -> the exit status: 0 done, 2 the user's mistake (one line), 130
    Ctrl-C, 141 nobody reads on (`| head`). mistakes: further exceptions whose text is a line for the user."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")         # a Windows log has no code for every letter
    try:
        for word in sys.argv[1:] if argv is None else argv:
            unicode(word)
        args = parser.parse_args(argv)
        args.run(args)
        sys.stdout.flush()
    except (UserError, *mistakes) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())   # or Python complains when it ends
        return 141
    except OSError as e:                           # of a file: its disk, its rights or its name
        if e.filename is None and e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        print(f"error: {file_trouble(e)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; what is whole stays", file=sys.stderr)
        return 130
    return 0


def file_trouble(e):
    """One line for an OSError."""
    path = "--out" if e.filename is None else e.filename           # a full disk doesn't say which file it was
    return f"{path}: {e.strerror}: check this path, the rights to it and the room on its disk"


def main(argv=None):
    """Parse and run the command line."""
    parser = ArgumentParser(prog="extract.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="*", help="video files, or folders that are searched for them; "
                        "or the word templates")
    parser.add_argument("--out", help="the data folder: a folder a video, and extract.jsonl")
    parser.add_argument("--templates", default=OUR_PADS, help="folder of NAME.png (+ NAME.json) or of OBS "
                        "presets (default: our own, 173)")
    parser.add_argument("--every", type=number(int, 1), default=1,
                        help="keep each Kth policy frame; actions stay at full rate (default 1)")
    parser.add_argument("--matcher", choices=("xfeat", "sift"), default="xfeat",
                        help="features to match by (default xfeat; sift needs no torch)")
    parser.add_argument("--xfeat", default=WEIGHTS / "xfeat.safetensors", help="matching weights: a "
                        ".safetensors of ours or the official xfeat.pt (default weights/xfeat.safetensors)")
    parser.add_argument("--labels", help="NVIDIA's released labels, unpacked: cut their chunks from videos "
                        "instead of localising; without videos: list what is labelled")
    parser.add_argument("--game", help="the game's name (default: the name of the video's folder)")
    parser.add_argument("--plain", action="store_true", help="clips of frames alone, of videos without an "
                        "overlay: sample.py label adds actions")
    parser.add_argument("--limit", type=number(int, 1), help="take the first N videos only (default: all)")
    parser.add_argument("--sheet", help="also write a contact sheet PNG of all finds")
    parser.set_defaults(run=run_extract)
    return cli(parser, argv)

if __name__ == "__main__":
    sys.exit(main())
