"""How long browsers show the frames of a GIF."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# In hundredths of a second. Encoders of the nineties wrote delays of 0 and 1 and meant "as fast as
# you can"; browsers show those for a tenth of a second, and authors have relied on it since.
_LEAST, _INSTEAD = 2, 10

Ticks = NDArray[np.int64]


def as_browsers_show(ticks: Ticks, last_length: int) -> tuple[Ticks, int]:
    """Times (N,) in hundredths of a second, and how long the last frame is shown.

    Delays that are too short become a tenth of a second; FFmpeg's demuxer mends those of 0 alone.
    """
    delays = np.append(np.diff(ticks), last_length or _INSTEAD)
    delays[delays < _LEAST] = _INSTEAD
    starts = ticks[0] + np.append(0, np.cumsum(delays[:-1]))
    return starts.astype(np.int64), int(delays[-1])
