"""nn/placed.py: layers that run elsewhere, and weights that come for their turn, without a GPU.

Devices are those of tests/devices.py, which keeps them apart; weights that wait are here of a kind
that nothing can be computed with where they are kept.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import devices
import slowfast_forms
import tiny
import video_forms
import vidlm
from straight import about, ask, asked, text, tiny_model
from vidlm.engine import Engine
from vidlm.engine.memory import free_for_layers
from vidlm.engine.store import weights_stamp
from vidlm.hf.placement import Placement
from vidlm.models.base import VideoModel
from vidlm.nn.placed import device_of, place
from vidlm.nn.step import packed

CPU, GPU, GPU1 = torch.device("cpu"), torch.device("cuda:0"), torch.device("cuda:1")
OTHER = torch.device("cpu", 1)  # by its name another device; tensors there say "cpu"
LAYERS = "model.language_model.layers"
PROMPT = about((1, 2), text(9))


# ---- devices -------------------------------------------------------------------------------------

FAMILIES = ("llava", "slow-fast", *video_forms.FORMS)
QUESTIONS = ("what happens?", "what happens, then?")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny checkpoint of each family."""
    root = tmp_path_factory.mktemp("checkpoints")
    made = {name: root / name for name in FAMILIES}
    for folder in made.values():
        folder.mkdir()
    tiny.write(made["llava"], tiny.FORMS["clip-llama"])
    slowfast_forms.write(made["slow-fast"])
    for name, form in video_forms.FORMS.items():
        form.write(made[name])
    return made


def load(folder: Path, device: Any = None) -> vidlm.LM:
    """With a chat template, which these tiny checkpoints have none of."""
    lm = vidlm.load(folder, device=device)
    token = lm.processor.video_token or lm.processor.image_token
    place = "{% if part['type'] != 'text' %}" + token + "{% else %}{{ part['text'] }}{% endif %}"
    each = "{% for part in message['content'] %}" + place + "{% endfor %}"
    lm.processor.chat_template = "{% for message in messages %}" + each + "{% endfor %} answer:"
    return lm


def answers(lm: vidlm.LM) -> list[str]:
    clip = video_forms.clip(1, frames=8)
    return [lm.ask(clip, question, max_tokens=8).text for question in QUESTIONS]


def layer_names(model: VideoModel) -> list[str]:
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(layer)] for layer in model.decoder.layers]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_of_layers_on_two_gpus_and_the_cpu(folders: dict[str, Path], family: str) -> None:
    plain = load(folders[family])
    first, *between, last = layer_names(plain.model)
    expected = answers(plain)
    with devices.gpus():
        lm = load(folders[family], {"": 0, first: "cpu", **dict.fromkeys(between, 1), last: 1})
        assert answers(lm) == expected
        assert lm.model.layer_devices == [GPU, *[GPU1] * len(between), GPU1]
        assert {p.device for p in lm.model.decoder.layers[0].parameters()} == {CPU}


MAPS = {
    "one GPU": ({"": 0}, [GPU, GPU]),
    "the last layer on a second GPU": ({"": 0, f"{LAYERS}.1": 1}, [GPU, GPU1]),
    "the first layer on a second GPU": ({"": 0, f"{LAYERS}.0": 1}, [GPU1, GPU]),
    "all behind on a second GPU": (
        {"": 0, LAYERS: 1, "model.language_model.norm": 1, "lm_head": 1},
        [GPU1, GPU1],
    ),
    "a layer waits": ({"": 0, f"{LAYERS}.1": "cpu"}, [GPU, GPU]),
    "a layer and the head wait": (
        {"": 0, f"{LAYERS}.0": "cpu", "lm_head": "cpu"},
        [GPU, GPU],
    ),
    "the layers alone on a GPU": ({"": "cpu", LAYERS: 0}, [GPU, GPU]),
    "a layer alone on a GPU": ({"": "cpu", f"{LAYERS}.1": 0}, [CPU, GPU]),
}


@pytest.mark.parametrize("name", list(MAPS))
def test_where_layers_run(folders: dict[str, Path], name: str) -> None:
    where, runs = MAPS[name]
    expected = answers(load(folders["llava"]))
    with devices.gpus():
        lm = load(folders["llava"], where)
        assert answers(lm) == expected
        assert lm.model.layer_devices == runs
        stored = lm.engine._store.kv.layers
        assert [k.device for k, _ in stored] == [v.device for _, v in stored] == runs
        main = lm.model.device
        hidden = lm.model.hidden(lm.model.embed(torch.arange(5, device=main)), packed([5], main))
        assert hidden.device == lm.model.logits(hidden).device == main


@pytest.mark.parametrize("how", ["auto", "balanced", "balanced_low_0", "sequential"])
def test_strategies(folders: dict[str, Path], how: str) -> None:
    """With room on the first GPU for all but a layer, and on the second for one."""
    model = load(folders["llava"]).model
    ids = torch.arange(10, 20)[None]
    expected = model.generate(ids, max_new_tokens=6, min_new_tokens=6)
    layer = sum(p.nbytes for p in model.decoder.layers[0].parameters())
    rest = sum(p.nbytes for p in model.parameters()) - 2 * layer
    with devices.gpus():
        moved = vidlm.LlavaForConditionalGeneration.from_pretrained(
            folders["llava"], device_map=how, max_memory={0: rest + 2 * layer - 1, 1: layer}
        )
        assert moved.hf_device_map == {"": GPU, f"{LAYERS}.1": GPU1}
        found = moved.generate(ids, max_new_tokens=6, min_new_tokens=6)
        assert found.tolist() == expected.tolist()


def test_devices_are_kept_apart(folders: dict[str, Path]) -> None:
    """What these tests go by: layers on a second GPU that nothing is brought to fail."""
    with devices.gpus():
        lm = load(folders["llava"], {"": 0, f"{LAYERS}.1": 1})
        for module in lm.model.modules():
            module.__dict__.pop("forward", None)
        with pytest.raises(devices.WrongDevice, match="cuda:0, cuda:1"):
            answers(lm)


def test_a_saved_video_goes_to_the_devices_of_the_layers(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    clip, path = video_forms.clip(1, frames=8), tmp_path / "clip.safetensors"
    plain = load(folders["llava"])
    plain.video(clip).save(path)
    expected = answers(plain)
    with devices.gpus():
        lm = load(folders["llava"], {"": 0, f"{LAYERS}.1": 1})
        assert [lm.ask(path, q, max_tokens=8).text for q in QUESTIONS] == expected
        again = tmp_path / "again.safetensors"
        lm.video(path).save(again)
    saved, first = load_file(again), load_file(path)
    assert saved.keys() == first.keys()
    assert all(torch.equal(saved[name], first[name]) for name in saved)


def test_forward_on_two_gpus(folders: dict[str, Path]) -> None:
    ids = torch.tensor([[10, 11, 12, 13, 14], [20, 21, 22, tiny.PAD, tiny.PAD]])
    how: dict[str, Any] = {"attention_mask": ids != tiny.PAD, "labels": ids}
    how |= {"output_hidden_states": True, "output_attentions": True}
    kind = vidlm.LlavaForConditionalGeneration
    expected = kind.from_pretrained(folders["llava"])(ids, **how)
    with devices.gpus():
        model = kind.from_pretrained(folders["llava"], device_map={"": 0, f"{LAYERS}.0": 1})
        found = model(ids, **how)
        for name in ("hidden_states", "attentions"):
            for mine, theirs in zip(found[name], expected[name], strict=True):
                assert mine.device == GPU
                assert torch.allclose(mine.cpu(), theirs, atol=1e-5)
        assert torch.allclose(found.logits.cpu(), expected.logits, atol=1e-5)
        assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
        wider = torch.cat((how["attention_mask"], torch.ones(2, 1).bool()), dim=1)
        more = model(ids[:, :1], past_key_values=found.past_key_values, attention_mask=wider)
        assert more.logits.device == GPU


def test_what_is_shared_is_copied_once_a_step(folders: dict[str, Path]) -> None:
    seen: list[Any] = []
    with devices.gpus():
        model = load(folders["llava"], {"": "cpu", LAYERS: 0}).model
        for layer in model.decoder.layers:
            layer.self_attn.register_forward_pre_hook(lambda _, given: seen.append(given[1:]))
        model.hidden(torch.zeros(6, 32), packed([6], CPU))
        (rope, step), (same_rope, same_step) = seen
        assert rope is same_rope
        assert step is same_step
        assert rope[0].device == step.positions.device == GPU


def test_memory_for_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the device with the least for each of its layers allows."""
    free = {GPU: 1000, GPU1: 900}
    monkeypatch.setattr("vidlm.engine.memory.free_bytes", free.__getitem__)
    assert free_for_layers([GPU] * 5) == 1000
    assert free_for_layers([GPU, GPU1, GPU1, GPU1]) == 1200  # 300 each: 900 / 3
    assert free_for_layers([GPU, GPU, GPU, GPU1]) == 1333


# ---- numbers -------------------------------------------------------------------------------------


class Away(nn.Parameter):
    """A weight on another device, as far as can be told: it has to come before it is of use."""

    came: ClassVar[list[weakref.ref[Tensor]]] = []

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.Tensor.to:
                here = args[0].as_subclass(torch.Tensor).clone()
                cls.came.append(weakref.ref(here))
                return here
            if func == torch.Tensor.device.__get__:  # made anew for every look
                return OTHER
            if getattr(func, "__name__", "") in ("__get__", "data_ptr", "is_inference", "numel"):
                return func(*args, **(kwargs or {}))
        raise AssertionError(f"{func} of a weight that is elsewhere")


@pytest.fixture
def away() -> Iterator[list[weakref.ref[Tensor]]]:
    """The weights that have come."""
    Away.came.clear()
    yield Away.came
    Away.came.clear()


def waiting(model: VideoModel) -> VideoModel:
    """A model whose layers, norm and head wait elsewhere."""
    for part in (*model.decoder.layers, model.decoder.norm):
        for module in part.modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    module._parameters[name] = Away(weight.data, weight.requires_grad)
        place(part, CPU, CPU if part is model.decoder.norm else None)
    return model


def apart(model: VideoModel) -> VideoModel:
    """A model with a layer on a device of another name."""
    Placement(CPU, {f"{LAYERS}.1": OTHER}).apply(model)
    return model


@pytest.mark.parametrize("form", list(tiny.FORMS))
@pytest.mark.parametrize("placed", [waiting, apart])
@pytest.mark.usefixtures("away")
def test_the_same_answers(placed: Callable[[VideoModel], VideoModel], form: str) -> None:
    requests = [asked(PROMPT, 12), asked(about((3,), text(5)), 12)]
    expected = [ask(Engine(tiny_model(form)), request) for request in requests]
    engine = Engine(placed(tiny_model(form)))
    assert [ask(engine, request) for request in requests] == expected
    engine.clear()
    with ThreadPoolExecutor(2) as pool:  # each an engine of its own, of one model
        own = [Engine(engine.model) for _ in requests]
        assert list(pool.map(ask, own, requests)) == expected


def test_weights_come_for_their_turn(away: list[weakref.ref[Tensor]]) -> None:
    model = waiting(tiny_model())
    before, held = weights_stamp(model), [p.data_ptr() for p in model.parameters()]
    alive: list[int] = []

    def count(*_: object) -> None:
        gc.collect()
        alive.append(sum(ref() is not None for ref in away))

    for layer in model.decoder.layers:
        layer.mlp.register_forward_pre_hook(count)
    ask(Engine(model), asked(PROMPT, 3))
    one = len(list(model.decoder.layers[0].parameters()))
    assert set(alive) == {one}  # never two layers' at once
    assert len(away) > len(alive) * one  # and those of the norm
    assert not [ref for ref in away if ref() is not None]
    assert weights_stamp(model) == before  # what is cached counts as theirs
    assert [p.data_ptr() for p in model.parameters()] == held


@pytest.mark.usefixtures("away")
@pytest.mark.parametrize("placed", [waiting, apart])
def test_forward_with_all_that_may_be_seen(placed: Callable[[VideoModel], VideoModel]) -> None:
    ids = torch.tensor([[10, 11, 12, 13, 14], [20, 21, 22, tiny.PAD, tiny.PAD]])
    how = {"attention_mask": ids != tiny.PAD, "labels": ids, "output_hidden_states": True}
    plain, moved = tiny_model(), placed(tiny_model())
    expected = plain(ids, **how, output_attentions=True)
    found = moved(ids, **how, output_attentions=True)
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(found.logits, expected.logits)
    for name in ("hidden_states", "attentions"):
        pairs = zip(found[name], expected[name], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.usefixtures("away")
def test_gradients_find_the_weights() -> None:
    ids = torch.tensor([[10, 11, 12, 13, 14]])
    plain, moved = (tiny_model().requires_grad_(True) for _ in range(2))
    moved = waiting(moved)
    for model in (plain, moved):
        model(ids, labels=ids).loss.backward()
    expected = {n: p.grad for n, p in plain.decoder.layers.named_parameters()}
    for name, weight in moved.decoder.layers.named_parameters():
        with torch._C.DisableTorchFunctionSubclass():
            assert torch.equal(weight.grad, expected[name]), name


def test_hooks_see_what_they_always_see() -> None:
    seen = []
    model = apart(tiny_model())
    for layer in model.decoder.layers:
        layer.register_forward_hook(lambda module, given, made: seen.append((module, made.shape)))
        layer.mlp.down_proj.register_forward_hook(lambda *_: seen.append(None))
    model.hidden(torch.zeros(5, 32), packed([5], CPU))
    layers = list(model.decoder.layers)
    assert seen == [None, (layers[0], (5, 32)), None, (layers[1], (5, 32))]


def test_a_copy_is_placed_by_itself() -> None:
    model = apart(tiny_model())
    other = deepcopy(model)
    assert [device_of(layer) for layer in other.decoder.layers] == [CPU, OTHER]
    nn.init.zeros_(other.decoder.layers[1].mlp.down_proj.weight)
    x = torch.ones(5, 32)
    assert not torch.equal(model.hidden(x, packed([5], CPU)), other.hidden(x, packed([5], CPU)))


def test_an_ordinary_model_pays_nothing() -> None:
    model = tiny_model()
    Placement(CPU).apply(model)
    assert all("forward" not in module.__dict__ for module in model.modules())
    step = packed([5], CPU)
    model.hidden(torch.zeros(5, 32), step)
    assert not step.copies
