"""The one way from a source to an image or a video for those who read on behalf of others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vidlm.media.clip import DEFAULT_LIMITS, Limits, Video
from vidlm.media.fetch import DEFAULT_POLICY, FetchPolicy, check_local
from vidlm.media.image import load_image
from vidlm.media.source import Source
from vidlm.media.video import load_video


@dataclass(frozen=True)
class MediaReader:
    """Reads images and videos under one policy and one set of limits.

    A processor, and `vidlm.load(..., media=...)`, have one: whatever names a source in a message or
    an argument is read by it. The default reads what the user may read; a program that answers for
    strangers says which folders and hosts: `MediaReader(FetchPolicy(folders=(), hosts=(...)))`.

    access    which URLs and folders may be read, see FetchPolicy
    limits    ceilings of memory and time, see Limits
    on_error  "warn" leaves out what is damaged of a video, "raise" raises MediaError
    """

    access: FetchPolicy = DEFAULT_POLICY
    limits: Limits = DEFAULT_LIMITS
    on_error: str = "warn"

    def image(self, source: Source | Image.Image) -> Image.Image:
        """As `load_image`."""
        return load_image(source, limits=self.limits, access=self.access)

    def video(self, source: Source, **choice: Any) -> Video:
        """As `load_video`; `choice` are the keywords that choose frames."""
        rules: dict[str, Any] = {"limits": self.limits, "access": self.access}
        return load_video(source, on_error=self.on_error, **choice, **rules)

    def path(self, path: str | Path) -> Path:
        """The path to open for a local file. Raises MediaFetchError where it may not be read."""
        return check_local(path, self.access)
