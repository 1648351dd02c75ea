"""The training clock of a learning run: what was learnt by when.

One rule for all sides: at any time a run is worth what the weights of the last iteration that ended by then
are worth. Runs under every side's interpreter: torch and safetensors only, as old as the oldest peer's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.common import Answer, serve


class TimeIsUp(Exception):  # noqa: N818 - not an error
    """Leaves a training loop that has no other way to be ended."""


class Watch:
    """Keeps the weights that a model has at each of the marks.

    Args:
        model: what is trained; its weights are those that get evaluated.
        request: has "marks", seconds, ascending, the last of which ends the run; and "clock": "wall", or
            "cpu" for the process's own time, where a machine has other things to do.
    """

    def __init__(self, model: torch.nn.Module, request: Mapping[str, Any]) -> None:
        self.model = model
        self.marks: list[float] = list(request["marks"])
        self.clock = {"wall": time.perf_counter, "cpu": time.process_time}[request["clock"]]
        self.end = self.marks[-1]
        self._started: float | None = None
        self.kept: dict[float, dict[str, torch.Tensor]] = {}
        self.history: list[dict[str, float]] = []

    def start(self) -> None:
        """Everything is loaded; training begins."""
        self._latest = self._weights()
        self._started = self.clock()

    @property
    def seconds(self) -> float:
        """Since training began."""
        return 0.0 if self._started is None else self.clock() - self._started

    def schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        """The learning rate falls to zero while the time runs out, however many steps that will be."""
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: max(0.0, 1 - self.seconds / self.end))

    def iteration(self, reward: float) -> bool:
        """An iteration has ended, whose episodes had this mean reward. Is the time up?"""
        seconds = self.seconds
        self.history.append({"seconds": seconds, "reward": reward})
        while self.marks and self.marks[0] < seconds:
            self.kept[self.marks.pop(0)] = self._latest
        self._latest = self._weights()
        return not self.marks

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the kept weights, a file for each mark; what a run answers."""
        folder.mkdir(parents=True, exist_ok=True)
        snapshots = {f"{mark:g}": str(folder / f"{mark:g}.safetensors") for mark in self.kept}
        for mark, weights in self.kept.items():
            save_file(weights, snapshots[f"{mark:g}"])
        return {
            "snapshots": snapshots,
            "history": self.history,
            "iterations": len(self.history),
            "seconds": self.history[-1]["seconds"],
        }

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}


def serve_runs(kinds: Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]], *packages: str) -> None:
    """The worker's loop: each request says its "kind" and the "core" it may use."""

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        os.sched_setaffinity(0, {request["core"]})
        return kinds[request["kind"]](request)

    serve(partial(_started, answer, ("torch", "transformers", *packages)))


def _started(answer: Answer, packages: Sequence[str]) -> tuple[dict[str, Any], Answer]:
    versions = {name: version(name) for name in packages}
    return {"versions": versions, "threads": torch.get_num_threads()}, answer
