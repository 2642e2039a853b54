"""Published shapes with random weights, and prompts with a video for them.

Every checkpoint is written once, as safetensors, and read by each library that is measured. A
prompt depends on a seed in its pixels and in its very first token: no two of them have anything in
common that a cache could keep, so each run of a benchmark costs what a first question costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Tensor]
BEFORE, AFTER = 10, 20  # tokens of text around the video
MERGE = 2  # VideoLLaMA3 makes one token of so many patches down and across


@dataclass(frozen=True)
class Shape:
    """A checkpoint's family and config.json, and how much video it is asked about.

    grid: patches down and across of a frame.
    """

    family: str
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    frames: int
    grid: tuple[int, int]
    placeholder: int
    top: Mapping[str, Any] = field(default_factory=dict)

    @property
    def packed(self) -> bool:
        """Whether a video is rows of patches (VideoLLaMA3) and not pictures."""
        return self.family == "VideoLlama3"

    @property
    def media_name(self) -> str:
        return "pixel_values_videos" if self.packed else "pixel_values"

    @property
    def tokens_per_frame(self) -> int:
        down, across = self.grid
        return down * across // MERGE**2 if self.packed else down * across

    @property
    def prompt_tokens(self) -> int:
        return BEFORE + self.frames * self.tokens_per_frame + AFTER

    def config(self) -> dict[str, Any]:
        return {"text_config": dict(self.text), "vision_config": dict(self.vision), **self.top}

    def video(self, seed: int) -> Inputs:
        """The media inputs of one video."""
        generator = torch.Generator().manual_seed(seed)
        (down, across), side = self.grid, self.vision["patch_size"]
        if not self.packed:
            pixels = self.vision["image_size"]  # a rest that is no whole patch is left out
            size = (self.frames, 3, pixels, pixels)
            return {"pixel_values": torch.randn(size, generator=generator)}
        patches, tokens = self.frames * down * across, self.frames * self.tokens_per_frame
        return {
            "pixel_values_videos": torch.randn(patches, 3 * side**2, generator=generator),
            "video_grid_thw": torch.tensor([[self.frames, down, across]]),
            "video_merge_sizes": torch.tensor([MERGE]),
            "video_compression_mask": torch.ones(tokens, dtype=torch.bool),
        }

    def ids(self, seed: int, question: int = 0) -> Tensor:
        """(1, T) ids of a prompt with a video; another question differs in its last tokens."""
        text = _words(seed, question, self.text["vocab_size"])
        media = torch.full((self.frames * self.tokens_per_frame,), self.placeholder)
        return torch.cat((text[:BEFORE], media, text[BEFORE:]))[None]

    def prompt(self, seed: int, question: int = 0) -> Inputs:
        return {"input_ids": self.ids(seed, question), **self.video(seed)}

    def text_prompt(self, seed: int) -> Inputs:
        """As many ids as the prompt with a video has, all of them text."""
        generator = torch.Generator().manual_seed(seed)
        size, below = (1, self.prompt_tokens), self.placeholder - 8  # and any other placeholder
        return {"input_ids": torch.randint(2, below, size, generator=generator)}


def _words(seed: int, question: int, vocabulary: int) -> Tensor:
    """The text of a prompt: its first token tells the seed, its last three the question."""
    first = 100 + seed % 100
    last = [200 + question % 100, 50, 51]
    words = torch.tensor([first, *range(2, BEFORE + AFTER - len(last) + 1), *last])
    assert int(words.max()) < vocabulary
    return words


SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}
QWEN_05B = {
    "model_type": "qwen2",
    "vocab_size": 152000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
QWEN2_05B = {
    **QWEN_05B,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}
QWEN_2B = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
NAVIT = {
    "model_type": "video_llama_3_vision",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
}
INTERLEAVE = {
    "image_token_index": 151646,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
}
LLAVA = Shape("Llava", QWEN_05B, SIGLIP, 8, (27, 27), 151646, INTERLEAVE)
SHAPES = {
    "llava-interleave-0.5b": LLAVA,
    "llava-gqa-0.5b": replace(LLAVA, text=QWEN2_05B, frames=16),
    "videollama3-2b": Shape(
        "VideoLlama3",
        {**QWEN_2B, "max_position_embeddings": 32768},
        NAVIT,
        frames=16,
        grid=(24, 42),  # 336 x 588 pixels
        placeholder=151656,
        top={"image_token_id": 151655, "video_token_id": 151656},
    ),
}

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TINY_TEXT = {"num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 4096}


def tiny(shape: Shape) -> Shape:
    """The same family with a network so small that a benchmark runs in seconds."""
    special = {name: 500 + i for i, name in enumerate(n for n in shape.top if "token" in n)}
    placeholder = max(special.values())
    return replace(
        shape,
        text={**shape.text, **SMALL, **TINY_TEXT},
        vision={**shape.vision, **SMALL, "image_size": 58, "patch_size": 14},
        frames=2,
        grid=(4, 4),
        placeholder=placeholder,
        top={**shape.top, **special},
    )


def write(folder: Path, shape: Shape, dtype: torch.dtype) -> None:
    """A checkpoint of a shape.

    Layers keep their input's size and embeddings are small beside what layers add: with tied ones,
    a larger embedding would make every answer a repetition of the prompt's last token, and answers
    that agree would show nothing.
    """

    def deviation(name: str, weight: Tensor) -> float:
        small = weight.ndim < 2 or "embed_tokens" in name
        return 0.05 if small else weight[0].numel() ** -0.5

    write_random(folder, shape.family, shape.config(), dtype, deviation)


def write_random(
    folder: Path,
    family: str,
    config: Mapping[str, Any],
    dtype: torch.dtype,
    deviation: Callable[[str, Tensor], float],
) -> nn.Module:
    """A checkpoint of any family, and the model that it was written from: normal weights, always
    the same, of a standard deviation that may depend on a weight's name; norms are 1."""
    import vidlm

    made = getattr(vidlm, f"{family}Config").from_dict(config)
    with torch.device("meta"):
        model = getattr(vidlm, f"{family}ForConditionalGeneration")(made)
    model = model.to(dtype).to_empty(device="cpu")
    model.tie()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                weight.fill_(1)
            else:
                weight.normal_(0, deviation(name, weight), generator=generator)
    model.save_pretrained(folder)
    return model
