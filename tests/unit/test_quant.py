"""bitsandbytes' linear layers in a model: which, how far off, and what is refused."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import nn

from vidlm import BitsAndBytesConfig, LlavaForConditionalGeneration, LlavaProcessor
from vidlm.errors import InvalidArgument, UnsupportedModel

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def load(folder: Path, **words: Any) -> LlavaForConditionalGeneration:
    config = BitsAndBytesConfig(**words)
    return LlavaForConditionalGeneration.from_pretrained(folder, quantization_config=config)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@torch.no_grad()
def test_logits_are_those_of_what_is_kept(
    folder: Path, kind: str, model: LlavaForConditionalGeneration
) -> None:
    """A model whose weights are what four bits keep of them, in full precision."""
    ids = torch.arange(5, 60)[None]
    kept = LlavaForConditionalGeneration.from_pretrained(folder)
    for name, layer in kept.named_modules():
        if type(layer) is nn.Linear and "lm_head" not in name:
            codes, state = bitsandbytes.functional.quantize_4bit(layer.weight, quant_type=kind)
            layer.weight.copy_(bitsandbytes.functional.dequantize_4bit(codes, state))
    near = load(folder, load_in_4bit=True, bnb_4bit_quant_type=kind)(ids).logits
    assert difference(near, kept(ids).logits) < 1e-4
    assert difference(near, model(ids).logits) > 1e-3


@torch.no_grad()
def test_other_ways_of_keeping_weights(folder: Path, model: LlavaForConditionalGeneration) -> None:
    ids = torch.arange(5, 60)[None]
    exact, four = model(ids).logits, load(folder, **NF4)(ids).logits
    assert 1e-4 < difference(load(folder, load_in_8bit=True)(ids).logits, exact) < 0.1
    for words in ({"bnb_4bit_use_double_quant": True}, {"bnb_4bit_compute_dtype": "float16"}):
        assert 1e-6 < difference(load(folder, **NF4, **words)(ids).logits, four) < 0.1


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative to the largest value."""
    return float((one - other).abs().max() / other.abs().max())


@torch.no_grad()
def test_a_layer_is_the_librarys(folder: Path, model: LlavaForConditionalGeneration) -> None:
    """A product with what nf4 keeps of the weight, as the library decodes it."""
    name = "language_model.model.layers.1.mlp.up_proj"
    weight = model.get_submodule(name).weight
    codes, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4")
    kept = bitsandbytes.functional.dequantize_4bit(codes, state)
    x = torch.randn(7, weight.shape[1])
    quantized = load(folder, **NF4).get_submodule(name)
    assert torch.allclose(quantized(x), x @ kept.T, atol=1e-5)
    assert quantized.weight.nbytes * 8 == weight.numel() * 4


def test_answers(folder: Path, processor: LlavaProcessor) -> None:
    model = load(folder, **NF4, bnb_4bit_compute_dtype=torch.float16)
    ids = processor(text="what happens?", return_tensors="pt")["input_ids"]
    alone = model.generate(ids, max_new_tokens=6, eos_token_id=[])
    assert alone.shape[1] == ids.shape[1] + 6
    assert model.dtype == torch.float32


def test_the_head_stays_and_names_are_skipped(folder: Path) -> None:
    def linear(model: nn.Module) -> set[str]:
        return {n for n, m in model.named_modules() if type(m) is nn.Linear}

    assert linear(load(folder, **NF4)) == {"language_model.lm_head"}
    skipped = ["lm_head", "model.vision_tower", "multi_modal_projector.linear_1"]
    kept = linear(load(folder, **NF4, llm_int8_skip_modules=skipped))
    assert "multi_modal_projector.linear_1" in kept
    assert "multi_modal_projector.linear_2" not in kept
    assert any(name.startswith("vision_tower") for name in kept)
    assert not any(name.startswith("language_model.model") for name in kept)
    with pytest.raises(InvalidArgument, match="names 'visual', which is no part"):
        load(folder, **NF4, llm_int8_skip_modules=["visual"])


def test_bad_configurations() -> None:
    for words in ({}, {"load_in_4bit": True, "load_in_8bit": True}):
        with pytest.raises(InvalidArgument, match="set one"):
            BitsAndBytesConfig(**words)
    with pytest.raises(InvalidArgument, match="nf4, fp4"):
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="int4")
    with pytest.raises(InvalidArgument, match="bnb_4bit_compute_dtype"):
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype="half precision")


def test_what_cannot_be_done(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedModel, match="cannot be written yet"):
        load(folder, **NF4).save_pretrained(tmp_path)
    found = builtins.__import__
    import vidlm.quant.bitsandbytes as scheme

    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(scheme, "import_module", missing)
    with pytest.raises(UnsupportedModel, match=r"pip install 'vidlm\[quant\]'"):
        load(folder, **NF4)
    assert builtins.__import__ is found
