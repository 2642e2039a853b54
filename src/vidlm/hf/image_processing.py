"""Image processors under transformers' names: images of any kind -> normalised pixels.

What a processor's words say is its `core`, one of the frozen dataclasses of `vidlm.vision` that the
families' own processors use: there is one path to pixels. Parity: tests/parity/
test_image_processing.py.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vidlm.errors import InvalidArgument, UnsupportedModel
from vidlm.hf.features import BatchFeature
from vidlm.hf.pack import padded
from vidlm.hf.words import COMMON, FIRST, LAST, NONE, PixelProcessor, choice
from vidlm.media import to_rgb
from vidlm.vision.anyres import PINPOINTS, AnyRes
from vidlm.vision.patches import HALF, Patchify
from vidlm.vision.preprocess import (
    CLIP_MEAN,
    CLIP_STD,
    MODES,
    Frame,
    Preprocess,
    as_tensor,
    resize,
    shortest_edge,
    to_pixels,
)

log = logging.getLogger(__name__)

CLIP_WORDS: Mapping[str, Any] = {
    **COMMON,
    "size": {"shortest_edge": 224},
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "image_mean": list(CLIP_MEAN),
    "image_std": list(CLIP_STD),
}
EDGES: Mapping[str, str] = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
PATCH_WORDS: Mapping[str, Any] = {
    **COMMON,
    "image_mean": list(HALF),
    "image_std": list(HALF),
    "min_pixels": None,  # other words for those of `size`
    "max_pixels": None,
    "patch_size": 14,
    "temporal_patch_size": 1,
}


class ImageProcessor(PixelProcessor):
    """Images of any kind -> pixels, as `core` makes them."""

    files = ("preprocessor_config.json",)

    @property
    def core(self) -> Any:
        """What the words say, as the family's own processor has it."""
        raise NotImplementedError

    def preprocess(self, images: Any, **overrides: Any) -> BatchFeature:
        """Images -> a BatchFeature with the entries of `model_input_names`.

        images  one or any nesting: PIL images, paths, URLs, and arrays or tensors, uint8 or float,
            (3, H, W), (H, W, 3), grey (H, W) or RGBA, or several in (F, ...). Where both ends may
            be channels the first is, unless input_data_format says otherwise.
        overrides  any word of the class, for this call: data_format None is that of the input;
            return_tensors "pt" or "np" gives one tensor or array, None a list of arrays.

        Floats are taken as they are: from 0 to 1 they need do_rescale=False. Pixels are float32.
        """
        made = self.changed(overrides)
        flat = list(flat_images(images, grey=made.input_data_format == NONE))
        if not flat:
            raise InvalidArgument("no images were given; pass at least one")
        read = [read_frame(image, made) for image in flat]
        warn_of_scaled(read[0][0], made)
        return made.output(**made.pixels(*zip(*read, strict=True)))

    def __call__(self, images: Any, **overrides: Any) -> BatchFeature:
        return self.preprocess(images, **overrides)

    def pixels(
        self, frames: Sequence[Frame], layouts: Sequence[str]
    ) -> dict[str, Tensor | list[Tensor]]:
        """RGB frames, and where their channels were -> what `output` takes."""
        raise NotImplementedError

    def resize(
        self,
        image: np.ndarray,
        size: Mapping[str, int],
        resample: int = 3,
        data_format: str | None = None,
        input_data_format: str | None = None,
    ) -> np.ndarray:
        """An array in another size, of the same dtype and, without data_format, layout.

        size  {"shortest_edge"}, the other one following, or {"height", "width"}
        resample  0, 2 or 3 as PIL numbers them. uint8 is rounded to grey levels, floats are not.
        """
        pixels, layout = channels_first(image, choice("input_data_format", input_data_format))
        if resample not in MODES:
            raise UnsupportedModel(f"resample={resample}; supported: {MODES}")
        H, W = pixels.shape[1:]
        if "shortest_edge" in size:
            wanted = shortest_edge((H, W), size["shortest_edge"])
        elif "height" in size and "width" in size:
            wanted = size["height"], size["width"]
        else:
            raise InvalidArgument(f"size={dict(size)}; give shortest_edge, or height and width")
        short = pixels.dtype in (torch.float16, torch.bfloat16)  # which torch does not resize
        out = resize(pixels.float() if short else pixels, wanted, MODES[int(resample)])
        layout = choice("data_format", data_format) or layout
        out = out[0] if layout == NONE else out.movedim(0, -1) if layout == LAST else out
        return np.ascontiguousarray(out.to(pixels.dtype).numpy())


class LlavaImageProcessor(ImageProcessor):
    """Images for LLaVA, as CLIP's and SigLIP's processors -> pixel_values (B, 3, H, W)."""

    defaults = CLIP_WORDS
    kind = ("image_processor_type", "CLIPImageProcessor")
    model_input_names = ("pixel_values",)
    do_center_crop: bool

    @property
    def core(self) -> Preprocess:
        return Preprocess.from_dict(self.words)

    def pixels(
        self, frames: Sequence[Frame], layouts: Sequence[str]
    ) -> dict[str, Tensor | list[Tensor]]:
        return {"pixel_values": laid_out(map(self.core.one, frames), layouts, self)}

    def to_dict(self) -> dict[str, Any]:
        kind = "CLIPImageProcessor" if self.do_center_crop else "SiglipImageProcessor"
        return {**super().to_dict(), "image_processor_type": kind}


class VideoLlavaImageProcessor(ImageProcessor):
    """Images for Video-LLaVA: shortest edge, centre crop -> pixel_values_images (B, 3, H, W)."""

    defaults = CLIP_WORDS
    kind = ("image_processor_type", "VideoLlavaImageProcessor")
    model_input_names = ("pixel_values_images",)

    @property
    def core(self) -> Preprocess:
        return Preprocess.from_dict(self.words)

    def pixels(
        self, frames: Sequence[Frame], layouts: Sequence[str]
    ) -> dict[str, Tensor | list[Tensor]]:
        return {"pixel_values_images": laid_out(map(self.core.one, frames), layouts, self)}


class LlavaNextVideoImageProcessor(ImageProcessor):
    """Images for LLaVA-NeXT-Video: AnyRes tiles -> pixel_values (B, N, 3, S, S), with zeros behind
    the tiles of images that have fewer, and image_sizes (B, 2), the images' height and width."""

    defaults: ClassVar[Mapping[str, Any]] = {
        **CLIP_WORDS,
        "image_grid_pinpoints": [list(size) for size in PINPOINTS],
        "do_pad": True,
    }
    kind = ("image_processor_type", "LlavaNextImageProcessor")
    model_input_names = ("pixel_values", "image_sizes")
    do_pad: bool

    @property
    def core(self) -> AnyRes:
        return AnyRes.from_dict(self.words)

    def pixels(
        self, frames: Sequence[Frame], layouts: Sequence[str]
    ) -> dict[str, Tensor | list[Tensor]]:
        core = self.core
        images = [to_pixels(frame) for frame in frames]
        tiles = [core(image) for image in images]
        return {
            "pixel_values": laid_out(padded(tiles) if self.do_pad else tiles, layouts, self),
            "image_sizes": torch.tensor(
                [image.shape[1:] for image in images], dtype=torch.int64, device="cpu"
            ),
        }


class PatchProcessor(PixelProcessor):
    """What the two processors of VideoLLaMA3 share: `size` is a budget of pixels."""

    for_videos: ClassVar[bool]
    size: dict[str, int]

    def __init__(self, **words: Any) -> None:
        edges = {edge: words.pop(name, None) for name, edge in EDGES.items()}
        super().__init__(**words)
        if any(pixels is not None for pixels in edges.values()):
            self.size = {**self.size, **{k: v for k, v in edges.items() if v is not None}}

    def __setattr__(self, name: str, value: Any) -> None:
        if name in EDGES:  # other words for those of `size`
            if value is None:
                return
            name, value = "size", {**self.size, EDGES[name]: self._checked(name, value)}
        if name == "size":
            value = self._checked(name, value)
            if value.keys() != set(EDGES.values()):
                raise InvalidArgument(
                    f"size={value}; give the least and the most pixels of a frame, as "
                    f"{self.defaults['size']}"
                )
        if name == "data_format" and self._checked(name, value) == LAST:
            raise InvalidArgument(
                f"data_format={LAST!r}: patches have their channels first; leave it out"
            )
        super().__setattr__(name, value)

    @property
    def min_pixels(self) -> int:
        """The least pixels of a frame, as `size` has it."""
        return self.size["shortest_edge"]

    @property
    def max_pixels(self) -> int:
        """The most pixels of a frame, as `size` has it."""
        return self.size["longest_edge"]

    @property
    def words(self) -> dict[str, Any]:
        return {**super().words, **dict.fromkeys(EDGES)}  # `size` says them

    @classmethod
    def adapted(cls, words: Mapping[str, Any]) -> Mapping[str, Any]:
        """As the family reads a file: where it has no budget, the published one and not the class's
        own, which leaves a long video next to nothing; of the native file, its tokens in pixels."""
        if cls.for_videos and str(words.get("image_processor_type")).startswith("VideoLlama3"):
            words = {}  # that of images, which says nothing about videos
        said = replace(Patchify.from_dict(words, cls.for_videos), rule="hf").to_dict()
        budget = ("min_tokens", "max_tokens", "image_merge_size", "video_merge_size")
        kept = {k: v for k, v in words.items() if k not in (*budget, "min_pixels", "max_pixels")}
        return {**kept, **said}

    @property
    def core(self) -> Patchify:
        """What the words say, as the family's own processor has it."""
        return Patchify.from_dict(self.words, self.for_videos)


class VideoLlama3ImageProcessor(PatchProcessor, ImageProcessor):
    """Images for VideoLLaMA3: rows of patches -> pixel_values (sum of rows, 588), image_grid_thw
    (n, 3), each image's patches in time, down and across, and image_merge_sizes (n,)."""

    defaults: ClassVar[Mapping[str, Any]] = {
        **PATCH_WORDS,
        "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
        "merge_size": 1,
    }
    kind = ("image_processor_type", "VideoLlama3ImageProcessor")
    model_input_names = ("pixel_values", "image_grid_thw", "image_merge_sizes")
    for_videos = False

    def preprocess(self, images: Any, videos: Any = None, **overrides: Any) -> BatchFeature:
        """As ImageProcessor.preprocess. `videos`, once taken too, have a processor of their own."""
        if videos is not None:
            raise InvalidArgument("videos are not images; pass them to VideoLlama3VideoProcessor")
        return super().preprocess(images, **overrides)

    def pixels(
        self, frames: Sequence[Frame], layouts: Sequence[str]
    ) -> dict[str, Tensor | list[Tensor]]:
        core = self.core
        rows, grids = zip(*(core([frame]) for frame in frames), strict=True)
        return {
            "pixel_values": joined(rows),
            "image_grid_thw": torch.tensor(grids, dtype=torch.int64, device="cpu"),
            "image_merge_sizes": torch.full(
                (len(grids),), core.merge_size, dtype=torch.int64, device="cpu"
            ),
        }


VideoLlama3ImageProcessorFast = VideoLlama3ImageProcessor  # its second name


# ---- images of any kind ------------------------------------------------------------------------


def flat_images(images: Any, grey: bool) -> Iterator[Any]:
    """Images of any nesting, in order; an array with one dimension more holds several."""
    if isinstance(images, list | tuple):
        for image in images:
            yield from flat_images(image, grey)
    elif isinstance(images, np.ndarray | Tensor) and images.ndim == (3 if grey else 4):
        yield from images
    elif isinstance(images, Image.Image | np.ndarray | Tensor | str | Path):
        yield images
    else:
        raise InvalidArgument(
            f"a {type(images).__name__} is no image; give PIL images, arrays, "
            "tensors, paths or URLs"
        )


def read_frame(image: Any, words: PixelProcessor) -> tuple[Frame, str]:
    """An image as it was given -> RGB, PIL's or (3, H, W), and where its channels were."""
    if isinstance(image, str | Path):
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


def laid_out(
    pixels: Iterable[Tensor], layouts: Iterable[str], words: PixelProcessor
) -> list[Tensor]:
    """(..., 3, H, W) each -> with the channels where data_format wants them, or where they were."""
    last = [(words.data_format or layout) == LAST for layout in layouts]
    pairs = zip(pixels, last, strict=True)
    return [each.movedim(-3, -1) if moved else each for each, moved in pairs]


def joined(rows: Sequence[Tensor]) -> Tensor:
    """One behind the other; a single one, which may be large, as it is."""
    return rows[0] if len(rows) == 1 else torch.cat(list(rows))


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
