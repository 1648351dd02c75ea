"""Numbers about a batch of episodes, for curves; in a mixed run by environment, too."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from etude.types import Episode, StopReason

SuccessReward = float | Mapping[str, float]  # of every episode, or by environment


def episode_metrics(
    episodes: Sequence[Episode], success_reward: SuccessReward, environments: Collection[str] = ()
) -> dict[str, float]:
    """Means over the episodes that weren't lost to our own failures.

    `success` is the share whose reward reaches `success_reward`; `tool_use` the share that called a tool;
    `user_replies` how often a user was heard, where one was;
    `stop/<reason>` the share that ended for it, `rewards/<name>` each reward where there are several: the sum
    of its values in an episode, without its weight, over the episodes to which it applies.

    Args:
        environments: names of a mixed run's. The same numbers follow for each of those that were played, as
            `<environment>/success` and so on, there with every reward.
    """
    metrics = _metrics(episodes, success_reward, fewest_rewards=2)
    for environment, own in by_environment(episodes, environments).items():
        numbers = _metrics(own, success_reward, fewest_rewards=1)
        metrics |= {f"{environment}/{name}": number for name, number in numbers.items()}
    return metrics


def by_environment(episodes: Sequence[Episode], environments: Collection[str]) -> dict[str, list[Episode]]:
    """The episodes of each of these environments in which some were played."""
    own: dict[str, list[Episode]] = {name: [] for name in environments}
    for episode in episodes if own else ():
        own[episode.environment].append(episode)
    return {name: those for name, those in own.items() if those}


def measures_by_environment(
    metrics: Mapping[str, float], environments: Collection[str]
) -> dict[str, dict[str, float]]:
    """What a mixed run's metrics say about how good the model is at each: success, reward and rewards."""
    found: dict[str, dict[str, float]] = {}
    for name, number in metrics.items():
        environment, _, rest = name.partition("/")
        wanted = rest in ("success", "reward") or rest.startswith("rewards/")
        if environment in environments and wanted:
            found.setdefault(environment, {})[rest] = number
    return found


def _metrics(
    episodes: Sequence[Episode], success_reward: SuccessReward, fewest_rewards: int
) -> dict[str, float]:
    played = [episode for episode in episodes if episode.stop is not StopReason.INFRASTRUCTURE]
    count = max(len(played), 1)
    rewards = [episode.reward for episode in played]
    mean = sum(rewards) / count
    calls = [call for episode in played for call in episode.tool_calls]
    metrics = {
        "reward": mean,
        "reward_std": (sum((reward - mean) ** 2 for reward in rewards) / count) ** 0.5,
        "success": sum(_succeeds(episode, success_reward) for episode in played) / count,
        "tool_use": sum(bool(episode.tool_calls) for episode in played) / count,
        "tool_errors": sum(call.error is not None for call in calls) / max(len(calls), 1),
        "turns": sum(episode.turns for episode in played) / count,
        "sampled_tokens": sum(sum(episode.sampled) for episode in played) / count,
    }
    if any(episode.replies for episode in played):
        metrics["user_replies"] = sum(len(episode.replies) for episode in played) / count
    totals = [total for episode in played for total in episode.reward_totals.values()]
    names = dict.fromkeys(total.name for total in totals)
    for name in names if len(names) >= fewest_rewards else ():
        values = [total.value for total in totals if total.name == name and total.value is not None]
        metrics[f"rewards/{name}"] = sum(values) / max(len(values), 1)
    for reason in StopReason:
        share = sum(episode.stop is reason for episode in episodes) / max(len(episodes), 1)
        metrics[f"stop/{reason.value}"] = share
    return metrics


def _succeeds(episode: Episode, success_reward: SuccessReward) -> bool:
    if isinstance(success_reward, Mapping):
        return episode.reward >= success_reward[episode.environment]
    return episode.reward >= success_reward
