"""A video file: list what a player shows, choose, decode what that takes, keep the chosen frames.

Where few frames are wanted, the decoder begins at the key frame before each, and leaves out what
no other picture refers to.
Frames are told by their presentation stamps, so that a packet lost on the way shifts nothing; what
contradicts the list (fields, pictures never shown, stamps in decoding order, a seek that lands
elsewhere) is noticed, and a slower and surer way is taken, in the end counting what comes out.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import BinaryIO

import av
import numpy as np
from av.video.frame import VideoFrame

from vidlm.errors import MediaError
from vidlm.media.clip import Deadline, Frames, ReadOptions, Video, clock
from vidlm.media.container import Reader, hint, opened
from vidlm.media.listing import Index, list_frames, list_packets, list_quickly
from vidlm.media.picture import Painter, resized, thumbnail
from vidlm.media.sample import Rows, Times, between
from vidlm.media.scene import Shots

log = logging.getLogger(__name__)

# Frames between two wanted ones that are decoded rather than skipped: a seek costs about as much.
_SEEK_COST = 12
# Of a span the first frames are all decoded: where fields or pictures that are never shown make the
# list wrong, it is wrong there. A decoder may hold frames back, so more packets than frames.
_CHECKED_FRAMES, _CHECKED_PACKETS = 4, 24


class _Astray(Exception):
    """The decoder contradicts the index, or a seek did not arrive."""


@dataclass(frozen=True)
class _File:
    """What is read, how, and until when."""

    file: BinaryIO
    name: str
    options: ReadOptions
    deadline: Deadline


def read(file: BinaryIO, name: str, options: ReadOptions) -> Video:
    """The chosen frames of a seekable binary file, which is left open.

    Raises MediaError where there is no video to read, MediaLimitError before memory is taken.
    """
    source = _File(file, name, options, Deadline(name, options.limits.seconds))
    for lister in (list_quickly, list_packets, list_frames):
        with opened(file, name, options.limits, source.deadline) as reader:
            index = lister(reader, file)
            video = _chosen(source, index, reader) if index is not None else None
        if video is None and index is not None:  # the same from the beginning, without seeking
            video = _chosen(source, index, None)
        if video is not None:
            for warning in video.warnings:
                log.warning("%s: %s", name, warning)
            return video
    raise AssertionError("a frame that is counted cannot go astray")


def _chosen(source: _File, index: Index, reader: Reader | None) -> Video | None:
    """The frames a policy takes, through a reader that can seek, or from the beginning."""
    if reader is not None and index.stamps is None:
        return None
    policy, timeline = source.options.policy, index.timeline
    try:
        shots = None
        if policy.sampling == "scenes":
            shots = _shots(source, index, reader)
        return _take(source, index, timeline.choose(policy, shots), reader)
    except _Astray:
        return None


def _shots(source: _File, index: Index, reader: Reader | None) -> Rows:
    """The rows where a shot begins, of those that the policy's window has."""
    timeline = index.timeline
    first, last = between(timeline.pts, *source.options.policy.window, stop=timeline.stop)
    shots = Shots(timeline.fps)
    for row, frame in _walk(source, index, np.arange(first, last), reader, _Trail()):
        shots.see(row, thumbnail(frame))
    return shots.starts()


def _take(source: _File, index: Index, rows: Rows, reader: Reader | None) -> Video:
    options, timeline = source.options, index.timeline
    unique, places = np.unique(rows, return_inverse=True)
    trail, kept = _Trail(), _Kept(unique, source, Painter(index.pixel_aspect, options.scale))
    for row, frame in _walk(source, index, unique, reader, trail):
        if row in kept.wanted:
            kept.keep(row, frame)
    faults = trail.faults
    if index.stamps is not None and not faults and (trail.skipped or kept.wanted):
        raise _Astray
    if reader is not None and (faults or kept.damaged):
        raise _Astray  # what a decoder guesses in place of damage depends on all frames before
    if kept.frames is None:
        raise MediaError(
            f"{source.name}: none of the {len(unique)} chosen frames could be decoded"
            f"{hint(faults)}; choose other ones, or get an undamaged file"
        )
    losses = (*index.losses, *kept.losses(timeline.pts), *_refused(faults))
    if losses and options.on_error == "raise":
        raise MediaError(
            f"{source.name}: {'; '.join(losses)}; get an undamaged file, or take what is left of "
            "it with on_error='warn'"
        )
    have = np.array([row not in kept.wanted for row in rows.tolist()])
    pictures = kept.frames
    if not have.all() or not np.array_equal(unique, rows):
        pictures = pictures[places[have]]
    return timeline.video(pictures, rows[have], source.name, (*losses, *index.notes, *kept.notes()))


# ---- walking ---------------------------------------------------------------------------------


@dataclass
class _Trail:
    """What a walk met: frames that the index has and the decoder did not give, and faults."""

    skipped: bool = False
    faults: Sequence[str] = ()


@dataclass(frozen=True)
class _Span:
    """Rows to decode in one go: up to `last`, from the key frame in row `key` or, where that is
    None, from the beginning."""

    key: int | None
    last: int


def _walk(
    source: _File, index: Index, rows: Rows, reader: Reader | None, trail: _Trail
) -> Generator[tuple[int, VideoFrame], None, None]:
    """At least the frames of `rows` (ascending), each with its row, and what lies between.

    Raises _Astray where the decoder contradicts the index.
    """
    if reader is not None:
        trail.faults = reader.faults = []
        assert index.stamps is not None
        wanted = frozenset(index.stamps[rows].tolist())
        for span in _spans(index, rows, fresh=reader.fresh):
            yield from _walk_span(index, span, reader, trail, wanted)
        return
    with opened(source.file, source.name, source.options.limits, source.deadline) as own:
        trail.faults = own.faults
        yield from _walk_span(index, _Span(None, int(rows[-1])), own, trail)


def _spans(index: Index, rows: Rows, *, fresh: bool) -> list[_Span]:
    """Where to seek to. A fresh reader stands at the beginning already."""
    keys = index.timeline.keys
    assert keys is not None
    spans: list[_Span] = [_Span(None, -1)] if fresh else []
    before = np.searchsorted(keys, rows, side="right") - 1
    for row, place in zip(rows.tolist(), before.tolist(), strict=True):
        key = int(keys[place]) if place >= 0 else 0
        if spans and key - spans[-1].last <= _SEEK_COST:
            spans[-1] = _Span(spans[-1].key, row)
        else:
            spans.append(_Span(key, row))
    return [span for span in spans if span.last >= 0]


def _walk_span(
    index: Index,
    span: _Span,
    reader: Reader,
    trail: _Trail,
    wanted: frozenset[int] | None = None,
) -> Generator[tuple[int, VideoFrame], None, None]:
    """The frames of a span: all of them, or with `wanted`, stamps, at least those."""
    if span.key is not None:
        assert index.stamps is not None
        if not reader.seek(int(index.stamps[span.key])):
            raise _Astray
    start = span.key or 0
    awaited = start
    checked = start + _CHECKED_FRAMES if wanted is not None else len(index.timeline.pts)
    frames = reader.decoded(wanted, _CHECKED_PACKETS)
    with closing(frames):  # before its container is
        for frame in frames:
            row = awaited if index.stamps is None else index.row(frame.pts, awaited)
            if row is not None and row < start:  # behind a seek: of the shot before
                continue
            if row is None or row < awaited:
                raise _Astray
            trail.skipped = trail.skipped or awaited < min(row, checked)
            awaited = row + 1
            yield row, frame
            if row >= span.last:
                return


# ---- keeping ---------------------------------------------------------------------------------


class _Kept:
    """The chosen frames, each painted into its place as it comes."""

    def __init__(self, rows: Rows, source: _File, painter: Painter) -> None:
        self._rows, self._limits, self._name = rows, source.options.limits, source.name
        self._painter = painter
        self.damaged: list[int] = []
        self._resized: list[int] = []
        self.wanted = {int(row): place for place, row in enumerate(rows)}  # not yet seen
        self.frames: Frames | None = None

    def keep(self, row: int, frame: VideoFrame) -> None:
        place = self.wanted.pop(row)
        self._limits.check(self._name, 1, frame.height, frame.width)
        self._limits.check(self._name, len(self._rows), *self._painter.size(frame))
        picture = self._paint(frame)
        if self.frames is None:  # which way up it is, is known only now
            self.frames = np.empty((len(self._rows), *picture.shape), np.uint8)
        if picture.shape != self.frames.shape[1:]:
            self._resized.append(row)
            picture = resized(picture, *self.frames.shape[1:3])
        if frame.is_corrupt:
            self.damaged.append(row)
        self.frames[place] = picture

    def _paint(self, frame: VideoFrame) -> Frames:
        try:
            return self._painter.paint(frame)
        except (av.FFmpegError, ValueError) as error:
            raise MediaError(
                f"{self._name}: a {frame.width}x{frame.height} picture in {frame.format.name} "
                f"cannot be turned into RGB ({error}); convert the file to yuv420p"
            ) from error

    def losses(self, pts: Times) -> list[str]:
        """What could not be decoded, or not wholly."""
        return [
            *self._say(sorted(self.wanted), "could not be decoded and are left out", pts),
            *self._say(self.damaged, "are damaged: the decoder guessed parts of them", pts),
        ]

    def notes(self) -> list[str]:
        """What was changed."""
        if not self._resized:
            return []
        chosen = f"{len(self._resized)} of the {len(self._rows)} chosen frames"
        return [f"{chosen} have another size than the first and were scaled to it"]

    def _say(self, rows: list[int], what: str, pts: Times) -> list[str]:
        times = ", ".join(clock(float(pts[row])) for row in rows[:8])
        more = " ..." if len(rows) > 8 else ""
        chosen = f"{len(rows)} of the {len(self._rows)} chosen frames"
        return [f"{chosen} {what}, at {times}{more}"] if rows else []


def _refused(faults: Sequence[str]) -> list[str]:
    return [f"the decoder refused {len(faults)} packets{hint(faults)}"] if faults else []
