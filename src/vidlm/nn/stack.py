"""A decoder's layers in one call of a kernel, where a step brings one token of each sequence.

The layers say what they compute; this only leaves out what lies between their kernels. Anything a
caller may see or change in between (hooks, other modules, a memory, a trace) is left to them.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from operator import is_
from typing import Any

from torch import Tensor, nn

from vidlm import native
from vidlm.nn.linear import bare, weight_of
from vidlm.nn.step import Step


class Stack:
    """Runs layers so, and knows from one step to the next where their weights are: to look into
    every module for every token takes as long as the kernels need for a few layers."""

    def __init__(self) -> None:
        self._known: tuple[_Inside, native.StackTable] | None = None

    def __reduce__(self) -> tuple[type[Stack], tuple[()]]:
        return Stack, ()  # the weights of a copy are elsewhere

    def decode(
        self,
        layers: nn.ModuleList,
        last: nn.Module,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        step: Step,
    ) -> Tensor | None:
        """x (M, D) through plain decoder layers and the norm `last`; None where they must be
        called."""
        first: Any = layers[0]
        pages, config = step.pages, first.config
        if pages is None or not native.takes_rows(len(x)) or max(step.lengths) > 1:
            return None
        if step.memory is not None or step.trace.hidden is not None or config.hidden_act != "silu":
            return None
        if not x.is_cpu or native.library() is None:
            return None
        table = self._table(layers, last, x)
        if table is None:
            return None
        empty = x.new_empty(0, config.num_key_value_heads, config.head_dim)
        caches = [pages.layer(i, empty, empty) for i in range(len(layers))]
        shape = native.StackShape(
            config.intermediate_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.rms_norm_eps,
        )
        places = native.Places(pages.tables, pages.lengths, pages.slots, pages.block)
        return native.stack(x, table, caches, (rope[0][:, 0], rope[1][:, 0]), places, shape)

    def _table(self, layers: nn.ModuleList, last: Any, x: Tensor) -> native.StackTable | None:
        if self._known is not None:
            inside, table = self._known
            if inside.is_of(layers, last) and not (inside.changed or table.moved):
                return table
        self._known = None
        given = []
        for layer in layers:
            part = _parts(layer)
            if part is None:
                return None
            given.append(part)
        made = native.StackTable.of(given, last.weight, x) if bare(last) else None
        if made is not None:
            self._known = _Inside(layers, last), made
        return made


class _Inside:
    """What a decoder's layers and last norm consist of. What is replaced in one of them stays in
    memory until the next step asks whether anything `changed`."""

    def __init__(self, layers: nn.ModuleList, last: nn.Module) -> None:
        self._layers, self._last = layers, last
        modules = [*layers.modules(), *last.modules()]
        self._places = [place for m in modules for place in (m._modules, m._parameters, m._buffers)]
        self._hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._own = [vars(module) for module in modules]
        self._found = self._now()

    def is_of(self, layers: nn.ModuleList, last: nn.Module) -> bool:
        return self._layers is layers and self._last is last

    @property
    def changed(self) -> bool:
        """Whether a module, parameter or buffer is another one now, or a call is looked at."""
        if any(self._hooks) or any("forward" in own for own in self._own):
            return True
        now = self._now()
        return len(now) != len(self._found) or not all(map(is_, now, self._found))

    def _now(self) -> list[Any]:
        return list(chain.from_iterable(place.values() for place in self._places))


def _parts(layer: Any) -> native.StackLayer | None:
    """Its weights; None unless it is the decoder's own layer, with nothing put in or around any of
    its parts."""
    if not getattr(layer, "plain", False) or not bare(layer):
        return None
    attention, mlp = layer.self_attn, layer.mlp
    before, after = layer.input_layernorm, layer.post_attention_layernorm
    if not all(bare(part) for part in (before, after, attention, mlp)):
        return None
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    linears = [*projections, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    weights = _weights(linears)
    if weights is None:
        return None
    *qkv, o, gate, up, down = weights
    biases = [projection.bias for projection in projections]
    return native.StackLayer(before.weight, qkv, biases, o, after.weight, (gate, up), down)


def _weights(linears: Iterable[nn.Module]) -> list[native.Weight] | None:
    found = [weight_of(linear) for linear in linears]
    weights = [weight for weight in found if weight is not None]
    return weights if len(weights) == len(found) else None
