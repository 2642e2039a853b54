"""engine/: an answer is the same whoever else is served, however it is cut, stored and shared."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from straight import (
    Stepped,
    about,
    answers,
    ask,
    asked,
    nothing_is_held,
    run_out,
    straight,
    text,
    tiny_model,
)
from vidlm.engine import EngineOptions, Failure, Request, Token, generate
from vidlm.engine.options import BLOCK
from vidlm.engine.store import block_bytes
from vidlm.models.base import Prompt, VideoModel
from vidlm.types import FinishReason

NEW = 10


@pytest.fixture(scope="module")
def model() -> VideoModel:
    return tiny_model()


@pytest.fixture(params=["kernels", "plain"])
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compiled kernels, where this machine has them, and without."""
    if request.param == "plain":
        monkeypatch.setattr("vidlm.native.ops.library", lambda: None)


SYSTEM = text(21)
PROMPTS: tuple[Prompt, ...] = (
    about((), text(5)),
    about((1, 2, 3), text(9, 1), SYSTEM),
    about((1, 2, 3), text(12, 2), SYSTEM),  # another question about the same
    about((1, 3, 2), text(9, 1), SYSTEM),  # in another order
    about((4,), text(40, 3)),
    about((), text(70, 4)),
    about((1, 2), text(7, 5)),
    about((5, 6), text(11, 6), text(32, 7)),  # the frames begin where a block does
    about((7,), text(16, 8)),  # ends where a block does
)


@cache
def known(prompt: int, new: int = NEW, eos: tuple[int, ...] = ()) -> tuple[int, ...]:
    """The straightforward answer."""
    request = asked(PROMPTS[prompt], new, eos_token_ids=eos)
    return tuple(straight(tiny_model(), request))


def options(model: VideoModel, blocks: int = 200, **how: object) -> EngineOptions:
    return EngineOptions(kv_bytes=blocks * block_bytes(model), **how)  # type: ignore[arg-type]


# ---- alone ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 16, 512])
@pytest.mark.usefixtures("native")
def test_alone(model: VideoModel, chunk: int) -> None:
    engine = Stepped(model, options=options(model, chunk=chunk))
    for i, prompt in enumerate(PROMPTS):
        assert ask(engine, asked(prompt, NEW)) == list(known(i)), i
    assert nothing_is_held(engine)


@pytest.mark.usefixtures("native")
def test_asked_again(model: VideoModel) -> None:
    """Out of the cache, in which every prompt is by then, and the answers too."""
    engine = Stepped(model, options=options(model))
    for turn in range(3):
        for i, prompt in enumerate(PROMPTS):
            before = engine.stats.scheduler.pool.hits
            assert ask(engine, asked(prompt, NEW)) == list(known(i)), i
            hits = engine.stats.scheduler.pool.hits - before
            if turn:
                assert hits == (len(prompt.ids) - 1) // BLOCK * BLOCK


def test_all_at_once(model: VideoModel) -> None:
    requests = [asked(prompt, NEW) for prompt in PROMPTS]
    for share in (False, True):
        outputs = generate(model, requests, options=options(model, share=share))
        assert [output.ids for output in outputs] == [known(i) for i in range(len(PROMPTS))]
        assert {output.finish for output in outputs} == {FinishReason.LENGTH}


@pytest.mark.parametrize("form", list(tiny.FORMS))
def test_forms(form: str) -> None:
    model = tiny_model(form)
    request = asked(about((1, 2), text(20, 1), SYSTEM), NEW)
    engine = Stepped(model, options=options(model, chunk=13))
    said = straight(model, request)
    assert len(set(said)) > 3
    assert ask(engine, request) == ask(engine, request) == said


# ---- in company ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Program:
    """Requests that arrive between steps, some of which nobody waits for."""

    blocks: int
    chunk: int
    sequences: int
    share: bool
    seed: int


programs = st.builds(
    Program,
    blocks=st.integers(8, 40),
    chunk=st.sampled_from([1, 5, 16, 33, 512]),
    sequences=st.integers(1, 6),
    share=st.booleans(),
    seed=st.integers(0, 2**32),
)


def variants(rng: random.Random) -> Request:
    """Any of the prompts, with an end or without, for one answer, several or beams."""
    number = rng.randrange(len(PROMPTS))
    new = rng.randint(1, NEW)
    eos = (known(number)[rng.randrange(NEW)],) if rng.random() < 0.4 else ()
    n = rng.choice([1, 1, 1, 2, 3])
    return asked(PROMPTS[number], new, eos_token_ids=eos, n=n)


@settings(max_examples=40)
@given(program=programs)
def test_any_company(model: VideoModel, program: Program) -> None:
    """The tokens of every request are those that it gets alone, whenever others come and go, and
    whether or not it had to give way; of an aborted one, nothing comes and nothing stays."""
    rng = random.Random(program.seed)
    engine = Stepped(model, options=limits(model, program))
    wanted: dict[int, Request] = {}
    events: list[Token | Failure] = []
    for _ in range(rng.randint(3, 25)):
        done = rng.random()
        if done < 0.45:
            request = variants(rng)
            wanted[engine.add(request)] = request
        elif done < 0.55 and wanted:
            number = rng.choice([*wanted])
            engine.abort(number)
            del wanted[number]
            events = [event for event in events if event.request != number]
        else:
            events += engine.events()
    events += run_out(engine)
    assert nothing_is_held(engine)
    found = answers(events)
    for number, request in wanted.items():
        want = expected(request)
        for choice in range(request.params.n):
            assert tuple(found.pop((number, choice))) == want, (number, choice)
    assert not found


def limits(model: VideoModel, program: Program) -> EngineOptions:
    return options(
        model,
        program.blocks,
        chunk=program.chunk,
        max_sequences=program.sequences,
        share=program.share,
    )


def expected(request: Request) -> tuple[int, ...]:
    params = request.params
    return known(PROMPTS.index(request.prompt), params.max_new_tokens, params.eos_token_ids)


def test_those_who_give_way_lose_nothing(model: VideoModel) -> None:
    """Two answers that do not fit beside each other to their ends."""
    engine = Stepped(model, options=options(model, 13))
    requests = [asked(PROMPTS[i], 60) for i in (1, 3, 2)]
    wanted = [straight(model, request) for request in requests]
    numbers = [engine.add(request) for request in requests]
    found = answers(run_out(engine))
    assert [found[number, 0] for number in numbers] == wanted
    assert engine.stats.scheduler.preempted > 0
    assert nothing_is_held(engine)


@pytest.mark.parametrize("blocks", range(9, 15))
def test_the_same_twice_where_one_gives_way(model: VideoModel, blocks: int) -> None:
    """What it had stored is another's by then; what it finds stored in its place is the other's."""
    request = asked(PROMPTS[4], 70)
    wanted = straight(model, request)
    engine = Stepped(model, options=options(model, blocks))
    numbers = [engine.add(request) for _ in range(3)]
    found = answers(run_out(engine))
    assert [found[number, 0] for number in numbers] == [wanted] * 3
    assert nothing_is_held(engine)


def test_beams_beside_others(model: VideoModel) -> None:
    """Whose blocks are kept aside, and who are copied, whoever else is served."""
    beams = [asked(PROMPTS[i], 20, num_beams=count) for i, count in ((1, 3), (4, 2), (2, 4))]
    alone = [generate(model, [request])[0].ids for request in beams]
    engine = Stepped(model, options=options(model, 60, chunk=24))
    numbers = [engine.add(request) for request in beams]
    others = {engine.add(asked(prompt, NEW)): i for i, prompt in enumerate(PROMPTS)}
    found = answers(run_out(engine))
    assert [tuple(found[number, 0]) for number in numbers] == alone
    assert all(tuple(found[number, 0]) == known(i) for number, i in others.items())
    assert nothing_is_held(engine)


def test_streams_serve_each_other(model: VideoModel) -> None:
    """Two iterators of one thread, in turns: the steps of one bring the tokens of the other."""
    engine = Stepped(model, options=options(model))
    numbers = (1, 5)
    streams = [engine.stream(asked(PROMPTS[i], NEW)) for i in numbers]
    said: list[list[int]] = [[], []]
    for _ in range(NEW):
        for stream, ids in zip(streams, said, strict=True):
            ids.append(next(stream).id)
    assert [tuple(ids) for ids in said] == [known(i) for i in numbers]
    assert [list(stream) for stream in streams] == [[], []]
    assert nothing_is_held(engine)
