"""The C source, compiled once on the machine that runs it, into a folder that is the user's own.

A library that is loaded runs as the user, so it comes from nowhere else: the folder and the file
must belong to the user, and nobody else may be able to write or replace them.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

log = logging.getLogger(__name__)

SOURCES = ("linear.c", "packed.c", "unpack.c", "packing.c", "attention.c", "flash.c", "rows.c",
           "activations.c", "stack.c", "crew.c")  # fmt: skip
HEADERS = ("crew.h", "jobs.h", "lanes.h", "packed.h", "spans.h", "tiles.h")
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fno-math-errno", "-fPIC", "-fvisibility=hidden",
         "-Wno-psabi")  # fmt: skip
# When compiling and not when linking: GOMP_* must come from the runtime that torch has brought. A
# second one would start a second set of threads on the same cores. Code for another runtime, such
# as clang's, does not load; without OpenMP it does, and works on one thread.
THREADS = ("-fopenmp", "-fopenmp-simd")
COMPILERS = ("cc", "gcc", "clang")  # tried in this order, after what $CC names
LINK = ("-shared", "-Wl,-z,relro,-z,now")
NULL = subprocess.DEVNULL
SECONDS = 120  # a compiler that takes longer is stuck
ROOM = 4 << 20  # bytes that compiling writes, roughly


class NotBuilt(Exception):
    """Why there is no library; the reason is for the log and for status()."""


class NotKept(NotBuilt):
    """The library cannot be kept in the cache folder."""


def built(
    environment: Mapping[str, str],
    compiling: Callable[[], None] | None = None,
    spare: Path | None = None,
) -> tuple[Path, NotKept | None]:
    """The library of this source on this machine, compiled if it is not there yet.

    compiling  is called before a compiler is started
    spare      a folder for a library that the cache folder cannot take: it is there then, and the
               reason comes along. Without one the reason is raised
    """
    if not sys.platform.startswith("linux") or platform.machine() not in ("x86_64", "aarch64"):
        raise NotBuilt(f"only built on Linux on x86_64 and arm64, not {_machine()}")
    folder, source, refused = cache_folder(environment), Path(__file__).parent, None
    try:
        _own_folder(folder)
    except OSError as error:
        refused = _not_kept(folder, error)
    commands: dict[Path, list[str]] = {}
    problems: list[str] = []
    for command in compilers(environment):
        try:
            target = folder / f"{_key(source, command)}.so"
        except NotBuilt as error:
            problems.append(str(error))
            continue
        if refused is None and os.path.lexists(target):
            _check(target, stat.S_ISREG)
            return target, None
        commands[target] = command
    if not commands:
        raise NotBuilt("; ".join(problems) or _no_compiler(environment))
    refused = refused or _full(folder)
    if refused is not None and spare is None:
        raise refused
    if compiling is not None:
        compiling()
    for target, command in commands.items():
        try:
            return _compile(source, command, target if refused is None else None, spare), refused
        except OSError as error:
            raise _not_kept(spare or folder, error) from error
        except NotBuilt as error:
            log.info("%s", error)
            problems.append(str(error))
    raise NotBuilt("; ".join(problems))


def compilers(environment: Mapping[str, str]) -> Iterator[list[str]]:
    """The commands of the C compilers that are there: $CC, which may have arguments, first."""
    path, found = environment.get("PATH"), set()
    try:
        own = shlex.split(environment.get("CC", ""))
    except ValueError:  # a quotation that does not end
        own = []
    for command in filter(None, (own, *([name] for name in COMPILERS))):
        program = shutil.which(command[0], path=path)
        if program is None:
            continue
        whole = [program, *command[1:]]
        same = (os.path.realpath(program), *command[1:])  # cc is gcc on many systems
        if same not in found:
            found.add(same)
            yield whole


def _no_compiler(environment: Mapping[str, str]) -> str:
    own = environment.get("CC")
    named = f"$CC ({own}), " if own else ""
    return f"no C compiler ({named}{', '.join(COMPILERS)}) in PATH; install gcc to have them"


def _not_kept(folder: Path, error: OSError) -> NotKept:
    return NotKept(f"cannot use {folder}: {error}; XDG_CACHE_HOME names another")


def _full(folder: Path) -> NotKept | None:
    """Why the folder does not take what a compiler writes; found out before it has worked."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(ROOM))
            file.flush()
    except OSError as error:
        return _not_kept(folder, error)
    return None


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


def _key(source: Path, command: list[str]) -> str:
    """What the library depends on: source, flags, compiler, and the processor `native` means."""
    parts = [(source / name).read_bytes() for name in (*SOURCES, *HEADERS)]
    parts += [" ".join((*command, *_flags(), *THREADS, *LINK)).encode()]
    parts += [_run([*command, "--version"]), _processor()]
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
    for parent in {*folder.absolute().parents, *Path(os.path.realpath(folder)).parents}:
        mode = parent.stat().st_mode
        # Where the sticky bit is set, as for /tmp, only owners rename what lies there.
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise NotBuilt(
                f"{parent}, in which {folder} lies, may be written by other users; chmod o-w it, "
                "or set XDG_CACHE_HOME"
            )


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


def _compile(source: Path, command: list[str], target: Path | None, spare: Path | None) -> Path:
    """In a folder of this process alone, then renamed to `target`: who looks sees no half of a
    file. Without a target it stays in `spare`."""
    folder = spare if target is None else target.parent
    assert folder is not None
    with tempfile.TemporaryDirectory(dir=folder) as work:
        made = _linked(source, command, Path(work))
        made.chmod(0o600)
        with open(made, "rb") as file:
            os.fsync(file.fileno())
        return made.replace(target or folder / "library.so")


def _linked(source: Path, command: list[str], work: Path) -> Path:
    """The library that can be loaded, by threads if it is one with them."""
    objects = [str(Path(name).with_suffix(".o")) for name in SOURCES]
    sources: list[str] = [str(source / name) for name in SOURCES]
    said: list[str] = []
    for number, threads in enumerate(THREADS):
        library = work / f"library{number}.so"  # one that failed is not asked for again by its name
        try:
            _run([*command, *_flags(), threads, "-c", *sources], work)
            _run([*command, *LINK, *objects, "-o", library.name], work)
            ctypes.CDLL(str(library))
        except (NotBuilt, OSError) as error:
            said.append(str(error))
        else:
            return library
    raise NotBuilt(f"`{' '.join(command)}` makes none that can be loaded: {said[0]}")


def _run(command: list[str], folder: Path | None = None) -> bytes:
    more = {} if folder is None else {"TMPDIR": str(folder)}  # where compilers put what passes
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, **more},
            capture_output=True,
            timeout=SECONDS,
            check=True,
            stdin=NULL,
        )
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip().splitlines()
        raise NotBuilt(f"`{command[0]}` failed: {' '.join(said[:3]) or error}") from error
    except (OSError, subprocess.SubprocessError) as error:
        raise NotBuilt(f"`{command[0]}` failed: {error}") from error
    return done.stdout
