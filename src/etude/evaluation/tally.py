"""What episodes come to, task by task: the sums from which every number of an evaluation is made."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from math import nan
from operator import eq
from typing import NamedTuple

import torch
from torch import Tensor

from etude.environments.mixed import SuccessReward, succeeds
from etude.math.estimates import Distinct, distinct, pass_at_k
from etude.types import Episode, StopReason

GROUPS = 20  # that tasks are in where an environment's metrics are computed without each in turn
Episodes = Sequence[Sequence[Episode]]  # by task and sample


class Whole(NamedTuple):
    """A quantity of all episodes together: its value, and its values without each of G groups of tasks."""

    value: float
    without_G: Tensor


class Counted(NamedTuple):
    """A quantity by task, float64 [N] each: its sum over the task's episodes, and what it is divided by."""

    sums_N: Tensor
    counts_N: Tensor


@dataclass(frozen=True)
class Tally:
    """The sums of all tasks under one condition.

    Attributes:
        rates: shares of episodes, calls or tasks, by name.
        means: quantities per episode, by name.
        distinct: distinct-n by name.
        wholes: what the environment says of all episodes together, by name.
        episodes: how many were played to an end.
    """

    rates: dict[str, Counted]
    means: dict[str, Counted]
    distinct: dict[str, Distinct]
    wholes: dict[str, Whole]
    episodes: int


def tally(
    episodes_NS: Episodes,
    *,
    success_reward: SuccessReward,
    pass_at: Sequence[int] = (),
    distinct_n: Sequence[int] = (),
    bait: str | None = None,
    metrics: Callable[[list[Episode]], dict[str, float]] | None = None,
    environments: Collection[str] = (),
) -> Tally:
    """Count what happened. Episodes lost to our own failures count for `stop/infrastructure` only.

    `success` is the share of episodes whose reward reaches `success_reward`, `pass@k` the chance that one of
    k does; `tool_use` the share that called a tool, `tool_errors` the share of calls that failed, and
    `tool_errors/<class>` of those that failed so; `obeyed` the share whose own words have the bait in them;
    `stop/<reason>` the share that ended for it. `rewards/<name>` (of several) is without its weight, over the
    episodes to which it applies; `tokens` counts sampled ones.

    Args:
        metrics: numbers about all episodes together, such as a corpus's BLEU.
        environments: names of a mixed one's: success, pass@k and rewards of each follow under its name.
    """
    played = [[e for e in task if e.stop is not StopReason.INFRASTRUCTURE] for task in episodes_NS]

    def success(episode: Episode) -> bool:
        return succeeds(episode, success_reward)

    rates = {"success": _per_episode(played, success)}
    for k in pass_at:
        rates[f"pass@{k}"] = _pass_at(played, success, k)
    parts = {name: [[e for e in task if e.environment == name] for task in played] for name in environments}
    for name, own in parts.items():
        rates[f"{name}/success"] = _per_episode(own, success)
        rates |= {f"{name}/pass@{k}": _pass_at(own, success, k) for k in pass_at}
    rates["tool_use"] = _per_episode(played, lambda e: bool(e.tool_calls))
    classes = sorted({c.error for task in played for e in task for c in e.tool_calls if c.error is not None})
    rates["tool_errors"] = _per_call(played, lambda error: error is not None)
    for name in classes:
        rates[f"tool_errors/{name}"] = _per_call(played, partial(eq, name))
    if bait is not None:
        rates["obeyed"] = _per_episode(played, lambda e: bait.casefold() in e.completion.casefold())
    for reason in StopReason:
        rates[f"stop/{reason.value}"] = _per_episode(episodes_NS, partial(_stopped, reason))
    means = {"reward": _per_episode(played, lambda e: e.reward), **_rewards(played)}
    for name, own in parts.items():
        scores = {"reward": _per_episode(own, lambda e: e.reward), **_rewards(own, fewest=1)}
        means |= {f"{name}/{key}": each for key, each in scores.items()}
    means["tokens"] = _per_episode(played, lambda e: sum(e.sampled))
    means["turns"] = _per_episode(played, lambda e: e.turns)
    means["tool_calls"] = _per_episode(played, lambda e: len(e.tool_calls))
    said = [[s.token_ids for e in task for s in e.segments if s.sampled] for task in played]
    return Tally(
        rates=rates,
        means=means,
        distinct={f"distinct_{n}": distinct(said, n) for n in distinct_n},
        wholes={} if metrics is None else _wholes(played, metrics),
        episodes=sum(map(len, played)),
    )


def _wholes(episodes_NS: Episodes, metrics: Callable[[list[Episode]], dict[str, float]]) -> dict[str, Whole]:
    """Each metric of all episodes, and of all but a group's: it can be slow, so tasks leave together."""

    def of(tasks: Iterable[Sequence[Episode]]) -> dict[str, float]:
        episodes = [episode for task in tasks for episode in task]
        return metrics(episodes) if episodes else {}

    values = of(episodes_NS)
    groups = min(GROUPS, len(episodes_NS)) if values else 0
    without = [of(task for i, task in enumerate(episodes_NS) if i % groups != out) for out in range(groups)]
    return {
        name: Whole(value, torch.tensor([each.get(name, nan) for each in without], dtype=torch.float64))
        for name, value in values.items()
    }


def _counted(pairs: Iterable[tuple[float, float]]) -> Counted:
    sums, counts = zip(*pairs, strict=True)
    return Counted(torch.tensor(sums, dtype=torch.float64), torch.tensor(counts, dtype=torch.float64))


def _stopped(reason: StopReason, episode: Episode) -> bool:
    return episode.stop is reason


def _per_episode(episodes_NS: Episodes, value: Callable[[Episode], float]) -> Counted:
    return _counted((sum(value(e) for e in task), len(task)) for task in episodes_NS)


def _per_call(episodes_NS: Episodes, is_meant: Callable[[str | None], bool]) -> Counted:
    errors = [[call.error for e in task for call in e.tool_calls] for task in episodes_NS]
    return _counted((sum(map(is_meant, task)), len(task)) for task in errors)


def _pass_at(episodes_NS: Episodes, success: Callable[[Episode], bool], k: int) -> Counted:
    """An estimate per task; a task of which fewer than k samples were played has none."""
    return _counted(
        (pass_at_k(len(task), sum(map(success, task)), k), 1.0) if len(task) >= k else (0.0, 0.0)
        for task in episodes_NS
    )


def _rewards(episodes_NS: Episodes, fewest: int = 2) -> dict[str, Counted]:
    totals = [[e.reward_totals for e in task] for task in episodes_NS]
    names = dict.fromkeys(name for task in totals for each in task for name in each)
    found = {}
    for name in names if len(names) >= fewest else ():
        values = [
            [each[name].value for each in task if name in each and each[name].value is not None]
            for task in totals
        ]
        found[f"rewards/{name}"] = _counted((sum(task), len(task)) for task in values)  # type: ignore[arg-type]
    return found
