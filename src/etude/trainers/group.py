"""`GroupTrainer`: algorithms without a critic, which compare the episodes of one task with each other.

An iteration plays each of its tasks `num_generations` times. An algorithm says what an episode's advantage is
(`credit`), from scores and groups, and what loss its tokens get (`loss`); the rest is here.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from etude.data.batch import Trajectory
from etude.environments.text import TextEnvironment
from etude.errors import ConfigError
from etude.math.kl import KLKind
from etude.math.masked import masked_mean
from etude.trainers.group_config import GroupConfig
from etude.trainers.learner import Experience, Minibatch, UpdateLog
from etude.trainers.policy import PolicyTrainer
from etude.trainers.setup import without_value_head


class GroupTrainer(PolicyTrainer):
    """A policy without value head, trained on what distinguishes the episodes of a group.

    Args:
        model: a causal language model, with or without adapters; or a directory or hub id.
        args: the settings.
        environment: what `train()` plays in; it scores the episodes, too.
        train_dataset: tasks that `train()` learns from: rows, a `datasets` object, a file, a hub id.
        eval_dataset: validation tasks, by which the best checkpoint is chosen.
        test_dataset: held-out tasks, measured before and after; nothing is chosen by them.
        processing_class: the model's tokenizer; the environment's by default.
        ref_model: what the KL is measured to. By default a frozen copy of `model`; for a model with
            adapters, the same model with them switched off. With `beta` 0 there is none.
        optimizers: an optimizer (by default Adam over what requires a gradient) and a schedule (by default
            from the config; stepped once per iteration).

    Raises:
        ConfigError: `args` doesn't fit the trainer, or contradicts the environment.
        ModelError: the model has a value head, or nothing to train.
    """

    config_class: ClassVar[type[GroupConfig]]
    kl_kind: ClassVar[KLKind]
    config: GroupConfig
    model: PreTrainedModel | PeftModel

    def __init__(
        self,
        model: PreTrainedModel | PeftModel | str | Path,
        args: GroupConfig,
        *,
        environment: TextEnvironment | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        test_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        ref_model: nn.Module | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
    ) -> None:
        if not isinstance(args, self.config_class):
            raise ConfigError(f"args is a {type(args).__name__}; expected a {self.config_class.__name__}")
        if environment is not None and environment.params.temperature != args.temperature:
            raise ConfigError(
                f"the environment samples at temperature {environment.params.temperature}, and the trainer "
                f"learns from episodes of temperature {args.temperature}; set both to the same"
            )
        if ref_model is not None and not args.beta:
            raise ConfigError("ref_model does nothing while beta is 0; set beta, or leave ref_model out")
        optimizer, lr_scheduler = optimizers
        self.plays = args.num_generations
        super().__init__(
            args,
            without_value_head(model),
            tokenizer=processing_class,
            ref_model=ref_model,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            environment=environment,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            test_dataset=test_dataset,
            epochs=args.num_iterations,
            kl_kind=self.kl_kind,
            uses_reference=args.beta > 0,
        )

    @property
    def total_iterations(self) -> int:
        return self.config.iterations(len(self.train_rows))

    # The algorithm.

    def penalised(self, scores_B: Tensor, experience: Experience) -> Tensor:
        """Scores [B] as they are compared: less the KL penalty where it is part of the reward."""
        return scores_B

    @abstractmethod
    def credit(self, scores_B: Tensor, groups_B: Tensor, kept_B: Tensor) -> Tensor:
        """One advantage per episode [B], of all processes; exactly 0 where there is nothing to learn.

        Args:
            scores_B: what `penalised` gave.
            groups_B: episodes of one task have the same number.
            kept_B: false for episodes that take part in nothing.
        """

    @abstractmethod
    def loss(self, minibatch: Minibatch, advantages_BN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(this mini-batch's part of the loss, policy ratios [B, N], where they are clipped [B, N])."""

    def learn(self, trajectories: Sequence[Trajectory]) -> dict[str, Any]:
        """Observe the batch, give each episode its advantage, and go through it `num_iterations` times."""
        experience = self.learner.observe([_settled(trajectory) for trajectory in trajectories])
        advantages_B, all_advantages_B = self._advantages(experience)
        idle = (~all_advantages_B.view(-1, self.plays).any(1)).to(torch.float32).mean().item()
        stats = {
            "frac_reward_zero_std": idle,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            **self._kl(experience),
            **experience.sampler_gap(),
        }
        if idle == 1.0:  # an optimizer step without gradient isn't nothing: momentum goes on
            warnings.warn(
                "in each group all episodes have the same score, so this batch teaches nothing; tasks that "
                "are neither trivial nor impossible, or a larger num_generations, would",
                stacklevel=2,
            )
        else:
            log = self.learner.update(
                experience, lambda minibatch: self._loss(minibatch, advantages_B), self._shuffles()
            )
            stats |= _means(log)
        self.lr_scheduler.step()
        return stats

    def _advantages(self, experience: Experience) -> tuple[Tensor, Tensor]:
        """Of this process's episodes, and of all processes'."""
        scores_B = experience.logprobs.new_tensor([t.score for t in experience.trajectories])
        kept_B = experience.mask.any(1)
        mine_B2 = torch.stack([self.penalised(scores_B, experience), kept_B.to(scores_B)], dim=1)
        scores, kept = self.accelerator.gather(mine_B2).unbind(1)
        groups = torch.arange(len(scores), device=scores.device) // self.plays
        advantages = self.credit(scores, groups, kept.bool())
        first = self.accelerator.process_index * len(scores_B)
        return advantages[first : first + len(scores_B)], advantages

    def _loss(self, minibatch: Minibatch, advantages_B: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        mask_BN = minibatch.observed.mask
        advantages_BN = advantages_B[minibatch.indices][:, None].expand_as(mask_BN)
        loss, ratio_BN, clipped_BN = self.loss(minibatch, advantages_BN)
        if not mask_BN.any():
            return loss, {}
        share = minibatch.denominator / mask_BN.sum()  # so that the mean over tokens is the step's loss
        moved_BN = minibatch.logprobs.detach() - minibatch.observed.logprobs
        return loss, {
            "loss": loss.detach() * share,
            "entropy": masked_mean(minibatch.entropies, mask_BN),
            "ratio": masked_mean(ratio_BN, mask_BN),
            "clip_ratio": masked_mean(clipped_BN.float(), mask_BN),
            "approxkl": masked_mean(moved_BN**2 / 2, mask_BN),
        }

    def _kl(self, experience: Experience) -> dict[str, float]:
        """KL to the reference per episode, where there is one."""
        kept_B = experience.mask.any(1)
        if not self.learner.uses_reference or not kept_B.any():
            return {}
        return {"kl": (experience.kl * experience.mask).sum(1)[kept_B].mean().item()}


def _settled(trajectory: Trajectory) -> Trajectory:
    """An interrupted episode's score is unknown, and no value stands in for it here: it leaves its group."""
    if not trajectory.bootstrap:
        return trajectory
    return replace(trajectory, sampled=trajectory.sampled[:0], sampler_logprobs=None, bootstrap=False)


def _means(log: UpdateLog) -> dict[str, float]:
    means = {name: log.mean(name).item() for name in (log.numbers[0] if log.numbers else ())}
    if log.gradient_norms:
        means["grad_norm"] = torch.stack(log.gradient_norms).mean().item()
    return means
