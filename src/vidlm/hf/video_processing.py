"""Video processors under transformers' names: videos of any kind -> normalised pixels.

As hf/image_processing.py, whose words and cores these share, with a choice of frames before it.
Parity: tests/parity/test_video_processing.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vidlm.errors import InvalidArgument
from vidlm.hf.features import BatchFeature
from vidlm.hf.image_input import read_frame, warn_of_scaled
from vidlm.hf.image_processing import CLIP_WORDS, PATCH_WORDS, PatchProcessor, joined, laid_out
from vidlm.hf.words import IGNORED, NONE, PixelProcessor, as_one
from vidlm.media import Video, is_image
from vidlm.media.sample import clamped, uniform_arange
from vidlm.vision.preprocess import Frame, Preprocess

CHOICE: Mapping[str, Any] = {
    "do_sample_frames": False,
    "num_frames": None,
    "fps": None,
    "video_metadata": None,
    "return_metadata": False,
}


@dataclass(frozen=True)
class VideoMetadata:
    """Where the frames of a video come from: their numbers among all those of the clip, and its
    average rate, None where it is not known."""

    total_num_frames: int
    fps: float | None = None
    duration: float | None = None
    frames_indices: Sequence[int] | None = None

    @property
    def timestamps(self) -> list[float]:
        """Seconds of each frame."""
        if self.fps is None or self.frames_indices is None:
            raise InvalidArgument("timestamps need fps and frames_indices; say both as metadata")
        return [index / self.fps for index in self.frames_indices]


@dataclass(frozen=True)
class Clip:
    """The frames taken of one video, RGB, and where their channels were."""

    frames: list[Frame]
    layout: str
    metadata: VideoMetadata


class VideoProcessor(PixelProcessor):
    """Videos of any kind -> pixels, as `core` makes them."""

    files = ("video_preprocessor_config.json", "preprocessor_config.json")  # one may be for both
    fleeting = (*PixelProcessor.fleeting, "video_metadata")

    do_sample_frames: bool
    num_frames: int | None
    fps: float | None
    video_metadata: Any
    return_metadata: bool

    @property
    def core(self) -> Any:
        """What the words say of a frame, as the family's own processor has it."""
        raise NotImplementedError

    def preprocess(self, videos: Any, **overrides: Any) -> BatchFeature:
        """Videos -> a BatchFeature with the entries of `model_input_names`.

        videos  one or any nesting: arrays or tensors (T, H, W, 3), (T, 3, H, W), or with one
            dimension more a batch; lists of frames, each what an image processor takes; paths and
            URLs; Videos of `load_video`
        overrides  any word of the class, for this call, as with images. num_frames or fps choose
            frames unless do_sample_frames=False is given too; without them all are taken.
        video_metadata  for each video given as frames: a mapping or object with total_num_frames,
            fps, frames_indices. Choosing by fps needs its fps.
        return_metadata  adds "video_metadata", a list of VideoMetadata

        Of frames that are given, transformers' rule takes as many as num_frames or fps make, evenly
        spread; of a file fps takes those that are on screen every 1/fps seconds.
        """
        made = self.changed(overrides)
        sources = list(flat_videos(videos, grey=made.input_data_format == NONE))
        if not sources:
            raise InvalidArgument("no videos were given; pass at least one")
        told = read_metadata(made.video_metadata, len(sources))
        explicit = any(overrides.get(name) for name in ("do_sample_frames", "num_frames", "fps"))
        clips = [made.clip(*pair, explicit) for pair in zip(sources, told, strict=True)]
        warn_of_scaled(clips[0].frames[0], made)
        features = made.output(**made.pixels(clips))
        if made.return_metadata:
            features["video_metadata"] = [clip.metadata for clip in clips]
        return features

    def __call__(self, videos: Any, **overrides: Any) -> BatchFeature:
        return self.preprocess(videos, **overrides)

    def pixels(self, clips: Sequence[Clip]) -> dict[str, Tensor | list[Tensor]]:
        """What `output` takes."""
        raise NotImplementedError

    def changed(self, overrides: Mapping[str, Any]) -> Self:
        rates = [name for name in ("num_frames", "fps") if overrides.get(name) is not None]
        made = super().changed(overrides)
        if len(rates) == 1:  # which replaces the other one of the file
            setattr(made, "fps" if rates == ["num_frames"] else "num_frames", None)
        if rates and overrides.get("do_sample_frames") is None:
            made.do_sample_frames = True
        return made

    def clip(self, source: Any, told: VideoMetadata | None, explicit: bool) -> Clip:
        """The frames of one video that are wanted."""
        if isinstance(source, list | np.ndarray | Tensor):
            if not len(source):
                raise InvalidArgument("a video without frames; give at least one frame")
            metadata = told or VideoMetadata(len(source), None, None, [*range(len(source))])
            frames = source
            if self.do_sample_frames:
                self._check_rates()
                rows = self.rows(metadata.total_num_frames, metadata.fps)
                if max(rows) >= len(source):
                    raise InvalidArgument(
                        f"video_metadata with total_num_frames={metadata.total_num_frames} for a "
                        f"video of {len(source)} frames; give all of them, or do not sample again"
                    )
                metadata = replace(metadata, frames_indices=rows)
                frames = [source[row] for row in rows]
        else:
            video = self._video(source, told, explicit)
            frames, rows = video.frames, video.indices.tolist()
            metadata = VideoMetadata(video.total_frames, video.fps, video.duration, rows)
        read = [read_frame(frame, self) for frame in frames]
        return Clip([frame for frame, _ in read], read[0][1], metadata)

    def _video(self, source: Any, told: VideoMetadata | None, explicit: bool) -> Video:
        """A source of load_video, read with the frames that are wanted; a Video as it is."""
        if told is not None:
            raise InvalidArgument(
                "video_metadata is for frames given as arrays or lists, and a file has its own; "
                "leave it out"
            )
        if not isinstance(source, Video):
            return self.reader.video(source, **(self.rule() if self.do_sample_frames else {}))
        if explicit and self.do_sample_frames:
            raise InvalidArgument(
                "num_frames, fps or do_sample_frames for a video that is loaded already; give them "
                "to load_video, or pass its path here"
            )
        return source

    def rule(self) -> dict[str, Any]:
        """The choice of frames of a file, in the words of load_video."""
        return {"num_frames": self.num_frames, "fps": self.fps}

    def rows(self, total: int, rate: float | None) -> Sequence[int]:
        """The frames to take of `total`, `rate` a second, that are given."""
        if self.fps is not None:
            count = max(1, int(total / _known(rate) * self.fps))
        elif self.num_frames is not None:
            count = self.num_frames
        else:
            return [*range(total)]
        return uniform_arange(_enough(total, count), count).tolist()

    def _check_rates(self) -> None:
        if self.num_frames is not None and self.fps is not None:
            raise InvalidArgument(
                f"num_frames={self.num_frames} and fps={self.fps} exclude each other; give one"
            )


class FrameProcessor(VideoProcessor):
    """Each frame as an image, shortest edge and centre crop, -> (B, T, 3, H, W)."""

    defaults: ClassVar[Mapping[str, Any]] = {**CLIP_WORDS, **CHOICE}
    model_input_names = ("pixel_values_videos",)

    @property
    def core(self) -> Preprocess:
        return Preprocess.from_dict(self.words)

    def pixels(self, clips: Sequence[Clip]) -> dict[str, Tensor | list[Tensor]]:
        core, name = self.core, "pixel_values_videos"
        made = (as_one(name, [core.one(frame) for frame in clip.frames]) for clip in clips)
        return {name: laid_out(made, [clip.layout for clip in clips], self)}


class VideoLlavaVideoProcessor(FrameProcessor):
    """Videos for Video-LLaVA -> pixel_values_videos (B, T, 3, H, W)."""

    kind = ("video_processor_type", "VideoLlavaVideoProcessor")


class LlavaNextVideoVideoProcessor(FrameProcessor):
    """Videos for LLaVA-NeXT-Video -> pixel_values_videos (B, T, 3, S, S), without tiles."""

    ignored = (*IGNORED, "image_grid_pinpoints")  # in the one file that its images have too
    kind = ("video_processor_type", "LlavaNextVideoVideoProcessor")


class VideoLlama3VideoProcessor(PatchProcessor, VideoProcessor):
    """Videos for VideoLLaMA3: rows of patches -> pixel_values_videos (sum of rows, 588),
    video_grid_thw (n, 3), each video's patches in time, down and across, video_merge_sizes (n,),
    and video_compression_mask (tokens of all,), True for those that are kept.

    Without words `size` is transformers' own default, which is small: of 64 frames of 1280 x 720
    it leaves 8 tokens each, where the published files, and `from_pretrained` without one, mean 252.
    """

    defaults: ClassVar[Mapping[str, Any]] = {
        **PATCH_WORDS,
        **CHOICE,
        "size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768},
        "merge_size": 2,
        "min_frames": 4,
        "max_frames": 180,
        "use_token_compression": True,
        "return_metadata": True,
    }
    kind = ("video_processor_type", "VideoLlama3VideoProcessor")
    model_input_names = (
        *("pixel_values_videos", "video_grid_thw", "video_merge_sizes", "video_compression_mask"),
    )
    for_videos = True
    min_frames: int
    max_frames: int

    def rule(self) -> dict[str, Any]:
        if self.num_frames is not None:
            return super().rule()
        least, most = self.min_frames, self.max_frames
        rule = {"sampling": "videollama3", "min_frames": least, "max_frames": most}
        return {**rule, "fps": self.fps}

    def rows(self, total: int, rate: float | None) -> Sequence[int]:
        """fps (1) give at least min_frames and at most max_frames, as far as there are so many."""
        least, most, fps = self.min_frames, self.max_frames, self.fps or 1.0
        if self.num_frames is not None:
            least = most = self.num_frames
            rate = fps = float(_enough(total, most))
        return clamped(total, rate=_known(rate), fps=fps, least=least, most=most).tolist()

    def pixels(self, clips: Sequence[Clip]) -> dict[str, Tensor | list[Tensor]]:
        core = self.core
        made = [core(clip.frames) for clip in clips]
        kept = [core.kept(rows, grid) for rows, grid in made]
        return {
            "pixel_values_videos": joined([rows for rows, _ in made]),
            "video_grid_thw": torch.tensor(
                [grid for _, grid in made], dtype=torch.int64, device="cpu"
            ),
            "video_merge_sizes": torch.full(
                (len(made),), core.merge_size, dtype=torch.int64, device="cpu"
            ),
            "video_compression_mask": torch.cat(kept),
        }


# ---- videos of any kind ------------------------------------------------------------------------


def flat_videos(videos: Any, grey: bool) -> Iterator[Any]:
    """Videos of any nesting, in order: arrays (T, ...), lists of frames, sources, Videos."""
    if isinstance(videos, np.ndarray | Tensor):
        frame = 2 if grey else 3
        if videos.ndim == frame + 2:
            yield from videos
        elif videos.ndim in (frame, frame + 1):  # one frame is a video too
            yield videos[None] if videos.ndim == frame else videos
        else:
            raise InvalidArgument(
                f"a video of shape {tuple(videos.shape)}; allowed: (T, H, W, 3), (T, 3, H, W), a "
                "batch of these, and with input_data_format='none' (T, H, W)"
            )
    elif isinstance(videos, Image.Image):
        yield [videos]
    elif not isinstance(videos, list | tuple):
        yield videos
    elif videos and all(_is_frame(item, grey) for item in videos):
        yield list(videos)
    else:
        for video in videos:
            yield from flat_videos(video, grey)


def _is_frame(item: Any, grey: bool) -> bool:
    if isinstance(item, np.ndarray | Tensor):
        return item.ndim == 2 or (item.ndim == 3 and not grey)
    if isinstance(item, str | Path):
        return names_frame(item)
    return isinstance(item, Image.Image)


def names_frame(source: str | Path) -> bool:
    """Whether a name among others is that of a frame, not of a video or a pattern of frames."""
    return is_image(source) and "*" not in str(source)


def read_metadata(metadata: Any, count: int) -> list[VideoMetadata | None]:
    """What is said about each of so many videos."""
    if metadata is None:
        return [None] * count
    told: list[VideoMetadata | None] = [*_flat_metadata(metadata)]
    if len(told) != count:
        raise InvalidArgument(f"video_metadata of {len(told)} videos, {count} were given")
    return told


def _flat_metadata(metadata: Any) -> Iterator[VideoMetadata]:
    if isinstance(metadata, list | tuple):
        for each in metadata:
            yield from _flat_metadata(each)
        return
    read = metadata.get if isinstance(metadata, Mapping) else partial(getattr, metadata)
    values: dict[str, Any] = {f.name: read(f.name, None) for f in fields(VideoMetadata)}
    if values["total_num_frames"] is None:
        raise InvalidArgument(
            f"video_metadata={metadata!r}; give a mapping or object with total_num_frames, and "
            "with fps and frames_indices if they are known"
        )
    yield VideoMetadata(**values)


def _known(rate: float | None) -> float:
    if not rate:
        raise InvalidArgument(
            "choosing frames by fps needs the video's own rate; pass video_metadata with fps and "
            "total_num_frames, or num_frames instead of fps"
        )
    return rate


def _enough(total: int, count: int) -> int:
    """`total`, where it is as many as are wanted."""
    if count > total:
        raise InvalidArgument(
            f"{count} frames of a video that has {total}; lower num_frames or fps"
        )
    return total
