"""`GroupTrainer`: algorithms without a critic, which compare episodes with each other.

An iteration plays each of its tasks `num_generations` times. An algorithm says what an episode's advantage is
(`credit`), from scores and groups, and what loss its tokens get (`loss`); the rest is here. Where it has to,
it also says what is compared (`penalised`) and how an advantage comes to an episode's tokens (`spread`).
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from etude.data.batch import Trajectory
from etude.environments.traits import temperatures_of
from etude.errors import ConfigError
from etude.math.counters import mix
from etude.math.kl import KLKind
from etude.math.masked import masked_mean
from etude.protocols import Environment
from etude.trainers.credit import early_rewards, gathered
from etude.trainers.experience import Experience, Minibatch, UpdateLog
from etude.trainers.group_config import GroupConfig
from etude.trainers.policy import PolicyTrainer
from etude.trainers.setup import without_value_head
from etude.trainers.step_checks import check_batch
from etude.types import Episode

_MORE = 6  # name of a random stream


@dataclass(frozen=True, slots=True)
class Scores:
    """The episodes of all processes, as credit rules compare them.

    Attributes:
        scores: [B], what `penalised` gave.
        groups: [B], episodes of one task have the same number.
        kept: [B], false for episodes that take part in nothing.
        trajectories: this process's part of them.
    """

    scores: Tensor
    groups: Tensor
    kept: Tensor
    trajectories: Sequence[Trajectory]


class GroupTrainer(PolicyTrainer):
    """A policy without value head, trained on what distinguishes the episodes of a group.

    Args:
        model: a causal language model, with or without adapters; or a directory or hub id.
        args: the settings.
        environment: what `train()` plays in; it scores the episodes, too. Anything that can do both.
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
    penalises: ClassVar[bool] = True  # advantages depend on the KL
    config: GroupConfig
    model: PreTrainedModel | PeftModel

    def __init__(
        self,
        model: PreTrainedModel | PeftModel | str | Path,
        args: GroupConfig,
        *,
        environment: Environment | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        test_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        ref_model: nn.Module | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
    ) -> None:
        if not isinstance(args, self.config_class):
            raise ConfigError(f"args is a {type(args).__name__}; expected a {self.config_class.__name__}")
        for name, temperature in temperatures_of(environment).items():
            if temperature != args.temperature:
                raise ConfigError(
                    f"the environment {name}{' ' * bool(name)}samples at temperature {temperature}, and the "
                    f"trainer learns from episodes of temperature {args.temperature}; set both to the same"
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
    def credit(self, scores: Scores) -> Tensor:
        """One advantage per episode [B], of all processes; exactly 0 where there is nothing to learn."""

    def spread(self, advantages_B: Tensor, experience: Experience) -> Tensor:
        """Each episode's advantage on its tokens [B, N]: less what had been earned before a token is sampled.

        A token is credited with what follows it. Where all of the score comes at the end, that is all of it.
        """
        early_BN = early_rewards(experience)
        earned_BN = early_BN.cumsum(1) - early_BN
        return (advantages_B[:, None] - earned_BN) * experience.mask

    @abstractmethod
    def loss(self, minibatch: Minibatch, advantages_BN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(this mini-batch's part of the loss, policy ratios [B, N], where they are clipped [B, N])."""

    def learn(self, trajectories: Sequence[Trajectory]) -> dict[str, Any]:
        """Observe the batch, give each token its advantage, and go through it `num_iterations` times."""
        check_batch(trajectories, self.plays)
        settled, order = [_settled(trajectory) for trajectory in trajectories], self._shuffles()
        experience = self.learner.observe(settled, order, postpone=self._learns_in_one_step)
        advantages_BN = self.spread(self._advantages(experience), experience)
        telling_B = gathered(advantages_BN.any(1), self.accelerator)
        stats = {"learning_rate": self.optimizer.param_groups[0]["lr"]}
        if self.plays > 1:
            idle = ~telling_B.view(-1, self.plays).any(1)
            stats["frac_reward_zero_std"] = idle.to(torch.float32).mean().item()
        advantages_BN, gap = self.corrected(advantages_BN, experience)
        if not telling_B.any():  # an optimizer step without gradient isn't nothing: momentum goes on
            warnings.warn(
                "no episode of this batch is better or worse than those it is compared with, so there was "
                "nothing to learn; tasks that are neither trivial nor impossible, or a larger "
                "num_generations, would help",
                stacklevel=2,
            )
        else:
            experience = self.chosen(experience, advantages_BN)
            log = self.learner.update(
                experience, lambda minibatch: self._loss(minibatch, advantages_BN), order
            )
            stats |= _means(log)
            gap |= experience.sampler_gap()
        if telling_B.any() or not experience.pending:
            stats |= self._kl(experience)
        stats |= gap
        self.advance_schedule()
        return stats

    def chosen(self, experience: Experience, advantages_BN: Tensor) -> Experience:
        """What the loss is an average over; an algorithm that leaves episodes out says so here."""
        return experience

    @property
    def _learns_in_one_step(self) -> bool:
        """Nothing asks for log-probabilities before the weights change: the update's own are early enough."""
        config = self.config
        once = config.passes == config.gradient_accumulation_steps and config.num_iterations == 1
        asked = self.penalises and self.learner.uses_reference
        return once and not asked and config.importance_sampling_correction == "none"

    def _advantages(self, experience: Experience) -> Tensor:
        """Of this process's episodes [B]; they are compared with those of all processes."""
        trajectories = experience.trajectories
        scores_B = experience.logprobs.new_tensor([t.score for t in trajectories])
        kept_B = torch.tensor([t.compared for t in trajectories], device=scores_B.device)
        scores = gathered(self.penalised(scores_B, experience), self.accelerator)
        kept = gathered(kept_B, self.accelerator)
        advantages = self.credit(Scores(scores, self.groups(len(scores)), kept, trajectories))
        first = self.accelerator.process_index * len(trajectories)
        return advantages[first : first + len(trajectories)]

    def objectives(self, scores: Scores) -> tuple[Tensor, Tensor]:
        """The single rewards of all processes' episodes [B, K], NaN where one doesn't apply; weights [K]."""
        found = {r.name: r.weight for t in scores.trajectories for r in t.rewards}
        if self.accelerator.num_processes > 1:
            found = dict(pair for pairs in gather_object([list(found.items())]) for pair in pairs)
        names = sorted(found)
        rewards_BK = scores.scores.new_full((len(scores.trajectories), len(names)), torch.nan)
        for row_K, trajectory in zip(rewards_BK, scores.trajectories, strict=True):
            for reward in trajectory.rewards:
                if reward.value is not None:
                    k = names.index(reward.name)
                    row_K[k] = reward.value + torch.nan_to_num(row_K[k])
        return gathered(rewards_BK, self.accelerator), rewards_BK.new_tensor([found[name] for name in names])

    def groups(self, count: int) -> Tensor:
        """The group of each of `count` episodes [B], which lie group by group."""
        return torch.arange(count, device=self.current_device) // self.plays

    def _loss(self, minibatch: Minibatch, advantages_BN: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        mask_BN = minibatch.observed.mask
        loss, ratio_BN, clipped_BN = self.loss(
            minibatch, advantages_BN[minibatch.indices, : mask_BN.shape[1]]
        )
        loss = loss - self.entropy_bonus(minibatch)
        if not mask_BN.any():
            return loss, {}
        share = minibatch.denominator / mask_BN.sum()  # so that the mean over tokens is the step's loss
        moved_BN = minibatch.logprobs.detach() - minibatch.observed.logprobs
        return loss, {
            "loss": loss.detach() * share,
            "entropy": masked_mean(minibatch.entropies.detach(), mask_BN),
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

    # Which episodes.

    def collect(self, step: int) -> tuple[list[Episode], list[Episode]]:
        """With `dynamic_sampling`, plays on until the batch is full of groups that teach something.

        Yu et al. 2025, "DAPO: an open-source LLM reinforcement learning system at scale", section 3.2: groups
        whose scores are all equal have no gradient, and leave the batch smaller than it looks. After
        `max_sampling_rounds` they fill the places that are left.
        """
        played, batch = super().collect(step)
        if not self.config.dynamic_sampling:
            return played, batch
        groups = self._groups(batch)
        telling = [group for group in groups if self._tells(group)]
        idle = [group for group in groups if not self._tells(group)]
        for round in range(1, self.config.max_sampling_rounds):
            missing = len(groups) - len(telling)
            if not missing:
                break
            tasks, seeds = self._more_tasks(step, round, missing)
            more = self._groups(self.play(tasks, seeds))
            played = [*played, *(episode for group in more for episode in group)]
            telling += [group for group in more if self._tells(group)]
        batch = [episode for group in [*telling, *idle][: len(groups)] for episode in group]
        return played, batch

    def _groups(self, episodes: Sequence[Episode]) -> list[Sequence[Episode]]:
        return [episodes[i : i + self.plays] for i in range(0, len(episodes), self.plays)]

    def _tells(self, group: Sequence[Episode]) -> bool:
        """Its episodes have scores, and not all the same ones at the same tokens."""
        trajectories = [_settled(self.trajectory(episode)) for episode in group]
        return len({(t.score, *t.early_rewards.items()) for t in trajectories if t.compared}) > 1

    def _more_tasks(self, step: int, round: int, count: int) -> tuple[list[Mapping[str, Any]], list[int]]:
        """Tasks for `count` more groups, and seeds: by counters, so that a resumed run plays the same."""
        stream = mix(self.config.seed, _MORE, step, self.accelerator.process_index, round)
        tasks = [task for task in self.tasks.some(count, stream) for _ in range(self.plays)]
        return tasks, [mix(stream, i) for i in range(len(tasks))]


def _settled(trajectory: Trajectory) -> Trajectory:
    """An interrupted episode's score is unknown, and no value stands in for it here: it leaves its group."""
    if not trajectory.bootstrap:
        return trajectory
    return replace(
        trajectory,
        sampled=trajectory.sampled[:0],
        sampler_logprobs=None,
        bootstrap=False,
        rewards=(),
        compared=False,
    )


def _means(log: UpdateLog) -> dict[str, float]:
    means = {name: log.mean(name).item() for name in (log.numbers[0] if log.numbers else ())}
    if log.gradient_norms:
        means["grad_norm"] = torch.stack(log.gradient_norms).mean().item()
    return means
