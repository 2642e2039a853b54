"""Progress on stderr: a line for each stage that is done, and on a terminal what goes on now."""

from __future__ import annotations

import os
import sys
from types import TracebackType
from typing import Self

DIM, PLAIN, CLEAR = "\033[2m", "\033[0m", "\r\033[K"


class Progress:
    """Says nothing when `quiet`. Without a terminal, or with NO_COLOR, the lines are plain."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._dim = self._terminal and not os.environ.get("NO_COLOR")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, where: TracebackType | None
    ) -> None:
        """An error's line must not begin behind what was going on."""
        if kind is not None and self._terminal and not self._quiet:
            self._write(CLEAR)

    def now(self, what: str) -> None:
        """What goes on now, until the next line takes its place; for a terminal only."""
        if self._terminal and not self._quiet:
            self._write(CLEAR + self._shade(f"{'':10}  {what} ..."))

    def done(self, seconds: float, stage: str, what: str) -> None:
        if not self._quiet:
            clear = CLEAR if self._terminal else ""
            self._write(clear + self._shade(f"{seconds:8.2f} s  {stage:<8} {what}") + "\n")

    def note(self, stage: str, what: str) -> None:
        """Something to know that took no time."""
        if not self._quiet:
            clear = CLEAR if self._terminal else ""
            self._write(clear + self._shade(f"{'':10}  {stage:<8} {what}") + "\n")

    def _shade(self, text: str) -> str:
        return f"{DIM}{text}{PLAIN}" if self._dim else text

    def _write(self, text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()
