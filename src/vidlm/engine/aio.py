"""An engine behind asyncio: a thread makes its steps, and tokens arrive on event loops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from threading import Condition, Thread

from vidlm.engine.ambient import Autocast
from vidlm.engine.engine import Engine, Handle
from vidlm.engine.request import Failure, Request, Token
from vidlm.engine.timing import Timings
from vidlm.errors import EngineClosed

Event = Token | Failure
PREPARING = 2  # threads that prepare prompts: digests of a long video take a while


class AsyncEngine:
    """Serves any number of coroutines, whose requests are decoded together.

    Close it when it is done with, or use it as an async context manager.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._changed = Condition()  # guards what follows
        self._open: dict[_Sink, Handle] = {}  # requests that have not ended
        self._closed = False
        self._pool = ThreadPoolExecutor(PREPARING, "vidlm-prepare")
        self._thread = Thread(target=self._work, name="vidlm-engine", daemon=True)
        self._thread.start()

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    async def stream(
        self, request: Request, timings: Timings | None = None
    ) -> AsyncIterator[Token]:
        """Tokens of a request as they are decided. Leaving the iteration, and cancelling the task,
        cancel it. Raises what `Engine.submit` raises, what went wrong in the model, and
        EngineClosed. The prompt is prepared beside the event loop and beside the engine's steps."""
        unfinished = request.params.n
        sink = _Sink(asyncio.get_running_loop(), unfinished, self._ended)
        future = self._submit_soon(request, timings, sink)
        try:
            handle = await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            future.add_done_callback(_cancel_late)
            raise
        try:
            while unfinished:
                event = await sink.events.get()
                if isinstance(event, Failure):
                    raise event.error
                unfinished -= event.finish is not None
                yield event
        finally:
            self._ended(sink)
            handle.cancel()

    def close(self) -> None:
        """End the thread; requests under way end with EngineClosed."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        self._pool.shutdown()

    def _submit_soon(
        self, request: Request, timings: Timings | None, sink: _Sink
    ) -> Future[Handle]:
        autocast = Autocast.of_thread(self.engine.model)  # a thread of the pool has another

        def submit() -> Handle:
            with autocast.entered():
                handle = self.engine.submit(request, sink, timings)
            with self._changed:
                closed = self._closed
                if not (closed or sink.ended):
                    self._open[sink] = handle
                    self._changed.notify_all()
            if closed:
                handle.cancel()
                raise EngineClosed("the engine was closed while it answered")
            return handle

        with self._changed:
            if self._closed:
                raise EngineClosed("the engine was closed; make a new AsyncEngine")
            return self._pool.submit(submit)

    def _ended(self, sink: _Sink) -> None:
        with self._changed:
            sink.ended = True
            self._open.pop(sink, None)

    # ---- the thread ----------------------------------------------------------------------------

    def _work(self) -> None:
        while self._wait_for_requests():
            try:
                self.engine.step()
            except BaseException as error:
                self._fail_all(error)
        self._fail_all(EngineClosed("the engine was closed while it answered"))

    def _wait_for_requests(self) -> bool:
        """False when it is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._open or self._closed)
            return not self._closed

    def _fail_all(self, error: BaseException) -> None:
        with self._changed:
            failed = list(self._open.items())
        for sink, handle in failed:
            handle.cancel()
            with suppress(RuntimeError):  # its loop is closed
                sink(Failure(handle.id, error))


class _Sink:
    """Takes a request's tokens to the event loop of its coroutine; `end` is told of the last."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, unfinished: int, end: Callable[[_Sink], None]
    ) -> None:
        self._loop, self._unfinished, self._end = loop, unfinished, end
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.ended = False

    def __call__(self, event: Event) -> None:
        try:
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:  # the loop is closed, and nobody is left to read it: see Engine.submit
            self._end(self)
            raise
        if isinstance(event, Failure):
            self._unfinished = 0
        elif event.finish is not None:
            self._unfinished -= 1
        if self._unfinished <= 0:
            self._end(self)


def _cancel_late(future: Future[Handle]) -> None:
    """A request that was submitted although nobody waits for it any more."""
    if not future.cancelled() and future.exception() is None:
        future.result().cancel()
