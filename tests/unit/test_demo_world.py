"""The demo world: clips keep its rules, and frames and files show what the clip says."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vidlm.demo.questions import follow_up, questions
from vidlm.demo.world import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    LUMA,
    SHAPES,
    Clip,
    Thing,
    augment,
    background,
    draw_clip,
    draw_pair,
    render,
    reversed_clip,
    sampled_times,
    write_mp4,
)
from vidlm.errors import InvalidArgument

seeds = st.integers(0, 2**32 - 1)
EIGHT = sampled_times(8)
TOWARDS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


def thing(
    shape: str = "circle",
    colour: str = "red",
    start: tuple[float, float] = (0.5, 0.5),
    end: tuple[float, float] | None = None,
    event: str = "stays",
    event_time: float = 0.0,
) -> Thing:
    """A thing whose direction and speed follow from its path."""
    end = end or start
    dx, dy = end[0] - start[0], end[1] - start[1]
    ways = [w for w, (x, y) in TOWARDS.items() if x * dx > 0 or y * dy > 0]
    speed = None if not ways else "slow" if abs(dx + dy) < 0.3 else "fast"
    way = ways[0] if ways else "still"
    return Thing(shape, colour, way, speed, event, event_time, start, end, 0.12)


def clip_of(*things: Thing, pattern: str = "plain") -> Clip:
    return Clip(things, pattern, seed=3)


def nearest_colour(frames: NDArray[np.uint8]) -> NDArray[np.str_]:
    """The name of the world's colour each pixel is, or "" for greyish and dark ones."""
    names = np.array(list(COLOURS))
    rgb = frames.astype(int)[..., None, :]
    far = np.abs(rgb - np.array(list(COLOURS.values()))).sum(-1)
    return np.where(far.min(-1) < 110, names[far.argmin(-1)], "")


def centroids(frames: NDArray[np.uint8], colour: str) -> NDArray[np.floating]:
    """Mean (x, y) of a colour in each frame, as fractions of the frame."""
    found = [np.argwhere(mask).mean(0)[::-1] for mask in nearest_colour(frames) == colour]
    return (np.array(found) + 0.5) / frames.shape[2]


def decode(path: Path) -> NDArray[np.uint8]:
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


# --- clips ---


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_the_same_seed_draws_the_same_world(seed: int) -> None:
    def draw() -> tuple[object, ...]:
        rng = np.random.default_rng(seed)
        clip, pair = draw_clip(rng), draw_pair(rng)
        frames = render(clip, 32, EIGHT, rng)
        return clip, pair, questions(clip, rng), follow_up(clip, rng), frames.tobytes()

    assert draw() == draw()


def test_different_seeds_draw_different_clips() -> None:
    assert len({draw_clip(np.random.default_rng(seed)) for seed in range(50)}) == 50


@given(seeds, st.sampled_from([1, 2, 3]))
@settings(max_examples=100, deadline=None)
def test_a_clip_keeps_the_worlds_rules(seed: int, count: int) -> None:
    clip = draw_clip(np.random.default_rng(seed), count=count)
    assert len(clip.things) == count
    assert clip.frames == 24
    assert clip.background in BACKGROUNDS
    assert len({each.colour for each in clip.things}) == count
    for each in clip.things:
        _check_path(each)
        _check_event(each)
    times = sorted(each.event_time for each in clip.things if each.event != "stays")
    assert all(gap >= 0.2 for gap in np.diff(times))


def _check_path(each: Thing) -> None:
    assert 0.10 <= each.radius <= 0.14
    for x, y in (each.start, each.end):
        assert each.radius - 1e-9 <= min(x, y)
        assert max(x, y) <= 1 - each.radius + 1e-9
    moved = np.subtract(each.end, each.start)
    travel = float(np.abs(moved).sum())
    if each.direction == "still":
        assert (travel, each.speed) == (0, None)
        return
    low, high = {"slow": (0.12, 0.20), "fast": (0.42, 0.60)}[str(each.speed)]
    assert low - 1e-9 <= travel <= high + 1e-9
    assert np.allclose(moved, np.multiply(TOWARDS[each.direction], travel))


def _check_event(each: Thing) -> None:
    low, high = {"stays": (0, 0), "appears": (0.25, 0.6), "leaves": (0.45, 0.75)}[each.event]
    assert low <= each.event_time <= high
    assert each.event == "stays" or each.speed != "slow"
    shown = each.event_time <= EIGHT if each.event == "appears" else each.event_time > EIGHT
    assert each.event == "stays" or 3 <= shown.sum() <= 6


@given(seeds)
@settings(max_examples=60, deadline=None)
def test_things_never_meet(seed: int) -> None:
    clip = draw_clip(np.random.default_rng(seed), count=3)
    for time in np.linspace(0, 1, 101)[:-1]:
        there = [each for each in clip.things if each.span()[0] <= time < each.span()[1]]
        for a, b in combinations(there, 2):
            apart = np.hypot(*np.subtract(a.at(time), b.at(time)))
            assert apart >= 1.15 * (a.radius + b.radius) - 1e-9


def test_draws_are_balanced() -> None:
    rng = np.random.default_rng(0)
    clips = [draw_clip(rng) for _ in range(1200)]
    things = [each for clip in clips for each in clip.things]

    def shares(values: Sequence[object]) -> dict[object, float]:
        return {k: n / len(values) for k, n in Counter(values).items()}

    assert all(abs(s - 1 / 3) < 0.05 for s in shares([len(c.things) for c in clips]).values())
    for attribute, options in (
        ("direction", DIRECTIONS),
        ("shape", SHAPES),
        ("colour", tuple(COLOURS)),
    ):
        found = shares([getattr(each, attribute) for each in things])
        assert found.keys() == set(options)
        assert all(abs(s * len(options) - 1) < 0.2 for s in found.values()), attribute
    assert 0.28 < 1 - shares([each.event for each in things])["stays"] < 0.40
    speeds = shares([each.speed for each in things if each.speed])
    assert 0.38 < speeds["slow"] < 0.55
    many = [clip for clip in clips if len(clip.things) > 1]
    again = np.mean([len({each.shape for each in c.things}) < len(c.things) for c in many])
    assert 0.15 < again < 0.25


@pytest.mark.parametrize("count", [0, 4, -1])
def test_a_clip_has_one_to_three_things(count: int) -> None:
    with pytest.raises(InvalidArgument, match=f"count is {count}"):
        draw_clip(np.random.default_rng(0), count=count)


def test_without_events_everything_stays() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        assert {each.event for each in draw_clip(rng, events=False).things} == {"stays"}


def test_pairs_differ_in_what_they_say_and_in_nothing_else() -> None:
    rng = np.random.default_rng(1)
    seen: Counter[str] = Counter()
    for _ in range(600):
        first, second, difference = draw_pair(rng)
        (a,), (b,) = first.things, second.things
        assert (a.event, b.event) == ("stays", "stays")
        names = ("colour", "shape", "direction")
        changed = [name for name in names if getattr(a, name) != getattr(b, name)]
        assert changed == ([] if difference == "nothing" else [difference])
        assert a.speed == b.speed or "still" in (a.direction, b.direction)
        assert a.start != b.start
        for each in (a, b):
            _check_path(each)
        seen[difference] += 1
    assert 0.34 < seen["nothing"] / 600 < 0.46
    assert 0.24 < seen["direction"] / 600 < 0.36
    assert min(seen["colour"], seen["shape"]) > 60


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_reversing_a_clip_twice_gives_it_back(seed: int) -> None:
    clip = draw_clip(np.random.default_rng(seed))
    back = reversed_clip(clip)
    for each, turned in zip(clip.things, back.things, strict=True):
        assert (turned.start, turned.end) == (each.end, each.start)
        assert turned.span() == tuple(1 - t for t in reversed(each.span()))
        if each.direction != "still":
            assert np.array_equal(TOWARDS[turned.direction], np.negative(TOWARDS[each.direction]))
    again = reversed_clip(back)
    assert [e.direction for e in again.things] == [e.direction for e in clip.things]
    assert [e.event for e in again.things] == [e.event for e in clip.things]
    assert np.allclose([e.event_time for e in again.things], [e.event_time for e in clip.things])


# --- frames ---


@pytest.mark.parametrize("total", [24, 25, 100])
@pytest.mark.parametrize("frames", [1, 4, 6, 8, 12, 24])
def test_sampled_times_follow_the_usual_rule(frames: int, total: int) -> None:
    expected = np.arange(0, total, total / frames).astype(int)
    assert np.array_equal(np.rint(sampled_times(frames, total) * total), expected)


def test_sampling_nothing_is_an_error() -> None:
    with pytest.raises(InvalidArgument, match="cannot sample 0 of 24"):
        sampled_times(0)


def test_render_gives_all_frames_unless_told_which() -> None:
    clip = draw_clip(np.random.default_rng(0))
    assert render(clip, 64).shape == (24, 64, 64, 3)
    assert np.array_equal(render(clip, 64, EIGHT), render(clip, 64)[::3])


def test_render_refuses_sizes_where_shapes_are_lost() -> None:
    with pytest.raises(InvalidArgument, match="size is 8"):
        render(draw_clip(np.random.default_rng(0)), 8)


@pytest.mark.parametrize("way", TOWARDS)
@pytest.mark.parametrize(("travel", "speed"), [(0.12, "slow"), (0.42, "fast")])
def test_motion_is_seen_in_the_pixels(way: str, travel: float, speed: str) -> None:
    step = np.array(TOWARDS[way])
    start, end = 0.5 - step * travel / 2, 0.5 + step * travel / 2
    mover = thing("star", "pink", (start[0], start[1]), (end[0], end[1]))
    assert (mover.direction, mover.speed) == (way, speed)
    path = centroids(render(clip_of(mover, pattern="stripes"), 64, EIGHT), "pink")
    expected = start + np.outer(EIGHT, end - start)
    assert np.abs(path - expected).max() < 0.01
    steps = np.diff(path, axis=0) @ step
    assert (steps > 0).all()


@pytest.mark.parametrize(
    ("event", "shown"),
    [("appears", [False] * 4 + [True] * 4), ("leaves", [True] * 4 + [False] * 4)],
)
def test_events_are_seen_in_the_pixels(event: str, shown: list[bool]) -> None:
    clip = clip_of(thing(event=event, event_time=0.5), thing("square", "blue", (0.2, 0.2)))
    names = nearest_colour(render(clip, 64, EIGHT))
    assert (names == "red").any((1, 2)).tolist() == shown
    assert (names == "blue").any((1, 2)).all()


def test_shapes_look_different_at_the_smallest_size() -> None:
    masks = {shape: render(clip_of(thing(shape)), 64, [0.0])[0, ..., 0] > 140 for shape in SHAPES}
    for a, b in combinations(SHAPES, 2):
        overlap = (masks[a] & masks[b]).sum() / (masks[a] | masks[b]).sum()
        assert overlap < 0.82, (a, b)
    assert len({mask.sum() for mask in masks.values()}) == len(SHAPES)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_fills_its_radius_and_is_whole_at_the_border(shape: str) -> None:
    def mask(x: float, y: float) -> NDArray[np.bool_]:
        return render(clip_of(thing(shape, "white", (x, y))), 200, [0.0])[0, ..., 0] > 160

    rows, columns = np.nonzero(mask(0.5, 0.5))  # radius 0.12: 24 pixels around 100
    assert min(rows.min(), columns.min()) >= 76
    assert max(rows.max(), columns.max()) <= 123
    assert min(np.ptp(rows), np.ptp(columns)) >= 0.75 * 47
    for x, y in ((0.12, 0.12), (0.88, 0.12), (0.12, 0.88), (0.88, 0.88)):
        assert mask(x, y).sum() == len(rows)


@pytest.mark.parametrize("pattern", BACKGROUNDS)
def test_a_small_render_is_a_large_one_scaled_down(pattern: str) -> None:
    things = [
        thing(s, c, (x, 0.5)) for s, c, x in zip(SHAPES, COLOURS, (0.2, 0.5, 0.8), strict=False)
    ]
    clip = clip_of(*things, pattern=pattern)
    small = render(clip, 64, [0.0])[0].astype(float)
    large = render(clip, 192, [0.0])[0].astype(float)
    shrunk = large.reshape(64, 3, 64, 3, 3).mean((1, 3))
    assert np.abs(small - shrunk)[16:48].mean() < 0.33  # the band that the shapes are in
    assert np.abs(small - shrunk).max() < 25


@given(seeds, st.sampled_from(BACKGROUNDS))
@settings(max_examples=40, deadline=None)
def test_backgrounds_are_dark_and_greyish(seed: int, pattern: str) -> None:
    tones = background(Clip((), pattern, seed), 64).astype(float)
    luma = tones @ LUMA
    assert luma.min() >= 15
    assert luma.max() <= 95
    assert np.ptp(tones, axis=-1).max() <= 30
    assert (np.ptp(luma) < 1) == (pattern == "plain")


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_augment_roughens_a_little(seed: int) -> None:
    rng = np.random.default_rng(seed)
    clip = draw_clip(rng)
    frames = render(clip, 64, EIGHT)
    rough = augment(frames, rng)
    assert (rough.shape, rough.dtype) == (frames.shape, np.uint8)
    change = rough.astype(int) - frames.astype(int)
    assert 0 < np.abs(change).mean() < 16
    names = nearest_colour(rough)
    for each in clip.things:
        seen = [i for i, t in enumerate(EIGHT) if each.span()[0] <= t < each.span()[1]]
        centres = [np.multiply(each.at(EIGHT[i]), 64).astype(int) for i in seen]
        assert {names[i, y, x] for i, (x, y) in zip(seen, centres, strict=True)} == {each.colour}


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_augment_mixes_chroma_and_keeps_luma_sharp(seed: int) -> None:
    stripes = np.zeros((1, 16, 16, 3), np.uint8)
    stripes[:, :, ::2], stripes[:, :, 1::2] = COLOURS["red"], COLOURS["cyan"]
    rough = augment(stripes, np.random.default_rng(seed)).astype(float)

    def contrast(frames: NDArray[np.floating]) -> tuple[float, float]:
        """Between the stripes: in luma, and in red less luma."""
        luma = frames @ LUMA
        both = luma, frames[..., 0] - luma
        return tuple(float((p[..., ::2] - p[..., 1::2]).mean()) for p in both)  # type: ignore[return-value]

    (luma, red), (luma_before, red_before) = contrast(rough), contrast(stripes.astype(float))
    assert -15 < red < 1.07 * red_before  # from gone, but for clipping, to as it was
    assert abs(luma / luma_before - 1) < 0.35


def test_augment_takes_batches_and_render_applies_it() -> None:
    clip = draw_clip(np.random.default_rng(4))
    frames = render(clip, 32, EIGHT)
    batch = augment(frames[None], np.random.default_rng(1))
    assert np.array_equal(batch[0], render(clip, 32, EIGHT, np.random.default_rng(1)))


@pytest.mark.parametrize("shape", [(1, 31, 32, 3), (1, 32, 32, 4)])
def test_augment_refuses_frames_it_cannot_blur(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidArgument, match=re.escape(str(shape))):
        augment(np.zeros(shape, np.uint8), np.random.default_rng(0))


# --- files ---


@pytest.mark.parametrize("part", range(3))
def test_colours_survive_a_real_video(part: int, tmp_path: Path) -> None:
    names = list(COLOURS)[part::3]
    things = [thing(SHAPES[part], c, (x, 0.5)) for c, x in zip(names, (0.2, 0.5, 0.8), strict=True)]
    write_mp4(clip_of(*things, pattern="checker"), tmp_path / "clip.mp4")
    frames = decode(tmp_path / "clip.mp4")
    assert frames.shape == (24, 192, 192, 3)
    small = frames.reshape(24, 64, 3, 64, 3, 3).mean((2, 4)).astype(np.uint8)
    found = nearest_colour(small)
    for each in things:
        column = int(each.start[0] * 64)
        assert (found[:, 32, column] == each.colour).all()
    assert set(np.unique(found[:, 32, [13, 32, 51]])) == set(names)


def test_a_video_played_backwards_moves_backwards(tmp_path: Path) -> None:
    mover = thing("square", "yellow", (0.25, 0.4), (0.75, 0.4))
    clip = clip_of(mover)
    write_mp4(clip, tmp_path / "on.mp4", size=64)
    write_mp4(clip, tmp_path / "back.mp4", size=64, backwards=True)
    on, back = (centroids(decode(tmp_path / f"{name}.mp4"), "yellow") for name in ("on", "back"))
    assert (np.diff(on[:, 0]) > 0).all()
    assert np.abs(back - on[::-1]).max() < 0.02
    assert np.abs(on[:, 0] - (0.25 + 0.5 * sampled_times(24))).max() < 0.02


def test_videos_have_even_sizes(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="size is 65"):
        write_mp4(clip_of(thing()), tmp_path / "odd.mp4", size=65)
    assert list(tmp_path.iterdir()) == []
