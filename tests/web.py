"""A small web on loopback for tests: each path is a way to answer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BODY = bytes(range(256)) * 40


class Web(ThreadingHTTPServer):
    """The server. seen: the path and headers of every request; sent: the status of every answer.

    pages: what /page/NAME has, and with which header fields; it answers 304 where one of them is
    what the request has already.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.sent: list[int] = []
        self.pages: dict[str, tuple[bytes, dict[str, str]]] = {}
        self.closing = threading.Event()

    def forget(self) -> Web:
        self.seen.clear()
        self.sent.clear()
        self.pages.clear()
        return self


@contextmanager
def serve() -> Iterator[Web]:
    with Web() as web:
        thread = threading.Thread(target=web.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield web
        finally:
            web.closing.set()
            web.shutdown()
            thread.join()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Web

    def do_GET(self) -> None:
        self.server.seen.append((self.path, dict(self.headers)))
        name, _, rest = self.path.strip("/").partition("/")
        answer = getattr(self, f"answer_{name.partition('?')[0]}", self.answer_missing)
        with suppress(ConnectionError):  # the client had enough
            answer(rest)

    def log_request(self, code: object = "-", size: object = "-") -> None:
        self.server.sent.append(int(code))  # type: ignore[call-overload]

    def log_message(self, *args: object) -> None:
        pass

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in ({"Content_Length": str(len(body))} | headers).items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def raw(self, text: bytes) -> None:
        self.wfile.write(text)
        self.close_connection = True

    # ---- files -------------------------------------------------------------------------------

    def answer_ok(self, rest: str) -> None:
        self.reply(200, BODY)

    def answer_page(self, rest: str) -> None:
        body, fields = self.server.pages[rest.partition("?")[0]]
        known = self.headers.get("If-None-Match"), self.headers.get("If-Modified-Since")
        if known != (None, None) and known == (fields.get("ETag"), fields.get("Last_Modified")):
            self.send_response(304)
            self.end_headers()
        else:
            self.reply(200, body, **fields)

    def answer_zipped(self, rest: str) -> None:
        self.reply(200, BODY, Content_Encoding="gzip")

    def answer_chunked(self, rest: str) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for at in range(0, len(BODY), 1000):
            part = BODY[at : at + 1000]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
        self.wfile.write(b"0\r\n\r\n")

    # ---- other places ------------------------------------------------------------------------

    def answer_missing(self, rest: str) -> None:
        self.reply(404, b"no")

    def answer_unasked(self, rest: str) -> None:
        self.send_response(304)
        self.end_headers()

    def answer_to(self, rest: str) -> None:
        """A redirect to whatever the path goes on with."""
        self.reply(302, Location=rest.replace("_", "/").replace("!", ":"))

    def answer_down(self, rest: str) -> None:
        """As many redirects as the path says, then the file."""
        left = int(rest)
        self.reply(302, Location=f"/down/{left - 1}" if left > 1 else "/ok")

    def answer_far(self, rest: str) -> None:
        self.reply(302, Location="/ok/" + "a" * 9000)

    def answer_folded(self, rest: str) -> None:
        self.raw(b"HTTP/1.1 302 Found\r\nLocation: /ok\r\n X-Evil: 1\r\nContent-Length: 0\r\n\r\n")

    # ---- lies --------------------------------------------------------------------------------

    def answer_boasting(self, rest: str) -> None:
        self.reply(200, b"small", Content_Length="999999999")

    def answer_short(self, rest: str) -> None:
        self.reply(200, b"half", Content_Length="8", Connection="close")

    def answer_long(self, rest: str) -> None:
        self.reply(200, BODY, Content_Length="8", Connection="close")

    def answer_endless(self, rest: str) -> None:
        self.send_response(200)
        self.end_headers()
        self.close_connection = True
        while not self.server.closing.is_set():
            self.wfile.write(BODY)

    def answer_endlesschunks(self, rest: str) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.close_connection = True
        while not self.server.closing.is_set():
            self.wfile.write(b"100\r\n" + BODY[:256] + b"\r\n")

    def answer_drip(self, rest: str) -> None:
        """Never silent for long, never done."""
        self.send_response(200)
        self.end_headers()
        self.close_connection = True
        while not self.server.closing.wait(0.02):
            self.wfile.write(b".")

    def answer_dripheader(self, rest: str) -> None:
        self.close_connection = True
        while not self.server.closing.wait(0.02):
            self.wfile.write(b"H")

    def answer_continue(self, rest: str) -> None:
        self.close_connection = True
        while not self.server.closing.wait(0.01):
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def answer_silent(self, rest: str) -> None:
        self.server.closing.wait(10)
        self.close_connection = True

    def answer_phrase(self, rest: str) -> None:
        self.raw(b"HTTP/1.1 503 \x1b[31mtoken=secret\r\nContent-Length: 0\r\n\r\n")

    def answer_noise(self, rest: str) -> None:
        self.raw(b"\x1b]0;title\x07" + b"A" * 5000 + b"\r\n\r\n")
