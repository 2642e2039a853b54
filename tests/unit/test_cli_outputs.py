"""Files that a command cannot write end it with one line: which file, why, and a way out."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import clips

ROOT = Path(__file__).resolve().parents[2]


def vidlm(folder: Path, *words: str, room: int | None = None) -> subprocess.CompletedProcess[str]:
    """In `folder`; no file may have more than `room` bytes."""

    def limit() -> None:
        assert room is not None
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    return subprocess.run(
        [sys.executable, "-m", "vidlm.cli", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=None if room is None else limit,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "clip.mp4").write_bytes(clips.clip(12))
    (tmp_path / "notes.txt").write_text("notes")
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


INDEX = ("index", "clip.mp4", "--model", "demo", "-o")


@pytest.mark.parametrize(
    ("words", "room", "said"),
    [
        (("demo", "--out", "notes.txt"), None, "notes.txt could not be made (a file of that name"),
        (("demo", "--out", "new"), 1000, "scene.mp4 could not be written (File too large)"),
        (
            ("frames", "clip.mp4", "-o", "notes.txt/x.png"),
            None,
            "notes.txt could not be made (a fi",
        ),
        (("frames", "clip.mp4", "-o", "x.png"), 1000, "x.png could not be written (File too large"),
        ((*INDEX, "x.safetensors"), 1000, "x.safetensors could not be written (File too large"),
        ((*INDEX, "notes.txt/x.safetensors"), None, "notes.txt could not be made (a file of"),
    ],
)
def test_a_file_that_cannot_be_written(
    folder: Path, words: tuple[str, ...], room: int | None, said: str
) -> None:
    before = names(folder)
    done = vidlm(folder, *words, room=room)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert said in done.stderr.splitlines()[-1]
    assert names(folder) == before
    assert (folder / "notes.txt").read_text() == "notes"
