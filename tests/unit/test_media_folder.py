"""Folders and patterns of images: which files are meant, and in which order."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from PIL import Image

import clips
from vidlm.errors import MediaError
from vidlm.media import is_image, load_video
from vidlm.media.fetch import FetchPolicy
from vidlm.media.folder import in_order, pictures


def fill(folder: Path, *names: str) -> Path:
    """A folder of numbered JPEGs of these names."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        Image.fromarray(clips.picture(number)).save(folder / name, "JPEG")
    return folder


def test_what_file_managers_leave_behind_is_no_frame(tmp_path: Path) -> None:
    folder = fill(tmp_path / "frames", *(f"f_{n}.jpg" for n in range(3)))
    for name in ("._f_0.jpg", ".DS_Store", "Thumbs.db", "desktop.ini", ".hidden.jpg", "notes.txt"):
        (folder / name).write_bytes(b"\0\x05\x16\x07no image")
    (folder / "folder.jpg").mkdir()
    for source in (folder, str(folder / "*.jpg"), str(folder / "f_*"), str(folder / "[!n]*")):
        assert clips.numbers(load_video(source).frames) == [0, 1, 2]
    with pytest.raises(MediaError, match="matches only folders and hidden files"):
        load_video(str(folder / "._*"))


@pytest.mark.parametrize("ending", ["jfif", "jpe", "jif", "JPG", "JFIF", "jpeg"])
def test_endings_of_jpeg(ending: str, tmp_path: Path) -> None:
    folder = fill(tmp_path / "frames", f"a1.{ending}", f"a2.{ending}")
    assert clips.numbers(load_video(folder).frames) == [0, 1]
    assert is_image(f"a1.{ending}")
    assert is_image(f"https://host/a1.{ending}?size=1")


def test_one_list_of_endings_serves_folders_and_single_files() -> None:
    for name in ("a.heic", "a.HEIF", "a.avif", "a.ppm", "a.dib", "data:image/webp;base64,"):
        assert is_image(name)
    for name in ("a.webp", "a.gif", "a.mp4", "a.eps", "data:video/mp4;base64,", "jpg"):
        assert not is_image(name)


@pytest.mark.parametrize("name", ["[abc]", "a[1]b", "what?", "star*", "[!x]", "plain"])
def test_folders_whose_names_look_like_patterns(name: str, tmp_path: Path) -> None:
    folder = fill(tmp_path / name / "frames [2]", "1.jpg", "2.jpg")
    fill(tmp_path / "a", "9.jpg")
    fill(tmp_path / "a1b", "9.jpg")
    for source in (folder, str(folder), str(folder / "*.jpg"), folder / "[12].jpg"):
        assert clips.numbers(load_video(source).frames) == [0, 1]
    assert len(load_video(str(tmp_path / name / "frames*" / "*.jpg"))) == 2
    assert clips.numbers(load_video(str(folder / "2.jp*")).frames) == [1]


def test_a_relative_pattern(tmp_path: Path, monkeypatch) -> None:
    fill(tmp_path / "[abc]", "1.jpg", "2.jpg")
    monkeypatch.chdir(tmp_path)
    assert len(load_video("[abc]/*.jpg")) == 2
    monkeypatch.chdir("[abc]")
    assert len(load_video("*.jpg")) == 2


def test_nothing_is_a_pattern_twice(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="matches no file"):
        load_video(str(tmp_path / "*.jpg"))
    assert pictures("https://host/*.jpg", FetchPolicy()) is None


@pytest.mark.parametrize(
    "names",
    [
        ["f_1", "f_2", "f_10"],
        ["f_0.25", "f_0.5", "f_0.75", "f_1.0", "f_10.25"],  # seconds
        ["t0.9", "t0.95", "t1", "t1.05", "t1.5"],
        ["s1.1", "s1.2", "s1.9", "s1.10", "s1.11", "s2.1"],  # shot and number
        ["s1.8", "s1.9", "s1.10"],
        ["clip.0001", "clip.0002", "clip.0010"],
        ["v1.2.3", "v1.2.10", "v1.10.1"],
        ["2024.01.05", "2024.01.10", "2024.02.01"],
        ["2024-01-05 10.00.01", "2024-01-05 10.00.02", "2024-01-05 10.01.00"],
        ["a (1)", "a (2)", "a (10)", "a (11)"],
        ["1", "01x", "2", "2b", "10"],
        ["é1", "é2", "é10"],
        ["frame\u0662", "frame\u0661\u0660"],  # Arabic 2, 10
        ["1.5s", "2s", "2.5s", "12.125s"],
    ],
)
def test_names_are_put_in_the_order_of_their_numbers(names: list[str]) -> None:
    paths = [Path("frames", f"{name}.jpg") for name in names]
    for mixed in (paths[::-1], sorted(paths), paths[1:] + paths[:1]):
        assert in_order(mixed) == paths


def test_folders_of_a_pattern_come_one_after_another(tmp_path: Path) -> None:
    for shot in ("shot2", "shot10"):
        fill(tmp_path / shot, "1.jpg", "2.jpg")
    found = pictures(str(tmp_path / "shot*" / "*.jpg"), FetchPolicy())
    names = [f"{path.parent.name}/{path.name}" for path in found or ()]
    assert names == ["shot2/1.jpg", "shot2/2.jpg", "shot10/1.jpg", "shot10/2.jpg"]


def test_a_folder_that_a_mac_wrote_to_another_disk(shared: Path, tmp_path: Path) -> None:
    archive = shared / "data" / "faults" / "media" / "folder_macos.tar"
    if not archive.is_file():
        pytest.skip(f"needs the files of public reports ({archive})")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    (folder,) = {path.parent for path in tmp_path.rglob("*.jpg")}
    assert clips.numbers(load_video(folder).frames) == list(range(12))
