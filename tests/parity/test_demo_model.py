"""The model inside the package: its size, that it is a LLaVA to transformers too, and its score."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import oracle
import vidlm
from vidlm.demo import recipe
from vidlm.demo.evaluate import evaluate
from vidlm.demo.world import draw_clip, write_mp4
from vidlm.hub import read_safetensors_header, weight_files

QUESTION = "Describe the clip."
FLOOR = 0.9


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "clip.mp4"
    write_mp4(draw_clip(np.random.default_rng(11)), path)
    return path


def test_it_is_small() -> None:
    headers = [read_safetensors_header(p) for p in set(weight_files(recipe.CHECKPOINT).values())]
    entries = [entry for header in headers for entry in header.values()]
    assert {entry.dtype for entry in entries} == {"BF16"}
    assert sum(int(np.prod(entry.shape)) for entry in entries) <= 6_000_000
    assert sum(file.stat().st_size for file in recipe.CHECKPOINT.iterdir()) <= 16 << 20


def test_transformers_reads_it_and_answers_the_same(clip: Path) -> None:
    ours = vidlm.LlavaForConditionalGeneration.from_pretrained("demo", dtype=torch.float32)
    processor = vidlm.LlavaProcessor.from_pretrained("demo")
    parts = [{"type": "video", "path": str(clip)}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    theirs = oracle.transformers.LlavaForConditionalGeneration.from_pretrained(
        recipe.CHECKPOINT, dtype=torch.float32
    )
    with torch.inference_mode():
        mine, reference = ours(**inputs).logits, theirs(**inputs).logits
    assert (mine - reference).abs().max() <= 1e-4 * reference.abs().max()
    options = {"max_new_tokens": 40, "do_sample": False}
    assert torch.equal(ours.generate(**inputs, **options), theirs.generate(**inputs, **options))


def test_it_answers(tmp_path: Path) -> None:
    """A floor, against a checkpoint that is broken or not the one that was scored; the score
    itself is `python -m vidlm.demo.evaluate`, in the README."""
    *_, score = evaluate(vidlm.load("demo"), 48, 1234, tmp_path)
    assert score.to_dict()["accuracy"] >= FLOOR
