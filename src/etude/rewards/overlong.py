"""A penalty on episodes whose sampled tokens come close to the limit, or pass it."""

from __future__ import annotations

from collections.abc import Sequence

from etude.errors import ConfigError
from etude.rewards.scores import check_weight
from etude.types import Episode


class OverlongPenalty:
    """0 for an episode of n ≤ max − cache sampled tokens, (max − cache − n) / cache up to max, then −1.

    A reward that is cut to 0 at a length limit punishes good reasoning that happened to be long; one that
    falls off before the limit says why. DAPO's "soft overlong punishment" (Yu et al., 2025, eq. 13), where
    max is the limit on generated tokens and cache a fifth of it.

    Args:
        max_length: sampled tokens of an episode, all its turns together, from which the penalty is whole. Not
            above what sampling allows (`max_new_tokens` in a single turn): it would never be reached.
        cache_length: the last tokens before it, over which the penalty grows.
        weight: of the penalty in the episode's reward.
        name: in metrics.

    Raises:
        ConfigError: not 1 <= cache_length <= max_length, or the weight is no finite number.
    """

    def __init__(
        self, max_length: int, cache_length: int, weight: float = 1.0, name: str = "overlong"
    ) -> None:
        if not 1 <= cache_length <= max_length:
            raise ConfigError(
                f"cache_length is {cache_length} and max_length {max_length}; expected 1 <= cache_length <= "
                "max_length: the penalty grows over the last cache_length tokens before max_length"
            )
        self.max_length, self.cache_length = max_length, cache_length
        self.weight = check_weight(weight, name)
        self.name = name

    async def __call__(self, episodes: Sequence[Episode]) -> list[float | None]:
        free = self.max_length - self.cache_length
        excesses = [max(sum(episode.sampled) - free, 0) for episode in episodes]
        return [-min(excess / self.cache_length, 1.0) if excess else 0.0 for excess in excesses]
