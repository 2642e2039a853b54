"""Clips that are not video files: arrays, images, and animations that are left to Pillow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vidlm.errors import InvalidArgument
from vidlm.media.clip import Deadline, Frames, ReadOptions, Timeline, Video
from vidlm.media.fetch import check_local
from vidlm.media.picture import resized
from vidlm.media.pillow import reading, to_rgb
from vidlm.media.sample import Rows, between
from vidlm.media.scene import SIDE, Shots
from vidlm.media.still import read_still

Pixels = NDArray[Any]
Still = Image.Image | Pixels | str | Path

_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
# Browsers show a frame that asks for 10 ms or less for this long.
_DEFAULT_MS = 100


def from_array(array: Pixels, options: ReadOptions) -> Video:
    """(F, H, W, 3) RGB or (F, H, W) grey, uint8."""
    shape = array.shape
    grey, colour = array.ndim == 3 and shape[-1] != 3, array.ndim == 4 and shape[-1] == 3
    if array.dtype != np.uint8 or not (grey or colour) or 0 in shape:
        raise InvalidArgument(
            f"an array of {array.dtype} {shape} is no clip; give uint8 (F, H, W, 3) RGB or "
            "(F, H, W) grey: one image as image[None], channels last, values 0 to 255"
        )
    timeline = _counted(len(array))
    options.limits.check_length("array", len(array), 0.0)
    rows = _choose(timeline, options, lambda row: Image.fromarray(array[row]))
    options.limits.check("array", len(rows), *options.scale(*shape[1:3]))
    frames = _rgb(array[rows])
    if options.scale(*shape[1:3]) != shape[1:3]:
        frames = np.stack([_scaled(frame, options) for frame in frames])
    return timeline.video(frames, rows, "array")


def from_list(items: Sequence[Still], options: ReadOptions, name: str = "list of frames") -> Video:
    """PIL images, arrays and paths of images, mixed as one likes, all of one size."""
    for place, item in enumerate(items):
        if not isinstance(item, Image.Image | np.ndarray | str | Path):
            raise InvalidArgument(
                f"item {place} of the list of frames is a {type(item).__name__}; "
                "give PIL images, uint8 arrays (H, W, 3) or (H, W), or paths of images"
            )
    if not items:
        raise InvalidArgument("an empty list holds no frames; give at least one image")
    timeline, limits = _counted(len(items)), options.limits
    limits.check_length(name, len(items), 0.0)
    deadline = Deadline(name, limits.seconds)
    notes: dict[str, int] = {}

    def picture_of(row: int) -> Frames:
        deadline.check()
        return _picture(items[row], f"frame {row}", options, notes)

    rows = _choose(timeline, options, lambda row: Image.fromarray(picture_of(row)))
    frames: Frames | None = None
    for place, row in enumerate(rows):
        picture = _scaled(picture_of(row), options)
        if frames is None:
            limits.check(name, len(rows), *picture.shape[:2])
            frames = np.empty((len(rows), *picture.shape), np.uint8)
        if picture.shape != frames.shape[1:]:
            (height, width), (h, w) = frames.shape[1:3], picture.shape[:2]
            raise InvalidArgument(
                f"frame {row} is {w}x{h} and frame {rows[0]} is {width}x{height}; "
                "the frames of a clip have one size: resize or crop them first"
            )
        frames[place] = picture
    assert frames is not None
    warnings = [f"of {count} frames, {note}" for note, count in notes.items()]
    return timeline.video(frames, rows, "frames" if name == "list of frames" else name, warnings)


def from_still(file: BinaryIO, name: str, options: ReadOptions) -> Video:
    """A HEIC or AVIF image as a clip of one frame, one second long."""
    image, notes = read_still(file, name, options.limits)
    picture = _scaled(_from_image(image, name), options)
    timeline = _counted(1)
    rows = _choose(timeline, options, lambda row: Image.fromarray(picture))
    options.limits.check(name, len(rows), *picture.shape[:2])
    return timeline.video(np.stack([picture] * len(rows)), rows, name, notes)


def is_webp(head: bytes) -> bool:
    return head[:4] == b"RIFF" and head[8:12] == b"WEBP"


def from_animation(file: BinaryIO, name: str, options: ReadOptions, form: str) -> Video:
    """An animated WebP or AVIF (Pillow's name of the format), decoded twice: once for the frames'
    times, once for the chosen ones."""
    limits, deadline = options.limits, Deadline(name, options.limits.seconds)
    with reading(name), Image.open(file, formats=[form]) as image:
        limits.check(name, 1, image.height, image.width)
        count = getattr(image, "n_frames", 1)
        limits.check_length(name, count, 0.0)
        ends = np.cumsum([_length(image, row, deadline) for row in range(count)])
        timeline = Timeline(np.append(0, ends[:-1]) / 1000, float(ends[-1]) / 1000)
        limits.check_length(name, count, timeline.stop)
        rows = _choose(timeline, options, lambda row: _at(image, row, deadline))
        height, width = options.scale(image.height, image.width)
        limits.check(name, len(rows), height, width)
        frames = np.empty((len(rows), height, width, 3), np.uint8)
        for place, row in enumerate(rows):
            frames[place] = _scaled(np.asarray(_at(image, int(row), deadline)), options)
    return timeline.video(frames, rows, name)


def _at(image: Image.Image, row: int, deadline: Deadline) -> Image.Image:
    deadline.check()
    image.seek(row)
    return to_rgb(image)


def _length(image: Image.Image, row: int, deadline: Deadline) -> int:
    deadline.check()
    image.seek(row)
    image.load()
    length = int(image.info.get("duration", _DEFAULT_MS))
    return length if length > 10 else _DEFAULT_MS


def _choose(
    timeline: Timeline, options: ReadOptions, picture: Callable[[int], Image.Image]
) -> Rows:
    """The rows of the policy; `picture` gives that of a row, for a policy that looks at them."""
    if options.policy.sampling != "scenes":
        return timeline.choose(options.policy)
    shots = Shots(timeline.fps)
    first, last = between(timeline.pts, *options.policy.window, stop=timeline.stop)
    for row in range(first, last):
        small = picture(row).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
        shots.see(row, np.asarray(small))
    return timeline.choose(options.policy, shots.starts())


def _scaled(picture: Frames, options: ReadOptions) -> Frames:
    height, width = options.scale(*picture.shape[:2])
    return picture if (height, width) == picture.shape[:2] else resized(picture, height, width)


def _counted(n: int) -> Timeline:
    """No clock: frame i at i seconds."""
    return Timeline(np.arange(n, dtype=np.float64), float(n))


def _picture(item: Still, what: str, options: ReadOptions, notes: dict[str, int]) -> Frames:
    if isinstance(item, np.ndarray):
        return _from_pixels(item, what)
    if isinstance(item, Image.Image):
        return _from_image(item, what)
    return _from_file(Path(item), what, options, notes)


def _from_pixels(item: Pixels, what: str) -> Frames:
    good = item.ndim == 2 or (item.ndim == 3 and item.shape[-1] == 3)
    if item.dtype != np.uint8 or not good or 0 in item.shape:
        raise InvalidArgument(
            f"{what} is an array of {item.dtype} {item.shape}; give uint8 (H, W, 3) or (H, W)"
        )
    return _rgb(item)


def _from_image(image: Image.Image, what: str) -> Frames:
    if image.mode in _DEEP_MODES:
        raise InvalidArgument(
            f"{what} is an image of mode {image.mode!r}, more than 8 bits a channel; scale it to "
            "0..255 and convert it to 'L' or 'RGB' yourself"
        )
    return np.asarray(to_rgb(image))


def _from_file(path: Path, what: str, options: ReadOptions, notes: dict[str, int]) -> Frames:
    name = f"{what}, {path}"
    with reading(name), check_local(path, options.access).open("rb") as file:
        image, remarks = read_still(file, name, options.limits)
        for remark in remarks:
            notes[remark] = notes.get(remark, 0) + 1
        return _from_image(image, name)


def _rgb(array: Pixels) -> Frames:
    """Grey values in all three channels, where there are none."""
    if array.shape[-1] == 3 and array.ndim != 2:
        return array
    return np.repeat(array[..., None], 3, axis=-1)
