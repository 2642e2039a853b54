"""Attention of one new token, rotation and storing, by the kernels.

Each function takes any tensors and gives what its form in plain.py gives; the kernel runs where it
can: CPU, float32 or bfloat16, rows without gaps, no gradients, no autocast.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from vidlm.errors import InvalidArgument
from vidlm.native import plain
from vidlm.native.calls import TYPES, checked, kernels, pack, threads
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
    bit of it. Raises InvalidArgument for shapes that do not fit each other, and IndexError for
    tokens that are not in the cache.
    """
    _check_decode(q, keys, values, tables, lengths, block)
    B, H, E = q.shape
    K, N, _ = keys.shape
    lib = reaches((keys, values), q)
    if (
        lib is None
        or not B
        or E > WIDEST
        or not indices(tables, torch.int32)
        or not indices(lengths, torch.int32)
    ):
        return plain.decode_attention(q, keys, values, tables, lengths, block)
    W = tables.shape[1]
    spans = -(-W * block // SPAN)
    scratch = torch.empty(B * H * spans * (E + 2), dtype=torch.float32, device="cpu")
    out = torch.empty_like(q)
    rest = (t.data_ptr() for t in (tables, lengths, out, scratch))
    job = pack(q.data_ptr(), *buffers(keys, values), *rest, B, H, K, E, N, W, block, spans)
    size = 2 * B * W * block * K * E * (1 if isinstance(keys, Coded) else q.element_size())
    done = lib.vidlm_decode_attention(job, TYPES[q.dtype], threads(size))
    checked(done, f"a length or a block of a table of {N} slots")
    return out


def _check_decode(
    q: Tensor, keys: Cache, values: Cache, tables: Tensor, lengths: Tensor, block: int
) -> None:
    shapes = tuple(q.shape), tuple(keys.shape), tuple(tables.shape), tuple(lengths.shape)
    match shapes:
        case (B, H, E), (K, _, E2), (B2, _), (B3,):
            fits = (E, B, B) == (E2, B2, B3) and K > 0 and H % K == 0
        case _:
            fits = False
    if not fits or values.shape != keys.shape or block < 1:
        raise InvalidArgument(
            f"q, keys, values, tables and lengths of shapes {shapes[0]}, {shapes[1]}, "
            f"{tuple(values.shape)}, {shapes[2]}, {shapes[3]}, block={block}; allowed: (B, H, E), "
            "(K, N, E), (K, N, E), (B, W) and (B,), H a multiple of K, blocks of 1 slot or more"
        )


def indices(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether a kernel can read them as they are."""
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
    """k and v (T, K, E) to slots (T,) int64 of keys and values (K, N, E), coded or not. Raises
    IndexError where a slot is not one of N; nothing is stored then."""
    lib = reaches((keys, values), k, v)
    if lib is None or not _fits(k, v, keys, values, slots):
        plain.store(k, v, keys, values, slots)
        return
    T, K, E = k.shape
    into = (*buffers(keys, values), slots.data_ptr())
    job = pack(0, k.data_ptr(), v.data_ptr(), 0, 0, 0, *into, T, 0, K, E, keys.shape[1])
    done = lib.vidlm_heads(job, TYPES[k.dtype], threads(4 * k.numel() * k.element_size()))
    checked(done, f"a slot of {keys.shape[1]}")


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
    turns = cos.shape == sin.shape == (T, E) == k.shape[::2] and E % 2 == 0
    if lib is None or not turns or not _fits(k, v, keys, values, slots):
        plain.store(plain.rotate(k, cos, sin), v, keys, values, slots)
        return plain.rotate(q, cos, sin)
    out = torch.empty_like(q)
    given = (t.data_ptr() for t in (q, k, v, cos, sin, out))
    job = pack(*given, *buffers(keys, values), slots.data_ptr(), T, H, k.shape[1], E, keys.shape[1])
    size = (2 * q.numel() + 4 * k.numel()) * q.element_size()
    checked(lib.vidlm_heads(job, TYPES[q.dtype], threads(size)), f"a slot of {keys.shape[1]}")
    return out


def numbers(
    cache: Cache, where: slice | Tensor, dtype: torch.dtype, room: Tensor | None = None
) -> Tensor:
    """Keys or values of some slots, (S,) int64 or a slice of them, in their order: (K, S, E).

    int8 caches are dequantized to `dtype`, into `room` (K, S, E) if it is given and the kernels
    can write there; of other caches a slice is a view. Raises IndexError for slots that are not
    there.
    """
    if not isinstance(cache, Coded):
        return cache[:, where]
    K, N, E = cache.shape
    if isinstance(where, slice):
        start, stop, step = where.indices(N)
        S, slots, told = max(stop - start, 0), 0, step == 1
    else:
        start, S, slots = 0, len(where), where.data_ptr()
        told = where.ndim == 1 and indices(where, torch.int64)
    computed = dtype in TYPES and cache.readable and not torch.compiler.is_compiling()
    lib = library() if told and computed else None
    if lib is None:
        return plain.numbers(cache, where, dtype)
    out = torch.empty(K, S, E, dtype=dtype, device="cpu") if room is None else room
    if (out.shape, out.dtype) != ((K, S, E), dtype) or not (out.is_cpu and out.is_contiguous()):
        raise InvalidArgument(
            f"room of shape {tuple(out.shape)} and {out.dtype} on {out.device}; allowed: "
            f"({K}, {S}, {E}) of {dtype} on the CPU, without gaps"
        )
    job = pack(*fields(cache), slots, out.data_ptr(), start, S, K, E, N)
    done = lib.vidlm_decoded(job, TYPES[dtype], threads(out.numel() + out.nbytes))
    checked(done, f"a slot of {N}")
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
        same and keys.shape[::2] == (K, E) and slots.shape == (T,) and indices(slots, torch.int64)
    )
