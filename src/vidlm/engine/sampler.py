"""Logits -> the next token.

The filters and their order are those of transformers (generation/logits_process.py), down to which
of several equal scores survives. Parity: tests/unit/test_sampler.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from vidlm.nn.upload import upload
from vidlm.types import SamplingParams

# Scores beyond it mean the same, and even divided by the least temperature they stay finite.
FAR = 1e30


def process(
    logits: Tensor, params: SamplingParams, history: Sequence[int] | Tensor, generated: int
) -> Tensor:
    """Scores (V,) float32 after all filters that `params` switches on; removed tokens get -inf.

    `history` holds the ids of the prompt and of what was generated, in any order and as often as
    you like; `generated` says how many are new. `logits` is never written to, and comes back
    itself where nothing is switched on.
    """
    if params.repetition_penalty != 1:
        logits = _penalise(logits, history, params.repetition_penalty)
    if generated < params.min_new_tokens:
        logits = _forbid(logits, params.eos_token_ids)
    if params.temperature == 0:
        return logits
    if params.temperature != 1:
        logits = logits / min(params.temperature, FAR)
    if params.top_k:
        logits = _top_k(logits, params.top_k)
    if params.top_p < 1:
        logits = _top_p(logits, params.top_p)
    if params.min_p:
        logits = _min_p(logits, params.min_p)
    return logits


class Sampler:
    """Picks the tokens of one sequence and remembers them for the repetition penalty.

    Greedy at temperature 0. Otherwise draws come from a generator of its own with `params.seed`
    plus the number of the choice, or from torch's global one where that is None.
    """

    @torch.inference_mode()
    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        device: torch.device,
        choice: int = 0,
    ) -> None:
        self._params = params
        self._generated = 0
        self._remembers = params.repetition_penalty != 1
        # Thousands of a prompt's ids are one and the same placeholder: once is enough.
        known = set(prompt_ids) if self._remembers else ()
        self._seen = upload(torch.tensor([*known], dtype=torch.int64), device)
        self._generator: torch.Generator | None = None
        if params.temperature > 0 and params.seed is not None:
            self._generator = torch.Generator(device).manual_seed((params.seed + choice) % 2**63)

    @torch.inference_mode()
    def pick(self, logits: Tensor) -> int:
        """The next token by its logits (V,) float32."""
        scores = process(logits, self._params, self._seen, self._generated)
        if self._params.temperature == 0:
            token = scores.argmax()
        else:
            token = torch.multinomial(scores.softmax(dim=-1), 1, generator=self._generator)
        if self._remembers:
            self._seen = torch.cat((self._seen, token.view(1)))
        self._generated += 1
        return int(token)

    def take(self, row: Tensor, likeliest: int) -> Pick:
        """The next token, with what the parameters ask to be told of it; `likeliest` is the token
        with the highest logit of the row (V,) float32, which whoever decides for several knows of
        all at once."""
        if self._plain:
            self._generated += 1
            return _with_logprobs(row, likeliest, self._params.logprobs)
        return _with_logprobs(row, self.pick(row), self._params.logprobs)

    @property
    def _plain(self) -> bool:
        """Whether the next token is the one with the highest logit, whatever came before."""
        params = self._params
        settled = params.repetition_penalty == 1 and self._generated >= params.min_new_tokens
        return params.temperature == 0 and settled


@dataclass(frozen=True)
class Pick:
    """A chosen token; its log-probability and the likeliest ones where params.logprobs asks."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def _with_logprobs(row: Tensor, token: int, wanted: int | None) -> Pick:
    if wanted is None:
        return Pick(token)
    chances = row.log_softmax(dim=-1)
    values, ids = chances.topk(min(wanted, len(row)))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Pick(token, float(chances[token]), top)


def _penalise(logits: Tensor, history: Sequence[int] | Tensor, penalty: float) -> Tensor:
    (V,) = logits.shape
    ids = torch.as_tensor(history, dtype=torch.int64, device=logits.device)
    # A prompt may hold ids that the head has no row for: all of them land in one that is cut off.
    ids, padded = ids.clamp(max=V), functional.pad(logits, (0, 1))  # (V + 1,)
    scores = padded[ids]
    scores = torch.where(scores < 0, scores * penalty, scores / penalty).clamp(-FAR, FAR)
    return padded.scatter(0, ids, scores)[:V]


def _forbid(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    known = [t for t in tokens if t < len(logits)]
    places = torch.tensor(known, dtype=torch.int64, device=logits.device)
    return logits.index_fill(0, places, -torch.inf)


def _top_k(logits: Tensor, k: int) -> Tensor:
    """The k best, and whatever equals the last of them."""
    last = logits.topk(min(k, len(logits))).values[-1]
    return logits.masked_fill(logits < last, -torch.inf)


def _top_p(logits: Tensor, p: float) -> Tensor:
    """Drops the least likely tokens as long as they add up to at most 1 - p; one always stays."""
    ascending, order = logits.sort()
    dropped = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
    dropped[-1] = False
    return logits.masked_fill(dropped.scatter(0, order, dropped), -torch.inf)


def _min_p(logits: Tensor, p: float) -> Tensor:
    """Drops what is less likely than p times the likeliest token."""
    chances = logits.softmax(dim=-1)
    return logits.masked_fill(chances < p * chances.max(), -torch.inf)
