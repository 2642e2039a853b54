"""What a model will need before any of it is loaded: tokens, whether they fit, and memory.

Only config.json and the headers of the weight files are read; no weight is.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch

from vidlm.engine.memory import free_bytes
from vidlm.engine.options import EngineOptions
from vidlm.errors import InvalidArgument
from vidlm.fit import Dtypes, Several, fit_frames, largest, need, size, video_tokens
from vidlm.hf.loading import read_load_options
from vidlm.hf.placement import read_device_map
from vidlm.hub import TensorEntry, read_config, read_safetensors_header, weight_files
from vidlm.models import family_of
from vidlm.models.base import Family
from vidlm.types import SamplingParams
from vidlm.weights import Renames, stored_dtype

ANSWER_TOKENS = SamplingParams().max_new_tokens
PROMPT_TOKENS = 64  # a chat template and a question of a sentence or two, roughly
NOTE = "the working memory of the prefill comes on top"


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
    frame_tokens  of all frames, 1280 x 720 pixels large where their size matters
    most_frames   that leave room in the context for the question and a whole answer
    held_bytes    of the frames until they are answered about: as decoded (as of 1280 x 720
                  pixels), as pixels and as features
    tower_bytes   of the vision tower at work, which the number of frames does not change
    prompt_tokens a rough allowance for the template and the question
    time_tokens   of the text that says when each frame was, at most; 0 where none does
    free_bytes    of memory, if that was asked for, and most_frames_in_memory: how many fit then
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
    frames: int
    frame_tokens: int
    most_frames: int
    max_tokens: int
    held_bytes: int = 0
    tower_bytes: int = 0
    prompt_tokens: int = PROMPT_TOKENS
    time_tokens: int = 0
    free_bytes: int | None = None
    most_frames_in_memory: int | None = None

    @property
    def tokens_per_frame(self) -> float:
        """Exactly, which need not be whole: 20.25 where four frames have 81."""
        return _exact(self.frame_tokens, max(self.frames, 1))

    @property
    def tokens(self) -> int:
        """Frames and their times, question and a whole answer together."""
        times = self.frames * self.time_tokens
        return self.frame_tokens + times + self.prompt_tokens + self.max_tokens

    @property
    def fits(self) -> bool:
        return self.tokens <= self.context

    @property
    def kv_bytes(self) -> int:
        """Keys and values of these tokens; more than the context there cannot be."""
        return self.kv_bytes_per_token * min(self.tokens, self.context)

    @property
    def memory_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.held_bytes + self.tower_bytes

    @property
    def fixed_bytes(self) -> int:
        """What is taken without any frame."""
        text = self.kv_bytes_per_token * (self.prompt_tokens + self.max_tokens)
        return self.weight_bytes + self.tower_bytes + text

    @property
    def kv_bytes_per_frame(self) -> int:
        tokens = self.frame_tokens + self.frames * self.time_tokens
        return self.kv_bytes_per_token * tokens // max(self.frames, 1)

    @property
    def bytes_per_frame(self) -> int:
        """What each of these frames adds to that."""
        return self.kv_bytes_per_frame + self.held_bytes // max(self.frames, 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, what follows from the fields included."""
        derived = (
            *("tokens_per_frame", "tokens", "fits", "kv_bytes", "memory_bytes"),
            *("fixed_bytes", "kv_bytes_per_frame", "bytes_per_frame"),
        )
        return {**asdict(self), **{name: getattr(self, name) for name in derived}, "note": NOTE}

    def __str__(self) -> str:
        rows = {**self._shapes(), **self._account()}
        return "\n".join(f"{name.strip():<8} {row}" for name, row in rows.items())

    def _shapes(self) -> dict[str, str]:
        text, vision = self.text, self.vision
        side = vision.image_size
        sides = f"{side} x {side} pixels" if side else "any size"
        return {
            "family": self.family,
            "text": f"{text.kind}: {text.layers} layers, width {text.width:,}, {text.heads} heads "
            f"({text.kv_heads} for keys and values), vocabulary {text.vocabulary:,}",
            "vision": f"{vision.kind}: {vision.layers} layers, width {vision.width:,}, frames of "
            f"{sides} in patches of {vision.patch}",
            "weights": f"{_count(self.parameters)} parameters, stored as {self.stored_dtype} in "
            f"{size(self.stored_bytes)}",
        }

    def _account(self) -> dict[str, str]:
        most = f"at most {self.most_frames:,} frames"
        verdict = f"yes; {most}" if self.fits else f"no, {self.tokens:,} do not; {most}"
        large = "" if self.vision.image_size else " of 1,280 x 720 pixels"
        times = f", {self.time_tokens} each for their times" if self.time_tokens else ""
        each, keys = size(self.bytes_per_frame), size(self.kv_bytes_per_frame)
        rows = {
            "tokens": f"{self.frames:,} frames{large} x {self.tokens_per_frame:,} = "
            f"{self.frame_tokens:,}{times}, the question about {self.prompt_tokens}, the answer up "
            f"to {self.max_tokens:,}",
            "fits": f"{verdict} in a context of {self.context:,} tokens",
            "memory": f"{size(self.weight_bytes)} of weights as {self.dtype} + "
            f"{size(self.kv_bytes)} of keys and values + {size(self.held_bytes)} of frames, pixels "
            f"and features + {size(self.tower_bytes)} for the vision tower at work = "
            f"{size(self.memory_bytes)};",
            "": NOTE,
            "account": f"{size(self.fixed_bytes)} without a frame and {each} for each of "
            f"{self.frames:,}, of which {keys} are keys and values",
        }
        if self.free_bytes is not None:
            count = f"at most {self.most_frames_in_memory:,} frames fit into it"
            loads = count if self.weight_bytes <= self.free_bytes else "the weights do not fit"
            rows["free"] = f"{size(self.free_bytes)} of memory, here and now; {loads}"
        return rows


@dataclass(frozen=True)
class _Checkpoint:
    """What of a folder is looked at."""

    folder: Path
    asked_dtype: str | None

    @cached_property
    def raw(self) -> dict[str, Any]:
        return read_config(self.folder)

    @cached_property
    def family(self) -> Family:
        return family_of(self.raw)

    @cached_property
    def config(self) -> Any:
        return self.family.config.from_dict(self.raw)

    @cached_property
    def entries(self) -> dict[str, TensorEntry]:
        return _entries(self.folder)

    @cached_property
    def stored(self) -> torch.dtype:
        return stored_dtype(self.folder)

    @cached_property
    def dtype(self) -> torch.dtype:
        return _loaded_dtype(self.asked_dtype, self.config, self.stored)

    @cached_property
    def parameters(self) -> int:
        tied = self.config.text_config.tie_word_embeddings
        return _parameters(self.entries, self.family.renames, tied)

    @property
    def weight_bytes(self) -> int:
        return self.parameters * self.dtype.itemsize

    @property
    def sampling(self) -> dict[str, Any]:
        return dict(self.family.sampling_of(self.config))


def plan(
    folder: Path,
    *,
    frames: int | None = None,
    max_tokens: int = ANSWER_TOKENS,
    dtype: str | None = None,
    memory: int | None = None,
    kv_dtype: str | None = None,
) -> Plan:
    """The plan for a checkpoint's folder; allocates nothing.

    frames  None: as many as the family takes of a video unless told, of a long one
    dtype   None: as `vidlm.load` chooses, what the checkpoint says or is stored in
    memory  free bytes; None: how many frames fit into memory is not said
    kv_dtype    of keys and values, as `EngineOptions` takes it
    Raises ModelError where the folder is no checkpoint that vidlm has a family for.
    """
    if (frames is not None and frames < 0) or max_tokens < 1:
        raise InvalidArgument(
            f"frames={frames}, max_tokens={max_tokens}; give frames from 0 and max_tokens from 1"
        )
    found = _Checkpoint(folder, dtype)
    config, kinds = found.config, Dtypes(found.dtype, EngineOptions(kv_dtype=kv_dtype).kv_dtype)
    if frames is None:
        frames = found.sampling.get("num_frames") or found.sampling["max_frames"]
    other = PROMPT_TOKENS + max_tokens
    wanted = need(config, kinds, frames, other)
    left = None if memory is None else memory - found.weight_bytes
    text, vision = _shapes(config)
    return Plan(
        family=config.model_type,
        text=text,
        vision=vision,
        parameters=found.parameters,
        stored_dtype=_name(found.stored),
        stored_bytes=sum(entry.stop - entry.start for entry in found.entries.values()),
        dtype=_name(found.dtype),
        weight_bytes=found.weight_bytes,
        kv_bytes_per_token=need(config, kinds, 0, 1).kv_bytes,
        context=config.max_context,
        frames=frames,
        frame_tokens=config.video_tokens(frames),
        most_frames=largest(lambda n: video_tokens(config, n) + other <= config.max_context),
        max_tokens=max_tokens,
        held_bytes=wanted.held_bytes,
        tower_bytes=wanted.tower_bytes,
        time_tokens=getattr(config, "time_tokens", 0),
        free_bytes=memory,
        most_frames_in_memory=None
        if left is None
        else largest(lambda n: need(config, kinds, n, other).fits(left)),
    )


def fit(
    folder: Path,
    *,
    frames: int | None = None,
    max_tokens: int = ANSWER_TOKENS,
    prompt_tokens: int = PROMPT_TOKENS,
    context: int | None = None,
    memory: int | None = None,
    dtype: str | None = None,
    videos: int = 1,
) -> int:
    """How many frames of each of so many videos to take, before the model is loaded.

    frames   so many or none; None: as many as fit and as the family's rule may give of a video, to
             be its `max_frames`
    context  tokens; None: the model's
    memory   bytes for the weights and all else; None: does not count
    Raises ContextOverflow or InvalidArgument, naming how many fit, where `frames` do not, and where
    not even one does.
    """
    found = _Checkpoint(folder, dtype)
    config = Several(found.config, videos) if videos > 1 else found.config
    left = None if memory is None else memory - found.weight_bytes
    limit = found.config.max_context if context is None else context
    most = fit_frames(config, found.dtype, prompt_tokens, max_tokens, frames, limit, left)
    return most if frames is not None else min(most, found.sampling.get("max_frames", most))


def free_memory(device: str | None = None) -> int:
    """Bytes free here and now on what `load` takes for a device: one, or all GPUs."""
    return sum(map(free_bytes, read_device_map(device).devices))


def sampling(folder: Path) -> dict[str, Any]:
    """Which frames of a video the folder's family takes unless told, as load_video's keywords."""
    return _Checkpoint(folder, None).sampling


def _shapes(config: Any) -> tuple[TextShape, VisionShape]:
    text, vision = config.text_config, config.vision_config
    return (
        TextShape(
            text.model_type,
            text.num_hidden_layers,
            text.hidden_size,
            text.num_attention_heads,
            text.num_key_value_heads,
            text.vocab_size,
        ),
        VisionShape(
            vision.model_type.removesuffix("_model").removesuffix("_vision"),
            vision.num_hidden_layers,
            vision.hidden_size,
            getattr(vision, "image_size", None),
            vision.patch_size,
        ),
    )


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


def _exact(total: int, count: int) -> float:
    return total // count if total % count == 0 else total / count
