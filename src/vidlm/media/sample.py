"""The arithmetic of frame choice: pure functions from presentation times to row numbers.

`policy.py` says which of them applies. No array here grows with a number that a caller picks, but
for `repeated_linspace`: each is at most as long as the clip.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from vidlm.errors import InvalidArgument

Rows = NDArray[np.int64]
Times = NDArray[np.float64]

# Matroska and FLV round times to 1 ms: a frame meant for 2/30 s is stamped 0.067 and would miss
# the tick at 0.0667. That frame and the first one may each be half a millisecond off.
_STAMP_ROUNDING = 1e-3 + 1e-6
# Beyond any clip's, so that times multiplied or divided by a rate stay finite.
_SLOWEST, _FASTEST = 1e-9, 1e6


def uniform_arange(n: int, count: int) -> Rows:
    """int(i * n / count) for i below count: where `count` equal parts begin; all if count > n."""
    count = min(n, count)
    return np.arange(count, dtype=np.int64) * n // max(count, 1)


def uniform_linspace(n: int, count: int) -> Rows:
    """`count` of n rows from the first to the last, rounded down; all of them if count > n."""
    return np.linspace(0, n - 1, min(n, count), dtype=np.int64)


def repeated_linspace(n: int, count: int) -> Rows:
    """linspace(0, n - 1, count) cut to whole numbers: always `count` rows, repeated if count > n.

    The Slow-Fast demo takes its frames so.
    """
    return np.linspace(0, n - 1, count, dtype=np.int64)


def strided(n: int, count: int, *, rate: float, fps: float) -> Rows:
    """Every round(rate / fps)-th row, of these `count` by round((i + 1) * candidates / count - 1).

    All candidates where there are fewer. How Slow-Fast's reported scores were sampled (fps 2) and
    how it was trained (fps 4); Python's round, which takes halves to the even number.
    """
    step = max(round(min(rate / max(fps, _SLOWEST), float(n))), 1)
    candidates = np.arange(0, n, step, dtype=np.int64)
    if len(candidates) < count:
        return candidates
    return candidates[[round((i + 1) * len(candidates) / count - 1) for i in range(count)]]


def clamped(n: int, *, rate: float, fps: float, least: int, most: int) -> Rows:
    """As many rows as `fps` gives, but from `least` to `most` and at most n, by arange(0, n, step).

    VideoLLaMA3's rule in transformers, whose arange rounds to float32 before it cuts.
    """
    count = int(min(max(n / rate * fps, least), most, n))
    rows = np.arange(0, n, n / max(count, 1)).astype(np.float32).astype(np.int64)
    return rows[rows < n]


def spread_over(starts: Rows, stop: int, count: int | None) -> Rows:
    """Rows in the middle of the spans that begin at `starts`; the last one ends before `stop`.

    One a span; with fewer than there are spans, those of the longest; with more, each span gets
    its share by length, spread evenly in it.
    """
    lengths = np.diff(np.append(starts, stop))
    if count is None or count == len(starts):
        shares = np.ones(len(starts), np.int64)
    elif count < len(starts):
        shares = np.zeros(len(starts), np.int64)
        shares[np.argsort(-lengths, kind="stable")[:count]] = 1
    else:
        shares = _shares(lengths, min(count, int(lengths.sum())))
    parts = [
        start + (2 * np.arange(share) + 1) * length // (2 * share)
        for start, length, share in zip(starts, lengths, shares, strict=True)
        if share
    ]
    return np.concatenate(parts).astype(np.int64)


def _shares(lengths: Rows, count: int) -> Rows:
    """`count` divided in proportion to the lengths: at least 1 each, at most the length."""
    shares = np.ones_like(lengths)
    while (left := count - int(shares.sum())) > 0:
        room = lengths - shares
        wanted = lengths * count / lengths.sum() - shares
        most_wanted = np.argsort(-np.where(room > 0, wanted, -math.inf), kind="stable")
        shares[most_wanted[: min(left, int((room > 0).sum()), max(left // 2, 1))]] += 1
    return shares


def by_fps(
    pts: Times, fps: float, *, start: float | None = None, stop: float | None = None
) -> Rows:
    """The frames on screen at t0, t0 + 1/fps, t0 + 2/fps ... before `stop`, each once.

    A frame is on screen from its time until the next one's. t0 is the first frame's time, or
    `start` if that is later. A frame that several ticks meet (fps above the clip's own rate, or a
    still passage) is taken once.
    """
    fps = min(max(fps, _SLOWEST), _FASTEST)
    began = pts[0] if start is None else max(start, pts[0])
    until = pts[-1] if stop is None else stop
    slack = min(_STAMP_ROUNDING, float(np.diff(pts).min(initial=np.inf)) / 2)
    # For each frame the first tick that can meet it; a frame is met unless its successor has the
    # same one. (A list of ticks would be as long as the caller's fps makes it.)
    ticks = np.maximum(np.ceil((pts - began - slack) * fps), 0.0)
    met = np.append(ticks[:-1] < ticks[1:], True)
    moment = began + ticks[-1] / fps
    met[-1] = ticks[-1] == 0 or moment <= pts[-1] + slack or moment < until - slack
    return np.flatnonzero(met).astype(np.int64)


def between(pts: Times, start: float | None, end: float | None, *, stop: float) -> tuple[int, int]:
    """The half-open range of rows on screen at some moment of [start, end)."""
    if start is not None and start >= stop:
        raise InvalidArgument(
            f"start={start:g} s is beyond the end of the clip at {stop:g} s; give a smaller start"
        )
    first = 0 if start is None else max(int(np.searchsorted(pts, start, side="right")) - 1, 0)
    last = len(pts) if end is None else int(np.searchsorted(pts, end, side="left"))
    if last <= first:
        raise InvalidArgument(
            f"no frame is on screen before end={end:g} s: the first one appears at "
            f"{pts[0]:g} s; give a later end"
        )
    return first, last
