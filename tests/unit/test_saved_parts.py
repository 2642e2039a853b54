"""Parts of a loaded model are saved, pickled, copied and shared as their own bytes, however the
weights lie in memory."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

import tiny
import vidlm
from vidlm.quant import preset

EACH = 1200  # bytes around a tensor, of names and of a pickle's or zip's own
WAYS: dict[str, dict[str, Any]] = {
    "tied": {"dtype": torch.float32},
    "own head": {"dtype": torch.bfloat16},
    **{name: {"quantization_config": preset(name)} for name in ("int8", "int4", "nf4")},
}


@pytest.fixture(scope="module", params=WAYS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    form = "siglip-qwen2-tied" if request.param == "tied" else "siglip-qwen2"
    folder = tiny.write(tmp_path_factory.mktemp("tiny"), tiny.FORMS[form])
    return vidlm.LlavaForConditionalGeneration.from_pretrained(folder, **WAYS[request.param])


def tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def dumped(save: Callable[[Any], Any]) -> bytes:
    buffer = io.BytesIO()
    save(buffer)
    return buffer.getvalue()


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def tied(model: Any) -> bool:
    head = getattr(model.get_output_embeddings(), "weight", None)
    return head is model.get_input_embeddings().weight


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits
    return found


def test_each_has_a_storage_of_its_own(model: Any) -> None:
    for tensor in tensors(model):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert tensor.storage_offset() == 0
    places = [tensor.data_ptr() for tensor in tensors(model)]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize("part", ["multi_modal_projector", "vision_tower", "language_model", ""])
def test_a_part_is_saved_as_its_own_bytes(model: Any, part: str) -> None:
    module = model.get_submodule(part)
    size = sum(tensor.nbytes for tensor in tensors(module)) + EACH * len(module.state_dict())
    for save in (
        lambda file: torch.save(module.state_dict(), file),
        lambda file: torch.save(module, file),
        lambda file: pickle.dump(module, file),
        lambda file: pickle.dump(module.state_dict(), file),
        lambda file: torch.save(next(module.parameters()), file),
    ):
        # what is not a tensor, config and classes, is some thousands
        assert len(dumped(save)) < size + 20_000


def test_copies_are_the_model(model: Any) -> None:
    wanted = logits(model)
    states = torch.load(io.BytesIO(dumped(lambda file: torch.save(model.state_dict(), file))))
    blank = copy.deepcopy(model)
    for tensor in blank.state_dict().values():
        tensor.zero_()
    assert torch.equal(logits(model), wanted)  # the copy has memory of its own
    blank.load_state_dict(states)
    for other in (
        blank,
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(io.BytesIO(dumped(lambda f: torch.save(model, f))), weights_only=False),
    ):
        assert same(other, model)
        assert torch.equal(logits(other), wanted)
        assert tied(other) == tied(model)


def test_safetensors_takes_the_model(model: Any, tmp_path: Path) -> None:
    """The tied head once, as of a model of transformers."""
    save_model(model, tmp_path / "model.safetensors")
    size = sum(tensor.nbytes for tensor in tensors(model))
    assert (tmp_path / "model.safetensors").stat().st_size < size + EACH * len(model.state_dict())
    other = copy.deepcopy(model)
    for tensor in other.state_dict().values():
        tensor.zero_()
    load_model(other, tmp_path / "model.safetensors")
    assert same(other, model)


def double(projector: nn.Module) -> None:
    with torch.no_grad():
        projector.linear_1.bias.mul_(2)  # type: ignore[union-attr, operator]


def test_processes_share_a_part(model: Any) -> None:
    projector = copy.deepcopy(model).multi_modal_projector.share_memory()
    assert all(tensor.is_shared() for tensor in tensors(projector))
    before = projector.linear_1.bias.clone()
    context = torch.multiprocessing.get_context("fork")
    process = context.Process(target=double, args=(projector,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert torch.equal(projector.linear_1.bias, 2 * before)
