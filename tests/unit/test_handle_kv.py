"""VideoHandle.save(kv=True): it has keys and values, whatever became of those in the cache."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
import vidlm
from clips import clip
from saved_files import read
from straight import nothing_is_held
from vidlm.engine import Engine, EngineOptions
from vidlm.engine.options import BLOCK
from vidlm.engine.store import block_bytes
from vidlm.errors import ContextOverflow

QUESTION = "what happens?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("tiny"))


def loaded(folder: Path, **options: Any) -> vidlm.LM:
    return vidlm.load(folder, engine=EngineOptions(**options))


def kept(path: Path) -> int:
    """Tokens that it has keys and values of, all that could be kept."""
    index, tensors = read(path)
    count: int = tensors["kv.0.keys"].shape[1]
    assert count == len(index["prompt"]) // BLOCK * BLOCK > 0
    return count


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_an_engine_that_keeps_nothing(folder: Path, tmp_path: Path, kv_dtype: str | None) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    loaded(folder, kv_dtype=kv_dtype).video(clip(20), frames=3).save(one)
    lm = loaded(folder, kv_dtype=kv_dtype, share=False)
    lm.video(clip(20), frames=3).save(two)
    assert kept(one) == kept(two)
    (_, tensors), (_, others) = read(one), read(two)
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    assert nothing_is_held(lm.engine)


def test_blocks_that_others_took_meanwhile(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the prompt's last step and the copy, questions of others need the room."""
    path, lm = tmp_path / "clip.safetensors", loaded(folder)
    stored = Engine.stored
    model = lm.model

    def late(engine: Engine, prompt: Any) -> Any:
        if engine is lm.engine:
            engine.clear()
        return stored(engine, prompt)

    monkeypatch.setattr(Engine, "stored", late)
    lm.video(clip(20), frames=3).save(path)
    monkeypatch.undo()
    assert kept(path)
    wanted = loaded(folder).ask(clip(20), QUESTION, frames=3, max_tokens=9)
    other = vidlm.load(model.folder)
    answer = other.ask(path, QUESTION, max_tokens=9)
    assert answer.text == wanted.text
    assert other.engine.stats.prefilled < answer.usage.prompt_tokens - kept(path) + BLOCK


def test_a_cache_that_just_holds_the_prompt(folder: Path, tmp_path: Path) -> None:
    path, lm = tmp_path / "clip.safetensors", loaded(folder)
    prompt = lm.video(clip(20), frames=3)._beginning(None)
    blocks = -(-(len(prompt.ids) + 1) // BLOCK)
    small = loaded(folder, kv_bytes=blocks * block_bytes(lm.model))
    small.video(clip(20), frames=3).save(path)
    assert kept(path)


def test_an_exact_engine_keeps_whole_cells_and_says_so(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lm, path = loaded(folder, exact=True), tmp_path / "clip.safetensors"
    with caplog.at_level(logging.WARNING, "vidlm"):
        lm.video(clip(20), frames=3).save(path)
    assert "no keys and values are saved" in caplog.text
    assert "clip.safetensors" in caplog.text
    caplog.clear()
    config = json.loads((tiny.write(tmp_path / "long") / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 1024
    (tmp_path / "long" / "config.json").write_text(json.dumps(config))
    lm = loaded(tmp_path / "long", exact=True)
    lm.video(clip(40), frames=35).save(path)
    assert not caplog.text
    _, tensors = read(path)
    assert tensors["kv.0.keys"].shape[1] == 512
    assert lm.ask(path, QUESTION, max_tokens=4).text


@pytest.mark.parametrize("kv", [True, False])
def test_more_than_the_context_is_refused(folder: Path, tmp_path: Path, kv: bool) -> None:
    lm = loaded(folder)
    over = lm.model.config.max_context // tiny.FRAME_TOKENS + 1
    with pytest.raises(ContextOverflow, match="use at most"):
        lm.video(clip(over), frames=over).save(tmp_path / "clip.safetensors", kv=kv)
    assert not list(tmp_path.iterdir())
