"""The engine: many requests at once, of which each gets its next token as soon as it can.

Keys and values lie in blocks that prompts with the same beginning share (`engine.store`); what
comes first, and who must wait or give way, the scheduler decides; its plans are carried out by
`engine.runner`. Here requests come in, from any thread, and tokens go out to whoever asked.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Condition

import torch
from torch import Tensor

from vidlm import native
from vidlm.engine.answers import Group, budget_of
from vidlm.engine.inputs import PromptInputs
from vidlm.engine.options import BLOCK, EngineOptions, EngineStats
from vidlm.engine.request import Failure, Request, Token
from vidlm.engine.runner import Runner
from vidlm.engine.scheduler import NeverFits
from vidlm.engine.store import Store, weights_stamp
from vidlm.engine.timing import Timings
from vidlm.errors import InvalidArgument
from vidlm.models.base import Encoded, Media, Prompt, VideoModel
from vidlm.native import Cache
from vidlm.text import Tokenizer

Event = Token | Failure


class Engine:
    """Serves requests of one model; any thread may call any method.

    `stream` is all that most callers need: it makes the steps itself, and those of several threads
    serve each other's requests. Who wants to make the steps calls `add` and `step`.
    `tokenizer` is needed where requests have stop strings. `empty` finds the memory of keys and
    values, as torch.empty does.
    """

    def __init__(
        self,
        model: VideoModel,
        *,
        tokenizer: Tokenizer | None = None,
        options: EngineOptions | None = None,
        empty: Callable[..., Tensor] = torch.empty,
    ) -> None:
        self.model, self._tokenizer, self._empty = model, tokenizer, empty
        self.options = options or EngineOptions()
        self._turns = _Turns(self._forget_dropped)
        self._dropped: deque[int] = deque()
        self._forgetting = False
        self._requests = 0
        self._open: dict[int, int] = {}  # answers that have not ended, by request
        self._came: dict[int, deque[Event]] = {}  # and was not given to anybody yet
        self._followed: set[int] = set()
        self._stamp: object = None
        if model.device.type == "cpu":
            native.keep_freed(os.environ)
            native.prepare()  # or the first answer's encoding would wait for the compiler
        self._build()

    def _build(self) -> None:
        self._store = Store(self.model, self.options, self._empty)
        self._runner = Runner(self.model, self._store, self._tokenizer, self.options)

    # ---- requests in ---------------------------------------------------------------------------

    def add(self, request: Request, timings: Timings | None = None) -> int:
        """Queue a request; its number, under which tokens come and `abort` knows it.

        Raises ContextOverflow where the prompt leaves no room for an answer, InvalidArgument where
        media and placeholders differ or the KV cache could never hold the request.
        """
        with self._turns.turn():
            self._check_weights()
            budget = budget_of(self.model, request)
            cache = self._store.features if self.options.share else None
            inputs = PromptInputs(self.model, request.prompt, cache)
            group = Group(self._requests, request, inputs, timings or Timings())
            try:
                self._runner.begin(group, budget)
            except NeverFits as error:
                raise self._never_fits(error) from None
            self._requests += 1
            self._came[group.id] = deque()
            self._open[group.id] = request.params.n
            return group.id

    def abort(self, request: int) -> None:
        """Forget a request; nothing of it comes any more. One that has ended is no error."""
        # Not at once: this may be the end of a generator that the garbage collector found, in the
        # middle of a step.
        self._dropped.append(request)
        self._turns.pass_by()

    # ---- tokens out ----------------------------------------------------------------------------

    def stream(self, request: Request, timings: Timings | None = None) -> Iterator[Token]:
        """Add a request and follow it."""
        yield from self.follow([self.add(request, timings)])

    def follow(self, requests: Sequence[int]) -> Iterator[Token]:
        """Tokens of these requests as they are decided, whoever else is served meanwhile. Dropping
        the iterator aborts what is not finished; an error of one of them ends it."""
        self._followed.update(requests)
        try:
            while any(map(self.alive, requests)):
                self._wait(requests)
                for request in requests:
                    yield from self._taken(request)
        finally:
            self._followed.difference_update(requests)
            for request in requests:
                self.abort(request)

    def _wait(self, requests: Sequence[int]) -> None:
        """Until something came for them, by another thread's step or by one that is made now."""

        def came() -> bool:
            return any(self._came.get(request) for request in requests)

        if not came():
            with self._turns.turn(unless=came) as mine:
                if mine and not came():
                    self._step()

    def _taken(self, request: int) -> Iterator[Token]:
        came = self._came.get(request)
        while came:
            event = came.popleft()
            if isinstance(event, Failure):
                raise event.error
            yield event

    def step(self) -> list[Event]:
        """One chunk of encoding or prefilling, and one more token of each answer under way. What
        came, but for requests that somebody follows."""
        events: list[Event] = []
        with self._turns.turn():
            self._step()
            for request in self._came.keys() - self._followed:
                events += self._came[request]
                self._came[request].clear()
                if request not in self._open:
                    del self._came[request]
        return events

    def alive(self, request: int) -> bool:
        """Whether more of this request may come."""
        return request in self._open or bool(self._came.get(request))

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do, and nothing left to be given out."""
        with self._turns.turn():
            return not (self._open or any(self._came.values()))

    def _step(self) -> None:
        try:
            with torch.inference_mode():
                self._runner.step()
        finally:
            events, self._runner.events = self._runner.events, []
            for event in events:
                self._came[event.request].append(event)  # before it is closed: see `alive`
                self._count(event)

    def _count(self, event: Event) -> None:
        if isinstance(event, Failure):
            del self._open[event.request]
        elif event.finish is not None:
            self._open[event.request] -= 1
            if not self._open[event.request]:
                del self._open[event.request]

    # ---- what is kept --------------------------------------------------------------------------

    @property
    def stats(self) -> EngineStats:
        """Since the engine was made or, while it was idle, cleared."""
        with self._turns.turn():
            scheduler, features = self._runner.scheduler.stats, self._store.features.stats
            return EngineStats(scheduler, features, self._runner.prefilled, self._runner.decoded)

    @property
    def room(self) -> int:
        """Tokens whose keys and values the cache can hold at a time."""
        return self._store.pool.count * BLOCK

    def features(self, media: Sequence[Media]) -> list[Encoded]:
        """Features of media, encoded now where they are not kept. Others are served between the
        chunks."""
        with self._turns.turn():
            self._check_weights()
            kept = self._store.features
            found = [kept.get(item.digest) for item in media]
        missing = [item for item, known in zip(media, found, strict=True) if known is None]
        made: list[Encoded] = []
        for some in [[item] for item in missing] if self.options.exact else [missing]:
            made += self._encoded(some)
        with self._turns.turn():
            for item, encoded in zip(missing, made, strict=True):
                kept.put(item.digest, encoded)
        ahead = iter(made)
        return [next(ahead) if known is None else known for known in found]

    def _encoded(self, media: Sequence[Media]) -> list[Encoded]:
        chunks = self.model.encoding(media)
        while True:
            with self._turns.turn(), torch.inference_mode():
                try:
                    next(chunks)
                except StopIteration as end:
                    made: list[Encoded] = end.value
                    return made

    def stored(self, prompt: Prompt) -> list[tuple[Cache, Cache]]:
        """Copies of the keys and values (K, S, E) that are kept of a prompt's beginning, of every
        layer; none where nothing is."""
        with self._turns.turn(), torch.inference_mode():
            return self._store.read(self._keys(prompt))

    def store(self, prompt: Prompt, layers: Sequence[tuple[Cache, Cache]]) -> bool:
        """Keep what `stored` gave, to be found by prompts with this beginning. False where there is
        no room for it now. Raises InvalidArgument where it was stored as another dtype."""
        with self._turns.turn(), torch.inference_mode():
            self._check_weights()
            self._runner.copy()  # it may wait to be made from a block that is free now
            return self._store.write(self._keys(prompt), layers)

    def _keys(self, prompt: Prompt) -> list[bytes]:
        return self._store.keys(PromptInputs(self.model, prompt, None))

    def clear(self) -> None:
        """Forget what was cached of keys, values and features; frees their memory where no request
        is under way."""
        with self._turns.turn():
            self._clear()

    def _clear(self) -> None:
        if self._runner.groups:
            self._runner.forget()
            self._store.features.clear()
        else:
            self._build()

    # ---- the books -----------------------------------------------------------------------------

    def _forget_dropped(self) -> None:
        if self._forgetting:  # the garbage collector came by, within the loop below
            return
        self._forgetting = True
        try:
            while self._dropped:
                request = self._dropped.popleft()
                self._runner.end(request)
                self._open.pop(request, None)
                self._came.pop(request, None)
        finally:
            self._forgetting = False

    def _never_fits(self, error: NeverFits) -> InvalidArgument:
        needed, room = error.needed * BLOCK, error.count * BLOCK
        size = error.count * self._store.block_bytes
        return InvalidArgument(
            f"prompt and answer may take {needed} tokens of KV cache, which has room for {room} "
            f"({size / 1e9:.2f} GB); take fewer frames or a smaller max_new_tokens, or give more "
            "kv_bytes"
        )

    def _check_weights(self) -> None:
        """Forget what other weights made: a model may be trained between two questions."""
        stamp = weights_stamp(self.model)
        if self._stamp is not None and stamp != self._stamp:
            self._clear()
        self._stamp = stamp


class _Turns:
    """Whose turn it is to use the engine; `settle` is called at the beginning and end of each."""

    def __init__(self, settle: Callable[[], None]) -> None:
        self._settle = settle
        self._condition = Condition()
        self._taken = False

    @contextmanager
    def turn(self, unless: Callable[[], bool] | None = None) -> Iterator[bool]:
        """Wait for a turn and take it; False where `unless` came true first."""
        with self._condition:
            while self._taken and not (unless and unless()):
                self._condition.wait()
            mine = not self._taken
            self._taken = True
        if not mine:
            yield False
            return
        try:
            self._settle()
            yield True
        finally:
            self._give_back()

    def pass_by(self) -> None:
        """Settle now if it is nobody's turn; if it is, that is done at its end."""
        with self._condition:
            if not self._taken:
                self._settle()

    def _give_back(self) -> None:
        with self._condition:
            self._settle()  # in here, so that no `pass_by` is missed
            self._taken = False
            self._condition.notify_all()
