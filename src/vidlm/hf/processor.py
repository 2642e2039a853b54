"""Processors under transformers' names: texts and images in, padded batches of tensors out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from vidlm.errors import InvalidArgument, unknown_keyword
from vidlm.hf.conversation import VIDEO_OPTIONS, Conversation, FrameOptions, read_conversation
from vidlm.hf.features import BatchFeature
from vidlm.hf.loading import find
from vidlm.models.base import Family, Prompt
from vidlm.models.llava import FAMILY as LLAVA
from vidlm.text import Tokenizer, expand, render_chat

LOCATION = ("revision", "local_files_only", "cache_dir", "token")
PADDING = ("padding", "padding_side", "return_tensors")


class ProcessorMixin:
    """What the processors of all families share.

    `core` is the family's own processor: it knows pixels and tokens of one request. This class
    adds batches, padding, chat templates and decoding.
    """

    family: ClassVar[Family]

    def __init__(self, core: Any) -> None:
        self.core = core

    @classmethod
    def from_pretrained(cls, name: str | Path, **kwargs: Any) -> Self:
        """Read the processor files of a folder or hub repository; TypeError on unknown keywords."""
        for key in kwargs:
            if key not in (*LOCATION, "trust_remote_code", "use_fast"):
                raise unknown_keyword("from_pretrained()", key, LOCATION)
        options = {key: kwargs[key] for key in LOCATION if kwargs.get(key) is not None}
        return cls(cls.family.processor.from_folder(find(name, **options)))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer, chat template, preprocessor_config.json and processor_config.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.core.save(folder)

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
    def image_token(self) -> str:
        return str(self.core.image_token)

    @property
    def image_token_id(self) -> int:
        return int(self.core.image_token_id)

    @property
    def image_processor(self) -> Any:
        """Images -> pixels (F, 3, H, W); call it with a list of images."""
        return self.core.preprocess

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        padding: bool | str = False,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        add_special_tokens: bool = True,
    ) -> BatchFeature:
        """Texts with `<image>` where images go -> input_ids, attention_mask (B, L), pixel_values.

        images  one, a flat list in the order of the placeholders, or a list per text
        pixel_values  (F, 3, H, W) of all images of the batch, one behind the other
        Each `<image>` becomes as many tokens as the image has features. Rows are lists without
        return_tensors, and a single text is a batch of one. Raises InvalidArgument
        where placeholders and images differ in number.
        """
        if text is None:
            raise InvalidArgument("the processor needs text; for pixels alone use image_processor")
        texts = [text] if isinstance(text, str) else list(text)
        flat = list(_flat(images))
        pixels = self.core.pixels(flat) if flat else None
        rows = self._expanded(texts, pixels, add_special_tokens)
        features = BatchFeature(
            self.tokenizer.batch(
                rows, padding=padding, padding_side=padding_side, return_tensors=return_tensors
            )
        )
        if pixels is not None:
            features["pixel_values"] = pixels.numpy() if return_tensors == "np" else pixels
        return features

    def _expanded(
        self, texts: Sequence[str], pixels: Tensor | None, add_special_tokens: bool
    ) -> list[list[int]]:
        rows = [self.tokenizer.encode(text, add_special_tokens) for text in texts]
        counts = self.core.tokens_of(pixels) if pixels is not None else []
        places = [row.count(self.image_token_id) for row in rows]
        if sum(places) != len(counts):
            raise InvalidArgument(
                f"the text names {sum(places)} images ({self.image_token}), {len(counts)} were "
                "given; write one placeholder for each image or frame"
            )
        expanded, at = [], 0
        for row, place in zip(rows, places, strict=True):
            expanded.append(expand(row, self.image_token_id, counts[at : at + place]))
            at += place
        return expanded

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
        and end of its own. A video becomes its frames as images.

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
        images = [image for each in read for image in each.images]
        if any(image is None for image in images):
            raise InvalidArgument("an image part names no image; give it an image, url or path key")
        features = self(
            images=images or None,
            text=texts if batched else texts[0],
            add_special_tokens=not self._has_bos(texts[0]),
            **padding,
        )
        return features if return_dict else features["input_ids"]

    def read(self, messages: Sequence[Mapping[str, Any]], options: FrameOptions) -> Conversation:
        """Load the media of one conversation."""
        frames = self.family.default_frames
        return read_conversation(messages, self.core.video_parts, options, frames)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        template: str | None = None,
        **kwargs: Any,
    ) -> str:
        """Messages whose videos are images already -> the prompt's text."""
        return render_chat(
            template or self.chat_template,
            messages,
            add_generation_prompt=add_generation_prompt,
            special_tokens=self.tokenizer.special_tokens_map,
            **kwargs,
        )

    def prompt(self, text: str, images: Sequence[Any]) -> Prompt:
        """One rendered request as the engine takes it."""
        pixels = self.core.pixels(images) if images else None
        (ids,) = self._expanded([text], pixels, add_special_tokens=not self._has_bos(text))
        return Prompt(tuple(ids), tuple(pixels) if pixels is not None else ())

    def decode(self, ids: Any, skip_special_tokens: bool = False, **kwargs: Any) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens, **kwargs)

    def batch_decode(
        self, rows: Any, skip_special_tokens: bool = False, **kwargs: Any
    ) -> list[str]:
        return self.tokenizer.batch_decode(rows, skip_special_tokens, **kwargs)

    def _has_bos(self, text: str) -> bool:
        """Whether a template wrote the BOS token itself: the tokenizer must not add a second."""
        bos = self.tokenizer.bos_token
        return bos is not None and text.startswith(bos)


class LlavaProcessor(ProcessorMixin):
    """LLaVA's processor under transformers' name."""

    family = LLAVA


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
