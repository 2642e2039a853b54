"""Keywords of `apply_chat_template`, sorted by who takes them; final messages to be continued."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vidlm.errors import InvalidArgument
from vidlm.hf.kwargs import FRAME_WORDS
from vidlm.text import Marks, marks_generation, template_variables

log = logging.getLogger(__name__)

DATA = ("tools", "documents")  # for the template, by names of their own


@dataclass(frozen=True)
class ChatOptions:
    """Keywords of `apply_chat_template`.

    variables  for the template
    call       for the processor
    final      the entry of the final message that the model is to continue; None: it is closed
    masks      whether to return which tokens the assistant generated, and as which `tensors`
    """

    template: str | None
    variables: Mapping[str, Any] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = False
    final: str | None = None
    masks: bool = False
    tensors: str | None = None

    @classmethod
    def read(cls, template: str | None, prompt: bool, kwargs: Mapping[str, Any]) -> ChatOptions:
        """Sort keywords as transformers does: what the template reads goes to the template, and
        anything else to the processor, over what `processor_kwargs` holds."""
        rest = dict(kwargs)
        final = rest.pop("continue_final_message", False) or None
        masks = bool(rest.pop("return_assistant_tokens_mask", False))
        inner = rest.pop("processor_kwargs", None) or {}
        tensors = rest.pop("return_tensors", "auto")
        if not isinstance(inner, Mapping):
            raise InvalidArgument(f"processor_kwargs={inner!r}; give a dict of keywords")
        if final is not None and prompt:
            raise InvalidArgument(
                "continue_final_message and add_generation_prompt exclude each other: the first "
                "leaves the final message open, the second begins a new one"
            )
        if final is not None and masks:
            raise InvalidArgument(
                "continue_final_message and return_assistant_tokens_mask exclude each other"
            )
        read = frozenset() if template is None else template_variables(template)
        variables = _data(rest, read)
        variables |= {name: value for name, value in rest.items() if name in read}
        call = {**inner, **{name: value for name, value in rest.items() if name not in read}}
        if tensors != "auto":
            call["return_tensors"] = tensors
        if masks and template is not None and not marks_generation(template):
            log.warning(
                "return_assistant_tokens_mask: the chat template has no {% generation %}, so no "
                "token counts as the assistant's"
            )
        entry = "content" if final is True else final
        if entry is not None and not isinstance(entry, str):
            raise InvalidArgument(
                f"continue_final_message={final!r}; give True, or the name of the entry to continue"
            )
        masked = None if tensors == "auto" else tensors
        return cls(template, variables, call, prompt, entry, masks, masked)

    def check(self, tokenize: bool, return_dict: bool) -> None:
        """Raise InvalidArgument on keywords that would have no effect on what is returned."""
        if not tokenize:
            asked = {"return_dict": return_dict, "return_assistant_tokens_mask": self.masks}
            given = [name for name, value in {**self.call, **asked}.items() if _acts(name, value)]
            if given:
                raise InvalidArgument(f"{', '.join(given)} need tokenize=True")
        elif self.masks and not return_dict:
            raise InvalidArgument("return_assistant_tokens_mask needs return_dict=True")

    def opened(self, messages: Sequence[Mapping[str, Any]], marks: Marks) -> list[dict[str, Any]]:
        """The messages, with a mark where the text that is to be continued stops."""
        changed = [dict(message) for message in messages]
        if self.final is None:
            return changed
        value = changed[-1].get(self.final) if changed else None
        if value is None:
            raise InvalidArgument(
                f"continue_final_message: the final message has no {self.final!r}; give it one, or "
                "leave the keyword out"
            )
        if self.template is not None and self.final not in self.template:
            raise InvalidArgument(
                f"continue_final_message={self.final!r}: the chat template does not read that entry"
            )
        changed[-1][self.final] = _marked(value, f"{marks.stop} ")
        return changed

    def closed(self, text: str, messages: Sequence[Mapping[str, Any]], marks: Marks) -> str:
        """The rendered text up to the mark; without trailing space where the template trims it."""
        if self.final is None:
            return text
        at = text.rfind(marks.stop)
        if at < 0 or _last_text(messages[-1][self.final]).strip() not in text:
            raise InvalidArgument(
                "continue_final_message: the final message is not in the text that the chat "
                "template makes; it may drop or change it"
            )
        whole = text.startswith(f"{marks.stop} ", at)
        return text[:at] if whole else text[:at].rstrip()


def _acts(name: str, value: Any) -> bool:
    """Whether a keyword asks for something that a text alone does not have."""
    if name in FRAME_WORDS or value is None or value == {}:
        return False
    if name.startswith("do_"):  # a switch, which asks for something when it is off
        return True
    return value is not False and value not in ("do_not_pad", "do_not_truncate")


def _data(rest: dict[str, Any], read: frozenset[str]) -> dict[str, Any]:
    """tools and documents, taken out of the keywords."""
    given = {name: rest.pop(name) for name in DATA if name in rest}
    for name, value in given.items():
        if value is None:
            continue
        if name not in read:
            raise InvalidArgument(f"the chat template reads no {name}; leave them out")
        if not all(isinstance(each, Mapping) for each in value):
            raise InvalidArgument(f"{name} are dicts (of a tool, its JSON schema); got {value!r}")
    return given


def _marked(value: Any, mark: str) -> Any:
    """A text, or the last text among parts, with the mark behind it."""
    if isinstance(value, str):
        return value + mark
    parts = [dict(part) for part in value]
    last = next((part for part in reversed(parts) if "text" in part), None)
    if last is None:
        raise InvalidArgument(
            "continue_final_message: the final message has no text to continue; give it a text part"
        )
    last["text"] = last["text"] + mark
    return parts


def _last_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return str(next(part["text"] for part in reversed(value) if "text" in part))
