"""A tiny checkpoint with random weights, and what reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

import tiny
from vidlm import LlavaForConditionalGeneration, LlavaProcessor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(folder: Path) -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(folder)


@pytest.fixture(scope="module")
def processor(folder: Path) -> LlavaProcessor:
    return LlavaProcessor.from_pretrained(folder)
