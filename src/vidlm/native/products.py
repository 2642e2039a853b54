"""Products of rows with weights, by the kernels where rows are few; see ops.py."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from vidlm.native import plain
from vidlm.native.calls import TYPES, checked, computes, kernels, pack, threads
from vidlm.native.packed import DENSE, PackedWeight

MOST_ROWS = 32  # from here on oneDNN's matrix product is faster

Weight = Tensor | PackedWeight  # (O, D)


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x (M, D), weight (O, D), bias (O) -> (M, O)."""
    return linears(x, (weight,), (bias,))[0]


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (..., D) of many rows, weight (O, D), bias (O) -> (..., O): functional.linear, bit for bit.

    That copies the bias into every row of the result before it multiplies; oneDNN, asked itself,
    adds it to the sums while it has them.
    """
    fits = weight.ndim == 2 and (x.shape[-1:], bias.shape) == (weight.shape[1:], weight.shape[:1])
    takes = x.dtype == torch.bfloat16 and fits and torch.backends.mkldnn.enabled
    if takes and computes(x, weight, bias):
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return found
    return functional.linear(x, weight, bias)


def linears(x: Tensor, weights: Sequence[Weight], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """The same x (M, D) through several weights (O, D): (M, O) of each."""
    if x.ndim != 2 or not 0 < x.shape[0] <= MOST_ROWS:
        return plain.linears(x, weights, biases)
    M, D = x.shape
    given = [bias for bias in biases if bias is not None]
    lib = takes(x, weights, *given)
    if lib is None or any(len(w.shape) != 2 or w.shape[1] != D for w in weights):
        return plain.linears(x, weights, biases)
    outs, parts, size = [], [], 0
    for weight, bias in zip(weights, biases, strict=True):
        O = weight.shape[0]  # noqa: E741  rows of the weight, as in torch's documentation
        if bias is not None and bias.shape != (O,):
            return plain.linears(x, weights, biases)
        out = x.new_empty(M, O)
        outs.append(out)
        parts += [*fields(weight), 0 if bias is None else bias.data_ptr(), out.data_ptr(), O]
        size += weight.nbytes
    job = pack(*parts)
    x_type = TYPES[x.dtype]
    done = lib.vidlm_linears(job, len(outs), x.data_ptr(), M, D, x_type, threads(size))
    checked(done, "a row")
    return outs


def takes(x: Tensor, weights: Sequence[Weight], *others: Tensor) -> ctypes.CDLL | None:
    """The library, where it can take x, the weights and all others."""
    plain_ones = [w for w in weights if isinstance(w, Tensor)]
    if not all(w.readable() for w in weights if isinstance(w, PackedWeight)):
        return None
    return kernels(x, *plain_ones, *others)


def fields(weight: Weight) -> tuple[int, ...]:
    """In the order of Weight in jobs.h."""
    if isinstance(weight, PackedWeight):
        return weight.fields
    return weight.data_ptr(), DENSE, 0, 0, 0, 0
