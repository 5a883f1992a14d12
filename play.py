"""play.py: any game as an environment, real-time play, and a recorder (NitroGen, arXiv 2601.02427, section 3.2).

    python play.py --exe game.exe --ckpt RUN                        play: a checkpoint of train.py, or nitrogen.safetensors
    python play.py --exe game.exe --server 192.168.1.20:5555        the same with the model on another machine (sample.py serve); no torch here
    python play.py --exe game.exe --human --record DATA             record your own play
    python play.py --list                                           the windows that can be played

In: the picture of a game's window, found by the name of its process. Out: a virtual gamepad, or keys and mouse; with --record a clip folder that
train.py takes (extract.py, "the clip folder"): frames, actions, confidence, keep, truth, and human.npy, bool (n,): the rows in which a person held
the pad, to weight corrections (DAgger); with --video OUT.mp4 what the model saw and pressed.

    from play import Client, GameEnv
    env = GameEnv("game.exe", pad="keyboard")       # Gymnasium's API, a real gymnasium.Env where that package is installed
    policy = Client("192.168.1.20", 5555)           # sample.Session's methods: predict, reset, info
    obs, info = env.reset()                         # uint8 (256, 256, 3)
    obs, reward, terminated, truncated, info = env.step(policy.predict(obs)[0])
    env.close()

Order below: the client, actions to keys, the two desktops (X11, Windows), pads, people, pausing, the guard, the environment, real-time play, the
recorder, the picture of it all, the command line.
"""
import contextlib
import ctypes
import glob
import importlib.util
import json
import multiprocessing.connection as mpc
import os
import queue
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
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np

import extract
from extract import A, BUTTON, BUTTONS, LEGACY, MESSAGE_LIMIT, SIDE, STICKS, UserError, neutral, pack_message, shrink, unpack_message

WINDOWS = sys.platform == "win32"
APART = {"creationflags": 0x200} if WINDOWS else {"start_new_session": True}       # for processes that our Ctrl-C must not reach
MENU = ("BACK", "START", "GUIDE")                  # never pressed without --allow-menu: they pause, quit, or leave the game


# ------------------------------------------------------------------------------------------------------------ the model elsewhere
class Client:
    """A session on a server: the frames it has seen are its own, other clients have theirs. `timeout`: the
    seconds that one question and its answer may take together. Whatever the server does wrong is one
    UserError and ends the connection."""
    connection = None

    def __init__(self, host="127.0.0.1", port=5555, key=None, timeout=60.0):
        self.where, self.timeout, self.lock = f"server {host}:{port}", timeout, threading.Lock()
        try:
            self.connection = mpc.Client((host, port), "AF_INET")
        except (OSError, UnicodeError) as e:               # the last: a host that can't be a name
            raise UserError(f"{self.where}: expected a server, found {e}: start one with "
                            "python sample.py serve") from None
        if key:                                            # each side shows the other that it knows the key
            with self._exchange("leave out --key if the server has none") as connection:
                mpc.answer_challenge(connection, key.encode())
                mpc.deliver_challenge(connection, key.encode())
        try:
            self.horizon = self.info()["config"]["horizon"]
        except UserError:                                  # the server is full, say
            self.close()
            raise

    @contextlib.contextmanager
    def _exchange(self, advice):
        """The connection, shut down under whoever waits on it once `timeout` seconds have passed."""
        if self.connection is None:
            raise UserError(f"{self.where}: the connection is closed: make a new Client")
        timer = threading.Timer(self.timeout, hang_up, [self.connection])
        timer.daemon, ends = True, time.monotonic() + self.timeout
        timer.start()
        try:
            yield self.connection
        except (OSError, EOFError, ValueError, AssertionError, mpc.AuthenticationError) as e:
            self.close()
            if isinstance(e, UserError):
                raise
            if time.monotonic() >= ends:
                fault = (f"expected an answer, found none in {self.timeout:g} s: is it busy, or something "
                         "else on that port?")
            elif isinstance(e, mpc.AuthenticationError):
                fault = "the key is wrong: give the server's --key"
            elif isinstance(e, (OSError, EOFError)):
                fault = f"the connection broke ({str(e) or 'closed by the server'}): {advice}"
            else:                                          # Python 3.11's handshake asserts
                fault = f"expected sample.py serve, found something else ({printable(e)}): check the port"
            raise UserError(f"{self.where}: {fault}") from None
        finally:
            timer.cancel()

    def _ask(self, header, array=None):
        with self.lock, self._exchange("is the server still running?") as connection:
            connection.send_bytes(pack_message(header, array))
            message = connection.recv_bytes(MESSAGE_LIMIT)
            if message.startswith(b"#CHALLENGE#"):
                raise UserError(f"{self.where}: asks for a key: give its --key")
            header, array = unpack_message(message)
        if "error" in header:
            raise UserError(f"{self.where}: {printable(header['error'])}")
        return header, array

    def _need(self, good, expected, found):
        if not good:
            self.close()
            raise UserError(f"{self.where}: expected {expected}, found {printable(found)}: "
                            "is its sample.py of another version?")

    def predict(self, rgb):
        """uint8 (h, w, 3) -> float32 (T, 25). The frame is shrunk here, so that 200 kB travel and not 6 MB."""
        chunk = self._ask({"do": "predict"}, shrink(rgb))[1]
        shape = (self.horizon, A)
        found = "none" if chunk is None else f"{chunk.dtype.name} {chunk.shape}"
        self._need(found == f"float32 {shape}", f"actions, float32 {shape}", found)
        in_range = (np.abs(chunk) <= 1).all() and (chunk[:, :len(BUTTONS)] >= 0).all()     # NaN is not
        self._need(in_range, "buttons in 0..1 and sticks in -1..1", "others, or NaN")
        return chunk

    def reset(self, **what):
        """Forget the frames seen so far; seed= and game= as in sample.Session.reset."""
        self._ask({"do": "reset", **what})

    def info(self):
        """What sample.Session.info gives; "config" holds the model's hz, horizon and action_shift."""
        info = self._ask({"do": "info"})[0]
        config = info.get("config")
        config = config if isinstance(config, dict) else {}
        hz, horizon, shift = (config.get(name) for name in ("hz", "horizon", "action_shift"))
        self._need(type(hz) in (int, float) and 1 <= hz <= 1000 and type(horizon) is type(shift) is int
                   and 1 <= horizon < 1 << 16 and 0 <= shift < 1 << 16,
                   "a config with hz, horizon and action_shift", [hz, horizon, shift])
        return info

    def close(self):
        if self.connection is not None:
            self.connection.close()
            self.connection = None


def hang_up(connection):
    """Shut down the socket in a Connection: whoever waits on it wakes up with an error."""
    with contextlib.suppress(OSError):
        s = socket.socket(fileno=connection.fileno())
        try:
            s.shutdown(socket.SHUT_RDWR)
        finally:
            s.detach()                                     # the number stays the Connection's


def printable(said):
    """What somebody else said, as a part of one line."""
    return "".join(c if c.isprintable() else " " for c in str(said))[:300]


class LocalModel(Client):
    """The model on this machine, in a process of its own: torch's threads and Python's lock then never hold up the action clock. A Client of a
    `sample.py serve` child on a free port; `flags` are that command's."""
    def __init__(self, flags):
        command = [sys.executable, str(Path(__file__).with_name("sample.py")), "serve", "--port", "0", *flags]
        self.child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8",
                                      errors="replace", env={**os.environ, "PYTHONIOENCODING": "utf-8"})
        self.guard, self.last = Guard(model=self.child.pid), ""
        try:
            port = self._port()
            threading.Thread(target=self._listen, daemon=True).start()
            super().__init__("127.0.0.1", port, timeout=600.0)
        except BaseException:
            self.close()
            raise

    def _port(self):
        """The port that the child says it serves on, once its model is loaded."""
        for line in self.child.stdout:
            self.last = line.strip()
            found = re.match(r"serving .* on 127\.0\.0\.1:(\d+)", line)
            if found:
                self.last = ""
                return int(found[1])
        raise UserError(f"the model did not start ({self._ended()})")

    def _listen(self):
        """Read what the child says, or its pipe fills and it stands; the last line tells why it ended."""
        for line in self.child.stdout:
            self.last = line.strip()

    def _ended(self):
        status = self.child.wait(10)
        return self.last.removeprefix("error: ") if status == 2 else f"its process ended with status {status}; last words: {self.last or 'none'}"

    def _ask(self, header, array=None):
        try:
            return super()._ask(header, array)
        except UserError:
            time.sleep(0.1)                                # a killed process takes a moment to be seen as ended
            if self.child.poll() is None:
                raise
            raise UserError(f"the model stopped: {self._ended()}") from None

    def close(self):
        super().close()
        self.child.terminate()
        try:
            self.child.wait(10)
        except subprocess.TimeoutExpired:                  # in the midst of a long chunk
            self.child.kill()
        self.guard.dismiss()


# ------------------------------------------------------------------------------------------------------------- actions and keys
def playable(action, allow_menu=False):
    """What of a prediction, float (25,), may be pressed: buttons 0 or 1, legacy ones 0, the menu's 0 unless allowed, sticks within [-1, 1]."""
    action = np.nan_to_num(np.asarray(action, np.float32), posinf=1, neginf=-1)
    out = np.concatenate([action[:21] > 0.5, np.clip(action[21:], -1, 1)]).astype(np.float32)
    out[[BUTTON[b] for b in LEGACY + (() if allow_menu else MENU)]] = 0
    return out


# A key's name -> (X keysym, Windows virtual key). Letters and digits name themselves on both; mouse1 is the left button, 2 the middle, 3 the right.
KEYS = {"left": ("Left", 0x25), "up": ("Up", 0x26), "right": ("Right", 0x27), "down": ("Down", 0x28), "space": ("space", 0x20), "enter": ("Return", 0x0D),
        "escape": ("Escape", 0x1B), "tab": ("Tab", 0x09), "backspace": ("BackSpace", 0x08), "ctrl": ("Control_L", 0xA2), "shift": ("Shift_L", 0xA0),
        "alt": ("Alt_L", 0xA4), "rctrl": ("Control_R", 0xA3), "rshift": ("Shift_R", 0xA1), "insert": ("Insert", 0x2D), "delete": ("Delete", 0x2E),
        "home": ("Home", 0x24), "end": ("End", 0x23), "pageup": ("Page_Up", 0x21), "pagedown": ("Page_Down", 0x22), "comma": ("comma", 0xBC),
        "period": ("period", 0xBE), "slash": ("slash", 0xBF), "minus": ("minus", 0xBD), "equal": ("equal", 0xBB)}
KEYS |= {c: (c, ord(c.upper())) for c in "abcdefghijklmnopqrstuvwxyz0123456789"} | {f"f{i}": (f"F{i}", 0x6F + i) for i in range(1, 13)}
MOUSE = {"mouse1": 1, "mouse2": 2, "mouse3": 3}
EXTENDED = {"left", "up", "right", "down", "insert", "delete", "home", "end", "pageup", "pagedown", "rctrl"}    # keys whose scan code has a prefix

# How --pad keyboard plays: controls of the pad -> keys; a stick is four keys or the mouse (pixels a second at full tilt). --map FILE.json replaces it.
MAPPING = {"left": {"left": "a", "right": "d", "up": "w", "down": "s"}, "right": {"mouse": 900}, "SOUTH": "space", "EAST": "ctrl", "WEST": "r", "NORTH": "f",
           "LEFT_SHOULDER": "q", "RIGHT_SHOULDER": "e", "LEFT_TRIGGER": "mouse3", "RIGHT_TRIGGER": "mouse1", "LEFT_THUMB": "shift", "RIGHT_THUMB": "c",
           "DPAD_UP": "up", "DPAD_DOWN": "down", "DPAD_LEFT": "left", "DPAD_RIGHT": "right", "START": "escape", "BACK": "tab"}
TILT, REST = 0.5, 0.35                             # a stick presses its key from here on, and holds it until here: no flutter at the border
SIDES = {"left": (0, -1), "right": (0, 1), "up": (1, -1), "down": (1, 1)}              # axis and sign; y is down


def load_mapping(path=None):
    """A mapping file, or MAPPING without one. UserError names the first control or key that does not exist."""
    mapping = extract.read_json(path, dict) if path else MAPPING
    for control, key in mapping.items():
        if control in STICKS and isinstance(key, dict):
            good = all(is_speed(v) if side == "mouse" else side in SIDES and is_key(v) for side, v in key.items())
        else:
            good = control in BUTTON and is_key(key)
        if not good:
            named = [k for k in KEYS if not re.fullmatch(r"[a-z0-9]|f\d+", k)]
            raise UserError(f"{path}: expected a pad's control and a key, found {control!r}: {json.dumps(key)}: controls are {', '.join(BUTTONS)}, left, right "
                            f"(of left, right, up, down, or mouse); keys a-z, 0-9, f1-f12, {', '.join(named)}, {', '.join(MOUSE)}")
    return mapping


def is_key(value):
    """The name of a key or a mouse button?"""
    return isinstance(value, str) and (value in KEYS or value in MOUSE)


def is_speed(value):
    """Pixels a second, of either sign?"""
    return isinstance(value, (int, float)) and abs(value) < 1e5


def keys_in(mapping):
    """All keys that a mapping can press."""
    keys = set()
    for key in mapping.values():
        keys |= {key} if isinstance(key, str) else {k for side, k in key.items() if side in SIDES}
    return keys


def keys_of(mapping, action, down=frozenset()):
    """The set of keys that an action holds; `down`: those held before it, which sticks let go later than they pressed them."""
    keys = {key for control, key in mapping.items() if control in BUTTON and action[BUTTON[control]] > 0.5}
    for stick in STICKS.keys() & mapping.keys():
        for side, key in mapping[stick].items():
            if side in SIDES:
                axis, sign = SIDES[side]
                if action[STICKS[stick]][axis] * sign > (REST if key in down else TILT):
                    keys.add(key)
    return keys


def action_of(mapping, keys):
    """The other way round, for a person at the keyboard: keys -> float32 (25,). A key that several controls name is the first of them."""
    action, keys = neutral(), set(keys)
    for control, key in mapping.items():
        if control in BUTTON and key in keys:
            action[BUTTON[control]] = 1
            keys.discard(key)
        elif control in STICKS:
            for side, k in key.items():
                if side in SIDES and k in keys:
                    axis, sign = SIDES[side]
                    action[STICKS[control].start + axis] += sign
                    keys.discard(k)
    return action


# ------------------------------------------------------------------------------------------------------------------ the desktop
# Two classes with the same methods, X11 and Win32: windows() and box(id) find and follow a window, problem(id) says why its picture can't be trusted,
# focused(id) and focus(id) keep keys out of other windows, key() / move() / held() are the keyboard and mouse, suspend() / resume() stop a process.
@dataclass
class Window:
    """A window that could be a game. Positions are pixels of the whole desktop; the box is the client area: no title bar, no border."""
    id: int
    title: str
    box: tuple                                     # left, top, width, height
    names: list                                    # [(process id, [names])], the window's process first, then those that started it
    kind: str = ""                                 # X11's WM_CLASS, for windows that do not say whose they are

    @property
    def pid(self):
        """The process that the window belongs to, 0 where it does not say."""
        return self.names[0][0] if self.names else 0

    @property
    def name(self):
        """What --exe would find it by: the program, else the window's class; "" for a process that does not let itself be asked."""
        spelled = self.names[0][1] if self.names else self.kind.lower().split("\0")
        return spelled[0] if spelled else ""

    def rank(self, name):
        """How many processes up the tree a name is found, 99 for the window's class, None for nowhere."""
        last = re.split(r"[\\/]", name.lower())[-1]        # of a path
        wanted = {last, last.removesuffix(".exe")}
        for i, (_, names) in enumerate(self.names):
            if wanted & set(names):
                return i
        return 99 if wanted & set(self.kind.lower().split("\0")) else None

    def __str__(self):
        return f"{self.name or '?'} {self.title[:40]!r} (id {self.id})"


def spellings(*names):
    """Process names and paths as people may type them, the plainest first: lower case, last part, with and without an ending."""
    last = [re.split(r"[\\/]", n)[-1].lower() for n in names]
    return [n for name in last for n in dict.fromkeys((name, name.rsplit(".", 1)[0])) if n]


class Attributes(ctypes.Structure):
    """XWindowAttributes of Xlib.h."""
    _fields_ = [*((n, ctypes.c_int) for n in ("x", "y", "width", "height", "border", "depth")), ("visual", ctypes.c_void_p), ("root", ctypes.c_ulong),
                *((n, ctypes.c_int) for n in ("kind", "bits", "gravity", "backing")), ("planes", ctypes.c_ulong), ("pixel", ctypes.c_ulong),
                ("save_under", ctypes.c_int), ("colormap", ctypes.c_ulong), ("installed", ctypes.c_int), ("map_state", ctypes.c_int),
                *((n, ctypes.c_long) for n in ("all_events", "your_events", "no_events")), ("override", ctypes.c_int), ("screen", ctypes.c_void_p)]


class X11:
    """Linux: windows by Xlib, keys by XTEST, processes by /proc and signals; all through ctypes."""
    def __init__(self):
        self.x = self._library("libX11.so.6", "libx11-6")
        P, L, I, S = ctypes.c_void_p, ctypes.c_ulong, ctypes.c_int, ctypes.c_char_p
        for name, result, *arguments in (
                ("XOpenDisplay", P, S), ("XDefaultRootWindow", L, P), ("XQueryTree", I, P, L, P, P, P, P), ("XFree", I, P), ("XFlush", I, P),
                ("XSync", I, P, I), ("XCloseDisplay", I, P), ("XRaiseWindow", I, P, L), ("XStringToKeysym", L, S),
                ("XGetWindowAttributes", I, P, L, P), ("XInternAtom", L, P, S, I), ("XGetWindowProperty", I, P, L, L, *[ctypes.c_long] * 2, I, L, *[P] * 5),
                ("XTranslateCoordinates", I, P, L, L, I, I, P, P, P), ("XGetInputFocus", I, P, P, P), ("XSetInputFocus", I, P, L, I, L),
                ("XKeysymToKeycode", ctypes.c_ubyte, P, L), ("XQueryKeymap", I, P, P), ("XQueryPointer", I, P, L, *[P] * 7)):
            function = getattr(self.x, name)
            function.restype, function.argtypes = result, arguments
        self.display = self.x.XOpenDisplay(None)
        if not self.display:
            found = os.environ.get("DISPLAY", "")
            raise UserError(f"expected an X11 display to capture, found {'none' if not found else f'no answer from DISPLAY={found}'}: "
                            "log in to an X11 session (not Wayland), or set DISPLAY")
        self.ignore = ctypes.CFUNCTYPE(I, P, P)(lambda display, error: 0)                  # windows vanish while they are asked about; the default exits
        self.x.XSetErrorHandler(self.ignore)
        self.root, self.test, self.codes = self.x.XDefaultRootWindow(self.display), None, {}
        self.atom = {n: self.x.XInternAtom(self.display, n.encode(), 0) for n in ("_NET_WM_PID", "WM_CLASS", "_NET_WM_NAME", "WM_NAME")}

    @staticmethod
    def _library(name, package):
        try:
            return ctypes.CDLL(name)
        except OSError:
            raise UserError(f"expected {name}, found none: sudo apt-get install {package}") from None

    def _children(self, window):
        """(parent, children from bottom to top) of a window."""
        root, parent, list_, n = ctypes.c_ulong(), ctypes.c_ulong(), ctypes.POINTER(ctypes.c_ulong)(), ctypes.c_uint()
        if not self.x.XQueryTree(self.display, window, *map(ctypes.byref, (root, parent, list_, n))):
            return 0, []
        children = list_[:n.value]
        if n.value:
            self.x.XFree(list_)
        return parent.value, children

    def _property(self, window, name):
        """The bytes of a property, b"" without it; format 32 comes as C longs."""
        kind, form, n, left, data = ctypes.c_ulong(), ctypes.c_int(), ctypes.c_ulong(), ctypes.c_ulong(), ctypes.c_void_p()
        self.x.XGetWindowProperty(self.display, window, self.atom[name], 0, 256, 0, 0, *map(ctypes.byref, (kind, form, n, left, data)))
        if not data.value:
            return b""
        value = ctypes.string_at(data.value, n.value * {8: 1, 16: 2, 32: ctypes.sizeof(ctypes.c_long)}.get(form.value, 0))
        self.x.XFree(data)
        return value

    def _attributes(self, window):
        a = Attributes()
        return a if self.x.XGetWindowAttributes(self.display, window, ctypes.byref(a)) else None

    def _place(self, window, x=0, y=0):
        """A point of `window` on the root, and the top-level window that lies there."""
        left, top, child = ctypes.c_int(), ctypes.c_int(), ctypes.c_ulong()
        ok = self.x.XTranslateCoordinates(self.display, window, self.root, x, y, *map(ctypes.byref, (left, top, child)))
        return (left.value, top.value, child.value) if ok else None

    def _top(self, window):
        """The child of the root that holds a window: itself, or a window manager's frame."""
        while window and window != self.root:
            parent = self._children(window)[0]
            if parent == self.root:
                return window
            window = parent
        return 0

    def windows(self):
        """Every window on the screen that says whose it is, or at least what class it has."""
        found, todo = [], [(self.root, 0)]
        while todo:
            window, depth = todo.pop()
            todo += [(c, depth + 1) for c in self._children(window)[1]] if depth < 4 else []
            pid, kind = self._property(window, "_NET_WM_PID"), self._property(window, "WM_CLASS")
            if window == self.root or not (pid or kind):
                continue
            box, attributes = self.box(window), self._attributes(window)                   # either is None for one that has vanished meanwhile
            if box and attributes and attributes.map_state == 2 and min(box[2:]) > 1:
                names = self.family(int.from_bytes(pid[:4], "little")) if pid else []
                found.append(Window(window, self._title(window), box, names, kind.decode(errors="replace").strip("\0")))
        return found

    def _title(self, window):
        return (self._property(window, "_NET_WM_NAME") or self._property(window, "WM_NAME")).decode(errors="replace")

    def box(self, window):
        """(left, top, width, height) of the client area on the desktop; None when the window is gone."""
        a = self._attributes(window)
        place = a and self._place(window)
        return place and (*place[:2], a.width, a.height)

    def problem(self, window):
        """Why the picture is not the game's: "" when there is no reason to think so."""
        a, box = self._attributes(window), self.box(window)
        if not a or not box or a.map_state != 2:
            return "is minimised"
        left, top, width, height = box
        mine = self._top(window)
        for x, y in ((0.5, 0.5), (0.2, 0.2), (0.8, 0.2), (0.2, 0.8), (0.8, 0.8)):
            over = self._place(self.root, left + int(width * x), top + int(height * y))[2]
            if over and over != mine:
                return f"is covered by {self._title_in(over) or 'another window'!r}"
        return ""

    def _title_in(self, window):
        """The title of a window, or the first one inside it: a window manager's frame has none of its own."""
        if title := self._title(window):
            return title
        for child in self._children(window)[1]:
            if title := self._title_in(child):
                return title
        return ""

    def focused(self, window):
        """Do keys go to this window? Without a window manager they may go to whatever lies under the pointer."""
        focus, revert = ctypes.c_ulong(), ctypes.c_int()
        self.x.XGetInputFocus(self.display, ctypes.byref(focus), ctypes.byref(revert))
        focus = self._pointer()[0] if focus.value == 1 else focus.value                    # 1: PointerRoot
        return bool(focus) and focus != self.root and (focus == window or self._top(focus) == self._top(window))

    def _pointer(self):
        """The top-level window under the pointer, and the mask of buttons."""
        root, child, mask, places = ctypes.c_ulong(), ctypes.c_ulong(), ctypes.c_uint(), [ctypes.c_int() for _ in range(4)]
        self.x.XQueryPointer(self.display, self.root, *map(ctypes.byref, (root, child, *places, mask)))
        return child.value, mask.value

    def focus(self, window):
        """Bring the window to the front and give it the keyboard."""
        self.x.XRaiseWindow(self.display, window)
        self.x.XSetInputFocus(self.display, window, 2, 0)
        self.x.XSync(self.display, 0)

    def prepare_keys(self, names):
        """Look the keys up once. UserError when XTEST or a key is missing."""
        self.test = self._library("libXtst.so.6", "libxtst6")
        for f, *arguments in (("XTestFakeKeyEvent", ctypes.c_uint, ctypes.c_int), ("XTestFakeButtonEvent", ctypes.c_uint, ctypes.c_int),
                              ("XTestFakeRelativeMotionEvent", ctypes.c_int, ctypes.c_int)):
            getattr(self.test, f).argtypes = [ctypes.c_void_p, *arguments, ctypes.c_ulong]
        self.codes = {n: self.x.XKeysymToKeycode(self.display, self.x.XStringToKeysym(KEYS[n][0].encode())) for n in set(names) - MOUSE.keys()}
        missing = [n for n, code in self.codes.items() if not code]
        if missing:
            raise UserError(f"expected the keys of the mapping on this keyboard, found no {', '.join(missing)}: give another --map")

    def key(self, name, down):
        """Press or release a key or mouse button; seen by the game after flush()."""
        if name in MOUSE:
            self.test.XTestFakeButtonEvent(self.display, MOUSE[name], down, 0)
        else:
            self.test.XTestFakeKeyEvent(self.display, self.codes[name], down, 0)

    def move(self, dx, dy):
        """Move the mouse by whole pixels."""
        self.test.XTestFakeRelativeMotionEvent(self.display, dx, dy, 0)

    def flush(self):
        self.x.XFlush(self.display)

    def held(self):
        """The keys given to prepare_keys and the mouse buttons that are down now, whoever presses them."""
        state = ctypes.create_string_buffer(32)
        self.x.XQueryKeymap(self.display, state)
        mask = self._pointer()[1]
        down = {n for n, code in self.codes.items() if state.raw[code // 8] >> (code % 8) & 1}
        return down | {n for n, number in MOUSE.items() if mask >> (7 + number) & 1}

    def family(self, pid):
        """[(pid, [its names])] of a process and those that started it; a program under Wine or an interpreter also goes by its script's name."""
        found = []
        while pid > 1 and len(found) < 8:
            try:
                comm = Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
                program, *words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
                script = [w for w in words[:2] if not w.startswith("-")][:1]
                status = Path(f"/proc/{pid}/status").read_text(errors="replace")
                found.append((pid, spellings(program or comm, comm, *script)))
            except OSError:
                break
            pid = int(re.search(r"^PPid:\s*(\d+)", status, re.M)[1])
        return found

    def alive(self, pid):
        """Does the process run (or stand still), rather than having ended?"""
        return self._state(pid) not in ("", "Z", "X")

    @staticmethod
    def _state(pid):
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return ""

    def suspend(self, pid):
        """Stop a process, and return when it stands: the signal alone takes milliseconds to arrive."""
        self._signal(pid, signal.SIGSTOP)
        ends = time.perf_counter() + 0.2
        while self._state(pid) not in ("T", "t", "") and time.perf_counter() < ends:
            time.sleep(0.0002)

    def resume(self, pid):
        self._signal(pid, signal.SIGCONT)

    @staticmethod
    def _signal(pid, number):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass
        except PermissionError:
            raise UserError(f"expected a process that may be stopped, found another user's ({pid}): start play.py as that user, or use --pause none") from None


class MouseInput(ctypes.Structure):
    """MOUSEINPUT of winuser.h."""
    _fields_ = [("dx", ctypes.c_int32), ("dy", ctypes.c_int32), *((n, ctypes.c_uint32) for n in ("data", "flags", "time")), ("extra", ctypes.c_size_t)]


class KeyInput(ctypes.Structure):
    """KEYBDINPUT of winuser.h."""
    _fields_ = [("key", ctypes.c_uint16), ("scan", ctypes.c_uint16), ("flags", ctypes.c_uint32), ("time", ctypes.c_uint32), ("extra", ctypes.c_size_t)]


class Either(ctypes.Union):
    """The union in INPUT."""
    _fields_ = [("mouse", MouseInput), ("key", KeyInput)]


class Input(ctypes.Structure):
    """INPUT of winuser.h: kind 0 is the mouse, 1 a key."""
    _fields_ = [("kind", ctypes.c_uint32), ("of", Either)]


class Point(ctypes.Structure):
    """POINT."""
    _fields_ = [("x", ctypes.c_int32), ("y", ctypes.c_int32)]


class Rect(ctypes.Structure):
    """RECT: the far edges, not the size."""
    _fields_ = [(n, ctypes.c_int32) for n in ("left", "top", "right", "bottom")]


class Win32:
    """Windows: the same methods by user32, kernel32 and ntdll. `dll(name)` gives a library; tests give their own."""
    def __init__(self, dll=None):
        dll = dll or (lambda name: ctypes.WinDLL(name, use_last_error=True))
        self.user, self.kernel, self.nt = dll("user32"), dll("kernel32"), dll("ntdll")
        P, I, U = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32
        callback = getattr(ctypes, "WINFUNCTYPE", ctypes.CFUNCTYPE)
        self.Visitor = callback(I, P, P)
        for library, name, result, *arguments in (
                (self.user, "EnumWindows", I, self.Visitor, P), (self.user, "GetWindowThreadProcessId", U, P, P), (self.user, "IsWindow", I, P),
                (self.user, "IsWindowVisible", I, P), (self.user, "IsIconic", I, P), (self.user, "GetClientRect", I, P, P),
                (self.user, "ClientToScreen", I, P, P),
                (self.user, "GetWindowTextW", I, P, P, I), (self.user, "WindowFromPoint", P, Point), (self.user, "GetAncestor", P, P, U),
                (self.user, "GetForegroundWindow", P), (self.user, "SetForegroundWindow", I, P), (self.user, "SendInput", U, U, P, I),
                (self.user, "MapVirtualKeyW", U, U, U), (self.user, "GetAsyncKeyState", ctypes.c_short, I), (self.kernel, "OpenProcess", P, U, I, U),
                (self.kernel, "CloseHandle", I, P), (self.kernel, "QueryFullProcessImageNameW", I, P, U, P, P), (self.kernel, "GetExitCodeProcess", I, P, P),
                (self.nt, "NtSuspendProcess", ctypes.c_long, P), (self.nt, "NtResumeProcess", ctypes.c_long, P)):
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        # Pixels, not scaled units, whatever the display's DPI: per monitor (v2, Windows 10), else for the system as a whole. Refused when already set.
        if not getattr(self.user, "SetProcessDpiAwarenessContext", lambda context: 0)(ctypes.c_void_p(-4)):
            self.user.SetProcessDPIAware()
        self.codes = {}

    def windows(self):
        """Every visible window with an inside. Found by process: titles may be empty or shared (NitroGen issues 7, 12, 38)."""
        handles, found = [], []

        def visit(window, _):
            handles.append(window)
            return 1                                       # go on
        self.user.EnumWindows(self.Visitor(visit), None)
        for window in handles:
            box = self.box(window)
            if self.user.IsWindowVisible(window) and box and (min(box[2:]) > 1 or self.user.IsIconic(window)):
                pid = ctypes.c_uint32()
                self.user.GetWindowThreadProcessId(window, ctypes.byref(pid))
                found.append(Window(window, self._title(window), box, self.family(pid.value)))
        return found

    def _title(self, window):
        text = ctypes.create_unicode_buffer(256)
        self.user.GetWindowTextW(window, text, 256)
        return text.value

    def box(self, window):
        """(left, top, width, height) of the client area on the desktop; None when the window is gone."""
        size, corner = Rect(), Point()
        if not self.user.IsWindow(window) or not self.user.GetClientRect(window, ctypes.byref(size)):
            return None
        self.user.ClientToScreen(window, ctypes.byref(corner))
        return corner.x, corner.y, size.right, size.bottom

    def problem(self, window):
        """Why the picture is not the game's: "" when there is no reason to think so."""
        box = self.box(window)
        if not box or self.user.IsIconic(window):
            return "is minimised"
        left, top, width, height = box
        for x, y in ((0.5, 0.5), (0.2, 0.2), (0.8, 0.2), (0.2, 0.8), (0.8, 0.8)):
            over = self.user.GetAncestor(self.user.WindowFromPoint(Point(left + int(width * x), top + int(height * y))), 2)
            if over and over != self.user.GetAncestor(window, 2):
                return f"is covered by {self._title(over)!r}"
        return ""

    def focused(self, window):
        """Do keys go to this window?"""
        return self.user.GetForegroundWindow() == window

    def focus(self, window):
        """Bring the window to the front and give it the keyboard."""
        self.user.SetForegroundWindow(window)

    def prepare_keys(self, names):
        """Scan codes, since games that read the keyboard by DirectInput see nothing else; Wine sees only the virtual keys beside them."""
        self.codes = {n: self.user.MapVirtualKeyW(KEYS[n][1], 0) & 0xFF for n in set(names) - MOUSE.keys()}

    def key(self, name, down):
        """Press or release a key or mouse button."""
        if name in MOUSE:
            self._send(0, mouse=MouseInput(flags={1: 2, 2: 32, 3: 8}[MOUSE[name]] << (not down)))
        else:
            self._send(1, key=KeyInput(KEYS[name][1], self.codes[name], 8 | (name in EXTENDED) | (0 if down else 2)))

    def move(self, dx, dy):
        """Move the mouse by whole pixels."""
        self._send(0, mouse=MouseInput(dx, dy, flags=1))

    def _send(self, kind, **of):
        event = Input(kind, Either(**of))
        self.user.SendInput(1, ctypes.byref(event), ctypes.sizeof(event))

    def flush(self):
        """SendInput does not wait."""

    def held(self):
        """The keys given to prepare_keys and the mouse buttons that are down now, whoever presses them."""
        virtual = {n: KEYS[n][1] for n in self.codes} | {"mouse1": 1, "mouse2": 4, "mouse3": 2}
        return {n for n, code in virtual.items() if self.user.GetAsyncKeyState(code) & 0x8000}

    def _process(self, pid, access):
        return self.kernel.OpenProcess(access, 0, pid)

    def family(self, pid):
        """[(pid, [its names, none where Windows does not tell])]; there is no tree that could be trusted: a parent's number may be another's by now."""
        handle, size = self._process(pid, 0x1000), ctypes.c_uint32(1024)                   # PROCESS_QUERY_LIMITED_INFORMATION
        path = ctypes.create_unicode_buffer(size.value)
        if handle:
            self.kernel.QueryFullProcessImageNameW(handle, 0, path, ctypes.byref(size))
            self.kernel.CloseHandle(handle)
        return [(pid, spellings(path.value))]

    def alive(self, pid):
        """Does the process run (or stand still), rather than having ended?"""
        handle, status = self._process(pid, 0x1000), ctypes.c_uint32(259)
        if handle:
            self.kernel.GetExitCodeProcess(handle, ctypes.byref(status))
            self.kernel.CloseHandle(handle)
        return bool(handle) and status.value == 259        # STILL_ACTIVE

    def suspend(self, pid):
        """Stop all threads of a process."""
        self._control(pid, self.nt.NtSuspendProcess)

    def resume(self, pid):
        self._control(pid, self.nt.NtResumeProcess)

    def _control(self, pid, function):
        handle = self._process(pid, 0x0800)                # PROCESS_SUSPEND_RESUME
        if not handle:
            raise UserError(f"expected a process that may be stopped, found that Windows refuses it for {pid} (error 5, access denied): "
                            "start play.py as administrator, or use --pause none")
        function(handle)
        self.kernel.CloseHandle(handle)


def this_desktop():
    """The class for this system; UserError elsewhere."""
    if not (WINDOWS or sys.platform.startswith("linux")):
        raise UserError(f"expected Windows or Linux with X11, found {sys.platform}: play there, with the model here (python sample.py serve)")
    return Win32() if WINDOWS else X11()


def find_window(desktop, exe=None, window=None, pid=None):
    """The largest window of the process `exe`, else `pid` (or one that it started), with id or part of the title `window` where given; None when there
    is none. An id goes before a title that has the same digits in it."""
    found = []
    for w in desktop.windows():
        rank = w.rank(exe) if exe else 0
        if pid and not exe:
            family = [p for p, _ in w.names]
            rank = family.index(pid) if pid in family else None
        by_id = window is not None and window.lower() in (str(w.id), hex(w.id))
        by_title = window is None or window.lower() in w.title.lower()
        if rank is not None and (by_id or by_title) and w.pid != os.getpid():
            found.append((not by_id, rank, -w.box[2] * w.box[3], w.id, w))
    return min(found)[-1] if found else None


def await_window(desktop, exe=None, window=None, launched=None, seconds=60.0):
    """find_window(), waiting for a game that is still starting. UserError lists what is there instead."""
    ends, told = time.monotonic() + seconds, False
    wanted = " with ".join(filter(None, (exe, window and f"title or id {window!r}"))) or "the launched program"
    while True:
        found = find_window(desktop, exe, window, launched and launched.pid)
        if found:
            return found
        if time.monotonic() > ends:
            here = ", ".join(map(str, desktop.windows()[:12])) or "none"
            ended = f" (what was launched has ended with status {launched.poll()})" if launched and launched.poll() is not None else ""
            raise UserError(f"no window of {wanted}{ended}; windows here: {here}: start the game in a window or borderless, or name it with --exe or --window")
        if not told:
            print(f"waiting up to {seconds:g} s for a window of {wanted}", flush=True)
            told = True
        time.sleep(0.25)


class Capture:
    """Pictures of a part of the desktop by mss. Whatever lies on top of the game is in them too."""
    def __init__(self, grabber=None):
        if grabber is None:
            try:
                import mss
                grabber = mss.MSS()
            except ImportError:
                raise UserError("expected the package mss for screen capture, found none: pip install mss") from None
            except Exception as e:                         # mss's own, which differ by system
                raise UserError(f"expected a screen to capture, found none ({e}): log in to a desktop session") from None
        self.mss, self.last, self.rgb = grabber, None, None

    def look(self, box):
        """Pixels (left, top, width, height) of the desktop -> uint8 (256, 256, 3) RGB, by training's shrink(). What lies outside of the screen is black."""
        left, top, width, height = box
        screen = self.mss.monitors[0]                      # the whole desktop: several monitors, maybe with negative corners
        x0, y0 = max(left, screen["left"]), max(top, screen["top"])
        x1, y1 = min(left + width, screen["left"] + screen["width"]), min(top + height, screen["top"] + screen["height"])
        if x1 <= x0 or y1 <= y0:
            return np.zeros((SIDE, SIDE, 3), np.uint8)
        try:
            shot = self.mss.grab({"left": x0, "top": y0, "width": x1 - x0, "height": y1 - y0})
        except Exception as e:
            raise UserError(f"expected to capture the screen, found it refused ({e}): was it locked, or its resolution changed? Start again") from None
        # Both buffers live on until the next look: given back each time, their pages cost more than the picture.
        rgb = self.rgb = cv2.cvtColor(np.frombuffer(shot.raw, np.uint8).reshape(shot.height, shot.width, 4), cv2.COLOR_BGRA2RGB, self.rgb)
        self.last = shot
        if (x1 - x0, y1 - y0) != (width, height):
            rgb = cv2.copyMakeBorder(rgb, y0 - top, top + height - y1, x0 - left, left + width - x1, cv2.BORDER_CONSTANT)
        small = shrink(rgb)
        return small.copy() if small is self.rgb else small                                # a window of 256 x 256 needs no shrinking

    def close(self):
        self.mss.close()


# ---------------------------------------------------------------------------------------------------------------------- pads
# What vgamepad calls our buttons. Its Xbox 360 sticks point up at +1, its DualShock 4 ones down (0 is up in that report), on both systems; ours down.
SAME = ("BACK", "START", "GUIDE", "LEFT_SHOULDER", "RIGHT_SHOULDER", "LEFT_THUMB", "RIGHT_THUMB", "DPAD_UP", "DPAD_DOWN", "DPAD_LEFT", "DPAD_RIGHT")
XBOX = {"SOUTH": "A", "EAST": "B", "WEST": "X", "NORTH": "Y", **{b: b for b in SAME}}
SONY = {"SOUTH": "CROSS", "EAST": "CIRCLE", "WEST": "SQUARE", "NORTH": "TRIANGLE", "LEFT_SHOULDER": "SHOULDER_LEFT", "RIGHT_SHOULDER": "SHOULDER_RIGHT",
        "BACK": "SHARE", "START": "OPTIONS", "LEFT_THUMB": "THUMB_LEFT", "RIGHT_THUMB": "THUMB_RIGHT",
        "LEFT_TRIGGER": "TRIGGER_LEFT", "RIGHT_TRIGGER": "TRIGGER_RIGHT"}
COMPASS = {(0, 0): "NONE", (0, -1): "NORTH", (1, -1): "NORTHEAST", (1, 0): "EAST", (1, 1): "SOUTHEAST", (0, 1): "SOUTH", (-1, 1): "SOUTHWEST", (-1, 0): "WEST",
           (-1, -1): "NORTHWEST"}
UP = {"vgamepad": -1, "dualshock": 1}              # the sign of y in each pad's API for our y, which points down


class VirtualPad:
    """A gamepad that games see as a real one: kind "vgamepad" (Xbox 360) or "dualshock"."""
    away, down, window = False, frozenset(), 0             # as in KeyboardPad, but it presses wherever the window is

    def __init__(self, kind="vgamepad"):
        self.kind = kind
        advice = "or use --pad keyboard"
        try:
            import vgamepad
            self.names = vgamepad
            self.pad = vgamepad.VX360Gamepad() if kind == "vgamepad" else vgamepad.VDS4Gamepad()
        except ImportError as e:
            raise UserError(f"expected the package vgamepad for a virtual gamepad, found {e}: pip install vgamepad, {advice}") from None
        except PermissionError:
            raise UserError(f"expected to open /dev/uinput, found permission denied: sudo chmod 0666 /dev/uinput (or a udev rule), {advice}") from None
        except OSError as e:                               # on Linux the import itself ends here without libevdev
            cause = str(e)
            if "libevdev" in cause:
                raise UserError(f"expected libevdev for a virtual gamepad, found none: sudo apt-get install libevdev2, {advice}") from None
            if "uinput" in cause:
                raise UserError(f"expected /dev/uinput for a virtual gamepad, found none: sudo modprobe uinput, {advice}") from None
            raise UserError(f"expected a virtual gamepad, found {cause}: reinstall vgamepad, {advice}") from None
        except RuntimeError as e:                          # on Windows the import itself connects to the driver
            raise UserError(f"expected the driver ViGEmBus for a virtual gamepad, found {e}: install it (github.com/nefarius/ViGEmBus), {advice}") from None
        self.press(neutral())

    def press(self, action):
        """Hold exactly this action, float (25,), in file convention; triggers may lie between 0 and 1."""
        pad, on = self.pad, {b for b in BUTTONS if action[BUTTON[b]] > 0.5}
        pad.reset()
        if self.kind == "vgamepad":
            for b in on & XBOX.keys():
                pad.press_button(getattr(self.names.XUSB_BUTTON, f"XUSB_GAMEPAD_{XBOX[b]}"))
        else:
            for b in on & SONY.keys():
                pad.press_button(getattr(self.names.DS4_BUTTONS, f"DS4_BUTTON_{SONY[b]}"))
            if "GUIDE" in on:
                pad.press_special_button(self.names.DS4_SPECIAL_BUTTONS.DS4_SPECIAL_BUTTON_PS)
            way = ("DPAD_RIGHT" in on) - ("DPAD_LEFT" in on), ("DPAD_DOWN" in on) - ("DPAD_UP" in on)
            pad.directional_pad(getattr(self.names.DS4_DPAD_DIRECTIONS, f"DS4_BUTTON_DPAD_{COMPASS[way]}"))
        pad.left_trigger_float(float(action[BUTTON["LEFT_TRIGGER"]]))
        pad.right_trigger_float(float(action[BUTTON["RIGHT_TRIGGER"]]))
        (lx, ly), (rx, ry) = (action[STICKS[s]].tolist() for s in ("left", "right"))
        pad.left_joystick_float(lx, UP[self.kind] * ly)
        pad.right_joystick_float(rx, UP[self.kind] * ry)
        pad.update()

    def close(self):
        """Let go, then unplug."""
        self.press(neutral())
        self.pad = None


class KeyboardPad:
    """Keys and mouse in place of a pad, for games without one. Presses only while the game's window has the keyboard: anywhere else the
    model would type into whatever the person has turned to."""
    def __init__(self, desktop, mapping=None, hz=60.0):
        self.desktop, self.mapping, self.window, self.away, self.down = desktop, mapping or MAPPING, 0, False, frozenset()
        self.speed = {s: self.mapping[s]["mouse"] / hz for s in STICKS if "mouse" in self.mapping.get(s, {})}      # pixels a tick at full tilt
        self.rest = np.zeros(2)                                                                                    # parts of a pixel still to go
        desktop.prepare_keys(keys_in(self.mapping))

    def press(self, action):
        """Hold exactly this action; the mouse moves by one tick's worth."""
        self.away = bool(self.window) and not self.desktop.focused(self.window)
        if self.away:
            self._hold(frozenset())
        else:
            self._hold(keys_of(self.mapping, action, self.down))
            self._move(action)
        self.desktop.flush()

    def _move(self, action):
        for stick, speed in self.speed.items():
            self.rest += action[STICKS[stick]] * speed
        whole = np.trunc(self.rest).astype(int)
        if whole.any():
            self.desktop.move(*whole.tolist())
            self.rest -= whole

    def _hold(self, keys):
        for key in self.down - keys:
            self.desktop.key(key, 0)
        for key in keys - self.down:
            self.desktop.key(key, 1)
        self.down = frozenset(keys)

    def close(self):
        """Let go of every key."""
        self._hold(frozenset())
        self.desktop.flush()


class NoPad:
    """Presses nothing: a person plays, or one only wants to see what the model would do."""
    away, down, window = False, frozenset(), 0             # as in KeyboardPad, but it presses wherever the window is

    def press(self, action):
        """Nothing."""

    def close(self):
        """Nothing."""


# ------------------------------------------------------------------------------------------------------------ the person's hands
TOUCH = 0.25                                       # a stick or trigger this far out is meant: worn sticks rest at up to half of it
XINPUT = {0x1: "DPAD_UP", 0x2: "DPAD_DOWN", 0x4: "DPAD_LEFT", 0x8: "DPAD_RIGHT", 0x10: "START", 0x20: "BACK", 0x40: "LEFT_THUMB", 0x80: "RIGHT_THUMB",
          0x100: "LEFT_SHOULDER", 0x200: "RIGHT_SHOULDER", 0x1000: "SOUTH", 0x2000: "EAST", 0x4000: "WEST", 0x8000: "NORTH"}
JOYSTICK = {0x130: "SOUTH", 0x131: "EAST", 0x133: "NORTH", 0x134: "WEST", 0x136: "LEFT_SHOULDER", 0x137: "RIGHT_SHOULDER", 0x138: "LEFT_TRIGGER",
            0x139: "RIGHT_TRIGGER", 0x13A: "BACK", 0x13B: "START", 0x13C: "GUIDE", 0x13D: "LEFT_THUMB", 0x13E: "RIGHT_THUMB", 0x220: "DPAD_UP",
            0x221: "DPAD_DOWN", 0x222: "DPAD_LEFT", 0x223: "DPAD_RIGHT"}                   # codes of linux/input-event-codes.h
AXES = {0: 21, 1: 22, 3: 23, 4: 24}                # ABS_X, ABS_Y, ABS_RX, ABS_RY -> places in an action; 2 and 5 are triggers, 16 and 17 the d-pad
XPAD = ([0, 1, 2, 3, 4, 5, 16, 17], [0x130, 0x131, 0x133, 0x134, 0x136, 0x137, 0x13A, 0x13B, 0x13C, 0x13D, 0x13E])     # axes, buttons of an Xbox pad on Linux


def touched(action):
    """Is anything pressed or moved?"""
    return bool((action[:21] > TOUCH).any() or (np.abs(action[21:]) > TOUCH).any())


class Joystick:
    """A pad on Linux, /dev/input/js*: events of 8 bytes (time, value, kind, number)."""
    forward = True                                     # the game looks at our pad, so what the person does is passed on to it

    def __init__(self, path):
        self.file, self.action = os.open(path, os.O_RDONLY | os.O_NONBLOCK), neutral()
        self.axes, self.buttons = XPAD
        swap = True
        try:
            import fcntl
            axes, buttons, name = bytearray(64), bytearray(1024), bytearray(128)
            fcntl.ioctl(self.file, 0x80406A32, axes)       # JSIOCGAXMAP, JSIOCGBTNMAP, JSIOCGNAME
            fcntl.ioctl(self.file, 0x84006A34, buttons)
            fcntl.ioctl(self.file, 0x80806A13, name)
            self.axes, self.buttons, swap = list(axes), list(struct.unpack("512H", buttons)), b"x-box" in name.lower() or b"xbox" in name.lower()
        except OSError:
            pass                                           # not a real device: the layout of an Xbox pad
        self.names = JOYSTICK | ({0x133: "WEST", 0x134: "NORTH"} if swap else {})          # the Xbox driver names X and Y the other way round

    def read(self):
        """The pad now -> float32 (25,)."""
        while True:
            try:
                events = os.read(self.file, 8 * 64)
            except BlockingIOError:
                return self.action.copy()
            except OSError as e:
                raise UserError(f"the gamepad was unplugged ({e.strerror}): plug it in and start again") from None
            for _, value, kind, number in struct.iter_unpack("<IhBB", events[:len(events) // 8 * 8]):
                self._take(value, kind & 0x7F, number)
            if len(events) < 8 * 64:
                return self.action.copy()

    def _take(self, value, kind, number):
        if kind == 1 and number < len(self.buttons) and self.buttons[number] in self.names:
            self.action[BUTTON[self.names[self.buttons[number]]]] = value
        elif kind == 2 and number < len(self.axes):
            axis, v = self.axes[number], max(value / 32767, -1)
            if axis in AXES:
                self.action[AXES[axis]] = v
            elif axis in (2, 5):
                self.action[BUTTON["LEFT_TRIGGER" if axis == 2 else "RIGHT_TRIGGER"]] = (v + 1) / 2
            elif axis in (16, 17):
                low, high = ("DPAD_LEFT", "DPAD_RIGHT") if axis == 16 else ("DPAD_UP", "DPAD_DOWN")
                self.action[[BUTTON[low], BUTTON[high]]] = v < -0.5, v > 0.5

    def close(self):
        os.close(self.file)


class XInput:
    """A pad on Windows, by xinput1_4.dll; `number` 0 to 3."""
    forward = True

    class State(ctypes.Structure):
        """XINPUT_STATE."""
        _fields_ = [("packet", ctypes.c_uint32), ("buttons", ctypes.c_uint16), ("left", ctypes.c_uint8), ("right", ctypes.c_uint8),
                    *((n, ctypes.c_int16) for n in ("lx", "ly", "rx", "ry"))]

    def __init__(self, dll, number):
        self.dll, self.number = dll, number

    def read(self):
        """The pad now -> float32 (25,); XInput's y points up, ours down."""
        s, action = self.State(), neutral()
        if self.dll.XInputGetState(self.number, ctypes.byref(s)):
            raise UserError("the gamepad was unplugged: plug it in and start again")
        for mask, name in XINPUT.items():
            action[BUTTON[name]] = bool(s.buttons & mask)
        action[[BUTTON["LEFT_TRIGGER"], BUTTON["RIGHT_TRIGGER"]]] = s.left / 255, s.right / 255
        action[21:] = np.clip(np.array([s.lx, -s.ly, s.rx, -s.ry]) / 32767, -1, 1)
        return action

    def close(self):
        """Nothing to give back."""


class Keys:
    """A person at the keyboard of a game (a GameEnv) that is played by keys: what is down and not held by us, while the game's window has the
    keyboard: what is typed elsewhere is no play. Mouse movement is not read."""
    forward = False                                        # the game has seen the keys already

    def __init__(self, env):
        self.env = env
        env.desktop.prepare_keys(keys_in(env.mapping))

    def read(self):
        """The keys now, as the action that they mean -> float32 (25,)."""
        env = self.env
        env.pad.away = bool(env.window) and not env.desktop.focused(env.window.id)         # said in the progress line
        return neutral() if env.pad.away else action_of(env.mapping, env.desktop.held() - env.pad.down)

    def close(self):
        """Nothing to give back."""


def real_pads():
    """The gamepads plugged in now. Asked before our own is made, which would look like one of them."""
    if WINDOWS:
        for name in ("xinput1_4", "xinput9_1_0"):
            try:
                dll = ctypes.WinDLL(name)
            except OSError:
                continue
            return [XInput(dll, i) for i in range(4) if not dll.XInputGetState(i, ctypes.byref(XInput.State()))]
        return []
    return [Joystick(path) for path in sorted(glob.glob("/dev/input/js*")) if os.access(path, os.R_OK)]


# -------------------------------------------------------------------------------------------------------------------- pausing
class Running:
    """--pause none: the game goes on while the model thinks."""
    stops = False

    def stop(self):
        """Nothing."""

    def go(self):
        """Nothing."""

    close = go


class Suspended:
    """--pause suspend: the process stands while the model thinks. The system's clock does not: a game that measures time sees the pause as one long
    frame, which engines cap, commonly at 0.1 to 0.25 s."""
    stops = True

    def __init__(self, desktop, pid):
        if any(p == pid for p, _ in desktop.family(os.getpid())):
            raise UserError("expected another program's window, found the terminal that play.py runs in: name the game with --exe")
        self.desktop, self.pid, self.stopped = desktop, pid, False

    def stop(self):
        """Returns when the game stands."""
        if not self.stopped:
            self.stopped = True
            self.desktop.suspend(self.pid)

    def go(self):
        """Let it run on."""
        if self.stopped:
            self.desktop.resume(self.pid)
            self.stopped = False

    def close(self):
        """Let it run on."""
        self.go()


class FakeTime(Suspended):
    """--pause clock on Linux: besides, libfaketime sets the game's clock back by the time that it stood, so that it never sees a pause."""
    def __init__(self, desktop, pid, file):
        super().__init__(desktop, pid)
        self.file, self.offset, self.since = file, 0.0, 0.0

    @staticmethod
    def prepare():
        """(environment for the game, the file that holds its clock's offset). UserError without the library. The file stays: without it the clock
        of a game that runs on would jump."""
        found = [p for d in ("lib/*", "lib", "lib64", "local/lib") for p in glob.glob(f"/usr/{d}/faketime/libfaketimeMT.so.1")]
        if not found:
            raise UserError("expected libfaketime for --pause clock, found none: sudo apt-get install libfaketime, or use --pause suspend")
        handle, path = tempfile.mkstemp(prefix="play_clock_")
        with os.fdopen(handle, "w") as f:
            f.write(FakeTime.text(0.0))
        preload = " ".join(filter(None, [found[0], os.environ.get("LD_PRELOAD")]))
        return {**os.environ, "LD_PRELOAD": preload, "FAKETIME_TIMESTAMP_FILE": path, "FAKETIME_NO_CACHE": "1"}, path

    @staticmethod
    def text(offset):
        """An offset as libfaketime reads it, always as long, so that it can be overwritten in place."""
        return f"{-offset:+020.6f}\n"

    def stop(self):
        if not self.stopped:
            super().stop()
            self.since = time.perf_counter()

    def go(self):
        try:
            if self.stopped:
                self.offset += time.perf_counter() - self.since
                with open(self.file, "r+") as f:           # read again by the game at each look at the clock; it stands now
                    f.write(self.text(self.offset))
        finally:
            super().go()


class SpeedHack:
    """--pause clock on Windows: the package xspeedhack puts a library into the game that scales its clocks; 0 stops them."""
    stops = True
    PIPE = r"\\.\pipe\xspeedhackpipe"                     # the library's own name for it, so one game at a time

    def __init__(self, pid, find=importlib.util.find_spec, run=subprocess.run, pipe=PIPE):
        spec = find("xspeedhack")
        if spec is None:
            raise UserError("expected the package xspeedhack for --pause clock, found none: pip install xspeedhack, or use --pause suspend")
        bits, self.pipe = "32" if self._is_32_bit(pid) else "64", pipe
        files = [p for p in Path(spec.submodule_search_locations[0]).rglob("*") if p.suffix.lower() in (".exe", ".dll")]
        ours = {p.suffix.lower(): p for p in files if bits in p.name}
        if len(ours) < 2:
            names = ", ".join(p.name for p in files) or "nothing"
            raise UserError(f"expected an injector and a library for {bits} bits in xspeedhack, found {names}: reinstall it")
        try:
            done = run([str(ours[".exe"]), str(pid), str(ours[".dll"])], capture_output=True, text=True, errors="replace")
            said = (done.stdout + done.stderr).strip() or f"status {done.returncode}"
        except OSError as e:                               # an injector looks like malware to some
            said = str(e)
        if not self.set_speed(1.0, pipe, tries=30):
            raise UserError(f"expected to load xspeedhack into the game, found it refused ({said}): "
                            "start play.py as administrator; a game with an anti-cheat never allows it: use --pause suspend or none")

    @staticmethod
    def _is_32_bit(pid):
        if not WINDOWS:
            return False
        flag, handle = ctypes.c_int(), ctypes.windll.kernel32.OpenProcess(0x1000, 0, pid)
        ctypes.windll.kernel32.IsWow64Process(ctypes.c_void_p(handle), ctypes.byref(flag))
        ctypes.windll.kernel32.CloseHandle(ctypes.c_void_p(handle))
        return bool(flag.value)

    @staticmethod
    def set_speed(speed, pipe=PIPE, tries=3):
        """Tell the library in the game. False where nobody listens: it is not loaded yet, or the game has ended, which box() will say."""
        for _ in range(tries):
            try:
                with open(pipe, "r+b", buffering=0) as f:
                    f.write(struct.pack("<f", speed))
                return True
            except OSError:
                time.sleep(0.1)
        return False

    def stop(self):
        """The game's clock stands; its loop may go on drawing the same moment."""
        self.set_speed(0.0, self.pipe)

    def go(self):
        """Normal speed."""
        self.set_speed(1.0, self.pipe)

    close = go


class Guard:
    """A second process that outlives this one for a moment: should this one die without a word (killed, crashed, its terminal gone), the guard lets
    go of the keys, lets the game run on and ends our model's process."""
    def __init__(self, **undo):
        self.process = subprocess.Popen([sys.executable, str(Path(__file__).resolve()), "--guard", json.dumps(undo)], stdin=subprocess.PIPE, **APART)

    def dismiss(self):
        """All is put right already. May be called twice."""
        if self.process.poll() is not None:
            return
        try:
            self.process.communicate(b"done", timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            self.process.kill()


def stand_guard(undo):
    """The guard's whole life: wait for the end of our input; without a "done" before it, undo."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.stdin.buffer.read() == b"done":
        return
    undo = json.loads(undo)
    if undo.get("model"):
        with contextlib.suppress(OSError):
            os.kill(undo["model"], signal.SIGTERM)
        return
    desktop = this_desktop()
    if undo.get("keys"):
        desktop.prepare_keys(undo["keys"])
        for key in undo["keys"]:
            desktop.key(key, 0)
        desktop.flush()
    if undo.get("clock") == "xspeedhack":
        SpeedHack.set_speed(1.0)
    elif undo.get("pid"):
        desktop.resume(undo["pid"])
    print("play.py died: its keys are released, the game runs on", file=sys.stderr)


# ------------------------------------------------------------------------------------------------------------- the environment
class GameGone(UserError):
    """The game has ended or closed its window; the message says which."""


def gym_base():
    """gymnasium.Env where that package is installed, else object: GameEnv has the same methods on both."""
    try:
        import gymnasium
    except ImportError:
        return object
    return gymnasium.Env


def box_space(low, high, dtype):
    """gymnasium.spaces.Box, or its four attributes without the package."""
    try:
        from gymnasium.spaces import Box
    except ImportError:
        return SimpleNamespace(low=low, high=high, shape=low.shape, dtype=np.dtype(dtype))
    return Box(low, high, dtype=dtype)


class GameEnv(gym_base()):
    """A game that was made for people, as an environment. Observation: uint8 (256, 256, 3); action: float32 (25,), extract.py's; reward 0 and
    terminated False, unless judge() is overridden; truncated when the game has gone. A step holds the action for 1 / hz seconds of the game's time;
    between steps the game runs on (pause "none") or stands ("suspend", "clock"). close() leaves the pad at rest and the game running."""
    metadata = {"render_modes": ["rgb_array"], "render_fps": 60}
    PATIENCE = 3.0                                         # seconds for a game to open its window anew, as some do when they change their size

    def __init__(self, exe=None, window=None, region=None, launch=None, wait=60.0, pad="vgamepad", mapping=None, pause="none", hz=60.0, wake=None,
                 render_mode=None, desktop=None, capture=None):
        """exe: name of the game's program; window: part of its title, or its id; region: (left, top, width, height) inside of it, or of the desktop
        where neither is given; launch: a command that starts it, waited for `wait` seconds; pad: vgamepad, dualshock, keyboard or none; mapping: a
        file for keyboard; wake: a button to press at the start, for games that look for pads only then."""
        if not (exe or window or region or launch):
            raise UserError("expected the game's --exe, found none: --list shows what runs here; --launch, --window and --region are other ways")
        if hz <= 0:
            raise UserError(f"expected a rate above 0, found {hz:g} Hz: give another --hz")
        if region and min(region[2:]) < 1:
            raise UserError(f"expected a region of a width and height above 0, found {region}: give left,top,width,height")
        self.exe, self.region, self.hz, self.render_mode = exe, region, hz, render_mode
        self.observation_space = box_space(np.zeros((SIDE, SIDE, 3), np.uint8), np.full((SIDE, SIDE, 3), 255, np.uint8), np.uint8)
        self.action_space = box_space(np.float32([0] * 21 + [-1] * 4), np.ones(A, np.float32), np.float32)
        self.undo, self.window, self.frame, self.launched = [], None, np.zeros((SIDE, SIDE, 3), np.uint8), None
        self.look_ms, self.still, self.owed = deque(maxlen=36000), (None, 0.0), 0.0        # owed: game time that steps ran short of
        try:
            self.desktop = desktop or this_desktop()
            self.mapping = load_mapping(mapping)
            self.real_pads = real_pads()                   # before our own is made
            self.undo += [p.close for p in self.real_pads]
            if pad == "keyboard":
                self.pad = KeyboardPad(self.desktop, self.mapping, hz)
            else:
                self.pad = NoPad() if pad == "none" else VirtualPad(pad)
            self.undo.append(self.pad.close)               # and our own before the game starts: some look for pads only then (NitroGen issue 31)
            self.capture = capture or Capture()
            self.undo.append(self.capture.close)
            clock = self._launch(launch, pause == "clock" and not WINDOWS) if launch else None
            if exe or window or launch:
                self.window = await_window(self.desktop, exe, window, self.launched, wait)
                self.desktop.focus(self.window.id)
            self.pause = self._pause(pause, clock)
            self.undo.append(self.pause.close)
            keys = sorted(keys_in(self.mapping)) if pad == "keyboard" else []
            if keys or self.pause.stops:
                hack = "xspeedhack" if WINDOWS and pause == "clock" else ""
                self.undo.insert(0, Guard(keys=keys, pid=self.window.pid if self.pause.stops else 0, clock=hack).dismiss)
            self.pad.window = self.window.id if self.window else 0
            if wake:
                self.hold(np.eye(A, dtype=np.float32)[BUTTON[wake]], 0.1)
                self.hold(neutral(), 0.1)
        except BaseException:
            self.close()
            raise

    def _launch(self, command, fake_clock):
        """Start the game -> the file of its clock's offset with fake_clock, else None."""
        environment, file = FakeTime.prepare() if fake_clock else (None, None)
        try:
            self.launched = subprocess.Popen(command if WINDOWS else shlex.split(command), env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                             stderr=subprocess.DEVNULL, **APART)
        except (OSError, ValueError, IndexError) as e:     # the last: nothing but spaces
            raise UserError(f"expected a command that starts the game, found {command!r}: {getattr(e, 'strerror', None) or e}") from None
        return file

    def _pause(self, pause, clock):
        """The object behind --pause; clock: what _launch() gave."""
        pid = self.window.pid if self.window else 0
        if pause == "none":
            return Running()
        if not pid:
            raise UserError("expected the process of the window, found a window that does not name it: use --pause none, or start the game with --launch")
        if pause == "suspend":
            return Suspended(self.desktop, pid)
        if WINDOWS:
            return SpeedHack(pid)
        if not clock:
            raise UserError("expected a game that play.py starts, to stop its clock, found one that ran already: give --launch COMMAND, or use --pause suspend")
        return FakeTime(self.desktop, pid, clock)

    @property
    def name(self):
        """What the game is called in clips and messages."""
        return self.exe or self.window and self.window.name or "game"

    def box(self):
        """(left, top, width, height) of what is looked at, now. GameGone when there is nothing left to look at."""
        if not self.window:
            return self.region
        box = self.desktop.box(self.window.id)
        if box is None:
            box = self._again()
        return (box[0] + self.region[0], box[1] + self.region[1], *self.region[2:]) if self.region else box

    def _again(self):
        """The window has gone: wait for the same process to open another -> its box."""
        self.pad.press(neutral())
        self.pause.go()                                    # a game that stands opens none
        pid, ends = self.window.pid, time.monotonic() + self.PATIENCE
        while time.monotonic() < ends and (not pid or self.desktop.alive(pid)):
            found = find_window(self.desktop, pid=pid) if pid else None
            if found:
                self.window, self.pad.window = found, found.id
                return found.box
            time.sleep(0.05)
        if pid and not self.desktop.alive(pid):
            raise GameGone(f"{self.name} has ended (process {pid})")
        raise GameGone(f"the window of {self.name} has been closed")

    def look(self):
        """The newest picture -> uint8 (256, 256, 3)."""
        began = time.perf_counter()
        self.frame = self.capture.look(self.box())
        self.look_ms.append((time.perf_counter() - began) * 1e3)
        return self.frame

    def hold(self, action, seconds):
        """Press an action for a while."""
        self.pad.press(action)
        time.sleep(seconds)

    def reset(self, *, seed=None, options=None):
        """Let go of the pad and look. A game starts no new round by itself: options={"actions": float (n, 25)} are played first, at hz, say
        to walk through its menu. The seed is Gymnasium's; no game hears of it."""
        if gym_base() is not object:
            super().reset(seed=seed)
        self.pause.go()
        for action in (options or {}).get("actions", ()):
            self.hold(action, 1 / self.hz)
        self.hold(neutral(), 1 / self.hz)
        self.pause.stop()
        return self.look(), {"away": self.pad.away}

    def step(self, action):
        """Hold an action for one period -> (observation, reward, terminated, truncated, info)."""
        try:
            began = time.perf_counter()
            self.pause.go()
            self.hold(np.asarray(action, np.float32), max(1 / self.hz + self.owed, 0))
            self.pause.stop()
            self.owed = max(self.owed + 1 / self.hz - (time.perf_counter() - began), -1 / self.hz) if self.pause.stops else 0.0
            obs = self.look()
        except GameGone as e:
            return self.frame, 0.0, False, True, {"reason": str(e), "away": True}
        reward, terminated = self.judge(obs)
        return obs, reward, terminated, False, {"away": self.pad.away}

    def judge(self, obs):
        """(reward, terminated) of an observation: to be overridden by who knows the game."""
        return 0.0, False

    def render(self):
        """The last picture, with render_mode "rgb_array"."""
        return self.frame if self.render_mode == "rgb_array" else None

    def problem(self):
        """Why the picture may not be the game's, "" where nothing speaks for it. To be asked about once a second."""
        said, now = self.desktop.problem(self.window.id) if self.window else "", time.monotonic()
        seen, since = self.still
        if seen is None or not np.array_equal(seen, self.frame):
            self.still, since = (self.frame, now), now
        still = now - since
        if said:
            return f"the window of {self.name} {said}: bring it to the front"
        if still >= 2 and self.frame.max() < 8:
            return f"the picture of {self.name} is black: exclusive fullscreen can't be captured, choose borderless or windowed in the game's settings"
        if still >= 5:
            return f"the picture of {self.name} has stood still for 5 s: is the game paused, or in exclusive fullscreen?"
        return ""

    def close(self):
        """The pad at rest, the game running; each is done even where another fails. May be called twice."""
        with contextlib.ExitStack() as last:
            for undo in self.undo:
                last.callback(undo)
            self.undo = []


# --------------------------------------------------------------------------------------------------------------- playing in time
class Beat:
    """The action clock: hz ticks a second. A tick that has passed is skipped, never made up for."""
    def __init__(self, hz):
        self.period, self.start, self.tick, self.skipped, self.late_ms = 1 / hz, None, -1, 0, deque(maxlen=36000)

    def wait(self):
        """Sleep until the next tick -> its number."""
        now = time.perf_counter()
        self.start = now if self.start is None else self.start
        tick = max(self.tick + 1, int((now - self.start) / self.period))
        self.skipped += tick - self.tick - 1
        due = self.start + tick * self.period
        if due > now:
            time.sleep(due - now)
        self.tick = tick
        self.late_ms.append((time.perf_counter() - due) * 1e3)
        return tick

    def shift(self, seconds):
        """Time that does not count: the game stood."""
        self.start += seconds


class Plan:
    """What is pressed at each tick: chunks laid over each other."""
    def __init__(self, hold):
        self.rows, self.last, self.hold = {}, (-1, neutral()), hold

    def lay(self, start, chunk, now):
        """A chunk (T, 25) whose row 0 belongs to tick `start` -> how many of its rows are still to come at tick `now`.

        Its first d = now - start rows are history: others were pressed while it was computed. Over the rest of the older plan it is faded in with
        the soft mask of real-time chunking (arXiv 2506.07339, Eq. 5): the older plan weighs c (e^c - 1) / (e - 1), c falling from 1 after the d
        committed rows to 0 where the older plan ends."""
        d, end = max(now - start, 0), max(self.rows, default=now - 1) + 1 - start          # end: first row that the older plan does not reach
        rows = {}
        for i in range(d, len(chunk)):
            old, row = self.rows.get(start + i), chunk[i]
            if old is not None:
                c = (end - i) / (end - d + 1)
                weight = c * np.expm1(c) / np.expm1(1)
                row = weight * old + (1 - weight) * row
            rows[start + i] = row
        if rows:
            self.rows = {t: a for t, a in self.rows.items() if now <= t < start} | rows    # before the first row, with an action_shift
        return len(rows)

    def left(self, tick):
        """How many ticks after this one are planned."""
        return max(max(self.rows, default=tick) - tick, 0)

    def at(self, tick):
        """The action of a tick. Where predictions are late the last one is held for a moment, then the pad rests."""
        if tick in self.rows:
            self.last = tick, self.rows[tick]
        return self.last[1] if tick - self.last[0] <= self.hold else neutral()


STANDS = 5.0                               # seconds a game stands for a prediction, or thrice the first


class Thinker:
    """The policy in a thread of its own, one prediction at a time (busy: one is under way), so that a late one never stalls the pad."""
    def __init__(self, policy):
        self.policy, self.asked, self.answers, self.busy = policy, queue.Queue(), queue.Queue(), False
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self):
        while (job := self.asked.get()) is not None:
            start, seen, frame = job
            try:
                self.answers.put((start, seen, self.policy.predict(frame)))
            except Exception as e:                         # whatever breaks it: the pad's thread must hear of it
                self.answers.put(e)

    def ask(self, start, seen, frame):
        """Predict from a frame that was seen at time `seen`; row 0 of the chunk belongs to tick `start`."""
        self.busy = True
        self.asked.put((start, seen, frame))

    def answer(self, seconds=0.0):
        """(start, seen, chunk) if it comes within `seconds`, else None; raises what the policy raised."""
        try:
            answer = self.answers.get(timeout=seconds)
        except queue.Empty:
            return None
        self.busy = False
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self):
        self.asked.put(None)


class Score:
    """What is worth knowing of a session, kept as it goes; `delays`: ticks from the last ten questions to their answers."""
    def __init__(self, beat):
        self.beat, self.began, self.ticks, self.chunks, self.late, self.human = beat, time.perf_counter(), 0, 0, 0, 0
        self.press_ms, self.delays = deque(maxlen=36000), deque(maxlen=10)

    def line(self, env):
        """One line: rate, latency from capture to press, jitter of the action clock, cost of looking."""
        def ms(values):
            return f"{np.median(values):.1f} ms (p95 {np.percentile(values, 95):.1f})" if values else "-"
        seconds = time.perf_counter() - self.began
        return (f"{seconds:.0f} s | {self.ticks / max(seconds, 1e-9):.1f} actions/s | {self.chunks} predictions, {self.late} late | capture to press "
                f"{ms(self.press_ms)} | clock late {ms(self.beat.late_ms)}, {self.beat.skipped} skipped | look {ms(env.look_ms)} | "
                f"by hand {self.human / max(self.ticks, 1):.0%}")


def hands_on(people):
    """(person, action) of the first whose pad is touched; (None, the pad at rest) where none is."""
    for person in people:
        action = person.read()
        if touched(action):
            return person, action
    return None, neutral()


def play(env, policy=None, seconds=None, per_chunk=None, people=(), handback=1.0, allow_menu=False, recorder=None, view=None):
    """Play until the game ends, `seconds` have passed or Ctrl-C -> Score. Without a policy a person plays, and nothing is pressed.

    In real time the next chunk is computed from the newest frame while this one plays: asked for after `per_chunk` actions (default: half a chunk),
    or as soon as what is left of the plan lasts no longer than the slowest of the last ten predictions. With a pausing environment
    the game stands while the model thinks, and `per_chunk` actions (default: all) are played of each chunk.

    A touched pad of `people` takes over at once, and until none was touched for `handback` seconds."""
    thinker, shift = None, 0
    if policy:
        config = policy.info()["config"]
        shift, horizon = config["action_shift"], config["horizon"]
        per_chunk = min(per_chunk or (horizon if env.pause.stops else max(horizon // 2, 1)), horizon)
        began = time.perf_counter()
        policy.predict(env.look())                         # the first one takes longest: not while the pad waits
        patience = max(STANDS, 3 * (time.perf_counter() - began))
        policy.reset()
        thinker = Thinker(policy)
    beat, plan, line = Beat(env.hz), Plan(env.hz / 4), extract.Line()
    score, asked, until, told, checked = Score(beat), None, 0.0, "", time.monotonic()      # asked: the tick of the last question
    try:
        while seconds is None or time.perf_counter() - score.began < seconds:
            tick = beat.wait()
            if thinker and env.pause.stops and (asked is None or tick - asked >= per_chunk):
                asked, since = tick, time.perf_counter()
                env.pause.stop()
                thinker.ask(tick, since, env.look())
                plan.rows = {}                             # the game has not moved on: nothing is committed
                answer = thinker.answer(patience)
                if not answer:
                    raise UserError(f"expected a prediction within {patience:.0f} s, found none: the game "
                                    "runs on; see what holds the model up, or use --pause none")
                plan.lay(tick, answer[2], tick)
                env.pause.go()
                score.chunks += 1
                beat.shift(time.perf_counter() - since)
            answer = thinker and not env.pause.stops and thinker.answer()
            if answer:
                start, when, chunk = answer
                score.delays.append(tick - start)
                score.chunks += 1
                in_time = plan.lay(start + shift, chunk, tick)
                score.late += not in_time
            action = playable(plan.at(tick), allow_menu)
            person, theirs = hands_on(people)
            if person:
                until = time.monotonic() + handback
            by_hand = not policy or time.monotonic() < until
            if by_hand:
                action = theirs
                env.pad.press(theirs if policy and person and person.forward else neutral())
            else:
                env.pad.press(action)
            if answer and in_time:
                score.press_ms.append((time.perf_counter() - when) * 1e3)
            seen, frame = time.perf_counter(), env.look()
            if thinker and not env.pause.stops and not thinker.busy and (
                    asked is None or tick - asked >= per_chunk or plan.left(tick) <= max(score.delays, default=0) + 1):
                asked = tick
                thinker.ask(tick, seen, frame)
            score.ticks, score.human = score.ticks + 1, score.human + by_hand
            if recorder:
                recorder.add(tick, frame, neutral() if env.pad.away else action, by_hand)
            if view:
                view.show(tick, frame, action, [env.name, "a person plays" if by_hand else "the model plays"], score)
            if time.monotonic() - checked >= 1:
                checked = time.monotonic()
                told = report(env, score, told, line)
    except GameGone as e:
        print(f"\n{e}; the pad is at rest", file=sys.stderr)
    finally:
        with contextlib.suppress(UserError, OSError):
            env.pad.press(neutral())
            env.pause.go()                                 # now, not when the recording has been written
        line.show(score.line(env), keep=True)
        if thinker:
            thinker.close()
    return score


def report(env, score, told, line):
    """The progress line, and what is wrong with the picture or the pace, unless that was said last (told) -> what is wrong, "" for nothing."""
    wrong = env.problem()
    if not wrong and env.pad.away:
        wrong = f"the window of {env.name} is not in front: no key counts until it is"
    if not wrong and score.late >= 5 and score.late > score.chunks / 2:
        wrong = "most predictions come after the actions they hold: use --pause suspend, fewer --euler steps, a lower --hz or a faster device"
    if wrong and wrong != told:
        print(f"\n{wrong}", file=sys.stderr, flush=True)
    line.show(score.line(env))
    return wrong


# ----------------------------------------------------------------------------------------------------------------- the recorder
ROW = np.dtype([("end", "<i8"), ("action", "<f4", A), ("human", "?")])       # end: of its JPEG in frames.npy


class Recorder:
    """A clip folder of what is seen and pressed, DATA/GAME_DATE_TIME/. Row i is tick i: the picture taken
    right after the action was pressed, which can't show its effect yet, as in videos with an overlay.

    Until close() the folder's name ends in .recording. Each row goes to the system as it comes, its JPEG to
    the end of frames.npy and then a ROW to the end of rows.bin: a process that is killed loses the row it is
    at, and pick_up() makes a clip of the others. A lock tells a dead process's folder from a living one's."""
    def __init__(self, data, game, hz):
        stem = re.sub(r"[^\w.-]+", "_", Path(game).stem) + time.strftime("_%Y%m%d_%H%M%S")
        self.tmp, self.files = Path(data) / f"{stem}.recording", contextlib.ExitStack()
        self.count, self.first, self.last = 0, None, None
        with writing(self.tmp):
            self.tmp.mkdir(parents=True)
            self.files.enter_context(extract.lock(self.tmp / "lock"))
            clip = {"video": None, "game": game, "fps": hz, "size": [SIDE, SIDE], "every": 1, "lag": 0}
            extract.write_json(self.tmp / "recording.json", clip)
            self.frames = self.files.enter_context(open(self.tmp / "frames.npy", "wb"))
            self.rows = self.files.enter_context(open(self.tmp / "rows.bin", "wb"))
            bytes_header(self.frames, 0)

    def add(self, tick, rgb, action, human):
        """Append tick `tick`; ticks that were skipped repeat the row before, so that the clip keeps time."""
        self.first = tick if self.first is None else self.first
        while self.count < tick - self.first:
            self._append(*self.last)
        quality = [cv2.IMWRITE_JPEG_QUALITY, extract.QUALITY]
        jpeg = cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), quality)[1].tobytes()
        self.last = jpeg, playable(action, allow_menu=True), human
        self._append(*self.last)

    def _append(self, jpeg, action, human):
        with writing(self.tmp):
            self.frames.write(jpeg)
            self.frames.flush()
            self.rows.write(np.array((self.frames.tell(), action, human), ROW).tobytes())
            self.rows.flush()
        self.count += 1

    def close(self):
        """Give the folder its name -> a line about it."""
        with contextlib.suppress(OSError):                 # a full disk, which was said when it was
            self.files.close()
        return finish(self.tmp)


def pick_up(data):
    """Make clips of the recordings under DATA whose processes died, and say so."""
    for tmp in sorted(Path(data).glob("*.recording")):
        with contextlib.suppress(extract.Busy):            # its process lives
            print(f"picked up {finish(tmp)}", flush=True)


def finish(tmp):
    """Make a clip of a recording that nobody writes on -> a line about it. May be killed and done again."""
    folder = tmp.with_suffix("")
    with writing(tmp):
        with extract.lock(tmp / "lock"):
            rows = np.fromfile(tmp / "rows.bin", ROW) if (tmp / "rows.bin").exists() else np.zeros(0, ROW)
            rows = rows[rows["end"] <= (tmp / "frames.npy").stat().st_size] if len(rows) else rows
            keep = write_clip(tmp, rows) if len(rows) else None
        if keep is None:
            extract.remove(tmp)
            return f"{folder}: nothing was played, nothing is kept"
        os.replace(tmp, folder)                            # Windows renames no folder that holds an open lock
    for name in ("rows.bin", "recording.json", "lock"):
        extract.remove(folder / name)
    return (f"{folder}: {len(rows)} rows at {extract.read_clip(folder)['fps']:g}/s, "
            f"{rows['human'].mean():.0%} by hand, {keep.mean():.0%} kept")


def write_clip(tmp, rows):
    """The files of a clip, from its ROWs and the JPEGs in frames.npy -> its array keep, bool (n,)."""
    actions, sure, n = rows["action"], np.ones(len(rows), np.float32), len(rows)
    with open(tmp / "frames.npy", "rb+") as file:
        start, end = bytes_header(file, 0), rows["end"][-1]
        bytes_header(file, end - start)
        file.truncate(end)
        index = np.stack([np.arange(n + 1), np.append(start, rows["end"]) - start], 1)
        os.fsync(file.fileno())
    keep = extract.dense(actions, sure)
    for name, array in (("frames_index", index), ("actions", actions), ("truth", actions),
                        ("confidence", sure), ("keep", keep), ("human", rows["human"])):
        extract.write_npy(tmp / f"{name}.npy", array)
    extract.write_json(tmp / "clip.json", {**extract.read_json(tmp / "recording.json", dict), "n": n})
    return keep


def bytes_header(file, n):
    """Write the header of a .npy of n bytes at the start of a file -> where the bytes begin, for any n."""
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (int(n),)})
    return file.tell()


@contextlib.contextmanager
def writing(path):
    """A disk that is full, or closed to us, in one line."""
    try:
        yield
    except OSError as e:
        raise UserError(f"can't write {path}: {e.strerror or e}: what is whole is kept; make room and start "
                        "again with the same --record, or give another") from None


# ----------------------------------------------------------------------------------------------------------------- what it sees
class View:
    """The picture that the model gets, the pad as it is pressed, and how the time goes, in a window (--show) and in a video (--video). Drawn
    in a thread, at most 30 times a second; what it can't draw in time is left out: the video repeats the picture that follows."""
    SIZE = (832, 512)

    def __init__(self, hz, window=False, video=None, beside=None):
        self.every, self.window, self.beside, self.first = int(np.ceil(hz / 30)), window, beside, None
        self.video = extract.VideoWriter(video, hz / self.every, self.SIZE) if video else None
        look = extract.Look((150, 152, 160), None, 2, (24, 24, 28), (255, 255, 255), True, (18, 18, 20), (30, 30, 34), (255, 236, 90))
        self.skin, self.jobs, self.written, self.error = extract.pad_skin("xbox_360", "xbox_360", look), queue.Queue(8), 0, None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def show(self, tick, frame, action, lines, score):
        """Give one tick to the drawing thread."""
        if tick % self.every == 0:
            seconds = max(time.perf_counter() - score.began, 1e-9)
            latest = f"{score.press_ms[-1]:.0f} ms capture to press" if score.press_ms else "capture to press: -"
            lines = [*lines, f"{score.ticks / seconds:.1f} actions/s", latest, f"{score.late} of {score.chunks} predictions late",
                     f"{score.beat.skipped} ticks skipped"]
            with contextlib.suppress(queue.Full):
                self.jobs.put_nowait((tick // self.every, frame, action.copy(), lines))

    def _run(self):
        while (job := self.jobs.get()) is not None:        # to the end, or close() would wait for a place in the queue
            if not self.error:
                try:
                    self._draw(*job)
                except Exception as e:                     # whatever breaks it: play goes on without it, and close() says so
                    self.error = " ".join(str(e).split()) or repr(e)

    def _draw(self, number, frame, action, lines):
        w, h = self.SIZE
        canvas = np.full((h, w, 3), 24, np.uint8)
        canvas[:, :h] = cv2.resize(frame, (h, h), interpolation=cv2.INTER_NEAREST)
        pad = extract.draw(self.skin, action)
        pad = cv2.resize(pad, (w - h, pad.shape[0] * (w - h) // pad.shape[1]), interpolation=cv2.INTER_AREA)
        spot, alpha = canvas[8:8 + pad.shape[0], h:], pad[..., 3:].astype(np.float32) / 255
        spot[:] = pad[..., :3] * alpha + spot * (1 - alpha)
        for i, line in enumerate(lines):
            text, at = line[:38].encode("ascii", "replace").decode(), (h + 16, pad.shape[0] + 48 + 28 * i)
            cv2.putText(canvas, text, at, cv2.FONT_HERSHEY_SIMPLEX, 0.5, (220, 220, 220), 1, cv2.LINE_AA)
        if self.video:
            self.first = number if self.first is None else self.first
            while self.written <= number - self.first:
                self.video.add(canvas)
                self.written += 1
        if self.window:
            if self.beside:                                # beside the game: on top of it, it would be captured
                cv2.namedWindow("play.py", cv2.WINDOW_AUTOSIZE | cv2.WINDOW_GUI_NORMAL)
                cv2.moveWindow("play.py", *self.beside)
                self.beside = None
            cv2.imshow("play.py", cv2.cvtColor(canvas, cv2.COLOR_RGB2BGR))
            cv2.waitKey(1)

    def close(self):
        """Finish the video; UserError when drawing failed on the way."""
        self.jobs.put(None)
        self.thread.join(10)
        if self.video:
            self.video.close()
        if self.error:
            raise UserError(f"the picture of it all stopped: {self.error}: leave out --show or --video")


# -------------------------------------------------------------------------------------------------------------- the command line
def list_windows():
    """What could be named with --exe or --window."""
    windows = this_desktop().windows()
    for w in windows:
        print(f"--exe {w.name or '?':24} --window {w.id:<12} {w.box[2]} x {w.box[3]} at {w.box[0]},{w.box[1]}  {w.title!r}")
    if not windows:
        print("no window here: start the game first")


def policy_of(args):
    """The policy that the flags ask for: on a server, in a process of our own, or None with --human alone."""
    if args.server:
        host, _, port = args.server.rpartition(":")
        if not port.isdecimal() or len(port) > 5 or not 0 < int(port) < 1 << 16:
            raise UserError(f"expected --server HOST:PORT, found {args.server!r}: sample.py serve prints both")
        policy = Client(host or "127.0.0.1", int(port), args.key)
        if args.game is not None or args.seed:
            policy.reset(seed=args.seed, **({"game": args.game} if args.game else {}))
        return policy
    if not args.ckpt:
        return None
    flags = ["--ckpt", args.ckpt, "--seed", str(args.seed), "--device", args.device, "--dtype", args.dtype, "--cfg", str(args.cfg)]
    return LocalModel([*flags, *(["--game", args.game] if args.game else []), *(["--euler", str(args.euler)] if args.euler else [])])


def region_of(text):
    """--region left,top,width,height -> tuple."""
    try:
        left, top, width, height = map(int, text.split(","))
        if max(abs(left), abs(top), width, height) >= 1 << 15:
            raise ValueError("beyond any desktop")
    except ValueError:
        raise UserError(f"expected --region LEFT,TOP,WIDTH,HEIGHT in pixels, found {text!r}") from None
    return left, top, width, height


def run(args):
    """Play, or let play, until the game ends, --seconds have passed or Ctrl-C."""
    if args.guard:
        return stand_guard(args.guard)
    if args.list:
        return list_windows()
    extract.within(args, 1 if args.record else 0.1, 1000, "hz")          # 1: the slowest clip that train.py takes
    extract.within(args, 1, None, "actions_per_chunk", "euler")
    extract.within(args, 0, None, "wait", "handback", "seconds")
    if not (args.ckpt or args.server or args.human):
        raise UserError("expected who plays, found nobody: give --ckpt FILE, --server HOST:PORT or --human")
    if args.ckpt and args.server:
        raise UserError("expected one model, found --ckpt and --server: leave one out")
    if args.human and (args.ckpt or args.server):
        raise UserError("expected one player, found --human and a model: leave out --human; any touch of your pad takes over from the model")
    region = args.region and region_of(args.region)

    def end(*_):
        raise KeyboardInterrupt                            # the same end as by Ctrl-C, everything put right
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):   # a background job's Ctrl-C is ignored
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), end)
    if args.record:
        pick_up(args.record)
    with contextlib.ExitStack() as last:
        policy = policy_of(args)
        if policy:
            last.callback(policy.close)
        hz = args.hz or (policy.info()["config"]["hz"] if policy else 60.0)
        pad = "none" if args.human else args.pad
        env = GameEnv(args.exe, args.window, region, args.launch, args.wait, pad, args.map, args.pause, hz, args.wake)
        last.callback(env.close)
        people = list(env.real_pads)
        if args.pad == "keyboard" or args.human and not people:
            people.append(Keys(env))
        recorder = Recorder(args.record, env.name, hz) if args.record else None
        if recorder:
            last.callback(lambda: print(recorder.close()))
        view = None
        if args.show or args.video:
            left, top, width, _ = env.box()
            view = View(hz, args.show, args.video, (left + width + 8, top))
            last.callback(view.close)
        print(f"playing {env.name}: {env.window or f'region {env.region}'}, {hz:g} actions/s, pad {pad}, pause {args.pause}; Ctrl-C ends it", flush=True)
        play(env, policy, args.seconds, args.actions_per_chunk, people, args.handback, args.allow_menu, recorder, view)


def flags():
    """The parser of the command line."""
    p = extract.Parser(description="Play a game with a policy, or record a person who plays it.", allow_abbrev=False)
    p.set_defaults(run=run)
    add = p.add_argument_group("the game").add_argument
    add("--exe", help="name of the game's program, as the task manager or ps shows it; its largest window is played")
    add("--window", metavar="TEXT|ID", help="part of the window's title, or its id from --list, to choose among several")
    add("--region", metavar="L,T,W,H", help="left, top, width, height of a part of the window, or of the desktop without --exe and --window (default: all)")
    add("--launch", metavar="CMD", help="start the game with this command, after the virtual pad exists")
    add("--wait", type=float, default=60.0, metavar="S", help="seconds to wait for the game's window (default 60)")
    add("--list", action="store_true", help="list the windows that can be played, and end")
    add = p.add_argument_group("who plays").add_argument
    add("--ckpt", help="a .safetensors, or a run folder of train.py: the model runs in a process beside this one")
    add("--server", metavar="HOST:PORT", help="the model runs on another machine: python sample.py serve --ckpt F --host 0.0.0.0")
    add("--key", help="the server's secret")
    add("--human", action="store_true", help="a person plays and nothing is pressed; with --record")
    add("--euler", type=int, metavar="K", help="Euler steps of --ckpt (default: the checkpoint's)")
    add("--cfg", type=float, default=0.0, metavar="S", help="guidance of --ckpt, see sample.py (default 0 = off)")
    add("--game", metavar="ID|NAME", help="the game for the model, where the checkpoint knows games (default: none)")
    add("--seed", type=int, default=0, help="of the model's noise (default 0)")
    add("--device", default="auto", help="of --ckpt: auto, cpu, cuda, cuda:1, mps (default auto)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of --ckpt's weights and activations (default float32)")
    add = p.add_argument_group("how it is played").add_argument
    add("--pad", choices=("vgamepad", "dualshock", "keyboard", "none"), default="vgamepad",
        help="virtual Xbox 360 or DualShock 4 pad, keys and mouse, or only watch (default vgamepad)")
    add("--map", metavar="FILE.json", help="the keys of --pad keyboard, as MAPPING in this script (default: that)")
    add("--wake", choices=[b for b in BUTTONS if b not in LEGACY], help="press this button once at the start, for games that look for pads only then")
    add("--allow-menu", action="store_true", help="let the model press START, BACK and GUIDE (default: never)")
    add("--pause", choices=("none", "suspend", "clock"), default="none",
        help="while the model thinks: none = the game goes on, suspend = its process stands, clock = its clock stands too (default none)")
    add("--hz", type=float, help="actions a second (default: the checkpoint's; 60 for --human)")
    add("--actions-per-chunk", type=int, metavar="N", help="actions played before the next chunk is asked for (default: half a chunk; all of it with --pause)")
    add("--handback", type=float, default=1.0, metavar="S", help="seconds without a touch of the real pad after which the model plays on (default 1)")
    add("--seconds", type=float, metavar="S", help="end after this time (default: never)")
    add = p.add_argument_group("what is kept and shown").add_argument
    add("--record", metavar="DATA",
        help="write a clip folder under DATA, for train.py; one that a killed run left is finished first")
    add("--show", action="store_true", help="a window with what the model sees and presses")
    add("--video", metavar="OUT.mp4", help="the same as a video")
    add("--guard", help="internal: what to undo, as JSON (class Guard)")
    return p


def main(argv=None):
    """Play."""
    return extract.cli(flags(), argv)


if __name__ == "__main__":
    sys.exit(main())
