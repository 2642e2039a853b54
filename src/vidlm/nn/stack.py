"""A decoder's layers in one call of a kernel, where a step brings one token of each sequence.

The layers say what they compute; this only leaves out what lies between their kernels. Anything a
caller may see or change in between (hooks, other modules, a memory, a trace) is left to them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from vidlm import native
from vidlm.nn.linear import bare, weight_of
from vidlm.nn.step import Step


def decode(
    layers: Iterable[Any], last: Any, x: Tensor, rope: tuple[Tensor, Tensor], step: Step
) -> Tensor | None:
    """x (M, D) through plain decoder layers and the norm `last`; None where they must be called."""
    layers = list(layers)
    pages, config = step.pages, layers[0].config
    if pages is None or not native.takes_rows(len(x)) or max(step.lengths) > 1:
        return None
    if step.memory is not None or step.trace.hidden is not None or config.hidden_act != "silu":
        return None
    if not x.is_cpu or native.library() is None or not bare(last):
        return None
    parts = []
    empty = x.new_empty(0, config.num_key_value_heads, config.head_dim)
    for i, layer in enumerate(layers):
        weights = _weights(layer)
        if weights is None:
            return None
        attention = layer.self_attn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        *qkv, o, gate, up, down = weights
        parts.append(
            native.StackLayer(
                layer.input_layernorm.weight,
                qkv,
                [p.bias for p in projections],
                o,
                layer.post_attention_layernorm.weight,
                (gate, up),
                down,
                pages.layer(i, empty, empty),
            )
        )
    shape = native.StackShape(
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.rms_norm_eps,
    )
    places = native.Places(pages.tables, pages.lengths, pages.slots, pages.block)
    return native.stack(x, parts, last.weight, (rope[0][:, 0], rope[1][:, 0]), places, shape)


def _weights(layer: Any) -> list[native.Weight] | None:
    """Of all its projections; None unless it is the decoder's own layer, with nothing put in or
    around any of its parts."""
    if not getattr(layer, "plain", False) or not bare(layer):
        return None
    attention, mlp = layer.self_attn, layer.mlp
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    if not all(bare(part) for part in (*norms, attention, mlp)):
        return None
    linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    linears += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    weights = [weight for linear in linears if (weight := weight_of(linear)) is not None]
    return weights if len(weights) == len(linears) else None
