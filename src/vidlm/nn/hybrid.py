"""Decoder layers in which some tokens also attend to a memory, through a gate of each token's own.

The hybrid layer of the Slow-Fast Video MLLM (arXiv 2504.01328): the query is self-attention's,
keys and values are the memory's own, and what is read is added in front of the shared o_proj.
Parity: tests/parity/test_slowfast.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vidlm.nn.attention import attend, attend_memory
from vidlm.nn.decoder import Attention, DecoderConfig, Layer, RMSNorm, rotate
from vidlm.nn.step import Step


@dataclass(frozen=True)
class Gate:
    """What a token's gate is: act(w . attention + b) * warm-up.

    tanh       of the projection; else it is taken as it is
    warm_up    a learnt factor of the whole layer, which begins at 0; warm_tanh: its tanh
    """

    tanh: bool
    warm_up: bool
    warm_tanh: bool


class MemoryAttention(nn.Module):
    """q (n, H, E) over keys and values (K, S, E) -> (n, H * E); a module, so that it has hooks."""

    def forward(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return attend_memory(q, keys, values).flatten(1)


class HybridAttention(Attention):
    """Self-attention and, for tokens that are readers, gated attention to the memory."""

    def __init__(self, config: DecoderConfig, layer: int, gate: Gate) -> None:
        super().__init__(config, layer)
        D, E, K = config.hidden_size, config.head_dim, config.num_key_value_heads
        self.gate = gate
        self.cross_attn_kv_proj = nn.Linear(D, 2 * K * E)
        act = [nn.Tanh()] if gate.tanh else []
        self.cross_attn_gate_proj = nn.Sequential(nn.Linear(D, 1), *act)
        if gate.warm_up:
            closed = torch.zeros(1, dtype=torch.get_default_dtype())
            self.cross_attn_warm_up_gate = nn.Parameter(closed)
        self.cross = MemoryAttention()

    def read(self, x: Tensor, rope: tuple[Tensor, Tensor], step: Step, norm: RMSNorm) -> Tensor:
        """As forward; `norm` is what the memory's tokens pass, the layer's own input norm."""
        split = (-1, self.head_dim)
        q = rotate(self.q_proj(x).unflatten(-1, split), rope)  # (T, H, E)
        k = rotate(self.k_proj(x).unflatten(-1, split), rope)  # (T, K, E)
        v = self.v_proj(x).unflatten(-1, split)
        own = attend(q, k, v, step, self.layer).flatten(1)  # (T, D)
        return self.o_proj(own if step.memory is None else self._with_memory(own, q, step, norm))

    def _with_memory(self, own: Tensor, q: Tensor, step: Step, norm: RMSNorm) -> Tensor:
        x = own
        for segment in step.segments():
            if segment.memory is None:
                continue
            span = segment.start, segment.stop
            rows = torch.arange(*span, dtype=torch.int64, device=q.device)
            if step.readers is not None:
                rows = rows[step.readers[segment.start : segment.stop]]
            if not len(rows):
                continue
            keys, values = segment.memory.project(
                self.layer, lambda m: self._keys(norm(m.to(q.device)))
            )
            found = self.cross(q[rows], keys, values)  # (n, D)
            opened = self._open(own[rows]) * found
            x = x.index_add(0, rows, opened.to(x.dtype))  # differs under autocast alone
        return x

    def _keys(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """(S, D) -> keys and values (K, S, E); each head's keys lie before its values."""
        both = self.cross_attn_kv_proj(memory).unflatten(-1, (-1, 2, self.head_dim))
        keys, values = both.permute(2, 1, 0, 3)
        return keys, values

    def _open(self, own: Tensor) -> Tensor:
        """How far each token's gate is open, by what self-attention found: (n, D) -> (n, 1)."""
        opened = self.cross_attn_gate_proj(own)
        if not self.gate.warm_up:
            return opened
        warm = self.cross_attn_warm_up_gate
        return opened * (warm.tanh() if self.gate.warm_tanh else warm)


class HybridLayer(Layer):
    """A decoder layer with HybridAttention."""

    plain = False
    self_attn: HybridAttention

    def __init__(self, config: DecoderConfig, layer: int, gate: Gate) -> None:
        super().__init__(config, layer)
        self.self_attn = HybridAttention(config, layer, gate)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], step: Step) -> Tensor:
        norm = self.input_layernorm
        x = x + self.self_attn.read(norm(x), rope, step, norm)
        return x + self.mlp(self.post_attention_layernorm(x))
