"""The compiled kernels of this process, or why there are none: decided once, at the first use."""

from __future__ import annotations

import ctypes
import logging
import os
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock

from vidlm.native.build import NotBuilt, built

log = logging.getLogger(__name__)

SWITCH = "VIDLM_NATIVE"
_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_longlong, ctypes.c_int
SIGNATURES = {
    "vidlm_linears": (_POINTER, _LONG, _POINTER, _LONG, _LONG, _INT, _INT),
    "vidlm_unpack": (_POINTER, _LONG, _INT, _INT),
    "vidlm_pack": (_POINTER, _INT, _INT),
    "vidlm_decode_attention": (_POINTER, _INT, _INT),
    "vidlm_flash": (_POINTER, _INT),
    "vidlm_stack": (_POINTER, ctypes.c_float, _INT),
    "vidlm_heads": (_POINTER, _INT, _INT),
    "vidlm_decoded": (_POINTER, _INT, _INT),
    "vidlm_rms_norm": (_POINTER, ctypes.c_float, _INT, _INT),
    "vidlm_activation": (_INT, _POINTER, _POINTER, _POINTER, _LONG, _INT, _INT),
}
ANSWERS = (
    "vidlm_linears",
    "vidlm_stack",
    "vidlm_decode_attention",
    "vidlm_heads",
    "vidlm_decoded",
)  # whether it was done; see jobs.h
_DECIDING = Lock()


@dataclass(frozen=True)
class Status:
    """Whether the kernels are used, why or why not, and the file they are in."""

    used: bool
    reason: str
    path: Path | None = None


def status() -> Status:
    """What is used and why; decides it if nothing has been computed yet."""
    return _decide()[0]


def library() -> ctypes.CDLL | None:
    """The kernels, or None where the plain path is taken."""
    return _decide()[1]


def _decide() -> tuple[Status, ctypes.CDLL | None]:
    with _DECIDING:  # a second thread waits for the compiler, too
        return _decided()


@cache
def _decided() -> tuple[Status, ctypes.CDLL | None]:
    if os.environ.get(SWITCH, "1") == "0":
        return _without(f"switched off by {SWITCH}=0")
    began = time.perf_counter()
    try:
        path = built(os.environ)
        found = load(path)
    except NotBuilt as error:
        return _without(str(error))
    log.info("CPU kernels: %s, ready after %.1f s", path, time.perf_counter() - began)
    return Status(True, "compiled for this machine", path), found


def _without(reason: str) -> tuple[Status, None]:
    log.info("no CPU kernels, plain torch is used: %s", reason)
    return Status(False, reason), None


def load(path: Path) -> ctypes.CDLL:
    """Its functions with their types. Symbols of OpenMP are those of the runtime torch has loaded;
    where it has another one the loader misses them, and says so here."""
    try:
        found = ctypes.CDLL(str(path))
        for name, types in SIGNATURES.items():
            function = getattr(found, name)
            function.argtypes = types
            function.restype = _INT if name in ANSWERS else None
    except (OSError, AttributeError) as error:
        raise NotBuilt(f"{path} cannot be loaded: {error}") from error
    return found
