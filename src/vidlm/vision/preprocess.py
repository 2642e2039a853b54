"""Images to normalised pixels, with the arithmetic of transformers' torchvision backend.

That backend resizes uint8 pixels with torch's antialiased kernel, so the same kernel is called
here and the result is bit-equal (tests/parity/test_preprocess.py); the only torch in front of the
vision tower, which is why this is not part of `vidlm.media`. transformers' PIL backend rounds
differently: 1 or 2 grey levels of 255 apart where a frame shrinks or is smooth, and up to some 20
at hard edges that are enlarged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad

from vidlm.errors import InvalidArgument, UnsupportedModel
from vidlm.media import to_rgb

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MODES = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}  # by PIL's numbers

Frame = Image.Image | np.ndarray | Tensor


@dataclass(frozen=True)
class Preprocess:
    """What preprocessor_config.json says to do with an image, in this order.

    resize   (height, width) to squash to, or a single int: the shortest edge, aspect kept
    crop     (height, width) of a centre crop, or None
    rescale  factor on the uint8 values; then (x - mean) / std
    """

    resize: tuple[int, int] | int | None
    crop: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mode: str = "bicubic"
    rescale: float = 1 / 255

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Preprocess:
        siglip = "Siglip" in config.get("image_processor_type", "")
        half = (0.5, 0.5, 0.5)
        resample = config.get("resample", 3)
        if resample not in MODES:
            raise UnsupportedModel(f"resample={resample}; supported: {MODES}")
        if config.get("do_pad"):
            raise UnsupportedModel("do_pad=true in preprocessor_config.json is not supported")
        default = {"height": 224, "width": 224} if siglip else {"shortest_edge": 224}
        wants_crop = config.get("do_center_crop", not siglip)
        normalise = config.get("do_normalize", True)
        return cls(
            resize=_size(config.get("size", default)) if config.get("do_resize", True) else None,
            crop=_box(config.get("crop_size", 224)) if wants_crop else None,
            mean=tuple(config.get("image_mean", half if siglip else CLIP_MEAN))
            if normalise
            else (0.0,) * 3,
            std=tuple(config.get("image_std", half if siglip else CLIP_STD))
            if normalise
            else (1.0,) * 3,
            mode=MODES[resample],
            rescale=config.get("rescale_factor", 1 / 255)
            if config.get("do_rescale", True)
            else 1.0,
        )

    def to_dict(self) -> dict[str, Any]:
        """A preprocessor_config.json that vidlm and transformers both read."""
        box, crop = self.resize, self.crop
        values: dict[str, Any] = {
            "image_processor_type": "CLIPImageProcessor" if crop else "SiglipImageProcessor",
            "do_convert_rgb": True,
            "do_resize": box is not None,
            "resample": next(number for number, mode in MODES.items() if mode == self.mode),
            "do_center_crop": crop is not None,
            "do_rescale": True,
            "rescale_factor": self.rescale,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        if isinstance(box, int):
            values["size"] = {"shortest_edge": box}
        elif box is not None:
            values["size"] = {"height": box[0], "width": box[1]}
        if crop is not None:
            values["crop_size"] = {"height": crop[0], "width": crop[1]}
        return values

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of what comes out."""
        box = self.crop or self.resize
        if not isinstance(box, tuple):
            raise UnsupportedModel("preprocessing without a fixed output size is not supported")
        return box

    def __call__(self, frames: Sequence[Frame]) -> Tensor:
        """RGB frames, of any sizes -> (F, 3, height, width) float32."""
        out = torch.empty(len(frames), 3, *self.size)
        for row, frame in zip(out, frames, strict=True):
            row.copy_(self._one(_pixels(frame)))
        return out

    def _one(self, pixels: Tensor) -> Tensor:
        """(3, H, W) uint8 -> (3, height, width) float32."""
        if self.resize is not None:
            pixels = resize(pixels, self._target(pixels), self.mode)
        if self.crop is not None:
            pixels = centre_crop(pixels, self.crop)
        # One fused step, as the reference: (x - 255 mean) / (255 std) in float32.
        mean = torch.tensor(self.mean)[:, None, None] * (1.0 / self.rescale)
        std = torch.tensor(self.std)[:, None, None] * (1.0 / self.rescale)
        return (pixels.float() - mean) / std

    def _target(self, pixels: Tensor) -> tuple[int, int]:
        assert self.resize is not None
        if isinstance(self.resize, tuple):
            return self.resize
        H, W = pixels.shape[1:]
        short, long = min(H, W), max(H, W)
        long = int(self.resize * long / short)  # the reference truncates
        return (self.resize, long) if H <= W else (long, self.resize)


def resize(pixels: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """(3, H, W) uint8 -> (3, *size) uint8, antialiased."""
    if tuple(pixels.shape[1:]) == size:
        return pixels
    antialias = mode != "nearest-exact"
    corners = False if antialias else None
    out = interpolate(
        pixels[None], size=size, mode=mode, align_corners=corners, antialias=antialias
    )
    return out[0]


def centre_crop(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut the middle out; what is missing at the edges is black, floor before and ceil behind."""
    (height, width), (H, W) = size, pixels.shape[1:]
    if height > H or width > W:
        left, top = max((width - W) // 2, 0), max((height - H) // 2, 0)
        right, bottom = max((width - W + 1) // 2, 0), max((height - H + 1) // 2, 0)
        pixels = pad(pixels, [left, right, top, bottom])
        H, W = pixels.shape[1:]
    top, left = int((H - height) / 2.0), int((W - width) / 2.0)
    return pixels[:, top : top + height, left : left + width]


def _pixels(frame: Frame) -> Tensor:
    """Any frame -> (3, H, W) uint8. Images of other modes become RGB, see `to_rgb`."""
    if isinstance(frame, Image.Image):
        frame = np.array(to_rgb(frame))
    channels_first = frame.ndim == 3 and frame.shape[0] == 3
    if isinstance(frame, Tensor):
        frame = frame.cpu().numpy()
    else:
        channels_first = channels_first and frame.shape[2] != 3
    if channels_first:
        frame = frame.transpose(1, 2, 0)
    if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
        raise InvalidArgument(
            f"an image of shape {frame.shape} and dtype {frame.dtype}; allowed: PIL images, and "
            "uint8 RGB arrays or tensors of shape (H, W, 3) or (3, H, W)"
        )
    if not frame.flags.writeable:
        frame = frame.copy()
    return torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)


def _size(size: Mapping[str, int] | int) -> tuple[int, int] | int:
    if isinstance(size, int):
        return size
    if "shortest_edge" in size:
        return size["shortest_edge"]
    return _box(size)


def _box(size: Mapping[str, int] | int) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    if "height" not in size or "width" not in size:
        raise UnsupportedModel(f"size {dict(size)}; supported: height and width, or shortest_edge")
    return size["height"], size["width"]
