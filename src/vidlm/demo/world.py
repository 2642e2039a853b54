"""The demo world: coloured shapes that move, appear and leave, drawn from a seed.

A `Clip` says everything there is to know about a video, so each question about it has one answer
(`questions.py`). `draw_clip` and `draw_pair` sample clips, `render` turns one into frames,
`augment` roughens them as a codec would, `write_mp4` makes a real video file. Coordinates are
fractions of the frame (y points down) and times fractions of the clip, so size does not matter.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from os import PathLike

import av
import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike, NDArray

from vidlm.errors import InvalidArgument
from vidlm.files import replaced

Frames = NDArray[np.uint8]
Floats = NDArray[np.floating]

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = {
    "blue": (40, 80, 255),
    "cyan": (0, 215, 225),
    "green": (30, 175, 50),
    "orange": (255, 135, 0),
    "pink": (255, 135, 200),
    "purple": (150, 40, 200),
    "red": (225, 25, 30),
    "white": (245, 245, 245),
    "yellow": (250, 235, 40),
}
STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}
DIRECTIONS = tuple(STEPS)
SPEEDS = ("slow", "fast")
BACKGROUNDS = ("plain", "gradient", "stripes", "checker", "noise")
EVENTS = ("stays", "appears", "leaves")
DIFFERENCES = ("nothing", "colour", "shape", "direction")

# How far a thing travels in the whole clip, as fractions of the frame: nothing lies between.
TRAVEL = {None: (0.0, 0.0), "slow": (0.12, 0.20), "fast": (0.42, 0.60)}
RADIUS = (0.10, 0.14)
# Late enough to be seen happening, early enough that 8 sampled frames show a thing 3 times or more.
EVENT_TIME = {"stays": (0.0, 0.0), "appears": (0.25, 0.60), "leaves": (0.45, 0.75)}
EVENT_GAP = 0.2
CLEARANCE = 1.15  # centres stay this many summed radii apart; the widest corner reaches 1.14 radii
LUMA = np.array([0.299, 0.587, 0.114], np.float32)


@dataclass(frozen=True)
class Thing:
    """One shape: how it looks, how it moves, and when it is there."""

    shape: str
    colour: str
    direction: str
    speed: str | None  # None when still
    event: str
    event_time: float  # 0.0 when it stays
    start: tuple[float, float]
    end: tuple[float, float]
    radius: float

    def at(self, time: float) -> tuple[float, float]:
        """Centre at a time, whether or not the thing is visible then."""
        (x0, y0), (x1, y1) = self.start, self.end
        return x0 + (x1 - x0) * time, y0 + (y1 - y0) * time

    def span(self) -> tuple[float, float]:
        """First time it is visible, and the time from which it no longer is."""
        if self.event == "appears":
            return self.event_time, 1.0
        return 0.0, self.event_time if self.event == "leaves" else 1.0


@dataclass(frozen=True)
class Clip:
    """Things before a background; `seed` draws the background's tones and pattern."""

    things: tuple[Thing, ...]
    background: str
    seed: int
    seconds: float = 2.0
    fps: int = 12

    @property
    def frames(self) -> int:
        return round(self.seconds * self.fps)


def draw_clip(rng: Generator, *, count: int | None = None, events: bool = True) -> Clip:
    """A random clip of `count` things (1 to 3, uniform unless given), none ever overlapping."""
    if count not in (None, 1, 2, 3):
        raise InvalidArgument(f"count is {count}; a clip has 1, 2 or 3 things, or leave it out")
    count = count or int(rng.integers(1, 4))
    while True:
        things = _draw_things(rng, count, events)
        if things is not None:
            return _before_background(things, rng)


def draw_pair(rng: Generator) -> tuple[Clip, Clip, str]:
    """Two one-thing clips without events, and what differs: one of `DIFFERENCES`.

    In 40 % of pairs nothing but place and background differs, in 30 % the direction, and in 15 %
    each the colour and the shape. Speed is the same except where one of the two stays still.
    """
    difference = str(rng.choice(DIFFERENCES, p=(0.4, 0.15, 0.15, 0.3)))
    first = _draw_look(rng, _choose(rng, SHAPES), _choose(rng, tuple(COLOURS)), events=False)
    second = first
    if difference == "colour":
        second = replace(first, colour=_other(rng, tuple(COLOURS), first.colour))
    elif difference == "shape":
        second = replace(first, shape=_other(rng, SHAPES, first.shape))
    elif difference == "direction":
        direction = _other(rng, DIRECTIONS, first.direction)
        speed = None if direction == "still" else first.speed or _choose(rng, SPEEDS)
        second = replace(first, direction=direction, speed=speed)
    one, two = (_before_background(_place_all([look], rng), rng) for look in (first, second))
    return one, two, difference


def reversed_clip(clip: Clip) -> Clip:
    """The clip as it looks played backwards: left becomes right, appearing becomes leaving."""
    turned = {"left": "right", "right": "left", "up": "down", "down": "up"}
    undone = {"appears": "leaves", "leaves": "appears"}
    things = tuple(
        replace(
            thing,
            direction=turned.get(thing.direction, thing.direction),
            event=undone.get(thing.event, thing.event),
            event_time=0.0 if thing.event == "stays" else 1.0 - thing.event_time,
            start=thing.end,
            end=thing.start,
        )
        for thing in clip.things
    )
    return replace(clip, things=things)


def sampled_times(n_frames: int, n_total: int = 24) -> Floats:
    """Times of frames int(i * n_total / n_frames): the usual arange(0, n, n / N), truncated."""
    if n_frames < 1 or n_total < 1:
        raise InvalidArgument(f"cannot sample {n_frames} of {n_total} frames; both start at 1")
    return np.arange(n_frames) * n_total // n_frames / n_total


def render(
    clip: Clip, size: int, times: ArrayLike | None = None, rng: Generator | None = None
) -> Frames:
    """Frames (F, size, size, 3) at the given times in [0, 1); all of the clip's unless given.

    With `rng` the frames also go through `augment`. Edges are antialiased analytically, about one
    pixel wide, so a small render looks like a large one scaled down.
    """
    if size < 16:
        raise InvalidArgument(f"size is {size}; shapes need frames of at least 16 pixels")
    moments = sampled_times(clip.frames, clip.frames) if times is None else np.asarray(times)
    margin = 3  # boxes around shapes that touch the border reach this far beyond it
    canvas = np.empty((len(moments), size + 2 * margin, size + 2 * margin, 3), np.uint8)
    inside = canvas[:, margin:-margin, margin:-margin]
    inside[:] = background(clip, size)
    for thing in clip.things:
        _paint(canvas, thing, moments, size, margin)
    return np.ascontiguousarray(inside) if rng is None else augment(inside, rng)


def background(clip: Clip, size: int) -> Frames:
    """The clip's static background (size, size, 3): greyish, luma 15 to 95."""
    rng = np.random.default_rng(clip.seed)
    lumas = rng.permutation([rng.uniform(22, 45), rng.uniform(60, 88)])
    tints = rng.uniform(-7, 7, (2, 3))
    tones = (lumas - tints @ LUMA)[:, None] + tints  # (2, 3), tinted without a change of luma
    mix = _pattern(clip.background, rng, size)[..., None]  # (size, size, 1)
    return np.asarray(np.rint(tones[0] + (tones[1] - tones[0]) * mix), np.uint8)


def augment(frames: Frames, rng: Generator) -> Frames:
    """Frames (..., H, W, 3) as if decoded from a coded video; H and W even.

    Blurs chroma towards its 2x2 means, shifts brightness and contrast a little, and adds gaussian
    noise of up to 3 levels to luma, which is where codecs leave it.
    """
    *_, height, width, channels = frames.shape
    if height % 2 or width % 2 or channels != 3:
        raise InvalidArgument(f"frames are {frames.shape}; give (..., even, even, 3)")
    rgb = np.moveaxis(frames, -1, 0).astype(np.float32, order="C")  # planes: numpy's fast layout
    luma = np.tensordot(LUMA, rgb, 1)
    chroma = rgb - luma
    halves = chroma[..., ::2, :] + chroma[..., 1::2, :]
    means = (halves[..., ::2] + halves[..., 1::2]) / 4
    blur = np.float32(rng.uniform())
    chroma += blur * (means.repeat(2, -1).repeat(2, -2) - chroma)
    contrast, brightness = np.float32(rng.uniform(0.94, 1.06)), rng.uniform(-6, 6)
    noise = rng.standard_normal(luma.shape, np.float32) * np.float32(rng.uniform(0, 3))
    luma = luma * contrast + noise + np.float32(128 * (1 - contrast) + brightness + 0.5)
    coded = np.clip(luma + chroma * contrast, 0, 255).astype(np.uint8)  # + 0.5: this cast truncates
    return np.ascontiguousarray(np.moveaxis(coded, 0, -1))


def write_mp4(
    clip: Clip, path: str | PathLike[str], size: int = 192, *, backwards: bool = False
) -> None:
    """Write the clip as h264 (yuv420p, crf 18); `backwards` plays its frames in reverse order."""
    if size % 2:
        raise InvalidArgument(f"size is {size}; yuv420p halves it, so give an even one")
    frames = render(clip, size)
    with replaced(path) as partial, av.open(str(partial), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=clip.fps, options={"crf": "18"})
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for frame in frames[::-1] if backwards else frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


# --- sampling: first what things look like and do, then where there is room for it ---


def _draw_things(rng: Generator, count: int, events: bool) -> tuple[Thing, ...] | None:
    """Placed things, or None where these looks leave no room."""
    shapes = rng.permutation(SHAPES)[:count].tolist()
    if count > 1 and rng.random() < 0.2:
        shapes[1] = shapes[0]
    colours = rng.permutation(list(COLOURS))[:count].tolist()
    looks = [_draw_look(rng, s, c, events) for s, c in zip(shapes, colours, strict=True)]
    for _ in range(30):
        if _apart(looks):
            return _place_all(looks, rng)
        looks = [_draw_time(rng, look) for look in looks]
    return None  # such as three things that all leave: no times lie far enough apart


def _draw_look(rng: Generator, shape: str, colour: str, events: bool) -> Thing:
    """A thing that has no place yet."""
    event = _choose(rng, EVENTS[1:]) if events and rng.random() < 0.35 else "stays"
    direction = _choose(rng, DIRECTIONS)
    # A slow thing seen for half a clip would hardly have moved, so events are for fast and still.
    # Slow ones are drawn more often without events, to be nearly as many as the fast in the end.
    speed: str | None = "slow" if event == "stays" and rng.random() < 0.65 else "fast"
    if direction == "still":
        speed = None
    look = Thing(shape, colour, direction, speed, event, 0.0, (0.0, 0.0), (0.0, 0.0), 0.0)
    return _draw_time(rng, replace(look, radius=float(rng.uniform(*RADIUS))))


def _draw_time(rng: Generator, look: Thing) -> Thing:
    return replace(look, event_time=float(rng.uniform(*EVENT_TIME[look.event])))


def _apart(looks: Iterable[Thing]) -> bool:
    """Whether any two events are far enough apart to tell which is first."""
    times = sorted(look.event_time for look in looks if look.event != "stays")
    return all(later - sooner >= EVENT_GAP for sooner, later in pairwise(times))


def _place_all(looks: Iterable[Thing], rng: Generator) -> tuple[Thing, ...] | None:
    placed: list[Thing] = []
    for look in looks:
        for _ in range(30):
            thing = _place(look, rng)
            if all(_nearest(thing, other) >= CLEARANCE for other in placed):
                placed.append(thing)
                break
        else:
            return None
    return tuple(placed)


def _place(look: Thing, rng: Generator) -> Thing:
    """The thing on a random straight path that lies wholly inside the frame."""
    travel = float(rng.uniform(*TRAVEL[look.speed]))
    start, end = [], []
    for step in STEPS[look.direction]:
        move = step * travel
        begin = rng.uniform(look.radius + max(0.0, -move), 1 - look.radius - max(0.0, move))
        start.append(float(begin))
        end.append(float(begin + move))
    return replace(look, start=(start[0], start[1]), end=(end[0], end[1]))


def _nearest(a: Thing, b: Thing) -> float:
    """Least distance of two centres while both are visible, in summed radii.

    Both move straight and steadily, so the squared distance is a parabola in time.
    """
    since = max(a.span()[0], b.span()[0])
    until = min(a.span()[1], b.span()[1])
    if since >= until:
        return float("inf")
    (ax, ay), (bx, by), (cx, cy), (dx, dy) = a.start, b.start, a.end, b.end
    x, y = bx - ax, by - ay
    vx, vy = dx - cx - x, dy - cy - y
    speed = vx * vx + vy * vy
    time = -(x * vx + y * vy) / speed if speed else since
    time = min(max(time, since), until)
    return float(np.hypot(x + vx * time, y + vy * time)) / (a.radius + b.radius)


def _before_background(things: tuple[Thing, ...] | None, rng: Generator) -> Clip:
    assert things is not None  # a single thing always finds room
    return Clip(things, _choose(rng, BACKGROUNDS), int(rng.integers(2**31)))


def _choose(rng: Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _other(rng: Generator, options: tuple[str, ...], taken: str) -> str:
    return _choose(rng, tuple(option for option in options if option != taken))


# --- painting: each shape is a signed distance from its edge, in radii, negative inside ---


def _circle(x: Floats, y: Floats) -> Floats:
    return np.hypot(x, y) - 1


def _square(x: Floats, y: Floats) -> Floats:
    return np.asarray(np.maximum(np.abs(x), np.abs(y)) - 0.8)


def _triangle(x: Floats, y: Floats) -> Floats:
    """Apex (0, -1), base corners (+-0.95, 0.62): as large as fits, with nearly equal sides."""
    side = (1.62 * np.abs(x) - 0.95 * (y + 1)) / np.hypot(0.95, 1.62)
    return np.asarray(np.maximum(side, y - 0.62))


def _cross(x: Floats, y: Floats) -> Floats:
    longer, shorter = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
    return np.asarray(np.maximum(longer - 1, shorter - 0.3))


def _star(x: Floats, y: Floats) -> Floats:
    """Five tips at radius 1 and notches at 0.42, folded onto one half of one tip."""
    tip, notch = 2 * np.pi / 5, 0.42
    radius, angle = np.hypot(x, y), np.arctan2(x, -y)
    angle = np.abs(angle - tip * np.rint(angle / tip))
    nx, ny = notch * np.sin(tip / 2), notch * np.cos(tip / 2)
    across, along = radius * np.sin(angle), radius * np.cos(angle)
    return np.asarray(((1 - ny) * across + nx * (along - 1)) / np.hypot(nx, 1 - ny))


EDGES = dict(zip(SHAPES, (_circle, _square, _triangle, _star, _cross), strict=True))


def _paint(canvas: Frames, thing: Thing, times: Floats, size: int, margin: int) -> None:
    """Blend the thing into the frames that show it, within its bounding box only."""
    since, until = thing.span()
    (frames,) = np.nonzero((times >= since) & (times < until))
    start, end = np.array([thing.start, thing.end])[..., None]  # (2, 1) each: x and y
    centres = (start + (end - start) * times[frames]).astype(np.float32) * size + margin  # (2, F)
    radius = np.float32(thing.radius * size)
    reach = int(radius) + 2
    box = np.arange(-reach, reach + 1)
    pixels = np.floor(centres).astype(np.intp)[..., None] + box  # (2, F, W): columns and rows
    x, y = (pixels + np.float32(0.5) - centres[..., None]).astype(np.float32) / radius
    distance = EDGES[thing.shape](x[:, None, :], y[:, :, None])  # (F, W, W)
    cover = np.clip(0.5 - distance * radius, 0, 1)[..., None]
    where = frames[:, None, None], pixels[1][:, :, None], pixels[0][:, None, :]
    below = canvas[where].astype(np.float32)
    above = np.asarray(COLOURS[thing.colour], np.float32)
    canvas[where] = (below + (above - below) * cover + 0.5).astype(np.uint8)


def _pattern(kind: str, rng: Generator, size: int) -> Floats:
    """How much of the second tone each pixel has, (size, size) in [0, 1]."""
    axis = (np.arange(size) + 0.5) / size
    angle, period, phase = rng.uniform(0, 2 * np.pi), rng.uniform(0.15, 0.35), rng.uniform(0, 1)
    along = np.cos(angle) * axis[None, :] + np.sin(angle) * axis[:, None]
    if kind == "plain":
        return np.full((size, size), phase)
    if kind == "gradient":
        return np.asarray((along - along.min()) / (along.max() - along.min()))
    if kind == "stripes":
        return _wave(along, period, phase, size)
    if kind == "checker":
        column = _wave(axis[None, :], period, phase, size)
        row = _wave(axis[:, None], period, angle, size)
        return column + row - 2 * column * row
    knots = rng.uniform(0, 1, (7, 7))
    low = (axis * 6).astype(np.intp)
    rest = axis * 6 - low
    smooth = rest * rest * (3 - 2 * rest)
    weights = (1 - smooth)[:, None] * np.eye(7)[low] + smooth[:, None] * np.eye(7)[low + 1]
    return np.asarray(weights @ knots @ weights.T)


def _wave(along: Floats, period: float, phase: float, size: int) -> Floats:
    """A square wave between 0 and 1 whose edges are one pixel wide."""
    turn = (along / period + phase) % 1.0
    from_edge = (np.abs(turn - 0.5) - 0.25) * period  # positive on one half of each turn
    return np.asarray(np.clip(0.5 + from_edge * size, 0, 1))
