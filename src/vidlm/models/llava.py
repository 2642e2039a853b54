"""LLaVA: one vision tower, a two-layer projector, a decoder; a video is its frames as images.

Papers: LLaVA-1.5 (arXiv 2310.03744), LLaVA-NeXT-Interleave (arXiv 2407.07895).
Checkpoints: llava-hf/llava-interleave-qwen-0.5b-hf, -7b-hf, -7b-dpo-hf (SigLIP + Qwen2),
llava-hf/llava-1.5-7b-hf, -13b-hf (CLIP + Llama), and the package's own demo model.
Reference: transformers, models/llava. Parity: tests/parity/test_llava.py.

Tokens of a frame: (image_size / patch_size)^2, so 729 for the interleave models (features of the
last layer, no post-norm) and 576 for LLaVA-1.5 (features of the last layer but one, class token
dropped). Eight frames of a video are 5,832 and 4,608 tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vidlm.errors import ModelError, UnsupportedModel
from vidlm.hub import read_config, read_json
from vidlm.media import Video
from vidlm.models.base import Encoded, Family, Media, VideoModel
from vidlm.nn.activation import activation
from vidlm.nn.decoder import CausalLM, DecoderConfig
from vidlm.nn.step import Step
from vidlm.text import Tokenizer
from vidlm.vision.preprocess import Preprocess
from vidlm.vision.vit import VisionTower, ViTConfig
from vidlm.weights import Renames

PROCESSOR_FILE = "processor_config.json"
IMAGES_FILE = "preprocessor_config.json"
CHUNK = 8  # frames encoded at a time: bounds the vision tower's memory whatever the video

# What a config.json without a vision_config means: CLIP ViT-L/14 at 336 pixels.
VISION_DEFAULT: Mapping[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


@dataclass(frozen=True)
class LlavaConfig:
    """config.json of a LLaVA checkpoint, under its own names.

    `vision_config` and `text_config` may be given as mappings, whose absent keys take the defaults
    of their model_type, or left out.
    """

    model_type: ClassVar[str] = "llava"

    vision_config: ViTConfig = None  # type: ignore[assignment]  # filled in __post_init__
    text_config: DecoderConfig = None  # type: ignore[assignment]
    image_token_index: int = 32000
    projector_hidden_act: str = "gelu"
    vision_feature_select_strategy: str = "default"
    vision_feature_layer: int | tuple[int, ...] = -2
    multimodal_projector_bias: bool = True
    dtype: str | None = None

    def __post_init__(self) -> None:
        fill = object.__setattr__
        if not isinstance(self.vision_config, ViTConfig):
            given = VISION_DEFAULT if self.vision_config is None else self.vision_config
            fill(self, "vision_config", ViTConfig.from_dict(given))
        if not isinstance(self.text_config, DecoderConfig):
            fill(self, "text_config", DecoderConfig.from_dict(self.text_config or {}))
        if isinstance(self.vision_feature_layer, list):
            fill(self, "vision_feature_layer", tuple(self.vision_feature_layer))
        if self.vision_feature_select_strategy not in ("default", "full"):
            raise UnsupportedModel(
                f"vision_feature_select_strategy={self.vision_feature_select_strategy!r}; "
                "allowed: 'default' (class token dropped), 'full'"
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> LlavaConfig:
        """Read config.json, with either spelling of renamed keys."""
        known = {f.name for f in fields(cls)}
        values = {key: value for key, value in config.items() if key in known}
        if "image_token_id" in config:
            values.setdefault("image_token_index", config["image_token_id"])
        values["dtype"] = config.get("dtype") or config.get("torch_dtype")
        text = dict(values.get("text_config") or {})
        if config.get("tie_word_embeddings"):
            text["tie_word_embeddings"] = True
        return cls(**{**values, "text_config": text})

    def to_dict(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["vision_config"] = self.vision_config.to_dict()
        values["text_config"] = self.text_config.to_dict()
        if isinstance(self.vision_feature_layer, tuple):
            values["vision_feature_layer"] = list(self.vision_feature_layer)
        if self.dtype is None:
            del values["dtype"]
        else:
            values["torch_dtype"] = self.dtype
        return {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": self.model_type,
            "tie_word_embeddings": self.text_config.tie_word_embeddings,
            **values,
        }

    @property
    def image_token_id(self) -> int:
        return self.image_token_index

    @property
    def placeholder_id(self) -> int:
        return self.image_token_index

    @property
    def max_context(self) -> int:
        return self.text_config.max_position_embeddings

    @property
    def feature_layers(self) -> tuple[int, ...]:
        layer = self.vision_feature_layer
        return (layer,) if isinstance(layer, int) else layer

    @property
    def tokens_per_frame(self) -> int:
        vision, keep_all = self.vision_config, self.vision_feature_select_strategy == "full"
        # "default" drops the first token, which is a patch where the tower has no class token.
        return vision.patches + vision.class_token - (not keep_all)


# Ours are the hub's names (layout A). B: 4.52 module names; C: written by 5.x; D: 5.x in memory.
RENAMES = Renames(
    table=(
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^(?:model\.)?vision_tower\.(?:vision_model\.)?", "vision_tower.vision_model."),
        (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
    ),
    ignored=(
        r"rotary_emb\.inv_freq$",
        r"embeddings\.position_ids$",
        r"^image_newline$|^model\.image_newline$",
        r"vision_tower\.(vision_model\.)?head\.",  # SigLIP's pooling head: not part of LLaVA
    ),
)


@dataclass(frozen=True)
class FrameTokens:
    """How many placeholders a frame gets, in the words of processor_config.json."""

    patch_size: int
    num_additional_image_tokens: int  # 1 for a class token
    vision_feature_select_strategy: str

    @classmethod
    def read(cls, folder: Path, names: Mapping[str, Any]) -> FrameTokens:
        """From config.json, which is what the model obeys: processor_config.json (`names`) has been
        wrong by one on the hub (728 for 729), and counts only in a folder without a model."""
        if not (folder / "config.json").is_file():
            missing = [f.name for f in fields(cls) if names.get(f.name) is None]
            if missing:
                raise ModelError(
                    f"{folder} has no config.json, and processor_config.json does not say "
                    f"{', '.join(missing)}; pass the folder or repository of the whole model"
                )
            return cls(**{f.name: names[f.name] for f in fields(cls)})
        config = LlavaConfig.from_dict(read_config(folder))
        vision = config.vision_config
        strategy = config.vision_feature_select_strategy
        return cls(vision.patch_size, int(vision.class_token), strategy)

    def count(self, size: tuple[int, int]) -> int:
        """For pixels of this height and width; "default" drops the first token."""
        patches = (size[0] // self.patch_size) * (size[1] // self.patch_size)
        dropped = self.vision_feature_select_strategy == "default"
        return patches + self.num_additional_image_tokens - dropped


class LlavaProcessor:
    """Images to pixels, and an image to its number of placeholders."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        preprocess: Preprocess,
        frame_tokens: FrameTokens,
        image_token: str = "<image>",
    ) -> None:
        self.tokenizer = tokenizer
        self.preprocess = preprocess
        self.frame_tokens = frame_tokens
        self.image_token = image_token
        self.image_token_id = tokenizer.backend.token_to_id(image_token)
        if self.image_token_id is None:
            raise ModelError(
                f"the tokenizer has no token {image_token!r}, which stands for an image; its files "
                "are not those of a LLaVA checkpoint, download them again"
            )

    @classmethod
    def from_folder(cls, folder: Path) -> LlavaProcessor:
        """Read a checkpoint's folder, or one with the processor's files alone."""
        processor = folder / PROCESSOR_FILE
        names = read_json(processor) if processor.is_file() else {}
        return cls(
            Tokenizer.from_folder(folder),
            Preprocess.from_dict(_image_processor_config(folder, names)),
            FrameTokens.read(folder, names),
            names.get("image_token") or "<image>",
        )

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files, preprocessor_config.json and processor_config.json."""
        self.tokenizer.save(folder)
        shared = {"processor_class": "LlavaProcessor"}
        words = {"image_token": self.image_token, **asdict(self.frame_tokens)}
        files = {IMAGES_FILE: self.preprocess.to_dict(), PROCESSOR_FILE: words}
        for name, content in files.items():
            (folder / name).write_text(json.dumps({**shared, **content}, indent=2) + "\n")

    def pixels(self, images: Sequence[Any]) -> Tensor:
        """Images or frames -> (F, 3, H, W) float32."""
        return self.preprocess(images)

    def tokens_of(self, pixels: Sequence[Media]) -> list[int]:
        return [self.frame_tokens.count(self.preprocess.size)] * len(pixels)

    def video_parts(self, video: Video) -> list[dict[str, Any]]:
        """A video as content parts of a chat message: one image part a frame."""
        return [{"type": "image", "image": frame} for frame in video.frames]


def _image_processor_config(folder: Path, names: Mapping[str, Any]) -> dict[str, Any]:
    """preprocessor_config.json, or the block transformers 5 nests in processor_config.json."""
    nested = names.get("image_processor")
    return dict(nested) if nested else read_json(folder / IMAGES_FILE)


class Projector(nn.Module):
    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        wide = config.vision_config.hidden_size * len(config.feature_layers)
        D, bias = config.text_config.hidden_size, config.multimodal_projector_bias
        self.linear_1 = nn.Linear(wide, D, bias=bias)
        self.linear_2 = nn.Linear(D, D, bias=bias)
        self.act = activation(config.projector_hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(x)))


class LlavaModel(VideoModel):
    """The network. Parameter names are those of the published checkpoints."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = VisionTower(config.vision_config)
        self.multi_modal_projector = Projector(config)
        self.language_model = CausalLM(config.text_config)

    def encode(self, media: Sequence[Media]) -> list[Encoded]:
        """Pixels (3, H, W) of each image or frame -> its (M, D) features."""
        encoded = []
        for start in range(0, len(media), CHUNK):
            pixels = torch.stack(list(media[start : start + CHUNK]))
            encoded += [Encoded(tokens) for tokens in self.features(pixels)]
        return encoded

    def features(self, pixels: Tensor) -> Tensor:
        """(F, 3, H, W) -> (F, M, D)"""
        pixels = pixels.to(self.device, self.dtype)
        x = self.vision_tower(pixels, self.config.feature_layers)
        if self.config.vision_feature_select_strategy == "default":
            x = x[:, 1:]
        return self.multi_modal_projector(x)

    def embed(self, ids: Tensor) -> Tensor:
        return self.language_model.model.embed_tokens(ids)

    def hidden(self, x: Tensor, step: Step, trace: list[Tensor] | None = None) -> Tensor:
        return self.language_model.model(x, step, trace)

    def logits(self, h: Tensor) -> Tensor:
        return self.language_model.lm_head(h)

    def tie(self) -> None:
        self.language_model.tie(self.config.text_config)


FAMILY = Family(LlavaConfig, RENAMES, LlavaProcessor, LlavaModel)
