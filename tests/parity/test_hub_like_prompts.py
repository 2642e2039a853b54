"""The video families' processor and tokenizer files as the hub has them: ids and pixels.

The folders of the larger corpus are rebuilt to the hub's content. Numbers are those of
transformers' own tests and of its processors.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
import video_forms
from oracle import transformers
from vidlm import AutoProcessor
from vidlm.errors import ModelError
from vidlm.text import Tokenizer

FAMILIES = {"next_video": "LlavaNextVideo", "video_llava": "VideoLlava", "vl3": "VideoLlama3"}
SPACE = 29871  # "▁"
VIDEO_LLAVA_IDS = (  # recorded by transformers' test
    *(1, 3148, 1001, 29901, 29871, 32001, 3750, 338, 445, 4863, 2090, 1460, 29973),
    *(319, 1799, 9047, 13566, 29901),
)


@pytest.fixture(scope="module")
def hub(shared: Path) -> Path:
    return shared / "data" / "hub_like"


def copied(folder: Path, to: Path, **files: Path) -> Path:
    """A folder with other files in the place of its own: tokenizer=path."""
    shutil.copytree(folder, to)
    for name, path in files.items():
        shutil.copy(path, to / f"{name}.json")
    return to


@dataclass(frozen=True)
class Folder:
    """One folder read by both. AutoProcessor of transformers 5.23 recurses without end on the first
    family's, so theirs is put together by hand."""

    ours: Any
    theirs: Any
    their_tokenizer: Any  # of the class that tokenizer_config.json names

    @classmethod
    def read(cls, path: Path, name: str) -> Folder:
        words = {
            "patch_size": 14,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
        }
        given = (_words(path), _words(path, "video_"), {} if name == "vl3" else words)
        theirs = video_forms.Form(FAMILIES[name], {}, *given).processor(path)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        return cls(AutoProcessor.from_pretrained(path), theirs, tokenizer)

    def both(self, text: str, **media: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        mine = dict(self.ours(text=text, return_tensors="pt", **media))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pre-sampled frames have no clock
            theirs = dict(self.theirs(text=text, return_tensors="pt", **media))
        for name in ("token_type_ids", "mm_token_type_ids", "video_metadata"):
            theirs.pop(name, None)
        return mine, theirs


def _words(path: Path, kind: str = "") -> dict[str, Any]:
    """What an image or video processor of theirs is made with; one file may be for both."""
    file = path / f"{kind}preprocessor_config.json"
    words = json.loads((file if file.is_file() else path / "preprocessor_config.json").read_text())
    left = ("image_processor_type", "video_processor_type", "processor_class")
    left += ("do_pad",) if kind else ()  # of tiles
    return {key: value for key, value in words.items() if key not in left}


@pytest.fixture(scope="module")
def folders(hub: Path) -> dict[str, Folder]:
    return {name: Folder.read(hub / name, name) for name in FAMILIES}


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(1000 * height + width).integers(
        0, 256, (height, width, 3), np.uint8
    )


def still(frames: int, height: int, width: int) -> np.ndarray:
    return np.broadcast_to(picture(height, width), (frames, height, width, 3))


def count(ids: Any, token: int) -> int:
    return int((ids == token).sum())


# ---- placeholders --------------------------------------------------------------------------------

# height, width -> tokens, tiles
TILED = {
    (336, 336): (1176, 3),
    (480, 640): (2340, 5),
    (640, 480): (2352, 5),
    (300, 1000): (2182, 4),
    (1000, 300): (2232, 4),
    (500, 333): (1476, 3),
    (1080, 1920): (1948, 5),
    (100, 100): (1176, 3),
}


@pytest.mark.parametrize("size", list(TILED))
def test_next_images(folders: dict[str, Folder], size: tuple[int, int]) -> None:
    made = folders["next_video"].ours(text="<image>", images=picture(*size), return_tensors="pt")
    assert (count(made["input_ids"], 32001), made["pixel_values"].shape[1]) == TILED[size]
    assert made["image_sizes"].tolist() == [list(size)]
    assert made["pixel_values"].shape[2:] == (3, 336, 336)


@pytest.mark.parametrize(
    ("name", "per_frame", "image", "video", "side"),
    [("next_video", 144, 32001, 32000, 336), ("video_llava", 257, 32000, 32001, 224)],
)
def test_frames_of_a_fixed_size(
    folders: dict[str, Folder], name: str, per_frame: int, image: int, video: int, side: int
) -> None:
    processor = folders[name].ours
    for frames in (1, 8, 16):
        made = processor(text="<video>", videos=still(frames, 90, 120), return_tensors="pt")
        assert count(made["input_ids"], video) == per_frame * frames
        assert made["pixel_values_videos"].shape == (1, frames, 3, side, side)
        assert not count(made["input_ids"], image)
    if name == "video_llava":
        made = processor(text="<image><image>", images=[picture(300, 70), picture(9, 9)])
        assert made["input_ids"][0].count(image) == 2 * 256
        assert made["pixel_values_images"].shape == (2, 3, 224, 224)


def test_the_recorded_prompt_of_videollama3(folders: dict[str, Folder]) -> None:
    made = folders["vl3"].ours(
        text="<|im_start|>user\n<|image_pad|>\nDescribe the image.<|im_end|>\n"
        "<|im_start|>assistant\n",
        images=picture(1080, 1920),
        return_tensors="pt",
    )
    behind = (198, 74785, 279, 2168, 13, 151645, 198, 151644, 77091, 198)
    assert made["input_ids"][0].tolist() == [151644, 872, 198, *[151655] * 10549, *behind]
    assert made["image_grid_thw"].tolist() == [[1, 77, 137]]
    assert made["pixel_values"].shape == (10549, 588)


def test_tokens_of_videollama3s_frames(folders: dict[str, Folder]) -> None:
    """The budget is that of the file, which is shared by all frames."""
    pixels = folders["vl3"].ours.core.video_pixels
    expected = {(16, 720, 1280): 1008, (64, 720, 1280): 252, (128, 1080, 1920): 120}
    for (frames, height, width), tokens in {**expected, (180, 1080, 1920): 84}.items():
        assert pixels.tokens(frames, height, width) == frames * tokens
    assert pixels.size(16, 720, 1280) == (672, 1176)


def test_times_and_left_out_tokens_of_videollama3(folders: dict[str, Folder]) -> None:
    """Four frames: another, the same, and one whose upper half is black."""
    first = np.stack([picture(112, 168), picture(168, 112).reshape(112, 168, 3)])
    half = first[1].copy()
    half[:56] = 0
    mine, theirs = folders["vl3"].both(
        "<|video_pad|>\nWhy?", videos=[np.stack([*first, first[1], half])]
    )
    ids = mine["input_ids"][0].tolist()
    assert ids == theirs["input_ids"][0].tolist()
    parts = [f"Time {t}.0s:{'<|video_pad|>' * n}" for t, n in enumerate((24, 24, 1, 12))]
    assert folders["vl3"].ours.decode(ids) == ",".join(parts) + "\nWhy?"
    assert torch.equal(mine["video_compression_mask"], theirs["video_compression_mask"])


# ---- ids -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("swapped", [False, True])
def test_the_recorded_ids_of_video_llava(
    hub: Path, shared: Path, tmp_path: Path, swapped: bool
) -> None:
    """Also with the bare tokenizer.json of Llama, to which the small files add the placeholders."""
    llama = shared / "data/tokenizers/llama-spm/tokenizer.json"
    files = {"tokenizer": llama} if swapped else {}
    folder = copied(hub / "video_llava", tmp_path / "copy", **files)
    made = AutoProcessor.from_pretrained(folder)(
        text="USER: <video>Why is this video funny? ASSISTANT:", videos=still(8, 30, 40)
    )
    at = VIDEO_LLAVA_IDS.index(32001)
    expected = [*VIDEO_LLAVA_IDS[:at], *[32001] * 2056, *VIDEO_LLAVA_IDS[at + 1 :]]
    assert made["input_ids"] == [expected]


NEXT_PROMPT = "USER: <video>\nWhy is this video funny? ASSISTANT:"
NEXT_BEFORE = [1, 3148, 1001, 29901, 29871, 32000]
NEXT_BEHIND = [13, 11008, 338, 445, 4863, 2090, 1460, 29973, 319, 1799, 9047, 13566, 29901]


@pytest.mark.parametrize("file", ["hub_like/next_video", "tokenizers/llama-spm"])
def test_next_ids_follow_the_file(shared: Path, tmp_path: Path, file: str) -> None:
    """Both of these files put a "▁" before every stretch of text, behind a placeholder too. The ids
    that transformers' test of this model recorded have none there: those are of a file which puts
    one at the beginning alone, and transformers 5 takes every file for such a one."""
    given = shared / "data" / file / "tokenizer.json"
    folder = copied(shared / "data/hub_like/next_video", tmp_path / "copy", tokenizer=given)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)(NEXT_PROMPT)["input_ids"]
    assert theirs == [*NEXT_BEFORE, *NEXT_BEHIND]
    ids = Tokenizer.from_folder(folder).encode(NEXT_PROMPT)
    assert ids == [*NEXT_BEFORE, SPACE, *NEXT_BEHIND]
    once = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    tiny.edit_json(folder / "tokenizer.json", {"normalizer": None, "pre_tokenizer": once})
    assert Tokenizer.from_folder(folder).encode(NEXT_PROMPT) == theirs


OTHERS = {  # -32K and -34B: another text model's tokenizer, to which the small files add these
    "mistral-7b-hf": ({"<video>": 32000, "<image>": 32001}, "</s>", 2),
    "yi": (
        {**{f"<|reserved00{i}|>": 64000 + i for i in range(3)}, "<video>": 64003, "<image>": 64004},
        "<|im_end|>",
        7,
    ),
}


@pytest.mark.parametrize("name", list(OTHERS))
def test_next_with_other_text_models(hub: Path, shared: Path, tmp_path: Path, name: str) -> None:
    added, eos, id = OTHERS[name]
    given = shared / "data" / "tokenizers" / name / "tokenizer.json"
    folder = copied(hub / "next_video", tmp_path / "copy", tokenizer=given)
    (folder / "added_tokens.json").write_text(json.dumps(added))
    flags = {"normalized": False, "special": True}
    declared = {str(id): {"content": token, **flags} for token, id in added.items()}
    words = {"eos_token": eos, "pad_token": "<unk>", "added_tokens_decoder": declared}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    tokens = {f"{kind}_token_index": added[f"<{kind}>"] for kind in ("image", "video")}
    tiny.edit_json(folder / "config.json", tokens)
    processor = AutoProcessor.from_pretrained(folder)
    media = {"images": picture(336, 336), "videos": still(8, 30, 40)}
    ids = processor(text="<image> <video>\nWhy?", **media)["input_ids"][0]
    assert (ids.count(added["<image>"]), ids.count(added["<video>"])) == (1176, 1152)
    assert processor.tokenizer.eos_token_id == id
    assert processor.decode([id, *added.values()], skip_special_tokens=True) == ""


# What stands behind a placeholder, and what LlamaTokenizer of transformers 5 makes of it: other ids
# where the file's "▁" comes before it, the same where there is no text.
BEHIND = {
    "Why? <image>": ((), ()),
    "Why?\n<image><video>": ((), ()),
    "<image>\nWhy?": ((SPACE, 13, 11008, 29973), (13, 11008, 29973)),
    "<image>Why?": ((3750, 29973), (11008, 29973)),
    "<image> Why?": ((SPACE, 3750, 29973), (3750, 29973)),
}


@pytest.mark.parametrize("name", ["next_video", "video_llava"])
def test_where_transformers_5_makes_other_ids(folders: dict[str, Folder], name: str) -> None:
    folder = folders[name]
    ours, theirs, by_the_file = (
        folder.ours.tokenizer,
        folder.their_tokenizer,
        folder.theirs.tokenizer,
    )
    assert type(theirs).__name__ == "LlamaTokenizer"
    for text, (mine, other) in BEHIND.items():
        ids, their_ids = ours.encode(text), theirs(text)["input_ids"]
        assert ids == by_the_file(text)["input_ids"]
        head = len(ids) - len(mine)
        assert ids[:head] == their_ids[: len(their_ids) - len(other)]
        assert (tuple(ids[head:]), tuple(their_ids[len(their_ids) - len(other) :])) == (mine, other)


# ---- the same prompts through both ---------------------------------------------------------------

# The quirk above does not apply where a placeholder ends the text.
PROMPTS = {
    "image": ("What is shown in this picture? <I>", 1, 0),
    "video": ("Why is this video funny? <V>", 0, 1),
    "both": ("Compare: <I><V>", 1, 1),
}


def asked(name: str, prompt: str) -> tuple[str, dict[str, Any]]:
    text, images, videos = PROMPTS[prompt]
    image, video = ("<image>", "<video>") if name != "vl3" else ("<|image_pad|>", "<|video_pad|>")
    pictures = [tiny.picture(3, 240, 310)] * images
    clips = [video_forms.clip(4, frames=4, height=120, width=180)] * videos
    media = {"images": pictures or None, "videos": clips or None}
    return text.replace("<I>", image).replace("<V>", video), media


def same(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value.to(ours[name].dtype)), name


@pytest.mark.parametrize("prompt", list(PROMPTS))
@pytest.mark.parametrize("name", list(FAMILIES))
def test_ids_and_pixels(folders: dict[str, Folder], name: str, prompt: str) -> None:
    """By the tokenizer.json as it is, and by the class that transformers 5 takes for it."""
    text, media = asked(name, prompt)
    folder = folders[name]
    same(*folder.both(text, **media))
    assert folder.their_tokenizer(text)["input_ids"] == folder.ours.tokenizer.encode(text)
    # With text behind the placeholders ids are the file's, whatever the class makes of them.
    same(*folder.both(f"USER: {text}\nWhy? ASSISTANT:", **media))


# ---- files that are missing, or of another revision ----------------------------------------------


@pytest.mark.parametrize("name", list(FAMILIES))
def test_without_processor_config(hub: Path, tmp_path: Path, name: str) -> None:
    """Earlier revisions had none, or one with nothing but a chat template."""
    folder = copied(hub / name, tmp_path / "copy")
    expected = AutoProcessor.from_pretrained(folder)
    (folder / "processor_config.json").unlink(missing_ok=True)
    for template in (None, "{% for m in messages %}{{ m['role'] }}{% endfor %}"):
        if template is not None:
            words = {"chat_template": template}
            (folder / "processor_config.json").write_text(json.dumps(words))
            for file in folder.glob("tokenizer_config.json"):
                tiny.edit_json(file, None, "chat_template")
        processor = AutoProcessor.from_pretrained(folder)
        text, media = asked(name, "both")
        same(
            processor(text=text, return_tensors="pt", **media),
            expected(text=text, return_tensors="pt", **media),
        )
    messages: Sequence[Mapping[str, Any]] = [{"role": "user", "content": []}]
    assert processor.apply_chat_template(messages) == "user"


def test_videollama3_without_its_video_file(hub: Path, tmp_path: Path) -> None:
    """The published budget, never the default of transformers' class: 8 tokens a frame for 252."""
    folder = copied(hub / "vl3", tmp_path / "copy")
    (folder / "video_preprocessor_config.json").unlink()
    processor = AutoProcessor.from_pretrained(folder)
    assert processor.core.video_pixels.tokens(64, 720, 1280) == 64 * 252


@pytest.mark.parametrize(
    ("name", "key", "kind"),
    [
        ("next_video", "image_token_index", "images"),
        ("next_video", "video_token_index", "videos"),
        ("video_llava", "video_token_index", "videos"),
        ("vl3", "image_token_id", "images"),
        ("vl3", "video_token_id", "videos"),
    ],
)
def test_ids_of_another_revision(hub: Path, tmp_path: Path, name: str, key: str, kind: str) -> None:
    """34B's ids changed, and files of different revisions do not go together."""
    folder = copied(hub / name, tmp_path / "copy")
    tiny.edit_json(folder / "config.json", {key: 31999})
    with pytest.raises(ModelError, match=rf"31999 stands for {kind}, .* of different versions"):
        AutoProcessor.from_pretrained(folder)
