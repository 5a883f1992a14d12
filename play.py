"""play.py: any game as an environment, real-time play, and a recorder (NitroGen, arXiv 2601.02427, §3.2).

    python play.py --exe game.exe --ckpt RUN                        a checkpoint of train.py plays, from F8 on
    python play.py --exe game.exe --server 192.168.1.20:5555        the model on another machine (sample.py
                                                                    serve); no torch here
    python play.py --exe game.exe --human --record DATA             record your own play
    python play.py --exe game.exe --try-map FILE.json             press and name each control of a mapping
    python play.py --list                                           the windows that can be played

In: the picture of a game's window, found by its process. Out: a virtual gamepad, or keys and mouse.
With --record: a clip folder for train.py (extract.py, "the clip folder") with frames, actions, confidence,
keep, truth, and human.npy, bool (n,): the rows in which a person played, to weight corrections (DAgger). With
--video OUT.mp4: what the model saw and pressed.

    from play import Client, GameEnv
    env = GameEnv("game.exe", pad="keyboard")       # or gymnasium.make("Game-v0", exe="game.exe", ...)
    policy = Client("192.168.1.20", 5555)           # sample.Session's methods: predict, reset, info
    obs, info = env.reset()                         # uint8 (256, 256, 3)
    obs, reward, terminated, truncated, info = env.step(policy.predict(obs)[0])
    env.close()

The method: the loop that plays in real time, the environment, actions as keys. The machinery: the two
desktops (X11, Windows), pads, people, pausing, the guard, recorder, picture, client, the command line.
"""
import ctypes
import glob
import json
import math
import os
import re
import shlex
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from contextlib import ExitStack, contextmanager, suppress
from ctypes import byref, c_int, c_ulong, c_void_p, create_string_buffer, wintypes
from dataclasses import dataclass
from multiprocessing import connection as mpc, get_context
from multiprocessing.pool import ThreadPool
from ntpath import basename, splitext             # of Windows: / and \ part names
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

import extract
from extract import (A, BUTTON, BUTTONS, LEGACY, MESSAGE_LIMIT, PLAY_STEPS, SIDE, STICKS, UserError, neutral,
                     number, pack_message, reading, shrink, unpack_message)

try:
    import gymnasium
except ImportError:
    gymnasium = None

WINDOWS = sys.platform == "win32"
# A child outlives our Ctrl-C (it has a group of its own) and the end of our terminal (it needs none).
APART = {"creationflags": 0x08000200} if WINDOWS else {"start_new_session": True}
MENU_BUTTONS = ("BACK", "START", "GUIDE")          # never pressed without --allow-menu: they end a game
STANDS = 5.0                       # seconds a game may stand for a prediction, beside 3 x the first's
MARKED = 0.1                       # seconds after a touch that still count as a person's play

# The names of buttons and keys in each API; "mapping" is what --pad keyboard presses. KEYS: X keysym,
# Windows virtual key, whether its scan code has a prefix. MOUSE: X button, virtual key, MOUSEEVENTF of
# pressing it.
TABLES = extract.read_json(Path(__file__).with_name("weights") / "keys.json", dict)
KEYS, MOUSE = TABLES["keys"], TABLES["mouse"]
LOWEST = np.float32([0] * len(BUTTONS) + [-1] * 4)        # of an action; its highest is 1
TILT, REST = 0.5, 0.35                       # a stick presses its key over TILT and holds it down to REST
SIDES = {"left": (0, -1), "right": (0, 1), "up": (1, -1), "down": (1, 1)}      # axis and sign; y is down


# ---------------------------------------------------------------------- playing in real time
def play(env, policy=None, seconds=math.inf, per_chunk=None, people=(), handback=1.0, hotkey=None,
         recorder=None, view=None):
    """Play until the game ends, `seconds` have passed or Ctrl-C -> Score. Without a policy a person plays,
    with inputs that the game gets by itself, and nothing is pressed.

    In real time the next chunk is computed from the newest frame while this one plays: it is asked for
    after `per_chunk` actions (default: half a chunk), or later where the answer before it is late. With a
    pausing environment the game stands while the model thinks, and `per_chunk` actions (default: all) are
    played of each chunk.

    A touched pad of `people` takes over at once, until none was touched for `handback` seconds. With a
    `hotkey` the model plays from its first press to the next, and so on: meanwhile people play."""
    thinker = Thinker(policy, env, per_chunk) if policy else None
    switch = Switch(env.desktop, hotkey)
    beat = Beat(env.hz)
    score = Score(beat)
    touched = -math.inf
    try:
        while time.perf_counter() - score.began < seconds:
            tick, now = beat.wait(), time.monotonic()

            # 1. Plan: what the model wants at this tick.
            plays = thinker and switch.is_on()
            captured = thinker.think(tick, score) if plays else None
            action = playable(thinker.plan.at(tick), env.allow_menu) if plays else neutral()

            # 2. Press: the model's action or, where a person takes over, theirs, if it needs passing on.
            person, theirs = hands_on(people)
            if person:
                touched = now
            by_hand = not plays or now - touched < handback
            pressed = action
            if by_hand:
                action, pressed = theirs, theirs if thinker and person and person.forward else neutral()
            env.pad.press(pressed)
            if captured:
                score.press_ms.append((time.perf_counter() - captured) * 1e3)

            # 3. Look, where the picture is used: for the next prediction, the recording, --show and --video.
            draws = view and tick % view.every == 0
            if plays and thinker.is_due(tick):
                thinker.ask(tick)
            elif recorder or draws:
                env.look()
            score.ticks += 1
            score.human += by_hand
            if recorder:
                human = not thinker or now - touched < MARKED
                recorder.add(tick, env.frame, neutral() if env.pad.away else action, human)
            if draws:
                view.show(tick, env, action, "a person" if by_hand else "the model", score)
            score.tell(env)
    except GameGone as e:
        print(f"\n{e}; the pad is at rest", file=sys.stderr)
    finally:
        with suppress(UserError, OSError):
            env.pad.press(neutral())
            env.pause.go()                                 # now, not when the recording has been written
        if thinker:
            thinker.thread.terminate()
        score.bar.close()
        print(score.line(env))
    return score


class Switch:
    """Whether the model plays: `key` turns it on and off, whichever window has the keyboard; without a key it
    is on."""

    def __init__(self, desktop, key):
        self.desktop, self.key, self.on, self.down = desktop, key, not key, False
        if key:
            desktop.prepare_keys([key])
            print(f"press {key} to let the model play, and again to stop it", flush=True)

    def is_on(self):
        """Does the model play now? To be asked once a tick."""
        before, self.down = self.down, self.key in self.desktop.held()
        self.on ^= self.down and not before
        return self.on


class Thinker:
    """The policy in a thread of its own, so that a late prediction never stalls the pad, and the plan that
    its chunks make. `answer`: the prediction that is under way, one at a time; `asked`: its tick; `seen`: the
    time of its frame. `stops`: whether the game stands meanwhile."""

    def __init__(self, policy, env, per_chunk=None):
        config = policy.info()["config"]
        horizon, self.stops = config["horizon"], env.pause.stops
        self.shift = 0 if self.stops else config["action_shift"]
        self.per_chunk = min(per_chunk or (horizon if self.stops else horizon // 2), horizon)
        self.policy, self.env, self.plan = policy, env, Plan(env.hz / 4)
        self.thread, self.answer = ThreadPool(1), None
        self.asked = -horizon                              # so that the first tick asks
        # The first prediction takes longest: it is made here, before anything waits for it.
        self.patience = STANDS + 3 * self._predict(env.look())[1]
        policy.reset()

    def ask(self, tick):
        """Predict from a new frame; row 0 of the chunk belongs to tick `tick`."""
        self.asked, frame = tick, self.env.look()
        self.seen = self.env.seen
        self.answer = self.thread.apply_async(self._predict, [frame])

    def _predict(self, frame):
        began = time.perf_counter()
        return self.policy.predict(frame), time.perf_counter() - began

    def think(self, tick, score):
        """Lay a chunk that has come over the plan -> the time at which its frame was seen; None where none
        has come, or too late. Raises what the policy raised."""
        if self.stops and tick - self.asked >= self.per_chunk:
            self._ask_while_it_stands(tick, score.beat)
        if not (self.answer and self.answer.ready()):
            return None
        (chunk, seconds), self.answer = self.answer.get(), None
        score.predict_ms.append(seconds * 1e3)
        score.chunks += 1
        in_time = self.plan.lay(self.asked + self.shift, chunk, tick)
        score.late += not in_time
        return self.seen if in_time else None

    def _ask_while_it_stands(self, tick, beat):
        began = time.perf_counter()
        self.env.pause.stop()
        self.ask(tick)
        self.answer.wait(self.patience)
        if not self.answer.ready():
            raise UserError(f"expected a prediction in {self.patience:.0f} s, found none; the game runs on: "
                            "see what holds the model up")
        self.plan.rows = {}                                # the game has not moved on: nothing is committed
        self.env.pause.go()
        beat.start += time.perf_counter() - began          # the clock of the actions stood too

    def is_due(self, tick):
        """In real time: is the next chunk to be asked for?"""
        return tick - self.asked >= self.per_chunk and not (self.answer or self.stops)


class Plan:
    """What is pressed at each tick: chunks laid over each other. rows: {tick: action (25,)}. hold: ticks for
    which the last action is held where no row is left."""

    def __init__(self, hold):
        self.rows, self.last, self.hold = {}, (-1, neutral()), hold

    def lay(self, start, chunk, now):
        """A chunk (T, 25) whose row 0 belongs to tick `start` -> how many of its rows are still to come at
        tick `now`.

        Its first d = now - start rows are history: others were pressed while it was computed. Over the rest
        of the older plan it is faded in with the soft mask of real-time chunking (arXiv 2506.07339, Eq. 5):
        the older plan weighs c (e^c - 1) / (e - 1), where c falls in a straight line from almost 1 at the
        first row to come, i = d, to 0 at i = `end`, where the older plan ends."""
        d = max(now - start, 0)
        end = max(self.rows, default=now - 1) + 1 - start  # the chunk's first row beyond the older plan
        rows = {}
        for i in range(d, len(chunk)):
            old, row = self.rows.get(start + i), chunk[i]
            if old is not None:
                c = (end - i) / (end - d + 1)
                weight = c * np.expm1(c) / np.expm1(1)
                row = weight * old + (1 - weight) * row
            rows[start + i] = row
        if rows:                                           # an action_shift leaves older rows before `start`
            self.rows = {t: a for t, a in self.rows.items() if now <= t < start} | rows
        return len(rows)

    def at(self, tick):
        """The action of a tick, float (25,). Where predictions are late the last action is held for a moment,
        then the pad rests."""
        if tick in self.rows:
            self.last = tick, self.rows[tick]
        return self.last[1] if tick - self.last[0] <= self.hold else neutral()


class Beat:
    """The action clock: hz ticks a second from `start` on. A tick that has passed is skipped, never made up
    for. late_ms: by how many milliseconds wait() woke up too late."""

    def __init__(self, hz):
        self.period, self.start, self.tick = 1 / hz, time.perf_counter(), -1
        self.skipped, self.late_ms = 0, deque(maxlen=36000)

    def wait(self):
        """Sleep until the next tick -> its number."""
        now = time.perf_counter()
        tick = max(self.tick + 1, int((now - self.start) / self.period))
        self.skipped += tick - self.tick - 1
        due = self.start + tick * self.period
        if due > now:
            time.sleep(due - now)
        self.tick = tick
        self.late_ms.append((time.perf_counter() - due) * 1e3)
        return tick


class Score:
    """What is worth knowing of a session, and the progress line that says it. ticks: all, human: of them
    those by hand; late: chunks of which no row came in time."""

    def __init__(self, beat):
        self.beat, self.told = beat, ""
        self.began = self.checked = time.perf_counter()
        self.press_ms, self.predict_ms = deque(maxlen=36000), deque(maxlen=36000)
        self.ticks = self.chunks = self.late = self.human = 0
        self.bar = tqdm(bar_format="{desc}", disable=None, leave=False, dynamic_ncols=True, file=sys.stdout)

    def line(self, env):
        """One line: rate, time of a prediction, latency from capture to press, how late the clock is, time
        that looking takes."""
        def ms(values):
            return f"{np.median(values):.1f} ms (p95 {np.percentile(values, 95):.1f})" if values else "-"
        seconds = time.perf_counter() - self.began
        return (f"{seconds:.0f} s | {self.ticks / seconds:.1f} actions/s | "
                f"{self.chunks} predictions of {ms(self.predict_ms)}, {self.late} late | "
                f"capture to press {ms(self.press_ms)} | "
                f"clock late {ms(self.beat.late_ms)}, {self.beat.skipped} skipped | look {ms(env.look_ms)} | "
                f"by hand {self.human / max(self.ticks, 1):.0%}")

    def tell(self, env):
        """Once a second: show the line and, when it is new, what is wrong with the picture or the pace."""
        if time.perf_counter() - self.checked < 1:
            return
        self.checked = time.perf_counter()
        wrong = env.problem()
        if not wrong and self.late > 3 + self.chunks / 2:
            wrong = "most predictions come too late: use --pause suspend, fewer --euler steps or a lower --hz"
        if wrong and wrong != self.told:
            print(f"\n{wrong}", file=sys.stderr, flush=True)
        self.told = wrong
        self.bar.set_description_str(self.line(env))


# --------------------------------------------------------------------------- the environment
class GameGone(UserError):
    """The game has ended or closed its window."""


class GameEnv(gymnasium.Env if gymnasium else object):
    """A game that was made for people, as an environment. Observation: uint8 (256, 256, 3); action: float32
    (25,), extract.py's; reward 0 and terminated False, unless judge() is overridden; truncated when the
    game has gone. A step holds the action for 1 / hz seconds of the game's time; between steps the game
    runs on (pause "none") or stands ("suspend", "clock"). close() leaves the pad at rest and the game
    running. With Gymnasium installed it is a gymnasium.Env, and "Game-v0" for gymnasium.make()."""
    metadata = {"render_modes": ["rgb_array"]}             # and "render_fps", which is hz
    PATIENCE = 3.0                                         # seconds for a game to open its window anew
    if gymnasium:
        observation_space = gymnasium.spaces.Box(0, 255, (SIDE, SIDE, 3), np.uint8)
        action_space = gymnasium.spaces.Box(LOWEST, np.ones(A, np.float32))
    launched = clock = still = None        # start_game()'s two; the last picture that was a change
    seen = still_since = 0.0               # seconds: when `frame` was taken; since when it is `still`
    frame = np.zeros((SIDE, SIDE, 3), np.uint8)            # the last picture

    def __init__(self, exe=None, window=None, launch=None, wait=60.0, pad="vgamepad", mapping=None,
                 pause="none", hz=60.0, allow_menu=False, render_mode=None):
        """exe: name of the game's program; window: part of its title, or its id; launch: a command that
        starts it, waited for `wait` seconds; pad: vgamepad, keyboard or none; mapping: a file for keyboard;
        allow_menu: whether step() presses START, BACK and GUIDE."""
        if not (exe or window or launch):
            raise UserError("expected --exe, --window or --launch, found none: --list shows what runs here")
        self.hz, self.allow_menu, self.render_mode = hz, allow_menu, render_mode
        self.metadata, self.look_ms = self.metadata | {"render_fps": hz}, deque(maxlen=36000)
        with ExitStack() as undo:               # run where anything below fails, else by close()
            self.desktop, (self.bindings, self.mice) = this_desktop(), load_mapping(mapping)
            self.keys = {key for *_, key in self.bindings}
            self.real_pads = real_pads()                   # before our own is made, which would be among them
            guard = undo.enter_context(ExitStack())        # first in, last out: dismissed when all is undone
            self.pad = {"none": NoPad, "keyboard": KeyboardPad}.get(pad, VirtualPad)(self)
            undo.callback(self.pad.close)                  # before the game: some look for pads only then
            self.capture = Capture()
            undo.callback(self.capture.close)
            if launch:
                self.launched, self.clock = start_game(launch, pause == "clock")
            self.window = await_window(self.desktop, exe or launch and self.launched.pid, window, wait)
            self.pid, self.name = self.window.pid, exe or self.window.names[0]
            if self.pad.keys:
                self.desktop.check_input(self.pid)
            self.desktop.focus(self.window.id)
            clock = SpeedHack if WINDOWS else FakeTime
            self.pause = {"none": Running, "suspend": Suspended, "clock": clock}[pause](self)
            undo.callback(self.pause.go)
            guard.callback(Guard(keys=sorted(self.pad.keys), pid=self.pid, clock=pause == "clock").dismiss)
            self.undo = undo.pop_all()

    def reset(self, *, seed=None, options=None):
        """Let go of the pad and look. A game starts no new round by itself: options={"actions": float (n,
        25)} are played first, at hz and with START, BACK and GUIDE, say to walk through its menu. The seed
        is Gymnasium's; no game hears of it."""
        if gymnasium:
            super().reset(seed=seed)
        for action in (*(options or {}).get("actions", ()), neutral()):
            self.hold(playable(action, allow_menu=True))
        return self.look(), {"away": self.pad.away}

    def step(self, action):
        """Hold an action for one period -> (observation, reward, terminated, truncated, info)."""
        try:
            self.hold(playable(action, self.allow_menu))
            obs = self.look()
        except GameGone as e:
            return self.frame, 0.0, False, True, {"reason": str(e), "away": True}
        return obs, *self.judge(obs), False, {"away": self.pad.away}

    def judge(self, obs):
        """(reward, terminated) of an observation: to be overridden by who knows the game."""
        return 0.0, False

    def hold(self, action):
        """Let the game run for one period with an action pressed."""
        self.pause.go()
        self.pad.press(action)
        time.sleep(1 / self.hz)
        self.pause.stop()

    def look(self):
        """The newest picture -> uint8 (256, 256, 3)."""
        self.seen = time.perf_counter()
        self.frame = self.capture.look(self.box())
        self.look_ms.append((time.perf_counter() - self.seen) * 1e3)
        return self.frame

    def box(self):
        """(left, top, width, height) of what is looked at, now. A window that has gone may be opened anew by
        the same process; else GameGone."""
        if box := self.desktop.box(self.window.id):
            return box
        self.pad.press(neutral())
        self.pause.go()                                    # a game that stands opens none
        try:
            self.window = await_window(self.desktop, self.pid or -1, seconds=self.PATIENCE)
        except UserError:
            raise GameGone(f"{self.name} has closed its window")
        return self.window.box

    def problem(self):
        """Why the picture may not be the game's; "" where there is no reason to think so. To be asked once a
        second."""
        if said := self.desktop.problem(self.window.id):
            return f"the window of {self.name} {said}: bring it to the front"
        if self.pad.away:
            return f"the window of {self.name} is not in front: no key counts until it is"
        if not np.array_equal(self.still, self.look()):
            self.still, self.still_since = self.frame, time.monotonic()
        if time.monotonic() - self.still_since < 5:
            return ""
        black = "black" if self.frame.max() < 8 else "the same"
        return (f"the picture of {self.name} has been {black} for 5 s: is it paused? Exclusive fullscreen "
                "can't be captured: choose borderless or windowed in the game's settings")

    def render(self):
        """The last picture."""
        return self.frame

    def close(self):
        """The pad at rest, the game running; each is done even where another fails. May be called twice."""
        self.undo.close()


if gymnasium:
    gymnasium.register("Game-v0", "play:GameEnv", nondeterministic=True)


# -------------------------------------------------------------------------- actions and keys
def playable(action, allow_menu=False):
    """What of a prediction, float (25,), may be pressed -> float32 (25,): buttons 0 or 1, legacy ones 0, the
    menu's 0 unless allowed, sticks within [-1, 1]."""
    out = np.nan_to_num(np.float32(action)).clip(LOWEST, 1)
    out[:21] = out[:21] > 0.5
    out[[BUTTON[b] for b in LEGACY + (() if allow_menu else MENU_BUTTONS)]] = 0
    return out


def load_mapping(path=None):
    """A mapping file, or the usual one -> its keys, [(place in an action, sign, key)], sign 1 for a button,
    and its mice, {stick: pixels a second at full tilt}. UserError names the first wrong control."""
    keys, mice = [], {}
    for control, key in (extract.read_json(path, dict) if path else TABLES["mapping"]).items():
        with reading(f"{path}: {control}: {key}", 'a control and its key, or a stick with its keys and mouse '
                     'speed (1 to 100000), as "mapping" in weights/keys.json'):
            if control in BUTTON:
                keys.append((BUTTON[control], 1, key))
            else:
                sides, first = dict(key), STICKS[control].start
                if "mouse" in sides:
                    mice[control] = number(float, 1, 1e5)(sides.pop("mouse"))
                keys += [(first + SIDES[side][0], SIDES[side][1], sides[side]) for side in sides]
            if not {key for *_, key in keys} <= (KEYS | MOUSE).keys():
                raise ValueError("another")
    return keys, mice


def keys_of(bindings, action, down=frozenset()):
    """The set of keys that an action holds. `down`: the keys held before it, since a stick holds its key
    down to REST, but presses it only over TILT."""
    keys = set()
    for place, sign, key in bindings:
        held = key in down and place >= len(BUTTONS)
        if action[place] * sign > (REST if held else TILT):
            keys.add(key)
    return keys


def action_of(bindings, keys):
    """keys_of() the other way round, for a person at the keyboard: keys -> float32 (25,). A key of several
    controls counts for the first of them."""
    action, keys = neutral(), set(keys)
    for place, sign, key in bindings:
        if key in keys:
            action[place] += sign
            keys.discard(key)
    return action


# ---- machinery ------------------------------------------------------------
# The method ends here; what follows ties it to real machines, records it and shows it.
# ------------------------------------------------------------------------------- the desktop
# Two classes with the same methods, X11 and Win32: windows() and box(id) find and follow a window,
# problem(id) says why its picture can't be trusted, focused(id) and focus(id) keep keys out of other
# windows, key() / move() press, held() / moved() read, suspend() / resume() stop a process.
@dataclass
class Window:
    """A window that could be a game. The box is its client area (no title bar, no border) in pixels of the
    desktop."""
    id: int
    title: str
    box: tuple                 # left, top, width, height
    pid: int                   # its process, 0 where it does not say
    names: list                # what --exe finds it by: its process, those that started it, its X11 class

    def __str__(self):
        return f"{self.names[0]} {self.title[:40]!r} (id {self.id})"


def spellings(*names):
    """Process names and paths as people may type them: lower case, last part, with and without an ending."""
    last = [basename(n.lower()) for n in names]
    return [n for name in last for n in (name, splitext(name)[0]) if n]


def this_desktop():
    """The class for this system."""
    return Win32() if WINDOWS else X11()


def find_window(desktop, process=None, window=None):
    """The largest window of a process, given by its name or number (or of one that it started), with id or
    part of the title `window` where given; None when there is none. An id goes before a title with the same
    digits."""
    wanted, asked = (window or "").lower(), {*spellings(str(process))}
    theirs = [w for w in desktop.windows() if not process or asked & {*w.names}]
    by_id = [w for w in theirs if wanted in (str(w.id), hex(w.id))]
    by_title = [w for w in theirs if wanted in w.title.lower()]
    return max(by_id or by_title, key=lambda w: w.box[2] * w.box[3], default=None)


def await_window(desktop, process=None, window=None, seconds=60.0):
    """find_window(), waiting for a game that is still starting. UserError lists what is there instead."""
    wanted = f"of {process or 'any program'}" + (f" with title or id {window!r}" if window else "")
    found, ends = find_window(desktop, process, window), time.monotonic() + seconds
    if not found:
        print(f"waiting up to {seconds:g} s for a window {wanted}", flush=True)
    while not found:
        if time.monotonic() > ends:
            here = ", ".join(map(str, desktop.windows())) or "none"
            raise UserError(f"no window {wanted}; windows here: {here}: start the game, in a window")
        time.sleep(0.25)
        found = find_window(desktop, process, window)
    return found


class Desktop:
    """What both systems share."""

    def check_input(self, pid):
        """UserError where keys would not reach a process."""

    def prepare_keys(self, names):
        """Before key() and held(). UserError when a key is missing."""

    def windows(self):
        """The windows on the screen that say whose they are. Found by process: titles may be empty or shared
        (NitroGen issues 7, 12, 38)."""
        return [w for w in map(self.window, self._ids()) if w]

    def problem(self, window):
        """Why the picture is not the game's: "" when there is no reason to think so."""
        w = self.window(window)
        if not w:
            return "is minimised"
        left, top, width, height = w.box
        over = self._at(left + width // 2, top + height // 2)
        if over in (0, self._top(window)):
            return ""
        return f"is covered by {self.window(over) or 'another window'}"


class X11(Desktop):
    """Linux: windows by Xlib, keys by XTEST, processes by /proc and signals; through ctypes, on 64 bits."""

    def __init__(self):
        with reading("libXtst.so.6", "this library (sudo apt install libxtst6; a Mac only serves a model)"):
            self.x = ctypes.CDLL("libXtst.so.6")
        self.x.XOpenDisplay.restype = c_void_p
        self.display = c_void_p(self.x.XOpenDisplay(None))
        if not self.display:
            raise UserError("expected an X11 display to capture, found none that answers as DISPLAY "
                            f"{os.environ.get('DISPLAY')}: log in to an X11 session (not Wayland), or set it")
        self.ignore = ctypes.CFUNCTYPE(c_int)(lambda: 0)
        self.x.XSetErrorHandler(self.ignore)               # windows vanish while they are asked about
        self.root, self.codes = self._call("XDefaultRootWindow"), {}

    def _call(self, function, *arguments, n=0):
        """Call a function of X11 -> what it returns, or the n numbers that it writes behind its arguments,
        zeros where it fails."""
        numbers = [c_ulong() for _ in range(n)]
        value = getattr(self.x, function)(self.display, *arguments, *map(byref, numbers))
        return [number.value for number in numbers] if n else value

    def _tree(self, window):
        """(parent, children from bottom to top) of a window."""
        _, parent, first, n = self._call("XQueryTree", window, n=4)
        children = list((c_ulong * n).from_address(first)) if n else []
        self.x.XFree(c_void_p(first))
        return parent, children

    def _top(self, window):
        """The child of the root that holds a window: itself, or the window manager's frame around it."""
        parent = self._tree(window)[0]
        return self._top(parent) if parent not in (0, self.root) else window

    def _property(self, window, name):
        """The bytes of a property, b"" without it; its format 32 comes as 64 bits."""
        atom = self._call("XInternAtom", name.encode(), 0)
        _, form, n, _, data = self._call("XGetWindowProperty", window, atom, 0, 4096, 0, c_ulong(0), n=5)
        value = ctypes.string_at(data, n * (8 if form == 32 else 1)) if data else b""
        self.x.XFree(c_void_p(data))
        return value

    def _attributes(self, window):
        """XWindowAttributes: 2 width, 3 height, 23 map_state; zeros of a window that is gone."""
        attributes = (c_int * 34)()
        self._call("XGetWindowAttributes", window, attributes)
        return attributes

    def box(self, window):
        """(left, top, width, height) of the client area on the desktop; None when the window is gone."""
        width, height = self._attributes(window)[2:4]
        left, top, _ = self._call("XTranslateCoordinates", window, self.root, 0, 0, n=3)
        return (c_int(left).value, c_int(top).value, width, height) if width else None

    def _ids(self):
        """The window manager's windows, the root's children where there is none."""
        managed = np.frombuffer(self._property(self.root, "_NET_CLIENT_LIST"), np.uint64)
        return managed.tolist() or self._tree(self.root)[1]

    def window(self, window):
        """What is known of a window; None where it is gone, not shown or nobody's. It is its process's, and
        that of those which started it; a program under Wine or an interpreter also goes by its script's
        name."""
        pid = parent = int.from_bytes(self._property(window, "_NET_WM_PID")[:4], "little")
        names, kind = [], self._property(window, "WM_CLASS").decode(errors="replace")
        with suppress(OSError):                 # it has ended
            while parent > 1:
                words = Path(f"/proc/{parent}/cmdline").read_text(errors="replace").split("\0")
                names += spellings(words[0], self._status(parent, "Name"), *words[1:3], str(parent))
                parent = int(self._status(parent, "PPid"))
        names += spellings(*kind.split("\0"))
        title = self._property(window, "_NET_WM_NAME") or self._property(window, "WM_NAME")
        box, shown = self.box(window), self._attributes(window)[23] == 2         # IsViewable
        return Window(window, title.decode(errors="replace"), box, pid, names) if shown and names else None

    def _at(self, x, y):
        return self._call("XTranslateCoordinates", self.root, self.root, x, y, n=3)[2]

    def focused(self, window):
        """Do keys go to this window?"""
        return self._top(self._call("XGetInputFocus", n=2)[0]) == self._top(window)

    def focus(self, window):
        """Bring the window to the front and give it the keyboard."""
        self._call("XRaiseWindow", window)
        self._call("XSetInputFocus", window, 2, 0)
        self._call("XFlush")

    def prepare_keys(self, names):
        """Look the keys up once. UserError when XTEST or a key is missing."""
        for name in set(names) - MOUSE.keys():
            symbol = self.x.XStringToKeysym(KEYS[name][0].encode())
            self.codes[name] = self._call("XKeysymToKeycode", symbol) & 0xFF
            if not self.codes[name]:
                raise UserError(f"expected the key {name} on this keyboard, found none: give another --map")

    def key(self, name, down):
        """Press or release a key or mouse button."""
        if name in MOUSE:
            self._call("XTestFakeButtonEvent", MOUSE[name][0], down, 0)
        else:
            self._call("XTestFakeKeyEvent", self.codes[name], down, 0)
        self._call("XFlush")

    def move(self, dx, dy):
        """Move the mouse by whole pixels."""
        self._call("XTestFakeRelativeMotionEvent", dx, dy, 0)
        self._call("XFlush")

    def held(self):
        """The keys given to prepare_keys and the mouse buttons that are down now, whoever presses them."""
        state = create_string_buffer(32)
        self._call("XQueryKeymap", state)
        mask = self._call("XQueryPointer", self.root, n=7)[6]
        down = {name for name, code in self.codes.items() if state.raw[code // 8] >> code % 8 & 1}
        return down | {name for name, (button, *_) in MOUSE.items() if mask >> 7 + button & 1}

    def watch_mouse(self):
        """Before moved(). Games put the pointer back, so that only raw motion tells what a hand did."""
        with reading("libXi.so.6", "this library (sudo apt-get install libxi6)"):
            xi = ctypes.CDLL("libXi.so.6")
        xi.XIQueryVersion(self.display, byref(c_int(2)), byref(c_int(2)))
        raw_motion = create_string_buffer(b"\0\0\2")      # bit 17
        mask = struct.pack("iiP", 1, 3, ctypes.addressof(raw_motion))    # 1: every pointer; 3 bytes
        xi.XISelectEvents(self.display, self.root, mask, 1)

    def moved(self):
        """The pixels by which the mouse was moved since the last call -> float (2,)."""
        total, event = np.zeros(2), (c_ulong * 24)()
        while self._call("XPending"):
            self._call("XNextEvent", event)
            if self._call("XGetEventData", event):
                raw = (c_ulong * 11).from_address(event[6])      # XIRawEvent: 9 the axes, 10 their values
                axes, values = ctypes.string_at(raw[9])[0], (ctypes.c_double * 2).from_address(raw[10])
                total += [values[0] * (axes & 1), values[axes & 1] * (axes >> 1 & 1)]
                self._call("XFreeEventData", event)
        return total

    @staticmethod
    def _status(pid, field):
        """What the system says of a process: its Name, say."""
        return re.search(rf"{field}:\t(.*)", Path(f"/proc/{pid}/status").read_text(errors="replace"))[1]

    def suspend(self, pid):
        """Stop a process: at once, or on a busy machine within milliseconds."""
        self._signal(pid, signal.SIGSTOP)

    def resume(self, pid):
        """Let a process run on."""
        self._signal(pid, signal.SIGCONT)

    @staticmethod
    def _signal(pid, number):
        advice = "one that may be stopped (start play.py as its user, or use --pause none)"
        with reading(f"process {pid}", advice), suppress(ProcessLookupError):
            os.kill(pid, number)


class Win32(Desktop):
    """64-bit Windows, from 10 on: the same methods by its libraries. Handles have 32 bits that count, so that
    plain ints do. `dll(name)` gives a library; tests give their own."""

    def __init__(self, dll=None):
        dll = dll or ctypes.WinDLL
        self.user, self.kernel, self.nt, self.dwm = map(dll, ("user32", "kernel32", "ntdll", "dwmapi"))
        self.user.SetProcessDpiAwarenessContext(c_void_p(-4))            # pixels, whatever a monitor's DPI

    def _ids(self):
        ids = []
        callback = ctypes.CFUNCTYPE(c_int, c_int, c_void_p)
        self.user.EnumWindows(callback(lambda window, _: ids.append(window) or 1), None)     # 1: go on
        return ids

    def window(self, window):
        """What is known of a window; None where it is gone or not shown. It is its process's alone: a
        parent's number may be another's by now."""
        pid, size, cloaked = wintypes.DWORD(), wintypes.DWORD(1024), c_int()
        path, title = map(ctypes.create_unicode_buffer, (1024, 256))
        self.user.GetWindowThreadProcessId(window, byref(pid))
        with self._process(pid.value) as handle:
            self.kernel.QueryFullProcessImageNameW(handle, 0, path, byref(size))
        self.user.GetWindowTextW(window, title, 256)
        self.dwm.DwmGetWindowAttribute(window, 14, byref(cloaked), 4)      # suspended, or on another desktop
        hidden = self.user.IsIconic(window) or cloaked.value or not self.user.IsWindowVisible(window)
        box, names = self.box(window), spellings(path.value or "?", str(pid.value))
        return Window(window, title.value, box, pid.value, names) if box and not hidden else None

    def box(self, window):
        """(left, top, width, height) of the client area on the desktop; None when the window is gone."""
        size, corner = wintypes.RECT(), wintypes.POINT()
        if not self.user.GetClientRect(window, byref(size)):
            return None
        self.user.ClientToScreen(window, byref(corner))
        return corner.x, corner.y, size.right, size.bottom

    def _top(self, window):
        return self.user.GetAncestor(window, 2)

    def _at(self, x, y):
        return self._top(self.user.WindowFromPoint(wintypes.POINT(x, y)))

    def focused(self, window):
        """Do keys go to this window?"""
        return self.user.GetForegroundWindow() == window

    def focus(self, window):
        """Bring the window to the front and give it the keyboard."""
        self.user.SetForegroundWindow(window)

    def check_input(self, pid):
        """UserError where Windows drops our keys without a word."""
        with self._process(pid, 0x0010):                   # PROCESS_VM_READ
            pass

    def key(self, name, down):
        """Press or release a key or mouse button: by scan codes, since games that read the keyboard by
        DirectInput see nothing else; Wine sees only the virtual keys beside them."""
        if name in MOUSE:
            self._send("iiII", 0, 0, 0, 0, MOUSE[name][2] << (not down))
        else:
            _, virtual, extended = KEYS[name]
            scan = self.user.MapVirtualKeyW(virtual, 0) & 0xFF
            self._send("HHI", 1, virtual, scan, 8 | extended | 2 * (not down))

    def move(self, dx, dy):
        """Move the mouse by whole pixels."""
        self._send("iiII", 0, dx, dy, 0, 1)

    def _send(self, layout, *values):
        """SendInput of an INPUT, which has 40 bytes: kind 0 (mouse) or 1 (key), and MOUSEINPUT or
        KEYBDINPUT."""
        self.user.SendInput(1, struct.pack(f"<Ixxxx{layout}", *values).ljust(40, b"\0"), 40)

    def held(self):
        """The keys and mouse buttons that are down now, whoever presses them."""
        return {n for n, key in (KEYS | MOUSE).items() if self.user.GetAsyncKeyState(key[1]) & 0x8000}

    def watch_mouse(self):
        """Before moved(), and in its thread: raw input, to a window that exists for nothing else."""
        window = self.user.CreateWindowExW(0, "Static", None, 0, 0, 0, 0, 0, c_void_p(-3), None, None, None)
        mouse = struct.pack("<HHIQ", 1, 2, 0x100, window)  # RAWINPUTDEVICE, RIDEV_INPUTSINK
        self.user.RegisterRawInputDevices(mouse, 1, 16)

    def moved(self):
        """The pixels by which the mouse was moved since the last call -> float (2,)."""
        total, event = np.zeros(2), create_string_buffer(48)             # RAWINPUT
        while self.user.GetRawInputBuffer(event, byref(c_int(48)), 24) == 1:
            total += struct.unpack_from("<ii", event, 36)                # lLastX, lLastY
        return total

    @contextmanager
    def _process(self, pid, access=0x1000):                # PROCESS_QUERY_LIMITED_INFORMATION
        handle = self.kernel.OpenProcess(access, 0, pid)
        if not handle and access != 0x1000:
            raise UserError(f"expected a game that we may reach, found that Windows refuses process {pid} "
                            "(error 5) and drops keys to it without a word: start play.py as administrator")
        yield handle
        self.kernel.CloseHandle(handle)

    def is_32_bit(self, pid):
        """Is a process of 64-bit Windows one of 32 bits?"""
        flag = c_int()
        with self._process(pid) as handle:
            self.kernel.IsWow64Process(handle, byref(flag))
        return flag.value

    def suspend(self, pid):
        """Stop all threads of a process."""
        with self._process(pid, 0x0800) as handle:         # PROCESS_SUSPEND_RESUME
            self.nt.NtSuspendProcess(handle)

    def resume(self, pid):
        """Let a process run on."""
        with self._process(pid, 0x0800) as handle:
            self.nt.NtResumeProcess(handle)


class Capture:
    """Pictures of a part of the desktop by mss. Whatever lies on top of the game is in them too."""

    def __init__(self):
        with reading("screen capture", "the package mss (pip install mss) and a desktop session"):
            import mss
            self.mss = mss.MSS()

    def look(self, box):
        """Pixels (left, top, width, height) of the desktop -> uint8 (256, 256, 3) RGB, by training's
        shrink(). What lies outside of the screen is black."""
        left, top, width, height = box
        x, y, wide, high = self.screen()
        x0, y0 = max(left, x), max(top, y)
        x1, y1 = min(left + width, x + wide), min(top + height, y + high)
        if x1 <= x0 or y1 <= y0:
            return np.zeros((SIDE, SIDE, 3), np.uint8)
        with reading("screen capture", "a picture (was the screen locked or its size changed? Start again)"):
            shot = self.mss.grab((x0, y0, x1, y1))
        rgb = cv2.cvtColor(np.asarray(shot), cv2.COLOR_BGRA2RGB)
        if rgb.shape[:2] != (height, width):
            rgb = cv2.copyMakeBorder(rgb, y0 - top, top + height - y1, x0 - left, left + width - x1,
                                     cv2.BORDER_CONSTANT)
        return shrink(rgb)

    def screen(self):
        """(left, top, width, height) of all monitors together; its corner may be negative."""
        return tuple(self.mss.monitors[0].values())[:4]

    def close(self):
        """Give the screen back."""
        self.mss.close()


# -------------------------------------------------------------------------------------- pads
def nothing(*_):
    """Do nothing."""


class NoPad:
    """Presses nothing: a person plays, or one only wants to see what the model would do."""
    away = moved = False       # is the window not in front, so that nothing is pressed? Was the mouse moved?
    keys = down = frozenset()  # those that it can press, and holds now
    __init__ = press = close = nothing


class VirtualPad(NoPad):
    """An Xbox 360 gamepad that games see as a real one. Its sticks point up at +1, ours down."""

    def __init__(self, env):
        if env.real_pads:
            print("warning: unplug the real gamepad: many games hear only the first", file=sys.stderr)
        with reading("--pad vgamepad", "a virtual gamepad (pip install vgamepad; on Linux sudo apt install "
                     "libevdev2, sudo modprobe uinput and sudo chmod 0666 /dev/uinput; on Windows ViGEmBus, "
                     "github.com/nefarius/ViGEmBus; or use --pad keyboard)"):
            import vgamepad                                # on Windows it connects to the driver
            self.buttons, self.pad = vgamepad.XUSB_BUTTON, vgamepad.VX360Gamepad()
        self.press(neutral())

    def press(self, action):
        """Hold exactly this action, float (25,), in file convention; triggers may lie between 0 and 1."""
        pad = self.pad
        pad.reset()
        for button, name in TABLES["vgamepad"].items():
            if action[BUTTON[button]] > 0.5:
                pad.press_button(getattr(self.buttons, name))
        for side in STICKS:
            x, y = action[STICKS[side]].tolist()
            getattr(pad, f"{side}_joystick_float")(x, -y)
            getattr(pad, f"{side}_trigger_float")(float(action[BUTTON[f"{side.upper()}_TRIGGER"]]))
        pad.update()

    def close(self):
        """Let go, then unplug."""
        self.press(neutral())
        self.pad = None


class KeyboardPad(NoPad):
    """Keys and mouse in place of a pad, for games without one. Presses only while the game's window has the
    keyboard: anywhere else the model would type into whatever the person has turned to."""

    def __init__(self, env):
        self.env, self.keys = env, env.keys
        self.rest = np.zeros(2)                            # parts of a pixel that the mouse has yet to go
        env.desktop.prepare_keys(self.keys)

    def press(self, action):
        """Hold exactly this action; the mouse moves by one tick's worth."""
        env, desktop = self.env, self.env.desktop
        self.away = not desktop.focused(env.window.id)
        if self.away:
            action = neutral()
        keys = keys_of(env.bindings, action, self.down)
        for key in self.down ^ keys:
            desktop.key(key, key in keys)
        self.down = frozenset(keys)
        for stick, speed in env.mice.items():
            self.rest += action[STICKS[stick]] * speed / env.hz
        whole = np.trunc(self.rest).astype(int)
        self.moved = whole.any()
        if self.moved:
            desktop.move(*whole.tolist())
            self.rest -= whole

    def close(self):
        """Let go of every key."""
        for key in self.down:
            self.env.desktop.key(key, 0)
        self.down = frozenset()


# ------------------------------------------------------------------------ the person's hands
def hands_on(people):
    """(person, action) of the first whose pad is touched; (None, the pad at rest) where none is."""
    for person in people:
        action = person.read()
        if (np.abs(action) > person.touch).any():
            return person, action
    return None, neutral()


class Person:
    """What people's pads share."""
    forward = True                 # the game looks at our pad: theirs is passed on
    touch = 0.25                   # a stick or trigger this far out is meant: worn sticks rest at half of it


class Joystick(Person):
    """A pad on Linux, /dev/input/js*: events of 8 bytes (time, value, kind, number)."""

    def __init__(self, path):
        import fcntl
        self.file, self.action = open(path, "rb", buffering=0), neutral()
        os.set_blocking(self.file.fileno(), False)
        axes, buttons, name = bytearray(64), bytearray(1024), bytearray(128)
        with reading(path, "a gamepad"):
            for request, answer in (0x80406A32, axes), (0x84006A34, buttons), (0x80806A13, name):
                fcntl.ioctl(self.file, request, answer)    # JSIOCGAXMAP, JSIOCGBTNMAP, JSIOCGNAME
        self.codes = {1: struct.unpack("512H", buttons), 2: axes}        # kind of an event -> its controls
        self.table = TABLES["joystick"]
        if re.search(b"x-?box", name.lower()):             # its driver names X and Y the other way round
            self.table = self.table | {"307": self.table["308"], "308": self.table["307"]}

    def read(self):
        """The pad now -> float32 (25,)."""
        with reading(self.file.name, "a gamepad that stays plugged in"):
            while events := self.file.read(512):           # None: that was all
                for _, value, kind, control in struct.iter_unpack("<IhBB", events):
                    kind &= 3                              # without 0x80, the state when opened
                    for place, scale, offset in self.table.get(str(self.codes[kind][control]), ()):
                        place = BUTTON.get(place, place)
                        moved = scale * value / (32767 if kind == 2 else 1) + offset
                        self.action[place] = max(moved, LOWEST[place])
        return self.action.copy()


class XInput(Person):
    """A pad on Windows, by xinput1_4.dll; `number` 0 to 3."""

    def __init__(self, dll, number):
        self.dll, self.number = dll, number

    def read(self):
        """The pad now -> float32 (25,); XInput's y points up, ours down."""
        state, action = create_string_buffer(16), neutral()             # XINPUT_STATE
        if self.dll.XInputGetState(self.number, state):
            raise UserError("the gamepad was unplugged: plug it in and start again")
        _, buttons, *analog = struct.unpack("<IHBBhhhh", state)
        for name, mask in TABLES["xinput"].items():
            action[BUTTON[name]] = bool(buttons & mask)
        action[[BUTTON["LEFT_TRIGGER"], BUTTON["RIGHT_TRIGGER"]]] = np.divide(analog[:2], 255)
        action[21:] = np.clip(np.multiply(analog[2:], [1, -1, 1, -1]) / 32767, -1, 1)
        return action


class Keys(Person):
    """A person who plays with keyboard and mouse: the keys that are down and not held by us, and how the
    mouse moves while we don't move it. Both count only while the game's window has the keyboard."""
    forward, touch = False, 0.0                            # the game has seen it already

    def __init__(self, env):
        self.env, self.last = env, time.monotonic()
        env.desktop.prepare_keys(env.keys)
        if env.mice:
            env.desktop.watch_mouse()

    def read(self):
        """The keys and the mouse now, as the action that they mean -> float32 (25,)."""
        env, pad, desktop = self.env, self.env.pad, self.env.desktop
        action = action_of(env.bindings, desktop.held() - pad.down)
        last, self.last = self.last, time.monotonic()
        seconds = max(self.last - last, 1 / env.hz)        # more than a tick where some came too late
        for stick, speed in env.mice.items():
            action[STICKS[stick]] += desktop.moved() * (0 if pad.moved else 1 / speed / seconds)
        pad.away = not desktop.focused(env.window.id)
        return neutral() if pad.away else action.clip(-1, 1)


def real_pads():
    """The gamepads plugged in now. Asked before our own is made, which would look like one of them."""
    if not WINDOWS:
        return [Joystick(path) for path in sorted(glob.glob("/dev/input/js*")) if os.access(path, os.R_OK)]
    dll, state = ctypes.WinDLL("xinput1_4"), create_string_buffer(16)
    return [XInput(dll, i) for i in range(4) if not dll.XInputGetState(i, state)]


# ----------------------------------------------------------------------------------- pausing
def start_game(command, stop_clock):
    """Start the game -> (its process, the file of its clock where FakeTime is to stop that, else None)."""
    environment, clock = FakeTime.prepare() if stop_clock and not WINDOWS else (None, None)
    with reading(f"--launch {command}", "a command that starts the game"):
        words = command if WINDOWS else shlex.split(command)
        silent = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        return subprocess.Popen(words, env=environment, **silent, **APART), clock


class Running:
    """--pause none: the game goes on while the model thinks."""
    stops = False
    __init__ = stop = go = nothing


class Suspended:
    """--pause suspend: the process stands while the model thinks. The system's clock does not: a game that
    measures time sees the pause as one long frame, which engines cap, commonly at 0.1 to 0.25 s."""
    stops = True

    def __init__(self, env):
        if not env.pid:
            raise UserError("--pause: expected a window that names its process, found none: use --pause none")
        self.env, self.stopped = env, False

    def stop(self):
        """The game stands."""
        self.stopped = True
        self.env.desktop.suspend(self.env.pid)

    def go(self):
        """Let it run on."""
        if self.stopped:
            self.env.desktop.resume(self.env.pid)
            self.stopped = False


class FakeTime(Suspended):
    """--pause clock on Linux: besides, libfaketime sets the game's clock back by the time that it stood, so
    that it never sees a pause."""

    def __init__(self, env):
        if not env.clock:
            raise UserError("--pause clock: expected a game that play.py starts, found none: use --launch")
        super().__init__(env)
        self.offset = 0.0

    @staticmethod
    def prepare():
        """(environment for the game, the file that holds its clock's offset). UserError without the
        library. The file stays: without it the clock of a game that runs on would jump."""
        library = "faketime/libfaketimeMT.so.1"
        found = glob.glob(f"/usr/l*/{library}") + glob.glob(f"/usr/l*/*/{library}")
        if not found:
            raise UserError("--pause clock: expected libfaketime, found none: sudo apt install libfaketime")
        with tempfile.NamedTemporaryFile("w", prefix="play_clock_", delete=False) as f:
            f.write(f"{0:+020.6f}\n")                      # always as long, to be overwritten in place
        preload = f"{found[0]} {os.environ.get('LD_PRELOAD', '')}"
        return os.environ | {"LD_PRELOAD": preload, "FAKETIME_TIMESTAMP_FILE": f.name,
                             "FAKETIME_NO_CACHE": "1"}, f.name

    def stop(self):
        super().stop()
        self.since = time.perf_counter()

    def go(self):
        try:
            if self.stopped:
                self.offset += time.perf_counter() - self.since
                with open(self.env.clock, "r+") as f:      # the game reads it whenever it asks for the time
                    f.write(f"{-self.offset:+020.6f}\n")
        finally:
            super().go()


class SpeedHack(Suspended):
    """--pause clock on Windows: the package xspeedhack puts a library into the game that scales its clocks;
    0 stops them, and the game's loop may go on drawing the same moment."""

    def __init__(self, env):
        super().__init__(env)
        with reading("--pause clock", "the package xspeedhack (pip install xspeedhack) and a game that lets "
                     "it in (start play.py as administrator; never with an anti-cheat: use --pause suspend)"):
            import xspeedhack
            arch = "x86" if env.desktop.is_32_bit(env.pid) else "x64"
            self.client = xspeedhack.Client(process_id=env.pid, arch=arch)

    def _set(self, speed):
        with suppress(Exception):               # the game has ended, which GameEnv.box() says
            self.client.set_speed(speed)

    def stop(self):
        """The game's clock stands."""
        self._set(0.0)

    def go(self):
        """Normal speed."""
        self._set(1.0)

    @staticmethod
    def release():
        """Normal speed, told to the library in the game by another process than the one that put it there."""
        with suppress(OSError), open(r"\\.\pipe\xspeedhackpipe", "r+b", buffering=0) as pipe:
            pipe.write(struct.pack("<f", 1.0))


class Guard:
    """A second process that outlives this one for a moment: should this one die without a word (killed,
    crashed, its terminal gone), the guard lets go of the keys and lets the game run on."""

    def __init__(self, **undo):
        command = [sys.executable, __file__, "--guard", json.dumps(undo)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, **APART)

    def dismiss(self):
        """All is put right already."""
        self.process.communicate(b"done")


def stand_guard(keys, pid, clock):
    """The guard's whole life: wait for the end of our input; without a "done" before it, let go of `keys` and
    let the game `pid` run on (on Windows by its `clock`)."""
    if sys.stdin.buffer.read() == b"done":
        return
    desktop = this_desktop()
    desktop.prepare_keys(keys)
    for key in keys:
        desktop.key(key, 0)
    if clock and WINDOWS:
        SpeedHack.release()
    elif pid:
        desktop.resume(pid)
    print("play.py died: its keys are released, the game runs on", file=sys.stderr)


# ------------------------------------------------------------------------------ the recorder
ROOM = "room to write (what is whole is kept: make room, then start again with the same --record)"
ROW = np.dtype([("size", "<i8"), ("action", "<f4", A), ("human", "?")])      # of rows.bin, before its JPEG


class Recorder:
    """A clip folder of what is seen and pressed, DATA/GAME_DATE_TIME/. Row i is tick i: the picture taken
    right after the action was pressed, which can't show its effect yet, as in videos with an overlay.

    Until close() the folder's name ends in .recording. Each row goes to the system as it comes, to the end of
    rows.bin: a process that is killed loses the row it is at, and pick_up() makes a clip of the others. A
    lock tells a dead process's folder from a living one's."""

    def __init__(self, data, game, hz):
        stem = re.sub(r"[^\w.-]+", "_", Path(game).stem) + time.strftime("_%Y%m%d_%H%M%S")
        self.tmp, self.files = Path(data) / f"{stem}.recording", ExitStack()
        self.tick, self.last = 0, b""
        self.files.enter_context(extract.lock(self.tmp / "lock"))
        clip = {"video": None, "game": game, "fps": hz, "size": [SIDE, SIDE], "every": 1, "lag": 0}
        extract.write_json(self.tmp / "recording.json", clip)
        self.rows = self.files.enter_context(open(self.tmp / "rows.bin", "wb"))

    def add(self, tick, rgb, action, human):
        """Append tick `tick`; ticks that were skipped repeat the row before, so that the clip keeps time."""
        quality = [cv2.IMWRITE_JPEG_QUALITY, extract.QUALITY]
        jpeg = cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), quality)[1].tobytes()
        row = np.array((len(jpeg), playable(action, allow_menu=True), human), ROW).tobytes() + jpeg
        with reading(self.tmp, ROOM):
            self.rows.write(self.last * (tick - self.tick - 1) + row)
            self.rows.flush()
        self.tick, self.last = tick, row

    def close(self):
        """Give the folder its name -> a line about it."""
        with suppress(OSError):                 # a full disk, which was said when it was
            self.files.close()
        return finish(self.tmp)


def pick_up(data):
    """Make clips of the recordings under DATA whose processes died, and say so."""
    for tmp in sorted(Path(data).glob("*.recording")):
        with suppress(extract.Busy):            # its process lives
            print(f"picked up {finish(tmp)}", flush=True)


def finish(tmp):
    """Make a clip of a recording that nobody writes on -> a line about it. May be killed and done again."""
    folder, rows = tmp.with_suffix(""), []
    with reading(tmp, ROOM):
        with extract.lock(tmp / "lock"):
            frames = extract.FramesWriter(tmp, "frames")
            with suppress(FileNotFoundError), open(tmp / "rows.bin", "rb") as file:
                while len(head := file.read(ROW.itemsize)) == ROW.itemsize:
                    [row] = np.frombuffer(head, ROW)
                    jpeg = file.read(row["size"])
                    if len(jpeg) == row["size"]:           # else it was killed at this row
                        frames.add_bytes(len(rows), jpeg)
                        rows.append(row)
            if not rows:
                extract.remove(tmp)
                return f"{folder}: nothing was played, nothing is kept"
            frames.close(len(rows))
            rows = np.array(rows)
            actions, human = rows["action"], rows["human"]
            keep = extract.dense(actions)
            arrays = {"actions": actions, "truth": actions, "keep": keep, "human": human,
                      "confidence": np.ones(len(rows), np.float32)}
            for name, array in arrays.items():
                extract.write_npy(tmp / f"{name}.npy", array)
            clip = extract.read_json(tmp / "recording.json", dict)
            extract.write_json(tmp / "clip.json", {**clip, "n": len(rows)})
        os.replace(tmp, folder)                            # Windows renames no folder that holds an open lock
    for name in ("rows.bin", "recording.json", "lock"):
        extract.remove(folder / name)
    share = f"{human.mean():.0%} by hand, {keep.mean():.0%} kept"
    return f"{folder}: {len(rows)} rows at {clip['fps']:g}/s, {share}"


# ------------------------------------------------------------------------- the picture of it
class View:
    """The picture that the model gets, the pad as it is pressed, and how the time goes, in a window (--show)
    and in a video (--video), at most 30 times a second. A video repeats what could not be drawn in time."""
    SIZE = (912, 512)

    def __init__(self, env, window=False, video=None):
        self.every = math.ceil(env.hz / 30)
        self.window = window and f"play.py: what the model sees of {env.name}"
        if window:
            left, top, zoom = free_room(env.box(), env.capture.screen(), self.SIZE)
            with reading("--show", "a screen for a window"):
                cv2.namedWindow(self.window, cv2.WINDOW_NORMAL | cv2.WINDOW_GUI_NORMAL)
                cv2.resizeWindow(self.window, [int(side * zoom) for side in self.SIZE])
                cv2.moveWindow(self.window, left, top)
                cv2.waitKey(500)                           # it takes the keyboard as it appears
            env.desktop.focus(env.window.id)
        film, self.drawn = ExitStack(), 0
        self.add = film.enter_context(
            extract.video_writer(video, env.hz / self.every, self.SIZE)) if video else nothing
        self.close = film.close                            # finishes the video

    def show(self, tick, env, action, who, score):
        """Draw a tick, each `every`th, and write it down."""
        side = self.SIZE[1]
        page = Image.new("RGB", self.SIZE, "#181818")
        page.paste(Image.fromarray(env.frame).resize((side, side), Image.NEAREST))
        pad = Image.fromarray(extract.draw(extract.shown_pad(), action))
        page.paste(pad, (side, 8), pad)
        pressed = " ".join(b for b in BUTTONS if action[BUTTON[b]] > 0.5)
        text = (f"{who} plays {env.name}\n{score.late} of {score.chunks} predictions late\n"
                f"{score.beat.skipped} ticks skipped\n{pressed}\n{' '.join(env.pad.down)}")
        ImageDraw.Draw(page).text((side + 16, pad.height + 40), text, font_size=16)
        page = np.asarray(page)
        if self.window:
            cv2.imshow(self.window, page[..., ::-1])
            cv2.waitKey(1)
        while self.drawn <= tick // self.every:
            self.add(page)
            self.drawn += 1


def free_room(box, screen, size):
    """Where a window of `size` fits beside a game's box, not over it, where it would be captured -> (left,
    top, how much of its size fits); 40 pixels are for its frame."""
    (left, _, width, _), (x, y, wide, _) = box, screen
    right = left + width + 40
    room, at = max((left - x, x), (x + wide - right, right))
    if room < size[0] / 5:
        raise UserError("--show: expected room beside the game, found none: make its window smaller")
    return at, y + 40, min(room / size[0], 1)


# ----------------------------------------------------------------------- the model elsewhere
CONFIG = {"hz": (1, 1000), "horizon": (1, 65535), "action_shift": (0, 65535)}  # what play needs, its limits


class Refused(UserError):
    """The other side understands the question, and says why it does not answer it."""


class Client:
    """A session on a server: the frames it has seen are its own, other clients have theirs. `timeout`: the
    seconds that it may stay silent. Whatever the server does wrong is one UserError and ends the
    connection."""

    def __init__(self, host="127.0.0.1", port=5555, key=None, timeout=60.0):
        self.where, self.wanted = f"server {host}:{port}", f"an answer within {timeout:g} s"
        self.lock = threading.Lock()
        with reading(self.where, "python sample.py serve there"):
            s = socket.create_connection((host, port))
            s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, int(timeout * 1000) if WINDOWS
                         else struct.pack("ll", int(timeout), int(timeout % 1 * 1e6)))
            self.connection = mpc.Connection(s.detach())
        if key:                                            # each side shows the other that it knows the key
            with self._exchange():
                mpc.answer_challenge(self.connection, key.encode())
                mpc.deliver_challenge(self.connection, key.encode())
        try:
            self.horizon = self.info()["config"]["horizon"]
        except UserError:                                  # the server is full, say
            self.close()
            raise

    @contextmanager
    def _exchange(self):
        """Lends _ask() to one thread."""
        try:
            with self.lock:
                yield self._ask
        except Refused:                                    # the next question may be answered
            raise
        except Exception as e:                             # whatever the other side makes of it
            self.close()
            raise UserError(f"{self.where}: expected {self.wanted}, found: the connection broke "
                            f"({type(e).__name__} {printable(e)}): is it a sample.py serve of this version, "
                            "with the same --key?")

    def _ask(self, header, array=None):
        self.connection.send_bytes(pack_message(header, array))
        message = self.connection.recv_bytes(MESSAGE_LIMIT)
        if message.startswith(b"#CHALLENGE#"):
            raise Refused(f"{self.where}: asks for a key: give its --key")
        header, array = unpack_message(message)
        if "error" in header:
            raise Refused(f"{self.where}: {printable(header['error'])}")
        return header, array

    def predict(self, rgb):
        """uint8 (h, w, 3) -> float32 (T, 25). The frame is shrunk here, so that 200 kB travel and not 6
        MB."""
        with self._exchange() as ask:
            chunk = ask({"do": "predict"}, shrink(rgb))[1]
            if chunk.shape != (self.horizon, A) or (chunk != chunk.clip(LOWEST, 1)).any():       # NaN too
                raise ValueError(f"{chunk.dtype} {chunk.shape} where {self.horizon} actions belong")
        return chunk

    def reset(self, **what):
        """Forget the frames seen so far; seed= and game= as in sample.Session.reset."""
        with self._exchange() as ask:
            ask({"do": "reset", **what})

    def info(self):
        """What sample.Session.info gives; "config" holds the model's hz, horizon and action_shift."""
        with self._exchange() as ask:
            info = ask({"do": "info"})[0]
            config = info["config"]                        # what is no number raises TypeError
            if not all(low <= config[name] <= high for name, (low, high) in CONFIG.items()):
                raise ValueError(config)
        return info

    def close(self):
        """Leave the server. May be called twice."""
        self.connection.close()


def printable(said):
    """What somebody else said, as a part of one line."""
    return "".join(c if c.isprintable() else " " for c in str(said))[:300]


class LocalModel(Client):
    """The model on this machine, in a process of its own: torch's threads and Python's lock then never hold
    up the action clock. That process ends with this one, however this one ends: its pipe closes."""

    def __init__(self, args):
        self.where, self.wanted, self.lock = "the model", "an answer", threading.Lock()
        spawn = get_context("spawn")
        self.connection, theirs = spawn.Pipe()
        spawn.Process(target=answer_all, args=(theirs, args), daemon=True).start()
        theirs.close()
        self.horizon = self.info()["config"]["horizon"]


def answer_all(pipe, args):
    """The life of LocalModel's process: answer as a server until nobody asks. args: the command line."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)           # Ctrl-C is for the player
    from sample import Policy, Session, answer
    with suppress(EOFError, OSError):                      # it has gone
        try:
            policy = Policy(args.ckpt, args.device, args.dtype, args.euler, args.cfg)
            player = Session(policy, args.game, args.seed or 0)
        except Exception as e:                             # whatever a checkpoint may hold
            return pipe.send_bytes(pack_message({"error": printable(e)}))
        while True:
            pipe.send_bytes(answer(player, pipe.recv_bytes()))


# -------------------------------------------------------------------------- the command line
def list_windows(args):
    """What could be named with --exe or --window."""
    windows = this_desktop().windows()
    for w in windows:
        print(f"--exe {w.names[0]:24} --window {w.id:<12} {w.box[2]} x {w.box[3]} at "
              f"{w.box[0]},{w.box[1]}  {w.title!r}")
    if not windows:
        print("no window here: start the game first")


def address(text):
    """HOST:PORT -> (host, port), a type for argparse."""
    host, _, port = text.rpartition(":")
    return host or "127.0.0.1", number(int, 1, 65535)(port)


address.__name__ = "HOST:PORT"                             # argparse says "invalid HOST:PORT value"


def try_map(env):
    """Press each control of the mapping for half a second, and name it."""
    names = *BUTTONS, "left x", "left y", "right x", "right y"
    for place, sign, key in env.bindings + [(STICKS[stick].start, 1, "mouse") for stick in env.mice]:
        print(f"{names[place]} {sign:+d}: {key}", flush=True)
        for value in np.repeat([sign, 0], math.ceil(env.hz / 2)):
            action = neutral()
            action[place] = value
            env.hold(action)


def run_play(args):
    """Play, or let play, until the game ends, --seconds have passed or Ctrl-C."""
    if args.guard:
        return stand_guard(**args.guard)
    for which in signal.SIGINT, signal.SIGTERM:            # each ends as by Ctrl-C, all put right
        signal.signal(which, signal.default_int_handler)
    if args.record:
        pick_up(args.record)
    with ExitStack() as last:
        policy, hz = None, args.hz or 60.0
        if args.server:
            policy = Client(*args.server, args.key)
            policy.reset(seed=args.seed, game=args.game)
        elif args.ckpt:
            policy = LocalModel(args)
        if policy:
            last.callback(policy.close)
            info = policy.info()
            hz = args.hz or info["config"]["hz"]
            print(printable(f"model {info.get('model')}, device {info.get('device')}, {info.get('dtype')}, "
                            f"{info.get('steps')} Euler steps, guidance {info.get('guidance')}, "
                            f"chunks of {policy.horizon} actions"), flush=True)
        pad = "none" if args.human else "keyboard" if args.try_map else args.pad
        env = GameEnv(args.exe, args.window, args.launch, args.wait, pad,
                      args.try_map or args.map, args.pause, hz, args.allow_menu)
        last.callback(env.close)
        if args.try_map:
            return try_map(env)
        people = list(env.real_pads)
        if args.pad == "keyboard" or args.human and not people:
            people.append(Keys(env))
        recorder = view = None
        if args.record:
            recorder = Recorder(args.record, env.name, hz)
            last.callback(lambda: print(recorder.close()))
        if args.show or args.video:
            view = View(env, args.show, args.video)
            last.callback(view.close)
        hotkey = args.hotkey if policy and args.hotkey != "none" else None
        print(f"playing {env.name}: {env.window}, {hz:g} actions/s, pad {pad}, "
              f"pause {args.pause}; Ctrl-C ends it", flush=True)
        play(env, policy, args.seconds, args.actions_per_chunk, people, args.handback, hotkey, recorder, view)


def flags():
    """The parser of the command line."""
    p = extract.ArgumentParser(description="Play with a policy, or record a person.", allow_abbrev=False)
    p.set_defaults(run=run_play)
    positive, add = number(float, 0), p.add_argument
    who = p.add_mutually_exclusive_group(required=True).add_argument
    add("--exe", help="name of the game's program, as the task manager or ps shows it")
    add("--window", metavar="TEXT|ID", help="part of the window's title, or its id from --list")
    add("--launch", help="start the game with this command, after the virtual pad exists")
    add("--wait", type=positive, default=60.0,
        help="seconds to wait for the game's window (default 60)")
    who("--list", dest="run", action="store_const", const=list_windows,
        help="list the windows that can be played, and end")
    who("--ckpt", help="who plays: a .safetensors, or a run folder of train.py; it runs beside this process")
    who("--server", type=address, metavar="HOST:PORT",
        help="or a model on another machine: python sample.py serve --ckpt F --host 0.0.0.0")
    who("--human", action="store_true",
        help="or a person, and nothing is pressed; with --record. Recorded are pads, or the keys of --map "
        "and, where it gives a stick the mouse, its motion; not the wheel, other keys, a pad's own motion")
    who("--try-map", metavar="FILE.json",
        help="or nobody: press each control of a mapping, name it, and end")
    add("--key", help="the server's secret")
    add("--euler", type=number(int, 1), default=PLAY_STEPS,
        help="Euler steps of --ckpt (default %(default)s; 16 in the paper)")
    add("--cfg", type=number(float), default=0.0, help="guidance of --ckpt, see sample.py (default 0 = off)")
    add("--game", metavar="ID|NAME", help="the game for a model that knows games (default: none)")
    add("--seed", type=number(int, 0), help="of the model's noise (default 0)")
    add("--device", default="auto", help="of --ckpt: auto, cpu, cuda, cuda:1, mps (default auto)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32",
        help="of --ckpt's weights; bfloat16 is faster on GPUs, and of large models on CPUs with AVX-512 "
        "(default float32)")
    add("--pad", choices=("vgamepad", "keyboard", "none"), default="vgamepad",
        help="a virtual Xbox 360 pad, keys and mouse, or only watch (default vgamepad)")
    add("--map", metavar="FILE.json", help='keys of --pad keyboard (default: "mapping" in weights/keys.json)')
    add("--hotkey", choices=(*KEYS, "none"), default="f8", metavar="KEY",
        help="the model waits until this key is pressed, and stops at its next press; none = at once "
        "(default f8)")
    add("--allow-menu", action="store_true", help="let the model press START, BACK and GUIDE")
    add("--pause", choices=("none", "suspend", "clock"), default="none",
        help="while the model thinks: none = the game goes on, suspend = its process stands, clock = its "
        "clock stands too (default none)")
    add("--hz", type=number(float, 1, 1000),
        help="actions a second (default: the checkpoint's; 60 for --human)")
    add("--actions-per-chunk", type=number(int, 1),
        help="actions played before the next chunk is asked for (default: half a chunk; all with --pause)")
    add("--handback", type=positive, default=1.0,
        help="seconds without a touch of the real pad after which the model plays on (default 1)")
    add("--seconds", type=positive, default=1e9, help="end after this time (default: never)")
    add("--record",
        help="write a clip folder under DATA, for train.py; one that a killed run left is finished first")
    add("--show", action="store_true", help="a window with what the model sees and presses")
    add("--video", help="the same as a video")
    who("--guard", type=json.loads, help="internal: what to undo, as JSON (class Guard)")
    return p


def main(argv=None):
    """Play."""
    return extract.cli(flags(), argv)


if __name__ == "__main__":
    sys.exit(main())
