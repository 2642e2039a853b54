"""Conversations as the research code writes them: the one template that Slow-Fast uses."""

from __future__ import annotations

from dataclasses import dataclass, field, replace


@dataclass
class Conversation:
    """Turns of a chat; a message that is None is the one to be generated."""

    system: str
    roles: tuple[str, str]
    messages: list[tuple[str, str | None]] = field(default_factory=list)
    sep: str = "<|im_end|>"

    def append_message(self, role: str, message: str | None) -> None:
        """Add a turn of one of `roles`."""
        self.messages.append((role, message))

    def get_prompt(self) -> str:
        """The whole conversation as text."""
        prompt = f"{self.system}{self.sep}\n"
        for role, message in self.messages:
            prompt += f"{role}\n" if message is None else f"{role}\n{message}{self.sep}\n"
        return prompt

    def copy(self) -> Conversation:
        """Another one that begins the same."""
        return replace(self, messages=list(self.messages))


conv_templates = {
    "qwen_1_5": Conversation(
        system="<|im_start|>system\nYou are a helpful assistant.",
        roles=("<|im_start|>user", "<|im_start|>assistant"),
    )
}
