"""engine/scheduler.py under any operations: every token finds the right ones stored.

tests/scheduling.py is the mock engine: each of its steps checks the plan and all blocks.
"""

from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from scheduling import Truth, World, random_operation, random_world
from vidlm.engine.scheduler import Limits


def test_twenty_five_thousand_random_operations() -> None:
    preempted = hits = recomputed = finished = 0
    for seed in range(100):
        rng = random.Random(seed)
        w = random_world(rng)
        for _ in range(250):
            random_operation(w, rng)
        w.run()
        preempted += w.scheduler.stats.preempted
        hits += w.pool.stats.hits
        finished += len(w.answers)
        recomputed += sum(w.limits.grid is not None and b > a + 1 for _, a, b in w.log)
    # that the programs reach what they are there to reach
    assert min(preempted, recomputed, finished // 10, hits // 10) > 100


@given(st.randoms(use_true_random=False), st.integers(1, 40))
@settings(max_examples=100)
def test_any_operations(rng: random.Random, operations: int) -> None:
    w = random_world(rng)
    for _ in range(operations):
        random_operation(w, rng)
    w.run()


@given(st.integers(0, 2**32), st.sampled_from([None, 4]), st.booleans())
@settings(max_examples=30)
def test_an_answer_is_the_same_alone_and_in_company(
    seed: int, grid: int | None, share: bool
) -> None:
    rng = random.Random(seed)
    truths = [Truth(rng.choices([0, 1], k=rng.randint(1, 12)), [], seed=i) for i in range(8)]
    limits = Limits(max_sequences=5, chunk=5, share=share, grid=grid)

    def answers(together: list[Truth], count: int) -> list[list[int]]:
        w = World(count, 2, limits)
        for truth in together:
            assert w.add(replace(truth, ids=truth.ids.copy(), hashes=[]), 9)
        w.run()
        return [w.answers[i + 1] for i in range(len(together))]

    assert answers(truths, 13) == [answers([truth], 64)[0] for truth in truths]
