"""A video that is read, prepared and paid for once, and asked about as often as one likes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
from PIL import Image

from vidlm.api.index_fields import Index, printable
from vidlm.api.index_file import checked_name, damaged, read_index, write_index
from vidlm.api.keywords import AskKeywords, plain
from vidlm.api.sources import check_question
from vidlm.engine import Request, Timings, prefix_kv
from vidlm.engine.ambient import Autocast
from vidlm.engine.answers import budget_of
from vidlm.engine.inputs import PromptInputs
from vidlm.engine.store import weights_stamp
from vidlm.errors import InvalidArgument
from vidlm.hf import FrameOptions
from vidlm.media import is_image
from vidlm.models.base import Encoded, Media, Prompt
from vidlm.types import FrameRef, SamplingParams, checked

if TYPE_CHECKING:
    from vidlm.api.answer import Answer, AnswerStream
    from vidlm.api.chat import Chat
    from vidlm.api.lm import LM


LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class VideoHandle:
    """One source, ready for questions; `lm.video` makes it.

    It stands wherever `ask`, `stream` and `chat` take a source. Its features, and the keys and
    values of the prompt up to the question, stay in the engine's cache while there is room; its
    pixels are held as long as it is, so that they can be made again.

    name      of the source
    frames    which frames of it were taken
    warnings  what could not be read of it
    media     what the model gets, and `parts` how a message names it
    sampling  the keywords that chose the frames, as `vidlm.media.load_video` takes them
    made_by   the state of the model that made its features, where it was loaded without pixels
    """

    lm: LM = field(repr=False)
    name: str
    frames: tuple[FrameRef, ...] = field(repr=False)
    warnings: tuple[str, ...] = ()
    media: tuple[Media, ...] = field(default=(), repr=False)
    parts: tuple[dict[str, Any], ...] = field(default=(), repr=False)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    made_by: object = field(default=None, repr=False)

    @classmethod
    def read(cls, lm: LM, source: Any, frames: FrameOptions, timings: Timings) -> VideoHandle:
        """A source, with its frames chosen and made into pixels."""
        with timings.stage("decode_media"):
            user = {"role": "user", "content": [_part(source)]}
            read = lm.processor.read([user], frames)
        with timings.stage("preprocess"):
            media = lm.processor.media(read.images, read.videos)
        return cls(
            lm,
            _name(source),
            tuple(read.frames),
            tuple(read.warnings),
            tuple(media),
            tuple(read.messages[0]["content"]),
            plain(frames),
        )

    @classmethod
    def load(cls, lm: LM, path: Path, frames: FrameOptions) -> VideoHandle:
        """What `save` wrote. Raises InvalidArgument, naming what differs, where it was written by
        another model, dtype or version or with other frames than are asked for; MediaFetchError
        where the file may not be read."""
        path = lm.processor.reader.path(path)
        index, media, layers = read_index(path, lm.identity, lm.model, plain(frames))
        here = tuple(_on_device(item, lm) for item in media)
        prompt = Prompt(index.prompt, here)
        try:
            PromptInputs(lm.model, prompt)
        except InvalidArgument as error:
            raise damaged(path, error) from error
        if layers:
            lm.engine.store(prompt, layers)
        made_by = weights_stamp(lm.model)
        shown = (index.name, index.frames, index.warnings)
        return cls(lm, *shown, here, index.parts, index.sampling, made_by)

    def ask(self, question: str, **options: Unpack[AskKeywords]) -> Answer:
        """As `lm.ask`, about this video."""
        return self.lm.ask(self, question, **options)

    def stream(self, question: str, **options: Unpack[AskKeywords]) -> AnswerStream:
        """As `lm.stream`, about this video."""
        return self.lm.stream(self, question, **options)

    def chat(self, **options: Unpack[AskKeywords]) -> Chat:
        """As `lm.chat`, about this video."""
        return self.lm.chat(self, **options)

    def prompt(self, question: str, system: str | None = None) -> Prompt:
        """What the engine is asked by `ask`: for a `Request` to an engine of your own."""
        check_question(question)
        parts = [*self.parts, {"type": "text", "text": question}]
        messages = [*system_message(system), {"role": "user", "content": parts}]
        return self.lm.processor.chat_prompt(messages, self.media)

    def save(self, path: str | Path, *, kv: bool = True, system: str | None = None) -> None:
        """Write the features and, with `kv`, the keys and values of the prompt up to the question
        to a .safetensors file, which `lm.video(path)` answers from without the video.

        `system` is the system prompt that questions will have: it stands in front of the video.
        Keys and values are computed for it where the engine does not have them, and never under
        autocast. Those of an exact engine are of whole cells of 512 tokens: of a shorter prompt
        there are none, and a line of the log says so. Pixels are not kept; control characters in
        the name and in warnings are written as escapes. Raises InvalidArgument for another suffix,
        ContextOverflow where no question would fit, OutputError where it cannot be written.
        """
        path = checked_name(path)
        lm, engine = self.checked(self.lm, FrameOptions()).lm, self.lm.engine
        prompt = self._beginning(system)
        budget_of(lm.model, Request(prompt, SamplingParams(max_new_tokens=1)))
        with Autocast.off(lm.model).entered():
            encoded = engine.features(self.media)
            layers = prefix_kv(engine, prompt, encoded) if kv else []
        if kv and not layers:
            LOG.warning(
                "%s: no keys and values are saved, as the %d tokens of the prompt are less than "
                "the engine stores; the features are",
                *(path, len(prompt.ids)),
            )
        index = Index(
            identity=lm.identity,
            name=printable(self.name),
            frames=self.frames,
            warnings=tuple(map(printable, self.warnings)),
            parts=self.parts,
            sampling=self.sampling,
            prompt=prompt.ids,
        )
        write_index(path, index, self.media, encoded, layers)

    def checked(self, lm: LM, frames: FrameOptions) -> VideoHandle:
        """This handle. Raises InvalidArgument where it is not of this model as it is now, or has
        other frames than are asked for."""
        if self.lm is not lm:
            raise InvalidArgument(
                f"the handle of {self.name} was made by another model; make one with this "
                "model's lm.video()"
            )
        if self.made_by is not None and self.made_by != weights_stamp(lm.model):
            raise InvalidArgument(
                f"the handle of {self.name} was loaded from a file, and the model's weights were "
                "changed since; make it again from the video"
            )
        asked = plain(frames)
        if asked and asked != dict(self.sampling):
            raise InvalidArgument(
                f"the frames of {self.name} were chosen by {dict(self.sampling) or 'the default'}, "
                f"asked for now are {asked}; leave them out, or make another handle"
            )
        return self

    def _beginning(self, system: str | None) -> Prompt:
        """The prompt as far as it is the same whatever the question."""
        first, second = (self.prompt(text, system).ids for text in ("A", "7 z"))
        same = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), 0)
        return Prompt(first[:same], self.media)


def _name(source: Any) -> str:
    """A source for messages: its path or URL, also of a file or a loaded video; else its kind."""
    if isinstance(source, str | Path):
        return str(source)
    name = getattr(source, "name", None)
    return name if isinstance(name, str) else type(source).__name__


def system_message(text: str | None) -> list[dict[str, Any]]:
    """The messages of a conversation before its first turn."""
    if checked("system", text, str | None) is None:
        return []
    return [{"role": "system", "content": [{"type": "text", "text": text}]}]


def is_still(source: Any) -> bool:
    """Whether a source is an image, which is recognised by its name where it is a path."""
    if isinstance(source, str | Path):
        return is_image(source)
    return isinstance(source, Image.Image) or (isinstance(source, np.ndarray) and source.ndim == 3)


def _part(source: Any) -> dict[str, Any]:
    """A video, or an image where the source is recognised as one; a list is a video's frames."""
    if not is_still(source):
        return {"type": "video", "video": source}
    if isinstance(source, str | Path):
        return {"type": "image", "path": str(source)}
    return {"type": "image", "image": source}


def _on_device(item: Media, lm: LM) -> Media:
    """With its features where the model is."""
    if item.encoded is None:
        return item
    tokens, memory = item.encoded.tokens, item.encoded.memory
    device = lm.model.device
    here = Encoded(tokens.to(device), None if memory is None else memory.to(device))
    return replace(item, encoded=here)
