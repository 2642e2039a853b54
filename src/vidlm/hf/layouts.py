"""Names of tensors in other layouts, read into a model that is there: state dicts, adapters."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from vidlm.errors import InvalidArgument
from vidlm.models.base import Family, VideoModel
from vidlm.weights import Renames


class LayoutReader(VideoModel):
    """A model whose state dicts may have the names of every layout that checkpoints have had."""

    family: ClassVar[Family]

    @classmethod
    def renames(cls) -> Renames:
        return cls.family.renames

    @property
    def _checkpoint_conversion_mapping(self) -> dict[str, str]:
        """Where PEFT looks up how older releases of transformers named modules."""
        return dict(self.renames().table)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """False: PEFT then leaves the embedding without the hook that checkpointing would need."""
        return False

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Read the names of every layout that checkpoints have had, too."""
        renames, renamed = self.renames(), set()
        for key in [key for key in state_dict if key.startswith(prefix)]:
            name = renames.name(key.removeprefix(prefix))
            if name is not None and f"{prefix}{name}" not in state_dict:
                state_dict[f"{prefix}{name}"] = state_dict.pop(key)
                renamed.add(name)
        if hasattr(self, "peft_config") and not renamed <= dict(self.named_parameters()).keys():
            raise InvalidArgument(
                "this adapter has names of an older release of transformers, and PEFT's "
                "load_adapter would drop its tensors; add the keyword key_mapping="
                "model.get_base_model()._checkpoint_conversion_mapping to the call"
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class WholeModel(LayoutReader):
    """A model whose parts are found on itself too, not only on `model`: transformers had them there
    until release 5, and scripts say `model.multi_modal_projector`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            part = self._parts().get(name)
            if part is None:
                raise
            return part

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module) and name in self._parts():
            setattr(self.model, name, value)
        else:
            super().__setattr__(name, value)

    def _parts(self) -> dict[str, nn.Module | None]:
        body = self.__dict__.get("_modules", {}).get("model")
        return {} if body is None else body._modules
