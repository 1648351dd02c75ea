"""Numbers about a batch of episodes, for curves; in a mixed run by environment, too."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from accelerate.utils import gather_object

from etude.environments.mixed import SuccessReward, by_environment, succeeds
from etude.environments.traits import metrics_of
from etude.protocols import Environment
from etude.types import Episode, StopReason

_HOW = ("reward_std", "tool_use", "tool_errors", "turns", "sampled_tokens")  # a model does what it does


class Mean(NamedTuple):
    """A mean, and of how many: several processes' are averaged by that."""

    value: float
    of: int


def episode_metrics(
    episodes: Sequence[Episode], success_reward: SuccessReward, environments: Collection[str] = ()
) -> dict[str, Mean]:
    """Means over the episodes that weren't lost to our own failures.

    `success` is the share whose reward reaches `success_reward`; `tool_use` the share that called a tool;
    `user_replies` how often a user was heard, where one was;
    `stop/<reason>` the share that ended for it, `rewards/<name>` each reward where there are several: the sum
    of its values in an episode, without its weight, over the episodes to which it applies.

    Args:
        environments: names of a mixed run's. The same numbers follow for each of those that were played, as
            `<environment>/success` and so on, there with every reward.
    """
    metrics = _means(episodes, success_reward, fewest_rewards=2)
    for environment, own in by_environment(episodes, environments).items():
        means = _means(own, success_reward, fewest_rewards=1)
        metrics |= {f"{environment}/{name}": mean for name, mean in means.items()}
    return metrics


def measures_by_environment(
    metrics: Mapping[str, float], environments: Collection[str]
) -> dict[str, dict[str, float]]:
    """What a mixed run's metrics say about how good the model is at each.

    That is success and reward, each reward where there are several, and what the environment itself says of
    all its episodes.
    """
    found: dict[str, dict[str, float]] = {name: {} for name in environments}
    for name, number in metrics.items():
        environment, _, rest = name.partition("/")
        if environment in found and rest not in _HOW and not rest.startswith("stop/"):
            found[environment][rest] = number
    for measures in found.values():
        rewards = [name for name in measures if name.startswith("rewards/")]
        if len(rewards) == 1 and measures[rewards[0]] == measures["reward"]:
            del measures[rewards[0]]
    return {name: measures for name, measures in found.items() if measures}


def environment_metrics(environment: Environment, episodes: Sequence[Episode]) -> dict[str, float]:
    """What an environment says about the episodes of all processes together: a corpus's score is no mean."""
    metrics = metrics_of(environment)
    if metrics is None:
        return {}  # nothing need be sent around
    everyone: list[Episode] = gather_object(list(episodes))
    played = [episode for episode in everyone if episode.stop is not StopReason.INFRASTRUCTURE]
    return metrics(played) if played else {}


def _means(
    episodes: Sequence[Episode], success_reward: SuccessReward, fewest_rewards: int
) -> dict[str, Mean]:
    played = [episode for episode in episodes if episode.stop is not StopReason.INFRASTRUCTURE]
    rewards = _mean([episode.reward for episode in played])
    squares = _mean([(episode.reward - rewards.value) ** 2 for episode in played])
    calls = [call for episode in played for call in episode.tool_calls]
    means = {
        "reward": rewards,
        "reward_std": squares._replace(value=squares.value**0.5),
        "success": _mean([succeeds(episode, success_reward) for episode in played]),
        "tool_use": _mean([bool(episode.tool_calls) for episode in played]),
        "tool_errors": _mean([call.error is not None for call in calls]),
        "turns": _mean([episode.turns for episode in played]),
        "sampled_tokens": _mean([sum(episode.sampled) for episode in played]),
    }
    if any(episode.replies for episode in played):
        means["user_replies"] = _mean([len(episode.replies) for episode in played])
    totals = [total for episode in played for total in episode.reward_totals.values()]
    names = dict.fromkeys(total.name for total in totals)
    for name in names if len(names) >= fewest_rewards else ():
        values = [total.value for total in totals if total.name == name and total.value is not None]
        means[f"rewards/{name}"] = _mean(values)
    for reason in StopReason:
        means[f"stop/{reason.value}"] = _mean([episode.stop is reason for episode in episodes])
    return means


def _mean(values: Sequence[float]) -> Mean:
    """0 of nothing, which weighs nothing."""
    return Mean(sum(values) / max(len(values), 1), len(values))
