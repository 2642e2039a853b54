"""What the next step computes: sequences wait, are admitted, prefilled and decoded.

    add -> waiting -> encoded -> admitted (has blocks) -> prefill -> decode ... -> finish or abort
              ^------------------- preempted: its blocks went to one that came before it

First come, first served. A plan holds one token of every answer under way, and beside it one unit
of heavy work: a chunk of media to encode or a chunk of prompts to prefill, by turns where both
wait. So neither a long video nor a long prompt stops the others.

Encoding needs no admission and holds no blocks. Sequences are encoded in order of arrival, and
those without anything to encode pass them by meanwhile; at most one is encoded ahead, which is to
say that while one waits with fresh features for its blocks, no later one is encoded.

Where tokens are stored and what they are is not known here; see `engine.blocks`.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, replace
from math import lcm

from vidlm.engine.blocks import BlockPool, OutOfBlocks, block_keys
from vidlm.engine.sequence import Limits, NeverFits, Plan, SchedulerStats, Sequence, Work

__all__ = ["Limits", "NeverFits", "Plan", "Scheduler", "SchedulerStats", "Sequence", "Work"]


@dataclass(eq=False)
class _Group:
    """A pinned sequence and its forks, and how many blocks they may hold between them."""

    entitled: int
    members: list[Sequence]

    @property
    def aside(self) -> int:
        """Blocks it does not hold yet, which nobody else may take."""
        held = set().union(*(member.blocks for member in self.members))
        return max(self.entitled - len(held), 0)


class Scheduler:
    """Plans the steps of all sequences over one pool of blocks.

    A step: `plan`, copy what `copies` says, compute, `stored` for each Work, `token` or `finish`
    for each that samples. Methods that take an id raise KeyError for one that is not under way.
    """

    def __init__(self, pool: BlockPool, limits: Limits) -> None:
        self.pool = pool
        self.limits = limits
        # Blocks to be copied before the next step, one pair (from, to) after the other in this
        # order; the caller empties the list.
        self.copies: list[tuple[int, int]] = []
        self._sequences: dict[int, Sequence] = {}
        self._waiting: list[Sequence] = []  # both in order of arrival
        self._running: list[Sequence] = []
        self._groups: dict[int, _Group] = {}  # of each pinned sequence that runs, by its id
        self._encoding: Sequence | None = None  # begun and not finished
        self._ahead: set[int] = set()  # encoded here and not admitted yet
        self._encode_next = True
        self._arrivals = self._preemptions = 0
        # A prefix is used up to where both a block and a cell of the grid end.
        self._unit = lcm(pool.block, limits.grid or 1)

    # ---- sequences come, go on and go ---------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """It waits for its turn. Raises NeverFits where the whole pool is too small for it."""
        assert sequence.id not in self._sequences, f"sequence {sequence.id} is under way"
        needed = self._whole(sequence)
        if needed > self.pool.count:
            raise NeverFits(needed, self.pool.count)
        self._arrivals += 1
        sequence.arrival = (self._arrivals, 0)
        self._sequences[sequence.id] = sequence
        self._waiting.append(sequence)

    def encoded(self, id: int) -> None:
        """Its features are there. For one that had them, or runs, that is no news."""
        sequence = self._sequences[id]
        if not (sequence.encoded or sequence.blocks):
            self._ahead.add(id)
        sequence.encoded = True
        if self._encoding is sequence:
            self._encoding = None

    def fork(self, sequence: Sequence, id: int) -> Sequence:
        """A second answer that goes on from a running one, with a table of its own.

        It shares the full blocks. The part-filled one is to be copied: see `copies`. A fork of a
        pinned sequence is pinned and draws on the same reserve. Raises OutOfBlocks.
        """
        assert id not in self._sequences, f"sequence {id} is under way"
        assert sequence.blocks, f"sequence {sequence.id} does not run"
        full = sequence.computed // self.pool.block
        shared, own = sequence.blocks[:full], len(sequence.blocks) - full
        if own > self._spare(sequence):
            raise OutOfBlocks(own, self._spare(sequence))
        blocks = self.pool.allocate(own, shared[-1] if shared else None)
        self.pool.share(shared)
        if sequence.computed % self.pool.block:
            self.copies.append((sequence.blocks[full], blocks[0]))
        self._arrivals += 1
        child = replace(
            sequence,
            id=id,
            blocks=shared + blocks,
            tail=sequence.tail.copy(),
            chain=sequence.chain.copy(),
            arrival=(sequence.arrival[0], self._arrivals),
        )
        self._sequences[id] = child
        insort(self._running, child, key=_arrival)
        if group := self._groups.get(sequence.id):
            group.members.append(child)
            self._groups[id] = group
        return child

    def stored(self, work: Work) -> None:
        """Keys and values of its tokens are there; blocks that became full are published.

        Nothing to do for one that was aborted during the step.
        """
        sequence = work.sequence
        if self._sequences.get(sequence.id) is not sequence:
            return
        assert sequence.computed == work.start, "a Work of an older plan"
        sequence.computed = work.stop
        if self.limits.share:
            for i in range(work.start // self.pool.block, work.stop // self.pool.block):
                key = self._key(sequence, i)
                if key is not None:
                    self.pool.publish(sequence.blocks[i], key)

    def token(self, sequence: Sequence, id: int) -> None:
        """Its next token was decided."""
        assert sequence.computed == sequence.length, "a token before the one it follows is computed"
        sequence.tail.append(id)
        sequence.length += 1

    def finish(self, id: int) -> None:
        """Its answer is complete: its blocks are released, and those that are published cached."""
        sequence = self._sequences.pop(id)
        self._ahead.discard(id)
        if self._encoding is sequence:
            self._encoding = None
        if not sequence.blocks:
            self._waiting.remove(sequence)
            return
        self._running.remove(sequence)
        self._release(sequence)
        if group := self._groups.pop(id, None):
            group.members.remove(sequence)

    def abort(self, id: int) -> None:
        """Nobody wants its answer any more; as `finish`, wherever it is."""
        self.finish(id)

    def forget(self) -> None:
        """Share nothing that was computed up to now, nor what those under way add to it.

        For when it would come out differently now, as with other weights.
        """
        self.pool.forget()
        for sequence in self._running:
            sequence.keys, sequence.root = (), None
            sequence.chain.clear()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def idle(self) -> bool:
        return not self._sequences

    @property
    def stats(self) -> SchedulerStats:
        reserved, pool = self._aside(), self.pool.stats
        return SchedulerStats(self.waiting, self.running, self._preemptions, reserved, pool)

    # ---- the next step ------------------------------------------------------------------------

    def plan(self) -> Plan:
        """The next step, with the blocks it needs.

        Raises OutOfBlocks where nothing but pinned sequences is left and forks took more than was
        reserved for them.
        """
        preempted = self._grow()
        if not preempted:  # or what was just taken would go straight back
            self._admit()
        growing = [sequence for sequence in self._running if sequence.decoding]
        ready = [s for s in growing if len(s.blocks) * self.pool.block >= s.length]
        decode = tuple(Work(s, s.computed, s.length) for s in ready)
        encode = self._next_to_encode()
        if encode and not self._encode_next and any(_prefilling(s) for s in self._running):
            encode = None
        self._encode_next = encode is None
        self._encoding = encode or self._encoding
        prefill = () if encode else self._prefill(alone=not ready)
        if growing and not (ready or encode or prefill or preempted):
            raise OutOfBlocks(len(growing), self.pool.available)
        return Plan(encode, prefill, decode, preempted)

    def _grow(self) -> tuple[Sequence, ...]:
        """Gives those that decode a block for their next token, and says who lost all for it."""
        preempted = []
        for sequence in self._running.copy():
            while sequence.decoding and len(sequence.blocks) * self.pool.block < sequence.length:
                if self._spare(sequence):
                    sequence.blocks += self.pool.allocate(1, sequence.blocks[-1])
                    continue
                victim = next((s for s in reversed(self._running) if not s.pinned), None)
                if victim is None:
                    break
                self._preempt(victim)
                preempted.append(victim)
        return tuple(sorted(preempted, key=_arrival))

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._release(sequence)
        sequence.computed = 0
        insort(self._waiting, sequence, key=_arrival)
        self._preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks.clear()

    def _admit(self) -> None:
        """Gives blocks to those that wait, in order of arrival, until one finds too few."""
        while len(self._running) < self.limits.max_sequences:
            sequence = next((s for s in self._waiting if s.encoded), None)
            if sequence is None or not self._fits(sequence):
                return
            self._waiting.remove(sequence)
            self._ahead.discard(sequence.id)
            found = self._stored(sequence)
            self._use(sequence, found)
            missing = self._blocks(sequence.length) - found
            last = sequence.blocks[-1] if found else None
            sequence.blocks += self.pool.allocate(missing, last)
            insort(self._running, sequence, key=_arrival)
            if sequence.pinned:
                self._groups[sequence.id] = _Group(self._whole(sequence), [sequence])

    def _fits(self, sequence: Sequence) -> bool:
        """Whether there are blocks for it and one more, or for all of it if it is pinned."""
        whole = self._whole(sequence)
        needed = whole if sequence.pinned else min(self._blocks(sequence.length) + 1, whole)
        found = self._stored(sequence)
        # Those found need no new block, but the unowned ones among them are no longer to be had.
        taken = needed - found + self.pool.unowned(sequence.chain[:found])
        return taken <= self.pool.available - self._aside()

    def _next_to_encode(self) -> Sequence | None:
        if self._encoding:
            return self._encoding
        for sequence in self._waiting:
            if not sequence.encoded:
                return sequence
            if sequence.id in self._ahead:
                return None
        return None

    def _prefill(self, alone: bool) -> tuple[Work, ...]:
        """Up to a chunk of tokens, in order of arrival; `alone`: no answer waits for the step, and
        steps take nearly as many each, as a last one of few tokens would be computed less well.

        A sequence whose next block is being computed for another one waits, to find it stored.
        """
        works: list[Work] = []
        under_way: set[bytes] = set()
        idle = self.limits.idle_chunk if alone else None
        chunk = self.limits.chunk if idle is None else self._even(idle)
        left = max(chunk, self.limits.grid or 0)
        for sequence in self._running:
            if not _prefilling(sequence):
                continue
            self._use(sequence, self._stored(sequence), again=True)
            begin, stop = sequence.computed, self._reach(sequence, left)
            if stop == begin:
                break
            keys = sequence.chain[begin // self.pool.block : self._blocks(stop)]
            if self.limits.share and keys and keys[0] in under_way:
                continue
            works.append(Work(sequence, begin, stop))
            under_way.update(keys)
            left -= stop - begin
        return tuple(works)

    def _even(self, chunk: int) -> int:
        """Tokens of a step that leaves those behind it as many, in whole blocks."""
        all_ = sum(each.length - each.computed for each in self._running if _prefilling(each))
        steps, block = max(-(-all_ // chunk), 1), self.pool.block
        return min(-(-all_ // (steps * block)) * block, chunk)

    def _reach(self, sequence: Sequence, left: int) -> int:
        """How far its next Work goes if `left` tokens may be computed."""
        begin, grid = sequence.computed, self.limits.grid
        if grid is None:
            return min(begin + left, sequence.length)
        stop = min(begin // grid * grid + grid, sequence.prompt)
        if begin >= sequence.prompt:  # an answer's tokens were computed one by one
            stop = begin + 1
        return stop if stop - begin <= left else begin

    # ---- blocks and their keys ----------------------------------------------------------------

    def _stored(self, sequence: Sequence) -> int:
        """How many blocks behind its computed tokens are stored already, for it to use.

        Its last token is always left: computing it is what its next one comes from.
        """
        if not self.limits.share or sequence.computed % self._unit:
            return 0
        first, last = sequence.computed // self.pool.block, self._last_shared(sequence)
        found = self.pool.peek(sequence.chain[first:last])
        return found - found % (self._unit // self.pool.block)

    def _use(self, sequence: Sequence, found: int, again: bool = False) -> None:
        """Puts stored blocks into its table, in place of those it would have written."""
        if again and not found:
            return
        first = sequence.computed // self.pool.block
        stop = first + found if again else self._last_shared(sequence)
        blocks = self.pool.match(sequence.chain[first:stop] if self.limits.share else (), again)
        self.pool.release(blocks[found:] + sequence.blocks[first : first + found])
        sequence.blocks[first : first + found] = blocks[:found]
        sequence.computed += found * self.pool.block
        sequence.matched += found * self.pool.block

    def _last_shared(self, sequence: Sequence) -> int:
        return (sequence.length - 1) // self.pool.block

    def _key(self, sequence: Sequence, i: int) -> bytes | None:
        """The key of its block `i`, which has just become full; None if it is not to be shared."""
        block, grid = self.pool.block, self.limits.grid
        if i < len(sequence.keys):
            # A cell cut short by the prompt's end has another shape than in a longer prompt.
            whole = grid is None or (i + 1) * block <= sequence.prompt // grid * grid
            return sequence.chain[i] if whole else None
        if grid or sequence.pinned or not self._continues(sequence):
            return None
        while len(sequence.chain) <= i:
            base = len(sequence.chain) * block
            begin = base - len(sequence.keys) * block
            ids = sequence.tail[begin : begin + block]
            media = [(start - base, stop - base, d) for start, stop, d in sequence.media]
            parent = sequence.chain[-1] if sequence.chain else sequence.root or b""
            sequence.chain += block_keys(ids, media, block, parent)
        return sequence.chain[i]

    def _continues(self, sequence: Sequence) -> bool:
        """Whether there are keys behind the prompt's, and what they are made of is known."""
        if not sequence.continues:
            return False
        rooted = bool(sequence.keys) or sequence.root is not None
        behind = sequence.length - len(sequence.keys) * self.pool.block
        return rooted and len(sequence.tail) == behind

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.pool.block)

    def _whole(self, sequence: Sequence) -> int:
        """Blocks it needs to its end, and for its forks."""
        return self._blocks(sequence.prompt + sequence.budget) + sequence.reserve

    def _aside(self, but: _Group | None = None) -> int:
        return sum(group.aside for group in set(self._groups.values()) if group is not but)

    def _spare(self, sequence: Sequence) -> int:
        """Blocks that it may take now."""
        return max(self.pool.available - self._aside(self._groups.get(sequence.id)), 0)


def _arrival(sequence: Sequence) -> tuple[int, int]:
    return sequence.arrival


def _prefilling(sequence: Sequence) -> bool:
    return sequence.computed < sequence.length and not sequence.decoding
