"""Chat messages with media in them: what is read, in which order, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from clips import clip, numbers
from vidlm import LlavaProcessor, load_video
from vidlm.errors import InvalidArgument, MediaNotFound
from vidlm.hf.frame_options import FrameOptions


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def processor(folder: Path) -> LlavaProcessor:
    return LlavaProcessor.from_pretrained(folder)


def read(processor: LlavaProcessor, *parts: Any, **options: Any) -> Any:
    return processor.read([{"role": "user", "content": list(parts)}], FrameOptions(**options))


def test_media_are_read_in_order(processor: LlavaProcessor, tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(clip(20))
    tiny.picture(0).save(tmp_path / "a.png")
    path = str(tmp_path / "clip.mp4")
    got = read(
        processor,
        {"type": "image", "path": str(tmp_path / "a.png")},
        "a text",
        {"type": "video", "path": path},
        {"type": "video", "url": path, "fps": 5, "start": 0.4, "end": 0.8},
        num_frames=3,
    )
    kinds = [part["type"] for part in got.messages[0]["content"]]
    assert kinds == ["image", "text", *["image"] * 5]
    assert [(ref.media, ref.index) for ref in got.frames] == [
        *((1, index) for index in (0, 6, 13)),
        *((2, index) for index in (10, 15)),
    ]
    assert numbers(np.stack(got.images[1:])) == [0, 6, 13, 10, 15]
    assert got.frames[1].pts == pytest.approx(6 / 25)


def test_frames_unless_told(processor: LlavaProcessor) -> None:
    assert len(read(processor, {"type": "video", "video": clip(20)}).images) == 8
    assert len(read(processor, {"type": "video", "video": clip(20)}, max_frames=4).images) == 4
    part = {"type": "video", "video": clip(20), "num_frames": 2}
    assert len(read(processor, part, fps=25.0).images) == 2


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"type": "audio"}, "allowed types: text, image, video"),
        (5, "allowed types"),
        ({"type": "video"}, "names no video"),
        ({"type": "video", "path": "a.mp4", "frames": 3}, r"\['frames'\]; allowed:.*num_frames"),
        ({"type": "image", "path": "a.png", "fps": 3}, r"image part has unknown keys \['fps'\]"),
    ],
)
def test_bad_parts(processor: LlavaProcessor, part: Any, said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        read(processor, part)


def test_bad_conversations(processor: LlavaProcessor) -> None:
    with pytest.raises(InvalidArgument, match="a dict with role and content"):
        processor.read(["hello"], FrameOptions())  # type: ignore[list-item]
    with pytest.raises(InvalidArgument, match="already loaded"):
        read(processor, {"type": "video", "video": load_video(clip(5)), "fps": 2})
    with pytest.raises(MediaNotFound):
        read(processor, {"type": "video", "path": "nothing.mp4"})
    chat = [{"role": "user", "content": [{"type": "image"}]}]
    with pytest.raises(InvalidArgument, match="of type image names no source"):
        processor.apply_chat_template(chat, tokenize=True)
    with pytest.raises(InvalidArgument, match="need tokenize=True"):
        processor.apply_chat_template(chat, return_tensors="pt")
    with pytest.raises(InvalidArgument, match="needs text"):
        processor(images=tiny.pictures(1))
