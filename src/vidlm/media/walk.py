"""Through a video file from chosen frame to chosen frame, each told by its stamp.

Frames that the decoder gives are held against the index; what contradicts it raises Astray.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from threading import Event
from typing import BinaryIO, cast

import numpy as np
from av.video.frame import VideoFrame

from vidlm.media.clip import Deadline, ReadOptions
from vidlm.media.container import Reader, opened
from vidlm.media.listing import Index
from vidlm.media.sample import Rows

# Frames between two wanted ones that are decoded rather than skipped: a seek costs about as much.
_SEEK_COST = 12
# Of a span the first frames are all decoded: where fields or pictures that are never shown make the
# list wrong, it is wrong there. A decoder may hold frames back, so more packets than frames.
_CHECKED_FRAMES, _CHECKED_PACKETS = 4, 24
# Frames times pixels that two readers save before a second one is worth opening the file again.
_WORTH_TWO = 4_000_000

See = Callable[[int, VideoFrame], None]


class Astray(Exception):
    """The decoder contradicts the index, or a seek did not arrive."""


@dataclass(frozen=True)
class File:
    """What is read, how, and until when."""

    file: BinaryIO
    name: str
    options: ReadOptions
    deadline: Deadline


@dataclass
class Trail:
    """What a walk met: frames that the index has and the decoder did not give, and faults."""

    skipped: bool = False
    faults: Sequence[str] = ()


@dataclass(frozen=True)
class Span:
    """Rows to decode in one go: up to `last`, from the key frame in row `key` or, where that is
    None, from the beginning."""

    key: int | None
    last: int

    @property
    def frames(self) -> int:
        return self.last - (self.key or 0) + 1


def walk(
    source: File, index: Index, rows: Rows, reader: Reader | None, see: See, ordered: bool = False
) -> Trail:
    """Shows `see` at least the frames of `rows` (ascending), each with its row.

    With a reader, which can seek, in two halves at once where that saves much, unless they are to
    come `ordered`: then `see` is called from two threads. Without one, from the beginning, every
    frame up to the last. Raises Astray where the decoder contradicts the index.
    """
    if reader is None:
        with opened(source.file, source.name, source.options.limits, source.deadline) as own:
            return _show(index, [Span(None, int(rows[-1]))], own, see)
    assert index.stamps is not None
    # Times that had to be mended are believed as far as every frame in a span bears them out.
    wanted = None if index.is_mended else frozenset(index.stamps[rows].tolist())
    first, second = split(index, rows, fresh=reader.fresh)
    codec = reader.stream.codec_context  # whose size the header gives
    view = _view(source.file)
    saved = sum(span.frames for span in second) * codec.width * codec.height
    if ordered or view is None or saved < _WORTH_TWO:
        spans = spans_of(index, rows, fresh=reader.fresh)
        return _show(index, spans, reader, see, wanted)
    try:
        return _halves(source, index, ((first, reader), (second, view)), see, wanted)
    except Astray:  # a key frame that is none, perhaps: with one reader there is less to seek
        with opened(source.file, source.name, source.options.limits, source.deadline) as again:
            return _show(index, spans_of(index, rows, fresh=True), again, see, wanted)


def _halves(
    source: File,
    index: Index,
    parts: tuple[tuple[Sequence[Span], Reader], tuple[Sequence[Span], BinaryIO]],
    see: See,
    wanted: frozenset[int] | None,
) -> Trail:
    """Two readers at once, one thread each."""
    (first, reader), (second, view) = parts
    if not reader.codec.is_open:
        reader.codec.thread_count = 1
    failed = Event()

    def half(spans: Sequence[Span], reader: Reader) -> Trail:
        try:
            return _show(index, spans, reader, watched, wanted)
        except BaseException:
            failed.set()
            raise

    def watched(row: int, frame: VideoFrame) -> None:
        if failed.is_set():  # what went wrong is met again on the slower way
            raise Astray
        see(row, frame)

    def rest() -> Trail:
        with opened(view, source.name, source.options.limits, source.deadline) as own:
            own.codec.thread_count = 1
            return half(second, own)

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(rest)
        mine, theirs = half(first, reader), other.result()
    return Trail(mine.skipped or theirs.skipped, [*mine.faults, *theirs.faults])


def _show(
    index: Index,
    spans: Sequence[Span],
    reader: Reader,
    see: See,
    wanted: frozenset[int] | None = None,
) -> Trail:
    reader.faults = []
    trail = Trail(faults=reader.faults)
    for span in spans:
        with closing(_frames(index, span, reader, trail, wanted)) as frames:
            for row, frame in frames:
                see(row, frame)
    return trail


def spans_of(index: Index, rows: Rows, *, fresh: bool) -> list[Span]:
    """Where to seek to. A fresh reader stands at the beginning already."""
    keys = index.timeline.keys
    assert keys is not None
    spans: list[Span] = [Span(None, -1)] if fresh else []
    before = np.searchsorted(keys, rows, side="right") - 1
    for row, place in zip(rows.tolist(), before.tolist(), strict=True):
        key = int(keys[place]) if place >= 0 else 0
        if spans and key - spans[-1].last <= _SEEK_COST:
            spans[-1] = Span(spans[-1].key, row)
        else:
            spans.append(Span(key, row))
    return [span for span in spans if span.last >= 0]


def split(index: Index, rows: Rows, *, fresh: bool) -> tuple[list[Span], list[Span]]:
    """The spans in two parts of about the same number of frames; the second may be empty."""
    keys = index.timeline.keys
    assert keys is not None
    before = np.searchsorted(keys, rows, side="right") - 1
    cuts = np.flatnonzero(np.diff(before) > 0) + 1  # where a key frame lies between two rows
    if not len(cuts):
        return spans_of(index, rows, fresh=fresh), []
    middle = int(np.abs(rows[cuts] - (rows[0] + rows[-1]) / 2).argmin())
    parts = (
        (spans_of(index, rows[:cut], fresh=fresh), spans_of(index, rows[cut:], fresh=False))
        for cut in cuts[max(middle - 4, 0) : middle + 5].tolist()
    )
    return min(parts, key=lambda part: max(sum(s.frames for s in half) for half in part))


def _frames(
    index: Index,
    span: Span,
    reader: Reader,
    trail: Trail,
    wanted: frozenset[int] | None = None,
) -> Generator[tuple[int, VideoFrame], None, None]:
    """The frames of a span: all of them, or with `wanted`, stamps, at least those."""
    if span.key is not None:
        assert index.stamps is not None
        if not reader.seek(int(index.stamps[span.key])):
            raise Astray
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
                raise Astray
            if span.key is not None and frame.is_corrupt:
                raise Astray  # a key frame that is none: what comes before it is needed
            trail.skipped = trail.skipped or awaited < min(row, checked)
            awaited = row + 1
            yield row, frame
            if row >= span.last:
                return


class _View(io.RawIOBase):
    """A file read by position, so that nobody else's position moves."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._at = descriptor, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, target: object) -> int:
        view = memoryview(target)  # type: ignore[arg-type]
        data = os.pread(self._descriptor, len(view), self._at)
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at}.get(whence)
        self._at = (os.fstat(self._descriptor).st_size if base is None else base) + offset
        return self._at

    def tell(self) -> int:
        return self._at


def _view(file: BinaryIO) -> BinaryIO | None:
    """The same bytes with a position of their own; None where there is no way to have that."""
    if isinstance(file, io.BytesIO):
        return io.BytesIO(file.getvalue())  # shares the memory
    if not isinstance(file, io.BufferedReader) or not hasattr(os, "pread"):
        return None
    try:
        return cast(BinaryIO, _View(file.fileno()))
    except OSError:
        return None
