"""Which frames a command line asks for: options as keywords, and every choice shown on a sheet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import clips
from vidlm.cli.options import Ask, Frames
from vidlm.cli.outcome import outcome
from vidlm.cli.sheets import frames
from vidlm.cli.sources import chosen_frames
from vidlm.errors import InvalidArgument


@pytest.fixture
def video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("clip.mp4").write_bytes(clips.clip(40, options={"g": "10", "sc_threshold": "0"}))
    return "clip.mp4"


@pytest.mark.parametrize(
    ("given", "keywords"),
    [
        ({}, {}),
        ({"frames": 4, "start": "0:01"}, {"num_frames": 4, "start": "0:01"}),
        ({"sampling": "scenes"}, {"sampling": "scenes"}),
        ({"sampling": "linspace"}, {"sampling": "linspace"}),
        (
            {"sampling": "slowfast", "frames": 4, "fps": 1.0},
            {"sampling": "slowfast", "num_frames": 4, "fps": 1.0},
        ),
        ({"times": "1.5,0:20"}, {"times": ["1.5", "0:20"]}),
        ({"indices": "7, 0"}, {"indices": [7, 0]}),
    ],
)
def test_options_become_keywords(given: dict[str, Any], keywords: dict[str, Any]) -> None:
    assert chosen_frames(Ask(**given)) == keywords
    assert chosen_frames(Frames(videos=["clip.mp4"], **given)) == keywords


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"frames": 4, "fps": 1.0}, "--frames 4 and --fps 1 exclude each other"),
        ({"sampling": "best"}, "sampling='best'; allowed: uniform"),
        ({"times": "soon"}, "times='soon' is not a time"),
        ({"indices": "1,two"}, "--indices '1,two' are not numbers of frames"),
        ({"indices": "1", "frames": 4}, "exclude each other"),
        ({"sampling": "scenes", "fps": 1.0}, "fps=1.0 means nothing to sampling='scenes'"),
    ],
)
def test_a_choice_that_means_nothing_is_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidArgument, match=says):
        chosen_frames(Ask(**given))


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({}, [0, 5, 10, 15, 20, 25, 30, 35]),
        ({"sampling": "keyframes"}, [0, 10, 20, 30]),
        ({"sampling": "linspace", "frames": 3}, [0, 19, 39]),
        ({"sampling": "videollama3"}, [0, 10, 20, 30]),
        ({"sampling": "scenes", "frames": 2}, [10, 30]),
        ({"times": "0:01,0.1"}, [25, 2]),
        ({"indices": "39,0"}, [39, 0]),
    ],
)
def test_the_sheet_tells_what_was_chosen(
    video: str, given: dict[str, Any], shown: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert outcome(frames, Frames(videos=[video], **given)) == 0
    told = capsys.readouterr()
    assert [int(line.split()[0]) for line in told.err.splitlines()[1:]] == shown
    assert told.out == "clip_frames.png\n"
    with Image.open("clip_frames.png") as sheet:
        assert sheet.width > 100
