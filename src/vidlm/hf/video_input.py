"""Whatever a processor is given as `videos` -> a list of Video, frames chosen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

from vidlm.errors import InvalidArgument
from vidlm.hf.conversation import FrameOptions
from vidlm.media import Video, load_video


def as_videos(videos: Any, options: FrameOptions, default: Mapping[str, Any]) -> list[Video]:
    """One video or any nesting of videos, in order.

    Frames that are given as such (arrays, lists of images) are all taken unless `options` say
    otherwise; of a file, the family's `default` chooses where they say nothing.
    """
    return [_load(source, options, default) for source in _flat(videos)]


def _load(source: Any, options: FrameOptions, default: Mapping[str, Any]) -> Video:
    if isinstance(source, Video):
        if options.given():
            raise InvalidArgument(
                f"{sorted(options.given())} for a video that is already loaded; leave them out"
            )
        return source
    frames_given = isinstance(source, list | np.ndarray)
    return load_video(source, **(options.given() if frames_given else options.over(default)))


def _flat(videos: Any) -> Iterator[Any]:
    if videos is None:
        return
    if isinstance(videos, torch.Tensor):
        videos = videos.cpu().numpy()
    if isinstance(videos, np.ndarray):
        if videos.ndim == 5:
            yield from map(_channels_last, videos)
        else:
            yield _channels_last(videos)
    elif isinstance(videos, list | tuple):
        if videos and all(map(_is_frame, videos)):
            yield [f if isinstance(f, Image.Image) else _channels_last(f) for f in videos]
        else:
            for video in videos:
                yield from _flat(video)
    else:
        yield videos


def _is_frame(item: Any) -> bool:
    arrays = isinstance(item, np.ndarray | torch.Tensor)
    return isinstance(item, Image.Image) or (arrays and item.ndim == 3)


def _channels_last(frames: Any) -> np.ndarray:
    """(..., 3, H, W) -> (..., H, W, 3); other arrays as they are."""
    array = frames.cpu().numpy() if isinstance(frames, torch.Tensor) else frames
    if array.ndim >= 3 and array.shape[-3] == 3 and array.shape[-1] != 3:
        return np.moveaxis(array, -3, -1)
    return array
