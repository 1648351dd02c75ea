"""A reward model as a second adapter on the policy's own base weights ("multi-adapter RL").

One copy of the base serves policy, reference (adapters off) and reward model. Covers adapters of weights that
PEFT saved for sequence classification, with their score head. Not covered: training one, and adapters with
further modules of their own (`modules_to_save` besides the score), and encoder-decoders.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from peft import (
    PeftConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from torch import Tensor, nn
from transformers import PreTrainedModel

from etude.errors import ModelError
from etude.models.adapters import current_peft, find_adapter
from etude.models.encoder_decoder import is_encoder_decoder
from etude.models.places import explained, locate
from etude.models.wrappers import decoder_of, trunk_of, unwrapped

DEFAULT_NAME = "reward_model_adapter"  # TRL's

# peft has written the trained copy of the score layer under each of these.
_SCORE = re.compile(r"(?:^|\.)score\.(?:modules_to_save\.)?(?:[^.]+\.)?(weight|bias)$")


class RewardAdapter:
    """An adapter with a score head beside the policy's adapter. Not a module: its weights are the model's.

    Nothing of it is trained, and nothing of the policy changes by scoring: afterwards the same adapters are
    active, the same parameters train.

    Args:
        model: it lies on this model.
        name: of the adapter.
        score: from the last hidden states to one score per label.
    """

    def __init__(self, model: PeftModel, name: str, score: nn.Linear) -> None:
        self.model = model
        self.name = name
        self.score = score.requires_grad_(False).eval()

    @classmethod
    def load(
        cls, model: nn.Module, source: str | os.PathLike[str], name: str = DEFAULT_NAME, **place: Any
    ) -> Self:
        """Put a saved reward adapter on a model that carries the policy's adapter.

        Args:
            model: with adapters, inside whatever wrapper.
            source: directory or hub id of the adapter.
            name: for the adapter, on this model.
            place: `revision`, `token`, … of the hub.

        Raises:
            ModelError: the model has no adapters, has one of that name, or isn't of the kind that the reward
                adapter was trained on; or `source` is no reward adapter.
        """
        peft = adapted(model)
        if peft is None:
            raise ModelError(
                "a reward adapter goes beside the policy's adapter, and this model has none; load the model "
                "with a peft_config"
            )
        if name in peft.peft_config:
            raise ModelError(
                f"the model has an adapter {name!r} already (it has {', '.join(peft.peft_config)}); choose "
                "another reward_adapter_name"
            )
        if is_encoder_decoder(trunk_of(peft)):
            raise ModelError(
                "a reward adapter scores what a decoder reads, and this is an encoder-decoder model; score "
                "with a reward model of its own (ModelReward)"
            )
        source = locate(source, "a reward adapter")
        config, weights, score = _saved(source, place)
        with _kept_as_it_is(peft), explained("the reward adapter", source):
            peft.add_adapter(name, config)
            try:
                _fill(peft, weights, name, source)
            except ModelError:
                peft.delete_adapter(name)
                raise
        for parameter_name, parameter in peft.named_parameters():
            if f".{name}." in f"{parameter_name}.":
                parameter.requires_grad_(False)
        return cls(peft, name, score)

    @torch.no_grad()
    def scores(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Scores [B, T, L] of L labels after each token, in float32 (or float64).

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], 1 for tokens and 0 for padding.
            kwargs: for the decoder's forward.
        """
        with _kept_as_it_is(self.model):
            self.model.eval()
            _activate(self.model, [self.name])
            inputs = {"use_cache": False, **kwargs, "input_ids": input_ids, "attention_mask": attention_mask}
            states_BTD = decoder_of(self.model)(**{**inputs, "return_dict": True}).last_hidden_state
        self.score.to(states_BTD.device)
        with torch.autocast(states_BTD.device.type, enabled=False):
            scores_BTL: Tensor = self.score(states_BTD.to(self.score.weight.dtype))
        return scores_BTL


def adapted(model: nn.Module) -> PeftModel | None:
    """The model with adapters inside its wrappers, if there is one."""
    return next((module for module in unwrapped(model) if isinstance(module, PeftModel)), None)


def policy_adapters(model: PeftModel) -> list[str]:
    """Names of the adapters that are not reward models."""
    return [name for name, config in model.peft_config.items() if config.task_type != TaskType.SEQ_CLS]


def merged_with_reward_adapter(
    base: PreTrainedModel, source: str, **place: Any
) -> tuple[PreTrainedModel, nn.Linear]:
    """A language model with a saved reward adapter merged into its weights, and the adapter's score layer."""
    config, weights, score = _saved(source, place)
    config.task_type = TaskType.CAUSAL_LM  # so that peft looks for no score layer
    with explained("the reward adapter", source), current_peft():
        model = get_peft_model(base, config)
        _fill(model, weights, "default", source)
        merged = model.merge_and_unload()
    assert isinstance(merged, PreTrainedModel)
    return merged.requires_grad_(True), score  # peft had frozen the base


def _saved(source: str, place: dict[str, Any]) -> tuple[PeftConfig, dict[str, Tensor], nn.Linear]:
    """Configuration and weights without the score layer, and that."""
    config = find_adapter(source, place)
    if config is None:
        raise ModelError(
            f"{source!r} holds no adapter_config.json; expected a LoRA adapter that peft saved for sequence "
            "classification"
        )
    if config.is_prompt_learning:
        raise ModelError(f"{source!r} is a {config.peft_type} adapter; expected LoRA, or another of weights")
    with explained("the reward adapter", source):
        weights = load_peft_weights(source, device="cpu", **place)
    score = {found[1]: weights.pop(key) for key in list(weights) if (found := _SCORE.search(key))}
    if "weight" not in score:
        raise ModelError(
            f"the adapter in {source!r} has no score layer; expected one trained for sequence classification "
            '(task_type="SEQ_CLS"), which peft saves with its score layer'
        )
    config.inference_mode = True
    if hasattr(config, "modules_to_save"):
        config.modules_to_save = None  # a language model has no score layer
    return config, weights, _linear(score)


def _linear(state: dict[str, Tensor]) -> nn.Linear:
    labels, width = state["weight"].shape
    layer = nn.Linear(width, labels, bias="bias" in state)
    layer.to(torch.float64 if state["weight"].dtype == torch.float64 else torch.float32)
    layer.load_state_dict(state)
    return layer


def _fill(model: PeftModel, weights: dict[str, Tensor], name: str, source: str) -> None:
    try:
        result: Any = set_peft_model_state_dict(model, weights, adapter_name=name)
    except RuntimeError as error:  # a shape that doesn't fit
        raise ModelError(f"the reward adapter in {source!r} doesn't fit this base model: {error}") from error
    missing = [key for key in result.missing_keys if f".{name}." in f"{key}."]
    if result.unexpected_keys or missing:
        strange = (result.unexpected_keys or missing)[0]
        raise ModelError(
            f"the reward adapter in {source!r} doesn't fit this base model: {strange!r} is in one and not in "
            "the other. It was trained on another kind of model, or with modules_to_save besides the score"
        )


@contextmanager
def _kept_as_it_is(model: PeftModel) -> Iterator[None]:
    """Afterwards the same adapters are active, the same parameters train, the same modules in train mode."""
    active = list(model.active_adapters)
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        _activate(model, active)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        for module, training in modes:
            module.training = training


def _activate(model: PeftModel, names: list[str]) -> None:
    tuner: Any = model.base_model  # whose `set_adapter` takes several; PeftModel's own choice stays
    tuner.set_adapter(names)
