"""Norms and activations by the kernels: one pass over memory, shared by the threads.

As in ops.py, each function takes any tensors and gives what its form in plain.py gives.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vidlm.native import plain
from vidlm.native.calls import TYPES, kernels, pack, threads

GELU_TANH, QUICK_GELU, SILU_MUL = range(3)  # as in jobs.h


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., D) over the root of its mean square, times weight (D)."""
    lib = kernels(x, weight)
    if lib is None or weight.shape != x.shape[-1:] or not x.numel():
        return plain.rms_norm(x, weight, eps)
    out = torch.empty_like(x)
    D = x.shape[-1]
    job = pack(x.data_ptr(), 0, weight.data_ptr(), 0, out.data_ptr(), x.numel() // D, D)
    lib.vidlm_rms_norm(job, eps, TYPES[x.dtype], threads(2 * x.numel() * x.element_size()))
    return out


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + delta, and its rms_norm."""
    lib = kernels(x, delta, weight)
    if lib is None or weight.shape != x.shape[-1:] or delta.shape != x.shape or not x.numel():
        return plain.add_rms_norm(x, delta, weight, eps)
    both, out = torch.empty_like(x), torch.empty_like(x)
    D = x.shape[-1]
    pointers = (t.data_ptr() for t in (x, delta, weight, both, out))
    job = pack(*pointers, x.numel() // D, D)
    lib.vidlm_rms_norm(job, eps, TYPES[x.dtype], threads(4 * x.numel() * x.element_size()))
    return both, out


def silu_mul(gate: Tensor, up: Tensor, inplace: bool = False) -> Tensor:
    """silu(gate) * up; `inplace` where nobody else needs gate."""
    lib = kernels(gate, up)
    if lib is None or gate.shape != up.shape:
        return plain.silu_mul(gate, up)
    out = gate if inplace else torch.empty_like(gate)
    size = 3 * gate.numel() * gate.element_size()
    lib.vidlm_activation(
        SILU_MUL, gate.data_ptr(), up.data_ptr(), out.data_ptr(), gate.numel(), TYPES[gate.dtype],
        threads(size),
    )  # fmt: skip
    return out


def gelu_tanh(x: Tensor, inplace: bool = False) -> Tensor:
    """GELU with the tanh approximation; `inplace` where nobody else needs x."""
    found = _activation(GELU_TANH, x, inplace)
    return plain.gelu_tanh(x) if found is None else found


def quick_gelu(x: Tensor, inplace: bool = False) -> Tensor:
    """x * sigmoid(1.702 x); `inplace` where nobody else needs x."""
    found = _activation(QUICK_GELU, x, inplace)
    return plain.quick_gelu(x) if found is None else found


def _activation(kind: int, x: Tensor, inplace: bool) -> Tensor | None:
    lib = kernels(x)
    if lib is None:
        return None
    out = x if inplace else torch.empty_like(x)
    size = 2 * x.numel() * x.element_size()
    at = x.data_ptr()
    lib.vidlm_activation(kind, at, 0, out.data_ptr(), x.numel(), TYPES[x.dtype], threads(size))
    return out
