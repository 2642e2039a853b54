"""Step: the only run-time object layers see, beside the tokens themselves.

Tokens of all sequences of a step lie one behind the other in one packed axis T: no batch axis, no
padding. A Step says where each sequence begins, which position each token has, and where the
keys and values of earlier tokens are kept. It is an argument, never ambient, so that two engines
can run in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from vidlm.native import Cache
from vidlm.nn.upload import upload


class Memory:
    """What layers may attend to beside a sequence's own tokens, and its keys and values in each
    layer, which are made once.

    tokens  (S, D), as all layers get them; None once they are forgotten
    """

    def __init__(self, tokens: Tensor) -> None:
        self.tokens: Tensor | None = tokens
        self._made: dict[int, tuple[Tensor, Tensor]] = {}

    def project(
        self, layer: int, make: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Keys and values (K, S, E) of a layer, which `make` makes of the tokens."""
        if layer not in self._made:
            assert self.tokens is not None  # every layer has met them before they are forgotten
            self._made[layer] = make(self.tokens)
        return self._made[layer]

    def forget_tokens(self) -> None:
        """Free the tokens, once every layer that reads them has made its keys and values."""
        self.tokens = None


class KV(Protocol):
    """Keys and values of one sequence's earlier tokens, for every layer."""

    memory: Memory | None

    @property
    def length(self) -> int:
        """Tokens stored by the steps before this one."""

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store (n, K, E) new keys and values; return all of them, each (K, S, E)."""


class Room:
    """Memory for what each layer needs for itself, one after the other: taken once a step."""

    def __init__(self) -> None:
        self._kept: Tensor | None = None

    def take(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Room of this shape, of like's dtype and device, holding anything; who took it before has
        it no longer."""
        count = prod(shape)
        if self._kept is None or len(self._kept) < count or self._kept.dtype != like.dtype:
            self._kept = like.new_empty(count)
        return self._kept[:count].view(shape)


@dataclass(frozen=True)
class Pages:
    """Where a step's keys and values lie in a cache that all sequences share, block by block.

    layer    number, keys and values (T, K, E) of a step's tokens -> that layer's buffers (K, N, E)
             of keys and of values, N the slots of the whole cache; coded or not
    block    slots of a block
    tables   (B, W) int32, the blocks of each sequence, filled up with anything
    lengths  (B,) int32, tokens of each sequence, this step's included
    slots    (T,) int64, where each of this step's tokens goes
    spans    of each sequence, where all its tokens are: a slice where they lie behind each other,
             (S,) int64 slots where not
    room     for numbers of what is coded
    """

    layer: Callable[[int, Tensor, Tensor], tuple[Cache, Cache]]
    block: int
    tables: Tensor
    lengths: Tensor
    slots: Tensor
    spans: tuple[slice | Tensor, ...]
    room: Room = field(default_factory=Room, init=False, repr=False, compare=False)

    def to(self, device: torch.device) -> Pages:
        """The same with its tensors on this device."""
        spans = tuple(s if isinstance(s, slice) else upload(s, device) for s in self.spans)
        given = (self.tables, self.lengths, self.slots)
        tables, lengths, slots = (upload(x, device) for x in given)
        return replace(self, tables=tables, lengths=lengths, slots=slots, spans=spans)


@dataclass(frozen=True)
class Segment:
    """One sequence's share of the packed axis."""

    start: int
    stop: int
    kv: KV | None
    memory: Memory | None = None


@dataclass(frozen=True)
class Trace:
    """What a caller wants to see of a step beside its result; a list that is None is not filled.

    hidden      the input of every layer, and what the last norm makes: (T, D) each
    attentions  for every layer one (H, n, S) a sequence: the weights of its n new tokens over all
                S tokens of the sequence so far
    """

    hidden: list[Tensor] | None = None
    attentions: list[list[Tensor]] | None = None


@dataclass(frozen=True)
class Step:
    """One pass over T packed tokens of one or more sequences.

    positions  (T,) int64, each token's position in its own sequence (for rotary embeddings)
    lengths    new tokens of each sequence; they add up to T
    kv         where each sequence's earlier keys and values are, or None to run without a cache
               (each sequence then starts at its first token here: training, scoring)
    pages      the engine's way to keep them, instead of kv
    memory     of each sequence, or None where no sequence has one
    readers    (T,) bool: the tokens that attend to their sequence's memory; None: all of them
    trace      where layers leave what the caller asked to see
    copies     what `vidlm.nn.placed` keeps of the step on other devices, for the layers there
    """

    positions: Tensor
    lengths: tuple[int, ...]
    kv: tuple[KV, ...] | None = None
    pages: Pages | None = None
    memory: tuple[Memory | None, ...] | None = None
    readers: Tensor | None = None
    trace: Trace = field(default_factory=Trace)
    copies: dict[torch.device, Any] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def to(self, device: torch.device) -> Step:
        """The same with its tensors on this device. Memories stay, and so does what is cached: each
        layer's keys and values are where the layer runs."""
        return replace(
            self,
            positions=self.positions.to(device),
            pages=None if self.pages is None else self.pages.to(device),
            readers=None if self.readers is None else self.readers.to(device),
        )

    @property
    def uniform(self) -> bool:
        """Whether all sequences bring the same number of tokens and there is no cache."""
        return self.kv is None and self.pages is None and len(set(self.lengths)) == 1

    def segments(self) -> Iterator[Segment]:
        start = 0
        for i, length in enumerate(self.lengths):
            kv, memory = self.kv[i] if self.kv else None, self.memory[i] if self.memory else None
            yield Segment(start, start + length, kv, memory)
            start += length

    def last_rows(self) -> list[int]:
        """Row of each sequence's last token: where its next token is predicted."""
        return [segment.stop - 1 for segment in self.segments()]


def packed(lengths: Sequence[int], device: torch.device, kv: Sequence[KV] | None = None) -> Step:
    """A step of sequences that continue after whatever `kv` holds of them, memory included."""
    pasts = [store.length for store in kv] if kv is not None else [0] * len(lengths)
    spans = [
        torch.arange(past, past + n, dtype=torch.int64, device="cpu")
        for past, n in zip(pasts, lengths, strict=True)
    ]
    positions = upload(torch.cat(spans), device)
    if kv is None:
        return Step(positions, tuple(lengths))
    memory = tuple(store.memory for store in kv)
    return Step(positions, tuple(lengths), tuple(kv), memory=memory if any(memory) else None)
