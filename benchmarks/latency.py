"""One question about one video, beside transformers, llama.cpp and OpenVINO: one JSON line a shape.

Published sizes with random bfloat16 weights, batch 1, greedy, no end. vidlm and transformers hold
the same weights in one process, are asked the same questions and take turns; every run has a video
and a question of its own. transformers runs with both of its attentions, sdpa and eager; a ratio
takes the better of the two. Where the scores of eager attention over a whole prompt would not fit
into memory, or with --eager decode, sdpa does the prompt and eager only the tokens after it.
What each turn measured goes to stderr as it comes.

vision_seconds          features of the video, as the decoder takes them
prefill_seconds         to the first token of a prompt that is as long, all text
first_token_seconds     from the call to the first token
decode_tokens_per_second  of the tokens after it
whole_seconds           the whole call
peak_gib                the most memory that a process of its own held, above its imports

Ratios are ours over theirs: below 1 is better for seconds and memory, above 1 for tokens a second.
llama.cpp and OpenVINO (see peers/) run the same decoder on a text prompt of the same ids, OpenVINO
the vision tower too; each needs a Python that can import it: this one, or one named by an option.
Outputs are compared first; if they disagree beyond rounding, the script stops.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _peers import Peer, PeerFailed, add_peers, found_peers
from _shapes import SHAPES, Shape, tiny, write
from _sides import LIBRARIES, Side, agree, free_bytes, imported, load, peak_bytes

Figures = dict[str, float]
RATES = ("decode_tokens_per_second",)
TOLERANCE = {torch.bfloat16: 0.05, torch.float32: 1e-3}


def ours(side: Side, tokens: int, run: int) -> Figures:
    return {"vision_seconds": side.features(3 * run), **answers(side, tokens, run)}


def sdpa(side: Side, tokens: int, run: int) -> Figures:
    side.attention("sdpa")
    return ours(side, tokens, run)


def eager(side: Side, tokens: int, run: int) -> Figures:
    side.attention("eager")
    return ours(side, tokens, run)


def eager_after_prefill(side: Side, tokens: int, run: int) -> Figures:
    """Its vision tower and its decoding; the prompt's attention is sdpa's, and not counted."""
    side.attention("eager")
    seen = {"vision_seconds": side.features(3 * run)}
    side.attention("sdpa")
    prompt = side.shape.prompt(3 * run + 2)
    answered = side.answer(prompt, tokens, after_first=lambda: side.attention("eager"))
    return {**seen, "decode_tokens_per_second": answered.rate}


def answers(side: Side, tokens: int, run: int) -> Figures:
    prefill = side.prefill(3 * run + 1)
    answered = side.answer(side.shape.prompt(3 * run + 2), tokens)
    return {
        "prefill_seconds": prefill,
        "first_token_seconds": answered.first,
        "decode_tokens_per_second": answered.rate,
        "whole_seconds": answered.whole,
    }


def eager_fits(shape: Shape, device: str) -> bool:
    """Scores of one layer: in bfloat16 before and after the mask, in float32 and as weights."""
    scores = shape.text["num_attention_heads"] * shape.prompt_tokens**2
    return 14 * scores < 0.8 * free_bytes(device)


def peak(library: str, name: str, folder: Path, args: argparse.Namespace) -> float | None:
    """Of a process that loads the model and answers one question."""
    command = [sys.executable, __file__, "--peak-of", library, str(folder), "--only", name]
    command += ["--device", args.device, "--tokens", str(args.tokens)]
    command += ["--tiny"] if args.tiny else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{library} on {name}: {done.stderr[-2000:]}")
    found = json.loads(done.stdout)
    return found and found / 2**30


def tell_peak(args: argparse.Namespace) -> None:
    """The child of `peak`."""
    library, folder = args.peak_of
    (name,), dtype = args.only, number_type(args)
    imported(library)
    before = 0 if args.device.startswith("cuda") else peak_bytes(args.device)
    shape = chosen(name, args)
    side = load(library, shape, Path(folder), dtype, args.device)
    side.answer(shape.prompt(1), args.tokens)
    after = peak_bytes(args.device)
    print(json.dumps(None if after is None or before is None else after - before))


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    shape, dtype = chosen(name, args), number_type(args)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write(folder, shape, dtype)
        peers, absent = found_peers(args)
        peaks = {library: peak(library, name, folder, args) for library in LIBRARIES}
        one, other = (load(lib, shape, folder, dtype, args.device) for lib in LIBRARIES)
        agreement: dict[str, Any] = {
            "transformers": vars(agree(one, other, args.tokens, TOLERANCE[dtype]))
        }
        for peer in peers:
            try:
                agreement[peer.name] = ready(peer, folder, one, TOLERANCE[dtype])
            except PeerFailed as error:
                absent[peer.name] = str(error)
        whole_eager = args.eager == "whole" and eager_fits(shape, args.device)
        with_eager = eager if whole_eager else eager_after_prefill
        turns: dict[str, Callable[[int], Figures]] = {
            "vidlm": partial(ours, one, args.tokens),
            "transformers_sdpa": partial(sdpa, other, args.tokens),
            "transformers_eager": partial(with_eager, other, args.tokens),
            **{
                p.name: partial(p.run, shape, args.tokens, dtype)
                for p in peers
                if p.name not in absent
            },
        }
        seen = alternate(turns, args.runs, absent)
    medians = {who: _medians(figures) for who, figures in seen.items()}
    for library, figure in zip(("vidlm", "transformers_sdpa"), peaks.values(), strict=True):
        medians[library] |= {} if figure is None else {"peak_gib": figure}
    return {
        "benchmark": "latency",
        "shape": name,
        **about(shape, args),
        "eager_prefill": whole_eager,
        "absent": absent,
        "agreement": agreement,
        **{who: rounded(figures) for who, figures in medians.items()},
        "spread": {who: _spreads(figures) for who, figures in seen.items()},
        "ratios": ratios(medians),
    }


def ready(peer: Peer, folder: Path, ours: Side, tolerance: float) -> dict[str, Any]:
    """Translates the checkpoint for a peer, and tells how far the two agree."""
    peer.prepare(folder)
    return peer.agree(ours, tolerance)


def alternate(
    turns: Mapping[str, Callable[[int], Figures]], runs: int, absent: dict[str, str]
) -> dict[str, list[Figures]]:
    """Everybody once a run, each run beginning with another. A peer that fails is left out."""
    seen: dict[str, list[Figures]] = {who: [] for who in turns}
    for run in range(1, runs + 1):
        order = list(turns)
        order = order[run % len(order) :] + order[: run % len(order)]
        for who in order:
            if who not in absent:
                try:
                    seen[who].append(turns[who](run))
                    print(f"run {run}, {who}: {rounded(seen[who][-1])}", file=sys.stderr)
                except PeerFailed as error:
                    absent[who] = str(error)
    return {who: figures for who, figures in seen.items() if who not in absent}


def ratios(medians: Mapping[str, Figures]) -> dict[str, Figures]:
    """Ours over each peer's, of transformers' two attentions the better."""
    peers = {name.partition("_")[0] for name in medians} - {"vidlm"}
    table = {}
    for peer in sorted(peers):
        rivals = [figures for name, figures in medians.items() if name.partition("_")[0] == peer]
        row = {}
        for figure, value in medians["vidlm"].items():
            theirs = [each[figure] for each in rivals if figure in each]
            if theirs:
                row[figure] = value / (max if figure in RATES else min)(theirs)
        table[peer] = rounded(row)
    return table


def _medians(figures: list[Figures]) -> Figures:
    return {name: statistics.median(each[name] for each in figures) for name in figures[0]}


def _spreads(figures: list[Figures]) -> Figures:
    """How far apart a figure's runs lie, relative to their median."""
    medians = _medians(figures)
    values = {name: [each[name] for each in figures] for name in medians}
    return rounded({name: (max(v) - min(v)) / medians[name] for name, v in values.items()})


def rounded(figures: Figures) -> Figures:
    return {name: float(f"{value:.4g}") for name, value in figures.items()}


def about(shape: Shape, args: argparse.Namespace) -> dict[str, Any]:
    from vidlm.cli.machine import machine

    return {
        "machine": machine(args.device),
        "tiny": args.tiny,
        "dtype": str(number_type(args)).removeprefix("torch."),
        "frames": shape.frames,
        "prompt_tokens": shape.prompt_tokens,
        "new_tokens": args.tokens,
        "runs": args.runs,
    }


def chosen(name: str, args: argparse.Namespace) -> Shape:
    return tiny(SHAPES[name]) if args.tiny else SHAPES[name]


def number_type(args: argparse.Namespace) -> torch.dtype:
    """Tiny networks are compared in float32, where answers are equal."""
    return torch.float32 if args.tiny else torch.bfloat16


def options(parser: argparse.ArgumentParser) -> None:
    """What this script and throughput.py are both told."""
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a small network: does it all work?")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options(parser)
    parser.add_argument("--only", choices=list(SHAPES), nargs="+", default=list(SHAPES))
    add_peers(parser)
    parser.add_argument(
        "--eager",
        choices=["whole", "decode"],
        default="whole",
        help="whether transformers' eager attention also does the prompt, which takes minutes",
    )
    parser.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        tell_peak(args)
        return
    for name in args.only:
        print(json.dumps(measure(name, args)), flush=True)


if __name__ == "__main__":
    main()
