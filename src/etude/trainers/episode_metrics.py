"""Numbers about a batch of episodes, for curves."""

from __future__ import annotations

from collections.abc import Sequence

from etude.types import Episode, StopReason


def episode_metrics(episodes: Sequence[Episode], success_reward: float) -> dict[str, float]:
    """Means over the episodes that weren't lost to our own failures.

    `success` is the share whose reward reaches `success_reward`; `tool_use` the share that called a tool;
    `user_replies` how often a user was heard, where one was;
    `stop/<reason>` the share that ended for it, `rewards/<name>` each reward where there are several: the sum
    of its values in an episode, without its weight, over the episodes to which it applies.
    """
    played = [episode for episode in episodes if episode.stop is not StopReason.INFRASTRUCTURE]
    count = max(len(played), 1)
    rewards = [episode.reward for episode in played]
    mean = sum(rewards) / count
    calls = [call for episode in played for call in episode.tool_calls]
    metrics = {
        "reward": mean,
        "reward_std": (sum((reward - mean) ** 2 for reward in rewards) / count) ** 0.5,
        "success": sum(reward >= success_reward for reward in rewards) / count,
        "tool_use": sum(bool(episode.tool_calls) for episode in played) / count,
        "tool_errors": sum(call.error is not None for call in calls) / max(len(calls), 1),
        "turns": sum(episode.turns for episode in played) / count,
        "sampled_tokens": sum(sum(episode.sampled) for episode in played) / count,
    }
    if any(episode.replies for episode in played):
        metrics["user_replies"] = sum(len(episode.replies) for episode in played) / count
    totals = [total for episode in played for total in episode.reward_totals.values()]
    names = dict.fromkeys(total.name for total in totals)
    for name in names if len(names) > 1 else ():
        values = [total.value for total in totals if total.name == name and total.value is not None]
        metrics[f"rewards/{name}"] = sum(values) / max(len(values), 1)
    for reason in StopReason:
        share = sum(episode.stop is reason for episode in episodes) / max(len(episodes), 1)
        metrics[f"stop/{reason.value}"] = share
    return metrics
