"""A processor's keywords and attributes: as in transformers, or refused."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
import torchvision_on_cpu  # noqa: F401  (before transformers, which imports torchvision)
from oracle import Reference
from slowfast_forms import write as write_slowfast
from video_forms import FORMS, clip
from vidlm import AutoProcessor, VideoLlavaImageProcessor
from vidlm.errors import InvalidArgument, MediaNotFound

NAMES = ("siglip-qwen2-tied", "clip-llama", "next-vicuna", "video-llava", "videollama3")


@dataclass(frozen=True)
class Pair:
    """One checkpoint's processor, read by both."""

    name: str
    folder: Path
    theirs: Any

    @property
    def ours(self) -> Any:
        return AutoProcessor.from_pretrained(self.folder)

    @property
    def image(self) -> str:
        return FORMS[self.name].image if self.name in FORMS else "<image>"

    def inputs(self, count: int = 1) -> dict[str, Any]:
        texts = [f"{self.image} What is it? {'really? ' * i}" for i in range(count)]
        return {"text": texts, "images": tiny.pictures(count)}

    def assert_same(self, mine: Any, theirs: Any, tolerance: float = 0, **call: Any) -> Any:
        call = {"padding": True, "return_tensors": "pt", **call}
        ours = mine(**call)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = theirs(**call)
        assert set(ours) == set(expected)
        for key in ours:
            assert type(ours[key]) is type(expected[key]), key
            assert ours[key].shape == expected[key].shape, key
            assert np.allclose(ours[key], expected[key], atol=tolerance, rtol=0), key
        return ours


@pytest.fixture(scope="module", params=NAMES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp(request.param)
    if (form := FORMS.get(request.param)) is not None:
        return Pair(request.param, folder, form.processor(form.write(folder)))
    return Pair(request.param, folder, Reference.make(folder, request.param).processor)


# ---- keywords of a call ------------------------------------------------------------------------

CALLS: list[dict[str, Any]] = [
    {"truncation": True, "max_length": 400},
    {"truncation": True, "max_length": 400, "padding": "max_length"},
    {"padding": "max_length", "max_length": 192, "truncation": False},
    {"padding": True, "pad_to_multiple_of": 8},
    {"padding": "longest", "padding_side": "right", "truncation": None},
    {"padding": "do_not_pad", "return_tensors": "pt", "one": True},
    {"text_kwargs": {"pad_to_multiple_of": 32}},
    {"text_kwargs": {}, "images_kwargs": {}},
    {"common_kwargs": {"do_normalize": False}},
    {"images_kwargs": {"do_normalize": False}},
    {"images_kwargs": {"do_rescale": False}},
    {"do_normalize": False},
    {"do_rescale": False},
    {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]},
    {"rescale_factor": 0.5},
    {"resample": 2},
    {"device": "cpu"},
    {"return_tensors": "np"},
]


@pytest.mark.parametrize("how", CALLS, ids=str)
def test_keywords_of_a_call(pair: Pair, how: dict[str, Any]) -> None:
    how = dict(how)
    inputs = pair.inputs(1 if how.pop("one", False) else 2)
    tolerance = 1e-6 if "do_normalize" in str(how) else 0
    if pair.name == "videollama3" and how.get("return_tensors") == "np":
        return  # transformers' own fails
    pair.assert_same(pair.ours, pair.theirs, tolerance, **inputs, **how)


def test_text_alone_is_truncated_on_the_tokenizers_side(pair: Pair) -> None:
    ours = pair.ours
    before = pair.theirs.tokenizer.truncation_side
    try:
        for side in ("left", "right"):
            ours.tokenizer.truncation_side = pair.theirs.tokenizer.truncation_side = side
            call = {"text": ["a b c d e f g", "h"], "truncation": True, "max_length": 4}
            made = pair.assert_same(ours, pair.theirs, **call)
            assert made["input_ids"].shape == (2, 4)
    finally:
        pair.theirs.tokenizer.truncation_side = before
    ours.tokenizer.truncation_side = "top"
    with pytest.raises(InvalidArgument, match="'left', 'right'"):
        ours(text="a b c", truncation=True, max_length=2)


def test_the_length_a_tokenizer_names(pair: Pair) -> None:
    ours = pair.ours
    before = pair.theirs.tokenizer.model_max_length
    try:
        ours.tokenizer.model_max_length = pair.theirs.tokenizer.model_max_length = 5
        text = ["a b c d e f g h i", "h"]
        for how in ({"truncation": True}, {"truncation": True, "padding": "max_length"}):
            assert pair.assert_same(ours, pair.theirs, text=text, **how)["input_ids"].shape[1] == 5
    finally:
        pair.theirs.tokenizer.model_max_length = before


def test_placeholders_are_never_cut(pair: Pair) -> None:
    call = {**pair.inputs(), "truncation": True, "max_length": 5}
    with pytest.raises(ValueError, match="Mismatch in"):
        pair.theirs(**call)
    with pytest.raises(InvalidArgument, match="truncation leaves"):
        pair.ours(**call)


@pytest.mark.parametrize(
    ("how", "kind", "said"),
    [
        ({"images_kwargs": {"nonsense": 3}}, TypeError, "'nonsense'"),
        ({"images_kwargs": {"do_normalise": False}}, TypeError, "did you mean 'do_normalize'"),
        ({"text_kwargs": {"max_lenght": 3}}, TypeError, "did you mean 'max_length'"),
        ({"common_kwargs": {"foo": 3}}, TypeError, "'foo'"),
        ({"images_kwargs": [3]}, InvalidArgument, "give a dict"),
        ({"images_kwargs": {"do_resize": "yes"}}, InvalidArgument, "give True or False"),
        ({"images_kwargs": {"size": "big"}}, InvalidArgument, "size='big'"),
        ({"padding": "most"}, InvalidArgument, "padding='most'"),
        ({"padding_side": "top"}, InvalidArgument, "padding_side='top'"),
        ({"truncation": "some"}, InvalidArgument, "truncation='some'"),
        ({"max_length": 2.5}, InvalidArgument, "max_length=2.5"),
        ({"max_length": 0}, InvalidArgument, "max_length=0"),
        ({"pad_to_multiple_of": -1}, InvalidArgument, "pad_to_multiple_of=-1"),
        ({"data_format": "channels_last"}, InvalidArgument, "channels first"),
        (
            {"padding": True, "truncation": True, "max_length": 90, "pad_to_multiple_of": 64},
            *(InvalidArgument, "to a multiple"),
        ),
        ({"do_resize": True, "images_kwargs": {"do_resize": True}}, InvalidArgument, "both by"),
        ({"return_tensors": "tf"}, InvalidArgument, "return_tensors='tf'"),
    ],
)
def test_keywords_that_cannot_be_meant(
    pair: Pair, how: dict[str, Any], kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said):
        pair.ours(**pair.inputs(), **how)


def test_grey_and_layouts(pair: Pair) -> None:
    ours, text = pair.ours, [f"{pair.image} What?"]
    first = np.asarray(tiny.picture(1)).transpose(2, 0, 1).copy()
    for how in ({"input_data_format": "channels_first"}, {"images_kwargs": {}}):
        pair.assert_same(ours, pair.theirs, text=text, images=[first], **how)
    with pytest.raises(InvalidArgument, match="mode 'L'"):
        ours(text=text, images=[tiny.picture(1, mode="L")], do_convert_rgb=False)


# ---- attributes --------------------------------------------------------------------------------


def test_words_that_tokens_are_counted_by(pair: Pair) -> None:
    if pair.name == "videollama3":
        with pytest.raises(AttributeError, match="no attribute 'patch_size'"):
            pair.ours.patch_size = 14
        return
    ours, theirs = pair.ours, pair.theirs
    words = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")
    before = {word: getattr(theirs, word) for word in words}
    assert {word: getattr(ours, word) for word in words} == before
    try:
        for word, value in zip(words, (14, "full", 3), strict=True):
            setattr(ours, word, value)
            setattr(theirs, word, value)
            assert getattr(ours, word) == value
            pair.assert_same(ours, theirs, **pair.inputs(2))
    finally:
        for word, value in before.items():
            setattr(theirs, word, value)
    for word, value in (("patch_size", 0), ("vision_feature_select_strategy", "best")):
        with pytest.raises(InvalidArgument, match=f"{word}="):
            setattr(ours, word, value)
    with pytest.raises(InvalidArgument, match="num_additional_image_tokens=-1"):
        ours.num_additional_image_tokens = -1


def test_words_of_the_image_processor(pair: Pair) -> None:
    ours, theirs = pair.ours, pair.theirs
    changes = {"do_normalize": False, "do_rescale": False, "image_mean": [0.0, 0.1, 0.2]}
    before = {word: getattr(theirs.image_processor, word) for word in changes}
    try:
        for word, value in changes.items():
            setattr(ours.image_processor, word, value)
            setattr(theirs.image_processor, word, value)
            assert getattr(ours.image_processor, word) == value
            pair.assert_same(ours, theirs, 1e-6, **pair.inputs(2))
    finally:
        for word, value in before.items():
            setattr(theirs.image_processor, word, value)
    for word, value, said in (
        ("do_resize", "yes", "give True or False"),
        ("size", -1, "give a number above 0"),
        ("image_mean", [1.0], "give a number, or three"),
    ):
        with pytest.raises(InvalidArgument, match=said):
            setattr(ours.image_processor, word, value)
    with pytest.raises(AttributeError, match=r"no attribute 'do_normalise' to set; allowed: .*do_"):
        ours.image_processor.do_normalise = False


def test_the_budget_of_pixels_is_one_word(pair: Pair) -> None:
    if pair.name != "videollama3":
        return
    ours = pair.ours
    usual = len(ours(**pair.inputs())["input_ids"][0])
    assert ours.image_processor.max_pixels == ours.image_processor.size["longest_edge"] == 1600
    ours.image_processor.max_pixels = 256
    assert ours.image_processor.size["longest_edge"] == 256
    assert len(ours(**pair.inputs())["input_ids"][0]) < usual
    ours.image_processor.size = {"shortest_edge": 64, "longest_edge": 1600}
    assert len(ours(**pair.inputs())["input_ids"][0]) == usual
    with pytest.raises(InvalidArgument, match="channels first"):
        ours.image_processor.data_format = "channels_last"
    with pytest.raises(InvalidArgument, match="the most pixels"):
        ours.image_processor.size = 224


def test_words_of_the_video_processor(pair: Pair, clips_dir: Path) -> None:
    if pair.name not in FORMS:
        return
    ours, form = pair.ours, FORMS[pair.name]
    path = str(clips_dir / "imageio_realshort.mp4")

    def frames(videos: Any) -> int:
        made = ours(text=form.video, videos=videos, return_metadata=True)
        return len(made["video_metadata"][0].frames_indices)

    usual = frames(path)
    ours.video_processor.num_frames = 3
    assert frames(path) == 3
    assert frames(clip(1)) == 8  # given as such
    ours.video_processor.do_sample_frames = True
    assert frames(clip(1)) == 3
    ours.video_processor.num_frames = None
    ours.video_processor.do_sample_frames = False
    assert frames(path) == usual
    with pytest.raises(AttributeError, match="no attribute 'nmu_frames'"):
        ours.video_processor.nmu_frames = 3
    with pytest.raises(InvalidArgument, match="num_frames=0"):
        ours.video_processor.num_frames = 0


def test_attributes_without_effect(pair: Pair) -> None:
    ours = pair.ours
    for name in ("image_token", "image_token_id", "video_token", "sampling", "core", "nonsense"):
        with pytest.raises(AttributeError, match=f"'{name}' to set; allowed: .*image_processor"):
            setattr(ours, name, 3)
    for name in ("add_bos_token", "legacy", "nonsense"):
        with pytest.raises(AttributeError, match=f"'{name}' to set; allowed: .*padding_side"):
            setattr(ours.tokenizer, name, True)
    with pytest.raises(InvalidArgument, match="image_processor is a "):
        ours.image_processor = pair.theirs.image_processor
    with pytest.raises(InvalidArgument, match="tokenizer is a "):
        ours.tokenizer = pair.theirs.tokenizer


def test_parts_that_are_replaced(pair: Pair) -> None:
    ours = pair.ours
    other = type(ours.image_processor).from_pretrained(pair.folder, do_normalize=False)
    ours.image_processor = other
    changed = ours(**pair.inputs(), return_tensors="pt")
    expected = pair.ours(**pair.inputs(), return_tensors="pt", do_normalize=False)
    for key in expected:
        assert torch.equal(changed[key], expected[key]), key
    if not isinstance(other, VideoLlavaImageProcessor):
        with pytest.raises(InvalidArgument, match="image_processor is a Video"):
            ours.image_processor = VideoLlavaImageProcessor()


def test_slowfast_has_fixed_pixels(tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(write_slowfast(tmp_path))
    call = {"text": "<image> a", "images": tiny.picture(1)}
    for words in ({"images_kwargs": {"do_normalize": False}}, {"do_normalize": False}):
        with pytest.raises(TypeError, match="do_normalize"):
            processor(**call, **words)
    for target, name in ((processor.image_processor, "size"), (processor, "video_processor")):
        with pytest.raises(AttributeError, match=name):
            setattr(target, name, 3)
    cut = processor(text="a b c d", truncation=True, max_length=3)["input_ids"][0]
    assert cut == processor(text="a b c d")["input_ids"][0][:3]
    with pytest.raises(InvalidArgument, match="truncation leaves"):
        processor(**call, truncation=True, max_length=1)
    chat = [
        {"role": "user", "content": [{"type": "image", "image": tiny.picture(1)}]},
        {"role": "assistant", "content": [{"type": "text", "text": "It is"}]},
    ]
    template = (
        "{% for m in messages %}{% for p in m.content %}{% if p.type == 'image' %}<image>"
        "{% else %}{% generation %}{{ p.text }}{% endgeneration %}{% endif %}{% endfor %}#"
        "{% endfor %}"
    )
    how = {"chat_template": template, "tokenize": True, "return_dict": True}
    made = processor.apply_chat_template(chat, **how, return_assistant_tokens_mask=True)
    ids, masks = made["input_ids"][0], made["assistant_masks"][0]
    picked = [id for id, mask in zip(ids, masks, strict=True) if mask]
    assert processor.decode(picked) == "It is"
    open_end = processor.apply_chat_template(chat, continue_final_message=True, **how)
    assert processor.decode(open_end["input_ids"][0]).endswith("It is")


# ---- errors that lead to the cause -------------------------------------------------------------


def test_swapped_arguments(pair: Pair) -> None:
    text, image = f"{pair.image} What?", tiny.picture(1)
    for swapped in ((text, image), ([text], [image]), (text, "x.png"), (text,)):
        with pytest.raises(InvalidArgument, match=r"images come first, processor\(images, text\)"):
            pair.ours(*swapped)
    for wrong in (3, [3], [["a", "b"]], {"a": 1}, b"text"):
        with pytest.raises(InvalidArgument, match="give a text or a list of texts"):
            pair.ours(text=wrong)


def test_an_image_by_its_name(pair: Pair, tmp_path: Path) -> None:
    image = tiny.picture(1)
    image.save(tmp_path / "x.png")
    ours, call = pair.ours, {"text": f"{pair.image} What?", "return_tensors": "pt"}
    expected = ours(images=image, **call)
    name = str(tmp_path / "x.png")
    forms = (
        name,
        Path(name),
        f"file://{name}",
        [name],
        [[name]],
        (tmp_path / "x.png").read_bytes(),
    )
    for form in forms:
        made = ours(images=form, **call)
        assert all(torch.equal(made[key], expected[key]) for key in expected)
    with pytest.raises(MediaNotFound, match=r"y\.png"):
        ours(images=str(tmp_path / "y.png"), **call)


@pytest.mark.parametrize("wrong", [3, {"image": 1}, [None], object(), [tiny.picture(1), 3.5]])
def test_what_is_no_image(pair: Pair, wrong: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"is no image|None among the images"):
        pair.ours(images=wrong, text=pair.image)


@pytest.mark.parametrize("wrong", [3, {"video": 1}, [None], object(), [3.5]])
def test_what_is_no_video(pair: Pair, wrong: Any) -> None:
    said = "is no video" if pair.name in FORMS else "takes a video as its frames"
    with pytest.raises(InvalidArgument, match=said):
        pair.ours(videos=wrong, text="a")


def test_one_frame_is_a_video(pair: Pair) -> None:
    if pair.name not in FORMS:
        return
    form, image = FORMS[pair.name], tiny.picture(1)
    expected = pair.ours(text=form.video, videos=[[image]])["input_ids"]
    for one in (image, np.asarray(image), np.asarray(image).transpose(2, 0, 1)):
        assert pair.ours(text=form.video, videos=one)["input_ids"] == expected


def test_a_rate_that_nobody_knows(pair: Pair) -> None:
    if pair.name not in FORMS:
        return
    form, frames = FORMS[pair.name], clip(1)
    for videos in (frames, list(frames), torch.from_numpy(frames)):
        with pytest.raises(ValueError, match="fps"):
            pair.theirs(text=[form.video], videos=videos, fps=2, do_sample_frames=True)
        for how in ({"fps": 2}, {"fps": 2, "do_sample_frames": True}):
            with pytest.raises(InvalidArgument, match="rate is not known"):
                pair.ours(text=form.video, videos=videos, **how)
    told = {"total_num_frames": 8, "fps": 4.0, "frames_indices": [0, 1]}
    with pytest.raises(InvalidArgument, match="2 frames_indices for a video of 8"):
        pair.ours(text=form.video, videos=frames, video_metadata=told)
