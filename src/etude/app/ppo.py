"""`etude ppo`: a model plays tasks with tools and learns from its scores, by PPO. See `play`."""

from __future__ import annotations

from typing import Any

from etude.app.arguments import ActorCriticArguments, RunArguments, TaskArguments
from etude.app.mixed_arguments import PlayArguments
from etude.app.play import train_by_playing
from etude.models.loading import load_language_model
from etude.models.value_head import load_with_value_head
from etude.models.value_model import ValueModel
from etude.trainers.ppo import PPOTrainer
from etude.trainers.ppo_config import PPOConfig


def run(
    model_arguments: ActorCriticArguments,
    tasks: TaskArguments,
    episodes: PlayArguments,
    start: RunArguments,
    config: PPOConfig,
) -> None:
    """Train, and leave everything in `config.output_dir`."""
    place = model_arguments.value_model

    def load(name: str, **options: Any) -> Any:
        if place is not None:
            return load_language_model(name, **options)
        return load_with_value_head(name, **options)

    def trainer(**parts: Any) -> PPOTrainer:
        if place is not None:
            # The revision is the policy's and says nothing about another place.
            options = {**model_arguments.loading, "revision": None}
            parts["value_model"] = ValueModel.from_pretrained(place, **options)
        return PPOTrainer(config, **parts)

    train_by_playing(load, trainer, model_arguments, tasks, episodes, start, config.seed)
