"""Which frames of a video to take, as keywords of calls, messages and content parts say it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

VIDEO_OPTIONS = (
    *("num_frames", "fps", "min_frames", "max_frames", "start", "end"),
    *("sampling", "indices", "times"),
)
DEFAULT_FRAMES = 8
RATES = ("num_frames", "fps", "min_frames", "sampling", "indices", "times")


@dataclass(frozen=True)
class FrameOptions:
    """Which frames of a video to take; see `vidlm.media.load_video`."""

    num_frames: int | None = None
    fps: float | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    start: float | str | None = None
    end: float | str | None = None
    sampling: str | None = None
    indices: Sequence[int] | None = None
    times: Sequence[float | str] | None = None

    def given(self) -> dict[str, Any]:
        """What is not None, as keywords for load_video."""
        values = {name: getattr(self, name) for name in VIDEO_OPTIONS}
        return {name: value for name, value in values.items() if value is not None}

    def over(self, default: Mapping[str, Any]) -> dict[str, Any]:
        """Keywords for load_video; where nothing says how many frames, the family's `default`,
        whose rule also says what an fps alone means."""
        values = self.given()
        if any(name in values for name in ("num_frames", "indices", "times")):
            return values
        if "sampling" not in values:
            counted = "fps" not in values
            rule = {k: v for k, v in default.items() if counted or k != "num_frames"}
            return {**rule, **values}
        if "fps" not in values and values["sampling"] != "videollama3":
            values["num_frames"] = default.get("num_frames", DEFAULT_FRAMES)
        return values

    def replaced(self, own: Mapping[str, Any]) -> FrameOptions:
        """These with those of one content part, whose rule replaces the call's."""
        options = self
        if any(name in own for name in RATES):
            options = FrameOptions(start=self.start, end=self.end)
        if "indices" in own or "times" in own:
            options = FrameOptions()
        return FrameOptions(**{**options.given(), **own})
