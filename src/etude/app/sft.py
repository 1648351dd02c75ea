"""`etude sft`: a model learns to imitate demonstrations. See `learn`."""

from __future__ import annotations

from etude.app.arguments import DataArguments, ModelArguments, RunArguments
from etude.app.learn import learn
from etude.trainers.sft import SFTTrainer
from etude.trainers.sft_config import SFTConfig


def run(model_arguments: ModelArguments, data: DataArguments, start: RunArguments, config: SFTConfig) -> None:
    """Train, and leave the model in `config.output_dir`."""
    learn(SFTTrainer, model_arguments, data, start, config)
