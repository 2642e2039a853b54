"""engine/: room for keys and values is taken as tokens come, and no more of it than was given."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from straight import about, ask, asked, nothing_is_held, straight, text, tiny_model
from vidlm.engine import Engine, EngineOptions, Request, generate, loop
from vidlm.engine.kv import PagedKV, bytes_per_token
from vidlm.engine.memory import free_bytes
from vidlm.engine.options import BLOCK
from vidlm.engine.store import block_bytes
from vidlm.models.base import VideoModel

CPU = torch.device("cpu")
PROMPT = about((1, 2), text(9, 1))


@pytest.fixture(scope="module")
def model() -> VideoModel:
    return tiny_model()


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_room_is_address_space_until_tokens_come() -> None:
    """Of a model of 7 billion weights: half a megabyte a token, 32 GB in all."""
    layers, heads, width = 32, 32, 128
    blocks = (32 << 30) // (BLOCK * bytes_per_token(layers, heads, width, torch.bfloat16))
    before = resident()
    kv = PagedKV(blocks, BLOCK)
    k = torch.zeros(1, heads, width, dtype=torch.bfloat16)
    for i in range(layers):
        keys, values = kv.layer(i, k, k)
        keys[:, :BLOCK] = values[:, :BLOCK] = 1
    reserved = sum(keys.nbytes + values.nbytes for keys, values in kv.layers)
    assert reserved > 31 << 30
    assert resident() - before < 128 << 20


def test_an_engine_takes_what_it_was_given(model: VideoModel) -> None:
    size = block_bytes(model)
    engine = Engine(model, options=EngineOptions(kv_bytes=10 * size + size // 2))
    assert engine.room == 10 * BLOCK
    ask(engine, asked(PROMPT, 3))
    keys = engine._store.kv.layers
    assert sum(k.nbytes + v.nbytes for k, v in keys) == 10 * size
    assert Engine(model, options=EngineOptions(kv_bytes=1)).room == BLOCK
    roomy = Engine(model)  # half of what is free, but for what could never be used
    assert roomy.room <= 64 * (model.config.max_context + 2 * BLOCK)


class Recorder:
    """The engines that `run` makes."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.engines: list[Engine] = []
        patch.setattr(loop, "Engine", self._make)

    def _make(self, *args: Any, **kwargs: Any) -> Engine:
        self.engines.append(Engine(*args, **kwargs))
        return self.engines[-1]


@pytest.mark.parametrize(
    ("requests", "blocks"),
    [
        ([asked(PROMPT, 7)], 3),
        ([asked(PROMPT, 8)], 4),
        ([asked(PROMPT, 7), asked(PROMPT, 8)], 7),
        ([asked(PROMPT, 7, n=3, temperature=1.0, seed=1)], 3 + 2 * 2),
        ([asked(PROMPT, 40, num_beams=3)], 6 + 3 * 4),
    ],
)
def test_generate_takes_what_its_requests_need(
    model: VideoModel, monkeypatch: pytest.MonkeyPatch, requests: list[Request], blocks: int
) -> None:
    """And so much that none of them has to wait or give way."""
    recorder = Recorder(monkeypatch)
    generate(model, requests)
    (engine,) = recorder.engines
    assert engine.room == blocks * BLOCK
    assert engine.stats.scheduler.preempted == 0
    assert engine.stats.prefilled == sum(len(request.prompt.ids) for request in requests)
    assert nothing_is_held(engine)


def test_generate_with_little_memory(model: VideoModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests take turns in half of what is free, or in what the largest of them needs."""
    monkeypatch.setattr(loop, "free_for_layers", lambda devices: 2)
    recorder = Recorder(monkeypatch)
    requests = [asked(PROMPT, 20), asked(about((), text(5)), 6), asked(PROMPT, 12)]
    said = [list(output.ids) for output in generate(model, requests)]
    assert said == [straight(model, request) for request in requests]
    assert recorder.engines[0].room == 4 * BLOCK
    given = EngineOptions(kv_bytes=5 * block_bytes(model), share=False)
    generate(model, requests, options=given)
    assert recorder.engines[1].room == 5 * BLOCK


def test_what_is_free() -> None:
    assert 1 << 20 < free_bytes(CPU) < 1 << 50
