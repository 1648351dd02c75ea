"""What a caller hands to `PPOTrainer.step`, checked before anything changes."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

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


def finite_score(score: Tensor | float, index: int) -> float:
    if isinstance(score, Tensor) and score.numel() != 1:
        raise DataError(f"scores[{index}] has shape {tuple(score.shape)}; expected a single number")
    value = float(score)
    if not math.isfinite(value):
        raise RewardError(f"scores[{index}] is {value}; expected a finite number")
    return value
