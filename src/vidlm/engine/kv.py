"""Keys and values of all sequences of an engine, in blocks that sequences may share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vidlm.native import SCALE_BYTES, Cache, Coded, tensors_of
from vidlm.nn.step import Pages
from vidlm.nn.upload import upload

CPU = torch.device("cpu")


class Table:
    """The blocks of one sequence as an array, which grows as the list of them does: a long one is
    not turned into an array again for every token."""

    def __init__(self, blocks: Sequence[int]) -> None:
        self._blocks = blocks
        self._row = np.array([*blocks, *[0] * len(blocks)], np.int32)
        self._count = len(blocks)

    @property
    def row(self) -> NDArray[np.int32]:
        """The blocks of now, and room behind them."""
        count = len(self._blocks)
        if count > len(self._row):
            self._row = np.concatenate((self._row, np.zeros_like(self._row)))
        if count > self._count:
            self._row[self._count : count] = self._blocks[self._count :]
            self._count = count
        return self._row


class PagedKV:
    """Room for the tokens of `blocks` blocks: one (K, N, E) buffer for keys and one for values a
    layer, N = blocks * block.

    Heads come before slots, so that tokens whose blocks follow each other are read in one run. On a
    CPU the buffers are address space alone until tokens are written; they are made when the first
    token arrives, whose shape and dtype they take; under autocast the dtype also holds `dtype`,
    that of steps without. Where `coded`, they hold eight bits a number,
    whatever the dtype. Which block is whose, `blocks.BlockPool` knows. `empty` finds memory as
    torch.empty does.
    """

    def __init__(
        self,
        blocks: int,
        block: int,
        device: torch.device = CPU,
        coded: bool = False,
        empty: Callable[..., Tensor] = torch.empty,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.blocks, self.block, self.device, self.coded = blocks, block, device, coded
        self._memory, self._dtype = empty, dtype
        self._layers: list[tuple[Cache, Cache]] = []

    @property
    def layers(self) -> Sequence[tuple[Cache, Cache]]:
        """Keys and values (K, N, E) of each layer; none before the first token."""
        return self._layers

    def layer(self, index: int, k: Tensor, v: Tensor) -> tuple[Cache, Cache]:
        """The buffers of a layer that is about to store k and v (T, K, E)."""
        if index == len(self._layers):  # the first step meets the layers in order
            self._layers.append((self._empty(k), self._empty(v)))
        return self._layers[index]

    def _empty(self, x: Tensor) -> Cache:
        _, K, E = x.shape
        shape = (K, self.blocks * self.block, E)
        if self.coded:
            return Coded.empty(shape, x.device, self._memory)
        dtype = x.dtype
        if self._dtype is not None and torch.is_autocast_enabled(x.device.type):
            dtype = torch.promote_types(dtype, self._dtype)  # steps without it come, too
        return self._memory(shape, dtype=dtype, device=x.device)

    def pages(
        self, tables: Sequence[Sequence[int]], stops: Sequence[int], lengths: Sequence[int]
    ) -> Pages:
        """A step that brings the last `lengths` tokens of sequences of `stops` tokens."""
        spans = [self._span(table, 0, stop) for table, stop in zip(tables, stops, strict=True)]
        news = [
            _slots(self._span(table, stop - n, stop))
            for table, stop, n in zip(tables, stops, lengths, strict=True)
        ]
        return Pages(
            self.layer,
            self.block,
            self._padded([np.array(table, np.int32) for table in tables], stops),
            torch.tensor(stops, dtype=torch.int32, device="cpu"),
            torch.cat(news),
            tuple(spans),
        ).to(self.device)

    def next_pages(self, tables: Sequence[Table], stops: Sequence[int]) -> Pages:
        """A step that brings the last token of sequences of `stops` tokens, one of each."""
        block = self.block
        rows = [table.row for table in tables]
        slots = [
            int(row[(stop - 1) // block]) * block + (stop - 1) % block
            for row, stop in zip(rows, stops, strict=True)
        ]
        return Pages(
            self.layer,
            block,
            upload(self._padded(rows, stops), self.device),
            self.tensor(stops, np.int32),
            self.tensor(slots),
            (),
        )

    def tensor(self, values: Sequence[int], dtype: type[np.integer[Any]] = np.int64) -> Tensor:
        """(n,) on the device; by way of numpy, which takes a third of the time."""
        return upload(torch.from_numpy(np.array(values, dtype)), self.device)

    def _padded(self, rows: Sequence[NDArray[np.int32]], stops: Sequence[int]) -> Tensor:
        """The blocks of each sequence's first `stops` tokens: (B, W)."""
        counts = [-(-stop // self.block) for stop in stops]
        if len(rows) == 1:
            return torch.from_numpy(rows[0][None, : counts[0]])
        tables = np.zeros((len(rows), max(counts)), np.int32)
        for table, row, count in zip(tables, rows, counts, strict=True):
            table[:count] = row[:count]
        return torch.from_numpy(tables)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy the content of each pair's first block to its second."""
        size = self.block
        for old, new in pairs:
            for layer in self._layers:
                for buffer in (x for cache in layer for x in tensors_of(cache)):
                    source = buffer[:, old * size : (old + 1) * size]
                    buffer[:, new * size : (new + 1) * size] = source

    def read(self, table: Sequence[int], tokens: int) -> list[tuple[Cache, Cache]]:
        """Copies of the first `tokens` keys and values (K, S, E) of a sequence, of every layer, as
        they are stored."""
        span = _slots(self._span(table, 0, tokens))
        return [(_picked(k, span), _picked(v, span)) for k, v in self._layers]

    def write(self, table: Sequence[int], stored: Sequence[tuple[Cache, Cache]]) -> None:
        """Put what `read` gave into these blocks."""
        for index, pair in enumerate(stored):
            k, v = (tensors_of(x)[0].transpose(0, 1) for x in pair)
            span = _slots(self._span(table, 0, len(k)))
            for buffers, found in zip(self.layer(index, k, v), pair, strict=True):
                for buffer, x in zip(tensors_of(buffers), tensors_of(found), strict=True):
                    buffer[:, span.to(buffer.device)] = x.to(buffer)

    def _span(self, table: Sequence[int], start: int, stop: int) -> slice | Tensor:
        """Slots of a sequence's tokens [start, stop)."""
        size, first = self.block, start // self.block
        blocks = table[first : -(-stop // size)]
        offset = start - first * size
        if all(b == blocks[0] + i for i, b in enumerate(blocks)):
            begin = blocks[0] * size + offset
            return slice(begin, begin + stop - start)
        ids = torch.tensor(blocks, dtype=torch.int64, device="cpu")[:, None] * size
        ids = ids + torch.arange(size, dtype=torch.int64, device="cpu")
        return ids.flatten()[offset : offset + stop - start]


def _slots(span: slice | Tensor) -> Tensor:
    if isinstance(span, slice):
        return torch.arange(span.start, span.stop, dtype=torch.int64, device="cpu")
    return span


def _picked(cache: Cache, slots: Tensor) -> Cache:
    found = [x[:, slots.to(x.device)] for x in tensors_of(cache)]
    return Coded(*found) if isinstance(cache, Coded) else found[0]


def bytes_per_token(layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Memory one cached token takes. Of int8, each head's keys and values have a scale besides."""
    scale = SCALE_BYTES if dtype == torch.int8 else 0
    return 2 * layers * kv_heads * (head_dim * dtype.itemsize + scale)


def kv_dtype(named: str | None, dtype: torch.dtype) -> torch.dtype:
    """What EngineOptions.kv_dtype means for a model of `dtype`."""
    return dtype if named is None else torch.int8
