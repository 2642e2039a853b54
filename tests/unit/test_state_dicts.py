"""A model's weights through safetensors' and torch's own functions, by the names in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_model, save_model

import tiny
from vidlm.hf import LlavaConfig, LlavaForConditionalGeneration

IDS = torch.tensor([[20, 21, 22, 23]])


def make(name: str, seed: int = tiny.SEED) -> LlavaForConditionalGeneration:
    """A model with random weights, of which the first form has a tied head."""
    model = LlavaForConditionalGeneration(LlavaConfig.from_dict(tiny.FORMS[name].config)).eval()
    tiny.randomise(model, seed)
    return model


@pytest.mark.parametrize("name", ["siglip-qwen2-tied", "siglip-qwen2"])
@torch.no_grad()
def test_save_model_and_load_model(tmp_path: Path, name: str) -> None:
    model, other = make(name), make(name, 9)
    expected = model(IDS).logits
    assert not torch.equal(other(IDS).logits, expected)
    save_model(model, str(tmp_path / "model.safetensors"))
    assert load_model(other, str(tmp_path / "model.safetensors")) == (set(), [])
    assert torch.equal(other(IDS).logits, expected)
    # Beside a config.json the same file is a checkpoint.
    make(name, 9).save_pretrained(tmp_path / "folder")
    save_model(model, str(tmp_path / "folder" / "model.safetensors"))
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "folder")
    assert torch.equal(again(IDS).logits, expected)


@torch.no_grad()
def test_a_state_dict_of_the_hubs_names_is_read() -> None:
    model, other = make("siglip-qwen2"), make("siglip-qwen2", 9)
    hub = {model.renames().published(name): w for name, w in model.state_dict().items()}
    assert "language_model.model.embed_tokens.weight" in hub
    assert other.load_state_dict(hub) == ([], [])
    assert torch.equal(other(IDS).logits, model(IDS).logits)


def test_parts_are_found_on_the_whole_model() -> None:
    """transformers had them there until release 5; what is put there counts."""
    model = make("siglip-qwen2")
    for name in ("multi_modal_projector", "vision_tower", "language_model"):
        assert getattr(model, name) is getattr(model.model, name)
        assert list(dict(model.named_children())) == ["model", "lm_head"]
    with pytest.raises(AttributeError, match="no_such_part"):
        _ = model.no_such_part
    before = model(IDS).logits
    model.language_model = make("siglip-qwen2", 9).language_model
    assert model.language_model is model.model.language_model
    assert not torch.equal(model(IDS).logits, before)
