"""Whether the tensors of a saved video are those that the model of its identity would have made.

Raises ValueError where they are not. Types, shapes and names are checked before a byte is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vidlm.api.index_fields import MAX_ITEMS, Stated
from vidlm.engine.options import BLOCK
from vidlm.hub import TensorEntry
from vidlm.models.base import Media, VideoModel
from vidlm.models.media_state import FEATURES
from vidlm.weights import DTYPES

STORED = {**DTYPES, "BOOL": torch.bool}
ANY = -1  # a side of a shape that may have any length above 0


def check_tensors(entries: Mapping[str, TensorEntry], stated: Stated, model: VideoModel) -> None:
    """Whether there are the tensors that the index names, of the model's dtype and shapes."""
    _check_prompt(stated.index.prompt, model)
    left = dict(entries)
    for i in range(len(stated.media)):
        _check_media(i, left, len(stated.index.prompt), model)
    if stated.layers:
        _check_kv(left, stated, model)
    if left:
        raise ValueError(f"it has the unknown tensors {sorted(left)[:5]!a:.200}")


def check_media(media: Sequence[Media], model: VideoModel) -> None:
    """Whether items are of a kind that the model takes, and their fields fit each other."""
    for i, item in enumerate(media):
        if type(item) not in model.media_types or item.kind not in model.config.placeholders:
            raise ValueError(f"media {i} is a {type(item).__name__} of {item.kind}")
        if not 0 < item.frames <= MAX_ITEMS:
            raise ValueError(f"media {i} has {item.frames} frames")
        if flaw := item.flaw():
            raise ValueError(f"media {i} has {flaw}")


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"tensor {name} has numbers that are not finite")


def kv_names(layer: int) -> list[tuple[str, str]]:
    """Of a layer's keys and values: each one's own, and that of their scales, if they are coded."""
    return [(f"kv.{layer}.{kind}", f"kv.{layer}.{kind}.scales") for kind in ("keys", "values")]


def _check_prompt(ids: Sequence[int], model: VideoModel) -> None:
    known, limit = model.decoder.config.vocab_size, model.config.max_context
    placeholders = set(model.config.placeholders.values())
    if not 0 < len(ids) < limit:
        raise ValueError(f"a prompt of {len(ids)} tokens, where the model takes {limit}")
    unknown = next((id for id in ids if not (0 <= id < known or id in placeholders)), None)
    if unknown is not None:
        raise ValueError(f"its prompt has the id {unknown}, the vocabulary has {known}")


def _check_media(i: int, left: dict[str, TensorEntry], most: int, model: VideoModel) -> None:
    """Takes the tensors of one item out of `left`."""
    tokens, memory = (f"media.{i}.{name}" for name in FEATURES)
    width = model.decoder.config.hidden_size
    entry = _check(left, tokens, model.dtype, (ANY, width))
    if entry.shape[0] > most:
        raise ValueError(f"tensor {tokens} has {entry.shape[0]} rows for a prompt of {most} tokens")
    if model.has_memory:
        _check(left, memory, model.dtype, (ANY, width))
    hints = {field for kind in model.media_types for field in kind.__annotations__}
    for name in [name for name in left if name.startswith(f"media.{i}.")]:
        if name.removeprefix(f"media.{i}.") in hints:  # of which type, `media_from_state` checks
            _check(left, name, torch.bool, (ANY,) * len(left[name].shape))


def _check_kv(left: dict[str, TensorEntry], stated: Stated, model: VideoModel) -> None:
    """Takes keys and values out of `left`."""
    sizes = model.decoder.config
    if stated.layers != sizes.num_hidden_layers:
        raise ValueError(f"keys and values of {stated.layers} layers")
    coded = stated.index.identity.kv_dtype is not None
    names = [names for layer in range(stated.layers) for names in kv_names(layer)]
    stored = left.get(names[0][0])
    S = stored.shape[1] if stored and len(stored.shape) == 3 else 0
    if not 0 < S <= len(stated.index.prompt) or S % BLOCK:
        raise ValueError(
            f"keys and values of {S} tokens, the prompt has {len(stated.index.prompt)}"
        )
    shape = (sizes.num_key_value_heads, S, sizes.head_dim)
    for name, scales in names:
        _check(left, name, torch.int8 if coded else model.dtype, shape)
        if coded:
            _check(left, scales, torch.float32, shape[:2])


def _check(
    left: dict[str, TensorEntry], name: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> TensorEntry:
    entry = left.pop(name, None)
    if entry is None:
        raise ValueError(f"it has no tensor {name}")
    fits = len(entry.shape) == len(shape) and all(
        side > 0 and wanted in (side, ANY) for side, wanted in zip(entry.shape, shape, strict=True)
    )
    if STORED.get(entry.dtype) != dtype or not fits:
        raise ValueError(f"tensor {name} is {entry.dtype} {entry.shape}, which is not this model's")
    return entry
