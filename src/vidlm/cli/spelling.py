"""The library's messages in the words of the command line: keywords as options, values as typed."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

# What the library calls an option, where it complains about one: "fps=0.0 is not above 0".
OPTIONS: Mapping[str, str] = {
    "frames": "--frames",
    "num_frames": "--frames",
    "max_tokens": "--max-tokens",
    "max_new_tokens": "--max-tokens",
    "top_p": "--top-p",
    "device_map": "--device",
    "quantization_config": "--quantize",
    "kv_dtype": "--kv-dtype",
    **{
        name: f"--{name}"
        for name in (
            *("fps", "start", "end", "sampling", "times", "indices"),
            *("temperature", "seed", "dtype", "quantize", "device", "timeout"),
        )
    },
}
# Ways out that are the library's alone, and what a command line has for them.
WAYS_OUT: Mapping[str, str] = {
    "use FetchPolicy(allow_private=True)": "use --allow-private",
    "raise timeout,": "raise --timeout,",
    ", or raise max_bytes": ", or download it yourself and give its path",
    "with num_frames or max_frames": "with --frames",
    "a smaller fps, or a shorter start..end": "a smaller --fps, or a shorter --start to --end",
    "take a shorter start..end": "give a shorter --start to --end",
    "load fewer (num_frames=64) or give a smaller thumb": "take fewer with --frames 64",
    "give images in a list: load_video([path])": "give a folder of images, or a pattern",
    "read it yourself and give its bytes": "pipe its contents in, and give -",
    "or num_frames without sampling": "or --frames without --sampling",
    ", a torch.device, or a dict of devices by names of parts, such as {'': 'cuda:0'}": "",
    "give its path or bytes": "give its path",
    "give a smaller start": "give a smaller --start",
    "give a later end": "give a later --end",
    "give one, or None": "give one, or leave it out",
    "give start < end, or leave one of them out": "give --start before --end, or leave one out",
    "use num_frames, fps or indices": "use --frames, --fps or --indices",
}


def spelled(said: str, options: Any = None) -> str:
    """A message of the library with its keywords as options, of which `options` has the values as
    they were typed."""
    for words, instead in WAYS_OUT.items():
        said = said.replace(words, instead)
    said = _as_typed(said, options)
    for keyword, option in (
        (r",? or raise Limits\.\w+", ""),
        (r"^max_memory with device_map=None", "--max-memory without --device"),
        (r"(^|\bin )max_memory\b(?:=\{(.*?)\})?", _as_room),
        (r"^(\w+)=", _as_option),
        (r"\b(start|end|sampling|num_frames|fps|indices|times)=('[^']*'|[\w.]+)", _as_given),
        (r"EngineOptions\((\w+)=(?:None|'(\w+)')\)", _as_switch),
        (r"\b(device_map|quantize)='(\w+)'", _as_switch),
        (r"\bwithout quantize\b", "without --quantize"),
        (
            r"\{'(?:num_frames|fps|start|end|sampling|indices|times|max_frames)': [^{}]*\}",
            _as_words,
        ),
        (r"\bthe frames (?=--)", ""),
    ):
        said = re.sub(keyword, option, said)
    return said


def _as_typed(said: str, options: Any) -> str:
    """Moments as they were typed, where the library has them in seconds: "start=750 s"."""
    for name in ("start", "end"):
        typed = getattr(options, name, None)
        if typed is not None:
            words = f"--{name} {typed}".replace("\\", r"\\")
            said = re.sub(rf"\b{name}=[\d.e+-]+ s\b", words, said)
    typed = getattr(options, "times", None)
    if typed is not None:
        said = re.sub(
            r"^times with ([\d.e+-]+) s, which is\b",
            lambda found: f"--times {_typed(found[1], typed)} is",
            said,
        )
    if getattr(options, "indices", None) is not None:
        said = re.sub(r"^indices with ", "--indices ", said)
    return said


def _typed(seconds: str, times: str) -> str:
    """That one of --times which is so many seconds."""
    from vidlm.media.policy import seconds as read

    return next((each for each in times.split(",") if f"{read('times', each):g}" == seconds), times)


def _as_room(keyword: re.Match[str]) -> str:
    """ "max_memory={0: '20GiB', 'cpu': '60GiB'}" as "--max-memory 0=20GiB,cpu=60GiB"."""
    sizes = (keyword[2] or "").replace("'", "").replace(": ", "=").replace(", ", ",")
    return f"{keyword[1]}--max-memory{' ' * bool(sizes)}{sizes}"


def _as_option(keyword: re.Match[str]) -> str:
    name = keyword[1]
    return f"{OPTIONS[name]} " if name in OPTIONS else keyword[0]


def _as_given(keyword: re.Match[str]) -> str:
    """ "sampling='scenes'" inside a sentence as "--sampling scenes"."""
    return f"{OPTIONS[keyword[1]]} {keyword[2].strip(chr(39))}"


def _as_switch(keyword: re.Match[str]) -> str:
    """What a message has a model loaded with: "EngineOptions(kv_dtype='int8')"."""
    name, value = keyword[1], keyword[2] or "auto"
    return f"{OPTIONS[name]} {value}" if name in OPTIONS else keyword[0]


def _as_words(written: re.Match[str]) -> str:
    """ "{'num_frames': 4}" as "--frames 4"."""
    try:
        values = ast.literal_eval(written[0])
    except (ValueError, SyntaxError):
        return written[0]
    said = []
    for name, value in values.items():
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        said.append(f"{OPTIONS[name]} {text}" if name in OPTIONS else f"{name} {text}")
    return " ".join(said)
