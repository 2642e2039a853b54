"""`vidlm bench` with the bundled model: what it tells, and what it refuses. No figure is judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import vidlm.native
from vidlm.cli import application, bench, machine
from vidlm.demo.world import draw_clip, write_mp4
from vidlm.engine import Engine, Handle

SHORT = ("--runs", "1", "--max-tokens", "3", "--frames", "2")


@pytest.fixture(autouse=True)
def short_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "DRAWN_SECONDS", 0.5)
    monkeypatch.setattr(bench, "DRAWN_SIDE", 64)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    write_mp4(draw_clip(np.random.default_rng(0)), tmp_path / "clip.mp4")
    return tmp_path / "clip.mp4"


def run(*words: str | Path) -> int:
    """The exit code of `vidlm bench ...`, here and now."""
    with pytest.raises(SystemExit) as ended:
        application()(["bench", *map(str, words)])
    return int(ended.value.code or 0)


def told(capsys: pytest.CaptureFixture[str], *words: str | Path) -> dict[str, Any]:
    assert run(*words, "--json", "--quiet") == 0
    out, err = capsys.readouterr()
    assert err == ""
    found: dict[str, Any] = json.loads(out)
    return found


def refused(capsys: pytest.CaptureFixture[str], code: int, *words: str | Path) -> str:
    assert run(*words) == code
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()[-1]


# ---- what it tells ---------------------------------------------------------------------------


def test_latency_tells_every_stage(clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, "latency", "demo", clip, *SHORT)
    assert (found["bench"], found["model"], found["video"]) == ("latency", "demo", str(clip))
    assert (found["frames"], found["max_tokens"], found["runs"]) == (2, 3, 1)
    figures = {name: summary["median"] for name, summary in found["figures"].items()}
    stages = [figures[f"{stage}_seconds"] for stage in ("read", "prepare", "encode", "prefill")]
    assert figures["first_token_seconds"] == pytest.approx(sum(stages))
    assert figures["whole_seconds"] >= figures["first_token_seconds"]
    assert figures["decode_tokens_per_second"] > 0
    assert all(seconds > 0 for seconds in stages)


def test_every_run_starts_with_empty_caches(
    clip: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []
    clear, submit = Engine.clear, Engine.submit

    def cleared(engine: Engine) -> None:
        clear(engine)
        kept.append(0)

    def counted(engine: Engine, *args: Any) -> Handle:
        kept[-1] += 1
        return submit(engine, *args)

    monkeypatch.setattr(Engine, "clear", cleared)
    monkeypatch.setattr(Engine, "submit", counted)
    told(capsys, "latency", "demo", clip, "--max-tokens", "2", "--frames", "1", "--runs", "3")
    assert kept == [2] * 4  # two questions a run, and a run to warm up


def test_throughput_asks_all_questions_twice(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    submit = Engine.submit

    def noted(engine: Engine, request: Any, *args: Any) -> Handle:
        asked.append(request.prompt)
        return submit(engine, request, *args)

    monkeypatch.setattr(Engine, "submit", noted)
    found = told(capsys, "throughput", "demo", "--questions", "3", *SHORT)
    assert (found["questions"], found["video"]) == (3, None)
    figures = {name: summary["median"] for name, summary in found["figures"].items()}
    quotient = figures["one_after_the_other_seconds"] / figures["together_seconds"]
    assert figures["times_faster"] == pytest.approx(quotient)
    assert len(asked) == 2 * 2 * 3  # one after the other and together; to warm up, and for a run
    assert len({prompt.ids for prompt in asked}) == 3
    assert len({prompt.media[0].digest for prompt in asked}) == 3


def test_throughput_of_a_given_video_is_about_that_one(
    clip: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    digests: set[bytes] = set()
    submit = Engine.submit

    def noted(engine: Engine, request: Any, *args: Any) -> Handle:
        digests.add(request.prompt.media[0].digest)
        return submit(engine, request, *args)

    monkeypatch.setattr(Engine, "submit", noted)
    told(capsys, "throughput", "demo", clip, "--questions", "2", *SHORT)
    assert len(digests) == 1


@pytest.mark.parametrize("drawn", [True, False])
def test_decode_needs_no_model(drawn: bool, clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, "decode", *([] if drawn else [clip]), "--runs", "2", "--frames", "4")
    assert "model" not in found
    figures = found["figures"]
    assert figures["spread_frames_per_second"]["highest"] == pytest.approx(
        4 / figures["spread_seconds"]["lowest"]
    )
    assert figures["in_order_frames_per_second"]["lowest"] > 0


def test_a_table_names_the_machine(clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("latency", "demo", clip, *SHORT) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == f"demo, {clip}, max tokens 3, frames 2"
    assert lines[-1] == machine.sentence(machine.machine())
    assert [line.split("  ")[0].strip() for line in lines if line.rstrip().endswith(" s")] == [
        *("read", "prepare", "encode", "prefill", "first token", "whole"),
        "second question first token",
    ]
    assert "\033" not in out
    assert [line.split()[2] for line in err.splitlines()] == ["load", "run"]


def test_figures_say_how_the_model_was_loaded(
    clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = ("--quantize", "int4", "--kv-dtype", "int8")
    found = told(capsys, "latency", "demo", clip, *SHORT, *how)
    assert (found["dtype"], found["quantize"], found["kv_dtype"]) == (None, "int4", "int8")
    assert run("throughput", "demo", clip, "--questions", "2", *SHORT, *how) == 0
    out, err = capsys.readouterr()
    named = f"demo, {clip}, quantize int4, kv dtype int8, questions 2, max tokens 3, frames 2"
    assert out.splitlines()[0] == named
    assert "demo in int4 with keys and values in int8 on cpu" in err


# ---- what it refuses -------------------------------------------------------------------------


def test_stdin_cannot_be_read_several_times(capsys: pytest.CaptureFixture[str]) -> None:
    assert "name a file" in refused(capsys, 2, "decode", "-")


@pytest.mark.parametrize("words", [("decode",), ("latency", "nowhere/at-all")])
def test_a_video_is_looked_for_before_a_model(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, 1, *words, "gone.mp4")
    assert line.startswith("vidlm: ")
    assert "gone.mp4" in line


def test_a_folder_without_a_model_is_named(clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, 1, "throughput", clip.parent, clip, "--quiet")
    assert line.startswith("vidlm: ")
    assert str(clip.parent) in line


@pytest.mark.parametrize("option", ["--runs", "--frames"])
def test_counts_begin_with_one(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert option in refused(capsys, 2, "decode", option, "0")


# ---- its parts -------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1e9), min_size=1, max_size=9))
def test_a_median_lies_between_the_runs(values: list[float]) -> None:
    found = bench.summary(values)
    assert found["lowest"] <= found["median"] <= found["highest"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("first_token_seconds", ("first token", "s")),
        ("decode_tokens_per_second", ("decode", "tokens/s")),
        ("spread_frames_per_second", ("spread", "frames/s")),
        ("peak_gib", ("peak", "GiB")),
        ("times_faster", ("times faster", "")),
    ],
)
def test_names_are_shown_as_words(name: str, shown: tuple[str, str]) -> None:
    assert bench.label(name) == shown


def test_a_machine_without_kernels_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    status = vidlm.native.Status(used=False, reason="no compiler")
    monkeypatch.setattr(vidlm.native, "status", lambda: status)
    assert machine.sentence(machine.machine()).endswith("plain torch (no compiler)")


def test_a_machine_has_a_processor_and_cores() -> None:
    assert machine.processor()
    assert machine.cores() >= 1
