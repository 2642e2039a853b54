"""The keywords of `ask`, `stream`, `chat` and `video`: their names and types, and what they become.

The TypedDicts are what editors complete and type checkers hold calls against; at run time the same
names and types are checked here. docs/python.md has a table of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from vidlm.api.progress import ProgressHook
from vidlm.errors import InvalidArgument, unknown_keyword
from vidlm.hf import ForConditionalGeneration, FrameOptions
from vidlm.hf.generation import read_call
from vidlm.types import SamplingParams, checked, type_hints


class FrameKeywords(TypedDict, total=False):
    """Which frames of each video to take, as `vidlm.media.load_video` takes them."""

    frames: int | None  # so many, evenly spread
    num_frames: int | None  # another name of `frames`, that of load_video
    fps: float | None  # so many a second
    min_frames: int | None  # the least that fps may give
    max_frames: int | None  # the most that fps may give
    start: float | str | None  # seconds or "mm:ss"
    end: float | str | None
    sampling: str | None  # a rule by name
    indices: Sequence[int] | NDArray[Any] | None  # exactly these, by number
    times: Sequence[float | str] | NDArray[Any] | None  # exactly those on screen then


class SamplingKeywords(TypedDict, total=False):
    """How an answer is chosen, token by token, and when it ends; None: as if it were not given."""

    max_tokens: int | None  # the longest answer
    max_new_tokens: int | None  # another name of `max_tokens`, that of generate
    min_new_tokens: int | None  # the shortest answer
    temperature: float | None  # above 0 samples
    top_k: int | None  # sample from so many of the likeliest tokens
    top_p: float | None  # sample from the likeliest tokens of this probability together
    min_p: float | None  # sample from tokens of at least this share of the likeliest one's
    repetition_penalty: float | None  # above 1 makes tokens that were used less likely
    seed: int | None  # makes sampling repeatable
    stop: str | Sequence[str] | None  # texts that end the answer
    num_beams: int | None  # beam search
    length_penalty: float | None  # of beam search; above 0 favours long answers
    early_stopping: bool | None  # of beam search
    logprobs: int | None  # log-probabilities, with so many of the likeliest tokens


class TurnKeywords(SamplingKeywords, total=False):
    """Of one question."""

    progress: ProgressHook | None  # is called with a Progress while the question is answered


class AskKeywords(FrameKeywords, TurnKeywords, total=False):
    """Of `ask`, `stream` and `chat`."""

    system: str | None  # a system prompt
    fit: bool  # no more frames than fit into context and memory


CONVERSATION = ("system", "fit", "progress")
TARGETS = {"frames": "num_frames", "max_tokens": "max_new_tokens", "stop": "stop_strings"}
SHOWN = {target: name for name, target in TARGETS.items()}


def read_frames(options: Mapping[str, Any], call: str) -> FrameOptions:
    """Keywords that choose frames; raises UnknownKeyword, or InvalidArgument, on others."""
    frames, sampling = read_options(options, call)
    if others := [*sampling, *(name for name in CONVERSATION if name in options)]:
        names = ", ".join(SHOWN.get(name, name) for name in others)
        raise InvalidArgument(f"{names} belong to a question; {call} takes what chooses frames")
    return frames


def read_sampling(options: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of a chat's further turns; raises UnknownKeyword, or InvalidArgument, on others."""
    for name in options:
        if name in type_hints(AskKeywords) and name not in type_hints(TurnKeywords):
            what = "frames are" if name in type_hints(FrameKeywords) else f"{name} is"
            raise InvalidArgument(f"{what} chosen once for a chat; pass them to lm.chat()")
        if name not in type_hints(TurnKeywords):
            raise unknown_keyword("Chat.ask()", name, type_hints(TurnKeywords))
    return read_options(options, "Chat.ask()")[1]


def read_options(options: Mapping[str, Any], call: str) -> tuple[FrameOptions, dict[str, Any]]:
    """Keywords as frame options and what `sampling_params` takes. The values of those that choose
    frames are checked where frames are chosen. Raises UnknownKeyword or InvalidArgument."""
    known = type_hints(AskKeywords)
    frames: dict[str, Any] = {}
    sampling: dict[str, Any] = {}
    for name, value in options.items():
        if name not in known:
            raise unknown_keyword(call, name, known)
        target = TARGETS.get(name, name)
        if target != name and None not in (value, options.get(target)):
            raise InvalidArgument(
                f"{name}={value!r} and {target}={options[target]!r} mean the same; give one of them"
            )
        if isinstance(value, np.ndarray):
            value = value.tolist()
        if name in type_hints(FrameKeywords):
            frames[target] = value if value is not None else frames.get(target)
        elif name == "progress":
            if value is not None and not callable(value):
                raise InvalidArgument(f"progress={value!r}; allowed: a function, or None")
        else:
            value = checked(name, value, known[name])
            if name in type_hints(SamplingKeywords):
                sampling[target] = value if value is not None else sampling.get(target)
    return FrameOptions(**frames), sampling


@contextmanager
def spelled(options: Mapping[str, Any]) -> Iterator[None]:
    """Let errors call a keyword what the user did."""
    names = {**SHOWN, **{name: name for name in SHOWN if options.get(name) is not None}}
    try:
        yield
    except InvalidArgument as error:
        pattern = rf"(?<![\w.])({'|'.join(names)})\b"  # not the fields of a file
        error.args = (re.sub(pattern, lambda match: names[match[0]], str(error)),)
        raise


def plain(frames: FrameOptions) -> dict[str, Any]:
    """What was given, in values that JSON gives back as they are."""
    return {name: _plain(value) for name, value in frames.given().items()}


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return value
    if hasattr(value, "tolist"):  # an array, or a number of numpy's
        return value.tolist()
    return [_plain(each) for each in value] if isinstance(value, Sequence) else value


def sampling_params(
    model: ForConditionalGeneration, sampling: Mapping[str, Any], prompt_tokens: int
) -> SamplingParams:
    """The keywords over the checkpoint's generation defaults."""
    said = {name: value for name, value in sampling.items() if name != "logprobs"}
    eos = model.config.text_config.eos_token_id
    call = read_call(said, model.generation_config, prompt_length=prompt_tokens, eos=eos)
    return replace(call.params, n=1, logprobs=sampling.get("logprobs"))
