"""What `forward` returns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from vidlm.hf.cache import Cache


@dataclass
class ModelOutput:
    """Outputs under transformers' names; absent ones are None.

    Index with a name or, as a tuple without the absent ones, with a number.
    """

    def to_tuple(self) -> tuple[Any, ...]:
        values = (getattr(self, f.name) for f in fields(self))
        return tuple(value for value in values if value is not None)

    def __getitem__(self, key: int | slice | str) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.to_tuple())


@dataclass
class ModelOutputWithPast(ModelOutput):
    """What a family's model without a head returns.

    last_hidden_state    (B, L, D) after the last norm; zeros where the mask hides a token
    past_key_values      with use_cache: pass it on with the next tokens
    hidden_states        one (B, L, D) for the embeddings and one a layer, the last one normed
    attentions           one (B, H, L, S) a layer: weights over the S tokens so far
    image_hidden_states, video_hidden_states   (M, D) features of all images, of all videos
    """

    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None
    video_hidden_states: Tensor | None = None


@dataclass
class CausalLMOutputWithPast(ModelOutput):
    """What a family's model with its head returns; as ModelOutputWithPast, but

    loss    () mean cross-entropy over labels that are not -100
    logits  (B, L, V), or the columns that logits_to_keep names; zeros where the mask hides a token
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None
    video_hidden_states: Tensor | None = None


@dataclass
class BaseModelOutput(ModelOutput):
    """What VideoLLaMA3's vision tower returns: last_hidden_state (M, D), hidden_states (P, D) of
    every layer, and attentions, of every layer one (1, H, P, P) for each frame."""

    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[list[Tensor], ...] | None = None
