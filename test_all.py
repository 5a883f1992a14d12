"""test_all.py: what this repository promises, each promise a test with its oracle in sight.

    python -m pytest -q test_all.py            all of it, a few minutes on 2 cores
    python -m pytest -q test_all.py -k skins   one group

Groups in the order of the data flow: the rules of the repository, extract, parse, model, sample. Tests that need data or a package that is missing
here skip and print what they miss.
"""
import argparse
import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import extract  # noqa: E402

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
    assert extract.shrink(extract.shrink(rgb)) is not None and extract.shrink(rgb[:256, :256]).shape == (256, 256, 3)


def test_dense_keeps_chunks_that_act_half_of_the_time():
    actions = np.zeros((64, 25), np.float32)
    actions[20:28, extract.BUTTON["SOUTH"]] = 1                                           # 8 of 16 steps, from 12 to 20
    assert np.flatnonzero(extract.dense(actions)).tolist() == list(range(12, 21))
    actions[:, 21] = extract.DEAD_ZONE / 2                                                # a drifting stick does not act
    assert extract.dense(actions).sum() == 9
    assert not extract.dense(actions, np.zeros(64, np.float32)).any()


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
    assert actions.shape == (30, 25) and len(frames) == 30 and np.load(clip / "keep.npy")[:23].all()
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
