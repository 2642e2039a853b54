"""Linear layers in fewer bits: configs as transformers has them, and what becomes of a model."""

from vidlm.quant.bitsandbytes import quantize
from vidlm.quant.config import (
    PRESETS,
    BitsAndBytesConfig,
    Config,
    QuantoConfig,
    TorchAoConfig,
    preset,
    read_config,
    scheme_of,
)
from vidlm.quant.scheme import Scheme
from vidlm.quant.swap import Packer, expect

__all__ = [
    "PRESETS",
    "BitsAndBytesConfig",
    "Config",
    "Packer",
    "QuantoConfig",
    "Scheme",
    "TorchAoConfig",
    "expect",
    "preset",
    "quantize",
    "read_config",
    "scheme_of",
]
