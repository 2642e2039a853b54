"""engine/aio.py: coroutines come, go, fail and are cancelled, and one thread serves them all."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

import pytest

from straight import about, asked, nothing_is_held, straight, text, tiny_model
from vidlm.engine import AsyncEngine, Engine, EngineOptions, Request
from vidlm.engine.store import block_bytes
from vidlm.errors import EngineClosed, InvalidArgument
from vidlm.models.base import Prompt, VideoModel

T = TypeVar("T")
LIMIT = 60  # seconds that nothing here comes near, unless something waits for ever
NEW = 8
REQUESTS = tuple(asked(about((i % 3 + 1,), text(6 + i, i), text(21)), NEW) for i in range(6))


@pytest.fixture
def model() -> VideoModel:
    return tiny_model()


@pytest.fixture
def engine(model: VideoModel) -> Engine:
    return Engine(model, options=EngineOptions(kv_bytes=80 * block_bytes(model), chunk=24))


def finish(work: Coroutine[Any, Any, T]) -> T:
    async def bounded() -> T:
        return await asyncio.wait_for(work, LIMIT)

    return asyncio.run(bounded())


async def said(engine: AsyncEngine, request: Request) -> list[int]:
    return [token.id async for token in engine.stream(request)]


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name == "vidlm-engine"}


# ---- answers -------------------------------------------------------------------------------------


def test_many_coroutines(model: VideoModel, engine: Engine) -> None:
    wanted = [straight(model, request) for request in REQUESTS]

    async def work() -> list[list[int]]:
        async with AsyncEngine(engine) as served:
            assert threads()
            return await asyncio.gather(*(said(served, request) for request in REQUESTS * 3))

    assert finish(work()) == wanted * 3
    assert not threads()
    assert nothing_is_held(engine)
    assert engine.stats.features.made == 3


def test_choices_and_beams(engine: Engine) -> None:
    async def work() -> tuple[list[tuple[int, int]], list[int]]:
        async with AsyncEngine(engine) as served:
            prompt = REQUESTS[0].prompt
            several = asked(prompt, NEW, n=3, temperature=1.0, seed=1)
            tokens = [t async for t in served.stream(several)]
            beams = await said(served, asked(prompt, NEW, num_beams=3))
            return [(t.choice, t.id) for t in tokens], beams

    tokens, beams = finish(work())
    assert sorted(choice for choice, _ in tokens) == sorted([0, 1, 2] * NEW)
    assert len(beams) == NEW
    assert nothing_is_held(engine)


def test_coroutines_of_two_loops(model: VideoModel, engine: Engine) -> None:
    """Each in a thread of its own, beside a thread that streams without any."""
    wanted = [straight(model, request) for request in REQUESTS[:3]]
    served = AsyncEngine(engine)
    found: dict[int, list[int]] = {}

    def loop(i: int) -> None:
        found[i] = finish(said(served, REQUESTS[i]))

    def plain() -> None:
        found[2] = [token.id for token in engine.stream(REQUESTS[2])]

    workers = [threading.Thread(target=loop, args=(i,)) for i in range(2)]
    workers.append(threading.Thread(target=plain))
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(LIMIT)
    served.close()
    assert [found[i] for i in range(3)] == wanted
    assert nothing_is_held(engine)


# ---- those who leave -----------------------------------------------------------------------------


def test_leaving_the_iteration(model: VideoModel, engine: Engine) -> None:
    wanted = straight(model, REQUESTS[1])

    async def work() -> list[int]:
        async with AsyncEngine(engine) as served:
            async with aclosing(served.stream(asked(REQUESTS[0].prompt, 100))) as stream:
                async for _ in stream:
                    break
            return await said(served, REQUESTS[1])

    assert finish(work()) == wanted
    assert engine.idle
    assert nothing_is_held(engine)


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_cancelled_tasks(model: VideoModel, engine: Engine, tokens: int) -> None:
    """Before anything came, and after; others are served on."""
    wanted = [straight(model, request) for request in REQUESTS[:2]]

    async def work() -> list[list[int]]:
        async with AsyncEngine(engine) as served:
            came = asyncio.Queue[int]()

            async def endless() -> None:
                async for token in served.stream(asked(REQUESTS[2].prompt, 200)):
                    came.put_nowait(token.id)

            task = asyncio.create_task(endless())
            others = [asyncio.create_task(said(served, request)) for request in REQUESTS[:2]]
            await asyncio.sleep(0)  # it has asked, and nobody has answered yet
            for _ in range(tokens):
                await came.get()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return await asyncio.gather(*others)

    assert finish(work()) == wanted
    assert engine.idle
    assert nothing_is_held(engine)


def test_cancelled_where_the_thread_is_busy(engine: Engine, model: VideoModel) -> None:
    """The request comes in when nobody waits for it any more."""
    held, go = threading.Event(), threading.Event()

    def hold(*_: object) -> None:
        held.set()
        assert go.wait(LIMIT)

    async def work() -> None:
        async with AsyncEngine(engine) as served:
            hook = model.decoder.register_forward_hook(hold)
            first = asyncio.create_task(said(served, REQUESTS[0]))
            await asyncio.to_thread(held.wait, LIMIT)
            late = asyncio.create_task(said(served, REQUESTS[1]))
            await asyncio.sleep(0)
            late.cancel()
            with pytest.raises(asyncio.CancelledError):
                await late
            hook.remove()
            go.set()
            assert len(await first) == NEW

    finish(work())
    assert engine.idle
    assert nothing_is_held(engine)


def test_a_loop_that_is_gone(model: VideoModel, engine: Engine) -> None:
    """Its tokens go nowhere, and others get theirs."""
    served = AsyncEngine(engine)

    async def begin() -> AsyncIterator[Any]:
        stream = served.stream(asked(REQUESTS[0].prompt, 60))
        await anext(stream)
        return stream

    loop = asyncio.new_event_loop()
    abandoned = loop.run_until_complete(begin())
    loop.close()
    assert finish(said(served, REQUESTS[1])) == straight(model, REQUESTS[1])
    served.close()
    assert engine.idle
    assert nothing_is_held(engine)
    del abandoned


# ---- what goes wrong -----------------------------------------------------------------------------


def test_what_is_refused(engine: Engine) -> None:
    async def work() -> None:
        async with AsyncEngine(engine) as served:
            with pytest.raises(InvalidArgument, match="prompt is empty"):
                await said(served, asked(Prompt(())))
            assert len(await said(served, REQUESTS[0])) == NEW

    finish(work())


@pytest.mark.parametrize("error", [RuntimeError("no luck"), SystemExit(3)])
def test_a_model_that_fails(model: VideoModel, engine: Engine, error: BaseException) -> None:
    async def work() -> None:
        async with AsyncEngine(engine) as served:

            def fail(*_: object) -> None:
                raise error

            hook = model.decoder.register_forward_hook(fail)
            with pytest.raises(type(error)):
                await said(served, REQUESTS[0])
            hook.remove()
            assert await said(served, REQUESTS[0]) == straight(model, REQUESTS[0])

    finish(work())
    assert not threads()
    assert nothing_is_held(engine)


# ---- the end -------------------------------------------------------------------------------------


def test_closing_while_it_answers(engine: Engine) -> None:
    async def work() -> None:
        served = AsyncEngine(engine)
        stream = served.stream(asked(REQUESTS[0].prompt, 200))
        await anext(stream)
        await asyncio.to_thread(served.close)
        with pytest.raises(EngineClosed, match="closed while it answered"):
            async for _ in stream:
                pass
        with pytest.raises(EngineClosed, match="make a new AsyncEngine"):
            await said(served, REQUESTS[0])
        served.close()  # which it is no error to do again

    finish(work())
    assert not threads()
    assert engine.idle
    assert nothing_is_held(engine)


def test_closing_from_several_sides(engine: Engine) -> None:
    async def work() -> None:
        served = AsyncEngine(engine)
        waiting: list[Awaitable[Any]] = [said(served, request) for request in REQUESTS]
        tasks = [asyncio.ensure_future(each) for each in waiting]
        await asyncio.sleep(0)
        await asyncio.gather(*(asyncio.to_thread(served.close) for _ in range(3)))
        for task in tasks:
            with suppress(EngineClosed):
                assert len(await task) == NEW

    finish(work())
    assert not threads()
    assert nothing_is_held(engine)


def test_the_engine_goes_on_without_it(model: VideoModel, engine: Engine) -> None:
    finish(AsyncEngine(engine).__aexit__())
    assert [t.id for t in engine.stream(REQUESTS[0])] == straight(model, REQUESTS[0])
