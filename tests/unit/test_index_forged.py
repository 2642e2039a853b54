"""A saved video that lies: it reaches the answers about itself, and no others.

The forged file passes for the real one's: same model, same video, other features, other keys and
values, other ids in front of the video. Without the file's own digest in their keys, the cache
would give what it brings to questions about the real video.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import video_forms
import vidlm
from family_forms import FAMILIES, write_family
from saved_files import metadata, read
from straight import nothing_is_held
from vidlm.engine import EngineOptions
from vidlm.models.base import VideoModel

SYSTEM = "You are told nothing but the truth about what is to be seen here, and you say it."
QUESTIONS = ("what happens?", "and what does not happen in it?")
CLIP = video_forms.clip(3, frames=6)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(request.param, tmp_path_factory.mktemp(request.param))


def loaded(folder: Path, **options: Any) -> vidlm.LM:
    return vidlm.load(folder, engine=EngineOptions(**options))


def forge(file: Path, model: VideoModel, lies: Sequence[str]) -> None:
    """Change what the file says: features, keys and values, the ids in front of the video."""
    index, tensors = read(file)
    generator = torch.Generator().manual_seed(7)
    for name, tensor in tensors.items():
        kind = "kv" if name.startswith("kv") else "features" if "encoded" in name else ""
        if kind in lies and tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            tensors[name] = (4 * noise * tensor.float().std()).to(tensor.dtype)
        elif kind in lies:
            tensors[name] = torch.randint(-127, 127, tensor.shape, generator=generator).to(tensor)
    if "prompt" in lies:
        media = set(model.config.placeholders.values())
        index["prompt"] = [id if id in media else 40 for id in index["prompt"]]
    save_file(tensors, file, metadata(index))


def said(lm: vidlm.LM, source: Any) -> list[str]:
    """Answers about a source, and one about nothing behind the same system prompt."""
    told = [lm.ask(source, each, system=SYSTEM, max_tokens=8).text for each in QUESTIONS]
    return [*told, lm.chat(system=SYSTEM).ask(QUESTIONS[0], max_tokens=8).text]


def evil_first(lm: vidlm.LM, file: Path) -> None:
    said(lm, file)


def real_first(lm: vidlm.LM, file: Path) -> None:
    said(lm, CLIP)
    said(lm, file)


def saved_again(lm: vidlm.LM, file: Path) -> None:
    lm.video(file).save(file.with_name("again.safetensors"), system=SYSTEM)


def in_company(lm: vidlm.LM, file: Path) -> None:
    for sources in ([file, CLIP], [CLIP, file]):
        lm.ask(sources, QUESTIONS[0], system=SYSTEM, max_tokens=4)
    chat = lm.chat(file, system=SYSTEM, max_tokens=20)
    chat.ask(QUESTIONS[0])
    chat.ask(QUESTIONS[1])


@pytest.mark.parametrize(
    ("use", "kv"),
    [
        *((use, True) for use in (evil_first, real_first, saved_again, in_company)),
        *((use, False) for use in (real_first, saved_again)),
    ],
)
def test_a_lie_stays_with_its_file(
    folder: Path, tmp_path: Path, use: Callable[[vidlm.LM, Path], None], kv: bool
) -> None:
    wanted = said(loaded(folder), CLIP)
    file = tmp_path / "clip.safetensors"
    maker = loaded(folder)
    maker.video(CLIP).save(file, kv=kv, system=SYSTEM)
    assert said(loaded(folder), file) == wanted
    forge(file, maker.model, ("kv", "features"))
    lm = loaded(folder)
    use(lm, file)
    assert said(lm, CLIP) == wanted
    assert said(lm, file)[:2] != wanted[:2]  # or it would be no lie
    assert said(lm, CLIP) == wanted
    assert nothing_is_held(lm.engine)


@pytest.mark.parametrize(
    ("options", "lies"),
    [
        ({"share": False}, ("features", "kv", "prompt")),
        ({"exact": True}, ("kv",)),
        ({"kv_dtype": "int8"}, ("kv", "prompt")),
    ],
)
def test_whatever_the_lie_and_the_engine(
    folder: Path, tmp_path: Path, options: dict[str, Any], lies: Sequence[str]
) -> None:
    wanted = said(loaded(folder, **options), CLIP)
    file = tmp_path / "clip.safetensors"
    maker = loaded(folder, **{**options, "share": True})
    maker.video(CLIP).save(file, system=SYSTEM)
    forge(file, maker.model, lies)
    lm = loaded(folder, **options)
    said(lm, file)
    assert said(lm, CLIP) == wanted


def test_a_file_is_shared_with_itself_alone(folder: Path, tmp_path: Path) -> None:
    """Two handles of it find the same; a copy is the same file, another one is another."""
    one, copy, other = (tmp_path / f"{name}.safetensors" for name in ("one", "copy", "other"))
    loaded(folder).video(CLIP).save(one, system=SYSTEM)
    copy.write_bytes(one.read_bytes())
    other.write_bytes(one.read_bytes())
    lm = loaded(folder)
    forge(other, lm.model, ("features",))
    media = [lm.video(each).media[0] for each in (one, copy, other)]
    assert media[0].digest == media[1].digest
    assert len({item.digest for item in media} | {lm.video(CLIP).media[0].digest}) == 3
    whole = said(lm, one)
    prefilled = lm.engine.stats.prefilled
    assert said(lm, copy) == whole
    again = lm.engine.stats.prefilled - prefilled
    assert said(lm, other)
    assert lm.engine.stats.features.items == 0  # what a file brings needs no place in the cache
    assert again < prefilled
