"""What stands for a media item, and an item without its pixels in a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from vidlm.errors import MediaError
from vidlm.models.base import Encoded, Media
from vidlm.models.llava_next_video import TiledImage
from vidlm.models.media_state import media_from_state, media_to_state
from vidlm.models.videollama3 import Patches


def rows(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def patches(**changes: Any) -> Patches:
    kept = torch.tensor([True, True, False, True])
    made = Patches(rows(16, 12), 3, "video", 2, (2, 2, 4), 2, kept, (0.0, 1.5))
    return replace(made, **changes)


# ---- the digest --------------------------------------------------------------------------------


def test_it_is_of_what_an_item_is_and_not_of_where_it_lies() -> None:
    one = patches()
    turned = one.pixels.T.contiguous().T  # the same numbers in another order of memory
    assert len(one.digest) == 16
    assert one.digest == patches().digest == replace(one, pixels=turned).digest
    assert one.digest == replace(one, encoded=Encoded(rows(3, 8))).digest


CHANGES: list[dict[str, Any]] = [
    {"pixels": rows(16, 12) + torch.eye(16, 12) * 1e-6},
    {"pixels": rows(16, 12).view(8, 24)},
    {"pixels": rows(16, 12).double()},
    {"pixels": -rows(16, 12)},
    {"tokens": 4},
    {"kind": "image"},
    {"frames": 1},
    {"grid": (2, 4, 2)},
    {"merge": 1},
    {"kept": None},
    {"kept": torch.tensor([True, False, True, True])},
    {"times": (0.0, 1.25)},
    {"times": (0.0,)},
    {"times": ()},
]


def test_it_changes_with_everything_features_and_text_depend_on() -> None:
    digests = [patches().digest, *(patches(**change).digest for change in CHANGES)]
    assert len(set(digests)) == len(digests)
    touched = {name for change in CHANGES for name in change} | {"encoded", "named", "origin"}
    assert touched == {f.name for f in fields(Patches)}


def test_it_changes_with_the_class() -> None:
    pixels = rows(1, 3, 4, 4)
    assert Media(pixels, 4).digest != TiledImage(pixels, 4).digest
    assert TiledImage(pixels, 4, size=(4, 8)).digest != TiledImage(pixels, 4, size=(8, 4)).digest


@given(st.integers(0, 199), st.integers(1, 255))
def test_every_bit_of_the_pixels_counts(place: int, flip: int) -> None:
    pixels = torch.arange(200, dtype=torch.uint8)
    other = pixels.clone()
    other[place] ^= flip
    assert Media(pixels, 1).digest != Media(other, 1).digest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.uint8, torch.bool])
def test_pixels_of_every_dtype(dtype: torch.dtype) -> None:
    pixels = rows(4, 4).abs().to(dtype)
    assert Media(pixels, 1).digest == Media(pixels.clone(), 1).digest
    assert Media(pixels, 1).digest != Media(pixels.float(), 1).digest


def test_it_stays_when_the_pixels_go() -> None:
    one = patches()
    small = one.without_pixels(Encoded(rows(3, 8)))
    assert small.digest == one.digest
    assert replace(small, encoded=None).digest == one.digest
    assert small.without_pixels().encoded is small.encoded


# ---- the state ---------------------------------------------------------------------------------

ITEMS: dict[str, Callable[[], Media]] = {
    "media": lambda: Media(rows(3, 4, 4), 3, encoded=Encoded(rows(3, 8))),
    "memory": lambda: Media(
        rows(2, 3, 4, 4), 3, "video", 2, encoded=Encoded(rows(3, 8).bfloat16(), rows(9, 8))
    ),
    "tiled": lambda: TiledImage(rows(1, 3, 4, 4), 3, size=(480, 640), encoded=Encoded(rows(3, 8))),
    "patches": lambda: patches(encoded=Encoded(rows(3, 8))),
    "whole": lambda: patches(kept=None, encoded=Encoded(rows(3, 8))),
    "no features": patches,
}


def through_a_file(item: Media, folder: Path) -> Media:
    state, tensors = media_to_state(item)
    save_file(tensors, folder / "item.safetensors")
    return media_from_state(json.loads(json.dumps(state)), load_file(folder / "item.safetensors"))


@pytest.mark.parametrize("name", list(ITEMS))
def test_all_but_the_pixels_comes_back(tmp_path: Path, name: str) -> None:
    item = ITEMS[name]()
    again = through_a_file(item, tmp_path)
    assert type(again) is type(item)
    assert again.digest == item.digest
    assert again.pixels.numel() == 0
    for f in fields(item):
        if f.name not in ("pixels", "encoded", "named", "origin"):
            mine, other = getattr(item, f.name), getattr(again, f.name)
            assert mine.equal(other) if isinstance(mine, Tensor) else mine == other
    if item.encoded is None:
        assert again.encoded is None
    else:
        assert again.encoded is not None
        for a, b in zip(vars(item.encoded).values(), vars(again.encoded).values(), strict=True):
            assert (a is None and b is None) or (a.dtype == b.dtype and a.equal(b))
    assert through_a_file(again, tmp_path).digest == item.digest


def test_tensors_that_share_memory_are_parted(tmp_path: Path) -> None:
    """An image of Slow-Fast's has one set of features for both uses."""
    shared = rows(6, 8)
    item = Media(rows(3, 4, 4), 6, encoded=Encoded(shared, shared))
    again = through_a_file(item, tmp_path)
    assert again.encoded is not None
    assert again.encoded.tokens.equal(shared)
    view = Media(rows(3, 4, 4), 3, encoded=Encoded(shared[:3]))
    _, tensors = media_to_state(view)
    assert tensors["encoded.tokens"].untyped_storage().nbytes() == shared[:3].nbytes


def damaged(change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> Media:
    state, tensors = media_to_state(patches(encoded=Encoded(rows(3, 8))))
    change(state, tensors)
    return media_from_state(state, tensors)


def put(where: str, value: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def change(state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        target: Any = {"state": state, "fields": state["fields"], "tensors": tensors}
        inner, _, name = where.partition("/")
        if value is None:
            del target[inner][name]
        else:
            target[inner][name] = value

    return change


@pytest.mark.parametrize(
    ("where", "value", "says"),
    [
        ("state/class", "Encoded", "class 'Encoded'"),
        ("state/class", "VideoModel", "class 'VideoModel'"),
        ("state/class", "Media", "needs"),
        ("state/more", 1, "more"),
        ("state/digest", "ab", "digest 'ab'"),
        ("state/digest", 7, "digest 7"),
        ("state/digest", None, "class, digest and fields"),
        ("fields/pixels", 1, "pixels"),
        ("fields/encoded", 1, "encoded"),
        ("fields/frames", None, "needs"),
        ("fields/frames", "2", "frames='2'"),
        ("fields/tokens", -3, "tokens=-3"),
        ("fields/tokens", 4, "4 tokens"),
        ("fields/kind", "sound", "kind='sound'"),
        ("fields/grid", [2, 2], r"grid=\(2, 2\)"),
        ("fields/times", [0.0, "1"], "times="),
        ("fields/merge", True, "merge=True"),
        ("tensors/kept", None, "needs"),
        ("tensors/size", rows(2), "size"),
        ("tensors/encoded.tokens", rows(3), "shapes"),
        ("tensors/encoded.memory", rows(3), "shapes"),
    ],
)
def test_what_is_no_item_is_refused(where: str, value: Any, says: str) -> None:
    with pytest.raises(MediaError, match=says) as raised:
        damaged(put(where, value))
    assert "make it again from the video" in str(raised.value)
