"""The loop of online training, once for all algorithms: play, learn, look, save.

    tasks ─► episodes (environment × sampler) ─► trajectories ─► learn() ─► new weights ─► …

An algorithm gives `learn`. The run is a directory: metrics and episodes as they come, checkpoints from
which the very same run goes on, the model, a report. Random numbers come from counters (seed, iteration,
episode), so a resumed run needs no generator's state to draw what it would have drawn.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from etude.data.batch import Trajectory
from etude.data.files import load_rows
from etude.environments.orchestrator import play_episodes
from etude.environments.text import TextEnvironment
from etude.errors import ConfigError, DataError
from etude.math.counters import mix
from etude.models.value_model import ValueModel
from etude.reporting.report import write_report
from etude.reporting.terminal import TrainingDisplay
from etude.runtime.loop import run_sync
from etude.runtime.run import RunDirectory, Split
from etude.sampling.local import LocalSampler
from etude.trainers.checkpoints import load_checkpoint, load_models, save_checkpoint
from etude.trainers.episode_metrics import environment_metrics, episode_metrics
from etude.trainers.interrupt import interrupt_after
from etude.trainers.online_config import OnlineConfig
from etude.trainers.setup import Policy
from etude.types import Episode

_TASKS, _EPISODES, _EVALUATION = 1, 2, 3  # names of random streams


@dataclass(slots=True)
class TrainSummary:
    """What a run came to.

    Attributes:
        steps: iterations done, by this call and the ones it resumed.
        before, after: success on the test tasks, before training and of the final weights; None without.
        best_step, best: the validation's best iteration and success; None without validation tasks.
        seconds: wall time of this call.
        report: the page to look at.
    """

    steps: int
    before: float | None
    after: float | None
    best_step: int | None
    best: float | None
    seconds: float
    report: Path | None


class OnlineTrainer(ABC):
    """Plays tasks in an environment and learns from what happened."""

    config: OnlineConfig
    accelerator: Accelerator
    model: Policy
    value_model: ValueModel | None = None
    tokenizer: PreTrainedTokenizerBase
    optimizer: torch.optim.Optimizer
    lr_scheduler: Any
    environment: TextEnvironment | None
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
                    **episode_metrics(episodes, config.success_reward),
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
        return Trajectory.of_episode(episode, self.config.policy_table)

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
        metrics = episode_metrics(episodes, self.config.success_reward)
        averages = self._average(metrics, weight=len(episodes))
        return {**environment_metrics(self._environment, episodes), **averages}, episodes

    def _measure(self, split: Split, rows: Sequence[Mapping[str, Any]], run: RunDirectory) -> None:
        """Success on held-out tasks, on which nothing is selected."""
        if not rows:
            return
        metrics, episodes = self._evaluate(rows)
        if self.accelerator.is_main_process:
            run.update_summary({split: metrics["success"]})
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
        display.message(f"iteration {step}: validation success {success:.3f}")

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
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        summary = run.read_summary()
        return TrainSummary(
            steps=self.current_step,
            before=summary.get("before"),
            after=summary.get("after"),
            best_step=summary.get("best_step"),
            best=summary.get("best"),
            seconds=seconds,
            report=report,
        )

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
        elif run.read_metrics():
            if not self.config.overwrite_output_dir:
                raise ConfigError(
                    f"{run.path} holds an earlier run; resume it with resume_from_checkpoint, choose another "
                    "output_dir, or start anew in it with overwrite_output_dir"
                )
            if main:
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
        """Those that are written to the run directory."""
        count = self.config.episodes_to_log
        return episodes if count < 0 else episodes[:count]

    def _report(self, run: RunDirectory) -> Path | None:
        return write_report(run.path) if self.accelerator.is_main_process else None

    def _average(self, metrics: Mapping[str, float], weight: float = 1.0) -> dict[str, float]:
        """Weighted mean over the processes that have a metric: one that sampled nothing lacks some."""
        if self.accelerator.num_processes == 1:
            return dict(metrics)
        everyone = gather_object([(dict(metrics), weight)])
        totals: dict[str, float] = defaultdict(float)
        weights: dict[str, float] = defaultdict(float)
        for theirs, share in everyone:
            for name, value in theirs.items():
                totals[name] += value * share
                weights[name] += share
        return {name: total / weights[name] for name, total in totals.items()}

    # Tasks.

    def _task(self, step: int, index: int) -> Mapping[str, Any]:
        """What the `index`-th episode of an iteration plays: tasks come in an order that is new each time."""
        rows = self.train_rows
        played = step * self.config.batch_size * self.accelerator.num_processes + index
        position = played // self.plays
        epoch, place = divmod(position, len(rows))
        return rows[self._order(epoch)[place]]

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            generator = torch.Generator().manual_seed(mix(self.config.seed, _TASKS, epoch))
            while len(self._orders) > 1:  # an iteration touches the epochs next to each other
                del self._orders[min(self._orders)]
            self._orders[epoch] = torch.randperm(len(self.train_rows), generator=generator).tolist()
        return self._orders[epoch]

    @cached_property
    def _orders(self) -> dict[int, list[int]]:
        return {}

    @cached_property
    def train_rows(self) -> list[dict[str, Any]]:
        return _rows(self.train_dataset)

    @cached_property
    def eval_rows(self) -> list[dict[str, Any]]:
        return _rows(self.eval_dataset)

    @cached_property
    def test_rows(self) -> list[dict[str, Any]]:
        return _rows(self.test_dataset)

    @property
    def _environment(self) -> TextEnvironment:
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
            max_length=None if self.environment is None else self.environment.max_length,
            cache_bytes=self.config.cache_bytes,
            keep_cache=self.config.keep_cache,
            autocast=self.accelerator.autocast,
            deterministic=self.config.deterministic,
            cuda_graphs=self.config.cuda_graphs,
        )


def _rows(dataset: Any) -> list[dict[str, Any]]:
    if dataset is None:
        return []
    loaded: Dataset = load_rows(dataset, column="prompt")
    return [dict(row) for row in loaded]
