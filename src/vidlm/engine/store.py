"""What an engine keeps: keys and values in blocks that prompts share, and features of media."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vidlm.engine.blocks import BlockPool, block_keys
from vidlm.engine.features import FeatureCache
from vidlm.engine.inputs import PromptInputs
from vidlm.engine.kv import PagedKV, bytes_per_token, kv_dtype
from vidlm.engine.memory import free_for_layers
from vidlm.engine.options import BLOCK, EngineOptions
from vidlm.errors import InvalidArgument
from vidlm.models.base import VideoModel
from vidlm.native import Cache, Coded, tensors_of


class Store:
    """The blocks of one engine, by whom they are owned and under which keys, and its features."""

    def __init__(
        self,
        model: VideoModel,
        options: EngineOptions,
        empty: Callable[..., Tensor] = torch.empty,
    ) -> None:
        self._model, self._share = model, options.share
        budget = options.kv_bytes
        if budget is None:
            budget = free_for_layers(model.layer_devices) // 2
        self.block_bytes = block_bytes(model, options.kv_dtype)
        longest = blocks_for(model.config.max_context) + 1
        most = longest * options.max_sequences  # more could not be used but for what is kept
        count = max(min(budget // self.block_bytes, most), 1)
        self.pool = BlockPool(count, BLOCK)
        blocks = count + options.cuda_graphs  # one that is nobody's, for `engine.graphs`
        self.kv = PagedKV(
            *(blocks, BLOCK, model.device),
            coded=options.kv_dtype is not None,
            empty=empty,
            dtype=model.decoder.embed_tokens.weight.dtype,
        )
        self.features = FeatureCache(options.feature_bytes if options.share else 0)

    def keys(self, inputs: PromptInputs) -> list[bytes]:
        """Of the full blocks of a prompt; none where nothing is shared."""
        if not self._share:
            return []
        return block_keys(inputs.ids, inputs.spans, BLOCK, self.root(inputs))

    def root(self, inputs: PromptInputs) -> bytes:
        """What a prompt's keys and values depend on besides ids and media up to a block's end:
        where text attends to media ahead of it, all of them."""
        ahead = b"".join(inputs.digests) if self._model.has_memory else b""
        return inputs.root + ahead

    def covers(self, inputs: PromptInputs, keys: Sequence[bytes]) -> bool:
        """Whether all media of a prompt are stored as keys and values, so that no layer asks for
        their features."""
        if inputs.needs_memory:
            return False
        last = max((stop for _, stop, _ in inputs.spans), default=0)
        return last <= self.pool.peek(keys) * BLOCK

    def read(self, keys: Sequence[bytes]) -> list[tuple[Cache, Cache]]:
        """Copies of the keys and values (K, S, E) kept under the longest known beginning of `keys`,
        of every layer; none where nothing is."""
        blocks = self.pool.match(keys, again=True)
        try:
            return self.kv.read(blocks, len(blocks) * BLOCK) if blocks else []
        finally:
            self.pool.release(blocks)

    def write(self, keys: Sequence[bytes], layers: Sequence[tuple[Cache, Cache]]) -> bool:
        """Keep what `read` gave under the same keys. False where there is no room for it now.

        Raises InvalidArgument where it was stored as another dtype.
        """
        self._check_dtype(layers)
        count = min(layers[0][0].shape[1] // BLOCK, len(keys))
        if self.pool.peek(keys[:count]) == count:
            return True
        if count > self.pool.available:
            return False
        blocks = self.pool.allocate(count)
        stop, devices, dtype = count * BLOCK, self._model.layer_devices, self._model.dtype
        here = [
            (_first(k, stop, device, dtype), _first(v, stop, device, dtype))
            for device, (k, v) in zip(devices, layers, strict=True)
        ]
        self.kv.write(blocks, here)
        for block, key in zip(blocks, keys, strict=False):
            self.pool.publish(block, key)
        self.pool.release(blocks)
        return True

    def _check_dtype(self, layers: Sequence[tuple[Cache, Cache]]) -> None:
        if any(isinstance(x, Coded) != self.kv.coded for pair in layers for x in pair):
            mine = "int8" if self.kv.coded else None
            raise InvalidArgument(
                f"keys and values of another kv_dtype than this engine's, which is {mine!r}; give "
                "both engines the same EngineOptions(kv_dtype=...)"
            )


def _first(cache: Cache, count: int, device: torch.device, dtype: torch.dtype) -> Cache:
    """The first so many tokens, on this device and, where they are not coded, of this dtype."""
    if isinstance(cache, Coded):
        return Coded(*(x[:, :count].to(device) for x in tensors_of(cache)))
    return cache[:, :count].to(device, dtype)


def blocks_for(tokens: int) -> int:
    return -(-tokens // BLOCK)


def block_bytes(model: VideoModel, kv: str | None = None) -> int:
    """Memory of one block, in all layers; `kv` as EngineOptions.kv_dtype."""
    sizes = model.decoder.config
    shape = (sizes.num_hidden_layers, sizes.num_key_value_heads, sizes.head_dim)
    return BLOCK * bytes_per_token(*shape, kv_dtype(kv, model.dtype))


def weights_stamp(model: torch.nn.Module) -> object:
    """Something that differs when weights were changed: a model may be trained between two
    questions, and PEFT's adapters switched or merged. Changes through `.data` in place are not
    seen."""
    weights = [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters()]
    adapted = [m for m in model.modules() if hasattr(type(m), "disable_adapters")]
    switches = [
        (str(m.active_adapters), m.disable_adapters, str(getattr(m, "merged_adapters", None)))
        for m in adapted
    ]
    return weights, switches
