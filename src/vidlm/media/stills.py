"""Clips that are not video files: arrays, lists of images, and animated WebP (FFmpeg has none)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from vidlm.errors import InvalidArgument, MediaError, MediaLimitError, MediaNotFound, VidlmError
from vidlm.media.clip import Frames, Limits, Timeline, Video
from vidlm.media.sample import FramePolicy, choose

Pixels = NDArray[Any]
Still = Image.Image | Pixels | str | Path

# What PIL's readers raise for files that are damaged in one way or another.
_PIL_ERRORS = (OSError, ValueError, SyntaxError, EOFError)
_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
# Browsers show a frame that asks for 10 ms or less for this long.
_DEFAULT_MS = 100


def from_array(array: Pixels, policy: FramePolicy, limits: Limits) -> Video:
    """(F, H, W, 3) RGB or (F, H, W) grey, uint8."""
    shape = array.shape
    grey, colour = array.ndim == 3 and shape[-1] != 3, array.ndim == 4 and shape[-1] == 3
    if array.dtype != np.uint8 or not (grey or colour) or 0 in shape:
        raise InvalidArgument(
            f"an array of {array.dtype} {shape} is no clip; give uint8 (F, H, W, 3) RGB or "
            "(F, H, W) grey: one image as image[None], channels last, values 0 to 255"
        )
    timeline = _counted(len(array))
    rows = choose(timeline.pts, policy, stop=timeline.stop)
    limits.check("array", len(rows), *shape[1:3])
    return timeline.video(_rgb(array[rows]), rows, "array")


def from_list(items: Sequence[Still], policy: FramePolicy, limits: Limits) -> Video:
    """PIL images, arrays and paths of images, mixed as one likes, all of one size."""
    for place, item in enumerate(items):
        if not isinstance(item, Image.Image | np.ndarray | str | Path):
            raise InvalidArgument(
                f"item {place} of the list of frames is a {type(item).__name__}; "
                "give PIL images, uint8 arrays (H, W, 3) or (H, W), or paths of images"
            )
    if not items:
        raise InvalidArgument("an empty list holds no frames; give at least one image")
    timeline = _counted(len(items))
    rows = choose(timeline.pts, policy, stop=timeline.stop)
    frames: Frames | None = None
    for place, row in enumerate(rows):
        picture = _picture(items[row], f"frame {row}", limits)
        if frames is None:
            limits.check("list of frames", len(rows), *picture.shape[:2])
            frames = np.empty((len(rows), *picture.shape), np.uint8)
        if picture.shape != frames.shape[1:]:
            (height, width), (h, w) = frames.shape[1:3], picture.shape[:2]
            raise InvalidArgument(
                f"frame {row} is {w}x{h} and frame {rows[0]} is {width}x{height}; "
                "the frames of a clip have one size: resize or crop them first"
            )
        frames[place] = picture
    assert frames is not None
    return timeline.video(frames, rows, "frames")


def is_webp(head: bytes) -> bool:
    return head[:4] == b"RIFF" and head[8:12] == b"WEBP"


def from_webp(file: BinaryIO, name: str, policy: FramePolicy, limits: Limits) -> Video:
    """An animated WebP, decoded twice: once for the frames' times, once for the chosen ones."""
    with reading(name), Image.open(file, formats=["WEBP"]) as image:
        height, width = image.height, image.width
        limits.check(name, 1, height, width)
        ends = np.cumsum([_length(image, row) for row in range(getattr(image, "n_frames", 1))])
        timeline = Timeline(np.append(0, ends[:-1]) / 1000, float(ends[-1]) / 1000)
        rows = choose(timeline.pts, policy, stop=timeline.stop)
        limits.check(name, len(rows), height, width)
        frames = np.empty((len(rows), height, width, 3), np.uint8)
        for place, row in enumerate(rows):
            image.seek(int(row))
            frames[place] = np.asarray(to_rgb(image))
    return timeline.video(frames, rows, name)


def _length(image: Image.Image, row: int) -> int:
    image.seek(row)
    image.load()
    length = int(image.info.get("duration", _DEFAULT_MS))
    return length if length > 10 else _DEFAULT_MS


def _counted(n: int) -> Timeline:
    """No clock: frame i at i seconds."""
    return Timeline(np.arange(n, dtype=np.float64), float(n))


def _picture(item: Still, what: str, limits: Limits) -> Frames:
    if isinstance(item, np.ndarray):
        return _from_pixels(item, what)
    if isinstance(item, Image.Image):
        return _from_image(item, what)
    return _from_file(Path(item), what, limits)


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


def _from_file(path: Path, what: str, limits: Limits) -> Frames:
    name = f"{what}, {path}"
    with reading(name), Image.open(path) as image:
        limits.check(name, 1, image.height, image.width)
        return _from_image(ImageOps.exif_transpose(image), name)


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of an image of any mode; what is transparent lies before white, as in transformers 5."""
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turns what PIL raises into our own errors."""
    try:
        yield
    except VidlmError:  # a ValueError too, but ours already
        raise
    except FileNotFoundError as error:
        raise MediaNotFound(f"{name}: there is no such image file") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise MediaLimitError(f"{name}: {error}; scale the image down first") from error
    except UnidentifiedImageError as error:
        raise MediaError(f"{name}: not an image that PIL reads; give PNG, JPEG or WebP") from error
    except _PIL_ERRORS as error:
        raise MediaError(f"{name}: cannot be read ({error}); give an intact image") from error


def _rgb(array: Pixels) -> Frames:
    """Grey values in all three channels, where there are none."""
    if array.shape[-1] == 3 and array.ndim != 2:
        return array
    return np.repeat(array[..., None], 3, axis=-1)
