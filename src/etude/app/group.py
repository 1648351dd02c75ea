"""`etude grpo`, `rloo`, `reinforce` and the others without a critic: a model plays and learns. See `play`."""

from __future__ import annotations

from functools import partial

from etude.app.arguments import ModelArguments, RunArguments, TaskArguments
from etude.app.mixed_arguments import PlayArguments
from etude.app.play import train_by_playing
from etude.models.loading import load_language_model
from etude.trainers.group import GroupTrainer
from etude.trainers.group_config import GroupConfig
from etude.trainers.grpo import GRPOTrainer
from etude.trainers.iterative_sft import IterativeSFTTrainer
from etude.trainers.reinforce import ReinforceTrainer
from etude.trainers.reinforce_plus_plus import ReinforcePlusPlusTrainer
from etude.trainers.rloo import RLOOTrainer

_TRAINERS: dict[type[GroupConfig], type[GroupTrainer]] = {
    trainer.config_class: trainer
    for trainer in (
        GRPOTrainer,
        RLOOTrainer,
        ReinforceTrainer,
        ReinforcePlusPlusTrainer,
        IterativeSFTTrainer,
    )
}


def run(
    model_arguments: ModelArguments,
    tasks: TaskArguments,
    episodes: PlayArguments,
    start: RunArguments,
    config: GroupConfig,
) -> None:
    """Train by the algorithm that `config` belongs to, and leave everything in its `output_dir`."""
    trainer = partial(_TRAINERS[type(config)], args=config)
    train_by_playing(load_language_model, trainer, model_arguments, tasks, episodes, start, config.seed)
