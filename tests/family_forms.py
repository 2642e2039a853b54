"""A tiny checkpoint of each family that answers chats, by name."""

from __future__ import annotations

from pathlib import Path

import slowfast_forms
import tiny
import video_forms

FAMILIES = ("llava", "next-vicuna", "video-llava", "videollama3", "slow-fast")
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% else %}VIDEO"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>{% endfor %}assistant:"
)


def write_family(name: str, folder: Path) -> Path:
    if name == "llava":
        return tiny.write(folder)
    if name == "slow-fast":
        return slowfast_forms.write(folder)
    form = video_forms.FORMS[name]
    form.network().save_pretrained(folder)
    video_forms.write_tokenizer(folder)
    form.processor(folder).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("VIDEO", form.video))
    return folder
