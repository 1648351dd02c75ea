"""`OnlineConfig`: the settings that every online algorithm shares. Nothing slow is imported here."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from etude.errors import ConfigError
from etude.sampling.memory import parse_size
from etude.types import STOP_POLICIES, StopPolicy, StopReason


def setting(default: Any, help: str, **metadata: Any) -> Any:
    """A field with its default and what the command line shows of it."""
    factory = {"default_factory": type(default)} if isinstance(default, dict | list) else {"default": default}
    return field(**factory, metadata={"help": help, **metadata})


@dataclass
class OnlineConfig(ABC):
    """Settings of the run, its rollouts and the optimizer. An algorithm's own class adds the objective."""

    # The run.
    output_dir: str | None = setting(
        None, "directory of the run: metrics, episodes, checkpoints, the model, a report; train() needs one"
    )
    overwrite_output_dir: bool = setting(False, "start anew in a directory that holds an earlier run")
    seed: int = setting(0, "seed of tasks, episodes and mini-batches")
    logging_steps: int = setting(1, "write metrics every so many iterations")
    eval_steps: int = setting(10, "evaluate on the validation tasks every so many iterations; 0: never")
    save_steps: int = setting(
        0, "write a checkpoint every so many iterations; 0: only at the end or on Ctrl-C"
    )
    save_total_limit: int | None = setting(2, "checkpoints to keep; none: all")
    load_best_model_at_end: bool = setting(
        True, "with validation tasks, end with the best checkpoint's weights"
    )
    success_reward: float | dict[str, float] = setting(
        1.0, "an episode with at least this reward counts as a success; in a mixed run perhaps by environment"
    )
    episodes_to_log: int = setting(
        16, "episodes per iteration that are written to the run directory; -1: all"
    )
    report_to: list[str] = setting([], "trackers: tensorboard, wandb, …")
    push_to_hub: bool = setting(False, "upload the model at the end of train()")
    hub_model_id: str | None = setting(None, "repository to upload to; the name of output_dir by default")
    disable_progress: bool = setting(False, "no live display")

    # Rollouts.
    temperature: float = setting(1.0, "temperature that episodes are sampled at")
    slots: int = setting(64, "episodes decoded at once by train()'s sampler, at most")
    cache_bytes: int | str | None = setting(
        None,
        "what the sampler's keys and values may take, such as 2GiB; by default half of the memory that is "
        "free at the start",
    )
    keep_cache: bool = setting(
        False,
        "sessions that you hold open over an update go on with keys and values of the old weights; those of "
        "train() end before it",
    )
    deterministic: bool = setting(
        False, "sample the same to the last bit whatever the episodes' timing; slower"
    )

    # Optimisation.
    learning_rate: float = setting(1e-5, "learning rate of Adam")
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = setting(
        "constant", "course of the learning rate in train()"
    )
    warmup_steps: int = setting(0, "iterations of linear warm-up in train()")
    gradient_accumulation_steps: int = setting(1, "mini-batches per optimizer step")
    max_tokens_per_pass: int | None = setting(
        None, "cut up mini-batches of more tokens: less memory, the same gradient; none: don't"
    )
    max_grad_norm: float | None = setting(None, "clip gradients to this norm; none: don't")
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass to save memory")
    compile: bool = setting(
        False,
        "fuse norms, activations and the head's passes by torch.compile, for sampling and training: "
        "some ten seconds at first, then faster on a GPU",
    )
    cuda_graphs: bool = setting(
        False, "replay the sampler's steps from CUDA graphs, launched before the last one's tokens are known"
    )

    # What is learned from, and how.
    stop_policies: dict[str, dict[str, Any]] = setting(
        {},
        "what a reason to stop means for training, where it isn't what the library says: "
        "{reason: {bootstrap: bool, reward: keep, clamp or drop, train: bool}}",
    )
    entropy_coef: float = setting(0.0, "weight of the policy's entropy in the objective: a bonus for variety")
    importance_sampling_correction: Literal[
        "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
    ] = setting(
        "none",
        "weigh tokens by their probability for the trainer over that for the sampler, by token or episode; "
        "weights above the cap are cut (truncate) or their tokens left out (mask)",
    )
    importance_sampling_cap: float = setting(2.0, "largest of these weights")

    # Trackers and accelerate.
    tracker_project_name: str = setting("etude", "project name in trackers")
    tracker_kwargs: dict[str, Any] = setting({}, "keyword arguments of the trackers")
    accelerator_kwargs: dict[str, Any] = setting({}, "keyword arguments of accelerate's Accelerator")
    project_kwargs: dict[str, Any] = setting({}, "keyword arguments of accelerate's ProjectConfiguration")

    # Filled in by the trainer.
    world_size: int | None = setting(None, "number of processes", hidden=True)

    def __post_init__(self) -> None:
        require_at_least_one(self, "gradient_accumulation_steps", "slots")
        if self.max_tokens_per_pass is not None:
            require_at_least_one(self, "max_tokens_per_pass")
        for each in dataclasses.fields(self):
            choices = _choices(each)
            if choices and getattr(self, each.name) not in choices:
                raise ConfigError(
                    f"{each.name} is {getattr(self, each.name)!r}; expected one of {', '.join(choices)}"
                )
        if self.cache_bytes is not None:
            parse_size(self.cache_bytes)
        self.policy_table  # noqa: B018 (its mistakes show at once)
        if not self.importance_sampling_cap >= 1:
            raise ConfigError(
                f"importance_sampling_cap is {self.importance_sampling_cap}; expected a number >= 1"
            )
        if isinstance(self.report_to, str):
            self.report_to = [] if self.report_to == "none" else [self.report_to]

    @property
    @abstractmethod
    def batch_size(self) -> int:
        """Episodes per iteration and process."""

    @property
    @abstractmethod
    def mini_batch_size(self) -> int:
        """Episodes per forward and backward pass."""

    @property
    def backward_batch_size(self) -> int:
        """Episodes per optimizer step and process."""
        return self.mini_batch_size * self.gradient_accumulation_steps

    @property
    def policy_table(self) -> Mapping[StopReason, StopPolicy]:
        """What each reason to stop means for training: the library's table, with `stop_policies` in it."""
        table = dict(STOP_POLICIES)
        for name, changes in self.stop_policies.items():
            if name not in set(StopReason):
                raise ConfigError(f"stop_policies names {name!r}; expected one of {', '.join(StopReason)}")
            reason = StopReason(name)
            try:
                table[reason] = dataclasses.replace(table[reason], **changes)
            except (TypeError, ValueError) as error:
                raise ConfigError(f"stop_policies[{name!r}] is {changes!r}: {error}") from None
        return table

    def to_dict(self) -> dict[str, Any]:
        """The settings by name, without what the trainer filled in."""
        hidden = {each.name for each in dataclasses.fields(self) if each.metadata.get("hidden")}
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in hidden}


def require_at_least_one(config: OnlineConfig, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ConfigError(f"{name} is {getattr(config, name)}; expected at least 1")


def _choices(each: dataclasses.Field[Any]) -> tuple[str, ...]:
    annotation = str(each.type)
    if not annotation.startswith("Literal["):
        return ()
    return tuple(choice.strip().strip("\"'") for choice in annotation[len("Literal[") : -1].split(","))
