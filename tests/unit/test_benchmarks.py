"""The scripts that compare vidlm with others run, and count what they say they count.

Each is run once on tiny shapes, in a process as its users start it; figures are not judged.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmark_scripts import SCRIPTS, lines

TINY = ("--tiny", "--runs", "1", "--tokens", "4")
CPU = ("--device", "cpu")
TIMES = ("vision_seconds", "prefill_seconds", "first_token_seconds", "whole_seconds")


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a test import the scripts, as they import each other."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.syspath_prepend(str(SCRIPTS / "peers"))


@pytest.fixture
def latency(scripts: None) -> ModuleType:
    return import_module("latency")


@pytest.fixture
def shapes(scripts: None) -> ModuleType:
    return import_module("_shapes")


@pytest.fixture
def throughput(scripts: None) -> ModuleType:
    return import_module("throughput")


# ---- the scripts as a whole ------------------------------------------------------------------


def test_latency_runs() -> None:
    (found,) = lines("latency.py", *TINY, *CPU, "--only", "videollama3-2b")
    assert (found["benchmark"], found["shape"], found["tiny"]) == (
        "latency",
        "videollama3-2b",
        True,
    )
    assert found["agreement"]["transformers"]["equal"] == 4
    for side in ("vidlm", "transformers_sdpa", "transformers_eager"):
        figures = found[side]
        assert all(figures[name] > 0 for name in (*TIMES, "decode_tokens_per_second"))
        assert figures["whole_seconds"] >= figures["first_token_seconds"]
    wanted = {*TIMES, "decode_tokens_per_second"} | ({"peak_gib"} & found["vidlm"].keys())
    assert found["ratios"]["transformers"].keys() == wanted
    assert found["machine"]["threads"] == 1


@pytest.mark.parametrize("kv", [(), ("--kv-dtype", "int8")])
def test_throughput_runs(kv: tuple[str, ...]) -> None:
    words = ("--only", "llava-gqa-0.5b", "--videos", "3", *kv)
    (found,) = lines("throughput.py", *TINY, *CPU, *words)
    assert found["kv_dtype"] == (kv[1] if kv else None)
    assert (found["videos"], found["agreement"]["same_together"]) == (3, "3/3")
    assert found["agreement"]["transformers"]["equal"] == 4
    assert all(value > 0 for value in found["vidlm"].values())
    assert all(value > 0 for value in found["transformers_batch"].values())
    assert all(value > 0 for value in found["bandwidth"].values())
    assert all(value > 0 for value in found["ratios"].values())


# ---- shapes and prompts ----------------------------------------------------------------------


def test_shapes_have_the_published_number_of_tokens(shapes: ModuleType) -> None:
    tokens = {name: shape.prompt_tokens for name, shape in shapes.SHAPES.items()}
    assert tokens == {
        "llava-interleave-0.5b": 8 * 729 + 30,
        "llava-gqa-0.5b": 16 * 729 + 30,
        "videollama3-2b": 16 * 12 * 21 + 30,
    }


def test_another_seed_shares_no_beginning_and_another_question_all_but_the_end(
    shapes: ModuleType,
) -> None:
    for shape in map(shapes.tiny, shapes.SHAPES.values()):
        first, second = shape.ids(1)[0], shape.ids(2)[0]
        assert first[0] != second[0]
        again = shape.ids(1, question=1)[0]
        assert torch.equal(first[:-3], again[:-3])
        assert not torch.equal(first, again)
        name = shape.media_name
        assert not torch.equal(shape.video(1)[name], shape.video(2)[name])
        assert torch.equal(shape.video(1)[name], shape.video(1)[name])


def test_a_text_prompt_is_as_long_and_has_no_placeholder(shapes: ModuleType) -> None:
    for shape in map(shapes.tiny, shapes.SHAPES.values()):
        specials = {shape.placeholder, *(v for k, v in shape.top.items() if "token" in k)}
        ids = [shape.text_prompt(seed)["input_ids"] for seed in range(20)]
        assert all(each.shape == shape.ids(0).shape for each in ids)
        assert not specials & set(torch.cat(ids).flatten().tolist())


def test_random_checkpoints(shapes: ModuleType, tmp_path: Path) -> None:
    shape = shapes.tiny(shapes.SHAPES["llava-gqa-0.5b"])

    def deviation(name: str, weight: torch.Tensor) -> float:
        return 0.5 if name.endswith("embed_tokens.weight") else 0.02

    how = (shape.family, shape.config(), torch.float32, deviation)
    model, again = (shapes.write_random(tmp_path / name, *how) for name in "ab")
    assert (tmp_path / "a" / "model.safetensors").is_file()
    for (name, weight), (_, same) in zip(
        model.named_parameters(), again.named_parameters(), strict=True
    ):
        assert torch.equal(weight, same)
        if "norm" in name and name.endswith("weight"):
            assert bool((weight == 1).all())
        elif weight.numel() > 4000:
            assert float(weight.detach().std()) == pytest.approx(deviation(name, weight), rel=0.1)


def test_families_write_the_layers_that_they_are_told(
    scripts: None, shapes: ModuleType, tmp_path: Path
) -> None:
    families = import_module("families")
    small = shapes.tiny(shapes.SHAPES["llava-gqa-0.5b"])
    top = {**small.top, "vision_config": dict(small.vision)}
    shape = families.Shape(
        small.family, dict(small.text), top, families.frames, (58, 16, small.placeholder)
    )
    sizes = [families.write(tmp_path / str(layers), shape, layers) for layers in (1, 2)]
    assert all(size["bytes"] == 2 * size["parameters"] for size in sizes)
    told = json.loads((tmp_path / "1" / "config.json").read_text())["text_config"]
    assert told["num_hidden_layers"] == 1 < small.text["num_hidden_layers"]
    assert sizes[0]["parameters"] < sizes[1]["parameters"]
    inputs = torch.load(tmp_path / "1" / "inputs.pt")
    assert int((inputs["input_ids"] == small.placeholder).sum()) == 8 * 16


# ---- arithmetic ------------------------------------------------------------------------------


def test_ratios_take_the_better_of_two_attentions(latency: ModuleType) -> None:
    medians = {
        "vidlm": {"whole_seconds": 2.0, "decode_tokens_per_second": 40.0, "vision_seconds": 1.0},
        "transformers_sdpa": {"whole_seconds": 4.0, "decode_tokens_per_second": 5.0},
        "transformers_eager": {"whole_seconds": 8.0, "decode_tokens_per_second": 10.0},
        "openvino": {"vision_seconds": 4.0},
    }
    assert latency.ratios(medians) == {
        "openvino": {"vision_seconds": 0.25},
        "transformers": {"whole_seconds": 0.5, "decode_tokens_per_second": 4.0},
    }


def test_everybody_runs_once_a_run_and_nobody_is_always_first(latency: ModuleType) -> None:
    called: list[tuple[int, str]] = []

    def turn(name: str) -> Any:
        return lambda run: called.append((run, name)) or {"x": float(run)}

    seen = latency.alternate({name: turn(name) for name in "abc"}, 3, {})
    assert seen == {name: [{"x": 1.0}, {"x": 2.0}, {"x": 3.0}] for name in "abc"}
    assert {called[3 * run][1] for run in range(3)} == set("abc")


def test_a_peer_that_fails_is_named_and_left_out(latency: ModuleType) -> None:
    def fails(run: int) -> dict[str, float]:
        if run == 2:
            raise latency.PeerFailed("it crashed")
        return {"x": 1.0}

    absent: dict[str, str] = {}
    seen = latency.alternate({"ours": lambda run: {"x": 1.0}, "peer": fails}, 3, absent)
    assert seen.keys() == {"ours"}
    assert absent == {"peer": "it crashed"}


def test_a_peer_that_nobody_has_is_named(scripts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    peers = import_module("_peers")
    monkeypatch.setattr(peers, "_importable", lambda module: False)
    args = argparse.Namespace(device="cpu", llamacpp_python="/there/python", openvino_python=None)
    found, absent = peers.found_peers(args)
    assert [(peer.name, peer.python) for peer in found] == [("llamacpp", "/there/python")]
    assert absent.keys() == {"openvino"}
    assert "--openvino-python" in absent["openvino"]


def test_a_peer_that_ends_with_an_error_fails(scripts: None, tmp_path: Path) -> None:
    peers = import_module("_peers")
    peer = peers.Peer("llamacpp", (), sees=False, python=sys.executable)
    with pytest.raises(peers.PeerFailed, match=r"prepare ended with 1: .*Traceback"):
        peer.prepare(tmp_path)


def test_eager_attention_does_the_tokens_after_a_prompt_that_it_has_no_room_for(
    latency: ModuleType, shapes: ModuleType
) -> None:
    kinds: list[str] = []
    done: list[str] = []

    def answer(prompt: Any, tokens: int, after_first: Any) -> Any:
        done.append(f"prompt: {kinds[-1]}")
        after_first()
        done.append(f"answer: {kinds[-1]}")
        return SimpleNamespace(rate=3.0)

    def features(seed: int) -> float:
        done.append(f"vision: {kinds[-1]}")
        return 2.0

    side = SimpleNamespace(
        attention=kinds.append,
        answer=answer,
        features=features,
        shape=shapes.tiny(shapes.SHAPES["llava-gqa-0.5b"]),
    )
    found = latency.eager_after_prefill(side, 4, 1)
    assert found == {"vision_seconds": 2.0, "decode_tokens_per_second": 3.0}
    assert done == ["vision: eager", "prompt: sdpa", "answer: eager"]


def test_disagreement_stops_the_script(scripts: None) -> None:
    agreement = import_module("_sides").Agreement
    agreement(logits=0.01, equal=3, close=8, tokens=8).check(0.05)
    for logits, close in ((0.06, 8), (0.01, 7)):
        with pytest.raises(SystemExit, match="disagree"):
            agreement(logits=logits, equal=8, close=close, tokens=8).check(0.05)


def test_the_rate_of_many_counts_only_while_all_are_answered(throughput: ModuleType) -> None:
    ids = ((1, 2, 3, 4), (1, 2, 3))
    served = throughput.Served(ids, ((1.0, 2.0, 3.0, 4.0), (2.0, 3.0, 3.5)))
    assert served.rate == pytest.approx(3 / 1.5)  # 3.0 of the one, 3.0 and 3.5 of the other
    assert (served.first, served.whole) == (1.0, 4.0)
    one_by_one = throughput.Served(ids, ((1.0, 2.0, 3.0, 4.0), (5.0, 6.0, 7.0)))
    assert one_by_one.rate is None


def test_bandwidth_is_of_what_a_step_reads(throughput: ModuleType, shapes: ModuleType) -> None:
    """Weights once for all answers, keys and values of each: 100 + 30, and 100 + 4 x 30 bytes."""
    shape = shapes.tiny(shapes.SHAPES["llava-gqa-0.5b"])
    bench = throughput.Bench(SimpleNamespace(shape=shape, model=None), None, videos=4, tokens=8)
    bench.step_bytes = lambda answers: 100 + 30 * answers
    rates = {"known_alone_tokens_per_second": 10.0, "known_together_tokens_per_second": 20.0}
    found = bench.bandwidth(rates, copied=2600.0)
    assert found["alone"] == pytest.approx(130 * 10 / 2600)
    assert found["together"] == pytest.approx(220 * 20 / 4 / 2600)


# ---- what peers read -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "named"),
    [
        ("language_model.model.norm.weight", "model.norm.weight"),
        ("model.language_model.norm.weight", "model.norm.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("model.language_model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"),
        ("vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight", None),
        ("multi_modal_projector.linear_1.weight", None),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_decoder_is_read_without_torch(
    scripts: None, tmp_path: Path, stored: str, named: str | None, dtype: torch.dtype
) -> None:
    values = torch.randn(6, 4).to(dtype)
    save_file({stored: values, "other": torch.zeros(3)}, tmp_path / "model.safetensors")
    found = list(import_module("_checkpoint").decoder(tmp_path))
    assert [each.name for each in found] == ([] if named is None else [named])
    for each in found:
        assert np.array_equal(each.float32(), values.float().numpy())


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.norm.weight", "output_norm.weight"),
        ("model.layers.11.self_attn.q_proj.bias", "blk.11.attn_q.bias"),
        ("model.layers.0.post_attention_layernorm.weight", "blk.0.ffn_norm.weight"),
    ],
)
def test_names_of_llamacpp(scripts: None, name: str, wanted: str) -> None:
    assert import_module("with_llamacpp").gguf_name(name) == wanted
