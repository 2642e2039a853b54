"""A model's fingerprint: the same for the same numbers, another for any other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vidlm.fingerprint import RUN, fingerprint

SIZES = (1, 7, 4 * RUN, 4 * RUN + 1, 9 * RUN + 5)  # of bfloat16, four of which are a word


class Model(nn.Module):
    """One parameter of some size, another beside it, and a buffer."""

    def __init__(self, size: int = 4 * RUN, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        numbers = torch.randn(size, generator=torch.Generator().manual_seed(0))
        self.weight = nn.Parameter(numbers.to(dtype))
        self.bias = nn.Parameter(torch.zeros(3))
        self.register_buffer("scale", torch.ones(2))


def test_the_same_numbers_elsewhere() -> None:
    one, other = Model(), Model()
    assert fingerprint(one) == fingerprint(other)
    assert len(fingerprint(one)) == 32
    wide = torch.zeros(4 * RUN + 1, dtype=torch.bfloat16)
    wide[1:] = one.weight
    other.weight = nn.Parameter(wide[1:])  # begins in the middle of a word
    assert fingerprint(one) == fingerprint(other)
    other.weight = nn.Parameter(torch.stack((one.weight, one.weight), 1)[:, 0])  # not contiguous
    assert fingerprint(one) == fingerprint(other)


@given(st.sampled_from(SIZES), st.floats(0, 1, exclude_max=True), st.integers(1, 2**16 - 1))
def test_any_single_number_counts(size: int, place: float, flip: int) -> None:
    one, other = Model(size), Model(size)
    with torch.no_grad():
        bits = other.weight.view(torch.int16)
        bits[int(place * size)] ^= flip - 2**16 if flip >= 2**15 else flip
    assert fingerprint(one) != fingerprint(other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.uint8])
def test_any_dtype(dtype: torch.dtype) -> None:
    models = [Model(), Model()]
    for end, model in enumerate(models):
        codes = torch.ones(8 * RUN + 3, dtype=dtype)
        codes[-1] += end
        model.codes = nn.Parameter(codes, requires_grad=False)
    assert fingerprint(models[0]) != fingerprint(models[1])


def test_numbers_that_change_places() -> None:
    one, other = Model(40 * RUN), Model(40 * RUN)
    with torch.no_grad():
        other.weight[0], other.weight[20 * RUN] = one.weight[20 * RUN], one.weight[0]
    assert fingerprint(one) != fingerprint(other)


def buffer(model: Model) -> None:
    model.scale[0] = 2


def name(model: Model) -> None:
    model.shift = model.bias
    del model.bias


def shape(model: Model) -> None:
    model.weight = nn.Parameter(model.weight.detach().view(2, -1))


def dtype(model: Model) -> None:
    model.weight = nn.Parameter(model.weight.detach().view(torch.float16))


def swapped(model: Model) -> None:
    model.bias = nn.Parameter(model.scale.detach())
    model.scale = torch.zeros(3)


@pytest.mark.parametrize("change", [buffer, name, shape, dtype, swapped])
def test_what_else_counts(change: Callable[[Model], None]) -> None:
    model = Model()
    before = fingerprint(model)
    change(model)
    assert fingerprint(model) != before


def test_the_number_of_threads_does_not() -> None:
    model, before = Model(100_000), torch.get_num_threads()
    found = set()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.add(fingerprint(model))
    torch.set_num_threads(before)
    assert len(found) == 1
