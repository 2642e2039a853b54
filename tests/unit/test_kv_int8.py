"""EngineOptions(kv_dtype="int8"): the same answers whoever else is served, in half the room."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny
import vidlm
from clips import clip
from straight import (
    Stepped,
    about,
    answers,
    ask,
    asked,
    nothing_is_held,
    run_out,
    text,
    tiny_model,
    whole_logits,
)
from vidlm import LlavaForConditionalGeneration
from vidlm.engine import EngineOptions, Failure, Token, generate
from vidlm.engine.forward import Newest, Part, decode, prefill
from vidlm.engine.inputs import PromptInputs
from vidlm.engine.kv import PagedKV, Table, bytes_per_token
from vidlm.engine.options import BLOCK
from vidlm.engine.store import block_bytes
from vidlm.errors import InvalidArgument
from vidlm.fit import Dtypes, need
from vidlm.hf import LlavaConfig
from vidlm.models.base import VideoModel, finished
from vidlm.plan import plan

INT8 = {"kv_dtype": "int8"}
NEW = 10
SYSTEM = text(21)
LONG = text(500, 5)  # with a question, one cell of the exact grid and part of another
REQUESTS = (
    asked(about((1, 2, 3), text(9, 1), SYSTEM), NEW),
    asked(about((1, 2, 3), text(12, 2), SYSTEM), NEW),
    asked(about((3, 4), text(40, 3)), NEW, n=2),
    asked(about((), text(70, 4)), NEW, temperature=1.0, seed=1),
    asked(about((1,), text(30, 5)), NEW, num_beams=3),
)
EXACT = (
    asked(about((1, 2, 3), text(9, 1), SYSTEM), NEW, logprobs=1),
    asked(about((), text(70, 4)), NEW, logprobs=1, temperature=1.0, seed=1),
    asked(about((2,), text(30, 6), LONG), NEW, logprobs=1),
    asked(about((2,), text(45, 7), LONG), NEW, logprobs=1, n=2),
)
Said = dict[int, list[tuple[int, float | None]]]


def engine_of(model: VideoModel, blocks: int = 300, **how: Any) -> Stepped:
    room = blocks * block_bytes(model, "int8")
    return Stepped(model, options=EngineOptions(kv_bytes=room, **INT8, **how))


def said(events: list[Token | Failure], request: int) -> Said:
    """By answer; tokens and, where they were asked for, their log-probabilities."""
    found: Said = {}
    for event in events:
        assert isinstance(event, Token)
        if event.request == request:
            found.setdefault(event.choice, []).append((event.id, event.logprob))
    return found


def alone(model: VideoModel, request: Any, **how: Any) -> Said:
    """By an engine that serves nobody else."""
    engine = engine_of(model, **how)
    number = engine.add(request)
    return said(run_out(engine), number)


@pytest.fixture(scope="module")
def model() -> VideoModel:
    return tiny_model()


@pytest.fixture(scope="module")
def wide() -> VideoModel:
    """In bfloat16, with sums whose order depends on how many are made at a time."""
    sizes = {"hidden_size": 256, "intermediate_size": 640, "max_position_embeddings": 2048}
    config = tiny.INTERLEAVE.config
    config["text_config"].update(sizes)
    made = LlavaForConditionalGeneration(LlavaConfig.from_dict(config)).eval()
    tiny.randomise(made)
    return made.requires_grad_(False).to(torch.bfloat16)


@pytest.fixture(scope="module")
def singles(model: VideoModel) -> list[Said]:
    return [alone(model, request) for request in REQUESTS]


@pytest.fixture(scope="module")
def exact_singles(wide: VideoModel) -> list[Said]:
    return [alone(wide, request, exact=True) for request in EXACT]


# ---- answers -------------------------------------------------------------------------------------


def company(
    engine: Stepped, requests: tuple[Any, ...], rng: random.Random
) -> list[tuple[int, Said]]:
    """Requests that come at any time; which each was, and what was said to it."""
    numbers: dict[int, int] = {}
    events: list[Token | Failure] = []
    for _ in range(rng.randint(3, 10)):
        if rng.random() < 0.5:
            which = rng.randrange(len(requests))
            numbers[engine.add(requests[which])] = which
        else:
            events += [event for _ in range(rng.randint(1, 8)) for event in engine.events()]
    events += run_out(engine)
    assert nothing_is_held(engine)
    return [(which, said(events, number)) for number, which in numbers.items()]


@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**32),
    blocks=st.integers(16, 120),
    share=st.booleans(),
    chunk=st.sampled_from([3, 24, 512]),
)
def test_any_company_in_float32(
    model: VideoModel, singles: list[Said], seed: int, blocks: int, share: bool, chunk: int
) -> None:
    """With prompts that share beginnings, and little room: some give way and are computed again."""
    engine = engine_of(model, blocks, share=share, chunk=chunk, idle_chunk=chunk)
    for which, found in company(engine, REQUESTS, random.Random(seed)):
        assert found == singles[which], which


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32), blocks=st.integers(40, 120), share=st.booleans())
def test_any_company_in_exact_mode(
    wide: VideoModel, exact_singles: list[Said], seed: int, blocks: int, share: bool
) -> None:
    """Bit by bit of the logits, in bfloat16."""
    engine = engine_of(wide, blocks, share=share, exact=True)
    for which, found in company(engine, EXACT, random.Random(seed)):
        assert found == exact_singles[which], which


def test_streamed_generated_and_found_stored(model: VideoModel, singles: list[Said]) -> None:
    wanted = [[id for id, _ in each[0]] for each in singles]
    engine = engine_of(model)
    for _ in range(2):
        assert [ask(engine, REQUESTS[which]) for which in (0, 1, 3)] == [
            wanted[which] for which in (0, 1, 3)
        ]
    assert engine.stats.scheduler.pool.hits > 0
    together = generate(model, REQUESTS[:2], options=EngineOptions(**INT8, share=False))
    assert [list(output.ids) for output in together] == wanted[:2]


def test_without_kernels(
    wide: VideoModel, exact_singles: list[Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("ops", "calls"):
        monkeypatch.setattr(f"vidlm.native.{module}.library", lambda: None)
    single = alone(wide, EXACT[2], exact=True)
    engine = engine_of(wide, exact=True)
    numbers = [engine.add(request) for request in EXACT]
    assert said(run_out(engine), numbers[2]) == single


def test_it_is_used(wide: VideoModel, exact_singles: list[Said]) -> None:
    """The logits are not those of the model's dtype: else the tests above would prove little."""
    engine = Stepped(wide, options=EngineOptions(exact=True))
    number = engine.add(EXACT[2])
    assert said(run_out(engine), number) != exact_singles[2]


# ---- error ---------------------------------------------------------------------------------------


def test_logits_of_the_demo_model() -> None:
    """After a question about a video and each token of the answer, led along the same answer."""
    lm = vidlm.load("demo", dtype="float32")
    prompt = lm.video(clip(12), frames=8).prompt("What do you see?")
    (answer,) = generate(lm.model, [asked(prompt, 24)])
    wanted = whole_logits(lm.model, prompt, answer.ids[:-1])
    rows = forced(lm.model, prompt, answer.ids)
    wanted = wanted - wanted.mean(-1, keepdim=True)
    error = relative(rows - rows.mean(-1, keepdim=True), wanted)
    assert 1e-4 < error < 0.02
    assert (rows.argmax(-1) == wanted.argmax(-1)).float().mean() >= 0.9


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@torch.inference_mode()
def forced(model: VideoModel, prompt: Any, answer: tuple[int, ...]) -> Tensor:
    """Logits (n, V) that each token of the answer is chosen by, with keys and values in int8."""
    inputs = PromptInputs(model, prompt)
    finished(inputs.encoding())
    blocks = range(-(-(len(prompt.ids) + len(answer)) // BLOCK))
    kv, table = PagedKV(len(blocks), BLOCK, coded=True), Table(blocks)
    rows = [prefill(model, kv, [Part.of(inputs, prompt.ids, 0, blocks)])]
    for i, token in enumerate(answer[:-1]):
        rows.append(decode(model, kv, [Newest(token, len(prompt.ids) + i + 1, table, None)]))
    return torch.cat(rows)


# ---- room ----------------------------------------------------------------------------------------


def test_bytes_are_those_of_codes_and_scales(model: VideoModel) -> None:
    assert bytes_per_token(24, 16, 64, torch.int8) == 2 * 24 * 16 * (64 + 4)
    assert bytes_per_token(24, 16, 64, torch.bfloat16) == 2 * 24 * 16 * 128
    size = block_bytes(model, "int8")
    assert size < block_bytes(model)
    engine = engine_of(model, 10)
    assert engine.room == 10 * BLOCK
    ask(engine, asked(about((1,), text(9, 1)), 3))
    assert sum(k.nbytes + v.nbytes for k, v in engine._store.kv.layers) == 10 * size


def test_plans_know_it(folder: Path) -> None:
    full, half = plan(folder), plan(folder, kv_dtype="int8")
    sizes = LlavaConfig.from_dict(tiny.FORMS["siglip-qwen2-tied"].config).text_config
    assert full.kv_bytes_per_token - half.kv_bytes_per_token == (
        2 * sizes.num_hidden_layers * sizes.num_key_value_heads * (3 * sizes.head_dim - 4)
    )
    assert full.weight_bytes == half.weight_bytes
    config = LlavaConfig.from_dict(tiny.FORMS["siglip-qwen2-tied"].config)
    one, two = (need(config, Dtypes(torch.float32, kv), 3, 20) for kv in (None, "int8"))
    assert (one.held_bytes, one.work_bytes) == (two.held_bytes, two.work_bytes)
    assert one.kv_bytes > two.kv_bytes
    with pytest.raises(InvalidArgument, match="kv_dtype='int3'"):
        plan(folder, kv_dtype="int3")


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"kv_dtype='int4'; allowed: 'int8', or None"):
        EngineOptions(kv_dtype="int4")


# ---- saved videos --------------------------------------------------------------------------------

QUESTION = "What do you see?"


def test_a_saved_video_is_for_engines_of_its_kind(folder: Path, tmp_path: Path) -> None:
    coded = vidlm.load(folder, engine=EngineOptions(**INT8))
    plain = vidlm.load(folder)
    video = coded.video(clip(20), frames=3)
    wanted = video.ask(QUESTION, max_tokens=4).text
    for name, lm in (("coded", coded), ("plain", plain)):
        lm.video(clip(20), frames=3).save(tmp_path / f"{name}.safetensors")
    coded.video(clip(20), frames=3).save(tmp_path / "features.safetensors", kv=False)
    sizes = {path.stem: path.stat().st_size for path in tmp_path.iterdir()}
    kept = sizes["plain"] - sizes["features"]
    assert sizes["coded"] - sizes["features"] < 0.7 * kept  # heads of 8 numbers have a scale each

    again = vidlm.load(folder, engine=EngineOptions(**INT8))
    loaded = again.video(tmp_path / "coded.safetensors")
    assert again.ask(loaded, QUESTION, max_tokens=4).text == wanted
    assert again.engine.stats.prefilled < len(video.prompt(QUESTION).ids)
    with pytest.raises(InvalidArgument, match=r"whose kv_dtype is 'int8', this one's is None"):
        plain.video(tmp_path / "coded.safetensors")
    with pytest.raises(InvalidArgument, match=r"whose kv_dtype is None, this one's is 'int8'"):
        coded.video(tmp_path / "plain.safetensors")
    assert plain.ask(tmp_path / "features.safetensors", QUESTION, max_tokens=1)


def test_keys_and_values_of_another_engine(model: VideoModel) -> None:
    prompt = about((1,), text(30, 1))
    one, other = engine_of(model), Stepped(model)
    for engine in (one, other):
        ask(engine, asked(prompt, 1))
    stored = one.stored(prompt)
    assert one.store(prompt, stored)
    fresh = engine_of(model)
    assert fresh.store(prompt, stored)
    assert ask(fresh, asked(prompt, 4)) == ask(one, asked(prompt, 4))
    with pytest.raises(InvalidArgument, match="another kv_dtype than this engine's, which is None"):
        other.store(prompt, stored)
    with pytest.raises(InvalidArgument, match="this engine's, which is 'int8'"):
        fresh.store(prompt, other.stored(prompt))


def test_a_file_whose_scales_are_missing(folder: Path, tmp_path: Path) -> None:
    lm, path = vidlm.load(folder, engine=EngineOptions(**INT8)), tmp_path / "clip.safetensors"
    lm.video(clip(20), frames=2).save(path)
    with safe_open(path, "pt") as file:
        told = file.metadata()
    tensors = load_file(path)
    scales = tensors.pop("kv.1.values.scales")
    for more in ({}, {"kv.1.values.scales": scales[:, :-1].clone()}):
        save_file({**tensors, **more}, path, told)
        with pytest.raises(InvalidArgument, match="is damaged"):
            lm.video(path)


def test_further_answers_go_their_own_ways(model: VideoModel) -> None:
    """In copies of the block where the prompt ends."""
    engine = engine_of(model)
    number = engine.add(asked(about((1,), text(5, 3)), 12, n=3, temperature=1.0, seed=4))
    found = answers(run_out(engine))
    assert len({tuple(found[number, i]) for i in range(3)}) > 1


# ---- the benchmark -------------------------------------------------------------------------------


def test_the_benchmark_runs() -> None:
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join(filter(None, [str(root / "src"), os.environ.get("PYTHONPATH")]))
    words = ("--tiny", "--runs", "1", "--tokens", "2", "--clips", "1")
    done = subprocess.run(
        [sys.executable, str(root / "benchmarks" / "kv_int8.py"), *words],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (found,) = [json.loads(line) for line in done.stdout.splitlines()]
    # two layers of two heads of 16 numbers
    assert found["bfloat16"]["bytes_per_token"] == 2 * 2 * 2 * 32
    assert found["int8"]["bytes_per_token"] == 2 * 2 * 2 * 20
    assert all(0 < found["demo"][dtype]["error"] < 0.05 for dtype in ("bfloat16", "float32"))
