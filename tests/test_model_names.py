"""Every class, method and argument that transformers' pages about three families document is here,
takes what they say it takes, and returns the fields they say it returns.

The page about LLaVA-NeXT-Video names classes and methods alone; of those transformers' own code
says the rest.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import model_pages
import tiny
import video_forms
import vidlm
from model_pages import PAGES, Documentation
from oracle import transformers
from vidlm.errors import InvalidArgument
from vidlm.hf import Cache

# How many arguments the page documents for each class and method, whose names begin with the
# family's.
COUNTS = {
    "LlavaNextVideo": (
        "Config 0, Processor 0, ImageProcessor 0, VideoProcessor 0, Model 0, "
        "ForConditionalGeneration 0, ForConditionalGeneration.forward 0"
    ),
    "VideoLlava": (
        "Config 10, ImageProcessor 11, ImageProcessor.preprocess 15, ImageProcessor.resize 5, "
        "VideoProcessor 0, Processor 9, Model 1, Model.forward 14, Model.get_image_features 3, "
        "Model.get_placeholder_mask 0, Model.get_video_features 2, ForConditionalGeneration 1, "
        "ForConditionalGeneration.forward 16"
    ),
    "VideoLlama3": (
        "Config 4, VisionConfig 10, ImageProcessor 14, ImageProcessor.preprocess 19, "
        "VideoProcessor 29, VideoProcessor.preprocess 23, ImageProcessorFast 0, "
        "ImageProcessorFast.preprocess 25, Processor 4, "
        "Processor.post_process_image_text_to_text 3, Model 1, Model.forward 14, VisionModel 1, "
        "VisionModel.forward 3, ForConditionalGeneration 1, ForConditionalGeneration.forward 15"
    ),
}
COUNTED = {
    family: {family + name: int(count) for name, count in map(str.split, listed.split(","))}
    for family, listed in COUNTS.items()
}
NAMES = [name for page in COUNTED.values() for name in page]


@pytest.fixture(scope="module")
def pages(shared: Path) -> dict[str, Documentation]:
    return {family: page.documents(page.text(shared)) for family, page in PAGES.items()}


@pytest.fixture(scope="module")
def documented(pages: dict[str, Documentation]) -> Documentation:
    return {name: entry for page in pages.values() for name, entry in page.items()}


@pytest.mark.parametrize("family", list(PAGES))
def test_the_pages_are_read_whole(family: str, pages: dict[str, Documentation]) -> None:
    counts = {name: len(entry.arguments) for name, entry in pages[family].items()}
    assert counts == COUNTED[family]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_documented_is_here(name: str) -> None:
    kind, *method = name.split(".")
    assert kind in vidlm.__all__
    assert all(callable(getattr(getattr(vidlm, kind), each)) for each in method or ["__init__"])


def literal(default: str | None) -> Any:
    """The value of a documented default; None where there is none."""
    if default is None or default.startswith("<"):
        return None
    names = {"Resampling": Image.Resampling}
    return eval(compile(ast.parse(default, mode="eval"), "default", "eval"), names)


# ---- configurations ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["VideoLlavaConfig", "VideoLlama3Config", "VideoLlama3VisionConfig"]
)
def test_documented_defaults_of_a_configuration(name: str, documented: Documentation) -> None:
    kind = getattr(vidlm, name)
    for argument, default in documented[name].arguments.items():
        value = literal(default)
        assert kind(**{argument: value}) == kind(), argument
        if argument.endswith(("_token_index", "_token_id", "_seq_length")):
            assert getattr(kind(**{argument: 7}), argument) == 7


@pytest.mark.parametrize("family", list(PAGES))
def test_a_configuration_alone_is_that_of_transformers(family: str) -> None:
    ours = getattr(vidlm, f"{family}Config")().to_dict()
    theirs = getattr(transformers, f"{family}Config")().to_diff_dict()
    assert theirs.keys() - ours.keys() == {"transformers_version"}
    for inner in ("text_config", "vision_config"):
        mine, other = ours.pop(inner), theirs.pop(inner)
        both = mine.keys() & other.keys() - {"rope_parameters"}
        assert len(both) >= 8
        assert {key: mine[key] for key in both} == {key: other[key] for key in both}
    assert {key: ours[key] for key in theirs if key in ours} == {
        key: value for key, value in theirs.items() if key in ours
    }


# ---- processors ----------------------------------------------------------------------------------

FRAME = np.asarray(tiny.picture(1, 60, 84))
SOURCES = {"images": FRAME, "videos": np.stack([FRAME, FRAME // 2, FRAME // 3])}
# A value for every word. Those in IDLE change no pixel of SOURCES, because they say what is so
# already or what these processors do not do; all others must.
IDLE: Mapping[str, Any] = {
    **dict.fromkeys(("do_resize", "disable_grouping"), True),
    **dict.fromkeys(("do_convert_rgb", "do_pad", "default_to_square", "do_sample_frames"), False),
    **dict.fromkeys(("pad_size", "size_divisor")),
    **{"return_metadata": False, "return_tensors": "np", "device": "cpu"},
    "input_data_format": "channels_last",
    "video_metadata": {"total_num_frames": 3, "fps": 1, "frames_indices": [0, 1, 2]},
}
WORDS: Mapping[str, Any] = {
    **{"resample": 2, "do_rescale": False, "rescale_factor": 1 / 127, "do_normalize": False},
    **{"image_mean": [0.1, 0.2, 0.3], "image_std": 0.75, "num_frames": 2, "fps": 4},
}
IDLE_CROP: Mapping[str, Any] = {}
CROP = {
    "size": {"shortest_edge": 40},
    "do_center_crop": False,
    "crop_size": {"height": 30, "width": 36},
    "data_format": "channels_last",
}
IDLE_PATCH = {
    **{"do_center_crop": False, "crop_size": None, "data_format": "channels_first"},
    **{"temporal_patch_size": 1, "min_frames": 2, "max_frames": 3},  # which sampling alone reads
}
PATCH = {
    "size": {"shortest_edge": 28 * 28 * 2, "longest_edge": 28 * 28 * 4},
    **{"min_pixels": 28 * 28 * 16, "max_pixels": 28 * 28 * 4, "patch_size": 7},
}
# What else a call must say for a word to mean something.
TOLD = {"total_num_frames": 3, "fps": 8}
BESIDE = {
    "fps": {"do_sample_frames": True, "video_metadata": TOLD, "min_frames": 1},
    "num_frames": {"do_sample_frames": True},
}


def arrays(features: Mapping[str, Any]) -> dict[str, np.ndarray]:
    pixels = {name: value for name, value in features.items() if name != "video_metadata"}
    return {name: np.stack(value) for name, value in pixels.items()}


def same(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> bool:
    assert one.keys() == other.keys()
    return all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith(".preprocess")])
def test_words_of_a_pixel_processor(name: str, documented: Documentation) -> None:
    """Each is taken, and says the same to the processor and to a call."""
    kind, crops = getattr(vidlm, name.removesuffix(".preprocess")), "VideoLlava" in name
    medium = "videos" if "Video" in kind.__name__.removeprefix("Video") else "images"
    source = {medium: SOURCES[medium]}
    merge = {"merge_size": 1 if medium == "videos" else 2}
    idle = {**IDLE, **(IDLE_CROP if crops else IDLE_PATCH)}
    words = {**idle, **WORDS, **(CROP if crops else PATCH), **merge}
    constructed = documented[name.removesuffix(".preprocess")].arguments
    usual = arrays(kind().preprocess(**source))
    for word in {**documented[name].arguments, **constructed}.keys() - SOURCES.keys():
        value, beside = words[word], BESIDE.get(word, {})
        made = arrays(kind(**{word: value}).preprocess(**source, **beside))
        called = arrays(kind().preprocess(**source, **beside, **{word: value}))
        assert same(made, called), word
        assert same(made, usual) == (word in idle), word


def test_an_image_processor_knows_of_videos_that_they_are_none(documented: Documentation) -> None:
    assert "videos" in documented["VideoLlama3ImageProcessorFast.preprocess"].arguments
    made = vidlm.VideoLlama3ImageProcessorFast().preprocess(FRAME, videos=None)
    assert list(made) == ["pixel_values", "image_grid_thw", "image_merge_sizes"]
    with pytest.raises(InvalidArgument, match="VideoLlama3VideoProcessor"):
        vidlm.VideoLlama3ImageProcessor().preprocess(FRAME, videos=[FRAME[None]])


@pytest.mark.parametrize("name", ["VideoLlavaImageProcessor", "VideoLlama3ImageProcessor"])
def test_documented_defaults_of_a_pixel_processor(name: str, documented: Documentation) -> None:
    kind = getattr(vidlm, name)
    for word, default in documented[name].arguments.items():
        assert kind(**{word: literal(default)}).words == kind().words, word


def test_resizing_by_itself(documented: Documentation) -> None:
    words = {"size": {"shortest_edge": 30}, "resample": 2, "data_format": "channels_first"}
    given = {"image": FRAME, **words, "input_data_format": "channels_last"}
    assert given.keys() == documented["VideoLlavaImageProcessor.resize"].arguments.keys()
    resized = vidlm.VideoLlavaImageProcessor().resize(**given)
    assert (resized.shape, resized.dtype) == ((3, 30, 42), np.uint8)


# ---- models --------------------------------------------------------------------------------------

MEDIA = {"images": tiny.picture(1), "videos": video_forms.clip(1), "return_tensors": "pt"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return model_pages.write_checkpoints(tmp_path_factory.mktemp("checkpoints"))


def load(checkpoints: Mapping[str, Path], name: str) -> tuple[Any, dict[str, Any]]:
    """A model by its class's name, and what it takes of an image, a video and a text."""
    family = next(family for family in PAGES if name.startswith(family))
    form = PAGES[family].form
    processor = vidlm.AutoProcessor.from_pretrained(checkpoints[family])
    inputs = processor(text=f"{form.image} and {form.video} what?", **MEDIA)
    return getattr(vidlm, name).from_pretrained(checkpoints[family]), dict(inputs)


def arguments_of(name: str, documented: Documentation) -> set[str]:
    entry = documented.get(f"{name}.forward")
    if entry is not None and entry.arguments:
        return set(entry.arguments)
    theirs = set(inspect.signature(getattr(transformers, name).forward).parameters)
    # One is newer than the pages, and what forward takes as **kwargs now they name.
    kwargs = {"output_attentions", "output_hidden_states", "return_dict", "cache_position"}
    return (theirs - {"self", "kwargs", "mm_encoder_outputs"}) | kwargs


def usual_values(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Of every argument but those for media a value that changes no number of the outcome."""
    length = inputs["input_ids"].shape[1]
    return {
        "position_ids": torch.arange(length)[None],
        "past_key_values": Cache(1),
        "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]),
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "labels": inputs["input_ids"],
        "use_cache": False,
        "output_attentions": True,
        "output_hidden_states": True,
        "return_dict": True,
        "cache_position": torch.arange(length),
        "logits_to_keep": 0,
    }


LATER = torch.tensor([1, 5])
MODELS = [f"{family}{kind}" for family in PAGES for kind in ("Model", "ForConditionalGeneration")]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_arguments_of_forward(
    name: str, documented: Documentation, checkpoints: dict[str, Path]
) -> None:
    model, inputs = load(checkpoints, name)
    usual, values = model(**inputs, use_cache=False)[0], usual_values(model, inputs)
    for argument in arguments_of(name, documented):
        given = {**inputs, argument: values[argument]} if argument not in inputs else inputs
        if argument == "inputs_embeds":
            given.pop("input_ids")
        output = model(**given)
        shown = output["logits" if "Conditional" in name else "last_hidden_state"]
        assert torch.allclose(shown, usual, atol=1e-5), argument
    flat = model(**inputs, use_cache=False, return_dict=False)
    assert isinstance(flat, tuple)
    assert torch.equal(flat[0], usual)
    if "Conditional" in name:
        last, some = (model(**inputs, logits_to_keep=keep).logits for keep in (2, LATER))
        assert torch.allclose(last, usual[:, -2:], atol=1e-5)
        assert torch.allclose(some, usual[:, LATER], atol=1e-5)


def fields_of(name: str, documented: Documentation) -> tuple[str, ...]:
    """Where a page does not say, all say the same of models of the same kind."""
    other = "VideoLlavaForConditionalGeneration" if "Conditional" in name else "VideoLlavaModel"
    known = (documented.get(f"{each}.forward") for each in (name, other))
    return next(entry.fields for entry in known if entry is not None and entry.fields)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_fields_of_what_forward_returns(
    name: str, documented: Documentation, checkpoints: dict[str, Path]
) -> None:
    model, inputs = load(checkpoints, name)
    asked = {"output_attentions": True, "output_hidden_states": True, "use_cache": True}
    if "Conditional" in name:
        asked["labels"] = inputs["input_ids"]
    wanted = fields_of(name, documented)
    assert len(wanted) == 6 + ("Conditional" in name)
    output = model(**inputs, **asked)
    assert [field for field in wanted if getattr(output, field, None) is None] == []
    flat = model(**inputs, **asked, return_dict=False)
    assert len(flat) == len(wanted)
    for field, value in zip(wanted, flat, strict=True):
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, output[field])


@torch.no_grad()
def test_the_vision_tower_of_videollama3(documented: Documentation) -> None:
    entry = documented["VideoLlama3VisionModel.forward"]
    words = PAGES["VideoLlama3"].form.config["vision_config"]
    config = vidlm.VideoLlama3VisionConfig.from_dict(words)
    model = vidlm.VideoLlama3VisionModel(config).eval()
    patches = vidlm.VideoLlama3ImageProcessor(patch_size=4)(FRAME, return_tensors="pt")
    values = [patches[name] for name in ("pixel_values", "image_grid_thw", "image_merge_sizes")]
    given = dict(zip(entry.arguments, values, strict=True))
    asked = {"output_hidden_states": True, "output_attentions": True, "return_dict": True}
    output = model(**given, **asked)
    assert [field for field in entry.fields if getattr(output, field, None) is None] == []
    assert len(output.hidden_states) == 1 + len(output.attentions) == 1 + words["num_hidden_layers"]
    for layer in output.attentions:
        assert all(torch.allclose(frame.sum(-1), torch.ones(())) for frame in layer)
    assert torch.equal(model(**given, return_dict=False)[0], output.last_hidden_state)


# ---- other methods -------------------------------------------------------------------------------


@torch.no_grad()
def test_features_and_their_places(documented: Documentation, checkpoints: dict[str, Path]) -> None:
    model, inputs = load(checkpoints, "VideoLlavaModel")
    words = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
    features = []
    for kind in ("image", "video"):
        given = {f"pixel_values_{kind}s": inputs[f"pixel_values_{kind}s"], **words}
        wanted = documented[f"VideoLlavaModel.get_{kind}_features"].arguments
        made = getattr(model, f"get_{kind}_features")(**{name: given[name] for name in wanted})
        features.append(made)
    image, video = features
    assert image.shape == (1, 16, 32)
    assert video.shape == (8, 17, 32)
    ids, x = inputs["input_ids"], model.get_input_embeddings()(inputs["input_ids"])
    masks = model.get_placeholder_mask(ids, x, image_features=image, video_features=video)
    assert [int(mask.sum()) for mask in masks] == [16, 8 * 17]


def test_answers_as_texts(documented: Documentation, checkpoints: dict[str, Path]) -> None:
    name = "VideoLlama3Processor.post_process_image_text_to_text"
    processor = vidlm.VideoLlama3Processor.from_pretrained(checkpoints["VideoLlama3"])
    ids = processor.tokenizer("Why is this funny ?<|im_end|>", return_tensors="pt")["input_ids"]
    words = {"skip_special_tokens": True, "clean_up_tokenization_spaces": True}
    given = {"generated_outputs": ids, **words}
    assert given.keys() == documented[name].arguments.keys()
    assert processor.post_process_image_text_to_text(**given) == ["Why is this funny?"]
    plain = processor.post_process_image_text_to_text(ids[0].numpy())
    assert plain == ["Why is this funny ?"]


@pytest.mark.parametrize("family", list(PAGES))
def test_a_processor_put_together(
    family: str, documented: Documentation, checkpoints: dict[str, Path]
) -> None:
    """By hand, out of its parts, with every word that is documented for it."""
    form, folder = PAGES[family].form, checkpoints[family]
    whole = getattr(vidlm, f"{family}Processor").from_pretrained(folder)
    given = {
        "image_processor": getattr(vidlm, f"{family}ImageProcessor").from_pretrained(folder),
        "video_processor": getattr(vidlm, f"{family}VideoProcessor").from_pretrained(folder),
        "tokenizer": vidlm.AutoTokenizer.from_pretrained(folder),
        "patch_size": video_forms.PATCH,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "image_token": "<image>",
        "video_token": "<video>",
        "chat_template": model_pages.VICUNA,
    }
    theirs = inspect.signature(getattr(transformers, f"{family}Processor")).parameters
    wanted = [name for name in theirs if name in given]  # the page's own, in their order
    assert set(wanted) == set(documented[f"{family}Processor"].arguments or wanted)
    words = {name: given[name] for name in wanted[3:]}
    made = type(whole)(*(given[name] for name in wanted[:3]), **words)
    assert made.chat_template == model_pages.VICUNA
    text = f"{form.image} and {form.video} what?"
    mine, other = made(text=text, **MEDIA), whole(text=text, **MEDIA)
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[entry], other[entry]) for entry in mine)


def test_a_processor_without_words_is_the_published_one(checkpoints: dict[str, Path]) -> None:
    pixels = vidlm.VideoLlavaImageProcessor(), vidlm.VideoLlavaVideoProcessor()
    tokenizer = vidlm.AutoTokenizer.from_pretrained(checkpoints["VideoLlava"])
    made = vidlm.VideoLlavaProcessor(*pixels, tokenizer)
    [ids] = made(text="<image><video>", **MEDIA)["input_ids"].tolist()
    assert (ids.count(video_forms.IMAGE), ids.count(video_forms.VIDEO)) == (256, 8 * 257)
