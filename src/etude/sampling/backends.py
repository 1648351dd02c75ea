"""How the engine gets logits out of a model: packed, for almost every family, or row by row.

A backend owns the key–value cache of a number of slots. The engine tells it which tokens follow in which
slots and gets the logits after the last of them. `choose_backend` asks the model which one is right.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from etude.models.attention import PackedPlan, SlotCache, packed_inputs
from etude.models.packing import supports_packing
from etude.sampling.feeds import Backend, Feed
from etude.sampling.solo import solo_backend


class PackedBackend:
    """One flat step for all rows, prompts and single tokens alike, over a preallocated cache."""

    def __init__(self, model: PreTrainedModel, slots: int, max_length: int, first_length: int = 256) -> None:
        self.model = model
        self.max_length = max_length
        self.cache = SlotCache(slots, min(first_length, max_length))
        self.keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def logits(self, feeds: Sequence[Feed]) -> Tensor:
        longest = max(feed.past + len(feed.token_ids) for feed in feeds)
        if longest > self.cache.length:
            self.cache.reserve(min(self.max_length, max(longest, 2 * self.cache.length)))
        plan = PackedPlan(
            lengths=[len(feed.token_ids) for feed in feeds],
            past=[feed.past for feed in feeds],
            cache=self.cache,
            slots=[feed.slot for feed in feeds],
            device=self.model.device,
        )
        inputs = packed_inputs([token for feed in feeds for token in feed.token_ids], plan)
        ends = torch.tensor(plan.lengths, device=self.model.device).cumsum(0) - 1
        if self.keeps_logits:
            return self.model(**inputs, logits_to_keep=ends).logits[0]
        return self.model(**inputs).logits[0, ends]

    def copy(self, source: int, target: int, length: int) -> bool:
        self.cache.copy(source, target, length)
        return True

    @property
    def nbytes(self) -> int:
        return self.cache.nbytes


def choose_backend(model: PreTrainedModel, slots: int, max_length: int) -> Backend:
    """The packed one where it is right, else one forward per row; ModelError where nothing is."""
    if supports_packing(model, max_length):
        return PackedBackend(model, slots, max_length)
    return solo_backend(model, max_length)
