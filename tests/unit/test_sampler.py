"""engine/sampler.py: transformers' filters exactly, and draws from the distribution they leave."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import torchvision_on_cpu  # noqa: F401 (transformers loads its models, and torchvision, when asked)
from vidlm.engine.sampler import Sampler, process
from vidlm.types import SamplingParams

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def reference() -> Any:
    """A model of transformers, which knows the order of its processors; it is never run."""
    sizes = {"vocab_size": 8, "hidden_size": 4, "intermediate_size": 4}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=1)
    return transformers.LlamaForCausalLM(config)


def expected(
    reference: Any, logits: Tensor, params: SamplingParams, history: Sequence[int], generated: int
) -> Tensor:
    config = transformers.GenerationConfig(
        do_sample=params.temperature > 0,
        temperature=params.temperature or None,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        min_new_tokens=params.min_new_tokens,
    )
    config._eos_token_tensor = torch.tensor(params.eos_token_ids).long()
    processors = reference._get_logits_processor(
        config, input_ids_seq_length=len(history) - generated, device="cpu"
    )
    return processors(torch.tensor([history]), logits[None].clone())[0]


def check(
    reference: Any, logits: Tensor, params: SamplingParams, history: Sequence[int] = (0,)
) -> Tensor:
    """`process` gives transformers' scores exactly and leaves its input as it was."""
    before = logits.clone()
    scores = process(logits, params, history, 0)
    assert torch.equal(logits, before)
    assert torch.equal(scores, expected(reference, logits, params, history, 0)), params
    return scores


def kept(scores: Tensor) -> list[int]:
    return scores.isfinite().nonzero()[:, 0].tolist()


def sampling(**changes: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, **changes})


# ---- filters ---------------------------------------------------------------------------------


@settings(max_examples=200)
@given(data=st.data(), ties=st.booleans(), size=st.integers(2, 40))
def test_scores_are_transformers(
    reference: Any, data: st.DataObject, ties: bool, size: int
) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6), label="logits"))
    logits = torch.randn(size, generator=generator) * 3
    logits = logits.round() if ties else logits
    ids = st.integers(0, size - 1)
    history = data.draw(st.lists(st.integers(0, size + 2), min_size=1, max_size=30))
    generated = data.draw(st.integers(0, len(history) - 1))
    params = SamplingParams(
        temperature=data.draw(st.sampled_from([0.0, 1.0]) | st.floats(0.05, 4)),
        top_k=data.draw(st.integers(0, size + 20)),
        top_p=data.draw(st.just(1.0) | st.floats(1e-6, 1)),
        min_p=data.draw(st.just(0.0) | st.floats(0, 1)),
        repetition_penalty=data.draw(st.just(1.0) | st.floats(0.5, 3)),
        min_new_tokens=data.draw(st.integers(0, 32)),
        eos_token_ids=tuple(data.draw(st.lists(ids, max_size=min(3, size - 1)))),
    )
    ours = process(logits, params, history, generated)
    assert torch.equal(ours, expected(reference, logits, params, history, generated))
    as_tensor = torch.tensor(history)
    assert torch.equal(ours, process(logits, params, as_tensor, generated))
    assert kept(ours)


@pytest.mark.parametrize(
    ("changes", "survivors"),
    [
        ({"top_k": 1}, [3]),
        ({"top_k": 2}, [1, 2, 3]),  # two share the second place
        ({"top_k": 3}, [1, 2, 3]),
        ({"top_k": 9}, [0, 1, 2, 3, 4]),
        ({"top_p": 1e-6}, [3]),
        ({"min_p": 1.0}, [3]),
        ({"min_p": 0.3}, [1, 2, 3]),  # exp(-1) of the best stays
        ({"top_k": 1, "top_p": 1e-6, "min_p": 1.0}, [3]),
        ({"temperature": 0.0, "top_k": 1, "top_p": 0.1, "min_p": 1.0}, [0, 1, 2, 3, 4]),
        ({"min_new_tokens": 1, "eos_token_ids": (3, 0, 99)}, [1, 2, 4]),
    ],
    ids=str,
)
def test_edges(reference: Any, changes: dict[str, Any], survivors: list[int]) -> None:
    logits = torch.tensor([-1.0, 2.0, 2.0, 3.0, 0.0])
    assert kept(check(reference, logits, sampling(**changes))) == survivors


def test_equal_scores_at_the_edge_of_top_p(reference: Any) -> None:
    """Of four equally likely tokens two are kept, and the same two."""
    scores = check(reference, torch.zeros(4), sampling(top_p=0.4))
    assert len(kept(scores)) == 2


def test_nothing_switched_on_is_no_work() -> None:
    logits = torch.randn(5)
    assert process(logits, SamplingParams(), [1, 2], 0) is logits
    assert process(logits, sampling(), [1, 2], 0) is logits


def test_repetition_is_penalised_once(reference: Any) -> None:
    params = SamplingParams(repetition_penalty=2.0)
    logits = torch.tensor([1.0, 1.0, -1.0, -1.0])
    scores = check(reference, logits, params, [0, 2, 2, 2, 0])
    assert scores.tolist() == [0.5, 1.0, -2.0, -1.0]


def test_min_new_tokens_counts_new_tokens() -> None:
    params = SamplingParams(min_new_tokens=2, eos_token_ids=(1,))
    gone = [math.isinf(process(torch.zeros(3), params, [0] * 9, n)[1]) for n in range(4)]
    assert gone == [True, True, False, False]


# ---- picking ---------------------------------------------------------------------------------


def picks(params: SamplingParams, logits: Sequence[Tensor], prompt: Sequence[int]) -> list[int]:
    sampler = Sampler(params, prompt, CPU)
    return [sampler.pick(row) for row in logits]


def rows(count: int, size: int, seed: int = 0) -> list[Tensor]:
    return list(torch.randn(count, size, generator=torch.Generator().manual_seed(seed)) * 2)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_sampler_remembers_prompt_and_picks(reference: Any, temperature: float) -> None:
    params = SamplingParams(
        temperature=temperature,
        repetition_penalty=1.8,
        min_new_tokens=7,
        eos_token_ids=(2, 5),
        top_k=4 if temperature else 0,
        max_new_tokens=12,
    )
    prompt, logits = [3, 1, 3], rows(20, 9)  # more than max_new_tokens: it is not the sampler's
    torch.manual_seed(11)
    ours = picks(params, logits, prompt)
    torch.manual_seed(11)
    theirs: list[int] = []
    for row in logits:
        scores = expected(reference, row, params, [*prompt, *theirs], len(theirs))
        if temperature:
            chosen = torch.multinomial(scores[None].softmax(dim=-1), num_samples=1)
        else:
            chosen = scores.argmax()
        theirs.append(int(chosen))
    assert ours == theirs
    assert ours != picks(replace(params, repetition_penalty=1.0), logits, prompt)
    assert not {2, 5} & set(ours[:7])
    assert {2, 5} & set(ours[7:])


def test_greedy_is_the_best() -> None:
    logits = rows(30, 11)
    assert picks(SamplingParams(), logits, [1]) == [int(row.argmax()) for row in logits]


def test_greedy_draws_nothing() -> None:
    state = torch.get_rng_state()
    picks(SamplingParams(repetition_penalty=1.1), rows(3, 5), [1])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_seed_repeats_itself() -> None:
    logits = rows(40, 50)
    first = picks(sampling(seed=1), logits, [0])
    torch.manual_seed(5)  # a seeded sampler neither uses nor moves torch's generator
    state = torch.get_rng_state()
    assert picks(sampling(seed=1), logits, [0]) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert picks(sampling(seed=2), logits, [0]) != first


def test_samplers_of_one_seed_do_not_share_a_generator() -> None:
    logits = rows(40, 50)
    first, second = Sampler(sampling(seed=1), [0], CPU), Sampler(sampling(seed=1), [0], CPU)
    pairs = [(first.pick(row), second.pick(row)) for row in logits]
    assert all(a == b for a, b in pairs)


def test_without_a_seed_torch_decides() -> None:
    logits = rows(40, 50)
    torch.manual_seed(3)
    first = picks(sampling(), logits, [0])
    assert picks(sampling(), logits, [0]) != first
    torch.manual_seed(3)
    assert picks(sampling(), logits, [0]) == first


def test_inside_and_outside_inference_mode() -> None:
    """Logits come from inference mode and are picked from wherever the caller happens to be."""
    params = sampling(repetition_penalty=1.5, top_p=0.9, min_new_tokens=3, eos_token_ids=(1,))
    with torch.inference_mode():
        logits = [row * 1 for row in rows(6, 9)]
        sampler = Sampler(params, [1, 2], CPU)
        sampler.pick(logits[0])
    other = Sampler(params, [1, 2], CPU)
    for row in logits[1:]:
        sampler.pick(row)
        other.pick(row)
    with torch.inference_mode():
        other.pick(logits[0])


# ---- the distribution ------------------------------------------------------------------------

LOGITS = (1.1, -0.4, 0.3, 2.0, 0.9, -1.2, 1.4, 0.0)
DRAWS = 3000


def chances(params: SamplingParams) -> dict[int, float]:
    """What each token's chance should be, worked out without tensors."""
    weights = {i: math.exp(logit / params.temperature) for i, logit in enumerate(LOGITS)}
    best_first = sorted(weights, key=lambda i: -weights[i])
    if params.top_k:
        best_first = best_first[: params.top_k]
    if params.top_p < 1:
        total, above, inside = sum(weights[i] for i in best_first), 0.0, []
        for i in best_first:
            if above < params.top_p * total:
                inside.append(i)
            above += weights[i]
        best_first = inside
    best_first = [i for i in best_first if weights[i] >= params.min_p * weights[best_first[0]]]
    total = sum(weights[i] for i in best_first)
    return {i: weights[i] / total for i in best_first}


def misfit(params: SamplingParams, should_be: dict[int, float]) -> float:
    """Pearson's chi-square over its bound: a true fit is above 1 less than once in a million.

    The bound is d + 2 sqrt(d t) + 2 t with t = 14, below which all but exp(-t) of a chi-square
    with d degrees of freedom lies (Laurent and Massart, 2000, lemma 1).
    """
    drawn = picks(params, [torch.tensor(LOGITS)] * DRAWS, [0])
    counts = {i: drawn.count(i) for i in set(drawn)}
    if counts.keys() - should_be.keys():
        return math.inf
    square = sum(
        (counts.get(i, 0) - DRAWS * chance) ** 2 / (DRAWS * chance)
        for i, chance in should_be.items()
    )
    degrees, t = len(should_be) - 1, 14
    return square / (degrees + 2 * math.sqrt(degrees * t) + 2 * t)


FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"temperature": 2.5},
    {"top_k": 3},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"temperature": 1.4, "top_k": 6, "top_p": 0.8, "min_p": 0.1},
]


@pytest.mark.parametrize("changes", FILTERS, ids=str)
def test_draws_follow_the_distribution(changes: dict[str, Any]) -> None:
    params = sampling(**changes, seed=2024)
    assert misfit(params, chances(params)) < 1


@pytest.mark.parametrize("changes", FILTERS[1:], ids=str)
def test_draws_of_another_distribution_do_not_fit(changes: dict[str, Any]) -> None:
    """The bound is tight enough to notice each filter missing, or one that should not be there."""
    plain, filtered = sampling(seed=2024), sampling(**changes, seed=2024)
    assert misfit(plain, chances(filtered)) > 1
    assert misfit(filtered, chances(plain)) > 1
