"""Attention of many queries by the matrix unit of newer Xeons, in bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor

from vidlm.native.ops import computes, pack, threads

WIDEST = 256  # head dimension; MOST in flash.c
SHARE = 256  # queries that are worth laying out a head's values for


def flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor | None:
    """q (B, n, H, E) over k and v (B, S, K, E) -> (B, n, H, E); None where it cannot be done here.

    causal  the queries are the last n of S tokens, and see none behind themselves

    Any strides, if the last is 1. Sums are float32, weights are rounded to bfloat16. The number of
    threads changes no bit.
    """
    B, n, H, E = q.shape
    S, K = k.shape[1:3]
    if q.dtype != torch.bfloat16 or E > WIDEST or E % 2 or H % K or (causal and n > S):
        return None
    if k.shape != v.shape or k.shape != (B, S, K, E) or not B * n * H * S:
        return None
    lib = computes(q, k, v)
    if lib is None or any(x.stride(3) != 1 for x in (q, k, v)):
        return None
    out = torch.empty(B, n, H, E, dtype=q.dtype)
    crew = threads(B * n * H * S)
    parts = max(1, min(-(-4 * crew // (B * K)), n // SHARE))  # four pieces of work a thread
    tensors = (q, k, v, out)
    job = pack(
        *(x.data_ptr() for x in tensors),
        *(B, n, S, H, K, E, causal),
        *(step for x in tensors for step in x.stride()[:3]),
        *(parts, 0),
    )
    lib.vidlm_flash(job, crew)
    return out if job[-1] else None  # the kernel says at the end whether it could
