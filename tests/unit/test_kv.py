"""engine/kv.py under a decoder: however tokens are cut into steps, the cache changes nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paging import Paged
from vidlm.engine.kv import bytes_per_token
from vidlm.nn.decoder import Decoder, DecoderConfig
from vidlm.nn.step import packed

CPU = torch.device("cpu")
V, LAYERS, WIDTH, HEADS = 31, 3, 32, 4
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module", params=[4, 2, 1], ids=["MHA", "GQA", "MQA"])
def decoder(request: pytest.FixtureRequest) -> Decoder:
    config = {
        "model_type": "qwen2",
        "vocab_size": V,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": request.param,
        "max_position_embeddings": 64,
    }
    decoder = Decoder(DecoderConfig.from_dict(config)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in decoder.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return decoder


def ids_of(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, V, (count,), generator=torch.Generator().manual_seed(seed))


def uncached(decoder: Decoder, ids: Tensor) -> Tensor:
    """Hidden states (T, D) of one sequence in one pass."""
    return decoder(decoder.embed_tokens(ids), packed([len(ids)], CPU))


def advance(decoder: Decoder, stores: Paged, news: dict[int, Tensor]) -> list[Tensor]:
    """One step of several sequences: each one's new ids in, their hidden states out."""
    lengths = {i: len(ids) for i, ids in news.items()}
    step = stores.step(lengths)
    hidden = decoder(decoder.embed_tokens(torch.cat([*news.values()])), step)
    stores.count(lengths)
    return list(hidden.split([*lengths.values()]))


def in_chunks(decoder: Decoder, ids: Tensor, chunks: list[int], stores: Paged) -> Tensor:
    return torch.cat([advance(decoder, stores, {0: part})[0] for part in ids.split(chunks)])


chunk_lists = st.lists(st.integers(1, 7), min_size=1, max_size=6)


seeds = st.none() | st.integers(0, 99)


@settings(max_examples=40)
@given(chunks=chunk_lists, spare=st.integers(0, 3), seed=seeds)
def test_chunks_are_the_whole(
    decoder: Decoder, chunks: list[int], spare: int, seed: int | None
) -> None:
    """Chunked prefill, and decoding where a chunk is one token."""
    ids = ids_of(sum(chunks))
    stores = Paged([len(ids) + spare], seed=seed)
    hidden = in_chunks(decoder, ids, chunks, stores)
    torch.testing.assert_close(hidden, uncached(decoder, ids), **CLOSE)


@pytest.mark.parametrize("block", [1, 3, 16, 32])
def test_decoding_token_by_token(decoder: Decoder, block: int) -> None:
    ids = ids_of(20)
    hidden = in_chunks(decoder, ids, [8] + [1] * 12, Paged([20], block, seed=1))
    torch.testing.assert_close(hidden, uncached(decoder, ids), **CLOSE)


@settings(max_examples=30)
@given(
    parts=st.lists(st.tuples(st.integers(0, 8), st.integers(1, 6)), min_size=1, max_size=4),
    seed=seeds,
)
def test_packed_sequences_are_single_ones(
    decoder: Decoder, parts: list[tuple[int, int]], seed: int | None
) -> None:
    """Sequences with any number of cached tokens bring any number of new ones to one step."""
    sequences = [ids_of(past + new, i) for i, (past, new) in enumerate(parts)]
    stores = Paged([len(ids) for ids in sequences], seed=seed)
    for i, (past, _) in enumerate(parts):
        if past:
            advance(decoder, stores, {i: sequences[i][:past]})
    news = {i: sequences[i][past:] for i, (past, _) in enumerate(parts)}
    for hidden, ids, new in zip(
        advance(decoder, stores, news), sequences, news.values(), strict=True
    ):
        torch.testing.assert_close(hidden, uncached(decoder, ids)[-len(new) :], **CLOSE)


@settings(max_examples=20)
@given(lengths=st.lists(st.integers(1, 8), min_size=1, max_size=4))
def test_packed_sequences_without_a_cache(decoder: Decoder, lengths: list[int]) -> None:
    sequences = [ids_of(length, seed) for seed, length in enumerate(lengths)]
    x = decoder.embed_tokens(torch.cat(sequences))
    hidden = decoder(x, packed(lengths, CPU)).split(lengths)
    for ours, ids in zip(hidden, sequences, strict=True):
        torch.testing.assert_close(ours, uncached(decoder, ids), **CLOSE)


def test_sequences_that_share_blocks(decoder: Decoder) -> None:
    """Two questions about one beginning, which is stored once; the second reads what it shares."""
    beginning, ways = ids_of(8), [ids_of(4, 1), ids_of(4, 2)]
    stores = Paged([12, 12])
    stores.tables[1][:2] = stores.tables[0][:2]
    advance(decoder, stores, {0: beginning})
    stores.lengths[1] = 8
    for hidden, way in zip(advance(decoder, stores, dict(enumerate(ways))), ways, strict=True):
        whole = uncached(decoder, torch.cat((beginning, way)))
        torch.testing.assert_close(hidden, whole[8:], **CLOSE)


def test_a_copied_block_goes_its_own_way(decoder: Decoder) -> None:
    ids, stores = ids_of(6), Paged([8, 8])
    advance(decoder, stores, {0: ids[:5]})
    stores.kv.copy([*zip(*stores.tables, strict=True)])
    stores.lengths[1] = 5
    advance(decoder, stores, {0: ids_of(1, 7)})
    (hidden,) = advance(decoder, stores, {1: ids[5:]})
    torch.testing.assert_close(hidden, uncached(decoder, ids)[5:], **CLOSE)


@pytest.mark.parametrize("seed", [None, 3])
def test_what_was_read_can_be_written_elsewhere(decoder: Decoder, seed: int | None) -> None:
    ids, stores = ids_of(9), Paged([12], seed=seed)
    advance(decoder, stores, {0: ids[:8]})
    other = Paged([12], seed=5)
    other.kv.write(other.tables[0], stores.kv.read(stores.tables[0], 8))
    other.lengths[0] = 8
    (hidden,) = advance(decoder, other, {0: ids[8:]})
    torch.testing.assert_close(hidden, uncached(decoder, ids)[8:], **CLOSE)


def test_a_step_not_counted_is_written_over(decoder: Decoder) -> None:
    """The next step takes the same places: a step can be tried again."""
    ids, stores = ids_of(7), Paged([7])
    advance(decoder, stores, {0: ids[:4]})
    decoder(decoder.embed_tokens(ids_of(3, 9)), stores.step({0: 3}))
    (hidden,) = advance(decoder, stores, {0: ids[4:]})
    torch.testing.assert_close(hidden, uncached(decoder, ids)[4:], **CLOSE)


def test_memory_is_what_bytes_per_token_says(decoder: Decoder) -> None:
    stores = Paged([16])
    assert list(stores.kv.layers) == []
    advance(decoder, stores, {0: ids_of(2)})
    K = decoder.config.num_key_value_heads
    size = sum(k.nbytes + v.nbytes for k, v in stores.kv.layers)
    assert size == 16 * bytes_per_token(LAYERS, K, WIDTH // HEADS, torch.float32)
    assert bytes_per_token(LAYERS, K, WIDTH // HEADS, torch.bfloat16) * 32 == size
