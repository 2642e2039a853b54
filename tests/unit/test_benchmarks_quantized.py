"""benchmarks/quantized.py and quantized_linear.py: they run, and count what they say they count."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from benchmark_scripts import SCRIPTS, lines

TINY = ("--tiny", "--runs", "1", "--tokens", "4")
FIGURES = {
    "prefill_seconds",
    "decode_tokens_per_second",
    "decode_short",
    "prefill_seconds_kv_int8",
    "decode_tokens_per_second_kv_int8",
}


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a test import the scripts, as they import each other."""
    monkeypatch.syspath_prepend(str(SCRIPTS))


@pytest.fixture
def quantized(scripts: None) -> ModuleType:
    return import_module("quantized")


@pytest.fixture
def quantized_linear(scripts: None) -> Iterator[ModuleType]:
    yield import_module("quantized_linear")
    sys.modules.pop("kernels", None)  # bitsandbytes would take it for a package of that name


# ---- the scripts as a whole ------------------------------------------------------------------


def test_quantized_runs() -> None:
    (found,) = lines("quantized.py", *TINY, "--only", "llava-gqa-0.5b", "--kinds", "int4")
    assert (found["benchmark"], found["shape"], found["tiny"]) == (
        "quantized",
        "llava-gqa-0.5b",
        True,
    )
    memory = {"weights_gib", "load_peak_gib"}
    plain, packed = found["bf16"], found["int4"]
    assert plain.keys() == memory | FIGURES
    assert packed.keys() == memory | FIGURES | {"load_limit_gib"}
    assert all(value > 0 for value in (*plain.values(), *packed.values()))
    assert packed["weights_gib"] < plain["weights_gib"]
    ratios = found["ratios"]["int4"]["over_bf16"]
    assert ratios.keys() == FIGURES
    rate = "decode_tokens_per_second"
    assert ratios[rate] == pytest.approx(packed[rate] / plain[rate], rel=0.01)
    assert ratios[f"{rate}_kv_int8"] == pytest.approx(
        packed[f"{rate}_kv_int8"] / plain[rate], rel=0.01
    )
    assert found["machine"]["threads"] == 1


def test_quantized_linear_runs() -> None:
    about, *found = lines(
        "quantized_linear.py", "--shapes", "128x256", "--rows", "1", "40", "--only", "vidlm"
    )
    assert about["machine"]["threads"] == 1
    assert about["absent"] == []
    assert [(each["in"], each["out"], each["rows"]) for each in found] == [
        (128, 256, 1),
        (128, 256, 40),
    ]
    for each in found:
        assert each["refused"] == {}
        forms = each["forms"]
        assert {name: form["bytes"] for name, form in forms.items()} == {
            "bf16 vidlm": 2.0,
            "int8 vidlm": 1.031,  # a float32 scale for each row
            "int4 vidlm": 0.562,  # a bfloat16 scale for 32 numbers
            "nf4 vidlm": 0.562,  # a float32 scale for 64
            "fp4 vidlm": 0.562,
        }
        assert forms["bf16 vidlm"]["speed"] == 1
        errors = [forms[f"{kind} vidlm"]["error"] for kind in ("bf16", "int8", "int4")]
        assert 0 < errors[0] < errors[1] < errors[2] < 0.15
        assert all(form["us"] > 0 and form["speed"] > 0 for form in forms.values())


# ---- arithmetic ------------------------------------------------------------------------------


def test_ratios_of_quantized_are_better_above_1(quantized: ModuleType) -> None:
    plain = {"prefill_seconds": 4.0, "decode_tokens_per_second": 10.0}
    int8 = {"prefill_seconds": 5.0, "decode_tokens_per_second": 20.0}
    coded = {"prefill_seconds_kv_int8": 8.0, "decode_tokens_per_second_kv_int8": 25.0}
    other = {"prefill_seconds": 20.0, "decode_tokens_per_second": 5.0}
    kv = {"prefill_seconds_kv_int8": 1.0, "decode_tokens_per_second_kv_int8": 1.0}  # left alone
    medians = {"bf16": {**plain, **kv}, "int8": {**int8, **coded}, "q8_0": other}
    found = quantized.ratios("int8", medians)
    assert {who: list(row.values()) for who, row in found.items()} == {
        "over_bf16": [0.8, 2.0, 0.5, 2.5],
        "over_q8_0": [4.0, 4.0, 2.5, 5.0],
    }
    assert found["over_q8_0"].keys() == int8.keys() | coded.keys()
    del medians["q8_0"]  # llama.cpp was not there, or failed
    assert quantized.ratios("int8", medians).keys() == {"over_bf16"}


def test_keys_and_values_in_int8_are_asked_of_an_engine(
    quantized: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def run(model: Any, requests: Sequence[Any], *, options: Any) -> Iterator[Any]:
        (request,) = requests
        asked.append((model, options.kv_dtype, options.share))
        asked.append((request.prompt.ids, request.params.max_new_tokens))
        yield from (SimpleNamespace(id=id) for id in (7, 8, 9))

    monkeypatch.setattr(quantized, "run", run)
    side, prompt = SimpleNamespace(model="model"), {"input_ids": torch.tensor([[1, 2]])}
    answered = quantized.with_int8_kv(side, prompt, 3)
    assert asked == [("model", "int8", False), ((1, 2), 3)]
    assert answered.ids == (7, 8, 9)
    assert 0 <= answered.first <= answered.whole


def test_a_form_that_gives_something_else_than_its_weights_is_refused(
    quantized_linear: ModuleType,
) -> None:
    linears, bf16 = import_module("_linears"), torch.bfloat16
    weight, x = torch.randn(64, 128).to(bf16), torch.randn(2, 128).to(bf16)

    def wrong(weight: torch.Tensor) -> Any:
        packed = linears.ours("int8", weight)
        return replace(packed, weight=1.1 * packed.weight)

    right = quantized_linear.runner(
        linears.Form("int8", partial(linears.ours, "int8")), weight, x, 2
    )
    assert 0 < right.error < 0.02
    with pytest.raises(ValueError, match="something else than its own weights"):
        quantized_linear.runner(linears.Form("wrong", wrong), weight, x, 2)
