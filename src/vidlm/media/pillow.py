"""Still images through Pillow: which formats are opened, what is refused, RGB on white.

`Image.open` by itself tries every plugin: that of EPS starts Ghostscript on what a stranger sent,
and others belong to formats that nobody sends a model. A rule in tests/house.py has it name them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from vidlm.errors import MediaError, MediaLimitError, MediaNotFound, VidlmError
from vidlm.media.clip import Limits

# Pillow's names. JPEG stands for MPO too, a JPEG of some cameras with further pictures behind it.
_FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
FORMATS_IN_WORDS = "JPEG, PNG, WebP, AVIF, HEIC, GIF, BMP, TIFF or PPM"

# What Pillow's readers raise for files that are damaged in one way or another.
_ERRORS = (OSError, ValueError, SyntaxError, EOFError, OverflowError)


@cache
def formats() -> tuple[str, ...]:
    """The formats to open, of those that this Pillow has: AVIF came with 11.3."""
    has_avif = importlib.util.find_spec("PIL.AvifImagePlugin") is not None
    return _FORMATS if has_avif else tuple(name for name in _FORMATS if name != "AVIF")


@contextmanager
def open_image(source: BinaryIO | Path, name: str, limits: Limits) -> Iterator[Image.Image]:
    """An image whose pixels are not decoded yet. Raises MediaLimitError where it has too many."""
    with reading(name), Image.open(source, formats=formats()) as image:
        limits.check(name, 1, image.height, image.width)
        yield image


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of an image of any mode; what is transparent lies before white, as in transformers 5."""
    bands = image.getbands()
    if "a" in bands:  # colours times alpha
        image = image.convert("RGBA" if len(bands) == 4 else "LA")
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turns what Pillow raises into our own errors."""
    try:
        yield
    except VidlmError:  # a ValueError too, but ours already
        raise
    except FileNotFoundError as error:
        raise MediaNotFound(f"{name}: there is no such image file") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise MediaLimitError(f"{name}: {error}; scale the image down first") from error
    except UnidentifiedImageError as error:
        raise MediaError(
            f"{name}: not an image that vidlm reads, or a damaged one; give {FORMATS_IN_WORDS}"
        ) from error
    except _ERRORS as error:
        raise MediaError(f"{name}: cannot be read ({error}); give an intact image") from error
