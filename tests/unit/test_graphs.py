"""engine/graphs.py: decoding by recordings gives the answers of decoding without them.

No GPU is needed: devices are those of tests/devices.py, recordings those of tests/recorded.py.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import devices
import slowfast_forms
import tiny
import video_forms
import vidlm
from recorded import Recorder
from straight import (
    Stepped,
    about,
    answers,
    ask,
    asked,
    nothing_is_held,
    run_out,
    straight,
    text,
    tiny_model,
)
from vidlm.engine import EngineOptions, forward, graphs
from vidlm.engine.forward import Newest, Part
from vidlm.engine.graphs import Bucket, Graphs
from vidlm.engine.inputs import PromptInputs
from vidlm.engine.kv import PagedKV, Table
from vidlm.engine.options import BLOCK
from vidlm.engine.store import block_bytes
from vidlm.errors import InvalidArgument
from vidlm.models.base import VideoModel
from vidlm.native import tensors_of

FAMILIES = ("llava", *video_forms.FORMS)
QUESTIONS = ("what happens?", "what happens, then?")
CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
CPU_GENERATOR = torch.Generator
NEW = 9
PROMPTS = (
    about((), text(5)),
    about((1, 2, 3), text(9, 1)),
    about((4,), text(40, 3)),
    about((), text(251, 4)),  # ends a bucket's width with its fifth token
    about((5, 6), text(16, 5)),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny checkpoint of each family."""
    root = tmp_path_factory.mktemp("checkpoints")
    made = {name: root / name for name in (*FAMILIES, "slow-fast")}
    for folder in made.values():
        folder.mkdir()
    tiny.write(made["llava"])
    slowfast_forms.write(made["slow-fast"])
    for name, form in video_forms.FORMS.items():
        form.write(made[name])
    return made


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """What an engine on a GPU records with."""
    made = Recorder()
    monkeypatch.setattr(graphs, "CudaCapture", lambda device: made)
    return made


@pytest.fixture
def gpu() -> Iterator[list[devices.Upload]]:
    with devices.gpus() as uploads:
        yield uploads


@pytest.fixture
def model(gpu: object, folders: dict[str, Path]) -> VideoModel:
    made: VideoModel = vidlm.LlavaForConditionalGeneration.from_pretrained(
        folders["llava"], device_map="cuda"
    )
    assert made.device == GPU
    return made


@cache
def known(prompt: int, new: int = NEW) -> tuple[int, ...]:
    """The straightforward answer."""
    with torch._C.DisableTorchFunction():  # on the CPU, whatever the test pretends
        return tuple(straight(tiny_model(), asked(PROMPTS[prompt], new)))


def engine_of(model: VideoModel, blocks: int = 100, **how: Any) -> Stepped:
    room = blocks * block_bytes(model, how.get("kv_dtype"))
    return Stepped(model, options=EngineOptions(kv_bytes=room, cuda_graphs=True, **how))


# ---- answers -------------------------------------------------------------------------------------


def load(folder: Path, **how: Any) -> vidlm.LM:
    """With a chat template, which these tiny checkpoints have none of."""
    lm = vidlm.load(folder, **how)
    token = lm.processor.video_token or lm.processor.image_token
    place = "{% if part['type'] != 'text' %}" + token + "{% else %}{{ part['text'] }}{% endif %}"
    each = "{% for part in message['content'] %}" + place + "{% endfor %}"
    lm.processor.chat_template = "{% for message in messages %}" + each + "{% endfor %} answer:"
    return lm


@pytest.mark.parametrize("family", FAMILIES)
def test_families(folders: dict[str, Path], recorder: Recorder, family: str) -> None:
    clip = video_forms.clip(1, frames=8)
    plain = load(folders[family])
    expected = [plain.ask(clip, q, max_tokens=8).text for q in QUESTIONS]
    with devices.gpus():
        lm = load(folders[family], device="cuda", engine=EngineOptions(cuda_graphs=True))
        assert [lm.ask(clip, q, max_tokens=8).text for q in QUESTIONS] == expected
        assert recorder.replays == lm.engine.stats.decoded > 0


@pytest.mark.parametrize("seed", range(4))
def test_in_company(model: VideoModel, recorder: Recorder, seed: int) -> None:
    """Requests that come at any time and leave, in so little room that some have to give way."""
    rng = random.Random(seed)
    how = {"max_sequences": rng.choice([2, 3, 8]), "chunk": rng.choice([30, 512])}
    engine = engine_of(model, rng.randint(18, 40), **how)
    asked_for: dict[int, int] = {}
    events = []
    for _ in range(rng.randint(6, 10)):
        which = rng.randrange(len(PROMPTS))
        asked_for[engine.add(asked(PROMPTS[which], NEW))] = which
        if rng.random() < 0.2:
            left = rng.choice([*asked_for])
            engine.abort(left)
            asked_for.pop(left)
        events += [event for _ in range(rng.randint(0, 5)) for event in engine.events()]
    events += run_out(engine)
    found = answers(events)
    for number, which in asked_for.items():
        assert tuple(found[number, 0]) == known(which), which
    assert recorder.replays > 0
    assert nothing_is_held(engine)


def test_those_that_give_way(model: VideoModel, recorder: Recorder) -> None:
    """An answer that is computed again, in other blocks, is the same."""
    engine = engine_of(model, blocks=4)
    first, second = (engine.add(asked(PROMPTS[0], 34)) for _ in range(2))
    found = answers(run_out(engine))
    assert engine.stats.scheduler.preempted > 0
    assert tuple(found[first, 0]) == tuple(found[second, 0]) == known(0, 34)


def test_across_the_border_of_a_bucket(model: VideoModel, recorder: Recorder) -> None:
    engine = engine_of(model)
    assert tuple(ask(engine, asked(PROMPTS[3], NEW))) == known(3)
    widths = [bucket.width for bucket in engine._runner._graphs._recordings]
    assert widths == [16, 32]


def test_eight_bits(model: VideoModel, recorder: Recorder) -> None:
    requests = [asked(prompt, NEW) for prompt in PROMPTS]
    plain = Stepped(tiny_model(), options=EngineOptions(kv_dtype="int8", kv_bytes=1 << 20))
    with torch._C.DisableTorchFunction():
        expected = [ask(plain, request) for request in requests]
    engine = engine_of(model, kv_dtype="int8")
    numbers = [engine.add(request) for request in requests]
    found = answers(run_out(engine))
    assert [found[number, 0] for number in numbers] == expected
    assert recorder.replays > 0


def test_sampling_choices_and_beams(
    model: VideoModel, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What happens to logits is not recorded; more answers than are expected are computed."""
    how: list[dict[str, Any]] = [
        {"temperature": 1.0, "seed": 3, "n": 3, "logprobs": 2},
        {"num_beams": 3},
        {"repetition_penalty": 1.3},
    ]
    monkeypatch.setattr(torch, "Generator", lambda device: CPU_GENERATOR(CPU))
    requests = [asked(PROMPTS[1], NEW, **each) for each in how]
    plain = Stepped(model, options=EngineOptions(kv_bytes=1 << 20))
    expected = [[token.id for token in plain.stream(request)] for request in requests]
    for most in (8, 2):
        engine = engine_of(model, max_sequences=most)
        assert [[token.id for token in engine.stream(each)] for each in requests] == expected
        assert 0 < recorder.replays < sum(len(each) for each in expected)


# ---- slots ---------------------------------------------------------------------------------------


class Three:
    """Sequences behind their prompts, in blocks that lie anywhere, and NaN in every other slot."""

    def __init__(self, model: VideoModel, coded: bool) -> None:
        blocks = list(range(12))
        random.Random(1).shuffle(blocks)
        self.model, self.spare = model, 12
        self.tables = [[blocks.pop() for _ in range(4)] for _ in range(3)]
        self.stops = [5, 16, 47]
        self.kv = PagedKV(13, BLOCK, model.device, coded=coded)
        with torch.inference_mode():
            parts = [self.part(i, stop) for i, stop in enumerate(self.stops)]
            forward.prefill(model, self.kv, parts)
            held = self.slots(range(3))
            for buffer in self.buffers():
                free = [i for i in range(buffer.shape[1]) if i not in held]
                buffer[:, free] = torch.nan if buffer.is_floating_point() else 77

    def part(self, i: int, stop: int) -> Part:
        prompt = about((), text(stop, i))
        return Part.of(PromptInputs(self.model, prompt), prompt.ids, 0, self.tables[i])

    def newest(self, which: range) -> list[Newest]:
        return [Newest(20 + i, self.stops[i] + 1, Table(self.tables[i]), None) for i in which]

    def slots(self, which: range, start: int = 0) -> set[int]:
        """Of the tokens from `start`, or of the newest alone."""
        spans = {
            i: range(0 if not start else self.stops[i], self.stops[i] + bool(start)) for i in which
        }
        return {self.tables[i][t // BLOCK] * BLOCK + t % BLOCK for i, s in spans.items() for t in s}

    def buffers(self) -> list[Tensor]:
        return [x for layer in self.kv.layers for cache in layer for x in tensors_of(cache)]


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_only_own_slots_are_used(model: VideoModel, coded: bool, count: int) -> None:
    """What fills a batch and its tables up writes to the spare block, and nothing that others have
    or that nobody wrote reaches an answer."""
    expected, found = Three(model, coded), Three(model, coded)
    which = range(count)
    made = Graphs(model, found.kv, found.spare, 4, Recorder())
    before = [buffer.clone() for buffer in found.buffers()]
    with torch.inference_mode():
        logits = made.decode(found.newest(which))
        wanted = forward.decode(model, expected.kv, expected.newest(which))
    assert logits is not None
    assert logits.isfinite().all()
    assert torch.allclose(logits, wanted, rtol=1e-5, atol=1e-5)
    mine = found.slots(which, start=1)
    for buffer, old in zip(found.buffers(), before, strict=True):
        rows = zip(buffer.transpose(0, 1), old.transpose(0, 1), strict=True)
        changed = {i for i, (a, b) in enumerate(rows) if not a.allclose(b, 0, 0, equal_nan=True)}
        assert mine <= changed <= mine | {found.spare * BLOCK}


def test_a_result_outlives_the_next_replay(model: VideoModel) -> None:
    three = Three(model, coded=False)
    made = Graphs(model, three.kv, three.spare, 4, Recorder())
    with torch.inference_mode():
        first = made.decode(three.newest(range(1)))
        copy = first.clone()
        made.decode(three.newest(range(2, 3)))
    assert torch.equal(first, copy)


# ---- recordings ----------------------------------------------------------------------------------


def test_recordings_are_bounded(
    model: VideoModel, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The least recently used goes first, and is made anew when it is wanted again."""
    monkeypatch.setattr(graphs, "MOST", 2)
    engine = engine_of(model)
    for which, widths in ((0, [16]), (3, [16, 32]), (0, [32, 16])):
        assert tuple(ask(engine, asked(PROMPTS[which], NEW))) == known(which)
        kept = engine._runner._graphs._recordings
        assert [bucket.width for bucket in kept] == widths
    assert len(recorder.made) == 2
    for prompt in (0, 1, 2):
        engine.add(asked(PROMPTS[prompt], NEW))
    run_out(engine)
    assert len(engine._runner._graphs._recordings) == 2
    assert len(recorder.made) > 3


def test_hooks_see_every_token(model: VideoModel, recorder: Recorder) -> None:
    engine, seen = engine_of(model), []
    request = asked(PROMPTS[0], NEW)
    ask(engine, request)
    before = recorder.replays
    hook = model.decoder.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    assert tuple(ask(engine, request)) == known(0)
    assert (len(seen), recorder.replays) == (NEW, before)
    hook.remove()
    assert tuple(ask(engine, request)) == known(0)
    assert recorder.replays == before + NEW - 1


def test_another_module_is_recorded_anew(model: VideoModel, recorder: Recorder) -> None:
    class Silent(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros_like(x)

    engine, request = engine_of(model), asked(PROMPTS[0], NEW)
    ask(engine, request)
    model.decoder.layers[1].mlp = Silent()
    plain = Stepped(model, options=EngineOptions(kv_bytes=1 << 20))
    assert ask(engine, request) == ask(plain, request) != list(known(0))
    assert len(recorder.made) == 2


def test_clear_forgets_recordings(model: VideoModel, recorder: Recorder) -> None:
    engine, request = engine_of(model), asked(PROMPTS[0], NEW)
    ask(engine, request)
    engine.clear()
    assert not engine._runner._graphs._recordings
    stream = engine.stream(request)
    found = [next(stream).id, next(stream).id]
    engine.clear()  # in the middle of an answer
    assert not engine._runner._graphs._recordings
    assert (*found, *(token.id for token in stream)) == known(0)
    assert len(recorder.made) == 3


# ---- where there are none ------------------------------------------------------------------------


def test_models_that_cannot_be_recorded(folders: dict[str, Path]) -> None:
    wanted = EngineOptions(cuda_graphs=True)
    with pytest.raises(InvalidArgument, match="it is on cpu; leave the option out"):
        Stepped(tiny_model(), options=wanted)
    with devices.gpus():
        slow_fast = load(folders["slow-fast"], device="cuda").model
        with pytest.raises(InvalidArgument, match="attend to a memory"):
            Stepped(slow_fast, options=wanted)
        last = "model.language_model.layers.1"
        for where in (1, "cpu"):
            placed = load(folders["llava"], device={"": 0, last: where}).model
            with pytest.raises(InvalidArgument, match="on several devices or wait"):
                Stepped(placed, options=wanted)
    with pytest.raises(InvalidArgument, match="exclude each other"):
        EngineOptions(cuda_graphs=True, exact=True)


def test_not_under_autocast(model: VideoModel, recorder: Recorder) -> None:
    engine = engine_of(model)
    torch.set_autocast_enabled("cuda", True)
    try:
        ask(engine, asked(PROMPTS[0], NEW))
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert not recorder.made


# ---- what stands between this and a GPU ----------------------------------------------------------


@pytest.mark.parametrize("graphs_too", [False, True])
def test_nothing_waits_to_be_fetched(
    model: VideoModel, recorder: Recorder, gpu: list[devices.Upload], graphs_too: bool
) -> None:
    """Pixels, prompts and tokens come from pinned memory; by recordings, in one piece a step."""
    engine = Stepped(model, options=EngineOptions(kv_bytes=1 << 20, cuda_graphs=graphs_too))
    engine.add(asked(PROMPTS[1], NEW))
    gpu.clear()
    steps = 0
    while not engine.idle:
        decoding = engine.stats.decoded
        before = len(gpu)
        engine.events()
        if graphs_too and recorder.replays > 1 and engine.stats.decoded > decoding:
            steps += 1
            assert [upload.shape for upload in gpu[before:]] == [(Bucket(1, 16).size,)]
    assert not [upload for upload in gpu if upload.waited]
    assert (3, 3, 28, 28) in [upload.shape for upload in gpu]
    assert steps == (NEW - 2 if graphs_too else 0)
