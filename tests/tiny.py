"""Tiny LLaVA checkpoints with random weights, in the combinations that are published.

A `Form` is one such combination: configuration, tokenizer and image processor, all in small.
`write` makes the folder of one with vidlm alone; `oracle.write` makes it with transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from vidlm.hf import LlavaConfig, LlavaForConditionalGeneration

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")
PAD, START, EOS, IMAGE = range(len(SPECIALS))
VOCAB = 300  # 256 bytes, the specials, and a few merges
FRAME_TOKENS = 16
SEED = 7  # one with which no form repeats itself in the prompts of the tests
TEXTS = ("what happens in the video? the red ball moves to the left, then to the right.",) * 3
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{% generation %}"
    "{{ '\n' + part['text'] }}{% endgeneration %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": PAD,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
HALF = [0.5, 0.5, 0.5]
SIGLIP_IMAGES = {
    "image_processor_type": "SiglipImageProcessor",
    "size": {"height": 28, "width": 28},
    "image_mean": HALF,
    "image_std": HALF,
}
CLIP_IMAGES = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 28},
    "crop_size": {"height": 28, "width": 28},
}


@dataclass(frozen=True)
class Form:
    """What tells one kind of checkpoint from another; `top` is the rest of its config.json."""

    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    images: Mapping[str, Any]
    top: Mapping[str, Any] = field(default_factory=dict)
    bos: bool = False  # whether the tokenizer puts one before each text

    @property
    def config(self) -> dict[str, Any]:
        return {
            "text_config": {**TEXT, **self.text},
            "vision_config": {**VISION, **self.vision},
            "image_token_index": IMAGE,
            **self.top,
        }

    @property
    def processor(self) -> dict[str, Any]:
        clip = self.vision["model_type"] == "clip_vision_model"
        return {
            "image_token": "<image>",
            "num_additional_image_tokens": int(clip),
            "patch_size": VISION["patch_size"],
            "vision_feature_select_strategy": self.top.get(
                "vision_feature_select_strategy", "default"
            ),
        }


_SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False}
_CLIP = {"model_type": "clip_vision_model", "projection_dim": 16}
_FULL = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
_QWEN = {"model_type": "qwen2"}
_LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "num_key_value_heads": 4}
_MISTRAL = {"model_type": "mistral", "sliding_window": None, "head_dim": 16}

INTERLEAVE = Form({**_QWEN, "tie_word_embeddings": True}, _SIGLIP, SIGLIP_IMAGES, _FULL)
FORMS = {
    "siglip-qwen2-tied": INTERLEAVE,
    "siglip-qwen2": Form(_QWEN, _SIGLIP, SIGLIP_IMAGES, _FULL),
    "clip-llama": Form(_LLAMA, _CLIP, CLIP_IMAGES, bos=True),
    "clip-mistral": Form(_MISTRAL, _CLIP, CLIP_IMAGES, {"vision_feature_layer": [-1, 1, -3]}),
}


def randomise(model: torch.nn.Module, seed: int = SEED) -> None:
    """Weights so large that answers vary and the best two tokens never nearly tie.

    The same ones for vidlm's model and for transformers', whose names differ in their prefixes.
    """
    generator = torch.Generator().manual_seed(seed)
    named = {re.sub(r"(language_|vision_)?model\.", "", n): p for n, p in model.named_parameters()}
    for name, weight in sorted(named.items(), key=lambda item: item[0]):
        noise = torch.randn(weight.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            weight.data = 1 + noise / 5
        elif weight.ndim < 2:
            weight.data = noise / 5
        elif "embed" in name:
            weight.data = 0.3 * noise  # tied, it would repeat itself if larger
        else:
            weight.data = 1.5 * noise / weight[0].numel() ** 0.5


def write(folder: Path, form: Form = INTERLEAVE) -> Path:
    """A whole checkpoint, made without transformers."""
    model = LlavaForConditionalGeneration(LlavaConfig.from_dict(form.config))
    randomise(model)
    model.save_pretrained(folder)
    write_processor(folder, form)
    return folder


def write_processor(folder: Path, form: Form) -> None:
    tokenizer(form).save(str(folder / "tokenizer.json"))
    named = {"eos_token": SPECIALS[EOS], "pad_token": SPECIALS[PAD]}
    if form.bos:
        named["bos_token"] = SPECIALS[PAD]
    files = {
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", **named},
        "preprocessor_config.json": {"processor_class": "LlavaProcessor", **form.images},
        "processor_config.json": {"processor_class": "LlavaProcessor", **form.processor},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def tokenizer(form: Form) -> Tokenizer:
    """A byte-level BPE, so that no text is outside its alphabet."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS, trainer)
    if form.bos:
        made.post_processor = processors.TemplateProcessing(
            single=f"{SPECIALS[PAD]} $A", special_tokens=[(SPECIALS[PAD], PAD)]
        )
    return made


def edit_json(path: Path, change: Mapping[str, Any] | None = None, *drop: str) -> None:
    """Set entries of a JSON file and drop others; "text_config.rope_theta" is an inner one."""
    content = json.loads(path.read_text())
    for key in (*(change or {}), *drop):
        *outer, last = key.split(".")
        inner = content
        for name in outer:
            inner = inner[name]
        if key in drop:
            inner.pop(last, None)
        else:
            inner[last] = (change or {})[key]
    path.write_text(json.dumps(content))


def picture(seed: int, height: int = 40, width: int = 56, mode: str = "RGB") -> Image.Image:
    """Noise over a slope: every pixel counts in a comparison."""
    rng = np.random.default_rng(seed)
    channels = {"L": 1, "P": 3, "RGB": 3, "LA": 2, "RGBA": 4}[mode]
    pixels = rng.integers(0, 160, (height, width, channels))
    pixels += np.linspace(0, 95, width, dtype=int)[:, None]
    image = Image.fromarray(np.squeeze(pixels.astype(np.uint8), -1 if channels == 1 else ()))
    return image.convert("P") if mode == "P" else image


def pictures(count: int, first: int = 0) -> list[Image.Image]:
    """Pictures of different sizes."""
    return [picture(first + i, 20 + 7 * i % 50, 64 - 5 * i % 40) for i in range(count)]
