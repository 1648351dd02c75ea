"""Heads that score text instead of continuing it: one score per sequence, or two labels per token.

Transformers' own classes, `…ForSequenceClassification` and `…ForTokenClassification`, so that whatever loads
those loads a reward model of ours. Covered: what such a model's head is, and a head on a language model that
is loaded already. Not covered: loading (`reward_model`), scores (`score_reader`).
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from etude.errors import ModelError
from etude.models.value_model import ValueModel
from etude.models.with_value_head import ModelWithValueHead
from etude.models.wrappers import decoder_of, trunk_of

Kind = Literal["sequence", "token"]

# A reward is one number; a step is wrong or right.
LABELS: dict[Kind, int] = {"sequence": 1, "token": 2}
AUTO_CLASSES: dict[Kind, Any] = {
    "sequence": AutoModelForSequenceClassification,
    "token": AutoModelForTokenClassification,
}
TASK_TYPES: dict[Kind, str] = {"sequence": "SEQ_CLS", "token": "TOKEN_CLS"}
_SUFFIXES: dict[Kind, str] = {"sequence": "ForSequenceClassification", "token": "ForTokenClassification"}
_MAPPINGS: dict[Kind, Any] = {
    "sequence": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "token": MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
}


def kind_of(model: nn.Module | list[str]) -> Kind | None:
    """What a model, or one of such architectures, scores; None for any other."""
    names = model if isinstance(model, list) else [type(trunk_of(model)).__name__]
    return next((kind for kind, end in _SUFFIXES.items() if any(n.endswith(end) for n in names)), None)


def check_labels(kind: Kind, labels: int | None, where: str) -> None:
    """Raise `ModelError` unless a model of this kind has as many labels as its scores need."""
    if labels != LABELS[kind]:
        wanted = {"sequence": "one, a reward", "token": "two, a step's wrong and right"}[kind]
        raise ModelError(
            f"{where} has {labels} labels; expected {wanted}: a model trained with num_labels={LABELS[kind]}"
        )


def head_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """By name, what is trained beside the trunk, whatever trains it: layers after it, and BERT's pooler.

    Of a model that started as a language model none of it comes from there.
    """
    heads = {name: module for name, module in model.named_children() if name != model.base_model_prefix}
    pooler = getattr(model.base_model, "pooler", None)
    if isinstance(pooler, nn.Module) and pooler is not model:
        heads["pooler"] = pooler
    return {name: module for name, module in heads.items() if any(True for _ in module.parameters())}


def score_layer(model: PreTrainedModel) -> tuple[str, nn.Module]:
    """The last layer, which gives the scores, and its name."""
    heads = {name: module for name, module in head_modules(model).items() if name != "pooler"}
    if not heads:
        raise ModelError(f"{type(model).__name__} has no layer after its trunk that could give scores")
    return list(heads.items())[-1]


def with_score_head(model: nn.Module, kind: Kind) -> PreTrainedModel | PeftModel:
    """A model that scores, made of one that is loaded; its trunk is taken over, not copied.

    Args:
        model: a model that scores already, and stays as it is; a language model, which gets a fresh head; a
            value-head model or a `ValueModel`, whose head becomes the score head. That one's bias is left
            out: all scores have it in common.
        kind: what to score.

    Raises:
        ModelError: the model has another number of labels, or adapters of another task, or transformers has
            no such class for its family.
    """
    if isinstance(model, PreTrainedModel | PeftModel) and kind_of(model) is not None:
        if kind_of(model) != kind:
            raise ModelError(
                f"{type(trunk_of(model)).__name__} scores {_SCORES[kind_of(model)]}; expected a model that "
                f"scores {_SCORES[kind]}, or a language model"
            )
        check_labels(kind, trunk_of(model).config.num_labels, f"the {type(trunk_of(model)).__name__}")
        return model
    weight = None
    if isinstance(model, ModelWithValueHead | ValueModel):
        weight = model.v_head.summary.weight.detach() if kind == "sequence" else None
        model = model.model if isinstance(model, ValueModel) else model.pretrained_model
    if isinstance(model, PeftModel):
        raise ModelError(
            "the model carries adapters of a language model; merge them first: "
            "model = model.merge_and_unload()"
        )
    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"the model is a {type(model).__name__}; expected one of transformers, a value-head model or a "
            "ValueModel"
        )
    return _on_trunk_of(model, kind, weight)


_SCORES: dict[Kind | None, str] = {"sequence": "sequences", "token": "tokens"}


def _on_trunk_of(model: PreTrainedModel, kind: Kind, weight: Tensor | None) -> PreTrainedModel:
    found = _MAPPINGS[kind].get(type(model.config), None)
    cls = found[0] if isinstance(found, tuple | list) else found
    if cls is None:
        raise ModelError(
            f"transformers has no {_SUFFIXES[kind]} for {model.config.model_type} models; expected a family "
            "that has one"
        )
    config = copy.deepcopy(model.config)
    config.num_labels = LABELS[kind]
    config.architectures = [cls.__name__]
    with torch.device("meta"):
        scorer: PreTrainedModel = cls(config)
    trunk = decoder_of(model)
    if lacking := dict(scorer.base_model.named_children()).keys() - dict(trunk.named_children()).keys():
        raise ModelError(
            f"{type(model).__name__} lacks {', '.join(sorted(lacking))}, which {cls.__name__} has; give its "
            "name or path instead of the model, or load it with "
            f"{AUTO_CLASSES[kind].__name__}.from_pretrained(…, num_labels={LABELS[kind]})"
        )
    if trunk is model:  # T5: the parts lie in the language model itself, with no model around them
        for name, _ in list(scorer.base_model.named_children()):
            setattr(scorer.base_model, name, getattr(model, name))
    else:
        setattr(scorer, scorer.base_model_prefix, trunk)
    for module in head_modules(scorer).values():
        if any(parameter.is_meta for parameter in module.parameters()):
            module.to_empty(device=trunk.device).to(trunk.dtype)
            module.apply(scorer._init_weights)
    if weight is not None:
        _, layer = score_layer(scorer)
        if not isinstance(layer, nn.Linear) or layer.weight.shape != weight.shape:
            raise ModelError(
                f"the value head makes a value of {weight.shape[1]} numbers, and {cls.__name__} has no such "
                "layer; give the language model without the value head"
            )
        with torch.no_grad():
            layer.weight.copy_(weight)
            if layer.bias is not None:
                layer.bias.zero_()
    return scorer.train(model.training)
