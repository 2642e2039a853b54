"""Safetensors bytes straight into a model built on the meta device.

Each tensor is read once, from the file into the memory it will live in, so that loading peaks at
the size of the weights and not at twice it (memory-mapped pages would count a second time). What
becomes something else as it arrives, such as codes, is handed on a few rows at a time. Names are
translated by the family's rename table; a missing, left-over or misshapen tensor raises.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from vidlm.errors import UnsupportedModel, WeightsError
from vidlm.files import Replacement, make_folder
from vidlm.hub import INDEX, TensorEntry, read_safetensors_header, weight_files
from vidlm.native import LargePages

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,  # codes of packed layers
    "U8": torch.uint8,
}
SINGLE = "model.safetensors"
CHUNK = 4 << 20  # bytes at a time of what is not read straight into its place
SHARD = 5 << 30  # bytes of one file of a saved checkpoint, as the hub does it
TakeRows = Callable[[int, Tensor], None]  # of a matrix: the first row's number, and rows


@dataclass(frozen=True)
class Renames:
    """How other layouts spell a family's parameter names.

    table    (regular expression, replacement), tried in order; the first that matches is applied
    ignored  names of tensors that checkpoints carry and no forward pass reads
    written  as `table`, from the module's names to those of published files, which `save` writes
    """

    table: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    written: tuple[tuple[str, str], ...] = ()

    def name(self, stored: str) -> str | None:
        """The parameter a stored tensor belongs to, or None where it is known to be unused."""
        if any(re.search(pattern, stored) for pattern in self.ignored):
            return None
        return _renamed(stored, self.table)

    def published(self, name: str) -> str:
        """The name that published files have for a parameter."""
        return _renamed(name, self.written)


def _renamed(name: str, table: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in table:
        renamed, hits = re.subn(pattern, replacement, name, count=1)
        if hits:
            return renamed
    return name


@dataclass(frozen=True)
class Stored:
    """Where the bytes of one parameter are."""

    path: Path
    entry: TensorEntry


def load(
    model: nn.Module,
    folder: Path,
    renames: Renames,
    *,
    dtype: torch.dtype,
    device: torch.device | Callable[[str], torch.device],
    place: Callable[[str, torch.device], TakeRows | None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Fill a model built on the meta device from the safetensors files of `folder`.

    Parameters take `dtype`, buffers keep their own. `device` is that of all, or tells each one's by
    its name. `place(name, device)` may answer with what takes a matrix, then never in memory whole,
    a few rows at a time; parameters of two names are not offered. `progress(done, total)` is called
    with bytes. Raises WeightsError, listing names, where tensors are missing, left over, doubled or
    of another shape; the model is then unusable.
    """
    shared = _shared_parameters(model)
    stored = _locate(folder, renames)
    for alias, name in shared.items():
        twin = stored.pop(alias, None)  # a tied head may be stored as well, or instead
        if twin is not None and not _same(stored.setdefault(name, twin), twin):
            raise WeightsError(
                f"the config.json in {folder} ties {alias} to {name}, whose stored values differ; "
                "set tie_word_embeddings to false in it if the model has a head of its own, and "
                "download the checkpoint again if not"
            )
    buffers = dict(_buffers(model))
    _compare({**dict(model.named_parameters()), **buffers}, stored, folder)
    total = sum(at.entry.stop - at.entry.start for at in stored.values())
    done, room, whole = 0, _Room(), {*buffers, *shared.values()}
    pages = LargePages()
    for name, at in _in_file_order(stored):
        where = device if isinstance(device, torch.device) else device(name)
        own = buffers[name].dtype if name in buffers else dtype
        take = None if place is None or name in whole else place(name, where)
        if take is not None:
            for start, rows in _rows(at, own, name, room):
                take(start, rows.to(where))
        else:
            empty = pages.empty if where.type == "cpu" else torch.empty
            kept = _read(at, own, name, room, empty).to(where)
            if name not in buffers:
                kept = nn.Parameter(kept, requires_grad=False)
            _assign(model, name, kept)
        done += at.entry.stop - at.entry.start
        if progress is not None:
            progress(done, total)
    for alias, name in shared.items():
        _assign(model, alias, model.get_parameter(name))


def save(
    model: nn.Module,
    folder: Path,
    renames: Renames | None = None,
    *,
    shard: int = SHARD,
    beside: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write parameters and buffers as safetensors, in several files with an index past `shard`
    bytes, under the names that `renames` says published files have, and the texts of `beside`,
    which belong to the same checkpoint, under their names.

    Older weights in the folder stay until the new ones are on the disk, which needs room for both;
    then they are removed. Raises OutputError, and leaves the folder as it was, on any failure.
    """
    named = chain(model.named_parameters(), _buffers(model))
    published = (renames or Renames()).published
    tensors = {published(name): tensor.detach().contiguous().cpu() for name, tensor in named}
    groups = _shards(tensors, shard)
    count = len(groups)
    names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    names = names if count > 1 else [SINGLE]
    with Replacement(make_folder(folder)) as files:
        # Left in place, an index or the files of another division would be read instead of these.
        for pattern in (SINGLE, INDEX, "model-*-of-*.safetensors"):
            for old in folder.glob(pattern):
                files.drop(old)
        for name, group in zip(names, groups, strict=True):
            write_tensors(group, files.new(name), {"format": "pt"})
        if count > 1:
            places = {k: n for n, group in zip(names, groups, strict=True) for k in group}
            size = {"total_size": sum(t.nbytes for t in tensors.values())}
            index = {"metadata": size, "weight_map": places}
            files.write({INDEX: json.dumps(index, indent=2) + "\n"})
        files.write(beside)


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """A safetensors file. Raises OSError where it cannot be written."""
    try:
        save_file(dict(tensors), path, dict(metadata))
    except SafetensorError as error:  # tells the number of the system's error in its words alone
        code = re.search(r"(?:code: |os error )(\d+)", str(error))
        number = int(code[1]) if code else errno.EIO
        reason = os.strerror(number) if code else str(error)
        raise OSError(number, reason, str(path)) from error


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype most bytes of a checkpoint are stored in."""
    sizes: dict[str, int] = {}
    for path in sorted(set(weight_files(folder).values())):
        for entry in read_safetensors_header(path).values():
            if _torch_dtype(entry.dtype, path).is_floating_point:
                sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.stop - entry.start
    name = max(sizes, key=lambda key: sizes[key])
    return _torch_dtype(name, folder)


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What belongs into a file beside the parameters: codes and scales of packed layers."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield name, buffer


def _shards(tensors: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    groups: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + tensor.nbytes > limit:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += tensor.nbytes
    return groups


def _shared_parameters(model: nn.Module) -> dict[str, str]:
    """Second names of parameters that have two: {"lm_head.weight": "embed_tokens.weight"}."""
    first: dict[int, str] = {}
    aliases = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            aliases[name] = first[id(parameter)]
        first.setdefault(id(parameter), name)
    return aliases


def _locate(folder: Path, renames: Renames) -> dict[str, Stored]:
    headers: dict[Path, dict[str, TensorEntry]] = {}
    found: dict[str, Stored] = {}
    for stored_name, path in weight_files(folder).items():
        name = renames.name(stored_name)
        if name is None:
            continue
        if path not in headers:
            headers[path] = read_safetensors_header(path)
        if stored_name not in headers[path]:
            raise WeightsError(
                f"the index of {folder} puts {stored_name!r} into {path.name}, which does not have "
                "it; download the checkpoint again"
            )
        if name in found:
            raise WeightsError(f"{folder} holds {name!r} twice, the second time as {stored_name!r}")
        found[name] = Stored(path, headers[path][stored_name])
    return found


def _same(a: Stored, b: Stored) -> bool:
    """Whether the files hold the same values for both, byte for byte."""
    if a == b:
        return True
    if (a.entry.dtype, a.entry.shape) != (b.entry.dtype, b.entry.shape):
        return False
    with a.path.open("rb") as one, b.path.open("rb") as other:
        one.seek(a.entry.start)
        other.seek(b.entry.start)
        left = a.entry.stop - a.entry.start
        sizes = (min(CHUNK, left - done) for done in range(0, left, CHUNK))
        return all(one.read(size) == other.read(size) for size in sizes)


def _compare(parameters: Mapping[str, Tensor], stored: Mapping[str, Stored], folder: Path) -> None:
    problems = [
        *_listed("missing", [name for name in parameters if name not in stored]),
        *_listed("left over", [name for name in stored if name not in parameters]),
        *_listed(
            "of another shape",
            [
                f"{name} {tuple(stored[name].entry.shape)} instead of {tuple(parameter.shape)}"
                for name, parameter in parameters.items()
                if name in stored and tuple(stored[name].entry.shape) != tuple(parameter.shape)
            ],
        ),
    ]
    if problems:
        raise WeightsError(
            f"the weights in {folder} do not fit its config.json: {'; '.join(problems)}. Check "
            "that both files are of the same model and completely downloaded"
        )


def _listed(what: str, names: Sequence[str], most: int = 20) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return [f"{len(names)} tensors {what}: {', '.join(names[:most])}{more}"]


def _in_file_order(stored: Mapping[str, Stored]) -> Iterator[tuple[str, Stored]]:
    yield from sorted(stored.items(), key=lambda item: (item[1].path, item[1].entry.start))


def _torch_dtype(name: str, where: Path) -> torch.dtype:
    if name not in DTYPES:
        raise UnsupportedModel(f"{where} stores {name} tensors; supported: {', '.join(DTYPES)}")
    return DTYPES[name]


def _read(
    at: Stored, dtype: torch.dtype, name: str, room: _Room, empty: Callable[..., Tensor]
) -> Tensor:
    """A whole tensor, that `empty` makes of shape and dtype."""
    source = _source(at, dtype, name)
    out = empty(at.entry.shape, dtype=dtype)
    if source == dtype:
        with at.path.open("rb", buffering=0) as file:
            file.seek(at.entry.start)
            _fill(file, out, at)
        return out
    flat = out.view(-1)
    for start, piece in _pieces(at, source, CHUNK // source.itemsize, room):
        flat[start : start + len(piece)].copy_(piece)
    return out


def _rows(at: Stored, dtype: torch.dtype, name: str, room: _Room) -> Iterator[tuple[int, Tensor]]:
    """Rows of a matrix in its dtype, and which the first is. The next are in the same memory."""
    source = _source(at, dtype, name)
    columns = max(1, at.entry.shape[1])
    each = max(1, CHUNK // (columns * source.itemsize))
    for start, piece in _pieces(at, source, each * columns, room):
        yield start // columns, piece.view(-1, columns).to(dtype)


def _source(at: Stored, dtype: torch.dtype, name: str) -> torch.dtype:
    """The dtype of a stored tensor, where it can become `dtype`."""
    source = _torch_dtype(at.entry.dtype, at.path)
    if source.is_floating_point != dtype.is_floating_point:
        raise UnsupportedModel(
            f"{at.path} stores {name} as {at.entry.dtype}, and the model has it in {dtype}; a "
            "checkpoint that another library quantized cannot be read, take the original weights"
        )
    return source


class _Room:
    """Memory that pieces of files are read into, the same for all of them: what is freed between
    two tensors that stay would leave holes, into which larger ones do not fit."""

    def __init__(self) -> None:
        self._memory = torch.empty(
            CHUNK, dtype=torch.uint8, device="cpu"
        )  # no memory before it is written

    def of(self, numbers: int, dtype: torch.dtype) -> Tensor:
        size = numbers * dtype.itemsize
        if len(self._memory) < size:
            self._memory = torch.empty(size, dtype=torch.uint8, device="cpu")
        return self._memory[:size].view(dtype)


def _pieces(
    at: Stored, source: torch.dtype, most: int, room: _Room
) -> Iterator[tuple[int, Tensor]]:
    """The numbers of a tensor as they are stored, and which the first is. The next are in the same
    memory."""
    total = prod(at.entry.shape)
    with at.path.open("rb", buffering=0) as file:
        file.seek(at.entry.start)
        for start in range(0, total, most):
            piece = room.of(min(most, total - start), source)
            _fill(file, piece, at)
            yield start, piece


def _fill(file: BinaryIO, tensor: Tensor, place: Stored) -> None:
    """Read exactly the tensor's bytes into its memory."""
    if tensor.numel() == 0:
        return
    buffer: np.ndarray = tensor.view(-1).view(torch.uint8).numpy()
    view = memoryview(buffer)  # type: ignore[arg-type]  # an ndarray is a buffer
    while view:
        count = file.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise WeightsError(f"{place.path} ended early; download it again")
        view = view[count:]


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, tensor)
