"""The settings of the algorithms without a critic: GRPO, RLOO, REINFORCE and the others.

In TRL 1.x's names, where it has them. Its batch sizes count episodes, and so do these; what is sampled, and
how long, the environment says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from etude.errors import ConfigError
from etude.trainers.online_config import OnlineConfig, require_at_least_one, setting
from etude.types import StopPolicy, StopReason


@dataclass
class GroupConfig(OnlineConfig):
    """What they share."""

    least_generations: ClassVar[int] = 2  # a group of one has nothing to be compared with

    # How long.
    num_train_epochs: float = setting(3.0, "times that train() plays each task, each time with a whole group")
    max_steps: int = setting(-1, "optimizer steps of train(); overrules num_train_epochs; -1: that decides")

    # Rollouts.
    num_generations: int = setting(8, "episodes of each task in an iteration: a group")
    per_device_train_batch_size: int = setting(8, "episodes per forward and backward pass and process")
    steps_per_generation: int | None = setting(
        None, "passes that an iteration's episodes make up; gradient_accumulation_steps by default"
    )

    dynamic_sampling: bool = setting(
        False,
        "play on until the batch is full of groups whose scores differ; the others teach nothing (DAPO)",
    )
    max_sampling_rounds: int = setting(
        4, "rounds of play that dynamic_sampling takes at most, the first one counted"
    )
    mask_truncated_completions: bool = setting(
        False, "episodes that a token limit cut off are compared, and not trained on (overlong filtering)"
    )

    # Optimisation.
    learning_rate: float = setting(1e-6, "learning rate of Adam")
    max_grad_norm: float | None = setting(1.0, "clip gradients to this norm; none: don't")
    num_iterations: int = setting(1, "times each batch is gone through")

    # The objective.
    beta: float = setting(0.0, "weight of the KL to the reference; 0: there is no reference")

    def __post_init__(self) -> None:
        require_at_least_one(self, "per_device_train_batch_size", "num_iterations")
        super().__post_init__()
        if self.num_generations < self.least_generations:
            raise ConfigError(
                f"num_generations is {self.num_generations}; expected at least {self.least_generations}"
                + ": an episode is compared with the others of its group, and a group of one has none"
                * (self.least_generations > 1)
            )
        if self.dynamic_sampling:
            require_at_least_one(self, "max_sampling_rounds")
            if self.num_generations < 2:
                raise ConfigError(
                    "dynamic_sampling looks for groups whose scores differ; set num_generations to at least 2"
                )
        if self.steps_per_generation is not None:
            require_at_least_one(self, "steps_per_generation")
        if self.passes % self.gradient_accumulation_steps:
            raise ConfigError(
                f"steps_per_generation is {self.passes}; expected a multiple of gradient_accumulation_steps "
                f"({self.gradient_accumulation_steps}), so that an iteration ends with an optimizer step"
            )
        if self.batch_size % self.num_generations:
            raise ConfigError(
                f"an iteration has per_device_train_batch_size × steps_per_generation = {self.batch_size} "
                f"episodes per process; expected a multiple of num_generations ({self.num_generations}), so "
                "that groups are whole"
            )
        if not self.beta >= 0:
            raise ConfigError(f"beta is {self.beta}; expected a number >= 0")
        if self.max_steps < 1 and self.max_steps != -1:
            raise ConfigError(
                f"max_steps is {self.max_steps}; expected at least 1, or -1 for num_train_epochs"
            )
        if not self.num_train_epochs > 0:
            raise ConfigError(f"num_train_epochs is {self.num_train_epochs}; expected a number above 0")

    @property
    def policy_table(self) -> Mapping[StopReason, StopPolicy]:
        table = dict(super().policy_table)
        if self.mask_truncated_completions:
            for reason in (StopReason.TURN_TOKENS, StopReason.MAX_TOKENS):
                table[reason] = replace(table[reason], train=False)
        return table

    @property
    def passes(self) -> int:
        return self.steps_per_generation or self.gradient_accumulation_steps

    @property
    def mini_batch_size(self) -> int:
        """Episodes per forward and backward pass."""
        return self.per_device_train_batch_size

    @property
    def batch_size(self) -> int:
        """Episodes per iteration and process."""
        return self.per_device_train_batch_size * self.passes

    def iterations(self, tasks: int) -> int:
        """How often train() plays and learns, with so many tasks to go through."""
        if self.max_steps > 0:
            per_iteration = self.passes // self.gradient_accumulation_steps * self.num_iterations
            return math.ceil(self.max_steps / per_iteration)
        per_iteration = self.batch_size * (self.world_size or 1)
        return math.ceil(self.num_train_epochs * tasks * self.num_generations / per_iteration)


@dataclass
class ClippedConfig(GroupConfig):
    """What those share whose loss clips the policy ratio."""

    epsilon: float = setting(0.2, "how far below 1 the policy ratio still counts")
    epsilon_high: float | None = setting(None, "how far above 1; epsilon by default")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epsilon", "epsilon_high"):
            if (getattr(self, name) or 0) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected a number >= 0")


@dataclass
class GRPOConfig(ClippedConfig):
    """Settings of `GRPOTrainer`. The `help` of each field is what the command line shows."""

    beta: float = setting(0.0, "weight of the KL to the reference in the loss; 0: there is no reference")
    loss_type: Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo"] = setting(
        "dapo",
        "'dapo': mean over the tokens of an optimizer step ('bnpo', which takes that of one pass in TRL, is "
        "the same here); 'grpo': mean over episodes of each one's mean; 'dr_grpo': sum over tokens / "
        "(episodes × max_completion_length); 'cispo': clipped weights, no clipped gradients, else as dapo",
    )
    max_completion_length: int | None = setting(
        None, "tokens an episode can have sampled at most, by which 'dr_grpo' divides"
    )
    scale_rewards: bool | Literal["group", "batch", "none"] = setting(
        "group",
        "divide advantages by the standard deviation of the group's scores (group or true), of all (batch), "
        "or don't (none or false)",
    )
    use_bias_correction_kl: bool = setting(
        False,
        "weigh the KL by the policy ratio, which makes its gradient that of the present policy's KL "
        "(DeepSeek-V3.2)",
    )
    importance_sampling_level: Literal["token", "sequence"] = setting(
        "token", "a policy ratio per token, or one per episode, the geometric mean of its tokens' (GSPO)"
    )
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = setting(
        "sum_then_normalize",
        "with several rewards: compare their weighted sums, or compare each by itself, so that none drowns "
        "the others by its scale, and sum then (GDPO)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reward_scale not in ("group", "batch", "none"):
            raise ConfigError(f"scale_rewards is {self.scale_rewards!r}; expected group, batch or none")
        if self.multi_objective_aggregation == "normalize_then_sum" and self.reward_scale != "group":
            raise ConfigError(
                "scale_rewards does nothing with normalize_then_sum, which scales each reward by its group's "
                "deviation and their sum by the batch's; leave it out"
            )
        if self.loss_type == "cispo" and self.importance_sampling_level == "sequence":
            raise ConfigError("loss_type cispo weighs tokens; leave importance_sampling_level at token")
        if self.loss_type == "dr_grpo" and self.max_completion_length is None:
            raise ConfigError(
                "loss_type dr_grpo divides by a constant; set max_completion_length to the tokens that the "
                "environment lets an episode sample at most (max_new_tokens × max_turns)"
            )
        if self.loss_type != "dr_grpo" and self.max_completion_length is not None:
            raise ConfigError(
                "max_completion_length does nothing without loss_type dr_grpo; how long an episode gets is "
                "the environment's: generation_kwargs={'max_new_tokens': …}"
            )
        if self.max_completion_length is not None:
            require_at_least_one(self, "max_completion_length")

    @property
    def reward_scale(self) -> Literal["group", "batch", "none"]:
        """`scale_rewards`, its older spelling as a flag translated."""
        if isinstance(self.scale_rewards, bool):
            return "group" if self.scale_rewards else "none"
        return self.scale_rewards


@dataclass
class RLOOConfig(ClippedConfig):
    """Settings of `RLOOTrainer`. The `help` of each field is what the command line shows."""

    num_generations: int = setting(2, "episodes of each task in an iteration: a group")
    beta: float = setting(0.05, "weight of the KL to the reference in the reward; 0: there is no reference")
    normalize_advantages: bool = setting(
        False, "scale advantages to unit variance over the iteration's episodes"
    )


@dataclass
class ReinforceConfig(GroupConfig):
    """Settings of `ReinforceTrainer`. The `help` of each field is what the command line shows."""

    least_generations: ClassVar[int] = 1

    num_generations: int = setting(1, "episodes of each task in an iteration")
    beta: float = setting(0.0, "weight of the KL to the reference in the reward; 0: there is no reference")
    normalize_advantages: bool = setting(
        False, "scale advantages to unit variance over the iteration's episodes"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.passes != self.gradient_accumulation_steps or self.num_iterations != 1:
            raise ConfigError(
                "REINFORCE's gradient is that of the policy which sampled, so a batch is good for one "
                "optimizer step; leave steps_per_generation and num_iterations out, or take "
                "reinforce_plus_plus"
            )


@dataclass
class ReinforcePlusPlusConfig(ClippedConfig):
    """Settings of `ReinforcePlusPlusTrainer`. The `help` of each field is what the command line shows."""

    least_generations: ClassVar[int] = 1

    num_generations: int = setting(
        1, "episodes of each task in an iteration; with more than one, their mean is the baseline"
    )
    beta: float = setting(
        0.01,
        "weight of the KL to the reference: per token in the reward, or, with a baseline, in the loss; "
        "0: there is no reference",
    )


@dataclass
class IterativeSFTConfig(GroupConfig):
    """Settings of `IterativeSFTTrainer`. The `help` of each field is what the command line shows."""

    least_generations: ClassVar[int] = 1

    num_generations: int = setting(8, "episodes of each task in an iteration, of which the best are kept")
    keep_best: int = setting(1, "episodes of each task to imitate, at most")
    min_reward: float | None = setting(
        None, "keep only episodes with at least this score; none: any, where a task's scores differ"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least_one(self, "keep_best")
        if self.beta:
            raise ConfigError("beta does nothing in iterative SFT; leave it out")
