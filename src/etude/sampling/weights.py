"""Noticing that a model computes with other weights than before, at a few microseconds per look.

Noticed: writes that torch counts (optimizers, `load_state_dict`, `copy_`), `parameter.data = …`, parameters
that come, go or are replaced, and what PEFT does to adapters: switching them on and off, choosing, scaling
and merging them. Not noticed: writes past torch's counters, such as `parameter.data.mul_(…)` or a foreign
kernel's (8-bit optimizers); who does that has to say so.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef


class WeightWatch:
    """Says whether a model's weights have changed since it was last asked.

        with watch:                  # a series of looks: what there is to look at is listed once
            if watch.changed(): …

    Between the series it holds no weights, so that replaced ones don't stay in memory.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._watching = False
        self._seen: object = None
        self._storages: list[StorageWeakRef] = []  # of the weights seen last, between the series
        self._children: list[dict[str, nn.Module | None]] = []
        self._tree: list[nn.Module | None] = []
        self._parameters: list[dict[str, nn.Parameter | None]] = []
        self._adapters: list[Any] = []
        self._held: list[torch.UntypedStorage] = []  # while it is held, nothing else gets its address
        self.changed()

    def __enter__(self) -> WeightWatch:
        self._watching = True
        self._list()
        if any(storage.expired() for storage in self._storages):
            self._seen = None  # what is gone may have left its address to something new
        self._held = self._in_use()
        return self

    def __exit__(self, *error: object) -> None:
        self._watching = False
        self._storages = [StorageWeakRef(storage) for storage in self._held]
        self._children, self._tree, self._parameters, self._adapters, self._held = [], [], [], [], []

    def changed(self, closely: bool = True) -> bool:
        """Look once; also for modules that come, go or are replaced, if `closely`."""
        if not self._watching:
            with self:
                return self.changed()
        if closely and self._submodules() != self._tree:
            self._list()
        before, self._seen = self._seen, self._state()
        if self._seen == before:
            return False
        self._held = self._in_use()
        return True

    def _list(self) -> None:
        modules = list(self.model.modules())
        self._children = [module._modules for module in modules if module._modules]
        self._tree = self._submodules()
        self._parameters = [module._parameters for module in modules if module._parameters]
        self._adapters = [m for m in modules if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]

    def _submodules(self) -> list[nn.Module | None]:
        return [child for children in self._children for child in children.values()]

    def _in_use(self) -> list[torch.UntypedStorage]:
        return [p.untyped_storage() for own in self._parameters for p in own.values() if p is not None]

    def _state(self) -> object:
        weights = [
            (p._version, p.data_ptr()) for own in self._parameters for p in own.values() if p is not None
        ]
        return weights, [_adapter_state(adapter) for adapter in self._adapters]


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
