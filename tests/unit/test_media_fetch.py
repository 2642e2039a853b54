"""Fetching: what comes back, what is refused, and where a connection goes."""

from __future__ import annotations

import base64
import socket
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vidlm.errors import MediaFetchError, MediaLimitError, MediaNotFound
from vidlm.media.fetch import fetch, is_public, local_path

BODY = bytes(range(256)) * 40


class Handler(BaseHTTPRequestHandler):
    """A small web: each path is a way to answer."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.seen.append((self.path, dict(self.headers)))  # type: ignore[attr-defined]
        name, _, rest = self.path.strip("/").partition("/")
        getattr(self, f"answer_{name.partition('?')[0]}", self.answer_missing)(rest)

    def log_message(self, *args: object) -> None:
        pass

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in ({"Content_Length": str(len(body))} | headers).items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def answer_ok(self, rest: str) -> None:
        self.reply(200, BODY)

    def answer_missing(self, rest: str) -> None:
        self.reply(404, b"no")

    def answer_zipped(self, rest: str) -> None:
        self.reply(200, BODY, Content_Encoding="gzip")

    def answer_to(self, rest: str) -> None:
        """A redirect to whatever the path goes on with."""
        self.reply(302, Location=rest.replace("_", "/").replace("!", ":"))

    def answer_down(self, rest: str) -> None:
        """As many redirects as the path says, then the file."""
        left = int(rest)
        self.reply(302, Location=f"/down/{left - 1}" if left > 1 else "/ok")

    def answer_boasting(self, rest: str) -> None:
        self.reply(200, b"small", Content_Length="999999999")

    def answer_short(self, rest: str) -> None:
        self.reply(200, b"half", Content_Length="8", Connection="close")

    def answer_chunked(self, rest: str) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for at in range(0, len(BODY), 1000):
            part = BODY[at : at + 1000]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
        self.wfile.write(b"0\r\n\r\n")

    def answer_endless(self, rest: str) -> None:
        self.send_response(200)
        self.end_headers()
        try:
            while True:
                self.wfile.write(BODY)
        except OSError:
            self.close_connection = True

    def answer_drip(self, rest: str) -> None:
        """Never silent for long, never done."""
        self.send_response(200)
        self.end_headers()
        try:
            while not self.server.closing.wait(0.02):  # type: ignore[attr-defined]
                self.wfile.write(b".")
        except OSError:
            pass
        self.close_connection = True

    def answer_silent(self, rest: str) -> None:
        self.server.closing.wait(10)  # type: ignore[attr-defined]
        self.close_connection = True


@pytest.fixture(scope="module")
def server() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.seen, server.closing = [], threading.Event()  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.closing.set()  # type: ignore[attr-defined]
        server.shutdown()
        thread.join()


@pytest.fixture
def web(server: ThreadingHTTPServer) -> str:
    server.seen.clear()  # type: ignore[attr-defined]
    return f"http://127.0.0.1:{server.server_port}"


def get(url: str, **how: object) -> bytes:
    return fetch(url, allow_private=True, **how)  # type: ignore[arg-type]


# ---- what comes back -------------------------------------------------------------------------


def test_the_body_comes_back_whole(web: str, server: ThreadingHTTPServer) -> None:
    assert get(f"{web}/ok") == BODY
    assert get(f"{web}/chunked") == BODY
    _, headers = server.seen[0]  # type: ignore[attr-defined]
    assert headers["Host"] == web.removeprefix("http://")
    assert headers["Accept-Encoding"] == "identity"


def test_paths_are_encoded_and_queries_kept(web: str, server: ThreadingHTTPServer) -> None:
    get(f"{web}/ok/ein spaß%20hier.mp4?a=1&b=%2F x#part")
    path, _ = server.seen[0]  # type: ignore[attr-defined]
    assert path == "/ok/ein%20spa%C3%9F%20hier.mp4?a=1&b=%2F%20x"


def test_three_redirects_are_followed_and_no_more(web: str) -> None:
    assert get(f"{web}/down/3") == BODY
    with pytest.raises(MediaFetchError, match=r"127\.0\.0\.1: more than 3 redirects"):
        get(f"{web}/down/4")


# ---- limits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["ok", "chunked", "endless", "boasting"])
def test_bytes_are_counted_as_they_come(web: str, how: str) -> None:
    with pytest.raises(MediaLimitError, match=r"127\.0\.0\.1: more than the limit of 9999 bytes"):
        get(f"{web}/{how}", max_bytes=9999)


def test_exactly_the_limit_is_allowed(web: str) -> None:
    assert get(f"{web}/ok", max_bytes=len(BODY)) == BODY


@pytest.mark.parametrize("how", ["drip", "silent"])
def test_the_time_limit_covers_the_whole_transfer(web: str, how: str) -> None:
    with pytest.raises(MediaFetchError, match=r"127\.0\.0\.1: not done within the time limit"):
        get(f"{web}/{how}", timeout=0.3)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("missing", "answered 404 Not Found; check the address"),
        ("short", "the transfer failed"),
        ("zipped", "gzip-encoded"),
        ("to/file!___etc_hosts", "a redirect to file: is not followed"),
        ("to/data!,x", "a redirect to data: is not followed"),
        ("to/http!__u!p@host_", "user name or password"),
        ("to/http!__[", "makes no sense"),
    ],
)
def test_failures_name_the_host_and_no_secret(web: str, path: str, said: str) -> None:
    with pytest.raises(MediaFetchError, match=said) as caught:
        get(f"{web}/{path}?token=secret")
    assert "secret" not in str(caught.value)
    assert path not in str(caught.value)


def test_no_server_is_a_fetch_error() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        with pytest.raises(MediaFetchError, match=r"127\.0\.0\.1: the transfer failed"):
            get(f"http://127.0.0.1:{port}/")


# ---- where a connection goes -----------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.0.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1%eth0",
        "fc00::1",
        "fec0::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "2002:7f00:1::",
        "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe",
    ],
)
def test_inner_addresses_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["93.184.215.14", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_outer_addresses_are_public(address: str) -> None:
    assert is_public(address)


def resolve(monkeypatch: pytest.MonkeyPatch, **names: list[str]) -> list[str]:
    """A name service of our own; what it was asked comes back."""
    asked: list[str] = []
    real = socket.getaddrinfo

    def answer(host, port, *args, **kwargs):
        asked.append(host)
        if host.replace(".", "_") not in names:
            return real(host, port, *args, **kwargs)
        addresses = names[host.replace(".", "_")]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    return asked


@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["8.8.8.8", "10.0.0.1"]])
def test_a_name_with_an_inner_address_is_refused(monkeypatch, addresses: list[str]) -> None:
    resolve(monkeypatch, inside_example=addresses)
    monkeypatch.setattr(socket, "create_connection", None)  # would be called
    with pytest.raises(MediaFetchError, match="not on the public internet") as caught:
        fetch("http://inside.example/a?token=secret")
    assert "inside.example" in str(caught.value)
    assert addresses[-1] not in str(caught.value)


def test_loopback_in_any_spelling_is_refused(web: str) -> None:
    for host in ("127.0.0.1", "localhost", "127.1", "0x7f000001", "[::1]", "[::ffff:127.0.0.1]"):
        with pytest.raises(MediaFetchError):
            fetch(web.replace("127.0.0.1", host) + "/ok")


def test_a_redirect_is_checked_like_the_first_address(web: str, monkeypatch) -> None:
    """The public name leads to our server, which sends on to the inside."""
    port = web.rpartition(":")[2]
    resolve(monkeypatch, public_example=["8.8.8.8"])
    real = socket.create_connection
    monkeypatch.setattr(
        socket, "create_connection", lambda where, t: real(("127.0.0.1", where[1]), t)
    )
    assert fetch(f"http://public.example:{port}/ok") == BODY
    for there in (f"http!__127.0.0.1!{port}_ok", f"__localhost!{port}_ok"):
        with pytest.raises(MediaFetchError, match="not on the public internet"):
            fetch(f"http://public.example:{port}/to/{there}")


def test_the_connection_goes_to_the_address_that_was_checked(web, server, monkeypatch) -> None:
    port = web.rpartition(":")[2]
    asked = resolve(monkeypatch, pinned_example=["8.8.8.8", "9.9.9.9"])
    real, dialled = socket.create_connection, []

    def dial(where, timeout):
        dialled.append(where)
        if where[0] == "8.8.8.8":
            raise TimeoutError("no route")
        return real(("127.0.0.1", where[1]), timeout)

    monkeypatch.setattr(socket, "create_connection", dial)
    assert fetch(f"http://pinned.example:{port}/ok") == BODY
    assert dialled == [("8.8.8.8", int(port)), ("9.9.9.9", int(port))]
    assert asked.count("pinned.example") == 1
    _, headers = server.seen[-1]
    assert headers["Host"] == f"pinned.example:{port}"


def test_tls_is_checked_against_the_name(web: str, monkeypatch) -> None:
    port = web.rpartition(":")[2]
    names = []

    class Context:
        def wrap_socket(self, wire, *, server_hostname, do_handshake_on_connect):
            names.append(server_hostname)
            wire.close()
            raise ssl.SSLCertVerificationError("certificate verify failed")

    monkeypatch.setattr(ssl, "create_default_context", Context)
    with pytest.raises(MediaFetchError, match="certificate verify failed"):
        get(f"https://localhost:{port}/ok")
    assert names == ["localhost"]


def test_tls_to_a_server_without_it_fails_cleanly(web: str) -> None:
    with pytest.raises(MediaFetchError, match="the transfer failed"):
        get(web.replace("http:", "https:") + "/ok", timeout=5)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://host/a.mp4", "is not fetched; give http"),
        ("/just/a/path", "is not fetched; give http"),
        ("http://", "without a host"),
        ("http://host:port/", "makes no sense"),
        ("http://[::1/", "makes no sense"),
        ("http://user:pw@host/", "user name or password"),
        ("http://a..b/", "cannot be resolved"),
        ("http://" + "a" * 80 + ".example/", "cannot be resolved"),
        ("http://no-such-name.invalid/", "cannot be resolved"),
    ],
)
def test_addresses_that_make_no_sense(url: str, said: str) -> None:
    with pytest.raises(MediaFetchError, match=said) as caught:
        fetch(url)
    assert "pw" not in str(caught.value)


# ---- file and data ---------------------------------------------------------------------------


def test_a_file_url_names_a_file_of_this_machine(tmp_path: Path) -> None:
    file = tmp_path / "a b#é.mp4"
    file.write_bytes(BODY)
    assert local_path(file.as_uri()) == file
    assert fetch(file.as_uri()) == BODY
    assert fetch(file.as_uri().replace("file://", "FILE://localhost"), max_bytes=len(BODY)) == BODY
    with pytest.raises(MediaLimitError, match="more than the limit of 100 bytes"):
        fetch(file.as_uri(), max_bytes=100)
    with pytest.raises(MediaNotFound, match="there is no such file"):
        fetch((tmp_path / "gone").as_uri())
    with pytest.raises(MediaFetchError, match="cannot be read"):
        fetch(tmp_path.as_uri())


@pytest.mark.parametrize("url", ["file://server/share/a.mp4", "file://", "file:///a%00b"])
def test_other_file_urls_are_refused(url: str) -> None:
    with pytest.raises(MediaFetchError, match="file URL"):
        fetch(url)


@given(st.binary(max_size=200), st.booleans())
def test_data_urls_give_back_what_was_put_in(data: bytes, padded: bool) -> None:
    text = base64.b64encode(data).decode()
    assert fetch(f"data:video/mp4;base64,{text if padded else text.rstrip('=')}") == data
    assert fetch(f"DATA:;BASE64,{text.replace('+', '%2B').replace('=', '%3D')}") == data
    assert fetch("data:," + "".join(f"%{byte:02x}" for byte in data)) == data
    wrapped = "\r\n".join(text[i : i + 16] for i in range(0, len(text), 16))
    assert fetch(f"data:video/mp4;base64,{wrapped}", max_bytes=len(data)) == data


def test_data_urls_are_measured_before_they_are_decoded(monkeypatch) -> None:
    monkeypatch.setattr(base64, "b64decode", None)  # would be called
    with pytest.raises(MediaLimitError, match="data URL: more than the limit of 10 bytes"):
        fetch("data:;base64," + base64.b64encode(b"x" * 11).decode(), max_bytes=10)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("data:video/mp4;base64", "without a comma"),
        ("data:video/mp4;base64,****", "base64 is damaged"),
        ("data:video/mp4;base64,QQ=A", "base64 is damaged"),
        ("data:video/mp4;base64,QQé=", "base64 is damaged"),
        ("data:video/mp4;base64,Q", "base64 is damaged"),
    ],
)
def test_damaged_data_urls(url: str, said: str) -> None:
    with pytest.raises(MediaFetchError, match=said):
        fetch(url)
