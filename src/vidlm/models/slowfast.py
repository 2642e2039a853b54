"""Slow-Fast Video MLLM: a few fast tokens in the sequence, many slow ones that text looks up.

Paper: arXiv 2504.01328. Checkpoints: shi-labs/slowfast-video-mllm-qwen2-7b-convnext-576-
frame64-s1t4 and -frame96-s1t6 (ConvNeXt-XXL at 576 pixels, Qwen2 7B).
Reference: SHI-Labs/Slow-Fast-Video-Multimodal-LLM. Parity: tests/parity/test_slowfast.py, against
tensors of that code.

Tokens: 18 x 18 of a frame, pooled 2 x 2 to 81 slow tokens each; their mean over every 4 (or 6)
frames, at least 16 of them, are the fast tokens, which alone take places in the prompt: 1,296 for
64 frames, with 5,184 slow ones beside it. In layers 0, 8, 16 and 24 text attends to those.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, fields
from math import isqrt
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool1d, avg_pool2d

from vidlm.errors import UnsupportedModel
from vidlm.hub import read_config
from vidlm.media import Video
from vidlm.models.base import Encoded, Family, Kind, Media, Rows, VideoModel
from vidlm.nn.decoder import Decoder, DecoderConfig
from vidlm.nn.hybrid import Gate, HybridLayer
from vidlm.nn.upload import upload
from vidlm.text import Tokenizer
from vidlm.vision.convnext import MAP, STEM, ConvNeXt, ConvNeXtConfig
from vidlm.vision.preprocess import CLIP_MEAN, CLIP_STD, PillowPreprocess
from vidlm.weights import Renames

IMAGE_TOKEN_INDEX = -200  # no id of the vocabulary: upstream's placeholder
VIDEO_TOKEN_INDEX = -201  # ours, for what is given as a video
FRAMES = 64
GROUPS = 8  # groups of frames whose mean is taken at a time
GATING = re.compile(r"whole-dynamic(-tanh)?(-warmup)?")
READERS = re.compile(r"(text-only-)?vanilla(-masksystem)?(-flashattn)?")
PROJECTOR = re.compile(r"linear|identity|mlp(\d+)x_gelu")

# The prompt that the authors call qwen_1_5.
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}{{ '<' + part['type'] + '>\n' }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class SlowFastConfig:
    """config.json of a Slow-Fast checkpoint, under its own names; the decoder's lie beside them.

    `slow_in_decode`: whether generated tokens attend to slow tokens, as in the paper and in
    training. The authors' code does not do it when it generates, and neither does the default.
    """

    model_type: ClassVar[str] = "llava_qwen_slow_fast"

    text_config: DecoderConfig
    vision_config: ConvNeXtConfig
    mm_projector_type: str = "mlp2x_gelu"
    mm_video_pooling_stride: int = 1
    cross_attn_every_n_layers: int | None = None
    cross_attn_implementation: str = "text-only-vanilla-flashattn"
    cross_attn_gating_type: str = "whole-dynamic-tanh-warmup"
    cross_attn_min_layer_depth: int | None = None
    cross_attn_max_layer_depth: int | None = None
    min_fast_frames: int | None = None
    fast_token_spatial_stride: int = 1
    fast_token_temporal_stride: int = 1
    fast_token_temporal_sampling_stride: int = 1
    mm_training_video_frames: int = FRAMES
    tokenizer_model_max_length: int | None = None
    mm_use_im_start_end: bool = False
    slow_in_decode: bool = False
    dtype: str | None = None

    def __post_init__(self) -> None:
        checks = {
            "mm_projector_type": (PROJECTOR, "'linear', 'identity', 'mlp2x_gelu'"),
            "cross_attn_implementation": (
                READERS,
                "'text-only-vanilla' or 'vanilla', with -masksystem or -flashattn behind it",
            ),
            "cross_attn_gating_type": (GATING, "'whole-dynamic', with -tanh or -warmup behind it"),
        }
        for name, (pattern, allowed) in checks.items():
            if not pattern.fullmatch(getattr(self, name)):
                raise UnsupportedModel(f"{name}={getattr(self, name)!r}; supported: {allowed}")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> SlowFastConfig:
        """Read config.json; null means the default, as in the authors' code."""
        known = {f.name for f in fields(cls)} - {"text_config", "vision_config", "dtype"}
        values = {k: v for k, v in config.items() if k in known and v is not None}
        text = {**config, "model_type": "qwen2", "rope_scaling": None, "rope_parameters": None}
        return cls(
            text_config=DecoderConfig.from_dict(text),
            vision_config=ConvNeXtConfig.from_dict(config),
            dtype=config.get("dtype") or config.get("torch_dtype"),
            **values,
        )

    def to_dict(self) -> dict[str, Any]:
        """A config.json in the authors' layout."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        text, vision = own.pop("text_config").to_dict(), own.pop("vision_config").to_dict()
        dtype = own.pop("dtype")
        return {
            **text,
            "rope_theta": self.text_config.rope_theta,
            **vision,
            **own,
            **({} if dtype is None else {"torch_dtype": dtype}),
            "mm_hidden_size": self.vision_config.dims[-1],
            "model_type": self.model_type,
            "architectures": ["LlavaQwenSlowFastForCausalLM"],
        }

    @property
    def placeholders(self) -> Mapping[Kind, int]:
        return {"image": IMAGE_TOKEN_INDEX, "video": VIDEO_TOKEN_INDEX}

    @property
    def max_context(self) -> int:
        return self.tokenizer_model_max_length or self.text_config.max_position_embeddings

    @property
    def sampling(self) -> Mapping[str, Any]:
        """The frames of a video that the authors' demo takes."""
        return {"sampling": "linspace", "num_frames": self.mm_training_video_frames}

    @property
    def hybrid_layers(self) -> range:
        """The decoder layers in which text attends to slow tokens."""
        first = self.cross_attn_min_layer_depth or 0
        stop = self.cross_attn_max_layer_depth or self.text_config.num_hidden_layers
        every = self.cross_attn_every_n_layers
        return range(first, stop, every) if every else range(0)

    @property
    def gate(self) -> Gate:
        kind = self.cross_attn_gating_type
        # Where every token reads, the authors' code leaves the warm-up factor as it is.
        reading = self.cross_attn_implementation.startswith("text-only")
        return Gate("tanh" in kind, "warmup" in kind, warm_tanh=reading)

    def slow_side(self, frames: int) -> int:
        """Slow tokens along a side of a frame."""
        side = self.vision_config.image_size // 32
        return side // self.mm_video_pooling_stride if frames > 1 else side

    def fast_frames(self, frames: int) -> int:
        """Frames of fast tokens that so many frames make."""
        if frames == 1:
            return 1
        kept, least = len(self.fast_sample(frames)), self.min_fast_frames or 1
        if self.fast_token_temporal_stride == 1:
            return kept
        pooled = kept // self.fast_token_temporal_stride
        return pooled if pooled >= least else min(kept, least)

    def fast_sample(self, frames: int) -> list[int]:
        """The frames that fast tokens are made of."""
        stride, least = self.fast_token_temporal_sampling_stride, self.min_fast_frames or 1
        if stride == 1 or frames < least:
            return [*range(frames)]
        count = max(frames // stride, least)
        return [min(int(i * (frames / count)), frames - 1) for i in range(count)]

    def fast_tokens(self, frames: int) -> int:
        """Placeholders of a video of so many frames."""
        side = self.slow_side(frames) // self.fast_token_spatial_stride
        return self.fast_frames(frames) * side**2

    def video_tokens(self, frames: int) -> int:
        return self.fast_tokens(frames) if frames else 0

    def held_bytes(self, frames: int, itemsize: int) -> int:
        text, slow = self.text_config, frames * self.slow_side(frames) ** 2
        read = 2 * len(self.hybrid_layers) * text.num_key_value_heads * text.head_dim
        pixels = frames * 3 * self.vision_config.image_size**2 * 4
        tokens = slow + self.video_tokens(frames)
        return pixels + itemsize * (tokens * text.hidden_size + slow * read)

    def tower_bytes(self, itemsize: int) -> int:
        vision = self.vision_config
        frame = (vision.image_size // STEM) ** 2 * vision.dims[0] * itemsize
        return 10 * max(MAP, frame)  # as the tower says


# timm calls the layer scale gamma; head.* is the classifier that the trunk came with.
RENAMES = Renames(
    table=((r"^(model\.vision_tower\..*\.blocks\.\d+)\.gamma$", r"\1.weight"),),
    ignored=(r"^model\.vision_tower\.vision_tower\.head\.", r"rotary_emb\.inv_freq$"),
)


class SlowFastProcessor:
    """Frames to pixels (F, 3, S, S), with Pillow's arithmetic as the authors' processor."""

    image_token, video_token = "<image>", "<video>"

    def __init__(self, tokenizer: Tokenizer, config: SlowFastConfig) -> None:
        self.tokenizer, self.config = tokenizer, config
        tokenizer.chat_template = TEMPLATE  # Qwen2's own, where there is one, knows text alone
        side = config.vision_config.image_size
        pixels = PillowPreprocess(side, (side, side), CLIP_MEAN, CLIP_STD)
        self.image_pixels = self.video_pixels = pixels
        self.sampling = config.sampling

    @classmethod
    def from_folder(cls, folder: Path) -> SlowFastProcessor:
        return cls(Tokenizer.from_folder(folder), SlowFastConfig.from_dict(read_config(folder)))

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files; everything else is in config.json."""
        self.tokenizer.save(folder)

    def media(self, images: Sequence[Any], videos: Sequence[Video] = ()) -> list[Media]:
        made = [self._media([image], "image") for image in images]
        return made + [self._media(list(video.frames), "video") for video in videos]

    def _media(self, frames: Sequence[Any], kind: Kind) -> Media:
        F = len(frames)
        return Media(self.image_pixels(frames), self.config.fast_tokens(F), kind, F)

    def places(self, media: Media) -> tuple[str, list[int]]:
        return self.image_token if media.kind == "image" else self.video_token, [media.tokens]


class VisionTower(nn.Module):
    """The name checkpoints put in front: `vision_tower.vision_tower.*`."""

    def __init__(self, config: ConvNeXtConfig) -> None:
        super().__init__()
        self.vision_tower = ConvNeXt(config)


class Body(Decoder):
    """A decoder some of whose layers are hybrid, with the tower and the projector beside them."""

    def __init__(self, config: SlowFastConfig) -> None:
        super().__init__(config.text_config)
        for layer in config.hybrid_layers:
            self.layers[layer] = HybridLayer(config.text_config, layer, config.gate)
        self.vision_tower = VisionTower(config.vision_config)
        self.mm_projector = _projector(config)


class SlowFastNetwork(VideoModel):
    """The network. Parameter names are those of the published checkpoints."""

    unquantized = ("vision_tower",)  # it reads its weights as they are
    penalises_prompt = False  # it generates from embeddings: there are no ids to count

    def __init__(self, config: SlowFastConfig) -> None:
        super().__init__()
        self.config, text = config, config.text_config
        self.model = Body(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.has_memory = bool(config.hybrid_layers)
        self.memory_in_decode = config.slow_in_decode
        self.tie()

    @property
    def decoder(self) -> Decoder:
        return self.model

    def embed(self, ids: Tensor) -> Tensor:
        return self.model.embed_tokens(ids.clamp(min=0))  # placeholders have no row; see `insert`

    def readers(self, ids: Tensor) -> Tensor:
        kind = self.config.cross_attn_implementation
        if not kind.startswith("text-only"):
            return torch.ones_like(ids, dtype=torch.bool)
        text = super().readers(ids)
        return text & (~text).cumsum(0).bool() if "masksystem" in kind else text

    def _encoding(self, media: Sequence[Media]) -> Generator[None, None, list[Encoded]]:
        """Pixels (F, 3, S, S) of each image or video -> fast tokens, and slow ones as memory."""
        made = []
        for item in media:
            made.append((yield from self._encoded(item.pixels)))
        return made

    def _encoded(self, pixels: Tensor) -> Generator[None, None, Encoded]:
        F = len(pixels)
        pool = self.config.mm_video_pooling_stride if F > 1 else 1
        tower, project = self.model.vision_tower.vision_tower, self.model.mm_projector
        slow = Rows(F)
        for part in pixels.split(tower.at_a_time):
            features = tower(upload(part, self.device, self.dtype))
            slow.add(pooled(project(features), pool))
            yield
        x = slow.whole()  # (F, M, D)
        memory = x.flatten(0, 1) if self.config.hybrid_layers else None
        return Encoded(fast(x, self.config).flatten(0, 1), memory)


def pooled(x: Tensor, stride: int) -> Tensor:
    """Tokens (F, M, D) of square frames, means of stride x stride of them; rests are left out."""
    if stride == 1:
        return x
    side = isqrt(x.shape[1])
    square = x.float().transpose(1, 2).unflatten(2, (side, side))  # one rounding, at the end
    return avg_pool2d(square, stride).flatten(2).transpose(1, 2).to(x.dtype)


def fast(x: Tensor, config: SlowFastConfig) -> Tensor:
    """Slow tokens (F, M, D) of an image or video -> fast tokens (F', M', D)."""
    F, M, D = x.shape
    stride = config.fast_token_temporal_stride
    if F > 1:
        sample, count = config.fast_sample(F), config.fast_frames(F)
        x = x if len(sample) == F else x[sample]
        if stride > 1 and len(x) // stride == count:
            groups = x[: count * stride].unflatten(0, (count, stride))
            means = [part.float().mean(1).to(x.dtype) for part in groups.split(GROUPS)]
            x = torch.cat(means)
        elif stride > 1:  # too few for whole groups: windows that share frames
            series = x.float().flatten(1).T[None]  # (1, M * D, F)
            x = adaptive_avg_pool1d(series, count)[0].T.unflatten(1, (M, D)).to(x.dtype)
    return pooled(x, config.fast_token_spatial_stride)


def _projector(config: SlowFastConfig) -> nn.Module:
    wide, D = config.vision_config.dims[-1], config.text_config.hidden_size
    found = PROJECTOR.fullmatch(config.mm_projector_type)
    assert found is not None  # the config was checked
    if found[0] == "identity":
        return nn.Identity()
    if found[0] == "linear":
        return nn.Linear(wide, D)
    more = [layer for _ in range(int(found[1]) - 1) for layer in (nn.GELU(), nn.Linear(D, D))]
    return nn.Sequential(nn.Linear(wide, D), *more)


FAMILY = Family(
    SlowFastConfig,
    RENAMES,
    SlowFastProcessor,
    SlowFastNetwork,
    sampling={"sampling": "linspace", "num_frames": FRAMES},
)
