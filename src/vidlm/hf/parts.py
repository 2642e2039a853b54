"""What a processor is made of: its parts, their attributes, and the files they come from."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from pathlib import Path
from typing import Any, ClassVar, Self

from vidlm.errors import InvalidArgument, unknown_keyword
from vidlm.files import make_folder
from vidlm.hf.frame_options import FrameOptions
from vidlm.hf.image_processing import ImageProcessor
from vidlm.hf.loading import find
from vidlm.hf.video_processing import VideoProcessor
from vidlm.hf.words import ACCEPTED, LAST, LOCATION, PixelProcessor
from vidlm.media import MediaReader
from vidlm.models.base import Family
from vidlm.text import Tokenizer

SAMPLING = ("num_frames", "fps", "min_frames", "max_frames")


class ProcessorParts:
    """A family's own processor, its image and video processor, and what reads their sources.

    `image_processor` and `video_processor` may be changed, and their words count; `reader` reads
    paths and URLs. Other attributes than those in `settable` are an AttributeError when set, as
    they would have no effect.
    """

    family: ClassVar[Family]
    image_class: ClassVar[type[ImageProcessor] | None] = None  # None: fixed pixels
    video_class: ClassVar[type[VideoProcessor] | None] = None  # None: none of its own
    settable: ClassVar[tuple[str, ...]] = (
        *("image_processor", "video_processor", "tokenizer", "chat_template", "reader"),
    )

    core: Any
    image_processor: Any
    video_processor: Any
    _reader: MediaReader = MediaReader()

    @classmethod
    def of(cls, core: Any) -> Self:
        """A processor around a family's own."""
        made = cls.__new__(cls)
        images, videos = core.image_pixels, None
        if cls.image_class is not None:
            images = cls.image_class.of(core.image_pixels)
        if cls.video_class is not None:
            videos = cls.video_class.of(core.video_pixels)
        made._keep(core=core, image_processor=images, video_processor=videos)
        return made

    def _keep(self, **parts: Any) -> None:
        """Set the parts that a processor is made of, as they are."""
        vars(self).update(parts)

    def _keep_parts(self, core: Any, images: Any, videos: Any) -> None:
        """Set the parts of a processor that is put together; it reads as they do."""
        readers = [part.reader for part in (images, videos)]
        strict = next((r for r in readers if r != MediaReader()), MediaReader())
        self._keep(core=core, image_processor=images, video_processor=videos)
        self.reader = strict

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.settable:
            raise AttributeError(
                f"{type(self).__name__} has no attribute {name!r} to set; allowed: "
                f"{', '.join(self.settable)}"
            )
        classes = {"image_processor": self.image_class, "video_processor": self.video_class}
        if name in classes:
            wanted = classes[name]
            if wanted is None:
                raise AttributeError(f"{type(self).__name__} has no {name} that can be replaced")
            if not isinstance(value, wanted):
                raise InvalidArgument(
                    f"{name} is a {type(value).__name__}; give a {wanted.__name__} of vidlm"
                )
            if value.reader == MediaReader():
                value.reader = self.reader
        super().__setattr__(name, value)

    @classmethod
    def from_pretrained(cls, name: str | Path, **kwargs: Any) -> Self:
        """Read the processor files of a folder or hub repository; TypeError on unknown keywords.

        `media` is the MediaReader that reads whatever names a source.
        """
        reader = kwargs.pop("media", None)
        made = cls.of(cls.family.processor.from_folder(find(name, **cls.location(kwargs))))
        if reader is not None:
            made.reader = reader
        return made

    @staticmethod
    def location(kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The keywords of from_pretrained that say where files are; TypeError on unknown ones."""
        for key in kwargs:
            if key not in (*LOCATION, *ACCEPTED):
                raise unknown_keyword("from_pretrained()", key, (*LOCATION, "media"))
        return {key: kwargs[key] for key in LOCATION if kwargs.get(key) is not None}

    @property
    def reader(self) -> MediaReader:
        """What reads paths and URLs, in messages and in arguments."""
        return self._reader

    @reader.setter
    def reader(self, reader: MediaReader) -> None:
        if not isinstance(reader, MediaReader):
            raise InvalidArgument(f"a {type(reader).__name__} is no MediaReader")
        self._keep(_reader=reader)
        for part in (self.image_processor, self.video_processor):
            if hasattr(part, "reader"):
                part.reader = reader

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer, chat template, preprocessor_config.json and processor_config.json."""
        self._adjusted({}, {}).save(make_folder(folder))

    @property
    def tokenizer(self) -> Tokenizer:
        tokenizer: Tokenizer = self.core.tokenizer
        return tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Tokenizer) -> None:
        if not isinstance(tokenizer, Tokenizer):
            raise InvalidArgument(
                f"tokenizer is a {type(tokenizer).__name__}; give one of vidlm.AutoTokenizer"
            )
        self.core.tokenizer = tokenizer

    @property
    def chat_template(self) -> str | None:
        return self.tokenizer.chat_template

    @chat_template.setter
    def chat_template(self, template: str | None) -> None:
        self.tokenizer.chat_template = template

    @property
    def sampling(self) -> Mapping[str, Any]:
        """Which frames of a video to take unless told, as load_video's keywords: what was set on
        the video processor, over the family's rule."""
        own: Mapping[str, Any] | None = getattr(self.core, "sampling", None)
        rule = self.family.sampling if own is None else own
        words = {} if self.video_class is None else self.video_class.defaults
        changed = {
            name: getattr(self.video_processor, name)
            for name in SAMPLING
            if name in words and getattr(self.video_processor, name) != words[name]
        }
        return FrameOptions(**changed).over(rule) if changed else rule

    @property
    def image_token(self) -> str:
        return str(self.core.image_token)

    @property
    def image_token_id(self) -> int:
        return self.placeholder(self.image_token)

    @property
    def video_token(self) -> str | None:
        """What stands for a video in a text; None where a video is its frames as images."""
        return None if self.core.video_token is None else str(self.core.video_token)

    @property
    def video_token_id(self) -> int | None:
        token = self.video_token
        return None if token is None else self.placeholder(token)

    def _adjusted(
        self, images: Mapping[str, Any], videos: Mapping[str, Any], call: bool = False
    ) -> Any:
        """The core with the words of the image and video processor, and those of one call."""
        core = copy(self.core)
        if self.image_class is not None:
            core.image_pixels = _core(self.image_processor.changed(images), call)
        if self.video_class is not None:
            core.video_pixels = _core(self.video_processor.changed(videos), call)
        return core

    def placeholder(self, token: str) -> int:
        """The id of an image's or a video's token."""
        id = self.tokenizer.convert_tokens_to_ids(token)
        assert id is not None  # the family's processor has looked
        return id


def _core(pixels: PixelProcessor, call: bool) -> Any:
    """What the words say; of a call, which makes what models take, also whether they can."""
    if call and pixels.data_format == LAST:
        raise InvalidArgument(
            f"data_format={LAST!r}: models take channels first; leave it out, or call "
            f"{type(pixels).__name__} by itself"
        )
    core: Any = pixels.core  # type: ignore[attr-defined]  # image and video processors have one
    return core
