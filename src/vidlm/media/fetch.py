"""URL -> bytes, and every limit on the way: size, time, redirects, and where one may connect.

A name is resolved once, its addresses are checked, and the connection is made to a checked address:
a name that answers differently the second time gains nothing. Each redirect is checked likewise.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import io
import ipaddress
import socket
import ssl
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Timer
from urllib.parse import quote, unquote, unquote_to_bytes, urljoin, urlsplit

from vidlm.errors import MediaFetchError, MediaLimitError, MediaNotFound

MAX_BYTES = 512 * 2**20
_MAX_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)
_CHUNK = 1 << 16
# What a URL may keep as it is; the rest is percent-encoded, as browsers do.
_SAFE = "/%:;=@!$&'()*+,~?-._[]|"

# IPv6 addresses that carry an IPv4 address, which is where a gateway would connect (RFC 6052).
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def fetch(
    url: str,
    *,
    max_bytes: int = MAX_BYTES,
    timeout: float = 30.0,
    allow_private: bool = False,
) -> bytes:
    """The bytes behind an http, https, file or data URL.

    timeout: seconds for the whole transfer, redirects included (name resolution has its own).
    allow_private: also connect to addresses that are not on the public internet (loopback,
        private, link-local). Proxies from the environment are not used.

    Raises MediaLimitError above max_bytes, MediaNotFound for a file that is not there, and
    MediaFetchError for everything else, naming the host but never a path or query.
    """
    scheme = url.partition(":")[0].lower()
    if scheme == "data":
        return _from_data(url, max_bytes)
    if scheme == "file":
        return _from_file(local_path(url), max_bytes)
    if scheme in ("http", "https"):
        return _from_web(url, max_bytes, time.monotonic() + timeout, allow_private)
    raise MediaFetchError(
        f"a URL that begins {url[:12]!r} is not fetched; give http://, https://, file:// or data:"
    )


def local_path(url: str) -> Path:
    """The path that a file URL of this machine names."""
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise MediaFetchError(
            f"a file URL of host {parts.netloc!r}; only this machine's files are read: "
            "file:///path/to/video.mp4"
        )
    path = unquote(parts.path)
    if not path or "\0" in path:
        raise MediaFetchError("a file URL without a usable path; give file:///path/to/video.mp4")
    return Path(path)


def _from_file(path: Path, max_bytes: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except FileNotFoundError as error:
        raise MediaNotFound(f"{path}: there is no such file; check the file URL") from error
    except OSError as error:
        raise MediaFetchError(f"{path}: cannot be read ({error.strerror}); check it") from error
    return _within(data, max_bytes, str(path))


def _from_data(url: str, max_bytes: int) -> bytes:
    header, comma, payload = url.partition(",")
    if not comma:
        raise MediaFetchError("a data URL without a comma; give data:video/mp4;base64,AAAA...")
    if not header.lower().endswith(";base64"):
        return _within(unquote_to_bytes(payload), max_bytes, "data URL")
    try:
        text = (unquote(payload) if "%" in payload else payload).encode("ascii")
        text = text.translate(None, b" \t\r\n").rstrip(b"=")
        # Four characters hold three bytes; refuse before decoding makes a second copy.
        if len(text) * 3 // 4 > max_bytes:
            raise _too_large("data URL", max_bytes)
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except (binascii.Error, UnicodeError) as error:
        raise MediaFetchError(
            f"a data URL whose base64 is damaged ({error}); encode the file's bytes with "
            "base64.b64encode, and send all of it"
        ) from error


def _within(data: bytes, max_bytes: int, name: str) -> bytes:
    if len(data) > max_bytes:
        raise _too_large(name, max_bytes)
    return data


def _too_large(name: str, max_bytes: int) -> MediaLimitError:
    return MediaLimitError(
        f"{name}: more than the limit of {max_bytes} bytes; send a shorter or smaller clip, or "
        "raise max_bytes"
    )


# ---- the web ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Target:
    """Where one request goes."""

    url: str
    host: str
    port: int
    secure: bool
    path: str


def _from_web(url: str, max_bytes: int, deadline: float, allow_private: bool) -> bytes:
    target = _target("", url)
    for _ in range(_MAX_REDIRECTS + 1):
        connection = _Connection(target, _addresses(target, allow_private), deadline)
        location, body = _get(connection, max_bytes)
        if location is None:
            return body
        target = _target(target.url, location)
    raise MediaFetchError(
        f"{target.host}: more than {_MAX_REDIRECTS} redirects; give the address they end at"
    )


def _target(base: str, url: str) -> _Target:
    try:
        url = urljoin(base, url)
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise MediaFetchError(f"a URL that makes no sense ({error}); check it") from error
    if parts.scheme not in ("http", "https"):
        raise MediaFetchError(
            f"a redirect to {parts.scheme}: is not followed; give an http:// or https:// address"
        )
    if not host:
        raise MediaFetchError("a URL without a host; give https://host/path")
    if parts.username or parts.password:
        raise MediaFetchError(
            f"{host}: a URL with a user name or password is not fetched; download it yourself"
        )
    secure = parts.scheme == "https"
    path = quote(parts.path or "/", safe=_SAFE)
    if parts.query:
        path += "?" + quote(parts.query, safe=_SAFE)
    return _Target(url, host, port or (443 if secure else 80), secure, path)


def _addresses(target: _Target, allow_private: bool) -> list[str]:
    """The addresses of a host, all of them public unless others are allowed."""
    try:
        found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise MediaFetchError(
            f"{target.host}: the name cannot be resolved ({error}); check it and the network"
        ) from error
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    if not allow_private and not all(is_public(address) for address in addresses):
        raise MediaFetchError(  # without the address, which may tell about the inside of a network
            f"{target.host} is not on the public internet and is not fetched; send the file "
            "itself, or call fetch(..., allow_private=True) where that is meant"
        )
    return addresses


def is_public(address: str) -> bool:
    """Whether an IP address, and any IPv4 address inside it, is on the public internet."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if ip.is_site_local:
            return False
    return ip.is_global and not ip.is_multicast


class _Connection(http.client.HTTPConnection):
    """One request to an address that was checked, with the name in Host and in TLS."""

    def __init__(self, target: _Target, addresses: list[str], deadline: float) -> None:
        super().__init__(target.host, target.port)
        self.default_port = 443 if target.secure else 80  # not repeated in the Host header
        self.target, self.addresses, self.deadline = target, addresses, deadline
        self.expired = False
        self.wire: socket.socket | None = None  # http.client drops its own before the body is read

    def remaining(self) -> float:
        return max(self.deadline - time.monotonic(), 0.001)

    def connect(self) -> None:
        self.wire = self._dial()
        self.wire.settimeout(self.remaining())
        if self.target.secure:
            secured = ssl.create_default_context().wrap_socket(
                self.wire, server_hostname=self.target.host, do_handshake_on_connect=False
            )
            self.wire = secured
            secured.do_handshake()
        self.sock = self.wire

    def _dial(self) -> socket.socket:
        for left in range(len(self.addresses), 0, -1):
            where = self.addresses[-left], self.target.port
            try:
                return socket.create_connection(where, self.remaining() / left)
            except OSError:
                if left == 1:
                    raise
        raise OSError("the name has no address")

    def abort(self) -> None:
        """Ends all waiting on the connection: a socket's timeout bounds one read, not the sum."""
        self.expired = True
        if self.wire is not None:
            with suppress(OSError):
                socket.socket.shutdown(self.wire, socket.SHUT_RDWR)  # without TLS's own goodbye


def _get(connection: _Connection, max_bytes: int) -> tuple[str | None, bytes]:
    """Where the answer redirects to, or None and its body."""
    target = connection.target
    watch = Timer(connection.remaining(), connection.abort)
    watch.daemon = True
    watch.start()
    headers = {"Accept-Encoding": "identity", "Connection": "close", "User-Agent": "vidlm"}
    problem: Exception | None = None
    try:
        connection.request("GET", target.path, headers=headers)
        with connection.getresponse() as response:
            if response.status in _REDIRECTS:
                return response.headers.get("Location", ""), b""
            body = _body(response, target.host, max_bytes)
        if not connection.expired:
            return None, body
    except (OSError, http.client.HTTPException) as error:
        problem = error
    finally:
        watch.cancel()
        connection.close()
        if connection.wire is not None:
            connection.wire.close()
    if connection.expired or isinstance(problem, TimeoutError):
        raise MediaFetchError(
            f"{target.host}: not done within the time limit; try again, raise timeout, or "
            "download it yourself"
        ) from problem
    raise MediaFetchError(
        f"{target.host}: the transfer failed ({problem}); check the address, or try again"
    ) from problem


def _body(response: http.client.HTTPResponse, host: str, max_bytes: int) -> bytes:
    if response.status != 200:
        raise MediaFetchError(
            f"{host} answered {response.status} {response.reason}; check the address and whether "
            "it needs a login"
        )
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding.lower() != "identity":
        raise MediaFetchError(f"{host} sent the file {encoding}-encoded; download it yourself")
    announced = response.length
    if announced is not None and announced > max_bytes:  # a hint; what arrives is counted below
        raise _too_large(host, max_bytes)
    data = io.BytesIO()
    while chunk := response.read1(_CHUNK):
        data.write(chunk)
        if data.tell() > max_bytes:
            raise _too_large(host, max_bytes)
    if announced is not None and data.tell() < announced:
        raise http.client.IncompleteRead(b"", announced - data.tell())
    return data.getvalue()
