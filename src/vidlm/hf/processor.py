"""Processors under transformers' names: texts, images and videos in, padded batches out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from vidlm.errors import InvalidArgument
from vidlm.hf.conversation import Conversation, Reading, count_videos, read_conversation
from vidlm.hf.features import BatchFeature
from vidlm.hf.frame_options import FrameOptions
from vidlm.hf.image_input import as_images, read_frame
from vidlm.hf.kwargs import CallOptions
from vidlm.hf.parts import ProcessorParts
from vidlm.hf.templating import ChatOptions
from vidlm.hf.tokens import Piece, Places, Row, Span, TextOptions, encoded, rows_of
from vidlm.hf.video_input import Choice, as_videos
from vidlm.hf.video_processing import read_metadata
from vidlm.models.base import Media, Prompt
from vidlm.text import Marks, render_chat, typed


class ProcessorMixin(ProcessorParts):
    """What the processors of all families share.

    `core` is the family's own processor: it knows pixels and tokens of one request. This class
    adds batches, padding, chat templates and decoding; `collate` is a family's own form of a batch.
    """

    def collate(self, media: Sequence[Media]) -> dict[str, Any]:
        """The media of a batch, images before videos, under the names that `forward` takes."""
        raise NotImplementedError

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

        images, videos  one, a flat list in the order of their placeholders, or a list per text; an
            image is a PIL image, an array, a tensor, a path, a URL or bytes; a video is an array
            (T, H, W, 3), a list of images, a path, a URL or a Video
        padding, padding_side, truncation, max_length, pad_to_multiple_of, return_tensors  as
            transformers' tokenizers take them
        num_frames, fps and the other keywords of load_video  which frames of videos to take; of
            frames that are given as such all are, and of files the family's usual ones, unless
            do_sample_frames says otherwise
        video_metadata  of videos given as frames: a mapping or object each, with fps,
            total_num_frames and frames_indices
        return_metadata  adds "video_metadata", a VideoMetadata for each video
        text_kwargs, images_kwargs, videos_kwargs, common_kwargs  keywords of one kind, or of all;
            words of image_processor and of video_processor among them. Each may also be given by
            itself.

        Each placeholder becomes as many tokens as its media has features. Rows are lists without
        return_tensors, and a single text is a batch of one. Raises TypeError on a keyword it does
        not know, and InvalidArgument where placeholders and media differ in number, or where
        truncation would cut them.
        """
        options = self._options({"add_special_tokens": add_special_tokens, **kwargs})
        texts = _texts(text, images, self.image_token)
        if videos is not None and self.video_token is None:
            raise InvalidArgument(
                f"{type(self).__name__} takes a video as its frames: pass them as images, with one "
                f"{self.image_token} each"
            )
        clips = as_videos(videos, self._choice(options), options.metadata)
        features, _ = self._batch(
            texts, as_images(images, self.reader), [clip.video for clip in clips], options
        )
        if options.return_metadata:
            features["video_metadata"] = [clip.metadata for clip in clips]
        return features

    def _options(self, kwargs: Mapping[str, Any]) -> CallOptions:
        return CallOptions.read(
            f"{type(self).__name__}()", kwargs, self.image_class, self.video_class
        )

    def _choice(self, options: CallOptions, frames_too: bool = False) -> Choice:
        """How videos are read; `frames_too` chooses among frames that are given as such."""
        own, sample = self.video_processor, options.sample
        if sample is None and (frames_too or getattr(own, "do_sample_frames", False)):
            sample = True
        layout = options.videos.get("input_data_format") or getattr(own, "input_data_format", None)
        return Choice(options.frames, self.sampling, sample, self.reader, layout)

    def _batch(
        self,
        texts: Sequence[str],
        images: Sequence[Any],
        videos: Sequence[Any],
        options: CallOptions,
        spans: Sequence[Sequence[Span]] = (),
    ) -> tuple[BatchFeature, list[Row]]:
        """Media that are read -> the batch, and its rows before they are padded."""
        core = self._adjusted(options.images, options.videos, call=True)
        media = core.media(self._frames(images, options), videos)
        rows = self._rows(texts, media, options.text, spans)
        features = BatchFeature(options.text.batch([row.ids for row in rows], self.tokenizer))
        device = options.images.get("device") or options.videos.get("device")
        device = device or getattr(self.image_processor, "device", None)
        for name, value in (self.collate(media) if media else {}).items():
            features[name] = _placed(value, options.tensors, device)
        return features, rows

    def _frames(self, images: Sequence[Any], options: CallOptions) -> list[Any]:
        """Images as the core takes them."""
        if self.image_class is None:
            return list(images)
        words = self.image_processor.changed(options.images)
        if words.do_convert_rgb and words.input_data_format is None:
            return list(images)
        return [read_frame(image, words)[0] for image in images]

    def _rows(
        self,
        texts: Sequence[str],
        media: Sequence[Media],
        options: TextOptions,
        spans: Sequence[Sequence[Span]] = (),
        marks: typed.Marks = typed.NO_MARKS,
    ) -> list[Row]:
        """Each text with every placeholder as often as its media fills it; truncated."""
        places = []
        for kind, token in (("image", self.image_token), ("video", self.video_token)):
            if token is None:
                continue
            written = [self.core.places(item) for item in media if item.kind == kind]
            named = sum(text.count(token) for text in texts)
            if named != len(written):
                raise InvalidArgument(
                    f"the text names {named} {kind}s ({token}), {len(written)} were given; write "
                    f"one placeholder for each {kind}"
                    + (" or frame" if self.video_token is None else "")
                )
            places.append(Places(token, self.placeholder(token), written))
        encode = partial(self.encode, marks=marks)
        return rows_of(texts, places, encode, options, self.tokenizer, spans)

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Messages, or a batch of message lists, to a prompt by the checkpoint's template.

        Content parts: {"type": "text", "text"}, {"type": "image", "image" | "url" | "path"},
        {"type": "video", "video" | "url" | "path"}, the latter also with num_frames, fps, start
        and end of its own.

        Returns the text; with tokenize=True the ids, and with return_dict=True as well everything
        `generate` takes. Media are read where they are needed: with tokenize=True, and for families
        to which a video is its frames as images. Keywords:

        continue_final_message  True: the text ends with the last words of the final message, for
            the model to go on; or the name of another entry of that message
        return_assistant_tokens_mask  adds "assistant_masks", 1 for tokens of what the template has
            between {% generation %} and {% endgeneration %}; goes with return_dict
        tools, documents, and whatever variables the template reads  go to it
        processor_kwargs, and any other keyword  those of the processor's call; TypeError on one
            that it does not know
        """
        chat = ChatOptions.read(chat_template or self.chat_template, add_generation_prompt, kwargs)
        options = self._options(chat.call)
        chat.check(tokenize, return_dict)
        batched = bool(conversation) and not isinstance(conversation[0], Mapping)
        read = self._read(list(conversation) if batched else [conversation], options, tokenize)
        marks = Marks.fresh()
        rendered = [self._rendered(each.messages, chat, marks) for each in read]
        texts = [text for text, _ in rendered]
        if not tokenize:
            return texts if batched else texts[0]
        images, videos = ([m for r in read for m in getattr(r, k)] for k in ("images", "videos"))
        for kind, media in (("image", images), ("video", videos)):
            if any(item is None for item in media):
                raise InvalidArgument(
                    f"a content part of type {kind} names no source; give it a path, url or "
                    f"{kind} key"
                )
        if self._has_bos(texts[0]):
            options = replace(options, text=replace(options.text, add_special_tokens=False))
        spans = [each for _, each in rendered] if chat.masks else ()
        features, rows = self._batch(texts, images, videos, options, spans)
        if chat.masks:
            features["assistant_masks"] = options.text.masks(rows, self.tokenizer, chat.tensors)
        if options.return_metadata:
            features["video_metadata"] = [known for each in read for known in each.metadata]
        return features if return_dict else features["input_ids"]

    def _read(
        self, conversations: Sequence[Any], options: CallOptions, load: bool
    ) -> list[Conversation]:
        """Load the media of several conversations."""
        counts = [count_videos(messages) for messages in conversations]
        told = iter(read_metadata(options.metadata, sum(counts)))
        choice, as_images = self._choice(options), self.video_token is None
        return [
            read_conversation(
                messages, Reading(choice, as_images, load, [next(told) for _ in range(count)])
            )
            for messages, count in zip(conversations, counts, strict=True)
        ]

    def _rendered(
        self, messages: Sequence[Mapping[str, Any]], chat: ChatOptions, marks: Marks
    ) -> tuple[str, list[Span]]:
        """The text of one conversation, and where in it the assistant speaks."""
        text = self.render(
            chat.opened(messages, marks),
            chat.add_generation_prompt,
            template=chat.template,
            marks=marks if chat.masks else None,
            **chat.variables,
        )
        text = chat.closed(text, messages, marks)
        return marks.spans(text) if chat.masks else (text, [])

    def read(self, messages: Sequence[Mapping[str, Any]], options: FrameOptions) -> Conversation:
        """Load the media of one conversation; frames given as such are chosen from too."""
        choice = self._choice(replace(self._options({}), frames=options), frames_too=True)
        return read_conversation(messages, Reading(choice, as_images=self.video_token is None))

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
        core = self._adjusted({}, {}, call=True)
        made: list[Media] = core.media(self._frames(images, self._options({})), videos)
        return made

    def prompt(self, text: str, media: Sequence[Media]) -> Prompt:
        """One rendered request as the engine takes it."""
        options = TextOptions(add_special_tokens=not self._has_bos(text))
        (row,) = self._rows([text], media, options)
        return Prompt(tuple(row.ids), tuple(media))

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]], media: Sequence[Media]) -> Prompt:
        """Messages that users typed, which only name their media, as the engine takes them.

        Control tokens and placeholders in their texts are text: only the template's own act.
        """
        placeholders = filter(None, (self.image_token, self.video_token))
        marked, marks = typed.mark(messages, self.tokenizer, placeholders, self.chat_template)
        text = self.render(marked)
        options = TextOptions(add_special_tokens=not self._has_bos(text))
        (row,) = self._rows([text], media, options, marks=marks)
        return Prompt(tuple(row.ids), tuple(media))

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

    def encode(
        self, text: str, add_special_tokens: bool, marks: typed.Marks = typed.NO_MARKS
    ) -> Piece:
        """Ids of a text, each placeholder in it once; what is marked in it is plain text."""
        if not marks:
            return encoded(self.tokenizer, text, add_special_tokens)
        ids = typed.encode(text, marks, self.tokenizer, add_special_tokens)
        return Piece(ids, [(0, 0)] * len(ids))

    def _has_bos(self, text: str) -> bool:
        """Whether a template wrote the BOS token itself: the tokenizer must not add a second."""
        bos = self.tokenizer.bos_token
        return bos is not None and text.startswith(bos)


def _texts(text: Any, images: Any, token: str) -> list[str]:
    """The texts of a call, whose first argument, images, may have been given a text."""
    first = images[0] if isinstance(images, list | tuple) and images else images
    swapped = isinstance(first, str) and (text is None or token in first)
    hint = "; images come first, processor(images, text)"
    if text is None:
        raise InvalidArgument(
            "the processor needs text; for pixels alone use image_processor or video_processor"
            + (hint if swapped else "")
        )
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, list | tuple) or not all(isinstance(each, str) for each in texts):
        raise InvalidArgument(
            f"text is a {type(text).__name__}; give a text or a list of texts"
            + (hint if isinstance(first, str) else "")
        )
    if swapped:
        raise InvalidArgument(f"the images are a text with {token}{hint}")
    return list(texts)


def _placed(value: Any, tensors: str | None, device: Any) -> Any:
    """What `collate` made, as arrays or on a device where that is asked for."""
    if isinstance(value, list):
        return [_placed(each, tensors, device) for each in value]
    if not isinstance(value, torch.Tensor):
        return value
    return value.numpy() if tensors == "np" else value if device is None else value.to(device)
