"""The contact sheet: every frame in its place, readable, and of a sane size."""

from __future__ import annotations

import numpy as np
import pytest

import clips
from vidlm.errors import InvalidArgument
from vidlm.media import Video, contact_sheet, load_video
from vidlm.media.clip import clock


@pytest.fixture
def video() -> Video:
    return load_video(clips.pictures(7, 192, 96))


def test_frames_stand_in_reading_order(video: Video) -> None:
    sheet = np.asarray(contact_sheet(video, columns=3, thumb=192))
    across, down = 192 + 8, 96 + 20 + 8
    cells = [
        sheet[28 + row * down : 28 + row * down + 96, 8 + col * across : 8 + col * across + 192]
        for row in range(3)
        for col in range(3)
    ]
    assert clips.numbers(np.stack(cells[:7])) == [0, 1, 2, 3, 4, 5, 6]
    assert (cells[7] == 255).all()
    assert (cells[8] == 255).all()


def test_title_and_labels_are_written(video: Video) -> None:
    sheet = np.asarray(contact_sheet(video, columns=7))
    title, labels = sheet[:24], sheet[28 + 96 : 28 + 96 + 20]
    assert (title < 128).any()
    for place in range(7):
        label = labels[:, 8 + place * 200 : 8 + place * 200 + 100]
        assert (label < 160).any()


def test_a_sheet_is_about_square_by_default(video: Video) -> None:
    wide, high = contact_sheet(load_video(clips.pictures(40, 64, 64))).size
    assert 0.6 < wide / high < 1.7
    assert contact_sheet(video, columns=99).size[1] < 200  # one row


def test_a_narrow_clip_keeps_its_labels_and_title_whole() -> None:
    sheet = contact_sheet(load_video(clips.pictures(1, 16, 200)), thumb=64)
    assert sheet.size[0] > 150
    assert sheet.size[1] < 130


def test_senseless_sheets_are_refused(video: Video) -> None:
    with pytest.raises(InvalidArgument, match="columns=0"):
        contact_sheet(video, columns=0)
    with pytest.raises(InvalidArgument, match="thumb=3 "):
        contact_sheet(video, thumb=3)
    with pytest.raises(InvalidArgument, match="load fewer"):
        contact_sheet(video, thumb=20_000)


def test_the_clock() -> None:
    assert [clock(t) for t in (0, 9.999, 61.5, 3600.25, -0.001)] == [
        "00:00.00",
        "00:10.00",
        "01:01.50",
        "1:00:00.25",
        "00:00.00",
    ]
