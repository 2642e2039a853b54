"""Boxes of ISO media files (MP4, MOV, HEIF, AVIF): found by their headers, read within bounds.

ISO/IEC 14496-12: a 32-bit size and a four-letter type; size 1 means that 64 bits follow, and size 0
that the box ends with what holds it. A file may claim anything: boxes end where their parent does,
and what is longer than the caller allows is not read.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import BinaryIO

_MOST_BOXES = 100_000  # side by side; a day in fragments of two seconds has fewer


@dataclass(frozen=True)
class Box:
    """Where the content of a box lies in a file."""

    kind: bytes
    start: int
    end: int


def headers(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Type, start and end of the content of each box between two places of a file. A box that
    overruns `end` is cut there, as FFmpeg reads it; what is no box ends the iteration."""
    while start + 8 <= end:
        file.seek(start)
        head = file.read(16)
        if len(head) < 8:
            return
        size, kind = struct.unpack(">I4s", head[:8])
        skip = 8
        if size == 1 and len(head) == 16:
            size, skip = int.from_bytes(head[8:], "big"), 16
        elif size == 0:
            size = end - start
        if size < skip:
            return
        yield kind, start + skip, min(start + size, end)
        start += size


def boxes(file: BinaryIO, start: int, end: int) -> Iterator[Box]:
    """The boxes between two places of a file, at most _MOST_BOXES of them."""
    for header in islice(headers(file, start, end), _MOST_BOXES):
        yield Box(*header)


def find(file: BinaryIO, within: Box, *path: bytes) -> Box | None:
    """The first box at a path of types."""
    place: Box | None = within
    for kind in path:
        assert place is not None
        inside = boxes(file, place.start, place.end)
        place = next((box for box in inside if box.kind == kind), None)
        if place is None:
            return None
    return place


def content(file: BinaryIO, box: Box, most: int) -> bytes:
    """The content of a box, or b"" where it is longer than `most` bytes."""
    if box.end - box.start > most:
        return b""
    file.seek(box.start)
    return file.read(box.end - box.start)


def whole(file: BinaryIO) -> Box:
    """The file as the box that holds all others."""
    return Box(b"", 0, file.seek(0, 2) or file.tell())


class Cursor:
    """Reads big-endian fields one after another. Raises ValueError behind the end."""

    def __init__(self, data: bytes | memoryview) -> None:
        self.data, self.at = memoryview(data), 0

    def __bool__(self) -> bool:
        return self.at < len(self.data)

    def take(self, count: int) -> bytes:
        if count < 0 or self.at + count > len(self.data):
            raise ValueError("a box that is too short")
        self.at += count
        return bytes(self.data[self.at - count : self.at])

    def number(self, count: int) -> int:
        """An unsigned number of so many bytes."""
        return int.from_bytes(self.take(count), "big")

    def text(self) -> bytes:
        """Up to a zero byte, or to the end."""
        rest = bytes(self.data[self.at :])
        value = rest.partition(b"\0")[0]
        self.at = min(self.at + len(value) + 1, len(self.data))
        return value

    def boxes(self) -> Iterator[tuple[bytes, memoryview]]:
        """The boxes of what is left, each with its content."""
        while self.at + 8 <= len(self.data):
            size, kind = struct.unpack_from(">I4s", self.data, self.at)
            if size == 0:
                size = len(self.data) - self.at
            if size < 8 or self.at + size > len(self.data):
                raise ValueError(f"a broken {kind!r} box")
            yield kind, self.data[self.at + 8 : self.at + size]
            self.at += size
