"""The simple face of vidlm: `lm = vidlm.load(...)`, `lm.ask("a.mp4", "What happens?")`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vidlm.engine import Request, Timings, run
from vidlm.errors import InvalidArgument, unknown_keyword
from vidlm.hf import (
    VIDEO_OPTIONS,
    AutoModelForImageTextToText,
    AutoProcessor,
    ForConditionalGeneration,
    FrameOptions,
    ProcessorMixin,
)
from vidlm.hf.generation import read_call
from vidlm.media import Video, is_image
from vidlm.models.base import Prompt
from vidlm.text import Detokenizer, StopStrings
from vidlm.types import FinishReason, FrameRef, SamplingParams, Usage

FRAME_KEYWORDS = {
    "frames": "num_frames",
    **{name: name for name in VIDEO_OPTIONS if name != "num_frames"},
}
SAMPLING_KEYWORDS = {
    "max_tokens": "max_new_tokens",
    "stop": "stop_strings",
    **{
        name: name
        for name in (
            *("max_new_tokens", "min_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed"),
            *("repetition_penalty", "num_beams", "length_penalty", "early_stopping"),
        )
    },
}


@dataclass(frozen=True)
class Answer:
    """An answer and what it was based on.

    frames    the video frames the model saw: which video, index and time in seconds of each
    warnings  what could not be read of the media
    """

    text: str
    frames: tuple[FrameRef, ...]
    usage: Usage
    timings: Timings
    finish: FinishReason
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "text": self.text,
            "finish_reason": self.finish.value,
            "frames": [{f.name: getattr(ref, f.name) for f in fields(ref)} for ref in self.frames],
            "usage": {f.name: getattr(self.usage, f.name) for f in fields(self.usage)},
            "timings": {name: round(s, 4) for name, s in self.timings.to_dict().items()},
            "warnings": list(self.warnings),
        }


@dataclass
class AnswerStream:
    """Iterate over the text as it is generated; afterwards `answer` is the whole of it.

    `frames`, `prompt_tokens` and `timings` are there from the beginning.
    """

    frames: tuple[FrameRef, ...]
    prompt_tokens: int
    timings: Timings
    _pieces: Iterator[str]
    _finished: list[Answer] = field(default_factory=list)

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    @property
    def answer(self) -> Answer:
        """The finished answer; reads what has not been iterated over yet."""
        for _ in self._pieces:
            pass
        return self._finished[0]


def load(
    name: str | Path,
    *,
    dtype: Any = None,
    device: Any = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> LM:
    """Load a model and its processor from a folder, a hub repository, or "demo".

    dtype   a torch dtype or its name; None: what the checkpoint is stored in
    device  "cpu", "cuda", "auto"; None: the CPU
    Raises ModelNotFound, HubUnreachable, UnsupportedModel or WeightsError.
    """
    where = {"revision": revision, "local_files_only": local_files_only}
    processor = AutoProcessor.from_pretrained(name, **where)
    model = AutoModelForImageTextToText.from_pretrained(
        name, dtype=dtype, device_map=device, **where
    )
    return LM(model, processor)


class LM:
    """A model that answers questions about videos and images.

    A source is a path, a URL, the bytes of a file, an open file, an array of frames, a loaded
    `Video`, a PIL image, or, inside a list of sources, a list of images: the frames of one video.
    Keywords of `ask`, `stream` and `chat`:

    frames or fps, min_frames, max_frames, start, end, sampling, indices, times    which frames of
        each video, as `vidlm.media.load_video` takes them; unless given, the family's rule:
        8 frames, for VideoLLaMA3 one a second (4 to 180)
    system                                   a system prompt
    max_tokens, min_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, stop,
    num_beams, length_penalty, early_stopping    as `generate` takes them; greedy unless given
    """

    def __init__(self, model: ForConditionalGeneration, processor: ProcessorMixin) -> None:
        self.model = model
        self.processor = processor

    def ask(self, media: Any, question: str, **options: Any) -> Answer:
        """Answer one question about one source or a list of them, in the order given.

        Raises MediaError where a source cannot be read, ContextOverflow where the frames do not
        fit, TypeError on an unknown keyword.
        """
        return self.stream(media, question, **options).answer

    def stream(self, media: Any, question: str, **options: Any) -> AnswerStream:
        """Like `ask`, piece by piece."""
        return self.chat(media, **options).stream(question)

    def chat(self, media: Any = None, **options: Any) -> Chat:
        """A conversation about the media; each question builds on the ones before."""
        return Chat(self, media, **options)

    def read_options(self, options: Mapping[str, Any]) -> tuple[FrameOptions, dict[str, Any]]:
        """Split keywords into frame options and generate keywords; raises TypeError on others."""
        frames, sampling = {}, {}
        for name, value in options.items():
            if name in FRAME_KEYWORDS:
                frames[FRAME_KEYWORDS[name]] = value
            elif name in SAMPLING_KEYWORDS:
                sampling[SAMPLING_KEYWORDS[name]] = value
            else:
                raise unknown_keyword(
                    "ask()", name, (*FRAME_KEYWORDS, *SAMPLING_KEYWORDS, "system")
                )
        return FrameOptions(**frames), sampling

    def params(self, sampling: Mapping[str, Any], prompt_tokens: int) -> SamplingParams:
        """The keywords over the checkpoint's generation defaults."""
        eos = self.model.config.text_config.eos_token_id
        defaults = self.model.generation_config
        return read_call(sampling, defaults, prompt_length=prompt_tokens, eos=eos).params


@dataclass(frozen=True)
class _Turn:
    """A conversation so far: messages that name their media, and these in order."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)
    videos: list[Video] = field(default_factory=list)


class Chat:
    """Several turns about the same media."""

    def __init__(
        self, lm: LM, media: Any = None, *, system: str | None = None, **options: Any
    ) -> None:
        self.lm = lm
        self._frames, self._sampling = lm.read_options(options)
        self._timings = Timings()
        self._turns = _Turn()
        if system is not None:
            part = {"type": "text", "text": system}
            self._turns.messages.append({"role": "system", "content": [part]})
        self._media = _parts(media)
        self.frames: tuple[FrameRef, ...] = ()
        self._warnings: tuple[str, ...] = ()

    @property
    def messages(self) -> list[dict[str, Any]]:
        """What was said so far; media parts hold nothing but their type."""
        return self._turns.messages

    def ask(self, question: str, **sampling: Any) -> Answer:
        """The answer to the next turn."""
        return self.stream(question, **sampling).answer

    def stream(self, question: str, **sampling: Any) -> AnswerStream:
        """The next turn, piece by piece. The turn joins the conversation when it is finished."""
        if not isinstance(question, str) or not question.strip():
            raise InvalidArgument(f"question={question!r}; ask something, as text")
        frames, changed = self.lm.read_options(sampling)
        if frames != FrameOptions():
            raise InvalidArgument("frames are chosen once for a chat; pass them to lm.chat()")
        timings, self._timings = self._timings, Timings()
        user = {"role": "user", "content": [*self._media, {"type": "text", "text": question}]}
        with timings.stage("decode_media"):
            read = self.lm.processor.read([user], self._frames)
        if self._media:
            self.frames, self._warnings = tuple(read.frames), tuple(read.warnings)
        turn = _Turn(
            [*self._turns.messages, *read.messages],
            [*self._turns.images, *read.images],
            [*self._turns.videos, *read.videos],
        )
        with timings.stage("preprocess"):
            text = self.lm.processor.render(turn.messages)
            prompt = self.lm.processor.prompt(text, turn.images, turn.videos)
        params = self.lm.params({**self._sampling, **changed}, len(prompt.ids))
        finished: list[Answer] = []
        pieces = self._run(prompt, params, timings, finished, turn)
        return AnswerStream(self.frames, len(prompt.ids), timings, pieces, finished)

    def _run(
        self,
        prompt: Prompt,
        params: SamplingParams,
        timings: Timings,
        finished: list[Answer],
        turn: _Turn,
    ) -> Iterator[str]:
        tokenizer = self.lm.processor.tokenizer
        text = Detokenizer(tokenizer, skip_special_tokens=True)
        stops = StopStrings(params.stop)
        request = Request(prompt, params)
        said, count, finish = "", 0, FinishReason.LENGTH
        for token in run(self.lm.model, [request], tokenizer=tokenizer, timings=timings):
            count, finish = count + 1, token.finish or finish
            piece, stopped = stops.push(text.push(token.id))
            said += piece
            if piece:
                yield piece
            if stopped:
                finish = FinishReason.STOP
                break
        else:
            rest, stopped = stops.push(text.flush())
            rest += stops.flush()
            finish = FinishReason.STOP if stopped else finish
            said += rest
            if rest:
                yield rest
        media_tokens = sum(item.tokens for item in prompt.media)
        usage = Usage(len(prompt.ids), media_tokens, count)
        answered = {"role": "assistant", "content": [{"type": "text", "text": said}]}
        self._turns, self._media = replace(turn, messages=[*turn.messages, answered]), []
        finished.append(Answer(said.strip(), self.frames, usage, timings, finish, self._warnings))


def _parts(media: Any) -> list[dict[str, Any]]:
    """One source or a list of them as content parts."""
    if media is None:
        return []
    return [_part(each) for each in media] if isinstance(media, list | tuple) else [_part(media)]


def _part(source: Any) -> dict[str, Any]:
    """A video, or an image where the source is recognised as one; a list is a video's frames."""
    if isinstance(source, Image.Image) or (isinstance(source, np.ndarray) and source.ndim == 3):
        return {"type": "image", "image": source}
    if isinstance(source, str | Path) and is_image(source):
        return {"type": "image", "path": str(source)}
    return {"type": "video", "video": source}
