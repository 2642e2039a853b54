"""How a command ends: its exit code, and one line on stderr where it failed.

0  it worked    1  something failed    2  wrong usage    130  Ctrl-C
"""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import typer

from vidlm.errors import InvalidArgument, VidlmError

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

# What the library calls an option, where it complains about one: "fps=0.0 is not above 0".
OPTIONS: Mapping[str, str] = {
    "frames": "--frames",
    "num_frames": "--frames",
    "max_tokens": "--max-tokens",
    "max_new_tokens": "--max-tokens",
    "top_p": "--top-p",
    "device_map": "--device",
    "quantization_config": "--quantize",
    "kv_dtype": "--kv-dtype",
    **{
        name: f"--{name}"
        for name in (
            "fps",
            "start",
            "end",
            "sampling",
            "times",
            "indices",
            "temperature",
            "seed",
            "dtype",
            "quantize",
        )
    },
}


def outcome(run: Callable[[Any], None], options: Any) -> int:
    """Run a command to its end. `options.debug` adds the traceback to a failure's line."""
    try:
        run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _failed("interrupted", INTERRUPTED)
    except BrokenPipeError:  # `| head` has read enough
        _give_up_stdout()
        return FAILED
    except Exception as error:
        if options.debug:
            traceback.print_exc()
        return _failed(*_explain(error, options.debug))
    return OK


def show_warnings() -> None:
    """The library's warnings (a frame could not be decoded, say) in the form of our errors."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("vidlm: warning: %(message)s"))
    logging.getLogger("vidlm").addHandler(handler)


def _explain(error: Exception, debug: bool) -> tuple[str, int]:
    if isinstance(error, InvalidArgument):
        return _spelled(str(error)), USAGE
    if isinstance(error, VidlmError):
        return str(error), FAILED
    if isinstance(error, OSError) and error.strerror:
        _give_up_stdout()  # which may be what failed
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}", FAILED
    hint = "" if debug else "; run it again with --debug for the traceback"
    return f"unexpected {type(error).__name__}: {error}{hint}", FAILED


def _spelled(said: str) -> str:
    """A message of the library with its keywords as options."""
    for keyword, option in (
        (r"^max_memory with device_map=None", "--max-memory without --device"),
        (r"(^|\bin )max_memory\b(?:=\{(.*?)\})?", _as_room),
        (r"^(\w+)=", _as_option),
        (r"EngineOptions\((\w+)=(?:None|'(\w+)')\)", _as_switch),
        (r"\b(device_map|quantize)='(\w+)'", _as_switch),
        (r"\bwithout quantize\b", "without --quantize"),
    ):
        said = re.sub(keyword, option, said)
    return said


def _as_room(keyword: re.Match[str]) -> str:
    """ "max_memory={0: '20GiB', 'cpu': '60GiB'}" as "--max-memory 0=20GiB,cpu=60GiB"."""
    sizes = (keyword[2] or "").replace("'", "").replace(": ", "=").replace(", ", ",")
    return f"{keyword[1]}--max-memory{' ' * bool(sizes)}{sizes}"


def _as_option(keyword: re.Match[str]) -> str:
    name = keyword[1]
    return f"{OPTIONS[name]} " if name in OPTIONS else keyword[0]


def _as_switch(keyword: re.Match[str]) -> str:
    """What a message has a model loaded with: "EngineOptions(kv_dtype='int8')"."""
    name, value = keyword[1], keyword[2] or "auto"
    return f"{OPTIONS[name]} {value}" if name in OPTIONS else keyword[0]


def _failed(message: str, code: int) -> int:
    typer.echo("vidlm: " + " ".join(message.splitlines()), err=True)
    return code


def _give_up_stdout() -> None:
    """Where stdout takes no more, let Python's own flush at the end succeed all the same."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
