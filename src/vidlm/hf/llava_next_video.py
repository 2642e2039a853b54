"""LLaVA-NeXT-Video under transformers' names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from vidlm.errors import InvalidArgument
from vidlm.hf.forward import FeatureKeywords, TowerKeywords, answer_output, body_output
from vidlm.hf.image_processing import LlavaNextVideoImageProcessor
from vidlm.hf.model import BaseModel, ForConditionalGeneration, PretrainedModel
from vidlm.hf.outputs import CausalLMOutputWithPast, ModelOutputWithPast
from vidlm.hf.pack import padded, stacked
from vidlm.hf.tower_processor import TOWER_WORDS, TowerProcessor
from vidlm.hf.video_processing import LlavaNextVideoVideoProcessor
from vidlm.models.base import Media
from vidlm.models.llava_next_video import FAMILY, LlavaNextVideoNetwork, TiledImage
from vidlm.text import Tokenizer


class LlavaNextVideoProcessor(TowerProcessor):
    """Texts, images and videos -> input_ids, attention_mask (B, L), pixel_values (N, T, 3, S, S) of
    images, filled up with zeros to the most tiles T, image_sizes (N, 2), their height and width,
    and pixel_values_videos (V, F, 3, S, S); a list of (F, 3, S, S) where videos have different
    numbers of frames."""

    family = FAMILY
    image_class = LlavaNextVideoImageProcessor
    video_class = LlavaNextVideoVideoProcessor

    def __init__(
        self,
        video_processor: LlavaNextVideoVideoProcessor,
        image_processor: LlavaNextVideoImageProcessor,
        tokenizer: Tokenizer,
        chat_template: str | None = None,
        **words: Any,
    ) -> None:
        """`words`, as in processor_config.json: patch_size (14), vision_feature_select_strategy
        ("default"), num_additional_image_tokens (1), image_token, video_token."""
        words = {**TOWER_WORDS, **words, "chat_template": chat_template}
        self._assemble((image_processor, video_processor), tokenizer, words)

    def collate(self, media: Sequence[Media]) -> dict[str, Any]:
        images = [item for item in media if isinstance(item, TiledImage)]
        videos = [item.pixels for item in media if item.kind == "video"]
        batch: dict[str, Any] = {}
        if images:
            batch["pixel_values"] = padded([item.pixels for item in images])
            batch["image_sizes"] = torch.tensor(
                [item.size for item in images], dtype=torch.int64, device="cpu"
            )
        if videos:
            batch["pixel_values_videos"] = stacked(videos)
        return batch


class _Inputs(PretrainedModel, LlavaNextVideoNetwork):
    """How both models take their media."""

    family = FAMILY
    media_inputs = ("pixel_values", "image_sizes", "pixel_values_videos")

    def media(self, inputs: Mapping[str, Any]) -> list[Media]:
        images, sizes = inputs.get("pixel_values", ()), inputs.get("image_sizes", ())
        if len(images) != len(sizes):
            raise InvalidArgument(
                f"pixel_values of {len(images)} images and image_sizes of {len(sizes)}; pass both "
                "as the processor made them"
            )
        made: list[Media] = []
        shapes = torch.as_tensor(sizes, dtype=torch.int64, device="cpu").tolist()
        for tiles, (height, width) in zip(images, shapes, strict=True):
            size = height, width
            pixels = tiles[: self.config.tiles(size)]
            made.append(TiledImage(pixels, self.config.tokens_per_image(size), size=size))
        per_frame = self.config.tokens_per_frame()
        for pixels in inputs.get("pixel_values_videos", ()):
            made.append(Media(pixels, len(pixels) * per_frame, "video", len(pixels)))
        return made

    def get_image_features(  # type: ignore[override]  # these come in two tensors
        self, pixel_values: Tensor, image_sizes: Tensor, **kwargs: Any
    ) -> Sequence[Tensor]:
        """(N, T, 3, S, S) and (N, 2) -> one (M, D) tensor of features an image."""
        return self._features({"pixel_values": pixel_values, "image_sizes": image_sizes, **kwargs})


class LlavaNextVideoModel(_Inputs, BaseModel):
    """LLaVA-NeXT-Video without its head."""

    keywords = FeatureKeywords

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        image_sizes: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Unpack[FeatureKeywords],
    ) -> ModelOutputWithPast:
        """As LlavaNextVideoForConditionalGeneration.forward, without labels and logits."""
        given = {
            "pixel_values": pixel_values,
            "pixel_values_videos": pixel_values_videos,
            "image_sizes": image_sizes,
        }
        return body_output(self, self._call(input_ids, attention_mask, {**given, **kwargs}))


class LlavaNextVideoForConditionalGeneration(_Inputs, ForConditionalGeneration):
    """LLaVA-NeXT-Video with its head; made from a config alone it has random weights."""

    keywords = TowerKeywords

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        image_sizes: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Unpack[TowerKeywords],
    ) -> CausalLMOutputWithPast:
        """input_ids (B, L), media as LlavaNextVideoProcessor makes them -> logits and what else is
        asked for.

        attention_mask (B, L) is 1 on real tokens, on whichever side the padding is; logits there
        are 0. Keywords: see TowerKeywords.
        """
        given = {
            "pixel_values": pixel_values,
            "pixel_values_videos": pixel_values_videos,
            "image_sizes": image_sizes,
        }
        return answer_output(self, self._call(input_ids, attention_mask, {**given, **kwargs}))
