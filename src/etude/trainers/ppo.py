"""`PPOTrainer`: proximal policy optimisation, with the loop in your hands or in ours.

    queries, responses, masks, scores, _ = env.run(tasks)
    stats = trainer.step(queries, responses, scores, masks)        # your loop, as in TRL 0.7.4

    PPOTrainer(config, model, environment=env, train_dataset=tasks).train()        # ours

Both end in `learn`: observe, credit, update. Schulman et al. 2017 ("Proximal policy optimization
algorithms"), for language models as Ziegler et al. 2019 and Stiennon et al. 2020 do it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from etude.data.batch import Trajectory
from etude.errors import ConfigError
from etude.math.kl import AdaptiveKLController, FixedKLController, KLController
from etude.math.losses import aggregate, clipped_policy_loss, clipped_value_loss
from etude.models.with_value_head import ModelWithValueHead
from etude.protocols import Environment
from etude.runtime.run import RunDirectory
from etude.trainers.clock import Clock
from etude.trainers.columns import used_columns
from etude.trainers.credit import Credit, gae_credit
from etude.trainers.critic import check_vocabulary, critic_of, optimizer_of, without_own_head
from etude.trainers.experience import Minibatch, UpdateLog
from etude.trainers.policy import PolicyTrainer
from etude.trainers.ppo_config import PPOConfig
from etude.trainers.ppo_stats import minibatch_stats, step_stats, without_reference
from etude.trainers.score_scales import ScoreScales
from etude.trainers.setup import empty_device_cache, with_value_head
from etude.trainers.step_checks import check_batch, check_step, finite_score


class PPOTrainer(PolicyTrainer):
    """PPO with a value head on the policy's trunk, or with a value model of its own.

    With a fixed KL coefficient of 0 (`init_kl_coef=0, adap_kl_ctrl=False`) and no `ref_model` there is no
    reference: nothing is copied or computed for it, and what it would be measured to is NaN in the
    statistics.

    The arguments up to `lr_scheduler` are TRL 0.7.4's.

    Args:
        config: the settings.
        model: with a value head; a plain language model is given one. Beside a `value_model` it has none: one
            that it came with is left out.
        ref_model: what the KL is measured to. By default a frozen copy of `model`; for a model with
            adapters, the same model with them switched off.
        tokenizer: of the model; the environment's by default.
        dataset: for `dataloader`, in loops of your own.
        optimizer: Adam over what requires a gradient, by default.
        data_collator: of `dataloader`.
        num_shared_layers: layers that the default reference shares with the model, frozen in both.
        lr_scheduler: stepped once per `step`; by default made from the config.
        value_model: what gives the values, instead of a head on the policy's trunk. A language model (which
            gets a fresh head), a value-head model, a reward model (a sequence classifier with one label,
            whose score becomes the value), a `ValueModel`, or the directory or hub id of one. It is trained
            beside the policy, and saved in `value_model` in the policy's directory.
        environment: what `train()` plays in: anything that can play and score.
        train_dataset: tasks that `train()` learns from: rows, a `datasets` object, a file, a hub id.
        eval_dataset: validation tasks, by which the best checkpoint is chosen.
        test_dataset: held-out tasks, measured before and after; nothing is chosen by them.
    """

    method = "ppo"
    config: PPOConfig

    def __init__(
        self,
        config: PPOConfig,
        model: ModelWithValueHead | PreTrainedModel | PeftModel | str,
        ref_model: nn.Module | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dataset: Any = None,
        optimizer: torch.optim.Optimizer | None = None,
        data_collator: Callable[..., Any] | None = None,
        num_shared_layers: int | None = None,
        lr_scheduler: Any = None,
        *,
        value_model: Any = None,
        environment: Environment | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        test_dataset: Any = None,
    ) -> None:
        if not isinstance(config, PPOConfig):
            raise ConfigError(f"config is a {type(config).__name__}; expected a PPOConfig")
        policy = with_value_head(model) if value_model is None else without_own_head(model)
        critic = None if value_model is None else critic_of(value_model, policy)
        uses_reference = ref_model is not None or config.adap_kl_ctrl or config.init_kl_coef != 0
        if num_shared_layers is not None and not uses_reference:
            raise ConfigError(
                "num_shared_layers is of the reference, and with init_kl_coef=0 and without adap_kl_ctrl "
                "there is none; leave it out"
            )
        super().__init__(
            config,
            policy,
            tokenizer=tokenizer,
            value_model=critic,
            ref_model=ref_model,
            num_shared_layers=num_shared_layers,
            optimizer=optimizer_of(config, policy, critic, optimizer),
            lr_scheduler=lr_scheduler,
            environment=environment,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            test_dataset=test_dataset,
            epochs=config.ppo_epochs,
            kl_kind={"kl": "k1", "mse": "k2"}.get(config.kl_penalty, config.kl_penalty),
            uses_reference=uses_reference,
        )
        if critic is not None:
            check_vocabulary(critic, self.tokenizer)
        self._fill_in_config()
        self.kl_ctl: KLController = (
            AdaptiveKLController(config.init_kl_coef, config.target, config.horizon)
            if config.adap_kl_ctrl
            else FixedKLController(config.init_kl_coef)
        )
        self.score_scales = ScoreScales(self.accelerator)
        self.highest_reward = -math.inf
        self.dataset = dataset
        self.dataloader = None if dataset is None else self.prepare_dataloader(dataset, data_collator)

    @property
    def total_iterations(self) -> int:
        return self.config.total_ppo_epochs

    # The algorithm.

    def learn(self, trajectories: Sequence[Trajectory]) -> dict[str, Any]:
        """Observe the batch, give each token its credit, and go through it `ppo_epochs` times."""
        check_batch(trajectories)
        config, clock, order = self.config, Clock(), self._shuffles()
        scores_B, score_scale_B = self._scaled(trajectories)
        clock.lap("compute_rewards")
        experience = self.learner.observe(trajectories, order)
        clock.lap("forward_pass")
        kl_coef = self.kl_ctl.value
        credit = gae_credit(
            experience,
            scores_B,
            score_scale=score_scale_B,
            kl_coef=kl_coef,
            gamma=config.gamma,
            lam=config.lam,
            whiten_rewards=config.whiten_rewards,
            accelerator=self.accelerator,
        )
        credit.advantages, gap = self.corrected(credit.advantages, experience)
        clock.lap("compute_advantages")
        log = self.learner.update(
            experience, lambda minibatch: self.loss(minibatch, credit), order, self._moved_too_far
        )
        clock.lap("optimize_step")
        if self.learner.global_count(experience.mask.sum()) == 0:
            warnings.warn("nothing was sampled in this batch, so there was nothing to learn", stacklevel=2)
            return {"ppo/mean_scores": scores_B.mean().item()}
        # Where only other processes sampled something, this one still takes part in what all of them do.
        stats: dict[str, Any] = {"ppo/mean_scores": scores_B.mean().item(), "objective/kl": 0.0}
        if experience.mask.any():
            stats = step_stats(experience, credit, scores_B, log, kl_coef) | gap
            stats["loss"] = stats["ppo/loss/total"]
        stats["ppo/learning_rate"] = self.optimizer.param_groups[0]["lr"]
        if self.learner.uses_reference:
            stats["kl"] = stats["objective/kl"]
            kl = self.accelerator.reduce(torch.tensor(stats["kl"], device=self.current_device), "mean")
            self.kl_ctl.update(float(kl), config.batch_size * self.accelerator.num_processes)
        else:
            stats |= without_reference(stats)
        self.advance_schedule()
        clock.lap("calc_stats")
        return {**stats, **clock.laps()}

    def loss(self, minibatch: Minibatch, credit: Credit) -> tuple[Tensor, dict[str, Tensor]]:
        """Clipped policy loss + `vf_coef` × clipped value loss, each a mean over sampled tokens."""
        config, observed, mask = self.config, minibatch.observed, minibatch.observed.mask
        width = mask.shape[1]
        advantages = credit.advantages[minibatch.indices, :width]
        returns = credit.returns[minibatch.indices, :width]
        policy, ratio, clipped = clipped_policy_loss(
            minibatch.logprobs, observed.logprobs, advantages, clip_low=config.cliprange
        )
        value, value_clipped = clipped_value_loss(
            minibatch.values, observed.values, returns, clip=config.cliprange_value
        )
        policy_loss = aggregate(policy, mask, mode="token", denominator=minibatch.denominator)
        value_loss = aggregate(value, mask, mode="token", denominator=minibatch.denominator)
        loss = policy_loss + config.vf_coef * value_loss - self.entropy_bonus(minibatch)
        if not mask.any():
            return loss, {}
        mean_ratio = ratio[mask].mean()
        if mean_ratio > config.ratio_threshold:
            warnings.warn(
                f"the mean policy ratio {mean_ratio:.2f} exceeds ratio_threshold {config.ratio_threshold}; "
                "the mini-batch is skipped",
                stacklevel=2,
            )
            # Not `loss * 0`, which is NaN once the ratio has overflowed.
            loss = 0.0 * (minibatch.logprobs.sum() + minibatch.values.sum())
        share = minibatch.denominator / mask.sum()  # back from this mini-batch's part to its own mean
        numbers = minibatch_stats(
            policy_loss=policy_loss.detach() * share,
            value_loss=value_loss.detach() * share,
            total_loss=loss.detach() * share,
            entropies=minibatch.entropies.detach(),
            logprobs=minibatch.logprobs.detach(),
            old_logprobs=observed.logprobs,
            ratio=ratio,
            clipped=clipped,
            advantages=advantages,
            returns=returns,
            values=minibatch.values.detach(),
            old_values=observed.values,
            value_clipped=value_clipped,
            mask=mask,
        )
        return loss, numbers

    def _moved_too_far(self, epoch: UpdateLog) -> bool:
        """By the mean over all processes' tokens; one without any still takes part."""
        if not self.config.early_stopping:
            return False
        tokens = sum(epoch.weights)
        total = float(epoch.mean("policy/policykl")) * tokens if tokens else 0.0
        sums = self.accelerator.reduce(torch.tensor([total, tokens], device=self.current_device), "sum")
        return bool(sums[0] > 1.5 * self.config.target_kl * sums[1])

    def _scaled(self, trajectories: Sequence[Trajectory]) -> tuple[Tensor, Tensor]:
        """Scores [B] after scaling, normalisation and clipping; and what they were divided by [B]."""
        config = self.config
        scores = [trajectory.score for trajectory in trajectories]
        scores_B = torch.tensor(scores, dtype=torch.float32, device=self.current_device)
        scale_B = torch.ones_like(scores_B)
        if config.use_score_scaling:
            mean_B, scale_B = self.score_scales.update([t.environment for t in trajectories], scores_B)
            scores_B = (scores_B - mean_B if config.use_score_norm else scores_B) / scale_B
        if config.score_clip is not None:
            scores_B = scores_B.clamp(-config.score_clip, config.score_clip)
        return scores_B, scale_B

    # TRL 0.7.4's surface.

    def step(
        self,
        queries: list[Tensor],
        responses: list[Tensor],
        scores: Sequence[Tensor | float],
        response_masks: list[Tensor] | None = None,
    ) -> dict[str, Any]:
        """One PPO step on responses that the current policy sampled at `config.temperature`.

        Args:
            queries, responses: token ids [q], [r], `config.batch_size` of each. An encoder–decoder's encoder
                reads the query; its response begins with its decoder's start tokens, as `generate` gives it.
            scores: one number per response.
            response_masks: [r] each, 1 for tokens that the policy sampled; by default all of them but a
                decoder's start tokens.

        Returns:
            Statistics under TRL 0.7.4's keys.

        Raises:
            DataError: a list has the wrong length or type, or a response doesn't begin as it has to.
            RewardError: a score is NaN or infinite.
        """
        check_step(self.config.batch_size, queries, responses, scores, response_masks)
        values = [finite_score(score, i) for i, score in enumerate(scores)]
        masks: Sequence[Tensor | None] = response_masks or [None] * len(queries)
        starts = self.starts
        trajectories = [
            Trajectory.of_response(query, response, value, mask, starts)
            for query, response, value, mask in zip(queries, responses, values, masks, strict=True)
        ]
        stats = self.learn(trajectories)
        self.current_step += 1
        self._push_if_best(sum(values) / len(values))
        if self.config.optimize_device_cache:
            empty_device_cache(self.current_device)
        return stats

    def log_stats(
        self,
        stats: Mapping[str, Any],
        batch: Mapping[str, Any],
        rewards: Sequence[Tensor | float] | Tensor,
        columns_to_log: Sequence[str] = ("query", "response"),
    ) -> None:
        """Send a step's statistics to the trackers and, with an `output_dir`, to the run directory.

        Args:
            stats: what `step` returned.
            batch: columns of the step's batch; `columns_to_log` become a table where a tracker has tables.
            rewards: one per response.
        """
        values = torch.as_tensor([float(reward) for reward in rewards])
        missing = [column for column in columns_to_log if column not in batch]
        logs = {
            **stats,
            "env/reward_mean": values.mean().item(),
            "env/reward_std": values.std().item() if len(values) > 1 else 0.0,
            "env/reward_dist": values.numpy(),
        }
        numbers = {name: value for name, value in logs.items() if isinstance(value, int | float)}
        for tracker in self.accelerator.trackers:
            if tracker.name == "wandb" and not missing:
                columns = [list(map(str, batch[column])) for column in columns_to_log]
                rows = [list(row) for row in zip(*columns, values.tolist(), strict=True)]
                tracker.log_table("game_log", [*columns_to_log, "reward"], rows, step=self.current_step)
        self.accelerator.log(numbers, step=self.current_step)
        if self.config.output_dir is not None and self.accelerator.is_main_process:
            RunDirectory(self.config.output_dir).append_metrics(self.current_step, numbers)

    def prepare_dataloader(
        self, dataset: Any, data_collator: Callable[..., Any] | None = None
    ) -> DataLoader[Any]:
        """Batches of `config.batch_size`, shuffled, incomplete ones dropped."""
        if self.config.remove_unused_columns and hasattr(dataset, "column_names"):
            dataset = dataset.select_columns(used_columns(dataset.column_names, self.model))
        loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=self.config.batch_size,
            collate_fn=data_collator,
            shuffle=True,
            drop_last=True,
        )
        return self.accelerator.prepare(loader)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """TRL's name of `save_model`."""
        self.save_model(save_directory)

    # State.

    def state_dict(self) -> dict[str, Any]:
        return {
            "kl_controller": self.kl_ctl.state_dict(),
            "score_scales": self.score_scales.state_dict(),
            "highest_reward": None if math.isinf(self.highest_reward) else self.highest_reward,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.kl_ctl.load_state_dict(state["kl_controller"])
        self.score_scales.load_state_dict(state["score_scales"])
        self.highest_reward = -math.inf if state["highest_reward"] is None else state["highest_reward"]

    # Set-up.

    def _fill_in_config(self) -> None:
        config, processes = self.config, self.accelerator.num_processes
        config.global_batch_size = config.batch_size * processes
        config.global_backward_batch_size = config.backward_batch_size * processes
        config.is_encoder_decoder, config.is_peft_model = self.is_encoder_decoder, self.is_peft_model

    def _push_if_best(self, mean_score: float) -> None:
        kwargs = self.config.push_to_hub_if_best_kwargs
        if kwargs and self.current_step % self.config.compare_steps == 0 and mean_score > self.highest_reward:
            self.highest_reward = mean_score
            if self.accelerator.is_main_process:
                self.model.push_to_hub(**kwargs)
