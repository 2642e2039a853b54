"""Bytes to frames, with numpy, PyAV and PIL only: safe to import in a worker process, no torch."""

from vidlm.media.fetch import FetchPolicy
from vidlm.media.folder import is_image
from vidlm.media.image import load_image
from vidlm.media.pillow import to_rgb
from vidlm.media.policy import FramePolicy
from vidlm.media.probe import probe
from vidlm.media.reader import MediaReader
from vidlm.media.sheet import contact_sheet
from vidlm.media.video import (
    Limits,
    Source,
    Video,
    load_video,
    replace_video_with_images,
    sample_frames,
)
from vidlm.media.worker import DecodePool

__all__ = [
    "DecodePool",
    "FetchPolicy",
    "FramePolicy",
    "Limits",
    "MediaReader",
    "Source",
    "Video",
    "contact_sheet",
    "is_image",
    "load_image",
    "load_video",
    "probe",
    "replace_video_with_images",
    "sample_frames",
    "to_rgb",
]
