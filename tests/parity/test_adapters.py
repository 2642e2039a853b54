"""PEFT's adapters: made on transformers' models and read by vidlm's, and the other way round."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import oracle
import tiny
import video_forms
import vidlm
from oracle import transformers
from vidlm import AutoModelForImageTextToText
from vidlm.errors import InvalidArgument, UnsupportedModel

import peft  # isort: skip  # after oracle, which makes torchvision importable without a GPU

IDS = torch.tensor([[40, 41, 42, 43, 44, 45]])
FAMILIES = ("siglip-qwen2", "next-vicuna", "video-llava", "videollama3")
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every name in it
# From present names of modules to those of transformers before 4.52, which the hub's files have.
OLDER = (
    (r"model\.language_model\.", "language_model.model."),
    (r"model\.(\w+)_tower\.", r"\1_tower.vision_model."),
    (r"model\.multi_modal_projector\.", "multi_modal_projector."),
)

# What PEFT and transformers say of each other, and of a head whose weights an adapter carries.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers.:UserWarning"),
]


class Pair:
    """A checkpoint's folder, and how either library reads it: afresh, as adapters change models."""

    def __init__(self, folder: Path, kind: Any) -> None:
        self.folder, self.kind = folder, kind

    def theirs(self) -> Any:
        return self.kind.from_pretrained(self.folder, dtype=torch.float32).eval()

    def ours(self) -> Any:
        return AutoModelForImageTextToText.from_pretrained(self.folder)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param in tiny.FORMS:
        oracle.write(folder, tiny.FORMS[request.param])
        return Pair(folder, transformers.LlavaForConditionalGeneration)
    form = video_forms.FORMS[request.param]
    return Pair(form.write(folder), form.named("ForConditionalGeneration"))


def adapted(model: Any, **words: Any) -> Any:
    """The model with an adapter of random numbers, and other weights in what it saves whole."""
    torch.manual_seed(5)
    made = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, **words)).eval()
    for name, parameter in made.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.05
    return made


@torch.no_grad()
def logits(model: Any, **inputs: Any) -> Tensor:
    made: Tensor = model(**(inputs or {"input_ids": IDS})).logits
    return made


def assert_acts(before: Tensor, expected: Tensor, found: Tensor) -> None:
    assert float((expected - before).abs().max()) > 0.1
    assert oracle.difference(found, expected) < 1e-5


ADAPTERS: Mapping[str, Mapping[str, Any]] = {
    "suffixes": {"target_modules": ["q_proj", "v_proj", "fc1", "linear_1"]},
    "a regex": {"target_modules": r"model\.language_model.*\.(q|down)_proj"},
    "all but the head": {"target_modules": "all-linear"},
    "head and embeddings": {"target_modules": ["lm_head", "embed_tokens"]},
    "whole modules": {"target_modules": ["o_proj"], "modules_to_save": ["lm_head"]},
    "a causal model": {"target_modules": ["k_proj"], "task_type": "CAUSAL_LM", "use_dora": True},
}


@pytest.mark.parametrize("name", list(ADAPTERS))
def test_adapters_of_transformers_act(pair: Pair, tmp_path: Path, name: str) -> None:
    theirs = pair.theirs()
    before = logits(theirs)
    made = adapted(theirs, **ADAPTERS[name])
    made.save_pretrained(tmp_path)
    ours = peft.PeftModel.from_pretrained(pair.ours(), tmp_path).eval()
    assert_acts(before, logits(made), logits(ours))
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs has no pad token
        answer = made.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **options)
    assert torch.equal(ours.generate(input_ids=IDS, **options), answer)
    with ours.disable_adapter():
        assert oracle.difference(logits(ours), before) < 1e-5
    assert oracle.difference(logits(ours.merge_and_unload()), logits(made)) < 1e-4


@pytest.mark.parametrize("name", list(ADAPTERS))
def test_adapters_of_ours_act_in_transformers(pair: Pair, tmp_path: Path, name: str) -> None:
    ours = pair.ours()
    before = logits(ours)
    made = adapted(ours, **ADAPTERS[name])
    made.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(pair.theirs(), tmp_path).eval()
    assert_acts(before, logits(made), logits(theirs))


def test_a_merged_model_is_saved_and_one_with_an_adapter_is_not(pair: Pair, tmp_path: Path) -> None:
    made = adapted(pair.ours(), target_modules=["q_proj", "fc1"])
    expected = logits(made)
    with pytest.raises(InvalidArgument, match="merge_and_unload"):
        made.get_base_model().save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())
    made.merge_and_unload().save_pretrained(tmp_path)
    for again in (Pair(tmp_path, pair.kind).ours(), Pair(tmp_path, pair.kind).theirs()):
        assert oracle.difference(logits(again), expected) < 1e-4


def rename(folder: Path, renames: tuple[tuple[str, str], ...]) -> None:
    """Give an adapter the names that an older release wrote."""
    older = {}
    for key, tensor in load_file(folder / WEIGHTS).items():
        name = key.removeprefix(PREFIX)
        for pattern, replacement in renames:
            name = re.sub(f"^{pattern}", replacement, name)
        older[f"{PREFIX}{name}"] = tensor
    save_file(older, folder / WEIGHTS)


def test_adapters_of_older_names(pair: Pair, tmp_path: Path) -> None:
    theirs = pair.theirs()
    before = logits(theirs)
    words = {"target_modules": ["q_proj", "fc2"]}
    if "VideoLlama3" not in pair.kind.__name__:
        words["modules_to_save"] = ["multi_modal_projector"]
    made = adapted(theirs, **words)
    made.save_pretrained(tmp_path)
    if "VideoLlama3" not in pair.kind.__name__:  # it came after the change
        kept = set(load_file(tmp_path / WEIGHTS))
        rename(tmp_path, OLDER)
        assert not kept & set(load_file(tmp_path / WEIGHTS))
    ours = peft.PeftModel.from_pretrained(pair.ours(), tmp_path).eval()
    assert_acts(before, logits(made), logits(ours))


def test_a_second_adapter_of_older_names(pair: Pair, tmp_path: Path) -> None:
    """PEFT renames in `from_pretrained` alone: `load_adapter` needs to be told how."""
    theirs = pair.theirs()
    before = logits(theirs)
    made = adapted(theirs, target_modules=["q_proj"])
    made.save_pretrained(tmp_path)
    if "VideoLlama3" not in pair.kind.__name__:
        rename(tmp_path, OLDER)
    ours = adapted(pair.ours(), target_modules=["v_proj"])
    mapping = ours.get_base_model()._checkpoint_conversion_mapping
    ours.load_adapter(tmp_path, "second", key_mapping=mapping)
    ours.set_adapter("second")
    assert_acts(before, logits(made), logits(ours))
    if "VideoLlama3" not in pair.kind.__name__:
        with pytest.raises(InvalidArgument, match="add the keyword key_mapping"):
            ours.load_adapter(tmp_path, "third")


def test_names_are_those_of_transformers(pair: Pair) -> None:
    theirs, ours = pair.theirs(), pair.ours()
    assert set(ours.state_dict()) == set(theirs.state_dict())
    linear = {n for n, m in theirs.named_modules() if isinstance(m, torch.nn.Linear)}
    assert {n for n, m in ours.named_modules() if isinstance(m, torch.nn.Linear)} == linear


def test_a_state_dict_of_the_hubs_names(pair: Pair) -> None:
    """What `torch.save(model.state_dict())` wrote under any layout is read."""
    model = pair.ours()
    expected = logits(model)
    published = {model.renames().published(n): w.clone() for n, w in model.state_dict().items()}
    tiny.randomise(model, 11)
    assert not torch.equal(logits(model), expected)
    model.load_state_dict(published)
    assert torch.equal(logits(model), expected)


def test_bodies_have_transformers_names(pair: Pair) -> None:
    name = pair.kind.__name__.replace("ForConditionalGeneration", "Model")
    if name == "LlavaModel":
        return
    ours = getattr(vidlm, name).from_pretrained(pair.folder)
    theirs = getattr(transformers, name).from_pretrained(pair.folder)
    assert set(ours.state_dict()) == set(theirs.state_dict())


def test_virtual_tokens_are_refused_by_generate(pair: Pair) -> None:
    """PEFT puts them in through a method of its own, which `generate` would never call."""
    model = pair.ours()
    model.prepare_inputs_for_generation = lambda *_, **__: {}
    with pytest.raises(UnsupportedModel, match="virtual tokens"):
        model.generate(input_ids=IDS, max_new_tokens=2)


def test_a_loop_of_ones_own(pair: Pair) -> None:
    """`prepare_inputs_for_generation` and `forward` answer as `generate` does."""
    model, ids, cache = pair.ours(), IDS, None
    for _ in range(5):
        inputs = model.prepare_inputs_for_generation(ids, past_key_values=cache, use_cache=True)
        with torch.no_grad():
            output = model(**inputs)
        cache = output.past_key_values
        ids = torch.cat((ids, output.logits[:, -1:].argmax(-1)), dim=1)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": []}
    assert torch.equal(ids, model.generate(IDS, **options))


def test_a_switched_adapter_forgets_what_was_cached(tmp_path: Path) -> None:
    """An engine finds a prompt's beginning again only under the same weights."""
    folder = tiny.write(tmp_path)
    image = tiny.picture(1)

    def ask(lm: Any) -> str:
        text: str = lm.ask(image, "what happens?", max_tokens=8, temperature=0).text
        return text

    lm = vidlm.load(str(folder))
    plain = ask(lm)
    made = adapted(lm.model, target_modules=["q_proj", "v_proj", "up_proj"])
    acting = ask(lm)
    assert acting != plain
    with made.disable_adapter():
        assert ask(lm) == plain
    assert ask(lm) == acting
    made.merge_adapter()
    with made.disable_adapter():  # which takes it out of the weights again
        assert ask(lm) == plain
