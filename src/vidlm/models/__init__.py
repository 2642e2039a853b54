"""One file per family, found by config.json's model_type."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from vidlm.errors import UnsupportedModel
from vidlm.models.base import Family

FAMILIES = {"llava": "vidlm.models.llava"}  # model_type -> module with a FAMILY


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that reads this config.json."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise UnsupportedModel(
            f"model_type {kind!r} in config.json is not supported; known: {', '.join(FAMILIES)}"
        )
    family: Family = import_module(FAMILIES[kind]).FAMILY
    return family
