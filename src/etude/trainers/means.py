"""Metrics as sums and counts, until somebody asks for their means: exact over batches and over processes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor

Sums = Mapping[str, tuple[Tensor | float, Tensor | float]]  # name → sum, and how many it is a sum of


class Means:
    """What was computed since the last time."""

    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}  # [2] each, float64

    def add(self, sums: Sums) -> None:
        for name, pair in sums.items():
            found = torch.stack([torch.as_tensor(x, dtype=torch.float64, device="cpu") for x in pair])
            self._totals[name] = self._totals[name] + found if name in self._totals else found

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over all processes, which have to have added the same names; nothing is left."""
        totals, self._totals = self._totals, {}
        if not totals:
            return {}
        dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
        stacked = torch.stack(list(totals.values())).to(accelerator.device, dtype)
        sums_N2 = accelerator.reduce(stacked, "sum")
        return {
            name: (total / count).item()
            for name, (total, count) in zip(totals, sums_N2, strict=True)
            if count
        }
