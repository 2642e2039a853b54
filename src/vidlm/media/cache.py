"""A folder of downloads: contents by their sha256, and which URL had which content.

    blobs/<sha256 of the content>      the content
    urls/<sha256 of the URL>           {"blob": ..., "etag": ..., "modified": ...}

The URL itself is not written down: its query may hold a secret. Files appear whole (os.replace),
contents are checked when they are read, and a record that is damaged or leads nowhere counts as
none: so processes need no lock, and a crash costs a download at most.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vidlm.errors import InvalidArgument
from vidlm.files import PRIVATE, replaced

_log = logging.getLogger(__name__)

_MAX_FILES = 10_000  # in each of the two folders: small ones cost an inode, not bytes
_DIGEST = re.compile(r"[0-9a-f]{64}")
# A server chooses it and gets it back in a header: nothing that could end or fold the line.
_VALIDATOR = re.compile(r"[ -~]{1,256}")


@dataclass(frozen=True)
class Entry:
    """What is known of a URL: which content it had, and what to ask its server with."""

    blob: str
    size: int
    etag: str
    modified: str

    def condition(self) -> dict[str, str]:
        """The header fields that let a server answer 304 instead of sending it all again."""
        fields = {"If-None-Match": self.etag, "If-Modified-Since": self.modified}
        return {name: value for name, value in fields.items() if value}


@dataclass(frozen=True)
class MediaCache:
    """Downloaded files in `folder`, at most `max_bytes` of them; the longest unused go first.

    An entry is only ever used after its server said that it is still right. The folder is made if
    it is not there, for its owner alone; one that others may enter is refused. Any number of
    threads and processes may share it.

    Raises InvalidArgument where the folder cannot be used.
    """

    folder: str | Path
    max_bytes: int

    def __post_init__(self) -> None:
        if self.max_bytes < 1:
            raise InvalidArgument(f"a cache of {self.max_bytes} bytes; give max_bytes of 1 or more")
        object.__setattr__(self, "folder", Path(self.folder).absolute())
        try:
            os.makedirs(self.folder, mode=0o700, exist_ok=True)
            _refuse_shared(Path(self.folder))
            for name in ("blobs", "urls"):
                Path(self.folder, name).mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise InvalidArgument(
                f"{self.folder}: no cache can be kept there ({error.strerror}); give a folder "
                "that can be written"
            ) from error

    def find(self, url: str) -> Entry | None:
        """What is kept of a URL, if its content is there; `read` tells whether that is whole."""
        path = self._record(url)
        try:
            record = _parse(path.read_bytes())
            if record is None:
                return None
            size = self._blob(record["blob"]).stat().st_size
        except OSError:
            return None
        _touch(path)
        return Entry(size=size, **record)

    def read(self, entry: Entry) -> bytes | None:
        """The content of an entry, or None where it has gone or is damaged (then it is dropped)."""
        path = self._blob(entry.blob)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        if hashlib.sha256(data).hexdigest() != entry.blob:
            _log.warning("%s: damaged, dropped from the cache", path)
            with suppress(OSError):
                path.unlink()
            return None
        _touch(path)
        return data

    def store(self, url: str, data: bytes, etag: str, modified: str) -> None:
        """Keeps what a URL had, unless it is too large or could never be asked about again.

        A disk that refuses is logged, not raised: the download is there all the same.
        """
        etag, modified = (v if _VALIDATOR.fullmatch(v) else "" for v in (etag, modified))
        path = self._record(url)
        try:
            if not (etag or modified) or len(data) > self.max_bytes:
                path.unlink(missing_ok=True)
                return
            blob = hashlib.sha256(data).hexdigest()
            self._make_room(blob, len(data))
            _write(self._blob(blob), data)
            record = {"blob": blob, "etag": etag, "modified": modified}
            _write(path, json.dumps(record).encode())
        except OSError as error:
            _log.warning("%s: a download could not be cached (%s)", self.folder, error.strerror)

    def _blob(self, digest: str) -> Path:
        return Path(self.folder, "blobs", digest)

    def _record(self, url: str) -> Path:
        return Path(self.folder, "urls", hashlib.sha256(url.encode()).hexdigest())

    def _make_room(self, blob: str, size: int) -> None:
        """Deletes what was longest unused, until `size` more bytes and a record fit."""
        room, left = self.max_bytes - size, _MAX_FILES - 1
        for _, taken, path in sorted(_files(Path(self.folder, "blobs")), reverse=True):
            if path.name != blob:  # that one will be replaced
                room, left = room - taken, left - 1
                if room < 0 or left < 0:
                    path.unlink(missing_ok=True)
        for _, _, path in sorted(_files(Path(self.folder, "urls")), reverse=True)[_MAX_FILES - 1 :]:
            path.unlink(missing_ok=True)


def _refuse_shared(folder: Path) -> None:
    found = folder.stat()
    if os.name == "posix" and (found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077):
        raise InvalidArgument(
            f"{folder}: others may enter it, or own it; give a folder that does not exist yet, or "
            "`chmod 700` it"
        )


def _parse(text: bytes) -> dict[str, str] | None:
    """A record as `store` wrote it, or None."""
    try:
        record = json.loads(text)
    except ValueError:
        return None
    if not isinstance(record, dict) or record.keys() != {"blob", "etag", "modified"}:
        return None
    if not all(isinstance(value, str) for value in record.values()):
        return None
    validators = filter(None, (record["etag"], record["modified"]))
    if not _DIGEST.fullmatch(record["blob"]) or not all(map(_VALIDATOR.fullmatch, validators)):
        return None
    return record


def _files(folder: Path) -> Iterator[tuple[int, int, Path]]:
    """When each file was last used, its size and path; temporary ones of a crash are among them."""
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # another process was quicker
                found = entry.stat(follow_symlinks=False)
                yield found.st_mtime_ns, found.st_size, Path(entry.path)


def _touch(path: Path) -> None:
    """Notes a use. A folder that is read-only, or a file that has gone, is no reason to fail."""
    with suppress(OSError):
        os.utime(path)


def _write(path: Path, data: bytes) -> None:
    """For its owner alone; not flushed to disk, as what is damaged is told by its digest."""
    with replaced(path, mode=PRIVATE, durable=False) as partial:
        partial.write_bytes(data)
