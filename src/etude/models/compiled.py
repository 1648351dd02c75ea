"""Compiled decoder layers: norms, rotations, activations and residuals fused, for sampling and training.

Layer by layer, not the whole model: all layers of a kind share one compilation of a few seconds for each of
the ways they are called (with gradients and without, in autocast's precision), for any number of tokens. The
packed attention stays as it is, between the compiled halves of its layer. Calls without a plan (`generate`)
run as before: their caches are other objects in each layer, and each would be compiled for itself. A CPU
gains little from it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from etude.models.attention import is_packed
from etude.models.plans import PLAN
from etude.models.wrappers import decoder_of


def compile_layers(model: nn.Module, **options: Any) -> int:
    """Compile the layers of `model`, after it was found that it can be packed (`packing.supports_packing`).

    Args:
        model: a causal language model, in its wrappers.
        options: of `torch.compile`.

    Returns:
        How many layers are compiled from now on; 0 for a family whose attention isn't the packed one, or
        whose layers can't be told.
    """
    decoder = decoder_of(model)
    name = decoder.config._attn_implementation
    if not is_packed(name):
        return 0
    # Attention's plans are Python, different at every step. Here, since to import the compiler takes seconds.
    ALL_ATTENTION_FUNCTIONS.register(name, torch.compiler.disable(ALL_ATTENTION_FUNCTIONS[name]))
    layers = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        layer.compile(**{"dynamic": True, **options})
        compiled: Any = layer._compiled_call_impl
        # Where `compile` puts it: copies of the layer, such as a reference policy, leave it behind.
        layer._compiled_call_impl = partial(_with_plan, layer, compiled)
    return len(layers)


def _with_plan(layer: nn.Module, compiled: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return (compiled if PLAN in kwargs else layer._call_impl)(*args, **kwargs)
