"""Which frames to take: pure functions from presentation times to row numbers.

`FramePolicy` says how many and from where, checked when it is made; `choose` applies it. No array
here grows with a number that a caller picks (a rate, a count): each is at most as long as the clip.
"""

from __future__ import annotations

import math
import operator
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vidlm.errors import InvalidArgument

Rows = NDArray[np.int64]
Times = NDArray[np.float64]

# Matroska and FLV round times to 1 ms: a frame meant for 2/30 s is stamped 0.067 and would miss
# the tick at 0.0667. That frame and the first one may each be half a millisecond off.
_STAMP_ROUNDING = 1e-3 + 1e-6
# Beyond any clip's, so that times multiplied or divided by a rate stay finite.
_SLOWEST, _FASTEST = 1e-9, 1e6

_PART = r"[0-5]?\d"
_CLOCK = re.compile(
    rf"(?:(?P<h>\d+):(?P<m>{_PART}):|(?P<mm>\d+):)(?P<s>{_PART}(?:\.\d*)?)|(?P<ss>\d+(?:\.\d*)?)",
    re.ASCII,
)


@dataclass(frozen=True)
class FramePolicy:
    """Which frames of a clip to take; the defaults take every frame.

    num_frames: that many, evenly spread (`uniform_arange`); all where the clip has fewer.
    fps: the frame on screen every 1/fps seconds (`by_fps`). Excludes num_frames.
    max_frames: a ceiling on any of them; more are thinned evenly over the same span.
    start, end: only frames on screen in [start, end): seconds from the beginning of the clip, or
        "mm:ss", "hh:mm:ss", each with an optional fraction.

    Raises InvalidArgument for a value or a combination that makes no sense.
    """

    num_frames: int | None = None
    fps: float | None = None
    max_frames: int | None = None
    start: float | str | None = None
    end: float | str | None = None

    def __post_init__(self) -> None:
        if self.num_frames is not None and self.fps is not None:
            raise InvalidArgument(
                f"num_frames={self.num_frames!r} and fps={self.fps!r} exclude each other; "
                "give one of them (max_frames caps what fps yields)"
            )
        _count("num_frames", self.num_frames)
        _count("max_frames", self.max_frames)
        if self.fps is not None and _number("fps", self.fps) <= 0:
            raise InvalidArgument(f"fps={self.fps!r} is not above 0; give frames a second, as 0.5")
        start, end = self.window
        if end is not None and (start or 0.0) >= end:
            raise InvalidArgument(
                f"start={start or 0:g} s is not before end={end:g} s; "
                "give start < end, or leave one of them out"
            )

    @property
    def window(self) -> tuple[float | None, float | None]:
        """start and end in seconds."""
        return seconds("start", self.start), seconds("end", self.end)


def choose(pts: Times, policy: FramePolicy, *, stop: float) -> Rows:
    """The rows of `pts` (ascending, seconds) that `policy` takes: ascending, at least one.

    stop: when the last frame leaves the screen.
    Raises InvalidArgument where no frame is on screen between the policy's start and end.
    """
    start, end = policy.window
    first, last = between(pts, start, end, stop=stop)
    n = last - first
    if policy.num_frames is not None:
        return first + uniform_arange(n, min(policy.num_frames, policy.max_frames or n))
    rows = np.arange(n)
    if policy.fps is not None:
        until = stop if end is None else min(stop, end)
        rows = by_fps(pts[first:last], policy.fps, start=start, stop=until)
    return first + rows[uniform_linspace(len(rows), policy.max_frames or len(rows))]


def uniform_arange(n: int, count: int) -> Rows:
    """int(i * n / count) for i below count: where `count` equal parts begin; all if count > n."""
    count = min(n, count)
    return np.arange(count, dtype=np.int64) * n // max(count, 1)


def uniform_linspace(n: int, count: int) -> Rows:
    """`count` of n rows from the first to the last, rounded down; all of them if count > n."""
    return np.linspace(0, n - 1, min(n, count), dtype=np.int64)


def by_fps(
    pts: Times, fps: float, *, start: float | None = None, stop: float | None = None
) -> Rows:
    """The frames on screen at t0, t0 + 1/fps, t0 + 2/fps ... before `stop`, each once.

    A frame is on screen from its time until the next one's. t0 is the first frame's time, or
    `start` if that is later. A frame that several ticks meet (fps above the clip's own rate, or a
    still passage) is taken once.
    """
    fps = min(max(fps, _SLOWEST), _FASTEST)
    began = pts[0] if start is None else max(start, pts[0])
    until = pts[-1] if stop is None else stop
    slack = min(_STAMP_ROUNDING, float(np.diff(pts).min(initial=np.inf)) / 2)
    # For each frame the first tick that can meet it; a frame is met unless its successor has the
    # same one. (A list of ticks would be as long as the caller's fps makes it.)
    ticks = np.maximum(np.ceil((pts - began - slack) * fps), 0.0)
    met = np.append(ticks[:-1] < ticks[1:], True)
    moment = began + ticks[-1] / fps
    met[-1] = ticks[-1] == 0 or moment <= pts[-1] + slack or moment < until - slack
    return np.flatnonzero(met).astype(np.int64)


def between(pts: Times, start: float | None, end: float | None, *, stop: float) -> tuple[int, int]:
    """The half-open range of rows on screen at some moment of [start, end)."""
    if start is not None and start >= stop:
        raise InvalidArgument(
            f"start={start:g} s is beyond the end of the clip at {stop:g} s; give a smaller start"
        )
    first = 0 if start is None else max(int(np.searchsorted(pts, start, side="right")) - 1, 0)
    last = len(pts) if end is None else int(np.searchsorted(pts, end, side="left"))
    if last <= first:
        raise InvalidArgument(
            f"no frame is on screen before end={end:g} s: the first one appears at "
            f"{pts[0]:g} s; give a later end"
        )
    return first, last


def seconds(name: str, value: float | str | None) -> float | None:
    """A moment in seconds: a number, or "ss", "mm:ss", "hh:mm:ss" with an optional fraction."""
    if value is None:
        return None
    if isinstance(value, str):
        parts = _CLOCK.fullmatch(value.strip())
        if parts is None:
            raise InvalidArgument(
                f'{name}={value!r} is not a time; give seconds, "mm:ss" or "hh:mm:ss.fff"'
            )
        field = parts.groupdict(default="0")
        minutes = int(field["h"]) * 60 + int(field["m"]) + int(field["mm"])
        value = minutes * 60 + float(field["s"]) + float(field["ss"])
    number = _number(name, value)
    if number < 0:
        raise InvalidArgument(
            f"{name}={value!r} is negative; give seconds from the beginning of the clip"
        )
    return number


def _count(name: str, value: int | None) -> None:
    if value is None:
        return
    try:
        good = not isinstance(value, bool) and operator.index(value) >= 1
    except TypeError:
        good = False
    if not good:
        raise InvalidArgument(f"{name}={value!r} is not a number of frames; give 1 or more")


def _number(name: str, value: float) -> float:
    try:
        number = math.nan if isinstance(value, str | bytes | bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise InvalidArgument(f"{name}={value!r} is not a finite number; give one, or None")
    return number
