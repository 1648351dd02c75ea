"""`etude dpo`, `kto`, `orpo`, `simpo` and `cpo`: a model learns what people prefer. See `learn`."""

from __future__ import annotations

from etude.app.arguments import DataArguments, ModelArguments, RunArguments
from etude.app.learn import learn
from etude.trainers.cpo import CPOTrainer
from etude.trainers.data_trainer import DataTrainer
from etude.trainers.dpo import DPOTrainer
from etude.trainers.kto import KTOTrainer
from etude.trainers.orpo import ORPOTrainer
from etude.trainers.preference_config import PreferenceConfig
from etude.trainers.simpo import SimPOTrainer

_TRAINERS: dict[type, type[DataTrainer]] = {
    trainer.config_class: trainer
    for trainer in (DPOTrainer, KTOTrainer, ORPOTrainer, SimPOTrainer, CPOTrainer)
}


def run(
    model_arguments: ModelArguments, data: DataArguments, start: RunArguments, config: PreferenceConfig
) -> None:
    """Train by the method that `config` belongs to, and leave the model in its `output_dir`."""
    learn(_TRAINERS[type(config)], model_arguments, data, start, config)
