"""`PPOConfig`: every setting of `PPOTrainer`, declared once, in TRL 0.7.4's names where it had them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from etude.errors import ConfigError
from etude.sampling.memory import parse_size


def _setting(default: Any, help: str, **metadata: Any) -> Any:
    factory = {"default_factory": type(default)} if isinstance(default, dict | list) else {"default": default}
    return field(**factory, metadata={"help": help, **metadata})


@dataclass
class PPOConfig:
    """Settings of `PPOTrainer`. The `help` of each field is what the command line shows."""

    # The run.
    output_dir: str | None = _setting(
        None, "directory of the run: metrics, episodes, checkpoints, the model, a report; train() needs one"
    )
    overwrite_output_dir: bool = _setting(False, "start anew in a directory that holds an earlier run")
    steps: int = _setting(20_000, "episodes that train() plays in total, over all processes")
    seed: int = _setting(0, "seed of tasks, episodes and mini-batches")
    logging_steps: int = _setting(1, "write metrics every so many iterations")
    eval_steps: int = _setting(10, "evaluate on the validation tasks every so many iterations; 0: never")
    save_steps: int = _setting(
        0, "write a checkpoint every so many iterations; 0: only at the end or on Ctrl-C"
    )
    save_total_limit: int | None = _setting(2, "checkpoints to keep; none: all")
    load_best_model_at_end: bool = _setting(
        True, "with validation tasks, end with the best checkpoint's weights"
    )
    success_reward: float = _setting(1.0, "an episode with at least this reward counts as a success")
    episodes_to_log: int = _setting(
        16, "episodes per iteration that are written to the run directory; -1: all"
    )
    report_to: list[str] = _setting([], "trackers: tensorboard, wandb, …")
    push_to_hub: bool = _setting(False, "upload the model at the end of train()")
    hub_model_id: str | None = _setting(None, "repository to upload to; the name of output_dir by default")
    disable_progress: bool = _setting(False, "no live display")

    # Rollouts.
    batch_size: int = _setting(256, "episodes per iteration and process")
    temperature: float = _setting(1.0, "temperature that responses given to step() were sampled at")
    slots: int = _setting(64, "episodes decoded at once by train()'s sampler, at most")
    cache_bytes: int | str | None = _setting(
        None,
        "what the sampler's keys and values may take, such as 2GiB; by default half of the memory that is "
        "free at the start",
    )
    keep_cache: bool = _setting(
        False,
        "sessions that you hold open over an update go on with keys and values of the old weights; those of "
        "train() end before it",
    )
    deterministic: bool = _setting(
        False, "sample the same to the last bit whatever the episodes' timing; slower"
    )

    # Optimisation.
    learning_rate: float = _setting(1e-5, "learning rate of Adam")
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = _setting(
        "constant", "course of the learning rate in train()"
    )
    warmup_steps: int = _setting(0, "iterations of linear warm-up in train()")
    mini_batch_size: int = _setting(1, "episodes per mini-batch, one forward and backward pass")
    gradient_accumulation_steps: int = _setting(1, "mini-batches per optimizer step")
    max_tokens_per_pass: int | None = _setting(
        None, "cut up mini-batches of more tokens: less memory, the same gradient; none: don't"
    )
    ppo_epochs: int = _setting(4, "times each batch is gone through")
    max_grad_norm: float | None = _setting(None, "clip gradients to this norm; none: don't")
    gradient_checkpointing: bool = _setting(
        False, "recompute activations in the backward pass to save memory"
    )

    # The objective.
    gamma: float = _setting(1.0, "discount per sampled token")
    lam: float = _setting(0.95, "lambda of generalised advantage estimation")
    cliprange: float = _setting(0.2, "clip range of the policy ratio")
    cliprange_value: float = _setting(0.2, "clip range of the value prediction")
    vf_coef: float = _setting(0.1, "weight of the value loss")
    whiten_rewards: bool = _setting(False, "whiten per-token rewards before advantages are computed")
    adap_kl_ctrl: bool = _setting(True, "adapt the KL coefficient to reach `target`; else it is fixed")
    init_kl_coef: float = _setting(0.2, "initial KL coefficient")
    kl_penalty: Literal["kl", "abs", "mse", "full"] = _setting(
        "kl", "KL per token: 'kl' (k1), 'abs', 'mse' (k2) or 'full' (over the whole vocabulary)"
    )
    target: float = _setting(6.0, "KL per episode that the adaptive controller aims at")
    horizon: float = _setting(10_000, "episodes over which the adaptive controller reacts")
    use_score_scaling: bool = _setting(False, "divide scores by their running standard deviation")
    use_score_norm: bool = _setting(False, "also subtract their running mean (needs use_score_scaling)")
    score_clip: float | None = _setting(None, "clip scores to ± this; none: don't")
    ratio_threshold: float = _setting(10.0, "skip mini-batches whose mean policy ratio exceeds this")
    early_stopping: bool = _setting(False, "leave the batch once the policy has moved beyond 1.5 × target_kl")
    target_kl: float = _setting(1.0, "KL from the sampling policy that early_stopping allows")

    # TRL 0.7.4's tracking and hub settings.
    exp_name: str | None = _setting(None, "name of the experiment, for trackers")
    task_name: str | None = _setting(None, "name of the task, for trackers")
    model_name: str | None = _setting(None, "name of the model, for trackers")
    query_dataset: str | None = _setting(None, "name of the dataset, for trackers")
    reward_model: str | None = _setting(None, "name of the reward model, for trackers")
    log_with: str | None = _setting(None, "a tracker; the older name of report_to")
    tracker_project_name: str = _setting("etude", "project name in trackers")
    tracker_kwargs: dict[str, Any] = _setting({}, "keyword arguments of the trackers")
    accelerator_kwargs: dict[str, Any] = _setting({}, "keyword arguments of accelerate's Accelerator")
    project_kwargs: dict[str, Any] = _setting({}, "keyword arguments of accelerate's ProjectConfiguration")
    remove_unused_columns: bool = _setting(
        True, "drop dataset columns that neither the model nor logging reads"
    )
    optimize_device_cache: bool = _setting(False, "empty the device's memory cache after each step")
    push_to_hub_if_best_kwargs: dict[str, Any] = _setting(
        {}, "push whenever the mean score is the best so far; needs repo_id"
    )
    compare_steps: int = _setting(1, "steps between comparisons with the best score so far")

    # Filled in by the trainer.
    world_size: int | None = _setting(None, "number of processes", hidden=True)
    is_encoder_decoder: bool | None = _setting(None, "whether the model is an encoder-decoder", hidden=True)
    is_peft_model: bool | None = _setting(None, "whether the model has adapters", hidden=True)
    global_batch_size: int | None = _setting(None, "episodes per iteration over all processes", hidden=True)
    global_backward_batch_size: int | None = _setting(
        None, "episodes per optimizer step over all processes", hidden=True
    )

    def __post_init__(self) -> None:
        for name in (
            "batch_size",
            "mini_batch_size",
            "gradient_accumulation_steps",
            "ppo_epochs",
            "steps",
            "slots",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.max_tokens_per_pass is not None and self.max_tokens_per_pass < 1:
            raise ConfigError(
                f"max_tokens_per_pass is {self.max_tokens_per_pass}; expected at least 1, or none"
            )
        if self.batch_size % self.backward_batch_size:
            nearest = math.ceil(self.batch_size / self.backward_batch_size) * self.backward_batch_size
            raise ConfigError(
                f"batch_size must be a multiple of mini_batch_size × gradient_accumulation_steps, and "
                f"{self.batch_size} is not a multiple of {self.mini_batch_size} × "
                f"{self.gradient_accumulation_steps} = {self.backward_batch_size}; "
                f"the nearest that is: {nearest}"
            )
        for setting in dataclasses.fields(self):
            choices = _choices(setting)
            if choices and getattr(self, setting.name) not in choices:
                raise ConfigError(
                    f"{setting.name} is {getattr(self, setting.name)!r}; expected one of {', '.join(choices)}"
                )
        if self.cache_bytes is not None:
            parse_size(self.cache_bytes)
        if self.use_score_norm and not self.use_score_scaling:
            raise ConfigError("use_score_norm only works together with use_score_scaling; set both")
        if self.push_to_hub_if_best_kwargs and "repo_id" not in self.push_to_hub_if_best_kwargs:
            raise ConfigError("push_to_hub_if_best_kwargs needs a 'repo_id' to push to")
        if isinstance(self.report_to, str):
            self.report_to = [] if self.report_to == "none" else [self.report_to]
        if self.log_with and self.log_with not in self.report_to:
            self.report_to = [*self.report_to, self.log_with]

    @property
    def backward_batch_size(self) -> int:
        """Episodes per optimizer step and process."""
        return self.mini_batch_size * self.gradient_accumulation_steps

    @property
    def total_ppo_epochs(self) -> int:
        """Iterations of train()."""
        return math.ceil(self.steps / (self.batch_size * (self.world_size or 1)))

    def to_dict(self) -> dict[str, Any]:
        """The settings by name, without what the trainer filled in."""
        hidden = {setting.name for setting in dataclasses.fields(self) if setting.metadata.get("hidden")}
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in hidden}


def _choices(setting: dataclasses.Field[Any]) -> tuple[str, ...]:
    annotation = str(setting.type)
    if not annotation.startswith("Literal["):
        return ()
    return tuple(choice.strip().strip("\"'") for choice in annotation[len("Literal[") : -1].split(","))
