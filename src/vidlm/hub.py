"""Repository id or folder -> local files: config, tensor names, exact tensor offsets.

Nothing here touches a tensor: a safetensors header says where every byte lies, and the loader
reads those bytes straight into place. That is why the header is parsed strictly.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NoReturn

from vidlm.download import PICKLES, Wanted, snapshot
from vidlm.errors import (
    ModelError,
    ModelNotFound,
    UnsupportedModel,
    WeightsError,
)
from vidlm.foreign import explain_missing_config, refuse_foreign

INDEX = "model.safetensors.index.json"

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself
DTYPE_BITS: Mapping[str, int] = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: bytes [start, stop) of the file, counted from the file's beginning."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def resolve(
    name: str | PathLike[str],
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    cache_dir: str | PathLike[str] | None = None,
    token: str | bool | None = None,
) -> Path:
    """The folder of a checkpoint: `name` itself if it is one, else a download of hub id owner/name.

    HF_HOME, HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT, HF_HUB_ETAG_TIMEOUT and HF_HUB_DOWNLOAD_TIMEOUT
    count as they do everywhere else. Pickle files and subfolders are never downloaded.

    Resolve a repository once and pass its folder on: two calls may see two commits.

    Raises ModelNotFound (no such folder, repository or revision), ModelError (access denied),
    HubUnreachable (offline, or no answer in time, and not in the cache).
    """
    folder = Path(name).expanduser()
    if str(name) and folder.is_dir():  # Path("") would be the current folder
        return folder
    _require_hub_id(str(name), folder)
    return snapshot(
        Wanted(str(name), revision, local_files_only),
        cache_dir=None if cache_dir is None else Path(cache_dir),
        token=token,
    )


def _require_hub_id(name: str, folder: Path) -> None:
    """Raise ModelNotFound unless `name`, which is no folder, can be a hub id."""
    if folder.is_file():
        raise ModelNotFound(
            f"model {name!r} is a file; pass the folder that holds config.json and the weights"
        )
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name, re.ASCII):
        raise ModelNotFound(
            f"model {name!r}: no such folder, and not a hub id of the form owner/name; check the "
            "path (relative ones start in the current folder), give a hub id such as "
            "llava-hf/llava-interleave-qwen-0.5b-hf, or try without weights: --model demo"
        )


def read_json(path: str | PathLike[str]) -> dict[str, Any]:
    """The JSON object in a file; a byte order mark and CRLF line ends are fine, the hub has both.

    Raises ModelError if it cannot be read, naming the line.
    """
    path = Path(path)
    try:
        value = json.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError as error:
        raise ModelError(
            f"{path} is missing; the folder is not a complete checkpoint, download it again"
        ) from error
    except json.JSONDecodeError as error:
        raise ModelError(
            f"{path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}; "
            "download or save the file again"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{path} cannot be read as JSON: {error}; download or save the file again"
        ) from error
    if not isinstance(value, dict):
        raise ModelError(
            f"{path} holds a JSON {type(value).__name__}, an object is needed; "
            "download or save the file again"
        )
    return value


def read_config(folder: str | PathLike[str]) -> dict[str, Any]:
    """The folder's config.json, as it stands.

    Raises ModelError where there is none, UnsupportedModel where it is of another layout, saying
    what the folder is.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise explain_missing_config(Path(folder))
    config = read_json(path)
    refuse_foreign(Path(folder), config)
    return config


def weight_files(folder: str | PathLike[str]) -> dict[str, Path]:
    """Every tensor name of a checkpoint and the safetensors file that holds it.

    Taken from the files' own headers: those the index lists, else model.safetensors, else every
    *.safetensors of the folder. Raises WeightsError if a file or a tensor of the index is missing
    or a name is stored twice, UnsupportedModel if there are only pickle files.
    """
    folder = Path(folder)
    if (folder / INDEX).is_file():
        return _indexed(folder)
    single = folder / "model.safetensors"
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        _raise_no_weights(folder)
    return _merge({file: read_safetensors_header(file) for file in files}, {})


def _indexed(folder: Path) -> dict[str, Path]:
    """The tensors of the shards that the index lists, checked against the index."""
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(
            f"{folder / INDEX} has no weight_map that names tensors; download the file again"
        )
    shards = {name: _inside(folder, shard) for name, shard in weight_map.items()}
    if missing := sorted({shard.name for shard in shards.values() if not shard.is_file()}):
        raise WeightsError(
            f"{folder} lacks {_some(missing)}, which {INDEX} lists; download the missing files"
        )
    headers = {shard: read_safetensors_header(shard) for shard in sorted(set(shards.values()))}
    if absent := sorted(name for name, shard in shards.items() if name not in headers[shard]):
        raise WeightsError(
            f"{INDEX} in {folder} lists tensors that are not in their file: {_some(absent)}; "
            "index and files are of different versions, download both again"
        )
    return _merge(headers, shards)


def _inside(folder: Path, shard: object) -> Path:
    """The shard's path, which must not lead out of the folder.

    Judged by its text: in the hub's cache every file is a link into a folder beside this one.
    """
    parts = PurePosixPath(shard).parts if isinstance(shard, str) else ()
    unsafe = not parts or ".." in parts or parts[0] == "/" or "\\" in str(shard) or ":" in parts[0]
    if unsafe or not str(shard).endswith(".safetensors"):
        raise WeightsError(
            f"{folder / INDEX} names the file {shard!r}; only *.safetensors inside the folder are "
            "allowed, so do not trust this checkpoint and download it again from its author"
        )
    return folder.joinpath(*parts)


def _merge(
    headers: Mapping[Path, Mapping[str, TensorEntry]], chosen: Mapping[str, Path]
) -> dict[str, Path]:
    """One map over all files; `chosen` (the index) decides where a name is stored twice."""
    where = dict(chosen)
    for file, header in headers.items():
        for name in header:
            other = where.setdefault(name, file)
            if other != file and name not in chosen:
                raise WeightsError(
                    f"tensor {name!r} is in {other.name} and in {file.name}; keep the files of one "
                    f"version only, or add {INDEX}"
                )
    return where


def _raise_no_weights(folder: Path) -> NoReturn:
    names = [path.name for path in sorted(folder.iterdir())] if folder.is_dir() else []
    pickles = [name for name in names if any(suffix in name for suffix in PICKLES)]
    if pickles:
        raise UnsupportedModel(
            f"{folder} has weights only as pickle ({_some(pickles)}), which can run code when read "
            "and is refused; convert them once with torch.load(file, weights_only=True) and "
            "safetensors.torch.save_file, or use a revision that has *.safetensors"
        )
    raise WeightsError(
        f"{folder} has no *.safetensors file (pickle weights are never downloaded or read); "
        "download the weights, or use a repository or revision that has them as safetensors"
    )


def _some(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def read_safetensors_header(path: str | PathLike[str]) -> dict[str, TensorEntry]:
    """Name, type, shape and absolute byte range of every tensor in a safetensors file.

    At least as strict as the safetensors library: the tensors must fill the file from the end of
    the header to its last byte without gap or overlap, each exactly as long as its type and shape
    say. Raises WeightsError otherwise. Format: https://github.com/huggingface/safetensors#format
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return read_open_header(file, path, MAX_HEADER_BYTES)[0]
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error}; download the file again") from error


def read_open_header(
    file: BinaryIO, path: Path, limit: int
) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """`read_safetensors_header` of an open file, and its metadata; the header takes at most `limit`
    bytes. Raises WeightsError, OSError."""
    size = file.seek(0, 2)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, limit):
        raise _broken(path, f"a header of {length} bytes in a file of {size}")
    header = _header_json(path, file.read(length))
    metadata: dict[str, str] = header.pop("__metadata__", {})
    entries = {name: _entry(path, name, info, 8 + length) for name, info in header.items()}
    _check_contiguous(path, entries, 8 + length, size)
    return entries, metadata


def _header_json(path: Path, raw: bytes) -> dict[str, Any]:
    """The header's JSON object; what JSON readers differ on (duplicate names, NaN) is an error."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name occurs twice")
        return found

    def no_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    if not raw.startswith(b"{"):
        raise _broken(path, "its header does not start with '{'")
    try:
        header = json.loads(
            raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_constant
        )
        json.dumps(list(header), ensure_ascii=False).encode("utf-8")  # refuses lone surrogates
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"its header cannot be read as JSON ({error})") from error
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _broken(path, "its __metadata__ is not a map from text to text")
    return dict(header)


def _entry(path: Path, name: str, info: object, base: int) -> TensorEntry:
    """One tensor's entry, with its byte count checked against type and shape."""
    if not isinstance(info, dict) or info.keys() != {"dtype", "shape", "data_offsets"}:
        raise _broken(path, f"tensor {name!r} lacks dtype, shape or data_offsets, or has more")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _broken(path, f"tensor {name!r} has the unknown dtype {dtype!r}")
    sound = _naturals(shape) and _naturals(offsets) and len(offsets) == 2
    if not sound or prod(side or 1 for side in shape) >= 2**63:
        raise _broken(path, f"tensor {name!r} has shape {shape!r} and data_offsets {offsets!r}")
    start, stop = offsets
    if prod(shape) * DTYPE_BITS[dtype] != (stop - start) * 8:
        raise _broken(
            path,
            f"tensor {name!r} of {dtype} {shape} is given {stop - start} bytes",
        )
    return TensorEntry(dtype, tuple(shape), base + start, base + stop)


def _naturals(value: object) -> bool:
    """Is it a list of integers >= 0? (bool is an int in Python, but not in JSON)"""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_contiguous(path: Path, entries: Mapping[str, TensorEntry], base: int, size: int) -> None:
    position = base
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != position:
            raise _broken(path, f"tensor {name!r} starts at {entry.start}, not at {position}")
        position = entry.stop
    if position != size:
        raise _broken(path, f"its tensors end at byte {position}, the file at {size}")


def _broken(path: Path, what: str) -> WeightsError:
    return WeightsError(
        f"{path} is not a sound safetensors file: {what}; "
        "it is damaged or was not downloaded completely, download it again"
    )
