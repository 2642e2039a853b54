"""The kernels are compiled once, from and into places that are the user's own, or not used."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vidlm import native
from vidlm.native import build
from vidlm.native.build import NotBuilt, NotKept, built
from vidlm.native.library import load

PROBE = """
import sys, threading, torch
from vidlm import native
results = []
def ask():
    results.append(native.status())
crew = [threading.Thread(target=ask) for _ in range(4)]
[t.start() for t in crew], [t.join() for t in crew]
x, w = torch.randn(3, 64), torch.randn(4096, 64)
with torch.inference_mode():
    found = native.linear(x, w)
assert torch.allclose(found, torch.nn.functional.linear(x, w), atol=1e-4)
assert len(set(results)) == 1
print(results[0].used, results[0].reason)
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment with a compiler of its own to spy on, and a cache of its own."""
    if not native.status().used:
        pytest.skip(native.status().reason)
    real = subprocess.run(
        ["which", "cc"], capture_output=True, text=True, check=True
    ).stdout.strip()
    fake = tmp_path / "bin" / "cc"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nexec {real} "$@"\n')
    fake.chmod(0o755)
    path = f"{fake.parent}:{os.environ['PATH']}"
    monkeypatch.delenv("CC", raising=False)
    return {"PATH": path, "XDG_CACHE_HOME": str(tmp_path / "cache"), "HOME": str(tmp_path)}


@pytest.fixture
def quick(home, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """`home`, where what is compiled is not worth waiting for."""
    monkeypatch.setattr(build, "SOURCES", ("crew.c",))
    monkeypatch.setattr(build, "FLAGS", ("-O0", *build.FLAGS[1:]))
    return home


def fail(compiler: Path) -> None:
    compiler.write_text("#!/bin/sh\necho no such thing >&2\nexit 1\n")
    compiler.chmod(0o755)


def compilations(tmp_path: Path) -> int:
    return sum(" -c " in line for line in (tmp_path / "calls").read_text().splitlines())


def probe(home: dict[str, str], code: str = PROBE, **more: str) -> str:
    env = {**os.environ, **home, "PYTHONPATH": os.pathsep.join(sys.path), **more}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_compiled_once_for_all_threads_and_processes(home, tmp_path: Path) -> None:
    assert probe(home).startswith("True")
    assert probe(home).startswith("True")
    assert compilations(tmp_path) == 1


def test_what_is_built_is_the_users_alone(quick) -> None:
    path, refused = built(quick)
    assert refused is None
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(path.parent.iterdir()) == [path]  # nothing half-made is left


def test_other_flags_are_another_library(quick, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = built(quick)
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DOTHER"))
    assert built(quick)[0] != first


def test_a_switch_turns_them_off(home, tmp_path: Path) -> None:
    assert probe(home, VIDLM_NATIVE="0") == "False switched off by VIDLM_NATIVE=0\n"
    assert not (tmp_path / "calls").exists()


def test_no_compiler(home) -> None:
    with pytest.raises(NotBuilt, match="no C compiler"):
        built({**home, "PATH": home["HOME"]})


def test_a_compiler_that_fails_is_named_and_plain_torch_used(home, tmp_path: Path) -> None:
    for name in ("cc", "gcc", "clang"):
        fail(tmp_path / "bin" / name)
    assert "no such thing" in probe(home)
    assert probe(home).startswith("False")


def test_the_next_compiler_is_tried(quick, tmp_path: Path) -> None:
    """$CC, which may have arguments, then cc, gcc and clang."""
    other = (tmp_path / "bin" / "cc").rename(tmp_path / "bin" / "my cc")
    fail(tmp_path / "bin" / "cc")
    fail(tmp_path / "bin" / "gcc")
    first, _ = built({**quick, "CC": f"'{other}' -g0 -DOWN"})
    assert " -g0 -DOWN " in f" {(tmp_path / 'calls').read_text()} "
    for broken in ("/no/such/cc", str(tmp_path / "bin" / "gcc"), "'", ""):
        with pytest.raises(NotBuilt, match="no such thing"):
            built({**quick, "CC": broken})
    other.rename(tmp_path / "bin" / "clang")
    assert built({**quick, "CC": "/no/such/cc"})[0] != first


def test_without_a_compiler_the_names_are_told(home) -> None:
    home = {**home, "PATH": home["HOME"], "CC": "icc -fast"}
    with pytest.raises(NotBuilt, match=r"no C compiler \(\$CC \(icc -fast\), cc, gcc, clang\) in"):
        built(home)


OTHER_RUNTIME = """#!/bin/sh
case " $* " in
*" -fopenmp "*) exec {real} -include {header} "$@" ;;
*) exec {real} "$@" ;;
esac
"""


def test_a_compiler_with_an_openmp_of_its_own_makes_kernels_of_one_thread(
    quick, tmp_path: Path
) -> None:
    """As clang, whose symbols the runtime that torch has brought does not have."""
    header = tmp_path / "other.h"
    header.write_text(
        "void __kmpc_other(void);\n"
        "static void __attribute__((constructor, used)) begin(void) { __kmpc_other(); }\n"
    )
    cc = tmp_path / "bin" / "cc"
    real = cc.read_text().split("exec ")[1].split(' "')[0]
    cc.write_text(OTHER_RUNTIME.format(real=real, header=header))
    assert not ctypes.CDLL(str(built(quick)[0])).vidlm_parallel()


@pytest.mark.slow
def test_kernels_of_one_thread_compute_the_same(tmp_path: Path) -> None:
    code = "from vidlm.native import build; build.THREADS = ('-fopenmp-simd',)" + PROBE
    home = {"XDG_CACHE_HOME": str(tmp_path)}
    assert probe(home, code) == "True compiled for this machine, one thread\n"


def test_a_library_that_does_not_load_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "library.so"
    path.write_bytes(b"not a library")
    with pytest.raises(NotBuilt, match="cannot be loaded"):
        load(path)


@pytest.mark.parametrize("mode", [0o777, 0o720, 0o702])
def test_a_folder_that_others_may_write_is_refused(home, mode: int) -> None:
    build.cache_folder(home).mkdir(parents=True)
    build.cache_folder(home).chmod(mode)
    with pytest.raises(NotBuilt, match="may be written by other users"):
        built(home)


def test_a_file_that_others_may_write_is_refused(quick) -> None:
    built(quick)[0].chmod(0o666)
    with pytest.raises(NotBuilt, match="may be written by other users"):
        built(quick)


def test_links_are_refused(quick, tmp_path: Path) -> None:
    path, refused = built(quick)
    assert refused is None
    moved = path.rename(tmp_path / "elsewhere.so")
    path.symlink_to(moved)
    with pytest.raises(NotBuilt, match="not what it should be"):
        built(quick)


def test_what_belongs_to_another_is_refused(quick, monkeypatch: pytest.MonkeyPatch) -> None:
    path, refused = built(quick)
    assert refused is None
    own = os.geteuid()
    monkeypatch.setattr("os.geteuid", lambda: own + 1)
    with pytest.raises(NotBuilt, match=f"belongs to user {own}"):
        built(quick)
    assert path.exists()


def test_a_folder_that_cannot_be_made(home, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(NotBuilt, match="XDG_CACHE_HOME names another"):
        built(home)


TOLD = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stdout)
from vidlm import native
for _ in range(2):
    native.prepare()
print(native.status().used, native.status().seconds > 0, native.status().path)
"""


def test_a_folder_that_cannot_be_used_costs_a_compilation_a_process(home, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    for count in (1, 2):
        *said, used = probe(home, TOLD).splitlines()
        assert used == "True True None"
        assert [line.split()[0] for line in said] == ["INFO", "WARNING", "INFO"]
        assert "compiled anew by each process, as they cannot be kept: cannot use" in said[1]
        assert compilations(tmp_path) == count
    assert probe(home).startswith("True")


def test_a_full_disk_is_found_before_compiling(
    home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build.tempfile, "TemporaryFile", full)
    with pytest.raises(NotKept, match="No space left on device; XDG_CACHE_HOME names another"):
        built(home)
    assert compilations(tmp_path) == 0
    monkeypatch.setattr(build, "SOURCES", ("crew.c",))
    (tmp_path / "spare").mkdir()
    path, refused = built(home, spare=tmp_path / "spare")
    assert path.parent == tmp_path / "spare"
    assert isinstance(refused, NotKept)


@pytest.mark.parametrize("place", ["cache", "cache/vidlm"])
def test_a_folder_in_a_folder_that_anybody_may_write_is_refused(
    quick, tmp_path: Path, place: str
) -> None:
    built(quick)
    (tmp_path / place).chmod(0o777)
    with pytest.raises(NotBuilt, match=f"{place}, in which .* may be written by other users"):
        built(quick)
    (tmp_path / place).chmod(0o1777)  # as /tmp: only owners rename what lies there
    built(quick)


def test_what_is_told_of_the_kernels(home, tmp_path: Path) -> None:
    *said, used = probe(home, TOLD).splitlines()
    assert used.startswith("True True /")
    assert [line.split()[0] for line in said] == ["INFO", "INFO"]
    assert "compiling CPU kernels for this machine" in said[0]
    *said, used = probe(home, TOLD).splitlines()
    assert used.startswith("True False /")
    assert len(said) == 1
    *said, used = probe({**home, "PATH": str(tmp_path)}, TOLD).splitlines()
    assert used == "False False None"
    assert len(said) == 1
    assert said[0].startswith("WARNING no CPU kernels (no C compiler (cc, gcc, clang) in PATH")
    assert "install gcc" in said[0]
    *said, used = probe(home, TOLD, VIDLM_NATIVE="0").splitlines()
    assert said == ["INFO no CPU kernels: switched off by VIDLM_NATIVE=0"]


def test_each_kind_of_work_has_a_line() -> None:
    kernels = native.status().kernels
    assert len({kernel.name for kernel in kernels}) == len(kernels) == 5
    *others, flash = kernels
    assert all(kernel.used == native.status().used for kernel in others)
    q = torch.zeros(1, 16, 2, 64, dtype=torch.bfloat16)
    with torch.inference_mode():
        runs = native.flash(q, q, q, causal=True) is not None
    assert flash.used == runs
    if "lacks" in flash.reason:
        assert str(flash) == (
            "attention over prompts and frames: plain torch (needs AMX, which this "
            "processor or compiler lacks)"
        )


def test_a_relative_cache_folder_is_ignored(home, tmp_path: Path) -> None:
    folder = build.cache_folder({**home, "XDG_CACHE_HOME": "here"})
    assert folder == tmp_path / ".cache" / "vidlm" / "native"


RUNTIMES = """
import os, torch
from vidlm import native
def runtimes():
    with open("/proc/self/maps") as maps:
        files = {line.split()[-1] for line in maps}
    return {f for f in files if any(n in os.path.basename(f) for n in ("gomp", "iomp", "libomp"))}
torch.set_num_threads(2)
a = torch.randn(512, 512); a @ a
before, crew = runtimes(), len(os.listdir("/proc/self/task"))
assert native.status().used
with torch.inference_mode():
    native.linear(torch.randn(4, 4096), torch.randn(4096, 4096))
assert runtimes() == before, runtimes() - before
assert len(os.listdir("/proc/self/task")) <= max(crew, 2)
print("one")
"""


def test_the_threads_are_those_of_torch() -> None:
    if not native.status().used:
        pytest.skip(native.status().reason)
    assert probe({}, RUNTIMES) == "one\n"
