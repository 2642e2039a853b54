"""Placeholder expansion: one token for an image or video becomes as many as the model reads."""

from __future__ import annotations

from collections.abc import Sequence

from vidlm.errors import InvalidArgument


def expand(ids: Sequence[int], placeholder: int, counts: Sequence[int]) -> list[int]:
    """`ids` with the i-th `placeholder` replaced by counts[i] copies of itself.

    Raises InvalidArgument unless there are as many placeholders as counts, and each is at least 1.
    """
    found = sum(id == placeholder for id in ids)
    if found != len(counts):
        raise InvalidArgument(
            f"the prompt has {found} placeholders (token id {placeholder}) for {len(counts)} media "
            "given; put exactly one placeholder per image or video into the prompt"
        )
    if any(count < 1 for count in counts):
        raise InvalidArgument(
            f"media of {list(counts)} tokens; each image or video needs at least one token"
        )
    remaining = iter(counts)
    expanded: list[int] = []
    for id in ids:
        expanded.extend([id] * next(remaining) if id == placeholder else [id])
    return expanded
