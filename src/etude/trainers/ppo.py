"""`PPOTrainer`: proximal policy optimisation, with the loop in your hands or in ours.

    queries, responses, masks, scores, _ = env.run(tasks)
    stats = trainer.step(queries, responses, scores, masks)        # your loop, as in TRL 0.7.4

    PPOTrainer(config, model, environment=env, train_dataset=tasks).train()        # ours

Both end in `learn`: observe, credit, update. Schulman et al. 2017 ("Proximal policy optimization
algorithms"), for language models as Ziegler et al. 2019 and Stiennon et al. 2020 do it.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from etude.data.batch import Trajectory
from etude.environments.text import TextEnvironment
from etude.errors import ConfigError, DataError, ModelError
from etude.math.kl import AdaptiveKLController, FixedKLController, KLController
from etude.math.losses import aggregate, clipped_policy_loss, clipped_value_loss
from etude.math.running import RunningMoments
from etude.models.forward import PolicyForward
from etude.models.reference import create_reference_model, reference_by_disabled_adapters
from etude.models.value_head import AutoModelForCausalLMWithValueHead
from etude.runtime.model_card import write_model_card
from etude.runtime.run import RunDirectory
from etude.sampling.draw import mix
from etude.sampling.generate import continue_all
from etude.sampling.local import LocalSampler
from etude.sampling.params import sampling_params
from etude.trainers.clock import Clock
from etude.trainers.columns import used_columns
from etude.trainers.credit import Credit, gae_credit
from etude.trainers.learner import Learner, Minibatch, UpdateLog
from etude.trainers.online import OnlineTrainer
from etude.trainers.ppo_config import PPOConfig
from etude.trainers.ppo_stats import minibatch_stats, step_stats
from etude.trainers.setup import (
    changed_settings,
    empty_device_cache,
    flat_settings,
    make_accelerator,
    with_value_head,
)
from etude.trainers.step_checks import check_step, finite_score

_GENERATE, _ORDER = 4, 5  # names of random streams


class PPOTrainer(OnlineTrainer):
    """PPO with a value head on the policy's trunk.

    The arguments up to `lr_scheduler` are TRL 0.7.4's.

    Args:
        config: the settings.
        model: with a value head; a plain causal model is given one.
        ref_model: what the KL is measured to. By default a frozen copy of `model`; for a model with
            adapters, the same model with them switched off.
        tokenizer: of the model; the environment's by default.
        dataset: for `dataloader`, in loops of your own.
        optimizer: Adam over what requires a gradient, by default.
        data_collator: of `dataloader`.
        num_shared_layers: layers that the default reference shares with the model, frozen in both.
        lr_scheduler: stepped once per `step`; by default made from the config.
        environment: what `train()` plays in.
        train_dataset: tasks that `train()` learns from: rows, a `datasets` object, a file, a hub id.
        eval_dataset: validation tasks, by which the best checkpoint is chosen.
        test_dataset: held-out tasks, measured before and after; nothing is chosen by them.
    """

    def __init__(
        self,
        config: PPOConfig,
        model: AutoModelForCausalLMWithValueHead | PreTrainedModel | PeftModel | str,
        ref_model: nn.Module | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dataset: Any = None,
        optimizer: torch.optim.Optimizer | None = None,
        data_collator: Callable[..., Any] | None = None,
        num_shared_layers: int | None = None,
        lr_scheduler: Any = None,
        *,
        environment: TextEnvironment | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        test_dataset: Any = None,
    ) -> None:
        if not isinstance(config, PPOConfig):
            raise ConfigError(f"config is a {type(config).__name__}; expected a PPOConfig")
        if tokenizer is None and environment is not None:
            tokenizer = environment.tokenizer
        if tokenizer is None:
            raise ConfigError("PPOTrainer needs the model's tokenizer; pass tokenizer= or environment=")
        self.config = config
        self.tokenizer = tokenizer
        self.environment = environment
        self.train_dataset, self.eval_dataset, self.test_dataset = train_dataset, eval_dataset, test_dataset
        self.accelerator = make_accelerator(config)
        self.model = with_value_head(model)
        self.is_peft_model = self.model.is_peft_model
        self.is_encoder_decoder = False
        self._fill_in_config()

        self.ref_model = self._reference(ref_model, num_shared_layers)
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if not trainable:
            raise ModelError("no parameter of the model requires a gradient; load it with is_trainable=True")
        optimizer = optimizer or torch.optim.Adam(trainable, lr=config.learning_rate)
        self.lr_scheduler = lr_scheduler or self._default_scheduler(optimizer)
        policy, self.optimizer = self.accelerator.prepare(PolicyForward(self.model), optimizer)
        reference = None
        if self.ref_model is not None:
            reference = self.accelerator.prepare_model(PolicyForward(self.ref_model), evaluation_mode=True)
        self.learner = Learner(
            self.accelerator,
            policy,
            reference,
            self.optimizer,
            mini_batch_size=config.mini_batch_size,
            accumulation=config.gradient_accumulation_steps,
            epochs=config.ppo_epochs,
            max_grad_norm=config.max_grad_norm,
            temperature=config.temperature,
            kl_kind={"kl": "k1", "mse": "k2"}.get(config.kl_penalty, config.kl_penalty),
            max_tokens_per_pass=config.max_tokens_per_pass,
        )

        self.kl_ctl: KLController = (
            AdaptiveKLController(config.init_kl_coef, config.target, config.horizon)
            if config.adap_kl_ctrl
            else FixedKLController(config.init_kl_coef)
        )
        self.running = RunningMoments()
        self.current_step = 0
        self.highest_reward = -math.inf
        self.current_device = self.accelerator.device
        self.dataset = dataset
        self.dataloader = None if dataset is None else self.prepare_dataloader(dataset, data_collator)
        self._generated = 0
        if config.report_to:
            self.accelerator.init_trackers(
                config.tracker_project_name,
                flat_settings(config.to_dict()),
                init_kwargs=config.tracker_kwargs,
            )

    # The algorithm.

    def learn(self, trajectories: Sequence[Trajectory]) -> dict[str, Any]:
        """Observe the batch, give each token its credit, and go through it `ppo_epochs` times."""
        config, clock = self.config, Clock()
        scores_B = self._scaled([trajectory.score for trajectory in trajectories])
        clock.lap("compute_rewards")
        experience = self.learner.observe(trajectories)
        clock.lap("forward_pass")
        kl_coef = self.kl_ctl.value
        credit = gae_credit(
            experience,
            scores_B,
            kl_coef=kl_coef,
            gamma=config.gamma,
            lam=config.lam,
            whiten_rewards=config.whiten_rewards,
            accelerator=self.accelerator,
        )
        clock.lap("compute_advantages")
        order = torch.Generator().manual_seed(
            mix(config.seed, _ORDER, self.current_step, self.accelerator.process_index)
        )
        log = self.learner.update(
            experience, lambda minibatch: self.loss(minibatch, credit), order, self._moved_too_far
        )
        clock.lap("optimize_step")
        if not log.numbers:
            warnings.warn("nothing was sampled in this batch, so there was nothing to learn", stacklevel=2)
            return {"ppo/mean_scores": scores_B.mean().item()}
        stats = step_stats(experience, credit, scores_B, log, kl_coef)
        stats |= {"kl": stats["objective/kl"], "loss": stats["ppo/loss/total"]}
        stats["ppo/learning_rate"] = self.optimizer.param_groups[0]["lr"]
        kl = self.accelerator.reduce(torch.tensor(stats["objective/kl"], device=self.current_device), "mean")
        self.kl_ctl.update(float(kl), config.batch_size * self.accelerator.num_processes)
        self.lr_scheduler.step()
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
        loss = policy_loss + config.vf_coef * value_loss
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
            entropies=minibatch.entropies,
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
        if not self.config.early_stopping or not epoch.numbers:
            return False
        moved = self.accelerator.reduce(epoch.mean("policy/policykl"), "mean")
        return bool(moved > 1.5 * self.config.target_kl)

    def _scaled(self, scores: list[float]) -> Tensor:
        """Scores [B] after scaling, normalisation and clipping."""
        config = self.config
        scores_B = torch.tensor(scores, dtype=torch.float32, device=self.current_device)
        if config.use_score_scaling:
            self.running.update(self.accelerator.gather(scores_B))
            scale = self.running.std + torch.finfo(scores_B.dtype).eps
            scores_B = (scores_B - self.running.mean if config.use_score_norm else scores_B) / scale
        if config.score_clip is not None:
            scores_B = scores_B.clamp(-config.score_clip, config.score_clip)
        return scores_B

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
            queries, responses: token ids [q], [r], `config.batch_size` of each.
            scores: one number per response.
            response_masks: [r] each, 1 for tokens that the policy sampled; all of them by default.

        Returns:
            Statistics under TRL 0.7.4's keys.

        Raises:
            DataError: a list has the wrong length or type.
            RewardError: a score is NaN or infinite.
        """
        check_step(self.config.batch_size, queries, responses, scores, response_masks)
        values = [finite_score(score, i) for i, score in enumerate(scores)]
        masks: Sequence[Tensor | None] = response_masks or [None] * len(queries)
        trajectories = [
            Trajectory.of_response(query.cpu(), response.cpu(), value, mask)
            for query, response, value, mask in zip(queries, responses, values, masks, strict=True)
        ]
        stats = self.learn(trajectories)
        self.current_step += 1
        self._push_if_best(sum(values) / len(values))
        if self.config.optimize_device_cache:
            empty_device_cache(self.current_device)
        return stats

    def generate(
        self,
        query_tensor: Tensor | list[Tensor],
        length_sampler: Callable[[], int] | None = None,
        batch_size: int = 4,
        return_prompt: bool = True,
        generate_ref_response: bool = False,
        **generation_kwargs: Any,
    ) -> Any:
        """Continue queries with the current policy.

        Args:
            query_tensor: token ids [q], or a list of such.
            length_sampler: gives `max_new_tokens`, anew for each query.
            batch_size: taken for compatibility; the sampler batches by itself.
            return_prompt: put the query before each response.
            generate_ref_response: also continue with the reference policy.
            generation_kwargs: as for `transformers`' `generate`: greedy unless `do_sample=True`. A
                `forced_prefix` begins each response; for `step`, mask its tokens with 0 in
                `response_masks`.

        Returns:
            A list of token ids [n] for a list of queries, [1, n] for a single one; a pair of these with
            `generate_ref_response`.
        """
        queries = query_tensor if isinstance(query_tensor, list) else [query_tensor]
        for query in queries:
            if query.dim() != 1:
                raise DataError(f"a query has shape {tuple(query.shape)}; expected token ids [q]")
        settings = []
        for _ in queries:
            limit = {} if length_sampler is None else {"max_new_tokens": int(length_sampler())}
            settings.append(sampling_params({**generation_kwargs, **limit}, self.tokenizer, do_sample=False))

        first = self._generated
        self._generated += len(queries)
        seeds = [mix(self.config.seed, _GENERATE, first + i) for i in range(len(queries))]

        def continued(sampler: LocalSampler) -> Any:
            turns = continue_all(sampler, [query.tolist() for query in queries], settings, seeds)
            responses = [q.new_tensor(turn.token_ids) for q, turn in zip(queries, turns, strict=True)]
            if return_prompt:
                responses = [torch.cat([q, r]) for q, r in zip(queries, responses, strict=True)]
            return responses if isinstance(query_tensor, list) else responses[0][None]

        result = continued(self.sampler)
        if not generate_ref_response:
            return result
        with self._reference_sampler() as sampler:
            return result, continued(sampler)

    @contextmanager
    def _reference_sampler(self) -> Iterator[LocalSampler]:
        if self.ref_model is not None:
            yield self._sampler_of_reference
        else:
            with reference_by_disabled_adapters(self.model):
                yield self._sampler_over(self.model)

    @cached_property
    def _sampler_of_reference(self) -> LocalSampler:
        assert self.ref_model is not None
        return self._sampler_over(self.ref_model)

    def _sampler_over(self, model: nn.Module) -> LocalSampler:
        config = self.config
        return LocalSampler(
            model,
            self.tokenizer,
            slots=config.slots,
            cache_bytes=config.cache_bytes,
            deterministic=config.deterministic,
        )

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

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Write model, tokenizer and a model card to `output_dir` (the config's by default)."""
        directory = output_dir if output_dir is not None else self.config.output_dir
        if directory is None:
            raise ConfigError("nowhere to save the model; pass a directory or set output_dir")
        if self.accelerator.is_main_process:
            self._write_model(directory, Path(directory).resolve().name)

    def push_to_hub(self) -> None:
        """Upload model, tokenizer and model card to `hub_model_id` (by default named as `output_dir`)."""
        name = self.config.hub_model_id or Path(self.config.output_dir or "model").resolve().name
        if not self.accelerator.is_main_process:
            return
        api = HfApi()
        repo = api.create_repo(name, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self._write_model(folder, name.rpartition("/")[2])
            api.upload_folder(repo_id=repo.repo_id, folder_path=folder, commit_message="Trained with PPO")

    def _write_model(self, directory: str | Path, name: str) -> None:
        self.model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)
        write_model_card(
            directory,
            model_name=name,
            base_model=self.model.config.name_or_path or None,
            trainer="PPOTrainer",
            method="ppo",
            config_summary=changed_settings(self.config),
        )

    def save_pretrained(self, save_directory: str | Path) -> None:
        """TRL's name of `save_model`."""
        self.save_model(save_directory)

    # State.

    def state_dict(self) -> dict[str, Any]:
        return {
            "kl_controller": self.kl_ctl.state_dict(),
            "running": self.running.state_dict(),
            "highest_reward": None if math.isinf(self.highest_reward) else self.highest_reward,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.kl_ctl.load_state_dict(state["kl_controller"])
        self.running.load_state_dict(state["running"])
        self.highest_reward = -math.inf if state["highest_reward"] is None else state["highest_reward"]

    # Set-up.

    def _fill_in_config(self) -> None:
        config, processes = self.config, self.accelerator.num_processes
        config.world_size = processes
        config.global_batch_size = config.batch_size * processes
        config.global_backward_batch_size = config.backward_batch_size * processes
        config.is_encoder_decoder, config.is_peft_model = self.is_encoder_decoder, self.is_peft_model

    def _reference(self, ref_model: nn.Module | None, num_shared_layers: int | None) -> nn.Module | None:
        if ref_model is not None:
            if num_shared_layers is not None:
                raise ConfigError("num_shared_layers only works without ref_model; leave one of them out")
            return ref_model.requires_grad_(False).eval()
        if self.is_peft_model:
            return None
        return create_reference_model(self.model, num_shared_layers)

    def _default_scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        return get_scheduler(
            self.config.lr_scheduler_type,
            optimizer,
            num_warmup_steps=self.config.warmup_steps,
            num_training_steps=self.config.total_ppo_epochs,
        )

    def _push_if_best(self, mean_score: float) -> None:
        kwargs = self.config.push_to_hub_if_best_kwargs
        if kwargs and self.current_step % self.config.compare_steps == 0 and mean_score > self.highest_reward:
            self.highest_reward = mean_score
            if self.accelerator.is_main_process:
                self.model.push_to_hub(**kwargs)
