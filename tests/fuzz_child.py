"""Decodes damaged videos, one after another, and tells its standard output how each one went.

    python fuzz_child.py FOLDER SEED FIRST LAST

For each case a line "NUMBER" before it is begun and one of JSON afterwards: the outcome, and where
a promise was broken, what was. A parent sees from the first line which case hangs or crashes.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import resource
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np

import fuzz_cases
from vidlm.errors import MediaError, VidlmError
from vidlm.media import Limits, Video, load_video, walk

LIMITS = Limits(kept_bytes=1 << 24, pixels=1 << 20)
MEMORY = 3 << 30  # enough for any sound decoder at these limits
WORTH_TWO = walk._WORTH_TWO
CPU_SECONDS = 20.0  # of one case; the usual one takes 3 ms
EXPLICIT = ("indices", "times", "sampling")  # may take frames twice, or in another order


def check(video: Video, how: dict[str, Any]) -> None:
    """What a Video promises."""
    count, height, width, channels = video.frames.shape
    assert count > 0, "no frames"
    assert channels == 3, "frames are not RGB"
    assert video.frames.dtype == np.uint8, "frames are not bytes"
    assert video.frames.nbytes <= LIMITS.kept_bytes, "more than kept_bytes"
    assert height * width <= LIMITS.pixels, "larger than pixels"
    assert max(height, width) <= how.get("max_side", math.inf), "larger than max_side"
    assert video.pts.shape == video.indices.shape == (count,), "not one time and number for each"
    assert (video.pts.dtype, video.indices.dtype) == (np.float64, np.int64), "dtypes"
    assert np.isfinite(video.pts).all(), f"times {video.pts}"
    assert 0 <= video.indices.min(), f"numbers {video.indices}"
    assert video.indices.max() < video.total_frames, f"numbers {video.indices}"
    if not set(EXPLICIT) & set(how):
        assert (np.diff(video.indices) > 0).all(), f"numbers do not ascend: {video.indices}"
        assert (np.diff(video.pts) > 0).all(), f"times do not ascend: {video.pts}"
    assert video.pts.max() <= video.duration < math.inf, f"duration {video.duration}"
    assert 0 < video.fps < math.inf, f"fps {video.fps}"
    assert math.isfinite(video.start_time), f"start_time {video.start_time}"
    assert all(isinstance(text, str) and text for text in video.warnings), "warnings"
    if how.keys() == {"num_frames"} and not video.warnings:
        assert count == min(how["num_frames"], video.total_frames), "frames missing in silence"


def outcome(seed: int, case: int, folder: Path) -> dict[str, str]:
    done, data = fuzz_cases.damaged(seed, case, folder)
    how = fuzz_cases.question(seed, case)
    told = {"done": done, "how": repr(how)}
    walk._WORTH_TWO = 0 if case % 2 else WORTH_TWO  # 0: two readers even for so small a file
    try:
        video = load_video(data, limits=LIMITS, **how)
    except VidlmError as error:
        told["outcome"] = type(error).__name__
        if isinstance(error, MediaError) and not str(error).startswith("video: "):
            told["broken"] = f"a message without the video's name: {error}"
        return told
    except BaseException:
        return {**told, "outcome": "other exception", "broken": traceback.format_exc()}
    told["outcome"] = "Video with warnings" if video.warnings else "Video"
    try:
        check(video, how)
    except Exception:
        told["broken"] = f"{traceback.format_exc()}warnings: {video.warnings}"
    return told


def main(folder: str, seed: str, first: str, last: str) -> None:
    faulthandler.enable()
    faulthandler.register(signal.SIGPROF, chain=True)  # says where it is, and ends it
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    files = len(os.listdir("/dev/fd"))
    for case in range(int(first), int(last)):
        print(case, flush=True)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        told = outcome(int(seed), case, Path(folder))
        if len(os.listdir("/dev/fd")) > files:
            told.setdefault("broken", "a file is left open")
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
