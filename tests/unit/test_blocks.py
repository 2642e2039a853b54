"""engine/blocks.py: keys that tell contents apart, and a pool that loses and mixes up nothing."""

from __future__ import annotations

import random
import struct
from collections import OrderedDict
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vidlm.engine.blocks import BlockPool, OutOfBlocks, PoolStats, Span, block_keys, next_key

# ---- keys ------------------------------------------------------------------------------------


@st.composite
def prompts(draw: st.DrawFn) -> tuple[list[int], list[Span]]:
    """Ids and media that do not overlap; of so few kinds that two prompts often begin alike."""
    ids = draw(st.lists(st.integers(0, 1), max_size=12))
    media, at = [], 0
    for gap, length in draw(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), max_size=3)):
        media.append((at + gap, at + gap + length, draw(st.sampled_from([b"", b"a", b"ab"]))))
        at += gap + length
    return ids, draw(st.permutations(media))


def contents(prompt: tuple[list[int], list[Span]], stop: int) -> list[object]:
    """What decides the keys and values of each token before `stop`."""
    ids, media = prompt
    return [
        (ids[i], [(digest, i - a) for a, b, digest in media if a <= i < b]) for i in range(stop)
    ]


@st.composite
def pairs(draw: st.DrawFn) -> tuple[tuple[list[int], list[Span]], tuple[list[int], list[Span]]]:
    """Two prompts; mostly they differ in one thing."""
    ids, media = one = draw(prompts())
    other_ids, other_media = ids.copy(), media.copy()
    match draw(st.sampled_from(["all", "id", "start", "stop", "digest", "gone"])):
        case "all":
            return one, draw(prompts())
        case "id" if ids:
            other_ids[draw(st.integers(0, len(ids) - 1))] ^= 1
        case what if media:
            i = draw(st.integers(0, len(media) - 1))
            start, stop, digest = other_media.pop(i)
            start += what == "start"
            stop -= what == "stop"
            if start < stop and what != "gone":
                other_media.append((start, stop, digest + b"a" * (what == "digest")))
    return one, (other_ids, other_media)


@given(pairs(), st.integers(1, 4))
@settings(max_examples=500)
def test_two_prompts_share_a_key_exactly_if_they_agree_up_to_there(
    pair: tuple[tuple[list[int], list[Span]], tuple[list[int], list[Span]]], block: int
) -> None:
    one, other = pair
    mine, yours = block_keys(*one, block), block_keys(*other, block)
    assert len(mine) == len(one[0]) // block
    assert all(len(key) == 16 for key in mine)
    for i, (a, b) in enumerate(zip(mine, yours, strict=False)):
        stop = (i + 1) * block
        assert (a == b) == (contents(one, stop) == contents(other, stop))
    assert len({*mine, *yours}) == len(mine) + len(yours) - sum(
        a == b for a, b in zip(mine, yours, strict=False)
    )  # and no key comes at two places


@given(prompts(), st.integers(1, 4), st.integers(0, 12))
def test_what_follows_does_not_change_a_key(
    prompt: tuple[list[int], list[Span]], block: int, cut: int
) -> None:
    ids, media = prompt
    keys = block_keys(ids, media, block)
    assert block_keys(ids[:cut], media, block) == keys[: min(cut, len(ids)) // block]


@given(prompts(), st.integers(1, 4), st.integers(0, 3))
def test_a_chain_goes_on_from_any_of_its_keys(
    prompt: tuple[list[int], list[Span]], block: int, blocks: int
) -> None:
    ids, media = prompt
    keys = block_keys(ids, media, block, b"root")
    done = min(blocks, len(keys))
    rest = [(a - done * block, b - done * block, digest) for a, b, digest in media]
    parent = keys[done - 1] if done else b"root"
    assert block_keys(ids[done * block :], rest, block, parent) == keys[done:]


@given(st.lists(st.integers(0, 2**40), max_size=12), st.integers(1, 4), st.binary(max_size=17))
def test_next_key_is_the_next_key(ids: list[int], block: int, root: bytes) -> None:
    keys = block_keys(ids, [], block, root)
    parents = [root, *keys]
    for i, key in enumerate(keys):
        assert next_key(parents[i], ids[i * block : (i + 1) * block]) == key


def test_the_root_and_the_block_size_are_in_every_key() -> None:
    chains = [
        block_keys([1] * 8, [], block, root) for block, root in ((2, b""), (2, b"r"), (4, b""))
    ]
    assert len({key for chain in chains for key in chain}) == 4 + 4 + 2


def test_no_content_passes_for_another() -> None:
    numbers = struct.pack("<2q", 1, 2)
    apart = [(0, 1, b""), (1, 2, b"")], [(0, 1, numbers)]
    assert block_keys([1, 1], apart[0], 2) != block_keys([1, 1], apart[1], 2)
    assert next_key(b"", [1, 2, 3]) != next_key(numbers, [3])


def test_media_without_tokens_count_where_they_stand() -> None:
    plain = block_keys([1] * 8, [], 2)
    empty = block_keys([1] * 8, [(4, 4, b"a")], 2)
    assert [a == b for a, b in zip(plain, empty, strict=True)] == [True, True, False, False]


# ---- the pool against a model of it ----------------------------------------------------------


class Pool(RuleBasedStateMachine):
    """Any operations on a small pool, beside a model that is slow and plain."""

    @initialize(count=st.integers(0, 12), block=st.integers(1, 3))
    def begin(self, count: int, block: int) -> None:
        self.pool = BlockPool(count, block)
        self.owners: dict[int, int] = {}
        self.keys: dict[int, bytes] = {}
        self.cached: OrderedDict[int, None] = OrderedDict()  # longest unused first
        self.tables: list[list[int]] = []
        self.hits = self.lookups = self.evicted = 0

    @property
    def free(self) -> list[int]:
        return [b for b in range(self.pool.count) if b not in self.owners and b not in self.cached]

    def stored(self, keys: list[bytes]) -> list[int]:
        where = {key: block for block, key in self.keys.items()}
        known = [key in where for key in keys]
        return [where[key] for key in keys[: [*known, False].index(False)]]

    @rule(n=st.integers(0, 14), after=st.none() | st.integers(0, 12))
    def allocate(self, n: int, after: int | None) -> None:
        free = self.free
        if n > len(free) + len(self.cached):
            with pytest.raises(OutOfBlocks) as error:
                self.pool.allocate(n, after)
            assert (error.value.wanted, error.value.free) == (n, len(free) + len(self.cached))
            return
        for _ in range(n - len(free)):
            block, _ = self.cached.popitem(last=False)
            del self.keys[block]
            self.evicted += 1
        free = self.free
        blocks = self.pool.allocate(n, after)
        assert len({*blocks}) == n
        assert {*blocks} <= {*free}
        if after is not None and after not in free and after + 1 in free and n:
            assert blocks[0] == after + 1
        elif longest_run(free) >= n:
            assert blocks == list(range(blocks[0], blocks[0] + n)) if n else not blocks
        else:
            assert longest_run(blocks) == longest_run(free)
        self.owners |= dict.fromkeys(blocks, 1)
        self.tables.append(blocks)

    @rule(keys=st.lists(st.sampled_from([b"a", b"b", b"c", b"d"]), max_size=4), again=st.booleans())
    def match(self, keys: list[bytes], again: bool) -> None:
        expected = self.stored(keys)
        assert self.pool.peek(keys) == len(expected)
        if len({*keys}) == len(keys):  # as in a chain
            unowned = [block for block in expected if block not in self.owners]
            assert self.pool.unowned(keys) == len(unowned)
        assert self.pool.match(keys, again) == expected
        self.own(expected)
        self.hits += len(expected) * self.pool.block
        self.lookups += 0 if again else len(keys) * self.pool.block

    def own(self, blocks: list[int]) -> None:
        for block in blocks:
            self.cached.pop(block, None)
            self.owners[block] = self.owners.get(block, 0) + 1
        self.tables.append(blocks)

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data(), key=st.sampled_from([b"a", b"b", b"c", b"d"]))
    def publish(self, data: st.DataObject, key: bytes) -> None:
        block = data.draw(st.sampled_from(sorted(self.owners)))
        if block in self.keys and key not in self.keys.values():
            return  # it has a key, which does not change
        self.pool.publish(block, key)
        if key not in self.keys.values():
            self.keys[block] = key

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from([table for table in self.tables if table]))
        part = table[: data.draw(st.integers(1, len(table)))]
        self.pool.share(part)
        self.own(part)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.release(table)
        for block in reversed(table):
            self.owners[block] -= 1
            if not self.owners[block]:
                del self.owners[block]
                if block in self.keys:
                    self.cached[block] = None

    @rule()
    def forget(self) -> None:
        self.pool.forget()
        self.keys.clear()
        self.cached.clear()

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "pool"):
            return
        count, owned, cached = self.pool.count, len(self.owners), len(self.cached)
        free = count - owned - cached
        counted = (self.hits, self.lookups, self.evicted)
        assert self.pool.stats == PoolStats(count, owned, cached, free, *counted)
        assert self.pool.available == free + cached
        for block in range(count):
            assert self.pool.owners(block) == self.owners.get(block, 0)
            assert self.pool.key(block) == self.keys.get(block)


def longest_run(blocks: list[int]) -> int:
    best = run = min(len(blocks), 1)
    for a, b in pairwise(sorted(blocks)):
        run = run + 1 if b == a + 1 else 1
        best = max(best, run)
    return best


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=200, stateful_step_count=40)


# ---- what the model does not say -------------------------------------------------------------


def published(pool: BlockPool, keys: list[bytes]) -> list[int]:
    blocks = pool.allocate(len(keys))
    for block, key in zip(blocks, keys, strict=True):
        pool.publish(block, key)
    return blocks


def test_the_end_of_a_chain_is_evicted_before_its_beginning() -> None:
    pool = BlockPool(6, 4)
    old, new = [b"a", b"b", b"c"], [b"x", b"y", b"z"]
    tables = [published(pool, old), published(pool, new)]
    for table in tables:
        pool.release(table)
    pool.release(pool.match(old[:1]))  # used again
    remains = []
    for _ in range(6):
        pool.allocate(1)
        remains.append((pool.peek(old), pool.peek(new)))
    assert remains == [(2, 3), (1, 3), (1, 2), (1, 1), (1, 0), (0, 0)]


def test_an_answer_grows_behind_its_prompt() -> None:
    pool = BlockPool(64, 16)
    tables = [pool.allocate(5) for _ in range(4)]
    for _ in range(3):
        for table in tables:
            table += pool.allocate(1, table[-1])
    assert [longest_run(table) for table in tables] == [8, 8, 8, 8]


def test_a_block_without_an_owner_is_not_published_or_released() -> None:
    pool = BlockPool(2, 4)
    with pytest.raises(AssertionError, match="no owner"):
        pool.publish(0, b"a")
    with pytest.raises(AssertionError, match="no owner"):
        pool.release([0])
    with pytest.raises(KeyError):
        pool.share([0])
    (block,) = published(pool, [b"a"])
    with pytest.raises(AssertionError, match="another key"):
        pool.publish(block, b"b")


def test_a_hundred_thousand_blocks_are_no_problem() -> None:
    """Anything that took time in the blocks there are, not those named, would not end today."""
    count, rng = 100_000, random.Random(1)
    pool = BlockPool(count, 16)
    keys = block_keys([7] * (16 * count), [(5, 16 * count - 5, b"video")], 16)
    tables = [published(pool, keys[i : i + 4]) for i in range(0, count, 4)]
    assert pool.available == 0
    rng.shuffle(tables)
    for table in tables:
        pool.release(table)
    assert pool.peek(keys) == count
    assert sorted(block for table in tables for block in table) == list(range(count))
    for _ in range(count // 2):
        pool.allocate(1)
    assert pool.stats == PoolStats(count, count // 2, count // 2, 0, 0, 0, count // 2)
    pool.release(pool.match(keys))
    pool.forget()
    blocks = [pool.allocate(1)[0] for _ in range(count // 2)]
    rng.shuffle(blocks)
    for block in blocks:  # full of holes, which grow together again
        pool.release([block])
    assert pool.available == count // 2
    assert longest_run(pool.allocate(count // 2)) >= 4
