"""One image from anywhere -> PIL RGB, upright; decoded by Pillow where it can, as references do."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from PIL import Image

from vidlm.media.clip import DEFAULT_LIMITS, Limits
from vidlm.media.fetch import DEFAULT_POLICY, FetchPolicy
from vidlm.media.pillow import reading, to_rgb
from vidlm.media.source import Source, opened
from vidlm.media.still import read_still

log = logging.getLogger(__name__)


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
    with opened(source, access) as (file, name), reading(name):
        image, notes = read_still(file, name, limits)
        for note in notes:
            log.warning("%s: %s", name, note)
        return to_rgb(image)


def _from_array(array: np.ndarray[Any, Any]) -> Image.Image:
    return Image.fromarray(array).convert("RGB")
