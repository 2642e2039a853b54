"""Streams that end early or fail, and chats that several threads ask."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import tiny
import vidlm
from clips import clip
from vidlm.engine import Request, Token
from vidlm.errors import ContextOverflow, InvalidArgument, StreamClosed

QUESTION = "what happens?"


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> vidlm.LM:
    return vidlm.load(tiny.write(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def video(lm: vidlm.LM) -> vidlm.VideoHandle:
    return lm.video(clip(20), frames=2)


# ---- streams that end early ----------------------------------------------------------------------


def close(stream: vidlm.AnswerStream) -> None:
    stream.close()


def leave(stream: vidlm.AnswerStream) -> None:
    with stream as same:
        assert same is stream


@pytest.mark.parametrize("end", [close, leave])
@pytest.mark.parametrize("pieces", [0, 1, 3])
def test_closing(
    lm: vidlm.LM, video: vidlm.VideoHandle, end: Callable[[Any], None], pieces: int
) -> None:
    stream = video.stream(QUESTION, max_tokens=200)
    for _ in range(pieces):
        next(stream)
    assert lm.engine.idle == (pieces == 0)
    end(stream)
    assert lm.engine.idle
    assert list(stream) == []
    for _ in range(2):
        with pytest.raises(StreamClosed, match="closed before its answer was complete"):
            _ = stream.answer
    stream.close()
    assert issubclass(StreamClosed, vidlm.VidlmError)


def test_closing_what_has_ended(video: vidlm.VideoHandle) -> None:
    with video.stream(QUESTION, max_tokens=9) as stream:
        text = "".join(stream)
    assert stream.answer.text == text.strip()
    stream.close()
    assert stream.answer.text == text.strip()


def test_dropping(lm: vidlm.LM, video: vidlm.VideoHandle) -> None:
    for _piece in video.stream(QUESTION, max_tokens=200):
        break
    assert lm.engine.idle


def test_closing_from_another_thread(lm: vidlm.LM, video: vidlm.VideoHandle) -> None:
    stream = video.stream(QUESTION, max_tokens=300)
    next(stream)
    closer = threading.Thread(target=stream.close)
    closer.start()
    with pytest.raises(StreamClosed):
        _ = stream.answer
    closer.join()
    assert lm.engine.idle


# ---- streams that fail ---------------------------------------------------------------------------


class Broken(Exception):
    pass


def break_down(lm: vidlm.LM, monkeypatch: pytest.MonkeyPatch, after: int, error: Any) -> None:
    """Let the engine's next stream fail after so many tokens."""
    stream = lm.engine.stream

    def broken(request: Request, timings: Any = None) -> Iterator[Token]:
        for count, token in enumerate(stream(request, timings)):
            if count == after:
                raise error
            yield token

    monkeypatch.setattr(lm.engine, "stream", broken)


@pytest.mark.parametrize("after", [0, 2])
def test_an_error_is_the_answers_too(
    lm: vidlm.LM, video: vidlm.VideoHandle, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    chat = video.chat(max_tokens=9)
    break_down(lm, monkeypatch, after, Broken("no memory"))
    stream = chat.stream(QUESTION)
    with pytest.raises(Broken, match="no memory"):
        list(stream)
    for _ in range(2):
        with pytest.raises(Broken, match="no memory"):
            _ = stream.answer
    monkeypatch.undo()
    assert chat.messages == []
    assert lm.engine.idle
    assert chat.ask(QUESTION).text == video.ask(QUESTION, max_tokens=9).text
    assert len(chat.messages) == 2


def test_ctrl_c_ends_a_stream(
    lm: vidlm.LM, video: vidlm.VideoHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = video.chat(max_tokens=9)
    break_down(lm, monkeypatch, 1, KeyboardInterrupt())
    stream = chat.stream(QUESTION)
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    with pytest.raises(StreamClosed):
        _ = stream.answer
    monkeypatch.undo()
    chat.ask(QUESTION)
    assert len(chat.messages) == 2


def test_a_turn_that_does_not_begin(lm: vidlm.LM) -> None:
    chat = lm.chat(clip(40), frames=40, max_tokens=3)
    for _ in range(2):
        with pytest.raises(ContextOverflow):
            chat.ask(QUESTION)
    missing = lm.chat("nothing.mp4")
    for _ in range(2):
        with pytest.raises(vidlm.VidlmError, match="nothing"):
            missing.ask(QUESTION)
    assert chat.messages == missing.messages == []


# ---- one turn at a time --------------------------------------------------------------------------


def test_no_turn_is_lost(lm: vidlm.LM, video: vidlm.VideoHandle) -> None:
    """Questions of several threads, some of them streamed: all are in the messages, in the order
    in which they were answered, each followed by its answer."""
    chat = video.chat(max_tokens=4)
    chat.ask("first?")
    answers: dict[str, str] = {}

    def ask(thread: int) -> None:
        for turn in range(3):
            question = f"{thread}{turn}?"
            if turn % 2:
                answers[question] = "".join(chat.stream(question))
            else:
                answers[question] = chat.ask(question).text

    run(ask, 4)
    texts = [message["content"][-1]["text"] for message in chat.messages]
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 13
    said = dict(zip(texts[2::2], texts[3::2], strict=True))
    assert {question: text.strip() for question, text in said.items()} == {
        question: text.strip() for question, text in answers.items()
    }
    parts = [part["type"] for message in chat.messages for part in message["content"]]
    assert parts.count("text") == 26
    assert len(parts) == 26 + len(video.parts)


def run(work: Callable[[int], None], threads: int) -> None:
    errors: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    started = [threading.Thread(target=guarded, args=(i,), daemon=True) for i in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join(120)
        assert not thread.is_alive()
    assert errors == []


def test_an_unfinished_stream_of_the_same_thread(video: vidlm.VideoHandle) -> None:
    chat = video.chat(max_tokens=9)
    stream = chat.stream(QUESTION)
    next(stream)
    for ask in (chat.ask, chat.stream):
        with pytest.raises(InvalidArgument, match=r"not finished; read it to its end or close\(\)"):
            ask("and then?")
    stream.close()
    chat.ask("and then?")
    assert len(chat.messages) == 2
    whole = chat.stream(QUESTION)
    assert whole.answer.text
    chat.ask("and then?")
    assert len(chat.messages) == 6


def test_a_stream_that_is_dropped_lets_the_next_begin(video: vidlm.VideoHandle) -> None:
    chat = video.chat(max_tokens=9)
    for _piece in chat.stream(QUESTION):
        break
    cycle: list[Any] = [chat.stream(QUESTION)]
    cycle.append(cycle)
    del cycle
    gc.collect()
    chat.ask(QUESTION)
    assert len(chat.messages) == 2


def test_a_stream_of_a_thread_that_has_ended(video: vidlm.VideoHandle) -> None:
    chat, kept = video.chat(max_tokens=9), []
    thread = threading.Thread(target=lambda: kept.append(chat.stream(QUESTION)))
    thread.start()
    thread.join()
    with pytest.raises(InvalidArgument, match="not finished"):
        chat.ask("and then?")
    assert kept[0].answer.text  # whoever goes on with it has the turn
    chat.ask("and then?")
    assert len(chat.messages) == 4


def test_a_question_waits_for_a_stream_of_another_thread(video: vidlm.VideoHandle) -> None:
    chat = video.chat(max_tokens=9)
    stream = chat.stream(QUESTION)
    next(stream)
    waiting = threading.Thread(target=chat.ask, args=("and then?",), daemon=True)
    waiting.start()
    time.sleep(0.05)
    assert chat.messages == []
    assert waiting.is_alive()
    first = stream.answer
    waiting.join(120)
    texts = [message["content"][-1]["text"] for message in chat.messages]
    assert [texts[0], texts[1].strip(), texts[2]] == [QUESTION, first.text, "and then?"]
