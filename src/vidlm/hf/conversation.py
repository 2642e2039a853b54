"""Chat messages with media in them -> messages that only name the media, and these, in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vidlm.errors import InvalidArgument
from vidlm.media import Video, load_image, load_video
from vidlm.types import FrameRef

SOURCES = ("path", "url", "video", "image")  # keys of a media part that may hold its source
PLACE = ("type", "text", *SOURCES)
VIDEO_OPTIONS = (
    *("num_frames", "fps", "min_frames", "max_frames", "start", "end"),
    *("sampling", "indices", "times"),
)
DEFAULT_FRAMES = 8
RATES = ("num_frames", "fps", "min_frames", "sampling", "indices", "times")


@dataclass(frozen=True)
class FrameOptions:
    """Which frames of a video to take; see `vidlm.media.load_video`."""

    num_frames: int | None = None
    fps: float | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    start: float | str | None = None
    end: float | str | None = None
    sampling: str | None = None
    indices: Sequence[int] | None = None
    times: Sequence[float | str] | None = None

    def given(self) -> dict[str, Any]:
        """What is not None, as keywords for load_video."""
        values = {name: getattr(self, name) for name in VIDEO_OPTIONS}
        return {name: value for name, value in values.items() if value is not None}

    def over(self, default: Mapping[str, Any]) -> dict[str, Any]:
        """Keywords for load_video; where nothing says how many frames, the family's `default`,
        whose rule also says what an fps alone means."""
        values = self.given()
        if any(name in values for name in ("num_frames", "indices", "times")):
            return values
        if "sampling" not in values:
            counted = "fps" not in values
            rule = {k: v for k, v in default.items() if counted or k != "num_frames"}
            return {**rule, **values}
        if "fps" not in values and values["sampling"] != "videollama3":
            values["num_frames"] = default.get("num_frames", DEFAULT_FRAMES)
        return values


@dataclass
class Conversation:
    """messages whose media parts hold nothing but their type; images and videos in the order of
    their parts (None where the part named no source: the caller passes it); which video frames
    were chosen; warnings of media."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)
    videos: list[Any] = field(default_factory=list)
    frames: list[FrameRef] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    media: int = 0


@dataclass(frozen=True)
class Reading:
    """How to read the videos of a conversation: the call's options over the family's default, and
    whether a video is its frames as images."""

    options: FrameOptions
    default: Mapping[str, Any]
    as_images: bool


def read_conversation(messages: Sequence[Mapping[str, Any]], how: Reading) -> Conversation:
    """Load the media of a conversation. Raises InvalidArgument on a part it does not know, and
    MediaError where a source cannot be read."""
    read = Conversation()
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
                parts += _read_part(part, read, how)
            content = parts
        read.messages.append({**message, "content": content})
    return read


def _read_part(part: Any, read: Conversation, how: Reading) -> list[dict[str, Any]]:
    if isinstance(part, str):
        return [{"type": "text", "text": part}]
    kind = part.get("type") if isinstance(part, Mapping) else None
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
    source = next((part[key] for key in SOURCES if part.get(key) is not None), None)
    if kind == "image":
        read.images.append(None if source is None else load_image(source))
        read.media += 1
        return [{"type": "image"}]
    if source is None and not how.as_images:
        read.videos.append(None)
        read.media += 1
        return [{"type": "video"}]
    if source is None:
        raise InvalidArgument("a video part names no video; give it a path, url or video key")
    return _read_video(source, part, read, how)


def _read_video(
    source: Any, part: Mapping[str, Any], read: Conversation, how: Reading
) -> list[dict[str, Any]]:
    options = how.options
    own = {name: part[name] for name in VIDEO_OPTIONS if name in part}
    if isinstance(source, Video):
        if own:
            raise InvalidArgument(
                f"{sorted(own)} for a video that is already loaded; leave them out"
            )
        video = source
    else:
        if any(name in own for name in RATES):  # the part's own rule replaces the call's
            options = FrameOptions(start=options.start, end=options.end)
        if "indices" in own or "times" in own:
            options = FrameOptions()
        keywords = FrameOptions(**{**options.given(), **own}).over(how.default)
        video = load_video(source, **keywords)
    refs = zip(video.indices.tolist(), video.pts.tolist(), strict=True)
    read.frames += [FrameRef(read.media, index, pts) for index, pts in refs]
    read.warnings += video.warnings
    read.media += 1
    if how.as_images:
        read.images += list(video.frames)
        return [{"type": "image"} for _ in video.frames]
    read.videos.append(video)
    return [{"type": "video"}]
