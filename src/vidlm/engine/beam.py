"""Beam search: the `num_beams` likeliest beginnings side by side, and the best answer at the end.

Gives the ids that transformers gives (generation/utils.py, `_beam_search`) for one prompt and one
returned sequence. Parity: tests/unit/test_beam.py.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vidlm.engine.sampler import process
from vidlm.types import FinishReason, SamplingParams

Found = tuple[tuple[int, ...], FinishReason]


@dataclass(frozen=True)
class _Beam:
    """A beginning under way: its new ids and the sum of their log-probabilities."""

    ids: tuple[int, ...]
    score: float


@dataclass(frozen=True)
class _Candidate:
    """A beam with one more token."""

    parent: int  # which of the beams
    ids: tuple[int, ...]
    score: float
    penalised: float  # the score over length ** length_penalty, by which answers are compared
    ended: bool


@dataclass(frozen=True)
class Branch:
    """A beam of the next step: which of this step's it goes on from, and with which token."""

    parent: int
    token: int


def search(
    params: SamplingParams, prompt: Sequence[int], budget: int
) -> Generator[tuple[Branch, ...], Tensor, Found]:
    """The best answer of at most `budget` tokens, and why it ends.

    Say `next` once, then send the logits (B, V) float32 of the beams that it last named, first
    those after the prompt (1, V); it names the beams of the next step. `prompt` has the ids that a
    repetition penalty counts.
    """
    counted = tuple(set(prompt))  # thousands of a prompt's ids are one placeholder
    beams, rows = [_Beam((), 0.0)], (yield ())
    finished: list[_Candidate] = []
    while True:
        with torch.inference_mode():
            scores = _scores(rows, beams, params, counted)
            candidates = _extend(beams, scores, params, budget)
        going = [c for c in candidates if not c.ended][: params.num_beams]
        # Candidates behind the first num_beams are there to go on, never to be an answer.
        finished += [c for c in candidates[: params.num_beams] if c.ended]
        finished.sort(key=lambda answer: answer.penalised, reverse=True)
        del finished[params.num_beams :]
        if not going or _settled(finished, going[0], params):
            break
        beams = [_Beam(c.ids, c.score) for c in going]
        rows = yield tuple(Branch(c.parent, c.ids[-1]) for c in going)
    best = finished[0].ids
    return best, FinishReason.STOP if best[-1] in params.eos_token_ids else FinishReason.LENGTH


def _scores(
    rows: Tensor, beams: Sequence[_Beam], params: SamplingParams, prompt: tuple[int, ...]
) -> Tensor:
    """Logits (B, V) float32 of the beams -> sums of log-probabilities (B, V) with each next token.

    The penalties act on log-probabilities, not on logits as when one token is picked at a time:
    transformers does it so.
    """
    filtered = [
        process(row, params, (*prompt, *beam.ids), len(beam.ids))
        for row, beam in zip(rows.log_softmax(dim=-1), beams, strict=True)
    ]
    return torch.stack(filtered) + rows.new_tensor([[beam.score] for beam in beams])


def _extend(
    beams: Sequence[_Beam], scores: Tensor, params: SamplingParams, budget: int
) -> list[_Candidate]:
    """The best continuations, best first: so many that num_beams of them are no end of sequence."""
    _, V = scores.shape
    length = len(beams[0].ids) + 1
    count = max(2, 1 + len(params.eos_token_ids)) * params.num_beams
    best, places = scores.flatten().topk(min(count, scores.numel()))
    # Divided in float32, so that answers whose scores almost tie rank as in transformers.
    penalised = best / length ** float(params.length_penalty)
    candidates = []
    for score, place, final in zip(best.tolist(), places.tolist(), penalised.tolist(), strict=True):
        parent, token = divmod(place, V)
        ended = token in params.eos_token_ids or length == budget
        ids = (*beams[parent].ids, token)
        candidates.append(_Candidate(parent, ids, score, final, ended))
    return candidates


def _settled(finished: Sequence[_Candidate], hope: _Candidate, params: SamplingParams) -> bool:
    """Whether to stop although `hope`, the best beam under way, could go on.

    Only with num_beams answers. Then at once if early_stopping, or else where the best beam, as
    long as it is now, is no better than the worst answer. That is a guess: with a length_penalty
    above 0 it might still become so.
    """
    if len(finished) < params.num_beams:
        return False
    return params.early_stopping or not hope.penalised > finished[-1].penalised
