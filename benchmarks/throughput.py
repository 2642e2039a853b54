"""Many questions at once, and many about one video, on one engine: one JSON line a shape.

Published sizes with random bfloat16 weights, greedy, no end; every video and question is another
one, and what is called new was never seen by the engine's caches.

new videos        one question about each of --videos videos: one after the other, then, of other
                  videos, all at once. Seconds from the first call to the last token.
known videos      a second question about each, so that hardly anything but decoding is left: one
                  after the other, then all at once. Tokens a second while all are being answered.
one video         as many questions about one new video, all at once
second question   its first token's seconds, beside those of the first question
transformers      one batch of as many videos (sdpa), where keys and values fit into memory
bandwidth         what a token's step has to read (weights, keys and values) in the time that it
                  took, over what a copy in this run reads and writes; alone and all at once

Answers together must be those alone, in float32 token by token; in bfloat16 the number of answers
that are the same throughout is told.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from _shapes import SHAPES, Inputs, write
from _sides import LIBRARIES, Side, agree, free_bytes, load, timed
from latency import TOLERANCE, about, chosen, number_type, options, rounded

from vidlm.engine import Engine, EngineOptions, Request
from vidlm.engine.options import BLOCK
from vidlm.engine.store import block_bytes
from vidlm.models.base import Prompt
from vidlm.types import SamplingParams

Figures = dict[str, float]
SMALL = tuple(name for name, shape in SHAPES.items() if shape.family == "Llava")


@dataclass(frozen=True)
class Served:
    """Answers of one or of several requests, and when each of their tokens came, in seconds."""

    ids: tuple[tuple[int, ...], ...]
    times: tuple[tuple[float, ...], ...]

    @property
    def whole(self) -> float:
        return max(times[-1] for times in self.times)

    @property
    def first(self) -> float:
        """Seconds to the first token of the first request."""
        return self.times[0][0]

    @property
    def rate(self) -> float | None:
        """Tokens a second while all requests were being answered; None if they never were."""
        begin, end = max(t[0] for t in self.times), min(t[-1] for t in self.times)
        counted = sum(begin < t <= end for times in self.times for t in times)
        return counted / (end - begin) if counted else None


def serve(engine: Engine, requests: Sequence[Request]) -> Served:
    began = perf_counter()
    ids: dict[int, list[int]] = defaultdict(list)
    times: dict[int, list[float]] = defaultdict(list)
    for token in engine.stream_all(requests):  # numbered in their order
        ids[token.request].append(token.id)
        times[token.request].append(perf_counter() - began)
    ids, times = dict(sorted(ids.items())), dict(sorted(times.items()))
    return Served(tuple(map(tuple, ids.values())), tuple(map(tuple, times.values())))


@dataclass
class Bench:
    """One shape's models, and the questions that they are asked."""

    ours: Side
    theirs: Side
    videos: int
    tokens: int
    options: EngineOptions = field(default_factory=EngineOptions)

    def requests(self, first: int, question: int = 0) -> list[Request]:
        """The same question about each of `videos` videos, from a seed on."""
        return [self.request(first + i, question) for i in range(self.videos)]

    def request(self, seed: int, question: int = 0) -> Request:
        shape, model = self.ours.shape, self.ours.model
        ids = shape.ids(seed, question)[0].tolist()
        media = model.media(self.ours.move(shape.video(seed)))
        params = SamplingParams(max_new_tokens=self.tokens)
        return Request(Prompt(tuple(ids), tuple(media)), params)

    def engine(self, run: int, same: list[bool]) -> Figures:
        """Ours; whether each answer was the same alone and together goes into `same`."""
        engine = Engine(self.ours.model, options=self.options)
        self.fresh(engine)
        new = [serve(engine, [request]) for request in self.requests(1000 * run)]
        known = [serve(engine, [request]) for request in self.requests(1000 * run, 1)]
        both = serve(engine, self.requests(1000 * run, 2))
        alone = [serve(engine, [request]) for request in self.requests(1000 * run, 2)]
        same += [one.ids[0] == ids for one, ids in zip(alone, both.ids, strict=True)]
        self.fresh(engine)
        together = serve(engine, self.requests(1000 * run + 500))
        self.fresh(engine)
        about_one = serve(engine, [self.request(1000 * run + 900, q) for q in range(self.videos)])
        assert both.rate is not None, "known videos, and yet never all at once"
        return {
            "new_alone_seconds": sum(served.whole for served in new),
            "new_together_seconds": together.whole,
            "known_alone_tokens_per_second": _rate(known),
            "known_together_tokens_per_second": both.rate,
            "one_video_seconds": about_one.whole,
            "first_question_first_token_seconds": statistics.median(s.first for s in new),
            "second_question_first_token_seconds": statistics.median(s.first for s in known),
        }

    def fresh(self, engine: Engine) -> None:
        """Forget everything; recordings are made before anything is timed, by text as long."""
        engine.clear()
        if self.options.cuda_graphs:
            params = SamplingParams(max_new_tokens=self.tokens)
            ids = [self.ours.shape.text_prompt(i)["input_ids"][0] for i in range(self.videos)]
            serve(engine, [Request(Prompt(tuple(each.tolist())), params) for each in ids])

    def batch(self, run: int) -> Figures:
        """transformers: all in one call."""
        self.theirs.attention("sdpa")
        shape = self.theirs.shape
        prompts = [shape.prompt(1000 * run + 500 + i) for i in range(self.videos)]
        joined: Inputs = {name: torch.cat([p[name] for p in prompts]) for name in prompts[0]}
        answered = self.theirs.answer(joined, self.tokens)
        return {
            "new_together_seconds": answered.whole,
            "tokens_per_second": self.videos * answered.rate,
        }

    def batch_fits(self, device: str) -> bool:
        """Keys and values, those of a layer twice as they grow, and 2 GiB for all else."""
        length, each = self.ours.shape.prompt_tokens + self.tokens, self.token_bytes(None)
        return 1.3 * each * length * self.videos + (2 << 30) < free_bytes(device)

    def token_bytes(self, kv: str | None) -> float:
        """Of a token's keys and values, stored as EngineOptions.kv_dtype says."""
        return block_bytes(self.ours.model, kv) / BLOCK

    def step_bytes(self, answers: int) -> float:
        """What a step in the middle of so many answers has to read: each weight once, and what is
        stored of each answer."""
        model, length = self.ours.model, self.ours.shape.prompt_tokens + self.tokens // 2
        weights = sum(p.nbytes for p in (*model.decoder.layers.parameters(), model.head.weight))
        return weights + answers * length * self.token_bytes(self.options.kv_dtype)

    def bandwidth(self, medians: Figures, copied: float) -> Figures:
        """The part of it that decoding takes, of `copied` bytes a second."""
        alone = medians["known_alone_tokens_per_second"]
        together = medians["known_together_tokens_per_second"] / self.videos
        return {
            "copy_gb_per_second": copied / 1e9,
            "alone": self.step_bytes(1) * alone / copied,
            "together": self.step_bytes(self.videos) * together / copied,
        }


def copy_rate(device: torch.device, size: int) -> float:
    """Bytes a second that a copy of so many reads and writes."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target, seconds = torch.zeros_like(source), []
    for _ in range(7):
        with timed(device) as took:
            target.copy_(source)
        seconds += took
    return 2 * size / statistics.median(seconds)


def _rate(served: Sequence[Served]) -> float:
    """Tokens a second after each answer's first."""
    spans = [each.times[0][-1] - each.times[0][0] for each in served]
    return sum(len(each.times[0]) - 1 for each in served) / sum(spans)


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    shape, dtype = chosen(name, args), number_type(args)
    with tempfile.TemporaryDirectory() as place:
        write(Path(place), shape, dtype)
        ours, theirs = (load(lib, shape, Path(place), dtype, args.device) for lib in LIBRARIES)
        engine = EngineOptions(cuda_graphs=args.cuda_graphs, kv_dtype=args.kv_dtype)
        bench = Bench(ours, theirs, args.videos, args.tokens, engine)
        agreement = agree(ours, theirs, args.tokens, TOLERANCE[dtype])
        same: list[bool] = []
        turns: dict[str, Callable[[int], Figures]] = {"vidlm": lambda run: bench.engine(run, same)}
        if bench.batch_fits(args.device):
            turns["transformers_batch"] = bench.batch
        runs: dict[str, list[Figures]] = {who: [] for who in turns}
        for run in range(1, args.runs + 1):
            for who, turn in turns.items():
                runs[who].append(turn(run))
    if dtype == torch.float32 and not all(same):
        raise SystemExit(f"answers together differ from those alone: {same}")
    medians = {who: _medians(figures) for who, figures in runs.items()}
    copied = copy_rate(ours.model.device, (16 if args.tiny else 512) << 20)
    return {
        "benchmark": "throughput",
        "shape": name,
        **about(shape, args),
        "videos": args.videos,
        "cuda_graphs": args.cuda_graphs,
        "kv_dtype": args.kv_dtype,
        "absent": sorted({"transformers_batch"} - turns.keys()),
        "agreement": {"transformers": vars(agreement), "same_together": f"{sum(same)}/{len(same)}"},
        **{who: rounded(figures) for who, figures in medians.items()},
        "ratios": rounded(ratios(medians)),
        "bandwidth": rounded(bench.bandwidth(medians["vidlm"], copied)),
    }


def ratios(medians: Mapping[str, Figures]) -> Figures:
    """Tokens a second: above 1 is better; seconds: below 1."""
    ours, theirs = medians["vidlm"], medians.get("transformers_batch")
    table = {
        "together_over_alone_tokens_per_second": ours["known_together_tokens_per_second"]
        / ours["known_alone_tokens_per_second"],
        "together_over_alone_seconds": ours["new_together_seconds"] / ours["new_alone_seconds"],
        "one_video_over_alone_seconds": ours["one_video_seconds"] / ours["new_alone_seconds"],
        "second_over_first_question_first_token": ours["second_question_first_token_seconds"]
        / ours["first_question_first_token_seconds"],
    }
    if theirs is not None:
        table["over_transformers_batch_tokens_per_second"] = (
            ours["known_together_tokens_per_second"] / theirs["tokens_per_second"]
        )
        table["over_transformers_batch_seconds"] = (
            ours["new_together_seconds"] / theirs["new_together_seconds"]
        )
    return table


def _medians(figures: list[Figures]) -> Figures:
    return {name: statistics.median(each[name] for each in figures) for name in figures[0]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options(parser)
    parser.set_defaults(runs=1)
    parser.add_argument("--videos", type=int, default=8)
    parser.add_argument(
        "--cuda-graphs", action="store_true", help="decode by recordings, as a GPU alone can"
    )
    parser.add_argument("--kv-dtype", choices=["int8"], help="as EngineOptions has it")
    parser.add_argument("--only", choices=SMALL, nargs="+", default=list(SMALL))
    args = parser.parse_args()
    for name in args.only:
        print(json.dumps(measure(name, args)), flush=True)


if __name__ == "__main__":
    main()
