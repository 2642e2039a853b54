"""A decode worker's whole life: `python -m vidlm.media.serve`, started by worker.py.

The socket to the parent is its standard input. It answers one request after another and ends when
the parent's end of the socket closes. Nothing here imports torch, or anything of the caller's.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import resource
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vidlm.errors import MediaError, VidlmError
from vidlm.media import wire
from vidlm.media.video import Video, load_video

_GRACE_SECONDS = 2.0  # an orphan outlives its deadline by this much
# FFmpeg's words where it gets no memory, or none for a thread's stack.
_SHORTAGES = (os.strerror(errno.ENOMEM), os.strerror(errno.EAGAIN))


def serve() -> None:
    parent = _take_stdin()
    logs = _Logs(logging.WARNING)
    logging.getLogger().addHandler(logs)
    logging.captureWarnings(True)
    _confine(json.loads(sys.argv[1]))
    try:
        wire.send(parent, {})
        while True:
            message = wire.receive(parent)
            # An orphan inside a decoder does not notice that it is one; the kernel ends it then.
            signal.setitimer(signal.ITIMER_REAL, message["seconds"] + _GRACE_SECONDS)
            _answer(parent, message, logs)
            signal.setitimer(signal.ITIMER_REAL, 0)
    except (EOFError, ConnectionError):
        return


def _take_stdin() -> socket.socket:
    """The socket to the parent; standard input is empty from here on."""
    parent = socket.socket(fileno=os.dup(0))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return parent


class _Logs(logging.Handler):
    """Keeps what is logged, to be logged again by the parent."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.records: list[tuple[str, int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append((record.name, record.levelno, self.format(record)))

    def take(self) -> list[tuple[str, int, str]]:
        taken, self.records = self.records, []
        return taken


def _confine(memory_bytes: int | None) -> None:
    """No core dumps, and an end to memory."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_bytes is None:
        return
    limit = _held_bytes() + memory_bytes
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    except (OSError, ValueError) as error:  # macOS
        logging.getLogger(__name__).warning("a decode worker has no memory limit (%s)", error)


def _held_bytes() -> int:
    """The address space of this process, on Linux; a limit counts from there."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    except FileNotFoundError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _answer(parent: socket.socket, message: dict[str, Any], logs: _Logs) -> None:
    arrays: list[NDArray[Any]] = []
    try:
        answer = _described(_load(parent, message), arrays)
    except (VidlmError, TypeError) as error:
        kind = MemoryError if _is_shortage(error) else type(error)
        answer = {"error": kind.__name__, "text": str(error)}
    except MemoryError as error:
        answer = {"error": "MemoryError", "text": str(error)}
    except Exception as error:  # a defect: told as one, with where it happened
        trace = traceback.format_exc()
        answer = {"error": type(error).__name__, "text": str(error), "trace": trace}
    wire.send(parent, {**answer, "logs": logs.take()})
    for array in arrays:
        wire.send_array(parent, array)


def _is_shortage(error: VidlmError | TypeError) -> bool:
    """Whether the limit is behind an error that blames the file."""
    told = type(error) is MediaError and any(words in str(error) for words in _SHORTAGES)
    return told or isinstance(error.__cause__, MemoryError)


def _load(parent: socket.socket, message: dict[str, Any]) -> Video:
    keywords = {key: wire.restored(value) for key, value in message["keywords"].items()}
    if "size" in message:
        source: Any = wire.receive_file(parent, message["size"], message["name"])
    else:
        os.chdir(message["folder"])
        source = wire.restored(message["source"])
    return load_video(source, **keywords)


def _described(video: Video, arrays: list[NDArray[Any]]) -> dict[str, Any]:
    """The answer for a Video; its arrays, which follow the answer, go to `arrays`."""
    said: dict[str, Any] = {}
    for field in dataclasses.fields(video):
        value = getattr(video, field.name)
        if isinstance(value, np.ndarray):
            arrays.append(np.ascontiguousarray(value))
            said[field.name] = {"dtype": value.dtype.str, "shape": value.shape}
        else:
            said[field.name] = list(value) if isinstance(value, tuple) else value
    return {"video": said}


if __name__ == "__main__":
    serve()
