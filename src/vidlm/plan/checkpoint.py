"""What of a checkpoint is looked at: config.json, headers, and the model on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vidlm.engine.options import KV_DTYPES
from vidlm.errors import InvalidArgument
from vidlm.fit import Dtypes
from vidlm.hf.auto import MODELS
from vidlm.hf.loading import LoadOptions, placed, read_load_options, saved_scheme
from vidlm.hub import read_config, read_safetensors_header, weight_files
from vidlm.models import family_of
from vidlm.models.base import Family, VideoModel
from vidlm.nn.packed import PackedLinear
from vidlm.quant import Scheme, expect, preset
from vidlm.weights import stored_dtype

AUTO = "auto"  # what None is called where a word must be said


@dataclass(frozen=True)
class Loading:
    """How a model is to be loaded, in the words of `vidlm.load` and of EngineOptions, which are
    looked at when this is made: raises InvalidArgument for one that is not known.

    dtype, quantize, device, max_memory  as `vidlm.load` takes them
    kv_dtype                             "int8"; None or "auto": the model's
    """

    dtype: str | None = None
    quantize: str | None = None
    device: str | None = None
    kv_dtype: str | None = None
    max_memory: Mapping[int | str, int | str] | None = None

    def __post_init__(self) -> None:
        _ = self.options
        if self.kv_dtype not in (AUTO, *KV_DTYPES):
            words = ", ".join(word or f"{AUTO} (the model's dtype)" for word in KV_DTYPES)
            raise InvalidArgument(f"kv_dtype={self.kv_dtype!r}; allowed: {words}")

    @property
    def scheme(self) -> Scheme | None:
        """What weights are packed by while they are read."""
        return None if self.quantize is None else preset(self.quantize)

    @property
    def options(self) -> LoadOptions:
        """As `from_pretrained` reads them."""
        given = {"dtype": self.dtype, "device_map": self.device, "max_memory": self.max_memory}
        return read_load_options({**given, "quantization_config": self.scheme})

    @property
    def engine_kv_dtype(self) -> str | None:
        """As EngineOptions has it."""
        return None if self.kv_dtype == AUTO else self.kv_dtype


@dataclass(frozen=True)
class Weights:
    """What a model's weights take once they are loaded.

    parameters      numbers, a tied head counted once
    bytes           of all parameters and buffers: codes and scales of packed layers, all else in
                    the model's dtype
    unpacked_bytes  of the largest packed weight as numbers, but for the head's: prompts have one
                    unpacked at a time, in memory that is kept; 0 where nothing is packed
    """

    parameters: int
    bytes: int
    unpacked_bytes: int = 0

    @property
    def most_bytes(self) -> int:
        return self.bytes + self.unpacked_bytes


@dataclass(frozen=True)
class Checkpoint:
    """A folder, and how it would be loaded."""

    folder: Path
    loading: Loading = field(default_factory=Loading)

    @cached_property
    def raw(self) -> dict[str, Any]:
        return read_config(self.folder)

    @cached_property
    def family(self) -> Family:
        return family_of(self.raw)

    @cached_property
    def config(self) -> Any:
        return self.family.config.from_dict(self.raw)

    @cached_property
    def stored_bytes(self) -> int:
        """Of every tensor, by the headers of the files."""
        where = weight_files(self.folder)
        headers = {path: read_safetensors_header(path) for path in set(where.values())}
        entries = (headers[path][name] for name, path in where.items())
        return sum(entry.stop - entry.start for entry in entries)

    @cached_property
    def stored(self) -> torch.dtype:
        return stored_dtype(self.folder)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The one that `vidlm.load` would take."""
        asked = self.loading.dtype
        named = self.config.dtype if asked in (None, AUTO) else asked
        dtype = read_load_options({"dtype": named}).dtype
        return dtype if isinstance(dtype, torch.dtype) else self.stored

    @property
    def dtypes(self) -> Dtypes:
        return Dtypes(self.dtype, self.loading.engine_kv_dtype)

    @cached_property
    def saved(self) -> Scheme | None:
        """How the weights are packed in the files. Raises InvalidArgument where they are, and
        something else is asked for, UnsupportedModel where another library packed them."""
        return saved_scheme(self.raw, self.loading.scheme)

    @property
    def scheme(self) -> Scheme | None:
        """How they will be in memory."""
        return self.saved or self.loading.scheme

    @cached_property
    def weights(self) -> Weights:
        return weigh(self._model(), self.dtype, self.scheme)

    def check_room(self) -> None:
        """Raises what loading does where `max_memory` has no room for the weights."""
        if self.loading.max_memory is not None:
            placed(self._model(), self.dtype, self.loading.options, saved=self.saved)

    @property
    def sampling(self) -> dict[str, Any]:
        """Which frames of a video are taken unless told, as load_video's keywords."""
        return dict(self.family.sampling_of(self.config))

    def _model(self) -> VideoModel:
        """The model as `from_pretrained` makes it, before it has weights."""
        kind = next(model for model in MODELS if model.family is self.family)
        config = kind.adapted(self.config, self.folder, {})
        with torch.device("meta"):
            return kind(config)


def weigh(model: VideoModel, dtype: torch.dtype, scheme: Scheme | None) -> Weights:
    """The weights of a model on the meta device, whose layers change places by the rule that
    loading has for weights which were saved packed, and by which it packs others."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if scheme is not None:
        expect(model, scheme, model.unquantized)
    kept = sum(parameter.numel() * dtype.itemsize for parameter in model.parameters())
    kept += sum(buffer.nbytes for buffer in model.buffers())
    return Weights(parameters, kept, unpacked_bytes(model, dtype))


def unpacked_bytes(model: VideoModel, dtype: torch.dtype) -> int:
    """Of the largest packed weight of a model as numbers, for which prompts need room. The head's
    does not count: it has no more rows at a time than it takes packed."""
    head: nn.Module = model.head
    packed = (layer for layer in model.modules() if type(layer) is PackedLinear)
    sizes = [layer.out_features * layer.in_features for layer in packed if layer is not head]
    return dtype.itemsize * max(sizes, default=0)
