"""An engine behind asyncio: its steps run on one thread, its tokens arrive on event loops."""

from __future__ import annotations

import asyncio
import concurrent.futures
import queue
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from vidlm.engine.engine import Engine
from vidlm.engine.request import Failure, Request, Token
from vidlm.engine.timing import Timings
from vidlm.errors import EngineClosed

Event = Token | Failure


@dataclass(frozen=True)
class _Reader:
    """Where the tokens of a request go."""

    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[Event]

    def put(self, event: Event) -> None:
        try:
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:
            if not self.loop.is_closed():  # then nobody is left to read it
                raise


class AsyncEngine:
    """Serves any number of coroutines, whose requests are decoded together.

    Close it when it is done with, or use it as an async context manager.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._readers: dict[int, _Reader] = {}  # the thread's own
        self._closing = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="vidlm-engine", daemon=True)
        self._thread.start()

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    async def stream(
        self, request: Request, timings: Timings | None = None
    ) -> AsyncIterator[Token]:
        """Tokens of a request as they are decided. Leaving the iteration, and cancelling the task,
        abort it. Raises what `Engine.add` raises, what went wrong in the model, and EngineClosed.
        """
        reader = _Reader(asyncio.get_running_loop(), asyncio.Queue())
        future = self._add(request, timings, reader)
        try:
            number = await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            future.add_done_callback(self._abort_late)
            raise
        unfinished = request.params.n
        try:
            while unfinished:
                event = await reader.events.get()
                if isinstance(event, Failure):
                    raise event.error
                unfinished -= event.finish is not None
                yield event
        finally:
            if unfinished:
                self._tasks.put(lambda: self._abort(number))

    def close(self) -> None:
        """End the thread; requests under way end with EngineClosed."""
        with self._closing:
            if not self._closed:
                self._closed = True
                self._tasks.put(None)
        self._thread.join()

    def _add(
        self, request: Request, timings: Timings | None, reader: _Reader
    ) -> concurrent.futures.Future[int]:
        future: concurrent.futures.Future[int] = concurrent.futures.Future()

        def add() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                number = self.engine.add(request, timings)
            except BaseException as error:
                future.set_exception(error)
                return
            self._readers[number] = reader
            future.set_result(number)

        with self._closing:
            if self._closed:
                raise EngineClosed("the engine was closed; make a new AsyncEngine")
            self._tasks.put(add)
        return future

    def _abort_late(self, future: concurrent.futures.Future[int]) -> None:
        """A request that came in although nobody waits for it any more."""
        if not future.cancelled() and future.exception() is None:
            self._tasks.put(lambda: self._abort(future.result()))

    def _abort(self, number: int) -> None:
        self._readers.pop(number, None)
        self.engine.abort(number)

    # ---- the thread ----------------------------------------------------------------------------

    def _work(self) -> None:
        while self._drain():
            if self.engine.idle:
                continue
            try:
                self._dispatch(self.engine.step())
            except BaseException as error:
                self._fail_all(error)
        self._fail_all(EngineClosed("the engine was closed while it answered"))

    def _fail_all(self, error: BaseException) -> None:
        for number, reader in self._readers.items():
            self.engine.abort(number)
            reader.put(Failure(number, error))
        self._readers.clear()

    def _drain(self) -> bool:
        """Do what was asked for; waits for it where there is nothing else to do. False at the
        end."""
        while True:
            try:
                task = self._tasks.get(block=self.engine.idle)
            except queue.Empty:
                return True
            if task is None:
                return False
            task()

    def _dispatch(self, events: list[Event]) -> None:
        for event in events:
            if event.request in self._readers:
                self._readers[event.request].put(event)
        for number in {event.request for event in events}:
            if not self.engine.alive(number):
                self._readers.pop(number, None)
