"""Noticing that a model computes with other weights than before, at a few microseconds per look.

Noticed: writes that torch counts (optimizers, `load_state_dict`, `copy_`), `parameter.data = …`, parameters
that come, go or are replaced, and what PEFT does to adapters: switching them on and off, choosing, scaling
and merging them. Not noticed: writes past torch's counters, such as `parameter.data.mul_(…)` or a foreign
kernel's (8-bit optimizers); who does that has to say so.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef


class WeightWatch:
    """Says whether a model's weights have changed since it was last asked.

        with watch:                  # a series of looks, between which no module is replaced
            if watch.changed(): …

    Between the series it holds no parameter, so that replaced weights don't stay in memory.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._parameters: list[nn.Parameter] | None = None
        self._adapters: list[Any] = []
        self._storages: list[StorageWeakRef] = []
        self._seen: object = None
        self.changed()

    def __enter__(self) -> WeightWatch:
        self._parameters = list(self.model.parameters())
        kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        self._adapters = [module for module in self.model.modules() if isinstance(module, kinds)]
        if any(storage.expired() for storage in self._storages):
            self._seen = None  # the address of a tensor that is gone may be another's by now
        return self

    def __exit__(self, *error: object) -> None:
        assert self._parameters is not None
        self._storages = [StorageWeakRef(parameter.untyped_storage()) for parameter in self._parameters]
        self._parameters, self._adapters = None, []

    def changed(self) -> bool:
        if self._parameters is None:
            with self:
                return self.changed()
        before, self._seen = self._seen, self._state()
        return self._seen != before

    def _state(self) -> object:
        assert self._parameters is not None
        return (
            [parameter._version for parameter in self._parameters],
            [parameter.data_ptr() for parameter in self._parameters],
            [_adapter_state(adapter) for adapter in self._adapters],
        )


def _adapter_state(adapter: Any) -> list[Any]:
    """Copies: peft writes into its lists and mappings."""
    own = vars(adapter)
    active, scaling = own.get("_active_adapter", ""), own.get("scaling")
    return [
        own.get("_disable_adapters"),
        active if isinstance(active, str) else [*active],
        [*own.get("merged_adapters", ())],
        {**scaling} if isinstance(scaling, dict) else scaling,
    ]
