"""What a checkpoint of online training holds, and how a trainer is put back to it.

The model is a directory that anything can load; optimizer, schedule and the trainer's own state lie
beside it. Tensors are loaded with `weights_only=True`: a checkpoint runs no code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict

from etude.errors import CheckpointError
from etude.models.loading import load_causal_lm
from etude.models.value_head import AutoModelForCausalLMWithValueHead
from etude.trainers.setup import Policy

if TYPE_CHECKING:
    from etude.trainers.online import OnlineTrainer

_STATE, _TENSORS = "trainer_state.json", "trainer_state.pt"


def save_checkpoint(trainer: OnlineTrainer, directory: Path) -> None:
    trainer.model.save_pretrained(str(directory))  # peft takes no Path
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
    load_weights(trainer.model, directory)
    tensors = torch.load(directory / _TENSORS, map_location="cpu", weights_only=True)
    trainer.optimizer.load_state_dict(tensors["optimizer"])
    if trainer.lr_scheduler is not None and tensors["scheduler"] is not None:
        trainer.lr_scheduler.load_state_dict(tensors["scheduler"])
    torch.set_rng_state(tensors["rng"])
    state = json.loads((directory / _STATE).read_text(encoding="utf-8"))
    trainer.current_step = state.pop("step")
    trainer.load_state_dict(state)


def load_weights(model: Policy, directory: Path) -> None:
    """Read a saved model's weights into `model`, in place: whoever shares its tensors follows."""
    if isinstance(model, PeftModel):  # the directory holds its adapter only
        set_peft_model_state_dict(model, load_peft_weights(str(directory), device="cpu"))
        return
    load = (
        AutoModelForCausalLMWithValueHead.from_pretrained
        if isinstance(model, AutoModelForCausalLMWithValueHead)
        else load_causal_lm
    )
    saved = load(directory, dtype=model.dtype)
    with torch.no_grad():
        model.load_state_dict(saved.state_dict())
