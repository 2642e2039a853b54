"""The account of a checkpoint, and how many frames fit by it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vidlm.engine.memory import free_bytes
from vidlm.errors import InvalidArgument
from vidlm.fit import Several, fit_frames, largest, need, size, video_tokens
from vidlm.hf.placement import read_device_map
from vidlm.plan.account import ANSWER_TOKENS, PROMPT_TOKENS, Plan, TextShape, VisionShape
from vidlm.plan.checkpoint import Checkpoint, Loading


def plan(
    folder: Path,
    *,
    frames: int | None = None,
    max_tokens: int = ANSWER_TOKENS,
    memory: int | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    kv_dtype: str | None = None,
) -> Plan:
    """The plan for a checkpoint's folder; allocates nothing.

    frames  None: as many as the family takes of a video unless told, of a long one
    memory  free bytes; None: how many frames fit into memory is not said
    dtype, quantize, kv_dtype   as Loading has them; a dtype of None is the one that `vidlm.load`
            chooses, what the checkpoint says or is stored in
    Raises ModelError where the folder is no checkpoint that vidlm has a family for.
    """
    if (frames is not None and frames < 0) or max_tokens < 1:
        raise InvalidArgument(
            f"frames={frames}, max_tokens={max_tokens}; give frames from 0 and max_tokens from 1"
        )
    found = Checkpoint(folder, Loading(dtype=dtype, quantize=quantize, kv_dtype=kv_dtype))
    config, dtypes, weights = found.config, found.dtypes, found.weights
    if frames is None:
        frames = found.sampling.get("num_frames") or found.sampling["max_frames"]
    other = PROMPT_TOKENS + max_tokens
    wanted = need(config, dtypes, frames, other)
    left = None if memory is None else memory - weights.most_bytes
    text, vision = _shapes(config)
    return Plan(
        family=config.model_type,
        text=text,
        vision=vision,
        parameters=weights.parameters,
        stored_dtype=_stored(found),
        stored_bytes=found.stored_bytes,
        dtype=_name(found.dtype),
        weight_bytes=weights.bytes,
        kv_bytes_per_token=need(config, dtypes, 0, 1).kv_bytes,
        context=config.max_context,
        frames=frames,
        frame_tokens=config.video_tokens(frames),
        most_frames=largest(lambda n: video_tokens(config, n) + other <= config.max_context),
        max_tokens=max_tokens,
        held_bytes=wanted.held_bytes,
        work_bytes=wanted.work_bytes,
        time_tokens=getattr(config, "time_tokens", 0),
        scheme=found.scheme,
        unpacked_bytes=weights.unpacked_bytes,
        kv_dtype=dtypes.kv,
        free_bytes=memory,
        most_frames_in_memory=None
        if left is None
        else largest(lambda n: need(config, dtypes, n, other).fits(left)),
    )


def fit(
    folder: Path,
    *,
    frames: int | None = None,
    max_tokens: int = ANSWER_TOKENS,
    prompt_tokens: int = PROMPT_TOKENS,
    context: int | None = None,
    memory: int | None = None,
    videos: int = 1,
    loading: Loading | None = None,
) -> int:
    """How many frames of each of so many videos to take, before the model is loaded.

    frames   so many or none; None: as many as fit and as the family's rule may give of a video, to
             be its `max_frames`
    context  tokens; None: the model's
    memory   bytes for the weights and all else; None: does not count
    loading  None: as `vidlm.load` does it unless told
    Raises ContextOverflow or InvalidArgument, naming how many fit, where `frames` do not, and where
    not even one does; InvalidArgument where the weights do not.
    """
    found = Checkpoint(folder, loading or Loading())
    found.check_room()
    config = Several(found.config, videos) if videos > 1 else found.config
    limit = found.config.max_context if context is None else context
    left = None if memory is None else _left(found, memory)
    most = fit_frames(config, found.dtypes, prompt_tokens, max_tokens, frames, limit, left)
    return most if frames is not None else min(most, found.sampling.get("max_frames", most))


def free_memory(device: str | None = None, max_memory: Mapping[Any, Any] | None = None) -> int:
    """Bytes free here and now on what `load` takes for a device: one, or all GPUs that `max_memory`
    leaves."""
    return sum(map(free_bytes, read_device_map(device, max_memory).devices))


def check_room(folder: Path, loading: Loading) -> None:
    """Raises InvalidArgument where a folder's weights have no room in `loading.max_memory`, or
    UnsupportedModel where packed ones would have to wait on the CPU. What is free does not count.
    """
    Checkpoint(folder, loading).check_room()


def sampling(folder: Path) -> dict[str, Any]:
    """Which frames of a video the folder's family takes unless told, as load_video's keywords."""
    return Checkpoint(folder).sampling


def _left(found: Checkpoint, memory: int) -> int:
    """What the weights leave of it."""
    weights = found.weights
    if weights.most_bytes > memory:
        kind = found.scheme.kind if found.scheme else _name(found.dtype)
        one = f" and {size(weights.unpacked_bytes)} for one layer unpacked" if found.scheme else ""
        raise InvalidArgument(
            f"the weights take {size(weights.bytes)} in {kind}{one}, and {size(memory)} are free; "
            "free some, load them in fewer bits, or take a smaller model"
        )
    return memory - weights.most_bytes


def _stored(found: Checkpoint) -> str:
    stored = _name(found.stored)
    return f"{found.saved.kind} and {stored}" if found.saved else stored


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


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
