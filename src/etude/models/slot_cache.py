"""Preallocated keys and values, which the packed attention writes and reads in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from etude.models import hugepages


class SlotCache:
    """Preallocated keys and values: one slot per sequence, for each layer [slots, heads, length, dim].

    Layers allocate when they are first written, since only then are their shapes known. `resize` copies,
    so callers grow in large steps.
    """

    def __init__(self, slots: int, length: int) -> None:
        self.slots = slots
        self.length = length
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def resize(self, slots: int, length: int, kept: Sequence[int]) -> None:
        """Have `slots` slots of `length` tokens; slot i goes on with what slot `kept[i]` held.

        Tensor by tensor, each given up before the next is copied: beside the cache itself, as it was or as
        it becomes, there is never more than one of its tensors.
        """
        if not kept:
            self.layers.clear()
        for index in self.layers:
            for part in (0, 1):
                keys_values = list(self.layers[index])
                keys_values[part] = self._resized(keys_values[part], slots, length, kept)
                self.layers[index] = (keys_values[0], keys_values[1])
        self.slots, self.length = slots, length

    def write(self, layer: int, key: Tensor, value: Tensor, slots_T: Tensor, positions_T: Tensor) -> None:
        """Write `key` and `value` [heads, T, dim] at (slot, position) of each of the T tokens."""
        heads = torch.arange(key.shape[0], device=slots_T.device)
        rows_TH = (slots_T[:, None] * len(heads) + heads) * self.length + positions_T[:, None]
        for cached, new in zip(self.layer(layer, key, value), (key, value), strict=True):
            # By one index over whole rows, which torch copies several times as fast as by two with a gap.
            rows = cached.view(-1, new.shape[-1])
            rows.index_copy_(0, rows_TH.flatten(), new.transpose(0, 1).flatten(0, 1).to(rows.dtype))

    def layer(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's keys and values, for new ones like `key` and `value` [heads, T, dim]."""
        if layer not in self.layers:
            self.layers[layer] = (self._empty(key), self._empty(value))
        return self.layers[layer]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot to another."""
        for layer in self.layers.values():
            for tensor in layer:
                tensor[target, :, :length] = tensor[source, :, :length]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for layer in self.layers.values() for tensor in layer)

    def _empty(self, like: Tensor) -> Tensor:
        return hugepages.zeros(like, self.slots, like.shape[0], self.length, like.shape[-1])

    def _resized(self, tensor: Tensor, slots: int, length: int, kept: Sequence[int]) -> Tensor:
        resized = hugepages.zeros(tensor, slots, tensor.shape[1], length, tensor.shape[3])
        both = min(length, self.length)
        if list(kept) == list(range(len(kept))):  # as where nobody loses a slot: a single copy
            resized[: len(kept), :, :both] = tensor[: len(kept), :, :both]
            return resized
        for new, old in enumerate(kept):
            resized[new, :, :both] = tensor[old, :, :both]
        return resized
