"""Folders that are no checkpoint of ours say what they are, whoever reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
import vidlm
from vidlm import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from vidlm.errors import ModelError, UnsupportedModel
from vidlm.hf import LlavaForConditionalGeneration, LlavaProcessor
from vidlm.hub import read_config

READERS: dict[str, Callable[[Path], Any]] = {
    "load": lambda folder: vidlm.load(str(folder)),
    "AutoModel": AutoModelForImageTextToText.from_pretrained,
    "AutoConfig": AutoConfig.from_pretrained,
    "AutoProcessor": AutoProcessor.from_pretrained,
    "a model": LlavaForConditionalGeneration.from_pretrained,
    "a processor": LlavaProcessor.from_pretrained,
}
LORA = {"base_model_name_or_path": "llava-hf/llava-1.5-7b-hf", "peft_type": "LORA"}
LLAVA = {"model_type": "llava", "mm_vision_tower": "openai/clip", "hidden_size": 4096}


def folder_of(tmp_path: Path, **files: Any) -> Path:
    for name, content in files.items():
        (tmp_path / name.replace("__", ".")).write_text(json.dumps(content))
    return tmp_path


@pytest.mark.parametrize("reader", list(READERS))
def test_an_adapter_names_its_base(tmp_path: Path, reader: str) -> None:
    folder = folder_of(tmp_path, adapter_config__json=LORA, adapter_model__safetensors={})
    with pytest.raises(UnsupportedModel) as caught:
        READERS[reader](folder)
    said = str(caught.value)
    assert "is a LORA adapter" in said
    assert "its base is 'llava-hf/llava-1.5-7b-hf'" in said
    assert f"from_pretrained('llava-hf/llava-1.5-7b-hf'), {str(folder)!r})" in said
    assert "merge_and_unload()" in said


def test_adapters_of_other_forms(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, adapter_config__json={"base_model_name_or_path": None})
    with pytest.raises(UnsupportedModel, match=r"PEFT adapter.*the model it was trained on"):
        read_config(folder)
    (folder / "adapter_config.json").write_text("[")
    with pytest.raises(UnsupportedModel, match="PEFT adapter"):
        read_config(folder)
    folder_of(tmp_path, config__json={"model_type": "llava"}, adapter_config__json=LORA)
    with pytest.raises(UnsupportedModel, match="is a LORA adapter"):  # the config is its base's
        AutoModelForImageTextToText.from_pretrained(folder)


def test_a_checkpoint_with_an_adapter_beside_it_loads(tmp_path: Path) -> None:
    folder = folder_of(tiny.write(tmp_path), adapter_config__json=LORA)
    assert AutoModelForImageTextToText.from_pretrained(folder).config.model_type == "llava"


ORIGINALS: dict[str, tuple[dict[str, Any], str]] = {
    "LLaVA-1.5": (LLAVA, "llava-hf/llava-1.5-7b-hf"),
    "LLaVA-1.5-13B": ({**LLAVA, "hidden_size": 5120}, "llava-hf/llava-1.5-13b-hf"),
    "its other name": ({**LLAVA, "model_type": "llava_llama"}, "llava-hf/llava-1.5-7b-hf"),
    "LLaVA-1.6": (
        {**LLAVA, "image_grid_pinpoints": [[336, 672]]},
        r"\(1.6\).*llava-hf/LLaVA-NeXT-Video-7B-hf",
    ),
    "Video-LLaVA": (
        {"model_type": "llava", "mm_image_tower": "x", "mm_video_tower": "y"},
        "LanguageBind/Video-LLaVA-7B-hf",
    ),
    "NeXT-Video": (
        {**LLAVA, "model_type": "llava_llama", "mm_resampler_type": "spatial_pool"},
        "llava-hf/LLaVA-NeXT-Video-7B-hf",
    ),
    "interleave": (
        {**LLAVA, "model_type": "llava_qwen", "hidden_size": 1024},
        "llava-hf/llava-interleave-qwen-0.5b-hf",
    ),
}


@pytest.mark.parametrize("reader", list(READERS))
@pytest.mark.parametrize("name", list(ORIGINALS))
def test_original_layouts_name_the_conversion(tmp_path: Path, name: str, reader: str) -> None:
    config, repository = ORIGINALS[name]
    folder = folder_of(tmp_path, config__json=config, tokenizer_config__json={})
    with pytest.raises(UnsupportedModel, match=rf"LLaVA research code.*{repository}"):
        READERS[reader](folder)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"model-Q4_K_M__gguf": 0}, "a GGUF file of llama.cpp \\(model-Q4_K_M.gguf\\)"),
        ({"model_index__json": {}}, "a pipeline of diffusers"),
        ({"params__json": {}}, "in their authors' layout"),
        ({"model__onnx": 0}, "an ONNX export"),
        ({"config__json": {"model_type": "llava", "quantization": {"bits": 4}}}, "by MLX"),
        ({"other__txt": 0}, "no config.json, so it is not a checkpoint; pass the folder"),
    ],
)
def test_other_folders(tmp_path: Path, files: dict[str, Any], said: str) -> None:
    folder = folder_of(tmp_path, **files)
    for name in ("load", "AutoModel", "AutoConfig", "a model"):
        with pytest.raises(ModelError, match=said):
            READERS[name](folder)


def test_a_trainers_folder_names_the_checkpoint_inside(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-500").mkdir()
    (tmp_path / "checkpoint-500" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="its subfolder checkpoint-500 has one, pass that"):
        read_config(tmp_path)
