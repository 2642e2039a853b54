"""What `forward` returns, treated as users treat transformers' outputs."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch.utils import _pytree

import tiny
from vidlm.errors import InvalidArgument
from vidlm.hf import BatchFeature, LlavaConfig, LlavaForConditionalGeneration
from vidlm.hf.outputs import CausalLMOutputWithPast, ModelOutputWithPast

IDS = torch.tensor([[20, 21, 22, 23]])


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration(LlavaConfig.from_dict(tiny.INTERLEAVE.config)).eval()


def make(**entries: Any) -> CausalLMOutputWithPast:
    return CausalLMOutputWithPast(logits=torch.ones(1, 2, 3), **entries)


@torch.no_grad()
def test_an_output_is_a_dict(model: LlavaForConditionalGeneration) -> None:
    output = model(IDS, labels=IDS, output_hidden_states=True)
    names = ["loss", "logits", "past_key_values", "hidden_states"]
    assert isinstance(output, dict)
    assert isinstance(output, OrderedDict)
    assert list(output) == list(output.keys()) == names
    assert len(output) == 4
    assert "loss" in output
    assert "attentions" not in output
    assert output.attentions is None
    assert output.get("attentions") is None
    assert output["logits"] is output.logits is output[1] is dict(output)["logits"]
    assert output[0] is output.loss is output["loss"]
    assert output[:2] == (output.loss, output.logits) == output.to_tuple()[:2]
    assert output[-1] is output.hidden_states
    assert [name for name, _ in output.items()] == names
    assert next(iter(output.values())) is output.loss
    assert {**output}.keys() == output.keys()
    assert dict(**output).keys() == output.keys()
    with pytest.raises(KeyError):
        output["attentions"]
    with pytest.raises(IndexError):
        output[4]
    assert isinstance(model(IDS, return_dict=False), tuple)
    assert repr(output).startswith("CausalLMOutputWithPast(loss=tensor(")


def test_entries_and_attributes_are_one() -> None:
    output = make()
    output.loss = torch.tensor(2.0)
    assert output["loss"] is output.loss
    output["loss"] = output.loss / 2
    assert float(output.loss) == 1
    output.note = "an attribute of a user's own"
    assert "note" not in output
    output["extra"] = 3
    assert output.extra == 3
    output.logits = None
    assert "logits" not in output
    assert list(output) == ["loss", "extra"]


@pytest.mark.parametrize(
    "remove",
    [
        lambda output: output.pop("logits"),
        lambda output: output.__delitem__("logits"),
        lambda output: output.update(loss=1),
        lambda output: output.setdefault("loss", 1),
        lambda output: output.clear(),
        lambda output: output.popitem(),
    ],
)
def test_entries_stay(remove: Any) -> None:
    output = make()
    with pytest.raises(TypeError, match="CausalLMOutputWithPast are set, never removed"):
        remove(output)
    assert list(output) == ["logits"]


@pytest.mark.parametrize(
    "again",
    [
        copy.copy,
        copy.deepcopy,
        lambda output: output.copy(),
        lambda output: pickle.loads(pickle.dumps(output)),
        lambda output: type(output)(dict(output)),
        lambda output: type(output)(list(output.items())),
        lambda output: type(output)((name, output[name]) for name in output),  # DataParallel
        lambda output: type(output)(**output),
        lambda output: _pytree.tree_map(lambda x: x, output),
    ],
)
def test_copies(again: Any) -> None:
    output = make(hidden_states=(torch.zeros(1), torch.ones(1)))
    found = again(output)
    assert type(found) is type(output)
    assert found is not output
    assert list(found) == list(output)
    assert torch.equal(found.logits, output.logits)
    assert found["logits"] is found.logits
    assert found.loss is None
    assert torch.equal(found.hidden_states[1], torch.ones(1))


def test_a_first_field_may_be_any_value() -> None:
    states = (torch.zeros(1), torch.ones(1))
    assert ModelOutputWithPast(states).last_hidden_state is states  # type: ignore[arg-type]
    assert list(ModelOutputWithPast()) == []


def test_torch_looks_inside() -> None:
    output = make(loss=torch.tensor(1.0))
    leaves, spec = _pytree.tree_flatten(output)
    assert [leaf.shape for leaf in leaves] == [(), (1, 2, 3)]
    assert list(_pytree.tree_unflatten(leaves, spec)) == ["loss", "logits"]


def test_features_are_made_and_moved() -> None:
    made = BatchFeature({"input_ids": [[1, 2]], "x": [[0.5]]}, tensor_type="pt")
    assert made.input_ids.dtype == torch.int64
    moved = made.to("cpu", torch.float64, non_blocking=True)
    assert (moved.x.dtype, moved.input_ids.dtype) == (torch.float64, torch.int64)
    assert BatchFeature(data={"a": 1}).data == {"a": 1} == {**BatchFeature(a=1)}
    assert list(pickle.loads(pickle.dumps(made))) == ["input_ids", "x"]
    with pytest.raises(InvalidArgument, match="tensor_type='tf'"):
        BatchFeature({"a": [1]}, tensor_type="tf")
