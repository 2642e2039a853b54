"""Kernels are given slots, tables, lengths, shapes and tensors that do not fit: each raises, as its
plain form does, or leaves the tensors to it. None reads or writes outside a buffer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vidlm import native
from vidlm.errors import InvalidArgument
from vidlm.native import Coded, PackedWeight, Places, StackLayer, StackShape, StackTable
from vidlm.native.plain import coded

K, H, E, N, BLOCK, D, I, LAYERS = 2, 4, 8, 64, 8, 32, 48, 2  # noqa: E741
KINDS = ("float32", "bfloat16", "int8")
FAR = 2**31 - 1


@pytest.fixture(params=["kernels", "plain"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Both paths answer alike."""
    if request.param == "plain":
        for module in ("calls", "ops", "packed"):
            monkeypatch.setattr(f"vidlm.native.{module}.library", lambda: None)
    elif not native.status().used:
        pytest.skip(native.status().reason)
    with torch.inference_mode():
        yield request.param


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def caches(kind: str) -> tuple[Any, Any]:
    made = [numbers(K, N, E), numbers(K, N, E) + 1]
    if kind == "int8":
        return coded(made[0]), coded(made[1])
    return tuple(x.to(getattr(torch, kind)) for x in made)


def dtype_of(kind: str) -> torch.dtype:
    return torch.bfloat16 if kind == "bfloat16" else torch.float32


def int32(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


# ---- attention of one new token ----------------------------------------------------------------

TABLES = int32([0, 3, 1], [7, 2, 5])
LENGTHS = int32(20, 24)
OUTSIDE = {
    "a block behind the end": (int32([0, 3, 1], [7, 8, 5]), LENGTHS),
    "a block far behind it": (int32([0, 3, FAR], [7, 2, 5]), LENGTHS),
    "a block before the beginning": (int32([-1, 3, 1], [7, 2, 5]), LENGTHS),
    "a length of nothing": (TABLES, int32(20, 0)),
    "a length below nothing": (TABLES, int32(-3, 24)),
    "more tokens than blocks": (TABLES, int32(20, 25)),
    "many more": (TABLES, int32(FAR, 24)),
    "no blocks": (torch.zeros(2, 0, dtype=torch.int32), LENGTHS),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", OUTSIDE)
def test_decode_attention_outside_the_cache(kind: str, bad: str) -> None:
    q = numbers(2, H, E, dtype=dtype_of(kind))
    with pytest.raises(IndexError):
        native.decode_attention(q, *caches(kind), *OUTSIDE[bad], BLOCK)


@pytest.mark.parametrize("kind", KINDS)
def test_what_no_sequence_uses_may_be_anything(kind: str) -> None:
    q, cache = numbers(2, H, E, dtype=dtype_of(kind)), caches(kind)
    right = native.decode_attention(q, *cache, TABLES, int32(8, 24), BLOCK)
    tables = int32([0, FAR, -5], [7, 2, 5])
    assert torch.equal(native.decode_attention(q, *cache, tables, int32(8, 24), BLOCK), right)


def test_a_last_block_may_end_with_the_cache() -> None:
    """Where the buffer is no multiple of the block, its last tokens are there all the same."""
    q, (keys, values) = numbers(1, H, E), caches("float32")
    cut = keys[:, :60].contiguous(), values[:, :60].contiguous()
    whole = native.decode_attention(q, keys, values, int32([6, 7]), int32(12), BLOCK)
    assert torch.equal(native.decode_attention(q, *cut, int32([6, 7]), int32(12), BLOCK), whole)
    with pytest.raises(IndexError):
        native.decode_attention(q, *cut, int32([6, 7]), int32(13), BLOCK)


def test_decode_attention_of_shapes_that_do_not_fit() -> None:
    q, (keys, values) = numbers(2, H, E), caches("float32")
    for bad in (
        (q[:1], keys, values, TABLES, LENGTHS, BLOCK),
        (q[:, :3], keys, values, TABLES, LENGTHS, BLOCK),
        (q[..., :4], keys, values, TABLES, LENGTHS, BLOCK),
        (q[0], keys, values, TABLES, LENGTHS, BLOCK),
        (q, keys, values[:1], TABLES, LENGTHS, BLOCK),
        (q, keys, values[:, :9], TABLES, LENGTHS, BLOCK),
        (q, keys[0], values[0], TABLES, LENGTHS, BLOCK),
        (q, keys[:0], values[:0], TABLES, LENGTHS, BLOCK),
        (q, keys, values, TABLES[:1], LENGTHS, BLOCK),
        (q, keys, values, TABLES[0], LENGTHS, BLOCK),
        (q, keys, values, TABLES, LENGTHS[:1], BLOCK),
        (q, keys, values, TABLES, LENGTHS, 0),
        (q, keys, values, TABLES, LENGTHS, -8),
    ):
        with pytest.raises(InvalidArgument, match="allowed"):
            native.decode_attention(*bad)


@pytest.mark.parametrize("change", [Tensor.long, lambda x: x.t().contiguous().t()])
def test_other_integers_and_strides_of_tables(change: Callable[[Tensor], Tensor]) -> None:
    q, cache = numbers(2, H, E), caches("float32")
    right = native.decode_attention(q, *cache, TABLES, LENGTHS, BLOCK)
    found = native.decode_attention(q, *cache, change(TABLES), LENGTHS.long(), BLOCK)
    torch.testing.assert_close(found, right)


# ---- slots -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slot", [N, N + 1, -1 - N, 2**40, -(2**62)])
def test_slots_outside_the_cache(kind: str, slot: int) -> None:
    dtype = dtype_of(kind)
    q, k, v = numbers(3, H, E, dtype=dtype), *numbers(2, 3, K, E, dtype=dtype)
    rope, slots = numbers(2, 3, E, dtype=dtype), torch.tensor([1, slot, 2])
    keys, values = caches(kind)
    with pytest.raises((IndexError, RuntimeError)):
        native.store(k, v, keys, values, slots)
    with pytest.raises((IndexError, RuntimeError)):
        native.rotate_store(q, k, v, (rope[0], rope[1]), (keys, values), slots)
    with pytest.raises(IndexError):
        native.numbers(keys, slots, dtype)


def test_kernels_store_nothing_where_a_slot_is_outside(path: str) -> None:
    if path == "plain":
        return  # torch stores the rows before the wrong one
    for kind in KINDS:
        cache, before = caches(kind), caches(kind)
        k, v = numbers(2, 3, K, E, dtype=dtype_of(kind))
        with pytest.raises(IndexError, match="slot of 64 is out of bounds"):
            native.store(k, v, *cache, torch.tensor([1, 2, -1]))
        for now, then in zip(cache, before, strict=True):
            pairs = zip(native.tensors_of(now), native.tensors_of(then), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)


def test_heads_of_other_widths() -> None:
    q, k, v = numbers(3, H, E), numbers(3, K, E // 2), numbers(3, K, E // 2)
    rope, slots = numbers(2, 3, E), torch.tensor([1, 3, 2])
    narrow = numbers(2, K, N, E // 2)
    for cache in ((narrow[0], narrow[1]), tuple(coded(x) for x in narrow)):
        with pytest.raises(RuntimeError):
            native.rotate_store(q, k, v, (rope[0], rope[1]), cache, slots)


@pytest.mark.parametrize(
    "room",
    [
        torch.empty(K, 4, E, dtype=torch.float32),
        torch.empty(K, 3, E, dtype=torch.bfloat16),
        torch.empty(K, 3, E, dtype=torch.float32, device="meta"),
        torch.empty(E, 3, K, dtype=torch.float32).transpose(0, 2),
    ],
)
def test_a_buffer_that_does_not_fit(room: Tensor, path: str) -> None:
    if path == "plain":
        return  # takes no buffer
    with pytest.raises(InvalidArgument, match="room of shape"):
        native.numbers(caches("int8")[0], torch.tensor([0, 1, 2]), torch.float32, room)


def test_slots_with_two_axes() -> None:
    keys, slots = caches("int8")[0], torch.tensor([[1, 2], [3, 63]])
    found = native.numbers(keys, slots, torch.float32)
    assert torch.equal(found.flatten(1, 2), native.numbers(keys, slots.flatten(), torch.float32))


def test_scales_that_do_not_belong_to_their_codes() -> None:
    sound = caches("int8")[0]
    for broken in (
        Coded(sound.codes, sound.scales[:, :9]),
        Coded(sound.codes, sound.scales.half()),
    ):
        assert not broken.readable


# ---- a whole stack -----------------------------------------------------------------------------

SHAPE = StackShape(I, H, K, E, 1e-6)


def layer() -> StackLayer:
    qkv = [numbers(H * E, D), numbers(K * E, D), numbers(K * E, D)]
    return StackLayer(
        numbers(D), qkv, [numbers(H * E), None, None], numbers(D, H * E), numbers(D),
        (numbers(I, D), numbers(I, D)), numbers(D, I),
    )  # fmt: skip


def run(table: StackTable | None, places: Places, count: int = LAYERS) -> Tensor | None:
    assert table is not None
    x, rope = numbers(2, D), numbers(2, 2, E)
    pairs = [caches("float32") for _ in range(count)]
    return native.stack(x, table, pairs, (rope[0], rope[1]), places, SHAPE)


SOUND = Places(TABLES, LENGTHS, torch.tensor([1, 3]), BLOCK)


@pytest.fixture
def table(path: str) -> StackTable:
    made = StackTable.of([layer() for _ in range(LAYERS)], numbers(D), numbers(2, D))
    if path == "plain":
        assert made is None
        pytest.skip("a stack has no plain form but its layers")
    assert made is not None
    return made


@pytest.mark.parametrize("bad", OUTSIDE)
def test_a_stack_outside_its_caches(bad: str, table: StackTable) -> None:
    tables, lengths = OUTSIDE[bad]
    with pytest.raises(IndexError):
        run(table, replace(SOUND, tables=tables, lengths=lengths))
    assert run(table, SOUND) is not None


@pytest.mark.parametrize("slot", [N, -1, 2**62])
def test_a_stack_that_stores_outside_its_caches(slot: int, table: StackTable) -> None:
    with pytest.raises(IndexError):
        run(table, replace(SOUND, slots=torch.tensor([1, slot])))


def test_a_stack_leaves_what_does_not_fit_to_its_layers(table: StackTable) -> None:
    assert run(table, SOUND, LAYERS - 1) is None
    assert run(table, SOUND, 0) is None
    for change in (
        {"block": 0},
        {"tables": TABLES.long()},
        {"tables": TABLES[:1]},
        {"tables": TABLES[0]},
        {"lengths": LENGTHS.long()},
        {"lengths": LENGTHS[:1]},
        {"slots": torch.tensor([1])},
        {"slots": int32(1, 3)},
        {"slots": torch.tensor([1, 3], device="meta")},
    ):
        assert run(table, replace(SOUND, **change)) is None
    x, rope, caches_ = numbers(2, D), numbers(2, 2, E), [caches("float32")] * LAYERS
    for shape in (replace(SHAPE, hidden=2 * I), replace(SHAPE, heads=2 * H)):
        assert native.stack(x, table, caches_, (rope[0], rope[1]), SOUND, shape) is None
    assert native.stack(x, table, caches_, (rope[0], rope[1, :1]), SOUND, SHAPE) is None
    short = [caches_[0], (caches_[0][0], numbers(K, N // 2, E))]
    assert native.stack(x, table, short, (rope[0], rope[1]), SOUND, SHAPE) is None


def test_a_stack_of_weights_that_do_not_fit(path: str) -> None:
    for change in (
        {"o": numbers(D, H * E // 2)},
        {"down": numbers(D, I - 1)},
        {"norm": numbers(D - 1)},
        {"biases": [numbers(E), None, None]},
        {"gate_up": (numbers(I, D), numbers(I - 8, D))},
    ):
        layers = [layer(), replace(layer(), **change)]
        assert StackTable.of(layers, numbers(D), numbers(2, D)) is None
    assert StackTable.of([layer()], numbers(D + 1), numbers(2, D)) is None


# ---- weights -----------------------------------------------------------------------------------


def test_packed_weights_of_other_shapes_and_dtypes() -> None:
    codes, scale = torch.zeros(4, 70, dtype=torch.int8), torch.ones(4)
    four = torch.zeros(4, 64, dtype=torch.uint8), torch.ones(4, 3), torch.zeros(16), 32
    PackedWeight(70, codes, scale)
    PackedWeight(70, *four)
    for bad in (
        (71, codes, scale),
        (70, codes.to(torch.uint8), scale),
        (70, codes.bool(), scale),
        (70, codes, scale.bfloat16()),
        (70, codes, scale[:3]),
        (70, codes, scale[:, None]),
        (129, *four),
        (70, four[0][:3], *four[1:]),
        (70, four[0], four[1][:, :2], *four[2:]),
        (70, four[0], four[1].double(), *four[2:]),
        (70, *four[:2], four[2][:15], 32),
        (70, *four[:2], four[2].bfloat16(), 32),
        (70, *four[:3], 0),
        (70, *four[:3], 40),
    ):
        with pytest.raises(InvalidArgument, match="not a packed weight"):
            PackedWeight(*bad)


def test_rows_packed_outside_their_weight() -> None:
    into = PackedWeight(70, torch.zeros(4, 70, dtype=torch.int8), torch.ones(4))
    for start, rows in ((3, numbers(2, 70)), (-1, numbers(1, 70)), (0, numbers(1, 71))):
        with pytest.raises(InvalidArgument, match="rows"):
            native.pack_rows(into, start, rows)


class Elsewhere(Tensor):
    """A tensor whose numbers are not where its data_ptr() says, as libraries of quantization and
    of distributed training have them."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Any:
        made = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]
        made.held = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inner = torch.utils._pytree.tree_map(lambda x: getattr(x, "held", x), args)
        out = func(*inner, **(kwargs or {}))
        return cls(out) if "detach" in str(func) else out


def test_a_tensor_whose_numbers_are_elsewhere_is_left_to_it() -> None:
    weight = numbers(5, 8)
    x, held = numbers(2, 8), nn.Parameter(Elsewhere(weight), requires_grad=False)
    assert held.data_ptr() == 0
    assert torch.equal(native.linear(x, held), nn.functional.linear(x, weight))
    norm = nn.Parameter(Elsewhere(weight[0]), requires_grad=False)
    assert torch.equal(native.rms_norm(x, norm, 1e-6), native.rms_norm(x, weight[0], 1e-6))


def test_affine_of_shapes_that_do_not_fit() -> None:
    x = numbers(50, 8, dtype=torch.bfloat16)
    for weight, bias in ((numbers(4, 9), numbers(4)), (numbers(4, 8), numbers(5))):
        with pytest.raises(RuntimeError, match=r"shape|size|must match"):
            native.affine(x, weight.bfloat16(), bias.bfloat16())


def test_flash_over_blocks_that_are_not_there() -> None:
    q, block = numbers(3, H, E, dtype=torch.bfloat16), 16
    keys, values = (x.bfloat16() for x in numbers(2, K, N, E))
    for table, length in (
        (int32(0, 4), 20),
        (int32(-1, 1), 20),
        (int32(0, 1), 40),
        (int32(0, 1), 0),
        (int32([0, 1]), 20),
    ):
        assert native.flash_blocks(q, keys, values, table, length, block) is None
    assert native.flash_blocks(q, keys, values, int32(0, 1), 20, 0) is None
