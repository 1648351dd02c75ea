"""What scores episodes: functions, metrics of texts, models, and mixtures of them.

The metrics are attributes of this package, `etude.rewards:chrf` say; they load when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

# name -> module that defines it. tests/rewards/test_metrics.py holds this table against the modules.
METRICS = {
    "chrf": "etude.rewards.translation",
    "bleu": "etude.rewards.translation",
    "ter": "etude.rewards.translation",
    "rouge": "etude.rewards.summary",
    "rouge1": "etude.rewards.summary",
    "rouge2": "etude.rewards.summary",
    "rougeL": "etude.rewards.summary",
    "length_penalty": "etude.rewards.summary",
    "copy_penalty": "etude.rewards.summary",
}

__all__ = sorted(METRICS)


def __getattr__(name: str) -> Any:
    if name not in METRICS:
        raise AttributeError(f"module 'etude.rewards' has no attribute {name!r}")
    return getattr(import_module(METRICS[name]), name)
