"""The C source, compiled once on the machine that runs it, into a folder that is the user's own.

A library that is loaded runs as the user, so it comes from nowhere else: the folder and the file
must belong to the user, and nobody else may be able to write them.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

SOURCES = ("linear.c", "packed.c", "unpack.c", "packing.c", "attention.c", "flash.c", "rows.c",
           "activations.c", "stack.c", "crew.c")  # fmt: skip
HEADERS = ("crew.h", "jobs.h", "lanes.h", "packed.h", "spans.h", "tiles.h")
# -fopenmp when compiling and not when linking: GOMP_* must come from the runtime that torch has
# brought. A second one would start a second set of threads on the same cores.
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fno-math-errno", "-fopenmp", "-fPIC",
         "-fvisibility=hidden", "-Wno-psabi")  # fmt: skip
LINK = ("-shared", "-Wl,-z,relro,-z,now")
NULL = subprocess.DEVNULL
SECONDS = 120  # a compiler that takes longer is stuck


class NotBuilt(Exception):
    """Why there is no library; the reason is for the log and for status()."""


def built(environment: Mapping[str, str]) -> Path:
    """The library of this source on this machine, compiled if it is not there yet."""
    if not sys.platform.startswith("linux") or platform.machine() not in ("x86_64", "aarch64"):
        raise NotBuilt(f"only built on Linux on x86_64 and arm64, not {_machine()}")
    compiler = shutil.which("cc", path=environment.get("PATH"))
    if compiler is None:
        raise NotBuilt("no C compiler `cc` in PATH; install gcc to have it")
    folder = cache_folder(environment)
    source = Path(__file__).parent
    target = folder / f"{_key(source, compiler)}.so"
    try:
        _own_folder(folder)
        if not target.exists():
            _compile(source, compiler, target)
        _check(target, stat.S_ISREG)
    except OSError as error:
        raise NotBuilt(f"cannot use {folder}: {error}; XDG_CACHE_HOME names another") from error
    return target


def cache_folder(environment: Mapping[str, str]) -> Path:
    base = environment.get("XDG_CACHE_HOME")
    if not base or not Path(base).is_absolute():  # a relative one is to be ignored, says XDG
        base = os.path.join(environment.get("HOME") or os.path.expanduser("~"), ".cache")
    return Path(base) / "vidlm" / "native"


def _machine() -> str:
    return f"{platform.system()} on {platform.machine()}"


def _flags() -> tuple[str, ...]:
    wide = ("-mprefer-vector-width=512",) if platform.machine() == "x86_64" else ()
    return (*FLAGS, *wide)


def _key(source: Path, compiler: str) -> str:
    """What the library depends on: source, flags, compiler, and the processor `native` means."""
    parts = [(source / name).read_bytes() for name in (*SOURCES, *HEADERS)]
    parts += [" ".join((*_flags(), *LINK)).encode(), _run([compiler, "--version"]), _processor()]
    return hashlib.blake2b(b"\0".join(parts), digest_size=16).hexdigest()


def _processor() -> bytes:
    """Model and instruction sets of the first core in /proc/cpuinfo."""
    wanted = (b"vendor_id", b"model", b"stepping", b"flags", b"CPU ", b"Features")
    first = Path("/proc/cpuinfo").read_bytes().partition(b"\n\n")[0]
    return b"\n".join(line for line in first.splitlines() if line.startswith(wanted))


def _own_folder(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    _check(folder, stat.S_ISDIR)


def _check(path: Path, kind: object) -> None:
    """Refuse what is not the user's own, what others may write, and links."""
    found = path.lstat()
    assert callable(kind)
    if not kind(found.st_mode):
        raise NotBuilt(f"{path} is not what it should be; remove it")
    if found.st_uid != os.geteuid():
        raise NotBuilt(f"{path} belongs to user {found.st_uid}; remove it, or set XDG_CACHE_HOME")
    if found.st_mode & 0o022:
        raise NotBuilt(f"{path} may be written by other users; remove it, or chmod go-w it")


def _compile(source: Path, compiler: str, target: Path) -> None:
    """Into a folder of this process alone, then renamed: who looks sees no half of a file."""
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        objects = [str(Path(name).with_suffix(".o")) for name in SOURCES]
        _run([compiler, *_flags(), "-c", *(str(source / name) for name in SOURCES)], work)
        _run([compiler, *LINK, *objects, "-o", "library.so"], work)
        made = Path(work, "library.so")
        made.chmod(0o600)
        made.replace(target)


def _run(command: list[str], folder: str | None = None) -> bytes:
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, timeout=SECONDS, check=True, stdin=NULL
        )
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip().splitlines()
        raise NotBuilt(f"`{command[0]}` failed: {' '.join(said[:3]) or error}") from error
    except (OSError, subprocess.SubprocessError) as error:
        raise NotBuilt(f"`{command[0]}` failed: {error}") from error
    return done.stdout
