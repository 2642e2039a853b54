"""All layers of a decoder for one new token each of a few sequences, by one call; see stack.c."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vidlm.native.calls import SHARE, TYPES, pack
from vidlm.native.coded import Cache, Coded
from vidlm.native.ops import SPAN, WIDEST, buffers
from vidlm.native.products import MOST_ROWS, Weight, fields, takes


@dataclass(frozen=True)
class StackShape:
    """Sizes of a stack: I (of the hidden layer), H, K, E, and the norms' epsilon."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float


@dataclass(frozen=True)
class StackLayer:
    """A layer's weights: (D) norms, (O, D) projections with the biases of q, k and v or None, and
    its keys and values (K, N, E) in blocks of slots, coded or not."""

    norm: Tensor
    qkv: Sequence[Weight]
    biases: Sequence[Tensor | None]
    o: Weight
    after: Tensor
    gate_up: tuple[Weight, Weight]
    down: Weight
    cache: tuple[Cache, Cache]

    @property
    def weights(self) -> list[Weight]:
        """In the order of Layer in stack.c."""
        return [*self.qkv, self.o, *self.gate_up, self.down]

    @property
    def tensors(self) -> list[Tensor]:
        given = [bias for bias in self.biases if bias is not None]
        numbers = [x for x in self.cache if isinstance(x, Tensor)]
        return [*given, self.norm, self.after, *numbers]

    @property
    def pointers(self) -> list[int]:
        """In the order of Layer in stack.c."""
        rest = [*self.biases, self.norm, self.after]
        weights = (field for weight in self.weights for field in fields(weight))
        return [*weights, *(0 if x is None else x.data_ptr() for x in rest), *buffers(*self.cache)]

    @property
    def readable(self) -> bool:
        """Whether the kernels can read what is coded of its keys and values."""
        return all(x.readable for x in self.cache if isinstance(x, Coded))


@dataclass(frozen=True)
class Places:
    """Where each sequence's tokens are, as decode_attention takes it, and the new one's slot."""

    tables: Tensor  # (M, W) int32
    lengths: Tensor  # (M) int32
    slots: Tensor  # (M) int64
    block: int


def takes_rows(count: int) -> bool:
    return 0 < count <= MOST_ROWS


def stack(
    x: Tensor,
    layers: Sequence[StackLayer],
    last: Tensor,
    rope: tuple[Tensor, Tensor],
    places: Places,
    shape: StackShape,
) -> Tensor | None:
    """x (M, D) through all layers and the norm `last` behind them -> (M, D); rope: cos and sin
    (M, E). New keys and values are stored. None, and nothing done, where the kernels cannot."""
    M, D = x.shape
    weights = [weight for layer in layers for weight in layer.weights]
    lib = takes(x, weights, last, *rope, *(t for layer in layers for t in layer.tensors))
    if lib is None or not all(layer.readable for layer in layers):
        return None
    if not takes_rows(M) or shape.head_dim > WIDEST or shape.head_dim % 2:
        return None
    H, K, E, I = shape.heads, shape.kv_heads, shape.head_dim, shape.hidden  # noqa: E741
    W = places.tables.shape[1]
    spans = -(-W * places.block // SPAN)
    scratch = torch.empty(M * H * spans * (E + 2))
    room = x.new_empty(M * (2 * D + 3 * H * E + 2 * K * E + 2 * I))
    table = pack(*(pointer for layer in layers for pointer in layer.pointers))
    x, out = x.clone(), torch.empty_like(x)
    used = (last, x, out, *rope, places.slots, places.tables, places.lengths, room, scratch)
    N = layers[0].cache[0].shape[1]
    numbers = (len(layers), M, D, I, H, K, E, N, W, places.block, spans)
    job = pack(
        ctypes.addressof(table),
        *(t.data_ptr() for t in used),
        *numbers,
        torch.get_num_threads(),
        SHARE,
    )
    if not lib.vidlm_stack(job, shape.eps, TYPES[x.dtype]):
        raise MemoryError("no memory to unpack the weights of a layer in")
    return out
