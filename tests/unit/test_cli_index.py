"""`vidlm index`, and `vidlm ask` about what it saved."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

import tiny
from vidlm.cli import application
from vidlm.cli.options import Ask, Index
from vidlm.cli.outcome import outcome
from vidlm.demo.world import draw_clip, write_mp4

ask, index = (import_module(f"vidlm.cli.{name}") for name in ("ask", "index"))
Told = Callable[[], Any]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with two clips in it."""
    for i in range(2):
        write_mp4(draw_clip(np.random.default_rng(i)), tmp_path / f"clip{i}.mp4")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def told(capfd: pytest.CaptureFixture[str]) -> Told:
    return capfd.readouterr


def save(folder: Path, *videos: str, **options: object) -> int:
    given = {"output": None, "frames": 3, **options}
    return outcome(index.index, Index(videos=list(videos), model=str(folder), **given))


def answer(folder: Path, told: Told, *videos: str, **options: object) -> dict[str, object]:
    given = Ask(videos=list(videos), question="What?", model=str(folder), max_tokens=6, json=True)
    said = outcome(ask.ask, SimpleNamespace(**{**vars(given), **options}))
    assert said == 0
    values: dict[str, object] = json.loads(told().out.splitlines()[-1])
    return values


def test_saved_videos_are_asked_about(folder: Path, place: Path, told: Told) -> None:
    assert save(folder, "clip0.mp4") == 0
    said = told()
    assert said.out == "clip0.safetensors\n"
    assert "read     clip0.mp4, 3 frames" in said.err
    assert "save     clip0.safetensors, " in said.err
    whole = answer(folder, told, "clip0.mp4", frames=3)
    saved = answer(folder, told, "clip0.safetensors")
    assert saved["text"] == whole["text"]
    assert (saved["frames"], saved["usage"]) == (whole["frames"], whole["usage"])
    Path("clip0.mp4").unlink()
    both = answer(folder, told, "clip0.safetensors", "clip1.mp4", frames=3)
    assert len(both["frames"]) == 6


def test_several_go_into_a_folder(folder: Path, place: Path, told: Told) -> None:
    assert save(folder, "clip0.mp4", "clip1.mp4", output=Path("saved"), quiet=True) == 0
    said = told()
    assert said.out.split() == ["saved/clip0.safetensors", "saved/clip1.safetensors"]
    assert said.err == ""


def test_without_keys_and_values(folder: Path, place: Path, told: Told) -> None:
    assert save(folder, "clip0.mp4", output=Path("a.safetensors"), no_kv=True) == 0
    assert not [name for name in load_file("a.safetensors") if name.startswith("kv.")]
    assert save(folder, "clip0.mp4", output=Path("a.safetensors"), force=True, system="Hm.") == 0
    assert [name for name in load_file("a.safetensors") if name.startswith("kv.")]


def test_an_image_and_stdin(
    folder: Path, place: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.picture(0).save("still.png")
    assert save(folder, "still.png", frames=None) == 0
    assert "still.png, an image" in told().err
    piped = SimpleNamespace(buffer=io.BytesIO(Path("clip0.mp4").read_bytes()), isatty=lambda: False)
    monkeypatch.setattr("sys.stdin", piped)
    assert save(folder, "-", output=Path("piped.safetensors")) == 0
    assert answer(folder, told, "piped.safetensors")["text"]


@pytest.mark.parametrize(
    ("videos", "options", "said"),
    [
        (["clip0.mp4"], {"output": Path("a.bin")}, "--output a.bin: a saved video ends with"),
        (["there.mp4"], {}, "there.safetensors exists already; replace it with --force"),
        (["clip0.mp4", "x/clip0.mp4"], {}, "two of the videos would be saved as one file"),
        (["a.safetensors"], {}, "a.safetensors is a saved video already"),
        (["-"], {}, "has no name; give one with --output"),
        (["clip0.mp4"], {"fps": 2.0}, "--frames 3 and --fps 2 exclude each other"),
    ],
)
def test_what_is_refused(
    place: Path, told: Told, videos: list[str], options: dict[str, object], said: str
) -> None:
    """Before a model is loaded: there is none."""
    Path("there.safetensors").touch()
    assert save(Path("no-model"), *videos, **options) == 2
    assert said in told().err
    assert Path("there.safetensors").read_bytes() == b""


def test_what_is_not_there(folder: Path, place: Path, told: Told) -> None:
    assert save(Path("no-model"), "nothing.mp4") == 1
    assert "nothing.mp4" in told().err
    given = Ask(videos=["nothing.safetensors"], question="What?", model=str(folder))
    assert outcome(ask.ask, given) == 1
    assert "nothing.safetensors" in told().err
    assert save(folder, "clip0.mp4") == 0
    fit = Ask(videos=["clip0.safetensors"], question="What?", model=str(folder), fit=True)
    assert outcome(ask.ask, fit) == 2
    assert "those of a saved video are chosen" in told().err


@pytest.mark.parametrize(("saved", "asked"), [("int8", "auto"), (None, "int8")])
def test_keys_and_values_keep_their_dtype(
    folder: Path, place: Path, told: Told, saved: str | None, asked: str
) -> None:
    """Another is refused by name; features alone are for all."""
    assert save(folder, "clip0.mp4", kv_dtype=saved) == 0
    line = told().err.splitlines()[0]
    assert ("with keys and values in int8" in line) == (saved == "int8")
    again = answer(folder, told, "clip0.safetensors", kv_dtype=saved)
    other = Ask(videos=["clip0.safetensors"], question="What?", model=str(folder), kv_dtype=asked)
    assert outcome(ask.ask, other) == 2
    said = told()
    assert said.out == ""
    mine, theirs = (None if word == "auto" else word for word in (asked, saved))
    assert f"whose kv_dtype is {theirs!r}, this one's is {mine!r}; " in said.err
    assert f"load the model with --kv-dtype {saved or 'auto'}, or save the video again" in said.err
    assert save(folder, "clip0.mp4", kv_dtype=saved, no_kv=True, force=True) == 0
    told()
    features = answer(folder, told, "clip0.safetensors", kv_dtype=asked)
    assert features["frames"] == again["frames"]


@pytest.mark.parametrize(("saved", "way"), [("int8", "--quantize int8"), (None, "--quantize")])
def test_weights_keep_their_bits(
    folder: Path, place: Path, told: Told, saved: str | None, way: str
) -> None:
    assert save(folder, "clip0.mp4", quantize=saved) == 0
    told()
    words = {"question": "What?", "model": str(folder), "quantize": None if saved else "int4"}
    assert outcome(ask.ask, Ask(videos=["clip0.safetensors"], **words)) == 2
    said = told()
    assert said.out == ""
    load = f"load the model with {way}" if saved else f"load the original weights without {way}"
    assert f"{load}, or save the video again with this one" in said.err


def test_it_is_a_command() -> None:
    names = [command.name for command in application().registered_commands]
    assert "index" in names
