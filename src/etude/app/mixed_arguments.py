"""Several environments in one run, as a configuration describes them.

    environments:
      calculator: {tools: [calculator], reward: rewards.py:exact, train_dataset: sums.jsonl, weight: 2}
      translation: {environment: translation, train_dataset: pairs.jsonl, weight: 1}

Each has the options of an environment and of its tasks; those that stand beside `environments` are every
one's that doesn't say otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

from etude.app.arguments import EnvironmentArguments, TaskArguments, default_of
from etude.errors import ConfigError

_PARTS = ("train", "eval", "test")


@dataclass
class WeightArguments:
    """How often an environment of several is played."""

    weight: float | None = field(
        default=None,
        metadata={"help": "relative to the others; by default each is played in proportion to its tasks"},
    )


@dataclass(frozen=True)
class MixedPart:
    """One of several environments."""

    tasks: TaskArguments
    episodes: EnvironmentArguments
    weight: float | None


@dataclass
class PlayArguments(EnvironmentArguments):
    """The environment that a model is trained in, or several of them."""

    environments: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "several environments in one run, by name: each a mapping of these options, and perhaps "
            "its own train_dataset, eval_dataset, test_dataset and weight"
        },
    )

    def __post_init__(self) -> None:
        if self.environments:
            self.parts  # noqa: B018 (its mistakes show at once)
        else:
            super().__post_init__()

    @cached_property
    def parts(self) -> dict[str, MixedPart]:
        """The environments by name; none where there is but one.

        Raises:
            ConfigError: what one of them is told is unknown, of the wrong type, or contradicts the rest.
        """
        every = {setting: getattr(self, setting.name) for setting in fields(EnvironmentArguments)}
        shared = {setting.name: value for setting, value in every.items() if value != default_of(setting)}
        return {name: _part(name, given, shared) for name, given in self.environments.items()}

    def check_beside(self, tasks: TaskArguments) -> None:
        """Raises `ConfigError` where there are no tasks to train on, or they are named twice."""
        for part in _PARTS:
            owners = [name for name, each in self.parts.items() if getattr(each.tasks, f"{part}_dataset")]
            if owners and getattr(tasks, f"{part}_dataset") is not None:
                raise ConfigError(
                    f"{part}_dataset is given for all environments, and for {owners[0]}; give one of them"
                )
            if part == "train" and not owners and tasks.train_dataset is None:
                named = " and ".join(f"environments.{name}.train_dataset" for name in self.parts)
                raise ConfigError(
                    "--train_dataset (file, folder or hub id of the training rows) must be given"
                    + f"; or {named}" * bool(named)
                )

    def rows(self, part: str, tasks: TaskArguments) -> Any:
        """The rows of "train", "eval" or "test"; by environment where each has its own."""
        own = {name: each.tasks.rows(part) for name, each in self.parts.items()}
        return {name: rows for name, rows in own.items() if rows is not None} or tasks.rows(part)

    @property
    def weights(self) -> dict[str, float] | None:
        """By environment; None where none has one."""
        return {name: each.weight for name, each in self.parts.items() if each.weight is not None} or None


def _part(name: str, given: Any, shared: Mapping[str, Any]) -> MixedPart:
    from etude.app.options import options_of  # which reads the dataclasses of all commands
    from etude.app.parsing import parse_mapping

    where = f"environments.{name}"
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where} is {given!r}; expected a mapping of its options")
    options = options_of(TaskArguments, EnvironmentArguments, WeightArguments)
    values = parse_mapping(options, given, where)

    def own(cls: type) -> dict[str, Any]:
        return {key: value for key, value in values.items() if options[key].title == cls.__name__}

    try:
        return MixedPart(
            TaskArguments(**own(TaskArguments)),
            EnvironmentArguments(**{**shared, **own(EnvironmentArguments)}),
            WeightArguments(**own(WeightArguments)).weight,
        )
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
