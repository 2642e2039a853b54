"""How layers call their linear layers: by a kernel where rows are few, weights plain or packed.

What else has been put in a layer's place (adapted, hooked, wrapped, of another library) is called
as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vidlm import native
from vidlm.nn.packed import PackedLinear, product

KEPT = native.FROM_HEAP // 16 * 15  # bytes: malloc adds a little to what it is asked for


def bare(module: nn.Module) -> bool:
    """Whether calling this module runs its class's forward and nothing else."""
    return not (module._forward_pre_hooks or module._forward_hooks or "forward" in module.__dict__)


def weight_of(layer: nn.Module) -> native.Weight | None:
    """What the kernels may read in the layer's place; None where it must be called."""
    if type(layer) is nn.Linear:
        return layer.weight if bare(layer) else None
    if type(layer) is PackedLinear:
        return layer.packed if bare(layer) else None
    return None


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x), where x has any number of axes."""
    weight = weight_of(layer)
    return layer(x) if weight is None else product(x, weight, layer.bias)  # type: ignore[arg-type]


def linears(layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """[layer(x) for layer in layers], of a few rows in one go."""
    if x.ndim == 2 and x.shape[0] <= native.MOST_ROWS:
        weights = [weight for layer in layers if (weight := weight_of(layer)) is not None]
        if len(weights) == len(layers):
            return native.linears(x, weights, [layer.bias for layer in layers])  # type: ignore[misc]
    return [linear(layer, x) for layer in layers]


def parted(layers: Sequence[nn.Module], x: Tensor, width: int) -> tuple[Tensor, ...]:
    """x (T, D) in parts of nearly as many rows, of which `width` numbers each are little enough for
    malloc to keep their memory when it is freed: what it gives back comes again page by page, which
    takes longer than to compute what is in it. One part with gradients, off a CPU, and where one of
    `layers` must be called, as whoever put something there expects it once.
    """
    most = KEPT // (width * x.itemsize)
    if len(x) <= most or not x.is_cpu or torch.is_grad_enabled():
        return (x,)
    if any(weight_of(layer) is None for layer in layers):
        return (x,)
    return x.tensor_split(-(-len(x) // max(most, 1)))


def linear_parts(layer: nn.Module, parts: Sequence[Tensor]) -> list[Tensor]:
    """layer(x) of each part; a packed weight is unpacked once."""
    weight = weight_of(layer)
    if len(parts) == 1 or weight is None:
        return [linear(layer, part) for part in parts]
    if isinstance(weight, native.PackedWeight):
        weight = weight.numbers(parts[0].dtype, passing=not torch.is_grad_enabled())
    return [product(part, weight, layer.bias) for part in parts]  # type: ignore[arg-type]
