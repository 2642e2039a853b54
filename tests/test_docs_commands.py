"""The commands that README.md shows run as they are printed, in their order, without a hub."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from house import ROOT
from vidlm.cli import application

BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.M | re.S)


def commands(text: str) -> list[list[str]]:
    """The arguments of every `vidlm` command in a page's sh blocks."""
    lines = (line for block in BLOCK.findall(text) for line in block.splitlines())
    split = (shlex.split(line, comments=True) for line in lines)
    return [words[1:] for words in split if words[:1] == ["vidlm"]]


def test_commands_are_found() -> None:
    page = '```sh\nmake demo\nvidlm ask "a b.mp4" "What?"  # a comment\n```\n\n`vidlm info`\n'
    assert commands(page) == [["ask", "a b.mp4", "What?"]]


def test_the_readmes_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown = commands((ROOT / "README.md").read_text("utf-8"))
    assert {arguments[0] for arguments in shown} >= {"demo", "ask", "index", "info", "frames"}
    for arguments in shown:
        result = CliRunner().invoke(application(), arguments)
        assert result.exit_code == 0, (arguments, result.output, result.exception)
