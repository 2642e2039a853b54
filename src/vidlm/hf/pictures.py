"""What a model sees of a video: the pixels that its processor makes, as pictures again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vidlm.hf.processor import ProcessorMixin
from vidlm.media import Video
from vidlm.models.base import Media


def shown(processor: ProcessorMixin, video: Video) -> Video:
    """The video with each frame cropped, resized and rounded as the model gets it."""
    as_images = processor.video_token is None
    media = processor.media(list(video.frames), []) if as_images else processor.media([], [video])
    core = processor.core
    words = core.image_pixels if as_images else core.video_pixels
    frames = [_picture(frame, words) for item in media for frame in _frames(item, words)]
    return replace(video, frames=np.stack(frames))


def _frames(item: Media, words: Any) -> Iterator[Tensor]:
    """Normalised pixels (3, H, W) of each frame, which patches are put together to."""
    pixels = item.pixels
    grid: tuple[int, int, int] | None = getattr(item, "grid", None)
    if grid is not None:
        (frames, height, width), merge, side = grid, words.merge_size, words.patch_size
        blocks = pixels.view(
            frames, height // merge, width // merge, merge, merge, 3, side, side
        )  # (F, H', W', m, m, 3, p, p)
        pixels = blocks.permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(
            frames, 3, height * side, width * side
        )
    yield from pixels if pixels.ndim == 4 else pixels[None]


def _channels(values: Sequence[float]) -> Tensor:
    """One number for each channel, over its pixels."""
    return torch.tensor(values, dtype=torch.float32)[:, None, None]


def _picture(pixels: Tensor, words: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """(3, H, W) normalised -> (H, W, 3) uint8: the opposite of `Preprocess`."""
    mean, std = (_channels(each) for each in (words.mean, words.std))
    values = (pixels * std + mean) / words.rescale
    picture: np.ndarray[Any, np.dtype[np.uint8]] = (
        values.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    )
    return picture
