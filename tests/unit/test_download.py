"""One commit for all files of a model, and a hub that does not answer."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from shutil import copytree
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, get_session

import tiny
import vidlm
from vidlm import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, hub
from vidlm.errors import HubUnreachable, InvalidArgument

# ---- a branch that moves ---------------------------------------------------------------------


@pytest.fixture
def moving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A hub whose branch has a new commit at every call; the folders that it gave, in order."""
    given: list[Path] = []
    original = tiny.write(tmp_path / "original")

    def snapshot_download(name: str, **kwargs: Any) -> str:
        given.append(copytree(original, tmp_path / f"commit{len(given)}"))
        return str(given[-1])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return given


def test_load_takes_all_files_of_one_commit(moving: list[Path]) -> None:
    lm = vidlm.load("owner/name", revision="main")
    assert [lm.model.folder] == moving


@pytest.mark.parametrize(
    "auto", [AutoConfig, AutoProcessor, AutoModelForImageTextToText, AutoTokenizer]
)
def test_auto_classes_resolve_once(moving: list[Path], auto: Any) -> None:
    auto.from_pretrained("owner/name", revision="main")
    assert len(moving) == 1


def test_wrong_options_are_told_before_anything_is_downloaded(moving: list[Path]) -> None:
    for wrong in ({"device": "mars"}, {"dtype": "float7"}, {"quantize": "int3"}):
        with pytest.raises(InvalidArgument):
            vidlm.load("owner/name", **wrong)
    assert moving == []


# ---- a hub that does not answer --------------------------------------------------------------

SHA, ETAG = "a" * 40, "b" * 40
Answer = Callable[[str], bytes | None]


def reply(body: bytes, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    head = f"HTTP/1.1 200 OK\r\nX-Repo-Commit: {SHA}\r\nETag: {ETAG}\r\nContent-Length: {size}"
    return head.encode() + b"\r\n\r\n" + body


def sound(path: str) -> bytes | None:
    """A hub with one small file."""
    if "/tree/" in path:
        entry = {"type": "file", "path": "config.json", "size": 2, "oid": ETAG}
        return reply(json.dumps([entry]).encode())
    if path.startswith("HEAD"):
        return reply(b"", 2)
    if "/resolve/" in path:
        return reply(b"{}")
    return reply(json.dumps({"id": "o/n", "sha": SHA, "siblings": []}).encode())


def silent(path: str) -> bytes | None:
    return None


def silent_later(path: str) -> bytes | None:
    """It names the commit, and says nothing when it is asked for the files' names."""
    return None if "/tree/" in path else sound(path)


def stalls(path: str) -> bytes | None:
    """A download that stops in the middle."""
    if path.startswith("GET") and "/resolve/" in path:
        return reply(b"{", 2)
    return sound(path)


class Hub:
    """A server on loopback; `answer` maps a method and path to bytes, None for silence."""

    def __init__(self) -> None:
        self.answer: Answer = sound
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.closing = threading.Event()
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.threads = [threading.Thread(target=self._accept, daemon=True)]
        self.threads[0].start()

    def _accept(self) -> None:
        self.listener.settimeout(0.05)
        while not self.closing.is_set():
            with suppress(TimeoutError):
                thread = threading.Thread(
                    target=self._serve, args=(self.listener.accept()[0],), daemon=True
                )
                thread.start()
                self.threads.append(thread)

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(0.05)
        data = b""
        with connection, suppress(ConnectionError):
            while not self.closing.is_set():
                with suppress(TimeoutError):
                    chunk = connection.recv(65536)
                    if not chunk:
                        return
                    data += chunk
                if b"\r\n\r\n" in data:
                    method, path = data.decode().split()[:2]
                    data = b""
                    if (answer := self.answer(f"{method} {path}")) is not None:
                        connection.sendall(answer)

    def close(self) -> None:
        self.closing.set()
        for thread in self.threads:
            thread.join()
        self.listener.close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    served = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", served.url)
    template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the hub library's tries
    yield served
    served.close()


def test_a_sound_hub(server: Hub, tmp_path: Path) -> None:
    folder = hub.resolve("o/n", cache_dir=tmp_path)
    assert (folder / "config.json").read_text() == "{}"


@pytest.mark.parametrize("answer", [silent, silent_later, stalls])
def test_a_hub_that_goes_silent_is_given_up(server: Hub, tmp_path: Path, answer: Answer) -> None:
    server.answer = answer
    with pytest.raises(HubUnreachable, match=f"{server.url}.*no answer in time") as caught:
        hub.resolve("o/n", cache_dir=tmp_path)
    for way_out in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_OFFLINE=1", "a folder", "--model demo"):
        assert way_out in str(caught.value)


def test_what_is_cached_needs_no_answer(server: Hub, tmp_path: Path) -> None:
    folder = hub.resolve("o/n", cache_dir=tmp_path)
    server.answer = silent
    assert hub.resolve("o/n", cache_dir=tmp_path) == folder


def test_requests_of_others_keep_their_patience(server: Hub, tmp_path: Path) -> None:
    before = list(get_session().event_hooks["request"])
    hub.resolve("o/n", cache_dir=tmp_path)
    assert get_session().event_hooks["request"] == before
