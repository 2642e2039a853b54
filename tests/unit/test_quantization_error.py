"""benchmarks/quantization_error.py: what it counts, what it writes, and that it runs."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmark_scripts import SCRIPTS, lines

PAGE = "# Errors\n\n{}\nold\n{}\n\nMore.\n"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return import_module("quantization_error")


def test_drift(script: ModuleType) -> None:
    drift = script.Drift()
    reference = torch.tensor([[3.0, -3.0, 0.0], [0.0, 4.0, -4.0]])
    drift.add(reference + 100, reference)  # which a softmax does not see
    assert (drift.error, drift.share) == (0, 1)
    drift.add(torch.tensor([[0.0, 4.0, -4.0]]) * 0.5, reference[1:])
    assert drift.error == pytest.approx((8 / (18 + 32 + 32)) ** 0.5)
    drift.add(reference[:1], reference[1:])
    assert (drift.same, drift.tokens, drift.share) == (3, 4, 0.75)


def test_a_table_holds_what_was_measured(script: ModuleType) -> None:
    demo = {"tokens": 90, "prompts": 2, "score": 97.5, "n": 40}
    seen = {"error": 0.0123, "same": 0.999, "error_at_once": 1.0, "same_at_once": 1.0}
    found = {"demo": demo, "schemes": {"int8": {"demo": {**seen, "points": -2.5}}}}
    assert script.table(found).splitlines() == [
        "| against bfloat16 | demo: error | same token | score, points |",
        "| --- | --: | --: | --: |",
        "| int8 | 1.23% | 99.90% | -2.5 |",
        "",
        "Demo: 90 tokens of 2 answers; in bfloat16 it scores 97.5 of 100 in 40 questions.",
    ]


def test_a_page_keeps_what_is_around(script: ModuleType) -> None:
    page = PAGE.format(*script.MARKS)
    assert script.replaced(page, "new") == page.replace("old", "new")
    begin, end = script.MARKS
    for wrong in (PAGE.format(begin, ""), PAGE.format(end, begin), page + end):
        with pytest.raises(SystemExit, match="each once and in this order"):
            script.replaced(wrong, "new")


def test_it_runs(script: ModuleType, tmp_path: Path) -> None:
    """On the demo: SmolLM2 would be downloaded."""
    page = tmp_path / "page.md"
    page.write_text(PAGE.format(*script.MARKS))
    words = ["--models", "demo", "--n", "12", "--clips", "2", "--table", str(page)]
    (found,) = lines("quantization_error.py", *words, "--only", "float32", "bitsandbytes nf4")
    assert found["demo"]["tokens"] >= 2 * found["demo"]["shortest"] > 20
    rounding, four = (each["demo"] for each in found["schemes"].values())
    for way in ("error", "error_at_once"):
        assert 0 < rounding[way] < four[way] < 0.2
    assert rounding["same"] == 1
    assert "| float32 | " in page.read_text()
