"""Models that score text: from a directory or the hub, with a fresh head or the one they were trained with.

Covers full models, and LoRA adapters, whose base is found through their own configuration and whose head is
saved beside them (`modules_to_save`). A head is never left at random in silence: what should have one and has
none is refused, unless a fresh one is asked for. Not covered: a reward adapter on the policy's own base
(`reward_adapter`), which shares its weights.
"""

from __future__ import annotations

import copy
import os
import re
from typing import Any

import torch
from peft import PeftConfig, PeftModel, load_peft_weights
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from etude.errors import ModelError
from etude.models.adapters import add_adapter, base_of, current_peft, find_adapter, said_of_base
from etude.models.head_files import load_head
from etude.models.loading import checked_dtype, load_causal_lm, quiet_about
from etude.models.places import HUB_OPTIONS, explained, locate
from etude.models.score_head import (
    AUTO_CLASSES,
    LABELS,
    TASK_TYPES,
    Kind,
    check_labels,
    head_modules,
    kind_of,
    score_layer,
    with_score_head,
)
from etude.models.with_value_head import ValueHead


def load_reward_model(
    name_or_path: str | os.PathLike[str],
    kind: Kind = "sequence",
    *,
    fresh: bool = False,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    is_trainable: bool = True,
    **options: Any,
) -> PreTrainedModel | PeftModel:
    """A model that scores sequences (a reward model) or tokens (a process reward model), in eval mode.

    Args:
        name_or_path: a checkpoint, or a LoRA adapter whose configuration names its base model.
        kind: "sequence" or "token".
        fresh: where there is no score head, but a language model or an encoder without one, make one. That of
            a value-head checkpoint becomes the score head, without its bias.
        dtype: of the weights; "auto" takes the checkpoint's.
        device: where to; None leaves the model where transformers puts it.
        trust_remote_code: run Python code that comes with the checkpoint; pin `revision` if you do.
        is_trainable: False freezes all parameters.
        options: anything else that transformers' `from_pretrained` knows.

    Raises:
        ModelError: there is no such place, or no such model in it, or an option is unknown.
    """
    name = locate(name_or_path, "a reward model")
    place = {key: options[key] for key in HUB_OPTIONS if options.get(key) is not None}
    options = {key: value for key, value in options.items() if value is not None}
    options |= {"dtype": checked_dtype(dtype), "trust_remote_code": trust_remote_code}
    adapter = find_adapter(name, place)
    model: nn.Module
    if adapter is None:
        model = _load_classifier(name, kind, fresh, options, place)
    elif adapter.task_type == TASK_TYPES[kind]:
        weights = load_peft_weights(name, device="cpu", **place)
        base = {**options, "revision": adapter.revision}
        base.pop("subfolder", None)
        with said_of_base(name):
            at = base_of(adapter, name)
            model = _load_classifier(at, kind, True, base, {"revision": adapter.revision})
        _check_head_is_saved(model, weights, name)
        with explained("the adapter", name), current_peft():
            model = PeftModel.from_pretrained(model, name, is_trainable=is_trainable, **place)
    elif fresh and adapter.task_type in ("CAUSAL_LM", None):
        language_model: Any = load_causal_lm(name, **options)
        model = with_score_head(language_model.merge_and_unload().requires_grad_(True), kind)
    else:
        raise ModelError(
            f"the adapter in {name!r} was trained for {adapter.task_type}; expected {TASK_TYPES[kind]}, "
            "with a score head"
        )
    if not is_trainable:
        model.requires_grad_(False)
    assert isinstance(model, PreTrainedModel | PeftModel)
    return model.eval() if device is None else model.eval().to(device)


def kind_in(name_or_path: str | os.PathLike[str], **place: Any) -> Kind | None:
    """What the model in a directory or hub repository scores; None for any other model.

    Raises:
        ModelError: there is no such place, or no model in it.
    """
    name = locate(name_or_path, "a reward model")
    adapter = find_adapter(name, place)
    if adapter is not None:
        return next((kind for kind, task in TASK_TYPES.items() if task == adapter.task_type), None)
    with explained("the model", name):
        return kind_of(list(AutoConfig.from_pretrained(name, **place).architectures or ()))


def add_scoring_adapter(model: PreTrainedModel, peft_config: PeftConfig) -> PeftModel:
    """Put a fresh adapter on a model that scores; the head is trained with it, and saved beside it.

    Raises:
        ModelError: it isn't an adapter of weights, or can't be put on this model.
    """
    kind = kind_of(model)
    assert kind is not None
    if isinstance(peft_config, PeftConfig) and peft_config.is_prompt_learning:
        raise ModelError(
            f"{peft_config.peft_type} adapters put virtual tokens before the text, which have no place among "
            "the tokens to score; use LoRA or another adapter of weights"
        )
    if not hasattr(peft_config, "modules_to_save"):
        raise ModelError(
            f"a {type(peft_config).__name__} can't save a score head with the adapter (modules_to_save); use "
            "LoRA"
        )
    config = copy.deepcopy(peft_config)
    config.task_type = TASK_TYPES[kind]
    config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or ()), *head_modules(model)]))
    return add_adapter(model, config)


def _load_classifier(
    name: str, kind: Kind, fresh: bool, options: dict[str, Any], place: dict[str, Any]
) -> PreTrainedModel:
    """A full model. Of what is missing there, only what no language model has may start at random."""
    auto = AUTO_CLASSES[kind]
    with explained("the model", name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=options["trust_remote_code"], **place)
    found = kind_of(list(config.architectures or ()))
    if found == kind:
        check_labels(kind, config.num_labels, repr(name))
    elif not fresh or found is not None:
        architectures = ", ".join(config.architectures or ()) or config.model_type
        raise ModelError(
            f"{name!r} holds a model of another kind, {architectures}; expected one that scores "
            f"{kind}s, as {auto.__name__} loads it and {_TRAINERS[kind]} saves it"
        )
    with explained("the model", name), quiet_about(*_REPLACED if found is None else ()) as seen:
        loaded: Any = auto.from_pretrained(name, num_labels=LABELS[kind], output_loading_info=True, **options)
        model, seen["info"] = loaded
    _check_nothing_is_missing(model, seen["info"]["missing_keys"], name, headless=found is None)
    if found is None and kind == "sequence":
        _take_value_head(model, name, place)
    return model


# Names of weights whose absence and presence is nothing to report where a head is replaced.
_REPLACED = (re.compile(""), re.compile(""))
_TRAINERS: dict[Kind, str] = {"sequence": "RewardTrainer", "token": "PRMTrainer"}


def _check_nothing_is_missing(model: PreTrainedModel, missing: Any, name: str, headless: bool) -> None:
    heads = head_modules(model) if headless else {}
    strange = sorted(key for key in missing if not set(key.split(".")) & set(heads))
    if strange:
        raise ModelError(
            f"the checkpoint in {name!r} lacks {strange[0]!r}"
            + (f" and {len(strange) - 1} more" if strange[1:] else "")
            + f", which {type(model).__name__} needs; it would be random. Was it saved from another model?"
        )


@torch.no_grad()
def _take_value_head(model: PreTrainedModel, name: str, place: dict[str, Any]) -> None:
    """Start from the head of a value-head checkpoint, if there is one."""
    _, layer = score_layer(model)
    if not isinstance(layer, nn.Linear):
        return
    head = ValueHead(layer.in_features, summary_dropout_prob=0.0).to(layer.weight.dtype)
    head.summary.weight.copy_(layer.weight)  # and stays, where no head is found
    with explained("the value head", name):
        load_head(head, name, place)
    layer.weight.copy_(head.summary.weight)


def _check_head_is_saved(model: PreTrainedModel, weights: dict[str, Any], name: str) -> None:
    layer, _ = score_layer(model)
    if not any(f".{layer}." in f".{key}" for key in weights):
        raise ModelError(
            f"the adapter in {name!r} was saved without the score head, {layer!r}; expected one that was "
            "trained with it (modules_to_save)"
        )
