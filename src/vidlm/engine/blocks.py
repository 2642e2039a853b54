"""Blocks of the store of keys and values: who owns which, and which are shared by prefix.

The store is `count` blocks of `block` tokens. Here a block is its number; what is in it is
`engine.kv`'s matter. A block is *owned* by the sequences whose tables name it, *cached* if nobody
owns it but its content is known by key and may be used again, or *free*.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from heapq import heapify, heappop, heappush

Span = tuple[int, int, bytes]  # start, stop and digest of an image or video in a prompt's tokens


def block_keys(
    ids: Sequence[int], media: Iterable[Span], block: int, root: bytes = b""
) -> list[bytes]:
    """Keys of the full blocks of a prompt: a hash chain, each over everything before it.

    Two prompts share a key exactly if their ids agree up to the block's end, and at each of these
    positions the digest of the media there and which of its tokens it is. `root` stands for
    whatever else decides what is stored: where tokens attend to media that come later, as through
    a memory, the digests of those belong into it.

    A span may begin before 0: ids may be those behind a key that is given as `root`.
    """
    full = len(ids) // block
    touching: dict[int, list[Span]] = {}
    for start, stop, digest in sorted(media, key=lambda span: span[0]):
        last = max(stop - 1, start) // block  # media without tokens count where they stand
        for i in range(max(start, 0) // block, min(last + 1, full)):
            begin = i * block
            # What is behind the block's end does not decide what is stored in it.
            span = (start - begin, min(stop - begin, block), digest)
            touching.setdefault(i, []).append(span)
    keys = [root]
    for i in range(full):
        keys.append(next_key(keys[-1], ids[i * block : (i + 1) * block], touching.get(i, ())))
    return keys[1:]


def next_key(parent: bytes, ids: Sequence[int], media: Iterable[Span] = ()) -> bytes:
    """The key of one block behind `parent`; 16 bytes. Spans count from the block's beginning."""
    # Lengths before contents: no two different inputs are the same bytes.
    state = blake2b(struct.pack("<2q", len(parent), len(ids)), digest_size=16)
    state.update(parent)
    state.update(struct.pack(f"<{len(ids)}q", *ids))
    for start, stop, digest in media:
        state.update(struct.pack("<3q", start, stop, len(digest)))
        state.update(digest)
    return state.digest()


class OutOfBlocks(Exception):
    """Fewer blocks are to be had than were wanted; nothing was taken."""

    def __init__(self, wanted: int, free: int) -> None:
        super().__init__(f"{wanted} blocks were wanted, {free} are to be had")
        self.wanted = wanted
        self.free = free


@dataclass(frozen=True)
class PoolStats:
    """Blocks by state (owned + cached + free = count), and what was counted since the beginning."""

    count: int
    owned: int
    cached: int
    free: int
    hits: int  # tokens that `match` found
    lookups: int  # tokens that `match` was asked for
    evicted: int  # cached blocks given up for others


class BlockPool:
    """`count` blocks of `block` tokens, and who owns them.

    Every operation takes time in the blocks it names (times the logarithm of `count` where free
    ones are searched), not in those there are.
    """

    def __init__(self, count: int, block: int) -> None:
        self.count = count
        self.block = block
        self._owners = [0] * count
        self._free = _FreeRuns(count)
        self._keys: dict[int, bytes] = {}  # of published blocks
        self._by_key: dict[bytes, int] = {}
        # Published blocks without an owner, the longest unused first. Not a dict: taking the first
        # item of one costs time in all that were taken before.
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._hits = self._lookups = self._evicted = 0

    @property
    def available(self) -> int:
        """Blocks that `allocate` can give: free ones, and cached ones without an owner."""
        return self._free.count + len(self._cached)

    @property
    def stats(self) -> PoolStats:
        free, cached = self._free.count, len(self._cached)
        owned = self.count - free - cached
        return PoolStats(self.count, owned, cached, free, self._hits, self._lookups, self._evicted)

    def allocate(self, n: int, after: int | None = None) -> list[int]:
        """`n` blocks with one owner: neighbours where there are that many, behind `after` if free.

        What free ones do not cover is taken from the cached, the longest unused first.
        Raises OutOfBlocks, and then takes nothing.
        """
        if n > self.available:
            raise OutOfBlocks(n, self.available)
        self._free.give([self._evict() for _ in range(n - self._free.count)])
        blocks = self._free.take(n, after)
        for block in blocks:
            self._owners[block] = 1
        return blocks

    def match(self, keys: Sequence[bytes], again: bool = False) -> list[int]:
        """The longest beginning of `keys` that is stored, and of each block one owner more.

        again: these keys were asked for before, so they are not counted in `lookups` once more.
        """
        blocks = list(self._stored(keys))
        self.share(blocks)
        self._hits += len(blocks) * self.block
        self._lookups += 0 if again else len(keys) * self.block
        return blocks

    def peek(self, keys: Sequence[bytes]) -> int:
        """How many blocks `match` would find; nothing is taken or counted."""
        return sum(1 for _ in self._stored(keys))

    def unowned(self, keys: Sequence[bytes]) -> int:
        """By how many `match` would lower `available`: those it finds that nobody owns yet."""
        return sum(not self._owners[block] for block in self._stored(keys))

    def publish(self, block: int, key: bytes) -> None:
        """The block's content is complete: it may be shared and is not written to any more.

        A second block with a known key stays its owner's alone.
        """
        assert self._owners[block] > 0, f"block {block} has no owner"
        if key in self._by_key:
            return
        assert block not in self._keys, f"block {block} is published under another key"
        self._keys[block] = key
        self._by_key[key] = block

    def key(self, block: int) -> bytes | None:
        """What the block is published under."""
        return self._keys.get(block)

    def share(self, blocks: Sequence[int]) -> None:
        """One owner more for each: a sequence that forks, or one that found them by key."""
        for block in blocks:
            if not self._owners[block]:
                del self._cached[block]  # KeyError for a free one, which has nothing to share
            self._owners[block] += 1

    def owners(self, block: int) -> int:
        return self._owners[block]

    def release(self, blocks: Sequence[int]) -> None:
        """One owner less for each. Without any, published blocks are cached and others are free.

        The blocks are those of one table, in its order: the last becomes the longest unused, for
        a chain is of use only up to its first gap.
        """
        freed = []
        for block in reversed(blocks):
            assert self._owners[block] > 0, f"block {block} has no owner"
            self._owners[block] -= 1
            if self._owners[block]:
                continue
            if block in self._keys:
                self._cached[block] = None
            else:
                freed.append(block)
        self._free.give(freed)

    def forget(self) -> None:
        """Free what is cached, and share nothing of what is published now.

        What its owners publish from here on is shared again.
        """
        self._free.give(self._cached)
        self._cached.clear()
        self._keys.clear()
        self._by_key.clear()

    def _stored(self, keys: Sequence[bytes]) -> Iterator[int]:
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                return
            yield block

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        del self._by_key[self._keys.pop(block)]
        self._evicted += 1
        return block


class _FreeRuns:
    """The free blocks as runs of neighbours, the longest run at hand."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._stops: dict[int, int] = {}  # start of a run -> its stop
        self._starts: dict[int, int] = {}  # stop of a run -> its start
        # A heap of (-length, start). Runs that are no longer so stay in it until they come up.
        self._longest: list[tuple[int, int]] = []
        self._put(0, count)

    def give(self, blocks: Iterable[int]) -> None:
        for start, stop in _runs(sorted(blocks)):
            self.count += stop - start
            first, last = self._starts.pop(start, start), self._stops.pop(stop, stop)
            if first < start:
                del self._stops[first]
            if last > stop:
                del self._starts[last]
            self._put(first, last)

    def take(self, n: int, after: int | None) -> list[int]:
        """`n` of them, in as few runs as can be; the first behind `after` if that is free."""
        blocks: list[int] = []
        if after is not None and after + 1 in self._stops:
            blocks += self._cut(after + 1, after + 1, n)
        while len(blocks) < n:
            start, length = self._find_longest()
            # Whoever ends before this run may still grow, and so may who asks: they part the room.
            room = max(length - (n - len(blocks)), 0) // 2 if start else 0
            blocks += self._cut(start, start + room, n - len(blocks))
        return blocks

    def _cut(self, start: int, first: int, n: int) -> range:
        """Up to `n` blocks from `first` on, out of the run that begins at `start`."""
        stop = self._stops.pop(start)
        del self._starts[stop]
        last = min(first + n, stop)
        self._put(start, first)
        self._put(last, stop)
        self.count -= last - first
        return range(first, last)

    def _put(self, start: int, stop: int) -> None:
        if start == stop:
            return
        self._stops[start] = stop
        self._starts[stop] = start
        heappush(self._longest, (start - stop, start))
        if len(self._longest) > 2 * len(self._stops) + 64:
            self._longest = [(start - stop, start) for start, stop in self._stops.items()]
            heapify(self._longest)

    def _find_longest(self) -> tuple[int, int]:
        while True:
            length, start = self._longest[0]
            if self._stops.get(start) == start - length:
                return start, -length
            heappop(self._longest)


def _runs(blocks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Runs of neighbours among blocks in ascending order, as (start, stop)."""
    start = 0
    for i, block in enumerate(blocks):
        if i + 1 == len(blocks) or blocks[i + 1] != block + 1:
            yield blocks[start], block + 1
            start = i + 1
