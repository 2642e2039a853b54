"""Every error a user of vidlm can cause, as one tree.

VidlmError
├── InvalidArgument        (ValueError)          a value or combination that is not allowed
│   └── ContextOverflow                          more tokens than the model takes
├── UnknownKeyword         (TypeError)           a keyword that a function does not take
├── MediaError             (ValueError)          a video or image could not be read
│   ├── MediaNotFound      (FileNotFoundError)   there is no such file
│   ├── MediaFetchError                          a URL could not be fetched, or may not be
│   └── MediaLimitError                          a byte, pixel, frame or time limit is exceeded
├── ModelError                                   a checkpoint could not be used
│   ├── ModelNotFound      (FileNotFoundError)   no such folder or repository
│   ├── HubUnreachable     (ConnectionError)     not in the cache, and the hub does not answer
│   ├── UnsupportedModel                         an architecture, format or option not supported
│   └── WeightsError                             tensors missing, left over or misshapen
├── OutputError            (OSError)             a file or folder could not be written
│   └── FolderNotFound     (FileNotFoundError)   the folder to write to does not exist
├── EngineClosed           (RuntimeError)        asked of an engine that was closed
└── StreamClosed           (RuntimeError)        the answer of a stream that was closed

In brackets the builtin exception that an error is too.

Each message says what was given, what is allowed, and a way out.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VidlmError(Exception):
    """Base of every error raised on purpose by vidlm."""


class InvalidArgument(VidlmError, ValueError):
    """A value, keyword or combination of them that is not allowed."""


class ContextOverflow(InvalidArgument):
    """Prompt and media need more tokens than the model takes."""


class UnknownKeyword(VidlmError, TypeError):
    """A keyword that a function does not take."""


class MediaError(VidlmError, ValueError):
    """A video or image could not be read."""


class MediaNotFound(MediaError, FileNotFoundError):
    """There is no such file."""


class MediaFetchError(MediaError):
    """A URL could not be fetched, or may not be."""


class MediaLimitError(MediaError):
    """Reading the media would exceed a byte, pixel, frame or time limit."""


class ModelError(VidlmError):
    """A checkpoint could not be used."""


class ModelNotFound(ModelError, FileNotFoundError):
    """No such folder or hub repository."""


class HubUnreachable(ModelError, ConnectionError):
    """The files are not in the cache and the hub does not answer."""


class UnsupportedModel(ModelError):
    """An architecture, file format or option that vidlm does not have."""


class WeightsError(ModelError):
    """Tensors of a checkpoint are missing, left over or of another shape."""


class OutputError(VidlmError, OSError):
    """A file or folder could not be written: the disk is full, a folder is missing, or the like."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class FolderNotFound(OutputError, FileNotFoundError):
    """The folder that a file should be written to does not exist."""


class EngineClosed(VidlmError, RuntimeError):
    """A request to an engine that was closed, or that it had not finished then."""


class StreamClosed(VidlmError, RuntimeError):
    """The answer of a stream that was closed before it was complete."""


def unknown_keyword(where: str, name: str, known: Iterable[str]) -> UnknownKeyword:
    """The error for a keyword `where` does not take, naming the nearest one it does."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
    return UnknownKeyword(f"{where} got an unexpected keyword argument {name!r}; {hint}")
