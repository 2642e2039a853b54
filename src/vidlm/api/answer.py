"""What comes back: an answer with what it was based on, whole or piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from vidlm.engine import Timings
from vidlm.types import FinishReason, FrameRef, Usage


@dataclass(frozen=True)
class Logprob:
    """A token, its text, and the natural logarithm of its probability before any filter or
    temperature; `top` has the likeliest tokens in its place, likeliest first."""

    id: int
    text: str
    logprob: float
    top: tuple[Logprob, ...] = ()


@dataclass(frozen=True)
class Answer:
    """An answer and what it was based on.

    frames    the video frames the model saw: which video, index and time in seconds of each
    warnings  what could not be read of the media
    logprobs  of every token, where `logprobs` asked for them
    """

    text: str
    frames: tuple[FrameRef, ...]
    usage: Usage
    timings: Timings
    finish: FinishReason
    warnings: tuple[str, ...] = ()
    logprobs: tuple[Logprob, ...] = ()

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; logprobs where there are any."""
        values: dict[str, Any] = {
            "text": self.text,
            "finish_reason": self.finish.value,
            "frames": [{f.name: getattr(ref, f.name) for f in fields(ref)} for ref in self.frames],
            "usage": {f.name: getattr(self.usage, f.name) for f in fields(self.usage)},
            "timings": {name: round(s, 4) for name, s in self.timings.to_dict().items()},
            "warnings": list(self.warnings),
        }
        if self.logprobs:
            values["logprobs"] = [asdict(each) for each in self.logprobs]
        return values


@dataclass
class AnswerStream:
    """Iterate over the text as it is generated; afterwards `answer` is the whole of it.

    `frames`, `prompt_tokens` and `timings` are there from the beginning.
    """

    frames: tuple[FrameRef, ...]
    prompt_tokens: int
    timings: Timings
    _pieces: Iterator[str]
    _finished: list[Answer] = field(default_factory=list)

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    @property
    def answer(self) -> Answer:
        """The finished answer; reads what has not been iterated over yet."""
        for _ in self._pieces:
            pass
        return self._finished[0]
