"""Keys and values in eight bits: their room, their speed and what they change. One JSON line.

Room and speed: a published shape with random weights in bfloat16, two engines over one model, one
of which keeps keys and values as int8. Both answer the same prompts of text; their tokens are taken
in turns, --tokens at a time, so that both meet the same machine.

bytes_per_token           of the keys and values of a token, in all layers, as they lie in memory
decode_tokens_per_second  behind the prompt; the median of all turns
prefill_seconds           from the request to the first token; the median of all runs

Ratios are int8's over bfloat16's: below 1 is better for bytes and seconds, above 1 for tokens.

What they change: the demo model is led along its own greedy descriptions of drawn clips.

error  root of the mean squared difference of the logits, over that of the logits from their mean at
       each token
same   share of tokens at which the likeliest one is the same
       each in bfloat16, and in float32, where nothing but the codes rounds

Memory and speed are those of a CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from _drift import Drift, decoded, described
from _shapes import SHAPES, Shape, tiny, write
from _sides import load

import vidlm
from vidlm.cli.machine import machine
from vidlm.engine import Engine, EngineOptions, Request, Token, generate
from vidlm.models.base import Prompt
from vidlm.types import SamplingParams

KINDS: dict[str, str | None] = {"bfloat16": None, "int8": "int8"}
TURNS = 6  # of each engine in an answer
KEY = 0x14B8  # clips are drawn from (KEY, seed): neither those of training nor those of evaluation


# ---- room and speed -----------------------------------------------------------------------------


@dataclass
class Side:
    """An engine, and what was measured of it."""

    engine: Engine
    prefills: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)

    def begin(self, request: Request) -> Iterator[Token]:
        began = time.perf_counter()
        tokens = self.engine.stream(request)
        next(tokens)
        self.prefills.append(time.perf_counter() - began)
        return tokens

    def turn(self, tokens: Iterator[Token], count: int) -> None:
        began = time.perf_counter()
        taken = sum(1 for _ in islice(tokens, count))
        assert taken == count, "an answer ended before its length"
        self.rates.append(count / (time.perf_counter() - began))

    def told(self) -> dict[str, float]:
        stored = [x.nbytes for pair in self.engine._store.kv.layers for x in pair]
        return {
            "bytes_per_token": sum(stored) // self.engine.room,
            "decode_tokens_per_second": round(statistics.median(self.rates), 2),
            "prefill_seconds": round(statistics.median(self.prefills), 3),
        }


def answer(sides: Iterable[Side], prompt: Prompt, tokens: int, turns: int) -> None:
    """All answer one prompt: one prefill after the other, then their tokens in turns."""
    request = Request(prompt, SamplingParams(max_new_tokens=1 + tokens * turns))
    begun = [(side, side.begin(request)) for side in sides]
    for _ in range(turns):
        for side, answered in begun:
            side.turn(answered, tokens)


def measure_speed(shape: Shape, runs: int, tokens: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), shape, torch.bfloat16)
        model = load("vidlm", shape, Path(folder), torch.bfloat16, "cpu").model
    engines = {
        name: Engine(model, options=EngineOptions(kv_dtype=kv, share=False))
        for name, kv in KINDS.items()
    }
    prompts = [
        Prompt(tuple(shape.text_prompt(run)["input_ids"][0].tolist())) for run in range(runs + 1)
    ]
    answer(map(Side, engines.values()), prompts[0], tokens, 1)  # to warm up
    sides = {name: Side(engine) for name, engine in engines.items()}
    for run in range(1, runs + 1):
        order = list(sides.values())[:: -1 if run % 2 else 1]
        answer(order, prompts[run], tokens, TURNS)
    found: dict[str, Any] = {name: side.told() for name, side in sides.items()}
    found["ratios"] = {
        name: round(found["int8"][name] / found["bfloat16"][name], 3) for name in found["int8"]
    }
    return {"prompt_tokens": shape.prompt_tokens, **found}


# ---- error --------------------------------------------------------------------------------------


def measure_error(dtype: str, clips: int, seed: int) -> dict[str, Any]:
    lm, drift = vidlm.load("demo", dtype=dtype), Drift()
    params = SamplingParams(
        max_new_tokens=256, eos_token_ids=(lm.model.config.text_config.eos_token_id,)
    )
    prompts = described(lm, clips, (KEY, seed))
    outputs = generate(lm.model, [Request(prompt, params) for prompt in prompts])
    for prompt, output in zip(prompts, outputs, strict=True):
        reference, coded = (decoded(lm.model, [prompt], [output.ids], kv) for kv in (None, "int8"))
        drift.add(*coded, *reference)
    return {
        "error": round(drift.error, 6),
        "same": round(drift.share, 5),
        "tokens": drift.tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="llava-interleave-0.5b")
    parser.add_argument("--runs", type=int, default=3, help="prompts, after one to warm up")
    parser.add_argument("--tokens", type=int, default=12, help="of a turn")
    parser.add_argument("--clips", type=int, default=24, help="that the demo describes")
    parser.add_argument("--seed", type=int, default=1, help="of the clips")
    parser.add_argument("--tiny", action="store_true", help="a small network, to try the script")
    args = parser.parse_args()
    shape = tiny(SHAPES[args.shape]) if args.tiny else SHAPES[args.shape]
    found = {
        "benchmark": "kv_int8",
        "shape": args.shape,
        "tiny": args.tiny,
        "machine": machine(),
        **measure_speed(shape, args.runs, args.tokens),
        "demo": {
            dtype: measure_error(dtype, args.clips, args.seed) for dtype in ("bfloat16", "float32")
        },
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
