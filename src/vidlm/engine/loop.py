"""The one decoding loop: every answer, whoever asks, comes from it.

Requests of a batch are prefilled one after the other and then decoded together, one token each
a step. Tokens are packed, so neither padding nor the order of requests can change an answer
(in float32; in bfloat16 a matrix product may round differently with another number of rows).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from vidlm.engine import beam
from vidlm.engine.forward import decode, prefill
from vidlm.engine.kv import SequenceKV
from vidlm.engine.sampler import Sampler
from vidlm.engine.timing import Timings
from vidlm.errors import ContextOverflow, InvalidArgument
from vidlm.models.base import Prompt, VideoModel
from vidlm.text import Detokenizer, StopStrings, Tokenizer
from vidlm.types import FinishReason, SamplingParams


@dataclass(frozen=True)
class Request:
    """A prompt and how to answer it.

    strict: a prompt with no room for an answer in the model's context is refused, and an answer
        ends with the context. If not, both go on beyond it, where the model was not trained.
    """

    prompt: Prompt
    params: SamplingParams
    strict: bool = True


@dataclass(frozen=True)
class Token:
    """One new token of the request with this index in the batch; its last one has a `finish`."""

    request: int
    id: int
    finish: FinishReason | None = None


@dataclass(frozen=True)
class Output:
    """New tokens of one request (the prompt's are not repeated) and why they end."""

    ids: tuple[int, ...]
    finish: FinishReason


@dataclass
class _Sequence:
    """A request under way."""

    index: int
    params: SamplingParams
    sampler: Sampler
    kv: SequenceKV
    budget: int
    stopped: Callable[[int], bool]
    ids: list[int] = field(default_factory=list)

    def accept(self, token: int) -> FinishReason | None:
        self.ids.append(token)
        if len(self.ids) >= self.params.min_new_tokens:
            if token in self.params.eos_token_ids or self.stopped(token):
                return FinishReason.STOP
        else:
            self.stopped(token)  # keeps the text it watches complete
        return FinishReason.LENGTH if len(self.ids) >= self.budget else None


def generate(
    model: VideoModel,
    requests: Sequence[Request],
    *,
    tokenizer: Tokenizer | None = None,
    timings: Timings | None = None,
) -> list[Output]:
    """All new tokens of each request. `run` gives them one by one."""
    ids: list[list[int]] = [[] for _ in requests]
    finish = [FinishReason.LENGTH] * len(requests)
    for token in run(model, requests, tokenizer=tokenizer, timings=timings):
        ids[token.request].append(token.id)
        finish[token.request] = token.finish or finish[token.request]
    return [Output(tuple(i), f) for i, f in zip(ids, finish, strict=True)]


def run(
    model: VideoModel,
    requests: Sequence[Request],
    *,
    tokenizer: Tokenizer | None = None,
    timings: Timings | None = None,
) -> Iterator[Token]:
    """New tokens as they are decided, step by step, of all requests.

    `tokenizer` is needed where a request has stop strings. Beam search decides at its end: its
    tokens come all at once. Raises ContextOverflow before anything is computed where a prompt
    leaves no room for an answer.
    """
    timings = timings if timings is not None else Timings()
    budgets = [_budget(model, request) for request in requests]
    watches = [_watch(request.params, tokenizer) for request in requests]
    live: list[tuple[_Sequence, Tensor]] = []
    for i, (request, budget, stopped) in enumerate(zip(requests, budgets, watches, strict=True)):
        kv = SequenceKV(len(request.prompt.ids) + budget)
        logits = prefill(model, request.prompt, kv, timings)
        if request.params.num_beams > 1:
            with timings.stage("decode"):
                found = beam.search(model, request, logits, kv, budget)
            yield from _all_at_once(i, found)
            continue
        counted = request.prompt.ids if model.penalises_prompt else ()
        sampler = Sampler(request.params, counted, model.device)
        live.append((_Sequence(i, request.params, sampler, kv, budget, stopped), logits))
    while live:
        with timings.stage("decode"):
            tokens = [(seq, seq.sampler.pick(logits)) for seq, logits in live]
        going = []
        for seq, token in tokens:
            finish = seq.accept(token)
            yield Token(seq.index, token, finish)
            if finish is None:
                going.append(seq)
        live = _step(model, going, timings) if going else []


def _step(
    model: VideoModel, going: Sequence[_Sequence], timings: Timings
) -> list[tuple[_Sequence, Tensor]]:
    """Each sequence with the logits (V,) for its next token."""
    with timings.stage("decode"):
        rows = decode(model, [seq.ids[-1] for seq in going], [seq.kv for seq in going])
    return list(zip(going, rows, strict=True))


def _budget(model: VideoModel, request: Request) -> int:
    """New tokens a request may get: max_new_tokens, or what the context leaves of it."""
    needed, limit = len(request.prompt.ids), model.config.max_context
    if not needed:
        raise InvalidArgument("the prompt is empty; give at least one token")
    if not request.strict:
        return request.params.max_new_tokens
    if needed >= limit:
        frames = sum(media.frames for media in request.prompt.media)
        way_out = "shorten the prompt"
        if frames:
            spare = max(needed - limit + 1, 0)
            per_frame = max(sum(media.tokens for media in request.prompt.media) // frames, 1)
            fit = max(frames - -(-spare // per_frame), 0)
            way_out = f"use at most {fit} frames or images (now {frames})"
        raise ContextOverflow(
            f"the prompt needs {needed} tokens, the model takes {limit}; {way_out}"
        )
    return min(request.params.max_new_tokens, limit - needed)


def _watch(params: SamplingParams, tokenizer: Tokenizer | None) -> Callable[[int], bool]:
    """A function that is fed each new token and tells whether a stop string is complete."""
    if not params.stop:
        return lambda token: False
    if tokenizer is None:
        raise InvalidArgument("stop strings need the tokenizer; pass tokenizer=processor.tokenizer")
    detokenizer, strings = Detokenizer(tokenizer), StopStrings(params.stop)

    def stopped(token: int) -> bool:
        return strings.push(detokenizer.push(token))[1]

    return stopped


def _all_at_once(request: int, output: tuple[Sequence[int], FinishReason]) -> Iterator[Token]:
    ids, finish = output
    for i, token in enumerate(ids):
        yield Token(request, token, finish if i == len(ids) - 1 else None)
