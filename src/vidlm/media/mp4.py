"""The tables of an MP4 that say when each sample is shown, which PyAV's index leaves out.

ISO/IEC 14496-12: boxes of a 32-bit size and a four-letter type; `stts` has the decoding durations,
`ctts` how much later than decoded a sample is shown, both as runs of equal values.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

_MOST_BYTES = 256 << 20  # of a moov box: that of a day of frames is smaller
_TO_TABLE = (b"mdia", b"minf", b"stbl")

Ticks = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class SampleTable:
    """Of every sample in decoding order, in ticks (N,): its duration, and by how much its
    presentation follows its decoding."""

    durations: Ticks
    offsets: Ticks


def sample_table(file: BinaryIO, track: int, count: int) -> SampleTable | None:
    """The table of a track with `count` samples; None where the file has no such table.

    track: as FFmpeg gives it, a signed number.

    The file may be anything: nothing larger than its moov box and `count` is allocated.
    """
    moov = _movie(file)
    if moov is None:
        return None
    for trak in _named(moov, b"trak"):
        header = next(_named(trak, b"tkhd"), b"")
        at = 20 if header[:1] == b"\x01" else 12  # behind 64-bit or 32-bit dates
        if header[at : at + 4] != (track & 0xFFFFFFFF).to_bytes(4, "big"):
            continue
        table = trak
        for name in _TO_TABLE:
            table = next(_named(table, name), memoryview(b""))
        durations = _runs(next(_named(table, b"stts"), None), count)
        offsets = _runs(next(_named(table, b"ctts"), None), count)
        if durations is None:
            return None
        if offsets is None:
            offsets = np.zeros(count, np.int64)
        # A file with negative offsets is shown that much later, so that none precedes its decoding.
        return SampleTable(durations, offsets + max(-int(offsets.min(initial=0)), 0))
    return None


def _movie(file: BinaryIO) -> memoryview | None:
    """The contents of the moov box."""
    end = file.seek(0, 2) or file.tell()
    at = 0
    while at + 8 <= end:
        file.seek(at)
        head = file.read(16)
        if len(head) < 8:
            return None
        size, kind = struct.unpack(">I4s", head[:8])
        skip = 8
        if size == 1 and len(head) == 16:
            size, skip = int.from_bytes(head[8:], "big"), 16
        elif size == 0:
            size = end - at
        if size < skip or at + size > end:
            return None
        if kind == b"moov":
            if size > _MOST_BYTES:
                return None
            file.seek(at + skip)
            return memoryview(file.read(size - skip))
        at += size
    return None


def _named(box: memoryview, wanted: bytes) -> Iterator[memoryview]:
    """The contents of the boxes of a type, directly inside another; stops at a broken one."""
    at = 0
    while at + 8 <= len(box):
        size, kind = struct.unpack_from(">I4s", box, at)
        if size < 8 or at + size > len(box):
            return
        if kind == wanted:
            yield box[at + 8 : at + size]
        at += size


def _runs(box: memoryview | None, count: int) -> Ticks | None:
    """(count,) values of a table of (how many, value) runs; None where it has another number."""
    if box is None or len(box) < 8:
        return None
    (runs,) = struct.unpack_from(">I", box, 4)
    if runs * 8 > len(box) - 8:
        return None
    pairs = np.frombuffer(box, ">i4", 2 * runs, 8).reshape(runs, 2).astype(np.int64)
    if (pairs[:, 0] < 0).any() or pairs[:, 0].sum() != count:
        return None
    return np.repeat(pairs[:, 1], pairs[:, 0])
