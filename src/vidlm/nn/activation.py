"""Activations by the names checkpoints use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

from torch import Tensor
from torch.nn import functional

from vidlm import native
from vidlm.errors import UnsupportedModel

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "gelu": functional.gelu,
        "gelu_pytorch_tanh": native.gelu_tanh,
        "quick_gelu": native.quick_gelu,  # what CLIP was trained with
        "relu": functional.relu,
        "silu": functional.silu,
    }
)
IN_PLACE: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "gelu_pytorch_tanh": partial(native.gelu_tanh, inplace=True),
        "quick_gelu": partial(native.quick_gelu, inplace=True),
    }
)


def activation(name: str, inplace: bool = False) -> Callable[[Tensor], Tensor]:
    """By name; `inplace`: one that may write into its argument, which nobody else needs."""
    if name not in ACTIVATIONS:
        raise UnsupportedModel(
            f"activation {name!r} in config.json is not supported; known: {', '.join(ACTIVATIONS)}"
        )
    return IN_PLACE.get(name, ACTIVATIONS[name]) if inplace else ACTIVATIONS[name]


def gated(name: str, inplace: bool = False) -> Callable[[Tensor, Tensor], Tensor]:
    """(gate, up) -> act(gate) * up; `inplace`: one that may write into gate."""
    if name == "silu":
        return partial(native.silu_mul, inplace=inplace)
    return partial(_gated, activation(name, inplace))


def _gated(act: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    return act(gate) * up
