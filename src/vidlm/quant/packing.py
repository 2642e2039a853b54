"""Weights into 8 and 4 bits: rounding to the nearest, scale by scale, a few rows at a time."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from vidlm.nn.packed import PackedLinear, Packing

BLOCK = 64  # numbers whose codes of 4 bits lie together; see native/packed.h
PIECE = 1 << 20  # numbers worked on at a time, some ten bytes each

# The quantiles of a normal distribution that NormalFloat takes (Dettmers et al., QLoRA, arXiv
# 2305.14314, appendix E), and the values of a 4-bit float with 2 bits of exponent over its largest.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
FP4 = (
    *(-1.0, -2 / 3, -1 / 2, -1 / 3, -1 / 4, -1 / 6, -0.0625 / 12, 0.0),
    *(0.0, 0.0625 / 12, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1.0),
)
INT4 = tuple(float(i) for i in range(-8, 8))


def packings(group: int | None = None) -> Mapping[str, Packing]:
    """How weights of each kind are packed; `group` in the place of the kind's own."""
    return MappingProxyType(
        {
            "int8": Packing(),
            "int4": Packing(INT4, group or 32, torch.bfloat16),
            "nf4": Packing(NF4, group or 64),
            "fp4": Packing(FP4, group or 64),
        }
    )


def pack(weight: Tensor, packing: Packing) -> PackedLinear:
    """A layer without a bias whose weight (O, D) is packed, on the weight's device."""
    O, D = weight.shape  # noqa: E741
    rows = max(1, PIECE // max(D, 1))
    codes_shape, scale_shape = packing.shapes(O, D)
    codes = torch.empty(
        codes_shape,
        dtype=torch.int8 if packing.table is None else torch.uint8,
        device=weight.device,
    )
    scale = torch.empty(scale_shape, dtype=packing.scales, device=weight.device)
    for start in range(0, O, rows):
        part = slice(start, start + rows)
        given = weight[part].detach().to(torch.float32, copy=True)
        made = _eight(given) if packing.table is None else _four(given, packing)
        codes[part], scale[part] = made
    return PackedLinear(packing, codes, scale, D)


def _eight(w: Tensor) -> tuple[Tensor, Tensor]:
    scale = w.abs().amax(1) / 127
    return w.div_(_never_zero(scale)[:, None]).round_().to(torch.int8), scale


def _four(w: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    rows, D = w.shape
    assert packing.table is not None
    groups = torch.nn.functional.pad(w, (0, -D % packing.group)).view(rows, -1, packing.group)
    table = torch.tensor(packing.table, device=w.device)
    most = groups.gather(2, groups.abs().argmax(2, keepdim=True)).squeeze(2)
    # The largest number of a group is kept exactly: by a scale of its sign where the table reaches
    # further down than up, as that of int4 does.
    scale = most / table[0] if -table[0] > table[-1] else most.abs() / table[-1]
    scale = scale.to(packing.scales)
    groups /= _never_zero(scale.float())[:, :, None]
    between = (table[1:] + table[:-1]) / 2
    places = torch.bucketize(groups, between, out_int32=True).view(rows, -1)[:, :D].to(torch.uint8)
    blocks = torch.nn.functional.pad(places, (0, -D % BLOCK)).view(rows, -1, 2, BLOCK // 2)
    return (blocks[:, :, 0] | blocks[:, :, 1] << 4).view(rows, -1), scale


def _never_zero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale)
