"""Tiny checkpoints of the video families, with random weights, and transformers' own reading."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import tiny
from oracle import transformers

SPECIALS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<image>", "<video>", "<|image_pad|>", "<|video_pad|>"),
)
PAD, _, EOS, IMAGE, VIDEO, IMAGE_PAD, VIDEO_PAD = range(len(SPECIALS))
PATCH = 7  # of 28 x 28 frames: 4 x 4 patches
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
TEXT = {**tiny.TEXT, "eos_token_id": EOS, "max_position_embeddings": 2048}
CLIP = {"model_type": "clip_vision_model", **tiny.VISION, "projection_dim": 16}
NAVIT = {
    "model_type": "video_llama_3_vision",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "patch_size": 4,
}
LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "num_key_value_heads": 4}
MISTRAL = {"model_type": "mistral", "sliding_window": None, "head_dim": 16}
LONG = {"rope_scaling": {"type": "linear", "factor": 2.5}}
TOKENS = {"image_token_index": IMAGE, "video_token_index": VIDEO}
PADS = {"image_token_id": IMAGE_PAD, "video_token_id": VIDEO_PAD}
CROPPED = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ '<video>' }}{% endif %}"
    "{% endfor %}{{ '\n' }}{% endfor %}{{ 'assistant: ' }}"
)


@dataclass(frozen=True)
class Form:
    """One kind of checkpoint: the prefix of its class names, config.json, the processor's words."""

    family: str
    config: Mapping[str, Any]
    images: Mapping[str, Any]
    videos: Mapping[str, Any]
    words: Mapping[str, Any] = field(default_factory=dict)
    image: str = "<image>"
    video: str = "<video>"

    def named(self, suffix: str) -> Any:
        return getattr(transformers, f"{self.family}{suffix}")

    def network(self, seed: int = tiny.SEED) -> Any:
        """transformers' model in float32 with random weights."""
        model = self.named("ForConditionalGeneration")(self.named("Config")(**self.config)).eval()
        tiny.randomise(model, seed)
        return model

    def processor(self, folder: Path) -> Any:
        """transformers' processor, put together by hand: its AutoProcessor of 5.23 recurses without
        end on a folder like the hub's of LLaVA-NeXT-Video."""
        image_class = "LlavaNext" if self.family == "LlavaNextVideo" else self.family
        images = getattr(transformers, f"{image_class}ImageProcessor")(**self.images)
        videos = self.named("VideoProcessor")(**self.videos)
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        kwargs = {"image_processor": images, "video_processor": videos, "tokenizer": tokenizer}
        return self.named("Processor")(**kwargs, **self.words)

    @property
    def template(self) -> str:
        """A chat template that names its placeholders."""
        named = TEMPLATE.replace("'<image>'", repr(self.image))
        return named.replace("'<video>'", repr(self.video))

    def write(self, folder: Path) -> Path:
        """A whole checkpoint as transformers 5 writes it, the processor's files as the hub has
        them."""
        self.network().save_pretrained(folder)
        write_tokenizer(folder)
        named = {"processor_class": f"{self.family}Processor"}
        kind = {"image_processor_type": f"{self.family}ImageProcessor"}
        files = {
            "preprocessor_config.json": {**named, **kind, **self.images},
            "video_preprocessor_config.json": {**named, **self.videos},
            "processor_config.json": {**named, **self.words},
        }
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content))
        return folder


_WORDS = {
    "patch_size": PATCH,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
}
_ANYRES = {**CROPPED, "image_grid_pinpoints": PINPOINTS, "do_pad": True}
_SMALL = {"size": {"shortest_edge": 64, "longest_edge": 1600}, "patch_size": 4, **HALF}
_LONG = {"size": {"shortest_edge": 64, "longest_edge": 6400}, "patch_size": 4, **HALF}


def _next(text: Mapping[str, Any], **top: Any) -> Form:
    config = {"text_config": {**TEXT, **text}, "vision_config": CLIP, **TOKENS, **top}
    config["image_grid_pinpoints"] = PINPOINTS
    return Form("LlavaNextVideo", config, _ANYRES, CROPPED, _WORDS)


def _vl3(tied: bool) -> Form:
    text = {**TEXT, "model_type": "qwen2", "tie_word_embeddings": tied}
    config = {"text_config": text, "vision_config": NAVIT, **PADS, "tie_word_embeddings": tied}
    pads = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    return Form("VideoLlama3", config, _SMALL, {**_LONG, "merge_size": 2}, **pads)


FORMS = {
    "next-vicuna": _next({**LLAMA, **LONG}),
    "next-mistral": _next(MISTRAL, spatial_pool_mode="max"),
    "next-yi": _next({"model_type": "llama", "rope_theta": 5e6}, vision_feature_layer=[-2, -1]),
    "video-llava": Form(
        "VideoLlava",
        {"text_config": {**TEXT, **LLAMA}, "vision_config": CLIP, **TOKENS},
        CROPPED,
        CROPPED,
        _WORDS,
    ),
    "videollama3-tied": _vl3(True),
    "videollama3": _vl3(False),
}


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE, so that no text is outside its alphabet."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=tiny.VOCAB,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(tiny.TEXTS, trainer)
    made.save(str(folder / "tokenizer.json"))
    named = {"eos_token": SPECIALS[EOS], "pad_token": SPECIALS[PAD], "padding_side": "left"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def clip(seed: int, frames: int = 8, height: int = 40, width: int = 56) -> np.ndarray:
    """Noise (F, H, W, 3) over a slope, whose upper half stands still in every other frame."""
    rng = np.random.default_rng(seed)
    made = rng.integers(0, 160, (frames, height, width, 3))
    made += np.linspace(0, 95, width, dtype=int)[:, None]
    made[1::2, : height // 2] = made[0::2, : height // 2][: len(made[1::2])]
    return made.astype(np.uint8)


def two_read(form: Form, folder: Path) -> tuple[Any, Any]:
    """transformers' model and processor of a folder."""
    model = form.named("ForConditionalGeneration").from_pretrained(folder, dtype=torch.float32)
    return model.eval(), form.processor(folder)
