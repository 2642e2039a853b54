"""What a parent and its decode worker send each other, and what the parent does not believe."""

from __future__ import annotations

import json
import socket
import struct
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidlm.errors import MediaLimitError
from vidlm.media import Limits, Video, wire
from vidlm.media.fetch import FetchPolicy
from vidlm.media.worker import _Worker

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(), max_size=20)
    | st.builds(Path, st.text(max_size=20))
    | st.builds(Limits, kept_bytes=st.integers(1), pixels=st.integers(1))
    | st.just(FetchPolicy(hosts=("*.example.org",), folders=(Path(__file__).parent,))),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner),
    max_leaves=4,
)


@settings(max_examples=50)
@given(values)
def test_a_keyword_comes_as_it_goes(value: object) -> None:
    assert wire.restored(json.loads(json.dumps(wire.plain("key", value)))) == value


def test_messages_and_arrays_come_as_they_go(pair: Pair) -> None:
    arrays = [np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3), np.empty(0), np.arange(3) / 7]
    sender = threading.Thread(target=lambda: [wire.send_array(pair[0], a) for a in arrays])
    wire.send(pair[0], {"text": "é\udcff", "numbers": [1, 2.5, None]})
    assert wire.receive(pair[1]) == {"text": "é\udcff", "numbers": [1, 2.5, None]}
    sender.start()
    for array in arrays:
        header = {"dtype": array.dtype.str, "shape": list(array.shape)}
        received = wire.receive_array(pair[1], header, array.dtype.type, (None,) * array.ndim)
        np.testing.assert_array_equal(received, array)
    sender.join()


def test_a_file_comes_with_its_name(pair: Pair) -> None:
    pair[0].sendall(b"content")
    file = wire.receive_file(pair[1], 7, "a.mp4")
    assert (file.read(), file.name) == (b"", "a.mp4")
    assert file.getvalue() == b"content"
    assert wire.receive_file(pair[1], 0, "empty").getvalue() == b""


def test_a_file_without_memory_is_received_and_dropped(pair: Pair, monkeypatch) -> None:
    def refuse(*_: object) -> int:
        raise MemoryError

    monkeypatch.setattr(wire.File, "write", refuse, raising=False)
    pair[0].sendall(b"x" * 100_000 + b"next")
    with pytest.raises(MemoryError):
        wire.receive_file(pair[1], 100_000, "a.mp4")
    assert pair[1].recv(10) == b"next"


@pytest.mark.parametrize("sent", [b"", b"\0\0", struct.pack("!Q", 5) + b"{}"])
def test_an_early_end_is_told(pair: Pair, sent: bytes) -> None:
    pair[0].sendall(sent)
    pair[0].close()
    with pytest.raises(EOFError):
        wire.receive(pair[1])


@pytest.mark.parametrize("text", [b"[1]", b"3", b"{", b"\xff\xff", b'{"a": NaN'])
def test_what_is_no_message_is_refused(pair: Pair, text: bytes) -> None:
    pair[0].sendall(struct.pack("!Q", len(text)) + text)
    with pytest.raises(ValueError):  # noqa: PT011 - whatever json says
        wire.receive(pair[1])


def test_a_message_has_a_ceiling(pair: Pair) -> None:
    pair[0].sendall(b"\xff" * 8)
    with pytest.raises(ValueError, match="a message of 18446744073709551615 bytes"):
        wire.receive(pair[1])


@pytest.mark.parametrize(
    "header",
    [
        {"dtype": "|O", "shape": [3]},
        {"dtype": "<f8", "shape": [3]},
        {"dtype": "u1,u1", "shape": [3]},
        {"dtype": "|u1", "shape": [-3]},
        {"dtype": "|u1", "shape": [1 << 60]},
        {"dtype": "|u1", "shape": []},
        {"dtype": "|u1", "shape": [3, 1]},
        {"dtype": 1, "shape": [3]},
    ],
)
def test_only_the_array_that_is_due_is_taken(pair: Pair, header: dict) -> None:
    with pytest.raises(ValueError, match="an array of"):
        wire.receive_array(pair[1], header, np.uint8, (3,))


def test_an_answer_has_a_lower_ceiling_than_a_request(pair: Pair) -> None:
    pair[0].sendall(struct.pack("!Q", 1 << 27))
    with pytest.raises(ValueError, match="a message of 134217728 bytes"):
        wire.receive(pair[1], is_answer=True)


FIELDS = {
    "frames": {"dtype": "|u1", "shape": [2, 4, 4, 3]},
    "pts": {"dtype": "<f8", "shape": [2]},
    "indices": {"dtype": "<i8", "shape": [2]},
    "duration": 1.0,
    "fps": 25.0,
    "total_frames": 2,
    "start_time": 0.0,
    "warnings": ["one"],
    "name": "clip.mp4",
}


def received(pair: Pair, **changes: object) -> Video:
    """The Video that a parent takes from a worker which announces these fields."""
    worker = _Worker.__new__(_Worker)
    worker._wire = pair[1]
    pair[0].sendall(bytes(2 * 4 * 4 * 3 + 2 * 8 + 2 * 8))
    return worker._video({**FIELDS, **changes}, Limits())


def test_a_video_comes_from_its_fields(pair: Pair) -> None:
    video = received(pair)
    assert (len(video), video.warnings, video.pts.dtype) == (2, ("one",), np.float64)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"frames": {"dtype": "|u1", "shape": [1 << 20, 1 << 20, 1 << 20, 3]}}, MediaLimitError),
        ({"frames": {"dtype": "<f8", "shape": [2, 4, 4, 3]}}, ValueError),
        ({"frames": {"dtype": "|u1", "shape": [2, 4, 4, 1 << 40]}}, ValueError),
        ({"frames": {"dtype": "|u1", "shape": [2, 4, 4, 3, 1]}}, ValueError),
        ({"frames": {"dtype": "|u1", "shape": [0, 4, 4, 3]}}, ValueError),
        ({"frames": {"dtype": "|u1", "shape": [-2, -4, 4, 3]}}, ValueError),
        ({"frames": "none"}, TypeError),
        ({"pts": {"dtype": "<f8", "shape": [1 << 40]}}, ValueError),
        ({"pts": {"dtype": "<f8", "shape": [2, 1 << 40]}}, ValueError),
        ({"indices": {"dtype": "<f8", "shape": [2]}}, ValueError),
        ({"duration": "1"}, ValueError),
        ({"total_frames": {"dtype": "|u1", "shape": [9]}}, ValueError),
        ({"name": None}, ValueError),
    ],
)
def test_no_field_of_a_video_is_believed(pair: Pair, changes: dict, error: type) -> None:
    tracemalloc.start()
    with pytest.raises(error):
        received(pair, **changes)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
