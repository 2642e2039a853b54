"""nn/stack.py: a stack of layers in one call gives the bits that its layers give one by one."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from paging import Paged
from vidlm import native
from vidlm.nn.decoder import Decoder, DecoderConfig
from vidlm.nn.stack import Stack
from vidlm.nn.step import Memory
from vidlm.quant.packing import pack, packings

needs_kernels = pytest.mark.skipif(
    not native.status().used, reason=f"no kernels here: {native.status().reason}"
)


def made(model_type: str, heads: tuple[int, int], dtype: torch.dtype, **more: Any) -> Decoder:
    config = {
        "model_type": model_type,
        "vocab_size": 50,
        "hidden_size": 8 * heads[0],
        "intermediate_size": 72,
        "num_hidden_layers": 3,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "max_position_embeddings": 64,
        **more,
    }
    decoder = Decoder(DecoderConfig.from_dict(config)).to(dtype).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in decoder.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return decoder


def run(decoder: Decoder, lengths: list[int], new: int = 3) -> list[Tensor]:
    """Sequences of so many tokens, and their next ones, a step each."""
    stores, generator = Paged([n + new for n in lengths], seed=2), torch.Generator().manual_seed(3)
    hidden = []
    for count in (dict(enumerate(lengths)), *[dict.fromkeys(range(len(lengths)), 1)] * new):
        ids = torch.randint(0, 50, (sum(count.values()),), generator=generator)
        hidden.append(decoder(decoder.embed_tokens(ids), stores.step(count)))
        stores.count(count)
    return hidden


def one_by_one(decoder: Decoder, lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    with monkeypatch.context() as patch:
        patch.setattr(Stack, "decode", lambda *_: None)
        return run(decoder, lengths)


@needs_kernels
@settings(max_examples=30)
@given(
    model_type=st.sampled_from(["llama", "qwen2"]),
    heads=st.sampled_from([(4, 4), (6, 2), (4, 1)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
)
def test_the_bits_of_the_layers(
    model_type: str, heads: tuple[int, int], dtype: torch.dtype, lengths: list[int]
) -> None:
    decoder = made(model_type, heads, dtype)
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        whole = native.stack
        patch.setattr(native, "stack", lambda *given: calls.append(1) or whole(*given))
        together = run(decoder, lengths)
        assert len(calls) == 3 + (max(lengths) == 1)
        for a, b in zip(together, one_by_one(decoder, lengths, patch), strict=True):
            assert torch.equal(a, b)


@needs_kernels
@pytest.mark.parametrize("part", ["layers.1", "layers.1.self_attn.q_proj", "layers.2.mlp", "norm"])
def test_a_hook_is_called(part: str) -> None:
    decoder, seen = made("qwen2", (4, 2), torch.float32), []
    before = run(decoder, [5])
    decoder.get_submodule(part).register_forward_hook(lambda *_: seen.append(1))
    for a, b in zip(run(decoder, [5]), before, strict=True):
        torch.testing.assert_close(a, b)
    assert len(seen) == 4


@needs_kernels
def test_another_module_in_a_layers_place_is_called() -> None:
    class Twice(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    decoder = made("llama", (4, 2), torch.float32)
    old = decoder.layers[1].mlp.down_proj
    new = Twice(old.in_features, old.out_features, bias=False).requires_grad_(False)
    new.weight.copy_(old.weight)
    before = run(decoder, [4])[-1]
    decoder.layers[1].mlp.down_proj = new
    changed = run(decoder, [4])[-1]
    old.weight.mul_(2)
    decoder.layers[1].mlp.down_proj = old
    torch.testing.assert_close(changed, run(decoder, [4])[-1])
    assert not torch.allclose(changed, before, atol=1e-3)


@needs_kernels
def test_weights_are_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, made_of = made("qwen2", (4, 2), torch.float32), []
    of = native.StackTable.of
    monkeypatch.setattr(native.StackTable, "of", lambda *x: made_of.append(1) or of(*x))
    run(decoder, [3])
    run(decoder, [4, 2])
    assert len(made_of) == 1


def other_parameter(decoder: Decoder) -> Decoder:
    layer = decoder.layers[1].self_attn.o_proj
    layer.weight = nn.Parameter(2 * layer.weight, requires_grad=False)
    return decoder


def other_memory(decoder: Decoder) -> Decoder:
    weight = decoder.layers[2].post_attention_layernorm.weight
    weight.data = weight.data + 1
    return decoder


def other_numbers(decoder: Decoder) -> Decoder:
    decoder.norm.weight.mul_(3)
    return decoder


def no_bias(decoder: Decoder) -> Decoder:
    decoder.layers[0].self_attn.q_proj.bias = None
    return decoder


def other_norm(decoder: Decoder) -> Decoder:
    norm = deepcopy(decoder.norm)
    norm.weight.mul_(2)
    decoder.norm = norm
    return decoder


def fewer_bits(decoder: Decoder) -> Decoder:
    layer = decoder.layers[1].mlp.up_proj
    decoder.layers[1].mlp.up_proj = pack(layer.weight, packings()["int4"])
    return decoder


CHANGES = [other_parameter, other_memory, other_numbers, no_bias, other_norm, fewer_bits]


@needs_kernels
@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_between_steps_counts(
    change: Callable[[Decoder], Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the decoder had never been used before."""
    used = made("qwen2", (4, 2), torch.float32)
    before = run(used, [5])[-1]
    found = run(change(used), [5])
    fresh = change(made("qwen2", (4, 2), torch.float32))
    for a, b, c in zip(found, run(fresh, [5]), one_by_one(fresh, [5], monkeypatch), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert not torch.equal(found[-1], before)


@needs_kernels
@pytest.mark.parametrize("how", [deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_reads_its_own_weights(how: Callable[[Decoder], Decoder]) -> None:
    decoder = made("llama", (4, 2), torch.bfloat16)
    before = run(decoder, [5])[-1]
    copy = how(decoder)
    decoder.norm.weight.zero_()
    assert torch.equal(run(copy, [5])[-1], before)


@needs_kernels
def test_another_dtype() -> None:
    decoder = made("llama", (4, 2), torch.float32)
    run(decoder, [5])
    expected = made("llama", (4, 2), torch.float32).to(torch.bfloat16)
    for a, b in zip(run(decoder.to(torch.bfloat16), [5]), run(expected, [5]), strict=True):
        assert a.dtype == torch.bfloat16
        assert torch.equal(a, b)


@pytest.mark.parametrize("reason", ["trace", "memory", "activation", "gradients", "float16"])
def test_what_is_left_to_the_layers(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    dtype = torch.float16 if reason == "float16" else torch.float32
    more = {"hidden_act": "gelu"} if reason == "activation" else {}
    decoder = made("llama", (4, 2), dtype, **more)
    decoder.requires_grad_(reason == "gradients")
    stores = Paged([4])
    step = stores.step({0: 1})
    if reason == "memory":
        step = replace(step, memory=(Memory(torch.zeros(1, 32)),))
    if reason == "trace":
        step = replace(step, trace=replace(step.trace, hidden=[]))
    made_by_kernel = []
    stack = native.stack
    monkeypatch.setattr(native, "stack", lambda *x: made_by_kernel.append(stack(*x)))
    decoder(decoder.embed_tokens(torch.tensor([5])), step)
    assert not any(found is not None for found in made_by_kernel)
