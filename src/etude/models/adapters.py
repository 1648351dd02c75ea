"""PEFT adapters: fresh ones on a model, saved ones and the base models that they belong to.

Not covered: loading a model with its adapter (`loading`), reward models that are adapters (`reward_adapter`),
merging (`merging`).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils.peft_utils import find_adapter_config_file

from etude.errors import ModelError
from etude.models.places import explained, locate


def lora_config(
    r: int, alpha: float, dropout: float = 0.0, target_modules: str | Sequence[str] | None = None
) -> LoraConfig:
    """LoRA (Hu et al. 2021, arXiv:2106.09685) on every linear layer but the output head, or on those named.

    The update is `alpha / r · B A`, with `A` of shape [r, in] and `B` of shape [out, r].
    """
    modules = (
        target_modules if target_modules is None or isinstance(target_modules, str) else [*target_modules]
    )
    return LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]  # annotated int; a fraction is as good
        lora_dropout=dropout,
        target_modules=modules or "all-linear",
        task_type="CAUSAL_LM",
    )


def quantization_config(bits: Literal[4, 8]) -> BitsAndBytesConfig:
    """Weights in 4 bits as in QLoRA (Dettmers et al. 2023, NF4 and double quantization), or in 8."""
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def add_adapter(model: PreTrainedModel | PeftModel, peft_config: PeftConfig) -> PeftModel:
    """Put a fresh adapter on a model and freeze the rest; `peft_config` itself stays as it is.

    Raises:
        ModelError: the model carries adapters already, `peft_config` is not a PEFT configuration, or peft
            can't put it on this model (a family whose layers it doesn't know by name, say).
    """
    if not isinstance(peft_config, PeftConfig):
        raise ModelError(
            f"peft_config is a {type(peft_config).__name__}; expected a peft.PeftConfig, e.g. a LoraConfig"
        )
    if isinstance(model, PeftModel):
        raise ModelError(
            "the model carries an adapter already: leave peft_config (use_peft) out, or pass the base model"
        )
    if getattr(model, "is_quantized", False):
        model = prepare_model_for_kbit_training(model)
    peft_config = copy.deepcopy(peft_config)  # peft writes the base model's name and its targets into it
    if model.config.is_encoder_decoder and peft_config.task_type == TaskType.CAUSAL_LM:
        peft_config.task_type = TaskType.SEQ_2_SEQ_LM
    if isinstance(peft_config, LoraConfig) and any(isinstance(module, Conv1D) for module in model.modules()):
        peft_config.fan_in_fan_out = True  # GPT-2 stores its weights transposed; peft would warn and set this
    if isinstance(peft_config, LoraConfig) and peft_config.target_modules == "all-linear":
        peft_config.exclude_modules = peft_config.exclude_modules or _beyond_lora(model) or None
    try:
        with current_peft():
            return get_peft_model(model, peft_config)
    except ValueError as error:
        raise ModelError(
            f"peft can't put this adapter on {type(model).__name__}: {str(error).rstrip('.')}. For LoRA on "
            "every linear layer, give target_modules='all-linear'; else name some of model.named_modules()"
        ) from error


def _beyond_lora(model: nn.Module) -> list[str]:
    """Linear layers that an adapter can't stand in for.

    State-space layers (Mamba and its hybrids) hand these two layers' weights to a kernel, past an adapter;
    and some routers (Llama 4's) are linear layers whose forward gives more than a product.
    """
    spared = []
    for name, module in model.named_modules():
        if hasattr(module, "A_log") and hasattr(module, "D"):
            spared += [f"{name}.{layer}" for layer in ("dt_proj", "out_proj") if hasattr(module, layer)]
        elif isinstance(module, nn.Linear) and type(module).__name__.endswith("Router"):
            spared.append(name)
    return spared


def find_adapter(name: str, place: Mapping[str, Any]) -> PeftConfig | None:
    """The configuration of the adapter that a directory or hub repository holds; None if it holds none."""
    with explained("the adapter", name):
        given = {key: value for key, value in place.items() if value is not None}
        if find_adapter_config_file(name, **given) is None:
            return None
        return PeftConfig.from_pretrained(name, **given)


def base_of(adapter: PeftConfig, name: str) -> str:
    """Where the base model of the adapter in `name` is.

    Raises:
        ModelError: the adapter doesn't say, or nothing is there.
    """
    if not adapter.base_model_name_or_path:
        raise ModelError(
            f"the adapter in {name!r} doesn't say which model it belongs to: write the model's directory or "
            "hub id into its adapter_config.json, under base_model_name_or_path"
        )
    return locate(adapter.base_model_name_or_path, f"the base model of the adapter in {name!r}")


@contextmanager
def said_of_base(name: str) -> Iterator[None]:
    """Inside, what can't be loaded is the base model of the adapter in `name`, and the error says so."""
    try:
        yield
    except ModelError as error:
        raise ModelError(
            f"the base model of the adapter in {name!r}, which its adapter_config.json names, can't be "
            f"loaded: {error}"
        ) from error


@contextmanager
def current_peft() -> Iterator[None]:
    """Silence what no user could act on.

    Peft uses an attribute that transformers has renamed; and it misses modules for the ranks that it sets
    for experts, which are parameters, and get their adapters.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        for pattern in ("rank", "alpha"):
            warnings.filterwarnings(
                "ignore", f"The following {pattern}_pattern keys.*gate_up_proj", RuntimeWarning
            )
        yield
