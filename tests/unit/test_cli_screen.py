"""Progress on terminals of every kind: narrow, dumb, without colours, and none."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vidlm.cli import progress
from vidlm.cli.progress import Progress, printable


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal(monkeypatch: pytest.MonkeyPatch, columns: int = 80, **environment: str) -> Terminal:
    """What stderr is from now on; a fixture would be replaced by pytest's own capture."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in ({"TERM": "xterm"} | environment).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(progress, "_columns", lambda: columns)
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    return screen


def rows(text: str, columns: int) -> list[str]:
    """What a terminal of so many columns shows after plain text with carriage returns."""
    shown, row, at = [], [" "] * columns, 0
    for c in text:
        if c == "\r":
            at = 0
        elif c == "\n":
            shown.append("".join(row).rstrip())
            row, at = [" "] * columns, 0
        else:
            if at == columns:  # wraps
                shown.append("".join(row).rstrip())
                row, at = [" "] * columns, 0
            row[at] = c
            at += 1
    return [*shown, "".join(row).rstrip()]


@pytest.mark.parametrize("columns", [20, 25, 80])
def test_what_goes_on_fits_one_row(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch, columns, NO_COLOR="1")
    shown = Progress(quiet=False)
    shown.now("loading llava-hf/llava-interleave-qwen-0.5b-hf")
    shown.now("reading")
    assert "loading"[: columns - 13] in screen.getvalue()
    shown.clear()
    assert rows(screen.getvalue(), columns) == [""]


@pytest.mark.parametrize("wide", ["映画" * 40, "e\u0301" * 100])
def test_wide_and_combining_letters_are_counted(wide: str, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch, 40)
    Progress(quiet=False).now(wide)
    text = screen.getvalue().removeprefix("\r\033[K\033[2m").removesuffix("\033[0m")
    assert 36 <= progress._width(text) < 40


def broken_off(shown: Progress) -> None:
    with suppress(ValueError), shown:
        shown.now("loading")
        shown.done(1.0, "load", "demo")
        shown.note("this")
        shown.now("reading")
        raise ValueError


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_no_escape_sequence(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch, **{name: value})
    broken_off(Progress(quiet=False))
    assert "\033" not in screen.getvalue()
    assert rows(screen.getvalue(), 80) == [
        "    1.00 s  load     demo",
        "vidlm: note: this",
        "",
    ]


@given(st.text())
def test_what_is_shown_has_no_control_characters(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    shown.encode()  # nor lone surrogates


def test_the_width_is_that_of_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "33")
    assert progress._columns() == 33  # stderr of tests is no terminal
    monkeypatch.setattr(os, "get_terminal_size", lambda number: os.terminal_size((44, 9)))
    assert progress._columns() == 44
