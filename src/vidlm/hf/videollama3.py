"""VideoLLaMA3 under transformers' names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from vidlm.errors import InvalidArgument
from vidlm.hf.forward import AnswerKeywords, ForwardKeywords, answer_output, body_output
from vidlm.hf.image_processing import VideoLlama3ImageProcessor
from vidlm.hf.model import BaseModel, ForConditionalGeneration, PretrainedModel
from vidlm.hf.outputs import BaseModelOutput, CausalLMOutputWithPast, ModelOutputWithPast
from vidlm.hf.processor import ProcessorMixin
from vidlm.hf.video_processing import VideoLlama3VideoProcessor
from vidlm.models.base import Kind, Media
from vidlm.models.videollama3 import FAMILY, Patches, VideoLlama3Network
from vidlm.text import Tokenizer
from vidlm.vision.navit import NaViT
from vidlm.vision.patches import Rule

NAMES: Mapping[str, Kind] = {"pixel_values": "image", "pixel_values_videos": "video"}


class VideoLlama3Processor(ProcessorMixin):
    """Texts, images and videos -> input_ids, attention_mask (B, L), and for images pixel_values
    (patches of all, 588), image_grid_thw (N, 3), image_merge_sizes (N,); for videos
    pixel_values_videos, video_grid_thw, video_merge_sizes and video_compression_mask (tokens of
    all,), True where a token is kept.

    `from_pretrained(name, rule="native")` follows the authors' processor instead of transformers';
    see vidlm.vision.patches.
    """

    family = FAMILY
    image_class = VideoLlama3ImageProcessor
    video_class = VideoLlama3VideoProcessor

    def __init__(
        self,
        image_processor: VideoLlama3ImageProcessor,
        tokenizer: Tokenizer,
        video_processor: VideoLlama3VideoProcessor,
        chat_template: str | None = None,
    ) -> None:
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        pixels = image_processor.core, video_processor.core
        core = FAMILY.processor(tokenizer, *pixels)
        self._keep_parts(core, image_processor, video_processor)

    @classmethod
    def from_pretrained(cls, name: str | Path, *, rule: Rule = "hf", **kwargs: Any) -> Self:
        """As ProcessorMixin.from_pretrained; `rule` is whose sizes are followed."""
        if rule not in ("hf", "native"):
            raise InvalidArgument(f"rule={rule!r}; allowed: 'hf', 'native'")
        made = super().from_pretrained(name, **kwargs)
        for pixels in ("image_pixels", "video_pixels"):
            setattr(made.core, pixels, replace(getattr(made.core, pixels), rule=rule))
        return made

    def _adjusted(
        self, images: Mapping[str, Any], videos: Mapping[str, Any], call: bool = False
    ) -> Any:
        """The words of image and video processor do not say the rule."""
        core = super()._adjusted(images, videos, call)
        core.image_pixels = replace(core.image_pixels, rule=self.core.image_pixels.rule)
        core.video_pixels = replace(core.video_pixels, rule=self.core.video_pixels.rule)
        return core

    def collate(self, media: Sequence[Media]) -> dict[str, Any]:
        batch: dict[str, Any] = {}
        for pixels, kind in NAMES.items():
            items = [m for m in media if isinstance(m, Patches) and m.kind == kind]
            if not items:
                continue
            batch[pixels] = torch.cat([item.pixels for item in items])
            grids, merges = [item.grid for item in items], [item.merge for item in items]
            batch[f"{kind}_grid_thw"] = torch.tensor(grids, dtype=torch.int64, device="cpu")
            batch[f"{kind}_merge_sizes"] = torch.tensor(merges, dtype=torch.int64, device="cpu")
            kept = [item.kept for item in items if item.kept is not None]
            if kept:
                batch["video_compression_mask"] = torch.cat(kept)
        return batch

    def render(self, messages: Sequence[Mapping[str, Any]], *args: Any, **kwargs: Any) -> str:
        """Messages that only name their media -> the prompt's text.

        The authors' template writes one token for images and frames alike; it is given each video
        as one frame, which then gets the token of videos.
        """
        if self.image_token != "<image>":
            return super().render(messages, *args, **kwargs)
        kinds: list[str] = []
        one_frame: list[dict[str, Any]] = []
        for message in messages:
            content = message.get("content")
            if not isinstance(content, str):
                content = [
                    {**part, "num_frames": 1} if part.get("type") == "video" else part
                    for part in content or ()
                ]
                kinds += [part["type"] for part in content if part.get("type") != "text"]
            one_frame.append({**message, "content": content})
        text = super().render(one_frame, *args, image_token=self.image_token, **kwargs)
        pieces = text.split(self.image_token)
        if len(pieces) != len(kinds) + 1:
            raise InvalidArgument(
                f"the messages have {len(kinds)} images and videos, their text "
                f"{len(pieces) - 1} {self.image_token}; leave that word out of texts"
            )
        tokens = [self.image_token if kind == "image" else self.video_token for kind in kinds]
        joined = zip([*tokens, ""], [*pieces[1:], ""], strict=True)
        return pieces[0] + "".join(f"{token}{piece}" for token, piece in joined)


class _Inputs(PretrainedModel, VideoLlama3Network):
    """How both models take their media."""

    family = FAMILY
    media_inputs = (
        *("pixel_values", "image_grid_thw", "image_merge_sizes", "pixel_values_videos"),
        *("video_grid_thw", "video_merge_sizes", "video_compression_mask"),
    )

    def media(self, inputs: Mapping[str, Any]) -> list[Media]:
        made: list[Media] = []
        for name, kind in NAMES.items():
            if name not in inputs:
                continue
            needed = (f"{kind}_grid_thw", f"{kind}_merge_sizes")
            if any(other not in inputs for other in needed):
                raise InvalidArgument(f"{name} need {' and '.join(needed)}; pass them too")
            grids, merges = (inputs[other].tolist() for other in needed)
            made += _parted(inputs[name], grids, merges, kind, inputs.get("video_compression_mask"))
        return made

    def get_image_features(  # type: ignore[override]  # these come in three tensors
        self, pixel_values: Tensor, image_grid_thw: Tensor, image_merge_sizes: Tensor
    ) -> Sequence[Tensor]:
        """One (M, D) tensor of features an image."""
        return self._features(
            {
                "pixel_values": pixel_values,
                "image_grid_thw": image_grid_thw,
                "image_merge_sizes": image_merge_sizes,
            }
        )

    def get_video_features(  # type: ignore[override]
        self, pixel_values_videos: Tensor, video_grid_thw: Tensor, video_merge_sizes: Tensor
    ) -> Sequence[Tensor]:
        """One (M, D) tensor of features a video, all of its tokens."""
        return self._features(
            {
                "pixel_values_videos": pixel_values_videos,
                "video_grid_thw": video_grid_thw,
                "video_merge_sizes": video_merge_sizes,
            }
        )


def _parted(
    rows: Tensor,
    grids: Sequence[Sequence[int]],
    merges: Sequence[int],
    kind: Kind,
    mask: Tensor | None,
) -> list[Media]:
    """Patches of all media of a kind -> those of each."""
    counts = [t * h * w for t, h, w in grids]
    tokens = [count // merge**2 for count, merge in zip(counts, merges, strict=True)]
    wanted = {"patches": (sum(counts), len(rows))}
    if kind == "video" and mask is not None:
        wanted["entries of video_compression_mask"] = (sum(tokens), len(mask))
    for what, (needed, given) in wanted.items():
        if needed != given:
            raise InvalidArgument(
                f"{given} {what} of {kind}s, whose grids make {needed}; pass the processor's "
                "output unshortened"
            )
    kept: Sequence[Tensor | None] = [None] * len(counts)
    if kind == "video" and mask is not None:
        kept = mask.bool().split(tokens)
        tokens = [int(each.sum()) for each in mask.bool().split(tokens)]
    return [
        Patches(pixels, count, kind, t, (t, h, w), merge, keep)
        for pixels, count, (t, h, w), merge, keep in zip(
            rows.split(counts), tokens, grids, merges, kept, strict=True
        )
    ]


class VideoLlama3VisionModel(nn.Module):
    """The vision encoder alone; made from a config it has random weights."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.encoder = NaViT(config)

    def forward(
        self,
        pixel_values: Tensor,
        grid_thw: Tensor,
        merge_sizes: Tensor,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        return_dict: bool = True,
    ) -> Any:
        """pixel_values (patches of all, 588), grid_thw (N, 3), merge_sizes (N,) -> features (M, D)
        of all, normed and merged; hidden_states as transformers has them, (patches, D) each, and
        attentions, for every layer one (1, H, P, P) a frame."""
        counts = grid_thw.prod(1).tolist()
        states: list[list[Tensor]] = []
        weights: list[list[list[Tensor]]] = []  # of each item, each layer, each frame
        features = []
        media = zip(
            pixel_values.split(counts), grid_thw.tolist(), merge_sizes.tolist(), strict=True
        )
        for rows, grid, merge in media:
            states.append([])
            weights.append([])
            hidden = states[-1] if output_hidden_states else None
            seen = weights[-1] if output_attentions else None
            features.append(self.encoder(rows, tuple(grid), merge, hidden, seen))
        layers = tuple(torch.cat(layer) for layer in zip(*states, strict=True))
        frames = zip(*weights, strict=True)
        attentions = tuple([w for item in layer for w in item] for layer in frames)
        output = BaseModelOutput(
            torch.cat(features),
            layers if output_hidden_states else None,
            attentions if output_attentions else None,
        )
        return output if return_dict else output.to_tuple()


class VideoLlama3Model(_Inputs, BaseModel):
    """VideoLLaMA3 without its head."""

    keywords = ForwardKeywords

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> ModelOutputWithPast:
        """As VideoLlama3ForConditionalGeneration.forward, without labels and logits."""
        given = {
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
        }
        return body_output(self, self._call(input_ids, attention_mask, {**given, **kwargs}))


class VideoLlama3ForConditionalGeneration(_Inputs, ForConditionalGeneration):
    """VideoLLaMA3 with its head; made from a config alone it has random weights."""

    keywords = AnswerKeywords

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """input_ids (B, L), media as VideoLlama3Processor makes them -> logits and what else is
        asked for.

        attention_mask (B, L) is 1 on real tokens, on whichever side the padding is; logits there
        are 0. Keywords: pixel_values, image_grid_thw, image_merge_sizes, pixel_values_videos,
        video_grid_thw, video_merge_sizes, video_compression_mask (None: every token is kept), and
        see AnswerKeywords.
        """
        given = {
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
        }
        return answer_output(self, self._call(input_ids, attention_mask, {**given, **kwargs}))
