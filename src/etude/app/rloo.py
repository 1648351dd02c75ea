"""`etude rloo`: a model plays tasks with tools and learns from its scores, by RLOO. See `play`."""

from __future__ import annotations

from functools import partial

from etude.app.arguments import EnvironmentArguments, ModelArguments, RunArguments, TaskArguments
from etude.app.play import train_by_playing
from etude.models.loading import load_causal_lm
from etude.trainers.group_config import RLOOConfig
from etude.trainers.rloo import RLOOTrainer


def run(
    model_arguments: ModelArguments,
    tasks: TaskArguments,
    episodes: EnvironmentArguments,
    start: RunArguments,
    config: RLOOConfig,
) -> None:
    """Train, and leave everything in `config.output_dir`."""
    trainer = partial(RLOOTrainer, args=config)
    train_by_playing(load_causal_lm, trainer, model_arguments, tasks, episodes, start, config.seed)
