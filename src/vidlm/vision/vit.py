"""One vision transformer for CLIP and SigLIP: what differs is a ViTConfig.

Follows the reference implementations in transformers (models/clip, models/siglip). A frame's
features are the hidden state after a chosen layer, so layers behind it are never run. The encoder
is VideoLLaMA3's too (navit.py), which has it rotate queries and keys.
Parity: tests/parity/test_llava.py, tests/parity/test_navit.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vidlm.errors import InvalidArgument, UnsupportedModel
from vidlm.nn.activation import activation
from vidlm.nn.attention import attend_all, weigh_all
from vidlm.nn.decoder import rotate
from vidlm.nn.embedding import Embedding
from vidlm.nn.linear import bare, linear, linears


@dataclass(frozen=True)
class ViTConfig:
    """Sizes and switches of a vision tower, under config.json's names."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    hidden_act: str
    layer_norm_eps: float
    class_token: bool  # CLIP: one token before the patches, and a norm before the first layer

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ViTConfig:
        """Read a `vision_config`; absent keys take the class defaults of its model_type."""
        kind = config.get("model_type", "clip_vision_model")
        if kind not in DEFAULTS:
            raise UnsupportedModel(
                f"vision model_type {kind!r} is not supported; known: {', '.join(DEFAULTS)}"
            )
        values = asdict(DEFAULTS[kind])
        values.update({k: v for k, v in config.items() if k in values and v is not None})
        if config.get("num_channels", 3) != 3:
            raise UnsupportedModel(
                f"num_channels={config['num_channels']}; only RGB (3) is supported"
            )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """A `vision_config` that vidlm and transformers both read."""
        values = asdict(self)
        if not values.pop("class_token"):
            values["vision_use_head"] = False
        return values

    @property
    def patches(self) -> int:
        """P: patches of one frame, class token not counted."""
        return (self.image_size // self.patch_size) ** 2


_CLIP = ViTConfig(
    model_type="clip_vision_model",
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    image_size=224,
    patch_size=32,
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
    class_token=True,
)
DEFAULTS: Mapping[str, ViTConfig] = {
    "clip_vision_model": _CLIP,
    "siglip_vision_model": replace(
        _CLIP,
        model_type="siglip_vision_model",
        patch_size=16,
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
        class_token=False,
    ),
}


class Embeddings(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        D, patch = config.hidden_size, config.patch_size
        if config.class_token:
            self.class_embedding = nn.Parameter(torch.zeros(D, dtype=torch.get_default_dtype()))
        self.patch_embedding = nn.Conv2d(3, D, patch, patch, bias=not config.class_token)
        self.position_embedding = Embedding(config.patches + config.class_token, D)
        self.class_token = config.class_token

    def forward(self, pixels: Tensor) -> Tensor:
        F = pixels.shape[0]
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2).contiguous()  # (F, P, D)
        if self.class_token:
            x = torch.cat((self.class_embedding.expand(F, 1, -1), x), dim=1)
        return x + self.position_embedding.weight


class EncoderSizes(Protocol):
    """What the encoder needs of a tower's configuration."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def hidden_act(self) -> str: ...
    @property
    def layer_norm_eps(self) -> float: ...


Rope = tuple[Tensor, Tensor]  # cos and sin of each patch's angles, (P, 1, E) in float32


class Attention(nn.Module):
    def __init__(self, config: EncoderSizes) -> None:
        super().__init__()
        D = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj = nn.Linear(D, D)
        self.k_proj = nn.Linear(D, D)
        self.v_proj = nn.Linear(D, D)
        self.out_proj = nn.Linear(D, D)

    def forward(
        self, x: Tensor, rope: Rope | None = None, weights: list[Tensor] | None = None
    ) -> Tensor:
        rows = linears((self.q_proj, self.k_proj, self.v_proj), x)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in rows)
        if rope is not None:
            q, k = (rotate(heads.float(), rope).to(heads.dtype) for heads in (q, k))
        if weights is not None:
            weights.append(weigh_all(q, k))
        return linear(self.out_proj, attend_all(q, k, v).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: EncoderSizes) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act = activation(config.hidden_act)
        self.act_in_place = activation(config.hidden_act, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        wide = linear(self.fc1, x)
        # A hook of fc1 may have kept what it saw.
        act = self.act_in_place if bare(self.fc1) else self.act
        return linear(self.fc2, act(wide))


class Layer(nn.Module):
    def __init__(self, config: EncoderSizes) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.layer_norm_eps
        self.layer_norm1 = nn.LayerNorm(D, eps=eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(D, eps=eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, rope: Rope | None = None, weights: list[Tensor] | None = None
    ) -> Tensor:
        """`weights` collects those of the layer's attention, (F, H, P, P)."""
        x = x + self.self_attn(self.layer_norm1(x), rope, weights)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    def __init__(self, config: EncoderSizes) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))


class VisionTransformer(nn.Module):
    """Pixels (F, 3, H, W), normalised -> hidden states (F, P, D), class token included for CLIP."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        if config.class_token:
            self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = Encoder(config)
        # In every checkpoint, used by none of the LLaVA families: features are taken before it.
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixels: Tensor, feature_layers: Sequence[int]) -> Tensor:
        """Hidden states after `feature_layers` (as in hidden_states[i]), concatenated over D."""
        count = len(self.encoder.layers)
        wanted = [self._depth(layer) for layer in feature_layers]
        size = self.config.image_size
        if pixels.shape[1:] != (3, size, size):
            raise InvalidArgument(
                f"pixels of shape {tuple(pixels.shape)}; this tower takes (F, 3, {size}, {size})"
            )
        x = self.embeddings(pixels)
        if self.config.class_token:
            x = self.pre_layrnorm(x)
        kept = {0: x}
        for depth in range(1, min(max(wanted), count) + 1):
            x = self.encoder.layers[depth - 1](x)
            if depth in wanted:
                kept[depth] = x
        return torch.cat([kept[depth] for depth in wanted], dim=-1) if len(wanted) > 1 else x

    def _depth(self, layer: int) -> int:
        count = len(self.encoder.layers)
        depth = layer if layer >= 0 else count + 1 + layer
        if not 0 <= depth <= count:
            raise InvalidArgument(
                f"vision_feature_layer={layer}; this tower has {-count - 1} to {count}"
            )
        return depth
