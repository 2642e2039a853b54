"""Ctrl-C, from the first moment to the last: one word on stderr and exit code 130, no traceback.

While a command works, Ctrl-C raises KeyboardInterrupt as usual, so that files are cleaned up.
Before and after, where there is nothing to clean up, it ends the process at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

INTERRUPTED = 130
WORD = "vidlm: interrupted\n"


def end_at_once() -> None:
    """Let Ctrl-C end the process at once from now on, unless the process ignores it (nohup)."""
    if _may_handle():
        signal.signal(signal.SIGINT, _end)


@contextmanager
def as_exception() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt in here; a second one ends the process at once."""
    if not _may_handle() or signal.getsignal(signal.SIGINT) is not _end:
        yield
        return
    signal.signal(signal.SIGINT, _raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _end)


def finish(code: object) -> None:
    """All is done: Ctrl-C has nothing to end any more, and a command that it ended ends here.

    Python would end with the signal instead of the code where the interrupt met an extension.
    """
    if not _may_handle():
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if code == INTERRUPTED:
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(INTERRUPTED)


def _may_handle() -> bool:
    ours = threading.current_thread() is threading.main_thread()
    return ours and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN


def _raise(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, _end)
    raise KeyboardInterrupt


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, WORD.encode())
    os._exit(INTERRUPTED)
