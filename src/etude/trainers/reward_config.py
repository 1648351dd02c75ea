"""The settings of reward models' training. Beside the trainers: reading them loads no model code."""

from __future__ import annotations

from dataclasses import dataclass, field

from etude.errors import ConfigError
from etude.trainers.data_config import DataConfig


@dataclass
class RewardConfig(DataConfig):
    """What training a reward model adds.

    Attributes:
        max_length: a longer answer loses its prompt's beginning, and it is said how many did. The model's own
            limit holds in any case.
        append_eos: end answers that are texts with the end-of-sequence token, after which the score is read.
        disable_dropout: True unless given: noise in a score moves its distance to another one's.
        center_rewards_coefficient: of a penalty that keeps scores around zero (Eisenstein et al. 2023,
            eq. 2); 0.01 is usual. None is none.
    """

    disable_dropout: bool = True
    center_rewards_coefficient: float | None = None

    def __post_init__(self) -> None:
        coefficient = self.center_rewards_coefficient
        if coefficient is not None and coefficient < 0:
            raise ConfigError(f"center_rewards_coefficient is {coefficient}; expected None or at least 0")
        super().__post_init__()


@dataclass
class PRMConfig(DataConfig):
    """What training a process reward model adds.

    Attributes:
        max_length: a longer answer loses its prompt's beginning, and it is said how many did. The model's own
            limit holds in any case.
        disable_dropout: True unless given.
        step_separator: follows each step; the step is judged after its last token.
        train_on_last_step_only: learn the last step's label only: whether the whole answer is right.
    """

    append_eos: bool = field(default=False, metadata={"hidden": True})
    disable_dropout: bool = True
    step_separator: str = "\n"
    train_on_last_step_only: bool = False

    def __post_init__(self) -> None:
        if self.append_eos:
            raise ConfigError("append_eos does nothing here: steps are judged where they end; leave it out")
        super().__post_init__()
