"""Conditions: the ways in which the same tasks are put to a model. Clean, or with one noise each."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from etude.data.noise import Noise, as_noise
from etude.environments.traits import parts_of, tools_of
from etude.errors import ConfigError, DataError
from etude.math.counters import mix
from etude.protocols import Environment
from etude.tools.noisy import NoisyTool

CLEAN = "clean"
TOOL_PREFIX = "tool_"

_PROMPTS, _TOOLS = 1, 2  # names of random streams

Task = dict[str, Any]
Noises = Mapping[str, Any] | Sequence[Any]


@dataclass(frozen=True, slots=True)
class Condition:
    """Where a noise is, if there is one.

    Attributes:
        name: in tables and files.
        noise: None for the tasks as they are.
        where: in the tasks' prompts or in the tools' replies.
    """

    name: str = CLEAN
    noise: Noise | None = None
    where: Literal["prompts", "tools"] = "prompts"

    @property
    def bait(self) -> str | None:
        """What an injected instruction asks the model to say."""
        return getattr(self.noise, "bait", None)

    def tasks(self, rows: Sequence[Task], columns: Sequence[str], seed: int) -> list[Task]:
        """The tasks with noise in those of the columns that are texts; by `seed` and a task's place.

        Of messages, the last one of the user's is the text.

        Raises:
            DataError: a task has a text in none of the columns.
        """
        if self.noise is None or self.where != "prompts":
            return list(rows)
        noisy = []
        for place, row in enumerate(rows):
            texts = {name: text for name in columns if (text := _text_of(row.get(name))) is not None}
            if not texts:
                raise DataError(
                    f"task {place} has no text in {' or '.join(map(repr, columns))} to put noise into, only "
                    f"{', '.join(map(repr, row))}; name the columns that hold its text (noise_columns)"
                )
            changed = {name: self.noise(text, mix(seed, _PROMPTS, place)) for name, text in texts.items()}
            noisy.append({**row, **{name: _with_text(row[name], text) for name, text in changed.items()}})
        return noisy

    def environment(self, environment: Environment, seed: int) -> Environment:
        """The environment with noise in its tools' replies: a copy that shares everything else."""
        if self.noise is None or self.where != "tools" or not tools_of(environment):
            return environment
        changed: Any = copy.copy(environment)
        parts = parts_of(environment)
        if parts:
            changed.environments = {name: self.environment(part, seed) for name, part in parts.items()}
            return changed
        changed.tools = {
            name: NoisyTool(tool, self.noise, mix(seed, _TOOLS)) for name, tool in changed.tools.items()
        }
        return changed


def make_conditions(noise: Noises, tool_noise: Noises, has_tools: bool) -> list[Condition]:
    """The clean tasks first, then one condition per noise.

    Args:
        noise, tool_noise: in prompts and in tools' replies; by name, or in a list under their own.

    Raises:
        ConfigError: two have one name, one is no noise, or there are no tools to be noisy.
    """
    if tool_noise and not has_tools:
        raise ConfigError("tool_noise does nothing without tools; leave it out")
    found = [Condition()]
    found += [Condition(name, each, "prompts") for name, each in _named(noise)]
    found += [Condition(TOOL_PREFIX + name, each, "tools") for name, each in _named(tool_noise)]
    names = [condition.name for condition in found]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"two conditions are named {repeated[0]!r}; give noises as {{name: noise}}")
    return found


def _asked(messages: Sequence[Any]) -> int | None:
    """Which message is the user's last, if that is a text."""
    asked = [i for i, m in enumerate(messages) if isinstance(m, Mapping) and m.get("role") == "user"]
    return asked[-1] if asked and isinstance(messages[asked[-1]].get("content"), str) else None


def _text_of(value: Any) -> str | None:
    if isinstance(value, list) and (place := _asked(value)) is not None:
        return str(value[place]["content"])
    return value if isinstance(value, str) else None


def _with_text(value: Any, text: str) -> Any:
    if isinstance(value, str):
        return text
    place = _asked(value)
    return [{**message, "content": text} if i == place else message for i, message in enumerate(value)]


def _named(noises: Noises) -> list[tuple[str, Noise]]:
    if isinstance(noises, str) or not isinstance(noises, Mapping | Sequence):
        raise ConfigError(f"noise is {noises!r}; expected a list of noises, or a mapping from names to them")
    if isinstance(noises, Mapping):
        return [(name, as_noise(noise)) for name, noise in noises.items()]
    return [(noise.name, noise) for noise in map(as_noise, noises)]
