"""Sample actions: the Euler sampler, sessions over it, scores against labelled clips, labels for clips that
have none, pictures of what is predicted, a server. Paper §3.4, arXiv 2601.02427.

    python sample.py image A.png [B.png ...] --ckpt F --out chunk.npy  frames, oldest first -> float32 (T, 25)
    python sample.py video IN.mp4 --ckpt F --out OUT.mp4               the predicted pad beside each frame
    python sample.py score DATA --ckpt F [--video OUT.mp4]             R2 and F1 of chunks on labelled clips
    python sample.py label DATA --ckpt IDM                             actions for clips that have none
    python sample.py serve --ckpt F [--host 127.0.0.1 --port 5555]     the policy for play.py --server

F is a .safetensors or a run folder. A Policy is loaded once and shared; a Session holds what one player has
seen; both are what play.py and bench.py use. Letters as in model.py: B batch, F context frames, N image
tokens, T actions of a chunk, A action dims, V vision width, k steps. What `--raw` writes is the sampler's own
tensor, float32 (T, A): sticks (v + 1) / 2, nothing thresholded or clamped. `label` adds actions.npy,
confidence.npy, keep.npy to a clip's folder (extract.py) and "labels": "inverse" to its clip.json; IDM is of
train.py --inverse: it sees what comes after a chunk too, and so can't play.
"""
import contextlib
import copy
import functools
import itertools
import math
import multiprocessing.connection as mpc
import signal
import socket
import sys
import threading
import traceback
from collections import deque
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
import extract                       # before torch, whose threads it keeps from spinning
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

import model as M
from extract import UserError, draw, number, reading, shrink


class Session:
    """What one player, or B environments side by side, have seen. The same seed, frames and batch size give
    the same actions."""

    def __init__(self, policy, game=None, seed=0, envs=1):
        c = policy.config
        if c.future:
            raise UserError(f"{policy.name}: expected a policy, found an inverse model, which needs the "
                            "frames to come: label clips with it (sample.py label) and train on them")
        self.policy, self.envs, self.game = policy, envs, None
        self.seen = torch.zeros(envs, c.frames, c.image_tokens, c.vision_width)           # (B, F, N, V)
        self.keep = torch.zeros(envs, c.frames, dtype=torch.bool)                # which of them there are yet
        self.noise = [torch.Generator() for _ in range(envs)]
        self.reset(seed=seed, game=game)

    def reset(self, env=None, seed=None, game=None):
        """Forget what was seen and restart the noise, for one environment or all; seed and game (one for all)
        stay as they are where not given. Environment i draws from seed + i."""
        game = self.game if game is None else game
        self.game_id = self.policy.game_id(game)   # first: an unknown game leaves the session as it was
        self.game, self.seed = game, self.seed if seed is None else seed
        for i in range(self.envs) if env is None else [env]:
            self.keep[i] = False
            self.noise[i].manual_seed((self.seed + i) % 2**63)

    def predict(self, rgb):
        """uint8 (h, w, 3) -> float32 (T, 25), or (B, h, w, 3) -> (B, T, 25); file convention."""
        return M.actions_out(self.predict_raw(rgb)).numpy()

    def predict_raw(self, rgb, noise=None):
        """The same before decoding: (T, A) or (B, T, A) in the model's convention. noise float32 of that
        shape replaces the seeded one."""
        rgb, c = np.asarray(rgb), self.policy.config
        frames = rgb if rgb.ndim == 4 else rgb[None]
        if rgb.dtype != np.uint8 or frames.shape != (self.envs, *frames.shape[1:3], 3):
            raise UserError(f"expected {self.envs} frame(s) of uint8 (h, w, 3), "
                            f"found {rgb.dtype} {rgb.shape}")
        self.see(frames)
        if noise is None:
            noise = torch.stack([torch.randn(c.horizon, c.action_dim, generator=g) for g in self.noise])
        noise = torch.as_tensor(noise).reshape(self.envs, c.horizon, c.action_dim)        # (B, T, A)
        raw = self.policy.chunk(self.seen, self.keep, torch.full([self.envs], self.game_id), noise)
        if not torch.isfinite(raw).all():
            raise UserError(f"{self.policy.name}: expected numbers, the model gives NaN or infinity: use "
                            "--dtype float32 and a smaller --cfg, or another checkpoint")
        return raw if rgb.ndim == 4 else raw[0]

    def see(self, frames):
        """Take in the next frame of each environment, uint8 (B, h, w, 3)."""
        tokens = self.policy.see(np.stack([[shrink(frame)] for frame in frames]))         # (B, 1, N, V)
        self.seen = torch.cat([self.seen[:, 1:].to(tokens), tokens], 1)
        self.keep = self.keep.roll(-1, 1)
        self.keep[:, -1] = True

    def info(self):
        """What a player needs to know, as JSON can carry it."""
        p = self.policy
        return {"model": p.name, "step": p.meta.get("step"), "steps": p.steps, "guidance": p.guidance,
                "game": self.game, "device": str(p.device), "dtype": p.dtype, "config": asdict(p.config)}


class Policy:
    """A checkpoint ready to sample, shared by sessions and threads. Vision runs once a frame; mixing, keys
    and values once a chunk; time codes and AdaLN of all steps once and for all. (The release redoes all but
    vision each step.)"""

    def __init__(self, ckpt, device="auto", dtype="float32", steps=None, guidance=0.0):
        self.device, self.reason = M.pick_device(device)
        self.model, self.meta = M.load(ckpt, self.device, getattr(torch, dtype))
        self.name, self.config, self.dtype, self.guidance = str(ckpt), self.model.config, dtype, guidance
        self.steps = steps or self.config.steps
        with reading(ckpt, "data with a hole of [x0, y0, x1, y1] pixels, if any"):
            x0, y0, x1, y1 = map(int, (self.meta.get("data") or {}).get("hole") or [0] * 4)
        self.hole = np.s_[..., y0:y1, x0:x1, :]
        self.lock, self.graphs = threading.Lock(), {}
        with torch.inference_mode():
            times = self.model.times(buckets(self.steps, self.config.buckets).to(self.device))
        self.run = functools.partial(euler, self.model, steps=self.steps, guidance=guidance, times=times)

    @torch.inference_mode()
    def see(self, frames):
        """uint8 (B, F, 256, 256, 3) -> image tokens (B, F, N, V). If the overlay was blacked out in
        every training clip, its most frequent place is black here too."""
        frames = np.array(frames)
        frames[self.hole] = 0
        with self.lock:
            return self.model.see(torch.from_numpy(frames).to(self.device))

    @torch.inference_mode()
    def chunk(self, seen, keep, games, noise):
        """Image tokens (B, F, N, V), which of them exist (B, F), game ids (B,), noise (B, T, A) -> the
        sampler's tensor (B, T, A)."""
        keep, games, noise = (x.to(self.device) for x in (keep, games, noise))
        with self.lock:
            x = self.model.assemble(seen, games, keep)                                    # (B, L, V)
            if self.guidance:      # unconditional = the newest frame, no game; the release forgets both games
                x = torch.cat([x, self.model.assemble(seen[:, -1:])])
            context, run = self.model.mix(x), self.run
            if self.device.type == "cuda":
                if noise.shape not in self.graphs:         # the first chunk of this batch size
                    self.graphs[noise.shape] = cuda_graph(run, context, noise)
                run = self.graphs[noise.shape]
            return run(context, noise).float().cpu()

    def game_id(self, game):
        """--game ID|NAME -> the id; None = no game."""
        names = ["None", *self.config.games]
        known = [*names, *map(str, range(len(names)))]
        if str(game) not in known:
            raise UserError(f"game {game!r} is not known to {self.name}: "
                            f"its games are {', '.join(names[1:21]) or 'none'}")
        return known.index(str(game)) % len(names)                     # names, then ids: in the same order


@torch.inference_mode()
def euler(model, context, noise, steps=None, guidance=0.0, times=None):
    """Follow the velocity from noise (B, T, A) at t = 0 to actions (B, T, A) at t = 1 in k steps, x += v / k
    [§3.4]. times: model.times of all steps, where they are at hand.

    guidance s: context is of 2 B rows, the second half unconditional, so that one pass reads the weights for
    both: v = cond + s (cond - uncond); 0 is off [R; its docstring says (1 - s) u + s c, its code does this].
    """
    k, x = steps or model.config.steps, noise                                         # (B, T, A)
    if times is None:
        times = model.times(buckets(k, model.config.buckets).to(noise.device))
    for i in range(k):
        if guidance:
            v, u = model.step(torch.cat([x, x]), times[i:i + 1], context).chunk(2)
            v = v + guidance * (v - u)
        else:
            v = model.step(x, times[i:i + 1], context)                                   # (B, T, A)
        x = x + v / k
    return x


def buckets(k, n):
    """The k times 0, 1/k, ... as bucket numbers, truncated as the release does: k = 16 of 1000 -> 0, 62, 125,
    ..."""
    return torch.tensor([int(i / k * n) for i in range(k)])


# -------------------------------------------------------------------------------------------------- the clips
OPEN_CLIPS = 100                     # clips held open at a time, two files each: under every system's limit


@functools.lru_cache(OPEN_CLIPS)
def open_clip(folder, file):
    """A clip's extract.Frames and its actions, float32 (n, 25): those of `file`, memory-mapped; zeros where
    that is ""."""
    frames, path = extract.Frames(folder), folder / file
    if not file:
        return frames, np.broadcast_to(extract.neutral(), (frames.n, extract.A))
    if not path.is_file():
        raise UserError(f"{path}: expected actions, found none: add them (parse.py run, sample.py "
                        "label) or give a folder of labelled clips alone")
    return frames, extract.read_npy(path, np.float32, (None, None))


class Clip:
    """One clip folder, checked: which frames may start a chunk, and chunks at the model's rate from any
    rate. Of a frame it holds six bytes: clips are many, and their files stay on the disk."""

    def __init__(self, folder, config, file="actions.npy", human_weight=1.0, begin=0, end=None):
        """file: where its actions are, "" = it has none. Only the rows begin .. end count."""
        self.folder, self.file, self.config = Path(folder), file, config
        meta, self.n, self.human_weight = extract.read_clip(folder), self.frames.n, human_weight
        extract.check_actions(self.folder / file, self.actions, self.n)
        self.fps, self.hole = meta["fps"], meta.get("hole")
        self.game = str(meta.get("game") or "unknown")
        self.game_id = config.games.index(self.game) + 1 if self.game in config.games else 0
        with reading(self.folder / "clip.json", 'a whole number of rows as "lag"'):
            self.lag = int(meta.get("lag") or 0)                              # rows that the labels come late
        self.ratio = self.fps / config.hz                                    # rows of the clip for one action
        end = self.n if end is None else end
        self.cuts = np.union1d(np.flatnonzero(self.flags("cuts.npy", False)), [begin, end])
        rows = self.frames.numbers
        keep = self.flags(file and "keep.npy", True)       # no actions: of a `label` that was stopped
        rows = rows[keep[rows] & (begin <= rows) & (rows < end)].astype(np.int32)
        mask = self.mask(rows)                                                                     # (m, T)
        good = mask[:, 0] & (rows + config.offsets[-1] * self.ratio + 1e-6 < self.end(rows))
        # Of the frames that may start a chunk, whose first action and last picture are there: their rows,
        # int32, and how many of their actions count.
        self.rows, self.lengths = rows[good], mask[good].sum(1, dtype=np.uint16)
        self.size, self.sum = end - begin, self.actions[begin:end].sum(0, dtype=np.float64)
        human = self.flags("human.npy", False)[self.rows]
        weights = np.where(human, human_weight, 1.0)
        self.weight = weights.sum()
        self.cumulative = np.cumsum(weights) if human.any() else None       # else each weighs 1: no table

    @property
    def frames(self):
        """Its extract.Frames."""
        return open_clip(self.folder, self.file)[0]

    @property
    def actions(self):
        """float32 (n, 25), memory-mapped; zeros where it has none."""
        return open_clip(self.folder, self.file)[1]

    def flags(self, name, default):
        """A bool (n,) file of the clip; the default everywhere where there is none."""
        path = self.folder / name
        return extract.read_npy(path, bool, (self.n,)) if path.is_file() else np.full(self.n, default)

    def part(self, begin, end):
        """The same clip, of whose rows begin .. end alone count."""
        return Clip(self.folder, self.config, self.file, self.human_weight, begin, end)

    def pick(self, share):
        """Which of its frames that may start a chunk is at a share 0 .. 1 of their weights, one after
        another."""
        if self.cumulative is None:
            return int(share * len(self.rows))
        return min(np.searchsorted(self.cumulative, share * self.weight, "right"), len(self.rows) - 1)

    def end(self, row):
        """Rows (...) of frames -> the row of the next cut after each, or the clip's end."""
        return self.cuts[np.searchsorted(self.cuts, row, "right")]

    def edges(self, row):
        """Rows (...) of frames -> (..., T + 1): the row at which each action begins, and where the last one
        ends."""
        steps = self.config.action_shift + np.arange(self.config.horizon + 1)
        return self.lag + np.floor(np.asarray(row)[..., None] + steps * self.ratio + 1e-6).astype(np.int64)

    def mask(self, row):
        """Rows (...) of frames -> which of their actions lie within the clip and before the next cut, bool
        (..., T)."""
        begin = self.edges(row)[..., :-1]
        return (0 <= begin) & (begin < self.end(row)[..., None])

    def chunk(self, row):
        """Row of a frame -> actions float32 (T, 25), mask bool (T,) (False: past a cut or the clip's end).

        A faster clip: a button counts as pressed when it was at any of the action's rows. A slower one: a row
        is held. Sticks: the first row.
        """
        end, rows = self.end(row), np.asarray(self.actions)
        edges = self.edges(row).clip(0, end)
        begin = np.minimum(edges[:-1], end - 1)            # what is masked holds the last row
        out = rows[begin]
        out[:, :-4] = [rows[a:max(b, a + 1), :-4].max(0) for a, b in zip(begin, edges[1:])]
        return out, self.mask(row)

    def pictures(self, row):
        """Row of a frame -> it and its context, uint8 (F, 256, 256, 3), oldest first, and bool (F,): which of
        them the clip has, with no cut between."""
        frames, c = self.frames, self.config
        out, keep = np.zeros((c.frames, c.image, c.image, 3), np.uint8), np.zeros(c.frames, bool)
        then = row + np.multiply(c.offsets, self.ratio) + 1e-6
        with reading(self.folder, f"frames of {c.image} x {c.image}"):
            for k, i in enumerate(np.searchsorted(frames.numbers, then, "right") - 1):
                if i >= 0 and self.end(frames.numbers[i]) == self.end(row):
                    out[k], keep[k] = frames[i], True
        return out, keep


def load_clips(data, config, file="actions.npy", human_weight=1.0, say=print):
    """Every clip of the folders `data` that has a chunk to learn from; one line names those left out,
    UserError when none is left."""
    clips = [Clip(folder, config, file, human_weight) for path in data for folder in extract.clips_in(path)]
    good = [clip for clip in clips if len(clip.rows)]
    short = [clip for clip in clips if not len(clip.rows)]
    for clip in good:
        clip.pictures(clip.rows[0])                            # a broken first picture is told now
    if short:
        why = (f"{short[0].folder}: {short[0].n} rows, none of its frames may start a chunk "
               "(too short, or all filtered out by keep.npy)")
        if not good:
            raise UserError(f"{why}: expected clips to use, found {len(short)} like it: give longer")
        say(f"left out {len(short)} clip(s) | {why}")
    return good


def per_game(clips):
    """{game: its clips}, by name."""
    games = {}
    for clip in sorted(clips, key=lambda clip: clip.game):
        games.setdefault(clip.game, []).append(clip)
    return games


def mean_actions(clips):
    """{game: the mean action of its clips, float64 (25,)}."""
    return {game: sum(c.sum for c in mine) / sum(c.size for c in mine)
            for game, mine in per_game(clips).items()}


# ------------------------------------------------------------------------------------------------- the scores
def run_score(args):
    """Chunks of any checkpoint, one after another through labelled clips, against what was played."""
    policy = policy_of(args)
    clips = load_clips(args.data, policy.config)
    starts = [start for mine in per_game(clips).values() for start in one_after_another(mine)[:args.limit]]
    chunks = M.actions_out(chunks_at(policy, starts, args.seed, args.game)[0]).numpy()
    print_scores(scores(chunks, starts, mean_actions(clips)))
    print("A policy that reacts can play well and yet score below those that do not look: play is the judge.")
    if args.lag:
        print_lags(chunks, starts)
    if args.out:
        write_film(args.out, policy.config.hz, film_chunks(chunks, starts))


def one_after_another(clips, step=1.0):
    """[(clip, row)]: the first frame that may start a chunk in each window of `step` horizons."""
    starts = []
    for clip in clips:
        windows = clip.rows // max(step * clip.config.horizon * clip.ratio, 1)
        starts += [(clip, row) for row in clip.rows[np.unique(windows, return_index=True)[1]]]
    return starts


def chunks_at(policy, starts, seed=0, game=None, draws=1, batch=32):
    """The sampler's chunks, float32 (draws, n, T, A), at [(clip, row of a frame)] * n, each seen once; of
    each clip's own game where none is given."""
    c, g, parts = policy.config, torch.Generator().manual_seed(seed), []
    for i in tqdm(range(0, len(starts), batch), mininterval=1, leave=False):
        some = starts[i:i + batch]
        frames, keep = map(np.stack, zip(*(clip.pictures(row) for clip, row in some)))
        games = [policy.game_id(game) if game else clip.game_id for clip, _ in some]
        seen = policy.see(frames), torch.from_numpy(keep), torch.tensor(games)
        noise = torch.randn(draws, len(some), c.horizon, c.action_dim, generator=g)
        parts.append(torch.stack([policy.chunk(*seen, of_draw) for of_draw in noise]))
    return torch.cat(parts, 1)


def scores(chunks, starts, means):
    """Chunks (n, T, 25) in file convention, predicted at [(clip, row of a frame)] * n -> {"policies":
    {policy: [R2, F1, onset F1]}, the means over games, "games": {game: {policy: the same}}, "n": {game:
    chunks}}.

    Beside the model stand three policies that do not look: rest, repeat (the last action before the frame,
    which the model is not told) and mean (means: {game: an action}).
    """
    truth, mask = map(np.stack, zip(*(clip.chunk(row) for clip, row in starts)))
    played, rest = [clip.game for clip, _ in starts], extract.neutral()
    policies = {"model": chunks, "rest": rest,
                "repeat": np.stack([c.actions[max(row - 1 + c.lag, 0)] for c, row in starts])[:, None],
                "mean": np.stack([means.get(game, rest) for game in played])[:, None]}
    policies = {name: np.broadcast_to(chunk, truth.shape) for name, chunk in policies.items()}
    games = {}
    for game in sorted(set(played)):
        here = np.array(played) == game
        games[game] = {name: score_chunks(chunk[here], truth[here], mask[here])
                       for name, chunk in policies.items()}
    table = np.ma.masked_invalid([[*row.values()] for row in games.values()])      # (games, policies, 3)
    overall = dict(zip(policies, table.mean(0).filled(math.nan).tolist()))
    return {"policies": overall, "games": games, "n": {game: played.count(game) for game in games}}


def score_chunks(chunks, truth, mask):
    """Chunks (n, T, 25) against the truth, in file convention, where mask (n, T) -> (stick R2 over all four
    axes, button F1, F1 of onsets: presses and releases within NEAR actions); NaN: nothing to find."""
    error, sticks = (chunks - truth)[mask][:, -4:], truth[mask][:, -4:]                      # (actions, 4)
    spread = ((sticks - sticks.mean(0)) ** 2).sum()
    r2 = float(1 - (error ** 2).sum() / spread) if spread > 1e-9 else math.nan
    pressed, true = (mask[..., None] & (x[..., :-4] > 0.5) for x in (chunks, truth))
    (found, near_found), (turned, near_turned) = onsets(pressed, mask), onsets(true, mask)
    caught = min((found & near_turned).sum(), (turned & near_found).sum())
    return r2, f1((pressed & true).sum(), pressed, true), f1(caught, found, turned)


NEAR = 2                                   # actions from a press or release to one that is taken for it


def f1(hits, found, true):
    """2 hits / (found + true), the harmonic mean of precision and recall; NaN where nothing is true."""
    return float(2 * hits / (found.sum() + true.sum())) if true.any() else math.nan


def onsets(pressed, mask):
    """Buttons bool (n, T, 21) -> presses and releases, bool (n, T - 1, 42), where both steps count, and
    where one of them lies within NEAR steps."""
    turn = np.diff(pressed.astype(np.int8), axis=1) * (mask[:, 1:] & mask[:, :-1])[..., None]
    turned = np.concatenate([turn > 0, turn < 0], 2)
    padded = np.pad(turned, ((0, 0), (NEAR, NEAR), (0, 0)))
    return turned, np.lib.stride_tricks.sliding_window_view(padded, 2 * NEAR + 1, axis=1).any(-1)


def print_lags(chunks, starts):
    """For each clip by how many rows, -8 to 8, its labels come later than the chunks say: where these miss
    them least."""
    for clip, mine in itertools.groupby(zip(starts, chunks), lambda pair: pair[0][0]):
        rows, said = zip(*((row, chunk) for (_, row), chunk in mine))
        late, miss = copy.copy(clip), {}
        for lag in range(-8, 9):
            late.lag = clip.lag + lag
            truth, mask = map(np.stack, zip(*map(late.chunk, rows)))
            miss[lag] = ((said - truth)[mask] ** 2).mean()
        best = min(miss, key=miss.get)
        print(f"{clip.folder.name} | lag {best:+} rows: error {miss[best]:.4f}, {miss[0]:.4f} as it is")


# ------------------------------------------------------------------------------------------------- the labels
DRAWS = 4                                  # samples of each chunk that labels are the mean of [O]


def run_label(args):
    """Actions for clips that have none, by an inverse model."""
    policy = policy_of(args)
    if not policy.config.future:
        raise UserError(f"{args.ckpt}: expected an inverse model, which sees what comes after, found a "
                        "policy: train one with train.py DATA --inverse")
    folders = [folder for data in args.data for folder in extract.clips_in(data)]
    bare = [folder for folder in folders if not (folder / "actions.npy").is_file()]
    print(f"{len(bare)} of {len(folders)} clips have no actions yet")
    for clip in load_clips(bare, policy.config, "") if bare else ():
        with extract.lock(clip.folder / ".lock"):
            actions, confidence = label(policy, clip, args.seed, args.game)
            keep = extract.dense(actions, confidence)
            meta = extract.read_clip(clip.folder) | {"labels": "inverse"}
            extract.write_json(clip.folder / "clip.json", meta)
            for name, array in ("confidence", confidence), ("keep", keep), ("actions", actions):
                extract.write_npy(clip.folder / f"{name}.npy", array)      # actions.npy last: all is done
        print(f"{clip.folder.name} | {clip.n} rows | confidence {confidence.mean():.2f} | "
              f"{keep.mean():.0%} kept")


def label(policy, clip, seed=0, game=None):
    """A clip's actions float32 (n, 25), file convention, and confidence float32 (n,): of each row the mean of
    DRAWS samples of each of the two chunks that hold it. Confidence is 1 - 4 times their variance, of the
    value that varies most: 1 where all agree, 0 where half of them press a button or no chunk holds the
    row."""
    starts, heard = one_after_another([clip], 0.5), [[] for _ in range(clip.n)]
    chunks = M.actions_in(M.actions_out(chunks_at(policy, starts, seed, game, DRAWS))).numpy()
    for (_, row), chunk in zip(starts, chunks.transpose(1, 2, 0, 3)):                      # (T, DRAWS, 25)
        edges = clip.edges(row).clip(0, clip.end(row))
        for said, begin, end in zip(chunk, edges, edges[1:]):
            for samples in heard[begin:end]:
                samples.append(said)
    actions = M.actions_in(torch.zeros(clip.n, extract.A)).numpy()
    confidence = np.zeros(clip.n, np.float32)
    for row, samples in enumerate(heard):
        if samples:
            said = np.concatenate(samples)
            actions[row], confidence[row] = said.mean(0), 1 - 4 * said.var(0).max()
    return M.actions_out(torch.from_numpy(actions)).numpy(), confidence.clip(0)


# -------------------------------------------------------------------------------------------------- machinery

def cuda_graph(fn, *args):
    """fn as one CUDA graph: at batch 1 a GPU waits for its ~100 kernel launches a step, and a replay needs
    one for all steps. -> a function of tensors like args; its answer holds until it is called again."""
    args, side, graph = [x.clone() for x in args], torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):                  # a run before recording, as torch's documentation asks
        fn(*args)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):               # others may use the GPU
        out = fn(*args)

    def replay(*news):
        for mine, new in zip(args, news):
            mine.copy_(new)
        graph.replay()
        return out
    return replay


class Server:
    """Sessions over multiprocessing.connection: framed bytes, never pickles; extract.py describes the
    messages. A thread and a Session for each client. A bad client loses its connection; others are not
    affected."""
    PATIENCE, IDLE = 10.0, 3600.0                  # seconds a message may take to come or go; between two
    CLIENTS = 32                                   # at a time, and as many with no key or message yet

    def __init__(self, policy, host="127.0.0.1", port=5555, key=None, game=None, seed=0):
        self.policy, self.key, self.game, self.seed = policy, key and key.encode(), game, seed
        self.lock, self.stop = threading.Lock(), threading.Event()
        self.places = {}                           # socket of each connection -> whether it has a place
        Session(policy, game)                      # a wrong --game is said now
        try:
            self.socket = socket.create_server((host, port), backlog=64)
        except (OSError, OverflowError, UnicodeError) as e:
            todo = "give another --port, or this machine's --host"
            raise UserError(f"can't listen on {host}:{port} ({e}): {todo}") from None
        self.socket.settimeout(0.1)
        self.address = self.socket.getsockname()

    def run(self):
        """Take in clients until `stop` is set; then cut all off. Their threads end with the chunk that is
        being computed."""
        with self.socket:
            while not self.stop.is_set():
                with contextlib.suppress(OSError):         # nobody came, or has gone again
                    self.welcome(self.socket.accept()[0])
        for s in list(self.places):
            self.shut(s)

    def welcome(self, s):
        """A thread for a new connection. Of those that have no place yet the newest CLIENTS stay: silent ones
        lock nobody out."""
        with self.lock:
            self.places[s] = False
            strangers = [s for s, placed in self.places.items() if not placed]
        threading.Thread(target=self.talk, args=[s]).start()
        for s in strangers[:-self.CLIENTS]:
            self.shut(s)
            self.stop.wait(0.02)                           # so each has at least CLIENTS times this long

    def shut(self, s):
        """Wake up a connection's thread, which then ends."""
        with self.lock, contextlib.suppress(OSError):      # it has ended already
            s.shutdown(socket.SHUT_RDWR)

    @contextlib.contextmanager
    def patient(self, s):
        """Cut a connection off if what stands within takes too long."""
        timer = threading.Timer(self.PATIENCE, self.shut, [s])
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def talk(self, s):
        """One client from its key to its end. s: the socket below its connection, which can be shut down."""
        connection, wait = mpc.Connection(s.dup().detach()), self.PATIENCE

        def say(message):
            with self.patient(s):
                connection.send_bytes(message)
        try:
            if self.key:                           # not in Listener.accept: a silent client holds it up
                with self.patient(s):
                    mpc.deliver_challenge(connection, self.key)
                    mpc.answer_challenge(connection, self.key)
            session = Session(self.policy, self.game, self.seed)
            while connection.poll(wait):
                with self.patient(s):
                    message = connection.recv_bytes(extract.MESSAGE_LIMIT)
                with self.lock:
                    self.places[s] |= sum(self.places.values()) < self.CLIENTS
                if not self.places[s]:
                    say(refusal(f"the server is full: {self.CLIENTS} clients at a time"))
                    break
                say(answer(session, message))
                wait = self.IDLE
        except (EOFError, OSError, mpc.AuthenticationError, AssertionError, ValueError) as e:
            if "bad message length" in str(e):     # else: gone, cut off or without the key (3.11 asserts)
                with contextlib.suppress(OSError):
                    say(refusal(f"expected at most {extract.MESSAGE_LIMIT} bytes: shrink the frame"))
        finally:
            with self.lock, s, connection:
                del self.places[s]


def answer(session, message):
    """One message -> its reply, both bytes as extract.py describes them; a request that can't be served
    is answered too."""
    try:
        header, frame = extract.unpack_message(message)
        do, seed = header.get("do"), header.get("seed")
        if do == "info":
            return extract.pack_message(session.info())
        if do == "predict":
            return extract.pack_message({}, session.predict(frame))
        if do != "reset" or not isinstance(seed, (int, type(None))):
            raise UserError("expected do = predict, info or reset (seed: an integer), found another")
        session.reset(seed=seed, game=header.get("game"))
        return extract.pack_message({})
    except ValueError as e:                    # a UserError, say
        return refusal(str(e))
    except Exception:                          # our fault: this client hears of it, others play on
        traceback.print_exc()
        return refusal("a fault of the server: its terminal shows more")


def refusal(line):
    """The reply that says what is wrong, as bytes."""
    return extract.pack_message({"error": line})


def policy_of(args):
    """The policy that the common flags ask for; prints the device and why."""
    if getattr(args, "out", None):
        extract.writable(args.out)
    policy = Policy(args.ckpt, args.device, args.dtype, args.euler, args.cfg)
    print(f"device: {policy.device} ({policy.reason}), {policy.dtype}, {policy.steps} steps")
    return policy


def run_image(args):
    """One chunk from one or more pictures -> chunk.npy. One resize for all, shrink(): the release's image
    processor resizes with PIL's bilinear filter here, its player with area interpolation; a 256 x 256 image
    passes both unchanged."""
    *context, frame = [extract.read_rgba(path)[..., :3] for path in args.images]
    policy = policy_of(args)
    c, noise, session = policy.config, None, Session(policy, args.game, args.seed)
    if len(args.images) > c.frames:
        raise UserError(f"expected at most {c.frames} image(s) for this checkpoint, found {len(args.images)}")
    if args.noise:
        shape = c.horizon, c.action_dim
        with reading(args.noise, f"a .npy of noise, float32 {shape}"):
            noise = torch.from_numpy(np.load(args.noise, allow_pickle=False)).float().reshape(shape)
    for seen in context:
        session.see(seen[None])
    raw = session.predict_raw(frame, noise)
    chunk = (raw if args.raw else M.actions_out(raw)).numpy()
    extract.write_npy(args.out, chunk)
    print(f"{args.out}: float32 {chunk.shape}")


def run_video(args):
    """A chunk is predicted whenever the one before it is used up; its actions are drawn at the model's rate,
    from `action_shift` actions after the frame it was predicted from."""
    info = extract.video_info(args.video)
    if Path(args.out).resolve() == Path(args.video).resolve():
        raise UserError(f"{args.out}: expected another name than the video's own, which would be lost")
    policy = policy_of(args)
    c, session = policy.config, Session(policy, args.game, args.seed)
    rate = info["fps"] / c.hz                                          # frames of the video for one action
    steps = np.arange(max(round(c.horizon * rate), 1)) / rate + 1e-6   # of a chunk, at each of its frames
    steps = steps.astype(int).clip(max=c.horizon - 1)
    coming = deque([extract.neutral()] * round(c.action_shift * rate))

    def shots():
        for i, rgb in tqdm(extract.read_video(args.video), total=info["n"], unit=" frames", mininterval=1):
            if i % len(steps) == 0:
                coming.extend(session.predict(rgb)[steps])
            yield rgb, coming.popleft()
    write_film(args.out, info["fps"], shots())
    print(args.out)


def film_chunks(chunks, starts):
    """Chunk after chunk, yields of each step: the frame, what was played, what was predicted."""
    for (clip, row), chunk in zip(starts, chunks):
        for at, said, true, counts in zip(clip.edges(row), chunk, *clip.chunk(row)):
            if counts:
                i = np.searchsorted(clip.frames.numbers, at - clip.lag, "right") - 1
                yield cv2.resize(clip.frames[i], (768, 768), interpolation=cv2.INTER_NEAREST), true, said


def write_film(path, fps, shots):
    """Shots, (frame, action, ...) each, as a video with pads beside each frame."""
    pages = (beside(*shot) for shot in shots)
    first = next(pages, None)
    if first is None:
        raise UserError(f"{path}: expected a picture to begin with, found none: take another video")
    with extract.video_writer(path, fps, first.shape[1::-1]) as add:
        for page in itertools.chain([first], pages):
            add(page)


def beside(rgb, *actions):
    """A frame with one pad or two right of it, one under another, pressed as the actions say; sides are even,
    as encoders want."""
    h, w = (n // 2 * 2 for n in rgb.shape[:2])
    pads = []
    for action in actions:
        pad = extract.over(24, draw(extract.shown_pad(), action))
        pads.append(ImageOps.pad(Image.fromarray(pad), (w // 4 * 2, h // len(actions)), color="#181818"))
    return np.hstack([rgb[:h, :w], np.vstack(pads)])


def print_scores(result):
    """A line a game: how many chunks, then R2, F1 and onset F1 of each policy."""
    games, overall, n = result["games"], result["policies"], result["n"]
    width = max(map(len, ["game", *games])) + 2
    head = "".join(f"{name + ' R2':>10}{'F1':>6}{'onset':>6}" for name in overall)
    print(f"{'game':{width}}{'n':>6}{head}")
    for game, row, count in zip([*games, "all"], [*games.values(), overall], [*n.values(), sum(n.values())]):
        figures = "".join("{:10.2f}{:6.2f}{:6.2f}".format(*three) for three in row.values())
        print(f"{game:{width}}{count:6}{figures}")


def run_serve(args):
    """Serve until Ctrl-C or SIGTERM."""
    if args.key == "":                             # an unset variable, say: it would serve without a key
        raise UserError("--key: expected a secret, found an empty one: give letters, or leave --key out")
    policy = policy_of(args)
    server = Server(policy, args.host, args.port, args.key, args.game, args.seed)
    for end in signal.SIGINT, signal.SIGTERM:
        signal.signal(end, lambda *_: server.stop.set())
    open_to_all = args.host not in ("127.0.0.1", "localhost") and not args.key
    warning = ", to anyone who can reach it: consider --key" if open_to_all else ""
    host, port = server.address
    print(f"serving {args.ckpt} on {host}:{port}{warning}; Ctrl-C ends it", flush=True)
    server.run()


def main(argv=None):
    """Parse the command line."""
    parser = extract.ArgumentParser(prog="sample.py", allow_abbrev=False,
                                    description="Sample actions from a policy.")
    sub = parser.add_subparsers(required=True, metavar="image | video | score | label | serve")

    def command(run, text):
        p = sub.add_parser(run.__name__.removeprefix("run_"), help=text, description=text, allow_abbrev=False)
        p.set_defaults(run=run)
        p.add_argument("--ckpt", required=True, help="a .safetensors, or a run folder of train.py")
        p.add_argument("--euler", type=number(int, 1, 10_000), metavar="K",
                       help="Euler steps (default: the checkpoint's, 16 in the paper; serve: 2)")
        p.add_argument("--cfg", type=number(float), default=0.0, metavar="S",
                       help="guidance: cond + S (cond - uncond), uncond = 1 frame, no game (default 0: off)")
        p.add_argument("--game", metavar="ID|NAME",
                       help="the game, where the checkpoint knows games (default: none; of clips their own)")
        p.add_argument("--seed", type=number(int, 0), default=0, help="of the noise (default 0)")
        p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default auto)")
        p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                       help="of weights and activations; bfloat16 is faster on GPUs, and of large models on "
                       "CPUs with AVX-512 (default float32)")
        return p
    p = command(run_image, "predict one chunk from images")
    p.add_argument("images", nargs="+", help="the context, oldest first")
    p.add_argument("--noise", metavar="N.npy", help="float32 (T, A) in place of the seeded noise")
    p.add_argument("--raw", action="store_true", help="write the sampler's tensor (T, A) as it is")
    p.add_argument("--out", required=True, help="the .npy to write")
    p = command(run_video, "draw the predicted pad beside each frame of a video")
    p.add_argument("video", help="the video to look at")
    p.add_argument("--out", required=True, help="the .mp4 to write")
    p = command(run_score, "R2 and F1 of chunks on labelled clips, beside policies that do not look")
    p.add_argument("data", nargs="+", help="folders of clips with actions")
    p.add_argument("--limit", type=number(int, 1), default=500, help="most chunks a game (default 500)")
    p.add_argument("--lag", action="store_true", help="also by how many rows each clip's labels are late")
    p.add_argument("--video", dest="out", metavar="OUT.mp4", help="film frame, truth, prediction beside it")
    p = command(run_label, "add actions to clips that have none, by an inverse model")
    p.add_argument("data", nargs="+", help="folders of clips, such as extract.py --plain makes")
    p = command(run_serve, "answer play.py --server and play.Client")
    p.set_defaults(euler=extract.PLAY_STEPS)
    p.add_argument("--host", default="127.0.0.1",
                   help="address to listen on; 0.0.0.0 = every network (default 127.0.0.1, this machine)")
    p.add_argument("--port", type=number(int, 0, 65535), default=5555, help="TCP port (default 5555)")
    p.add_argument("--key", help="a secret that clients must give (default: none)")
    return extract.cli(parser, argv, M.ModelError)


if __name__ == "__main__":
    sys.exit(main())
