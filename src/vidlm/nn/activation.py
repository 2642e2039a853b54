"""Activations by the names checkpoints use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional

from vidlm.errors import UnsupportedModel


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the approximation CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "gelu": functional.gelu,
        "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
        "quick_gelu": quick_gelu,
        "relu": functional.relu,
        "silu": functional.silu,
    }
)


def activation(name: str) -> Callable[[Tensor], Tensor]:
    if name not in ACTIVATIONS:
        raise UnsupportedModel(
            f"activation {name!r} in config.json is not supported; known: {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]
