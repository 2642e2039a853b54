"""hf/placement.py: which part goes where, for GPUs that are not here; and the words for it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from vidlm import BitsAndBytesConfig, LlavaForConditionalGeneration
from vidlm.errors import InvalidArgument, UnsupportedModel
from vidlm.hf import placement
from vidlm.hf.loading import read_load_options
from vidlm.hf.placement import DeviceMap, Placement, plan_placement, read_device_map, spread
from vidlm.models.base import VideoModel
from vidlm.plan import free_memory
from vidlm.weights import load

CPU, GPU, GPU1 = torch.device("cpu"), torch.device("cuda:0"), torch.device("cuda:1")
LAYERS = "model.language_model.layers"
NORM, HEAD = "model.language_model.norm", "lm_head"
RENAMES = LlavaForConditionalGeneration.family.renames


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two, as far as can be told before they are used."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(placement, "free_bytes", lambda device: 1 << 40)


def on_meta(layers: int = 4, form: str = "siglip-qwen2") -> VideoModel:
    config = tiny.FORMS[form].config
    config["text_config"]["num_hidden_layers"] = layers
    with torch.device("meta"):
        return LlavaForConditionalGeneration(
            LlavaForConditionalGeneration.family.config.from_dict(config)
        )


def sizes(model: VideoModel) -> tuple[int, int]:
    """Numbers of a layer, and of all that is in none."""
    layer, *others = (sum(p.numel() for p in m.parameters()) for m in model.decoder.layers)
    assert set(others) == {layer}
    return layer, sum(p.numel() for p in model.parameters()) - layer * (1 + len(others))


# ---- layers over devices -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "room", "expected"),
    [
        ("auto", [20, 20], [0, 0, 0, 0, 0, 0]),  # a second GPU is not asked for
        ("balanced", [20, 20], [0, 0, 1, 1, 1, 1]),  # 4 + 2 x 2 and 4 x 2
        ("balanced_low_0", [20, 20], [1, 1, 1, 1, 1, 1]),
        ("balanced_low_0", [20, 8, 4], [1, 1, 1, 1, 2, 2]),
        ("balanced_low_0", [20, 4, 4], [0, 0, 1, 1, 2, 2]),
        ("sequential", [14, 20], [0, 0, 0, 0, 0, 1]),
        ("auto", [14, 20], [0, 0, 1, 1, 1, 1]),
        ("balanced", [6, 10, 3], [0, 1, 1, 1, 1, 2]),
        ("auto", [12, 3], [0, 0, 0, 1, None, None]),  # on the first, one layer's turn is kept free
        ("sequential", [12], [0, 0, 0, None, None, None]),
        ("sequential", [16], [0, 0, 0, 0, 0, 0]),
        ("balanced", [6], [None] * 6),
    ],
)
def test_six_layers_of_two_beside_four(
    how: str, room: list[int], expected: list[int | None]
) -> None:
    assert spread([2] * 6, 4, room, how) == expected


def test_no_room_for_a_turn() -> None:
    said = r"has room for 5\.00 GB.* must be there take 4\.00 GB, a layer .* 2\.00 GB;.*'cpu'"
    with pytest.raises(InvalidArgument, match=said):
        spread([2 * 10**9] * 3, 4 * 10**9, [5 * 10**9], "auto")


@given(
    layers=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    rest=st.integers(0, 20),
    room=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    how=st.sampled_from(placement.STRATEGIES),
)
def test_any_layers(layers: list[int], rest: int, room: list[int], how: str) -> None:
    """Against all divisions that there are."""
    orders = combinations_with_replacement(range(len(room)), len(layers))
    tried = [loads(layers, rest, room, order) for order in orders]
    fitting = [each for each in tried if within(each, room)]
    if not fitting and room[0] < rest + max(layers):
        with pytest.raises(InvalidArgument):
            spread(layers, rest, room, how)
        return
    found = spread(layers, rest, room, how)
    places = [len(room) if place is None else place for place in found]
    assert places == sorted(places)
    assert (None in found) == (not fitting)  # none waits that need not
    held = loads(layers, rest, room, found)
    assert within([held[0] + (max(layers) if None in found else 0), *held[1:]], room)
    if how == "balanced" and fitting:
        assert max(held) == min(map(max, fitting))
    if how == "balanced_low_0" and fitting and len(room) > 1:
        assert held[0] == min(each[0] for each in fitting)
    if how == "auto" and rest + sum(layers) <= room[0]:
        assert set(found) == {0}


def loads(
    layers: Sequence[int], rest: int, room: Sequence[int], places: Sequence[int | None]
) -> list[int]:
    """What each device holds."""
    held = [rest, *[0] * (len(room) - 1)]
    for size, place in zip(layers, places, strict=True):
        if place is not None:
            held[place] += size
    return held


def within(held: Sequence[int], room: Sequence[int]) -> bool:
    return all(a <= b for a, b in zip(held, room, strict=True))


# ---- a plan for a model --------------------------------------------------------------------------


@pytest.mark.parametrize("how", placement.STRATEGIES)
def test_without_a_gpu(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    plan = plan_placement(on_meta(), read_device_map(how), torch.bfloat16)
    assert plan == Placement(CPU)


def test_one_gpu_where_that_is_enough(gpus: None) -> None:
    plan = plan_placement(on_meta(), read_device_map("auto"), torch.bfloat16)
    assert plan == Placement(GPU)


def test_no_more_than_a_part_of_what_is_free(gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest is for keys and values."""
    layer, rest = sizes(on_meta())
    monkeypatch.setattr(placement, "free_bytes", lambda device: 2 * (rest + 4 * layer))
    plan = plan_placement(on_meta(), read_device_map("auto"), torch.bfloat16)
    assert set(plan.elsewhere.values()) == {GPU1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_to_the_byte(gpus: None, dtype: torch.dtype) -> None:
    model = on_meta()
    layer, rest = (numbers * dtype.itemsize for numbers in sizes(model))

    def plan(**room: int) -> Placement:
        devices = {torch.device(name): size for name, size in room.items()}
        return plan_placement(model, DeviceMap("auto", devices), dtype)

    assert plan(cuda=rest + 4 * layer).elsewhere == {}
    some = plan(cuda=rest + 4 * layer - 1, cpu=2 * layer)
    assert some.waiting == list(some.elsewhere) == [f"{LAYERS}.2", f"{LAYERS}.3"]
    assert some.device_of(f"{LAYERS}.2.mlp.up_proj.weight") == CPU
    assert some.runs_on(f"{LAYERS}.2") == some.main == torch.device("cuda")
    with pytest.raises(InvalidArgument, match=r"left for the CPU, which has room for .*fewer bits"):
        plan(cuda=rest + 4 * layer - 1, cpu=2 * layer - 1)
    with pytest.raises(InvalidArgument, match="left for the CPU"):
        plan(cuda=rest + 4 * layer - 1)  # who names devices means these alone
    with pytest.raises(InvalidArgument, match="left for the CPU"):
        plan(cpu=rest + 4 * layer - 1)
    assert plan(cpu=rest + 4 * layer) == Placement(CPU)


def test_names_do_not_run_into_each_other() -> None:
    plan = Placement(GPU, {f"{LAYERS}.1": GPU1})
    assert plan.device_of(f"{LAYERS}.1.mlp.up_proj.weight") == GPU1
    assert plan.device_of(f"{LAYERS}.11.mlp.up_proj.weight") == GPU


def test_each_tensor_goes_to_its_device(folder: Path) -> None:
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(
            LlavaForConditionalGeneration.family.config.from_dict(tiny.INTERLEAVE.config)
        )
    plan = Placement(CPU, {f"{LAYERS}.1": torch.device("meta")})
    load(model, folder, RENAMES, dtype=torch.bfloat16, device=plan.device_of)
    for name, parameter in model.named_parameters():
        assert parameter.device == plan.device_of(name), name


# ---- a map of names ------------------------------------------------------------------------------


def told(given: Any, model: VideoModel | None = None) -> Placement:
    return plan_placement(model or on_meta(), read_device_map(given), torch.bfloat16, RENAMES)


@pytest.mark.parametrize(
    ("given", "main", "elsewhere"),
    [
        (1, GPU1, {}),
        ("cuda", GPU1, {}),  # the current one
        ({"": 0}, GPU, {}),
        ({"": "cuda:1", f"{LAYERS}.3": "cpu"}, GPU1, {f"{LAYERS}.3": CPU}),
        ({"": 0, LAYERS: 1, f"{LAYERS}.2": 0}, GPU, {f"{LAYERS}.{i}": GPU1 for i in (0, 1, 3)}),
        ({"": 0, HEAD: 1, NORM: GPU1}, GPU, {NORM: GPU1, HEAD: GPU1}),
        ({"": "cpu", LAYERS: 1}, CPU, {f"{LAYERS}.{i}": GPU1 for i in range(4)}),
        (
            {"vision_tower": 0, "multi_modal_projector": 0, "language_model": 0, f"{LAYERS}.1": 1},
            GPU,
            {f"{LAYERS}.1": GPU1},
        ),
        ({"": 0, "language_model.model.layers.1": 1}, GPU, {f"{LAYERS}.1": GPU1}),  # the hub's
        ({"": 0, "language_model.lm_head": 1}, GPU, {HEAD: GPU1}),
    ],
)
def test_maps(
    gpus: None, given: Any, main: torch.device, elsewhere: dict[str, torch.device]
) -> None:
    assert told(given) == Placement(main, elsewhere)


def test_the_map_that_transformers_writes(gpus: None) -> None:
    given = {
        "model.vision_tower": 0,
        "model.multi_modal_projector": 0,
        "model.language_model.embed_tokens": 0,
        **{f"model.language_model.layers.{i}": i // 2 for i in range(4)},
        "model.language_model.norm": 1,
        "model.language_model.rotary_emb": 1,  # no weights, and no module of ours
        "lm_head": 1,
    }
    moved = (f"{LAYERS}.2", f"{LAYERS}.3", NORM, HEAD)
    assert told(given) == Placement(GPU, dict.fromkeys(moved, GPU1))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"": 0, "vision_tower": 1}, r"must be on one device: .*model\.vision_tower.* on cuda:1"),
        ({"": 0, f"{LAYERS}.1.mlp": 1}, r"divides model\.language_model\.layers\.1: .*one device"),
        ({"": 0, "langauge_model": 1}, "'langauge_model', which is no part.* model.vision_tower, "),
        ({"language_model": 0}, r"nothing of \d+ tensors, such as model.vision_tower.*under ''"),
        ({"": 5}, "'cuda:5', but torch sees 2 of them, from cuda:0"),
        ({"": "disk"}, "on GPUs and the CPU, not on disk"),
        ({"": "gpu"}, r"device_map=\{'': 'gpu'\}; allowed: 'auto', 'cpu'"),
        ({"": None}, r"device_map=\{'': None\}; allowed"),
        ({}, r"device_map=\{\}; allowed"),
    ],
)
def test_maps_that_cannot_be(gpus: None, given: Any, said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        told(given)


def test_a_tied_head_stays_with_its_twin(gpus: None) -> None:
    model = on_meta(form="siglip-qwen2-tied")
    with pytest.raises(InvalidArgument, match="are the same tensor"):
        told({"": 0, HEAD: 1}, model)
    assert told({"": 0, HEAD: 0, NORM: 1}, model) == Placement(GPU, {NORM: GPU1})


# ---- max_memory ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "bytes_"),
    [
        (7, 7),
        ("7", 7),
        ("20GiB", 20 << 30),
        ("1.5 gb", 1_500_000_000),
        ("512MB", 512_000_000),
        ("512mib", 512 << 20),
        ("3KB", 3000),
    ],
)
def test_sizes(gpus: None, given: Any, bytes_: int) -> None:
    assert read_device_map("auto", {1: given}).room == {GPU1: bytes_}


@pytest.mark.parametrize(
    ("device_map", "max_memory", "said"),
    [
        ("auto", {0: "20 boxes"}, "'20 boxes' in max_memory; give a number of bytes, or text"),
        ("auto", {0: -1}, "-1 in max_memory"),
        ("auto", {0: 1.5}, r"1\.5 in max_memory"),
        ("auto", {0: True}, "True in max_memory"),
        ("auto", {9: "1GB"}, "'cuda:9', but torch sees 2"),
        ("auto", {"disk": "1GB"}, "max_memory=.*not on disk"),
        ("auto", "20GiB", r"max_memory='20GiB'; give bytes by device, such as \{0:"),
        ("cuda", {0: "1GB"}, "max_memory with device_map='cuda'; it goes with auto, balanced"),
        (None, {0: "1GB"}, "max_memory with device_map=None"),
    ],
)
def test_sizes_that_are_none(gpus: None, device_map: Any, max_memory: Any, said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        read_device_map(device_map, max_memory)


def test_devices_of_a_map(gpus: None) -> None:
    """What `vidlm ask --device` asks for free memory."""
    assert read_device_map("balanced").devices == [GPU, GPU1]
    assert read_device_map("auto", {1: 5, "cpu": 5}).devices == [GPU1]
    assert read_device_map({"": 0, "a": "cpu"}).devices == [GPU]
    assert read_device_map(None).devices == read_device_map("cpu").devices == [CPU]
    assert free_memory("cpu") > 1 << 20


# ---- from_pretrained -----------------------------------------------------------------------------


def test_a_model_on_two_devices(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`meta` stands for the second."""
    monkeypatch.setattr(placement, "_other_device", lambda device, *_: device)
    where = {"": "cpu", f"{LAYERS}.1": "meta"}
    model = LlavaForConditionalGeneration.from_pretrained(folder, device_map=where)
    assert model.hf_device_map == {"": CPU, f"{LAYERS}.1": torch.device("meta")}
    assert model.layer_devices == [CPU, torch.device("meta")]
    assert model.device == CPU
    with pytest.raises(InvalidArgument, match=r"lies on several devices.*device_map='cpu'"):
        model.to("meta")
    assert model.to(torch.bfloat16).dtype == torch.bfloat16


def test_a_model_on_one_device(folder: Path) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(folder, device_map="cpu")
    assert model.hf_device_map == {"": CPU}
    assert all("forward" not in module.__dict__ for module in model.modules())
    model.to("meta")
    assert model.hf_device_map == {"": torch.device("meta")}


def test_quantized_layers_do_not_wait(gpus: None, folder: Path) -> None:
    how = {"device_map": "auto", "max_memory": {0: "200KB", "cpu": "1GB"}}
    with pytest.raises(UnsupportedModel, match=r"2 parts of the model.*wait .*device_map='cpu'"):
        LlavaForConditionalGeneration.from_pretrained(
            folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True), **how
        )


def test_both_spellings_of_the_dtype() -> None:
    both = {"dtype": None, "torch_dtype": "float16"}
    assert read_load_options(both).dtype == torch.float16
    assert read_load_options({**both, "dtype": torch.float16}).dtype == torch.float16
    with pytest.raises(InvalidArgument, match="dtype='float32' and torch_dtype='float16'"):
        read_load_options({**both, "dtype": "float32"})


# ---- attn_implementation -------------------------------------------------------------------------

FLASH = {"attn_implementation": "flash_attention_2"}


@pytest.fixture
def ampere(gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))


def test_flash_is_for_16_bits(ampere: None, folder: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"in torch\.float32; it is for float16 and bfloat1"):
        LlavaForConditionalGeneration.from_pretrained(folder, dtype="float32", **FLASH)


def test_flash_on_an_old_gpu(ampere: None, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    how = {"dtype": "float16", "device_map": "cuda:0", **FLASH}
    with pytest.raises(
        UnsupportedModel, match=r"capability 8\.0 .*, cuda:0 is older; leave it out"
    ):
        LlavaForConditionalGeneration.from_pretrained(folder, **how)


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}])
def test_flash_on_the_cpu(ampere: None, device_map: Any) -> None:
    with pytest.raises(UnsupportedModel, match="needs a GPU, and device_map names none; leave it"):
        read_load_options({"device_map": device_map, **FLASH})


def test_flash_of_a_model_that_is_moved_later(
    ampere: None, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As model cards have it: from_pretrained(...).to(0)."""
    with caplog.at_level(logging.WARNING):
        LlavaForConditionalGeneration.from_pretrained(folder, dtype="float16", **FLASH)
    assert "the model is on the CPU, where torch's scaled_dot_product_attention runs" in caplog.text


def test_flash_without_a_kernel(gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    with pytest.raises(UnsupportedModel, match="and a torch that was built with it; leave it out"):
        read_load_options(FLASH)
