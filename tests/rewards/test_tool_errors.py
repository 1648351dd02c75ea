"""Failed calls are paid for in the turn that made them."""

import asyncio

from etude.protocols import Reward
from etude.rewards.mixture import score_episodes
from etude.rewards.tool_errors import ToolErrorPenalty
from etude.types import Episode, NamedReward, Segment, ToolCall


def calling(*errors_by_turn):
    """An episode whose turns made these calls, then answered."""
    episode = Episode(segments=[Segment("prompt", "p", [0])])
    for turn, errors in enumerate(errors_by_turn):
        episode.segments += [Segment("model", "call", [1, 2], policy_version=0), Segment("tool", "r", [3])]
        episode.tool_calls += [ToolCall("calc", "1+", "r", error=error, turn=turn) for error in errors]
    episode.segments.append(Segment("model", "answer", [4, 5], policy_version=0))
    return episode


def test_one_score_per_turn():
    episodes = [
        calling(["exception"], [None]),
        calling([None, "timeout", "unknown_tool"]),
        calling(),
    ]
    assert asyncio.run(ToolErrorPenalty()(episodes)) == [[-1.0, 0.0, None], [-2.0, None], [None]]


def test_it_sits_at_the_end_of_the_turn_that_called():
    penalty = ToolErrorPenalty(weight=0.1)
    assert isinstance(penalty, Reward)
    failed, silent = calling([None], ["malformed"]), calling()
    asyncio.run(score_episodes([penalty], [failed, silent]))
    assert failed.rewards == [
        NamedReward("tool_errors", 0.0, 0.1, 2),
        NamedReward("tool_errors", -1.0, 0.1, 5),
    ]
    assert silent.rewards == [NamedReward("tool_errors", None, 0.1)]
    assert failed.reward == -0.1
