"""Sequences in the engine's paged cache, for tests that do without an engine."""

from __future__ import annotations

import random

import torch

from vidlm.engine.kv import PagedKV
from vidlm.nn.step import Step

CPU = torch.device("cpu")


class Paged:
    """Sequences with room for so many tokens each, whose blocks lie behind each other, or with a
    seed anywhere."""

    def __init__(
        self, rooms: list[int], block: int = 4, seed: int | None = None, coded: bool = False
    ) -> None:
        counts = [-(-room // block) for room in rooms]
        blocks = list(range(sum(counts)))
        if seed is not None:
            random.Random(seed).shuffle(blocks)
        self.kv = PagedKV(len(blocks), block, coded=coded)
        self.tables = [[blocks.pop(0) for _ in range(count)] for count in counts]
        self.lengths = [0 for _ in rooms]

    def step(self, news: dict[int, int]) -> Step:
        """A step in which sequences by number get new tokens; `count` them when it is done."""
        starts = [self.lengths[i] for i in news]
        stops = [self.lengths[i] + n for i, n in news.items()]
        positions = torch.cat([torch.arange(a, b) for a, b in zip(starts, stops, strict=True)])
        lengths = tuple(news.values())
        pages = self.kv.pages([self.tables[i] for i in news], stops, lengths)
        return Step(positions, lengths, pages=pages)

    def count(self, news: dict[int, int]) -> None:
        for i, n in news.items():
            self.lengths[i] += n
