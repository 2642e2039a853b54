"""Weights in large pages beside weights in torch's memory: one JSON line a kind of weights.

The linear layers of a decoder of 24 layers for one token, by the kernels that decoding uses. The
weights are those of one model, written twice; both are read in turns in one process, and give the
same numbers. Pages of the size that was asked for are counted, so that a system that has none left
is not mistaken for one where they are no use.

seconds     medians of one token's layers; `ratio` is large pages' over torch's: below 1 is better
gb_per_second   of weights read, in large pages
in_large_pages  the part of the copied weights' bytes that the system did put there
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidlm import native
from vidlm.native import LargePages, PackedWeight, Weight
from vidlm.nn.packed import Packing
from vidlm.quant.packing import pack, packings

LAYERS, D, WIDE = 24, 1024, 2816
SHAPES = [(D, D)] * 4 + [(WIDE, D)] * 2 + [(D, WIDE)]
KINDS = ("bf16", "int8", "int4", "nf4")


def weights(packing: Packing | None) -> list[Weight]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(s, generator=generator).bfloat16() for s in SHAPES] * LAYERS
    return [w.clone() if packing is None else pack(w, packing).packed for w in made]


def moved(weight: Weight, copy: Callable[[Tensor], Tensor]) -> Weight:
    if isinstance(weight, Tensor):
        return copy(weight)
    w = weight
    return PackedWeight(w.width, copy(w.codes), copy(w.scale), w.table, w.group)


def large_bytes() -> int:
    """Of this process, in large pages."""
    found = re.findall(r"AnonHugePages:\s+(\d+) kB", Path("/proc/self/smaps").read_text())
    return sum(map(int, found)) << 10


def token(given: list[Weight], rows: dict[int, Tensor]) -> list[Tensor]:
    return [native.linear(rows[weight.shape[1]], weight) for weight in given]


def timed(given: list[Weight], rows: dict[int, Tensor]) -> float:
    began = time.perf_counter()
    token(given, rows)
    return time.perf_counter() - began


def measure(kind: str, runs: int) -> dict[str, Any]:
    usual = weights(None if kind == "bf16" else packings()[kind])
    pages, before = LargePages(), large_bytes()
    large = [moved(w, lambda x: pages.empty(x.shape, x.dtype).copy_(x)) for w in usual]
    size = sum(w.nbytes for w in large)
    share = (large_bytes() - before) / size
    rows = {n: torch.randn(1, n).bfloat16() for n in (D, WIDE)}
    for a, b in zip(token(usual, rows), token(large, rows), strict=True):
        assert torch.equal(a, b), "the copies give other numbers"
    pairs = [(timed(usual, rows), timed(large, rows)) for _ in range(runs)]
    theirs, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {
        "benchmark": "large_pages",
        "weights": kind,
        "threads": torch.get_num_threads(),
        "in_large_pages": round(min(share, 1), 3),
        "seconds": round(ours, 5),
        "torch_seconds": round(theirs, 5),
        "gb_per_second": round(size / ours / 1e9, 2),
        "ratio": round(ours / theirs, 3),
    }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", choices=KINDS, nargs="+", default=list(KINDS))
    parser.add_argument("--runs", type=int, default=51)
    args = parser.parse_args()
    for kind in args.kinds:
        print(json.dumps(measure(kind, args.runs)), flush=True)


if __name__ == "__main__":
    main()
