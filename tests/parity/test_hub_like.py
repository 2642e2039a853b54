"""The video families' checkpoints as the hub has them: config.json, processor and tokenizer files.

The folders of the larger corpus are rebuilt to the hub's content and hold no weights. Numbers come
from transformers' own tests and from its processors, run on the same input.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
import video_forms
from oracle import transformers
from vidlm import AutoConfig, AutoProcessor
from vidlm.errors import ModelError, UnsupportedModel
from vidlm.plan import plan

FAMILIES = {
    "next_video": "LlavaNextVideo",
    "video_llava": "VideoLlava",
    "vl3": "VideoLlama3",
}


def hub(shared: Path, name: str) -> Path:
    return shared / "data" / "hub_like" / name


# ---- config.json ---------------------------------------------------------------------------------

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
QWEN = {  # what the stub leaves to the class
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
        "image_token_index": 32001,
        "video_token_index": 32000,
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
        "image_token_index": 32000,
        "video_token_index": 32001,
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


def holds(read: Any, expected: Mapping[str, Any]) -> None:
    for name, value in expected.items():
        found = getattr(read, name)
        if isinstance(value, Mapping) and name.endswith("_config"):
            holds(found, value)
        else:
            assert (name, found) == (name, value)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_value_of_the_published_configs(shared: Path, name: str) -> None:
    holds(AutoConfig.from_pretrained(hub(shared, name)), PUBLISHED[name])


@dataclass(frozen=True)
class Variant:
    """A config.json that is, or was, on the hub: which folder's, what is other, what it means."""

    folder: str
    change: Mapping[str, Any] = field(default_factory=dict)
    drop: tuple[str, ...] = ()
    means: Mapping[str, Any] = field(default_factory=dict)

    def write(self, shared: Path, folder: Path) -> Path:
        shutil.copy(hub(shared, self.folder) / "config.json", folder)
        tiny.edit_json(folder / "config.json", self.change, *self.drop)
        return folder

    @property
    def theirs(self) -> Any:
        return getattr(transformers, f"{FAMILIES[self.folder]}Config")


ROPE = "text_config.rope_scaling"
LINEAR = {"max_context": 10240, "text_config": {"rope_factor": 2.5}}
PLAIN = {"max_context": 4096, "text_config": {"rope_factor": 1.0}}
MISTRAL = {
    "model_type": "mistral",
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
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
    "use_cache": False,
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
    "use_sliding_window": False,
    "sliding_window": None,
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


def said(config: Mapping[str, Any], *hidden: str) -> dict[str, Any]:
    """What a text_config says that ours repeats under the same name."""
    return {k: v for k, v in config.items() if k not in ("sliding_window", *hidden)}


def yi(image: int, video: int) -> Variant:
    tokens = {"image_token_index": image, "video_token_index": video}
    text = {**said(YI, "use_cache"), "head_dim": 128, "bos_token_id": 1}
    return Variant(
        "next_video", {**tokens, "text_config": YI}, (), {**tokens, "text_config": text}
    )


VARIANTS = {
    "before it had a model_type": Variant(
        "next_video", {"model_type": "llava_next"}, (), PUBLISHED["next_video"]
    ),
    "rope_scaling absent": Variant("next_video", {}, (ROPE,), PLAIN),
    "rope_scaling null": Variant("next_video", {ROPE: None}, (), PLAIN),
    "rope words beside": Variant("next_video", {"text_config.factor": 2.0}, (ROPE,), PLAIN),
    "rope_scaling with rope_type": Variant(
        "next_video", {ROPE: {"rope_type": "linear", "factor": 2.5}}, (), LINEAR
    ),
    "rope_scaling with both and words beside": Variant(
        "next_video",
        {
            ROPE: {"rope_type": "linear", "type": "linear", "factor": 2.5},
            "text_config.factor": 2.0,
        },
        (),
        LINEAR,
    ),
    "32K": Variant(
        "next_video",
        {"text_config": MISTRAL},
        (),
        {
            "max_context": 32768,
            "text_config": {
                **said(MISTRAL),
                "hidden_size": 4096,
                "num_hidden_layers": 32,
                "head_dim": 128,
                "qkv_bias": False,
            },
        },
    ),
    "34B": yi(64001, 64000),
    "34B, later": yi(64004, 64003),
    "dtype": Variant(
        "video_llava", {"dtype": "float16"}, ("torch_dtype",), {"dtype": "float16"}
    ),
    "no vision_config": Variant("video_llava", {}, ("vision_config",), PUBLISHED["video_llava"]),
    "no vision_config, NeXT": Variant(
        "next_video", {}, ("vision_config",), PUBLISHED["next_video"]
    ),
    "2B": Variant(
        "vl3",
        {
            "text_config": QWEN_2B,
            "vision_config": {"model_type": "video_llama_3_vision", **NAVIT_2B},
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
        },
        (),
        {
            "text_config": {
                **said(QWEN_2B, "use_sliding_window"),
                "tie_word_embeddings": True,
                "head_dim": 128,
                "vocab_size": 151936,
            },
            "vision_config": {**NAVIT, **NAVIT_2B},
            "dtype": "bfloat16",
        },
    ),
    "2B, tied in its text_config": Variant(
        "vl3",
        {"text_config": {**QWEN_2B, "tie_word_embeddings": True}},
        (),
        {"text_config": {"tie_word_embeddings": True}},
    ),
}


def test_bad() -> None: ...
