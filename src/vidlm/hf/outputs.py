"""What `forward` returns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor


@dataclass
class LlavaCausalLMOutput:
    """Outputs under transformers' names; absent ones are None.

    loss                 () mean cross-entropy over labels that are not -100
    logits               (B, L, V), or (B, logits_to_keep, V)
    hidden_states        one (B, L, D) for the embeddings and one a layer, the last one normed
    image_hidden_states  (M, D) features of all images
    Index with a name or, as a tuple without the absent ones, with a number.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        values = (getattr(self, f.name) for f in fields(self))
        return tuple(value for value in values if value is not None)

    def __getitem__(self, key: int | slice | str) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.to_tuple())
