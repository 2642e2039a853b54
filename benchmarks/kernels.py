"""Every CPU kernel beside plain torch, on the shapes of published models; one JSON line each.

Both run alternately in one process, after their results were found to agree. What is bound by
memory is given in GB/s and as a fraction of what reading alone reaches here, the rest in TFLOP/s
and as a fraction of oneDNN's matrix product, both measured in the same run (the best of several
tries, so that fractions are not flattered). Weights and caches are larger than the processor's
caches: every call takes others. Words on the command line choose kernels whose name has one.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from vidlm import native
from vidlm.native import plain

CALLS, SECONDS = 15, 1.5  # at most, for each form of a kernel
COLD = 300e6  # bytes that do not stay in a cache

Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Case:
    """A kernel and its plain form; `sets` are the arguments of one call after the other."""

    name: str
    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    sets: list[Arguments]
    moved: int = 0  # bytes that a call has to read and write, or
    flops: float = 0  # what it has to compute
    rounding: float = 2**-6  # largest difference, of the largest number


def seconds(call: Callable[..., Any], arguments: Iterator[Arguments]) -> float:
    given = next(arguments)
    began = time.perf_counter()
    call(*given)
    return time.perf_counter() - began


def peaks(tries: int = 12) -> dict[str, float]:
    """Reading memory, in bytes a second; a bfloat16 product, in operations a second."""
    memory = torch.zeros(128 * 2**20)
    square = torch.randn(2048, 2048).bfloat16()
    read = min(seconds(torch.sum, cycle([(memory,)])) for _ in range(tries))
    product = min(seconds(torch.mm, cycle([(square, square)])) for _ in range(tries))
    return {"read": memory.nbytes / read, "product": 2 * 2048**3 / product}


def agree(case: Case) -> None:
    ours, theirs = (form(*case.sets[0]) for form in (case.ours, case.theirs))
    pairs = zip(ours, theirs, strict=True) if isinstance(ours, list | tuple) else [(ours, theirs)]
    for found, wanted in pairs:
        error = (found.float() - wanted.float()).abs().max() / wanted.float().abs().max()
        assert error <= case.rounding, f"{case.name}: differs by {error:.2g} of the largest number"


def measure(case: Case, peak: dict[str, float]) -> dict[str, Any]:
    agree(case)
    sets, times = cycle(case.sets), ([], [])
    stop = time.perf_counter() + 2 * SECONDS
    while len(times[0]) < CALLS and (len(times[0]) < 3 or time.perf_counter() < stop):
        for form, kept in zip((case.ours, case.theirs), times, strict=True):
            kept.append(seconds(form, sets))
    mine, theirs = (statistics.median(column) for column in times)
    line = {
        "benchmark": "kernels",
        "kernel": case.name,
        "ours_us": round(mine * 1e6, 1),
        "plain_us": round(theirs * 1e6, 1),
        "ratio": round(mine / theirs, 3),
    }
    if case.moved:
        line["GB/s"] = round(case.moved / mine / 1e9, 1)
        line["of_read"] = round(case.moved / mine / peak["read"], 2)
    if case.flops:
        line["TFLOP/s"] = round(case.flops / mine / 1e12, 2)
        line["of_product"] = round(case.flops / mine / peak["product"], 2)
    return line


def bf16(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


def copies(size: int, make: Callable[[], Arguments]) -> list[Arguments]:
    """As many sets of arguments of `size` bytes as no cache holds."""
    return [make() for _ in range(max(2, min(60, int(COLD / size))))]


def linears() -> Iterator[Case]:
    shapes = [("qkv 896", 896, (896, 128, 128)), ("gate up 1024", 1024, (2816, 2816))]
    shapes += [("down 2816", 2816, (1024,)), ("down 4864", 4864, (896,)), ("head", 1024, (152000,))]
    for name, D, outs in shapes:
        size = 2 * D * sum(outs)
        weights = copies(
            size, lambda D=D, outs=outs: tuple(bf16(rows, D) * D**-0.5 for rows in outs)
        )
        for M in (1, 8, 32):
            x, none = bf16(M, D), [None] * len(outs)
            sets = [(x, given, none) for given in weights]
            flops = M * float(size)
            yield Case(f"linear {name}, {M} rows", native.linears, plain.linears, sets, size, flops)


def decoding() -> Iterator[Case]:
    for H, K, E in ((16, 16, 64), (14, 2, 64), (12, 2, 128)):
        for B, S in ((1, 5862), (8, 5862), (1, 64)):
            W = -(-S // 16)
            size = 4 * B * K * W * 16 * E
            tables = torch.randperm(B * W).int().view(B, W)
            lengths = torch.full((B,), S, dtype=torch.int32)
            q = bf16(B, H, E)
            caches = copies(size, lambda K=K, n=B * W * 16, E=E: (bf16(K, n, E), bf16(K, n, E)))
            sets = [(q, *cache, tables, lengths, 16) for cache in caches]
            name = f"decode attention {H}/{K} heads of {E}, {B} x {S} tokens"
            yield Case(name, native.decode_attention, plain.decode_attention, sets, size)


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    n, S, grouped = q.shape[1], k.shape[1], q.shape[2] != k.shape[2]
    mask = torch.ones(n, S, dtype=torch.bool).tril(S - n) if causal and S > n else None
    found = scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)),
        attn_mask=mask,
        is_causal=causal and mask is None,
        enable_gqa=grouped,
    )
    return found.transpose(1, 2)


def prefilling() -> Iterator[Case]:
    if native.flash(*(bf16(1, 8, 1, 64) for _ in range(3)), True) is None:
        return
    for H, K, E in ((16, 16, 64), (14, 2, 64), (12, 2, 128)):
        for n, S in ((512, 512), (512, 5862), (5862, 5862)):
            k, v = (bf16(K, S, E).transpose(0, 1)[None] for _ in range(2))
            flops = 4 * H * E * (n * S - n * (n - 1) / 2)
            name = f"causal attention {H}/{K} heads of {E}, {n} of {S} tokens"
            yield Case(name, native.flash, sdpa, [(bf16(1, n, H, E), k, v, True)], flops=flops)
    q, k, v = (bf16(8, 729, 16, 72) for _ in range(3))
    flops = 4 * 8 * 16 * 72 * 729**2
    yield Case(
        "frame attention, 8 x 729 patches", native.flash, sdpa, [(q, k, v, False)], flops=flops
    )


def rows() -> Iterator[Case]:
    T, D = 5862, 1024
    x, delta, gate, up = bf16(T, D), bf16(T, D), bf16(T, 2816), bf16(T, 2816)
    q, cos, sin, weight = bf16(T, 16, 64), bf16(T, 64), bf16(T, 64), bf16(D)
    wide, once = bf16(5832, 4304), 2 * T * D
    norm, added = (x, weight, 1e-6), (x, delta, weight, 1e-6)
    yield Case("rms_norm", native.rms_norm, plain.rms_norm, [norm], 2 * once)
    yield Case("add_rms_norm", native.add_rms_norm, plain.add_rms_norm, [added], 4 * once)
    yield Case("silu_mul", native.silu_mul, plain.silu_mul, [(gate, up)], 3 * gate.nbytes)
    yield Case("rotate", native.rotate, plain.rotate, [(q, cos, sin)], 2 * q.nbytes)
    yield Case("gelu_tanh", native.gelu_tanh, plain.gelu_tanh, [(wide,)], 2 * wide.nbytes)
    yield Case("quick_gelu", native.quick_gelu, plain.quick_gelu, [(wide,)], 2 * wide.nbytes)
    for name, D, wide in (("fc1", 1152, 4304), ("fc2", 4304, 1152), ("q", 1152, 1152)):
        given = (bf16(5832, D), bf16(wide, D) * D**-0.5, bf16(wide))
        flops = 2 * 5832 * D * wide
        yield Case(f"affine {name}", native.affine, linear, [given], flops=flops, rounding=0)


def main() -> None:
    torch.manual_seed(0)
    status = native.status()
    assert status.used, status.reason
    peak = peaks()
    found = {name: round(value / 1e9, 1) for name, value in peak.items()}
    threads = torch.get_num_threads()
    print(json.dumps({"benchmark": "kernels", "threads": threads, "peaks_G": found}))
    with torch.inference_mode():
        for cases in (linears, decoding, prefilling, rows):
            for case in cases():
                if sys.argv[1:] and not any(word in case.name for word in sys.argv[1:]):
                    continue
                print(json.dumps(measure(case, peak)), flush=True)


if __name__ == "__main__":
    main()
