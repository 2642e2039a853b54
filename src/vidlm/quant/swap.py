"""Packed layers in the place of plain ones: while weights are loaded, or before packed ones are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from vidlm.native import LargePages, PackedWeight
from vidlm.nn.packed import PackedLinear, Packing
from vidlm.quant.packing import pack_rows, room
from vidlm.quant.scheme import Scheme, check_skipped
from vidlm.weights import TakeRows


class Packer:
    """Packs weights of a model on the meta device as their rows arrive, so that not even one is in
    memory whole: `place` is for `weights.load`, `finish` for what is left then, a head that is tied
    to the embeddings.

    `whole` names parts that the family keeps as they are. Raises InvalidArgument where a name to
    skip is none of the model's.
    """

    def __init__(self, model: nn.Module, scheme: Scheme, whole: Sequence[str] = ()) -> None:
        self._model = model
        self._packings = _packings(model, scheme, whole)
        self._pages = LargePages()

    def place(self, name: str, device: torch.device) -> TakeRows | None:
        """What packs the rows of this parameter, if it is the weight of a layer to be packed."""
        layer, _, leaf = name.rpartition(".")
        if leaf != "weight" or layer not in self._packings:
            return None
        return partial(pack_rows, self._prepared(layer, device))

    def finish(self) -> None:
        for layer in list(self._packings):
            weight = self._model.get_submodule(layer).weight
            assert isinstance(weight, Tensor)
            pack_rows(self._prepared(layer, weight.device), 0, weight)

    def _prepared(self, layer: str, device: torch.device) -> PackedWeight:
        """Codes to be written, of a packed layer that is in this one's place already."""
        before = self._model.get_submodule(layer)
        assert isinstance(before, nn.Linear)
        made = room(before.weight.shape, self._packings.pop(layer), device, self._pages.empty)
        made.bias = before.bias
        _swap(self._model, layer, made)
        return made.packed


def expect(model: nn.Module, scheme: Scheme, whole: Sequence[str] = ()) -> None:
    """Make room in a model on the meta device for weights that were saved packed."""
    for name, packing in _packings(model, scheme, whole).items():
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        _swap(model, name, PackedLinear.empty(layer, packing))


def _packings(model: nn.Module, scheme: Scheme, whole: Sequence[str]) -> dict[str, Packing]:
    layers = [name for name, layer in model.named_modules() if type(layer) is nn.Linear]
    check_skipped(scheme.skip, layers, "modules_to_not_convert")
    kept = Scheme(scheme.kind, scheme.group, scheme.head, (*scheme.skip, *whole))
    found = {name: kept.packing(name) for name in layers}
    return {name: packing for name, packing in found.items() if packing is not None}


def _swap(model: nn.Module, name: str, made: nn.Module) -> None:
    outer, _, last = name.rpartition(".")
    setattr(model.get_submodule(outer), last, made)
