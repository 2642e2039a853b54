"""Whose turn it is: an engine is used by one thread at a time, and any thread may be the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Condition


class Turns:
    """Whose turn it is to use the engine; `settle` is called at the beginning and end of each."""

    def __init__(self, settle: Callable[[], None]) -> None:
        self._settle = settle
        self._condition = Condition()
        self._taken = False

    @contextmanager
    def turn(self, unless: Callable[[], bool] | None = None) -> Iterator[bool]:
        """Wait for a turn and take it; False where `unless` came true first."""
        with self._condition:
            while self._taken and not (unless and unless()):
                self._condition.wait()
            mine = not self._taken
            self._taken = True
        if not mine:
            yield False
            return
        try:
            self._settle()
            yield True
        finally:
            self._give_back()

    def pass_by(self) -> None:
        """Settle now if it is nobody's turn; if it is, that is done at its end."""
        with self._condition:
            if not self._taken:
                self._settle()

    def _give_back(self) -> None:
        with self._condition:
            self._settle()  # in here, so that no `pass_by` is missed
            self._taken = False
            self._condition.notify_all()
