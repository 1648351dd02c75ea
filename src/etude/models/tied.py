"""Weights under several names: checkpoints hold them once, and transformers' trainer misses the others.

Not covered: that they are tied again, which loading in place leaves as it is.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def quiet_about_tied(model: nn.Module) -> Iterator[None]:
    """Hold back the warning of missing keys where a checkpoint has each of the weights under another name."""

    def pass_on(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if not message.startswith("There were missing keys in the checkpoint"):
            return True
        return not are_elsewhere(model, set(re.findall(r"'([^']+)'", message)))

    logger = logging.getLogger("transformers.trainer")
    logger.addFilter(pass_on)
    try:
        yield
    finally:
        logger.removeFilter(pass_on)


def are_elsewhere(model: nn.Module, names: set[str]) -> bool:
    """Whether each of these weights has another name that isn't among them."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    others = {id(weight) for name, weight in parameters.items() if name not in names}
    return all(name in parameters and id(parameters[name]) in others for name in names)
