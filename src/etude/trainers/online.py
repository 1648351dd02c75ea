"""The loop of online training, once for all algorithms: play, learn, look, save.

    tasks ─► episodes (environment × sampler) ─► trajectories ─► learn() ─► new weights ─► …

An algorithm gives `learn`. The run is a directory: metrics and episodes as they come, checkpoints from
which the very same run goes on, the model, a report. Random numbers come from counters (seed, iteration,
episode), so a resumed run needs no generator's state to draw what it would have drawn.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from etude.data.batch import Trajectory
from etude.environments.mixed import by_environment
from etude.environments.orchestrator import play_episodes
from etude.environments.traits import max_length_of, parts_of, tools_of
from etude.errors import ConfigError, DataError
from etude.math.counters import mix
from etude.models.value_model import ValueModel
from etude.protocols import Environment
from etude.reporting.report import write_report
from etude.reporting.terminal import TrainingDisplay, fields_with
from etude.runtime.loop import run_sync
from etude.runtime.run import RunDirectory, Split
from etude.sampling.local import LocalSampler
from etude.trainers.checkpoints import load_checkpoint, load_models, save_checkpoint
from etude.trainers.episode_metrics import (
    Mean,
    environment_metrics,
    episode_metrics,
    measures_by_environment,
)
from etude.trainers.interrupt import interrupt_after
from etude.trainers.means import mean_over_processes
from etude.trainers.online_config import OnlineConfig
from etude.trainers.setup import Policy
from etude.trainers.summary import TrainSummary, store_measure
from etude.trainers.tasks import Tasks, load_tasks
from etude.types import Episode

_EPISODES, _EVALUATION = 2, 3  # names of random streams; 1 is the order of tasks


class OnlineTrainer(ABC):
    """Plays tasks in an environment and learns from what happened."""

    config: OnlineConfig
    accelerator: Accelerator
    model: Policy
    value_model: ValueModel | None = None
    tokenizer: PreTrainedTokenizerBase
    optimizer: torch.optim.Optimizer
    lr_scheduler: Any
    environment: Environment | None
    train_dataset: Any
    eval_dataset: Any
    test_dataset: Any
    current_step: int
    plays = 1  # episodes of each task in an iteration
    _updating = False  # weights are half-way between two iterations
    run_config: Mapping[str, Any] = MappingProxyType({})  # settings beside the config, kept with the run

    @abstractmethod
    def learn(self, trajectories: Sequence[Trajectory]) -> dict[str, Any]:
        """One iteration's update; returns its statistics."""

    @property
    @abstractmethod
    def total_iterations(self) -> int:
        """How often `train` plays and learns, iterations before a resumption counted."""

    @abstractmethod
    def describe_batches(self) -> str:
        """One line: what an iteration plays, and how it is gone through."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What `learn` carries from one iteration to the next, beside weights and optimizer."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def train(self, resume_from_checkpoint: bool | str | None = None) -> TrainSummary:
        """Play and learn `total_iterations` times.

        Args:
            resume_from_checkpoint: True goes on from the newest checkpoint in `output_dir`, a path from
                that one.

        Whatever stops it (Ctrl-C, a reward that raises), a checkpoint of the last finished iteration is
        written first; a running update is finished before that.

        Raises:
            ConfigError: there is nothing to train on, or `output_dir` holds another run.
        """
        started = time.monotonic()
        run = self._open_run(resume_from_checkpoint)
        total = self.total_iterations
        display = TrainingDisplay(
            total,
            title=Path(run.path).name,
            fields=fields_with(
                {f"{name}/reward": name for name in self._parts}, has_tools=bool(tools_of(self._environment))
            ),
            enabled=self.accelerator.is_main_process and not self.config.disable_progress,
        )
        display.message(self.describe_batches())
        display.message(self.sampler.describe())
        if self.accelerator.is_main_process:
            run.update_summary({"sampler": self.sampler.describe().removeprefix("sampler: ")})
        if self.current_step == 0:
            self._measure("before", self.test_rows, run)
        try:
            with display:
                if self.current_step == 0:
                    self._validate(run, display)
                while self.current_step < total:
                    self._iterate(run, display)
        except BaseException:
            # Ctrl-C, a reward that is NaN: what was learned is kept. No process waits for the others here,
            # which may not have failed.
            if not self._updating:
                self._write_checkpoint(run)
                self._report(run)
            raise
        if self.config.save_steps and self.current_step % self.config.save_steps:
            self._save_checkpoint(run)
        return self._finish(run, started)

    def _iterate(self, run: RunDirectory, display: TrainingDisplay) -> None:
        """Play a batch of tasks and learn from it."""
        config, started = self.config, time.monotonic()
        step = self.current_step
        episodes, batch = self.collect(step)
        played = time.monotonic()
        # Validation and checkpoint belong to the iteration: a run resumed after Ctrl-C has them too.
        with interrupt_after():
            self._updating = True
            stats = self.learn([self.trajectory(episode) for episode in batch])
            self.sampler.weights_changed()  # an 8-bit optimizer's writes aren't noticed
            self.current_step = step + 1
            self._updating = False
            ended = time.monotonic()
            metrics = self._average(
                {
                    **episode_metrics(episodes, config.success_reward, self._parts),
                    **{name: value for name, value in stats.items() if isinstance(value, float)},
                    "tokens_per_second": sum(sum(e.sampled) for e in episodes) / (ended - started),
                    "time/rollout": played - started,
                    "time/update": ended - played,
                }
            )
            self._log(run, metrics, episodes)
            display.update(self.current_step, metrics)
            if config.eval_steps and self.current_step % config.eval_steps == 0:
                self._validate(run, display)
            if config.save_steps and self.current_step % config.save_steps == 0:
                self._save_checkpoint(run)

    def collect(self, step: int) -> tuple[list[Episode], list[Episode]]:
        """Play an iteration's tasks: all episodes that were played, and those to learn from."""
        first = self.accelerator.process_index * self.config.batch_size
        indices = range(first, first + self.config.batch_size)
        tasks = [self._task(step, i) for i in indices]
        seeds = [mix(self.config.seed, _EPISODES, step, i) for i in indices]
        episodes = self.play(tasks, seeds)
        return episodes, episodes

    def trajectory(self, episode: Episode) -> Trajectory:
        """An episode as it is learned from, by what its reason to stop means."""
        trajectory = Trajectory.of_episode(episode, self.config.policy_table)
        trajectory.environment = episode.environment if self._parts else ""
        return trajectory

    def play(self, tasks: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> list[Episode]:
        """Play one episode per task with the present weights."""
        return run_sync(play_episodes(self._environment, tasks, self.sampler, seeds))

    def evaluate(self, rows: Sequence[Mapping[str, Any]] | None = None) -> dict[str, float]:
        """Play each task once, sampling as in training, and average. Without `rows`, the validation tasks."""
        rows = self.eval_rows if rows is None else rows
        if not rows:
            raise ConfigError("nothing to evaluate on; pass rows, or eval_dataset to the trainer")
        return self._evaluate(rows)[0]

    def _evaluate(self, rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], list[Episode]]:
        indices = range(self.accelerator.process_index, len(rows), self.accelerator.num_processes)
        if not indices:
            raise DataError(
                f"{len(rows)} tasks to evaluate on, over {self.accelerator.num_processes} processes"
            )
        seeds = [mix(self.config.seed, _EVALUATION, i) for i in indices]
        episodes = self.play([rows[i] for i in indices], seeds)
        metrics = episode_metrics(episodes, self.config.success_reward, self._parts)
        averages, whole = self._average(metrics), environment_metrics(self._environment, episodes)
        return {**averages, **{name: whole[name] for name in whole if name not in averages}}, episodes

    def _measure(self, split: Split, rows: Sequence[Mapping[str, Any]], run: RunDirectory) -> None:
        """Success on held-out tasks, on which nothing is selected."""
        if not rows:
            return
        metrics, episodes = self._evaluate(rows)
        if self.accelerator.is_main_process:
            store_measure(run, split, metrics, self._parts)
            run.append_episodes(self.current_step, split, self._kept(episodes), self.tokenizer)

    def _validate(self, run: RunDirectory, display: TrainingDisplay) -> None:
        """Measure on the validation tasks, and keep the weights if they are the best so far."""
        if not self.eval_rows or not self.config.eval_steps:
            return
        metrics, episodes = self._evaluate(self.eval_rows)
        success, step = metrics["success"], self.current_step
        summary = run.read_summary()
        better = self.config.load_best_model_at_end and success > summary.get("best", -1.0)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            run.append_metrics(step, {f"validation/{name}": value for name, value in metrics.items()})
            run.append_episodes(step, "validation", self._kept(episodes), self.tokenizer)
        if better:
            self._save_checkpoint(run, best=success)
        each = measures_by_environment(metrics, self._parts).items()
        shares = ", ".join(f"{name} {numbers['success']:.3f}" for name, numbers in each)
        display.message(f"iteration {step}: validation success {success:.3f}" + f" ({shares})" * bool(shares))

    def _finish(self, run: RunDirectory, started: float) -> TrainSummary:
        """The best weights, their measure, the model, the report."""
        best = run.best_checkpoint()
        if self.config.load_best_model_at_end and best is not None:
            load_models(self, best)
        self._measure("after", self.test_rows, run)
        seconds = time.monotonic() - started
        report = None
        if self.accelerator.is_main_process:
            run.update_summary({"seed": self.config.seed, "seconds": seconds})
            self.save_model(run.path)
            report = self._report(run)
            if self.config.push_to_hub:
                self.push_to_hub()
        self.end_training()
        return TrainSummary.of(run, self.current_step, seconds, report)

    @abstractmethod
    def end_training(self) -> None:
        """Wait for the other processes, finish the trackers and leave the group: a script's last call."""

    @abstractmethod
    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Write model, tokenizer and model card."""

    @abstractmethod
    def push_to_hub(self) -> None:
        """Upload what `save_model` writes."""

    # The run directory.

    def _open_run(self, resume: bool | str | None) -> RunDirectory:
        if self.config.output_dir is None:
            raise ConfigError("train() writes a run directory; set output_dir")
        if not self.train_rows:
            raise ConfigError("train() needs an environment and train_dataset; pass them to the trainer")
        run = RunDirectory(self.config.output_dir)
        main = self.accelerator.is_main_process
        if resume:
            checkpoint = run.latest_checkpoint() if resume is True else Path(resume)
            if checkpoint is None:
                raise ConfigError(
                    f"{run.path} holds no checkpoint to resume from; leave resume_from_checkpoint out"
                )
            load_checkpoint(self, checkpoint)
            if main:
                run.truncate_after(self.current_step)
        elif run.is_taken(self.config.overwrite_output_dir) and main:
            run.reset()
        if main:
            run.write_config({**self.config.to_dict(), **self.run_config})
        self.accelerator.wait_for_everyone()
        return run

    def _save_checkpoint(self, run: RunDirectory, best: float | None = None) -> None:
        self._write_checkpoint(run, best)
        self.accelerator.wait_for_everyone()

    def _write_checkpoint(self, run: RunDirectory, best: float | None = None) -> None:
        """Write a checkpoint; with `best`, the validation success by which it is the one to end with."""
        if not self.accelerator.is_main_process:
            return
        with run.checkpoint(self.current_step) as directory:
            save_checkpoint(self, directory)
        if best is not None:
            run.mark_best(self.current_step)
            run.update_summary({"best": best, "best_step": self.current_step})
        if self.config.save_total_limit is not None:
            run.prune(self.config.save_total_limit)

    def _log(self, run: RunDirectory, metrics: Mapping[str, float], episodes: Sequence[Episode]) -> None:
        step = self.current_step
        self.accelerator.log(dict(metrics), step=step)
        if self.accelerator.is_main_process and step % self.config.logging_steps == 0:
            run.append_metrics(step, metrics)
            run.append_episodes(step, "train", self._kept(episodes), self.tokenizer)

    def _kept(self, episodes: Sequence[Episode]) -> Sequence[Episode]:
        """Those that are written to the run directory; of each environment some."""
        count, own = self.config.episodes_to_log, by_environment(episodes, self._parts)
        if count < 0 or len(own) < 2:
            return episodes if count < 0 else episodes[:count]
        share = -(-count // len(own))
        return [episode for those in own.values() for episode in those[:share]][:count]

    def _report(self, run: RunDirectory) -> Path | None:
        return write_report(run.path) if self.accelerator.is_main_process else None

    def _average(self, metrics: Mapping[str, Mean | float]) -> dict[str, float]:
        return mean_over_processes(metrics, self.accelerator)

    @property
    def _parts(self) -> Mapping[str, Environment]:
        """The environments of a mixed run."""
        return parts_of(self.environment)

    # Tasks.

    def _task(self, step: int, index: int) -> Mapping[str, Any]:
        """What the `index`-th episode of an iteration plays: tasks come in an order that is new each time."""
        played = step * self.config.batch_size * self.accelerator.num_processes + index
        return self.tasks.at(played // self.plays)

    @cached_property
    def tasks(self) -> Tasks:
        """`train_rows` in the order in which they are played."""
        return Tasks(self.train_rows, self.config.seed, self.environment)

    @cached_property
    def train_rows(self) -> list[dict[str, Any]]:
        return load_tasks(self.train_dataset, self.environment, "train_dataset")

    @cached_property
    def eval_rows(self) -> list[dict[str, Any]]:
        return load_tasks(self.eval_dataset, self.environment, "eval_dataset")

    @cached_property
    def test_rows(self) -> list[dict[str, Any]]:
        return load_tasks(self.test_dataset, self.environment, "test_dataset")

    @property
    def _environment(self) -> Environment:
        if self.environment is None:
            raise ConfigError(
                "train() needs an environment; pass environment= to the trainer, or call step()"
            )
        return self.environment

    @cached_property
    def sampler(self) -> LocalSampler:
        """A sampler over the very weights that are trained."""
        return self._sampler_over(self.model)

    def _sampler_over(self, model: nn.Module) -> LocalSampler:
        return LocalSampler(
            model,
            self.tokenizer,
            slots=self.config.slots,
            max_length=max_length_of(self.environment),
            cache_bytes=self.config.cache_bytes,
            keep_cache=self.config.keep_cache,
            autocast=self.accelerator.autocast,
            deterministic=self.config.deterministic,
            cuda_graphs=self.config.cuda_graphs,
        )
