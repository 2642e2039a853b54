"""Answers under way: what the engine remembers of a request until its last token."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from vidlm.engine import beam
from vidlm.engine.ambient import Autocast
from vidlm.engine.inputs import PromptInputs
from vidlm.engine.kv import Table
from vidlm.engine.request import Request
from vidlm.engine.sampler import Sampler
from vidlm.engine.scheduler import Sequence as Scheduled
from vidlm.engine.timing import Timings
from vidlm.errors import ContextOverflow, InvalidArgument
from vidlm.models.base import VideoModel
from vidlm.text import Detokenizer, StopStrings, Tokenizer
from vidlm.types import FinishReason, SamplingParams


@dataclass(eq=False)
class Answer:
    """One of a request's answers: how it is sampled, and its new ids.

    table  its blocks, while it is decoded
    """

    group: Group
    choice: int
    scheduled: Scheduled
    sampler: Sampler
    params: SamplingParams
    stopped: Callable[[int], bool]
    ids: list[int] = field(default_factory=list)
    table: Table | None = None

    def accept(self, token: int) -> FinishReason | None:
        """Take the next token; why the answer ends with it, if it does."""
        self.ids.append(token)
        if len(self.ids) >= self.params.min_new_tokens:
            if token in self.params.eos_token_ids or self.stopped(token):
                return FinishReason.STOP
        else:
            self.stopped(token)  # keeps the text it watches complete
        return FinishReason.LENGTH if len(self.ids) >= self.scheduled.budget else None


@dataclass(eq=False)
class Beams:
    """The beams of a request, in the order in which the search names them."""

    search: Generator[tuple[beam.Branch, ...], Tensor, beam.Found]
    live: list[Answer]


@dataclass(eq=False)
class Group:
    """A request under way.

    answers   those that are not finished, by the number of their scheduled sequence
    pending   choices that begin when the prompt is prefilled
    encoding  of its media, once it has begun
    autocast  of the thread that submitted it, under which all of it is computed
    budget    new tokens that each of its answers may get
    keys      of the prompt's full blocks, and `root` where their chain begins; empty where nothing
              is shared
    """

    id: int
    request: Request
    inputs: PromptInputs
    timings: Timings
    autocast: Autocast
    budget: int
    keys: tuple[bytes, ...]
    root: bytes
    answers: dict[int, Answer] = field(default_factory=dict)
    pending: list[int] = field(default_factory=list)
    encoding: Generator[None, None, None] | None = None
    beams: Beams | None = None


def budget_of(model: VideoModel, request: Request) -> int:
    """New tokens a request may get: max_new_tokens, or what the context leaves of it."""
    needed, limit = len(request.prompt.ids), model.config.max_context
    if not needed:
        raise InvalidArgument("the prompt is empty; give at least one token")
    if not request.strict:
        return request.params.max_new_tokens
    if needed >= limit:
        way_out = _fewer_frames(request, needed - limit + 1)
        raise ContextOverflow(
            f"the prompt needs {needed} tokens, the model takes {limit}; {way_out}"
        )
    return min(request.params.max_new_tokens, limit - needed)


def _fewer_frames(request: Request, over: int) -> str:
    """What to change of a prompt that has `over` tokens too many."""
    media = request.prompt.media
    frames, tokens = sum(item.frames for item in media), sum(item.tokens for item in media)
    if not frames:
        return "shorten the prompt"
    each, text = max(tokens // frames, 1), len(request.prompt.ids) - tokens
    most = frames - -(-over // each)
    if most >= 1:
        return f"use at most {most} frames or images (now {frames})"
    if text > each:
        return f"{text} of them are text, which leaves no room for a frame or image; shorten it"
    return f"a frame or image takes {each} of them, and not even one fits; give a smaller one"


def watch(params: SamplingParams, tokenizer: Tokenizer | None) -> Callable[[int], bool]:
    """A function that is fed each new token and tells whether a stop string is complete."""
    if not params.stop:
        return lambda token: False
    if tokenizer is None:
        raise InvalidArgument("stop strings need the tokenizer; pass tokenizer=processor.tokenizer")
    detokenizer, strings = Detokenizer(tokenizer), StopStrings(params.stop)

    def stopped(token: int) -> bool:
        return strings.push(detokenizer.push(token))[1]

    return stopped


def begin(
    model: VideoModel, group: Group, scheduled: Scheduled, choice: int, tokenizer: Tokenizer | None
) -> Answer:
    """A new answer of a group, which is not among the group's answers yet."""
    params = group.request.params
    counted: Sequence[int] = group.request.prompt.ids if model.penalises_prompt else ()
    sampler = Sampler(params, counted, model.device, choice)
    return Answer(group, choice, scheduled, sampler, params, watch(params, tokenizer))
