"""What a family offers the engine and the names above it.

The engine sees a `VideoModel` and `Prompt`s and never a family: it embeds ids, lets the model
encode the media of each prompt, puts those features where the placeholders stand, and runs steps.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from vidlm import native
from vidlm.errors import InvalidArgument
from vidlm.media import Video
from vidlm.nn.decoder import Decoder
from vidlm.nn.linear import linear
from vidlm.nn.placed import device_of
from vidlm.nn.step import Memory, Step
from vidlm.text import Tokenizer
from vidlm.weights import Renames

Kind = Literal["image", "video"]
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Media:
    """One preprocessed image or video of a prompt; a family may add fields of its own: tensors,
    numbers, text, None, and tuples of these but tensors.

    pixels   as the family's processor makes them
    tokens   placeholders that it fills in the prompt
    frames   how many it has; an image has one
    encoded  its features, where they are there already: nothing is encoded then
    named    its digest, where the pixels that it is of are gone
    origin   digest of the file that its features were read from; None where they are the model's
    """

    pixels: Tensor
    tokens: int
    kind: Kind = "image"
    frames: int = 1
    encoded: Encoded | None = field(default=None, kw_only=True)
    named: bytes | None = field(default=None, kw_only=True, repr=False)
    origin: bytes | None = field(default=None, kw_only=True, repr=False)

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that stand for all that its features and its text in the prompt depend on."""
        if self.named is not None:
            return self.named
        hashed = blake2b(repr(type(self).__name__).encode(), digest_size=16)
        for each in own_fields(type(self)):
            value = getattr(self, each)
            if isinstance(value, Tensor):
                hashed.update(f"\0{each}\0{value.dtype}{tuple(value.shape)}\0".encode())
                hashed.update(raw_bytes(value))
            else:  # a repr has no NUL in it, so that no two media can be written alike
                hashed.update(f"\0{each}\0{value!r}\0".encode())
        return hashed.digest()

    def from_file(self, origin: bytes) -> Media:
        """The same item as the file of this digest describes it. Nobody can tell whether the file
        says the truth about the video, so its digest is one that no other file and no pixels
        have."""
        rooted = blake2b(origin + self.digest, digest_size=16).digest()
        return replace(self, named=rooted, origin=origin)

    def flaw(self) -> str | None:
        """Which fields do not fit each other; None: all do. A family's own fields are its own."""
        return None

    def without_pixels(self, encoded: Encoded | None = None) -> Media:
        """The same item of the same digest, with `encoded` (or what it has) for its pixels."""
        kept = self.encoded if encoded is None else encoded
        return replace(self, pixels=self.pixels.new_empty(0), encoded=kept, named=self.digest)


def own_fields(kind: type[Media]) -> tuple[str, ...]:
    """The fields that say what an item is, pixels first; not what was made of it."""
    return tuple(f.name for f in fields(kind) if f.name not in ("encoded", "named", "origin"))


def raw_bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]  # it is a buffer


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

    def video_tokens(self, frames: int) -> int:
        """Placeholders of a video of so many frames; where the picture's size matters, of 1280 x
        720 pixels, and before anything is left out because it repeats itself."""

    def held_bytes(self, frames: int, itemsize: int) -> int:
        """What such a video holds until it is answered, beside keys and values of its tokens:
        pixels, features of `itemsize` bytes a number, and keys and values of a memory."""

    def tower_bytes(self, itemsize: int) -> int:
        """Memory that the vision tower works in: that of one chunk, whatever the video. Roughly."""


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
    has_memory: bool = False  # whether layers attend to more than tokens: `Encoded.memory`
    memory_in_decode: bool = False  # whether generated tokens, too, attend to a prompt's memory
    unquantized: tuple[str, ...] = ()  # parts that no scheme of fewer bits may touch
    penalises_prompt: bool = True  # whether a repetition penalty counts the prompt's tokens
    media_types: tuple[type[Media], ...] = (Media,)  # what its processor makes

    @cached_property
    def spare(self) -> native.Spare:
        """Memory of keys and values which one `generate` leaves for the next."""
        return native.Spare()

    @property
    def body(self) -> Any:
        """What holds all parts but the head: `model`, or the network itself where it was made
        without a head."""
        return self._modules.get("model", self)

    @property
    def decoder(self) -> Decoder:
        decoder: Decoder = self.body.language_model
        return decoder

    @property
    def head(self) -> nn.Linear:
        """(T, D) -> (T, V)"""
        head: Any = self.lm_head
        return head

    def encode(self, media: Sequence[Media], *args: Any, **kwargs: Any) -> list[Encoded]:
        """The features of each item; a family may take more arguments, which it documents."""
        return finished(self.encoding(media, *args, **kwargs))

    def encoding(
        self, media: Sequence[Media], *args: Any, **kwargs: Any
    ) -> Generator[None, None, list[Encoded]]:
        """`encode` in steps: yields after each chunk of frames, so that others can be served in
        between. Memory in use is that of one chunk and of the result. Items that have their
        features keep them."""
        for item in media:
            _check_encodable(item, bool(args or kwargs))
        fresh = [item for item in media if item.encoded is None]
        made = iter((yield from self._encoding(fresh, *args, **kwargs)))
        return [next(made) if item.encoded is None else item.encoded for item in media]

    def _encoding(
        self, media: Sequence[Media], *args: Any, **kwargs: Any
    ) -> Generator[None, None, list[Encoded]]:
        """`encoding` of items none of which has features."""
        raise NotImplementedError

    def embed(self, ids: Tensor) -> Tensor:
        """(T,) -> (T, D)"""
        return self.decoder.embed_tokens(ids)

    def hidden(self, x: Tensor, step: Step) -> Tensor:
        """(T, D) -> (T, D) after the last norm"""
        return self.decoder(x, step)

    def readers(self, ids: Tensor) -> Tensor:
        """Which of a prompt's tokens (T,) attend to its memory: (T,) bool. Here, all text."""
        placeholders = [*self.config.placeholders.values()]
        media = torch.tensor(placeholders, dtype=ids.dtype, device=ids.device)
        return torch.isin(ids, media, invert=True)

    def logits(self, h: Tensor) -> Tensor:
        """(T, D) -> (T, V)"""
        return linear(self.head, h)

    def tie(self) -> None:
        """Share parameters the config declares tied; called after parameters were replaced."""
        if self.config.text_config.tie_word_embeddings:
            self.head.weight = self.decoder.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        """Where tokens go in and logits come out; layers may be elsewhere."""
        return next(self.parameters()).device

    @property
    def layer_devices(self) -> list[torch.device]:
        """Where each layer of the decoder runs, and its keys and values are."""
        return [device_of(layer) for layer in self.decoder.layers]

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


class Rows:
    """Rows that come a chunk at a time, written into memory that is allocated once: joining a list
    of chunks at the end would hold everything twice. With gradients they are joined, as a write
    into a tensor would keep a copy of each chunk's gradient as large as the whole."""

    def __init__(self, count: int) -> None:
        self._count, self._filled = count, 0
        self._out: Tensor | None = None
        self._parts: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        if rows.requires_grad:
            self._parts.append(rows)
            return
        if self._out is None:
            self._out = rows.new_empty(self._count, *rows.shape[1:])
        self._out[self._filled : self._filled + len(rows)] = rows
        self._filled += len(rows)

    def whole(self) -> Tensor:
        if self._parts:
            return torch.cat(self._parts)
        assert self._out is not None
        assert self._filled == self._count
        return self._out


def finished(steps: Generator[None, None, T]) -> T:
    """What a generator returns."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            value: T = end.value
            return value


def _check_encodable(item: Media, told_how: bool) -> None:
    if item.encoded is not None and told_how:
        raise InvalidArgument(
            "an item whose features are there already cannot be encoded in another way (layers, "
            "strategy); give its pixels without features"
        )
    if item.encoded is None and item.named is not None:
        raise InvalidArgument(
            "an item was kept without its pixels and without its features; give the video or image "
            "again"
        )


def memory_of(encoded: Sequence[Encoded]) -> Memory | None:
    """The memory of a prompt with these media: theirs, one behind the other."""
    parts = [item.memory for item in encoded if item.memory is not None]
    if not parts:
        return None
    return Memory(torch.cat(parts) if len(parts) > 1 else parts[0])  # no copy of one


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
            x = x.index_copy(0, places, torch.cat([each.to(x) for each in mine]))
    return x
