"""What an MP4 declares against what its bytes can hold, before a demuxer builds tables of it.

A table of ISO/IEC 14496-12 may describe any number of samples in a few bytes: samples of one size,
runs of one duration, fragments with defaults, edits that repeat the whole track. FFmpeg makes an
entry of 24 bytes for each sample, so a file of 700 bytes could take 2 GB. Declared counts are added
up here from the boxes' headers; a complete file holds at least one byte for each sample.
"""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from vidlm.errors import MediaError, MediaLimitError
from vidlm.media.boxes import headers
from vidlm.media.clip import Deadline, Limits

# Boxes that hold boxes in which a demuxer looks for tables.
_PARENTS = frozenset(
    b"moov trak mdia minf stbl moof traf mvex edts dinf udta gmhd wave sinf schi".split()
)
_DEEPEST = 16
# Counts up to this are not examined: their tables take a few megabytes.
_FREE = 100_000
# A file that was cut off may lack most of its samples, but not all of them.
_CUT = 8
# Bytes of each entry of tables that start with a 32-bit count, after version and flags.
_ENTRIES = {b"stts": 8, b"ctts": 8, b"stsc": 12, b"stco": 4, b"co64": 8, b"stss": 4, b"stps": 4}
_FIELDS = (0x100, 0x200, 0x400, 0x800)  # of a trun's samples, 4 bytes each, where the flag is set
# Edits times samples, the most index entries that an edit list can lead to.
_FREE_EDITED, _BYTES_EDITED = 2_000_000, 2
# Of all tracks; 48 hours of sound and pictures have fewer.
_MOST_ENTRIES = 20_000_000
_MOVIE_BYTES = 256 << 20  # of a compressed moov box: that of a day of frames is smaller


@dataclass(frozen=True)
class Box:
    """A box of `file`: its contents are the bytes from `start` to `end`."""

    file: BinaryIO
    kind: bytes
    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start

    def read(self, size: int, at: int = 0) -> bytes:
        """The bytes from `at` on, padded with zeros where the box is shorter."""
        self.file.seek(self.start + at)
        return self.file.read(max(min(size, self.size - at), 0)).ljust(size, b"\0")

    def number(self, at: int) -> int:
        return int.from_bytes(self.read(4, at), "big")

    def boxes(self, deadline: Deadline) -> Iterator[Box]:
        """The boxes directly inside."""
        for header in headers(self.file, self.start, self.end):
            deadline.check()
            yield Box(self.file, *header)


@dataclass
class _Track:
    """The counts of one track's tables. each: bytes of a sample, if all have the same."""

    samples: int = 0
    each: int = 1
    edits: int = 0
    is_sound: bool = False
    is_picture: bool = False
    run: tuple[int, int] = (0, 0)
    chunks: int = 0
    chunk_runs: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 2), np.int64))

    @property
    def entries(self) -> int:
        """How many index entries FFmpeg makes: uncompressed sound gets one for 1024 samples."""
        if not self.is_sound or self.run != (1, 1):
            return self.samples
        first, samples = self.chunk_runs.T
        chunks = np.diff(np.append(first, self.chunks + 1)).clip(0)
        return int((chunks * ((samples + 1023) // 1024)).astype(float).sum())


class _Tables:
    """Adds up what the boxes of a file declare."""

    def __init__(self, name: str, size: int, limits: Limits, deadline: Deadline) -> None:
        self._name, self._size, self._limits, self._deadline = name, size, limits, deadline
        self._entries = self._bytes = 0

    def walk(self, box: Box, track: _Track, depth: int = 0) -> None:
        for inner in box.boxes(self._deadline):
            if inner.kind == b"trak":
                own = _Track()
                self.walk(inner, own, depth + 1)
                self._add_track(own)
            elif inner.kind in _PARENTS and depth < _DEEPEST:
                self.walk(inner, track, depth + 1)
            elif inner.kind == b"meta" and depth < _DEEPEST:  # QuickTime's has no version
                skip = 0 if inner.read(4, 4) == b"hdlr" else 4
                items = Box(inner.file, b"meta", inner.start + skip, inner.end)
                self.walk(items, track, depth + 1)
            elif inner.kind == b"cmov" and depth < _DEEPEST:
                self.walk(self._expanded(inner), track, depth + 1)
            else:
                self._read(inner, track)

    def _read(self, box: Box, track: _Track) -> None:
        kind = box.kind
        if kind in _ENTRIES:
            self._check_table(box, box.number(4), _ENTRIES[kind])
        if kind == b"hdlr":
            track.is_sound |= box.read(4, 8) == b"soun"
            track.is_picture |= box.read(4, 8) == b"vide"
        elif kind in (b"stsz", b"stz2"):
            same = box.number(4) if kind == b"stsz" else 0
            track.samples, track.each = box.number(8), max(same, 1)
            if not same:
                bits = 32 if kind == b"stsz" else max(box.number(4) & 0xFF, 4)
                self._check_table(box, track.samples, bits / 8)
        elif kind == b"stts":
            track.run = box.number(4), box.number(12)
        elif kind == b"stsc":
            track.chunk_runs = _chunk_runs(box)
        elif kind in (b"stco", b"co64"):
            track.chunks = min(box.number(4), box.size // _ENTRIES[kind])
        elif kind == b"elst":
            each = 20 if box.read(1) == b"\1" else 12
            track.edits += min(box.number(4), box.size // each)
        elif kind == b"sgpd":
            self._check_table(box, box.number(12 if box.read(1) != b"\0" else 8), 1)
        elif kind in (b"iinf", b"ipma") and box.read(1) != b"\0":
            self._check_table(box, box.number(4), 3)
        elif kind == b"iloc" and box.read(1) == b"\2":
            self._check_table(box, box.number(6), 8)
        elif kind == b"trun":
            fields = sum(bool(box.number(0) & flag) for flag in _FIELDS)
            self._check_table(box, box.number(4), 4 * fields)
            self._add(box.number(4), 1)

    def _check_table(self, box: Box, count: int, each: float) -> None:
        if count > _FREE and count * each > box.size:
            raise MediaError(
                f"{self._name}: its {box.kind.decode('latin-1')} table declares {count} entries in "
                f"{box.size} bytes; the file is damaged or was cut off: get the complete file"
            )

    def _add_track(self, track: _Track) -> None:
        if track.is_picture:
            self._limits.check_length(self._name, track.samples, 0.0)
        edited = track.edits * track.samples
        if track.edits > 1 and edited > _FREE_EDITED + self._size // _BYTES_EDITED:
            raise MediaError(
                f"{self._name}: its edit list declares {track.edits} edits of {track.samples} "
                f"samples in a file of {self._size} bytes; the file is damaged, or make one "
                "without edits: ffmpeg -i INPUT output.mp4"
            )
        self._add(track.entries, track.each)

    def _add(self, entries: int, each: int) -> None:
        """Count samples that take at least that many bytes each in a file that is complete."""
        self._entries += entries
        self._bytes += entries * max(each // _CUT, 1)
        if self._entries > _FREE and self._bytes > self._size:
            raise MediaError(
                f"{self._name}: its tables declare {self._entries} samples in a file of "
                f"{self._size} bytes; the file is damaged or was cut off: get the complete file"
            )
        most = max(_MOST_ENTRIES, 4 * self._limits.frames)
        if self._entries > most:
            raise MediaLimitError(
                f"{self._name}: its tables declare {self._entries} samples, the limit is {most}; "
                "cut it into parts, or raise Limits.frames above a quarter of that"
            )

    def _expanded(self, box: Box) -> Box:
        """The moov box that a cmov box holds compressed; an empty one where it does not."""
        data = b""
        for inner in box.boxes(self._deadline):
            if inner.kind == b"cmvd":
                if inner.number(0) > _MOVIE_BYTES:
                    raise MediaError(
                        f"{self._name}: its compressed moov box declares {inner.number(0)} bytes; "
                        f"at most {_MOVIE_BYTES} are read; make another file of it: "
                        "ffmpeg -i INPUT output.mp4"
                    )
                try:
                    packed = inner.read(max(inner.size - 4, 0), 4)
                    data = zlib.decompressobj().decompress(packed, _MOVIE_BYTES)
                except zlib.error:
                    return Box(io.BytesIO(), b"moov", 0, 0)
        return Box(io.BytesIO(data), b"moov", 0, len(data))


def _chunk_runs(box: Box) -> NDArray[np.int64]:
    """(R, 2): the chunk that each run begins with, from 1, and the samples of its chunks."""
    count = min(box.number(4), max(box.size - 8, 0) // 12)
    runs = np.frombuffer(box.read(12 * count, 8), ">u4").reshape(-1, 3)
    return runs[:, :2].astype(np.int64)


def check_tables(file: BinaryIO, name: str, limits: Limits, deadline: Deadline) -> None:
    """Raises MediaError or MediaLimitError where an MP4's tables declare more than it can hold.

    Reads little more than the boxes' headers. Files of other formats have no such boxes.
    """
    try:
        size = file.seek(0, os.SEEK_END) or file.tell()
        tables = _Tables(name, size, limits, deadline)
        tables.walk(Box(file, b"", 0, size), _Track())
    except MediaError:
        raise
    except (OSError, ValueError):  # the reader that comes next says so
        return
