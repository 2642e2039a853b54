"""The configs users know from transformers, and short names for what they mostly want."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vidlm.errors import InvalidArgument, UnsupportedModel
from vidlm.quant.scheme import HEAD, Scheme

TYPES = ("nf4", "fp4")
PRESETS = ("int8", "int4", "nf4")


def preset(name: str) -> Scheme:
    """ "int8", "int4" or "nf4": all linear layers, the head too, in 8 bits. Embeddings stay."""
    if name not in PRESETS:
        raise InvalidArgument(f"quantize={name!r}; allowed: {', '.join(PRESETS)}")
    return Scheme(name, head="int8")


def _skipped(names: Sequence[str] | None) -> tuple[str | None, tuple[str, ...]]:
    """Whether the head goes with the rest, and what stays: by default the head alone."""
    if isinstance(names, str):
        raise InvalidArgument(f"names to leave as they are: {names!r}; give a list of names")
    names = (HEAD,) if names is None else tuple(names)
    return (None if HEAD in names else "same"), tuple(n for n in names if n != HEAD)


def _scheme(kind: str, group: int | None, names: Sequence[str] | None) -> Scheme:
    head, skip = _skipped(names)
    return Scheme(kind, group, kind if head else None, skip)


@dataclass(frozen=True)
class QuantoConfig:
    """As transformers' for optimum-quanto; the arithmetic is vidlm's own (docs/quantization.md).

    weights                 "int8" or "int4"
    activations             None: inputs of layers stay as they are
    modules_to_not_convert  names, or parts of them between dots, that stay as they are; None: the
                            head alone
    """

    weights: str = "int8"
    activations: str | None = None
    modules_to_not_convert: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.weights not in ("int8", "int4"):
            raise InvalidArgument(
                f"QuantoConfig(weights={self.weights!r}); allowed: int8, int4. For nf4 and fp4 "
                "give BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4')"
            )
        if self.activations is not None:
            raise InvalidArgument(
                f"QuantoConfig(activations={self.activations!r}); inputs of layers stay as they "
                "are: leave it out"
            )
        _skipped(self.modules_to_not_convert)

    @property
    def scheme(self) -> Scheme:
        return _scheme(self.weights, None, self.modules_to_not_convert)


@dataclass(frozen=True)
class TorchAoConfig:
    """As transformers' for torchao; the arithmetic is vidlm's own (docs/quantization.md).

    quant_type              "int8_weight_only" or "int4_weight_only"
    group_size              of int4: weights that share a scale, a multiple of 32; None: 32
    modules_to_not_convert  as QuantoConfig has it
    """

    quant_type: str = "int8_weight_only"
    group_size: int | None = None
    modules_to_not_convert: Sequence[str] | None = None

    def __post_init__(self) -> None:
        named = re.fullmatch("(int8|int4)_weight_only", str(self.quant_type))
        if named is None:
            raise InvalidArgument(
                f"TorchAoConfig(quant_type={self.quant_type!r}); allowed: 'int8_weight_only', "
                "'int4_weight_only'"
            )
        _ = self.scheme  # a group that cannot be is refused now

    @property
    def scheme(self) -> Scheme:
        kind = self.quant_type.partition("_")[0]
        return _scheme(kind, self.group_size, self.modules_to_not_convert)


@dataclass(frozen=True)
class BitsAndBytesConfig:
    """What to quantize and how, in transformers' words. On CPUs the arithmetic is vidlm's own, on
    GPUs that of bitsandbytes (`pip install vidlm[quant]`).

    load_in_4bit, load_in_8bit   one of the two
    bnb_4bit_quant_type          "nf4" or "fp4"
    bnb_4bit_use_double_quant    scales in 8 bits, too; on CPUs they stay float32
    bnb_4bit_compute_dtype       on GPUs what weights become for a product: a dtype or its name,
                                 float32; on CPUs products take the inputs' dtype
    llm_int8_threshold           on GPUs inputs above it are multiplied in 16 bits; on CPUs all are
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
        _skipped(self.llm_int8_skip_modules)

    @property
    def compute_dtype(self) -> torch.dtype:
        given = self.bnb_4bit_compute_dtype
        if given is None:
            return torch.float32
        if isinstance(given, torch.dtype):
            return given
        found: torch.dtype = getattr(torch, str(given).removeprefix("torch."), None)  # type: ignore[assignment]
        return found

    @property
    def scheme(self) -> Scheme:
        kind = "int8" if self.load_in_8bit else self.bnb_4bit_quant_type
        return _scheme(kind, None, self.llm_int8_skip_modules)


Config = QuantoConfig | TorchAoConfig | BitsAndBytesConfig | Scheme
CONFIGS = (QuantoConfig, TorchAoConfig, BitsAndBytesConfig, Scheme)


def read_config(given: object) -> Config | None:
    """The config that `from_pretrained` was given; raises UnsupportedModel for any other thing."""
    if given is None or isinstance(given, CONFIGS):
        return given
    kind = type(given)
    raise UnsupportedModel(
        f"quantization_config of type {kind.__module__}.{kind.__qualname__}; supported: "
        "QuantoConfig, TorchAoConfig, BitsAndBytesConfig ('from vidlm import QuantoConfig'). Or "
        f"load in dtype=bfloat16; vidlm.load takes quantize={', '.join(map(repr, PRESETS))}"
    )


def scheme_of(config: Config) -> Scheme:
    return config if isinstance(config, Scheme) else config.scheme
