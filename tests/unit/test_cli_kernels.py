"""What the command line says of the kernels: that they are compiled, or why there are none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import clips
from vidlm import native

ROOT = Path(__file__).resolve().parents[2]
STAGES = ["load", "read", "prepare", "encode", "prefill", "answer"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    if not native.status().used:
        pytest.skip(native.status().reason)
    (tmp_path / "clip.mp4").write_bytes(clips.clip(12))
    return tmp_path


def run(folder: Path, *words: str, **more: str) -> tuple[str, str]:
    """Its stdout and stderr."""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", **more}
    done = subprocess.run(
        [sys.executable, "-m", "vidlm.cli", *words],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def stages(said: str) -> list[str]:
    lines = (line for line in said.splitlines() if not line.startswith("vidlm: note: "))
    return [line[12:20].strip() for line in lines]


ASK = ("ask", "clip.mp4", "What?", "--model", "demo")


def test_compiling_is_a_stage_of_its_own_and_once(folder: Path) -> None:
    cache = str(folder / "cache")
    _, said = run(folder, *ASK, XDG_CACHE_HOME=cache)
    assert stages(said) == ["compile", *STAGES]
    assert "CPU kernels for this machine, once" in said
    assert stages(run(folder, *ASK, XDG_CACHE_HOME=cache)[1]) == STAGES


def test_without_a_compiler_or_switched_off_a_line_says_so(folder: Path) -> None:
    nothing = {"PATH": str(folder), "XDG_CACHE_HOME": str(folder / "cache")}
    _, said = run(folder, *ASK, **nothing)
    assert stages(said) == STAGES
    assert "no C compiler" in said
    assert "several times slower" in said
    _, said = run(folder, *ASK, VIDLM_NATIVE="0")
    assert stages(said) == STAGES
    assert "switched off by VIDLM_NATIVE=0" in said
    assert run(folder, *ASK, "--quiet", **nothing)[1] == ""


def test_info_has_a_line_for_each_kind_of_work(folder: Path) -> None:
    told, _ = run(folder, "info", "demo")
    assert "kernels  compiled for this machine" in told
    for kernel in native.status().kernels:
        assert str(kernel) in told
    values = json.loads(run(folder, "info", "demo", "--json")[0])["kernels"]
    assert values["used"]
    assert len(values["kernels"]) == len(native.status().kernels)
    told, _ = run(folder, "info", "demo", PATH=str(folder), XDG_CACHE_HOME=str(folder / "cache"))
    assert "kernels  none, plain torch is used: no C compiler" in told


def test_an_engine_compiles_before_it_is_asked() -> None:
    code = (
        "import sys, vidlm; lm = vidlm.load('demo');"
        "assert sys.modules['vidlm.native.library']._DECIDED"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
