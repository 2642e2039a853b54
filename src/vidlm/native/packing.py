"""Numbers into codes and scales by the kernel; see packing.c."""

from __future__ import annotations

import torch
from torch import Tensor

from vidlm.native.calls import TYPES, kernels, pack, threads
from vidlm.native.packed import PackedWeight


def pack_rows(into: PackedWeight, start: int, rows: Tensor) -> bool:
    """Write codes and scales of `rows` (R, D) as rows `start` and on of `into`.

    Whether it was done: where the kernel cannot, nothing is. The table must rise from its first to
    its last value.
    """
    R, D = rows.shape
    assert D == into.width
    assert 0 <= start <= into.shape[0] - R
    part = PackedWeight(
        D,
        into.codes[start : start + R],
        into.scale[start : start + R],
        into.table,
        into.group,
    )
    given = rows.detach()
    lib = kernels(given) if rows.numel() and _takes(part) else None
    if lib is None:
        return False
    job = pack(*part.fields, given.data_ptr(), R, D)
    lib.vidlm_pack(job, TYPES[given.dtype], threads(given.nbytes))
    return True


def _takes(part: PackedWeight) -> bool:
    if part.table is None:
        return part.readable() and part.scale.dtype == torch.float32
    return part.readable() and part.table.dtype == torch.float32 and len(part.table) == 16
