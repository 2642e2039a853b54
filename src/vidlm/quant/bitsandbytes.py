"""Linear layers in 4 or 8 bits by bitsandbytes, which keeps the arithmetic, on GPUs.

As transformers does it: every linear layer but the head, unless a name is skipped. Weights are
quantized one layer after the other, once the model is loaded. `pip install vidlm[quant]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from torch import nn

from vidlm.errors import UnsupportedModel
from vidlm.quant.config import BitsAndBytesConfig
from vidlm.quant.scheme import HEAD, check_skipped, within


def quantize(model: nn.Module, config: BitsAndBytesConfig, whole: Sequence[str] = ()) -> None:
    """Swap a loaded model's linear layers in place, on the device they are on.

    `whole` names parts that the family keeps as they are. Raises UnsupportedModel where
    bitsandbytes is not installed, InvalidArgument where a name to skip is none of the model's.
    """
    library = _library()
    skipped = (HEAD,) if config.llm_int8_skip_modules is None else config.llm_int8_skip_modules
    layers = {n: m for n, m in model.named_modules() if type(m) is nn.Linear}
    check_skipped(skipped, layers, "llm_int8_skip_modules")
    make: Callable[..., nn.Module] = _four_bits if config.load_in_4bit else _eight_bits
    for name, layer in layers.items():
        if not any(within(name, part) for part in (*skipped, *whole)):
            outer, _, last = name.rpartition(".")
            setattr(model.get_submodule(outer), last, make(library, layer, config))


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
