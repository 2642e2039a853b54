"""Fixtures that any test may ask for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def shared() -> Path:
    """A folder with a larger corpus: the one VIDLM_SHARED names, or `shared` beside the repository.

    It holds data/videos/*, with index.json about them. Without it the test is skipped.
    """
    named = os.environ.get("VIDLM_SHARED")
    folder = Path(named) if named else ROOT.parent / "shared"
    if not (folder / "data" / "videos" / "index.json").is_file():
        where = f"VIDLM_SHARED={named}" if named else "no VIDLM_SHARED, no ../shared"
        pytest.skip(f"needs the larger corpus of videos ({where} with data/videos/index.json)")
    return folder


@pytest.fixture(scope="module")
def clips_dir() -> Path:
    """The small licensed clips of the repository."""
    return Path(__file__).with_name("data")
