"""What goes between a process and its decode worker: JSON, then raw bytes. Nothing is unpickled."""

from __future__ import annotations

import dataclasses
import io
import json
import operator
import socket
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vidlm.errors import InvalidArgument

_MAX_MESSAGE = 1 << 30  # the JSON, which may hold a data URL; frames and times come after it
_MAX_ANSWER = 64 << 20  # without such a thing in it
_OURS = "vidlm.media."  # Limits and the like; a worker has imported their modules
_LENGTH = struct.Struct("!Q")
_CHUNK = 1 << 16

Shape = tuple[int | None, ...]


def send(wire: socket.socket, message: Mapping[str, Any]) -> None:
    text = json.dumps(message).encode("ascii")
    wire.sendall(_LENGTH.pack(len(text)))
    wire.sendall(text)


def receive(wire: socket.socket, is_answer: bool = False) -> dict[str, Any]:
    """The next message. Raises EOFError where the other side is gone, ValueError for nonsense.

    is_answer: from a worker, which may have been taken over by what it decodes.
    """
    header = bytearray(_LENGTH.size)
    receive_into(wire, memoryview(header))
    (length,) = _LENGTH.unpack(header)
    if length > (_MAX_ANSWER if is_answer else _MAX_MESSAGE):
        raise ValueError(f"a message of {length} bytes")
    text = bytearray(length)
    receive_into(wire, memoryview(text))
    message = json.loads(text)
    if not isinstance(message, dict):
        raise ValueError(f"a message that is a {type(message).__name__}")
    return message


def receive_into(wire: socket.socket, target: memoryview) -> None:
    while target:
        count = wire.recv_into(target)
        if not count:
            raise EOFError("the other side has closed")
        target = target[count:]


class File(io.BytesIO):
    """Bytes with the name of the file that they are from."""

    name = "video"


def receive_file(wire: socket.socket, size: int, name: str) -> File:
    file = File()
    file.name = name
    try:
        if size:
            file.seek(size - 1)
            file.write(b"\0")  # takes the memory at once, and once
    except MemoryError:
        while size > 0:  # the sender listens only after it has sent all
            size -= len(wire.recv(min(size, _CHUNK))) or size
        raise
    with file.getbuffer() as target:
        receive_into(wire, target)
    return file


def send_array(wire: socket.socket, array: NDArray[Any]) -> None:
    if array.size:  # memoryview casts no array without elements
        wire.sendall(array.data.cast("B"))


def receive_array(
    wire: socket.socket, header: Mapping[str, Any], dtype: type[np.generic], shape: Shape
) -> NDArray[Any]:
    """The array that a header announces.

    dtype and shape: what it must be, where None stands for any length.
    Raises ValueError for another array, before memory is taken for it.
    """
    announced = tuple(operator.index(length) for length in header["shape"])
    fits = len(announced) == len(shape) and all(
        length >= 0 and wanted in (None, length)
        for length, wanted in zip(announced, shape, strict=True)
    )
    if not fits or header["dtype"] != np.dtype(dtype).str:
        raise ValueError(f"an array of {header['dtype']!r} {announced}, not {dtype} {shape}")
    array = np.empty(announced, dtype)
    if array.size:
        receive_into(wire, array.data.cast("B"))
    return array


def plain(key: str, value: Any) -> Any:
    """A keyword's value as JSON has it; `restored` is the way back."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return {"path": str(value)}
    if isinstance(value, list):
        return [plain(key, item) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [plain(key, item) for item in value]}
    if isinstance(value, np.ndarray | np.generic):
        return plain(key, value.tolist())
    kind = type(value)
    if dataclasses.is_dataclass(value) and kind.__module__.startswith(_OURS):
        fields = {f.name: plain(key, getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"object": [kind.__module__, kind.__name__, fields]}
    try:
        return operator.index(value) if hasattr(value, "__index__") else float(value)
    except (TypeError, ValueError) as error:
        raise InvalidArgument(
            f"{key}={value!r} cannot be sent to a decode worker; give numbers, text, or a list "
            "of them"
        ) from error


def restored(value: Any) -> Any:
    """In a worker only: its parent may name classes, it may not."""
    if isinstance(value, list):
        return [restored(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    match kind:
        case "path":
            return Path(content)
        case "tuple":
            return tuple(map(restored, content))
    module, name, fields = content
    known = {key: restored(item) for key, item in fields.items()}
    return getattr(sys.modules[module], name)(**known)
