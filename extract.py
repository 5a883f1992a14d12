"""extract.py: find the gamepad overlay in gameplay videos and cut clips (NitroGen, arXiv 2601.02427, section 3.1).

    python extract.py VIDEO|DIR... --out DATA [--templates DIR] [--every K] [--matcher sift|xfeat|both] [--sheet PNG]
    python extract.py VIDEO|DIR... --out DATA --labels DIR         NVIDIA's released labels instead of localisation
    python extract.py templates --out DIR                          our ~300 templates as PNG + JSON, to look at
    python extract.py xfeat --out weights/xfeat.safetensors        train the matching network

In: videos (anything OpenCV's FFmpeg reads). Out: one folder per video under DATA, written whole or not at all:
    clip.json                     where the overlay is, which template it is, and that template's geometry
    frames.npy + frames_index.npy uint8 (bytes,) + int64 (m+1, 2)   256 x 256 policy frames, the overlay masked out
    pads.npy + pads_index.npy     the same layout                   the overlay in its template's frame, one crop a video frame
    template.png                  uint8 (h, w, 4)                   the template at rest, at the size of the crops
and one line a video in DATA/extract.jsonl. This file is also the home of what every stage shares: the 25-dim action, the clip
folder, video in and out, shrink() and draw().
"""
import argparse
import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

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


def cli(parser, argv, *mistakes):
    """Parse argv and call args.run(args). Returns the exit status: 0 done, 2 the user's mistake (one line), 130 Ctrl-C."""
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (UserError, *mistakes) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; what is whole stays, run the same command to go on", file=sys.stderr)
        return 130
    return 0


def neutral():
    """The pad at rest: float32 (25,) of zeros, in file convention."""
    return np.zeros(A, np.float32)


def shrink(rgb):
    """uint8 (h, w, 3) -> uint8 (256, 256, 3): a plain stretch with area interpolation, as the release does, in training and in play."""
    if rgb.shape[:2] == (SIDE, SIDE):
        return rgb
    return cv2.resize(rgb, (SIDE, SIDE), interpolation=cv2.INTER_AREA)


def write_atomic(path, write):
    """write(tmp) makes the file under a temporary name; then it is renamed, so that a name never holds half a file."""
    path = Path(path)
    tmp = path.with_name(path.name + ".tmp")
    try:
        write(tmp)
        os.replace(tmp, path)
    except OSError as e:
        raise UserError(f"can't write {path}: {e.strerror or e}: give another --out or make room") from None
    finally:
        tmp.unlink(missing_ok=True)


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
    straight = cv2.divide(rgb, cv2.merge([alpha] * 3), scale=255)
    return np.dstack([straight, alpha])


def draw_part(canvas, part, action):
    """Draw one part in the state that `action` gives it."""
    x, y = part.at
    if part.control in STICKS:
        ax, ay = action[STICKS[part.control]]
        clicked, moved = action[BUTTON[THUMB[part.control]]] >= 0.5, max(abs(ax), abs(ay)) > 0.1
        sprite = part.sprites[1 if clicked else 2 if moved and len(part.sprites) > 2 else 0]
        blend_at(canvas, sprite, x + float(ax) * part.travel[0], y + float(ay) * part.travel[1])
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
    return np.dstack([cv2.multiply(rgba[..., :3], cv2.merge([rgba[..., 3]] * 3), scale=1 / 255), rgba[..., 3]])


def read_rgba(path):
    """An image file as uint8 (h, w, 4) RGBA, straight alpha. UserError when it is no picture."""
    data = np.fromfile(path, np.uint8)                                                       # imread can't open non-ASCII names on Windows
    image = cv2.imdecode(data, cv2.IMREAD_UNCHANGED) if data.size else None
    if image is None:
        raise UserError(f"{path}: expected a PNG picture, found something else: remove it or save it again as PNG")
    if image.dtype != np.uint8:
        image = (image / 257).astype(np.uint8)
    if image.ndim == 2:
        image = cv2.cvtColor(image, cv2.COLOR_GRAY2BGR)
    return cv2.cvtColor(image, cv2.COLOR_BGRA2RGBA if image.shape[2] == 4 else cv2.COLOR_BGR2RGBA)


def save_png(path, rgba):
    """Write a uint8 RGB(A) picture as PNG, atomically."""
    code = cv2.COLOR_RGBA2BGRA if rgba.shape[2] == 4 else cv2.COLOR_RGB2BGR
    write_atomic(path, lambda tmp: cv2.imencode(".png", cv2.cvtColor(rgba, code))[1].tofile(tmp))


def load_preset(layout, width=None):
    """An OBS input-overlay preset: layout JSON + the atlas PNG beside it -> Skin, `width` pixels wide (None: its own size)."""
    layout = Path(layout)
    try:
        preset = json.loads(layout.read_text(encoding="utf-8"))
        elements = [e for e in preset["elements"] if e["type"] in (0, 2, 5, 6, 7, 8)]
        [(e["pos"], e["mapping"]) for e in elements]
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{layout}: expected an OBS input-overlay layout with elements, found {type(e).__name__} {e}: export the preset again") from None
    pngs = sorted(layout.parent.glob("*.png"))
    atlas = next((p for p in pngs if p.stem == layout.stem), pngs[0] if pngs else None)
    if atlas is None:
        raise UserError(f"{layout}: expected the atlas PNG beside it, found none: copy the preset's .png into {layout.parent}")
    atlas = premultiply(read_rgba(atlas))
    size = (int(preset.get("overlay_width") or max(e["pos"][0] + e["mapping"][2] for e in elements)),
            int(preset.get("overlay_height") or max(e["pos"][1] + e["mapping"][3] for e in elements)))
    parts = [part for element in elements if (part := preset_part(element, atlas))]
    return measured(layout.parent.name, family_of(layout.parent.name + layout.stem), size, parts, width)


def preset_part(element, atlas):
    """One element of a preset -> Part, or None where the pad has no such control (paddles, second pads, keys)."""
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
        grow = "" if element.get("trigger_mode") else ("", "up", "down", "left", "right")[element.get("direction", 1)]
        return Part(("LEFT_TRIGGER", "RIGHT_TRIGGER")[side], at, [sprite(0, 0), sprite(0, 1)], grow=grow)
    if kind == 7:
        return Part("GUIDE", at, [sprite(0, 0), sprite(4, 0)])
    return Part("DPAD", at, [sprite(column, 0) for column in range(9)])


def measured(name, family, size, parts, width=None):
    """Parts -> Skin at `width`, its geometry read off the parts: a button's box is where its sprites have ink."""
    scale = 1.0 if width is None else width / size[0]
    out = (size if width is None else (width, max(1, round(size[1] * scale))))
    skin = Skin(name, family, out, [scaled(p, scale) for p in parts if any(s is not None for s in p.sprites)])
    for part in skin.parts:
        ink = [cv2.boundingRect(np.ascontiguousarray((s[..., 3] > 24).astype(np.uint8))) for s in part.sprites if s is not None]
        ink = [(x, y, x + w, y + h) for x, y, w, h in ink if w and h]
        if not part.control or not ink:
            continue
        x0, y0, x1, y1 = (int(f(v)) for f, v in zip((min, min, max, max), zip(*ink)))
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
    try:
        buttons = {n: [float(v) for v in b["box"]] for n, b in geometry.get("buttons", {}).items() if n in BUTTON}
        buttons = {n: b for n, b in buttons.items() if n in geometry.get("visible_buttons", buttons)}
        sticks = {s: {"center": list(map(float, g["center"])), "travel": list(map(float, g["travel"])), "radius": float(g.get("radius", max(g["travel"])))}
                  for s, g in geometry.get("sticks", {}).items() if s in STICKS}
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise UserError(f"{note}: expected buttons.NAME.box and sticks.left.center/travel, found {type(e).__name__} {e}: mend it or remove it") from None
    base = premultiply(rgba)
    parts = [Part("", (0, 0), [base])]
    if not set(rgba[..., 3].ravel()[::97]) - {255}:                                          # opaque picture: its corner colour is a key colour
        key = np.abs(rgba[..., :3].astype(np.int16) - rgba[0, 0, :3]).max(2) <= 12
        if key.mean() > 0.1:
            base[flood(key)] = 0
    for name, (x0, y0, x1, y1) in buttons.items():
        if name not in THUMB.values():
            cut = base[max(int(y0), 0):int(y1), max(int(x0), 0):int(x1)]
            if cut.size:
                lit = cv2.addWeighted(cut, 0.4, np.full_like(cut, 255), 0.6, 0)
                parts.append(Part(name, (max(int(x0), 0), max(int(y0), 0)), [None, premultiply(np.dstack([lit[..., :3], ellipse_alpha(cut.shape)]))]))
    for side, stick in sticks.items():
        parts.append(cap_of(base, side, stick))
    skin = measured(png.stem, geometry.get("controller") or family_of(png.stem), (w, h), parts, width)
    scale = skin.size[0] / w
    skin.buttons = {n: [v * scale for v in b] for n, b in buttons.items()}
    skin.sticks = {s: {"center": [v * scale for v in g["center"]], "travel": [v * scale for v in g["travel"]], "radius": g["radius"] * scale}
                   for s, g in sticks.items()}
    return skin


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
    except (ValueError, OSError) as e:
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
LAYOUTS = {"xbox_360": XBOX, "xbox_one": XBOX, "xbox_series": XBOX, "ps3": SONY, "ps4": SONY, "ps5": SONY, "switch_pro": PRO, "generic": SLAB}
FACES = (("NORTH", 0, -1), ("EAST", 1, 0), ("SOUTH", 0, 1), ("WEST", -1, 0))
FACE_LABELS = {"xbox": "YBAX", "ps": "^ox#", "switch": "XABY", "generic": "4231"}          # north, east, south, west; ^ o x # are drawn shapes
FACE_INKS = {"xbox": ((250, 205, 40), (235, 60, 50), (110, 200, 60), (60, 130, 235)), "ps": ((70, 200, 160), (240, 90, 80), (120, 150, 230), (225, 130, 200)),
             "switch": ((225, 225, 225),) * 4, "generic": ((90, 160, 250), (250, 90, 90), (100, 210, 120), (245, 210, 80))}
SHOULDER_LABELS = {"xbox": ("LB", "RB", "LT", "RT"), "ps": ("L1", "R1", "L2", "R2"), "switch": ("L", "R", "ZL", "ZR"), "generic": ("5", "6", "7", "8")}


def stamp(size, kind, box, stroke=0.0, text=""):
    """One shape as an antialiased mask, uint8 (h, w): drawn four times as large with OpenCV, shrunk by area.

    kind: ellipse, rect (rounded), cross, up, down, left, right (arrows), ^ o x # (face symbols), text. box = [x0, y0, x1, y1] in pixels.
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
    points = {"cross": [(-1, -.34), (-.34, -.34), (-.34, -1), (.34, -1), (.34, -.34), (1, -.34), (1, .34), (.34, .34), (.34, 1), (-.34, 1), (-.34, .34), (-1, .34)],
              "up": [(0, -1), (.9, .8), (-.9, .8)], "down": [(0, 1), (.9, -.8), (-.9, -.8)], "left": [(-1, 0), (.8, .9), (.8, -.9)],
              "right": [(1, 0), (-.8, .9), (-.8, -.9)], "horn": [(-1, 1), (-.7, -.2), (-.2, -.9), (.4, -1), (.8, -.4), (1, 1), (0, .75)], "^": [(0, -.9), (.85, .6), (-.85, .6)], "#": [(-.7, -.7), (.7, -.7), (.7, .7), (-.7, .7)]}.get(kind)
    thick = max(1, int(round(stroke * k))) if stroke else -1
    if kind == "x":
        for sign in (-1, 1):
            cv2.line(mask, (int(cx - .7 * rx), int(cy - sign * .7 * ry)), (int(cx + .7 * rx), int(cy + sign * .7 * ry)), 255, max(thick, 1))
    elif points:
        polygon = np.int32([[cx + px * rx, cy + py * ry] for px, py in points])
        cv2.fillPoly(mask, [polygon], 255) if thick < 0 else cv2.polylines(mask, [polygon], True, 255, thick)
    elif kind in ("ellipse", "o"):
        inset = max(thick, 0) / 2
        cv2.ellipse(mask, (int(cx), int(cy)), (max(int(rx - inset), 1), max(int(ry - inset), 1)), 0, 0, 360, 255, thick)
    else:
        polygon = rounded(x0, y0, x1, y1, min(rx, ry) * 0.6, max(thick, 0) / 2)
        cv2.fillPoly(mask, [polygon], 255) if thick < 0 else cv2.polylines(mask, [polygon], True, 255, thick)
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
    jitter: dict = field(default_factory=dict)  # control -> (dx, dy), and "body" -> offsets of the outline


def brand_of(family):
    """Which labels a family carries: xbox, ps, switch or generic."""
    return "xbox" if family.startswith("xbox") else "ps" if family.startswith("ps") else "switch" if family.startswith("switch") else "generic"


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
            drawn = label if label in ("^", "o", "x", "#", "up", "down", "left", "right") else "text"
            ink(canvas, stamp(size, drawn, inner, 0 if drawn in ("up", "down", "left", "right") else 1.6, label), label_ink)
        return canvas

    rest = one(fill, label_ink, look.line, look.width, box)
    lit, shown = look.lit, fill if fill is not None else look.body or (90, 90, 90)
    x0, y0, x1, y1 = box
    dark_label = label_ink and (mix(lit, (0, 0, 0), 0.8) if sum(lit[:3]) > 380 else (255, 255, 255))
    middle = ((x0 + x1) / 2, (y0 + y1) / 2)
    r = min(x1 - x0, y1 - y0) / 2 * look.blob
    spot = (middle[0] - r, middle[1] - r, middle[0] + r, middle[1] + r)
    return [None if how == "show" else rest, {
        "light": lambda: one(lit, dark_label, look.line, look.width, box) if len(lit) == 3 else ink(rest.copy(), stamp(size, kind, box), lit),
        "white": lambda: one(lit, None, lit, look.width, box),
        "faint": lambda: one(mix(shown, lit, 0.14), label_ink, look.line, look.width, box),
        "blob": lambda: ink(rest.copy(), stamp(size, "ellipse", spot), lit),
        "show": lambda: one(lit, dark_label, look.line, look.width, box),
        "fill": lambda: one(look.line or label_ink or lit, shown, look.line, look.width, box),
        "tint": lambda: one(mix(shown, lit, 0.45), label_ink, look.line, look.width, box),
        "dark": lambda: one(mix(shown, (0, 0, 0), 0.6), label_ink and mix(label_ink, (0, 0, 0), 0.4), look.line, look.width, box),
        "ring": lambda: one(fill, label_ink, lit, max(look.width, 2.5) * 1.4, (x0 - 1, y0 - 1, x1 + 1, y1 + 1)),
        "move": lambda: one(mix(shown, lit, 0.2), label_ink, look.line, look.width, (x0, y0 + 3, x1, y1 + 3)),
        "grow": lambda: one(lit, dark_label, look.line, look.width, (x0 - 3, y0 - 3, x1 + 3, y1 + 3)),
    }[how]()]


def pad_skin(name, family, look):
    """A pad of our own drawing -> Skin. Deterministic in its arguments."""
    place, brand, parts = LAYOUTS[family], brand_of(family), []
    at = lambda control, x, y: (x + look.jitter.get(control, (0, 0))[0], y + look.jitter.get(control, (0, 0))[1])

    def button(control, x, y, rx, ry, kind, label="", label_ink=look.label, how=look.press, fill=look.button, grow=""):
        if control in look.missing:
            return
        x, y = at(control, x, y)
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
        x, y = at("face", *place["face"])
        button(control, x + dx * look.spread, y + dy * look.spread, look.size, look.size, look.shape, label if look.label else "",
               color if look.colored else look.label)
    small = {"xbox": ("left", "right"), "switch": ("-", "+")}.get(brand, ("", ""))
    for control, key, label in (("BACK", "back", small[0]), ("START", "start", small[1])):
        button(control, *place[key], *((5, 9) if brand == "ps" else (8, 7)), "rect" if brand in ("ps", "generic") else "ellipse", label)
    button("GUIDE", *place["guide"], 11, 11, "ellipse", {"xbox": "X", "ps": "P"}.get(brand, "H") if look.label else "")
    dpad_parts(parts, button, look, *at("dpad", *place["dpad"]))
    for side in STICKS:
        stick_parts(parts, button, look, side, *at(side, *place[side]))
    return measured(name, family, PAD_SIZE, parts)


def pad_body(family, look, place):
    """The body's picture, uint8 (290, 400, 4) premultiplied: outline, shading, touch pad, wells."""
    canvas = np.zeros((PAD_SIZE[1], PAD_SIZE[0], 4), np.uint8)
    half = np.float32(place["half"]) + np.float32(look.jitter.get("body", 0))
    half[[0, -1], 0] = 200
    ring = np.concatenate([half, (half * (-1, 1) + (400, 0))[-2:0:-1]])
    smooth = (ring[None] * spline_weights()[:, 0, None, None] + np.roll(ring, -1, 0)[None] * spline_weights()[:, 1, None, None]
              + np.roll(ring, -2, 0)[None] * spline_weights()[:, 2, None, None]).transpose(1, 0, 2).reshape(-1, 2)
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
    kind, how = ("rect", look.press_dpad) if look.dpad != "arrows" else ("", look.press_dpad)
    for control, dx, dy in (("DPAD_UP", 0, -1), ("DPAD_DOWN", 0, 1), ("DPAD_LEFT", -1, 0), ("DPAD_RIGHT", 1, 0)):
        name = control[5:].lower()
        how_here = "show" if look.dpad == "cross" and how in ("light", "grow", "move") else how
        label = name if look.dpad == "four" or (look.dpad == "cross" and how_here != "show") else ""
        button(control, x + dx * 19, y + dy * 19, 8, 8, kind or name, label if look.label else "", how=how_here,
               fill=look.button if kind else look.button or look.label)


def stick_parts(parts, button, look, side, x, y):
    """A stick: its well, its moving cap with the pressed state, and L3 / R3 as a label below where the skin has it so."""
    r, travel, thumb = look.radius, look.travel, THUMB[side]
    ring = {"dot": travel + r * 0.4, "ring": max(r, travel) * 1.1}.get(look.stick, r + travel * 0.7)
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
    pressed = {"tint": lambda: face(mix(cap or look.body or (90, 90, 90), look.lit, 0.45), line, look.width),
               "ring": lambda: face(cap, look.lit, max(look.width, 2.5) * 1.4), "dark": lambda: face(mix(cap or (90, 90, 90), (0, 0, 0), 0.6), line, look.width),
               "fill": lambda: face(line or look.lit, cap, look.width), "faint": lambda: face(mix(cap or (90, 90, 90), look.lit, 0.18), line, look.width)
               }.get(look.press_thumb, lambda: face(look.lit[:3], line, look.width))
    states = [rest, pressed() if look.thumb == "cap" and thumb not in look.missing else rest]
    if look.glow:
        states.append(face(mix(cap or look.body or (90, 90, 90), look.lit, 0.6), line, look.width))
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
        looks[f"{name}_flat"] = Look(body, None, 2, mix(body, black if not pale else white, 0.55), black if pale else white, True,
                                     mix(body, black, 0.6), mix(body, black, 0.3), yellow)
        looks[f"{name}_photo"] = Look(body, None, 2, mix(body, black, 0.6), white if not pale else (220, 220, 220), True, mix(body, black, 0.75),
                                      mix(body, black, 0.45), white, stick="knurl", shade=1.0, radius=24, travel=9, press="tint", press_top="tint")
    for name, line in (("white", white), ("black", black), ("cyan", cyan), ("yellow", yellow)):
        looks[f"{name}_outline"] = Look(None, line, 2.2, None, line, False, None, None, yellow if line != yellow else white, stick="ring", travel=14)
        looks[f"{name}_thin"] = Look(None, line, 1.2, None, line, False, None, None, line, press="fill", press_thumb="fill", stick="dot", radius=22, travel=16)
        looks[f"{name}_glass"] = Look((*mix(line, black, 0.5), 0.35), line, 1.6, (*line, 0.2), line, False, (*line, 0.8), None, yellow, press="show",
                                      press_top="show", trigger="up", travel=14)
    for name, cap in (("white", white), ("dark", dark), ("red", red)):
        looks[f"{name}_bare"] = Look(None, None, 2, (*mix(cap, black, 0.4), 0.5), white, False, cap, None, cyan, dpad="four", thumb="label", travel=20, radius=18,
                                     press="light")
        looks[f"{name}_mono"] = Look(mix(cap, (128, 128, 128), 0.6), black, 2.5, mix(cap, white, 0.3), black, False, cap, (128, 128, 128), red if cap != red else yellow,
                                     dpad="arrows", press="ring", travel=10, radius=22)
    looks["arcade_bars"] = Look((30, 34, 44), (110, 120, 140), 2, (70, 76, 92), white, True, (200, 60, 60), (12, 14, 18), (120, 255, 160), trigger="right", dpad="four")
    looks["paper_bars"] = Look((246, 240, 226), (90, 80, 70), 2, (226, 214, 190), (70, 60, 50), False, (120, 100, 80), (214, 200, 176), (220, 80, 60), trigger="up",
                               press="dark", dpad="arrows")
    return [pad_skin(f"{family}_{name}", family, look) for family in LAYOUTS for name, look in looks.items()]


def random_skin(rng):
    """A pad that no one has seen: family, layout, colours, styles and press effects drawn from rng (np.random.Generator) -> Skin."""
    choose = lambda *options: options[rng.integers(len(options))]
    tone = lambda lo=0, hi=256: tuple(int(v) for v in rng.integers(lo, hi, 3)) if rng.random() < 0.45 else (int(rng.integers(lo, hi)),) * 3
    family = choose(*LAYOUTS)
    body = choose(None, tone(), tone(), tone(0, 70), tone(190, 256))
    if body is not None and rng.random() < 0.2:
        body = (*body, rng.uniform(0.15, 0.7))
    ground = body[:3] if body else tone(0, 120)
    away = lambda color, least: color if abs(sum(color[:3]) - sum(ground)) > least else mix(color, (0, 0, 0) if sum(ground) > 380 else (255, 255, 255), 0.7)
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
    look = Look(body, line, rng.uniform(1, 3.5), button, label, bool(rng.random() < 0.5),
                cap, well, lit, choose(*effects), choose(*calm), choose(*effects), choose(*effects), choose("cap", "cap", "knurl", "knurl", "ring", "dot"),
                choose("cross", "cross", "four", "arrows"), choose("ellipse", "ellipse", "ellipse", "rect"),
                choose("button", "button", "up", "down", "left", "right"), choose("rect", "rect", "horn", "ellipse"),
                choose("cap", "cap", "cap", "cap", "label", "none", "behind"), bool(rng.random() < 0.08), choose(0.0, 0.0, rng.uniform(0.3, 1)),
                rng.uniform(0.7, 1.25), tuple(b for b in ("GUIDE", "BACK", "START", "LEFT_THUMB", "RIGHT_THUMB") if rng.random() < 0.06), choose(0.0, 0.0, rng.uniform(0.3, 1.2)),
                rng.uniform(13, 30), rng.uniform(6.5, 26), rng.uniform(9, 15), 0.0)
    look.spread = look.size * rng.uniform(1.75, 2.3)
    look.jitter = {c: tuple(rng.uniform(-7, 7, 2)) for c in ("left", "right", "dpad", "face", "GUIDE", "BACK", "START", "LEFT_TRIGGER", "RIGHT_TRIGGER")}
    look.jitter["body"] = rng.uniform(-7, 7, (len(LAYOUTS[family]["half"]), 2)).tolist()
    return pad_skin(f"random_{family}", family, look)


# ------------------------------------------------------------------------------------------------------------- video in and out
VIDEO_ENDINGS = {".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".flv", ".ts", ".mpg", ".mpeg", ".wmv", ".ogv", ".gif"}


def open_video(path):
    """cv2.VideoCapture of a file with at least one picture stream; UserError otherwise."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: expected a video file, found nothing there: check the path")
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    if not capture.isOpened() or capture.get(cv2.CAP_PROP_FRAME_WIDTH) < 1:
        raise UserError(f"{path}: expected a video, found no picture stream in it (sound only, cut off or another kind of file): download it again")
    return capture


def video_info(path):
    """{"fps", "size": (w, h), "n": frames by the container's word, which may be wrong or 0}."""
    capture = open_video(path)
    return describe(capture)


def describe(capture):
    """What the container of an open capture says of itself."""
    fps, n = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
    size = int(capture.get(cv2.CAP_PROP_FRAME_WIDTH)), int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
    return {"fps": float(fps) if 1 <= fps <= 1000 else 30.0, "size": size, "n": max(int(n), 0) if n < 1e9 else 0}


def slots(times, fps):
    """Constant rate from presentation times in milliseconds: yields, for each decoded frame, how many rows of the clip it fills.

    1 for every frame of a constant-rate video; 0 drops a frame, 2 or more repeat it, so that row i is what was seen at i / fps.
    """
    start, filled = None, 0
    for time_ms in times:
        start = time_ms if start is None else start
        due = int(np.floor((time_ms - start) * fps / 1000 + 0.75)) + 1 if time_ms > start else filled + 1     # late by 1/4 frame still counts as on time
        count = max(due - filled, 0) if abs(due - filled) < fps * 10 else 1                                # a jump of 10 s is a broken clock, not a pause
        filled += count
        yield count


def decode(path):
    """Decode once, in order: yields (row number, uint8 (h, w, 3) BGR as OpenCV gives it, number of rows it fills)."""
    capture = open_video(path)
    fps, row, clock = describe(capture)["fps"], 0, Clock()
    fills = slots(clock, fps)
    while capture.grab():
        clock.time = capture.get(cv2.CAP_PROP_POS_MSEC)
        count = next(fills)
        if count:
            ok, bgr = capture.retrieve()
            if not ok:
                return
            yield row, bgr, count
            row += count


class Clock:
    """An endless iterator over the time last put into .time, so that slots() stays a plain generator."""
    time = 0.0

    def __iter__(self):
        return self

    def __next__(self):
        return self.time


def read_video(path):
    """Yields (row number, uint8 (h, w, 3) RGB) at the constant rate video_info(path)["fps"]."""
    for row, bgr, count in decode(path):
        rgb = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
        for k in range(count):
            yield row + k, rgb


class VideoWriter:
    """Write RGB frames to .mp4 (mp4v) or .webm (VP9, which browsers play); the file gets its name when closed."""

    def __init__(self, path, fps, size):
        self.path = Path(path)
        codec = {".mp4": "mp4v", ".webm": "VP90", ".avi": "MJPG"}.get(self.path.suffix.lower())
        if codec is None:
            raise UserError(f"{path}: expected a name ending in .mp4, .webm or .avi: give another --out")
        if not self.path.absolute().parent.is_dir():
            raise UserError(f"{path}: expected a folder to write into, found none: make {self.path.parent} first")
        self.tmp = self.path.with_name(self.path.stem + ".tmp" + self.path.suffix)
        self.writer = cv2.VideoWriter(str(self.tmp), cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*codec), fps, tuple(size))
        if not self.writer.isOpened():
            raise UserError(f"{path}: can't open a {codec} encoder for {tuple(size)} at {fps} frames/s: try a name ending in .avi")

    def add(self, rgb):
        """Append one uint8 (h, w, 3) RGB frame."""
        self.writer.write(cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))

    def close(self):
        """Finish the file and give it its name."""
        self.writer.release()
        os.replace(self.tmp, self.path)

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace):
        self.writer.release()
        if kind is None:
            self.close()
        else:
            self.tmp.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------------------- the clip folder
QUALITY = 90                                       # JPEG: about 1-2 GB an hour of 256 x 256 frames at 30 a second, 2,000 decodes a second a core


class FramesWriter:
    """JPEGs back to back in NAME.npy, uint8 (bytes,), with NAME_index.npy, int64 (m+1, 2): [row number, byte offset], last [n, total]."""

    def __init__(self, folder, name, quality=QUALITY):
        self.path, self.index_path, self.quality = Path(folder) / f"{name}.npy", Path(folder) / f"{name}_index.npy", quality
        self.tmp, self.index, self.total = self.path.with_name(self.path.name + ".tmp"), [], 0
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
        index = np.array([*self.index, (n, self.total)], np.int64)
        os.replace(self.tmp, self.path)
        write_npy(self.index_path, index)


def write_npy(path, array):
    """np.save under a temporary name, then renamed."""
    def write(tmp):
        with open(tmp, "wb") as f:
            np.save(f, array)
    write_atomic(path, write)


def read_npy(path, dtype, dims):
    """A memory-mapped .npy of a given dtype and number of dimensions; UserError names the file."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path}: expected this file of the clip, found none: run the stage that makes it again") from None
    except (ValueError, OSError, EOFError) as e:
        raise UserError(f"{path}: expected a whole .npy file, found {e}: delete the clip folder and run its stage again") from None
    if array.dtype != dtype or array.ndim != dims:
        raise UserError(f"{path}: expected {np.dtype(dtype)} with {dims} dimensions, found {array.dtype} {array.shape}: delete the clip folder and run its stage again")
    return array


class Frames:
    """Random access to the JPEGs of a clip: len(frames), frames[i] -> uint8 (h, w, 3) RGB, frames.numbers -> int64 (m,) rows of the clip."""

    def __init__(self, folder, name="frames"):
        self.path = Path(folder) / f"{name}.npy"
        self.data = read_npy(self.path, np.uint8, 1)
        index = np.array(read_npy(self.path.with_name(f"{name}_index.npy"), np.int64, 2))
        if index.shape[1:] != (2,) or not len(index) or index[-1, 1] != len(self.data) or (np.diff(index[:, 1]) < 0).any():
            raise UserError(f"{self.path}: expected an index that fits its {len(self.data)} bytes, found another: delete the clip folder and run its stage again")
        self.numbers, self.offsets, self.n = index[:-1, 0], index[:, 1], int(index[-1, 0])

    def __len__(self):
        return len(self.numbers)

    def bytes(self, i):
        """The ith JPEG, uint8 (k,)."""
        return np.asarray(self.data[self.offsets[i]:self.offsets[i + 1]])

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        jpeg = self.bytes(i)
        bgr = cv2.imdecode(jpeg, cv2.IMREAD_COLOR) if len(jpeg) else None
        if bgr is None:
            raise UserError(f"{self.path}: expected a JPEG as frame {i}, found broken bytes: delete the clip folder and run its stage again")
        return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)


def read_clip(folder):
    """clip.json of a clip folder as a dict."""
    return read_json(Path(folder) / "clip.json", dict)


def clips_in(data):
    """The whole clip folders under DATA, sorted by name; UserError when there is none."""
    data = Path(data)
    folders = sorted(p.parent for p in data.glob("*/clip.json") if not p.parent.name.endswith(".tmp")) if data.is_dir() else []
    if not folders:
        raise UserError(f"{data}: expected a folder of clips (each with clip.json), found none: make them with extract.py or play.py --record")
    return folders


def shard(items):
    """This process's share of a list of work under torchrun or Slurm (RANK / WORLD_SIZE or SLURM_PROCID / SLURM_NTASKS)."""
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))
    world = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", 1)))
    return list(items)[rank::world]
