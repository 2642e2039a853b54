"""engine/: in exact mode tokens are equal in bfloat16, too, bit by bit of the logits."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from straight import Stepped, about, asked, nothing_is_held, run_out, text
from vidlm import LlavaForConditionalGeneration
from vidlm.engine import EngineOptions, Failure, Token
from vidlm.engine.store import block_bytes
from vidlm.hf import LlavaConfig
from vidlm.models.base import VideoModel

NEW = 12
SYSTEM = text(21)
LONG = text(500, 5)  # with a question, one cell of the grid and part of another
REQUESTS = (
    asked(about((1, 2, 3), text(9, 1), SYSTEM), NEW, logprobs=1),
    asked(about((1, 2, 3), text(12, 2), SYSTEM), NEW, logprobs=1),
    asked(about((3, 4), text(40, 3)), NEW, logprobs=1),
    asked(about((), text(70, 4)), NEW, logprobs=1, temperature=1.0, seed=1),
    asked(about((2,), text(30, 6), LONG), NEW, logprobs=1),
    asked(about((2,), text(45, 7), LONG), NEW, logprobs=1, n=2),
)
Said = list[tuple[int, float]]


@pytest.fixture(scope="module")
def model() -> VideoModel:
    """Wide enough for sums whose order depends on how many are made at a time."""
    wide = {"hidden_size": 256, "intermediate_size": 640, "max_position_embeddings": 2048}
    config = tiny.INTERLEAVE.config
    config["text_config"].update(wide)
    made = LlavaForConditionalGeneration(LlavaConfig.from_dict(config)).eval()
    tiny.randomise(made)
    return made.requires_grad_(False).to(torch.bfloat16)


def engine_of(model: VideoModel, blocks: int = 300, **how: Any) -> Stepped:
    options = EngineOptions(kv_bytes=blocks * block_bytes(model), exact=True, **how)
    return Stepped(model, options=options)


@pytest.fixture(scope="module")
def alone(model: VideoModel) -> list[dict[int, Said]]:
    """What each request is answered by an engine that serves nobody else."""
    return [
        said(run_out(engine), number)
        for request in REQUESTS
        for engine in (engine_of(model),)
        for number in (engine.add(request),)
    ]


def said(events: list[Token | Failure], request: int) -> dict[int, Said]:
    """Tokens and their log-probabilities, which differ where a bit of the logits does."""
    found: dict[int, Said] = {}
    for event in events:
        assert isinstance(event, Token)
        assert event.logprob is not None
        if event.request == request:
            found.setdefault(event.choice, []).append((event.id, event.logprob))
    return found


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32),
    blocks=st.integers(40, 120),
    share=st.booleans(),
    features=st.sampled_from([0, 1 << 20]),
)
def test_any_company(
    model: VideoModel,
    alone: list[dict[int, Said]],
    seed: int,
    blocks: int,
    share: bool,
    features: int,
) -> None:
    rng = random.Random(seed)
    engine = engine_of(model, blocks, share=share, feature_bytes=features)
    numbers: dict[int, int] = {}
    events: list[Token | Failure] = []
    for _ in range(rng.randint(3, 12)):
        if rng.random() < 0.5:
            which = rng.randrange(len(REQUESTS))
            numbers[engine.add(REQUESTS[which])] = which
        else:
            events += [event for _ in range(rng.randint(1, 8)) for event in engine.events()]
    events += run_out(engine)
    assert nothing_is_held(engine)
    for number, which in numbers.items():
        assert said(events, number) == alone[which], which


def test_after_another_question(model: VideoModel, alone: list[dict[int, Said]]) -> None:
    """Whole cells of the grid are found stored, and what is behind them computed as ever."""
    engine = engine_of(model)
    for turn, which in enumerate((4, 5, 4, 5)):
        before = engine.stats.prefilled
        number = engine.add(REQUESTS[which])
        assert said(run_out(engine), number) == alone[which]
        length = len(REQUESTS[which].prompt.ids)
        assert engine.stats.prefilled - before == length - (512 if turn else 0)


def test_shapes_are_those_of_one_alone(model: VideoModel) -> None:
    """One frame, one cell of a prompt or one token passes at a time, whoever is served."""
    passed: list[tuple[int, tuple[int, ...]]] = []
    hooks = (
        model.model.vision_tower.register_forward_pre_hook(
            lambda _, given: passed.append((len(given[0]), ()))
        ),
        model.decoder.register_forward_pre_hook(
            lambda _, given: passed.append((len(given[0]), given[1].lengths))
        ),
    )
    engine = engine_of(model)
    for request in REQUESTS:
        engine.add(request)
    run_out(engine)
    for hook in hooks:
        hook.remove()
    assert {count for count, lengths in passed if not lengths} == {1}
    assert all(lengths == (count,) for count, lengths in passed if lengths)
    rests = {len(request.prompt.ids) % 512 for request in REQUESTS}
    assert {count for count, lengths in passed if lengths} == {1, 512, *rests}


def test_those_who_give_way(model: VideoModel, alone: list[dict[int, Said]]) -> None:
    engine = engine_of(model, 10, share=False)
    numbers = [engine.add(REQUESTS[which]) for which in (0, 2, 1)]
    events = run_out(engine)
    assert [said(events, number) for number in numbers] == [alone[0], alone[2], alone[1]]


def test_without_kernels(model: VideoModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vidlm.native.ops.library", lambda: None)
    engine = engine_of(model)
    single = engine_of(model)
    number = single.add(REQUESTS[1])
    wanted = said(run_out(single), number)
    numbers = [engine.add(request) for request in REQUESTS]
    assert said(run_out(engine), numbers[1]) == wanted


def test_it_is_needed(model: VideoModel, alone: list[dict[int, Said]]) -> None:
    """Without it some bits differ: else the tests above would prove little."""
    found = []
    for chunk in (1, 3, 100, 512):
        engine = Stepped(model, options=EngineOptions(chunk=chunk))
        number, *_ = [engine.add(request) for request in (REQUESTS[4], *REQUESTS)]
        found.append(said(run_out(engine), number))
    assert any(each != alone[4] for each in found)
