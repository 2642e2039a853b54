"""ConvNeXt as the vision tower of Slow-Fast Video MLLM: frames -> the last stage's map, as patches.

Paper: A ConvNet for the 2020s (arXiv 2201.03545); the published tower is OpenCLIP's ConvNeXt-XXL,
843M parameters and about 2 TFLOP for a frame of 576 × 576. Reference: timm, models/convnext.py.
Parity: tests/parity/test_convnext.py.

Everything is channels-last: (F, H, W, C), C innermost. The norms and the two products of a block,
98% of the work, then read and write whole rows, and a convolution sees the same memory as NCHW.

There are two ways through a block. `Block.forward` is the plain one, and the one with gradients.
`overwrite` does the same in place, some rows at a time, on a CPU where no gradient is asked for.
What that is worth: benchmarks/slowfast_vision.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from vidlm.errors import InvalidArgument, UnsupportedModel

STEM, STRIDE = 4, 32  # pixels of a side that become one place: after the stem, and in the end

# Frames are encoded together until their map after the stem, which is the largest, has so many
# bytes: 2 frames of the published tower in bfloat16, 1 in float32. At most ten times as much is
# alive at once (x, its norm, and a hidden layer before and after gelu), whatever F is. Two cores
# are as fast with one frame; a wider device needs the rows, of which the last stage has 324 each.
MAP = 32 << 20

# Bytes of the hidden layer that `overwrite` makes at a time. That of a whole frame is 64 MB in
# bfloat16, which malloc fetches from the system anew each time: that took longer than the product
# whose result it holds. With far fewer rows the weights are read for too little work.
PIECE = 16 << 20


@dataclass(frozen=True)
class ConvNeXtConfig:
    """Sizes of the tower; the defaults are the published ones."""

    model_type: ClassVar[str] = "convnext"
    patch_size: ClassVar[int] = STRIDE  # pixels of a side of what becomes one feature

    depths: tuple[int, ...] = (3, 4, 30, 3)
    dims: tuple[int, ...] = (384, 768, 1536, 3072)
    eps: float = 1e-5
    image_size: int = 576

    def __post_init__(self) -> None:
        if len(self.depths) != 4 or len(self.dims) != 4:
            raise UnsupportedModel(
                f"ConvNeXt of depths={self.depths} and dims={self.dims}; each needs four numbers, "
                "one a stage, as in depths=(3, 4, 30, 3)"
            )
        if self.image_size < STRIDE:
            raise UnsupportedModel(
                f"ConvNeXt on images of {self.image_size} pixels a side; it needs {STRIDE} or more"
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ConvNeXtConfig:
        """Read a Slow-Fast config.json.

        Published files say no more than `mm_vision_tower: "convnext-576"`, whose number is the side
        of a frame. A `fixture_vision` beside it gives the sizes of another trunk.
        """
        name = config.get("mm_vision_tower")
        side = re.fullmatch(r"convnext-(\d+)", str(name))
        if side is None:
            raise UnsupportedModel(
                f"mm_vision_tower={name!r} is not supported; known: 'convnext-576', and the same "
                "with another number of pixels"
            )
        values = {"image_size": int(side[1]), **(config.get("fixture_vision") or {})}
        return cls(
            depths=tuple(values.get("depths", cls.depths)),
            dims=tuple(values.get("dims", cls.dims)),
            eps=values.get("norm_eps", cls.eps),
            image_size=values["image_size"],
        )

    def to_dict(self) -> dict[str, Any]:
        """The keys of config.json that `from_dict` reads."""
        named: dict[str, Any] = {"mm_vision_tower": f"convnext-{self.image_size}"}
        if self != ConvNeXtConfig(image_size=self.image_size):
            sizes = asdict(self)
            sizes["norm_eps"] = sizes.pop("eps")
            named["fixture_vision"] = sizes
        return named

    @property
    def hidden_size(self) -> int:
        """D: width of a feature."""
        return self.dims[-1]

    @property
    def num_hidden_layers(self) -> int:
        return sum(self.depths)

    @property
    def patches(self) -> int:
        """P: features of a frame."""
        return (self.image_size // STRIDE) ** 2


def convolve(conv: nn.Module, x: Tensor) -> Tensor:
    """(F, H, W, C) -> (F, H', W', C'), contiguous. Depthwise in bfloat16, in this order of memory,
    oneDNN takes half of the time that it takes for NCHW."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()


class MLP(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        scale = torch.full((dim,), 1e-6, dtype=torch.get_default_dtype())
        self.weight = nn.Parameter(scale)  # layer scale, under its stored name
        self.conv_dw = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(F, H, W, C) -> (F, H, W, C)"""
        return x + self.weight * self.mlp(self.norm(convolve(self.conv_dw, x)))


def overwrite(block: Block, x: Tensor) -> Tensor:
    """`block(x)` written over x, which must be contiguous; nothing is kept for gradients."""
    for frames in x.split(max(1, PIECE // x[0].nbytes)):
        rows = frames.view(-1, x.shape[-1])
        spread = convolve(block.conv_dw, frames).view_as(rows)
        parts = -(-4 * rows.nbytes // PIECE)
        for row, near in zip(rows.tensor_split(parts), spread.tensor_split(parts), strict=True):
            hidden = _product(block.mlp.fc1, block.norm(near), then="gelu")
            row.addcmul_(_product(block.mlp.fc2, hidden), block.weight)
    return x


def _product(layer: nn.Module, x: Tensor, then: str = "none") -> Tensor:
    """layer(x), `then` gelu; where oneDNN can, with bias and gelu in the product's own pass."""
    if _fuses(layer, x):
        fused = torch.ops.mkldnn._linear_pointwise
        return fused(x, layer.weight, layer.bias, then, [], "none")
    y = layer(x)
    return torch.ops.aten.gelu_(y) if then == "gelu" else y


def _fuses(layer: nn.Module, x: Tensor) -> bool:
    """Not in float32, where oneDNN's product costs more than the passes that it saves."""
    if type(layer) is not nn.Linear or not x.dtype == layer.weight.dtype == torch.bfloat16:
        return False
    mkldnn = torch.backends.mkldnn
    if not (mkldnn.is_available() and mkldnn.enabled):
        return False
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Stage(nn.Module):
    """Halves height and width, but for the first stage, and goes through its blocks."""

    downsample: Any  # a norm and a convolution, or nothing

    def __init__(self, before: int | None, dim: int, depth: int, eps: float) -> None:
        super().__init__()
        if before is not None:
            norm = nn.LayerNorm(before, eps=eps)
            self.downsample = nn.Sequential(norm, nn.Conv2d(before, dim, 2, 2))
        else:
            self.downsample = nn.Sequential()
        self.blocks = nn.ModuleList(Block(dim, eps) for _ in range(depth))

    def halve(self, x: Tensor) -> Tensor:
        """(F, H, W, C) -> (F, H/2, W/2, C'), a last odd row or column dropped"""
        if not self.downsample:
            return x
        norm, conv = self.downsample
        F, H, W, C = x.shape
        # A convolution that meets each place once is a product. As a convolution it takes longer,
        # four times in the last stage in bfloat16: it brings its weight into another order.
        x = norm(x[:, : H // 2 * 2, : W // 2 * 2]).view(F, H // 2, 2, W // 2, 2, C)
        x = x.transpose(2, 3).flatten(3)  # (F, H/2, W/2, 4C)
        return linear(x, conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias)


class ConvNeXt(nn.Module):
    """Frames (F, 3, S, S), normalised -> features (F, P, D), row by row of the last stage's map.

    No norm follows the last stage. Parameter names are those of the published checkpoint below
    `model.vision_tower.vision_tower.`, of which `head.*` belongs to no part of this.
    """

    stem: Any  # a convolution and a norm
    stages: Any  # four Stage

    def __init__(self, config: ConvNeXtConfig) -> None:
        super().__init__()
        self.config = config
        first, eps = config.dims[0], config.eps
        self.stem = nn.Sequential(nn.Conv2d(3, first, STEM, STEM), nn.LayerNorm(first, eps=eps))
        before = (None, *config.dims[:-1])
        sizes = zip(before, config.dims, config.depths, strict=True)
        self.stages = nn.ModuleList(Stage(b, dim, depth, eps) for b, dim, depth in sizes)

    def forward(self, pixels: Tensor) -> Tensor:
        """In the parameters' dtype. With F grows only the memory of what comes in and goes out.

        Raises InvalidArgument where frames are none, or of another size than the configuration's.
        """
        size = self.config.image_size
        if pixels.ndim != 4 or pixels.shape[1:] != (3, size, size) or not len(pixels):
            raise InvalidArgument(
                f"pixels of shape {tuple(pixels.shape)}; this tower takes (F, 3, {size}, {size}), "
                "F at least 1: pass the processor's output"
            )
        return torch.cat([self._encode(frames) for frames in pixels.split(self.at_a_time)])

    @property
    def at_a_time(self) -> int:
        """Frames encoded together."""
        side = self.config.image_size // STEM
        return max(1, MAP // (side**2 * self.config.dims[0] * self.stem[0].weight.itemsize))

    def _encode(self, frames: Tensor) -> Tensor:
        conv, norm = self.stem
        x = norm(convolve(conv, frames.to(conv.weight).permute(0, 2, 3, 1).contiguous()))
        in_place = x.device.type == "cpu" and not torch.is_grad_enabled()
        for stage in self.stages:
            x = stage.halve(x)
            for block in stage.blocks:
                x = overwrite(block, x) if in_place else block(x)
        return x.flatten(1, 2)
