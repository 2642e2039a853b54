"""Configurations of towers and decoders under transformers' names, to put a model together from."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from vidlm.errors import unknown_keyword
from vidlm.nn.decoder import DecoderConfig
from vidlm.vision.vit import ViTConfig

ROPE = ("rope_scaling", "rope_parameters")


def CLIPVisionConfig(**words: Any) -> ViTConfig:
    """A CLIP tower; words left out take the defaults of transformers' class."""
    return ViTConfig.from_dict(_known("CLIPVisionConfig()", ViTConfig, words, "clip_vision_model"))


def LlamaConfig(**words: Any) -> DecoderConfig:
    """A Llama decoder; words left out take the defaults of transformers' class."""
    return DecoderConfig.from_dict(_known("LlamaConfig()", DecoderConfig, words, "llama"))


def _known(where: str, kind: type[Any], words: dict[str, Any], model_type: str) -> dict[str, Any]:
    names = [f.name for f in fields(kind)] + list(ROPE)
    for word in words:
        if word not in names:
            raise unknown_keyword(where, word, names)
    return {**words, "model_type": model_type}
