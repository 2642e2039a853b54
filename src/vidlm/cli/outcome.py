"""How a command ends: its exit code, and one line on stderr where it failed.

0  it worked    1  something failed    2  wrong usage    130  Ctrl-C
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import typer

from vidlm.cli.interrupt import INTERRUPTED, as_exception
from vidlm.cli.progress import printable
from vidlm.cli.spelling import spelled
from vidlm.errors import InvalidArgument, VidlmError

OK, FAILED, USAGE = 0, 1, 2
# What to do about an error of the system, by its number.
REMEDIES: Mapping[int, str] = {
    errno.ENOSPC: "free some space, or name a place on another disk",
    errno.EDQUOT: "free some space, or name a place on another disk",
    errno.ENOENT: "make the folder first, or name another",
    errno.ENOTDIR: "a part of the path is a file; name a folder",
    errno.EISDIR: "it is a folder; name a file",
    errno.EEXIST: "it is a file; name a folder",
    errno.EACCES: "name a place that you may read and write",
    errno.EPERM: "name a place that you may read and write",
    errno.EROFS: "name a place that can be written to",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EMFILE: "raise the limit with ulimit -n, or give fewer files",
}


def outcome(run: Callable[[Any], None], options: Any) -> int:
    """Run a command to its end. `options.debug` adds the traceback to a failure's line."""
    try:
        with as_exception():
            run(options)
            sys.stdout.flush()
    except KeyboardInterrupt:
        return failed("interrupted", INTERRUPTED)
    except BrokenPipeError:  # `| head` has read enough
        _give_up_stdout()
        return FAILED
    except Exception as error:
        if _is_interrupt(error):
            return failed("interrupted", INTERRUPTED)
        if options.debug:
            traceback.print_exc()
        return failed(*_explain(error, options))
    return OK


def show_warnings() -> None:
    """The library's warnings (a frame could not be decoded, say) in the form of our errors."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("vidlm: warning: %(message)s"))
    logging.getLogger("vidlm").addHandler(handler)


def failed(message: str, code: int) -> int:
    typer.echo("vidlm: " + printable(" ".join(message.splitlines())), err=True)
    return code


def _explain(error: Exception, options: Any) -> tuple[str, int]:
    if isinstance(error, VidlmError):
        code = USAGE if isinstance(error, InvalidArgument) else FAILED
        return spelled(str(error), options), code
    if isinstance(error, OSError):
        _give_up_stdout()  # which may be what failed
        return _of_the_system(error, options), FAILED
    if isinstance(error, MemoryError):
        return (
            "there is not enough memory; take fewer --frames, a smaller model, or --quantize int8",
            FAILED,
        )
    hint = "" if options.debug else "; run it again with --debug for the traceback"
    return f"unexpected {type(error).__name__}: {error}{hint}", FAILED


def _of_the_system(error: OSError, options: Any) -> str:
    """A full disk or a folder that is missing: what, where, and what to do."""
    number = error.errno or 0
    if error.strerror is None:
        return str(error) or type(error).__name__
    place = error.filename
    if place is None and number in REMEDIES:  # of a file that is open already
        place = getattr(options, "output", None) or getattr(options, "out", None)
    where = f"{os.fsdecode(place)}: " if isinstance(place, str | bytes | os.PathLike) else ""
    remedy = f"; {REMEDIES[number]}" if number in REMEDIES else ""
    return f"{where}{error.strerror}{remedy}"


def _is_interrupt(error: BaseException | None) -> bool:
    """Whether Ctrl-C lies behind an error: an import that it breaks off may end as ImportError."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def _give_up_stdout() -> None:
    """Where stdout takes no more, let Python's own flush at the end succeed all the same."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
