"""The LLaVA network against transformers: from checkpoints to features, states and logits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import oracle
import tiny
from oracle import Reference, difference
from vidlm import AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration
from vidlm.nn.decoder import DecoderConfig
from vidlm.vision.vit import ViTConfig

NEAR = 1e-4  # relative to the largest value, in float32


@dataclass(frozen=True)
class Case:
    """One checkpoint, read by both."""

    theirs: Reference
    ours: LlavaForConditionalGeneration

    def inputs(self, *texts: str, **how: Any) -> dict[str, Tensor]:
        """A batch by the oracle's processor, with as many pictures as the texts name."""
        images = tiny.pictures(sum(text.count("<image>") for text in texts)) or None
        options = {"padding": len(texts) > 1, "return_tensors": "pt", **how}
        return dict(self.theirs.processor(images=images, text=list(texts), **options))


@pytest.fixture(scope="module", params=list(tiny.FORMS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    theirs = Reference.make(folder, request.param)
    return Case(theirs, LlavaForConditionalGeneration.from_pretrained(folder))


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# ---- the forward pass --------------------------------------------------------------------------

PROMPTS = {
    "text": "what happens?",
    "one image": "<image>\nwhat happens?",
    "three images": "<image>what<image> happens <image>",
}


@pytest.mark.parametrize("prompt", list(PROMPTS))
def test_logits_and_hidden_states(case: Case, prompt: str) -> None:
    inputs = case.inputs(PROMPTS[prompt])
    ours = case.ours(**inputs, output_hidden_states=True)
    theirs = case.theirs.model(**inputs, output_hidden_states=True)
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 3
    for mine, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert difference(mine, other) < NEAR
    assert difference(ours.logits, theirs.logits) < NEAR


def test_image_features(case: Case) -> None:
    pixels = case.inputs("<image><image>")["pixel_values"]
    ours = case.ours.get_image_features(pixels)
    theirs = case.theirs.model.get_image_features(pixels).pooler_output
    assert len(ours) == len(theirs) == 2
    for mine, other in zip(ours, theirs, strict=True):
        assert len(mine) == tiny.FRAME_TOKENS
        assert difference(mine, other) < NEAR


def test_more_images_than_are_encoded_at_a_time(case: Case) -> None:
    inputs = case.inputs("<image>" * 11)
    ours, theirs = case.ours(**inputs), case.theirs.model(**inputs)
    assert difference(ours.image_hidden_states, theirs.image_hidden_states) < NEAR
    assert difference(ours.logits, theirs.logits) < NEAR


def test_loss(case: Case) -> None:
    inputs = case.inputs("<image> what happens?", "the ball moves <image> to the right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[labels == tiny.IMAGE] = -100
    labels[0, 20] = -100
    ours = case.ours(**inputs, labels=labels)
    theirs = case.theirs.model(**inputs, labels=labels)
    assert float(ours.loss) == pytest.approx(float(theirs.loss), rel=1e-5)
    assert ours["loss"] is ours[0]
    assert ours.to_tuple()[1] is ours.logits


def test_the_last_columns_alone(case: Case) -> None:
    inputs = case.inputs("<image> what happens?")
    ours = case.ours(**inputs, logits_to_keep=3).logits
    assert ours.shape[1] == 3
    assert difference(ours, case.theirs.model(**inputs, logits_to_keep=3).logits) < NEAR


def test_embeddings_and_positions_of_ones_own(case: Case) -> None:
    ids = case.inputs("what happens in the video?")["input_ids"]
    places = torch.arange(ids.shape[1])[None] * 3 + 5
    given = {"inputs_embeds": case.ours.get_input_embeddings()(ids), "position_ids": places}
    ours, theirs = case.ours(**given).logits, case.theirs.model(**given).logits
    assert difference(ours, theirs) < NEAR
    assert difference(case.ours(input_ids=ids).logits, theirs) > 0.01


# ---- padded batches ----------------------------------------------------------------------------

ROWS = ("<image> what?", "the red ball moves <image><image> to the left", "what happens?")


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch(case: Case, side: str) -> None:
    batch = case.inputs(*ROWS, padding_side=side)
    real = batch["attention_mask"].bool()
    assert not real.all()
    ours = case.ours(**batch).logits
    assert difference(ours[real], case.theirs.model(**batch).logits[real]) < NEAR
    images = batch.pop("pixel_values")
    for row, (first, last) in enumerate([(0, 1), (1, 3), (3, 3)]):
        ids = batch["input_ids"][row : row + 1, real[row]]
        pixels = images[first:last] if last > first else None
        alone = case.ours(input_ids=ids, pixel_values=pixels).logits[0]
        assert difference(ours[row, real[row]], alone) < NEAR


# ---- spellings of one checkpoint ---------------------------------------------------------------


def logits(folder: Path, inputs: dict[str, Tensor], **kwargs: Any) -> Tensor:
    model = AutoModelForImageTextToText.from_pretrained(folder, **kwargs)
    assert isinstance(model, LlavaForConditionalGeneration)
    return model(**inputs).logits


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("layout", list(oracle.LAYOUTS))
def test_every_layout_of_the_weights(case: Case, layout: str, shards: int, tmp_path: Path) -> None:
    folder = shutil.copytree(case.theirs.folder, tmp_path / "copy")
    oracle.store(folder, oracle.relayout(folder, layout), shards)
    inputs = case.inputs(PROMPTS["three images"])
    ours = logits(folder, inputs)
    assert difference(ours, case.theirs.model(**inputs).logits) < NEAR
    assert torch.equal(ours, case.ours(**inputs).logits)


# What other versions write into config.json; each must give the model that it was.
SPELLINGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "as published in 4.43": (
        {
            "torch_dtype": "float32",
            "text_config.torch_dtype": "bfloat16",
            "text_config.rope_theta": 10000.0,
            "text_config._name_or_path": "Qwen/Qwen1.5-0.5B-Chat",
            "text_config.max_window_layers": 21,
            "text_config.use_sliding_window": False,
            "ignore_index": -100,
            "transformers_version": "4.43.0.dev0",
        },
        (
            *("dtype", "tie_word_embeddings", "image_seq_length", "multimodal_projector_bias"),
            *("text_config.rope_parameters", "text_config.hidden_act", "text_config.use_cache"),
            *("text_config.attention_dropout", "text_config.initializer_range"),
            *("text_config.layer_types", "text_config.dtype"),
            *("vision_config.num_channels", "vision_config.attention_dropout"),
        ),
    ),
    "no dtype": ({}, ("dtype", "text_config.dtype", "vision_config.dtype")),
    "id for index": ({"image_token_id": tiny.IMAGE}, ("image_token_index",)),
    "nulls": ({"text_config.rope_scaling": None, "text_config.sliding_window": None}, ()),
}


@pytest.mark.parametrize("spelling", list(SPELLINGS))
def test_every_spelling_of_the_config(case: Case, spelling: str, tmp_path: Path) -> None:
    folder = shutil.copytree(case.theirs.folder, tmp_path / "copy")
    change, drop = SPELLINGS[spelling]
    tiny.edit_json(folder / "config.json", change, *drop)
    inputs = case.inputs(PROMPTS["one image"])
    expected = oracle.load(folder)(**inputs).logits
    assert torch.equal(expected, case.theirs.model(**inputs).logits)
    assert difference(logits(folder, inputs), expected) < NEAR
    config = LlavaConfig.from_dict(json.loads((folder / "config.json").read_text()))
    assert config.text_config == case.ours.config.text_config


LINEAR = (
    {"text_config.rope_scaling": {"type": "linear", "factor": 2.5}},
    {"text_config.rope_scaling": {"rope_type": "linear", "factor": 2.5}},
    {"text_config.rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 5000.0}},
)


@pytest.mark.parametrize("change", LINEAR)
def test_linear_position_scaling(case: Case, change: dict[str, Any], tmp_path: Path) -> None:
    folder = shutil.copytree(case.theirs.folder, tmp_path / "copy")
    tiny.edit_json(folder / "config.json", change, "text_config.rope_parameters")
    tiny.edit_json(folder / "config.json", change)
    inputs = case.inputs(PROMPTS["one image"])
    expected = oracle.load(folder)(**inputs).logits
    assert difference(expected, case.theirs.model(**inputs).logits) > 0.01
    assert difference(logits(folder, inputs), expected) < NEAR
    again = LlavaForConditionalGeneration.from_pretrained(folder)
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(oracle.load(tmp_path / "again")(**inputs).logits, expected)


# ---- saving ------------------------------------------------------------------------------------


def test_what_is_saved_is_read_by_both(case: Case, tmp_path: Path) -> None:
    inputs = case.inputs(PROMPTS["three images"])
    before = case.ours(**inputs).logits
    case.ours.save_pretrained(tmp_path)
    theirs = oracle.load(tmp_path, dtype="auto")
    assert theirs.dtype == torch.float32
    assert torch.equal(theirs(**inputs).logits, case.theirs.model(**inputs).logits)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again(**inputs).logits, before)
    assert again.config == LlavaConfig.from_dict({**again.config.to_dict(), "dtype": "float32"})
    assert again.generation_config == case.ours.generation_config
    shared = again.lm_head.weight is again.get_input_embeddings().weight
    assert shared == case.theirs.form.text.get("tie_word_embeddings", False)


def test_bfloat16(case: Case, tmp_path: Path) -> None:
    inputs = case.inputs(PROMPTS["one image"])
    exact = case.ours(**inputs).logits
    ours = LlavaForConditionalGeneration.from_pretrained(case.theirs.folder, dtype="bfloat16")
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    theirs = oracle.load(case.theirs.folder, dtype=torch.bfloat16)(**inputs).logits
    mine = ours(**inputs).logits
    assert mine.dtype == torch.bfloat16
    # Rounding puts both this far from float32; neither may be further away than the other.
    assert difference(theirs.float(), exact) < 0.1
    assert difference(mine.float(), exact) < 0.1
    assert difference(mine.float(), theirs.float()) < 0.05
    ours.save_pretrained(tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    assert torch.equal(again(**inputs).logits, mine)
    assert torch.equal(oracle.load(tmp_path, dtype="auto")(**inputs).logits, theirs)


# ---- what an absent key means ------------------------------------------------------------------

NOT_THE_CLASSES = {"rope_theta", "rope_factor", "qkv_bias", "head_dim", "class_token"}


def agree(ours: Any, theirs: Any) -> None:
    names = set(type(ours).__dataclass_fields__) - NOT_THE_CLASSES
    assert {n: getattr(ours, n) for n in names} == {n: getattr(theirs, n) for n in names}


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_defaults_of_text_configs(kind: str) -> None:
    theirs = oracle.transformers.AutoConfig.for_model(kind)
    given = {"sliding_window": None} if kind == "mistral" else {}
    ours = DecoderConfig.from_dict({"model_type": kind, **given})
    agree(ours, theirs)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.head_dim == theirs.hidden_size // theirs.num_attention_heads


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("given", [{}, {"num_key_value_heads": None}, {"num_key_value_heads": 4}])
def test_key_heads_left_out(kind: str, given: dict[str, Any]) -> None:
    values = {"model_type": kind, "num_attention_heads": 64, **given}
    theirs = oracle.transformers.AutoConfig.for_model(**values)
    assert DecoderConfig.from_dict(values).num_key_value_heads == theirs.num_key_value_heads


@pytest.mark.parametrize("kind", ["clip_vision_model", "siglip_vision_model"])
def test_defaults_of_vision_configs(kind: str) -> None:
    agree(ViTConfig.from_dict({"model_type": kind}), oracle.transformers.AutoConfig.for_model(kind))


@pytest.mark.parametrize("given", [{}, {"vision_config": {}}, {"text_config": {}}])
def test_defaults_of_the_whole(given: dict[str, Any]) -> None:
    ours, theirs = LlavaConfig.from_dict(given), oracle.transformers.LlavaConfig(**given)
    agree(ours.text_config, theirs.text_config)
    agree(ours.vision_config, theirs.vision_config)
    for name in ("image_token_index", "projector_hidden_act", "multimodal_projector_bias"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.vision_feature_layer == theirs.vision_feature_layer
    assert ours.vision_feature_select_strategy == theirs.vision_feature_select_strategy


def test_the_published_config(shared: Path) -> None:
    raw = json.loads((shared / "data/hub_like/interleave/config.json").read_text())
    ours, theirs = LlavaConfig.from_dict(raw), oracle.transformers.LlavaConfig(**raw)
    agree(ours.text_config, theirs.text_config)
    agree(ours.vision_config, theirs.vision_config)
    assert ours.text_config.rope_theta == theirs.text_config.rope_parameters["rope_theta"]
    assert ours.text_config.tie_word_embeddings
    assert ours.tokens_per_frame() == 729
    assert (ours.feature_layers, ours.image_token_id) == ((-1,), 151646)
