"""The packed backend: one flat step for all rows, for every family that can be packed."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedModel

from etude.math.placing import place
from etude.models.plans import PackedPlan, packed_inputs
from etude.models.slot_cache import SlotCache
from etude.sampling.cuts import Row
from etude.sampling.draw import Draw
from etude.sampling.feeds import Feed
from etude.sampling.memory import CacheCost, CacheLimits


class PackedBackend:
    """One flat step for all rows, prompts and single tokens alike, over a preallocated cache."""

    closes_up = True
    runs_ahead = False  # whoever launches hundreds of kernels has no time to gain

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.cache = SlotCache(slots=0, length=0)
        self.keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def logits(self, feeds: Sequence[Feed], drawn_R: Tensor | None = None) -> Tensor:
        plan = PackedPlan(
            lengths=[len(feed.token_ids) for feed in feeds],
            past=[feed.past for feed in feeds],
            cache=self.cache,
            slots=[feed.slot for feed in feeds],
            families=[feed.family for feed in feeds],
            device=self.model.device,
        )
        ids_T = place([token for feed in feeds for token in feed.token_ids], self.model.device)
        if drawn_R is not None:
            rows = [
                (start, f.drawn) for start, f in zip(plan.starts, feeds, strict=True) if f.drawn is not None
            ]
            places, source = place(rows, self.model.device, torch.long).view(-1, 2).T
            ids_T[places] = drawn_R[source]
        inputs = packed_inputs(ids_T, plan)
        ends = place([end - 1 for end in accumulate(plan.lengths)], self.model.device)
        if self.keeps_logits:
            return self.model(**inputs, logits_to_keep=ends).logits[0]
        return self.model(**inputs).logits[0, ends]

    def draw(
        self, feeds: Sequence[Feed], ready: Sequence[int], rows: Sequence[Row], drawn_R: Tensor | None
    ) -> Draw | None:
        return None

    def weights_changed(self) -> None:
        """Looked up at every step."""

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
