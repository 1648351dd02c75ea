"""The best weights of a run: kept as they come, and gone back to when nothing better does.

transformers loads the best checkpoint at the end if there is one of that very step, and writes checkpoints at
steps of their own; and its count of evaluations without a better one starts anew where training resumes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from etude.errors import ConfigError
from etude.trainers.run_recorder import is_curve


class BestSoFar(TrainerCallback):
    """Asks for a checkpoint at each evaluation that is the best so far.

    Args:
        patience: evaluations in a row without a better one, after which training ends; None: never.
    """

    def __init__(self, patience: int | None = None) -> None:
        self.patience = patience

    def on_evaluate(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        name = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
        if name not in (metrics or {}):
            if "eval_loss" not in (metrics or {}):
                return  # one of several data sets, and not the one that counts
            measured = [key for key, value in (metrics or {}).items() if is_curve(key, value)]
            known = ", ".join(key.removeprefix("eval_") for key in measured)
            raise ConfigError(
                f"metric_for_best_model is {args.metric_for_best_model!r}, which no evaluation has; expected "
                f"one of {known}"
            )
        # What was logged before the first step has no checkpoint to go back to.
        values = [entry[name] for entry in state.log_history if name in entry and entry["step"]]
        since = evaluations_since_the_best(values, args.greater_is_better)
        if since == 0:
            control.should_save = True
        elif self.patience is not None and since is not None and since >= self.patience:
            control.should_training_stop = True


def evaluations_since_the_best(values: list[float], greater_is_better: bool) -> int | None:
    """How many came after the best of these, which is the first of equals; None if there are none.

    NaN is no better than anything, and never counts as the best.
    """
    best = None
    for at, value in enumerate(values):
        if value == value and (
            best is None or (value > values[best] if greater_is_better else value < values[best])
        ):
            best = at
    return (len(values) if best is None else len(values) - 1 - best) if values else None
