"""What a family offers the engine and the names above it.

The engine sees a `VideoModel` and `Prompt`s and never a family: it embeds ids, lets the model
encode the media of each prompt, puts those features where the placeholders stand, and runs steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from vidlm.errors import InvalidArgument
from vidlm.media import Video
from vidlm.nn.decoder import Decoder
from vidlm.nn.step import Memory, Step
from vidlm.text import Tokenizer
from vidlm.weights import Renames

Kind = Literal["image", "video"]


@dataclass(frozen=True, eq=False)
class Media:
    """One preprocessed image or video of a prompt; a family may add fields of its own.

    pixels  as the family's processor makes them
    tokens  placeholders that it fills in the prompt
    frames  how many it has; an image has one
    """

    pixels: Tensor
    tokens: int
    kind: Kind = "image"
    frames: int = 1


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
    def placeholders(self) -> Mapping[Kind, int]:
        """The token that stands where the features of each kind of media go."""

    def tokens_per_frame(self, frames: int) -> int:
        """Placeholders of each frame of a video of so many; where the picture's size matters, of
        one of 1280 x 720 pixels, and before anything is left out because it repeats itself."""


@dataclass(frozen=True)
class Prompt:
    """One request as the engine takes it: ids with every placeholder expanded, and its media.

    The media of each kind come in the order of that kind's placeholders.
    """

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
    memory_in_decode: bool = False  # whether generated tokens, too, attend to a prompt's memory
    unquantized: tuple[str, ...] = ()  # parts that no scheme of fewer bits may touch
    penalises_prompt: bool = True  # whether a repetition penalty counts the prompt's tokens

    @property
    def decoder(self) -> Decoder:
        raise NotImplementedError

    @property
    def head(self) -> nn.Linear:
        """(T, D) -> (T, V)"""
        raise NotImplementedError

    def encode(self, media: Sequence[Media]) -> list[Encoded]:
        raise NotImplementedError

    def embed(self, ids: Tensor) -> Tensor:
        """(T,) -> (T, D)"""
        return self.decoder.embed_tokens(ids)

    def hidden(self, x: Tensor, step: Step) -> Tensor:
        """(T, D) -> (T, D) after the last norm"""
        return self.decoder(x, step)

    def readers(self, ids: Tensor) -> Tensor:
        """Which of a prompt's tokens (T,) attend to its memory: (T,) bool. Here, all text."""
        media = torch.tensor(list(self.config.placeholders.values()), device=ids.device)
        return torch.isin(ids, media, invert=True)

    def logits(self, h: Tensor) -> Tensor:
        """(T, D) -> (T, V)"""
        return self.head(h)

    def tie(self) -> None:
        """Share parameters the config declares tied; called after parameters were replaced."""
        if self.config.text_config.tie_word_embeddings:
            self.head.weight = self.decoder.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """That of weights which are numbers, not codes of fewer bits."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())


class Processor(Protocol):
    """Text and media of one request -> Prompt. Batching and padding belong to `vidlm.hf`.

    image_pixels, video_pixels  how each becomes pixels, and its words in the checkpoint's files
    image_token, video_token    what stands in the text for each; without a video_token a video is
                                its frames as images
    """

    tokenizer: Tokenizer
    image_pixels: Any
    video_pixels: Any
    image_token: str
    video_token: str | None

    @classmethod
    def from_folder(cls, folder: Path) -> Processor: ...

    def save(self, folder: Path) -> None: ...

    def media(self, images: Sequence[Any], videos: Sequence[Video]) -> list[Media]:
        """The images and then the videos of one call."""

    def places(self, media: Media) -> tuple[str, list[int]]:
        """The text that takes the place of a media's token, and how many placeholders each token
        of its kind in that text becomes."""


@dataclass(frozen=True)
class Family:
    """The four things of a family's file, and which frames it takes of a video unless told.

    `sampling` is in the words of `vidlm.media.load_video`.
    """

    config: type[Any]
    renames: Renames
    processor: type[Any]
    model: type[VideoModel]
    sampling: Mapping[str, Any] = field(default_factory=lambda: {"num_frames": 8})

    def sampling_of(self, config: Any) -> Mapping[str, Any]:
        """That of a checkpoint, whose config may say its own."""
        own: Mapping[str, Any] | None = getattr(config, "sampling", None)
        return self.sampling if own is None else own


def memory_of(encoded: Sequence[Encoded]) -> Memory | None:
    """The memory of a prompt with these media: theirs, one behind the other."""
    parts = [item.memory for item in encoded if item.memory is not None]
    return Memory(torch.cat(parts)) if parts else None


def insert(
    x: Tensor,
    ids: Tensor,
    placeholders: Mapping[Kind, int],
    media: Sequence[Media],
    encoded: Sequence[Encoded],
) -> Tensor:
    """Embedded tokens x (T, D) with the features of `encoded` where `ids` (T,) has placeholders.

    Raises InvalidArgument where the numbers differ: a prompt cut in its media, or media forgotten.
    """
    for kind, placeholder in placeholders.items():
        mine = [e.tokens for m, e in zip(media, encoded, strict=True) if m.kind == kind]
        places = (ids == placeholder).nonzero()[:, 0]
        features = sum(len(tokens) for tokens in mine)
        if len(places) != features:
            raise InvalidArgument(
                f"the prompt has {len(places)} {kind} placeholder tokens and the {kind}s given "
                f"make {features}; pass as many {kind}s as the prompt names, and the processor's "
                "output unshortened"
            )
        if mine:
            x = x.index_copy(0, places, torch.cat(mine).to(x))
    return x
