"""The progress of loading and of a question."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

import tiny
import vidlm
from clips import clip
from vidlm.api import Progress

QUESTION = "what happens?"
VIDEO = clip(20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def lm(folder: Path) -> vidlm.LM:
    return vidlm.load(folder)


class Stop(Exception):
    pass


def stages(events: list[Progress]) -> list[str]:
    return list(dict.fromkeys(event.stage for event in events))


def test_loading(folder: Path) -> None:
    events: list[Progress] = []
    vidlm.load(folder, progress=events.append)
    assert [(event.stage, event.done, event.total) for event in events] == [
        *(("resolve", done, 1) for done in (0, 1)),
        *(("load", done, 1) for done in (0, 1)),
    ]


@pytest.mark.parametrize("last", ["resolve", "load"])
def test_an_error_ends_loading(folder: Path, last: str) -> None:
    def stop(progress: Progress) -> None:
        if progress.stage == last:
            raise Stop

    with pytest.raises(Stop):
        vidlm.load(folder, progress=stop)


def test_a_question(lm: vidlm.LM) -> None:
    events: list[Progress] = []
    plain = lm.ask([VIDEO, clip(10)], QUESTION, frames=2, max_tokens=4)
    lm.engine.clear()
    answer = lm.ask([VIDEO, clip(10)], QUESTION, frames=2, max_tokens=4, progress=events.append)
    assert (answer.text, type(answer.timings)) == (plain.text, type(plain.timings))
    assert stages(events) == ["decode", "preprocess", "encode", "prefill", "generate"]
    done = {stage: [e.done for e in events if e.stage == stage] for stage in stages(events)}
    assert (done["decode"], done["preprocess"]) == ([0, 1, 2], [0, 1])
    assert done["encode"] == list(range(1, len(done["encode"]) + 1))
    assert done["generate"] == [1, 2, 3, 4]
    assert {e.total for e in events if e.stage == "generate"} == {4}
    assert {e.total for e in events if e.stage == "encode"} == {None}
    with pytest.raises(AttributeError):
        events[0].done = 5


def test_what_is_cached_is_not_encoded(lm: vidlm.LM) -> None:
    events: list[Progress] = []
    video = lm.video(VIDEO, frames=2)
    video.ask(QUESTION, max_tokens=1)
    video.ask("and then?", max_tokens=1, progress=events.append)
    assert stages(events) == ["decode", "preprocess", "prefill", "generate"]


def test_turns_of_a_chat(lm: vidlm.LM) -> None:
    events: list[Progress] = []
    turn: list[Progress] = []
    chat = lm.chat(VIDEO, frames=2, max_tokens=2, progress=events.append)
    chat.ask(QUESTION)
    assert stages(events)[0] == "decode"
    events.clear()
    chat.ask(QUESTION, progress=turn.append)
    assert (events, stages(turn)) == ([], ["preprocess", "prefill", "generate"])
    list(chat.stream(QUESTION))
    assert stages(events) == ["preprocess", "prefill", "generate"]


@pytest.mark.parametrize("last", ["decode", "preprocess", "encode", "prefill", "generate"])
def test_an_error_comes_to_who_asked(lm: vidlm.LM, last: str) -> None:
    """And to nobody else: another question, which is answered beside it, goes on."""
    chat = lm.chat(VIDEO, frames=2, max_tokens=4)
    said: dict[str, Any] = {}
    other = threading.Thread(
        target=lambda: said.update(text=lm.ask(clip(12), QUESTION, frames=2, max_tokens=30).text)
    )

    def stop(progress: Progress) -> None:
        if progress.stage == last:
            raise Stop(last)

    other.start()
    with pytest.raises(Stop, match=last):
        chat.ask(QUESTION, progress=stop)
    other.join()
    assert said["text"] == lm.ask(clip(12), QUESTION, frames=2, max_tokens=30).text
    assert chat.messages == []
    assert lm.engine.idle
    assert chat.ask(QUESTION).text == lm.ask(VIDEO, QUESTION, frames=2, max_tokens=4).text
