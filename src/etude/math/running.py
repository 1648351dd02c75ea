"""Mean and standard deviation of all scores seen so far.

Covered: one stream of numbers, merged batch by batch, for scaling rewards. Not covered: several processes
(pass the scores of all of them to each) and the scaling itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from etude.errors import RewardError


class RunningMoments:
    """Count, mean and squared deviation of a stream, in float64.

    Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance": parts A and B of a stream,
    with δ = mean_B − mean_A, merge to mean = mean_A + δ n_B/n and M2 = M2_A + M2_B + δ² n_A n_B/n, where
    M2 is the sum of squared deviations from the mean.

    Attributes:
        count: number of scores seen.
        mean: their mean; 0 before the first.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self._squared_deviation = 0.0

    @property
    def std(self) -> float:
        """Unbiased standard deviation; 1, which scales nothing, while fewer than two scores were seen."""
        return math.sqrt(self._squared_deviation / (self.count - 1)) if self.count > 1 else 1.0

    def update(self, scores: Tensor) -> tuple[float, float]:
        """Take in a batch of scores.

        Args:
            scores: any shape.

        Returns:
            (mean, unbiased standard deviation) of this batch alone; the deviation of a single score is 0.

        Raises:
            RewardError: there are no scores, or one is NaN or infinite.
        """
        batch = scores.detach().double().flatten()
        if batch.numel() == 0:
            raise RewardError("there are no scores to take in; expected at least one")
        if not bool(batch.isfinite().all()):
            index = int((~batch.isfinite()).nonzero()[0])
            raise RewardError(
                f"score {index} is {batch[index].item()}; expected a finite number. It would stay in the "
                "running mean for ever: fix the reward that gave it"
            )
        count, mean = batch.numel(), float(batch.mean())
        squared_deviation = float(torch.square(batch - mean).sum())

        total, shift = self.count + count, mean - self.mean
        self._squared_deviation += squared_deviation + shift**2 * self.count * count / total
        self.mean += shift * count / total
        self.count = total
        return mean, math.sqrt(squared_deviation / max(count - 1, 1))

    def state_dict(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "squared_deviation": self._squared_deviation}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.count = int(state["count"])
        self.mean = float(state["mean"])
        self._squared_deviation = float(state["squared_deviation"])
