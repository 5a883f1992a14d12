"""The policy: a SigLIP2 vision transformer, vision mixing and a diffusion transformer (DiT), by hand in torch. Paper §3.3, arXiv 2601.02427.

One 256 x 256 frame becomes N image tokens; the noisy actions of a chunk become T action tokens that look at them through cross-attention;
the network answers with a velocity, and following it from noise (t = 0) to t = 1 gives the next T actions [§3.4]. Nothing but the T action
tokens depends on t, so `encode` does vision, mixing and the cross-attention's keys and values once, and `velocity` is all a step costs.

    frames (B, F, 256, 256, 3) uint8 ── see ──> image tokens ── assemble ──> [pads, game, frames] ── mix ──> Context   } encode
    noisy actions (B, T, A), t (B,), Context ── action encoder, DiT, action decoder ──> velocity (B, T, A)               } velocity

Letters: B batch, F context frames (oldest first), N image tokens of a frame, L context tokens, T actions of a chunk, A action dims,
D width of the DiT, V width of the vision encoder, k Euler steps. The last four of the A dims are sticks; inside the model a stick is
(v + 1) / 2 and a button 0 or 1; `actions_in` and `actions_out` translate from and to files.

A checkpoint is one .safetensors: the (EMA) weights, and under "nitrogen" in its header one JSON string {config, step, args, data, metrics}.
Comments mark who says what: [P] the paper, [R] the released code or checkpoint (ng.pt), [O] ours.

    python model.py                                       table of the presets
    python model.py convert ng.pt ng.safetensors          the released checkpoint (or Google's SigLIP2, with --preset small) in our format
    python model.py info ng.safetensors                   what a checkpoint holds
"""
import argparse
import contextlib
import copy
import functools
import json
import math
import os
import pickle
import platform
import re
import struct
import sys
import zipfile
import zlib
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

torch.backends.cudnn.allow_tf32 = False                # float32 means float32: a GPU would round convolutions to 11 bits, 1e-3 in an action


class ModelError(ValueError):
    """A user's mistake: what was expected, what was found, what to do, in one line."""


# ---------------------------------------------------------------------------------------------------------------- configuration

@dataclass
class Stack:
    """A stack of blocks. The names in brackets are the released configuration's."""
    layers: int                               # [num_layers]
    heads: int                                # [num_attention_heads]
    head_width: int                           # [attention_head_dim]
    dropout: float = 0.2                      # [R: 0.2]
    final_dropout: bool = True                # two more dropouts a block, see Block
    bias: bool = True                         # of q, k and v; the output projection always has one [attention_bias]
    activation: str = "gelu-approximate"      # one of ACTIVATIONS, GATED [activation_fn]
    sinusoidal: bool = False                  # add a sine table after norm1 in every block [positional_embeddings]
    max_positions: int = 512                  # rows of that table [max_num_positional_embeddings]
    interleave: bool = False                  # DiT: odd blocks self-attend; mixing: no meaning [interleave_self_attention]
    ada: bool = False                         # norm1 is modulated by the time code [norm_type "ada_norm"]
    affine: bool = True                       # the norms have weights of their own [norm_elementwise_affine]
    eps: float = 1e-5                         # [norm_eps]; with ada it is norm2's only, norm1 keeps 1e-5 [R]


@dataclass
class Config:
    """Everything that fixes the tensors, the sampler and the meaning of an action chunk."""
    # vision encoder
    patch: int
    vision_width: int                         # V
    vision_layers: int
    vision_heads: int
    vision_ffn: int
    # vision mixing, DiT
    mixing: Stack
    dit: Stack
    image: int = 256                          # side of a frame
    stem: bool = False                        # patches through small convolutions, see Stem [O]
    pooling_head: bool = False                # SigLIP's attention pooling: in the released file, read by nobody
    # context
    frames: int = 1                           # F; more than one frame gained nothing [P §3.3]
    context_tokens: int = 0                   # L; what is not used is padding on the left; 0 = exactly what is needed
    games: list = field(default_factory=list)   # names of the game ids 1, 2, ...; empty: no game token at all
    # actions
    horizon: int = 16                         # T [P: 16; R: 18]
    action_dim: int = 25                      # A = 21 buttons + 4 stick axes [R; the paper says 24]
    old_layout: bool = False                  # sticks before the buttons inside the model
    position_rows: int = 64                   # rows of the learned table of action positions [R: 1024]; 0 = no table [max_seq_len, add_pos_embed]
    embodiments: int = 1                      # categories in the action encoder's and decoder's tensors; only the first is used
    action_shift: int = 0                     # the chunk starts this many frames after the frame that was seen [R: 3]
    frame_spacing: int = 16                   # frames between two context frames
    hz: float = 60.0                          # actions a second
    # flow matching
    steps: int = 16                           # k [P, R]
    buckets: int = 1000                       # t is cut into this many time codes
    beta: list = field(default_factory=lambda: [1.6, 0.8])   # t = (1 - Beta) * s [R; code defaults 1.5, 1.0]
    noise_s: float = 0.999

    @property
    def width(self):                          # D
        return self.dit.heads * self.dit.head_width

    @property
    def image_tokens(self):                   # N
        return (self.image // self.patch) ** 2

    @property
    def length(self):                         # L
        return self.context_tokens or self.frames * self.image_tokens + bool(self.games)

    @classmethod
    def from_dict(cls, d):
        """A Config out of a file's JSON, which nobody vouches for; keys of newer versions are ignored."""
        def build(kind, d):
            known = {f.name: f for f in fields(kind)}
            values = {}
            for name, value in d.items():
                if name not in known:
                    continue
                want = known[name].type
                if want is Stack:
                    value = build(Stack, value)
                elif want is float and type(value) is int:
                    value = float(value)
                elif type(value) is not want:
                    raise TypeError(f"{name} = {value!r}, expected {want.__name__}")
                values[name] = value
            return kind(**values)
        try:
            return build(cls, d).check()
        except (TypeError, AttributeError) as e:
            raise ModelError(f"the configuration is not one of ours: {e}") from None

    def check(self):
        """Refuse what cannot be built, in one line."""
        def need(ok, text):
            if not ok:
                raise ModelError(f"configuration: {text}")
        for name, value in [*vars(self).items(), *vars(self.mixing).items(), *vars(self.dit).items()]:
            if type(value) in (int, float):
                low, high = RANGES[name]
                need(low <= value <= high, f"{name} = {value}, expected {low} to {high}")                  # NaN lies nowhere
        for name, stack in ("mixing", self.mixing), ("dit", self.dit):
            need(stack.activation in {**ACTIVATIONS, **GATED},
                 f"{name} activation {stack.activation!r} is not one of {', '.join([*ACTIVATIONS, *GATED])}")
        need(self.image % self.patch == 0, f"image {self.image} is not a multiple of patch {self.patch}")
        need(not self.stem or self.patch >= 8 and self.patch & (self.patch - 1) == 0,
             f"a stem needs a patch of 8, 16, 32 ..., found {self.patch}")
        need(self.vision_width % self.vision_heads == 0, f"vision width {self.vision_width} does not divide into {self.vision_heads} heads")
        need(self.mixing.heads * self.mixing.head_width == self.vision_width or not self.mixing.layers,
             f"mixing has {self.mixing.heads} x {self.mixing.head_width} channels, the vision encoder {self.vision_width}")
        need(self.width >= 4 and self.width % 2 == 0, f"DiT width {self.width} must be even and at least 4")
        need(self.horizon <= self.position_rows or not self.position_rows, f"{self.horizon} actions, {self.position_rows} positions")
        low, high = RANGES["context_tokens"]
        need(low <= self.length <= high, f"a context of {self.length} tokens, expected {high} at most")
        needed = self.frames * self.image_tokens + bool(self.games)
        game = " and a game" if self.games else ""
        need(self.length >= needed, f"{self.frames} frames{game} are {needed} tokens, the context has room for {self.length}")
        for what, tokens, stack in ("context tokens", self.length, self.mixing), ("actions", self.horizon, self.dit):
            need(not stack.sinusoidal or tokens <= stack.max_positions, f"{tokens} {what}, {stack.max_positions} sine positions")
        need(all(type(g) is str for g in self.games), "games must be names")
        need(len(self.beta) == 2 and all(type(b) in (int, float) and 0.01 <= b <= 100 for b in self.beta),
             f"beta = {self.beta}, expected two numbers, 0.01 to 100")
        return self


# What each number of a configuration may be. One that comes from a file is checked before anything of its size is
# made; attention over the context costs the square of its tokens.
RANGES = {"layers": (0, 256), "heads": (1, 256), "head_width": (1, 1024), "dropout": (0, 0.99), "max_positions": (0, 8192),
          "eps": (1e-12, 1), "patch": (1, 256), "vision_width": (1, 8192), "vision_layers": (0, 256),
          "vision_heads": (1, 256), "vision_ffn": (0, 65536), "image": (1, 1024), "frames": (1, 64),
          "context_tokens": (0, 8192), "horizon": (1, 1024), "action_dim": (5, 1024), "position_rows": (0, 8192),
          "embodiments": (1, 1024), "action_shift": (0, 8192), "frame_spacing": (0, 8192), "hz": (1, 1000),
          "steps": (1, 1000), "buckets": (1, 1 << 20), "noise_s": (0, 1)}


def dit_stack(layers, heads, head_width):
    """The DiT half of a preset: interleaved, AdaLN, norms without affine."""
    return Stack(layers, heads, head_width, interleave=True, ada=True, affine=False)


# toy and nano look at 32-pixel patches, through a stem: 64 image tokens, a quarter of the cost. small takes Google's SigLIP2-B/16-256,
# nitrogen SigLIP2-L/16-256. First: patch, vision width, layers, heads, ffn.
PRESETS = {
    "toy": Config(32, 96, 4, 6, 384, mixing=Stack(1, 6, 16, 0.1), dit=dit_stack(3, 6, 16), stem=True),
    "nano": Config(32, 192, 6, 6, 768, mixing=Stack(2, 6, 32, 0.1), dit=dit_stack(6, 6, 32), stem=True),
    "small": Config(16, 768, 12, 12, 3072, mixing=Stack(2, 12, 64), dit=dit_stack(6, 8, 64)),
    "nitrogen": Config(16, 1024, 24, 16, 4096, mixing=Stack(4, 16, 64), dit=dit_stack(8, 16, 64), pooling_head=True,
                       context_tokens=256, horizon=18, position_rows=1024, action_shift=3, frame_spacing=18),
}


def preset(name, **changes):
    """A fresh Config by name; changes are fields, as in preset("toy", games=["pong"])."""
    if name not in PRESETS:
        raise ModelError(f"no preset {name!r}: take one of {', '.join(PRESETS)}")
    return replace(copy.deepcopy(PRESETS[name]), **changes).check()


# ---------------------------------------------------------------------------------------------------------------------- layers

ACTIVATIONS = {"gelu": F.gelu, "gelu-approximate": functools.partial(F.gelu, approximate="tanh"), "linear-silu": F.silu,
               "geglu-approximate": lambda x: x * torch.sigmoid(1.702 * x)}     # not gated, whatever its name says [diffusers]
GATED = {"geglu": F.gelu, "swiglu": F.silu}                                     # half of the projection gates the other half
FEW_ROWS, LARGE = 64, 1 << 18                                                   # rows of x, numbers in a weight: see linear()


def linear(x, weight, bias):
    """x weight^T + bias. The T rows of a denoising step are too few for the default BLAS, which is tuned for many: on a CPU a product of 18
    rows with a large weight is up to 1.6 times faster through oneDNN (float32, 2 Zen 3 cores), one of 256 rows no faster."""
    few = x.numel() // x.shape[-1] <= FEW_ROWS and weight.numel() >= LARGE and x.device.type == "cpu" and x.dtype == torch.float32
    if few and not torch.is_grad_enabled() and torch.backends.mkldnn.is_available() and not torch.compiler.is_compiling():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


# torch's layers without their own random numbers, which init() or a checkpoint would overwrite (on the meta device they cost 70 MB of
# imports).
class Linear(nn.Linear):
    """nn.Linear that skips its random fill (a checkpoint or create() fills it) and multiplies by linear() above."""

    def reset_parameters(self):
        pass

    def forward(self, x):
        return linear(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    """nn.Embedding without its random fill."""

    def reset_parameters(self):
        pass


class Conv2d(nn.Conv2d):
    """nn.Conv2d without its random fill."""

    def reset_parameters(self):
        pass


class CategoryLinear(nn.Module):
    """A linear layer for each embodiment, stored (category, in, out): transposed, compared with nn.Linear [R]. Category 0 is used."""
    def __init__(self, categories, n_in, n_out):
        super().__init__()
        self.W = nn.Parameter(torch.empty(categories, n_in, n_out))
        self.b = nn.Parameter(torch.empty(categories, n_out))

    def forward(self, x):
        return linear(x, self.W[0].t(), self.b[0])


@functools.lru_cache
def sine_table(rows, width, device, dtype):
    """Interleaved sin, cos (§5 of 1706.03762), the "sinusoidal" option of the release."""
    with torch.inference_mode(False):
        angle = torch.arange(rows)[:, None] * torch.exp(torch.arange(0, width, 2) * (-math.log(1e4) / width))
        return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1).to(device, dtype)        # (rows, width)


class Attention(nn.Module):
    """Multi-head attention of x over itself, or over a context of width `source`; keys and values can be computed once and handed in."""

    def __init__(self, width, heads, source=None, bias=True):
        super().__init__()
        self.heads = heads
        self.q = Linear(width, width, bias)
        self.k = Linear(source or width, width, bias)
        self.v = Linear(source or width, width, bias)
        self.out = Linear(width, width)

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)                                    # (B, heads, tokens, head width)

    def kv(self, source):
        """Keys and values of the attended tokens: for cross-attention the same at every step, so `mix` keeps them."""
        return self.split(self.k(source)), self.split(self.v(source))

    def forward(self, x, kv=None):
        k, v = kv or self.kv(x)
        y = F.scaled_dot_product_attention(self.split(self.q(x)), k, v)                             # (B, heads, tokens, head width)
        return self.out(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """width -> inner -> width with one of the named activations, gated or not."""

    def __init__(self, width, inner, activation, dropout=0.0):
        super().__init__()
        self.gated, self.dropout = activation in GATED, dropout
        self.act = (GATED if self.gated else ACTIVATIONS)[activation]
        self.up = Linear(width, inner * 2 if self.gated else inner)
        self.down = Linear(inner, width)

    def forward(self, x):
        x = self.up(x)
        if self.gated:
            x, gate = x.chunk(2, dim=-1)
            x = x * self.act(gate)
        else:
            x = self.act(x)
        return self.down(F.dropout(x, self.dropout, self.training))


class Block(nn.Module):
    """One transformer block for all three stacks: attention and feed-forward, each after a norm and added to its input.

    Vision: affine norms, self-attention, no dropout. Mixing: the same with eps 1e-5 and dropouts. DiT: norm1 is AdaLN, scaled and shifted
    by the time code; norm2 has neither weights nor modulation, and there are no gates, unlike DiT's own AdaLN-Zero (2212.09748) [R].
    """
    def __init__(self, width, s, source=None, ffn=None):
        super().__init__()
        self.dropout, self.sinusoidal, self.max_positions = s.dropout, s.sinusoidal, s.max_positions
        self.final_dropout = s.dropout if s.final_dropout else 0.0
        self.norm1 = nn.LayerNorm(width, 1e-5 if s.ada else s.eps, elementwise_affine=s.affine and not s.ada)
        self.ada = Linear(width, 2 * width) if s.ada else None
        self.attn = Attention(width, s.heads, source, s.bias)
        self.norm2 = nn.LayerNorm(width, s.eps, elementwise_affine=s.affine)
        self.ff = FeedForward(width, ffn or 4 * width, s.activation, s.dropout)

    def forward(self, x, modulation=None, kv=None):
        y = self.norm1(x)                                                                           # (B, tokens, D)
        if modulation is not None:
            scale, shift = modulation                                                               # (B or 1, 1, D) each
            y = y * (1 + scale) + shift
        if self.sinusoidal:                                            # after the norm; in a cross block the query only [R]
            y = y + sine_table(self.max_positions, y.shape[2], y.device, y.dtype)[:y.shape[1]]
        y = F.dropout(self.attn(y, kv), self.dropout, self.training)
        x = x + F.dropout(y, self.final_dropout, self.training)        # a second dropout on the same output [R]
        return x + F.dropout(self.ff(self.norm2(x)), self.final_dropout, self.training)


class PoolingHead(nn.Module):
    """SigLIP's attention pooling. Loaded, saved and never run: the policy reads all image tokens, not their average [R]."""
    def __init__(self, width, ffn):
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, 1, width))
        self.attention = nn.ParameterDict({"in_proj_weight": torch.empty(3 * width, width), "in_proj_bias": torch.empty(3 * width)})
        self.attention_out_proj = Linear(width, width)
        self.layernorm = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"fc1": Linear(width, ffn), "fc2": Linear(ffn, width)})
        self.requires_grad_(False)


class Stem(nn.Sequential):
    """A patch embedding of small strided convolutions, 4 x 4 then 3 x 3 at half the size each (2106.14881). A linear map of a 32 x 32 patch
    sees an object anew at each place in it: in a test on three games, as many frames taught this stem sticks of R2 0.85 and that map none
    [O]."""
    def __init__(self, patch, width):
        halvings = patch.bit_length() - 3                              # after the first layer's 4
        widths = [3, *(min(16 << n, width) for n in range(halvings)), width]
        layers = [Conv2d(3, widths[1], 4, 4)]
        for a, b in zip(widths[1:], widths[2:]):
            layers += [nn.GELU(), Conv2d(a, b, 3, 2, 1)]
        super().__init__(*layers)


class Vision(nn.Module):
    """SigLIP2 of fixed resolution = SigLIP (2502.14786, 2303.15343): patches, learned positions, no class token, a norm at the end."""
    def __init__(self, c):
        super().__init__()
        s = Stack(c.vision_layers, c.vision_heads, c.vision_width // c.vision_heads, dropout=0.0, final_dropout=False, eps=1e-6)
        self.patch_embedding = Stem(c.patch, c.vision_width) if c.stem else Conv2d(3, c.vision_width, c.patch, c.patch)
        self.position_embedding = Embedding(c.image_tokens, c.vision_width)
        self.blocks = nn.ModuleList(Block(c.vision_width, s, ffn=c.vision_ffn) for _ in range(s.layers))
        self.norm = nn.LayerNorm(c.vision_width, eps=1e-6)
        if c.pooling_head:
            self.head = PoolingHead(c.vision_width, c.vision_ffn)


class ActionEncoder(nn.Module):
    """swish(W2 [W1 a; tau]) W3: a noisy action and the time code tau become an action token."""
    def __init__(self, n, A, D):
        super().__init__()
        self.W1, self.W2, self.W3 = CategoryLinear(n, A, D), CategoryLinear(n, 2 * D, D), CategoryLinear(n, D, D)

    def time(self, tau):
        """W2's half for the time code, with the bias: all that depends on t."""
        D = tau.shape[-1]
        return tau @ self.W2.W[0, D:] + self.W2.b[0]                                                # (B, 1, D)

    def forward(self, a, time):
        D = time.shape[-1]
        x = self.W1(a) @ self.W2.W[0, :D] + time                                                    # (B, T, D)
        return self.W3(F.silu(x))


class ActionDecoder(nn.Module):
    """Two category-wise layers with a ReLU: DiT output (B, T, D) -> velocity (B, T, A)."""

    def __init__(self, n, D, A):
        super().__init__()
        self.layer1, self.layer2 = CategoryLinear(n, D, D), CategoryLinear(n, D, A)

    def forward(self, x):
        return self.layer2(F.relu(self.layer1(x)))


# ------------------------------------------------------------------------------------------------------------------- the policy

class Context(NamedTuple):
    """What a chunk knows of the world, the same for all its steps."""
    tokens: Tensor                            # (B, L, V) after mixing
    kv: list                                  # for each DiT block (keys, values), (B, heads, L, head width) each; None: self-attention

    def repeat(self, r):
        """Each sample r times in a row: r noises and times share one context, in training the cheapest samples there are."""
        if r == 1:
            return self
        return Context(self.tokens.repeat_interleave(r, 0), [kv and tuple(x.repeat_interleave(r, 0) for x in kv) for kv in self.kv])

    def cat(self, other):
        """The samples of both, this one's first."""
        kv = [ours and (torch.cat([ours[0], theirs[0]]), torch.cat([ours[1], theirs[1]])) for ours, theirs in zip(self.kv, other.kv)]
        return Context(torch.cat([self.tokens, other.tokens]), kv)


class Times(NamedTuple):
    """What depends on t only, for a batch of times (or for all steps of a sampler at once)."""
    encoder: Tensor                           # (B, 1, D) the time code's share of the action encoder
    blocks: list                              # for each DiT block (scale, shift), (B, 1, D) each; None: its norm1 is not modulated
    final: tuple                              # (shift, scale), in this order [R]

    def at(self, i):
        """Row i alone: step i of a sampler, for every sample of a batch."""
        row = slice(i, i + 1)
        return Times(self.encoder[row], [b and (b[0][row], b[1][row]) for b in self.blocks], (self.final[0][row], self.final[1][row]))


class NitroGen(nn.Module):
    """The policy: encode(frames) -> Context, velocity(a, t, context), forward = both."""

    def __init__(self, config):
        super().__init__()
        c, D, V = config, config.width, config.vision_width
        self.config, self.checkpointing = config, False
        self.vision = Vision(c)
        # Row 0, zeros: no game. A game's gradient is the mean over its samples in a batch, not the sum [R, seen in the golden gradients].
        self.game_embedding = Embedding(len(c.games) + 1, V, padding_idx=0, scale_grad_by_freq=True) if c.games else None
        self.mixing = nn.ModuleList(Block(V, c.mixing) for _ in range(c.mixing.layers))
        self.action_encoder = ActionEncoder(c.embodiments, c.action_dim, D)
        self.position_embedding = Embedding(c.position_rows, D) if c.position_rows else None
        self.time = nn.ModuleDict({"linear_1": Linear(256, D), "linear_2": Linear(D, D)})
        self.dit = nn.ModuleList(Block(D, c.dit, source=V if self.crosses(i) else None) for i in range(c.dit.layers))
        self.proj_out_1, self.proj_out_2 = Linear(D, 2 * D), Linear(D, D)
        self.action_decoder = ActionDecoder(c.embodiments, D, c.action_dim)

    def crosses(self, i):
        """Does DiT block i look at the context? Even ones do; odd ones look at the other actions when interleaved [P §3.3, R]."""
        return i % 2 == 0 or not self.config.dit.interleave

    def run(self, block, *args):
        """A block, with its activations recomputed in the backward pass when `checkpointing` is set."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def see(self, frames):
        """uint8 RGB (B, F, H, W, 3), or floats of the same range, -> image tokens (B, F, N, V)."""
        B, n, side = *frames.shape[:2], self.config.image
        if frames.shape[2:] != (side, side, 3):
            raise ModelError(f"expected frames of {side} x {side} x 3, found {' x '.join(map(str, frames.shape[2:]))}")
        x = (frames.flatten(0, 1).permute(0, 3, 1, 2) / 127.5).sub_(1)                              # (B F, 3, H, W) in [-1, 1]
        x = self.vision.patch_embedding(x.to(self.proj_out_2.weight.dtype)).flatten(2).transpose(1, 2)   # (B F, N, V)
        x = x + self.vision.position_embedding.weight
        for block in self.vision.blocks:
            x = self.run(block, x)
        return self.vision.norm(x).unflatten(0, (B, n))                                             # (B, F, N, V)

    def assemble(self, seen, games=None, keep=None):
        """Image tokens -> the context before mixing: [padding zeros, game token if the model has games, frames oldest first].

        games (B,) ids, 0 or None = no game. keep (B, F) bool: a dropped frame leaves no token, its room becomes padding [R]. Fewer
        frames than the model has room for are the newest ones.
        """
        c, (B, n, N) = self.config, seen.shape[:3]
        x = seen.flatten(1, 2)                                                                      # (B, F N, V)
        if c.games:
            games = torch.zeros(B, dtype=torch.long, device=x.device) if games is None else games
            x = torch.cat([self.game_embedding(games)[:, None], x], dim=1)                          # (B, 1 + F N, V)
        if keep is not None:
            kept = keep.repeat_interleave(N, dim=1)                                                 # (B, F N)
            kept = F.pad(kept, (int(bool(c.games)), 0), value=True)                                 # the game token stays
            order = kept.to(torch.uint8).sort(dim=1, stable=True).indices[..., None].expand_as(x)   # the dropped first
            x = (x * kept[..., None]).gather(1, order)
        if x.shape[1] > c.length:
            raise ModelError(f"{n} frames are too many: the context has room for {c.frames}")
        return F.pad(x, (0, 0, c.length - x.shape[1], 0))                                           # (B, L, V)

    def mix(self, x):
        """Self-attention over the context; no mask: padding takes part in it, and in cross-attention [R]."""
        for block in self.mixing:
            x = self.run(block, x)                                                                  # (B, L, V)
        return Context(x, [block.attn.kv(x) if self.crosses(i) else None for i, block in enumerate(self.dit)])

    def encode(self, frames, games=None, keep=None):
        """Frames (B, F, H, W, 3) -> Context: all that a chunk needs of them, computed once."""
        return self.mix(self.assemble(self.see(frames), games, keep))

    def times(self, t):
        """Time t (B,) in [0, 1), or integers = bucket numbers -> Times. Both time codes get the truncated bucket number [R]."""
        dtype = self.proj_out_2.weight.dtype
        bucket = (t * self.config.buckets).long() if t.is_floating_point() else t                   # (B,)
        # Two time codes, each with its own order of operations [R]: at bucket 937 an exponent rounded otherwise is 3e-5 in the velocity.
        angle = bucket[:, None] * torch.exp(-math.log(1e4) * torch.arange(128, device=t.device) / 127)
        x = torch.cat([angle.cos(), angle.sin()], dim=1).to(dtype)                                  # (B, 256), cos first
        x = F.silu(self.time.linear_2(F.silu(self.time.linear_1(x))))[:, None]                      # (B, 1, D)
        half = self.config.width // 2
        angle = bucket[:, None] * torch.exp(torch.arange(half, device=t.device) * (-math.log(1e4) / half))
        tau = torch.cat([angle.sin(), angle.cos()], dim=1)[:, None].to(dtype)                       # (B, 1, D), sin first
        return Times(self.action_encoder.time(tau), [block.ada and block.ada(x).chunk(2, dim=-1) for block in self.dit],
                     self.proj_out_1(x).chunk(2, dim=-1))

    def step(self, a, times, context):
        """One evaluation of the DiT: noisy actions (B, T, A) -> velocity (B, T, A)."""
        x = self.action_encoder(a.to(self.proj_out_2.weight.dtype), times.encoder)                  # (B, T, D)
        if self.position_embedding is not None:
            x = x + self.position_embedding.weight[:a.shape[1]]
        for block, modulation, kv in zip(self.dit, times.blocks, context.kv):
            x = self.run(block, x, modulation, kv)
        shift, scale = times.final
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
        return self.action_decoder(self.proj_out_2(x)).to(a.dtype)                                  # (B, T, A)

    def velocity(self, a, t, context):
        """Noisy actions a (B, T, A) at times t (B,), Context -> velocity (B, T, A), an estimate of action - noise [Eq. 3, §3.4]."""
        return self.step(a, self.times(t), context)

    def forward(self, a, t, frames, games=None, keep=None):
        """Training's way in (DDP sees only this). a (r B, T, A), t (r B,): r noises and times for each of the B contexts."""
        context = self.encode(frames, games, keep)
        return self.velocity(a, t, context.repeat(len(a) // len(frames)))

    def freeze(self, *parts):
        """Stop training parts: any of vision, mixing, dit, action (encoder and decoder), games."""
        dit = (self.dit, self.time, self.proj_out_1, self.proj_out_2)
        known = {"vision": [self.vision], "mixing": [self.mixing], "dit": dit, "games": [self.game_embedding],
                 "action": [self.action_encoder, self.action_decoder, self.position_embedding]}
        for part in parts:
            if part not in known:
                raise ModelError(f"no part {part!r} to freeze: take any of {', '.join(known)}")
            for module in known[part]:
                if module is not None:
                    module.requires_grad_(False)

    @torch.no_grad()
    def init(self, seed=0):
        """Fresh weights for training from scratch; the same for a seed on every machine."""
        g = torch.Generator().manual_seed(seed)
        for module in (m for name, m in self.named_modules() if not name.startswith("vision.head")):
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                fan_in, fan_out = module.weight[0].numel(), len(module.weight)
                bound = math.sqrt(6 / (fan_in + fan_out))                                           # Glorot
                module.weight.uniform_(-bound, bound, generator=g)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, CategoryLinear):
                bound = math.sqrt(6 / sum(module.W.shape[1:]))
                module.W.uniform_(-bound, bound, generator=g)
                module.b.zero_()
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(0, 0.02, generator=g)
            elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
                module.weight.fill_(1)
                module.bias.zero_()
        if self.game_embedding is not None:
            self.game_embedding.weight[0] = 0                          # row 0 = unconditional
        for stack in self.vision.blocks, self.mixing, self.dit:
            for block in stack:                                        # a stack adds as much as it is given, however deep (GPT-2, §2.3)
                block.attn.out.weight.mul_((2 * len(stack)) ** -0.5)
                block.ff.down.weight.mul_((2 * len(stack)) ** -0.5)
        self.action_encoder.W1.W.mul_(3)                               # an action is a larger part of its token than the time is
        for layer in [self.proj_out_1, *(b.ada for b in self.dit if b.ada)]:
            layer.weight.zero_()                                       # every step starts out alike, as in DiT (2212.09748 §3.2)
        self.action_decoder.layer2.W.zero_()                           # and the first velocity is 0
        return self


def empty(config, device="cpu", dtype=torch.float32):
    """A model whose tensors are allocated and hold nothing yet. The head that nobody reads costs no memory until something is read into it."""
    with torch.device("meta"):
        model = NitroGen(config).to(dtype)
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            new = torch.empty(p.shape, dtype=p.dtype, device=device)
            setattr(module, name, nn.Parameter(new, p.requires_grad))
    return model


def create(config, seed=0, device="cpu"):
    """A fresh model with random weights."""
    model = empty(config).init(seed)
    if config.pooling_head:                                            # zeros that take no memory until written to
        for module in model.vision.head.modules():
            for name, p in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.from_numpy(np.zeros(p.shape, np.float32)), False))
    return model.to(device)


def pick_device(wanted="auto"):
    """"auto", "cpu", "cuda", "cuda:1", "mps" -> (device, the reason in words, for the caller to print)."""
    if wanted != "auto":
        try:
            device = torch.device(wanted)
            torch.empty(1, device=device).item()
        except (RuntimeError, AssertionError) as e:                    # AssertionError: a torch built without this device
            raise ModelError(f"device {wanted!r} can not be used here ({str(e).splitlines()[0]}): take cpu or auto") from None
        return device, "asked for"
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.cuda.get_device_name()
    if torch.backends.mps.is_available():
        return torch.device("mps"), "no CUDA device, but Apple's GPU"
    return torch.device("cpu"), f"no CUDA device found; {torch.get_num_threads()} threads"


# ---------------------------------------------------------------------------------------------------------------------- actions

def actions_in(actions, old_layout=False):
    """Actions of a file (..., A): buttons, then left x, y, right x, y in [-1, 1] -> the model's: sticks (v + 1) / 2, layout of the model."""
    buttons, sticks = actions[..., :-4], (actions[..., -4:] + 1) / 2
    return torch.cat([sticks, buttons] if old_layout else [buttons, sticks], dim=-1)


def actions_out(raw, old_layout=False):
    """The sampler's tensor (..., A) -> actions of a file: buttons 0 or 1 (> 0.5), sticks clamped to [-1, 1]."""
    sticks, buttons = (raw[..., :4], raw[..., 4:]) if old_layout else (raw[..., -4:], raw[..., :-4])
    return torch.cat([(buttons > 0.5).to(raw.dtype), (sticks * 2 - 1).clamp(-1, 1)], dim=-1)


# ------------------------------------------------------------------------------------------------------------------ checkpoints

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODES = {dtype: code for code, dtype in DTYPES.items()}
MAGIC = ((b"PK\x03\x04", "a PyTorch pickle (zip)"), (b"\x80", "a pickle"), (b"\x89PNG", "a PNG image"), (b"\xff\xd8\xff", "a JPEG image"),
         (b"GIF8", "a GIF image"), (b"\x93NUMPY", "a NumPy array"), (b"GGUF", "a GGUF model"), (b"\x89HDF", "an HDF5 file"), (b"PAR1", "a parquet file"),
         (b"version https://git-lfs", "a git-lfs pointer, not the file itself (git lfs pull)"), (b"<", "a web page"), (b"{", "JSON"))


def what_is(path):
    """What a file that is not a checkpoint seems to be, by its first bytes."""
    with open(path, "rb") as f:
        head = f.read(64)
    if not head:
        return "an empty file"
    for magic, name in MAGIC:
        if head.startswith(magic):
            return name
    return "a video" if head[4:8] == b"ftyp" else "an unknown format"


def find(path):
    """A checkpoint's file: the path itself, or model.safetensors in a run folder."""
    path = Path(path)
    if path.is_dir():
        if not (path / "model.safetensors").is_file():
            raise ModelError(f"{path}: expected a checkpoint, found a folder without model.safetensors: "
                             "give a .safetensors file or a folder written by train.py")
        return path / "model.safetensors"
    if not path.is_file():
        raise ModelError(f"{path}: expected a checkpoint, found nothing there: check the path")
    return path


def parse_json(text):
    """What a JSON text of a file says; ValueError also for half a surrogate pair, a letter that nothing can print."""
    value = json.loads(text)
    json.dumps(value, ensure_ascii=False).encode()
    return value


def read_header(path):
    """A .safetensors header -> ({name: (dtype, shape, first byte in the file)}, metadata); dtype None = not floating point. Believes nothing
    that it has not checked."""
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        start = f.read(8)
        n = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        raw = f.read(min(n, 100 << 20))
    if not 2 <= n <= 100 << 20 or raw[:1] != b"{":
        kind = what_is(path)
        todo = "python model.py convert FILE OUT.safetensors" if "pickle" in kind else "give a .safetensors written by train.py or model.py convert"
        raise ModelError(f"{path}: expected a .safetensors checkpoint, found {kind}: {todo}")
    if len(raw) < n:
        raise ModelError(f"{path}: truncated inside its header: copy or download it again")
    try:
        entries = parse_json(raw)
        meta = entries.pop("__metadata__", {})
        table, end = {}, 0
        for name, e in sorted(entries.items(), key=lambda kv: kv[1]["data_offsets"]):
            (a, b), shape, dtype = e["data_offsets"], e["shape"], DTYPES.get(e["dtype"])
            whole = all(type(number) is int and number >= 0 for number in (a, b, *shape)) and a == end <= b
            if not whole or dtype and b - a != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"tensor {name!r} has impossible offsets or shape")
            table[name], end = (dtype, tuple(shape), 8 + n + a), b
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise ModelError(f"{path}: a damaged .safetensors header ({e}): copy or download it again") from None
    if 8 + n + end != size:
        raise ModelError(f"{path}: {'truncated' if size < 8 + n + end else 'too long'}: its header promises {8 + n + end} bytes, "
                         f"the file has {size}: copy or download it again")
    return table, meta


def compare(want, have, where):
    """Shapes by name; strict: the first missing, mis-shaped or extra tensor is named."""
    for name in want:
        if name not in have:
            raise ModelError(f"{where}: tensor {name} is missing: the file does not fit its configuration")
        if tuple(have[name]) != tuple(want[name]):
            raise ModelError(f"{where}: tensor {name} has shape {list(have[name])}, expected {list(want[name])}: the file does not fit its configuration")
    for name in have:
        if name not in want:
            raise ModelError(f"{where}: tensor {name} is not part of the model: the file does not fit its configuration")


def read_meta(path):
    """A checkpoint's {config, step, args, data, metrics}, its tensors' table and its file."""
    path = find(path)
    table, meta = read_header(path)
    if not isinstance(meta, dict) or "nitrogen" not in meta:
        if any(n.startswith("vision_model.") for n in table):
            found = "SigLIP weights: python model.py convert FILE OUT.safetensors --preset small"
        else:
            found = f"another model's .safetensors (it holds {next(iter(table), 'nothing')}): give one written by train.py or model.py convert"
        raise ModelError(f"{path}: expected one of our checkpoints, found {found}")
    try:
        meta = parse_json(meta["nitrogen"])
        meta["config"] = Config.from_dict(meta["config"])
    except (ValueError, TypeError, KeyError, RecursionError) as e:
        raise ModelError(f"{path}: {e if isinstance(e, ModelError) else 'its nitrogen header is damaged'}") from None
    return meta, table, path


def load(path, device="cpu", dtype=torch.float32, unused=True):
    """A checkpoint or run folder -> (model, {config, step, args, data, metrics}). Each tensor is read straight into its place, so there is
    never a second copy of the weights; unused=False leaves out the pooling head, for sampling."""
    meta, table, path = read_meta(path)
    with torch.device("meta"):
        want = {name: p.shape for name, p in NitroGen(meta["config"]).state_dict().items()}
    compare(want, {name: shape for name, (_, shape, _) in table.items()}, path)
    model = empty(meta["config"], device, dtype)
    with open(path, "rb") as f, torch.no_grad():
        for name, p in model.state_dict().items():
            stored, shape, offset = table[name]
            if stored is None:
                raise ModelError(f"{path}: tensor {name} is not stored as floating point")
            if name.startswith("vision.head.") and not unused:
                continue
            t = p if p.device.type == "cpu" and stored == dtype else torch.empty(shape, dtype=stored)
            f.seek(offset)
            if f.readinto(t.view(-1).view(torch.uint8).numpy()) != t.nbytes:
                raise ModelError(f"{path}: truncated inside tensor {name}: copy or download it again")
            if t.numel() and not all(x.isfinite() for x in t.aminmax()):           # a tenth of the time of isfinite(t)
                raise ModelError(f"{path}: expected finite weights, found NaN or infinity in tensor {name}: "
                                 "take an earlier checkpoint, or copy it again")
            if t is not p:
                p.copy_(t)
    return model.eval(), meta


def write_tensors(path, tensors, meta):
    """A .safetensors of {name: floating point tensor} and {key: text}, on the disk when this returns; rights by umask.
    (The library's save_file makes it under a random name of its own, which a kill leaves behind.)"""
    entries, end = {"__metadata__": meta}, 0
    tensors = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))      # so each is aligned
    for name, t in tensors:
        entries[name] = {"dtype": CODES[t.dtype], "shape": list(t.shape), "data_offsets": [end, end + t.nbytes]}
        end += t.nbytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(header)) + header)
        for _, t in tensors:
            f.write(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        f.flush()
        os.fsync(f.fileno())


def temporary(path):
    """Where `path` is made until it is whole, `.tmp-HOST-PID-HASH` beside it as extract.py's; what processes of this
    host that were killed left there under such names is removed."""
    start = f".tmp-{re.sub('[^A-Za-z0-9-]', '-', platform.node())}-"
    for left in path.parent.glob(start + "*-*"):
        try:
            if os.name != "nt":                                        # Windows removes no file that is written to
                os.kill(int(left.name[len(start):].split("-")[0]), 0)  # no signal, but an error where nobody has this number
                continue
        except ProcessLookupError:
            pass
        except (OSError, ValueError, OverflowError):                   # another user's process, or another's file
            continue
        with contextlib.suppress(OSError):
            left.unlink()
    return path.with_name(f"{start}{os.getpid()}-{zlib.crc32(os.fsencode(path.name)):08x}{path.suffix}")


def save(path, state, config, step=0, args=None, data=None, metrics=None):
    """Write a checkpoint, its folder too: beside its place first, then renamed, so that a reader never sees half a file.
    state: {name: tensor}; args, data, metrics: JSON dicts. ModelError where it can't be written."""
    meta = {"config": asdict(config), "step": step, "args": args or {}, "data": data or {}, "metrics": metrics or {}}
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = temporary(path)
        try:
            write_tensors(part, state, {"nitrogen": json.dumps(meta)})
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as e:
        raise ModelError(f"can't write {path} ({e.strerror}): make room or give another name") from None


# ------------------------------------------------------------------------------------------------- conversion of others' weights

# From the released names (in vision: Hugging Face's) to ours, each rule applied in turn.
RENAME = [(re.compile(a), b) for a, b in (
    (r"^vision_encoder\.(embeddings\.|encoder\.)?", "vision."), (r"^vision\.layers\.", "vision.blocks."),
    (r"\.layer_norm(\d)\.", r".norm\1."), (r"\.self_attn\.(\w+)_proj\.", r".attn.\1."), (r"(blocks\.\d+)\.mlp\.fc1\.", r"\1.ff.up."),
    (r"(blocks\.\d+)\.mlp\.fc2\.", r"\1.ff.down."), (r"^vision\.post_layernorm\.", "vision.norm."),
    (r"^vl_self_attention_model\.transformer_blocks\.", "mixing."), (r"^model\.transformer_blocks\.", "dit."),
    (r"^model\.timestep_encoder\.timestep_embedder\.", "time."), (r"^model\.proj_out_", "proj_out_"), (r"\.norm1\.linear\.", ".ada."),
    (r"\.norm3\.", ".norm2."), (r"\.attn1\.to_out\.0\.", ".attn.out."), (r"\.attn1\.to_(\w)\.", r".attn.\1."),
    (r"\.ff\.net\.0\.proj\.", ".ff.up."), (r"\.ff\.net\.2\.", ".ff.down."), (r"attention\.out_proj", "attention_out_proj"))]
GOOGLE_HEADS = {"base": 12, "large": 16, "so400m": 16, "giant": 16}     # google/siglip2-NAME-patch...; head counts are not in the weights


def rename(name):
    """A released tensor's name -> ours."""
    for pattern, new in RENAME:
        name = pattern.sub(new, name)
    return name


def vision_fields(state, heads):
    """The vision encoder's sizes, read off its tensors (our names)."""
    patch, positions = state["vision.patch_embedding.weight"].shape, len(state["vision.position_embedding.weight"])
    layers = 1 + max((int(n.split(".")[2]) for n in state if n.startswith("vision.blocks.")), default=-1)
    return dict(patch=patch[2], image=patch[2] * math.isqrt(positions), vision_width=patch[0], vision_layers=layers, vision_heads=heads,
                vision_ffn=len(state["vision.blocks.0.ff.up.weight"]) if layers else 0, pooling_head="vision.head.probe" in state)


def released_config(released, state, vision_heads, games):
    """ckpt_config of the release -> Config. Unknown keys are ignored, as the released code does; what changes no number is left out:
    training switches (tune_*, use_action_mask), dtypes, upcast_attention, num_embeds_ada_norm, mixing's output_dim."""
    m, tokenizer, modality = released["model_cfg"], released.get("tokenizer_cfg") or {}, released.get("modality_cfg") or {}
    name = m.get("vision_encoder_name", "")
    if vision_heads is None:
        vision_heads = next((n for size, n in GOOGLE_HEADS.items() if f"siglip2-{size}" in name), None)
    if vision_heads is None:
        raise ModelError(f"the file does not say how many attention heads the vision encoder {name!r} has: add --vision-heads N")

    def stack(d, **norms):
        positions = d.get("positional_embeddings", "sinusoidal")
        if positions not in (None, "sinusoidal"):
            raise ModelError(f"positional_embeddings {positions!r} is not known: expected null or 'sinusoidal'")
        return Stack(d["num_layers"], d["num_attention_heads"], d["attention_head_dim"], float(d.get("dropout", 0.1)), bool(d.get("final_dropout", True)),
                     bool(d.get("attention_bias", True)), d.get("activation_fn", "gelu-approximate"), positions == "sinusoidal",
                     d.get("max_num_positional_embeddings", 512), bool(d.get("interleave_self_attention", False)), **norms)
    d = m["diffusion_model_cfg"]
    dit = stack(d, ada=d.get("norm_type", "ada_norm") == "ada_norm", affine=bool(d.get("norm_elementwise_affine", False)),
                eps=float(d.get("norm_eps", 1e-5)))
    rows = len(state["game_embedding.weight"]) - 1 if "game_embedding.weight" in state else 0
    if games is not None and len(games) != rows:
        raise ModelError(f"--games names {len(games)} games, the checkpoint has {rows}: one name for each id from 1 on")
    c = Config(mixing=stack(m["vl_self_attention_cfg"]), dit=dit, **vision_fields(state, vision_heads),
               frames=modality.get("frame_per_sample") or 1, context_tokens=tokenizer.get("max_sequence_length") or 0,
               games=games if games is not None else [str(i + 1) for i in range(rows)],          # the file stores only a path to the names
               horizon=m["action_horizon"], action_dim=m["action_dim"], old_layout=bool(tokenizer.get("old_layout", False)),
               position_rows=m.get("max_seq_len", 1024) if m.get("add_pos_embed", True) else 0, embodiments=m.get("max_num_embodiments", 1),
               action_shift=modality.get("action_shift") or 0, frame_spacing=modality.get("frame_spacing") or m["action_horizon"],
               steps=m.get("num_inference_timesteps") or 16, buckets=m.get("num_timestep_buckets", 1000),
               beta=[float(m.get("noise_beta_alpha", 1.5)), float(m.get("noise_beta_beta", 1.0))], noise_s=float(m.get("noise_s", 0.999)))
    source = d.get("cross_attention_dim") or c.width
    for what, found, expected in (("hidden_size", m.get("hidden_size", c.width), c.width), ("output_dim", d.get("output_dim", c.width), c.width),
                                  ("vision_hidden_size", m.get("vision_hidden_size", c.vision_width), c.vision_width),
                                  ("cross_attention_dim", source, c.vision_width),
                                  ("num_visual_tokens_per_frame", tokenizer.get("num_visual_tokens_per_frame", c.image_tokens), c.image_tokens)):
        if found != expected:
            raise ModelError(f"configuration: {what} is {found}, but the other parts need {expected}")
    return c.check()


def convert_released(path, vision_heads=None, games=None):
    """ng.pt = {"model", "ckpt_config", "step", "epoch"} -> (state under our names, Config, step, a line of account). Never unpickles code."""
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as e:
        raise ModelError(f"{path}: a pickle that wants to run code ({str(e).split('.')[0][:100]}): not opened; expected the released ng.pt") from None
    except Exception as e:                                             # a damaged file meets whatever the unpickler trips over first
        raise ModelError(f"{path}: a damaged or foreign pickle ({type(e).__name__} {' '.join(str(e).split())[:100]}): download it again") from None
    if not isinstance(ckpt, dict) or not isinstance(ckpt.get("ckpt_config"), dict) or not isinstance(ckpt.get("model"), dict):
        found = list(ckpt)[:5] if isinstance(ckpt, dict) else type(ckpt).__name__
        raise ModelError(f"{path}: expected the released format (model, ckpt_config, step, epoch), found {found}: give ng.pt")
    state = {rename(n): t for n, t in ckpt["model"].items() if isinstance(n, str) and isinstance(t, Tensor) and t.dtype in CODES}
    tables = {n: state.pop(n) for n in list(state) if n.endswith(".pos_embed.pe")}
    try:
        config = released_config(ckpt["ckpt_config"], state, vision_heads, games)
    except ModelError as e:
        raise ModelError(f"{path}: {e}") from None
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as e:
        raise ModelError(f"{path}: its configuration or its tensors lack {e}: expected the released format") from None
    for name, t in tables.items():                                     # computed here, so what the file stores must be the formula's
        if t.ndim != 3 or (t[0] - sine_table(*t.shape[1:], t.device, t.dtype)).abs().max() > 1e-3:      # float32 at angles of hundreds: CPUs differ by 1e-5
            raise ModelError(f"{path}: {name} is not the sine table it should be")
    account = f"{len(ckpt['model'])} tensors read" + (f", {len(tables)} of them sine tables that are computed here" if tables else "")
    return state, config, ckpt["step"] if type(ckpt.get("step")) is int else 0, account


def convert_siglip(path, name):
    """Google's SigLIP2 (Hugging Face .safetensors, google/siglip2-*-patch16-256) -> a fresh policy of preset `name` that sees through it."""
    table, _ = read_header(path)
    theirs = {n: rename("vision_encoder." + n.removeprefix("vision_model.")) for n in table
              if n.startswith(("vision_model.", "embeddings.", "encoder.", "post_layernorm.", "head.")) and table[n][0]}
    if "vision.patch_embedding.weight" not in theirs.values():
        raise ModelError(f"{path}: expected SigLIP2 weights (vision_model.*), found tensors like {next(iter(table), 'nothing')}: "
                         "give google/siglip2-*'s model.safetensors")
    config = preset(name)
    model = create(config)
    state = model.state_dict()
    wanted = {n for n in state if n.startswith("vision.")}
    theirs = {n: ours for n, ours in theirs.items() if ours in wanted or not ours.startswith("vision.head.")}    # the head only where there is room
    compare({n: state[n].shape for n in wanted}, {ours: table[n][1] for n, ours in theirs.items()}, f"{path} for preset {name}")
    with open(path, "rb") as f, torch.no_grad():
        for n, ours in theirs.items():
            dtype, shape, offset = table[n]
            f.seek(offset)
            state[ours].copy_(torch.frombuffer(bytearray(f.read(math.prod(shape) * dtype.itemsize)), dtype=dtype).view(shape))
    return state, config, 0, f"{len(theirs)} vision tensors of {len(table)} read, the policy is random"


# -------------------------------------------------------------------------------------------------------------- the command line

def count(model):
    """(parameters, tensors) of a model."""
    state = model.state_dict()
    return sum(t.numel() for t in state.values()), len(state)


def show_presets(args):
    """Print the table of presets."""
    print(f"{'preset':10}{'parameters':>13}{'tensors':>9}{'image tokens':>14}{'actions':>10}{'weights':>10}{'training':>11}")
    for name, c in PRESETS.items():
        with torch.device("meta"):
            n, tensors = count(NitroGen(c))
        chunk = f"{c.horizon} x {c.action_dim}"
        # float32; training adds gradients, two moments and the EMA, not activations
        print(f"{name:10}{n:13,}{tensors:9}{c.image_tokens:14}{chunk:>10}{n * 4 / 1e6:7,.0f} MB{n * 20 / 1e6:8,.0f} MB")


def read_games(path):
    """NAMES.json: a list of names for the ids 1, 2, ..., or {name: id} as the released tokenizer writes it ("None" is 0)."""
    try:
        names = parse_json(Path(path).read_text(encoding="utf-8"))
        if isinstance(names, dict):
            ids = {i: n for n, i in names.items() if i != 0}
            names = [ids[i + 1] for i in range(len(ids))]
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise ValueError("other JSON")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise ModelError(f"{path}: expected a JSON list of game names or {{name: id}} with ids 1, 2, ..., found {type(e).__name__} {e}: mend it") from None
    return names


def run_convert(args):
    """Convert a released checkpoint, or Google's vision weights, to one .safetensors."""
    path = Path(args.file)
    if not path.is_file():
        raise ModelError(f"{path}: expected ng.pt or SigLIP2's model.safetensors, found {'a folder' if path.is_dir() else 'nothing there'}: check the path")
    if Path(args.out).is_dir():
        raise ModelError(f"{args.out}: expected the name of a file to write, found a folder: give another name")
    if Path(args.out).resolve() == path.resolve():
        raise ModelError(f"{args.out}: expected the name of a new file, found the one to convert: give another name")
    if "pickle" in what_is(path):
        state, config, step, account = convert_released(path, args.vision_heads, read_games(args.games) if args.games else None)
    else:
        read_header(path)                                              # says what a wrong file is before anything is asked of it
        if not args.preset:
            raise ModelError(f"{path}: expected ng.pt, found a .safetensors: to start a policy from SigLIP2's vision add --preset "
                             "(small: base-patch16-256, nitrogen: large-patch16-256)")
        state, config, step, account = convert_siglip(path, args.preset)
    with torch.device("meta"):
        compare({n: t.shape for n, t in NitroGen(config).state_dict().items()}, {n: t.shape for n, t in state.items()}, path)
    save(args.out, state, config, step, {"converted": path.name})
    print(f"{args.out}: {account}; {sum(t.numel() for t in state.values()):,} parameters in {len(state)} tensors")


def run_info(args):
    """Print what a checkpoint says of itself."""
    meta, table, path = read_meta(args.file)
    c = meta["config"]
    print(f"{path}: step {meta.get('step')}, {sum(math.prod(s) for _, s, _ in table.values()):,} parameters in {len(table)} tensors")
    print(f"{c.frames} frame(s) of {c.image_tokens} tokens in a context of {c.length}, {len(c.games)} games; {c.horizon} actions of {c.action_dim}, "
          f"{c.steps} steps")
    for key, value in {**meta, "config": asdict(c)}.items():
        print(f"{key}: {json.dumps(value)}")


class Parser(argparse.ArgumentParser):
    """argparse with its mistakes as one error line."""

    def error(self, message):
        raise ModelError(f"{message}: {self.prog} --help tells more")


def main(argv=None):
    """Parse the command line; without a command, the table of presets."""
    parser = Parser(prog="model.py", description="The policy's sizes and weights.", allow_abbrev=False)
    parser.set_defaults(run=show_presets)
    sub = parser.add_subparsers()
    p = sub.add_parser("convert", help="the released ng.pt, or Google's SigLIP2 with --preset, -> OUT.safetensors", allow_abbrev=False)
    p.add_argument("file", help="ng.pt, or google/siglip2-*-patch16-256's model.safetensors")
    p.add_argument("out", help="the .safetensors to write")
    p.add_argument("--vision-heads", type=int, help="attention heads of the vision encoder (default: known for Google's SigLIP2 names)")
    p.add_argument("--games", metavar="NAMES.json", help="names of the game ids: a list, or {name: id} (default: the ids are the names)")
    p.add_argument("--preset", help="with SigLIP2 weights: the preset of the policy around them (small, nitrogen)")
    p.set_defaults(run=run_convert)
    p = sub.add_parser("info", help="what a checkpoint holds", allow_abbrev=False)
    p.add_argument("file", help="a .safetensors or a run folder")
    p.set_defaults(run=run_info)
    try:
        args = parser.parse_args(argv)
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:                                            # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ModelError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
