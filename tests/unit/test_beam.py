"""engine/beam.py: beam search finds the ids that transformers finds."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torchvision_on_cpu  # noqa: F401 (transformers loads its models, and torchvision, when asked)
from vidlm.engine import Output, Request, generate
from vidlm.errors import InvalidArgument
from vidlm.models.base import Encoded, Media, Prompt, VideoModel
from vidlm.nn.decoder import Decoder, DecoderConfig
from vidlm.nn.step import packed
from vidlm.types import FinishReason, SamplingParams

V = 37
PLACEHOLDER = 36  # in no prompt, and an id like any other in an answer


class TextModel(VideoModel):
    """A decoder alone, behind the seam that the engine knows."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        context = config.max_position_embeddings
        self.config = SimpleNamespace(max_context=context, placeholders={"image": PLACEHOLDER})

    def encode(self, media: tuple[Media, ...]) -> list[Encoded]:
        assert not media
        return []

    @property
    def decoder(self) -> Decoder:
        return self.model


@dataclass(frozen=True)
class Pair:
    """One small random model twice, and tokens it likes, likeliest first, to end answers with."""

    ours: TextModel
    theirs: Any
    ends: tuple[int, ...]


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def pair(request: pytest.FixtureRequest) -> Pair:
    sizes = {
        "vocab_size": V,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    name = {"llama": "Llama", "qwen2": "Qwen2"}[request.param]
    config = getattr(transformers, f"{name}Config")(**sizes, tie_word_embeddings=False)
    theirs = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    theirs.generation_config = transformers.GenerationConfig()  # nothing but what a call says
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    ours = TextModel(DecoderConfig.from_dict({"model_type": request.param, **sizes})).eval()
    ours.load_state_dict(theirs.state_dict())
    return Pair(ours, theirs, frequent_tokens(ours))


def prompt_of(seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, V - 1, (3 + seed % 4,), generator=generator).tolist())


def found(model: TextModel, ids: tuple[int, ...], params: SamplingParams) -> Output:
    return generate(model, [Request(Prompt(ids), params)])[0]


def expected(model: Any, ids: tuple[int, ...], params: SamplingParams) -> tuple[int, ...]:
    """transformers' answer."""
    prompt = torch.tensor([ids])
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        num_beams=params.num_beams,
        max_new_tokens=params.max_new_tokens,
        min_new_tokens=params.min_new_tokens or None,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
        repetition_penalty=params.repetition_penalty,
        eos_token_id=list(params.eos_token_ids) or None,
        pad_token_id=0,
    )
    return tuple(output[0, len(ids) :].tolist())


def check(pair: Pair, ids: tuple[int, ...], params: SamplingParams) -> Output:
    output = found(pair.ours, ids, params)
    assert output.ids == expected(pair.theirs, ids, params), params
    assert output.finish == reason(output.ids, params)
    return output


def reason(ids: tuple[int, ...], params: SamplingParams) -> FinishReason:
    if ids[-1] in params.eos_token_ids:
        return FinishReason.STOP
    assert len(ids) == params.max_new_tokens
    return FinishReason.LENGTH


def frequent_tokens(model: TextModel) -> tuple[int, ...]:
    """By how often they stand in a few answers that have no end."""
    params = SamplingParams(max_new_tokens=12, num_beams=3)
    answers = [found(model, prompt_of(seed), params).ids for seed in range(6)]
    counts = torch.tensor([*itertools.chain(*answers)]).bincount(minlength=V)
    return tuple(counts.argsort(descending=True, stable=True).tolist())


# ---- parity ----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_beams", [2, 3, 4])
@pytest.mark.parametrize("early_stopping", [False, True])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.5])
def test_ids_are_transformers(
    pair: Pair, num_beams: int, early_stopping: bool, length_penalty: float
) -> None:
    for seed, max_new_tokens in enumerate((1, 5, 9, 14)):
        params = SamplingParams(
            max_new_tokens=max_new_tokens,
            eos_token_ids=pair.ends[: 1 + seed % 2] if seed < 3 else pair.ends[1:4],
            num_beams=num_beams,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
        )
        check(pair, prompt_of(seed + 10), params)


@pytest.mark.parametrize("num_beams", [2, 3])
@pytest.mark.parametrize("count", [4, 10])
def test_many_likely_ends(pair: Pair, num_beams: int, count: int) -> None:
    """More answers than are kept, and steps whose best continuations nearly all end."""
    for seed in range(8):
        params = SamplingParams(
            max_new_tokens=14,
            eos_token_ids=pair.ends[1 : 1 + count],
            num_beams=num_beams,
            length_penalty=2.0,
        )
        check(pair, prompt_of(seed), params)


@settings(max_examples=25)
@given(data=st.data(), seed=st.integers(0, 10_000))
def test_any_settings(pair: Pair, data: st.DataObject, seed: int) -> None:
    max_new_tokens = data.draw(st.integers(1, 12))
    ends = st.sampled_from(pair.ends[:8])
    params = SamplingParams(
        max_new_tokens=max_new_tokens,
        min_new_tokens=data.draw(st.integers(0, max_new_tokens)),
        eos_token_ids=tuple(data.draw(st.lists(ends, max_size=3, unique=True))),
        num_beams=data.draw(st.integers(2, 5)),
        length_penalty=data.draw(st.floats(-1.5, 3).map(lambda x: round(x, 2))),
        early_stopping=data.draw(st.booleans()),
        repetition_penalty=data.draw(st.sampled_from([1.0, 1.1, 1.7, 0.8])),
    )
    check(pair, prompt_of(seed), params)


def test_every_setting_tells(pair: Pair) -> None:
    """The parity above means something: each setting changes answers, and they end in all ways."""
    plain = SamplingParams(max_new_tokens=8, num_beams=3, eos_token_ids=pair.ends[1:3])
    answers = [found(pair.ours, prompt_of(seed), plain) for seed in range(20)]
    assert {answer.finish for answer in answers} == set(FinishReason)
    assert any(1 < len(answer.ids) < 8 for answer in answers)
    changes: list[dict[str, Any]] = [
        {"num_beams": 2},
        {"length_penalty": 0.0},
        {"length_penalty": 2.5},
        {"early_stopping": True},
        {"repetition_penalty": 1.3},
        {"min_new_tokens": 6},
        {"eos_token_ids": plain.eos_token_ids[:1]},
    ]
    for change in changes:
        params = replace(plain, **change)
        others = [found(pair.ours, prompt_of(seed), params) for seed in range(20)]
        assert others != answers, change


def test_more_beams_than_tokens(pair: Pair) -> None:
    params = SamplingParams(max_new_tokens=3, num_beams=V + 3)
    check(pair, prompt_of(1), params)


# ---- without an oracle -----------------------------------------------------------------------


def test_with_a_beam_for_every_beginning_the_best_answer_is_found(pair: Pair) -> None:
    model, ids = pair.ours, prompt_of(5)
    params = SamplingParams(max_new_tokens=2, num_beams=V, length_penalty=0.0)
    with torch.inference_mode():
        every = torch.tensor([(*ids, first) for first in range(V)])
        x = model.embed(every.flatten())
        step = packed([len(ids) + 1] * V, model.device)
        chances = model.logits(model.hidden(x, step)).log_softmax(-1).unflatten(0, every.shape)
    sums = chances[0, len(ids) - 1, :, None] + chances[:, -1]  # (V, V): first and second token
    assert found(model, ids, params).ids == divmod(int(sums.argmax()), V)


def test_the_context_ends_an_answer(pair: Pair) -> None:
    """64 positions, 60 of them the prompt's."""
    ids = tuple(i % 30 for i in range(60))
    params = SamplingParams(max_new_tokens=20, num_beams=3)
    output = found(pair.ours, ids, params)
    assert output.ids == expected(pair.theirs, ids, replace(params, max_new_tokens=4))
    assert output.finish == FinishReason.LENGTH


def test_stop_strings_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="num_beams=1"):
        SamplingParams(num_beams=2, stop=("end",))
