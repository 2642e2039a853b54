"""Attention of one new token, rotation and storing, by the kernels.

Each function takes any tensors and gives what its form in plain.py gives; the kernel runs where it
can: CPU, float32 or bfloat16, rows without gaps, no gradients, no autocast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vidlm.native import plain
from vidlm.native.calls import TYPES, kernels, pack, threads

WIDEST = 512  # head dimension; WIDEST in attention.c
SPAN = 256  # tokens of a piece of work; SPAN in attention.c


def decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor, block: int
) -> Tensor:
    """One new token each of B sequences over all tokens of its sequence, itself included.

    q (B, H, E); keys and values (K, N, E); tables (B, W) int32 and lengths (B,) int32, each 1 or
    more. Token t of sequence b is at slot tables[b, t // block] * block + t % block. Returns
    (B, H, E). Neither B nor where the blocks lie nor the number of threads changes a bit of it.
    """
    B, H, E = q.shape
    K, N, _ = keys.shape
    lib = kernels(q, keys, values)
    if (
        lib is None
        or not B
        or E > WIDEST
        or not _indices(tables, torch.int32)
        or not _indices(lengths, torch.int32)
    ):
        return plain.decode_attention(q, keys, values, tables, lengths, block)
    W = tables.shape[1]
    spans = -(-W * block // SPAN)
    scratch = torch.empty(B * H * spans * (E + 2))
    out = torch.empty_like(q)
    pointers = (t.data_ptr() for t in (q, keys, values, tables, lengths, out, scratch))
    job = pack(*pointers, B, H, K, E, N, W, block, spans)
    size = 2 * B * W * block * K * E * q.element_size()
    lib.vidlm_decode_attention(job, TYPES[q.dtype], threads(size))
    return out


def _indices(x: Tensor, dtype: torch.dtype) -> bool:
    return x.is_cpu and x.dtype == dtype and x.is_contiguous()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half: x (T, H, E) by cos and sin (T, E)."""
    T, H, E = x.shape
    lib = kernels(x, cos, sin)
    if lib is None or cos.shape != (T, E) or sin.shape != (T, E) or E % 2:
        return plain.rotate(x, cos, sin)
    out = torch.empty_like(x)
    pointers = (x.data_ptr(), 0, 0, cos.data_ptr(), sin.data_ptr(), out.data_ptr(), 0, 0, 0)
    size = 2 * x.numel() * x.element_size()
    lib.vidlm_heads(pack(*pointers, T, H, 0, E, 0), TYPES[x.dtype], threads(size))
    return out


def store(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """k and v (T, K, E) to slots (T,) int64 of keys and values (K, N, E)."""
    lib = kernels(k, v, keys, values)
    if lib is None or not _fits(k, v, keys, values, slots):
        plain.store(k, v, keys, values, slots)
        return
    T, K, E = k.shape
    buffers = (keys.data_ptr(), values.data_ptr(), slots.data_ptr())
    job = pack(0, k.data_ptr(), v.data_ptr(), 0, 0, 0, *buffers, T, 0, K, E, keys.shape[1])
    lib.vidlm_heads(job, TYPES[k.dtype], threads(4 * k.numel() * k.element_size()))


def rotate_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rope: tuple[Tensor, Tensor],
    cache: tuple[Tensor, Tensor],
    slots: Tensor,
) -> Tensor:
    """Rotated q (T, H, E); k rotated and v (T, K, E) go to their slots of keys and values."""
    cos, sin = rope
    keys, values = cache
    T, H, E = q.shape
    lib = kernels(q, k, v, cos, sin, keys, values)
    turns = cos.shape == (T, E) and sin.shape == (T, E) and E % 2 == 0 and k.shape[0] == T
    if lib is None or not turns or not _fits(k, v, keys, values, slots):
        plain.store(plain.rotate(k, cos, sin), v, keys, values, slots)
        return plain.rotate(q, cos, sin)
    out = torch.empty_like(q)
    tensors = (q, k, v, cos, sin, out, keys, values, slots)
    job = pack(*(t.data_ptr() for t in tensors), T, H, k.shape[1], E, keys.shape[1])
    size = (2 * q.numel() + 4 * k.numel()) * q.element_size()
    lib.vidlm_heads(job, TYPES[q.dtype], threads(size))
    return out


def _fits(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> bool:
    """Whether shapes are those of `store`; the plain form says what is wrong where not."""
    T, K, E = k.shape
    same = v.shape == k.shape and values.shape == keys.shape
    return (
        same and keys.shape[::2] == (K, E) and slots.shape == (T,) and _indices(slots, torch.int64)
    )
