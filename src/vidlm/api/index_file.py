"""A video's features, keys and values on disk: one safetensors file, with everything that must
agree before they may be used."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from vidlm.api.index_check import STORED, check_finite, check_media, check_tensors, kv_names
from vidlm.api.index_fields import Identity, Index, Stated, parse_index
from vidlm.errors import InvalidArgument, MediaNotFound, WeightsError
from vidlm.files import replaced
from vidlm.hub import TensorEntry, read_open_header
from vidlm.models.base import Encoded, Media, VideoModel
from vidlm.models.media_state import media_from_state, media_to_state
from vidlm.native import Cache, Coded, tensors_of
from vidlm.quant import PRESETS, preset
from vidlm.weights import write_tensors

SUFFIX = ".safetensors"
FORMAT = "vidlm-video-1"
MAX_INDEX_BYTES = 16 << 20  # of the file's header: a million ids, and as many frames


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
        for cache, names in zip(pair, kv_names(i), strict=True):
            tensors.update(zip(names, tensors_of(cache), strict=False))
    told = {**asdict(index), "media": states, "layers": len(layers)}
    if len(json.dumps(json.dumps(told))) > MAX_INDEX_BYTES - 1024 * (1 + len(tensors)):
        raise InvalidArgument(
            f"{path}: what is said of the video takes more than {MAX_INDEX_BYTES} bytes; save "
            "fewer frames"
        )
    whole = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    with replaced(path) as partial:
        write_tensors(whole, partial, {"format": FORMAT, "index": json.dumps(told)})


def read_index(
    path: Path, identity: Identity, model: VideoModel, frames: Mapping[str, Any]
) -> tuple[Index, tuple[Media, ...], list[tuple[Cache, Cache]]]:
    """The index, its media with their features, and keys and values of every layer, if it has them.

    The file may come from anybody: nothing is read before its size is known to be right, and media
    take their digests from the file's, so that what it brings is only ever found by its own
    questions. Raises InvalidArgument, naming what differs, where it was not made by the model of
    `identity`, or with other frames than are asked for, and where it is no such file.
    """
    if not path.is_file():
        raise MediaNotFound(f"{path} does not exist; save a video with lm.video(...).save(path)")
    with _reading(path):
        with path.open("rb") as file:
            entries, metadata = read_open_header(file, path, MAX_INDEX_BYTES)
            stated = _stated(path, metadata)
            index = stated.index
            _check(path, index, identity, frames)
            _check_kv_dtype(path, index, identity, stated.layers)
            check_tensors(entries, stated, model)
            tensors, digest = _read(file, entries, metadata["index"])
        media = [_media(i, state, tensors) for i, state in enumerate(stated.media)]
        check_media(media, model)
        coded = index.identity.kv_dtype is not None
        layers = [_pair(i, tensors, coded) for i in range(stated.layers)]
    return index, tuple(item.from_file(digest) for item in media), layers


def _read(
    file: BinaryIO, entries: Mapping[str, TensorEntry], text: str
) -> tuple[dict[str, Tensor], bytes]:
    """All tensors, and a digest of everything that is used of the file."""
    shapes = sorted(
        (entry.start, name, entry.dtype, entry.shape) for name, entry in entries.items()
    )
    hashed = sha256(json.dumps([text, shapes]).encode())
    tensors: dict[str, Tensor] = {}
    for start, name, dtype, shape in shapes:
        bytes_ = torch.empty(entries[name].stop - start, dtype=torch.uint8)
        view = memoryview(bytes_.numpy())  # type: ignore[arg-type]  # an ndarray is a buffer
        file.seek(start)
        if file.readinto(view) != len(view):  # type: ignore[attr-defined]
            raise ValueError("it ends early")
        hashed.update(view)
        tensors[name] = bytes_.view(STORED[dtype]).view(shape)
    check_finite(tensors)
    return tensors, hashed.digest()


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns what reading a file raises into InvalidArgument."""
    try:
        yield
    except InvalidArgument:
        raise
    except WeightsError as error:
        why = str(error).removeprefix(f"{path} is not a sound safetensors file: ")
        raise damaged(path, why.partition("; it is damaged")[0]) from error
    except OSError as error:
        raise InvalidArgument(f"{path} cannot be read: {error}") from error
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
        raise damaged(path, error) from error


def damaged(path: Path, why: object) -> InvalidArgument:
    return InvalidArgument(f"{path} is damaged ({why}); save the video again")


def _stated(path: Path, metadata: Mapping[str, str]) -> Stated:
    if metadata.get("format") != FORMAT:
        raise InvalidArgument(
            f"{path} is no video saved by this version of vidlm (its format is "
            f"{metadata.get('format')!a:.80}, wanted is {FORMAT!r}); save it again"
        )
    if metadata.keys() != {"format", "index"}:
        raise ValueError(f"its metadata are {sorted(metadata)!a:.200}")
    return parse_index(metadata["index"])


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
    _check_frames(path, index, frames)


def check_saved(path: Path, frames: Mapping[str, Any]) -> None:
    """What can be said of a saved video without the model: raises MediaNotFound or InvalidArgument
    where it is none, is damaged, or has other frames than are asked for."""
    if not path.is_file():
        raise MediaNotFound(f"{path} does not exist; save a video with lm.video(...).save(path)")
    with _reading(path), path.open("rb") as file:
        _, metadata = read_open_header(file, path, MAX_INDEX_BYTES)
        _check_frames(path, _stated(path, metadata).index, frames)


def _check_frames(path: Path, index: Index, frames: Mapping[str, Any]) -> None:
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


def _pair(layer: int, tensors: Mapping[str, Tensor], coded: bool) -> tuple[Cache, Cache]:
    found: list[Cache] = [
        Coded(tensors[name], tensors[scales]) if coded else tensors[name]
        for name, scales in kv_names(layer)
    ]
    keys, values = found
    return keys, values


def _media(number: int, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Media:
    front = f"media.{number}."
    own = {name.removeprefix(front): t for name, t in tensors.items() if name.startswith(front)}
    return media_from_state(state, own)
