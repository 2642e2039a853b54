"""The two kinds of a step: parts of prompts, and one further token of each of several answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vidlm.engine.inputs import PromptInputs
from vidlm.engine.kv import PagedKV, Table
from vidlm.models.base import VideoModel
from vidlm.nn.step import Memory, Step
from vidlm.nn.upload import upload


@dataclass(frozen=True)
class Part:
    """One sequence's share of a step, embedded.

    x        (n, D), its new tokens, of prompt or answer
    start    how many of its tokens come before them
    table    the blocks that hold and will hold their keys and values
    memory   what its tokens may attend to beside it, and which of them do: (n,) bool
    wanted   whether logits after the last of them are
    """

    x: Tensor
    start: int
    table: Sequence[int]
    memory: Memory | None = None
    readers: Tensor | None = None
    wanted: bool = True

    @classmethod
    def of(
        cls,
        inputs: PromptInputs,
        ids: Sequence[int],
        start: int,
        table: Sequence[int],
        wanted: bool = True,
    ) -> Part:
        """The tokens `ids` of prompt and answer from `start` on."""
        memory = inputs.memory
        readers = None if memory is None else inputs.readers(start, start + len(ids))
        return cls(inputs.rows(ids, start), start, table, memory, readers, wanted)

    @property
    def stop(self) -> int:
        return self.start + len(self.x)


@dataclass(frozen=True)
class Newest:
    """An answer's newest token, of `stop` tokens of prompt and answer."""

    id: int
    stop: int
    table: Table
    memory: Memory | None


Share = Part | Newest
Run = Callable[[VideoModel, PagedKV, Sequence[Any]], Tensor]  # prefill of Parts, decode of Newest


def prefill(model: VideoModel, kv: PagedKV, parts: Sequence[Part]) -> Tensor:
    """Logits (B, V) float32 after the parts that want them."""
    lengths = tuple(len(part.x) for part in parts)
    positions = torch.cat(
        [torch.arange(part.start, part.stop, dtype=torch.int64, device="cpu") for part in parts]
    )
    pages = kv.pages([part.table for part in parts], [part.stop for part in parts], lengths)
    step = Step(upload(positions, kv.device), lengths, pages=pages)
    memory = tuple(part.memory for part in parts)
    if any(memory):
        step = replace(step, memory=memory, readers=torch.cat([_readers(part) for part in parts]))
    hidden = model.hidden(torch.cat([part.x for part in parts]), step)
    rows = [row for row, part in zip(step.last_rows(), parts, strict=True) if part.wanted]
    return model.logits(hidden[kv.tensor(rows)]).float()


def decode(model: VideoModel, kv: PagedKV, newest: Sequence[Newest]) -> Tensor:
    """The newest token of each answer in; logits (B, V) float32 for its next one out."""
    stops = [token.stop for token in newest]
    pages = kv.next_pages([token.table for token in newest], stops)
    positions = kv.tensor([stop - 1 for stop in stops])
    memory = tuple(token.memory for token in newest)
    step = Step(positions, (1,) * len(newest), pages=pages, memory=memory if any(memory) else None)
    ids = kv.tensor([token.id for token in newest])
    return model.logits(model.hidden(model.embed(ids), step)).float()


def _readers(part: Part) -> Tensor:
    """Of a part without a memory none matter."""
    if part.readers is not None:
        return part.readers
    return torch.zeros(len(part.x), dtype=torch.bool, device=part.x.device)
