"""Video-LLaVA: two towers, one for images and one for videos, and a projector that both share.

Paper: Video-LLaVA (arXiv 2311.10122). Checkpoint: LanguageBind/Video-LLaVA-7B-hf (two CLIP ViT-L/14
at 224 pixels, Vicuna 7B).
Reference: transformers, models/video_llava. Parity: tests/parity/test_video_families.py.

Tokens: 256 of an image, whose class token is dropped; 257 of a frame of a video, whose class token
stays, whatever vision_feature_select_strategy says. Eight frames are 2,056 tokens, and what the
model was trained with; another number works and is warned of.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor

from vidlm.media import Video
from vidlm.models.base import Encoded, Family, Kind, Media
from vidlm.models.tower import (
    RENAMES,
    Layers,
    TowerBody,
    TowerConfig,
    TowerModel,
    TowerProcessor,
    as_layers,
    in_chunks,
)
from vidlm.nn.upload import upload
from vidlm.vision.preprocess import PillowPreprocess
from vidlm.vision.vit import VisionTransformer

TRAINED_FRAMES = 8
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class VideoLlavaConfig(TowerConfig):
    """config.json of a Video-LLaVA checkpoint; see TowerConfig."""

    model_type = "video_llava"
    architecture = "VideoLlavaForConditionalGeneration"
    vision_default = MappingProxyType(
        {
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 224,
            "patch_size": 14,
        }
    )
    aliases = MappingProxyType({**TowerConfig.aliases, "video_token_id": "video_token_index"})

    video_token_index: int = 32001
    image_seq_length: int = 256  # kept for others: no forward pass reads these two
    video_seq_length: int = 2056

    @property
    def video_token_id(self) -> int:
        return self.video_token_index

    @property
    def placeholders(self) -> Mapping[Kind, int]:
        return {"image": self.image_token_index, "video": self.video_token_index}

    @property
    def tokens_per_image(self) -> int:
        vision, keep_all = self.vision_config, self.vision_feature_select_strategy == "full"
        return vision.patches + vision.class_token - (not keep_all)

    def tokens_per_frame(self) -> int:
        return self.vision_config.patches + self.vision_config.class_token


class VideoLlavaProcessor(TowerProcessor):
    """Images (3, H, W) and videos (F, 3, H, W), and how many placeholders each fills."""

    config_class = VideoLlavaConfig
    processor_class = "VideoLlavaProcessor"
    image_class = PillowPreprocess  # transformers has no other; videos are resized by torch
    takes_videos = True

    def media(self, images: Sequence[Any], videos: Sequence[Video] = ()) -> list[Media]:
        count = self.frame_tokens.count(self.image_pixels.size)
        made = [Media(pixels, count) for pixels in self.image_pixels(images)] if images else []
        return made + [self._video(video) for video in videos]

    def _video(self, video: Video) -> Media:
        pixels = self.video_pixels(list(video.frames))
        F, _, H, W = pixels.shape
        if F != TRAINED_FRAMES:
            log.warning(
                "%s: %d frames; Video-LLaVA was trained with %d, and answers may be worse",
                *(video.name, F, TRAINED_FRAMES),
            )
        tokens = self.frame_tokens
        patches = (H // tokens.patch_size) * (W // tokens.patch_size)
        count = F * (patches + tokens.num_additional_image_tokens)
        return Media(pixels, count, "video", F)


class VideoLlavaNetwork(TowerModel):
    """The network."""

    def __init__(self, config: VideoLlavaConfig) -> None:
        names = ("image_tower", "video_tower")
        towers = {name: VisionTransformer(config.vision_config) for name in names}
        super().__init__(config, TowerBody(config, **towers))

    def _encoding(
        self, media: Sequence[Media], layers: Layers | None = None, strategy: str | None = None
    ) -> Generator[None, None, list[Encoded]]:
        """Pixels (3, H, W) of each image, (F, 3, H, W) of each video -> its (M, D) features;
        `layers` and `strategy` replace the config's."""
        body = self.body
        wanted = self.config.feature_layers if layers is None else as_layers(layers)
        strategy = strategy or self.config.vision_feature_select_strategy

        def images(pixels: Tensor) -> Tensor:
            x = body.image_tower(upload(pixels, self.device, self.dtype), wanted)
            return body.multi_modal_projector(x[:, 1:] if strategy == "default" else x)

        def frames(pixels: Tensor) -> Tensor:
            x = body.video_tower(upload(pixels, self.device, self.dtype), wanted)
            return body.multi_modal_projector(x)

        made = []
        for item in media:
            if item.kind == "video":
                tokens = yield from in_chunks(frames, item.pixels)
            else:
                tokens = yield from in_chunks(images, item.pixels[None])
            made.append(Encoded(tokens.flatten(0, 1)))
        return made


FAMILY = Family(VideoLlavaConfig, RENAMES, VideoLlavaProcessor, VideoLlavaNetwork)
