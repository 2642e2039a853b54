"""How a kernel is called: whether it can take these tensors, with how many threads, and what its
answer means."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor, nn

from vidlm.native.library import library

TYPES = {torch.float32: 0, torch.bfloat16: 1}  # as in lanes.h
OUTSIDE, NO_MEMORY = -1, 0  # as in jobs.h
# Other classes of tensors keep their numbers elsewhere: their data_ptr() may well be 0.
OWN = (Tensor, nn.Parameter)

# A thread is worth waking for this many bytes to be read: 128 KB are 10 us of one core, and waking
# costs 2 to 5, or thousands where the cores are busy with something else.
SHARE = 128 * 1024


def kernels(x: Tensor, *others: Tensor) -> ctypes.CDLL | None:
    """The library, where it can take `x` and `others`, which must be rows without gaps."""
    if not x.is_contiguous() or not all(y.is_contiguous() for y in others):
        return None
    return computes(x, *others)


def computes(x: Tensor, *others: Tensor) -> ctypes.CDLL | None:
    """The library if it knows these types and neither autograd, autocast nor torch.compile is
    active."""
    if type(x) is not Tensor or x.dtype not in TYPES or not x.is_cpu:
        return None
    gradients = torch.is_grad_enabled()
    if gradients and x.requires_grad:
        return None
    for y in others:
        if (
            type(y) not in OWN
            or not y.is_cpu
            or y.dtype != x.dtype
            or (gradients and y.requires_grad)
        ):
            return None
    if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return None
    return library()


def threads(size: int) -> int:
    """Threads for work that reads so many bytes."""
    return max(1, min(torch.get_num_threads(), size // SHARE))


def pack(*values: int) -> ctypes.Array[ctypes.c_longlong]:
    """A C struct of pointers and int64, in its order."""
    return (ctypes.c_longlong * len(values))(*values)


def checked(answer: int, what: str) -> None:
    """Raise what a kernel's answer says; see jobs.h."""
    if answer == OUTSIDE:
        raise IndexError(f"{what} is out of bounds; nothing was computed")
    if answer == NO_MEMORY:
        raise MemoryError("no memory to dequantize a weight into")
