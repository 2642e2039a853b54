"""Attention of many queries by the matrix unit of newer Xeons, in bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor

from vidlm.native.calls import computes, pack, threads

WIDEST = 256  # head dimension; MOST in flash.c
SHARE = 256  # queries that are worth laying out a head's values for


def flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor | None:
    """q (B, n, H, E) over k and v (B, S, K, E) -> (B, n, H, E); None where it cannot be done here.

    causal  the queries are the last n of S tokens, and see none behind themselves

    Any strides, if the last is 1. Sums are float32, weights are rounded to bfloat16. The number of
    threads changes no bit.
    """
    if k.shape[1] != v.shape[1] or (causal and q.shape[1] > k.shape[1]):
        return None
    return _flash(q, k, v, causal, k.shape[1])


def flash_blocks(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, length: int, block: int
) -> Tensor | None:
    """q (n, H, E), the last of `length` tokens that lie in blocks of keys and values (K, N, E):
    token t at slot table[t // block] * block + t % block -> (n, H, E), causal, as `flash`."""
    if not _inside(table, length, block, keys.shape[1]) or q.shape[0] > length:
        return None
    k, v = (x.transpose(0, 1)[None] for x in (keys, values))
    found = _flash(q[None], k, v, True, length, table, block)
    return None if found is None else found[0]


def _inside(table: Tensor, length: int, block: int, N: int) -> bool:
    """Whether a kernel can read `length` tokens by this table from N slots."""
    whole = table.is_cpu and table.dtype == torch.int32 and table.is_contiguous()
    if not whole or table.ndim != 1 or block < 1 or block % 16:
        return False
    if not 1 <= length <= len(table) * block:
        return False
    low, high = (int(x) for x in table[: -(-length // block)].aminmax())
    return low >= 0 and (high + 1) * block <= N


def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    S: int,
    table: Tensor | None = None,
    block: int = 0,
) -> Tensor | None:
    B, n, H, E = q.shape
    K = k.shape[2]
    if q.dtype != torch.bfloat16 or E > WIDEST or E % 2 or not B * n * H * S * K or H % K:
        return None
    if k.shape != v.shape or (k.shape[0], k.shape[3]) != (B, E):
        return None
    lib = computes(q, k, v)
    if lib is None or any(x.stride(3) != 1 for x in (q, k, v)):
        return None
    out = torch.empty(B, n, H, E, dtype=q.dtype, device="cpu")
    crew = threads(B * n * H * S)
    parts = max(1, min(-(-4 * crew // (B * K)), n // SHARE))  # four pieces of work a thread
    tensors = (q, k, v, out)
    job = pack(
        *(x.data_ptr() for x in tensors),
        *(B, n, S, H, K, E, causal),
        *(step for x in tensors for step in x.stride()[:3]),
        *(parts, 0 if table is None else table.data_ptr(), block, 0),
    )
    lib.vidlm_flash(job, crew)
    return out if job[-1] else None  # the kernel says at the end whether it could
