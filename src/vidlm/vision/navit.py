"""VideoLLaMA3's vision encoder: frames of any size, patches placed by two-dimensional rotation.

Paper: VideoLLaMA 3 (arXiv 2501.13106). Reference: transformers, models/video_llama_3, whose numbers
are the native code's too; the native eager and sdpa attention adds its mask to the scores and so
leaks between frames, which is not followed. Parity: tests/parity/test_navit.py.

Patches arrive as rows in merge-block order (patches.py): the merge² patches that become one token
lie behind each other. Nothing in here depends on the order but the rotation and that last step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, linear

from vidlm.errors import InvalidArgument, UnsupportedModel
from vidlm.nn.upload import upload
from vidlm.vision.patches import Grid
from vidlm.vision.vit import Encoder, Rope

# Patches encoded at a time: weights are read for enough work, and no video takes more memory than
# the largest image, which has twice as many in the published budget (16384 tokens of one patch
# each) and cannot be parted.
PATCHES = 3072

NAMES = ("video_llama_3_vision", "videollama3_vision_encoder")  # transformers' and the native one


@dataclass(frozen=True)
class NaViTConfig:
    """Sizes of the encoder, under config.json's names and with its class's defaults."""

    model_type: ClassVar[str] = NAMES[0]

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    patch_size: int = 16
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    num_channels: int = 3
    attention_dropout: float = 0.0  # these two matter to training alone
    initializer_range: float = 0.02
    rope_theta: float = 10000.0

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> NaViTConfig:
        """Read a `vision_config`, or the native layout's `vision_encoder_config`.

        An absent key means the default above in both: the published files name every size.
        """
        kind = config.get("model_type", NAMES[0])
        if kind not in NAMES:
            raise UnsupportedModel(
                f"vision model_type {kind!r} is not supported; known: {', '.join(NAMES)}"
            )
        known = {f.name for f in fields(cls)}
        values = {k: v for k, v in config.items() if k in known and v is not None}
        values["rope_theta"] = _theta(config)
        read = cls(**values)
        read._refuse_unsupported(config)
        return read

    def to_dict(self) -> dict[str, Any]:
        """A `vision_config` that vidlm and transformers both read."""
        values = asdict(self)
        theta = values.pop("rope_theta")
        rope = {"rope_type": "axial", "rope_theta": theta}
        return {
            "model_type": self.model_type,
            **values,
            "rope_parameters": rope,
        }

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def _refuse_unsupported(self, config: Mapping[str, Any]) -> None:
        channels = config.get("num_channels", 3)
        if channels != 3:
            raise UnsupportedModel(f"num_channels={channels}; only RGB (3) is supported")
        if not isinstance(self.patch_size, int):
            raise UnsupportedModel(f"patch_size={self.patch_size}; allowed: one number, as in 14")
        # Half of a head's numbers turn with the row, half with the column, each half in pairs.
        if self.hidden_size % (4 * self.num_attention_heads):
            raise UnsupportedModel(
                f"hidden_size={self.hidden_size} with num_attention_heads="
                f"{self.num_attention_heads}; the width of a head must be a multiple of 4"
            )


def _theta(config: Mapping[str, Any]) -> float:
    """From `rope_parameters`, which only transformers 5 writes; the native code knows no other."""
    rope = config.get("rope_parameters") or {}
    kind = rope.get("rope_type", "axial")
    if kind not in ("axial", "default"):  # transformers takes "default" for axial here
        raise UnsupportedModel(f"vision rope_type {kind!r} is not supported; known: axial")
    return float(rope.get("rope_theta", config.get("rope_theta", NaViTConfig.rope_theta)))


class Embeddings(nn.Module):
    def __init__(self, config: NaViTConfig) -> None:
        super().__init__()
        patch = config.patch_size
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, patch, patch)

    def forward(self, rows: Tensor) -> Tensor:
        """(F, P, 3 · patch²) -> (F, P, D): a convolution that meets each patch once is a product"""
        weight, bias = self.patch_embedding.weight, self.patch_embedding.bias
        return linear(rows.to(weight), weight.flatten(1), bias)


class NaViT(nn.Module):
    """Rows of patches -> features. Parameter names are those of the published checkpoints."""

    def __init__(self, config: NaViTConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        rows: Tensor,
        grid: Grid,
        merge: int,
        hidden: list[Tensor] | None = None,
        attentions: list[list[Tensor]] | None = None,
    ) -> Tensor:
        """One image or video: (t · h · w, 3 · patch²) -> (t · h · w / merge², D).

        `hidden` collects the state before each layer and after the last one, not yet normed nor
        merged, (t · h · w, D) each: transformers' `hidden_states`; `attentions` of every layer the
        weights of each frame, (1, H, P, P). The attention of a frame is its own, so frames are
        encoded PATCHES at a time.

        Raises InvalidArgument where rows, grid and merge do not fit each other.
        """
        self.check(rows, grid, merge)
        t, h, w = grid
        rope = self._rope(h, w, merge)
        kept: list[list[Tensor]] = [[] for _ in range(len(self.encoder.layers) + 1)]
        seen: list[list[Tensor]] = [[] for _ in self.encoder.layers]
        features = []
        for frames in rows.unflatten(0, (t, h * w)).split(self.at_a_time(h * w)):
            weights: list[Tensor] | None = None if attentions is None else []
            for depth, x in enumerate(self._states(frames, rope, weights)):  # (F, P, D)
                if hidden is not None:
                    kept[depth].append(x)
            features.append(downsample(self.post_layernorm(x), merge))
            for depth, layer in enumerate(weights or ()):
                seen[depth] += layer.split(1)
        if hidden is not None:
            hidden += [torch.cat(parts).flatten(0, 1) for parts in kept]
        if attentions is not None:
            attentions += seen
        return torch.cat(features)

    def _states(self, rows: Tensor, rope: Rope, weights: list[Tensor] | None) -> Iterator[Tensor]:
        x = self.embeddings(rows)
        yield x
        for layer in self.encoder.layers:
            x = layer(x, rope, weights)
            yield x

    def _rope(self, h: int, w: int, merge: int) -> Rope:
        """cos and sin, each (P, 1, E): a head's angles are [row, column, row, column]."""
        E, device = self.config.head_dim, self.post_layernorm.weight.device
        exponents = torch.arange(0, E // 2, 2, dtype=torch.float32, device=device) / (E // 2)
        inv_freq = 1.0 / self.config.rope_theta**exponents  # (E/4,)
        angles = upload(places(h, w, merge), device).float()[..., None] * inv_freq  # (P, 2, E/4)
        angles = angles.flatten(1).repeat(1, 2)[:, None]
        return angles.cos(), angles.sin()

    @staticmethod
    def at_a_time(patches: int) -> int:
        """Frames of so many patches encoded together."""
        return max(1, PATCHES // patches)

    def check(self, rows: Tensor, grid: Grid, merge: int) -> None:
        """Raises InvalidArgument where rows, grid and merge do not fit each other."""
        t, h, w = grid
        count, width = t * h * w, 3 * self.config.patch_size**2
        if min(t, h, w, merge) < 1 or h % merge or w % merge:
            raise InvalidArgument(
                f"grid {tuple(grid)} with merge={merge}; allowed: at least one frame, and rows and "
                "columns that are multiples of merge"
            )
        if tuple(rows.shape) != (count, width):
            raise InvalidArgument(
                f"patches of shape {tuple(rows.shape)} for the grid {tuple(grid)}; this encoder "
                f"takes ({count}, {width}): pass the processor's output unshortened"
            )


def places(h: int, w: int, merge: int) -> Tensor:
    """Row and column of each patch of a frame, in merge-block order: (P, 2)."""
    sides = (torch.arange(n, dtype=torch.int64, device="cpu") for n in (h, w))
    rows, columns = torch.meshgrid(*sides, indexing="ij")
    blocks = torch.stack((rows, columns), -1).view(h // merge, merge, w // merge, merge, 2)
    return blocks.transpose(1, 2).reshape(h * w, 2)


def downsample(x: Tensor, merge: int) -> Tensor:
    """Each block of merge² patches to one by bilinear interpolation: (F, P, D) -> (F·P/merge², D).

    For merge 2 that is the mean. The reference interpolates the whole frame; a block's middle lies
    so that nothing outside the block has a weight.
    """
    D = x.shape[-1]
    if merge == 1:
        return x.reshape(-1, D)
    blocks = x.reshape(-1, merge, merge, D).permute(0, 3, 1, 2)
    return interpolate(blocks, size=(1, 1), mode="bilinear")[..., 0, 0]
