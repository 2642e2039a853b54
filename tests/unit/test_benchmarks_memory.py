"""benchmarks/large_pages.py and kept_memory.py do all they say, in small or for one turn."""

from __future__ import annotations

import mmap

import pytest

from benchmark_scripts import lines


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no large pages")
def test_large_pages_runs() -> None:
    (line,) = lines("large_pages.py", "--runs", "1", "--kinds", "int4")
    assert line["weights"] == "int4"
    assert line["ratio"] == pytest.approx(line["seconds"] / line["torch_seconds"], abs=0.01)
    assert 0 <= line["in_large_pages"] <= 1


def test_kept_memory_runs() -> None:
    (line,) = lines("kept_memory.py", "--runs", "1", "--tiny")
    base = line["given_back"]["seconds"]
    for how in ("kept", "layers", "given_back"):
        assert set(line[how]) == {"seconds", "page_faults", "peak_gib"}
    for how, ratio in line["ratios"].items():
        assert ratio == pytest.approx(line[how]["seconds"] / base, abs=0.01)
