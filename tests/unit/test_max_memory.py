"""How much of each device weights may take: `vidlm.load`, and `--max-memory` of every command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
import vidlm
from vidlm import BitsAndBytesConfig, LlavaForConditionalGeneration
from vidlm.cli import application
from vidlm.cli.loading import read_room
from vidlm.demo.world import draw_clip, write_mp4
from vidlm.errors import InvalidArgument
from vidlm.hf import placement
from vidlm.hf.loading import placed, read_load_options
from vidlm.hf.placement import Placement, read_device_map
from vidlm.plan import Loading, check_room, fit, free_memory, plan
from vidlm.quant import PRESETS, preset

CPU, GPU, GPU1 = torch.device("cpu"), torch.device("cuda:0"), torch.device("cuda:1")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two, as far as can be told before they are used."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(placement, "free_bytes", lambda device: 1 << 40)


@pytest.fixture
def no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


# ---- vidlm.load ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [None, *PRESETS])
def test_load_takes_it(no_gpus: None, folder: Path, tmp_path: Path, kind: str | None) -> None:
    """To the byte, of weights as they are kept; saved ones, too."""
    words = {"device": "auto", "quantize": kind}
    room = plan(folder, quantize=kind).weight_bytes
    lm = vidlm.load(folder, max_memory={"cpu": room}, **words)
    assert lm.model.device == CPU
    with pytest.raises(InvalidArgument, match=r"left for the CPU, .*max_memory=\{'cpu': "):
        vidlm.load(folder, max_memory={"cpu": room - 1}, **words)
    if kind is not None:
        lm.model.save_pretrained(tmp_path)
        kinds = LlavaForConditionalGeneration
        assert kinds.from_pretrained(tmp_path, device_map="auto", max_memory={"cpu": room})
        with pytest.raises(InvalidArgument, match="left for the CPU"):
            kinds.from_pretrained(tmp_path, device_map="auto", max_memory={"cpu": room - 1})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"max_memory": {"cpu": "1GB"}}, "max_memory with device_map=None; it goes with auto"),
        ({"device": "cpu", "max_memory": {"cpu": 5}}, "max_memory with device_map='cpu'; it goes"),
        ({"device": "auto", "max_memory": {"cpu": "much"}}, "'much' in max_memory; give a number"),
        ({"device": "auto", "max_memory": "1GB"}, "max_memory='1GB'; give bytes by device"),
    ],
)
def test_what_load_refuses(folder: Path, words: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        vidlm.load(folder, **words)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"gpu": 5}, r"max_memory=\{'gpu': 5\}; allowed: 0, 1 and so on for GPUs, and 'cpu'$"),
        ({"meta": 5}, r"max_memory=\{'meta': 5\}; allowed: 0, 1"),
        ({0: 5, "cuda:0": 6}, r"max_memory=.* names cuda:0 twice; give each device one size"),
    ],
)
def test_devices_that_are_none(gpus: None, given: Any, said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        read_device_map("auto", given)


# ---- weights in fewer bits -----------------------------------------------------------------------


def packed_placement(config: object, room: dict[int | str, int]) -> Placement:
    """Of a model of four layers, before it is loaded."""
    told = tiny.FORMS["siglip-qwen2"].config
    told["text_config"]["num_hidden_layers"] = 4
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(
            LlavaForConditionalGeneration.family.config.from_dict(told)
        )
    before = dict(model.named_parameters())
    words = {"device_map": "sequential", "max_memory": room, "quantization_config": config}
    found = placed(model, torch.bfloat16, read_load_options(words))
    assert dict(model.named_parameters()) == before
    return found


def test_packed_weights_need_less_room(gpus: None) -> None:
    """What two GPUs are needed for otherwise, one has room for."""
    room = {0: 110_000, 1: 110_000}
    plain, small = packed_placement(None, room), packed_placement(preset("int4"), room)
    assert plain.main == small.main == GPU
    assert set(plain.elsewhere.values()) == {GPU1}
    assert small == Placement(GPU)


def test_bitsandbytes_reads_them_whole_before_it_packs_them(gpus: None) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True)
    room = {0: 110_000, 1: 110_000}
    assert packed_placement(config, room) == packed_placement(None, room)


# ---- the account ---------------------------------------------------------------------------------


def test_an_account_refuses_what_loading_would(no_gpus: None, folder: Path) -> None:
    for kind in (None, "int4"):
        most = plan(folder, quantize=kind).weight_bytes
        enough, less = (
            Loading(quantize=kind, device="auto", max_memory={"cpu": size})
            for size in (most, most - 1)
        )
        check_room(folder, enough)
        assert fit(folder, loading=enough) == fit(folder)
        for refused in (check_room, lambda where, told: fit(where, loading=told)):
            with pytest.raises(InvalidArgument, match="left for the CPU, which has room for"):
                refused(folder, less)
    check_room(folder, Loading())


def test_memory_that_is_free_is_that_of_its_devices(
    gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = {CPU: 1, GPU: 20, GPU1: 300}
    monkeypatch.setattr("vidlm.plan.reckon.free_bytes", free.__getitem__)
    assert free_memory("auto") == 320
    assert free_memory("auto", {1: "1GB", "cpu": "1GB"}) == 300
    assert free_memory("auto", {"cpu": "1GB"}) == 1
    with pytest.raises(InvalidArgument, match="max_memory with device_map='cpu'"):
        Loading(device="cpu", max_memory={"cpu": "1GB"})


# ---- the command line ----------------------------------------------------------------------------

NAMES = st.one_of(st.integers(0, 15), st.just("cpu"), st.integers(0, 15).map("cuda:{}".format))
SIZES = st.from_regex(r"\d{1,3}(\.\d)?( ?[KMG]i?B)?", fullmatch=True)


@given(st.dictionaries(NAMES, SIZES, min_size=1), st.integers(0, 3), st.sampled_from(["", " "]))
def test_words_of_a_command_line(room: dict[int | str, str], split: int, space: str) -> None:
    """In one option or in several."""
    words = [f"{space}{name}{space}={space}{size}{space}" for name, size in room.items()]
    given = [",".join(part) for part in (words[:split], words[split:]) if part]
    assert read_room(given) == room


@pytest.mark.parametrize("given", ["", "0", "0=", "=1GB", "0=1GB,", "0=1GB,,cpu=1GB", "cpu=1,5GB"])
def test_words_that_are_no_sizes(given: str) -> None:
    with pytest.raises(InvalidArgument) as raised:
        read_room([given])
    assert str(raised.value).startswith(f"--max-memory {given!r} has ")
    assert str(raised.value).endswith("give GPUs by number, and cpu, such as 0=20GiB,cpu=60GiB")


def run(*words: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        application()([*map(str, words)])
    return int(ended.value.code or 0)


AUTO = ("--device", "auto", "--max-memory")
GOES = "it goes with auto, balanced, balanced_low_0, sequential"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((*AUTO, "20GiB"), "--max-memory '20GiB' has '20GiB' for a device and its size; give GPUs"),
        ((*AUTO, "0=1GB", "--max-memory", "0=2GB"), "--max-memory '0=1GB,0=2GB' names 0 twice"),
        ((*AUTO, "cpu=20 boxes"), "'20 boxes' in --max-memory; give a number of bytes, or text"),
        ((*AUTO, "disk=1GB,0=1GB"), "--max-memory disk=1GB,0=1GB; weights are kept on GPUs and"),
        ((*AUTO, "gpu=1GB"), "--max-memory gpu=1GB; allowed: 0, 1 and so on for GPUs, and 'cpu'"),
        ((*AUTO, "9=1GB"), "device 'cuda:9', but torch sees 2 of them, from cuda:0; use 'cpu'"),
        (("--max-memory", "cpu=1GB"), f"--max-memory without --device; {GOES}"),
        (("--device", "cpu", "--max-memory", "cpu=1GB"), f"--max-memory with --device cpu; {GOES}"),
    ],
)
@pytest.mark.parametrize("command", ["ask", "ask --fit", "index", "info", "bench latency"])
def test_it_is_looked_at_before_a_model_is_sought(
    gpus: None,
    tmp_path: Path,
    command: str,
    words: tuple[str, ...],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_mp4(draw_clip(np.random.default_rng(0)), tmp_path / "clip.mp4")
    monkeypatch.chdir(tmp_path)
    name = "./no-model"
    asked = ["clip.mp4", "What?"] if command.startswith("ask") else ["clip.mp4"]
    positions = {"info": [name], "bench latency": [name, "clip.mp4"]}
    rest = positions.get(command, [*asked, "--model", name])
    assert run(*command.split(), *rest, *words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith(f"vidlm: {said}")


def test_commands_pass_it_on(
    no_gpus: None,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Refused by each where weights have no room, before one is read; taken where they have."""
    clip = tmp_path / "clip.mp4"
    write_mp4(draw_clip(np.random.default_rng(0)), clip)
    monkeypatch.chdir(tmp_path)
    size = plan(folder, quantize="int8").weight_bytes
    how = ("--quantize", "int8", *AUTO)
    ask = ("ask", clip, "What?", "--model", folder, "--max-tokens", "2")
    commands = [ask, (*ask, "--fit"), ("index", clip, "--model", folder), ("info", folder)]
    for command in (*commands, ("bench", "latency", folder, clip)):
        assert run(*command, *how, f"cpu={size - 1}") == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert "weights of 0.1 MB are left for the CPU, which has room for " in err
        assert "; give more in --max-memory cpu=..., load in fewer bits" in err
    for command in commands[1:]:
        assert run(*command, *how, f"cpu={size}") == 0
    assert run("info", folder, "--json", *how, f"cpu={size}") == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["weight_bytes"] == size
