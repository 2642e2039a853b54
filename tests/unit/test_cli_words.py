"""What a newcomer types first, what is noted on stderr, and Ctrl-C at any moment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import web
from house import ROOT
from vidlm import VideoHandle, __version__, load
from vidlm.cli.options import Ask, Index
from vidlm.cli.outcome import outcome
from vidlm.demo.world import draw_clip, write_mp4
from vidlm.hf import FrameOptions

ask, index = (import_module(f"vidlm.cli.{name}") for name in ("ask", "index"))
POSIX = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_mp4(draw_clip(np.random.default_rng(0)), tmp_path / "clip.mp4")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*words: str | bytes, **more: str) -> tuple[list[Any], dict[str, str]]:
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}
    return [sys.executable, "-m", "vidlm", *words], environment


def vidlm(*words: str | bytes, **more: str) -> subprocess.CompletedProcess[str]:
    line, environment = command(*words, **more)
    done = subprocess.run(line, env=environment, capture_output=True, check=False)
    return subprocess.CompletedProcess(
        line, done.returncode, done.stdout.decode(), done.stderr.decode()
    )


# ---- the first words -------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["--version", "-V", "version"])
def test_the_version_by_any_word(word: str) -> None:
    done = vidlm(word)
    assert (done.returncode, done.stdout) == (0, f"vidlm {__version__}\n")


def test_help_by_any_word() -> None:
    whole, one = vidlm("--help"), vidlm("ask", "--help")
    assert vidlm("help").stdout == whole.stdout
    assert vidlm("help", "ask").stdout == one.stdout
    assert vidlm("help", "bench", "decode").stdout == vidlm("bench", "decode", "-h").stdout
    for shown in (whole.stdout, one.stdout):
        assert '    vidlm ask vidlm-demo/scene.mp4 "What happens?" --model demo\n' in shown
    assert "--install-completion" in whole.stdout
    assert "--show-completion" in whole.stdout


def test_the_examples_of_help_run(place: Path) -> None:
    (place / "vidlm-demo").mkdir()
    (place / "clip.mp4").rename("vidlm-demo/scene.mp4")
    path = os.pathsep.join([str(place), os.environ["PATH"]])
    program = place / "vidlm"
    line, environment = command()
    program.write_text(f'#!/bin/sh\nexec {" ".join(line)} "$@"\n')
    program.chmod(0o755)
    shown = vidlm("ask", "--help").stdout.splitlines()
    examples = [each.strip() for each in shown if "scene.mp4" in each]
    assert len(examples) == 3
    for example in examples:
        done = subprocess.run(
            example, shell=True, env={**environment, "PATH": path}, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_words(shell: str) -> None:
    words = {"bash": {"COMP_WORDS": "vidlm ask --mo", "COMP_CWORD": "2"}}
    own = words.get(shell, {"_TYPER_COMPLETE_ARGS": "vidlm ask --mo"})
    done = vidlm(**own, _VIDLM_COMPLETE=f"complete_{shell}", _TYPER_COMPLETE_FISH_ACTION="get-args")
    assert "--model" in done.stdout
    assert "torch" not in done.stderr


# ---- notes -----------------------------------------------------------------------------------


def asked(given: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> tuple[str, list[str]]:
    options = Ask(**{"videos": ["clip.mp4"], "question": "What?", "model": "demo", **given})
    assert outcome(ask.ask, options) == 0
    told = capfd.readouterr()
    return told.out, [line for line in told.err.splitlines() if line.startswith("vidlm: note: ")]


def test_the_demo_model_says_what_it_knows(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for given in ({}, {"json": True}):
        out, notes = asked(given, capfd)
        assert [note for note in notes if "knows drawn moving shapes only" in note] == notes[:1]
        assert "knows drawn" not in out
    assert asked({"quiet": True}, capfd)[1] == []


def test_an_answer_that_is_cut_off_is_told(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _, notes = asked({"max_tokens": 2}, capfd)
    assert notes[1:] == ["vidlm: note: the answer is cut off at 2 tokens (--max-tokens)"]
    assert len(asked({"max_tokens": 200}, capfd)[1]) == 1
    out, _ = asked({"max_tokens": 2, "json": True}, capfd)
    assert json.loads(out)["finish_reason"] == "length"


def test_images_of_one_folder_may_be_meant_as_a_video(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (place / "imgs").mkdir()
    images = [f"imgs/f{i}.png" for i in range(4)]
    for image in images:
        Image.new("RGB", (64, 64)).save(image)
    _, notes = asked({"videos": images}, capfd)
    assert any("quote the pattern: 'imgs/*.png'" in note for note in notes)
    for one in ("imgs", "imgs/", "imgs/*.png"):
        out, notes = asked({"videos": [one], "json": True}, capfd)
        assert len(json.loads(out)["frames"]) == 4
        assert not any("quote the pattern" in note for note in notes)


# ---- sources that are read once --------------------------------------------------------------


def test_a_url_is_downloaded_once(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (64, 64)).save("still.png")
    with web.serve() as server:
        server.pages = {name: (Path(name).read_bytes(), {}) for name in ("clip.mp4", "still.png")}
        urls = [f"{server.url}/page/{name}" for name in server.pages]
        out, _ = asked({"videos": urls, "allow_private": True, "json": True}, capfd)
        assert [path for path, _ in server.seen] == ["/page/clip.mp4", "/page/still.png"]
        target = place / "saved.safetensors"
        given = Index(videos=urls[:1], model="demo", output=target, allow_private=True)
        assert outcome(index.index, given) == 0
        capfd.readouterr()
    assert VideoHandle.load(load("demo"), target, FrameOptions()).name == urls[0]
    local, _ = asked({"videos": list(server.pages), "json": True}, capfd)
    assert json.loads(out)["text"] == json.loads(local)["text"]
    assert json.loads(out)["sources"] == urls


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_is_read_once(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    os.mkfifo("pipe")
    writer = subprocess.Popen("cat clip.mp4 > pipe", shell=True)
    out, _ = asked({"videos": ["pipe"], "json": True}, capfd)
    assert writer.wait() == 0
    assert json.loads(out)["text"] == json.loads(asked({"json": True}, capfd)[0])["text"]


# ---- text that Python could not decode -------------------------------------------------------


def test_a_question_in_the_posix_locale(place: Path) -> None:
    question = "Où est le carré?"
    options = ("--model", "demo", "--json", "--quiet")
    done = vidlm("ask", "clip.mp4", question.encode(), *options, **POSIX)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["question"] == question
    done = vidlm("ask", "clip.mp4", b"\xff", *options, **POSIX)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("vidlm: the question is not UTF-8; set LC_ALL")


def test_a_files_name_in_the_posix_locale(place: Path) -> None:
    os.rename("clip.mp4", "où.mp4".encode())
    done = vidlm("frames", "où.mp4".encode(), "--model", "demo", **POSIX)
    assert (done.returncode, done.stdout) == (0, "où_frames.png\n")
    assert Path("où_frames.png").is_file()


# ---- Ctrl-C ----------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["start", "options", "imports", "end"])
def test_ctrl_c_is_one_word_at_any_moment(place: Path, moment: str) -> None:
    code = {
        "start": "import vidlm.cli as cli; cli.application = stop; cli.main()",
        "options": "import vidlm.cli as cli, vidlm.cli.commands as c; c.build = stop; cli.main()",
        "imports": (
            "import builtins, vidlm.cli as cli; real = builtins.__import__\n"
            "def watch(name, *rest, **more):\n"
            "    stop() if name == 'torch' else None\n"
            "    return real(name, *rest, **more)\n"
            "builtins.__import__ = watch; cli.main()"
        ),
        "end": (
            "import vidlm.cli as cli, importlib; a = importlib.import_module('vidlm.cli.ask')\n"
            "a._last_token = stop; cli.main()"
        ),
    }[moment]
    head = (
        "import os, signal, sys\n"
        "sys.argv = ['vidlm', 'ask', 'clip.mp4', 'What?', '--model', 'demo']\n"
        "def stop(*args, **kwargs): os.kill(os.getpid(), signal.SIGINT)\n"
    )
    _, environment = command()
    done = subprocess.run(
        [sys.executable, "-c", head + code], env=environment, capture_output=True, check=False
    )
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1] == b"vidlm: interrupted"
    assert b"Traceback" not in done.stderr


def test_an_import_that_was_broken_off_is_an_interrupt(capfd: pytest.CaptureFixture[str]) -> None:
    def run(options: object) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ImportError("numpy failed to load") from error

    assert outcome(run, SimpleNamespace(debug=False)) == 130
    assert capfd.readouterr().err == "vidlm: interrupted\n"


def test_a_process_that_ignores_ctrl_c_goes_on(place: Path) -> None:
    line, environment = command("ask", "clip.mp4", "What?", "--model", "demo")
    process = subprocess.Popen(
        ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *line],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    process.stderr.readline()
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate()
    assert process.returncode == 0
    assert out.strip()
