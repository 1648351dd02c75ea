"""A new algorithm in one file, and a run of it: SAPO learns to use a calculator in under a minute.

    python examples/new_algorithm.py

Gao et al. 2025, "Soft adaptive policy optimization" (https://arxiv.org/abs/2511.20347). PPO and GRPO clip the
policy ratio ρ = π / π_old: a token that has moved too far gets no gradient any more. SAPO fades it out:

    loss = −f(ρ) A    with    f(ρ) = σ(τ (ρ − 1)) · 4 / τ

The slope of f is 1 at ρ = 1 (the policy gradient) and falls off on both sides, the faster the larger τ is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from etude import GroupConfig, GroupTrainer, Minibatch, Scores, TextEnvironment
from etude.app.cli import run_command
from etude.errors import ConfigError
from etude.math.group import group_advantages
from etude.math.losses import aggregate
from etude.tools.calculator import calculator

# First the settings. What any online run needs is inherited; these two are what SAPO adds.


@dataclass
class SAPOConfig(GroupConfig):
    """Settings of `SAPOTrainer`; the defaults are the paper's."""

    tau_pos: float = 1.0  # of tokens that are to become likelier
    tau_neg: float = 1.05  # of the others: making one less likely lifts all that weren't sampled

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.tau_pos, self.tau_neg) <= 0:
            raise ConfigError(f"tau_pos is {self.tau_pos}, tau_neg {self.tau_neg}; expected numbers above 0")
        if self.beta:
            raise ConfigError(f"beta is {self.beta}, and SAPO has no KL term; leave it out")


# The loss is a function of tensors: B episodes with up to N sampled tokens each. Gradients flow through
# `logprobs_BN` only. It needs no trainer, and neither does its test.


def sapo_loss(
    logprobs_BN: Tensor, old_logprobs_BN: Tensor, advantages_BN: Tensor, tau_pos: float, tau_neg: float
) -> tuple[Tensor, Tensor]:
    """(−f(ρ) A, ρ) of each token."""
    ratio_BN = torch.exp(logprobs_BN - old_logprobs_BN)
    tau_BN = torch.where(advantages_BN > 0, tau_pos, tau_neg)
    gate_BN = torch.sigmoid(tau_BN * (ratio_BN - 1)) * 4 / tau_BN
    return -gate_BN * advantages_BN, ratio_BN.detach()


# The trainer says two things; playing, batches, optimizer, checkpoints and the report are inherited.


class SAPOTrainer(GroupTrainer):
    """SAPO. The arguments are those of `GroupTrainer`."""

    method = "sapo"
    config_class = SAPOConfig
    kl_kind = "k3"
    config: SAPOConfig

    # One: an advantage for each episode. `scores` holds the scores of all episodes [B], the group (the task)
    # of each, and which of them count. It is exactly 0 where there is nothing to learn. SAPO takes GRPO's.

    def credit(self, scores: Scores) -> Tensor:
        return group_advantages(scores.scores, scores.groups, scores.kept)

    # Two: the loss of a mini-batch. `observed` is what was known before the update: which tokens were sampled
    # and how likely they were. SAPO's is a mean over episodes of each one's mean; they are counted over the
    # whole optimizer step, so that its mini-batches add up. It also says what was clipped: here nothing.

    def loss(self, minibatch: Minibatch, advantages_BN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        config, observed = self.config, minibatch.observed
        loss_BN, ratio_BN = sapo_loss(
            minibatch.logprobs, observed.logprobs, advantages_BN, config.tau_pos, config.tau_neg
        )
        loss = aggregate(loss_BN, observed.mask, mode="sequence", denominator=minibatch.sequences)
        return loss, ratio_BN, torch.zeros_like(observed.mask)


# That is the algorithm. The rest is a run of it, on the tasks and the small model of the calculator example.


def train(directory: Path, warm_up: int = 400, max_steps: int = 80) -> None:
    from calculator import exact_answer, write_data, write_model

    data, model, warm = directory / "data", directory / "model", directory / "sft"
    write_data(data, seed=0)
    write_model(model, seed=0)
    recipe = {"config": Path(__file__).with_name("calculator_sft.yaml"), "max_steps": warm_up}
    recipe |= {"per_device_train_batch_size": 32, "learning_rate": 3e-3}
    recipe |= {"output_dir": warm, "overwrite_output_dir": True}
    run_command("sft", model_name_or_path=model, train_dataset=data / "demonstrations.jsonl", **recipe)
    tokenizer, sampling = AutoTokenizer.from_pretrained(warm), {"max_new_tokens": 24}
    env = TextEnvironment(None, tokenizer, [calculator], rewards=exact_answer, generation_kwargs=sampling)
    config = SAPOConfig(
        output_dir=str(directory),
        overwrite_output_dir=True,
        learning_rate=3e-4,
        max_steps=max_steps,
        steps_per_generation=4,  # optimizer steps on an iteration's episodes
        per_device_train_batch_size=32,  # episodes in each; in all 16 tasks, 8 times each
    )
    tasks, held_out = data / "train.jsonl", data / "test.jsonl"
    trainer = SAPOTrainer(warm, config, environment=env, train_dataset=tasks, test_dataset=held_out)
    print(trainer.train())


if __name__ == "__main__":
    train(Path("runs/sapo"))
