"""Folders that are no checkpoint vidlm reads: what they are, and what to load instead."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vidlm.errors import ModelError, UnsupportedModel

ADAPTER = "adapter_config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
# Files that tell a folder without a config.json: (a pattern, what has it, what to do).
KINDS = (
    ("*.gguf", "a GGUF file of llama.cpp", "load the original checkpoint, and pass quantize="),
    ("model_index.json", "a pipeline of diffusers", "vidlm reads video-text-to-text models"),
    ("params.json", "weights in their authors' layout", "load the conversion for transformers"),
    ("*.onnx", "an ONNX export", "load the checkpoint that it was made of"),
)
# The research code's names for model types whose checkpoints were converted for transformers.
ORIGINALS = ("llava", "llava_llama", "llava_mistral", "llava_qwen", "video_llava")


def explain_missing_config(folder: Path) -> ModelError:
    """The error for a folder without a config.json."""
    adapter = folder / ADAPTER
    if adapter.is_file():
        return _adapter(folder, adapter)
    for pattern, what, instead in KINDS:
        names = sorted(path.name for path in folder.glob(pattern))
        if names:
            return UnsupportedModel(f"{folder} has {what} ({names[0]}), no config.json; {instead}")
    inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
    hint = f"its subfolder {inside[-1]} has one, pass that" if inside else ""
    return ModelError(
        f"{folder} has no config.json, so it is not a checkpoint; "
        f"{hint or 'pass the folder that holds config.json and the weights'}"
    )


def refuse_foreign(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise UnsupportedModel where a folder with this config.json is of another layout."""
    if (folder / ADAPTER).is_file() and not any((folder / name).is_file() for name in WEIGHTS):
        raise _adapter(folder, folder / ADAPTER)
    if isinstance(config.get("quantization"), dict) and "quantization_config" not in config:
        raise UnsupportedModel(
            f"{folder} was quantized by MLX (quantization in config.json); load the original "
            "checkpoint, and pass quantize='int4', say"
        )
    towers = [key for key in config if key.startswith("mm_") and key.endswith("_tower")]
    if config.get("model_type") in ORIGINALS and towers and "text_config" not in config:
        raise UnsupportedModel(
            f"{folder} has the layout of the LLaVA research code ({towers[0]} in config.json), not "
            f"that of transformers, which vidlm reads; {_converted(config)}"
        )


def _adapter(folder: Path, path: Path) -> UnsupportedModel:
    """PEFT's adapters hold differences to a model, which has to be loaded first."""
    try:
        words = json.loads(path.read_text("utf-8"))
        base, kind = words.get("base_model_name_or_path"), words.get("peft_type")
    except (OSError, ValueError, AttributeError):
        base, kind = None, None
    named = repr(base) if base else "the model it was trained on"
    model = repr(base) if base else "<its base model>"
    return UnsupportedModel(
        f"{folder} is a {kind or 'PEFT'} adapter ({ADAPTER}), not a whole model; its base is "
        f"{named}. Load that and put the adapter on it: peft.PeftModel.from_pretrained("
        f"AutoModelForImageTextToText.from_pretrained({model}), {str(folder)!r}); "
        "merge_and_unload() and save_pretrained() of the result make a folder to load here"
    )


def _converted(config: Mapping[str, Any]) -> str:
    """Which repository to load in an original's place."""
    size = {5120: "13B", 7168: "34B"}.get(config.get("hidden_size", 4096), "7B")
    if "mm_video_tower" in config or config.get("model_type") == "video_llava":
        return "load LanguageBind/Video-LLaVA-7B-hf"
    if config.get("mm_resampler_type") == "spatial_pool" or "mm_spatial_pool_stride" in config:
        return f"load llava-hf/LLaVA-NeXT-Video-{'34B' if size == '34B' else '7B'}-hf"
    if config.get("model_type") == "llava_qwen":
        size = "0.5b" if config.get("hidden_size") == 1024 else "7b"
        return f"for LLaVA-NeXT-Interleave load llava-hf/llava-interleave-qwen-{size}-hf"
    if config.get("image_grid_pinpoints"):
        return (
            "of LLaVA-NeXT (1.6) vidlm reads the video models alone: load "
            "llava-hf/LLaVA-NeXT-Video-7B-hf, or llava-hf/llava-1.5-7b-hf"
        )
    return f"for LLaVA-1.5 load llava-hf/llava-1.5-{size.lower()}-hf"
