"""How many frames fit, against the tokens and bytes that they take."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import slowfast_forms
import tiny
from vidlm.errors import ContextOverflow, InvalidArgument
from vidlm.fit import (
    KV_PART,
    MOST,
    PICTURE,
    READING,
    STEP,
    Several,
    fit_frames,
    largest,
    need,
    size,
    video_tokens,
)
from vidlm.models import FAMILIES
from vidlm.models.base import Media
from vidlm.models.llava import LlavaConfig, LlavaNetwork
from vidlm.models.slowfast import SlowFastConfig, SlowFastNetwork
from vidlm.models.videollama3 import VideoLlama3Config
from vidlm.nn.decoder import Layer
from vidlm.plan import fit, plan

F32 = torch.float32


@dataclass(frozen=True)
class FakeText:
    """Its layers work in so many numbers a token."""

    step: int = 0
    num_hidden_layers: int = 1
    num_key_value_heads: int = 1
    head_dim: int = 1

    def step_bytes(self, tokens: int, itemsize: int) -> int:
        return tokens * itemsize * self.step


@dataclass(frozen=True)
class Fake:
    """A family whose frames take what a test says; 8 bytes of keys and values a token."""

    per_frame: int = 10
    held: int = 100
    tower: int = 1000
    time_tokens: int = 2
    text_config: FakeText = FakeText()

    def video_tokens(self, frames: int) -> int:
        return frames * self.per_frame

    def held_bytes(self, frames: int, itemsize: int) -> int:
        return frames * self.held

    def tower_bytes(self, itemsize: int) -> int:
        return self.tower


def test_what_frames_need() -> None:
    found = need(Fake(), F32, 3, 20)
    assert (found.frames, found.tokens) == (3, 3 * (10 + 2))
    assert found.kv_bytes == 8 * (36 + 20)
    assert found.held_bytes == 3 * (PICTURE + 100)
    assert found.work_bytes == 1000 + READING
    assert found.bytes == found.kv_bytes + found.held_bytes + found.work_bytes
    assert need(Fake(), F32, 0, 20).bytes == 8 * 20
    assert need(Fake(), F32, 3, 20, tokens=5).kv_bytes == 8 * 25


def test_tower_and_decoder_work_in_turns() -> None:
    decoder = Fake(text_config=FakeText(step=5))
    assert need(decoder, F32, 0, 20).work_bytes == 5 * 4 * STEP
    assert need(decoder, F32, 1, 20).work_bytes == 5 * 4 * STEP + READING
    tower = Fake(tower=10**6, text_config=FakeText(step=5))
    assert need(tower, F32, 1, 20).work_bytes == 10**6 + READING


numbers = st.integers(1, 400)


@given(numbers, numbers, numbers, st.integers(0, 40), numbers, st.integers(0, 10**9))
def test_it_is_the_most_that_fits(
    per_frame: int, prompt: int, answer: int, asked: int, context: int, memory: int
) -> None:
    config = Fake(per_frame)
    context *= 20

    def fits(frames: int) -> bool:
        found = need(config, F32, frames, prompt + answer)
        in_context = found.tokens + prompt + answer <= context
        in_memory = found.bytes <= memory and found.kv_bytes * KV_PART <= memory
        return in_context and in_memory

    call = (config, F32, prompt, answer)
    if not fits(1):
        for wanted in (None, asked or 1):
            with pytest.raises(InvalidArgument, match="shorten the prompt or the answer"):
                fit_frames(*call, wanted, context, memory)
        return
    most = fit_frames(*call, None, context, memory)
    assert fits(most)
    assert not fits(most + 1)
    assert fit_frames(*call, most, context, memory) == most
    said = f"at most {most:,} frames fit" if most > 1 else "at most one frame fits"
    with pytest.raises(InvalidArgument, match=said):
        fit_frames(*call, most + 1, context, memory)


def test_the_refusal_says_what_is_too_much() -> None:
    with pytest.raises(ContextOverflow) as context:
        fit_frames(Fake(), F32, 30, 10, 9, 100, None)
    assert str(context.value) == (
        "9 frames take 108 tokens, prompt and answer 40, and the context is 100; at most 5 frames "
        "fit"
    )
    with pytest.raises(InvalidArgument) as memory:
        fit_frames(Fake(), F32, 30, 10, 9, 1000, 4 * PICTURE + READING)
    assert not isinstance(memory.value, ContextOverflow)
    assert "9 frames take 159.1 MB beside the weights" in str(memory.value)
    assert "145.3 MB are free" in str(memory.value)
    assert "at most 3 frames fit" in str(memory.value)


def test_without_memory_only_the_context_counts() -> None:
    config = Fake(held=10**12)
    assert fit_frames(config, F32, 30, 10, None, 100, None) == 5
    with pytest.raises(InvalidArgument, match="free"):
        fit_frames(config, F32, 30, 10, None, 100, 10**9)


def test_half_of_what_is_free_is_for_keys_and_values() -> None:
    """As an engine parts it, which would refuse a prompt beyond that."""
    config = Fake(per_frame=5 * 10**6, held=0, tower=0, time_tokens=0)  # 40 MB of keys and values
    memory = 8 * 50 * 10**6
    most = fit_frames(config, F32, 5, 0, None, 10**9, memory)
    assert most == 4
    assert need(config, F32, 5, 5).bytes < memory


def test_tokens_by_the_caller() -> None:
    asked: list[int] = []

    def tokens(frames: int) -> int:
        asked.append(frames)
        return 50 * frames

    assert fit_frames(Fake(), F32, 0, 1, None, 201, None, tokens) == 4
    assert asked


def test_several_videos_take_as_much_each() -> None:
    one, three = Fake(), Several(Fake(), 3)
    single, both = need(one, F32, 4, 0), need(three, F32, 4, 0)
    assert (both.tokens, both.held_bytes) == (3 * single.tokens, 3 * single.held_bytes)
    assert both.work_bytes == single.work_bytes
    assert fit_frames(three, F32, 0, 4, None, 100, None) == 2  # 96 / (3 * 12)


@given(st.integers(0, 3000))
def test_the_largest_of_all(limit: int) -> None:
    assert largest(lambda n: n <= limit) == limit


def test_the_largest_where_more_frames_may_take_less() -> None:
    assert largest(lambda n: n in (1, 2, 3, 7)) == 7
    assert largest(lambda n: True) >= MOST
    assert largest(lambda n: False) == 0


@pytest.mark.parametrize(
    ("bytes_", "said"),
    [(0, "0.0 kB"), (49_152, "49.2 kB"), (1_500_000, "1.5 MB"), (2e9, "2.00 GB")],
)
def test_sizes(bytes_: int, said: str) -> None:
    assert size(bytes_) == said


# ---- families ----------------------------------------------------------------------------------


def configs() -> dict[str, Any]:
    vision = {**tiny.VISION, "model_type": "clip_vision_model"}
    text = {**tiny.TEXT, "model_type": "qwen2"}
    return {
        "llava": LlavaConfig(vision_config=vision, text_config=text),
        "llava_qwen_slow_fast": SlowFastConfig.from_dict(slowfast_forms.CONFIG),
        "video_llama_3": VideoLlama3Config(text_config=text),
    }


@pytest.mark.parametrize("name", ["llava", "llava_qwen_slow_fast", "video_llama_3"])
def test_an_account_of_each_family(name: str) -> None:
    assert name in FAMILIES
    config = configs()[name]
    small, large = (need(config, torch.bfloat16, frames, 0) for frames in (64, 640))
    assert 0 < small.held_bytes < large.held_bytes
    assert small.work_bytes == large.work_bytes > READING
    assert small.tokens == video_tokens(config, 64)


def test_a_layer_works_in_as_much_as_said() -> None:
    """Where its MLP is at work: rows as they came and normed, and what its linear layers make."""
    config = configs()["llava"].text_config
    mlp, x = Layer(config, 0).mlp, torch.zeros(7, config.hidden_size)
    made: list[int] = []
    for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        layer.register_forward_hook(lambda layer, given, out: made.append(out.nbytes))
    mlp(x)
    assert config.step_bytes(7, 4) == 2 * x.nbytes + sum(made)
    narrow = replace(config, intermediate_size=1)  # and where attention takes more
    heads = 2 * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    assert narrow.step_bytes(7, 4) == 2 * x.nbytes + 7 * 4 * heads


def test_features_and_memory_are_as_large_as_said() -> None:
    """Of a video of Slow-Fast's, whose slow tokens are kept as such and as keys and values."""
    config = SlowFastConfig.from_dict(slowfast_forms.CONFIG)
    model = SlowFastNetwork(config).eval()
    pixels = torch.zeros(12, 3, 128, 128)
    with torch.inference_mode():
        (encoded,) = model.encode([Media(pixels, 0, "video", 12)])
    assert encoded.memory is not None
    text, readers = config.text_config, len(config.hybrid_layers)
    read = len(encoded.memory) * 2 * readers * text.num_key_value_heads * text.head_dim * 4
    found = pixels.nbytes + encoded.tokens.nbytes + encoded.memory.nbytes + read
    assert config.held_bytes(12, 4) == found


# ---- a checkpoint ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("llava")
    config = configs()["llava"]
    model = LlavaNetwork(config)
    save_file(dict(model.named_parameters()), where / "model.safetensors")
    (where / "config.json").write_text(json.dumps(config.to_dict()))
    return where


def test_a_folder(folder: Path) -> None:
    """16 tokens a frame in a context of 512."""
    made = plan(folder)
    assert fit(folder, max_tokens=100, prompt_tokens=12) == 400 // 16 == 25
    assert fit(folder, max_tokens=100, prompt_tokens=12, frames=25) == 25
    assert fit(folder, max_tokens=100, prompt_tokens=12, context=300) == 188 // 16
    assert fit(folder, max_tokens=100, prompt_tokens=12, videos=2) == 400 // 32
    with pytest.raises(ContextOverflow, match=r"26 frames .* at most 25 frames fit"):
        fit(folder, max_tokens=100, prompt_tokens=12, frames=26)
    room = made.fixed_bytes + 3 * made.bytes_per_frame
    assert fit(folder, memory=room) == 3
    with pytest.raises(InvalidArgument, match=r"one frame takes .* 0\.0 kB are free"):
        fit(folder, memory=made.weight_bytes)


def test_a_plan_and_fit_agree(folder: Path) -> None:
    made = plan(folder)
    for memory in (made.memory_bytes, made.memory_bytes + 10 * made.bytes_per_frame):
        told = plan(folder, memory=memory)
        assert told.most_frames_in_memory is not None
        assert fit(folder, memory=memory) == min(told.most_frames, told.most_frames_in_memory)


def test_a_familys_own_ceiling(tmp_path: Path, folder: Path) -> None:
    """VideoLLaMA3 takes 180 frames at most unless told, however many would fit."""
    config = VideoLlama3Config(
        text_config={**tiny.TEXT, "max_position_embeddings": 10**6},
        vision_config={**tiny.VISION, "patch_size": 14},
    )
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert fit(tmp_path) == 180
    assert fit(tmp_path, frames=200) == 200
    assert fit(tmp_path, context=5000) < 180


def test_no_frames_at_all() -> None:
    assert fit_frames(Fake(), F32, 30, 10, 0, 100, None) == 0
