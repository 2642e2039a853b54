"""The video families' config.json as the hub has them, in every spelling; transformers reads along.

The folders of the larger corpus are rebuilt to the hub's content and hold no weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import tiny
import video_forms
from oracle import transformers
from vidlm import AutoConfig
from vidlm.errors import UnsupportedModel
from vidlm.plan import Plan, plan

FAMILIES = {"next_video": "LlavaNextVideo", "video_llava": "VideoLlava", "vl3": "VideoLlama3"}
VICUNA = {
    "model_type": "llama",
    "vocab_size": 32064,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_factor": 1.0,
    "qkv_bias": False,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "class_token": True,
}
TOWER = {
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "multimodal_projector_bias": True,
    "dtype": "bfloat16",
}
QWEN = {  # what a stub leaves to the class
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "qkv_bias": True,
    "tie_word_embeddings": False,
}
NAVIT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "next_video": {
        **TOWER,
        "text_config": {**VICUNA, "rope_factor": 2.5},
        "vision_config": {**CLIP, "image_size": 336},
        "image_token_id": 32001,
        "video_token_id": 32000,
        "image_grid_pinpoints": ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)),
        "spatial_pool_mode": "average",
        "spatial_pool_stride": 2,
        "image_seq_length": 576,
        "video_seq_length": 288,
        "max_context": 10240,
        "placeholders": {"image": 32001, "video": 32000},
    },
    "video_llava": {
        **TOWER,
        "text_config": VICUNA,
        "vision_config": {**CLIP, "image_size": 224},
        "image_token_id": 32000,
        "video_token_id": 32001,
        "image_seq_length": 256,
        "video_seq_length": 2056,
        "max_context": 4096,
        "placeholders": {"image": 32000, "video": 32001},
    },
    "vl3": {
        "text_config": QWEN,
        "vision_config": NAVIT,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "dtype": None,
        "max_context": 32768,
        "placeholders": {"image": 151655, "video": 151656},
    },
}


def hub(shared: Path, name: str) -> Path:
    return shared / "data" / "hub_like" / name


def check(read: Any, expected: Mapping[str, Any]) -> None:
    for name, value in expected.items():
        if name.endswith("_config"):
            check(getattr(read, name), value)
        else:
            assert (name, getattr(read, name)) == (name, value)


def check_against_theirs(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Every word that ours writes, but for those that only older versions read."""
    old = {"rope_theta", "rope_scaling", "torch_dtype", "head_dim", "vision_use_head"}
    assert ours.keys() - theirs.keys() <= old
    for name in ours.keys() & theirs.keys() - {"architectures", "model_type"}:
        if name.endswith("_config"):  # of which ours repeats what theirs says at the top alone
            top = {"tie_word_embeddings": theirs["tie_word_embeddings"]}
            check_against_theirs(ours[name], {**theirs[name], **top})
        elif name == "rope_parameters":  # where theirs keeps the old word for the type, too
            assert ours[name].items() <= theirs[name].items()
        else:
            assert (name, ours[name]) == (name, theirs[name])


@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_value_of_the_published_configs(shared: Path, name: str) -> None:
    config = AutoConfig.from_pretrained(hub(shared, name))
    check(config, PUBLISHED[name])
    theirs = transformers.AutoConfig.from_pretrained(hub(shared, name))
    check_against_theirs(config.to_dict(), theirs.to_dict())


# ---- spellings -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """A config.json that is, or was, on the hub: whose it is like, what it says instead, what it
    does not say, and what it means."""

    like: str
    says: Mapping[str, Any] = field(default_factory=dict)
    lacks: str | None = None
    means: Mapping[str, Any] = field(default_factory=dict)

    def write(self, shared: Path, folder: Path) -> Path:
        shutil.copy(hub(shared, self.like) / "config.json", folder)
        tiny.edit_json(folder / "config.json", self.says, *filter(None, [self.lacks]))
        return folder


ROPE = "text_config.rope_scaling"
LINEAR = {"max_context": 10240, "text_config": {**VICUNA, "rope_factor": 2.5}}
PLAIN = {"max_context": 4096, "text_config": VICUNA}
MISTRAL = {
    "model_type": "mistral",
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "vocab_size": 32064,
}
YI = {
    "model_type": "llama",
    "hidden_size": 7168,
    "intermediate_size": 20480,
    "num_hidden_layers": 60,
    "num_attention_heads": 56,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e6,
    "eos_token_id": 7,
    "pad_token_id": 0,
    "vocab_size": 64064,
}
QWEN_2B = {
    "model_type": "qwen2",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "rope_theta": 1e6,
    "max_position_embeddings": 32768,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
NAVIT_2B = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
}


def yi(image: int, video: int) -> Variant:
    """Of 34B, whose ids changed."""
    tokens = {"image_token_index": image, "video_token_index": video}
    means = {"placeholders": {"image": image, "video": video}, "max_context": 4096}
    text = {**YI, "head_dim": 128, "bos_token_id": 1, "rope_factor": 1.0}
    says = {**tokens, "text_config": {**YI, "use_cache": False}}
    return Variant("next_video", says, None, {**means, "text_config": text})


def vl3(vision: str, **top: Any) -> Variant:
    """Of VideoLLaMA3-2B under the name its vision encoder has, or had."""
    text = {**QWEN_2B, "use_sliding_window": False, "sliding_window": None}
    says = {"text_config": text, "vision_config": {"model_type": vision, **NAVIT_2B}, **top}
    tied = {"tie_word_embeddings": True, "head_dim": 128, "vocab_size": 151936}
    means = {"text_config": {**QWEN_2B, **tied}, "vision_config": {**NAVIT, **NAVIT_2B}}
    return Variant("vl3", says, None, means)


VARIANTS = {
    "another model's model_type": Variant(
        "next_video", {"model_type": "llava_next"}, None, PUBLISHED["next_video"]
    ),
    "no rope_scaling": Variant("next_video", {}, ROPE, PLAIN),
    "rope_scaling null": Variant("next_video", {ROPE: None}, None, PLAIN),
    "rope words beside": Variant("next_video", {"text_config.factor": 2.0}, ROPE, PLAIN),
    "rope_type": Variant(
        "next_video", {ROPE: {"rope_type": "linear", "factor": 2.5}}, None, LINEAR
    ),
    "rope words twice": Variant(
        "next_video",
        {ROPE: {"rope_type": "linear", "type": "linear", "factor": 2.5}, "text_config.factor": 2.0},
        None,
        LINEAR,
    ),
    "32K": Variant(
        "next_video",
        {"text_config": {**MISTRAL, "sliding_window": None}},
        None,
        {"max_context": 32768, "text_config": {**MISTRAL, "hidden_size": 4096, "head_dim": 128}},
    ),
    "34B": yi(64001, 64000),
    "34B later": yi(64004, 64003),
    "dtype": Variant("video_llava", {"dtype": "float16"}, "torch_dtype", {"dtype": "float16"}),
    "no towers' sizes": Variant("video_llava", {}, "vision_config", PUBLISHED["video_llava"]),
    "no tower's sizes": Variant("next_video", {}, "vision_config", PUBLISHED["next_video"]),
    "2B": vl3("video_llama_3_vision", tie_word_embeddings=True, torch_dtype="bfloat16"),
    "2B early": vl3(
        "videollama3_vision",
        model_type="videollama3",
        architectures=["Videollama3ForConditionalGeneration"],
        tie_word_embeddings=True,
    ),
}


@pytest.mark.parametrize("name", list(VARIANTS))
@pytest.mark.filterwarnings("ignore")  # theirs says what it thinks of a model_type
def test_spellings(shared: Path, tmp_path: Path, name: str) -> None:
    variant = VARIANTS[name]
    config = AutoConfig.from_pretrained(variant.write(shared, tmp_path))
    check(config, variant.means)
    raw = json.loads((tmp_path / "config.json").read_text())
    kind = getattr(transformers, f"{FAMILIES[variant.like]}Config")
    theirs = kind.from_dict(raw).to_dict()
    check_against_theirs(config.to_dict(), theirs)
    # As transformers writes it today, and as we do.
    for number, written in enumerate((theirs, config.to_dict())):
        again = tmp_path / str(number)
        again.mkdir()
        (again / "config.json").write_text(json.dumps(written))
        assert AutoConfig.from_pretrained(again).to_dict() == config.to_dict()


def test_ids_under_either_name(shared: Path, tmp_path: Path) -> None:
    for folder, names in {"next_video": (32001, 32000), "video_llava": (32000, 32001)}.items():
        raw = json.loads((hub(shared, folder) / "config.json").read_text())
        raw["image_token_id"], raw["video_token_id"] = (
            raw.pop("image_token_index"),
            raw.pop("video_token_index"),
        )
        (tmp_path / "config.json").write_text(json.dumps(raw))
        config = AutoConfig.from_pretrained(tmp_path)
        assert tuple(config.placeholders.values()) == names


@pytest.mark.parametrize("name", list(FAMILIES))
def test_crlf_and_a_byte_order_mark(shared: Path, tmp_path: Path, name: str) -> None:
    text = (hub(shared, name) / "config.json").read_text()
    written = b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode()
    (tmp_path / "config.json").write_bytes(written)
    assert AutoConfig.from_pretrained(tmp_path) == AutoConfig.from_pretrained(hub(shared, name))


REFUSED = {
    "LLaVA-NeXT": (
        {"model_type": "llava_next", "architectures": ["LlavaNextForConditionalGeneration"]},
        r"model_type 'llava_next' in config\.json is not supported; known: llava, llava_next_video",
    ),
    "LLaVA-NeXT, unnamed": ({"model_type": "llava_next", "architectures": None}, "'llava_next'"),
    "a pool": ({"spatial_pool_mode": "conv"}, "spatial_pool_mode='conv'; supported: average, max"),
    "rope": (
        {ROPE: {"rope_type": "yarn", "factor": 2.5}},
        "rope type 'yarn' is not supported; known: default, linear",
    ),
    "old rope": ({ROPE: {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
    "new rope": (
        {"text_config.rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}},
        "rope type 'llama3'",
    ),
    "strategy": ({"vision_feature_select_strategy": "cls"}, "'cls'; allowed: 'default'"),
    "a window": ({"text_config": {**MISTRAL, "sliding_window": 4096}}, "sliding_window=4096"),
    "a decoder": ({"text_config": {"model_type": "phi3"}}, "text model_type 'phi3'"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_is_refused(shared: Path, tmp_path: Path, name: str) -> None:
    says, message = REFUSED[name]
    folder = Variant("next_video", says).write(shared, tmp_path)
    with pytest.raises(UnsupportedModel, match=message):
        AutoConfig.from_pretrained(folder)


# ---- what `vidlm info` says ----------------------------------------------------------------------


def planned(name: str, folder: Path, **how: Any) -> tuple[Plan, Any]:
    form = video_forms.FORMS[name]
    return plan(form.write(folder), **how), form.network()


@pytest.mark.parametrize(
    ("name", "per_frame", "context"), [("next-vicuna", 4, 5120), ("video-llava", 17, 2048)]
)
def test_a_plan(tmp_path: Path, name: str, per_frame: int, context: int) -> None:
    made, network = planned(name, tmp_path)
    assert made.parameters == sum(p.numel() for p in network.parameters())
    assert (made.frames, made.tokens_per_frame, made.context) == (8, per_frame, context)
    assert made.most_frames == (context - 64 - 256) // per_frame
    assert (made.vision.kind, made.vision.image_size) == ("clip", 28)
    assert f"8 frames x {per_frame} = {8 * per_frame}, the question about 64" in str(made)
    assert made.kv_bytes_per_token == 2 * 2 * 2 * 64  # bytes of 2 layers' keys and values


@pytest.mark.parametrize("tied", [True, False])
def test_a_plan_for_frames_of_any_size(tmp_path: Path, tied: bool) -> None:
    made, network = planned("videollama3-tied" if tied else "videollama3", tmp_path)
    assert made.parameters == sum(p.numel() for p in network.parameters())
    assert "vision   video_llama_3: 2 layers, width 32, frames of any size in patches of 4" in str(
        made
    )
    assert made.frames == 180  # the most that are taken of a video


def test_a_plan_of_the_published_size(tmp_path: Path) -> None:
    """By docs/models.md: 16,384 tokens for all frames, and up to eleven for the time of each."""
    form = video_forms.FORMS["videollama3"]
    form.write(tmp_path)
    sizes = {"text_config.max_position_embeddings": 32768, "vision_config.patch_size": 14}
    tiny.edit_json(tmp_path / "config.json", sizes)
    for frames, tokens in {8: 1196, 16: 1008, 64: 252, 128: 120, 180: 84, None: 84}.items():
        made = plan(tmp_path, frames=frames)
        count = frames or 180
        assert (made.frames, made.tokens_per_frame, made.fits) == (count, tokens, True)
        assert made.tokens == count * (tokens + 11) + 64 + 256
    said = "180 frames of 1,280 x 720 pixels x 84 = 15,120, 11 each for their times, the question"
    assert said in str(made)
    most = made.most_frames
    assert f"yes; at most {most:,} frames in a context of 32,768 tokens" in str(made)
    assert plan(tmp_path, frames=most).fits
    assert not plan(tmp_path, frames=most + 1).fits
    told = json.loads(json.dumps(made.to_dict()))
    assert (told["most_frames"], told["time_tokens"]) == (most, 11)
