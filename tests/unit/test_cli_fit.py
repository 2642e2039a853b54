"""`vidlm ask --fit`: how many frames are taken is found before anything is loaded.

A frame of the folder's model takes 16 tokens of a context of 512.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vidlm import plan
from vidlm.cli.options import Ask
from vidlm.cli.outcome import outcome
from vidlm.demo.world import draw_clip, write_mp4
from vidlm.fit import size

ask = import_module("vidlm.cli.ask")  # the package has a function of this name


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a clip of 24 frames in it."""
    write_mp4(draw_clip(np.random.default_rng(0)), tmp_path / "clip.mp4")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(folder: Path, *videos: str, **options: Any) -> int:
    given = {"max_tokens": 2, "fit": True, "json": True, **options}
    return outcome(ask.ask, Ask(videos=list(videos), question="What?", model=str(folder), **given))


def frames(capfd: pytest.CaptureFixture[str]) -> int:
    return len(json.loads(capfd.readouterr().out)["frames"])


def test_no_more_frames_than_fit(
    folder: Path, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without it so many are refused, once the model is there and the clip is read."""
    assert run(folder, "clip.mp4", fps=12.0, max_tokens=100, fit=False) == 0
    assert frames(capfd) == 24
    assert run(folder, "clip.mp4", fps=12.0, max_tokens=300) == 0
    told = capfd.readouterr()
    assert len(json.loads(told.out)["frames"]) == (512 - 300 - 64 - len("What?")) // 16 == 8
    assert "fit      at most 8 frames of each video" in told.err


def test_fewer_of_the_usual_ones(
    folder: Path, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of eight, which are usual, no more than fit; and never more than eight."""
    assert run(folder, "clip.mp4") == 0
    assert frames(capfd) == 8
    assert run(folder, "clip.mp4", "clip.mp4", max_tokens=250) == 0
    assert frames(capfd) == 2 * 6


def test_frames_that_were_asked_for_are_all_taken_or_none(
    folder: Path, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, "clip.mp4", frames=7, max_tokens=300) == 0
    assert frames(capfd) == 7
    assert run(folder, "clip.mp4", times="0,1,0.5", max_tokens=300) == 0
    assert frames(capfd) == 3
    for options in ({"frames": 12}, {"indices": ",".join(map(str, range(12)))}):
        assert run(folder, "clip.mp4", max_tokens=300, **options) == 2
        told = capfd.readouterr()
        assert told.out == ""
        assert "12 frames take 192 tokens" in told.err
        assert "at most 8 frames fit" in told.err


def test_memory_counts(
    folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    made = plan.plan(folder, max_tokens=2)
    room = made.fixed_bytes + 10**6 + 3 * made.bytes_per_frame
    monkeypatch.setattr(plan, "free_memory", lambda *where: room)
    assert run(folder, "clip.mp4") == 0
    assert frames(capfd) == 3
    assert run(folder, "clip.mp4", frames=5) == 2
    assert "5 frames take" in capfd.readouterr().err


def test_fewer_bits_count(
    folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of weights, and of keys and values: just enough room for three frames, and else for two."""
    words = {"quantize": "int8", "kv_dtype": "int8"}
    made = plan.plan(folder, max_tokens=2, **words)
    words_bytes = made.kv_bytes_per_token * len("What?")
    room = made.fixed_bytes + words_bytes + 3 * made.bytes_per_frame
    monkeypatch.setattr(plan, "free_memory", lambda *where: room)
    assert run(folder, "clip.mp4", **words) == 0
    assert frames(capfd) == 3
    for fewer in ({"quantize": "int8"}, {"kv_dtype": "int8"}, {}):
        assert run(folder, "clip.mp4", **fewer) == 0
        assert frames(capfd) == 2
    monkeypatch.setattr(plan, "free_memory", lambda *where: made.weight_bytes)
    assert run(folder, "clip.mp4", **words) == 2
    said = f"the weights take {size(made.weight_bytes)} in int8 and {size(made.unpacked_bytes)} for"
    assert said in capfd.readouterr().err


def test_nothing_is_loaded_that_does_not_fit(
    folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ask, "load_model", None)
    assert run(folder, "clip.mp4", max_tokens=500) == 2
    assert "shorten the prompt or the answer" in capfd.readouterr().err


def test_images_are_not_for_it(
    folder: Path, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (40, 30)).save("still.png")
    assert run(folder, "still.png") == 2
    assert "an image was given" in capfd.readouterr().err
