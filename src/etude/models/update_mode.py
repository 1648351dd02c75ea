"""The mode in which a policy is updated: evaluation, with activation checkpointing where it is enabled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


@contextmanager
def update_mode(policy: nn.Module) -> Iterator[None]:
    """Inside, `policy` computes as it did when it was observed, with activation checkpointing where enabled.

    That is evaluation mode: dropout, a router's jitter or a skipped layer would make the first ratio of a
    batch differ from 1, and the update would answer noise. What checkpoints asks for training mode, and gets
    it until it computes.
    """
    policy.eval()
    enabled: list[Any] = [m for m in policy.modules() if getattr(m, "gradient_checkpointing", False)]
    layers: list[Any] = [m for m in enabled if isinstance(m, GradientCheckpointingLayer)]
    # In older modelling code it is not the layers but the model around them.
    before = [(module, module._gradient_checkpointing_func) for module in layers or enabled]
    for module, function in before:
        module.training = True
        module._gradient_checkpointing_func = partial(_checkpointed, module, function)
    try:
        yield
    finally:
        for module, function in before:
            module.training = False
            module._gradient_checkpointing_func = function


def _checkpointed(module: nn.Module, checkpoint: Callable[..., Any], forward: Any, *args: Any) -> Any:
    def in_evaluation_mode(*args: Any) -> Any:
        module.training = False
        try:
            return forward(*args)
        finally:
            module.training = True

    return checkpoint(in_evaluation_mode, *args)
