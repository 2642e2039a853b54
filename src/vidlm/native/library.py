"""The compiled kernels of this process, or why there are none: decided once, at the first use."""

from __future__ import annotations

import ctypes
import logging
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
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
    "vidlm_flash_state": (),
    "vidlm_parallel": (),
    "vidlm_activation": (_INT, _POINTER, _POINTER, _POINTER, _LONG, _INT, _INT),
}
# Whether it was done, see jobs.h; the last two, what the library can do.
ANSWERS = ("vidlm_linears", "vidlm_stack", "vidlm_decode_attention", "vidlm_heads",
           "vidlm_decoded", "vidlm_flash_state", "vidlm_parallel")  # fmt: skip
KINDS = (
    "linear layers of a few rows",
    "attention of new tokens",
    "norms, rotation, activations",
    "quantized weights and KV cache",
    "attention over prompts and frames",  # the last: see _kernels
)
FLASH = (  # by what vidlm_flash_state says
    "needs AMX, which this processor or compiler lacks",
    "needs AMX, which this system does not allow",
    "",
)
_DECIDING = Lock()
_DECIDED: list[tuple[Status, ctypes.CDLL | None]] = []  # one, once it is known


@dataclass(frozen=True)
class Kernel:
    """One kind of work, whether a kernel does it, and why not or with what limit."""

    name: str
    used: bool
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {'kernel' if self.used else 'plain torch'}" + (
            f" ({self.reason})" if self.reason else ""
        )


@dataclass(frozen=True)
class Status:
    """Whether the kernels are used, why or why not, and the file they are in.

    kernels  each kind of work by itself
    seconds  that compiling took in this process; 0 where they were there already
    note     what should be mended all the same: they could not be kept for the next process
    """

    used: bool
    reason: str
    path: Path | None = None
    kernels: tuple[Kernel, ...] = ()
    seconds: float = 0.0
    note: str = ""


Tell = Callable[[str], None]


def status() -> Status:
    """What is used and why; decides it, and may compile, if nothing has been computed yet."""
    return _decide()[0]


def library() -> ctypes.CDLL | None:
    """The kernels, or None where the plain path is taken."""
    return _decide()[1]


def prepare(compiling: Tell | None = None, warn: Tell | None = None) -> Status:
    """Compile the kernels now if it has to be done, so that no computation waits for it.

    `compiling` is told before, `warn` where there are none or they could not be kept; without them
    the log is, by info and by a warning. Each is told once in a process.
    """
    return _decide(compiling, warn)[0]


def _decide(
    compiling: Tell | None = None, warn: Tell | None = None
) -> tuple[Status, ctypes.CDLL | None]:
    if _DECIDED:
        return _DECIDED[0]
    with _DECIDING:  # a second thread waits for the compiler, too
        if not _DECIDED:
            _DECIDED.append(_decided(compiling or log.info, warn or log.warning))
        return _DECIDED[0]


def _decided(compiling: Tell, warn: Tell) -> tuple[Status, ctypes.CDLL | None]:
    if os.environ.get(SWITCH, "1") == "0":
        log.info("no CPU kernels: switched off by %s=0", SWITCH)
        return _without(f"switched off by {SWITCH}=0")
    began: list[float] = []

    def begin() -> None:
        began.append(time.perf_counter())
        compiling("compiling CPU kernels for this machine, which is done once")

    with ExitStack() as stack:
        spare = None
        with suppress(OSError):  # of no use, unless the cache folder is of none either
            spare = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vidlm-native-")))
        try:
            path, refused = built(os.environ, begin, spare)
            found = load(path)
        except NotBuilt as error:
            warn(f"no CPU kernels ({error}); plain torch decodes several times slower")
            return _without(str(error))
    seconds = time.perf_counter() - began[0] if began else 0.0
    note = ""
    if refused is not None:
        note = f"CPU kernels are compiled anew by each process, as they cannot be kept: {refused}"
        warn(note)
    log.info("CPU kernels: %s, compiled in %.1f s", path, seconds)
    reason = "compiled for this machine" + ("" if found.vidlm_parallel() else ", one thread")
    kept = path if refused is None else None
    return Status(True, reason, kept, _kernels(found), seconds, note), found


def _without(reason: str) -> tuple[Status, None]:
    return Status(False, reason, kernels=tuple(Kernel(name, False) for name in KINDS)), None


def _kernels(found: ctypes.CDLL) -> tuple[Kernel, ...]:
    flash = FLASH[found.vidlm_flash_state()]
    return (*(Kernel(name, True) for name in KINDS[:-1]), Kernel(KINDS[-1], not flash, flash))


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
