"""Chat messages with media in them -> messages that only name the media, and these, in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from vidlm.errors import InvalidArgument
from vidlm.hf.frame_options import VIDEO_OPTIONS
from vidlm.hf.video_input import Choice, as_video
from vidlm.hf.video_processing import VideoMetadata
from vidlm.types import FrameRef

SOURCES = ("path", "url", "video", "image")  # keys of a media part that may hold its source
PLACE = ("type", "text", *SOURCES)


@dataclass
class Conversation:
    """messages whose media parts hold nothing but their type; images and videos in the order of
    their parts (None where the part named no source: the caller passes it), with what is known of
    the videos; which video frames were chosen; warnings of media."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)
    videos: list[Any] = field(default_factory=list)
    metadata: list[VideoMetadata] = field(default_factory=list)
    frames: list[FrameRef] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    media: int = 0


@dataclass(frozen=True)
class Reading:
    """How to read a conversation.

    choice     which frames of its videos, and what reads them
    as_images  whether a video is its frames as images
    load       whether to read media that only their number counts of
    told       what is known of each video that is given as frames, where anything is
    """

    choice: Choice
    as_images: bool
    load: bool = True
    told: Sequence[VideoMetadata | None] = ()


def count_videos(messages: Sequence[Mapping[str, Any]]) -> int:
    """How many content parts are videos."""
    contents = [m.get("content") for m in messages if isinstance(m, Mapping)]
    lists = [c for c in contents if isinstance(c, Sequence) and not isinstance(c, str)]
    return sum(isinstance(p, Mapping) and p.get("type") == "video" for c in lists for p in c)


def read_conversation(messages: Sequence[Mapping[str, Any]], how: Reading) -> Conversation:
    """Load the media of a conversation. Raises InvalidArgument on a part it does not know, and
    MediaError where a source cannot be read."""
    read = Conversation()
    told = iter(how.told)
    for message in messages:
        if not isinstance(message, Mapping) or "role" not in message:
            raise InvalidArgument(
                f"a message is a dict with role and content, got {message!r}; for a batch pass a "
                "list of conversations"
            )
        content = message.get("content")
        if isinstance(content, Sequence) and not isinstance(content, str):
            parts: list[dict[str, Any]] = []
            for part in content:
                known = next(told, None) if _kind(part) == "video" else None
                parts += _read_part(part, read, how, known)
            content = parts
        read.messages.append({**message, "content": content})
    return read


def _kind(part: Any) -> Any:
    return part.get("type") if isinstance(part, Mapping) else None


def _read_part(
    part: Any, read: Conversation, how: Reading, told: VideoMetadata | None
) -> list[dict[str, Any]]:
    if isinstance(part, str):
        return [{"type": "text", "text": part}]
    kind = _kind(part)
    if kind == "text":
        return [dict(part)]
    if kind not in ("image", "video"):
        raise InvalidArgument(f"content part {part!r}; allowed types: text, image, video")
    unknown = set(part) - set(PLACE) - (set(VIDEO_OPTIONS) if kind == "video" else set())
    if unknown:
        raise InvalidArgument(
            f"a {kind} part has unknown keys {sorted(unknown)}; allowed: {', '.join(PLACE)}"
            + (f", {', '.join(VIDEO_OPTIONS)}" if kind == "video" else "")
        )
    named = [key for key in SOURCES if part.get(key) is not None]
    if len(named) > 1:
        raise InvalidArgument(f"a {kind} part with {' and '.join(named)}; give it one source")
    source = part[named[0]] if named else None
    if kind == "video":
        return _read_video(source, part, read, how, told)
    read.images.append(_image(source, how) if how.load and source is not None else None)
    read.media += 1
    return [{"type": "image"}]


def _image(source: Any, how: Reading) -> Any:
    """A source read; arrays that PIL does not take, and tensors, are the processor's business."""
    if isinstance(source, torch.Tensor):
        return source
    if isinstance(source, np.ndarray):
        plain = source.dtype == np.uint8 and (source.ndim == 2 or source.shape[-1] in (3, 4))
        if not plain or source.ndim not in (2, 3):
            return source
    return how.choice.reader.image(source)


def _read_video(
    source: Any,
    part: Mapping[str, Any],
    read: Conversation,
    how: Reading,
    told: VideoMetadata | None,
) -> list[dict[str, Any]]:
    if not how.as_images and (source is None or not how.load):
        read.videos.append(None)
        read.media += 1
        return [{"type": "video"}]
    if source is None:
        raise InvalidArgument("a video part names no video; give it a path, url or video key")
    own = {name: part[name] for name in VIDEO_OPTIONS if name in part}
    choice = replace(how.choice, options=how.choice.options.replaced(own))
    clip = as_video(source, told, choice)
    video = clip.video
    refs = zip(video.indices.tolist(), video.pts.tolist(), strict=True)
    read.frames += [FrameRef(read.media, index, pts) for index, pts in refs]
    read.warnings += video.warnings
    read.metadata.append(clip.metadata)
    read.media += 1
    if how.as_images:
        read.images += list(video.frames)
        return [{"type": "image"} for _ in video.frames]
    read.videos.append(video)
    return [{"type": "video"}]
