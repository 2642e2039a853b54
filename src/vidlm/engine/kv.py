"""Keys and values of one sequence, in buffers allocated once for all the tokens it may get."""

from __future__ import annotations

import torch
from torch import Tensor

from vidlm.nn.step import Memory


class SequenceKV:
    """The KV of `vidlm.nn.step`: one (K, capacity, E) buffer for keys and one for values a layer.

    Heads come before tokens so that a decode step reads each head's keys in one run.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.memory: Memory | None = None  # what its layers attend to beside it; forks share it
        self._length = 0
        self._layers: list[tuple[Tensor, Tensor]] = []

    @property
    def length(self) -> int:
        return self._length

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        n, K, E = k.shape
        if layer == len(self._layers):  # the first step meets the layers in order
            shape = (K, self.capacity, E)
            self._layers.append((k.new_empty(shape), v.new_empty(shape)))
        keys, values = self._layers[layer]
        stop = self._length + n
        assert stop <= self.capacity  # torch would broadcast a token past the end into nothing
        keys[:, self._length : stop] = k.transpose(0, 1)
        values[:, self._length : stop] = v.transpose(0, 1)
        return keys[:, :stop], values[:, :stop]

    def advance(self, tokens: int) -> None:
        """Count a finished step's tokens as stored."""
        self._length += tokens

    def fork(self) -> SequenceKV:
        """An independent copy, for a beam that parts from its parent."""
        twin = SequenceKV(self.capacity)
        twin._length, twin.memory = self._length, self.memory
        for pair in self._layers:
            copies = tuple(torch.empty_like(part) for part in pair)
            for copy, part in zip(copies, pair, strict=True):
                copy[:, : self._length] = part[:, : self._length]
            twin._layers.append((copies[0], copies[1]))
        return twin

    @property
    def nbytes(self) -> int:
        return sum(k.nbytes + v.nbytes for k, v in self._layers)


def bytes_per_token(layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Memory one cached token takes."""
    return 2 * layers * kv_heads * head_dim * dtype.itemsize
