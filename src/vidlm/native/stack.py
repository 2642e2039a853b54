"""All layers of a decoder for one new token each of a few sequences, by one call; see stack.c."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from vidlm.native.calls import SHARE, TYPES, checked, kernels, pack
from vidlm.native.coded import Cache, Coded
from vidlm.native.ops import SPAN, WIDEST, buffers, indices
from vidlm.native.packed import PackedWeight
from vidlm.native.products import MOST_ROWS, Weight, fields, takes

Pair = tuple[Cache, Cache]


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
    """A layer's weights: (D) norms, (O, D) projections, with the biases of q, k and v or None."""

    norm: Tensor
    qkv: Sequence[Weight]
    biases: Sequence[Tensor | None]
    o: Weight
    after: Tensor
    gate_up: tuple[Weight, Weight]
    down: Weight

    @property
    def weights(self) -> list[Weight]:
        """In the order of Layer in stack.c."""
        return [*self.qkv, self.o, *self.gate_up, self.down]

    @property
    def tensors(self) -> list[Tensor]:
        """The others, in their order."""
        return [*(bias for bias in self.biases if bias is not None), self.norm, self.after]

    @property
    def pointers(self) -> list[int]:
        """In the order of Layer in stack.c, with nothing for its keys and values."""
        rest = [*self.biases, self.norm, self.after]
        weights = (field for weight in self.weights for field in fields(weight))
        return [*weights, *(0 if x is None else x.data_ptr() for x in rest), *GAP]


GAP = (0, 0, 0, 0)  # where `buffers` of a layer's keys and values go


class StackTable:
    """Where the weights of a stack's layers and of the norm behind them are: prepared once, and
    good as long as it does not say that they have `moved`."""

    def __init__(self, layers: Sequence[StackLayer], last: Tensor) -> None:
        self.layers, self.last, self.dtype = len(layers), last, last.dtype
        self.sizes = _sizes(layers[0])
        self._array = pack(*chain.from_iterable(layer.pointers for layer in layers))
        weights = [weight for layer in layers for weight in layer.weights]
        self._tensors = [*chain.from_iterable(map(_parts, weights)), last]
        self._tensors += [tensor for layer in layers for tensor in layer.tensors]
        self._pointers = self._now()

    @classmethod
    def of(cls, layers: Sequence[StackLayer], last: Tensor, x: Tensor) -> StackTable | None:
        """None where the kernels cannot take them, with rows like x."""
        weights = [weight for layer in layers for weight in layer.weights]
        others = [tensor for layer in layers for tensor in layer.tensors]
        if not layers or takes(x, weights, last, *others) is None:
            return None
        sizes = _sizes(layers[0])
        if last.shape != (sizes[0],) or not all(_fits(layer, *sizes) for layer in layers):
            return None
        return cls(layers, last)

    @property
    def moved(self) -> bool:
        """Whether one of the tensors has got other memory since."""
        return self._now() != self._pointers

    @property
    def learns(self) -> bool:
        """Whether gradients are wanted of a weight."""
        return torch.is_grad_enabled() and any(x.requires_grad for x in self._tensors)

    def filled(self, caches: Sequence[Pair]) -> ctypes.Array[ctypes.c_longlong]:
        """With keys and values (K, N, E) of each layer: an array of Layer in stack.c."""
        array = type(self._array).from_buffer_copy(self._array)
        each = len(array) // self.layers
        for i, cache in enumerate(caches):
            end = (i + 1) * each
            array[end - len(GAP) : end] = list(buffers(*cache))
        return array

    def _now(self) -> list[int]:
        return list(map(Tensor.data_ptr, self._tensors))


def _sizes(layer: StackLayer) -> tuple[int, int, int, int]:
    """D, H * E, K * E and I, as a layer's first matrices have them."""
    q, k, _ = layer.qkv
    return q.shape[1], q.shape[0], k.shape[0], layer.gate_up[0].shape[0]


def _fits(layer: StackLayer, D: int, wide: int, narrow: int, I: int) -> bool:  # noqa: E741
    """Whether all of a layer's weights have the shapes that the kernel reads."""
    shapes = [(wide, D), (narrow, D), (narrow, D), (D, wide), (I, D), (I, D), (D, I)]
    biases = zip(layer.biases, (wide, narrow, narrow), strict=True)
    return (
        all(w.shape == shape for w, shape in zip(layer.weights, shapes, strict=True))
        and all(bias is None or bias.shape == (rows,) for bias, rows in biases)
        and layer.norm.shape == layer.after.shape == (D,)
    )


def _parts(weight: Weight) -> list[Tensor]:
    if isinstance(weight, PackedWeight):
        return [x for x in (weight.codes, weight.scale, weight.table) if x is not None]
    return [weight]


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
    table: StackTable,
    caches: Sequence[Pair],
    rope: tuple[Tensor, Tensor],
    places: Places,
    shape: StackShape,
) -> Tensor | None:
    """x (M, D) through all layers and the norm behind them -> (M, D); rope: cos and sin (M, E).
    New keys and values are stored in the caches, keys and values (K, N, E) of each layer, coded or
    not. None, and nothing done, where the kernels cannot; IndexError, and nothing done, where a
    slot or a block is not in the caches."""
    M, D = x.shape
    numbers = [part for cache in caches for part in cache if isinstance(part, Tensor)]
    coded = [part for cache in caches for part in cache if isinstance(part, Coded)]
    lib = kernels(x, *rope, *numbers)
    if lib is None or table.dtype != x.dtype or table.learns or not all(c.readable for c in coded):
        return None
    if not takes_rows(M) or shape.head_dim > WIDEST or shape.head_dim % 2:
        return None
    H, K, E, I = shape.heads, shape.kv_heads, shape.head_dim, shape.hidden  # noqa: E741
    N = caches[0][0].shape[1] if caches else 0
    held = len(caches) == table.layers and all(c.shape == (K, N, E) for c in chain(*caches))
    if not held or table.sizes != (D, H * E, K * E, I) or H % K or not _placed(places, rope, M, E):
        return None
    W = places.tables.shape[1]
    spans = -(-W * places.block // SPAN)
    scratch = torch.empty(M * H * spans * (E + 2), dtype=torch.float32, device="cpu")
    room = x.new_empty(M * (2 * D + 3 * H * E + 2 * K * E + 2 * I))
    layers = table.filled(caches)
    x, out = x.clone(), torch.empty_like(x)
    used = (table.last, x, out, *rope, places.slots, places.tables, places.lengths, room, scratch)
    sizes = (table.layers, M, D, I, H, K, E, N, W, places.block, spans)
    job = pack(
        ctypes.addressof(layers),
        *(t.data_ptr() for t in used),
        *sizes,
        torch.get_num_threads(),
        SHARE,
    )
    done = lib.vidlm_stack(job, shape.eps, TYPES[x.dtype])
    checked(done, f"a slot, a length or a block of a table of {N} slots")
    return out


def _placed(places: Places, rope: tuple[Tensor, Tensor], M: int, E: int) -> bool:
    """Whether tables, lengths, slots and angles are what the kernel reads."""
    tables, lengths, slots, block = places.tables, places.lengths, places.slots, places.block
    shapes = tables.shape[:1] == lengths.shape == slots.shape == (M,) and tables.ndim == 2
    angles = rope[0].shape == rope[1].shape == (M, E)
    both = indices(tables, torch.int32) and indices(lengths, torch.int32)
    return shapes and angles and both and indices(slots, torch.int64) and block > 0
