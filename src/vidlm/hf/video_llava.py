"""Video-LLaVA under transformers' names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from vidlm.hf.forward import FeatureKeywords, TowerKeywords, answer_output, body_output
from vidlm.hf.image_processing import VideoLlavaImageProcessor
from vidlm.hf.model import BaseModel, ForConditionalGeneration, PretrainedModel
from vidlm.hf.outputs import CausalLMOutputWithPast, ModelOutputWithPast
from vidlm.hf.pack import stacked
from vidlm.hf.tower_processor import TOWER_WORDS, TowerProcessor
from vidlm.hf.video_processing import VideoLlavaVideoProcessor
from vidlm.models.base import Media
from vidlm.models.video_llava import FAMILY, VideoLlavaNetwork
from vidlm.text import Tokenizer


class VideoLlavaProcessor(TowerProcessor):
    """Texts, images and videos -> input_ids, attention_mask (B, L), pixel_values_images
    (N, 3, H, W) and pixel_values_videos (V, F, 3, H, W); a list of (F, 3, H, W) where videos have
    different numbers of frames."""

    family = FAMILY
    image_class = VideoLlavaImageProcessor
    video_class = VideoLlavaVideoProcessor

    def __init__(
        self,
        image_processor: VideoLlavaImageProcessor,
        video_processor: VideoLlavaVideoProcessor,
        tokenizer: Tokenizer,
        **words: Any,
    ) -> None:
        """`words`, as in processor_config.json: patch_size (14), vision_feature_select_strategy
        ("default"), num_additional_image_tokens (1), image_token, video_token; chat_template."""
        self._assemble((image_processor, video_processor), tokenizer, {**TOWER_WORDS, **words})

    def collate(self, media: Sequence[Media]) -> dict[str, Any]:
        images = [item.pixels for item in media if item.kind == "image"]
        videos = [item.pixels for item in media if item.kind == "video"]
        batch = {"pixel_values_images": images, "pixel_values_videos": videos}
        return {name: stacked(pixels) for name, pixels in batch.items() if pixels}


class _Inputs(PretrainedModel, VideoLlavaNetwork):
    """How both models take their media."""

    family = FAMILY
    media_inputs = ("pixel_values_images", "pixel_values", "pixel_values_videos")

    def media(self, inputs: Mapping[str, Any]) -> list[Media]:
        images = inputs.get("pixel_values_images", inputs.get("pixel_values", ()))
        made = [Media(pixels, self.config.tokens_per_image) for pixels in images]
        per_frame = self.config.tokens_per_frame()
        for pixels in inputs.get("pixel_values_videos", ()):
            made.append(Media(pixels, len(pixels) * per_frame, "video", len(pixels)))
        return made

    def get_image_features(  # type: ignore[override]  # the same under an older name
        self, pixel_values_images: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """(N, 3, H, W), under this name or pixel_values -> (N, M, D)"""
        features = self._features({"pixel_values_images": pixel_values_images, **kwargs})
        return torch.stack(list(features))

    def get_video_features(self, pixel_values_videos: Tensor, **kwargs: Any) -> Tensor:
        """(V, F, 3, H, W) -> (V * F, M, D)"""
        features = self._features({"pixel_values_videos": pixel_values_videos, **kwargs})
        frames = sum(len(video) for video in pixel_values_videos)
        return torch.cat(list(features)).unflatten(0, (frames, -1))


class VideoLlavaModel(_Inputs, BaseModel):
    """Video-LLaVA without its head."""

    keywords = FeatureKeywords

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values_images: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Unpack[FeatureKeywords],
    ) -> ModelOutputWithPast:
        """As VideoLlavaForConditionalGeneration.forward, without labels and logits."""
        given = {
            "pixel_values_images": pixel_values_images,
            "pixel_values_videos": pixel_values_videos,
        }
        return body_output(self, self._call(input_ids, attention_mask, {**given, **kwargs}))


class VideoLlavaForConditionalGeneration(_Inputs, ForConditionalGeneration):
    """Video-LLaVA with its head; made from a config alone it has random weights."""

    keywords = TowerKeywords

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values_images: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Unpack[TowerKeywords],
    ) -> CausalLMOutputWithPast:
        """input_ids (B, L), pixel_values_images (N, 3, H, W), also under the name pixel_values,
        pixel_values_videos (V, F, 3, H, W) -> logits and what else is asked for.

        attention_mask (B, L) is 1 on real tokens, on whichever side the padding is; logits there
        are 0. Keywords: see TowerKeywords.
        """
        given = {
            "pixel_values_images": pixel_values_images,
            "pixel_values_videos": pixel_values_videos,
        }
        return answer_output(self, self._call(input_ids, attention_mask, {**given, **kwargs}))
