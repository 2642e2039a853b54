"""One image from anywhere -> PIL RGB, upright; decoded by PIL, as the references do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image, ImageOps

from vidlm.media.clip import DEFAULT_LIMITS, Limits
from vidlm.media.fetch import DEFAULT_POLICY, FetchPolicy
from vidlm.media.source import Source, is_pattern, opened
from vidlm.media.stills import reading, to_rgb

# What a name must end with to be taken for a still image. GIF, PNG and WebP may be animated, but
# an animated PNG is rare: it is a video only where the caller says so.
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff")


def is_image(source: str | Path) -> bool:
    """Whether a path or URL names a still image, by its ending (or a data URL by its type). A
    folder, and a pattern such as "frames/*.png", name the frames of a video."""
    name = str(source)
    if name[:5].lower() == "data:":
        return name[5:11].lower() == "image/"
    if "://" in name:
        return urlsplit(name).path.lower().endswith(SUFFIXES)
    return name.lower().endswith(SUFFIXES) and not (os.path.isdir(name) or is_pattern(name))


def load_image(
    source: Source | Image.Image,
    *,
    limits: Limits = DEFAULT_LIMITS,
    access: FetchPolicy = DEFAULT_POLICY,
) -> Image.Image:
    """An RGB image from a path, URL, bytes, binary file, PIL image or uint8 array (H, W, 3).

    EXIF orientation is applied to files; what is transparent becomes white. Raises MediaNotFound,
    MediaFetchError, MediaError, or MediaLimitError before an image of too many pixels is decoded.
    """
    if isinstance(source, Image.Image):
        return to_rgb(source)
    if isinstance(source, np.ndarray):
        return _from_array(source)
    with opened(source, access) as (file, name), reading(name), Image.open(file) as image:
        limits.check(name, 1, image.height, image.width)
        return to_rgb(ImageOps.exif_transpose(image))


def _from_array(array: np.ndarray[Any, Any]) -> Image.Image:
    return Image.fromarray(array).convert("RGB")
