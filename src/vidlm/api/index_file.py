"""A video's features, keys and values on disk: one safetensors file, with everything that must
agree before they may be used."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from vidlm.errors import InvalidArgument, MediaNotFound
from vidlm.files import replaced
from vidlm.models.base import Encoded, Media
from vidlm.models.media_state import media_from_state, media_to_state
from vidlm.native import Cache, Coded, tensors_of
from vidlm.quant import PRESETS, preset
from vidlm.types import FrameRef
from vidlm.weights import write_tensors

SUFFIX = ".safetensors"
FORMAT = "vidlm-video-1"


@dataclass(frozen=True)
class Identity:
    """What made an index, all of which must agree with the model that uses it."""

    model_type: str
    dtype: str
    config: str  # a digest of it: what is not in the weights, rope's base for one
    weights: str  # their fingerprint
    exact: bool  # whether its engine is exact, which needs what an exact one made
    kv_dtype: str | None = None  # of keys and values, as EngineOptions has it
    scheme: str | None = None  # how weights are packed, or their dtype; None: a file says neither


@dataclass(frozen=True)
class Index:
    """What is said in an index of the video and of the prompt up to the question."""

    identity: Identity
    name: str
    frames: tuple[FrameRef, ...]
    warnings: tuple[str, ...]
    parts: tuple[dict[str, Any], ...]
    sampling: Mapping[str, Any]
    prompt: tuple[int, ...]


def is_index(source: Any) -> bool:
    return isinstance(source, str | Path) and str(source).endswith(SUFFIX)


def checked_name(path: str | Path) -> Path:
    """Raises InvalidArgument where a saved video would not be known by its name."""
    if not is_index(path):
        raise InvalidArgument(f"{path}: the name of a saved video must end with {SUFFIX}")
    return Path(path)


def write_index(
    path: Path,
    index: Index,
    media: Sequence[Media],
    encoded: Sequence[Encoded],
    layers: Sequence[tuple[Cache, Cache]],
) -> None:
    """Write it whole or not at all. Raises OutputError."""
    tensors: dict[str, Tensor] = {}
    states = []
    for i, (item, features) in enumerate(zip(media, encoded, strict=True)):
        values, own = media_to_state(replace(item, encoded=features))
        states.append(values)
        tensors.update({f"media.{i}.{name}": tensor for name, tensor in own.items()})
    for i, pair in enumerate(layers):
        for cache, names in zip(pair, _names(i), strict=True):
            tensors.update(zip(names, tensors_of(cache), strict=False))
    told = {**asdict(index), "media": states, "layers": len(layers)}
    whole = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    with replaced(path) as partial:
        write_tensors(whole, partial, {"format": FORMAT, "index": json.dumps(told)})


def read_index(
    path: Path, identity: Identity, frames: Mapping[str, Any]
) -> tuple[Index, tuple[Media, ...], list[tuple[Cache, Cache]]]:
    """The index, its media with their features, and keys and values of every layer, if it has them.

    Raises InvalidArgument, naming what differs, where it was not made by the model of `identity`,
    or with other frames than are asked for, and where it is no such file.
    """
    if not path.is_file():
        raise MediaNotFound(f"{path} does not exist; save a video with lm.video(...).save(path)")
    try:
        with safe_open(path, "pt") as file:
            told = _told(path, file.metadata() or {})
            index = _index(told)
            _check(path, index, identity, frames)
            _check_kv_dtype(path, index, identity, told["layers"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        media = [_media(i, state, tensors) for i, state in enumerate(told["media"])]
        coded = index.identity.kv_dtype is not None
        layers = [_pair(i, tensors, coded) for i in range(told["layers"])]
    except InvalidArgument:
        raise
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise damaged(path, error) from error
    return index, tuple(media), layers


def damaged(path: Path, why: object) -> InvalidArgument:
    return InvalidArgument(f"{path} is damaged ({why}); save the video again")


def _told(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if metadata.get("format") != FORMAT:
        raise InvalidArgument(
            f"{path} is no video saved by this version of vidlm (its format is "
            f"{metadata.get('format')!r}, wanted is {FORMAT!r}); save it again"
        )
    told: dict[str, Any] = json.loads(metadata["index"])
    return told


def _index(told: Mapping[str, Any]) -> Index:
    return Index(
        Identity(**told["identity"]),
        told["name"],
        tuple(FrameRef(**frame) for frame in told["frames"]),
        tuple(told["warnings"]),
        tuple(told["parts"]),
        told["sampling"],
        tuple(told["prompt"]),
    )


def _check(path: Path, index: Index, identity: Identity, frames: Mapping[str, Any]) -> None:
    for name in ("model_type", "dtype", "config", "weights"):
        theirs, mine = getattr(index.identity, name), getattr(identity, name)
        if theirs != mine:
            if name == "weights":
                _check_scheme(path, index.identity.scheme, identity)
            raise InvalidArgument(
                f"{path} was saved by a model whose {name} is {theirs}, this one's is {mine}; load "
                "that model, or save the video again with this one"
            )
    if identity.exact and not index.identity.exact:
        raise InvalidArgument(
            f"{path} was saved by an engine that was not exact, and this one is; save the video "
            "again with EngineOptions(exact=True)"
        )
    if frames and dict(frames) != index.sampling:
        raise InvalidArgument(
            f"{path} was saved with the frames {index.sampling or 'of the default rule'}, asked "
            f"for now are {dict(frames)}; leave them out, or save the video again"
        )


def _check_scheme(path: Path, theirs: str | None, identity: Identity) -> None:
    """Whether this is why weights differ; files of before it was written do not tell."""
    mine = identity.scheme
    if theirs is None or mine is None or theirs == mine:
        return
    presets = {str(preset(name)): f"the model with quantize={name!r}" for name in PRESETS}
    presets[identity.dtype] = "the original weights without quantize"
    that = presets.get(theirs, "the model with that quantization_config")
    shown, own = (words.replace("; ", ", ") for words in (theirs, mine))
    raise InvalidArgument(
        f"{path} was saved by a model with weights in {shown}, this one's are in {own}; load "
        f"{that}, or save the video again with this one"
    )


def _check_kv_dtype(path: Path, index: Index, identity: Identity, layers: int) -> None:
    theirs, mine = index.identity.kv_dtype, identity.kv_dtype
    if layers and theirs != mine:
        raise InvalidArgument(
            f"{path} was saved by an engine whose kv_dtype is {theirs!r}, this one's is {mine!r}; "
            f"load the model with EngineOptions(kv_dtype={theirs!r}), or save the video again"
        )


def _names(layer: int) -> list[tuple[str, str]]:
    """Of a layer's keys and values: each one's own, and that of their scales, if they are coded."""
    return [(f"kv.{layer}.{kind}", f"kv.{layer}.{kind}.scales") for kind in ("keys", "values")]


def _pair(layer: int, tensors: Mapping[str, Tensor], coded: bool) -> tuple[Cache, Cache]:
    found: list[Cache] = [
        Coded(tensors[name], tensors[scales]) if coded else tensors[name]
        for name, scales in _names(layer)
    ]
    if not all(cache.sound for cache in found if isinstance(cache, Coded)):
        raise ValueError(f"layer {layer} has keys or values that do not fit their scales")
    keys, values = found
    return keys, values


def _media(number: int, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Media:
    front = f"media.{number}."
    own = {name.removeprefix(front): t for name, t in tensors.items() if name.startswith(front)}
    return media_from_state(state, own)
