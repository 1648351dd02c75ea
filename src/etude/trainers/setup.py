"""What a trainer is made of, before it trains: accelerator, model, and its settings as trackers take them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from etude.errors import ConfigError, ModelError
from etude.models.loading import load_language_model
from etude.models.value_head import load_with_value_head
from etude.models.with_value_head import ModelWithValueHead
from etude.runtime.processes import several_on_cpu
from etude.trainers.online_config import OnlineConfig

Policy = ModelWithValueHead | PreTrainedModel | PeftModel


def make_accelerator(config: OnlineConfig) -> Accelerator:
    accelerator = Accelerator(
        cpu=several_on_cpu(),
        log_with=config.report_to or None,
        project_config=ProjectConfiguration(
            **{"project_dir": config.output_dir, "logging_dir": config.output_dir, **config.project_kwargs}
        ),
        **config.accelerator_kwargs,
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigError("mixed_precision fp16 does nothing without a GPU; set it to bf16 or no")
    return accelerator


def check_precision(
    trained: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer | None,
    half_precision: str = "accelerator_kwargs={'mixed_precision': 'bf16'}",
) -> None:
    """Whether Adam's small steps arrive: adapters and value heads are in float32, other weights as loaded.

    Args:
        trained: parameters.
        optimizer: the caller's own, if any: what its steps are isn't known.
        half_precision: the setting that computes in it.

    Raises:
        ModelError: weights to train are float16: their gradients underflow, and Adam divides by 0.
    """
    kinds = {parameter.dtype for parameter in trained}
    advice = (
        "load the model in float32 (dtype='float32'), and compute in half precision by "
        f"{half_precision}; or train an adapter, which is float32"
    )
    if torch.float16 in kinds:
        raise ModelError(
            f"weights to train are float16: gradients underflow, and Adam turns them into NaN; {advice}"
        )
    if torch.bfloat16 in kinds and optimizer is None:
        warnings.warn(
            "weights to train are bfloat16, in which a step of less than 1/256 of a weight is lost: at a "
            f"small learning rate most never change; {advice}",
            stacklevel=4,
        )


def with_value_head(model: Any) -> ModelWithValueHead:
    """The model, decoder or encoder-decoder, with a value head: its own or a fresh one."""
    if isinstance(model, ModelWithValueHead):
        return model
    if isinstance(model, str | Path | PreTrainedModel | PeftModel):
        return load_with_value_head(model)
    raise ModelError(
        f"model is a {type(model).__name__}; expected an AutoModelForCausalLMWithValueHead or an "
        "AutoModelForSeq2SeqLMWithValueHead, a language model of transformers, or a directory or hub id"
    )


def without_value_head(model: Any) -> PreTrainedModel | PeftModel:
    if isinstance(model, PreTrainedModel | PeftModel):
        return model
    if isinstance(model, str | Path):
        return load_language_model(model)
    hint = " (its pretrained_model)" if isinstance(model, ModelWithValueHead) else ""
    raise ModelError(
        f"model is a {type(model).__name__}; expected a language model of transformers{hint}, with or "
        "without adapters, or a directory or hub id: there is no value to learn here"
    )


def enable_gradient_checkpointing(model: Any) -> None:
    # transformers 5.23 renamed the method and warns about the old name, which 5.20 and value heads know only.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()


def empty_device_cache(device: torch.device) -> None:
    if device.type in ("cuda", "mps", "xpu"):
        getattr(torch, device.type).empty_cache()


def changed_settings(config: OnlineConfig) -> dict[str, Any]:
    """The settings that differ from their defaults, without places and names of this machine's."""
    default = type(config)().to_dict()
    private = {"output_dir", "project_kwargs", "tracker_kwargs", "hub_model_id", "push_to_hub_if_best_kwargs"}
    return {k: v for k, v in config.to_dict().items() if v != default[k] and k not in private}


def flat_settings(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as trackers take them: numbers and text under dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flat_settings(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat


def disable_dropout(model: nn.Module) -> None:
    """In modules made for it, and where a layer keeps a rate as a number of its own."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def check_fits(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Whether a model can be trained with this tokenizer.

    Raises:
        ModelError: it has fewer embeddings than the tokenizer has tokens, or a router with a loss of its own.
    """
    config: Any = model.config
    if getattr(config, "output_router_logits", False):
        raise ModelError(
            "the load-balancing loss of mixture-of-experts models is not computed here; set "
            "model.config.output_router_logits = False to train without it"
        )
    known: Any = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > known:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens and the model embeds {known}; call "
            "model.resize_token_embeddings(len(tokenizer)) after adding tokens"
        )
