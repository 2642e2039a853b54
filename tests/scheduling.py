"""A mock engine around the scheduler: it computes nothing and checks everything.

Its store of keys and values holds for each token what decided them: every id and every token of
media up to there, as one hash. A Work writes these for its tokens and finds those of all tokens
before them in the blocks of its table, or fails. The next token follows from that hash.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field, replace

import pytest

from vidlm.engine.blocks import BlockPool, OutOfBlocks, Span, block_keys
from vidlm.engine.scheduler import Limits, NeverFits, Plan, Scheduler, Sequence, Work

END = 3  # ids are 0, 1, 2, and this


@dataclass
class Truth:
    """What a sequence really consists of."""

    ids: list[int]
    spans: list[Span]
    chunks: int = 0  # of its media, left to encode
    seed: int = 0  # of the sampler
    beams: int = 1
    ends: bool = False  # whether its answer may end before its budget
    fresh: bool = False  # encoded, not admitted yet
    hashes: list[int] = field(default_factory=list)

    def hash(self, position: int) -> int:
        while len(self.hashes) <= position:
            i = len(self.hashes)
            media = [(d[0], i - a) for a, b, d in self.spans if a <= i < b]
            before = self.hashes[-1] if i else 0
            self.hashes.append(hash((before, self.ids[i], *media)))
        return self.hashes[position]

    def next(self) -> int:
        draw = hash((self.hash(len(self.ids) - 1), self.seed)) % 32
        return END if draw == 31 and self.ends else draw % 3


class World:
    """Requests come and go, steps are made, and after each everything is looked at."""

    def __init__(self, count: int, block: int, limits: Limits) -> None:
        self.pool = BlockPool(count, block)
        self.limits = limits
        self.scheduler = Scheduler(self.pool, limits)
        self.memory: list[list[object]] = [[None] * block for _ in range(count)]
        self.truths: dict[int, Truth] = {}
        self.live: dict[int, Sequence] = {}
        self.answers: dict[int, list[int]] = {}  # of finished ones
        self.log: list[tuple[int, int, int]] = []  # (id, start, stop) of every Work
        self.last = Plan()
        self.preempted: set[int] = set()
        self._next_id = 0

    # ---- what may happen -----------------------------------------------------------------------

    def add(self, truth: Truth, budget: int = 8, shared: bool = True) -> Sequence | None:
        """A request; None if it could never fit."""
        block, id = self.pool.block, self.new_id()
        tail = truth.ids[len(truth.ids) // block * block :]
        keys = tuple(block_keys(truth.ids, truth.spans, block)) if shared else ()
        root = b"" if shared else None
        per_beam = self.blocks(budget) + 2
        sequence = Sequence(
            id, len(truth.ids), budget, keys, not truth.chunks, tail=tail, root=root
        )
        sequence.media, sequence.pinned = tuple(truth.spans), truth.beams > 1
        sequence.reserve = truth.beams * per_beam if sequence.pinned else 0
        needed = self.blocks(len(truth.ids) + budget) + sequence.reserve
        if needed > self.pool.count:
            with pytest.raises(NeverFits) as error:
                self.scheduler.add(sequence)
            assert (error.value.needed, error.value.count) == (needed, self.pool.count)
            return None
        self.scheduler.add(sequence)
        self.truths[id], self.live[id] = truth, sequence
        return sequence

    def abort(self, id: int) -> None:
        self.scheduler.abort(id)
        del self.live[id]

    def fork(self, parent: Sequence) -> Sequence | None:
        """None if there is no room, which for a pinned one there is."""
        own = len(parent.blocks) - parent.computed // self.pool.block
        before, id = self.pool.stats, self.new_id()
        try:
            child = self.scheduler.fork(parent, id)
        except OutOfBlocks as error:
            refused = error
        else:
            refused = None
        if refused is not None:
            assert not parent.pinned
            assert (refused.wanted, self.pool.stats) == (own, before)
            assert refused.free < own
            return None
        truth = self.truths[parent.id]
        twin = replace(truth, ids=truth.ids.copy(), hashes=[], seed=child.id)
        self.truths[child.id], self.live[child.id] = twin, child
        return child

    def step(self) -> Plan:
        watch = Watch(self)
        plan = self.scheduler.plan()
        watch.check(plan)
        for old, new in self.scheduler.copies:
            self.memory[new] = self.memory[old].copy()
        self.scheduler.copies.clear()
        self.preempted |= {sequence.id for sequence in plan.preempted}
        self._encode(plan.encode)
        works = (*plan.prefill, *plan.decode)
        for work in works:
            self._write(work)
        for work in works:
            self._read(work)
        samples = [work for work in works if work.samples]
        for work in works:
            self.scheduler.stored(work)
        for work in samples:
            if work.sequence.id in self.live:
                self._sample(work.sequence)
        self.last = plan
        return plan

    def run(self, steps: int = 5000) -> None:
        """Until everything is answered."""
        while not self.scheduler.idle:
            self.step()
            self.look()
            steps -= 1
            assert steps, "it never ends"
        assert not self.live
        assert self.pool.available == self.pool.count

    # ---- a step's parts ------------------------------------------------------------------------

    def _encode(self, sequence: Sequence | None) -> None:
        if sequence is None:
            return
        truth = self.truths[sequence.id]
        assert truth.chunks > 0
        truth.chunks -= 1
        if not truth.chunks:
            truth.fresh = True
            self.scheduler.encoded(sequence.id)

    def _write(self, work: Work) -> None:
        sequence, truth = work.sequence, self.truths[work.sequence.id]
        assert truth.chunks == 0, "its features are not there"
        assert work.start == sequence.computed < work.stop <= sequence.length == len(truth.ids)
        for position in range(work.start, work.stop):
            block = sequence.blocks[position // self.pool.block]
            assert self.pool.owners(block) == 1, "others own what is written to"
            assert self.pool.key(block) is None, "others may have found what is written to"
            shape = (work.start, work.stop) if self.limits.grid else ()
            self.memory[block][position % self.pool.block] = (truth.hash(position), shape)
        self.log.append((sequence.id, work.start, work.stop))

    def _read(self, work: Work) -> None:
        truth, size = self.truths[work.sequence.id], self.pool.block
        truth.hash(work.stop - 1)
        right = [(truth.hashes[i], self.shape(work.sequence, i)) for i in range(work.stop)]
        for i, block in enumerate(work.sequence.blocks[: self.blocks(work.stop)]):
            part = right[i * size : (i + 1) * size]
            assert self.memory[block][: len(part)] == part

    def shape(self, sequence: Sequence, position: int) -> tuple[int, ...]:
        """Start and stop of the Work that computes a token where its sequence runs alone."""
        grid = self.limits.grid
        if grid is None:
            return ()
        if position >= sequence.prompt:
            return (position, position + 1)
        begin = position // grid * grid
        return (begin, min(begin + grid, sequence.prompt))

    def _sample(self, sequence: Sequence) -> None:
        truth = self.truths[sequence.id]
        beams = [s for s in self.live if self.live[s].arrival[0] == sequence.arrival[0]]
        takers = [sequence]
        if len(beams) < truth.beams:
            child = self.fork(sequence)
            assert child is not None
            takers.append(child)
        for taker in takers:
            truth = self.truths[taker.id]
            token = truth.next()
            truth.ids.append(token)
            self.scheduler.token(taker, token)
            if token == END or taker.length == taker.prompt + taker.budget:
                self.answers[taker.id] = truth.ids[taker.prompt :]
                self.scheduler.finish(taker.id)
                del self.live[taker.id]

    # ---- looking -------------------------------------------------------------------------------

    def look(self) -> None:
        """Nothing leaked, nothing lost, nothing shared wrongly."""
        for s in self.live.values():
            assert len({*s.blocks}) == len(s.blocks)
            assert len(s.blocks) * self.pool.block >= s.computed
        running = sum(bool(s.blocks) for s in self.live.values())
        assert (self.scheduler.running, self.scheduler.waiting) == (
            *(running, len(self.live) - running),
        )
        owners = Counter(block for s in self.live.values() for block in s.blocks)
        for block in range(self.pool.count):
            assert self.pool.owners(block) == owners[block]
        stats = self.scheduler.stats
        assert stats.pool.owned == len(owners)
        assert stats.pool.owned + stats.pool.cached + stats.pool.free == self.pool.count
        assert stats.reserved <= self.pool.available
        if not self.limits.share:
            assert stats.pool.cached == stats.pool.hits == 0

    def new_id(self) -> int:
        self._next_id += 1
        return self._next_id

    def blocks(self, tokens: int) -> int:
        return -(-tokens // self.pool.block)


class Watch:
    """What is so before a plan, to judge the plan by."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.running = [s for s in world.live.values() if s.blocks]
        self.decoding = {s.id for s in self.running if s.decoding}
        self.matched = sum(s.matched for s in self.running)

    def check(self, plan: Plan) -> None:
        limits, live = self.world.limits, self.world.live.values()
        works = (*plan.prefill, *plan.decode)
        assert works or plan.encode or not live, "nothing is done, and there is something to do"
        assert len({work.sequence.id for work in works}) == len(works)
        assert not plan.encode or not plan.prefill
        for part in (plan.prefill, plan.decode):
            order = [work.sequence.arrival for work in part]
            assert order == sorted(order)
        chunk = limits.chunk if plan.decode else limits.idle_chunk or limits.chunk
        assert sum(w.stop - w.start for w in plan.prefill) <= max(chunk, limits.grid or 0)
        assert all(w.stop - w.start == 1 and w.samples for w in plan.decode)
        lost = {s.id for s in plan.preempted}
        assert self.decoding - lost <= {work.sequence.id for work in plan.decode}
        self.check_order(plan)
        self.check_turns(plan)
        for work in plan.prefill if limits.grid else ():
            assert (work.start, work.stop) == self.world.shape(work.sequence, work.start)

    def check_order(self, plan: Plan) -> None:
        """First come, first served, and last come, first preempted."""
        world, before = self.world, {s.id for s in self.running}
        running = [s for s in world.live.values() if s.blocks]
        admitted = [s for s in running if s.id not in before]
        ready = [s for s in world.live.values() if s.encoded and not s.blocks]
        first = min((s.arrival for s in ready), default=(1 << 60, 0))
        assert all(s.encoded and s.arrival < first for s in admitted)
        for s in admitted:
            world.truths[s.id].fresh = False
        if not plan.preempted:
            assert len(running) <= max(world.limits.max_sequences, len(before))
            if self.matched == sum(s.matched for s in self.running):  # no room came up later on
                self.check_admission([s for s in ready if s.arrival == first], len(running))
            return
        assert not admitted
        taken = min(s.arrival for s in plan.preempted)
        assert all(s.pinned or s.arrival < taken for s in running)
        assert not any(s.pinned for s in plan.preempted)

    def check_admission(self, first: list[Sequence], running: int) -> None:
        """Who still waits would not fit, even if all of it that is stored counts for nothing."""
        world = self.world
        for s in first:
            needed = world.blocks(s.length) + 1
            if s.pinned or s.length == s.prompt + s.budget:
                needed = world.blocks(s.prompt + s.budget) + s.reserve
            room = world.pool.available - world.scheduler.stats.reserved
            assert running >= world.limits.max_sequences or needed > room

    def check_turns(self, plan: Plan) -> None:
        """Encoding and prefilling take turns where both wait; one sequence is encoded ahead."""
        world = self.world
        prefilling = [s for s in world.live.values() if s.blocks and not s.decoding]
        fresh = [s for s in world.live.values() if world.truths[s.id].fresh]
        to_encode = [s for s in world.live.values() if not s.encoded]
        assert sum(s.id not in world.preempted for s in fresh) <= 1
        first = min((s.arrival for s in to_encode), default=(0, 0))
        if plan.encode:
            assert not plan.encode.encoded
            assert not plan.encode.blocks
            assert not (prefilling and world.last.encode), "encoded twice while a prompt waits"
        elif to_encode and all(s.arrival > first for s in fresh):
            assert plan.prefill, "nothing is encoded, for nothing"
            assert not world.last.prefill or world.last.encode, "prefilled twice while media wait"


# ---- anything that may happen ------------------------------------------------------------------


def random_world(rng: random.Random) -> World:
    block = rng.randint(1, 4)
    limits = Limits(
        max_sequences=rng.randint(1, 6),
        chunk=rng.randint(1, 12),
        idle_chunk=rng.choice([None, 3, 30]),
        share=rng.random() < 0.75,
        grid=rng.choice([None, None, 1, 2, 3, 4, 6]),
    )
    return World(rng.randint(2, 40), block, limits)


def random_request(world: World, rng: random.Random) -> Truth:
    """A prompt; often the beginning of an older one, or the next turn after its answer."""
    ids, spans = [], []
    if world.truths and rng.random() < 0.6:
        old = world.truths[rng.choice(list(world.truths)[-6:])]
        cut = rng.randint(0, len(old.ids))
        ids = old.ids[: rng.choice([cut, len(old.ids)])]
        ids = ids[: world.pool.count * world.pool.block // 2]
        spans = [span for span in old.spans if span[1] <= len(ids)]
    for _ in range(rng.choice([0, 0, 1, 2])):
        start = len(ids) + rng.randint(0, 2)
        spans.append((start, start + rng.randint(1, 6), bytes([rng.randint(0, 1)])))
        ids += [0] * (spans[-1][1] - len(ids))
    ids += rng.choices([0, 1], k=rng.randint(0 if ids else 1, 6))
    chunks = rng.randint(0, 6) if spans else 0
    return Truth(ids, spans, chunks, beams=rng.choice([1, 1, 1, 1, 1, 2, 3]), ends=True)


def random_operation(world: World, rng: random.Random) -> None:
    draw, running = rng.random(), [s for s in world.live.values() if s.blocks]
    if draw < 0.2 and len(world.live) < 12:
        world.add(random_request(world, rng), rng.choice([1, 3, 9, 25]), rng.random() < 0.9)
    elif draw < 0.22 and world.live:
        world.abort(rng.choice(list(world.live)))
    elif draw < 0.25 and running:
        parent = rng.choice(running)
        if not parent.pinned:
            world.fork(parent)
    else:
        for sequence in world.step().preempted:
            if rng.random() < 0.5 and world.truths[sequence.id].spans:  # its features are gone
                world.truths[sequence.id].chunks, sequence.encoded = rng.randint(1, 3), False
    world.look()
