"""What a checkpoint of online training holds, and how a trainer is put back to it.

The model is a directory that anything can load; optimizer, schedule and the trainer's own state lie
beside it. Tensors are loaded with `weights_only=True`: a checkpoint runs no code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict

from etude.errors import CheckpointError
from etude.models.head_files import load_head
from etude.models.loading import load_language_model
from etude.models.reward_adapter import adapted, policy_adapters
from etude.models.with_value_head import ModelWithValueHead
from etude.models.wrappers import trunk_of

if TYPE_CHECKING:
    from etude.trainers.online import OnlineTrainer

VALUE_MODEL = "value_model"  # where a value model lies in the directory of its policy
_STATE, _TENSORS = "trainer_state.json", "trainer_state.pt"


def save_checkpoint(trainer: OnlineTrainer, directory: Path) -> None:
    save_models(trainer, directory)
    trainer.tokenizer.save_pretrained(directory)
    schedule = trainer.lr_scheduler
    tensors = {
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": None if schedule is None else schedule.state_dict(),
        "rng": torch.get_rng_state(),
    }
    torch.save(tensors, directory / _TENSORS)
    state = {"step": trainer.current_step, **trainer.state_dict()}
    (directory / _STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


def load_checkpoint(trainer: OnlineTrainer, directory: Path) -> None:
    """Put weights, optimizer, schedule and state back.

    Raises:
        CheckpointError: the directory is not a checkpoint of online training.
    """
    missing = [name for name in (_STATE, _TENSORS) if not (directory / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{directory} lacks {', '.join(missing)}; expected a checkpoint-<step> directory of a run"
        )
    load_models(trainer, directory)
    tensors = torch.load(directory / _TENSORS, map_location="cpu", weights_only=True)
    trainer.optimizer.load_state_dict(tensors["optimizer"])
    if trainer.lr_scheduler is not None and tensors["scheduler"] is not None:
        trainer.lr_scheduler.load_state_dict(tensors["scheduler"])
    torch.set_rng_state(tensors["rng"])
    state = json.loads((directory / _STATE).read_text(encoding="utf-8"))
    trainer.current_step = state.pop("step")
    trainer.load_state_dict(state)


def save_models(trainer: OnlineTrainer, directory: Path) -> None:
    """The policy in `directory`, a value model of its own in `directory/value_model`."""
    model: Any = trainer.model
    adapters = {"selected_adapters": policy_adapters(model)} if isinstance(model, PeftModel) else {}
    model.save_pretrained(str(directory), **adapters)  # peft takes no Path
    if trainer.value_model is not None:
        trainer.value_model.save_pretrained(directory / VALUE_MODEL)


def load_models(trainer: OnlineTrainer, directory: Path) -> None:
    """Read weights that `save_models` wrote, in place: whoever shares the tensors follows.

    Raises:
        CheckpointError: the trainer has a value model of its own, and none was saved.
    """
    model, value_model = trainer.model, trainer.value_model
    if value_model is not None and not (directory / VALUE_MODEL).is_dir():
        raise CheckpointError(
            f"{directory} holds no {VALUE_MODEL}, since the run it is of had no value model of its own; "
            "resume it without value_model"
        )
    peft = adapted(model)
    if peft is not None:  # the directory holds its adapter only
        set_peft_model_state_dict(peft, load_peft_weights(str(directory), device="cpu"))
    else:
        saved = load_language_model(directory, dtype=model.dtype)
        with torch.no_grad():
            trunk_of(model).load_state_dict(saved.state_dict())
    if isinstance(model, ModelWithValueHead):
        load_head(model.v_head, str(directory), {})
    if value_model is not None:
        value_model.load_weights(directory / VALUE_MODEL)
