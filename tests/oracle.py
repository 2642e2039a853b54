"""transformers 5.23 as the oracle: the checkpoints of `tiny`, written, rewritten and read by it."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import tiny
import torchvision_on_cpu  # noqa: F401  (before transformers, which imports torchvision)
from tiny import Form

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what other libraries deprecate while they are imported
    import transformers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def network(form: Form, seed: int = tiny.SEED) -> transformers.LlavaForConditionalGeneration:
    """A model in float32 with random weights."""
    config = transformers.LlavaConfig(**form.config)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    tiny.randomise(model, seed)
    return model


def write(folder: Path, form: Form) -> Path:
    """A whole checkpoint as transformers 5 writes it (layout C)."""
    network(form).save_pretrained(folder)
    tiny.write_processor(folder, form)
    return folder


# From names as transformers 5 writes them (C) to the layouts of other versions.
LAYOUTS: dict[str, tuple[tuple[str, str], ...]] = {
    "A": ((r"^vision_tower\.", "vision_tower.vision_model."),),
    "B": (
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^language_model\.model\.", "model.language_model."),
        (r"^vision_tower\.", "model.vision_tower.vision_model."),
        (r"^multi_modal_projector\.", "model.multi_modal_projector."),
    ),
    "C": (),
    "D": (
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^language_model\.model\.", "model.language_model."),
        (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
    ),
}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def relayout(folder: Path, layout: str) -> dict[str, torch.Tensor]:
    """The weights of a folder that `write` made, under the names of another layout."""
    renamed = {}
    for stored, tensor in weights(folder).items():
        name = stored
        for pattern, replacement in LAYOUTS[layout]:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def store(folder: Path, tensors: Mapping[str, torch.Tensor], shards: int = 1) -> Path:
    """Replace the weights of a folder, in one file or in several with an index."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    where = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[number::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def load(folder: Path, **kwargs: Any) -> transformers.LlavaForConditionalGeneration:
    """The oracle's own reading of a folder."""
    kwargs = {"dtype": torch.float32, **kwargs}
    return transformers.LlavaForConditionalGeneration.from_pretrained(folder, **kwargs).eval()


@dataclass(frozen=True)
class Reference:
    """A checkpoint's folder and what the oracle makes of it."""

    folder: Path
    form: Form
    model: transformers.LlavaForConditionalGeneration
    processor: transformers.LlavaProcessor

    @classmethod
    def make(cls, folder: Path, name: str) -> Reference:
        form = tiny.FORMS[name]
        write(folder, form)
        processor = transformers.AutoProcessor.from_pretrained(folder)
        return cls(folder, form, load(folder), processor)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())
