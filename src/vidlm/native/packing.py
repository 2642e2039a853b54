"""Numbers into codes and scales by the kernel; see packing.c."""

from __future__ import annotations

from torch import Tensor

from vidlm.errors import InvalidArgument
from vidlm.native.calls import TYPES, kernels, pack, threads
from vidlm.native.packed import PackedWeight


def pack_rows(into: PackedWeight, start: int, rows: Tensor) -> bool:
    """Write codes and scales of `rows` (R, D) as rows `start` and on of `into`.

    Whether it was done: where the kernel cannot, nothing is. The table must rise from its first to
    its last value.
    """
    R, D = rows.shape
    if D != into.width or not 0 <= start <= into.shape[0] - R:
        raise InvalidArgument(f"rows {start} to {start + R} of {D} columns into {into.shape}")
    part = PackedWeight(
        D,
        into.codes[start : start + R],
        into.scale[start : start + R],
        into.table,
        into.group,
    )
    given = rows.detach()
    lib = kernels(given) if rows.numel() and part.readable() else None
    if lib is None:
        return False
    job = pack(*part.fields, given.data_ptr(), R, D)
    lib.vidlm_pack(job, TYPES[given.dtype], threads(given.nbytes))
    return True
