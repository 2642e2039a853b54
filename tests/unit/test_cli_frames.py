"""Which frames a command line asks for: options as keywords, and every choice shown on a sheet."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import clips
from vidlm.cli.options import Ask, Frames
from vidlm.cli.outcome import outcome
from vidlm.cli.sheets import frames
from vidlm.cli.sources import chosen_frames
from vidlm.errors import InvalidArgument
from vidlm.hf import shown
from vidlm.media import load_video
from vidlm.models.base import Media
from vidlm.models.videollama3 import Patches
from vidlm.vision.patches import Patchify
from vidlm.vision.preprocess import CLIP_MEAN, CLIP_STD, Preprocess, resize, to_pixels


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


# ---- what a model sees -----------------------------------------------------------------------


def test_a_models_rule_crop_and_size(video: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(frames, Frames(videos=[video], model="demo", output=Path("demo.png"))) == 0
    told = capsys.readouterr()
    assert told.err.splitlines()[0] == "clip.mp4: 8 of 40 frames, as demo sees them"
    assert len(told.err.splitlines()) == 10
    assert told.out == "demo.png\n"
    with Image.open("demo.png") as sheet:
        frame = np.asarray(sheet.convert("RGB"))[28 : 28 + 192, 8 + 8 : 8 + 192]
    squares = frame[:189:3, 1:181:3]  # each of 64 x 64 pixels is a square of 3 x 3
    assert len(np.unique(squares.reshape(-1, 3), axis=0)) > 1


@pytest.mark.parametrize("form", ["llava", "video", "patches"])
def test_pixels_are_shown_as_the_model_gets_them(form: str) -> None:
    """Normalised and put together again, they are what resizing and cropping alone gives."""
    clip = load_video(clips.encode(clips.pictures(3, 80, 48)))
    pixels = Preprocess(28, (28, 28), CLIP_MEAN, CLIP_STD)
    plain = Preprocess(28, (28, 28), (0.0,) * 3, (1.0,) * 3)
    wanted = [plain.one(frame) for frame in clip.frames]
    if form == "patches":
        patches = Patchify(784, 10**6, 2, share=False, compress=False, patch_size=7)
        rows, grid = patches(list(clip.frames))
        media = [Patches(rows, 4, "video", 3, grid, 2)]
        core = SimpleNamespace(video_pixels=patches)
        size = patches.size(3, *clip.frames.shape[1:3])
        wanted = [resize(to_pixels(frame), size, "bicubic").float() / 255 for frame in clip.frames]
    elif form == "video":
        media = [Media(pixels(list(clip.frames)), 4, "video", 3)]
        core = SimpleNamespace(video_pixels=pixels)
    else:
        media = [Media(pixels.one(frame), 4) for frame in clip.frames]
        core = SimpleNamespace(image_pixels=pixels)
    processor: Any = SimpleNamespace(
        core=core, video_token=None if form == "llava" else "<video>", media=lambda *_: media
    )
    seen = shown(processor, clip)
    told = [(each * 255).round().byte().permute(1, 2, 0).numpy() for each in wanted]
    assert np.array_equal(seen.frames, np.stack(told))
    assert np.array_equal(seen.indices, clip.indices)


def test_several_videos(video: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("other.mp4").write_bytes(clips.clip(10))
    assert outcome(frames, Frames(videos=[video, "other.mp4"], output=Path("sheets"))) == 0
    told = capsys.readouterr()
    assert told.out.split() == ["sheets/clip_frames.png", "sheets/other_frames.png"]
    assert "other.mp4: 8 of 10 frames" in told.err
    assert all(Path(path).is_file() for path in told.out.split())


def test_a_folder_of_images_is_one_video(video: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("imgs").mkdir()
    for i in range(3):
        Image.new("RGB", (40, 30)).save(f"imgs/f{i}.png")
    for source in ("imgs", "imgs/", "imgs/*.png"):
        assert outcome(frames, Frames(videos=[source], force=True)) == 0
        told = capsys.readouterr()
        assert told.out == "imgs_frames.png\n"
        assert len(told.err.splitlines()) == 4
