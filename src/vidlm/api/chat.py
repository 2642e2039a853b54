"""Several turns about the same videos and images; a single question is the first of them."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from vidlm.api.answer import Answer, AnswerStream, Logprob
from vidlm.api.fitting import check_room, fitted
from vidlm.api.handle import VideoHandle, system_message
from vidlm.api.index_file import is_index
from vidlm.api.keywords import (
    AskKeywords,
    TurnKeywords,
    read_options,
    read_sampling,
    sampling_params,
    spelled,
)
from vidlm.api.progress import Progress, ProgressHook, ReportedTimings, silent
from vidlm.api.sources import NOTHING, Sources, check_question, listed
from vidlm.api.turns import Turn, Turns
from vidlm.engine import Request, Timings, Token
from vidlm.models.base import Media
from vidlm.text import Detokenizer, StopStrings, Tokenizer
from vidlm.types import FinishReason, FrameRef, SamplingParams, Usage

if TYPE_CHECKING:
    from vidlm.api.lm import LM


@dataclass(frozen=True)
class _Conversation:
    """What was said so far: messages that name their media, and these in order."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    media: list[Media] = field(default_factory=list)


class Chat:
    """Several turns about the same media.

    A turn joins the conversation when its answer is complete: after an error, or where a stream is
    closed or dropped before its end, it is as if the question had not been asked. Turns come one
    at a time. A question from another thread waits for the one under way; a thread that has an
    unfinished stream of its own must finish or close it first.
    """

    def __init__(self, lm: LM, media: Sources = NOTHING, **options: Unpack[AskKeywords]) -> None:
        self.lm = lm
        self._options = options
        self._frames, self._sampling = read_options(options, "ask()")
        self._fit = options.get("fit", False)
        self._turns = Turns()
        self._said = _Conversation(system_message(options.get("system")))
        self._sources = listed(media)
        self.frames: tuple[FrameRef, ...] = ()
        self._warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        turns = sum(message["role"] == "user" for message in self.messages)
        return f"<Chat of {turns} turns, {len(self.frames)} frames>"

    @property
    def messages(self) -> list[dict[str, Any]]:
        """What was said so far; media parts hold nothing but their type."""
        return self._said.messages

    def ask(self, question: str, **sampling: Unpack[TurnKeywords]) -> Answer:
        """The answer to the next turn."""
        return self.stream(question, **sampling).answer

    def stream(self, question: str, **sampling: Unpack[TurnKeywords]) -> AnswerStream:
        """The next turn, piece by piece."""
        check_question(question)
        changed = read_sampling(sampling)
        hook = sampling.get("progress") or self._options.get("progress")
        turn = self._turns.begin()
        try:
            with spelled({**self._options, **sampling}):
                return self._stream(question, {**self._sampling, **changed}, turn, hook)
        except BaseException:
            turn.end()
            raise

    def _stream(
        self, question: str, sampling: dict[str, Any], turn: Turn, hook: ProgressHook | None
    ) -> AnswerStream:
        timings = Timings() if hook is None else ReportedTimings(hook)
        report = hook or silent
        read = self._read(question, sampling, timings, report)
        parts = [part for one in read for part in one.parts]
        user = {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
        asked = _Conversation(
            [*self._said.messages, user],
            [*self._said.media, *(item for one in read for item in one.media)],
        )
        report(Progress("preprocess", 0, 1))
        with timings.stage("preprocess"):
            prompt = self.lm.processor.chat_prompt(asked.messages, asked.media)
        report(Progress("preprocess", 1, 1))
        check_room(self.lm, asked.messages, prompt)
        params = sampling_params(self.lm.model, sampling, len(prompt.ids))
        pieces = self._run(Request(prompt, params), timings, asked, report)
        return AnswerStream(self.frames, len(prompt.ids), timings, pieces, turn)

    def _read(
        self, question: str, sampling: dict[str, Any], timings: Timings, report: ProgressHook
    ) -> list[VideoHandle]:
        """The media of the first turn; none later."""
        if not self._sources:
            return []
        sources = [self._loaded(source) for source in self._sources]
        frames = self._frames
        if self._fit:
            messages = [*self._said.messages, {"role": "user", "content": question}]
            frames = fitted(self.lm, sources, frames, messages, sampling)
        read: list[VideoHandle] = []
        report(Progress("decode", 0, len(sources)))
        for source in sources:
            if isinstance(source, VideoHandle):
                read.append(source.checked(self.lm, self._frames))
            else:
                read.append(VideoHandle.read(self.lm, source, frames, timings))
            report(Progress("decode", len(read), len(sources)))
        self.frames = tuple(
            replace(frame, media=i) for i, one in enumerate(read) for frame in one.frames
        )
        self._warnings = tuple(warning for one in read for warning in one.warnings)
        return read

    def _loaded(self, source: Any) -> Any:
        """Saved videos as handles; other sources as they are."""
        if is_index(source):
            return VideoHandle.load(self.lm, Path(source), self._frames)
        return source

    def _run(
        self, request: Request, timings: Timings, asked: _Conversation, report: ProgressHook
    ) -> Generator[str, None, Answer]:
        tokenizer, prompt = self.lm.processor.tokenizer, request.prompt
        text = _Text(tokenizer, request.params)
        tokens: list[Token] = []
        for token in self.lm.engine.stream(request, timings):
            tokens.append(token)
            if isinstance(timings, ReportedTimings) and timings.error is not None:
                raise timings.error
            report(Progress("generate", len(tokens), request.params.max_new_tokens))
            if piece := text.push(token):
                yield piece
            if text.stopped:
                break
        if rest := text.flush():
            yield rest
        media_tokens = sum(item.tokens for item in prompt.media)
        answered = {"role": "assistant", "content": [{"type": "text", "text": text.said}]}
        self._said = replace(asked, messages=[*asked.messages, answered])
        self._sources = []
        return Answer(
            text.said.strip(),
            self.frames,
            Usage(len(prompt.ids), media_tokens, len(tokens)),
            timings.plain() if isinstance(timings, ReportedTimings) else timings,
            FinishReason.STOP if text.stopped else tokens[-1].finish or FinishReason.LENGTH,
            self._warnings,
            tuple(_logprob(tokenizer, token) for token in tokens if token.logprob is not None),
        )


class _Text:
    """The text of an answer as its tokens come, up to a stop string."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=True)
        self._stops = StopStrings(params.stop)
        self.said, self.stopped = "", False

    def push(self, token: Token) -> str:
        piece, self.stopped = self._stops.push(self._detokenizer.push(token.id))
        self.said += piece
        return piece

    def flush(self) -> str:
        """What was held back, at the end."""
        if self.stopped:
            return ""
        rest, self.stopped = self._stops.push(self._detokenizer.flush())
        rest += self._stops.flush()
        self.said += rest
        return rest


def _logprob(tokenizer: Tokenizer, token: Token) -> Logprob:
    assert token.logprob is not None
    top = tuple(Logprob(id, tokenizer.decode([id]), value) for id, value in token.top)
    return Logprob(token.id, tokenizer.decode([token.id]), token.logprob, top)
