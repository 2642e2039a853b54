"""What a model will need before any of it is loaded: tokens, whether they fit, and memory.

Only config.json and the headers of the weight files are read; no weight is.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from vidlm.engine.kv import bytes_per_token
from vidlm.errors import InvalidArgument
from vidlm.hf.loading import read_load_options
from vidlm.hub import TensorEntry, read_config, read_safetensors_header, weight_files
from vidlm.models import family_of
from vidlm.types import SamplingParams
from vidlm.weights import Renames, stored_dtype

ANSWER_TOKENS = SamplingParams().max_new_tokens
PROMPT_TOKENS = 64  # a chat template and a question of a sentence or two, roughly
NOTE = "the working memory of the vision tower and of the prefill comes on top"


@dataclass(frozen=True)
class TextShape:
    """The decoder's sizes."""

    kind: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    vocabulary: int


@dataclass(frozen=True)
class VisionShape:
    """The vision tower's sizes; the sides of a frame and of a patch as it sees them, in pixels."""

    kind: str
    layers: int
    width: int
    image_size: int | None  # None: of any size
    patch: int


@dataclass(frozen=True)
class Plan:
    """What `frames` frames, a short question and an answer of `max_tokens` tokens take.

    parameters    those the model uses, a tied head counted once
    stored_bytes  of all tensors in the files, used or not
    dtype         what the weights will be in memory
    tokens_per_frame  of so many frames, 1280 x 720 pixels large where their size matters
    prompt_tokens a rough allowance for the template and the question
    time_tokens   of the text that says when each frame was, at most; 0 where none does
    most          the most frames that fit, where tokens_per_frame depends on how many they are
    """

    family: str
    text: TextShape
    vision: VisionShape
    parameters: int
    stored_dtype: str
    stored_bytes: int
    dtype: str
    weight_bytes: int
    kv_bytes_per_token: int
    context: int
    tokens_per_frame: int
    frames: int
    max_tokens: int
    prompt_tokens: int = PROMPT_TOKENS
    time_tokens: int = 0
    most: int | None = None

    @property
    def frame_tokens(self) -> int:
        return self.frames * self.tokens_per_frame

    @property
    def tokens(self) -> int:
        """Frames and their times, question and a whole answer together."""
        times = self.frames * self.time_tokens
        return self.frame_tokens + times + self.prompt_tokens + self.max_tokens

    @property
    def fits(self) -> bool:
        return self.tokens <= self.context

    @property
    def most_frames(self) -> int:
        """The most frames that leave room for the question and a whole answer."""
        if self.most is not None:
            return self.most
        room = self.context - self.prompt_tokens - self.max_tokens
        return max(room // (self.tokens_per_frame + self.time_tokens), 0)

    @property
    def kv_bytes(self) -> int:
        """Keys and values of these tokens; more than the context there cannot be."""
        return self.kv_bytes_per_token * min(self.tokens, self.context)

    @property
    def memory_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, what follows from the fields included."""
        derived = ("frame_tokens", "tokens", "fits", "most_frames", "kv_bytes", "memory_bytes")
        values = {**asdict(self), **{name: getattr(self, name) for name in derived}, "note": NOTE}
        del values["most"]  # most_frames says it in every case
        return values

    def __str__(self) -> str:
        text, vision = self.text, self.vision
        most = f"at most {self.most_frames:,} frames"
        verdict = f"yes; {most}" if self.fits else f"no, {self.tokens:,} do not; {most}"
        side = vision.image_size
        sides = f"{side} x {side} pixels" if side else "any size"
        large = "" if side else " of 1,280 x 720 pixels"
        times = f", {self.time_tokens} each for their times" if self.time_tokens else ""
        rows = {
            "family": self.family,
            "text": f"{text.kind}: {text.layers} layers, width {text.width:,}, {text.heads} heads "
            f"({text.kv_heads} for keys and values), vocabulary {text.vocabulary:,}",
            "vision": f"{vision.kind}: {vision.layers} layers, width {vision.width:,}, frames of "
            f"{sides} in patches of {vision.patch}",
            "weights": f"{_count(self.parameters)} parameters, stored as {self.stored_dtype} in "
            f"{_size(self.stored_bytes)}",
            "tokens": f"{self.frames:,} frames{large} x {self.tokens_per_frame:,} = "
            f"{self.frame_tokens:,}{times}, the question about {self.prompt_tokens}, the answer up "
            f"to {self.max_tokens:,}",
            "fits": f"{verdict} in a context of {self.context:,} tokens",
            "memory": f"{_size(self.weight_bytes)} of weights as {self.dtype} + "
            f"{_size(self.kv_bytes)} of keys and values = {_size(self.memory_bytes)};",
            "": NOTE,
        }
        return "\n".join(f"{name:<8} {row}" for name, row in rows.items())


def plan(
    folder: Path,
    *,
    frames: int | None = None,
    max_tokens: int = ANSWER_TOKENS,
    dtype: str | None = None,
) -> Plan:
    """The plan for a checkpoint's folder; allocates nothing.

    frames  None: as many as the family takes of a video unless told, of a long one
    dtype   None: as `vidlm.load` chooses, what the checkpoint says or is stored in
    Raises ModelError where the folder is no checkpoint that vidlm has a family for.
    """
    if (frames is not None and frames < 0) or max_tokens < 1:
        raise InvalidArgument(
            f"frames={frames}, max_tokens={max_tokens}; give frames from 0 and max_tokens from 1"
        )
    raw = read_config(folder)
    family = family_of(raw)
    config = family.config.from_dict(raw)
    if frames is None:
        usual = family.sampling_of(config)
        frames = usual.get("num_frames") or usual["max_frames"]
    text, vision = config.text_config, config.vision_config
    entries = _entries(folder)
    stored = stored_dtype(folder)
    loaded = _loaded_dtype(dtype, config, stored)
    parameters = _parameters(entries, family.renames, text.tie_word_embeddings)
    return Plan(
        family=config.model_type,
        text=TextShape(
            text.model_type,
            text.num_hidden_layers,
            text.hidden_size,
            text.num_attention_heads,
            text.num_key_value_heads,
            text.vocab_size,
        ),
        vision=VisionShape(
            vision.model_type.removesuffix("_model").removesuffix("_vision"),
            vision.num_hidden_layers,
            vision.hidden_size,
            getattr(vision, "image_size", None),
            vision.patch_size,
        ),
        parameters=parameters,
        stored_dtype=_name(stored),
        stored_bytes=sum(entry.stop - entry.start for entry in entries.values()),
        dtype=_name(loaded),
        weight_bytes=parameters * loaded.itemsize,
        kv_bytes_per_token=bytes_per_token(
            text.num_hidden_layers, text.num_key_value_heads, text.head_dim, loaded
        ),
        context=config.max_context,
        tokens_per_frame=config.tokens_per_frame(frames),
        frames=frames,
        max_tokens=max_tokens,
        time_tokens=getattr(config, "time_tokens", 0),
        most=_most_frames(config, config.max_context - PROMPT_TOKENS - max_tokens),
    )


def _most_frames(config: Any, room: int) -> int:
    """The most frames whose tokens fit; more frames are smaller ones, or as large."""
    time: int = getattr(config, "time_tokens", 0)
    least = config.tokens_per_frame(max(room, 1)) + time  # there are no more frames than tokens
    counts = range(max(room, 0) // least, 0, -1)
    return next((n for n in counts if n * (config.tokens_per_frame(n) + time) <= room), 0)


def sampling(folder: Path) -> dict[str, Any]:
    """Which frames of a video the folder's family takes unless told, as load_video's keywords."""
    raw = read_config(folder)
    family = family_of(raw)
    return dict(family.sampling_of(family.config.from_dict(raw)))


def _entries(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of a checkpoint, from the headers of its files."""
    where = weight_files(folder)
    headers = {path: read_safetensors_header(path) for path in set(where.values())}
    return {name: headers[path][name] for name, path in where.items()}


def _parameters(entries: dict[str, TensorEntry], renames: Renames, tied: bool) -> int:
    """Numbers in the tensors that the model uses; a tied head may be stored beside its twin."""
    used = {renames.name(name): prod(entry.shape) for name, entry in entries.items()}
    used.pop(None, None)
    heads = [name for name in used if name and name.endswith("lm_head.weight")]
    twins = [name for name in used if name and name.endswith("embed_tokens.weight")]
    if tied and twins:
        for name in heads:
            del used[name]
    return sum(used.values())


def _loaded_dtype(asked: str | None, config: Any, stored: torch.dtype) -> torch.dtype:
    """The dtype that `vidlm.load` would take."""
    named = config.dtype if asked in (None, "auto") else asked
    dtype = read_load_options({"dtype": named}).dtype
    return dtype if isinstance(dtype, torch.dtype) else stored


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.1f} million"


def _size(bytes_: int) -> str:
    return f"{bytes_ / 1e9:.2f} GB" if bytes_ >= 1e9 else f"{bytes_ / 1e6:.1f} MB"
