"""nn/attention.py: each of its forms is the textbook's attention, gradients included."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from paging import Paged
from vidlm.hf.cache import GrowingKV
from vidlm.native import plain
from vidlm.nn import attention
from vidlm.nn.attention import attend, attend_all
from vidlm.nn.step import Step, packed

CPU = torch.device("cpu")
E = 8
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
HEADS = [(4, 4), (4, 2), (6, 2), (4, 1)]  # H, K


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def qkv(tokens: int, heads: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    H, K = heads
    sizes = (H, K, K)
    q, k, v = (randn(tokens, n, E, seed=10 * seed + i) for i, n in enumerate(sizes))
    return 2 * q, k, v


def textbook(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True) -> Tensor:
    """One query at a time, in float64: q (T, H, E) at the end of k and v (S, K, E)."""
    (T, H, _), (S, K, _) = q.shape, k.shape
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros_like(q)
    for t in range(T):
        seen = S - T + t + 1 if causal else S
        for h in range(H):
            group = h // (H // K)
            weights = (k[:seen, group] @ q[t, h] / math.sqrt(E)).softmax(dim=0)
            out[t, h] = weights @ v[:seen, group]
    return out.float()


# ---- values ----------------------------------------------------------------------------------


@settings(max_examples=60)
@given(lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4), heads=st.sampled_from(HEADS))
def test_without_a_cache(lengths: list[int], heads: tuple[int, int]) -> None:
    q, k, v = qkv(sum(lengths), heads)
    out = attend(q, k, v, packed(lengths, CPU), layer=0)
    parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    torch.testing.assert_close(out, torch.cat([textbook(*part) for part in parts]), **CLOSE)


@settings(max_examples=60)
@given(
    parts=st.lists(st.tuples(st.integers(0, 6), st.integers(1, 5)), min_size=1, max_size=3),
    heads=st.sampled_from(HEADS),
    paged=st.booleans(),
)
def test_with_a_cache(parts: list[tuple[int, int]], heads: tuple[int, int], paged: bool) -> None:
    sequences = [qkv(past + new, heads, seed) for seed, (past, new) in enumerate(parts)]
    store = _in_blocks if paged else _in_rows
    step = store(
        [(k[:past], v[:past], new) for (_, k, v), (past, new) in zip(sequences, parts, strict=True)]
    )
    news = [
        [x[past:] for x in sequence] for sequence, (past, _) in zip(sequences, parts, strict=True)
    ]
    q, k, v = (torch.cat(column) for column in zip(*news, strict=True))
    out = attend(q, k, v, step, layer=0)
    pairs = zip(news, sequences, strict=True)
    wanted = [textbook(new[0], keys, values) for new, (_, keys, values) in pairs]
    torch.testing.assert_close(out, torch.cat(wanted), **CLOSE)


def _in_rows(parts: list[tuple[Tensor, Tensor, int]]) -> Step:
    """A step of so many new tokens behind keys and values in a cache for each sequence."""
    stores = [GrowingKV() for _ in parts]
    for kv, (k, v, _) in zip(stores, parts, strict=True):
        if len(k):
            kv.append(0, k, v)
            kv.length = len(k)
    return packed([new for _, _, new in parts], CPU, stores)


def _in_blocks(parts: list[tuple[Tensor, Tensor, int]]) -> Step:
    """The same in one cache of blocks."""
    stores = Paged([len(k) + new for k, _, new in parts], seed=len(parts))
    for i, (k, v, _) in enumerate(parts):
        stores.lengths[i] = len(k)
        if len(k):
            stores.kv.write(stores.tables[i], [(k.transpose(0, 1), v.transpose(0, 1))])
    return stores.step({i: new for i, (_, _, new) in enumerate(parts)})


@pytest.mark.parametrize("lengths", [[5, 5], [5, 3], [5, 1, 1]])
def test_later_tokens_do_not_matter(lengths: list[int]) -> None:
    q, k, v = qkv(sum(lengths), (4, 2))
    step = packed(lengths, CPU)
    before = attend(q, k, v, step, layer=0)
    k[3:], v[3:] = k[3:] + 1, v[3:] - 1
    after = attend(q, k, v, step, layer=0)
    assert torch.equal(before[:3], after[:3])
    assert not torch.isclose(before[3:], after[3:]).all(dim=-1).any()


@settings(max_examples=40)
@given(n=st.integers(1, 9), past=st.integers(1, 20), heads=st.sampled_from(HEADS))
def test_later_chunks_as_gpus_are_told_of_them(n: int, past: int, heads: tuple[int, int]) -> None:
    """A mask without entries, which torch's flash kernel takes, means what the other one says."""
    q, k, v = qkv(past + n, heads)
    q, keys, values = q[past:], k.transpose(0, 1), v.transpose(0, 1)
    on_gpu: Any = SimpleNamespace(is_cuda=True)
    mask = attention._at_the_end(n, past + n, on_gpu)
    assert mask.numel() == 2
    batch = (x[None] for x in (q.transpose(0, 1), keys, values))
    found = scaled_dot_product_attention(*batch, attn_mask=mask, enable_gqa=True)
    wanted = attention._prefill(q, keys, values)
    torch.testing.assert_close(found[0].transpose(0, 1), wanted, **CLOSE)


def test_every_patch_sees_every_other() -> None:
    F, P, H = 3, 5, 4
    q, k, v = (randn(F, P, H, E, seed=i) for i in range(3))
    wanted = torch.stack([textbook(q[f], k[f], v[f], causal=False) for f in range(F)])
    torch.testing.assert_close(attend_all(q, k, v), wanted, **CLOSE)


# ---- gradients -------------------------------------------------------------------------------


def gradients(
    forward: Callable[..., Tensor], inputs: Iterable[Tensor], weight: Tensor
) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    return torch.autograd.grad((forward(*leaves) * weight).sum(), leaves)


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """torch's operator, on (B, n, ., E)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    return out.transpose(1, 2)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("causal", [False, True])
def test_matmul_is_the_fused_operator(heads: tuple[int, int], causal: bool) -> None:
    B, n, (H, K) = 3, 6, heads
    inputs = [randn(B, size, n, E, seed=i) for i, size in enumerate((H, K, K))]
    weight = randn(B, H, n, E, seed=9)

    def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention._matmul(q, k, v, causal)

    torch.testing.assert_close(plain(*inputs), fused(*inputs), **CLOSE)
    both = (gradients(form, inputs, weight) for form in (plain, fused))
    torch.testing.assert_close(*both, **CLOSE)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("lengths", [[6, 6], [6, 2, 4], [3, 1, 1]])
def test_attend_trains(heads: tuple[int, int], lengths: list[int]) -> None:
    """Whichever form attend takes for a batch, it has the gradients of torch's operator."""
    inputs = qkv(sum(lengths), heads)
    weight = randn(sum(lengths), heads[0], E, seed=9)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, packed(lengths, CPU), layer=0)

    def one_by_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
        return torch.cat([sdpa(*(x[None] for x in part), causal=True)[0] for part in parts])

    both = (gradients(form, inputs, weight) for form in (ours, one_by_one))
    torch.testing.assert_close(*both, **CLOSE)


def test_attend_all_trains() -> None:
    inputs = [randn(2, 5, 4, E, seed=i) for i in range(3)]
    weight = randn(2, 5, 4, E, seed=9)

    def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v, causal=False)

    both = (gradients(form, inputs, weight) for form in (attend_all, fused))
    torch.testing.assert_close(*both, **CLOSE)


def test_training_on_a_cpu_takes_the_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two forms give the same numbers, so only watching tells which one runs."""
    calls: list[bool] = []
    plain = attention._matmul

    def watched(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        calls.append(causal)
        return plain(q, k, v, causal)

    monkeypatch.setattr(attention, "_matmul", watched)
    q, k, v = qkv(6, (4, 2))
    attend(q, k, v, packed([3, 3], CPU), layer=0)
    assert calls == []
    attend(q.requires_grad_(), k, v, packed([3, 3], CPU), layer=0)
    assert calls == [True]


# ---- one new token each of several sequences, as devices do it -------------------------------


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), heads=st.sampled_from(HEADS))
def test_all_sequences_at_once(seed: int, heads: tuple[int, int]) -> None:
    """The form for GPUs, which cannot ask how long each sequence is; unwritten slots hold NaN."""
    (H, K), block, B = heads, 4, 3
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed)).int()
    lengths = order[:B] + 1  # 1 to 12: up to three blocks
    tables = order.view(B, -1)
    keys, values = (torch.full((K, 12 * block, E), torch.nan) for _ in range(2))
    q, wanted = randn(B, H, E, seed=seed), []
    for b, length in enumerate(lengths.tolist()):
        _, k, v = qkv(length, heads, seed + b)
        slots = (tables[b, :, None] * block + torch.arange(block)).flatten()[:length].long()
        keys[:, slots], values[:, slots] = k.transpose(0, 1), v.transpose(0, 1)
        wanted.append(textbook(q[b : b + 1], k, v))
    cache = (keys, values, tables, lengths, block)
    torch.testing.assert_close(plain._all_at_once(q, *cache), torch.cat(wanted), **CLOSE)
    torch.testing.assert_close(plain.decode_attention(q, *cache), torch.cat(wanted), **CLOSE)
