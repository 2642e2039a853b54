"""Tiny LLaVA checkpoints with random weights: written by transformers, which then is the oracle.

A `Form` is a combination that is published: its configuration, its tokenizer and its image
processor, all in small. `write` makes the folder of one; `relayout` turns that into the other
layouts and spellings that checkpoints on the hub have.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision_on_cpu  # noqa: F401  (before transformers, which imports torchvision)
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what other libraries deprecate while they are imported
    import transformers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")
PAD, _, EOS, IMAGE = range(len(SPECIALS))
VOCAB = 300  # 256 bytes, the specials, and a few merges
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
SIGLIP = {
    "image_processor_type": "SiglipImageProcessor",
    "size": {"height": 28, "width": 28},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
CLIP = {
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
    def config(self) -> transformers.LlavaConfig:
        return transformers.LlavaConfig(
            text_config={**TEXT, **self.text},
            vision_config={**VISION, **self.vision},
            image_token_index=IMAGE,
            **self.top,
        )

    @property
    def processor(self) -> dict[str, Any]:
        clip = self.vision["model_type"] == "clip_vision_model"
        return {
            "processor_class": "LlavaProcessor",
            "image_token": "<image>",
            "num_additional_image_tokens": int(clip),
            "patch_size": VISION["patch_size"],
            "vision_feature_select_strategy": self.config.vision_feature_select_strategy,
        }


_SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False}
_CLIP = {"model_type": "clip_vision_model", "projection_dim": 16}
_FULL = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
_QWEN = {"model_type": "qwen2"}
_LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "num_key_value_heads": 4}
_MISTRAL = {"model_type": "mistral", "sliding_window": None, "head_dim": 16}

FORMS = {
    "siglip-qwen2-tied": Form({**_QWEN, "tie_word_embeddings": True}, _SIGLIP, SIGLIP, _FULL),
    "siglip-qwen2": Form(_QWEN, _SIGLIP, SIGLIP, _FULL),
    "clip-llama": Form(_LLAMA, _CLIP, CLIP, bos=True),
    "clip-mistral": Form(_MISTRAL, _CLIP, CLIP, {"vision_feature_layer": [-1, 1, -3]}),
}


def network(form: Form, seed: int = 0) -> transformers.LlavaForConditionalGeneration:
    """A model in float32 whose weights are so large that its answers vary and never nearly tie."""
    model = transformers.LlavaForConditionalGeneration(form.config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            weight.data = 1 + noise / 5
        elif weight.ndim < 2:
            weight.data = noise / 5
        elif "embed" in name:
            weight.data = noise
        else:
            weight.data = 1.5 * noise / weight[0].numel() ** 0.5
    return model


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


def write(folder: Path, form: Form, model: torch.nn.Module | None = None) -> Path:
    """A whole checkpoint as transformers 5 writes it (layout C), with its processor's files."""
    (model or network(form)).save_pretrained(folder)
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
        "processor_config.json": form.processor,
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


# From names as transformers 5 writes them (C) to the layouts of other versions.
LAYOUTS: dict[str, tuple[tuple[str, str], ...]] = {
    "A": ((r"^vision_tower\.", "vision_tower.vision_model."),),
    "B": (
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^language_model\.model\.", "model.language_model."),
        (r"^vision_tower\.", "model.vision_tower.vision_model."),
        (r"^multi_modal_projector\.", "model.multi_modal_projector."),
    ),
    "C": (),
    "D": (
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^language_model\.model\.", "model.language_model."),
        (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
    ),
}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def relayout(folder: Path, layout: str) -> dict[str, torch.Tensor]:
    """The weights of a folder that `write` made, under the names of another layout."""
    renamed = {}
    for name, tensor in weights(folder).items():
        for pattern, replacement in LAYOUTS[layout]:
            name, hits = re.subn(pattern, replacement, name)
            if hits:
                break
        renamed[name] = tensor
    return renamed


def store(folder: Path, tensors: Mapping[str, torch.Tensor], shards: int = 1) -> Path:
    """Replace the weights of a folder, in one file or in several with an index."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    where = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[number::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def edit_json(path: Path, change: Mapping[str, Any] | None = None, *drop: str) -> None:
    """Set entries of a JSON file and drop others; "text_config.rope_theta" is one inside another."""
    content = json.loads(path.read_text())
    for key, value in (change or {}).items():
        *outer, last = key.split(".")
        _inside(content, outer)[last] = value
    for key in drop:
        *outer, last = key.split(".")
        _inside(content, outer).pop(last, None)
    path.write_text(json.dumps(content))


def _inside(content: dict[str, Any], keys: list[str]) -> dict[str, Any]:
    for key in keys:
        content = content[key]
    return content


def load(folder: Path, **kwargs: Any) -> transformers.LlavaForConditionalGeneration:
    """The oracle's own reading of a folder."""
    kwargs = {"dtype": torch.float32, **kwargs}
    return transformers.LlavaForConditionalGeneration.from_pretrained(folder, **kwargs).eval()


def processor(folder: Path) -> transformers.LlavaProcessor:
    return transformers.AutoProcessor.from_pretrained(folder)


def picture(seed: int, height: int = 40, width: int = 56, mode: str = "RGB") -> Image.Image:
    """Noise over a slope: every pixel counts in a comparison."""
    rng = np.random.default_rng(seed)
    channels = {"L": 1, "P": 3, "RGB": 3, "LA": 2, "RGBA": 4}[mode]
    pixels = rng.integers(0, 160, (height, width, channels))
    pixels += np.linspace(0, 95, width, dtype=int)[:, None]
    image = Image.fromarray(np.squeeze(pixels.astype(np.uint8), -1 if channels == 1 else ()))
    return image.convert("P") if mode == "P" else image


def pictures(count: int, first: int = 0) -> list[Image.Image]:
    return [picture(first + i, 20 + 7 * i, 64 - 5 * i) for i in range(count)]


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


