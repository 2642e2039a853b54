"""Files of saved videos with something in them changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vidlm.api.index_file import FORMAT


def read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The index and the tensors, in memory of their own: load_file gives a map of the file."""
    with safe_open(file, "pt") as opened:
        index = json.loads(opened.metadata()["index"])
    return index, {name: tensor.clone() for name, tensor in load_file(file).items()}


def metadata(index: Any) -> dict[str, str]:
    return {"format": FORMAT, "index": json.dumps(index)}


def rewrite(file: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], object]) -> None:
    index, tensors = read(file)
    change(index, tensors)
    save_file(tensors, file, metadata(index))


def put(index: dict[str, Any], where: str, value: Any) -> None:
    """Set the field at a path like "frames/0/pts"."""
    *folders, name = where.split("/")
    inner: Any = index
    for each in folders:
        inner = inner[int(each) if isinstance(inner, list) else each]
    inner[int(name) if isinstance(inner, list) else name] = value
