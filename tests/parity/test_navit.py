"""VideoLLaMA3's vision encoder against transformers: features, hidden states and gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tiny
from oracle import difference, transformers
from vidlm.errors import InvalidArgument, UnsupportedModel
from vidlm.vision import navit
from vidlm.vision.navit import NaViT, NaViTConfig
from vidlm.vision.patches import Grid

NEAR = 1e-5  # relative to the largest value, in float32
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": 3,
}
PUBLISHED = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
}
Medium = tuple[Grid, int]  # and merge

MEDIA: tuple[Medium, ...] = (
    ((1, 5, 7), 1),  # an image
    ((3, 4, 6), 2),  # a video
    ((1, 1, 1), 1),
    ((2, 2, 2), 2),
    ((4, 3, 2), 1),
    ((1, 6, 9), 3),
    ((2, 4, 8), 4),
)


def patches(grid: Grid, seed: int = 0) -> Tensor:
    t, h, w = grid
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(t * h * w, 3 * SIZES["patch_size"] ** 2, generator=generator)


@dataclass(frozen=True)
class Pair:
    """One encoder, in both."""

    ours: NaViT
    theirs: Any

    @classmethod
    def make(cls, **more: Any) -> Pair:
        theirs = transformers.VideoLlama3VisionModel(
            transformers.VideoLlama3VisionConfig(**SIZES, **more)
        ).eval()
        tiny.randomise(theirs)
        ours = NaViT(NaViTConfig.from_dict(theirs.config.to_dict()))
        ours.load_state_dict(theirs.state_dict())  # by the same names
        return cls(ours, theirs)

    def mine(self, media: Sequence[Medium]) -> Tensor:
        parts = [self.ours(patches(grid, i), grid, m) for i, (grid, m) in enumerate(media)]
        return torch.cat(parts)

    def other(self, media: Sequence[Medium], **how: Any) -> Any:
        """All of them packed, as transformers takes them."""
        rows = torch.cat([patches(grid, i) for i, (grid, _) in enumerate(media)])
        grids = torch.tensor([grid for grid, _ in media])
        merges = torch.tensor([merge for _, merge in media])
        return self.theirs(rows, grids, merges, **how)


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair.make()


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# ---- features ----------------------------------------------------------------------------------


def test_images_and_videos(pair: Pair) -> None:
    ours, theirs = pair.mine(MEDIA), pair.other(MEDIA).last_hidden_state
    assert difference(ours, theirs) < NEAR
    assert len(ours) == sum(t * h * w // m**2 for (t, h, w), m in MEDIA)


grids = st.builds(
    lambda t, h, w, m: ((t, h * m, w * m), m),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 3),
)


@settings(max_examples=40)
@given(media=st.lists(grids, min_size=1, max_size=3))
def test_every_grid(pair: Pair, media: list[Medium]) -> None:
    with torch.no_grad():
        assert difference(pair.mine(media), pair.other(media).last_hidden_state) < NEAR


def test_another_theta() -> None:
    rope = {"rope_type": "axial", "rope_theta": 50.0}
    pair = Pair.make(rope_parameters=rope)
    ours = pair.mine(MEDIA)
    assert difference(ours, pair.other(MEDIA).last_hidden_state) < NEAR
    assert difference(ours, Pair.make().mine(MEDIA)) > 0.01


def test_another_activation_and_epsilon() -> None:
    pair = Pair.make(hidden_act="gelu", layer_norm_eps=1e-2)
    assert difference(pair.mine(MEDIA), pair.other(MEDIA).last_hidden_state) < NEAR


def test_gradients() -> None:
    pair = Pair.make()
    media = MEDIA[:2]
    with torch.enable_grad():
        pair.mine(media).square().sum().backward()
        pair.other(media).last_hidden_state.square().sum().backward()
    theirs = dict(pair.theirs.named_parameters())
    largest = max(float(weight.grad.abs().max()) for weight in theirs.values())
    for name, weight in pair.ours.named_parameters():
        assert weight.grad is not None, name
        # Of all gradients: a key's bias changes no attention, so that its own is rounding alone.
        assert float((weight.grad - theirs[name].grad).abs().max()) < NEAR * largest, name


def test_bfloat16() -> None:
    exact, pair = Pair.make().mine(MEDIA), Pair.make()
    pair.ours.to(torch.bfloat16)
    pair.theirs.to(torch.bfloat16)
    ours = pair.mine(MEDIA)
    assert ours.dtype == torch.bfloat16
    theirs = pair.other(MEDIA).last_hidden_state.float()
    # Rounding puts both this far from float32; neither may be further away than the other.
    assert difference(theirs, exact) < 0.03
    assert difference(ours.float(), exact) < 0.03
    assert difference(ours.float(), theirs) < 0.03


# ---- frames ------------------------------------------------------------------------------------

VIDEO: Medium = ((5, 4, 6), 2)  # 24 patches a frame


@pytest.mark.parametrize(("limit", "at_a_time"), [(1, 1), (24, 1), (47, 1), (48, 2), (120, 5)])
def test_frames_are_encoded_in_chunks(
    pair: Pair, limit: int, at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    layer = pair.ours.encoder.layers[0]
    hook = layer.register_forward_hook(lambda module, inputs, out: seen.append(len(out)))
    monkeypatch.setattr(navit, "PATCHES", limit)
    hidden: list[Tensor] = []
    grid, merge = VIDEO
    features = pair.ours(patches(grid), grid, merge, hidden)
    hook.remove()
    assert max(seen) == at_a_time
    assert sum(seen) == 5
    theirs = pair.other([VIDEO], output_hidden_states=True)
    assert difference(features, theirs.last_hidden_state) < NEAR
    for mine, other in zip(hidden, theirs.hidden_states, strict=True):
        assert difference(mine, other) < NEAR


def test_a_frame_sees_itself_alone(pair: Pair) -> None:
    (t, h, w), merge = VIDEO
    rows = patches((t, h, w))
    whole = pair.ours(rows, (t, h, w), merge)
    alone = [pair.ours(frame, (1, h, w), merge) for frame in rows.split(h * w)]
    assert difference(whole, torch.cat(alone)) < NEAR
    rows[: h * w] += 1
    changed = pair.ours(rows, (t, h, w), merge)
    tokens = h * w // merge**2
    assert difference(changed[tokens:], whole[tokens:]) < NEAR
    assert difference(changed[:tokens], whole[:tokens]) > 0.01


def test_the_place_of_a_patch_counts(pair: Pair) -> None:
    rows = patches((1, 4, 6))
    wide, tall = pair.ours(rows, (1, 4, 6), 1), pair.ours(rows, (1, 6, 4), 1)
    blocks = pair.ours(rows, (1, 4, 6), 2)
    assert difference(wide, tall) > 0.01
    assert difference(wide.view(6, 4, -1).mean(1), blocks) > 0.01


# ---- hidden states -----------------------------------------------------------------------------


def test_hidden_states(pair: Pair) -> None:
    collected: list[list[Tensor]] = [[] for _ in MEDIA]
    for i, (grid, merge) in enumerate(MEDIA):
        pair.ours(patches(grid, i), grid, merge, collected[i])
    theirs = pair.other(MEDIA, output_hidden_states=True).hidden_states
    assert len(theirs) == SIZES["num_hidden_layers"] + 1
    for mine, other in zip(zip(*collected, strict=True), theirs, strict=True):
        assert difference(torch.cat(mine), other) < NEAR


# ---- what does not fit -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "merge", "said"),
    [
        ((1, 4, 5), 2, r"grid \(1, 4, 5\) with merge=2"),
        ((0, 4, 6), 1, "at least one frame"),
        ((1, 4, 6), 0, "merge=0"),
        ((2, 4, 6), 1, r"shape \(24, 27\) .* takes \(48, 27\)"),
    ],
)
def test_what_does_not_fit_is_named(pair: Pair, grid: Grid, merge: int, said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        pair.ours(patches((1, 4, 6)), grid, merge)


def test_patches_of_another_size(pair: Pair) -> None:
    with pytest.raises(InvalidArgument, match=r"\(24, 588\).*takes \(24, 27\)"):
        pair.ours(torch.zeros(24, 588), (1, 4, 6), 1)


# ---- the configuration -------------------------------------------------------------------------


def test_the_published_size() -> None:
    with torch.device("meta"):
        ours = NaViT(NaViTConfig.from_dict(PUBLISHED))
        config = transformers.VideoLlama3VisionConfig(**PUBLISHED)
        theirs = transformers.VideoLlama3VisionModel(config)
    expected = {name: weight.shape for name, weight in theirs.named_parameters()}
    assert {name: weight.shape for name, weight in ours.named_parameters()} == expected


@pytest.mark.parametrize("given", [{}, PUBLISHED, {"rope_theta": 50.0}])
def test_defaults_and_what_is_written(given: dict[str, Any]) -> None:
    theirs = transformers.VideoLlama3VisionConfig(**given)
    ours = NaViTConfig.from_dict(given)
    written = ours.to_dict()
    for config in (theirs, transformers.VideoLlama3VisionConfig(**written)):
        values = config.to_dict()
        assert {name: values[name] for name in written} == written
    assert NaViTConfig.from_dict(written) == ours
    assert NaViTConfig.from_dict({**written, "hidden_act": None}) == ours


def test_the_native_name() -> None:
    native = {"model_type": "videollama3_vision_encoder", **PUBLISHED}
    ours = NaViTConfig.from_dict(native)
    assert ours == NaViTConfig.from_dict(PUBLISHED)
    assert (ours.hidden_act, ours.layer_norm_eps) == ("gelu_pytorch_tanh", 1e-6)
    assert (ours.rope_theta, ours.head_dim) == (10000.0, 72)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "siglip_vision_model"}, "siglip_vision_model"),
        ({"num_channels": 1}, "num_channels=1"),
        ({"patch_size": [14, 14]}, r"patch_size=\[14, 14\]"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_type 'linear'"),
        ({"num_attention_heads": 5}, "num_attention_heads=5"),
        ({"hidden_size": 24, "num_attention_heads": 4}, "multiple of 4"),
    ],
)
def test_unsupported_switches_are_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModel, match=said):
        NaViTConfig.from_dict({**SIZES, **change})
