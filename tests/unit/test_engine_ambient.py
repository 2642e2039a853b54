"""engine/ambient.py: autocast, gradients and default device of the threads that ask and compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor

import video_forms
import vidlm
from family_forms import FAMILIES, write_family
from saved_files import read
from straight import (
    Stepped,
    about,
    answers,
    asked,
    nothing_is_held,
    run_out,
    straight,
    text,
    tiny_model,
)
from vidlm.engine import EngineOptions, Request, Token, generate, run
from vidlm.engine.store import block_bytes
from vidlm.models.base import VideoModel
from vidlm.types import SamplingParams

NEAR = 0.15  # of log-probabilities in bfloat16, computed in other shapes
QUESTIONS = ("what happens?", "and what does not happen in it?", "what happens?")
CLIP = video_forms.clip(3, frames=4)
FIRST = SamplingParams(max_new_tokens=1, logprobs=5)


def autocast(dtype: torch.dtype = torch.bfloat16) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(request.param, tmp_path_factory.mktemp(request.param))


def first(tokens: Iterator[Token]) -> dict[int, float]:
    """The likeliest first tokens with their log-probabilities."""
    (token,) = tokens
    return dict(token.top)


def near(one: dict[int, float], other: dict[int, float]) -> bool:
    same = one.keys() & other.keys()
    return len(same) > 1 and all(abs(one[id] - other[id]) < NEAR for id in same)


# ---- autocast ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"kv_dtype": "int8"}, {"exact": True}, {"share": False}])
def test_every_question_under_autocast(folder: Path, options: dict[str, Any]) -> None:
    """Whatever was asked before, and how: it is answered as `generate` answers it."""
    lm = vidlm.load(folder, engine=EngineOptions(**options))
    plain = lm.ask(CLIP, QUESTIONS[0], max_tokens=4).text
    video = lm.video(CLIP)
    for question in QUESTIONS:
        request = Request(video.prompt(question), FIRST)
        outside = first(run(lm.model, [request]))
        with autocast():
            wanted = first(run(lm.model, [request]))
            assert near(first(lm.engine.stream(request)), wanted)
            assert lm.ask(video, question, max_tokens=4, logprobs=2).logprobs
        assert wanted != outside  # it does act
        assert near(wanted, outside)
    with autocast():
        chat = lm.chat(CLIP, max_tokens=18)
        assert [chat.ask(question).usage.completion_tokens for question in QUESTIONS]
        several = asked(video.prompt(QUESTIONS[0]), 4, n=3, temperature=1.0, seed=1)
        beams = asked(video.prompt(QUESTIONS[0]), 4, num_beams=2)
        assert len(list(lm.engine.stream(several))) == 12
        assert list(lm.engine.stream(beams))
    assert lm.ask(CLIP, QUESTIONS[0], max_tokens=4).text == plain
    assert nothing_is_held(lm.engine)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nothing_that_autocast_made_is_found_without_it(folder: Path, dtype: torch.dtype) -> None:
    """Features, keys and values are found by those questions alone that would have made them."""
    wanted = vidlm.load(folder).ask(CLIP, QUESTIONS[0], max_tokens=6, logprobs=3)
    lm = vidlm.load(folder)
    for _ in range(2):
        with autocast(dtype):
            lm.ask(CLIP, QUESTIONS[0], max_tokens=6)
            before = lm.engine.stats.prefilled
            lm.ask(CLIP, QUESTIONS[0], max_tokens=6)
            again = lm.engine.stats.prefilled - before
        answer = lm.ask(CLIP, QUESTIONS[0], max_tokens=6, logprobs=3)
        assert answer.text == wanted.text
        for mine, other in zip(answer.logprobs, wanted.logprobs, strict=True):
            assert mine.logprob == pytest.approx(other.logprob, abs=2e-5)  # of bfloat16 1e-2
        assert again < answer.usage.prompt_tokens  # but by those it is found


def test_a_video_saved_under_autocast_is_as_without(folder: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    vidlm.load(folder).video(CLIP).save(one)
    lm = vidlm.load(folder)
    with autocast():
        lm.ask(CLIP, QUESTIONS[0], max_tokens=4)
        lm.video(CLIP).save(two)
        assert lm.ask(two, QUESTIONS[0], max_tokens=4).text
    (index, tensors), (other, others) = read(one), read(two)
    assert index == other
    assert all(torch.equal(tensors[name], others[name]) for name in tensors.keys() | others.keys())
    wanted = vidlm.load(folder).ask(CLIP, QUESTIONS[0], max_tokens=4).text
    assert lm.ask(two, QUESTIONS[0], max_tokens=4).text == wanted


# ---- whoever computes ----------------------------------------------------------------------------

REQUESTS = (
    asked(about((1, 2), text(9, 1), text(21)), 8),
    asked(about((1, 2), text(12, 3), text(21)), 8),
    asked(about((), text(30, 2)), 8),
)


@pytest.fixture
def model() -> VideoModel:
    return tiny_model()


@pytest.fixture
def engine(model: VideoModel) -> Stepped:
    return Stepped(model, options=EngineOptions(kv_bytes=100 * block_bytes(model), chunk=24))


@contextmanager
def watched(model: VideoModel) -> Iterator[list[tuple[bool, bool, bool]]]:
    """Whether each pass of the decoder was under autocast, with gradients, in inference mode."""
    seen: list[tuple[bool, bool, bool]] = []

    def see(*_: object) -> None:
        state = torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()
        seen.append((*state, torch.is_inference_mode_enabled()))

    hook = model.decoder.register_forward_pre_hook(see)
    try:
        yield seen
    finally:
        hook.remove()


@contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "nothing": nullcontext,
    "autocast": autocast,
    "gradients": torch.enable_grad,
    "inference mode": torch.inference_mode,
    "a device": lambda: torch.device("meta"),
    "a default device": lambda: default_device("meta"),
}


@pytest.mark.parametrize("state", list(STATES))
def test_who_computes_a_step_changes_nothing(
    model: VideoModel, engine: Stepped, state: str
) -> None:
    """Of requests that were submitted before, without any of it."""
    wanted = [straight(model, request) for request in REQUESTS]
    numbers = [engine.add(request) for request in REQUESTS]
    with STATES[state](), watched(model) as seen:
        found = answers(run_out(engine))
    assert [found[number, 0] for number in numbers] == wanted
    assert set(seen) == {(False, False, True)}
    assert nothing_is_held(engine)


@pytest.mark.parametrize("state", [name for name in STATES if name != "autocast"])
def test_who_submits_changes_nothing_but_by_autocast(
    model: VideoModel, engine: Stepped, state: str
) -> None:
    wanted = [straight(model, request) for request in REQUESTS]
    with STATES[state]():
        numbers = [engine.add(request) for request in REQUESTS]
    found = answers(run_out(engine))
    assert [found[number, 0] for number in numbers] == wanted
    with STATES[state]():
        assert [token.id for token in engine.stream(REQUESTS[0])] == wanted[0]
        assert list(generate(model, [REQUESTS[0]])[0].ids) == wanted[0]


def test_a_step_for_requests_with_and_without_autocast(model: VideoModel, engine: Stepped) -> None:
    """Each is computed under its own, in the same steps, whoever computes them."""
    wanted = [straight(model, request) for request in REQUESTS]
    with autocast():
        under = [engine.add(request) for request in REQUESTS]
    without = [engine.add(request) for request in REQUESTS]
    with watched(model) as seen, autocast(torch.float16):
        found = answers(run_out(engine))
    assert [found[number, 0] for number in without] == wanted
    assert all(len(found[number, 0]) == 8 for number in under)
    assert {state[0] for state in seen} == {True, False}
    assert engine.stats.features.made == 4  # two frames, each with and without
    assert nothing_is_held(engine)


def test_threads_with_and_without_autocast(model: VideoModel, engine: Stepped) -> None:
    wanted = [straight(model, request) for request in REQUESTS]
    errors: list[BaseException] = []
    found: dict[int, Sequence[int]] = {}

    def work(i: int) -> None:
        try:
            for _ in range(3):
                with autocast() if i % 2 else nullcontext():
                    found[i] = [token.id for token in engine.stream(REQUESTS[i % 3])]
                assert i % 2 or found[i] == wanted[i % 3]
        except BaseException as error:
            errors.append(error)

    threads = [Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not errors
    assert len(found) == 6
    assert nothing_is_held(engine)


def test_features_are_those_of_the_thread_that_asks(model: VideoModel, engine: Stepped) -> None:
    media = REQUESTS[0].prompt.media
    plain: list[Tensor] = [encoded.tokens for encoded in engine.features(media)]
    with autocast():
        under = [encoded.tokens for encoded in engine.features(media)]
    assert all(not a.float().equal(b.float()) for a, b in zip(plain, under, strict=True))
    again = [encoded.tokens for encoded in engine.features(media)]
    assert all(a is b for a, b in zip(plain, again, strict=True))
