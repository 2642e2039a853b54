"""The keywords of `from_pretrained`, and the loading of weights with a progress bar on stderr."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from vidlm.errors import InvalidArgument, UnsupportedModel, unknown_keyword
from vidlm.hub import resolve
from vidlm.models.base import VideoModel
from vidlm.quant import BitsAndBytesConfig, quantize
from vidlm.weights import Renames, load, stored_dtype

DEMO = "demo"  # the name of the model inside the package
PATIENCE = 1.0  # seconds of loading before a bar appears
NO_BARS = "HF_HUB_DISABLE_PROGRESS_BARS"
TRUE = ("1", "ON", "YES", "TRUE")  # as the hub library reads its variables


@dataclass(frozen=True)
class LoadOptions:
    """`from_pretrained`'s keywords, translated once."""

    dtype: torch.dtype | str = "auto"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    revision: str | None = None
    local_files_only: bool = False
    cache_dir: str | None = None
    token: str | None = None
    quantization_config: BitsAndBytesConfig | None = None

    def folder(self, name: str | Path) -> Path:
        """The local folder of a model: a path, the demo inside the package, or the hub's cache."""
        return find(
            name,
            revision=self.revision,
            local_files_only=self.local_files_only,
            cache_dir=self.cache_dir,
            token=self.token,
        )


# All name torch's scaled_dot_product_attention, whose kernel on a GPU is FlashAttention-2; weights
# are shown (output_attentions) whichever is named.
ATTENTION = ("sdpa", "eager", "flash_attention_2")
KEYWORDS = (
    *("dtype", "torch_dtype", "device_map", "revision", "local_files_only", "cache_dir", "token"),
    *("attn_implementation", "low_cpu_mem_usage", "trust_remote_code", "use_safetensors"),
    "quantization_config",
)


def read_load_options(kwargs: Mapping[str, Any]) -> LoadOptions:
    """Understand the keywords of `from_pretrained`; raises TypeError on an unknown one."""
    for name in kwargs:
        if name not in KEYWORDS:
            raise unknown_keyword("from_pretrained()", name, KEYWORDS)
    quantization = kwargs.get("quantization_config")
    if not isinstance(quantization, BitsAndBytesConfig | None):
        raise UnsupportedModel(
            f"quantization_config of type {type(quantization).__name__}; supported: "
            "vidlm.BitsAndBytesConfig. Or load in dtype=bfloat16"
        )
    attention = kwargs.get("attn_implementation")
    if attention not in (None, *ATTENTION):
        raise UnsupportedModel(
            f"attn_implementation={attention!r}; allowed: {', '.join(ATTENTION)}, or leave it out"
        )
    if attention == "flash_attention_2" and not torch.cuda.is_available():
        raise UnsupportedModel(
            "attn_implementation='flash_attention_2' needs a GPU, and torch sees none; leave it "
            "out for torch's scaled_dot_product_attention, which is what runs here"
        )
    if kwargs.get("use_safetensors") is False:
        raise UnsupportedModel(
            "use_safetensors=False: only safetensors are read, never pickle files"
        )
    dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
    plain = {f.name for f in fields(LoadOptions)} - {"dtype", "device"}
    return LoadOptions(
        dtype=_dtype(dtype) if dtype is not None else "auto",
        device=_device(kwargs.get("device_map")),
        **{name: kwargs[name] for name in plain if kwargs.get(name) is not None},
    )


def find(name: str | Path, **options: Any) -> Path:
    """`hub.resolve`, which also knows the model inside the package by the name "demo"."""
    if name == DEMO:
        return Path(__file__).parent.parent / "demo" / "checkpoint"
    return resolve(str(name), **options)


def load_model(model: VideoModel, folder: Path, renames: Renames, options: LoadOptions) -> None:
    """Fill a meta model from a folder."""
    dtype = options.dtype
    if not isinstance(dtype, torch.dtype):  # "auto": config.json's
        dtype = _dtype(model.config.dtype or "auto")
    if not isinstance(dtype, torch.dtype):  # which does not say: the file's
        dtype = stored_dtype(folder)
    load(model, folder, renames, dtype=dtype, device=options.device, progress=_bar(folder.name))
    if options.quantization_config is not None:
        quantize(model, options.quantization_config, model.unquantized)


def _dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    if dtype == "auto":
        return dtype
    found = getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InvalidArgument(f"dtype={dtype!r}; allowed: auto, float32, bfloat16, float16")
    return found


def _device(device_map: Any) -> torch.device:
    if isinstance(device_map, Mapping):
        if set(device_map) != {""}:
            raise UnsupportedModel(f"device_map={dict(device_map)}; only one device: {{'': 'cpu'}}")
        device_map = device_map[""]
    if device_map is None:
        return torch.device("cpu")
    if device_map == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device_map)
    except (RuntimeError, TypeError) as error:
        raise InvalidArgument(
            f"device_map={device_map!r}; allowed: 'auto', 'cpu', 'cuda', 'cuda:0', a torch.device"
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InvalidArgument(f"device {str(device)!r}, but torch sees no GPU; use 'cpu' or 'auto'")
    return device


def _bar(name: str) -> Callable[[int, int], None] | None:
    """A progress bar for loads that take longer than a moment, if stderr is a terminal.

    None where the variable that silences the hub library's bars is set.
    """
    if not sys.stderr.isatty() or os.environ.get(NO_BARS, "").upper() in TRUE:
        return None
    began = time.monotonic()

    def show(done: int, total: int) -> None:
        if time.monotonic() - began < PATIENCE:
            return
        width = round(30 * done / total)
        bar = "█" * width + "·" * (30 - width)
        end = "\n" if done == total else ""
        sys.stderr.write(f"\rloading {name} {bar} {done / 1e9:.2f} / {total / 1e9:.2f} GB{end}")
        sys.stderr.flush()

    return show
