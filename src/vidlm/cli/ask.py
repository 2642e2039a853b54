"""`vidlm ask`: check what was given, load, read, and pass the answer on as it comes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

from vidlm.cli.loading import load_model, loading
from vidlm.cli.options import MODEL, Ask
from vidlm.cli.progress import Progress
from vidlm.cli.sources import STDIN, check_sources, chosen_frames, is_saved, take
from vidlm.errors import InvalidArgument
from vidlm.types import FinishReason

if TYPE_CHECKING:
    from vidlm.api import LM, AnswerStream

DEMO = "demo"  # as vidlm.hf has it, which brings torch
EXAMPLE = 'vidlm ask clip.mp4 "What happens?"'
KEYWORDS = ("max_tokens", "temperature", "top_p", "seed")


DEMO_KNOWS = (
    "the demo model knows drawn moving shapes only (vidlm demo draws some); for other videos give "
    f"a real model: --model {MODEL}"
)


def ask(given: Ask) -> None:
    """Everything that can be wrong without a model is found before one is loaded or downloaded."""
    sources = given.videos or []
    question = legible("the question", check_question(sources, given.question))
    system = None if given.system is None else legible("--system", given.system)
    frames = chosen_frames(given)
    check_sources(sources)
    if given.quiet:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with Progress(given.quiet) as progress:
        loading(given)
        media = take(sources, given, {} if given.fit else frames, progress)
        if given.fit:
            frames = fitted(given, frames, sources, question, progress)
        lm = load_model(given.model, given, progress)
        if given.model == DEMO:
            progress.note(DEMO_KNOWS)
        stream = _read(lm, media, question, _keywords(given, frames, system), progress)
        pieces = _first_token(stream, media, progress)
        if given.json:
            told = {"model": given.model, "question": question, "sources": sources}
            print(json.dumps({**told, **stream.answer.to_dict()}), flush=True)
        elif given.no_stream:
            print(stream.answer.text, flush=True)
        else:
            _say(trimmed(pieces))
        _last_token(stream, progress)


def check_question(sources: list[str], question: str | None) -> str:
    """The question, which is the last argument: typer gives it a lone one, too."""
    if question is None or not sources:
        found = f"only {question!r} was given" if question is not None else "neither was given"
        raise InvalidArgument(f"a video and a question are needed, and {found}: {EXAMPLE}")
    if not question.strip():
        raise InvalidArgument(f"the question is empty; ask something: {EXAMPLE}")
    if os.path.isfile(question):
        raise InvalidArgument(
            f"the last argument is the question, and {question!r} is a file; put a question behind "
            f"the videos: {EXAMPLE}"
        )
    return question


def legible(what: str, text: str) -> str:
    """A text of the command line that Python could not decode (in the POSIX locale) as UTF-8.

    Raises InvalidArgument where it is something else.
    """
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError as error:
        raise InvalidArgument(
            f"{what} is not UTF-8; set LC_ALL=C.UTF-8, or the locale that it was typed in"
        ) from error


def fitted(
    given: Ask, frames: dict[str, Any], sources: list[str], question: str, progress: Progress
) -> dict[str, Any]:
    """`frames` with no more of each video than fit into the context and into memory; looked at
    before the model is loaded. Raises ContextOverflow or InvalidArgument where they do not fit."""
    from vidlm.hf import find
    from vidlm.media import is_image
    from vidlm.plan import ANSWER_TOKENS, PROMPT_TOKENS, fit, free_memory

    if any(map(is_saved, sources)):
        raise InvalidArgument("--fit chooses frames, and those of a saved video are chosen")
    if any(source != STDIN and is_image(source) for source in sources):
        raise InvalidArgument("--fit is for videos, and an image was given; use --frames instead")
    began = time.perf_counter()
    progress.now(f"looking at {given.model}")
    told = loading(given)
    named = frames.get("indices") or frames.get("times")
    words = question + (given.system or "")
    most = fit(
        find(given.model),
        frames=frames.get("num_frames") if named is None else len(named),
        max_tokens=given.max_tokens or ANSWER_TOKENS,
        prompt_tokens=PROMPT_TOKENS + len(words.encode()),  # a token has at least one byte
        memory=free_memory(told.device, told.max_memory),
        videos=len(sources),
        loading=told,
    )
    progress.done(time.perf_counter() - began, "fit", f"at most {most:,} frames of each video")
    return frames if named is not None else {**frames, "max_frames": most}


def trimmed(pieces: Iterable[str]) -> Iterator[str]:
    """The pieces of `"".join(pieces).strip()`: spaces wait until something follows them."""
    waiting, begun = "", False
    for piece in pieces:
        text = waiting + piece
        solid = text.rstrip()
        waiting = text[len(solid) :]
        if solid:
            yield solid if begun else solid.lstrip()
            begun = True


def _keywords(given: Ask, frames: dict[str, Any], system: str | None) -> dict[str, Any]:
    """What `lm.stream` is told."""
    said = {"system": system, **{name: getattr(given, name) for name in KEYWORDS}}
    chosen = frame_keywords(frames)
    return chosen | {name: value for name, value in said.items() if value is not None}


def frame_keywords(frames: dict[str, Any]) -> dict[str, Any]:
    """What load_video is told, as `lm.ask` is."""
    return {("frames" if name == "num_frames" else name): v for name, v in frames.items()}


def _read(
    lm: LM, media: list[Any], question: str, keywords: dict[str, Any], progress: Progress
) -> AnswerStream:
    progress.now("reading the frames")
    stream = lm.stream(media, question, **keywords)
    progress.done(
        stream.timings.decode_media, "read", _counted(stream, media) + _span(stream, media)
    )
    progress.done(stream.timings.preprocess, "prepare", f"{stream.prompt_tokens:,} tokens")
    return stream


def _counted(stream: AnswerStream, media: list[Any]) -> str:
    """ "8 frames", "16 frames of 2 videos", "8 frames and 1 image"."""
    videos = len({frame.media for frame in stream.frames})
    images = len(media) - videos
    frames = f"{len(stream.frames)} frames" + (f" of {videos} videos" if videos > 1 else "")
    stills = f"{images} image" + ("s" if images > 1 else "")
    return " and ".join([frames] * (videos > 0) + [stills] * (images > 0))


def _span(stream: AnswerStream, media: list[Any]) -> str:
    """From when to when, where that is one clip's time."""
    from vidlm.media.clip import clock

    if len(media) > 1 or not stream.frames:
        return ""
    return f", {clock(stream.frames[0].pts)} to {clock(stream.frames[-1].pts)}"


def _first_token(stream: AnswerStream, media: list[Any], progress: Progress) -> Iterator[str]:
    """Wait for the first piece of the answer, and tell what led to it."""
    counted, tokens = _counted(stream, media), stream.prompt_tokens
    progress.now(f"{counted}, {tokens:,} tokens")
    pieces = iter(stream)
    first = next(pieces, "")
    took = stream.timings
    progress.done(took.encode, "encode", counted)
    progress.done(took.prefill, "prefill", f"{tokens:,} tokens{_rate(tokens, took.prefill)}")
    return chain([first], pieces)


def _last_token(stream: AnswerStream, progress: Progress) -> None:
    count, seconds = stream.answer.usage.completion_tokens, stream.timings.decode
    # The first token came from the prefill.
    progress.done(seconds, "answer", f"{count:,} tokens{_rate(count - 1, seconds)}")
    if stream.answer.finish is FinishReason.LENGTH:
        progress.note(f"the answer is cut off at {count:,} tokens (--max-tokens)")


def _rate(count: int, seconds: float) -> str:
    return f", {count / seconds:,.0f} tokens/s" if count > 0 and seconds > 0 else ""


def _say(pieces: Iterable[str]) -> None:
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    finally:
        print(flush=True)  # ends the line of an interrupted answer too
