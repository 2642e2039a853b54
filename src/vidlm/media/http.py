"""One GET: where a URL leads, whether its addresses are public, and what the server answers.

A name is resolved once, its addresses are checked, and the connection is made to a checked address:
a name that answers differently the second time gains nothing. What a server or a URL says is quoted
in messages only as far as it is short and printable, and never a path, a query or a password.
"""

from __future__ import annotations

import http.client
import io
import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from threading import Timer
from urllib.parse import quote, urldefrag, urljoin, urlsplit

from vidlm.errors import MediaFetchError, MediaLimitError

_REDIRECTS = (301, 302, 303, 307, 308)
_CHUNK = 1 << 16
# What a URL may keep as it is; the rest is percent-encoded, as browsers do.
_SAFE = "/%:;=@!$&'()*+,~?-._[]|"

# urlsplit removes line breaks and tabs without a word, and lone surrogates have no UTF-8.
_UNPRINTABLE = re.compile("[\0-\x1f\x7f\ud800-\udfff]")
_MAX_HOST = 253  # of a name in the DNS
_NAME = re.compile(r"[a-z0-9_.-]+")
_ADDRESS = re.compile(r"[0-9a-f:.]+(?:%[A-Za-z0-9_.-]+)?")  # %: the interface, of a link's own

# IPv6 addresses that carry an IPv4 address, which is where a gateway would connect (RFC 6052).
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# All that is given out for the public internet; what embeds IPv4 the old way lies outside.
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")


# ---- where a URL leads -----------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """Where one request goes. url has no fragment; host is as `host_name` gives it."""

    url: str
    host: str
    port: int
    secure: bool
    path: str


def parse(base: str, url: str, *, allow_downgrade: bool = False) -> Target:
    """The target of an http(s) URL, or of a redirect from `base`.

    allow_downgrade: whether a redirect may lead from https to http, where anybody on the way could
    read and change what comes.
    """
    refuse_unprintable(url)
    try:
        url = urldefrag(urljoin(base, url)).url
        parts = urlsplit(url)
        given, port = parts.hostname, parts.port
    except ValueError:  # its text may hold a password
        raise MediaFetchError(
            "a URL that makes no sense; check how its host and port are written"
        ) from None
    if parts.scheme not in ("http", "https"):
        raise MediaFetchError(
            f"a redirect to {parts.scheme[:20]}: is not followed; give an http:// or https:// "
            "address"
        )
    if parts.scheme == "http" and base[:6].lower() == "https:" and not allow_downgrade:
        raise MediaFetchError(
            "a redirect from https:// to http:// is not followed, since anybody on the way could "
            "change the file; give the http:// address itself, or use "
            "FetchPolicy(allow_downgrade=True) where that is meant"
        )
    if not given:
        raise MediaFetchError("a URL without a host; give https://host/path")
    host = _checked_host(given)
    if parts.username is not None or parts.password is not None:
        raise MediaFetchError(
            f"{host}: a URL with a user name or password is not fetched; download it yourself"
        )
    secure = parts.scheme == "https"
    path = quote(parts.path or "/", safe=_SAFE)
    if parts.query:
        path += "?" + quote(parts.query, safe=_SAFE)
    default = 443 if secure else 80
    return Target(url, host, default if port is None else port, secure, path)


def refuse_unprintable(url: str) -> None:
    """Line breaks in a URL would split the request's header, or vanish unnoticed."""
    if _UNPRINTABLE.search(url):
        raise MediaFetchError(
            "a URL with a line break or another control character; percent-encode it (%0A)"
        )


def _checked_host(given: str) -> str:
    try:
        return host_name(given)
    except ValueError as error:
        raise MediaFetchError(
            f"{plain(given)}: the name cannot be resolved ({error}); check its spelling"
        ) from None


def host_name(given: str) -> str:
    """A host as it is compared and connected to: ASCII (IDNA), lower case, without a final dot.

    Raises ValueError where it is neither a name nor an address.
    """
    if len(given) > _MAX_HOST:  # before IDNA, which takes its time
        raise ValueError(f"at most {_MAX_HOST} characters")
    try:
        host = given.encode("idna").decode("ascii").lower().removesuffix(".")
    except UnicodeError:
        raise ValueError("a part of it is empty, too long, or not allowed") from None
    form = _NAME
    with suppress(ValueError):  # a name
        host, form = str(ipaddress.ip_address(host)), _ADDRESS
    if not form.fullmatch(host):
        raise ValueError("it has a character that no host has")
    return host


def plain(text: str, length: int = 80) -> str:
    """What somebody else wrote, fit for a message: short, and no control characters."""
    shown = "".join(c if c.isascii() and c.isprintable() else "?" for c in text[:length])
    return shown + "..." * (len(text) > length)


# ---- whether to go there ---------------------------------------------------------------------


def addresses(target: Target, allow_private: bool) -> list[str]:
    """The addresses of a host, all of them public unless others are allowed."""
    try:
        found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise MediaFetchError(
            f"{target.host}: the name cannot be resolved ({error}); check it and the network"
        ) from error
    unique = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    if not allow_private and not all(is_public(address) for address in unique):
        raise MediaFetchError(  # without the address, which may tell about the inside of a network
            f"{target.host} is not on the public internet and is not fetched; send the file "
            "itself, or use FetchPolicy(allow_private=True) where that is meant"
        )
    return unique


def is_public(address: str) -> bool:
    """Whether an IP address, and any IPv4 address inside it, is on the public internet."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if ip not in _GLOBAL_UNICAST:
            return False
    return ip.is_global and not ip.is_multicast


# ---- going there -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """A place to go on to, a body, or neither: then what the client has is still right (304).

    etag, modified: the header fields to ask with next time, "" where there is none or the answer
    must not be kept.
    """

    location: str | None = None
    body: bytes | None = None
    etag: str = ""
    modified: str = ""


class Connection(http.client.HTTPConnection):
    """One request to an address that was checked, with the name in Host and in TLS."""

    def __init__(self, target: Target, checked: list[str], deadline: float) -> None:
        super().__init__(target.host, target.port)
        self.default_port = 443 if target.secure else 80  # not repeated in the Host header
        self.target, self.addresses, self.deadline = target, checked, deadline
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


def get(connection: Connection, max_bytes: int, condition: Mapping[str, str]) -> Answer:
    """What the server answers; condition: If-None-Match and the like, which allow a 304."""
    target = connection.target
    watch = Timer(connection.remaining(), connection.abort)
    watch.daemon = True
    watch.start()
    headers = {"Accept-Encoding": "identity", "Connection": "close", "User-Agent": "vidlm"}
    problem: Exception | None = None
    try:
        connection.request("GET", target.path, headers=headers | dict(condition))
        with connection.getresponse() as response:
            answer = _answer(response, target.host, max_bytes, bool(condition))
        if not connection.expired:
            return answer
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
        f"{target.host}: the transfer failed ({plain(str(problem), 200)}); check the address, or "
        "try again"
    ) from problem


def _answer(
    response: http.client.HTTPResponse, host: str, max_bytes: int, conditional: bool
) -> Answer:
    if response.status in _REDIRECTS:
        return Answer(location=response.headers.get("Location", ""))
    if response.status == 304 and conditional:
        return Answer()
    if response.status != 200:  # with the phrase of the standard, not of the server
        phrase = http.client.responses.get(response.status, "").rstrip()
        raise MediaFetchError(
            f"{host} answered {response.status} {phrase}; check the address and whether it needs "
            "a login"
        )
    body = _body(response, host, max_bytes)
    if "no-store" in response.headers.get("Cache-Control", "").lower():
        return Answer(body=body)
    etag, modified = (response.headers.get(name, "") for name in ("ETag", "Last-Modified"))
    return Answer(body=body, etag=etag, modified=modified)


def _body(response: http.client.HTTPResponse, host: str, max_bytes: int) -> bytes:
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding.lower() != "identity":
        raise MediaFetchError(
            f"{host} sent the file {plain(encoding, 20)}-encoded; download it yourself"
        )
    announced = response.length
    if announced is not None and announced > max_bytes:  # a hint; what arrives is counted below
        raise too_large(host, max_bytes)
    data = io.BytesIO()
    while chunk := response.read1(_CHUNK):
        data.write(chunk)
        if data.tell() > max_bytes:
            raise too_large(host, max_bytes)
    if announced is not None and data.tell() < announced:
        raise http.client.IncompleteRead(b"", announced - data.tell())
    return data.getvalue()


def too_large(name: str, max_bytes: int) -> MediaLimitError:
    return MediaLimitError(
        f"{name}: more than the limit of {max_bytes} bytes; send a shorter or smaller clip, or "
        "raise max_bytes"
    )
