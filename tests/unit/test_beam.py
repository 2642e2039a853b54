"""engine/beam.py: beam search finds the ids that transformers finds."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import torchvision_on_cpu  # noqa: F401 (transformers loads its models, and torchvision, when asked)
from vidlm.engine import Output, Request, beam, generate
from vidlm.engine.kv import SequenceKV
from vidlm.errors import InvalidArgument
from vidlm.models.base import Encoded, Media, Prompt, VideoModel
from vidlm.nn.decoder import CausalLM, DecoderConfig
from vidlm.nn.step import Step
from vidlm.types import FinishReason, SamplingParams

V = 37
PLACEHOLDER = 36  # in no prompt, and an id like any other in an answer


class TextModel(VideoModel):
    """A decoder alone, behind the seam that the engine knows."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.language_model = CausalLM(config)
        context = config.max_position_embeddings
        self.config = SimpleNamespace(max_context=context, placeholder_id=PLACEHOLDER)

    def encode(self, media: tuple[Media, ...]) -> list[Encoded]:
        assert not media
        return []

    def embed(self, ids: Tensor) -> Tensor:
        return self.language_model.model.embed_tokens(ids)

    def hidden(self, x: Tensor, step: Step, trace: list[Tensor] | None = None) -> Tensor:
        return self.language_model.model(x, step, trace)

    def logits(self, h: Tensor) -> Tensor:
        return self.language_model.lm_head(h)


Pair = tuple[TextModel, Any]


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def pair(request: pytest.FixtureRequest) -> Pair:
    """The same small random model twice: ours and transformers'."""
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
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    ours = TextModel(DecoderConfig.from_dict({"model_type": request.param, **sizes})).eval()
    ours.language_model.load_state_dict(theirs.state_dict())
    return ours, theirs


def prompt_of(seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, V - 1, (3 + seed % 4,), generator=generator).tolist())


def found(model: TextModel, ids: tuple[int, ...], params: SamplingParams) -> Output:
    return generate(model, [Request(Prompt(ids), params)])[0]


def expected(model: Any, ids: tuple[int, ...], params: SamplingParams) -> tuple[int, ...]:
    """transformers' answer. It checks its own settings; they go past that in its own words."""
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
    output = found(pair[0], ids, params)
    assert output.ids == expected(pair[1], ids, params), params
    assert output.finish == reason(output.ids, params)
    return output


def reason(ids: tuple[int, ...], params: SamplingParams) -> FinishReason:
    if ids[-1] in params.eos_token_ids:
        return FinishReason.STOP
    assert len(ids) == params.max_new_tokens
    return FinishReason.LENGTH


def likely_ends(model: TextModel, count: int) -> tuple[int, ...]:
    """Tokens that answers without an end contain most often, so that they do end answers."""
    params = SamplingParams(max_new_tokens=12, num_beams=3)
    answers = [found(model, prompt_of(seed), params).ids for seed in range(6)]
    counts = torch.tensor([*itertools.chain(*answers)]).bincount(minlength=V)
    return tuple(counts.argsort(descending=True, stable=True)[:count].tolist())


# ---- parity ----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_beams", [2, 3, 4])
@pytest.mark.parametrize("early_stopping", [False, True])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.5])
def test_ids_are_transformers(
    pair: Pair, num_beams: int, early_stopping: bool, length_penalty: float
) -> None:
    ends = likely_ends(pair[0], 2)
    outputs = []
    for seed in range(4):
        params = SamplingParams(
            max_new_tokens=(1, 5, 9, 14)[seed],
            eos_token_ids=ends[: 1 + seed % 2],
            num_beams=num_beams,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
        )
        outputs.append(check(pair, prompt_of(seed + 10), params))
    assert {len(output.ids) for output in outputs} != {1}
