"""The names of the package: what `dir(vidlm)` shows is public, and is there."""

from __future__ import annotations

import subprocess
import sys

import vidlm


def test_only_public_names_show() -> None:
    shown = set(dir(vidlm))
    modules = {"api", "engine", "errors", "media", "types"}
    assert shown == {*vidlm.__all__, *modules, "__version__"}
    assert all(getattr(vidlm, name) is not None for name in shown)
    assert {"SamplingParams", "Request", "VidlmError", "Progress", "Answer"} <= shown


def test_modules_are_there_after_import_vidlm_alone() -> None:
    """And neither they nor the package load torch before they are used."""
    code = (
        "import sys, vidlm; dir(vidlm); vidlm.errors.UnknownKeyword, vidlm.SamplingParams; "
        "assert 'torch' not in sys.modules; vidlm.media.load_video, vidlm.types.FinishReason; "
        "vidlm.api.AskKeywords, vidlm.engine.Token"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
