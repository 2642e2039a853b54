"""engine/kv.py under a decoder: however tokens are cut into steps, the cache changes nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vidlm.engine.kv import SequenceKV, bytes_per_token
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


def advance(decoder: Decoder, stores: list[SequenceKV], news: list[Tensor]) -> list[Tensor]:
    """One step of several sequences: each one's new ids in, their hidden states out."""
    lengths = [len(ids) for ids in news]
    hidden = decoder(decoder.embed_tokens(torch.cat(news)), packed(lengths, CPU, stores))
    for kv, length in zip(stores, lengths, strict=True):
        kv.advance(length)
    return list(hidden.split(lengths))


def in_chunks(decoder: Decoder, ids: Tensor, chunks: list[int], kv: SequenceKV) -> Tensor:
    return torch.cat([advance(decoder, [kv], [part])[0] for part in ids.split(chunks)])


chunk_lists = st.lists(st.integers(1, 7), min_size=1, max_size=6)


@settings(max_examples=40)
@given(chunks=chunk_lists, spare=st.integers(0, 3))
def test_chunks_are_the_whole(decoder: Decoder, chunks: list[int], spare: int) -> None:
    """Chunked prefill, and decoding where a chunk is one token."""
    ids = ids_of(sum(chunks))
    kv = SequenceKV(len(ids) + spare)
    hidden = in_chunks(decoder, ids, chunks, kv)
    torch.testing.assert_close(hidden, uncached(decoder, ids), **CLOSE)
    assert kv.length == len(ids)


def test_decoding_token_by_token(decoder: Decoder) -> None:
    ids = ids_of(20)
    hidden = in_chunks(decoder, ids, [8] + [1] * 12, SequenceKV(20))
    torch.testing.assert_close(hidden, uncached(decoder, ids), **CLOSE)


@settings(max_examples=30)
@given(parts=st.lists(st.tuples(st.integers(0, 8), st.integers(1, 6)), min_size=1, max_size=4))
def test_packed_sequences_are_single_ones(decoder: Decoder, parts: list[tuple[int, int]]) -> None:
    """Sequences with any number of cached tokens bring any number of new ones to one step."""
    sequences = [ids_of(past + new, seed) for seed, (past, new) in enumerate(parts)]
    stores = [SequenceKV(len(ids)) for ids in sequences]
    for kv, ids, (past, _) in zip(stores, sequences, parts, strict=True):
        if past:
            advance(decoder, [kv], [ids[:past]])
    news = [ids[past:] for ids, (past, _) in zip(sequences, parts, strict=True)]
    for hidden, ids, new in zip(advance(decoder, stores, news), sequences, news, strict=True):
        torch.testing.assert_close(hidden, uncached(decoder, ids)[-len(new) :], **CLOSE)


@settings(max_examples=20)
@given(lengths=st.lists(st.integers(1, 8), min_size=1, max_size=4))
def test_packed_sequences_without_a_cache(decoder: Decoder, lengths: list[int]) -> None:
    sequences = [ids_of(length, seed) for seed, length in enumerate(lengths)]
    x = decoder.embed_tokens(torch.cat(sequences))
    hidden = decoder(x, packed(lengths, CPU)).split(lengths)
    for ours, ids in zip(hidden, sequences, strict=True):
        torch.testing.assert_close(ours, uncached(decoder, ids), **CLOSE)


def test_the_order_of_sequences_does_not_matter(decoder: Decoder) -> None:
    sequences = [ids_of(n, n) for n in (3, 1, 6)]
    there = advance(decoder, [SequenceKV(6) for _ in sequences], sequences)
    back = advance(decoder, [SequenceKV(6) for _ in sequences], sequences[::-1])
    for a, b in zip(there, back[::-1], strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_a_fork_and_its_parent_go_their_own_ways(decoder: Decoder) -> None:
    prompt, ways = ids_of(5), [ids_of(4, 1), ids_of(4, 2), ids_of(4, 3)]
    parent = SequenceKV(9)
    advance(decoder, [parent], [prompt])
    stores = [parent, parent.fork(), parent.fork()]
    steps = [
        advance(decoder, stores, [way[i : i + 1] for way in ways]) for i in range(len(ways[0]))
    ]
    for i, way in enumerate(ways):
        hidden = torch.cat([step[i] for step in steps])
        whole = uncached(decoder, torch.cat((prompt, way)))
        torch.testing.assert_close(hidden, whole[len(prompt) :], **CLOSE)
    assert [kv.length for kv in stores] == [9, 9, 9]


def test_a_fork_keeps_what_its_parent_loses(decoder: Decoder) -> None:
    parent = SequenceKV(6)
    advance(decoder, [parent], [ids_of(5)])
    fork = parent.fork()
    for keys, values in parent._layers:
        keys.zero_()
        values.zero_()
    (hidden,) = advance(decoder, [fork], [ids_of(6)[5:]])
    torch.testing.assert_close(hidden, uncached(decoder, ids_of(6))[5:], **CLOSE)
    assert (parent.length, fork.length) == (5, 6)


def test_a_step_not_counted_is_written_over(decoder: Decoder) -> None:
    """Without `advance` the next step takes the same places: a step can be tried again."""
    ids, kv = ids_of(7), SequenceKV(7)
    advance(decoder, [kv], [ids[:4]])
    decoder(decoder.embed_tokens(ids_of(3, 9)), packed([3], CPU, [kv]))
    (hidden,) = advance(decoder, [kv], [ids[4:]])
    torch.testing.assert_close(hidden, uncached(decoder, ids)[4:], **CLOSE)


def test_memory_is_what_bytes_per_token_says(decoder: Decoder) -> None:
    kv = SequenceKV(13)
    assert kv.nbytes == 0
    advance(decoder, [kv], [ids_of(2)])
    K = decoder.config.num_key_value_heads
    assert kv.nbytes == 13 * bytes_per_token(LAYERS, K, WIDTH // HEADS, torch.float32)
    assert bytes_per_token(LAYERS, K, WIDTH // HEADS, torch.bfloat16) * 26 == kv.nbytes
    assert kv.fork().nbytes == kv.nbytes
