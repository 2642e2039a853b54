"""What a family offers the engine and the names above it.

The engine sees a `VideoModel` and `Prompt`s and never a family: it embeds ids, lets the model
encode the media of each prompt, puts those features where the placeholders stand, and runs steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from vidlm.errors import InvalidArgument
from vidlm.media import Video
from vidlm.nn.step import Step
from vidlm.text import Tokenizer
from vidlm.weights import Renames

Media = Tensor  # preprocessed pixels of one image or frame, as the family's processor makes them


class Config(Protocol):
    """A family's frozen configuration."""

    model_type: ClassVar[str]

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Config: ...

    def to_dict(self) -> dict[str, Any]: ...

    @property
    def max_context(self) -> int:
        """Tokens a prompt and its answer may take together."""

    @property
    def placeholder_id(self) -> int:
        """The token that stands where media features go."""

    @property
    def tokens_per_frame(self) -> int:
        """Placeholders of one image or video frame."""


@dataclass(frozen=True)
class Prompt:
    """One request as the engine takes it: ids with every placeholder expanded, and its media."""

    ids: tuple[int, ...]
    media: tuple[Media, ...] = ()


@dataclass(frozen=True)
class Encoded:
    """Features of one media item: `tokens` (M, D) replace its placeholders.

    `memory` (S, D) is for layers that attend to more than the tokens, None elsewhere.
    """

    tokens: Tensor
    memory: Tensor | None = None


class VideoModel(nn.Module):
    """The seam between families and engine. Everything is token-packed; see `vidlm.nn.step`."""

    config: Any

    def encode(self, media: Sequence[Media]) -> list[Encoded]:
        raise NotImplementedError

    def embed(self, ids: Tensor) -> Tensor:
        """(T,) -> (T, D)"""
        raise NotImplementedError

    def hidden(self, x: Tensor, step: Step, trace: list[Tensor] | None = None) -> Tensor:
        """(T, D) -> (T, D) after the last norm; `trace` collects every layer's input."""
        raise NotImplementedError

    def logits(self, h: Tensor) -> Tensor:
        """(T, D) -> (T, V)"""
        raise NotImplementedError

    def tie(self) -> None:
        """Share parameters the config declares tied; called after parameters were replaced."""

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


class Processor(Protocol):
    """Text and media of one request -> Prompt. Batching and padding belong to `vidlm.hf`."""

    tokenizer: Tokenizer

    @classmethod
    def from_folder(cls, folder: Path) -> Processor: ...

    def save(self, folder: Path) -> None: ...

    def pixels(self, images: Sequence[Any]) -> Tensor: ...

    def tokens_of(self, pixels: Sequence[Media]) -> list[int]: ...

    def video_parts(self, video: Video) -> list[dict[str, Any]]: ...


@dataclass(frozen=True)
class Family:
    """The four things of a family's file, and the frames it takes of a video unless told."""

    config: type[Any]
    renames: Renames
    processor: type[Any]
    model: type[VideoModel]
    default_frames: int = 8


def insert(x: Tensor, ids: Tensor, placeholder: int, encoded: Sequence[Encoded]) -> Tensor:
    """Embedded tokens x (T, D) with the features of `encoded` where `ids` (T,) has placeholders.

    Raises InvalidArgument where the numbers differ: a prompt cut in its media, or media forgotten.
    """
    places = (ids == placeholder).nonzero()[:, 0]
    features = sum(len(item.tokens) for item in encoded)
    if len(places) != features:
        raise InvalidArgument(
            f"the prompt has {len(places)} media placeholder tokens and the media give {features}; "
            "pass as many images as the prompt names, and the processor's output unshortened"
        )
    if not encoded:
        return x
    tokens = torch.cat([item.tokens for item in encoded]).to(x)
    return x.index_copy(0, places, tokens)
