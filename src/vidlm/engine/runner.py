"""The steps of an engine: what the scheduler plans is computed, and tokens are chosen.

A step encodes one chunk of somebody's media or prefills one chunk of prompts, and gives every
answer under way its next token.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count

import torch
from torch import Tensor

from vidlm.engine import beam, forward
from vidlm.engine.ambient import Autocast
from vidlm.engine.answers import Answer, Beams, Group, begin
from vidlm.engine.blocks import OutOfBlocks
from vidlm.engine.graphs import graphs_for
from vidlm.engine.kv import Table
from vidlm.engine.options import BLOCK, EXACT_GRID, EngineOptions
from vidlm.engine.request import Failure, Token
from vidlm.engine.scheduler import Limits, Scheduler, Work
from vidlm.engine.sequence import Plan
from vidlm.engine.sequence import Sequence as Scheduled
from vidlm.engine.store import Store
from vidlm.models.base import VideoModel
from vidlm.text import Tokenizer


class Runner:
    """All requests under way, by number, and what their steps bring: `events`, which whoever makes
    the steps takes away. For one thread."""

    def __init__(
        self, model: VideoModel, store: Store, tokenizer: Tokenizer | None, options: EngineOptions
    ) -> None:
        self._model, self._store, self._tokenizer = model, store, tokenizer
        self._share, self._exact = options.share, options.exact
        self._graphs = graphs_for(model, store.kv, store.pool.count, options)
        grid = EXACT_GRID if options.exact else None
        limits = Limits(
            options.max_sequences, options.chunk, options.share, grid, options.idle_chunk
        )
        self.scheduler = Scheduler(store.pool, limits)
        self.groups: dict[int, Group] = {}
        self.events: list[Token | Failure] = []
        self.prefilled = self.decoded = 0
        self._answers: dict[int, Answer] = {}  # by the number of their scheduled sequence
        self._numbers = count()

    # ---- requests come and go ------------------------------------------------------------------

    def begin(self, group: Group) -> None:
        """Queue a request. Raises NeverFits, InvalidArgument for stop strings without tokenizer."""
        if self._graphs is not None:
            self._graphs.check()
        if self._share:
            group.inputs.use(self._store.features)
        params = group.request.params
        scheduled = self._scheduled(group, params.num_beams)
        first = begin(self._model, group, scheduled, 0, self._tokenizer)
        self.scheduler.add(first.scheduled)
        group.pending = list(range(1, params.n))
        self.groups[group.id] = group
        self._register(first)

    def end(self, request: int) -> None:
        """Forget a request; one that is not under way is no error."""
        group = self.groups.pop(request, None)
        if group is not None:
            for answer in list(group.answers.values()):
                self._drop(answer)

    def forget(self) -> None:
        """Nothing that is stored is found again, and nothing that was recorded is used again."""
        self.scheduler.forget()
        if self._graphs is not None:
            self._graphs.clear()

    def copy(self) -> None:
        """Make the copies that forks wait for, before anything is written."""
        self._store.kv.copy(self.scheduler.copies)
        self.scheduler.copies.clear()

    def _scheduled(self, group: Group, beams: int = 1) -> Scheduled:
        inputs, keys, ids = group.inputs, group.keys, group.inputs.ids
        return Scheduled(
            id=next(self._numbers),
            prompt=len(ids),
            budget=group.budget,
            keys=keys,
            encoded=inputs.encoded or self._store.covers(inputs, keys),
            tail=list(ids[len(ids) // BLOCK * BLOCK :]),
            root=group.root,
            media=tuple(inputs.spans) if self._share else (),
            # The next turn of a chat has the answer in its prompt, and attends from there.
            continues=not self._model.has_memory or self._model.memory_in_decode,
            reserve=reserve(beams, group.budget),
            pinned=beams > 1,
        )

    def _register(self, answer: Answer) -> None:
        answer.group.answers[answer.scheduled.id] = answer
        self._answers[answer.scheduled.id] = answer

    def _drop(self, answer: Answer) -> None:
        self.scheduler.finish(answer.scheduled.id)
        del answer.group.answers[answer.scheduled.id], self._answers[answer.scheduled.id]

    # ---- a step --------------------------------------------------------------------------------

    def step(self) -> None:
        """One chunk of encoding or prefilling, and one more token of each answer under way."""
        plan = self.scheduler.plan()
        try:
            self._carry_out(plan)
        except BaseException as error:
            self._stop_short(plan, error)
            if not isinstance(error, Exception):  # Ctrl-C
                raise

    def _stop_short(self, plan: Plan, error: BaseException) -> None:
        """End the requests of a step that was left. An interrupt ends those alone of which nobody
        knows how far they came; what is not stored yet can be computed once more."""
        for sequence in _sequences(plan):
            answer = self._answers.get(sequence.id)
            if answer is None:
                continue
            if sequence is plan.encode:
                answer.group.encoding = None  # a generator that raised is at its end
            undecided = sequence.computed == sequence.length
            if undecided or isinstance(error, Exception):
                self._fail(answer.group, error)

    def _carry_out(self, plan: Plan) -> None:
        self.copy()
        for sequence in plan.preempted:
            answer = self._answers[sequence.id]
            answer.table = None
            inputs = answer.group.inputs
            sequence.encoded = inputs.recall() or self._store.covers(inputs, sequence.keys)
        if plan.encode is not None:
            self._encode(self._answers[plan.encode.id].group)
        for autocast, works in self._alike(plan.prefill).items():
            with autocast.entered():
                self._prefill(works)
        for autocast, works in self._alike(plan.decode).items():
            with autocast.entered():
                self._decode([work for work in works if work.sequence.id in self._answers])

    def _alike(self, works: Sequence[Work]) -> dict[Autocast, list[Work]]:
        """Those that are computed together, as their requests were submitted under the same."""
        parted: dict[Autocast, list[Work]] = {}
        for work in works:
            answer = self._answers.get(work.sequence.id)
            if answer is not None:
                parted.setdefault(answer.group.autocast, []).append(work)
        return parted

    def _encode(self, group: Group) -> None:
        with self._ending([group]), _timed([group], "encode"), group.autocast.entered():
            if group.encoding is None:
                group.encoding = group.inputs.encoding(one_by_one=self._exact)
            if next(group.encoding, self) is self:
                group.encoding = None
                for answer in group.answers.values():
                    self.scheduler.encoded(answer.scheduled.id)

    def _prefill(self, works: Sequence[Work]) -> None:
        parts: list[tuple[Work, forward.Part]] = []
        for work in works:
            answer = self._answers.get(work.sequence.id)
            if answer is not None:
                with self._ending([answer.group]), _timed([answer.group], "prefill"):
                    parts.append((work, self._part(answer, work)))
        parts = [(work, part) for work, part in parts if work.sequence.id in self._answers]
        groups = [self._answers[work.sequence.id].group for work, _ in parts]
        if not parts:
            return
        with self._ending(groups), _timed(groups, "prefill"):
            rows = self._forward(forward.prefill, [part for _, part in parts])
            self.prefilled += sum(work.stop - work.start for work, _ in parts)
            for work, _ in parts:
                self.scheduler.stored(work)
            sampled = [work.sequence.id for work, _ in parts if work.samples]
            self._advance([self._answers[id] for id in sampled], rows)

    def _part(self, answer: Answer, work: Work) -> forward.Part:
        inputs, start, stop = answer.group.inputs, work.start, work.stop
        length = len(inputs.ids)
        generated = answer.ids[max(start - length, 0) : max(stop - length, 0)]
        ids = [*inputs.ids[start:stop], *generated]
        answer.table = None
        return forward.Part.of(inputs, ids, start, work.sequence.blocks, work.samples)

    def _decode(self, works: Sequence[Work]) -> None:
        answers = [self._answers[work.sequence.id] for work in works]
        groups = [answer.group for answer in answers]
        with self._ending(groups), _timed(groups, "decode"):
            newest = [_newest(answer) for answer in answers]
            rows = None if self._graphs is None else self._graphs.decode(newest)
            if rows is None:
                rows = self._forward(forward.decode, newest)
            self.decoded += len(works)
            for work in works:
                self.scheduler.stored(work)
            self._advance(answers, rows)

    def _forward(self, run: forward.Run, parts: Sequence[forward.Share]) -> Tensor:
        if not self._exact or len(parts) == 1:
            return run(self._model, self._store.kv, parts)
        return torch.cat([run(self._model, self._store.kv, [part]) for part in parts])

    # ---- tokens --------------------------------------------------------------------------------

    def _advance(self, answers: Sequence[Answer], rows: Tensor) -> None:
        """Choose the next token of each answer by its row of logits (B, V)."""
        if not answers:
            return
        likeliest = rows.argmax(dim=-1).tolist()  # of all at once: one wait for the device
        beams: dict[int, dict[int, Tensor]] = defaultdict(dict)
        for answer, row, best in zip(answers, rows, likeliest, strict=True):
            group = answer.group
            if group.request.params.num_beams > 1:
                beams[group.id][answer.scheduled.id] = row
                continue
            with self._ending([group]):
                each = [answer, *self._more_choices(group, answer)] if group.pending else [answer]
                for choice in each:
                    self._take(choice, row, best)
        for id, found in beams.items():
            with self._ending([self.groups[id]]):
                self._search(self.groups[id], found)

    def _take(self, answer: Answer, row: Tensor, likeliest: int) -> None:
        group, first = answer.group, not answer.ids
        pick = answer.sampler.take(row, likeliest)
        finish = answer.accept(pick.id)
        self.scheduler.token(answer.scheduled, pick.id)
        self.events.append(Token(group.id, pick.id, finish, answer.choice, pick.logprob, pick.top))
        if first and not group.pending and all(other.ids for other in group.answers.values()):
            group.inputs.prefilled()
        if finish is not None:
            self._drop(answer)
            if not group.answers and not group.pending:
                self.end(group.id)

    def _more_choices(self, group: Group, first: Answer) -> list[Answer]:
        """The other answers of a request, as far as they can begin now, where its prompt ends."""
        made: list[Answer] = []
        pending, group.pending = group.pending, []
        for choice in pending:
            try:
                scheduled = self.scheduler.fork(first.scheduled, next(self._numbers))
                now = True
            except OutOfBlocks:  # it waits for room and, if need be, computes the prompt again
                scheduled = self._scheduled(group)
                self.scheduler.add(scheduled)
                now = False
            answer = begin(self._model, group, scheduled, choice, self._tokenizer)
            self._register(answer)
            if now:
                made.append(answer)
        return made

    # ---- beams ---------------------------------------------------------------------------------

    def _search(self, group: Group, rows: dict[int, Tensor]) -> None:
        """One step of a beam search, whose tokens all come at its end."""
        if group.beams is None:
            (first,) = group.answers.values()
            ids = group.inputs.ids if self._model.penalises_prompt else ()
            search = beam.search(group.request.params, ids, first.scheduled.budget)
            next(search)
            group.beams = Beams(search, [first])
            group.inputs.prefilled()
        ordered = torch.stack([rows[answer.scheduled.id] for answer in group.beams.live])
        try:
            branches = group.beams.search.send(ordered)
        except StopIteration as done:
            ids, finish = done.value
            last = len(ids) - 1
            self.events += [
                Token(group.id, t, finish if i == last else None) for i, t in enumerate(ids)
            ]
            self.end(group.id)
        else:
            group.beams.live = self._branch(group.beams.live, branches)

    def _branch(self, parents: Sequence[Answer], branches: Sequence[beam.Branch]) -> list[Answer]:
        """The first child of a beam goes on in its blocks, the others share what is full of them
        and copy the rest."""
        children: list[Answer] = []
        taken: set[int] = set()
        for branch in branches:
            answer = parents[branch.parent]
            if branch.parent in taken:
                answer = self._sibling(answer)
            taken.add(branch.parent)
            children.append(answer)
        for i, parent in enumerate(parents):
            if i not in taken:
                self._drop(parent)
        for answer, branch in zip(children, branches, strict=True):
            answer.ids.append(branch.token)
            self.scheduler.token(answer.scheduled, branch.token)
        return children

    def _sibling(self, answer: Answer) -> Answer:
        scheduled = self.scheduler.fork(answer.scheduled, next(self._numbers))
        made = begin(self._model, answer.group, scheduled, 0, self._tokenizer)
        made.ids = list(answer.ids)
        self._register(made)
        return made

    # ---- what goes wrong -----------------------------------------------------------------------

    @contextmanager
    def _ending(self, groups: Iterable[Group]) -> Iterator[None]:
        """What goes wrong in the block ends these requests, and no others."""
        try:
            yield
        except Exception as error:
            for group in groups:
                self._fail(group, error)

    def _fail(self, group: Group, error: BaseException) -> None:
        if group.id in self.groups:
            self.end(group.id)
            self.events.append(Failure(group.id, error))


def reserve(beams: int, budget: int) -> int:
    """Blocks to be kept for the forks of a beam search."""
    return beams * (budget // BLOCK + 2) if beams > 1 else 0


def _newest(answer: Answer) -> forward.Newest:
    if answer.table is None:
        answer.table = Table(answer.scheduled.blocks)
    memory = answer.group.inputs.answer_memory
    return forward.Newest(answer.ids[-1], answer.scheduled.length, answer.table, memory)


def _sequences(plan: Plan) -> list[Scheduled]:
    encoded = [] if plan.encode is None else [plan.encode]
    return encoded + [work.sequence for work in (*plan.prefill, *plan.decode)]


@contextmanager
def _timed(groups: Sequence[Group], stage: str) -> Iterator[None]:
    """Add the time of a block to each request's timings, once where several share them."""
    began = time.perf_counter()
    try:
        yield
    finally:
        seconds = time.perf_counter() - began
        for timings in {id(group.timings): group.timings for group in groups}.values():
            timings.add(stage, seconds)
