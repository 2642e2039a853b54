"""Helpers of the research code around prompts and names."""

from __future__ import annotations

from typing import Any

import torch

from vidlm.compat.llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from vidlm.errors import InvalidArgument
from vidlm.text import Tokenizer


def tokenizer_image_token(
    prompt: str,
    tokenizer: Tokenizer,
    image_token_index: int = IMAGE_TOKEN_INDEX,
    return_tensors: str | None = None,
) -> Any:
    """Ids of a prompt with `image_token_index` for every "<image>": a list, or with "pt" (L,)."""
    if return_tensors not in (None, "pt"):
        raise InvalidArgument(f"return_tensors={return_tensors!r}; allowed: 'pt', None")
    ids: list[int] = []
    for number, piece in enumerate(prompt.split(DEFAULT_IMAGE_TOKEN)):
        ids += [image_token_index] if number else []
        ids += tokenizer.encode(piece, add_special_tokens=not number) if piece else []
    return torch.tensor(ids, dtype=torch.int64, device="cpu") if return_tensors == "pt" else ids


def get_model_name_from_path(model_path: str) -> str:
    """The last part of a repository's name or a path, with the one before for a checkpoint."""
    parts = model_path.strip("/").split("/")
    return "_".join(parts[-2:]) if parts[-1].startswith("checkpoint-") else parts[-1]
