"""`PPOConfig`: every setting of `PPOTrainer`, declared once, in TRL 0.7.4's names where it had them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from etude.errors import ConfigError
from etude.trainers.online_config import OnlineConfig, require_at_least_one, setting


@dataclass
class PPOConfig(OnlineConfig):
    """Settings of `PPOTrainer`. The `help` of each field is what the command line shows."""

    # Rollouts.
    steps: int = setting(20_000, "episodes that train() plays in total, over all processes")
    batch_size: int = setting(256, "episodes per iteration and process")
    temperature: float = setting(1.0, "temperature that responses given to step() were sampled at")

    # Optimisation.
    mini_batch_size: int = setting(1, "episodes per forward and backward pass")
    value_learning_rate: float | None = setting(
        None, "learning rate of a value model of its own; none: learning_rate"
    )
    ppo_epochs: int = setting(4, "times each batch is gone through")

    # The objective.
    gamma: float = setting(1.0, "discount per sampled token")
    lam: float = setting(0.95, "lambda of generalised advantage estimation")
    cliprange: float = setting(0.2, "clip range of the policy ratio")
    cliprange_value: float = setting(0.2, "clip range of the value prediction")
    vf_coef: float = setting(0.1, "weight of the value loss")
    whiten_rewards: bool = setting(False, "whiten per-token rewards before advantages are computed")
    adap_kl_ctrl: bool = setting(True, "adapt the KL coefficient to reach `target`; else it is fixed")
    init_kl_coef: float = setting(
        0.2,
        "initial KL coefficient; 0 without adap_kl_ctrl: there is no reference model, and no KL is measured",
    )
    kl_penalty: Literal["kl", "abs", "mse", "full"] = setting(
        "kl", "KL per token: 'kl' (k1), 'abs', 'mse' (k2) or 'full' (over the whole vocabulary)"
    )
    target: float = setting(6.0, "KL per episode that the adaptive controller aims at")
    horizon: float = setting(10_000, "episodes over which the adaptive controller reacts")
    use_score_scaling: bool = setting(
        False,
        "divide scores by their running standard deviation; in a mixed run each environment's by its own, so "
        "that none drowns the others by its scale",
    )
    use_score_norm: bool = setting(False, "also subtract their running mean (needs use_score_scaling)")
    score_clip: float | None = setting(None, "clip scores to ± this; none: don't")
    ratio_threshold: float = setting(10.0, "skip mini-batches whose mean policy ratio exceeds this")
    early_stopping: bool = setting(False, "leave the batch once the policy has moved beyond 1.5 × target_kl")
    target_kl: float = setting(1.0, "KL from the sampling policy that early_stopping allows")

    # TRL 0.7.4's tracking and hub settings.
    exp_name: str | None = setting(None, "name of the experiment, for trackers")
    task_name: str | None = setting(None, "name of the task, for trackers")
    model_name: str | None = setting(None, "name of the model, for trackers")
    query_dataset: str | None = setting(None, "name of the dataset, for trackers")
    reward_model: str | None = setting(None, "name of the reward model, for trackers")
    log_with: str | None = setting(None, "a tracker; the older name of report_to")
    remove_unused_columns: bool = setting(
        True, "drop dataset columns that neither the model nor logging reads"
    )
    optimize_device_cache: bool = setting(False, "empty the device's memory cache after each step")
    push_to_hub_if_best_kwargs: dict[str, Any] = setting(
        {}, "push whenever the mean score is the best so far; needs repo_id"
    )
    compare_steps: int = setting(1, "steps between comparisons with the best score so far")

    # Filled in by the trainer.
    is_encoder_decoder: bool | None = setting(None, "whether the model is an encoder-decoder", hidden=True)
    is_peft_model: bool | None = setting(None, "whether the model has adapters", hidden=True)
    global_batch_size: int | None = setting(None, "episodes per iteration over all processes", hidden=True)
    global_backward_batch_size: int | None = setting(
        None, "episodes per optimizer step over all processes", hidden=True
    )

    def __post_init__(self) -> None:
        require_at_least_one(self, "batch_size", "mini_batch_size", "ppo_epochs", "steps")
        super().__post_init__()
        if self.batch_size % self.backward_batch_size:
            nearest = math.ceil(self.batch_size / self.backward_batch_size) * self.backward_batch_size
            raise ConfigError(
                f"batch_size must be a multiple of mini_batch_size × gradient_accumulation_steps, and "
                f"{self.batch_size} is not a multiple of {self.mini_batch_size} × "
                f"{self.gradient_accumulation_steps} = {self.backward_batch_size}; "
                f"the nearest that is: {nearest}"
            )
        if self.use_score_norm and not self.use_score_scaling:
            raise ConfigError("use_score_norm only works together with use_score_scaling; set both")
        if self.push_to_hub_if_best_kwargs and "repo_id" not in self.push_to_hub_if_best_kwargs:
            raise ConfigError("push_to_hub_if_best_kwargs needs a 'repo_id' to push to")
        if self.log_with and self.log_with not in self.report_to:
            self.report_to = [*self.report_to, self.log_with]

    @property
    def total_ppo_epochs(self) -> int:
        """Iterations of train()."""
        return math.ceil(self.steps / (self.batch_size * (self.world_size or 1)))
