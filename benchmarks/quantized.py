"""Weights in fewer bits beside bfloat16, and beside llama.cpp's: one JSON line a shape.

Published sizes with random weights, batch 1, greedy. All kinds are in one process and take turns;
llama.cpp runs the same decoder in Q8_0 and Q4_0, a process a turn, with its own keys and values in
float16. Each turn has new prompts. What it measured goes to stderr as it comes.

weights_gib             parameters and codes
load_peak_gib           the most memory that a process of its own held while it loaded the model,
                        above its imports; `load_limit_gib` is 0.65 (int8) or 0.45 (int4) times the
                        bfloat16 weights plus 300 MB
prefill_seconds         to the first token of a prompt as long as a video's, all text
decode_tokens_per_second, decode_short   of the tokens after it, and after a prompt of 30
prefill_seconds_kv_int8, decode_tokens_per_second_kv_int8   the same where keys and values are int8,
                        too, as EngineOptions(kv_dtype="int8") has them

`over_bf16` is bfloat16's seconds over a kind's, and a kind's tokens a second over bfloat16's: above
1 is better; `over_q8_0` and `over_q4_0` the same against llama.cpp. Figures of int8 keys and values
are set against those of keys and values that are not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _peers import Peer, PeerFailed, add_peers, found_peers
from _shapes import SHAPES, Inputs, Shape, tiny, write
from _sides import Answered, Side, load, peak_bytes
from latency import alternate, rounded

import vidlm
from vidlm.cli.machine import machine
from vidlm.engine import Request, run
from vidlm.models.base import Prompt
from vidlm.quant import PRESETS, preset
from vidlm.types import SamplingParams

BF16 = "bf16"
SHORT = 30  # tokens
MORE = 4  # times as many tokens after the short prompt, which take less time
KV = "_kv_int8"  # ends the names of figures with keys and values in int8
LIMITS = {"int8": 0.65, "int4": 0.45, "nf4": 0.45}
RIVALS = {"int8": "q8_0", "int4": "q4_0", "nf4": "q4_0"}
Figures = dict[str, float]


def loaded(kind: str, shape: Shape, folder: Path) -> Side:
    if kind == BF16:
        return load("vidlm", shape, folder, torch.bfloat16, "cpu")
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
    answered = side.answer(side.shape.text_prompt(3 * run), tokens)
    quick = side.answer(short(side.shape, 3 * run + 1), MORE * tokens)
    coded = with_int8_kv(side, side.shape.text_prompt(3 * run + 2), tokens)
    return {
        "prefill_seconds": answered.first,
        "decode_tokens_per_second": answered.rate,
        "decode_short": quick.rate,
        f"prefill_seconds{KV}": coded.first,
        f"decode_tokens_per_second{KV}": coded.rate,
    }


def with_int8_kv(side: Side, prompt: Inputs, tokens: int) -> Answered:
    """As `generate`, which cannot be told of keys and values, has it answered."""
    params = SamplingParams(max_new_tokens=tokens)
    request = Request(Prompt(tuple(prompt["input_ids"][0].tolist())), params)
    ids, times, began = [], [], time.perf_counter()
    options = vidlm.EngineOptions(kv_dtype="int8", share=False)
    for token in run(side.model, [request], options=options):
        ids.append(token.id)
        times.append(time.perf_counter() - began)
    assert len(ids) == tokens, "an answer ended before its length"
    return Answered(tuple(ids), tuple(times), times[-1])


def theirs(peer: Peer, shape: Shape, tokens: int, run: int) -> Figures:
    seen = peer.answer(shape.text_prompt(3 * run), tokens, torch.bfloat16)
    quick = peer.answer(short(shape, 3 * run + 1), MORE * tokens, torch.bfloat16)
    return {
        "prefill_seconds": seen["prefill_seconds"],
        "decode_tokens_per_second": seen["decode_tokens_per_second"],
        "decode_short": quick["decode_tokens_per_second"],
    }


def load_peak(kind: str, name: str, folder: Path, small: bool) -> int:
    command = [sys.executable, __file__, "--peak-of", kind, str(folder), "--only", name]
    command += ["--tiny"] if small else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"loading {name} as {kind}: {done.stderr[-2000:]}")
    return int(done.stdout)


def tell_peak(kind: str, folder: Path, shape: Shape) -> None:
    """The child of `load_peak`."""
    import vidlm.hf  # noqa: F401  (imports do not count)

    before = peak_bytes("cpu")
    loaded(kind, shape, folder)
    after = peak_bytes("cpu")
    if before is None or after is None:
        raise SystemExit("this system does not tell how much memory a process held")
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
        turns: dict[str, Callable[[int], Figures]] = {
            **{kind: partial(ours, side, args.tokens) for kind, side in sides.items()},
            **{kind: partial(theirs, peer, shape, args.tokens) for kind, peer in peers.items()},
        }
        seen = alternate(turns, args.runs + 1, absent)  # the first is not counted
    sizes = {kind: weights(side.model) for kind, side in sides.items()}
    memory = {kind: memory_of(kind, size, peaks, sizes[BF16]) for kind, size in sizes.items()}
    medians = {who: _medians(figures[1:]) for who, figures in seen.items()}
    return {
        "benchmark": "quantized",
        "shape": name,
        "tiny": args.tiny,
        "machine": machine(),
        "prompt_tokens": shape.prompt_tokens,
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
            found = {RIVALS[kind]: peer.quantized(RIVALS[kind]) for kind in args.kinds}
        except PeerFailed as error:
            absent[peer.name] = str(error)
    return found, absent


def memory_of(kind: str, size: int, peaks: dict[str, int], whole: int) -> Figures:
    limit = {} if kind == BF16 else {"load_limit_gib": LIMITS[kind] * whole + 300e6}
    figures = {"weights_gib": size, "load_peak_gib": peaks[kind], **limit}
    return rounded({name: value / 2**30 for name, value in figures.items()})


def ratios(kind: str, medians: dict[str, Figures]) -> dict[str, Figures]:
    mine = medians[kind]
    return {
        f"over_{who}": rounded({what: ratio(what, mine[what], medians[who]) for what in mine})
        for who in (BF16, RIVALS[kind])
        if who in medians
    }


def ratio(what: str, mine: float, others: Figures) -> float:
    """Above 1 where it is better than the other's, who has no keys and values in int8."""
    plain = what.removesuffix(KV)
    return others[plain] / mine if plain.endswith("seconds") else mine / others[plain]


def _medians(figures: list[Figures]) -> Figures:
    return {name: statistics.median(f[name] for f in figures) for name in figures[0]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
