"""What every reader works with: a Timeline to choose from, Limits to keep, the Video chosen."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vidlm.errors import InvalidArgument, MediaLimitError
from vidlm.media.fetch import DEFAULT_POLICY, FetchPolicy
from vidlm.media.policy import FramePolicy, choose
from vidlm.media.sample import Rows, Times

Frames = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Video:
    """Frames of a clip and when a player shows them.

    frames: (F, H, W, 3) uint8 RGB, upright, in square pixels, on white where transparent.
    pts: (F,) seconds on the player's clock: 0 is the container's own start, which is `start_time`
        in the container's time. A first frame may come later than 0. Ascending, unless the frames
        were asked for by number or time in another order.
    indices: (F,) the frames' numbers among the `total_frames` that a player shows, from 0.
    duration: seconds from pts 0 until the last frame of the clip has been shown, by the frames' own
        times, whatever the header claims and however long the sound goes on.
    fps: average over the whole clip; with a variable rate no two frames need be 1/fps apart.
    warnings: what could not be read or had to be changed, in words. Empty for a sound clip.
    name: for messages and titles.

    Lists and arrays of frames have no clock: pts = indices, fps = 1.0, one second each.
    Raises InvalidArgument where shapes disagree.
    """

    frames: Frames
    pts: Times
    indices: Rows
    duration: float
    fps: float
    total_frames: int
    start_time: float = 0.0
    warnings: tuple[str, ...] = ()
    name: str = "video"

    def __post_init__(self) -> None:
        shape = self.frames.shape
        if len(shape) != 4 or shape[-1] != 3 or self.frames.dtype != np.uint8:
            raise InvalidArgument(
                f"frames are {self.frames.dtype} {shape}; a Video takes uint8 (F, H, W, 3)"
            )
        if not shape[0] == len(self.pts) == len(self.indices) > 0:
            raise InvalidArgument(
                f"{shape[0]} frames, {len(self.pts)} pts and {len(self.indices)} indices; "
                "a Video takes one of each for every frame, and at least one frame"
            )

    def __len__(self) -> int:
        return len(self.frames)

    def images(self) -> list[Image.Image]:
        """The frames as PIL images."""
        return [Image.fromarray(frame) for frame in self.frames]


@dataclass(frozen=True, eq=False)
class Timeline:
    """When each frame a player shows appears: pts (N,) seconds, and when the last one goes.

    keys: the rows of key frames, where there are any to know. end: when the clip ends, where its
    sound goes on after `stop`: until then the last frame stays on screen.
    """

    pts: Times
    stop: float
    start_time: float = 0.0
    keys: Rows | None = None
    end: float | None = None

    @property
    def until(self) -> float:
        """When the last frame leaves the screen."""
        return self.stop if self.end is None else max(self.stop, self.end)

    def choose(self, policy: FramePolicy, shots: Rows | None = None) -> Rows:
        """The rows that a policy takes; `shots` are those where one begins, if it goes by them."""
        marks = shots if policy.sampling == "scenes" else self.keys
        return choose(self.pts, policy, stop=self.stop, marks=marks, until=self.until)

    def span(self, policy: FramePolicy) -> float:
        """Seconds of the clip among which a policy chooses."""
        start, end = policy.window
        stop = self.until if end is None else min(self.until, end)
        return max(stop - (start or 0.0), 0.0)

    @property
    def fps(self) -> float:
        span = self.stop - float(self.pts[0])
        return len(self.pts) / span if span > 0 else 1.0

    def video(self, frames: Frames, rows: Rows, name: str, warnings: Sequence[str] = ()) -> Video:
        """The Video of these rows, for which `frames` were read."""
        return Video(
            frames=frames,
            pts=self.pts[rows],
            indices=rows,
            duration=self.stop,
            fps=self.fps,
            total_frames=len(self.pts),
            start_time=self.start_time,
            warnings=tuple(warnings),
            name=name,
        )


@dataclass(frozen=True)
class Limits:
    """Ceilings that are checked before the memory or the time is spent.

    kept_bytes: of all chosen frames together. pixels: of one frame. frames: of the whole clip.
    duration: of the clip, or of its part between start and end, in seconds. file_bytes: of the
    file. seconds: for reading it all, looked at between frames (a decoder that hangs inside one
    needs a `DecodePool`).
    """

    kept_bytes: int = 4 << 30
    pixels: int = 8192 * 8192
    frames: int = 5_000_000
    duration: float = 48 * 3600.0
    file_bytes: int = 64 << 30
    seconds: float = 600.0

    def check(self, name: str, count: int, height: int, width: int) -> None:
        """Raises MediaLimitError where `count` frames of this size are too much."""
        if height * width > self.pixels:
            raise MediaLimitError(
                f"{name}: frames of {width}x{height} are above the limit of {self.pixels} pixels; "
                "scale the video down first"
            )
        need = count * height * width * 3
        if need > self.kept_bytes:
            fit = max(self.kept_bytes // (height * width * 3), 1)
            raise MediaLimitError(
                f"{name}: {count} frames of {width}x{height} need {need / 2**20:.0f} MiB, the "
                f"limit is {self.kept_bytes / 2**20:.0f} MiB; take fewer with num_frames or "
                f"max_frames (at most {fit}), a smaller fps, or a shorter start..end"
            )

    def check_length(self, name: str, frames: int, duration: float) -> None:
        """Raises MediaLimitError where a clip is too long."""
        if frames > self.frames:
            raise MediaLimitError(
                f"{name}: more than the limit of {self.frames} frames; cut it into parts, or "
                "raise Limits.frames"
            )
        if duration > self.duration:
            raise MediaLimitError(
                f"{name}: {duration:.0f} s long, the limit is {self.duration:g} s; cut it into "
                "parts, or raise Limits.duration"
            )

    def check_file(self, name: str, size: int) -> None:
        """Raises MediaLimitError where a file is too large."""
        if size > self.file_bytes:
            raise MediaLimitError(
                f"{name}: {size} bytes, the limit is {self.file_bytes}; send a smaller file, or "
                "raise Limits.file_bytes"
            )


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class ReadOptions:
    """How a source is read: see `load_video`."""

    policy: FramePolicy
    limits: Limits = DEFAULT_LIMITS
    on_error: str = "warn"
    max_side: int | None = None
    access: FetchPolicy = DEFAULT_POLICY

    def __post_init__(self) -> None:
        if self.on_error not in ("warn", "raise"):
            raise InvalidArgument(f"on_error={self.on_error!r}; allowed: 'warn', 'raise'")
        if self.max_side is not None and not 1 <= self.max_side:
            raise InvalidArgument(f"max_side={self.max_side!r} pixels; give 1 or more, or None")

    def scale(self, height: int, width: int) -> tuple[int, int]:
        """The size at which a picture of this size is kept: never larger than it is."""
        longest = max(height, width)
        if self.max_side is None or longest <= self.max_side:
            return height, width
        return tuple(max(round(side * self.max_side / longest), 1) for side in (height, width))  # type: ignore[return-value]


@dataclass(frozen=True)
class Deadline:
    """When reading a file must be done; begins when it is made."""

    name: str
    seconds: float
    began: float = field(default_factory=time.monotonic)

    def check(self) -> None:
        """Raises MediaLimitError afterwards."""
        if time.monotonic() - self.began > self.seconds:
            raise MediaLimitError(
                f"{self.name}: not read within the limit of {self.seconds:g} s; take a shorter "
                "start..end, or raise Limits.seconds"
            )


def clock(seconds: float) -> str:
    """mm:ss.ff, with hours where there are any, for messages and titles."""
    hundredths = round(max(seconds, 0.0) * 100)
    minutes, rest = divmod(hundredths, 6000)
    hours, minutes = divmod(minutes, 60)
    text = f"{minutes:02d}:{rest // 100:02d}.{rest % 100:02d}"
    return f"{hours}:{text}" if hours else text
