"""Which frames a policy takes: formulas, properties, and every bad value."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vidlm.errors import InvalidArgument
from vidlm.media.policy import FramePolicy, choose, seconds
from vidlm.media.sample import (
    between,
    by_fps,
    clamped,
    repeated_linspace,
    spread_over,
    strided,
    uniform_arange,
    uniform_linspace,
)

counts = st.integers(1, 400)


def grid(n: int, rate: float = 25, first: float = 0.0) -> np.ndarray:
    return first + np.arange(n) / rate


@st.composite
def clocks(draw: st.DrawFn) -> np.ndarray:
    """Presentation times with any gaps, on a grid of 1/64 s, exact in binary."""
    gaps = draw(st.lists(st.integers(1, 60), min_size=1, max_size=20))
    return np.cumsum(gaps) / 64


# ---- even spreads ----------------------------------------------------------------------------


@given(counts, counts)
def test_arange_is_the_published_formula(n: int, count: int) -> None:
    count = min(n, count)
    assert uniform_arange(n, count).tolist() == [int(i * n / count) for i in range(count)]


@given(counts, counts)
def test_linspace_is_numpys_from_first_to_last(n: int, count: int) -> None:
    count = min(n, count)
    rows = uniform_linspace(n, count)
    assert rows.tolist() == np.linspace(0, n - 1, count).astype(int).tolist()
    assert rows[0] == 0
    assert count == 1 or rows[-1] == n - 1


@pytest.mark.parametrize("spread", [uniform_arange, uniform_linspace])
def test_more_than_there_are_gives_each_once(spread) -> None:
    assert spread(5, 99).tolist() == [0, 1, 2, 3, 4]
    assert spread(0, 3).tolist() == []


# ---- by rate ---------------------------------------------------------------------------------


def test_fps_takes_the_frame_on_screen_at_each_tick() -> None:
    assert by_fps(grid(50), 5, stop=2.0).tolist() == [*range(0, 50, 5)]
    assert by_fps(grid(50), 1, stop=2.0).tolist() == [0, 25]
    assert by_fps(grid(10, rate=4), 3, stop=2.5).tolist() == [0, 1, 2, 4, 5, 6, 8, 9]


def test_fps_goes_by_time_where_the_rate_varies() -> None:
    pts = np.array([0.0, 0.1, 0.2, 3.0, 3.1, 6.0])
    assert by_fps(pts, 1, stop=8.0).tolist() == [0, 2, 3, 4, 5]


def test_fps_survives_stamps_rounded_to_milliseconds() -> None:
    pts = np.round(grid(300, rate=30, first=1 / 3), 3)
    assert by_fps(pts, 30).tolist() == [*range(300)]
    assert by_fps(pts, 10).tolist() == [*range(0, 300, 3)]


def test_fps_above_the_clips_own_repeats_nothing_and_costs_nothing() -> None:
    for fps in (60, 1e9, 1e308):
        assert by_fps(grid(50), fps, stop=2.0).tolist() == [*range(50)]
    assert by_fps(grid(5000, rate=4000), 4000).tolist() == [*range(5000)]
    assert by_fps(grid(50), 1e-320, stop=2.0).tolist() == [0]


def test_a_last_frame_is_taken_as_long_as_it_is_on_screen() -> None:
    pts = np.array([0.0, 1.0])
    assert by_fps(pts, 0.5, stop=2.0).tolist() == [0]
    assert by_fps(pts, 0.5, stop=2.5).tolist() == [0, 1]
    assert by_fps(pts, 1.0).tolist() == [0, 1]
    assert by_fps(np.array([7.0]), 2).tolist() == [0]


def test_ticks_count_from_a_later_start() -> None:
    # on screen at 1.5 and 2.5; then the tick at 3.5 is past the end
    assert by_fps(np.array([1.0, 2.0, 3.0]), 1, start=1.5, stop=3.5).tolist() == [0, 1]


@given(clocks(), st.integers(1, 200), st.integers(1, 90))
def test_fps_agrees_with_walking_the_ticks(pts: np.ndarray, tenths: int, hold: int) -> None:
    fps, stop, slack = tenths / 10, float(pts[-1] + hold / 64), 1e-3 + 1e-6
    shown, k = [0], 1
    while (moment := pts[0] + k / fps) < stop - slack or moment <= pts[-1] + slack:
        shown.append(int(np.searchsorted(pts - slack, moment, side="right")) - 1)
        k += 1
    assert by_fps(pts, fps, stop=stop).tolist() == sorted(set(shown))


# ---- the whole policy ------------------------------------------------------------------------


policies = st.fixed_dictionaries(
    {"max_frames": st.none() | counts},
    optional={"start": st.floats(0, 12), "end": st.floats(0.5, 15)},
).flatmap(
    lambda given: st.sampled_from([{}, {"num_frames": 7}, {"fps": 2.5}]).map(lambda o: given | o)
)


@given(clocks(), policies)
def test_any_choice_is_ascending_inside_and_capped(pts: np.ndarray, words: dict) -> None:
    stop = float(pts[-1]) + 0.25
    start, end = words.get("start", 0.0), words.get("end", math.inf)
    if start >= min(end, stop) or end <= pts[0]:
        with pytest.raises(InvalidArgument, match=r"start=|end="):
            choose(pts, FramePolicy(**words), stop=stop)
        return
    rows = choose(pts, FramePolicy(**words), stop=stop)
    assert 0 < len(rows) <= (words.get("max_frames") or len(pts))
    assert len(rows) <= words.get("num_frames", len(pts))
    assert (np.diff(rows) > 0).all()
    assert rows[0] >= 0
    assert rows[-1] < len(pts)
    leaves = np.append(pts[1:], stop)
    assert (leaves[rows] > start).all()
    assert (pts[rows] < end).all()


def take(n: int = 100, **words: object) -> list[int]:
    return choose(grid(n), FramePolicy(**words), stop=n / 25).tolist()  # type: ignore[arg-type]


def test_by_default_every_frame_is_taken() -> None:
    assert take(100) == [*range(100)]


def test_num_frames_and_its_ceiling() -> None:
    assert take(100, num_frames=8) == [0, 12, 25, 37, 50, 62, 75, 87]
    assert take(100, num_frames=8, max_frames=4) == [0, 25, 50, 75]
    assert take(5, num_frames=8) == [0, 1, 2, 3, 4]


def test_a_ceiling_thins_over_the_same_span() -> None:
    assert take(100, max_frames=4) == [0, 33, 66, 99]
    assert take(100, fps=5) == [*range(0, 100, 5)]
    assert take(100, fps=5, max_frames=3) == [0, 45, 95]
    assert take(100, fps=5, max_frames=20) == [*range(0, 100, 5)]


def test_a_window_holds_what_is_on_screen_in_it() -> None:
    assert take(start=1, end=1.2) == [25, 26, 27, 28, 29]
    assert take(start=1.03, end=1.05) == [25, 26]  # frame 25 is still on screen at 1.03
    assert take(start="00:03.9") == [97, 98, 99]
    assert take(start=1, end=3, num_frames=2) == [25, 50]
    assert take(start=0.5, fps=1) == [12, 37, 62, 87]


def test_a_window_beside_the_clip_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"start=4 s is beyond the end of the clip at 4 s"):
        take(start=4)
    late = grid(10, first=2.0)
    with pytest.raises(InvalidArgument, match=r"before end=1 s: the first one appears at 2 s"):
        between(late, None, 1.0, stop=3.0)
    assert between(late, 1.0, None, stop=3.0) == (0, 10)  # before the first frame: from that


# ---- values ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("0.5", 0.5),
        ("1:05", 65),
        ("01:05.25", 65.25),
        ("1:00:00", 3600),
        (" 90 ", 90),
        ("90:00", 5400),
    ],
)
def test_moments_as_text(text: str, value: float) -> None:
    assert seconds("start", text) == value


@pytest.mark.parametrize(
    "text", ["", "soon", "1:2:3:4", "-1:00", "1:75", "1:60:00", "1e3", "1:", "nan", "\u0661"]
)
def test_other_text_is_no_moment(text: str) -> None:
    with pytest.raises(InvalidArgument, match="is not a time"):
        FramePolicy(start=text)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"num_frames": 0}, "num_frames=0"),
        ({"num_frames": -3}, "num_frames=-3"),
        ({"num_frames": 2.5}, "num_frames=2.5"),
        ({"num_frames": True}, "num_frames=True"),
        ({"num_frames": "8"}, "num_frames='8'"),
        ({"max_frames": 0}, "max_frames=0"),
        ({"fps": 0}, "fps=0 is not above 0"),
        ({"fps": -1.0}, "fps=-1.0"),
        ({"fps": math.nan}, "fps=nan"),
        ({"fps": math.inf}, "fps=inf"),
        ({"fps": "2"}, "fps='2'"),
        ({"fps": 10**400}, "fps=1000"),
        ({"start": -1}, "start=-1 is negative"),
        ({"end": math.nan}, "end=nan"),
        ({"end": 0}, "start=0 s is not before end=0 s"),
        ({"start": [1]}, r"start=\[1\]"),
        ({"start": 5, "end": "00:05"}, "start=5 s is not before end=5 s"),
        ({"num_frames": 8, "fps": 1}, "num_frames=8 and fps=1 exclude each other"),
    ],
)
def test_a_senseless_policy_is_refused_by_name_and_value(words: dict, said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        FramePolicy(**words)


def test_numbers_of_numpy_are_numbers() -> None:
    assert take(100, num_frames=np.int64(2)) == [0, 50]
    assert take(100, fps=np.float32(0.5)) == [0, 50]


# ---- the rules of the references -------------------------------------------------------------


@given(counts, counts)
def test_linspace_repeats_to_reach_its_number(n: int, count: int) -> None:
    rows = choose(grid(n), FramePolicy(num_frames=count, sampling="linspace"), stop=n / 25)
    assert rows.tolist() == np.linspace(0, n - 1, count).astype(int).tolist()


def test_slowfasts_rules_by_the_published_table(shared: Path) -> None:
    table = shared / "golden" / "slowfast" / "preprocess" / "frame_indices.json"
    cases = json.loads(table.read_text("utf-8"))
    for case in cases["linspace"]:
        assert repeated_linspace(case["total"], case["n"]).tolist() == case["idx"]
    for case in (*cases["fps_then_uniform_eval"], *cases["fps_then_uniform_train"]):
        rows = strided(case["total"], case["n"], rate=case["fps"], fps=case["target_fps"])
        assert rows.tolist() == case["idx"]


@given(st.integers(1, 2000), st.sampled_from([10.0, 24.0, 25.0, 29.97, 60.0]), st.integers(1, 96))
def test_slowfasts_rule_is_its_formula(n: int, rate: float, count: int) -> None:
    step = max(round(rate / 2), 1)
    every = [*range(0, n, step)]
    expected = every
    if len(every) >= count:
        expected = [every[round((i + 1) * len(every) / count - 1)] for i in range(count)]
    assert strided(n, count, rate=rate, fps=2.0).tolist() == expected


@given(st.integers(1, 5000), st.sampled_from([12.0, 25.0, 29.97, 30.0, 60.0]))
def test_videollama3s_rule_is_torchs_arange(n: int, rate: float) -> None:
    count = int(min(max(n / rate, 4), 180, n))
    expected = torch.arange(0, n, n / count).int().tolist()
    rows = clamped(n, rate=rate, fps=1.0, least=4, most=180).tolist()
    assert rows == [row for row in expected if row < n]
    assert (
        rows == choose(grid(n, rate), FramePolicy(sampling="videollama3"), stop=n / rate).tolist()
    )


def test_videollama3_takes_at_least_four_frames() -> None:
    """The reference's own example: 95 frames at 29.97 a second are 3 seconds."""
    assert clamped(95, rate=29.97, fps=1.0, least=4, most=180).tolist() == [0, 23, 47, 71]


def test_the_least_that_fps_may_give() -> None:
    assert take(100, fps=0.1, min_frames=4) == [0, 25, 50, 75]
    assert take(100, fps=1, min_frames=2) == [0, 25, 50, 75]
    assert take(3, fps=1, min_frames=8) == [0, 1, 2]


# ---- key frames and shots --------------------------------------------------------------------


def marked(n: int, marks: list[int], **words: object) -> list[int]:
    policy = FramePolicy(**words)  # type: ignore[arg-type]
    return choose(grid(n), policy, stop=n / 25, marks=np.array(marks)).tolist()


def test_key_frames_are_thinned_evenly() -> None:
    keys = [0, 10, 30, 31, 80]
    assert marked(100, keys, sampling="keyframes") == keys
    assert marked(100, keys, sampling="keyframes", num_frames=3) == [0, 30, 80]
    assert marked(100, keys, sampling="keyframes", num_frames=9) == keys
    assert marked(100, keys, sampling="keyframes", start=0.4, end=1.24) == [10, 30]
    with pytest.raises(InvalidArgument, match="no key frame between start=2 and end=3"):
        marked(100, keys, sampling="keyframes", start=2, end=3)


def test_a_shot_gives_its_middle() -> None:
    assert marked(100, [0, 20, 60], sampling="scenes") == [10, 40, 80]
    assert marked(100, [0, 20, 60], sampling="scenes", max_frames=2) == [40, 80]
    assert marked(100, [0, 20, 60], sampling="scenes", num_frames=1) == [40]
    assert marked(100, [0, 20, 60], sampling="scenes", num_frames=5) == [10, 30, 50, 70, 90]
    assert marked(100, [0, 20, 60], sampling="scenes", start=1.2) == [45, 80]


@given(st.sets(st.integers(1, 199), max_size=30), st.integers(1, 300))
def test_frames_are_shared_out_over_shots(cuts: set[int], count: int) -> None:
    starts = np.array([0, *sorted(cuts)])
    rows = spread_over(starts, 200, count)
    assert len(rows) == min(count, 200)
    assert (np.diff(rows) > 0).all()
    shots = np.searchsorted(starts, rows, side="right") - 1
    assert len(set(shots.tolist())) == min(count, len(starts))


def test_pictures_have_no_key_frames() -> None:
    with pytest.raises(InvalidArgument, match="sampling='keyframes' needs a video file"):
        take(10, sampling="keyframes")


# ---- exactly these ---------------------------------------------------------------------------


def test_frames_by_number_come_in_the_order_asked_for() -> None:
    assert take(100, indices=[7, 3, 3, 99]) == [7, 3, 3, 99]
    assert take(100, indices=np.array([5, 6])) == [5, 6]
    with pytest.raises(InvalidArgument, match="indices with 100: the clip has 100 frames, 0 to 99"):
        take(100, indices=[0, 100])


def test_frames_by_time_are_those_on_screen() -> None:
    assert take(100, times=[0, 0.05, "0:02", 3.99]) == [0, 1, 50, 99]
    with pytest.raises(InvalidArgument, match="times with 4 s, which is beyond the end of the"):
        take(100, times=[1, 4])
    assert choose(grid(3, first=2.0), FramePolicy(times=[0.5]), stop=3.0).tolist() == [0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"sampling": "random"}, "sampling='random'; allowed: uniform, linspace"),
        ({"sampling": "linspace"}, "needs num_frames"),
        ({"sampling": "linspace", "num_frames": 10**9}, "at most 100000"),
        ({"sampling": "scenes", "fps": 2}, "fps=2 means nothing to sampling='scenes'"),
        ({"sampling": "keyframes", "min_frames": 2}, "min_frames=2 means nothing"),
        ({"min_frames": 4}, "give fps too"),
        ({"fps": 1, "min_frames": 9, "max_frames": 8}, "min_frames=9 is above max_frames=8"),
        ({"indices": [1], "num_frames": 8}, "indices and num_frames exclude each other"),
        ({"indices": [1], "times": [1]}, "indices and times exclude each other"),
        ({"times": [1], "start": 2}, "times and start exclude each other"),
        ({"indices": []}, "takes no frame"),
        ({"indices": [-1]}, "indices with -1"),
        ({"indices": [1.5]}, "indices with 1.5"),
        ({"indices": "12"}, "give a list"),
        ({"indices": 3}, "give a list"),
        ({"times": ["soon"]}, "times='soon' is not a time"),
    ],
)
def test_a_combination_that_means_nothing_is_refused(words: dict, said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        FramePolicy(**words)
