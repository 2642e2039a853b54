"""A saved video with anything in it changed: an answer, or an error of ours, and no harm."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save
from torch import Tensor

import video_forms
import vidlm
from family_forms import write_family
from saved_files import metadata, put, read, rewrite
from vidlm.errors import InvalidArgument, VidlmError

QUESTION = "what happens?"
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 3, 1 << 31, 10**40, -0.5, 1e308, "", "x", "image", "video"),
    *([], [0], [[]], {}, {"type": "image"}, {"a": 1}),
)


def mutate(value: Any, rng: random.Random) -> Any:
    """The value with something in it replaced, dropped or doubled."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        name = rng.choice(list(value))
        if rng.random() < 0.1:
            return {k: v for k, v in value.items() if k != name}
        return {**value, name: mutate(value[name], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        doubled = rng.random() < 0.1
        return [*value[:at], mutate(value[at], rng), *value[at + (not doubled) :]]
    return rng.choice(VALUES)


@pytest.fixture(scope="module", params=["llava", "videollama3"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> vidlm.LM:
    folder = tmp_path_factory.mktemp(request.param)
    return vidlm.load(write_family(request.param, folder))


def test_any_mutation_is_an_answer_or_an_error_of_ours(family: vidlm.LM, tmp_path: Path) -> None:
    """Of the index, of tensors' names and types, and of single bytes."""
    path, rng = tmp_path / "clip.safetensors", random.Random(5)
    real = video_forms.clip(3, frames=4)
    family.video(real).save(path)
    wanted = family.ask(real, QUESTION, max_tokens=3).text
    sound = path.read_bytes()
    index, tensors = read(path)
    refused = 0
    for round_ in range(300):
        if round_ % 3 == 0:
            some = dict(tensors)
            one, two = rng.choice(list(some)), rng.choice(list(some))
            some[one], some[two] = rng.choice(
                [
                    (some[two], some[one]),
                    (some[one].double(), some[two]),
                    (some[one][:1], some[two]),
                ]
            )
            path.write_bytes(save({n: t.clone() for n, t in some.items()}, metadata(index)))
        elif round_ % 3 == 1:
            path.write_bytes(save(tensors, metadata(mutate(index, rng))))
        else:
            at = rng.randrange(len(sound) // 2)
            path.write_bytes(sound[:at] + rng.randbytes(rng.randint(1, 4)) + sound[at + 4 :])
        try:
            family.ask(path, QUESTION, max_tokens=2)
        except VidlmError:
            refused += 1
    assert 100 < refused < 300
    assert family.ask(real, QUESTION, max_tokens=3).text == wanted
    assert family.engine.idle


def test_the_times_and_grid_of_videollama3(family: vidlm.LM, tmp_path: Path) -> None:
    if family.model.config.model_type == "llava":
        return
    path = tmp_path / "clip.safetensors"
    for where, value, says in (
        ("times/0", -1, "times beyond"),
        ("times/0", 1e300, "times beyond"),
        ("times", [0.0], "4 frames with 1 times"),
        ("grid", [4, 2, 3], "grid"),
        ("grid", [3, 4, 4], "grid"),
        ("grid", [0, 0, 0], "a grid of"),
        ("merge", 0, "blocks of 0"),
        ("merge", 1, "kept is"),
        ("frames", 2, "for 2 frames"),
        ("kept", None, "are kept, and there are|0 times"),
    ):
        family.video(video_forms.clip(3, frames=4)).save(path)

        def change(index: dict[str, Any], tensors: dict[str, Tensor], w: str = where) -> None:
            fields = index["media"][0]["fields"]
            if w == "kept":
                del tensors["media.0.kept"]
                fields["kept"] = None
            else:
                put(fields, w, value)  # noqa: B023  # called within this round

        rewrite(path, change)
        with pytest.raises(InvalidArgument, match=says):
            family.video(path)
