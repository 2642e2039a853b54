"""Fetching from the web: what comes back, what is refused, and where a connection goes."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator

import pytest

from vidlm.errors import MediaFetchError, MediaLimitError
from vidlm.media import fetch as fetching
from vidlm.media.fetch import FetchPolicy, fetch
from vidlm.media.http import Answer, is_public, parse
from web import BODY, Web, serve


@pytest.fixture(scope="module")
def server() -> Iterator[Web]:
    with serve() as server:
        yield server


@pytest.fixture
def web(server: Web) -> str:
    return server.forget().url


def get(url: str, **rules: object) -> bytes:
    return fetch(url, policy=FetchPolicy(**{"allow_private": True, **rules}))  # type: ignore[arg-type]


# ---- what comes back -------------------------------------------------------------------------


def test_the_body_comes_back_whole(web: str, server: Web) -> None:
    assert get(f"{web}/ok") == BODY
    assert get(f"{web}/chunked") == BODY
    _, headers = server.seen[0]
    assert headers["Host"] == web.removeprefix("http://")
    assert headers["Accept-Encoding"] == "identity"


def test_paths_are_encoded_and_queries_kept(web: str, server: Web) -> None:
    get(f"{web}/ok/ein spaß%20hier%0d%0a.mp4?a=1&b=%2F x#part")
    path, _ = server.seen[0]
    assert path == "/ok/ein%20spa%C3%9F%20hier%0d%0a.mp4?a=1&b=%2F%20x"


def test_three_redirects_are_followed_and_no_more(web: str) -> None:
    assert get(f"{web}/down/3") == BODY
    with pytest.raises(MediaFetchError, match=r"127\.0\.0\.1: more than 3 redirects"):
        get(f"{web}/down/4")
    assert get(f"{web}/down/5", max_redirects=5) == BODY
    with pytest.raises(MediaFetchError, match="more than 0 redirects"):
        get(f"{web}/down/1", max_redirects=0)


# ---- limits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["ok", "chunked", "endless", "endlesschunks", "boasting"])
def test_bytes_are_counted_as_they_come(web: str, how: str) -> None:
    with pytest.raises(MediaLimitError, match=r"127\.0\.0\.1: more than the limit of 9999 bytes"):
        get(f"{web}/{how}", max_bytes=9999)


def test_exactly_the_limit_is_allowed(web: str) -> None:
    assert get(f"{web}/ok", max_bytes=len(BODY)) == BODY


def test_more_than_was_announced_is_not_read(web: str) -> None:
    assert get(f"{web}/long", max_bytes=8) == BODY[:8]


@pytest.mark.parametrize("how", ["drip", "dripheader", "continue", "silent"])
def test_the_time_limit_covers_the_whole_transfer(web: str, how: str) -> None:
    with pytest.raises(MediaFetchError, match=r"127\.0\.0\.1: not done within the time limit"):
        get(f"{web}/{how}", timeout=0.3)


def test_long_urls_are_refused(web: str, server: Web) -> None:
    start = f"{web}/ok/"
    assert get(start.ljust(8192, "a")) == BODY
    server.forget()
    for url in (start.ljust(8193, "a"), "http://" + "a" * 10**6 + "/"):
        with pytest.raises(
            MediaFetchError, match=rf"{len(url)} characters, at most 8192"
        ) as caught:
            get(url)
        assert len(str(caught.value)) < 200
    assert not server.seen
    with pytest.raises(MediaFetchError, match="characters, at most 8192"):
        get(f"{web}/far")
    assert get(f"{web}/far", max_url=10_000) == BODY


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("missing", "answered 404 Not Found; check the address"),
        ("unasked", "answered 304 Not Modified"),
        ("short", "the transfer failed"),
        ("zipped", "gzip-encoded"),
        ("to/file!___etc_hosts", "a redirect to file: is not followed"),
        ("to/data!,x", "a redirect to data: is not followed"),
        ("to/gopher!__host_", "a redirect to gopher: is not followed"),
        ("to/http!__u!p@host_", "user name or password"),
        ("to/http!__[", "makes no sense"),
        ("folded", "line break"),
        ("phrase", "answered 503 Service Unavailable"),
        ("noise", "the transfer failed"),
    ],
)
def test_failures_name_the_host_and_no_secret(web: str, path: str, said: str) -> None:
    with pytest.raises(MediaFetchError, match=said) as caught:
        get(f"{web}/{path}?token=secret")
    message = str(caught.value)
    assert "secret" not in message
    assert path not in message
    assert message.isprintable()
    assert len(message) < 350


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
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.0.1", "169.254.169.254", "100.64.0.1"),
        *("0.0.0.0", "224.0.0.1", "255.255.255.255", "198.18.0.1", "192.0.2.1"),
        *("::1", "::", "fe80::1%eth0", "fc00::1", "fec0::1", "ff02::1", "ff0e::1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "::ffff:0:127.0.0.1"),
        *("2002:7f00:1::", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::a9fe:a9fe"),
        *("2001:db8::1", "2001:0:7f00:1::1", "4000::1"),
    ],
)
def test_inner_addresses_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["93.184.215.14", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_outer_addresses_are_public(address: str) -> None:
    assert is_public(address)


def resolve(monkeypatch: pytest.MonkeyPatch, **names: list[list[str]]) -> list[str]:
    """A name service of our own, with the answers of each name in turn; what it was asked."""
    asked: list[str] = []
    real = socket.getaddrinfo

    def answer(host, port, *args, **kwargs):
        asked.append(host)
        answers = names.get(host.replace(".", "_"))
        if answers is None:
            return real(host, port, *args, **kwargs)
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    return asked


def lead_here(monkeypatch: pytest.MonkeyPatch, *down: str) -> list[str]:
    """All addresses but those that are down lead to this machine; which were dialled."""
    real, dialled = socket.create_connection, []

    def dial(where, timeout):
        dialled.append(where[0])
        if where[0] in down:
            raise TimeoutError("no route")
        return real(("127.0.0.1", where[1]), timeout)

    monkeypatch.setattr(socket, "create_connection", dial)
    return dialled


@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["8.8.8.8", "10.0.0.1"]])
def test_a_name_with_an_inner_address_is_refused(monkeypatch, addresses: list[str]) -> None:
    resolve(monkeypatch, inside_example=[addresses])
    monkeypatch.setattr(socket, "create_connection", None)  # would be called
    with pytest.raises(MediaFetchError, match="not on the public internet") as caught:
        fetch("http://inside.example/a?token=secret")
    assert "inside.example" in str(caught.value)
    assert addresses[-1] not in str(caught.value)


def test_loopback_in_any_spelling_is_refused(web: str, server: Web) -> None:
    hosts = "127.0.0.1 localhost LOCALHOST. 127.1 0x7f000001 2130706433 127.0.0.1. 0 [::1] "
    hosts += "[::ffff:127.0.0.1] [::ffff:7f00:1] [0:0:0:0:0:0:0:1] １２７.０.０.１ 127。0。0。1"  # noqa: RUF001
    for host in hosts.split():
        with pytest.raises(MediaFetchError, match=r"not on the public internet|cannot be resolved"):
            fetch(web.replace("127.0.0.1", host) + "/ok")
    assert not server.seen


def test_a_redirect_is_checked_like_the_first_address(web: str, monkeypatch) -> None:
    """The public name leads to our server, which sends on to the inside."""
    port = web.rpartition(":")[2]
    resolve(monkeypatch, public_example=[["8.8.8.8"]])
    lead_here(monkeypatch)
    assert fetch(f"http://public.example:{port}/ok") == BODY
    inside = (f"http!__127.0.0.1!{port}_ok", f"__localhost!{port}_ok", "http!__169.254.169.254_")
    for there in inside:
        with pytest.raises(MediaFetchError, match="not on the public internet"):
            fetch(f"http://public.example:{port}/to/{there}")


def test_a_redirect_from_https_to_http_is_refused() -> None:
    """Whoever listens on the way could change what comes; the other way round is fine."""
    for url in ("http://host/a.mp4", "HTTP://host"):
        with pytest.raises(MediaFetchError, match="from https:// to http:// is not followed"):
            parse("https://host/", url)
        assert not parse("https://host/", url, allow_downgrade=True).secure
        assert not parse("http://host/", url).secure
    assert parse("https://host/", "//other/a.mp4").secure
    assert parse("http://host/", "https://host/a.mp4").secure


@pytest.mark.parametrize("allowed", [False, True])
def test_the_policy_decides_on_redirects_to_http(allowed: bool, web: str, monkeypatch) -> None:
    ask, asked = fetching._ask, []

    def secure(target, policy, deadline):
        asked.append(target.url)
        if target.secure:
            return Answer(location=f"{web}/ok")
        return ask(target, policy, deadline)

    monkeypatch.setattr(fetching, "_ask", secure)
    if allowed:
        assert get("https://host/", allow_downgrade=True) == BODY
    else:
        with pytest.raises(MediaFetchError, match="is not followed"):
            get("https://host/")
    assert asked == ["https://host/", f"{web}/ok"][: 1 + allowed]


def test_the_connection_goes_to_the_address_that_was_checked(web, server, monkeypatch) -> None:
    port = web.rpartition(":")[2]
    asked = resolve(monkeypatch, pinned_example=[["8.8.8.8", "9.9.9.9"]])
    dialled = lead_here(monkeypatch, "8.8.8.8")
    assert fetch(f"http://PINNED.example.:{port}/ok") == BODY
    assert dialled == ["8.8.8.8", "9.9.9.9"]
    assert asked.count("pinned.example") == 1
    _, headers = server.seen[-1]
    assert headers["Host"] == f"pinned.example:{port}"


def test_a_name_that_changes_its_answer_gains_nothing(web: str, monkeypatch) -> None:
    port = web.rpartition(":")[2]
    answers = [["8.8.8.8"], ["8.8.8.8"], ["127.0.0.1"]]
    asked = resolve(monkeypatch, fickle_example=answers)
    dialled = lead_here(monkeypatch)
    assert fetch(f"http://fickle.example:{port}/ok") == BODY
    with pytest.raises(MediaFetchError, match="not on the public internet"):
        fetch(f"http://fickle.example:{port}/down/1")
    assert asked.count("fickle.example") == 3
    assert dialled == ["8.8.8.8", "8.8.8.8"]


# ---- which hosts -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "host", "allowed"),
    [
        ("example.org", "example.org", True),
        ("Example.ORG.", "EXAMPLE.org.", True),
        ("example.org", "www.example.org", False),
        ("example.org", "example.org.evil.test", False),
        ("example.org", "notexample.org", False),
        ("example.org", "example。org", True),  # IDNA takes that for a dot
        ("example.org", "evil.test\\.example.org", False),
        ("*.example.org", "a.b.example.org", True),
        ("*.example.org", "example.org", False),
        ("*.example.org", "notexample.org", False),
        ("*.Bücher.example", "www.xn--bcher-kva.example", True),
        ("xn--bcher-kva.example", "BÜCHER.example", True),
        ("93.184.215.14", "93.184.215.14", True),
        ("93.184.215.14", "93.184.215.15", False),
        ("[2606:4700::1111]", "[2606:4700:0:0::1111]", True),
    ],
)
def test_the_list_of_hosts(monkeypatch, rule: str, host: str, allowed: bool) -> None:
    asked = []

    def lookup(name, *args, **kwargs):
        asked.append(name)
        raise socket.gaierror("not found")

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    with pytest.raises(MediaFetchError) as caught:
        fetch(f"https://{host}/a.mp4", policy=FetchPolicy(hosts=("other.test", rule)))
    assert ("not found" in str(caught.value)) == allowed
    assert len(asked) == allowed  # a name that is looked up is a message already


def test_a_redirect_to_a_host_that_is_not_on_the_list(web: str, server, monkeypatch) -> None:
    port = web.rpartition(":")[2]
    asked = resolve(monkeypatch, good_example=[["8.8.8.8"]], bad_example=[["9.9.9.9"]])
    lead_here(monkeypatch)
    policy = FetchPolicy(hosts=("good.example",))
    assert fetch(f"http://good.example:{port}/to/__good.example!{port}_ok", policy=policy) == BODY
    with pytest.raises(MediaFetchError, match=r"bad\.example is not among .* \(good\.example\)"):
        fetch(f"http://good.example:{port}/to/__bad.example!{port}_ok", policy=policy)
    assert "bad.example" not in asked
    with pytest.raises(MediaFetchError, match=r"fetch from \(none\)"):
        fetch(f"http://good.example:{port}/ok", policy=FetchPolicy(hosts=()))


def test_a_host_on_the_list_is_not_private_for_that(web: str) -> None:
    with pytest.raises(MediaFetchError, match="not on the public internet"):
        fetch(f"{web}/ok", policy=FetchPolicy(hosts=("127.0.0.1",)))
    assert get(f"{web}/ok", hosts=("127.0.0.1",)) == BODY


# ---- TLS -------------------------------------------------------------------------------------


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


# ---- URLs that are wrong ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://user:pw@host/a.mp4", "begins 'ftp' is not fetched; give http"),
        ("/just/a/path", "is not fetched; give http"),
        (" http://host/", "is not fetched; give http"),
        ("http://", "without a host"),
        ("http:///path", "without a host"),
        ("http://host:port/", "makes no sense"),
        ("http://host:99999/", "makes no sense"),
        ("http://[::1/", "makes no sense"),
        ("http://user:pw@host/", "host: a URL with a user name or password"),
        ("http://pw@host/", "user name or password"),
        ("http://@host/", "user name or password"),
        ("http://good.example\\@host/", "user name or password"),
        ("http://user:pw@h℀st/", "makes no sense"),
        ("http://user:pw@host:port/", "makes no sense"),
        ("http://a..b/", "cannot be resolved"),
        ("http://a b/", "cannot be resolved"),
        ("http://a%2eb/", "cannot be resolved"),
        ("http://\x85/", "cannot be resolved"),
        ("http://" + "a" * 80 + ".example/", "cannot be resolved"),
        ("http://" + "ä." * 200 + "example/", "at most 253 characters"),
        ("http://no-such-name.invalid/", "cannot be resolved"),
    ],
)
def test_addresses_that_make_no_sense(url: str, said: str) -> None:
    with pytest.raises(MediaFetchError, match=said) as caught:
        fetch(url)
    assert "pw" not in f"{caught.value} {caught.value.__cause__}"
    assert str(caught.value).isprintable()


def test_port_0_is_not_the_usual_port() -> None:
    urls = ("http://host:0/", "http://host/", "https://host/", "https://host:/", "http://host:81/")
    assert [parse("", url).port for url in urls] == [0, 80, 443, 443, 81]


@pytest.mark.parametrize("bad", ["\r\nX-Evil: 1", "\n", "\r", "\t", "\0", "\x7f", "\ud800"])
def test_control_characters_reach_no_server(web: str, server: Web, bad: str) -> None:
    host = web.removeprefix("http://")
    for url in (f"{web}/ok{bad}", f"{web}/ok?a{bad}=1", f"http://{bad}{host}/ok", f"{web}{bad}/ok"):
        with pytest.raises(MediaFetchError, match="line break or another control character"):
            get(url)
    assert not server.seen
