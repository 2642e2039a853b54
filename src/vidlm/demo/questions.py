"""Questions about clips of the demo world, each with its one right answer, and their scoring.

A kind is askable of a clip only where the answer is clear: a shape is called "the circle" only if
it is the only circle, speeds are compared only if they differ, order only if one is seen first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from numpy.random import Generator

from vidlm.demo.world import DIFFERENCES, Clip, Thing, draw_clip, draw_pair, sampled_times
from vidlm.errors import InvalidArgument

T = TypeVar("T")

CLIP_KINDS = (
    *("shape", "colour", "direction", "compare", "count", "order", "event", "where", "describe"),
    "follow_up",
)
PAIR_KINDS = ("same", "differ")
RANK = {None: 0, "slow": 1, "fast": 2}
MOST = 4  # of one kind in a pack, or places would crowd out the rest
OFF_AXIS = 0.08  # a thing this near the middle is neither left nor right
NUMBERS = {1: "There is one shape.", 2: "There are two shapes.", 3: "There are three shapes."}


@dataclass(frozen=True)
class QA:
    """A question of one kind, and the one text that answers it."""

    kind: str
    question: str
    answer: str


def kinds() -> tuple[str, ...]:
    """Every kind of question, those over two clips last."""
    return CLIP_KINDS + PAIR_KINDS


def questions(clip: Clip, rng: Generator, limit: int | None = None) -> list[QA]:
    """Questions that can be asked of a clip, shuffled: for a training pack, several of a kind."""
    found = []
    for ask in ASKERS.values():
        some = list(ask(clip, rng))
        found += [some[i] for i in rng.permutation(len(some))[:MOST]]
    return [found[i] for i in rng.permutation(len(found))][:limit]


def ask_one(clip: Clip, kind: str, rng: Generator) -> QA | None:
    """A random question of this kind, or None where the clip does not allow one.

    Not for the kinds that need more than a clip and a turn: `pair_questions` and `follow_up`.
    """
    if kind not in ASKERS:
        raise InvalidArgument(f"no question of kind {kind!r} about one clip: {', '.join(ASKERS)}")
    found = list(ASKERS[kind](clip, rng))
    return found[int(rng.integers(len(found)))] if found else None


def pair_questions(first: Clip, second: Clip, rng: Generator) -> list[QA]:
    """Both kinds of questions over the two clips of `draw_pair`, in random order.

    Two clips do the same thing if their things move the same way: a pair never differs in speed
    alone, so equal directions mean equal speeds too.
    """
    if len(first.things) != 1 or len(second.things) != 1:
        raise InvalidArgument("a pair has one thing in each clip; draw it with draw_pair")
    a, b = first.things[0], second.things[0]
    found = _differences(a, b)
    if len(found) > 1 or "speed" in found:
        raise InvalidArgument(
            f"the clips differ in {' and '.join(found)}; a pair differs in nothing or in one of "
            f"{', '.join(DIFFERENCES[1:])}: draw it with draw_pair"
        )
    both = [_same(a, b, rng), _differ(a, b, rng)]
    return both if rng.random() < 0.5 else both[::-1]


def follow_up(clip: Clip, rng: Generator) -> tuple[QA, QA]:
    """Two turns: the second says only "it" and means what the first was about."""
    thing = _pick(clip.things, rng)
    by_colour = _shape_of(thing, rng)
    moves = _direction_of(clip, thing, rng)
    by_shape = _colour_of(thing, rng) if _unique(clip, thing) else _shape_of(thing, rng)
    either = (_it_moves, _it_event)
    ways = ((by_colour, either), (moves, (_it_event,)), (by_shape, either))
    first, seconds = ways[int(rng.integers(len(ways)))]
    return first, _pick(seconds, rng)(thing, rng)


def right(qa: QA, text: str) -> bool:
    """Whether a text is the answer: the same sentences, in any order.

    Case, spaces and what ends a sentence do not matter; a sentence said twice is wrong.
    """
    return _sentences(text) == _sentences(qa.answer)


def corpus(rng: Generator, count: int) -> Iterator[str]:
    """Texts of `count` clips and pairs, for training a tokenizer."""
    for i in range(count):
        if i % 4:
            found = questions(clip := draw_clip(rng), rng)
            found += follow_up(clip, rng)
        else:
            found = pair_questions(*draw_pair(rng)[:2], rng)
        for qa in found:
            yield qa.question
            yield qa.answer


def _sentences(text: str) -> list[str]:
    parts = (" ".join(part.split()).casefold() for part in re.split(r"[.!?]", text))
    return sorted(part for part in parts if part)


def _pick(options: Sequence[T], rng: Generator) -> T:
    return options[int(rng.integers(len(options)))]


def _unique(clip: Clip, thing: Thing) -> bool:
    return sum(other.shape == thing.shape for other in clip.things) == 1


def _the(thing: Thing) -> str:
    return f"the {thing.colour} {thing.shape}"


def _name(clip: Clip, thing: Thing, rng: Generator) -> str:
    """The thing by colour and shape, sometimes by one of them where that is clear."""
    draw = rng.random()
    if draw < 0.2 and _unique(clip, thing):
        return f"the {thing.shape}"
    if draw > 0.85:
        return f"the {thing.colour} one"
    return _the(thing)


def _a(thing: Thing) -> str:
    article = "An" if thing.colour[0] in "aeiou" else "A"
    return f"{article} {thing.colour} {thing.shape}"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _way(thing: Thing) -> str:
    return "stays still" if thing.direction == "still" else f"moves {thing.direction}"


# --- one clip ---


def _shape_of(thing: Thing, rng: Generator) -> QA:
    wordings = (
        f"What shape is the {thing.colour} one?",
        f"Which shape is {thing.colour}?",
        f"What is the {thing.colour} thing?",
        f"What is the shape of the {thing.colour} thing?",
        f"The {thing.colour} one has what shape?",
    )
    return QA("shape", _pick(wordings, rng), f"It is a {thing.shape}.")


def _shape(clip: Clip, rng: Generator) -> Iterator[QA]:
    for thing in clip.things:
        yield _shape_of(thing, rng)
    if len(clip.things) == 1:
        wordings = ("Which shape is in the clip?", "Which shape do you see?", "What shape is it?")
        yield QA("shape", _pick(wordings, rng), f"It is a {clip.things[0].shape}.")


def _colour_of(thing: Thing, rng: Generator) -> QA:
    wordings = (
        f"What colour is the {thing.shape}?",
        f"What color is the {thing.shape}?",
        f"Which colour does the {thing.shape} have?",
        f"What is the colour of the {thing.shape}?",
        f"The {thing.shape} has what colour?",
    )
    return QA("colour", _pick(wordings, rng), f"It is {thing.colour}.")


def _colour(clip: Clip, rng: Generator) -> Iterator[QA]:
    for thing in clip.things:
        if _unique(clip, thing):
            yield _colour_of(thing, rng)


def _direction_of(clip: Clip, thing: Thing, rng: Generator) -> QA:
    name = _name(clip, thing, rng)
    wordings = (
        f"Which way does {name} move?",
        f"Which way is {name} moving?",
        f"In which direction does {name} move?",
        f"Where does {name} go?",
        f"How does {name} move?",
    )
    return QA("direction", _pick(wordings, rng), f"It {_way(thing)}.")


def _direction(clip: Clip, rng: Generator) -> Iterator[QA]:
    for thing in clip.things:
        yield _direction_of(clip, thing, rng)
    if len(clip.things) == 1:
        alone = ("Which way does it move?", "Which way does the shape move?")
        yield QA("direction", _pick(alone, rng), f"It {_way(clip.things[0])}.")


def _compare(clip: Clip, rng: Generator) -> Iterator[QA]:
    for a in clip.things:
        for b in clip.things:
            if RANK[a.speed] == RANK[b.speed]:
                continue
            yes = RANK[a.speed] > RANK[b.speed]
            wordings = (
                f"Is {_the(a)} faster than {_the(b)}?",
                f"Does {_the(a)} move faster than {_the(b)}?",
                f"Is {_the(a)} quicker than {_the(b)}?",
            )
            faster = _the(a if yes else b)
            answer = f"{'Yes' if yes else 'No'}, {faster} is faster."
            yield QA("compare", _pick(wordings, rng), answer)


def _count(clip: Clip, rng: Generator) -> Iterator[QA]:
    wordings = (
        "How many shapes are there?",
        "How many shapes are in the clip?",
        "How many shapes do you see?",
        "How many things are there?",
        "What is the number of shapes?",
    )
    yield QA("count", _pick(wordings, rng), NUMBERS[len(clip.things)])


def _order(clip: Clip, rng: Generator) -> Iterator[QA]:
    for i, a in enumerate(clip.things):
        for b in clip.things[i + 1 :]:
            if a.span()[0] == b.span()[0]:
                continue
            one, two = (a, b) if rng.random() < 0.5 else (b, a)
            first = a if a.span()[0] < b.span()[0] else b
            wordings = (
                f"What comes first, {_the(one)} or {_the(two)}?",
                f"Which comes first, {_the(one)} or {_the(two)}?",
                f"Which is seen first, {_the(one)} or {_the(two)}?",
                f"What is there first, {_the(one)} or {_the(two)}?",
            )
            yield QA("order", _pick(wordings, rng), f"{_capital(_the(first))} comes first.")
    starters = [thing for thing in clip.things if thing.span()[0] == 0]
    if len(starters) == 1 and len(clip.things) > 1:
        openly = ("What comes first?", "Which shape comes first?", "What is seen first?")
        yield QA("order", _pick(openly, rng), f"{_capital(_the(starters[0]))} comes first.")


def _event(clip: Clip, rng: Generator) -> Iterator[QA]:
    for thing in clip.things:
        name = _name(clip, thing, rng)
        wordings = (
            f"Does {name} stay, appear or leave?",
            f"Does {name} appear, leave or stay?",
            f"Does {name} leave, stay or appear?",
            f"What does {name} do: stay, appear or leave?",
        )
        yield QA("event", _pick(wordings, rng), f"It {thing.event}.")


def _where(clip: Clip, rng: Generator) -> Iterator[QA]:
    last = float(sampled_times(8, clip.frames)[-1])
    for thing in clip.things:
        moments = []
        if thing.event != "appears":
            moments.append(("at the start", thing.at(0.0)))
        if thing.event != "leaves":
            moments.append(("at the end", thing.at(last)))
        for when, (x, y) in moments:
            name = _name(clip, thing, rng)
            if abs(x - 0.5) > OFF_AXIS:
                side = "left" if x < 0.5 else "right"
                question = f"Is {name} on the left or on the right {when}?"
                yield QA("where", question, f"It is on the {side}.")
            if abs(y - 0.5) > OFF_AXIS:
                side = "top" if y < 0.5 else "bottom"
                question = f"Is {name} at the top or at the bottom {when}?"
                yield QA("where", question, f"It is at the {side}.")


def sentence(thing: Thing) -> str:
    """What one thing does, as a sentence of a description."""
    moves = _way(thing) if thing.speed is None else f"{_way(thing)} {thing.speed}"
    if thing.event == "appears":
        return f"{_a(thing)} appears and {moves}."
    return (
        f"{_a(thing)} {moves} and leaves." if thing.event == "leaves" else f"{_a(thing)} {moves}."
    )


def _describe(clip: Clip, rng: Generator) -> Iterator[QA]:
    wordings = (
        "Describe the clip.",
        "Describe the video.",
        "What happens?",
        "What happens in the clip?",
        "What do you see?",
        "Tell me what happens.",
    )
    things = sorted(clip.things, key=lambda thing: thing.colour)
    yield QA("describe", _pick(wordings, rng), " ".join(map(sentence, things)))


ASKERS: Mapping[str, Callable[[Clip, Generator], Iterator[QA]]] = {
    "shape": _shape,
    "colour": _colour,
    "direction": _direction,
    "compare": _compare,
    "count": _count,
    "order": _order,
    "event": _event,
    "where": _where,
    "describe": _describe,
}


# --- a second turn, and two clips ---


def _it_moves(thing: Thing, rng: Generator) -> QA:
    wordings = (
        "Which way does it move?",
        "And which way does it move?",
        "In which direction does it move?",
        "How does it move?",
    )
    return QA("follow_up", _pick(wordings, rng), f"It {_way(thing)}.")


def _it_event(thing: Thing, rng: Generator) -> QA:
    wordings = (
        "Does it stay, appear or leave?",
        "And does it stay, appear or leave?",
        "Does it appear, leave or stay?",
    )
    return QA("follow_up", _pick(wordings, rng), f"It {thing.event}.")


def _same(a: Thing, b: Thing, rng: Generator) -> QA:
    wordings = (
        "Do both clips move the same way?",
        "Are both clips doing the same thing?",
        "Are the shapes in these two clips doing the same thing?",
        "Is the same thing happening in both clips?",
    )
    if a.direction == b.direction:
        both = "stay still" if a.direction == "still" else f"move {a.direction}"
        return QA("same", _pick(wordings, rng), f"Yes, both {both}.")
    answer = f"No, the first {_way(a)} and the second {_way(b)}."
    return QA("same", _pick(wordings, rng), answer)


def _differ(a: Thing, b: Thing, rng: Generator) -> QA:
    wordings = (
        "What differs between the two clips?",
        "What is different in the second clip?",
        "What differs?",
        "What is the difference between the two clips?",
    )
    answer = "Nothing differs."
    for what in _differences(a, b):
        answer = f"The {what}: {getattr(a, what)}, then {getattr(b, what)}."
    return QA("differ", _pick(wordings, rng), answer)


def _differences(a: Thing, b: Thing) -> list[str]:
    """What differs, of what is asked about; speed counts where the directions are the same."""
    found = [what for what in DIFFERENCES[1:] if getattr(a, what) != getattr(b, what)]
    return found + ["speed"] * (a.direction == b.direction and a.speed != b.speed)
