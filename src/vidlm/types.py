"""The nouns every layer shares: frozen, checked once where they are made, and free of torch."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from vidlm.errors import InvalidArgument

MAX_CHOICES = 64
MAX_LOGPROBS = 20
GREEDY_BELOW = 1e-5  # a temperature: logits divided by less than that may overflow (as in vLLM)
MAX_LENGTH_PENALTY = 32  # so that no length to this power overflows


class FinishReason(StrEnum):
    """Why an answer ended."""

    STOP = "stop"  # an end-of-sequence token or a stop string
    LENGTH = "length"  # max_new_tokens reached


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen and when to stop.

    Greedy unless `temperature` is at least 1e-5; below, it becomes 0. The filters apply in this
    order: repetition penalty, min_new_tokens, temperature, top_k, top_p, min_p (the order of
    transformers' logits processors). `top_k=0`, `top_p=1`, `min_p=0` and `repetition_penalty=1`
    are off. `seed=None` draws from torch's global generator. `n` asks for as many answers, of
    which each draws with a seed one higher. `logprobs` asks for the log-probability of each token,
    and of so many of the likeliest beside it.

    Raises InvalidArgument on a value of another type or out of range.
    """

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool = False
    n: int = 1
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, kind in type_hints(SamplingParams).items():
            object.__setattr__(self, name, checked(name, getattr(self, name), kind))
        if 0 <= self.temperature < GREEDY_BELOW:
            object.__setattr__(self, "temperature", 0.0)
        self._check("max_new_tokens", self.max_new_tokens >= 1, "at least 1")
        self._check(
            "min_new_tokens",
            0 <= self.min_new_tokens <= self.max_new_tokens,
            f"from 0 to max_new_tokens ({self.max_new_tokens})",
        )
        self._check("temperature", self.temperature >= 0, "0 (greedy) or more")
        self._check("top_k", self.top_k >= 0, "0 (off) or more")
        self._check("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (off)")
        self._check("min_p", 0 <= self.min_p <= 1, "from 0 (off) to 1")
        positive = 0 < self.repetition_penalty < math.inf
        self._check("repetition_penalty", positive, "above 0, and finite; 1 is off")
        self._check("num_beams", self.num_beams >= 1, "at least 1")
        self._check("n", 1 <= self.n <= MAX_CHOICES, f"from 1 to {MAX_CHOICES}")
        self._check(
            "logprobs",
            self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
            f"None, or from 0 to {MAX_LOGPROBS} likeliest tokens beside the chosen one",
        )
        self._check("stop", all(self.stop), "non-empty strings")
        most = MAX_LENGTH_PENALTY
        self._check("length_penalty", abs(self.length_penalty) <= most, f"from -{most} to {most}")
        in_range = self.seed is None or 0 <= self.seed < 2**63
        self._check("seed", in_range, "None, or from 0 to 2**63 - 1")
        if self.num_beams > 1 and self.temperature > 0:
            raise InvalidArgument(
                f"num_beams={self.num_beams} with temperature={self.temperature}: beam search is "
                "deterministic here; use num_beams=1 to sample or temperature=0 for beams"
            )
        if self.num_beams > 1 and (self.n > 1 or self.logprobs is not None):
            raise InvalidArgument(
                f"num_beams={self.num_beams} with n={self.n}, logprobs={self.logprobs}: beams give "
                "one answer without log-probabilities; use num_beams=1"
            )
        if self.num_beams > 1 and self.stop:
            raise InvalidArgument(
                f"stop={self.stop!r} with num_beams={self.num_beams}: beams cannot be stopped by "
                "strings, only by eos_token_ids; use num_beams=1 or leave stop out"
            )

    def _check(self, name: str, good: bool, allowed: str) -> None:
        if not good:
            raise InvalidArgument(f"{name}={getattr(self, name)!r}; allowed: {allowed}")


@dataclass(frozen=True)
class FrameRef:
    """A frame an answer was based on: which of the media, its index and its time in seconds."""

    media: int
    index: int
    pts: float


@dataclass(frozen=True)
class Usage:
    """Tokens of one answer. `media_tokens` is the part of `prompt_tokens` that media took."""

    prompt_tokens: int
    media_tokens: int
    completion_tokens: int


KINDS = {int: "a whole number", float: "a finite number", bool: "True or False", str: "a text"}
MANY = {int: "whole numbers", float: "numbers", str: "texts", float | str: "numbers or texts"}


def checked(name: str, value: Any, kind: Any) -> Any:
    """`value` as `kind`, which is a type like those of SamplingParams' fields: numbers of other
    libraries become Python's. Raises InvalidArgument, naming what is allowed."""
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    for each in kinds:
        try:
            return _converted(value, each)
        except (TypeError, ValueError):
            continue
    allowed = " or ".join(KINDS.get(each) or _plural(each) for each in kinds)
    raise InvalidArgument(f"{name}={value!r}; allowed: {allowed}")


@lru_cache
def type_hints(kind: type[Any]) -> dict[str, Any]:
    return get_type_hints(kind)


def _plural(kind: Any) -> str:
    return "None" if kind is NoneType else f"a list of {MANY[get_args(kind)[0]]}"


def _converted(value: Any, kind: Any) -> Any:
    if kind in (NoneType, bool, str):
        if isinstance(value, kind):
            return value
    elif kind is int:
        if not isinstance(value, bool):
            return operator.index(value)
    elif kind is float:
        if not isinstance(value, bool | str | bytes) and math.isfinite(value):
            return value if isinstance(value, int | float) else float(value)
    elif isinstance(value, Collection) and not isinstance(value, str | bytes | Mapping):
        return tuple(_converted(each, get_args(kind)[0]) for each in value)
    raise TypeError
