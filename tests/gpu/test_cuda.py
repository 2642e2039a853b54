"""The engine on a CUDA device: the answers of the CPU, in float32, for every family, and none that
the host or another kernel holds up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import slowfast_forms
import tiny
import video_forms
import vidlm
from straight import Stepped, about, asked, run_out, text
from straight import answers as said
from vidlm.engine import EngineOptions
from vidlm.engine.graphs import CudaCapture, Graphs
from vidlm.nn import attention
from vidlm.nn.upload import refill, upload

pytestmark = pytest.mark.gpu
WITHOUT_MEMORY = ("llava", *video_forms.FORMS)
FAMILIES = ("slow-fast", *WITHOUT_MEMORY)
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


# ---- recordings ----------------------------------------------------------------------------------

GRAPHS = EngineOptions(cuda_graphs=True, kv_bytes=64 << 20)


def recordings(lm: vidlm.LM) -> Graphs:
    found = lm.engine._runner._graphs
    assert found is not None
    return found


@pytest.mark.parametrize("family", WITHOUT_MEMORY)
def test_the_answers_of_recordings(folders: dict[str, Path], family: str) -> None:
    plain = load(folders[family], dtype="float32", device="cuda")
    lm = load(folders[family], dtype="float32", device="cuda", engine=GRAPHS)
    assert answers(lm) == answers(plain)
    assert recordings(lm)._recordings
    lm.engine.clear()
    assert not recordings(lm)._recordings
    assert answers(lm) == answers(plain)


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_recordings_in_company(folders: dict[str, Path], kv_dtype: str | None) -> None:
    """Answers of every length come and go, so that batches and tables of every size are met, and
    recordings are used in another order than they were made in."""
    model = load(folders["llava"], dtype="float32", device="cuda").model
    requests = [asked(about((i,), text(3 + 29 * i % 230, i)), 5 + 7 * i % 40) for i in range(24)]
    found = []
    for graphs in (False, True):
        how = EngineOptions(kv_bytes=64 << 20, kv_dtype=kv_dtype, cuda_graphs=graphs)
        engine = Stepped(model, options=how)
        numbers, events = [], []
        for request in requests:
            numbers.append(engine.add(request))
            events += [event for _ in range(3) for event in engine.events()]
        tokens = said(events + run_out(engine))
        found.append([tokens[number, 0] for number in numbers])
    assert found[0] == found[1]
    assert len(engine._runner._graphs._recordings) > 3


def test_a_replay_does_not_wait_for_the_host(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor the host for it, until the tokens are read."""
    lm = load(folders["llava"], dtype="bfloat16", device="cuda", engine=GRAPHS)
    lm.ask(clip(1), QUESTIONS[0], max_tokens=12, min_new_tokens=12)
    made, replays = Graphs.decode, []

    def watched(self: Graphs, newest: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            replays.append(made(self, newest))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return replays[-1]

    monkeypatch.setattr(Graphs, "decode", watched)
    lm.ask(clip(1), QUESTIONS[0], max_tokens=12, min_new_tokens=12)
    assert len(replays) == 11
    assert all(logits is not None for logits in replays)


def test_a_capture_is_of_what_runs() -> None:
    """On numbers that are put in afterwards; two recordings share their memory and no results."""
    capture = CudaCapture(torch.device("cuda", torch.cuda.current_device()))
    x = torch.zeros(1000, device="cuda")
    with torch.inference_mode():
        first, again = capture(lambda: (x + 1) * 2)
        second, other = capture(lambda: (x - 1).cumsum(0))
        for seed in range(3):
            given = torch.randn(1000, generator=torch.Generator().manual_seed(seed))
            refill(x, given)
            again()
            assert torch.equal(first.cpu(), (given + 1) * 2)
            other()
            assert torch.allclose(second.cpu(), (given - 1).cumsum(0), atol=1e-3)


# ---- attention and uploads -----------------------------------------------------------------------


@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (14, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_later_chunks_by_the_flash_kernel(heads: tuple[int, int], dtype: torch.dtype) -> None:
    """It alone is allowed, so that torch raises where it cannot take them."""
    n, S, E, (H, K) = 96, 352, 64, heads
    shapes = ((n, H, E), (K, S, E), (K, S, E))
    inputs = [torch.randn(shape, device="cuda", dtype=dtype) for shape in shapes]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        found = attention._prefill(*inputs)
    wanted = attention._prefill(*(x.float().cpu() for x in inputs))
    assert torch.allclose(found.float().cpu(), wanted, atol=2e-2)


def test_a_prompt_in_chunks_by_the_flash_kernel(folders: dict[str, Path]) -> None:
    """Of a model whose cache is in blocks here and there."""
    how = EngineOptions(chunk=48, idle_chunk=48, kv_bytes=64 << 20)
    lm = load(folders["llava"], dtype="bfloat16", device="cuda", engine=how)
    features = lm.video(clip(1))
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        assert features.ask(QUESTIONS[0], max_tokens=6).text


def test_uploads_are_whole() -> None:
    """Many at once, from memory that is used again at once, behind a GPU that is busy."""
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        busy = busy @ busy * 1e-3
    given = [torch.full((3, 1000), float(i)) for i in range(200)]
    there = [upload(x, busy.device, torch.bfloat16) for x in given]
    for x, found in zip(given, there, strict=True):
        assert found.dtype == torch.bfloat16
        assert torch.equal(found.cpu(), x.bfloat16())
