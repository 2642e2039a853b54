"""The kernels are compiled once, from and into places that are the user's own, or not used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vidlm import native
from vidlm.native import build
from vidlm.native.build import NotBuilt, built
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
def home(tmp_path: Path) -> dict[str, str]:
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
    return {"PATH": path, "XDG_CACHE_HOME": str(tmp_path / "cache"), "HOME": str(tmp_path)}


@pytest.fixture
def quick(home, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """`home`, where what is compiled is not worth waiting for."""
    monkeypatch.setattr(build, "SOURCES", ("linear.c",))
    monkeypatch.setattr(build, "FLAGS", ("-O0", *build.FLAGS[1:]))
    return home


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
    path = built(quick)
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(path.parent.iterdir()) == [path]  # nothing half-made is left


def test_other_flags_are_another_library(quick, monkeypatch: pytest.MonkeyPatch) -> None:
    first = built(quick)
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DOTHER"))
    assert built(quick) != first


def test_a_switch_turns_them_off(home, tmp_path: Path) -> None:
    assert probe(home, VIDLM_NATIVE="0") == "False switched off by VIDLM_NATIVE=0\n"
    assert not (tmp_path / "calls").exists()


def test_no_compiler(home) -> None:
    with pytest.raises(NotBuilt, match="no C compiler"):
        built({**home, "PATH": home["HOME"]})


def test_a_compiler_that_fails_is_named_and_plain_torch_used(home, tmp_path: Path) -> None:
    (tmp_path / "bin" / "cc").write_text("#!/bin/sh\necho no such thing >&2\nexit 1\n")
    assert "no such thing" in probe(home)
    assert probe(home).startswith("False")


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
    built(quick).chmod(0o666)
    with pytest.raises(NotBuilt, match="may be written by other users"):
        built(quick)


def test_links_are_refused(quick, tmp_path: Path) -> None:
    path = built(quick)
    moved = path.rename(tmp_path / "elsewhere.so")
    path.symlink_to(moved)
    with pytest.raises(NotBuilt, match="not what it should be"):
        built(quick)


def test_what_belongs_to_another_is_refused(quick, monkeypatch: pytest.MonkeyPatch) -> None:
    path = built(quick)
    own = os.geteuid()
    monkeypatch.setattr("os.geteuid", lambda: own + 1)
    with pytest.raises(NotBuilt, match=f"belongs to user {own}"):
        built(quick)
    assert path.exists()


def test_a_folder_that_cannot_be_made(home, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(NotBuilt, match="XDG_CACHE_HOME names another"):
        built(home)


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
