"""Tensors of the host on their way to the device that computes with them."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(x: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """x on `device`, as `dtype` where one is named.

    What the host has for a GPU goes through pinned memory, which the GPU reads while the host goes
    on. Nobody has to keep it: torch's allocator of pinned memory notes each copy that does not
    block (ATen/native/cuda/Copy.cu) and hands the memory out again when the last one is done.
    """
    dtype = dtype or x.dtype
    if device.type != "cuda" or not x.is_cpu:
        return x.to(device, dtype)
    return _pinned(x, dtype).to(device, non_blocking=True)


def refill(buffer: Tensor, x: Tensor) -> None:
    """Put x of the host into a buffer on any device, on the same way."""
    buffer.copy_(_pinned(x, x.dtype) if buffer.is_cuda else x, non_blocking=True)


def _pinned(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy, rounded on the way: torch would round what is pinned into memory that is not."""
    return torch.empty(x.shape, dtype=dtype, pin_memory=True).copy_(x)
