"""One policy and one set of limits for everything that names a source: messages, arguments, API."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
import vidlm
from clips import clip
from slowfast_forms import write as write_slowfast
from video_forms import FORMS
from vidlm import AutoProcessor
from vidlm.errors import InvalidArgument, MediaFetchError, MediaLimitError
from vidlm.hf import ProcessorMixin
from vidlm.hf.frame_options import FrameOptions
from vidlm.media import FetchPolicy, Limits, MediaReader

NOTHING = MediaReader(FetchPolicy(folders=(), hosts=("example.org",)))
SMALL = MediaReader(limits=Limits(pixels=100))
NAMES = ("llava", "next-vicuna", "video-llava", "videollama3", "slowfast")


@dataclass(frozen=True)
class Files:
    """Files that are there, and a saved processor of each family."""

    folder: Path
    image: str
    video: str
    frames: list[str]

    @property
    def sources(self) -> dict[str, tuple[str, Any]]:
        """The content type and the source of every form that names a file or host."""
        uri = Path(self.image).as_uri()
        return {
            "image path": ("image", self.image),
            "image Path": ("image", Path(self.image)),
            "image file URL": ("image", uri),
            "image localhost": ("image", uri.replace("file://", "file://localhost")),
            "image FILE": ("image", uri.replace("file:", "FILE:")),
            "image above": ("image", f"{self.folder}/x/../a.png"),
            "image host": ("image", "https://example.com/a.png"),
            "image inner host": ("image", "http://127.0.0.1:1/a.png"),
            "video path": ("video", self.video),
            "video Path": ("video", Path(self.video)),
            "video file URL": ("video", Path(self.video).as_uri()),
            "video host": ("video", "https://example.com/a.mp4"),
            "video folder": ("video", str(self.folder / "frames")),
            "video pattern": ("video", str(self.folder / "frames" / "*.png")),
            "video frames": ("video", self.frames),
            "video Paths": ("video", [Path(frame) for frame in self.frames]),
            "video mixed": ("video", [self.frames[0], np.zeros((40, 56, 3), np.uint8)]),
            "video missing": ("video", str(self.folder / "nothing.mp4")),
            "image missing": ("image", str(self.folder / "nothing.png")),
        }


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("files")
    tiny.picture(0).save(folder / "a.png")
    (folder / "a.mp4").write_bytes(clip(4))
    (folder / "frames").mkdir()
    frames = [folder / "frames" / f"{i}.png" for i in range(2)]
    for i, frame in enumerate(frames):
        tiny.picture(i).save(frame)
    return Files(folder, str(folder / "a.png"), str(folder / "a.mp4"), list(map(str, frames)))


def write(name: str, folder: Path) -> Path:
    if name == "llava":
        return tiny.write(folder)
    return write_slowfast(folder) if name == "slowfast" else FORMS[name].write(folder)


@pytest.fixture(scope="module", params=NAMES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def processor(folder: Path) -> ProcessorMixin:
    made = AutoProcessor.from_pretrained(folder, media=NOTHING)
    made.chat_template = "{% for m in messages %}{% for p in m.content %}x{% endfor %}{% endfor %}"
    return made


def routes(processor: ProcessorMixin, kind: str, source: Any) -> Iterator[Callable[[], Any]]:
    """Every way in which a source of a kind reaches a processor."""
    for key in ("path", "url", kind):
        chat = [{"role": "user", "content": [{"type": kind, key: source}]}]
        yield lambda chat=chat: processor.apply_chat_template(chat, tokenize=True)
        yield lambda chat=chat: processor.apply_chat_template([chat], tokenize=True)
        yield lambda chat=chat: processor.read(chat, FrameOptions())
    if kind == "image":
        token = processor.image_token
        yield lambda: processor(images=source, text=token)
        yield lambda: processor(images=[[source]], text=[token])
        yield lambda: processor(images=[tiny.picture(0), source], text=token * 2)
        if processor.image_class is not None or hasattr(processor.image_processor, "preprocess"):
            yield lambda: processor.image_processor(source)
            yield lambda: processor.image_processor.preprocess([source])
    elif processor.video_token is not None:
        video = [source] if isinstance(source, list) else source
        yield lambda: processor(text=processor.video_token, videos=video)
        yield lambda: processor(text=[processor.video_token], videos=[[video]])
        if processor.video_processor is not None:
            yield lambda: processor.video_processor(source)
            yield lambda: processor.video_processor(source, num_frames=1)


def test_nothing_local_and_no_other_host_is_read(processor: ProcessorMixin, files: Files) -> None:
    tried = 0
    for name, (kind, source) in files.sources.items():
        for number, route in enumerate(routes(processor, kind, source)):
            tried += 1
            try:
                route()
            except MediaFetchError:
                continue
            pytest.fail(f"{name}, route {number}: was read")
    assert tried > 100


def test_what_is_sent_is_read(processor: ProcessorMixin, files: Files) -> None:
    """bytes and data URLs name nothing."""
    data = Path(files.image).read_bytes()
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    for source in (data, url):
        assert processor(images=source, text=processor.image_token)["input_ids"]
    if processor.video_token is not None:
        movie = Path(files.video).read_bytes()
        url = f"data:video/mp4;base64,{base64.b64encode(movie).decode()}"
        for source in (movie, url):
            assert processor(videos=source, text=processor.video_token)["input_ids"]


def test_folders_that_may_be_read(folder: Path, files: Files, tmp_path: Path) -> None:
    allowed = MediaReader(FetchPolicy(folders=(files.folder,)))
    processor = AutoProcessor.from_pretrained(folder, media=allowed)
    tiny.picture(0).save(tmp_path / "other.png")
    link = files.folder / f"link-{folder.name}.png"
    link.symlink_to(tmp_path / "other.png")
    assert processor(images=files.image, text=processor.image_token)["input_ids"]
    for outside in (tmp_path / "other.png", link, f"{files.folder}/../other.png"):
        with pytest.raises(MediaFetchError, match="outside the folders"):
            processor(images=outside, text=processor.image_token)
    if processor.video_token is not None:
        with pytest.raises(MediaFetchError, match="outside the folders"):
            processor(videos=[[files.frames[0], str(link)]], text=processor.video_token)


def test_limits_hold_everywhere(folder: Path, files: Files) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    processor.reader = SMALL
    data = Path(files.image).read_bytes()
    sources = [*files.sources.items(), ("image bytes", ("image", data))]
    for name, (kind, source) in sources:
        if any(word in name for word in ("host", "missing", "above", "mixed")):
            continue
        for route in routes(processor, kind, source):
            with pytest.raises(MediaLimitError):
                route()


def test_who_is_given_a_reader(folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder, media=NOTHING)
    assert processor.reader is NOTHING
    assert processor.image_processor.reader is NOTHING
    assert AutoProcessor.from_pretrained(folder).reader == MediaReader()
    if processor.image_class is not None:
        processor.image_processor = processor.image_class.from_pretrained(folder)
        assert processor.image_processor.reader is NOTHING
        assert processor.image_processor.changed({"do_resize": True}).reader is NOTHING
    with pytest.raises(InvalidArgument, match="is no MediaReader"):
        processor.reader = FetchPolicy()


def test_a_loaded_model_reads_by_it(
    files: Files, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = write("llava", tmp_path / "model")
    free, bound = vidlm.load(folder), vidlm.load(folder, media=NOTHING)
    saved = tmp_path / "video.safetensors"
    free.video(files.video, frames=2).save(saved)
    assert free.video(saved).name
    for source in (files.image, files.video, files.frames, str(files.folder / "frames"), saved):
        for ask in (
            lambda source=source: bound.ask(source, "What?", max_tokens=1),
            lambda source=source: bound.ask([source], "What?", max_tokens=1),
            lambda source=source: bound.video(source),
            lambda source=source: bound.chat(source).ask("What?", max_tokens=1),
        ):
            with pytest.raises(MediaFetchError):
                ask()
    assert (
        bound.ask(Path(files.video).read_bytes(), "What?", frames=1, max_tokens=1).text is not None
    )
