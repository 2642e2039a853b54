"""A checkpoint's decoder without torch: its configuration and weights as bytes, for any Python."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in the file: "BF16" or "F32", and its bytes (rows, bytes of a row)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray

    def float32(self) -> np.ndarray:
        if self.dtype == "F32":
            return self.data.view(np.float32).reshape(self.shape)
        # bfloat16 is the upper half of a float32
        wide = self.data.view(np.uint16).astype(np.uint32) << 16
        return wide.view(np.float32).reshape(self.shape)


def text_config(folder: Path) -> dict[str, Any]:
    """Of the decoder, with the values that a config.json may leave out."""
    given = json.loads((folder / "config.json").read_text())["text_config"]
    defaults = {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32768}
    config = {**defaults, **given}
    if config["model_type"] != "qwen2":
        raise SystemExit(f"a decoder of type {config['model_type']}; this script knows qwen2")
    return config


def decoder(folder: Path) -> Iterator[Stored]:
    """The decoder's tensors as a Qwen2 of its own names them: model.layers.0..., lm_head.weight."""
    for stored in tensors(folder):
        _, found, inner = stored.name.rpartition("language_model.")
        if stored.name.endswith("lm_head.weight"):
            inner = "lm_head.weight"
        elif not found:
            continue
        elif not inner.startswith("model."):
            inner = f"model.{inner}"
        yield Stored(inner, stored.dtype, stored.shape, stored.data)


def tensors(folder: Path) -> Iterator[Stored]:
    """Everything in the safetensors files, as memory maps."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        whole = np.memmap(path, np.uint8, "r", offset=8 + length)
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            shape = tuple(entry["shape"])
            data = whole[start:stop].reshape(*shape[:-1], -1)
            yield Stored(name, entry["dtype"], shape, data)
