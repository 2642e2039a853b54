"""URL -> bytes, and the rules on the way: how much, how long, from which hosts and folders.

`FetchPolicy` holds every rule. docs/fetch.md explains them to users; http.py makes the connection.
"""

from __future__ import annotations

import base64
import binascii
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote_to_bytes, urlsplit

from vidlm.errors import InvalidArgument, MediaFetchError, MediaNotFound
from vidlm.media.cache import MediaCache
from vidlm.media.http import (
    Answer,
    Connection,
    Target,
    addresses,
    get,
    host_name,
    parse,
    plain,
    refuse_unprintable,
    too_large,
)

MAX_BYTES = 512 * 2**20
_MAX_TIMEOUT = 86_400.0
_CHUNK = 1 << 16
_HEADER = 4096  # of a data URL; its type and parameters are far shorter


@dataclass(frozen=True, kw_only=True)
class FetchPolicy:
    """What may be fetched, from where, and how much of it.

    max_bytes: of one file, however it comes.
    timeout: seconds for a whole transfer, redirects included (name resolution has its own).
    allow_private: also connect to addresses that are not on the public internet (loopback,
        private, link-local). Proxies from the environment are not used.
    max_redirects: how many are followed; each is checked like the first address.
    allow_downgrade: also follow redirects from https to http.
    hosts: None for any, else the only names to connect to: "example.org" is that name alone,
        "*.example.org" what ends in it.
    folders: None for any, else the only folders to read local files from, symbolic links resolved;
        () for no local file at all. A server sets this: it reads with its own rights, for others.
    max_url: characters of an http, https or file URL. A data URL is bounded by max_bytes.
    cache: where to keep downloads; their servers are asked before one is used again.

    Raises InvalidArgument for a value that makes no sense.
    """

    max_bytes: int = MAX_BYTES
    timeout: float = 30.0
    allow_private: bool = False
    max_redirects: int = 3
    hosts: tuple[str, ...] | None = None
    folders: tuple[str | Path, ...] | None = None
    max_url: int = 8192
    cache: MediaCache | None = None
    allow_downgrade: bool = False

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_redirects", "max_url"):
            if getattr(self, name) < 0:
                raise InvalidArgument(f"{name}={getattr(self, name)}; give 0 or more")
        if not 0 < self.timeout <= _MAX_TIMEOUT:
            raise InvalidArgument(
                f"timeout={self.timeout}; give seconds above 0, at most {_MAX_TIMEOUT:.0f}"
            )
        for name in ("hosts", "folders"):
            if isinstance(getattr(self, name), str | Path):  # its letters would be the entries
                raise InvalidArgument(f"{name} is one {name[:-1]}; give a tuple, or None for any")
        if self.hosts is not None:
            object.__setattr__(self, "hosts", tuple(map(_host_rule, self.hosts)))
        if self.folders is not None:
            object.__setattr__(self, "folders", tuple(map(_real_folder, self.folders)))


def _host_rule(entry: str) -> str:
    star = "*." if entry.startswith("*.") else ""
    try:
        return star + host_name(entry.removeprefix(star).strip("[]"))
    except ValueError as error:
        raise InvalidArgument(
            f"hosts: {entry!r} is no host name ({error}); give names without scheme, port or path: "
            "'example.org', '*.example.org'; or hosts=None for any"
        ) from error


def _real_folder(folder: str | Path) -> Path:
    real = Path(os.path.realpath(folder))
    if not real.is_dir():
        raise InvalidArgument(f"folders: {str(folder)!r} is no folder; make it, or leave it out")
    return real


DEFAULT_POLICY = FetchPolicy()


def fetch(url: str, *, policy: FetchPolicy = DEFAULT_POLICY) -> bytes:
    """The bytes behind an http, https, file or data URL.

    Raises MediaLimitError above policy.max_bytes, MediaNotFound for a file that is not there, and
    MediaFetchError for everything else, naming the host but never a path or query of the web.
    """
    scheme = url[:6].partition(":")[0].lower()
    if scheme == "data":
        return _from_data(url, policy.max_bytes)
    if scheme not in ("http", "https", "file"):
        raise MediaFetchError(
            f"a URL that begins {plain(url[:12].partition(':')[0])!r} is not fetched; give "
            "http://, https://, file:// or data:"
        )
    _check_length(url, policy)
    if scheme == "file":
        return _from_file(check_local(local_path(url), policy), policy.max_bytes)
    return _from_web(url, policy)


def _check_length(url: str, policy: FetchPolicy) -> None:
    if len(url) > policy.max_url:
        raise MediaFetchError(
            f"a URL of {len(url)} characters, at most {policy.max_url} are taken; give a shorter "
            "one, or raise max_url"
        )


# ---- this machine's files --------------------------------------------------------------------


def local_path(url: str) -> Path:
    """The path that a file URL of this machine names. Whether it may be read: `check_local`."""
    refuse_unprintable(url)
    try:
        parts = urlsplit(url)
    except ValueError:
        raise MediaFetchError(
            "a file URL that makes no sense; give file:///path/to/video.mp4"
        ) from None
    if parts.netloc not in ("", "localhost"):
        raise MediaFetchError(
            f"a file URL of host {plain(parts.hostname or '')!r}; only this machine's files are "
            "read: file:///path/to/video.mp4"
        )
    path = os.fsdecode(unquote_to_bytes(parts.path))  # as Path.as_uri writes it
    if not path or "\0" in path:
        raise MediaFetchError("a file URL without a usable path; give file:///path/to/video.mp4")
    return Path(path)


def check_local(path: str | Path, policy: FetchPolicy) -> Path:
    """The path to open for a local file that the policy lets read, symbolic links resolved.

    Raises MediaFetchError for any other, the same whether it exists or not.
    """
    if policy.folders is None:
        return Path(path)
    if not policy.folders:
        raise MediaFetchError(
            "local files are not read here; send the file itself (data:video/mp4;base64,...), or "
            "an https:// address"
        )
    try:
        real = Path(os.path.realpath(path))
    except (OSError, ValueError):  # a null byte, a lone surrogate
        real = None
    if real is None or not any(real.is_relative_to(folder) for folder in policy.folders):
        raise MediaFetchError(
            "a local file outside the folders that may be read; put it into one of them "
            f"({', '.join(map(str, policy.folders))}), or send the file itself"
        )
    return real


def _from_file(path: Path, max_bytes: int) -> bytes:
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # a device may never end
                raise MediaFetchError(
                    f"{path} is no regular file; read it yourself, give its bytes"
                )
            data = file.read(max_bytes + 1)
    except FileNotFoundError as error:
        raise MediaNotFound(f"{path}: there is no such file; check the file URL") from error
    except OSError as error:
        raise MediaFetchError(f"{path}: cannot be read ({error.strerror}); check it") from error
    if len(data) > max_bytes:
        raise too_large(str(path), max_bytes)
    return data


def _open_at_once(path: str, flags: int) -> int:
    """Opens a pipe without waiting for somebody to write into it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


# ---- data URLs -------------------------------------------------------------------------------


def _from_data(url: str, max_bytes: int) -> bytes:
    # A byte is at most four characters (base64, percent-encoded): measured before any copy is made.
    if len(url) > 4 * max_bytes + _HEADER:
        raise too_large("data URL", max_bytes)
    header, comma, payload = url.partition(",")
    if not comma:
        raise MediaFetchError("a data URL without a comma; give data:video/mp4;base64,AAAA...")
    try:
        data = b"".join(_unescaped(payload)) if "%" in payload else payload.encode()
        if header.lower().endswith(";base64"):
            data = data.translate(None, b" \t\r\n").rstrip(b"=")
            # Four characters hold three bytes; refuse before decoding makes a second copy.
            if len(data) * 3 // 4 > max_bytes:
                raise too_large("data URL", max_bytes)
            data = base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except (binascii.Error, UnicodeError) as error:
        raise MediaFetchError(
            f"a data URL that is damaged ({plain(str(error))}); encode the file's bytes with "
            "base64.b64encode, and send all of it"
        ) from error
    if len(data) > max_bytes:
        raise too_large("data URL", max_bytes)
    return data


def _unescaped(text: str) -> Iterator[bytes]:
    """Percent-decoding, piece by piece: unquote_to_bytes takes 50 bytes of memory for every one."""
    at = 0
    while at < len(text):
        piece = text[at : at + _CHUNK]
        cut = piece.rfind("%", len(piece) - 2)  # an escape is not cut in two
        if cut > 0 and at + len(piece) < len(text):
            piece = piece[:cut]
        at += len(piece)
        yield unquote_to_bytes(piece)


# ---- the web ---------------------------------------------------------------------------------


def _from_web(url: str, policy: FetchPolicy) -> bytes:
    deadline = time.monotonic() + policy.timeout
    target = parse("", url)
    for _ in range(policy.max_redirects + 1):
        answer = _ask(target, policy, deadline)
        if answer.body is not None:
            return answer.body
        _check_length(location := answer.location or "", policy)
        target = parse(target.url, location, allow_downgrade=policy.allow_downgrade)
    raise MediaFetchError(
        f"{target.host}: more than {policy.max_redirects} redirects; give the address they end at"
    )


def _ask(target: Target, policy: FetchPolicy, deadline: float) -> Answer:
    """A place to go on to, or a body: new, or kept from last time and confirmed by the server."""
    _check_host(target.host, policy)  # before its name is looked up, which is a message too
    where = addresses(target, policy.allow_private)
    cache = policy.cache
    if cache and (entry := cache.find(target.url)) and entry.size <= policy.max_bytes:
        connection = Connection(target, where, deadline)
        answer = get(connection, policy.max_bytes, entry.condition())
        if answer == Answer():
            answer = Answer(body=cache.read(entry))
            if answer.body is not None:
                return answer
            answer = get(Connection(target, where, deadline), policy.max_bytes, {})
    else:
        answer = get(Connection(target, where, deadline), policy.max_bytes, {})
    if cache and answer.body is not None:
        cache.store(target.url, answer.body, answer.etag, answer.modified)
    return answer


def _check_host(host: str, policy: FetchPolicy) -> None:
    rules = policy.hosts
    if rules is None or any(
        host.endswith(rule[1:]) if rule.startswith("*.") else host == rule for rule in rules
    ):
        return
    raise MediaFetchError(
        f"{host} is not among the hosts to fetch from ({', '.join(rules) or 'none'}); send the "
        "file itself, or add the host to FetchPolicy(hosts=...)"
    )
