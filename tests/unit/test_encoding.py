"""Media are encoded a chunk of frames at a time, and what has its features is left alone."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import slowfast_forms
import tiny
from vidlm.errors import InvalidArgument
from vidlm.models import base, tower
from vidlm.models.base import Encoded, Media, Rows, VideoModel, finished
from vidlm.models.llava import LlavaConfig, LlavaNetwork
from vidlm.models.llava_next_video import LlavaNextVideoConfig, LlavaNextVideoNetwork, TiledImage
from vidlm.models.slowfast import SlowFastConfig, SlowFastNetwork, fast
from vidlm.models.video_llava import VideoLlavaConfig, VideoLlavaNetwork
from vidlm.models.videollama3 import Patches, VideoLlama3Config, VideoLlama3Network
from vidlm.vision import convnext, navit

TEXT = {**tiny.TEXT, "model_type": "qwen2"}
CLIP = {**tiny.VISION, "model_type": "clip_vision_model"}
NAVIT = {**tiny.VISION, "model_type": "video_llama_3_vision", "patch_size": 4}
PINPOINTS = [[28, 56], [56, 28]]


def pixels(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def frames(count: int, side: int = 28) -> Media:
    return Media(pixels(count, 3, side, side), 0, "video", count)


def patches(count: int) -> Patches:
    kept = torch.arange(count * 6) % 5 > 0
    kept[6:12] = False  # the second frame says nothing new at all
    rows = pixels(count * 24, 48)
    return Patches(rows, int(kept.sum()), "video", count, (count, 4, 6), 2, kept, (0.0,) * count)


def llava() -> VideoModel:
    return LlavaNetwork(LlavaConfig(vision_config=CLIP, text_config=TEXT))


def next_video() -> VideoModel:
    config = {"vision_config": CLIP, "text_config": TEXT, "image_grid_pinpoints": PINPOINTS}
    return LlavaNextVideoNetwork(LlavaNextVideoConfig(**config))


def video_llava() -> VideoModel:
    return VideoLlavaNetwork(VideoLlavaConfig(vision_config=CLIP, text_config=TEXT))


def videollama3() -> VideoModel:
    return VideoLlama3Network(VideoLlama3Config(text_config=TEXT, vision_config=NAVIT))


def slowfast() -> VideoModel:
    return SlowFastNetwork(SlowFastConfig.from_dict(slowfast_forms.CONFIG))


@dataclass(frozen=True)
class Case:
    """A family, media of it, and into how many chunks two frames at a time part these."""

    make: Callable[[], VideoModel]
    media: tuple[Media, ...]
    chunks: int


CASES = {
    # Five images are packed whatever video they are of.
    "llava": Case(llava, tuple(Media(pixels(3, 28, 28) + i, 16) for i in range(5)), 3),
    "next": Case(
        next_video, (TiledImage(pixels(3, 3, 28, 28), 0, size=(28, 56)), frames(5)), 2 + 3
    ),
    "video-llava": Case(video_llava, (Media(pixels(3, 28, 28), 16), frames(4)), 1 + 2),
    "videollama3": Case(
        videollama3, (Patches(pixels(24, 48), 6, grid=(1, 4, 6), merge=2), patches(5)), 1 + 3
    ),
    "slowfast": Case(slowfast, (frames(1, 128), frames(21, 128)), 1 + 11),
}


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Case:
    """Two frames a chunk."""
    monkeypatch.setattr(tower, "CHUNK", 2)
    monkeypatch.setattr("vidlm.models.llava.CHUNK", 2)
    monkeypatch.setattr(navit, "PATCHES", 48)
    monkeypatch.setattr(convnext, "MAP", 2 * 32 * 32 * 8 * 4)
    found: Case = CASES[request.param]
    return found


def made(case: Case) -> VideoModel:
    model = case.make().eval()
    tiny.randomise(model)
    return model.requires_grad_(False)


def counted(steps: Generator[None, None, list[Encoded]]) -> tuple[int, list[Encoded]]:
    """How often it yields, and what it returns."""
    yields = 0
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return yields, end.value
        yields += 1


def equal(mine: list[Encoded], other: list[Encoded]) -> bool:
    same = torch.allclose
    return all(
        same(a.tokens, b.tokens, atol=1e-5)
        and (a.memory is None) == (b.memory is None)
        and (a.memory is None or b.memory is None or same(a.memory, b.memory, atol=1e-5))
        for a, b in zip(mine, other, strict=True)
    )


def test_chunks_are_bounded_and_their_sum_is_the_whole(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(case)
    yields, found = counted(model.encoding(case.media))
    assert yields == case.chunks
    monkeypatch.undo()  # all frames of an item at once
    assert equal(found, model.encode(case.media))


def test_pixels_are_cast_a_chunk_at_a_time(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(case).to(torch.bfloat16)
    cast: list[int] = []
    real = Tensor.to

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = real(self, *args, **kwargs)
        if self.dtype == torch.float32 and out.dtype == torch.bfloat16:
            cast.append(self.numel())
        return out

    monkeypatch.setattr(Tensor, "to", to)
    model.encode(case.media)
    assert cast
    frame = max(item.pixels.numel() // item.frames for item in case.media)
    assert max(cast) <= 4 * frame  # of Slow-Fast twice as many are together in half the bytes


def test_features_that_are_there_are_kept(case: Case) -> None:
    model = made(case)
    whole = model.encode(case.media)
    there = Encoded(torch.full((3, 5), 7.0))
    mixed = [replace(case.media[0], encoded=there), *case.media[1:]]
    yields, found = counted(model.encoding(mixed))
    assert found[0] is there
    assert equal(found[1:], whole[1:])
    assert yields <= case.chunks
    none = [replace(item, encoded=there) for item in case.media]
    assert counted(model.encoding(none)) == (0, [there] * len(none))
    assert counted(model.encoding([])) == (0, [])


def test_an_item_kept_without_pixels(case: Case) -> None:
    model = made(case)
    item = case.media[-1]
    (features,) = model.encode([item])
    small = item.without_pixels(features)
    assert small.pixels.numel() == 0
    assert model.encode([small]) == [features]
    with pytest.raises(InvalidArgument, match="give the video or image again"):
        model.encode([item.without_pixels()])


def test_gradients_reach_the_weights_from_every_chunk(case: Case) -> None:
    model = made(case).requires_grad_(True)
    loss = sum((item.tokens.square().sum() for item in model.encode(case.media)), torch.zeros(()))
    loss.backward()
    first = next(p for n, p in model.named_parameters() if "patch_embedding" in n or "stem" in n)
    chunked = first.grad
    assert chunked is not None
    twin = made(case).requires_grad_(True)
    monkeypatch = pytest.MonkeyPatch()
    with monkeypatch.context() as patch:
        patch.setattr(tower, "CHUNK", 100)
        patch.setattr("vidlm.models.llava.CHUNK", 100)
        patch.setattr(navit, "PATCHES", 10000)
        patch.setattr(convnext, "MAP", 1 << 30)
        whole = twin.encode(case.media)
    sum((item.tokens.square().sum() for item in whole), torch.zeros(())).backward()
    other = next(p for n, p in twin.named_parameters() if "patch_embedding" in n or "stem" in n)
    assert torch.allclose(chunked, other.grad, rtol=1e-3, atol=1e-3 * float(chunked.abs().max()))


@pytest.mark.parametrize("family", ["llava", "next", "video-llava"])
def test_another_layer_is_for_what_is_encoded(family: str) -> None:
    case = CASES[family]
    model = made(case)
    usual, other = model.encode(case.media), model.encode(case.media, layers=1)
    assert not equal(usual, other)
    there = [replace(case.media[0], encoded=usual[0])]
    with pytest.raises(InvalidArgument, match="cannot be encoded in another way"):
        model.encode(there, layers=1)
    with pytest.raises(TypeError, match="layer"):
        model.encode(case.media, layer=1)


def test_frames_of_a_video_do_not_hold_each_others_memory() -> None:
    case = CASES["llava"]
    for item in made(case).encode(case.media):
        assert item.tokens.untyped_storage().nbytes() == item.tokens.nbytes


def test_rows_come_together_as_they_came(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [pixels(2, 3), pixels(0, 3), pixels(1, 3)]
    rows = Rows(3)
    for part in parts:
        rows.add(part)
    monkeypatch.setattr(base.torch, "cat", None)  # which would hold everything twice
    assert rows.whole().equal(torch.vstack(parts))


def test_what_a_generator_returns() -> None:
    def steps() -> Generator[None, None, int]:
        yield
        yield
        return 7

    assert finished(steps()) == 7


@pytest.mark.parametrize("count", [16, 64, 65])
def test_groups_of_fast_tokens_a_few_at_a_time(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers, whatever is taken at a time, and as by one mean over everything."""
    config = SlowFastConfig.from_dict(slowfast_forms.CONFIG)
    x = pixels(count, 4, 8).to(torch.bfloat16)
    found = fast(x, config)
    monkeypatch.setattr("vidlm.models.slowfast.GROUPS", 1)
    assert found.equal(fast(x, config))
    whole = x[: count // 4 * 4].float().unflatten(0, (-1, 4)).mean(1).to(x.dtype)
    assert found.equal(whole)
