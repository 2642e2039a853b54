"""Attention of one new token, rotation and storing, by the kernels.

Each function takes any tensors and gives what its form in plain.py gives; the kernel runs where it
can: CPU, float32 or bfloat16, rows without gaps, no gradients, no autocast.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from vidlm.native import plain
from vidlm.native.calls import TYPES, kernels, pack, threads
from vidlm.native.coded import Cache, Coded, fields
from vidlm.native.library import library

WIDEST = 512  # head dimension; WIDEST in spans.h
SPAN = 256  # tokens of a piece of work; SPAN in spans.h


def decode_attention(
    q: Tensor, keys: Cache, values: Cache, tables: Tensor, lengths: Tensor, block: int
) -> Tensor:
    """One new token each of B sequences over all tokens of its sequence, itself included.

    q (B, H, E); keys and values (K, N, E), coded or not; tables (B, W) int32 and lengths (B,)
    int32, each 1 or more. Token t of sequence b is at slot tables[b, t // block] * block + t %
    block. Returns (B, H, E). Neither B nor where the blocks lie nor the number of threads changes a
    bit of it.
    """
    B, H, E = q.shape
    K, N, _ = keys.shape
    lib = reaches((keys, values), q)
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
    scratch = torch.empty(B * H * spans * (E + 2), dtype=torch.float32, device="cpu")
    out = torch.empty_like(q)
    rest = (t.data_ptr() for t in (tables, lengths, out, scratch))
    job = pack(q.data_ptr(), *buffers(keys, values), *rest, B, H, K, E, N, W, block, spans)
    size = 2 * B * W * block * K * E * (1 if isinstance(keys, Coded) else q.element_size())
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
    pointers = (x.data_ptr(), 0, 0, cos.data_ptr(), sin.data_ptr(), out.data_ptr())
    size = 2 * x.numel() * x.element_size()
    lib.vidlm_heads(pack(*pointers, 0, 0, 0, 0, 0, T, H, 0, E, 0), TYPES[x.dtype], threads(size))
    return out


def store(k: Tensor, v: Tensor, keys: Cache, values: Cache, slots: Tensor) -> None:
    """k and v (T, K, E) to slots (T,) int64 of keys and values (K, N, E), coded or not."""
    lib = reaches((keys, values), k, v)
    if lib is None or not _fits(k, v, keys, values, slots):
        plain.store(k, v, keys, values, slots)
        return
    T, K, E = k.shape
    into = (*buffers(keys, values), slots.data_ptr())
    job = pack(0, k.data_ptr(), v.data_ptr(), 0, 0, 0, *into, T, 0, K, E, keys.shape[1])
    lib.vidlm_heads(job, TYPES[k.dtype], threads(4 * k.numel() * k.element_size()))


def rotate_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rope: tuple[Tensor, Tensor],
    cache: tuple[Cache, Cache],
    slots: Tensor,
) -> Tensor:
    """Rotated q (T, H, E); k rotated and v (T, K, E) go to their slots of keys and values."""
    cos, sin = rope
    keys, values = cache
    T, H, E = q.shape
    lib = reaches(cache, q, k, v, cos, sin)
    turns = cos.shape == (T, E) and sin.shape == (T, E) and E % 2 == 0 and k.shape[0] == T
    if lib is None or not turns or not _fits(k, v, keys, values, slots):
        plain.store(plain.rotate(k, cos, sin), v, keys, values, slots)
        return plain.rotate(q, cos, sin)
    out = torch.empty_like(q)
    given = (t.data_ptr() for t in (q, k, v, cos, sin, out))
    job = pack(*given, *buffers(keys, values), slots.data_ptr(), T, H, k.shape[1], E, keys.shape[1])
    size = (2 * q.numel() + 4 * k.numel()) * q.element_size()
    lib.vidlm_heads(job, TYPES[q.dtype], threads(size))
    return out


def numbers(
    cache: Cache, where: slice | Tensor, dtype: torch.dtype, room: Tensor | None = None
) -> Tensor:
    """Keys or values of some slots, (S,) int64 or a slice of them, in their order: (K, S, E).

    Those that are coded come as numbers of `dtype`, in `room` (K, S, E) if it is given and the
    kernels write it; of others no copy is made where a slice tells.
    """
    if not isinstance(cache, Coded):
        return cache[:, where]
    K, N, E = cache.shape
    if isinstance(where, slice):
        start, stop, step = where.indices(N)
        S, slots, told = max(stop - start, 0), 0, step == 1
    else:
        start, S, slots, told = 0, len(where), where.data_ptr(), _indices(where, torch.int64)
    computed = dtype in TYPES and cache.readable and not torch.compiler.is_compiling()
    lib = library() if told and computed else None
    if lib is None:
        return plain.numbers(cache, where, dtype)
    out = torch.empty(K, S, E, dtype=dtype, device="cpu") if room is None else room
    assert (out.shape, out.dtype) == ((K, S, E), dtype)
    job = pack(*fields(cache), slots, out.data_ptr(), start, S, K, E, N)
    lib.vidlm_decoded(job, TYPES[dtype], threads(out.numel() + out.nbytes))
    return out


def reaches(caches: tuple[Cache, Cache], *others: Tensor) -> ctypes.CDLL | None:
    """The library, where it can take these; both caches are coded or neither is."""
    keys, values = caches
    if isinstance(keys, Tensor) and isinstance(values, Tensor):
        return kernels(*others, keys, values)
    if not all(isinstance(x, Coded) and x.readable for x in caches):
        return None
    return kernels(*others)


def buffers(keys: Cache, values: Cache) -> tuple[int, int, int, int]:
    """In the order of Heads and Decode in jobs.h, and of Layer in stack.c."""
    (k, k_scales), (v, v_scales) = fields(keys), fields(values)
    return k, v, k_scales, v_scales


def _fits(k: Tensor, v: Tensor, keys: Cache, values: Cache, slots: Tensor) -> bool:
    """Whether shapes are those of `store`; the plain form says what is wrong where not."""
    T, K, E = k.shape
    same = v.shape == k.shape and values.shape == keys.shape
    return (
        same and keys.shape[::2] == (K, E) and slots.shape == (T,) and _indices(slots, torch.int64)
    )
