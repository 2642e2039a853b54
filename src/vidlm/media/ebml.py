"""Elements of Matroska and WebM files (RFC 8794): found by their headers, read within bounds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

HEADER, SEGMENT, CLUSTER = 0x1A45DFA3, 0x18538067, 0x1F43B675
_MOST_ELEMENTS = 100_000  # side by side
_UNKNOWN = -1


@dataclass(frozen=True)
class Element:
    """Where the content of an element lies; one of unknown size ends where its parent does."""

    id: int
    start: int
    end: int


def elements(file: BinaryIO, start: int, end: int) -> Iterator[Element]:
    """The elements between two places of a file; the last may be one of unknown size."""
    for _ in range(_MOST_ELEMENTS):
        if start >= end:
            return
        file.seek(start)
        head = file.read(12)
        kind, used = _number(head, keep_marker=True)
        size, more = _number(head[used:], keep_marker=False)
        if not used or not more:
            return
        start += used + more
        stop = end if size == _UNKNOWN else min(start + size, end)
        yield Element(kind, start, stop)
        if size == _UNKNOWN:
            return
        start += size


def find(file: BinaryIO, within: Element, *path: int) -> Element | None:
    """The first element at a path of ids."""
    place: Element | None = within
    for wanted in path:
        assert place is not None
        inside = elements(file, place.start, place.end)
        place = next((each for each in inside if each.id == wanted), None)
        if place is None:
            return None
    return place


def unsigned(file: BinaryIO, within: Element, wanted: int, default: int = 0) -> int:
    """The value of an unsigned element inside another."""
    element = find(file, within, wanted)
    if element is None or not 0 < element.end - element.start <= 8:
        return default
    file.seek(element.start)
    return int.from_bytes(file.read(element.end - element.start), "big")


def whole(file: BinaryIO) -> Element:
    """The file as the element that holds all others."""
    return Element(0, 0, file.seek(0, 2) or file.tell())


def _number(data: bytes, *, keep_marker: bool) -> tuple[int, int]:
    """A variable-length number and how many bytes it takes, 0 where there is none."""
    if not data or not data[0]:
        return 0, 0
    length = 9 - data[0].bit_length()
    if len(data) < length:
        return 0, 0
    value = int.from_bytes(data[:length], "big")
    if keep_marker:
        return value, length
    value &= (1 << 7 * length) - 1
    return (_UNKNOWN if value == (1 << 7 * length) - 1 else value), length
