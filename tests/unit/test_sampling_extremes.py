"""SamplingParams at the ends of their ranges: greedy, a draw or a refusal, never a failing draw."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from straight import about, ask, asked, text, tiny_model
from vidlm.engine import Engine
from vidlm.engine.sampler import Sampler
from vidlm.errors import InvalidArgument
from vidlm.hf.generation import read_call
from vidlm.types import SamplingParams

CPU = torch.device("cpu")
SMALLEST, LARGEST = 5e-324, 1.7e308


@pytest.mark.parametrize("temperature", [0, 0.0, 1e-40, SMALLEST, 1e-10, 9.9e-6])
def test_below_1e_5_it_is_greedy(temperature: float) -> None:
    params = SamplingParams(temperature=temperature)
    assert params == SamplingParams()
    assert SamplingParams(temperature=temperature, num_beams=2).num_beams == 2
    engine, prompt = Engine(tiny_model()), about((1,), text(9, 1))
    assert ask(engine, asked(prompt, 6, temperature=temperature)) == ask(engine, asked(prompt, 6))


@pytest.mark.parametrize(
    "call",
    [
        {"temperature": 1e-7},
        {"temperature": 1e-7, "do_sample": True},
        {"temperature": 1e-7, "do_sample": False},
        {"temperature": 1e-7, "top_p": 0.5},
    ],
)
def test_generate_reads_it_so(call: dict[str, Any]) -> None:
    assert read_call(call, {}, prompt_length=3, eos=2).params.temperature == 0
    assert (
        read_call({}, {"do_sample": True, **call}, prompt_length=3, eos=2).params.temperature == 0
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", x) for x in (-1e-9, float("nan"), float("inf"), "1", [1.0])),
        *(("top_p", x) for x in (0, -0.1, 1.1, float("nan"), "1")),
        *(("min_p", x) for x in (-1e-9, 1.1, float("nan"), "0")),
        *(("repetition_penalty", x) for x in (0, -1, float("nan"), float("inf"), "1")),
        *(("length_penalty", x) for x in (float("nan"), float("inf"), 1e3, -1e3, "1")),
        *(("top_k", x) for x in (-1, 1.5, "1", float("nan"))),
        *(("max_new_tokens", x) for x in (0, 1.5, "1", None)),
        *(("seed", x) for x in (-1, 1.5, "1", 2**63)),
        *(("n", x) for x in (0, 1.5, 65)),
        *(("num_beams", x) for x in (0, 1.5)),
        *(("logprobs", x) for x in (-1, 1.5, 21)),
    ],
)
def test_what_is_no_such_value_is_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidArgument, match=f"^{name}=.*; allowed: "):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "warm"])
def test_generate_refuses_a_temperature_that_is_none(value: Any) -> None:
    for call in ({"temperature": value}, {"temperature": value, "do_sample": True}):
        with pytest.raises(InvalidArgument, match="temperature"):
            read_call(call, {}, prompt_length=3, eos=2)


EXTREMES: list[dict[str, Any]] = [
    {"temperature": 1e-5},
    {"temperature": LARGEST},
    {"temperature": LARGEST, "min_new_tokens": 4, "eos_token_ids": (1, 2)},
    {"top_p": SMALLEST},
    {"top_p": 1 - 1e-16},
    {"min_p": SMALLEST},
    {"min_p": 1.0},
    {"top_k": 2**62},
    {"repetition_penalty": SMALLEST},
    {"repetition_penalty": LARGEST},
    {"repetition_penalty": 1e-40, "temperature": 1e-5},
    {"repetition_penalty": 1e38, "temperature": 1e-5, "top_p": 1e-9, "min_p": 1e-9, "top_k": 1},
]


@pytest.mark.parametrize("how", EXTREMES)
@pytest.mark.parametrize("scale", [1.0, 1e-30, 6e4])
def test_a_draw_at_the_ends_of_what_is_allowed(how: dict[str, Any], scale: float) -> None:
    params = SamplingParams(**{"temperature": 1.0, "seed": 1, **how})
    logits = scale * torch.randn(50, generator=torch.Generator().manual_seed(3))
    sampler = Sampler(params, range(50), CPU)
    assert all(0 <= sampler.pick(logits) < 50 for _ in range(6))


@given(
    temperature=st.floats(1e-5, LARGEST),
    top_p=st.floats(0, 1, exclude_min=True),
    min_p=st.floats(0, 1),
    penalty=st.floats(0, LARGEST, exclude_min=True),
    seed=st.integers(0, 2**63 - 1),
)
def test_any_draw(
    temperature: float, top_p: float, min_p: float, penalty: float, seed: int
) -> None:
    params = SamplingParams(
        **{"temperature": temperature, "top_p": top_p, "min_p": min_p, "seed": seed},
        repetition_penalty=penalty,
    )
    logits = 20 * torch.randn(30, generator=torch.Generator().manual_seed(3))
    sampler = Sampler(params, (1, 2, 3), CPU)
    assert all(0 <= sampler.pick(logits) < 30 for _ in range(3))


@pytest.mark.parametrize("penalty", [-32, 32])
def test_beams_with_the_largest_length_penalties(penalty: float) -> None:
    engine, prompt = Engine(tiny_model()), about((), text(9, 1))
    assert len(ask(engine, asked(prompt, 12, num_beams=3, length_penalty=penalty))) == 12
