"""Image processors: forms of input and output, words of these and of videos', what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from vidlm.errors import InvalidArgument, UnsupportedModel
from vidlm.hf.image_processing import (
    ImageProcessor,
    LlavaNextVideoImageProcessor,
    VideoLlama3ImageProcessor,
    VideoLlama3ImageProcessorFast,
    VideoLlavaImageProcessor,
)
from vidlm.hf.video_processing import (
    LlavaNextVideoVideoProcessor,
    VideoLlama3VideoProcessor,
    VideoLlavaVideoProcessor,
    VideoProcessor,
)
from vidlm.hf.words import PixelProcessor

SMALL: dict[str, Any] = {"size": 28, "crop_size": 28}
POINTS = [[28, 56], [56, 28], [56, 56]]
IMAGES: tuple[type[ImageProcessor], ...] = (
    VideoLlavaImageProcessor,
    LlavaNextVideoImageProcessor,
    VideoLlama3ImageProcessor,
)
VIDEOS: tuple[type[VideoProcessor], ...] = (
    VideoLlavaVideoProcessor,
    LlavaNextVideoVideoProcessor,
    VideoLlama3VideoProcessor,
)
every_class = pytest.mark.parametrize("made", [*IMAGES, *VIDEOS])


@pytest.fixture
def images() -> VideoLlavaImageProcessor:
    return VideoLlavaImageProcessor(**SMALL)


@pytest.fixture
def videos() -> VideoLlavaVideoProcessor:
    return VideoLlavaVideoProcessor(**SMALL)


def array(frames: int = 4) -> np.ndarray:
    return np.stack([np.asarray(tiny.picture(i)) for i in range(frames)])


# ---- forms of output -----------------------------------------------------------------------------


def test_return_tensors(images: VideoLlavaImageProcessor) -> None:
    pictures = tiny.pictures(2)
    pt = images(pictures, return_tensors="pt").pixel_values_images
    arrays = images(pictures, return_tensors="np")["pixel_values_images"]
    unset = images(pictures)["pixel_values_images"]
    assert isinstance(arrays, np.ndarray)
    assert isinstance(unset, list)
    assert all(isinstance(item, np.ndarray) for item in unset)
    assert pt.shape == arrays.shape == (2, 3, 28, 28)
    assert np.array_equal(pt, arrays)
    assert np.array_equal(np.stack(unset), arrays)


def test_return_tensors_of_rows() -> None:
    processor = VideoLlama3ImageProcessor(size={"shortest_edge": 784, "longest_edge": 1568})
    pt, np_ = (processor(tiny.pictures(2), return_tensors=how) for how in ("pt", "np"))
    unset = processor(tiny.pictures(2))
    for name in processor.model_input_names:
        assert isinstance(unset[name], np.ndarray)
        assert np.array_equal(unset[name], np_[name])
        assert np.array_equal(pt[name], np_[name])


def test_layouts_of_output(images: VideoLlavaImageProcessor) -> None:
    last, first = array()[0], array()[0].transpose(2, 0, 1)
    (expected,) = images(last)["pixel_values_images"]

    def shape(image: Any, **how: Any) -> tuple[int, ...]:
        (pixels,) = images(image, **how)["pixel_values_images"]
        axis = pixels.shape.index(3)
        assert np.array_equal(np.moveaxis(pixels, axis, 0), expected)
        return pixels.shape

    assert shape(first) == shape(last) == (3, 28, 28)
    assert shape(first, data_format="channels_last") == (28, 28, 3)
    assert shape(first, data_format=None) == (3, 28, 28)
    assert shape(last, data_format=None) == (28, 28, 3)
    assert shape(tiny.picture(0), data_format=None) == (28, 28, 3)


def test_layouts_of_tiles_and_frames(videos: VideoLlavaVideoProcessor) -> None:
    how = {"data_format": "channels_last", "return_tensors": "pt"}
    tiled = LlavaNextVideoImageProcessor(**SMALL, image_grid_pinpoints=POINTS)
    tiles = tiled(tiny.picture(1), return_tensors="pt").pixel_values
    moved = tiled(tiny.picture(1), **how).pixel_values
    assert torch.equal(moved.permute(0, 1, 4, 2, 3), tiles)
    frames = videos(array(), return_tensors="pt").pixel_values_videos
    assert torch.equal(videos(array(), **how).pixel_values_videos.permute(0, 1, 4, 2, 3), frames)


def test_tiles_that_are_not_filled_up() -> None:
    made = LlavaNextVideoImageProcessor(**SMALL, image_grid_pinpoints=POINTS)
    pictures = [tiny.picture(0, 30, 70), tiny.picture(1, 60, 60)]
    filled = made(pictures)["pixel_values"]
    apart = made(pictures, do_pad=False)["pixel_values"]
    assert [len(tiles) for tiles in filled] == [5, 5]
    assert [len(tiles) for tiles in apart] == [3, 5]
    assert not filled[0][3:].any()
    assert np.array_equal(filled[0][:3], apart[0])


def test_grey_images(images: VideoLlavaImageProcessor, videos: VideoLlavaVideoProcessor) -> None:
    grey = np.asarray(tiny.picture(0, mode="L"))
    (expected,) = images(grey[None])["pixel_values_images"]
    for given in (grey, [grey], grey[None], np.stack([grey] * 2)):
        how = {"input_data_format": "none"} if given is not grey else {}
        for pixels in images(given, **how)["pixel_values_images"]:
            assert np.array_equal(pixels, expected)
    (expected,) = videos([tiny.picture(0, mode="L")] * 3)["pixel_values_videos"]
    for given, how in (
        (np.stack([grey] * 3), {"input_data_format": "none"}),
        ([grey] * 3, {"input_data_format": "none"}),
        ([grey] * 3, {}),
    ):
        (clip,) = videos(given, **how)["pixel_values_videos"]
        assert np.array_equal(clip, expected)


def test_paths_of_images(images: VideoLlavaImageProcessor, tmp_path: Path) -> None:
    tiny.picture(0).save(tmp_path / "a.png")
    (expected,) = images(tiny.picture(0))["pixel_values_images"]
    for source in (tmp_path / "a.png", str(tmp_path / "a.png")):
        assert np.array_equal(images([source])["pixel_values_images"][0], expected)


def test_one_call_changes_nothing_for_the_next(images: VideoLlavaImageProcessor) -> None:
    before = images.words
    images(tiny.picture(0), size=14, crop_size=14, data_format=None, image_mean=0.0)
    assert images.words == before
    images.size = {"shortest_edge": 56}  # as users of transformers do
    assert images.core.resize == 56


def test_floats_that_are_rescaled_twice(
    images: VideoLlavaImageProcessor, caplog: pytest.LogCaptureFixture
) -> None:
    floats = array()[0] / np.float32(255)
    images(floats, do_rescale=False)
    images(array()[0].astype(np.float32))
    images(np.zeros_like(floats))  # black, either way
    assert not caplog.records
    images(floats)
    assert "pass do_rescale=False" in caplog.text


# ---- words ---------------------------------------------------------------------------------------


@every_class
def test_an_unknown_word(made: type[PixelProcessor]) -> None:
    with pytest.raises(
        TypeError, match=f"{made.__name__} got .*'image_men'; did you .*'image_mean'"
    ):
        made(image_men=0.5)
    with pytest.raises(TypeError, match="'rescale_fctor'; did you mean 'rescale_factor'"):
        made()(array(1), rescale_fctor=1)


@every_class
def test_words_that_change_nothing(made: type[PixelProcessor]) -> None:
    legacy = {
        **dict.fromkeys(("crop_size", "pad_size", "size_divisor", "image_seq_length", "size")),
        **dict.fromkeys(("data_format", "input_data_format", "return_tensors", "device")),
        **{"_valid_processor_keys": ["images"], "processor_class": "Any", "do_pad": True},
        **{"image_processor_type": "Any", "feature_extractor_type": "Any"},
        **{"disable_grouping": True, "default_to_square": False},
    }
    assert made(**legacy).words == made().words


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "switch": ({"do_resize": "yes"}, "do_resize='yes'; give True or False"),
    "size": ({"size": {"height": -1, "width": 2}}, "size={.*; give a number above 0, or"),
    "half a pixel": ({"size": {"shortest_edge": 28.5}}, "size={.*; give a number above 0, or"),
    "no size": ({"size": {}}, "size={}; give"),
    "words for a size": ({"size": "large"}, "size='large'; give"),
    "mean": ({"image_mean": [0.5, 0.5]}, "three for R, G and B"),
    "factor": ({"rescale_factor": 0}, "rescale_factor=0; give a number above 0"),
    "layout": ({"data_format": "HWC"}, "data_format='HWC'; allowed: .*'channels_last'"),
    "framework": ({"return_tensors": "tf"}, "return_tensors='tf'; allowed: .*'np'"),
    "padding": ({"pad_size": {"height": 9, "width": 9}}, "pad_size=.* means nothing to"),
}


@every_class
@pytest.mark.parametrize("name", list(WRONG))
def test_words_that_cannot_be_meant(made: type[PixelProcessor], name: str) -> None:
    words, said = WRONG[name]
    with pytest.raises(InvalidArgument, match=said):
        made(**words)


def test_words_that_cannot_be_done(images: VideoLlavaImageProcessor) -> None:
    with pytest.raises(UnsupportedModel, match="resample=1; supported"):
        images(tiny.picture(0), resample=1)
    with pytest.raises(UnsupportedModel, match=r"longest_edge.*supported: height and width"):
        images(tiny.picture(0), size={"shortest_edge": 28, "longest_edge": 56})
    with pytest.raises(InvalidArgument, match=r"size={'shortest_edge': 784}; give the least and"):
        VideoLlama3ImageProcessor(size={"shortest_edge": 784})
    with pytest.raises(InvalidArgument, match="patches have their channels first"):
        VideoLlama3ImageProcessor(data_format="channels_last")
    with pytest.raises(InvalidArgument, match="do_center_crop=True means nothing"):
        VideoLlama3VideoProcessor(do_center_crop=True)
    with pytest.raises(InvalidArgument, match="pass them to VideoLlama3VideoProcessor"):
        VideoLlama3ImageProcessor().preprocess(tiny.picture(0), videos=[array()])


@every_class
def test_words_are_plain_and_ones_own(made: type[PixelProcessor]) -> None:
    edges = {"shortest_edge": np.int64(784), "longest_edge": np.int64(1568)}
    processor = made(size=edges, image_mean=np.full(3, 0.5))
    written = processor.to_dict()
    assert json.loads(json.dumps(written)) == written
    before = processor.words
    written["size"].clear()
    made().size.clear()
    assert processor.words == before
    assert made().size


@every_class
def test_a_processor_of_a_core(made: type[ImageProcessor | VideoProcessor]) -> None:
    size = {"shortest_edge": 784, "longest_edge": 1568} if "Llama3" in made.__name__ else 28
    core = made(size=size, image_mean=0.25, resample=2, do_rescale=False).core
    assert made(**core.to_dict()).core == core
    assert core != made().core


def test_names() -> None:
    assert VideoLlama3ImageProcessorFast is VideoLlama3ImageProcessor
    assert repr(VideoLlavaImageProcessor()).startswith("VideoLlavaImageProcessor {\n")


# ---- images that are refused ---------------------------------------------------------------------

REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "nothing": ([], {}, "no images were given"),
    "None": (None, {}, "a NoneType is no image"),
    "shape": (np.zeros((2, 5, 5), np.uint8), {}, r"shape \(2, 5, 5\) has neither first nor last"),
    "five axes": (np.zeros((1, 1, 5, 5, 3), np.uint8), {}, "allowed: .C, H, W"),
    "ints": (np.zeros((5, 5, 3), np.int64), {}, "dtype int64; give .*uint8"),
    "empty": (np.zeros((0, 5, 3), np.uint8), {}, r"shape \(0, 5, 3\).* at least one pixel"),
    "mode": (tiny.picture(0, mode="L"), {"do_convert_rgb": False}, "mode 'L' with do_convert_rgb"),
    "channels": (np.zeros((5, 5, 1), np.uint8), {"do_convert_rgb": False}, "has 1 channels"),
    "layout": (
        np.zeros((5, 5, 3), np.uint8),
        {"input_data_format": "channels_first"},
        "5 channels",
    ),
    "RGBA": (np.full((5, 5, 4), 9.0), {}, "RGBA pixels that are floats must be from 0 to 1"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_images_that_are_refused(images: VideoLlavaImageProcessor, name: str) -> None:
    image, words, said = REFUSED[name]
    with pytest.raises(InvalidArgument, match=said):
        images(image, **words)


def test_several_sizes_are_no_tensor(images: VideoLlavaImageProcessor) -> None:
    pictures = tiny.pictures(2)
    apart = images(pictures, do_center_crop=False)["pixel_values_images"]
    assert apart[0].shape != apart[1].shape
    with pytest.raises(
        InvalidArgument, match=r"several shapes, .3, 28, .* leave return_tensors out"
    ):
        images(pictures, do_center_crop=False, return_tensors="pt")


def test_resize(images: VideoLlavaImageProcessor) -> None:
    grey = np.asarray(tiny.picture(0, 40, 60, "L"))
    assert images.resize(grey, {"shortest_edge": 20}).shape == (20, 30)
    half = images.resize(grey.astype(np.float16), {"height": 9, "width": 7})
    assert (half.shape, half.dtype) == ((9, 7), np.float16)
    with pytest.raises(InvalidArgument, match=r"size={'longest_edge': 9}; give shortest_edge"):
        images.resize(grey, {"longest_edge": 9})
    with pytest.raises(UnsupportedModel, match="resample=1; supported"):
        images.resize(grey, {"shortest_edge": 9}, resample=1)
    with pytest.raises(InvalidArgument, match="a list; give an array"):
        images.resize([grey], {"shortest_edge": 9})  # type: ignore[arg-type]
