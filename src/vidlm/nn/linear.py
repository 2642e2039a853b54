"""How layers call their linear layers: by a kernel where rows are few, weights plain or packed.

What else has been put in a layer's place (adapted, hooked, wrapped, of another library) is called
as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from vidlm import native
from vidlm.nn.packed import PackedLinear, product


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
