"""Which frames to take, as a user says it: checked when it is made, applied by `choose`."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from vidlm.errors import InvalidArgument
from vidlm.media.sample import (
    Rows,
    Times,
    between,
    by_fps,
    clamped,
    repeated_linspace,
    spread_over,
    strided,
    uniform_arange,
    uniform_linspace,
)

# Each with what it needs and may have, beside start, end and max_frames.
SAMPLINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "uniform": ((), ("num_frames", "fps", "min_frames")),
    "linspace": (("num_frames",), ()),
    "slowfast": (("num_frames",), ("fps",)),
    "videollama3": ((), ("fps", "min_frames")),
    "keyframes": ((), ("num_frames",)),
    "scenes": ((), ("num_frames",)),
}
MARKED = ("keyframes", "scenes")  # these need to know where something begins in the clip
_MOST_REPEATED = 100_000  # linspace gives as many as it is told to, whatever the clip has

_PART = r"[0-5]?\d"
_CLOCK = re.compile(
    rf"(?:(?P<h>\d+):(?P<m>{_PART}):|(?P<mm>\d+):)(?P<s>{_PART}(?:\.\d*)?)|(?P<ss>\d+(?:\.\d*)?)",
    re.ASCII,
)


@dataclass(frozen=True)
class FramePolicy:
    """Which frames of a clip to take; the defaults take every frame.

    num_frames: that many, evenly spread (`uniform_arange`); all where the clip has fewer.
    fps: the frame on screen every 1/fps seconds (`by_fps`). Excludes num_frames. min_frames:
        where fps gives fewer, that many, evenly spread.
    max_frames: a ceiling on any of them; more are thinned evenly over the same span.
    start, end: only frames on screen in [start, end): seconds from the beginning of the clip, or
        "mm:ss", "hh:mm:ss", each with an optional fraction.
    sampling: another rule than these.
        "linspace": num_frames rows from the first to the last, repeated where the clip has fewer.
        "slowfast": Slow-Fast's own for scores: candidates at fps (2), num_frames of them.
        "videollama3": as many as fps (1) gives, from min_frames (4) to max_frames (180).
        "keyframes": the frames a decoder can begin at; num_frames of them, evenly thinned.
        "scenes": the middle of each shot; with num_frames, shared out by the shots' lengths.
    indices: exactly these frames, or times: the frames on screen at these moments, in this order,
        repeated if told so. Each excludes everything else.

    Raises InvalidArgument for a value or a combination that makes no sense.
    """

    num_frames: int | None = None
    fps: float | None = None
    max_frames: int | None = None
    start: float | str | None = None
    end: float | str | None = None
    min_frames: int | None = None
    sampling: str = "uniform"
    indices: Sequence[int] | None = None
    times: Sequence[float | str] | None = None

    def __post_init__(self) -> None:
        for name in ("num_frames", "max_frames", "min_frames"):
            _count(name, getattr(self, name))
        if self.fps is not None and _number("fps", self.fps) <= 0:
            raise InvalidArgument(f"fps={self.fps!r} is not above 0; give frames a second, as 0.5")
        if self.sampling not in SAMPLINGS:
            raise InvalidArgument(f"sampling={self.sampling!r}; allowed: {', '.join(SAMPLINGS)}")
        self._check_explicit()
        self._check_combination()
        start, end = self.window
        if end is not None and (start or 0.0) >= end:
            raise InvalidArgument(
                f"start={start or 0:g} s is not before end={end:g} s; "
                "give start < end, or leave one of them out"
            )

    def _check_explicit(self) -> None:
        named = [name for name in ("indices", "times") if getattr(self, name) is not None]
        if not named:
            return
        own = [f.name for f in fields(self) if f.name not in ("indices", "times")]
        defaults = {f.name: f.default for f in fields(self)}
        given = named + [name for name in own if getattr(self, name) != defaults[name]]
        if len(given) > 1:
            raise InvalidArgument(
                f"{' and '.join(given)} exclude each other: {named[0]} alone says which frames"
            )
        values = getattr(self, named[0])
        if isinstance(values, str | bytes) or not isinstance(values, Sequence | np.ndarray):
            raise InvalidArgument(f"{named[0]}={values!r}; give a list, as {named[0]}=[0, 25, 50]")
        if not len(values):
            raise InvalidArgument(f"{named[0]}=[] takes no frame; give at least one")
        for value in values:
            if named[0] == "times":
                if seconds("times", value) is None:
                    raise InvalidArgument("times with None; give seconds or texts as 'mm:ss'")
            elif not _is_integer(value) or value < 0:
                raise InvalidArgument(f"indices with {value!r}; give frame numbers, from 0")

    def _check_combination(self) -> None:
        needs, may = SAMPLINGS[self.sampling]
        for name in ("num_frames", "fps", "min_frames"):
            if getattr(self, name) is None and name in needs:
                raise InvalidArgument(
                    f"sampling={self.sampling!r} needs {name}; give {name}=8, say"
                )
            if getattr(self, name) is not None and name not in (*needs, *may):
                raise InvalidArgument(
                    f"{name}={getattr(self, name)!r} means nothing to sampling="
                    f"{self.sampling!r}; leave it out"
                )
        if self.sampling == "uniform":
            self._check_uniform()
        if self.sampling == "linspace" and (self.num_frames or 0) > _MOST_REPEATED:
            raise InvalidArgument(
                f"num_frames={self.num_frames} with sampling='linspace', which repeats frames to "
                f"reach it; allowed: at most {_MOST_REPEATED}"
            )
        if self.min_frames and self.max_frames and self.min_frames > self.max_frames:
            raise InvalidArgument(
                f"min_frames={self.min_frames} is above max_frames={self.max_frames}"
            )

    def _check_uniform(self) -> None:
        if self.num_frames is not None and self.fps is not None:
            raise InvalidArgument(
                f"num_frames={self.num_frames!r} and fps={self.fps!r} exclude each other; "
                "give one of them (max_frames caps what fps yields)"
            )
        if self.min_frames is not None and self.fps is None:
            raise InvalidArgument(
                f"min_frames={self.min_frames!r} is the least that fps may give; give fps too"
            )

    @property
    def window(self) -> tuple[float | None, float | None]:
        """start and end in seconds."""
        return seconds("start", self.start), seconds("end", self.end)


def choose(
    pts: Times,
    policy: FramePolicy,
    *,
    stop: float,
    marks: Rows | None = None,
    until: float | None = None,
) -> Rows:
    """The rows of `pts` (ascending, seconds) that `policy` takes, at least one.

    Ascending and without repeats unless indices, times or "linspace" make it otherwise.

    stop: when the last frame has been shown for its own length. marks: the rows where key frames or
        shots begin, for the samplings that go by them. until: when the last frame leaves the
        screen, where it stays longer.
    Raises InvalidArgument where no frame is on screen between the policy's start and end.
    """
    until = stop if until is None else until
    if policy.indices is not None or policy.times is not None:
        return _named(pts, policy, until)
    start, end = policy.window
    first, last = between(pts, start, end, stop=until)
    n, most = last - first, policy.max_frames
    # Rounded: 25 / 2 is 12 to a rule that rounds halves to even, and 25.0000001 / 2 would be 13.
    rate = round(len(pts) / (stop - float(pts[0])), 6) if stop > pts[0] else 1.0
    match policy.sampling:
        case "linspace":
            assert policy.num_frames is not None
            rows = repeated_linspace(n, policy.num_frames)
        case "slowfast":
            assert policy.num_frames is not None
            rows = strided(n, policy.num_frames, rate=rate, fps=policy.fps or 2.0)
        case "videollama3":
            least = policy.min_frames or min(4, most or 4)
            rows = clamped(n, rate=rate, fps=policy.fps or 1.0, least=least, most=most or 180)
        case "keyframes" | "scenes":
            rows = _at_marks(_inside(marks, policy, first, last) - first, policy, n)
        case _:
            until = until if end is None else min(until, end)
            rows = _uniform(pts[first:last], policy, start=start, stop=until)
    return first + rows[uniform_linspace(len(rows), most or len(rows))]


def _uniform(pts: Times, policy: FramePolicy, *, start: float | None, stop: float) -> Rows:
    if policy.num_frames is not None:
        return uniform_arange(len(pts), min(policy.num_frames, policy.max_frames or len(pts)))
    if policy.fps is None:
        return np.arange(len(pts))
    rows = by_fps(pts, policy.fps, start=start, stop=stop)
    if len(rows) < (policy.min_frames or 0):
        rows = uniform_arange(len(pts), policy.min_frames or 0)
    return rows


def _named(pts: Times, policy: FramePolicy, stop: float) -> Rows:
    """The rows of `indices`, or of what is on screen at `times`."""
    if policy.indices is not None:
        last = max(map(int, policy.indices))  # which may be more than int64 holds
        if last >= len(pts):
            raise InvalidArgument(
                f"indices with {last}: the clip has {len(pts)} frames, 0 to {len(pts) - 1}"
            )
        return np.asarray(policy.indices, np.int64)
    assert policy.times is not None  # or it would not be called
    moments = np.asarray([seconds("times", time) for time in policy.times])
    if moments.max() >= stop:
        raise InvalidArgument(
            f"times with {moments.max():g} s, which is beyond the end of the clip at {stop:g} s; "
            "give earlier ones"
        )
    return np.maximum(np.searchsorted(pts, moments, side="right") - 1, 0).astype(np.int64)


def _inside(marks: Rows | None, policy: FramePolicy, first: int, last: int) -> Rows:
    """The marks of a window; a shot that is under way when it opens begins there."""
    if marks is None:
        raise InvalidArgument(
            f"sampling={policy.sampling!r} needs a video file; for images and arrays use "
            "num_frames, fps or indices"
        )
    inside = marks[(marks >= first) & (marks < last)]
    if policy.sampling == "scenes":
        return np.unique(np.append(first, inside))
    if not len(inside):
        raise InvalidArgument(
            f"no key frame between start={policy.start!r} and end={policy.end!r}; give a longer "
            "span, or num_frames without sampling"
        )
    return inside


def _at_marks(marks: Rows, policy: FramePolicy, n: int) -> Rows:
    if policy.sampling == "keyframes":
        return marks[uniform_linspace(len(marks), policy.num_frames or len(marks))]
    count = policy.num_frames
    if policy.max_frames is not None:
        count = min(count or len(marks), policy.max_frames)
    return spread_over(marks, n, count)


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
    if not _is_integer(value) or value < 1:
        raise InvalidArgument(f"{name}={value!r} is not a number of frames; give 1 or more")


def _is_integer(value: Any) -> bool:
    try:
        operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool | np.bool_)


def _number(name: str, value: float) -> float:
    try:
        number = math.nan if isinstance(value, str | bytes | bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise InvalidArgument(f"{name}={value!r} is not a finite number; give one, or None")
    return number
