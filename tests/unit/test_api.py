"""lm.ask, lm.stream and lm.chat: what the model is shown, what comes back, and what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
import vidlm
from clips import clip, pictures
from vidlm.errors import ContextOverflow, InvalidArgument, MediaError, MediaNotFound, ModelNotFound
from vidlm.types import FinishReason

QUESTION = "what happens?"


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> vidlm.LM:
    return vidlm.load(tiny.write(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    path.write_bytes(clip(20))
    return path


def user(count: int, text: str) -> dict[str, Any]:
    """A message as the model must see it: an image for each frame."""
    return {"role": "user", "content": [*[{"type": "image"}] * count, part(text)]}


def part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def expected(
    lm: vidlm.LM, messages: list[dict[str, Any]], images: list[Any], **how: Any
) -> tuple[str, int]:
    """The answer by way of `generate`, and the tokens of the prompt."""
    text = lm.processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = lm.processor(images or None, text, return_tensors="pt")
    length = inputs.input_ids.shape[1]
    ids = lm.model.generate(**inputs, **how)[0, length:]
    return lm.processor.decode(ids, skip_special_tokens=True), length


# ---- one question ------------------------------------------------------------------------------


def test_an_answer_and_what_it_was_based_on(lm: vidlm.LM, video: Path) -> None:
    answer = lm.ask(video, QUESTION, max_tokens=12)
    frames = vidlm.sample_frames(video, 8)
    text, length = expected(lm, [user(8, QUESTION)], frames, max_new_tokens=12)
    assert answer.text == str(answer) == text.strip() != ""
    assert [ref.index for ref in answer.frames] == [0, 2, 5, 7, 10, 12, 15, 17]
    times = [ref.index / 25 for ref in answer.frames]
    assert [ref.pts for ref in answer.frames] == pytest.approx(times)
    assert {ref.media for ref in answer.frames} == {0}
    assert answer.usage == vidlm.types.Usage(length, 8 * tiny.FRAME_TOKENS, 12)
    assert answer.finish is FinishReason.LENGTH
    assert answer.warnings == ()
    assert all(seconds > 0 for seconds in answer.timings.to_dict().values())
    assert answer.timings.first_token < sum(answer.timings.to_dict().values())


def test_plain_values_for_json(lm: vidlm.LM, video: Path) -> None:
    answer = lm.ask(video, QUESTION, frames=2, max_tokens=3)
    values = json.loads(json.dumps(answer.to_dict()))
    assert values["text"] == answer.text
    assert values["finish_reason"] == "length"
    assert values["frames"][1] == {"media": 0, "index": 10, "pts": 0.4}
    assert values["usage"]["completion_tokens"] == 3
    assert set(values["timings"]) == {"decode_media", "preprocess", "encode", "prefill", "decode"}


@pytest.mark.parametrize(
    ("options", "indices"),
    [
        ({"frames": 4}, [0, 5, 10, 15]),
        ({"fps": 5}, [0, 5, 10, 15]),
        ({"fps": 25, "max_frames": 3}, [0, 9, 19]),
        ({"frames": 2, "start": 0.4}, [10, 15]),
        ({"frames": 2, "start": "0:00.2", "end": 0.4}, [5, 7]),
    ],
)
def test_frames_are_chosen(
    lm: vidlm.LM, video: Path, options: dict[str, Any], indices: list[int]
) -> None:
    answer = lm.ask(video, QUESTION, max_tokens=1, **options)
    assert [ref.index for ref in answer.frames] == indices
    assert answer.usage.media_tokens == len(indices) * tiny.FRAME_TOKENS


def test_every_kind_of_source(lm: vidlm.LM, video: Path) -> None:
    data = video.read_bytes()
    frames = vidlm.sample_frames(video, 20)
    sources = {
        "path": video,
        "text": str(video),
        "url": video.as_uri(),
        "bytes": data,
        "file": io.BytesIO(data),
        "array": np.stack([np.asarray(frame) for frame in frames]),
        "loaded": vidlm.load_video(video, num_frames=3),
        "images": [frames],
    }
    said = {}
    for name, source in sources.items():
        options = {} if name == "loaded" else {"frames": 3}
        answer = lm.ask(source, QUESTION, max_tokens=6, **options)
        assert [ref.index for ref in answer.frames] == [0, 6, 13], name
        said[name] = answer.text
    assert len(set(said.values())) == 1, said


def test_several_videos_and_images_in_order(lm: vidlm.LM, video: Path, tmp_path: Path) -> None:
    image = tiny.picture(0)
    image.save(tmp_path / "still.png")
    still = pictures(3)
    media = [video, str(tmp_path / "still.png"), image, np.asarray(image), list(still), video]
    answer = lm.ask(media, QUESTION, frames=2, max_tokens=5)
    first, second = vidlm.sample_frames(video, 2)
    shown = [first, second, image, image, image, still[0], still[1], first, second]
    text, _ = expected(lm, [user(9, QUESTION)], shown, max_new_tokens=5)
    assert answer.text == text.strip()
    # Images have no frames to refer to; they count as media all the same.
    assert [(ref.media, ref.index) for ref in answer.frames] == [
        *((0, 0), (0, 10)),
        *((4, 0), (4, 1)),
        *((5, 0), (5, 10)),
    ]


def test_no_media_and_a_system_prompt(lm: vidlm.LM) -> None:
    answer = lm.chat(system="Be brief.", max_tokens=8).ask(QUESTION)
    messages = [{"role": "system", "content": [part("Be brief.")]}, user(0, QUESTION)]
    text, length = expected(lm, messages, [], max_new_tokens=8)
    assert (answer.text, answer.usage.prompt_tokens) == (text.strip(), length)
    assert answer.usage.media_tokens == 0
    assert answer.frames == ()
    assert lm.chat().ask(QUESTION, max_tokens=8).usage.prompt_tokens < length


def test_sampling(lm: vidlm.LM, video: Path) -> None:
    def say(**how: Any) -> str:
        return lm.ask(video, QUESTION, frames=2, max_tokens=20, **how).text

    assert say(temperature=1.0, seed=3) == say(temperature=1.0, seed=3)
    assert len({say(temperature=1.0, seed=seed) for seed in range(4)}) > 1
    assert say(top_k=1, temperature=2.0) == say() == say(temperature=0)
    assert say(repetition_penalty=1.5) != say()
    torch.manual_seed(0)
    unseeded = say(temperature=1.0)
    torch.manual_seed(0)
    assert say(temperature=1.0) == unseeded
    assert say(num_beams=3, length_penalty=0.5, early_stopping=True)


def test_stop_strings(lm: vidlm.LM, video: Path) -> None:
    free = lm.ask(video, QUESTION, frames=2, max_tokens=24)
    assert free.usage.completion_tokens == 24
    stop = next(c for c in free.text[3:] if c.isascii() and c.isprintable() and c != " ")
    for stops in (stop, [stop, "never"]):
        answer = lm.ask(video, QUESTION, frames=2, max_tokens=24, stop=stops)
        assert answer.text == free.text[: free.text.index(stop)].strip()
        assert answer.finish is FinishReason.STOP
        assert answer.usage.completion_tokens < 24
    pieces = list(lm.stream(video, QUESTION, frames=2, max_tokens=24, stop=stop))
    assert stop not in "".join(pieces)


def test_logprobs(lm: vidlm.LM, video: Path) -> None:
    how = {"frames": 2, "max_tokens": 5, "temperature": 1.0, "seed": 3}
    plain = lm.ask(video, QUESTION, **how)
    answer = lm.ask(video, QUESTION, logprobs=2, **how)
    assert answer.text == plain.text
    assert plain.logprobs == ()
    assert "logprobs" not in plain.to_dict()
    tokenizer = lm.processor.tokenizer
    ids = [each.id for each in answer.logprobs]
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == answer.text
    for each in answer.logprobs:
        assert each.text == tokenizer.decode([each.id])
        assert each.logprob <= each.top[0].logprob <= 0
        assert each.top[0].logprob >= each.top[1].logprob
    told = json.loads(json.dumps(answer.to_dict()))["logprobs"]
    assert [each["id"] for each in told] == ids
    assert len(told[0]["top"]) == 2
    with pytest.raises(InvalidArgument, match="logprobs=-1; allowed"):
        lm.ask(video, QUESTION, logprobs=-1)


# ---- no more frames than fit ---------------------------------------------------------------------


def test_fit(lm: vidlm.LM) -> None:
    """Of 40 frames as many as the context of 512 tokens has room for, and never more than asked."""
    whole = clip(40)
    answer = lm.ask(whole, QUESTION, fps=25, fit=True, max_tokens=100)
    most = len(answer.frames)
    assert 20 < most < 30
    tokens = answer.usage.prompt_tokens + 100
    assert tokens <= 512 < tokens + 3 * tiny.FRAME_TOKENS
    assert len(lm.ask(whole, QUESTION, fit=True, max_tokens=1).frames) == 8
    assert len(lm.ask(whole, QUESTION, fps=25, max_frames=5, fit=True, max_tokens=1).frames) == 5
    assert len(lm.ask(whole, QUESTION, frames=most, fit=True, max_tokens=100).frames) == most
    with pytest.raises(ContextOverflow, match=rf"at most {most} frames fit"):
        lm.ask(whole, QUESTION, frames=40, fit=True, max_tokens=100)
    with pytest.raises(ContextOverflow, match="frames fit"):
        lm.ask(whole, QUESTION, indices=range(40), fit=True, max_tokens=100)


def test_fit_of_several(lm: vidlm.LM) -> None:
    whole = clip(40)
    both = lm.ask([whole, whole], QUESTION, fps=25, fit=True, max_tokens=100)
    counts = dict.fromkeys((0, 1), 0)
    for frame in both.frames:
        counts[frame.media] += 1
    assert counts[0] == counts[1] > 8
    handle = lm.video(whole, frames=20)
    rest = lm.ask([handle, whole], QUESTION, frames=None, fps=None, fit=True, max_tokens=100)
    assert 20 < len(rest.frames) < 30
    assert lm.ask(handle, QUESTION, fit=True, max_tokens=1).usage.media_tokens == 320
    with pytest.raises(InvalidArgument, match="fit=True is for videos"):
        lm.ask([whole, tiny.picture(0)], QUESTION, fit=True)


def test_fit_into_a_small_cache(lm: vidlm.LM) -> None:
    size = lm.engine.stats.scheduler.pool.count and 2 * 2 * 2 * 8 * 4 * 16
    small = vidlm.load(lm.model.folder, engine=vidlm.EngineOptions(kv_bytes=20 * size))
    answer = small.ask(clip(40), QUESTION, fps=25, fit=True, max_tokens=50)
    assert 10 <= len(answer.frames) <= 15
    assert answer.usage.completion_tokens == 50


# ---- piece by piece ------------------------------------------------------------------------------


def test_streaming(lm: vidlm.LM, video: Path) -> None:
    whole = lm.ask(video, QUESTION, max_tokens=24)
    stream = lm.stream(video, QUESTION, max_tokens=24)
    assert stream.frames == whole.frames
    assert stream.prompt_tokens == whole.usage.prompt_tokens
    assert stream.timings.decode_media > 0
    assert stream.timings.prefill == 0  # nothing was computed yet
    pieces = list(stream)
    assert len(pieces) > 3
    assert "".join(pieces).strip() == stream.answer.text == whole.text
    assert list(stream) == []
    assert stream.answer is stream.answer


def test_the_rest_of_a_stream(lm: vidlm.LM, video: Path) -> None:
    stream = lm.stream(video, QUESTION, max_tokens=24)
    first = next(iter(stream))
    assert stream.answer.text.startswith(first.strip())
    assert stream.answer.usage.completion_tokens == 24


# ---- several turns -------------------------------------------------------------------------------


def test_a_second_turn_is_one_long_prompt(lm: vidlm.LM, video: Path) -> None:
    chat = lm.chat(video, frames=3, system="Be brief.", max_tokens=9)
    one = chat.ask(QUESTION)
    two = chat.ask("and then?", max_tokens=11)
    said = chat.messages[2]["content"][0]["text"]
    assert said.strip() == one.text
    messages = [
        {"role": "system", "content": [part("Be brief.")]},
        user(3, QUESTION),
        {"role": "assistant", "content": [part(said)]},
        user(0, "and then?"),
    ]
    text, length = expected(lm, messages, vidlm.sample_frames(video, 3), max_new_tokens=11)
    assert (two.text, two.usage.prompt_tokens) == (text.strip(), length)
    assert two.frames == one.frames == chat.frames
    assert two.usage.media_tokens == one.usage.media_tokens == 3 * tiny.FRAME_TOKENS
    assert [message["role"] for message in chat.messages] == [
        "system",
        *("user", "assistant") * 2,
    ]


def test_a_turn_joins_when_it_is_finished(lm: vidlm.LM, video: Path) -> None:
    chat = lm.chat(video, frames=2, max_tokens=9)
    next(iter(chat.stream("never mind")))
    assert chat.messages == []
    answer = chat.ask(QUESTION)
    assert answer.text == lm.ask(video, QUESTION, frames=2, max_tokens=9).text
    assert len(chat.messages) == 2
    with pytest.raises(InvalidArgument):
        chat.ask("")
    assert len(chat.messages) == 2


# ---- what is refused -----------------------------------------------------------------------------


def test_more_frames_than_fit(lm: vidlm.LM) -> None:
    with pytest.raises(ContextOverflow, match=r"takes 512; use at most 30 frames .*now 40"):
        lm.ask(clip(40), QUESTION, frames=40)
    answer = lm.ask(clip(40), QUESTION, frames=30, max_tokens=1)
    assert answer.usage.completion_tokens == 1


def test_unknown_options(lm: vidlm.LM, video: Path) -> None:
    with pytest.raises(TypeError, match=r"'max_token'; did you mean 'max_tokens'"):
        lm.ask(video, QUESTION, max_token=3)
    with pytest.raises(TypeError, match=r"'frame'; did you mean 'frames'"):
        lm.chat(video, frame=3)
    chat = lm.chat(video)
    with pytest.raises(TypeError, match="did you mean 'temperature'"):
        chat.ask(QUESTION, temperatur=1)
    with pytest.raises(InvalidArgument, match=r"pass them to lm\.chat"):
        chat.ask(QUESTION, frames=3)


@pytest.mark.parametrize("question", ["", "  \n", None, 5])
def test_a_question_must_be_asked(lm: vidlm.LM, question: Any) -> None:
    with pytest.raises(InvalidArgument, match="ask something"):
        lm.chat().ask(question)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"frames": 2, "fps": 1}, "exclude each other"),
        ({"frames": 0}, "give 1 or more"),
        ({"max_tokens": 0}, "at least 1"),
        ({"temperature": -1}, "temperature"),
        ({"num_beams": 2, "stop": "x"}, "num_beams=1 or leave stop out"),
    ],
)
def test_options_that_make_no_sense(
    lm: vidlm.LM, video: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidArgument, match=said):
        lm.ask(video, QUESTION, **options)


def test_media_that_cannot_be_read(lm: vidlm.LM, video: Path, tmp_path: Path) -> None:
    with pytest.raises(MediaNotFound, match=r"nothing\.mp4"):
        lm.ask(tmp_path / "nothing.mp4", QUESTION)
    with pytest.raises(MediaNotFound, match=r"nothing\.png"):
        lm.ask([video, tmp_path / "nothing.png"], QUESTION)
    with pytest.raises(MediaError):
        lm.ask(b"this is no video", QUESTION)


def test_loading() -> None:
    with pytest.raises(ModelNotFound, match="--model demo"):
        vidlm.load("nowhere")


def test_loading_in_another_dtype(lm: vidlm.LM) -> None:
    assert lm.model.folder is not None
    other = vidlm.load(lm.model.folder, dtype="bfloat16", device="cpu")
    assert other.model.dtype == torch.bfloat16
    assert other.chat().ask(QUESTION, max_tokens=2).usage.completion_tokens == 2
