"""How layers call their linear layers: by a kernel where they are plain ones and rows are few.

What has been put in a layer's place (quantized, adapted, hooked, wrapped) is called as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from vidlm import native


def bare(module: nn.Module) -> bool:
    """Whether calling this module runs its class's forward and nothing else."""
    return not (module._forward_pre_hooks or module._forward_hooks or "forward" in module.__dict__)


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x), where x has any number of axes."""
    if type(layer) is not nn.Linear or not bare(layer):
        return layer(x)
    if x.ndim == 2 and x.shape[0] <= native.MOST_ROWS:
        return native.linear(x, layer.weight, layer.bias)
    return layer(x) if layer.bias is None else native.affine(x, layer.weight, layer.bias)


def linears(layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """[layer(x) for layer in layers], of a few rows in one go."""
    own = [layer for layer in layers if type(layer) is nn.Linear and bare(layer)]
    if x.ndim == 2 and x.shape[0] <= native.MOST_ROWS and len(own) == len(layers):
        return native.linears(x, [layer.weight for layer in own], [layer.bias for layer in own])
    return [linear(layer, x) for layer in layers]
