"""engine/scheduler.py: who is served when, and that every token finds the right ones stored.

tests/scheduling.py is the mock engine: each of its steps checks the plan and all blocks.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from scheduling import Truth, World
from vidlm.engine.blocks import OutOfBlocks, block_keys
from vidlm.engine.scheduler import Limits, NeverFits, Sequence, Work
from vidlm.errors import InvalidArgument

LIMITS = Limits(chunk=8)


def world(limits: Limits = LIMITS, count: int = 64, block: int = 2) -> World:
    return World(count, block, limits)


def text(n: int, first: int = 1) -> Truth:
    """A prompt of `n` tokens; no other `first` shares anything with it."""
    return Truth([first, *[0] * (n - 1)], [])


def video(chunks: int, n: int = 4) -> Truth:
    return Truth([0] * n, [(0, n - 1, b"v")], chunks)


def added(world: World, truth: Truth, budget: int = 8) -> Sequence:
    sequence = world.add(truth, budget)
    assert sequence is not None
    return sequence


def works(some: tuple[Work, ...]) -> list[tuple[int, int, int]]:
    return [(work.sequence.id, work.start, work.stop) for work in some]


# ---- order -----------------------------------------------------------------------------------


def test_a_prompt_is_prefilled_in_chunks_and_then_decoded() -> None:
    w = world()
    added(w, text(19), budget=3)
    plans = [w.step() for _ in range(5)]
    assert [works(plan.prefill) for plan in plans[:3]] == [[(1, 0, 8)], [(1, 8, 16)], [(1, 16, 19)]]
    assert [works(plan.decode) for plan in plans[3:]] == [[(1, 19, 20)], [(1, 20, 21)]]
    assert w.scheduler.idle


def test_chunks_are_larger_and_even_where_no_answer_waits() -> None:
    w = world(replace(LIMITS, idle_chunk=20))
    added(w, text(25), budget=9)
    first = [w.step() for _ in range(2)]
    assert [works(plan.prefill) for plan in first] == [[(1, 0, 14)], [(1, 14, 25)]]
    added(w, text(12, 2))
    then = [w.step() for _ in range(2)]
    assert [works(plan.prefill) for plan in then] == [[(2, 0, 8)], [(2, 8, 12)]]
    assert [works(plan.decode) for plan in then] == [[(1, 25, 26)], [(1, 26, 27)]]


def test_short_prompts_share_a_chunk_beside_the_answers_under_way() -> None:
    w = world()
    added(w, text(3, 2))
    w.step()
    for n in (3, 4, 5):
        added(w, text(n, n))
    plan = w.step()
    assert works(plan.decode) == [(1, 3, 4)]
    assert works(plan.prefill) == [(2, 0, 3), (3, 0, 4), (4, 0, 1)]


def test_no_more_than_max_sequences_run_at_a_time() -> None:
    w = world(replace(LIMITS, max_sequences=2))
    for n in range(3):
        added(w, text(2, n))
    w.step()
    assert (w.scheduler.running, w.scheduler.waiting) == (2, 1)
    w.abort(1)
    assert works(w.step().prefill) == [(3, 0, 2)]


def test_one_that_finds_too_few_blocks_lets_nobody_pass() -> None:
    w = world(count=10)
    for n in (12, 8, 2):  # 6 + 1, 4 + 1 and 1 + 1 blocks
        added(w, text(n, n))
    w.step()
    assert [len(s.blocks) for s in w.live.values()] == [6, 0, 0]
    w.abort(1)
    w.step()
    assert [len(s.blocks) for s in w.live.values()] == [4, 1]


def test_the_last_to_come_is_preempted_and_comes_back_first() -> None:
    w = world(replace(LIMITS, share=False), count=6)
    for n in range(3):
        added(w, text(2, n + 4), budget=10)  # each gets its second block, and wants a third
    plans = [w.step() for _ in range(3)]
    assert not any(plan.preempted for plan in plans)
    added(w, text(2), budget=2)
    assert [s.id for s in w.step().preempted] == [3]
    assert [s.id for s in w.live.values() if not s.blocks] == [3, 4]
    for id in (1, 2):
        w.abort(id)
    length = w.live[3].length
    assert works(w.step().prefill) == [(3, 0, length), (4, 0, 2)]  # all of it once more


def test_what_could_never_fit_is_refused() -> None:
    w = world(count=4)
    with pytest.raises(NeverFits, match="5 blocks are needed, there are 4"):
        w.scheduler.add(Sequence(9, prompt=5, budget=4))
    added(w, text(5), budget=3)
    w.run()


def test_limits_are_checked() -> None:
    for wrong in ({"chunk": 0}, {"max_sequences": -1}, {"grid": 0}, {"idle_chunk": 0}):
        with pytest.raises(InvalidArgument, match=next(iter(wrong))):
            Limits(**wrong)


# ---- encoding --------------------------------------------------------------------------------


def test_a_long_video_stops_nobody() -> None:
    w = world()
    added(w, video(chunks=9))
    assert w.step().encode is w.live[1]
    added(w, text(20, 2), budget=4)
    plans = [w.step() for _ in range(7)]
    assert [bool(plan.encode) for plan in plans] == [False, True, False, True, False, True, True]
    assert works(plans[-1].decode) == [(2, 21, 22)]
    assert not w.live[1].blocks


def test_one_is_encoded_ahead_of_its_blocks() -> None:
    w = world(count=6)
    added(w, text(9, 2), budget=3)
    for _ in range(2):
        added(w, video(chunks=2), budget=4)
    encoded = []
    while not w.live[2].blocks:
        encoded.append(w.step().encode)
    assert [s.id for s in encoded if s] == [2, 2, 3]  # the third when the second had its blocks
    w.run()
    assert len(w.answers) == 3


def test_features_of_one_that_had_them_are_no_news() -> None:
    w = world(count=6)
    running, waiting = added(w, text(7), budget=4), added(w, text(9, 2), budget=2)
    behind = added(w, video(chunks=1))
    w.scheduler.encoded(waiting.id)
    assert w.step().encode is behind
    w.scheduler.encoded(running.id)
    w.run()


def test_the_next_video_is_encoded_when_one_goes_away() -> None:
    w = world()
    for _ in range(2):
        added(w, video(chunks=3))
    assert w.step().encode is w.live[1]
    w.abort(1)
    assert w.step().encode is w.live[2]


# ---- sharing ---------------------------------------------------------------------------------


def test_a_prompt_that_is_stored_is_computed_from_its_last_block_on() -> None:
    w = world(replace(LIMITS, chunk=32))
    added(w, text(12), budget=1)
    w.run()
    again = added(w, text(12), budget=1)
    w.run()
    longer = added(w, text(13), budget=1)
    w.run()
    assert w.log == [(1, 0, 12), (2, 10, 12), (3, 12, 13)]
    assert (again.matched, longer.matched) == (10, 12)
    assert w.pool.stats.hits == 22
    assert w.pool.stats.lookups == 10 + 10 + 12


def test_questions_that_come_together_compute_their_video_once() -> None:
    w = world(replace(LIMITS, chunk=16))
    for question in range(3):
        added(w, Truth([0] * 41 + [question], [(0, 41, b"v")]), budget=2)
    w.run()
    assert sum(min(stop, 40) - start for _, start, stop in w.log if start < 40) == 40


@pytest.mark.parametrize("prompt", [1, 6, 7])
@pytest.mark.parametrize("media", [[], [(0, 1, b"a")], [(5, 7, b"a")], [(6, 7, b"b")]])
def test_the_next_turn_finds_the_answer_stored(
    prompt: int, media: list[tuple[int, int, bytes]]
) -> None:
    w = world(replace(LIMITS, chunk=32))
    spans = [span for span in media if span[1] <= prompt]
    truth = Truth([1] * prompt, spans, seed=3)
    added(w, truth, budget=9)
    w.run()
    turn = added(w, Truth([*truth.ids, 1, 1], spans), budget=1)
    w.run()
    assert turn.matched == (len(truth.ids) - 1) // 2 * 2 > prompt


def test_answers_to_prompts_whose_end_differs_in_media_are_not_mixed_up() -> None:
    w = world()
    truths = [Truth([1] * 7, [(6, 7, digest)], seed=3) for digest in (b"a", b"b")]
    for truth in truths:
        added(w, truth, budget=9)
    w.run()
    for truth in truths:  # would fail in its reading
        turn = added(w, Truth([*truth.ids, 1], truth.spans), budget=1)
        w.run()
        assert turn.matched > 7


def test_what_has_no_keys_is_not_shared() -> None:
    w = world()
    for _ in range(2):
        w.add(text(7), 6, shared=False)
        w.add(text(1), 6, shared=False)
    w.run()
    assert w.pool.stats.cached == w.pool.stats.hits == 0


@pytest.mark.parametrize("known", [0, 1, 2])
def test_answers_are_shared_only_behind_a_whole_chain(known: int) -> None:
    w, ids = world(), [1, 0, 1, 0, 1]
    keys = tuple(block_keys(ids, [], 2)[:known])
    sequence = Sequence(1, prompt=5, budget=6, keys=keys, tail=[1], root=b"")
    w.scheduler.add(sequence)
    w.truths[1], w.live[1] = Truth(ids, []), sequence
    w.run()
    assert w.pool.stats.cached == (5 if known == 2 else known)


def test_an_answer_may_be_kept_from_being_shared() -> None:
    w = world()
    added(w, text(5)).continues = False
    w.run()
    assert w.pool.stats.cached == 2


def test_after_forgetting_nothing_of_before_is_found() -> None:
    w = world()
    for n in (7, 1):
        added(w, text(n), budget=8)
    for _ in range(4):
        w.step()
    w.scheduler.forget()
    w.run()
    assert w.pool.stats.cached == 0
    again = added(w, text(7), budget=8)
    w.run()
    assert again.matched == 0
    assert w.pool.stats.cached > 0


def test_one_that_was_aborted_during_the_step_leaves_nothing() -> None:
    w = world()
    added(w, text(4))
    (work,) = w.scheduler.plan().prefill
    w.abort(1)
    w.scheduler.stored(work)
    assert w.pool.stats.free == w.pool.count
    with pytest.raises(KeyError):
        w.scheduler.finish(1)


# ---- forks and groups ------------------------------------------------------------------------


def test_a_fork_shares_what_is_full_and_copies_the_rest() -> None:
    w = world(replace(LIMITS, chunk=32))
    parent = added(w, text(7))
    w.step()
    child = w.fork(parent)
    assert child is not None
    assert child.blocks[:4] == [*parent.blocks[:3], child.blocks[3]]
    assert w.scheduler.copies == [(parent.blocks[3], child.blocks[3])]
    parent.tail.append(-1)
    assert child.tail[-1] != -1
    parent.tail.pop()
    w.run()


def test_a_fork_without_room_takes_nothing() -> None:
    w = world(count=3)
    parent = added(w, text(5), budget=1)
    plan = w.scheduler.plan()
    w.scheduler.stored(plan.prefill[0])
    with pytest.raises(OutOfBlocks, match="1 blocks were wanted, 0 are to be had"):
        w.scheduler.fork(parent, 7)
    assert (w.scheduler.running, w.scheduler.copies) == (1, [])


def test_a_group_keeps_its_reserve_and_is_not_preempted() -> None:
    w = world(count=22)
    added(w, text(2), budget=20)
    beams = added(w, replace(text(3, 2), beams=2), budget=6)  # 5 blocks and 10 in reserve
    w.step()
    assert w.scheduler.stats.reserved == beams.reserve + 5 - len(beams.blocks) - 1
    late = added(w, text(8, 3), budget=8)
    lost = set()
    while any(s.pinned for s in w.live.values()):
        lost |= {s.id for s in w.step().preempted}
        w.look()
    assert lost <= {1, late.id}
    w.run()
    assert w.scheduler.stats.reserved == 0


def test_what_a_group_generates_is_not_shared() -> None:
    w = world()
    added(w, replace(text(7), beams=2), budget=6)
    w.run()
    assert w.pool.stats.cached == 3


def test_a_group_that_outgrows_its_reserve_is_an_error_at_the_end() -> None:
    w = world(count=5)
    parent = Sequence(1, prompt=2, budget=8, pinned=True)
    w.scheduler.add(parent)
    w.scheduler.stored(w.scheduler.plan().prefill[0])
    sequences = [parent, *(w.scheduler.fork(parent, i) for i in (2, 3))]
    with pytest.raises(OutOfBlocks):  # noqa: PT012
        for _ in range(9):
            for s in sequences:
                if s.computed == s.length:
                    w.scheduler.token(s, 0)
            for work in w.scheduler.plan().decode:
                w.scheduler.stored(work)


# ---- exact mode ------------------------------------------------------------------------------


def test_on_the_grid_a_prompt_is_computed_in_cells() -> None:
    w = world(Limits(chunk=8, grid=4))
    for first in (2, 3, 4):
        added(w, text(10, first), budget=2)
    prefills = [works(w.step().prefill) for _ in range(5)]
    assert prefills == [
        [(1, 0, 4), (2, 0, 4)],
        [(1, 4, 8), (2, 4, 8)],
        [(1, 8, 10), (2, 8, 10), (3, 0, 4)],
        [(3, 4, 8)],
        [(3, 8, 10)],
    ]


def test_on_the_grid_whole_cells_of_prompts_are_shared_and_no_answers() -> None:
    w = world(Limits(chunk=6, grid=6), block=4)  # a prefix ends where both end: at 12
    truth = text(23)
    for _ in range(2):
        added(w, replace(truth, ids=truth.ids[:23], hashes=[]), budget=4)
        w.run()
    assert next(start for id, start, _ in w.log if id == 2) == 12
    assert w.pool.stats.cached == 4  # not the fifth, which reaches into the last, shorter cell
    turn = added(w, Truth([*truth.ids, 1], []), budget=1)
    w.run()
    assert turn.matched == 12


def test_on_the_grid_generated_tokens_are_computed_again_one_by_one() -> None:
    w = world(Limits(chunk=8, grid=4, share=False), count=7)
    for first in (1, 2):
        added(w, text(6, first), budget=8)
    while not w.step().preempted:
        pass
    (sequence,) = w.last.preempted
    length, done = sequence.length, len(w.log)
    while sequence.computed < length:
        w.step()
    mine = [(a, b) for id, a, b in w.log[done:] if id == sequence.id]
    assert mine == [(0, 4), (4, 6), *((i, i + 1) for i in range(6, length))]


def test_keys_of_sequences_are_those_of_prompts() -> None:
    """What `fork`, preemption and the next turn rely on."""
    w, truth = world(), Truth([1, 0, 1, 1, 0], [(1, 5, b"a")], seed=3)
    sequence = added(w, truth, budget=8)
    w.run()
    assert sequence.chain == block_keys(truth.ids[:-1], truth.spans, 2)
