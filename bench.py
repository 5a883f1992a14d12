"""bench.py: what is claimed is measured here, on ten small games that are part of it [P 3.2: 10 games, 30 tasks].

    python bench.py demo --out DIR                                            everything, end to end, in about ten minutes on two cores
    python bench.py record --out DATA [--games G..] [--minutes M] [--video]   scripted play -> clip folders, or videos with an overlay
    python bench.py suite --ckpt F [--tasks T..] [-n N] [--out DIR]           completion of tasks, beside random and scripted players
    python bench.py suite --env ID [--ckpt F] [-n N] [--table T.json]         a game by others, by its Gymnasium id; record takes --env too
    python bench.py games --out DIR                                           a picture of the ten games
    python bench.py transfer --out DIR [--games G..]                          pre-training on other games against training from scratch
    python bench.py latency [--preset nitrogen]                               one chunk by part, against the released way of sampling
    python bench.py throughput [--video FILE] [--out DIR]                     a step of each game, training, cutting clips, the parser

The games take the 25-dim action and give 256 x 256 frames, 30 a second of game time, the same for the same seed. In: nothing but the shipped
weights, or a checkpoint. Out: tables on the terminal; under --out clip folders, videos, pictures, JSON. Ratios are taken in one run on one
machine; bare times say little elsewhere.
"""
import argparse
import cmath
import contextlib
import csv
import fnmatch
import functools
import gc
import importlib
import io
import itertools
import json
import math
import os
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections import ChainMap, deque, namedtuple
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image

import extract
import model as M
import parse
import play
import sample
import train
from extract import UserError, neutral

# -------------------------------------------------------------------------------------------------------- the engine of the games
# Places are complex numbers, x right and y down: in cells of a map (first person) or in pixels. A step is 1/30 s of game time. A frame shows all that a
# player needs: there is no hidden state but what other actors will do next.
FPS = 30
MENU = ("BACK", "START", "GUIDE")
Thing = types.SimpleNamespace                      # an actor or an object: kind, at (its place), and what its game adds

# Pictures on a grid of 64 x 64, a shape at a time: o x y r = disc, b x0 y0 x1 y1 = box, p x y x y ... = polygon; last its colour. Actors look to the right.
ICONS = {
    "ghoul": "o 32 22 18 5c6;b 14 22 50 60 5c6;p 14 60 22 50 32 60 42 50 50 60 284;o 25 20 5 fff;o 40 20 5 fff;o 26 21 2 000;o 41 21 2 000;b 24 31 42 35 131",
    "ghoul!": "o 32 22 18 f44;b 14 22 50 60 f44;p 2 10 14 30 14 44 f44;p 62 10 50 30 50 44 f44;o 25 20 6 ff0;o 40 20 6 ff0;b 20 30 46 40 300",
    "portal": "b 12 4 52 63 a8f;o 32 24 18 fff;b 14 24 50 63 fff;o 32 26 13 5ef;b 19 26 45 63 5ef",
    "lock": "b 12 4 52 63 863;o 32 26 13 fc3;o 32 26 7 863;b 18 30 46 52 fc3",
    "key": "o 18 32 15 fd2;o 18 32 7 a60;b 28 28 62 37 fd2;b 48 34 53 48 fd2;b 56 34 62 50 fd2",
    "crate": "b 6 10 58 62 c83;b 6 10 58 18 fc7;p 10 20 16 20 56 58 50 58 852", "drone": "b 2 20 62 28 ccd;o 32 34 20 e33;o 32 34 11 fff;o 32 34 6 000",
    "beacon": "p 28 0 36 0 42 44 22 44 7ff;b 14 44 50 62 06c;o 32 20 12 fff",
    "car": "b 6 26 58 52 f22;p 14 28 20 10 44 10 50 28 8cf;b 8 50 20 60 111;b 44 50 56 60 111;o 12 38 5 ff9;o 52 38 5 ff9",
    "tree": "b 26 40 38 63 742;p 32 0 58 44 6 44 283",
    "rival": "b 6 26 58 52 26f;p 14 28 20 10 44 10 50 28 cef;b 8 50 20 60 111;b 44 50 56 60 111;b 10 36 22 42 f33;b 42 36 54 42 f33",
    "post": "b 24 0 40 63 fff;b 24 0 40 16 f30;b 24 32 40 48 f30", "bay": "b 29 20 35 63 eee;o 32 18 17 06f;b 26 8 31 28 fff;o 35 14 6 fff;o 35 14 2 06f",
    "hero": "o 32 32 20 4af;b 36 26 62 38 def;o 28 32 10 fff",
    "bug": "o 30 32 22 f3a;o 44 24 5 fff;o 44 40 5 fff;p 40 14 60 6 50 24 f3a;p 40 50 60 58 50 40 f3a",
    "brute": "o 32 32 30 f70;o 32 32 18 720;p 44 14 64 32 44 50 ff0", "brute!": "o 32 32 30 f22;o 32 32 18 fff;p 44 14 64 32 44 50 ff0",
    "gem": "p 32 4 58 26 32 60 6 26 3fc;p 32 4 44 26 32 60 20 26 cff",
    "mine": "o 32 32 22 333;o 32 32 12 f00;p 32 0 38 14 26 14 999;p 32 64 38 50 26 50 999;p 0 32 14 26 14 38 999;p 64 32 50 26 50 38 999",
    "knight": "o 30 32 20 36d;b 40 28 64 36 eee;o 26 32 11 fc9;b 38 20 44 44 a62",
    "slime": "o 32 36 24 3d3;b 8 36 56 58 3d3;o 24 30 6 fff;o 42 30 6 fff;o 25 31 3 000;o 43 31 3 000",
    "stairs": "b 4 4 60 60 222;b 4 46 60 60 fff;b 16 32 60 46 ddd;b 28 18 60 32 bbb;b 40 4 60 18 999",
    "chest": "b 4 20 60 58 b60;b 4 8 60 24 d82;b 4 24 60 30 fd3;b 26 20 38 40 fd3", "thief": "o 32 32 20 28f;o 32 32 11 024;p 44 24 62 32 44 40 8cf",
    "guard": "o 32 32 22 e32;o 32 32 12 ffc;p 46 20 64 32 46 44 ff0", "exit": "b 6 6 58 58 0c4;p 12 24 34 24 34 12 56 32 34 52 34 40 12 40 fff",
    "runner": "o 34 14 12 fb8;b 22 24 44 46 e42;b 20 46 30 63 24a;b 36 46 46 63 24a;b 22 4 46 10 e42;o 40 13 2 000",
    "flag": "b 12 0 18 63 fff;p 18 4 60 18 18 32 e22", "coin": "o 32 32 26 fc0;o 32 32 17 fe7;b 29 20 35 44 c80",
    "soldier": "o 32 14 12 9a5;b 20 24 44 46 674;b 20 46 30 63 453;b 34 46 44 63 453;b 40 28 62 36 222",
    "copter": "b 4 8 60 12 eee;o 26 32 20 4c4;b 36 26 62 36 4c4;o 22 30 10 cff;b 10 54 46 58 eee",
    "trooper": "o 32 14 12 fb8;b 20 24 44 46 38f;b 20 46 30 63 136;b 34 46 44 63 136;b 20 4 46 9 f22",
    "turret": "b 10 30 54 62 86a;o 32 28 20 c4c;o 32 28 9 fff", "wire": "p 4 63 16 10 28 63 f33;p 20 63 32 2 44 63 f33;p 36 63 48 10 60 63 f33",
    "plane": "p 2 20 12 20 22 30 60 30 64 36 54 42 10 42 ff4;p 20 34 40 34 22 58 fa0;o 44 31 6 4cf",
    "foe": "p 62 20 52 20 42 30 4 30 0 36 10 42 54 42 e24;p 44 34 24 34 42 58 902;o 20 31 6 fff",
    "tank": "b 4 36 60 58 5a4;o 32 34 15 7d5;b 2 28 32 34 7d5;o 14 56 7 222;o 32 56 7 222;o 50 56 7 222", "bomb": "o 32 38 20 222;b 26 4 38 22 f80",
    "monk": "o 32 14 12 fc9;b 20 24 44 46 f80;b 20 46 30 63 f80;b 34 46 44 63 f80;b 40 26 62 34 fc9;b 20 36 44 40 400",
    "open": "o 32 14 12 fc9;b 20 24 44 63 3d4;b 12 26 20 50 fc9;b 44 26 52 50 fc9", "shut": "o 32 14 12 fc9;b 20 24 44 63 36f;b 40 8 58 50 cdf",
    "wind": "o 32 14 12 fc9;b 20 24 44 63 f22;o 54 12 10 ff0;b 40 16 52 30 f22", "idle": "o 32 14 12 aaa;b 20 24 44 63 888",
    "board": "b 14 2 50 62 da5;b 22 2 26 62 a72;b 38 2 42 62 a72"}


def colour(code):
    """'f80' -> (255, 136, 0)."""
    return tuple(17 * int(c, 16) for c in code)


@functools.lru_cache(2048)
def icon(name, size, turn=0, flip=False):
    """A picture of ICONS at `size` pixels, turned by turn / 32 of a circle (clockwise), with a dark rim -> uint8 (size, size, 3), mask (size, size)."""
    big = np.zeros((256, 256, 4), np.uint8)
    for shape in ICONS[name].split(";"):
        kind, *numbers, ink = shape.split()
        v, rgba = [round(3.4 * float(n) + 19) for n in numbers], (*colour(ink), 255)
        if kind == "o":
            cv2.circle(big, (v[0], v[1]), round(3.4 * float(numbers[2])), rgba, -1)
        else:
            points = [(v[0], v[1]), (v[2], v[1]), (v[2], v[3]), (v[0], v[3])] if kind == "b" else list(zip(v[::2], v[1::2]))
            cv2.fillPoly(big, [np.int32(points)], rgba)
    if turn:
        big = cv2.warpAffine(big, cv2.getRotationMatrix2D((128, 128), -turn * 11.25, 1), (256, 256), flags=cv2.INTER_NEAREST)
    big = np.ascontiguousarray(big[:, ::-1] if flip else big)
    big[..., 3] = cv2.dilate(big[..., 3], np.ones((17, 17), np.uint8))
    small = cv2.resize(big, (size, size), interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(small[..., :3]), (small[..., 3] > 127).astype(np.uint8)


def stamp(frame, name, at, size, turn=0.0, flip=False, seen=None):
    """Draw an icon centred at a place, turned by `turn` radians, cut at the frame's edge; seen bool (256,): columns that nothing hides."""
    size = max(int(size) // 4 * 4, 4)
    picture, mask = icon(name, size, round(turn / math.tau * 32) % 32, flip)
    x, y = round(at.real) - size // 2, round(at.imag) - size // 2
    x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + size, 256), min(y + size, 256)
    if x0 < x1 and y0 < y1:
        mask = mask[y0 - y:y1 - y, x0 - x:x1 - x]
        cv2.copyTo(picture[y0 - y:y1 - y, x0 - x:x1 - x], mask if seen is None else mask * seen[x0:x1], frame[y0:y1, x0:x1])


def arrow(frame, at, angle, size, ink):
    """A fat arrowhead at a place that points along `angle`."""
    for grow, paint in ((1.35, (10, 10, 16)), (1, ink)):
        tips = [at + size * grow * cmath.rect(r, angle + a) for r, a in ((1, 0), (0.9, 2.5), (0.3, math.pi), (0.9, -2.5))]
        cv2.fillPoly(frame, [np.int32([(p.real, p.imag) for p in tips])], paint)


@functools.lru_cache(64)
def pattern(kind, h, w, dark, light, seed=0):
    """A texture of two colours with some noise, uint8 (h, w, 3), read-only."""
    y, x = np.mgrid[:h, :w]
    row = {"bricks": 16, "planks": 12}.get(kind, 32)
    lines = (y % row < 2) | ((x + y // row * 12) % (24 if kind == "bricks" else 90) < 2)
    odd = (y // 32 + x // 32) % 2
    level = {"checker": odd, "grid": ((y % 32 < 2) | (x % 32 < 2)) * 1.0, "bricks": 1.0 - lines, "planks": 1 - 0.8 * lines, "sand": np.full((h, w), 0.5),
             "waves": 0.5 + 0.5 * np.sin(x / 9 + 2 * np.sin(y / 13)), "tiles": ((y % 32 > 1) & (x % 32 > 1)) * (0.7 + 0.3 * odd),
             "dots": ((y % 16 - 8) ** 2 + (x % 16 - 8) ** 2 < 10) * 1.0}[kind]
    grain = cv2.resize(np.random.default_rng(seed).random((h // 4 + 1, w // 4 + 1), np.float32), (w, h), interpolation=cv2.INTER_NEAREST)
    mixed = (0.75 * level + 0.25 * grain)[..., None]
    picture = (np.array(colour(dark)) * (1 - mixed) + np.array(colour(light)) * mixed).astype(np.uint8)
    picture.flags.writeable = False
    return picture


def span(x, low=-1.0, high=1.0):
    """A number cut to [low, high]; by default to what a stick gives."""
    return min(max(x, low), high)


def fence(p, low, high):
    """A place moved into the square from low to high."""
    return complex(span(p.real, low, high), span(p.imag, low, high))


def dot(p):
    """A place as OpenCV wants it."""
    return round(p.real), round(p.imag)


def clip(v, top=1.0):
    """A vector no longer than `top`."""
    return v if abs(v) <= top else v * (top / abs(v))


def unit(v):
    """A vector of length 1, or 0."""
    return v / abs(v) if v else 0j


def wrap(angle):
    """An angle in [-pi, pi)."""
    return (angle + math.pi) % math.tau - math.pi


def walled(w, h):
    """An empty map with a wall around it: grid[y][x], True = wall."""
    return [[x in (0, w - 1) or y in (0, h - 1) for x in range(w)] for y in range(h)]


def slide(grid, p, d, r):
    """Move a disc of radius r from p by d among the walls grid[y][x], one axis at a time, so that it glides along them."""
    for d in (complex(d.real, 0), complex(0, d.imag)):
        q = p + d
        if not any(grid[int(q.imag + y)][int(q.real + x)] for x in (-r, r) for y in (-r, r)):
            p = q
    return p


def sees(grid, p, q):
    """Is the straight line between two places free of walls?"""
    n = int(abs(q - p) * 4) + 1
    return not any(grid[int(s.imag)][int(s.real)] for s in (p + (q - p) * i / n for i in range(n + 1)))


def flood(grid, goal):
    """Steps to the cell of `goal` from every cell from which it can be reached: {(x, y): n}."""
    queue = [(int(goal.real), int(goal.imag))]
    far = {queue[0]: 0}
    for x, y in queue:
        for cell in ((x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)):
            if cell not in far and not grid[cell[1]][cell[0]]:
                far[cell] = far[x, y] + 1
                queue.append(cell)
    return far


def waypoint(far, p):
    """Where to walk next: the middle of the next cell of a shortest way, or for who is well in line of the last one of its first straight stretch."""
    here = x, y = int(p.real), int(p.imag)
    for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1)):
        if far.get((x + dx, y + dy), 999) < far.get(here, 998):
            aside = abs(p.imag % 1 - 0.5) if dx else abs(p.real % 1 - 0.5)
            while far.get((x + dx, y + dy), 999) < far.get((x, y), 998):
                x, y = x + dx, y + dy
                if aside > 0.15:
                    break
            break
    return complex(x + 0.5, y + 0.5)


class Game:
    """One task of one game, the same for the same seed. A subclass has begin(**task.start), play(), draw() and wish()."""
    keys, attack = {}, ()                          # what each control does; the buttons that a masher holds
    hud, lives = ("f44", "fff", 4), 3              # colours of health and score, where they stand
    fps, late = FPS, (2, 4)                        # steps a second; by how many of them a person is late

    def __init__(self, task, seed=0):
        self.task = TASKS[task] if isinstance(task, str) else task
        self.rng = random.Random(f"{self.task.name} {seed}")
        self.plan = random.Random(self.task.name) if self.task.fixed else self.rng      # a fixed level is the same for all seeds, its start is not
        self.t = self.score = 0
        self.health, self.won, self.over, self.due = self.lives, False, False, {}
        self.left = self.right = 0j
        self.held = frozenset()
        self.begin(**self.task.start)

    def advance(self, action):
        """One step with action float (25,), without drawing."""
        if not self.over:
            self.left, self.right = (clip(complex(*action[s])) for s in extract.STICKS.values())
            self.held = {extract.BUTTONS[i] for i in np.flatnonzero(action[:21] > 0.5)}
            self.t += 1
            self.play()
            self.won = self.score >= self.task.goal and self.health > 0
            self.over = self.won or self.health <= 0 or self.t >= self.task.seconds * FPS

    def step(self, action):
        """One step with action float (25,) -> the frame that follows, uint8 (256, 256, 3)."""
        self.advance(action)
        return self.render()

    def render(self):
        """The frame as it stands, with health and what is done of the goal."""
        frame = self.draw()
        health, score, y = self.hud
        for i in range(self.health):
            cv2.circle(frame, (14 + 16 * i, y + 8), 6, colour(health), -1)
        for i in range(self.task.goal if self.task.goal <= 12 else 0):
            cv2.rectangle(frame, (244 - 11 * i, y + 3), (251 - 11 * i, y + 13), colour(score), -1 if i < self.score else 1)
        return frame

    def ready(self, what, steps):
        """Has `what` rested? If so it is used now and rests for `steps`."""
        if self.t < self.due.get(what, 0):
            return False
        self.due[what] = self.t + steps
        return True

    def rests(self, what):
        """Steps until `what` is ready."""
        return max(self.due.get(what, 0) - self.t, 0)

    def hurt(self):
        """Lose one health, at most once in 25 steps."""
        if self.ready("hurt", 25):
            self.health -= 1

    def around(self, low, high, angle=None):
        """A vector of random length and direction."""
        return cmath.rect(self.rng.uniform(low, high), self.rng.uniform(0, math.tau) if angle is None else angle)

    def fly(self, shots, hits, reach=200):
        """Move shots (at, v); those that hit something (hits(shot) sees to what follows) or are further away than `reach` are gone."""
        for shot in shots:
            shot.at += shot.v
        shots[:] = [shot for shot in shots if not hits(shot) and abs(shot.at - self.pos) < reach]

    def strikes(self, foes, width):
        """hits() for fly(): the first foe so near loses a point of hp."""
        def hits(shot):
            foe = next((f for f in foes if abs(f.at - shot.at) < width), None)
            if foe:
                foe.hp -= 1
            return foe is not None
        return hits

    def wounds(self, at, width):
        """hits() for fly(): who stands at `at` is hurt."""
        def hits(shot):
            near = abs(shot.at - at) < width
            if near:
                self.hurt()
            return near
        return hits


# ------------------------------------------------------------------------------------------------------------------- first person
LENS = np.linspace(-0.7, 0.7, 128)                 # where each of 128 columns looks: lateral over forward
ROWS = np.arange(128, dtype=np.float32)[:, None] - 63.5


def packed(rgb):
    """Colours (..., 3) as one uint32 each, RGBA."""
    return np.concatenate([rgb, np.full((*rgb.shape[:-1], 1), 255)], -1).astype(np.uint8).view(np.uint32)[..., 0]


class FirstPerson(Game):
    """A map of square cells seen from inside, by ray casting: all crossings of all rays with all grid lines at once. Left stick walks, right turns."""
    wall, ceiling, floor, size, density = ("bricks", "532", "b86"), ("112", "224"), ("222", "654"), 9, 0.2

    @classmethod
    @functools.lru_cache(8)
    def paint(cls):
        """Wall texture (32 shades x 32 x 32,) and the colours of ceiling and floor (128, 1), as packed RGBA."""
        texture = pattern(cls.wall[0], 32, 32, *cls.wall[1:]).astype(np.float32)
        shades = np.stack([texture * max(1 - i / 18, 0.15) * side for side in (1, 0.75) for i in range(16)])
        y = np.linspace(-1, 1, 128)[:, None]
        above, below = ((1 - abs(y)) * np.array(colour(far)) + abs(y) * np.array(colour(near)) for far, near in (cls.ceiling, cls.floor))
        return packed(shades).ravel(), packed(np.where(y < 0, above, below))[:, None]

    def build(self):
        """Walls around and, as far as all free cells stay connected, inside; the player in a free cell, looking anywhere."""
        n = self.size
        self.grid = walled(n, n)
        for x, y in self.plan.sample([(x, y) for x in range(1, n - 1) for y in range(1, n - 1)], int(self.density * (n - 2) ** 2)):
            self.grid[y][x] = True
            free = [complex(a, b) for b in range(n) for a in range(n) if not self.grid[b][a]]
            self.grid[y][x] = len(flood(self.grid, free[0])) == len(free)
        self.walls = np.array(self.grid)
        self.free = [complex(x + 0.5, y + 0.5) for y in range(n) for x in range(n) if not self.grid[y][x]]
        self.pos, self.face, self.things, self.far = self.rng.choice(self.free), self.rng.uniform(0, math.tau), [], {}

    def place(self, low, high):
        """A free cell so many steps of walking away."""
        far = flood(self.grid, self.pos)
        cells = [p for p in self.free if low <= far[int(p.real), int(p.imag)] <= high]
        return self.rng.choice(cells or self.free)

    def walk(self, speed=0.08, turn=0.085):
        self.face = wrap(self.face + self.right.real * turn)
        self.pos = slide(self.grid, self.pos, self.left * 1j * speed * cmath.rect(1, self.face), 0.22)

    def angle(self, p):
        """Where p is from straight ahead, in radians, right positive."""
        return cmath.phase((p - self.pos) * cmath.rect(1, -self.face))

    def draw(self):
        p, rays = self.pos, cmath.rect(1, self.face) * (1 + 1j * LENS)                     # (128,)
        lines, n = np.arange(1, self.size, dtype=np.float64)[:, None], self.size           # (n - 1, 1)
        rx, ry = rays.real + 1e-9, rays.imag + 1e-9
        tx, ty = (lines - p.real) / rx, (lines - p.imag) / ry                              # (n - 1, 128): how far along each ray
        hx, hy = p.imag + tx * ry, p.real + ty * rx                                        # where along the line
        ix, iy = np.clip(hx, 0, n - 1).astype(np.int32), np.clip(hy, 0, n - 1).astype(np.int32)
        column = lines.astype(np.int32)
        tx[~((tx > 0) & self.walls[ix, column - (rx < 0)])] = 99
        ty[~((ty > 0) & self.walls[column - (ry < 0), iy])] = 99
        t = np.concatenate([tx, ty])
        first = t.argmin(0)
        self.depth = depth = t[first, np.arange(128)]
        u = (np.where(first < n - 1, p.imag + depth * ry, p.real + depth * rx) % 1 * 32).astype(np.int32)
        shade = np.minimum(depth * 2, 15).astype(np.int32) + 16 * (first >= n - 1)
        v = ((ROWS * (depth / 115).astype(np.float32) + 0.5) * 32 + 1).astype(np.int32) - 1        # (128, 128)
        texture, ground = self.paint()
        inside = v.view(np.uint32) < 32
        pixels = np.where(inside, texture.take(shade * 1024 + u + v * 32, mode="clip"), ground)
        frame = cv2.cvtColor(cv2.resize(pixels.view(np.uint8).reshape(128, 128, 4), (256, 256), interpolation=cv2.INTER_NEAREST), cv2.COLOR_RGBA2RGB)
        for thing in sorted(self.things, key=lambda s: -abs(s.at - p)):
            self.sprite(frame, thing)
        return frame

    def sprite(self, frame, thing):
        """A flat picture that always faces the player, behind what is nearer."""
        rel = (thing.at - self.pos) * cmath.rect(1, -self.face)
        if rel.real > 0.15:
            scale = 230 / max(rel.real, 0.4)
            at = complex(128 + rel.imag / rel.real / 0.7 * 128, 128 + scale * (0.5 - thing.lift - thing.size / 2))
            stamp(frame, thing.kind, at, scale * thing.size, seen=np.repeat(self.depth > rel.real - 0.3, 2))

    def target(self):
        """Where to go now: the goal itself where the way there is wide enough."""
        side = 0.2j * unit(self.goal.at - self.pos)
        clear = all(sees(self.grid, self.pos + s, self.goal.at + s) for s in (side, -side))
        return self.goal.at if clear else waypoint(self.far, self.pos)

    def compass(self, frame, ink):
        """An arrow at the top to where to go now: up = ahead."""
        arrow(frame, 128 + 40j, self.angle(self.target()) - math.pi / 2, 32, ink)

    def steer(self, target, near=0.0):
        """Both sticks of a walk to a place: turn there, walk once it is about ahead; stop when nearer than `near`."""
        angle = self.angle(target)
        ahead = max(math.cos(angle), 0) ** 3 if abs(target - self.pos) > near else 0.0
        return complex(0, -ahead), complex(span(1.5 * angle), 0)


class Crypt(FirstPerson):
    """A dark maze. An arrow shows the way; ghouls turn red before they strike: hold the shield then, hit them when they are green."""
    keys = {"left": "walk", "right": "turn", "RIGHT_TRIGGER": "sword", "LEFT_TRIGGER": "shield", "SOUTH": "take, open"}
    attack, lives = ("RIGHT_TRIGGER", "SOUTH"), 4

    def begin(self, foes=0, steps=()):
        self.build()
        self.steps, self.foes = list(steps), foes
        self.follow()

    def follow(self):
        """The next ghoul, or the next object on the list."""
        self.things = []
        if self.score < self.task.goal:
            kind = "ghoul" if self.foes else self.steps[self.score]
            lift, size = (0.35, 0.4) if kind == "key" else (0, 0.8)
            self.goal = Thing(kind=kind, at=self.place(3, 5) if self.foes else self.place(4, 7), hp=2, wind=0, lift=lift, size=size)
            self.things, self.far = [self.goal], flood(self.grid, self.goal.at)

    def play(self):
        shield = "LEFT_TRIGGER" in self.held
        self.walk(0.05 if shield else 0.09)
        goal, reach = self.goal, abs(self.goal.at - self.pos)
        if self.foes:
            self.far = flood(self.grid, goal.at)
            if reach > 0.8:
                to = waypoint(flood(self.grid, self.pos), goal.at) if reach > 1.5 else self.pos
                goal.at = slide(self.grid, goal.at, 0.025 * unit(to - goal.at), 0.2)
            if goal.wind:
                goal.wind -= 1
                if not goal.wind and reach < 1.3 and not (shield and abs(self.angle(goal.at)) < 0.7):
                    self.hurt()
            elif reach < 1.2 and self.ready("wind", 45):
                goal.wind = 15
            goal.kind = "ghoul!" if goal.wind else "ghoul"
            if "RIGHT_TRIGGER" in self.held and not shield and self.ready("sword", 24):
                if reach < 1.25 and abs(self.angle(goal.at)) < 0.45 and not goal.wind:
                    goal.hp -= 1
                    goal.at = slide(self.grid, goal.at, 0.3 * unit(goal.at - self.pos), 0.2)
            if goal.hp <= 0:
                self.score += 1
                self.follow()
        elif reach < 0.75 and (goal.kind == "portal" or "SOUTH" in self.held):
            self.score += 1
            self.follow()

    def draw(self):
        frame = super().draw()
        if self.score < self.task.goal:
            self.compass(frame, (255, 220, 60))
        if "LEFT_TRIGGER" in self.held:
            cv2.circle(frame, (80, 246), 54, (90, 110, 200), -1)
        swing = max(self.rests("sword") - 14, 0)
        cv2.line(frame, (214, 256), (210 - 4 * swing, 170 + 3 * swing), (120, 120, 130) if self.rests("sword") else (240, 240, 250), 12)
        return frame

    def wish(self):
        goal, reach = self.goal, abs(self.goal.at - self.pos)
        fight = self.foes and reach < 1.6 and sees(self.grid, self.pos, goal.at)
        left, right = self.steer(goal.at if fight else self.target(), 0.95 if fight else 0.1)
        if self.foes and reach < 1.6 and goal.wind:
            return 0j, right, "LEFT_TRIGGER"
        if self.foes:
            return left, right, "RIGHT_TRIGGER" if reach < 1.25 and abs(self.angle(goal.at)) < 0.35 else ""
        return left, right, "SOUTH" if goal.kind != "portal" and reach < 1 else ""


class Siege(FirstPerson):
    """An open court by daylight: drones that hover and shoot, crates to open, a beacon to reach."""
    keys = {"left": "walk", "right": "aim", "RIGHT_TRIGGER": "fire", "WEST": "open a crate"}
    attack, hud = ("RIGHT_TRIGGER", "WEST"), ("2f6", "ff0", 236)
    wall, ceiling, floor, size, density = ("tiles", "446", "9bd"), ("bef", "6af"), ("7a5", "ac7"), 11, 0.06

    def begin(self, want="drone"):
        self.build()
        self.want, self.ammo, self.shots = want, 16, []
        self.spawn()

    def spawn(self):
        """The next thing to shoot, open or reach."""
        low, high, lift, size = {"drone": (3, 5, 0.3, 0.55), "crate": (4, 6, 0, 0.6), "beacon": (8, 12, 0, 1.0)}[self.want]
        self.goal = Thing(kind=self.want, at=self.place(low, high), hp=2, drift=self.around(0.02, 0.035), lift=lift, size=size)
        self.far = flood(self.grid, self.goal.at)

    def play(self):
        self.walk()
        goal, reach = self.goal, abs(self.goal.at - self.pos)
        if self.want == "drone":
            moved = slide(self.grid, goal.at, goal.drift, 0.3)
            if moved == goal.at or self.ready("turn", 40):
                goal.drift = self.around(0.02, 0.035)
            goal.at = moved
            if "RIGHT_TRIGGER" in self.held and self.ammo and self.ready("gun", 12):
                self.ammo -= 1
                if abs(self.angle(goal.at)) < 0.3 / max(reach, 0.5) and sees(self.grid, self.pos, goal.at):
                    goal.hp -= 1
            if self.t > 30 and self.ready("drone", 80) and sees(self.grid, self.pos, goal.at):
                self.shots.append(Thing(kind="mine", at=goal.at, v=0.07 * unit(self.pos - goal.at), lift=0.35, size=0.2))
            wounds = self.wounds(self.pos, 0.3)
            self.fly(self.shots, lambda shot: wounds(shot) or self.grid[int(shot.at.imag)][int(shot.at.real)])
        opened = self.want == "crate" and "WEST" in self.held and reach < 0.9 and abs(self.angle(goal.at)) < 0.6
        if goal.hp <= 0 or opened or self.want == "beacon" and reach < 0.7:
            self.score += 1
            self.spawn()
        self.things = [goal, *self.shots]

    def draw(self):
        self.things = self.things or [self.goal]
        frame = super().draw()
        self.compass(frame, (255, 60, 60) if self.want == "drone" else (60, 255, 255))
        cv2.rectangle(frame, (112, 206), (144, 256), (50, 54, 62) if self.rests("gun") < 8 else (255, 190, 60), -1)
        if self.want == "drone":
            cv2.circle(frame, (128, 128), 10, (255, 255, 255), 2)
            for i in range(self.ammo):
                cv2.rectangle(frame, (4 + 6 * i, 222), (7 + 6 * i, 232), (255, 230, 90), -1)
        return frame

    def wish(self):
        goal, reach = self.goal, abs(self.goal.at - self.pos)
        if self.want != "drone":
            return *self.steer(self.target(), 0.5), "WEST" if self.want == "crate" and reach < 1 else ""
        clear = sees(self.grid, self.pos, goal.at)
        left, right = self.steer(self.target(), 2.5 if clear else 0.5)
        shot = min(self.shots, key=lambda s: abs(s.at - self.pos), default=None)
        if shot and abs(shot.at - self.pos) < 2:
            left += -1 if self.angle(shot.at) > 0 else 1                   # step out of its way
        return left, right, "RIGHT_TRIGGER" if clear and abs(self.angle(goal.at)) < 0.26 / max(reach, 0.5) else ""


LENGTH, HORIZON_Y, HIGH = 170, 100, 30             # Rally's camera: focal length in pixels, the horizon's row, pixels above the ground
GROUND = np.float64([[HIGH, 0, -128 * HIGH], [0, 0, LENGTH * HIGH], [0, 1, 0.5]])          # screen (x, y below the horizon, 1) -> right, ahead


class Rally(Game):
    """Driving behind a car: the ground is one big picture seen in perspective, a homography of it."""
    keys = {"left": "steer", "RIGHT_TRIGGER": "throttle", "LEFT_TRIGGER": "brake, reverse"}
    attack, hud = ("RIGHT_TRIGGER",), ("f33", "fff", 4)

    def begin(self, rivals=0, park=False):
        self.park, self.speed, self.index, self.things, self.rivals, self.gates = park, 0.0, 0, [], [], []
        k = self.plan.randint(2, 4)
        bend, phase, ways = self.plan.uniform(0.16, 0.24), self.plan.uniform(0, math.tau), np.arange(256) / 256 * math.tau
        path = 512 + 512j + 320 * (1 + bend * np.sin(k * ways + phase)) * np.exp(1j * ways)
        path = np.roll(path, self.rng.randrange(256))
        self.path = path if self.rng.random() < 0.5 else path[::-1]
        self.ground = pattern(*(("checker", 1024, 1024, "445", "556") if park else ("waves", 1024, 1024, "271", "493"))).copy()
        if park:
            self.pos, self.face = 512 + 512j, self.rng.uniform(0, math.tau)
            self.spawn()
        else:
            for wide, ink in ((112, (235, 235, 235)), (100, (84, 84, 92))):
                cv2.polylines(self.ground, [np.int32(np.stack([path.real, path.imag], 1))], True, ink, wide)
            for i in range(0, 256, 4):
                cv2.polylines(self.ground, [np.int32([(p.real, p.imag) for p in path[i:i + 2]])], False, (250, 220, 90), 5)
            self.pos, self.face = self.path[0], cmath.phase(self.path[2] - self.path[0])
            self.things = [Thing(kind="tree", at=self.beside(i, s * 95), size=90) for i in range(0, 255, 16) for s in (-1, 1)]
            self.gates = [Thing(kind="post", at=self.beside(i, s * 54), size=44) for i in range(20, 255, 20) for s in (-1, 1)]
            self.rivals = [Thing(kind="rival", at=0j, size=46, along=14.0 + 16 * i, side=self.rng.choice((-22, 22)), passed=False) for i in range(rivals)]
            self.ahead()

    def beside(self, i, far):
        """The place so many pixels to the right of point i of the path."""
        return self.path[i] + 1j * far * unit(self.path[i + 1] - self.path[i])

    def spawn(self):
        """The next bay: painted on the ground, with a sign above it."""
        way = self.around(170, 260, self.face + self.rng.choice((-1, 1)) * self.rng.uniform(0.2, 0.9))
        self.bay = fence(self.pos + way, 90, 934)
        cv2.circle(self.ground, dot(self.bay), 34, (255, 220, 40), 8)
        cv2.circle(self.ground, dot(self.bay), 30, (30, 110, 230), -1)
        self.things = [Thing(kind="bay", at=self.bay, size=60)]

    def ahead(self):
        """Where on the path the car is: the nearest of the next few points; rivals drive on."""
        self.index = min(range(self.index, min(self.index + 6, 250)), key=lambda i: abs(self.path[i] - self.pos))
        for rival in self.rivals:
            rival.along += 0.22
            i = int(rival.along)
            a, b = self.path[i % 256], self.path[(i + 1) % 256]
            rival.at = a + (b - a) * (rival.along % 1) + rival.side * 1j * unit(b - a)

    def play(self):
        on_road = self.park or abs(self.path[self.index] - self.pos) < 58
        gas, brake = "RIGHT_TRIGGER" in self.held, "LEFT_TRIGGER" in self.held
        slower = 0.3 if self.speed > 0 else 0.1                            # in reverse the brake is a weak engine
        self.speed += 0.28 * gas - slower * brake
        self.speed = max(-2, self.speed * (0.972 if on_road else 0.88))
        if not gas and not brake:
            self.speed *= 0.97
        self.face = wrap(self.face + self.left.real * 0.05 * span(self.speed / 2))
        self.pos = fence(self.pos + self.speed * cmath.rect(1, self.face), 40, 984)
        if self.park:
            if abs(self.bay - self.pos) < 34 and abs(self.speed) < 0.7:
                self.score += 1
                cv2.circle(self.ground, dot(self.bay), 38, (80, 84, 90), -1)
                self.spawn()
            return
        self.ahead()
        if not self.rivals:
            self.score = self.index // 20
        for rival in self.rivals:
            if not rival.passed and rival.along < self.index - 1:
                rival.passed, self.score = True, self.score + 1
            if abs(rival.at - self.pos) < 24 and not rival.passed:
                self.speed *= 0.3
                self.hurt()

    def draw(self):
        c, s = math.cos(self.face), math.sin(self.face)
        eye = self.pos - 44 * complex(c, s)
        turn = np.float64([[-s, c, eye.real], [c, s, eye.imag], [0, 0, 1]]) @ GROUND
        frame = np.empty((256, 256, 3), np.uint8)
        shift = int((self.face + math.pi) / math.tau * 1024) % 512
        frame[:HORIZON_Y] = sky()[:, shift:shift + 256]
        flags = cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP
        frame[HORIZON_Y:] = cv2.warpPerspective(self.ground, turn, (256, 256 - HORIZON_Y), flags=flags, borderMode=cv2.BORDER_REPLICATE)
        things = self.things + self.rivals + ([] if self.rivals else self.gates[2 * self.score:2 * self.score + 2])
        for rel, thing in sorted((((thing.at - eye) * complex(c, -s), thing) for thing in things), key=lambda d: -d[0].real):
            size = LENGTH * thing.size / max(rel.real, 1)
            if 25 < rel.real < 520 and size < 240:
                stamp(frame, thing.kind, complex(128 + LENGTH * rel.imag / rel.real, HORIZON_Y + LENGTH * HIGH / rel.real - size / 2), size)
        if self.park:
            arrow(frame, 128 + 40j, cmath.phase((self.bay - self.pos) * complex(c, -s)) - math.pi / 2, 32, (255, 230, 60))
        stamp(frame, "car", 128 + 214j, 76)
        cv2.rectangle(frame, (8, 240), (8 + int(18 * max(self.speed, 0)), 250), (80, 255, 120), -1)
        cv2.line(frame, (128, 186), (int(128 + 26 * self.left.real), 186), (255, 255, 255), 4)
        return frame

    def pedal(self, fast, over):
        """The trigger that brings the speed to `fast`; the brake only from `over` above it."""
        if self.speed < fast:
            return "RIGHT_TRIGGER"
        return "LEFT_TRIGGER" if self.speed > fast + over else ""

    def wish(self):
        if self.park:
            rel = (self.bay - self.pos) * cmath.rect(1, -self.face)
            angle, far = cmath.phase(rel), abs(rel)
            if abs(angle) > 1.9 and far < 130:
                return complex(-math.copysign(1, rel.imag) if abs(angle) < 2.9 else 0, 0), 0j, "LEFT_TRIGGER"
            return complex(span(2.5 * angle), 0), 0j, self.pedal(min(2.8 if abs(angle) < 0.5 else 1.6, max(0.03 * far, 0.35)), 0.4)
        target = self.path[min(self.index + 9, 254)]
        near = min((r for r in self.rivals if not r.passed and 0 < r.along - self.index < 13), key=lambda r: r.along, default=None)
        if near:                                                           # pass it on its other side
            target = self.beside(min(self.index + 7, 254), -near.side)
        angle = cmath.phase((target - self.pos) * cmath.rect(1, -self.face))
        return complex(span(2.6 * angle), 0), 0j, self.pedal(3 if abs(angle) > 0.6 else 4.4, 1)


@functools.lru_cache(16)
def sky(top="37b", low="bdf", hills=("579", "354"), h=HORIZON_Y):
    """Hills under a sky, uint8 (h, 768, 3), the same every 512 columns."""
    shade = np.linspace(0, 1, h)[:, None, None]
    image = np.repeat(((1 - shade) * np.array(colour(top)) + shade * np.array(colour(low))).astype(np.uint8), 768, 1)
    x = np.arange(768) / 512 * math.tau
    for i, ink in enumerate(hills):
        y = h * (0.72 + 0.14 * i) + h * 0.09 * (np.sin(3 * x + i) + 0.6 * np.sin(7 * x + 2 * i))
        cv2.fillPoly(image, [np.int32([*zip(np.arange(768), y), (767, h), (0, h)])], colour(ink))
    return image


# ---------------------------------------------------------------------------------------------------------------------- top-down
class TopDown(Game):
    """Seen from above: walls on a grid of `cell` pixels, the camera on the player, or at rest over a room of one screen."""
    cell, floor, block = 32, ("tiles", "234", "345"), ("bricks", "875", "ba8")

    def lay(self, grid):
        """Take a map of walls and draw it once, with a margin for the camera."""
        self.grid, h, w = grid, len(grid) * self.cell, len(grid[0]) * self.cell
        self.ground = np.full((h + 256, w + 256, 3), colour(self.block[1]), np.uint8) // 2
        inner = self.ground[128:-128, 128:-128]
        inner[:] = pattern(self.floor[0], h, w, *self.floor[1:])
        wall = np.kron(np.uint8(grid), np.ones((self.cell, self.cell), np.uint8))
        cv2.copyTo(pattern(self.block[0], h, w, *self.block[1:]), wall, inner)

    def move(self, p, d, r=12):
        return slide(self.grid, p / self.cell, d / self.cell, r / self.cell) * self.cell

    def view(self):
        """The floor under the camera -> (frame, where the camera's top left corner is)."""
        corner = self.pos - 128 * (1 + 1j)
        x, y = round(corner.real) + 128, round(corner.imag) + 128
        return self.ground[y:y + 256, x:x + 256].copy(), corner

    def trail(self, frame, places, start, ink):
        """Dots on the floor along the way to go, from place to place on the screen."""
        for p in places:
            n = int(abs(p - start) / 20)
            for i in range(1, n):
                cv2.circle(frame, dot(start + (p - start) * i / n), 6, ink, -1)
            start = p

    def pointer(self, frame, target, ink):
        """An arrow near the edge towards what is out of sight."""
        d = target - self.pos
        if max(abs(d.real), abs(d.imag)) > 116:
            d *= 102 / max(abs(d.real), abs(d.imag))
            arrow(frame, 128 + 128j + d, cmath.phase(d), 22, ink)


class Swarm(TopDown):
    """A neon court: left stick moves, right stick aims. Bugs chase, a brute charges along the line that it shows, gems lie among mines."""
    keys = {"left": "move", "right": "aim", "RIGHT_TRIGGER": "fire", "LEFT_TRIGGER": "dash"}
    attack, hud, cell = ("RIGHT_TRIGGER",), ("0ff", "ff0", 4), 64
    floor, block = ("grid", "013", "16a"), ("checker", "407", "82b")

    def begin(self, foe="", gems=False):
        self.lay(walled(12, 12))
        self.pos, self.aim, self.foe, self.gems = 384 + 384j + self.around(0, 90), self.rng.uniform(0, math.tau), foe, gems
        self.foes, self.bolts, self.mines = [], [], []
        self.next()

    def next(self):
        """Two bugs at a time, or the brute, or the next gem with mines about."""
        if self.gems:
            self.gem = Thing(kind="gem", at=fence(self.pos + self.around(130, 200), 90, 678))
            if abs(self.gem.at - self.pos) < 90:
                self.gem.at = fence(2 * self.pos - self.gem.at, 90, 678)
            spots = [fence(self.pos + (self.gem.at - self.pos) * self.rng.uniform(0.4, 0.7) + self.around(0, 40), 90, 678) for _ in range(2)]
            self.mines = [Thing(kind="mine", at=p) for p in spots if abs(p - self.pos) > 60 and abs(p - self.gem.at) > 45]
        while self.foe and len(self.foes) < (1 if self.foe == "brute" else 2):
            at = fence(self.pos + self.around(105, 135), 90, 678)
            if abs(at - self.pos) > 80:
                self.foes.append(Thing(kind=self.foe, at=at, hp=16 if self.foe == "brute" else 2, wind=0, dash=0, way=1))

    def play(self):
        if abs(self.right) > 0.3:
            self.aim = cmath.phase(self.right)
        elif abs(self.left) > 0.3:
            self.aim = cmath.phase(self.left)
        if "LEFT_TRIGGER" in self.held and abs(self.left) > 0.3 and self.ready("dash", 50):
            self.due["dashing"] = self.t + 7
        self.pos = self.move(self.pos, self.left * (8 if self.rests("dashing") else 3.2))
        if "RIGHT_TRIGGER" in self.held and not self.gems and self.ready("gun", 7):
            self.bolts.append(Thing(at=self.pos + cmath.rect(22, self.aim), v=cmath.rect(9, self.aim)))
        self.fly(self.bolts, self.strikes(self.foes, 26 if self.foe == "brute" else 19), 180)
        for f in list(self.foes):
            if f.kind != "bug":
                self.score = 16 - f.hp
            if f.hp <= 0:
                self.foes.remove(f)
                self.score += self.foe == "bug"
            elif abs(f.at - self.pos) < (38 if self.foe == "brute" else 26):
                self.hurt()
                f.at = self.move(f.at, 70 * unit(f.at - self.pos) or 70)
            self.chase(f)
        for mine in self.mines:
            if abs(mine.at - self.pos) < 26:
                self.hurt()
                self.pos = self.move(self.pos, 36 * unit(self.pos - mine.at))
        if self.gems and abs(self.gem.at - self.pos) < 28:
            self.score += 1
            self.gem = None
        if not self.gems or not self.gem:
            self.next()

    def chase(self, f):
        if f.kind == "bug":
            f.at += 1.7 * unit(self.pos - f.at)
        elif f.dash:
            f.dash -= 1
            f.at = self.move(f.at, 7 * f.way, 20)
        elif f.wind:
            f.wind, f.kind = f.wind - 1, "brute!"
            f.dash = 0 if f.wind else 22
        elif self.ready("charge", 75) and self.t > 20:
            f.wind, f.way = 18, unit(self.pos - f.at) or 1
        else:
            f.kind = "brute"
            f.at = self.move(f.at, 1.6 * unit(self.pos - f.at) * cmath.rect(1, 0.8), 20)       # comes in a spiral

    def draw(self):
        frame, corner = self.view()
        for f in self.foes:
            if f.wind or f.dash:
                p, q = f.at - corner, f.at + 160 * f.way - corner
                cv2.line(frame, dot(p), dot(q), (255, 40, 40), 6)
            stamp(frame, f.kind, f.at - corner, 72 if self.foe == "brute" else 52, cmath.phase(self.pos - f.at))
            self.pointer(frame, f.at, (255, 60, 160))
        for mine in self.mines:
            stamp(frame, mine.kind, mine.at - corner, 44)
        for bolt in self.bolts:
            cv2.circle(frame, dot(bolt.at - corner), 5, (255, 255, 120), -1)
        if self.gems and self.gem:
            self.trail(frame, [self.gem.at - corner], 128 + 128j, (60, 255, 200))
            stamp(frame, self.gem.kind, self.gem.at - corner, 52)
        if self.foe == "brute" and self.foes:
            cv2.rectangle(frame, (60, 240), (60 + 10 * self.foes[0].hp, 250), (255, 120, 0), -1)
        stamp(frame, "hero", 128 + 128j, 48, self.aim)
        cv2.circle(frame, (128, 128), 26, (0, 255, 255) if not self.rests("dash") else (70, 70, 90), 2)
        return frame

    def wish(self):
        middle = 384 + 384j - self.pos
        if self.gems:
            way = unit(self.gem.at - self.pos)
            for m in self.mines:
                d = m.at - self.pos
                ahead, side = (d * way.conjugate()).real, (d * way.conjugate()).imag
                if -10 < ahead < 90 and abs(side) < 44:
                    way = unit(way - 1j * way * math.copysign(1.1, side) * (1 - abs(side) / 90))
            free = all(abs(thing.at - self.pos) >= 110 for thing in self.mines) and abs(self.gem.at - self.pos) > 110
            return way, way, "LEFT_TRIGGER" if free else ""
        near = min(self.foes, key=lambda f: abs(f.at - self.pos))
        d = near.at - self.pos
        push = 1.0 if abs(d) < 80 else 0.3
        if abs(d) >= 100:
            push = -0.3                                                # too far off to hit it
        away = -unit(d) * push + middle / 500
        if near.wind or near.dash:
            side = (d * near.way.conjugate()).imag                     # on which side of the line of the charge we stand
            away = 1j * near.way * (-1 if side > 0 else 1) + middle / 400
        fire = "RIGHT_TRIGGER" if abs(wrap(self.aim - cmath.phase(d))) < 0.2 and abs(d) < 140 else ""
        return clip(away), unit(d), fire + (" LEFT_TRIGGER" if abs(d) < 60 else "")


class Vault(TopDown):
    """Rooms of one screen, the camera at rest: stairs to find, a key and its chest, slimes to fight. Right trigger runs."""
    keys = {"left": "move", "WEST": "sword", "SOUTH": "open", "RIGHT_TRIGGER": "run"}
    attack, hud = ("WEST", "SOUTH"), ("e22", "fd2", 6)
    floor, block = ("tiles", "cb8", "edb"), ("bricks", "543", "876")

    def begin(self, want="stairs"):
        self.want, self.face, self.key, self.slimes = want, 0.0, False, []
        self.room(self.rng.randrange(4))

    def room(self, corner=None):
        """A room with blocks; the way in is where the player stands."""
        here = [(1, 1), (6, 1), (1, 6), (6, 6)][corner] if corner is not None else (int(self.pos.real // 32), int(self.pos.imag // 32))
        while True:
            grid = walled(8, 8)
            for x, y in self.plan.sample([(x, y) for x in range(1, 7) for y in range(1, 7)], 4 if self.want == "slime" else 9):
                grid[y][x] = (x, y) != here
            far = flood(grid, complex(*here))
            if len(far) >= 24 and sum(steps > 4 for steps in far.values()) >= 2:           # room for two things that are not near
                break
        self.lay(grid)
        self.pos = complex(*here) * 32 + 16 + 16j
        cells = sorted((c for c in far if far[c] > 4), key=lambda c: self.rng.random())
        middle = lambda c: complex(*c) * 32 + 16 + 16j
        self.things = [Thing(kind=k, at=middle(c)) for k, c in zip({"stairs": ["stairs"], "chest": ["key", "chest"], "slime": []}[self.want], cells)]
        self.key = False
        if self.want == "slime":
            self.slimes = [Thing(kind="slime", at=middle(c), hp=2) for c in cells[:2]]
        self.aim()

    def aim(self):
        """Shortest ways to what comes next."""
        self.far = flood(self.grid, (self.things[0].at if self.things else self.pos) / 32)

    def play(self):
        if abs(self.left) > 0.3:
            self.face = cmath.phase(self.left)
        swing = self.rests("sword") > 14
        self.pos = self.move(self.pos, self.left * (0.8 if swing else 3.6 if "RIGHT_TRIGGER" in self.held else 2.4), 11)
        strike = "WEST" in self.held and self.ready("sword", 24)
        for s in list(self.slimes):
            d = s.at - self.pos
            if strike and abs(d) < 50 and abs(wrap(cmath.phase(d) - self.face)) < 0.7:
                s.hp -= 1
                s.at = self.move(s.at, 30 * unit(d), 11)
            elif abs(d) < 22:
                self.hurt()
                s.at = self.move(s.at, 30 * unit(d), 11)
            if self.t % 4 == 0:
                self.aim()
            s.at = self.move(s.at, 1.1 * unit((waypoint(self.far, s.at / 32) * 32 if abs(d) > 44 else self.pos) - s.at), 11)
            if s.hp <= 0:
                self.slimes.remove(s)
                self.score += 1
                if not self.slimes and self.score < self.task.goal:
                    self.room()
        for thing in list(self.things):
            reach = abs(thing.at - self.pos)
            if thing.kind == "key" and reach < 24:
                self.key = True
                self.things.remove(thing)
                self.aim()
            elif thing.kind == "stairs" and reach < 18 or thing.kind == "chest" and self.key and reach < 34 and "SOUTH" in self.held:
                self.score += 1
                if self.score < self.task.goal:
                    self.room()

    def draw(self):
        frame = self.ground[128:384, 128:384].copy()
        if self.things:
            way, p = [], self.pos / 32
            while len(way) < 12 and abs(p * 32 - self.things[0].at) > 20:
                p = waypoint(self.far, int(p.real) + int(p.imag) * 1j + 0.5 + 0.5j)
                way.append(p * 32)
            self.trail(frame, way, self.pos, (70, 130, 255))
        for thing in self.things + self.slimes:
            stamp(frame, thing.kind, thing.at, 36)
        if self.rests("sword") > 14:
            cv2.line(frame, dot(self.pos), dot(self.pos + cmath.rect(46, self.face)), (255, 255, 255), 9)
        stamp(frame, "knight", self.pos, 36, self.face)
        if self.rests("sword"):
            cv2.circle(frame, dot(self.pos), 20, (120, 120, 130), 3)
        if self.key:
            stamp(frame, "key", 128 + 16j, 32)
        return frame

    def wish(self):
        if self.slimes:
            s = min(self.slimes, key=lambda s: abs(s.at - self.pos))
            d = s.at - self.pos
            way = waypoint(flood(self.grid, s.at / 32), self.pos / 32) * 32 - self.pos if abs(d) > 60 else d
            if abs(d) < 48 and self.rests("sword"):
                return -unit(d), 0j, ""
            return unit(way) * (0.5 if abs(d) < 50 else 1), 0j, "WEST" if abs(d) < 48 and abs(wrap(cmath.phase(d) - self.face)) < 0.5 else ""
        goal = self.things[0]
        reach = abs(goal.at - self.pos)
        way = (waypoint(self.far, self.pos / 32) * 32 if reach > 32 else goal.at) - self.pos
        if goal.kind == "chest" and reach < 40:
            return unit(way), 0j, "SOUTH"
        return unit(way), 0j, "RIGHT_TRIGGER" if reach > 80 else ""


class Shade(TopDown):
    """A guarded house at night: who stands in a guard's light is soon caught. Left trigger crouches, which shortens the lights; EAST strikes from behind."""
    keys = {"left": "move", "LEFT_TRIGGER": "crouch", "EAST": "strike"}
    attack, hud, lives = ("EAST",), ("fff", "4fc", 4), 1
    floor, block, cell = ("planks", "322", "543"), ("dots", "124", "246"), 48

    def begin(self, want="exit"):
        self.want, w, grid = want, 13, walled(13, 11)
        for x, y in ((2, 2), (6, 2), (10, 2), (2, 6), (6, 6), (10, 6)):
            grid[y][x] = self.plan.random() < 0.8                          # most of the pillars
        self.lay(grid)
        side, self.alarm = self.rng.choice((0, 1)), 0.0
        spot = lambda column, rows=(1, 3, 5, 7, 9): complex(column + 0.5, self.rng.choice(rows) + 0.5) * 48
        self.pos = spot((1, w - 2)[side])
        self.guards = []
        for column in self.plan.sample((3, 4, 5, 7, 8, 9), 3 if want == "exit" else 2):
            column += column % 4 == 2
            self.guards.append(Thing(kind="guard", at=complex((column + 0.5) * 48, self.rng.uniform(100, 420)), way=self.rng.choice((-1j, 1j)), turn=0))
        if want == "exit":
            self.things = [Thing(kind="exit", at=spot((w - 2, 1)[side], [row for row in (1, 3, 5, 7, 9) if row != self.pos.imag // 48]))]
        else:
            self.things = [Thing(kind="gem", at=spot(column)) for column in self.rng.sample((3, 4, 5, 7, 8, 9), 3 if want == "gem" else 0)]

    def light(self):
        """How far the guards' lights reach, in pixels."""
        return 60 if "LEFT_TRIGGER" in self.held else 100

    def lit(self, p, guard, more=0.0, wide=0.0):
        """Does a guard's light reach p? more, wide: a margin in pixels and radians."""
        d = p - guard.at
        return abs(d) < self.light() + more and abs(cmath.phase(d * guard.way.conjugate())) < 0.55 + wide and sees(self.grid, guard.at / 48, p / 48)

    def play(self):
        self.pos = self.move(self.pos, self.left * (1.8 if "LEFT_TRIGGER" in self.held else 3.2))
        for g in list(self.guards):
            ahead = g.at + 26 * g.way
            if self.grid[int(ahead.imag // 48)][int(ahead.real // 48)]:
                g.way = -g.way
            g.at += 1.3 * g.way
            if self.want == "guard" and "EAST" in self.held and abs(g.at - self.pos) < 52 and not self.lit(self.pos, g) and self.ready("knife", 12):
                self.guards.remove(g)
                self.score += 1
        seen = any(self.lit(self.pos, g) or abs(g.at - self.pos) < 20 for g in self.guards)
        self.alarm = max(self.alarm + (1 / 26 if seen else -1 / 40), 0)
        if self.alarm >= 1:
            self.health = 0
        for thing in [t for t in self.things if abs(t.at - self.pos) < 30]:
            self.things.remove(thing)
            self.score += 1

    def draw(self):
        frame, corner = self.view()
        for g in self.guards:
            p = g.at - corner
            if -120 < p.real < 376 and -120 < p.imag < 376:
                fan = [p, *(p + cmath.rect(self.light(), cmath.phase(g.way) + a) for a in (-0.55, -0.28, 0, 0.28, 0.55))]
                cv2.fillPoly(frame, [np.int32([(q.real, q.imag) for q in fan])], (240, 220, 90))
                stamp(frame, g.kind, g.at - corner, 40, cmath.phase(g.way))
        for thing in self.things:
            stamp(frame, thing.kind, thing.at - corner, 40)
        goal = self.goal()
        if goal:
            self.pointer(frame, goal.at, (90, 255, 160))
        stamp(frame, "thief", 128 + 128j, 32 if "LEFT_TRIGGER" in self.held else 40, cmath.phase(self.left))
        cv2.rectangle(frame, (60, 240), (60 + round(136 * self.alarm), 251), (255, 40, 40), -1)
        cv2.rectangle(frame, (60, 240), (196, 251), (255, 255, 255), 1)
        return frame

    def goal(self):
        return min(self.guards if self.want == "guard" else self.things, key=lambda t: abs(t.at - self.pos), default=None)

    def wish(self):
        """Of 16 ways and standing still: the one that gets on best and stays out of the light."""
        goal = self.goal()
        if not goal:
            return 0j, 0j, ""
        target = goal.at - 38 * goal.way if self.want == "guard" else goal.at
        if self.grid[int(target.imag // 48)][int(target.real // 48)]:
            target = goal.at
        far = abs(target - self.pos)
        straight = far < 60 and sees(self.grid, self.pos / 48, target / 48)
        way = (target if straight else waypoint(flood(self.grid, target / 48), self.pos / 48) * 48) - self.pos
        if self.want == "guard" and abs(goal.at - self.pos) < 110 and self.lit(self.pos, goal, 60, 0.9):
            way = target + 70 * 1j * goal.way * (1 if ((self.pos - goal.at) * (1j * goal.way).conjugate()).real > 0 else -1) - self.pos
        best, most, margin = 0j, -99.0, (14, 0.2) if self.want == "guard" else (30, 0.35)
        for d in (0j, *(cmath.rect(1, k * math.tau / 16) for k in range(16))):
            q = self.move(self.pos, 24 * d)
            danger = sum(self.lit(q + s * 12 * d, g, *margin) or abs(q - g.at) < margin[0] + 14 for g in self.guards for s in (0, 1))
            gain = ((q - self.pos) * unit(way).conjugate()).real / 24 - 2 * danger
            if gain > most + 0.01:
                best, most = d, gain
        near = min((abs(g.at - self.pos) for g in self.guards), default=999)
        strike = "EAST" if self.want == "guard" and abs(goal.at - self.pos) < 50 else ""
        return best * (1 if abs(way) > 20 else 0.6), 0j, strike + (" LEFT_TRIGGER" if 44 < near < 120 else "")


# ----------------------------------------------------------------------------------------------------------------- side-scrolling
class Side(Game):
    """Seen from the side, the camera on the player: gravity, and islands (x0, x1, y) to land on, which do not stop a jump from below."""
    fall, jump, run, scenery = 0.5, 8.4, 3.2, ()

    def stand(self, place):
        self.pos, self.v, self.ground, self.stood, self.way = place, 0.0, True, self.t, 1

    def top(self, i):
        """The middle of island i."""
        x0, x1, y = self.islands[i]
        return complex((x0 + x1) / 2, y)

    def bodily(self, leap, speed=None):
        """Run by the left stick, jump from the ground, fall, land."""
        if abs(self.left.real) > 0.2:
            self.way = 1 if self.left.real > 0 else -1
        if leap and self.t - self.stood <= 4:                              # a jump a moment after the edge still counts
            self.v, self.stood = -self.jump, -9
        self.v = min(self.v + self.fall, 11)
        old = self.pos
        self.pos += complex(self.left.real * (speed or self.run), self.v)
        self.ground = False
        for i, (x0, x1, y) in enumerate(self.islands):
            if self.v >= 0 and old.imag <= y + 0.01 and self.pos.imag >= y and x0 - 8 < self.pos.real < x1 + 8:
                self.pos, self.v, self.ground, self.stood, self.on = complex(self.pos.real, y), 0.0, True, self.t, i

    def land(self, frame, corner):
        """The islands in sight of a camera whose top left corner is there."""
        for x0, x1, y in self.islands:
            if x1 > corner.real and x0 < corner.real + 256:
                left, right, top = round(x0 - corner.real), round(x1 - corner.real), round(y - corner.imag)
                cv2.rectangle(frame, (left, top), (right, top + 26), (150, 100, 60), -1)
                cv2.rectangle(frame, (left, top), (right, top + 8), (80, 200, 70), -1)

    def back(self, x):
        """The scenery behind, moving at a third of the speed."""
        x = int(x / 3) % 512
        return sky(*self.scenery, 256)[:, x:x + 256].copy()


class Cliffs(Side):
    """Floating islands: to a flag along them, up a tower of them, or after coins. The right trigger sprints."""
    keys = {"left": "run", "SOUTH": "jump", "RIGHT_TRIGGER": "sprint"}
    attack, hud, scenery, lives = ("SOUTH",), ("e33", "fc0", 4), ("4ae", "cef", ("8c8", "5a6")), 3

    def begin(self, want="flag"):
        self.want, self.islands, x, y, s = want, [], 0, 0, self.rng.choice((-1, 1))
        if want == "tower":
            self.islands = [(-90, 90, 0)]
            for i in range(1, 9):
                x += self.plan.choice((-1, 1)) * s * self.plan.uniform(60, 88)
                self.islands.append((x - 34, x + 34, -58 * i))
        else:
            for i in range(7):
                wide = self.plan.uniform(80, 150)
                self.islands.append((x, x + wide, y) if s > 0 else (-x - wide, -x, y))
                x, y = x + wide + self.plan.uniform(50, 68), y + self.plan.choice((-20, 0, 20))
        self.on = self.last = 3 if want == "coin" else 0                   # the island stood on, and the one to come back to after a fall
        self.stand(self.top(self.on))
        self.coins = [self.top(-1) - 20j]                                  # the flag's place
        if want == "coin":
            self.coins = [complex(self.rng.uniform(x0 + 15, x1 - 15), y - self.rng.choice((16, 70))) for x0, x1, y in self.islands[1:3] + self.islands[4:6]]

    def play(self):
        self.bodily("SOUTH" in self.held, 4.0 if "RIGHT_TRIGGER" in self.held else 3.0)
        if self.ground:
            self.last = self.on
        if self.pos.imag > self.islands[self.last][2] + 150:
            self.health -= 1
            self.stand(self.top(self.last))
        for coin in [c for c in self.coins if abs(c.real - self.pos.real) < 26 and abs(c.imag - self.pos.imag + 16) < 30]:
            self.coins.remove(coin)
            self.score += 1

    def draw(self):
        corner = self.pos - 128 - 160j
        frame = self.back(self.pos.real)
        self.land(frame, corner)
        for c in self.coins:
            if self.want == "coin":
                stamp(frame, "coin", c - corner, 36)
            else:
                stamp(frame, "flag", c - corner - 4j, 48)
        goal = self.target()
        if goal is not None and abs(goal - self.pos) > 120:
            arrow(frame, 128 + 40j, cmath.phase(goal - self.pos), 28, (255, 240, 60))
        stamp(frame, "runner", 128 + 140j, 40, flip=self.way < 0)
        if not self.ground:
            arrow(frame, 128 + 176j, math.copysign(math.pi / 2, self.v), 10, (255, 255, 255))
        return frame

    def target(self):
        return min(self.coins, key=lambda c: abs(c - self.pos), default=None)

    def wish(self):
        goal, x = self.target(), self.pos.real
        if goal is None:
            return 0j, 0j, ""
        far = [abs(goal.real - self.top(i).real) + abs(goal.imag - self.top(i).imag) for i in range(len(self.islands))]
        at = far.index(min(far))                                           # the goal's island
        x0, x1, y = self.islands[self.on]
        if at == self.on:
            d = goal.real - x
            return complex(span(d / 20), 0), 0j, "SOUTH" if goal.imag < y - 40 and abs(d) < 30 and self.ground else ""
        to = self.on + (1 if at > self.on else -1)                         # the next island on the way
        s = 1 if self.top(to).real > self.top(self.on).real else -1
        edge = x1 if s > 0 else x0
        if self.want == "tower":
            spot = edge - s * 6
            if self.ground:
                return complex(span((spot - x) / 16), 0), 0j, "SOUTH" if (spot - x) * s < 24 else ""
            return complex(span((self.top(to).real - x) / 24), 0), 0j, "SOUTH" if self.v < 0 else ""
        if self.ground:
            if (edge - x) * s < 24:
                return complex(s, 0), 0j, "SOUTH"
            return complex(s, 0), 0j, "RIGHT_TRIGGER" if (edge - x) * s > 70 else ""
        near = self.islands[to][0 if s > 0 else 1]                         # its edge on this side
        drop = self.islands[to][2] - self.pos.imag
        flight = 2 * (math.sqrt(self.v ** 2 + drop) - self.v) if self.v ** 2 + drop > 0 else 0.0   # steps until there: drop = v t + t^2 / 4
        if (near - 8 * s - x) * s > 3 * flight:                            # not to be reached: back to where we stood
            return complex(span((edge - 20 * s - x) / 20), 0), 0j, ""
        aim = near + 26 * s
        return complex(s if (aim - x) * s > 0 else (aim - x) / 30, 0), 0j, "SOUTH" if self.v < 0 else ""


class Commando(Side):
    """Run and gun: the right stick aims, the right trigger fires, SOUTH jumps over bullets and wire."""
    keys = {"left": "run", "right": "aim", "RIGHT_TRIGGER": "fire", "SOUTH": "jump"}
    attack, hud, lives, scenery = ("RIGHT_TRIGGER", "SOUTH"), ("f22", "fd0", 4), 3, ("c63", "fc7", ("a54", "632"))

    def begin(self, foe="", breach=False):
        self.foe, self.breach, self.islands = foe, breach, [(-2000, 2000, 200)]
        self.foes, self.bolts, self.shots, self.wires = [], [], [], []
        self.stand(200j)
        self.aim = self.rng.choice((0, math.pi))
        if breach:
            s, x = self.rng.choice((-1, 1)), 60.0
            for _ in range(7):
                x += self.plan.uniform(90, 150)
                self.wires.append(s * x)
            self.copter = s * (x + 110)
        self.recruit()

    def recruit(self):
        """Soldiers to both sides, on the ground or on ledges; turrets in the air."""
        if not self.foe or self.foes:
            return
        heights, hp = ((20, 70, 120), 1) if self.foe == "soldier" else ((100, 130, 150), 3)
        for side in (-1, 1):
            at = complex(self.pos.real + side * self.rng.uniform(80, 112), 200 - self.rng.choice(heights))
            self.foes.append(Thing(kind=self.foe, at=at, hp=hp, wait=self.rng.randint(40, 90)))

    def play(self):
        self.bodily("SOUTH" in self.held)
        if abs(self.right) > 0.3:
            self.aim = cmath.phase(self.right)
        heart = self.pos - 22j
        if "RIGHT_TRIGGER" in self.held and self.ready("gun", 10):
            self.bolts.append(Thing(at=heart + cmath.rect(16, self.aim), v=cmath.rect(10, self.aim)))
        strikes, wounds = self.strikes(self.foes, 23), self.wounds(heart, 20)
        self.fly(self.bolts, lambda bolt: strikes(bolt) or bolt.at.imag > 200, 170)
        self.fly(self.shots, lambda shot: wounds(shot) or shot.at.imag > 200)
        for f in list(self.foes):
            f.wait -= 1
            away = f.at.real - self.pos.real
            if abs(away) > 112:
                f.at -= math.copysign(2.6, away)                           # runs along
            if f.hp <= 0:
                self.foes.remove(f)
                self.score += 1
            elif f.wait <= 0:
                f.wait = 75
                flat = complex(1 if self.pos.real > f.at.real else -1, 0)
                self.shots.append(Thing(kind="mine", at=f.at, v=2.6 * (unit(heart - f.at) if self.foe == "turret" or f.at.imag < 170 else flat)))
        if any(abs(w - self.pos.real) < 20 and self.pos.imag > 178 for w in self.wires) and self.ready("wire", 20):
            self.health -= 1
        if self.breach and abs(self.copter - self.pos.real) < 24:
            self.score = 1
        self.recruit()

    def draw(self):
        corner = self.pos.real - 128
        frame = self.back(self.pos.real)
        x = int(corner) % 128
        frame[200:] = pattern("sand", 56, 512, "541", "874")[:, x:x + 256]
        for w in self.wires:
            if abs(w - self.pos.real) < 160:
                stamp(frame, "wire", w - corner + 186j, 40)
        if self.breach:
            stamp(frame, "copter", self.copter - corner + 160j, 92)
            arrow(frame, 128 + 40j, 0 if self.copter > self.pos.real else math.pi, 32, (255, 255, 60))
        for f in self.foes:
            x, y = dot(f.at - corner)
            if f.kind == "soldier" and f.at.imag < 170:
                cv2.rectangle(frame, (x - 24, y + 18), (x + 24, y + 28), (90, 60, 50), -1)
            stamp(frame, f.kind, f.at - corner - 4j, 52, flip=f.at.real > self.pos.real)
        gun = complex(128, self.pos.imag - 22)
        stamp(frame, "trooper", gun, 52, flip=self.way < 0)
        cv2.line(frame, dot(gun), dot(gun + cmath.rect(30, self.aim)), (20, 20, 20), 8)
        for bolt in self.bolts:
            cv2.circle(frame, dot(bolt.at - corner), 5, (255, 255, 160), -1)
        for shot in self.shots:
            cv2.circle(frame, dot(shot.at - corner), 9, (10, 10, 10), -1)
            cv2.circle(frame, dot(shot.at - corner), 7, (255, 40, 220), -1)
        return frame

    def wish(self):
        if self.breach:
            s = 1 if self.copter > self.pos.real else -1
            near = min(((w - self.pos.real) * s for w in self.wires if (w - self.pos.real) * s > 0), default=999)
            return complex(s, 0), complex(s, 0), "SOUTH" if 24 < near < 56 else ""
        heart, leap, run = self.pos - 22j, "", 0.0
        foe = min(self.foes, key=lambda f: abs(wrap(self.aim - cmath.phase(f.at - heart))))   # whom the gun points at most
        d = foe.at - heart
        danger = [s for s in self.shots if abs(s.at - heart) < 80 and ((heart - s.at) * s.v.conjugate()).real > 0]
        if danger:
            s = danger[0]
            if abs(s.v.imag) >= 0.6:
                run = -1.0 if s.v.real > 0 else 1.0                        # run under it, towards where it comes from
            elif abs(s.at.real - heart.real) < 58:
                leap = " SOUTH"
        elif abs(d.real) > 115:
            run = math.copysign(0.8, d.real)
        elif not 70 < abs(d.real) < 115:
            run = -math.copysign(0.6, d.real)
        return complex(run, 0), unit(d), ("RIGHT_TRIGGER" if abs(wrap(self.aim - cmath.phase(d))) < 0.15 else "") + leap


class Glider(Side):
    """Flight over hills from left to right: rings to pass through, foes to shoot, tanks to bomb where the mark on the ground shows."""
    keys = {"left": "fly; x = speed", "RIGHT_TRIGGER": "guns", "SOUTH": "bomb"}
    attack, hud, scenery = ("RIGHT_TRIGGER", "SOUTH"), ("f28", "fff", 4), ("325", "f96", ("a46", "525"))

    def begin(self, want="ring"):
        self.want, self.pos, self.gap, self.ammo = want, complex(0, self.rng.uniform(70, 180)), 70.0, 6 if want == "tank" else 11
        self.things, self.bolts, self.bombs = [], [], []

    def play(self):
        ahead = 2.6 + 1.2 * self.left.real
        self.pos = complex(self.pos.real + ahead, span(self.pos.imag + 3.4 * self.left.imag, 34, 120 if self.want == "tank" else 205))
        self.gap -= ahead
        if self.gap <= 0:
            self.gap = {"ring": 120, "foe": 95, "tank": 120}[self.want] * self.rng.uniform(0.85, 1.25)
            y = 226 if self.want == "tank" else self.rng.uniform(50, 195)
            self.things.append(Thing(kind=self.want, at=complex(self.pos.real + 200, y), base=y, phase=self.rng.uniform(0, 6), hp=1))
        if self.want == "foe" and "RIGHT_TRIGGER" in self.held and self.ammo and self.ready("gun", 12):
            self.ammo -= 1
            self.bolts.append(Thing(at=self.pos + 26, v=10))
        if self.want == "tank" and "SOUTH" in self.held and self.ammo and self.ready("bomb", 20):
            self.ammo -= 1
            self.bombs.append(Thing(kind="bomb", at=self.pos + 10j, v=complex(ahead, 1.0)))
        self.fly(self.bolts, self.strikes(self.things, 20))
        for bomb in list(self.bombs):
            bomb.at, bomb.v = bomb.at + bomb.v, bomb.v + 0.25j
            if bomb.at.imag > 222:
                self.bombs.remove(bomb)
                for tank in [f for f in self.things if abs(f.at.real - bomb.at.real) < 22]:
                    tank.hp = 0
        for f in list(self.things):
            d = f.at - self.pos
            if self.want == "foe":
                f.at = complex(f.at.real - 0.4, f.base + 14 * math.sin(f.phase + self.t / 18))
                if abs(d.real) < 30 and abs(d.imag) < 26:
                    self.hurt()
            if self.want == "ring" and abs(d.real) < ahead:
                f.kind = "gone"
                if abs(d.imag) < 25:
                    self.score += 1
                else:
                    self.health -= 1
            if f.hp <= 0 or d.real < -90 or f.kind == "gone":
                self.things.remove(f)
                self.score += f.hp <= 0
                self.health -= f.hp > 0 and self.want == "foe"             # let through

    def mark(self):
        """Where a bomb dropped now would fall: dy = v t + g t^2 / 2."""
        drop = 212 - self.pos.imag
        return (2.6 + 1.2 * self.left.real) * (math.sqrt(1 + 0.5 * drop) - 1) / 0.25

    def draw(self):
        corner = self.pos - 70 - (60j if self.want == "tank" else 128j)
        down, ground = min(round(corner.imag) + 96, 432 - 256), round(232 - corner.imag)
        x = int(self.pos.real)
        frame = sky(*self.scenery, 432)[down:down + 256, x % 512:x % 512 + 256].copy()
        frame[max(ground, 0):] = pattern("checker", 256, 512, "313", "636")[:max(256 - ground, 0), x % 256:x % 256 + 256]
        if self.want == "tank":
            spot = 70 + self.mark() + (212 - corner.imag) * 1j
            cv2.line(frame, (70, 60), dot(spot), (255, 255, 255), 3)
            cv2.rectangle(frame, dot(spot - 16 - 16j), dot(spot + 16 + 16j), (255, 60, 60) if not self.rests("bomb") else (120, 120, 120), 5)
        for i in range(self.ammo if self.want != "ring" else 0):
            cv2.rectangle(frame, (8 + 12 * i, 236), (15 + 12 * i, 252), (255, 200, 60), -1)
        for f in self.things:
            if f.kind == "ring":
                for ink, thick in ((90, 50, 0), 14), ((255, 210, 0), 9):
                    cv2.ellipse(frame, dot(f.at - corner), (16, 36), 0, 0, 360, ink, thick)
            else:
                stamp(frame, f.kind, f.at - corner, 52)
        for bolt in self.bolts:
            cv2.rectangle(frame, dot(bolt.at - corner - 9 - 3j), dot(bolt.at - corner + 9 + 3j), (120, 255, 255), -1)
        for bomb in self.bombs:
            stamp(frame, "bomb", bomb.at - corner, 28, math.pi / 2)
        stamp(frame, "plane", self.pos - corner, 56, round(2 * self.left.imag) * math.tau / 32)
        return frame

    def wish(self):
        ahead = [f for f in self.things if f.at.real > self.pos.real + (24 if self.want == "foe" else 0)]
        if not ahead:
            return complex(0.3, span(((125 if self.want != "tank" else 80) - self.pos.imag) / 60)), 0j, ""
        d = ahead[0].at - self.pos
        if self.want == "tank":
            gap = d.real - self.mark()
            drop = abs(gap) < 16 and not self.bombs and not self.rests("bomb")
            return complex(span(gap / 60), span((80 - self.pos.imag) / 60)), 0j, "SOUTH" if drop else ""
        lift = span(d.imag / 28)
        if self.want == "foe":
            fire = abs(d.imag) < 12 and d.real < 150 and not self.bolts and not self.rests("gun")
            return complex(0.2 if d.real > 70 else -0.6, lift), 0j, "RIGHT_TRIGGER" if fire else ""
        return complex(0.6 if abs(d.imag) < 20 else -0.4, lift), 0j, ""


class Dojo(Game):
    """One screen, a duel: red rivals are about to strike (block), green ones are open (punch), blue ones guard high (kick low); boards to break."""
    keys = {"left": "walk, turn", "WEST": "punch", "SOUTH": "low kick", "LEFT_TRIGGER": "block"}
    attack, hud, lives = ("WEST", "SOUTH"), ("f40", "420", 8), 3

    def begin(self, foes=1, boards=False):
        self.boards, self.x, self.way, self.foes = boards, 128.0, self.rng.choice((-1, 1)), []
        self.floor = pattern("planks", 256, 256, "630", "a62").copy()
        self.floor[:170] = pattern("grid", 170, 256, "fec", "c96")
        cv2.circle(self.floor, (128, 70), 40, (230, 60, 50), -1)
        self.board, self.aim = None, 0.0
        for i in range(0 if boards else foes):
            side = self.rng.choice((-1, 1)) if foes == 1 else 2 * i - 1
            self.foes.append(Thing(x=128.0 + 90 * side, kind="idle", wait=20 + 40 * i))

    def play(self):
        pressed = [b for b in ("WEST", "SOUTH", "LEFT_TRIGGER") if b in self.held]
        move = pressed[0] if len(pressed) == 1 and not self.rests("stun") else None         # two at once are a fumble
        if self.boards:
            return self.chop(move)
        if abs(self.left.real) > 0.15 and not self.rests("stun"):
            self.way = 1 if self.left.real > 0 else -1
            self.x = span(self.x + 2.8 * self.left.real * (move != "LEFT_TRIGGER"), 24, 232)
        for f in self.foes:
            d = f.x - self.x
            f.wait -= 1
            if abs(d) > 44:
                f.x -= math.copysign(1.2, d) if len(self.foes) == 1 or f.kind != "idle" else 0
            elif abs(d) < 36:
                f.x = span(f.x + math.copysign(2, d), 16, 240)
            if f.wait <= 0:
                if f.kind == "wind" and abs(d) < 60 and not (move == "LEFT_TRIGGER" and d * self.way > 0):
                    self.hurt()
                alone = len(self.foes) == 1 or all(g is f or g.kind == "idle" for g in self.foes)
                f.kind = self.rng.choice(("open", "shut", "wind")) if f.kind == "idle" and alone else "idle"
                f.wait = {"open": 40, "shut": 40, "wind": 26, "idle": self.rng.randint(8, 16)}[f.kind]
        if move in ("WEST", "SOUTH") and self.ready("blow", 12):
            f = min(self.foes, key=lambda f: abs(f.x - self.x))
            if abs(f.x - self.x) < 58 and (f.x - self.x) * self.way > 0:
                if f.kind == {"WEST": "open", "SOUTH": "shut"}[move]:
                    self.score += 1
                    f.kind, f.wait = "idle", 12
                    f.x = span(f.x + 26 * self.way, 16, 240)
                    if len(self.foes) == 1 and self.rng.random() < 0.5:
                        f.x = span(2 * self.x - f.x, 16, 240)                               # leaps over to the other side
                elif f.kind != "idle":
                    self.due["stun"] = self.t + 12
                    self.hurt()

    def chop(self, move):
        """Boards fly in from all sides: point the left stick at one and punch when it is in the ring."""
        if abs(self.left) > 0.3:
            self.aim = cmath.phase(self.left)
        if self.board is None:
            self.board = Thing(angle=self.rng.uniform(0, math.tau), far=112.0)
        b = self.board
        b.far -= 2.6
        if move == "WEST" and self.ready("blow", 8):
            if 26 < b.far < 60 and abs(wrap(self.aim - b.angle)) < 0.6:
                self.score, self.board = self.score + 1, None
            else:
                self.due["stun"] = self.t + 12
                self.hurt()
        elif b.far < 18:
            self.board = None
            self.hurt()

    def draw(self):
        frame = self.floor.copy()
        if self.boards:
            cv2.circle(frame, (128, 140), 60, (40, 200, 255), 4)
            if self.board:
                stamp(frame, "board", 128 + 140j + cmath.rect(self.board.far, self.board.angle), 52, self.board.angle)
            arrow(frame, 128 + 140j + cmath.rect(34, self.aim), self.aim, 14, (255, 255, 255))
            stamp(frame, "monk", 128 + 140j, 52, flip=math.cos(self.aim) < 0)
        else:
            for f in self.foes:
                stamp(frame, f.kind, f.x + 190j, 84, flip=f.x > self.x)
            stamp(frame, "monk", self.x + 190j, 84, flip=self.way < 0)
            if "LEFT_TRIGGER" in self.held:
                x = round(self.x + 22 * self.way)
                cv2.rectangle(frame, (x - 4, 150), (x + 4, 220), (120, 200, 255), -1)
        if self.rests("stun"):
            cv2.circle(frame, (128, 108) if self.boards else (round(self.x), 132), 12, (255, 255, 0), 4)
        return frame

    def wish(self):
        if self.boards:
            b = self.board
            if not b:
                return 0j, 0j, ""
            return cmath.rect(0.9, b.angle), 0j, "WEST" if 28 < b.far < 54 else ""
        f = min(self.foes, key=lambda f: (f.kind == "idle", abs(f.x - self.x)))
        d = f.x - self.x
        near = abs(d) < 54
        left = complex(math.copysign(0.35 if near else 1, d), 0)
        return left, 0j, {"open": "WEST", "shut": "SOUTH", "wind": "LEFT_TRIGGER", "idle": ""}[f.kind] if near and d * self.way > 0 else ""


# -------------------------------------------------------------------------------------------------------------------------- tasks
class Task(NamedTuple):
    """Reach `goal` points within `seconds` of game time and alive."""
    name: str
    game: type
    kind: str                                      # combat, navigation, specific
    goal: int
    seconds: int
    start: dict
    fixed: bool                                    # the level is the same for all seeds, the start is not
    text: str


TASKS = {}
for kind, name, *rest in (
    (Crypt, "ghouls", "combat", 2, 20, dict(foes=2), False, "defeat two ghouls"),
    (Crypt, "exit", "navigation", 2, 20, dict(steps=("portal", "portal")), True, "walk through two portals"),
    (Crypt, "key", "specific", 2, 20, dict(steps=("key", "lock")), False, "take the key, open the lock"),
    (Siege, "drones", "combat", 3, 20, dict(want="drone"), False, "shoot three drones with 16 shots"),
    (Siege, "beacon", "navigation", 2, 20, dict(want="beacon"), True, "reach two beacons"),
    (Siege, "crates", "specific", 3, 20, dict(want="crate"), False, "open three crates"),
    (Rally, "course", "navigation", 6, 18, dict(), True, "pass six gates"),
    (Rally, "traffic", "navigation", 3, 18, dict(rivals=3), False, "overtake three cars, with two collisions at most"),
    (Rally, "park", "specific", 2, 20, dict(park=True), False, "stop in two bays"),
    (Swarm, "bugs", "combat", 5, 15, dict(foe="bug"), False, "destroy five bugs"),
    (Swarm, "brute", "combat", 16, 9, dict(foe="brute"), False, "hit the brute 16 times"),
    (Swarm, "gems", "specific", 4, 15, dict(gems=True), False, "collect four gems among mines"),
    (Vault, "slimes", "combat", 4, 20, dict(want="slime"), False, "defeat four slimes"),
    (Vault, "stairs", "navigation", 3, 15, dict(want="stairs"), True, "climb three stairs"),
    (Vault, "chest", "specific", 2, 20, dict(want="chest"), False, "key and chest, in two rooms"),
    (Shade, "knife", "combat", 2, 20, dict(want="guard"), False, "strike down two guards unseen"),
    (Shade, "exit", "navigation", 1, 20, dict(want="exit"), True, "reach the exit unseen"),
    (Shade, "gems", "specific", 2, 20, dict(want="gem"), False, "steal two of three gems unseen"),
    (Cliffs, "flag", "navigation", 1, 20, dict(want="flag"), True, "reach the flag across seven islands"),
    (Cliffs, "tower", "navigation", 1, 20, dict(want="tower"), False, "climb to the flag"),
    (Cliffs, "coins", "specific", 4, 20, dict(want="coin"), False, "collect four coins to both sides"),
    (Commando, "soldiers", "combat", 8, 12, dict(foe="soldier"), False, "shoot eight soldiers"),
    (Commando, "turrets", "combat", 3, 15, dict(foe="turret"), False, "destroy three turrets"),
    (Commando, "breach", "navigation", 1, 15, dict(breach=True), True, "run to the helicopter across the wire"),
    (Glider, "foes", "combat", 5, 20, dict(want="foe"), False, "shoot down five planes with eleven shots"),
    (Glider, "rings", "navigation", 7, 15, dict(want="ring"), True, "fly through seven rings"),
    (Glider, "bombs", "specific", 4, 20, dict(want="tank"), False, "bomb four tanks with six bombs"),
    (Dojo, "duel", "combat", 6, 20, dict(foes=1), False, "land six blows"),
    (Dojo, "pair", "combat", 6, 20, dict(foes=2), False, "land six blows on two rivals"),
    (Dojo, "boards", "specific", 7, 15, dict(boards=True), False, "break seven boards")):
    name = f"{kind.__name__.lower()}/{name}"
    TASKS[name] = Task(name, kind, *rest)
PLAYABLE = ChainMap({}, TASKS)                     # and the games by others that were asked for
GAMES = {task.game.__name__.lower(): task.game for task in TASKS.values()}
FAMILIES = {"first person": ("crypt", "siege", "rally"), "top-down": ("swarm", "vault", "shade"), "side": ("cliffs", "commando", "glider", "dojo")}


# ------------------------------------------------------------------------------------------------------------------------ players
class Scripted:
    """Plays a task as a person does: knows the game's wish, but sees it late, moves sticks gradually and askew, and slips now and then."""
    def __init__(self, game, seed=0):
        self.game, self.rng = game, random.Random(f"player {seed}")
        self.late = deque([(0j, 0j, "")] * self.rng.randint(*game.late))
        self.askew, self.reach, self.quick = self.rng.gauss(0, 0.05), self.rng.uniform(0.93, 1.0), self.rng.uniform(0.4, 0.7)
        self.sticks, self.slip, self.how = [0j, 0j], 0, ""
        self.careless = self.rng.uniform(0.002, 0.007)
        if game.late == (0, 0):
            self.quick = 1.0                                               # a game that waits for its player: each push is whole

    def act(self):
        self.late.append(self.game.wish())
        *wanted, keys = self.late.popleft()
        keys = set(keys.split())
        if self.slip == 0 and self.rng.random() < self.careless:
            self.slip, self.how = self.rng.randint(5, 11), self.rng.choice(("veer", "veer", "rest", "button"))
            self.veer = cmath.rect(1, self.rng.choice((-1, 1)) * self.rng.uniform(0.6, 2))
            self.extra = self.rng.choice(sorted(k for k in self.game.keys if k.isupper()))
        if self.slip:
            self.slip -= 1
            if self.how == "veer":
                wanted = [w * self.veer for w in wanted]
            elif self.how == "rest":
                wanted, keys = [0j, 0j], set()
            else:
                keys.add(self.extra)
        action = neutral()
        for i, (name, want) in enumerate(zip(extract.STICKS, wanted)):
            noisy = want * cmath.rect(self.reach, self.askew) + (complex(self.rng.gauss(0, 0.03), self.rng.gauss(0, 0.03)) if want else 0)
            self.sticks[i] += (noisy - self.sticks[i]) * self.quick
            s = clip(self.sticks[i])
            action[extract.STICKS[name]] = s.real, s.imag
        action[[extract.BUTTON[k] for k in keys]] = 1
        return action


class Blind:
    """Plays without looking. how = "random": sticks anywhere and each of the game's buttons down or up, drawn anew every 4 to 16 steps; or one of
    MASHING: both sticks held in a direction or turning, with or without the game's attack, or sticks at rest and all buttons hammered."""
    def __init__(self, game, seed=0, how="random"):
        self.rng, self.t, self.again, self.how = random.Random(f"{how} {seed}"), 0, 0, how
        self.keys, self.attack = [extract.BUTTON[k] for k in game.keys if k.isupper()], [extract.BUTTON[k] for k in game.attack]

    def act(self):
        way, _, attack = self.how.partition("+")
        self.t += 1
        if way == "random" and self.t <= self.again:
            return self.last
        action, pressed = neutral(), self.attack if attack else []
        if way == "random":
            self.again = self.t + self.rng.randint(3, 15)
            action[21:] = [self.rng.uniform(-1, 1) for _ in range(4)]
        else:
            spot = {"right": 1, "left": -1, "up": -1j, "down": 1j, "spin": cmath.rect(1, self.t / 6), "mash": 0j}[way]
            action[21:] = [spot.real, spot.imag] * 2
        if way in ("random", "mash"):
            pressed = [k for k in self.keys if self.rng.random() < 0.5]
        action[pressed] = 1
        self.last = action
        return action


class Learned:
    """A policy plays one game alone; looks again after `per_chunk` steps."""
    def __init__(self, game, policy, seed=0, per_chunk=8):
        self.game, self.session, self.per_chunk = game, sample.Session(policy, seed=seed), per_chunk
        self.coming = deque([neutral()] * policy.config.action_shift)

    def act(self):
        shift = self.session.policy.config.action_shift
        if len(self.coming) <= shift:
            chunk = at_rate(self.session.predict(self.game.render()), self.session.policy.config, self.game.fps)
            self.coming.extend(chunk[:self.per_chunk])
        return self.coming.popleft()


def at_rate(chunks, config, fps):
    """Chunks (..., T, 25) at the model's rate -> (..., K, 25) at the game's."""
    return chunks[..., (np.arange(int(config.horizon * fps / config.hz)) * config.hz / fps).astype(int), :]


MASHING = ("right", "left", "up", "down", "right+attack", "left+attack", "up+attack", "down+attack", "spin+attack", "mash")


# ---------------------------------------------------------------------------------------------------------- recording and playing
PLAYED = 1 << 40                                   # episodes are recorded with seeds below and played for evaluation with seeds from here on


def pick_tasks(names):
    """Names of tasks and games -> names of tasks; none = all."""
    for name in names or ():
        if name not in TASKS and name not in GAMES:
            raise UserError(f"{name!r} is not one of the games {', '.join(GAMES)} nor one of their tasks ({', '.join(list(TASKS)[:3])}, ...): give others")
    return [t for t in TASKS if not names or t in names or t.split("/")[0] in names]


def film(tasks, seed, n, policy=None):
    """n steps of scripted play of one game, task after task, by players that differ -> yields (frame, action, True where an episode begins, True where
    the script plays). With a policy the two take turns: it plays into the situations that it makes, the script shows the way out (DAgger, 1011.0686)."""
    rng, env = random.Random(f"{tasks[0].split('/')[0]} {seed}"), None
    for _ in range(n):
        begins = env is None or env.over
        if begins:
            number, task = rng.randrange(PLAYED), rng.choice(tasks)
            env = PLAYABLE[task].game(task, number)
            script, turn, scripted = Scripted(env, number), 0, True
        action = script.act()                                                  # sees the game at every step, so that it is late as ever at its turn
        if policy and turn == 0:
            scripted, turn, model = not scripted, rng.randint(env.fps, 3 * env.fps), Learned(env, policy, number)
        turn -= 1
        if not scripted:
            action = model.act()
        yield env.render(), action, begins, scripted
        env.advance(action)


@functools.lru_cache(1)
def learned(path, steps):
    """The policy of --ckpt, once a process."""
    torch.set_num_threads(1)
    return sample.Policy(path, "cpu", steps=steps)


def record_clip(out, tasks, number, seed, n, video, ckpt=None, euler=None):
    """One recording of n steps of tasks of one game -> its line. video: False for a clip folder, True or the pad's corner for a video; ckpt: a model
    that takes turns with the script, at so many Euler steps."""
    name, seed = f"{PLAYABLE[tasks[0]].game.__name__.lower()}-{number:03}", f"{seed} {number}"
    if video:
        return record_video(out, name, tasks, seed, n, corner=video)
    return record_folder(out, name, tasks, seed, n, learned(ckpt, euler) if ckpt else None)


def record_folder(out, name, tasks, seed, n, policy=None):
    """A clip folder with the true actions, as play.py's recorder would leave it; with a policy, human.npy says where the script had taken over."""
    clip = {"video": "", "game": name.rpartition("-")[0], "fps": PLAYABLE[tasks[0]].game.fps, "n": n, "size": [extract.SIDE] * 2, "every": 1, "lag": 0,
            "player": policy.name if policy else "scripted", "seed": seed}
    if (out / name / "clip.json").is_file():
        there = extract.read_clip(out / name)
        if any(there.get(k) != clip[k] for k in ("fps", "n", "seed", "player")):
            raise UserError(f"{out / name}: expected a recording of these flags to go on with, found one of another --seed, --clip or --ckpt: "
                            "give another --out")
        return f"{name}: recorded already"
    tmp = extract.fresh_folder(out / name)
    writer, actions, begins, scripted = extract.FramesWriter(tmp, "frames"), np.zeros((n, extract.A), np.float32), np.zeros(n, bool), np.ones(n, bool)
    for i, (frame, actions[i], begins[i], scripted[i]) in enumerate(film(tasks, seed, n, policy)):
        writer.add(i, frame)
    writer.close(n)
    keep = extract.dense(actions)
    keep &= scripted                                                           # what the model did is nothing to learn from
    cuts = begins | (~scripted & np.roll(scripted, 1))                         # nor are, after a frame, the next episode and the model's turn
    for file, array in (("actions", actions), ("truth", actions), ("confidence", np.ones(n, np.float32)), ("keep", keep), ("cuts", cuts)):
        extract.write_npy(tmp / f"{file}.npy", array)
    if policy:
        extract.write_npy(tmp / "human.npy", scripted)
    extract.write_json(tmp / "clip.json", clip)
    os.replace(tmp, out / name)
    return f"{name}: {n} frames, {int(begins.sum())} episodes"


def record_video(out, name, tasks, seed, n, look=None, size=(640, 360), corner=True):
    """NAME.mp4 with one of our pads over it, NAME.truth.npy float32 (n, 25) and NAME.json (where the pad is) beside it. look: (the pad's name, its share
    of the width, its opacity), and corner: (to the right?, low?), drawn at random where not given."""
    if (out / f"{name}.json").is_file():
        return f"{name}: recorded already"
    rng = random.Random(f"overlay {name} {seed}")
    pad, share, opacity = look or (rng.choice(skins()).name, rng.uniform(0.22, 0.3), rng.uniform(0.75, 1))
    skin, wide = next(s for s in skins() if s.name == pad), round(size[0] * share)
    high = round(wide * skin.size[1] / skin.size[0])
    right, low = (rng.random() < 0.5, rng.random() < 0.5) if corner is True else corner
    x, y = size[0] - wide - 8 if right else 8, size[1] - high - 8 if low else 8
    truth = np.zeros((n, extract.A), np.float32)
    with extract.VideoWriter(out / f"{name}.mp4", PLAYABLE[tasks[0]].game.fps, size) as video:
        for i, (frame, truth[i], *_) in enumerate(film(tasks, seed, n)):
            picture = cv2.resize(frame, size, interpolation=cv2.INTER_LINEAR)
            put_pad(picture[y:y + high, x:x + wide], skin, truth[i], opacity)
            video.add(picture)
    extract.write_npy(out / f"{name}.truth.npy", truth)
    x0, y0, x1, y1 = (v * wide / skin.size[0] for v in extract.visible_box(skin))
    extract.write_json(out / f"{name}.json", {"game": name.split("-")[0], "box": [x + x0, y + y0, x1 - x0, y1 - y0], "template": skin.name,
                                              "family": skin.family, "opacity": opacity})
    return f"{name}.mp4: {n} frames, {skin.name} {wide} px"


@functools.lru_cache(1)
def skins():
    """Our own pads; drawing them all takes seconds."""
    return extract.our_skins()


def put_pad(ground, skin, action, opacity=1.0):
    """Draw the pad over a region (h, w, 3) of a picture, in place."""
    rgba = cv2.resize(extract.draw(skin, action), ground.shape[1::-1], interpolation=cv2.INTER_AREA)
    alpha = rgba[..., 3:] * (opacity / 255)
    ground[:] = (rgba[..., :3] * alpha + ground * (1 - alpha) + 0.5).astype(np.uint8)


def folder(path):
    """--out, made where it is missing."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{path}: expected a folder to write to, found {e.strerror}: give another --out") from None
    return Path(path)


def in_processes(work, jobs, workers):
    """work(*job) for all jobs, in order; in processes where that pays."""
    workers = min(workers, len(jobs))
    if workers < 2:
        yield from (work(*job) for job in jobs)
        return
    pool = ProcessPoolExecutor(workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    try:
        yield from pool.map(work, *zip(*jobs))
    finally:
        pool.shutdown(cancel_futures=True)


def record(args):
    """Scripted play -> clip folders or videos with an overlay."""
    tasks = theirs(args) if args.env or args.table else pick_tasks(args.games)
    fps = PLAYABLE[tasks[0]].game.fps
    if args.env and not PLAYABLE[args.env].game.table.get("script"):
        raise UserError(f"--env {args.env}: expected a game with a scripted player, found none for it: record it by hand with "
                        "python play.py --exe GAME --human --record DATA")
    extract.within(args, 1, None, "workers")
    n = round(min(args.clip, args.minutes * 60) * fps)
    if n < 2 * extract.HORIZON:
        raise UserError(f"--minutes {args.minutes} --clip {args.clip}: expected clips of {2 * extract.HORIZON / fps:.1f} s or more, two chunks: give more")
    if args.ckpt and args.video:
        raise UserError("--ckpt and --video: a video cannot say where the model played: give one of them")
    if args.ckpt:
        learned(args.ckpt, args.euler)                                         # a wrong file is said now, in one line
    count, groups, out = max(round(args.minutes * 60 * fps / n), 1), {}, folder(args.out)
    for task in tasks:
        groups.setdefault(PLAYABLE[task].game, []).append(task)
    jobs = [(out, mine, i, args.seed, n, args.video, args.ckpt, args.euler) for mine in groups.values() for i in range(count)]
    began = time.monotonic()
    for i, line in enumerate(in_processes(record_clip, jobs, 1 if args.env else args.workers), 1):
        print(f"clip {i}/{len(jobs)} | {line} | {i * n / (time.monotonic() - began):.0f} frames/s", flush=True)


# ------------------------------------------------------------------------------------------------------------------------ suite
def wilson(wins, n, z=1.96):
    """The 95 % interval of a share [Wilson 1927]: holds for 0 of n and n of n too."""
    centre, spread = (wins + z * z / 2) / (n + z * z), z / (n + z * z) * math.sqrt(wins * (n - wins) / n + z * z / 4)
    return max(centre - spread, 0.0), min(centre + spread, 1.0)


def play_alone(task, who, n, seed):
    """n rollouts of a player that is not a model: "scripted", "random" or one of MASHING -> wins."""
    make = Scripted if who == "scripted" else functools.partial(Blind, how=who)
    return sum(finish(TASKS[task].game(task, PLAYED + seed + i), make, seed + i).won for i in range(n))


def finish(game, make, seed):
    """Play to the end -> the game."""
    player = make(game, seed)
    while not game.over:
        game.advance(player.act())
    return game


def play_model(policy, tasks, n, per_chunk, seed=0, envs=64, films=None, say=None, ended=None):
    """n rollouts of each task, `envs` at a time, a batch of chunks for all that need one -> {task: wins}. films: {task: list}, filled with
    (frame as JPEG, action) of the first rollout of each task; ended: a list, filled with the games as they ended. All tasks have one rate."""
    c, fps = policy.config, PLAYABLE[tasks[0]].game.fps
    jobs = deque((task, i) for i in range(n) for task in tasks)
    total, wins, done = len(jobs), dict.fromkeys(tasks, 0), 0
    slots = [None] * min(envs, total)                                                          # (game, task, i, actions to come)
    session = sample.Session(policy, seed=seed, envs=len(slots))
    while done < total:
        for s, slot in enumerate(slots):
            if jobs and (slot is None or slot[0].over):
                task, i = jobs.popleft()
                slots[s] = (PLAYABLE[task].game(task, PLAYED + seed + i), task, i, deque([neutral()] * c.action_shift))
                session.reset(s, seed + i - s)                                             # environment s adds s: the same noise in any place
        frames = np.stack([slot[0].render() for slot in slots])
        chunks = at_rate(session.predict(frames), c, fps)                                      # (B, K, 25)
        for slot, chunk in zip(slots, chunks):
            game, task, i, coming = slot
            while len(coming) > c.action_shift:                                                # what is newly planned replaces what was
                coming.pop()
            coming.extend(chunk)
            for _ in range(per_chunk):
                if game.over or not coming:
                    break
                if films is not None and i == 0:
                    films.setdefault(task, []).append((cv2.imencode(".jpg", game.render()[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1], coming[0]))
                game.advance(coming.popleft())
                if game.over:
                    wins[task] += game.won
                    done += 1
                    if ended is not None:
                        ended.append(game)
        if say:
            say(done, total)
    return wins


def completion(args, players, policy=None, films=None):
    """Completion of each player on each task -> {task: {player: wins}}."""
    tasks = args.tasks
    jobs = [(task, who, args.n, args.seed) for who in players for task in tasks]
    table = {task: {} for task in tasks}
    for (task, who, *_), wins in zip(jobs, in_processes(play_alone, jobs, args.workers)):
        table[task][who] = wins
    if policy:
        for task, wins in play_model(policy, tasks, args.n, args.actions_per_chunk, args.seed, args.envs, films).items():
            table[task]["model"] = wins
    return table


def type_and_family(task):
    """The groups that a task of ours counts for."""
    family = next(family for family, games in FAMILIES.items() if task.split("/")[0] in games)
    return f"type: {TASKS[task].kind}", f"family: {family}"


def rows_of(table, n, groups_of=type_and_family):
    """Wins {task: {player: wins}} of n rollouts each -> rows per task, group and all: {name: {player: {"wins", "n", "rate", "low", "high"}}}."""
    groups = {task: [task] for task in table}
    for task in table:
        for group in groups_of(task):
            groups.setdefault(group, []).append(task)
    groups["all"] = list(table)
    return {name: {who: share(sum(table[t][who] for t in tasks), n * len(tasks)) for who in table[tasks[0]]} for name, tasks in groups.items()}


def share(wins, n):
    """A cell of a table."""
    low, high = wilson(wins, n)
    return {"wins": wins, "n": n, "rate": wins / n, "low": low, "high": high}


def show_rows(rows):
    """A table: share of rollouts completed, Wilson's interval in brackets."""
    players = list(next(iter(rows.values())))
    print(f"{'':24}" + "".join(f"{p:>20}" for p in players))
    for name, row in rows.items():
        print(f"{name:24}" + "".join(f"{r['rate']:>8.0%} [{r['low']:4.0%},{r['high']:5.0%}]" for r in row.values()) + f"  n {row[players[0]]['n']}")


def suite(args):
    """Completion of a checkpoint beside random and scripted (and constant and mashing) players."""
    args.tasks = theirs(args) if args.env or args.table else pick_tasks(args.tasks)
    fps = PLAYABLE[args.tasks[0]].game.fps
    extract.within(args, 1, None, "n", "actions_per_chunk", "envs", "workers")
    if args.video and not (args.ckpt and args.out):
        raise UserError("--video: expected --ckpt and --out with it, to show a model's play somewhere: give both")
    out, policy, films, began = args.out and folder(args.out), None, {} if args.video else None, time.monotonic()
    meta = {"ckpt": args.ckpt, "n": args.n, "seed": args.seed, "actions_per_chunk": args.actions_per_chunk, "machine": machine()}
    if args.ckpt:
        policy = sample.Policy(args.ckpt, args.device, steps=args.euler)
        if args.actions_per_chunk > int(policy.config.horizon * fps / policy.config.hz) - policy.config.action_shift:
            raise UserError(f"--actions-per-chunk {args.actions_per_chunk}: a chunk of this checkpoint lasts {policy.config.horizon / policy.config.hz:.2f} s, "
                            f"{fps} steps a second: give a smaller number")
        print(f"device: {policy.device} ({policy.reason}), {policy.steps} steps")
    if args.env:
        rows = rows_of_theirs(args, policy, films)
    else:
        table = completion(args, ("random", "scripted", *(MASHING if args.mashing else ())), policy, films)
        if args.mashing:
            meta["mashing"] = {task: max(MASHING, key=row.get) for task, row in table.items()}
            for row in table.values():
                row["best of mashing"] = max(row.pop(who) for who in MASHING)
        rows = rows_of(table, args.n)
    show_rows(rows)
    if out:
        extract.write_json(out / "suite.json", meta | {"seconds": round(time.monotonic() - began, 1), "rows": rows})
        chart(out / "suite.png", f"tasks completed, n {args.n} each, 95 % intervals", rows)
        if films:
            for task, frames in films.items():
                save_film(out / f"{task.replace('/', '-')}.mp4", frames, fps)


def unpack(jpeg):
    """JPEG bytes -> uint8 (h, w, 3) RGB."""
    return cv2.cvtColor(cv2.imdecode(jpeg, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def save_film(path, frames, fps=FPS):
    """(frame as JPEG, action) pairs -> a video of the game at twice its size, the pad beside it."""
    skin = skins()[0]
    high = round(360 * skin.size[1] / skin.size[0])
    with extract.VideoWriter(path, fps, (896, 512)) as video:
        for jpeg, action in frames:
            picture = np.full((512, 896, 3), 24, np.uint8)
            picture[:, :512] = cv2.resize(unpack(jpeg), (512, 512), interpolation=cv2.INTER_NEAREST)
            put_pad(picture[256 - high // 2:256 - high // 2 + high, 524:884], skin, action)
            video.add(picture)


def machine():
    """What the numbers were taken on."""
    return f"{platform.machine()}, {extract.cores()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, opencv {cv2.__version__}"


def show_games(args):
    """OUT/games.png: two games a row, the three tasks of each side by side, after two seconds of scripted play."""
    cells = []
    for name, kind in GAMES.items():
        strip = np.full((280, 780, 3), 24, np.uint8)
        for i, task in enumerate(pick_tasks([name])):
            game = kind(task, args.seed)
            player = Scripted(game, args.seed)
            while not game.over and game.t < 60:
                game.advance(player.act())
            strip[4:260, 4 + 258 * i:260 + 258 * i] = game.render()
        text = f"{name}: {', '.join(task.split('/')[1] for task in pick_tasks([name]))}"
        cv2.putText(strip, text, (6, 275), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (255, 255, 255), 1, cv2.LINE_AA)
        cells.append(strip)
    path = folder(args.out) / "games.png"
    extract.save_png(path, np.vstack([np.hstack(cells[i:i + 2]) for i in range(0, len(cells), 2)]))
    print(path)


# ---------------------------------------------------------------------------------------------------------------- games by others
# How a pad plays them: Gymnasium ids (patterns) and what holds for them; all that fit are merged, later ones win. --table FILE.json is one more.
#   pip, module    what to install, and to import so that the ids are known; make: arguments for gymnasium.make (the frame skip among them)
#   factory        what makes the environment where Gymnasium does not know it; named: its argument for the second word of the id;
#                  seed: its argument for the level, where reset() takes none
#   fps, seconds   steps a second of game time, after the frame skip; the longest episode
#   frame          where the picture is: "render", "" = the observation, else the part of the observation of that name
#   controls       what the game calls an action, or its number -> what the pad does for it. Of a Discrete space the first that holds is taken ("" always
#                  does), of MultiBinary all that hold; MultiDiscrete and Dict have such a table for each part (or one for all parts, by name).
#                  "left.up & SOUTH | DPAD_UP": sticks pushed beyond play.TILT, buttons held. A Box takes values: "left.x", "RIGHT_TRIGGER - LEFT_TRIGGER",
#                  "12 * right.x", from -1..1 (or 0..1 if it has no negative half) to its bounds; as they are where it has none.
#   success        {"return": at least this}, or {"info": key of the last info, "least": 1}
#   script, late   the scripted player (of SCRIPTS) and by how many steps it is late
JOYSTICK = {v + h + fire or "NOOP": " & ".join([f"left.{d.lower()}" for d in (v, h) if d] + ["SOUTH"] * bool(fire))
            for v in ("UP", "DOWN", "") for h in ("RIGHT", "LEFT", "") for fire in ("FIRE", "")}
OTHERS = {
    "Vizdoom*": dict(pip="vizdoom", module="vizdoom.gymnasium_wrapper", make=dict(frame_skip=1, max_buttons_pressed=0, labels_buffer_enabled=True), fps=35,
                     seconds=120, frame="screen", success={"return": 1}, controls={
        "MOVE_FORWARD": "left.up", "MOVE_BACKWARD": "left.down", "MOVE_LEFT": "left.left", "MOVE_RIGHT": "left.right", "TURN_LEFT": "right.left",
        "TURN_RIGHT": "right.right", "LOOK_UP": "right.up", "LOOK_DOWN": "right.down", "ATTACK": "RIGHT_TRIGGER", "USE": "WEST", "JUMP": "SOUTH",
        "CROUCH": "EAST", "SPEED": "LEFT_THUMB", "SELECT_NEXT_WEAPON": "RIGHT_SHOULDER", "SELECT_PREV_WEAPON": "LEFT_SHOULDER",
        "TURN_LEFT_RIGHT_DELTA": "6 * right.x", "LOOK_UP_DOWN_DELTA": "3 * right.y"}),                       # degrees a step
    "VizdoomBasic*": dict(script="aims", success={"return": 0}),                                           # the monster shot in about three seconds
    "VizdoomDefend*": dict(script="aims", success={"return": 10}),                                         # ten monsters
    "VizdoomDeadlyCorridor*": dict(success={"return": 1000}), "VizdoomMyWayHome*": dict(success={"return": 0.5}),     # the armour is reached
    "VizdoomHealthGathering*": dict(success={"return": 1000}), "VizdoomTakeCover*": dict(success={"return": 500}),    # steps survived
    "ALE/*": dict(pip="ale-py", module="ale_py", make=dict(frameskip=2), fps=30, seconds=200, frame="render", controls=JOYSTICK, success={"return": 1}),
    "ALE/Pong*": dict(script="rallies", late=(1, 2), controls={"RIGHT": "left.up", "LEFT": "left.down", "FIRE": "SOUTH", "NOOP": ""}),    # to win
    "procgen-*": dict(pip="procgen2", factory="procgen.gym_registration:make_env", named="env_name", seed="start_level", make=dict(num_levels=1), fps=15,
                      seconds=70, frame="", success={"return": 10}, controls={
        "9": "SOUTH", "10": "WEST", "11": "NORTH", "12": "EAST", "13": "LEFT_SHOULDER", "14": "RIGHT_SHOULDER", "0": "left.left & left.down",
        "2": "left.left & left.up", "6": "left.right & left.down", "8": "left.right & left.up", "1": "left.left", "7": "left.right", "3": "left.down",
        "5": "left.up", "4": ""}),
    "MiniGrid-*": dict(pip="minigrid", module="minigrid", fps=10, seconds=60, frame="render", script="walks", late=(0, 0), success={"return": 0.01},
                       controls={"3": "SOUTH", "4": "EAST", "5": "WEST", "2": "left.up", "0": "left.left", "1": "left.right", "6": ""}),      # 6 does nothing
    "Crafter*": dict(pip="crafter", factory="crafter:Env", seed="seed", make=dict(size=[256, 256]), fps=10, seconds=300, frame="", controls={
        "make_wood_pickaxe": "LEFT_TRIGGER & DPAD_LEFT", "make_stone_pickaxe": "LEFT_TRIGGER & DPAD_UP", "make_iron_pickaxe": "LEFT_TRIGGER & DPAD_RIGHT",
        "make_wood_sword": "RIGHT_TRIGGER & DPAD_LEFT", "make_stone_sword": "RIGHT_TRIGGER & DPAD_UP", "make_iron_sword": "RIGHT_TRIGGER & DPAD_RIGHT",
        "place_stone": "WEST", "place_table": "NORTH", "place_furnace": "RIGHT_SHOULDER", "place_plant": "EAST", "sleep": "LEFT_SHOULDER", "do": "SOUTH",
        "move_up": "left.up", "move_down": "left.down", "move_left": "left.left", "move_right": "left.right", "noop": ""},
        success={"return": 3})}                                                                            # about three achievements
READINGS = {}                                                              # what a rule may name: place in the action, sign (0: both)
for stick, at in extract.STICKS.items():
    for way, (axis, sign) in {"x": (0, 0), "y": (1, 0), **play.SIDES}.items():
        READINGS[f"{stick}.{way}"] = at.start + axis, sign
READINGS |= {name: (i, 1) for name, i in extract.BUTTON.items()}


def reading(action, name):
    """What the pad says: a button or a side of a stick (left.up) 0..1, an axis (left.x) -1..1."""
    i, sign = READINGS[name]
    return float(max(action[i] * sign, 0) if sign else action[i])


def holds(action, rule):
    """Does the pad do what a rule says? "a & b | c"."""
    return any(all(reading(action, name) > play.TILT for name in re.findall(r"[\w.]+", way)) for way in rule.split("|"))


def value(action, rule):
    """A sum of readings with signs and factors: "RIGHT_TRIGGER - 0.5 * left.x"."""
    terms = re.findall(r"(-?)\s*(?:([\d.]+)\s*\*\s*)?([A-Za-z][\w.]*)", rule)
    return sum(float(sign + (factor or "1")) * reading(action, name) for sign, factor, name in terms)


Discrete = namedtuple("Discrete", "n")              # a part of a MultiDiscrete space: one of n actions, like Gymnasium's class of that name


def to_theirs(space, controls, names=()):
    """An action space, its controls and what the game calls its actions -> a function from action float (25,) to an element of the space."""
    kind = type(space).__name__
    if kind not in ("Discrete", "MultiDiscrete", "MultiBinary", "Box", "Dict"):
        raise UserError(f"expected a game with actions of kind Discrete, MultiDiscrete, MultiBinary, Box or Dict, found {kind}: a pad can't play it")
    if not isinstance(controls, dict):
        raise UserError(f"expected a table of controls for {kind}, found {controls!r}: give actions' names or numbers and what the pad does for each")
    if kind == "Dict":
        made = {key: to_theirs(part, controls.get(key, controls), names) for key, part in space.spaces.items()}
        return lambda action: {key: choose(action) for key, choose in made.items()}
    if kind == "MultiDiscrete":
        several = [to_theirs(Discrete(int(n)), controls.get(str(i), controls), names) for i, n in enumerate(space.nvec)]
        return lambda action: np.array([choose(action) for choose in several], space.dtype)

    n, names = int(np.prod(space.shape)) if kind == "Box" else int(space.n), [name for name in names if name.endswith("_DELTA") == (kind == "Box")]
    rules = {}                                                             # by number; _DELTA: so ViZDoom calls the numbers among its buttons
    for key, rule in controls.items():
        if key in names or key.isdecimal():                                # else a name that other games of the kind have
            rules[names.index(key) if key in names else int(key)] = rule
    bad = [i for i in rules if i >= n]
    bad += [rule for rule in rules.values() if not isinstance(rule, str) or any(word not in READINGS for word in re.findall(r"[A-Za-z][\w.]*", rule))]
    if bad or not rules or kind == "Discrete" and "" not in rules.values():
        rest = ", one of them with an empty text for the pad at rest" if kind == "Discrete" else ""
        raise UserError(f"expected controls for {kind} of {n} ({', '.join(names) or 'no names'}), found {bad or rules}: give an action's name or number and "
                        f"what the pad does for it{rest}; a pad has {', '.join(READINGS)}")
    if kind == "Discrete":
        return lambda action: next(i for i, rule in rules.items() if holds(action, rule))
    if kind == "MultiBinary":
        return lambda action: np.array([i in rules and holds(action, rules[i]) for i in range(n)], np.int8)

    def numbers(action):
        values = np.array([value(action, rules.get(i, "")) for i in range(n)]).reshape(space.shape)
        bound = (np.abs(space.low) < 1e9) & (np.abs(space.high) < 1e9)     # the others take values as they are
        low, high, u = np.where(bound, space.low, 0), np.where(bound, space.high, 0), np.clip(values, -1, 1)
        around_zero, from_low = np.where(u > 0, u * high, -u * low), low + np.maximum(u, 0) * (high - low)
        return np.where(bound, np.where(low < 0, around_zero, from_low), values).astype(space.dtype)
    return numbers


class Foreign:
    """A game by others, with what players, recorders and the suite ask of a Game. A subclass is one id: its table, and environments at rest."""
    attack, table, idle = (), {}, []

    def __init__(self, task, seed=0):
        number, arg = seed // PLAYED << 30 | seed % (1 << 30), self.table.get("seed")          # 31 bits, evaluation apart from recording as before
        here = os.getcwd()
        os.chdir(scratch().name)                                                               # ViZDoom leaves files where it starts
        try:
            self.env = self.idle.pop() if self.idle else open_env(task, self.table, {arg: number} if arg else {})
            seen = self.env.reset() if arg else self.env.reset(seed=number)
        finally:
            os.chdir(here)
        self.inside = getattr(self.env, "unwrapped", self.env)
        meanings = getattr(self.inside, "get_action_meanings", None)                           # ALE's names for actions, ViZDoom's, Crafter's
        buttons = getattr(getattr(self.inside, "game", None), "get_available_buttons", None)
        names = meanings() if meanings else [b.name for b in buttons()] if buttons else getattr(self.inside, "action_names", ())
        self.choose = to_theirs(self.env.action_space, self.table["controls"], names)
        self.t, self.score, self.won, self.over = 0, 0.0, False, False
        self.look(seen[0] if isinstance(seen, tuple) else seen)                                # Gym, before Gymnasium, had no info here

    def look(self, seen):
        """The picture after a step -> self.frame uint8 (256, 256, 3)."""
        part = self.table["frame"]
        if part not in ("", "render"):
            seen = seen.get(part) if isinstance(seen, dict) else None
        rgb = np.asarray(self.env.render() if part == "render" else seen)
        if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] not in (1, 3):
            raise UserError(f"expected a picture uint8 (h, w, 3) as {part or 'the observation'!r}, found {rgb.dtype} {rgb.shape}: "
                            "say in the table's \"frame\" where it is")
        self.frame = extract.shrink(np.ascontiguousarray(np.broadcast_to(rgb, (*rgb.shape[:2], 3))))

    def render(self):
        return self.frame

    def advance(self, action):
        """One step with action float (25,)."""
        if self.over:
            return
        seen, reward, *ends, info = self.env.step(self.choose(action))                         # ends: terminated, truncated; in Gym done
        self.t, self.score = self.t + 1, self.score + float(reward)
        self.over = any(ends) or self.t >= self.table["seconds"] * self.fps
        if not self.over:
            return self.look(seen)
        rule = self.table["success"]
        self.won = bool(self.score >= rule["return"] if "return" in rule else info.get(rule["info"], 0) >= rule.get("least", 1))
        if "seed" not in self.table:
            self.idle.append(self.env)

    def wish(self):
        """What the scripted player wants: left stick, right stick, buttons."""
        return SCRIPTS[self.table["script"]](self)


@functools.lru_cache(1)
def scratch():
    """A folder for what games leave behind, gone when this process ends."""
    return tempfile.TemporaryDirectory(ignore_cleanup_errors=True)


def open_env(env_id, table, level):
    """An environment that gives pictures; from here on, and not before, the packages are needed."""
    wants, package = table.get("make", {}) | level, f"gymnasium {table.get('pip', '')}".strip()
    try:
        if "factory" in table:
            module, name = table["factory"].split(":")
            return getattr(importlib.import_module(module), name)(**wants, **({table["named"]: env_id.split("-")[1]} if "named" in table else {}))
        import gymnasium
        if "module" in table:
            importlib.import_module(table["module"])                                           # its import registers the ids
        return gymnasium.make(env_id, render_mode="rgb_array", **wants)
    except ImportError as e:
        raise UserError(f"--env {env_id}: expected the packages {package}, found: {e}: pip install {package}") from None
    except Exception as e:                                                                     # of any class: what is made comes from the flags alone
        raise UserError(f"--env {env_id}: expected an environment that can be made, found {' '.join(str(e).split())}: "
                        "mend the id or the table's \"make\"") from None


def theirs(args):
    """--env and --table -> [the id], from now on a task in PLAYABLE."""
    if not args.env or getattr(args, "games", None) or getattr(args, "tasks", None) or getattr(args, "mashing", False):
        raise UserError("--table goes with --env ID, and --env without --games, --tasks and --mashing: leave out what is too much")
    table = {}
    for pattern, more in OTHERS.items():
        if fnmatch.fnmatchcase(args.env, pattern):
            table |= more
    if args.table:
        table |= extract.read_json(args.table, dict)
    wants = {"fps": (int, float), "seconds": (int, float), "frame": str, "controls": dict, "success": dict}
    bad = [k for k, kind in wants.items() if not isinstance(table.get(k), kind)]
    if "script" in table and table["script"] not in list(SCRIPTS):
        bad.append("script")
    if bad or table["fps"] <= 0 or not {"return", "info"} & table["success"].keys():
        raise UserError(f"--env {args.env}: expected a table with {', '.join(wants)}, found none or a wrong {', '.join(bad) or 'fps or success'}: "
                        f"give --table FILE.json; there are tables for {', '.join(OTHERS)}")
    buttons = sorted({w for w in re.findall(r"[A-Z_]+", json.dumps(table["controls"])) if w in extract.BUTTON} - set(MENU))
    own = {"fps": table["fps"], "late": table.get("late", Game.late), "table": table, "keys": buttons or ["SOUTH"], "idle": []}
    PLAYABLE[args.env] = Task(args.env, type(re.sub(r"\W+", "_", args.env), (Foreign,), own), "theirs", 0, table["seconds"], {}, False, "")
    return [args.env]


def rows_of_theirs(args, policy, films):
    """Success and return of random, scripted and the model in a game by others -> rows for show_rows; the returns are printed."""
    make = PLAYABLE[args.env].game
    players = {"random": Blind} | ({"scripted": Scripted} if "script" in make.table else {})
    ended = {who: [finish(make(args.env, PLAYED + args.seed + i), player, args.seed + i) for i in range(args.n)] for who, player in players.items()}
    if policy:
        play_model(policy, args.tasks, args.n, args.actions_per_chunk, args.seed, min(args.envs, 8), films, ended=ended.setdefault("model", []))
    row = {}
    for who, games in ended.items():
        scores = [g.score for g in games]
        mean, sd = float(np.mean(scores)), float(np.std(scores, ddof=min(args.n - 1, 1)))
        row[who] = share(sum(g.won for g in games), args.n) | {"mean": mean, "sd": sd, "returns": scores}
        print(f"{who}: return {mean:.2f}, standard deviation {sd:.2f}, from {min(scores):.1f} to {max(scores):.1f}, n {args.n}")
    print(f"success: {json.dumps(make.table['success'])}")
    for env in make.idle:
        env.close()
    return {args.env: row}


# The scripted players: from what they read in a game to (left stick, right stick, buttons); class Scripted makes a person of it.
def aims(game):
    """ViZDoom: turn (or walk sideways where there is no turning) to the monster that is near and near to the middle, and shoot when it is there. As
    people do, it reckons with being late: it looks at where the monster will be on the screen in four steps."""
    doom = game.inside.game
    middle, state = doom.get_screen_width() / 2, doom.get_state()
    foes = [(label.x + label.width / 2 - middle, label.width / 2) for label in (state.labels if state else ()) if label.object_category == "Monster"]
    off, half = min(foes, key=lambda f: abs(f[0]) - 4 * f[1], default=(middle, 0.0))                       # none in sight: turn on
    moved, game.off = off - getattr(game, "off", off), off
    soon = off + 4 * moved if abs(moved) < 60 else off                                                     # else it is another monster
    stick = complex(math.copysign(1, soon)) if abs(soon) > max(half / 2, 4) else 0j
    shoots = "RIGHT_TRIGGER" * (max(abs(off), abs(soon)) < 0.7 * half + 2)
    return (0j, stick, shoots) if any(b.name == "TURN_LEFT" for b in doom.get_available_buttons()) else (stick, 0j, shoots)


def rallies(game):
    """Pong, from the machine's memory: bring the paddle where the ball will be, near the middle while it goes away. It loses by a few points."""
    ram = game.inside.ale.getRAM()
    now = [int(ram[i]) for i in (49, 54, 51)]                              # the ball's x and y, the paddle's y
    vx, vy, vp = (v if abs(v) < 30 else 0 for v in np.subtract(now, getattr(game, "was", now)))
    game.was = now
    off = (now[1] + 4 * vy - 9 if vx > 0 else 120) - now[2] - 2 * vp       # the centres of ball and paddle are some 9 apart in these numbers
    return complex(0, np.sign(off)) if abs(off) > 6 and now[1] else 0j, 0j, ""


def walks(game):
    """MiniGrid: the shortest way of turns and steps to the goal, around walls and lava; doors are not opened."""
    at, grid = game.inside, game.inside.grid
    queue = deque([(*map(int, at.agent_pos), int(at.agent_dir))])
    first = {queue[0]: 0j}                                                 # state -> the push that begins the way to it
    while queue:
        x, y, d = here = queue.popleft()
        if grid.get(x, y) and grid.get(x, y).type == "goal":
            return first[here], 0j, ""
        dx, dy = ((1, 0), (0, 1), (-1, 0), (0, -1))[d]
        for there, push in (((x, y, (d - 1) % 4), -1 + 0j), ((x, y, (d + 1) % 4), 1 + 0j), ((x + dx, y + dy, d), -1j)):
            if there not in first and getattr(grid.get(*there[:2]), "type", "goal") in ("goal", "floor"):
                first[there] = first[here] or push
                queue.append(there)
    return 0j, 0j, ""


SCRIPTS = {"aims": aims, "rallies": rallies, "walks": walks}


# ------------------------------------------------------------------------------------------------------------------------- demo
DEMO = ("crypt/exit", "swarm/brute", "glider/rings")       # a task of each family that a small model begins to master within minutes


class Stages:
    """One line a stage: what is done, what came out, how long it took. What the scripts say goes to a log."""
    def __init__(self, out, n):
        self.log, self.i, self.n, self.began, self.figures = open(out / "stages.log", "w", encoding="utf-8"), 0, n, time.monotonic(), {}

    @contextlib.contextmanager
    def stage(self, what):
        self.i, since, said = self.i + 1, time.monotonic(), []
        start, end = ("\r", "") if sys.stdout.isatty() else ("", "\n")
        print(f"stage {self.i}/{self.n} | {what} ...", end=end, flush=True)
        with contextlib.redirect_stdout(self.log):
            yield said.append
        now = time.monotonic()
        print(f"{start}stage {self.i}/{self.n} | {what} | {' | '.join(said)} | {now - since:.0f} s of {now - self.began:.0f} s", flush=True)

    def scripts(self, *commands):
        """Run scripts of ours side by side, each with its share of the cores. A command: its words, and what it needs in the environment."""
        if not commands:
            return
        threads = str(max(extract.cores() // len(commands), 1))
        here = Path(__file__).parent
        self.log.flush()
        running = [subprocess.Popen([sys.executable, str(here / words[0]), *map(str, words[1:])], stdout=self.log, stderr=subprocess.PIPE, text=True,
                                    encoding="utf-8", errors="replace", env={**os.environ, "OMP_NUM_THREADS": threads, **env}) for words, env in commands]
        try:
            ends = [(p.communicate()[1], p.returncode) for p in running]
        except KeyboardInterrupt:
            for p in running:
                p.wait()
            raise
        for (words, _), (said, status) in zip(commands, ends):
            if status:
                raise UserError(f"{words[0]} ended with {status}: {said.strip().splitlines()[-1] if said.strip() else 'nothing said'} (see {self.log.name})")

    def shares(self, items, *words):
        """One script in several processes, each with its share of so many videos or clips."""
        n = min(extract.cores(), 4, items)
        self.scripts(*((words, {"RANK": str(r), "WORLD_SIZE": str(n)}) for r in range(n)))


def overlap(a, b):
    """Intersection over union of two boxes [x, y, w, h]."""
    w, h = (max(min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i]), 0) for i in (0, 1))
    return w * h / (a[2] * a[3] + b[2] * b[3] - w * h)


def demo(args):
    """The whole chain: play -> videos -> overlays found -> actions read -> a model trained -> it plays, beside random, scripted and a model of true labels."""
    extract.within(args, 1, None, "videos", "steps", "batch", "n")
    extract.within(args, args.videos / 30, None, "minutes")                # two seconds a video: shorter ones tell nothing apart
    extract.within(args, 0, 1, "lr")
    out, began = folder(args.out), time.monotonic()
    args.tasks, args.envs, args.actions_per_chunk = pick_tasks(args.tasks or DEMO), 64, 8
    asked = {name: getattr(args, name) for name in ("tasks", "minutes", "videos", "steps", "batch", "lr", "seed")}
    if (out / "arguments.json").is_file() and extract.read_json(out / "arguments.json", dict) != asked:
        raise UserError(f"{out}: expected the flags of the run that is there (arguments.json) to go on with it, found others: give a new --out")
    extract.write_json(out / "arguments.json", asked)
    videos, clips, stages = folder(out / "videos"), out / "clips", Stages(out, 6)
    games = list(dict.fromkeys(task.split("/")[0] for task in args.tasks))
    with stages.stage("play on video") as say:
        steps = round(args.minutes * 60 * FPS / args.videos)
        low_left = False, True                                         # one channel keeps its pad in one place
        jobs = [(videos, [t for t in args.tasks if t.startswith(g + "/")], i, args.seed, steps, low_left) for g in games for i in range(args.videos)]
        for line in in_processes(record_clip, jobs, extract.cores()):
            print(line)
        say(f"{len(jobs)} mp4 of {', '.join(games)}, {len(jobs) * steps / FPS / 60:.1f} minutes at 640 x 360")
    truth = {p.stem: extract.read_json(p, dict) for p in sorted(videos.glob("*.json"))}
    with stages.stage("find the overlays (extract.py)") as say:
        stages.shares(len(truth), "extract.py", videos, "--out", clips)
        found = {name: extract.read_clip(clips / name) for name in truth if (clips / name / "clip.json").is_file()}
        ious = [overlap(clip["box"], truth[name]["box"]) for name, clip in found.items()]
        if not found:
            raise UserError(f"no overlay was found in {videos}: see {out / 'stages.log'}")
        say(f"{len(found)} of {len(truth)} found | IoU mean {np.mean(ious):.3f}, least {min(ious):.3f}")
    for name in found:
        extract.write_npy(clips / name / "truth.npy", np.load(videos / f"{name}.truth.npy"))
    with stages.stage("read the actions (parse.py)") as say:
        stages.shares(len(found), "parse.py", "run", clips)
        read = lambda name: (np.load(clips / name / f"{file}.npy") for file in ("actions", "truth"))
        scores = parse.mean_of([parse.score(*read(name), clip["geometry"]) for name, clip in found.items()])
        say(f"stick R2 {scores.get('left R2', math.nan):.3f} left, {scores.get('right R2', math.nan):.3f} right | button F1 {scores['F1']:.3f}")
    runs = {"model": out / "model", "true labels": out / "model-truth"}
    with stages.stage("train two toy models (train.py)") as say:
        flags, todo = ["--preset", "toy", "--seed", args.seed, *quick(args)], []
        for name, run in runs.items():
            if not (run / "state.safetensors").is_file():
                todo.append((["train.py", clips, "--out", run, *flags, *(["--truth"] if name == "true labels" else [])], {}))
            elif M.read_meta(run)[0]["step"] < args.steps:
                todo.append((["train.py", "--resume", run], {}))
        if todo:
            stages.scripts(*todo)
        say(f"{args.steps} steps of {args.batch} frames each, from parsed and from true labels")
    films = {}
    with stages.stage("play the tasks") as say:
        args.workers = extract.cores()
        table = completion(args, ("random", "scripted"))
        for name, run in runs.items():
            wins = play_model(sample.Policy(run, "cpu"), args.tasks, args.n, args.actions_per_chunk, args.seed, args.envs, films if name == "model" else None)
            for task in args.tasks:
                table[task][name] = wins[task]
        rows = rows_of(table, args.n)
        say(", ".join(f"{who} {r['rate']:.0%}" for who, r in rows["all"].items()))
    with stages.stage("show it") as say:
        name = max(found, key=lambda name: overlap(found[name]["box"], truth[name]["box"]))
        extract.save_png(out / "demo.png", story(videos / f"{name}.mp4", clips / name, films, rows, scores, np.mean(ious)))
        save_film(out / "demo.mp4", [pair for frames in films.values() for pair in frames])
        say(f"{out / 'demo.png'}, {out / 'demo.mp4'}")
    show_rows(rows)
    better = [task for task in args.tasks if rows[task]["model"]["low"] > rows[task]["random"]["high"]]
    print(f"above random by an interval: {len(better)} of {len(args.tasks)} tasks | {time.monotonic() - began:.0f} s in all")
    extract.write_json(out / "demo.json", asked | {"n": args.n, "iou": ious, "parser": scores, "rows": rows, "seconds": round(time.monotonic() - began),
                                               "machine": machine()})


INKS = {"random": (160, 160, 170), "scripted": (90, 160, 90), "model": (220, 60, 40), "true labels": (60, 110, 220)}
MORE_INKS = ((220, 60, 40), (60, 110, 220), (90, 160, 90), (200, 150, 40), (140, 80, 180))


def write(page, text, x, y, size=0.62):
    """A line of text on a page, its baseline at (x, y)."""
    cv2.putText(page, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, size, (20, 20, 30), 1, cv2.LINE_AA)


def bars(page, rows, inks, left, top, wide, thick, gap=10):
    """A table of shares as bars of `thick` pixels: a group for each row of {name: {player: {"rate", and "low", "high" where known}}}, its name to the left of
    `left`, 1 at left + wide; a thin line is the interval. -> where it ends."""
    end = top + sum(thick * len(row) + gap for row in rows.values())
    for mark in (0, 0.25, 0.5, 0.75, 1):
        x = left + round(wide * mark)
        cv2.line(page, (x, top - 4), (x, end - gap), (215, 215, 220), 1)
        write(page, f"{mark:.0%}", x - 12, end + 6, 0.4)
    for name, row in rows.items():
        write(page, name, left - 8 - cv2.getTextSize(name, cv2.FONT_HERSHEY_SIMPLEX, 0.42, 1)[0][0], top + thick * len(row) // 2 + 4, 0.42)
        for who, r in row.items():
            place = lambda value: left + round(wide * min(max(value, 0), 1))
            cv2.rectangle(page, (left, top), (place(r["rate"]), top + thick - 2), inks[who], -1)
            if "low" in r:
                cv2.line(page, (place(r["low"]), top + thick // 2 - 1), (place(r["high"]), top + thick // 2 - 1), (20, 20, 30), 1)
            top += thick
        top += gap
    return end


def legend(page, inks, left, y, step=160):
    """Which colour is whose."""
    for j, (who, ink) in enumerate(inks.items()):
        cv2.rectangle(page, (left + step * j, y - 12), (left + 14 + step * j, y + 2), ink, -1)
        write(page, who, left + 20 + step * j, y, 0.5)


def chart(path, title, rows):
    """A table of shares, as bars() takes it, as a picture of its own."""
    players = list(dict.fromkeys(who for row in rows.values() for who in row))
    inks = {who: INKS[who] for who in players} if set(players) <= set(INKS) else dict(zip(players, MORE_INKS))
    page = np.full((110 + sum(9 * len(row) + 10 for row in rows.values()), 900, 3), 250, np.uint8)
    write(page, title, 20, 30)
    legend(page, inks, 20, 60)
    bars(page, rows, inks, 190, 86, 680, 9)
    extract.save_png(path, page)


def story(video, clip, films, rows, scores, iou):
    """One picture, uint8 (900, 1600, 3): the video with the box found, the crop and what was read from it, the model at play, completion."""
    page = np.full((900, 1600, 3), 250, np.uint8)
    meta, (actions, truth) = extract.read_clip(clip), (np.load(clip / f"{n}.npy") for n in ("actions", "truth"))
    skin = next((s for s in skins() if s.name == meta["template"]), skins()[0])
    change = np.convolve(np.abs(np.diff(truth, axis=0)).sum(1), np.ones(150), "valid")           # five seconds with much to read
    start = int(change.argmax()) if len(change) else 0
    now = min(start + 75, meta["n"] - 1)

    frame = next(rgb for i, rgb in extract.read_video(video) if i == now).copy()
    x, y, w, h = (round(v) for v in meta["box"])
    cv2.rectangle(frame, (x, y), (x + w, y + h), (0, 255, 0), 3)
    write(page, f"1  a video with a pad; extract.py finds it: IoU {iou:.2f}", 20, 36)
    page[50:410, 20:660] = frame[:360, :640]
    write(page, "2  the crop", 700, 36)
    extract.paste(page, extract.Frames(clip, "pads")[now], 700, 60, 300, 220)
    write(page, f"3  parse.py reads it: R2 {scores.get('left R2', math.nan):.2f}, F1 {scores['F1']:.2f}", 1020, 36)
    high = round(300 * skin.size[1] / skin.size[0])
    put_pad(page[60:60 + high, 1020:1320], skin, actions[now])
    write(page, "grey: true", 1370, 200, 0.5)
    write(page, "red: read", 1370, 225, 0.5)
    pressed = [b for b in np.argsort(-truth[start:start + 150, :21].sum(0))[:3] if truth[start:start + 150, b].any()]
    traces = {"left x": 21, "left y": 22, "right x": 23, "right y": 24} | {extract.BUTTONS[b].lower(): b for b in pressed}
    for k, (label, column) in enumerate(traces.items()):
        base = 310 + 28 * k
        write(page, label, 700, base + 6, 0.42)
        for values, ink, thick in ((truth, (190, 190, 200), 5), (actions, INKS["model"], 2)):
            v = values[start:start + 150, column]
            points = np.stack([840 + np.arange(len(v)) * 5, base - 11 * v if column > 20 else base + 8 - 16 * v], 1)
            cv2.polylines(page, [np.int32(points)], False, ink, thick, cv2.LINE_AA)

    write(page, "4  train.py learns from what was read; the model plays", 20, 540)
    for k, (task, frames) in enumerate(list(films.items())[:3]):
        jpeg, action = frames[len(frames) // 2]
        page[560:816, 20 + 270 * k:276 + 270 * k] = unpack(jpeg)
        put_pad(page[736:816, 166 + 270 * k:276 + 270 * k], skins()[0], action)
        write(page, task, 20 + 270 * k, 840, 0.5)
    write(page, "5  tasks completed, with 95 % intervals", 880, 540)
    bars(page, {name: rows[name] for name in [row for row in rows if "/" in row] + ["all"]}, INKS, 990, 570, 580, 13, 16)
    legend(page, INKS, 910, 874)
    return page


# ---------------------------------------------------------------------------------------------------------------------- transfer
def quick(args, steps=None):
    """The flags of train.py that a toy model learns the games with in minutes."""
    steps = steps or args.steps
    return ["--hz", FPS, "--steps", steps, "--batch", args.batch, "--lr", args.lr, "--workers", 1, "--val", 0, "--every", steps, "--no-augment",
            "--dropout", 0, "--ema", 0.999]


def transfer(args):
    """Does pre-training pay [P Fig. 7]? For each held-out game: pre-train on the nine others, post-train on so many minutes of it, against a fresh
    model with the same minutes and steps. Intervals are from resampling whole (game, seed) pairs."""
    games = list(dict.fromkeys(task.split("/")[0] for task in pick_tasks(args.games)))
    extract.within(args, 1, None, "n", "euler", "pretrain", "steps", "batch", "workers")
    extract.within(args, 1 / 30, None, "others")
    extract.within(args, 0, 1, "lr")
    if len(games) == len(GAMES) or min(args.minutes) < 1 / 30:
        raise UserError("expected some games to hold out, not all ten, and --minutes of 0.034 or more, two seconds: give others")
    out, results = folder(args.out), []
    stages = Stages(out, 2 + len(games) * (1 + len(args.minutes) * len(args.seeds)))
    few = [(game, m, seed) for game in games for m in args.minutes for seed in args.seeds]
    with stages.stage("record") as say:
        jobs = [job for game in GAMES for job in clips_of(folder(out / "data" / game), game, args.others, 0)]
        jobs += [job for game, m, seed in few for job in clips_of(folder(out / f"few/{game}-{m:g}-{seed}"), game, m, 1000 + seed)]
        for line in in_processes(record_clip, jobs, args.workers):
            print(line)
        say(f"{args.others:g} minutes of each of {len(GAMES)} games, {' '.join(f'{m:g}' for m in args.minutes)} minutes of {' '.join(games)} for each seed")

    def missing(name, steps, data, *flags):
        """The command that trains this run, in a list; none where it is whole."""
        if (out / name / "model.safetensors").is_file() and M.read_meta(out / name)[0]["step"] >= steps:
            return []
        return [(["train.py", *data, "--out", out / name, *quick(args, steps), *flags], {})]

    def completed(name, game, seed):
        """Completion of each task of a game by a run's model."""
        wins = play_model(sample.Policy(out / name, "cpu", steps=args.euler), pick_tasks([game]), args.n, 8, seed)
        return {task: won / args.n for task, won in wins.items()}
    for game in games:
        with stages.stage(f"{game}: pre-train on the others") as say:
            others = [out / "data" / g for g in GAMES if g != game]
            stages.scripts(*missing(f"pre-{game}", args.pretrain, others, "--preset", args.preset, "--balance"))
            say(f"{args.pretrain} steps; without any of its own data {np.mean(list(completed(f'pre-{game}', game, 0).values())):.0%}")
        for _, m, seed in [job for job in few if job[0] == game]:
            with stages.stage(f"{game}: {m:g} minutes, seed {seed}") as say:
                starts = {"post-trained": ("--ckpt", out / f"pre-{game}"), "scratch": ("--preset", args.preset)}
                names = {who: f"{who.removesuffix('-trained')}-{game}-{m:g}-{seed}" for who in starts}
                data = [out / f"few/{game}-{m:g}-{seed}"]
                stages.scripts(*(c for who, start in starts.items() for c in missing(names[who], args.steps, data, "--seed", seed, *start)))
                rates = {who: completed(name, game, seed) for who, name in names.items()}
                results.append({"game": game, "minutes": m, "seed": seed, "tasks": rates})
                say(", ".join(f"{who} {np.mean(list(by_task.values())):.0%}" for who, by_task in rates.items()))
    gains = {}
    for m in args.minutes:
        for kind in ("all", *dict.fromkeys(t.kind for t in TASKS.values())):
            rates = [[[rate for task, rate in r["tasks"][who].items() if kind in ("all", TASKS[task].kind)] for who in ("post-trained", "scratch")]
                     for r in results if r["minutes"] == m]
            pairs = [[np.mean(post), np.mean(scratch)] for post, scratch in rates if post]
            if pairs:
                gains[f"{m:g} min, {kind}"] = gain(np.array(pairs))
    with stages.stage("sum up") as say:
        said = {k: str(v) for k, v in vars(args).items() if k != "run"}
        extract.write_json(out / "transfer.json", {"args": said, "machine": machine(), "results": results, "gains": gains})
        chart(out / "transfer.png", f"completion of held-out games, {len(games) * len(args.seeds)} pairs", {name: row["bars"] for name, row in gains.items()})
        say(f"{out / 'transfer.json'}, transfer.png")
    print(f"{'':26}{'post-trained':>14}{'scratch':>10}   difference in points and relative gain [95 % of resampled games and seeds]")
    for name, row in gains.items():
        relative = f"{row['gain']:+.0%} [{row['gain low']:+.0%}, {row['gain high']:+.0%}]" if row["gain"] is not None else "none: scratch completes nothing"
        print(f"{name:26}{row['bars']['post-trained']['rate']:>14.1%}{row['bars']['scratch']['rate']:>10.1%}   {100 * row['points']:+.1f} "
              f"[{100 * row['points low']:+.1f}, {100 * row['points high']:+.1f}]   {relative} n {row['n']}")


def clips_of(out, game, minutes, seed):
    """Jobs for record_clip: so many minutes of all tasks of a game, in clips of half a minute at most."""
    return [(out, pick_tasks([game]), i, seed, round(min(minutes, 0.5) * 60 * FPS), False) for i in range(max(round(minutes * 2), 1))]


def gain(pairs, rounds=4000):
    """Completion (post-trained, scratch) of each game and seed, float (n, 2) -> their means ("bars"), the difference ("points") and the relative gain, each
    with its bootstrap interval; the gain is None where scratch completes nothing, and its interval is of the draws in which it completes something."""
    drawn = pairs[np.random.default_rng(0).integers(len(pairs), size=(rounds, len(pairs)))].mean(1)        # (rounds, 2)
    some, ends = drawn[drawn[:, 1] > 0], (0.025, 0.975)
    row = {"n": len(pairs), "bars": {}}
    for i, who in enumerate(("post-trained", "scratch")):
        low, high = np.quantile(drawn[:, i], ends)
        row["bars"][who] = {"rate": float(pairs[:, i].mean()), "low": float(low), "high": float(high)}
    post, scratch = pairs.mean(0)
    row |= {"points": float(post - scratch), "gain": float(post / scratch - 1) if scratch else None}
    for name, values in (("points", drawn[:, 0] - drawn[:, 1]), ("gain", some[:, 0] / some[:, 1] - 1)):
        if len(values):
            row[f"{name} low"], row[f"{name} high"] = map(float, np.quantile(values, ends))
    return row


# ----------------------------------------------------------------------------------------------------------------------- latency
def latency(args):
    """Seconds for one chunk, by part, against the same model sampled as the release does; both in turn, so that a busy machine slows both."""
    extract.within(args, 1, None, "repeats", "threads")
    if min(args.steps) < 1:
        raise UserError(f"--steps {' '.join(map(str, args.steps))}: expected at least 1: give other numbers")
    if args.threads:
        torch.set_num_threads(args.threads)
    device, reason = M.pick_device(args.device)
    model = (M.load(args.ckpt, device, unused=False)[0] if args.ckpt else fresh(args.preset, device)).eval()
    c, g = model.config, torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (1, c.frames, c.image, c.image, 3), dtype=torch.uint8, generator=g).to(device)
    noise = torch.randn(1, c.horizon, c.action_dim, generator=g).to(device)
    print(f"{args.ckpt or args.preset}: {M.count(model)[0]:,} parameters, float32, batch 1, {device} ({reason}), torch {torch.__version__}, "
          f"best of {args.repeats}; wall seconds (CPU seconds)")
    for k in args.steps:
        runs = []
        for _ in range(args.repeats):
            watch = Stopwatch(device)
            ours = our_way(model, frames, noise, k, watch)
            theirs = released_way(model, frames, noise, k, watch)
            same_kernel = released_way(model, frames, noise, k, watch, "mixing and K/V each step, our products", few_rows=M.FEW_ROWS)
            runs.append(watch.laps)
        best = {name: min(r[name] for r in runs) for name in runs[0]}
        cpu = {name: min(r[name][1] for r in runs) for name in runs[0]}
        for name, (wall, _) in best.items():
            print(f"{k:3} steps | {name:40} {wall:8.3f} s ({cpu[name]:.3f})")
        released = best["the released way"]
        print(f"{k:3} steps | {released[0] / best['ours'][0]:.2f} x faster than the released way in wall time, "
              f"{cpu['the released way'] / cpu['ours']:.2f} x in CPU time; "
              f"largest difference {max((ours - theirs).abs().max(), (ours - same_kernel).abs().max()):.1e}")
    peak = peak_memory()
    if peak:
        print(f"peak memory of the process {peak / 2**30:.2f} GiB ({peak / 1e9:.2f} GB)")
    if device.type == "cuda":
        with tempfile.TemporaryDirectory() as tmp:
            M.save(Path(tmp) / "model.safetensors", model.state_dict(), c)
            del model
            as_played(tmp, device, args.steps, args.repeats)


def as_played(ckpt, device, steps, repeats):
    """Milliseconds from a picture to its chunk as play.py and the server compute it on a GPU, by number format and by how the steps are launched, the
    median of 10 x repeats; and the memory that the policy holds there."""
    frame = np.random.default_rng(0).integers(0, 256, (720, 1280, 3), np.uint8)
    policy = session = None
    for k in steps:
        for how, dtype in itertools.product(("launch by launch", "CUDA graph", "compiled, graph"), ("float32", "bfloat16")):
            del policy, session                                                                # before the next is loaded beside it
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            policy = sample.Policy(ckpt, device, dtype, k, compile=how.startswith("compiled"))
            policy.use_graph = how.endswith("graph")
            session, took = sample.Session(policy), []
            for _ in range(10 * repeats + 3):
                began = time.perf_counter()
                session.predict(frame)
                took.append(time.perf_counter() - began)
            print(f"{k:3} steps | {dtype:9} {how:17} {1e3 * np.median(took[3:]):8.2f} ms a chunk | first {took[0]:.1f} s | "
                  f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB on the GPU", flush=True)


def our_way(model, frames, noise, k, watch):
    """One chunk as sample.py computes it, timed by part."""
    with torch.inference_mode():
        total = watch.start()
        lap = watch.start()
        seen = model.see(frames)
        lap = watch.lap("  vision", lap)
        x = model.assemble(seen)
        for block in model.mixing:
            x = block(x)
        lap = watch.lap("  mixing", lap)
        context = M.Context(x, [block.attn.kv(x) if model.crosses(i) else None for i, block in enumerate(model.dit)])
        lap = watch.lap("  keys and values", lap)
        times = model.times(sample.buckets(k, model.config.buckets).to(noise.device))
        lap = watch.lap("  time codes and AdaLN of all steps", lap)
        out = sample.euler(model, context, noise, k, times=times)
        watch.lap("  steps", lap)
        watch.lap("ours", total)
        return out


def released_way(model, frames, noise, k, watch, name="the released way", few_rows=0):
    """One chunk as the released sampler computes it: mixing, keys and values, time codes and AdaLN anew at each step, torch's default matrix
    product. Kinder than the release, which also runs the unused pooling head."""
    ours, M.FEW_ROWS = M.FEW_ROWS, few_rows
    try:
        with torch.inference_mode():
            total, x, seen = watch.start(), noise, model.see(frames)
            for t in sample.buckets(k, model.config.buckets).to(noise.device):
                x = x + model.velocity(x, t[None], model.mix(model.assemble(seen))) / k
            watch.lap(name, total)
            return x
    finally:
        M.FEW_ROWS = ours


class Stopwatch:
    """Wall and CPU seconds by name; waits for a GPU to finish first."""
    def __init__(self, device):
        self.wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self.laps = {}

    def start(self):
        self.wait()
        return time.perf_counter(), time.process_time()

    def lap(self, name, since):
        now = self.start()
        self.laps[name] = now[0] - since[0], now[1] - since[1]
        return now


def fresh(preset, device):
    """A preset with random weights everywhere, also where training starts from zeros: a velocity of 0 would compare well with anything."""
    model = M.create(M.preset(preset), device=device)
    with torch.no_grad():
        for p in [model.proj_out_1.weight, model.action_decoder.layer2.W, *(block.ada.weight for block in model.dit)]:
            p.normal_(0, 0.02)
    return model


def peak_memory():
    """The most this process has held, in bytes; None where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ------------------------------------------------------------------------------------------------------------------- throughput
def throughput(args):
    """Speeds of the games, training, extract and parse; ratios, each pair of figures taken in turn in this run. Prints a table; --out keeps it as JSON."""
    extract.within(args, 1, None, "seconds", "repeats")
    out = args.out and folder(args.out)
    result = {"machine": f"{platform.machine()}, {torch.get_num_threads()} threads", "torch": torch.__version__, "opencv": cv2.__version__}
    with tempfile.TemporaryDirectory() as tmp:
        video = Path(args.video) if args.video else drawn_video(Path(tmp) / "drawn.mp4", args.seconds)
        result |= game_speeds()
        for i, game in enumerate(GAMES):
            record_clip(Path(tmp) / "clips", pick_tasks([game]), i, 0, 150, False)
        result |= train_speed(Path(tmp) / "clips", args.repeats)
        result |= cutting_against_decoding(video, Path(tmp), args.repeats) | localisation(video)
    result |= parser_speed()
    for name, value in result.items():
        print(f"{name:36} {value}")
    if out:
        extract.write_json(out / "throughput.json", result)


def best_of(repeats, *works):
    """Seconds of each of some functions, the best of so many; in turn, so that a busy machine slows all alike."""
    best = [math.inf] * len(works)
    for _ in range(repeats):
        for i, work in enumerate(works):
            began = time.perf_counter()
            work()
            best[i] = min(best[i], time.perf_counter() - began)
    return best


def game_speeds(steps=300, repeats=3):
    """Microseconds of a step with its frame, of each game: the mean over its tasks under a random player, best of the repeats."""
    result = {}
    for name, kind in GAMES.items():
        took = []
        for task in pick_tasks([name]):
            best = math.inf
            for _ in range(repeats):
                game = kind(task, 0)
                player = Blind(game)
                actions = [player.act() for _ in range(steps)]
                began = time.perf_counter()
                for i, action in enumerate(actions):
                    if game.over:
                        game = kind(task, i)
                    game.step(action)
                best = min(best, time.perf_counter() - began)
            took.append(best / steps)
        result[f"step_us_{name}"] = round(1e6 * sum(took) / len(took))
    return result


def drawn_video(path, seconds, size=(1280, 720), fps=30):
    """A 720p video of a scrolling backdrop with one of our pads played on it."""
    rng = np.random.default_rng(0)
    back, skin = extract.backdrop(rng, size[1], 2 * size[0]), skins()[1]
    high = round(280 * skin.size[1] / skin.size[0])
    with extract.VideoWriter(path, fps, size) as video:
        for t, action in enumerate(parse.play(rng, seconds * fps)):
            frame = np.roll(back, -5 * t, 1)[:, :size[0]].copy()
            put_pad(frame[20:20 + high, 30:310], skin, action, 0.9)
            video.add(frame)
    return path


def cutting_against_decoding(video, tmp, repeats):
    """The whole pass (policy frames, crops, JPEG, files) over a bare sequential decode of the same file, in turn, best of each."""
    info, skin = extract.video_info(video), skins()[1]
    scale = 0.2 * info["size"][0] / skin.size[0]
    affine = np.float64([[scale, 0, 30], [0, scale, 20]])

    def decode():
        capture = extract.open_video(video)
        while capture.read()[0]:
            pass

    def cut(every):
        extract.Cutter(info["size"], every, skin, affine, extract.pose_box(affine, skin.size)).run(video, tmp)
    bare, whole, half = best_of(repeats, decode, lambda: cut(1), lambda: cut(2))
    return {"pass_over_decode": round(whole / bare, 2), "pass_over_decode_every_2": round(half / bare, 2), "pass_frames_per_s": round(info["n"] / whole, 1)}


def localisation(video):
    """Seconds and CPU seconds to look for an overlay among all of our templates, features of the templates already known."""
    matcher = extract.Matcher(skins(), ("sift", "xfeat"), extract.load_xfeat())
    wall, cpu = time.perf_counter(), time.process_time()
    find, _ = extract.localise(extract.sample_frames(video)[0], matcher)
    return {"localise_s": round(time.perf_counter() - wall, 2), "localise_cpu_s": round(time.process_time() - cpu, 2), "localise_templates": len(matcher.skins),
            "localise_found": find is not None}


def train_speed(data, repeats=3, steps=8, batch=32, draws=4):
    """A whole step of train.py (loader, augmentation, EMA, log) over the bare forward, backward and AdamW of the same batch: `toy`, on the CPU, both
    in turn, the median step of the fastest turn of each; and how many times faster one thread makes batches of JPEGs than the bare step uses them."""
    config, whole, bare = M.preset("toy"), [], []
    sampler = train.Sampler(train.load_clips([data], config), config, batch, draws)
    ready = sampler.load(1)
    model = M.create(config).train()
    optimizer = torch.optim.AdamW(train.groups(model), fused=True)
    for _ in range(repeats):
        laps = []
        for _ in range(steps):
            began = time.perf_counter()
            train.cfm_loss(model, ready.frames, ready.actions, ready.mask, ready.games, ready.keep, ready.noise, ready.t).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            laps.append(time.perf_counter() - began)
        bare.append(np.median(laps[1:]))
        with tempfile.TemporaryDirectory() as tmp, contextlib.redirect_stdout(io.StringIO()):
            flags = f"--steps {steps} --batch {batch} --draws {draws} --val 0 --every {10 * steps} --device cpu".split()
            if train.main([str(data), "--out", f"{tmp}/run", "--preset", "toy", *flags]):
                raise UserError("train.py failed in its own measurement: see the line above")
            with open(f"{tmp}/run/log.csv", newline="") as f:
                whole.append(np.median(np.diff([float(row["seconds"]) for row in csv.DictReader(f)])))

    def load():
        for _ in train.feed(sampler, [(step, 0, batch) for step in range(steps)], 1):
            pass
    loader = best_of(repeats, load)[0] / steps
    return {"train_step_s": round(min(whole), 4), "train_bare_step_s": round(min(bare), 4), "train_step_over_bare": round(min(whole) / min(bare), 3),
            "train_frames_per_s": round(batch / min(whole), 1), "loader_frames_per_s": round(batch / loader, 1),
            "loader_over_toy_step": round(min(bare) / loader, 2)}


def parser_clip(folder, frames, fps, skin):
    """A clip folder of a drawn skin over a scrolling backdrop, 320 px crops in JPEG as extract.py leaves them."""
    rng = np.random.default_rng(0)
    back, pad = extract.backdrop(rng, 300, 320 + 2 * frames), (320, round(320 * skin.size[1] / skin.size[0]))
    folder.mkdir(parents=True)
    writer = extract.FramesWriter(folder, "pads")
    for t, action in enumerate(parse.play(rng, frames)):
        crop = back[:pad[1], 2 * t:2 * t + 320].copy()
        put_pad(crop, skin, action, 0.8)
        writer.add(t, crop)
    writer.close(frames)
    scale = 320 / skin.size[0]
    clip = dict(fps=fps, n=frames, box=[0, 0, *pad], template=skin.name, controller=skin.family, pad=pad, affine=[[scale, 0, 0], [0, scale, 0]],
                geometry=dict(size=skin.size, buttons=skin.buttons, sticks=skin.sticks))
    (folder / "clip.json").write_text(json.dumps(clip, default=float), encoding="utf-8")


def parser_speed(frames=1800, fps=30):
    """`parse.py run` on one clip: crops from disk (JPEG) to actions.npy."""
    model = parse.load_parser(parse.CKPT)
    with tempfile.TemporaryDirectory() as tmp:
        parser_clip(Path(tmp) / "clip", frames, fps, skins()[0])
        began = time.perf_counter()
        parse.run_clip(model, Path(tmp) / "clip")
        took = time.perf_counter() - began
    return {"parser_frames_per_s": round(frames / took, 1), "parser_x_real_time_at_30_fps": round(frames / fps / took, 2)}


# ----------------------------------------------------------------------------------------------------------------- command line
def main(argv=None):
    """Parse the command line and measure."""
    parser = extract.Parser(prog="bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    sub = parser.add_subparsers(required=True, metavar="COMMAND")
    cv2.setNumThreads(1)

    def command(name, run, text):
        p = sub.add_parser(name, help=text, allow_abbrev=False)
        p.set_defaults(run=run)
        return p
    p = command("record", record, "scripted play -> clip folders, or videos with an overlay")
    p.add_argument("--out", required=True, help="folder of clips or videos; what is whole there stays")
    p.add_argument("--games", nargs="+", metavar="G", help=f"of {', '.join(GAMES)}, or tasks of theirs (default all)")
    p.add_argument("--env", metavar="ID", help="a game by others instead: its Gymnasium id, of those with a scripted player")
    p.add_argument("--table", metavar="FILE.json", help="how the pad plays --env, as an entry of OTHERS in this script (default: that)")
    p.add_argument("--minutes", type=float, default=5, help="game time of each game (default 5)")
    p.add_argument("--clip", type=float, default=30, help="seconds of a clip (default 30)")
    p.add_argument("--seed", type=int, default=0, help="of players and levels: another seed gives held-out data (default 0)")
    p.add_argument("--ckpt", help="a model that plays by turns with the script, which shows the way out of what it got into; only that is kept")
    p.add_argument("--euler", type=int, metavar="K", help="its Euler steps (default: the checkpoint's)")
    p.add_argument("--video", action="store_true", help="mp4 with a pad drawn over it, NAME.truth.npy and NAME.json beside it")
    p.add_argument("--workers", type=int, default=extract.cores(), help="processes (default: one a core)")
    p = command("suite", suite, "completion of tasks beside random and scripted players")
    p.add_argument("--ckpt", help="a .safetensors or a run folder (default: only the players that need none)")
    p.add_argument("--tasks", nargs="+", metavar="T", help="names of tasks or games (default all)")
    p.add_argument("--env", metavar="ID", help="a game by others instead: its Gymnasium id")
    p.add_argument("--table", metavar="FILE.json", help="how the pad plays --env, as an entry of OTHERS in this script (default: that)")
    p.add_argument("-n", type=int, default=50, help="rollouts of each task (default 50)")
    p.add_argument("--actions-per-chunk", type=int, default=8, metavar="K", help="steps of a chunk to play before looking again (default 8)")
    p.add_argument("--mashing", action="store_true", help=f"also the best of {len(MASHING)} constant and mashing players")
    p.add_argument("--out", help="folder for suite.json, suite.png and videos (default: print only)")
    p.add_argument("--video", action="store_true", help="a video of the model's first rollout of each task")
    p.add_argument("--euler", type=int, metavar="K", help="Euler steps (default: the checkpoint's)")
    p.add_argument("--envs", type=int, default=64, help="games played side by side (default 64; of --env at most 8)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default auto)")
    p.add_argument("--seed", type=int, default=0, help="of levels and noise (default 0)")
    p.add_argument("--workers", type=int, default=extract.cores(), help="processes of the players that are no model (default: one a core)")
    p = command("demo", demo, "the whole chain on embedded games")
    p.add_argument("--out", required=True, help="folder for videos, clips, runs, demo.png, demo.mp4, demo.json; what is whole there stays")
    p.add_argument("--tasks", nargs="+", metavar="T", help=f"tasks or games (default {' '.join(DEMO)})")
    p.add_argument("--minutes", type=float, default=2, help="video of each game (default 2)")
    p.add_argument("--videos", type=int, default=4, help="files these minutes are cut into, each with another pad (default 4: what is read wrong of one "
                   "pad is not what is read wrong of the next)")
    p.add_argument("--steps", type=int, default=1200, help="training steps (default 1200: what is seen begins to matter after about 500)")
    p.add_argument("--batch", type=int, default=32, help="frames a step (default 32)")
    p.add_argument("--lr", type=float, default=1e-3, help="learning rate (default 1e-3; 2e-3 learns much less, 4e-3 next to nothing)")
    p.add_argument("-n", type=int, default=100, help="rollouts of each task (default 100)")
    p.add_argument("--seed", type=int, default=0, help="of everything (default 0)")
    p = command("transfer", transfer, "pre-training on the other games against training from scratch [P Fig. 7]")
    p.add_argument("--out", required=True, help="folder for recordings, runs, transfer.json and transfer.png; what is whole there stays")
    p.add_argument("--games", nargs="+", metavar="G", default=["crypt", "swarm", "glider"],
                   help="games to hold out, one after the other (default crypt swarm glider)")
    p.add_argument("--minutes", type=float, nargs="+", default=[1], help="data of the held-out game, one size or several (default 1)")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of data and noise (default 0 1 2)")
    p.add_argument("--others", type=float, default=5, help="minutes of each other game to pre-train on (default 5)")
    p.add_argument("--pretrain", type=int, default=1500, help="steps of pre-training (default 1500)")
    p.add_argument("--steps", type=int, default=480, help="steps of post-training and of training from scratch (default 480)")
    p.add_argument("--preset", choices=M.PRESETS, default="toy", help="size of the models (default toy)")
    p.add_argument("--batch", type=int, default=32, help="frames a step (default 32)")
    p.add_argument("--lr", type=float, default=1e-3, help="learning rate (default 1e-3)")
    p.add_argument("-n", type=int, default=20, help="rollouts of each task (default 20)")
    p.add_argument("--euler", type=int, default=4, metavar="K", help="Euler steps when they play (default 4)")
    p.add_argument("--workers", type=int, default=extract.cores(), help="processes that record (default: one a core)")
    p = command("games", show_games, "a picture of the ten games")
    p.add_argument("--out", required=True, help="folder for games.png")
    p.add_argument("--seed", type=int, default=0, help="of the levels (default 0)")
    p = command("latency", latency, "seconds for one chunk, by part, against the released way of sampling")
    p.add_argument("--preset", default="nitrogen", help="the model, with random weights (default nitrogen, the released 493 M)")
    p.add_argument("--ckpt", help="a checkpoint in place of random weights")
    p.add_argument("--steps", type=int, nargs="+", default=[16, 4], metavar="K", help="numbers of Euler steps (default 16 4)")
    p.add_argument("--repeats", type=int, default=3, help="the best of this many (default 3)")
    p.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default auto)")
    p = command("throughput", throughput, "a step of each game, training, cutting clips against bare decoding, localisation, the parser, its net")
    p.add_argument("--video", help="a video of your own (default: one is drawn)")
    p.add_argument("--seconds", type=int, default=20, help="length of the drawn video (default 20)")
    p.add_argument("--repeats", type=int, default=3, help="the best of this many (default 3)")
    p.add_argument("--out", help="folder for throughput.json (default: print only)")
    return extract.cli(parser, argv, M.ModelError)


if __name__ == "__main__":
    sys.exit(main())
