"""How far logits drift from a reference's: both models are led along the reference's own answers,
whatever the other would have said, by the steps of an engine."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import vidlm
from vidlm.demo.questions import ask_one
from vidlm.demo.world import draw_clip, write_mp4
from vidlm.engine.forward import Newest, Part, decode, prefill
from vidlm.engine.inputs import PromptInputs
from vidlm.engine.kv import PagedKV, Table
from vidlm.engine.options import BLOCK
from vidlm.models.base import Prompt, VideoModel, finished


@dataclass
class Drift:
    """How far logits (n, V) are from those of the reference, over all that was added.

    error  root of the mean squared difference, over that of the reference's logits from their mean
           at each token, which a softmax does not see
    share  of tokens at which the likeliest one is the reference's
    """

    wrong: float = 0.0
    whole: float = 0.0
    same: int = 0
    tokens: int = 0

    def add(self, logits: Tensor, reference: Tensor) -> None:
        logits, reference = (x - x.mean(-1, keepdim=True) for x in (logits, reference))
        self.wrong += float((logits - reference).double().square().sum())
        self.whole += float(reference.double().square().sum())
        self.same += int((logits.argmax(-1) == reference.argmax(-1)).sum())
        self.tokens += len(reference)

    @property
    def error(self) -> float:
        return math.sqrt(self.wrong / self.whole)

    @property
    def share(self) -> float:
        return self.same / self.tokens


@torch.inference_mode()
def decoded(
    model: VideoModel,
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[int]],
    kv_dtype: str | None = None,
) -> list[Tensor]:
    """Logits (n, V) that each token of an answer is chosen by; the answers are under way together.

    kv_dtype: as EngineOptions takes it.
    """
    room = [-(-(len(p.ids) + len(a)) // BLOCK) for p, a in zip(prompts, answers, strict=True)]
    starts = [sum(room[:i]) for i in range(len(room))]
    blocks = [range(start, start + count) for start, count in zip(starts, room, strict=True)]
    kv = PagedKV(sum(room), BLOCK, model.device, coded=kv_dtype is not None)
    tables = [Table(each) for each in blocks]
    rows = [
        [prefill(model, kv, [Part.of(inputs_of(model, prompt), prompt.ids, 0, table)])]
        for prompt, table in zip(prompts, blocks, strict=True)
    ]
    for step in range(max(map(len, answers)) - 1):
        live = [i for i, answer in enumerate(answers) if step < len(answer) - 1]
        stops = [len(prompts[i].ids) + step + 1 for i in live]
        newest = [
            Newest(answers[i][step], stop, tables[i], None)
            for i, stop in zip(live, stops, strict=True)
        ]
        for i, row in zip(live, decode(model, kv, newest).split(1), strict=True):
            rows[i].append(row)
    return [torch.cat(each) for each in rows]


def inputs_of(model: VideoModel, prompt: Prompt) -> PromptInputs:
    """With all media encoded."""
    assert not model.has_memory
    inputs = PromptInputs(model, prompt)
    finished(inputs.encoding())
    return inputs


def described(lm: vidlm.LM, clips: int, seed: tuple[int, int]) -> list[Prompt]:
    """What is asked about clips with three shapes: the longest answers that the demo gives."""
    rng, prompts = np.random.default_rng(seed), list[Prompt]()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        for _ in range(clips):
            clip = draw_clip(rng, count=3)
            write_mp4(clip, path)
            asked = ask_one(clip, "describe", rng)
            assert asked is not None
            prompts.append(lm.video(path).prompt(asked.question))
    return prompts
