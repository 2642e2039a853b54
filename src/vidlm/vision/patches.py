"""Frames to rows of patches, in any size: the pixels of VideoLLaMA3.

A frame is resized to whole blocks of merge² patches, its shape nearly kept, and cut into patches of
588 numbers (3 · 14 · 14); patches of one block lie behind each other. How large it becomes is a
matter of two rules:

hf      transformers, models/video_llama_3, whose pixels are met bit for bit, or to the last bit
        where they are not normalised (tests/parity/test_patches.py). An image has its own budget of
        pixels; the frames of a video share one (max_pixels // frames), while min_pixels holds for
        each frame.
native  the processor that comes with DAMO-NLP-SG's checkpoints. All images and frames of a call
        share one budget; min_pixels is applied after the maximum and so can exceed it; and a call
        of images and videos together has no minimum but one scale for all. It takes the width of a
        PIL image for its height and squeezes it into the transposed size, which is so here too;
        arrays, and so its decoded videos, are as they should be. It resizes with PIL, whose grey
        levels are near to these and no more (preprocess.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from vidlm.errors import InvalidArgument, UnsupportedModel
from vidlm.vision.preprocess import (
    CLIP_MEAN,
    CLIP_STD,
    MODES,
    Frame,
    _channels,
    per_channel,
    resize,
    to_pixels,
)

Grid = tuple[int, int, int]  # frames, and patches of a frame downwards and across
Size = tuple[int, int]  # height and width
Rule = Literal["hf", "native"]

HALF = (0.5, 0.5, 0.5)
IMAGE_BUDGET = (3136, 3211264)  # 16 and 16384 tokens of 14 x 14 pixels, as in the published files
VIDEO_BUDGET = (12544, 12845056)  # the same of 28 x 28
MAX_ASPECT = 200  # a limit of the hf rule


@dataclass(frozen=True)
class Patchify:
    """What preprocessor_config.json or video_preprocessor_config.json says to do.

    min_pixels, max_pixels  of a resized frame, see `rule` above
    merge_size              side of a block of patches that becomes one token
    share                   a video: its frames share max_pixels
    compress                a video leaves out tokens whose pixels repeat the frame before
    resize                  if not, frames must already be whole blocks
    mean, std, rescale      (x · rescale - mean) / std
    """

    min_pixels: int
    max_pixels: int
    merge_size: int
    share: bool
    compress: bool
    patch_size: int = 14
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF
    mode: str = "bicubic"
    rescale: float = 1 / 255
    resize: bool = True
    rule: Rule = "hf"

    @classmethod
    def from_dict(cls, words: Mapping[str, Any], video: bool) -> Patchify:
        """Read either file, or the native one, which is known by its type and its budget in tokens.

        An absent budget is the published one (VIDEO_BUDGET, IMAGE_BUDGET), not the default of
        transformers' classes, which leaves a video of 64 frames 8 tokens each instead of 252. The
        native file has no merge_size: pass image_merge_size and video_merge_size of
        processor_config.json with it, or have 1 and 2, as published.
        """
        words = {key: value for key, value in words.items() if value is not None or _is_off(key)}
        rule: Rule = "native" if _is_native(words) else "hf"
        if words.get("temporal_patch_size", 1) != 1:
            raise UnsupportedModel(
                f"temporal_patch_size={words['temporal_patch_size']}; only 1 is supported"
            )
        resample = words.get("resample", 3)
        if resample not in MODES:
            raise UnsupportedModel(f"resample={resample}; supported: {MODES}")
        patch = words.get("patch_size", 14)
        merge = words.get("merge_size", words.get(_merge_key(video), 2 if video else 1))
        budget = _budget(words, video) if rule == "hf" else _in_pixels(words, patch * merge)
        normalise = words.get("do_normalize", True)
        mean, std = (CLIP_MEAN, CLIP_STD) if rule == "native" else (HALF, HALF)
        return cls(
            min_pixels=budget[0],
            max_pixels=budget[1],
            merge_size=merge,
            share=video,
            compress=video and bool(words.get("use_token_compression", True)),
            patch_size=patch,
            mean=_channels("image_mean", words.get("image_mean", mean) if normalise else 0.0),
            std=_channels("image_std", words.get("image_std", std) if normalise else 1.0),
            mode=MODES[resample],
            rescale=words.get("rescale_factor", 1 / 255) if words.get("do_rescale", True) else 1.0,
            resize=bool(words.get("do_resize", True)),
            rule=rule,
        )

    def to_dict(self) -> dict[str, Any]:
        """The file it can be read from again: by transformers too under its rule."""
        shared: dict[str, Any] = {
            "do_convert_rgb": True,
            "do_resize": self.resize,
            "resample": next(number for number, mode in MODES.items() if mode == self.mode),
            "do_rescale": True,
            "rescale_factor": self.rescale,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "patch_size": self.patch_size,
        }
        if self.share:
            shared["use_token_compression"] = self.compress
        if self.rule == "native":
            return {
                "image_processor_type": "Videollama3ImageProcessor",
                "min_tokens": self.min_pixels // self.factor**2,
                "max_tokens": self.max_pixels // self.factor**2,
                _merge_key(self.share): self.merge_size,
                **shared,
            }
        kind = "video" if self.share else "image"
        return {
            f"{kind}_processor_type": f"VideoLlama3{kind.title()}Processor",
            "size": {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels},
            "temporal_patch_size": 1,
            "merge_size": self.merge_size,
            **shared,
        }

    def sides(self, frames: Sequence[Frame]) -> Size:
        """Height and width of the frames as the rule reads them: a PIL image's exchanged if native.

        Raises InvalidArgument where there is no frame.
        """
        height, width = _shape(frames)
        turned = self.rule == "native" and self.resize and isinstance(frames[0], Image.Image)
        return (width, height) if turned else (height, width)

    @property
    def factor(self) -> int:
        """Side of a block in pixels."""
        return self.patch_size * self.merge_size

    def size(self, frames: int, height: int, width: int) -> Size:
        """What each frame is resized to, where this image or video is the only one of its call."""
        if not self.resize:
            return height, width
        if self.rule == "native":
            budget = _shared(self.max_pixels, frames)
            return native_size(height, width, self.factor, self.min_pixels, budget)
        budget = _shared(self.max_pixels, frames) if self.share else self.max_pixels
        return smart_size(height, width, self.factor, self.min_pixels, budget)

    def grid(self, frames: int, size: Size) -> Grid:
        """Patches of frames that have been resized."""
        if any(side < 1 or side % self.factor for side in size):
            raise InvalidArgument(
                f"frames of {size[1]} x {size[0]} pixels (width x height); each side must be a "
                f"multiple of {self.factor} and not 0: give others, or have them resized "
                "(do_resize)"
            )
        return frames, size[0] // self.patch_size, size[1] // self.patch_size

    def tokens(self, frames: int, height: int, width: int) -> int:
        """Of an image or video with frames of this size, none left out and alone in its call."""
        t, h, w = self.grid(frames, self.size(frames, height, width))
        return t * h * w // self.merge_size**2

    def __call__(self, frames: Sequence[Frame], size: Size | None = None) -> tuple[Tensor, Grid]:
        """The frames of one video, or one image -> (t · h · w, 3 · patch²) float32, and (t, h, w).

        `size`, if given, is what to resize to: `sizes_of_call` knows it where a call has more.
        """
        shape = _shape(frames)
        size = size or self.size(len(frames), *self.sides(frames))
        t, h, w = grid = self.grid(len(frames), size)
        rows = torch.empty(t, h * w, 3 * self.patch_size**2, dtype=torch.float32, device="cpu")
        for row, frame in zip(rows, frames, strict=True):
            pixels = to_pixels(frame)
            if tuple(pixels.shape[1:]) != shape:
                raise InvalidArgument(
                    f"frames of {shape} and {tuple(pixels.shape[1:])} pixels (height, width) in "
                    "one video; they must have one size: resize them, or pass them as images"
                )
            self._cut(resize(pixels, size, self.mode), row)
        return rows.flatten(0, 1), grid

    def kept(self, rows: Tensor, grid: Grid) -> Tensor:
        """Which tokens are not left out: (t · h · w / merge²) bool."""
        if self.compress:
            return kept_tokens(rows, grid, self.merge_size)
        return torch.ones(len(rows) // self.merge_size**2, dtype=torch.bool, device=rows.device)

    def _cut(self, pixels: Tensor, out: Tensor) -> None:
        """(3, H, W) -> (P, 3 · patch²) float32, written into `out`."""
        m, p = self.merge_size, self.patch_size
        # One fused step, as the reference: (x - 255 mean) / (255 std) in float32.
        mean = per_channel(self.mean) * (1.0 / self.rescale)
        std = per_channel(self.std) * (1.0 / self.rescale)
        x = (pixels.float() - mean) / std
        blocks = x.unflatten(2, (-1, m, p)).unflatten(1, (-1, m, p))  # (3, H', m, p, W', m, p)
        blocks = blocks.permute(1, 4, 2, 5, 0, 3, 6)  # (H', W', m, m, 3, p, p)
        out.view(blocks.shape).copy_(blocks)


def smart_size(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> Size:
    """Height and width of the hf rule: multiples of `factor`, within the budget where they can be.

    Halves round to even. Raises InvalidArgument where one side is more than 200 times the other.
    """
    if min(height, width) < 1 or max(height, width) / min(height, width) > MAX_ASPECT:
        raise InvalidArgument(
            f"a frame of {width} x {height} pixels (width x height); one side may be at most "
            f"{MAX_ASPECT} times the other: crop it first"
        )
    h, w = _rounded(height, width, factor)
    if h * w > max_pixels:
        h, w = _shrunk(height, width, factor, math.sqrt(height * width / max_pixels))
        return max(factor, h), max(factor, w)
    if h * w < min_pixels:
        return _grown(height, width, factor, min_pixels)
    return h, w


def native_size(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> Size:
    """Height and width of the native rule for calls of images alone or of videos alone."""
    h, w = _rounded(height, width, factor)
    if h * w > max_pixels:
        h, w = _shrunk(height, width, factor, math.sqrt(height * width / max_pixels))
    if h * w < min_pixels:
        h, w = _grown(height, width, factor, min_pixels)
    return h, w


def sizes_of_call(call: Sequence[tuple[Patchify, Sequence[Frame]]]) -> list[Size]:
    """What the frames of each image and video of one call are resized to, by the rule they have."""
    media = [(patchify, len(frames), *patchify.sides(frames)) for patchify, frames in call]
    if all(patchify.rule == "native" and patchify.resize for patchify, _ in call):
        return _native_sizes(media)
    return [patchify.size(*shape) for patchify, *shape in media]


def kept_tokens(
    rows: Tensor, grid: Grid, merge: int, threshold: float = 0.1, least: int = 1
) -> Tensor:
    """Which tokens of a video differ from the frame before: (t · h · w / merge²) bool.

    rows (t · h · w, 3 · patch²), normalised, in merge-block order. A token is kept where the values
    of its block changed by more than threshold / 255 on average; as they go from -1 to 1 that is a
    twentieth of a grey level, or "not the same". The first frame is kept whole, and the first
    `least` tokens of a frame that has fewer left.
    """
    t, h, w = grid
    blocks = rows.view(t, h * w // merge**2, -1)
    kept = torch.ones(blocks.shape[:2], dtype=torch.bool, device=rows.device)
    for frame in range(1, t):  # one after the other: all differences at once double the memory
        change = (blocks[frame] - blocks[frame - 1]).abs().mean(dim=-1) * 255
        kept[frame] = change > threshold
        if int(kept[frame].sum()) < least:
            kept[frame, :least] = True
    return kept.flatten()


# ---- the words of the files --------------------------------------------------------------------


def _is_native(words: Mapping[str, Any]) -> bool:
    in_tokens = "min_tokens" in words or "max_tokens" in words
    in_pixels = any(key in words for key in ("size", "min_pixels", "max_pixels"))
    named = words.get("image_processor_type") == "Videollama3ImageProcessor"
    return in_tokens or (named and not in_pixels)


def _is_off(key: str) -> bool:
    """Whether null is no, as transformers has it, and not the same as absent."""
    return key.startswith("do_") or key == "use_token_compression"


def _merge_key(video: bool) -> str:
    return "video_merge_size" if video else "image_merge_size"


def _budget(words: Mapping[str, Any], video: bool) -> tuple[int, int]:
    """min_pixels and max_pixels: transformers has them outrank `size`."""
    low, high = VIDEO_BUDGET if video else IMAGE_BUDGET
    size = words.get("size", {"shortest_edge": low, "longest_edge": high})
    size = size if isinstance(size, Mapping) else {}
    low = words.get("min_pixels", size.get("shortest_edge"))
    high = words.get("max_pixels", size.get("longest_edge"))
    if not low or not high:
        raise UnsupportedModel(
            f"size {words.get('size')}; supported: shortest_edge and longest_edge, the least and "
            "most pixels of a frame"
        )
    return low, high


def _in_pixels(words: Mapping[str, Any], factor: int) -> tuple[int, int]:
    """The same of the native file, which gives tokens."""
    low, high = words.get("min_tokens", 16), words.get("max_tokens", 16384)
    return low * factor**2, high * factor**2


# ---- sizes -------------------------------------------------------------------------------------


def _rounded(height: int, width: int, factor: int) -> Size:
    return round(height / factor) * factor, round(width / factor) * factor


def _shrunk(height: int, width: int, factor: int, by: float) -> Size:
    return math.floor(height / by / factor) * factor, math.floor(width / by / factor) * factor


def _grown(height: int, width: int, factor: int, min_pixels: int) -> Size:
    by = math.sqrt(min_pixels / (height * width))
    return math.ceil(height * by / factor) * factor, math.ceil(width * by / factor) * factor


def _shared(max_pixels: int, frames: int) -> int:
    if max_pixels < frames:
        raise InvalidArgument(
            f"{frames} frames share {max_pixels} pixels, less than one each; take fewer frames"
        )
    return max_pixels // frames


def _native_sizes(media: Sequence[tuple[Patchify, int, int, int]]) -> list[Size]:
    """Of media given with their frames, height and width, in the order of the call."""
    count = sum(frames for _, frames, _, _ in media)
    if len({p.factor for p, *_ in media}) <= 1:
        return [
            native_size(height, width, p.factor, p.min_pixels, _shared(p.max_pixels, count))
            for p, _, height, width in media
        ]
    budgets = {p.max_pixels // p.factor**2 for p, *_ in media}
    if len(budgets) > 1:
        raise InvalidArgument(
            f"images and videos of one call share a budget of tokens, and are given {budgets}; "
            "read both from one file, which has one max_tokens"
        )
    tokens = sum(
        frames * math.ceil(height / p.factor) * math.ceil(width / p.factor)
        for p, frames, height, width in media
    )
    most = budgets.pop()
    if tokens <= most:
        return [_rounded(height, width, p.factor) for p, _, height, width in media]
    by = math.sqrt(tokens / most)
    return [_shrunk(height, width, p.factor, by) for p, _, height, width in media]


def _shape(frames: Sequence[Frame]) -> Size:
    """Height and width of the first frame."""
    if len(frames) == 0:
        raise InvalidArgument("no frames; an image is one, and a video has at least one")
    first = frames[0]
    if isinstance(first, Image.Image):
        return first.height, first.width
    H, W = to_pixels(first).shape[1:]
    return H, W
