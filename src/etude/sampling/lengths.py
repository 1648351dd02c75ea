"""Random lengths: as TRL's scripts draw them, and as an episode draws its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from etude.errors import ConfigError
from etude.math.counters import mix


class LengthSampler:
    """Draws whole numbers from min_value up to, but not including, max_value, from numpy's global state.

    Raises:
        ConfigError: the range is empty.
    """

    def __init__(self, min_value: int, max_value: int) -> None:
        if not 0 <= min_value < max_value:
            raise ConfigError(
                f"lengths from {min_value} up to {max_value}: expected 0 <= min_value < max_value"
            )
        self.min_value = min_value
        self.max_value = max_value

    def __call__(self) -> int:
        return int(np.random.randint(self.min_value, self.max_value))


Lengths: TypeAlias = int | Sequence[int] | LengthSampler


@dataclass(frozen=True, slots=True)
class LengthRange:
    """Lengths from `low` up to, but not including, `high`, drawn from counters and no state."""

    low: int
    high: int

    @classmethod
    def of(cls, lengths: Lengths, name: str) -> LengthRange:
        """A number for always the same, a pair (low, high), or the range of a `LengthSampler`.

        Args:
            name: of the setting, for messages.

        Raises:
            ConfigError: it is none of them, empty, or has a length below 1.
        """
        pair: Any = lengths
        if isinstance(lengths, LengthSampler):
            pair = lengths.min_value, lengths.max_value
        elif type(lengths) is int:
            pair = lengths, lengths + 1
        numbers = isinstance(pair, Sequence) and [type(each) for each in pair] == [int, int]
        if not numbers or not 1 <= pair[0] < pair[1]:
            raise ConfigError(
                f"{name} is {lengths!r}; expected a length of at least 1, or two: from the first up to, but "
                "not including, the second"
            )
        return cls(*pair)

    def draw(self, *words: int) -> int:
        """The length that belongs to these words."""
        return self.low + mix(*words) % (self.high - self.low)
