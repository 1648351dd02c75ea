"""A value model of its own: a decoder without language-model head, and a value head on its last states.

For a critic that doesn't share the policy's trunk, so that learning values moves nothing in the policy. It
starts from a language model, with a fresh head, or from a reward model, whose score head becomes the value
head (Stiennon et al. 2020, "Learning to summarize from human feedback", section 3.4). Not covered:
encoder-decoder models, reward models on encoders (which see the future), offloaded parts.
"""

from __future__ import annotations

import os
from typing import Any, Self

import torch
from peft import PeftModel, TaskType, load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from etude.errors import ModelError
from etude.models.adapters import base_of, find_adapter
from etude.models.head_files import load_head, save_head
from etude.models.loading import load_causal_lm, load_decoder
from etude.models.places import HUB_OPTIONS, explained, locate
from etude.models.reward_adapter import merged_with_reward_adapter
from etude.models.with_value_head import ModelWithValueHead, ValueHead
from etude.models.wrappers import decoder_of, trunk_of


class ValueModel(nn.Module):
    """A decoder, `model`, and a value head, `v_head`.

    What is given is taken over, not copied: training moves it.

    Args:
        model: a decoder of transformers, of which a language-model head is left out; a sequence classifier
            with one label, whose `score` layer becomes the value head; or a `PeftModel` around a language
            model, whose adapters are trained then.
        v_head: instead of a fresh one, or the one made of `score`.

    Raises:
        ModelError: the model can't give a value to each token.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, v_head: ValueHead | None = None) -> None:
        super().__init__()
        _check_can_give_values(model)
        if v_head is None:
            v_head = _fresh_head(model) if isinstance(model, PeftModel) else _head_of(model)
        self.model = model if isinstance(model, PeftModel) else decoder_of(model)
        self.v_head = v_head
        self.train(model.training)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str] | PreTrainedModel | PeftModel | ModelWithValueHead,
        **options: Any,
    ) -> Self:
        """A value model, made of a model or loaded from a directory or hub id.

        Args:
            source: a language model, a value-head model or a reward model: loaded already, or where it is.
                Also what `save_pretrained` wrote. A LoRA adapter of a language model stays one; that of a
                reward model is merged into its base.
            options: see `load_causal_lm`; for a place only.

        Raises:
            ModelError: the model can't be found or can't give values.
        """
        if isinstance(source, ModelWithValueHead):
            return cls(source.pretrained_model, source.v_head)
        if isinstance(source, PreTrainedModel | PeftModel):
            return cls(source)
        if not isinstance(source, str | os.PathLike):
            raise ModelError(
                f"the value model is a {type(source).__name__}; expected a language model or a reward model "
                "of transformers, a value-head model, or a directory or hub id"
            )
        name = locate(source, "a value model")
        place = {key: options[key] for key in HUB_OPTIONS if options.get(key) is not None}
        adapter = find_adapter(name, place)
        if adapter is not None and adapter.task_type == TaskType.SEQ_CLS:
            base = load_causal_lm(base_of(adapter, name), **{**options, "revision": adapter.revision})
            assert isinstance(base, PreTrainedModel)
            merged, score = merged_with_reward_adapter(base, name, **place)
            return cls(merged, _head_from(score))
        trunk = load_decoder(name, **options) if adapter is None else load_causal_lm(name, **options)
        model = cls(trunk)
        if not _is_classifier(trunk_of(trunk)):
            with explained("the value head", name):
                load_head(model.v_head, name, place)
        return model

    @property
    def config(self) -> PreTrainedConfig:
        """The decoder's configuration."""
        return trunk_of(self.model).config

    @property
    def dtype(self) -> torch.dtype:
        """Of the decoder's weights; the head has its own."""
        return trunk_of(self.model).dtype

    def forward(self, **inputs: Any) -> Tensor:
        """Values [B, T] in float32 (or float64); the inputs are the decoder's."""
        # The decoder itself, also inside a PeftModel: a language-model head there is not computed.
        states_BTD = decoder_of(self.model)(**{**inputs, "return_dict": True}).last_hidden_state
        values_BT1: Tensor = self.v_head(states_BTD)
        return values_BT1.squeeze(-1)

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Save so that `from_pretrained` gives equal values: the decoder (or adapter), the head beside it."""
        directory = os.fspath(save_directory)
        os.makedirs(directory, exist_ok=True)
        self.model.save_pretrained(directory)
        save_head(self.v_head.state_dict(), directory)

    def load_weights(self, directory: str | os.PathLike[str]) -> None:
        """Read what `save_pretrained` wrote back into this model's own tensors."""
        name = os.fspath(directory)
        if isinstance(self.model, PeftModel):  # the directory holds its adapter only
            set_peft_model_state_dict(self.model, load_peft_weights(name, device="cpu"))
        else:
            saved = type(self.model).from_pretrained(name, dtype=self.dtype)
            self.model.load_state_dict(saved.state_dict())
        load_head(self.v_head, name, {})


def _check_can_give_values(model: PreTrainedModel | PeftModel) -> None:
    trunk = trunk_of(model)
    if isinstance(model, PeftModel):
        if model.active_peft_config.is_prompt_learning:
            raise ModelError(
                f"{model.active_peft_config.peft_type} adapters put virtual tokens before the text, which "
                "have no place among the values; use LoRA or another adapter of weights"
            )
        if _is_classifier(trunk):
            raise ModelError(
                "the reward model carries adapters, which hold its score layer; merge them first: "
                "value_model=reward_model.merge_and_unload()"
            )
    if trunk.config.is_encoder_decoder:
        raise ModelError(f"{type(trunk).__name__} is an encoder-decoder model; expected a decoder")
    if any(parameter.is_meta for parameter in trunk.parameters()):
        raise ModelError(
            "parts of the value model are offloaded to CPU or disk, where they can't be trained; load the "
            "whole of it onto one device"
        )


def _is_classifier(model: PreTrainedModel) -> bool:
    return type(model).__name__.endswith("ForSequenceClassification")


def _head_of(model: PreTrainedModel) -> ValueHead:
    if not _is_classifier(model):
        return _fresh_head(model)
    score = getattr(model, "score", None)
    if not isinstance(score, nn.Linear):
        raise ModelError(
            f"{type(model).__name__} has no linear layer `score`; expected a decoder's sequence classifier: "
            "another kind sees the tokens to come"
        )
    return _head_from(score)


def _head_from(score: nn.Linear) -> ValueHead:
    """A value head that gives what the score layer gives, without dropout."""
    if score.out_features != 1:
        raise ModelError(
            f"the reward model scores {score.out_features} labels; a value is one number: expected a model "
            "trained with num_labels=1"
        )
    head = _precise(ValueHead(score.in_features, summary_dropout_prob=0.0), score.weight)
    with torch.no_grad():
        head.summary.weight.copy_(score.weight)
        head.summary.bias.copy_(torch.zeros(1) if score.bias is None else score.bias)
    return head


def _fresh_head(model: nn.Module) -> ValueHead:
    config = decoder_of(model).config.get_text_config()
    width = getattr(config, "word_embed_proj_dim", None) or config.hidden_size  # OPT's states are projected
    head = ValueHead(width, summary_dropout_prob=getattr(config, "summary_dropout_prob", 0.1))
    return _precise(head, next(decoder_of(model).parameters()))


def _precise(head: ValueHead, weight: Tensor) -> ValueHead:
    """On the weight's device, in float32 on a trunk in half precision: a critic has to take small steps."""
    return head.to(weight.device, torch.float64 if weight.dtype == torch.float64 else torch.float32)
