"""hub.py's safetensors header parser, against the safetensors library and against broken files."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from vidlm import hub
from vidlm.errors import WeightsError


def packed(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def parse(folder: Path, content: bytes) -> dict[str, hub.TensorEntry]:
    path = folder / "x.safetensors"
    path.write_bytes(content)
    return hub.read_safetensors_header(path)


def agrees(entries: dict[str, hub.TensorEntry], content: bytes) -> bool:
    """Do the entries point at what the safetensors library reads?"""
    theirs = dict(safetensors.deserialize(content))
    return entries.keys() == theirs.keys() and all(
        (entry.dtype, list(entry.shape)) == (theirs[name]["dtype"], theirs[name]["shape"])
        and content[entry.start : entry.stop] == bytes(theirs[name]["data"])
        for name, entry in entries.items()
    )


def sample() -> bytes:
    rng = np.random.default_rng(0)
    tensors = {
        "w": rng.integers(0, 255, (3, 5), np.uint8),
        "bias.é": rng.standard_normal(4).astype(np.float32),
        "scalar": np.array(3.5),
        "none": np.zeros((0, 7), np.float16),
        "flag": np.array([True, False]),
    }
    return save(tensors, metadata={"format": "pt"})


def test_the_librarys_own_file(tmp_path: Path) -> None:
    entries = parse(tmp_path, sample())
    assert agrees(entries, sample())
    assert entries["scalar"].shape == ()
    assert entries["none"].start == entries["none"].stop
    assert "__metadata__" not in entries
    with pytest.raises(AttributeError):
        entries["w"].start = 0  # type: ignore[misc]


@pytest.mark.parametrize("dtype", sorted(hub.DTYPE_BITS))
def test_every_dtype_is_the_librarys(tmp_path: Path, dtype: str) -> None:
    size = hub.DTYPE_BITS[dtype]  # bytes of 8 elements
    content = packed({"x": {"dtype": dtype, "shape": [8], "data_offsets": [0, size]}}, bytes(size))
    assert agrees(parse(tmp_path, content), content)


def tensor(**changes: object) -> dict[str, object]:
    return {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]} | changes


BROKEN = [
    (b"", "0 bytes in a file of 0"),
    (b"\2\0\0\0", "bytes in a file of 4"),
    (packed({}, length=2**63), "a header of 9223372036854775808 bytes"),
    (packed({}, length=3), "a header of 3 bytes"),
    (packed(b" {}"), "start with"),
    (packed(b'{"x": }'), "read as JSON"),
    (packed(b'{"x": NaN}'), "NaN is not JSON"),
    (packed(b'{"\\ud800": {}}'), "read as JSON"),
    (packed(b'{"\xff": {}}'), "read as JSON"),
    (packed(b'{"a":' * 100_000), "read as JSON"),
    (packed(b'{"x": 1, "x": 2}'), "twice"),
    (packed({"__metadata__": {"n": 1}}), "__metadata__"),
    (packed({"__metadata__": []}), "__metadata__"),
    (packed({"x": []}), "lacks dtype"),
    (packed({"x": {"dtype": "U8", "shape": [0]}}), "lacks dtype"),
    (packed({"x": tensor(more=1)}, b"ab"), "or has more"),
    (packed({"x": tensor(dtype="U9")}, b"ab"), "unknown dtype 'U9'"),
    (packed({"x": tensor(dtype=["U8"])}, b"ab"), "unknown dtype"),
    (packed({"x": tensor(shape=[-2])}, b"ab"), "shape"),
    (packed({"x": tensor(shape=[2.0])}, b"ab"), "shape"),
    (packed({"x": tensor(shape=[True, 2])}, b"ab"), "shape"),
    (packed({"x": tensor(shape=2)}, b"ab"), "shape"),
    (packed({"x": tensor(shape=[2**62, 4, 0], data_offsets=[0, 0])}), "shape"),
    (packed({"x": tensor(data_offsets=[0, 1, 2])}, b"ab"), "data_offsets"),
    (packed({"x": tensor(data_offsets=[2, 0])}, b"ab"), "given -2 bytes"),
    (packed({"x": tensor(shape=[3])}, b"abc"), r"U8 \[3\] is given 2 bytes"),
    (packed({"x": tensor(dtype="F4", shape=[3])}, b"ab"), "is given 2 bytes"),
    (packed({"x": tensor(data_offsets=[1, 3])}, b"abc"), "starts at"),
    (packed({"x": tensor(), "y": tensor()}, b"ab"), "'y' starts at"),
    (packed({"x": tensor(), "y": tensor(data_offsets=[3, 5])}, b"abcde"), "'y' starts at"),
    (packed({"x": tensor()}, b"a"), "the file at"),
    (packed({"x": tensor()}, b"abc"), "the file at"),
    (packed({}, b"a"), "the file at"),
]


@pytest.mark.parametrize(("content", "message"), BROKEN)
def test_broken_header(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(WeightsError, match=message) as caught:
        parse(tmp_path, content)
    assert "x.safetensors" in str(caught.value)


def test_a_header_over_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = sample()
    length = int.from_bytes(content[:8], "little")
    monkeypatch.setattr(hub, "MAX_HEADER_BYTES", length)
    assert parse(tmp_path, content)
    monkeypatch.setattr(hub, "MAX_HEADER_BYTES", length - 1)
    with pytest.raises(WeightsError, match="a header of"):
        parse(tmp_path, content)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="cannot be read"):
        hub.read_safetensors_header(tmp_path / "gone.safetensors")


@pytest.mark.parametrize("seed", range(40))
def test_truncated(tmp_path: Path, seed: int) -> None:
    content = sample()
    with pytest.raises(WeightsError):
        parse(tmp_path, content[: random.Random(seed).randrange(len(content))])


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("headers")


@given(data=st.data())
def test_mutated_header_is_refused_or_means_the_same_to_the_library(
    scratch: Path, data: st.DataObject
) -> None:
    content = bytearray(sample())
    end = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, end - 1))
        content[at] = data.draw(st.sampled_from(b'0123456789[]{},:" eEUF._-\0\xff'))
    try:
        entries = parse(scratch, bytes(content))
    except WeightsError:
        return
    assert agrees(entries, bytes(content))
