"""Loading, saving, forward and the tensors between, under the names that transformers has."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from house import ROOT
from vidlm import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BatchFeature,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from vidlm.errors import (
    InvalidArgument,
    ModelNotFound,
    UnsupportedModel,
    WeightsError,
)
from vidlm.hf.loading import find, read_load_options
from vidlm.hf.pack import mask_of, share, unpack

# ---- from_pretrained ----------------------------------------------------------------------------


@pytest.mark.parametrize("given", [torch.float16, "float16", "torch.float16"])
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_dtypes(name: str, given: Any) -> None:
    assert read_load_options({name: given}).dtype == torch.float16


def test_nothing_given() -> None:
    options = read_load_options({"dtype": None, "device_map": None, "revision": None})
    assert (options.dtype, options.revision) == ("auto", None)
    assert options.device_map.devices == [torch.device("cpu")]


@pytest.mark.parametrize("given", ["cpu", {"": "cpu"}, torch.device("cpu")])
def test_devices(given: Any) -> None:
    assert read_load_options({"device_map": given}).device_map.how == {"": torch.device("cpu")}


def test_the_best_device() -> None:
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert read_load_options({"device_map": "auto"}).device_map.devices[0].type == expected


@pytest.mark.parametrize(
    ("kwargs", "kind", "said"),
    [
        ({"dytpe": "float16"}, TypeError, "did you mean 'dtype'"),
        ({"local_file_only": True}, TypeError, "did you mean 'local_files_only'"),
        ({"dtype": "float17"}, InvalidArgument, "allowed: auto, float32, bfloat16, float16"),
        ({"dtype": torch.int8}, InvalidArgument, "allowed: auto, float32"),
        ({"dtype": "int8"}, InvalidArgument, "allowed: auto, float32"),
        ({"device_map": "gpu"}, InvalidArgument, "allowed: 'auto', 'cpu', 'cuda'"),
        ({"quantization_config": object()}, UnsupportedModel, "quantization_config"),
        ({"attn_implementation": "magic"}, UnsupportedModel, "allowed: sdpa, eager"),
        ({"use_safetensors": False}, UnsupportedModel, "never pickle"),
    ],
)
def test_bad_keywords(kwargs: dict[str, Any], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        read_load_options(kwargs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(InvalidArgument, match="torch sees no GPU"):
        read_load_options({"device_map": "cuda"})


def test_keywords_that_change_nothing(folder: Path) -> None:
    kwargs = {"trust_remote_code": True, "low_cpu_mem_usage": True, "attn_implementation": "sdpa"}
    LlavaForConditionalGeneration.from_pretrained(folder, **kwargs, use_safetensors=True)
    AutoProcessor.from_pretrained(folder, use_fast=True, trust_remote_code=True)


def test_the_config_decides_the_dtype(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    for named, expected in (("bfloat16", torch.bfloat16), (None, torch.float32)):
        tiny.edit_json(copy / "config.json", {"dtype": named, "torch_dtype": named})
        assert LlavaForConditionalGeneration.from_pretrained(copy).dtype == expected
        auto = LlavaForConditionalGeneration.from_pretrained(copy, torch_dtype="auto")
        assert auto.dtype == expected


def test_loading_leaves_the_compiler_alone(folder: Path) -> None:
    """torch imports it, for a second and 80 MB, to initialise an embedding on the meta device."""
    code = f"import sys, vidlm; vidlm.load({str(folder)!r}); print('torch._dynamo' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-c", code]
    assert subprocess.check_output(command, env=environment, text=True) == "False\n"


def test_auto_classes_find_the_family(folder: Path) -> None:
    assert isinstance(AutoConfig.from_pretrained(folder), LlavaConfig)
    assert isinstance(AutoProcessor.from_pretrained(str(folder)), LlavaProcessor)
    found = AutoModelForImageTextToText.from_pretrained(folder, dtype="bfloat16")
    assert isinstance(found, LlavaForConditionalGeneration)
    assert (found.dtype, found.training) == (torch.bfloat16, False)


def test_other_families_are_named(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    tiny.edit_json(copy / "config.json", {"model_type": "llava_of_tomorrow"})
    for auto in (AutoConfig, AutoProcessor, AutoModelForImageTextToText):
        with pytest.raises(UnsupportedModel, match=r"'llava_of_tomorrow'.*known: llava"):
            auto.from_pretrained(copy)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"text_config.model_type": "gpt2"}, "'gpt2' is not supported; known: llama, mistral"),
        ({"vision_config.model_type": "dino"}, "'dino' is not supported; known: clip"),
        ({"text_config.attention_bias": True}, "attention_bias"),
        ({"text_config.rope_parameters": {"rope_type": "yarn"}}, "'yarn' is not supported"),
        ({"text_config.hidden_act": "swish2"}, "'swish2'.*known: gelu"),
        ({"text_config.use_sliding_window": True, "text_config.sliding_window": 9}, "=9 below"),
        ({"text_config.num_key_value_heads": 3}, "must be a multiple of"),
        ({"vision_config.num_channels": 4}, "num_channels=4"),
        ({"vision_feature_select_strategy": "best"}, "allowed: 'default'.*'full'"),
    ],
)
def test_unsupported_configs(
    folder: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    tiny.edit_json(copy / "config.json", change)
    with pytest.raises(UnsupportedModel, match=said):
        LlavaForConditionalGeneration.from_pretrained(copy)


def test_weights_of_another_config(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    tiny.edit_json(copy / "config.json", {"text_config.num_hidden_layers": 3})
    with pytest.raises(WeightsError, match=r"12 tensors missing: model\.language_model\.layers\.2"):
        LlavaForConditionalGeneration.from_pretrained(copy)


def test_no_such_model() -> None:
    for auto in (AutoConfig, AutoProcessor, AutoModelForImageTextToText):
        with pytest.raises(ModelNotFound, match="--model demo"):
            auto.from_pretrained("nowhere")
    assert (find("demo") / "chat_template.jinja").is_file()


def test_random_weights_from_a_config(folder: Path) -> None:
    made = LlavaForConditionalGeneration(AutoConfig.from_pretrained(folder))
    assert made.folder is None
    assert made.generation_config == {"eos_token_id": tiny.EOS, "pad_token_id": tiny.PAD}
    with pytest.raises(InvalidArgument, match="stop strings need the tokenizer"):
        made.generate(torch.tensor([[5, 6]]), stop_strings="x")


def test_what_is_saved(model: LlavaForConditionalGeneration, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "new" / "folder")
    config = json.loads((tmp_path / "new/folder/config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert (config["model_type"], config["dtype"], config["torch_dtype"]) == (
        "llava",
        "float32",
        "float32",
    )
    assert json.loads((tmp_path / "new/folder/generation_config.json").read_text()) == {
        "eos_token_id": tiny.EOS,
        "pad_token_id": tiny.PAD,
    }


# ---- generate and forward: what does not fit ----------------------------------------------------


def inputs(processor: LlavaProcessor, *texts: str) -> dict[str, Any]:
    images = tiny.pictures(sum(text.count("<image>") for text in texts)) or None
    return dict(processor(images, list(texts), padding=len(texts) > 1, return_tensors="pt"))


def test_generate_warns_of_what_the_context_does_not_hold(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fits = inputs(processor, "<image>" * 31 + " why?")
    model.generate(**fits, max_new_tokens=1)
    assert not caplog.messages
    beyond = inputs(processor, "<image>" * 40 + " why?")
    long = model.generate(**beyond, max_new_tokens=3, eos_token_id=[])
    assert long.shape[1] == beyond["input_ids"].shape[1] + 3
    assert "the model was trained with 512" in caplog.text
    ids = torch.full((1, 505), 5)
    assert model.generate(ids, max_new_tokens=10, eos_token_id=[]).shape[1] == 515


def test_images_and_prompts_that_disagree(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    good = inputs(processor, "<image> a", "<image><image> b")
    for pixels in (good["pixel_values"][:2], torch.cat([good["pixel_values"]] * 2)):
        bad = {**good, "pixel_values": pixels}
        with pytest.raises(InvalidArgument, match="image"):
            model.generate(**bad)
        with pytest.raises(InvalidArgument, match="48 image placeholder tokens and the images"):
            model(**bad)
    cut = {**good, "input_ids": good["input_ids"][:, :9], "attention_mask": None}
    with pytest.raises(InvalidArgument, match="row 0 has 9 image placeholder tokens"):
        model.generate(**cut)


def test_bad_tensors(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
    good = inputs(processor, "<image> a")
    ids = good["input_ids"]
    with pytest.raises(InvalidArgument, match="exactly one of input_ids and inputs_embeds"):
        model()
    embeds = model.get_input_embeddings()(ids)
    with pytest.raises(InvalidArgument, match="exactly one of"):
        model(ids, inputs_embeds=embeds)
    with pytest.raises(InvalidArgument, match="0 image placeholder tokens"):
        model(inputs_embeds=embeds + 1, pixel_values=good["pixel_values"])
    with pytest.raises(InvalidArgument, match=r"\(1, 3\) for tokens of shape"):
        model(ids, attention_mask=torch.ones(1, 3))
    with pytest.raises(InvalidArgument, match="hides a whole row"):
        model(ids, attention_mask=torch.zeros_like(ids))
    with pytest.raises(InvalidArgument, match=r"takes \(F, 3, 28, 28\)"):
        model(ids, pixel_values=torch.zeros(1, 3, 14, 28))
    with pytest.raises(InvalidArgument, match="logits_to_keep must be 0"):
        model(**good, labels=ids, logits_to_keep=2)


# ---- packing ------------------------------------------------------------------------------------


@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4), left=st.booleans())
def test_unpack_undoes_a_mask(lengths: list[int], left: bool) -> None:
    wide = max(lengths)
    at = torch.arange(wide)
    mask = torch.stack([at >= wide - n if left else at < n for n in lengths])
    packed = torch.randn(sum(lengths), 2)
    rows = unpack(packed, mask)
    assert torch.equal(rows[mask], packed)
    assert not rows[~mask].any()
    assert torch.equal(mask_of(mask.long(), None, mask.long()), mask)


@given(st.lists(st.lists(st.integers(1, 4), max_size=3), min_size=1, max_size=4))
def test_share_gives_each_row_its_items(rows: list[list[int]]) -> None:
    items = [item for row in rows for item in row]
    assert share([sum(row) for row in rows], items) == [len(row) for row in rows]
    with pytest.raises(InvalidArgument, match="images were given"):
        share([sum(row) for row in rows], [*items, 1])


# ---- BatchFeature -------------------------------------------------------------------------------


def test_entries_are_attributes() -> None:
    batch = BatchFeature({"input_ids": torch.tensor([[1]]), "note": "text"})
    assert batch.input_ids is batch["input_ids"]
    assert dict(**batch) == dict(batch.items())
    assert not hasattr(batch, "pixel_values")
    assert batch.to(torch.float16, device="cpu")["note"] == "text"
    with pytest.raises(InvalidArgument, match="copy"):
        batch.to("cpu", copy=True)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("silenced", "shown"), [("", True), ("1", False), ("true", False)])
def test_the_bar_of_a_long_load(
    monkeypatch: pytest.MonkeyPatch, folder: Path, silenced: str, shown: bool
) -> None:
    monkeypatch.setattr("vidlm.hf.loading.PATIENCE", 0.0)
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", silenced)
    LlavaForConditionalGeneration.from_pretrained(folder)
    assert ("█" in screen.getvalue()) == shown
    assert screen.getvalue().endswith("GB\n") == shown
