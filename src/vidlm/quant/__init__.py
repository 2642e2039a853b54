"""Fewer bits a weight: each scheme swaps a loaded model's linear layers for those of a library."""

from vidlm.quant.bitsandbytes import BitsAndBytesConfig, quantize

__all__ = ["BitsAndBytesConfig", "quantize"]
