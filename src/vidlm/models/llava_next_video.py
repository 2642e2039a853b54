"""LLaVA-NeXT-Video: images as AnyRes tiles with newlines, videos as frames pooled 2 x 2.

Source: https://llava-vl.github.io/blog/2024-04-30-llava-next-video. Checkpoints, llava-hf/:
LLaVA-NeXT-Video-7B-hf and -7B-DPO-hf (Vicuna 7B), -7B-32K-hf (Mistral 7B), -34B-hf (Yi 34B), all
with CLIP ViT-L/14 at 336 pixels.
Reference: transformers, models/llava_next_video. Parity: tests/parity/test_video_families.py.

Tokens: of a frame 24 x 24 / 4 = 144, pooled before the projector; of an image 576 of the whole, and
of its tiles what is left without padding, with a newline behind each row (vidlm.vision.anyres):
2,340 for 640 x 480. Vicuna's 4,096 positions reach 10,240 where config.json says rope_scaling
linear 2.5.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d

from vidlm.errors import UnsupportedModel
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
from vidlm.vision.anyres import PINPOINTS, AnyRes, Size, grid, tiles, tokens, unpad
from vidlm.vision.preprocess import to_pixels
from vidlm.vision.vit import VisionTransformer

POOLS: Mapping[str, Callable[..., Tensor]] = MappingProxyType(
    {"average": avg_pool2d, "max": max_pool2d}
)


@dataclass(frozen=True)
class LlavaNextVideoConfig(TowerConfig):
    """config.json of a LLaVA-NeXT-Video checkpoint; see TowerConfig."""

    model_type = "llava_next_video"
    architecture = "LlavaNextVideoForConditionalGeneration"
    vision_default = MappingProxyType(
        {
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
        }
    )
    aliases = MappingProxyType({**TowerConfig.aliases, "video_token_id": "video_token_index"})

    image_token_index: int = 32001
    video_token_index: int = 32000
    image_grid_pinpoints: tuple[Size, ...] = PINPOINTS
    spatial_pool_mode: str = "average"
    spatial_pool_stride: int = 2
    image_seq_length: int = 576  # kept for others: no forward pass reads these two
    video_seq_length: int = 288

    def __post_init__(self) -> None:
        super().__post_init__()
        pinpoints = self.image_grid_pinpoints or PINPOINTS
        sizes = tuple((int(height), int(width)) for height, width in pinpoints)
        object.__setattr__(self, "image_grid_pinpoints", sizes)
        if self.spatial_pool_mode not in POOLS:
            raise UnsupportedModel(
                f"spatial_pool_mode={self.spatial_pool_mode!r}; supported: {', '.join(POOLS)}"
            )

    def to_dict(self) -> dict[str, Any]:
        return {
            **super().to_dict(),
            "image_grid_pinpoints": [list(size) for size in self.image_grid_pinpoints],
        }

    @property
    def video_token_id(self) -> int:
        return self.video_token_index

    @property
    def placeholders(self) -> Mapping[Kind, int]:
        return {"image": self.image_token_index, "video": self.video_token_index}

    @property
    def side(self) -> int:
        """Patches along a side of a tile or frame."""
        return self.vision_config.image_size // self.vision_config.patch_size

    def tiles(self, size: Size) -> int:
        """Tiles of an image of this height and width, the whole included."""
        return tiles(size, self.image_grid_pinpoints, self.vision_config.image_size)

    def tokens_per_image(self, size: Size) -> int:
        """Placeholders of an image of this height and width."""
        return tokens(size, self.image_grid_pinpoints, self.vision_config.image_size, self.side)

    def tokens_per_frame(self) -> int:
        return (self.side // self.spatial_pool_stride) ** 2


@dataclass(frozen=True, eq=False)
class TiledImage(Media):
    """An image: pixels (N, 3, S, S) of its tiles, the whole first; its own height and width."""

    size: Size = (0, 0)


class LlavaNextVideoProcessor(TowerProcessor):
    """Images to tiles, videos (F, 3, S, S), and how many placeholders each fills."""

    config_class = LlavaNextVideoConfig
    processor_class = "LlavaNextVideoProcessor"
    image_class = AnyRes
    takes_videos = True

    def media(self, images: Sequence[Any], videos: Sequence[Video] = ()) -> list[Media]:
        return [*map(self._image, images), *map(self._video, videos)]

    def _image(self, image: Any) -> Media:
        pixels = to_pixels(image)
        size, patch = (pixels.shape[1], pixels.shape[2]), self.frame_tokens.patch_size
        # A class token would come once, of the whole; "default" drops it there.
        whole = self.frame_tokens.count((self.image_pixels.side,) * 2)
        patches = self.image_pixels.side // patch
        count = self.image_pixels.tokens(size, patches) - patches**2 + whole
        return TiledImage(self.image_pixels(pixels), count, size=size)

    def _video(self, video: Video) -> Media:
        pixels = self.video_pixels(list(video.frames))
        F, _, H, W = pixels.shape
        patch = self.frame_tokens.patch_size
        return Media(pixels, F * ((H // patch) * (W // patch) // 4), "video", F)


class LlavaNextVideoNetwork(TowerModel):
    """The network."""

    media_types = (Media, TiledImage)

    def __init__(self, config: LlavaNextVideoConfig) -> None:
        tower = VisionTransformer(config.vision_config)
        body = TowerBody(config, vision_tower=tower)
        width = config.text_config.hidden_size
        newline = torch.randn(width, dtype=torch.get_default_dtype()) * width**-0.5
        body.image_newline = nn.Parameter(newline)
        super().__init__(config, body)

    def _encoding(
        self, media: Sequence[Media], layers: Layers | None = None, strategy: str | None = None
    ) -> Generator[None, None, list[Encoded]]:
        """TiledImages, and pixels (F, 3, S, S) of videos -> the (M, D) features of each; `layers`
        and `strategy` replace the config's."""
        wanted = self.config.feature_layers if layers is None else as_layers(layers)
        first = int((strategy or self.config.vision_feature_select_strategy) == "default")

        def patches(pixels: Tensor) -> Tensor:
            return self.body.vision_tower(upload(pixels, self.device, self.dtype), wanted)[
                :, first:
            ]

        def tile_tokens(pixels: Tensor) -> Tensor:
            return self.body.multi_modal_projector(patches(pixels))

        def frame_tokens(pixels: Tensor) -> Tensor:
            return self.body.multi_modal_projector(self._pooled(patches(pixels)))

        encoded = []
        for item in media:
            if isinstance(item, TiledImage):
                tiled = yield from in_chunks(tile_tokens, item.pixels)  # (N, P, D)
                encoded.append(Encoded(self._laid_out(tiled, item.size)))
            else:
                tokens = yield from in_chunks(frame_tokens, item.pixels)
                encoded.append(Encoded(tokens.flatten(0, 1)))
        return encoded

    def _pooled(self, x: Tensor) -> Tensor:
        """Patches (F, P, D) of frames -> (F, P / stride^2, D)"""
        P = x.shape[1]
        side = isqrt(P)
        if side * side != P:
            raise UnsupportedModel(
                f"{P} patches are no square to be pooled; use vision_feature_select_strategy="
                "'default' with a tower that has a class token"
            )
        pool, stride = POOLS[self.config.spatial_pool_mode], self.config.spatial_pool_stride
        square = x.transpose(1, 2).unflatten(2, (side, side))  # (F, D, side, side)
        return pool(square, stride, stride).flatten(2).transpose(1, 2)

    def _laid_out(self, x: Tensor, size: Size) -> Tensor:
        """Tokens (N, P, D) of an image's tiles -> (M, D): the whole, then the rows of the picture
        that its tiles make up, each with a newline behind it."""
        config = self.config
        down, across = grid(size, config.image_grid_pinpoints, config.vision_config.image_size)
        mosaic = x[1:].unflatten(1, (config.side, config.side))
        mosaic = mosaic.unflatten(0, (down, across)).transpose(
            1, 2
        )  # (down, side, across, side, D)
        rows = unpad(mosaic.flatten(2, 3).flatten(0, 1), size)
        newline = self.body.image_newline.to(rows).expand(len(rows), 1, -1)
        return torch.cat((x[0], torch.cat((rows, newline), dim=1).flatten(0, 1)))


FAMILY = Family(LlavaNextVideoConfig, RENAMES, LlavaNextVideoProcessor, LlavaNextVideoNetwork)
