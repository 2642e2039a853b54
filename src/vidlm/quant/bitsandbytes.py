"""Linear layers in 4 or 8 bits by bitsandbytes, which keeps the arithmetic: on CPUs and on GPUs.

As transformers does it: every linear layer but the head, unless a name is skipped. Weights are
quantized one layer after the other, once the model is loaded. `pip install vidlm[quant]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import nn

from vidlm.errors import InvalidArgument, UnsupportedModel

HEAD = "lm_head"
TYPES = ("nf4", "fp4")


@dataclass(frozen=True)
class BitsAndBytesConfig:
    """What to quantize and how, in transformers' words.

    load_in_4bit, load_in_8bit   one of the two
    bnb_4bit_quant_type          "nf4" or "fp4"; bnb_4bit_use_double_quant: scales in 8 bits, too
    bnb_4bit_compute_dtype       what weights become for a product: a dtype or its name, float32
    llm_int8_threshold           inputs above it are multiplied in 16 bits
    llm_int8_skip_modules        names, or parts of them between dots, that stay as they are; None:
                                 the head alone
    """

    load_in_8bit: bool = False
    load_in_4bit: bool = False
    llm_int8_threshold: float = 6.0
    llm_int8_skip_modules: Sequence[str] | None = None
    bnb_4bit_compute_dtype: torch.dtype | str | None = None
    bnb_4bit_quant_type: str = "fp4"
    bnb_4bit_use_double_quant: bool = False

    def __post_init__(self) -> None:
        if self.load_in_4bit == self.load_in_8bit:
            raise InvalidArgument(
                f"load_in_4bit={self.load_in_4bit} and load_in_8bit={self.load_in_8bit}; set one"
            )
        if self.bnb_4bit_quant_type not in TYPES:
            raise InvalidArgument(
                f"bnb_4bit_quant_type={self.bnb_4bit_quant_type!r}; allowed: {', '.join(TYPES)}"
            )
        if not isinstance(self.compute_dtype, torch.dtype):
            raise InvalidArgument(
                f"bnb_4bit_compute_dtype={self.bnb_4bit_compute_dtype!r}; give a torch dtype, or "
                "its name as 'float16'"
            )

    @property
    def compute_dtype(self) -> torch.dtype:
        given = self.bnb_4bit_compute_dtype
        if given is None:
            return torch.float32
        if isinstance(given, torch.dtype):
            return given
        found: torch.dtype = getattr(torch, str(given).removeprefix("torch."), None)  # type: ignore[assignment]
        return found


def quantize(model: nn.Module, config: BitsAndBytesConfig, whole: Sequence[str] = ()) -> None:
    """Swap a loaded model's linear layers in place, on the device they are on.

    `whole` names parts that the family keeps as they are. Raises UnsupportedModel where
    bitsandbytes is not installed, InvalidArgument where a name to skip is none of the model's.
    """
    library = _library()
    skipped = (HEAD,) if config.llm_int8_skip_modules is None else config.llm_int8_skip_modules
    layers = {n: m for n, m in model.named_modules() if type(m) is nn.Linear}
    for name in skipped:
        if name != HEAD and not any(_within(layer, name) for layer in layers):
            raise InvalidArgument(
                f"llm_int8_skip_modules names {name!r}, which is no part of the model; give names "
                "of layers or parts of them, such as 'lm_head' or 'multi_modal_projector'"
            )
    make: Callable[..., nn.Module] = _four_bits if config.load_in_4bit else _eight_bits
    for name, layer in layers.items():
        if not any(_within(name, part) for part in (*skipped, *whole)):
            outer, _, last = name.rpartition(".")
            setattr(model.get_submodule(outer), last, make(library, layer, config))


def _within(layer: str, part: str) -> bool:
    """Whether a layer's dotted name has this part; "model." in front, as others have it, or not."""
    return f".{part.removeprefix('model.')}." in f".{layer}."


def _library() -> Any:
    try:
        return import_module("bitsandbytes")
    except ImportError as error:
        raise UnsupportedModel(
            "BitsAndBytesConfig needs the package bitsandbytes; pip install 'vidlm[quant]', or "
            "load in dtype=bfloat16"
        ) from error


def _four_bits(library: Any, layer: nn.Linear, config: BitsAndBytesConfig) -> nn.Module:
    double, kind = config.bnb_4bit_use_double_quant, config.bnb_4bit_quant_type
    made = library.nn.Linear4bit(
        *(layer.in_features, layer.out_features, layer.bias is not None, config.compute_dtype),
        compress_statistics=double,
        quant_type=kind,
        device="meta",
    )
    made.weight = library.nn.Params4bit(
        layer.weight.data, requires_grad=False, compress_statistics=double, quant_type=kind
    )
    # Its packed form for newer CPUs rounds the scales, wants sizes in multiples of 64 (SigLIP's
    # 4304 is none), and a kernel that is fetched from the hub.
    made.support_avx512bf16_for_cpu = False
    return _finished(made, layer)


def _eight_bits(library: Any, layer: nn.Linear, config: BitsAndBytesConfig) -> nn.Module:
    made = library.nn.Linear8bitLt(
        *(layer.in_features, layer.out_features, layer.bias is not None),
        has_fp16_weights=False,
        threshold=config.llm_int8_threshold,
        device="meta",
    )
    made.weight = library.nn.Int8Params(
        layer.weight.data, requires_grad=False, has_fp16_weights=False
    )
    return _finished(made, layer)


def _finished(made: nn.Module, layer: nn.Linear) -> nn.Module:
    """With the layer's bias, and quantized: the library does it when a weight comes to a device."""
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.data, requires_grad=False)
    moved: nn.Module = made.to(layer.weight.device)
    return moved
