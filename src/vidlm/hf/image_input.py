"""Whatever a processor is given as `images` -> a list of what its core takes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vidlm.errors import InvalidArgument
from vidlm.media import MediaReader


def as_images(images: Any, reader: MediaReader) -> list[Any]:
    """Images of any nesting, in order; paths, URLs, bytes and open files are read. An array
    (H, W, 3) is one image, (F, H, W, 3) are F."""
    return list(_flat(images, reader))


def _flat(images: Any, reader: MediaReader) -> Iterator[Any]:
    if images is None:
        return
    if isinstance(images, np.ndarray | torch.Tensor):
        if images.ndim == 4:
            yield from images
        else:
            yield images
    elif isinstance(images, list | tuple):
        for image in images:
            if image is None:
                raise InvalidArgument("None among the images; leave it out")
            yield from _flat(image, reader)
    elif isinstance(images, Image.Image):
        yield images
    elif isinstance(images, str | Path | bytes) or hasattr(images, "read"):
        yield reader.image(images)
    else:
        raise InvalidArgument(
            f"a {type(images).__name__} is no image; give PIL images, arrays, tensors, paths, URLs "
            "or bytes"
        )
