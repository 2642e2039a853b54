"""Where one shot ends and the next begins: a detector of hard cuts on small pictures."""

from __future__ import annotations

from array import array

import numpy as np
from numpy.typing import NDArray

from vidlm.media.sample import Rows

SIDE = 32  # of the pictures that are compared, in pixels
_LEAST = 10.0  # grey levels of 255 by which a cut changes the picture, on average
_TIMES = 3.0  # as much as the changes around it
_AROUND = 4  # frames before and after
_SHORTEST = 0.3  # seconds of a shot


class Shots:
    """Sees the frames of a clip one after the other, and tells where shots begin.

    A cut is a change of picture that is large, and several times as large as those right before
    and after: quick motion is large for long, a flash twice in a row. A fade is no cut.
    """

    def __init__(self, fps: float) -> None:
        self._shortest = max(round(_SHORTEST * fps), 1)
        self._rows, self._changes = array("q"), array("d")
        self._last: NDArray[np.int16] | None = None

    def see(self, row: int, picture: NDArray[np.uint8]) -> None:
        """The next frame, (SIDE, SIDE, 3)."""
        now = picture.astype(np.int16)
        change = 0.0 if self._last is None else float(np.abs(now - self._last).mean())
        self._rows.append(row)
        self._changes.append(change)
        self._last = now

    def starts(self) -> Rows:
        """The rows where a shot begins; the first frame that was seen is one."""
        if not self._rows:
            return np.zeros(0, np.int64)
        changes = np.asarray(self._changes)
        cuts = [0]
        for i in np.flatnonzero(changes >= _LEAST).tolist():
            near = np.append(changes[max(i - _AROUND, 1) : i], changes[i + 1 : i + 1 + _AROUND])
            alone = not len(near) or changes[i] >= _TIMES * near.mean()
            if alone and i - cuts[-1] >= self._shortest:
                cuts.append(i)
        return np.asarray(self._rows, np.int64)[cuts]
