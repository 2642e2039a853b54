"""What comes back: an answer with what it was based on, whole or piece by piece."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass, fields
from threading import RLock
from typing import Any, Self

from vidlm.api.turns import Turn
from vidlm.engine import Timings
from vidlm.errors import StreamClosed
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

    def __repr__(self) -> str:
        tokens = self.usage.completion_tokens
        seen = f"{len(self.frames)} frames, {tokens} tokens, {self.finish.value}"
        return f"<Answer {self.text!r:.80}, {seen}>"

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


class AnswerStream(Iterator[str]):
    """The text of an answer, piece by piece as it is generated; `answer` is the whole of it.

    `frames`, `prompt_tokens` and `timings` are there from the beginning. An error ends the stream:
    iteration raises it, and so does `answer`. Leaving a `with` block, `close` and dropping the
    stream end it early and free what the engine holds for it; there is no `answer` then.
    """

    def __init__(
        self,
        frames: tuple[FrameRef, ...],
        prompt_tokens: int,
        timings: Timings,
        pieces: Generator[str, None, Answer],
        turn: Turn,
    ) -> None:
        self.frames = frames
        self.prompt_tokens = prompt_tokens
        self.timings = timings
        self._pieces = pieces
        self._turn = turn
        self._outcome: Answer | Exception | None = None
        self._lock = RLock()  # a generator cannot be closed while another thread advances it

    def __next__(self) -> str:
        with self._lock:
            if self._outcome is not None:
                raise StopIteration
            self._turn.take()
            try:
                return next(self._pieces)
            except StopIteration as end:
                self._end(end.value)
                raise StopIteration from None
            except Exception as error:
                self._end(error)
                raise
            except BaseException:  # Ctrl-C
                self.close()
                raise

    @property
    def answer(self) -> Answer:
        """The whole answer; reads what has not been iterated over yet.

        Raises the error that ended the stream, or StreamClosed.
        """
        for _ in self:
            pass
        if isinstance(self._outcome, Answer):
            return self._outcome
        assert self._outcome is not None  # or the loop would go on
        raise self._outcome

    def close(self) -> None:
        """End the stream, and free at once what the engine holds for it. A chat takes the next
        question then, as if this one had not been asked. No effect on a stream that has ended."""
        with self._lock:
            if self._outcome is None:
                self._end(
                    StreamClosed(
                        "the stream was closed before its answer was complete; ask again, and "
                        "read the answer before closing"
                    )
                )

    def _end(self, outcome: Answer | Exception) -> None:
        self._outcome = outcome
        try:
            self._pieces.close()
        finally:
            self._turn.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_lock"):  # else it was not made
            self.close()

    def __repr__(self) -> str:
        state = {type(None): "unfinished", Answer: "finished", StreamClosed: "closed"}
        said = state.get(type(self._outcome), f"failed: {self._outcome!r}")
        return f"<AnswerStream {said}, {len(self.frames)} frames, {self.prompt_tokens} tokens>"
