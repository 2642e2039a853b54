"""Engine.submit: one act from any thread; each token to its sink, once; and who pays for what."""

from __future__ import annotations

import asyncio
import random
import sys
import threading
from collections.abc import Iterator
from contextlib import aclosing
from threading import Event, Thread, current_thread

import pytest

from straight import about, ask, asked, nothing_is_held, straight, text, tiny_model
from vidlm.engine import AsyncEngine, Engine, EngineOptions, Failure, Handle, Token, store
from vidlm.engine.store import Store, block_bytes
from vidlm.errors import EngineClosed, InvalidArgument
from vidlm.models.base import VideoModel

LIMIT = 60  # seconds that nothing here comes near, unless something waits for ever
NEW = 8
SYSTEM = text(21)
REQUESTS = tuple(asked(about((i % 3 + 1,), text(6 + i, i), SYSTEM), NEW) for i in range(5))


@pytest.fixture
def model() -> VideoModel:
    return tiny_model()


@pytest.fixture
def engine(model: VideoModel) -> Engine:
    return Engine(model, options=EngineOptions(kv_bytes=80 * block_bytes(model), chunk=24))


@pytest.fixture
def wanted(model: VideoModel) -> list[list[int]]:
    return [straight(model, request) for request in REQUESTS]


@pytest.fixture
def often() -> Iterator[None]:
    """Threads that take turns a hundred times as often."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


class Sink:
    """Takes what comes, and knows when it is all."""

    def __init__(self) -> None:
        self.events: list[Token | Failure] = []
        self.done = Event()

    def __call__(self, event: Token | Failure) -> None:
        assert not self.done.is_set(), "something came after the end"
        self.events.append(event)
        if isinstance(event, Failure) or event.finish:
            self.done.set()

    @property
    def ids(self) -> list[int]:
        return [event.id for event in self.events if isinstance(event, Token)]


def run_out(engine: Engine) -> None:
    while engine.step():
        pass


# ---- nothing is lost, nothing doubled ------------------------------------------------------------


def test_tokens_come_to_the_sink_whoever_steps(engine: Engine, wanted: list[list[int]]) -> None:
    sinks = [Sink() for _ in REQUESTS]
    handles = [engine.submit(r, sink) for r, sink in zip(REQUESTS, sinks, strict=True)]
    assert ask(engine, asked(about((), text(40, 9)), 40))  # its steps bring all of theirs
    assert [sink.ids for sink in sinks] == wanted
    assert {event.request for event in sinks[2].events} == {handles[2].id}
    assert engine.idle
    assert not engine.step()
    for handle in handles:
        handle.cancel()  # which it is no error to do now


def test_late_readers_beside_an_async_engine(engine: Engine, wanted: list[list[int]]) -> None:
    """Its thread makes all the steps; what it computes for others is theirs nevertheless."""

    async def work() -> None:
        long = asked(about((), text(30, 8)), 100)
        async with AsyncEngine(engine) as served, aclosing(served.stream(long)) as busy:
            await anext(busy)
            sink = Sink()
            engine.submit(REQUESTS[0], sink)
            stream = await asyncio.to_thread(engine.stream, REQUESTS[1])
            assert await asyncio.to_thread(sink.done.wait, LIMIT)
            assert sink.ids == wanted[0]
            assert [t.id for t in await asyncio.to_thread(list, stream)] == wanted[1]

    asyncio.run(asyncio.wait_for(work(), LIMIT))
    assert nothing_is_held(engine)


def test_eight_threads_beside_an_async_engine(
    engine: Engine, wanted: list[list[int]], often: None
) -> None:
    """Each submits, streams, cancels and clears at random."""
    errors: list[BaseException] = []
    finished = [0, 0, 0]

    def one(served: AsyncEngine, rng: random.Random) -> None:
        which, how = rng.randrange(len(REQUESTS)), rng.randrange(6)
        if how < 2:
            sink = Sink()
            handle = engine.submit(REQUESTS[which], sink)
            assert ask(engine, REQUESTS[which - 1]) == wanted[which - 1]
            if how:
                handle.cancel()
                came = len(sink.ids)
                ask(engine, REQUESTS[which])
                assert len(sink.ids) - came <= 1  # one that was on its way
                assert sink.ids == wanted[which][: len(sink.ids)]
                return
            while not sink.done.is_set():
                engine.step()
            assert sink.ids == wanted[which]
            finished[0] += 1
        elif how == 2:
            stream = engine.stream(REQUESTS[which])
            some = [next(stream).id for _ in range(rng.randint(1, 5))]
            stream.close()
            assert some == wanted[which][: len(some)]
        elif how == 3:
            engine.clear()
            assert ask(engine, REQUESTS[which]) == wanted[which]
            finished[1] += 1
        else:
            asyncio.run(coroutine(served, which, rng.randrange(3)))

    async def coroutine(served: AsyncEngine, which: int, leave: int) -> None:
        ids: list[int] = []
        async with aclosing(served.stream(REQUESTS[which])) as stream:
            async for token in stream:
                ids.append(token.id)
                if leave and len(ids) == leave:
                    break
        assert ids == wanted[which][: len(ids)]
        finished[2] += len(ids) == NEW

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(6):
                one(served, rng)
        except BaseException as error:
            errors.append(error)

    served = AsyncEngine(engine)
    threads = [Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    served.close()
    assert not errors
    assert not any(thread.is_alive() for thread in threads)
    assert all(finished)
    assert engine.idle
    assert nothing_is_held(engine)


def test_closing_while_others_submit(engine: Engine, often: None) -> None:
    """All answers come whole, or are told that it is closed."""
    served = AsyncEngine(engine)
    ends: list[object] = []

    async def answer() -> None:
        try:
            ends.append(len([token async for token in served.stream(REQUESTS[0])]))
        except EngineClosed as error:
            ends.append(type(error))

    async def many() -> None:
        await asyncio.gather(*(answer() for _ in range(10)))

    threads = [Thread(target=lambda: asyncio.run(many())) for _ in range(3)]
    for thread in threads:
        thread.start()
    served.close()
    for thread in threads:
        thread.join(LIMIT)
    assert len(ends) == 30
    assert set(ends) <= {NEW, EngineClosed}
    assert engine.idle
    assert nothing_is_held(engine)


# ---- sinks ---------------------------------------------------------------------------------------


def test_a_sink_that_fails_ends_its_request_alone(
    engine: Engine, wanted: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[Token | Failure] = []

    def bad(event: Token | Failure) -> None:
        calls.append(event)
        if len(calls) == 3:
            raise RuntimeError("no room for it")

    good = Sink()
    engine.submit(REQUESTS[0], bad)
    engine.submit(REQUESTS[1], good)
    run_out(engine)
    assert len(calls) == 3
    assert good.ids == wanted[1]
    assert "no room for it" in caplog.text
    assert engine.idle
    assert nothing_is_held(engine)


def test_an_interrupt_in_a_sink_reaches_who_steps(engine: Engine, wanted: list[list[int]]) -> None:
    calls: list[Token | Failure] = []

    def interrupted(event: Token | Failure) -> None:
        calls.append(event)
        if len(calls) == 2:
            raise KeyboardInterrupt

    sinks = Sink(), Sink()
    engine.submit(REQUESTS[0], sinks[0])
    engine.submit(REQUESTS[2], interrupted)
    engine.submit(REQUESTS[1], sinks[1])
    with pytest.raises(KeyboardInterrupt):
        run_out(engine)
    run_out(engine)
    assert [sink.ids for sink in sinks] == wanted[:2]
    assert isinstance(calls[2], Failure)
    assert isinstance(calls[2].error, KeyboardInterrupt)
    assert len(calls) == 3
    assert nothing_is_held(engine)


def test_a_sink_may_submit_and_cancel(engine: Engine, wanted: list[list[int]]) -> None:
    handles: list[Handle] = []
    calls: list[Token | Failure] = []
    other = Sink()

    def first(event: Token | Failure) -> None:
        calls.append(event)
        if len(calls) == 2:
            handles[0].cancel()
            engine.submit(REQUESTS[1], other)

    handles.append(engine.submit(REQUESTS[0], first))
    run_out(engine)
    assert len(calls) == 2
    assert other.ids == wanted[1]
    assert nothing_is_held(engine)


def test_cancelled_before_a_step_met_it(engine: Engine, wanted: list[list[int]]) -> None:
    sinks = Sink(), Sink()
    handle = engine.submit(REQUESTS[0], sinks[0])
    engine.submit(REQUESTS[1], sinks[1])
    handle.cancel()
    assert engine.stats.scheduler.waiting == 1
    run_out(engine)
    assert not sinks[0].events
    assert sinks[1].ids == wanted[1]


# ---- between submit and the first step -----------------------------------------------------------


def test_what_is_cleared_or_trained_meanwhile(model: VideoModel, engine: Engine) -> None:
    ask(engine, REQUESTS[0])  # its features and prompt are known now
    sinks = Sink(), Sink()
    engine.submit(REQUESTS[0], sinks[0])
    engine.clear()
    engine.submit(REQUESTS[1], sinks[1])
    model.head.weight.mul_(0.9)
    model.decoder.norm.weight.add_(0.5)
    for parameter in model.body.vision_tower.parameters():
        parameter.mul_(1.1)
    run_out(engine)
    assert [sink.ids for sink in sinks] == [straight(model, request) for request in REQUESTS[:2]]
    assert nothing_is_held(engine)


def test_a_cache_that_became_too_small(model: VideoModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "free_for_layers", lambda _: 200 * block_bytes(model))
    engine, sink = Engine(model), Sink()
    engine.submit(REQUESTS[0], sink)
    monkeypatch.setattr(store, "free_for_layers", lambda _: 4 * block_bytes(model))
    engine.clear()
    run_out(engine)
    (failure,) = sink.events
    assert isinstance(failure, Failure)
    assert isinstance(failure.error, InvalidArgument)
    with pytest.raises(InvalidArgument, match="give more kv_bytes"):
        engine.submit(REQUESTS[0], Sink())
    assert engine.idle


# ---- who pays ------------------------------------------------------------------------------------


def test_submitting_waits_for_no_step(
    model: VideoModel, engine: Engine, wanted: list[list[int]]
) -> None:
    held, go = Event(), Event()

    def hold(*_: object) -> None:
        held.set()
        assert go.wait(LIMIT)

    hook = model.decoder.register_forward_hook(hold)
    thread = Thread(target=lambda: ask(engine, REQUESTS[0]))
    thread.start()
    assert held.wait(LIMIT)
    sink, cancelled = Sink(), Sink()
    engine.submit(REQUESTS[1], sink)
    engine.submit(REQUESTS[2], cancelled).cancel()
    assert not engine.idle
    hook.remove()
    go.set()
    thread.join(LIMIT)
    run_out(engine)
    assert sink.ids == wanted[1]
    assert not cancelled.events


def test_prompts_are_prepared_beside_the_engines_thread(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Digests of pixels and keys of blocks; nor does the event loop wait for them."""
    keys, seen = Store.keys, set[str]()

    def watched(self: Store, inputs: object) -> list[bytes]:
        seen.add(current_thread().name)
        return keys(self, inputs)  # type: ignore[arg-type]

    monkeypatch.setattr(Store, "keys", watched)

    async def work() -> None:
        async with AsyncEngine(engine) as served:
            assert len([token async for token in served.stream(REQUESTS[0])]) == NEW

    asyncio.run(asyncio.wait_for(work(), LIMIT))
    assert {name.rpartition("_")[0] for name in seen} == {"vidlm-prepare"}
    assert not [t for t in threading.enumerate() if t.name.startswith("vidlm-")]
