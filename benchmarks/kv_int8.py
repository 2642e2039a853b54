"""Keys and values in eight bits: their room, their speed and what they change. One JSON line.

Room and speed: a published shape with random weights in bfloat16, two engines over one model, one
of which keeps keys and values as int8. Both answer the same prompts of text; their tokens are taken
in turns, --tokens at a time, so that both meet the same machine.

decode   tokens a second behind the prompt; medians of all turns
prefill  seconds from the request to the first token; medians of all runs

What they change: the demo model is led along its own greedy descriptions of drawn clips.

error  root of the mean squared difference of the logits, over that of the logits from their mean at
       each token
same   share of tokens at which the likeliest one is the same
       each in bfloat16, and in float32, where nothing but the codes rounds
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _shapes import SHAPES, Shape, tiny, write
from torch import Tensor

import vidlm
from vidlm.cli.machine import machine
from vidlm.demo.questions import ask_one
from vidlm.demo.world import draw_clip, write_mp4
from vidlm.engine import Engine, EngineOptions, Request, generate
from vidlm.engine.forward import Newest, Part, decode, prefill
from vidlm.engine.inputs import PromptInputs
from vidlm.engine.kv import PagedKV, Table
from vidlm.engine.options import BLOCK
from vidlm.models.base import Prompt, VideoModel, finished
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

    def begin(self, request: Request) -> Iterator[Any]:
        began = time.perf_counter()
        tokens = self.engine.stream(request)
        next(tokens)
        self.prefills.append(time.perf_counter() - began)
        return tokens

    def turn(self, tokens: Iterator[Any], count: int) -> None:
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


def measure_speed(shape: Shape, runs: int, tokens: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), shape, torch.bfloat16)
        kind = getattr(vidlm, f"{shape.family}ForConditionalGeneration")
        model = kind.from_pretrained(folder, dtype=torch.bfloat16).eval().requires_grad_(False)
    sides = {
        name: Side(Engine(model, options=EngineOptions(kv_dtype=kv, share=False)))
        for name, kv in KINDS.items()
    }
    for run in range(runs + 1):
        if run == 1:  # the first was for warming up
            for side in sides.values():
                side.prefills.clear()
                side.rates.clear()
        ids = shape.text_prompt(run)["input_ids"][0].tolist()
        params = SamplingParams(max_new_tokens=1 + tokens * (TURNS if run else 1))
        order = list(sides.values())[:: -1 if run % 2 else 1]
        begun = [(side, side.begin(Request(Prompt(tuple(ids)), params))) for side in order]
        for _ in range(TURNS if run else 1):
            for side, each in begun:
                side.turn(each, tokens)
    found: dict[str, Any] = {name: side.told() for name, side in sides.items()}
    found["ratios"] = {
        name: round(found["int8"][name] / found["bfloat16"][name], 3) for name in found["int8"]
    }
    return {"prompt_tokens": shape.prompt_tokens, **found}


# ---- error --------------------------------------------------------------------------------------


@torch.inference_mode()
def logits(model: VideoModel, prompt: Prompt, answer: Sequence[int], kv: str | None) -> Tensor:
    """(n, V) float32 that each token of an answer is chosen by, by the steps of an engine."""
    inputs = PromptInputs(model, prompt, None)
    finished(inputs.encoding())
    length = len(prompt.ids)
    blocks = range(-(-(length + len(answer)) // BLOCK))
    pages, table = PagedKV(len(blocks), BLOCK, model.device, coded=kv is not None), Table(blocks)
    rows = [prefill(model, pages, [Part.of(inputs, prompt.ids, 0, blocks)])]
    for i, token in enumerate(answer[:-1]):
        rows.append(decode(model, pages, [Newest(token, length + i + 1, table, None)]))
    return torch.cat(rows)


def described(lm: vidlm.LM, clips: int, seed: int) -> list[Prompt]:
    """What is asked about clips with three shapes: the longest answers that the demo gives."""
    rng, prompts = np.random.default_rng((KEY, seed)), list[Prompt]()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        for _ in range(clips):
            clip = draw_clip(rng, count=3)
            write_mp4(clip, path)
            asked = ask_one(clip, "describe", rng)
            assert asked is not None
            prompts.append(lm.video(path).prompt(asked.question))
    return prompts


def measure_error(dtype: str, clips: int, seed: int) -> dict[str, Any]:
    lm = vidlm.load("demo", dtype=dtype)
    params = SamplingParams(
        max_new_tokens=256, eos_token_ids=(lm.model.config.text_config.eos_token_id,)
    )
    prompts = described(lm, clips, seed)
    wrong = whole = 0.0
    same = tokens = 0
    outputs = generate(lm.model, [Request(prompt, params) for prompt in prompts])
    for prompt, output in zip(prompts, outputs, strict=True):
        plain, coded = (logits(lm.model, prompt, output.ids, kv) for kv in KINDS.values())
        same += int((plain.argmax(-1) == coded.argmax(-1)).sum())
        tokens += len(plain)
        plain, coded = (x - x.mean(-1, keepdim=True) for x in (plain, coded))
        wrong += float((coded - plain).double().square().sum())
        whole += float(plain.double().square().sum())
    return {
        "error": round((wrong / whole) ** 0.5, 6),
        "same": round(same / tokens, 5),
        "tokens": tokens,
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
