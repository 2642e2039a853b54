"""The command line: `vidlm ask clip.mp4 "What happens?"`. Answers on stdout, all else on stderr.

torch, numpy and PyAV are imported when a command runs, so that --help answers at once; typer when
`main` runs, so that Ctrl-C is handled before.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from vidlm.cli.interrupt import end_at_once, finish

if TYPE_CHECKING:
    import typer


def main() -> None:
    """What `vidlm` runs."""
    end_at_once()
    from vidlm.cli.outcome import show_warnings

    show_warnings()
    if sys.stdout is not None and sys.stdout.encoding.lower() in ("ascii", "us-ascii"):
        # The POSIX locale: an answer may hold any character, and UTF-8 is what terminals read.
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")  # type: ignore[union-attr]
    try:
        application()(prog_name="vidlm")
    except SystemExit as ended:
        finish(ended.code)
        raise


def application() -> typer.Typer:
    """All commands."""
    from vidlm.cli.commands import build

    return build()
