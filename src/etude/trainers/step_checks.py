"""What a caller hands to `step` and to `learn`, checked before anything changes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from etude.data.batch import Trajectory
from etude.errors import DataError, RewardError


def check_step(
    batch_size: int,
    queries: Any,
    responses: Any,
    scores: Any,
    masks: Any,
) -> None:
    for name, values in (
        ("queries", queries),
        ("responses", responses),
        ("scores", scores),
        ("masks", masks),
    ):
        if values is None and name == "masks":
            continue
        if not isinstance(values, list | tuple):
            raise DataError(f"{name} is a {type(values).__name__}; expected a list of tensors")
        if len(values) != batch_size:
            raise DataError(f"{name} has {len(values)} entries; expected batch_size = {batch_size}")
        if name in ("queries", "responses"):
            for i, value in enumerate(values):
                if not isinstance(value, Tensor) or value.dim() != 1:
                    found = (
                        f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                    )
                    raise DataError(f"{name}[{i}] is {found}; expected a tensor of token ids [n]")


def check_batch(trajectories: Sequence[Trajectory], plays: int = 1) -> None:
    """What `learn` gets: whole groups of `plays`, with scores to learn from.

    Raises:
        DataError: there are none, or part of a group is missing.
        RewardError: a score is NaN or infinite.
    """
    if not trajectories:
        raise DataError("learn got no trajectories; expected at least one")
    if len(trajectories) % plays:
        raise DataError(
            f"learn got {len(trajectories)} trajectories; expected a multiple of num_generations ({plays}), "
            "group by group"
        )
    for i, trajectory in enumerate(trajectories):
        if not math.isfinite(trajectory.score):
            raise RewardError(f"the score of trajectory {i} is {trajectory.score}; expected a finite number")


def finite_score(score: Tensor | float, index: int) -> float:
    if isinstance(score, Tensor) and score.numel() != 1:
        raise DataError(f"scores[{index}] has shape {tuple(score.shape)}; expected a single number")
    value = float(score)
    if not math.isfinite(value):
        raise RewardError(f"scores[{index}] is {value}; expected a finite number")
    return value
