"""Images of any kind, as processors and image processors are given them -> RGB frames."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vidlm.errors import InvalidArgument
from vidlm.hf.words import FIRST, LAST, NONE, PixelProcessor
from vidlm.media import MediaReader, to_rgb
from vidlm.vision.preprocess import Frame, as_tensor, to_pixels

log = logging.getLogger(__name__)


def as_images(images: Any, reader: MediaReader) -> list[Any]:
    """Images of any nesting, in order; paths, URLs, bytes and open files are read. An array
    (H, W, 3) is one image, (F, H, W, 3) are F."""
    return list(_flat(images, reader))


def _flat(images: Any, reader: MediaReader) -> Iterator[Any]:
    if images is None:
        return
    if isinstance(images, np.ndarray | Tensor):
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


def flat_images(images: Any, grey: bool) -> Iterator[Any]:
    """Images of any nesting, in order; an array with one dimension more holds several."""
    if isinstance(images, list | tuple):
        for image in images:
            yield from flat_images(image, grey)
    elif isinstance(images, np.ndarray | Tensor) and images.ndim == (3 if grey else 4):
        yield from images
    elif isinstance(images, Image.Image | np.ndarray | Tensor | str | Path | bytes):
        yield images
    else:
        raise InvalidArgument(
            f"a {type(images).__name__} is no image; give PIL images, arrays, "
            "tensors, paths, URLs or bytes"
        )


def read_frame(image: Any, words: PixelProcessor) -> tuple[Frame, str]:
    """An image as it was given -> RGB, PIL's or (3, H, W), and where its channels were."""
    if isinstance(image, str | Path | bytes):
        image = words.reader.image(image)
    if isinstance(image, Image.Image):
        if not words.do_convert_rgb and image.mode != "RGB":
            raise InvalidArgument(
                f"an image of mode {image.mode!r} with do_convert_rgb=False; convert it to 'RGB' "
                "yourself, or leave do_convert_rgb on"
            )
        return to_rgb(image), LAST
    pixels, layout = channels_first(image, words.input_data_format)
    if words.do_convert_rgb:
        pixels = _rgb(pixels)
    if pixels.shape[0] != 3:
        raise InvalidArgument(
            f"an image of shape {tuple(image.shape)} has {pixels.shape[0]} channels; give 3, or "
            "with do_convert_rgb 1 (grey) or 4 (RGBA)"
        )
    return to_pixels(pixels), layout


def channels_first(image: Any, layout: str | None) -> tuple[Tensor, str]:
    """An array or tensor -> (C, H, W), and where its channels were, which `layout` may tell."""
    if not isinstance(image, np.ndarray | Tensor):
        raise InvalidArgument(f"a {type(image).__name__}; give an array or a tensor")
    pixels = image.detach().cpu() if isinstance(image, Tensor) else as_tensor(image)
    if 0 in pixels.shape or not (pixels.dtype == torch.uint8 or pixels.is_floating_point()):
        raise InvalidArgument(
            f"an image of shape {tuple(image.shape)} and dtype {image.dtype}; give at least one "
            "pixel, and uint8 (0 to 255) or floats"
        )
    if pixels.ndim == 2 and layout in (NONE, None):
        return pixels[None], NONE
    if pixels.ndim != 3 or layout == NONE:
        raise InvalidArgument(
            f"an image of shape {tuple(image.shape)} with input_data_format={layout!r}; allowed: "
            "(C, H, W), (H, W, C), and (H, W) of grey values"
        )
    if layout is None:
        # As the reference has it: where both ends may be channels, the first is.
        ends = {LAST: pixels.shape[2], FIRST: pixels.shape[0]}
        for name, channels in ends.items():
            layout = name if channels in (1, 3, 4) else layout
    if layout is None:
        raise InvalidArgument(
            f"an image of shape {tuple(image.shape)} has neither first nor last 1, 3 or 4 "
            "channels; give grey, RGB or RGBA"
        )
    return (pixels if layout == FIRST else pixels.permute(2, 0, 1)), layout


def warn_of_scaled(frame: Frame, words: PixelProcessor) -> None:
    """Log where floats that look like 0 to 1 are about to be divided by 255 once more."""
    if words.do_rescale and isinstance(frame, Tensor) and frame.is_floating_point():
        low, high = float(frame.min()), float(frame.max())
        if low >= 0 and 0 < high <= 1:
            log.warning("pixels from 0 to 1 are rescaled once more; pass do_rescale=False")


def _rgb(pixels: Tensor) -> Tensor:
    """Grey (1, H, W) three times; RGBA (4, H, W) before white, with torchvision's arithmetic."""
    if pixels.shape[0] == 1:
        return pixels.expand(3, -1, -1)
    if pixels.shape[0] != 4:
        return pixels
    whole = pixels.dtype == torch.uint8
    values = pixels.float().mul_(1 / 255) if whole else pixels
    if float(values.min()) < 0 or float(values.max()) > 1:
        raise InvalidArgument("RGBA pixels that are floats must be from 0 to 1; divide them by 255")
    colour, alpha = values[:3], values[3:]
    colour = colour * alpha + (1 - alpha)
    return colour.mul(255 + 1.0 - 1e-3).to(torch.uint8) if whole else colour
