"""Layers on several devices and weights that wait on the CPU, on real GPUs."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import slowfast_forms
import tiny
import video_forms
import vidlm
from vidlm import LlavaForConditionalGeneration
from vidlm.errors import UnsupportedModel
from vidlm.hf import LlavaConfig
from vidlm.nn.attention import attend_all

pytestmark = pytest.mark.gpu
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
FAMILIES = ("llava", "slow-fast", *video_forms.FORMS)
LAYERS = "model.language_model.layers"
IDS = torch.arange(20, 60)[None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny checkpoint of each family."""
    root = tmp_path_factory.mktemp("checkpoints")
    made = {name: root / name for name in FAMILIES}
    for folder in made.values():
        folder.mkdir()
    tiny.write(made["llava"])
    slowfast_forms.write(made["slow-fast"])
    for name, form in video_forms.FORMS.items():
        form.write(made[name])
    return made


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 layers of 21 MB in 16 bits each: so large that it is seen where they are."""
    text = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 8}
    text |= {"num_attention_heads": 16, "num_key_value_heads": 16}
    form = tiny.FORMS["clip-llama"]
    given = form.config
    config = LlavaConfig.from_dict({**given, "text_config": {**given["text_config"], **text}})
    model = LlavaForConditionalGeneration(config)
    tiny.randomise(model)
    model.to(torch.bfloat16)
    folder = tmp_path_factory.mktemp("wide")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """float32 products in float32, or tokens differ for another reason."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    yield
    gc.collect()
    torch.cuda.empty_cache()


def load(folder: Path, device: Any) -> vidlm.LM:
    """With a chat template, which these tiny checkpoints have none of."""
    lm = vidlm.load(folder, dtype="float32", device=device)
    token = lm.processor.video_token or lm.processor.image_token
    place = "{% if part['type'] != 'text' %}" + token + "{% else %}{{ part['text'] }}{% endif %}"
    each = "{% for part in message['content'] %}" + place + "{% endfor %}"
    lm.processor.chat_template = "{% for message in messages %}" + each + "{% endfor %} answer:"
    return lm


def answers(lm: vidlm.LM) -> list[str]:
    clip = video_forms.clip(1, frames=8)
    return [lm.ask(clip, q, max_tokens=12).text for q in ("what happens?", "what then?")]


def layer_names(lm: vidlm.LM) -> list[str]:
    names = {id(module): name for name, module in lm.model.named_modules()}
    return [names[id(layer)] for layer in lm.model.decoder.layers]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_waits_on_the_cpu(folders: dict[str, Path], family: str) -> None:
    plain = load(folders[family], "cpu")
    lm = load(folders[family], {"": 0, layer_names(plain)[-1]: "cpu"})
    assert lm.model.decoder.layers[-1].mlp.up_proj.weight.is_cpu
    assert {device.type for device in lm.model.layer_devices} == {"cuda"}
    assert answers(lm) == answers(plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_on_the_cpu_and_on_a_gpu(folders: dict[str, Path], family: str) -> None:
    """Two devices, of which every machine with a GPU has two."""
    plain = load(folders[family], "cpu")
    lm = load(folders[family], {"": "cpu", layer_names(plain)[-1]: 0})
    assert [device.type for device in lm.model.layer_devices[-2:]] == ["cpu", "cuda"]
    assert answers(lm) == answers(plain)


@two_gpus
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_on_two_gpus(folders: dict[str, Path], family: str) -> None:
    plain = load(folders[family], "cpu")
    lm = load(folders[family], {"": 0, layer_names(plain)[-1]: 1})
    assert [device.index for device in lm.model.layer_devices[-2:]] == [0, 1]
    assert answers(lm) == answers(plain)


@two_gpus
@pytest.mark.parametrize("how", ["auto", "balanced", "balanced_low_0", "sequential"])
def test_strategies_on_two_gpus(wide: Path, how: str) -> None:
    whole = LlavaForConditionalGeneration.from_pretrained(wide, device_map="cuda:0")
    expected = whole.generate(IDS, max_new_tokens=8, min_new_tokens=8)
    memory = {0: "100MB", 1: "150MB"}
    kind = LlavaForConditionalGeneration
    model = kind.from_pretrained(wide, device_map=how, max_memory=memory)
    assert {device.index for device in model.layer_devices} == {0, 1}
    found = model.generate(IDS, max_new_tokens=8, min_new_tokens=8)
    assert found.tolist() == expected.tolist()


def test_memory_of_what_waits(wide: Path) -> None:
    """The weights of one layer at a time, and the answers of a model that is all on the GPU."""
    kind = LlavaForConditionalGeneration
    whole = kind.from_pretrained(wide, device_map="cuda:0")
    layer = sum(p.nbytes for p in whole.decoder.layers[0].parameters())
    total = sum(p.nbytes for p in whole.parameters())
    expected = whole.generate(IDS, max_new_tokens=8, min_new_tokens=8)
    del whole
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(0)
    room = {0: total - 6 * layer, "cpu": total}
    model = kind.from_pretrained(wide, device_map="auto", max_memory=room)
    assert len(model.placement.waiting) == 7
    assert torch.cuda.memory_allocated(0) - before < total - 6 * layer
    torch.cuda.reset_peak_memory_stats(0)
    found = model.generate(IDS, max_new_tokens=8, min_new_tokens=8)
    assert found.tolist() == expected.tolist()
    assert torch.cuda.max_memory_allocated(0) - before < total - 4 * layer


def test_flash_attention_is_torchs_own(wide: Path) -> None:
    """What attn_implementation="flash_attention_2" stands for: the kernel is there for 16 bits."""
    q = torch.randn(2, 64, 4, 32, device="cuda", dtype=torch.bfloat16)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # it alone: an error where it cannot
        assert attend_all(q, q, q).shape == q.shape
    kind, how = LlavaForConditionalGeneration, {"attn_implementation": "flash_attention_2"}
    model = kind.from_pretrained(wide, device_map="cuda", **how)
    assert model.generate(IDS, max_new_tokens=3, min_new_tokens=3).shape == (1, 43)
    with pytest.raises(UnsupportedModel, match="for float16 and bfloat16"):
        kind.from_pretrained(wide, device_map="cuda", dtype="float32", **how)
