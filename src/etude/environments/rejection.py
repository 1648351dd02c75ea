"""Rejection sampling: play each task several times, keep what is good, write it as a dataset.

    sample_dataset(environment, tasks, "runs/samples", Selection(min_reward=1.0), num_samples=8)

Everything that was played goes to the directory's `episodes.jsonl` at once, a task at a time; the dataset is
then chosen from these. So a run that was killed goes on where it was, and another choice (another format,
more than one episode per task) plays nothing again. An episode's random stream comes from the seed, its
task's number and its own: who else is playing, and a restart, change nothing.

Not covered: several processes; learning from the rows (`trainers`).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etude.data.selection import Selection, best_first
from etude.environments.orchestrator import gather_all, play_episodes
from etude.environments.running import task_rows
from etude.environments.traits import prompt_of, sampler_of, slots_of, tokenizer_of
from etude.errors import CheckpointError, ConfigError, DataError
from etude.math.counters import mix
from etude.math.kl import best_of_n_kl
from etude.protocols import Environment, Sampler
from etude.runtime.loop import run_sync
from etude.runtime.run import RunDirectory
from etude.types import Episode


@dataclass(frozen=True)
class SamplingSummary:
    """What came of it.

    Attributes:
        file: the dataset, JSON Lines.
        rows: in it.
        tasks, episodes: that were played, in all runs together.
        reward: mean over the episodes that didn't fail on our side.
        best_reward: mean over the tasks of the best episode's.
        kl_bound: nats by which the best of `num_samples` is from the model at most; None where something else
            than the best is kept.
    """

    file: Path
    rows: int
    tasks: int
    episodes: int
    reward: float
    best_reward: float
    kl_bound: float | None


def sample_dataset(
    environment: Environment,
    tasks: Sequence[str | Mapping[str, Any]],
    output_dir: str | os.PathLike[str],
    selection: Selection = Selection(),  # noqa: B008  frozen
    *,
    num_samples: int = 4,
    sampler: Sampler | None = None,
    seed: int = 0,
    resume: bool = False,
    settings: Mapping[str, Any] | None = None,
    on_group: Callable[[Sequence[Episode]], None] | None = None,
) -> SamplingSummary:
    """Play, choose, and write `<format>.jsonl` into a run directory.

    Args:
        environment: with its rewards.
        tasks: prompts, or rows that have one and whatever the rewards need.
        output_dir: for episodes and dataset.
        selection: what becomes a row.
        num_samples: episodes per task.
        sampler: what plays; the environment's own by default.
        seed: of all episodes.
        resume: go on with the episodes that are in `output_dir`: what is missing is played, with more
            `num_samples` than before also more of each task. It is for you to see that the model is the same.
        settings: how the episodes come about. They are stored, and have to be equal when the run is resumed.
        on_group: told of the episodes that were played for a task, once they are stored.

    Raises:
        CheckpointError: the directory holds episodes and `resume` is false, or they were played otherwise.
        ConfigError: a setting is out of range.
        DataError: there are no tasks, or others than those whose episodes are here.
    """
    if num_samples < 1:
        raise ConfigError(f"num_samples is {num_samples}; expected at least 1")
    if selection.format == "preference" and num_samples < 2:
        raise ConfigError("a preference is between two episodes of a task; set num_samples to 2 or more")
    rows, run, sampler = task_rows(tasks, {}), RunDirectory(output_dir), sampler_of(environment, sampler)
    stored = run.read_groups()
    if stored:
        _check_same(run, {**(settings or {}), "seed": seed}, resume)
        _check_tasks(environment, rows, stored)
    else:
        run.write_config({**(settings or {}), "seed": seed})
    played = {task: len(episodes) for task, episodes in stored.items()}
    run_sync(_play_missing(environment, sampler, rows, run, played, num_samples, seed, on_group))

    groups = {task: episodes[:num_samples] for task, episodes in run.read_groups().items()}
    chosen = [row for task in sorted(groups) for row in selection.rows(task, groups[task])]
    file = run.write_rows(f"{selection.format}.jsonl", chosen)
    ranked = [best for group in groups.values() if (best := best_first(group))]
    rewards = [episode.reward for group in ranked for episode in group]
    is_best = selection.keep == 1 and selection.format in ("segments", "prompt-completion")
    summary = SamplingSummary(
        file=file,
        rows=len(chosen),
        tasks=len(groups),
        episodes=sum(map(len, groups.values())),
        reward=sum(rewards) / len(rewards),
        best_reward=sum(group[0].reward for group in ranked) / len(ranked),
        kl_bound=best_of_n_kl(num_samples) if is_best else None,
    )
    run.update_summary({name: value for name, value in vars(summary).items() if name != "file"})
    return summary


def _check_same(run: RunDirectory, settings: Mapping[str, Any], resume: bool) -> None:
    if not resume:
        raise CheckpointError(
            f"{run.path} holds episodes; go on with them by resume, or choose another output_dir"
        )
    if changed := run.changed_settings(settings):
        name = changed[0]
        raise CheckpointError(
            f"the episodes in {run.path} were played with {name} {run.read_config().get(name)!r}, and now "
            f"it is {settings.get(name)!r}; set it back, or choose another output_dir"
        )


def _check_tasks(
    environment: Environment, rows: Sequence[Mapping[str, Any]], stored: Mapping[int, list[Episode]]
) -> None:
    for task, episodes in stored.items():
        if task >= len(rows) or not _is_of(episodes[0], rows[task], environment):
            raise DataError(
                f"the stored episodes of task {task} began with {episodes[0].prompt[:60]!r}, which is not "
                "its prompt now; give the same tasks in the same order, or choose another output_dir"
            )


def _is_of(episode: Episode, row: Mapping[str, Any], environment: Environment) -> bool:
    """By its prompt; where that isn't known beforehand, by what its task says in words and whole numbers."""
    prompt = prompt_of(environment, row)
    if prompt is not None:
        return prompt == episode.prompt
    return all(episode.task.get(name) == value for name, value in row.items() if isinstance(value, str | int))


async def _play_missing(
    environment: Environment,
    sampler: Sampler,
    rows: Sequence[Mapping[str, Any]],
    run: RunDirectory,
    played: Mapping[int, int],
    num_samples: int,
    seed: int,
    on_group: Callable[[Sequence[Episode]], None] | None,
) -> None:
    """Play what isn't stored. A task's episodes are stored together, as soon as they are scored."""
    # Enough tasks for all slots, while others of their group are still waiting for tools and rewards.
    gate = asyncio.Semaphore(-(-2 * slots_of(environment) // num_samples))

    async def play(task: int) -> None:
        async with gate:
            missing = range(played.get(task, 0), num_samples)
            seeds = [mix(seed, task, sample) for sample in missing]
            group = await play_episodes(environment, [rows[task] for _ in missing], sampler, seeds)
            run.append_episodes(task, "train", group, tokenizer_of(environment))
            if on_group is not None:
                on_group(group)

    await gather_all([play(task) for task in range(len(rows)) if played.get(task, 0) < num_samples])
