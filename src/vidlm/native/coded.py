"""Keys and values in eight bits: codes, and a number for each row of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CODED_MOST = 512  # numbers in a row that the kernels code; CODED_MOST in jobs.h
SCALE_BYTES = 4  # of a row: float32


@dataclass(frozen=True)
class Coded:
    """Keys or values (K, N, E) as `codes` (K, N, E) int8 times `scales` (K, N) float32: one for
    each token and head, so that a token is stored once and never changed by those that follow.

    A row's largest number becomes 127 or -127. Scales are float32 and not half as wide: no number
    is then changed by its scale, and of a row of 64 they are 4 bytes of 68.
    """

    codes: Tensor
    scales: Tensor

    @classmethod
    def empty(
        cls,
        shape: tuple[int, int, int],
        device: torch.device,
        empty: Callable[..., Tensor] = torch.empty,
    ) -> Coded:
        """Holding anything, in memory that `empty` finds, which is called as torch's."""
        codes = empty(shape, dtype=torch.int8, device=device)
        return cls(codes, empty(shape[:2], dtype=torch.float32, device=device))

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def sound(self) -> bool:
        """Whether codes and scales are what they should be, and belong together."""
        types = self.codes.dtype == torch.int8 and self.scales.dtype == torch.float32
        return types and self.codes.ndim == 3 and self.scales.shape == self.codes.shape[:2]

    @property
    def readable(self) -> bool:
        """Whether the kernels can read and write it."""
        both = (self.codes, self.scales)
        plain = all(type(x) is Tensor and x.is_cpu and x.is_contiguous() for x in both)
        return plain and self.sound and self.shape[2] <= CODED_MOST


Cache = Tensor | Coded  # keys or values (K, N, E) as they are stored


def tensors_of(cache: Cache) -> tuple[Tensor, ...]:
    """What a cache consists of; slots are each one's second axis."""
    return (cache.codes, cache.scales) if isinstance(cache, Coded) else (cache,)


def fields(cache: Cache) -> tuple[int, int]:
    """Addresses of numbers or codes, and of scales or nothing."""
    if isinstance(cache, Coded):
        return cache.codes.data_ptr(), cache.scales.data_ptr()
    return cache.data_ptr(), 0
