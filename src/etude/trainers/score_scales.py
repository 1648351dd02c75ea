"""What scores are divided by: their running standard deviation, of each environment by itself.

Rewards of different environments have different scales. PPO whitens advantages over the whole batch, so the
environment whose scores vary most would decide where the policy goes, and the value head would follow its
returns. In units of its own deviation, each environment counts by how often it is played.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from etude.math.running import RunningMoments


class ScoreScales:
    """Mean and deviation of all scores so far, by environment; "" where a run has but one."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.moments: dict[str, RunningMoments] = {}

    def update(self, environments: Sequence[str], scores_B: Tensor) -> tuple[Tensor, Tensor]:
        """Take in the scores of a batch, those of all processes.

        Args:
            environments: of each score.

        Returns:
            mean and deviation of each score's environment [B]; the deviation is above 0.
        """
        scores: dict[str, list[float]] = {}
        for name, score in gather_object(list(zip(environments, scores_B.tolist(), strict=True))):
            scores.setdefault(name, []).append(score)
        for name in sorted(scores):
            self.moments.setdefault(name, RunningMoments()).update(torch.tensor(scores[name]))
        means = [self.moments[name].mean for name in environments]
        deviations = [self.moments[name].std for name in environments]
        return scores_B.new_tensor(means), scores_B.new_tensor(deviations) + torch.finfo(scores_B.dtype).eps

    def state_dict(self) -> dict[str, dict[str, float]]:
        return {name: moments.state_dict() for name, moments in self.moments.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, float]]) -> None:
        self.moments = {name: RunningMoments() for name in state}
        for name, moments in self.moments.items():
            moments.load_state_dict(state[name])
