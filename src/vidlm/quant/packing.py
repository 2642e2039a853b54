"""Weights into 8 and 4 bits: rounding to the nearest, scale by scale; by a kernel on CPUs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from vidlm import native
from vidlm.native import PackedWeight
from vidlm.nn.packed import PackedLinear, Packing

BLOCK = 64  # numbers whose codes of 4 bits lie together; see native/packed.h
# Numbers worked on at a time without the kernel, some twenty bytes each. On CPUs freed pieces leave
# holes between codes that stay, so they are small; on GPUs each takes a dozen launches.
PIECE = 1 << 20
CPU_PIECE = 1 << 16

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
    made = room(weight.shape, packing, weight.device)
    pack_rows(made.packed, 0, weight)
    return made


def room(
    shape: Sequence[int],
    packing: Packing,
    device: torch.device,
    empty: Callable[..., Tensor] = torch.empty,
) -> PackedLinear:
    """A layer without a bias for a weight (O, D), whose rows are still to be packed. `empty` makes
    its tensors, from shape, dtype and device."""
    O, D = shape  # noqa: E741
    codes, scale = packing.shapes(O, D)
    kind = torch.int8 if packing.table is None else torch.uint8
    return PackedLinear(
        packing,
        empty(codes, dtype=kind, device=device),
        empty(scale, dtype=packing.scales, device=device),
        D,
    )


def pack_rows(into: PackedWeight, start: int, rows: Tensor) -> None:
    """Rows (R, D) of a weight, that from `start` on, into its codes and scales.

    One that holds NaN or an infinity stands for nothing of use then, it or with 4 bits its group.
    """
    if native.pack_rows(into, start, rows):
        return
    each = max(1, (CPU_PIECE if rows.is_cpu else PIECE) // max(into.width, 1))
    for first in range(0, len(rows), each):
        given = rows[first : first + each].detach().to(torch.float32, copy=True)
        made = _eight(given) if into.table is None else _four(given, into)
        part = slice(start + first, start + first + len(given))
        into.codes[part], into.scale[part] = made


def _eight(w: Tensor) -> tuple[Tensor, Tensor]:
    scale = w.abs().amax(1) / 127
    codes = w.div_(_never_zero(scale)[:, None]).round_()
    # Scales below 1e-43 are so coarse that codes can be larger; NaN is no integer in any case.
    return codes.clamp_(-127, 127).nan_to_num_(0).to(torch.int8), scale


def _four(w: Tensor, into: PackedWeight) -> tuple[Tensor, Tensor]:
    rows, D = w.shape
    table = into.table
    assert table is not None
    groups = torch.nn.functional.pad(w, (0, -D % into.group)).view(rows, -1, into.group)
    most = groups.gather(2, groups.abs().argmax(2, keepdim=True)).squeeze(2)
    # The largest number of a group is kept exactly: by a scale of its sign where the table reaches
    # further down than up, as that of int4 does.
    scale = most / table[0] if -table[0] > table[-1] else most.abs() / table[-1]
    scale = scale.to(into.scale.dtype)
    groups /= _never_zero(scale.float())[:, :, None]
    between = (table[1:] + table[:-1]) / 2
    places = torch.bucketize(groups, between, out_int32=True).view(rows, -1)[:, :D].to(torch.uint8)
    blocks = torch.nn.functional.pad(places, (0, -D % BLOCK)).view(rows, -1, 2, BLOCK // 2)
    return (blocks[:, :, 0] | blocks[:, :, 1] << 4).view(rows, -1), scale


def _never_zero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale)
