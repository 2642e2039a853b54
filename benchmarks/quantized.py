"""Weights in fewer bits beside bfloat16, and beside llama.cpp's: one JSON line a shape.

Published sizes with random weights, batch 1, greedy. All kinds are in one process and take turns;
llama.cpp runs the same decoder in Q8_0 and Q4_0, a process a turn. Each turn has new prompts.

weights_gib             parameters and codes
load_peak_gib           the most memory that a process of its own held while it loaded the model,
                        above its imports; `load_limit_gib` is 0.65 (int8) or 0.45 (int4) times the
                        bfloat16 weights plus 300 MB
prefill_seconds         to the first token of a prompt as long as a video's, all text
decode_tokens_per_second, decode_short   of the tokens after it, and after a prompt of 30

`over_bf16` is bfloat16's seconds over a kind's, and a kind's tokens a second over bfloat16's: above
1 is better; `over_q8_0` and `over_q4_0` the same against llama.cpp.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from _peers import Peer, PeerFailed, add_peers, found_peers
from _shapes import SHAPES, Inputs, Shape, tiny, write
from _sides import Side, load, peak_bytes

from vidlm.quant import PRESETS, preset

BF16 = "bf16"
SHORT = 30  # tokens
MORE = 4  # times as many tokens after the short prompt, which take less time
LIMITS = {"int8": 0.65, "int4": 0.45, "nf4": 0.45}
RIVALS = {"int8": "q8_0", "int4": "q4_0", "nf4": "q4_0"}
Figures = dict[str, float]


def loaded(kind: str, shape: Shape, folder: Path) -> Side:
    if kind == BF16:
        return load("vidlm", shape, folder, torch.bfloat16, "cpu")
    import vidlm

    model = getattr(vidlm, f"{shape.family}ForConditionalGeneration").from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=preset(kind)
    )
    return Side("vidlm", model, shape)


def weights(model: torch.nn.Module) -> int:
    tensors = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


def short(shape: Shape, seed: int) -> Inputs:
    return {name: value[:, :SHORT] for name, value in shape.text_prompt(seed).items()}


def ours(side: Side, tokens: int, run: int) -> Figures:
    answered = side.answer(side.shape.text_prompt(2 * run), tokens)
    quick = side.answer(short(side.shape, 2 * run + 1), MORE * tokens)
    return {
        "prefill_seconds": answered.first,
        "decode_tokens_per_second": answered.rate,
        "decode_short": quick.rate,
    }


def theirs(peer: Peer, shape: Shape, tokens: int, run: int) -> Figures:
    seen = peer.answer(shape.text_prompt(2 * run), tokens, torch.bfloat16)
    quick = peer.answer(short(shape, 2 * run + 1), MORE * tokens, torch.bfloat16)
    return {
        "prefill_seconds": seen["prefill_seconds"],
        "decode_tokens_per_second": seen["decode_tokens_per_second"],
        "decode_short": quick["decode_tokens_per_second"],
    }


def load_peak(kind: str, name: str, folder: Path, small: bool) -> int:
    command = [sys.executable, __file__, "--peak-of", kind, str(folder), "--only", name]
    command += ["--tiny"] if small else []
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout)


def tell_peak(kind: str, folder: Path, shape: Shape) -> None:
    """The child of `load_peak`."""
    import vidlm.hf  # noqa: F401  (imports do not count)

    before = peak_bytes("cpu")
    model = loaded(kind, shape, folder).model
    assert sum(float(p.detach().flatten()[0]) for p in model.parameters()) is not None
    after = peak_bytes("cpu")
    assert before is not None
    assert after is not None
    print(after - before)


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    shape = tiny(SHAPES[name]) if args.tiny else SHAPES[name]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write(folder, shape, torch.bfloat16)
        kinds = (BF16, *args.kinds)
        peaks = {kind: load_peak(kind, name, folder, args.tiny) for kind in kinds}
        sides = {kind: loaded(kind, shape, folder) for kind in kinds}
        peers, absent = rivals(folder, args)
        seen: dict[str, list[Figures]] = {who: [] for who in (*sides, *peers)}
        for run in range(args.runs + 1):  # the first is not counted
            for kind, side in sides.items():
                seen[kind].append(told(kind, ours(side, args.tokens, run)))
            for kind, peer in peers.items():
                seen[kind].append(told(kind, theirs(peer, shape, args.tokens, run)))
        whole = weights(sides[BF16].model)
        memory = {
            kind: memory_of(kind, weights(s.model), peaks, whole) for kind, s in sides.items()
        }
    medians = {who: _medians(figures[1:]) for who, figures in seen.items()}
    return {
        "benchmark": "quantized",
        "shape": name,
        "prompt_tokens": shape.prompt_tokens,
        "threads": torch.get_num_threads(),
        "runs": args.runs,
        "tokens": args.tokens,
        "absent": absent,
        **{who: {**memory.get(who, {}), **rounded(figures)} for who, figures in medians.items()},
        "ratios": {kind: ratios(kind, medians) for kind in args.kinds},
    }


def rivals(folder: Path, args: argparse.Namespace) -> tuple[dict[str, Peer], dict[str, str]]:
    peers, absent = found_peers(args)
    absent.pop("openvino", None)
    found: dict[str, Peer] = {}
    for peer in peers:
        if peer.name != "llamacpp":
            continue
        try:
            peer.prepare(folder)
            found = {kind: peer.quantized(kind) for kind in {RIVALS[k] for k in args.kinds}}
        except PeerFailed as error:
            absent[peer.name] = str(error)
    return found, absent


def memory_of(kind: str, size: int, peaks: dict[str, int], whole: int) -> Figures:
    limit = {} if kind == BF16 else {"load_limit_gib": LIMITS[kind] * whole + 300e6}
    figures = {"weights_gib": size, "load_peak_gib": peaks[kind], **limit}
    return {name: round(value / 2**30, 3) for name, value in figures.items()}


def told(who: str, figures: Figures) -> Figures:
    print(f"{who}: {rounded(figures)}", file=sys.stderr, flush=True)
    return figures


def ratios(kind: str, medians: dict[str, Figures]) -> dict[str, Figures]:
    others = {"over_bf16": BF16, f"over_{RIVALS[kind]}": RIVALS[kind]}
    return {
        name: {
            what: round(other / mine if what.endswith("seconds") else mine / other, 3)
            for what, mine in medians[kind].items()
            if (other := medians[who][what])
        }
        for name, who in others.items()
        if who in medians
    }


def _medians(figures: list[Figures]) -> Figures:
    return {name: statistics.median(f[name] for f in figures) for name in figures[0]}


def rounded(figures: Figures) -> Figures:
    return {name: round(value, 3) for name, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=list(SHAPES), nargs="+", default=list(SHAPES))
    parser.add_argument("--kinds", choices=PRESETS, nargs="+", default=["int8", "int4"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--tiny", action="store_true", help="the same in small, to try the script")
    parser.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)
    add_peers(parser)
    parser.set_defaults(device="cpu")
    args = parser.parse_args()
    if args.peak_of:
        kind, folder = args.peak_of
        shape = SHAPES[args.only[0]]
        tell_peak(kind, Path(folder), tiny(shape) if args.tiny else shape)
        return
    for name in args.only:
        print(json.dumps(measure(name, args)), flush=True)


if __name__ == "__main__":
    main()
