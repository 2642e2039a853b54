"""past_key_values: what `forward(use_cache=True)` remembers of a padded batch.

`generate` does not use it: the engine has caches of its own, which need not grow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vidlm.errors import InvalidArgument
from vidlm.nn.step import Memory


class GrowingKV:
    """The KV of `vidlm.nn.step` for one row; gradients flow through it."""

    def __init__(self) -> None:
        self.length = 0
        self.memory: Memory | None = None
        self._layers: list[tuple[Tensor, Tensor]] = []

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        new = k.transpose(0, 1), v.transpose(0, 1)  # (K, n, E)
        if layer == len(self._layers):  # the first step meets the layers in order
            self._layers.append(new)
        else:
            keys, values = self._layers[layer]
            self._layers[layer] = torch.cat((keys, new[0]), 1), torch.cat((values, new[1]), 1)
        return self._layers[layer]


class Cache:
    """Keys and values of every row of a batch, and which of its columns are real tokens.

    Made by `forward`; pass it back as past_key_values together with the next tokens alone and an
    attention_mask over all columns so far. It is changed in place.
    """

    def __init__(self, rows: int, *, packed: bool = False) -> None:
        """`packed`: of rows with several sequences, of which nothing is kept."""
        self.rows = tuple(GrowingKV() for _ in range(rows))
        self.packed = packed
        self.mask: Tensor | None = None  # (B, S) bool of the columns so far

    def get_seq_length(self) -> int:
        """Columns so far, padding included."""
        return 0 if self.mask is None else self.mask.shape[1]

    def new_columns(self, attention_mask: Tensor | None, shape: tuple[int, int]) -> Tensor:
        """The (B, L) mask of new tokens of this shape, out of a mask over all columns."""
        B, L = shape
        if self.packed:
            raise InvalidArgument(
                "past_key_values of packed rows: new tokens would follow several sequences at "
                "once; run each sequence in a row of its own to continue it"
            )
        if len(self.rows) != B:
            raise InvalidArgument(
                f"past_key_values of {len(self.rows)} rows for a batch of {B}; pass those that "
                "this batch's forward returned"
            )
        if self.mask is None or attention_mask is None:
            if attention_mask is None:
                return torch.ones(B, L, dtype=torch.bool, device="cpu")
            return attention_mask.bool()
        past, given = self.mask.shape[1], tuple(attention_mask.shape)
        known = attention_mask[:, :past].bool().to(self.mask.device)
        if given != (B, past + L) or not torch.equal(known, self.mask):
            raise InvalidArgument(
                f"attention_mask of shape {given} for {past} columns in past_key_values and {L} "
                f"new ones; give one of ({B}, {past + L}) that begins as it was"
            )
        return attention_mask[:, past:].bool()

    def advance(self, mask: Tensor) -> None:
        """Count a finished step's columns (B, L) as stored."""
        self.mask = mask if self.mask is None else torch.cat((self.mask, mask), dim=1)
        for row, tokens in zip(self.rows, mask.sum(1).tolist(), strict=True):
            row.length += tokens
