"""Pipes, and files whose names look like something else."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import clips
from container_files import box
from vidlm.cli import sources
from vidlm.errors import MediaError, MediaFetchError, MediaLimitError
from vidlm.media import DecodePool, is_image, load_image, load_video
from vidlm.media.fetch import FetchPolicy
from vidlm.media.source import is_pipe, is_url

# Longer than what a pipe holds.
CLIP = clips.clip(40, codec="mpeg4") + box(b"free", bytes(1 << 17))


@contextmanager
def piped(data: bytes) -> Iterator[str]:
    """The path of a pipe that data come out of, as a shell gives for `<(command)`."""
    out, into = os.pipe()
    writer = threading.Thread(target=written, args=(into, data))
    writer.start()
    try:
        yield f"/dev/fd/{out}"
    finally:
        os.close(out)
        writer.join()


def written(into: int, data: bytes) -> None:
    try:
        with open(into, "wb") as file:
            file.write(data)
    except BrokenPipeError:  # nobody wanted the rest
        pass


def test_a_pipe_is_read_once_and_whole() -> None:
    with piped(CLIP) as path:
        assert is_pipe(path)
        video = load_video(path, num_frames=4)
    clips.check(video, [0, 10, 20, 30])


def test_a_pipe_in_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "pipe.mp4"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(CLIP,))
    writer.start()
    clips.check(load_video(path, indices=[3]), [3])
    writer.join()


def test_a_decode_worker_gets_what_a_pipe_of_ours_held() -> None:
    with DecodePool(1) as pool, piped(CLIP) as path:
        clips.check(pool.load(path, indices=[3]), [3])


def test_an_image_comes_through_a_pipe(tmp_path: Path) -> None:
    import io

    from PIL import Image

    target = io.BytesIO()
    Image.fromarray(clips.picture(5)).save(target, "PNG")
    with piped(target.getvalue()) as path:
        assert load_image(path).size == (128, 96)


def test_a_pipe_is_bounded_in_bytes_and_in_silence(tmp_path: Path) -> None:
    with (
        piped(CLIP) as path,
        pytest.raises(MediaLimitError, match="more than the limit of 1000 bytes"),
    ):
        load_video(path, access=FetchPolicy(max_bytes=1000))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(MediaError, match=r"into which nobody wrote for 0\.2 s"):
        load_video(tmp_path / "pipe", access=FetchPolicy(timeout=0.2))
    with pytest.raises(MediaFetchError, match="outside the folders"):
        load_video(tmp_path / "pipe", access=FetchPolicy(folders=(Path(__file__).parent,)))
    with piped(b"") as path, pytest.raises(MediaError, match="empty, 0 bytes"):
        load_video(path)


# ---- the command line ------------------------------------------------------------------------


def vidlm(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A line of bash, in which `vidlm` is ours."""
    script = f'vidlm() {{ "{sys.executable}" -m vidlm.cli "$@"; }}\n{line}'
    return subprocess.run(
        ["bash", "-c", script], cwd=folder, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("source", ["<(cat clip.mp4)", "- < clip.mp4", "/dev/stdin < clip.mp4"])
def test_the_command_line_reads_pipes(source: str, tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(CLIP)
    done = vidlm(f"vidlm frames {source} --indices 3,5 --output sheet.png", tmp_path)
    assert (done.returncode, done.stdout) == (0, "sheet.png\n"), done.stderr
    assert [line.split()[0] for line in done.stderr.splitlines()] == ["frame", "3", "5"]


def test_a_pipe_is_not_opened_to_see_whether_it_is_there() -> None:
    with piped(CLIP) as path:
        sources.check_sources([path])
        assert Path(path).read_bytes() == CLIP


def test_stdin_is_bounded(monkeypatch) -> None:
    monkeypatch.setattr("vidlm.media.fetch.MAX_BYTES", 10)
    with pytest.raises(MediaLimitError, match="stdin holds more than"):
        sources._read_pipe(io.BytesIO(bytes(11)), "stdin")
    assert sources._read_pipe(io.BytesIO(bytes(10)), "stdin").read() == bytes(10)


# ---- odd names -------------------------------------------------------------------------------

NAMES = [
    "data:x.mp4",
    "data:video,1.mp4",
    "file:x.mp4",
    "http:x.mp4",
    "rtsp:x.mp4",
    "-x.mp4",
    "a b#c?d=e&f%20.mp4",
    "[1].mp4",
    "*.mp4",
    "~.mp4",
    "clip",
    "x\ny.mp4",
    "ünï–cödé🎬.mp4",
    "%d.mp4",
    "frame_%03d.jpg",
    "pipe:0",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_there_is_a_file(name: str, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / name).write_bytes(CLIP)
    monkeypatch.chdir(tmp_path)
    for source in (name, str(tmp_path / name), Path(name)):
        clips.check(load_video(source, indices=[3]), [3])
    assert not is_url(name)
    with DecodePool(1) as pool:
        clips.check(pool.load(name, indices=[3]), [3])


def test_what_is_a_url_stays_one(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for url in ("https://host/a.mp4", "HTTP://host", "data:video/mp4;base64,AAAA", "file:///a.mp4"):
        assert is_url(url)
    (tmp_path / "http:" / "host").mkdir(parents=True)
    (tmp_path / "http:" / "host" / "a.mp4").write_bytes(CLIP)
    assert is_url("http://host/a.mp4")  # not the folder of the same letters
    assert not is_url("clip.mp4")
    assert is_url("data:," + "A" * 5000)
    assert is_url("data:\0.mp4")


def test_an_odd_name_is_an_image_by_its_ending(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data:x.jpg").write_bytes(b"")
    assert is_image("data:x.jpg")
    assert not is_image("data:gone.jpg")
