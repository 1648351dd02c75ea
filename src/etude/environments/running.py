"""`run`, once for every kind of environment that has a sampler: rows of tasks in, scored episodes out.

Not covered: how an episode is played, which is each environment's own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from etude.environments.history import TextHistory, as_responses
from etude.environments.orchestrator import play_episodes
from etude.errors import DataError
from etude.math.counters import mix
from etude.protocols import Sampler
from etude.runtime.loop import run_sync
from etude.types import Episode


class Runs(ABC):
    """An environment that plays with a sampler of its own.

    Attributes:
        next_seed: the seed of the next episode's own random stream.
    """

    next_seed: Callable[[], int]

    @property
    @abstractmethod
    def model(self) -> nn.Module | None:
        """What plays; None where only the sampler knows."""

    @property
    @abstractmethod
    def sampler(self) -> Sampler:
        """The sampler in use."""

    @abstractmethod
    async def play(self, task: Mapping[str, Any], sampler: Sampler, *, seed: int) -> Episode:
        """Play one episode."""

    @abstractmethod
    async def score(self, episodes: Sequence[Episode]) -> None:
        """Append rewards to each episode."""

    def run(
        self, tasks: Sequence[str | Mapping[str, Any]], **columns: Any
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[TextHistory]]:
        """Play all tasks and score them.

        Args:
            tasks: prompts, or rows that have one.
            columns: what the rewards need, such as `answers`: one value per task, or one for all.

        Returns:
            queries [q], responses [r], masks of the responses [r] (1 where the model sampled), rewards
            (scalars) and histories, each a list with one entry per task.
        """
        return as_responses(run_sync(self.run_episodes(tasks, **columns)), self.current_device)

    async def run_episodes(self, tasks: Sequence[str | Mapping[str, Any]], **columns: Any) -> list[Episode]:
        """`run`, for callers that want episodes and have an event loop."""
        rows = task_rows(tasks, columns)
        return await play_episodes(self, rows, self.sampler, [self.next_seed() for _ in rows])

    @property
    def current_device(self) -> torch.device:
        """Where the token tensors that `run` returns live."""
        return torch.device("cpu") if self.model is None else next(self.model.parameters()).device


class Seeds:
    """Seeds of one episode after another.

    Args:
        seed: of all of them; `set_seed` decides it by default.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = torch.initial_seed() if seed is None else seed
        self._given = 0

    def __call__(self) -> int:
        self._given += 1
        return mix(self.seed, self._given)


def task_rows(tasks: Sequence[str | Mapping[str, Any]], columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Task rows with the columns that came beside them: one value per task, or one for all."""
    rows = [{"prompt": task} if isinstance(task, str) else dict(task) for task in tasks]
    if not rows:
        raise DataError("no tasks to run; pass at least one")
    for name, values in columns.items():
        per_task = hasattr(values, "__len__") and not isinstance(values, str | bytes | Mapping)
        if per_task and len(values) != len(rows):
            raise DataError(f"column {name!r} has {len(values)} values for {len(rows)} tasks")
        for i, row in enumerate(rows):
            row[name] = values[i] if per_task else values
    return rows
