"""A value model beside the policy: made of what the caller gives, checked, and given to an optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from etude.errors import ConfigError, ModelError
from etude.models.encoder_decoder import is_encoder_decoder
from etude.models.value_model import ValueModel
from etude.models.wrappers import trunk_of
from etude.trainers.ppo_config import PPOConfig
from etude.trainers.setup import Policy, without_value_head


def critic_of(source: Any, policy: Policy) -> ValueModel:
    """`value_model` as `PPOTrainer` takes it. What has to be loaded is loaded in the policy's precision.

    Raises:
        ConfigError: it is made of the policy's own weights.
        ModelError: it can't give values, or the policy is an encoder–decoder.
    """
    if is_encoder_decoder(trunk_of(policy)):
        raise ModelError(
            f"{type(trunk_of(policy)).__name__} is an encoder-decoder model, which can't have a value model "
            "of its own; leave value_model out: a value head on the policy's decoder gives the values"
        )
    if isinstance(source, str | Path):
        model = ValueModel.from_pretrained(source, dtype=policy.dtype)
    else:
        model = source if isinstance(source, ValueModel) else ValueModel.from_pretrained(source)
    own = set(policy.parameters())
    if any(parameter in own for parameter in model.parameters()):
        raise ConfigError(
            "value_model is made of the policy's own weights; pass a copy (copy.deepcopy), or leave it out "
            "for a value head on the policy's trunk"
        )
    return model


def without_own_head(model: Any) -> Policy:
    """The policy beside a value model: a value head that it came with would be trained by nothing."""
    return without_value_head(getattr(model, "pretrained_model", model))


def check_vocabulary(critic: ValueModel, tokenizer: PreTrainedTokenizerBase) -> None:
    embeddings: Any = trunk_of(critic.model).get_input_embeddings()
    if embeddings.weight.shape[0] < len(tokenizer):
        raise ModelError(
            f"the value model knows {embeddings.weight.shape[0]} tokens and the policy's tokenizer has "
            f"{len(tokenizer)}; expected a model of the same tokenizer: both read the same token ids"
        )


def optimizer_of(
    config: PPOConfig, policy: Policy, critic: ValueModel | None, optimizer: torch.optim.Optimizer | None
) -> torch.optim.Optimizer | None:
    """What trains both; without a critic, what is given (None: the policy's own default).

    Raises:
        ConfigError: the optimizer given lacks the critic's parameters, or a setting has nothing to act on.
    """
    if critic is None:
        if config.value_learning_rate is not None:
            raise ConfigError("value_learning_rate is of a value model of its own; pass value_model=, too")
        return optimizer
    policy_part, critic_part = (
        [parameter for parameter in model.parameters() if parameter.requires_grad]
        for model in (policy, critic)
    )
    if optimizer is None:
        rate = config.value_learning_rate
        rate = config.learning_rate if rate is None else rate
        groups: list[dict[str, Any]] = [{"params": policy_part}, {"params": critic_part, "lr": rate}]
        return torch.optim.Adam(groups, lr=config.learning_rate)
    if config.value_learning_rate is not None:
        raise ConfigError("value_learning_rate is of the default optimizer; give yours a group of its own")
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    if not held.issuperset(critic_part):
        raise ConfigError(
            "the optimizer doesn't hold the value model's parameters: make a ValueModel first, then an "
            "optimizer of the parameters of both, and pass both here"
        )
    return optimizer
