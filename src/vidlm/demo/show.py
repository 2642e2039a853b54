"""`vidlm demo`: videos drawn on the spot, questions about them, answers beside the truth."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.random import Generator

from vidlm.api import LM, load
from vidlm.demo.questions import QA, ask_one, follow_up, pair_questions, right
from vidlm.demo.world import Clip, draw_clip, draw_pair, write_mp4
from vidlm.engine import Timings
from vidlm.files import make_folder, replaced
from vidlm.hf import DEMO
from vidlm.media import contact_sheet, load_video

KEY = 0x5403  # the showing draws from (KEY, seed): clips that neither training nor scoring saw
KINDS = ("count", "describe", "direction", "compare", "order", "event", "where", "colour", "shape")
QUESTIONS = 5  # about the first video, of as many kinds as it allows, in this order
FRAMES = 8

WIDTH = 80  # columns
INDENT = 8  # of questions and answers
STAGES = {
    "decode_media": "video file to frames",
    "preprocess": "frames to pixels, text to ids",
    "encode": "pixels to features",
    "prefill": "prompt to the first token",
    "decode": "every further token",
}
ENDING = """
This model knows moving shapes and nothing else. For videos of the world take a
real one; the first time, about 2 GB are downloaded:

  vidlm ask clip.mp4 "What happens?" \\
    --model llava-hf/llava-interleave-qwen-0.5b-hf"""


class Echo(Protocol):
    """Prints a text, with a line end unless told otherwise: `typer.echo`."""

    def __call__(self, message: str, *, nl: bool = True) -> None: ...


@dataclass
class _Tally:
    """What happened so far."""

    asked: int = 0
    right: int = 0
    timings: list[Timings] = field(default_factory=list)


def show(out: Path, seed: int, echo: Echo) -> None:
    """Draw three videos into the folder `out`, ask the demo model about them, and tell its answers.

    One video has several things in it, the other two are a pair to be compared. The same seed draws
    the same videos and asks the same questions.
    """
    make_folder(out)
    lm = load(DEMO)
    rng = np.random.default_rng((KEY, seed))
    tally = _Tally()
    size = sum(parameter.numel() for parameter in lm.model.parameters())
    echo(f"A model of {size / 1e6:.1f} million parameters, which was trained on moving shapes,")
    echo("answers questions about videos that it has not seen before.")

    scene = draw_clip(rng, count=int(rng.integers(2, 4)))
    path = _save(scene, out / "scene.mp4", "A video", echo)
    for qa in _questions(scene, rng):
        _ask(lm, path, qa, tally, echo)
    _converse(lm, path, follow_up(scene, rng), tally, echo)

    first, second = _pair(rng)
    pair = [
        _save(first, out / "first.mp4", "A second video", echo),
        _save(second, out / "second.mp4", "and a third, to compare it with", echo),
    ]
    for qa in pair_questions(first, second, rng):
        _ask(lm, pair, qa, tally, echo)
    _sum_up(tally, echo)


def _pair(rng: Generator) -> tuple[Clip, Clip]:
    """Two clips that differ in something, which is more to look at."""
    while True:
        first, second, difference = draw_pair(rng)
        if difference != "nothing":
            return first, second


def _save(clip: Clip, path: Path, what: str, echo: Echo) -> Path:
    """Write a clip and the contact sheet of what the model sees of it."""
    write_mp4(clip, path)
    sheet = path.with_suffix(".png")
    with replaced(sheet) as partial:
        contact_sheet(load_video(path, num_frames=FRAMES)).save(partial, "PNG")
    echo(f"\n{what}: {path}")
    echo(f"  the {FRAMES} frames that the model sees of it: {sheet}")
    return path


def _questions(clip: Clip, rng: Generator) -> list[QA]:
    found = (ask_one(clip, kind, rng) for kind in KINDS)
    return [qa for qa in found if qa is not None][:QUESTIONS]


def _ask(lm: LM, media: Path | list[Path], qa: QA, tally: _Tally, echo: Echo) -> None:
    _converse(lm, media, [qa], tally, echo)


def _converse(
    lm: LM, media: Path | list[Path], turns: Sequence[QA], tally: _Tally, echo: Echo
) -> None:
    """Ask one turn after the other in one chat, and set each answer beside the truth."""
    chat = lm.chat(media, frames=FRAMES)
    for place, qa in enumerate(turns):
        stream = chat.stream(qa.question)
        _write("\nthen" if place else "\nQ", [qa.question], echo)
        _write("model", stream, echo)
        good = right(qa, stream.answer.text)
        _write("truth", [f"{qa.answer} [{'right' if good else 'WRONG'}]"], echo)
        tally.asked += 1
        tally.right += good
        tally.timings.append(stream.timings)


def _write(label: str, pieces: Iterable[str], echo: Echo) -> None:
    """A label, and behind it the text as it comes."""
    echo(f"{label}".ljust(INDENT + label.count("\n")), nl=False)
    for words in wrapped(pieces):
        echo(words, nl=False)
    echo("")


def wrapped(pieces: Iterable[str], indent: int = INDENT, width: int = WIDTH) -> Iterator[str]:
    """The words of a streamed text, each as soon as it is complete, in lines of at most `width`.

    The first line is taken to begin at column `indent`, and the others are made to. Spaces and line
    ends of the text itself only separate words.
    """
    column, word = indent, ""
    for character in chain(chain.from_iterable(pieces), " "):
        if not character.isspace():
            word += character
        elif word:
            room = column + 1 + len(word) <= width
            before = "" if column == indent else " " if room else "\n" + " " * indent
            column = (column + len(before) if room else indent) + len(word)
            yield before + word
            word = ""


def _sum_up(tally: _Tally, echo: Echo) -> None:
    echo(f"\n{tally.right} of {tally.asked} answers are right. An answer took, on average:")
    for stage in fields(Timings):
        seconds = [getattr(timings, stage.name) for timings in tally.timings]
        echo(f"{1000 * float(np.mean(seconds)):8.1f} ms  {STAGES[stage.name]}")
    echo(ENDING)
