"""Image processors against transformers: every word of each, every kind of image.

transformers has the image processor of Video-LLaVA with Pillow alone, and so has vidlm; the others
are compared with its torchvision backend, which is what it takes where torchvision is installed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from oracle import transformers
from vidlm.errors import InvalidArgument
from vidlm.hf.image_processing import (
    ImageProcessor,
    LlavaNextVideoImageProcessor,
    VideoLlama3ImageProcessor,
    VideoLlavaImageProcessor,
)

NEXT_POINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]


@dataclass(frozen=True)
class Pair:
    """A processor of ours and the one of transformers, with words that keep images small."""

    ours: type[ImageProcessor]
    theirs: Callable[..., Any]
    words: dict[str, Any]

    def assert_equal(self, images: Any, tolerance: float = 0, **words: Any) -> None:
        """In both ways of saying the words: when it is made, and for one call."""
        words = {**self.words, **words}
        theirs = dict(self.theirs(**words)(images, return_tensors="pt"))
        self.compare(self.ours(**words)(images, return_tensors="pt"), theirs, tolerance)
        self.compare(
            self.ours().preprocess(images, return_tensors="pt", **words), theirs, tolerance
        )

    def compare(self, ours: Any, theirs: dict[str, Any], tolerance: float) -> None:
        assert tuple(ours) == self.ours.model_input_names
        assert len(ours) == len(theirs)
        for mine, other in zip(ours.values(), theirs.values(), strict=True):
            assert mine.shape == other.shape
            assert torch.allclose(mine, other.to(mine.dtype), rtol=tolerance, atol=0)


def their_video_llava(**words: Any) -> Any:
    """Theirs takes the layout of its input in a call only."""
    how = {key: words.pop(key) for key in ("input_data_format",) if key in words}
    made = transformers.VideoLlavaImageProcessor(**words)
    return partial(made, **how) if how else made


SMALL = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
PAIRS = {
    "video llava": Pair(VideoLlavaImageProcessor, their_video_llava, SMALL),
    "next": Pair(
        LlavaNextVideoImageProcessor,
        transformers.LlavaNextImageProcessor,
        {**SMALL, "image_grid_pinpoints": NEXT_POINTS},
    ),
    "videollama3": Pair(
        VideoLlama3ImageProcessor,
        transformers.VideoLlama3ImageProcessor,
        {"size": {"shortest_edge": 784, "longest_edge": 7840}},
    ),
}
pairs = pytest.mark.parametrize("pair", list(PAIRS.values()), ids=list(PAIRS))


def odd() -> list[Image.Image]:
    return [tiny.picture(1, 37, 61), tiny.picture(2, 90, 33, "RGBA"), tiny.picture(3, 51, 51, "L")]


# ---- every word ----------------------------------------------------------------------------------

SHARED: dict[str, dict[str, Any]] = {
    "as they are": {},
    "resample": {"resample": 2},
    "resample of PIL": {"resample": Image.Resampling.NEAREST},
    "do_rescale": {"do_rescale": False},
    "rescale_factor": {"rescale_factor": 1 / 127.5},
    "do_normalize": {"do_normalize": False},
    "image_mean": {"image_mean": [0.1, 0.2, 0.3]},
    "image_std": {"image_std": (0.5, 0.25, 1.0)},
    "image_mean, one": {"image_mean": 0.5, "image_std": 0.25},
    "disable_grouping": {"disable_grouping": True},
    "device": {"device": "cpu"},
}
CLIP_ONLY: dict[str, dict[str, Any]] = {
    "size, a number": {"size": 40},
    "size, a pair": {"size": [28, 42]},
    "crop_size, a number": {"crop_size": 42},
}
CROP_ONLY: dict[str, dict[str, Any]] = {
    "do_resize": {"do_resize": False},
    "size, oblong, and do_center_crop": {
        "size": {"height": 21, "width": 35},
        "do_center_crop": False,
    },
    "crop_size, oblong": {"crop_size": {"height": 21, "width": 35}},
}
PATCH_ONLY: dict[str, dict[str, Any]] = {
    "size": {"size": {"shortest_edge": 7840, "longest_edge": 15680}},
    "min_pixels": {"min_pixels": 5000},
    "max_pixels": {"max_pixels": 1600},
    "patch_size": {"patch_size": 7},
    "merge_size": {"merge_size": 2},
}
NEXT_ONLY: dict[str, dict[str, Any]] = {
    "size, a square": {"size": 28, "default_to_square": True},
}
WORDS = [
    *((name, word) for name in PAIRS for word in SHARED.items()),
    *((name, word) for name in ("video llava", "next") for word in CLIP_ONLY.items()),
    *(("next", word) for word in NEXT_ONLY.items()),
    *(("video llava", word) for word in CROP_ONLY.items()),
    *(("videollama3", word) for word in PATCH_ONLY.items()),
]


@pytest.mark.parametrize(("name", "word"), WORDS, ids=[f"{n}-{w[0]}" for n, w in WORDS])
def test_every_word(name: str, word: tuple[str, dict[str, Any]]) -> None:
    # Without one of the two factors the reference multiplies where we divide: the last bit differs.
    tolerance = 1e-6 if word[0] == "do_normalize" else 0
    PAIRS[name].assert_equal(odd(), tolerance, **word[1])


def test_no_resizing_of_patches() -> None:
    PAIRS["videollama3"].assert_equal([tiny.picture(1, 28, 42)], do_resize=False)


@pairs
def test_no_conversion(pair: Pair) -> None:
    pair.assert_equal([tiny.picture(1, 37, 61)], do_convert_rgb=False)


@pairs
def test_class_defaults(pair: Pair) -> None:
    ours, theirs = pair.ours(), pair.theirs()
    for name in pair.ours.defaults:
        mine, other = getattr(ours, name), getattr(theirs, name, None)
        other = dict(other) if name in ("size", "crop_size") else other
        other = list(other) if isinstance(mine, list) else other
        if name == "data_format":  # what theirs have anyway
            assert (mine, other) in (("channels_first", None), ("channels_first", "channels_first"))
        # The one means something where a size is given, the others are in it.
        elif name not in ("default_to_square", "min_pixels", "max_pixels"):
            assert mine == other, name


# ---- every kind of image -------------------------------------------------------------------------


def kinds() -> dict[str, Any]:
    rgb, rgba = np.asarray(tiny.picture(1, 37, 61)), np.asarray(tiny.picture(2, 37, 61, "RGBA"))
    floats = rgb.astype(np.float32) / 255
    return {
        "one image": tiny.picture(1, 37, 61),
        "palette": tiny.picture(1, 37, 61, "P"),
        "grey with alpha": tiny.picture(1, 37, 61, "LA"),
        "array": rgb,
        "read-only list": [rgb, rgb[::-1]],
        "channels first": rgb.transpose(2, 0, 1),
        "one channel first": rgb[None, ..., 0],
        "one channel last": rgb[..., :1],
        "rgba": rgba,
        "rgba, first": rgba.transpose(2, 0, 1),
        "rgba, floats": rgba.astype(np.float32) / 255,
        "a batch": np.stack([rgb, rgb[:, ::-1]]),
        "a batch, first": np.stack([rgb, rgb[:, ::-1]]).transpose(0, 3, 1, 2),
        "batches": [np.stack([rgb, rgb[:, ::-1]]), np.stack([rgb])],
        "tensor": torch.tensor(rgb),
        "tensor, first": torch.tensor(rgb).permute(2, 0, 1),
        "floats": floats,
        "doubles": floats.astype(np.float64),
        "float tensor": torch.from_numpy(floats).permute(2, 0, 1),
        "nested": [[tiny.picture(1)], [tiny.picture(2), tiny.picture(3)]],
        "three pixels wide": rgb[:, :3],
        "three pixels high": rgb[:3],
    }


@pairs
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")  # in transformers
@pytest.mark.parametrize("kind", list(kinds()))
def test_every_kind_of_image(pair: Pair, kind: str) -> None:
    images = kinds()[kind]
    if kind == "read-only list":  # torch has no negative strides, and the oracle does not help it
        theirs = pair.theirs(**pair.words)([images[0], images[1].copy()], return_tensors="pt")
        pair.compare(pair.ours(**pair.words)(images, return_tensors="pt"), dict(theirs), 0)
        return
    floats = "float" in kind or kind == "doubles"
    if pair.theirs is their_video_llava and ("channel " in kind or "rgba" in kind):
        with pytest.raises(ValueError, match=r"channel dimension|mean must have"):
            pair.theirs(**pair.words)(images)
        shape = pair.ours(**pair.words)(images, return_tensors="pt")["pixel_values_images"].shape
        assert shape == (1, 3, 28, 28)
        return
    pair.assert_equal(images, do_rescale=not floats)


@pairs
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_where_the_channels_are_can_be_said(pair: Pair, layout: str) -> None:
    images = np.asarray(tiny.picture(1, 3, 61)).copy()  # (3, 61, 3)
    if layout == "channels_first":
        images = images.transpose(2, 0, 1)[:, :, :3]  # (3, 3, 3)
    pair.assert_equal([images], input_data_format=layout)


# ---- Video-LLaVA's own class, with PIL -----------------------------------------------------------


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_video_llavas_own_class(layout: str) -> None:
    images = [tiny.picture(1, 300, 401), np.asarray(tiny.picture(2, 260, 233))]
    theirs = transformers.VideoLlavaImageProcessor()(
        images, return_tensors="np", data_format=layout
    )
    ours = VideoLlavaImageProcessor()(images, return_tensors="np", data_format=layout)
    assert list(ours) == list(theirs) == ["pixel_values_images"]
    mine, other = ours["pixel_values_images"], theirs["pixel_values_images"]
    assert isinstance(mine, np.ndarray)
    assert (mine.shape, mine.dtype) == (other.shape, other.dtype)
    assert np.array_equal(mine, other)


SIZES = [{"shortest_edge": 20}, {"height": 31, "width": 17}]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", [(41, 67, 3), (3, 67, 41), (1, 40, 60), (50, 50, 1)])
@pytest.mark.parametrize("out", [None, "channels_first", "channels_last"])
def test_resize(size: dict[str, int], shape: tuple[int, ...], out: str | None) -> None:
    image = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    how = {"size": size, "data_format": out}
    theirs = transformers.VideoLlavaImageProcessor().resize(image, **how)
    ours = VideoLlavaImageProcessor().resize(image, **how)
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    assert np.array_equal(ours, theirs)


def test_resize_of_floats() -> None:
    y, x = np.mgrid[:41, :67]
    image = np.stack([0.5 + 0.4 * np.sin(x / 9 + c) * np.cos(y / 7) for c in range(3)], -1)
    how: dict[str, Any] = {"size": {"shortest_edge": 20}, "resample": 2}
    how["input_data_format"] = "channels_last"
    theirs = transformers.VideoLlavaImageProcessor().resize(image, **how)
    ours = VideoLlavaImageProcessor().resize(image, **how)
    assert (ours.shape, ours.dtype) == (theirs.shape, image.dtype)
    assert np.array_equal(ours.astype(theirs.dtype), theirs)
    with pytest.raises(InvalidArgument, match=r"floats from 1\.0\d* to 1\."):
        VideoLlavaImageProcessor().resize(image + 0.9, **how)


# ---- files ---------------------------------------------------------------------------------------


@pairs
@pytest.mark.parametrize("word", list(SHARED))
def test_what_is_saved_is_read_by_both(pair: Pair, word: str, tmp_path: Path) -> None:
    ours = pair.ours(**pair.words, **SHARED[word])
    ours.save_pretrained(tmp_path)
    again = pair.ours.from_pretrained(tmp_path)
    assert again.core == ours.core
    written = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert getattr(transformers, written["image_processor_type"])(**written).size == ours.size
    theirs = pair.theirs(**written)(odd(), return_tensors="pt")
    pair.compare(ours(odd(), return_tensors="pt"), dict(theirs), 1e-6)


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
    path = shared / "data" / "hub_like" / folder
    pair = PAIRS[PUBLISHED[folder]]
    words = json.loads((path / "preprocessor_config.json").read_text())
    ours, theirs = pair.ours.from_pretrained(path), pair.theirs(**words)
    image = tiny.picture(1, 480, 641)
    pair.compare(ours(image, return_tensors="pt"), dict(theirs(image, return_tensors="pt")), 0)
    assert ours.size == words["size"]
