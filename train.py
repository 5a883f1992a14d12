"""Train the policy by conditional flow matching, from scratch or from a checkpoint. Paper §3.4 (2601.02427).

    python train.py DATA... --out RUN --preset toy [--steps N]               from scratch, on clips
    python train.py DATA... --out RUN --ckpt ng.safetensors --freeze vision  post-training
    python train.py DATA... --out IDM --inverse               an inverse model, for sample.py label
    python train.py --resume RUN                              goes on where it stopped, bit for bit on a CPU
    torchrun --standalone --nproc-per-node 8 train.py DATA... --out RUN      one batch, shared by 8 GPUs

In: DATA/CLIP/ with clip.json, frames.npy, frames_index.npy, actions.npy float32 (n, 25), and where they exist
    keep.npy bool (n,)     this row may start a chunk
    human.npy bool (n,)    here a person took over
    cuts.npy bool (n,)     here something else begins, such as another episode: no chunk counts beyond it
    truth.npy              for --truth
Out, under RUN:
    model.safetensors      averaged weights (EMA), and those that are frozen: for sample.py, play.py, --ckpt
    best.safetensors       the same at the step whose loss on the held-out clips is least, if any are held out
    state.safetensors      raw weights, average, AdamW's moments, step: with model.safetensors all of --resume
    log.csv, curve.png     a line a step, written at each save; the curves drawn

Every random number is a function of the seed and of the sample's or the step's global number, so a resumed
run, another number of processes or another size of micro-batch draws the same frames, noises, times and
augmentations.
Letters as in model.py: B batch, F frames, N tokens of a frame, V their width, T actions of a chunk, A values
of an action; r draws: pairs of noise and time for each encoded frame; n rows of a clip, one for each frame of
its video, and m those of its pictures that may start a chunk ("kept").
"""
import contextlib
import csv
import functools
import json
import math
import os
import shutil
import signal
import sys
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import extract                       # before torch, whose threads it keeps from spinning
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader, default_collate
from tqdm import tqdm

import model as M
import sample
from extract import UserError, number
from sample import load_clips

WEIGHT_DECAY, EMA = 0.001, 0.9999    # [P]
BETAS, CLIP = (0.9, 0.99), 1.0       # AdamW's, and the largest gradient norm [O: the paper gives none]
ROTATION = 5.0                       # degrees each way [P]
COLOUR, HUE = 0.1, 0.02       # brightness, contrast, saturation 1 +- COLOUR; turns of hue [O: no ranges in P]
CROP = 0.95                          # least side of a crop [O]
DIVERGED = 4.0                       # a running loss; a velocity of zero costs 1 + E[a^2], at most 2


# ---------------------------------------------------------------------------------------------------- the run
def train(args, state, team):
    """Train; every process of a team runs this on its share of each batch. state: read_state()'s, of the run
    that is resumed."""
    say = print if team.rank == 0 else lambda text: None
    model, training, held = prepare(args, team, say)
    training_mode(model.to(team.device))
    average = Average(named(model).values(), "cpu" if args.ema_device == "cpu" else team.device, args.ema)
    optimizer = torch.optim.AdamW(groups(model), lr=args.lr, betas=BETAS, fused=team.device.type != "mps")
    start, metrics = 0, {}
    if state:
        start, metrics = state["step"], state["metrics"]
        load_state(state["path"], model, average, optimizer, start)
        if start >= args.steps:
            raise UserError(f"{args.resume}: expected a run with steps left, found {start} of {args.steps} "
                            "done: give more --steps")
    net = torch.compile(model) if args.compile else model
    if team.world > 1:
        devices = [team.device] if team.device.type == "cuda" else None
        net = torch.nn.parallel.DistributedDataParallel(net, device_ids=devices, gradient_as_bucket_view=True)
    new_sampler = functools.partial(Sampler, config=model.config)
    tokens_of = functools.partial(keep_tokens, model, args=args, team=team)
    sampler = new_sampler(training, batch=args.batch, draws=args.draws, seed=args.seed, balance=args.balance,
                          augment=not args.no_augment, drop_games=args.game_dropout,
                          tokens=tokens_of(training, 1 if args.no_augment else VARIANTS))
    batch = min(args.val_frames, sum(len(c.rows) for c in held))
    held_sampler = new_sampler(held, batch=batch, draws=4, balance=True, augment=False,
                               tokens=tokens_of(held, 1)) if held else None
    means, data = sample.mean_actions(training), described(training, held)
    last = start + 2 if args.dry_run else args.steps     # step 2 is the first with AdamW's moments in memory
    out = None if args.dry_run or team.rank else Path(args.out)            # the team's first process writes
    rows = read_log(out / "log.csv", start) if out else []
    earlier = float(rows[-1]["seconds"]) if rows else 0.0
    bar = tqdm(range(start + 1, last + 1), initial=start, total=last, disable=team.rank > 0, file=sys.stdout,
               mininterval=0.5 if sys.stdout.isatty() else 10)
    batches = feed(sampler, start + 1, last, args, team)
    smooth = None                                              # the loss, averaged over some ten steps
    began = time.perf_counter()                                # monotonic() stands still for 15 ms on Windows
    with interrupts() as asked, contextlib.closing(batches), contextlib.closing(bar):
        for step in bar:
            lr = rate(step, args)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss, norm = take_step(step, net, batches, optimizer, average, sampler.total(step), args, team)
            loss, stop = team.sum(loss, float(len(asked)))
            smooth = loss if smooth is None else 0.9 * smooth + 0.1 * loss
            if not (math.isfinite(norm) and smooth < DIVERGED):
                raise UserError(f"diverged at step {step}: expected a loss below {DIVERGED:g} (a velocity of "
                                f"0 has less than 2), found {loss:.3g} with a gradient of {norm:.3g}: "
                                f"lower --lr {args.lr:g}")
            seconds = earlier + time.perf_counter() - began
            row = {"step": step, "loss": loss, "lr": lr, "norm": norm, "seconds": seconds}
            bar.set_postfix_str(f"loss {loss:.4f} | lr {lr:.1e}", refresh=False)
            if out and held_sampler and (step % args.every == 0 or step == last):
                with average.in_place():
                    metrics = validate(model, held_sampler, means, team.device, args)
                r2, f1, _ = metrics["policies"]["model"]
                row |= {"val": metrics["loss"], "r2": r2, "f1": f1}
                bar.write(f"step {step}/{last} | loss {loss:.4f} | val {row['val']:.4f} | R2 {r2:.3f} "
                          f"| F1 {f1:.3f} | lr {lr:.1e}", file=sys.stdout)
            if out:
                rows.append({k: f"{v:.6g}" if isinstance(v, float) else str(v) for k, v in row.items()})
                if step % args.every == 0 or step == last or stop:
                    write_log(out / "log.csv", rows)           # before the state that needs it
                    save_run(out, model, average, optimizer, step, args, data, metrics)
                    losses = [float(row["val"]) for row in rows if row.get("val")]
                    if "val" in row and losses[-1] == min(losses):
                        extract.write_atomic(out / "best.safetensors", functools.partial(
                            shutil.copyfile, out / "model.safetensors"))
                    draw_curve(out / "curve.png", rows)
            if stop:
                break
    if step < last:
        say(f"saved at step {step} | go on with --resume {args.out}" if out else "nothing is written")
        raise KeyboardInterrupt
    if team.rank == 0 and metrics:
        sample.print_scores(metrics)
    say(held_memory(team.device))


def take_step(step, net, batches, optimizer, average, total, args, team):
    """One step on this process's share of the batch, in parts of --micro frames -> its share of the loss, the
    norm of the whole gradient. total: Sampler.total() of the step."""
    parts, loss = args.batch // (args.micro * team.world), 0.0
    # --- one step: everything else is book-keeping
    for part in range(parts):
        batch = to_device(next(batches), team.device)
        torch.manual_seed(zlib.crc32(f"{args.seed} {step} {part} {team.rank}".encode()))       # of dropout
        wait = team.world > 1 and part < parts - 1             # DDP sums the gradients in the last part
        with net.no_sync() if wait else contextlib.nullcontext():
            with autocast(team.device, args):
                share = cfm_loss(net, **batch, total=total)
            (share * team.world).backward()                    # x world: DDP takes the mean of gradients
        loss += share.detach()
    norm = torch.nn.utils.clip_grad_norm_(average.params, CLIP).item()
    if math.isfinite(norm):                                    # else it would spoil the weights
        optimizer.step()
        average.update(step)
    optimizer.zero_grad(set_to_none=True)
    # ---
    return loss.item(), norm


def cfm_loss(model, frames, actions, mask=None, games=None, keep=None, noise=None, t=None, total=None):
    """Conditional flow matching [§3.4]: how far the network's velocity at a point between noise and action is
    from action - noise, mean square over what counts -> a scalar.

    frames (B, F, 256, 256, 3), or their tokens (B, F, N, V), actions (B, T, A) in the model's convention,
    mask (B, T) or (B, T, A): which of them count, games (B,) ids, keep (B, F): which frames there are. noise
    (r B, T, A) and t (r B,): those of sample i are the rows i r to i r + r - 1; drawn anew, r = 1, where not
    given. total: how many action values count in the whole batch, where this is a part of one.
    """
    config = getattr(model, "module", model).config            # DDP keeps the model under .module
    if noise is None:
        noise = torch.randn_like(actions)                                                      # (r B, T, A)
    if t is None:
        rng = np.random.default_rng(int(torch.randint(2**62, ())))
        t = torch.from_numpy(draw_times(rng, len(noise), config)).to(noise)                    # (r B,)
    if mask is None:
        mask = torch.ones_like(actions)
    elif mask.ndim == 2:
        mask = mask[..., None]
    draws = len(noise) // len(actions)
    a = actions.repeat_interleave(draws, 0)                                                    # (r B, T, A)
    w = mask.expand_as(actions).to(actions.dtype).repeat_interleave(draws, 0)                  # (r B, T, A)
    at = t[:, None, None]                                                                      # (r B, 1, 1)
    x = (1 - at) * noise + at * a                              # the line from noise (t = 0) to action (t = 1)
    v = model(x, t, frames, games, keep)                       # what the network takes for dx/dt
    square = (v.float() - (a - noise)) ** 2                    # dx/dt is a - noise all along that line
    return (square * w).sum() / ((w.sum() if total is None else total) + 1e-6)              # [R: masked mean]


def draw_times(rng, n, config):
    """n times t = (1 - Beta(1.6, 0.8)) s -> float32 (n,): 64 % of them below 0.4, where noise has to become a
    plan [§3.4; R]."""
    return ((1 - rng.beta(*config.beta, n)) * config.noise_s).astype(np.float32)


def autocast(device, args):
    """The context of forward passes: matrix products in --dtype."""
    return torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")


def to_device(batch, device):
    """A batch's tensors on a device, without waiting for them where memory is pinned."""
    return {name: x.to(device, non_blocking=True) for name, x in batch.items()}


def rate(step, args):
    """Warm-up, stable, decay (WSD): up in a straight line, constant, down to a hundredth over the last steps
    [P names it; lengths: O]."""
    left = (args.steps - step + 1) / (args.decay + 1) if args.decay else 1.0
    return args.lr * min(step / max(args.warmup, 1), 1.0, max(left, 0.01))


class Average:
    """EMA of the weights [P: 0.9999]. Early on it spans about the last tenth of the steps so far: with 0.9999
    from the first step, a short run's average would still be its random start."""

    def __init__(self, params, device, decay=EMA):
        self.params, self.decay = list(params), decay
        self.mean = [p.detach().to(device, copy=True) for p in self.params]

    @torch.no_grad()
    def update(self, step):
        """mean = d mean + (1 - d) weights."""
        decay = min(self.decay, (1 + step) / (10 + step))
        now = [p.detach().to(m.device) for p, m in zip(self.params, self.mean)]
        torch._foreach_lerp_(self.mean, now, 1 - decay)

    @contextlib.contextmanager
    def in_place(self):
        """Within, the model's weights are the average."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self):
        """Exchange the weights and their average."""
        for p, m in zip(self.params, self.mean):
            other = p.detach().to(m.device, copy=True)
            p.copy_(m)
            m.copy_(other)


def groups(model):
    """What trains, as AdamW's groups: matrices have weight decay; norms, biases and embeddings have none."""
    decay, free = [], []
    for name, p in named(model).items():
        table = name.endswith(("position_embedding.weight", "game_embedding.weight"))
        matrix = p.ndim >= 2 and not name.endswith(".b") and not table        # .b: a bias with two dimensions
        (decay if matrix else free).append(p)
    return [{"params": decay, "weight_decay": WEIGHT_DECAY}, {"params": free, "weight_decay": 0.0}]


# ------------------------------------------------------------------------------------- the data and the model
def prepare(args, team, say):
    """-> (model, training clips, held-out clips). Also fills in those of lr, warmup, decay, micro and workers
    that the command line leaves open."""
    games = set()
    if args.game_ids and not args.resume:
        paths = [path for folder in args.data for path in extract.clips_in(folder)]
        games = {str(extract.read_clip(path).get("game") or "unknown") for path in paths}
    model = build(args, sorted(games))
    c = model.config
    file = "truth.npy" if args.truth else "actions.npy"
    clips = load_clips(args.data, c, file, args.human_weight, say)
    if args.lr is None:
        # [P: 1e-4 at D 1024]; narrower nets take more [O: at D 96 twice as much learns less]
        args.lr = float(f"{1e-4 * max(1.0, 1024 / c.width):.1e}")
    args.warmup = min(500, args.steps // 20 + 1) if args.warmup is None else args.warmup
    args.decay = args.steps // 5 if args.decay is None else args.decay
    args.micro = min(args.micro or args.batch, args.batch // team.world or 1)
    if args.batch % (args.micro * team.world):
        raise UserError(f"--batch {args.batch}: expected a multiple of {team.world} process(es) x "
                        f"--micro {args.micro}, found none: change one of them")
    if args.workers is None:
        share = extract.cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))                # of this machine
        # more than 4 only where a process starts fast and a GPU waits for its batches
        most = 16 if team.device.type == "cuda" and sys.platform == "linux" else 4
        args.workers = min(most, max(share - (team.device.type == "cuda"), 1))
    training, held = split(clips, args.val)
    rates = ", ".join(f"{r:g}" for r in sorted({clip.fps for clip in clips}))
    hours = sum(clip.n / clip.fps for clip in clips) / 3600
    why = "" if held else " (the only clip of each game is too short to part)" if args.val else " (--val 0)"
    say(f"{len(clips)} clips of {len({clip.game for clip in clips})} game(s), {hours:.2f} h at {rates} "
        f"frames/s, actions at {c.hz:g} Hz | {sum(len(clip.rows) for clip in clips):,} frames to start from "
        f"| {len(held)} clips held out{why}")
    say(f"{M.count(model)[0]:,} parameters, {sum(p.numel() for p in named(model).values()):,} train | "
        f"{team.device} ({team.reason}), {team.world} process(es) | "
        f"batch {args.batch} in parts of {args.micro}, {args.draws} draws | lr {args.lr:g}")
    return model, training, held


def split(clips, share):
    """Clips -> (training, held out), by a hash of each clip's name: stable when clips are added. A game of
    two or more clips has at least one on each side. Of a game's only clip the last rows are held out, if
    then both parts have chunks."""
    place = lambda clip: zlib.crc32(clip.folder.name.encode()) / 2**32
    held, parts = set(), {}
    for mine in sample.per_game(clips).values() if share else ():
        if len(mine) > 1:
            mine.sort(key=lambda c: (place(c), c.folder.name))
            held.update(mine[:min(max(sum(place(c) < share for c in mine), 1), len(mine) - 1)])
            continue
        [clip], cut = mine, round(mine[0].n * (1 - share))
        first, last = clip.part(0, cut), clip.part(cut, clip.n)
        if len(first.rows) and len(last.rows):
            parts[clip] = first, last
    training = [parts[c][0] if c in parts else c for c in clips if c not in held]
    return training, [c for c in clips if c in held] + [last for _, last in parts.values()]


# An inverse model sees from 4 actions before a chunk of 16 to 9 after it, 150 ms: later ones tell little [O].
INVERSE = {"frames": 8, "future": 6, "frame_spacing": 4, "context_tokens": 0,
           "horizon": 16, "action_shift": 0}
FREEZE = {"vision": ["vision"], "mixing": ["mixing"], "all-but-head": ["vision", "mixing", "dit", "games"]}


def build(args, games):
    """The model to train, on the CPU: of the run that is resumed, of --ckpt or fresh, of a preset; with what
    the command line changes in it. games: names, to be in its game table."""
    names = ("hz", "horizon", "action_shift")
    changes = INVERSE if args.inverse else {}
    changes = changes | {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.resume:                                            # its settings are those of the run
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


def add_games(model, games, seed):
    """Rows in the game table for the names that a checkpoint does not know yet."""
    c, old = model.config, model.game_embedding
    new = [g for g in games if g not in c.games]
    if not new:
        return
    c.games = c.games + new
    if c.context_tokens:                             # where the frames fill the context: one more token
        c.context_tokens = max(c.context_tokens, c.needed)
    model.game_embedding = M.table(len(c.games) + 1, c.vision_width, padding_idx=0, scale_grad_by_freq=True)
    with torch.no_grad():
        weight = model.game_embedding.weight.normal_(0, 0.02, generator=torch.Generator().manual_seed(seed))
        weight[0] = 0                                          # row 0 = no game
        if old is not None:
            weight[:len(old.weight)] = old.weight


def training_mode(model):
    """model.train(), but without dropout in the frozen parts: they answer as they will in play."""
    model.train()
    for part in (model.vision, model.mixing, model.dit):
        part.train(any(p.requires_grad for p in part.parameters()))


def named(model):
    """What trains, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# ------------------------------------------------------------------------------------------------ the sampler
class Sampler:
    """Chunks drawn uniformly over all kept frames, or each game alike (`balance`). All (weighted) frames lie
    in a row, clip after clip; the row is cut into B equal shares, and a batch takes one frame of each: it
    holds every clip and game in proportion, with less noise than independent draws and at no cost [O]. For
    DataLoader: sampler[step, begin, end] -> a part of that step's batch, or the text of a UserError, which
    crosses processes in one line."""

    def __init__(self, clips, config, batch, draws=1, seed=0, balance=False, augment=True, drop_games=0.0,
                 tokens=None):
        """tokens: of each clip, the file of keep_tokens() that stands for its frames. drop_games: the share
        of samples that are not told their game."""
        self.clips, self.tokens = clips, tokens
        self.config = config
        self.batch = batch
        self.draws = draws
        self.seed = seed
        self.augment, self.drop_games = augment, drop_games
        weights = np.array([c.weight for c in clips])
        if balance:
            _, game = np.unique([c.game for c in clips], return_inverse=True)
            weights = weights / np.maximum(np.bincount(game, weights), 1e-300)[game]
        if not weights.sum() > 0:
            raise UserError("expected frames of weight above 0, found none: give another --human-weight")
        self.edges = np.concatenate([[0.0], np.cumsum(weights) / weights.sum()])   # of the clips in 0..1

    def picks(self, step):
        """The batch of a step: (clip numbers, which of its kept frames it is), int64 (B,) each."""
        u = np.arange(self.batch) + stream(self.seed, step, 1).random(self.batch)          # one in each share
        u /= self.batch
        clip = np.clip(np.searchsorted(self.edges, u, "right") - 1, 0, len(self.clips) - 1)
        inside = (u - self.edges[clip]) / np.maximum(np.diff(self.edges)[clip], 1e-300)        # (B,) in 0..1
        inside = np.clip(inside, 0, 1 - 1e-12)
        return clip, np.array([self.clips[k].pick(x) for k, x in zip(clip, inside)], np.int64)

    def total(self, step):
        """How many action values count in the whole batch of a step, all processes' shares together."""
        actions = sum(int(self.clips[k].lengths[j]) for k, j in zip(*self.picks(step)))
        return actions * self.draws * self.config.action_dim

    def load(self, step, begin=0, end=None):
        """Samples begin .. end of a step's batch -> a dict of tensors, as cfm_loss() takes them."""
        numbers = range(begin, self.batch if end is None else end)
        clips, kept = self.picks(step)
        batch = default_collate([self.sample(step * self.batch + i, clips[i], kept[i]) for i in numbers])
        batch["actions"] = M.actions_in(batch["actions"])
        return batch | {name: batch[name].flatten(0, 1) for name in ("noise", "t")}            # (r B, ...)

    def __getitem__(self, job):
        try:
            return self.load(*job)
        except UserError as e:
            return str(e)

    def sample(self, number, k, j):
        """Everything of the sample with this global number, which is kept frame j of clip k."""
        rng, clip, c = stream(self.seed, number), self.clips[k], self.config
        row = clip.rows[j]
        actions, mask = clip.chunk(row)                                                # (T, A), (T,)
        noise = rng.standard_normal((self.draws, c.horizon, c.action_dim), np.float32)         # (r, T, A)
        t = draw_times(rng, self.draws, c)                                                     # (r,)
        told = rng.random() >= self.drop_games            # without its game now and then: guidance needs both
        if self.tokens:
            variants, keep = open_tokens(self.tokens[k]), np.ones(1, bool)
            frames = np.float32(variants[rng.integers(len(variants)), [j]])                    # (1, N, V)
        else:
            frames, keep = clip.pictures(row)                          # (F, 256, 256, 3), (F,)
            if self.augment:
                frames = augmented(frames, rng)
        return {"frames": frames, "actions": actions, "mask": mask, "games": told * clip.game_id,
                "keep": keep, "noise": noise, "t": t}


def stream(seed, number, kind=0):
    """A random generator of its own for the sample or step `number`. Philox counts, so that none of the
    numbers before has to be drawn; `kind` tells apart streams of the same number."""
    return np.random.Generator(np.random.Philox(key=[seed % 2**64, number], counter=[0, 0, 0, kind]))


def augmented(frames, rng):
    """Frames of one sample, uint8 (F, h, w, 3), all augmented alike, in place -> the same array."""
    colour, warp = augmentation(rng, frames.shape[1])
    for frame in frames:
        frame[:] = augment(frame, colour, warp)
    return frames


def augmentation(rng, side):
    """One sample's augmentation: colour float32 (3, 4), a matrix for RGB and an offset beside it; warp
    float32 (2, 3), pixel of the result -> pixel of the frame. The paper names brightness, contrast,
    saturation, hue, rotation and crop, with a range for the rotation only."""
    brightness, contrast, saturation = rng.uniform(1 - COLOUR, 1 + COLOUR, 3)
    turn = rng.uniform(-HUE, HUE) * 2 * math.pi
    grey, one = np.full((3, 3), 1 / 3), np.eye(3)
    axis = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)     # hue: a turn about the grey axis
    colour = grey + math.cos(turn) * (one - grey) + math.sin(turn) * axis
    colour = contrast * brightness * (saturation * one + (1 - saturation) * grey) @ colour
    offset = np.full((3, 1), (1 - contrast) * 127.5)
    angle = math.radians(rng.uniform(-ROTATION, ROTATION))
    size = rng.uniform(CROP, 1)
    turned = size * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    middle = np.full(2, (side - 1) / 2)
    corner = middle + rng.uniform(-1, 1, 2) * (1 - size) * side / 2 - turned @ middle
    warp = np.hstack([turned, corner[:, None]])
    return np.hstack([colour, offset]).astype(np.float32), warp.astype(np.float32)


def augment(frame, colour, warp):
    """uint8 (h, w, 3) -> a new one, turned, cropped and in other colours."""
    frame = cv2.warpAffine(frame, warp, frame.shape[1::-1], flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
                           borderMode=cv2.BORDER_REPLICATE)
    return cv2.transform(frame, colour)


VARIANTS = 4             # so many variants of a frame are kept as tokens: itself, then augmented ones [O]


@torch.no_grad()
def keep_tokens(model, clips, variants, args, team):
    """Where vision is frozen, a frame's tokens are always the same: encode every kept frame once, in so many
    variants -> the path of a file for each clip, float16 (variants, m, N, V), in the folder .tokens beside
    the clip, named after a hash of all that the tokens depend on; None in a dry run, where vision trains
    or where the model sees more than one frame."""
    if any(p.requires_grad for p in model.vision.parameters()) or model.config.frames > 1 or args.dry_run:
        return None
    paths, weights = [], extract.fingerprint(*(p.cpu().numpy() for p in model.vision.parameters()))
    for i, clip in enumerate(clips):
        stored = (clip.folder / "frames.npy").stat()
        key = extract.fingerprint(weights, clip.rows, variants, args.seed, args.dtype, stored.st_size,
                                  stored.st_mtime_ns)
        paths.append(clip.folder.parent / ".tokens" / f"{clip.folder.name}-{key}.npy")
        if i % team.world == team.rank and not paths[-1].is_file():
            paths[-1].parent.mkdir(exist_ok=True)
            write = functools.partial(write_tokens, model, clip, variants, args, team)
            extract.write_atomic(paths[-1], write)
    team.sum(0.0)                                              # waits until all processes have written
    return paths


def write_tokens(model, clip, variants, args, team, path):
    """The tokens of a clip's kept frames -> a .npy, a few frames at a time. It is written like any file: on
    a full disk a memory map would end the process without a word."""
    m, c = len(clip.rows), model.config
    with open(path, "wb") as f:
        shape = variants, m, c.image_tokens, c.vision_width
        np.lib.format.write_array_header_1_0(f, {"descr": "<f2", "fortran_order": False, "shape": shape})
        for variant in range(variants):
            for some in np.array_split(np.arange(m), math.ceil(m / 32)):
                frames = [clip.pictures(clip.rows[j])[0] for j in some]
                if variant:
                    frames = [augmented(x, stream(args.seed, j, 1 + variant)) for j, x in zip(some, frames)]
                with autocast(team.device, args):
                    tokens = model.see(torch.from_numpy(np.stack(frames)).to(team.device))
                f.write(tokens.half().cpu().numpy().tobytes())


@functools.lru_cache(sample.OPEN_CLIPS)
def open_tokens(path):
    """A file of keep_tokens(), memory-mapped."""
    return extract.read_npy(path, np.float16, (None,) * 4)


def feed(sampler, first, last, args, team):
    """Yields the parts of the batches of steps first .. last that one process of a team trains on, made
    ahead of time by --workers processes."""
    cv2.setNumThreads(1)                                     # a forked process would wait for them for ever
    begins = range(team.rank * args.micro, args.batch, team.world * args.micro)
    jobs = [(step, begin, begin + args.micro) for step in range(first, last + 1) for begin in begins]
    loader = DataLoader(sampler, batch_size=None, sampler=jobs, num_workers=args.workers,
                        worker_init_fn=begin_worker, pin_memory=team.device.type == "cuda")
    try:
        for batch in loader:
            if isinstance(batch, str):
                raise UserError(batch)
            yield batch
    except RuntimeError as e:
        if "DataLoader" not in str(e):
            raise
        raise UserError(f"a loader's process ended ({str(e).splitlines()[0]}): expected room for its batches "
                        "in memory and /dev/shm, found too little: give --workers 0, or fewer") from None


def begin_worker(_):
    """In each process of the loader: OpenCV with one thread; Ctrl-C is for the parent alone, which stops
    it."""
    cv2.setNumThreads(1)                                       # again: a spawned process starts afresh
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


# ------------------------------------------------------------------------------------------------- validation
@torch.no_grad()
def validate(model, sampler, means, device, args):
    """On held-out clips, the same noise and times each time -> {"loss"} and sample.scores() of chunks."""
    model.eval()
    loss, counted, parts = 0.0, 0, []
    for begin in range(0, sampler.batch, args.micro):
        batch = to_device(sampler.load(0, begin, min(begin + args.micro, sampler.batch)), device)
        count = batch["mask"].sum().item()
        with autocast(device, args):
            loss += cfm_loss(model, **batch).item() * count
            context = model.encode(batch["frames"], batch["games"], batch["keep"])
            parts.append(sample.euler(model, context, batch["noise"][::sampler.draws]).float().cpu())
        counted += count
    training_mode(model)
    starts = [(sampler.clips[k], sampler.clips[k].rows[j]) for k, j in zip(*sampler.picks(0))]
    return {"loss": loss / counted} | sample.scores(M.actions_out(torch.cat(parts)).numpy(), starts, means)


# -------------------------------------------------------------------------------------------------- machinery
def usual_hole(clips):
    """Where the overlay was masked out of most frames, [x0, y0, x1, y1] in the 256 x 256 picture; None where
    some clip has whole frames."""
    frames = Counter()
    for clip in clips:
        frames[json.dumps(clip.hole)] += len(clip.rows)
    return None if "null" in frames else json.loads(max(frames, key=frames.get))


def described(training, held):
    """What a checkpoint tells about its data."""
    return {"clips": len(training), "held": sorted(c.folder.name for c in held),
            "frames": sum(len(c.rows) for c in training), "games": sorted({c.game for c in training}),
            "hole": usual_hole(training)}


def held_memory(device):
    """A line that says the most memory that this process held."""
    if device.type == "cuda":
        return f"most GPU memory held: {torch.cuda.max_memory_allocated(device) / 1e9:.3f} GB"
    try:
        import resource                                        # not on Windows
    except ImportError:
        return "most memory held: not told by this system"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"most memory held: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.3f} GB"


COLUMNS = "step loss val r2 f1 lr norm seconds".split()


def read_log(path, step):
    """The rows of log.csv up to `step`, texts by column; not the broken ones that a killed run of an earlier
    version may have left."""
    rows = []
    if path.is_file():
        with open(path, newline="", encoding="utf-8", errors="replace") as f:
            for row in csv.DictReader(f):
                with contextlib.suppress(TypeError, ValueError, KeyError):
                    numbers = {name: float(text) for name, text in row.items() if text}
                    if numbers["step"] <= step and numbers["seconds"] >= 0:
                        rows.append(row)
    return rows


def write_log(path, rows):
    """All rows as log.csv; what was not measured is left empty."""
    def write(tmp):
        with open(tmp, "w", newline="", encoding="utf-8") as f:
            table = csv.DictWriter(f, COLUMNS, "", "ignore", lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
    extract.write_atomic(path, write)


def draw_curve(path, rows):
    """curve.png: losses on the left, R2 and F1 on the right."""
    def column(name):
        points = [(float(r["step"]), float(r[name])) for r in rows if r.get(name)]
        return np.array([p for p in points if math.isfinite(p[1])]).reshape(-1, 2).T    # NaN: nothing to find
    steps, loss = column("loss")
    half = len(loss) // 100 + 1                                # a running mean over 2 % of the run
    smooth = np.convolve(np.pad(loss, half, "edge"), np.ones(2 * half + 1) / (2 * half + 1), "valid")
    page = Image.new("RGB", (1200, 400))
    page.paste(plot({"train": (steps, smooth, "royalblue"), "held out": (*column("val"), "darkorange")}))
    page.paste(plot({"R2": (*column("r2"), "green"), "F1": (*column("f1"), "darkorange")}), (600, 0))
    page.save(path)


def plot(curves, size=(600, 400)):
    """{name: (x, y, colour)} -> a picture of the curves over one pair of axes, from 0 up."""
    page = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(page)
    w, h = size[0] - 70, size[1] - 70                          # of the axes
    xs, ys = (np.concatenate([curve[k] for curve in curves.values()]) for k in (0, 1))
    right, top = max([1, *xs]), max([1e-3, *ys])
    for part in np.linspace(0, 1, 5):
        y = 30 + h * (1 - part)
        pen.line([50, y, 50 + w, y], "#ddd")
        pen.text((5, y - 6), f"{top * part:.2f}", "#555")
        pen.text((42 + w * part, h + 35), f"{right * part:.0f}", "#555")
    for i, (name, (x, y, colour)) in enumerate(curves.items()):
        if len(x):
            points = np.stack([50 + w * x / right, 30 + h * (1 - np.maximum(y, 0) / top)], 1)
            pen.line(points.ravel().tolist(), colour, 2)
            pen.text((60 + 130 * i, h + 54), f"{name} {y[-1]:.3f}", colour)
    return page


STATE = {"first": "exp_avg", "second": "exp_avg_sq"}    # AdamW's moments, by their names in state.safetensors
OWN = {"out", "resume", "run", "dry_run", "device", "workers"}      # not kept: may differ in an equal run
# What --resume may change.
FREE_AT_RESUME = {"data", "steps", "decay", "every", "micro", "ema_device", "compile", "checkpointing"}


def recorded(args):
    """The command line as files keep it."""
    return {name: value for name, value in vars(args).items() if name not in OWN}


def save_run(out, model, average, optimizer, step, args, data, metrics):
    """model.safetensors and state.safetensors, each written aside and renamed: a crash or a full disk leaves
    the old ones whole. The state gets its name last, since a state without its model could not be resumed."""
    params, tensors = named(model), {}
    for (name, p), mean in zip(params.items(), average.mean):
        tensors |= {f"weights.{name}": p.detach(), f"average.{name}": mean}
        tensors |= {f"{kind}.{name}": optimizer.state[p][key] for kind, key in STATE.items()}
    meta = {"nitrogen": json.dumps({"step": step, "args": recorded(args), "metrics": metrics})}
    whole = {**model.state_dict(), **dict(zip(params, average.mean))}

    def write(tmp):
        try:
            M.write_tensors(tmp, tensors, meta)
            M.save(out / "model.safetensors", whole, model.config, step, recorded(args), data, metrics)
        except (OSError, M.ModelError) as e:
            saved = (out / "state.safetensors").is_file()
            again = f"--resume {out}: the files of the last save are whole" if saved else "start again"
            raise UserError(f"can't save to {out} ({e}): make room, then {again}") from None
    extract.write_atomic(out / "state.safetensors", write)


def read_state(run):
    """state.safetensors of a run folder -> {"path", "step", "args", "metrics"}."""
    path = Path(run) / "state.safetensors"
    with M.opened(path) as f:
        meta = M.parse_json(f.metadata()["nitrogen"])
        args = dict(meta["args"], data=[*map(str, meta["args"]["data"])])
        return {"path": path, "step": int(meta["step"]), "args": args, "metrics": dict(meta["metrics"])}


def load_state(path, model, average, optimizer, step):
    """Put a saved state back: weights, average and moments, name by name."""
    params = named(model)
    with M.opened(path) as f, torch.no_grad():
        stored = dict(M.tensors(f))                            # parts of the mapped file: copied below
        kinds = ["weights", "average", *STATE]
        wanted = {f"{kind}.{name}": p.shape for name, p in params.items() for kind in kinds}
        if wanted != {name: t.shape for name, t in stored.items()}:
            raise ValueError("tensors that do not fit the model")
        for (name, p), mean in zip(params.items(), average.mean):
            p.copy_(stored[f"weights.{name}"])
            mean.copy_(stored[f"average.{name}"])
            where = p.device if p.device.type == "cuda" else "cpu"         # where AdamW keeps the step itself
            optimizer.state[p] = {"step": torch.tensor(float(step), device=where)}
            for kind, key in STATE.items():
                optimizer.state[p][key] = stored[f"{kind}.{name}"].to(p.device, copy=True)


def words_of(args):
    """Recorded args as a command line, so that the parser checks them like any other."""
    words = []
    for name, value in args.items():
        flag = "--" + name.replace("_", "-")
        if name == "data" or value is None or value is False or value == []:
            continue
        if value is True:
            words.append(flag)
        else:
            words += [flag, *value] if isinstance(value, list) else [f"{flag}={value}"]
    return words


def resolve(parser, argv):
    """The command line, checked and filled in from the run that is resumed -> (args, read_state()'s answer or
    None)."""
    args = parser.parse_args(argv)
    state = read_state(args.resume) if args.resume else None
    if state:
        with extract.reading(state["path"], "the args of a run"):
            stored = parser.parse_args(words_of(state["args"]))
        args = parser.parse_args([*words_of(state["args"]), *argv])            # what the line names wins
        args.data, args.out = args.data or state["args"]["data"], args.out or args.resume
        for name in vars(stored).keys() - OWN - FREE_AT_RESUME:
            given, expected = getattr(args, name), getattr(stored, name)
            if given != expected:
                raise UserError(f"--{name.replace('_', '-')} {given}: expected {expected}, as that run "
                                f"was trained: leave it out, or start anew with --ckpt {args.resume}")
    if not args.data:
        raise UserError("expected at least one folder of clips, found none: python train.py DATA --out RUN")
    if not args.out and not args.dry_run:
        raise UserError("expected --out RUN, where the run is kept, found none: add it")
    own = args.resume and args.out and Path(args.out).resolve() == Path(args.resume).resolve()
    if args.out and not own and (Path(args.out) / "state.safetensors").is_file():
        raise UserError(f"{args.out}: expected a new folder, found a run in it: "
                        f"go on with --resume {args.out}, or give another --out")
    if args.ckpt and (args.preset or args.inverse):
        raise UserError("expected --preset or --inverse (a fresh model), or --ckpt (a trained one), found "
                        "both: leave one out")
    return args, state


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
        dtype = torch.float64 if self.device.type == "cpu" else torch.float32
        x = torch.tensor(values, dtype=dtype, device=self.device)
        dist.all_reduce(x)
        return x.tolist()


@contextlib.contextmanager
def interrupts():
    """Within, SIGINT and SIGTERM only fill the list that is yielded, so that the step in hand is finished and
    saved; a second one ends at once."""
    asked, before = [], {}

    def handle(kind, _):
        asked.append(kind)
        signal.signal(kind, before[kind])
    with contextlib.suppress(ValueError):                # not the main thread: who runs us there stops us too
        for kind in (signal.SIGINT, signal.SIGTERM):
            before[kind] = signal.signal(kind, handle)
    try:
        yield asked
    finally:
        for kind, old in before.items():
            signal.signal(kind, old)


@contextlib.contextmanager
def alone(out, team):
    """RUN/.lock is held within, by the team's first process for all of them; none goes on where another run
    holds it."""
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


def start(parser, argv):
    """One run, from the command line to the last save."""
    args, _ = resolve(parser, argv)
    team = Team.join(args.device)
    try:
        with alone(None if args.dry_run else args.out, team):
            args, state = resolve(parser, argv)   # again: while nobody held the lock the run may have gone on
            train(args, state, team)
    except torch.OutOfMemoryError:
        raise UserError(f"out of memory on {team.device}: expected room for --micro {args.micro}, found too "
                        "little: lower --micro, or add --dtype bfloat16, --checkpointing, --freeze vision or "
                        "--ema-device cpu") from None
    finally:
        if team.world > 1:
            dist.destroy_process_group()


def main(argv=None):
    """Parse the command line and train."""
    argv = sys.argv[1:] if argv is None else argv
    p = extract.ArgumentParser(prog="train.py", description="Train the policy by conditional flow matching.",
                       allow_abbrev=False)
    count = number(int, 1)
    natural = number(int, 0)
    share = number(float, 0, 1)
    p.add_argument("data", nargs="*",
                   help="folders of clips with actions (of parse.py, play.py --record, bench.py record)")
    p.add_argument("--out", metavar="RUN", help="folder of the run")
    p.add_argument("--preset", choices=M.PRESETS, help="size of a fresh model (default toy)")
    p.add_argument("--inverse", action="store_true",
                   help="a model that also sees what comes after: it labels clips (sample.py), it can't play")
    p.add_argument("--ckpt", metavar="F",
                   help="weights to start from: a .safetensors or a run folder (new optimiser and schedule)")
    p.add_argument("--resume", metavar="RUN",
                   help="go on with a run where it stopped; --steps may grow, what shapes it may not change")
    p.add_argument("--freeze", nargs="+", default=[], choices=FREEZE,
                   help="parts that keep their weights; all-but-head trains action encoder and decoder only")
    p.add_argument("--steps", type=count, default=3000, help="optimiser steps (default 3000)")
    p.add_argument("--batch", type=count, default=64,
                   help="frames a step, over all processes (default 64; 4096 in the release)")
    p.add_argument("--micro", type=count,
                   help="frames of a process's forward pass; the rest is accumulated (default: its share)")
    p.add_argument("--draws", type=count, default=4, metavar="r",
                   help="noises and times for each encoded frame (default 4: best at equal time for toy)")
    p.add_argument("--lr", type=share,
                   help="constant phase of AdamW's rate (default 1e-4 [paper] at width 1024, narrower: more)")
    p.add_argument("--warmup", type=natural,
                   help="steps of rising rate (default a twentieth of the steps, at most 500)")
    p.add_argument("--decay", type=natural,
                   help="steps of falling rate at the end (default a fifth of the steps)")
    p.add_argument("--ema", type=share, default=EMA,
                   help=f"decay of the weights' average (default {EMA} [paper], warmed up)")
    p.add_argument("--ema-device", choices=("same", "cpu"), default="same",
                   help="where the average lives; cpu saves 4 bytes a weight of GPU memory")
    p.add_argument("--dropout", type=number(float, 0, 0.9),
                   help="replace the dropout of mixing and DiT (default: the preset's or the checkpoint's)")
    p.add_argument("--no-augment", action="store_true", help="no change of colour, rotation and crop")
    p.add_argument("--balance", action="store_true",
                   help="every game alike (default: every kept frame alike)")
    p.add_argument("--human-weight", type=number(float, 0, 1e6), default=1.0, metavar="W",
                   help="weight of frames where a person took over (human.npy; default 1)")
    p.add_argument("--truth", action="store_true",
                   help="learn from truth.npy instead of actions.npy, to see what the labels cost")
    p.add_argument("--game-ids", action="store_true",
                   help="tell the model which game it plays (clip.json's \"game\")")
    p.add_argument("--game-dropout", type=share, default=0.2, metavar="P",
                   help="share of samples without their game, which sample.py --cfg needs (default 0.2)")
    p.add_argument("--hz", type=number(float, 1, 1000),
                   help="actions a second (default: the preset's or the checkpoint's)")
    p.add_argument("--horizon", type=count,
                   help="actions of a chunk (default: the preset's or the checkpoint's)")
    p.add_argument("--action-shift", type=natural,
                   help="actions between frame and chunk (default: the preset's or the checkpoint's)")
    p.add_argument("--val", type=number(float, 0, 0.9), default=0.1,
                   help="share of the clips held out (default 0.1; 0 = none)")
    p.add_argument("--val-frames", type=count, default=256,
                   help="frames of a validation, every game alike (default 256)")
    p.add_argument("--every", type=count, default=250,
                   help="steps between validations and saves (default 250)")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                   help="of matrix products (autocast); bfloat16 pays on GPUs (default float32)")
    p.add_argument("--compile", action="store_true", help="torch.compile the model: a minute at the start")
    p.add_argument("--checkpointing", action="store_true",
                   help="recompute activations in the backward pass: less memory, a third more time")
    p.add_argument("--workers", type=natural,
                   help="processes that load frames; 0: this one does (default: 4 at most; GPU on Linux: 16)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default auto)")
    p.add_argument("--seed", type=natural, default=0, help="of everything drawn (default 0)")
    p.add_argument("--dry-run", action="store_true",
                   help="check the data, take two steps, say how much memory they held, write nothing")
    p.set_defaults(run=lambda _: start(p, argv))
    return extract.cli(p, argv, M.ModelError)


if __name__ == "__main__":
    sys.exit(main())
