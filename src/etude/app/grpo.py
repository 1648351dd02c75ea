"""`etude grpo`: a model plays tasks with tools and learns from its scores, by GRPO. See `play`."""

from __future__ import annotations

from functools import partial

from etude.app.arguments import EnvironmentArguments, ModelArguments, RunArguments, TaskArguments
from etude.app.play import train_by_playing
from etude.models.loading import load_causal_lm
from etude.trainers.group_config import GRPOConfig
from etude.trainers.grpo import GRPOTrainer


def run(
    model_arguments: ModelArguments,
    tasks: TaskArguments,
    episodes: EnvironmentArguments,
    start: RunArguments,
    config: GRPOConfig,
) -> None:
    """Train, and leave everything in `config.output_dir`."""
    trainer = partial(GRPOTrainer, args=config)
    train_by_playing(load_causal_lm, trainer, model_arguments, tasks, episodes, start, config.seed)
