"""`etude ppo`: a model plays tasks with tools and learns from its scores, by PPO. See `play`."""

from __future__ import annotations

from functools import partial

from etude.app.arguments import EnvironmentArguments, ModelArguments, RunArguments, TaskArguments
from etude.app.play import train_by_playing
from etude.models.value_head import AutoModelForCausalLMWithValueHead
from etude.trainers.ppo import PPOTrainer
from etude.trainers.ppo_config import PPOConfig


def run(
    model_arguments: ModelArguments,
    tasks: TaskArguments,
    episodes: EnvironmentArguments,
    start: RunArguments,
    config: PPOConfig,
) -> None:
    """Train, and leave everything in `config.output_dir`."""
    load = AutoModelForCausalLMWithValueHead.from_pretrained
    trainer = partial(PPOTrainer, config)
    train_by_playing(load, trainer, model_arguments, tasks, episodes, start, config.seed)
