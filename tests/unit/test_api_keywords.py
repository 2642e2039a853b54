"""The keywords of ask, stream, chat and video: one table for editors, type checkers, run time and
docs; and what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import numpy as np
import pytest

import tiny
import vidlm
from clips import clip
from house import ROOT
from vidlm.api import AskKeywords, FrameKeywords, SamplingKeywords
from vidlm.errors import InvalidArgument, UnknownKeyword
from vidlm.types import FinishReason, SamplingParams, checked, type_hints

QUESTION = "what happens?"
VIDEO = clip(20)


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> vidlm.LM:
    return vidlm.load(tiny.write(tmp_path_factory.mktemp("tiny")))


# ---- one table -----------------------------------------------------------------------------------


def test_the_page_has_every_keyword_and_its_type() -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    section = page[page.index("## Keywords") : page.index("## Answers")]
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+?) \|", section, re.M))
    assert rows.pop("progress") == "function"
    assert rows.keys() == type_hints(AskKeywords).keys() - {"progress"}
    for name in rows:
        kind = type_hints(AskKeywords)[name]
        kinds = [each for each in (get_args(kind) or (kind,)) if each is not NoneType]
        told = set(re.findall(r"`(\w+)`", rows[name]))
        assert told == {word for each in kinds for word in words(each)}, name
        assert ("list" in rows[name]) == any(get_args(each) for each in kinds), name


def words(kind: Any) -> set[str]:
    if kind in (int, float, str, bool):
        return {kind.__name__}
    inner = get_args(kind)
    return {word for each in inner for word in words(each)} if inner else set()


def test_every_keyword_is_taken(lm: vidlm.LM) -> None:
    values: dict[str, Any] = {
        **{
            "frames": 2,
            "num_frames": 2,
            "fps": 5.0,
            "min_frames": 1,
            "max_frames": 3,
            "start": 0.1,
        },
        **{"end": "0:00.5", "sampling": "linspace", "indices": [0, 3], "times": [0, "0:00.2"]},
        **{"max_tokens": 2, "max_new_tokens": 2, "min_new_tokens": 1, "temperature": 0.5},
        **{"top_k": 3, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1, "seed": 3},
        **{"stop": ["x"], "num_beams": 2, "length_penalty": 1.0, "early_stopping": True},
        **{"logprobs": 1, "system": "Be brief.", "fit": True, "progress": print},
    }
    assert values.keys() == type_hints(AskKeywords).keys()
    with_others = {"min_frames": {"fps": 5}, "max_frames": {"fps": 5}, "sampling": {"frames": 2}}
    for name, value in values.items():
        options = {name: value, **with_others.get(name, {})}
        if not {"max_tokens", "max_new_tokens"} & options.keys():
            options["max_tokens"] = 2
        assert lm.ask(VIDEO, QUESTION, **options).usage.completion_tokens >= 1
        if name != "fit":
            lm.ask(VIDEO, QUESTION, **{**options, name: None})
        if name in type_hints(SamplingKeywords):
            lm.chat(VIDEO, frames=2).ask(QUESTION, **options)
        if name in type_hints(FrameKeywords):
            options.pop("max_tokens", None)
            lm.video(VIDEO, **options)


def test_both_names_of_one_thing(lm: vidlm.LM) -> None:
    assert len(lm.ask(VIDEO, QUESTION, num_frames=3, max_new_tokens=2).frames) == 3
    assert len(lm.video(VIDEO, num_frames=3).frames) == 3
    assert len(lm.ask(VIDEO, QUESTION, num_frames=3, frames=None, max_tokens=1).frames) == 3
    for options in ({"frames": 3, "num_frames": 3}, {"max_tokens": 3, "max_new_tokens": 2}):
        with pytest.raises(InvalidArgument, match="mean the same; give one of them"):
            lm.ask(VIDEO, QUESTION, **options)
    with pytest.raises(InvalidArgument, match="mean the same"):
        lm.video(VIDEO, frames=3, num_frames=3)


# ---- what is refused, in the user's words --------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"frames": 0}, "^frames=0 is not"),
        ({"num_frames": 0}, "^num_frames=0 is not"),
        ({"frames": "4"}, "^frames='4' is not"),
        ({"frames": 2, "fps": 1}, "^frames=2 and fps=1 exclude each other"),
        ({"sampling": "linspace", "frames": 10**6}, "^frames=1000000 with sampling"),
        ({"sampling": "keyframes", "start": 0.7}, "give a longer span, or frames without|no key"),
        ({"max_tokens": 0}, "^max_tokens=0; allowed: at least 1"),
        ({"max_new_tokens": 0}, "^max_new_tokens=0; allowed: at least 1"),
        ({"max_tokens": 2.7}, "^max_tokens=2.7; allowed: a whole number"),
        ({"max_tokens": True}, "^max_tokens=True; allowed: a whole number"),
        ({"max_tokens": "many"}, "^max_tokens='many'; allowed: a whole number"),
        ({"max_tokens": 2, "min_new_tokens": 3}, r"from 0 to max_tokens \(2\)"),
        ({"temperature": "hot"}, "^temperature='hot'; allowed: a finite number"),
        ({"temperature": float("nan")}, "^temperature=nan; allowed: a finite number"),
        ({"temperature": float("inf")}, "^temperature=inf; allowed: a finite number"),
        ({"temperature": True}, "^temperature=True; allowed"),
        ({"top_k": 1.5}, "^top_k=1.5; allowed: a whole number"),
        ({"top_p": "x"}, "^top_p='x'; allowed"),
        ({"top_p": 1.5}, "^top_p=1.5; allowed: above 0"),
        ({"repetition_penalty": float("nan")}, "^repetition_penalty=nan; allowed"),
        ({"seed": "x"}, "^seed='x'; allowed: a whole number"),
        ({"seed": 1.5}, "^seed=1.5; allowed: a whole number"),
        ({"stop": 5}, "^stop=5; allowed: a text or a list of texts"),
        ({"stop": [5]}, r"^stop=\[5\]; allowed"),
        ({"stop": [""]}, "^stop=.* non-empty"),
        ({"stop": b"x"}, "^stop=b'x'; allowed"),
        ({"num_beams": 1.5}, "^num_beams=1.5; allowed"),
        ({"early_stopping": "never"}, "^early_stopping='never'; allowed: True or False"),
        ({"logprobs": True}, "^logprobs=True; allowed"),
        ({"system": 5}, "^system=5; allowed: a text"),
        ({"fit": "yes"}, "^fit='yes'; allowed: True or False"),
        ({"progress": 5}, "^progress=5; allowed: a function"),
    ],
)
def test_values_that_are_refused(lm: vidlm.LM, options: dict[str, Any], said: str) -> None:
    for ask in (lm.ask, lm.stream):
        with pytest.raises(InvalidArgument, match=said):
            ask(VIDEO, QUESTION, **options)
    if options.keys() <= type_hints(SamplingKeywords).keys():
        with pytest.raises(InvalidArgument, match=said):
            lm.chat(VIDEO).ask(QUESTION, **options)


def test_numbers_of_other_libraries(lm: vidlm.LM) -> None:
    answer = lm.ask(
        VIDEO,
        QUESTION,
        frames=np.int64(2),
        max_tokens=np.int32(3),
        temperature=np.float32(0.5),
        seed=np.int64(1),
    )
    assert (len(answer.frames), answer.usage.completion_tokens) == (2, 3)


def test_unknown_keywords(lm: vidlm.LM) -> None:
    for name, near in (
        ("max_token", "max_tokens"),
        ("frame", "frames"),
        ("numframes", "num_frames"),
    ):
        for call in (lm.ask, lm.stream):
            with pytest.raises(UnknownKeyword, match=f"{name!r}; did you mean {near!r}"):
                call(VIDEO, QUESTION, **{name: 3})
    with pytest.raises(UnknownKeyword, match=r"lm\.video\(\) got .*'frame'"):
        lm.video(VIDEO, frame=3)
    assert issubclass(UnknownKeyword, vidlm.VidlmError)
    assert issubclass(UnknownKeyword, TypeError)


def test_keywords_of_another_call(lm: vidlm.LM) -> None:
    with pytest.raises(InvalidArgument, match=r"max_tokens belong to a question; lm\.video\(\)"):
        lm.video(VIDEO, max_tokens=3)
    with pytest.raises(InvalidArgument, match="system, fit belong to a question"):
        lm.video(VIDEO, system="x", fit=True)
    for name, value in (("frames", 3), ("indices", np.array([1])), ("system", "x"), ("fit", True)):
        with pytest.raises(InvalidArgument, match="chosen once for a chat"):
            lm.chat(VIDEO).ask(QUESTION, **{name: value})


# ---- what is asked about -------------------------------------------------------------------------


@pytest.mark.parametrize("media", [None, [], (), "", " ", [None], [VIDEO, None], [""]])
def test_no_media(lm: vidlm.LM, media: Any) -> None:
    ways: list[Callable[[], Any]] = [
        lambda: lm.ask(media, QUESTION),
        lambda: lm.stream(media, QUESTION),
        lambda: lm.chat(media),
    ]
    if not isinstance(media, list) or not media:
        ways.append(lambda: lm.video(media))
    for way in ways:
        with pytest.raises(InvalidArgument, match=r"lm\.chat\(\)\.ask\(question\)"):
            way()


def test_a_chat_without_media(lm: vidlm.LM) -> None:
    answer = lm.chat(max_tokens=2).ask(QUESTION)
    assert (answer.frames, answer.usage.media_tokens) == ((), 0)


def test_arguments_in_the_wrong_order(lm: vidlm.LM, tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(VIDEO)
    for text in ("What happens?", "Why?"):
        with pytest.raises(InvalidArgument, match="the video comes first"):
            lm.ask(text, str(path))
    for question in (path, VIDEO, np.zeros((2, 8, 8, 3), np.uint8), None, 5):
        with pytest.raises(InvalidArgument, match=r"as text: ask\(media, question\)"):
            lm.ask(str(path), question)
    with pytest.raises(InvalidArgument, match="a int is no video"):
        lm.ask(3, "x")
    assert lm.ask(str(path), str(path), frames=2, max_tokens=1)  # odd, and not our business


# ---- what is shown -------------------------------------------------------------------------------


def test_reprs(lm: vidlm.LM) -> None:
    video = lm.video(VIDEO, frames=2)
    chat = video.chat(max_tokens=2)
    stream = chat.stream(QUESTION)
    assert repr(lm) == "<LM LlavaForConditionalGeneration, float32, cpu>"
    assert repr(stream).startswith("<AnswerStream unfinished, 2 frames, ")
    assert repr(stream.answer).startswith(f"<Answer {stream.answer.text!r:.80}, 2 frames, 2 tokens")
    assert repr(stream).startswith("<AnswerStream finished")
    assert repr(chat) == "<Chat of 1 turns, 2 frames>"
    assert len(repr(video)) < 100
    closed = chat.stream(QUESTION)
    closed.close()
    assert repr(closed).startswith("<AnswerStream closed")


def test_answers_are_json(lm: vidlm.LM) -> None:
    answer = lm.ask(VIDEO, QUESTION, frames=2, max_tokens=2, logprobs=1)
    values = json.loads(json.dumps(dataclasses.asdict(answer)))
    assert values["finish"] == json.loads(json.dumps(answer.to_dict()))["finish_reason"] == "length"
    assert FinishReason.STOP == "stop"
    assert f"{FinishReason.LENGTH}" == "length"


@pytest.mark.parametrize(
    "options", [{"stop": "x"}, {"n": True}, {"seed": "x"}, {"eos_token_ids": 2.5}]
)
def test_sampling_params_are_checked_too(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(InvalidArgument, match=f"^{name}="):
        SamplingParams(**options)
    assert checked("stop", ["a"], tuple[str, ...]) == ("a",)


def test_engine_options_are_checked_too(lm: vidlm.LM) -> None:
    with pytest.raises(InvalidArgument, match=r"^kv_bytes='x'; allowed: a whole number or None"):
        vidlm.EngineOptions(kv_bytes="x")
    with pytest.raises(InvalidArgument, match=r"^engine=5; allowed"):
        vidlm.LM(lm.model, lm.processor, 5)


# ---- what a type checker says --------------------------------------------------------------------

SNIPPET = """\
    from pathlib import Path

    import vidlm

    lm = vidlm.load("demo")
    video = lm.video("clip.mp4", num_frames=4)
    chat = lm.chat([video, Path("a.png"), b""], system="Be brief.", temperature=0.5)
    answer = chat.ask("Why?", max_tokens=40, stop=["a"])
    text: str = answer.text
    with video.stream("Why?", indices=range(4), times=[1, "0:02"], seed=None) as stream:
        pieces: list[str] = list(stream)
    def show(progress: vidlm.Progress) -> None: ...
    try:
        video.ask("Why?", progress=show, fit=True)
    except (vidlm.errors.StreamClosed, vidlm.VidlmError):
        params = vidlm.SamplingParams(seed=1)
    lm.ask("clip.mp4", "Why?", max_token=4)  # call-arg
    lm.ask("clip.mp4", "Why?", frames="4")  # arg-type
    lm.ask("clip.mp4", "Why?", max_tokens=2.7)  # arg-type
    lm.ask(3, "x")  # arg-type
    lm.ask(None, "x")  # arg-type
    lm.ask("clip.mp4", 5)  # arg-type
    lm.stream("clip.mp4", "Why?", stop=5)  # arg-type
    lm.chat("clip.mp4", frame=4)  # call-arg
    lm.video("clip.mp4", max_tokens=4)  # call-arg
    chat.ask("Why?", frames=4)  # call-arg
    video.ask("Why?", fitt=True)  # call-arg
    vidlm.load("demo", devices="cpu")  # call-arg
"""


def test_a_type_checker_refuses_the_same(tmp_path: Path) -> None:
    """torch is left out, which takes mypy most of its time."""
    file, config = tmp_path / "snippet.py", tmp_path / "mypy.ini"
    file.write_text(textwrap.dedent(SNIPPET), encoding="utf-8")
    config.write_text(
        f"[mypy]\npython_version = 3.11\nmypy_path = {ROOT / 'src'}\nfollow_imports = silent\n"
        "[mypy-torch.*]\nfollow_imports = skip\nignore_missing_imports = True\n",
        encoding="utf-8",
    )
    cache = ROOT / ".mypy_cache" / "snippet"
    command = ["-m", "mypy", "--config-file", str(config), "--cache-dir", str(cache), str(file)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    errors = re.findall(r"snippet\.py:(\d+): error: .*\[([\w-]+)\]", done.stdout)
    lines = textwrap.dedent(SNIPPET).splitlines()
    marked = [(str(n), line.rpartition("# ")[2]) for n, line in enumerate(lines, 1) if "# " in line]
    assert errors == marked, done.stdout + done.stderr
