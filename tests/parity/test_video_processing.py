"""Video processors against transformers: every word of each, every form of a video, bit-equal."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import tiny
from oracle import transformers
from vidlm.hf.video_processing import (
    LlavaNextVideoVideoProcessor,
    VideoLlama3VideoProcessor,
    VideoLlavaVideoProcessor,
    VideoProcessor,
)

Metadata = transformers.video_utils.VideoMetadata


@dataclass(frozen=True)
class Pair:
    """A processor of ours and the one of transformers, with words that keep frames small."""

    ours: type[VideoProcessor]
    theirs: Callable[..., Any]
    words: dict[str, Any]

    def assert_equal(self, videos: Any, tolerance: float = 0, **words: Any) -> None:
        """In both ways of saying the words: when it is made, and for one call."""
        given = words.pop("video_metadata", None)
        words = {**self.words, **words}
        kept = deepcopy(words)  # theirs changes a size that it is given
        how = {"return_tensors": "pt", "video_metadata": given}
        theirs = dict(self.theirs(**words)(videos, **how))
        compare(self.ours(**kept)(videos, **how), theirs, tolerance)
        compare(self.ours().preprocess(videos, **how, **kept), theirs, tolerance)


def compare(ours: Any, theirs: dict[str, Any], tolerance: float = 0) -> None:
    assert list(ours) == list(theirs)
    for name, mine in ours.items():
        if name == "video_metadata":
            for our, their in zip(mine, theirs[name], strict=True):
                assert our.total_num_frames == their.total_num_frames
                assert our.fps == their.fps
                assert list(our.frames_indices) == list(their.frames_indices)
        else:
            assert mine.shape == theirs[name].shape
            assert torch.allclose(mine, theirs[name].to(mine.dtype), rtol=tolerance, atol=0)


SMALL = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
PAIRS = {
    "video llava": Pair(VideoLlavaVideoProcessor, transformers.VideoLlavaVideoProcessor, SMALL),
    "next": Pair(LlavaNextVideoVideoProcessor, transformers.LlavaNextVideoVideoProcessor, SMALL),
    "videollama3": Pair(
        VideoLlama3VideoProcessor,
        transformers.VideoLlama3VideoProcessor,
        {"size": {"shortest_edge": 784, "longest_edge": 31360}},
    ),
}
pairs = pytest.mark.parametrize("pair", list(PAIRS.values()), ids=list(PAIRS))


def video(frames: int = 5, height: int = 37, width: int = 61) -> np.ndarray:
    """The second frame repeats the first, and the third one half of it."""
    made = np.stack([np.asarray(tiny.picture(i, height, width)) for i in range(frames)])
    made[1:2] = made[:1]
    made[2:3, :, : width // 2] = made[:1, :, : width // 2]
    return made


# ---- every word ----------------------------------------------------------------------------------

SHARED: dict[str, dict[str, Any]] = {
    "as they are": {},
    "resample": {"resample": 2},
    "do_rescale": {"do_rescale": False},
    "rescale_factor": {"rescale_factor": 1 / 127.5},
    "do_normalize": {"do_normalize": False},
    "image_mean": {"image_mean": [0.1, 0.2, 0.3]},
    "image_std": {"image_std": 0.25},
    "do_convert_rgb": {"do_convert_rgb": False},
    "device": {"device": "cpu"},
    "return_metadata": {"return_metadata": True},
    "no return_metadata": {"return_metadata": False},
}
FRAMES_ONLY: dict[str, dict[str, Any]] = {
    "do_resize": {"do_resize": False},
    "size, a number": {"size": 40},
    "size, oblong, and do_center_crop": {
        "size": {"height": 21, "width": 35},
        "do_center_crop": False,
    },
    "crop_size": {"crop_size": {"height": 21, "width": 35}},
}
PATCH_ONLY: dict[str, dict[str, Any]] = {
    "size": {"size": {"shortest_edge": 7840, "longest_edge": 78400}},
    "min_pixels": {"min_pixels": 8000},
    "max_pixels": {"max_pixels": 8000},
    "patch_size": {"patch_size": 7},
    "merge_size": {"merge_size": 1},
    "use_token_compression": {"use_token_compression": False},
}
WORDS = [
    *((name, word) for name in PAIRS for word in SHARED.items()),
    *((name, word) for name in ("video llava", "next") for word in FRAMES_ONLY.items()),
    *(("videollama3", word) for word in PATCH_ONLY.items()),
]


@pytest.mark.parametrize(("name", "word"), WORDS, ids=[f"{n}-{w[0]}" for n, w in WORDS])
@pytest.mark.filterwarnings("ignore:Passing `m.._pixels`:FutureWarning")
def test_every_word(name: str, word: tuple[str, dict[str, Any]]) -> None:
    # Without one of the two factors the reference multiplies where we divide: the last bit differs.
    PAIRS[name].assert_equal(video(), 1e-6 if word[0] == "do_normalize" else 0, **word[1])


@pairs
def test_class_defaults(pair: Pair) -> None:
    ours, theirs = pair.ours(), pair.theirs()
    for name in pair.ours.defaults:
        mine, other = getattr(ours, name), getattr(theirs, name, None)
        other = dict(other) if name in ("size", "crop_size") else other
        other = list(other) if isinstance(mine, list) else other
        if name not in ("data_format", "default_to_square", "min_pixels", "max_pixels"):
            assert mine == other, name


# ---- every form of a video -----------------------------------------------------------------------


def forms() -> dict[str, Any]:
    one, two = video(), video()[::-1].copy()
    return {
        "array": one,
        "channels first": one.transpose(0, 3, 1, 2),
        "tensor": torch.tensor(one),
        "grey": one[..., :1],
        "images": [Image.fromarray(frame) for frame in one],
        "arrays": list(one),
        "several": [one, two],
        "several as a batch": np.stack([one, two]),
        "several of images": [[Image.fromarray(frame) for frame in each] for each in (one, two)],
        "nested": [[one], [two]],
        "one frame": one[0],
        "one image": Image.fromarray(one[0]),
        "floats": one.astype(np.float32) / 255,
    }


@pairs
@pytest.mark.parametrize("form", list(forms()))
def test_every_form_of_a_video(pair: Pair, form: str) -> None:
    pair.assert_equal(forms()[form], do_rescale=form != "floats")


def test_videos_of_several_sizes_and_lengths() -> None:
    videos = [video(5), video(3, 70, 41), video(1)]
    PAIRS["videollama3"].assert_equal(videos)


# ---- choice of frames ----------------------------------------------------------------------------


@pairs
@pytest.mark.parametrize("count", [1, 3, 8])
def test_num_frames(pair: Pair, count: int) -> None:
    # A tensor, as an array of theirs loses its first axis where one frame is wanted.
    pair.assert_equal(torch.tensor(video(8)), do_sample_frames=True, num_frames=count)


@pairs
@pytest.mark.parametrize("fps", [1, 2.5, 0.1])
@pytest.mark.parametrize("as_object", [False, True])
def test_fps(pair: Pair, fps: float, as_object: bool) -> None:
    told = {"total_num_frames": 20, "fps": 4.0}
    metadata = [Metadata(**told) if as_object else told]
    pair.assert_equal(video(20), do_sample_frames=True, fps=fps, video_metadata=metadata)


def test_bounds_of_fps() -> None:
    told = {"total_num_frames": 20, "fps": 4.0}
    for bounds in ({"min_frames": 7}, {"max_frames": 4}):
        words = {"do_sample_frames": True, "fps": 1, **bounds}
        PAIRS["videollama3"].assert_equal(video(20), **words, video_metadata=[told])


totals = st.integers(1, 2000)
rates = st.one_of(st.sampled_from([24, 25, 29.97, 30, 59.94]), st.floats(1, 120))


@pairs
@settings(max_examples=300)
@given(total=totals, rate=rates, fps=st.floats(0.05, 60), count=st.integers(1, 2000))
def test_the_rule_of_choice(pair: Pair, total: int, rate: float, fps: float, count: int) -> None:
    theirs, told = pair.theirs(), Metadata(total_num_frames=total, fps=rate)

    def sampled(**how: Any) -> list[int]:
        rows = theirs.sample_frames(told, **how).tolist()
        return [row for row in rows if row < total]  # VideoLLaMA3's may be one too many: it fails

    wanted = {"num_frames": min(count, total)}
    assert pair.ours(**wanted).rows(total, None) == sampled(**wanted)
    try:
        rows = sampled(fps=fps)
    except ValueError:  # more than there are
        with pytest.raises(ValueError, match=f"of a video that has {total}"):
            pair.ours(fps=fps).rows(total, rate)
    else:
        assert pair.ours(fps=fps).rows(total, rate) == rows


# ---- files ---------------------------------------------------------------------------------------


@pairs
@pytest.mark.parametrize("word", list(SHARED))
def test_what_is_saved_is_read_by_both(pair: Pair, word: str, tmp_path: Path) -> None:
    ours = pair.ours(**pair.words, **SHARED[word])
    ours.save_pretrained(tmp_path)
    assert pair.ours.from_pretrained(tmp_path).core == ours.core
    written = json.loads((tmp_path / "video_preprocessor_config.json").read_text())
    assert getattr(transformers, written["video_processor_type"]) is pair.theirs
    theirs = pair.theirs.from_pretrained(tmp_path)(video(), return_tensors="pt")
    compare(ours(video(), return_tensors="pt"), dict(theirs), 1e-6)


@pairs
def test_what_transformers_saves(
    pair: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pair.theirs(**deepcopy(pair.words)).save_pretrained(tmp_path)
    assert pair.ours.from_pretrained(tmp_path).words == pair.ours(**pair.words).words
    assert not caplog.records


PUBLISHED = {"video_llava": "video llava", "next_video": "next", "vl3": "videollama3"}


@pytest.mark.parametrize("folder", list(PUBLISHED))
def test_published_files(folder: str, shared: Path) -> None:
    path, pair = shared / "data" / "hub_like" / folder, PAIRS[PUBLISHED[folder]]
    frames = video(3, 120, 161)
    theirs = pair.theirs.from_pretrained(path)(frames, return_tensors="pt")
    compare(pair.ours.from_pretrained(path)(frames, return_tensors="pt"), dict(theirs))
