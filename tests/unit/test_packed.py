"""Weights in 8 and 4 bits: what they stand for, and products with them without unpacking."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vidlm import native
from vidlm.native import PackedWeight

DTYPES = [torch.float32, torch.bfloat16]
EPS = {torch.float32: 2**-23, torch.bfloat16: 2**-8}


def eight(seed: int, O: int, D: int) -> PackedWeight:  # noqa: E741
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (O, D), generator=draw).to(torch.int8)
    return PackedWeight(D, codes, torch.rand(O, generator=draw) / 100)


def four(seed: int, O: int, D: int, group: int) -> PackedWeight:  # noqa: E741
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (O, -(-D // 64) * 32), generator=draw).to(torch.uint8)
    scale = torch.rand(O, -(-D // group), generator=draw) / 10
    scale = scale.bfloat16() if group == 32 else scale
    table = torch.randn(16, generator=draw).bfloat16().float()
    return PackedWeight(D, codes, scale, table, group)


def by_the_book(w: PackedWeight) -> Tensor:
    """(O, D) in float64, one number after the other."""
    O, D = w.shape  # noqa: E741
    if w.table is None:
        return w.codes.double() * w.scale.double()[:, None]
    out = torch.empty(O, D, dtype=torch.float64)
    for o in range(O):
        for d in range(D):
            byte = int(w.codes[o, d // 64 * 32 + d % 32])
            place = byte & 15 if d % 64 < 32 else byte >> 4
            out[o, d] = float(w.table[place]) * float(w.scale[o, d // w.group])
    return out


def a_weight(seed: int, O: int, D: int, group: int) -> PackedWeight:  # noqa: E741
    return four(seed, O, D, group) if group else eight(seed, O, D)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [0, 32, 64, 128])
@pytest.mark.parametrize("D", [16, 33, 64, 100, 193])
def test_numbers(dtype: torch.dtype, group: int, D: int, monkeypatch) -> None:
    w = a_weight(D, 5, D, group)
    exact = by_the_book(w)
    found = w.numbers(dtype)
    monkeypatch.setattr("vidlm.native.packed.library", lambda: None)
    for numbers in (found, w.numbers(dtype)):
        assert numbers.shape == w.shape
        assert numbers.dtype == dtype
        assert ((numbers.double() - exact).abs() <= EPS[dtype] * exact.abs()).all()


@given(
    *(st.integers(0, 1000), st.sampled_from([1, 2, 3, 4, 5, 17, 32, 33]), st.integers(1, 70)),
    *(st.integers(1, 300), st.sampled_from([0, 32, 64, 128]), st.booleans()),
)  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(
    dtype: torch.dtype, seed: int, M: int, O: int, D: int, group: int, biased: bool  # noqa: E741
) -> None:  # fmt: skip
    w = a_weight(seed, O, D, group)
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(M, D, generator=draw).to(dtype)
    bias = torch.randn(O, generator=draw).to(dtype) if biased else None
    numbers, wide = by_the_book(w), x.double()
    exact = wide @ numbers.T + (0 if bias is None else bias.double())
    terms = wide.abs() @ numbers.abs().T + exact.abs()
    found = native.linear(x, w, bias)
    assert found.shape == (M, O)
    assert ((found.double() - exact).abs() <= 2 * EPS[dtype] * terms + 1e-30).all()


def test_packed_and_plain_weights_of_one_call(monkeypatch) -> None:
    monkeypatch.setattr("vidlm.native.calls.SHARE", 1)
    draw = torch.Generator().manual_seed(1)
    for dtype in DTYPES:
        for M in (1, 3, 20):
            x = torch.randn(M, 200, generator=draw).to(dtype)
            dense = torch.randn(70, 200, generator=draw).to(dtype)
            weights = [dense, eight(2, 90, 200), four(3, 40, 200, 32), dense[:5].clone()]
            outs = native.linears(x, weights, [None] * 4)
            for weight, out in zip(weights, outs, strict=True):
                assert torch.equal(native.linear(x, weight), out)  # company changes nothing


@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("M", [1, 3, 4, 30])
def test_threads_change_no_bit(group: int, M: int, monkeypatch) -> None:
    monkeypatch.setattr("vidlm.native.calls.SHARE", 1)
    before = torch.get_num_threads()
    x = torch.randn(M, 256, generator=torch.Generator().manual_seed(2)).bfloat16()
    w = a_weight(4, 500, 256, group)
    try:
        found = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(native.linear(x, w))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_row_does_not_depend_on_the_rows_beside_it_up_to_three() -> None:
    x = torch.randn(3, 320, generator=torch.Generator().manual_seed(3)).bfloat16()
    for w in (eight(5, 130, 320), four(5, 130, 320, 64)):
        together = native.linear(x, w)
        assert all(torch.equal(native.linear(x[i : i + 1], w)[0], together[i]) for i in range(3))


@pytest.mark.parametrize("bias", [None, torch.ones(5)])
def test_no_rows_unpack_nothing(bias: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PackedWeight, "numbers", lambda *_: pytest.fail("it was unpacked"))
    for w in (eight(1, 5, 64), four(1, 5, 64, 32)):
        assert native.linear(torch.empty(0, 64), w, bias).shape == (0, 5)
