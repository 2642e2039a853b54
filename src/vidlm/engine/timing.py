"""Seconds per stage of a request, from a source to its answer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass


@dataclass
class Timings:
    """Seconds spent in each stage. Requests of one batch share its encode, prefill and decode."""

    decode_media: float = 0.0  # container -> frames
    preprocess: float = 0.0  # frames -> pixels, text -> ids
    encode: float = 0.0  # pixels -> features
    prefill: float = 0.0  # prompt -> first token
    decode: float = 0.0  # every further token

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of a `with` block to the stage of this name."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - began)

    def add(self, name: str, seconds: float) -> None:
        """Add seconds to the stage of this name."""
        setattr(self, name, getattr(self, name) + seconds)

    @property
    def first_token(self) -> float:
        """Seconds from the source to the first token."""
        return self.decode_media + self.preprocess + self.encode + self.prefill

    def to_dict(self) -> dict[str, float]:
        return asdict(self)
