"""LLaVA under transformers' names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from vidlm.hf.forward import TowerKeywords, answer_output
from vidlm.hf.image_processing import LlavaImageProcessor
from vidlm.hf.model import ForConditionalGeneration
from vidlm.hf.outputs import CausalLMOutputWithPast
from vidlm.hf.tower_processor import TowerProcessor
from vidlm.models.base import Media
from vidlm.models.llava import FAMILY, LlavaNetwork


class LlavaProcessor(TowerProcessor):
    """Texts and images -> input_ids, attention_mask (B, L) and pixel_values (F, 3, H, W) of all
    images of the batch, one behind the other."""

    family = FAMILY
    image_class = LlavaImageProcessor

    def collate(self, media: Sequence[Media]) -> dict[str, Any]:
        return {"pixel_values": torch.stack([item.pixels for item in media])}


class LlavaForConditionalGeneration(ForConditionalGeneration, LlavaNetwork):
    """LLaVA with its head; made from a config alone it has random weights."""

    family = FAMILY
    media_inputs = ("pixel_values",)
    keywords = TowerKeywords

    def media(self, inputs: Mapping[str, Any]) -> list[Media]:
        tokens = self.config.tokens_per_frame()
        return [Media(pixels, tokens) for pixels in inputs.get("pixel_values", ())]

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Unpack[TowerKeywords],
    ) -> CausalLMOutputWithPast:
        """input_ids (B, L), pixel_values (F, 3, H, W) -> logits and what else is asked for.

        attention_mask (B, L) is 1 on real tokens, on whichever side the padding is; logits there
        are 0. Keywords: see TowerKeywords.
        """
        given = {"pixel_values": pixel_values, **kwargs}
        return answer_output(self, self._call(input_ids, attention_mask, given))
