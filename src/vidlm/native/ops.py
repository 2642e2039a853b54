"""Linear layers of a few rows, attention of one new token, rotation and storing, by the kernels.

Each function takes any tensors and gives what its form in plain.py gives; the kernel runs where it
can: CPU, float32 or bfloat16, rows without gaps, no gradients, no autocast.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from vidlm.native import plain
from vidlm.native.library import library

TYPES = {torch.float32: 0, torch.bfloat16: 1}  # as in lanes.h
MOST_ROWS = 32  # from here on oneDNN's matrix product is faster
WIDEST = 512  # head dimension; WIDEST in attention.c
SPAN = 256  # tokens of a piece of work; SPAN in attention.c

# A thread is worth waking for this many bytes to be read: 128 KB are 10 us of one core, and waking
# costs 2 to 5, or thousands where the cores are busy with something else.
SHARE = 128 * 1024


def kernels(x: Tensor, *others: Tensor) -> ctypes.CDLL | None:
    """The library, where it can take `x` and `others`, which must be rows without gaps."""
    if not x.is_contiguous() or not all(y.is_contiguous() for y in others):
        return None
    return computes(x, *others)


def computes(x: Tensor, *others: Tensor) -> ctypes.CDLL | None:
    """The library, where it knows these types and nobody asks for more than numbers."""
    if type(x) is not Tensor or x.dtype not in TYPES or not x.is_cpu:
        return None
    gradients = torch.is_grad_enabled()
    if gradients and x.requires_grad:
        return None
    for y in others:
        if not y.is_cpu or y.dtype != x.dtype or (gradients and y.requires_grad):
            return None
    if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return None
    return library()


def threads(size: int) -> int:
    """Threads for work that reads so many bytes."""
    return max(1, min(torch.get_num_threads(), size // SHARE))


def pack(*values: int) -> ctypes.Array[ctypes.c_longlong]:
    """A C struct of pointers and int64, in its order."""
    return (ctypes.c_longlong * len(values))(*values)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (M, D), weight (O, D), bias (O) -> (M, O)."""
    return linears(x, (weight,), (bias,))[0]


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (..., D) of many rows, weight (O, D), bias (O) -> (..., O): functional.linear, bit for bit.

    That copies the bias into every row of the result before it multiplies; oneDNN, asked itself,
    adds it to the sums while it has them.
    """
    if x.dtype == torch.bfloat16 and computes(x, weight, bias) and torch.backends.mkldnn.enabled:
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return found
    return functional.linear(x, weight, bias)


def linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """The same x (M, D) through several weights (O, D): (M, O) of each."""
    if x.ndim != 2 or not 0 < x.shape[0] <= MOST_ROWS:
        return plain.linears(x, weights, biases)
    M, D = x.shape
    given = [bias for bias in biases if bias is not None]
    lib = kernels(x, *weights, *given)
    if lib is None or any(w.ndim != 2 or w.shape[1] != D for w in weights):
        return plain.linears(x, weights, biases)
    outs, parts, rows = [], [], 0
    for weight, bias in zip(weights, biases, strict=True):
        O = weight.shape[0]  # noqa: E741  rows of the weight, as in torch's documentation
        if bias is not None and bias.shape != (O,):
            return plain.linears(x, weights, biases)
        out = x.new_empty(M, O)
        outs.append(out)
        parts += [weight.data_ptr(), 0 if bias is None else bias.data_ptr(), out.data_ptr(), O]
        rows += O
    size = rows * D * x.element_size()
    lib.vidlm_linears(pack(*parts), len(outs), x.data_ptr(), M, D, TYPES[x.dtype], threads(size))
    return outs


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
