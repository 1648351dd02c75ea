"""Which task comes when: a function of the seed and a number, so that a resumed run plays what it would have.

Tasks are gone through in an order that is new each time. In a mixed run each environment's tasks have an
order of their own, and the environments take turns by weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from typing import Any

import torch
from datasets import Dataset, DatasetDict

from etude.data.files import load_rows
from etude.environments.mixed import COLUMN
from etude.environments.traits import name_of, parts_of, weights_of
from etude.errors import ConfigError, DataError
from etude.math.counters import fraction, mix, word_of
from etude.math.interleaving import turn
from etude.protocols import Environment

_TASKS = 1  # name of a random stream; `online` has the others of a run

Task = Mapping[str, Any]


class Tasks:
    """The tasks of a run in the order in which they are played, endlessly.

    Args:
        rows: all tasks.
        seed: of their order.
        environment: where it is mixed, the tasks of each of its environments take turns.

    Raises:
        ConfigError: an environment with a weight has no tasks.
    """

    def __init__(self, rows: Sequence[Task], seed: int, environment: Environment | None = None) -> None:
        self.rows = rows
        own: dict[str, list[Task]] = {}
        for row in rows:
            own.setdefault(name_of(environment, row), []).append(row)
        weights = weights_of(environment) or {name: float(len(tasks)) for name, tasks in own.items()}
        names = [name for name in sorted(weights) if weights[name]]
        if without := [name for name in names if name not in own]:
            raise ConfigError(
                f"{without[0]!r} has a weight of {weights[without[0]]} and no tasks in train_dataset; add "
                "some, or set its weight to 0"
            )
        self._decks = [Deck(own[name], seed, name) for name in names]
        self._weights = [weights[name] for name in names]
        self._offsets = [fraction(seed, _TASKS, *_words(name)) for name in names]

    def at(self, number: int) -> Task:
        """The `number`-th task of the run, from 0."""
        which, before = turn(number, self._weights, self._offsets)
        return self._decks[which].at(before)

    def some(self, count: int, stream: int) -> list[Task]:
        """`count` tasks besides: drawn by the random stream, by weight; none twice while there are others."""
        first = mix(stream) >> 34  # from anywhere in the run
        decks = [deck.drawn(stream) for deck in self._decks]
        turns = (turn(first + i, self._weights, self._offsets) for i in range(count))
        return [next(decks[which]) for which, _ in turns]


class Deck:
    """Tasks of one environment, gone through again and again, each time in another order."""

    def __init__(self, tasks: Sequence[Task], seed: int, name: str = "") -> None:
        self.tasks = tasks
        self._seed = seed
        self._words = _words(name)
        self._orders: dict[int, list[int]] = {}

    def at(self, number: int) -> Task:
        epoch, place = divmod(number, len(self.tasks))
        if epoch not in self._orders:
            while len(self._orders) > 1:  # an iteration touches the epochs next to each other
                del self._orders[min(self._orders)]
            self._orders[epoch] = self._shuffled(mix(self._seed, _TASKS, epoch, *self._words))
        return self.tasks[self._orders[epoch][place]]

    def drawn(self, stream: int) -> Iterator[Task]:
        """Endlessly, in an order by `stream`."""
        for place in cycle(self._shuffled(mix(stream, *self._words) if self._words else stream)):
            yield self.tasks[place]

    def _shuffled(self, seed: int) -> list[int]:
        return torch.randperm(len(self.tasks), generator=torch.Generator().manual_seed(seed)).tolist()


def _words(name: str) -> list[int]:
    return [word_of(name)] if name else []


def load_tasks(dataset: Any, environment: Environment | None, what: str) -> list[dict[str, Any]]:
    """The rows of a dataset of tasks; of a mixed environment's, each with its environment's name.

    Args:
        dataset: rows, a `datasets` object, a file, a hub id; in a mixed run these by environment, too.
        what: its name, in errors.

    Raises:
        DataError: it can't be read, or a task can't be played in the environment.
    """
    if dataset is None:
        return []
    names = parts_of(environment)
    if names and isinstance(dataset, Mapping) and not _is_split(dataset, names):
        if unknown := [name for name in dataset if name not in names]:
            raise DataError(
                f"{what} is by environment and has {unknown[0]!r}; expected {' or '.join(map(repr, names))}"
            )
        return [{**row, COLUMN: name} for name, own in dataset.items() for row in _load(own)]
    rows = _load(dataset)
    for place, row in enumerate(rows):
        try:
            name_of(environment, row)
        except DataError as error:
            raise DataError(f"row {place} of {what}: {error}") from error
    return rows


def _is_split(dataset: Mapping[str, Any], names: Mapping[str, Any]) -> bool:
    """Whether it is the splits of one dataset, and not several by environment."""
    return isinstance(dataset, DatasetDict) and not set(dataset) <= set(names)


def _load(dataset: Any) -> list[dict[str, Any]]:
    loaded: Dataset = load_rows(dataset, column="prompt")
    return [dict(row) for row in loaded]
