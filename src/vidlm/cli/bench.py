"""`vidlm bench`: how fast a model answers here, how fast it serves many, how fast videos are read.

Every run begins with empty caches, and figures are medians of the runs. Without a VIDEO a clip is
drawn. Nothing is compared with other libraries; benchmarks/ in the repository does that.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vidlm.cli.loading import load_model, loading
from vidlm.cli.machine import machine, peak_bytes, sentence
from vidlm.cli.options import (
    FRAMES,
    Json,
    Loads,
    ModelArgument,
    Reads,
    Working,
    command,
)
from vidlm.cli.progress import Progress
from vidlm.cli.sources import STDIN, check_sources, take
from vidlm.errors import InvalidArgument

if TYPE_CHECKING:
    from vidlm.api import LM
    from vidlm.engine import Engine, Request

QUESTIONS = ("What happens in the video?", "What moves?")
DRAWN_SECONDS, DRAWN_FPS, DRAWN_SIDE = 10.0, 24, 360
IN_ORDER_BYTES = 256 << 20  # of frames that are held while they are read one after the other

VideoFile = Annotated[
    str | None, typer.Argument(metavar="VIDEO", help="A path or URL; else a clip is drawn.")
]
FramesOf = Annotated[
    int, typer.Option("--frames", min=1, metavar="N", help="Frames of a video, evenly spread.")
]
Tokens = Annotated[
    int, typer.Option("--max-tokens", min=2, metavar="N", help="Length of each answer, in tokens.")
]
Runs = Annotated[int, typer.Option("--runs", min=1, metavar="N", help="How often; medians count.")]
Figures = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Measures(Reads):
    """What is measured, and how often."""

    video: VideoFile = None
    frames: FramesOf = FRAMES
    runs: Runs = 3
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class Answers(Measures, Loads, Working):
    """A model that answers."""

    model: ModelArgument
    max_tokens: Tokens = 64


@dataclass(frozen=True, kw_only=True)
class Latency(Answers):
    """How long one question takes.

    Each stage, a second question about the same video, and memory.
    """


@dataclass(frozen=True, kw_only=True)
class Throughput(Answers):
    """How much faster many questions are at once.

    About as many drawn videos, or all about the VIDEO that is given; the same questions one after
    the other, and together.
    """

    questions: Annotated[
        int, typer.Option("--questions", min=2, metavar="N", help="Asked at once.")
    ] = 8


@dataclass(frozen=True, kw_only=True)
class Decode(Measures, Working):
    """How fast frames are read from a video; no model is needed."""


def bench_commands() -> typer.Typer:
    """The commands below `vidlm bench`."""
    app = typer.Typer(
        no_args_is_help=True,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["--help", "-h"]},
        help="Measure this machine: latency, throughput, decode.",
    )
    app.command("latency")(command(Latency, latency))
    app.command("throughput")(command(Throughput, throughput))
    app.command("decode")(command(Decode, decode))
    return app


def latency(given: Latency) -> None:
    _check(given.video)
    if given.video is not None:  # which may be downloaded; drawing comes before torch, whose
        loading(given)  # memory would else count beside the encoder's in the peak
    with Progress(given.quiet) as progress, _clips(given, 1, progress) as (source,):
        lm = load_model(given.model, given, progress)
        runs = _repeated(given.runs, progress, lambda: _answer(lm, source, given))
        peak = peak_bytes()
    extra = {} if peak is None else {"peak_gib": peak / 2**30}
    asked = {"max_tokens": given.max_tokens, "frames": given.frames}
    _tell(given, "latency", asked, runs, extra, str(lm.model.device))


def throughput(given: Throughput) -> None:
    _check(given.video)
    if given.video is not None:  # which may be downloaded; drawing comes before torch, whose
        loading(given)  # memory would else count beside the encoder's in the peak
    with (
        Progress(given.quiet) as progress,
        _clips(given, given.questions, progress) as sources,
    ):
        lm = load_model(given.model, given, progress)
        progress.now("reading the frames")
        requests = _requests(lm, sources, given)
        runs = _repeated(given.runs, progress, lambda: _serve_all(lm.engine, requests))
    asked = {"questions": given.questions, "max_tokens": given.max_tokens, "frames": given.frames}
    _tell(given, "throughput", asked, runs, {}, str(lm.model.device))


def decode(given: Decode) -> None:
    _check(given.video)
    with Progress(given.quiet) as progress, _clips(given, 1, progress) as (source,):
        runs = _repeated(given.runs, progress, lambda: _read(source, given.frames))
    _tell(given, "decode", {"frames": given.frames}, runs, {}, "cpu")


# ---- what is measured ------------------------------------------------------------------------


def _answer(lm: LM, source: Any, given: Latency) -> Figures:
    """One question about a video that nothing is known of, and another one about the same."""
    lm.engine.clear()
    options: dict[str, Any] = dict.fromkeys(("max_tokens", "min_new_tokens"), given.max_tokens)
    began = time.perf_counter()
    answer = lm.ask(source, QUESTIONS[0], frames=given.frames, **options)
    whole, took = time.perf_counter() - began, answer.timings
    handle = lm.video(source, frames=given.frames)
    again = lm.ask(handle, QUESTIONS[1], **options).timings
    return {
        "read_seconds": took.decode_media,
        "prepare_seconds": took.preprocess,
        "encode_seconds": took.encode,
        "prefill_seconds": took.prefill,
        "first_token_seconds": took.first_token,
        "decode_tokens_per_second": _rate(answer.usage.completion_tokens - 1, took.decode),
        "whole_seconds": whole,
        "second_question_first_token_seconds": again.first_token,
    }


def _requests(lm: LM, sources: Sequence[Any], given: Throughput) -> list[Request]:
    """The first questions about each source, or many about a single one."""
    from vidlm.engine import Request
    from vidlm.types import SamplingParams

    handles = [lm.video(source, frames=given.frames) for source in sources]
    handles *= given.questions // len(handles)
    params = SamplingParams(max_new_tokens=given.max_tokens)  # without an end before that
    asked = [f"{i + 1}. {QUESTIONS[0]}" for i in range(given.questions)]
    return [
        Request(handle.prompt(question), params)
        for handle, question in zip(handles, asked, strict=True)
    ]


def _serve_all(engine: Engine, requests: Sequence[Request]) -> Figures:
    engine.clear()
    alone = tokens = 0.0
    for request in requests:
        seconds, count = _serve(engine, [request])
        alone, tokens = alone + seconds, tokens + count
    engine.clear()
    together, _ = _serve(engine, requests)
    return {
        "one_after_the_other_seconds": alone,
        "together_seconds": together,
        "one_after_the_other_tokens_per_second": _rate(tokens, alone),
        "together_tokens_per_second": _rate(tokens, together),
        "times_faster": _rate(alone, together),
    }


def _serve(engine: Engine, requests: Sequence[Request]) -> tuple[float, int]:
    """Seconds and tokens, from frames that are in memory to the last token."""
    began = time.perf_counter()
    count = sum(1 for _ in engine.stream_all(requests))
    return time.perf_counter() - began, count


def _read(source: Any, frames: int) -> Figures:
    """A few frames of the whole clip, and its first ones in order."""
    from vidlm.media import load_video

    began = time.perf_counter()
    video = load_video(source, num_frames=frames)
    spread = time.perf_counter() - began
    count = min(max(IN_ORDER_BYTES // video.frames[0].nbytes, 1), video.total_frames)
    began = time.perf_counter()
    load_video(source, indices=range(count))
    in_order = time.perf_counter() - began
    return {
        "spread_seconds": spread,
        "spread_frames_per_second": _rate(len(video), spread),
        "in_order_frames_per_second": _rate(count, in_order),
    }


def _rate(count: float, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0


# ---- around it -------------------------------------------------------------------------------


def _check(video: str | None) -> None:
    """What can be wrong before anything is loaded or drawn."""
    if video == STDIN:
        raise InvalidArgument(
            "bench reads a video several times, which stdin (-) does not allow; name a file"
        )
    if video is not None:
        check_sources([video])


@contextmanager
def _clips(given: Measures, count: int, progress: Progress) -> Iterator[list[Any]]:
    """The video, or so many drawn clips, which no two are alike of."""
    if given.video is not None:
        yield take([given.video], given, {}, progress)
        return
    import numpy as np

    from vidlm.demo.world import draw_clip, write_mp4

    with tempfile.TemporaryDirectory(prefix="vidlm-bench-") as folder:
        paths = [str(Path(folder) / f"drawn_{seed}.mp4") for seed in range(count)]
        for seed, path in enumerate(paths):
            clip = draw_clip(np.random.default_rng(seed))
            write_mp4(replace(clip, seconds=DRAWN_SECONDS, fps=DRAWN_FPS), path, DRAWN_SIDE)
        yield paths


def _repeated(runs: int, progress: Progress, run: Callable[[], Figures]) -> list[Figures]:
    """The runs' figures; what is only done at first (kernels, caches of the system) is not in."""
    progress.now("warming up")
    run()
    seen = []
    for i in range(runs):
        progress.now(f"run {i + 1} of {runs}")
        began = time.perf_counter()
        seen.append(run())
        progress.done(time.perf_counter() - began, "run", f"{i + 1} of {runs}")
    return seen


def _tell(
    given: Answers | Decode,
    what: str,
    asked: Mapping[str, Any],
    runs: Sequence[Figures],
    extra: Figures,
    device: str,
) -> None:
    named = machine(device)
    figures = {name: summary([run[name] for run in runs]) for name in runs[0]}
    figures |= {name: summary([value]) for name, value in extra.items()}
    model = {} if isinstance(given, Decode) else {"model": given.model}
    how = {} if isinstance(given, Decode) else _how(given)
    if given.json:
        told = {"bench": what, **model, "video": given.video, **how, **asked, "runs": given.runs}
        print(json.dumps({**told, "machine": named, "figures": figures}), flush=True)
        return
    about = [*model.values(), given.video or "drawn clips"]
    said = {**{name: value for name, value in how.items() if value is not None}, **asked}
    about += [f"{name.replace('_', ' ')} {value}" for name, value in said.items()]
    _show(", ".join(about), figures, given.runs)
    typer.echo(sentence(named))


def _how(given: Loads) -> dict[str, str | None]:
    """What else than the model itself decides how fast it is."""
    return {name: getattr(given, name) for name in ("dtype", "quantize", "kv_dtype")}


def summary(values: Sequence[float]) -> Figures:
    middle = statistics.median(values)
    return {"median": middle, "lowest": min(values), "highest": max(values)}


def _show(about: str, figures: Mapping[str, Figures], runs: int) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    table.add_column(f"median of {runs}" if runs > 1 else "", justify="right")
    table.add_column("lowest to highest" if runs > 1 else "", justify="right")
    table.add_column("")
    for name, summary in figures.items():
        words, unit = label(name)
        low, high = _number(summary["lowest"]), _number(summary["highest"])
        spread = f"{low} to {high}" if summary["lowest"] < summary["highest"] else ""
        table.add_row(words, _number(summary["median"]), spread, unit)
    typer.echo(about)
    Console().print(table)


UNITS = {
    "_frames_per_second": "frames/s",
    "_tokens_per_second": "tokens/s",
    "_seconds": "s",
    "_gib": "GiB",
    "": "",
}


def label(name: str) -> tuple[str, str]:
    """ "first_token_seconds" -> ("first token", "s")"""
    ending = next(ending for ending in UNITS if name.endswith(ending))
    return name.removesuffix(ending).replace("_", " "), UNITS[ending]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
