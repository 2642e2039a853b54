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

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vidlm.media import Video
from vidlm.models.base import Encoded, Family, Media
from vidlm.models.tower import (
    CHUNK,
    RENAMES,
    Layers,
    TowerBody,
    TowerConfig,
    TowerModel,
    TowerProcessor,
    as_layers,
)
from vidlm.nn.upload import upload
from vidlm.vision.vit import VisionTransformer

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
class LlavaConfig(TowerConfig):
    """config.json of a LLaVA checkpoint; see TowerConfig."""

    model_type = "llava"
    architecture = "LlavaForConditionalGeneration"
    vision_default = VISION_DEFAULT

    def tokens_per_frame(self) -> int:
        vision, keep_all = self.vision_config, self.vision_feature_select_strategy == "full"
        # "default" drops the first token, which is a patch where the tower has no class token.
        return vision.patches + vision.class_token - (not keep_all)


class LlavaProcessor(TowerProcessor):
    """Images to pixels, and an image to its number of placeholders."""

    config_class = LlavaConfig
    processor_class = "LlavaProcessor"

    def media(self, images: Sequence[Any], videos: Sequence[Video] = ()) -> list[Media]:
        """Images, and the frames of videos as images -> pixels (3, H, W) float32 of each."""
        frames = [*images, *(frame for video in videos for frame in video.frames)]
        tokens = self.frame_tokens.count(self.image_pixels.size)
        return [Media(pixels, tokens) for pixels in self.image_pixels(frames)] if frames else []


class LlavaNetwork(TowerModel):
    """The network."""

    def __init__(self, config: LlavaConfig) -> None:
        tower = VisionTransformer(config.vision_config)
        super().__init__(config, TowerBody(config, vision_tower=tower))

    def _encoding(
        self, media: Sequence[Media], layers: Layers | None = None, strategy: str | None = None
    ) -> Generator[None, None, list[Encoded]]:
        """Pixels (3, H, W) of each image or frame -> its (M, D) features."""
        made: list[Encoded] = []
        for start in range(0, len(media), CHUNK):
            pixels = torch.stack([item.pixels for item in media[start : start + CHUNK]])
            # Each in memory of its own, so that one can be forgotten without the others.
            made += [Encoded(x.clone()) for x in self.features(pixels, layers, strategy)]
            yield
        return made

    def features(
        self, pixels: Tensor, layers: Layers | None = None, strategy: str | None = None
    ) -> Tensor:
        """(F, 3, H, W) -> (F, M, D); `layers` and `strategy` replace the config's."""
        config = self.config
        wanted = config.feature_layers if layers is None else as_layers(layers)
        x = self.body.vision_tower(upload(pixels, self.device, self.dtype), wanted)
        if (strategy or config.vision_feature_select_strategy) == "default":
            x = x[:, 1:]
        return self.body.multi_modal_projector(x)


FAMILY = Family(
    LlavaConfig,
    # a newline of LLaVA-NeXT's that the original of the interleave models carried along
    replace(RENAMES, ignored=(*RENAMES.ignored, r"^(model\.)?image_newline$")),
    LlavaProcessor,
    LlavaNetwork,
)
