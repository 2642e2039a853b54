"""Decoding in worker processes: the same frames and errors as here, and nothing that they do hurts.

Odd behaviour comes from a `sitecustomize` that only the workers of these tests find on their path:
there, a source named "spin" never returns, "crash" crashes, and so on.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import clips
from vidlm.errors import InvalidArgument, MediaError, MediaLimitError
from vidlm.media import Limits, Video, load_video
from vidlm.media.fetch import FetchPolicy
from vidlm.media.worker import DecodePool

DATA = Path(__file__).parents[1] / "data"
SMALL = DATA / "nemo_test_video.mp4"

ODD = """
import sys

if "vidlm.media.serve" in sys.orig_argv:
    import json, logging, os, re, resource, signal, time, warnings
    from vidlm.errors import MediaError
    from vidlm.media import video

    def crash(): os.kill(os.getpid(), signal.SIGSEGV)
    def spin(): re.match("(a+)+$", "a" * 99 + "b")  # in C, holding the interpreter's lock
    def leave(): os._exit(3)
    def defect(): {}["no such key"]
    def modules(): raise MediaError(json.dumps(sorted(sys.modules)))
    def stdin():
        core = resource.getrlimit(resource.RLIMIT_CORE)
        raise MediaError(repr((sys.stdin.read(), core)))
    def babble(): [os.write(3, b"x" * 99), time.sleep(99)]
    def noise():
        print("noise", flush=True)
        os.write(1, b"more noise")
        logging.getLogger("vidlm.media.x").error("logged %s", "there")
        warnings.warn("warned there")
        raise MediaError("quiet again")

    load = video.load_video
    odd = dict(crash=crash, spin=spin, leave=leave, defect=defect, modules=modules, noise=noise,
               stdin=stdin, babble=babble)
    video.load_video = lambda source, **how: odd.get(str(source), lambda: load(source, **how))()
"""


@pytest.fixture(scope="module")
def pool() -> Iterator[DecodePool]:
    with DecodePool(1) as pool:
        yield pool


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of modules in which the workers, but not this process, find odd behaviour."""
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(ODD)
    monkeypatch.syspath_prepend(folder)
    return folder


def pids(pool: DecodePool) -> list[int]:
    return [worker._process.pid for worker in pool._idle + pool._busy]


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    stat = Path(f"/proc/{pid}/stat")  # an orphan may stay a zombie where nobody reaps
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z"


def wait_for(what: Callable[[], object], seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until
        time.sleep(0.02)


def check_same(got: Video, expected: Video) -> None:
    for name, value in vars(expected).items():
        if isinstance(value, np.ndarray):
            assert getattr(got, name).dtype == value.dtype
            np.testing.assert_array_equal(getattr(got, name), value)
        else:
            assert getattr(got, name) == value, name


# ---- as load_video ---------------------------------------------------------------------------


def test_every_source_gives_what_load_video_gives(
    pool: DecodePool, tmp_path: Path, monkeypatch
) -> None:
    data = SMALL.read_bytes()
    (tmp_path / "walk in the park #1 \udcff.mp4").write_bytes(data)
    Image.fromarray(clips.picture(3)).save(tmp_path / "3.png")
    monkeypatch.chdir(tmp_path)  # after the worker has started in another folder
    encoded = base64.b64encode(data).decode()
    sources: list[Callable[[], object]] = [
        lambda: SMALL,
        lambda: str(SMALL),
        SMALL.as_uri,
        lambda: "walk in the park #1 \udcff.mp4",
        lambda: data,
        lambda: bytearray(data),
        lambda: memoryview(data)[:],
        lambda: io.BytesIO(data),
        lambda: clips.Forward(data),
        lambda: f"data:video/mp4;base64,{encoded}",
        lambda: ["3.png", Path("3.png")],
        lambda: clips.pictures(4),
        lambda: [clips.picture(1), "3.png"],
    ]
    pool.load(SMALL)
    for source in sources:
        check_same(pool.load(source(), max_frames=3), load_video(source(), max_frames=3))
    with SMALL.open("rb") as file:
        file.seek(7)
        check_same(pool.load(file, max_frames=3), load_video(SMALL, max_frames=3))
        assert not file.closed


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_frames": np.int64(3)},
        {"fps": Fraction(3, 2), "start": "00:01", "end": 2.5},
        {"fps": np.float32(1), "max_frames": 2},
        {"limits": Limits(kept_bytes=1 << 30)},
        {"indices": np.array([2, 0, 2])},
        {"times": (0.5, "00:01")},
        {"access": FetchPolicy(folders=(DATA,), hosts=("*.example.org",))},
    ],
)
def test_keywords_reach_the_worker(pool: DecodePool, how: dict) -> None:
    got = pool.load(SMALL, **how)
    check_same(got, load_video(SMALL, **how))
    assert got.frames.flags.writeable


@pytest.mark.parametrize(
    ("source", "how"),
    [
        (SMALL, {"num_frames": 0}),
        (SMALL, {"num_frames": 2, "fps": 1.0}),
        (SMALL, {"start": "later"}),
        (SMALL, {"start": 1e9}),
        (SMALL, {"limits": Limits(kept_bytes=1)}),
        (SMALL, {"access": FetchPolicy(folders=())}),
        (SMALL, {"number": 3}),
        (Path("gone.mp4"), {}),
        ("nul\0byte", {}),
        ("http://[::1", {}),
        ("http://127.0.0.1/a.mp4?key=secret", {}),
        ("rtsp://camera/1", {}),
        (b"", {}),
        (b"text", {}),
        (DATA, {}),
        ([DATA / "README.md"], {}),
        (io.StringIO("text"), {}),
        ([], {}),
        (7, {}),
    ],
    ids=repr,
)
def test_errors_are_those_of_load_video(pool: DecodePool, source: object, how: dict) -> None:
    def error(load: Callable[..., Video]) -> tuple[type, str]:
        with pytest.raises((ValueError, TypeError)) as caught:
            load(source, **how)
        return caught.type, str(caught.value)

    before = pids(pool)
    assert error(pool.load) == error(load_video)
    assert pids(pool) == before


def test_what_cannot_be_sent_is_refused(pool: DecodePool) -> None:
    with pytest.raises(InvalidArgument, match=r"fps=<object .* cannot be sent"):
        pool.load(SMALL, fps=object())
    with pytest.raises(InvalidArgument, match="limits=None; give Limits"):
        pool.load(SMALL, limits=None)


def test_warnings_are_logged_once(pool: DecodePool, caplog) -> None:
    damaged = DATA / "decord_corrupted.mp4"
    here = load_video(damaged, num_frames=4)
    expected = [record[:3] for record in caplog.record_tuples]
    caplog.clear()
    check_same(pool.load(damaged, num_frames=4), here)
    assert [record[:3] for record in caplog.record_tuples] == expected != []


def test_a_large_result_comes_whole(pool: DecodePool, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.bmp")
    got = pool.load([tmp_path / "noise.bmp"] * 20)
    assert got.frames.shape == (20, 1000, 1000, 3)
    assert (got.frames == noise).all()


def test_a_folder_that_is_gone_is_no_obstacle(pool: DecodePool, tmp_path: Path, monkeypatch):
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    assert len(pool.load(SMALL, num_frames=2)) == 2


# ---- workers that hang, crash, babble --------------------------------------------------------


def test_a_hang_ends_at_the_deadline(odd: Path) -> None:
    with DecodePool(1) as pool:
        pool.load(SMALL, num_frames=1)
        (first,) = pids(pool)
        pool._seconds = 0.5
        with pytest.raises(MediaLimitError, match=r"spin: not decoded within 0\.5 s .*seconds"):
            pool.load("spin")
        assert is_gone(first)
        assert pids(pool) == []


def test_a_stopped_worker_ends_at_the_deadline() -> None:
    with DecodePool(1) as pool:
        pool.load(SMALL, num_frames=1)
        (first,) = pids(pool)
        pool._seconds = 0.5
        os.kill(first, signal.SIGSTOP)
        with pytest.raises(MediaLimitError, match="video: not decoded within"):
            pool.load(b"x" * 10_000_000)  # more than the socket takes unread
        assert is_gone(first)


def test_crashes_are_told_and_the_next_load_gets_a_new_worker(odd: Path) -> None:
    files = len(os.listdir("/dev/fd"))
    with DecodePool(1) as pool:
        with pytest.raises(MediaError, match=r"crashed on crash \(signal SIGSEGV\).*ffmpeg -i"):
            pool.load("crash")
        with pytest.raises(MediaError, match=r"crashed on leave \(exit status 3\)"):
            pool.load("leave")
        assert len(pool.load(SMALL, num_frames=2)) == 2
        (idle,) = pids(pool)
        os.kill(idle, signal.SIGKILL)
        wait_for(lambda: not pool._idle[0].usable)
        assert len(pool.load(SMALL, num_frames=2)) == 2
        assert pids(pool) != [idle]
    assert len(os.listdir("/dev/fd")) == files


def test_a_defect_is_told_as_one(odd: Path) -> None:
    with DecodePool(1) as pool:
        with pytest.raises(RuntimeError, match=r"defect: load_video failed .* KeyError") as caught:
            pool.load("defect")
        assert "in defect" in caught.value.__notes__[0]
        assert len(pids(pool)) == 1


def test_a_worker_that_babbles_is_not_believed(odd: Path) -> None:
    with DecodePool(1) as pool, pytest.raises(MediaError) as caught:
        pool.load("babble")
    assert str(caught.value).startswith("the decoder crashed on babble (its answer made no sense)")


def test_a_worker_is_quiet_and_light(odd: Path, capfd, caplog) -> None:
    with DecodePool(1) as pool:
        with pytest.raises(MediaError, match="quiet again"):
            pool.load("noise")
        with pytest.raises(MediaError, match=r"\('', \(0, 0\)\)"):
            pool.load("stdin")
        with pytest.raises(MediaError) as caught:
            pool.load("modules")
    assert capfd.readouterr() == ("", "")
    first, second = caplog.record_tuples
    assert first == ("vidlm.media.x", logging.ERROR, "logged there")
    assert second[:2] == ("py.warnings", logging.WARNING)
    assert "warned there" in second[2]
    loaded = set(json.loads(str(caught.value)))
    assert {"av", "numpy", "vidlm.media"} <= loaded
    assert not {"torch", "transformers", "pytest", "clips"} & loaded


def test_memory_has_an_end(tmp_path: Path) -> None:
    Image.new("RGB", (3000, 3000)).save(tmp_path / "large.png")
    with DecodePool(1, memory_bytes=100 << 20) as pool:
        with pytest.raises(MediaLimitError, match="frames: needs more memory than the 104857600"):
            pool.load([tmp_path / "large.png"] * 8)
        assert pids(pool) == []
        assert len(pool.load(SMALL, num_frames=2)) == 2
        with pytest.raises(MediaLimitError, match="video: needs more memory than the 104857600"):
            pool.load(bytes(101 << 20))
    large = clips.encode(clips.pictures(2, 4096, 2304), codec="mjpeg", pix_fmt="yuvj420p")
    with DecodePool(1, memory_bytes=64 << 20) as pool:  # FFmpeg meets the limit first
        with pytest.raises(MediaLimitError, match="video: needs more memory"):
            pool.load(large)
        assert len(pool.load(SMALL, num_frames=2)) == 2


def test_a_worker_that_cannot_start_is_told(tmp_path: Path, monkeypatch, capfd) -> None:
    (tmp_path / "av.py").write_text("raise ImportError('no av here')")
    monkeypatch.syspath_prepend(tmp_path)
    with DecodePool(1) as pool, pytest.raises(RuntimeError, match=r"not start \(exit status 1\)"):
        pool.load(SMALL)
    assert "no av here" in capfd.readouterr().err


# ---- threads and closing ---------------------------------------------------------------------


def test_many_threads_share_few_workers() -> None:
    expected = load_video(SMALL, num_frames=3)
    with DecodePool(2) as pool, ThreadPoolExecutor(6) as threads:
        for got in threads.map(lambda _: pool.load(SMALL, num_frames=3), range(12)):
            check_same(got, expected)
        assert 1 <= len(pids(pool)) <= 2


def test_close_ends_everything(odd: Path) -> None:
    pool = DecodePool(1)
    with ThreadPoolExecutor(2) as threads:
        loads = [threads.submit(pool.load, "spin") for _ in range(2)]  # the second one waits
        wait_for(lambda: pool._busy and pool._busy[0].ready)
        (busy,) = pids(pool)
        pool.close()
        errors = sorted(str(load.exception(60)) for load in loads)
    assert errors[0].startswith("spin: the DecodePool was closed meanwhile")
    assert errors[1].startswith("the DecodePool is closed")
    assert is_gone(busy)
    assert pids(pool) == []
    pool.close()


def test_a_fork_needs_its_own_pool(monkeypatch) -> None:
    with DecodePool(1) as pool:
        pool.load(SMALL, num_frames=1)
        with monkeypatch.context() as patch:
            patch.setattr(pool, "_owner", os.getpid() + 1)
            with pytest.raises(InvalidArgument, match="is its fork; make another pool"):
                pool.load(SMALL)
            pool.close()
        assert len(pool.load(SMALL, num_frames=1)) == 1


@pytest.mark.parametrize(
    "how", [{"workers": 0}, {"seconds": 0}, {"seconds": float("inf")}, {"memory_bytes": 1000}]
)
def test_a_pool_of_nothing_is_refused(how: dict) -> None:
    with pytest.raises(InvalidArgument, match=next(iter(how))):
        DecodePool(**how)
