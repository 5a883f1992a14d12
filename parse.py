"""parse.py: read buttons and sticks from the overlay crops (NitroGen, arXiv 2601.02427, section 3.1).

    python parse.py run DATA [--ckpt weights/parser.safetensors]        read every clip folder of DATA
    python parse.py eval DATA [--sheet FILE.png --out FILE.json]        score the clips that have truth.npy
    python parse.py train --out FILE [--skins DIR --ckpt FILE]          train the reader, or fit it to your own skin

In, per clip folder (extract.py): clip.json with the template's geometry; pads.npy + pads_index.npy, one crop a video frame;
template.png uint8 (h, w, 4). Out, beside them:
    actions.npy     float32 (n, 25)   0 or 1 buttons, sticks in [-1, 1], y down; what the skin does not show is 0
    confidence.npy  float32 (n,)      0..1: is the pad there, and is it read with certainty
    keep.npy        bool (n,)         the frame may start a training chunk [paper: at least half of the chunk's steps act]

How: each control is cut out of the crop at one scale ("close-up": a stick's travel, or a button's box, has always the same
size), from the previous frame, from the current frame [paper: a pair of frames] and from the pad at rest, which is the video's
own median picture [ours]. Two narrow SegFormers (arXiv 2105.15203): one reads a stick's close-ups into an 11 x 11 grid [paper: a
segmentation, much better than regression], one a button's into one logit. Reads are then smoothed over the whole video.
"""
import copy
import json
import math
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import extract
from extract import BUTTON, BUTTONS, LEGACY, STICKS, THUMB, Busy, UserError

GRID = 11                                  # cells a side of a stick's grid [paper]: -1, -0.8 ... 1
STRIDE, SUB = 4, 3                         # a token of the finest map covers 4 x 4 pixels and tells 3 x 3 cells of the grid
STICK_SIDE, BUTTON_SIDE = 57, 33           # pixels of a close-up: 4 k + 1, so that the middle token sits on the middle pixel
TRAVEL = (GRID - 1) / 2 * STRIDE / SUB     # pixels from rest to full tilt in a stick's close-up; the rest of it holds the cap
BOX = 20                                   # pixels of a button's box in its close-up, both ways
LABEL_WIDTH = 0.12                         # sd of the grid's label: about half a cell (0.1 - 0.15 decode best)
SAMPLES = 128                              # frames that the pad at rest is made from
PIECE, OVERLAP = 4096, 1024                # frames that are smoothed at once, and that are looked at on both sides of them
VERY_SKIN = 0.85                           # median likeness of template and video that show one skin; another brand's pad: below, a sibling: up to 0.9
CKPT = Path(__file__).parent / "weights" / "parser.safetensors"

# ------------------------------------------------------------------------------------------------------------- the net: SegFormer
# sizes: (widths, blocks a stage, heads, reduction of keys, MLP ratio, head width). mit-b0 .. b2 as published; narrow is the default
PRESETS = {
    "narrow": dict(dims=(24, 48, 80, 112), depths=(1, 1, 1, 1), heads=(1, 2, 4, 4), sr=(4, 2, 1, 1), mlp=3, head=64, join="depth"),
    "b0": dict(dims=(32, 64, 160, 256), depths=(2, 2, 2, 2), heads=(1, 2, 5, 8), sr=(8, 4, 2, 1), mlp=4, head=256, join="width"),
    "b1": dict(dims=(64, 128, 320, 512), depths=(2, 2, 2, 2), heads=(1, 2, 5, 8), sr=(8, 4, 2, 1), mlp=4, head=256, join="width"),
    "b2": dict(dims=(64, 128, 320, 512), depths=(3, 4, 6, 3), heads=(1, 2, 5, 8), sr=(8, 4, 2, 1), mlp=4, head=768, join="width"),
}


def as_map(x, hw):
    """Tokens (B, N, D) -> map (B, D, h, w), a view: in memory the channels stay last, which convolutions on a CPU like best."""
    return x.transpose(1, 2).unflatten(2, hw)


class Patches(nn.Module):
    """Overlapping patches: a strided convolution, then a norm over channels."""

    def __init__(self, cin, cout, kernel, stride):
        super().__init__()
        self.proj = nn.Conv2d(cin, cout, kernel, stride, kernel // 2)
        self.layer_norm = nn.LayerNorm(cout)

    def forward(self, x):                                                      # (B, C, H, W)
        x = self.proj(x)
        return self.layer_norm(x.flatten(2).transpose(1, 2)), x.shape[2:]      # (B, N, D)


class Attention(nn.Module):
    """Self-attention whose keys and values come from a map made sr times smaller; nested as the published files name it."""

    def __init__(self, d, heads, sr):
        super().__init__()
        self.heads, self.self, self.output = heads, nn.Module(), nn.Module()
        for name in ("query", "key", "value"):
            self.self.add_module(name, nn.Linear(d, d))
        if sr > 1:
            self.self.sr = nn.Conv2d(d, d, sr, sr)
            self.self.layer_norm = nn.LayerNorm(d)
        self.output.dense = nn.Linear(d, d)

    def forward(self, x, hw):                                                  # (B, N, D)
        B, N, D = x.shape
        kv = x
        if hasattr(self.self, "sr"):
            kv = self.self.sr(as_map(x, hw)).flatten(2).transpose(1, 2)
            kv = self.self.layer_norm(kv)                                      # (B, N / sr^2, D)
        q, k, v = (layer(t).view(B, -1, self.heads, D // self.heads).transpose(1, 2)
                   for layer, t in ((self.self.query, x), (self.self.key, kv), (self.self.value, kv)))
        x = F.scaled_dot_product_attention(q, k, v)                            # (B, heads, N, D / heads)
        return self.output.dense(x.transpose(1, 2).reshape(B, N, D))


class MixFFN(nn.Module):
    """An MLP with a 3 x 3 depthwise convolution inside: its zero padding is all that tells a token where it is."""

    def __init__(self, d, hidden):
        super().__init__()
        self.dense1, self.dense2, self.dwconv = nn.Linear(d, hidden), nn.Linear(hidden, d), nn.Module()
        self.dwconv.dwconv = nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden)

    def forward(self, x, hw):
        x = self.dwconv.dwconv(as_map(self.dense1(x), hw))                     # (B, hidden, h, w)
        return self.dense2(F.gelu(x.flatten(2).transpose(1, 2)))               # (B, N, D)


class Block(nn.Module):
    """x + attention, then x + feed-forward, each after its norm (arXiv 2105.15203, Sec. 3.1)."""

    def __init__(self, d, heads, sr, mlp):
        super().__init__()
        self.layer_norm_1, self.attention = nn.LayerNorm(d), Attention(d, heads, sr)
        self.layer_norm_2, self.mlp = nn.LayerNorm(d), MixFFN(d, mlp * d)

    def forward(self, x, hw):
        x = x + self.attention(self.layer_norm_1(x), hw)
        return x + self.mlp(self.layer_norm_2(x), hw)


class Encoder(nn.Module):
    """MiT: four stages at strides 4, 8, 16, 32."""

    def __init__(self, cin, dims, depths, heads, sr, mlp):
        super().__init__()
        first, later = Patches(cin, dims[0], 7, STRIDE), [Patches(a, b, 3, 2) for a, b in zip(dims, dims[1:])]
        self.patch_embeddings = nn.ModuleList([first, *later])
        self.block = nn.ModuleList(nn.ModuleList(Block(d, h, s, mlp) for _ in range(n)) for d, n, h, s in zip(dims, depths, heads, sr))
        self.layer_norm = nn.ModuleList(nn.LayerNorm(d) for d in dims)

    def forward(self, x):                                                      # (B, C, H, W)
        maps = []
        for embed, blocks, norm in zip(self.patch_embeddings, self.block, self.layer_norm):
            x, hw = embed(x)
            for block in blocks:
                x = block(x, hw)
            x = as_map(norm(x), hw)                                            # (B, D, H / stride, W / stride)
            maps.append(x)
        return maps


class Head(nn.Module):
    """All-MLP head. The published order is project, upsample, join, fuse; projection and fusion are both linear, so their product
    is applied at each stage's own resolution and the results are upsampled and summed: equal numbers at a tenth of the cost."""

    def __init__(self, dims, d, labels):
        super().__init__()
        self.linear_c = nn.ModuleList(nn.Module() for _ in dims)
        for module, c in zip(self.linear_c, dims):
            module.proj = nn.Linear(c, d)
        self.linear_fuse = nn.Conv2d(d * len(dims), d, 1, bias=False)
        self.batch_norm = nn.BatchNorm2d(d)
        self.classifier = nn.Conv2d(d, labels, 1)

    def forward(self, maps):
        fuse = self.linear_fuse.weight[:, :, 0, 0].chunk(len(maps), 1)[::-1]   # joined coarse to fine, so turned round
        total = 0
        for x, module, f in zip(maps, self.linear_c, fuse):
            x = F.conv2d(x, (f @ module.proj.weight)[..., None, None], f @ module.proj.bias)
            if x.shape[2:] != maps[0].shape[2:]:
                x = F.interpolate(x, maps[0].shape[2:], mode="bilinear", align_corners=False)
            total = total + x                                                  # (B, d, H / 4, W / 4)
        return self.classifier(F.relu(self.batch_norm(total)))                 # (B, labels, H / 4, W / 4)


class SegFormer(nn.Module):
    """SegFormer with the parameter names of the files on the Hugging Face hub (`nvidia/mit-b0`), so that those load by name."""

    def __init__(self, dims, depths, heads, sr, mlp, head, labels, cin=3, join="width"):
        super().__init__()
        self.join, self.segformer = join, nn.Module()
        self.segformer.encoder = Encoder(cin, dims, depths, heads, sr, mlp)
        self.decode_head = Head(dims, head, labels)

    def forward(self, x):                                                      # (B, C, H, W) -> (B, labels, H / 4, W / 4)
        return self.decode_head(self.segformer.encoder(x))


class Parser(nn.Module):
    """Two SegFormers of one preset: one reads sticks (grid and click), one reads buttons, from montages of three panels.

    join "width": previous | current | rest side by side in space, as the paper joins its pair (published weights fit).
    join "depth": the three panels stacked as channels: the same picture elements meet in the first convolution.
    """

    def __init__(self, preset="narrow", **sizes):
        super().__init__()
        self.config = {"kind": "nitrogen-parser", "preset": preset, **PRESETS[preset], **sizes}
        arch = {k: v for k, v in self.config.items() if k not in ("kind", "preset")}
        cin = 9 if arch["join"] == "depth" else 3
        self.stick = SegFormer(**arch, cin=cin, labels=SUB * SUB + 1)
        self.button = SegFormer(**arch, cin=cin, labels=1)
        self.to(memory_format=torch.channels_last)

    def montage(self, panels, mask=None):
        """uint8 (B, 3, S, S, 3) close-ups -> float montage. Contrast is stretched over all panels together; masked panels are 0."""
        x = panels.float()
        mask = x.new_ones(x.shape[:2]) if mask is None else mask
        mask = mask[:, :, None, None, None]
        weight = mask / mask.sum(1, keepdim=True)
        var, mean = torch.var_mean(x[:, :, ::2, ::2], (2, 3), correction=0, keepdim=True)        # (B, panel, 1, 1, C)
        center = (mean * weight).sum(1, keepdim=True)                          # each colour's mean over the panels that are there
        var = ((var + (mean - center).square()) * weight).sum(1, keepdim=True).mean(-1, keepdim=True)
        x = (x - center) * (mask / (var.sqrt() + 6))                           # 6 grey levels: noise is not blown up
        if self.config["join"] == "depth":
            return x.permute(0, 2, 3, 1, 4).flatten(3).permute(0, 3, 1, 2)     # (B, 9, S, S)
        x = F.pad(x, (0, 0, 0, -x.shape[3] % STRIDE))                          # panels side by side, a whole number of tokens each
        return x.permute(0, 4, 2, 1, 3).flatten(3)                             # (B, 3, S, 3 S')

    def middle(self, maps):
        """The current frame's part of the output map."""
        if self.config["join"] == "depth":
            return maps
        w = maps.shape[-1] // 3
        return maps[..., w:2 * w]

    def sticks(self, panels, mask=None):
        """uint8 (B, 3, S, S, 3) -> log of the grid (B, 11, 11) [row = y, column = x], logit of the click (B,)."""
        out = self.middle(self.stick(self.montage(panels, mask)))
        cells = F.pixel_shuffle(out[:, :SUB * SUB], SUB)[:, 0]                 # (B, cells, cells): one cell = 0.2 of the travel
        edge = (cells.shape[-1] - GRID) // 2
        grid = cells[:, edge:edge + GRID, edge:edge + GRID]
        return F.log_softmax(grid.flatten(1), 1).view(-1, GRID, GRID), out[:, SUB * SUB].mean((1, 2))

    def buttons(self, panels, mask=None):
        """uint8 (B, 3, S, S, 3) -> logit of "pressed" (B,)."""
        return self.middle(self.button(self.montage(panels, mask)))[:, 0, 2:-2, 2:-2].mean((1, 2))     # the box, not its neighbours


def save_parser(path, model, **extra):
    """One safetensors file; its header holds {config, ...} as one JSON string."""
    header = json.dumps({"config": model.config, **extra})
    tensors = {k: v.detach().contiguous() for k, v in model.state_dict().items()}
    extract.write_atomic(path, lambda tmp: tmp.write_bytes(save(tensors, {"parser": header})))


def load_parser(path):
    """A file of save_parser -> Parser in eval mode. Names the first tensor that does not fit."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no weights at {path}: give --ckpt FILE, or train them: python parse.py train --out {path}")
    try:
        with safe_open(str(path), "pt") as f:
            header = json.loads((f.metadata() or {}).get("parser", "null"))
        tensors = load_file(str(path)) if header else None
    except Exception as e:                                                     # safetensors raises its own class for any damage
        raise UserError(f"{path}: expected a safetensors file of parse.py, found {type(e).__name__}: {e}: copy it again or train it anew") from None
    try:
        config = dict(header["config"])
        sizes = np.hstack([v for v in config.values() if type(v) is not str])  # all that is a number, in lists or alone
        if config.pop("kind") != "nitrogen-parser" or sizes.dtype != int or not (1 <= sizes.min() <= sizes.max() <= 1024):
            raise ValueError("not a parser's config: sizes are whole numbers, 1 to 1024")
        if any(d % h for d, h in zip(config["dims"], config["heads"])):
            raise ValueError("dims are not multiples of heads")
        with torch.device("meta"):                                             # sizes first: a header may ask for any amount of memory
            want = Parser(**config).state_dict()
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError, RuntimeError) as e:
        raise UserError(f"{path}: expected parser weights, found weights of another kind ({type(e).__name__}: {e}): "
                        "use weights/parser.safetensors or parse.py train") from None
    for name in sorted(set(want) | set(tensors)):
        expected, found = (tuple(state[name].shape) if name in state else "no such tensor" for state in (want, tensors))
        if expected != found:
            raise UserError(f"{path}: tensor {name}: expected {expected}, found {found}: the file is of another version, train it again")
        if not tensors[name].isfinite().all():
            raise UserError(f"{path}: tensor {name}: expected finite weights, found NaN or infinity: copy it again or train it anew")
    model = Parser(**config)
    model.load_state_dict(tensors)
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------- the close-ups
class Cutter:
    """Cuts the close-ups of one geometry (template pixels) out of crops of one size, pad = (width, height)."""

    def __init__(self, geometry, pad):
        fx, fy = pad[0] / geometry["size"][0], pad[1] / geometry["size"][1]    # template pixels -> crop pixels
        self.sticks = [s for s in STICKS if s in geometry["sticks"]]
        self.buttons = [b for b in BUTTONS if b in geometry["buttons"] and b not in LEGACY]
        self.known = {s: bool(geometry["sticks"][s].get("travel")) and not geometry.get("borrowed") for s in self.sticks}
        centers, steps = [], []
        for s in self.sticks:
            stick = geometry["sticks"][s]
            travel = stick.get("travel") or [stick.get("radius", geometry["size"][0] / 16) / 2] * 2     # unknown: half the cap's radius
            centers.append((stick["center"][0] * fx, stick["center"][1] * fy))
            steps.append((travel[0] * fx / TRAVEL, travel[1] * fy / TRAVEL))
        self.stick_map = closeup_map(centers, steps, STICK_SIDE)
        boxes = np.float32([geometry["buttons"][b] for b in self.buttons]).reshape(-1, 4) * (fx, fy, fx, fy)
        sides = np.maximum(boxes[:, 2:] - boxes[:, :2], 4)
        self.button_map = closeup_map((boxes[:, :2] + boxes[:, 2:]) / 2, sides / BOX, BUTTON_SIDE)

    def __call__(self, crop):
        """uint8 (h, w, 3) -> [sticks uint8 (sticks, 57, 57, 3), buttons uint8 (buttons, 33, 33, 3)]."""
        return [closeups(crop, self.stick_map, STICK_SIDE), closeups(crop, self.button_map, BUTTON_SIDE)]

    def all(self, crops):
        """Crops of n frames -> the same two arrays with n in front."""
        return [np.stack(kind) for kind in zip(*map(self, crops))]


def closeups(crop, maps, side):
    """The close-ups that closeup_map laid out, uint8 (k, side, side, 3)."""
    if len(maps[0]) == 0:                                                      # remap takes no empty maps
        return np.zeros((0, side, side, 3), np.uint8)
    return cv2.remap(crop, *maps, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE).reshape(-1, side, side, 3)


def closeup_map(centers, steps, side):
    """Where each pixel of the close-ups lies in the crop: two float32 (k side, side) maps for cv2.remap."""
    i = np.arange(side, dtype=np.float32) - (side - 1) / 2
    c, s = np.float32(centers).reshape(-1, 2, 1), np.float32(steps).reshape(-1, 2, 1)
    at = c + i * s - 0.5                                                       # (k, xy, side); a pixel's middle is at + 0.5
    x = np.broadcast_to(at[:, 0, None, :], (len(at), side, side))
    y = np.broadcast_to(at[:, 1, :, None], (len(at), side, side))
    return np.ascontiguousarray(x.reshape(-1, side)), np.ascontiguousarray(y.reshape(-1, side))


def on_stick(box, stick):
    """Does this box of L3 / R3 (None: not shown) lie on the stick itself, and not on a label beside it?"""
    if box is None:
        return False
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return math.hypot(x - stick["center"][0], y - stick["center"][1]) < stick["radius"]


# ------------------------------------------------------------------------------------------------------------------------ decoding
def decode(p):
    """Grids (n, 11, 11) of probability -> values (n, 2) one frame at a time: the mean place over the 3 x 3 window around the peak. Better
    than argmax (steps of 0.2) and than the mean over all cells (drawn to 0 by diffuse mass)."""
    peak = np.stack(np.divmod(p.reshape(len(p), GRID ** 2).argmax(1), GRID), 1)
    at = peak[:, :, None] + np.arange(3)                                       # rows and columns of the window in the padded grid
    window = np.pad(p, ((0, 0), (1, 1), (1, 1)))[np.arange(len(p))[:, None, None], at[:, 0, :, None], at[:, 1, None, :]] + 1e-9
    window /= window.sum((1, 2), keepdims=True)
    offset = np.stack([(window.sum(1) * (-1, 0, 1)).sum(1), (window.sum(2) * (-1, 0, 1)).sum(1)], 1)
    return np.clip((peak[:, ::-1] + offset) * 2 / (GRID - 1) - 1, -1, 1).astype(np.float32)


def expect(p):
    """Posterior grids (n, 11, 11) -> values (n, 2), the mean over all cells: the least squared error where a posterior has several peaks
    (what smooth_grids leaves is free of diffuse mass), and their spread (n,), 1 standard deviation."""
    cells = np.linspace(-1, 1, GRID)
    x, y = p.sum(1), p.sum(2)                                                  # (n, 11) each
    mean = np.stack([x @ cells, y @ cells], 1)
    return mean.astype(np.float32), np.sqrt(np.maximum((x + y) @ cells ** 2 - (mean ** 2).sum(1), 0))


def smooth(e, transition, prior, trust, own):
    """Forward-backward: log likelihoods e (n, k, states) of k controls in n frames -> posterior (n, k, states) given all frames.
    transition (states, states): row = state now, column = next; prior (states,): of the first frame. What the other frames say counts
    `trust` <= 1, since errors of neighbouring frames are alike (same skin, same scene behind); the frame itself counts `own`."""
    e = e - e.max(-1, keepdims=True)
    others = np.exp(trust * e) + 1e-12
    forward, backward = range(len(e)), range(len(e) - 1, -1, -1)
    passes = []
    for order, matrix, message in ((forward, transition, prior), (backward, transition.T, np.ones_like(prior))):
        out = np.empty_like(others)
        for t in order:
            out[t] = message                                                   # what the frames on this side say of frame t
            message = (message * others[t]) @ matrix
            message = message / message.sum(-1, keepdims=True)
        passes.append(out)
    p = passes[0] * passes[1] * (np.exp(own * e) + 1e-12)
    return p / p.sum(-1, keepdims=True)


def smooth_grids(log_p, trust=0.3, own=0.8):
    """Log grids (n, k, 11, 11) of k sticks -> posterior, same shape. A dark cap over a dark scene tells little in one frame; its
    neighbours tell the rest. From frame to frame a stick stays, moves by a cell or so, or goes anywhere, most often home.

    The net's answer holds how often the teacher's sticks are in a cell; that is divided out first, or home would win each doubt."""
    i = np.arange(GRID)
    near = np.exp(-0.5 * ((i[:, None] - i) / 1.2) ** 2)
    near /= near.sum(1, keepdims=True)
    home = labels(torch.zeros(1, 2)).numpy().ravel().astype(np.float64)
    prior = 0.36 * home + 0.64 / GRID ** 2                                     # some 0.4 of play()'s frames are at rest
    transition = 0.3 * np.eye(GRID ** 2) + 0.4 * np.kron(near, near) + 0.3 * prior
    e = log_p.reshape(*log_p.shape[:2], -1).astype(np.float64) - np.log(prior)
    return smooth(e, transition, prior, trust, own).reshape(log_p.shape)


def smooth_buttons(logits, press=0.2, release=0.4, trust=0.8):
    """Logits (n, k) of k buttons -> probability of "pressed" (n, k) given all frames. press, release: how probable these are from one
    frame to the next; high enough that a tap of two frames, read plainly, is not smoothed away."""
    e = np.stack([np.zeros(logits.shape), np.clip(logits, -20, 20)], -1)       # (n, k, 2): off, on
    transition = np.array([[1 - press, press], [release, 1 - release]])
    prior = np.array([release, press]) / (press + release)
    return smooth(e, transition, prior, trust, 1.0)[..., 1]


def level(logits, fixed):
    """Logits (n, k) -> the same with each button's own threshold at 0: where a video's logits fall into two groups, pressed and not, their
    middle is a better threshold than the net's. fixed bool (k,): the button has its place, it does not lie on a moving cap.

    Two groups are pressed and not where the net calls the upper one pressed and they are apart; or, whatever the net calls it, where they are
    tight, nothing lies between them and they come and go, as no scene behind a see-through pad does. Else a button stays as it is."""
    out, n = logits.copy(), len(logits)
    if n < 8:                                                                  # too few for two groups of four
        return out
    for j, x in enumerate(out.T):                                              # a view: changed in place
        ranked, k = np.sort(x), np.arange(1, n)                                # k frames in the lower group, n - k in the upper
        total = np.cumsum(ranked)[:-1]
        lows, highs = total / k, (ranked.sum() - total) / (n - k)              # the groups' means at each split
        best = (k * (n - k) * (highs - lows) ** 2).argmax()                    # Otsu's split: the largest variance between the groups
        low, high, few = lows[best], highs[best], k[best]
        spread = np.sqrt((ranked[:few].var() * few + ranked[few:].var() * (n - few)) / n)
        middle, apart, fewer = (low + high) / 2, high - low, min(few, n - few)
        between = (np.abs(x - middle) < apart / 6).sum()
        switches = np.count_nonzero(np.diff(x > middle))
        if fewer >= 4 and apart >= 2 and apart > 3.5 * spread and high > 1:
            x -= np.clip(middle, -2, 2)
        elif fixed[j] and fewer >= 4 and apart > max(7 * spread, 0.8) and high > -2 and between <= fewer / 20 and switches >= 8:
            x -= middle
        else:
            continue
        x *= max(1, 6 / apart)
    return out


def decisive(pressed, logits):
    """Reads bool (n, k) and their logits -> the reads without buttons whose plainest press is not plain: a scene that shines through
    a thin-lined button looks a little like a press for as long as it is there, and the longer a button was really held, the plainer
    is its best frame."""
    out = pressed.copy()
    for j in np.flatnonzero(pressed.any(0)):
        frames = pressed[:, j]
        plain = min(1 + 0.2 * math.log2(frames.sum()), 2.5)
        if logits[frames, j].max() < plain:
            out[:, j] = False
    return out


def normalise(values, known):
    """Per video [paper: centre at rest, 99th percentile as scale], guarded: values float32 (n, 2) of one stick -> the same, in [-1, 1].

    Known travel: trusted as it is. Unknown: the centre is the mode (a mean is wrong when a stick is pushed one way only); one
    scale for both axes (an axis that is never used must not be blown up); a stick that hardly moves keeps its scale.
    """
    if known or len(values) < 30:
        return values
    counts, xs, ys = np.histogram2d(values[:, 0], values[:, 1], bins=21, range=[[-1.05, 1.05]] * 2)
    i, j = np.unravel_index(counts.argmax(), counts.shape)
    centre = np.array([xs[i] + xs[i + 1], ys[j] + ys[j + 1]]) / 2
    near = np.abs(values - centre).max(1) < 0.1
    if near.mean() < 0.1 or np.abs(centre).max() > 0.5:                        # never at rest long enough to say where rest is
        return values
    values = values - values[near].mean(0)
    reach = np.percentile(np.hypot(*values.T), 99)
    return np.clip(values / reach, -1, 1).astype(np.float32) if reach > 0.3 else values.astype(np.float32)


# ------------------------------------------------------------------------------------------------------------------------- reading
def open_clip(folder):
    """A clip folder -> clip dict, pads (Frames), after checking that they belong together; a recorder's clip has no overlay: pads None."""
    clip = extract.read_clip(folder)
    if not clip.get("box"):
        return clip, None
    pads = extract.Frames(folder, "pads")
    if len(pads) == 0 or "pad" not in clip or "geometry" not in clip:
        raise UserError(f"{folder}: expected crops and their geometry, found {len(pads)} crops: cut the clip again with extract.py")
    size, geometry = list(pads[0].shape[1::-1]), clip["geometry"]
    if size != clip["pad"]:
        raise UserError(f"{folder}: clip.json says crops of {clip['pad']}, pads.npy holds {size}: cut the clip again with extract.py")
    try:                                                                       # everything that reading asks of a geometry, tried once
        with np.errstate(all="ignore"):
            cutter = Cutter(geometry, clip["pad"])
        for side in cutter.sticks:
            on_stick(geometry["buttons"].get(THUMB[side]), geometry["sticks"][side])
        if not all(np.isfinite(m).all() for m in (*cutter.stick_map, *cutter.button_map, width_in_video(clip))):
            raise ValueError("numbers that are not finite")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ZeroDivisionError) as e:
        raise UserError(f"{folder}: expected buttons' boxes, sticks' centers and travels as \"geometry\" and an \"affine\" in clip.json, found "
                        f"{type(e).__name__} {e}: cut the clip again with extract.py") from None
    return clip, pads


def width_in_video(clip):
    """How many pixels of the video the template is wide."""
    (a, _, _), (b, _, _) = clip["affine"]
    return np.hypot(a, b) * clip["geometry"]["size"][0]


@torch.inference_mode()
def net_reads(model, panels, batch=256):
    """Panels [(k, 3, 57, 57, 3), (m, 3, 33, 33, 3)] uint8 -> log grids (k, 11, 11), click logits (k,), button logits (m,), float32."""
    device = next(model.parameters()).device
    sticks, buttons = (torch.from_numpy(p).split(batch) if len(p) else () for p in panels)
    reads = [model.sticks(t.to(device)) for t in sticks]
    grids, clicks = [grid for grid, _ in reads], [click for _, click in reads]
    logits = [model.buttons(t.to(device)) for t in buttons]
    return joined(grids, (0, GRID, GRID)), joined(clicks, (0,)), joined(logits, (0,))


def joined(batches, nothing):
    """Tensors of batches -> one array; without any, an empty one of shape `nothing`. UserError where a number is not finite."""
    out = torch.cat(batches).float().cpu().numpy() if batches else np.zeros(nothing, np.float32)
    if not np.isfinite(out).all():
        raise UserError("expected numbers from the reader, found NaN or infinity: its weights are damaged, give another --ckpt")
    return out


def montages(previous, current, rest):
    """Close-ups of n frames, (n, k, S, S, 3) each, and those of the pad at rest (k, S, S, 3) -> panels (n k, 3, S, S, 3)."""
    return np.stack([previous, current, np.broadcast_to(rest, current.shape)], 2).reshape(-1, 3, *current.shape[2:])


class Pad:
    """One clip's pad: its controls, what they look like at rest in this video, and how a crop is told from a crop without it."""

    def __init__(self, model, cutter, pads, template=None):
        self.model, self.cutter = model, cutter
        at = np.unique(np.linspace(0, len(pads) - 1, SAMPLES).astype(int))
        crops = [pads[i] for i in at]
        before, now = self.cutter.all(pads[max(i - 1, 0)] for i in at), self.cutter.all(crops)
        picture = np.median(np.stack(crops[::2]), 0).astype(np.uint8)          # the video's median picture of the pad
        self.rest, median = self.cutter(picture), self.cutter(picture)
        doubted = [np.zeros(len(m), bool) for m in median]
        drawn = None if template is None else self.cutter(in_the_videos_light(template, picture))
        if drawn is not None:
            doubted = self.trust_template(drawn)
        few = self.improve(before, now)
        for rest, old, wrong in zip(self.rest, median, [d & f for d, f in zip(doubted, few)]):
            rest[wrong] = old[wrong]                                           # never at rest beside a template that may be at fault
        self.improve(before, now)
        if drawn is not None and np.median([likeness(a, b) for d, m in zip(drawn, median) for a, b in zip(d, m)]) > VERY_SKIN:
            self.rest[0] = drawn[0]                                            # its caps are at rest for certain, the video's may never be
        self.outline = edges(picture)
        self.usual = np.median([self.likeness(c) for c in crops])              # of crops with the pad, to compare each crop's with

    def trust_template(self, drawn):
        """A control that the net, given the template's close-ups as rest, sees deflected or pressed in the video's median picture
        seldom rests: its rest picture becomes the template's. -> of sticks and of buttons, bool: replaced but in doubt, since the
        template hardly differs there from the median picture, or is unlike the pad also where controls do rest."""
        grids, clicks, logits = net_reads(self.model, [montages(r[None], r[None], d) for r, d in zip(self.rest, drawn)])
        away = (np.hypot(*decode(np.exp(grids)).T) > 0.5) & (grids.max((1, 2)) > math.log(0.15))
        calm, replaced, doubtful = [], [], []
        for kind, seldom in enumerate((away | (clicks > 3), logits > 3)):
            alike = np.array([likeness(a, b) for a, b in zip(drawn[kind], self.rest[kind])])
            if kind == 1 and len(alike):                                       # far more unlike than the others: the net need say less
                seldom = seldom | ((alike < np.median(alike) - 0.25) & (logits > 2))
            calm += alike[~seldom].tolist()
            seldom = seldom & (alike < 0.95)                                   # what looks as it does at rest is at rest
            self.rest[kind][seldom] = drawn[kind][seldom]
            replaced.append(seldom)
            doubtful.append(seldom & (alike > 0.85))
        faithful = len(calm) > 0 and np.median(calm) > 0.8                     # like the pad where controls do rest
        return doubtful if faithful else replaced

    def improve(self, before, now):
        """Make each control's rest picture again: the median over the frames in which the net, given the old one, sees it at rest.
        -> of sticks and of buttons, bool: too few such frames, so left as it is."""
        n, k = now[0].shape[:2]
        grids, clicks, logits = net_reads(self.model, [montages(b, c, r) for b, c, r in zip(before, now, self.rest)])
        still = np.hypot(*decode(np.exp(grids)).T) < 0.2
        quiets = (still & (clicks < 0)).reshape(n, k), (logits < -0.5).reshape(n, -1)
        for kind, quiet in enumerate(quiets):
            for j in np.flatnonzero(quiet.sum(0) >= 8):
                self.rest[kind][j] = np.median(now[kind][quiet[:, j], j], 0)
        return [quiet.sum(0) < 8 for quiet in quiets]

    def likeness(self, crop):
        """Of the crop's edges to those of the pad at rest: falls towards 0 where the overlay is gone or covered."""
        return likeness(edges(crop), self.outline, centre=False)

    def read(self, pads, begin=0, end=None):
        """Frames begin .. end, by default all n -> log grids (n, sticks, 11, 11), click logits (n, sticks), button logits
        (n, buttons), likeness (n,)."""
        end = len(pads) if end is None else end
        reads, like, last = [], [], self.cutter.all([pads[max(begin - 1, 0)]])  # the first frame is its own previous one
        for start in range(begin, end, 32):
            crops = [pads[i] for i in range(start, min(start + 32, end))]
            like += [self.likeness(c) for c in crops]
            now = self.cutter.all(crops)
            reads.append(net_reads(self.model, [montages(np.concatenate([b, c[:-1]]), c, r) for b, c, r in zip(last, now, self.rest)]))
            last = [c[-1:] for c in now]
        grids, clicks, logits = (np.concatenate(parts) for parts in zip(*reads))
        n = end - begin
        return grids.reshape(n, -1, GRID, GRID), clicks.reshape(n, -1), logits.reshape(n, -1), np.array(like)

    def read_all(self, pads):
        """All n frames -> places of the sticks float32 (n, sticks, 2) and their spread (n, sticks), smoothed; click logits
        (n, sticks), button logits (n, buttons), likeness (n,). Of the grids, 100 times as large, only a piece is held."""
        sticks, others, done, pads = len(self.cutter.sticks), [], 0, copy.copy(pads)
        places, spread = np.zeros((len(pads), sticks, 2), np.float32), np.zeros((len(pads), sticks))
        grids = np.zeros((0, sticks, GRID, GRID), np.float32)
        for low, begin, end, high in pieces(len(pads)):
            if done < high:
                pads.data = extract.read_npy(pads.path, np.uint8, 1)           # mapped anew: what was read leaves our memory
                more, *rest = self.read(pads, done, high)
                others.append(rest)
                grids, done = np.concatenate([grids, more]), high
            grids = grids[low - done:]
            smoothed = smooth_grids(grids) if sticks else grids
            for i in range(sticks):
                places[begin:end, i], spread[begin:end, i] = expect(smoothed[begin - low:end - low, i])
        return places, spread, *map(np.concatenate, zip(*others))


def pieces(n):
    """n frames -> (low, begin, end, high) of each piece: begin .. end is smoothed there, by what low .. high hold. As if it
    were one piece, to 1e-12; to 1e-5 where the net sees a stick in two far places alike all along the overlap."""
    for begin in range(0, n, PIECE):
        end = min(begin + PIECE, n)
        yield max(begin - OVERLAP, 0), begin, end, min(end + OVERLAP, n)


def as_wide_as(template, width):
    """The template, uint8 (h, w, 4), no sharper than a video that shows it so many pixels wide."""
    h, w = template.shape[:2]
    if width >= w:
        return template
    small = cv2.resize(extract.premultiply(template), (max(round(width), 1), max(round(width * h / w), 1)), interpolation=cv2.INTER_AREA)
    blurred = cv2.resize(small, (w, h), interpolation=cv2.INTER_LINEAR)
    alpha = np.maximum(blurred[..., 3:], 1)
    return np.dstack([np.minimum(blurred[..., :3] * (255 / alpha), 255).astype(np.uint8), blurred[..., 3:]])


def in_the_videos_light(template, picture):
    """The template, uint8 (h, w, 4), as it would look in the video whose median picture (h, w, 3) is given: by a line fitted where it is
    opaque; where little is, as a share (the overlay's opacity) of it over the mean colour of what lies beside it."""
    alpha, rgb = template[..., 3:] / 255.0, template[..., :3].astype(float)
    solid, beside = template[..., 3] > 200, template[..., 3] < 25
    if solid.sum() >= 200 and rgb[solid].std() >= 8:
        gain, lift = np.polyfit(rgb[solid].ravel(), picture[solid].ravel(), 1)
        drawn = alpha * np.clip(np.clip(gain, 0.3, 1.1) * rgb + lift, 0, 255) + (1 - alpha) * picture
    else:
        ground = picture[beside].mean(0) if beside.any() else np.full(3, 127.0)
        full = alpha * (rgb - ground)
        share = np.clip(((picture - ground) * full).sum() / max((full ** 2).sum(), 1), 0.3, 1)
        drawn = np.where(beside[..., None], picture, np.clip(ground + share * full, 0, 255))
    return np.rint(drawn).astype(np.uint8)


def likeness(a, b, centre=True):
    """Correlation, -1..1, of two pictures, each colour's mean taken off; with centre=False of two edge maps, 0 on average as they are."""
    if centre:
        a, b = (x - x.mean((0, 1), dtype=np.float32) for x in (a, b))
    return float((a * b).sum() / (np.linalg.norm(a) * np.linalg.norm(b) + 1e-6))


def edges(crop):
    """Sobel x and y of the crop in grey at half its size, float32 (2, h, w); strong edges are cut off, so that no single one decides."""
    small = cv2.resize(cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY), None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    return np.clip(np.stack([cv2.Sobel(small, cv2.CV_32F, 1, 0), cv2.Sobel(small, cv2.CV_32F, 0, 1)]), -80, 80)


def settle(pad, clip, places, spread, clicks, logits, like):
    """What was read of a whole video (Pad.read_all) -> actions float32 (n, 25), confidence float32 (n,)."""
    n, geometry, cutter = len(like), clip["geometry"], pad.cutter
    actions, sure, logits = np.zeros((n, extract.A), np.float32), [], logits.copy()
    fixed = np.ones(len(cutter.buttons), bool)
    for i, side in enumerate(cutter.sticks):
        actions[:, STICKS[side]] = normalise(places[:, i], cutter.known[side])
        sure.append(np.clip(1.2 - spread[:, i], 0, 1))
        if THUMB[side] in cutter.buttons and on_stick(geometry["buttons"][THUMB[side]], geometry["sticks"][side]):
            j = cutter.buttons.index(THUMB[side])
            logits[:, j] = (logits[:, j] + clicks[:, i]) / 2                   # the stick's net follows the moving cap
            fixed[j] = False
    if cutter.buttons:
        logits = level(logits, fixed)
        p = np.concatenate([smooth_buttons(logits[low:high])[begin - low:end - low] for low, begin, end, high in pieces(n)])
        actions[:, [BUTTON[b] for b in cutter.buttons]] = decisive(p > 0.5, logits)
        sure.append(np.abs(2 * p - 1).mean(1))
    there = np.clip((like / max(pad.usual, 0.05) - 0.25) / 0.4, 0, 1)
    return actions, (there * np.mean(sure, 0)).astype(np.float32)


def unread(folder, n):
    """Is anything missing of what run writes? (A folder is whole when its three files are, with n rows each.)"""
    for name, dtype, dims in (("actions", np.float32, 2), ("confidence", np.float32, 1), ("keep", np.bool_, 1)):
        try:
            if len(extract.read_npy(folder / f"{name}.npy", dtype, dims)) != n:
                return True
        except UserError:
            return True
    return False


def run_clip(model, folder):
    """Read one clip folder, unless it was read before, and write its three files -> one line that says what came out.
    Busy where another process is at it."""
    clip, pads = open_clip(folder)
    if pads is None:
        return "recorded play, no overlay to read: left as it is"
    n = len(pads)
    if not unread(folder, n):
        return "read already: delete its actions.npy to read it again"
    with extract.lock(folder / ".lock"):
        return read_clip(model, folder, clip, pads)


def read_clip(model, folder, clip, pads):
    """run_clip's work on a clip that is nobody else's."""
    n, began, cutter = len(pads), time.time(), Cutter(clip["geometry"], clip["pad"])
    shown = bool(cutter.sticks or cutter.buttons)
    if shown:
        path = folder / "template.png"
        template = extract.read_rgba(path) if path.is_file() else None
        size = clip["pad"] if template is None else list(template.shape[1::-1])
        if size != clip["pad"]:
            raise UserError(f"{path}: expected a picture of {clip['pad']}, found {size}: cut the clip again with extract.py")
        if template is not None:
            template = as_wide_as(template, width_in_video(clip))
        pad = Pad(model, cutter, pads, template)
        actions, confidence = settle(pad, clip, *pad.read_all(pads))
    else:
        actions, confidence = np.zeros((n, extract.A), np.float32), np.zeros(n, np.float32)
    keep = extract.dense(actions, confidence)
    for name, array in (("keep", keep), ("confidence", confidence), ("actions", actions)):
        extract.write_npy(folder / f"{name}.npy", array)
    if not shown:
        return f"template {clip.get('template')} has no geometry: confidence 0, nothing kept; give NAME.json with boxes and centres beside its PNG"
    took, pressed = time.time() - began, (actions[:, :len(BUTTONS)] > 0).any(1)
    return (f"{n} frames | confidence {confidence.mean():.2f} | kept {keep.mean():.0%} | pressed {pressed.mean():.0%} | "
            f"{n / took:.0f} frames/s, {n / clip['fps'] / took:.1f} x real time")


def run(args):
    """Read every clip folder of this process's share."""
    try:
        torch.empty(1, device=args.device).item()
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {args.device}: expected a device of this machine, found none ({str(e).splitlines()[0]}): give cpu") from None
    model, wrong = load_parser(args.ckpt).to(args.device), []
    for folder in extract.shard(extract.clips_in(args.data)):
        try:
            print(f"{folder.name}: {run_clip(model, folder)}", flush=True)
        except Busy:
            print(f"{folder.name}: passed over, another process reads it", flush=True)
        except UserError as e:                                                 # the other clips are read all the same
            wrong.append(str(e))
    if wrong:
        raise UserError(wrong[0] + (f" (and {len(wrong) - 1} more clips could not be read)" if len(wrong) > 1 else ""))


# ------------------------------------------------------------------------------------------------------------------------- scoring
def r2(got, true):
    """R2 of one stick (n, 2), both axes together: an axis that hardly moves counts with the little it varies; nan: it never moves."""
    varies = ((true - true.mean(0)) ** 2).sum()
    return float(1 - ((got - true) ** 2).sum() / varies) if varies > 4e-4 * len(true) else float("nan")


def score(actions, truth, geometry):
    """Everything that is reported of one clip, as a dict. Only controls that the skin shows are scored."""
    shown = [BUTTON[b] for b in geometry["buttons"] if b not in LEGACY]
    got, true = actions[:, shown] > 0.5, truth[:, shown] > 0.5
    hit, occurs = (got & true).sum(0), true.any(0)
    f1 = 2 * hit / np.maximum(got.sum(0) + true.sum(0), 1)
    row = {f"{s} R2": r2(actions[:, STICKS[s]], truth[:, STICKS[s]]) for s in geometry["sticks"]}
    row["accuracy"] = float((got == true).mean()) if got.size else math.nan
    for name, values in (("precision", hit / np.maximum(got.sum(0), 1)), ("recall", hit / np.maximum(true.sum(0), 1)), ("F1", f1)):
        row[name] = float(values[occurs].mean()) if occurs.any() else math.nan     # a button that is never pressed has none
    late = [d for b in range(len(shown)) for d in onset_errors(got[:, b], true[:, b])]
    row["timing"] = float(np.median(late)) if late else math.nan
    lags = sorted((d for d in range(-4, 5) if abs(d) < len(truth)), key=abs)   # the smallest first: it wins where several fit alike
    row["lag"] = max(lags, key=lambda d: agreement(actions, truth, geometry, d), default=0)
    return {**row, "by button": {BUTTONS[b]: round(float(f), 3) for b, f, o in zip(shown, f1, occurs) if o}}


def onset_errors(got, true, within=8):
    """|frames| between each true press and the nearest read press, where one lies within reach."""
    got, true = (np.flatnonzero(np.diff(np.concatenate([[0], x.astype(int)])) == 1) for x in (got, true))
    nearest = np.abs(true[:, None] - got[None]).min(1) if len(got) and len(true) else np.zeros(0)
    return nearest[nearest <= within].tolist()


def agreement(actions, truth, geometry, lag):
    """How well the actions fit the truth `lag` frames earlier: the overlay may show inputs late."""
    n = len(truth)
    got, true = actions[max(lag, 0):n + min(lag, 0)], truth[max(-lag, 0):n - max(lag, 0)]
    shown = [BUTTON[b] for b in geometry["buttons"]] + [i for s in geometry["sticks"] for i in range(extract.A)[STICKS[s]]]
    return -float(((got[:, shown] - true[:, shown]) ** 2).sum()) / max(len(got), 1)


def evaluate(args):
    """Score every clip that has truth.npy, reading those not read yet; one line a clip, then the means per family and over all."""
    for path in (args.out, args.sheet):
        if path:
            extract.writable(path)                                             # before the reading, which may take long
    model, rows = None, {}
    folders = [f for f in extract.clips_in(args.data) if (f / "truth.npy").is_file()]
    if not folders:
        raise UserError(f"{args.data}: expected clips with truth.npy, found none: only rendered or recorded clips can be scored")
    for folder in folders:
        clip, pads = open_clip(folder)
        if pads is None:
            continue
        if unread(folder, len(pads)):
            model = model or load_parser(args.ckpt)
            run_clip(model, folder)
        actions, truth = (extract.read_npy(folder / f"{name}.npy", np.float32, 2) for name in ("actions", "truth"))
        for name, array in (("actions", actions), ("truth", truth)):
            extract.check_actions(folder / f"{name}.npy", array, len(pads))
        rows[folder.name] = {"family": str(clip.get("controller") or "generic"), **score(actions, truth, clip["geometry"])}
        print(line_of(folder.name, rows[folder.name]), flush=True)
    if not rows:
        raise UserError(f"{args.data}: expected clips with an overlay, found recorded play only: give clips of extract.py")
    every = list(rows.values())
    for family in sorted({row["family"] for row in every}):
        chosen = [row for row in every if row["family"] == family]
        print(line_of(f"= {family} ({len(chosen)})", mean_of(chosen)))
    print(line_of(f"= all ({len(every)})", mean_of(every)))
    if args.out:
        figures = json.dumps({"clips": rows, "all": mean_of(every)}, indent=1)
        extract.write_atomic(args.out, lambda tmp: tmp.write_text(figures))
    if args.sheet:
        sheet(args.sheet, [f for f in folders if f.name in rows])


def mean_of(rows):
    """The mean over clips of every figure that any of them has."""
    keys = ("left R2", "right R2", "accuracy", "precision", "recall", "F1", "timing", "lag")
    present = {k: [r[k] for r in rows if k in r and not math.isnan(r[k])] for k in keys}
    return {k: float(np.mean(v)) for k, v in present.items() if v}


def line_of(name, row):
    """One line of scores."""
    sticks = " ".join(f"{row[k]:.3f}" for k in ("left R2", "right R2") if k in row)
    accuracy, precision, recall, f1, timing, lag = (row.get(k, math.nan) for k in ("accuracy", "precision", "recall", "F1", "timing", "lag"))
    return (f"{name}: stick R2 {sticks} | accuracy {accuracy:.4f} | precision {precision:.3f} | recall {recall:.3f} | F1 {f1:.3f} | "
            f"press {timing:.1f} frames off | lag {lag:.0f}")


def sheet(path, folders, count=20):
    """The largest errors as one PNG: the control's median picture, what the net saw, truth and answer. A run of wrong frames is one error."""
    found = []
    for folder in folders:
        clip, pads = open_clip(folder)
        cutter, actions, truth = Cutter(clip["geometry"], clip["pad"]), np.load(folder / "actions.npy"), np.load(folder / "truth.npy")
        for kind, controls in enumerate((cutter.sticks, cutter.buttons)):
            for j, control in enumerate(controls):
                columns = [BUTTON[control]] if kind else STICKS[control]
                off = np.linalg.norm(actions[:, columns] - truth[:, columns], axis=1)
                for size, t in error_runs(np.where(off > 0.35, off, 0)):
                    found.append((size, folder, pads, cutter, kind, j, control, t, truth[t, columns], actions[t, columns]))
    found.sort(key=lambda error: -error[0])
    tiles = []
    for size, folder, pads, cutter, kind, j, control, t, true, read in found[:count]:
        spread = np.linspace(0, len(pads) - 1, 48).astype(int)
        rest = np.median([cutter(pads[i])[kind][j] for i in spread], 0).astype(np.uint8)
        views = [cv2.resize(v, (160, 160), interpolation=cv2.INTER_NEAREST) for v in (rest, cutter(pads[t])[kind][j])]
        tile = cv2.copyMakeBorder(np.hstack(views), 0, 40, 0, 0, cv2.BORDER_CONSTANT)
        lines = f"{folder.name} frame {t} {control} error {size:.1f}", f"true {np.round(true, 2)}  read {np.round(read, 2)}"
        for y, text in zip((174, 192), lines):
            cv2.putText(tile, text, (4, y), cv2.FONT_HERSHEY_SIMPLEX, 0.36, (255, 255, 255), 1, cv2.LINE_AA)
        tiles.append(tile)
    tiles += [np.zeros((200, 320, 3), np.uint8)] * (-len(tiles) % 4 if tiles else 4)
    extract.save_png(path, np.vstack([np.hstack(tiles[i:i + 4]) for i in range(0, len(tiles), 4)]))
    print(f"{path}: the {min(count, len(found))} largest of {len(found)} errors")


def error_runs(off):
    """Errors of n frames, 0 where right -> [(summed error, the worst frame)] of each run of neighbouring wrong frames."""
    turns = np.flatnonzero(np.diff(np.concatenate([[0], (off > 0).astype(int), [0]])))      # first of a run, first after it, and so on
    return [(float(off[a:b].sum()), a + int(off[a:b].argmax())) for a, b in zip(turns[::2], turns[1::2])]


# -------------------------------------------------------------------------------------------------------------------- the teacher
# A scene = one skin over one moving background, some frames of play, through one video codec: what a clip folder would hold, with
# the truth. Everything that differs between channels is drawn per scene: skin, size, opacity, codec, blur, gamma, placement error.
FRAMES, RESTS = 8, 5                       # frames of a scene; pictures that its pad at rest is the median of
STEPS = 5000                               # of the default training


def play(rng, n):
    """Inputs with a person's dynamics, float32 (n, 25): taps, held buttons, chords; sticks that rest, ramp, stay tilted, tremble."""
    actions = np.zeros((n, extract.A), np.float32)
    share, dwell = rng.uniform(0.08, 0.45), rng.choice([2, 4, 10, 30], size=21)
    on = rng.random(21) < share
    for t in range(n):
        flip = rng.random(21) < np.where(on, 1, share / (1 - share)) / dwell
        on = on ^ flip
        actions[t, :21] = on
    actions[:, [BUTTON[b] for b in LEGACY]] = 0
    for s in STICKS.values():
        idle, square, noise = rng.choice([0.1, 0.35, 0.8]), rng.random() < 0.3, rng.choice([0, 0, 0.03])
        at, goal, speed = np.zeros(2), np.zeros(2), 1.0
        if rng.random() > idle:
            at = goal = tilt(rng, square)
        for t in range(n):
            if rng.random() < 0.2:
                goal, speed = np.zeros(2) if rng.random() < idle else tilt(rng, square), rng.choice([0.3, 0.7, 3])
            step = goal - at
            at = at + step * min(1, speed / (np.hypot(*step) + 1e-6))
            actions[t, s] = np.clip(at + rng.normal(0, 1, 2) * noise, -1, 1)
    return actions


def tilt(rng, square):
    """Where a stick is pushed to: often full tilt, often along an axis."""
    angle = rng.integers(8) * np.pi / 4 + rng.normal(0, 0.08) if rng.random() < 0.4 else rng.uniform(0, 2 * np.pi)
    v = np.array([np.cos(angle), np.sin(angle)])
    v = v / np.abs(v).max() if square else v
    return v * (1 if rng.random() < 0.5 else rng.uniform(0.1, 1))


class Film:
    """A moving picture behind the overlay: windows into procedural backdrops that stand still, scroll, shake, zoom or cut."""

    def __init__(self, rng, backdrops, w, h):
        self.rng, self.backdrops, self.size = rng, backdrops, (w, h)
        self.mode = rng.choice(["still", "still", "scroll", "shake", "zoom", "cut"])
        self.cut()
        self.velocity = rng.normal(0, 1, 2) * rng.choice([1, 4, 12])
        self.growth = rng.normal(0, 0.03)
        self.sprites = [(rng.integers(len(backdrops)), rng.uniform(0, 1, 2) * (w, h), rng.normal(0, 6, 2), rng.integers(6, max(7, h // 3)))
                        for _ in range(rng.integers(0, 4))]

    def cut(self):
        """Another backdrop, or another place in it."""
        self.image = self.backdrops[self.rng.integers(len(self.backdrops))]
        self.zoom = self.rng.choice([0.6, 1, 1, 2, 3])
        H, W = self.image.shape[:2]
        self.at = self.rng.uniform(0, 1, 2) * np.maximum((W, H) - np.array(self.size) / self.zoom, 1)

    def window(self):
        """uint8 (h, w, 3): what is behind the overlay now."""
        m = np.float64([[1 / self.zoom, 0, self.at[0]], [0, 1 / self.zoom, self.at[1]]])
        flags = cv2.INTER_LINEAR if self.zoom == 1 or self.rng.random() < 0.5 else cv2.INTER_NEAREST
        return cv2.warpAffine(self.image, m, self.size, flags=flags | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REFLECT)

    def step(self):
        """The next frame's background."""
        if self.mode == "cut" and self.rng.random() < 0.3:
            self.cut()
        self.at = self.at + {"scroll": self.velocity, "shake": self.rng.normal(0, 1, 2) * np.abs(self.velocity)}.get(self.mode, 0)
        self.zoom *= 1 + self.growth if self.mode == "zoom" else 1
        view = self.window()
        for i, (source, at, velocity, side) in enumerate(self.sprites):
            at = at + velocity
            x, y = int(at[0]) % self.size[0], int(at[1]) % self.size[1]
            patch = self.backdrops[source][:min(side, self.size[1] - y), :min(side, self.size[0] - x)]
            view[y:y + patch.shape[0], x:x + patch.shape[1]] = patch
            self.sprites[i] = source, at, velocity, side
        return view


def jpeg(image, quality):
    """A picture as JPEG leaves it."""
    return cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, int(quality)])[1], cv2.IMREAD_COLOR)


def codec(rng, frames):
    """Frames as a video codec leaves them: a JPEG, then JPEGs of what changed, blocks with little change kept as they were."""
    quality, inter, keep = rng.integers(45, 95), rng.integers(30, 92), rng.choice([0, 1, 3, 6])
    out, last = [], None
    for frame in frames:
        if last is None:
            last = jpeg(frame, quality)
        else:
            change = cv2.addWeighted(frame, 0.5, last, -0.5, 128)
            small = cv2.resize(cv2.absdiff(frame, last), None, fx=1 / 8, fy=1 / 8, interpolation=cv2.INTER_AREA).max(2)
            still = cv2.resize((small < keep).astype(np.uint8), frame.shape[1::-1], interpolation=cv2.INTER_NEAREST)
            change[still > 0] = 128
            last = np.clip(last.astype(np.int16) + 2 * (jpeg(change, inter).astype(np.int16) - 128), 0, 255).astype(np.uint8)
        out.append(last)
    return out


class Overlay:
    """How one video shows one skin: size, opacity, quality, and where the crop lies a little wrong."""

    def __init__(self, rng, skin):
        self.rng, self.skin, (W, H) = rng, skin, skin.size
        self.w = int(np.exp(rng.uniform(np.log(96), np.log(380))))
        self.h = max(16, round(self.w * H / W))
        self.opacity = 1.0 if rng.random() < 0.25 else rng.uniform(0.5, 1)
        self.pad = (320, max(16, round(320 * H / W)))
        wrong = rng.choice([0.2, 1])                                           # most placements are better than the worst allowed
        k, shift = 1 + rng.uniform(-0.02, 0.02) * wrong, rng.uniform(-1.5, 1.5, 2) * wrong
        s = np.array([self.w / self.pad[0], self.h / self.pad[1]]) * k
        middle = np.array([self.w, self.h]) / 2
        offset = middle + shift - s * np.array(self.pad) / 2
        self.warp = np.float64([[s[0], 0, offset[0] + s[0] / 2 - 0.5], [0, s[1], offset[1] + s[1] / 2 - 0.5]])
        self.passes = rng.choice([0, 1, 1, 2])
        self.blur = rng.uniform(0.4, 1.2) if rng.random() < 0.2 else 0
        gamma, gain, lift = np.exp(rng.normal(0, 0.2)), rng.uniform(0.75, 1.1), rng.uniform(0, 20)
        self.lut = np.clip(255 * gain * (np.arange(256) / 255) ** gamma + lift, 0, 255).astype(np.uint8)
        self.lut = self.lut if rng.random() < 0.4 else None
        self.jpeg = 90 if rng.random() < 0.6 else None

    def sprite(self, action):
        """The skin at the video's size, premultiplied by its alpha and the opacity: float32 (h, w, 4)."""
        rgba = cv2.resize(extract.premultiply(extract.draw(self.skin, action)), (self.w, self.h), interpolation=cv2.INTER_AREA)
        return rgba.astype(np.float32) * np.float32(self.opacity)

    def over(self, sprite, view):
        """The sprite drawn over what is behind it, uint8 (h, w, 3)."""
        return np.rint(sprite[..., :3] + view * (1 - sprite[..., 3:] / 255)).astype(np.uint8)

    def crops(self, frames):
        """Frames -> crops as extract.py would cut them, one by one."""
        for _ in range(self.passes):
            frames = codec(self.rng, frames)
        for frame in frames:
            if self.blur:
                frame = cv2.GaussianBlur(frame, (0, 0), self.blur)
            if self.lut is not None:
                frame = self.lut[frame]
            crop = cv2.warpAffine(frame, self.warp, self.pad, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE)
            if self.jpeg:
                crop = jpeg(crop, self.jpeg)
            yield crop


def scene(rng, skin, backdrops):
    """One scene -> panels with truth: sticks uint8 (k, 3, 57, 57, 3), values (k, 2), click (k,) (nan: not shown on this pad);
    buttons uint8 (m, 3, 33, 33, 3), pressed (m,). The panels are previous, current, rest; k and m count all frames' controls."""
    overlay, actions = Overlay(rng, skin), play(rng, FRAMES)
    film = Film(rng, backdrops, overlay.w, overlay.h)
    cutter = Cutter({"size": skin.size, "buttons": skin.buttons, "sticks": skin.sticks}, overlay.pad)
    sprites = [overlay.sprite(a) for a in actions]
    views = [film.step() for _ in actions]
    now = cutter.all(overlay.crops([overlay.over(s, v) for s, v in zip(sprites, views)]))
    # the pad at rest: a median over frames that mostly are at rest, over the same background or over others
    asleep, idle, same = overlay.sprite(None), rng.choice([0.3, 0.75, 0.95, 1, 1]), rng.random() < 0.4
    rests = []
    for _ in range(RESTS):
        if not same:
            film.cut()
        sprite = asleep if rng.random() < idle else sprites[rng.integers(FRAMES)]
        rests.append(overlay.over(sprite, views[rng.integers(FRAMES)] if same else film.window()))
    overlay.passes = overlay.passes * (rng.random() < 0.3)                     # a median over a video hardly shows its codec
    rest = [np.sort(cuts, 0)[RESTS // 2] for cuts in cutter.all(overlay.crops(rests))]      # np.median, at a fraction of its time
    sticks, buttons = (montages(np.concatenate([c[:1], c[:-1]]), c, r) for c, r in zip(now, rest))
    values, clicks = np.zeros((FRAMES, len(cutter.sticks), 2), np.float32), np.full((FRAMES, len(cutter.sticks)), np.nan, np.float32)
    for i, side in enumerate(cutter.sticks):
        values[:, i] = actions[:, STICKS[side]]
        if on_stick(skin.buttons.get(THUMB[side]), skin.sticks[side]):
            clicks[:, i] = actions[:, BUTTON[THUMB[side]]]
    pressed = actions[:, [BUTTON[b] for b in cutter.buttons]]
    return sticks, values.reshape(-1, 2), clicks.ravel(), buttons, pressed.ravel()


class Teacher(torch.utils.data.IterableDataset):
    """Endless scenes as tensors, each of a skin drawn anew or, where there are `skins`, of one of those but for a share `fresh`, lest the
    net forget."""

    def __init__(self, seed, skins=None, fresh=0.25):
        self.seed, self.skins, self.fresh = seed, skins, fresh

    def __iter__(self):
        cv2.setNumThreads(1)
        rng = np.random.default_rng([self.seed, 7])
        backdrops = [extract.backdrop(rng, 400, 600) for _ in range(24)]
        while True:
            if rng.random() < 0.25:
                backdrops[rng.integers(24)] = extract.backdrop(rng, 400, 600)
            skin = extract.random_skin(rng) if not self.skins or rng.random() < self.fresh else self.skins[rng.integers(len(self.skins))]
            yield [torch.from_numpy(a) for a in scene(rng, skin, backdrops)]


# ------------------------------------------------------------------------------------------------------------------------ training
class Pool:
    """The last `size` close-ups of one kind with their truth, drawn from at random: rendering is slow, so each serves several times."""

    def __init__(self, size):
        self.size, self.n, self.at, self.data = size, 0, 0, None

    def add(self, *tensors):
        """Store these rows over the oldest."""
        if self.data is None:
            self.data = [torch.empty((self.size, *t.shape[1:]), dtype=t.dtype) for t in tensors]
        rows = (self.at + torch.arange(len(tensors[0]))) % self.size
        for store, t in zip(self.data, tensors):
            store[rows] = t
        self.at, self.n = (self.at + len(rows)) % self.size, min(self.n + len(rows), self.size)

    def draw(self, generator, count):
        """`count` rows of each tensor, with replacement."""
        rows = torch.randint(self.n, (count,), generator=generator)
        return [store[rows] for store in self.data]


def labels(values):
    """Stick values (B, 2) -> the grid's label (B, 11, 11): a normal bump around the true place, summing to 1."""
    cells = torch.linspace(-1, 1, GRID)
    x, y = (torch.exp(-0.5 * ((cells - values[:, i, None]) / LABEL_WIDTH) ** 2) for i in (0, 1))
    grid = y[:, :, None] * x[:, None, :]
    return grid / grid.sum((1, 2), keepdim=True)


def augment(generator, panels, grid=None):
    """Each eighth of the batch turned and mirrored its own way, colours sometimes inverted -> panels, grid, mask (B, 3)."""
    out, grids = [], []
    for i, part in enumerate(panels.chunk(8)):
        part = torch.rot90(part, i % 4, (2, 3))
        part = part.flip(3) if i >= 4 else part
        out.append(255 - part if torch.rand((), generator=generator) < 0.15 else part)
    for i, part in enumerate(grid.chunk(8) if grid is not None else ()):
        part = torch.rot90(part, i % 4, (1, 2))
        grids.append(part.flip(2) if i >= 4 else part)
    mask = torch.ones(len(panels), 3)
    mask[:, ::2] = (torch.rand(len(panels), 2, generator=generator) > 0.12).float()     # now and then no previous frame, no rest
    return torch.cat(out), torch.cat(grids) if grids else None, mask


def parser_loss(model, generator, sticks, buttons):
    """Cross-entropy of the grids, binary cross-entropy of clicks and buttons. The teacher presses each button in a tenth to a half of
    the frames and only shows buttons that the skin has, so a head of all zeros can't win."""
    panels, values, clicks = sticks
    panels, grid, mask = augment(generator, panels, labels(values))
    log_p, click = model.sticks(panels, mask)
    loss = {"grid": -(grid * log_p).sum((1, 2)).mean()}
    seen = ~clicks.isnan()
    if seen.any():
        loss["click"] = F.binary_cross_entropy_with_logits(click[seen], clicks[seen])
    panels, _, mask = augment(generator, buttons[0])
    loss["button"] = F.binary_cross_entropy_with_logits(model.buttons(panels, mask), buttons[1])
    return loss


@torch.no_grad()
def check(model, scenes):
    """Single-frame score on drawn scenes: R2 of the sticks, F1 of clicks and buttons together."""
    model.eval()
    reads, fit = [model.sticks(s[0]) for s in scenes if len(s[0])], math.nan   # a skin may have sticks only, or buttons only
    if reads:
        got, true = decode(torch.cat([log_p for log_p, _ in reads]).exp().numpy()), torch.cat([s[1] for s in scenes]).numpy()
        fit = 1 - ((got - true) ** 2).sum() / ((true - true.mean(0)) ** 2).sum()
    logits = torch.cat([click for _, click in reads] + [model.buttons(s[3]) for s in scenes if len(s[3])])
    true = torch.cat([s[2] for s in scenes] + [s[4] for s in scenes])          # a click that the pad does not show: nan
    read, held = (logits > 0) & ~true.isnan(), true == 1
    f1 = 2 * (read & held).sum() / (read.sum() + held.sum()).clamp(min=1)
    return {"stick R2": round(float(fit), 4), "button F1": round(float(f1), 4)}


def train(args):
    """Train on drawn scenes; what is checked and written every --every steps is the running mean of the weights."""
    steps = (600 if args.skins else STEPS) if args.steps is None else args.steps
    peak = (5e-4 if args.skins else 2e-3) if args.lr is None else args.lr
    extract.within(args, 1, None, "steps", "every")
    extract.within(args, 1, 1e6, "pool")
    extract.within(args, 8, None, "batch")
    extract.within(args, 0, 1, "lr")
    extract.writable(args.out)
    skins = extract.load_skins(args.skins, 480) if args.skins else []         # larger is slower to draw
    skins = [s for s in skins if s.buttons or s.sticks]                        # a bare picture teaches nothing
    if args.skins and not skins:
        raise UserError(f"--skins {args.skins}: expected OBS input-overlay presets (layout .json + atlas .png) or NAME.png with NAME.json, "
                        "found bare pictures: say in NAME.json where their controls are")
    torch.set_num_threads(max(1, torch.get_num_threads() - args.workers))      # the process that renders scenes has a core of its own
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    model = load_parser(args.ckpt) if args.ckpt else Parser(args.preset)
    mean = copy.deepcopy(model)
    held = iter(Teacher(args.seed + 1000, skins, fresh=0))
    held = [next(held) for _ in range(16)]
    curve = [{"step": 0, **check(mean, held)}] if args.ckpt else []
    workers = dict(num_workers=1, prefetch_factor=8) if args.workers else {}
    scenes = iter(torch.utils.data.DataLoader(Teacher(args.seed, skins), batch_size=None, **workers))
    stick_pool, button_pool = Pool(args.pool), Pool(8 * args.pool)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.02, betas=(0.9, 0.98))
    warmup = min(200, steps // 10 + 1)
    bar = tqdm(range(1, steps + 1), desc=f"train {model.config['preset']}", mininterval=10)
    for step in bar:
        for _ in range(1 if stick_pool.n else 40):                             # one new scene a step, forty before the first
            scene_ = next(scenes)
            stick_pool.add(*scene_[:3])
            button_pool.add(*scene_[3:])
        lr = peak * min(step / warmup, 0.5 + 0.5 * math.cos(math.pi * step / (steps + 1)))
        # --- one step: everything below the next line is book-keeping
        model.train()
        loss = parser_loss(model, generator, stick_pool.draw(generator, args.batch), button_pool.draw(generator, 3 * args.batch))
        total = sum(loss.values())
        if not math.isfinite(total.item()):                                    # or it would spoil the mean and the file
            raise UserError(f"expected a falling loss, found {total.item()} at step {step}: give a smaller --lr than {peak:g}")
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        # ---
        decay = min(0.998, step / (step + 10))
        with torch.no_grad():
            for a, b in zip(mean.state_dict().values(), model.state_dict().values()):
                a.lerp_(b, 1 - decay) if a.is_floating_point() else a.copy_(b)
        bar.set_postfix_str(" | ".join(f"{k} {v.item():.3f}" for k, v in loss.items()) + f" | lr {lr:.1e}", refresh=False)
        if step % args.every == 0 or step == steps:
            losses = {k: round(v.item(), 4) for k, v in loss.items()}
            curve.append({"step": step, **losses, **check(mean, held), "cpu_s": round(time.process_time())})
            tqdm.write(" | ".join(f"{k} {v}" for k, v in curve[-1].items()))
            save_parser(args.out, mean, step=step, curve=curve, args={k: str(v) for k, v in vars(args).items() if k != "run"})
    if args.ckpt:
        before, after = (f"{row['stick R2']:.3f} R2, {row['button F1']:.3f} F1" for row in (curve[0], curve[-1]))
        print(f"before {before}; after {after} (one frame at a time)")


def main(argv=None):
    """Parse the command line."""
    parser = extract.Parser(prog="parse.py", description="Read buttons and sticks from the overlay crops.", allow_abbrev=False)
    verbs = parser.add_subparsers(required=True, metavar="run | train | eval")
    p = verbs.add_parser("run", help="read every clip folder of DATA", allow_abbrev=False)
    p.add_argument("data", help="folder of clip folders (or one of them), as extract.py leaves it")
    p.add_argument("--ckpt", default=CKPT, help="the reader's weights (default: those that ship)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device (default: cuda where there is one)")
    p.set_defaults(run=run)
    p = verbs.add_parser("eval", help="score the clips that have truth.npy", allow_abbrev=False)
    p.add_argument("data", help="folder of clip folders; those not read yet are read first")
    p.add_argument("--ckpt", default=CKPT, help="the reader's weights for clips not read yet (default: those that ship)")
    p.add_argument("--sheet", metavar="PNG", help="write the 20 largest errors as pictures")
    p.add_argument("--out", metavar="JSON", help="write the figures")
    p.set_defaults(run=evaluate)
    p = verbs.add_parser("train", help="train the reader on drawn skins, or fit it to yours", allow_abbrev=False)
    p.add_argument("--out", required=True, help="where the weights go (.safetensors)")
    p.add_argument("--skins", metavar="DIR", help="skins to fit to: OBS input-overlay presets, or NAME.png with NAME.json (default: random ones)")
    p.add_argument("--ckpt", help="weights to start from (default: none, from scratch)")
    p.add_argument("--preset", default="narrow", choices=PRESETS, help="size of new nets; --ckpt brings its own (default: narrow; the CPU trains it)")
    p.add_argument("--steps", type=int, help=f"optimiser steps (default: {STEPS}; with --skins 600)")
    p.add_argument("--batch", type=int, default=64, help="sticks a step, and three times as many buttons (default: 64)")
    p.add_argument("--lr", type=float, help="peak learning rate of AdamW (default: 2e-3; with --skins 5e-4)")
    p.add_argument("--pool", type=int, default=12000, help="stick close-ups kept to draw from, 8 x as many buttons: about 1.3 GB by default")
    p.add_argument("--every", type=int, default=250, help="steps between checks on held-out scenes; the file is written at each")
    p.add_argument("--workers", type=int, default=1, choices=(0, 1), help="1: scenes are rendered by a process of their own (default)")
    p.add_argument("--seed", type=int, default=0, help="seed of scenes, initial weights and batches")
    p.set_defaults(run=train)
    return extract.cli(parser, argv)


if __name__ == "__main__":
    raise SystemExit(main())
