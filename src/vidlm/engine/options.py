"""What an engine is told when it is made, and what it tells of itself."""

from __future__ import annotations

from dataclasses import dataclass

from vidlm.engine.features import FeatureStats
from vidlm.engine.sequence import SchedulerStats
from vidlm.errors import InvalidArgument
from vidlm.types import checked, type_hints

BLOCK = 16  # tokens whose keys and values lie, and are shared, together
KV_DTYPES = (None, "int8")
EXACT_GRID = 512  # tokens prefilled at a time in exact mode


@dataclass(frozen=True)
class EngineOptions:
    """How much an engine may hold, and what it may remember.

    kv_bytes       for keys and values; None: half of what is free when the engine is made. On a
                   CPU it is taken only as tokens are stored.
    feature_bytes  for features of media that may be asked about again
    max_sequences  answers under way at a time; others wait
    chunk          tokens of prompts prefilled in a step: what an answer under way waits for
    idle_chunk     the same where none waits, shared evenly among a prompt's steps: more at once is
                   computed faster
    share          whether prompts with the same beginning share its keys and values, and the same
                   media their features
    exact          every token is computed in the same shapes whoever else is served and whatever
                   was cached, so that in bfloat16, too, an answer is the same alone and in company;
                   media are encoded and answers decoded one after the other
    cuda_graphs    whether a GPU decodes by recordings of its kernels, made at the first step of a
                   kind; for models that are on one GPU as a whole and have no memory
    kv_dtype       what keys and values are stored as: "int8", which takes half of bfloat16's room
                   and changes answers a little; None: the model's dtype
    """

    kv_bytes: int | None = None
    feature_bytes: int = 1 << 30
    max_sequences: int = 64
    chunk: int = 512
    idle_chunk: int = 3072
    share: bool = True
    exact: bool = False
    cuda_graphs: bool = False
    kv_dtype: str | None = None

    def __post_init__(self) -> None:
        for name, kind in type_hints(EngineOptions).items():
            checked(name, getattr(self, name), kind)
        for name in ("kv_bytes", "max_sequences", "chunk", "idle_chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidArgument(f"{name}={value}; allowed: at least 1")
        if self.kv_dtype not in KV_DTYPES:
            raise InvalidArgument(
                f"kv_dtype={self.kv_dtype!r}; allowed: 'int8', or None for the model's dtype"
            )
        if self.exact and self.cuda_graphs:
            raise InvalidArgument(
                "exact=True and cuda_graphs=True exclude each other: recordings have other shapes "
                "in company than alone; leave one of them out"
            )
        if self.feature_bytes < 0:
            raise InvalidArgument(f"feature_bytes={self.feature_bytes}; allowed: 0 (none) or more")


@dataclass(frozen=True)
class EngineStats:
    """What an engine does and has spared since it was made or cleared.

    scheduler  requests by state, and blocks of keys and values: those in use, those kept, tokens
               found in them
    features   of media: found, made, kept
    prefilled  tokens of prompts that were computed; those found stored are not among them
    decoded    tokens of answers that were computed
    """

    scheduler: SchedulerStats
    features: FeatureStats
    prefilled: int
    decoded: int
