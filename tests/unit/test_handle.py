"""lm.video(): a video that is paid for once, asked about anywhere, saved and loaded again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tiny
import vidlm
from clips import clip
from vidlm.api.index_file import FORMAT
from vidlm.engine import EngineOptions
from vidlm.errors import InvalidArgument, MediaNotFound

QUESTION, OTHER = "what happens?", "and what does not?"
TOKENS = 3 * tiny.FRAME_TOKENS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def lm(folder: Path) -> vidlm.LM:
    return vidlm.load(folder)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    path.write_bytes(clip(20))
    return path


def made(lm: vidlm.LM) -> int:
    """Frames that were encoded so far."""
    return lm.engine.stats.features.made


# ---- wherever a source may stand -----------------------------------------------------------------


def test_a_handle_is_its_source(lm: vidlm.LM, path: Path) -> None:
    video = lm.video(path, frames=3)
    wanted = vidlm.load(lm.model.folder).ask(path, QUESTION, frames=3, max_tokens=9)
    assert [frame.index for frame in video.frames] == [0, 6, 13]
    assert (video.name, video.warnings) == (str(path), ())
    for answer in (
        video.ask(QUESTION, max_tokens=9),
        lm.ask(video, QUESTION, max_tokens=9),
        lm.ask([video], QUESTION, max_tokens=9),
        video.stream(QUESTION, max_tokens=9).answer,
        video.chat(max_tokens=9).ask(QUESTION),
        lm.chat(video, max_tokens=9).ask(QUESTION),
        lm.ask(lm.video(video), QUESTION, max_tokens=9),
    ):
        assert (answer.text, answer.frames, answer.usage) == (
            *(wanted.text, wanted.frames, wanted.usage),
        )
        assert answer.timings.decode_media == 0
    assert made(lm) == 3


def test_it_is_paid_for_once(lm: vidlm.LM, path: Path) -> None:
    video = lm.video(path, frames=3)
    first = video.ask(QUESTION, max_tokens=2)
    before = lm.engine.stats.prefilled
    second = video.ask(OTHER, max_tokens=2)
    assert made(lm) == 3
    assert lm.engine.stats.prefilled - before <= second.usage.prompt_tokens - TOKENS
    assert first.usage.media_tokens == second.usage.media_tokens == TOKENS
    chat = video.chat(max_tokens=20)
    chat.ask(QUESTION)
    before = lm.engine.stats.prefilled
    turn = chat.ask("and then?")
    new = lm.engine.stats.prefilled - before
    assert new < turn.usage.prompt_tokens - TOKENS
    assert made(lm) == 3


def test_beside_other_sources(lm: vidlm.LM, path: Path) -> None:
    image, video = tiny.picture(1), lm.video(path, frames=2)
    answer = lm.ask([image, video, path], QUESTION, max_tokens=8, frames=2)
    again = vidlm.load(lm.model.folder).ask([image, path, path], QUESTION, max_tokens=8, frames=2)
    assert (answer.text, answer.frames) == (again.text, again.frames)
    assert {frame.media for frame in answer.frames} == {1, 2}
    assert made(lm) == 3  # the image and two frames, which are the same in both


def test_an_image(lm: vidlm.LM) -> None:
    still = lm.video(tiny.picture(1))
    assert still.frames == ()
    assert (
        still.ask(QUESTION, max_tokens=5).text
        == lm.ask(tiny.picture(1), QUESTION, max_tokens=5).text
    )


def test_frames_are_chosen_once(lm: vidlm.LM, path: Path) -> None:
    video = lm.video(path, indices=np.array([1, 5]))
    assert video.ask(QUESTION, indices=[1, 5], max_tokens=1).usage.media_tokens == 32
    with pytest.raises(InvalidArgument, match=r"chosen by \{'indices': \[1, 5\]\}, .*'frames'"):
        video.ask(QUESTION, frames=3)
    with pytest.raises(InvalidArgument, match=r"chosen by the default, .*'frames': 3"):
        lm.ask([lm.video(path), path], QUESTION, frames=3)
    with pytest.raises(InvalidArgument, match="leave them out, or make another handle"):
        lm.video(video, frames=2)
    with pytest.raises(InvalidArgument, match=r"temperature belong to a question"):
        lm.video(path, temperature=1.0)
    with pytest.raises(TypeError, match="did you mean 'frames'"):
        lm.video(path, frame=3)


def test_a_handle_of_another_model(lm: vidlm.LM, path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"clip\.mp4 was made by another model"):
        lm.ask(vidlm.load(lm.model.folder).video(path), QUESTION)


def test_the_prompt_for_an_engine_of_ones_own(lm: vidlm.LM, path: Path) -> None:
    video = lm.video(path, frames=3)
    answer = video.ask(QUESTION, system="Be brief.", max_tokens=9)
    request = vidlm.engine.Request(
        video.prompt(QUESTION, "Be brief."), vidlm.types.SamplingParams(max_new_tokens=9)
    )
    ids = [token.id for token in lm.engine.stream(request)]
    assert lm.processor.tokenizer.decode(ids, skip_special_tokens=True).strip() == answer.text


# ---- on disk -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", [True, False])
def test_saved_and_loaded(lm: vidlm.LM, path: Path, tmp_path: Path, kv: bool) -> None:
    """It answers with equal tokens, and pays for nothing but the words."""
    video, saved = lm.video(path, frames=3), tmp_path / "clip.safetensors"
    wanted = [video.ask(each, max_tokens=12) for each in (QUESTION, OTHER)]
    video.save(saved, kv=kv)
    other = vidlm.load(lm.model.folder)
    loaded = other.video(saved)
    assert (loaded.name, loaded.frames) == (video.name, video.frames)
    assert [loaded.ask(each, max_tokens=12).text for each in (QUESTION, OTHER)] == [
        answer.text for answer in wanted
    ]
    assert other.ask(saved, QUESTION, max_tokens=12).text == wanted[0].text
    assert other.ask([str(saved), path], QUESTION, max_tokens=3, frames=3).frames
    assert made(other) == 3  # of the video itself, in the last question
    third = vidlm.load(lm.model.folder)
    answer = third.ask(saved, QUESTION, max_tokens=2)
    whole = answer.usage.prompt_tokens
    assert (third.engine.stats.prefilled <= whole - TOKENS) == kv
    assert third.engine.stats.prefilled <= whole
    assert answer.timings.encode == 0


def test_a_saved_video_holds_no_pixels(lm: vidlm.LM, path: Path, tmp_path: Path) -> None:
    video, saved = lm.video(path, frames=3), tmp_path / "clip.safetensors"
    video.save(saved)
    tensors = load_file(saved)
    names = {f"media.{i}.encoded.tokens" for i in range(3)}
    names |= {f"kv.{i}.{what}" for i in range(2) for what in ("keys", "values")}
    assert tensors.keys() == names
    assert tensors["kv.0.keys"].shape[1] % 16 == 0
    assert tensors["kv.0.keys"].shape[1] >= TOKENS
    assert all(item.pixels.numel() == 0 for item in lm.video(saved).media)
    assert not list(tmp_path.glob("*.partial"))
    loaded = vidlm.load(lm.model.folder).video(saved)
    loaded.save(tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert all(torch.equal(tensors[name], again[name]) for name in names)


def test_a_system_prompt_stands_in_front(lm: vidlm.LM, path: Path, tmp_path: Path) -> None:
    system, saved = "Be brief, and do not say what is not there.", tmp_path / "clip.safetensors"
    video = lm.video(path, frames=3)
    video.save(saved, system=system)
    other = vidlm.load(lm.model.folder)
    loaded = other.video(saved)
    plain = loaded.ask(QUESTION, max_tokens=4)
    assert other.engine.stats.prefilled == plain.usage.prompt_tokens
    told = loaded.ask(QUESTION, max_tokens=4, system=system)
    assert other.engine.stats.prefilled < plain.usage.prompt_tokens + 48
    assert told.text == video.ask(QUESTION, max_tokens=4, system=system).text


def test_saving_before_anything_was_asked(lm: vidlm.LM, path: Path, tmp_path: Path) -> None:
    lm.video(path, frames=2).save(tmp_path / "a.safetensors")
    assert made(lm) == 2
    lm.video(path, frames=2).save(tmp_path / "b.safetensors", kv=False)
    assert made(lm) == 2
    sizes = [(tmp_path / name).stat().st_size for name in ("a.safetensors", "b.safetensors")]
    assert sizes[0] > sizes[1] > 0


def test_a_cache_too_small_for_it(lm: vidlm.LM, path: Path, tmp_path: Path) -> None:
    """Keys and values are left out, as there is no room; features do."""
    saved = tmp_path / "clip.safetensors"
    lm.video(path, frames=3).save(saved)
    size = lm.engine.room and 2 * 2 * 2 * 8 * 4 * 16
    small = vidlm.load(lm.model.folder, engine=EngineOptions(kv_bytes=7 * size))
    busy = small.engine.stream(
        vidlm.engine.Request(
            vidlm.models.base.Prompt(tuple(range(10, 70))),
            vidlm.types.SamplingParams(max_new_tokens=9),
        )
    )
    next(busy)
    loaded = small.video(saved)
    busy.close()
    wanted = lm.ask(path, QUESTION, frames=3, max_tokens=3)
    assert loaded.ask(QUESTION, max_tokens=3).text == wanted.text


# ---- what is refused -----------------------------------------------------------------------------


@pytest.fixture
def saved(lm: vidlm.LM, path: Path, tmp_path: Path) -> Path:
    file = tmp_path / "clip.safetensors"
    lm.video(path, frames=3).save(file)
    return file


def test_what_does_not_agree_is_named(
    lm: vidlm.LM, saved: Path, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(InvalidArgument, match=r"whose dtype is float32, this one's is bfloat16"):
        vidlm.load(folder, dtype="bfloat16").video(saved)
    with pytest.raises(InvalidArgument, match=r"clip\.safetensors was saved with the frames .*3"):
        lm.video(saved, frames=4)
    assert lm.video(saved, frames=3).ask(QUESTION, max_tokens=1)
    with pytest.raises(InvalidArgument, match=r"frames .*'frames': 3.* asked for now"):
        lm.ask(saved, QUESTION, fps=1)
    exact = vidlm.load(folder, engine=EngineOptions(exact=True))
    with pytest.raises(InvalidArgument, match="by an engine that was not exact"):
        exact.video(saved)
    exact.video(clip(20), frames=3).save(tmp_path / "exact.safetensors")
    assert lm.video(tmp_path / "exact.safetensors").ask(QUESTION, max_tokens=1)
    form = tiny.FORMS["siglip-qwen2"]
    other = vidlm.load(tiny.write(tmp_path / "other", form))
    with pytest.raises(InvalidArgument, match="by a model whose config is"):
        other.video(saved)


PACKED = "int8, the head in int8"


@pytest.mark.parametrize(
    ("theirs", "mine", "said"),
    [
        ("int8", None, f"weights in {PACKED}, this one's are in float32; load the model with qu"),
        ("int8", "int4", f"weights in {PACKED}, this one's are in int4, the head in int8; load "),
        (None, "int8", f"weights in float32, this one's are in {PACKED}; load the original"),
    ],
)
def test_another_quantization_is_named(
    folder: Path, path: Path, tmp_path: Path, theirs: str | None, mine: str | None, said: str
) -> None:
    """With a way out, and unless a file of before it was written; its own kind is taken."""
    lm, file = vidlm.load(folder, quantize=mine), tmp_path / "clip.safetensors"
    maker = vidlm.load(folder, quantize=theirs)
    maker.video(path, frames=3).save(file)
    assert vidlm.load(folder, quantize=theirs).video(file)
    with pytest.raises(InvalidArgument, match=rf"clip\.safetensors was saved by .* {said}") as told:
        lm.video(file)
    way = f"quantize={theirs!r}" if theirs else "without quantize"
    assert str(told.value).endswith(f"{way}, or save the video again with this one")
    rewritten(file, lambda told: told["identity"].pop("scheme"))
    assert maker.video(file)
    with pytest.raises(InvalidArgument, match="by a model whose weights is"):
        lm.video(file)


def test_a_quantization_without_a_short_name(lm: vidlm.LM, path: Path, tmp_path: Path) -> None:
    file, config = tmp_path / "clip.safetensors", vidlm.QuantoConfig("int4")
    kind = type(lm.model)
    maker = vidlm.LM(
        kind.from_pretrained(lm.model.folder, quantization_config=config), lm.processor
    )
    maker.video(path, frames=3).save(file)
    with pytest.raises(
        InvalidArgument, match=r"in int4, this .* with that quantization_config, or"
    ):
        lm.video(file)


def test_weights_that_changed(lm: vidlm.LM, saved: Path, tmp_path: Path) -> None:
    loaded = lm.video(saved)
    with torch.no_grad():
        lm.model.head.weight[0, 0] += 1
    with pytest.raises(InvalidArgument, match="weights were changed since; make it again"):
        loaded.ask(QUESTION)
    with pytest.raises(InvalidArgument, match="weights were changed since"):
        loaded.save(tmp_path / "new.safetensors")
    with pytest.raises(InvalidArgument, match="whose weights is"):
        lm.video(saved)


def rewritten(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """With other metadata."""
    with safe_open(file, "pt") as opened:
        told = json.loads(opened.metadata()["index"])
    change(told)
    save_file(load_file(file), file, {"format": FORMAT, "index": json.dumps(told)})


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-100]), "is damaged"),
        (lambda file: file.write_bytes(b"no such thing"), "is damaged"),
        (lambda file: file.write_bytes(b""), "is damaged"),
        (lambda file: save_file({"x": torch.zeros(1)}, file), "its format is None"),
        (lambda file: save_file(load_file(file), file, {"format": "vidlm-video-0"}), "video-0"),
        (lambda file: save_file(load_file(file), file, {"format": FORMAT}), "is damaged"),
        (lambda file: rewritten(file, lambda told: told.pop("prompt")), "is damaged"),
        (lambda file: rewritten(file, lambda told: told.update(layers=5)), "is damaged"),
        (lambda file: rewritten(file, lambda told: told.update(layers=1)), "is damaged"),
        (lambda file: rewritten(file, lambda told: told["media"].pop()), "is damaged"),
        (lambda file: rewritten(file, lambda told: told["prompt"].pop(9)), "is damaged"),
        (lambda file: rewritten(file, lambda told: told["media"][0].pop("class")), "is damaged"),
        (
            lambda file: rewritten(
                file, lambda told: told["identity"].update(model_type="video_x")
            ),
            "whose model_type is video_x, this one's is llava",
        ),
    ],
)
def test_files_that_are_none(
    lm: vidlm.LM, saved: Path, spoil: Callable[[Path], object], said: str
) -> None:
    spoil(saved)
    with pytest.raises(InvalidArgument, match=said) as raised:
        lm.video(saved)
    assert "clip.safetensors" in str(raised.value)
    assert lm.engine.idle


def test_files_that_are_not_there(lm: vidlm.LM, tmp_path: Path) -> None:
    with pytest.raises(MediaNotFound, match=r"nothing\.safetensors does not exist; save a video"):
        lm.video(tmp_path / "nothing.safetensors")
    with pytest.raises(MediaNotFound):
        lm.ask(tmp_path / "nothing.safetensors", QUESTION)


def test_another_suffix(lm: vidlm.LM, path: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"must end with \.safetensors"):
        lm.video(path).save(tmp_path / "clip.bin")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        lm.video(path).save(tmp_path / "nowhere" / "clip.safetensors")
