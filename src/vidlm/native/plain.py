"""What each kernel computes, in plain torch: the path of every other machine, and the reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, silu, softmax

from vidlm.native.coded import Cache, Coded
from vidlm.native.packed import PackedWeight


def linears(
    x: Tensor, weights: Sequence[Tensor | PackedWeight], biases: Sequence[Tensor | None]
) -> list[Tensor]:
    numbers = [w if isinstance(w, Tensor) else _unpacked(w, x) for w in weights]
    return [linear(x, weight, bias) for weight, bias in zip(numbers, biases, strict=True)]


def _unpacked(weight: PackedWeight, x: Tensor) -> Tensor:
    """Its numbers; for no rows anything of its shape, as nothing is computed with it: a head is
    asked so after each chunk of a prompt but the last, and is a large weight."""
    return weight.numbers(x.dtype) if len(x) else x.new_empty(weight.shape)


def decode_attention(
    q: Tensor, keys: Cache, values: Cache, tables: Tensor, lengths: Tensor, block: int
) -> Tensor:
    if not q.is_cpu:
        return _all_at_once(q, keys, values, tables, lengths, block)
    rows = []
    for x, table, length in zip(q, tables.tolist(), lengths.tolist(), strict=True):
        used = table[: -(-length // block)]
        _check_blocks(used, length, block, keys.shape[1])
        where: slice | Tensor = slice(used[0] * block, used[0] * block + length)
        if any(b != used[0] + i for i, b in enumerate(used)):  # no neighbours: a copy it must be
            first = torch.tensor(used, dtype=torch.int64, device="cpu")[:, None] * block
            slots = first + torch.arange(block, dtype=torch.int64, device="cpu")
            where = slots.flatten()[:length]
        k, v = numbers(keys, where, q.dtype), numbers(values, where, q.dtype)  # (K, S, E)
        weights = _weights(x.view(len(k), -1, x.shape[-1]), k)
        rows.append((weights @ v).view_as(x))
    return torch.stack(rows) if rows else torch.empty_like(q)


def _check_blocks(used: Sequence[int], length: int, block: int, N: int) -> None:
    """A slice past the end would be cut short in silence, and a negative index be counted from
    the end."""
    last = length - (len(used) - 1) * block  # tokens of the last block
    ends = (b * block + (last if i == len(used) - 1 else block) for i, b in enumerate(used))
    if not 1 <= length <= len(used) * block or min(used) < 0 or max(ends) > N:
        raise IndexError(f"{length} tokens in the blocks {used} of {block} among {N} slots")


def _all_at_once(
    q: Tensor, keys: Cache, values: Cache, tables: Tensor, lengths: Tensor, block: int
) -> Tensor:
    """The shorter sequences are filled up, and nothing waits for the device."""
    B, _, E = q.shape
    inside = torch.arange(block, dtype=torch.int64, device=q.device)
    slots = (tables[:, :, None].long() * block + inside).flatten(1)  # (B, S)
    place = torch.arange(slots.shape[1], dtype=torch.int64, device=q.device)
    hidden = place >= lengths[:, None]
    # A slot that was never written may hold anything, NaN too, so what is filled up is a sequence's
    # first token, again and again.
    slots = torch.where(hidden, slots[:, :1], slots)
    k, v = (numbers(x, slots, q.dtype).transpose(0, 1) for x in (keys, values))  # (B, K, S, E)
    weights = _weights(q.view(B, len(keys), -1, E), k, hidden[:, None, None])
    return (weights @ v).view_as(q)


def _weights(q: Tensor, k: Tensor, hidden: Tensor | None = None) -> Tensor:
    """q (..., H/K, E) of a group of heads, k (..., S, E) -> (..., H/K, S)."""
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    return softmax(scores, dim=-1, dtype=torch.float32).to(k.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


def store(k: Tensor, v: Tensor, keys: Cache, values: Cache, slots: Tensor) -> None:
    for x, cache in ((k, keys), (v, values)):
        rows = x.transpose(0, 1)
        if isinstance(cache, Coded):
            found = coded(rows)
            cache.codes.index_copy_(1, slots, found.codes)
            cache.scales.index_copy_(1, slots, found.scales)
        else:
            cache.index_copy_(1, slots, rows)


def coded(x: Tensor) -> Coded:
    """Numbers (K, S, E) in eight bits. A row with NaN or infinity is worth NaN."""
    wide = x.float()
    scales = wide.abs().amax(-1).clamp(min=1e-30) * (1 / 127)
    codes = (wide * scales.reciprocal()[..., None]).round().nan_to_num(0)
    return Coded(codes.to(torch.int8), scales)


def numbers(cache: Cache, where: slice | Tensor, dtype: torch.dtype) -> Tensor:
    """Those of some slots, in their order: (K, S, E), or (K, *where's shape, E)."""
    if not isinstance(cache, Coded):
        return cache[:, where]
    return (cache.codes[:, where] * cache.scales[:, where][..., None]).to(dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    both = x + delta
    return both, rms_norm(both, weight, eps)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return silu(gate) * up


def gelu_tanh(x: Tensor) -> Tensor:
    return gelu(x, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)
