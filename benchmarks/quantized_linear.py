"""Linear layers in 8 and 4 bits, vidlm's own and those of every library that has them, beside our
bfloat16.

    python benchmarks/quantized_linear.py --shapes 1024x2816 --rows 1 512 [--only int8 bf16 ...]

One JSON line for each shape (in x out) and number of rows. All forms take turns in one process,
after each was found to give what its own weights, dequantised in float32, give. A turn is one call
that is not timed (another form's threads may still be awake) and some that are, each with another
copy of the weights; of few rows, as many copies as no cache holds. `speed` is bfloat16's time over
the form's, `error` the relative error (root of the squares) against the weights before they were
quantized, `bytes` what a weight takes; `GB/s` count these alone. Words after --only choose forms
whose name has one. `absent` libraries cannot be imported; forms `refused` say why.
The first line names the machine, and what reading memory and a bfloat16 product reach on it.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import torch
from _linears import BASE, Call, Form, Packed, forms, importable
from kernels import COLD, bf16, peaks, seconds
from torch import Tensor

from vidlm import native
from vidlm.cli.machine import machine

NAME = "quantized_linear"
SHAPES = ("1024x2816", "4304x1152", "1536x8960")  # of a 0.5B, SigLIP, a 2B
TURNS, SECONDS = 7, 0.25  # turns, and how long a form is timed in all of them together
PATIENCE = 2.0  # seconds; a form that takes longer for one call is left out
MOST_COPIES = 1000  # of a weight; published ones need fewer


@dataclass
class Runner:
    """A form of one shape, and the calls that differ in the copy of the weights they take."""

    name: str
    packed: Packed
    error: float
    calls: Iterator[Call]
    times: list[float] = field(default_factory=list)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted).norm() / wanted.norm())


def runner(form: Form, weight: Tensor, x: Tensor, copies: int | None) -> Runner:
    """Raises where the form refuses, or gives something else than its own weights."""
    packed = form.pack(weight)
    began = time.perf_counter()
    found = packed.again()(x)
    if time.perf_counter() - began > PATIENCE:
        raise ValueError(f"takes more than {PATIENCE:g} s for a call")
    off = relative(found, x.float() @ packed.weight.t())
    if not off <= packed.allowed:
        raise ValueError(f"gives something else than its own weights: {off:.2g} away")
    number = copies or max(2, min(MOST_COPIES, int(COLD / packed.size)))
    calls = cycle([packed.again() for _ in range(number)])
    return Runner(form.name, packed, relative(found, x.float() @ weight.float().t()), calls)


def turn(one: Runner, x: Tensor) -> None:
    next(one.calls)(x)
    spent = 0.0
    while spent < SECONDS / TURNS:
        one.times.append(seconds(next(one.calls), cycle([(x,)])))
        spent += one.times[-1]


def figures(one: Runner, ours: float, numbers: int) -> dict[str, float]:
    took, size = statistics.median(one.times), one.packed.size
    found = {"us": round(took * 1e6, 1), "speed": round(ours / took, 2)}
    found["GB/s"] = round(size / took / 1e9, 1)
    return {**found, "bytes": round(size / numbers, 3), "error": round(one.error, 4)}


def measure(chosen: list[Form], D: int, out: int, rows: int) -> dict[str, Any]:
    """Of forms that BASE is the first of."""
    weight, x, refused, runners = bf16(out, D) * D**-0.5, bf16(rows, D), {}, []
    for form in chosen:
        try:
            runners.append(runner(form, weight, x, None if rows <= native.MOST_ROWS else 3))
        except (RuntimeError, ValueError, AssertionError, ImportError) as error:
            refused[form.name] = str(error).split("\n")[0][:120]
    if BASE in refused:
        raise SystemExit(f"{BASE}: {refused[BASE]}")
    order = random.Random(0)
    for _ in range(TURNS):
        for one in order.sample(runners, len(runners)):  # nobody always follows the same one
            turn(one, x)
    ours = statistics.median(runners[0].times)
    found = {one.name: figures(one, ours, weight.numel()) for one in runners}
    return {"forms": found, "refused": refused}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="INxOUT")
    parser.add_argument("--rows", nargs="+", type=int, default=(1, 8, 512, 2048))
    parser.add_argument("--only", nargs="+", default=(), metavar="WORD")
    given = parser.parse_args()
    torch.manual_seed(0)
    wanted = [f for f in forms() if not given.only or any(word in f.name for word in given.only)]
    chosen = [f for f in wanted if importable(f)]
    if BASE not in (form.name for form in chosen):
        chosen.insert(0, next(forms()))
    absent = sorted({f.needs for f in wanted if f not in chosen})
    peak = {name: round(value / 1e9, 1) for name, value in peaks().items()}
    about = {"machine": machine(), "peaks_G": peak, "absent": absent}
    print(json.dumps({"benchmark": NAME, **about}), flush=True)
    with torch.inference_mode():
        for shape in given.shapes:
            D, out = (int(number) for number in shape.split("x"))
            for rows in given.rows:
                found = {"in": D, "out": out, "rows": rows, **measure(chosen, D, out, rows)}
                print(json.dumps({"benchmark": NAME, **found}), flush=True)


if __name__ == "__main__":
    main()
