"""What the commands that learn from data do: `etude sft`, `etude reward`, `etude dpo` and the others.

The script behind them: copy it and change what you like.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import set_seed

from etude.app.arguments import DataArguments, ModelArguments, RunArguments
from etude.errors import ConfigError
from etude.models.loading import load_language_model, load_tokenizer
from etude.runtime.run import RunDirectory
from etude.trainers.data_config import DataConfig
from etude.trainers.data_trainer import DataTrainer
from etude.trainers.resuming import checkpoint_to_resume, newest_checkpoint


def learn(
    kind: type[DataTrainer],
    model_arguments: ModelArguments,
    data: DataArguments,
    start: RunArguments,
    config: DataConfig,
    load: Callable[..., Any] = load_language_model,
) -> None:
    """Train, and leave the model in `config.output_dir`.

    Args:
        kind: the trainer.
        load: the model, from its name and `ModelArguments.loading`.
    """
    if data.eval_dataset is not None and config.eval_strategy == "no" and not config.eval_on_start:
        raise ConfigError("eval_dataset does nothing while eval_strategy is no; set it to epoch or steps")
    # Before minutes of preparation.
    checkpoint = checkpoint_to_resume(start.resume_from_checkpoint, str(config.output_dir))
    if checkpoint is None:
        RunDirectory(str(config.output_dir)).is_taken(config.overwrite_output_dir)
    train, validation = data.rows("train"), data.rows("eval")  # before the model: mistakes show at once

    set_seed(config.seed)  # a head that the model lacks starts at random
    trainer = kind(
        model=load(model_arguments.model_name_or_path, **model_arguments.loading),
        args=config,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=load_tokenizer(**model_arguments.tokenizer_place),
        peft_config=model_arguments.peft_config(),
    )
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        newest = newest_checkpoint(str(config.output_dir))
        if newest is not None and trainer.is_world_process_zero():
            print(f"checkpoint: {newest}, which --resume_from_checkpoint goes on from")
        raise
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"model: {config.output_dir}\nreport: {Path(str(config.output_dir), 'report.html')}")
    trainer.end_training()
