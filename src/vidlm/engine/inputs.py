"""A prompt on its way into the model: its ids, and the features that go where media stand."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from vidlm.engine.features import FeatureCache
from vidlm.errors import InvalidArgument
from vidlm.models.base import Encoded, Media, Prompt, VideoModel, memory_of
from vidlm.nn.step import Memory
from vidlm.nn.upload import upload


class PromptInputs:
    """What a prompt's tokens are embedded as, chunk by chunk.

    With a cache (`use`), features come from there where they can, and go there when they are made,
    under keys that begin with `tag`: what besides the media they depend on. Raises InvalidArgument
    where placeholders and media do not fit each other.
    """

    def __init__(self, model: VideoModel, prompt: Prompt, tag: bytes = b"") -> None:
        self._model, self._prompt, self._tag = model, prompt, tag
        self._cache: FeatureCache | None = None
        self._ids = torch.tensor(prompt.ids, dtype=torch.int64, device="cpu")
        self._places = _places(model, self._ids, prompt.media)
        self._features: list[Encoded | None] = [None for _ in prompt.media]
        self._memory: Memory | None = None
        self._readers: Tensor | None = None
        self._was_read = False  # whether a token that attends to the memory was computed
        self.recall()

    def use(self, cache: FeatureCache) -> None:
        """Share features with other prompts from here on."""
        self._cache = cache
        self.recall()

    def recall(self) -> bool:
        """Take the features that are to be had; whether they are all."""
        for i, item in enumerate(self._prompt.media):
            if self._features[i] is None and item.encoded is not None:
                self._features[i] = self._checked(i, item.encoded)
            elif self._features[i] is None and self._cache is not None:
                self._features[i] = self._cache.get(self._tag + item.digest)
        return self.encoded

    @property
    def digests(self) -> list[bytes]:
        """Of all media, in order."""
        return [item.digest for item in self._prompt.media]

    @property
    def root(self) -> bytes:
        """What features, and all keys and values, depend on besides the prompt: the tag, and the
        first file that media were read from. It may bring keys and values of the text in front of
        its media, too, which no other prompt may find."""
        return self._tag + next((item.origin for item in self._prompt.media if item.origin), b"")

    @property
    def ids(self) -> tuple[int, ...]:
        return self._prompt.ids

    @cached_property
    def spans(self) -> list[tuple[int, int, bytes]]:
        """Of each media with placeholders: where its first and behind its last is, its digest."""
        media = self._prompt.media
        return [(start, stop, media[i].digest) for i, (start, stop) in self._stretches.items()]

    @cached_property
    def _stretches(self) -> dict[int, tuple[int, int]]:
        """Where each media with placeholders begins and ends, by its number."""
        found = {i: places for i, places in enumerate(self._places) if len(places)}
        return {i: (int(places[0]), int(places[-1]) + 1) for i, places in found.items()}

    @property
    def needs_memory(self) -> bool:
        """Whether layers will ask for a memory that is still to be made of all features."""
        return self._model.has_memory and bool(self._prompt.media) and self._memory is None

    @property
    def encoded(self) -> bool:
        return all(features is not None for features in self._features)

    def encoding(self, one_by_one: bool = False) -> Generator[None, None, None]:
        """Encode what is missing; gives way after each chunk of it. One by one, no item is in a
        chunk with another, so that its features do not depend on which others are missing."""
        self.recall()  # somebody else may have asked for the same meanwhile
        missing = self._missing()
        for some in [[each] for each in missing] if one_by_one else [missing]:
            made = yield from self._model.encoding([self._prompt.media[each[0]] for each in some])
            for each, encoded in zip(some, made, strict=True):
                self._keep(each, encoded)

    def _missing(self) -> list[list[int]]:
        """The media without features, those that are the same together."""
        alone = [i for i, features in enumerate(self._features) if features is None]
        if self._cache is None:
            return [[i] for i in alone]
        alike: dict[bytes, list[int]] = {}
        for i in alone:
            alike.setdefault(self._prompt.media[i].digest, []).append(i)
        return list(alike.values())

    def rows(self, ids: Sequence[int], start: int) -> Tensor:
        """The tokens `ids` (n,), which stand at `start` of prompt and answer, embedded: (n, D)."""
        device, stop = self._model.device, start + len(ids)
        x = self._model.embed(upload(torch.tensor(ids, dtype=torch.int64, device="cpu"), device))
        for i, (begin, end) in self._stretches.items():
            if begin < stop and start < end:
                places = self._places[i]
                span = torch.tensor([start, stop], dtype=torch.int64, device="cpu")
                first, last = torch.searchsorted(places, span).tolist()
                rows = upload(places[first:last] - start, device)
                tokens = upload(self._feature(i).tokens[first:last], device, x.dtype)
                x = x.index_copy(0, rows, tokens)
        return x

    @property
    def memory(self) -> Memory | None:
        """What the prompt's media leave layers to attend to beside its tokens."""
        if self.needs_memory:
            self._memory = memory_of([self._feature(i) for i in range(len(self._features))])
        return self._memory

    @property
    def answer_memory(self) -> Memory | None:
        """What of it generated tokens attend to."""
        return self.memory if self._model.memory_in_decode else None

    def prefilled(self) -> None:
        """Free what only a prompt needs. After a preemption it comes from the cache, or is made
        again."""
        if not self._model.memory_in_decode:
            self._memory = None
        elif self._memory is not None and self._was_read:
            self._memory.forget_tokens()  # every layer has made its keys and values of them
        self._features = [None for _ in self._features]

    def readers(self, start: int, stop: int) -> Tensor:
        """Which of the tokens [start, stop) of prompt and answer attend to the memory: (n,) bool.
        Those of an answer are recomputed here as they were computed at first."""
        if self._readers is None:
            self._readers = self._model.readers(self._ids.to(self._model.device))
        known = self._readers[start:stop]
        answer = known.new_full((stop - start - len(known),), self._model.memory_in_decode)
        found = torch.cat((known, answer))
        self._was_read = self._was_read or bool(found.any())
        return found

    def _feature(self, i: int) -> Encoded:
        found = self._features[i]
        if found is None:  # its keys and values were to come from a cache, and are gone from there
            found = self._model.encode([self._prompt.media[i]])[0]
            self._keep([i], found)
        return found

    def _keep(self, alike: Sequence[int], encoded: Encoded) -> None:
        for i in alike:
            self._features[i] = self._checked(i, encoded)
        if self._cache is not None:
            self._cache.put(self._tag + self._prompt.media[alike[0]].digest, encoded)

    def _checked(self, i: int, encoded: Encoded) -> Encoded:
        wanted, given = len(self._places[i]), len(encoded.tokens)
        if wanted != given:
            raise InvalidArgument(
                f"{self._prompt.media[i].kind} {i} has {wanted} placeholder tokens in the prompt "
                f"and {given} features; pass the processor's output unshortened"
            )
        return encoded


def _places(model: VideoModel, ids: Tensor, media: Sequence[Media]) -> list[Tensor]:
    """Of each media, where its placeholders are in the prompt."""
    found: list[Tensor] = [ids.new_empty(0) for _ in media]
    for kind, placeholder in model.config.placeholders.items():
        places = (ids == placeholder).nonzero()[:, 0]
        mine = [i for i, item in enumerate(media) if item.kind == kind]
        tokens = [media[i].tokens for i in mine]
        if len(places) != sum(tokens):
            raise InvalidArgument(
                f"the prompt has {len(places)} {kind} placeholder tokens and the {kind}s given "
                f"make {sum(tokens)}; pass as many {kind}s as the prompt names, and the "
                "processor's output unshortened"
            )
        for i, part in zip(mine, places.split(tokens) if tokens else (), strict=True):
            found[i] = part
    return found
