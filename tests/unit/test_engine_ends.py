"""engine/: requests that are dropped, fail or are interrupted leave nothing, and others alone."""

from __future__ import annotations

import gc
import random
from collections.abc import Generator, Sequence
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from straight import (
    Stepped,
    about,
    ask,
    asked,
    nothing_is_held,
    run_out,
    straight,
    text,
    tiny_model,
)
from vidlm.engine import EngineOptions, Failure, Request, Token
from vidlm.engine.store import block_bytes
from vidlm.models.base import Encoded, Media, VideoModel

NEW = 8
SYSTEM = text(21)
REQUESTS = (
    asked(about((1, 2), text(9, 1), SYSTEM), NEW),
    asked(about((), text(30, 2)), NEW),
    asked(about((1, 2), text(7, 3), SYSTEM), NEW, n=2, temperature=1.0, seed=1),
    asked(about((3,), text(12, 4)), NEW, num_beams=3),
)


@pytest.fixture
def model() -> VideoModel:
    return tiny_model()


@pytest.fixture
def engine(model: VideoModel) -> Stepped:
    return small(model, 100)


def small(model: VideoModel, blocks: int, **how: Any) -> Stepped:
    return Stepped(model, options=EngineOptions(kv_bytes=blocks * block_bytes(model), **how))


def fails(events: Sequence[Token | Failure]) -> dict[int, BaseException]:
    return {event.request: event.error for event in events if isinstance(event, Failure)}


def said(events: Sequence[Token | Failure], request: int) -> list[int]:
    return [e.id for e in events if isinstance(e, Token) and e.request == request]


# ---- dropped -------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32), steps=st.integers(0, 12))
def test_an_abort_at_any_time_leaves_nothing(seed: int, steps: int) -> None:
    rng = random.Random(seed)
    engine = small(tiny_model(), rng.choice([30, 100]), chunk=rng.choice([6, 16, 512]))
    numbers = [engine.add(request) for request in rng.sample(REQUESTS, 3)]
    events: list[Token | Failure] = []
    for _ in range(steps):
        events += engine.events()
    rng.shuffle(numbers)
    for number in numbers:
        engine.abort(number)
        assert not said(engine.events(), number)
        engine.abort(number)  # which it is no error to do again
    assert engine.idle
    assert nothing_is_held(engine)
    assert engine.events() == []


def test_leaving_an_iterator_aborts(engine: Stepped) -> None:
    stream = engine.stream(REQUESTS[0])
    next(stream)
    assert not engine.idle
    stream.close()
    assert engine.idle
    assert nothing_is_held(engine)
    for token in engine.stream(REQUESTS[1]):
        assert token.finish is None
        break
    gc.collect()
    assert nothing_is_held(engine)


def test_an_iterator_that_is_dropped_during_a_step(model: VideoModel, engine: Stepped) -> None:
    """As when the garbage collector finds it there."""
    abandoned = [engine.stream(REQUESTS[0])]
    next(abandoned[0])

    def drop(*_: object) -> None:
        if abandoned:
            abandoned.pop().close()

    hook = model.decoder.register_forward_hook(drop)
    try:
        assert ask(engine, REQUESTS[1]) == straight(model, REQUESTS[1])
    finally:
        hook.remove()
    assert not abandoned
    assert nothing_is_held(engine)


def test_an_abort_during_a_step_is_settled_at_its_end(model: VideoModel, engine: Stepped) -> None:
    number = engine.add(REQUESTS[0])
    other = engine.add(REQUESTS[1])
    hook = model.decoder.register_forward_hook(lambda *_: engine.abort(number))
    engine.events()
    engine.events()
    hook.remove()
    assert not said(engine.events(), number)
    assert said(run_out(engine), other)


# ---- what goes wrong -----------------------------------------------------------------------------


class Broken(Exception):
    """What a model raises."""


def break_encoding(model: VideoModel, item: Media, after: int = 1) -> None:
    """Make the encoding of one item fail after so many chunks."""
    encoding = type(model)._encoding

    def broken(media: Sequence[Media]) -> Generator[None, None, list[Encoded]]:
        for _ in range(after):
            yield
        if any(each.digest == item.digest for each in media):
            raise Broken("no such picture")
        return (yield from encoding(model, media))

    object.__setattr__(model, "_encoding", broken)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_encoding_that_fails_ends_its_request_alone(
    model: VideoModel, engine: Stepped, after: int
) -> None:
    wanted = [straight(model, request) for request in REQUESTS[:2]]
    bad = asked(about((1, 9), text(5, 6)), NEW)
    break_encoding(model, bad.prompt.media[1], after)
    numbers = [engine.add(request) for request in (REQUESTS[1], bad, REQUESTS[0])]
    events = run_out(engine)
    assert {number: str(error) for number, error in fails(events).items()} == {
        numbers[1]: "no such picture"
    }
    assert [said(events, number) for number in numbers] == [wanted[1], [], wanted[0]]
    assert nothing_is_held(engine)
    with pytest.raises(Broken):
        ask(engine, bad)
    assert nothing_is_held(engine)


def test_features_of_the_wrong_length(model: VideoModel, engine: Stepped) -> None:
    bad = about((1,), text(5))
    short = bad.media[0].without_pixels(Encoded(torch.zeros(15, 32)))
    with pytest.raises(Exception, match="16 placeholder tokens in the prompt and 15 features"):
        ask(engine, asked(type(bad)(bad.ids, (short,))))
    assert nothing_is_held(engine)


@pytest.mark.parametrize("moment", [1, 2, 5])
def test_a_model_that_fails_ends_those_of_its_step(
    model: VideoModel, engine: Stepped, moment: int
) -> None:
    count = iter(range(100))

    def fail(*_: object) -> None:
        if next(count) == moment:
            raise Broken("out of luck")

    hook = model.decoder.register_forward_hook(fail)
    first = engine.add(REQUESTS[1])
    second = engine.add(REQUESTS[0])
    events = run_out(engine)
    hook.remove()
    assert fails(events).keys() <= {first, second}
    assert len(fails(events)) >= 1
    assert nothing_is_held(engine)
    assert ask(engine, REQUESTS[0]) == straight(model, REQUESTS[0])


def test_a_draw_that_fails_ends_its_request_alone(model: VideoModel, engine: Stepped) -> None:
    """Logits of one request that are no numbers: its draw has nothing to draw from."""
    logits = type(model).logits

    def spoiled(h: torch.Tensor) -> torch.Tensor:
        rows = logits(model, h).clone()
        if len(rows) == 2:
            rows[1] = torch.nan
        return rows

    object.__setattr__(model, "logits", spoiled)
    good = engine.add(REQUESTS[1])
    bad = engine.add(asked(about((), text(11, 5)), NEW, temperature=1.0, seed=1))
    events = run_out(engine)
    assert fails(events).keys() == {bad}
    assert len(said(events, good)) == NEW
    assert nothing_is_held(engine)


@pytest.mark.parametrize("moment", [0, 1, 4])
def test_an_interrupt_reaches_the_caller_alone(
    model: VideoModel, engine: Stepped, moment: int
) -> None:
    """What the step had not stored is computed once more."""
    wanted = [straight(model, request) for request in REQUESTS[:2]]
    count = iter(range(100))

    def interrupt(*_: object) -> None:
        if next(count) == moment:
            raise KeyboardInterrupt

    numbers = [engine.add(request) for request in REQUESTS[:2]]
    hook = model.decoder.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(engine.stream(asked(about((), text(12, 8)), NEW)))
    events = run_out(engine)
    hook.remove()
    assert [said(events, number) for number in numbers] == wanted
    assert not fails(events)
    assert nothing_is_held(engine)


def test_an_interrupt_while_media_are_encoded(model: VideoModel, engine: Stepped) -> None:
    encoding, calls = type(model)._encoding, iter(range(9))

    def interrupted(media: Sequence[Media]) -> Generator[None, None, list[Encoded]]:
        if next(calls) == 0:
            raise KeyboardInterrupt
        return (yield from encoding(model, media))

    object.__setattr__(model, "_encoding", interrupted)
    number = engine.add(REQUESTS[0])
    with pytest.raises(KeyboardInterrupt):
        run_out(engine)
    assert said(run_out(engine), number) == straight(tiny_model(), REQUESTS[0])


def test_an_interrupt_where_tokens_are_chosen(
    model: VideoModel, engine: Stepped, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows then whether a draw was made: that request ends, and the caller is told."""
    number = engine.add(REQUESTS[1])

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("vidlm.engine.sampler.Sampler.take", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_out(engine)
    assert isinstance(fails(run_out(engine))[number], KeyboardInterrupt)
    assert nothing_is_held(engine)
    assert ask(engine, REQUESTS[1]) == straight(model, REQUESTS[1])


# ---- threads -------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 5])
def test_threads_stream_from_one_engine(model: VideoModel, engine: Stepped, count: int) -> None:
    """Each gets its own tokens, all of them, and they share what is alike."""
    requests = [asked(about((1, 2), text(6 + i, 10 + i), SYSTEM), 20) for i in range(count)]
    wanted = [straight(model, request) for request in requests]
    found: dict[int, list[int]] = {}
    errors: list[BaseException] = []
    barrier = Barrier(count, timeout=60)

    def work(i: int) -> None:
        try:
            barrier.wait()
            for _ in range(2):
                found[i] = ask(engine, requests[i])
        except BaseException as error:
            errors.append(error)

    threads = [Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not errors
    assert [found[i] for i in range(count)] == wanted
    assert nothing_is_held(engine)


def test_the_failure_of_one_of_several(model: VideoModel, engine: Stepped) -> None:
    bad = asked(about((9,), text(5, 6)), NEW)
    break_encoding(model, bad.prompt.media[0])
    with pytest.raises(Broken):
        list(engine.stream_all([bad, REQUESTS[1]]))
    assert engine.idle
    assert nothing_is_held(engine)


# ---- other weights -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["in place", "replaced"])
def test_other_weights_forget_what_was_cached(model: VideoModel, engine: Stepped, how: str) -> None:
    request = REQUESTS[0]
    before = ask(engine, request)
    other = dict(tiny_model(seed=11).named_parameters())
    for name, weight in model.named_parameters():
        if how == "in place":
            weight.copy_(other[name])
        else:
            weight.data = other[name].data.clone()
    after = ask(engine, request)
    assert after == straight(model, request) != before
    assert engine.stats.prefilled == len(request.prompt.ids)


def test_weights_that_change_while_others_are_answered(model: VideoModel, engine: Stepped) -> None:
    """They go on, half made by one and half by the other; nothing of it is found later."""
    stream = engine.stream(Request(REQUESTS[0].prompt, asked(REQUESTS[0].prompt, 40).params))
    next(stream)
    model.head.weight.mul_(0.9)
    model.decoder.norm.weight.add_(0.5)
    fresh = ask(engine, REQUESTS[0])
    assert fresh == straight(model, REQUESTS[0])
    assert len(list(stream)) == 39
    assert ask(engine, REQUESTS[0]) == fresh
    assert nothing_is_held(engine)
