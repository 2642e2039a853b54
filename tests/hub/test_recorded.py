"""Answers that were recorded with the published weights; vidlm must give them too.

    python -m pytest -m hub tests/hub

downloads 35 GB the first time and holds one checkpoint in memory at a time, 15 GB at most. The
records are those of transformers' own integration tests; docs/models.md lists them. Prompts must
agree to the letter, and ids where there is a record of them. Where an answer was recorded with
these weights in 16 bits all of it must agree with one of the records, of which there is one for
each kind of device; where the weights had 4 bits, its first five words, because vidlm runs them in
bfloat16, which may word the rest differently.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import hf_hub_download

from vidlm import AutoModelForImageTextToText, AutoProcessor
from vidlm.media import load_image

Ids = tuple[int, ...]
FOUR_BIT_WORDS = 5
FRAMES = 8  # of each recorded video
IMAGE_URLS = {
    "cats": "http://images.cocodataset.org/val2017/000000039769.jpg",
    "sora": "https://github.com/DAMO-NLP-SG/VideoLLaMA3/raw/refs/heads/main/assets/sora.png",
}


@dataclass(frozen=True)
class Checkpoint:
    """A repository, the dtype to load it in, and how many words of an answer must agree (None: it
    must agree as a whole)."""

    name: str
    dtype: str
    words: int | None


@dataclass(frozen=True)
class Row:
    """One prompt of a batch, as text or as messages; how it decodes, its placeholders removed; and
    the answers on record, any of which will do. So will any of `ids`, which are the prompt's with
    every placeholder as often as its media fills it, where those are on record."""

    prompt: str | Sequence[Mapping[str, Any]]
    shown: tuple[str, ...]
    answers: tuple[str, ...]
    ids: tuple[Ids, ...] = ()


@dataclass(frozen=True)
class Case:
    """A batch: its media by name, in the order of their placeholders, and the answers' length."""

    rows: tuple[Row, ...]
    tokens: int
    images: tuple[str, ...] = ()
    videos: tuple[str, ...] = ()


# ---- comparing -----------------------------------------------------------------------------------


def first(answer: str, words: int | None) -> str:
    """All of an answer, or its first words, between which white space does not count."""
    return answer if words is None else " ".join(answer.split()[:words])


def behind(prompts: Sequence[str], text: str) -> str:
    """What a decoded row says behind its prompt, which must be one of these to the letter."""
    known = [prompt for prompt in prompts if text.startswith(prompt)]
    assert known, f"the prompt decodes to another text: {text!r} begins with none of {prompts}"
    return text.removeprefix(known[0])


def test_comparing() -> None:
    text = "USER: \nWhy? ASSISTANT: The humor in this video comes from a child."
    answer = behind(["USER:  \nWhy? ASSISTANT:", "USER: \nWhy? ASSISTANT:"], text)
    assert answer == " The humor in this video comes from a child."
    assert first(answer, None) == answer
    assert first(answer, 5) == "The humor in this video"
    assert first(" The humor in\nthis video is another.", 5) == first(answer, 5)
    assert first(" The humor in that video", 5) != first(answer, 5)
    assert first(" Yes.", 5) == "Yes."
    with pytest.raises(AssertionError, match="another text"):
        behind(["USER:  \nWhy? ASSISTANT:"], text)


# ---- running -------------------------------------------------------------------------------------


def dataset(repository: str, file: str) -> str:
    return hf_hub_download(f"raushan-testing-hf/{repository}", file, repo_type="dataset")


def image(name: str) -> Any:
    if name == "small sora":
        return image("sora").resize((224, 224))
    return load_image(IMAGE_URLS.get(name) or dataset("images_test", f"{name}.jpg"))


def video(name: str) -> Any:
    """The recorded frames (8, H, W, 3)."""
    frames = np.load(dataset("videos-test", f"{name}.npy"))
    assert len(frames) == FRAMES
    return frames


@dataclass
class Loaded:
    checkpoint: Checkpoint
    processor: Any
    model: Any = None

    def inputs(
        self, rows: Sequence[Row], images: Sequence[str] = (), videos: Sequence[Any] = ()
    ) -> Any:
        """A padded batch; a video is given by its name or as frames."""
        frames = [video(each) if isinstance(each, str) else each for each in videos]
        return self.processor(
            text=[self.text(row.prompt) for row in rows],
            images=[image(name) for name in images] or None,
            videos=frames or None,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )

    def text(self, prompt: str | Sequence[Mapping[str, Any]]) -> str:
        if isinstance(prompt, str):
            return prompt
        chat = self.processor.apply_chat_template
        return str(chat(prompt, tokenize=False, add_generation_prompt=True))

    def answer(self, inputs: Any, tokens: int) -> list[str]:
        """Prompts and greedy answers, decoded without special tokens."""
        inputs = inputs.to(self.model.device, self.model.dtype)
        greedy = {"do_sample": False, "repetition_penalty": 1.0}
        output = self.model.generate(**inputs, **greedy, max_new_tokens=tokens)
        return list(self.processor.batch_decode(output, skip_special_tokens=True))

    def check(self, case: Case) -> None:
        inputs, words = self.inputs(case.rows, case.images, case.videos), self.checkpoint.words
        masks = inputs["attention_mask"].bool()
        for row, ids, mask in zip(case.rows, inputs["input_ids"], masks, strict=True):
            assert not row.ids or tuple(ids[mask].tolist()) in row.ids
        for row, text in zip(case.rows, self.answer(inputs, case.tokens), strict=True):
            expected = [first(answer, words) for answer in row.answers]
            assert first(behind(row.shown, text), words) in expected


@pytest.fixture(scope="module")
def loaded(request: pytest.FixtureRequest) -> Iterator[Loaded]:
    """A checkpoint. The tests of one stand together, so each is loaded once."""
    checkpoint: Checkpoint = request.param
    one = Loaded(checkpoint, AutoProcessor.from_pretrained(checkpoint.name))
    one.model = AutoModelForImageTextToText.from_pretrained(
        checkpoint.name, dtype=checkpoint.dtype, device_map="auto"
    )
    yield one
    one.model = None  # pytest still holds `one` at this point
    gc.collect()
    torch.cuda.empty_cache()


def with_weights(checkpoint: Checkpoint) -> pytest.MarkDecorator:
    name = checkpoint.name.partition("/")[2]
    return pytest.mark.parametrize("loaded", [pytest.param(checkpoint, id=name)], indirect=True)


def each(cases: Mapping[str, Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", list(cases.values()), ids=list(cases))


# ---- llava-interleave ----------------------------------------------------------------------------

INTERLEAVE = Checkpoint("llava-hf/llava-interleave-qwen-0.5b-hf", "float16", words=None)
WHAT_ARE_THESE = Row(
    "<|im_start|>user\n<image>\nWhat are these?<|im_end|>\n<|im_start|>assistant",
    ("user\n\nWhat are these?\nassistant",),
    (
        " The image shows two cats, one on the left and one on the right. They appear to be resting"
        " or sleeping on a pink blanket. The cat",
        " These are two cats, one with a green collar and the other with a black collar. They are"
        " lying on a pink blanket and appear to be sleeping",
    ),
)


@pytest.mark.hub
@with_weights(INTERLEAVE)
def test_interleave(loaded: Loaded) -> None:
    loaded.check(Case((WHAT_ARE_THESE,), 30, images=("cats",)))


# ---- LLaVA-NeXT-Video ----------------------------------------------------------------------------

NEXT_VIDEO = Checkpoint("llava-hf/LLaVA-NeXT-Video-7B-hf", "bfloat16", FOUR_BIT_WORDS)

# "USER: ", and what follows "Why" in "Why is this video funny? ASSISTANT:"
USER = (1, 3148, 1001, 29901, 29871)
FUNNY = (338, 445, 4863, 2090, 1460, 29973, 319, 1799, 9047, 13566, 29901)


def asked(question: str, *answers: str, ids: tuple[Ids, ...] = ()) -> Row:
    """A row in Vicuna's form.

    Records whose question follows its placeholder in the same line are older. They have a space
    between the two, where later versions of transformers put none: both will do.
    """
    prompt = f"USER: {question} ASSISTANT:"
    gaps = ("",) if ">\n" in question else (" ", "")
    shown = tuple(re.sub("<video>|<image>", gap, prompt) for gap in gaps)
    return Row(prompt, shown, answers, ids)


NEXT_WHY = asked(
    "<video>\nWhy is this video funny?",
    " The humor in this video comes from the unexpected and somewhat comical situation of a young"
    " child reading a book while another child is attempting to read the same book. The child who"
    " is reading the book seems",
    " The humor in this video comes from the unexpected and adorable behavior of the young child."
    " The child is seen reading a book, but instead of turning the pages like one would typically"
    " do, they",
    ids=((*USER, *[32000] * 144 * FRAMES, 13, 11008, *FUNNY),),
)
NEXT_RADAR = asked(
    "<image>\nWhat is shown in this image?",
    " The image appears to be a graphical representation of a machine learning model's performance"
    " on a task, likely related to natural language processing or text understanding. It shows a"
    ' scatter plot with two axes, one labeled "BLIP-2"',
    " The image displays a chart that appears to be a comparison of different models or versions"
    " of a machine learning (ML) model, likely a neural network, based on their performance on a"
    " task or dataset. The chart is a scatter plot with axes labeled",
)
RADAR = "llava_v1_5_radar"
NEXT_VIDEO_CASES = {
    "a video": Case((NEXT_WHY,), 40, videos=("video_demo",)),
    "two videos": Case((NEXT_WHY, NEXT_WHY), 20, videos=("video_demo", "video_demo")),
    "image and video": Case((NEXT_RADAR, NEXT_WHY), 50, (RADAR,), ("video_demo",)),
}


@pytest.mark.hub
@with_weights(NEXT_VIDEO)
@each(NEXT_VIDEO_CASES)
def test_next_video(loaded: Loaded, case: Case) -> None:
    loaded.check(case)


@pytest.mark.hub
@with_weights(NEXT_VIDEO)
def test_next_video_answers_the_same_in_a_batch(loaded: Loaded) -> None:
    batch = loaded.inputs([NEXT_WHY, NEXT_RADAR], [RADAR], ["video_demo"])
    alone = loaded.inputs([NEXT_WHY], videos=["video_demo"])
    assert loaded.answer(batch, 50)[0] == loaded.answer(alone, 50)[0]


# ---- Video-LLaVA ---------------------------------------------------------------------------------

VIDEO_LLAVA = Checkpoint("LanguageBind/Video-LLaVA-7B-hf", "bfloat16", FOUR_BIT_WORDS)
VIDEO = [32001] * 257 * FRAMES


WHY = asked(
    "<video>\nWhy is this video funny?",
    " The video is funny because it shows a baby sitting on a bed and reading a book, which",
    " The video is funny because it shows a baby sitting on a bed and reading a book. The",
    ids=((*USER, *VIDEO, 13, 11008, *FUNNY),),
)
CATS = asked(
    "<image>\nWhat are the cats in the image doing?",
    " The cats in the image are sleeping or resting on a couch.",
)
DETAILS = asked(
    "<video>\nDescribe the video in details.",
    " The video features a young child sitting on a bed, holding a book and reading it. The child"
    " appears to be enjoying the book, as they are fully engaged in the activity.",  # etc.
)
READS = " The baby is sitting on a bed and reading a book."
BABY = asked("<video>\nWhat is the baby doing?", READS)
SITS = " A small dog is sitting next to the woman."
DOG = asked("<video>\nWho is sitting next to the woman?", SITS)

OLD_WHY = asked(
    "<video>Why is this video funny?",
    " The video is funny because the baby is playing with a Wii remote while sitting on a bed",
    ids=tuple((*USER, *VIDEO, why, *FUNNY) for why in (3750, 11008)),  # "▁Why", "Why"
)
OLD_CATS = asked(
    "<image>What are the cats in the image doing?",
    " The cats in the image are lying down on a red couch, possibly sleeping or rest",
)
OLD_DETAILS = asked(
    "<video>Describe the video in details.",
    " The video features a young child sitting on a bed, holding a book and reading it. The child"
    " appears to be enjoying the book, as they are fully engaged in the reading process.",  # etc.
)
OLD_BABY = asked("<video>What is the baby doing?", f"{READS}Ъ")
OLD_DOG = asked("<video>Who is sitting next to the woman?", f"{SITS}Ъ")
BOTH = ("video_demo", "video_demo_2")
VIDEO_LLAVA_CASES = {
    "a video": Case((WHY,), 20, videos=BOTH[:1]),
    "image and video": Case((CATS, WHY), 20, ("cats",), BOTH[:1]),
    "details": Case((DETAILS,), 900, videos=BOTH[:1]),
    "two videos": Case((BABY, DOG), 20, videos=BOTH),
    "a video, older": Case((OLD_WHY,), 20, videos=BOTH[:1]),
    "image and video, older": Case((OLD_CATS, OLD_WHY), 20, ("cats",), BOTH[:1]),
    "details, older": Case((OLD_DETAILS,), 900, videos=BOTH[:1]),
    "two videos, older": Case((OLD_BABY, OLD_DOG), 20, videos=BOTH),
}


@pytest.mark.hub
@with_weights(VIDEO_LLAVA)
@each(VIDEO_LLAVA_CASES)
def test_video_llava(loaded: Loaded, case: Case) -> None:
    loaded.check(case)


@pytest.mark.hub
@with_weights(VIDEO_LLAVA)
def test_video_llava_beyond_its_context(loaded: Loaded) -> None:
    """Two more records are of 4,112 tokens and a text, which transformers lets run: 16 frames with
    200 lines, and two videos in a prompt. `generate` warns of them and runs, too."""
    lines = asked("<video>" + "Describe the video:?\n" * 200)
    turns = asked("<video>Who is it? ASSISTANT: A dog. USER: <video>What about this video?")
    sixteen = video("video_demo").repeat(2, axis=0)
    for row, videos in ((lines, [sixteen]), (turns, ["video_demo_2", "video_demo"])):
        (text,) = loaded.answer(loaded.inputs([row], videos=videos), 20)
        assert len(behind(row.shown, text)) > 0


# ---- VideoLLaMA3 ---------------------------------------------------------------------------------

VIDEO_LLAMA = Checkpoint("lkhl/VideoLLaMA3-2B-Image-HF", "bfloat16", words=None)


def described(*answers: str, ids: tuple[Ids, ...] = ()) -> Row:
    content = [{"type": "image"}, {"type": "text", "text": "Describe the image."}]
    shown = ("user\n\nDescribe the image.\nassistant\n",)
    return Row([{"role": "user", "content": content}], shown, answers, ids)


SORA_IDS = (
    *(151644, 872, 198, *[151655] * 10549, 198),
    *(74785, 279, 2168, 13, 151645, 198, 151644, 77091, 198),
)
SORA = described(
    "The image captures a vibrant nighttime scene on a bustling city street. A woman in a striking"
    " red dress",
    "The image captures a vibrant night scene in a bustling Japanese city. A woman in a striking"
    " red dress",
    ids=(SORA_IDS,),
)
SMALL_SORA = described(
    "The image depicts a striking urban scene at night. A person is standing in the center of a wet"
)
RELATIVITY = Row(
    [{"role": "user", "content": [{"type": "text", "text": "What is relativity?"}]}],
    ("user\nWhat is relativity?\nassistant\n",),
    (
        "Relativity is a scientific theory that describes the relationship between space and time."
        " It was first proposed by",
    ),
)
VIDEO_LLAMA_CASES = {
    "an image": Case((SORA,), 20, ("sora",)),
    "two images": Case((SORA, SORA), 20, ("sora", "sora")),
    "image and text": Case((SORA, RELATIVITY), 20, ("sora",)),
    "two sizes": Case((SORA, SMALL_SORA), 20, ("sora", "small sora")),
}
PIXELS = (  # of the first six patches, the first three numbers
    *(-0.8588, -0.9216, -0.9608, -0.9922, -0.9922, -0.9922, -0.9686, -0.9686, -0.9294),
    *(-0.9294, -0.9765, -0.9765, -0.9922, -0.9922, -0.9843, -0.6000, -0.4118, -0.3647),
)


@pytest.mark.hub
@with_weights(VIDEO_LLAMA)
def test_videollama3_pixels(loaded: Loaded) -> None:
    pixels = loaded.inputs([SORA], ["sora"])["pixel_values"][:6, :3]
    torch.testing.assert_close(pixels, torch.tensor(PIXELS).view(6, 3), atol=1e-4, rtol=1e-4)


@pytest.mark.hub
@with_weights(VIDEO_LLAMA)
@each(VIDEO_LLAMA_CASES)
def test_videollama3(loaded: Loaded, case: Case) -> None:
    loaded.check(case)
