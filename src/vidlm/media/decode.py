"""A video file: list what a player shows, choose, decode once up to the last one, keep the chosen.

Frames are told by their presentation stamps, so that a packet lost on the way shifts nothing.
Where the decoder contradicts the list without an error (fields, pictures never shown, stamps in
decoding order, none at all) the frames are counted as they come out, and read by count.
"""

from __future__ import annotations

import logging
from contextlib import closing
from dataclasses import dataclass
from typing import BinaryIO

import av
import numpy as np
from av.video.frame import VideoFrame

from vidlm.errors import MediaError
from vidlm.media.clip import Frames, Limits, Video, clock
from vidlm.media.container import Index, decoded, hint, list_frames, list_packets, opened
from vidlm.media.picture import Painter, resized
from vidlm.media.sample import FramePolicy, Rows, Times, choose

log = logging.getLogger(__name__)


def read(file: BinaryIO, name: str, policy: FramePolicy, limits: Limits) -> Video:
    """The frames of a seekable binary file that `policy` chooses. The file is left open.

    Raises MediaError where there is no video to read, MediaLimitError before memory is taken.
    """
    with opened(file, name, limits) as stream:
        index = list_packets(stream, name)
    video = _take(file, name, index, policy, limits) if index else None
    if video is None:
        with opened(file, name, limits) as stream:
            index = list_frames(stream, name)
        video = _take(file, name, index, policy, limits)
    assert video is not None  # a frame that is counted cannot go astray
    for warning in video.warnings:
        log.warning("%s: %s", name, warning)
    return video


def _take(
    file: BinaryIO, name: str, index: Index, policy: FramePolicy, limits: Limits
) -> Video | None:
    """The chosen frames; None where the decoder contradicts the index without an error."""
    timeline = index.timeline
    rows = choose(timeline.pts, policy, stop=timeline.stop)
    faults: list[str] = []
    with opened(file, name, limits) as stream:
        painter = Painter(stream.sample_aspect_ratio)
        size = stream.codec_context.height, painter.width(stream.codec_context.width)
        limits.check(name, len(rows), *size)
        walk, kept = _Walk(index), _Kept(painter, rows, limits, name)
        with closing(decoded(stream, faults)) as frames:  # before its container is
            for frame in frames:
                row = walk.step(frame)
                if walk.astray:
                    return None
                kept.offer(row, frame)
                if not kept.wanted:
                    break
    if index.stamps is not None and not faults and (walk.skipped or kept.wanted):
        return None
    if kept.frames is None:
        raise MediaError(
            f"{name}: none of the {len(rows)} chosen frames could be decoded{hint(faults)}; "
            "choose other ones, or get an undamaged file"
        )
    have = np.array([row not in kept.wanted for row in rows.tolist()])
    warnings = (*index.warnings, *kept.warnings(timeline.pts), *_refused(faults))
    pictures = kept.frames if have.all() else kept.frames[have]
    return timeline.video(pictures, rows[have], name, warnings)


@dataclass(eq=False)
class _Walk:
    """Tells which row each decoded frame is, and whether that follows the index."""

    index: Index
    next: int = 0
    skipped: bool = False
    astray: bool = False

    def step(self, frame: VideoFrame) -> int:
        row = self.next if self.index.stamps is None else self.index.row(frame.pts)
        if row is None or row < self.next:
            self.astray = True
            return -1
        self.skipped = self.skipped or row > self.next
        self.next = row + 1
        return row


class _Kept:
    """The chosen frames, each painted into its place as it comes."""

    def __init__(self, painter: Painter, rows: Rows, limits: Limits, name: str) -> None:
        self._painter, self._rows, self._limits, self._name = painter, rows, limits, name
        self._damaged: list[int] = []
        self._resized: list[int] = []
        self.wanted = {int(row): place for place, row in enumerate(rows)}  # not yet seen
        self.frames: Frames | None = None

    def offer(self, row: int, frame: VideoFrame) -> None:
        place = self.wanted.pop(row, None)
        if place is None:
            return
        self._limits.check(self._name, 1, frame.height, self._painter.width(frame.width))
        picture = self._paint(frame)
        height, width, _ = picture.shape
        if self.frames is None:  # rotation and the true size are known only now
            self._limits.check(self._name, len(self._rows), height, width)
            self.frames = np.empty((len(self._rows), height, width, 3), np.uint8)
        if picture.shape != self.frames.shape[1:]:
            self._resized.append(row)
            picture = resized(picture, *self.frames.shape[1:3])
        if frame.is_corrupt:
            self._damaged.append(row)
        self.frames[place] = picture

    def _paint(self, frame: VideoFrame) -> Frames:
        try:
            return self._painter.paint(frame)
        except (av.FFmpegError, ValueError) as error:
            raise MediaError(
                f"{self._name}: a {frame.width}x{frame.height} picture in {frame.format.name} "
                f"cannot be turned into RGB ({error}); convert the file to yuv420p"
            ) from error

    def warnings(self, pts: Times) -> list[str]:
        def say(rows: list[int], what: str) -> list[str]:
            times = ", ".join(clock(float(pts[row])) for row in rows[:8])
            more = " ..." if len(rows) > 8 else ""
            chosen = f"{len(rows)} of the {len(self._rows)} chosen frames"
            return [f"{chosen} {what}, at {times}{more}"] if rows else []

        return [
            *say(sorted(self.wanted), "could not be decoded and are left out"),
            *say(self._damaged, "are damaged: the decoder guessed parts of them"),
            *say(self._resized, "have another size than the first and were scaled to it"),
        ]


def _refused(faults: list[str]) -> list[str]:
    return [f"the decoder refused {len(faults)} packets{hint(faults)}"] if faults else []
