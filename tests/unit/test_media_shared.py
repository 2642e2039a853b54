"""The larger corpus, where there is one: real files with real quirks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import clips
from vidlm.errors import MediaError
from vidlm.media import Video, load_video

# Turned back before the numbers are read: the strip was painted before the file got its tag.
TURNED = {"gen_h264_rotate90.mp4": -1, "gen_h264_rotate180.mp4": 2}


@pytest.fixture(scope="module")
def corpus(shared: Path) -> Path:
    return shared / "data" / "videos"


def entries(corpus: Path) -> list[dict]:
    return json.loads((corpus / "index.json").read_text("utf-8"))


def check_numbers(name: str, video: Video) -> None:
    frames = np.rot90(video.frames, TURNED.get(name, 0), (1, 2))
    assert clips.numbers(frames) == video.indices.tolist(), name


def test_numbered_files_give_the_frame_asked_for(corpus: Path) -> None:
    names = [e["file"] for e in entries(corpus) if e.get("ids_ok") and e["decoded"] < 1000]
    assert len(names) > 40
    for name in names:
        check_numbers(name, load_video(corpus / name, num_frames=8))


def test_every_file_is_read_or_refused(corpus: Path) -> None:
    """The number of frames is that of the corpus' own full decodes."""
    other = {"decord_corrupted.mp4": 50, "tc_nasa_13013.mp4": 390, "gen_anim.webp": 20}
    for entry in entries(corpus):
        name = entry["file"]
        frames = other.get(name, entry.get("decoded") or 0)
        if frames:
            video = load_video(corpus / name, max_frames=1)
            assert (len(video), video.total_frames) == (1, frames), name
            assert video.fps > 0, name
        else:
            with pytest.raises(MediaError, match=name):
                load_video(corpus / name)


def test_twenty_minutes_take_eight_frames(corpus: Path) -> None:
    video = load_video(corpus / "gen_h264_20min_30000frames.mp4", num_frames=8)
    check_numbers(video.name, video)
    assert video.indices.tolist() == [i * 3750 for i in range(8)]
    assert video.pts.tolist() == [i * 150.0 for i in range(8)]


def test_a_clip_with_two_streams_shows_the_better_one(corpus: Path) -> None:
    video = load_video(corpus / "tc_nasa_13013.mp4", num_frames=4)
    assert video.frames.shape == (4, 270, 480, 3)
    assert video.total_frames == 390


def test_wide_pixels_and_turned_pictures(corpus: Path) -> None:
    assert load_video(corpus / "gen_h264_sar_4x3.mp4", num_frames=1).frames.shape[2] == 341
    assert load_video(corpus / "gen_h264_rotate90.mp4", num_frames=1).frames.shape[1:3] == (
        256,
        144,
    )
