"""A model inside what is wrapped around it: value heads, adapters, distributed training, compilation."""

from __future__ import annotations

from collections.abc import Iterator

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from etude.errors import ModelError

# What a wrapper calls the model in it: our value-head and value models, DDP/FSDP/DeepSpeed, torch.compile.
_INNER = ("pretrained_model", "model", "module", "_orig_mod")


def unwrapped(model: nn.Module) -> Iterator[nn.Module]:
    """The model and what it wraps, from the outside in; the last is the `PreTrainedModel`."""
    inner: nn.Module | None = model
    while inner is not None:
        yield inner
        if isinstance(inner, PreTrainedModel):
            return
        if isinstance(inner, PeftModel):
            inner = inner.get_base_model()
        else:
            found = (getattr(inner, name, None) for name in _INNER)
            inner = next((module for module in found if isinstance(module, nn.Module)), None)


def trunk_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside value-head, PEFT, DDP, FSDP and compile wrappers.

    Injected adapter layers stay in it and stay active: its forward gives the same logits.
    """
    *_, innermost = unwrapped(model)
    if not isinstance(innermost, PreTrainedModel):
        raise ModelError(
            f"there is no transformers model inside {type(model).__name__} (innermost: "
            f"{type(innermost).__name__}); expected a PreTrainedModel or a value-head, PEFT or DDP wrapper"
        )
    return innermost


def decoder_of(model: nn.Module) -> PreTrainedModel:
    """The decoder inside `trunk_of(model)`, without a head: its forward gives the last hidden states."""
    decoder = trunk_of(model).base_model
    assert isinstance(decoder, PreTrainedModel)
    return decoder
