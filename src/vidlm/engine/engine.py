"""The engine: many requests at once, of which each gets its next token as soon as it can.

Keys and values are stored in blocks that prompts with the same beginning share (`engine.store`).
The scheduler decides what comes first, and who must wait or give way; `engine.runner` carries its
plans out. Here requests come in, from any thread, and each token goes to its request's sink.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

from vidlm import native
from vidlm.engine.ambient import Autocast, default_cpu, step_state
from vidlm.engine.answers import Group, budget_of, watch
from vidlm.engine.inputs import PromptInputs
from vidlm.engine.options import BLOCK, EngineOptions, EngineStats
from vidlm.engine.request import Failure, Request, Token
from vidlm.engine.runner import Runner, reserve
from vidlm.engine.scheduler import NeverFits
from vidlm.engine.store import Store, blocks_for, weights_stamp
from vidlm.engine.timing import Timings
from vidlm.engine.turns import Turns
from vidlm.errors import InvalidArgument
from vidlm.models.base import Encoded, Media, Prompt, VideoModel
from vidlm.native import Cache
from vidlm.text import Tokenizer

LOG = logging.getLogger(__name__)
Event = Token | Failure
Sink = Callable[[Event], object]


@dataclass(frozen=True)
class Handle:
    """A submitted request. `id` is the `request` of its tokens."""

    id: int
    _cancel: Callable[[int], None] = field(repr=False)

    def cancel(self) -> None:
        """Forget the request; its sink is not called again. One that has ended is no error."""
        self._cancel(self.id)


@dataclass
class _Open:
    """Where the tokens of a request go, and how many of its answers have not ended."""

    sink: Sink
    unfinished: int


class Engine:
    """Serves requests of one model; any thread may call any method.

    `stream` is all that most callers need: a thread that waits for its own tokens makes the steps,
    unless another thread does, and every step serves everybody's requests. A program that takes
    tokens elsewhere calls `submit`, and `step` as long as there is something to do.
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
        self._turns = Turns(self._forget_dropped)
        self._numbers = count()
        self._open: dict[int, _Open] = {}  # requests that have neither ended nor been cancelled
        self._submitted: deque[Group] = deque()  # those that no step has met yet
        self._dropped: deque[int] = deque()
        self._forgetting = False
        self._stamp: object = None
        if model.device.type == "cpu":
            native.keep_freed(os.environ)
            native.prepare()  # or the first answer's encoding would wait for the compiler
        self._build()

    def _build(self) -> None:
        self._store = Store(self.model, self.options, self._empty)
        self._runner = Runner(self.model, self._store, self._tokenizer, self.options)

    # ---- requests in ---------------------------------------------------------------------------

    def submit(self, request: Request, sink: Sink, timings: Timings | None = None) -> Handle:
        """Queue a request: every token of it will go to `sink`, or in the end a Failure.

        It is one act, so that nothing is lost whoever makes the steps. What it costs to prepare the
        prompt (a digest of all pixels) the calling thread pays; nobody waits for it. The request is
        computed under the calling thread's autocast.

        The thread that makes a step calls the sinks, one after the other. A sink should be quick;
        it may call `submit` and `Handle.cancel`, nothing else of the engine. If it raises, its
        request ends, and no other.

        Raises ContextOverflow where the prompt leaves no room for an answer, InvalidArgument where
        media and placeholders differ or the KV cache could never hold the request.
        """
        with default_cpu():
            group = self._prepared(request, timings or Timings())
        self._open[group.id] = _Open(sink, request.params.n)
        self._submitted.append(group)
        return Handle(group.id, self._cancel)

    def _prepared(self, request: Request, timings: Timings) -> Group:
        """What a step needs to begin a request. Nothing that steps change is touched."""
        autocast = Autocast.of_thread(self.model)
        budget = budget_of(self.model, request)
        watch(request.params, self._tokenizer)  # raises where there is no tokenizer
        inputs = PromptInputs(self.model, request.prompt, autocast.tag)
        beams = reserve(request.params.num_beams, budget)
        needed, store = blocks_for(len(inputs.ids) + budget) + beams, self._store
        if needed > store.pool.count:
            raise self._never_fits(NeverFits(needed, store.pool.count))
        keys, root = tuple(store.keys(inputs)), store.root(inputs) if self.options.share else b""
        number = next(self._numbers)
        return Group(number, request, inputs, timings, autocast, budget, keys, root)

    def _cancel(self, request: int) -> None:
        # Not ended at once: this may be the end of a generator that the garbage collector found, in
        # the middle of a step.
        self._open.pop(request, None)
        self._dropped.append(request)
        self._turns.pass_by()

    # ---- tokens out ----------------------------------------------------------------------------

    def stream(self, request: Request, timings: Timings | None = None) -> Iterator[Token]:
        """Tokens of a request as they are decided, whoever else is served meanwhile. Dropping the
        iterator cancels it. Raises what `submit` raises, and what went wrong in the model."""
        yield from self.stream_all([request], timings)

    def stream_all(
        self, requests: Sequence[Request], timings: Timings | None = None
    ) -> Iterator[Token]:
        """`stream` of several requests together; an error of one of them ends it."""
        events: deque[Event] = deque()
        handles: list[Handle] = []
        try:
            for request in requests:
                handles.append(self.submit(request, events.append, timings))
            unfinished = sum(request.params.n for request in requests)
            while unfinished:
                self._wait(events)
                while events:
                    event = events.popleft()
                    if isinstance(event, Failure):
                        raise event.error
                    unfinished -= event.finish is not None
                    yield event
        finally:
            for handle in handles:
                handle.cancel()

    def _wait(self, events: deque[Event]) -> None:
        """Until something came, by another thread's step or by one that is made now."""
        if not events:
            with self._turns.turn(unless=lambda: bool(events)) as mine:
                if mine and not events:
                    self._step()

    def step(self) -> bool:
        """One chunk of encoding or prefilling, and one more token of each answer under way.
        Whether anything is left to do."""
        with self._turns.turn():
            self._step()
        return not self.idle

    @property
    def idle(self) -> bool:
        """Whether all requests have ended or were cancelled."""
        return not self._open

    def _step(self) -> None:
        try:
            with step_state():
                self._begin_submitted()
                self._runner.step()
        finally:
            events, self._runner.events = self._runner.events, []
            self._deliver(events)

    def _begin_submitted(self) -> None:
        while self._submitted:
            group = self._submitted[0]  # it stays there if an interrupt comes in between
            if group.id in self._open and group.id not in self._runner.groups:
                try:
                    self._check_weights()
                    self._runner.begin(group)
                except NeverFits as error:  # the cache is smaller since it was cleared
                    self._put(Failure(group.id, self._never_fits(error)))
                except Exception as error:
                    self._put(Failure(group.id, error))
            self._submitted.popleft()

    def _deliver(self, events: Sequence[Event]) -> None:
        """Each to its sink. An interrupt in one of them is raised when all have theirs."""
        interrupt: BaseException | None = None
        for event in events:
            try:
                self._put(event)
            except BaseException as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt

    def _put(self, event: Event) -> None:
        request = self._open.get(event.request)
        if request is None:
            return
        if isinstance(event, Failure) or event.finish is not None:
            request.unfinished -= 1
        if isinstance(event, Failure) or not request.unfinished:
            self._open.pop(event.request, None)
        try:
            request.sink(event)
        except Exception:
            LOG.exception("the sink of request %d failed, so the request ends", event.request)
            self._end(event.request)
        except BaseException as error:  # nobody knows whether the sink has the event
            self._end(event.request)
            try:
                request.sink(Failure(event.request, error))
            except Exception:
                LOG.exception("the sink of request %d failed again", event.request)
            raise

    def _end(self, request: int) -> None:
        self._open.pop(request, None)
        self._dropped.append(request)  # forgotten at the end of this turn

    # ---- what is kept --------------------------------------------------------------------------

    @property
    def stats(self) -> EngineStats:
        """Since the engine was made or, while it was idle, cleared."""
        with self._turns.turn(), step_state():
            self._begin_submitted()
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
            kept, tag = self._store.features, Autocast.of_thread(self.model).tag
            found = [kept.get(tag + item.digest) for item in media]
        missing = [item for item, known in zip(media, found, strict=True) if known is None]
        made: list[Encoded] = []
        for some in [[item] for item in missing] if self.options.exact else [missing]:
            made += self._encoded(some)
        with self._turns.turn():
            for item, encoded in zip(missing, made, strict=True):
                kept.put(tag + item.digest, encoded)
        ahead = iter(made)
        return [next(ahead) if known is None else known for known in found]

    def _encoded(self, media: Sequence[Media]) -> list[Encoded]:
        chunks = self.model.encoding(media)
        while True:
            with self._turns.turn(), step_state():
                try:
                    next(chunks)
                except StopIteration as end:
                    made: list[Encoded] = end.value
                    return made

    def stored(self, prompt: Prompt) -> list[tuple[Cache, Cache]]:
        """Copies of the keys and values (K, S, E) that are kept of a prompt's beginning, of every
        layer; none where nothing is. Not those that were computed under autocast."""
        with self._turns.turn(), step_state():
            return self._store.read(self._keys(prompt))

    def store(self, prompt: Prompt, layers: Sequence[tuple[Cache, Cache]]) -> bool:
        """Keep what `stored` gave, to be found by prompts with this beginning. False where there is
        no room for it now. Raises InvalidArgument where it was stored as another dtype."""
        with self._turns.turn(), step_state():
            self._check_weights()
            self._runner.copy()  # it may wait to be made from a block that is free now
            return self._store.write(self._keys(prompt), layers)

    def _keys(self, prompt: Prompt) -> list[bytes]:
        return self._store.keys(PromptInputs(self.model, prompt))

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
                self._runner.end(self._dropped.popleft())
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
