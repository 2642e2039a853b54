"""Questions about the demo world: every answer is worked out again, from paths and events."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidlm.demo.questions import (
    CLIP_KINDS,
    PAIR_KINDS,
    QA,
    ask_one,
    corpus,
    follow_up,
    kinds,
    pair_questions,
    questions,
    right,
)
from vidlm.demo.world import COLOURS, DIRECTIONS, SHAPES, Clip, Thing, draw_clip, draw_pair
from vidlm.errors import InvalidArgument

seeds = st.integers(0, 2**32 - 1)
RED_CIRCLE = ("circle", "red", (0.4, 0.5))
BLUE_STAR = ("star", "blue", (0.2, 0.2))
COLOUR, SHAPE = "|".join(COLOURS), "|".join(SHAPES)
MENTION = re.compile(rf"\b({COLOUR})\b(?: ({SHAPE})\b)?|\b({SHAPE})\b")


def clip_of(*looks: tuple[str, str, tuple[float, float]], travel: float = 0.0) -> Clip:
    """Things of a shape, a colour and a start that stay still or move right."""
    speed = None if not travel else "slow" if travel < 0.3 else "fast"
    way = "right" if travel else "still"
    things = [
        Thing(shape, colour, way, speed, "stays", 0.0, (x, y), (x + travel, y), 0.12)
        for shape, colour, (x, y) in looks
    ]
    return Clip(tuple(things), "plain", seed=3)


def mentioned(clip: Clip, question: str) -> list[Thing]:
    """What a question names, each by colour, by shape or both; it must be clear what is meant."""
    found = []
    for match in MENTION.finditer(question):
        colour, shape = match[1], match[2] or match[3]
        fits = [t for t in clip.things if colour in (None, t.colour) and shape in (None, t.shape)]
        assert len(fits) == 1, question
        found += fits
    return found


def way_of(each: Thing) -> str:
    moved = np.subtract(each.end, each.start)
    if not moved.any():
        return "still"
    axis = int(np.abs(moved).argmax())
    return (("left", "right"), ("up", "down"))[axis][int(moved[axis] > 0)]


def pace_of(each: Thing) -> int:
    travel = np.abs(np.subtract(each.end, each.start)).sum()
    return 0 if travel == 0 else 1 if travel < 0.3 else 2


def motion(each: Thing) -> str:
    return "stays still" if way_of(each) == "still" else f"moves {way_of(each)}"


def first_seen(each: Thing) -> float:
    return each.event_time if each.event == "appears" else 0.0


def answer_where(clip: Clip, question: str, each: Thing) -> str:
    at_start = question.endswith("at the start?")
    assert at_start or question.endswith("at the end?")
    assert each.event != ("appears" if at_start else "leaves"), "it cannot be seen then"
    across = "left" in question
    assert across == ("top" not in question)
    # Whichever frame a reader takes for the last one, the answer is the same.
    times = [0.0] if at_start else [7 / 8, 11 / 12, 23 / 24]
    sides = {bool(each.at(t)[0 if across else 1] > 0.5) for t in times}
    (beyond,) = sides
    assert abs(each.at(times[0])[0 if across else 1] - 0.5) > 0.08
    if across:
        return f"It is on the {'right' if beyond else 'left'}."
    return f"It is at the {'bottom' if beyond else 'top'}."


def answer_description(clip: Clip) -> str:
    said = []
    for each in sorted(clip.things, key=lambda t: list(COLOURS).index(t.colour)):
        article = "An" if each.colour == "orange" else "A"
        parts = [motion(each) + ("", " slow", " fast")[pace_of(each)]]
        parts = ["appears", *parts] if each.event == "appears" else parts
        parts = [*parts, "leaves"] if each.event == "leaves" else parts
        said.append(f"{article} {each.colour} {each.shape} {' and '.join(parts)}.")
    return " ".join(said)


def answer(clip: Clip, qa: QA) -> str:
    """The answer of a question about one clip, from the question's words alone."""
    named = mentioned(clip, qa.question)
    if qa.kind == "count":
        return (
            f"There {('is one shape', 'are two shapes', 'are three shapes')[len(clip.things) - 1]}."
        )
    if qa.kind == "describe":
        return answer_description(clip)
    if qa.kind == "compare":
        one, two = named
        assert pace_of(one) != pace_of(two)
        yes = pace_of(one) > pace_of(two)
        faster = one if yes else two
        return f"{'Yes' if yes else 'No'}, the {faster.colour} {faster.shape} is faster."
    if qa.kind == "order":
        choice = sorted(named or clip.things, key=first_seen)
        assert first_seen(choice[0]) < first_seen(choice[1])
        return f"The {choice[0].colour} {choice[0].shape} comes first."
    (each,) = named or clip.things
    if qa.kind == "where":
        return answer_where(clip, qa.question, each)
    return {
        "shape": f"It is a {each.shape}.",
        "colour": f"It is {each.colour}.",
        "direction": f"It {motion(each)}.",
        "event": f"It {each.event}.",
    }[qa.kind]


@given(seeds)
@settings(max_examples=150, deadline=None)
def test_every_answer_follows_from_the_clip(seed: int) -> None:
    rng = np.random.default_rng(seed)
    clip = draw_clip(rng)
    asked = questions(clip, rng)
    assert {"shape", "direction", "count", "event", "describe"} <= {qa.kind for qa in asked}
    for qa in asked:
        assert qa.answer == answer(clip, qa), qa
        assert qa.question[-1] in "?."
        if qa.kind in ("shape", "colour"):
            assert qa.answer.split()[-1].rstrip(".") not in qa.question.split()
    for kind in CLIP_KINDS[:-1]:
        one = ask_one(clip, kind, rng)
        assert (one is None) == (kind not in {qa.kind for qa in asked})
        assert one is None or (one.kind == kind and one.answer == answer(clip, one))


@given(seeds)
@settings(max_examples=100, deadline=None)
def test_a_follow_up_is_about_the_first_turn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    clip = draw_clip(rng)
    first, second = follow_up(clip, rng)
    assert first.answer == answer(clip, first)
    assert second.kind == "follow_up"
    assert " it " in second.question
    assert mentioned(clip, second.question) == []
    (each,) = mentioned(clip, first.question)
    assert second.answer == (
        f"It {each.event}." if "appear" in second.question else f"It {motion(each)}."
    )
    assert second.answer != first.answer or second.answer == "It stays."


@given(seeds)
@settings(max_examples=60, deadline=None)
def test_answers_about_pairs_follow_from_both_clips(seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second, difference = draw_pair(rng)
    (a,), (b,) = first.things, second.things
    asked = {qa.kind: qa.answer for qa in pair_questions(first, second, rng)}
    both = "stay still" if way_of(a) == "still" else f"move {way_of(a)}"
    no = f"No, the first {motion(a)} and the second {motion(b)}."
    assert asked["same"] == (f"Yes, both {both}." if way_of(a) == way_of(b) else no)
    differ = {
        "nothing": "Nothing differs.",
        "colour": f"The colour: {a.colour}, then {b.colour}.",
        "shape": f"The shape: {a.shape}, then {b.shape}.",
        "direction": f"The direction: {way_of(a)}, then {way_of(b)}.",
    }
    assert asked["differ"] == differ[difference]


def test_pairs_that_differ_in_more_are_refused() -> None:
    rng = np.random.default_rng(0)
    red, blue = clip_of(RED_CIRCLE), clip_of(BLUE_STAR)
    with pytest.raises(InvalidArgument, match="differ in colour and shape"):
        pair_questions(red, blue, rng)
    slow, fast = (clip_of(RED_CIRCLE, travel=travel) for travel in (0.15, 0.45))
    with pytest.raises(InvalidArgument, match="differ in speed"):
        pair_questions(slow, fast, rng)
    with pytest.raises(InvalidArgument, match="one thing in each clip"):
        pair_questions(red, clip_of(RED_CIRCLE, BLUE_STAR), rng)


def test_twins_are_never_called_by_their_shape_alone() -> None:
    clip = clip_of(BLUE_STAR, ("star", "red", (0.7, 0.7)))
    rng = np.random.default_rng(0)
    for _ in range(20):
        asked = questions(clip, rng)
        assert "colour" not in {qa.kind for qa in asked}
        assert not [qa for qa in asked if re.search(r"\bthe star\b", qa.question)]
    assert ask_one(clip, "colour", rng) is None


def test_places_near_the_middle_are_not_asked_about() -> None:
    rng = np.random.default_rng(0)
    assert ask_one(clip_of(("star", "red", (0.57, 0.43))), "where", rng) is None
    only = [ask_one(clip_of(("star", "red", (0.7, 0.5))), "where", rng) for _ in range(20)]
    assert {qa.answer for qa in only if qa} == {"It is on the right."}


def test_questions_are_limited_shuffled_and_worded_in_many_ways() -> None:
    clip = draw_clip(np.random.default_rng(7), count=3)
    rng = np.random.default_rng(0)
    asked = [questions(clip, rng, limit=5) for _ in range(100)]
    assert {len(some) for some in asked} == {5}
    assert len({some[0].kind for some in asked}) >= 6
    assert len({qa.question for some in asked for qa in some if qa.kind == "describe"}) >= 4


def test_answers_are_balanced() -> None:
    rng = np.random.default_rng(2)
    said: dict[str, Counter[str]] = {kind: Counter() for kind in kinds()}
    for _ in range(800):
        for kind in CLIP_KINDS[:-1]:
            qa = ask_one(draw_clip(rng), kind, rng)
            said[kind].update([qa.answer] if qa else [])
        for qa in pair_questions(*draw_pair(rng)[:2], rng):
            said[qa.kind][qa.answer] += 1
    yes = sum(n for text, n in said["compare"].items() if text.startswith("Yes"))
    assert 0.43 < yes / said["compare"].total() < 0.57
    for kind, ways in (("direction", 5), ("count", 3), ("shape", 5), ("colour", 9), ("where", 4)):
        assert len(said[kind]) == ways
        assert all(abs(n * ways / said[kind].total() - 1) < 0.4 for n in said[kind].values()), kind
    assert said["event"].keys() == {"It stays.", "It appears.", "It leaves."}
    no = sum(n for text, n in said["same"].items() if text.startswith("No"))
    assert 0.22 < no / said["same"].total() < 0.38


def test_the_first_mention_does_not_tell_what_comes_first() -> None:
    there = clip_of(RED_CIRCLE).things[0]
    late = replace(clip_of(BLUE_STAR).things[0], event="appears", event_time=0.5)
    rng = np.random.default_rng(3)
    asked = [ask_one(Clip((there, late), "plain", 3), "order", rng) for _ in range(200)]
    assert {qa.answer for qa in asked if qa} == {"The red circle comes first."}
    named = [qa.question for qa in asked if qa and " or " in qa.question]
    assert 0.35 < np.mean(["red circle or" in question for question in named]) < 0.65


def test_every_kind_can_be_asked() -> None:
    assert kinds() == CLIP_KINDS + PAIR_KINDS
    assert len(set(kinds())) == 12


@pytest.mark.parametrize("kind", ["same", "follow_up", "colours"])
def test_kinds_that_one_clip_does_not_have_are_refused(kind: str) -> None:
    with pytest.raises(InvalidArgument, match=kind):
        ask_one(clip_of(RED_CIRCLE), kind, np.random.default_rng(0))


DESCRIBED = QA(
    "describe", "Describe the clip.", "A blue star stays still. A red cross moves up fast."
)
TOLD = QA("direction", "Which way does the red circle move?", "It moves left.")


@pytest.mark.parametrize(
    ("qa", "text"),
    [
        (TOLD, "It moves left."),
        (TOLD, "  it  moves LEFT\n"),
        (TOLD, "It moves left!"),
        (DESCRIBED, "A red cross moves up fast. A blue star stays still."),
        (DESCRIBED, "a blue star stays still.\nA red cross moves up fast"),
    ],
)
def test_right_answers(qa: QA, text: str) -> None:
    assert right(qa, text)


@pytest.mark.parametrize(
    ("qa", "text"),
    [
        (TOLD, ""),
        (TOLD, "It moves right."),
        (TOLD, "left"),
        (TOLD, "It moves left. It moves right."),
        (TOLD, "It moves left fast."),
        (DESCRIBED, "A blue star stays still."),
        (
            DESCRIBED,
            "A blue star stays still. A red cross moves up fast. A red cross moves up fast.",
        ),
        (DESCRIBED, "A blue star stays still. A red cross moves up slow."),
        (DESCRIBED, "A blue star stays still and a red cross moves up fast."),
    ],
)
def test_wrong_answers(qa: QA, text: str) -> None:
    assert not right(qa, text)


def test_the_corpus_has_every_word_of_the_world() -> None:
    texts = list(corpus(np.random.default_rng(0), 120))
    words = set(re.findall(r"[a-z]+", " ".join(texts).lower()))
    assert words >= {*SHAPES, *COLOURS, *DIRECTIONS, "slow", "fast", "appears", "leaves", "three"}
    assert words >= {"faster", "nothing", "both", "top", "bottom", "first", "colour"}
    assert texts == list(corpus(np.random.default_rng(0), 120))
