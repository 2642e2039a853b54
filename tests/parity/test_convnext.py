"""The ConvNeXt tower against its authors' tensors and against timm: features and gradients."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import tiny
from oracle import difference
from vidlm.errors import InvalidArgument, UnsupportedModel
from vidlm.vision import convnext
from vidlm.vision.convnext import ConvNeXt, ConvNeXtConfig

# isort: split
from timm.models.convnext import ConvNeXt as Timm  # after oracle: it imports torchvision, too

NEAR = 1e-4  # of the largest value, in float32
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.004}
SMALL = ConvNeXtConfig(depths=(1, 2, 3, 1), dims=(8, 16, 24, 40), image_size=96)
CASES = range(1, 8)
PREFIX = "model.vision_tower.vision_tower."


@dataclass(frozen=True)
class Pair:
    """One tower, in both."""

    ours: ConvNeXt
    theirs: Timm

    @classmethod
    def make(cls, config: ConvNeXtConfig = SMALL) -> Pair:
        sizes = {"depths": config.depths, "dims": config.dims, "norm_eps": config.eps}
        theirs = Timm(num_classes=0, **sizes)
        theirs.head = nn.Identity()
        tiny.randomise(theirs)
        ours = ConvNeXt(config)
        ours.load_state_dict({_name(n): w for n, w in theirs.state_dict().items()})
        return cls(ours, theirs)

    def expected(self, pixels: Tensor) -> Tensor:
        return self.theirs.forward_features(pixels).flatten(2).transpose(1, 2)


def _name(stored: str) -> str:
    return re.sub(r"\.gamma$", ".weight", stored)


def apart(ours: Tensor, theirs: Tensor) -> float:
    return difference(ours.detach(), theirs.detach())


def frames(count: int, size: int = SMALL.image_size) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))


@pytest.fixture
def pair() -> Pair:
    return Pair.make()


@pytest.fixture(params=["plain", "in place"])
def way(request: pytest.FixtureRequest) -> Any:
    """Both ways through a block: with gradients and without."""
    return torch.enable_grad if request.param == "plain" else torch.inference_mode


# ---- features ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", CASES)
def test_the_authors_features(shared: Path, number: int, way: Any) -> None:
    folder = shared / f"golden/slowfast/case{number}"
    tower = ConvNeXt(ConvNeXtConfig.from_dict(json.loads((folder / "config.json").read_text())))
    stored = load_file(folder / "model.safetensors")
    mine = {n.removeprefix(PREFIX): w for n, w in stored.items() if n.startswith(PREFIX)}
    tower.load_state_dict({n: w for n, w in mine.items() if not n.startswith("head.")})
    inputs = load_file(folder / "inputs.safetensors")
    pixels = torch.cat([inputs[n] for n in sorted(inputs) if n.startswith("pixel_values.")])
    expected = load_file(folder / "outputs.safetensors")["vision_features"]
    with way():
        assert apart(tower(pixels), expected) < NEAR


@pytest.mark.parametrize("size", [32, 64, 96, 130])  # 130: an odd row is dropped in each stage
def test_features_of_timm(size: int, way: Any) -> None:
    config = ConvNeXtConfig(SMALL.depths, SMALL.dims, image_size=size)
    pair = Pair.make(config)
    with way():
        ours = pair.ours(frames(3, size))
        assert ours.shape == (3, config.patches, config.hidden_size)
        assert apart(ours, pair.expected(frames(3, size))) < NEAR


def test_another_epsilon() -> None:
    pair = Pair.make(ConvNeXtConfig(SMALL.depths, SMALL.dims, eps=0.1, image_size=64))
    expected = pair.expected(frames(2, 64))
    assert apart(pair.ours(frames(2, 64)), expected) < NEAR
    usual = Pair.make(ConvNeXtConfig(SMALL.depths, SMALL.dims, image_size=64))
    assert apart(usual.ours(frames(2, 64)), expected) > 0.01


# ---- the two ways, and pieces of them ----------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(pair: Pair, dtype: torch.dtype, way: Any) -> None:
    exact = pair.expected(frames(2))
    with way():
        ours = pair.ours.to(dtype)(frames(2))  # as pixels come: in float32
    assert ours.dtype == dtype
    assert apart(ours.float(), exact) < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("onednn", [True, False])
def test_both_ways_agree(pair: Pair, dtype: torch.dtype, onednn: bool) -> None:
    pair.ours.to(dtype)
    plain = pair.ours(frames(2)).detach()
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        if not onednn:
            patch.setattr(convnext, "_fuses", lambda layer, x: False)
        in_place = pair.ours(frames(2))
    assert apart(in_place.float(), plain.float()) < ROUNDING[dtype]


def test_which_way_is_taken(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    overwrite = convnext.overwrite
    monkeypatch.setattr(convnext, "overwrite", lambda *a: taken.append(1) or overwrite(*a))
    assert pair.ours(frames(1)).requires_grad
    assert not taken
    with torch.no_grad():
        pair.ours(frames(1))
    assert len(taken) == sum(SMALL.depths)


def test_a_layer_put_in_place_of_a_product_is_called(pair: Pair) -> None:
    mlp = pair.ours.stages[2].blocks[1].mlp
    mlp.fc1 = nn.Sequential(mlp.fc1)
    with torch.inference_mode():
        assert apart(pair.ours(frames(2)), pair.expected(frames(2))) < NEAR


def test_pieces_change_nothing(pair: Pair, way: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with way():
        whole = pair.ours(frames(5))
        assert pair.ours.at_a_time > 5
        frame = (SMALL.image_size // 4) ** 2 * SMALL.dims[0] * 4
        monkeypatch.setattr(convnext, "MAP", 2 * frame + 1)
        monkeypatch.setattr(convnext, "PIECE", frame // 3)
        assert pair.ours.at_a_time == 2
        assert apart(pair.ours(frames(5)), whole) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_product_sees_more_than_a_piece(
    pair: Pair, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    product = convnext._product

    def watch(layer: nn.Module, x: Tensor, then: str = "none") -> Tensor:
        y = product(layer, x, then)
        seen.append(max(x.nbytes, y.nbytes))
        return y

    monkeypatch.setattr(convnext, "_product", watch)
    monkeypatch.setattr(convnext, "PIECE", 10_000)
    pair.ours.to(dtype)
    with torch.inference_mode():
        pair.ours(frames(5))
    row = 4 * SMALL.hidden_size * dtype.itemsize  # what rounding up may add
    assert 5_000 < max(seen) <= 10_000 + row


def test_what_comes_in_stays(pair: Pair) -> None:
    pixels = frames(2)
    with torch.inference_mode():
        first, second = pair.ours(pixels), pair.ours(pixels)
    assert torch.equal(pixels, frames(2))
    assert torch.equal(first, second)


# ---- gradients ---------------------------------------------------------------------------------


def test_gradients(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, other = frames(3).requires_grad_(), frames(3).requires_grad_()
    monkeypatch.setattr(convnext, "MAP", 1)  # a frame at a time
    ours, theirs = pair.ours(mine), pair.expected(other)
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    assert apart(mine.grad, other.grad) < NEAR
    expected = {_name(n): p.grad for n, p in pair.theirs.named_parameters()}
    for name, parameter in pair.ours.named_parameters():
        assert apart(parameter.grad, expected.pop(name)) < NEAR, name
    assert not expected


# ---- the published tower, its configuration and errors -----------------------------------------


def published(dtype: torch.dtype) -> ConvNeXt:
    with torch.device("meta"):
        return ConvNeXt(ConvNeXtConfig.from_dict({"mm_vision_tower": "convnext-576"})).to(dtype)


def test_the_published_tower() -> None:
    tower = published(torch.float32)
    assert round(sum(p.numel() for p in tower.parameters()) / 1e6, 1) == 843.4
    with torch.device("meta"):
        theirs = Timm(depths=(3, 4, 30, 3), dims=(384, 768, 1536, 3072), num_classes=0)
    theirs.head = nn.Identity()
    expected = {_name(n): p.shape for n, p in theirs.named_parameters()}
    assert {n: p.shape for n, p in tower.named_parameters()} == expected
    assert tower.config == ConvNeXtConfig()
    assert (tower.config.patches, tower.config.hidden_size) == (324, 3072)
    assert tower(torch.empty(3, 3, 576, 576, device="meta")).shape == (3, 324, 3072)


@pytest.mark.parametrize(("dtype", "count"), [(torch.float32, 1), (torch.bfloat16, 2)])
def test_frames_at_a_time(dtype: torch.dtype, count: int) -> None:
    assert published(dtype).at_a_time == count


def test_another_side() -> None:
    config = ConvNeXtConfig.from_dict({"mm_vision_tower": "convnext-512"})
    assert (config.image_size, config.patches) == (512, 256)
    assert config.depths == ConvNeXtConfig().depths


@pytest.mark.parametrize("config", [ConvNeXtConfig(), SMALL, ConvNeXtConfig(eps=1e-6)])
def test_a_config_through_json(config: ConvNeXtConfig) -> None:
    assert ConvNeXtConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_published_config_names_no_sizes() -> None:
    assert ConvNeXtConfig(image_size=512).to_dict() == {"mm_vision_tower": "convnext-512"}


@pytest.mark.parametrize(
    "name", ["google/siglip-so400m-patch14-384", "convnext", "convnext-", None]
)
def test_another_tower(name: str | None) -> None:
    with pytest.raises(UnsupportedModel, match=r"mm_vision_tower=.*known: 'convnext-576'"):
        ConvNeXtConfig.from_dict({"mm_vision_tower": name})


@pytest.mark.parametrize("sizes", [{"depths": [1, 2]}, {"dims": [8]}, {"image_size": 31}])
def test_sizes_that_cannot_be(sizes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel, match=r"ConvNeXt o[fn]"):
        ConvNeXtConfig.from_dict({"mm_vision_tower": "convnext-576", "fixture_vision": sizes})


@pytest.mark.parametrize("shape", [(1, 3, 96, 64), (1, 1, 96, 96), (3, 96, 96), (0, 3, 96, 96)])
def test_frames_of_another_shape(pair: Pair, shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidArgument, match=r"this tower takes \(F, 3, 96, 96\)"):
        pair.ours(torch.zeros(shape))
