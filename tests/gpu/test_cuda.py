"""The engine on a CUDA device: the answers of the CPU, in float32, for every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import slowfast_forms
import tiny
import video_forms
import vidlm
from vidlm.engine import EngineOptions

pytestmark = pytest.mark.gpu
FAMILIES = ("llava", "slow-fast", *video_forms.FORMS)
QUESTIONS = ("what happens?", "the red ball moves", "what happens, then?")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny checkpoint of each family."""
    root = tmp_path_factory.mktemp("checkpoints")
    made = {name: root / name for name in FAMILIES}
    for folder in made.values():
        folder.mkdir()
    tiny.write(made["llava"])
    slowfast_forms.write(made["slow-fast"])
    for name, form in video_forms.FORMS.items():
        form.write(made[name])
    return made


@pytest.fixture(autouse=True)
def exact_products() -> None:
    """float32 products in float32, or tokens differ for another reason."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def load(folder: Path, **how: Any) -> vidlm.LM:
    """With a chat template, which these tiny checkpoints have none of."""
    lm = vidlm.load(folder, **how)
    token = lm.processor.video_token or lm.processor.image_token
    place = "{% if part['type'] != 'text' %}" + token + "{% else %}{{ part['text'] }}{% endif %}"
    each = "{% for part in message['content'] %}" + place + "{% endfor %}"
    lm.processor.chat_template = "{% for message in messages %}" + each + "{% endfor %} answer:"
    return lm


def clip(seed: int) -> np.ndarray:
    return video_forms.clip(seed, frames=8)


def answers(lm: vidlm.LM, questions: tuple[str, ...] = QUESTIONS) -> list[str]:
    clips = [clip(1), clip(2)]
    return [lm.ask(c, q, max_tokens=12).text for c in clips for q in questions]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_answers_of_the_cpu(folders: dict[str, Path], family: str) -> None:
    on_cpu = load(folders[family], dtype="float32")
    on_gpu = load(folders[family], dtype="float32", device="cuda")
    assert on_gpu.model.device.type == "cuda"
    assert answers(on_gpu) == answers(on_cpu)


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_in_half_precision(folders: dict[str, Path], family: str) -> None:
    """Asked again, after other questions, with the cache and without."""
    how = EngineOptions(exact=True, kv_bytes=64 << 20)
    lm = load(folders[family], dtype="bfloat16", device="cuda", engine=how)
    first = answers(lm)
    assert answers(lm) == first
    lm.engine.clear()
    assert answers(lm, QUESTIONS[::-1]) == [*first[2::-1], *first[:2:-1]]


def test_decoding_does_not_wait_for_the_host(folders: dict[str, Path]) -> None:
    """One synchronisation a step, where the tokens are read; none in the layers."""
    lm = load(folders["llava"], dtype="bfloat16", device="cuda")
    lm.ask(clip(1), QUESTIONS[0], max_tokens=4)
    stream = iter(lm.stream(clip(1), QUESTIONS[1], max_tokens=12, min_new_tokens=12))
    next(stream)
    decoder = lm.model.decoder
    decoder.register_forward_pre_hook(lambda *_: torch.cuda.set_sync_debug_mode("error"))
    decoder.register_forward_hook(lambda *_: torch.cuda.set_sync_debug_mode("default"))
    try:
        for _ in stream:
            pass
    finally:
        torch.cuda.set_sync_debug_mode("default")
