"""Damaged videos by number: a case is its number, a seed and a folder of sound files, nothing else.

`sound` makes the files (`python fuzz_cases.py FOLDER`), the same each time but for a byte now and
then where x264 decides otherwise; `damaged` and `question` make a case.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import av
from PIL import Image

import clips

# Container, encoder, pixel format, and what makes the file another one.
KINDS: tuple[tuple[str, str, str, dict[str, str]], ...] = (
    ("mp4", "libx264", "yuv420p", {}),
    ("mp4", "libx264", "yuv420p", {"movflags": "frag_keyframe+empty_moov"}),
    ("mov", "prores", "yuv422p10le", {}),
    ("mov", "qtrle", "rgb24", {}),
    ("matroska", "libx264", "yuv420p", {}),
    ("matroska", "libx265", "yuv420p10le", {}),
    ("matroska", "ffv1", "yuv444p", {}),
    ("webm", "libvpx", "yuv420p", {}),
    ("webm", "libvpx-vp9", "yuv420p", {}),
    ("avi", "mjpeg", "yuvj420p", {}),
    ("avi", "mpeg4", "yuv420p", {}),
    ("avi", "rawvideo", "bgr24", {}),
    ("mpegts", "mpeg2video", "yuv420p", {}),
    ("mpegts", "libx264", "yuv420p", {}),
    ("mpeg", "mpeg1video", "yuv420p", {}),
    ("flv", "flv", "yuv420p", {}),
    ("asf", "wmv2", "yuv420p", {}),
    ("nut", "ffvhuff", "yuv422p", {}),
    ("mxf", "mpeg2video", "yuv420p", {}),
    ("gif", "gif", "rgb8", {}),
    ("apng", "apng", "rgb24", {}),
    ("h264", "libx264", "yuv420p", {}),
    ("hevc", "libx265", "yuv420p", {}),
)
FRAMES, WIDTH, HEIGHT = 12, 64, 48
X265 = {"x265-params": "log-level=none:pools=none:frame-threads=1"}

Damage = Callable[[Random, bytearray, bytes], bytearray]


# ---- sound files -----------------------------------------------------------------------------


def sound(folder: Path) -> None:
    """Fills a folder with one file of each kind."""
    for number, kind in enumerate(KINDS):
        (folder / f"{number:02}-{kind[0]}-{kind[1]}").write_bytes(_encode(*kind))
    (folder / f"{len(KINDS):02}-webp").write_bytes(_webp())


def _encode(container: str, codec: str, pix_fmt: str, options: dict[str, str]) -> bytes:
    target = io.BytesIO()
    # Without "bitexact" a muxer writes a random number or the time of day.
    with av.open(target, "w", container, options={"fflags": "bitexact", **options}) as output:
        stream = output.add_stream(codec, rate=25, options=X265 if codec == "libx265" else {})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pix_fmt
        stream.codec_context.thread_count = 1
        stream.codec_context.gop_size = FRAMES // 2
        for number in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(clips.picture(number, WIDTH, HEIGHT), "rgb24")
            frame.pts = number
            output.mux(stream.encode(frame.reformat(format=pix_fmt)))
        output.mux(stream.encode(None))
    return target.getvalue()


def _webp() -> bytes:
    first, *others = (Image.fromarray(frame) for frame in clips.pictures(6, WIDTH, HEIGHT))
    target = io.BytesIO()
    first.save(target, "WEBP", save_all=True, append_images=others, duration=40)
    return target.getvalue()


# ---- damage ----------------------------------------------------------------------------------

HEAD = 4096  # where a file says what it is
ATOM = re.compile(rb"[a-z][a-zA-Z0-9 ]{3}")  # what an MP4 box, an AVI chunk and the like are called
SIZES = (0, 1, 7, 8, 2**16, 2**31 - 1, 2**31, 2**32 - 1)


def flip_bytes(rng: Random, data: bytearray, _: bytes) -> bytearray:
    for _ in range(rng.choice((1, 3, 10, 40))):
        data[rng.randrange(len(data))] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
    return data


def flip_bits(rng: Random, data: bytearray, _: bytes) -> bytearray:
    for _ in range(rng.choice((1, 2, 8))):
        data[rng.randrange(min(len(data), HEAD))] ^= 1 << rng.randrange(8)
    return data


def truncate(rng: Random, data: bytearray, _: bytes) -> bytearray:
    return data[: rng.randrange(len(data))]


def insert(rng: Random, data: bytearray, _: bytes) -> bytearray:
    at = rng.randrange(len(data))
    data[at:at] = rng.randbytes(_length(rng, data))
    return data


def delete(rng: Random, data: bytearray, _: bytes) -> bytearray:
    at = rng.randrange(len(data))
    del data[at : at + _length(rng, data)]
    return data


def duplicate(rng: Random, data: bytearray, _: bytes) -> bytearray:
    at = rng.randrange(len(data))
    data[at:at] = data[at : at + _length(rng, data)] * rng.choice((1, 1, 5))
    return data


def zero(rng: Random, data: bytearray, _: bytes) -> bytearray:
    at, length = rng.randrange(len(data)), _length(rng, data)
    data[at : at + length] = bytes(len(data[at : at + length]))
    return data


def swap(rng: Random, data: bytearray, _: bytes) -> bytearray:
    a, b, c = sorted(rng.randrange(len(data) + 1) for _ in range(3))
    return data[:a] + data[b:c] + data[a:b] + data[c:]


def resize(rng: Random, data: bytearray, _: bytes) -> bytearray:
    """A 32-bit number, in MP4 often a size or a count, beside something that looks like a name."""
    names = [found.start() for found in ATOM.finditer(data)] or [0]
    for _ in range(rng.choice((1, 1, 3))):
        at = max(rng.choice(names) + rng.choice((-4, 4, 8, 12, 16, 20)), 0)
        order = rng.choice(("big", "big", "little"))
        data[at : at + 4] = rng.choice(SIZES).to_bytes(4, order)
    return data


def splice(rng: Random, data: bytearray, other: bytes) -> bytearray:
    return data[: rng.randrange(len(data))] + other[rng.randrange(len(other)) :]


DAMAGES: tuple[Damage, ...] = (
    *(flip_bytes, flip_bits, truncate, insert, delete, duplicate, zero, swap, resize, splice),
    *(flip_bytes, flip_bits, resize),  # what gets furthest into the decoders
)


def _length(rng: Random, data: bytearray) -> int:
    return min(int(2 ** rng.uniform(0, 13)), len(data))


def damaged(seed: int, case: int, folder: Path) -> tuple[str, bytes]:
    """What was done, and the file that came of it."""
    rng = Random(f"{seed}-{case}")
    paths = sorted(folder.iterdir())
    path, other = paths[case % len(paths)], rng.choice(paths)
    data, done = bytearray(path.read_bytes()), [path.name]
    for damage in rng.choices(DAMAGES, k=rng.choice((1, 1, 2, 4))):
        if data:
            data = damage(rng, data, other.read_bytes() if damage is splice else b"")
            done.append(damage.__name__ + (f" {other.name}" if damage is splice else ""))
    return ", ".join(done), bytes(data)


QUESTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"num_frames": 1},
    {"num_frames": 4},
    {"num_frames": 1000, "max_frames": 8},
    {"fps": 1.0},
    {"fps": 1e6},
    {"start": 0.2},
    {"num_frames": 3, "end": "00:00.3"},
    {"fps": 10.0, "start": 0.1, "end": 0.4},
    {"fps": 2.0, "min_frames": 3, "max_frames": 5},
    {"num_frames": 5, "sampling": "linspace"},
    {"num_frames": 4, "sampling": "slowfast"},
    {"sampling": "videollama3"},
    {"sampling": "keyframes"},
    {"num_frames": 3, "sampling": "scenes"},
    {"indices": [3, 0, 3]},
    {"times": [0.3, "00:00.1", 0]},
    {"num_frames": 2, "max_side": 20},
    {"num_frames": 4, "on_error": "raise"},
)


def question(seed: int, case: int) -> dict[str, Any]:
    """The keywords of load_video for a case."""
    return Random(f"{seed}-{case}-question").choice(QUESTIONS)


if __name__ == "__main__":
    sound(Path(sys.argv[1]))
