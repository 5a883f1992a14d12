"""Train the policy by conditional flow matching, from scratch or from a checkpoint. Paper §3.4, arXiv 2601.02427.

    python train.py DATA... --out RUN --preset toy [--steps N]                 from scratch, on clip folders with actions
    python train.py DATA... --out RUN --ckpt ng.safetensors --freeze vision    post-training
    python train.py --resume RUN                                               goes on where it stopped, bit for bit on a CPU
    torchrun --standalone --nproc-per-node 8 train.py DATA... --out RUN        the same batch, shared by 8 GPUs (nccl) or processes (gloo)

In: DATA/CLIP/ with clip.json, frames.npy, frames_index.npy, actions.npy float32 (n, 25), and where they exist keep.npy bool (n,): this row may
start a chunk; human.npy bool (n,): here a person took over; cuts.npy bool (n,): here something else begins than what was before, such as another
episode, so that no chunk counts beyond it; truth.npy for --truth. Out, under RUN:
    model.safetensors    the average of the weights (EMA) and what is frozen: what sample.py, play.py and --ckpt load
    state.safetensors    raw weights, average, AdamW's moments, step: what --resume needs beside it
    log.csv, curve.png   a line a step; the curves drawn

Every random number is a function of the seed and of the sample's or the step's global number, so a resumed run, another number of processes or
another size of micro-batch draws the same frames, noises, times and augmentations.
Letters as in model.py; r draws are r pairs of noise and time for each encoded frame.
"""
import argparse
import contextlib
import ctypes
import functools
import json
import math
import os
import signal
import sys
import time
import weakref
import zlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import extract
import model as M
from extract import UserError

OPEN_CLIPS = 100                     # clips held open at a time, two files each: under every system's limit
WEIGHT_DECAY, EMA = 0.001, 0.9999    # [P]
BETAS, CLIP = (0.9, 0.99), 1.0       # AdamW's, and the largest gradient norm [O: the paper gives none]
ROTATION = 5.0                       # degrees each way [P]
COLOUR, HUE, CROP = 0.1, 0.02, 0.95  # brightness, contrast, saturation 1 +- COLOUR; turns of hue; least side of a crop [O: the paper names them without ranges]
DIVERGED = 4.0                       # a velocity of zero costs 1 + E[a^2], at most 2


# ---------------------------------------------------------------------------------------------------------------------- the loss
def draw_times(rng, n, config):
    """n times t = (1 - Beta(1.6, 0.8)) s: 64 % of them below 0.4, where noise has to become a plan [§3.4; the numbers: R]."""
    return ((1 - rng.beta(*config.beta, n)) * config.noise_s).astype(np.float32)


def cfm_loss(model, frames, actions, mask=None, games=None, keep=None, noise=None, t=None, total=None):
    """Conditional flow matching [§3.4]: how far the network's velocity at a point between noise and action is from action - noise.

    frames (B, F, 256, 256, 3), actions (B, T, A) in the model's convention, mask (B, T) or (B, T, A): which of them count, games (B,) ids,
    keep (B, F). noise (r B, T, A) and t (r B,): sample i owns the rows i r to i r + r - 1; drawn anew, r = 1, where not given. total: how many
    action values to divide by where this is a part of a larger batch (default: those of the mask). -> a scalar.
    """
    config = getattr(model, "module", model).config            # DDP keeps the model under .module
    if noise is None:
        noise = torch.randn_like(actions)                                                                 # (r B, T, A)
    if t is None:
        rng = np.random.default_rng(int(torch.randint(2**62, ())))
        t = torch.from_numpy(draw_times(rng, len(noise), config)).to(noise)                               # (r B,)
    if mask is None:
        mask = torch.ones_like(actions)
    elif mask.ndim == 2:
        mask = mask[..., None]
    draws = len(noise) // len(actions)
    a = actions.repeat_interleave(draws, 0)                                                               # (r B, T, A)
    w = mask.expand_as(actions).to(actions.dtype).repeat_interleave(draws, 0)                             # (r B, T, A)
    at = t[:, None, None]
    x = (1 - at) * noise + at * a                              # x_t: the straight line from noise (t = 0) to action (t = 1)
    v = model(x, t, frames, games, keep)                       # what the network takes for dx/dt
    square = (v.float() - (a - noise)) ** 2                    # dx/dt is a - noise everywhere on that line
    return (square * w).sum() / ((w.sum() if total is None else total) + 1e-6)                            # [R: masked mean]


@torch.no_grad()
def sample_chunks(model, frames, noise, games=None, keep=None):
    """Noise (B, T, A) -> the sampler's tensor (B, T, A): x += v / k from t = 0, sample.py's Euler steps without its guidance and graphs."""
    config, context, x = model.config, model.encode(frames, games, keep), noise
    for i in range(config.steps):
        bucket = int(i / config.steps * config.buckets)
        x = x + model.velocity(x, torch.full((len(x),), bucket, device=x.device), context) / config.steps
    return x


# ---------------------------------------------------------------------------------------------------------------------- the clips
@functools.lru_cache(OPEN_CLIPS)
def open_clip(folder, actions):
    """A clip's extract.Frames and the actions of its file `actions`, float32 (n, 25); both memory-mapped."""
    return extract.Frames(folder), extract.read_npy(Path(folder) / actions, np.float32, 2)


def game_of(meta):
    """The game's name in a clip.json."""
    return str(meta.get("game") or "unknown")


class Clip:
    """One clip folder, checked: which frames may start a chunk, and chunks at the model's rate from a clip of any rate."""

    def __init__(self, folder, config, truth=False, human_weight=1.0):
        self.folder, self.file = Path(folder), "truth.npy" if truth else "actions.npy"
        meta = extract.read_clip(folder)
        frames, actions = open_clip(str(folder), self.file)
        self.n, self.fps, self.game = len(actions), meta["fps"], game_of(meta)
        extract.check_actions(self.folder / self.file, actions, frames.n)
        self.ratio = self.fps / config.hz                                                                  # rows of the clip for one action
        self.shift, self.horizon = config.action_shift, config.horizon
        self.cuts = np.append(np.flatnonzero(self.flags("cuts.npy", np.zeros(self.n, bool))), self.n)
        keep = self.flags("keep.npy", np.ones(self.n, bool))[frames.numbers]
        counts = self.edges(frames.numbers)[:, :-1] < self.end(frames.numbers)[:, None]                    # (m, T) as the mask of chunk()
        self.kept = np.flatnonzero(keep & counts[:, 0]).astype(np.int32)                                   # frames that may start a chunk,
        self.rows = frames.numbers[self.kept]                                                              # their rows, int64,
        self.lengths = counts.sum(1, dtype=np.int32)[self.kept]                                            # and how many of its actions count
        self.weight, self.cumulative, self.hole = float(len(self.kept)), None, meta.get("hole")
        if human_weight != 1 and len(self.kept):
            weights = np.where(self.flags("human.npy", np.zeros(self.n, bool))[self.rows], human_weight, 1.0)
            self.cumulative = np.cumsum(weights)
            self.weight = float(self.cumulative[-1])
        self.sum = actions.sum(0, dtype=np.float64)

    def flags(self, name, default):
        """A bool (n,) file of the clip, or the default where there is none."""
        if not (self.folder / name).is_file():
            return default
        flags = extract.read_npy(self.folder / name, np.dtype(bool), 1)
        if len(flags) != self.n:
            raise UserError(f"{self.folder / name}: expected {self.n} rows, one a video frame, found {len(flags)}: delete it and run its stage again")
        return flags

    def end(self, row):
        """Rows (...) of frames -> the row of the next cut after each, or the clip's end: from there on the clip says nothing of that frame."""
        return self.cuts[np.searchsorted(self.cuts, row, "right")]

    def edges(self, row):
        """Rows (...) of frames -> (..., T + 1): the row at which each action of the chunk begins, and where the last one ends."""
        steps = self.shift + np.arange(self.horizon + 1)
        return np.floor(np.asarray(row)[..., None] + steps * self.ratio + 1e-6).astype(np.int64)

    def chunk(self, row):
        """Row of a frame -> actions float32 (T, 25), mask bool (T,) (False: past a cut or the clip's end), the last action before the frame (25,).

        A faster clip: a button counts as pressed when it was at any of the action's rows. A slower one: a row is held. Sticks: the first row.
        """
        _, actions = open_clip(str(self.folder), self.file)
        end = int(self.end(row))
        edges = np.minimum(self.edges(row), end)
        begin = np.minimum(edges[:-1], end - 1)
        rows = actions[begin[0]:max(edges[-1], begin[-1] + 1)]
        out = rows[begin - begin[0]]
        out[:, :-4] = np.maximum.reduceat(rows[:, :-4], begin - begin[0])
        return out, edges[:-1] < end, actions[max(row - 1, 0)]

    def pictures(self, j, config, out=None):
        """Kept frame j and what was before it -> uint8 (F, 256, 256, 3), oldest first, in `out` where that is given, and bool (F,): which of them the
        clip has."""
        frames, row = open_clip(str(self.folder), self.file)[0], self.rows[j]
        out = np.empty((config.frames, config.image, config.image, 3), np.uint8) if out is None else out
        keep = np.ones(config.frames, bool)
        newest = frames.read(int(self.kept[j]), out[-1])
        if newest.shape != out.shape[1:]:
            raise UserError(f"{self.folder}: expected frames of {config.image} x {config.image}, "
                            f"found {newest.shape[1]} x {newest.shape[0]}: cut the clip again")
        for back in range(1, config.frames):
            i = np.searchsorted(frames.numbers, row - back * config.frame_spacing * self.ratio + 1e-6, "right") - 1
            keep[-1 - back] = i >= 0 and self.end(frames.numbers[i]) == self.end(row)                      # with no cut between
            if keep[-1 - back]:
                frames.read(int(i), out[-1 - back])
            else:
                out[-1 - back] = 0
        return out, keep


def load_clips(data, config, truth=False, human_weight=1.0, say=print):
    """Every clip of the folders `data` that has a chunk to learn from; one line names those left out, UserError when none is left."""
    clips, short = [], []
    for folder in data:
        for path in extract.clips_in(folder):
            clip = Clip(path, config, truth, human_weight)
            if len(clip.kept):
                clip.pictures(0, config)                                                       # a broken first picture is said now
                clips.append(clip)
            else:
                short.append(clip)
    if short:
        why = f"{short[0].folder}: {short[0].n} rows, none of its frames may start a chunk (too short, or all filtered out by keep.npy)"
        if not clips:
            more = f", and {len(short) - 1} more like it" if len(short) > 1 else ""
            raise UserError(f"{why}{more}: nothing is left to train on: give longer clips")
        say(f"left out {len(short)} clip(s) | {why}")
    return clips


def usual_hole(clips):
    """Where the overlay was masked out of most frames, [x0, y0, x1, y1] in the 256 x 256 picture; None where some clip has whole frames."""
    frames = Counter()
    for clip in clips:
        frames[json.dumps(clip.hole)] += len(clip.kept)
    return None if "null" in frames else json.loads(max(frames, key=frames.get))


def split(clips, share):
    """Clips -> (training, held out), by a hash of each clip's name: stable when clips are added. A game of two or more clips has at least one
    on each side, so that validation can speak of it."""
    if not share:
        return clips, []
    place = {clip: zlib.crc32(clip.folder.name.encode()) / 2**32 for clip in clips}
    held = set()
    for game in {c.game for c in clips}:
        mine = sorted((c for c in clips if c.game == game), key=lambda c: (place[c], c.folder.name))
        n = sum(place[c] < share for c in mine)
        held |= set(mine[:min(max(n, 1), len(mine) - 1)])
    return [c for c in clips if c not in held], [c for c in clips if c in held]


# ------------------------------------------------------------------------------------------------------------------- the sampler
def stream(seed, number, kind=0):
    """A generator of its own for sample or step `number`: counter-based (Philox), so nothing has to be drawn before it."""
    return np.random.Generator(np.random.Philox(key=[seed % 2**64, number], counter=[0, 0, 0, kind]))


class Batch(NamedTuple):
    """What one forward pass needs."""
    frames: Tensor                            # uint8 (B, F, 256, 256, 3)
    actions: Tensor                           # (B, T, A) in the model's convention
    mask: Tensor                              # bool (B, T)
    games: Tensor                             # (B,) ids, 0 = none
    keep: Tensor                              # bool (B, F)
    noise: Tensor                             # (r B, T, A)
    t: Tensor                                 # (r B,)
    colour: Tensor                            # (B, 3, 4), see augmentation
    warp: Tensor                              # (B, 2, 3)
    last: Tensor                              # (B, 25) the action before the frame, in file convention
    clip: Tensor                              # (B,) number of the clip

    def to(self, device):
        if device.type == "cpu":
            return self
        if device.type == "cuda":
            return Batch(*(x.pin_memory().to(device, non_blocking=True) for x in self))
        return Batch(*(x.to(device) for x in self))


class Sampler:
    """Chunks drawn uniformly over all kept frames, or each game alike (`balance`). A batch of B takes one frame from each of B equal shares of
    the (weighted) frames in a row, so it holds every clip and game in proportion, with less noise than independent draws and at no cost [O]."""

    def __init__(self, clips, config, batch, draws=1, seed=0, balance=False, augment=True, game_ids=None, drop_games=0.0, on_cpu=True):
        self.clips, self.config, self.batch, self.draws, self.seed = clips, config, batch, draws, seed
        self.augment, self.on_cpu, self.drop_games = augment, on_cpu, drop_games
        self.ids = [(game_ids or {}).get(c.game, 0) for c in clips]
        weights = np.array([c.weight for c in clips])
        if balance:
            games = np.array([c.game for c in clips])
            weights = weights / np.array([max(weights[games == g].sum(), 1e-300) for g in games])
        if not weights.sum() > 0:
            raise UserError("expected frames of weight above 0 to draw from, found none: give another --human-weight")
        self.edges = np.concatenate([[0.0], np.cumsum(weights) / weights.sum()])

    def picks(self, step):
        """The batch of a step: (number of the clip, which of its kept frames), int64 (B,) each."""
        u = (np.arange(self.batch) + stream(self.seed, step, 1).random(self.batch)) / self.batch           # one in each share
        clip = np.clip(np.searchsorted(self.edges, u, "right") - 1, 0, len(self.clips) - 1)
        inside = np.clip((u - self.edges[clip]) / np.maximum(np.diff(self.edges)[clip], 1e-300), 0, 1 - 1e-12)
        frame = np.empty(self.batch, np.int64)
        for i, (c, x) in enumerate(zip(clip, inside)):
            c = self.clips[c]
            j = int(x * len(c.kept)) if c.cumulative is None else int(np.searchsorted(c.cumulative, x * c.weight, "right"))
            frame[i] = min(j, len(c.kept) - 1)
        return clip, frame

    def total(self, step):
        """How many action values count in the whole batch of a step, all processes' shares together."""
        actions = sum(int(self.clips[k].lengths[j]) for k, j in zip(*self.picks(step)))
        return actions * self.draws * self.config.action_dim

    def load(self, step, begin=0, end=None):
        """Samples begin..end of a step's batch -> Batch. Runs in threads and processes: decoding, to where the frames stay, and warping leave Python's
        lock."""
        end, c = self.batch if end is None else end, self.config
        clips, kept = self.picks(step)
        frames = torch.empty(end - begin, c.frames, c.image, c.image, 3, dtype=torch.uint8)
        rows = [self.sample(step * self.batch + i, int(clips[i]), int(kept[i]), out) for i, out in zip(range(begin, end), frames.numpy())]
        actions, mask, games, keep, noise, t, colour, warp, last = (torch.from_numpy(np.stack(x)) for x in zip(*rows))
        return Batch(frames, M.actions_in(actions), mask, games, keep, noise.flatten(0, 1), t.flatten(),
                     colour, warp, last, torch.from_numpy(clips[begin:end]))

    def sample(self, number, k, j, out):
        """Everything of the sample with this global number, kept frame j of clip k: its frames in `out`, uint8 (F, 256, 256, 3), the rest returned."""
        rng, clip, c = stream(self.seed, number), self.clips[k], self.config
        _, keep = clip.pictures(j, c, out)
        actions, mask, last = clip.chunk(int(clip.rows[j]))
        noise = rng.standard_normal((self.draws, c.horizon, c.action_dim), np.float32)
        t = draw_times(rng, self.draws, c)
        game = np.int64(self.ids[k] if rng.random() >= self.drop_games else 0)         # without its game now and then: guidance needs both
        colour, warp = augmentation(rng, c.image) if self.augment else AS_IT_IS
        if self.augment and self.on_cpu:
            for frame in out:
                frame[:] = augment_cpu(frame, colour, warp)
        return narrow(actions, c.action_dim), mask, game, keep, noise, t, colour, warp, last


def narrow(actions, dim):
    """Actions (..., 25) -> (..., dim): models of 21 values know only the 17 buttons of a real pad."""
    if dim == extract.A:
        return actions
    if dim != extract.A - len(extract.LEGACY):
        raise UserError(f"expected a model of 25 or 21 action values, found {dim}: give another --ckpt")
    return np.delete(actions, [extract.BUTTON[b] for b in extract.LEGACY], -1)


AS_IT_IS = np.eye(3, 4, dtype=np.float32), np.eye(2, 3, dtype=np.float32)          # the augmentation that changes nothing


def augmentation(rng, side):
    """One sample's augmentation: colour float32 (3, 4), RGB -> matrix, then offset; warp float32 (2, 3), pixel of the result -> pixel of the frame."""
    brightness, contrast, saturation = rng.uniform(1 - COLOUR, 1 + COLOUR, 3)
    turn = rng.uniform(-HUE, HUE) * 2 * math.pi
    grey, one = np.full((3, 3), 1 / 3), np.eye(3)
    axis = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)                                # hue: a rotation about the grey axis
    colour = grey + math.cos(turn) * (one - grey) + math.sin(turn) * axis
    colour = contrast * brightness * (saturation * one + (1 - saturation) * grey) @ colour
    offset = np.full((3, 1), (1 - contrast) * 127.5)
    angle, size = math.radians(rng.uniform(-ROTATION, ROTATION)), rng.uniform(CROP, 1)
    turned = size * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    middle = np.full(2, (side - 1) / 2)
    corner = middle + rng.uniform(-1, 1, 2) * (1 - size) * side / 2 - turned @ middle
    return np.hstack([colour, offset]).astype(np.float32), np.hstack([turned, corner[:, None]]).astype(np.float32)


def augment_cpu(frame, colour, warp):
    """uint8 (h, w, 3) -> the same, augmented; what OpenCV does in 0.5 ms takes torch 5 on a core."""
    frame = cv2.warpAffine(frame, warp, frame.shape[1::-1], flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE)
    return cv2.transform(frame, colour)


def augment_gpu(frames, colour, warp):
    """uint8 (B, F, h, w, 3) -> float (B, F, h, w, 3) in 0..255, augmented on their own device, as augment_cpu does within a grey level."""
    B, n, h, w, _ = frames.shape
    half = torch.tensor([(w - 1) / 2, (h - 1) / 2], device=frames.device)                               # grid_sample counts from -1 to 1
    turned, corner = warp[:, :, :2], warp[:, :, 2]
    theta = torch.cat([turned * half / half[:, None], ((turned @ half + corner) / half - 1)[..., None]], dim=2)
    grid = F.affine_grid(theta, (B, 3, h, w), align_corners=True).repeat_interleave(n, 0)
    x = F.grid_sample(frames.flatten(0, 1).permute(0, 3, 1, 2).float(), grid, padding_mode="border", align_corners=True)
    colour = colour.repeat_interleave(n, 0)
    x = torch.baddbmm(colour[:, :, 3:], colour[:, :, :3], x.flatten(2)).clamp(0, 255)                   # (B F, 3, h w)
    return x.transpose(1, 2).reshape(B, n, h, w, 3)


class Jobs:
    """sampler.load for torch's DataLoader: jobs[step, begin, end] -> a Batch, or what is wrong with a clip in words, which cross processes in one line."""
    def __init__(self, sampler):
        self.sampler = sampler

    def __getitem__(self, job):
        try:
            return self.sampler.load(*job)
        except UserError as e:
            return str(e)

    @staticmethod
    def begin(_):
        """In each new process: OpenCV with one thread, Ctrl-C for the parent alone, which stops it."""
        cv2.setNumThreads(1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def feed(sampler, jobs, workers, processes=False):
    """The batches of jobs (step, begin, end), in order, made ahead of time by threads, or by processes: a GPU waits for the thousand launches of each
    step, which threads that decode would hold up at Python's lock."""
    if processes:
        loader = torch.utils.data.DataLoader(Jobs(sampler), batch_size=None, sampler=jobs, num_workers=workers, worker_init_fn=Jobs.begin,
                                             pin_memory=torch.cuda.is_available())
        for batch in loader:
            if isinstance(batch, str):
                raise UserError(batch)
            yield batch
        return
    pool, waiting = ThreadPoolExecutor(workers), deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(sampler.load, *job))
            if len(waiting) > workers + 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


# ----------------------------------------------------------------------------------------------------------------- the optimiser
def groups(model):
    """What trains, as AdamW's groups: matrices decay, norms, biases and embeddings do not."""
    decay, free = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            table = name.endswith(("position_embedding.weight", "game_embedding.weight"))
            matrix = p.ndim >= 2 and not name.endswith(".b") and not table                # .b: (embodiments, n), a bias with two dimensions
            (decay if matrix else free).append(p)
    return [{"params": decay, "weight_decay": WEIGHT_DECAY}, {"params": free, "weight_decay": 0.0}]


def rate(step, args):
    """Warm-up, stable, decay (WSD): up in a straight line, constant, down to a hundredth over the last steps [P names it; lengths: O]."""
    left = (args.steps - step + 1) / (args.decay + 1) if args.decay else 1.0
    return args.lr * min(step / max(args.warmup, 1), 1.0, max(left, 0.01))


class Average:
    """EMA of the weights [P: 0.9999]. Early on it spans about the last tenth of the steps so far, or a short run would stay at its start."""

    def __init__(self, params, device, decay=EMA):
        self.params, self.decay = list(params), decay
        self.mean = [p.detach().to(device, copy=True) for p in self.params]

    @torch.no_grad()
    def update(self, step):
        decay = min(self.decay, (1 + step) / (10 + step))
        now = [p.detach().to(m.device) for p, m in zip(self.params, self.mean)]
        torch._foreach_lerp_(self.mean, now, 1 - decay)

    @contextlib.contextmanager
    def in_place(self):
        """The model holds the average within."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self):
        for p, m in zip(self.params, self.mean):
            other = p.detach().to(m.device, copy=True)
            p.copy_(m)
            m.copy_(other)


# ------------------------------------------------------------------------------------------------------------------ the model
FREEZE = {"vision": ["vision"], "mixing": ["mixing"], "all-but-head": ["vision", "mixing", "dit", "games"]}


def add_games(model, games, seed):
    """Rows in the game table for the names that a checkpoint does not know yet."""
    c, old = model.config, model.game_embedding
    new = [g for g in games if g not in c.games]
    if not new:
        return
    c.games = c.games + new
    if c.context_tokens:                                       # a context that its frames fill has no room for the game token
        c.context_tokens = max(c.context_tokens, c.frames * c.image_tokens + 1)
    model.game_embedding = torch.nn.Embedding(len(c.games) + 1, c.vision_width, padding_idx=0, scale_grad_by_freq=True)
    with torch.no_grad():
        weight = model.game_embedding.weight.normal_(0, 0.02, generator=torch.Generator().manual_seed(seed))
        weight[0] = 0                                          # row 0 = no game
        if old is not None:
            weight[:len(old.weight)] = old.weight


def build(args, games):
    """The model to train, on the CPU: a fresh preset or --ckpt, with what the command line changes in its configuration."""
    changes = {name: getattr(args, name) for name in ("hz", "horizon", "action_shift") if getattr(args, name) is not None}
    if args.resume:                                            # its frozen weights are there too, and its configuration as it was settled
        model, _ = M.load(args.resume)
    elif args.ckpt:
        model, _ = M.load(args.ckpt)
        add_games(model, games, args.seed)
        for name, value in changes.items():
            setattr(model.config, name, value)
        model.config.check()
    else:
        model = M.create(M.preset(args.preset or "toy", games=games, **changes), args.seed)
    if args.dropout is not None and not args.resume:
        for stack, blocks in (model.config.mixing, model.mixing), (model.config.dit, model.dit):
            stack.dropout = args.dropout
            for block in blocks:
                block.dropout = args.dropout
    for what in args.freeze:
        model.freeze(*FREEZE[what])
    model.checkpointing = args.checkpointing
    return model


def training_mode(model):
    """train() for what trains: a frozen part answers as it will when it plays, without dropout."""
    model.train()
    for part in (model.vision, model.mixing, model.dit):
        part.train(any(p.requires_grad for p in part.parameters()))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made inside, as long as they live. On fake tensors it tells what a step will need without computing it."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor) and x.untyped_storage() not in self.known:
                storage = x.untyped_storage()
                self.known[storage] = True
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage.nbytes()).atexit = False
        return out

    def free(self, n):
        self.now -= n


def step_bytes(model, frames, draws, dtype):
    """Most bytes alive at once in a forward and backward pass of so many frames, beside weights and gradients: counted on tensors without data."""
    from torch._subclasses.fake_tensor import FakeTensorMode                          # here: its import takes a second
    c = model.config
    with FakeTensorMode():
        fake = M.NitroGen(c)
        for mine, theirs in zip(fake.parameters(), model.parameters()):
            mine.requires_grad_(theirs.requires_grad)
            mine.grad = torch.empty_like(mine) if theirs.requires_grad else None
        fake.checkpointing = model.checkpointing
        training_mode(fake)
        actions = torch.empty(frames, c.horizon, c.action_dim)
        pictures = torch.empty(frames, c.frames, c.image, c.image, 3, dtype=torch.uint8)
        live = LiveBytes()
        with live:
            noise = torch.empty(frames * draws, c.horizon, c.action_dim)
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = cfm_loss(fake, pictures, actions, noise=noise, t=torch.empty(len(noise)))
            loss.backward()
    return live.peak


def memory(model, frames, draws, device, ema_device, dtype):
    """What training will hold: a list of (what, number of values, bytes each or None, bytes, device)."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for name, p in model.named_parameters() if not p.requires_grad and not name.startswith("vision.head."))
    rows = [("weights that train", trained, 4, device), ("weights that are frozen", frozen, 4, device), ("gradients", trained, 4, device),
            ("AdamW's two moments", trained, 8, device), ("average of the weights (EMA)", trained, 4, ema_device)]
    rows = [(what, n, each, n * each, str(where)) for what, n, each, where in rows]
    count = step_bytes(model, frames, draws, dtype)
    return rows + [(f"activations, {frames} frames x {draws} draws", None, None, count, str(device))]


def print_memory(rows):
    """The table of memory(), and its sum by device."""
    print(f"{'memory':36}{'values':>13}{'bytes each':>12}{'GB':>9}  device")
    for what, n, each, size, where in rows:
        values = "" if n is None else f"{n:,}"
        print(f"{what:36}{values:>13}{each or '':>12}{size / 1e9:9.3f}  {where}")
    for where in dict.fromkeys(r[-1] for r in rows):
        print(f"{'in all':36}{'':>25}{sum(r[3] for r in rows if r[-1] == where) / 1e9:9.3f}  {where}")


# -------------------------------------------------------------------------------------------------------------------- validation
def score(chunks, truth, mask):
    """Chunks (n, T, 25) against the truth, in file convention, where mask (n, T) -> (stick R2 over all four axes, button F1); NaN: nothing to find."""
    chunks, truth = chunks[mask], truth[mask]                                                              # (steps, 25)
    sticks, error = truth[:, -4:], chunks[:, -4:] - truth[:, -4:]
    spread = ((sticks - sticks.mean(0)) ** 2).sum()
    r2 = float(1 - (error ** 2).sum() / spread) if spread > 1e-9 else math.nan
    pressed, true = chunks[:, :-4] > 0.5, truth[:, :-4] > 0.5
    hits, wrong = (pressed & true).sum(), (pressed != true).sum()
    f1 = float(2 * hits / (2 * hits + wrong)) if true.any() else math.nan
    return r2, f1


@torch.no_grad()
def validate(model, sampler, means, device, autocast, micro):
    """Loss at fixed noise and times, and chunks sampled from fixed noise, on held-out clips -> {"loss", "r2", "f1", "policies": {policy: [r2, f1]},
    "games": {game: {policy: (r2, f1)}}}.

    Beside the model stand three policies that do not look: rest, repeat (the last action before the frame, which the model is not told) and
    mean (of the game's training clips). r2 and f1 are means over games.
    """
    model.eval()
    dim = model.config.action_dim
    sums, parts = np.zeros(2), []                              # sums: loss x actions, actions
    for begin in range(0, sampler.batch, micro):
        batch = sampler.load(0, begin, min(begin + micro, sampler.batch))
        b = batch.to(device)
        with autocast():
            loss = cfm_loss(model, b.frames, b.actions, b.mask, b.games, b.keep, b.noise, b.t)
            raw = sample_chunks(model, b.frames, b.noise[::sampler.draws], b.games, b.keep).float().cpu()
        weight = batch.mask.sum().item()
        sums += loss.item() * weight, weight
        parts.append((M.actions_out(raw).numpy(), M.actions_out(batch.actions).numpy(), batch.mask.numpy(),
                      narrow(batch.last.numpy(), dim), batch.clip.numpy()))
    chunks, truth, mask, last, clip = (np.concatenate(x) for x in zip(*parts))
    played, games = np.array([c.game for c in sampler.clips])[clip], {}                                    # (n,) names
    for game in sorted(set(played)):
        here = played == game
        mean = narrow(means.get(game, extract.neutral()), dim)
        policies = {"model": chunks[here], "rest": np.zeros_like(truth[here]), "repeat": np.repeat(last[here, None], truth.shape[1], 1),
                    "mean": np.broadcast_to(mean, truth[here].shape)}
        games[game] = {name: score(p, truth[here], mask[here]) for name, p in policies.items()}
    overall = {}
    for name in policies:
        columns = np.array([g[name] for g in games.values()]).T                                            # R2, F1 of each game
        overall[name] = [math.nan if np.isnan(x).all() else float(np.nanmean(x)) for x in columns]
    training_mode(model)
    return {"loss": float(sums[0] / sums[1]), "r2": overall["model"][0], "f1": overall["model"][1], "policies": overall, "games": games}


def print_games(result):
    """The table of a validation: a line a game, R2 and F1 of each policy."""
    names = list(result["policies"])
    width = max([8, *map(len, result["games"])]) + 2
    print(f"{'held-out':{width}}" + "".join(f"{name + ' R2':>12}{'F1':>6}" for name in names))
    for game, policies in [*result["games"].items(), ("all", result["policies"])]:
        print(f"{game:{width}}" + "".join(f"{policies[name][0]:12.3f}{policies[name][1]:6.2f}" for name in names))


# --------------------------------------------------------------------------------------------------------------- log and curve
COLUMNS = ["step", "loss", "val", "r2", "f1", "lr", "norm", "seconds"]


class Log:
    """log.csv: a line a step, what was not measured left empty. A resumed run first drops the lines that its state does not know."""

    def __init__(self, path, step):
        self.path, self.rows = path, []
        if step and path.is_file():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            rows = [dict(zip(COLUMNS, line.split(","))) for line in lines]
            self.rows = [r for r in rows if self.whole(r) and int(r["step"]) <= step]
        text = "".join(self.line(r) for r in [dict(zip(COLUMNS, COLUMNS)), *self.rows])
        extract.write_atomic(path, lambda tmp: tmp.write_text(text, encoding="utf-8"))

    @staticmethod
    def whole(row):
        """Is this row one of ours, not the header and not cut off by a kill?"""
        try:
            for text in [row["seconds"], *filter(None, row.values())]:
                float(text)
            return row["step"].isdecimal()
        except (KeyError, ValueError):
            return False

    @staticmethod
    def line(row):
        """A row, texts by column, as a line of the file."""
        return ",".join(row.get(c, "") for c in COLUMNS) + "\n"

    def add(self, **row):
        """Append one step's row."""
        self.rows.append({k: f"{v:.6g}" if isinstance(v, float) else str(v) for k, v in row.items()})
        try:
            with open(self.path, "a", encoding="utf-8") as f:
                f.write(self.line(self.rows[-1]))
        except OSError as e:
            raise UserError(f"can't write {self.path}: {e.strerror or e}: make room or close what holds it, then --resume {self.path.parent}") from None

    def column(self, name):
        """(steps, values) where the column has a value; NaN (nothing to find on the held-out clips) is none."""
        rows = [(int(r["step"]), float(r[name])) for r in self.rows if r.get(name) and math.isfinite(float(r[name]))]
        return np.array([r[0] for r in rows]), np.array([r[1] for r in rows])


def draw_curve(path, log, policies):
    """curve.png: losses on the left, R2 and F1 on the right with the best policy that does not look as a thin line."""
    picture = np.full((420, 1200, 3), 255, np.uint8)
    last = max([1, *(int(r["step"]) for r in log.rows[-1:])])

    def panel(x0, title, low, high, lines):
        box = x0 + 60, 40, x0 + 570, 370

        def place(step, value):
            y = box[3] - (np.clip(value, low, high) - low) / (high - low) * (box[3] - box[1])
            return np.stack([box[0] + np.asarray(step) / last * (box[2] - box[0]), y], -1)

        cv2.putText(picture, title, (box[0], 25), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
        for k in range(5):
            value = low + (high - low) * k / 4
            y = int(place(0, value)[1])
            cv2.line(picture, (box[0], y), (box[2], y), (225, 225, 225), 1)
            cv2.putText(picture, f"{value:.2f}", (x0 + 8, y + 4), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (90, 90, 90), 1, cv2.LINE_AA)
            x = box[0] + (box[2] - box[0]) * k // 4 - 10
            cv2.putText(picture, f"{last * k // 4}", (x, box[3] + 18), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (90, 90, 90), 1, cv2.LINE_AA)
        for i, (name, colour, thick, steps, values) in enumerate(lines):
            if len(steps):
                cv2.polylines(picture, [(place(steps, values) * 16).astype(np.int32)], False, colour, thick, cv2.LINE_AA, 4)
                seen = f"{name} {values[-1]:.3f}"
                cv2.putText(picture, seen, (box[0] - 20 + 135 * i, box[3] + 38), cv2.FONT_HERSHEY_SIMPLEX, 0.4, colour, 1, cv2.LINE_AA)

    steps, loss = log.column("loss")
    half = max(1, len(loss) // 100)                                                                        # a running mean over 2 % of the run
    smooth = np.convolve(np.pad(loss, half, "edge"), np.ones(2 * half + 1) / (2 * half + 1), "valid") if len(loss) else loss
    blue, orange, green, grey = (30, 90, 180), (230, 120, 30), (60, 150, 60), (160, 160, 160)              # RGB
    val = log.column("val")
    high = max([1e-3, *np.percentile(smooth, [99]), *val[1]]) if len(smooth) else 1.0
    panel(0, "flow matching loss", 0.0, high, [("train", blue, 1, steps, smooth), ("held out", orange, 2, *val)])
    lines = [("stick R2", green, 2, *log.column("r2")), ("button F1", orange, 2, *log.column("f1"))]
    for i, name in enumerate(("best blind R2", "best blind F1")):
        blind = [scores[i] for policy, scores in policies.items() if policy != "model" and scores[i] >= 0]   # below 0, or NaN: not drawn
        if blind:
            lines.append((name, grey, 1, np.array([0, last]), np.array([max(blind)] * 2)))
    panel(600, "sampled chunks on held-out clips", 0.0, 1.0, lines)
    extract.save_png(path, picture)


# ------------------------------------------------------------------------------------------------------------- saving, resuming
def named(model):
    """What trains, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


NOT_RECORDED = {"out", "resume", "run", "dry_run", "device", "workers"}         # may differ between two equal runs
FREE_AT_RESUME = {"data", "steps", "decay", "every", "micro", "ema_device", "compile", "checkpointing"}


def recorded(args):
    """The command line as files keep it."""
    return {k: v for k, v in vars(args).items() if k not in NOT_RECORDED}


def save_run(out, model, average, optimizer, step, args, data, metrics):
    """model.safetensors and state.safetensors, each written aside and renamed: a crash or a full disk leaves the old ones whole. The state gets
    its name last, since a state without its model could not be resumed."""
    params = named(model)
    tensors = {}
    for (name, p), mean in zip(params.items(), average.mean):
        moments = optimizer.state[p]
        tensors |= {f"weights.{name}": p.detach(), f"average.{name}": mean, f"first.{name}": moments["exp_avg"], f"second.{name}": moments["exp_avg_sq"]}
    meta = {"nitrogen": json.dumps({"step": step, "args": recorded(args), "metrics": metrics})}
    whole = {**model.state_dict(), **dict(zip(params, average.mean))}

    def write(tmp):
        try:
            M.write_tensors(tmp, tensors, meta)
            M.save(out / "model.safetensors", whole, model.config, step, recorded(args), data, metrics)
        except (OSError, M.ModelError) as e:
            again = f"--resume {out}: the files of the last save are whole" if (out / "state.safetensors").is_file() else "start again"
            raise UserError(f"can't save to {out} ({e}): make room, then {again}") from None
    extract.write_atomic(out / "state.safetensors", write)


def read_state(run):
    """state.safetensors of a run folder -> {"path", "step", "args", "metrics"}."""
    path = Path(run) / "state.safetensors"
    if not path.is_file():
        raise UserError(f"{run}: expected a run folder with state.safetensors, found none: give the --out of an earlier run")
    try:
        with M.opened(path) as f:
            meta = M.parse_json(f.metadata()["nitrogen"])
        args = dict(meta["args"])
        args["data"] = [str(folder) for folder in args["data"]]
        return {"path": path, "step": int(meta["step"]), "args": args, "metrics": dict(meta["metrics"])}
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as e:
        raise UserError(f"{path}: expected the state of a run, found another .safetensors ({e}): give the --out of an earlier run") from None


def load_state(path, model, average, optimizer, step):
    """Put a saved state back: weights, average and moments, name by name."""
    params = named(model)
    wanted = {f"{kind}.{name}": list(p.shape) for name, p in params.items()
              for kind in ("weights", "average", "first", "second")}
    with M.opened(path) as f, torch.no_grad():
        found = {name: f.get_slice(name).get_shape() for name in f.keys()}
        for name in wanted.keys() | found.keys():
            if wanted.get(name) != found.get(name):
                raise M.ModelError(f"tensor {name} does not fit this model: give the --out of an earlier run")
        for (name, p), mean in zip(params.items(), average.mean):
            p.copy_(f.get_tensor(f"weights.{name}"))
            mean.copy_(f.get_tensor(f"average.{name}"))
            first, second = (f.get_tensor(f"{kind}.{name}").to(p.device, copy=True) for kind in ("first", "second"))
            count = torch.tensor(float(step), device=p.device if p.device.type == "cuda" else "cpu")       # where AdamW keeps it itself
            optimizer.state[p] = {"step": count, "exp_avg": first, "exp_avg_sq": second}


def settle(args, parser, argv):
    """Fill in what the command line leaves open from the run that is resumed, and check it. -> (args, read_state()'s answer or None)"""
    state = read_state(args.resume) if args.resume else None
    if state:
        given, stored = args, state["args"]
        for name, value in stored.items():
            default = parser.get_default(name)
            if default is not None and type(value) is not type(default):
                raise UserError(f"{state['path']}: expected the {name} of a run, found {str(value)[:20]!r}: give the --out of an earlier run")
        args = argparse.Namespace(**{**vars(given), **stored, "out": given.resume})
        args = parser.parse_args(argv, args)                                           # what the line names wins over what is stored
        args.data = given.data or stored["data"]
        for name, value in stored.items():
            if getattr(args, name) != value and name not in FREE_AT_RESUME:
                expected = "none given" if value is None else value
                raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected {expected}, as {state['path']} was trained: "
                                f"leave it out, or start anew with --ckpt {args.resume}")
    if not args.data:
        raise UserError("expected at least one folder of clips, found none: python train.py DATA --out RUN")
    if not args.out and not args.dry_run:
        raise UserError("expected --out RUN, where the run is kept, found none: add it")
    own = args.resume and args.out and Path(args.out).resolve() == Path(args.resume).resolve()
    if args.out and not own and (Path(args.out) / "state.safetensors").is_file():
        raise UserError(f"{args.out}: expected a new folder, found a run in it: go on with --resume {args.out}, or give another --out")
    if args.ckpt and args.preset:
        raise UserError("expected --preset (a fresh model) or --ckpt (a trained one), found both: leave one out")
    extract.within(args, 1, None, "steps", "batch", "micro", "draws", "every", "workers", "val_frames")
    extract.within(args, 0, None, "warmup", "decay")
    extract.within(args, 0, 1, "game_dropout", "lr", "ema")
    extract.within(args, 0, 0.9, "val", "dropout")
    extract.within(args, 0, 1e6, "human_weight")
    extract.within(args, 1, 1000, "hz")
    return args, state


# --------------------------------------------------------------------------------------------------------------------- the run
class Team(NamedTuple):
    """The processes that share a batch, as torchrun starts them; one alone otherwise."""
    rank: int
    world: int
    device: torch.device
    reason: str

    @classmethod
    def join(cls, device):
        """Meet the others and take a device: each process its own GPU, where there are GPUs."""
        world = int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1
        if world > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        device, reason = M.pick_device(device)
        if world > 1:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(dist.get_rank() if world > 1 else 0, world, device, reason)

    def sum(self, *values):
        """Sums of numbers over all processes."""
        if self.world == 1:
            return values
        x = torch.tensor(values, dtype=torch.float64 if self.device.type == "cpu" else torch.float32, device=self.device)
        dist.all_reduce(x)
        return x.tolist()


@contextlib.contextmanager
def signals():
    """Within, SIGINT and SIGTERM only set .stop, so that the step in hand is finished and saved; a second one ends at once."""
    class Asked:
        stop = False
    before = {}

    def handle(number, _):
        Asked.stop = True
        signal.signal(number, before[number])
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, handle)
    except ValueError:                                         # not the main thread: whoever runs us there stops us in another way
        pass
    try:
        yield Asked
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def keep_memory():
    """Let glibc keep what is freed: a step on a CPU asks for the same hundreds of megabytes as the one before, and the kernel would clear each page of
    them anew, a tenth to a quarter of the step's time. Elsewhere nothing happens."""
    with contextlib.suppress(OSError, TypeError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 1 << 28)):     # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD of malloc.h
            mallopt(option, value)


def clock(seconds):
    """Seconds -> 0:12 or 1:02:03."""
    minutes, s = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{s:02}" if minutes >= 60 else f"{minutes}:{s:02}"


@contextlib.contextmanager
def alone(out, team):
    """RUN/.lock is held within, by the team's first process for all of them; none goes on where another run holds it."""
    wrong = None
    with contextlib.ExitStack() as held:
        if out and team.rank == 0:
            try:
                held.enter_context(extract.lock(Path(out) / ".lock"))
            except (UserError, OSError) as e:
                wrong = e
        if team.sum(float(wrong is not None))[0]:
            raise wrong or SystemExit(2)
        yield


def train(args, parser, argv):
    """One run, from the command line to the last save."""
    settled, _ = settle(args, parser, argv)
    team = Team.join(settled.device)
    try:
        with alone(None if settled.dry_run else settled.out, team):
            args, state = settle(args, parser, argv)           # again: while nobody held the lock the run may have gone on
            run(args, state, team)
    except torch.OutOfMemoryError:
        raise UserError(f"out of memory on {team.device}: expected room for --micro {args.micro} and what the table names, found too little: lower --micro, "
                        "or add --dtype bfloat16, --checkpointing, --freeze vision or --ema-device cpu") from None
    finally:
        if team.world > 1:
            dist.destroy_process_group()


def prepare(args, team, say):
    """Data and model: (model, training clips, held-out clips, {game: id}). Fills in what depends on the model: lr, warm-up, decay, micro-batch."""
    games = set()
    if args.game_ids and not args.resume:
        games = {game_of(extract.read_clip(path)) for folder in args.data for path in extract.clips_in(folder)}
    model = build(args, sorted(games))
    c = model.config
    clips = load_clips(args.data, c, args.truth, args.human_weight, say)
    if args.lr is None:
        # [P: 1e-4 at D 1024]; narrower nets take more [O: at D 96 twice as much learns less]
        args.lr = float(f"{1e-4 * max(1.0, 1024 / c.width):.1e}")
    args.warmup = min(500, args.steps // 20 + 1) if args.warmup is None else args.warmup
    args.decay = args.steps // 5 if args.decay is None else args.decay
    args.micro = min(args.micro or args.batch, args.batch // team.world or 1)
    share = max(extract.cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)                          # of this machine's cores
    most = 16 if team.device.type == "cuda" and sys.platform == "linux" else 4         # elsewhere a process costs a whole import of torch
    args.workers = args.workers or min(most, max(share - (team.device.type == "cuda"), 1))
    if args.batch % (args.micro * team.world):
        raise UserError(f"--batch {args.batch}: expected a multiple of {team.world} process(es) x --micro {args.micro}, found none: change one of them")
    ids = {name: i + 1 for i, name in enumerate(c.games)}
    training, held = split(clips, args.val)
    rates = ", ".join(f"{r:g}" for r in sorted({clip.fps for clip in clips}))
    hours = sum(clip.n / clip.fps for clip in clips) / 3600
    say(f"{len(clips)} clips of {len({clip.game for clip in clips})} game(s), {hours:.2f} h at {rates} frames/s, actions at {c.hz:g} Hz | "
        f"{sum(len(clip.kept) for clip in clips):,} frames to start from | {len(held)} clips held out")
    return model, training, held, ids


def run(args, state, team):
    """Train; every process of a team runs this on its share of each batch."""
    cv2.setNumThreads(1)                                                 # the loader's threads are enough
    keep_memory()
    say = print if team.rank == 0 else lambda text: None
    model, training, held, ids = prepare(args, team, say)
    device, config = team.device, model.config
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")
    ema_device = torch.device("cpu") if args.ema_device == "cpu" else device
    say(f"{M.count(model)[0]:,} parameters, {sum(p.numel() for p in named(model).values()):,} train | {device} ({team.reason}), {team.world} process(es) | "
        f"batch {args.batch} in parts of {args.micro}, {args.draws} draws | lr {args.lr:g}")
    if team.rank == 0:
        print_memory(memory(model, args.micro, args.draws, device, ema_device, args.dtype))
    training_mode(model.to(device))
    average = Average(named(model).values(), ema_device, args.ema)
    optimizer = torch.optim.AdamW(groups(model), lr=args.lr, betas=BETAS, fused=device.type != "mps")
    start, metrics = 0, {}
    if state:
        start, metrics = state["step"], state["metrics"]
        load_state(state["path"], model, average, optimizer, start)
        if start >= args.steps:
            raise UserError(f"{args.resume}: expected a run with steps left, found {start} of {args.steps} done: give more --steps")
    net = torch.compile(model) if args.compile else model
    if team.world > 1:
        net = torch.nn.parallel.DistributedDataParallel(net, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True)
    sampler = Sampler(training, config, args.batch, args.draws, args.seed, args.balance, not args.no_augment, ids, args.game_dropout,
                      on_cpu=device.type == "cpu")
    check = None
    if held:
        check = Sampler(held, config, min(args.val_frames, sum(len(c.kept) for c in held)), 4, balance=True, augment=False, game_ids=ids)
    means = {}
    for game in {c.game for c in training}:
        mine = [c for c in training if c.game == game]
        means[game] = sum(c.sum for c in mine) / sum(c.n for c in mine)
    data = {"clips": len(training), "held": sorted(c.folder.name for c in held), "frames": sum(len(c.kept) for c in training),
            "games": sorted(means), "hole": usual_hole(training)}
    parts = args.batch // (args.micro * team.world)
    last = start + 2 if args.dry_run else args.steps                     # the first step to hold gradients, moments and activations at once is the second
    begins = [(part * team.world + team.rank) * args.micro for part in range(parts)]                       # this process's share of a batch
    jobs = ((step, begin, begin + args.micro) for step in range(start + 1, last + 1) for begin in begins)
    out = None if args.dry_run else Path(args.out)
    log, line = None, extract.Line(team.rank > 0)
    if out and team.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        log = Log(out / "log.csv", start)
    before = float(log.rows[-1]["seconds"]) if log and log.rows else 0.0
    params, batches, smooth = list(named(model).values()), feed(sampler, jobs, args.workers, device.type == "cuda"), None
    began = time.perf_counter()                                          # monotonic() stands still for 15 ms on Windows
    with signals() as asked, contextlib.closing(batches):
        for step in range(start + 1, last + 1):
            lr, total = rate(step, args), sampler.total(step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            # --- one step: everything below the next line is book-keeping
            loss = torch.zeros((), device=device)
            for part in range(parts):
                b = next(batches).to(device)
                torch.manual_seed(zlib.crc32(f"{args.seed} {step} {part} {team.rank}".encode()))           # of dropout: nothing to save for a resume
                frames = b.frames if device.type == "cpu" or args.no_augment else augment_gpu(b.frames, b.colour, b.warp)
                quiet = net.no_sync() if team.world > 1 and part < parts - 1 else contextlib.nullcontext()  # gradients meet once a step
                with quiet:
                    with autocast():
                        share = cfm_loss(net, frames, b.actions, b.mask, b.games, b.keep, b.noise, b.t, total)
                    (share * team.world).backward()                                                        # DDP takes the mean over processes
                loss += share.detach()
            norm = torch.nn.utils.clip_grad_norm_(params, CLIP)              # a list: a generator would be empty at its second reading
            loss, stop = team.sum(loss.item(), float(asked.stop))
            smooth = loss if smooth is None else 0.9 * smooth + 0.1 * loss
            if not (math.isfinite(norm.item()) and smooth < DIVERGED):       # before it reaches the weights
                raise UserError(f"diverged at step {step}: expected a loss below {DIVERGED:g} (a velocity of 0 has less than 2), "
                                f"found {loss:.3g} with a gradient of {norm.item():.3g}: "
                                f"lower --lr {args.lr:g}" + (f"; the last save is in {out}" if out and (out / "state.safetensors").is_file() else ""))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average.update(step)
            # ---
            took = time.perf_counter() - began
            row = {"step": step, "loss": loss, "lr": lr, "norm": norm.item(), "seconds": before + took}
            ends = step == last or stop
            if team.rank == 0 and check and out and (step % args.every == 0 or step == last):
                with average.in_place():
                    metrics = validate(model, check, means, device, autocast, args.micro)
                row |= {"val": metrics["loss"], "r2": metrics["r2"], "f1": metrics["f1"]}
            speed, done = args.batch * (step - start) / took, (step - start) / (last - start)
            seen = f" | val {row['val']:.4f} | R2 {row['r2']:.3f} | F1 {row['f1']:.3f}" if "val" in row else ""
            line.show(f"step {step}/{last} | loss {loss:.4f}{seen} | lr {lr:.1e} | {speed:.0f} img/s | {clock(took)}<{clock(took / done - took)}",
                      bool(seen) or ends)
            if log:
                log.add(**row)
                if step % args.every == 0 or ends:
                    save_run(out, model, average, optimizer, step, args, data, metrics)
                    draw_curve(out / "curve.png", log, metrics.get("policies", {}))
            if stop and step < last:
                say(f"saved at step {step} | go on with --resume {out}" if out else "nothing was written")
                raise KeyboardInterrupt
    if team.rank == 0 and metrics:
        print_games(metrics)
    if team.rank == 0 and device.type == "cuda":
        print(f"most GPU memory held: {torch.cuda.max_memory_allocated(device) / 1e9:.3f} GB")


def main(argv=None):
    """Parse the command line and train."""
    argv = sys.argv[1:] if argv is None else argv
    p = extract.Parser(prog="train.py", description="Train the policy by conditional flow matching.", allow_abbrev=False)
    p.add_argument("data", nargs="*", help="folders of clip folders with actions (extract.py + parse.py, play.py --record, bench.py record)")
    p.add_argument("--out", metavar="RUN", help="folder of the run")
    p.add_argument("--preset", choices=M.PRESETS, help="size of a fresh model (default toy)")
    p.add_argument("--ckpt", metavar="F", help="weights to start from instead: a .safetensors or a run folder (a new optimiser and schedule)")
    p.add_argument("--resume", metavar="RUN", help="go on with a run where it stopped; --steps may grow, what shapes the run may not change")
    p.add_argument("--freeze", nargs="+", default=[], choices=FREEZE,
                   help="parts that keep their weights; all-but-head trains the action encoder and decoder only")
    p.add_argument("--steps", type=int, default=3000, help="optimiser steps (default 3000)")
    p.add_argument("--batch", type=int, default=64, help="frames a step, over all processes (default 64; 4096 in the release)")
    p.add_argument("--micro", type=int, help="frames of one forward pass of one process; the rest is accumulated (default: the whole share)")
    p.add_argument("--draws", type=int, default=4, metavar="r",
                   help="noises and times for each encoded frame (default 4: after a toy run's first minutes the lowest loss at equal time)")
    p.add_argument("--lr", type=float, help="constant phase of AdamW's rate (default 1e-4 [paper] at width 1024, more for narrower ones: toy 1.1e-3)")
    p.add_argument("--warmup", type=int, help="steps of rising rate (default a twentieth of the steps, at most 500)")
    p.add_argument("--decay", type=int, help="steps of falling rate at the end (default a fifth of the steps)")
    p.add_argument("--ema", type=float, default=EMA, help=f"decay of the weights' average (default {EMA} [paper], warmed up)")
    p.add_argument("--ema-device", choices=("same", "cpu"), default="same", help="where the average lives; cpu saves 4 bytes a weight of GPU memory")
    p.add_argument("--dropout", type=float, help="replace the dropout of mixing and DiT (default: the preset's or the checkpoint's)")
    p.add_argument("--no-augment", action="store_true", help="no change of colour, rotation and crop")
    p.add_argument("--balance", action="store_true", help="every game alike (default: every kept frame alike)")
    p.add_argument("--human-weight", type=float, default=1.0, metavar="W", help="weight of frames where a person took over (human.npy; default 1)")
    p.add_argument("--truth", action="store_true", help="learn from truth.npy instead of actions.npy, to see what the labels cost")
    p.add_argument("--game-ids", action="store_true", help="tell the model which game it plays (clip.json's \"game\")")
    p.add_argument("--game-dropout", type=float, default=0.2, metavar="P",
                   help="share of samples without their game, which sample.py --cfg needs (default 0.2)")
    p.add_argument("--hz", type=float, help="actions a second (default: the preset's or the checkpoint's)")
    p.add_argument("--horizon", type=int, help="actions of a chunk (default: the preset's or the checkpoint's)")
    p.add_argument("--action-shift", type=int, help="actions between the frame and the chunk's first (default: the preset's or the checkpoint's)")
    p.add_argument("--val", type=float, default=0.1, help="share of the clips held out (default 0.1; 0 = none)")
    p.add_argument("--val-frames", type=int, default=256, help="frames of a validation, every game alike (default 256)")
    p.add_argument("--every", type=int, default=250, help="steps between validations and saves (default 250)")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of matrix products (autocast); bfloat16 pays on GPUs (default float32)")
    p.add_argument("--compile", action="store_true", help="torch.compile the model: a minute at the start (default off)")
    p.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass: less memory, a third more time")
    p.add_argument("--workers", type=int, help="threads that decode frames, beside a GPU processes (default: at most 4, beside a GPU on Linux 16)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default auto)")
    p.add_argument("--seed", type=int, default=0, help="of everything drawn (default 0)")
    p.add_argument("--dry-run", action="store_true", help="check the data, print the memory table, take two steps, write nothing")
    p.set_defaults(run=lambda args: train(args, p, argv))
    return extract.cli(p, argv, M.ModelError)


if __name__ == "__main__":
    sys.exit(main())
