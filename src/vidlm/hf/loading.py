"""The keywords of `from_pretrained`, and the loading of weights with a progress bar on stderr."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from vidlm.errors import InvalidArgument, UnsupportedModel, unknown_keyword
from vidlm.hf.placement import DeviceMap, Placement, plan_placement, read_device_map
from vidlm.hub import resolve
from vidlm.models.base import VideoModel
from vidlm.quant import (
    BitsAndBytesConfig,
    Config,
    Packer,
    Scheme,
    expect,
    quantize,
    read_config,
    scheme_of,
)
from vidlm.weights import Renames, load, stored_dtype

log = logging.getLogger(__name__)
DEMO = "demo"  # the name of the model inside the package
PATIENCE = 1.0  # seconds of loading before a bar appears
NO_BARS = "HF_HUB_DISABLE_PROGRESS_BARS"
TRUE = ("1", "ON", "YES", "TRUE")  # as the hub library reads its variables


@dataclass(frozen=True)
class LoadOptions:
    """`from_pretrained`'s keywords, translated once."""

    dtype: torch.dtype | str = "auto"
    device_map: DeviceMap = field(default_factory=DeviceMap)
    attn_implementation: str | None = None
    revision: str | None = None
    local_files_only: bool = False
    cache_dir: str | None = None
    token: str | None = None
    quantization_config: Config | None = None

    def folder(self, name: str | Path) -> Path:
        """The local folder of a model: a path, the demo inside the package, or the hub's cache."""
        return find(
            name,
            revision=self.revision,
            local_files_only=self.local_files_only,
            cache_dir=self.cache_dir,
            token=self.token,
        )


# All name torch's scaled_dot_product_attention, which has FlashAttention-2 for 16 bits on a GPU;
# weights are shown (output_attentions) whichever is named.
FLASH = "flash_attention_2"
ATTENTION = ("sdpa", "eager", FLASH)
AMPERE = (8, 0)  # the oldest GPUs that FlashAttention-2 runs on
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KEYWORDS = (
    *("dtype", "torch_dtype", "device_map", "max_memory", "revision", "local_files_only"),
    *("cache_dir", "token"),
    *("attn_implementation", "low_cpu_mem_usage", "trust_remote_code", "use_safetensors"),
    "quantization_config",
)


def read_load_options(kwargs: Mapping[str, Any]) -> LoadOptions:
    """Understand the keywords of `from_pretrained`; raises TypeError on an unknown one."""
    for name in kwargs:
        if name not in KEYWORDS:
            raise unknown_keyword("from_pretrained()", name, KEYWORDS)
    read_config(kwargs.get("quantization_config"))
    if kwargs.get("use_safetensors") is False:
        raise UnsupportedModel(
            "use_safetensors=False: only safetensors are read, never pickle files"
        )
    given = kwargs.get("device_map")
    device_map = read_device_map(given, kwargs.get("max_memory"))
    on_cpu = given is not None and device_map.devices == [torch.device("cpu")]
    _check_attention(kwargs.get("attn_implementation"), on_cpu)
    plain = {f.name for f in fields(LoadOptions)} - {"dtype", "device_map"}
    return LoadOptions(
        dtype=_one_dtype(kwargs),
        device_map=device_map,
        **{name: kwargs[name] for name in plain if kwargs.get(name) is not None},
    )


def find(name: str | Path, **options: Any) -> Path:
    """`hub.resolve`, which also knows the model inside the package by the name "demo"."""
    if name == DEMO:
        return Path(__file__).parent.parent / "demo" / "checkpoint"
    return resolve(str(name), **options)


def load_model(
    model: VideoModel,
    folder: Path,
    renames: Renames,
    options: LoadOptions,
    saved: Scheme | None = None,
) -> Placement:
    """Fill a meta model from a folder, each tensor on its device; `saved`: how they are packed."""
    dtype = options.dtype
    if not isinstance(dtype, torch.dtype):  # "auto": config.json's
        dtype = _dtype(model.config.dtype or "auto")
    if not isinstance(dtype, torch.dtype):  # which does not say: the file's
        dtype = stored_dtype(folder)
    placement = placed(model, dtype, options, renames, saved)
    config, whole = options.quantization_config, model.unquantized
    packer = None
    if saved is not None:
        expect(model, saved, whole)
    elif config is not None and not _by_library(config, placement):
        packer = Packer(model, scheme_of(config), whole)
    load(
        model,
        folder,
        renames,
        dtype=dtype,
        device=placement.device_of,
        place=None if packer is None else packer.place,
        progress=_bar(folder.name),
    )
    if packer is not None:
        packer.finish()
    elif isinstance(config, BitsAndBytesConfig):
        quantize(model, config, whole)
    placement.apply(model)
    return placement


def placed(
    model: VideoModel,
    dtype: torch.dtype,
    options: LoadOptions,
    renames: Renames | None = None,
    saved: Scheme | None = None,
) -> Placement:
    """Where the weights of a model on the meta device are to lie, which stays as it is.

    Raises InvalidArgument where they do not fit, UnsupportedModel where something else that
    `options` ask for cannot be there.
    """
    config, wanted, shown = saved or options.quantization_config, options.device_map, model
    unpacked = isinstance(config, BitsAndBytesConfig) and wanted.devices[0].type == "cuda"
    if config is not None and isinstance(wanted.how, str) and not unpacked:
        shown = deepcopy(model)  # its sizes are those that count; names are the same
        expect(shown, scheme_of(config), model.unquantized)
    placement = plan_placement(shown, wanted, dtype, renames)
    _check(placement, options, dtype)
    return placement


def _by_library(config: Config, placement: Placement) -> bool:
    """Whether bitsandbytes keeps the arithmetic: on GPUs, where it has kernels."""
    return isinstance(config, BitsAndBytesConfig) and placement.main.type == "cuda"


def saved_scheme(config: Mapping[str, Any], given: Config | None) -> Scheme | None:
    """How the weights beside a config.json are packed. Raises where they are, and something else is
    asked for, or where another library packed them."""
    stored = config.get("quantization_config")
    if stored is None:
        return None
    scheme = Scheme.from_dict(stored)
    if given is not None and scheme_of(given) != scheme:
        raise InvalidArgument(
            f"quantization_config={given}, and these weights were saved in {scheme}; leave it out, "
            "or load the original weights"
        )
    return scheme


def _check(placement: Placement, options: LoadOptions, dtype: torch.dtype) -> None:
    """What can be told only when it is known where the weights go, before they do."""
    waiting = placement.waiting
    if waiting and options.quantization_config is not None:
        raise UnsupportedModel(
            f"quantization_config, and {len(waiting)} parts of the model whose weights would wait "
            "on the CPU for their turn on a GPU, which quantized ones cannot; give GPUs enough "
            "memory for all, or load with device_map='cpu'"
        )
    if waiting:
        log.info("%d parts wait on the CPU for their turn on %s", len(waiting), placement.main)
    if options.attn_implementation != FLASH:
        return
    if dtype not in (torch.float16, torch.bfloat16):
        raise UnsupportedModel(
            f"attn_implementation='flash_attention_2' in {dtype}; it is for float16 and bfloat16: "
            "give one as dtype, or leave it out for torch's scaled_dot_product_attention"
        )
    gpu = placement.main
    if gpu.type != "cuda":
        log.warning(
            "attn_implementation='flash_attention_2', and the model is on the CPU, where torch's "
            "scaled_dot_product_attention runs; move it with .to('cuda'), or load with device_map"
        )
    elif torch.cuda.get_device_capability(gpu) < AMPERE:
        raise UnsupportedModel(
            "attn_implementation='flash_attention_2' needs a GPU of compute capability 8.0 "
            f"(Ampere) or newer, {gpu} is older; leave it out for the kernel that torch's "
            "scaled_dot_product_attention has for it"
        )


def _check_attention(attention: Any, on_cpu: bool) -> None:
    if attention not in (None, *ATTENTION):
        raise UnsupportedModel(
            f"attn_implementation={attention!r}; allowed: {', '.join(ATTENTION)}, or leave it out"
        )
    if attention != FLASH:
        return
    missing = None
    if not torch.cuda.is_available():
        missing = "and torch sees none"
    elif on_cpu:
        missing = "and device_map names none"
    elif not torch.backends.cuda.is_flash_attention_available():
        missing = "and a torch that was built with it"
    if missing:
        raise UnsupportedModel(
            f"attn_implementation='flash_attention_2' needs a GPU, {missing}; leave it out for "
            "torch's scaled_dot_product_attention, which is what runs here"
        )


def _one_dtype(kwargs: Mapping[str, Any]) -> torch.dtype | str:
    """That of both spellings of the keyword."""
    given = {n: kwargs[n] for n in ("dtype", "torch_dtype") if kwargs.get(n) is not None}
    found = {_dtype(value) for value in given.values()}
    if len(found) > 1:
        raise InvalidArgument(
            f"dtype={given['dtype']!r} and torch_dtype={given['torch_dtype']!r}; they are one "
            "keyword, give dtype alone"
        )
    return found.pop() if found else "auto"


def _dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    if isinstance(dtype, str) and dtype == "auto":
        return dtype
    found = getattr(torch, str(dtype).removeprefix("torch."), None)
    if found not in DTYPES:
        raise InvalidArgument(f"dtype={dtype!r}; allowed: auto, float32, bfloat16, float16")
    assert isinstance(found, torch.dtype)
    return found


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
