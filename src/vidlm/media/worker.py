"""Decoding in processes that can be killed: a hang or a crash in a decoder ends a worker.

FFmpeg reads what strangers send, and no check in front of it can promise that it returns. A worker
is a fresh interpreter that imports vidlm.media alone, never the caller's script, so a script needs
no `if __name__ == "__main__"`. The two speak over a pair of sockets (wire.py, serve.py). Frames are
received straight into the array that the Video keeps: that takes as long as shared memory does
(70 ms for 200 MB), and there is nothing with a name that could be left behind.

A worker is no sandbox: it may read files and use the network as its parent may.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import operator
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from vidlm import errors
from vidlm.errors import InvalidArgument, MediaError, MediaLimitError, VidlmError
from vidlm.media import wire
from vidlm.media.clip import DEFAULT_LIMITS, Limits, Video
from vidlm.media.fetch import DEFAULT_POLICY
from vidlm.media.source import Source, is_pipe, is_url, opened
from vidlm.media.video import load_video

__all__ = ["DecodePool"]

_COMMAND = ("-P", "-m", "vidlm.media.serve")  # -P: the working directory holds no modules
_START_SECONDS = 120.0  # to import numpy, PyAV and PIL, from however slow a disk
_LEAST_MEMORY = 64 << 20  # a decoder's own threads and modules take about half of it
_GRACE_SECONDS = 5.0  # for a process to be gone
# What JSON has for the fields of a Video that are no arrays.
_SCALARS: dict[str, tuple[type, ...]] = {"float": (float, int), "int": (int,), "str": (str,)}


class DecodePool:
    """Runs `load_video` in worker processes, at most `workers` at a time.

    seconds: for one load, from when a worker has it; a worker that takes longer is killed.
    memory_bytes: that a load may take in its worker (address space, which macOS does not limit);
        the bytes of a file that is not given by its path and the chosen frames count. None: any.

    A context manager. Any number of threads may call `load`. Workers start when they are first
    needed, and serve one load after another. Linux and macOS only.
    """

    def __init__(
        self, workers: int = 2, *, seconds: float = 60.0, memory_bytes: int | None = 4 << 30
    ) -> None:
        if os.name != "posix":
            raise InvalidArgument("a DecodePool needs Linux or macOS; call load_video itself")
        if workers < 1:
            raise InvalidArgument(f"workers={workers!r}; give 1 or more")
        if not 0 < seconds <= threading.TIMEOUT_MAX:
            raise InvalidArgument(f"seconds={seconds!r}; give a finite number above 0, as 60")
        if memory_bytes is not None and memory_bytes < _LEAST_MEMORY:
            raise InvalidArgument(
                f"memory_bytes={memory_bytes!r}; give at least {_LEAST_MEMORY}, or None for any"
            )
        self._workers, self._seconds, self._memory_bytes = workers, seconds, memory_bytes
        self._changed = threading.Condition()
        self._idle: list[_Worker] = []
        self._busy: list[_Worker] = []
        self._closed = False
        self._owner = os.getpid()

    def load(self, source: Source, **keywords: Any) -> Video:
        """`load_video(source, **keywords)` in a worker; waits until one is free.

        Paths, URLs, bytes, binary files and lists of paths go to a worker. An array, or a list with
        images or arrays in it, does not: those are pictures already.

        Raises what load_video raises, and besides: MediaLimitError where a load takes more than
        the pool's seconds or memory_bytes; MediaError where it crashes the decoder.
        """
        if _stays_here(source):
            return load_video(source, **keywords)
        request = _request(source, keywords, self._memory_bytes)
        worker = self._borrow()
        try:
            outcome = worker.load(request, self._seconds)
        except _Lost as error:
            raise self._loss(worker, request.name) from error
        finally:  # Ctrl-C comes by here too
            self._give_back(worker)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def close(self) -> None:
        """Ends all workers. Loads under way raise MediaError, later ones InvalidArgument."""
        if os.getpid() != self._owner:  # a fork that exits, leaving its copy of a `with` block
            return
        with self._changed:
            self._closed = True
            workers = self._idle + self._busy
            self._idle.clear()
            self._changed.notify_all()
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.end()

    def __enter__(self) -> DecodePool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _borrow(self) -> _Worker:
        if os.getpid() != self._owner:
            raise InvalidArgument(
                f"this DecodePool is of process {self._owner} and this one is its fork; make "
                "another pool here"
            )
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._busy) < self._workers)
            if self._closed:
                raise InvalidArgument("the DecodePool is closed; make another one")
            while self._idle and not self._idle[-1].usable:  # killed by something else
                self._idle.pop().end()
            worker = self._idle.pop() if self._idle else _Worker(self._memory_bytes)
            self._busy.append(worker)
            return worker

    def _give_back(self, worker: _Worker) -> None:
        keep = worker.usable
        if not keep:
            worker.end()
        with self._changed:
            self._busy.remove(worker)
            if keep and not self._closed:
                self._idle.append(worker)
            self._changed.notify()

    def _loss(self, worker: _Worker, name: str) -> Exception:
        """What to tell of a worker that is no more."""
        if self._closed:
            return MediaError(f"{name}: the DecodePool was closed meanwhile; make another one")
        if not worker.ready:
            return RuntimeError(
                f"a decode worker does not start ({worker.end_in_words()}); see its stderr, or: "
                f"{Path(sys.executable).name} -c 'import vidlm.media'"
            )
        if worker.expired:
            return MediaLimitError(
                f"{name}: not decoded within {self._seconds:g} s and stopped; choose a shorter "
                "start..end, scale the video down, or give the DecodePool more seconds"
            )
        return MediaError(
            f"the decoder crashed on {name} ({worker.end_in_words()}); the file is damaged, or the "
            "machine is out of memory; make another file of it: ffmpeg -i INPUT output.mp4"
        )


# ---- the parent's side of a worker -----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Request:
    """What a worker is asked: a message, the bytes after it; a name and limits for the answer."""

    message: dict[str, Any]
    data: bytes
    name: str
    limits: Limits


class _Lost(Exception):
    """A worker is gone, or talks nonsense."""


class _Worker:
    """One process and the socket to it."""

    def __init__(self, memory_bytes: int | None) -> None:
        self.ready = self.expired = self._is_mad = False
        self._in_step = True
        self._memory_bytes = memory_bytes
        self._wire, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, *_COMMAND, json.dumps(memory_bytes)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env=_environment(),
                start_new_session=True,  # Ctrl-C in a terminal is for the parent to handle
            )

    @property
    def usable(self) -> bool:
        """Whether it waits for a request, as far as one can tell."""
        return self._in_step and not self.expired and self._process.poll() is None

    def load(self, request: _Request, seconds: float) -> Video | Exception:
        """The Video, or the error that load_video raised there. Raises _Lost."""
        self._in_step = False
        if not self.ready:
            with self._within(_START_SECONDS):
                wire.receive(self._wire, is_answer=True)
            self.ready = True
        with self._within(seconds):
            wire.send(self._wire, {**request.message, "seconds": seconds})
            self._wire.sendall(request.data)
            answer = wire.receive(self._wire, is_answer=True)
            logs = [(str(name), int(level), str(text)) for name, level, text in answer["logs"]]
            if "video" in answer:
                outcome: Video | Exception = self._video(answer["video"], request.limits)
            else:
                outcome = self._error(answer, request.name)
        self._in_step = answer.get("error") != "MemoryError"  # whose heap is in pieces
        for name, level, text in logs:
            logging.getLogger(name).log(level, "%s", text)
        return outcome

    @contextmanager
    def _within(self, seconds: float) -> Iterator[None]:
        """Kills the worker after that many seconds. _Lost is raised for that, an end, nonsense."""
        watch = threading.Timer(seconds, self._expire)
        watch.daemon = True
        watch.start()
        try:
            yield
        except (OSError, EOFError) as error:
            raise _Lost(str(error)) from error
        except (ValueError, TypeError, LookupError) as error:
            self._is_mad = True
            self.kill()
            raise _Lost(str(error)) from error
        finally:
            watch.cancel()
            watch.join()  # it may be killing; afterwards `expired` changes no more

    def _expire(self) -> None:
        self.expired = True
        self.kill()

    def _video(self, said: dict[str, Any], limits: Limits) -> Video:
        """A Video from its fields, whose arrays follow in the fields' order.

        The worker may have been taken over by what it decodes: each field is checked, and each
        array's size is bounded by the frames that the limits allow before memory is taken.
        """
        frames, height, width = (operator.index(n) for n in said["frames"]["shape"][:3])
        if min(frames, height, width) < 1:
            raise ValueError(f"a Video of {frames} frames of {width}x{height}")
        limits.check("frames", frames, height, width)
        arrays: dict[str, tuple[type[np.generic], wire.Shape]] = {
            "frames": (np.uint8, (frames, height, width, 3)),
            "pts": (np.float64, (frames,)),
            "indices": (np.int64, (frames,)),
        }
        values: dict[str, Any] = {}
        for field in dataclasses.fields(Video):
            value = said[field.name]
            if field.name in arrays:
                value = wire.receive_array(self._wire, value, *arrays[field.name])
            elif field.name == "warnings":
                value = tuple(str(warning) for warning in value)
            elif type(value) not in _SCALARS[str(field.type)]:
                raise ValueError(f"a Video with {field.name}={value!r}")
            values[field.name] = value
        return Video(**values)

    def _error(self, answer: dict[str, Any], name: str) -> Exception:
        kind, text = str(answer["error"]), str(answer["text"])
        found = getattr(errors, kind, None)
        if isinstance(found, type) and issubclass(found, VidlmError):
            return found(text)
        if kind == "TypeError":  # an unknown keyword
            return TypeError(text)
        if kind == "MemoryError":
            return _too_much_memory(name, self._memory_bytes)
        error = RuntimeError(f"{name}: load_video failed in a decode worker, {kind}: {text}")
        error.add_note(str(answer["trace"]))
        return error

    def kill(self) -> None:
        """Ends it, whatever it does, and all waiting for it."""
        self._process.kill()
        with suppress(OSError):  # not connected: it is dead already
            self._wire.shutdown(socket.SHUT_RDWR)

    def end(self) -> None:
        """Kills it, and leaves no zombie."""
        self.kill()
        self._wire.close()
        with suppress(subprocess.TimeoutExpired):  # the kernel may hold it on a dead network drive
            self._process.wait(_GRACE_SECONDS)

    def end_in_words(self) -> str:
        if self._is_mad:
            return "its answer made no sense"
        try:
            code = self._process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            return "it closed its end"
        try:
            return f"exit status {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        except ValueError:  # a real-time signal
            return f"signal {-code}"


def _environment() -> dict[str, str]:
    """This process' modules for a worker, and no address space for what it does not use."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, sys.path)),
        "OPENBLAS_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",  # glibc reserves up to 128 MiB for a thread's own
    }


# ---- requests --------------------------------------------------------------------------------


def _stays_here(source: Source) -> bool:
    """Arrays and images; and what is no source at all, which load_video says best."""
    if isinstance(source, list | tuple):
        return not source or not all(isinstance(item, str | Path) for item in source)
    is_file = hasattr(source, "read")
    return not is_file and not isinstance(source, str | Path | bytes | bytearray | memoryview)


def _request(source: Source, keywords: dict[str, Any], memory_bytes: int | None) -> _Request:
    limits = keywords.get("limits", DEFAULT_LIMITS)
    if not isinstance(limits, Limits):
        raise InvalidArgument(f"limits={limits!r}; give Limits(...)")
    message = {
        "keywords": {key: wire.plain(key, value) for key, value in keywords.items()},
        "folder": _working_folder(),
    }
    is_name = isinstance(source, str | Path) and not is_pipe(source)  # /dev/fd/3 is ours alone
    if is_name or isinstance(source, list | tuple):
        name = "frames" if isinstance(source, list | tuple) else _name(str(source))
        return _Request(message | {"source": wire.plain("source", source)}, b"", name, limits)
    with opened(source, keywords.get("access", DEFAULT_POLICY)) as (file, name):
        try:
            file.seek(0, os.SEEK_END)
            if memory_bytes is not None and file.tell() > memory_bytes:
                raise _too_much_memory(name, memory_bytes)
            file.seek(0)
            data = file.read()
        except VidlmError:  # a ValueError too, but ours already
            raise
        except (OSError, ValueError) as error:
            raise MediaError(
                f"{name}: cannot be read ({error}); give an open, readable file"
            ) from error
    return _Request(message | {"name": name, "size": len(data)}, data, name, limits)


def _too_much_memory(name: str, memory_bytes: int | None) -> MediaLimitError:
    limit = "there is" if memory_bytes is None else f"the {memory_bytes} bytes that a load may take"
    return MediaLimitError(
        f"{name}: needs more memory than {limit}; choose fewer frames, scale the video down, give "
        "a path and not its bytes, or give the DecodePool more memory_bytes"
    )


def _working_folder() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:  # somebody removed it; whole paths still lead somewhere
        return os.sep


def _name(source: str) -> str:
    """For messages: without a URL's query, which may hold a key."""
    if source[:5].lower() == "data:" and is_url(source):
        return "data URL"
    if "://" not in source:
        return Path(source).name
    try:
        parts = urlsplit(source)
        return Path(parts.path).name or parts.hostname or "video"
    except ValueError:  # load_video will say so
        return "video"
