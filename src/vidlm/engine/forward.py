"""The two steps of a request: its whole prompt at once, then one token after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vidlm.engine.kv import SequenceKV
from vidlm.engine.timing import Timings
from vidlm.models.base import Prompt, VideoModel, insert, memory_of
from vidlm.nn.step import packed


@torch.inference_mode()
def prefill(model: VideoModel, prompt: Prompt, kv: SequenceKV, timings: Timings) -> Tensor:
    """The whole prompt through the model; logits (V,) float32 for the first new token."""
    with timings.stage("encode"):
        encoded = model.encode(prompt.media)
    with timings.stage("prefill"):
        ids = torch.tensor(prompt.ids, device=model.device)
        placeholders = model.config.placeholders
        x = insert(model.embed(ids), ids, placeholders, prompt.media, encoded)
        kv.memory = memory_of(encoded)
        step = packed([len(ids)], model.device, [kv])
        if kv.memory is not None:
            step = replace(step, readers=model.readers(ids))
        hidden = model.hidden(x, step)
        kv.advance(len(ids))
        if kv.memory is not None:
            kv.memory.forget_tokens()
            kv.memory = kv.memory if model.memory_in_decode else None
        return model.logits(hidden[-1:])[0].float()


@torch.inference_mode()
def decode(model: VideoModel, newest: Sequence[int], stores: Sequence[SequenceKV]) -> Tensor:
    """The newest token of each sequence in; logits (B, V) float32 for its next one out."""
    ids = torch.tensor(newest, device=model.device)
    hidden = model.hidden(model.embed(ids), packed([1] * len(stores), model.device, stores))
    for kv in stores:
        kv.advance(1)
    return model.logits(hidden).float()
