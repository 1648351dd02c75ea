"""`evaluate`: a model plays tasks, clean and under each noise, several times each; what it comes to.

    evaluation = evaluate(environment, tasks, noise=["characters", "injection"], samples=4)
    evaluation.measures["clean"]["success"]        Interval(value=0.81, low=0.77, high=0.84)
    evaluation.minus(before)                       the same tasks by another model, in pairs

Episodes are played as everywhere (`environments.orchestrator`). Random numbers come from counters: noise from
(seed, task), tokens from (seed, task, sample). So two models read the same noisy prompts, and a condition
doesn't depend on which others there are.

Not covered: several processes; files (`record`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from etude.data.files import Rows, load_rows
from etude.environments.mixed import SuccessReward, check_success
from etude.environments.orchestrator import play_episodes
from etude.environments.text import TextEnvironment
from etude.environments.traits import metrics_of, parts_of, sampler_of, temperatures_of, tools_of
from etude.errors import ConfigError, DataError
from etude.evaluation.conditions import CLEAN, Noises, make_conditions
from etude.evaluation.measures import Measures, compare, measure
from etude.evaluation.tally import Tally, tally
from etude.math.counters import mix
from etude.math.intervals import check_confidence
from etude.protocols import Environment, Sampler
from etude.reporting.evaluation import print_evaluation
from etude.rewards.function import FunctionReward, SegmentReward
from etude.runtime.loop import run_sync
from etude.sampling.greedy import GreedySampler
from etude.types import Episode

_NOISE, _EPISODES = 1, 2  # names of random streams


@dataclass(frozen=True)
class Evaluation:
    """What a model did on the same tasks under several conditions.

    Attributes:
        name: of the model.
        tasks: as they were given.
        samples: episodes per task.
        episodes: by condition, task and sample.
        tallies: the sums that the measures are made of, by condition.
        confidence: of the intervals.
        seconds: wall time.
        has_tools: whether it could call any.
    """

    name: str
    tasks: Sequence[Mapping[str, Any]]
    samples: int
    episodes: Mapping[str, Sequence[Sequence[Episode]]]
    tallies: Mapping[str, Tally]
    confidence: float
    seconds: float
    has_tools: bool = True

    @cached_property
    def measures(self) -> dict[str, Measures]:
        """By condition, every measure with its interval; `evaluation.tally` says what they are."""
        return {name: measure(each, self.confidence) for name, each in self.tallies.items()}

    @cached_property
    def changes(self) -> dict[str, Measures]:
        """By noise, how far each measure is from the clean one's, on the same tasks."""
        clean = self.tallies[CLEAN]
        noisy = {name: each for name, each in self.tallies.items() if name != CLEAN}
        return {name: compare(each, clean, self.confidence) for name, each in noisy.items()}

    def minus(self, other: Evaluation) -> dict[str, Measures]:
        """By condition, this model's measures less the other's on the same tasks.

        Raises:
            DataError: the other evaluation is of other tasks.
        """
        if list(self.tasks) != list(other.tasks):
            raise DataError(
                f"{self.name} played {len(self.tasks)} tasks and {other.name} {len(other.tasks)}, and they "
                "are not the same ones; a difference is taken task by task: evaluate both on the same tasks"
            )
        return {
            name: compare(each, other.tallies[name], self.confidence)
            for name, each in self.tallies.items()
            if name in other.tallies
        }

    def to_json(self) -> dict[str, Any]:
        """Everything but the episodes."""
        shares = dict.fromkeys(name for each in self.tallies.values() for name in each.rates)
        return {
            "name": self.name,
            "seconds": self.seconds,
            "has_tools": self.has_tools,
            "shares": list(shares),
            "conditions": _plain(self.measures),
            "changes": _plain(self.changes),
        }

    def show(self, other: Evaluation | None = None) -> None:
        """Print a table: of this model, or of this one beside another."""
        print_evaluation(record_of(self, other))


def evaluate(
    player: Environment | nn.Module,
    tasks: Rows,
    *,
    noise: Noises = (),
    tool_noise: Noises = (),
    samples: int = 1,
    greedy: bool = False,
    pass_at: Sequence[int] = (),
    distinct: Sequence[int] = (1, 2),
    success_reward: SuccessReward = 1.0,
    confidence: float = 0.95,
    seed: int = 0,
    columns: Sequence[str] = ("prompt", "query"),
    name: str = "model",
    on_episode: Callable[[str, Episode], None] | None = None,
    **environment: Any,
) -> Evaluation:
    """Play every task under every condition and count.

    Args:
        player: an environment, or a model; with a model, `environment` has the arguments of its
            `TextEnvironment` (`tokenizer=`, `tools=`, `rewards=`, …). An environment without a sampler of its
            own needs a `sampler=`.
        tasks: rows as training has them: a file, a folder, a hub id, a list, a `Dataset`.
        noise: what is done to prompts, a condition each: names of shipped ones (`data.noise.SHIPPED`),
            `Noise`s, functions (text, seed) → text, in a list or by names of yours.
        tool_noise: the same for what tools reply.
        samples: episodes per task and condition.
        greedy: the most probable token at each step, whatever the environment's `generation_kwargs` say.
        pass_at: which k of pass@k; by default powers of 2 up to `samples`, and `samples`.
        distinct: which n of distinct-n.
        success_reward: an episode with at least this reward is a success; in a mixed environment perhaps a
            number for each.
        confidence: of the intervals.
        seed: of noise and episodes.
        columns: where a task has its text, for noise in prompts.
        name: of the model, in tables.
        on_episode: told of each condition's episodes as they end, before they are scored.

    Raises:
        ConfigError: settings that contradict each other.
        DataError: tasks can't be read, or have no text to put noise into.
        RewardError: a reward function needs a column that the tasks lack, or gives scores that are none.
    """
    started = time.monotonic()
    world = _environment(player, environment)
    check_success(success_reward, world)
    _check(greedy or _is_greedy(world), samples, pass_at, confidence)
    rows = [dict(row) for row in load_rows(tasks, column="prompt")]
    has_tools = bool(tools_of(world))
    conditions = make_conditions(noise, tool_noise, has_tools)
    # What can go wrong without a model goes wrong before one plays.
    tasks_of = {each.name: each.tasks(rows, columns, mix(seed, _NOISE)) for each in conditions}
    _check_rewards(world, rows)
    sampler = sampler_of(world, environment.get("sampler"))
    if greedy:
        sampler = GreedySampler(sampler)
    episodes, tallies = {}, {}
    for condition in conditions:
        told = None if on_episode is None else _telling(on_episode, condition.name)
        noisy_world = condition.environment(world, mix(seed, _NOISE))
        played = _play(noisy_world, sampler, tasks_of[condition.name], samples, seed, told)
        episodes[condition.name] = played
        tallies[condition.name] = tally(
            played,
            success_reward=success_reward,
            pass_at=pass_at or _powers(samples),
            distinct_n=distinct,
            bait=condition.bait,
            metrics=metrics_of(world),
            environments=parts_of(world),
        )
    seconds = time.monotonic() - started
    return Evaluation(name, rows, samples, episodes, tallies, confidence, seconds, has_tools)


def record_of(evaluation: Evaluation, other: Evaluation | None = None) -> dict[str, Any]:
    """One or two evaluations and their difference, in JSON's types: what tables and pages are made of."""
    record: dict[str, Any] = {
        "tasks": len(evaluation.tasks),
        "samples": evaluation.samples,
        "confidence": evaluation.confidence,
        "models": {"A": evaluation.to_json()},
    }
    if other is not None:
        record["models"]["B"] = other.to_json()
        record["differences"] = _plain(evaluation.minus(other))
    return record


def _plain(measures: Mapping[str, Measures]) -> dict[str, dict[str, dict[str, float]]]:
    return {
        condition: {
            name: {"value": each.value, "low": each.low, "high": each.high} for name, each in found.items()
        }
        for condition, found in measures.items()
    }


def _environment(player: Any, arguments: Mapping[str, Any]) -> Environment:
    if not isinstance(player, Environment):
        return TextEnvironment(player, **arguments)
    if others := [name for name in arguments if name != "sampler"]:
        raise ConfigError(
            f"{', '.join(others)} would make an environment, and there is one already; set them there"
        )
    return player


def _is_greedy(environment: Environment) -> bool:
    temperatures = temperatures_of(environment).values()
    return bool(temperatures) and not any(temperatures)


def _check(greedy: bool, samples: int, pass_at: Sequence[int], confidence: float) -> None:
    check_confidence(confidence)
    if samples < 1:
        raise ConfigError(f"samples is {samples}; expected at least 1 episode per task")
    if samples > 1 and greedy:
        raise ConfigError(
            f"samples is {samples}, and greedy decoding makes them all the same; sample, or play each "
            "task once"
        )
    if wrong := [k for k in pass_at if not 1 <= k <= samples]:
        raise ConfigError(f"pass_at has {wrong[0]} and samples is {samples}; expected 1 <= k <= samples")


def _check_rewards(environment: Environment, rows: Sequence[Mapping[str, Any]]) -> None:
    """Refuse functions that lack a column, as far as that is known: other environments may make columns."""
    if type(environment) is TextEnvironment:
        columns = {name for row in rows for name in row}
        for reward in environment.rewards:
            if isinstance(reward, FunctionReward | SegmentReward):
                reward.check_columns(columns)


def _play(
    environment: Environment,
    sampler: Sampler,
    tasks: Sequence[dict[str, Any]],
    samples: int,
    seed: int,
    on_episode: Callable[[Episode], None] | None,
) -> list[list[Episode]]:
    each = [(place, sample) for place in range(len(tasks)) for sample in range(samples)]
    seeds = [mix(seed, _EPISODES, *pair) for pair in each]
    several = [tasks[place] for place, _ in each]
    played = run_sync(play_episodes(environment, several, sampler, seeds, on_episode))
    return [played[start : start + samples] for start in range(0, len(played), samples)]


def _powers(samples: int) -> list[int]:
    powers = [1 << n for n in range(1, samples.bit_length()) if 1 << n < samples]
    return [*powers, samples] if samples > 1 else []


def _telling(on_episode: Callable[[str, Episode], None], condition: str) -> Callable[[Episode], None]:
    return lambda episode: on_episode(condition, episode)
