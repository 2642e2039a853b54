"""Progress on stderr: a line for each stage that is done, and on a terminal what goes on now."""

from __future__ import annotations

import os
import shutil
import sys
import unicodedata
from types import TracebackType
from typing import Self

DIM, PLAIN, CLEAR = "\033[2m", "\033[0m", "\r\033[K"


class Progress:
    """Says nothing when `quiet`. Without a terminal, on a dumb one or with NO_COLOR, no escape
    sequence is written."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._escapes = self._terminal and not os.environ.get("NO_COLOR")
        self._shown = 0  # columns that what goes on now takes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, where: TracebackType | None
    ) -> None:
        """An error's line must not begin behind what was going on."""
        if kind is not None:
            self._write(self._clear())

    def now(self, what: str) -> None:
        """What goes on now, in one row, until the next line takes its place; on terminals only."""
        if self._terminal:
            text = _fitted(f"{'':10}  {printable(what)} ...", _columns() - 1)
            clear = self._clear()
            self._shown = _width(text)
            self._write(clear + self._shade(text))

    def done(self, seconds: float, stage: str, what: str) -> None:
        line = f"{seconds:8.2f} s  {stage:<8} {printable(what)}"
        self._write(self._clear() + self._shade(line) + "\n")

    def note(self, text: str) -> None:
        """Something to know that is no error."""
        self._write(f"{self._clear()}vidlm: note: {printable(text)}\n")

    def clear(self) -> None:
        """Take what goes on now off the screen."""
        self._write(self._clear())

    def _clear(self) -> str:
        """What empties the row that `now` wrote into."""
        shown, self._shown = self._shown, 0
        if not self._terminal:
            return ""
        if self._escapes:
            return CLEAR
        return f"\r{' ' * shown}\r" if shown else ""

    def _shade(self, text: str) -> str:
        return f"{DIM}{text}{PLAIN}" if self._escapes else text

    def _write(self, text: str) -> None:
        if not self._quiet and text:
            sys.stderr.write(text)
            sys.stderr.flush()


def printable(text: str) -> str:
    """A text without control characters, which a file's name may hold and a terminal obeys; what
    Python could not decode in a POSIX locale is read as UTF-8."""
    if any("\ud800" <= c <= "\udfff" for c in text):
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError):
        return shutil.get_terminal_size().columns


def _fitted(text: str, columns: int) -> str:
    """As much of a text as a row has room for."""
    while text and _width(text) > columns:
        text = text[:-1]
    return text


def _width(text: str) -> int:
    """Columns of a text on a terminal."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(map(bool, map(unicodedata.combining, text)))
