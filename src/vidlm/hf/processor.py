"""Processors under transformers' names: texts, images and videos in, padded batches out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch

from vidlm.errors import InvalidArgument, unknown_keyword
from vidlm.hf.conversation import (
    VIDEO_OPTIONS,
    Conversation,
    FrameOptions,
    Reading,
    read_conversation,
)
from vidlm.hf.features import BatchFeature
from vidlm.hf.image_processing import ImageProcessor
from vidlm.hf.loading import find
from vidlm.hf.video_input import Choice, as_videos
from vidlm.hf.video_processing import VideoProcessor
from vidlm.hf.words import ACCEPTED, LOCATION
from vidlm.models.base import Family, Media, Prompt
from vidlm.models.tower import FrameTokens
from vidlm.text import Tokenizer, expand, render_chat
from vidlm.text.typed import Marks, encode, mark

PADDING = ("padding", "padding_side", "return_tensors")
TOWER_WORDS: Mapping[str, Any] = {
    "patch_size": 14,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
}
CALL = ("images_kwargs", "videos_kwargs", "do_sample_frames", "video_metadata")


class ProcessorMixin:
    """What the processors of all families share.

    `core` is the family's own processor: it knows pixels and tokens of one request. This class
    adds batches, padding, chat templates and decoding; `collate` is a family's own form of a batch.
    `image_processor` and `video_processor` may be changed: their words count.
    """

    family: ClassVar[Family]
    image_class: ClassVar[type[ImageProcessor] | None] = None  # None: fixed pixels
    video_class: ClassVar[type[VideoProcessor] | None] = None

    core: Any
    image_processor: Any
    video_processor: Any

    @classmethod
    def of(cls, core: Any) -> Self:
        """A processor around a family's own."""
        made = cls.__new__(cls)
        made.core = core
        made.image_processor, made.video_processor = core.image_pixels, None
        if cls.image_class is not None and cls.video_class is not None:
            made.image_processor = cls.image_class.of(core.image_pixels)
            made.video_processor = cls.video_class.of(core.video_pixels)
        return made

    @classmethod
    def from_pretrained(cls, name: str | Path, **kwargs: Any) -> Self:
        """Read the processor files of a folder or hub repository; TypeError on unknown keywords."""
        return cls.of(cls.family.processor.from_folder(find(name, **cls.location(kwargs))))

    @staticmethod
    def location(kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The keywords of from_pretrained that say where files are; TypeError on unknown ones."""
        for key in kwargs:
            if key not in (*LOCATION, *ACCEPTED):
                raise unknown_keyword("from_pretrained()", key, LOCATION)
        return {key: kwargs[key] for key in LOCATION if kwargs.get(key) is not None}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer, chat template, preprocessor_config.json and processor_config.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._adjusted({}).save(folder)

    def collate(self, media: Sequence[Media]) -> dict[str, Any]:
        """The media of a batch, images before videos, under the names that `forward` takes."""
        raise NotImplementedError

    @property
    def tokenizer(self) -> Tokenizer:
        tokenizer: Tokenizer = self.core.tokenizer
        return tokenizer

    @property
    def chat_template(self) -> str | None:
        return self.tokenizer.chat_template

    @chat_template.setter
    def chat_template(self, template: str | None) -> None:
        self.tokenizer.chat_template = template

    @property
    def sampling(self) -> Mapping[str, Any]:
        """Which frames of a video to take unless told, as load_video's keywords."""
        own: Mapping[str, Any] | None = getattr(self.core, "sampling", None)
        return self.family.sampling if own is None else own

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

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        *,
        add_special_tokens: bool = True,
        **kwargs: Any,
    ) -> BatchFeature:
        """Texts with placeholders where media go -> input_ids, attention_mask (B, L) and pixels.

        images, videos  one, a flat list in the order of their placeholders, or a list per text; a
            video is an array (T, H, W, 3), a list of images, a path, a URL or a Video
        padding, padding_side, return_tensors  as the tokenizer takes them
        num_frames, fps and the other keywords of load_video  which frames of videos to take; of
            frames that are given as such all are, and of files the family's usual ones, unless
            do_sample_frames says otherwise
        video_metadata  of videos given as frames: a mapping or object each, with fps,
            total_num_frames and frames_indices
        images_kwargs, videos_kwargs  words of image_processor and of video_processor for this call;
            either may also be given as they are

        Each placeholder becomes as many tokens as its media has features. Rows are lists without
        return_tensors, and a single text is a batch of one. Raises InvalidArgument where
        placeholders and media differ in number.
        """
        kwargs = {**kwargs.pop("videos_kwargs", {}), **kwargs}
        padding = {key: kwargs.pop(key) for key in PADDING if key in kwargs}
        frames = Choice(
            FrameOptions(**{k: kwargs.pop(k) for k in VIDEO_OPTIONS if k in kwargs}),
            self.sampling,
            kwargs.pop("do_sample_frames", None),
            kwargs.pop("video_metadata", None),
        )
        core = self._adjusted(kwargs)
        if text is None:
            raise InvalidArgument(
                "the processor needs text; for pixels alone use image_processor or video_processor"
            )
        texts = [text] if isinstance(text, str) else list(text)
        if videos is not None and self.video_token is None:
            raise InvalidArgument(
                f"{type(self).__name__} takes a video as its frames: pass them as images, with one "
                f"{self.image_token} each"
            )
        media = core.media(list(_flat(images)), as_videos(videos, frames))
        rows = self._expanded(texts, media, add_special_tokens)
        features = BatchFeature(self.tokenizer.batch(rows, **padding))
        for name, value in (self.collate(media) if media else {}).items():
            numbers = isinstance(value, torch.Tensor) and padding.get("return_tensors") == "np"
            features[name] = value.numpy() if numbers else value
        return features

    def _adjusted(self, kwargs: Mapping[str, Any]) -> Any:
        """The core with the words of the image and video processor, and those of one call."""
        images = dict(kwargs.get("images_kwargs") or {})
        words = {name: value for name, value in kwargs.items() if name != "images_kwargs"}
        kinds = {"image": self.image_class, "video": self.video_class}
        known = {name for kind in kinds.values() if kind is not None for name in kind.defaults}
        for name in words:
            if name not in known:
                names = (*PADDING, *VIDEO_OPTIONS, *CALL, *sorted(known))
                raise unknown_keyword(f"{type(self).__name__}()", name, names)
        if self.image_class is None or self.video_class is None:
            return self.core
        for_images = {k: v for k, v in words.items() if k in self.image_class.defaults}
        for_videos = {k: v for k, v in words.items() if k in self.video_class.defaults}
        core = copy(self.core)
        core.image_pixels = self.image_processor.changed({**for_images, **images}).core
        core.video_pixels = self.video_processor.changed(for_videos).core
        return core

    def _expanded(
        self,
        texts: Sequence[str],
        media: Sequence[Media],
        add_special_tokens: bool,
        marks: Marks | None = None,
    ) -> list[list[int]]:
        """Ids of each text, with every placeholder as often as its media fills it."""
        tokens = {"image": self.image_token}
        if self.video_token is not None:
            tokens["video"] = self.video_token
        written = {kind: [self.core.places(m) for m in media if m.kind == kind] for kind in tokens}
        for kind, token in tokens.items():
            named, given = sum(text.count(token) for text in texts), len(written[kind])
            if named != given:
                raise InvalidArgument(
                    f"the text names {named} {kind}s ({token}), {given} were given; write one "
                    f"placeholder for each {kind}"
                    + (" or frame" if self.video_token is None else "")
                )
        ahead = {token: iter(written[kind]) for kind, token in tokens.items()}
        pattern = re.compile("|".join(map(re.escape, ahead)))
        rows = []
        for text in texts:
            counts: dict[str, list[int]] = {token: [] for token in ahead}

            def place(match: re.Match[str], counts: dict[str, list[int]] = counts) -> str:
                inner, fills = next(ahead[match[0]])
                counts[match[0]] += fills
                return inner

            row = self.encode(pattern.sub(place, text), add_special_tokens, marks or {})
            for token, fills in counts.items():
                row = expand(row, self.placeholder(token), fills)
            rows.append(row)
        return rows

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Messages, or a batch of message lists, to a prompt by the checkpoint's template.

        Content parts: {"type": "text", "text"}, {"type": "image", "image" | "url" | "path"},
        {"type": "video", "video" | "url" | "path"}, the latter also with num_frames, fps, start
        and end of its own.

        Returns the text; with tokenize=True the ids, and with return_dict=True as well everything
        `generate` takes. Keywords: num_frames, fps and the others of load_video for the videos;
        padding, padding_side, return_tensors; anything else goes to the template.
        """
        batched = bool(conversation) and not isinstance(conversation[0], Mapping)
        sampling = FrameOptions(**{k: kwargs.pop(k) for k in VIDEO_OPTIONS if k in kwargs})
        padding = {key: kwargs.pop(key) for key in PADDING if key in kwargs}
        if not tokenize and (return_dict or padding):
            raise InvalidArgument("return_dict, padding and return_tensors need tokenize=True")
        template = chat_template or self.chat_template
        read = [self.read(each, sampling) for each in (conversation if batched else [conversation])]
        texts = [
            self.render(each.messages, add_generation_prompt, template=template, **kwargs)
            for each in read
        ]
        if not tokenize:
            return texts if batched else texts[0]
        images, videos = ([m for r in read for m in getattr(r, k)] for k in ("images", "videos"))
        for kind, media in (("image", images), ("video", videos)):
            if any(item is None for item in media):
                raise InvalidArgument(
                    f"a content part of type {kind} names no source; give it a path, url or "
                    f"{kind} key"
                )
        features = self(
            images=images or None,
            text=texts if batched else texts[0],
            videos=videos or None,
            add_special_tokens=not self._has_bos(texts[0]),
            **padding,
        )
        return features if return_dict else features["input_ids"]

    def read(self, messages: Sequence[Mapping[str, Any]], options: FrameOptions) -> Conversation:
        """Load the media of one conversation."""
        how = Reading(options, self.sampling, as_images=self.video_token is None)
        return read_conversation(messages, how)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        template: str | None = None,
        **kwargs: Any,
    ) -> str:
        """Messages that only name their media, as `read` makes them -> the prompt's text."""
        return render_chat(
            template or self.chat_template,
            messages,
            add_generation_prompt=add_generation_prompt,
            special_tokens=self.tokenizer.special_tokens_map,
            **kwargs,
        )

    def media(self, images: Sequence[Any], videos: Sequence[Any] = ()) -> list[Media]:
        """What `read` gave as models take it, images before videos."""
        made: list[Media] = self._adjusted({}).media(images, videos)
        return made

    def prompt(self, text: str, media: Sequence[Media]) -> Prompt:
        """One rendered request as the engine takes it."""
        (ids,) = self._expanded([text], media, add_special_tokens=not self._has_bos(text))
        return Prompt(tuple(ids), tuple(media))

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]], media: Sequence[Media]) -> Prompt:
        """Messages that users typed, which only name their media, as the engine takes them.

        Control tokens and placeholders in their texts are text: only the template's own act.
        """
        placeholders = filter(None, (self.image_token, self.video_token))
        marked, marks = mark(messages, self.tokenizer, placeholders, self.chat_template)
        text = self.render(marked)
        (ids,) = self._expanded([text], media, not self._has_bos(text), marks)
        return Prompt(tuple(ids), tuple(media))

    def decode(self, ids: Any, skip_special_tokens: bool = False, **kwargs: Any) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens, **kwargs)

    def batch_decode(
        self, rows: Any, skip_special_tokens: bool = False, **kwargs: Any
    ) -> list[str]:
        return self.tokenizer.batch_decode(rows, skip_special_tokens, **kwargs)

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """What `generate` returned, as texts; a single row is a batch of one."""
        one_row = getattr(generated_outputs, "ndim", 2) == 1
        rows = [generated_outputs] if one_row else generated_outputs
        return self.batch_decode(rows, skip_special_tokens, **kwargs)

    def encode(self, text: str, add_special_tokens: bool, marks: Marks) -> list[int]:
        """Ids of a text, each placeholder in it once; what is marked in it is plain text."""
        return encode(text, marks, self.tokenizer, add_special_tokens)

    def placeholder(self, token: str) -> int:
        """The id of an image's or a video's token."""
        id = self.tokenizer.convert_tokens_to_ids(token)
        assert id is not None  # the family's processor has looked
        return id

    def _has_bos(self, text: str) -> bool:
        """Whether a template wrote the BOS token itself: the tokenizer must not add a second."""
        bos = self.tokenizer.bos_token
        return bos is not None and text.startswith(bos)


class TowerProcessor(ProcessorMixin):
    """A processor of the families with a tower of CLIP's kind, which can be put together."""

    def _assemble(
        self, pixels: tuple[Any, Any], tokenizer: Tokenizer, words: Mapping[str, Any]
    ) -> None:
        """Out of an image and a video processor, a tokenizer, and the words of
        processor_config.json."""
        words = dict(words)
        template = words.pop("chat_template", None)
        if template is not None:
            tokenizer.chat_template = template
        names = {name: words.pop(name, None) for name in ("image_token", "video_token")}
        for word in words:
            if word not in TOWER_WORDS:
                raise unknown_keyword(type(self).__name__, word, (*TOWER_WORDS, *names))
        self.image_processor, self.video_processor = pixels
        cores = pixels[0].core, pixels[1].core
        self.core = self.family.processor(tokenizer, cores, FrameTokens(**words), names)


def _flat(images: Any) -> Iterator[Any]:
    """Images of any nesting, in order. An array (H, W, 3) is one image, (F, H, W, 3) are F."""
    if images is None:
        return
    if isinstance(images, np.ndarray | torch.Tensor):
        if images.ndim == 4:
            yield from images
        else:
            yield images
    elif isinstance(images, list | tuple):
        for image in images:
            yield from _flat(image)
    else:
        yield images
