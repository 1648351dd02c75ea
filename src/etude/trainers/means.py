"""Metrics as sums and counts, until somebody asks for their means: exact over batches and over processes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from etude.trainers.episode_metrics import Mean

Sums = Mapping[str, tuple[Tensor | float, Tensor | float]]  # name → sum, and how many it is a sum of


class Means:
    """What was computed since the last time."""

    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}  # [2] each, float64

    def add(self, sums: Sums) -> None:
        numbers = [number for pair in sums.values() for number in pair]
        tensors = [_precise(x.detach()) for x in numbers if isinstance(x, Tensor)]
        fetched = iter(torch.stack(tensors).tolist() if tensors else ())  # one wait for the device, not many
        found_N2 = torch.tensor(
            [next(fetched) if isinstance(x, Tensor) else float(x) for x in numbers], dtype=torch.float64
        ).view(-1, 2)
        for name, found in zip(sums, found_N2, strict=True):
            self._totals[name] = self._totals[name] + found if name in self._totals else found

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over all processes, which have to have added the same names; nothing is left."""
        totals, self._totals = self._totals, {}
        if not totals:
            return {}
        stacked = torch.stack(list(totals.values()))
        if accelerator.device.type == "mps":  # which has no float64
            stacked = stacked.float()
        sums_N2 = accelerator.reduce(stacked.to(accelerator.device), "sum")
        return {
            name: (total / count).item()
            for name, (total, count) in zip(totals, sums_N2, strict=True)
            if count
        }


def _precise(number: Tensor) -> Tensor:
    return number.float() if number.device.type == "mps" else number.double()


def mean_over_processes(metrics: Mapping[str, Mean | float], accelerator: Accelerator) -> dict[str, float]:
    """Mean over the processes that have a metric: one that sampled nothing lacks some.

    What is a mean weighs as much as it is of, other numbers are all alike.
    """
    means = {name: m if isinstance(m, Mean) else Mean(m, 1) for name, m in metrics.items()}
    if accelerator.num_processes == 1:
        return {name: mean.value for name, mean in means.items()}
    totals: dict[str, float] = defaultdict(float)
    weights: dict[str, int] = defaultdict(int)
    for theirs in gather_object([means]):
        for name, mean in theirs.items():
            totals[name] += mean.value * mean.of
            weights[name] += mean.of
    return {name: total / max(weights[name], 1) for name, total in totals.items()}
