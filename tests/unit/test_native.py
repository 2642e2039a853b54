"""Every kernel gives what its plain form gives, and the bits it promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vidlm import native
from vidlm.native import plain

DTYPES = (torch.bfloat16, torch.float32)
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**31)


@pytest.fixture(autouse=True)
def kernels():
    """What is compared with the plain form must not be the plain form; nor train."""
    if not native.status().used:
        pytest.skip(native.status().reason)
    with torch.inference_mode():
        yield


@pytest.fixture
def threads():
    """Sets the number of threads; work of any size is shared by them."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch, threads):
    """As `threads`, and small work is shared, too."""
    monkeypatch.setattr("vidlm.native.calls.SHARE", 1)
    return threads


def draw(seed: int, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def close(found: Tensor, exact: Tensor, terms: Tensor) -> None:
    """Within rounding of `exact`, computed in float64; `terms` is what sums of absolutes are."""
    step = 2**-8 if found.dtype == torch.bfloat16 else 2**-20
    assert found.dtype in DTYPES
    assert found.shape == exact.shape
    error = (found.double() - exact).abs()
    assert (error <= step * terms).all(), (error / terms).max()


# ---- linear layers ---------------------------------------------------------------------------


@given(seeds, dtypes, st.integers(1, 40), st.integers(1, 150), st.integers(1, 100), st.booleans())
def test_linear(seed: int, dtype: torch.dtype, M: int, D: int, O: int, bias: bool) -> None:  # noqa: E741
    x, weight, add = draw(seed, dtype, (M, D), (O, D), (O,))
    given = add if bias else None
    exact = torch.nn.functional.linear(x.double(), weight.double(), add.double() if bias else None)
    terms = torch.nn.functional.linear(x.double().abs(), weight.double().abs(), add.double().abs())
    close(native.linear(x, weight, given), exact, terms)


@given(seeds, dtypes, st.integers(2, 32), st.integers(1, 150), st.integers(1, 100))
def test_rows_do_not_depend_on_each_other(seed: int, dtype, M: int, D: int, O: int) -> None:  # noqa: E741
    x, weight = draw(seed, dtype, (M, D), (O, D))
    alone = torch.cat([native.linear(row[None], weight) for row in x])
    assert torch.equal(native.linear(x, weight), alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 16, 17, 32])
def test_linears_are_linear_on_any_number_of_threads(dtype, M: int, shared) -> None:
    x, one, two, three = draw(M, dtype, (M, 208), (130, 208), (16, 208), (7, 208))
    found = []
    for count in (1, 2, 5):
        shared(count)
        found.append(torch.cat(native.linears(x, [one, two, three], [None] * 3), dim=1))
        each = [native.linear(x, weight) for weight in (one, two, three)]
        assert torch.equal(found[-1], torch.cat(each, dim=1))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [31, 32, 40])
def test_a_row_of_weights_reads_nothing_of_its_neighbours(dtype, D: int) -> None:
    x, weight = draw(0, dtype, (3, D), (21, D))
    weight[4] = torch.nan
    found = native.linear(x, weight)
    assert found[:, 4].isnan().all()
    assert found[:, torch.arange(21) != 4].isfinite().all()


def test_affine_is_linear_bit_for_bit() -> None:
    x, weight, bias = draw(0, torch.bfloat16, (2, 50, 48), (72, 48), (72,))
    assert torch.equal(native.affine(x, weight, bias), torch.nn.functional.linear(x, weight, bias))


# ---- attention of one new token --------------------------------------------------------------


def a_cache(seed: int, dtype, K: int, E: int, block: int, lengths: list[int]):
    """Keys and values in shuffled blocks, with NaN where no token is; tables, lengths."""
    W = max(-(-length // block) for length in lengths) + 1
    N = len(lengths) * W * block
    generator = torch.Generator().manual_seed(seed)
    tables = torch.randperm(len(lengths) * W, generator=generator).int().view(len(lengths), W)
    keys, values = torch.full((2, K, N, E), torch.nan, dtype=dtype)
    for row, length in zip(tables.long(), lengths, strict=True):
        at = torch.arange(length)
        slots = row[at // block] * block + at % block
        keys[:, slots], values[:, slots] = draw(seed + length, dtype, *[(K, length, E)] * 2)
    return keys, values, tables, torch.tensor(lengths, dtype=torch.int32)


@given(
    *(seeds, dtypes, st.integers(1, 3), st.integers(1, 9)),
    *(st.sampled_from([8, 24, 64, 72, 128, 160]), st.integers(1, 40)),
    st.lists(st.integers(1, 600), min_size=1, max_size=3),
)  # fmt: skip
def test_decode_attention(seed: int, dtype, K: int, G: int, E: int, block: int, lengths) -> None:
    cache = a_cache(seed, dtype, K, E, block, lengths)
    (q,) = draw(seed, dtype, (len(lengths), K * G, E))
    keys, values = (x.double() for x in cache[:2])
    exact, terms = (
        plain.decode_attention(q.double(), keys, x, *cache[2:], block)
        for x in (values, values.abs())
    )
    close(native.decode_attention(q, *cache, block), exact, terms)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_attention_does_not_depend_on_company_place_or_threads(dtype, shared) -> None:
    lengths = [700, 1, 257, 256]
    keys, values, tables, counts = a_cache(3, dtype, 2, 80, 16, lengths)
    (q,) = draw(5, dtype, (4, 10, 80))
    shared(1)
    found = native.decode_attention(q, keys, values, tables, counts, 16)
    shared(3)
    assert torch.equal(native.decode_attention(q, keys, values, tables, counts, 16), found)
    for b, length in enumerate(lengths):  # alone, and with its tokens one behind the other
        at = torch.arange(length)
        slots = tables[b].long()[at // 16] * 16 + at % 16
        own = keys[:, slots].contiguous(), values[:, slots].contiguous()
        one = torch.zeros(1, 1, dtype=torch.int32)
        alone = native.decode_attention(q[b : b + 1], *own, one, counts[b : b + 1], length)
        assert torch.equal(alone[0], found[b])


# ---- attention of many tokens ----------------------------------------------------------------


def exact_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    n, S, G = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(G, dim=2) for x in (k, v))
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    seen = torch.ones(n, S, dtype=torch.bool).tril(S - n) if causal else None
    return scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)


def flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    found = native.flash(q, k, v, causal)
    if found is None:
        pytest.skip("no matrix unit for bfloat16")
    return found


@given(
    *(seeds, st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.booleans()),
    *(st.sampled_from([8, 64, 72, 80, 96, 128]), st.integers(1, 90), st.integers(0, 300)),
)  # fmt: skip
def test_flash(seed: int, B: int, K: int, G: int, causal: bool, E: int, n: int, past: int) -> None:
    S = n + past
    q, k, v = draw(seed, torch.bfloat16, (B, n, K * G, E), (B, S, K, E), (B, S, K, E))
    exact, terms = (exact_attention(q, k, x, causal) for x in (v, v.abs()))
    close(flash(q, k, v, causal), exact, 2 * terms)  # weights are rounded as well, powers near


def test_flash_takes_any_strides_and_reads_nothing_else() -> None:
    q, keys, values = draw(1, torch.bfloat16, (1, 20, 4, 72), (2, 64, 72), (2, 64, 72))
    k, v = (x[:, 5:55].transpose(0, 1)[None] for x in (keys, values))
    found = flash(q, k.contiguous(), v.contiguous(), True)
    for x in (keys, values):
        x[:, :5] = x[:, 55:] = torch.nan
    assert torch.equal(flash(q, k, v, True), found)


@pytest.mark.parametrize("E", [64, 72])
@pytest.mark.parametrize(("n", "length", "block"), [(1, 1, 16), (40, 313, 16), (7, 96, 32)])
def test_flash_over_blocks_that_lie_anywhere(E: int, n: int, length: int, block: int) -> None:
    count = -(-length // block)
    table = torch.randperm(count + 3, generator=torch.Generator().manual_seed(n))[:count].int()
    q, k, v = draw(6, torch.bfloat16, (n, 4, E), (length, 2, E), (length, 2, E))
    at = torch.arange(length)
    slots = table.long()[at // block] * block + at % block
    keys, values = (torch.full((2, (count + 3) * block, E), torch.nan).bfloat16() for _ in "kv")
    keys[:, slots], values[:, slots] = k.transpose(0, 1), v.transpose(0, 1)
    expected = flash(q[None], k[None], v[None], True)[0]
    found = native.flash_blocks(q, keys, values, table, length, block)
    assert found is not None
    assert torch.equal(found, expected)
    assert native.flash_blocks(q, keys, values, table.long(), length, block) is None
    assert native.flash_blocks(q, keys, values, table[:-1], length, block) is None


@pytest.mark.parametrize("causal", [True, False])
def test_flash_does_not_depend_on_threads(causal: bool, shared) -> None:
    q, k, v = draw(2, torch.bfloat16, (1, 600, 6, 64), (1, 700, 2, 64), (1, 700, 2, 64))
    shared(1)
    found = flash(q, k, v, causal)
    for count in (2, 5):
        shared(count)
        assert torch.equal(flash(q, k, v, causal), found)


@pytest.mark.parametrize("causal", [True, False])
def test_flash_where_later_keys_weigh_more_than_the_first_can_tell(causal: bool) -> None:
    """Scores are taken relative to the first keys' largest: here e^x of what follows overflows."""
    q, k, v = draw(3, torch.bfloat16, (1, 200, 4, 64), (1, 300, 2, 64), (1, 300, 2, 64))
    q *= 6
    k[:, 150:] *= 30
    exact, terms = (exact_attention(q, k, x, causal) for x in (v, v.abs()))
    found = flash(q, k, v, causal)
    close(found, exact, 2 * terms)
    q[:, ::2] *= 2**-10  # every other query is content with the first keys, and the rest stay
    assert torch.equal(flash(q, k, v, causal)[:, 1::2], found[:, 1::2])


def test_flash_says_nothing_of_numbers_that_are_none() -> None:
    q, k, v = draw(4, torch.bfloat16, (1, 40, 1, 64), (1, 40, 1, 64), (1, 40, 1, 64))
    q[0, 7] = torch.nan
    found = flash(q, k, v, True)
    assert found[0, 7].isnan().all()
    assert found[0, :7].isfinite().all()
    assert found[0, 8:].isfinite().all()


def test_flash_leaves_float32_to_others() -> None:
    q, k, v = draw(2, torch.float32, *[(1, 4, 2, 64)] * 3)
    assert native.flash(q, k, v, True) is None


# ---- rows ------------------------------------------------------------------------------------


@given(seeds, dtypes, st.integers(1, 9), st.integers(1, 4), st.integers(1, 70).map(lambda n: 2 * n))
def test_rotate_and_store(seed: int, dtype, T: int, K: int, E: int) -> None:
    q, k, v, cos, sin = draw(seed, dtype, (T, 2 * K, E), (T, K, E), (T, K, E), (T, E), (T, E))
    slots = torch.randperm(T + 5, generator=torch.Generator().manual_seed(seed))[:T]
    wanted, found, fused = (torch.zeros(2, K, T + 5, E, dtype=dtype) for _ in range(3))
    turned = native.rotate(k, cos, sin)
    same(turned, plain.rotate(k, cos, sin))
    native.store(turned, v, *found, slots)
    plain.store(turned, v, *wanted, slots)
    assert torch.equal(found, wanted)
    rotated = native.rotate_store(q, k, v, (cos, sin), tuple(fused), slots)
    assert torch.equal(rotated, native.rotate(q, cos, sin))
    assert torch.equal(fused, wanted)


def same(found: Tensor, wanted: Tensor) -> None:
    """Equal in bfloat16, where all is rounded as in the plain form; nearly so in float32, whose
    products may be added before they are rounded."""
    if found.dtype == torch.bfloat16:
        assert torch.equal(found, wanted)
    else:
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@given(seeds, dtypes, st.integers(1, 9), st.integers(1, 200))
def test_norms(seed: int, dtype, M: int, D: int) -> None:
    x, delta, weight = draw(seed, dtype, (M, D), (M, D), (D,))
    # the sum of squares in another order may round to the other neighbour
    tolerance = {torch.bfloat16: 2**-7, torch.float32: 1e-5}[dtype]
    found = native.rms_norm(x, weight, 1e-6)
    torch.testing.assert_close(found, plain.rms_norm(x, weight, 1e-6), rtol=tolerance, atol=1e-6)
    both, normed = native.add_rms_norm(x, delta, weight, 1e-6)
    assert torch.equal(both, x + delta)
    assert torch.equal(normed, native.rms_norm(both, weight, 1e-6))


ACTIVATIONS = [
    (native.gelu_tanh, plain.gelu_tanh),
    (native.quick_gelu, plain.quick_gelu),
    (lambda x: native.silu_mul(x, x), lambda x: plain.silu_mul(x, x)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("ours", "theirs"), ACTIVATIONS)
def test_activations(dtype, ours, theirs) -> None:
    x = torch.cat([torch.linspace(-120, 120, 40_007), torch.linspace(-9, 9, 40_000)]).to(dtype)
    tolerance = {torch.bfloat16: 2**-7, torch.float32: 2e-6}[dtype]
    torch.testing.assert_close(ours(x), theirs(x), rtol=tolerance, atol=1e-5)
    assert ours(torch.tensor([torch.nan, 1.0], dtype=dtype)).isnan().tolist() == [True, False]


@pytest.mark.parametrize("act", [ours for ours, _ in ACTIVATIONS])
def test_what_is_looked_up_is_what_is_computed(act) -> None:
    x = torch.arange(2**16).to(torch.uint16).view(torch.bfloat16)  # every number there is
    looked_up, computed = act(x), torch.cat([act(part) for part in x.split(1000)])
    assert torch.equal(looked_up.view(torch.int16), computed.view(torch.int16))


@pytest.mark.parametrize("act", [native.gelu_tanh, native.quick_gelu])
def test_activations_in_place(act) -> None:
    (x,) = draw(0, torch.bfloat16, (3, 37))
    kept, wanted = x.clone(), act(x)
    assert torch.equal(x, kept)
    assert act(x, inplace=True) is x
    assert torch.equal(x, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_threads_or_company(dtype, shared) -> None:
    x, weight = draw(0, dtype, (1000, 70), (70,))  # enough to look activations up
    each = (
        lambda x: native.rms_norm(x, weight, 1e-6),
        native.gelu_tanh,
        native.quick_gelu,
        lambda x: native.silu_mul(x, x),
    )
    for kernel in each:
        shared(1)
        alone = torch.cat([kernel(row[None]) for row in x[:20]])
        for count in (1, 3):
            shared(count)
            assert torch.equal(kernel(x)[:20], alone)


# ---- what kernels leave to the plain form ----------------------------------------------------


def test_gradients_go_through_the_plain_form() -> None:
    with torch.inference_mode(False), torch.enable_grad():
        x, weight = draw(0, torch.float32, (2, 8), (4, 8))
        weight.requires_grad_()
        native.linear(x, weight).sum().backward()
        assert torch.allclose(weight.grad, x.sum(0).expand(4, 8))


def test_autocast_decides_the_type() -> None:
    x, weight = draw(0, torch.float32, (2, 8), (4, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert native.linear(x, weight).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_types_and_strides(dtype: torch.dtype) -> None:
    x, weight = draw(0, dtype, (2, 8), (4, 8))
    assert torch.equal(native.linear(x, weight), torch.nn.functional.linear(x, weight))
    wide, weight = draw(0, torch.float32, (2, 16), (4, 8))
    x = wide[:, ::2]
    assert torch.equal(native.linear(x, weight), torch.nn.functional.linear(x, weight))


def test_mistakes_are_torchs_to_name() -> None:
    x, weight = draw(0, torch.float32, (2, 8), (4, 9))
    with pytest.raises(RuntimeError, match="shapes"):
        native.linear(x, weight)
