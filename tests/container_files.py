"""Containers with what FFmpeg's muxers do not write: boxes and elements put into their headers."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.uint8]

# What holds boxes behind fields of its own: how many bytes those take.
_FIELDS = {b"stsd": 8, b"avc1": 78, b"mp4v": 78, b"encv": 78}
SAMPLE_ENTRY = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd")

SEGMENT, TRACKS, TRACK_ENTRY, VIDEO = 0x18538067, 0x1654AE6B, 0xAE, 0xE0


def box(kind: bytes, *parts: bytes) -> bytes:
    content = b"".join(parts)
    return struct.pack(">I4s", len(content) + 8, kind) + content


def boxes(data: bytes) -> list[tuple[bytes, bytes]]:
    """The boxes side by side, each with its whole text."""
    found = []
    while data:
        size, kind = struct.unpack_from(">I4s", data)
        found.append((kind, data[:size]))
        data = data[size:]
    return found


def with_box(data: bytes, path: Sequence[bytes], added: bytes, rename: bytes = b"") -> bytes:
    """MP4 boxes with another one at the end of the box at a path, which may get another name."""
    result = b""
    for kind, text in boxes(data):
        if kind == path[0]:
            head = _FIELDS.get(kind, 0)
            fields, inside = text[8 : 8 + head], text[8 + head :]
            if len(path) > 1:
                text = box(kind, fields, with_box(inside, path[1:], added, rename))
            else:
                text = box(rename or kind, fields, inside, added)
        result += text
    return result


def element(id: int, content: bytes) -> bytes:
    head = id.to_bytes((id.bit_length() + 7) // 8, "big")
    return head + (len(content) | 1 << 56).to_bytes(8, "big") + content


def with_element(data: bytes, path: Sequence[int], added: bytes) -> bytes:
    """Matroska elements with another one at the end of the element at a path."""
    result = b""
    while data:
        id, used = _number(data, keep_marker=True)
        size, more = _number(data[used:], keep_marker=False)
        start = used + more
        end = len(data) if size == (1 << 7 * more) - 1 else start + size
        text, content = data[:end], data[start:end]
        if id == path[0]:
            inside = with_element(content, path[1:], added) if path[1:] else content + added
            text = element(id, inside)
        result, data = result + text, data[end:]
    return result


def _number(data: bytes, *, keep_marker: bool) -> tuple[int, int]:
    length = 9 - data[0].bit_length()
    value = int.from_bytes(data[:length], "big")
    return (value if keep_marker else value & ((1 << 7 * length) - 1)), length


def muxed(
    frames: Frames,
    container: str,
    codec: str,
    pix_fmt: str = "yuv420p",
    *,
    source: str = "rgb24",
    muxer: dict[str, str] | None = None,
    aspect: Fraction | None = None,
    options: dict[str, str] | None = None,
) -> bytes:
    """A file of frames in the pixel format `source`, with options of its muxer and encoder."""
    target = io.BytesIO()
    with av.open(target, "w", format=container, options=muxer or {}) as output:
        stream = output.add_stream(codec, rate=25, options=options or {})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        stream.codec_context.thread_count = 1
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        for number, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(array, format=source)
            frame.pts = number
            output.mux(stream.encode(frame.reformat(format=pix_fmt)))
        output.mux(stream.encode(None))
    return target.getvalue()
