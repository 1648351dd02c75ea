"""The packed backend: one flat step for all rows, for every family that can be packed."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import accumulate

from torch import Tensor
from transformers import PreTrainedModel

from etude.math.placing import place
from etude.models.plans import PackedPlan, packed_inputs
from etude.models.slot_cache import SlotCache
from etude.sampling.feeds import Feed
from etude.sampling.memory import CacheCost, CacheLimits


class PackedBackend:
    """One flat step for all rows, prompts and single tokens alike, over a preallocated cache."""

    closes_up = True

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.cache = SlotCache(slots=0, length=0)
        self.keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def logits(self, feeds: Sequence[Feed]) -> Tensor:
        plan = PackedPlan(
            lengths=[len(feed.token_ids) for feed in feeds],
            past=[feed.past for feed in feeds],
            cache=self.cache,
            slots=[feed.slot for feed in feeds],
            families=[feed.family for feed in feeds],
            device=self.model.device,
        )
        inputs = packed_inputs([token for feed in feeds for token in feed.token_ids], plan)
        ends = place([end - 1 for end in accumulate(plan.lengths)], self.model.device)
        if self.keeps_logits:
            return self.model(**inputs, logits_to_keep=ends).logits[0]
        return self.model(**inputs).logits[0, ends]

    def copy(self, source: int, target: int, length: int) -> bool:
        self.cache.copy(source, target, length)
        return True

    def limits(self, limits: CacheLimits) -> CacheLimits:
        return limits

    def resize(self, slots: int, length: int, kept: Sequence[int]) -> None:
        self.cache.resize(slots, length, kept)

    def measure(self) -> CacheCost:
        cache = SlotCache(slots=1, length=1)
        plan = PackedPlan([1], past=[0], cache=cache, slots=[0], device=self.model.device)
        self.model(**packed_inputs([0], plan))
        sizes = [tensor.nbytes for layer in cache.layers.values() for tensor in layer]
        return CacheCost(token=sum(sizes), growth=max(sizes))

    @property
    def nbytes(self) -> int:
        return self.cache.nbytes
