"""The policy: a SigLIP2 vision transformer, vision mixing and a diffusion transformer (DiT), by hand, in
torch. Paper §3.3, arXiv 2601.02427.

One 256 x 256 frame becomes N image tokens; the noisy actions of a chunk become T action tokens that look at
them through cross-attention; the network answers with a velocity, and following it from noise (t = 0) to
t = 1 gives the next T actions [§3.4]. Nothing but the T action tokens depends on t: `encode` does vision,
mixing and the cross-attention's keys and values once a chunk, `velocity` the rest, k times a chunk.

    frames (B, F, 256, 256, 3) uint8 ── see ──> image tokens ── assemble ──> [padding, game, frames]} encode
                                                                   ── mix ──> context               }
    noisy actions (B, T, A), t (B,), context ── action encoder, DiT, decoder ──> velocity           } velocity

Letters: B batch, F context frames (oldest first), N image tokens of a frame, L context tokens, T actions of a
chunk, A action dims, D width of the DiT, V width of the vision encoder, w width of a head, k Euler steps. The
last four of the A dims are sticks, in files v in -1..1, inside the model (v + 1) / 2; a button is 0 or 1 in
both; `actions_in` and `actions_out` translate.

A checkpoint is one .safetensors: the (EMA) weights, and under "nitrogen" in its header one JSON string
{config, step, args, data, metrics}.
Comments mark who says what: [P] the paper, [R] the released code or checkpoint (ng.pt), [O] ours.

    python model.py                                 table of the presets
    python model.py convert ng.pt ng.safetensors    released -> ours (--preset: Google's SigLIP2 -> ours)
    python model.py info ng.safetensors             what a checkpoint holds
"""
import argparse
import contextlib
import copy
import functools
import json
import math
import os
import re
import shutil
import sys
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

torch.backends.cudnn.allow_tf32 = False       # float32 means float32: TF32 costs 1e-3 in an action
SLOWEST = -math.log(1e4)                      # the logarithm of the time codes' lowest frequency


class ModelError(ValueError):
    """A user's mistake: what was expected, what was found, what to do, in one line."""


# ---------------------------------------------------------------------------------------------- configuration

@dataclass
class Stack:
    """A stack of blocks. The names in brackets are the released configuration's."""
    layers: int                               # [num_layers]
    heads: int                                # [num_attention_heads]
    head_width: int                           # [attention_head_dim]
    dropout: float = 0.2                      # in four places of a block


@dataclass
class Config:
    """Everything that fixes the tensors, the sampler and the meaning of an action chunk. What has no type is
    the same for every model."""
    image = 256                               # side of a frame
    action_dim = 25                           # A = 21 buttons + 4 stick axes [R; the paper says 24]
    buckets = 1000                            # t is cut into this many time codes
    # vision encoder
    patch: int
    vision_width: int                         # V
    vision_layers: int
    vision_heads: int
    vision_ffn: int
    # vision mixing, DiT
    mixing: Stack
    dit: Stack
    stem: bool = False                        # patches through small convolutions, see Stem [O]
    # context
    frames: int = 1                           # F; more than one frame gained nothing [P §3.3]
    context_tokens: int = 0                   # L; what is not used is padding; 0 = no padding
    games: list = field(default_factory=list)          # names of the game ids 1, 2, ...; empty: no game token
    # actions
    horizon: int = 16                         # T [P: 16; R: 18]
    position_rows: int = 64                   # of the learned table of action positions [R: 1024]
    action_shift: int = 0                     # the chunk starts so many frames after the one seen [R: 3]
    frame_spacing: int = 16                   # actions between two context frames
    future: int = 0                           # context frames after the one seen: an inverse model [O]
    hz: float = 60.0                          # actions a second
    # flow matching
    steps: int = 16                           # k [P, R]
    beta: list = field(default_factory=lambda: [1.6, 0.8])       # t = (1 - Beta) * s [R]
    noise_s: float = 0.999                    # s, the largest t [R]

    @property
    def width(self):                          # D
        return self.dit.heads * self.dit.head_width

    @property
    def image_tokens(self):                   # N
        return (self.image // self.patch) ** 2

    @property
    def length(self):                         # L
        return self.context_tokens or self.needed

    @property
    def offsets(self):                        # of the context frames from the one seen, in actions
        return [(i + 1 + self.future - self.frames) * self.frame_spacing for i in range(self.frames)]

    @property
    def needed(self):                         # tokens of all frames and the game
        return self.frames * self.image_tokens + bool(self.games)

    def check(self):
        """Refuse in one line what can't be built, or is too large for any machine. Whether a
        file's tensors agree with it is seen when they are loaded."""
        for part in self, self.mixing, self.dit:
            for f in fields(part):
                value, (low, high) = getattr(part, f.name), RANGES.get(f.name, (1, MOST))
                if f.type in (int, float) and not (isinstance(value, (f.type, int)) and low <= value <= high):
                    raise ModelError(f"configuration: {f.name} = {value}, expected {low} to {high}")
        room = self.context_tokens or MOST
        if self.needed > room:
            raise ModelError(f"configuration: {self.needed} tokens of frames and game in a context of {room}")
        if self.horizon > self.position_rows or self.future >= self.frames:
            raise ModelError(f"configuration: {self.horizon} actions, {self.position_rows} positions; "
                             f"{self.frames} frames, {self.future} of them to come")
        if not all(type(name) is str for name in self.games) or not all(0.01 <= b <= 100 for b in self.beta):
            raise ModelError(f"games = {self.games}, beta = {self.beta}: expected names and numbers")
        return self


MOST = 8192                                   # a number of a configuration is in 1 .. MOST, except for these
RANGES = {"layers": (0, 256), "context_tokens": (0, MOST), "action_shift": (0, MOST), "future": (0, MOST),
          "dropout": (0, 0.99), "noise_s": (0, 1)}


# toy and nano look at 32-pixel patches, through a stem: 64 image tokens, a quarter of the cost. small takes
# Google's SigLIP2-B/16-256, nitrogen SigLIP2-L/16-256. The first five numbers are patch and vision_*.
PRESETS = {
    "toy": Config(32, 96, 4, 6, 384, mixing=Stack(1, 6, 16, 0.1), dit=Stack(3, 6, 16), stem=True),
    "nano": Config(32, 192, 6, 6, 768, mixing=Stack(2, 6, 32, 0.1), dit=Stack(6, 6, 32), stem=True),
    "small": Config(16, 768, 12, 12, 3072, mixing=Stack(2, 12, 64), dit=Stack(6, 8, 64)),
    "nitrogen": Config(16, 1024, 24, 16, 4096, mixing=Stack(4, 16, 64), dit=Stack(8, 16, 64), horizon=18,
                       context_tokens=256, position_rows=1024, action_shift=3, frame_spacing=18),
}


def preset(name, **changes):
    """A fresh Config by name; changes are fields, as in preset("toy", games=["pong"])."""
    return replace(copy.deepcopy(PRESETS[name]), **changes).check()


# ------------------------------------------------------------------------------------------------- the policy

class NitroGen(nn.Module):
    """The policy: encode(frames) -> context, velocity(a, t, context), forward = both. A context is all that a
    chunk knows of the world: keys and values of DiT block 0, of block 2, ... of each even one, stacked: (B, 2
    x even blocks, heads, L, w)."""

    def __init__(self, config):
        super().__init__()
        c, D, V = config, config.width, config.vision_width
        self.config, self.checkpointing = config, False
        # SigLIP2 of fixed resolution = SigLIP (2502.14786, 2303.15343): patches, learned positions, no class
        # token. Its pooling head is left out: the policy reads all image tokens, not their average [R].
        patches = Stem if c.stem else functools.partial(nn.Conv2d, stride=c.patch)
        self.vision = nn.ModuleDict({
            "patch_embedding": patches(6 if c.future else 3, V, c.patch),
            "position_embedding": table(c.image_tokens * (c.frames if c.future else 1), V),
            "blocks": nn.ModuleList(Block(V, c.vision_heads, c.vision_ffn, eps=1e-6)
                                    for _ in range(c.vision_layers)),
            "norm": nn.LayerNorm(V, eps=1e-6)})
        # Row 0, zeros: no game. A game's gradient is the mean over its samples, not the sum [R].
        self.game_embedding = table(len(c.games) + 1, V, padding_idx=0,
                                    scale_grad_by_freq=True) if c.games else None
        self.mixing = nn.ModuleList(Block(V, c.mixing.heads, 4 * V, c.mixing.dropout)
                                    for _ in range(c.mixing.layers))
        self.action_encoder = ActionEncoder(c.action_dim, D)
        self.position_embedding = table(c.position_rows, D)
        self.time = nn.ModuleDict({"linear_1": Linear(256, D), "linear_2": Linear(D, D)})
        self.dit = nn.ModuleList(
            Block(D, c.dit.heads, 4 * D, c.dit.dropout, source=D if i % 2 else V, timed=True)
            for i in range(c.dit.layers))
        self.proj_out_1, self.proj_out_2 = Linear(D, 2 * D), Linear(D, D)
        self.action_decoder = nn.ModuleDict(
            {"layer1": ActionLinear(D, D), "layer2": ActionLinear(D, c.action_dim)})

    def forward(self, a, t, frames, games=None, keep=None):
        """Training's way in (DDP sees only this). a (r B, T, A), t (r B,): r noises and times for each
        context."""
        r = len(a) // len(frames)
        return self.velocity(a, t, self.encode(frames, games, keep).repeat_interleave(r, dim=0))

    def encode(self, frames, games=None, keep=None):
        """Frames (B, F, 256, 256, 3), or what see() made of them, -> their context, computed once a chunk."""
        return self.mix(self.assemble(self.see(frames) if frames.ndim == 5 else frames, games, keep))

    def see(self, frames):
        """uint8 RGB (B, F, 256, 256, 3), or floats of the same range, -> image tokens (B, F, N, V)."""
        x = (frames.permute(0, 1, 4, 2, 3) / 127.5).sub_(1)                           # (B, F, 3, 256, 256)
        if self.config.future:                     # an inverse model sees what moved, too
            x = torch.cat([x, x.diff(dim=1, prepend=x[:, :1])], dim=2)                # (B, F, 6, 256, 256)
        x = self.vision.patch_embedding(x.flatten(0, 1).to(self.proj_out_2.weight.dtype))
        x = x.flatten(2).transpose(1, 2).unflatten(0, frames.shape[:2])               # (B, F, N, V)
        places = self.vision.position_embedding.weight.unflatten(0, (-1, x.shape[2]))  # (1 or F, N, V)
        x = (x + places).flatten(0, 1)
        for block in self.vision.blocks:
            x = self.run(block, x)                                                    # (B F, N, V)
        return self.vision.norm(x).unflatten(0, frames.shape[:2])                     # (B, F, N, V)

    def assemble(self, seen, games=None, keep=None):
        """Image tokens (B, F, N, V) -> the context before mixing (B, L, V): [padding zeros, game token if the
        model has games, frames].

        games (B,) ids, 0 or None = no game. keep (B, F) bool: a frame that is not kept leaves no token, its
        room becomes padding [R]. Fewer frames than the model has room for are taken for the newest ones.
        """
        c, (B, n, N) = self.config, seen.shape[:3]                                    # n of F frames
        x = seen.flatten(1, 2)                                                        # (B, n N, V)
        if c.games:
            games = torch.zeros(B, dtype=torch.long, device=x.device) if games is None else games
            x = torch.cat([self.game_embedding(games)[:, None], x], dim=1)            # (B, 1 + n N, V)
        if keep is not None:
            kept = keep.repeat_interleave(N, dim=1)                                   # (B, n N)
            kept = F.pad(kept, (int(bool(c.games)), 0), value=True)                   # the game token stays
            order = kept.to(torch.uint8).argsort(dim=1, stable=True)                  # dropped ones first
            x = (x * kept[..., None]).take_along_dim(order[..., None], dim=1)
        if x.shape[1] > c.length:
            raise ModelError(f"{n} frames are too many: the context has room for {c.frames}")
        return F.pad(x, (0, 0, c.length - x.shape[1], 0))                             # (B, L, V)

    def mix(self, x):
        """Self-attention over (B, L, V), then the keys and values of the even DiT blocks -> the context. No
        mask: padding takes part in both kinds of attention [R]."""
        for block in self.mixing:
            x = self.run(block, x)                                                    # (B, L, V)
        return torch.stack([tensor for block in self.dit[::2] for tensor in block.attn.kv(x)], dim=1)

    def velocity(self, a, t, context):
        """Noisy actions a (B, T, A) at times t (B,), context -> velocity (B, T, A), an estimate of action
        minus noise [Eq. 3, §3.4]."""
        return self.step(a, self.times(t), context)

    def times(self, t):
        """Time t (B,) in [0, 1), or integers = bucket numbers -> all that depends on the time alone, stacked,
        (B, 1 + 2 (DiT blocks + 1), 1, D): its share of the action encoder, scale and shift of each block's
        norm1, shift and scale (in this order [R]) of the last norm.

        The time has two codes, cosines and sines of its bucket number: one for the norms, `tau` for the
        action encoder. Each computes its frequencies in its own order, as in the release: another rounding is
        3e-5 in the velocity."""
        dtype, half = self.proj_out_2.weight.dtype, self.config.width // 2
        bucket = ((t * self.config.buckets).long() if t.is_floating_point() else t)[:, None]
        angle = bucket * torch.exp(SLOWEST * torch.arange(128, device=t.device) / 127)
        x = torch.cat([angle.cos(), angle.sin()], dim=1).to(dtype)                    # (B, 256), cos first
        x = F.silu(self.time.linear_2(F.silu(self.time.linear_1(x))))[:, None]        # (B, 1, D)
        angle = bucket * torch.exp(torch.arange(half, device=t.device) * (SLOWEST / half))
        tau = torch.cat([angle.sin(), angle.cos()], dim=1)[:, None].to(dtype)         # (B, 1, D), sin first
        layers = *(block.ada for block in self.dit), self.proj_out_1
        norms = [part for layer in layers for part in layer(x).chunk(2, dim=-1)]      # (B, 1, D) each
        W2 = self.action_encoder.W2
        code = tau @ W2.W[0, tau.shape[-1]:] + W2.b[0]             # (B, 1, D): tau meets W2's lower half
        return torch.stack([code, *norms], dim=1)

    def step(self, a, times, context):
        """velocity() with the answer of times(): noisy actions (B, T, A) -> velocity (B, T, A)."""
        kv, (code, *norms, shift, scale) = context.unbind(1), times.unbind(1)
        x = self.action_encoder(a.to(self.proj_out_2.weight.dtype), code)             # (B, T, D)
        x = x + self.position_embedding.weight[:a.shape[1]]
        for i, block in enumerate(self.dit):       # even ones attend to the context, odd ones to x [P §3.3]
            x = self.run(block, x, norms[2 * i:2 * i + 2], kv[i:i + 2] if i % 2 == 0 else None)
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
        x = F.relu(self.action_decoder.layer1(self.proj_out_2(x)))
        return self.action_decoder.layer2(x).to(a.dtype)                              # (B, T, A)

    def run(self, block, *args):
        """A block, with its activations recomputed in the backward pass when `checkpointing` is set."""
        if self.checkpointing:
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def freeze(self, *parts):
        """Stop training parts: any of vision, mixing, dit, action (encoder and decoder), games."""
        known = {"vision": "vision", "mixing": "mixing", "dit": "dit|time|proj_out", "games": "game",
                 "action": "action|position"}
        for name, p in self.named_parameters():
            if any(re.match(known[part], name) for part in parts):
                p.requires_grad_(False)

    @torch.no_grad()
    def init(self, seed=0):
        """Fresh weights for training from scratch; the same for a seed on every machine."""
        g = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if re.search("(position|game)_embedding", name):
                p.normal_(0, 0.02, generator=g)
                if name.startswith("game"):
                    p[0] = 0
            elif name.endswith((".bias", ".b")):
                p.zero_()
            elif p.ndim == 1:                      # a norm's weights
                p.fill_(1)
            else:                                  # Glorot's bound keeps the variance of what passes through
                w = p[0] if name.endswith(".W") else p
                bound = math.sqrt(6 / (len(w) + w[0].numel()))
                p.uniform_(-bound, bound, generator=g)
        for stack in self.vision.blocks, self.mixing, self.dit:
            for block in stack:                    # deep stacks add no more than shallow ones (GPT-2, §2.3)
                for layer in block.attn.out, block.ff.down:
                    layer.weight.mul_((2 * len(stack)) ** -0.5)
        self.action_encoder.W1.W.mul_(3)           # so an action has more weight in its token than the time
        for layer in (*(block.ada for block in self.dit), self.proj_out_1):
            layer.weight.zero_()                   # at first all times are alike, as in DiT (2212.09748 §3.2)
        self.action_decoder.layer2.W.zero_()       # and every velocity is 0
        return self


class Stem(nn.Sequential):
    """A patch embedding of small strided convolutions: 4 x 4 with stride 4, then 3 x 3, each of which halves
    the picture (2106.14881). A linear map of a 32 x 32 patch has to learn an object anew for each place in
    it: from the same frames of three games this stem learned sticks with R2 0.85, that map none [O]."""
    def __init__(self, colours, width, patch):
        halvings = patch.bit_length() - 3                              # log2(patch / 4): the first layer's 4
        widths = [*(min(16 << n, width) for n in range(halvings)), width]
        layers = [nn.Conv2d(colours, widths[0], 4, 4)]
        for a, b in zip(widths, widths[1:]):
            layers += [nn.GELU(), nn.Conv2d(a, b, 3, 2, 1)]
        super().__init__(*layers)


class Block(nn.Module):
    """One transformer block for all three stacks: attention and feed-forward, each after a norm and added to
    its input.

    Vision: norms with weights, self-attention, no dropout. Mixing: the same with eps 1e-5 and dropouts. DiT
    (timed): norm1 is AdaLN, scaled and shifted by what the time says; norm2 has neither weights nor scale and
    shift, and there are no gates, unlike DiT's own AdaLN-Zero (2212.09748) [R].
    """
    def __init__(self, width, heads, inner, dropout=0.0, source=None, timed=False, eps=1e-5):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps, elementwise_affine=not timed)
        self.ada = Linear(width, 2 * width) if timed else None
        self.attn = Attention(width, heads, source or width)
        self.norm2 = nn.LayerNorm(width, eps, elementwise_affine=not timed)
        self.ff = nn.ModuleDict({"up": Linear(width, inner), "down": Linear(inner, width)})
        self.dropout = dropout

    def forward(self, x, modulation=None, kv=None):
        """x (B, tokens, width); modulation: scale and shift, (B or 1, 1, width) each; kv: keys and values, if
        not x's own."""
        drop = functools.partial(F.dropout, p=self.dropout, training=self.training)
        y = self.norm1(x)
        if modulation:
            scale, shift = modulation
            y = y * (1 + scale) + shift
        x = x + drop(drop(self.attn(y, kv)))                           # two dropouts on the same output [R]
        y = F.gelu(self.ff.up(self.norm2(x)), approximate="tanh")
        return x + drop(self.ff.down(drop(y)))


class Attention(nn.Module):
    """Multi-head attention of tokens of `width` to tokens of width `source`, whose keys and values can be
    computed once."""

    def __init__(self, width, heads, source):
        super().__init__()
        if width % heads:
            raise ModelError(f"{width} channels do not divide into {heads} heads")
        self.heads = heads
        self.q, self.k, self.v = Linear(width, width), Linear(source, width), Linear(source, width)
        self.out = Linear(width, width)

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)                      # (B, heads, tokens, w)

    def kv(self, source):
        """Keys and values of the attended tokens: for cross-attention the same at every step, so `mix` keeps
        them."""
        return self.split(self.k(source)), self.split(self.v(source))

    def forward(self, x, kv=None):
        k, v = kv or self.kv(x)
        y = F.scaled_dot_product_attention(self.split(self.q(x)), k, v)               # (B, heads, tokens, w)
        return self.out(y.transpose(1, 2).flatten(2))


class ActionEncoder(nn.Module):
    """swish([a W1, tau] W2) W3: a noisy action a and the time code tau become an action token. `code`: what
    tau adds to the product with W2, the same for all actions, so times() has it at hand."""
    def __init__(self, A, D):
        super().__init__()
        self.W1, self.W2, self.W3 = ActionLinear(A, D), ActionLinear(2 * D, D), ActionLinear(D, D)

    def forward(self, a, code):
        x = self.W1(a) @ self.W2.W[0, :code.shape[-1]] + code                         # (B, T, D)
        return self.W3(F.silu(x))


class ActionLinear(nn.Module):
    """x W + b. W is stored as (1, in, out): the release has room for one for each kind of robot, and uses one
    [R]."""
    def __init__(self, n_in, n_out):
        super().__init__()
        self.W = nn.Parameter(torch.empty(1, n_in, n_out))
        self.b = nn.Parameter(torch.empty(1, n_out))

    def forward(self, x):
        return linear(x, self.W[0].t(), self.b[0])


class Linear(nn.Linear):
    """nn.Linear that multiplies by linear()."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)


def linear(x, weight, bias):
    """F.linear(), in float32 on a CPU through oneDNN where that is faster. torch's own product is MKL's,
    which uses no AVX-512 on AMD: there oneDNN is up to 1.9 times faster. On a CPU without AVX-512 it is
    faster only for the T rows of a denoising step and large weights, up to 1.6 times (Zen 3)."""
    rows = x.numel() // x.shape[-1]
    few = rows <= 64 and weight.numel() >= 1 << 18 and not torch.is_grad_enabled()
    pays = rows * weight.numel() >= 1 << 20 if AVX512 else few         # its call costs some microseconds more
    if (pays and ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()):
        return Product.apply(x, weight, bias)
    return F.linear(x, weight, bias)


AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Product(torch.autograd.Function):
    """x weight^T + bias and its gradients through oneDNN, on a CPU in float32."""

    @staticmethod
    def multiply(x, weight, bias=None):
        """The one private call; F.linear gives the same."""
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return Product.multiply(x, weight, bias)

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        x_needs, weight_needs, bias_needs = ctx.needs_input_grad
        rows = g.flatten(0, -2)                                        # (rows, out)
        return (Product.multiply(g, weight.t()) if x_needs else None,
                Product.multiply(rows.t(), x.flatten(0, -2).t()) if weight_needs else None,
                rows.sum(0) if bias_needs else None)


def table(rows, width, **options):
    """An nn.Embedding whose rows init() or a checkpoint fills (its own random fill takes seconds on meta
    tensors)."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False, **options)


def actions_in(actions):
    """Actions of a file (..., A): buttons, then left x, y, right x, y in [-1, 1] -> the model's: sticks (v +
    1) / 2."""
    return torch.cat([actions[..., :-4], (actions[..., -4:] + 1) / 2], dim=-1)


def actions_out(raw):
    """The sampler's tensor (..., A) -> actions of a file: buttons 0 or 1 (> 0.5), sticks clamped to [-1,
    1]."""
    return torch.cat([(raw[..., :-4] > 0.5).to(raw.dtype), (raw[..., -4:] * 2 - 1).clamp(-1, 1)], dim=-1)


# -------------------------------------------------------------------------------------------------- machinery

def sketch(config):
    """The model without memory: names and sizes of its tensors, on the meta device."""
    with torch.device("meta"):
        return NitroGen(config)


def create(config, seed=0, device="cpu"):
    """A fresh model with random weights."""
    return sketch(config).to_empty(device="cpu").init(seed).to(device)


def count(model):
    """(parameters, tensors) of a model."""
    state = model.state_dict()
    return sum(t.numel() for t in state.values()), len(state)


def pick_device(wanted="auto"):
    """"auto", "cpu", "cuda", "cuda:1", "mps" -> (device, the reason in words, for the caller to print)."""
    if wanted != "auto":
        with reading(f"device {wanted}", "one that can be used here"):
            torch.empty(1, device=wanted).item()
        return torch.device(wanted), "asked for"
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return torch.device("cpu"), f"no GPU found; {torch.get_num_threads()} threads"
    return device, torch.cuda.get_device_name() if device.type == "cuda" else "found here"


@contextlib.contextmanager
def reading(path, expected):
    """Whatever is wrong inside a file from elsewhere becomes one line that names the file."""
    try:
        yield
    except Exception as e:                         # readers of foreign files raise what they like
        found = f"{type(e).__name__} {' '.join(str(e).split())[:200].partition('. ')[0]}"
        line = e if isinstance(e, ModelError) else f"expected {expected}, found {found}"
        raise ModelError(f"{path}: {line}") from None


@contextlib.contextmanager
def opened(path):
    """A .safetensors, or a run folder's model.safetensors, as safetensors opens it; nothing is read before it
    is asked for. What is wrong in the block is one line that names the file."""
    path = Path(path)
    if path.is_dir():
        path /= "model.safetensors"
    with reading(path, "a .safetensors of train.py or `model.py convert ng.pt`"), safe_open(path, "pt") as f:
        yield f


def tensors(f):
    """(name, tensor) of an opened file, each of them finite. They are parts of the mapped file: copy what is
    kept."""
    for name in f.keys():
        t = f.get_tensor(name)
        if not all(x.isfinite() for x in t.aminmax()):                 # a tenth of the time of isfinite(t)
            raise ModelError(f"expected finite weights, found NaN or infinity in tensor {name}: "
                             "take an earlier checkpoint, or copy it again")
        yield name, t


def parse_json(text):
    """What a JSON text of a file says; ValueError also for half a surrogate pair, a letter that nothing can
    print."""
    value = json.loads(text)
    json.dumps(value, ensure_ascii=False).encode()
    return value


def read_config(said):
    """A Config out of a header's JSON, which nobody vouches for; keys of other versions are ignored."""
    def build(kind, said):
        return kind(**{key: said[key] for key in said if key in kind.__annotations__})
    stacks = {"mixing": build(Stack, said["mixing"]), "dit": build(Stack, said["dit"])}
    return build(Config, said | stacks).check()


def header(f):
    """{config, step, args, data, metrics} of an opened checkpoint, the configuration checked."""
    meta = parse_json((f.metadata() or {})["nitrogen"])
    return meta | {"config": read_config(meta["config"])}


def read_meta(path):
    """A checkpoint's {config, step, args, data, metrics} and its tensors' {name: shape}; no tensor is
    read."""
    with opened(path) as f:
        return header(f), {name: f.get_slice(name).get_shape() for name in f.keys()}


def load(path, device="cpu", dtype=torch.float32):
    """A checkpoint or run folder -> (model, {config, step, args, data, metrics}). Strict; one tensor at a
    time is copied, so there is never a second copy of the weights."""
    with opened(path) as f:
        meta = header(f)
        model = sketch(meta["config"])
        state = {name: t.to(device, dtype, copy=True) for name, t in tensors(f)}
        model.load_state_dict(state, assign=True)                      # names every tensor that does not fit
    return model.eval(), meta


def save(path, state, config, step=0, args=None, data=None, metrics=None):
    """Write a checkpoint, its folder too. state: {name: tensor}; args, data, metrics: JSON dicts."""
    meta = {"config": asdict(config), "step": step, "args": args or {}, "data": data or {},
            "metrics": metrics or {}}
    write_tensors(Path(path), state, {"nitrogen": json.dumps(meta)})


def write_tensors(path, tensors, meta):
    """A .safetensors of {name: tensor} and {key: text}: made whole, and on the disk, in the folder .tmp-NAME
    beside it first, then renamed, so that a reader never sees half a file; what a killed process left there
    is removed. ModelError where it can't be written."""
    folder = path.with_name(f".tmp-{path.name}")
    part = folder / str(os.getpid())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: t.contiguous() for name, t in tensors.items()}, part, meta)
        part.chmod(folder.stat().st_mode & 0o666)                      # the library leaves 0600
        with open(part, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(part, path)
    except (SafetensorError, OSError) as e:
        raise ModelError(f"can't write {path} ({e}): make room or give another name") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# From the released names (in vision: Hugging Face's) to ours, each rule applied in turn.
RENAME = (
    (r"^vision_encoder\.(embeddings\.|encoder\.)?", "vision."), (r"^vision\.layers\.", "vision.blocks."),
    (r"^vision\.post_layernorm\.", "vision.norm."), (r"^model\.transformer_blocks\.", "dit."),
    (r"^vl_self_attention_model\.transformer_blocks\.", "mixing."),
    (r"^model\.timestep_encoder\.timestep_embedder\.", "time."),
    (r"^model\.proj_out_", "proj_out_"), (r"\.layer_norm(\d)\.", r".norm\1."), (r"\.norm3\.", ".norm2."),
    (r"\.norm1\.linear\.", ".ada."), (r"\.(mlp\.fc1|ff\.net\.0\.proj)\.", ".ff.up."),
    (r"\.(mlp\.fc2|ff\.net\.2)\.", ".ff.down."),
    (r"\.(self_attn|attn1)\.(to_)?(q|k|v|out)(_proj|\.0)?\.", r".attn.\3."))


def rename(name):
    """A released tensor's name -> ours."""
    for pattern, new in RENAME:
        name = re.sub(pattern, new, name)
    return name


def convert_released(path, vision_heads=None, games=None):
    """ng.pt = {"model", "ckpt_config", "step", "epoch"} -> (state under our names, Config, account: its step,
    how many tensors it has and how many of them, a pooling head, nothing reads). Never unpickles code."""
    with reading(path, "the released format (model, ckpt_config, step, epoch), or with --preset SigLIP2's"):
        ckpt = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        state = {rename(name): t for name, t in ckpt["model"].items()
                 if not name.startswith("vision_encoder.head.")}
        config = released_config(ckpt["ckpt_config"], state, vision_heads, games)
        sketch(config).load_state_dict(state, assign=True)
        n = len(ckpt["model"])
        return state, config, {"step": int(ckpt["step"]), "tensors": n, "unused": n - len(state)}


# Settings that tensors do not show, as every released checkpoint has them: another value is refused.
RELEASED = {"activation_fn": "gelu-approximate", "positional_embeddings": None, "norm_eps": 1e-5,
            "final_dropout": True, "interleave_self_attention": True, "num_timestep_buckets": 1000,
            "old_layout": False}


def released_config(said, state, vision_heads, games):
    """ckpt_config of the release -> Config. What changes no number is ignored, as are unknown keys (as in the
    released code); games: names, since the format stores only a path to them."""
    m, tokenizer, modality = said["model_cfg"], said["tokenizer_cfg"], said["modality_cfg"]
    mixing, dit = m["vl_self_attention_cfg"], m["diffusion_model_cfg"]
    for section in m, tokenizer, mixing | {"interleave_self_attention": True}, dit:
        for key, value in RELEASED.items():
            if section.get(key, value) != value:
                raise ModelError(f"{key} is {section[key]!r}, expected {value!r}: nothing else is supported")
    encoder, (V, _, patch, _) = m["vision_encoder_name"], state["vision.patch_embedding.weight"].shape
    layers = len({name.split(".")[2] for name in state if name.startswith("vision.blocks.")})
    if vision_heads is None and not re.search("siglip2-(base|large)-", encoder):
        raise ModelError(f"how many attention heads {encoder!r} has is not said: add --vision-heads N")
    games = games or [str(i) for i in range(1, len(state.get("game_embedding.weight", [0])))]
    names = "num_layers", "num_attention_heads", "attention_head_dim", "dropout"
    stacks = [Stack(*map(section.get, names)) for section in (mixing, dit)]
    ffn = len(state["vision.blocks.0.ff.up.weight"])
    return Config(patch, V, layers, vision_heads or V // 64, ffn, *stacks, games=games,
                  frames=modality["frame_per_sample"], context_tokens=tokenizer["max_sequence_length"],
                  horizon=m["action_horizon"], position_rows=m["max_seq_len"],
                  action_shift=modality["action_shift"], frame_spacing=modality["frame_spacing"],
                  steps=m["num_inference_timesteps"],
                  beta=[m["noise_beta_alpha"], m["noise_beta_beta"]], noise_s=m["noise_s"]).check()


def convert_siglip(path, name):
    """Google's SigLIP2 (google/siglip2-*-patch16-256's .safetensors) -> a fresh policy of preset `name` that
    sees through it."""
    model = create(preset(name))
    with opened(path) as f:
        theirs = {rename("vision_encoder." + name.removeprefix("vision_model.")): name for name in f.keys()}
        state = {name: f.get_tensor(theirs["vision." + name]) for name in model.vision.state_dict()}
        model.vision.load_state_dict(state)
    return model.state_dict(), model.config, {"step": 0, "tensors": len(state)}


# ------------------------------------------------------------------------------------------- the command line

def show_presets(args):
    """Print the table of presets; bytes as float32, training with gradients, two moments and EMA, no
    activations."""
    print("preset       parameters  tensors  image tokens   actions   weights   training")
    for name, c in PRESETS.items():
        n, parts = count(sketch(c))
        print(f"{name:10}{n:13,}{parts:9}{c.image_tokens:14}{c.horizon:>5} x {c.action_dim}"
              f"{n * 4 / 1e6:7,.0f} MB{n * 20 / 1e6:8,.0f} MB")
    print("The released 493,631,513 in 595 tensors have 12,595,200 in 11 more: a pooling head, unused.")


def read_games(path):
    """NAMES.json: a list of names for the ids 1, 2, ..., or {name: id} as the released tokenizer writes it
    ("None" is 0)."""
    with reading(path, "a JSON list of game names or {name: id} with ids 1, 2, ..."):
        names = parse_json(Path(path).read_text(encoding="utf-8"))
        return sorted(filter(names.get, names), key=names.get) if isinstance(names, dict) else list(names)


def run_convert(args):
    """Convert a released checkpoint, or Google's vision weights, to one .safetensors."""
    if Path(args.out).resolve() == Path(args.file).resolve():
        raise ModelError(f"{args.out}: expected the name of a new file: give another name")
    if args.preset:
        state, config, account = convert_siglip(args.file, args.preset)
    else:
        games = read_games(args.games) if args.games else None
        state, config, account = convert_released(args.file, args.vision_heads, games)
    save(args.out, state, config, account["step"], account | {"converted": Path(args.file).name})
    print(f"{args.out}: {account}, written {len(state)}")


def run_info(args):
    """Print what a checkpoint says of itself."""
    meta, shapes = read_meta(args.file)
    print(f"{args.file}: {sum(map(math.prod, shapes.values())):,} parameters in {len(shapes)} tensors")
    print(json.dumps(meta, default=asdict, indent=1))


class ArgumentParser(argparse.ArgumentParser):
    """argparse with its mistakes as one error line."""

    def error(self, message):
        raise ModelError(f"{message}: {self.prog} --help tells more")


def main(argv=None):
    """Parse the command line; without a command, the table of presets."""
    parser = ArgumentParser(prog="model.py", description="The policy's sizes, weights.", allow_abbrev=False)
    parser.set_defaults(run=show_presets)
    sub = parser.add_subparsers()
    p = sub.add_parser("convert", allow_abbrev=False,
                       help="the released ng.pt, or Google's SigLIP2 with --preset, -> OUT.safetensors")
    p.add_argument("file", help="ng.pt, or google/siglip2-*-patch16-256's model.safetensors")
    p.add_argument("out", help="the .safetensors to write")
    p.add_argument("--vision-heads", type=int,
                   help="attention heads of the vision encoder (default: known for Google's SigLIP2 names)")
    p.add_argument("--games", metavar="NAMES.json",
                   help="names of the game ids: a list, or {name: id} (default: the ids are the names)")
    p.add_argument("--preset", choices=PRESETS,
                   help="FILE is SigLIP2's: the preset of the policy around it (small, nitrogen)")
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
