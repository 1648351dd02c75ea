"""The settings of learning from single answers, each judged good or bad."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from etude.errors import ConfigError
from etude.trainers.preference_config import ReferenceConfig


@dataclass
class KTOConfig(ReferenceConfig):
    """`ReferenceConfig` and what KTO adds.

    Attributes:
        loss_type: kto, or apo_zero_unpaired, which needs no estimate of the KL.
        desirable_weight: of good answers' losses, where there are fewer of them.
        undesirable_weight: of bad answers' losses.
    """

    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.loss_type not in ("kto", "apo_zero_unpaired"):
            raise ConfigError(f"loss_type is {self.loss_type!r}; expected kto or apo_zero_unpaired")
        for name in ("desirable_weight", "undesirable_weight"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected a number >= 0")
        super().__post_init__()
