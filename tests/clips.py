"""Videos made on the spot, each frame with its own number painted in.

The top eighth of a picture is a strip of 16 equal cells, white for 1 and black for 0, the most
significant bit on the left; `numbers` reads them back.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction

import av
import numpy as np
from numpy.typing import NDArray

from vidlm.media import Video

Frames = NDArray[np.uint8]

BITS = 16


def picture(number: int, width: int = 128, height: int = 96) -> Frames:
    """(H, W, 3): the strip over a ground whose brightness follows the number."""
    frame = np.full((height, width, 3), 40 + number * 3 % 160, np.uint8)
    for cell in range(BITS):
        value = 255 * (number >> (BITS - 1 - cell) & 1)
        frame[: height // 8, cell * width // BITS : (cell + 1) * width // BITS] = value
    return frame


def pictures(count: int, width: int = 128, height: int = 96) -> Frames:
    return np.stack([picture(number, width, height) for number in range(count)])


def numbers(frames: Frames) -> list[int]:
    """The number in each picture's strip, from the middle of each cell."""
    height, width = frames.shape[1] // 8, frames.shape[2]
    rows = slice(height // 4, max(3 * height // 4, height // 4 + 1))
    result = np.zeros(len(frames), int)
    for cell in range(BITS):
        middle = (2 * cell + 1) * width // (2 * BITS)
        side = max(width // BITS // 4, 1)
        grey = frames[:, rows, middle - side // 2 : middle - side // 2 + side].mean((1, 2, 3))
        result = result * 2 + (grey > 127)
    return result.tolist()


Edit = Callable[[list[av.Packet]], Iterable[av.Packet]]


def encode(
    frames: Iterable[Frames],
    *,
    container: str = "mp4",
    codec: str = "libx264",
    rate: int = 25,
    pix_fmt: str = "yuv420p",
    times: Sequence[float] | None = None,
    options: dict[str, str] | None = None,
    edit: Edit = list,
) -> bytes:
    """A file of these frames, at `rate` a second or at `times`; `edit` may change its packets."""
    frames = list(frames)
    height, width = frames[0].shape[:2]
    target = io.BytesIO()
    with av.open(target, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.codec_context.thread_count = 1
        stream.codec_context.time_base = Fraction(1, 1000 if times else rate)
        packets = []
        for number, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            frame.pts = round(times[number] * 1000) if times else number
            frame.time_base = stream.codec_context.time_base
            packets += stream.encode(frame)
        packets += stream.encode(None)
        for packet in edit(packets):
            output.mux(packet)
    return target.getvalue()


def clip(count: int = 20, **how: object) -> bytes:
    """A file of `count` numbered pictures."""
    return encode(pictures(count), **how)  # type: ignore[arg-type]


def sound(with_cover: bool = False) -> bytes:
    """An MP4 without moving pictures."""
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=44100)
        if with_cover:
            cover = output.add_stream("mjpeg", rate=1)
            cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
            cover.disposition = av.stream.Disposition.attached_pic
            image = av.VideoFrame.from_ndarray(picture(1, 64, 48), format="rgb24")
            for packet in cover.encode(image) + cover.encode(None):
                output.mux(packet)
        silence = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), "fltp", "stereo")
        silence.sample_rate, silence.pts = 44100, 0
        for packet in stream.encode(silence) + stream.encode(None):
            output.mux(packet)
    return target.getvalue()


STILLS = {"container": "mov", "codec": "png", "pix_fmt": "rgb24"}  # each frame on its own


def spoiled(*places: int) -> Edit:
    """These packets hold nothing that decodes."""

    def edit(packets: list[av.Packet]) -> Iterable[av.Packet]:
        for place, packet in enumerate(packets):
            if place not in places:
                yield packet
                continue
            broken = av.Packet(b"\xff" * packet.size)
            broken.stream, broken.time_base = packet.stream, packet.time_base
            broken.pts, broken.dts, broken.duration = packet.pts, packet.dts, packet.duration
            broken.is_keyframe = packet.is_keyframe
            yield broken

    return edit


def check(video: Video, indices: Iterable[int]) -> None:
    indices = list(indices)
    assert video.indices.tolist() == indices
    assert numbers(video.frames) == indices


class Forward(io.RawIOBase):
    """Bytes that only come once, as from a pipe."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def readinto(self, target) -> int:
        return self._data.readinto(target)
