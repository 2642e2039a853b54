"""Training examples: many question-answer turns packed behind one clip, with loss on every answer.

A pack pays for the clip's frames once, which teaches several times faster than one question a
clip. Patches that show a thing have labels too, the words for what it is and does: without them
the model answers from language alone for thousands of steps before it looks. Everything is drawn
from (seed, step), so that a run can stop anywhere and go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from vidlm.demo.questions import QA, follow_up, pair_questions, questions
from vidlm.demo.recipe import FRAMES, PATCH, SIZE
from vidlm.demo.world import Clip, Thing, augment, draw_clip, draw_pair, render, sampled_times
from vidlm.text import Tokenizer

IGNORE = -100  # label of a token without loss
TEXT, PAIR_TEXT = 200, 72  # tokens of turns behind one clip, and behind a pair
SIDE = SIZE // PATCH
PER_FRAME = SIDE**2
MOVES = 2  # frames after which a thing's motion can be known
HARD = {"colour": 3.0, "order": 2.0, "event": 0.6}  # weights of kinds; 1 where not named


@dataclass(frozen=True)
class Batch:
    """frames of all rows, concatenated (N, S, S, 3); words and motion of their patches (N, P, 4);
    ids and labels (B, L), padded behind. IGNORE is no label and no word."""

    frames: NDArray[np.uint8]
    words: NDArray[np.int64]
    motion: NDArray[np.float32]
    ids: NDArray[np.int64]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Look:
    """Single frames (N, S, S, 3) of many clips; words and motion of their patches (N, P, 4)."""

    frames: NDArray[np.uint8]
    words: NDArray[np.int64]
    motion: NDArray[np.float32]


@dataclass(frozen=True)
class Mix:
    """What a batch is made of: shares of clips with one, two and three things, and of pairs."""

    counts: tuple[float, float, float]
    pairs: float


def mix_at(progress: float) -> Mix:
    """The curriculum: one shape first, then two, then three, and pairs of clips from early on."""
    if progress < 0.06:
        return Mix((1.0, 0.0, 0.0), 0.1)
    if progress < 0.15:
        return Mix((0.5, 0.5, 0.0), 0.2)
    return Mix((0.2, 0.35, 0.45), 0.3)


def batch(tokenizer: Tokenizer, seed: int, step: int, size: int, mix: Mix) -> Batch:
    """Batch number `step` of the run with this seed: `size` rows, all with the same frame count."""
    rng = np.random.default_rng((seed, step))
    frames = int(rng.choice((FRAMES, 6, 12), p=(0.86, 0.08, 0.06)))
    pairs = round(size * mix.pairs)
    rows = [_row(tokenizer, rng, frames, mix, pair=i < pairs) for i in range(size)]
    # One shape for all batches of a frame count: oneDNN prepares its kernels anew for each shape.
    length = frames * PER_FRAME + max(TEXT, frames * PER_FRAME + PAIR_TEXT)
    ids = np.full((size, length), tokenizer.pad_token_id, np.int64)
    labels = np.full((size, length), IGNORE, np.int64)
    for i, (_, _, _, row_ids, row_labels) in enumerate(rows):
        ids[i, : len(row_ids)] = row_ids
        labels[i, : len(row_labels)] = row_labels
    shown, words, motion = (np.concatenate([row[i] for row in rows]) for i in range(3))
    return Batch(shown, words, motion, ids, labels)


Row = tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.float32], list[int], list[int]]


def _row(tokenizer: Tokenizer, rng: Generator, frames: int, mix: Mix, pair: bool) -> Row:
    if pair:
        first, second, _ = draw_pair(rng)
        clips, turns = [first, second], pair_questions(first, second, rng)
    else:
        count = int(rng.choice((1, 2, 3), p=mix.counts))
        clip = draw_clip(rng, count=count)
        clips, turns = [clip], hard_first(questions(clip, rng), rng)
        if rng.random() < 0.45:
            turns = [*follow_up(clip, rng), *turns]
    budget = PAIR_TEXT if pair else TEXT
    ids, labels = pack(tokenizer, turns, len(clips) * frames, budget, rng)
    shown = np.concatenate([_frames(clip, frames, rng) for clip in clips])
    times = sampled_times(frames, clips[0].frames)
    words = np.concatenate([patch_words(tokenizer, clip, times) for clip in clips])
    motion = np.concatenate([patch_motion(clip, times) for clip in clips])
    return shown, words, motion, ids, labels


def hard_first(turns: Sequence[QA], rng: Generator) -> list[QA]:
    """The turns in a random order in which those of hard kinds tend to be early: a pack ends where
    its budget does, and late turns are lost."""
    early = rng.exponential(size=len(turns)) / [HARD.get(turn.kind, 1.0) for turn in turns]
    return [turns[i] for i in early.argsort()]


def _frames(clip: Clip, frames: int, rng: Generator) -> NDArray[np.uint8]:
    return augment(render(clip, SIZE, sampled_times(frames, clip.frames)), rng)


def look(tokenizer: Tokenizer, seed: int, step: int, size: int) -> Look:
    """Batch number `step` of frames to learn seeing from: two moments each of size / 2 clips."""
    rng = np.random.default_rng((seed, step))
    frames, words, motion = [], [], []
    for _ in range(size // 2):
        clip = draw_clip(rng)
        times = rng.uniform(size=2)
        frames.append(augment(render(clip, SIZE, times), rng))
        words.append(patch_words(tokenizer, clip, times))
        motion.append(patch_motion(clip, times))
    return Look(np.concatenate(frames), np.concatenate(words), np.concatenate(motion))


def patch_words(tokenizer: Tokenizer, clip: Clip, times: NDArray[np.floating]) -> NDArray[np.int64]:
    """(F, P, 4) ids: colour, shape and, once they can be known, direction and speed of what a
    patch shows."""
    words = np.full((len(times), PER_FRAME, 4), IGNORE, np.int64)
    for thing in clip.things:
        names = (thing.colour, thing.shape, thing.direction, thing.speed or "still")
        ids = [tokenizer.encode(f" {name}")[0] for name in names]
        shown = _shown(thing, times)
        moved = shown & (np.cumsum(shown.any(1)) > MOVES)[:, None]
        words[shown, :2] = ids[:2]
        words[moved, 2:] = ids[2:]
    return words


def patch_motion(clip: Clip, times: NDArray[np.floating]) -> NDArray[np.float32]:
    """(F, P, 4): where the centre of what a patch shows is and how far it goes in the clip, x and y
    of each, about from -2 to 2. 0 where a patch shows nothing."""
    motion = np.zeros((len(times), PER_FRAME, 4), np.float32)
    for thing in clip.things:
        shown, centres = _shown(thing, times), _centres(thing, times)
        travel = np.subtract(thing.end, thing.start)
        values = np.concatenate((centres - 0.5, np.broadcast_to(travel, centres.shape)), axis=1)
        motion[shown] = np.broadcast_to(4 * values[:, None], motion.shape)[shown]
    return motion


def _shown(thing: Thing, times: NDArray[np.floating]) -> NDArray[np.bool_]:
    """(F, P): the patches that show a good part of the thing, while it is there."""
    centres, corners = _centres(thing, times)[:, None], _patch_corners()
    nearest = np.clip(centres, corners, corners + 1 / SIDE)  # (F, P, 2) point of the patch
    since, until = thing.span()
    there = (times >= since) & (times < until)
    distance = np.hypot(*np.moveaxis(nearest - centres, -1, 0))
    shown: NDArray[np.bool_] = (distance < 0.7 * thing.radius) & there[:, None]
    return shown


def _patch_corners() -> NDArray[np.floating]:
    """(P, 2): x and y of each patch's upper left corner, row by row."""
    y, x = np.divmod(np.arange(PER_FRAME), SIDE)
    return np.stack((x, y), axis=-1) / SIDE


def _centres(thing: Thing, times: NDArray[np.floating]) -> NDArray[np.floating]:
    """(F, 2): x and y of the thing at each time."""
    return np.asarray([thing.at(float(time)) for time in times])


def pack(
    tokenizer: Tokenizer, turns: Sequence[QA], frames: int, budget: int, rng: Generator
) -> tuple[list[int], list[int]]:
    """Chat turns behind `frames` frames -> ids and labels, as many turns as `budget` tokens hold.

    Mostly in the form of the chat template; one row in ten in the looser form of hand-written
    prompts (no newline after the role or between turns), where the model writes the newline.
    """
    (image,) = tokenizer.encode("<image>")
    loose = rng.random() < 0.1
    line = "" if loose else "\n"
    ids: list[int] = []
    labels: list[int] = []
    for i, turn in enumerate(turns):
        asked = f"{turn.question}<|im_end|>{line}<|im_start|>assistant{line}"
        said = f"{turn.answer}<|im_end|>"
        head = f"<|im_start|>user{line}" if i == 0 or not loose else "<|im_start|>user\n"
        before = tokenizer.encode(head if i == 0 else ("" if loose else "\n") + head)
        between = tokenizer.encode(("\n" if i == 0 else "") + asked)
        answer = tokenizer.encode(("\n" if loose else "") + said)
        if i and len(ids) - frames * PER_FRAME + len(before + between + answer) > budget:
            break
        media = [image] * (frames * PER_FRAME) if i == 0 else []
        ids += [*before, *media, *between, *answer]
        labels += [IGNORE] * (len(before) + len(media) + len(between)) + answer
    return ids, labels
