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
import torch

import tiny
import vidlm
from clips import clip
from house import ROOT
from vidlm.api import AskKeywords, FrameKeywords, SamplingKeywords
from vidlm.errors import ContextOverflow, InvalidArgument, UnknownKeyword
from vidlm.types import FinishReason, SamplingParams, checked, type_hints

QUESTION = "what happens?"
VIDEO = clip(20)


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> vidlm.LM:
    return vidlm.load(tiny.write(tmp_path_factory.mktemp("tiny")))


# ---- one table -----------------------------------------------------------------------------------


def test_the_page_has_every_keyword_and_its_type() -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+?) \|", page, re.M))
    assert rows.keys() == type_hints(AskKeywords).keys()
    for name, kind in type_hints(AskKeywords).items():
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
        **{"logprobs": 1, "system": "Be brief.", "fit": True},
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


# ---- what is too long ----------------------------------------------------------------------------


def overflow(ask: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    with pytest.raises(ContextOverflow) as raised:
        ask(*arguments, **options)
    return str(raised.value)


def test_a_question_that_is_too_long(lm: vidlm.LM) -> None:
    """Of 512 tokens; what is told is enough: a question of the length that is told is answered."""
    long = "z7 " * 500
    video = lm.video(VIDEO, frames=2)
    for ask in (lm.chat().ask, video.ask, lambda text: lm.ask(VIDEO, text, frames=2)):
        said = overflow(ask, long)
        assert "use at most" not in said
        has, left = re.findall(r"shorten the question, which has ([\d,]+) tokens, to (\d+)", said)[
            0
        ]
        each = int(has.replace(",", "")) // 500
        assert ask("z7 " * (int(left) // each)).usage.completion_tokens >= 1
        assert overflow(ask, "z7 " * (int(left) // each + 1))
    assert "shorten the question" in overflow(lm.ask, VIDEO, long, fit=True)


def test_a_system_prompt_that_is_too_long(lm: vidlm.LM) -> None:
    said = overflow(lm.ask, VIDEO, "Why?", frames=2, system="z7 " * 500)
    assert re.search(r"shorten the system prompt, which has [\d,]+ tokens, to \d+", said)
    said = overflow(lm.ask, VIDEO, "z7 " * 900, frames=2, system="z7 " * 901)
    assert re.search(
        r"the question has .*, the system prompt has .*, 2 frames .* shorten them", said
    )


def test_a_question_and_frames_that_are_too_many(lm: vidlm.LM) -> None:
    said = overflow(lm.ask, VIDEO, "z7 " * 60, frames=20)
    assert re.search(r"use at most 1?\d frames or images \(now 20\), or shorten the question", said)
    most = int(re.findall(r"at most (\d+)", said)[0])
    assert lm.ask(VIDEO, "z7 " * 60, frames=most, max_tokens=1)
    assert "shorten" not in overflow(lm.ask, clip(40), "Why?", frames=40)


def test_a_chat_that_is_too_long(lm: vidlm.LM) -> None:
    chat = lm.chat(VIDEO, frames=2, max_tokens=1)
    chat.ask("z7 " * 100)
    said = overflow(lambda: [chat.ask("z7 " * 30) for _ in range(9)])
    assert "shorten the conversation so far" in said


def test_prompts_of_an_engine_that_are_too_long(lm: vidlm.LM) -> None:
    video = lm.video(VIDEO, frames=2)
    parts = [*video.parts, {"type": "text", "text": "z7 " * 500}]
    prompt = lm.processor.chat_prompt([{"role": "user", "content": parts}], video.media)
    request = vidlm.engine.Request(prompt, SamplingParams())
    said = overflow(lambda: list(lm.engine.stream(request)))
    assert re.search(r"\d+ of them are text, which leaves no room for a frame or image", said)


# ---- whatever is wrong, it is an error of ours ---------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        *({"frames": value} for value in ("x", 0, -3, 2.5)),
        *({"max_frames": value} for value in ("x", 0)),
        *({"indices": value} for value in (5, [], "abc", [1.5], [2**70])),
        *({"times": value} for value in (5, [], [None], [[1]])),
        {"frames": 2, "fps": 1},
    ],
)
def test_frames_to_fit_are_checked_first(lm: vidlm.LM, options: dict[str, Any]) -> None:
    for fit in (True, False):
        with pytest.raises(InvalidArgument):
            lm.ask(VIDEO, QUESTION, fit=fit, max_tokens=1, **options)


def test_arrays_of_times_are_times_for_load_video_too() -> None:
    assert vidlm.load_video(VIDEO, times=np.array([0.0, 0.3])).indices.tolist() == [0, 7]


def test_arrays_that_name_frames_fit(lm: vidlm.LM) -> None:
    for name in ("indices", "times"):
        options = {name: np.array([0, 1])}
        if name == "times":
            options = {name: np.array([0.0, 0.3])}
        assert len(lm.ask(VIDEO, QUESTION, fit=True, max_tokens=1, **options).frames) == 2


def test_other_ways_in(lm: vidlm.LM, tmp_path: Path) -> None:
    tokenizer = lm.processor.tokenizer
    video = lm.video(VIDEO, frames=2)
    ways: list[Callable[[], Any]] = [
        *(lambda v=v: tokenizer(v) for v in (5, None, [5], ["a", None])),
        *(lambda v=v: tokenizer.batch_decode(v) for v in (5, "abc", None)),
        *(lambda v=v: tokenizer.decode(v) for v in ("x", 1.5, [[1]], None)),
        *(lambda v=v: tokenizer.convert_tokens_to_ids(v) for v in (5, None)),
        *(lambda v=v: tokenizer.add_special_tokens(v) for v in (5, "x", None)),
        *(lambda v=v: video.prompt(v) for v in (5, None, "", "\ud83d")),
        *(lambda v=v: video.prompt("x", system=v) for v in (5, "\ud83d")),
        lambda: video.save(tmp_path / "a.safetensors", system=5),
        *(lambda v=v: lm.model.generate(torch.ones(1, 2).long(), **v) for v in BAD),
    ]
    for way in ways:
        with pytest.raises(InvalidArgument):
            way()


BAD: tuple[dict[str, Any], ...] = (
    {"max_new_tokens": 2.5},
    {"max_new_tokens": "x"},
    {"max_length": "x"},
    {"temperature": "x"},
    {"stop_strings": 5},
    {"num_beams": "x"},
    {"num_return_sequences": "x"},
    {"eos_token_id": "x"},
    {"top_p": "x"},
    {"early_stopping": "never"},
)
