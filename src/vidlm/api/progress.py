"""How far loading or a question is, told to a function of the caller's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from vidlm.engine import Timings

Stage: TypeAlias = Literal[
    "resolve", "load", "decode", "preprocess", "encode", "prefill", "generate"
]

CHUNKED: tuple[Stage, ...] = ("encode", "prefill")


@dataclass(frozen=True)
class Progress:
    """`done` of `total` in a stage; `total` is None where it is not known before the end.

    resolve     the checkpoint's files, found or downloaded, and its processor, of 1
    load        the weights, of 1
    decode      sources that were read
    preprocess  the prompt, of 1
    encode      chunks of frames that the vision tower encoded
    prefill     chunks of the prompt that were computed
    generate    tokens of the answer, of the most it may have
    """

    stage: Stage
    done: int
    total: int | None


ProgressHook: TypeAlias = Callable[[Progress], object]


def silent(progress: Progress) -> None:
    """For callers that have no hook."""


class ReportedTimings(Timings):
    """The timings of a request whose encoding and prefill are told to a hook.

    The engine adds to them between its steps, in whichever thread makes the step; so an error of
    the hook waits in `error` for the thread that asked.
    """

    def __init__(self, hook: ProgressHook) -> None:
        super().__init__()
        self._hook = hook
        self._chunks = dict.fromkeys(CHUNKED, 0)
        self.error: BaseException | None = None

    def add(self, name: str, seconds: float) -> None:
        super().add(name, seconds)
        for stage in CHUNKED:
            if stage == name and self.error is None:
                self._chunks[stage] += 1
                try:
                    self._hook(Progress(stage, self._chunks[stage], None))
                except BaseException as error:
                    self.error = error

    def plain(self) -> Timings:
        return Timings(**self.to_dict())
