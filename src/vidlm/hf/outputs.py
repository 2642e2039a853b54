"""What `forward` returns."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor
from torch.utils import _pytree

from vidlm.hf.cache import Cache


class ModelOutput(OrderedDict[str, Any]):
    """Outputs under transformers' names: an ordered dict whose entries are attributes too.

    Absent ones are None as attributes and no entries. A number or slice indexes the tuple of
    values. Subclasses are dataclasses; like a dict, one is also made of a mapping or of pairs of
    names and values, which is how `DataParallel` gathers. As in transformers, entries are set,
    never removed: `del`, `pop`, `update` and `setdefault` raise TypeError.
    """

    def __init_subclass__(cls) -> None:
        """Let torch look inside: DistributedDataParallel and torch.func do."""
        _pytree.register_pytree_node(
            cls,
            lambda output: (list(output.values()), list(output)),
            lambda values, names: cls(**dict(zip(names, values, strict=True))),
            serialized_type_name=f"{cls.__module__}.{cls.__name__}",
        )

    def __post_init__(self) -> None:
        names = [f.name for f in fields(self)]  # type: ignore[arg-type]  # subclasses are dataclasses
        given = [name for name in names if getattr(self, name) is not None]
        pairs = _pairs(getattr(self, names[0])) if given == names[:1] else None
        if pairs is not None:
            setattr(self, names[0], None)
            for name, value in pairs:
                setattr(self, name, value)

    def __getitem__(self, key: int | slice | str) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        object.__setattr__(self, key, value)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if name in {f.name for f in fields(self)}:  # type: ignore[arg-type]
            if value is not None:
                super().__setitem__(name, value)
            elif name in self:
                super().__delitem__(name)

    def to_tuple(self) -> tuple[Any, ...]:
        """The values of all entries, in their order."""
        return tuple(self.values())

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError(
            f"entries of {type(self).__name__} are set, never removed; copy it to a dict"
        )

    __delitem__ = pop = popitem = clear = update = setdefault = _refuse


def _pairs(first: Any) -> list[tuple[str, Any]] | None:
    """Names and values, where a first argument is a mapping or pairs and no value of a field."""
    if isinstance(first, Mapping):
        return list(first.items())
    if not isinstance(first, Iterator | list | tuple):
        return None
    items = list(first)
    named = all(isinstance(x, tuple) and len(x) == 2 and isinstance(x[0], str) for x in items)
    return items if items and named else None


@dataclass(eq=False)
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


@dataclass(eq=False)
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


@dataclass(eq=False)
class BaseModelOutput(ModelOutput):
    """What VideoLLaMA3's vision tower returns: last_hidden_state (M, D), hidden_states (P, D) of
    every layer, and attentions, of every layer one (1, H, P, P) for each frame."""

    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[list[Tensor], ...] | None = None
