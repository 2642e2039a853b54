"""Text to ids and back: tokenizer, chat template, placeholders, text as it is generated.

tokenizer.py     Tokenizer, after the checkpoint's tokenizer.json
files.py         what the small JSON files around it add: special tokens, the template's text
template.py      render_chat: messages to a prompt, and which variables a template reads
typed.py         mark and encode: what users type is text, never a control token
placeholders.py  expand: one placeholder to as many as the media has tokens
stream.py        Detokenizer and StopStrings, which return only what cannot change any more
"""

from vidlm.text.placeholders import expand
from vidlm.text.stream import Detokenizer, StopStrings
from vidlm.text.template import Marks, marks_generation, render_chat, template_variables
from vidlm.text.tokenizer import Tokenizer

__all__ = [
    "Detokenizer",
    "Marks",
    "StopStrings",
    "Tokenizer",
    "expand",
    "marks_generation",
    "render_chat",
    "template_variables",
]
