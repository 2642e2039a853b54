"""A table of vectors, one for each token or position."""

from __future__ import annotations

from torch import nn


class Embedding(nn.Embedding):
    """nn.Embedding without random numbers on the meta device, where every model to load is built.

    torch imports its compiler to draw none there: a second and 80 MB of each start.
    """

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()
