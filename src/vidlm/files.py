"""Files are written whole or not at all: beside their place, flushed to disk, then renamed.

What was there before stays until everything is on the disk, so a full disk, a lost permission or
Ctrl-C costs nothing but the new file, and no part of one is left behind. Every error is an
OutputError, which names the path and a way out.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

from vidlm.errors import FolderNotFound, OutputError

PRIVATE, PUBLIC = 0o600, 0o666  # modes of new files; the umask takes from the second
FULL = (errno.ENOSPC, errno.EDQUOT)
DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)


def make_folder(path: str | os.PathLike[str]) -> Path:
    """The folder, with those above it, made unless it is there. Raises OutputError."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(path, error, "made") from error
    return path


@contextmanager
def replaced(
    path: str | os.PathLike[str], *, mode: int = PUBLIC, durable: bool = True
) -> Iterator[Path]:
    """Where to write what shall be at `path`: it goes there when the block ends without an error.

    mode     of a file that is new; an old one's is kept
    durable  flush it to disk first, so that a power failure leaves the old file or the new one
    Raises OutputError for any OSError in the block.
    """
    target = _target(Path(path))
    if target is None:  # a pipe or a device: nothing can stand beside it
        try:
            yield Path(path)
        except OSError as error:
            raise output_error(path, error) from error
        return
    with Replacement(target.parent, durable=durable) as files:
        yield files.new(target.name, mode)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    with replaced(path) as partial:
        partial.write_bytes(data)


def write_files(folder: str | os.PathLike[str], contents: Mapping[str, str | bytes]) -> None:
    """Several files of a folder by their names, all or none; text as UTF-8."""
    with Replacement(make_folder(folder)) as files:
        files.write(contents)


def append_line(path: str | os.PathLike[str], line: str) -> None:
    """A line at the end of a log: all of it, or the log as it was."""
    try:
        with open(path, "ab", buffering=0) as file:
            end, data = file.seek(0, os.SEEK_END), f"{line}\n".encode()
            try:
                while data:
                    data = data[file.write(data) :]
            except BaseException:
                file.truncate(end)
                raise
    except OSError as error:
        raise output_error(path, error) from error


class Replacement:
    """Files of one folder that are replaced together, in a `with` block.

    `new` gives a path to write to for each. At the end all are flushed to disk, then renamed, and
    at last the files of `drop` are removed. Where anything fails, the folder is as it was before.
    """

    def __init__(self, folder: Path, *, durable: bool = True) -> None:
        self._folder, self._durable = folder, durable
        self._partial: dict[Path, Path] = {}  # by the file that each becomes
        self._dropped: list[Path] = []

    def new(self, name: str, mode: int = PUBLIC) -> Path:
        """An empty file beside the one called `name`, which it replaces at the end."""
        target = self._folder / name
        if target.is_dir():
            _raise(target, errno.EISDIR)
        partial = _beside(target, "partial")
        with suppress(FileNotFoundError):
            mode = stat.S_IMODE(target.stat().st_mode)
        try:
            os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
            self._partial[target] = partial
        except OSError as error:
            raise output_error(target, error) from error
        return partial

    def write(self, contents: Mapping[str, str | bytes]) -> None:
        for name, content in contents.items():
            self.new(name).write_bytes(content.encode() if isinstance(content, str) else content)

    def drop(self, path: Path) -> None:
        """Remove an older file of the folder once the new ones are there."""
        self._dropped.append(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._commit()
        except OSError as failed:
            raise self._explained(failed) from failed
        finally:
            for partial in self._partial.values():
                with suppress(OSError):
                    partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and not isinstance(error, OutputError):
            raise self._explained(error) from error

    def _explained(self, error: OSError) -> OutputError:
        names = {str(partial): target for target, partial in self._partial.items()}
        (only, *more) = self._partial or (self._folder,)
        path = names.get(str(error.filename), self._folder if more else only)
        return output_error(path, error)

    def _commit(self) -> None:
        if self._durable:
            for partial in self._partial.values():
                _flush(partial)
        older: dict[Path, Path | None] = {}
        try:
            for target, partial in self._partial.items():
                older[target] = _kept(target)
                os.replace(partial, target)
            for path in self._dropped:
                if path not in self._partial and path.exists():
                    aside = _beside(path, "old")
                    os.rename(path, aside)
                    older[path] = aside
            if self._durable and os.name == "posix":
                _flush(self._folder)
        except BaseException:
            for target, kept in older.items():
                _restore(target, kept, self._partial.get(target))
            raise
        for left in filter(None, older.values()):
            with suppress(OSError):  # all is done, and nobody reads it under this name
                left.unlink(missing_ok=True)


def output_error(
    path: str | os.PathLike[str], error: OSError, verb: str = "written"
) -> OutputError:
    """The error for an OSError at `path`: what to do about it, too."""
    path = Path(path)
    reason = error.strerror or str(error)
    if error.errno in FULL:
        way_out = "free some space, or write to another disk"
    elif error.errno in DENIED:
        way_out = f"choose another place, or get permission to write to {path.parent}"
    elif error.errno == errno.ENOENT and not path.parent.exists():
        reason, way_out = f"the folder {path.parent} does not exist", "make it first"
    elif error.errno in (errno.ENOTDIR, errno.EEXIST):
        reason, way_out = "a file of that name is in the way", "name a folder, or remove the file"
    elif error.errno == errno.EISDIR:
        reason, way_out = "it is a folder", "name a file in it"
    else:
        way_out = "choose another place"
    kind = FolderNotFound if error.errno == errno.ENOENT else OutputError
    made = kind(f"{path} could not be {verb} ({reason}); {way_out}")
    made.errno, made.strerror = error.errno, reason
    return made


def _raise(path: Path, code: int) -> NoReturn:
    raise output_error(path, OSError(code, os.strerror(code)))


def _target(path: Path) -> Path | None:
    """The file that a path stands for, links followed; None for a pipe or a device."""
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    if target.exists() and not target.is_file() and not target.is_dir():
        return None
    return target


def _beside(target: Path, suffix: str) -> Path:
    return target.with_name(f".{target.name[:64]}.{secrets.token_hex(4)}.{suffix}")


def _flush(path: Path) -> None:
    """To the disk, which may find out only now that it is full."""
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot do it for folders
            raise
    finally:
        os.close(descriptor)


def _kept(target: Path) -> Path | None:
    """A second name for the file that is about to be replaced, None where there is none."""
    if not os.path.lexists(target):
        return None
    kept = _beside(target, "old")
    try:
        os.link(target, kept, follow_symlinks=False)
    except (OSError, NotImplementedError):  # a file system without hard links
        os.rename(target, kept)
    return kept


def _restore(target: Path, kept: Path | None, partial: Path | None) -> None:
    with suppress(OSError):
        if kept is not None:
            if kept.exists():
                os.replace(kept, target)
                kept.unlink(missing_ok=True)  # rename(2) leaves two names of one file as they are
        elif partial is not None and not partial.exists():  # it has been renamed already
            target.unlink(missing_ok=True)
