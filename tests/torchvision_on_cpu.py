"""Import this first, and torchvision 0.28.0 imports over a torch without CUDA (test oracle only).

torchvision's wheels bring compiled operators that such a torch cannot load, and its Python code
then stops at two operators without a schema. Resizing, cropping and normalising need neither: they
are plain torch, so declaring the two is enough.
"""

from __future__ import annotations

import torch

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def _declared() -> torch.library.Library | None:
    """The declarations; they last as long as this object does. None where torch has CUDA."""
    if torch.version.cuda is not None:
        return None
    library = torch.library.Library("torchvision", "DEF")
    for schema in SCHEMAS:
        library.define(schema)
    return library


LIBRARY = _declared()
