"""Packed layers in the place of plain ones: while weights are loaded, or before packed ones are."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from vidlm.nn.packed import PackedLinear, Packing
from vidlm.quant.packing import pack
from vidlm.quant.scheme import Scheme, check_skipped


class Packer:
    """Packs each weight of a model on the meta device as it arrives, so that it is never in memory
    with the others: `place` is for `weights.load`, `finish` for what is left then, a head that is
    tied to the embeddings.

    `whole` names parts that the family keeps as they are. Raises InvalidArgument where a name to
    skip is none of the model's.
    """

    def __init__(self, model: nn.Module, scheme: Scheme, whole: Sequence[str] = ()) -> None:
        self._model = model
        self._packings = _packings(model, scheme, whole)

    def place(self, name: str, tensor: Tensor) -> bool:
        """Whether this was the weight of a layer to be packed, which then is in its place."""
        layer, _, leaf = name.rpartition(".")
        if leaf != "weight" or layer not in self._packings:
            return False
        self._pack(layer, tensor)
        return True

    def finish(self) -> None:
        for layer in list(self._packings):
            self._pack(layer, self._model.get_submodule(layer).weight)  # type: ignore[arg-type]

    def _pack(self, layer: str, weight: Tensor) -> None:
        before = self._model.get_submodule(layer)
        made = pack(weight, self._packings.pop(layer))
        made.bias = before.bias  # type: ignore[assignment]
        _swap(self._model, layer, made)


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
