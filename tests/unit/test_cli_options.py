"""The options that commands share: how a model is loaded, and what is said of misspelt words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from vidlm.cli import application
from vidlm.cli.options import Ask, Frames, Index, Info
from vidlm.demo.world import draw_clip, write_mp4
from vidlm.plan import plan

LOADS = ("--dtype", "--quantize", "--kv-dtype", "--device", "--max-memory")
CHOOSES = ("--frames", "--fps", "--start", "--end", "--sampling", "--times", "--indices")
READS = ("--allow-private", "--timeout")
COMMANDS = {
    "ask": (*CHOOSES, *READS, *LOADS, "--quiet", "--debug"),
    "index": (*CHOOSES, *READS, *LOADS, "--quiet", "--debug"),
    "frames": (*CHOOSES, *READS, "--debug"),
    "info": (*LOADS, *READS, "--debug"),
    "demo": ("--debug",),
    "bench latency": (*READS, *LOADS, "--quiet", "--debug"),
    "bench throughput": (*READS, *LOADS, "--quiet", "--debug"),
    "bench decode": (*READS, "--quiet", "--debug"),
}


def run(*words: str | Path) -> int:
    """The exit code of `vidlm ...`, here and now."""
    with pytest.raises(SystemExit) as ended:
        application()([*map(str, words)])
    return int(ended.value.code or 0)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    write_mp4(draw_clip(np.random.default_rng(0)), tmp_path / "clip.mp4")
    return tmp_path / "clip.mp4"


def shown(command: str) -> list[str]:
    """The options of a command in the order in which --help shows them."""
    found: Any = typer.main.get_command(application())
    for word in command.split():
        found = found.commands[word]
    return [each.opts[0] for each in found.params if each.opts[0].startswith("-")]


@pytest.mark.parametrize("command", COMMANDS)
def test_shared_options_are_shown_behind_a_commands_own(command: str) -> None:
    found, shared = shown(command), list(COMMANDS[command])
    assert found[-len(shared) :] == shared
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("options", "own"),
    [
        (Ask(videos=["a"], question="b"), "question"),
        (Index(videos=["a"]), "no_kv"),
        (Frames(videos=["a"]), "output"),
        (Info(model="demo"), "video"),
    ],
)
def test_a_commands_options_cannot_be_changed(options: Any, own: str) -> None:
    with pytest.raises(AttributeError):
        setattr(options, own, "other")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--quantize", "int3"), "--quantize 'int3'; allowed: int8, int4, nf4"),
        (("--kv-dtype", "fp8"), "--kv-dtype 'fp8'; allowed: auto (the model's dtype), int8"),
        (("--dtype", "int8"), "--dtype 'int8'; allowed: auto, float32, bfloat16, float16"),
        (("--device", "gpu"), "--device 'gpu'; allowed: 'auto', 'cpu', 'cuda'"),
    ],
)
@pytest.mark.parametrize("command", ["ask", "ask --fit", "index", "info", "bench latency"])
def test_misspelt_words_are_told_before_a_model_is_sought(
    clip: Path,
    command: str,
    words: tuple[str, str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(clip.parent)
    name = "./no-model"
    asked = ["clip.mp4", "What?"] if command.startswith("ask") else ["clip.mp4"]
    given = {"info": [name], "bench latency": [name, "clip.mp4"]}
    rest = given.get(command, [*asked, "--model", name])
    assert run(*command.split(), *rest, *words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith(f"vidlm: {said}")


def test_ask_in_fewer_bits(clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how = ("--quantize", "int8", "--kv-dtype", "int8", "--device", "auto")
    assert run("ask", clip, "What do you see?", "--model", "demo", "--max-tokens", "2", *how) == 0
    out, err = capsys.readouterr()
    assert out.strip()
    assert "demo in int8 with keys and values in int8 on " in err


def test_info_in_fewer_bits(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how = ("--quantize", "nf4", "--kv-dtype", "int8", "--dtype", "bfloat16", "--device", "cpu")
    assert run("info", folder, "--json", *how) == 0
    told = json.loads(capsys.readouterr().out)
    made = plan(folder, quantize="nf4", kv_dtype="int8", dtype="bfloat16")
    for name in ("weight_bytes", "unpacked_bytes", "kv_bytes", "memory_bytes"):
        assert told[name] == getattr(made, name)
    assert told["free_bytes"] > 0
