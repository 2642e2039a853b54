"""A linear layer whose weight is kept in 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from vidlm import native


@dataclass(frozen=True)
class Packing:
    """How weights are packed.

    table   what each of 16 codes of 4 bits stands for; None: 8 bits
    group   how many numbers in a row share a scale with 4 bits, a multiple of 32
    scales  of 4 bits: bfloat16 or float32
    """

    table: tuple[float, ...] | None = None
    group: int = 0
    scales: torch.dtype = torch.float32

    def shapes(self, O: int, D: int) -> tuple[tuple[int, ...], tuple[int, ...]]:  # noqa: E741
        """Of the codes and scales of a weight (O, D)."""
        if self.table is None:
            return (O, D), (O,)
        return (O, -(-D // 64) * 32), (O, -(-D // self.group))


class PackedLinear(nn.Module):
    """x (..., D) -> (..., O) like nn.Linear, with codes and scales as native.PackedWeight has them.

    These are buffers: nothing trains them, and a change of the model's dtype leaves them as they
    are. The bias, if there is one, is a parameter. Inputs stay in their own dtype; gradients reach
    them and not the weights.
    """

    codes: Tensor
    scale: Tensor
    table: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, packing: Packing, codes: Tensor, scale: Tensor, width: int) -> None:
        super().__init__()
        self.packing = packing
        self.out_features, self.in_features = codes.shape[0], width
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        table = _table(packing, codes.device)
        self.register_buffer("table", table, persistent=False)
        self.register_parameter("bias", None)

    @classmethod
    def empty(cls, layer: nn.Linear, packing: Packing) -> Self:
        """In the place of a layer on the meta device, to be filled by `weights.load`."""
        O, D = layer.weight.shape  # noqa: E741
        codes, scale = packing.shapes(O, D)
        four = packing.table is not None
        made = cls(
            packing,
            torch.empty(codes, dtype=torch.uint8 if four else torch.int8, device="meta"),
            torch.empty(scale, dtype=packing.scales, device="meta"),
            D,
        )
        if four:  # not of the file: it is there from the beginning
            made.table = _table(packing, torch.device("cpu"))
        made.bias = layer.bias
        return made

    @property
    def packed(self) -> native.PackedWeight:
        return native.PackedWeight(
            self.in_features, self.codes, self.scale, self.table, self.packing.group
        )

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.packed, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """To another device, and to no other dtype."""
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after: Any = self._buffers[name]
            if after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def extra_repr(self) -> str:
        bits = 8 if self.packing.table is None else 4
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, bits={bits}"


def product(x: Tensor, weight: native.Weight, bias: Tensor | None) -> Tensor:
    """x (..., D), weight (O, D), bias (O) -> (..., O)."""
    if x.ndim == 2 and x.shape[0] <= native.MOST_ROWS:
        return native.linear(x, weight, bias)
    if isinstance(weight, Tensor):
        numbers = weight
    else:  # a backward pass would find others in the same memory
        numbers = weight.numbers(x.dtype, passing=not torch.is_grad_enabled())
    return nn.functional.linear(x, numbers) if bias is None else native.affine(x, numbers, bias)


def _table(packing: Packing, device: torch.device) -> Tensor | None:
    """The values of the 16 codes on `device`, None with 8 bits."""
    if packing.table is None:
        return None
    return torch.tensor(packing.table, dtype=torch.float32, device=device)
