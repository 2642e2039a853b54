"""What a plan says, against the model it is about."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from paging import Paged
from vidlm.errors import InvalidArgument, ModelError, UnsupportedModel, WeightsError
from vidlm.models.llava import LlavaConfig, LlavaNetwork
from vidlm.plan import Loading, Plan, TextShape, VisionShape, fit, free_memory, plan

VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "model_type": "qwen2",
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1000,
}


def tiny(*, tied: bool = False, dtype: str | None = None) -> LlavaConfig:
    return LlavaConfig(
        vision_config=VISION,
        text_config={**TEXT, "tie_word_embeddings": tied},
        image_token_index=3,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        dtype=dtype,
    )


def write(
    folder: Path,
    config: LlavaConfig,
    stored: torch.dtype = torch.float32,
    extra: dict[str, Tensor] | None = None,
) -> LlavaNetwork:
    """A checkpoint with random weights and, on request, more tensors."""
    model = LlavaNetwork(config).to(stored)
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    save_file({**tensors, **(extra or {})}, folder / "model.safetensors")
    return model


def numbers(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_shapes_are_those_of_the_config(tmp_path: Path) -> None:
    write(tmp_path, tiny())
    made = plan(tmp_path)
    assert made.family == "llava"
    assert made.text == TextShape("qwen2", 3, 24, 4, 2, 50)
    assert made.vision == VisionShape("siglip", 2, 16, 32, 8)
    assert (made.context, made.tokens_per_frame, made.frames) == (1000, 16, 8)


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_the_models(tmp_path: Path, tied: bool) -> None:
    model = write(tmp_path, tiny(tied=tied))
    assert plan(tmp_path).parameters == numbers(model)


def test_a_tied_head_that_is_stored_too_counts_once(tmp_path: Path) -> None:
    head = {"language_model.lm_head.weight": torch.zeros(50, 24)}
    model = write(tmp_path, tiny(tied=True), extra=head)
    made = plan(tmp_path)
    assert made.parameters == numbers(model)
    assert made.stored_bytes == 4 * (numbers(model) + 50 * 24)


def test_tensors_that_no_forward_pass_reads_are_only_stored(tmp_path: Path) -> None:
    unused = {"vision_tower.vision_model.head.probe": torch.zeros(7)}
    model = write(tmp_path, tiny(), extra=unused)
    made = plan(tmp_path)
    assert made.weight_bytes == 4 * numbers(model)
    assert made.stored_bytes == 4 * (numbers(model) + 7)


@pytest.mark.parametrize(
    ("config", "asked", "loaded", "width"),
    [
        (None, None, "bfloat16", 2),
        ("float32", None, "float32", 4),
        ("float32", "auto", "float32", 4),
        ("float32", "float16", "float16", 2),
    ],
)
def test_memory_follows_the_dtype_that_load_takes(
    tmp_path: Path, config: str | None, asked: str | None, loaded: str, width: int
) -> None:
    model = write(tmp_path, tiny(dtype=config), torch.bfloat16)
    made = plan(tmp_path, dtype=asked)
    assert (made.stored_dtype, made.dtype) == ("bfloat16", loaded)
    assert made.weight_bytes == width * numbers(model)
    rest = made.held_bytes + made.work_bytes
    assert made.memory_bytes == made.weight_bytes + made.kv_bytes + rest


def test_keys_and_values_are_as_large_as_said(tmp_path: Path) -> None:
    model = write(tmp_path, tiny())
    stores = Paged([40])
    with torch.inference_mode():
        model.hidden(torch.zeros(5, 24), stores.step({0: 5}))
    size = sum(k.nbytes + v.nbytes for k, v in stores.kv.layers)
    assert plan(tmp_path).kv_bytes_per_token * 40 == size


def test_a_model_larger_than_memory_is_planned(tmp_path: Path) -> None:
    """LLaVA-1.5 7B by its header alone: the file is a hole of 14 GB."""
    config = LlavaConfig(text_config={"max_position_embeddings": 4096, "vocab_size": 32064})
    with torch.device("meta"):
        model = LlavaNetwork(config)
    header, at = {}, 0
    for name, parameter in model.named_parameters():
        end = at + 2 * parameter.numel()
        shape = list(parameter.shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + at)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    made = plan(tmp_path)
    assert made.parameters == 7_063_427_072  # as the hub counts llava-hf/llava-1.5-7b-hf
    assert made.weight_bytes == made.stored_bytes == 2 * made.parameters
    assert made.kv_bytes_per_token == 2 * 32 * 4096 * 2
    assert (made.tokens_per_frame, made.frame_tokens, made.fits) == (576, 4608, False)
    assert made.most_frames == 6
    assert "7.06 billion" in str(made)


PLAN = Plan(
    family="llava",
    text=TextShape("qwen2", 3, 24, 4, 2, 50),
    vision=VisionShape("siglip", 2, 16, 32, 8),
    parameters=1000,
    stored_dtype="float32",
    stored_bytes=4000,
    dtype="float32",
    weight_bytes=4000,
    kv_bytes_per_token=10,
    context=1000,
    frames=8,
    frame_tokens=128,
    most_frames=42,
    max_tokens=256,
    held_bytes=800,
    work_bytes=5000,
)


def test_most_frames_is_where_fitting_ends(tmp_path: Path) -> None:
    write(tmp_path, tiny())
    for max_tokens in (1, 8, 200, 900, 920):
        most = plan(tmp_path, max_tokens=max_tokens).most_frames
        assert most == max(1000 - 64 - max_tokens, 0) // 16
        for frames in (most, most + 1):
            made = plan(tmp_path, frames=frames, max_tokens=max_tokens)
            assert made.fits == (frames <= most)


@given(frames=st.integers(1, 200), per_frame=st.integers(1, 30), held=st.integers(0, 1000))
def test_the_account_is_a_straight_line(frames: int, per_frame: int, held: int) -> None:
    """As far as the context goes, beyond which there are no keys and values."""
    made = replace(
        PLAN,
        context=10**6,
        frames=frames,
        frame_tokens=frames * per_frame,
        held_bytes=frames * held,
        time_tokens=3,
    )
    assert made.memory_bytes == made.fixed_bytes + frames * made.bytes_per_frame
    assert made.fixed_bytes == 4000 + 5000 + 10 * (64 + 256)
    assert made.kv_bytes_per_frame == 10 * (per_frame + 3)
    assert replace(made, context=100).kv_bytes == 1000


def test_tokens_of_a_frame_are_exact(tmp_path: Path) -> None:
    """Slow-Fast has 81 for every four frames, and 81 for each of 16 at least."""
    slow_fast = {
        "model_type": "llava_qwen_slow_fast",
        **{**TEXT, "max_position_embeddings": 32768, "model_type": "llava_qwen_slow_fast"},
        "mm_vision_tower": "convnext-576",
        "mm_video_pooling_stride": 2,
        "min_fast_frames": 16,
        "fast_token_temporal_stride": 4,
    }
    embeddings = torch.zeros(TEXT["vocab_size"], TEXT["hidden_size"])
    save_file({"model.embed_tokens.weight": embeddings}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(slow_fast))
    made = plan(tmp_path)
    assert (made.frames, made.frame_tokens, made.tokens_per_frame) == (64, 1296, 20.25)
    assert "64 frames x 20.25 = 1,296, the question" in str(made)
    assert json.loads(json.dumps(made.to_dict()))["tokens_per_frame"] == 20.25
    assert plan(tmp_path, frames=8).tokens_per_frame == 81
    assert str(plan(tmp_path, frames=8).tokens_per_frame) == "81"
    assert plan(tmp_path, frames=made.most_frames).fits
    assert made.most_frames == (32768 - 64 - 256) // 81 * 4 + 3


def test_memory_that_is_free(tmp_path: Path) -> None:
    write(tmp_path, tiny())
    bare = plan(tmp_path)
    assert (bare.free_bytes, bare.most_frames_in_memory) == (None, None)
    assert "free " not in str(bare)
    made = plan(tmp_path, memory=bare.fixed_bytes + 5 * bare.bytes_per_frame)
    assert made.most_frames_in_memory == 5
    assert "at most 5 frames fit into it" in str(made)
    assert "the weights do not fit" in str(plan(tmp_path, memory=bare.weight_bytes - 1))
    assert free_memory() > 0


def test_weights_that_do_not_fit_are_refused_as_such(tmp_path: Path) -> None:
    write(tmp_path, tiny())
    for words in ({}, {"quantize": "int4"}):
        made = plan(tmp_path, **words)
        loading, most = Loading(**words), made.weight_bytes + made.unpacked_bytes
        with pytest.raises(InvalidArgument, match=r"one frame takes .* 0\.0 kB are free"):
            fit(tmp_path, memory=most, loading=loading)
        kind = words.get("quantize", "float32")
        with pytest.raises(InvalidArgument, match=rf"^the weights take .* in {kind}.* are free"):
            fit(tmp_path, memory=most - 1, loading=loading)


def test_the_dict_is_json_with_all_that_follows(tmp_path: Path) -> None:
    told = json.loads(json.dumps(PLAN.to_dict()))
    assert told["text"]["kv_heads"] == 2
    assert told["tokens"] == told["frame_tokens"] + told["prompt_tokens"] + told["max_tokens"]
    assert told["fits"] is True
    assert told["memory_bytes"] == 4000 + 10 * told["tokens"] + 800 + 5000
    assert told["tokens_per_frame"] == 16


def test_the_text_says_whether_it_fits() -> None:
    assert "yes; at most 42 frames" in str(PLAN)
    many = replace(PLAN, frames=100, frame_tokens=1600)
    assert "no, 1,920 do not; at most 42 frames" in str(many)


@pytest.mark.parametrize("wrong", [{"frames": -1}, {"max_tokens": 0}])
def test_numbers_that_make_no_sense(tmp_path: Path, wrong: dict[str, int]) -> None:
    write(tmp_path, tiny())
    with pytest.raises(InvalidArgument, match="frames from 0 and max_tokens from 1"):
        plan(tmp_path, **wrong)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        plan(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UnsupportedModel, match="'bert'"):
        plan(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tiny().to_dict()))
    with pytest.raises(WeightsError, match="safetensors"):
        plan(tmp_path)
