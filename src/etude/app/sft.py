"""`etude sft`: a model learns to imitate demonstrations.

The script behind the command: copy it and change what you like.
"""

from __future__ import annotations

from pathlib import Path

from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint

from etude.app.arguments import DataArguments, ModelArguments, RunArguments
from etude.errors import CheckpointError, ConfigError
from etude.models.loading import load_language_model, load_tokenizer
from etude.trainers.sft import SFTTrainer
from etude.trainers.sft_config import SFTConfig


def run(model_arguments: ModelArguments, data: DataArguments, start: RunArguments, config: SFTConfig) -> None:
    """Train, and leave the model in `config.output_dir`."""
    if data.eval_dataset is not None and config.eval_strategy == "no" and not config.eval_on_start:
        raise ConfigError("eval_dataset does nothing while eval_strategy is no; set it to epoch or steps")
    checkpoint = checkpoint_to_resume(start.resume_from_checkpoint, str(config.output_dir))
    train, validation = data.rows("train"), data.rows("eval")  # before the model: mistakes show at once

    set_seed(config.seed)  # an adapter starts at random
    tokenizer = load_tokenizer(**model_arguments.tokenizer_place)
    model = load_language_model(
        model_arguments.model_name_or_path,
        peft_config=model_arguments.peft_config(),
        **model_arguments.loading,
    )
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"model: {config.output_dir}\nreport: {Path(str(config.output_dir), 'report.html')}")


def checkpoint_to_resume(resume: bool | str | None, output_dir: str) -> str | None:
    """The directory to resume from: transformers would look for it after minutes of preparation."""
    if not resume:
        return None
    if isinstance(resume, str):
        if not Path(resume, "trainer_state.json").is_file():
            raise CheckpointError(
                f"{resume} is no checkpoint; expected a checkpoint-<step> directory of a run"
            )
        return resume
    newest = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
    if newest is None:
        raise CheckpointError(f"{output_dir} holds no checkpoint; leave resume_from_checkpoint out")
    return newest
