"""A tiny Slow-Fast checkpoint with random weights, made without its authors' code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

import tiny
import video_forms
from vidlm.hf.slowfast import LlavaQwenSlowFastForCausalLM
from vidlm.models.slowfast import SlowFastConfig

CONFIG: dict[str, Any] = {
    "model_type": "llava_qwen_slow_fast",
    "vocab_size": tiny.VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "eos_token_id": video_forms.EOS,
    "mm_vision_tower": "convnext-576",
    "fixture_vision": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "image_size": 128},
    "mm_video_pooling_stride": 2,
    "cross_attn_every_n_layers": 2,
    "min_fast_frames": 4,
    "fast_token_temporal_stride": 4,
    "mm_training_video_frames": 16,
}


def write(folder: Path, **changes: Any) -> Path:
    model = LlavaQwenSlowFastForCausalLM(SlowFastConfig.from_dict({**CONFIG, **changes}))
    tiny.randomise(model)
    with torch.no_grad():
        for layer in model.config.hybrid_layers:  # open gates, which begin closed
            model.model.layers[layer].self_attn.cross_attn_warm_up_gate.fill_(0.7)
    model.save_pretrained(folder)
    video_forms.write_tokenizer(folder)
    config = folder / "tokenizer_config.json"
    words = {**json.loads(config.read_text()), "padding_side": "right"}
    config.write_text(json.dumps(words))
    return folder
