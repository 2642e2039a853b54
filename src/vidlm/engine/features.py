"""Features of media that were encoded before: the least recently used go first."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from vidlm.models.base import Encoded


@dataclass(frozen=True)
class FeatureStats:
    """Media that were found, that had to be encoded, that were dropped for want of room, and what
    is kept now."""

    hits: int
    made: int
    evicted: int
    items: int
    bytes: int


class FeatureCache:
    """Encoded media by their digest, at most `capacity` bytes of them. One model's: a digest says
    nothing of weights."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._kept: OrderedDict[bytes, Encoded] = OrderedDict()
        self._bytes = self._hits = self._made = self._evicted = 0

    def get(self, digest: bytes) -> Encoded | None:
        found = self._kept.get(digest)
        if found is not None:
            self._hits += 1
            self._kept.move_to_end(digest)
        return found

    def put(self, digest: bytes, encoded: Encoded) -> None:
        """Keep what was made, unless it alone is too large."""
        self._made += 1
        size = size_of(encoded)
        if digest in self._kept or size > self._capacity:
            return
        self._kept[digest] = encoded
        self._bytes += size
        while self._bytes > self._capacity:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= size_of(oldest)
            self._evicted += 1

    def clear(self) -> None:
        self._kept.clear()
        self._bytes = 0

    @property
    def stats(self) -> FeatureStats:
        return FeatureStats(self._hits, self._made, self._evicted, len(self._kept), self._bytes)


def size_of(encoded: Encoded) -> int:
    return encoded.tokens.nbytes + (0 if encoded.memory is None else encoded.memory.nbytes)
