"""The pixels of VideoLLaMA3 against transformers, bit for bit; the native rule by its figures.

Expected sizes of the native rule come from the processor that DAMO-NLP-SG publishes, read and
worked out for these cases: it does not run with the transformers of today.
"""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

import tiny
import torchvision_on_cpu  # noqa: F401  (before transformers, which imports torchvision)
from oracle import transformers
from vidlm.errors import InvalidArgument, UnsupportedModel
from vidlm.vision.patches import Grid, Patchify, Size, kept_tokens, sizes_of_call, smart_size
from vidlm.vision.preprocess import CLIP_MEAN, CLIP_STD

IMAGES = {"size": {"shortest_edge": 3136, "longest_edge": 3211264}}
VIDEOS = {"size": {"shortest_edge": 12544, "longest_edge": 12845056}}
NATIVE = {"min_tokens": 16, "max_tokens": 16384, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
# Budgets that small frames meet from both sides.
SMALL_IMAGES = {"size": {"shortest_edge": 2000, "longest_edge": 9000}}
SMALL_VIDEOS = {"size": {"shortest_edge": 2400, "longest_edge": 30000}}


def frames(count: int, height: int, width: int, seed: int = 0) -> list[np.ndarray]:
    return [np.array(tiny.picture(seed + i, height, width)) for i in range(count)]


@dataclass(frozen=True)
class Pair:
    """One file of words, read by both."""

    ours: Patchify
    theirs: Any

    @classmethod
    def read(cls, words: dict[str, Any], video: bool) -> Pair:
        kind = "VideoLlama3VideoProcessor" if video else "VideoLlama3ImageProcessor"
        # A copy: transformers writes min_pixels and max_pixels into the mapping it is given.
        return cls(Patchify.from_dict(words, video), getattr(transformers, kind)(**deepcopy(words)))

    def other(self, medium: Any) -> tuple[Tensor, Grid, Tensor]:
        """Rows, grid, and which tokens are kept. Frames are (H, W, 3), but for PIL images: left to
        itself, transformers takes a height of 1 or 3 for channels."""
        arrays = isinstance(medium[0], np.ndarray)
        how = {"input_data_format": "channels_last"} if arrays else {}
        if not self.ours.share:
            out = self.theirs(medium, return_tensors="pt", **how)
            rows, grids = out["pixel_values"], out["image_grid_thw"]
            kept = torch.ones(len(rows) // self.ours.merge_size**2, dtype=torch.bool)
        else:
            out = self.theirs(np.stack(medium), return_tensors="pt", **how)
            rows, grids = out["pixel_values_videos"], out["video_grid_thw"]
            kept = out["video_compression_mask"]
        assert len(grids) == 1
        return rows, tuple(grids[0].tolist()), kept

    def assert_equal(self, medium: Any, tolerance: float = 0) -> None:
        rows, grid, kept = self.other(medium)
        ours, our_grid = self.ours(medium)
        assert our_grid == grid
        assert ours.dtype == torch.float32
        assert torch.allclose(ours, rows.float(), rtol=tolerance, atol=0)
        assert torch.equal(self.ours.kept(ours, grid), kept)


# ---- how large a frame becomes -----------------------------------------------------------------

near_a_half = st.builds(lambda n, d: max(1, 7 * n + d), st.integers(1, 200), st.integers(-1, 1))
sides = st.one_of(st.integers(1, 60), st.integers(1, 4000), near_a_half)
budgets = st.one_of(st.sampled_from([784, 3136, 12544, 3211264]), st.integers(1, 10**6))


@settings(max_examples=1000)
@given(sides, sides, st.sampled_from([14, 28, 16, 1]), budgets, budgets)
def test_every_size(height: int, width: int, factor: int, low: int, high: int) -> None:
    smart_resize = transformers.models.video_llama_3.video_processing_video_llama_3.smart_resize
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(ValueError, match="aspect ratio"):
            smart_resize(height, width, factor, low, high)
        with pytest.raises(InvalidArgument, match="200 times"):
            smart_size(height, width, factor, low, high)
        return
    expected = smart_resize(height, width, factor, low, high)
    assert smart_size(height, width, factor, low, high) == expected


@settings(max_examples=300)
@given(height=st.integers(20, 2500), width=st.integers(20, 2500), count=st.integers(1, 300))
def test_every_number_of_tokens(height: int, width: int, count: int) -> None:
    image, video = Pair.read(IMAGES, False), Pair.read(VIDEOS, True)
    expected = image.theirs.get_number_of_image_patches(height, width)
    assert image.ours.tokens(1, height, width) == expected
    expected = video.theirs.get_num_of_video_patches(count, height, width, {}) // 4
    assert video.ours.tokens(count, height, width) == expected


def test_a_published_image() -> None:
    image = Patchify.from_dict({}, video=False)
    size = image.size(1, 1080, 1920)
    assert size == (1078, 1918)
    assert image.grid(1, size) == (1, 77, 137)
    assert image.tokens(1, 1080, 1920) == 10549


@pytest.mark.parametrize(
    ("shape", "size", "tokens"),
    [
        ((16, 720, 1280), (672, 1176), 1008),
        ((64, 720, 1280), (336, 588), 252),
        ((128, 1080, 1920), (224, 420), 120),
        ((180, 1080, 1920), (196, 336), 84),
    ],
)
def test_published_videos(shape: tuple[int, int, int], size: Size, tokens: int) -> None:
    video = Patchify.from_dict({}, video=True)
    assert video.size(*shape) == size
    assert video.tokens(*shape) == tokens * shape[0]


@pytest.mark.parametrize("shape", [(0, 10), (10, 0), (1, 201), (201, 1)])
def test_a_shape_without_a_size(shape: tuple[int, int]) -> None:
    with pytest.raises(InvalidArgument, match=f"{shape[1]} x {shape[0]} pixels"):
        smart_size(*shape, 14, 3136, 3211264)


def test_more_frames_than_pixels() -> None:
    video = Patchify.from_dict({"size": {"shortest_edge": 1, "longest_edge": 9}}, video=True)
    assert video.size(9, 5, 5) == (28, 28)
    with pytest.raises(InvalidArgument, match="10 frames share 9 pixels"):
        video.size(10, 5, 5)


# ---- pixels ------------------------------------------------------------------------------------

IMAGE, VIDEO = Pair.read(SMALL_IMAGES, False), Pair.read(SMALL_VIDEOS, True)
shapes = st.tuples(st.integers(1, 150), st.integers(1, 150), st.integers(0, 9999)).filter(
    lambda shape: max(shape[:2]) <= 40 * min(shape[:2])
)


@settings(max_examples=200)
@given(shape=shapes)
def test_images_of_every_size(shape: tuple[int, int, int]) -> None:
    IMAGE.assert_equal(frames(1, *shape))


@settings(max_examples=200)
@given(shape=shapes, count=st.integers(1, 6))
def test_videos_of_every_size(shape: tuple[int, int, int], count: int) -> None:
    VIDEO.assert_equal(frames(count, *shape))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P"])
def test_pil_images_of_every_mode(mode: str) -> None:
    IMAGE.assert_equal([tiny.picture(3, 50, 71, mode)])


SWITCHES: dict[str, dict[str, Any]] = {
    "bilinear": {"resample": 2},
    "nearest": {"resample": 0},
    "no resize": {"do_resize": False},
    "no normalise": {"do_normalize": False},
    "no rescale": {"do_rescale": False},
    "its own factor": {"rescale_factor": 1 / 127.5},
    "its own mean": {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.1]},
    "one mean for all": {"image_mean": 0.4, "image_std": 0.2},
    "patches of 7": {"patch_size": 7},
    "blocks of 3": {"merge_size": 3},
    "blocks of 1": {"merge_size": 1},
    "outranked": {"min_pixels": 4000, "max_pixels": 20000},
    "half outranked": {"max_pixels": 5000},
    "nulls": {"min_pixels": None, "max_pixels": None, "do_convert_rgb": None},
    "switches of null": {"do_resize": None, "use_token_compression": None},
    "all tokens": {"use_token_compression": False},
}
kinds = pytest.mark.parametrize("video", [False, True], ids=["image", "video"])


def switched(name: str, video: bool) -> dict[str, Any]:
    words = {**(SMALL_VIDEOS if video else SMALL_IMAGES), **SWITCHES[name]}
    return words if video else {k: v for k, v in words.items() if k != "use_token_compression"}


@kinds
@pytest.mark.parametrize("name", list(SWITCHES))
def test_switches(name: str, video: bool) -> None:
    # Without mean and std the reference multiplies where we divide: the last bit differs.
    tolerance = 1e-6 if name == "no normalise" else 0
    still = frames(1, 84, 56)
    medium = [*still, *still, *frames(1, 84, 56, seed=5)] if video else still
    Pair.read(switched(name, video), video).assert_equal(medium, tolerance)


@kinds
@pytest.mark.parametrize("name", list(SWITCHES))
def test_what_is_written_is_read_by_both(name: str, video: bool) -> None:
    ours = Patchify.from_dict(switched(name, video), video)
    pair = Pair.read(json.loads(json.dumps(ours.to_dict())), video)
    assert pair.ours == ours
    pair.assert_equal(frames(2 if video else 1, 84, 56))


def test_what_frames_may_be() -> None:
    arrays = frames(2, 40, 56)
    expected, grid = VIDEO.ours(arrays)
    others = {
        "pil": [Image.fromarray(frame) for frame in arrays],
        "channels first": [frame.transpose(2, 0, 1) for frame in arrays],
        "tensors": [torch.tensor(frame) for frame in arrays],
        "one tensor": torch.tensor(np.stack(arrays)),
        "one array": np.stack(arrays),
    }
    for name, medium in others.items():
        rows, same = VIDEO.ours(medium)  # type: ignore[arg-type]
        assert torch.equal(rows, expected), name
        assert same == grid


def test_floats_are_frames_too() -> None:
    words = {**SMALL_VIDEOS, "do_rescale": False}
    floats = [(frame / 255).astype(np.float32) for frame in frames(2, 40, 56)]
    Pair.read(words, True).assert_equal(floats)


def test_rows_are_in_merge_block_order() -> None:
    """Patch k of block (y, x) is that of the frame's row 2 y + k // 2 and column 2 x + k % 2."""
    video = Patchify.from_dict({"do_resize": False}, video=True)
    frame = frames(1, 56, 84)[0]
    rows, grid = video([frame, frame])
    assert grid == (2, 4, 6)
    for place, (row, column) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1), (0, 2)]):
        patch = frame[14 * row : 14 * row + 14, 14 * column : 14 * column + 14]
        pixels = torch.tensor(patch).permute(2, 0, 1).flatten()
        assert torch.equal(rows[place], (pixels - 127.5) / 127.5)
        assert torch.equal(rows[24 + place], rows[place])


# ---- tokens left out ---------------------------------------------------------------------------


def test_repeated_and_partly_changed_frames() -> None:
    first, second = frames(2, 112, 168)
    half = second.copy()
    half[:56] = 0
    shot = [first, second, second, half]
    pair = Pair.read({**VIDEOS, "do_resize": False}, True)
    pair.assert_equal(shot)
    kept = pair.ours.kept(*pair.ours(shot)).view(4, 24)
    assert kept.sum(1).tolist() == [24, 24, 1, 12]
    assert kept[2:, 0].all()


@settings(max_examples=100)
@given(
    changes=st.lists(st.lists(st.integers(0, 11), max_size=4), min_size=1, max_size=5),
    by=st.sampled_from([(0.0999, 0.1), (0.1001, 0.1), (9.0, 0.1), (255.0, 255.0)]),
    merge=st.sampled_from([1, 2]),
    least=st.integers(0, 5),
)
def test_every_mask(
    changes: list[list[int]], by: tuple[float, float], merge: int, least: int
) -> None:
    """Frames of 12 blocks; `changes` are those of each next one that differ, on average by[0]."""
    shot = [torch.zeros(12, merge**2 * 588)]
    for blocks in changes:
        shot.append(shot[-1].clone())
        shot[-1][blocks, ::2] += 2 * by[0] / 255
    rows, grid = torch.cat(shot).view(-1, 588), (len(shot), 3 * merge, 4 * merge)
    theirs = VIDEO.theirs._get_compression_mask(
        rows, torch.tensor([grid]), torch.tensor([merge]), by[1], least
    )
    assert torch.equal(kept_tokens(rows, grid, merge, by[1], least), theirs)


# ---- the native rule ---------------------------------------------------------------------------

IMG, VID = (Patchify.from_dict(NATIVE, video) for video in (False, True))


def blank(count: int, height: int, width: int) -> list[np.ndarray]:
    return [np.broadcast_to(np.zeros(3, np.uint8), (height, width, 3))] * count


def test_the_native_file() -> None:
    """Its tokens are the budgets that are published in pixels; means that it lacks are CLIP's."""
    for ours, video in ((IMG, False), (VID, True)):
        assert ours == replace(Patchify.from_dict({}, video), rule="native")
        written = json.loads(json.dumps(ours.to_dict()))
        assert Patchify.from_dict(written, video) == ours
    both = {**NATIVE, "image_merge_size": 2, "video_merge_size": 4, "fps": 1}
    assert [Patchify.from_dict(both, video).merge_size for video in (False, True)] == [2, 4]
    named = {"image_processor_type": "Videollama3ImageProcessor"}
    assert Patchify.from_dict(named, False) == replace(IMG, mean=CLIP_MEAN, std=CLIP_STD)
    assert Patchify.from_dict({**named, **IMAGES}, False).rule == "hf"


@pytest.mark.parametrize(
    ("call", "sizes"),
    [
        ([(IMG, blank(1, 1080, 1920))], [(1078, 1918)]),
        ([(IMG, blank(1, 1080, 1920))] * 3, [(770, 1372)] * 3),
        ([(IMG, blank(1, 1080, 1920))] * 8, [(462, 840)] * 8),
        ([(IMG, blank(1, 10, 10))], [(56, 56)]),
        ([(VID, blank(64, 720, 1280))], [(336, 588)]),
        ([(VID, blank(1100, 1080, 1920))], [(84, 168)]),  # the minimum outranks the budget
        ([(VID, blank(64, 720, 1280)), (VID, blank(64, 480, 640))], [(224, 420), (252, 364)]),
        ([(IMG, blank(1, 1080, 1920)), (VID, blank(16, 720, 1280))], [(798, 1414), (532, 924)]),
        ([(IMG, blank(1, 480, 640)), (VID, blank(4, 480, 640))], [(476, 644), (476, 644)]),
    ],
)
def test_native_sizes(call: list[Any], sizes: list[Size]) -> None:
    assert sizes_of_call(call) == sizes
    if len(call) == 1:
        patchify, medium = call[0]
        assert patchify.size(len(medium), *medium[0].shape[:2]) == sizes[0]


def test_the_native_rule_turns_pil_images_alone() -> None:
    image = tiny.picture(0, 80, 160)
    rows, grid = IMG([image])
    assert grid == (1, 11, 6)  # of 154 x 84, as if it were upright
    assert IMG([np.asarray(image)])[1] == (1, 6, 11)
    assert sizes_of_call([(IMG, [image])]) == [(154, 84)]
    assert torch.equal(rows, replace(IMG, rule="hf")([image], size=(154, 84))[0])
    whole = np.asarray(image)[:70, :154]
    still = replace(IMG, resize=False)
    assert still([Image.fromarray(whole)])[1] == still([whole])[1] == (1, 5, 11)
    assert sizes_of_call([(still, [whole[1:]])]) == [(69, 154)]


def test_pixels_of_a_native_call() -> None:
    image, video = frames(1, 60, 100), frames(2, 90, 50)
    sizes = sizes_of_call([(IMG, image), (VID, video)])
    assert sizes == [(56, 98), (84, 56)]
    assert (IMG(image, sizes[0])[1], VID(video, sizes[1])[1]) == ((1, 4, 7), (2, 6, 4))


def test_native_calls_that_do_not_fit() -> None:
    with pytest.raises(InvalidArgument, match="share a budget"):
        sizes_of_call([(IMG, blank(1, 9, 9)), (replace(VID, max_pixels=784), blank(2, 9, 9))])
    sizes = sizes_of_call([(IMG, blank(1, 5, 640)), (VID, blank(4, 480, 640))])
    assert sizes == [(0, 644), (476, 644)]  # no minimum in a call of both
    with pytest.raises(InvalidArgument, match="644 x 0 pixels"):
        IMG(blank(1, 5, 640), sizes[0])


def test_the_hf_rule_sizes_each_by_itself() -> None:
    call = [(IMAGE.ours, frames(1, 90, 120)), (VIDEO.ours, frames(3, 90, 120))]
    assert sizes_of_call(call) == [IMAGE.ours.size(1, 90, 120), VIDEO.ours.size(3, 90, 120)]
    assert sizes_of_call([]) == []


# ---- what does not fit -------------------------------------------------------------------------


def test_frames_that_do_not_fit_are_named() -> None:
    with pytest.raises(InvalidArgument, match="no frames"):
        VIDEO.ours([])
    with pytest.raises(InvalidArgument, match=r"\(40, 56\) and \(56, 40\)"):
        VIDEO.ours([*frames(1, 40, 56), *frames(1, 56, 40)])
    with pytest.raises(InvalidArgument, match=r"56 x 40 pixels.*multiple of 28"):
        replace(VIDEO.ours, resize=False)(frames(1, 40, 56))


@kinds
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"temporal_patch_size": 2}, "temporal_patch_size=2"),
        ({"resample": 1}, "resample=1"),
        ({"size": {"height": 28, "width": 28}}, "shortest_edge and longest_edge"),
        ({"size": {"shortest_edge": 3136}}, "shortest_edge and longest_edge"),
        ({"size": 28}, "size 28"),
    ],
)
def test_unsupported_words_are_named(words: dict[str, Any], said: str, video: bool) -> None:
    with pytest.raises(UnsupportedModel, match=said):
        Patchify.from_dict(words, video)


def test_the_published_files(shared: Path) -> None:
    folder = shared / "data/hub_like/vl3"
    for name, video in (("preprocessor_config", False), ("video_preprocessor_config", True)):
        words = json.loads((folder / f"{name}.json").read_text())
        assert Patchify.from_dict(words, video) == Patchify.from_dict({}, video)
        Pair.read(words, video).assert_equal(frames(2 if video else 1, 480, 640))
