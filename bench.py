"""bench.py: what is claimed is measured here, on ten small games of our own [P 3.2: 10 games, 30 tasks].

    python bench.py demo --out DIR                     everything, end to end, in some minutes on two cores
    python bench.py record --out DATA [--games G..]    scripted play -> clip folders, or --video with a pad
    python bench.py suite --ckpt F [--tasks T..]       completion of tasks, beside random and scripted players
    python bench.py suite --env ID [--table T.json]    a game by others, by its Gymnasium id; also: record
    python bench.py transfer --out DIR [--games G..]   pre-training on other games against none
    python bench.py inverse --out DIR [--games G..]    labels of an inverse model against true ones
    python bench.py latency [--preset nitrogen]        one chunk, against the released way of sampling
    python bench.py throughput                         a step of each game, and of each stage of the chain
    python bench.py games --out DIR                    a picture of the ten games

The games take the 25-dim action and give 256 x 256 frames, 30 a second of game time, the same for the same
seed. In: nothing but the shipped weights, or a checkpoint. Out: tables on the terminal; under --out clip
folders, videos, pictures, JSON. Ratios are taken in one run on one machine; bare times say little elsewhere.
"""
import argparse
import contextlib
import functools
import importlib
import io
import itertools
import math
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from cmath import phase, rect
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from math import copysign, pi, sqrt, tau
from pathlib import Path

import cv2
import numpy as np
import extract                       # before torch, whose threads it keeps from spinning
import torch
from PIL import Image, ImageColor, ImageDraw
from tqdm import tqdm

import model as M
import parse
import play
import sample
from extract import (BUTTON, BUTTONS, STICKS, UserError, cores, neutral, read_clip, read_json, read_video,
                     video_writer, write_json, write_npy)

HERE = Path(__file__).parent
ICONS, GAMES, OTHERS = (read_json(HERE / f"weights/{name}.json", dict)
                        for name in ("icons", "games", "others"))
FPS, BEGAN = 30, time.monotonic()                  # steps a second of game time; when this process began
PLAYED = 1 << 40                                  # recordings take seeds below this, evaluations from here on


# A task: reach `goal` points within `seconds` of game time and alive. weights/games.json has the thirty:
#   kind      combat, navigation, specific
#   start     attributes that its game has in this task
#   fixed     the level is the same for all seeds; the start differs, mostly
TASKS = {}                 # name -> its row and its game, a class; filled at the end of this file
PLAYABLE = {}              # the class of each task's game, and of the games by others that were asked for


def pick_tasks(names):
    """Names of tasks and games -> names of tasks; none = all."""
    for name in names:
        if name not in TASKS and name not in GAMES:
            raise UserError(f"expected games or tasks ({', '.join(GAMES)}, {min(TASKS)}, ...), found "
                            f"{name!r}: give others")
    return [t for t in TASKS if not names or t in names or t.split("/")[0] in names]


def by_game(tasks):
    """Names of tasks, game after game -> {game: its tasks among them}."""
    return {game: [*group] for game, group in itertools.groupby(tasks, lambda task: PLAYABLE[task].name)}


def chosen(args, names):
    """The tasks that --games or --tasks name, or the one of --env."""
    if args.env and not names:
        args.workers = 1                               # other processes do not know it
        return [foreign_task(args)]
    if args.env or args.table:
        raise UserError("expected --table with --env ID, --env without --games or --tasks: leave one out")
    return pick_tasks(names)


# ---- recording: what a model learns from

def record(args):
    """Scripted play of games -> clip folders with the true actions, or videos with a pad drawn over them."""
    tasks = chosen(args, args.games)
    if not hasattr(PLAYABLE[tasks[0]], "wish"):
        raise UserError(f"--env {args.env}: expected a game with a scripted player, found none for it: "
                        "record it by hand with python play.py --exe GAME --human --record DATA")
    if args.ckpt and args.video:
        raise UserError("--ckpt and --video: a video cannot say where the model played: give one of them")
    jobs = recordings(args.out, tasks, args.minutes, args.seed, args.clip)
    work = record_video if args.video else functools.partial(record_folder, ckpt=args.ckpt, euler=args.euler)
    for i, line in enumerate(in_processes(work, jobs, args.workers), 1):
        print(f"clip {i}/{len(jobs)} | {line}", flush=True)


def recordings(out, tasks, minutes, seed, clip=30.0):
    """Jobs for record_folder or record_video: so many minutes of each game, in clips of so many seconds at
    most."""
    seconds = min(clip, minutes * 60)
    return [(folder(out) / f"{name}-{i:03}", group, f"{seed} {i}", round(seconds * PLAYABLE[tasks[0]].fps))
            for name, group in by_game(tasks).items() for i in range(round(minutes * 60 / seconds))]


def film(tasks, seed, n, policy=None):
    """n steps of scripted play of one game, task after task, by players that differ.

    Yields (frame, action, an episode begins here, the script plays). With a policy the two take turns: it
    plays into the situations that it makes, the script shows the way out (DAgger, arXiv 1011.0686).
    """
    rng, env = random.Random(f"{tasks[0].split('/')[0]} {seed}"), None
    for _ in range(n):
        begins = env is None or env.over
        if begins:
            number, task = rng.randrange(PLAYED), rng.choice(tasks)
            env = PLAYABLE[task](task, number)
            script = Scripted(env, number)
            turn, scripted = 0, True
        frame, action = env.render(), script.act()                 # in the model's turns too: it reacts late
        if policy and turn == 0:
            scripted, turn = not scripted, rng.randint(env.fps, 3 * env.fps)
            model, session = Learned(policy.config, env.fps), sample.Session(policy, seed=number)
        turn -= 1
        if not scripted:
            if model.waits():
                model.take(session.predict(frame))
            action = model.act()
        yield frame, action, begins, scripted
        env.advance(action)


def record_folder(path, tasks, seed, n, ckpt=None, euler=None):
    """A clip folder of n steps of one game, as play.py's recorder leaves it -> a line to print.

    ckpt: a model that takes turns with the script. human.npy is true where the script, as the human, played;
    only those rows are kept.
    """
    game = PLAYABLE[tasks[0]]
    clip = {"video": "", "game": game.name, "fps": game.fps, "n": n, "size": [extract.SIDE] * 2,
            "every": 1, "lag": 0, "player": str(ckpt or "scripted"), "seed": seed}
    if (path / "clip.json").is_file():
        if read_clip(path) != clip:
            raise UserError(f"{path}: expected what these flags record, found another: give another --out")
        return f"{path.name}: recorded already"
    policy = None
    if ckpt:
        torch.set_num_threads(1)
        policy = sample.Policy(ckpt, "cpu", steps=euler)
    with extract.new_folder(path) as tmp:
        writer, rows = extract.FramesWriter(tmp, "frames"), []
        for i, (frame, *row) in enumerate(film(tasks, seed, n, policy)):
            writer.add(i, frame)
            rows.append(row)
        writer.close(n)
        actions, begins, scripted = map(np.array, zip(*rows))
        arrays = {"actions": actions, "truth": actions, "confidence": np.ones(n, np.float32),
                  "keep": extract.dense(actions) & scripted,     # what the model did is nothing to learn from
                  "cuts": begins | (~scripted & np.roll(scripted, 1))}   # the model takes over
        if policy:
            arrays["human"] = scripted
        for file, array in arrays.items():
            write_npy(tmp / f"{file}.npy", array)
        write_json(tmp / "clip.json", clip)
    return f"{path.name}: {n} frames, {begins.sum()} episodes"


def record_video(path, tasks, seed, n):
    """PATH.mp4 with one of our pads over a corner, PATH.truth.npy float32 (n, 25), PATH.json: where the pad
    is -> a line. The pad, its corner, size and opacity are drawn at random."""
    if path.with_suffix(".json").is_file():
        return f"{path.name}: recorded already"
    rng = random.Random(f"overlay {path.name} {seed}")
    skin = rng.choice(extract.our_pads())
    wide, opacity = round(640 * rng.uniform(0.22, 0.3)), rng.uniform(0.75, 1)
    scale = wide / skin.size[0]
    high = round(skin.size[1] * scale)
    x, y = rng.choice((8, 632 - wide)), rng.choice((8, 352 - high))
    truth = []
    with video_writer(path.with_suffix(".mp4"), PLAYABLE[tasks[0]].fps, (640, 360)) as add:
        for frame, action, *_ in film(tasks, seed, n):
            picture = cv2.resize(frame, (640, 360))
            paste_pad(picture[y:y + high, x:x + wide], skin, action, opacity)
            add(picture)
            truth.append(action)
    write_npy(path.with_suffix(".truth.npy"), np.array(truth))
    x0, y0, x1, y1 = (v * scale for v in extract.visible_box(skin))
    box = [x + x0, y + y0, x1 - x0, y1 - y0]
    write_json(path.with_suffix(".json"), {"box": box, "template": skin.name})
    return f"{path.name}.mp4: {n} frames, {skin.name} {wide} px"


# ---- the suite: what is completed

def suite(args):
    """Completion of tasks by a checkpoint, beside random and scripted players [P 3.2]."""
    tasks, table = chosen(args, args.tasks), {}
    if args.video and not (args.ckpt and args.out):
        raise UserError("--video: expected --ckpt and --out with it, whose play and where to: give both")
    if args.ckpt:
        policy = sample.Policy(args.ckpt, args.device, steps=args.euler)
        print(f"device: {policy.device} ({policy.reason}), {policy.steps} steps")
        table["model"] = play_model(policy, tasks, args.n, args.actions_per_chunk, args.seed, args.delay,
                                    8 if args.env else 64, folder(args.out) if args.video else None)
    players = ["random", "scripted"] if hasattr(PLAYABLE[tasks[0]], "wish") else ["random"]
    rows = rows_of(completion(tasks, players, args.n, args.seed, args.workers) | table)
    show_rows(rows)
    if args.env:
        for who, row in rows["all"].items():
            print(f"{who}: return {row['score']:.2f} +- {row['deviation']:.2f}")
    if args.out:
        write_results(args, rows=rows)


def write_results(args, **results):
    """OUT/COMMAND.json: what was asked for, on what machine it ran, for how long, and what came of it."""
    command = args.run.__name__
    results |= {"run": command, "machine": machine(), "seconds": round(time.monotonic() - BEGAN)}
    write_json(folder(args.out) / f"{command}.json", vars(args) | results)


def completion(tasks, players, n, seed, workers):
    """n rollouts of each task by each player that is no model -> {player: {task: float (n, 2): won,
    score}}."""
    ended = in_processes(rollouts, [(task, who, n, seed) for who in players for task in tasks], workers)
    return {who: dict(zip(tasks, ended)) for who in players}


def rollouts(task, who, n, seed):
    """n rollouts by "scripted" or "random" -> float (n, 2): won, score."""
    ended = []
    for i in range(n):
        game = PLAYABLE[task](task, PLAYED + seed + i)
        player = (Scripted if who == "scripted" else Blind)(game, seed + i)
        while not game.over:
            game.advance(player.act())
        ended.append((game.won, game.score))
    return np.array(ended, float)


def play_model(policy, tasks, n, per_chunk=8, seed=0, delay=0, envs=64, films=None):
    """n rollouts of each task, `envs` games at a time, one batch of chunks for all of them.

    All tasks have one rate. delay: see Learned; films: a folder for a film of each task's first rollout.
    Returns {task: float (n, 2): won, score}.
    """
    fps, ended = PLAYABLE[tasks[0]].fps, {task: [] for task in tasks}
    jobs = [(task, i) for i in range(n) for task in tasks]
    coming = iter(tqdm(jobs, mininterval=10, leave=False, disable=None))
    session = sample.Session(policy, seed=seed, envs=min(envs, len(jobs)))

    def rollout(s):
        """Game after game in environment s: yields its frame, is sent a chunk for it."""
        for task, i in coming:
            game = PLAYABLE[task](task, PLAYED + seed + i)
            session.reset(s, seed + i - s)             # environment s adds s: the same noise in any place
            player, actions = Learned(policy.config, fps, delay, per_chunk), []
            while not game.over:
                if player.waits():
                    player.take((yield game.render()))
                actions.append(player.act())
                game.advance(actions[-1])
            ended[task].append((game.won, game.score))
            if films and i == 0:
                sample.write_film(films / film_name(task), fps, replay(task, PLAYED + seed, actions))
        while True:
            yield game.render()                        # to fill the batch

    slots = [rollout(s) for s in range(session.envs)]
    frames = [next(slot) for slot in slots]
    while sum(map(len, ended.values())) < len(jobs):
        frames = [slot.send(chunk) for slot, chunk in zip(slots, session.predict(np.stack(frames)))]
    return {task: np.array(rows, float) for task, rows in ended.items()}


def film_name(task):
    """The file of a task's film."""
    return f"{task.replace('/', '-')}.mp4"


def replay(task, seed, actions):
    """A rollout once more: yields its frames, each with its action."""
    game = PLAYABLE[task](task, seed)
    for action in actions:
        yield game.render(), action
        game.advance(action)


def rows_of(table):
    """Rollouts {player: {task: float (n, 2)}} -> {task, type, family or "all": {player: share()}}."""
    kinds = {task: (f"type: {row.kind}", f"family: {row.game.family}") for task, row in TASKS.items()}
    groups = {task: (task, *kinds.get(task, ()), "all") for task in next(iter(table.values()))}
    return {name: {who: share(np.concatenate([ended[task] for task in groups if name in groups[task]]))
                   for who, ended in table.items()} for name in itertools.chain(*zip(*groups.values()))}


def share(ended):
    """Rollouts float (n, 2): won, score -> a cell of a table, with Wilson's interval of the share that was
    won."""
    wins, n = int(ended[:, 0].sum()), len(ended)
    low, high = wilson(wins, n)
    return {"wins": wins, "n": n, "rate": wins / n, "low": low, "high": high,
            "score": float(ended[:, 1].mean()), "deviation": float(ended[:, 1].std())}


def wilson(wins, n, z=1.96):
    """The 95 % interval of a share [Wilson 1927]: holds for 0 of n and n of n too."""
    centre = (wins + z * z / 2) / (n + z * z)
    reach = z / (n + z * z) * sqrt(wins * (n - wins) / n + z * z / 4)
    return max(centre - reach, 0.0), min(centre + reach, 1.0)


def show_rows(rows):
    """Print the share of rollouts completed, the 95 % interval in brackets."""
    print(f"{'':24}" + "".join(f"{who:>20}" for who in rows["all"]))
    for name, row in rows.items():
        cells = "".join(f"{in_brackets(r):>20}" for r in row.values())
        print(f"{name:24}{cells}  n {row['random']['n']}")


def in_words(rows):
    """The shares completed of all tasks."""
    return ", ".join(f"{who} {row['rate']:.0%}" for who, row in rows["all"].items())


def in_brackets(r):
    """A share() in words."""
    return "{rate:.0%} [{low:4.0%},{high:5.0%}]".format(**r)


# ---- the demo: the whole chain

def demo(args):
    """Videos of play -> overlays found -> actions read -> two models trained -> they play."""
    out, tasks = folder(args.out), pick_tasks(args.tasks)
    asked = vars(args) | {"run": "demo", "out": "", "n": 0}            # --out may be moved, -n differ
    before = out / "arguments.json"
    if before.is_file() and read_json(before, dict) != asked:
        raise UserError(f"{before}: expected the flags of this run, found others: give a new --out")
    write_json(before, asked)
    videos, clips = out / "videos", out / "clips"
    runs = {"model": out / "model", "true labels": out / "model-truth"}

    with stage(out, "play on video") as say:
        jobs = recordings(videos, tasks, args.minutes, args.seed, args.minutes * 60 / args.videos)
        print(*in_processes(record_video, jobs, cores()), sep="\n")
        say(f"{len(jobs)} mp4, {args.minutes:.1f} minutes each of {', '.join(by_game(tasks))}, 640 x 360")

    with stage(out, "find the overlays (extract.py)") as say:
        run_scripts(*[["extract.py", videos, "--out", clips]] * min(cores(), len(jobs)))
        ious = {}
        for clip in extract.clips_in(clips):
            known, found = ([x, y, x + w, y + h] for x, y, w, h in (
                read_json(videos / f"{clip.name}.json", dict)["box"], read_clip(clip)["box"]))
            ious[clip.name] = extract.overlap(known, found)
        finding = f"{len(ious)} of {len(jobs)}, IoU {np.mean([*ious.values()]):.3f}"
        say(finding)

    with stage(out, "read the actions (parse.py)") as say:
        run_scripts(*[["parse.py", "run", clips]] * min(cores(), len(ious)))
        scores = parse.mean_of([parse.score(*actions_and_truth(clip), read_clip(clip)["geometry"])
                                for clip in extract.clips_in(clips)])
        reading = "stick R2 {left R2:.2f} left, {right R2:.2f} right, button F1 {F1:.2f}".format(**scores)
        say(reading)

    with stage(out, "train two toy models (train.py)") as say:
        words = [clips, "--preset", "toy", "--seed", args.seed]
        train_runs(args.steps, {runs["model"]: words, runs["true labels"]: [*words, "--truth"]})
        say(f"{args.steps} steps of 32 frames each, from parsed and from true labels")

    with stage(out, "play the tasks") as say:
        table = completion(tasks, ["random", "scripted"], args.n, args.seed, cores())
        for who, run in runs.items():
            table[who] = play_model(sample.Policy(run, "cpu"), tasks, args.n, seed=args.seed,
                                    films=out if who == "model" else None)
        rows = rows_of(table)
        say(in_words(rows))

    story(out, videos / f"{max(ious, key=ious.get)}.mp4", tasks, rows, finding, reading)
    show_rows(rows)
    better = sum(rows[task]["model"]["low"] > rows[task]["random"]["high"] for task in tasks)
    print(f"above random by an interval: {better} of {len(tasks)} tasks | {time.monotonic() - BEGAN:.0f} s | "
          f"{out / 'demo.png'}")
    write_results(args, iou=ious, parser=scores, rows=rows)


def train_runs(steps, runs):
    """Train small models side by side, quickly: {run: its data and flags for train.py}. What was begun goes
    on, what is done stays."""
    quick = ["--hz", FPS, "--steps", steps, "--every", steps,
             *"--batch 32 --lr 1e-3 --workers 1 --val 0 --no-augment --dropout 0 --ema 0.999".split()]
    commands = []
    for run, words in runs.items():
        if not (run / "model.safetensors").is_file() or M.read_meta(run)[0]["step"] < steps:
            begun = (run / "state.safetensors").is_file()
            commands.append(["train.py", *(("--resume", run) if begun else (*words, *quick, "--out", run))])
    run_scripts(*commands)


def actions_and_truth(clip):
    """What was read and what was pressed, both float32 (n, 25)."""
    return [np.load(clip / f"{name}.npy") for name in ("actions", "truth")]


def story(out, video, tasks, rows, finding, reading):
    """The demo's page, OUT/demo.png, 1600 x 820: a video with the box found, four of its crops beside what
    was pressed and what was read, the model at play, what it completes; finding, reading: the figures of
    extract.py and parse.py, in words."""
    page, clip = Image.new("RGB", (1600, 820), "#fafafa"), out / "clips" / video.stem
    meta, (actions, truth) = read_clip(clip), actions_and_truth(clip)

    def show(x, y, w, rgb, text=""):
        write(page, x, y - 10, text, 16)
        page.paste(Image.fromarray(rgb).resize((w, round(w * rgb.shape[0] / rgb.shape[1]))), (x, y))
    moments = [meta["n"] * k // 5 for k in (1, 2, 3, 4)]

    frame = frame_of(video, moments[1])
    cv2.rectangle(frame, [round(v) for v in meta["box"]], (0, 255, 0), 2)
    show(20, 50, 640, frame, f"1  a video with one of our pads; extract.py finds it among them: {finding}")
    write(page, 700, 40, f"2  the crop; upper pad: pressed, lower: read by parse.py; {reading}", 16)
    for k, i in enumerate(moments):
        crop = extract.Frames(clip, "pads")[i]
        show(700 + 440 * (k % 2), 60 + 225 * (k // 2), 430, sample.beside(crop, truth[i], actions[i]))
    write(page, 20, 560, "3  the model plays", 16)
    for k, task in enumerate(tasks[:3]):
        film = out / film_name(task)
        show(20 + 290 * k, 590, 280, frame_of(film, extract.video_info(film)["n"] // 2), task)
    write(page, 890, 560, f"4  tasks completed, n {rows[tasks[0]]['model']['n']} each; thin lines: 95 % "
          "intervals", 16)
    chart(page, 575, {name: row for name, row in rows.items() if ":" not in name})
    page.save(out / "demo.png")


def frame_of(video, i):
    """Frame i of a video, uint8 (h, w, 3)."""
    return next(itertools.islice(read_video(video), i, None))[1]


# ---- transfer: what pre-training on other games is worth

OTHERS_MINUTES, PRETRAINING, SEEDS = 5, 1500, (0, 1, 2)    # of each other game; steps; of data and noise


def transfer(args):
    """Pre-training on the nine other games against training from scratch [P Fig. 7].

    For each held-out game: post-train on so many minutes of it, against a fresh model with the same minutes
    and steps.
    """
    if len(by_game(pick_tasks(args.games))) == len(GAMES):
        raise UserError("--games: expected some games to hold out, found all ten: give fewer")
    out = folder(args.out)
    with stage(out, "record the games to pre-train on"):
        for game in GAMES:
            record_here(args, out / "data" / game, game, OTHERS_MINUTES, 0)

    def learners(data, say, game, minutes, seed):
        pre, others = out / f"pre-{game}", [out / "data" / name for name in GAMES if name != game]
        train_runs(PRETRAINING, {pre: [*others, "--preset", "toy", "--balance"]})       # for the first trial
        record_here(args, data / "few", game, minutes, 1000 + seed)
        return {"post-trained": [data / "few", "--ckpt", pre],
                "scratch": [data / "few", "--preset", "toy"]}, None
    compare(args, learners)


def record_here(args, path, game, minutes, seed):
    """So many minutes of a game as clip folders in a folder."""
    print(*in_processes(record_folder, recordings(path, pick_tasks([game]), minutes, seed), args.workers),
          sep="\n")


def compare(args, learners):
    """Trial after trial, each of a game, minutes and a seed: train the learners of its folder, {name: data
    and flags}, and let them play. Print and write what each completes, what the first gains over the second,
    and the scores of labels, or None, that learners() gives besides."""
    out, results = folder(args.out), []
    for game, minutes, seed in itertools.product(by_game(pick_tasks(args.games)), args.minutes, SEEDS):
        data = out / f"{game}-{minutes:g}-{seed}"
        with stage(out, data.name) as say:
            words, labels = learners(data, say, game, minutes, seed)
            train_runs(args.steps, {data / who: [*words[who], "--seed", seed] for who in words})
            rows = rows_of({who: play_model(sample.Policy(data / who, "cpu", steps=4), pick_tasks([game]),
                                            args.n, seed=seed) for who in words})
            say(in_words(rows))
        results.append({"game": game, "minutes": minutes, "seed": seed, "labels": labels, "rows": rows})
    first, second, *_ = names = [*words]
    gains = gains_of(results)
    for name, row in gains.items():
        points, gained = ("{:+.1%} [{:+.1%}, {:+.1%}]".format(*row[key]) if row[key] else
                          f"none: {second} completes nothing" for key in ("points", "gain"))
        rates = " | ".join(f"{who} {rate:.1%}" for who, rate in zip(names, row["rates"]))
        print(f"{name:26} {rates} | {first} over {second} {points} points | gain {gained} | n {row['n']}")
    write_results(args, results=results, gains=gains)


def gains_of(results):
    """Results of trials -> gain() of each size of data and each row of rows_of()."""
    rates = {}
    for result in results:
        for name, row in result["rows"].items():
            trial = [cell["rate"] for cell in row.values()]
            rates.setdefault(f"{result['minutes']:g} min, {name}", []).append(trial)
    return {name: gain(np.array(rows)) for name, rows in rates.items()}


def gain(rates):
    """Completion by two or more kinds of models, a row each trial, float (n, k) -> the means ("rates"), and
    of the first over the second the difference ("points") and the relative "gain", each [value, low, high]
    with the interval of resampled rows. The gain is None where the second completes nothing, its interval is
    of the draws in which it completes something.
    """
    picks = np.random.default_rng(0).integers(len(rates), size=(4000, len(rates)))
    drawn, means = rates[picks].mean(1), rates.mean(0)                                     # (4000, k), (k,)

    def figure(measure, draws):
        return [float(measure(*means[:2])), *np.quantile(measure(*draws.T[:2]), (0.025, 0.975)).tolist()]
    relative = lambda first, second: first / second - 1
    return {"n": len(rates), "rates": means.tolist(), "points": figure(np.subtract, drawn),
            "gain": figure(relative, drawn[drawn[:, 1] > 0]) if means[1] else None}


# ---- inverse: what labels are worth that a model gives

def inverse(args):
    """Labels by an inverse model against few true ones and as many true ones.

    Completion of a game by models of so many minutes with true labels ("few"), of these and ten times as many
    that an inverse model of theirs has labelled, and of as many with true labels. Of its labels stick R2,
    button F1 and onset F1.
    """
    def learners(data, say, game, minutes, seed):
        few, more, bare, model = (data / part for part in ("few", "more", "bare", "inverse"))
        for path, many in (few, minutes), (more, 10 * minutes):
            record_here(args, path, game, many, f"{2000 + seed} {path.name}")
        if not bare.is_dir():
            labels = shutil.ignore_patterns("actions.npy", "confidence.npy", "keep.npy")
            shutil.copytree(more, bare, ignore=labels)
        train_runs(args.steps, {model: [few, "--inverse", "--preset", "toy", "--seed", seed]})
        run_scripts(["sample.py", "label", bare, "--ckpt", model])
        read = np.mean([sample.score_chunks(actions[None], truth[None], np.ones((1, len(truth)), bool))
                        for actions, truth in map(actions_and_truth, extract.clips_in(bare))], 0)
        say("labels: R2 {:.2f}, F1 {:.2f}, onset F1 {:.2f}".format(*read))
        learns = {"labelled": [few, bare], "few": [few], "true": [few, more]}
        return {who: [*clips, "--preset", "toy"] for who, clips in learns.items()}, read.tolist()
    compare(args, learners)


# ---- speed

def latency(args):
    """Seconds for one chunk, against the same model sampled as the release does.

    In turn, so that a busy machine slows both. The release computes mixing, keys and values, time codes and
    AdaLN anew at each step.
    """
    device, reason = M.pick_device(args.device)
    model = M.create(M.preset(args.preset), device=device).eval()
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():                            # or all velocities are 0, and agree
                p.normal_(0, 0.02)
    c = model.config
    frames = torch.randint(256, (1, c.frames, c.image, c.image, 3), device=device).byte()
    noise = torch.randn(1, c.horizon, c.action_dim, device=device)
    print(f"{args.preset}: {M.count(model)[0]:,} parameters, float32, "
          f"batch 1, {device} ({reason}), {machine()}, best of 3")

    def released(k):
        x, seen = noise, model.see(frames)
        for t in sample.buckets(k, c.buckets).to(device):
            x = x + model.velocity(x, t[None], model.mix(model.assemble(seen))) / k
        return x
    ours = lambda k: sample.euler(model, model.encode(frames), noise, k)

    for k in args.steps:
        with torch.inference_mode():
            apart = float((ours(k) - released(k)).abs().max())
            fast, slow = best_of_three(lambda n: ours(k), lambda n: released(k))
        print(f"{k:3} steps | ours {fast:.3f} s | released {slow:.3f} s | {slow / fast:.2f} x faster | "
              f"largest difference {apart:.1e}")


def best_of_three(*works):
    """Seconds of each of some functions of the round's number, the best of three rounds."""
    best = [math.inf] * len(works)
    for n in range(3):
        for i, work in enumerate(works):
            began = time.perf_counter()
            work(n)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            best[i] = min(best[i], time.perf_counter() - began)
    return best


def throughput(args):
    """Frames a second of each game under scripted play, and of each stage of the chain."""
    steps, count = 20 * FPS, lambda frames: sum(1 for _ in frames)
    stages = {name: lambda n, tasks=tasks: count(film(tasks, "0 0", steps))
              for name, tasks in by_game(TASKS).items()}
    with tempfile.TemporaryDirectory() as tmp:
        stages |= {"record": lambda n: record_video(Path(tmp) / f"{n}", ["swarm/bugs"], "0 0", steps),
                   "decode": lambda n: count(read_video(f"{tmp}/{n}.mp4")),
                   "extract.py": lambda n: extract.main([f"{tmp}/{n}.mp4", "--out", f"{tmp}/clips"]),
                   "parse.py": lambda n: parse.main(["run", f"{tmp}/clips"])}
        with contextlib.redirect_stdout(io.StringIO()):    # after a round the templates are drawn, described
            took = best_of_three(*stages.values())
    for name, seconds in zip(stages, took):
        print(f"{name:12} {steps / seconds:8.0f} frames/s")


# ---- players

class Scripted:
    """Plays a task as a person does: knows the game's wish, but sees it late, moves sticks gradually and
    askew, and slips now and then."""
    slip = 0

    def __init__(self, game, seed):
        self.game, rng = game, random.Random(f"player {seed}")
        self.late = deque([(0j, "")] * rng.randint(2, 4))
        self.askew, self.reach = rng.gauss(0, 0.05), rng.uniform(0.93, 1.0)
        self.quick, self.careless, self.rng = rng.uniform(0.4, 0.7), rng.uniform(0.002, 0.007), rng
        self.sticks = [0j, 0j]

    def act(self):
        """float (25,), the action of this step."""
        self.late.append(self.game.wish())
        *wanted, keys = self.late.popleft()
        wanted, keys = self.slipped(wanted, keys.split())
        for i, want in enumerate(wanted):
            trembling = complex(self.rng.gauss(0, 0.03), self.rng.gauss(0, 0.03)) if want else 0
            self.sticks[i] += (want * rect(self.reach, self.askew) + trembling - self.sticks[i]) * self.quick
        return pad_action(map(capped, self.sticks), keys)

    def slipped(self, wanted, keys):
        """The sticks and buttons wanted, or, now and then for some steps, others."""
        rng = self.rng
        if not self.slip:
            if rng.random() >= self.careless:
                return wanted, keys
            self.slip, self.how = rng.randint(5, 11), rng.choice(("veer", "veer", "rest", "button"))
            self.veer = rect(1, rng.choice(SIDES) * rng.uniform(0.6, 2))
            self.extra = rng.choice(sorted(self.game.keys))
        self.slip -= 1
        if self.how == "veer":
            return [w * self.veer for w in wanted], keys
        return ([0j, 0j], []) if self.how == "rest" else (wanted, [*keys, self.extra])


class Blind:
    """Plays without looking: sticks anywhere and each of the game's buttons down or up, drawn anew every 4 to
    16 steps."""
    left = 0

    def __init__(self, game, seed):
        self.rng, self.keys = random.Random(f"random {seed}"), game.keys

    def act(self):
        """float (25,), the action of this step."""
        if self.left == 0:
            self.left = self.rng.randint(4, 16)
            sticks = [complex(self.rng.uniform(-1, 1), self.rng.uniform(-1, 1)) for _ in STICKS]
            self.last = pad_action(sticks, [k for k in self.keys if self.rng.random() < 0.5])
        self.left -= 1
        return self.last


def pad_action(sticks, keys):
    """float32 (25,) from the left and the right stick (complex, y down) and names of buttons."""
    action = neutral()
    action[21:] = [v for s in sticks for v in (s.real, s.imag)]
    action[[BUTTON[k] for k in keys]] = 1
    return action


class Learned:
    """The actions to come of a policy that plays one game: chunks go in, actions of single steps come out.

    delay: a chunk comes so many steps after its frame. Meanwhile the one before it is played on, and its own
    first steps pass.
    """

    def __init__(self, config, fps, delay=0, per_chunk=8):
        self.lead = max(config.action_shift, delay)                    # actions in hand when a frame is seen
        at = (np.arange(int(config.horizon * fps / config.hz)) * config.hz / fps).astype(int)
        longest = len(at) - self.lead
        if per_chunk > longest:
            raise UserError(f"--actions-per-chunk {per_chunk}: expected at most {longest}, a chunk of this "
                            "checkpoint: give a smaller number")
        self.rows = at[self.lead - config.action_shift:][:per_chunk]   # of a chunk, at the game's rate
        self.coming = deque([neutral()] * self.lead)

    def waits(self):
        """Is it time for the next chunk?"""
        return len(self.coming) <= self.lead

    def take(self, chunk):
        """A chunk float (T, 25) for the frame of now, played after what was planned before."""
        self.coming.extend(chunk[self.rows])

    def act(self):
        """float (25,), the action of this step."""
        return self.coming.popleft()


# ---- games by others

# weights/others.json says how a pad plays them: what holds for the Gymnasium ids that begin so; all that fit
# are merged, later ones win, and --table FILE.json is one more.
#   pip, module    what to install, and to import so that the ids are known
#   make           arguments for gymnasium.make
#   fps, seconds   steps a second of game time, after the frame skip; the longest episode
#   frame          the picture: "render", "" = the observation, else the part of the observation of that name
#   controls       the game's name of an action, or its number -> what the pad does for it: readings and their
#                  factors, {"left.up": 1, "SOUTH": 1}. Of a Discrete space the first is taken that has all of
#                  its readings beyond play.TILT ({} always has), of MultiBinary all. A Box takes the sums.
#   success        {"return": at least this}, or {"info": key of the last info, at least 1}
#   script         the scripted player (of SCRIPTS)

def foreign_task(args):
    """--env and --table -> the id, from now on in PLAYABLE."""
    table = {}
    for beginning, row in OTHERS.items():
        if args.env.startswith(beginning):
            table |= row
    if args.table:
        table |= read_json(args.table, dict)
    with extract.reading(f"--env {args.env}", "fps, seconds, frame, controls, success in --table "
                         f"({', '.join(OTHERS)} are known)"):
        words = {word for rule in table["controls"].values() for word in rule}
        if min(table["fps"], table["seconds"]) <= 0 or not {"return", "info"} & table["success"].keys():
            raise ValueError("fps or seconds of 0, or a success by neither return nor info")
        game = type(args.env, (Foreign,), {"fps": table["fps"], "table": table, "idle": []})
        game.name = re.sub(r"\W+", "_", args.env).lower()
        game.keys = sorted(words & BUTTON.keys()) or ["SOUTH"]
        if "script" in table:
            game.wish = SCRIPTS[table["script"]]
        PLAYABLE[args.env] = game
    return args.env


class Foreign:
    """A game by others, with what players, recorders and the suite ask of a Game. A subclass is one id: its
    table, environments at rest, and wish() where there is a scripted player."""
    t, score, won, over = 0, 0.0, False, False

    def __init__(self, task, seed):
        number = seed // PLAYED << 30 | seed % (1 << 30)                   # 31 bits; evaluation stays apart
        with (extract.reading(f"--env {task}", "a game that can be made (pip install gymnasium "
                              f"{self.table.get('pip', 'and its package')}), whose {self.table['frame']!r} "
                              "is a frame uint8 (h, w, 3), and controls that fit its actions"),
              tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as here, contextlib.chdir(here)):
            # ViZDoom leaves files there
            self.env = self.idle.pop() if self.idle else open_env(task, self.table)
            self.inside = self.env.unwrapped
            buttons = getattr(getattr(self.inside, "game", None), "get_available_buttons", list)
            self.names = [button.name for button in buttons()]             # of ViZDoom
            self.choose = pad_to_action(self.env.action_space, self.table["controls"], self.names)
            self.choose(neutral())
            self.look(self.env.reset(seed=number)[0])

    def look(self, seen):
        """The picture after a step -> self.frame uint8 (256, 256, 3)."""
        part = self.table["frame"]
        rgb = self.env.render() if part == "render" else seen[part] if part else seen
        if rgb.dtype != np.uint8 or rgb.shape[2:] != (3,):
            raise ValueError(f"{part!r}: {rgb.dtype} {rgb.shape}")
        self.frame = extract.shrink(np.ascontiguousarray(rgb))

    def render(self):
        """uint8 (256, 256, 3)."""
        return self.frame

    def advance(self, action):
        """One step with action float (25,)."""
        seen, reward, terminated, truncated, info = self.env.step(self.choose(action))
        self.t, self.score = self.t + 1, self.score + float(reward)
        self.over = terminated or truncated or self.t >= self.table["seconds"] * self.fps
        if self.over:
            rule = self.table["success"]
            value = self.score if "return" in rule else info.get(rule["info"], 0)
            self.won = bool(value >= rule.get("return", 1))
            self.idle.append(self.env)
        else:
            self.look(seen)


def open_env(env_id, table):
    """An environment that gives pictures; only here the packages are needed."""
    import gymnasium
    if "module" in table:
        importlib.import_module(table["module"])                           # its import registers the ids
    return gymnasium.make(env_id, render_mode="rgb_array", **table.get("make", {}))


def pad_to_action(space, controls, names=()):
    """An action space, its controls, the game's names of its actions -> from action float (25,) to the
    space's element."""
    kind = type(space).__name__
    rules = {names.index(key) if key in names else int(key): rule for key, rule in controls.items()
             if key in names or key.isdecimal()}                       # others are of other games of the kind
    n = math.prod(space.shape) if kind == "Box" else int(space.n)
    if max(rules, default=n) >= n or kind == "Discrete" and {} not in rules.values():
        raise ValueError(f"{kind} of {n} ({', '.join(names)}), {rules}; one has to be {{}}: the pad at rest")

    def choose(action):
        read = {i: [factor * read_pad(action, name) for name, factor in rule.items()]
                for i, rule in rules.items()}
        held = [i for i, values in read.items() if all(value > play.TILT for value in values)]
        if kind == "Discrete":
            return held[0]
        if kind == "MultiBinary":
            return np.isin(np.arange(n), held).astype(np.int8)
        sums = np.reshape([sum(read.get(i, ())) for i in range(n)], space.shape)
        return np.clip(sums, space.low, space.high).astype(space.dtype)
    return choose


def read_pad(action, name):
    """What the pad says: a button or a side of a stick (left.up) 0..1, an axis (left.x) -1..1."""
    if name in BUTTON:
        return action[BUTTON[name]]
    stick, side = name.split(".")
    x, y = action[STICKS[stick]]
    value = {"x": x, "y": y, "right": x, "left": -x, "down": y, "up": -y}[side]
    return value if side in "xy" else max(value, 0)


def aims(game):
    """ViZDoom: turn (or walk sideways where there is no turning) to the monster that is near and near to the
    middle, and shoot when it is there. It reckons with being late, as people do: it looks where the monster
    is in four steps."""
    doom = game.inside.game
    middle, state = doom.get_screen_width() / 2, doom.get_state()
    foes = [(label.x + label.width / 2 - middle, label.width / 2)
            for label in (state.labels if state else ()) if label.object_category == "Monster"]
    off, half = min(foes, key=lambda f: abs(f[0]) - 4 * f[1], default=(middle, 0.0))  # none in sight: turn on
    moved, game.off = off - getattr(game, "off", off), off
    soon = off + 4 * moved if abs(moved) < 60 else off                     # else it is another monster
    stick = complex(copysign(1, soon)) if abs(soon) > max(half / 2, 4) else 0j
    shoots = "RIGHT_TRIGGER" if max(abs(off), abs(soon)) < 0.7 * half + 2 else ""
    if "TURN_LEFT" in game.names:
        return 0j, stick, shoots
    return stick, 0j, shoots


SCRIPTS = {"aims": aims}


# ---- what a game is

class Placed:
    """What is at a place: it subtracts like one. radius: how wide it is to each side where it walks."""
    radius = 12

    def __sub__(self, other):
        return self.at - other

    def __rsub__(self, other):
        return other - self.at


class Game(Placed):
    """One task of one game, the same for the same seed. A subclass has begin(), play(), draw() and wish():
    the left stick, the right one where the game has it (complex, y down) and the buttons that win.
    weights/games.json holds its tasks, keys (what each control does), health (lives), where it and the score
    stand (hud), and other attributes that all its tasks have or begin with; what a task's "start" holds is of
    this one."""
    fps = FPS
    t = score = 0
    won = over = False
    left = right = 0j
    held = ()

    def __init__(self, task, seed=0):
        self.task, self.rng = TASKS[task], random.Random(f"{task} {seed}")
        # A fixed level is the same for all seeds, its start mostly is not.
        self.plan = random.Random(task) if self.task.fixed else self.rng
        self.uniform, self.choice = self.rng.uniform, self.rng.choice
        self.health, self.due = self.lives, {}
        vars(self).update(self.task.start)
        self.things, self.foes, self.bolts, self.shots = [], [], [], []
        self.begin()

    def advance(self, action):
        """One step with action float (25,), without drawing."""
        if not self.over:
            self.left, self.right = (capped(complex(*action[s])) for s in STICKS.values())
            self.held = {BUTTONS[i] for i in np.flatnonzero(action[:21] > 0.5)}
            self.t += 1
            self.play()
            self.won = self.score >= self.task.goal and self.health > 0
            self.over = self.won or self.health <= 0 or self.t >= self.task.seconds * FPS

    def step(self, action):
        """One step with action float (25,) -> the frame that follows, uint8 (256, 256, 3)."""
        self.advance(action)
        return self.render()

    def render(self):
        """The frame as it stands, with health and what is done of the goal."""
        frame = self.draw()
        health, score, y = self.hud
        for i in range(self.health):
            disc(frame, complex(14 + 16 * i, y + 8), 6, health)
        for i in range(self.task.goal if self.task.goal <= 12 else 0):
            bar(frame, complex(244 - 11 * i, y + 3), 7 + 10j, score, -1 if i < self.score else 1)
        return frame

    def ready(self, what, steps):
        """Has `what` rested? If so it is used now and rests for `steps`."""
        if self.rests(what):
            return False
        self.due[what] = self.t + steps
        return True

    def pressed(self, button, steps):
        """Is a button held that is ready()?"""
        return button in self.held and self.ready(button, steps)

    def rests(self, what):
        """Steps until `what` is ready."""
        return max(self.due.get(what, 0) - self.t, 0)

    def hurt(self):
        """Lose one health, at most once in 25 steps."""
        if self.ready("hurt", 25):
            self.health -= 1

    def around(self, low, high):
        """A vector of random length and direction."""
        return rect(self.uniform(low, high), self.uniform(0, tau))

    def distance(self, thing):
        """How far a thing is from the player."""
        return abs(thing.at - self.at)

    def nearest(self, things):
        """The thing nearest to the player, None of none."""
        return min(things, key=self.distance, default=None)

    def reached(self, thing):
        """Is the player at a thing, and its button held?"""
        return self.distance(thing) < thing.near and thing.button in {"", *self.held}

    def relative(self, p):
        """A place as complex(ahead, to the right) of the player."""
        return (p - self.at) * rect(1, -self.face)

    def angle(self, p):
        """Where p is from straight ahead, in radians, right positive."""
        return phase(self.relative(p))

    def back(self, x, y=0, h=256):
        """The scenery behind, from its column x and row y on; it is h pixels high."""
        x = int(x) % 512
        return sky(*self.scenery, h)[y:y + 256, x:x + 256].copy()

    def fly(self, shots, hits, reach=200):
        """Move shots (at, v); gone are those that hit something (hits(shot) sees to what follows) or are
        further away than `reach`."""
        for shot in shots:
            shot.at += shot.v
        shots[:] = [shot for shot in shots if not hits(shot) and self.distance(shot) < reach]

    def take(self, things, thing):
        """It is gone: a point."""
        things.remove(thing)
        self.score += 1

    def fire(self, at, foes):
        """The right trigger sends bolts along self.aim; they fly on until they are near a foe, which loses a
        point of hp, below the ground or far away."""
        rest, ahead, speed, near, ground, reach = self.gun
        if self.ammo and self.pressed("RIGHT_TRIGGER", rest):
            self.ammo -= 1
            self.bolts.append(Thing("bolt", at + rect(ahead, self.aim), v=rect(speed, self.aim)))

        def hits(bolt):
            struck = [foe for foe in foes if abs(foe - bolt) < near]
            for foe in struck[:1]:
                foe.hp -= 1
            return struck or bolt.at.imag > ground
        self.fly(self.bolts, hits, reach)
        self.reap(foes)

    def reap(self, things):
        """Those without hp are gone."""
        for thing in list(things):
            if thing.hp <= 0:
                self.take(things, thing)

    def wounds(self, shot, at, width):
        """Does a shot hit the player, who is at `at`? That hurts."""
        near = abs(shot - at) < width
        if near:
            self.hurt()
        return near


# ---- machinery
# ---- processes, pictures

def folder(path):
    """--out, made where it is missing."""
    Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)


def in_processes(work, jobs, workers):
    """work(*job) for all jobs, in order; in processes where that pays."""
    workers = min(workers, len(jobs))
    if workers < 2:
        yield from (work(*job) for job in jobs)
        return
    pool = ProcessPoolExecutor(workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    try:
        yield from pool.map(work, *zip(*jobs))
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def stage(out, what):
    """One line a stage: what is done, what came of it, how long it took. What is printed meanwhile goes to a
    log."""
    said, began = [], time.monotonic()
    print(f"{what} ...", flush=True)
    with open(out / "stages.log", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        yield said.append
    print(what, *said, f"{time.monotonic() - began:.0f} s", sep=" | ", flush=True)


def run_scripts(*commands):
    """Run scripts of ours side by side, each with its share of the cores, of the videos or of the clips.
    Inside of a stage: what they print goes to its log."""
    sys.stdout.flush()
    n = len(commands)
    settings = os.environ | {"OMP_NUM_THREADS": f"{max(cores() // n, 1)}", "WORLD_SIZE": f"{n}"}
    running = [subprocess.Popen([sys.executable, str(HERE / script), *map(str, words)], stdout=sys.stdout,
                                stderr=subprocess.STDOUT, env=settings | {"RANK": f"{rank}"})
               for rank, (script, *words) in enumerate(commands)]
    try:
        failed = [p.args[1] for p in running if p.wait()]
    finally:
        for p in running:
            p.wait()                                   # interrupted ones were so too, and end cleanly
    if failed:
        raise UserError(f"{failed[0]} failed: see the end of {sys.stdout.name}")


def machine():
    """What the numbers were taken on."""
    return (f"{platform.machine()}, {cores()} cores, torch {torch.__version__}, "
            f"opencv {cv2.__version__}")


def paste_pad(ground, skin, action, opacity):
    """Draw the pad over a region (h, w, 3) of a picture, in place."""
    rgba = cv2.resize(extract.draw(skin, action), ground.shape[1::-1], interpolation=cv2.INTER_AREA)
    ground[:] = extract.over(ground, rgba, opacity)


def write(page, x, y, text, size=13, ink="#14141e"):
    """A line of text on a picture, from its lower left corner."""
    ImageDraw.Draw(page).text((x, y), text, ink, anchor="ls", font_size=size)


def chart(page, y, rows):
    """A table {row: {player: share()}} as groups of bars on a picture; a thin line is the interval."""
    pen = ImageDraw.Draw(page)
    for name, row in rows.items():
        write(page, 890, y + 28, name)
        for who, r in row.items():
            rate, low, high = (1010 + 330 * r[key] for key in ("rate", "low", "high"))
            pen.rectangle((1010, y, rate, y + 10), "#dc3c28" if who == "model" else "#a0a0aa")
            pen.line((low, y + 5, high, y + 5), "#14141e")
            write(page, 1350, y + 10, f"{who} {in_brackets(r)}", 11)
            y += 13
        y += 8


def games(args):
    """A picture of the thirty tasks after two seconds of scripted play, OUT/games.png."""
    page = Image.new("RGB", (1560, 1400), "#181818")
    for i, (name, task) in enumerate(TASKS.items()):
        *_, (frame, *_) = film([name], args.seed, 2 * FPS)
        x, y = i % 6 * 260 + 2, i // 6 * 280 + 2
        page.paste(Image.fromarray(frame), (x, y))
        write(page, x, y + 272, f"{name}: {task.text}", 10, "white")
    path = folder(args.out) / "games.png"
    page.save(path)
    print(path)


# ---- the engine of the games

# Places are complex numbers, x right and y down: in cells of a map (first person) or in pixels. A step is
# 1/30 s of game time. A frame shows all that a player needs: nothing is hidden but what others will do next.


class Thing(Placed, types.SimpleNamespace):
    """An actor or an object: its kind (a picture of ICONS), its place, and what its game adds. wind: steps
    until it strikes; dash: steps that it still charges, the way it goes; near: from where it is reached, with
    its button held."""
    hp, wind, dash, way, near, button = 1, 0, 0, 1, 0, ""

    def __init__(self, kind, at, **more):
        super().__init__(kind=kind, at=at, **more)


@functools.cache
def colour(code):
    """'f80' or 'ff8800' -> (255, 136, 0)."""
    return ImageColor.getrgb(f"#{code}")


@functools.lru_cache(2048)
def icon(name, size, turn, flip):
    """A picture of ICONS at `size` pixels, turned clockwise by turn / 32 of a circle, with a dark rim.

    Returns uint8 (size, size, 3) and its mask (size, size). Shapes lie on a grid of 256 x 256; actors look
    to the right: [x, y, r, colour] = disc, [x, y, x, y, x, y, ..., colour] = polygon.
    """
    big = np.zeros((256, 256, 4), np.uint8)
    for *v, ink in ICONS[name]:
        rgba = *colour(ink), 255
        if len(v) == 3:
            cv2.circle(big, v[:2], v[2], rgba, -1)
        else:
            cv2.fillPoly(big, [np.reshape(v, (-1, 2))], rgba)
    big = cv2.warpAffine(big, cv2.getRotationMatrix2D((128, 128), -turn * 11.25, 1), (256, 256),
                         flags=cv2.INTER_NEAREST)
    if flip:
        big = cv2.flip(big, 1)
    big[..., 3] = cv2.dilate(big[..., 3], np.ones((17, 17), np.uint8))
    small = cv2.resize(big, (size, size), interpolation=cv2.INTER_AREA)
    return small[..., :3].copy(), np.uint8(small[..., 3] > 127)


def sprite(frame, name, at, size, turn=0.0, flip=False, seen=None):
    """Draw an icon centred at a place, turned by `turn` radians, cut at the frame's edge.

    seen: bool (256,), the columns in which nothing hides it.
    """
    size = max(int(size) // 4 * 4, 4)
    x, y = round(at.real) - size // 2, round(at.imag) - size // 2
    x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + size, 256), min(y + size, 256)
    if x0 < x1 and y0 < y1:
        picture, mask = (layer[y0 - y:y1 - y, x0 - x:x1 - x]
                         for layer in icon(name, size, round(turn / tau * 32) % 32, flip))
        cv2.copyTo(picture, mask if seen is None else mask * seen[x0:x1], frame[y0:y1, x0:x1])


def sprites(frame, things, size, corner=0j):
    """Draw things as they are; corner: where the camera's top left corner is."""
    for thing in things:
        sprite(frame, thing.kind, thing - corner, size)


def dot(p):
    """A place as OpenCV wants it."""
    return round(p.real), round(p.imag)


def disc(frame, at, radius, ink, thick=-1):
    """A circle around a place: filled, or a ring."""
    cv2.circle(frame, dot(at), radius, colour(ink), thick)


def bar(frame, corner, size, ink, thick=-1):
    """A rectangle of a size from its top left corner on: filled, or a border."""
    cv2.rectangle(frame, dot(corner), dot(corner + size), colour(ink), thick)


def line(frame, start, end, ink, thick):
    """A straight line between two places."""
    cv2.line(frame, dot(start), dot(end), colour(ink), thick)


def arrow(frame, at, angle, size, ink):
    """A fat arrowhead at a place that points along `angle`."""
    for grow, paint in ((1.35, "0a0a10"), (1, ink)):
        corners = (1, 0), (0.9, 2.5), (0.3, pi), (0.9, -2.5)
        polygon(frame, [at + size * grow * rect(r, angle + a) for r, a in corners], paint)


def polygon(frame, corners, ink):
    """A filled polygon; its corners are cut to whole pixels."""
    cv2.fillPoly(frame, [whole(corners)], colour(ink))


def whole(places):
    """Places cut to whole pixels, int32 (n, 2)."""
    return np.int32([(p.real, p.imag) for p in places])


@functools.cache
def pattern(kind, dark, light, h, w):
    """A texture of two colours with some noise, uint8 (h, w, 3)."""
    y, x = np.mgrid[:h, :w]
    (high, wide, shift), *shares = ICONS["patterns"][kind]     # of the joints; of each layer
    joints = (y % high < 2) | ((x + y // high * shift) % wide < 2)
    odd = (y // 32 + x // 32) % 2
    waves, dots = np.sin(x / 9 + 2 * np.sin(y / 13)), (y % 16 - 8) ** 2 + (x % 16 - 8) ** 2 < 10
    layers = 1, joints, odd, joints * odd, waves, dots
    level = sum(share * layer for share, layer in zip(shares, layers))
    grain = np.random.default_rng(0).random((h // 4 + 1, w // 4 + 1), np.float32)
    grain = cv2.resize(grain, (w, h), interpolation=cv2.INTER_NEAREST)
    mixed = (0.75 * level + 0.25 * grain)[..., None]
    return np.uint8(colour(dark) * (1 - mixed) + colour(light) * mixed)


@functools.cache
def sky(top, low, far, near, h):
    """Hills under a sky, uint8 (h, 768, 3), the same every 512 columns."""
    shade = np.linspace(0, 1, h)[:, None, None]
    image = np.repeat(np.uint8((1 - shade) * colour(top) + shade * colour(low)), 768, 1)
    x = np.arange(768) / 512 * tau
    for i, ink in enumerate((far, near)):
        waves = np.sin(3 * x + i) + 0.6 * np.sin(7 * x + 2 * i)
        y = h * (0.72 + 0.14 * i) + h * 0.09 * waves
        polygon(image, [*map(complex, range(768), y), complex(767, h), complex(0, h)], ink)
    return image


def span(x, low=-1.0, high=1.0):
    """A number cut to [low, high]; by default to what a stick gives."""
    return min(max(x, low), high)


def fence(p, low, high):
    """A place moved into the square from low to high."""
    return complex(span(p.real, low, high), span(p.imag, low, high))


def capped(v):
    """A vector no longer than 1: what a stick gives."""
    return v if abs(v) <= 1 else v * (1 / abs(v))


def pointed(stick, before):
    """The direction of a stick, or the one before where it is near rest."""
    return phase(stick) if abs(stick) > 0.3 else before


def unit(v):
    """A vector of length 1, or 0."""
    return v / abs(v) if v else 0j


def between(v, angle):
    """The angle between a vector and a direction, in radians, 0 to pi."""
    return abs(phase(v * rect(1, -angle)))


def ahead_and_right(v, way):
    """A vector in the frame of who looks along `way`: complex(ahead, to the right), times the length of
    `way`."""
    return v * way.conjugate()


def walled(w, h):
    """An empty map with a wall around it, bool (h, w)."""
    return np.pad(np.zeros((h - 2, w - 2), bool), 1, constant_values=True)


CENTRE = 128 + 128j                                # of the frame
MIDDLE = 0.5 + 0.5j                                # of a cell, from its corner
WAYS, SIDES = (1, -1, 1j, -1j), (-1, 1)            # from a cell to the next ones; left and right


def cell_of(p):
    """The corner of the cell in which a place lies."""
    return complex(int(p.real), int(p.imag))


def free_cells(grid):
    """The corners of all cells without a wall, row by row."""
    return [complex(x, y) for y, x in np.argwhere(~grid)]


def distances(grid, goal):
    """Steps to the cell of `goal` from every cell from which it can be reached: {cell: n}; cells are whole
    numbers."""
    queue, free = [cell_of(goal)], {*free_cells(grid)}
    far = {queue[0]: 0}
    for here in queue:
        for cell in (here + way for way in WAYS):
            if cell in free and cell not in far:
                far[cell] = far[here] + 1
                queue.append(cell)
    return far


def waypoint(far, p):
    """Where to walk next on a shortest way: the middle of the next cell, or, for who stands well in line,
    that of the last one of the first straight stretch."""
    here = cell_of(p)
    nearer = lambda way: far.get(here + way, 999) < far.get(here, 998)
    way = next(filter(nearer, WAYS), 0)
    aside = abs((p.imag if way.real else p.real) % 1 - 0.5)
    here += way
    while aside <= 0.15 and nearer(way):
        here += way
    return here + MIDDLE


# ---- first person

LENS = np.linspace(-0.7, 0.7, 128)                 # where each of 128 columns looks: lateral over forward
ROWS = np.arange(128, dtype=np.float32)[:, None] - 63.5


class Walled(Game):
    """A map of square cells with walls; cell: the side of one in the game's units."""
    cell = 1

    def draw_cells(self):
        """An empty square map, and `blocks` of its cells at random."""
        inner = range(1, self.size - 1)
        return walled(self.size, self.size), self.plan.sample([*itertools.product(inner, inner)], self.blocks)

    def enter(self, grid):
        """Take a map; the distances to a cell of it are found once."""
        self.grid, self.rows = grid, grid.tolist()                           # lists are faster by the cell
        self.ways_to = functools.cache(functools.partial(distances, grid))

    def move(self, p, d, r=12):
        """From p by d, a disc of radius r: one axis at a time, so that it glides along walls."""
        for step in (d.real, 1j * d.imag):
            corners = (p + step + r * corner for corner in (1 + 1j, 1 - 1j, -1 + 1j, -1 - 1j))
            if not any(map(self.blocked, corners)):
                p += step
        return p

    def walk(self, who, d):
        """The player or a thing moves by d, along walls."""
        who.at = self.move(who.at, d, who.radius)

    def blocked(self, p):
        """Is there a wall at a place?"""
        p /= self.cell
        return self.rows[int(p.imag)][int(p.real)]

    def send(self, thing, place, far):
        """Move a thing so far towards a place, along walls; away from it where `far` is negative."""
        self.walk(thing, far * unit(place - thing))

    def sees(self, p, q):
        """Is the straight line between two places free of walls?"""
        n = int(abs(q - p) / self.cell * 4) + 1
        return not any(self.blocked(p + (q - p) * i / n) for i in range(n + 1))

    def on_the_way(self, goal, p):
        """Where to walk next from p to get to the goal."""
        return waypoint(self.ways_to(cell_of(goal / self.cell)), p / self.cell) * self.cell


class FirstPerson(Walled):
    """A map of square cells seen from inside, by ray casting: all crossings of all rays with all grid lines
    at once. The left stick walks, the right one turns."""

    @classmethod
    @functools.cache
    def paint(cls):
        """Wall texture (32 shades x 32 x 32, 3) and ceiling and floor (128, 128, 3), uint8."""
        texture = np.float32(pattern(*cls.wall, 32, 32))
        shades = [texture * (1 - i / 18) * side for side in (1, 0.75) for i in range(16)]
        y = np.linspace(-1, 1, 128)[:, None]
        far, near = (np.where(y < 0, colour(above), colour(below))
                     for above, below in zip(cls.ceiling, cls.floor))
        ground = (1 - abs(y)) * far + abs(y) * near
        return np.uint8(shades).reshape(-1, 3), np.repeat(np.uint8(ground)[:, None], 128, 1)

    def begin(self):
        """Walls around and, as far as all free cells stay connected, inside; the player in a free cell."""
        grid, cells = self.draw_cells()
        for x, y in cells:
            grid[y, x] = True
            free = free_cells(grid)
            grid[y, x] = len(distances(grid, free[0])) == len(free)
        self.enter(grid)
        self.at, self.face = self.choice(free_cells(grid)) + MIDDLE, self.uniform(0, tau)
        self.bring()

    def play(self):
        self.face += self.right.real * 0.085
        speed = self.slow if "LEFT_TRIGGER" in self.held else self.speed
        self.walk(self, self.left * 1j * speed * rect(1, self.face))
        goal = self.goal
        if not goal.near:
            self.fight(goal, self.distance(goal))
        if goal.hp <= 0 or self.reached(goal):
            self.score += 1
            self.bring()

    def bring(self):
        """The next goal to fight, take or reach, if the task has one."""
        self.things = []
        for kind in self.steps[self.score:self.score + 1]:
            look, far = self.kinds[kind], self.ways_to(cell_of(self.at))
            low, high = look["away"]                                   # so many steps of walking
            cells = free_cells(self.grid)
            cell = self.choice([c for c in cells if low <= far[c] <= high] or cells)
            self.goal = Thing(kind, cell + MIDDLE, hp=2, **look)
            self.things, self.goes_to = [self.goal], self.goal.at

    def draw(self):
        p, n = self.at, self.size
        rays = rect(1, self.face) * (1 + 1j * LENS) + (1e-9 + 1e-9j)                    # (128,)
        lines = np.arange(1, n)[:, None]                                                # (n - 1, 1)

        def crossings(p, rays, walls):
            """How far along each ray from p its crossings with the lines across x are, (n - 1, 128): 99 where
            no wall begins."""
            t = (lines - p.real) / rays.real
            y = np.clip(p.imag + t * rays.imag, 0, n - 1).astype(int)
            return np.where((t > 0) & walls[lines - (rays.real < 0), y], t, 99)
        mirror = lambda v: 1j * v.conjugate()                                           # swaps x and y
        t = np.concatenate([crossings(p, rays, self.grid.T), crossings(mirror(p), mirror(rays), self.grid)])
        depth, across = t.min(0), t.argmin(0) >= n - 1         # the nearest wall, and whether it lies across
        self.depth = depth
        ends = p + depth * rays
        u = (np.where(across, ends.real, ends.imag) % 1 * 32).astype(int)
        shade = np.minimum(depth * 2, 15).astype(int) + 16 * across
        v = np.floor((ROWS * np.float32(depth / 115) + 0.5) * 32).astype(int)                    # (128, 128)
        texture, ground = self.paint()
        pixels = cv2.copyTo(texture.take(shade * 1024 + u + v * 32, 0, mode="clip"),
                            np.uint8(v == v % 32), ground.copy())
        frame = cv2.resize(pixels, (256, 256), interpolation=cv2.INTER_NEAREST)
        for thing in self.things:                      # shots last, which come from what they hide
            self.billboard(frame, thing)
        if self.things:
            arrow(frame, 128 + 40j, self.angle(self.target()) - pi / 2, 32, self.goal.ink)
        return frame

    def billboard(self, frame, thing):
        """A flat picture that always faces the player, behind what is nearer."""
        rel = self.relative(thing)
        if rel.real > 0.15:
            scale = 230 / max(rel.real, 0.4)
            x = 128 + rel.imag / rel.real / 0.7 * 128
            y = 128 + scale * (0.5 - thing.lift - thing.size / 2)
            seen = np.repeat(self.depth > rel.real - 0.3, 2)
            sprite(frame, thing.kind, complex(x, y), scale * thing.size, seen=seen)

    def target(self):
        """Where to go now: the goal itself where the way there is wide enough."""
        side = 0.2j * unit(self.goal - self)
        clear = all(self.sees(self.at + s, self.goal.at + s) for s in (side, -side))
        return self.goal.at if clear else self.on_the_way(self.goes_to, self.at)

    def steer(self, target, near):
        """Both sticks of a walk: turn to the target, walk once it is about ahead, stop when nearer than
        `near`."""
        angle = self.angle(target)
        ahead = max(math.cos(angle), 0) ** 3 if abs(target - self.at) > near else 0.0
        return complex(0, -ahead), span(1.5 * angle)

    def wish(self):
        goal, reach = self.goal, self.distance(self.goal)
        if not goal.near:
            return self.wish_to_fight(goal, reach)
        return *self.steer(self.target(), self.stop), goal.button if reach < 1 else ""


class Crypt(FirstPerson):
    """A dark maze. An arrow shows the way; ghouls turn red before they strike: hold the shield then, hit them
    when they are green."""

    def fight(self, ghoul, reach):
        """The ghoul comes near, winds up and strikes; the player's sword pushes it back."""
        self.goes_to = ghoul.at
        if reach > 0.8:
            self.send(ghoul, self.on_the_way(self.at, ghoul.at) if reach > 1.5 else self, 0.025)
        off, shield = abs(self.angle(ghoul)), "LEFT_TRIGGER" in self.held
        if ghoul.wind:
            ghoul.wind -= 1
            if not ghoul.wind and reach < 1.3 and not (shield and off < 0.7):
                self.hurt()
        elif reach < 1.2 and self.ready("wind", 45):
            ghoul.wind = 15
        ghoul.kind = "ghoul!" if ghoul.wind else "ghoul"
        strikes = not shield and self.pressed("RIGHT_TRIGGER", 24)
        if strikes and not ghoul.wind and reach < 1.25 and off < 0.45:
            ghoul.hp -= 1
            self.send(ghoul, self, -0.3)

    def draw(self):
        frame = super().draw()
        if "LEFT_TRIGGER" in self.held:
            disc(frame, 80 + 246j, 54, "5a6ec8")
        resting = self.rests("RIGHT_TRIGGER")
        swing = (3j - 4) * max(resting - 14, 0)
        line(frame, 214 + 256j, 210 + 170j + swing, "787882" if resting else "f0f0fa", 12)
        return frame

    def wish_to_fight(self, ghoul, reach):
        left, right = self.steer(ghoul.at, 0.95) if reach < 1.6 else self.steer(self.target(), self.stop)
        if ghoul.wind:
            return 0j, right, "LEFT_TRIGGER"
        return left, right, "RIGHT_TRIGGER" if reach < 1.25 and abs(self.angle(ghoul)) < 0.35 else ""


class Siege(FirstPerson):
    """An open court by daylight: drones that hover and shoot, crates to open, a beacon to reach."""

    def bring(self):
        super().bring()
        self.drift = self.around(0.02, 0.035)

    def play(self):
        goal = self.goal
        super().play()
        self.things = [goal, *self.shots]

    def fight(self, drone, reach):
        """The drone drifts and shoots where it sees the player; so does the player."""
        self.walk(drone, self.drift)
        if self.ready("turn", 40):
            self.drift = self.around(0.02, 0.035)
        if self.ammo and self.pressed("RIGHT_TRIGGER", 12):
            self.ammo -= 1
            drone.hp -= abs(self.angle(drone)) < 0.3 / reach and self.sees(self.at, drone.at)
        if self.t > 30 and self.ready("drone", 80) and self.sees(self.at, drone.at):
            self.shots.append(Thing("mine", drone.at, v=0.07 * unit(self - drone), lift=0.35, size=0.2))
        self.fly(self.shots, lambda shot: self.wounds(shot, self.at, 0.3) or self.blocked(shot.at))

    def draw(self):
        frame = super().draw()
        bar(frame, 112 + 206j, 32 + 50j, "32363e" if self.rests("RIGHT_TRIGGER") < 8 else "ffbe3c")
        if not self.goal.near:
            disc(frame, CENTRE, 10, "ffffff", 2)
            for i in range(self.ammo):
                bar(frame, 4 + 6 * i + 222j, 3 + 10j, "ffe65a")
        return frame

    def wish_to_fight(self, drone, reach):
        clear = self.sees(self.at, drone.at)
        left, right = self.steer(self.target(), 2.5 if clear else self.stop)
        shot = self.nearest(self.shots)
        if shot and self.distance(shot) < 2:
            left -= copysign(1, self.angle(shot))                       # step out of its way
        aimed = abs(self.angle(drone)) < 0.26 / reach
        return left, right, "RIGHT_TRIGGER" if clear and aimed else ""


LENGTH, HORIZON, HIGH = 170, 100, 30              # Rally's camera: focal length, the horizon's row, pixels up
GROUND = np.float64([[HIGH, 0, -128 * HIGH], [0, 0, LENGTH * HIGH], [0, 1, 0.5]])   # screen -> right, ahead


class Rally(Game):
    """Driving behind a car: the ground is one big picture seen in perspective, a homography of it."""

    def begin(self):
        k, bend, start = self.plan.randint(2, 4), self.plan.uniform(0.16, 0.24), self.plan.uniform(0, tau)
        ways = np.arange(256) / 256 * tau
        path = 512 + 512j + 320 * (1 + bend * np.sin(k * ways + start)) * np.exp(1j * ways)
        path = np.roll(path, self.rng.randrange(256))
        self.path = path if self.rng.random() < 0.5 else path[::-1]
        self.ground = pattern(*self.paving, 1024, 1024).copy()
        if self.park:
            self.at, self.face = 512 + 512j, self.uniform(0, tau)
            self.spawn()
        else:
            self.build(path)

    def build(self, path):
        """The road, the trees beside it, its gates and the other cars."""
        road = whole(path)
        dashes = [*road.reshape(-1, 4, 2)[:, :2]]
        for lines, ink, thick in ([road], "ebebeb", 112), ([road], "54545c", 100), (dashes, "fadc5a", 5):
            cv2.polylines(self.ground, lines, True, colour(ink), thick)
        self.at, self.face = self.path[0], phase(self.path[2] - self.path[0])
        pairs = lambda kind, first, step, aside: [
            Thing(kind, self.beside(i, side)) for i in range(first, 255, step) for side in (-aside, aside)]
        self.things, self.gates = pairs("tree", 0, 16, 95), pairs("post", 20, 20, 54)
        self.foes = [Thing("rival", 0j, along=14.0 + 16 * i, side=22 * self.choice(SIDES), passed=False)
                     for i in range(self.cars)]
        self.race()

    def beside(self, place, far):
        """So many pixels to the right of a place on the path, in points of it from its start."""
        a, b = self.path[int(place)], self.path[int(place + 1)]
        return a + (b - a) * (place % 1) + far * 1j * unit(b - a)

    def spawn(self):
        """The next bay: painted on the ground, with a sign above it."""
        turn = self.choice(SIDES) * self.uniform(0.2, 0.9)
        self.bay = fence(self.at + rect(self.uniform(170, 260), self.face + turn), 90, 934)
        disc(self.ground, self.bay, 34, "ffdc28", 8)
        disc(self.ground, self.bay, 30, "1e6ee6")
        self.things = [Thing("bay", self.bay)]

    def race(self):
        """Where on the path the car is: the nearest of the next few points. Rivals drive on; those that are
        passed do not count as hit."""
        self.index = min(range(self.index, self.index + 6), key=lambda i: abs(self.path[i] - self.at))
        for rival in self.foes:
            rival.along += 0.22
            rival.at = self.beside(rival.along, rival.side)
            rival.passed |= rival.along < self.index - 1
            if self.distance(rival) < 24 and not rival.passed:
                self.speed *= 0.3
                self.hurt()
        self.score = sum(rival.passed for rival in self.foes) if self.cars else self.index // 20

    def play(self):
        on_road = self.park or abs(self.path[self.index] - self.at) < 58
        gas, brake = "RIGHT_TRIGGER" in self.held, "LEFT_TRIGGER" in self.held
        slower = 0.3 if self.speed > 0 else 0.1                        # in reverse the brake is a weak engine
        self.speed = max(-2, (self.speed + 0.28 * gas - slower * brake) * (0.972 if on_road else 0.88))
        self.speed *= 1 if gas or brake else 0.97
        self.face += self.left.real * 0.05 * span(self.speed / 2)
        self.at = fence(self.at + self.speed * rect(1, self.face), 40, 984)
        if not self.park:
            self.race()
        elif abs(self.bay - self.at) < 34 and abs(self.speed) < 0.7:
            self.score += 1
            disc(self.ground, self.bay, 38, "50545a")
            self.spawn()

    def draw(self):
        way = rect(1, self.face)
        c, s, eye = way.real, way.imag, self.at - 44 * way
        to_map = np.float64([[-s, c, eye.real], [c, s, eye.imag], [0, 0, 1]])
        ground = cv2.warpPerspective(self.ground, to_map @ GROUND, (256, 256 - HORIZON), None,
                                     cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP, cv2.BORDER_REPLICATE)
        frame = np.concatenate([self.back((self.face + pi) / tau * 1024, 0, HORIZON), ground])
        gates = [] if self.cars else self.gates[2 * self.score:2 * self.score + 2]
        rows = [(self.relative(thing.at) + 44, thing) for thing in self.things + self.foes + gates]
        for rel, thing in sorted(rows, key=lambda row: -row[0].real):
            zoom = LENGTH / max(rel.real, 1)
            size = zoom * self.sizes[thing.kind]
            if 25 < rel.real < 520 and size < 240:
                sprite(frame, thing.kind,
                       complex(128 + zoom * rel.imag, HORIZON + zoom * HIGH - size / 2), size)
        if self.park:
            arrow(frame, 128 + 40j, self.angle(self.bay) - pi / 2, 32, "ffe63c")
        sprite(frame, "car", 128 + 214j, 76)
        bar(frame, 8 + 240j, int(18 * max(self.speed, 0)) + 10j, "50ff78")
        line(frame, 128 + 186j, int(128 + 26 * self.left.real) + 186j, "ffffff", 4)
        return frame

    def wish(self):
        if self.park:
            angle, over = self.angle(self.bay), 0.4
            turn = 2.5 * angle
            fast = min(2.8 if abs(angle) < 0.5 else 1.6, 0.03 * abs(self.bay - self.at))
        else:
            others_side = (self.beside(self.index + 7, -rival.side) for rival in self.foes
                           if 0 < rival.along - self.index < 13)
            target = next(others_side, self.path[self.index + 9])          # pass the first rival there
            turn, over, fast = 2.6 * self.angle(target), 1, 4.4
        brake = "LEFT_TRIGGER" if self.speed > fast + over else ""
        return span(turn), "RIGHT_TRIGGER" if self.speed < fast else brake


# ---- top-down

class TopDown(Walled):
    """Seen from above: walls on a grid of `cell` pixels, the camera on the player, or at rest over a room of
    one screen."""

    def lay(self, grid):
        """Take a map of walls and draw it once, with a margin for the camera."""
        self.enter(grid)
        wall = grid.repeat(self.cell, 0).repeat(self.cell, 1)
        block, floor = (pattern(*look, *wall.shape) for look in (self.block, self.floor))
        self.ground = cv2.copyMakeBorder(np.where(wall[..., None], block, floor), *[128] * 4,
                                         cv2.BORDER_CONSTANT, value=colour(self.dark))

    def view(self):
        """The floor under the camera -> (frame, where the camera's top left corner is)."""
        x, y = dot(self.at)                                               # of the corner, with the margin
        return self.ground[y:y + 256, x:x + 256].copy(), self.at - CENTRE

    def trail(self, frame, places, start, ink):
        """Dots on the floor along the way to go, from place to place on the screen."""
        for p in places:
            n = int(abs(p - start) / 20)
            for i in range(1, n):
                disc(frame, start + (p - start) * i / n, 6, ink)
            start = p

    def pointer(self, frame, target, ink):
        """An arrow near the edge towards what is out of sight."""
        d = target - self.at
        far = max(abs(d.real), abs(d.imag))
        if far > 116:
            d *= 102 / far
            arrow(frame, CENTRE + d, phase(d), 22, ink)


class Swarm(TopDown):
    """A neon court: the left stick moves, the right one aims. Bugs chase, a brute charges along the line that
    it shows, gems lie among mines."""

    def begin(self):
        self.lay(walled(12, 12))
        self.at, self.aim = 384 + 384j + self.around(0, 90), self.uniform(0, tau)
        if not self.count:
            self.lay_gem()
        self.gather()

    def gather(self):
        """As many bugs or brutes as there are at a time."""
        while len(self.foes) < self.count:
            foe = Thing(self.foe, self.spot(self.at, 105, 135), hp=self.hp)
            if self.distance(foe) > 80:
                self.foes.append(foe)

    def lay_gem(self):
        """The next gem, and mines on the way to it."""
        at = self.spot(self.at, 130, 200)
        if abs(at - self.at) < 90:
            at = fence(2 * self.at - at, 90, 678)
        self.gem = Thing("gem", at, near=28)
        halfway = lambda: self.at + (at - self.at) * self.uniform(0.4, 0.7)
        mines = [Thing("mine", self.spot(halfway(), 0, 40), near=26) for _ in range(2)]
        self.things = [mine for mine in mines if self.distance(mine) > 60 and abs(mine - at) > 45]

    def spot(self, p, low, high):
        """A place in the court around p."""
        return fence(p + self.around(low, high), 90, 678)

    def play(self):
        self.aim = pointed(self.right, pointed(self.left, self.aim))
        if abs(self.left) > 0.3:
            self.pressed("LEFT_TRIGGER", 50)
        self.walk(self, self.left * (8 if self.rests("LEFT_TRIGGER") > 43 else 3.2))
        self.fire(self.at, self.foes)
        for f in self.foes:
            if self.distance(f) < self.reach:
                self.hurt()
                self.send(f, self, -70)
            way = unit(self - f)
            if f.kind == "bug":                            # comes straight
                self.send(f, self, 1.7)
            elif f.dash:                                   # the brute comes in a spiral, winds up and charges
                f.dash -= 1
                self.walk(f, 7 * f.way)
            elif f.wind:
                f.wind, f.kind = f.wind - 1, "brute!"
                f.dash = 0 if f.wind else 22
            elif self.ready("charge", 75) and self.t > 20:
                f.wind, f.way = 18, way
            else:
                f.kind = "brute"
                self.walk(f, 1.6 * way * rect(1, 0.8))
        if self.foe == "brute":
            self.score = self.hp - sum(f.hp for f in self.foes)
        for mine in filter(self.reached, self.things):
            self.hurt()
            self.walk(self, 36 * unit(self - mine))
        self.gather()
        if not self.count and self.reached(self.gem):
            self.score += 1
            self.lay_gem()

    def draw(self):
        frame, corner = self.view()
        for f in self.foes:
            if f.wind or f.dash:
                line(frame, f - corner, f.at + 160 * f.way - corner, "ff2828", 6)
            sprite(frame, f.kind, f - corner, self.size, phase(self - f))
            self.pointer(frame, f.at, "ff3ca0")
        sprites(frame, self.things, 44, corner)
        for bolt in self.bolts:
            disc(frame, bolt - corner, 5, "ffff78")
        if not self.count:
            self.trail(frame, [self.gem - corner], CENTRE, "3cffc8")
            sprite(frame, "gem", self.gem - corner, 52)
        if self.foe == "brute":
            bar(frame, 60 + 240j, 10 * self.foes[0].hp + 10j, "ff7800")
        sprite(frame, "hero", CENTRE, 48, self.aim)
        disc(frame, CENTRE, 26, "46465a" if self.rests("LEFT_TRIGGER") else "00ffff", 2)
        return frame

    def wish(self):
        if not self.count:
            return self.wish_for_gems()
        foe, middle = self.nearest(self.foes), 384 + 384j - self.at
        d = foe - self
        far = abs(d)
        push = 1.0 if far < 80 else 0.3 if far < 100 else -0.3             # nearer where it is too far to hit
        away = -unit(d) * push + middle / 500
        if foe.wind or foe.dash:                                       # step off the line of its charge
            away = 1j * foe.way * (-1 if ahead_and_right(d, foe.way).imag > 0 else 1) + middle / 400
        fire = "RIGHT_TRIGGER" if between(d, self.aim) < 0.2 and far < 140 else ""
        return capped(away), unit(d), fire + (" LEFT_TRIGGER" if far < 60 else "")

    def wish_for_gems(self):
        """Straight to the gem, bent away from mines; a dash where nothing is near."""
        way = unit(self.gem - self)
        for mine in self.things:
            d = ahead_and_right(mine - self, way)
            if 0 < d.real < 90 and abs(d.imag) < 44:
                way = unit(way - 1j * way * copysign(1.1, d.imag) * (1 - abs(d.imag) / 90))
        clear = min(map(self.distance, [*self.things, self.gem])) > 110
        return way, way, "LEFT_TRIGGER" if clear else ""


class Vault(TopDown):
    """Rooms of one screen, the camera at rest: stairs to find, a key and its chest, slimes to fight. The
    right trigger runs."""

    def begin(self):
        self.at = self.choice((1 + 1j, 6 + 1j, 1 + 6j, 6 + 6j)) * 32
        self.room()

    def room(self):
        """A room with blocks; the way in is where the player stands."""
        here, far, cells = cell_of(self.at / 32), [], []
        while len(far) < 24 or len(cells) < 2:                                 # two things have to be far off
            grid, blocks = self.draw_cells()
            for x, y in blocks:
                grid[y, x] = complex(x, y) != here
            far = distances(grid, here)
            cells = [cell for cell in far if far[cell] > 4]
        self.lay(grid)
        self.at = (here + MIDDLE) * 32
        places = [(cell + MIDDLE) * 32 for cell in sorted(cells, key=lambda cell: self.rng.random())]
        self.things = [Thing(kind, at, **look) for (kind, look), at in zip(self.holds.items(), places)]
        self.foes = [Thing("slime", at, hp=2, radius=11) for at in places[:self.slimes]]
        self.goes_to = self.at

    def play(self):
        done = self.score
        self.face = pointed(self.left, self.face)
        run = 3.6 if "RIGHT_TRIGGER" in self.held else 2.4
        self.walk(self, self.left * (0.8 if self.rests("WEST") > 14 else run))
        strike = self.pressed("WEST", 24)
        if self.t % 4 == 0:
            self.goes_to = self.at
        for s in self.foes:                                                # they come on around the blocks
            d = s - self
            far = abs(d)
            struck = strike and far < 50 and between(d, self.face) < 0.7
            s.hp -= struck
            if struck or far < 22:                                         # both push it back
                self.send(s, self, -30)
                if not struck:
                    self.hurt()
            self.send(s, self.on_the_way(self.goes_to, s.at) if far > 44 else self, 1.1)
        self.reap(self.foes)
        for thing in filter(self.reached, self.things[:1]):
            if thing.kind == "key":
                self.things.remove(thing)
            else:
                self.score += 1
        if done < self.score < self.task.goal and not self.foes:
            self.room()

    def draw(self):
        frame = self.ground[128:384, 128:384].copy()
        way, p = [], self.at
        for goal in self.things[:1] * 12:
            if abs(p - goal.at) > 20:
                p = self.on_the_way(goal.at, (cell_of(p / 32) + MIDDLE) * 32)
                way.append(p)
        self.trail(frame, way, self.at, "4682ff")
        sprites(frame, self.things + self.foes, 36)
        resting = self.rests("WEST")
        if resting > 14:
            line(frame, self.at, self.at + rect(46, self.face), "ffffff", 9)
        sprite(frame, "knight", self.at, 36, self.face)
        if resting:
            disc(frame, self.at, 20, "787882", 3)
        if self.things and self.things[0].kind == "chest":
            sprite(frame, "key", 128 + 16j, 32)
        return frame

    def wish(self):
        goal = self.nearest(self.foes or self.things[:1])
        d = goal - self
        far = abs(d)
        to = self.on_the_way(goal.at, self.at) if far > self.close else goal.at
        way = unit(to - self.at)
        if not self.foes:
            return way, goal.button if far < 40 else "RIGHT_TRIGGER" if far > 80 else ""
        if far < 48 and self.rests("WEST"):
            return -unit(d), ""
        strike = far < 48 and between(d, self.face) < 0.5
        return way * (0.5 if far < 50 else 1), "WEST" if strike else ""


class Shade(TopDown):
    """A guarded house at night: who stands in a guard's light is soon caught. The left trigger crouches,
    which shortens the lights; EAST strikes from behind."""

    def begin(self):
        grid = walled(13, 11)
        for y, x in itertools.product((2, 6), (2, 6, 10)):
            grid[y, x] = self.plan.random() < 0.8                          # most of the pillars
        self.lay(grid)
        rows, columns = [1, 3, 5, 7, 9], (3, 4, 5, 7, 8, 9)
        spot = lambda column: (complex(column, self.choice(rows)) + MIDDLE) * 48
        start = self.choice((1, 11))
        self.at = spot(start)
        self.foes = [Thing("guard", complex((column + 0.5) * 48, self.uniform(100, 420)),
                           way=self.choice((-1j, 1j)))
                     for column in self.plan.sample(columns, self.guards)]
        where = self.rng.sample(columns, self.gems)
        if self.want == "exit":
            rows.remove(self.at.imag // 48)                               # not straight across
            where = [12 - start]
        self.things = [Thing(self.want, spot(column), near=30) for column in where]

    def light(self):
        """How far the guards' lights reach, in pixels."""
        return 60 if "LEFT_TRIGGER" in self.held else 100

    def lit(self, p, guard, more=0.0, wide=0.0):
        """Does a guard's light reach p? more, wide: a margin in pixels and radians."""
        d = p - guard.at
        inside = abs(d) < self.light() + more and between(d, phase(guard.way)) < 0.55 + wide
        return inside and self.sees(guard.at, p)

    def play(self):
        self.walk(self, self.left * (1.8 if "LEFT_TRIGGER" in self.held else 3.2))
        for g in list(self.foes):
            if self.blocked(g.at + 26 * g.way):
                g.way = -g.way
            g.at += 1.3 * g.way
            strikes = self.distance(g) < self.blade and not self.lit(self.at, g)
            if strikes and self.pressed("EAST", 12):
                self.take(self.foes, g)
        seen = any(self.lit(self.at, g) or self.distance(g) < 20 for g in self.foes)
        self.alarm = max(self.alarm + (1 / 26 if seen else -1 / 40), 0)
        self.health = int(self.alarm < 1)
        for thing in filter(self.reached, list(self.things)):
            self.take(self.things, thing)

    def draw(self):
        frame, corner = self.view()
        for g in self.foes:
            p, angle = g - corner, phase(g.way)
            fan = [p + rect(self.light(), angle + a) for a in (-0.55, -0.28, 0, 0.28, 0.55)]
            polygon(frame, [p, *fan], "f0dc5a")
            sprite(frame, g.kind, p, 40, angle)
        sprites(frame, self.things, 40, corner)
        if goal := self.goal():
            self.pointer(frame, goal.at, "5affa0")
        sprite(frame, "thief", CENTRE, 32 if "LEFT_TRIGGER" in self.held else 40, phase(self.left))
        bar(frame, 60 + 240j, round(136 * self.alarm) + 11j, "ff2828")
        bar(frame, 60 + 240j, 136 + 11j, "ffffff", 1)
        return frame

    def goal(self):
        return self.nearest(self.foes if self.knife else self.things)

    def wish(self):
        """Of 16 ways and standing still: the best one out of the light."""
        goal, pos = self.goal(), self.at
        target = goal.at - self.behind * goal.way
        if self.blocked(target):
            target = goal.at
        way = target - pos
        if abs(way) >= 60:
            way = self.on_the_way(target, pos) - pos
        if self.knife and self.distance(goal) < 110 and self.lit(pos, goal, 60, 0.9):
            side = 1j * goal.way                                         # around the light, on our side of it
            way = target + copysign(70, ahead_and_right(pos - goal, side).real) * side - pos
        best, most = 0j, -99.0
        for d in (0j, *(rect(1, k * tau / 16) for k in range(16))):
            q = self.move(pos, 24 * d)
            danger = sum(abs(q - g.at) < self.margin[0] + 14 or self.lit(q + step * d, g, *self.margin)
                         for g in self.foes for step in (0, 12))
            gain = ahead_and_right(q - pos, unit(way)).real / 24 - 2 * danger
            if gain > most + 0.01:
                best, most = d, gain
        near = min(map(self.distance, self.foes))
        strike = "EAST" if near < self.blade - 2 else ""
        return best * (1 if abs(way) > 20 else 0.6), strike + (" LEFT_TRIGGER" if 44 < near < 120 else "")


# ---- side-scrolling

class Side(Game):
    """Seen from the side, the camera on the player: gravity, and islands (at: the middle of the top, half:
    as wide to each side) to land on, which do not stop a jump from below."""

    def stand(self, place):
        self.at, self.v, self.ground, self.stood, self.way = place, 0.0, True, self.t, 1

    def bodily(self, speed=3.2):
        """Run by the left stick, jump from the ground by SOUTH, fall, land."""
        if abs(self.left.real) > 0.2:
            self.way = copysign(1, self.left.real)
        if "SOUTH" in self.held and self.t - self.stood <= 4:    # a jump a moment after the edge still counts
            self.v, self.stood = -8.4, -9
        self.v = min(self.v + 0.5, 11)
        before = self.at.imag
        self.at += complex(self.left.real * speed, self.v)
        self.ground = False
        for i, island in enumerate(self.islands):
            over = abs((island.at - self.at).real) < island.half + 8
            if over and before <= island.at.imag <= self.at.imag:
                self.at, self.v = complex(self.at.real, island.at.imag), 0.0
                self.ground, self.stood, self.on = True, self.t, i


class Cliffs(Side):
    """Floating islands: to a flag along them, up a tower of them, or after coins. The right trigger
    sprints."""

    def begin(self):
        s, at, uniform, choice = self.choice(SIDES), 0j, self.plan.uniform, self.plan.choice
        self.islands = [Thing("island", at, half=90)] if self.tower else []
        for _ in range(self.steps):
            if self.tower:
                at += choice(SIDES) * s * uniform(60, 88) - 58j
                middle, half = at, 34
            else:
                half = uniform(80, 150) / 2
                middle = at + s * half
                at += complex(s * (2 * half + uniform(50, 68)), choice((-20, 0, 20)))
            self.islands.append(Thing("island", middle, half=half))
        self.stand(self.islands[self.on].at)
        for island in (self.islands[i] for i in self.coins):
            aside = self.uniform(15 - island.half, island.half - 15)
            self.things.append(Thing("coin", island.at + aside - self.choice((16j, 70j))))
        self.things = self.things or [Thing("flag", self.islands[-1].at - 20j)]

    def play(self):
        self.bodily(4.0 if "RIGHT_TRIGGER" in self.held else 3.0)
        last = self.islands[self.on].at
        if self.at.imag > last.imag + 150:
            self.health -= 1
            self.stand(last)
        for thing in list(self.things):
            d = thing - self
            if abs(d.real) < 26 and abs(d.imag + 16) < 30:
                self.take(self.things, thing)

    def draw(self):
        corner = self.at - 128 - 160j
        frame = self.back(self.at.real / 3)               # moving at a third of the speed
        for island in self.islands:
            for thick, ink in (26j, "96643c"), (8j, "50c846"):
                bar(frame, island.at - corner - island.half, 2 * island.half + thick, ink)
        sprites(frame, self.things, self.size, corner + 1j * self.lift)
        goal = self.nearest(self.things)
        if goal and self.distance(goal) > 120:
            arrow(frame, 128 + 40j, phase(goal - self), 28, "fff03c")
        sprite(frame, "runner", 128 + 140j, 40, flip=self.way < 0)
        if not self.ground:
            arrow(frame, 128 + 176j, copysign(pi / 2, self.v), 10, "ffffff")
        return frame

    def wish(self):
        goal = self.nearest(self.things)
        to = min(range(len(self.islands)), key=lambda i: abs(goal - self.islands[i]))
        if to == self.on:
            d = goal - self
            leap = (goal - self.islands[to]).imag < -40 and abs(d.real) < 30 and self.ground
            return span(d.real / 20), "SOUTH" if leap else ""
        return self.cross(self.on + (1 if to > self.on else -1))

    def cross(self, to):
        """The stick's x and the buttons that bring the runner to the next island on the way; distances count
        along the way, whichever side it goes to."""
        here, there, up = self.islands[self.on], self.islands[to], "SOUTH" if self.v < 0 else ""
        d, s = there - self, copysign(1, (there - here).real)
        gap, ahead = here.half + s * (here - self).real, s * d.real - there.half        # to the edges
        if self.tower and self.ground:
            return s * span((gap - 6) / 16), "SOUTH" if gap < 30 else ""
        if self.tower:
            return span(d.real / 24), up
        if self.ground:
            return s, "SOUTH" if gap < 24 else "RIGHT_TRIGGER" if gap > 70 else ""
        drop = self.v ** 2 + d.imag
        flight = 2 * (sqrt(drop) - self.v) if drop > 0 else 0.0      # steps until there: drop = v t + t^2 / 4
        if ahead - 8 > 3 * flight:                                 # not to be reached: back to where we stood
            return s * span((gap - 20) / 20), ""
        return s * (1 if ahead > -26 else (ahead + 26) / 30), up


class Commando(Side):
    """Run and gun: the right stick aims, the right trigger fires, SOUTH jumps over bullets and wire."""

    def begin(self):
        self.islands = [Thing("island", 200j, half=2000)]
        self.stand(200j)
        self.aim = self.choice((0, pi))
        if not self.foe:
            s, x = self.choice(SIDES), 60.0
            for _ in range(7):
                x += self.plan.uniform(90, 150)
                self.things.append(Thing("wire", s * x + 186j))
            self.copter = Thing("copter", s * (x + 110) + 160j)
        self.recruit()

    def recruit(self):
        """Soldiers to both sides, on the ground or on ledges; turrets in the air."""
        for side in () if self.foes else self.sides:
            x = self.at.real + side * self.uniform(80, 112)
            at = complex(x, 200 - self.choice(self.heights))
            self.foes.append(Thing(self.foe, at, hp=self.hp, wait=self.rng.randint(40, 90)))

    def play(self):
        self.bodily()
        self.aim = pointed(self.right, self.aim)
        heart = self.at - 22j
        self.fire(heart, self.foes)
        self.fly(self.shots, lambda shot: self.wounds(shot, heart, 20) or shot.at.imag > 200)
        for f in self.foes:                                # they keep near and shoot now and then
            f.wait -= 1
            d = heart - f
            if abs(d.real) > 112:
                f.at += copysign(2.6, d.real)
            if f.wait <= 0:
                f.wait, d = 75, heart - f
                way = copysign(1, d.real) if f.at.imag >= 170 else unit(d)          # on the ground along it
                self.shots.append(Thing("mine", f.at, v=2.6 * way))
        if self.at.imag > 178 and any(abs((wire - self).real) < 20 for wire in self.things):
            self.hurt()
        if not self.foe and abs((self.copter - self).real) < 24:
            self.score = 1
        self.recruit()

    def draw(self):
        corner = self.at.real - 128
        frame = self.back(self.at.real / 3)               # moving at a third of the speed
        x = int(corner) % 128
        frame[200:] = pattern("sand", "541", "874", 56, 512)[:, x:x + 256]
        sprites(frame, self.things, 40, corner)
        if not self.foe:
            sprites(frame, [self.copter], 92, corner)
            arrow(frame, 128 + 40j, phase((self.copter - self).real), 32, "ffff3c")
        for f in self.foes:
            at = f - corner
            if f.kind == "soldier" and at.imag < 170:
                bar(frame, at - 24 + 18j, 48 + 10j, "5a3c32")
            sprite(frame, f.kind, at - 4j, 52, flip=(f - self).real > 0)
        gun = complex(128, self.at.imag - 22)
        sprite(frame, "trooper", gun, 52, flip=self.way < 0)
        line(frame, gun, gun + rect(30, self.aim), "141414", 8)
        for bolt in self.bolts:
            disc(frame, bolt - corner, 5, "ffffa0")
        for shot in self.shots:
            disc(frame, shot - corner, 9, "0a0a0a")
            disc(frame, shot - corner, 7, "ff28dc")
        return frame

    def wish(self):
        if not self.foe:
            s = copysign(1, (self.copter - self).real)
            ahead = [(wire - self).real * s for wire in self.things]
            near = min((d for d in ahead if d > 0), default=999)
            return s, s, "SOUTH" if 24 < near < 56 else ""
        heart = self.at - 22j
        foe = min(self.foes, key=lambda f: between(f - heart, self.aim))    # whom the gun points at most
        d = foe - heart
        coming = [s for s in self.shots
                  if abs(s - heart) < 80 and ahead_and_right(heart - s, s.v).real > 0]
        run = 0.0 if abs(d.real) > 70 else -copysign(0.6, d.real)
        if coming:
            run = -copysign(1, coming[0].v.real)                        # under it, to where it comes from
        return run, unit(d), "RIGHT_TRIGGER" if between(d, self.aim) < 0.15 else ""


class Glider(Game):
    """Flight over hills from left to right: rings to pass through, foes to shoot, tanks to bomb where the
    mark on the ground shows."""

    def begin(self):
        self.at = complex(0, self.uniform(70, 180))

    def speed(self):
        """Pixels a step."""
        return 2.6 + 1.2 * self.left.real

    def play(self):
        height = span(self.at.imag + 3.4 * self.left.imag, 34, self.lowest)
        self.at = complex(self.at.real + self.speed(), height)
        self.gap -= self.speed()
        if self.gap <= 0:
            self.gap = self.apart * self.uniform(0.85, 1.25)
            y = 226 if self.tank else self.uniform(50, 195)
            self.things.append(Thing(self.want, complex(self.at.real + 200, y), base=y,
                                     wave=self.uniform(0, 6)))
        if self.tank:
            if self.ammo and self.pressed("SOUTH", 20):
                self.ammo -= 1
                self.bolts.append(Thing("bomb", self.at + 10j, v=self.speed() + 1j))
            self.fly(self.bolts, self.falls, 999)
        else:
            self.fire(self.at, self.things)
        for thing in list(self.things):
            d = thing - self
            if self.want == "foe":
                y = thing.base + 14 * math.sin(thing.wave + self.t / 18)
                thing.at = complex(thing.at.real - 0.4, y)
                if abs(d.real) < 30 and abs(d.imag) < 26:
                    self.hurt()
            passed = self.want == "ring" and abs(d.real) < self.speed()
            if thing.hp <= 0 or (passed and abs(d.imag) < 25):
                self.take(self.things, thing)
            elif passed or d.real < -90:                       # a ring or foe missed; tanks may be passed
                self.things.remove(thing)
                self.health -= not self.tank

    def falls(self, bomb):
        """hits() for fly(): a bomb falls faster and faster, and hits the tanks near where it ends."""
        bomb.v += 0.25j
        ends = bomb.at.imag > 222
        for tank in self.things if ends else ():
            tank.hp -= abs((tank - bomb).real) < 22
        return ends

    def mark(self):
        """How far ahead a bomb dropped now would fall: dy = v t + g t^2 / 2."""
        drop = 212 - self.at.imag
        return self.speed() * (sqrt(1 + 0.5 * drop) - 1) / 0.25

    def draw(self):
        corner = self.at - 70 - 1j * self.above
        x, ground = int(self.at.real), round(232 - corner.imag)
        frame = self.back(x, min(round(corner.imag) + 96, 176), 432)
        fields = pattern("checker", "313", "636", 256, 512)
        frame[ground:] = fields[:max(256 - ground, 0), x % 256:x % 256 + 256]
        if self.tank:
            spot = 70 + self.mark() + (212 - corner.imag) * 1j
            line(frame, 70 + 60j, spot, "ffffff", 3)
            bar(frame, spot - 16 - 16j, 32 + 32j, "787878" if self.rests("SOUTH") else "ff3c3c", 5)
        for i in range(self.ammo):
            bar(frame, 8 + 12 * i + 236j, 7 + 16j, "ffc83c")
        for thing in self.things:
            if thing.kind != "ring":
                sprites(frame, [thing], 52, corner)
                continue
            for ink, thick in ("5a3200", 14), ("ffd200", 9):
                cv2.ellipse(frame, dot(thing - corner), (16, 36), 0, 0, 360, colour(ink), thick)
        for bolt in self.bolts:
            if self.tank:
                sprite(frame, "bomb", bolt - corner, 28, pi / 2)
            else:
                bar(frame, bolt - corner - 9 - 3j, 18 + 6j, "78ffff")
        sprite(frame, "plane", self.at - corner, 56, self.left.imag * pi / 8)
        return frame

    def wish(self):
        rise = span((self.cruise - self.at.imag) / 60)
        d = next((thing - self for thing in self.things if (thing - self).real > 0), None)
        if d is None:
            return complex(0.3, rise), ""
        if self.tank:
            gap = d.real - self.mark()
            stick, aimed = complex(span(gap / 60), rise), abs(gap) < 16
        else:
            foe, ring = 0.2 if d.real > 70 else -0.6, 0.6 if abs(d.imag) < 20 else -0.4
            stick = complex(foe if self.want == "foe" else ring, span(d.imag / 28))
            aimed = abs(d.imag) < 12 and d.real < 150
        ready = not self.bolts and not self.rests(self.trigger)
        return stick, self.trigger if aimed and ready else ""


class Dojo(Game):
    """One screen, a duel: red rivals are about to strike (block), green ones are open (punch), blue ones
    guard high (kick low); boards to break. Who fights stands on a line: places are numbers."""

    def begin(self):
        self.way = self.choice(SIDES)
        self.floor = pattern("planks", "630", "a62", 256, 256).copy()
        self.floor[:170] = pattern("grid", "fec", "c96", 170, 256)
        disc(self.floor, 128 + 70j, 40, "e63c32")
        sides = SIDES if self.rivals == 2 else [self.choice(SIDES) for _ in range(self.rivals)]
        self.foes = [Thing("idle", 128.0 + 90 * side, wait=20 + 40 * i) for i, side in enumerate(sides)]

    def play(self):
        stunned = self.rests("stun")
        moves = self.held & {*self.answers.values()}
        move = min(moves) if len(moves) == 1 and not stunned else None              # two at once are none
        if not self.rivals:
            return self.chop(move)
        x = self.left.real
        if abs(x) > 0.15 and not stunned:
            self.way = copysign(1, x)
            self.at = span(self.at + 2.8 * x * (move != "LEFT_TRIGGER"), 24, 232)
        for f in self.foes:
            self.rival(f, move)
        if move in ("WEST", "SOUTH") and self.ready("blow", 12):
            f = self.nearest(self.foes)
            if 0 < (f - self) * self.way < 58:             # near, and in front
                if self.answers[f.kind] == move:
                    self.score += 1
                    f.kind, f.wait = "idle", 12
                    f.at = span(f.at + 26 * self.way, 16, 240)
                    if self.rivals == 1 and self.rng.random() < 0.5:
                        f.at = span(2 * self.at - f, 16, 240)               # leaps over to the other side
                elif f.kind != "idle":
                    self.fumble()

    def rival(self, f, move):
        """A rival keeps its distance, and now and then it opens, guards or winds up and strikes."""
        d, idle = f - self, f.kind == "idle"
        f.wait -= 1
        if abs(d) > 44:
            f.at -= copysign(1.2, d) if self.rivals == 1 or not idle else 0
        elif abs(d) < 36:
            f.at = span(f.at + copysign(2, d), 16, 240)
        if f.wait <= 0:
            if f.kind == "wind" and abs(d) < 60 and not (move == "LEFT_TRIGGER" and d * self.way > 0):
                self.hurt()
            idle = all(g.kind == "idle" for g in self.foes)
            f.kind = self.choice(("open", "shut", "wind")) if idle else "idle"
            f.wait = self.waits.get(f.kind, self.rng.randint(8, 16))

    def fumble(self):
        """A wrong move hurts and stuns."""
        self.ready("stun", 12)
        self.hurt()

    def chop(self, move):
        """Boards fly in from all sides: point the left stick at one and punch when it is in the ring."""
        self.aim = pointed(self.left, self.aim)
        b = self.board = self.board or Thing("board", 0j, angle=self.uniform(0, tau), far=112.0)
        b.far -= 2.6
        if move == "WEST" and self.ready("blow", 8):
            if 26 < b.far < 60 and between(rect(1, b.angle), self.aim) < 0.6:
                self.score, self.board = self.score + 1, None
            else:
                self.fumble()
        elif b.far < 18:
            self.board = None
            self.hurt()

    def draw(self):
        frame, middle = self.floor.copy(), 128 + 140j
        if self.rivals:
            for f in self.foes:
                sprite(frame, f.kind, f.at + 190j, 84, flip=f.at > self.at)
            sprite(frame, "monk", self.at + 190j, 84, flip=self.way < 0)
            if "LEFT_TRIGGER" in self.held:
                bar(frame, self.at + 22 * self.way - 4 + 150j, 8 + 70j, "78c8ff")
        else:
            disc(frame, middle, 60, "28c8ff", 4)
            if self.board:
                angle = self.board.angle
                sprite(frame, "board", middle + rect(self.board.far, angle), 52, angle)
            arrow(frame, middle + rect(34, self.aim), self.aim, 14, "ffffff")
            sprite(frame, "monk", middle, 52, flip=math.cos(self.aim) < 0)
        if self.rests("stun"):
            disc(frame, self.at + 108j, 12, "ffff00", 4)
        return frame

    def wish(self):
        b = self.board
        if not self.rivals:
            return (rect(0.9, b.angle), "WEST" if 28 < b.far < 54 else "") if b else (0j, "")
        f = self.nearest([f for f in self.foes if f.kind != "idle"] or self.foes)
        d = f - self
        near = abs(d) < 54
        return copysign(0.35 if near else 1, d), self.answers[f.kind] if near and d * self.way > 0 else ""


for game in Crypt, Siege, Rally, Swarm, Vault, Shade, Cliffs, Commando, Glider, Dojo:
    game.name = game.__name__.lower()
    for attribute, value in GAMES[game.name].items():
        setattr(game, attribute, value)                # family, keys, tasks and how it begins
    for task, fields in game.tasks.items():
        PLAYABLE[f"{game.name}/{task}"] = game
        TASKS[f"{game.name}/{task}"] = types.SimpleNamespace(game=game, **fields)


if play.gymnasium:
    class TaskEnv(play.gymnasium.Env):
        """A task as a Gymnasium environment: gymnasium.make("NitroGen/crypt-exit-v0"). Frames uint8
        (256, 256, 3), actions float (25,), a reward for each point."""
        metadata = {"render_modes": ["rgb_array"], "render_fps": FPS}
        observation_space, action_space = play.GameEnv.observation_space, play.GameEnv.action_space

        def __init__(self, task, render_mode="rgb_array"):
            self.task, self.render_mode = task, render_mode

        def reset(self, seed=None, options=None):
            super().reset(seed=seed)
            self.game = PLAYABLE[self.task](self.task, int(self.np_random.integers(PLAYED)))
            return self.game.render(), {}

        def step(self, action):
            game, before = self.game, self.game.score
            frame, ended = game.step(action), game.won or game.health <= 0
            return frame, float(game.score - before), ended, game.over and not ended, {"won": game.won}

        def render(self):
            return self.game.render()

    for task in TASKS:
        play.gymnasium.register(f"NitroGen/{task.replace('/', '-')}-v0", TaskEnv, kwargs={"task": task})


# ---- command line

MANY, SEED = extract.number(int, 1), extract.number(int, 0)
FLAGS = {                            # type or choices (bool: a switch), default (a list: several), help
    "--out": (str, None, "folder to write to; what is whole there stays"),
    "--games": (str, [], "games or tasks (default: record all, transfer three)"),
    "--tasks": (str, [], "tasks or games (default: suite all, demo three)"),
    "--env": (str, None, "a game by others instead: its Gymnasium id"),
    "--table": (str, None, "JSON file: how a pad plays --env (default: as weights/others.json says)"),
    "--ckpt": (str, None, "a .safetensors or a run folder (record: it plays in turns with the script)"),
    "--euler": (MANY, None, "its Euler steps (default: suite 2, record its own)"),
    "--video": (bool, False, "record: mp4 with a pad over it; suite: a film of each task"),
    "--minutes": (extract.number(float, 1 / 30), None,
                  "game time of each game, the held-out or labelled one (default %(default)s)"),
    "--clip": (extract.number(float, 1.1), 30, "seconds of a clip (default 30)"),
    "--videos": (MANY, 4, "files of these minutes, each with another pad (default 4)"),
    "-n": (MANY, None, "rollouts of each task (default %(default)s)"),
    "--actions-per-chunk": (MANY, 8, "steps to play before looking again (default 8)"),
    "--delay": (SEED, 0, "steps by which each chunk comes late, as on a slow machine"),
    "--preset": (M.PRESETS, "nitrogen", "size of a fresh model (default %(default)s)"),
    "--steps": (MANY, None, "training steps; latency: of Euler (default %(default)s)"),
    "--device": (str, "auto", "auto, cpu, cuda, mps (default auto)"),
    "--seed": (SEED, 0, "of everything drawn (default 0)"),
    "--workers": (MANY, cores(), "processes (default: one a core)")}


def main(argv=None):
    """Parse the command line and measure."""
    parser = extract.ArgumentParser(prog="bench.py", description=__doc__, allow_abbrev=False,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = parser.add_subparsers(required=True, metavar="COMMAND")
    cv2.setNumThreads(1)

    def command(run, flags, **defaults):
        p = sub.add_parser(run.__name__, help=run.__doc__.split("\n")[0], allow_abbrev=False)
        for flag in flags.split():
            kind, default, what = FLAGS[flag]
            default = defaults.get(flag.strip("-"), default)
            how = {"nargs": "+"} if isinstance(default, list) else {}
            how |= {"action": "store_true"} if kind is bool else {"type": kind} if callable(kind) else {
                "choices": kind}
            p.add_argument(flag, required=flag == "--out" and run != suite, default=default, help=what, **how)
        p.set_defaults(run=run)
    command(record, "--out --games --env --table --minutes --clip --seed --ckpt --euler --video --workers",
            minutes=5)
    command(suite, "--ckpt --tasks --env --table -n --actions-per-chunk --delay --out --video "
            "--euler --device --seed --workers", n=50, euler=extract.PLAY_STEPS)
    command(demo, "--out --tasks --minutes --videos --steps -n --seed",
            minutes=2, steps=1200, n=100,        # tasks that a small model begins to master within minutes
            tasks=["crypt/exit", "swarm/brute", "glider/rings"])
    held_out = {"games": ["crypt", "swarm", "glider"], "steps": 480, "n": 20}
    command(transfer, "--out --games --minutes --steps -n --workers", minutes=[1], **held_out)
    command(inverse, "--out --games --minutes --steps -n --workers", minutes=[1, 4], **held_out)
    command(latency, "--preset --steps --device", steps=[16, 4])
    command(throughput, "")
    command(games, "--out --seed")
    return extract.cli(parser, argv, M.ModelError)


if __name__ == "__main__":
    sys.exit(main())
