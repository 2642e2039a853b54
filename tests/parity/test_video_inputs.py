"""What the processors of the video families take: sources, metadata, words of a call, parts."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vidlm
from tiny import picture
from video_forms import FORMS, clip
from vidlm import AutoProcessor, load_video
from vidlm.errors import InvalidArgument, UnsupportedModel
from vidlm.models import family_of

FAMILIES = {"next-vicuna": "<video>", "video-llava": "<video>", "videollama3": "<|video_pad|>"}


@pytest.fixture(scope="module", params=list(FAMILIES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FORMS[name].write(tmp_path_factory.mktemp(name))


@pytest.fixture
def processor(folder: Path) -> Any:
    return AutoProcessor.from_pretrained(folder)


def ids(processor: Any, name: str, videos: Any, **kwargs: Any) -> list[int]:
    text = f"{FAMILIES[name]} what?"
    row: list[int] = processor(text=text, videos=videos, **kwargs)["input_ids"][0]
    return row


def test_forms_of_one_video(processor: Any, name: str) -> None:
    frames = clip(1)
    expected = ids(processor, name, frames)
    images = [Image.fromarray(frame) for frame in frames]
    first = torch.from_numpy(frames).permute(0, 3, 1, 2)
    forms = (images, list(frames), [frames], [images], first, first[None], load_video(frames))
    for form in forms:
        assert ids(processor, name, form) == expected


def test_files_are_sampled_and_frames_are_not(processor: Any, name: str, clips_dir: Path) -> None:
    path = str(clips_dir / "imageio_realshort.mp4")
    family = processor.family
    usual = ids(processor, name, path)
    assert usual == ids(processor, name, load_video(path, **family.sampling))
    four = ids(processor, name, path, num_frames=4)
    assert four == ids(processor, name, load_video(path, num_frames=4))
    whole = load_video(path)
    every = ids(processor, name, path, do_sample_frames=False)
    assert len(every) > len(usual)
    assert every == ids(processor, name, whole)
    assert ids(processor, name, whole.frames, num_frames=4)[:3] == four[:3]
    with pytest.raises(InvalidArgument, match="do_sample_frames=False"):
        ids(processor, name, path, do_sample_frames=False, fps=1)
    with pytest.raises(InvalidArgument, match="leave it out"):
        ids(processor, name, path, video_metadata={"total_num_frames": 4})


def test_metadata_of_chosen_frames(name: str, folder: Path, processor: Any) -> None:
    frames = clip(2, frames=4)
    told = {"fps": 4.0, "total_num_frames": 40, "frames_indices": [0, 6, 20, 30]}
    ours = ids(processor, name, [frames], video_metadata=[told])
    theirs = FORMS[name].processor(folder)
    text = [f"{FAMILIES[name]} what?"]
    expected = theirs(text=text, videos=[frames], video_metadata=[told], do_sample_frames=False)
    assert ours == [int(id) for id in expected["input_ids"][0]]
    if name == "videollama3":
        said = processor.decode(ours, skip_special_tokens=True)
        assert "Time 1.5s:" in said
        assert "Time 7.5s:" in said
    with pytest.raises(InvalidArgument, match="1 videos, 2 were given"):
        processor(text=text * 2, videos=[frames, frames], video_metadata=[told])


def test_words_of_one_call(processor: Any, name: str) -> None:
    form = FORMS[name]
    image = picture(3, 40, 40)
    text = f"{form.image} what?"
    key = "pixel_values_images" if name == "video-llava" else "pixel_values"
    usual = processor(text=text, images=image)[key]
    plain = processor(text=text, images=image, do_normalize=False)[key]
    assert torch.equal(
        plain, processor(text=text, images=image, images_kwargs={"do_normalize": False})[key]
    )
    assert 0 <= float(plain.min()) < float(plain.max()) <= 1
    assert not torch.equal(plain, usual)
    processor.image_processor.do_normalize = False  # counts from now on
    assert torch.equal(processor(text=text, images=image)[key], plain)
    with pytest.raises(TypeError, match="did you mean 'do_normalize'"):
        processor(text=text, images=image, do_normalise=False)


def test_put_together_by_hand(processor: Any, name: str, tmp_path: Path) -> None:
    form = FORMS[name]
    made = getattr(vidlm, f"{form.family}Processor")(
        image_processor=getattr(vidlm, f"{form.family}ImageProcessor")(**form.images),
        video_processor=getattr(vidlm, f"{form.family}VideoProcessor")(**form.videos),
        tokenizer=processor.tokenizer,
        **form.words,
    )
    text = f"{form.image} and {form.video}"
    media = {"images": [picture(1)], "videos": [clip(1)]}
    ours, expected = made(text=text, **media), processor(text=text, **media)
    assert ours["input_ids"] == expected["input_ids"]
    made.save_pretrained(tmp_path)
    if name == "videollama3":  # the others count their tokens by config.json
        again = AutoProcessor.from_pretrained(tmp_path)
        assert again(text=text, **media)["input_ids"] == expected["input_ids"]


def test_as_many_placeholders_as_media(processor: Any, name: str) -> None:
    token = FAMILIES[name]
    with pytest.raises(InvalidArgument, match=r"names 2 videos .*, 1 were given"):
        processor(text=f"{token}{token}", videos=[clip(1)])
    with pytest.raises(InvalidArgument, match=r"names 0 images .*, 1 were given"):
        processor(text=token, videos=[clip(1)], images=[picture(1)])


def test_video_llava_wants_eight_frames(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    processor = AutoProcessor.from_pretrained(FORMS["video-llava"].write(tmp_path))
    processor(text="<video>", videos=clip(1, frames=8))
    assert not caplog.messages
    processor(text="<video>", videos=clip(1, frames=5))
    assert "5 frames; Video-LLaVA was trained with 8" in caplog.text
    assert caplog.records[0].levelno == logging.WARNING


def test_inputs_that_do_not_belong_together(folder: Path, name: str) -> None:
    model = vidlm.AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    text = f"{FORMS[name].image} {FORMS[name].video}"
    inputs = dict(processor(text=text, images=picture(1), videos=clip(1), return_tensors="pt"))
    needed = {"next-vicuna": "image_sizes", "videollama3": "video_grid_thw"}.get(name)
    if needed is not None:
        rest = {key: value for key, value in inputs.items() if key != needed}
        with pytest.raises(InvalidArgument, match=needed):
            model(**rest)
    cut = {**inputs, "pixel_values_videos": inputs["pixel_values_videos"][:, :2]}
    if name == "videollama3":
        cut["pixel_values_videos"] = inputs["pixel_values_videos"][:-3]
    with pytest.raises(InvalidArgument, match="video"):
        model.generate(**cut, max_new_tokens=1)


def test_what_no_family_reads() -> None:
    for config in ({"model_type": "llava_next"}, {"model_type": "qwen2_vl"}, {}):
        with pytest.raises(UnsupportedModel, match="known: llava, "):
            family_of(config)
    old = {"model_type": "llava_next", "architectures": ["LlavaNextVideoForConditionalGeneration"]}
    assert family_of(old).config.model_type == "llava_next_video"


def test_videos_of_different_lengths_in_a_batch(processor: Any, name: str, folder: Path) -> None:
    model = vidlm.AutoModelForImageTextToText.from_pretrained(folder)
    token = FAMILIES[name]
    videos = [clip(1, frames=8), clip(2, frames=3)]
    options = {"padding": True, "return_tensors": "pt"}
    batch = processor(text=[f"{token} a", f"{token} b"], videos=videos, **options)
    answers = model.generate(**batch, max_new_tokens=4, eos_token_id=[])
    for row, (text, video) in enumerate(zip("ab", videos, strict=True)):
        alone = processor(text=f"{token} {text}", videos=video, return_tensors="pt")
        expected = model.generate(**alone, max_new_tokens=4, eos_token_id=[])
        assert torch.equal(answers[row, -4:], expected[0, -4:])


def test_a_grey_image_and_one_with_alpha(processor: Any, name: str) -> None:
    for mode in ("L", "RGBA", "P"):
        assert processor(text=FORMS[name].image, images=picture(1, mode=mode))["input_ids"]
    grey = np.zeros((8, 8, 2), np.uint8)
    with pytest.raises(InvalidArgument):
        processor(text=FORMS[name].image, images=grey)
