"""A prompt with freed memory kept, and given back to the system: one JSON line.

llava-interleave-0.5b's decoder with random bfloat16 weights, a prompt of text as long as one with
eight frames. Each turn is a process of its own, as malloc does not forget what it was told: one
prompt that is not counted, then three. Medians over all turns of seconds to the first token and of
page faults, in turns.

kept        layers' memory by malloc (native.keep_freed), that of keys and values by the model
            (native.Spare): what vidlm does
layers      the first of the two alone
given_back  neither: glibc's own rules

`ratios` are seconds over those of given_back: below 1 is better. `peak_gib` is the most that was
resident.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from _shapes import SHAPES, tiny, write
from _sides import load, peak_bytes

from vidlm.native import memory

HOW = ("kept", "layers", "given_back")
PROMPTS = 3
Row = dict[str, float]


def turn(how: str, folder: Path, small: bool) -> list[Row]:
    command = [sys.executable, __file__, "--child", str(folder)] + ["--tiny"] * small
    command += ["--no-spare"] * (how != "kept")
    malloc = ("MALLOC_", "GLIBC_TUNABLES")  # with these vidlm leaves it as it is
    environment = {name: v for name, v in os.environ.items() if not name.startswith(malloc)}
    if how == "given_back":  # which changes nothing by itself, and keeps vidlm from doing so
        environment["MALLOC_PERTURB_"] = "0"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    rows: list[Row] = json.loads(done.stdout)
    return rows


def tell(folder: Path, small: bool) -> None:
    """The child of `turn`."""
    shape = tiny(SHAPES["llava-interleave-0.5b"]) if small else SHAPES["llava-interleave-0.5b"]
    side = load("vidlm", shape, folder, torch.bfloat16, "cpu")
    rows = []
    for seed in range(PROMPTS + 1):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        seconds = side.answer(shape.text_prompt(seed), 1).first
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        rows.append({"seconds": seconds, "page_faults": faults, "peak_gib": _gib()})
    print(json.dumps(rows[1:]))


def _gib() -> float:
    return (peak_bytes("cpu") or 0) / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="the same in small, to try the script")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--no-spare", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        if args.no_spare:
            memory.SPARE = -1
        tell(Path(args.child), args.tiny)
        return
    shape = SHAPES["llava-interleave-0.5b"]
    seen: dict[str, list[Row]] = {how: [] for how in HOW}
    with tempfile.TemporaryDirectory() as place:
        write(Path(place), tiny(shape) if args.tiny else shape, torch.bfloat16)
        for _ in range(args.runs):
            for how in HOW:
                seen[how] += turn(how, Path(place), args.tiny)
    medians = {
        how: {name: statistics.median(row[name] for row in rows) for name in rows[0]}
        for how, rows in seen.items()
    }
    base = medians["given_back"]["seconds"]
    ratios = {how: round(medians[how]["seconds"] / base, 3) for how in HOW[:-1]}
    line = {"benchmark": "kept_memory", "runs": args.runs, **medians, "ratios": ratios}
    print(json.dumps(line))


if __name__ == "__main__":
    main()
