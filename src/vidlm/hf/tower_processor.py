"""Processors of the families with a tower of CLIP's kind, whose words count a frame's tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from vidlm.errors import InvalidArgument, unknown_keyword
from vidlm.hf.processor import ProcessorMixin
from vidlm.models.tower import FrameTokens
from vidlm.text import Tokenizer

TOWER_WORDS: Mapping[str, Any] = {
    "patch_size": 14,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
}
STRATEGIES = ("default", "full")


class _FrameWord:
    """A word of processor_config.json by which the placeholders of a frame are counted."""

    def __set_name__(self, owner: type[Any], name: str) -> None:
        self.name = name

    def __get__(self, owner: TowerProcessor | None, kind: type[Any]) -> Any:
        return self if owner is None else getattr(owner.core.frame_tokens, self.name)

    def __set__(self, owner: TowerProcessor, value: Any) -> None:
        owner.core.frame_tokens = replace(
            owner.core.frame_tokens, **{self.name: _frame_word(self.name, value)}
        )


class TowerProcessor(ProcessorMixin):
    """A processor of the families with a tower of CLIP's kind, which can be put together.

    patch_size, vision_feature_select_strategy and num_additional_image_tokens are those that the
    placeholders of a frame are counted by: config.json's unless set.
    """

    settable: ClassVar[tuple[str, ...]] = (*ProcessorMixin.settable, *TOWER_WORDS)
    patch_size = _FrameWord()
    vision_feature_select_strategy = _FrameWord()
    num_additional_image_tokens = _FrameWord()

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
        words = {name: _frame_word(name, value) for name, value in words.items()}
        cores = pixels[0].core, pixels[1].core
        core = self.family.processor(tokenizer, cores, FrameTokens(**words), names)
        self._keep_parts(core, *pixels)


def _frame_word(name: str, value: Any) -> Any:
    """The value. Raises InvalidArgument on one that cannot be meant."""
    if name == "vision_feature_select_strategy":
        if value not in STRATEGIES:
            raise InvalidArgument(f"{name}={value!r}; allowed: {', '.join(STRATEGIES)}")
        return value
    least = 1 if name == "patch_size" else 0
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InvalidArgument(f"{name}={value!r}; give a whole number of at least {least}")
    return value
