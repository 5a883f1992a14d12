"""Write pads of our own drawing as OBS input-overlay presets: python export_pads.py weights/pads

80 of eight families in ten looks, one with bright caps, 100 at random (seeds 0 to 99). Read back, they draw the
same pictures to the last bit.
"""
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

import extract

LOOKS = ("dark_flat dark_photo light_flat light_photo blue_flat white_outline white_thin black_glass dark_mono "
         "paper_bars").split()
GROW = ("", "up", "down", "left", "right")


def drawn():
    """Yields Skins with the names that they get."""
    for family in extract.LAYOUTS:
        for look in LOOKS:
            yield extract.pad_skin(f"{family}_{look}", family, extract.Look(**extract.PADS["looks"][look]))
    yield extract.pad_skin("xbox_360_yellow_caps", "xbox_360", extract.Look(cap=(255, 240, 80)))
    for seed in range(100):
        skin = extract.random_skin(np.random.default_rng(seed))
        skin.name = f"random_{seed:03d}_{skin.family}"
        yield skin


def element(part):
    """What a preset says of a part, but for its place in the atlas."""
    codes = {name: int(code) for code, name in list(extract.PADS["obs_buttons"].items())[::-1]}
    told = {"type": 0, "pos": list(map(int, part.at))}
    if part.control in extract.STICKS:
        told |= {"type": 5, "side": [*extract.STICKS].index(part.control), "stick_radius": float(part.travel[0])}
    elif "TRIGGER" in part.control:
        told |= {"type": 6, "side": int("RIGHT" in part.control), "trigger_mode": int(not part.grow),
                 "direction": max(1, GROW.index(part.grow))}
    elif part.control:
        told |= {"type": 2, "code": codes[part.control]}
    return told


def column(part):
    """A part's sprites below each other, as an atlas has them -> uint8 (h, w, 4), size of one."""
    sprites = part.sprites[:2]
    h, w = np.max([s.shape[:2] for s in sprites if s is not None], 0)
    cells = []
    for sprite in sprites:
        sprite = np.zeros((h, w, 4), np.uint8) if sprite is None else sprite
        sprite = np.pad(sprite, ((0, h - sprite.shape[0]), (0, w - sprite.shape[1]), (0, 0)))
        cells += [sprite, np.zeros((extract.OBS_GAP, w, 4), np.uint8)]
    return np.concatenate(cells[:-1]), (int(w), int(h))


def straight(premultiplied):
    alpha = premultiplied[..., 3:].astype(float)
    rgb = np.rint(premultiplied[..., :3] * 255.0 / np.maximum(alpha, 1)).clip(0, 255)
    return np.dstack([np.where(alpha > 0, rgb, 0), alpha]).astype(np.uint8)


for skin in drawn():
    cells = sorted(((*column(part), element(part), i) for i, part in enumerate(skin.parts)), key=lambda c: -len(c[0]))
    atlas, x, y, high = np.zeros((4000, 512, 4), np.uint8), 0, 0, 0
    for picture, size, told, _ in cells:
        h, w = picture.shape[:2]
        if x + w > 512:
            x, y, high = 0, y + high + 3, 0
        atlas[y:y + h, x:x + w] = picture
        told["mapping"] = [x, y, *size]
        x, high = x + w + 3, max(high, h)
    folder = Path(sys.argv[1], skin.name)
    folder.mkdir(parents=True)
    Image.fromarray(straight(atlas[:y + high])).save(folder / "pad.png", optimize=True)
    preset = {"overlay_width": skin.size[0], "overlay_height": skin.size[1],
              "elements": [told for *_, told, i in sorted(cells, key=lambda c: c[3])]}
    (folder / "pad.json").write_text(json.dumps(preset, separators=(",", ":")) + "\n")
