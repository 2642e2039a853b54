"""Images to normalised pixels, with the arithmetic of transformers' torchvision backend, or that of
its processors that resize with Pillow (PillowPreprocess).

The torchvision backend resizes uint8 pixels with torch's antialiased kernel, so the same kernel is
called here and the result is bit-equal (tests/parity/test_preprocess.py); the only torch in front
of the vision tower, which is why this is not part of `vidlm.media`. Pillow rounds differently: 1 or
2 grey levels of 255 apart where a frame shrinks or is smooth, and up to some 20 at hard edges that
are enlarged. Float frames take the same steps, and torch rounds nothing of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.Image import Resampling
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
    rescale  factor on the values, 1 for frames that are 0 to 1 already; then (x - mean) / std
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
        if config.get("do_pad") and "image_grid_pinpoints" not in config:  # there it is of tiles
            raise UnsupportedModel("do_pad=true in preprocessor_config.json is not supported")
        default = {"height": 224, "width": 224} if siglip else {"shortest_edge": 224}
        wants_crop = config.get("do_center_crop", not siglip)
        normalise = config.get("do_normalize", True)
        return cls(
            resize=_size(config.get("size", default)) if config.get("do_resize", True) else None,
            crop=_box(config.get("crop_size", 224)) if wants_crop else None,
            mean=_channels("image_mean", config.get("image_mean", half if siglip else CLIP_MEAN))
            if normalise
            else (0.0,) * 3,
            std=_channels("image_std", config.get("image_std", half if siglip else CLIP_STD))
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
        out = torch.empty(len(frames), 3, *self.size, dtype=torch.float32, device="cpu")
        for row, frame in zip(out, frames, strict=True):
            row.copy_(self.one(frame))
        return out

    def one(self, frame: Frame) -> Tensor:
        """An RGB frame -> (3, height, width) float32; without a crop, of a size of its own."""
        pixels = to_pixels(frame)
        if self.resize is not None:
            pixels = resize(pixels, self._target(pixels), self.mode)
        if self.crop is not None:
            pixels = centre_crop(pixels, self.crop)
        # One fused step, as the reference: (x - 255 mean) / (255 std) in float32.
        mean = per_channel(self.mean) * (1.0 / self.rescale)
        std = per_channel(self.std) * (1.0 / self.rescale)
        return (pixels.float() - mean) / std

    def _target(self, pixels: Tensor) -> tuple[int, int]:
        assert self.resize is not None
        if isinstance(self.resize, tuple):
            return self.resize
        H, W = pixels.shape[1:]
        return shortest_edge((H, W), self.resize)


class PillowPreprocess(Preprocess):
    """The same with the arithmetic of transformers' older processors: Pillow's resize, numpy's
    rounding. Bit-equal to the processor that Slow-Fast was trained with, and to Video-LLaVA's of
    images, which has no other backend (tests/parity/test_image_processing.py)."""

    def one(self, frame: Frame) -> Tensor:
        pixels = to_pixels(frame)  # (3, H, W)
        if self.resize is not None:
            pixels = pillow_resize(pixels, self._target(pixels), self.mode)
        if self.crop is not None:
            pixels = centre_crop(pixels, self.crop, more_in_front=True)
        values = (pixels.double() * self.rescale).float()
        mean, std = per_channel(self.mean), per_channel(self.std)
        return (values - mean) / std


def per_channel(values: Sequence[float]) -> Tensor:
    """One number per colour channel, to broadcast over pixels: (3, 1, 1) float32."""
    return torch.tensor(values, dtype=torch.float32, device="cpu")[:, None, None]


def shortest_edge(size: tuple[int, int], edge: int) -> tuple[int, int]:
    """Height and width whose smaller one is `edge`, of the same shape but for truncation."""
    H, W = size
    long = int(edge * max(H, W) / min(H, W))  # the reference truncates
    return (edge, long) if H <= W else (long, edge)


def resize(pixels: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """(C, H, W) uint8 or float -> (C, *size) of the same dtype, antialiased."""
    if tuple(pixels.shape[1:]) == size:
        return pixels
    antialias = mode != "nearest-exact"
    corners = False if antialias else None
    out = interpolate(
        pixels[None], size=size, mode=mode, align_corners=corners, antialias=antialias
    )
    return out[0]


def pillow_resize(pixels: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """(C, H, W) uint8 or float -> (C, *size) of the same dtype, by Pillow.

    Pillow resizes bytes: floats become grey levels on the way, as in the reference, those from 0 to
    1 in 255 steps. Raises InvalidArgument for others that are no whole numbers from 0 to 255.
    """
    number = next(number for number, name in MODES.items() if name == mode)
    levels, scaled = (pixels, False) if pixels.dtype == torch.uint8 else _grey_levels(pixels)
    array = levels.permute(1, 2, 0).contiguous().numpy()
    image = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
    out = as_tensor(np.asarray(image.resize(size[::-1], Resampling(number))))
    out = out[None] if out.ndim == 2 else out.permute(2, 0, 1)
    if pixels.dtype == torch.uint8:
        return out
    return (out.double() * (1 / 255 if scaled else 1)).float().to(pixels.dtype)


def _grey_levels(pixels: Tensor) -> tuple[Tensor, bool]:
    """Floats as bytes, and whether they were from 0 to 1."""
    low, high = float(pixels.min()), float(pixels.max())
    whole = torch.allclose(pixels, pixels.trunc())
    if not (low >= 0 and high <= (255 if whole else 1)):
        raise InvalidArgument(
            f"floats from {low:g} to {high:g} are no image to Pillow, which this processor resizes "
            "with; give them from 0 to 1, whole numbers from 0 to 255, or uint8"
        )
    values = pixels if whole else (pixels.double() * 255).float()
    return values.to(torch.uint8), not whole


def centre_crop(pixels: Tensor, size: tuple[int, int], more_in_front: bool = False) -> Tensor:
    """Cut the middle out. What is missing at the edges is black; of an odd number of rows or
    columns the greater half is behind, or in front, where numpy's reference has it."""
    (height, width), (H, W) = size, pixels.shape[1:]
    if height > H or width > W:
        down, across = max(height - H, 0), max(width - W, 0)
        top, left = ((n + more_in_front) // 2 for n in (down, across))
        pixels = pad(pixels, [left, across - left, top, down - top])
        H, W = pixels.shape[1:]
    top, left = int((H - height) / 2.0), int((W - width) / 2.0)
    return pixels[:, top : top + height, left : left + width]


def to_pixels(frame: Frame) -> Tensor:
    """Any frame -> (3, H, W) uint8 or float. Images of other modes become RGB, see `to_rgb`."""
    if isinstance(frame, Image.Image):
        frame = np.array(to_rgb(frame))
    pixels = frame.detach().cpu() if isinstance(frame, Tensor) else as_tensor(frame)
    if pixels.ndim == 3:
        # (3, H, 3) has its channels first as a tensor, and last as an array.
        first = pixels.shape[0] == 3 and (isinstance(frame, Tensor) or pixels.shape[2] != 3)
        pixels = pixels if first else pixels.permute(2, 0, 1)
    known = pixels.dtype == torch.uint8 or pixels.is_floating_point()
    if pixels.ndim != 3 or pixels.shape[0] != 3 or 0 in pixels.shape or not known:
        raise InvalidArgument(
            f"an image of shape {tuple(frame.shape)} and dtype {frame.dtype}; allowed: PIL images, "
            "and uint8 RGB or float arrays and tensors of shape (H, W, 3) or (3, H, W)"
        )
    # Resizing knows no floats of 16 bits.
    return pixels.float() if pixels.dtype in (torch.float16, torch.bfloat16) else pixels


def as_tensor(array: np.ndarray) -> Tensor:
    """The same memory where torch can have it: not read-only, no negative strides."""
    if not array.flags.writeable:
        array = array.copy()
    try:
        return torch.from_numpy(np.ascontiguousarray(array))
    except TypeError as error:
        raise InvalidArgument(
            f"an image of dtype {array.dtype}; give uint8 (0 to 255), or floats"
        ) from error


def _channels(name: str, value: float | Sequence[float]) -> tuple[float, ...]:
    """One number for each channel."""
    values = (value,) * 3 if isinstance(value, int | float) else tuple(value)
    if len(values) != 3:
        raise UnsupportedModel(f"{name}={value!r}; give one number, or one for each of R, G, B")
    return values


def _size(size: Mapping[str, int] | int) -> tuple[int, int] | int:
    if isinstance(size, int):
        return size
    if size.keys() == {"shortest_edge"}:
        return size["shortest_edge"]
    return _box(size)


def _box(size: Mapping[str, int] | int) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    if "height" not in size or "width" not in size:
        raise UnsupportedModel(f"size {dict(size)}; supported: height and width, or shortest_edge")
    return size["height"], size["width"]
