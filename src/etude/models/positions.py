"""How long a sequence a model has positions for, and how long one its tokenizer was made for.

Rotary and relative positions go on without end, if less and less well: whether that is a limit is the
caller's to judge. Not covered: rotations that change with the length (`packing.rotary_switch`).
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

_TABLES = re.compile(r"(^|\.)(wpe|\w*position\w*)$")
_OFFSET = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "longformer")


def position_limit(model: nn.Module) -> int | None:
    """The tokens that a model with a table of positions can read; None for others."""
    has_table = any(
        isinstance(module, nn.Embedding) and _TABLES.search(name) for name, module in model.named_modules()
    )
    return _positions(model.config) if has_table else None


def length_limit(tokenizer: PreTrainedTokenizerBase, config: Any, max_length: int | None) -> int | None:
    """The least of `max_length` and what tokenizer and model were made for."""
    limits = (max_length, tokenizer.model_max_length, _positions(config))
    # A tokenizer without a limit says 1e30.
    return min((limit for limit in limits if limit is not None and limit < 10**9), default=None)


def _positions(config: Any) -> int | None:
    text = config.get_text_config()
    positions: int | None = getattr(text, "max_position_embeddings", None)
    if positions is not None and text.model_type in _OFFSET:
        positions -= text.pad_token_id + 1  # they are counted from there
    return positions
