"""How long a sequence can be before a model has no position for its tokens.

Rotary and relative positions go on without end, if less and less well: they are the caller's to judge.
"""

from __future__ import annotations

import re

from torch import nn

_POSITIONS = re.compile(r"(^|\.)(wpe|\w*position\w*)$")


def position_limit(model: nn.Module) -> int | None:
    """The tokens that a model with a table of positions can read; None for others."""
    config = getattr(model, "config", None)
    has_table = any(
        isinstance(module, nn.Embedding) and _POSITIONS.search(name) for name, module in model.named_modules()
    )
    limit = getattr(config, "max_position_embeddings", None) if has_table else None
    return int(limit) if limit else None
