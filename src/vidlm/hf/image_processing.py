"""Image processors under transformers' names: images of any kind -> normalised pixels.

What a processor's words say is its `core`, one of the frozen dataclasses of `vidlm.vision` that the
families' own processors use: there is one path to pixels. Parity: tests/parity/
test_image_processing.py.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from vidlm.errors import InvalidArgument, UnsupportedModel
from vidlm.hf.features import BatchFeature
from vidlm.hf.image_input import channels_first, flat_images, read_frame, warn_of_scaled
from vidlm.hf.pack import padded
from vidlm.hf.words import COMMON, LAST, NONE, PixelProcessor, choice
from vidlm.vision.anyres import PINPOINTS, AnyRes
from vidlm.vision.patches import HALF, Patchify
from vidlm.vision.preprocess import (
    CLIP_MEAN,
    CLIP_STD,
    MODES,
    Frame,
    PillowPreprocess,
    Preprocess,
    pillow_resize,
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
SIGLIP_WORDS: Mapping[str, Any] = {
    "size": {"height": 224, "width": 224},
    "do_center_crop": False,
    "image_mean": list(HALF),
    "image_std": list(HALF),
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
        resized = pillow_resize if isinstance(self.core, PillowPreprocess) else resize
        out = resized(pixels.float() if short else pixels, wanted, MODES[int(resample)])
        layout = choice("data_format", data_format) or layout
        out = out[0] if layout == NONE else out.movedim(0, -1) if layout == LAST else out
        return np.ascontiguousarray(out.to(pixels.dtype).numpy())


class LlavaImageProcessor(ImageProcessor):
    """Images for LLaVA, as CLIP's and SigLIP's processors -> pixel_values (B, 3, H, W)."""

    defaults = CLIP_WORDS
    kind = ("image_processor_type", "CLIPImageProcessor")
    model_input_names = ("pixel_values",)
    do_center_crop: bool

    @classmethod
    def adapted(cls, words: Mapping[str, Any]) -> Mapping[str, Any]:
        """What a file of SigLIP's leaves out means something else than in one of CLIP's."""
        return {**SIGLIP_WORDS, **words} if "Siglip" in str(words.get(cls.kind[0])) else words

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
        return PillowPreprocess.from_dict(self.words)

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
