"""Random response lengths, as TRL's scripts draw them."""

from __future__ import annotations

import numpy as np

from etude.errors import ConfigError


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
