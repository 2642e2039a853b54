"""Pixels against transformers: bit-equal to its torchvision backend, near to its PIL backend.

Both backends round to whole grey levels when they resize, each in its own integer arithmetic. Where
a frame shrinks in both directions they are at most 2 levels of 255 apart, and so they are for
smooth frames of any size; at the hard edges of a frame that is enlarged it may be some 20.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import tiny
import torchvision_on_cpu  # noqa: F401  (before transformers, which imports torchvision)
from oracle import transformers
from vidlm.errors import InvalidArgument, UnsupportedModel
from vidlm.vision.preprocess import Preprocess

MODES = ("RGB", "RGBA", "L", "LA", "P")
GREY_LEVELS = 2


@dataclass(frozen=True)
class Pair:
    """One preprocessor_config.json, read by both."""

    ours: Preprocess
    theirs: Any
    pil: Any

    @classmethod
    def read(cls, config: dict[str, Any]) -> Pair:
        name = config["image_processor_type"]
        theirs = getattr(transformers, name)(**config)
        twin = getattr(transformers, f"{name}Pil")(**config)
        return cls(Preprocess.from_dict(config), theirs, twin)

    def assert_equal(self, images: list[Image.Image]) -> None:
        theirs = self.theirs(images, return_tensors="pt")["pixel_values"]
        ours = self.ours(images)
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs), float((ours - theirs).abs().max())


PAIRS = {
    "siglip": Pair.read(tiny.SIGLIP_IMAGES),
    "clip": Pair.read(tiny.CLIP_IMAGES),
}
pairs = pytest.mark.parametrize("pair", list(PAIRS.values()), ids=list(PAIRS))

# Mostly small ones, where rounding has the largest share; each side up to 40 times the other.
sides = st.one_of(st.integers(1, 9), st.integers(20, 40), st.integers(1, 200))
images = st.builds(tiny.picture, st.integers(0, 9999), sides, sides, st.sampled_from(MODES)).filter(
    lambda image: max(image.size) <= 40 * min(image.size)
)


@pairs
@settings(max_examples=200)
@given(image=images)
def test_every_size_and_mode(pair: Pair, image: Image.Image) -> None:
    pair.assert_equal([image])


@pairs
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("height", "width"),
    [(1, 1), (1, 40), (40, 1), (28, 28), (27, 29), (28, 200), (200, 28), (29, 28), (13, 512)],
)
def test_sizes_at_the_edges(pair: Pair, height: int, width: int, mode: str) -> None:
    pair.assert_equal([tiny.picture(height + width, height, width, mode)])


@pairs
def test_a_palette_with_a_transparent_entry(pair: Pair) -> None:
    image = tiny.picture(0, mode="P")
    image.info["transparency"] = 7
    pair.assert_equal([image])


@pairs
def test_a_batch_of_several_sizes(pair: Pair) -> None:
    batch = [*tiny.pictures(3), *tiny.pictures(3)[::-1], tiny.picture(9, mode="RGBA")]
    pair.assert_equal(batch)
    alone = torch.cat([pair.ours([image]) for image in batch])
    assert torch.equal(pair.ours(batch), alone)


def published(size: Any, **more: Any) -> dict[str, Any]:
    return {"image_processor_type": "CLIPImageProcessor", "size": size, **more}


@pytest.mark.parametrize(("height", "width"), [(480, 640), (1080, 1920), (640, 271), (100, 100)])
@pytest.mark.parametrize(
    "config",
    [
        {**tiny.SIGLIP_IMAGES, "size": {"height": 384, "width": 384}, "do_convert_rgb": None},
        published({"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
    ],
    ids=["interleave", "llava-1.5"],
)
def test_the_published_sizes(config: dict[str, Any], height: int, width: int) -> None:
    Pair.read(config).assert_equal([tiny.picture(height, height, width)])


# ---- every switch of preprocessor_config.json ---------------------------------------------------

SWITCHES = {
    "numbers for sizes": published(28, crop_size=28),
    "crop larger than the resize": published({"shortest_edge": 15}, crop_size=28),
    "oblong crop": published({"shortest_edge": 30}, crop_size={"height": 21, "width": 28}),
    "no resize": published({"shortest_edge": 28}, crop_size=28, do_resize=False),
    "no crop": published({"height": 21, "width": 28}, do_center_crop=False),
    "bilinear": published({"shortest_edge": 28}, crop_size=28, resample=2),
    "nearest": published({"shortest_edge": 28}, crop_size=28, resample=0),
    "no normalise": published({"shortest_edge": 28}, crop_size=28, do_normalize=False),
    "no rescale": published({"shortest_edge": 28}, crop_size=28, do_rescale=False),
    "its own factor": published({"shortest_edge": 28}, crop_size=28, rescale_factor=1 / 127.5),
    "one mean": published(28, crop_size=28, image_mean=0.5, image_std=0.25),
    "null is off": published({"height": 21, "width": 28}, do_center_crop=None),
    "defaults of clip": {"image_processor_type": "CLIPImageProcessor"},
    "defaults of siglip": {"image_processor_type": "SiglipImageProcessor"},
}


@pytest.mark.parametrize("name", list(SWITCHES))
def test_switches(name: str) -> None:
    pair = Pair.read(SWITCHES[name])
    batch = [*tiny.pictures(2), tiny.picture(5, 17, 90)]
    ours, theirs = pair.ours(batch), pair.theirs(batch, return_tensors="pt")["pixel_values"]
    # Without one of the two factors the reference multiplies where we divide: the last bit differs.
    assert ours.shape == theirs.shape
    tolerance = 1e-6 if name in ("no normalise", "no rescale") else 0
    assert torch.allclose(ours, theirs.float(), rtol=tolerance, atol=0)


@pytest.mark.parametrize("name", list(SWITCHES))
def test_what_is_written_is_read_by_both(name: str) -> None:
    ours = Preprocess.from_dict(SWITCHES[name])
    written = json.loads(json.dumps(ours.to_dict()))
    assert Preprocess.from_dict(written) == ours
    theirs = getattr(transformers, written["image_processor_type"])(**written)
    batch = tiny.pictures(3)
    assert torch.equal(theirs(batch, return_tensors="pt")["pixel_values"], ours(batch))


# ---- the other backend -------------------------------------------------------------------------


def levels_apart(pair: Pair, image: Image.Image) -> float:
    theirs = torch.from_numpy(np.stack(pair.pil([image])["pixel_values"]))
    std = torch.tensor(pair.ours.std)[:, None, None]
    return float(((pair.ours([image]) - theirs).abs() * std * 255).max())


@pairs
@settings(max_examples=100)
@given(seed=st.integers(0, 9999), height=st.integers(28, 250), width=st.integers(28, 250))
def test_near_to_the_pil_backend_where_frames_shrink(
    pair: Pair, seed: int, height: int, width: int
) -> None:
    assert levels_apart(pair, tiny.picture(seed, height, width)) < GREY_LEVELS + 1e-3


@pairs
@settings(max_examples=100)
@given(phase=st.floats(0, 6), height=st.integers(2, 250), width=st.integers(2, 250))
def test_near_to_the_pil_backend_where_frames_are_smooth(
    pair: Pair, phase: float, height: int, width: int
) -> None:
    y, x = np.mgrid[:height, :width]
    waves = [127 + 100 * np.sin(x / 20 + phase + c) * np.cos(y / 15 + c) for c in range(3)]
    image = Image.fromarray(np.stack(waves, -1).astype(np.uint8))
    assert levels_apart(pair, image) < GREY_LEVELS + 1e-3


# ---- what frames may be ------------------------------------------------------------------------


@pairs
def test_arrays_and_tensors_are_images_too(pair: Pair) -> None:
    image = tiny.picture(3)
    array = np.asarray(image)  # read-only
    expected = pair.ours([image])
    frames = {
        "array": array,
        "flipped twice": np.array(array[:, ::-1])[:, ::-1],
        "channels first": array.transpose(2, 0, 1),
        "tensor": torch.tensor(array),
        "tensor, channels first": torch.tensor(array).permute(2, 0, 1),
    }
    for name, frame in frames.items():
        assert torch.equal(pair.ours([frame]), expected), name


@pytest.mark.parametrize("name", list(SWITCHES))
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_floats(name: str, dtype: type[np.floating]) -> None:
    pair = Pair.read({**SWITCHES[name], "do_rescale": False})
    array = np.asarray(tiny.picture(5, 17, 90)).astype(dtype) / 255
    theirs = pair.theirs([array], return_tensors="pt")["pixel_values"]
    tolerance = 1e-6 if name == "no normalise" else 0
    for frame in (array, torch.from_numpy(array), array.transpose(2, 0, 1)):
        assert torch.allclose(pair.ours([frame]), theirs.float(), rtol=tolerance, atol=0)


@pairs
def test_floats_from_0_to_255_are_rescaled_too(pair: Pair) -> None:
    array = np.asarray(tiny.picture(5, 17, 90)).astype(np.float32)
    assert torch.equal(
        pair.ours([array]), pair.theirs([array], return_tensors="pt")["pixel_values"]
    )
    # Nothing is rounded, so they are not what the same whole numbers become.
    assert not torch.equal(pair.ours([array]), pair.ours([array.astype(np.uint8)]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_floats(dtype: torch.dtype) -> None:
    frame = torch.from_numpy(np.array(tiny.picture(2))).to(dtype)
    assert torch.equal(PAIRS["clip"].ours([frame]), PAIRS["clip"].ours([frame.float()]))


@pytest.mark.parametrize(
    "frame",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.int32),
        np.zeros((4, 4, 3), bool),
        np.zeros((4, 0, 3), np.uint8),
        torch.zeros(4, 4, 4),
    ],
)
def test_other_arrays_are_refused(frame: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"shape \([34], [40].*uint8 RGB"):
        PAIRS["clip"].ours([frame])


def test_arrays_that_torch_does_not_know_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="dtype object; give uint8"):
        PAIRS["clip"].ours([np.zeros((4, 4, 3), object)])


def test_an_image_without_a_fixed_size() -> None:
    config = {**tiny.CLIP_IMAGES, "do_center_crop": False}
    image = tiny.picture(1, 17, 90)
    theirs = transformers.CLIPImageProcessor(**config)(image, return_tensors="pt")["pixel_values"]
    ours = Preprocess.from_dict(config).one(image)
    assert ours.shape == (3, 28, 148)
    assert torch.equal(ours, theirs[0])


def test_padding_of_tiles_is_nothing_to_a_single_frame() -> None:
    config = {**tiny.CLIP_IMAGES, "do_pad": True, "image_grid_pinpoints": [[28, 56]]}
    assert Preprocess.from_dict(config) == Preprocess.from_dict(tiny.CLIP_IMAGES)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"resample": 1}, "resample=1"),
        ({"do_pad": True}, "do_pad"),
        ({"size": {"longest_edge": 28}}, "longest_edge"),
        ({"do_center_crop": False}, "fixed output size"),
        ({"image_std": [0.5, 0.5]}, r"image_std=\[0.5, 0.5\]"),
    ],
)
def test_unsupported_switches_are_named(change: dict[str, Any], said: str) -> None:
    config = {**tiny.CLIP_IMAGES, **change}
    with pytest.raises(UnsupportedModel, match=said):
        Preprocess.from_dict(config)([tiny.picture(0)])
