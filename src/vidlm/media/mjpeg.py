"""JPEGs one after another: raw MJPEG of cameras, multipart MJPEG as they send it over HTTP."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import BinaryIO

_LOOKED_AT = 32 << 20  # bytes in which the second picture must begin
_GAP = 4096  # between two pictures: padding, or the header of a part
_HEADER = re.compile(rb"content-type:\s*image/jpe?g", re.IGNORECASE)
_START, _END = b"\xff\xd8\xff", b"\xff\xd9"
# What ends the entropy-coded data of a scan: a marker that is neither a stuffed zero nor a restart.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_SIZES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF markers, which hold the size
_EOI, _APP2 = 0xD9, 0xE2


@dataclass(frozen=True)
class _Jpeg:
    """One JPEG among others: where it ends, its height and width, whether it begins an album."""

    end: int
    size: bytes
    is_album: bool


def is_sequence(file: BinaryIO) -> bool:
    """Whether a file is a series of JPEGs of one size, bare or each behind a header.

    A JPEG with a smaller preview behind it, or an album of pictures (MPO), is a still image.
    """
    file.seek(0)
    head = file.read(_GAP)
    if not head.startswith(_START):
        before, found, _ = head.partition(_START)
        return bool(found) and _HEADER.search(before) is not None
    file.seek(0)
    data = file.read(_LOOKED_AT)
    if not _may_go_on(data):
        return False
    first = _jpeg(data, 0)
    if first is None or first.is_album:
        return False
    start = data.find(_START, first.end, first.end + _GAP)
    second = _jpeg(data, start) if start >= 0 else None
    return second is not None and second.size == first.size


def _may_go_on(data: bytes) -> bool:
    """Whether a picture may begin behind the end of another: soon told of a photograph, whose
    thumbnail begins behind no end."""
    at = data.find(_START, 1)
    while at >= 0 and data.rfind(_END, max(at - _GAP, 0), at) < 0:
        at = data.find(_START, at + 1)
    return at >= 0


def _jpeg(data: bytes, at: int) -> _Jpeg | None:
    """The JPEG that begins at a place, if it is whole; segments are skipped by their lengths."""
    size, is_album = b"", False
    at += 2
    while True:
        marker = _MARKER.search(data, at)
        if marker is None:
            return None
        kind, at = data[marker.end() - 1], marker.end()
        if kind == _EOI:
            return _Jpeg(at, size, is_album)
        length = int.from_bytes(data[at : at + 2], "big")
        if length < 2:
            return None
        segment = data[at + 2 : at + length]
        if kind in _SIZES:
            size = segment[1:5]
        is_album = is_album or (kind == _APP2 and segment.startswith(b"MPF\0"))
        at += length
