"""One decoder for Llama, Mistral, Vicuna, Yi and Qwen2: what differs is a DecoderConfig.

Follows the reference implementations in transformers (models/llama, mistral, qwen2): RMSNorm and
rotary angles in float32, rotate-half convention, SwiGLU. Parity: tests/parity/test_llava.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vidlm import native
from vidlm.errors import UnsupportedModel
from vidlm.nn.activation import gated
from vidlm.nn.attention import attend
from vidlm.nn.embedding import Embedding
from vidlm.nn.linear import bare, linear, linear_parts, linears, parted
from vidlm.nn.stack import Stack
from vidlm.nn.step import Step


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches of a decoder, under config.json's names."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_factor: float = 1.0  # linear position scaling: positions are divided by it
    qkv_bias: bool = False
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """Read a `text_config`; absent keys take the class defaults of its model_type."""
        kind = config.get("model_type", "llama")
        if kind not in DEFAULTS:
            raise UnsupportedModel(
                f"text model_type {kind!r} is not supported; known: {', '.join(DEFAULTS)}"
            )
        values = asdict(DEFAULTS[kind])
        values.update({k: v for k, v in config.items() if k in values and v is not None})
        # null means as many as query heads; absent means that in Llama's class alone.
        key = "num_key_value_heads"
        if config.get(key) is None and (kind == "llama" or key in config):
            values["num_key_value_heads"] = values["num_attention_heads"]
        if not config.get("head_dim"):
            values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
        if isinstance(values["eos_token_id"], list):
            values["eos_token_id"] = tuple(values["eos_token_id"])
        values.update(_rope(config, values["rope_theta"]))
        read = cls(**values)
        _refuse_unsupported(config, read)
        return read

    def to_dict(self) -> dict[str, Any]:
        """A `text_config` that vidlm and transformers (4.4x and 5.x) both read."""
        values = {k: v for k, v in asdict(self).items() if v is not None}
        del values["qkv_bias"], values["rope_factor"]
        scaling = {"rope_type": "linear", "factor": self.rope_factor}
        scaled = self.rope_factor != 1.0
        values["rope_scaling"] = scaling if scaled else None
        kind = scaling if scaled else {"rope_type": "default"}
        values["rope_parameters"] = {**kind, "rope_theta": self.rope_theta}
        if self.model_type == "mistral":
            values["sliding_window"] = None  # absent means 4096 to transformers
        return values

    def step_bytes(self, tokens: int, itemsize: int) -> int:
        """Memory that a layer works in for so many tokens of prompts. Roughly."""
        heads = (self.num_attention_heads + self.num_key_value_heads) * self.head_dim
        attention = 2 * self.hidden_size + 2 * heads  # rows, rows normed; q, k, v and what is found
        mlp = 3 * self.hidden_size + 2 * self.intermediate_size  # and the MLP's own; gate and up
        return itemsize * tokens * max(attention, mlp)


_LLAMA = DecoderConfig(
    model_type="llama",
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=128,
    max_position_embeddings=2048,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    bos_token_id=1,
    eos_token_id=2,
)
DEFAULTS: Mapping[str, DecoderConfig] = {
    "llama": _LLAMA,
    "mistral": replace(
        _LLAMA,
        model_type="mistral",
        intermediate_size=14336,
        num_key_value_heads=8,
        max_position_embeddings=131072,
    ),
    "qwen2": replace(
        _LLAMA,
        model_type="qwen2",
        vocab_size=151936,
        intermediate_size=22016,
        max_position_embeddings=32768,
        qkv_bias=True,
        bos_token_id=None,
        eos_token_id=None,
    ),
}


def _rope(config: Mapping[str, Any], default_theta: float) -> dict[str, float]:
    """Theta and linear factor from `rope_parameters` (5.x) or `rope_theta` + `rope_scaling`."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear"):
        raise UnsupportedModel(f"rope type {kind!r} is not supported; known: default, linear")
    theta = rope.get("rope_theta", config.get("rope_theta", default_theta))
    factor = rope.get("factor", 1.0) if kind == "linear" else 1.0
    return {"rope_theta": float(theta), "rope_factor": float(factor)}


def _refuse_unsupported(config: Mapping[str, Any], read: DecoderConfig) -> None:
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise UnsupportedModel("attention_bias and mlp_bias of Llama are not supported")
    window = config.get("sliding_window")
    if read.model_type == "mistral" and "sliding_window" not in config:
        window = 4096
    if read.model_type == "qwen2" and not config.get("use_sliding_window"):
        window = None
    if read.model_type != "llama" and window and window < read.max_position_embeddings:
        raise UnsupportedModel(
            f"sliding_window={window} below max_position_embeddings="
            f"{read.max_position_embeddings} is not supported; only full attention is"
        )
    if read.num_attention_heads % read.num_key_value_heads:
        raise UnsupportedModel(
            f"num_attention_heads={read.num_attention_heads} must be a multiple of "
            f"num_key_value_heads={read.num_key_value_heads}"
        )


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, dtype=torch.get_default_dtype()))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return native.rms_norm(x, self.weight, self.eps)

    def after(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """x + delta, and what this norm makes of it."""
        if bare(self):
            return native.add_rms_norm(x, delta, self.weight, self.eps)
        both = x + delta
        return both, self(both)


def rope_tables(config: DecoderConfig, step: Step, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, each (T, 1, E), of the step's positions; angles are always float32."""
    E, device = config.head_dim, step.positions.device
    exponents = torch.arange(0, E, 2, dtype=torch.float32, device=device) / E
    inv_freq = 1.0 / config.rope_theta**exponents / config.rope_factor
    angles = step.positions.float()[:, None] * inv_freq  # (T, E/2)
    angles = torch.cat((angles, angles), dim=-1)[:, None]  # (T, 1, E)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = (table.to(x.dtype) for table in rope)  # differs under autocast alone
    if x.ndim == 3:
        return native.rotate(x, cos.squeeze(1), sin.squeeze(1))
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        D, E = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.layer, self.head_dim = layer, E
        self.q_proj = nn.Linear(D, H * E, bias=config.qkv_bias)
        self.k_proj = nn.Linear(D, K * E, bias=config.qkv_bias)
        self.v_proj = nn.Linear(D, K * E, bias=config.qkv_bias)
        self.o_proj = nn.Linear(H * E, D, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], step: Step) -> Tensor:
        rows = linears((self.q_proj, self.k_proj, self.v_proj), x)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in rows)  # (T, H or K, E)
        q, k = rotate(q, rope), rotate(k, rope)
        return linear(self.o_proj, attend(q, k, v, step, self.layer).flatten(1))


class MLP(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        D, wide = config.hidden_size, config.intermediate_size
        self.width = wide
        self.gate_proj = nn.Linear(D, wide, bias=False)
        self.up_proj = nn.Linear(D, wide, bias=False)
        self.down_proj = nn.Linear(wide, D, bias=False)
        self.gated = gated(config.hidden_act)
        self.gated_in_place = gated(config.hidden_act, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        # A hook of gate_proj may have kept what it saw.
        act = self.gated_in_place if bare(self.gate_proj) else self.gated
        parts = parted((self.gate_proj, self.up_proj, self.down_proj), x, self.width)
        if len(parts) == 1:
            gate, up = linears((self.gate_proj, self.up_proj), x)
            return linear(self.down_proj, act(gate, up))
        gates, ups = (linear_parts(layer, parts) for layer in (self.gate_proj, self.up_proj))
        hidden = [act(gate, up) for gate, up in zip(gates, ups, strict=True)]
        return torch.cat(linear_parts(self.down_proj, hidden))


class Layer(nn.Module):
    plain = True  # computes what is below and nothing else; a subclass that adds to it says False

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], step: Step) -> Tensor:
        found = self.self_attn(self.input_layernorm(x), rope, step)
        x, normed = self.post_attention_layernorm.after(x, found)
        return x + self.mlp(normed)


class Decoder(nn.Module):
    """Embedded tokens (T, D) and a Step -> hidden states (T, D) after the last norm."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._stack = Stack()

    def forward(self, x: Tensor, step: Step) -> Tensor:
        trace = step.trace.hidden
        rope = rope_tables(self.config, step, x.dtype)
        whole = self._stack.decode(self.layers, self.norm, x, rope, step)
        if whole is not None:
            return whole
        for layer in self.layers:
            if trace is not None:
                trace.append(x)
            x = layer(x, rope, step)
        x = self.norm(x)
        if trace is not None:
            trace.append(x)
        return x
