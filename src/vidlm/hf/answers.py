"""The ids that come out of the engine -> what `generate` returns, or hands to a streamer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vidlm.engine import Token
from vidlm.models.base import Prompt


def written_length(prompts: Sequence[Prompt]) -> int:
    """Length of the longest prompt as it was written, each image and video as one token."""
    return max(len(p.ids) - sum(item.tokens - 1 for item in p.media) for p in prompts)


def collected(tokens: Iterator[Token], requests: int, n: int) -> list[list[int]]:
    """New ids of each answer; those of one request behind each other."""
    answers: list[list[int]] = [[] for _ in range(requests * n)]
    for token in tokens:
        answers[token.request * n + token.choice].append(token.id)
    return answers


def streamed(tokens: Iterator[Token], prompt: Tensor, streamer: Any) -> list[int]:
    """The ids of one request, each passed on at once in the shape that streamers are used to."""
    answer = []
    streamer.put(prompt.cpu())
    for token in tokens:
        answer.append(token.id)
        streamer.put(torch.tensor([token.id], dtype=torch.int64, device="cpu"))
    streamer.end()
    return answer


def joined(ids: Tensor, answers: Sequence[Sequence[int]], pad: int) -> Tensor:
    """Prompts (B, L) and their answers as one (B, L + n) tensor, short rows filled with `pad`."""
    longest = max(len(answer) for answer in answers)
    new = ids.new_full((len(answers), longest), pad)
    for row, answer in zip(new, answers, strict=True):
        row[: len(answer)] = torch.tensor(answer, dtype=new.dtype, device="cpu")
    return torch.cat((ids, new), dim=1)
