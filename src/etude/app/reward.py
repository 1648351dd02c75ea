"""`etude reward` and `etude prm`: a model learns to score answers, or their steps.

The script behind the commands: copy it and change what you like.
"""

from __future__ import annotations

from pathlib import Path

from transformers import set_seed

from etude.app.arguments import DataArguments, ModelArguments, RunArguments
from etude.app.sft import checkpoint_to_resume
from etude.errors import ConfigError
from etude.models.loading import load_tokenizer
from etude.models.reward_model import load_reward_model
from etude.trainers.prm import PRMTrainer
from etude.trainers.reward import RewardTrainer
from etude.trainers.reward_config import PRMConfig, RewardConfig


def run(
    model_arguments: ModelArguments,
    data: DataArguments,
    start: RunArguments,
    config: RewardConfig | PRMConfig,
) -> None:
    """Train, and leave the model in `config.output_dir`."""
    if data.eval_dataset is not None and config.eval_strategy == "no" and not config.eval_on_start:
        raise ConfigError("eval_dataset does nothing while eval_strategy is no; set it to epoch or steps")
    checkpoint = checkpoint_to_resume(start.resume_from_checkpoint, str(config.output_dir))
    train, validation = data.rows("train"), data.rows("eval")  # before the model: mistakes show at once

    kind = RewardTrainer if isinstance(config, RewardConfig) else PRMTrainer
    set_seed(config.seed)  # a score head starts at random
    tokenizer = load_tokenizer(**model_arguments.tokenizer_place)
    model = load_reward_model(
        model_arguments.model_name_or_path, kind.kind, fresh=True, **model_arguments.loading
    )
    trainer = kind(
        model=model,
        args=config,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        peft_config=model_arguments.peft_config(),
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"model: {config.output_dir}\nreport: {Path(str(config.output_dir), 'report.html')}")
