"""AnyRes against transformers: canvases, tiles, tokens and unpadding equal, pixels bit-equal."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from oracle import transformers
from vidlm.errors import InvalidArgument, UnsupportedModel
from vidlm.vision import anyres
from vidlm.vision.anyres import AnyRes

Theirs = transformers.LlavaNextImageProcessor
their_model = transformers.models.llava_next.modeling_llava_next
their_utils = transformers.image_processing_utils

# As published for LLaVA-NeXT-Video.
PUBLISHED = {
    "image_processor_type": "LlavaNextImageProcessor",
    "size": {"shortest_edge": 336},
    "crop_size": {"height": 336, "width": 336},
    "do_pad": True,
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
}
# The same in small: tiles of 28 pixels, 4 x 4 patches each.
SMALL = {
    **PUBLISHED,
    "size": {"shortest_edge": 28},
    "crop_size": {"height": 28, "width": 28},
    "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]],
}
PATCHES = 24

sides = st.one_of(st.integers(1, 40), st.integers(1, 4000), st.sampled_from([336, 672, 1008]))
sizes = st.tuples(sides, sides)
thousands = settings(max_examples=1000)
POINTS = st.sampled_from(
    [
        PUBLISHED["image_grid_pinpoints"],
        [[336 * i, 336 * j] for i in range(1, 4) for j in range(1, 4)],
        [[672, 672], [336, 336]],
    ]
)


# ---- arithmetic: every size ----------------------------------------------------------------------


@thousands
@given(size=sizes, points=POINTS)
def test_canvas_and_tiles(size: tuple[int, int], points: list[list[int]]) -> None:
    canvas = anyres.best_canvas(size, points)
    assert canvas == tuple(their_utils.select_best_resolution(size, points))
    blank = np.broadcast_to(np.uint8(0), (3, *size))
    first = transformers.image_utils.ChannelDimension.FIRST
    assert anyres.fitted(size, canvas) == their_utils.get_patch_output_size(blank, canvas, first)
    assert anyres.grid(size, points, 336) == their_model.get_anyres_image_grid_shape(
        size, points, 336
    )
    assert anyres.tiles(size, points, 336) == their_model.image_size_to_num_patches(
        size, points, 336
    )


def their_tokens(size: tuple[int, int], points: list[list[int]]) -> int:
    """Of their processor, which is not needed as a whole; less the class token."""
    processor = transformers.LlavaNextVideoProcessor
    stand_in = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=points),
        patch_size=14,
        num_additional_image_tokens=1,
    )
    stand_in._get_unpadded_features = lambda *args: processor._get_unpadded_features(None, *args)
    return processor._get_number_of_features(stand_in, *size, 336, 336) - 1


@thousands
@given(size=sizes, points=POINTS)
def test_tokens_are_what_the_features_leave(size: tuple[int, int], points: list[list[int]]) -> None:
    check_tokens(size, points)


def check_tokens(size: tuple[int, int], points: list[list[int]]) -> None:
    tokens = anyres.tokens(size, points, 336, PATCHES)
    assert tokens == their_tokens(size, points)
    down, across = anyres.grid(size, points, 336)
    mosaic = torch.arange(down * across * PATCHES**2).view(down * PATCHES, across * PATCHES, 1)
    left = anyres.unpad(mosaic, size)
    assert torch.equal(
        left, their_model.unpad_image(mosaic.permute(2, 0, 1), size).permute(1, 2, 0)
    )
    rows, columns, _ = left.shape
    assert tokens == PATCHES**2 + rows * (columns + 1)


# Where a product such as 198 * (48 / 352) is a hair below a whole number.
@pytest.mark.parametrize("size", [(198, 352), (394, 1773), (618, 618), (667, 667)])
def test_sizes_where_rounding_decides(size: tuple[int, int]) -> None:
    for pinpoint in ([336, 336], [672, 336], [336, 1008], [336, 672], [672, 672]):
        check_tokens(size, [pinpoint])


@pytest.mark.parametrize(
    ("size", "tokens", "tiles"),
    [
        ((336, 336), 1176, 3),
        ((480, 640), 2340, 5),
        ((640, 480), 2352, 5),
        ((300, 1000), 2182, 4),
        ((1000, 300), 2232, 4),
        ((500, 333), 1476, 3),
        ((1080, 1920), 1948, 5),
        ((100, 100), 1176, 3),
    ],
)
def test_known_sizes(size: tuple[int, int], tokens: int, tiles: int) -> None:
    ours = AnyRes.from_dict(PUBLISHED)
    assert ours.tokens(size, PATCHES) == tokens
    assert ours.tiles(size) == tiles


# ---- pixels --------------------------------------------------------------------------------------


def assert_equal(config: dict[str, Any], image: Any) -> None:
    theirs = Theirs(**config)(image, return_tensors="pt")
    ours = AnyRes.from_dict(config)(image)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, theirs["pixel_values"][0])


@settings(max_examples=100)
@given(
    seed=st.integers(0, 9999),
    height=st.one_of(st.integers(1, 9), st.integers(1, 200)),
    width=st.one_of(st.integers(1, 9), st.integers(1, 200)),
    mode=st.sampled_from(["RGB", "RGBA", "L", "P"]),
)
def test_pixels_of_every_size(seed: int, height: int, width: int, mode: str) -> None:
    assert_equal(SMALL, tiny.picture(seed, height, width, mode))


@pytest.mark.parametrize(("height", "width"), [(480, 640), (337, 1001), (100, 60)])
def test_pixels_as_published(height: int, width: int) -> None:
    assert_equal(PUBLISHED, tiny.picture(0, height, width))


SWITCHES: dict[str, dict[str, Any]] = {
    "defaults": dict.fromkeys(("size", "crop_size", "image_grid_pinpoints")),
    "bilinear": {"resample": 2},
    "oblong size": {"size": {"height": 28, "width": 56}},
    "larger than the crop": {"size": {"shortest_edge": 42}},
    "no resize": {"do_resize": False},
    "no crop": {"do_center_crop": False},
    "one mean": {"image_mean": 0.5, "image_std": 0.25},
    "its own factor": {"rescale_factor": 1 / 127.5},
}


@pytest.mark.parametrize("name", list(SWITCHES))
def test_switches(name: str) -> None:
    config = {**SMALL, **SWITCHES[name]}
    config = {key: value for key, value in config.items() if value is not None}
    assert_equal(config, tiny.picture(3, 50, 77))
    ours = AnyRes.from_dict(config)
    written = json.loads(json.dumps(ours.to_dict()))
    assert AnyRes.from_dict(written) == ours
    assert getattr(transformers, written["image_processor_type"]) is Theirs
    assert torch.equal(
        Theirs(**written)(tiny.picture(3), return_tensors="pt")["pixel_values"][0],
        ours(tiny.picture(3)),
    )


def test_floats() -> None:
    array = np.asarray(tiny.picture(1)).astype(np.float32) / 255
    assert_equal({**SMALL, "do_rescale": False}, array)


def test_the_published_file(shared: Path) -> None:
    text = (shared / "data/hub_like/next_video/preprocessor_config.json").read_text()
    assert AnyRes.from_dict(json.loads(text)) == AnyRes.from_dict(PUBLISHED)


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["do_resize", "do_center_crop"])
def test_switches_that_would_show_are_refused(name: str) -> None:
    config = {**SMALL, "size": {"shortest_edge": 42}, name: False}
    with pytest.raises(UnsupportedModel, match=f"{name}=false, size=42 and crop_size=.28, 28"):
        AnyRes.from_dict(config)


def test_a_canvas_of_broken_tiles_has_no_mosaic() -> None:
    broken = AnyRes.from_dict({**SMALL, "image_grid_pinpoints": [[56, 40]]})
    assert broken.tiles((10, 10)) == 5
    with pytest.raises(UnsupportedModel, match="56 x 40, which is not whole tiles of 28"):
        broken.tokens((10, 10), 4)


def test_an_empty_image_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"shape \(0, 5, 3\)"):
        AnyRes.from_dict(SMALL)(np.zeros((0, 5, 3), np.uint8))
