"""Decode workers and the script that uses them: it is not run again, and they end when it does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import vidlm

SMALL = Path(__file__).parents[1] / "data" / "nemo_test_video.mp4"

# Only in a worker: a source named "spin" never returns, and holds the interpreter's lock.
SPIN = """
import sys

if "vidlm.media.serve" in sys.orig_argv:
    import re
    from vidlm.media import video

    load = video.load_video
    def spin(source, **how):
        return re.match("(a+)+$", "a" * 99 + "b") if source == "spin" else load(source, **how)
    video.load_video = spin
"""

BEGIN = f"""
import os, signal, sys, threading
from vidlm.media.worker import DecodePool

print("run", flush=True)
pool = DecodePool(1)
frames = len(pool.load({str(SMALL)!r}, num_frames=2))
print(frames, pool._idle[0]._process.pid, flush=True)
"""


@contextmanager
def script(folder: Path, text: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Runs a script as a user does, and gives it with its worker's pid once that has loaded."""
    (folder / "sitecustomize.py").write_text(SPIN)
    (folder / "script.py").write_text(BEGIN + text)
    home = str(Path(vidlm.__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, folder / "script.py"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), home])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "run\n"
            frames, pid = process.stdout.readline().split()
            assert frames == "2"
            yield process, int(pid)
        finally:
            process.kill()


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    stat = Path(f"/proc/{pid}/stat")  # an orphan stays a zombie where nobody reaps
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z"


def check_goes(pid: int) -> None:
    until = time.monotonic() + 60
    while not is_gone(pid):
        assert time.monotonic() < until, f"the worker {pid} is still there"
        time.sleep(0.02)


def test_a_script_needs_no_guard_and_leaves_nothing(tmp_path: Path) -> None:
    with script(tmp_path, "pool.close()\n") as (process, pid):
        assert process.communicate(timeout=60) == ("", "")
        assert process.returncode == 0
        assert is_gone(pid)


@pytest.mark.parametrize("end", ["pass", "os._exit(0)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_a_worker_goes_when_its_parent_is_gone(tmp_path: Path, end: str) -> None:
    with script(tmp_path, end) as (process, pid):
        process.wait(60)
        check_goes(pid)


def test_a_worker_in_the_middle_of_it_goes_at_its_deadline(tmp_path: Path) -> None:
    text = "pool._seconds = 1\nprint('loading', flush=True)\npool.load('spin')\n"
    with script(tmp_path, text) as (process, pid):
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        time.sleep(0.5)  # until the worker has the request; if not, it goes for want of a parent
        process.kill()
        check_goes(pid)


def test_an_interrupt_ends_the_workers(tmp_path: Path) -> None:
    text = "with pool:\n    print('loading', flush=True)\n"
    with script(tmp_path, text + "    pool.load('spin')\n") as (process, pid):
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        time.sleep(0.5)  # until the load waits; if not, it never starts
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
        assert is_gone(pid)
    assert told.rstrip().endswith("KeyboardInterrupt")
    assert told.count("Traceback") == 1
