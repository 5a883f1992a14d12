"""extract.py: find the gamepad overlay in gameplay videos and cut clips (NitroGen, arXiv 2601.02427, section 3.1).

    python extract.py VIDEO|DIR... --out DATA [--templates DIR] [--every K] [--matcher sift|xfeat|both] [--sheet PNG]
    python extract.py VIDEO|DIR... --out DATA --labels DIR         NVIDIA's released labels instead of localisation
    python extract.py templates --out DIR                          our ~300 templates as PNG + JSON, to look at

In: videos (anything OpenCV's FFmpeg reads). Out: one folder per video under DATA (NAME_place2, NAME_place3 where the overlay moves; one
per chunk with --labels), written whole or not at all:
    clip.json                     where the overlay is, which template it is, and that template's geometry
    frames.npy + frames_index.npy uint8 (bytes,) + int64 (m+1, 2)   256 x 256 policy frames, the overlay masked out
    pads.npy + pads_index.npy     the same layout                   the overlay in its template's frame, one crop a video frame
    template.png                  uint8 (h, w, 4)                   the template at rest, at the size of the crops
(with --labels, instead of the last two: actions.npy, confidence.npy, keep.npy), one line a video in
DATA/extract.jsonl, an empty DATA/.lock-HASH a clip, and the templates' features in DATA/templates-RANK.npz.
This file is also the home of what every stage shares: the 25-dim action, the clip folder, video in and out,
shrink() and draw().
"""
import argparse
import contextlib
import errno
import hashlib
import io
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

import cv2
import numpy as np

cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)      # what is wrong with a file is said here, in one line, and not by the
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")                  # libraries, which would say it again in several of theirs

# ---------------------------------------------------------------------------------------------------------------- the action
# 25 floats: 21 buttons in the released order, then left x, left y, right x, right y. The paper says 20 (16 buttons + 4 axes) in its
# body and 16 x 24 in its appendix; the released labels have 17 buttons + 4 axes; the checkpoint has the 25 below (its author, issue 43).
BUTTONS = ("BACK DPAD_DOWN DPAD_LEFT DPAD_RIGHT DPAD_UP EAST GUIDE LEFT_SHOULDER LEFT_THUMB LEFT_TRIGGER NORTH RIGHT_BOTTOM RIGHT_LEFT "
           "RIGHT_RIGHT RIGHT_SHOULDER RIGHT_THUMB RIGHT_TRIGGER RIGHT_UP SOUTH START WEST").split()
LEGACY = ("RIGHT_BOTTOM", "RIGHT_LEFT", "RIGHT_RIGHT", "RIGHT_UP")      # no control of a pad: 0 in labels, ignored when playing
BUTTON = {name: i for i, name in enumerate(BUTTONS)}
STICKS = {"left": slice(21, 23), "right": slice(23, 25)}                # x right, y DOWN, both in [-1, 1]
A = len(BUTTONS) + 4
SIDE = 256                                                              # policy frames are SIDE x SIDE


class UserError(ValueError):
    """A user's mistake: one line that says what was expected, what was found and what to do."""


@contextlib.contextmanager
def reading(path, expected):
    """Whatever is wrong inside a file from elsewhere becomes one line that names the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:                                     # parsers of foreign files raise what they like
        raise UserError(f"{path}: expected {expected}, found {type(e).__name__} {' '.join(str(e).split())[:150]}") from e


def number(kind, low=-1e18, high=1e18):
    """A type for argparse: a number in [low, high]; NaN lies nowhere."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected {low:g} to {high:g}, found {text}")
        return value
    parse.__name__ = kind.__name__                             # argparse says "invalid int value"
    return parse


class Parser(argparse.ArgumentParser):
    """argparse with its mistakes as one error line."""

    def error(self, message):
        """Raise UserError, where argparse prints a page and leaves."""
        raise UserError(f"{message}: {self.prog} --help tells more")


def cli(parser, argv, *mistakes):
    """Parse argv and call args.run(args). Returns the exit status: 0 done, 2 the user's mistake (one line), 130 Ctrl-C, 141 nobody reads on (`| head`).

    mistakes: further exceptions whose text is a line for the user.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")                   # a log file on Windows has no code for every letter of a video's name
    try:
        for word in sys.argv[1:] if argv is None else argv:
            unicode(word)
        args = parser.parse_args(argv)
        within(args, None, None, *(name for name, value in vars(args).items() if type(value) in (int, float)))
        within(args, 0, None, "seed")
        args.run(args)
        sys.stdout.flush()
    except (UserError, *mistakes) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())      # or Python complains once more when it ends
        return 141
    except OSError as e:                                                    # of a file: its disk, its rights or its name, whichever script asks
        if e.filename is None and e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        print(f"error: {file_trouble(e)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; what is whole stays, run the same command to go on", file=sys.stderr)
        return 130
    return 0


def file_trouble(e):
    """One line for an OSError."""
    path = "--out" if e.filename is None else e.filename      # a full disk doesn't say which file it was
    return f"{path}: {e.strerror}: check this path, the rights to it and the room on its disk"


def within(args, low, high, *names):
    """These flags, where given, lie in low .. high; UserError names the first that does not. None: no limit there, but that of a number that can be used."""
    if low is None:
        limits = "a finite number of 18 digits at most"
    elif high is None:
        limits = f"at least {low:g}"
    else:
        limits = f"{low:g} to {high:g}"
    low, high = -1 << 62 if low is None else low, 1 << 62 if high is None else high
    for name in names:
        value = getattr(args, name, None)
        if value is not None and not low <= value <= high:                  # NaN lies nowhere
            flag = ("--" if len(name) > 1 else "-") + name.replace("_", "-")
            raise UserError(f"{flag} {value}: expected {limits}: give another number")


def unicode(path):
    """A path, or any word, that is Unicode as it is; UserError for other bytes: OpenCV ends the process over such names, and nothing can print them."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{ascii(str(path))}: expected a name in UTF-8, found other bytes in it: rename it") from None
    return path


class Line:
    """The progress line: rewritten in place on a terminal; in a file, one every ten seconds and where it matters."""

    def __init__(self, quiet=False):
        self.quiet, self.terminal, self.shown, self.width = quiet, sys.stdout.isatty(), -math.inf, 0

    def show(self, text, keep=False):
        """keep: this one stays, the next goes below it."""
        if self.quiet or not (keep or self.terminal or time.monotonic() - self.shown >= 10):
            return
        self.shown = time.monotonic()
        print(("\r" if self.terminal else "") + text.ljust(self.width if self.terminal else 0), end="" if self.terminal and not keep else "\n", flush=True)
        self.width = 0 if keep else len(text)


def neutral():
    """The pad at rest: float32 (25,) of zeros, in file convention."""
    return np.zeros(A, np.float32)


def shrink(rgb):
    """uint8 (h, w, 3) -> uint8 (256, 256, 3): a plain stretch with area interpolation, as the release does, in training and in play.

    A picture of that size is returned itself, not a copy.
    """
    if rgb.shape[:2] == (SIDE, SIDE):
        return rgb
    if min(rgb.shape[:2]) < SIDE:
        return cv2.resize(rgb, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    four = cv2.cvtColor(rgb, cv2.COLOR_RGB2RGBA).astype(np.uint16)             # the same numbers in three quarters of the time: OpenCV has SIMD for this type
    return cv2.resize(four, (SIDE, SIDE), interpolation=cv2.INTER_AREA)[..., :3].astype(np.uint8)


class Busy(UserError):
    """Another process is at the same thing."""


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
        process = kernel.OpenProcess(0x100000, False, pid)                  # SYNCHRONIZE
        ended = not process and kernel.GetLastError() == 87       # no such process; else it is another user's
        if process:
            ended = not kernel.WaitForSingleObject(process, 0)
            kernel.CloseHandle(process)
        return not ended
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:                                                 # it is another user's
        pass
    return True


def write_atomic(path, write):
    """write(tmp) makes the file under a temporary name; once it is on the disk, it is renamed: a name never
    holds half a file, not even after a power cut. It has a new file's usual rights."""
    path = Path(path)
    tmp = temporary(path)
    try:
        tmp.touch()
        rights = tmp.stat().st_mode
        write(tmp)
        tmp.chmod(rights)
        sync(tmp)
        os.replace(tmp, path)
    except OSError as e:
        raise UserError(f"can't write {path}: {e.strerror or e}: give another --out or make room") from None
    finally:
        remove(tmp)


def sync(path):
    """Return once a file's bytes are on the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def writable(path):
    """Make the folder of a file that is written at the end of a long run; UserError now where it can't be."""
    if Path(path).is_dir():
        raise UserError(f"{path}: expected the name of a file to write, found a folder: give another --out")
    Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)


# ------------------------------------------------------------------------------------------------------ skins: what can be drawn
# A skin is a list of parts, each with small premultiplied RGBA pictures ("sprites") of its states. Our own pads, OBS presets and
# plain PNG templates all become this one form, so there is one draw() for templates, parser training and pictures of predictions.
@dataclass
class Part:
    """One thing drawn: control "" (always there), a button's name, "left" / "right" (stick) or "DPAD" (one sprite for each of 9 states)."""
    control: str
    at: tuple                                   # top-left corner of the sprites on the canvas, pixels
    sprites: list                               # uint8 (h, w, 4) premultiplied, or None: [at rest, pressed], sticks [.., .., moved], DPAD_STATES
    travel: tuple = (0.0, 0.0)                  # sticks: displacement in pixels at full deflection
    grow: str = ""                              # analog triggers: pressed sprite uncovered towards up / down / left / right


@dataclass
class Skin:
    """Anything that can be drawn. Boxes and centres are in template pixels; only what the skin shows is listed."""
    name: str
    family: str
    size: tuple                                 # canvas (w, h)
    parts: list
    buttons: dict = field(default_factory=dict)     # NAME -> [x0, y0, x1, y1]
    sticks: dict = field(default_factory=dict)      # left / right -> {"center": [x, y], "travel": [tx, ty], "radius": r}
    bbox: list | None = None                        # [x0, y0, x1, y1] of the visible pad, where the template's JSON says it
    _base: list = field(default_factory=list, repr=False)


DPAD_STATES = [(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (1, -1), (-1, 1), (1, 1)]     # (x, y) in the preset format's order
THUMB = {"left": "LEFT_THUMB", "right": "RIGHT_THUMB"}


def blend(canvas, sprite, x, y):
    """Premultiplied 'over' of sprite on canvas at (x, y), in place, cut at the canvas edge."""
    x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + sprite.shape[1], canvas.shape[1]), min(y + sprite.shape[0], canvas.shape[0])
    if x0 >= x1 or y0 >= y1:
        return
    sprite = sprite[y0 - y:y1 - y, x0 - x:x1 - x]
    under = canvas[y0:y1, x0:x1]
    clear = cv2.merge([cv2.bitwise_not(np.ascontiguousarray(sprite[..., 3]))] * 4)
    canvas[y0:y1, x0:x1] = cv2.add(cv2.multiply(under, clear, scale=1 / 255), sprite)


def blend_at(canvas, sprite, x, y):
    """blend() at a fractional position: sticks move by parts of a pixel."""
    ix, iy = int(np.floor(x)), int(np.floor(y))
    fx, fy = x - ix, y - iy
    if fx or fy:
        h, w = sprite.shape[:2]
        sprite = cv2.warpAffine(sprite, np.float32([[1, 0, fx], [0, 1, fy]]), (w + 1, h + 1), flags=cv2.INTER_LINEAR)
    blend(canvas, sprite, ix, iy)


def draw(skin, action=None):
    """The skin with `action` float (25,) pressed, None = at rest -> uint8 (h, w, 4) RGBA, straight alpha.

    Buttons show pressed from 0.5 on; analog triggers show their value; sticks are in [-1, 1], y down.
    """
    action = neutral() if action is None else action
    if not skin._base:                                               # the always-there parts before the first control, drawn once
        first = next((i for i, p in enumerate(skin.parts) if p.control), len(skin.parts))
        base = np.zeros((skin.size[1], skin.size[0], 4), np.uint8)
        for part in skin.parts[:first]:
            blend(base, part.sprites[0], *part.at)
        skin._base[:] = [base, skin.parts[first:]]
    canvas, parts = skin._base[0].copy(), skin._base[1]
    for part in parts:
        draw_part(canvas, part, action)
    rgb, alpha = canvas[..., :3], np.ascontiguousarray(canvas[..., 3])
    return cv2.merge([*cv2.split(cv2.divide(rgb, cv2.merge([alpha] * 3), scale=255)), alpha])


def draw_part(canvas, part, action):
    """Draw one part in the state that `action` gives it."""
    x, y = part.at
    if part.control in STICKS:
        ax, ay = action[STICKS[part.control]]
        clicked, moved = action[BUTTON[THUMB[part.control]]] >= 0.5, max(abs(ax), abs(ay)) > 0.1
        free = 2 if moved and len(part.sprites) > 2 else 0
        blend_at(canvas, part.sprites[1 if clicked else free], x + float(ax) * part.travel[0], y + float(ay) * part.travel[1])
        return
    if part.control == "DPAD":
        down, left, right, up = (action[BUTTON["DPAD_" + d]] >= 0.5 for d in ("DOWN", "LEFT", "RIGHT", "UP"))
        sprite = part.sprites[DPAD_STATES.index((int(right) - int(left), int(down) - int(up)))]
    elif part.grow:
        rest, pressed = part.sprites
        if rest is not None:
            blend(canvas, rest, x, y)
        sprite, x, y = uncover(pressed, float(np.clip(action[BUTTON[part.control]], 0, 1)), part.grow, x, y)
    else:
        sprite = part.sprites[int(bool(part.control) and action[BUTTON[part.control]] >= 0.5)]
    if sprite is not None:
        blend(canvas, sprite, x, y)


def uncover(sprite, value, grow, x, y):
    """The share `value` of a trigger's sprite, growing towards `grow`, and where it goes."""
    h, w = sprite.shape[:2]
    if grow in ("up", "down"):
        n = round(h * value)
        return (sprite[h - n:], x, y + h - n) if grow == "up" else (sprite[:n], x, y)
    n = round(w * value)
    return (sprite[:, w - n:], x + w - n, y) if grow == "left" else (sprite[:, :n], x, y)


# ------------------------------------------------------------------------------------- skins made by others: OBS presets and PNGs
OBS_BUTTONS = dict(enumerate("SOUTH EAST WEST NORTH BACK GUIDE START LEFT_THUMB RIGHT_THUMB LEFT_SHOULDER RIGHT_SHOULDER "
                             "DPAD_UP DPAD_DOWN DPAD_LEFT DPAD_RIGHT".split()))              # SDL's codes, positional
OBS_BUTTONS |= {0xEC00 + code: name for code, name in {                                      # presets from before input-overlay 5
    0x00: "SOUTH", 0x01: "EAST", 0x02: "WEST", 0x03: "NORTH", 0x04: "LEFT_SHOULDER", 0x05: "RIGHT_SHOULDER", 0x06: "BACK", 0x07: "START",
    0x08: "GUIDE", 0x09: "LEFT_THUMB", 0x10: "RIGHT_THUMB", 0x11: "DPAD_LEFT", 0x12: "DPAD_RIGHT", 0x13: "DPAD_UP", 0x14: "DPAD_DOWN"}.items()}
OBS_GAP = 3                                                                                  # pixels between related sprites in the atlas
FAMILIES = {"xbox_360": ("360",), "xbox_series": ("series",), "xbox_one": ("xbox", "xbone"), "ps3": ("ps3", "ds3", "dualshock3"),
            "ps5": ("ps5", "dualsense"), "ps4": ("ps4", "ds4", "dualshock", "playstation"), "switch_pro": ("switch", "nintendo")}


def family_of(name):
    """The controller family that a skin's name speaks of, else "generic"."""
    name = name.lower()
    return next((family for family, words in FAMILIES.items() if any(w in name for w in words)), "generic")


def premultiply(rgba):
    """Straight -> premultiplied alpha, uint8."""
    alpha = np.ascontiguousarray(rgba[..., 3])
    return cv2.merge([*cv2.split(cv2.multiply(rgba[..., :3], cv2.merge([alpha] * 3), scale=1 / 255)), alpha])


MOST_PIXELS = 1 << 26                              # of one picture: 8192 x 8192


def decode_picture(data, flags):
    """The bytes uint8 (k,) of a PNG or JPEG -> cv2.imdecode's array; None for anything else, and for a header
    that asks for more than MOST_PIXELS: a few bytes could take all memory."""
    head, size = data.tobytes(), b""
    if head[:4] == b"\x89PNG":
        size = head[16:24]
    elif head[:2] == b"\xff\xd8":
        at = 2
        while not size and head[at:at + 1] == b"\xff":
            marker = head[at + 1:at + 2]
            if marker == b"\xff":                                        # filling
                at += 1
            elif b"\xc0" <= marker <= b"\xcf" and marker not in b"\xc4\xc8\xcc":
                size = head[at + 5:at + 9]
            else:
                at += 2 + int.from_bytes(head[at + 2:at + 4], "big")
    half = len(size) // 2
    if not 0 < int.from_bytes(size[:half], "big") * int.from_bytes(size[half:], "big") <= MOST_PIXELS:
        return None
    return cv2.imdecode(data, flags)


def read_rgba(path):
    """A PNG or JPEG file as uint8 (h, w, 4) RGBA, straight alpha. UserError when it is no picture."""
    try:
        data = np.fromfile(path, np.uint8)         # imread can't open non-ASCII names on Windows
        image = decode_picture(data, cv2.IMREAD_UNCHANGED)
    except (OSError, cv2.error):                   # a folder
        image = None
    if image is None:
        raise UserError(f"{path}: expected a PNG or JPEG picture of at most {MOST_PIXELS} pixels, "
                        "found something else: remove it or save it again as PNG")
    if image.dtype != np.uint8:
        image = (image / 257).astype(np.uint8)
    if image.ndim == 2:
        image = cv2.cvtColor(image, cv2.COLOR_GRAY2BGR)
    return cv2.cvtColor(image, cv2.COLOR_BGRA2RGBA if image.shape[2] == 4 else cv2.COLOR_BGR2RGBA)


def save_png(path, rgba):
    """Write a uint8 RGB(A) picture as PNG, atomically."""
    code = cv2.COLOR_RGBA2BGRA if rgba.shape[2] == 4 else cv2.COLOR_RGB2BGR
    png = cv2.imencode(".png", cv2.cvtColor(rgba, code))[1]
    write_atomic(path, lambda tmp: tmp.write_bytes(png))


def load_preset(layout, width=None):
    """An OBS input-overlay preset: layout JSON + the atlas PNG beside it -> Skin, `width` pixels wide (None: its own size)."""
    layout = Path(layout)
    preset, pngs = read_json(layout, dict), sorted(layout.parent.glob("*.png"))
    atlas = next((p for p in pngs if p.stem == layout.stem), pngs[0] if pngs else None)
    if atlas is None:
        raise UserError(f"{layout}: expected the atlas PNG beside it, found none: copy the preset's .png into {layout.parent}")
    atlas = premultiply(read_rgba(atlas))
    try:
        elements = [e for e in preset["elements"] if e["type"] in (0, 2, 5, 6, 7, 8)]
        size = (int(preset.get("overlay_width") or max(e["pos"][0] + e["mapping"][2] for e in elements)),
                int(preset.get("overlay_height") or max(e["pos"][1] + e["mapping"][3] for e in elements)))
        parts = [part for element in elements if (part := preset_part(element, atlas)) and part.sprites[0] is not None]
        if not parts or not all(1 <= v <= 1 << 13 for v in size) or any(len(p.at) != 2 or not 0 <= p.travel[0] <= 1 << 13 for p in parts):
            raise ValueError(f"{len(parts)} parts inside the atlas on a canvas of {size[0]} x {size[1]}")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError) as e:
        raise UserError(f"{layout}: expected an OBS input-overlay layout with elements, found {type(e).__name__} {e}: export the preset again") from None
    return measured(layout.parent.name, family_of(layout.parent.name + layout.stem), size, parts, width)


def preset_part(element, atlas):
    """One element of a preset -> Part, or None where the pad has no such button (paddles).

    Its type: 0 picture, 2 button, 5 stick, 6 trigger, 7 guide button (a sprite for each player), 8 d-pad.
    """
    x, y, w, h = (int(v) for v in element["mapping"])

    def sprite(column, row):
        left, top = x + column * (w + OBS_GAP), y + row * (h + OBS_GAP)
        cut = atlas[top:top + h, left:left + w]
        return cut if cut.size else None

    kind, at, side = element["type"], tuple(int(v) for v in element["pos"]), element.get("side", 0)
    if kind == 0:
        return Part("", at, [sprite(0, 0)])
    if kind == 2:
        name = OBS_BUTTONS.get(element.get("code"))
        return name and Part(name, at, [sprite(0, 0), sprite(0, 1)])
    if kind == 5:
        radius = float(element.get("stick_radius", w / 4))
        pressed = sprite(0, 1)
        return Part(("left", "right")[side], at, [sprite(0, 0), sprite(0, 0) if pressed is None else pressed], (radius, radius))
    if kind == 6:
        pressed, grow = sprite(0, 1), ("", "up", "down", "left", "right")[element.get("direction", 1)]
        if element.get("trigger_mode") or pressed is None:                                   # a plain button; nothing to uncover
            grow = ""
        elif not pressed.any():                                                              # an empty picture to uncover: this pad shows no trigger
            return Part("", at, [sprite(0, 0)])
        return Part(("LEFT_TRIGGER", "RIGHT_TRIGGER")[side], at, [sprite(0, 0), pressed], grow=grow)
    if kind == 7:
        return Part("GUIDE", at, [sprite(0, 0), sprite(4, 0)])
    return Part("DPAD", at, [sprite(column, 0) for column in range(9)])


def measured(name, family, size, parts, width=None):
    """Parts -> Skin at `width`, its geometry read off the parts: a button's box is where its sprites have ink."""
    scale = 1.0 if width is None else width / size[0]
    out = size if width is None else (width, max(1, round(size[1] * scale)))
    skin = Skin(name, family, out, [scaled(p, scale) for p in parts if any(s is not None for s in p.sprites)])
    for part in skin.parts:
        inked = [cv2.boundingRect(np.ascontiguousarray((s[..., 3] > 24).astype(np.uint8))) for s in part.sprites if s is not None]
        inked = [(x, y, x + w, y + h) for x, y, w, h in inked if w and h]
        if not part.control or not inked:
            continue
        (x0, y0), (x1, y1) = np.min(inked, 0)[:2].tolist(), np.max(inked, 0)[2:].tolist()
        box = [part.at[0] + x0, part.at[1] + y0, part.at[0] + x1, part.at[1] + y1]
        center = [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2]
        if part.control in STICKS:
            skin.sticks[part.control] = {"center": center, "travel": list(part.travel), "radius": (x1 - x0 + y1 - y0) / 4}
            if len(part.sprites) > 1 and not np.array_equal(*part.sprites[:2]):
                skin.buttons.setdefault(THUMB[part.control], box)
        elif part.control == "DPAD":
            (cx, cy), (w, h) = center, ((box[2] - box[0]) / 6, (box[3] - box[1]) / 6)
            for direction, dx, dy in (("UP", 0, -2), ("DOWN", 0, 2), ("LEFT", -2, 0), ("RIGHT", 2, 0)):
                skin.buttons["DPAD_" + direction] = [cx + dx * w - w, cy + dy * h - h, cx + dx * w + w, cy + dy * h + h]
        else:
            skin.buttons[part.control] = box
    return skin


def scaled(part, scale):
    """A part on a canvas `scale` times as large; its sprites keep their sub-pixel place."""
    if scale == 1:
        return part
    left, top = int(np.floor(part.at[0] * scale)), int(np.floor(part.at[1] * scale))
    shift = np.float32([[scale, 0, part.at[0] * scale - left + (scale - 1) / 2], [0, scale, part.at[1] * scale - top + (scale - 1) / 2]])

    def resize(s):
        h, w = s.shape[:2]
        blur = cv2.GaussianBlur(s, (0, 0), 0.4 / scale) if scale < 0.8 else s
        return cv2.warpAffine(blur, shift, (int(np.ceil(w * scale)) + 2, int(np.ceil(h * scale)) + 2), flags=cv2.INTER_LINEAR)

    return Part(part.control, (left, top), [None if s is None else resize(s) for s in part.sprites],
                (part.travel[0] * scale, part.travel[1] * scale), part.grow)


def load_picture(png, width=None):
    """NAME.png, a pad at rest (RGB or RGBA), with an optional NAME.json beside it (its geometry) -> Skin.

    A picture says nothing of pressed states, so draw() shows a plain guess: caps cut out and moved, pressed boxes lit.
    """
    png = Path(png)
    rgba = read_rgba(png)
    h, w = rgba.shape[:2]
    note = png.with_suffix(".json")
    geometry = read_json(note, dict) if note.exists() else {}
    buttons, sticks, bbox = check_geometry(note, geometry)
    base = premultiply(rgba)
    parts = [Part("", (0, 0), [base])]
    if (rgba[..., 3].ravel()[::97] == 255).all():                                            # opaque picture: its corner colour is a key colour
        key = np.abs(rgba[..., :3].astype(np.int16) - rgba[0, 0, :3]).max(2) <= 12
        if key.mean() > 0.1 and np.ptp(rgba[0, 0, :3]) > 150:                                # a chroma key, which no streamer leaves in the picture
            base[flood(key)] = 0
    for name, (x0, y0, x1, y1) in buttons.items():
        left, top = max(int(x0), 0), max(int(y0), 0)
        cut = base[top:int(y1), left:int(x1)]
        if cut.size and name not in THUMB.values():
            lit = cv2.addWeighted(cut, 0.4, np.full_like(cut, 255), 0.6, 0)
            parts.append(Part(name, (left, top), [None, premultiply(np.dstack([lit[..., :3], ellipse_alpha(cut.shape)]))]))
    for side, stick in sticks.items():
        parts.append(cap_of(base, side, stick))
    skin = measured(png.stem, str(geometry.get("controller") or family_of(png.stem)), (w, h), parts, width)
    scale = skin.size[0] / w
    skin.bbox = bbox and [v * scale for v in bbox]
    skin.buttons = {n: [v * scale for v in b] for n, b in buttons.items()}
    skin.sticks = {s: {"center": [v * scale for v in g["center"]], "travel": [v * scale for v in g["travel"]], "radius": g["radius"] * scale}
                   for s, g in sticks.items()}
    return skin


def check_geometry(note, geometry):
    """A picture's NAME.json -> (buttons {name: [x0, y0, x1, y1]}, sticks {side: center, travel, radius}, bbox or None); UserError names the file."""
    try:
        buttons = {n: [float(v) for v in b["box"]] for n, b in geometry.get("buttons", {}).items() if n in BUTTON}
        buttons = {n: b for n, b in buttons.items() if n in geometry.get("visible_buttons", buttons)}
        sticks = {s: {"center": list(map(float, g["center"])), "travel": list(map(float, g["travel"])), "radius": float(g.get("radius", max(g["travel"])))}
                  for s, g in geometry.get("sticks", {}).items() if s in STICKS}
        bbox = geometry.get("bbox")
        bbox = [float(v) for v in bbox] if isinstance(bbox, list) and len(bbox) == 4 else None
        pairs = [v for g in sticks.values() for v in (g["center"], g["travel"], [g["radius"]] * 2)]
        if any(len(b) != 4 for b in buttons.values()) or any(len(p) != 2 for p in pairs):
            raise ValueError("a list of another length")
        if not all(abs(v) < 1e5 for numbers in (*buttons.values(), *pairs, bbox or ()) for v in numbers):
            raise ValueError("a number outside -1e5..1e5")
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise UserError(f"{note}: expected buttons.NAME.box and sticks.left.center/travel, found {type(e).__name__} {e}: mend it or remove it") from None
    return buttons, sticks, bbox


def flood(key):
    """The part of mask `key` that is joined to the picture's border: a backdrop, not a hole in the pad."""
    _, labels = cv2.connectedComponents(np.pad(key, 1, constant_values=True).astype(np.uint8))
    return labels[1:-1, 1:-1] == labels[0, 0]


def ellipse_alpha(shape):
    """uint8 (h, w) alpha of the ellipse that fills a box."""
    alpha = np.zeros(shape[:2], np.uint8)
    return cv2.ellipse(alpha, (shape[1] // 2, shape[0] // 2), (max(shape[1] // 2 - 1, 1), max(shape[0] // 2 - 1, 1)), 0, 0, 360, 255, -1, cv2.LINE_AA)


def cap_of(base, side, stick):
    """The stick's cap cut out of a picture (the hole is filled with the colour round it) as a part that moves."""
    (cx, cy), r = stick["center"], max(stick["radius"], 2)
    x0, y0, x1, y1 = (max(int(v), 0) for v in (cx - r, cy - r, cx + r, cy + r))
    cut = base[y0:y1, x0:x1].copy()
    if not cut.size:
        return Part("", (0, 0), [None])
    alpha = ellipse_alpha(cut.shape)
    ring = base[max(y0 - 2, 0):y1 + 2, max(x0 - 2, 0):x1 + 2]
    base[y0:y1, x0:x1][alpha > 127] = np.median(np.vstack([ring[:2].reshape(-1, 4), ring[-2:].reshape(-1, 4)]), 0)
    cut = cv2.multiply(cut, cv2.merge([alpha] * 4), scale=1 / 255)
    lit = np.dstack([cv2.max(cut[..., :3], cv2.multiply(cv2.merge([cut[..., 3]] * 3), 0.6)), cut[..., 3]])
    return Part(side, (x0, y0), [cut, lit], tuple(stick["travel"]))


def read_json(path, kind):
    """A JSON file whose top level is `kind`; UserError names the file."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        json.dumps(value, ensure_ascii=False).encode()    # half a letter (\ud800) can't be printed or written
    except (ValueError, OSError, RecursionError) as e:
        raise UserError(f"{path}: expected JSON, found {e}: mend it or remove it") from None
    if not isinstance(value, kind):
        raise UserError(f"{path}: expected a JSON {kind.__name__}, found a {type(value).__name__}: mend it or remove it")
    return value


def load_skins(path, width=None):
    """Every skin under `path`: an OBS layout .json, a .png, or a folder (searched one level deep) of either -> list of Skins."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: expected a folder of templates or an OBS preset, found nothing there: check --templates / --skins")
    if path.is_file():
        return [load_preset(path, width) if path.suffix == ".json" else load_picture(path, width)]
    skins = []
    for folder in [path, *sorted(p for p in path.iterdir() if p.is_dir())]:
        layouts = [p for p in sorted(folder.glob("*.json")) if '"elements"' in p.read_text(encoding="utf-8", errors="replace")]
        skins += [load_preset(p, width) for p in layouts]
        if not layouts:
            skins += [load_picture(p, width) for p in sorted(folder.glob("*.png"))]
    if not skins:
        raise UserError(f"{path}: expected NAME.png templates or OBS preset folders, found none: check --templates / --skins")
    return skins


# ------------------------------------------------------------------------------------------------------- skins of our own drawing
# Every pad is laid out on a 400 x 290 canvas. Places are [x, y, w, h] of the left half's controls and of the right half's.
PAD_SIZE = (400, 290)
XBOX = dict(left=(100, 103), right=(250, 166), dpad=(150, 166), face=(301, 103), back=(166, 103), start=(234, 103), guide=(200, 78),
            half=[(200, 52), (240, 50), (285, 43), (322, 52), (352, 82), (374, 140), (392, 215), (386, 258), (360, 270), (332, 250), (302, 214),
                  (268, 200), (232, 196), (200, 196)])
SONY = dict(left=(145, 168), right=(255, 168), dpad=(92, 106), face=(308, 106), back=(134, 76), start=(266, 76), guide=(200, 170),
            half=[(200, 58), (250, 56), (282, 48), (330, 52), (356, 74), (376, 132), (396, 214), (394, 254), (368, 268), (346, 246), (318, 208),
                  (290, 202), (262, 196), (200, 192)])
PRO = dict(left=(92, 100), right=(246, 162), dpad=(148, 162), face=(304, 100), back=(160, 80), start=(240, 80), guide=(226, 108),
           half=[(200, 46), (260, 46), (320, 54), (352, 78), (372, 130), (390, 210), (384, 256), (358, 264), (334, 234), (318, 204), (268, 200), (200, 200)])
SLAB = dict(left=(104, 180), right=(296, 180), dpad=(84, 110), face=(316, 110), back=(168, 110), start=(232, 110), guide=(200, 150),
            half=[(200, 58), (300, 58), (362, 66), (384, 110), (384, 170), (362, 222), (300, 234), (200, 234)])
LAYOUTS = {                                      # what tells one generation from the next: where the small controls sit and how the grips run
    "xbox_360": XBOX | dict(back=(160, 106), start=(240, 106), guide=(200, 106), dpad=(146, 170), right=(254, 170),
                            half=[(200, 44), (236, 44), (284, 40), (326, 46), (358, 76), (382, 136), (398, 206), (392, 250), (364, 264), (338, 246), (306, 212),
                                  (272, 198), (236, 192), (200, 192)]),
    "xbox_one": XBOX, "xbox_series": XBOX | dict(back=(170, 96), start=(230, 96), guide=(200, 70), left=(104, 106), face=(297, 106), right=(248, 162)),
    "ps3": SONY | dict(back=(172, 106), start=(228, 106), guide=(200, 140), left=(142, 162), right=(258, 162)), "ps4": SONY,
    "ps5": SONY | dict(back=(140, 66), start=(260, 66), left=(148, 172), right=(252, 172),
                       half=[(200, 54), (250, 52), (290, 48), (336, 60), (364, 88), (384, 140), (394, 200), (390, 246), (370, 262), (344, 244), (322, 214),
                             (290, 206), (256, 208), (200, 206)]),
    "switch_pro": PRO, "generic": SLAB}
FACES = (("NORTH", 0, -1), ("EAST", 1, 0), ("SOUTH", 0, 1), ("WEST", -1, 0))
FACE_LABELS = {"xbox": "YBAX", "ps": "^ox#", "switch": "XABY", "generic": "4231"}          # north, east, south, west; ^ o x # are drawn shapes
FACE_INKS = {"xbox": ((250, 205, 40), (235, 60, 50), (110, 200, 60), (60, 130, 235)), "ps": ((70, 200, 160), (240, 90, 80), (120, 150, 230), (225, 130, 200)),
             "switch": ((225, 225, 225),) * 4, "generic": ((90, 160, 250), (250, 90, 90), (100, 210, 120), (245, 210, 80))}
SHOULDER_LABELS = {"xbox": ("LB", "RB", "LT", "RT"), "ps": ("L1", "R1", "L2", "R2"), "switch": ("L", "R", "ZL", "ZR"), "generic": ("5", "6", "7", "8")}
ARROWS = ("up", "down", "left", "right")
POLYGONS = {                                     # corners in a box from (-1, -1), top left, to (1, 1)
    "cross": [(-1, -.34), (-.34, -.34), (-.34, -1), (.34, -1), (.34, -.34), (1, -.34), (1, .34), (.34, .34), (.34, 1), (-.34, 1), (-.34, .34), (-1, .34)],
    "up": [(0, -1), (.9, .8), (-.9, .8)], "down": [(0, 1), (.9, -.8), (-.9, -.8)],
    "left": [(-1, 0), (.8, .9), (.8, -.9)], "right": [(1, 0), (-.8, .9), (-.8, -.9)],
    "horn": [(-1, 1), (-.7, -.2), (-.2, -.9), (.4, -1), (.8, -.4), (1, 1), (0, .75)],
    "^": [(0, -.9), (.85, .6), (-.85, .6)], "#": [(-.7, -.7), (.7, -.7), (.7, .7), (-.7, .7)]}


def stamp(size, kind, box, stroke=0.0, text=""):
    """One shape as an antialiased mask, uint8 (h, w): drawn four times as large with OpenCV, shrunk by area.

    kind: one of POLYGONS, ellipse or o, rect (rounded), x, text. box = [x0, y0, x1, y1] in pixels; stroke: width of the outline, 0 = filled.
    """
    k = 4
    w, h = int(np.ceil(size[0])), int(np.ceil(size[1]))
    mask = np.zeros((h * k, w * k), np.uint8)
    x0, y0, x1, y1 = (float(v) * k for v in box)
    cx, cy, rx, ry = (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / 2, (y1 - y0) / 2
    if kind == "text":
        scale = 2 * ry / 22
        (tw, th), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, max(1, int(stroke * k)))
        cv2.putText(mask, text, (int(cx - tw / 2), int(cy + th / 2)), cv2.FONT_HERSHEY_SIMPLEX, scale, 255, max(1, int(stroke * k)))
        return cv2.resize(mask, (w, h), interpolation=cv2.INTER_AREA)
    thick = max(1, int(round(stroke * k))) if stroke else -1                                # -1: filled
    inset = max(thick, 0) / 2
    if kind == "x":
        for sign in (-1, 1):
            cv2.line(mask, (int(cx - .7 * rx), int(cy - sign * .7 * ry)), (int(cx + .7 * rx), int(cy + sign * .7 * ry)), 255, max(thick, 1))
    elif kind in ("ellipse", "o"):
        cv2.ellipse(mask, (int(cx), int(cy)), (max(int(rx - inset), 1), max(int(ry - inset), 1)), 0, 0, 360, 255, thick)
    else:
        if kind in POLYGONS:
            polygon = np.int32([[cx + px * rx, cy + py * ry] for px, py in POLYGONS[kind]])
        else:
            polygon = rounded(x0, y0, x1, y1, min(rx, ry) * 0.6, inset)
        if thick < 0:
            cv2.fillPoly(mask, [polygon], 255)
        else:
            cv2.polylines(mask, [polygon], True, 255, thick)
    return cv2.resize(mask, (w, h), interpolation=cv2.INTER_AREA)


def rounded(x0, y0, x1, y1, r, inset):
    """The outline of a rounded rectangle as int32 (n, 2) points."""
    x0, y0, x1, y1, r = x0 + inset, y0 + inset, x1 - inset, y1 - inset, max(r - inset, 1)
    turn = np.linspace(0, np.pi / 2, 8)
    corners = [((x1 - r, y1 - r), 0), ((x0 + r, y1 - r), 1), ((x0 + r, y0 + r), 2), ((x1 - r, y0 + r), 3)]
    return np.int32(np.concatenate([np.c_[cx + r * np.cos(turn + q * np.pi / 2), cy + r * np.sin(turn + q * np.pi / 2)] for (cx, cy), q in corners]))


def ink(canvas, mask, color):
    """Paint color (r, g, b) or (r, g, b, alpha 0..1) through a mask on a premultiplied canvas, in place."""
    alpha = color[3] if len(color) > 3 else 1.0
    mask = cv2.multiply(mask, alpha) if alpha < 1 else mask
    layer = cv2.merge([*(cv2.multiply(mask, float(c) / 255) for c in color[:3]), mask])
    blend(canvas, layer, 0, 0)
    return canvas


def mix(a, b, share):
    """Colour a moved towards b by share."""
    return tuple(x + (y - x) * share for x, y in zip(a[:3], b[:3]))


@dataclass
class Look:
    """How a pad of ours is drawn: all that varies between two skins of one family."""
    body: tuple | None = (60, 60, 66)           # fill; None = see-through
    line: tuple | None = None                   # outline of the body and the controls
    width: float = 2.0                          # of that outline
    button: tuple | None = (30, 30, 34)         # fill of the controls at rest; None = only their outline or label
    label: tuple | None = (235, 235, 235)       # ink of the labels; None = unlabelled
    colored: bool = True                        # face buttons labelled in the family's colours
    cap: tuple | None = (20, 20, 22)
    well: tuple | None = (44, 44, 48)
    lit: tuple = (255, 240, 80)                 # what pressed looks like
    press: str = "light"                        # face buttons and small ones: light white tint faint ring fill dark move show grow blob
    press_thumb: str = "light"
    press_dpad: str = "light"
    press_top: str = "light"                    # shoulders and triggers
    stick: str = "cap"                          # cap dot ring knurl
    dpad: str = "cross"                         # cross four arrows
    shape: str = "ellipse"                      # of the face buttons
    trigger: str = "button"                     # button up down left right (the last four grow with the value)
    trigger_shape: str = "rect"                 # rect horn ellipse
    thumb: str = "cap"                          # where L3 / R3 shows: cap, label, none, behind (a disc where the stick rests)
    glow: bool = False                          # the cap is lit while it is off centre
    dish: float = 0.0                           # the cap shaded like a photographed one, 0 .. 1
    blob: float = 1.0                           # a pressed blob's size beside the button's
    missing: tuple = ()
    shade: float = 0.0                          # 0 flat .. 1 like a photograph
    radius: float = 20.0                        # of the caps, pixels
    travel: float = 12.0                        # of the caps, pixels
    size: float = 12.0                          # radius of a face button
    spread: float = 25.0                        # of the face buttons round their centre
    spill: float = 0.7                          # how far the well reaches beyond a cap at rest, in travels: 0 = the cap covers it
    jitter: dict = field(default_factory=dict)  # control -> (dx, dy), and "body" -> offsets of the outline


def brand_of(family):
    """Which labels a family carries: xbox, ps, switch or generic."""
    return next((brand for brand in ("xbox", "ps", "switch") if family.startswith(brand)), "generic")


def press(look, how, size, kind, label, label_ink, fill, box):
    """The two sprites [at rest, pressed] of a control of `kind` in `box` on a canvas of `size`: how pressed looks is look.press*."""
    def one(fill, label_ink, line, width, box):
        canvas = np.zeros((int(np.ceil(size[1])), int(np.ceil(size[0])), 4), np.uint8)
        if fill is not None:
            ink(canvas, stamp(size, kind, box), fill)
        if line is not None:
            ink(canvas, stamp(size, kind, box, width), line)
        if label and label_ink is not None:
            x0, y0, x1, y1 = box
            pad_x, pad_y = (x1 - x0) * 0.24, (y1 - y0) * 0.24
            inner = (x0 + pad_x, y0 + pad_y, x1 - pad_x, y1 - pad_y)
            drawn = label if label in ("^", "o", "x", "#", *ARROWS) else "text"
            ink(canvas, stamp(size, drawn, inner, 0 if drawn in ARROWS else 1.6, label), label_ink)
        return canvas

    rest = one(fill, label_ink, look.line, look.width, box)
    lit, shown = look.lit, fill if fill is not None else look.body or (90, 90, 90)
    x0, y0, x1, y1 = box
    dark_label = label_ink and (mix(lit, (0, 0, 0), 0.8) if sum(lit[:3]) > 380 else (255, 255, 255))
    middle = ((x0 + x1) / 2, (y0 + y1) / 2)
    r = min(x1 - x0, y1 - y0) / 2 * look.blob
    spot = (middle[0] - r, middle[1] - r, middle[0] + r, middle[1] + r)
    if how == "blob":
        pressed = ink(rest.copy(), stamp(size, "ellipse", spot), lit)
    elif how == "light" and len(lit) == 4:                                                  # a see-through light over what is at rest
        pressed = ink(rest.copy(), stamp(size, kind, box), lit)
    else:
        pressed = one(*{                                                                    # fill, ink of the label, outline, its width, box
            "light": (lit, dark_label, look.line, look.width, box),
            "show": (lit, dark_label, look.line, look.width, box),
            "white": (lit, None, lit, look.width, box),
            "faint": (mix(shown, lit, 0.14), label_ink, look.line, look.width, box),
            "tint": (mix(shown, lit, 0.45), label_ink, look.line, look.width, box),
            "fill": (look.line or label_ink or lit, shown, look.line, look.width, box),
            "dark": (mix(shown, (0, 0, 0), 0.6), label_ink and mix(label_ink, (0, 0, 0), 0.4), look.line, look.width, box),
            "ring": (fill, label_ink, lit, max(look.width, 2.5) * 1.4, (x0 - 1, y0 - 1, x1 + 1, y1 + 1)),
            "move": (mix(shown, lit, 0.2), label_ink, look.line, look.width, (x0, y0 + 3, x1, y1 + 3)),
            "grow": (lit, dark_label, look.line, look.width, (x0 - 3, y0 - 3, x1 + 3, y1 + 3))}[how])
    return [None if how == "show" else rest, pressed]


def pad_skin(name, family, look):
    """A pad of our own drawing -> Skin. Deterministic in its arguments."""
    place, brand, parts = LAYOUTS[family], brand_of(family), []

    def jittered(control, x, y):
        dx, dy = look.jitter.get(control, (0, 0))
        return x + dx, y + dy

    def button(control, x, y, rx, ry, kind, label="", label_ink=look.label, how=look.press, fill=look.button, grow=""):
        if control in look.missing:
            return
        x, y = jittered(control, x, y)
        m = 5                                                                               # room for strokes, moves and growth
        left, top = int(np.floor(x - rx - m)), int(np.floor(y - ry - m))
        size, box = (2 * (rx + m) + 1, 2 * (ry + m) + 1), (x - rx - left, y - ry - top, x + rx - left, y + ry - top)
        parts.append(Part(control, (left, top), press(look, how, size, kind, label, label_ink, fill, box), grow=grow))

    lb, rb, lt, rt = SHOULDER_LABELS[brand] if look.label else ("",) * 4
    top = place["half"][2][1]
    grow = "" if look.trigger == "button" else look.trigger
    for control, x, label in (("LEFT_TRIGGER", 92, lt), ("RIGHT_TRIGGER", 308, rt)):
        mirrored = {"left": "right", "right": "left"}.get(grow, grow) if control[0] == "R" else grow
        button(control, x, top - 27, 24, 13, look.trigger_shape, label, how=look.press_top, grow=mirrored)
    for control, x, label in (("LEFT_SHOULDER", 96, lb), ("RIGHT_SHOULDER", 304, rb)):
        button(control, x, top - 2, 32, 8, "rect", label, how=look.press_top)
    parts.append(Part("", (0, 0), [pad_body(family, look, place)]))
    if look.press_top != "show":                                                            # the body lies under shoulders that are always seen
        parts.insert(0, parts.pop())
    labels, inks = FACE_LABELS[brand], FACE_INKS[brand]
    for (control, dx, dy), label, color in zip(FACES, labels, inks):
        x, y = jittered("face", *place["face"])
        button(control, x + dx * look.spread, y + dy * look.spread, look.size, look.size, look.shape, label if look.label else "",
               color if look.colored else look.label)
    small = {"xbox": ("left", "right"), "switch": ("-", "+")}.get(brand, ("", ""))
    for control, key, label in (("BACK", "back", small[0]), ("START", "start", small[1])):
        button(control, *place[key], *((5, 9) if brand == "ps" else (8, 7)), "rect" if brand in ("ps", "generic") else "ellipse", label)
    button("GUIDE", *place["guide"], 11, 11, "ellipse", {"xbox": "X", "ps": "P"}.get(brand, "H") if look.label else "")
    dpad_parts(parts, button, look, *jittered("dpad", *place["dpad"]))
    for side in STICKS:
        stick_parts(parts, button, look, side, *jittered(side, *place[side]))
    return measured(name, family, PAD_SIZE, parts)


def pad_body(family, look, place):
    """The body's picture, uint8 (290, 400, 4) premultiplied: outline, shading, touch pad, wells."""
    canvas = np.zeros((PAD_SIZE[1], PAD_SIZE[0], 4), np.uint8)
    half = np.float32(place["half"]) + np.float32(look.jitter.get("body", 0))
    half[[0, -1], 0] = 200
    ring = np.concatenate([half, (half * (-1, 1) + (400, 0))[-2:0:-1]])
    w0, w1, w2 = spline_weights().T[:, :, None, None]                                       # each (n, 1, 1)
    smooth = (ring * w0 + np.roll(ring, -1, 0) * w1 + np.roll(ring, -2, 0) * w2).transpose(1, 0, 2).reshape(-1, 2)
    mask = np.zeros((PAD_SIZE[1] * 2, PAD_SIZE[0] * 2), np.uint8)
    cv2.fillPoly(mask, [np.int32(smooth * 2)], 255)
    edge = np.zeros_like(mask)
    cv2.polylines(edge, [np.int32(smooth * 2)], True, 255, max(1, int(look.width * 2)))
    mask, edge = (cv2.resize(m, PAD_SIZE, interpolation=cv2.INTER_AREA) for m in (mask, edge))
    if look.body is not None:
        ink(canvas, mask, look.body)
        if look.shade:
            depth = cv2.GaussianBlur(cv2.distanceTransform((mask > 127).astype(np.uint8), cv2.DIST_L2, 3).clip(0, 24) / 24, (0, 0), 4)
            light = np.linspace(1.25, 0.7, PAD_SIZE[1])[:, None] * (0.55 + 0.6 * depth)
            gain = 1 + look.shade * (light - 1)
            canvas[..., :3] = np.minimum(canvas[..., :3] * gain[..., None], canvas[..., 3:]).astype(np.uint8)
    if look.line is not None:
        ink(canvas, edge, look.line)
    if family in ("ps4", "ps5") and look.body is not None:
        ink(canvas, stamp(PAD_SIZE, "rect", (156, 62, 244, 122)), mix(look.body, (0, 0, 0) if family == "ps4" else (255, 255, 255), 0.5))
    elif family in ("ps4", "ps5") and look.line is not None:
        ink(canvas, stamp(PAD_SIZE, "rect", (156, 62, 244, 122), look.width), look.line)
    return canvas


def spline_weights(n=8):
    """Quadratic B-spline weights (n, 3): a closed smooth curve through the middles of control points."""
    t = np.linspace(0, 1, n, endpoint=False)
    return np.c_[(1 - t) ** 2 / 2, 0.5 + t * (1 - t), t ** 2 / 2]


def dpad_parts(parts, button, look, x, y):
    """The d-pad: a cross with lit arms, four buttons, or four arrows."""
    r = 27.0
    if look.dpad == "cross":
        m = int(r) + 4
        left, top = int(x) - m, int(y) - m
        size, box = (2 * m, 2 * m), (x - left - r, y - top - r, x - left + r, y - top + r)
        canvas = np.zeros((2 * m, 2 * m, 4), np.uint8)
        if look.button is not None:
            ink(canvas, stamp(size, "cross", box), look.button)
        if look.line is not None or look.button is None:
            ink(canvas, stamp(size, "cross", box, look.width), look.line or look.label or look.lit)
        parts.append(Part("", (left, top), [canvas]))
    how = "show" if look.dpad == "cross" and look.press_dpad in ("light", "grow", "move") else look.press_dpad
    labelled = look.label and (look.dpad == "four" or (look.dpad == "cross" and how != "show"))
    for arrow, dx, dy in (("up", 0, -1), ("down", 0, 1), ("left", -1, 0), ("right", 1, 0)):
        kind, fill = (arrow, look.button or look.label) if look.dpad == "arrows" else ("rect", look.button)
        button("DPAD_" + arrow.upper(), x + dx * 19, y + dy * 19, 8, 8, kind, arrow if labelled else "", how=how, fill=fill)


def stick_parts(parts, button, look, side, x, y):
    """A stick: its well, its moving cap with the pressed state, and L3 / R3 as a label below where the skin has it so."""
    r, travel, thumb = look.radius, look.travel, THUMB[side]
    ring = {"dot": travel + r * 0.4, "ring": max(r, travel) * 1.1}.get(look.stick, r + travel * look.spill)
    m = int(ring) + 4
    size, box = (2 * m, 2 * m), (m - ring, m - ring, m + ring, m + ring)
    well = np.zeros((2 * m, 2 * m, 4), np.uint8)
    if look.well is not None:
        ink(well, stamp(size, "ellipse", box), look.well)
    if look.line is not None or look.well is None and look.stick != "cap":
        ink(well, stamp(size, "ellipse", box, look.width), look.line or look.label or look.lit)
    parts.append(Part("", (int(x) - m, int(y) - m), [well]))
    cap_r = r * 0.42 if look.stick == "dot" else r
    m = int(np.ceil(cap_r)) + 4
    size, box = (2 * m, 2 * m), (m - cap_r, m - cap_r, m + cap_r, m + cap_r)
    cap = look.cap if look.stick != "ring" else None

    def face(fill, line, width):
        canvas = np.zeros((2 * m, 2 * m, 4), np.uint8)
        if fill is not None:
            ink(canvas, stamp(size, "ellipse", box), fill)
            if look.stick == "knurl" or look.shade:
                q = cap_r * 0.3
                ink(canvas, stamp(size, "ellipse", (box[0] + q, box[1] + q, box[2] - q, box[3] - q)), mix(fill, (255, 255, 255), 0.14))
                ink(canvas, stamp(size, "ellipse", box, 1.5), mix(fill, (0, 0, 0) if sum(fill[:3]) > 200 else (255, 255, 255), 0.25))
        if line is not None:
            ink(canvas, stamp(size, "ellipse", box, width), line)
            if look.stick in ("knurl", "ring"):
                q = cap_r * 0.35
                ink(canvas, stamp(size, "ellipse", (box[0] + q, box[1] + q, box[2] - q, box[3] - q), width * 0.7), line)
        return canvas

    def dished(canvas):
        """Shade a cap like a photographed one: light from above left, a concave dish, a dark rim."""
        yy, xx = (np.mgrid[:2 * m, :2 * m] - m) / cap_r
        radius = np.hypot(xx, yy)
        gain = 1 + look.dish * (np.where(radius < 0.68, 0.35 * (xx + yy), -0.45 * (xx + yy)) - 0.7 * np.clip(radius - 0.85, 0, 1) * 4)
        canvas[..., :3] = np.clip(canvas[..., :3] * gain[..., None] + (look.dish * 26 * (radius < 0.68) * (radius > 0.55))[..., None] * (canvas[..., 3:] / 255),
                                  0, canvas[..., 3:])
        return canvas

    line = look.line if look.line is not None or cap is not None else look.label or look.lit
    rest = face(cap, line, look.width)
    gray = (90, 90, 90)                                                                     # of a cap that is drawn as an outline only
    pressed = {"tint": (mix(cap or look.body or gray, look.lit, 0.45), line, look.width), "ring": (cap, look.lit, max(look.width, 2.5) * 1.4),
               "dark": (mix(cap or gray, (0, 0, 0), 0.6), line, look.width), "fill": (line or look.lit, cap, look.width),
               "faint": (mix(cap or gray, look.lit, 0.18), line, look.width)}.get(look.press_thumb, (look.lit[:3], line, look.width))
    states = [rest, face(*pressed) if look.thumb == "cap" and thumb not in look.missing else rest]
    if look.glow:
        states.append(face(mix(cap or look.body or gray, look.lit, 0.6), line, look.width))
    if look.thumb == "behind" and thumb not in look.missing:
        r = cap_r * look.blob * 1.3
        k = int(r) + 2
        disc = ink(np.zeros((2 * k, 2 * k, 4), np.uint8), stamp((2 * k, 2 * k), "ellipse", (k - r, k - r, k + r, k + r)), look.lit)
        parts.append(Part(thumb, (int(x) - k, int(y) - k), [None, disc]))
    parts.append(Part(side, (int(x) - m, int(y) - m), [dished(s) if look.dish else s for s in states], (travel, travel)))
    if look.thumb == "label":
        button(thumb, x, y + ring + 12, 16, 9, "rect", thumb[0] + "3" if look.label else "", how=look.press)


def our_skins():
    """Our own templates, about 300: every family in every style and colour, always the same."""
    dark, light, red, blue, green, purple = (44, 44, 50), (232, 232, 236), (178, 36, 40), (44, 74, 170), (52, 128, 70), (104, 60, 150)
    white, black, yellow, cyan = (255, 255, 255), (16, 16, 18), (255, 236, 90), (90, 220, 250)
    looks = {}
    for name, body in (("dark", dark), ("light", light), ("red", red), ("blue", blue), ("green", green), ("purple", purple),
                       ("gray", (128, 130, 134)), ("gold", (204, 164, 70)), ("pink", (226, 130, 170))):
        pale = sum(body) > 380
        looks[f"{name}_flat"] = Look(body, button=mix(body, white if pale else black, 0.55), label=black if pale else white,
                                     cap=mix(body, black, 0.6), well=mix(body, black, 0.3), lit=yellow)
        looks[f"{name}_photo"] = Look(body, button=mix(body, black, 0.6), label=(220, 220, 220) if pale else white, cap=mix(body, black, 0.75),
                                      well=mix(body, black, 0.45), lit=white, stick="knurl", shade=1.0, radius=24, travel=9, press="tint", press_top="tint")
    for name, line in (("white", white), ("black", black), ("cyan", cyan), ("yellow", yellow)):
        lines = dict(line=line, label=line, colored=False, well=None)
        looks[f"{name}_outline"] = Look(None, **lines, width=2.2, button=None, cap=None, lit=white if line == yellow else yellow, stick="ring", travel=14)
        looks[f"{name}_thin"] = Look(None, **lines, width=1.2, button=None, cap=None, lit=line, press="fill", press_thumb="fill", stick="dot",
                                     radius=22, travel=16)
        looks[f"{name}_glass"] = Look((*mix(line, black, 0.5), 0.35), **lines, width=1.6, button=(*line, 0.2), cap=(*line, 0.8), lit=yellow,
                                      press="show", press_top="show", trigger="up", travel=14)
    for name, cap in (("white", white), ("dark", dark), ("red", red)):
        looks[f"{name}_bare"] = Look(None, button=(*mix(cap, black, 0.4), 0.5), label=white, colored=False, cap=cap, well=None, lit=cyan,
                                     dpad="four", thumb="label", travel=20, radius=18)
        looks[f"{name}_mono"] = Look(mix(cap, (128, 128, 128), 0.6), line=black, width=2.5, button=mix(cap, white, 0.3), label=black, colored=False, cap=cap,
                                     well=(128, 128, 128), lit=yellow if cap == red else red, dpad="arrows", press="ring", travel=10, radius=22)
    looks["arcade_bars"] = Look((30, 34, 44), line=(110, 120, 140), button=(70, 76, 92), label=white, cap=(200, 60, 60), well=(12, 14, 18),
                                lit=(120, 255, 160), trigger="right", dpad="four")
    looks["paper_bars"] = Look((246, 240, 226), line=(90, 80, 70), button=(226, 214, 190), label=(70, 60, 50), colored=False, cap=(120, 100, 80),
                               well=(214, 200, 176), lit=(220, 80, 60), trigger="up", press="dark", dpad="arrows")
    return [pad_skin(f"{family}_{name}", family, look) for family in LAYOUTS for name, look in looks.items()]


def random_skin(rng):
    """A pad that no one has seen: family, layout, colours, styles and press effects drawn from rng (np.random.Generator) -> Skin."""
    def choose(*options):
        return options[rng.integers(len(options))]

    def tone(low=0, high=256):
        """A colour; more often than not a grey."""
        return tuple(rng.integers(low, high, 3).tolist()) if rng.random() < 0.45 else (int(rng.integers(low, high)),) * 3

    def away(color, least):
        """The colour, moved away from the ground where it hardly differs from it."""
        far = (0, 0, 0) if sum(ground) > 380 else (255, 255, 255)
        return color if abs(sum(color[:3]) - sum(ground)) > least else mix(color, far, 0.7)

    family = choose(*LAYOUTS)
    body = choose(None, tone(), tone(), tone(0, 70), tone(190, 256))
    if body is not None and rng.random() < 0.2:
        body = (*body, rng.uniform(0.15, 0.7))
    ground = body[:3] if body else tone(0, 120)
    line = choose(None, away(tone(), 200), away((255, 255, 255), 200)) if body else choose(None, tone(150, 256), (255, 255, 255), tone(0, 60))
    button = choose(None, away(tone(), 60), mix(ground, (0, 0, 0), rng.uniform(0.2, 0.7)), mix(ground, (255, 255, 255), rng.uniform(0.1, 0.5)))
    label = choose(None, away((255, 255, 255), 150), away(tone(), 200)) if button or line else away((255, 255, 255), 150)
    lit = away(choose((255, 255, 255), tone(120, 256), (255, 240, 80), (90, 255, 120), (255, 70, 70), (80, 190, 255), tone()), 150)
    if rng.random() < 0.15:
        lit = (*lit, rng.uniform(0.4, 0.8))
    effects = ["light", "light", "white", "tint", "faint", "ring", "dark", "move", "show", "grow", "blob", "blob"] + (["fill", "fill"] if line or label else [])
    if button is None and line is None:
        effects = ["light", "white", "fill", "ring", "blob"]
    calm = [e for e in effects if e not in ("move", "grow", "show", "white", "blob")]
    cap = choose(mix(ground, (0, 0, 0), rng.uniform(0.3, 0.9)), away(tone(), 60), away(tone(), 120), None if line else (255, 255, 255))
    well = choose(None, mix(ground, (0, 0, 0), rng.uniform(0.1, 0.6)), mix(ground, (255, 255, 255), rng.uniform(0.05, 0.3)))
    if cap and rng.random() < 0.18:                                                          # dark on dark: cap and well nearly alike, no line
        well, line = mix(cap, choose((0, 0, 0), (255, 255, 255)), rng.uniform(0.05, 0.12)), None
    look = Look(body=body, line=line, width=rng.uniform(1, 3.5), button=button, label=label, colored=bool(rng.random() < 0.5), cap=cap, well=well, lit=lit,
                press=choose(*effects), press_thumb=choose(*calm), press_dpad=choose(*effects), press_top=choose(*effects),
                stick=choose("cap", "cap", "knurl", "knurl", "ring", "dot"), dpad=choose("cross", "cross", "four", "arrows"),
                shape=choose("ellipse", "ellipse", "ellipse", "rect"), trigger=choose("button", "button", "up", "down", "left", "right"),
                trigger_shape=choose("rect", "rect", "horn", "ellipse"), thumb=choose("cap", "cap", "cap", "cap", "label", "none", "behind"),
                glow=bool(rng.random() < 0.08), dish=choose(0.0, 0.0, rng.uniform(0.3, 1)), blob=rng.uniform(0.7, 1.25),
                missing=tuple(b for b in ("GUIDE", "BACK", "START", "LEFT_THUMB", "RIGHT_THUMB") if rng.random() < 0.06),
                shade=choose(0.0, 0.0, rng.uniform(0.3, 1.2)), radius=rng.uniform(13, 30), travel=rng.uniform(6.5, 26), size=rng.uniform(9, 15))
    look.spread = look.size * rng.uniform(1.75, 2.3)
    look.spill = choose(0.0, 0.1, 0.7, rng.uniform(0, 1))
    if rng.random() < 0.35:                                                                # a black hole under a cap that is lighter than it
        look.well = tone(0, 24)
        look.cap = choose(mix(look.well, (255, 255, 255), rng.uniform(0.06, 0.3)), mix(look.well, ground, rng.uniform(0.2, 0.7)))
    look.jitter = {c: tuple(rng.uniform(-7, 7, 2)) for c in ("left", "right", "dpad", "face", "GUIDE", "BACK", "START", "LEFT_TRIGGER", "RIGHT_TRIGGER")}
    look.jitter["body"] = rng.uniform(-7, 7, (len(LAYOUTS[family]["half"]), 2)).tolist()
    return pad_skin(f"random_{family}", family, look)


# ----------------------------------------------------------------------------------- backdrops: pictures that could be any game

def palette(rng, n):
    """n RGB colours, uint8 (n, 3), that go together: hues around one or two, bright or dark or pale as a set."""
    hue = rng.uniform(0, 180) + rng.choice([0, 30, 90]) * rng.integers(0, 2, n) + rng.normal(0, rng.uniform(2, 25), n)
    saturation, value = (255 * rng.beta(*rng.uniform(0.6, 4, 2), n) for _ in range(2))
    hsv = np.stack([hue % 180, saturation, value], 1).astype(np.uint8)
    return cv2.cvtColor(hsv[None], cv2.COLOR_HSV2RGB)[0]


def clouds(rng, h, w, octaves=4, smooth=True):
    """Value noise, float32 (h, w) in [0, 1]: random grids, each twice as fine and about half as strong, enlarged and added."""
    total, cells, fade = np.zeros((h, w), np.float32), rng.integers(2, 9), rng.uniform(0.4, 0.9)
    for octave in range(octaves):
        grid = rng.random((cells * h // w + 2, cells), np.float32) * fade ** octave
        total += cv2.resize(grid, (w, h), interpolation=cv2.INTER_LINEAR if smooth else cv2.INTER_NEAREST)
        cells *= 2
    return cv2.normalize(total, None, 0, 1, cv2.NORM_MINMAX)


def ramp(x, colours):
    """Grey x in [0, 1], float32 (h, w) -> uint8 (h, w, 3): a gradient through the colours."""
    table = np.stack([np.interp(np.linspace(0, 1, 256), np.linspace(0, 1, len(colours)), c) for c in colours.T], 1)
    return table.astype(np.uint8)[(np.clip(x, 0, 1) * 255).astype(np.uint8)]


def pixel_art(rng, size, colours):
    """A mirrored figure: uint8 (size, size, 3) and its mask, bool (size, size)."""
    n = int(rng.integers(3, 9))
    half = rng.integers(-len(colours) // 2, len(colours), (2 * n, n))            # negative: see-through
    grid = cv2.resize(np.hstack([half, half[:, ::-1]]).astype(np.int32), (size, size), interpolation=cv2.INTER_NEAREST)
    return colours[grid], grid >= 0


def tile(rng, s, colours):
    """One uint8 (s, s, 3) tile of a tile set: plain, bricks, bevelled block, checks, stripes, pixel noise or a figure."""
    image = np.full((s, s, 3), colours[0], np.uint8)
    y, x = np.mgrid[:s, :s]
    kind, half, joint = rng.integers(7), max(s // 2, 2), max(s // 12, 1)
    if kind == 1:
        image[(y % half < joint) | ((x + half // 2 * (y // half % 2)) % half < joint)] = colours[1]
    elif kind == 2:
        image[:joint] = image[:, :joint] = colours[1]
        image[-joint:] = image[:, -joint:] = colours[2]
    elif kind == 3:
        image[(y // half + x // half) % 2 == 0] = colours[1]
    elif kind == 4:
        image[(x * rng.integers(0, 2) + y) % half < half // 2] = colours[1]
    elif kind == 5:
        image = colours[:3][cv2.resize(rng.integers(0, 3, (8, 8)).astype(np.uint8), (s, s), interpolation=cv2.INTER_NEAREST)]
    elif kind == 6:
        art, mask = pixel_art(rng, s, colours)
        image[mask] = art[mask]
    return image


def tiles(rng, h, w, colours):
    """A 2-D level: a map of random tiles whose regions follow noise, over sky."""
    s = int(rng.integers(h // 24, h // 6 + 4))
    kit = np.stack([tile(rng, s, rng.permutation(colours)) for _ in range(6)])
    kit[0] = colours[0]
    region = clouds(rng, h // s + 1, w // s + 1, 3, smooth=False) + rng.normal(0, rng.uniform(0, 0.3), (h // s + 1, w // s + 1))
    chosen = kit[np.clip(region * 6, 0, 5).astype(int)]                           # (rows, columns, s, s, 3)
    return chosen.swapaxes(1, 2).reshape(s * chosen.shape[0], s * chosen.shape[1], 3)[:h, :w].copy()


def landscape(rng, h, w, colours):
    """Sky, layers of hills or skylines, textured ground, platforms."""
    image = ramp(np.linspace(0, 1, h, dtype=np.float32)[:, None] + rng.uniform(0, 0.5) * clouds(rng, h, w, 3), colours[:3])
    jagged = rng.random() < 0.4                                                  # skylines of houses instead of hills
    for layer, colour in enumerate(colours[3:].tolist()):
        heights = clouds(rng, 1, w, 4, smooth=not jagged)[0] * rng.uniform(0.1, 0.5) * h
        top = (h * (0.4 + 0.15 * layer) + heights).astype(np.int32)
        cv2.fillPoly(image, [np.vstack([np.stack([np.arange(w), top], 1), [[w, h], [0, h]]]).astype(np.int32)], colour)
    for _ in range(rng.integers(0, 8)):
        x, y, length = rng.integers(0, w), rng.integers(h // 4, h), rng.integers(w // 20, w // 4)
        cv2.rectangle(image, (int(x), int(y)), (int(x + length), int(y + h // 30)), rng.choice(colours).tolist(), -1)
    return image


def corridor(rng, h, w, colours):
    """First person: textured floor, ceiling and walls in perspective, dark with distance. Drawn at half size, enlarged."""
    hh, hw = h // 2, w // 2
    texture = np.stack([cv2.resize(tile(rng, 64, rng.permutation(colours)), (64, 64)) for _ in range(3)])
    texture = np.clip(texture * rng.uniform(0.6, 1.2, (3, 64, 64, 1)), 0, 255)
    x, y = np.linspace(-1, 1, hw, dtype=np.float32)[None], np.linspace(-0.6, 0.6, hh, dtype=np.float32)[:, None] - rng.uniform(-0.1, 0.1)
    bends = np.sort(rng.uniform(-1, 1, 6))
    depth = np.interp(x, bends, rng.uniform(0.7, 6, 6)).astype(np.float32)       # the wall's distance by column
    flat = 0.5 / np.maximum(np.abs(y), 1e-3)                                     # where the ray meets floor or ceiling
    wall = depth < flat
    distance = np.where(wall, depth, flat)
    u = np.where(wall, x * 3 + depth, x * distance) * 48 + rng.integers(0, 64)
    v = np.where(wall, y * depth + 0.5, distance) * 63
    which = np.where(wall, 0, np.where(y > 0, 1, 2))
    shade = np.clip(rng.uniform(0.8, 2.5) / (0.5 + distance), 0, 1.3)[..., None]
    return cv2.resize(np.clip(texture[which, v.astype(int) % 64, u.astype(int) % 64] * shade, 0, 255).astype(np.uint8), (w, h))


def road(rng, h, w, colours):
    """A racing game: sky, a winding road with kerbs and centre line, striped grass."""
    image = ramp(np.linspace(0, 1, h, dtype=np.float32)[:, None] * np.ones((1, w), np.float32), colours[:2])
    horizon = int(h * rng.uniform(0.3, 0.6))
    z = 1 / np.linspace(0.02, 1, h - horizon, dtype=np.float32)[:, None]
    side = np.abs(np.linspace(-1, 1, w, dtype=np.float32)[None] - 0.02 * rng.normal() * z) * z
    stripe = (np.sin(z * rng.uniform(2, 8) + rng.uniform(0, 6)) > 0).astype(int)
    image[horizon:] = colours[np.select([side < 0.03, side < 0.7, side < 0.8], [2 + stripe, 4, 5 - stripe], stripe)]
    return image


def starfield(rng, h, w, colours):
    """Space or night: a dark ground, stars of several sizes, a planet with a ring."""
    image = ramp(clouds(rng, h, w, 4) * rng.uniform(0.1, 0.5), np.vstack([[[0, 0, 0]], colours[:2]]))
    for x, y, r in zip(rng.integers(0, w, 120), rng.integers(0, h, 120), rng.choice([0, 0, 0, 1, 2], 120), strict=True):
        cv2.circle(image, (int(x), int(y)), int(r), rng.choice(colours).tolist(), -1)
    centre, r = (int(rng.integers(0, w)), int(rng.integers(0, h))), int(rng.integers(h // 20, h // 4))
    cv2.circle(image, centre, r, colours[3].tolist(), -1, cv2.LINE_AA)
    cv2.ellipse(image, centre, (int(r * 1.7), r // 3), float(rng.uniform(-40, 40)), 0, 360, colours[4].tolist(), 2, cv2.LINE_AA)
    return image


def terrain(rng, h, w, colours):
    """Seen from above or close by: grass, rock, water; noise at several octaves, smooth or in few flat colours."""
    x = clouds(rng, h, w, int(rng.integers(2, 8)), smooth=rng.random() < 0.7)
    return ramp(np.floor(x * 6) / 6 if rng.random() < 0.4 else x, colours)


def menu(rng, h, w, colours):
    """A dialogue or inventory: panels with borders, slots in a grid, lines of text."""
    image = ramp(np.linspace(0, 1, w, dtype=np.float32)[None] * np.ones((h, 1), np.float32), colours[:2])
    for _ in range(rng.integers(1, 5)):
        x, y = int(rng.integers(0, w)), int(rng.integers(0, h))
        s, rows, columns = int(rng.integers(h // 20, h // 6)), rng.integers(1, 6), rng.integers(1, 8)
        cv2.rectangle(image, (x - s // 2, y - s // 2), (int(x + s * columns), int(y + s * rows)), colours[2].tolist(), -1)
        for i, j in np.ndindex(rows, columns):
            cv2.rectangle(image, (x + s * j, y + s * i), (x + s * j + s * 3 // 4, y + s * i + s * 3 // 4), colours[3].tolist(), int(rng.choice([-1, 1, 2])))
    return image


def marks(rng, image, colours):
    """Draw, in place, what lies over games: sprites, text, bars, rings, crosses, keys. Like buttons, but no pad."""
    h, w = image.shape[:2]
    for kind in rng.integers(0, 8, rng.integers(0, 30)):
        x, y, s = int(rng.integers(0, w)), int(rng.integers(0, h)), int(h * rng.choice([0.02, 0.04, 0.06, 0.12]) + 4)
        colour, other, fill = rng.choice(colours).tolist(), rng.choice(colours).tolist(), int(rng.choice([-1, 1, 2, 3]))
        word = "".join(rng.choice(list("ABXYLRZ0123456789:%HPSCORELVTIMEGAMEOVER "), rng.integers(1, 12)))
        if kind < 2:
            art, mask = pixel_art(rng, s, colours)
            spot = image[y:y + s, x:x + s]
            mask = mask[:spot.shape[0], :spot.shape[1]]
            spot[mask] = art[:spot.shape[0], :spot.shape[1]][mask]
        elif kind == 2:
            cv2.putText(image, word, (x, y), int(rng.integers(0, 8)), s / 30, colour, max(fill, 1), cv2.LINE_AA)
        elif kind == 3:
            cv2.rectangle(image, (x, y), (x + 5 * s, y + s // 2), other, -1)
            cv2.rectangle(image, (x + 2, y + 2), (x + int(5 * s * rng.random()), y + s // 2 - 2), colour, -1)
        elif kind == 4:
            cv2.circle(image, (x, y), s // 2, colour, fill, cv2.LINE_AA)
            cv2.putText(image, word[0], (x - s // 4, y + s // 4), 0, s / 40, other, 1, cv2.LINE_AA)
        elif kind == 5:
            cv2.line(image, (x - s, y), (x + s, y), colour, max(s // 3, 1))
            cv2.line(image, (x, y - s), (x, y + s), colour, max(s // 3, 1))
        elif kind == 6:
            for i in range(rng.integers(1, 8)):
                cv2.rectangle(image, (x + i * s, y), (x + i * s + s * 4 // 5, y + s * 4 // 5), colour, fill)
                cv2.putText(image, word[i % len(word)], (x + i * s + s // 5, y + s * 3 // 5), 0, s / 45, other, 1, cv2.LINE_AA)
        else:
            corners = np.array([x, y]) + rng.normal(0, s, (rng.integers(3, 7), 2))
            cv2.fillPoly(image, [corners.astype(np.int32)], colour, cv2.LINE_AA)


def backdrop(rng, h, w):
    """A random picture that could be a game's, uint8 (h, w, 3): one of seven scenes, marks on it, then a camera's faults."""
    colours = palette(rng, 6)
    scene = (tiles, landscape, corridor, road, starfield, terrain, menu)[rng.integers(7)]
    coarse = int(rng.choice([1, 1, 1, 2, 4]))                                    # old consoles: large pixels
    image = scene(rng, max(h // coarse, 32), max(w // coarse, 32), colours)
    if rng.random() < 0.3:                                                       # uneven light
        image = cv2.convertScaleAbs(image * (0.4 + clouds(rng, *image.shape[:2], 2)[..., None]))
    marks(rng, image, np.vstack([colours, palette(rng, 3), [[255, 255, 255], [0, 0, 0]]]).astype(np.uint8))
    image = cv2.resize(image, (w, h), interpolation=cv2.INTER_NEAREST if rng.random() < 0.7 else cv2.INTER_LINEAR)
    if rng.random() < 0.3:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 2.5))
    if rng.random() < 0.2:
        image = cv2.add(image, rng.integers(0, 30, (h, w, 1), np.uint8).repeat(3, 2))
    return cv2.convertScaleAbs(image, alpha=rng.uniform(0.5, 1.2), beta=rng.uniform(0, 40))


# ------------------------------------------------------------------------------------------------------------- video in and out
VIDEO_ENDINGS = {".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".flv", ".ts", ".mpg", ".mpeg", ".wmv", ".ogv", ".gif"}


def open_video(path):
    """cv2.VideoCapture of a file with at least one picture stream; UserError otherwise."""
    path = Path(unicode(path))
    if not path.is_file():
        raise UserError(f"{path}: expected a video file, found {'a folder' if path.is_dir() else 'nothing there'}: check the path")
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    if not capture.isOpened() or capture.get(cv2.CAP_PROP_FRAME_WIDTH) < 1:
        raise UserError(f"{path}: expected a video, found no picture stream in it (sound only, cut off or another kind of file): download it again")
    return capture


def video_info(path):
    """A video's describe()."""
    return describe(open_video(path))


def describe(capture):
    """What an open capture's container says: {"fps" (30 where it says none), "size": (w, h), "n": frames, which may be wrong or 0}."""
    fps, n = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
    size = int(capture.get(cv2.CAP_PROP_FRAME_WIDTH)), int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
    return {"fps": float(fps) if 1 <= fps <= 1000 else 30.0, "size": size, "n": max(int(n), 0) if n < 1e9 else 0}


def presented(capture):
    """Grab the frames of an open capture one by one, yielding each one's presentation time in milliseconds; capture.retrieve() then has its picture."""
    while capture.grab():
        yield capture.get(cv2.CAP_PROP_POS_MSEC)


def slots(times, fps):
    """Constant rate from presentation times in milliseconds: yields, for each of them, how many rows of the clip its frame fills.

    1 for every frame of a constant-rate video; 0 drops a frame, 2 or more repeat it, so that row i is what was seen at i / fps.
    """
    start, filled = None, 0
    for time_ms in times:
        start = time_ms if start is None else start
        due = int(np.floor((time_ms - start) * fps / 1000 + 0.5)) + 1 if time_ms > start else filled + 1
        count = max(due - filled, 0) if abs(due - filled) < fps * 10 else 1                  # a jump of 10 s is a broken clock, not a pause
        filled += count
        yield count


def decode(path, first=0):
    """Decode once, in order: yields (row number, from `first` on, uint8 (h, w, 3) BGR as OpenCV gives it, number of rows it fills)."""
    capture, row = open_video(path), 0
    for count in slots(presented(capture), describe(capture)["fps"]):
        if count and row >= first:
            ok, bgr = capture.retrieve()
            if not ok:
                return
            yield row, bgr, count
        row += count


def read_video(path):
    """Yields (row number, uint8 (h, w, 3) RGB) at the constant rate video_info(path)["fps"]."""
    for row, bgr, count in decode(path):
        rgb = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
        for k in range(count):
            yield row + k, rgb


class VideoWriter:
    """Write RGB frames of `size` (w, h) to .mp4 (mp4v), .webm (VP9, which browsers play) or .avi (MJPEG); the file gets its name when closed."""

    def __init__(self, path, fps, size):
        self.path = Path(path)
        codec = {".mp4": "mp4v", ".webm": "VP90", ".avi": "MJPG"}.get(self.path.suffix.lower())
        if codec is None:
            raise UserError(f"{path}: expected a name ending in .mp4, .webm or .avi: give another --out")
        writable(path)
        self.tmp, self.n = temporary(path), 0
        self.writer = cv2.VideoWriter(str(self.tmp), cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*codec), fps, tuple(size))
        if not self.writer.isOpened():
            remove(self.tmp)
            raise UserError(f"{path}: can't open a {codec} encoder for {tuple(size)} at {fps} frames/s: try a name ending in .avi")

    def add(self, rgb):
        """Append one uint8 (h, w, 3) RGB frame."""
        self.writer.write(cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))
        self.n += 1

    def close(self):
        """Finish the file and give it its name; UserError where not all frames are in it: OpenCV's writer is
        silent on a full disk."""
        self.writer.release()
        capture, found = cv2.VideoCapture(str(self.tmp), cv2.CAP_FFMPEG), 0
        while capture.grab():
            found += 1
        capture.release()
        if found != self.n:
            remove(self.tmp)
            raise UserError(f"{self.path}: expected {self.n} frames in the finished video, found {found}: "
                            "make room on its disk")
        sync(self.tmp)
        os.replace(self.tmp, self.path)

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace):
        if kind is None:
            self.close()
        else:
            self.writer.release()
            remove(self.tmp)


# --------------------------------------------------------------------------------------------------------------- the clip folder
QUALITY = 90                                       # JPEG: about 1-2 GB an hour of 256 x 256 frames at 30 a second, 2,000 decodes a second a core
REDO = "delete the clip folder and run its stage again"


class FramesWriter:
    """JPEGs back to back in NAME.npy, uint8 (bytes,), with NAME_index.npy, int64 (m+1, 2): [row number, byte offset], last [n, total]."""

    def __init__(self, folder, name, quality=QUALITY):
        self.path, self.index_path, self.quality = Path(folder) / f"{name}.npy", Path(folder) / f"{name}_index.npy", quality
        self.tmp, self.index, self.total = temporary(self.path), [], 0
        self.file = open(self.tmp, "wb")
        self._header()

    def _header(self):
        np.lib.format.write_array_header_1_0(self.file, {"descr": "|u1", "fortran_order": False, "shape": (self.total,)})

    def encode(self, bgr):
        """uint8 (h, w, 3) BGR -> JPEG bytes, uint8 (k,)."""
        return cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, self.quality])[1].ravel()

    def add(self, number, rgb):
        """Append one RGB frame as row `number`."""
        self.add_bytes(number, self.encode(cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR)))

    def add_bytes(self, number, jpeg):
        """Append one encoded frame as row `number`."""
        self.index.append((number, self.total))
        self.file.write(jpeg)
        self.total += len(jpeg)

    def close(self, n):
        """Finish both files for a clip of n rows and give them their names."""
        self.file.seek(0)
        self._header()                                          # numpy pads headers, so that a longer shape fits in the same place
        self.file.close()
        sync(self.tmp)
        index = np.array([*self.index, (n, self.total)], np.int64)
        os.replace(self.tmp, self.path)
        write_npy(self.index_path, index)


def write_npy(path, array):
    """np.save, atomically. Through memory: numpy's own writing is silent on a full disk."""
    file = io.BytesIO()
    np.save(file, array)
    write_atomic(path, lambda tmp: tmp.write_bytes(file.getbuffer()))


def read_npy(path, dtype, dims):
    """A memory-mapped .npy of a given dtype and number of dimensions; UserError names the file."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path}: expected this file of the clip, found none: run the stage that makes it again") from None
    except Exception as e:                                                       # numpy's readers of headers and archives raise what they like
        raise UserError(f"{path}: expected a whole .npy file, found {' '.join(str(e).split())[:200]}: {REDO}") from None
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path}: expected a .npy file, found an archive of them: {REDO}")
    if array.dtype != dtype or array.ndim != dims:
        raise UserError(f"{path}: expected {np.dtype(dtype)} with {dims} dimensions, found {array.dtype} {array.shape}: {REDO}")
    return array


def check_actions(path, actions, n):
    """UserError where the array of `path` does not hold n actions: float (n, 25), buttons in 0..1, sticks in -1..1."""
    if actions.shape != (n, A):
        raise UserError(f"{path}: expected {n} x {A}, one row a video frame, found {actions.shape}: delete it and run its stage again")
    bad = out_of_range(actions)
    if bad:
        raise UserError(f"{path}: expected buttons in 0..1 and sticks in -1..1, found {bad}: "
                        "run its stage again or delete the clip")


def out_of_range(actions):
    """What is wrong with the values of actions, float (n, 25), in words; "" where nothing is."""
    low, high = (actions.min(0), actions.max(0)) if len(actions) else (np.zeros(A),) * 2   # NaN stays NaN
    if (low >= [0] * len(BUTTONS) + [-1.001] * 4).all() and (high <= 1.001).all():
        return ""
    bad = int(np.flatnonzero(~((actions[:, :-4] >= 0).all(1) & (np.abs(actions) <= 1.001).all(1)))[0])
    return f"{'NaN' if np.isnan(actions[bad]).any() else 'others'} in row {bad}"


class Frames:
    """Random access to the JPEGs of a clip: len(frames), frames[i] -> uint8 (h, w, 3) RGB, frames.numbers -> int64 (m,) rows of the clip."""

    def __init__(self, folder, name="frames"):
        self.path = Path(folder) / f"{name}.npy"
        self.data = read_npy(self.path, np.uint8, 1)
        index = np.array(read_npy(self.path.with_name(f"{name}_index.npy"), np.int64, 2))
        rises = index.shape[1:] == (2,) and len(index) and (index[0] >= 0).all() and (np.diff(index, axis=0) >= 0).all()
        if not rises or index[-1, 1] != len(self.data) or (index[:-1, 0] >= index[-1, 0]).any():
            raise UserError(f"{self.path}: expected an index that fits its {len(self.data)} bytes and rises, found another: {REDO}")
        self.numbers, self.offsets, self.n, self.shape = index[:-1, 0], index[:, 1], int(index[-1, 0]), None

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, i):
        return self.read(i)

    def read(self, i, out=None):
        """frames[i], decoded into `out`, uint8 (h, w, 3) in one piece, where that is given and of the frame's size."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        jpeg = np.asarray(self.data[self.offsets[i]:self.offsets[i + 1]])
        bgr = decode_picture(jpeg, cv2.IMREAD_COLOR)
        if bgr is None:
            raise UserError(f"{self.path}: expected a JPEG as frame {i}, found broken bytes: {REDO}")
        self.shape = self.shape or bgr.shape
        if bgr.shape != self.shape:
            raise UserError(f"{self.path}: expected frames of one size, {self.shape[:2]}, found {bgr.shape[:2]} as frame {i}: {REDO}")
        return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB, dst=out)


def read_clip(folder):
    """clip.json of a clip folder as a dict; "fps" is a number in it."""
    clip = read_json(Path(folder) / "clip.json", dict)
    fps = clip.get("fps")
    if type(fps) not in (int, float) or not 1 <= fps <= 1000:
        raise UserError(f"{folder}: expected 1 to 1000 frames a second as \"fps\" in clip.json, found {str(fps)[:20]}: mend it or delete the clip")
    return clip


def clips_in(data):
    """The whole clip folders under DATA, sorted by name, or DATA itself where it is one; UserError when there is none."""
    data = Path(data)
    folders = sorted(p.parent for p in data.glob("*/clip.json") if not p.parent.name.startswith(".tmp-"))
    if (data / "clip.json").is_file():
        folders = [data]
    if not folders:
        raise UserError(f"{data}: expected a folder of clips (each with clip.json), found none: make them with extract.py or play.py --record")
    return list(map(unicode, folders))


def rank_and_world():
    """(number of this process, how many there are) under torchrun (RANK, WORLD_SIZE) or srun (SLURM_PROCID, SLURM_NTASKS); (0, 1) alone."""
    for rank, world in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if rank in os.environ and world in os.environ:
            return int(os.environ[rank]), int(os.environ[world])
    return 0, 1


def shard(items):
    """This process's share of a list of work."""
    rank, world = rank_and_world()
    return list(items)[rank::world]


def cores():
    """The cores this process may use: a cluster's job is often given fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --------------------------------------------------------------------------------------------------------------------- messages
# sample.py serve and play.py's Client exchange frames of multiprocessing.connection, as bytes (send_bytes, recv_bytes), never as pickles.
# One message = a JSON object, a newline, and the raw C-order bytes of the array that its "shape" and "dtype" describe, if any.
#   {"do": "info"} -> {...}      {"do": "reset", "seed": 0, "game": "celeste"} -> {}      (seed and game may be left out)
#   {"do": "predict", "shape": [h, w, 3], "dtype": "uint8"} + pixels -> {"shape": [T, 25], "dtype": "float32"} + actions
# A request that can't be served is answered by {"error": "why"}.
MESSAGE_LIMIT = 32 << 20                           # bytes: a 4K frame is 25 MB


def pack_message(header, array=None):
    """A JSON object and, if given, a uint8 or float32 array -> bytes."""
    if array is None:
        return json.dumps(header).encode() + b"\n"
    return json.dumps({**header, "shape": array.shape, "dtype": array.dtype.name}).encode() + b"\n" + np.ascontiguousarray(array).tobytes()


def unpack_message(message):
    """bytes -> (header, array or None). ValueError says what is wrong with bytes that nobody vouches for."""
    head, newline, _ = message[:4096].partition(b"\n")
    try:
        header = json.loads(head) if newline else None
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise ValueError("expected a JSON object and a newline in the first 4096 bytes")
    body = message[len(head) + 1:]
    shape, dtype = header.get("shape"), header.get("dtype")
    if shape is None and not body:
        return header, None
    if dtype not in ("uint8", "float32") or not isinstance(shape, list) or not 1 <= len(shape) <= 4 or any(type(n) is not int or n < 1 for n in shape):
        raise ValueError("expected a shape of 1 to 4 positive numbers and a dtype uint8 or float32 with the bytes")
    if math.prod(shape) * np.dtype(dtype).itemsize != len(body):
        raise ValueError(f"shape {shape} of {dtype} is not {len(body)} bytes")
    return header, np.frombuffer(body, dtype).reshape(shape)


# ------------------------------------------------------------------------------------------- XFeat (arXiv 2404.19174), by hand

def xfeat_net():
    """The network of XFeat (arXiv 2404.19174, Sec. 3.1-3.2), 658 k parameters, with the official parameter names; untrained."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    def basic(i, o, kernel=3, stride=1):
        """Convolution, batch norm without affine, ReLU; named .layer.0, .layer.1 as in the release."""
        conv = nn.Conv2d(i, o, kernel, stride, kernel // 2, bias=False)
        return nn.Sequential(OrderedDict(layer=nn.Sequential(conv, nn.BatchNorm2d(o, affine=False), nn.ReLU(inplace=True))))

    class XFeat(nn.Module):
        def __init__(self):
            super().__init__()
            self.skip1 = nn.Sequential(nn.AvgPool2d(4, 4), nn.Conv2d(1, 24, 1))
            self.block1 = nn.Sequential(basic(1, 4), basic(4, 8, stride=2), basic(8, 8), basic(8, 24, stride=2))
            self.block2 = nn.Sequential(basic(24, 24), basic(24, 24))
            self.block3 = nn.Sequential(basic(24, 64, stride=2), basic(64, 64), basic(64, 64, 1))
            self.block4 = nn.Sequential(basic(64, 64, stride=2), basic(64, 64), basic(64, 64))
            self.block5 = nn.Sequential(basic(64, 128, stride=2), basic(128, 128), basic(128, 128), basic(128, 64, 1))
            self.block_fusion = nn.Sequential(basic(64, 64), basic(64, 64), nn.Conv2d(64, 64, 1))
            self.heatmap_head = nn.Sequential(basic(64, 64, 1), basic(64, 64, 1), nn.Conv2d(64, 1, 1), nn.Sigmoid())
            self.keypoint_head = nn.Sequential(basic(64, 64, 1), basic(64, 64, 1), basic(64, 64, 1), nn.Conv2d(64, 65, 1))

        def maps(self, x):
            """Normed grey image (B, 1, H, W) -> unit descriptors (B, 64, H/8, W/8), keypoint logits (B, 65, H/8, W/8: the 64
            pixels of each cell and "none"), reliability (B, 1, H/8, W/8)."""
            x2 = self.block2(self.block1(x) + self.skip1(x))                     # (B, 24, H/4, W/4)
            x3 = self.block3(x2)                                                 # (B, 64, H/8, W/8)
            x4 = self.block4(x3)                                                 # (B, 64, H/16, W/16)
            x5 = self.block5(x4)                                                 # (B, 64, H/32, W/32)
            wide = [F.interpolate(deep, x3.shape[2:], mode="bilinear") for deep in (x4, x5)]
            features = self.block_fusion(x3 + wide[0] + wide[1])
            return F.normalize(features, dim=1), self.keypoint_head(F.pixel_unshuffle(x, 8)), self.heatmap_head(features)

        def forward(self, x):
            """Grey image (B, 1, H, W) of any range, H and W multiples of 32 -> what heads() returns."""
            return self.maps(F.instance_norm(x))

    return XFeat().to(memory_format=torch.channels_last)


def load_xfeat(path=None):
    """A trained network: ours (weights/xfeat.safetensors beside this script) or the official xfeat.pt, by name."""
    import torch
    from safetensors.torch import load_file
    path = Path(path or Path(__file__).parent / "weights" / "xfeat.safetensors")
    expected = f"expected XFeat weights (ours, or the official xfeat.pt), found {path}"
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
        state = {k: v.float() if v.is_floating_point() else v for k, v in state.items() if not k.startswith("fine_matcher.")}
    except FileNotFoundError:
        raise UserError(f"{expected}, which isn't there: check the path") from None
    except Exception as e:                                                       # whatever the two unpicklers raise for other files
        raise UserError(f"{expected}, which is no weights file ({type(e).__name__}): give another --xfeat") from None
    net = xfeat_net()
    wrong = sorted(k for k in net.state_dict().keys() | state.keys()
                   if k not in state or k not in net.state_dict() or state[k].shape != net.state_dict()[k].shape)
    if wrong:
        raise UserError(f"{expected}, where {len(wrong)} names or shapes differ, first {wrong[0]}: give another --xfeat")
    net.load_state_dict(state)
    return fused(net.eval())


def fused(net):
    """The same function with every batch norm folded into the convolution before it: a fifth faster."""
    from torch import nn
    from torch.nn.utils.fusion import fuse_conv_bn_eval
    for block in net.modules():
        if isinstance(block, nn.Sequential) and len(block) > 1 and isinstance(block[1], nn.BatchNorm2d):
            block[0], block[1] = fuse_conv_bn_eval(block[0], block[1]), nn.Identity()
    return net


def keypoint_scores(logits):
    """Keypoint logits (B, 65, h, w) -> probability of a keypoint at each pixel (B, 1, 8h, 8w): softmax over the cell's 64
    pixels and "none", which is dropped."""
    import torch.nn.functional as F
    return F.pixel_shuffle(logits.softmax(1)[:, :64], 8)


def peaks(scores, threshold=0.05):
    """Local maxima of scores, float32 (H, W), in 5 x 5 windows, above the release's threshold: int64 (k, 2) x, y."""
    best = (scores == cv2.dilate(scores, np.ones((5, 5), np.uint8))) & (scores > threshold)
    return np.argwhere(best)[:, ::-1].copy()


def sample(maps, points, size, mode):
    """maps (1, C, h, w) at points (k, 2) in pixels of an image of size (H, W) -> (k, C). Normalised by W - 1 but without
    align_corners, as in the release."""
    import torch
    import torch.nn.functional as F
    h, w = size
    grid = 2 * points.float() / torch.tensor([w - 1, h - 1], dtype=torch.float32) - 1
    return F.grid_sample(maps, grid[None, None], mode=mode, align_corners=False)[0, :, 0].T


def xfeat(net, image, top_k=4096):
    """Features of an RGB or grey uint8 image -> keypoints float32 (k, 2) x, y in its pixels, scores (k,), descriptors (k, 64)
    of length 1; the best k <= top_k first. Score = keypoint probability x reliability (arXiv 2404.19174, Sec. 3.2)."""
    import torch
    import torch.nn.functional as F
    x = torch.from_numpy(np.ascontiguousarray(image)).float().reshape(*image.shape[:2], -1).mean(2)[None, None] / 255
    h, w = (max(n // 32, 1) * 32 for n in image.shape[:2])
    with torch.inference_mode():
        x = F.interpolate(x, (h, w), mode="bilinear")
        descriptors, logits, reliability = net(x)
        heat = keypoint_scores(logits)
        points = torch.from_numpy(peaks(heat[0, 0].numpy()))
        scores = (sample(heat, points, (h, w), "nearest") * sample(reliability, points, (h, w), "bilinear"))[:, 0]
        order = scores.argsort(descending=True, stable=True)[:top_k]
        order = order[scores[order] > 0]
        found = F.normalize(sample(descriptors, points[order], (h, w), "bicubic"), dim=1)
    scale = np.float32([image.shape[1] / w, image.shape[0] / h])
    return points[order].float().numpy() * scale, scores[order].numpy(), found.numpy()


# ------------------------------------------------------------------------------------------------- localisation (section 3.1)
SAMPLES, MIN_INLIERS = 25, 20                      # [P]: 25 frames a video, accept from 20 inliers on
MIN_PLACE = 5                                      # of the sampled frames without the overlay, so many are looked through for a second place
TEMPLATE_WIDTH = 400                               # templates and views are brought to these widths: overlays are 10-30 % of a frame's width
VIEWS = {"sift": ((1920, 4096),), "xfeat": ((2560, 4096), (1280, 2048))}      # (width, strongest features kept)
TEMPLATE_FEATURES = 600
COARSE_FEATURES, FINALISTS = 96, 10                # many templates: a first round with few features, a full one over the best
MIN_COSINE, RATIO, PIXELS = 0.7, 0.8, 3.0          # XFeat: cosine of a mutual match; SIFT: ratio test; RANSAC tolerance in pixels of the larger view
MIN_EDGES = 0.30                                   # agreement of edge directions at the pose found: true poses measure 0.5-0.95, false ones below 0.2


def sample_frames(path, n=SAMPLES):
    """At most n frames spread over a video -> (list of uint8 (h, w) grey, the same in colour as uint8 (h', w', 3) BGR, 640 wide at most)."""
    capture, kept = open_video(path), []
    total = describe(capture)["n"]
    if total > 100 * n:                                              # a seek costs the decoding of half a group of pictures, some 100 frames
        for number in np.linspace(0, total - 1, n + 2)[1:-1].astype(int):
            capture.set(cv2.CAP_PROP_POS_FRAMES, int(number))
            ok, bgr = capture.read()
            if ok:
                kept.append(grey_and_small(bgr))
    if not kept or len(kept) < n // 2:                               # a short video, or one without an index to seek by: read it through
        kept = read_through(open_video(path), n, max(total // n, 1))
    if not kept:
        raise UserError(f"{path}: expected a video with frames, found none that decode: download it again")
    return [grey for grey, _ in kept], [small for _, small in kept]


def read_through(capture, n, stride):
    """n (fewer of a shorter video) frames spread over all of an open capture, decoded in order -> list of grey_and_small()."""
    kept, number = [], 0
    while capture.grab():
        if number % stride == 0:                                     # every stride-th frame; twice too many -> every second of them
            ok, bgr = capture.retrieve()
            if ok:
                kept.append(grey_and_small(bgr))
            if len(kept) > 2 * n:
                kept, stride = kept[::2], stride * 2
        number += 1
    return [kept[i] for i in np.unique(np.linspace(0, len(kept) - 1, n).round().astype(int))] if kept else []


def grey_and_small(bgr):
    """A frame as localise() wants it, and in colour for recolour()."""
    scale = min(640 / bgr.shape[1], 1)
    return cv2.cvtColor(bgr, cv2.COLOR_BGR2GRAY), cv2.resize(bgr, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)


def median_image(frames):
    """Per-pixel median over time: what stands still (the overlay) stays, what moves (the game) blurs. uint8 like the frames."""
    stack, out = np.stack(frames), np.empty_like(frames[0])
    for top in range(0, out.shape[0], 32):
        rows = stack[:, top:top + 32]
        out[top:top + 32] = np.partition(rows, len(frames) // 2, axis=0)[len(frames) // 2]
    return out


def flat_template(skin, width=TEMPLATE_WIDTH):
    """A skin at rest over mid-grey -> (uint8 (h, width) grey, scale from template pixels)."""
    rgba = draw(skin)
    scale = width / rgba.shape[1]
    rgba = cv2.resize(rgba, (width, max(round(rgba.shape[0] * scale), 1)), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    alpha = rgba[..., 3:] / 255.0
    return cv2.cvtColor((rgba[..., :3] * alpha + 127 * (1 - alpha)).astype(np.uint8), cv2.COLOR_RGB2GRAY), scale


def sift_features(gray, limit):
    """RootSIFT of a grey uint8 picture: points float32 (k, 2), descriptors float32 (k, 128) of length 1, strongest first."""
    points, descriptors = cv2.SIFT_create(limit, contrastThreshold=0.02).detectAndCompute(gray, None)
    if not points:
        return np.zeros((0, 2), np.float32), np.zeros((0, 128), np.float32)
    order = np.argsort([-p.response for p in points], kind="stable")[:limit]
    descriptors = np.sqrt(descriptors / np.maximum(descriptors.sum(1, keepdims=True), 1e-9))
    return np.float32([points[i].pt for i in order]), descriptors[order].astype(np.float32)


class Matcher:
    """Finds templates in pictures. kinds: which of "sift" and "xfeat"; features of the templates are kept in the file `cache`."""

    def __init__(self, skins, kinds, net=None, cache=None):
        self.skins, self.kinds, self.net, self.lender = skins, kinds, net, None              # lender: see geometry_of()
        self.flats = [flat_template(s) for s in skins]
        weights = [] if net is None else [p.detach().numpy() for p in net.parameters()]
        key = fingerprint(*(flat for flat, _ in self.flats), *kinds, *weights)
        self.features = self._load(cache, key) or self._compute(cache, key)

    def _load(self, cache, key):
        if cache is None or not Path(cache).exists():
            return None
        try:
            with np.load(cache, allow_pickle=False) as file:
                if str(file["key"]) != key:
                    return None
                return [{kind: (file[f"{i}.{kind}.points"], file[f"{i}.{kind}.descriptors"]) for kind in self.kinds} for i in range(len(self.skins))]
        except Exception:                                           # whatever zip files raise: a broken cache is only a slower start
            return None

    def _compute(self, cache, key):
        """For each template {kind: (points in template pixels, descriptors)}; kept in the file `cache`."""
        found, arrays = [], {}
        for i, (flat, scale) in enumerate(self.flats):
            found.append({})
            for kind in self.kinds:
                points, descriptors = self.describe(flat, kind, ((flat.shape[1], TEMPLATE_FEATURES),))
                found[i][kind] = points / scale, descriptors
                arrays |= {f"{i}.{kind}.points": points / scale, f"{i}.{kind}.descriptors": descriptors}

        def write(tmp):
            with open(tmp, "wb") as file:
                np.savez(file, key=key, **arrays)
        if cache is not None:
            write_atomic(cache, write)
        return found

    def describe(self, gray, kind, views):
        """Features of one grey picture brought to each width of views, as in VIEWS -> points (k, 2) in its own pixels, descriptors (k, d)."""
        found = []
        for width, limit in views:
            scale = width / gray.shape[1]
            size = width, max(round(gray.shape[0] * scale), 32)
            big = gray if scale == 1 else cv2.resize(gray, size, interpolation=cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA)
            points, descriptors = xfeat(self.net, big, limit)[::2] if kind == "xfeat" else sift_features(big, limit)
            found.append(((points + 0.5) / np.float32([scale, size[1] / gray.shape[0]]) - 0.5, descriptors))
        return np.concatenate([p for p, _ in found]).astype(np.float32), np.concatenate([d for _, d in found])

    def shortlist(self, view):
        """Which templates are worth a full look: nearest neighbours of each template's strongest features, all templates in a few products."""
        if len(self.skins) <= 2 * FINALISTS:
            return list(range(len(self.skins)))
        kind = "xfeat" if "xfeat" in view else "sift"
        points, descriptors = view[kind]
        if len(points) < 4:
            return []
        few = [(p[:COARSE_FEATURES], d[:COARSE_FEATURES]) for p, d in (f[kind] for f in self.features)]
        pooled, scores, start = np.concatenate([d for _, d in few]), [], 0
        cosines = [pooled[i:i + 4096] @ descriptors.T for i in range(0, len(pooled), 4096)]
        nearest = np.concatenate([c.argmax(1) for c in cosines])
        good = np.concatenate([c.max(1) for c in cosines]) > MIN_COSINE
        for ours, _ in few:
            chosen = np.arange(start, start + len(ours))[good[start:start + len(ours)]]
            scores.append(consensus(ours[chosen - start], points[nearest[chosen]], 500)[1].sum() if len(chosen) >= 4 else 0)
            start += len(ours)
        return list(np.argsort(scores, kind="stable")[::-1][:FINALISTS])

    def match(self, view, i):
        """Template i's features against a view -> (template points, view points, kind index), each (m, ..)."""
        found = []
        for k, kind in enumerate(view):
            (pt, dt), (pv, dv) = self.features[i][kind], view[kind]
            if len(pt) < 4 or len(pv) < 4:
                continue
            cosine = dt @ dv.T                                                                  # (template k, view k)
            best = cosine.argmax(1)
            rows = np.arange(len(pt))
            top = cosine[rows, best]
            if kind == "xfeat":
                good = (cosine.argmax(0)[best] == rows) & (top > MIN_COSINE)                    # mutual nearest neighbours
            else:
                cosine[rows, best] = -1
                good = 1 - top < RATIO ** 2 * (1 - cosine.max(1))                               # |a - b|^2 = 2 - 2 cos
            found.append((pt[good], pv[best[good]], np.full(good.sum(), k)))
        if not found:
            return np.zeros((0, 2), np.float32), np.zeros((0, 2), np.float32), np.zeros(0, int)
        return tuple(np.concatenate(columns) for columns in zip(*found))

    def search(self, gray, kinds):
        """The plausible poses of templates in one grey picture -> list of Find, best first."""
        view = {kind: self.describe(gray, kind, VIEWS[kind]) for kind in kinds}
        finds = [self.pose(gray, view, i) for i in self.shortlist(view)]
        return sorted((f for f in finds if f), key=lambda f: -f.inliers)

    def pose(self, gray, view, i):
        """RANSAC over one template's matches -> Find, or None where no plausible pose has 4 distinct inliers."""
        ours, theirs, kinds = self.match(view, i)
        if len(ours) < 4:
            return None
        tolerance = PIXELS * gray.shape[1] / VIEWS["xfeat"][1][0]
        affine, inside = consensus(ours, theirs, 3000, tolerance)
        if affine is None or not plausible(affine, self.skins[i].size, gray.shape) or spread(ours[inside], self.skins[i].size) < 4:
            return None
        by = {kind: distinct(ours[inside & (kinds == k)], theirs[inside & (kinds == k)], tolerance) for k, kind in enumerate(view)}
        return Find(i, affine, max(by.values()), by)


def consensus(ours, theirs, rounds, tolerance=PIXELS):
    """RANSAC similarity ours -> theirs -> (affine (2, 3) or None, inlier mask bool (m,)). Seeded: the same points, the same pose."""
    cv2.setRNGSeed(0)
    affine, inside = cv2.estimateAffinePartial2D(ours, theirs, method=cv2.RANSAC, ransacReprojThreshold=tolerance, maxIters=rounds, confidence=0.999)
    return affine, inside[:, 0].astype(bool) if affine is not None else np.zeros(len(ours), bool)


@dataclass
class Find:
    """One template at one pose: affine (2, 3) template pixels -> video pixels; inliers = the better matcher's distinct ones."""
    skin: int
    affine: np.ndarray
    inliers: int
    by: dict                                       # kind of feature -> its distinct inliers
    edges: float = 0.0                             # agreement of edge directions in the picture it was found in, -1..1
    seen: float = 0.0                              # share of the sampled frames in which it stands there
    absent: tuple = ()                             # numbers of those in which it does not
    present: tuple = ()                            # numbers, among all sampled frames, of those in which it does


def plausible(affine, size, shape):
    """Is the pose one that a streamer would choose: upright, 5-60 % of the frame's width, hardly stretched, mostly inside?"""
    (a, b, x), (c, d, y) = affine
    sx, sy = np.hypot(a, c), np.hypot(b, d)
    if not (sx > 0 and sy > 0) or a <= 0 or d <= 0 or max(abs(c / sx), abs(b / sy)) > np.sin(np.radians(4)):
        return False
    w, h = size[0] * sx, size[1] * sy
    inside = max(0, min(x + w, shape[1]) - max(x, 0)) * max(0, min(y + h, shape[0]) - max(y, 0))
    return 0.05 * shape[1] <= w <= 0.6 * max(shape[:2]) and 0.6 <= sx / sy <= 1.7 and inside >= 0.6 * w * h


def distinct(ours, theirs, tolerance):
    """How many inliers are truly different points on both sides: many template points on one frame point are a collapsed fit."""
    if not len(ours):
        return 0
    return min(len(np.unique((p / max(tolerance / 2, 1)).round(), axis=0)) for p in (ours / 2, theirs))


def spread(points, size):
    """How many cells of a 4 x 3 grid over the template hold inliers: a logo or one letter fills one or two."""
    cells = np.clip((points / np.float32(size) * (4, 3)).astype(int), 0, (3, 2))
    return len(np.unique(cells, axis=0))


def fingerprint(*parts):
    """A short hash of arrays, numbers and strings."""
    digest = hashlib.sha1()
    for part in parts:
        digest.update(np.ascontiguousarray(part).tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
    return digest.hexdigest()[:16]


def edge_agreement(gray, flat, affine):
    """Do the template's edges run along edges of the picture? Mean cos(2 angle between gradients), weighted by the template's gradient: 1 = all
    parallel (either polarity: backgrounds and colour variants may invert it), 0 = chance. gray uint8 (h, w), flat = flat_template()."""
    flat, scale = flat
    x0, y0, x1, y1 = pose_box(affine, (flat.shape[1] / scale, flat.shape[0] / scale))
    x0, y0, x1, y1 = max(int(x0) - 2, 0), max(int(y0) - 2, 0), min(int(x1) + 3, gray.shape[1]), min(int(y1) + 3, gray.shape[0])
    if x1 - x0 < 16 or y1 - y0 < 16:
        return 0.0
    to_video = np.array(affine, np.float64) @ np.array([[1 / scale, 0, 0], [0, 1 / scale, 0], [0, 0, 1]])
    to_video[:, 2] -= (x0, y0)
    blur = max(0.45 / max(np.hypot(to_video[0, 0], to_video[1, 0]), 0.05) - 0.45, 0.01)              # what shrinking by this much would blur
    soft = cv2.GaussianBlur(flat.astype(np.float32), (0, 0), blur)
    template = cv2.warpAffine(soft, to_video, (x1 - x0, y1 - y0), flags=cv2.INTER_LINEAR, borderValue=127)
    seen = cv2.GaussianBlur(gray[y0:y1, x0:x1].astype(np.float32), (0, 0), 0.7)
    (tx, ty), (vx, vy) = gradients(template), gradients(seen)
    weight, strength = np.hypot(tx, ty), np.hypot(vx, vy)
    weight[weight < 0.15 * weight.max()] = 0
    cosine = (tx * vx + ty * vy) / np.maximum(weight * strength, 1e-6)
    return float((weight * (2 * cosine ** 2 - 1) * np.clip(strength / 12, 0, 1)).sum() / max(weight.sum(), 1e-6))


def gradients(image):
    """Sobel derivatives (x, y) of a float32 picture."""
    return cv2.Sobel(image, cv2.CV_32F, 1, 0), cv2.Sobel(image, cv2.CV_32F, 0, 1)


def pose_box(affine, size):
    """[x0, y0, x1, y1] in video pixels of a template's canvas of `size` under `affine`."""
    corners = np.array([[0, 0, 1], [size[0], 0, 1], [0, size[1], 1], [size[0], size[1], 1]]) @ np.array(affine).T
    return [*corners.min(0), *corners.max(0)]


def refine(gray, flat, affine):
    """Sub-pixel pose: hill-climb edge agreement over shift, then scale of both axes, in steps down to 1/16 pixel at the pad's edge -> (affine, edges)."""
    affine = np.array(affine, np.float64)
    affine[0, 1] = affine[1, 0] = 0                                                                 # overlays stand upright
    w, h = flat[0].shape[1] / flat[1], flat[0].shape[0] / flat[1]
    best = edge_agreement(gray, flat, affine)
    for step in (1.0, 0.5, 0.25, 0.125):
        moves = [(0, 2, step, 0), (1, 2, step, 0), (0, 0, step / w, w / 2), (1, 1, step / h, h / 2)]
        for _ in range(6):
            before = best
            for row, column, size, anchor in moves:
                for sign in (1, -1):
                    trial = affine.copy()
                    trial[row, column] += sign * size
                    trial[row, 2] -= sign * size * anchor                                           # scale about the middle
                    score = edge_agreement(gray, flat, trial)
                    if score > best:
                        affine, best = trial, score
            if best - before < 1e-4:
                break
    return affine, best


def localise(frames, matcher):
    """The overlay in sampled grey frames -> (Find or None, the most inliers of any pose): the median of all first, then of halves, then one frame."""
    n = len(frames)
    groups = [frames, frames[:n // 2], frames[n // 2:], frames[n // 2:n // 2 + 1]]
    best, most = None, 0
    for group in groups[:1] if n < 4 else groups:
        picture = median_image(group)
        kinds = matcher.kinds if group is frames else matcher.kinds[-1:]                     # SIFT adds little where XFeat saw nothing
        finds = matcher.search(picture, kinds)
        if finds:
            most = max(most, finds[0].inliers)
            enough = max(MIN_INLIERS, 0.5 * finds[0].inliers, best.inliers + 1 if best else 0)
            close = [f for f in finds if f.inliers >= enough][:4]
            for find in close:
                find.affine, find.edges = refine(picture, matcher.flats[find.skin], find.affine)
            find = max(close, key=lambda f: f.edges, default=None)                           # colour siblings share corners; their edges tell them apart
            if find:
                there = np.array([edge_agreement(f, matcher.flats[find.skin], find.affine) > 0.5 * find.edges for f in frames])
                find.seen, find.absent = float(there.mean()), tuple(np.flatnonzero(~there))
                if find.edges >= MIN_EDGES and find.seen >= 0.2:                             # stands in at least 5 of 25 frames
                    best = find
        if best and best.inliers >= 1.5 * MIN_INLIERS:
            break
    return best, most


def localise_all(frames, matcher):
    """Every place that the overlay takes in turn (a scene switch moves it): localise, then again in the frames where it was absent
    -> (list of Find, the most inliers of any pose in all frames). A video without an overlay in most of its frames still has one place."""
    places, most, numbers = [], None, list(range(len(frames)))
    while len(numbers) >= (MIN_PLACE if places else 1) and len(places) < 3:
        find, inliers = localise([frames[i] for i in numbers], matcher)
        most = inliers if most is None else most
        if not find or any(overlap(find, p, matcher) > 0.5 for p in places):
            break
        find.present = tuple(n for i, n in enumerate(numbers) if i not in find.absent)
        places.append(find)
        numbers = [numbers[i] for i in find.absent]
    return places, most


def recolour(find, pictures, size, matcher):
    """The number of the skin, of all that share the found one's geometry, whose colours explain the median picture best: features are grey, so templates
    of one shape find each other's overlays in any colour. pictures: the sampled frames, small, uint8 (h, w, 3) BGR; size of the video (w, h).

    A pixel is taken for a mix of template and background: the same share of the template, the overlay's opacity, wherever the template is opaque, and for
    background the mean colour of a frame around the box."""
    shapes = [(skin.family, tuple(skin.size), repr(skin.buttons), repr(skin.sticks)) for skin in matcher.skins]
    siblings = [i for i, shape in enumerate(shapes) if shape == shapes[find.skin]]
    if len(siblings) == 1:
        return find.skin
    picture = median_image([pictures[i] for i in find.present]).astype(np.float32)
    x0, y0, x1, y1 = np.array(pose_box(find.affine, matcher.skins[find.skin].size)) * picture.shape[1] / size[0]
    x0, y0, x1, y1 = max(int(x0), 0), max(int(y0), 0), min(int(x1) + 1, picture.shape[1]), min(int(y1) + 1, picture.shape[0])
    around = np.zeros(picture.shape[:2], bool)
    around[max(y0 - 12, 0):y1 + 12, max(x0 - 12, 0):x1 + 12] = True
    around[y0:y1, x0:x1] = False
    ground = picture[around].mean(0) if around.any() else np.full(3, 127.0)
    seen, unlike = picture[y0:y1, x0:x1] - ground, {}
    for i in siblings:
        rgba = cv2.resize(draw(matcher.skins[i]), (x1 - x0, y1 - y0), interpolation=cv2.INTER_AREA).astype(np.float32)
        full = (rgba[..., 2::-1] - ground) * rgba[..., 3:] / 255                                    # the template at full opacity, less the background
        share = np.clip((seen * full).sum() / max((full * full).sum(), 1), 0.3, 1)
        unlike[i] = ((seen - share * full) ** 2).mean()
    return min(unlike, key=unlike.get)


def overlap(a, b, matcher):
    """Intersection over union of two finds' canvases."""
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = (pose_box(f.affine, matcher.skins[f.skin].size) for f in (a, b))
    common = max(min(ax1, bx1) - max(ax0, bx0), 0) * max(min(ay1, by1) - max(ay0, by0), 0)
    return common / ((ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - common)


# ------------------------------------------------------------------------------------------------------------ cutting the clip
PAD_WIDTH = 320                                    # crops of the overlay: at least as fine as a tenth to a quarter of a 720p or 1080p frame
AHEAD = 8                                          # frames decoded ahead of the two threads that shrink, warp and encode


class Cutter:
    """The one pass over a video of size (w, h): shrinks, masks, warps and encodes each frame.

    skin at affine: the overlay that is warped; None cuts no pads (released labels bring actions). box [x0, y0, x1, y1], in video pixels: masked out.
    window, alike: the part of the frame that is the game. every: of the rows of the clip, each Kth gets a policy frame.
    """

    def __init__(self, size, every, skin=None, affine=None, box=None, window=None):
        self.every, self.window, self.hole = every, window, None    # hole: the box in the 256 x 256 picture
        if box is not None:
            x0, y0, x1, y1 = window or (0, 0, *size)
            corners = (np.reshape(box, (2, 2)) - (x0, y0)) / (x1 - x0, y1 - y0) * SIDE
            self.hole = np.clip([*np.floor(corners[0]), *np.ceil(corners[1])], 0, SIDE).astype(int).tolist()
        self.pad = None
        if skin is not None:
            self.pad = PAD_WIDTH, max(round(skin.size[1] * PAD_WIDTH / skin.size[0]), 1)
            scale = np.diag([skin.size[0] / self.pad[0], skin.size[1] / self.pad[1], 1.0])
            scale[:2, 2] = (scale[0, 0] - 1) / 2, (scale[1, 1] - 1) / 2                            # pixel centres, not corners
            self.to_video = np.array(affine) @ scale
            self._plan_crop(size)

    def _plan_crop(self, size):
        """The region of the frame that the crop needs, and the whole number by which large overlays are shrunk before warping."""
        x0, y0, x1, y1 = pose_box(self.to_video, self.pad)
        self.shrink = max(1, int((x1 - x0) / self.pad[0] / 1.5))
        self.region = max(int(x0) - 8, 0), max(int(y0) - 8, 0), min(int(x1) + 9, size[0]), min(int(y1) + 9, size[1])
        self.warp = self.to_video.copy()
        self.warp[:, 2] = (self.to_video[:, 2] - self.region[:2] + 0.5) / self.shrink - 0.5
        self.warp[:, :2] /= self.shrink

    def policy(self, bgr):
        """uint8 (256, 256, 3) BGR: what a model sees, the overlay's box black [P]."""
        if self.window:
            bgr = bgr[self.window[1]:self.window[3], self.window[0]:self.window[2]]
        small = np.array(shrink(bgr))                               # a copy even of a 256 x 256 video: crop() still needs the overlay
        if self.hole:
            x0, y0, x1, y1 = self.hole
            small[y0:y1, x0:x1] = 0
        return small

    def crop(self, bgr):
        """uint8 (h, 320, 3) BGR: the overlay in its template's frame."""
        x0, y0, x1, y1 = self.region
        cut = bgr[y0:y1, x0:x1]
        if self.shrink > 1:
            cut = cv2.resize(cut, (max((x1 - x0) // self.shrink, 1), max((y1 - y0) // self.shrink, 1)), interpolation=cv2.INTER_AREA)
        return cv2.warpAffine(cut, self.warp, self.pad, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE)

    def run(self, video, folder, rows=None):
        """Decode `video` once and write frames (and pads) into `folder`; rows = (first, last + 1) of the video to keep -> number of rows."""
        frames, pads, waiting, n = FramesWriter(folder, "frames"), FramesWriter(folder, "pads") if self.pad else None, deque(), 0
        first, end = rows or (0, math.inf)

        def work(row, count, bgr):
            """In a thread: a decoded frame -> (its rows, those that get a policy frame, its two JPEGs)."""
            filled = range(row, row + count)
            wanted = [k for k in filled if k % self.every == 0]
            return filled, wanted, frames.encode(self.policy(bgr)) if wanted else None, pads.encode(self.crop(bgr)) if pads else None

        def write(filled, wanted, frame, pad):
            for k in wanted:
                frames.add_bytes(k, frame)
            for k in filled if pads else ():
                pads.add_bytes(k, pad)

        with ThreadPoolExecutor(2) as pool:
            for row, bgr, count in decode(video, first):
                if row >= end:
                    break
                waiting.append(pool.submit(work, row - first, count, bgr))
                n = row - first + count
                if len(waiting) > AHEAD:
                    write(*waiting.popleft().result())
            while waiting:
                write(*waiting.popleft().result())
        frames.close(n)
        if pads:
            pads.close(n)
        return n


def geometry_of(skin, matcher):
    """A skin's geometry for clip.json; a bare PNG borrows that of the best matching pad of ours (an affine between the two pictures)."""
    donor, affine = skin, np.eye(2, 3)
    if not skin.buttons and not skin.sticks:
        matcher.lender = matcher.lender or Matcher(our_skins(), matcher.kinds, matcher.net)
        flat, scale = flat_template(skin)
        finds = matcher.lender.search(flat, matcher.kinds)
        if not finds or finds[0].inliers < MIN_INLIERS // 2:
            return {"size": list(skin.size), "buttons": {}, "sticks": {}}
        donor, affine = matcher.lender.skins[finds[0].skin], finds[0].affine / scale

    def moved(x, y):
        return [round(float(v), 2) for v in affine @ (x, y, 1)]

    sx, sy = float(affine[0, 0]), float(affine[1, 1])
    buttons = {n: [*moved(x0, y0), *moved(x1, y1)] for n, (x0, y0, x1, y1) in donor.buttons.items()}
    sticks = {s: {"center": moved(*g["center"]), "travel": [round(g["travel"][0] * sx, 2), round(g["travel"][1] * sy, 2)],
                  "radius": round(g["radius"] * sx, 2)} for s, g in donor.sticks.items()}
    return {"size": list(skin.size), "buttons": buttons, "sticks": sticks}


def visible_box(skin):
    """[x0, y0, x1, y1] of what a skin shows at rest, in template pixels."""
    if skin.bbox:
        return skin.bbox
    x, y, w, h = cv2.boundingRect((draw(skin)[..., 3] > 20).astype(np.uint8))
    return [x, y, x + w, y + h]


def cut_clip(video, folder, matcher, find, args, key):
    """Write the whole clip folder of a found overlay, under a temporary name until it is whole -> clip.json's dict."""
    info, skin = video_info(video), matcher.skins[find.skin]
    x0, y0, x1, y1 = visible_box(skin)
    (ax, ay), (bx, by) = find.affine @ (x0 - 0.5, y0 - 0.5, 1), find.affine @ (x1 - 0.5, y1 - 0.5, 1)
    box = [ax + 0.5, ay + 0.5, bx + 0.5, by + 0.5]
    cutter = Cutter(info["size"], args.every, skin, find.affine, [box[0] - 1, box[1] - 1, box[2] + 1, box[3] + 1])
    with new_folder(folder) as tmp:
        n = cutter.run(video, tmp)
        clip = {"video": Path(video).name, "game": Path(video).stem, "fps": info["fps"], "n": n,
                "size": list(info["size"]),
                "box": [round(v, 2) for v in (box[0], box[1], box[2] - box[0], box[3] - box[1])],
                "template": skin.name, "controller": skin.family,
                "affine": [[round(float(v), 6) for v in row] for row in corners_convention(find.affine)],
                "inliers": int(find.inliers), "matcher": max(find.by, key=find.by.get), "every": args.every,
                "lag": 0, "by": find.by, "edges": round(find.edges, 3), "seen": round(find.seen, 3),
                "hole": cutter.hole, "pad": list(cutter.pad),
                "geometry": geometry_of(skin, matcher), "run": key}
        interpolation = cv2.INTER_AREA if skin.size[0] > PAD_WIDTH else cv2.INTER_LINEAR
        save_png(tmp / "template.png", cv2.resize(draw(skin), cutter.pad, interpolation=interpolation))
        write_json(tmp / "clip.json", clip)
    return clip


def corners_convention(affine):
    """An affine between pixel centres (OpenCV's) as one between pixel corners (0 = the picture's edge), which clip.json states."""
    out = np.array(affine, np.float64)
    out[:, 2] += 0.5 - out[:, :2] @ (0.5, 0.5)
    return out


CLIP_FILES = set("clip.json template.png frames.npy frames_index.npy pads.npy pads_index.npy actions.npy "
                 "confidence.npy keep.npy truth.npy human.npy cuts.npy .lock .DS_Store Thumbs.db".split())


def check_replaceable(folder):
    """UserError where anything stands at `folder` but a clip that extract.py cut, with clips' files only;
    Busy where parse.py is at it."""
    if not os.path.lexists(folder):
        return
    wrong = "a link or a file"
    if folder.is_dir() and not folder.is_symlink():
        foreign = [e.name for e in os.scandir(folder) if e.is_dir(follow_symlinks=False)
                   or not (e.name in CLIP_FILES or e.name.startswith(".tmp-"))]
        try:
            made = "run" in read_json(folder / "clip.json", dict)
        except UserError:
            made = False
        wrong = f"{min(foreign)!r} in it" if foreign else "" if made else "no clip.json of extract.py's in it"
    if wrong:
        raise UserError(f"{folder}: expected nothing there or a clip of extract.py's, found {wrong}: "
                        "move it away or give another --out")
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


def write_json(path, value):
    """JSON under a temporary name, then renamed."""
    write_atomic(path, lambda tmp: Path(tmp).write_text(json.dumps(value, ensure_ascii=False) + "\n", encoding="utf-8"))


# -------------------------------------------------------------------------------------------- the released labels (CC BY-NC 4.0)
def label_chunks(labels):
    """Every chunk under NVIDIA's SHARD/<video_id>/<video_id>_chunk_NNNN/ -> sorted list of (folder, metadata dict)."""
    chunks = [(p.parent, read_json(p, dict)) for p in sorted(Path(labels).rglob("metadata.json"))] if Path(labels).is_dir() else []
    if not chunks:
        raise UserError(f"{labels}: expected SHARD/<video_id>/<video_id>_chunk_NNNN/metadata.json, found none: unpack the SHARD_*.tar.gz there")
    return chunks


def label_actions(folder):
    """One chunk's parquet -> float32 (rows, 25); the filtered and remapped table where it exists, else the raw one."""
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError("--labels reads parquet files: expected the package pyarrow, found none: pip install pyarrow") from None
    path = next((folder / n for n in ("actions_processed.parquet", "actions_raw.parquet") if (folder / n).exists()), None)
    if path is None:
        raise UserError(f"{folder}: expected actions_raw.parquet, found none: unpack this chunk again")
    try:
        table = pq.read_table(path).to_pydict()
        actions = np.zeros((len(table["j_left"]), A), np.float32)
        for name in (b for b in BUTTONS if b not in LEGACY):
            actions[:, BUTTON[name]] = np.array(table[name.lower()], np.float32)
        actions[:, STICKS["left"]], actions[:, STICKS["right"]] = (np.array(table[s], np.float32).reshape(-1, 2) for s in ("j_left", "j_right"))
        bad = out_of_range(actions)
        if bad:
            raise ValueError(f"values outside of 0..1 (buttons) and -1..1 (sticks), {bad}")
    except (KeyError, TypeError, ValueError, OSError) as e:
        raise UserError(f"{path}: expected 17 button columns, j_left and j_right, found {type(e).__name__} {e}: download this shard again") from None
    return actions


def cut_labelled(folder, meta, video, out, args, key):
    """One released chunk + its video -> a clip folder with actions, at the video's own rate -> clip.json's dict."""
    info = video_info(video)
    try:
        source = meta["original_video"]
        height, width = source["resolution"]
        start, end, chunk = float(source["start_time"]), float(source["end_time"]), int(meta["chunk_size"])
        sx, sy = info["size"][0] / width, info["size"][1] / height
        x, y, w, h = meta["bbox_controller_overlay"]
        box = [x * sx, y * sy, (x + w) * sx, (y + h) * sy]
        rows = round(start * info["fps"]), round(end * info["fps"])
        area = meta.get("bbox_game_area")                                                    # in shares of the frame
        window = area and [min(max(round(area[edge] * side), 0), side) for edge, side in zip(("xtl", "ytl", "xbr", "ybr"), info["size"] * 2)]
        seen = all(1 <= span <= side and 0 <= start + span / 2 <= side
                   for start, span, side in ((x, w, width), (y, h, height)))
        if not seen or window and not (window[0] < window[2] and window[1] < window[3]):
            raise ValueError(f"boxes {[x, y, w, h]} and {window} in a picture of {info['size']}")
    except (KeyError, TypeError, ValueError, OverflowError, ZeroDivisionError) as e:
        raise UserError(f"{folder / 'metadata.json'}: expected original_video, chunk_size and bbox_controller_overlay, found {type(e).__name__} {e}: "
                        "download this shard again") from None
    actions = label_actions(folder)
    if len(actions) != chunk or end <= start:
        raise UserError(f"{folder}: expected {chunk} rows over {start}-{end} s, found {len(actions)}: download this shard again")
    cutter = Cutter(info["size"], args.every, box=box, window=window)
    with new_folder(out) as tmp:
        n = cutter.run(video, tmp, rows)
        if n < 0.5 * (rows[1] - rows[0]):
            raise UserError(f"{video}: expected frames {rows[0]}-{rows[1]} of chunk {folder.name}, "
                            f"found {n} of them: download the whole video")
        seconds = (np.arange(n) + 0.5) / info["fps"]           # frames and label rows may differ in rate
        actions = actions[np.minimum(seconds * chunk / (end - start), chunk - 1).astype(int)]
        write_npy(tmp / "actions.npy", actions)
        write_npy(tmp / "confidence.npy", np.ones(n, np.float32))
        write_npy(tmp / "keep.npy", dense(actions))
        clip = {"video": Path(video).name, "game": meta.get("game") or "other", "fps": info["fps"], "n": n,
                "size": list(info["size"]), "box": [x * sx, y * sy, w * sx, h * sy],
                "template": "released labels", "controller": meta.get("controller_type", "generic"),
                "affine": [[sx, 0, x * sx], [0, sy, y * sy]], "inliers": 0, "matcher": "labels",
                "every": args.every, "lag": 0, "hole": cutter.hole, "run": key}
        write_json(tmp / "clip.json", clip)
    return clip


HORIZON = 16                                       # steps of a training chunk [P]
DEAD_ZONE, SURE = 0.15, 0.5                        # a stick nearer to its centre does not act; a frame below SURE confidence is not used [O]


def dense(actions, confidence=None):
    """The quality filter [P 3.1]: may frame t start a training chunk? bool (n,): the frame is read surely, the chunk t .. t + HORIZON - 1 is whole,
    and in at least half of its steps something is pressed or a stick is out of its dead zone; an unsure step counts as none."""
    sure = np.ones(len(actions), bool) if confidence is None else confidence >= SURE
    acts = (actions[:, :21] > 0.5).any(1) | (np.hypot(actions[:, 21:25:2], actions[:, 22:25:2]) > DEAD_ZONE).any(1)
    total = np.concatenate([[0], np.cumsum(acts & sure)])
    keep, whole = np.zeros(len(actions), bool), max(len(actions) - HORIZON + 1, 0)
    keep[:whole] = 2 * (total[len(total) - whole:] - total[:whole]) >= HORIZON
    return keep & sure


# ------------------------------------------------------------------------------------------------------------------ command line
def find_videos(paths):
    """Files and folders -> list of (video path, clip name), a folder's sorted: the name is the file's, with its folder's where two would share clips."""
    videos = []
    for path in map(Path, paths):
        if path.is_dir():
            videos += sorted(p for p in path.rglob("*") if p.suffix.lower() in VIDEO_ENDINGS and p.is_file())
        elif path.exists():
            videos.append(path)
        else:
            raise UserError(f"{path}: expected a video or a folder of videos, found nothing there: check the path")
    if not videos:
        raise UserError(f"{' '.join(map(str, paths))}: expected videos ({' '.join(sorted(VIDEO_ENDINGS))}), found none in there")
    videos = list(dict.fromkeys(unicode(p).absolute() for p in videos))
    folders = Counter(folder.casefold() for p in videos for folder in place_names(p.stem))     # casefold: a.mp4 and A.mp4 are one folder on some disks
    unique = {p: all(folders[folder.casefold()] == 1 for folder in place_names(p.stem)) for p in videos}
    return [(p, p.stem if unique[p] else f"{p.parent.name}_{p.stem}_{fingerprint(str(p))[:6]}") for p in videos]


def place_names(name):
    """The names of a video's clip folders: one for each place that its overlay may take."""
    return [name, f"{name}_place2", f"{name}_place3"]


def journal(path):
    """extract.jsonl -> {video: its last line's dict}; a line cut off by a kill is passed over."""
    lines = {}
    if Path(path).exists():
        for text in Path(path).read_text(encoding="utf-8", errors="replace").split("\n"):    # splitlines() would also cut at odd letters of a name
            try:
                line = json.loads(text)
                lines[line["video"]] = line
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
    return lines


def log_line(path, line):
    """Append one line to extract.jsonl in a single write, so that several processes may share the file."""
    text = json.dumps(line, ensure_ascii=False) + "\n"
    with open(path, "a+b", buffering=0) as f:
        if f.seek(0, os.SEEK_END):
            f.seek(-1, os.SEEK_END)
            if f.read(1) != b"\n":                                                          # a kill cut the last line
                text = "\n" + text
        f.write(text.encode())


def whole_clip(folder, key):
    """clip.json of a clip of the same video and settings whose files all open and have n rows; else None."""
    try:
        clip = read_clip(folder)
        if clip.get("run") != key:
            return None
        rows = [Frames(folder).n]
        if "pad" in clip:
            pads, _ = Frames(folder, "pads"), read_rgba(folder / "template.png")
            rows += [pads.n, len(pads)]
        else:
            made = (("actions", np.float32, 2), ("confidence", np.float32, 1), ("keep", bool, 1))
            rows += [len(read_npy(folder / f"{name}.npy", dtype, dims)) for name, dtype, dims in made]
    except UserError:
        return None
    return clip if all(n == clip.get("n") for n in rows) else None


def extract_one(video, name, old, matcher, args, settings):
    """One video: localise and cut -> what its line of extract.jsonl (`old` before) says of it; None where its
    result is whole and of these settings."""
    key = fingerprint(settings, video.stat().st_size, video.stat().st_mtime_ns)
    folders = [Path(args.out) / place for place in place_names(name)]
    line = {"status": "none", "run": key}
    with clip_lock(folders[0]):
        named = old.get("places") if isinstance(old.get("places"), list) else []
        expected = [f for f in folders[1:] if os.path.lexists(f) or f.name in named]
        clip = all(whole_clip(f, key) for f in expected) and whole_clip(folders[0], key)
        if old.get("run") == key and (clip or old.get("status") == "none"):
            return None
        if not clip:                               # there is one after a kill between the folder and its line
            for folder in folders:
                check_replaceable(folder)
            frames, pictures = sample_frames(video)
            places, most = localise_all(frames, matcher)
            for find in places:
                find.skin = recolour(find, pictures, frames[0].shape[::-1], matcher)
            for folder, find in reversed(list(zip(folders, places))):    # the first last: it says all is done
                clip = cut_clip(video, folder, matcher, find, args, key)
            for unused in folders[len(places):]:
                discard(unused)
            line["inliers"] = int(most)
            if not places:
                line["reason"] = (f"best of {len(matcher.skins)} templates has {most} inliers, "
                                  f"{MIN_INLIERS} and agreeing edges are needed")
            if len(places) > 1:
                line["places"] = [folder.name for folder in folders[:len(places)]]
    if clip:
        line |= {"status": "found", **{k: clip[k] for k in ("template", "box", "inliers", "by", "edges")}}
    return line


def label_one(video, folder, meta, args):
    """One released chunk -> as extract_one()."""
    target = Path(args.out) / folder.name
    key = fingerprint(args.every, video.stat().st_size, video.stat().st_mtime_ns, meta)
    with clip_lock(target):
        if whole_clip(target, key):
            return None
        check_replaceable(target)
        clip = cut_labelled(folder, meta, video, target, args, key)
    return {"status": "found", "template": "released labels", "by": {}, "box": clip["box"]}


WORKER = "--worker"                                # the one word of a worker's command line


class Worker:
    """Does jobs one at a time in a child process, since a decoder is foreign code on foreign data: where it
    ends its process, that is an error of the job's video, and a new child goes on. The child ends with us."""

    def __init__(self, args):
        self.args = {name: value for name, value in vars(args).items() if name != "run"}
        self._start()

    def _start(self):
        self.child = subprocess.Popen([sys.executable, os.path.abspath(__file__), WORKER],
                                      stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                      start_new_session=True)                       # Ctrl-C is for us alone
        ready, self.fresh = self._ask(self.args), True
        if ready != {}:
            how = self._end()
            raise UserError(ready["reason"] if ready else f"the process for videos ended at its start: {how}")

    def _ask(self, question):
        """Send a JSON value -> the child's answer, a dict; None where it ended instead."""
        try:
            self.child.stdin.write(json.dumps(question).encode() + b"\n")
            self.child.stdin.flush()
            return json.loads(self.child.stdout.readline() or "null")
        except (OSError, ValueError):              # it ended within its answer
            return None

    def _end(self):
        """End the child -> how it ended."""
        self.child.stdout.close()
        with suppress(OSError):
            self.child.stdin.close()
        code = self.child.wait()
        sweep(self.args["out"])
        return signal.Signals(-code).name if code < 0 else f"exit status {code}"

    def __call__(self, *job):
        """{"line": what work_for(args)(*job) returns} or {"status": "error" or "busy", "reason": ..}."""
        while True:
            answer, fresh = self._ask(job), self.fresh
            self.fresh = False
            if answer is not None:
                return answer
            how = self._end()
            self._start()
            if fresh:                              # else it may have been the video before
                return {"status": "error", "reason": f"{job[0]}: expected a video that OpenCV decodes, found "
                        f"one at which its process ends ({how}): save it again with another program"}

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace):
        self.child.kill()
        self._end()


def worker():
    """The child of a Worker: reads its args and then jobs as lines of JSON, and answers each by another."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)   # Windows has no sessions
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)                                  # what libraries print is no answer
    jobs, work = SimpleQueue(), None

    def listen():
        for line in open(0, "rb", closefd=False):
            jobs.put(json.loads(line))
        os._exit(0)                                # our parent has ended, also in the middle of a job

    threading.Thread(target=listen, daemon=True).start()
    while True:
        job = jobs.get()
        try:
            if work is None:
                work, answer = work_for(argparse.Namespace(**job)), {}
            else:
                answer = {"line": work(*job)}
        except UserError as e:
            answer = {"status": "busy" if isinstance(e, Busy) else "error", "reason": str(e)}
        except OSError as e:
            answer = {"status": "error", "reason": file_trouble(e)}
        print(json.dumps(answer), file=answers, flush=True)


def work_for(args):
    """The function that does one job of these args."""
    if args.labels:
        return lambda video, folder, meta: label_one(Path(video), Path(folder), meta, args)
    skins = load_skins(args.templates) if args.templates else our_skins()
    kinds = ("sift", "xfeat") if args.matcher == "both" else (args.matcher,)
    net = load_xfeat(args.xfeat) if "xfeat" in kinds else None
    matcher = Matcher(skins, kinds, net, Path(args.out) / f"templates-{rank_and_world()[0]}.npz")
    drawings = fingerprint(*(flat for flat, _ in matcher.flats), *[s.name for s in skins])
    settings = drawings, kinds, args.every, "" if net is None else str(args.xfeat)
    return lambda video, name, old: extract_one(Path(video), name, old, matcher, args, settings)


def work_through(jobs, args):
    """Do all jobs, each (what its line begins with, words for the worker) -> how many failed."""
    failed = 0
    with Worker(args) as work:
        for i, (line, job) in enumerate(jobs, 1):
            start = time.time()
            answer = work(line["video"], *job)
            answer = answer.get("line", answer)
            if answer is None:
                continue
            line |= {"status": "", "template": None, "box": None, "inliers": 0, "reason": "", **answer}
            line["seconds"] = round(time.time() - start, 2)
            failed += line["status"] == "error"
            if line["status"] != "busy":
                log_line(Path(args.out) / "extract.jsonl", line)
            report(line, i, len(jobs))
    return failed


def keep_apart(videos, out, names):
    """UserError where a clip's folder, one of `names` in `out`, holds a video: it is replaced as a whole."""
    out, names = out.resolve(), {name.casefold() for name in names}
    for video, _ in videos:
        path = video.resolve()
        if path.is_relative_to(out) and path.relative_to(out).parts[0].casefold() in names:
            raise UserError(f"--out {out}: expected a folder where no clip takes a video's place, "
                            f"found {path}: give another --out")


def report(line, i, n):
    """Print what became of a video, the i-th of n."""
    if line["status"] == "found":
        what = f"{line['template']} | box {[round(v) for v in line['box']]} | {line['inliers']} inliers " + " ".join(f"{k} {v}" for k, v in line["by"].items())
        what += f" | {len(line['places'])} places in turn" if "places" in line else ""
    else:
        what = line["reason"]
    print(f"video {i}/{n} | {Path(line['video']).name} | {line['status']} | {what} | {line['seconds']:.1f} s", flush=True)


def run_extract(args):
    """The main command: localise and cut every video, or cut along released labels."""
    within(args, 1, None, "every", "limit")
    every_video, out = find_videos(args.videos)[:args.limit], Path(args.out)
    videos = shard(every_video)
    if args.sheet:
        writable(args.sheet)
    out.mkdir(parents=True, exist_ok=True)
    if args.labels:
        return run_labels(every_video, videos, args, out)
    keep_apart(every_video, out, [place for _, name in every_video for place in place_names(name)])
    log = out / "extract.jsonl"
    done = journal(log)
    jobs = [({"video": str(video)}, (name, done.get(str(video), {}))) for video, name in videos]
    failed = work_through(jobs, args)
    if args.sheet:
        contact_sheet(args.sheet, videos, journal(log), out)
    if failed and failed == len(every_video):                                                # not a share: torchrun ends all processes when one fails
        raise UserError(f"{failed} of {failed} videos can't be read: see the lines above")


def video_id(meta):
    """The id of a chunk's video; where its metadata names none, what no file's name holds."""
    source = meta.get("original_video")
    return str(isinstance(source, dict) and source.get("video_id") or "\0")


def run_labels(every_video, videos, args, out):
    """--labels: one clip folder for each released chunk whose video is among `videos`, this process's share of every_video."""
    chunks = label_chunks(args.labels)
    matched = []
    for folder, meta in chunks:
        holders = [video for video, name in every_video if video_id(meta) in name]
        matched += [(folder, meta, holders[0])] if holders else []
    if not matched:
        raise UserError(f"{args.labels}: expected videos whose names hold one of its {len(chunks)} chunks' video ids, found none: name them <video_id>.mp4")
    keep_apart(every_video, out, [folder.name for folder, _, _ in matched])
    ours = {video for video, _ in videos}
    share = [chunk for chunk in matched if chunk[2] in ours]
    jobs = [({"video": str(video), "chunk": folder.name}, (str(folder), meta))
            for folder, meta, video in share]
    failed = work_through(jobs, args)
    if failed == len(matched):
        raise UserError(f"{failed} of {failed} chunks can't be cut: see the lines above")


def contact_sheet(path, videos, lines, out):
    """One picture of every video's find for a person to check: a frame with the box, the crop, the template beside it."""
    cells = [sheet_cell(video, out / name, lines[str(video)]) for video, name in videos if str(video) in lines]
    if not cells:                                                                            # a share of no videos
        return
    cells += [np.full_like(cells[0], 32)] * (len(cells) % 2)
    save_png(path, np.vstack([np.hstack(cells[i:i + 2]) for i in range(0, len(cells), 2)]))


def sheet_cell(video, folder, line):
    """One video's uint8 (200, 640, 3) RGB part of the contact sheet."""
    cell = np.full((200, 640, 3), 32, np.uint8)
    if line["status"] != "error":
        frame = middle_frame(video)
        if line["status"] == "found":
            x, y, w, h = line["box"]
            cv2.rectangle(frame, (int(x), int(y)), (int(x + w), int(y + h)), (0, 255, 0), max(2, frame.shape[1] // 400))
            pads, rest = Frames(folder, "pads"), read_rgba(folder / "template.png")
            paste(cell, pads[len(pads) // 2], 320, 0, 160, 176)
            flat = (rest[..., :3] * (rest[..., 3:] / 255.0) + 96 * (1 - rest[..., 3:] / 255.0)).astype(np.uint8)
            paste(cell, flat, 480, 0, 160, 176)
        paste(cell, frame, 0, 0, 320, 176)
    text = f"{folder.name}: {line['status']} {line['template'] or ''} {line['inliers']} inliers"
    cv2.putText(cell, text.encode("ascii", "replace").decode(), (6, 192), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (255, 255, 255), 1, cv2.LINE_AA)
    return cell


def middle_frame(video):
    """uint8 (h, w, 3) RGB, one frame from the middle of a video; grey where it can't be sought."""
    capture = open_video(video)
    capture.set(cv2.CAP_PROP_POS_FRAMES, describe(capture)["n"] // 2)
    ok, bgr = capture.read()
    return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB) if ok else np.full((176, 320, 3), 64, np.uint8)


def paste(canvas, picture, x, y, w, h):
    """Fit a picture into a w x h place of a canvas."""
    scale = min(w / picture.shape[1], h / picture.shape[0])
    small = cv2.resize(picture, (max(int(picture.shape[1] * scale), 1), max(int(picture.shape[0] * scale), 1)), interpolation=cv2.INTER_AREA)
    canvas[y:y + small.shape[0], x:x + small.shape[1]] = small


def run_templates(args):
    """Write our templates as NAME.png + NAME.json."""
    out, skins = Path(args.out), our_skins()
    out.mkdir(parents=True, exist_ok=True)
    for skin in skins:
        save_png(out / f"{skin.name}.png", draw(skin))
        buttons = {n: {"center": [(x0 + x1) / 2, (y0 + y1) / 2], "box": [x0, y0, x1, y1]} for n, (x0, y0, x1, y1) in skin.buttons.items()}
        write_json(out / f"{skin.name}.json", {"name": skin.name, "controller": skin.family, "size": list(skin.size), "bbox": visible_box(skin),
                                               "buttons": buttons, "sticks": skin.sticks})
    print(f"wrote {len(skins)} templates to {out}")


def main(argv=None):
    """Parse the command line; without a sub-command's name the main command runs."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == [WORKER]:
        return worker()
    if argv[:1] == ["templates"]:
        parser = Parser(prog="extract.py templates", description="Write our own templates as PNG + JSON.", allow_abbrev=False)
        parser.add_argument("--out", required=True, help="folder to write to")
        parser.set_defaults(run=run_templates)
        return cli(parser, argv[1:])
    parser = Parser(prog="extract.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("videos", nargs="+", help="video files, or folders that are searched for them")
    parser.add_argument("--out", required=True, help="the data folder: one clip folder a video, and extract.jsonl")
    parser.add_argument("--templates", help="folder of NAME.png (+ NAME.json) or of OBS input-overlay presets (default: our own, about 300)")
    parser.add_argument("--every", type=int, default=1, help="keep each Kth policy frame; actions stay at full rate (default 1)")
    parser.add_argument("--matcher", choices=("sift", "xfeat", "both"), default="both", help="features to match with (default both, as the paper)")
    parser.add_argument("--xfeat", help="matching weights: a .safetensors of ours or the official xfeat.pt (default weights/xfeat.safetensors)")
    parser.add_argument("--labels", help="NVIDIA's released labels, unpacked: cut their chunks from the given videos instead of localising")
    parser.add_argument("--limit", type=int, help="take the first N videos only (default: all)")
    parser.add_argument("--sheet", help="also write a contact sheet PNG of all finds")
    parser.set_defaults(run=run_extract)
    return cli(parser, argv)


if __name__ == "__main__":
    sys.exit(main())
