"""Media without their pixels as plain values and tensors, to be kept in a file."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from math import isfinite
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from vidlm.errors import MediaError
from vidlm.models import FAMILIES
from vidlm.models.base import Encoded, Media, own_fields

WAY_OUT = "it is damaged, or of another version of vidlm: make it again from the video"
FEATURES = ("encoded.tokens", "encoded.memory")


def media_to_state(media: Media) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Values for JSON and tensors for safetensors: all of an item but its pixels, for which its
    digest stands, and with the features that it has."""
    values: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for name in own_fields(type(media))[1:]:
        value = getattr(media, name)
        if isinstance(value, Tensor):
            tensors[name] = value
        else:
            values[name] = value
    if media.encoded is not None:
        found = (media.encoded.tokens, media.encoded.memory)
        tensors |= {n: t for n, t in zip(FEATURES, found, strict=True) if t is not None}
    state = {"class": type(media).__name__, "digest": media.digest.hex(), "fields": values}
    return state, _apart(tensors)


def media_from_state(state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Media:
    """What `media_to_state` was given, with no pixels.

    Raises MediaError where it is no item of a class that a family makes, or of other fields.
    """
    known = _kinds()
    if state.keys() != {"class", "digest", "fields"} or state["class"] not in known:
        raise MediaError(
            f"a stored item is of the class {state.get('class')!r} and says "
            f"{sorted(state)}; known are {', '.join(known)}, and class, digest and fields of each; "
            f"{WAY_OUT}"
        )
    kind = known[state["class"]]
    values = {**state["fields"], **{n: t for n, t in tensors.items() if n not in FEATURES}}
    values = {name: _frozen(value) for name, value in values.items()}
    _check_fields(kind, values)
    return kind(
        pixels=torch.empty(0, dtype=torch.float32, device="cpu"),
        encoded=_features(values["tokens"], tensors),
        named=_digest(state["digest"]),
        **values,
    )


def _kinds() -> dict[str, type[Media]]:
    """What the families' processors make, by name."""
    families = [import_module(module).FAMILY for module in sorted(set(FAMILIES.values()))]
    return {kind.__name__: kind for family in families for kind in family.model.media_types}


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each in whole memory of its own, as safetensors wants them."""
    made: dict[str, Tensor] = {}
    used: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        whole = tensor.is_contiguous() and storage.nbytes() == tensor.nbytes
        own = whole and storage.data_ptr() not in used
        made[name] = tensor.detach() if own else tensor.detach().clone().contiguous()
        used.add(storage.data_ptr())
    return made


def _frozen(value: Any) -> Any:
    """Lists, as which JSON gives them, are tuples."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _check_fields(kind: type[Media], values: Mapping[str, Any]) -> None:
    expected, hints = set(own_fields(kind)[1:]), get_type_hints(kind)
    if values.keys() != expected:
        raise MediaError(
            f"a stored {kind.__name__} has the fields {sorted(values)} and needs "
            f"{sorted(expected)}; {WAY_OUT}"
        )
    for name, value in values.items():
        if not _fits(value, hints[name]):
            raise MediaError(f"a stored {kind.__name__} has {name}={value!r:.80}; {WAY_OUT}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type, of those that fields of media have."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is Literal:
        return value in inner
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        kinds = (inner[0],) * len(value) if inner[-1] is ... else inner
        return len(kinds) == len(value) and all(map(_fits, value, kinds))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and _finite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return isinstance(value, NoneType if hint is None else hint)


def _finite(value: float) -> bool:
    try:
        return isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _features(count: int, tensors: Mapping[str, Tensor]) -> Encoded | None:
    found, memory = (tensors.get(name) for name in FEATURES)
    if found is None and memory is None:
        return None
    whole = found is not None and found.ndim == 2 and len(found) == count
    if not whole or (memory is not None and memory.ndim != 2):
        raise MediaError(
            f"a stored item of {count} tokens has features of shapes "
            f"{[tuple(tensors[name].shape) for name in FEATURES if name in tensors]}; {WAY_OUT}"
        )
    assert found is not None
    return Encoded(found, memory)


def _digest(value: Any) -> bytes:
    try:
        digest = bytes.fromhex(value)
    except (TypeError, ValueError):
        digest = b""
    if len(digest) != 16:
        raise MediaError(f"a stored item has the digest {value!r:.80}; {WAY_OUT}")
    return digest
