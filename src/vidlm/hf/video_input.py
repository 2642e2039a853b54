"""Whatever a processor is given as `videos` -> a list of Video, frames chosen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from vidlm.errors import InvalidArgument
from vidlm.hf.conversation import FrameOptions
from vidlm.hf.video_processing import VideoMetadata, read_metadata
from vidlm.media import Video, load_video


@dataclass(frozen=True)
class Choice:
    """Which frames to take: what the call says over the family's default, for frames that are given
    as such only if told to sample; and what is told of those, see VideoMetadata."""

    options: FrameOptions
    default: Mapping[str, Any]
    sample: bool | None = None
    metadata: Any = None


def as_videos(videos: Any, choice: Choice) -> list[Video]:
    """One video or any nesting of videos, in order, frames chosen."""
    sources = list(_flat(videos))
    told = read_metadata(choice.metadata, len(sources))
    return [_load(*pair, choice) for pair in zip(sources, told, strict=True)]


def _load(source: Any, told: VideoMetadata | None, choice: Choice) -> Video:
    given = choice.options.given()
    frames_given = isinstance(source, list | np.ndarray)
    if told is not None and not frames_given:
        raise InvalidArgument(
            "video_metadata is for frames given as arrays or lists, and a file has its own; leave "
            "it out"
        )
    if choice.sample is False and given:
        raise InvalidArgument(f"{sorted(given)} with do_sample_frames=False; leave one out")
    if isinstance(source, Video):
        if given:
            raise InvalidArgument(f"{sorted(given)} for a video that is loaded; leave them out")
        return source
    wanted = bool(given) if frames_given else choice.sample is not False
    keywords = choice.options.over(choice.default) if wanted or choice.sample else {}
    if told is None:
        return load_video(source, **keywords)
    if keywords:
        raise InvalidArgument(
            f"{sorted(keywords)} with video_metadata; take the frames first, or give the whole "
            "video without it"
        )
    video = load_video(source)
    rows = told.frames_indices if told.frames_indices is not None else range(len(video))
    rate = told.fps or 1.0
    indices = np.asarray(rows, np.int64)
    return replace(
        video, indices=indices, pts=indices / rate, fps=rate, total_frames=told.total_num_frames
    )


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
