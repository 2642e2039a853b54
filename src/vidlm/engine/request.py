"""What goes into the engine and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass

from vidlm.models.base import Prompt
from vidlm.types import FinishReason, SamplingParams


@dataclass(frozen=True)
class Request:
    """A prompt and how to answer it.

    strict: a prompt with no room for an answer in the model's context is refused, and an answer
        ends with the context. If not, both go on beyond it, where the model was not trained.
    """

    prompt: Prompt
    params: SamplingParams
    strict: bool = True


@dataclass(frozen=True)
class Token:
    """One new token of a request; the last one of a choice has a `finish`.

    request  the number of its `Handle`; for `run`, its place among the requests
    choice   which of its `n` answers
    logprob  natural logarithm of its probability before any filter or temperature, and
    top      the likeliest tokens with theirs, likeliest first: where `logprobs` asked for them
    """

    request: int
    id: int
    finish: FinishReason | None = None
    choice: int = 0
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Failure:
    """A request that ended with an error, after which nothing of it follows."""

    request: int
    error: BaseException


@dataclass(frozen=True)
class Output:
    """New tokens of one answer (the prompt's are not repeated) and why they end."""

    ids: tuple[int, ...]
    finish: FinishReason
