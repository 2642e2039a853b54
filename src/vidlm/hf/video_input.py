"""Whatever a processor is given as `videos` -> a list of Video, frames chosen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vidlm.errors import InvalidArgument
from vidlm.hf.frame_options import FrameOptions
from vidlm.hf.video_processing import VideoMetadata, names_frame, read_metadata
from vidlm.hf.words import FIRST, LAST
from vidlm.media import MediaReader, Video


@dataclass(frozen=True)
class Choice:
    """Which frames to take, and how to read them.

    options  what the call says, over the family's `default`
    sample   whether to choose at all; None: of files, and of frames given as such only where
             `options` says something
    reader   what reads paths and URLs
    layout   where the channels of arrays are; None: where there are 3
    """

    options: FrameOptions
    default: Mapping[str, Any]
    sample: bool | None = None
    reader: MediaReader = field(default_factory=MediaReader)
    layout: str | None = None


@dataclass(frozen=True)
class Clip:
    """A video with its frames chosen, and what is known of where they come from."""

    video: Video
    metadata: VideoMetadata


def as_videos(videos: Any, choice: Choice, metadata: Any = None) -> list[Clip]:
    """One video or any nesting of videos, in order, frames chosen; `metadata` is what is told of
    each, see VideoMetadata."""
    sources = list(_flat(videos, choice.layout))
    told = read_metadata(metadata, len(sources))
    return [_load(*pair, choice) for pair in zip(sources, told, strict=True)]


def as_video(source: Any, told: VideoMetadata | None, choice: Choice) -> Clip:
    """The video of one content part; a list holds its frames."""
    if isinstance(source, list | tuple):
        (source,) = (_frames(source, choice.layout),)
    else:
        sources = list(_flat(source, choice.layout))
        if len(sources) != 1:
            raise InvalidArgument(
                f"a video part with {len(sources)} videos; give each a part of its own"
            )
        (source,) = sources
    return _load(source, told, choice)


def _load(source: Any, told: VideoMetadata | None, choice: Choice) -> Clip:
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
            raise InvalidArgument(
                f"{sorted(given)} for a video that is already loaded; leave them out"
            )
        return Clip(source, _metadata(source))
    if told is not None:
        return _told(source, told, choice, given)
    if frames_given and "fps" in given:
        raise InvalidArgument(
            f"fps={given['fps']} for frames whose own rate is not known; give num_frames instead, "
            "or a file"
        )
    wanted = bool(given) if frames_given else choice.sample is not False
    keywords = choice.options.over(choice.default) if wanted or choice.sample else {}
    video = choice.reader.video(source, **keywords)
    metadata = _metadata(video)
    if frames_given:
        metadata = replace(metadata, fps=None, duration=None)
    return Clip(video, metadata)


def _told(source: Any, told: VideoMetadata, choice: Choice, given: Mapping[str, Any]) -> Clip:
    """Frames of which the caller knows the numbers and the rate."""
    if given or choice.sample:
        raise InvalidArgument(
            f"{sorted(given) or 'do_sample_frames'} with video_metadata; take the frames first, or "
            "give the whole video without it"
        )
    video = choice.reader.video(source)
    rows = told.frames_indices if told.frames_indices is not None else range(len(video))
    rate = told.fps or 1.0
    indices = np.asarray(rows, np.int64)
    if len(indices) != len(video):
        raise InvalidArgument(
            f"video_metadata with {len(indices)} frames_indices for a video of {len(video)} frames"
        )
    numbered = replace(
        video, indices=indices, pts=indices / rate, fps=rate, total_frames=told.total_num_frames
    )
    return Clip(numbered, replace(told, frames_indices=indices.tolist()))


def _metadata(video: Video) -> VideoMetadata:
    return VideoMetadata(video.total_frames, video.fps, video.duration, video.indices.tolist())


def _flat(videos: Any, layout: str | None) -> Iterator[Any]:
    if videos is None:
        return
    if isinstance(videos, torch.Tensor):
        videos = videos.detach().cpu().numpy()
    if isinstance(videos, np.ndarray):
        if videos.ndim == 5:
            yield from (_channels_last(video, layout) for video in videos)
            return
        video = _channels_last(videos, layout)
        one_frame = video.ndim == 3 and video.shape[-1] == 3
        yield video[None] if one_frame else video
    elif isinstance(videos, Image.Image):
        yield [videos]
    elif isinstance(videos, list | tuple):
        if videos and all(map(_is_frame, videos)):
            yield _frames(videos, layout)
        else:
            for video in videos:
                if video is None:
                    raise InvalidArgument("None is no video; leave it out")
                yield from _flat(video, layout)
    else:
        yield videos


def _frames(items: Any, layout: str | None) -> list[Any]:
    arrays = (np.ndarray, torch.Tensor)
    return [_channels_last(f, layout) if isinstance(f, arrays) else f for f in items]


def _is_frame(item: Any) -> bool:
    if isinstance(item, str | Path):
        return names_frame(item)
    arrays = isinstance(item, np.ndarray | torch.Tensor)
    return isinstance(item, Image.Image) or (arrays and item.ndim == 3)


def _channels_last(frames: Any, layout: str | None) -> np.ndarray:
    """(..., 3, H, W) -> (..., H, W, 3); other arrays as they are."""
    array = frames.detach().cpu().numpy() if isinstance(frames, torch.Tensor) else frames
    if array.ndim < 3 or layout == LAST:
        return array
    if layout == FIRST or (layout is None and array.shape[-3] == 3 and array.shape[-1] != 3):
        return np.moveaxis(array, -3, -1)
    return array
