"""Weights in fewer bits: how far off, which layers, saved and loaded again, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import vidlm
from vidlm import (
    BitsAndBytesConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    QuantoConfig,
    TorchAoConfig,
)
from vidlm.errors import InvalidArgument, UnsupportedModel, WeightsError
from vidlm.native import PackedWeight
from vidlm.nn.packed import PackedLinear
from vidlm.quant import Scheme, preset, quantize
from vidlm.quant.packing import pack, pack_rows, packings

IDS = torch.arange(5, 60)[None]
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
CONFIGS = {
    "int8": QuantoConfig(weights="int8"),
    "int4": QuantoConfig(weights="int4"),
    "nf4": NF4,
    "fp4": BitsAndBytesConfig(load_in_4bit=True),
    "int8 of bitsandbytes": BitsAndBytesConfig(load_in_8bit=True),
    "int8 of torchao": TorchAoConfig("int8_weight_only"),
    "int4 of torchao": TorchAoConfig("int4_weight_only", group_size=64),
}


def load(folder: Path, config: Any, **words: Any) -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(
        folder, quantization_config=config, **words
    )


def packed(model: nn.Module) -> dict[str, PackedLinear]:
    return {n: m for n, m in model.named_modules() if type(m) is PackedLinear}


def normal(O: int, D: int) -> Tensor:  # noqa: E741
    return torch.randn(O, D, generator=torch.Generator().manual_seed(O * D))


# ---- a weight ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.008), ("int4", 0.09), ("nf4", 0.095)])
@pytest.mark.parametrize("D", [64, 100, 4304 // 16])
def test_error_of_normal_weights(kind: str, most: float, D: int) -> None:
    weight = normal(300, D)
    kept = pack(weight, packings()[kind]).packed.numbers(torch.float32)
    error = float((kept - weight).norm() / weight.norm())
    assert most / 2 < error < most


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4", "fp4"])
def test_no_other_code_is_nearer(kind: str) -> None:
    weight = normal(20, 96)
    made = pack(weight, packings()[kind]).packed
    if made.table is None:
        near = made.scale[:, None] / 2
    else:
        scale = made.scale.float().repeat_interleave(made.group, 1)[:, :96]
        choices = made.table * scale[:, :, None]
        near = (choices - weight[:, :, None]).abs().amin(2)
    off = (made.numbers(torch.float32) - weight).abs()
    assert (off <= near + 1e-6).all()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_are_those_of_bitsandbytes(kind: str) -> None:
    """Where rows are whole blocks of 64; elsewhere its blocks run on over the end of a row."""
    weight = normal(70, 192)
    codes, state = bitsandbytes.functional.quantize_4bit(weight, quant_type=kind)
    theirs = bitsandbytes.functional.dequantize_4bit(codes, state)
    assert torch.equal(pack(weight, packings()[kind]).packed.numbers(torch.float32), theirs)


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4", "fp4"])
def test_rows_and_groups_of_zeros_stay_zeros(kind: str) -> None:
    weight = normal(4, 128)
    weight[1] = 0
    weight[2, :64] = 0
    kept = pack(weight, packings()[kind]).packed.numbers(torch.float32)
    assert not kept[1].any()
    assert not kept[2, :64].any()
    assert kept.isfinite().all()


def test_a_layer_keeps_its_codes_in_any_dtype() -> None:
    layer = pack(normal(8, 64), packings()["nf4"])
    layer.bias = nn.Parameter(torch.randn(8))
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    layer.to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16
    assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())
    x = torch.randn(2, 3, 64, requires_grad=True)
    layer.to(torch.float32)(x).sum().backward()
    expected = layer.packed.numbers(torch.float32).sum(0).expand(2, 3, 64)
    assert x.grad is not None
    assert torch.allclose(x.grad, expected, atol=1e-5)


# ---- a model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_logits_are_those_of_what_is_kept(folder: Path, name: str) -> None:
    """Of a model whose weights are what the codes stand for, in full precision."""
    near = load(folder, CONFIGS[name])
    kept = LlavaForConditionalGeneration.from_pretrained(folder)
    for layer, made in packed(near).items():
        kept.get_submodule(layer).weight.copy_(made.packed.numbers(torch.float32))
    assert len(packed(near)) == sum(type(m) is nn.Linear for m in kept.modules()) - 1
    assert torch.allclose(near(IDS).logits, kept(IDS).logits, atol=1e-4)
    plain = LlavaForConditionalGeneration.from_pretrained(folder)
    assert not torch.allclose(near(IDS).logits, plain(IDS).logits, atol=1e-3)


@pytest.mark.parametrize("name", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.no_grad()
def test_saved_and_loaded_again(folder: Path, tmp_path: Path, name: str, dtype: str) -> None:
    first = load(folder, preset(name), dtype=dtype)
    first.save_pretrained(tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert again.dtype == first.dtype
    assert torch.equal(again(IDS).logits, first(IDS).logits)
    stored = load_file(tmp_path / "model.safetensors")
    head = stored["language_model.lm_head.codes"]
    assert head.dtype == torch.int8  # the head is in 8 bits, whatever the rest is in
    assert not any(key.endswith("mlp.up_proj.weight") for key in stored)
    again.save_pretrained(tmp_path / "twice")
    assert json.loads((tmp_path / "twice" / "config.json").read_text()) == json.loads(
        (tmp_path / "config.json").read_text()
    )
    same = load(tmp_path, preset(name))
    assert torch.equal(same(IDS).logits, first(IDS).logits)
    with pytest.raises(InvalidArgument, match=rf"were saved in {name}.*leave it out"):
        load(tmp_path, QuantoConfig(weights="int8"))


@torch.no_grad()
def test_a_tied_head_is_packed_and_embeddings_stay() -> None:
    lm = vidlm.load("demo", quantize="int8")
    model = lm.model
    assert type(model.head) is PackedLinear
    assert type(model.decoder.embed_tokens.weight) is nn.Parameter
    kept = model.head.packed.numbers(torch.float32)
    embeddings = model.decoder.embed_tokens.weight.float()
    assert float((kept - embeddings).norm() / embeddings.norm()) < 0.01


def test_answers_of_one_and_of_many(folder: Path, processor: LlavaProcessor) -> None:
    """The same whether a step has one row or several; by the stack's kernel or layer by layer."""
    for config in (QuantoConfig(), NF4):
        model = load(folder, config)
        rows = processor(text=["what happens?", "who is it"], return_tensors="pt", padding=True)
        together = model.generate(**rows, max_new_tokens=6, eos_token_id=[])
        for i in range(2):
            ids = rows["input_ids"][i][rows["attention_mask"][i].bool()][None]
            alone = model.generate(ids, max_new_tokens=6, eos_token_id=[])
            assert torch.equal(alone[0, -6:], together[i, -6:])
        model.decoder.layers[0].mlp.register_forward_hook(lambda *_: None)
        assert torch.equal(model.generate(ids, max_new_tokens=6, eos_token_id=[]), alone)


def test_names_are_skipped(folder: Path) -> None:
    assert "lm_head" not in packed(load(folder, NF4))
    assert "lm_head" in packed(load(folder, QuantoConfig(modules_to_not_convert=[])))
    names = ["lm_head", "model.vision_tower", "multi_modal_projector.linear_1"]
    for config in (
        BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=names),
        QuantoConfig(modules_to_not_convert=names),
    ):
        made = packed(load(folder, config))
        assert "model.multi_modal_projector.linear_1" not in made
        assert "model.multi_modal_projector.linear_2" in made
        assert not any(name.startswith("model.vision_tower") for name in made)
        assert any(name.startswith("model.language_model") for name in made)
    hub = ["language_model.lm_head", "language_model.model.layers.0", "vision_tower.vision_model"]
    made = packed(load(folder, QuantoConfig(modules_to_not_convert=hub)))
    assert "lm_head" not in made
    assert not any(".vision_tower." in name or "_model.layers.0." in name for name in made)
    assert "model.language_model.layers.1.mlp.up_proj" in made
    with pytest.raises(InvalidArgument, match="names 'visual', which is no part"):
        load(folder, QuantoConfig(modules_to_not_convert=["visual"]))


def test_no_weight_is_ever_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows at a time become codes, and all are read into the same memory."""
    expected = packed(load(folder, QuantoConfig()))
    most, memory, rows_seen = 2000, set(), []

    def watched(into: PackedWeight, start: int, rows: Tensor) -> None:
        assert rows.nbytes <= most
        memory.add(rows.data_ptr())
        rows_seen.append(len(rows))
        pack_rows(into, start, rows)

    monkeypatch.setattr("vidlm.weights.CHUNK", most)
    monkeypatch.setattr("vidlm.quant.swap.pack_rows", watched)
    made = packed(load(folder, QuantoConfig()))
    assert len(memory) == 1
    assert len(rows_seen) > 2 * len(made)
    assert sum(rows_seen) == sum(layer.out_features for layer in made.values())
    for name, layer in made.items():
        assert torch.equal(layer.codes, expected[name].codes)
        assert torch.equal(layer.scale, expected[name].scale)


# ---- what is refused -----------------------------------------------------------------------------


def test_bad_configurations() -> None:
    for words in ({}, {"load_in_4bit": True, "load_in_8bit": True}):
        with pytest.raises(InvalidArgument, match="set one"):
            BitsAndBytesConfig(**words)
    with pytest.raises(InvalidArgument, match="nf4, fp4"):
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="int4")
    with pytest.raises(InvalidArgument, match="bnb_4bit_compute_dtype"):
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype="half precision")
    with pytest.raises(InvalidArgument, match=r"weights='int2'.*int8, int4.*BitsAndBytesConfig"):
        QuantoConfig(weights="int2")
    with pytest.raises(InvalidArgument, match=r"activations='int8'.*leave it out"):
        QuantoConfig(activations="int8")
    with pytest.raises(InvalidArgument, match="give a list of names"):
        QuantoConfig(modules_to_not_convert="lm_head")
    with pytest.raises(InvalidArgument, match=r"'float8'.*'int8_weight_only', 'int4_weight_only'"):
        TorchAoConfig("float8")
    for group in (0, 16, 33, 100):
        with pytest.raises(InvalidArgument, match=rf"a group of {group} weights.*multiples of 32"):
            TorchAoConfig("int4_weight_only", group_size=group)
    with pytest.raises(InvalidArgument, match="one scale for each row"):
        TorchAoConfig("int8_weight_only", group_size=64)
    with pytest.raises(InvalidArgument, match=r"quantize='int3'; allowed: int8, int4, nf4"):
        vidlm.load("demo", quantize="int3")


def test_configs_of_others(folder: Path) -> None:
    import transformers

    with pytest.raises(UnsupportedModel, match=r"transformers.*from vidlm import QuantoConfig"):
        load(folder, transformers.TorchAoConfig.__new__(transformers.TorchAoConfig))
    with pytest.raises(UnsupportedModel, match=r"builtins\.dict; supported: QuantoConfig"):
        load(folder, {"load_in_4bit": True})


def test_checkpoints_of_others(folder: Path, tmp_path: Path) -> None:
    load(folder, QuantoConfig()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    def saying(told: dict[str, Any]) -> Path:
        (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": told}))
        return tmp_path

    with pytest.raises(UnsupportedModel, match=r"quantized by awq; only what vidlm saved"):
        load(saying({"quant_method": "awq", "bits": 4}), None)
    with pytest.raises(UnsupportedModel, match="this version reads quant_method, group"):
        load(saying({**config["quantization_config"], "zeros": True}), None)
    with pytest.raises(InvalidArgument, match=r"quantization 'int5'; allowed"):
        load(saying({**config["quantization_config"], "kind": "int5"}), None)
    with pytest.raises(WeightsError, match="tensors of another shape"):
        load(saying({**config["quantization_config"], "kind": "int4"}), None)
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="left over"):
        load(tmp_path, None)


def test_a_scheme_says_what_it_is() -> None:
    scheme = Scheme("nf4", 128, "int8", ("vision_tower",))
    assert Scheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme
    assert scheme.packing("model.vision_tower.layers.0.fc1") is None
    assert scheme.packing("lm_head") == packings()["int8"]
    assert scheme.packing("model.language_model.layers.0.mlp.up_proj") == packings(128)["nf4"]


# ---- bitsandbytes itself, which has the arithmetic on GPUs ---------------------------------------


@torch.no_grad()
def test_layers_of_the_library(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    name = "model.language_model.layers.1.mlp.down_proj"  # 64 columns: whole blocks of its
    weight = model.get_submodule(name).weight.clone()
    codes, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4")
    kept = bitsandbytes.functional.dequantize_4bit(codes, state)
    quantize(model, NF4, model.unquantized)
    x = torch.randn(7, weight.shape[1])
    assert torch.allclose(model.get_submodule(name)(x), x @ kept.T, atol=1e-5)
    assert type(model.head) is nn.Linear
    model.quantization_config = NF4
    with pytest.raises(UnsupportedModel, match="bitsandbytes quantized cannot be written"):
        model.save_pretrained(tmp_path)
    import vidlm.quant.bitsandbytes as library

    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(library, "import_module", missing)
    with pytest.raises(UnsupportedModel, match=r"pip install 'vidlm\[quant\]'"):
        quantize(LlavaForConditionalGeneration.from_pretrained(folder), NF4)
