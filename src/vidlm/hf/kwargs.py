"""Keywords of a processor's call, sorted by whether they are for texts, images or videos."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from vidlm.errors import InvalidArgument, unknown_keyword
from vidlm.hf.frame_options import VIDEO_OPTIONS, FrameOptions
from vidlm.hf.tokens import TextOptions
from vidlm.hf.words import FOREIGN, PixelProcessor

TEXT, IMAGES, VIDEOS = "text_kwargs", "images_kwargs", "videos_kwargs"
GROUPS = (TEXT, IMAGES, VIDEOS)
TEXT_WORDS = tuple(each.name for each in fields(TextOptions))
FRAME_WORDS = (*VIDEO_OPTIONS, "do_sample_frames", "video_metadata", "return_metadata")
# Keywords that transformers' processors take and these do not, and the values, beside None, that
# ask for nothing.
ABSENT: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "audio_kwargs": ({},),
    "image_seq_length": (),
    "is_split_into_words": (False,),
    "load_audio_from_video": (False,),
    "return_attention_mask": (True,),
    "return_legacy_image_output": (True, False),
    "return_length": (False,),
    "return_mm_token_type_ids": (False,),
    "return_offsets_mapping": (False,),
    "return_overflowing_tokens": (False,),
    "return_special_tokens_mask": (False,),
    "return_text_replacement_offsets": (False,),
    "return_token_type_ids": (False,),
    "sanitize_control_tokens": (False,),
    "stride": (0,),
    "text_pair": (),
    "text_pair_target": (),
    "text_target": (),
    "verbose": (True, False),
}


@dataclass(frozen=True)
class CallOptions:
    """The keywords of one call, sorted.

    text              for the tokenizer
    frames, sample    which frames of videos, and whether to choose at all
    metadata          what is told of videos given as frames
    return_metadata   whether to tell what is known of each video
    images, videos    words of the two pixel processors
    """

    text: TextOptions
    frames: FrameOptions
    sample: bool | None
    metadata: Any
    return_metadata: bool
    images: Mapping[str, Any]
    videos: Mapping[str, Any]

    @classmethod
    def read(
        cls,
        where: str,
        kwargs: Mapping[str, Any],
        image_class: type[PixelProcessor] | None,
        video_class: type[PixelProcessor] | None,
    ) -> CallOptions:
        """Raises TypeError on a keyword that is for none of them."""
        known: dict[str, set[str]] = {TEXT: set(TEXT_WORDS)}
        for group, kind in ((IMAGES, image_class), (VIDEOS, video_class)):
            words = () if kind is None else (*kind.defaults, *kind.ignored, *FOREIGN)
            known[group] = {"return_tensors", *words}
        known[VIDEOS] |= set(FRAME_WORDS)
        groups = merged(where, kwargs, known)
        videos = dict(groups[VIDEOS])
        frames = {name: videos.pop(name) for name in FRAME_WORDS if name in videos}
        return cls(
            TextOptions(**groups[TEXT]),
            FrameOptions(**{name: frames[name] for name in VIDEO_OPTIONS if name in frames}),
            frames.get("do_sample_frames"),
            frames.get("video_metadata"),
            bool(frames.get("return_metadata")),
            groups[IMAGES],
            videos,
        )

    @property
    def tensors(self) -> str | None:
        """As what pixels are returned."""
        own = (group.get("return_tensors") for group in (self.images, self.videos))
        return self.text.return_tensors or next((each for each in own if each is not None), None)


def merged(
    where: str, kwargs: Mapping[str, Any], known: Mapping[str, Collection[str]]
) -> dict[str, dict[str, Any]]:
    """The keywords of a call -> those of each group, by transformers' precedence.

    A keyword by itself goes to every group that knows it; `text_kwargs`, `images_kwargs` and
    `videos_kwargs` hold those of one group; `common_kwargs` give way to both. Raises TypeError on
    one that no group knows, InvalidArgument where one is given both by itself and in a group.
    """
    flat = dict(kwargs)
    common = _group(flat.pop("common_kwargs", None), "common_kwargs")
    own = {group: _group(flat.pop(group, None), group) for group in GROUPS}
    every = {name for names in known.values() for name in names}
    flat = _present(flat, where, {*every, *GROUPS, "common_kwargs"}, every)
    out: dict[str, dict[str, Any]] = {}
    common = _present(common, f"common_kwargs of {where}", every, every)
    for group, names in known.items():
        inner = _present(own[group], f"{group} of {where}", names, names)
        twice = sorted(inner.keys() & flat.keys())
        if twice:
            raise InvalidArgument(
                f"{twice[0]} is given to {where} both by itself and in {group}; give it once"
            )
        out[group] = {
            **{name: value for name, value in common.items() if name in names},
            **{name: value for name, value in flat.items() if name in names},
            **inner,
        }
    return out


def _group(value: Any, name: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InvalidArgument(f"{name}={value!r}; give a dict of keywords")
    return dict(value)


def _present(
    kwargs: Mapping[str, Any], where: str, suggested: Iterable[str], known: Collection[str]
) -> dict[str, Any]:
    """The keywords, without those of transformers that ask for nothing."""
    kept: dict[str, Any] = {}
    for name, value in kwargs.items():
        if name in known:
            kept[name] = value
        elif name not in ABSENT:
            raise unknown_keyword(where, name, suggested)
        elif value is not None and not _asks_nothing(name, value):
            raise InvalidArgument(f"{name}={value!r}: {where} does not do that; leave it out")
    return kept


def _asks_nothing(name: str, value: Any) -> bool:
    return any(type(value) is type(idle) and value == idle for idle in ABSENT[name])
