"""Parts of a network that run on a device of their own, and weights that wait on another.

A placed part is called as ever: what it is given comes to its device first, and so do its weights
where they are kept elsewhere, for the time of the call. A network without placed parts pays
nothing for them.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from vidlm.nn.step import Step

Rope = tuple[Tensor, Tensor]


class Placed:
    """The forward of `part` on `device`; its result goes `back` to another, if one is named.

    It takes the place of the part's own `forward`, so that hooks see what they always see.
    """

    def __init__(self, part: nn.Module, device: torch.device, back: torch.device | None) -> None:
        self.part, self.device, self.back = part, device, back

    def __call__(self, x: Tensor, *shared: Any) -> Tensor:
        """x (T, D); a decoder's layer is given rope and Step besides, as all layers are."""
        part = self.part if _home(self.part) == self.device else visiting(self.part, self.device)
        there = _brought(self.device, *shared) if shared else ()
        made: Tensor = type(part).forward(part, x.to(self.device), *there)
        return made if self.back is None else made.to(self.back)


def place(part: nn.Module, device: torch.device, back: torch.device | None = None) -> None:
    """Let a part run on a device, wherever its weights are and what it is given comes from."""
    part.forward = Placed(part, device, back)


def device_of(part: nn.Module) -> torch.device:
    """Where a part runs."""
    forward = part.__dict__.get("forward")
    return forward.device if isinstance(forward, Placed) else _home(part)


def visiting(part: nn.Module, device: torch.device) -> nn.Module:
    """The same part with copies of its weights on this device.

    The part itself stays as it is, so that calls of several threads do not meet, and gradients find
    their way to where the weights are kept.
    """
    made = object.__new__(type(part))
    made.__dict__.update(
        part.__dict__,
        _parameters={n: None if p is None else p.to(device) for n, p in part._parameters.items()},
        _buffers={n: None if b is None else b.to(device) for n, b in part._buffers.items()},
        _modules={n: None if m is None else visiting(m, device) for n, m in part._modules.items()},
    )
    return made


def _home(part: nn.Module) -> torch.device:
    """Where its weights are kept; those of fewer bits may be buffers."""
    return next(chain(part.parameters(), part.buffers())).device


def _brought(device: torch.device, rope: Rope, step: Step) -> tuple[Rope, Step]:
    """What all layers are given, on this device: copied once a step, not once a layer."""
    if step.positions.device == device:
        return rope, step
    known = step.copies.get(device)
    if known is None or known[0] is not rope:
        cos, sin = rope
        known = rope, ((cos.to(device), sin.to(device)), step.to(device))
        step.copies[device] = known
    brought: tuple[Rope, Step] = known[1]
    return brought
