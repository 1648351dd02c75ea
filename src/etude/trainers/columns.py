"""Which columns of a dataset a training loop of the user's own gets to see."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from torch import nn

from etude.models.wrappers import trunk_of

_LOGGED = ("query", "response", "label")  # what log_stats and reward code read


def used_columns(columns: Sequence[str], model: nn.Module) -> list[str]:
    """The columns that the model's forward takes, and those that are logged; order is kept."""
    taken = {*inspect.signature(trunk_of(model).forward).parameters, *_LOGGED}
    return [column for column in columns if column in taken]
