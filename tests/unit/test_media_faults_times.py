"""Files as public bug reports describe them, of the larger corpus: times, beginnings and ends."""

from __future__ import annotations

from pathlib import Path

import pytest

import clips
from vidlm.media import decode, load_video


@pytest.fixture(scope="module")
def faults(shared: Path) -> Path:
    folder = shared / "data" / "faults" / "media"
    if not folder.is_dir():
        pytest.skip(f"needs the corpus of faulty files: {folder} is no folder")
    return folder


@pytest.mark.parametrize("name", ["vfr_dup.mkv", "vfr_dup.mp4"])
def test_an_equal_stamp_keeps_the_clock(faults: Path, name: str) -> None:
    video = load_video(faults / name)
    clips.check(video, range(42))
    assert video.duration == pytest.approx(62.9, abs=0.1)
    assert "share their time stamp" in video.warnings[0]
    clips.check(load_video(faults / name, fps=0.2), [0, *range(20, 32)])
    clips.check(load_video(faults / name, times=[30]), [25])


@pytest.mark.parametrize("name", ["epoch.mkv", "d_live.mp4"])
def test_a_clip_that_begins_late_is_whole(faults: Path, name: str) -> None:
    video = load_video(faults / name, on_error="raise")
    clips.check(video, range(len(video)))
    assert video.warnings == ()


@pytest.mark.parametrize("name", ["jump60h.flv", "lastbad.mkv"])
def test_a_gap_of_days_is_an_error(faults: Path, name: str) -> None:
    video = load_video(faults / name)
    clips.check(video, range(50))
    assert video.duration == pytest.approx(2, abs=0.1)
    assert "have times that do not follow" in video.warnings[0]
    clips.check(load_video(faults / name, start=1, end=1.2), range(25, 30))


def test_two_wild_stamps_are_no_length(faults: Path) -> None:
    video = load_video(faults / "outlier.mkv", fps=1)
    clips.check(video, range(0, 250, 25))
    assert video.duration == pytest.approx(10, abs=0.1)
    assert "2 of 250 frames have times that do not follow" in video.warnings[0]
    assert len(load_video(faults / "outlier.mkv", sampling="videollama3")) == 10
    assert load_video(faults / "outlier.mkv", sampling="slowfast", num_frames=8).pts[-1] < 10


def test_an_open_group_at_the_beginning_costs_no_decoding(faults: Path, monkeypatch) -> None:
    monkeypatch.setattr(decode, "list_frames", None)  # would be called to decode everything
    video = load_video(faults / "cra_start_slow.mkv", num_frames=8)
    assert clips.numbers(video.frames) == [24, 21, 18, 15, 12, 9, 6, 3]
    assert video.total_frames == 3816


def test_the_last_slide_stays(faults: Path) -> None:
    clips.check(load_video(faults / "slides.mp4", times=[10]), [2])
    clips.check(load_video(faults / "slides.mp4", start=10), [2])
    clips.check(load_video(faults / "slides.mp4", fps=1), [0, 1, 2])
