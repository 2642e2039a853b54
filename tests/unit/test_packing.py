"""Weights into 8 and 4 bits: the kernel writes what plain torch does, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vidlm import native
from vidlm.native import PackedWeight
from vidlm.nn.packed import PackedLinear, Packing
from vidlm.quant.packing import pack, pack_rows, packings, room

DTYPES = [torch.float32, torch.bfloat16]
KINDS = ["int8", "int4", "nf4", "fp4"]
NAN, INF = float("nan"), float("inf")
AWKWARD = (0.0, -0.0, 1.0, -1.0, 0.5, -7.5, 3e38, -3e38, 1e-39, -1e-39, 1e-45, -4.2e-43)


@pytest.fixture(autouse=True)
def _kernels() -> None:
    if not native.status().used:
        pytest.skip(native.status().reason)


def plain(weight: Tensor, packing: Packing) -> PackedLinear:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vidlm.native.packing.kernels", lambda x: None)
        return pack(weight, packing)


def by_the_kernel(weight: Tensor, packing: Packing) -> PackedLinear:
    made = room(weight.shape, packing, weight.device)
    made.codes.fill_(0x55)  # every byte is written
    assert native.pack_rows(made.packed, 0, weight)
    return made


def assert_same(a: PackedLinear, b: PackedLinear) -> None:
    """Zeros differ by their sign, and NaN is NaN, whatever its bits."""
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.scale.isnan(), b.scale.isnan())
    number = ~a.scale.isnan()
    assert torch.equal(a.scale[number], b.scale[number])
    assert torch.equal(a.scale[number].signbit(), b.scale[number].signbit())


def drawn(seed: int, O: int, D: int, dtype: torch.dtype) -> Tensor:  # noqa: E741
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(O, D, generator=draw).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("D", [1, 16, 31, 32, 33, 64, 95, 96, 97, 128, 4304])
def test_normal_weights(D: int, kind: str, dtype: torch.dtype) -> None:
    weight, packing = drawn(D, 9, D, dtype), packings()[kind]
    assert_same(by_the_kernel(weight, packing), plain(weight, packing))


@pytest.mark.parametrize("group", [32, 64, 96, 128, 1024])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_groups(kind: str, group: int) -> None:
    for D in (group - 1, group, group + 1, 2 * group + 40):
        weight, packing = drawn(D, 5, D, torch.bfloat16), packings(group)[kind]
        assert_same(by_the_kernel(weight, packing), plain(weight, packing))


tables = st.lists(st.floats(-9, 9, width=32), min_size=16, max_size=16).filter(
    lambda values: any(values)
)


@given(
    st.integers(0, 1000),
    st.integers(1, 6),
    st.integers(1, 200),
    st.sampled_from([0, 32, 64, 96]),
    tables,
    st.sampled_from(DTYPES),
    st.lists(st.sampled_from(AWKWARD) | st.floats(width=32), max_size=20),
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_weights(dtype, seed, O, D, group, table, scales, put) -> None:  # noqa: E741
    """Few values, so that several are the largest; some of them are what is put in."""
    packing = Packing(tuple(sorted(table)), group, scales) if group else Packing()
    weight = (drawn(seed, O, D, dtype) * 2).round() / 4
    at = torch.randint(0, O * D, (len(put),), generator=torch.Generator().manual_seed(seed))
    weight.view(-1)[at] = torch.tensor(put, dtype=torch.float32).to(dtype)
    assert_same(by_the_kernel(weight, packing), plain(weight, packing))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", AWKWARD)
def test_a_row_of_one_value(value: float, kind: str, dtype: torch.dtype) -> None:
    weight, packing = torch.full((2, 70), value).to(dtype), packings()[kind]
    weight[1, 1::2] *= -1  # the first of the largest tells the sign
    assert_same(by_the_kernel(weight, packing), plain(weight, packing))


@pytest.mark.parametrize("dtype", DTYPES)
def test_halfway_numbers(dtype: torch.dtype) -> None:
    """Eight bits to the even code; four bits to the lower place in the table."""
    halves = torch.arange(-127, 128).to(dtype)[None] / 2
    halves = torch.cat((halves, torch.full((1, 255), 127.0).to(dtype)), 1)  # scale 1
    made = by_the_kernel(halves, packings()["int8"])
    assert float(made.scale) == 1
    assert torch.equal(made.codes[:, :255].float(), halves[:, :255].float().round())
    numbers = torch.arange(-16, 16).to(dtype)[None] / 2  # -8 to 7.5
    made = by_the_kernel(numbers, packings()["int4"])
    assert float(made.scale) == 1
    places = torch.cat((made.codes & 15, made.codes >> 4), 1)[0, :32].float() - 8
    assert torch.equal(places, (numbers[0].float() - 0.5).ceil().clamp(-8, 7))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [NAN, -NAN, INF, -INF])
def test_what_is_no_number(value: float, kind: str, dtype: torch.dtype) -> None:
    """Its row or group stands for nothing of use, and no other does."""
    weight, packing = drawn(1, 3, 192, dtype), packings()[kind]
    clean = by_the_kernel(weight, packing).packed.numbers(torch.float32)
    weight[1, 70] = value
    made = by_the_kernel(weight, packing)
    assert_same(made, plain(weight, packing))
    kept = made.packed.numbers(torch.float32)
    assert not kept[1, 64:96].isfinite().any()
    assert torch.equal(kept[::2], clean[::2])
    if kind != "int8":
        assert torch.equal(kept[1, :64], clean[1, :64])


def test_codes_of_hardly_anything_do_not_wrap() -> None:
    """Over a scale that is rounded to a multiple of 1.4e-45, the largest number is above 127."""
    weight, packing = torch.tensor([[150 * 2.0**-149, -150 * 2.0**-149]]), packings()["int8"]
    for made in (by_the_kernel(weight, packing), plain(weight, packing)):
        assert made.codes.tolist() == [[127, -127]]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_come_in_pieces(kind: str) -> None:
    weight, packing = drawn(3, 11, 100, torch.bfloat16), packings()[kind]
    whole = pack(weight, packing)
    made = room(weight.shape, packing, weight.device)
    for start, piece in zip((0, 3, 8), weight.split([3, 5, 3]), strict=True):
        pack_rows(made.packed, start, piece)
    assert_same(made, whole)
    before = made.codes.clone()
    pack_rows(made.packed, 4, weight[4:6].flip(1))
    assert torch.equal(made.codes[:4], before[:4])
    assert torch.equal(made.codes[6:], before[6:])
    assert not torch.equal(made.codes[4:6], before[4:6])


@pytest.mark.parametrize("kind", KINDS)
def test_threads_change_no_bit(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vidlm.native.calls.SHARE", 1)
    weight, packing = drawn(4, 301, 130, torch.float32), packings()[kind]
    before = torch.get_num_threads()
    try:
        made = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            made.append(by_the_kernel(weight, packing))
    finally:
        torch.set_num_threads(before)
    assert_same(made[0], made[1])
    assert_same(made[0], made[2])


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_kernel_leaves_to_torch(kind: str) -> None:
    packing = packings()[kind]
    weight = drawn(5, 40, 66, torch.float32)
    for other in (weight.half(), weight.double(), weight.t().contiguous().t(), weight[:0]):
        made = room(other.shape, packing, other.device)
        assert not native.pack_rows(made.packed, 0, other)
        assert_same(pack(other, packing), plain(other.float(), packing))
    wide = PackedWeight(
        66,
        torch.empty(40, 70, dtype=torch.int8)[:, :66],  # rows with gaps
        torch.empty(40),
    )
    assert not native.pack_rows(wide, 0, weight)
    pack_rows(wide, 0, weight)
    assert torch.equal(wide.codes, pack(weight, packings()["int8"]).codes)


def test_a_parameter_that_is_trained_is_packed_as_it_is() -> None:
    weight = torch.nn.Parameter(drawn(6, 7, 64, torch.float32))
    for kind in KINDS:
        assert_same(pack(weight, packings()[kind]), plain(weight.data, packings()[kind]))
