"""Video processors: where videos come from and which of their frames are taken; files of words."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from vidlm.errors import InvalidArgument, MediaNotFound, ModelError
from vidlm.hf.image_processing import (
    ImageProcessor,
    LlavaNextVideoImageProcessor,
    VideoLlama3ImageProcessor,
    VideoLlavaImageProcessor,
)
from vidlm.hf.video_processing import (
    LlavaNextVideoVideoProcessor,
    VideoLlama3VideoProcessor,
    VideoLlavaVideoProcessor,
    VideoMetadata,
    VideoProcessor,
)
from vidlm.media import Video, load_video
from vidlm.vision.anyres import AnyRes
from vidlm.vision.patches import IMAGE_BUDGET, VIDEO_BUDGET, Patchify
from vidlm.vision.preprocess import Preprocess

SMALL: dict[str, Any] = {"size": 28, "crop_size": 28}
CLIP = "nemo_test_video.mp4"


@pytest.fixture
def videos() -> VideoLlavaVideoProcessor:
    return VideoLlavaVideoProcessor(**SMALL)


@pytest.fixture
def patches() -> VideoLlama3VideoProcessor:
    return VideoLlama3VideoProcessor(size={"shortest_edge": 784, "longest_edge": 7840})


@pytest.fixture(scope="module")
def clip(clips_dir: Path) -> Video:
    return load_video(clips_dir / CLIP)


def array(frames: int = 4) -> np.ndarray:
    return np.stack([np.asarray(tiny.picture(i)) for i in range(frames)])


# ---- where videos come from ----------------------------------------------------------------------


def test_files_and_loaded_videos(
    videos: VideoLlavaVideoProcessor, clips_dir: Path, clip: Video
) -> None:
    expected = videos(clip.frames, return_tensors="pt").pixel_values_videos
    assert expected.shape == (1, len(clip), 3, 28, 28)
    path = clips_dir / CLIP
    for source in (clip, path, str(path), path.as_uri(), [path], [[str(path)]]):
        assert torch.equal(videos(source, return_tensors="pt").pixel_values_videos, expected)
    both = videos([path, clip], return_tensors="pt").pixel_values_videos
    assert torch.equal(both, torch.cat([expected, expected]))


def test_paths_of_frames(videos: VideoLlavaVideoProcessor, tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for i, path in enumerate(paths):
        tiny.picture(i).save(path)
    expected = videos(array(), return_tensors="pt").pixel_values_videos
    assert torch.equal(videos(paths, return_tensors="pt").pixel_values_videos, expected)
    two = videos([paths, list(map(str, paths))], return_tensors="pt").pixel_values_videos
    assert torch.equal(two, torch.cat([expected, expected]))


def test_return_tensors(videos: VideoLlavaVideoProcessor) -> None:
    given = [array(4), array(3)]
    unset = videos(given)["pixel_values_videos"]
    assert [pixels.shape for pixels in unset] == [(4, 3, 28, 28), (3, 3, 28, 28)]
    assert all(isinstance(pixels, np.ndarray) for pixels in unset)
    assert videos(given[0], return_tensors="np")["pixel_values_videos"].shape == (1, 4, 3, 28, 28)
    with pytest.raises(InvalidArgument, match=r"several shapes, .4, .* leave return_tensors out"):
        videos(given, return_tensors="pt")
    with pytest.raises(InvalidArgument, match="pixel_values_videos come out in several shapes"):
        videos([tiny.picture(0), tiny.picture(1, 20, 70)], do_center_crop=False)


# ---- which frames --------------------------------------------------------------------------------


def test_rates_of_a_call_choose(videos: VideoLlavaVideoProcessor, clips_dir: Path) -> None:
    every = videos(array(8))["pixel_values_videos"][0]
    for how in (
        {"num_frames": 3},
        {"fps": 1.5, "video_metadata": {"total_num_frames": 8, "fps": 4}},
    ):
        (chosen,) = videos(array(8), **how)["pixel_values_videos"]
        assert np.array_equal(chosen, every[[0, 2, 5]])
        how["do_sample_frames"] = False
        assert len(videos(array(8), **how)["pixel_values_videos"][0]) == 8
    path = clips_dir / CLIP
    expected = videos(load_video(path, num_frames=3))["pixel_values_videos"][0]
    assert np.array_equal(videos(path, num_frames=3)["pixel_values_videos"][0], expected)
    expected = videos(load_video(path, fps=2))["pixel_values_videos"][0]
    assert np.array_equal(videos(path, fps=2)["pixel_values_videos"][0], expected)


def test_rates_of_a_processor_choose_where_it_samples(clip: Video) -> None:
    made = VideoLlavaVideoProcessor(**SMALL, num_frames=2)
    assert len(made(array(8))["pixel_values_videos"][0]) == 8
    made.do_sample_frames = True
    assert len(made(array(8))["pixel_values_videos"][0]) == 2
    told = {"total_num_frames": 8, "fps": 4}
    assert len(made(array(8), fps=2, video_metadata=told)["pixel_values_videos"][0]) == 4
    # It was chosen when it was loaded.
    assert len(made(clip)["pixel_values_videos"][0]) == len(clip)


def test_videollama3s_rule_for_files(patches: VideoLlama3VideoProcessor, clips_dir: Path) -> None:
    path = clips_dir / CLIP
    for how in ({}, {"fps": 2}, {"max_frames": 3, "min_frames": 2}):
        expected = load_video(path, sampling="videollama3", **how)
        features = patches(path, do_sample_frames=True, **how)
        assert features.video_grid_thw[0][0] == len(expected)
        (metadata,) = features["video_metadata"]
        assert metadata.frames_indices == expected.indices.tolist()
        assert (metadata.fps, metadata.duration) == (expected.fps, expected.duration)
    assert patches(path, num_frames=2).video_grid_thw[0][0] == 2


def test_metadata(videos: VideoLlavaVideoProcessor, clip: Video) -> None:
    (plain,) = videos(array(8), return_metadata=True)["video_metadata"]
    assert plain == VideoMetadata(8, frames_indices=[*range(8)])
    with pytest.raises(InvalidArgument, match="timestamps need fps"):
        _ = plain.timestamps
    told = SimpleNamespace(total_num_frames=8, fps=4.0, duration=2.0, frames_indices=None)
    given = {"num_frames": 2, "video_metadata": [[told], [told]], "return_metadata": True}
    metadata = videos([array(8)] * 2, **given)["video_metadata"]
    assert metadata == [VideoMetadata(8, 4.0, 2.0, [0, 4])] * 2
    assert metadata[0].timestamps == [0.0, 1.0]
    (own,) = videos(clip, return_metadata=True)["video_metadata"]
    assert own.timestamps == pytest.approx(clip.indices / clip.fps)
    assert "video_metadata" not in videos(clip)


EIGHT = {"total_num_frames": 8, "fps": 4.0}
REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "nothing": ([], {}, "no videos were given"),
    "no frames": (array()[:0], {}, "a video without frames"),
    "too many axes": (np.zeros((1, 1, 1, 5, 5, 3)), {}, r"a video of shape \(1, 1, 1, 5, 5, 3\)"),
    "no video": (3, {}, "a int is no video"),
    "both rates": (array(8), {"num_frames": 2, "fps": 1.0}, "num_frames=2 and fps=1.0 exclude"),
    "more than there are": (array(8), {"num_frames": 9}, "9 frames of a video that has 8"),
    "no rate": (array(8), {"fps": 1}, "needs the video's own rate; pass video_metadata"),
    "rates below 0": (array(8), {"fps": -1}, "fps=-1; give a number above 0"),
    "metadata of others": (array(4), {"num_frames": 3, "video_metadata": EIGHT}, "of 4 frames"),
    "metadata of two": (array(8), {"video_metadata": [EIGHT] * 2}, "of 2 videos, 1 were given"),
    "metadata of nothing": (array(8), {"video_metadata": {"fps": 4}}, "with total_num_frames"),
    "metadata of a file": ("clip.mp4", {"video_metadata": EIGHT}, "a file has its own"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_is_refused(videos: VideoLlavaVideoProcessor, name: str) -> None:
    source, words, said = REFUSED[name]
    with pytest.raises(InvalidArgument, match=said):
        videos(source, **words)


def test_files_that_are_refused(
    videos: VideoLlavaVideoProcessor, clip: Video, clips_dir: Path
) -> None:
    with pytest.raises(MediaNotFound, match="there is no such file"):
        videos("missing.mp4")
    with pytest.raises(InvalidArgument, match="a video that is loaded already"):
        videos(clip, num_frames=2)
    with pytest.raises(InvalidArgument, match=r"num_frames=2 and fps=1.0 exclude each other"):
        videos(clips_dir / CLIP, num_frames=2, fps=1.0)


# ---- files of words ------------------------------------------------------------------------------


def write(folder: Path, words: dict[str, Any], name: str = "preprocessor_config.json") -> Path:
    folder.mkdir(exist_ok=True)
    text = json.dumps(words, indent=2).replace("\n", "\r\n")  # as a repository of the hub has it
    (folder / name).write_bytes(text.encode())
    return folder


CLIP_FILE = {
    "crop_size": {"height": 28, "width": 28},
    "size": {"shortest_edge": 28},
    "image_processor_type": "LlavaNextImageProcessor",
    "image_grid_pinpoints": [[28, 56], [56, 28]],
    "do_pad": True,
    "_valid_processor_keys": ["images"],
}


def test_one_file_for_images_and_videos(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write(tmp_path, CLIP_FILE)
    tiles = LlavaNextVideoImageProcessor.from_pretrained(folder)
    assert tiles.core == AnyRes.from_dict(CLIP_FILE)
    frames = LlavaNextVideoVideoProcessor.from_pretrained(str(folder), local_files_only=True)
    assert frames.core == tiles.core.tile == Preprocess.from_dict(CLIP_FILE)
    assert not caplog.records
    # Now there are two.
    LlavaNextVideoVideoProcessor(size=14, crop_size=14).save_pretrained(folder)
    assert LlavaNextVideoVideoProcessor.from_pretrained(folder).core.size == (14, 14)
    assert LlavaNextVideoImageProcessor.from_pretrained(folder).core.side == 28


def test_words_nested_in_the_processors_file(tmp_path: Path) -> None:
    nested = {"image_processor": {"size": 14, "crop_size": 14}, "video_processor": {"size": 42}}
    write(write(tmp_path, CLIP_FILE), nested, "processor_config.json")
    assert VideoLlavaImageProcessor.from_pretrained(tmp_path).size == {"shortest_edge": 14}
    assert VideoLlavaVideoProcessor.from_pretrained(tmp_path).size == {"shortest_edge": 42}


def test_keywords_replace_the_words_of_a_file(tmp_path: Path) -> None:
    made = VideoLlavaImageProcessor.from_pretrained(
        write(tmp_path, {}), size=14, token=None, use_fast=True, trust_remote_code=True
    )
    assert made.words == VideoLlavaImageProcessor(size=14).words
    with pytest.raises(TypeError, match="'sise'; did you mean 'size'"):
        VideoLlavaImageProcessor.from_pretrained(tmp_path, sise=14)


def test_null_and_unknown_words_of_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = {"do_resize": None, "crop_size": None, "size": None, "new_word": None}
    made = VideoLlavaImageProcessor.from_pretrained(write(tmp_path, words))
    assert made.words == VideoLlavaImageProcessor(do_resize=False).words
    assert not caplog.records
    write(tmp_path, {"new_word": 1, "pad_size": {"height": 2}, "size_divisor": False})
    made = VideoLlavaImageProcessor.from_pretrained(tmp_path)
    assert made.words == VideoLlavaImageProcessor().words
    assert "new_word, pad_size: without meaning to VideoLlavaImageProcessor" in caplog.text


@pytest.mark.parametrize("made", [VideoLlavaImageProcessor, VideoLlama3VideoProcessor])
def test_no_file(made: type[ImageProcessor | VideoProcessor], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"has no .*preprocessor_config.json.*{made.__name__}"):
        made.from_pretrained(tmp_path)


def test_budgets_of_videollama3(tmp_path: Path) -> None:
    hf = {"image_processor_type": "VideoLlama3ImageProcessor", "merge_size": 1, "patch_size": 14}
    hf = write(tmp_path / "hf", hf)
    native = {"image_processor_type": "Videollama3ImageProcessor", "image_mean": [0.5] * 3}
    native |= {"image_std": [0.5] * 3, "min_tokens": 16, "max_tokens": 16384}
    for folder in (hf, write(tmp_path / "native", native)):
        images = VideoLlama3ImageProcessor.from_pretrained(folder)
        frames = VideoLlama3VideoProcessor.from_pretrained(folder)
        assert images.core == Patchify.from_dict({}, video=False)
        assert frames.core == Patchify.from_dict({}, video=True)
        assert tuple(images.size.values()) == IMAGE_BUDGET
        assert tuple(frames.size.values()) == VIDEO_BUDGET
    write(hf, {"max_pixels": 30000, "fps": 2, "max_frames": 9}, "video_preprocessor_config.json")
    frames = VideoLlama3VideoProcessor.from_pretrained(hf)
    assert frames.size == {"shortest_edge": VIDEO_BUDGET[0], "longest_edge": 30000}
    assert (frames.fps, frames.max_frames, frames.core.max_pixels) == (2, 9, 30000)
    # Without a file the class's own, which is transformers'.
    assert VideoLlama3VideoProcessor().core.max_pixels == 28 * 28 * 768


def test_a_budget_can_be_said_in_pixels() -> None:
    made = VideoLlama3ImageProcessor(min_pixels=784, max_pixels=1568)
    assert made.size == {"shortest_edge": 784, "longest_edge": 1568}
    wide = {"shortest_edge": 1568, "longest_edge": 15680}
    for how in ({"max_pixels": 15680, "min_pixels": 1568}, {"size": wide}):
        grids = made(tiny.picture(0, 200, 100), **how)["image_grid_thw"]
        assert (
            grids.tolist()
            == VideoLlama3ImageProcessor(size=wide)(tiny.picture(0, 200, 100))[
                "image_grid_thw"
            ].tolist()
        )
