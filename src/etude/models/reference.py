"""Reference policies: what the trained policy is held close to.

Two ways to have one: a frozen copy, which may share its first layers with the policy, and the policy's
own base model, seen by switching its adapters off. Not covered: a reference that moves (none of our
losses uses one), and copies of models that are sharded over processes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import TypeVar

from peft import PeftModel
from torch import nn

from etude.errors import ModelError
from etude.models.encoder_decoder import is_encoder_decoder
from etude.models.wrappers import trunk_of, unwrapped

Model = TypeVar("Model", bound=nn.Module)


def create_reference_model(
    model: Model, num_shared_layers: int | None = None, pattern: str | None = None
) -> Model:
    """A frozen copy of a model, in eval mode.

    Args:
        model: a transformers model or a value-head model around one.
        num_shared_layers: None copies everything. k shares the embeddings and the first k layers: they are
            the same tensors in both models, so they cost no memory and are frozen in **both** (with tied
            embeddings, the output head too). The layers are a decoder's; of an encoder-decoder the whole
            encoder is shared besides.
        pattern: how the layers are named, e.g. "transformer.h.{layer}"; needed only where they are not found.

    Raises:
        ModelError: there are fewer than k layers, the layers are not found, or DeepSpeed ZeRO-3 has spread
            the weights over processes.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ModelError(
            "the model's weights are spread over processes by DeepSpeed ZeRO-3 and can't be copied here; "
            "load the reference model a second time from where the model came from"
        )
    if num_shared_layers is None:
        if pattern is not None:
            raise ModelError("pattern says which layers to share; give num_shared_layers with it")
        shared = []
    else:
        shared = _first_parameters(model, num_shared_layers, pattern)
    # What deepcopy finds in its memo it takes for copied: so the copy holds the shared tensors themselves,
    # and freezing the copy freezes them in the model too.
    reference = copy.deepcopy(model, {id(parameter): parameter for parameter in shared})
    return reference.requires_grad_(False).eval()


@contextmanager
def reference_by_disabled_adapters(model: Model) -> Iterator[Model]:
    """Inside, a model with PEFT adapters computes as the base model that it was made from.

    The base weights are frozen in adapter training, so they are the reference policy: no copy needed. Which
    parameters train is the same afterwards, whatever happens inside.

    Raises:
        ModelError: the model carries no adapters.
    """
    adapted = next((module for module in unwrapped(model) if isinstance(module, PeftModel)), None)
    if adapted is None:
        raise ModelError(
            f"{type(model).__name__} carries no adapters to switch off; load it with a peft_config, or use "
            "create_reference_model for a frozen copy"
        )
    trained = [(parameter, parameter.requires_grad) for parameter in adapted.parameters()]
    try:
        with adapted.disable_adapter():
            yield model
    finally:
        # peft makes every active adapter trainable when it switches it on again, a frozen one too.
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)


def _first_parameters(model: nn.Module, num_layers: int, pattern: str | None) -> list[nn.Parameter]:
    layers = _layers_by_name(model, pattern) if pattern is not None else _layers(model)
    if not 0 <= num_layers <= len(layers):
        raise ModelError(
            f"num_shared_layers is {num_layers}, but the model has {len(layers)} layers; "
            f"expected 0 (no layer, but what comes before them) to {len(layers)}, or None to copy everything"
        )
    later = {module for layer in layers[num_layers:] for module in layer.modules()}
    embeddings = [
        module for module in model.modules() if isinstance(module, nn.Embedding) and module not in later
    ]
    trunk = trunk_of(model)
    encoder = [trunk.get_encoder()] if is_encoder_decoder(trunk) else []
    shared = [*embeddings, *encoder, *layers[:num_layers]]
    return [parameter for module in shared for parameter in module.parameters()]


def _layers(model: nn.Module) -> Sequence[nn.Module]:
    """The decoder's list of layers: the outermost one that is as long as the configuration says."""
    trunk = trunk_of(model)
    config = trunk.config.get_text_config()
    # Where an encoder has layers too, `num_hidden_layers` is the number of those.
    names = ("num_decoder_layers", "decoder_layers", "num_hidden_layers")
    depth = next((number for name in names if (number := getattr(config, name, None)) is not None), None)
    for module in trunk.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return list(module)
    raise ModelError(
        f"no list of {depth} layers was found in {type(trunk).__name__}; say how the layers are named, e.g. "
        'pattern="transformer.h.{layer}"'
    )


def _layers_by_name(model: nn.Module, pattern: str) -> Sequence[nn.Module]:
    if "{layer}" not in pattern:
        raise ModelError(f'pattern is {pattern!r}; expected {{layer}} in it, e.g. "transformer.h.{{layer}}"')
    by_name = {f".{name}": module for name, module in model.named_modules()}
    layers: list[nn.Module] = []
    for index in count():
        name = "." + pattern.replace("{layer}", str(index))
        layer = next((module for full, module in by_name.items() if full.endswith(name)), None)
        if layer is None:
            break
        layers.append(layer)
    if not layers:
        raise ModelError(
            f"no layer of {type(model).__name__} is named as the pattern {pattern!r} says; look at the names "
            "in model.named_modules()"
        )
    return layers
