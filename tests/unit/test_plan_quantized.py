"""The account of weights in fewer bits, against the models that are loaded then."""

from __future__ import annotations

import json
from bisect import bisect_left
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import slowfast_forms
import tiny
import video_forms
import vidlm
from vidlm import AutoModelForImageTextToText, BitsAndBytesConfig, QuantoConfig
from vidlm.api.fitting import fitted
from vidlm.errors import InvalidArgument, UnsupportedModel
from vidlm.hf import FrameOptions
from vidlm.models.base import VideoModel
from vidlm.native import PackedWeight, status
from vidlm.nn.packed import PackedLinear
from vidlm.plan import Loading, fit, plan
from vidlm.quant import PRESETS, preset

FORMS = (*tiny.FORMS, *video_forms.FORMS, "slowfast")
SAVED = {
    "nf4": preset("nf4"),
    "fp4, not the head": BitsAndBytesConfig(load_in_4bit=True),
    "int4, and some not": QuantoConfig(weights="int4", modules_to_not_convert=["down_proj"]),
}


@pytest.fixture(scope="module", params=FORMS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of every family."""
    name, where = request.param, tmp_path_factory.mktemp("checkpoint")
    if name in tiny.FORMS:
        return tiny.write(where, tiny.FORMS[name])
    write = slowfast_forms.write if name == "slowfast" else video_forms.FORMS[name].write
    return write(where)


def load(folder: Path, **words: Any) -> VideoModel:
    return AutoModelForImageTextToText.from_pretrained(folder, **words)


def held(model: nn.Module) -> int:
    """Bytes of parameters and buffers, shared ones once."""
    return sum(tensor.nbytes for tensor in chain(model.parameters(), model.buffers()))


def packed(model: nn.Module) -> list[PackedLinear]:
    return [layer for layer in model.modules() if type(layer) is PackedLinear]


def unpacked(model: VideoModel) -> int:
    """Bytes of the largest packed layer but the head, as numbers."""
    layers = [layer for layer in packed(model) if layer is not model.head]
    return max(layer.packed.numbers(model.dtype).nbytes for layer in layers)


@pytest.mark.parametrize("kind", [None, *PRESETS])
def test_weights_are_those_of_the_loaded_model(checkpoint: Path, kind: str | None) -> None:
    config = None if kind is None else preset(kind)
    model = load(checkpoint, quantization_config=config, dtype="bfloat16")
    made = plan(checkpoint, quantize=kind, dtype="bfloat16")
    assert made.weight_bytes == held(model)
    if kind is None:
        assert made.parameters == sum(p.numel() for p in model.parameters())
        assert made.unpacked_bytes == 0
    else:
        assert made.parameters == plan(checkpoint).parameters
        assert made.unpacked_bytes == unpacked(model)


@pytest.mark.parametrize("kind", SAVED)
def test_so_are_those_that_were_saved_packed(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    first = load(checkpoint, quantization_config=SAVED[kind], dtype="bfloat16")
    first.save_pretrained(tmp_path)
    made = plan(tmp_path)
    assert made.weight_bytes == held(first) == held(load(tmp_path))
    assert made.unpacked_bytes == unpacked(first)
    assert made.parameters == plan(checkpoint).parameters
    tables = sum(layer.table.nbytes for layer in packed(first) if layer.table is not None)
    assert made.stored_bytes == made.weight_bytes - tables
    assert made.stored_dtype == f"{kind.partition(',')[0]} and bfloat16"


# ---- what it says, and what follows ------------------------------------------------------------


def test_it_says_what_is_counted(folder: Path) -> None:
    made = plan(folder, quantize="nf4", kv_dtype="int8")
    said = str(made)
    assert " of weights in nf4 + 6.1 kB for one layer unpacked + " in said  # 48 x 32 numbers
    assert " of keys and values in int8 + " in said
    assert "(nf4, the head in int8), all else as float32" in said
    told = json.loads(json.dumps(made.to_dict()))
    assert told["scheme"] == {"kind": "nf4", "group": None, "head": "int8", "skip": []}
    assert (told["unpacked_bytes"], told["kv_dtype"]) == (made.unpacked_bytes, "int8")
    plain = plan(folder)
    assert "packed" not in str(plain)
    assert plain.to_dict()["scheme"] is None


def test_the_account_stays_a_sum(folder: Path) -> None:
    made = plan(folder, quantize="int8", frames=5)
    weights = made.weight_bytes + made.unpacked_bytes
    assert made.memory_bytes == weights + made.kv_bytes + made.held_bytes + made.work_bytes
    assert made.memory_bytes == made.fixed_bytes + 5 * made.bytes_per_frame
    assert made.weight_bytes < plan(folder).weight_bytes


def test_fewer_bits_leave_room_for_more_frames(folder: Path) -> None:
    """As many as the account says, by what weights and keys and values leave."""
    words = {"quantize": "int4", "kv_dtype": "int8"}
    whole, small = plan(folder), plan(folder, **words)
    memory = whole.fixed_bytes + 3 * whole.bytes_per_frame
    told = plan(folder, memory=memory, **words).most_frames_in_memory
    assert told == fit(folder, memory=memory, loading=Loading(**words))
    assert fit(folder, memory=memory) == 3
    assert (whole.scheme, small.scheme) == (None, preset("int4"))
    room = small.fixed_bytes + small.bytes_per_frame
    assert fit(folder, memory=room, loading=Loading(**words)) == 1
    with pytest.raises(InvalidArgument, match=r"the weights take .* in float32, and"):
        fit(folder, memory=whole.weight_bytes - 1)


def test_a_saved_one_is_as_it_was_saved(folder: Path, tmp_path: Path) -> None:
    load(folder, quantization_config=preset("int8")).save_pretrained(tmp_path)
    assert plan(tmp_path).to_dict() == plan(tmp_path, quantize="int8").to_dict()
    with pytest.raises(InvalidArgument, match=r"were saved in int8.*leave it out"):
        plan(tmp_path, quantize="int4")
    tiny.edit_json(tmp_path / "config.json", {"quantization_config": {"quant_method": "awq"}})
    with pytest.raises(UnsupportedModel, match="quantized by awq"):
        plan(tmp_path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"quantize": "int3"}, r"quantize='int3'; allowed: int8, int4, nf4"),
        ({"kv_dtype": "int4"}, r"kv_dtype='int4'; allowed: auto \(the model's dtype\), int8"),
        ({"dtype": "int8"}, r"dtype='int8'; allowed: auto, float32"),
        ({"device": "gpu"}, r"device_map='gpu'; allowed: 'auto', 'cpu'"),
    ],
)
def test_words_are_looked_at_before_a_folder_is(words: dict[str, str], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        Loading(**words)


def test_auto_is_the_models_own() -> None:
    assert Loading(kv_dtype="auto").engine_kv_dtype is None
    assert Loading(kv_dtype="int8").engine_kv_dtype == "int8"
    assert Loading().scheme is None


def test_fit_of_a_loaded_model_counts_it_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is just enough for three frames beside plain weights is so with it on top."""

    def most(lm: vidlm.LM, free: int) -> int:
        monkeypatch.setattr("vidlm.api.fitting.free_bytes", lambda device: free)
        messages, sampling = [{"role": "user", "content": "What?"}], {"max_new_tokens": 2}
        try:
            return fitted(lm, [b"a video"], FrameOptions(), messages, sampling).max_frames or 0
        except InvalidArgument:
            return 0

    plain = vidlm.load(folder)
    enough = bisect_left(range(1 << 28), 3, key=lambda free: most(plain, free))
    assert most(plain, enough - 1) == 2
    for kind in PRESETS:
        unpacked = plan(folder, quantize=kind).unpacked_bytes
        lm = vidlm.load(folder, quantize=kind)
        assert unpacked > 0
        assert most(lm, enough + unpacked) == 3
        assert most(lm, enough + unpacked - 1) == 2


# ---- while it works ----------------------------------------------------------------------------


def test_prompts_unpack_no_more_than_is_counted(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One weight at a time, never the head; memory for it is what the account has."""
    sizes, numbers = [], PackedWeight.numbers

    def noted(weight: PackedWeight, dtype: torch.dtype, passing: bool = False) -> torch.Tensor:
        sizes.append((made := numbers(weight, dtype, passing)).nbytes)
        return made

    monkeypatch.setattr(PackedWeight, "numbers", noted)
    lm = vidlm.load(folder, quantize="int4")
    lm.ask([tiny.picture(0)] * 3, "What happens, and what happens then?", max_tokens=2)
    if not status().used:
        pytest.skip("without kernels the head is unpacked, too")
    assert max(sizes) == plan(folder, quantize="int4").unpacked_bytes
