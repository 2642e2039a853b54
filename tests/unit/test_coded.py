"""Keys and values in eight bits: by the kernels, in their plain form, and under a decoder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paging import Paged
from vidlm import native
from vidlm.native import Coded, plain
from vidlm.nn.decoder import Decoder, DecoderConfig
from vidlm.nn.stack import Stack
from vidlm.nn.step import packed

CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float32)
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**31)
needs_kernels = pytest.mark.skipif(
    not native.status().used, reason=f"no kernels here: {native.status().reason}"
)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch):
    """Sets the number of threads; work of any size is shared by them."""
    monkeypatch.setattr("vidlm.native.calls.SHARE", 1)
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def draw(seed: int, dtype: torch.dtype, *shape: int) -> Tensor:
    """Rows of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randn(shape[:-1], generator=generator).mul(3).exp()[..., None]
    return (torch.randn(shape, generator=generator) * sizes).to(dtype)


def empty(K: int, N: int, E: int) -> Coded:
    """A cache that nothing was written to, and whose scales would be noticed."""
    made = Coded.empty((K, N, E), CPU)
    made.codes.fill_(99)
    made.scales.fill_(torch.nan)
    return made


def pair(K: int, N: int, E: int) -> tuple[Coded, Coded]:
    return empty(K, N, E), empty(K, N, E)


def equal(found: Coded, wanted: Coded) -> bool:
    scales = torch.allclose(found.scales, wanted.scales, rtol=0, atol=0, equal_nan=True)
    return scales and torch.equal(found.codes, wanted.codes)


# ---- storing -------------------------------------------------------------------------------------


@given(seeds, dtypes, st.integers(1, 60))
def test_no_number_is_off_by_more_than_half_a_step(seed: int, dtype, E: int) -> None:
    x = draw(seed, dtype, 3, 7, E)
    found = plain.coded(x)
    most = x.abs().amax(-1).float()
    torch.testing.assert_close(found.scales * 127, most)
    assert torch.equal(found.codes.abs().amax(-1), torch.full((3, 7), 127, dtype=torch.int8))
    error = (plain.numbers(found, slice(None), torch.float32) - x.float()).abs()
    assert (error <= 0.50001 * found.scales[..., None]).all()


@needs_kernels
@given(seeds, dtypes, st.integers(1, 9), st.integers(1, 4), st.integers(1, 150))
def test_kernels_store_and_read_the_same_bits(seed: int, dtype, T: int, K: int, E: int) -> None:
    k, v = draw(seed, dtype, T, K, E), draw(seed + 1, dtype, T, K, E)
    slots = torch.randperm(T + 5, generator=torch.Generator().manual_seed(seed))[:T]
    found, wanted = pair(K, T + 5, E), pair(K, T + 5, E)
    native.store(k, v, *found, slots)
    plain.store(k, v, *wanted, slots)
    for ours, theirs in zip(found, wanted, strict=True):
        assert equal(ours, theirs)
        for where in (slots, slice(0, T + 5), slice(2, 4), slots[:0]):
            read = native.numbers(ours, where, dtype)
            kept = plain.numbers(theirs, where, dtype)
            assert torch.equal(read.isnan(), kept.isnan())
            assert torch.equal(read.nan_to_num(), kept.nan_to_num())


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_at_the_ends(dtype: torch.dtype) -> None:
    """Zeros stay, tiny ones may become zeros; what is no number makes its own row none, seen."""
    x = torch.ones(6, 1, 40, dtype=dtype)
    x[1] = 0
    x[2] = 1e-37
    x[3, 0, :2] = torch.tensor([-3e38, 1e38])
    x[4, 0, 7] = torch.nan
    x[5, 0, 7] = -torch.inf
    found, wanted, slots = pair(1, 6, 40), pair(1, 6, 40), torch.arange(6)
    native.store(x, x, *found, slots)
    plain.store(x, x, *wanted, slots)
    for ours, theirs in zip(found, wanted, strict=True):
        assert equal(ours, theirs)
    read = native.numbers(found[0], slice(None), torch.float32)[0]
    assert torch.equal(read[:2], x[:2, 0].float())
    assert (read[2].abs() <= 1e-30).all()
    torch.testing.assert_close(read[3, :2], x[3, 0, :2].float(), rtol=0.02, atol=0)
    assert read[4:].isnan().all()


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotated_and_stored_at_once(dtype: torch.dtype) -> None:
    q, k, v = (draw(i, dtype, 9, 2, 64) for i in range(3))
    cos, sin = (draw(i, dtype, 9, 64) for i in (3, 4))
    slots = torch.arange(9).flip(0).contiguous()
    fused, apart = pair(2, 12, 64), pair(2, 12, 64)
    turned = native.rotate_store(q, k, v, (cos, sin), fused, slots)
    native.store(native.rotate(k, cos, sin), v, *apart, slots)
    assert torch.equal(turned, native.rotate(q, cos, sin))
    for ours, theirs in zip(fused, apart, strict=True):
        assert equal(ours, theirs)


def test_rows_wider_than_the_kernels_know() -> None:
    x = draw(0, torch.float32, 3, 1, 600)
    found, slots = pair(1, 4, 600), torch.arange(3)
    native.store(x, x, *found, slots)
    read = native.numbers(found[0], slice(0, 3), torch.float32)
    torch.testing.assert_close(read[0], x[:, 0], rtol=0, atol=float(x.abs().max()) / 250)


# ---- attention of one new token --------------------------------------------------------------


def a_cache(seed: int, dtype: torch.dtype, shape: tuple[int, int], block: int, lengths: list[int]):
    """Keys and values in shuffled blocks, with NaN where no token is; tables, lengths."""
    K, E = shape
    W = max(-(-length // block) for length in lengths) + 1
    generator = torch.Generator().manual_seed(seed)
    tables = torch.randperm(len(lengths) * W, generator=generator).int().view(len(lengths), W)
    keys, values = pair(K, len(lengths) * W * block, E)
    for row, length in zip(tables.long(), lengths, strict=True):
        at = torch.arange(length)
        k, v = torch.randn(2, length, K, E, generator=generator).to(dtype)
        native.store(k, v, keys, values, row[at // block] * block + at % block)
    return keys, values, tables, torch.tensor(lengths, dtype=torch.int32)


@needs_kernels
@given(
    *(seeds, dtypes, st.integers(1, 3), st.integers(1, 9)),
    *(st.sampled_from([8, 24, 64, 72, 80, 128, 160]), st.integers(1, 40)),
    st.lists(st.integers(1, 600), min_size=1, max_size=3),
)  # fmt: skip
def test_decode_attention(seed: int, dtype, K: int, G: int, E: int, block: int, lengths) -> None:
    """Scores and weighted values are those of the numbers that codes stand for."""
    keys, values, *places = a_cache(seed, dtype, (K, E), block, lengths)
    q = torch.randn(len(lengths), K * G, E, generator=torch.Generator().manual_seed(seed)).to(dtype)
    k, v = (x.codes.double() * x.scales.double()[..., None] for x in (keys, values))
    exact, terms = (plain.decode_attention(q.double(), k, x, *places, block) for x in (v, v.abs()))
    found = native.decode_attention(q, keys, values, *places, block)
    step = 2**-8 if dtype == torch.bfloat16 else 2**-20
    assert found.dtype == dtype
    assert ((found.double() - exact).abs() <= step * terms).all()
    simple = plain.decode_attention(q, keys, values, *places, block)
    assert ((simple.double() - exact).abs() <= 8 * step * terms).all()
    at_once = plain._all_at_once(q, keys, values, *places, block)
    torch.testing.assert_close(at_once, simple, rtol=4 * step, atol=8 * step)


@needs_kernels
@pytest.mark.parametrize("E", [64, 72])
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_attention_does_not_depend_on_company_place_or_threads(dtype, E, threads) -> None:
    lengths = [700, 1, 257, 256]
    keys, values, tables, counts = a_cache(3, dtype, (2, E), 16, lengths)
    q = draw(5, dtype, 4, 10, E)
    threads(1)
    found = native.decode_attention(q, keys, values, tables, counts, 16)
    threads(3)
    assert torch.equal(native.decode_attention(q, keys, values, tables, counts, 16), found)
    for b, length in enumerate(lengths):  # alone, and with its tokens one behind the other
        at = torch.arange(length)
        slots = tables[b].long()[at // 16] * 16 + at % 16
        own = [Coded(x.codes[:, slots], x.scales[:, slots]) for x in (keys, values)]
        one = torch.zeros(1, 1, dtype=torch.int32)
        alone = native.decode_attention(q[b : b + 1], *own, one, counts[b : b + 1], length)
        assert torch.equal(alone[0], found[b])


@needs_kernels
def test_reading_does_not_depend_on_threads(threads) -> None:
    keys, *_ = a_cache(3, torch.bfloat16, (3, 64), 16, [700])
    found = []
    for count in (1, 3):
        threads(count)
        found.append(native.numbers(keys, slice(0, 700), torch.bfloat16).nan_to_num())
    assert torch.equal(*found)


# ---- under a decoder -----------------------------------------------------------------------------


def a_decoder(dtype: torch.dtype, heads: tuple[int, int] = (4, 2)) -> Decoder:
    config = {
        "model_type": "qwen2",
        "vocab_size": 50,
        "hidden_size": 16 * heads[0],
        "intermediate_size": 72,
        "num_hidden_layers": 3,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "max_position_embeddings": 64,
    }
    made = Decoder(DecoderConfig.from_dict(config)).to(dtype).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in made.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return made


def run(decoder: Decoder, cuts: list[dict[int, int]], rooms: list[int], seed: int) -> list[Tensor]:
    """Hidden states of steps that bring so many tokens of each sequence."""
    stores = Paged(rooms, seed=seed, coded=True)
    hidden = []
    for count in cuts:
        ids = [
            torch.arange(stores.lengths[i], stores.lengths[i] + n) * 7 % 50
            for i, n in count.items()
        ]
        hidden.append(decoder(decoder.embed_tokens(torch.cat(ids)), stores.step(count)))
        stores.count(count)
    return hidden


@needs_kernels
@settings(max_examples=20)
@given(
    heads=st.sampled_from([(4, 4), (6, 2), (4, 1)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
)
def test_the_stack_gives_the_bits_of_its_layers(
    heads: tuple[int, int], dtype: torch.dtype, lengths: list[int]
) -> None:
    decoder, rooms = a_decoder(dtype, heads), [n + 3 for n in lengths]
    cuts = [dict(enumerate(lengths)), *[dict.fromkeys(range(len(lengths)), 1)] * 3]
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        whole = native.stack
        patch.setattr(native, "stack", lambda *given: calls.append(1) or whole(*given))
        together = run(decoder, cuts, rooms, 2)
        assert len(calls) >= 3
        patch.setattr(Stack, "decode", lambda *_: None)
        for a, b in zip(together, run(decoder, cuts, rooms, 2), strict=True):
            assert torch.equal(a, b)


@settings(max_examples=20)
@given(
    chunks=st.lists(st.integers(1, 7), min_size=1, max_size=6), seed=st.none() | st.integers(0, 9)
)
def test_chunks_are_the_whole_but_for_eight_bits(chunks: list[int], seed: int | None) -> None:
    decoder, count = a_decoder(torch.float32), sum(chunks)
    hidden = torch.cat(run(decoder, [{0: n} for n in chunks], [count + 3], seed))
    (whole,) = run(decoder, [{0: count}], [count], None)
    # a number at the border between two codes may fall on either side of it
    assert relative(hidden, whole) < 0.01
    uncached = decoder(
        decoder.embed_tokens(torch.arange(count) * 7 % 50), packed([count], torch.device("cpu"))
    )
    assert relative(hidden, uncached) < 0.05


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_what_was_copied_or_read_is_the_same_elsewhere() -> None:
    decoder, ids = a_decoder(torch.float32), torch.arange(9) * 7 % 50
    stores, other = Paged([12, 12], seed=1, coded=True), Paged([12], seed=5, coded=True)

    def last(where: Paged, number: int) -> Tensor:
        where.lengths[number] = 8
        return decoder(decoder.embed_tokens(ids[8:]), where.step({number: 1}))

    decoder(decoder.embed_tokens(ids[:8]), stores.step({0: 8}))
    stores.kv.copy([*zip(*stores.tables, strict=True)])
    other.kv.write(other.tables[0], stores.kv.read(stores.tables[0], 8))
    wanted = last(stores, 0)
    assert torch.equal(last(stores, 1), wanted)
    assert torch.equal(last(other, 0), wanted)
