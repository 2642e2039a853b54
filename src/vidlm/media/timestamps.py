"""Presentation time stamps that contradict each other are mended where they do; the rest stay.

Recorders, live streams and muxers write a stamp twice, leave some out, or are hours off for a frame
or from some frame on. One such stamp is an error of the file and says nothing of the others.

The rules, in the order in which frames are shown:

- A step of more than two hours that is also longer than all other steps together is no still
  picture: the clip goes on without it. There may be two such steps, or 1 in 100, no more, and the
  sound must not last as long.
- Frames that go back by more than a second, or 16 frames, part the clip. Of its parts, those that
  go on from each other with the most frames keep their times; those in between are spread over the
  gap, those before and after continue the clip.
- Frames that go back by less are sorted.
- Frames without a stamp are placed between their neighbours.
- Frames that share a stamp follow each other by the usual step, or less where the next one is near.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from vidlm.media.clip import clock

Stamps = NDArray[np.int64]
Ticks = NDArray[np.float64]

STILL_SECONDS = 2 * 3600.0  # a still picture of this length is believed, whatever the clip has else
_MOST_REORDERED = 32  # frames that a codec shows earlier than it decodes them
_BACK_SECONDS, _BACK_FRAMES = 1.0, 16
_MOST_EQUAL = 0.1  # of the frames, up to which equal stamps are mended without decoding
_LEAST_STAMPED = 8  # one in so many frames has a stamp of its own, or the clip has no clock
_MOST_PARTS = 4096


@dataclass(frozen=True, eq=False)
class Mended:
    """ticks: (N,) strictly ascending, when each frame appears. stop: when the last one goes.

    is_moved: whether some are far from their stamps. notes: what was changed, in words.
    """

    ticks: Ticks
    stop: float
    is_moved: bool
    notes: tuple[str, ...]


def is_sound(ticks: Stamps, base: Fraction, sound: float = 0.0) -> bool:
    """Whether ascending stamps tell all frames apart, and none is hours off.

    base: seconds in a tick. sound: seconds of sound that the clip is known to have.
    """
    steps = np.diff(ticks)
    return bool((steps > 0).all()) and not (steps > longest_still(steps, base, sound)).any()


def is_plausible(order: Stamps, ticks: Stamps, base: Fraction, sound: float = 0.0) -> bool:
    """Whether packets sorted by their stamps come in the order in which frames are shown.

    order: (N,) each packet's place in the file; ticks: their stamps, ascending.
    """
    steps = np.diff(ticks)
    if np.abs(order - np.arange(len(order))).max(initial=0) > _MOST_REORDERED:
        return False
    if (steps == 0).sum() > _MOST_EQUAL * len(order):
        return False
    far = np.flatnonzero(steps > longest_still(steps, base, sound)) + 1
    return all(order[:cut].max() < order[cut:].min() for cut in far.tolist())


def longest_still(steps: Stamps, base: Fraction, sound: float) -> float:
    """The ticks up to which a step is believed to be a still picture."""
    limit = STILL_SECONDS / base
    usual = steps[(steps > 0) & (steps <= limit)]
    longest = max(float(limit), float(usual.sum()))
    far = int((steps > longest).sum())
    is_usual = far > max(2, len(steps) // 100) or 2 * far >= len(steps)
    is_sounding = sound > 0.9 * float(steps.max(initial=0) * base)
    return np.inf if is_usual or is_sounding else longest


def mend(
    stamps: Stamps, known: NDArray[np.bool_], last: int, base: Fraction, sound: float = 0.0
) -> Mended | None:
    """The times of frames in the order in which they are shown; None where there is no clock.

    known: (N,) whether a frame has a stamp. last: ticks that the last one is shown for, or 0.
    """
    rows = np.flatnonzero(known)
    values = stamps[rows]
    if len(np.unique(values)) < max(2, len(stamps) // _LEAST_STAMPED):
        return None
    steps = np.diff(values)
    step = max(int(np.median(steps[steps > 0])) if (steps > 0).any() else 1, 1)
    longest = longest_still(steps, base, sound)
    back = max(float(_BACK_SECONDS / base), _BACK_FRAMES * step)
    cuts = (steps < -back) | (steps > longest)
    if (steps < -back).any():  # what goes back has gone forth before
        cuts |= steps > back
    if cuts.sum() >= _MOST_PARTS:
        return None
    parts = np.split(values.astype(float), np.flatnonzero(cuts) + 1)
    ticks = np.full(len(stamps), np.nan)
    ticks[rows] = np.concatenate(_placed([np.sort(part) for part in parts], step, longest))
    notes = [
        *_say_sorted(steps[~cuts]),
        *_say_moved(stamps, ticks, known, base),
        *_say(~known, "carry no time stamp and are placed between their neighbours"),
    ]
    ticks = _filled(ticks, step)
    is_equal = np.append(False, np.diff(ticks) <= 0)
    notes += _say(is_equal, "share their time stamp with the one before and are shown after it")
    ticks, stop = _spread(ticks, step, last)
    return Mended(ticks, stop, bool(cuts.any()), tuple(notes))


def _placed(parts: list[Ticks], step: int, longest: float) -> list[Ticks]:
    """The parts of a clip in one ascending order, NaN where a part lies between two others."""
    kept = _chain(parts, longest)
    first, final = kept[0], kept[-1]
    placed = [
        part if at in kept else np.full(len(part), np.nan)
        for at, part in enumerate(parts[first : final + 1], first)
    ]
    after = _continued(parts[final:], step, longest)[1:]
    before = _continued([-part[::-1] for part in parts[first::-1]], step, longest)[1:]
    return [*(-part[::-1] for part in before[::-1]), *placed, *after]


def _chain(parts: list[Ticks], longest: float) -> list[int]:
    """The parts with the most frames of which each begins after the one before has ended."""
    starts = np.array([part[0] for part in parts])
    ends = np.array([part[-1] for part in parts])
    frames = np.array([len(part) for part in parts])
    best, before = frames.copy(), np.full(len(parts), -1)
    for at in range(1, len(parts)):
        gap = starts[at] - ends[:at]
        total = np.where((gap > 0) & (gap <= longest), best[:at], 0)
        if total.max() > 0:
            before[at] = int(total.argmax())
            best[at] += total.max()
    chain = [int(best.argmax())]
    while before[chain[0]] >= 0:
        chain.insert(0, int(before[chain[0]]))
    return chain


def _continued(parts: list[Ticks], step: int, longest: float) -> list[Ticks]:
    """The first part, and the others moved so that each goes on from the one before."""
    moved, shift = [parts[0]], 0.0
    for part in parts[1:]:
        gap = part[0] + shift - moved[-1][-1]
        if not 0 < gap <= longest:
            shift += step - gap
        moved.append(part + shift)
    return moved


def _filled(ticks: Ticks, step: int) -> Ticks:
    """With NaN replaced: evenly between neighbours, by the usual step before and after all."""
    rows = np.arange(len(ticks))
    known = np.flatnonzero(~np.isnan(ticks))
    filled = np.interp(rows, known, ticks[known])
    first, final = known[0], known[-1]
    filled[:first] -= (first - rows[:first]) * step
    filled[final + 1 :] += (rows[final + 1 :] - final) * step
    return filled


def _spread(ticks: Ticks, step: int, last: int) -> tuple[Ticks, float]:
    """Equal ticks apart, and when the last frame goes."""
    times, run, counts = np.unique(ticks, return_inverse=True, return_counts=True)
    stop = float(times[-1] + (last if last > 0 else step))
    gaps = np.diff(np.append(times, stop))
    spacing = np.minimum(step, gaps / counts)
    place = np.arange(len(ticks)) - (np.cumsum(counts) - counts)[run]
    return times[run] + place * spacing[run], max(stop, float(times[-1] + spacing[-1] * counts[-1]))


def _say(which: NDArray[np.bool_], what: str) -> list[str]:
    count = int(which.sum())
    if not count:
        return []
    return [f"{count} of {len(which)} frames {what} (the first: frame {int(which.argmax())})"]


def _say_sorted(steps: Stamps) -> list[str]:
    """Where most frames go back, a container stores times in decoding order: that is no error."""
    back = steps < 0
    if back.sum() > _MOST_EQUAL * len(back):
        return []
    return _say(np.append(False, back), "are stamped earlier than the one before and are sorted")


def _say_moved(stamps: Stamps, ticks: Ticks, known: NDArray[np.bool_], base: Fraction) -> list[str]:
    shifts = np.where(known, ticks - stamps, 0.0)
    apart = known & (np.isnan(shifts) | (np.abs(shifts) > _BACK_SECONDS / base))
    if not apart.any():
        return []
    steps = np.abs(np.diff(stamps[known]))
    most = clock(float(steps.max() * base))
    return _say(
        apart, f"have times that do not follow from the others' (steps up to {most}) and are moved"
    )
