"""A penalty on tool calls that fail, in the turn that made them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from etude.rewards.levels import Level
from etude.rewards.scores import check_weight
from etude.types import Episode


class ToolErrorPenalty:
    """−1 for each failed call of a turn, 0 for a turn whose calls all succeeded, None for one without calls.

    A call fails as `ToolCall.error` says: there is no such tool, its arguments don't fit, it raised or took
    too long.

    Args:
        weight: of the penalties in the episode's reward.
        name: in metrics.
    """

    level: Level = "turn"

    def __init__(self, weight: float = 1.0, name: str = "tool_errors") -> None:
        self.weight = check_weight(weight, name)
        self.name = name

    async def __call__(self, episodes: Sequence[Episode]) -> list[list[float | None]]:
        return [_penalties(episode) for episode in episodes]


def _penalties(episode: Episode) -> list[float | None]:
    calls = Counter(call.turn for call in episode.tool_calls)
    failed = Counter(call.turn for call in episode.tool_calls if call.error is not None)
    return [0.0 - failed[turn] if calls[turn] else None for turn in range(episode.turns)]
