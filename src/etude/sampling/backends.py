"""How the engine gets logits out of a model: packed, for almost every family, or row by row.

A backend owns the key–value cache of a number of slots. The engine tells it how many and how long they are,
which tokens follow in which slots, and gets the logits after the last of them. `choose_backend` asks the
model which one is right.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel

from etude.models.attention import PackedPlan, SlotCache, packed_inputs
from etude.models.packing import supports_packing
from etude.sampling.feeds import Backend, Feed
from etude.sampling.memory import CacheCost
from etude.sampling.solo import solo_backend


class PackedBackend:
    """One flat step for all rows, prompts and single tokens alike, over a preallocated cache."""

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


def choose_backend(model: PreTrainedModel, max_length: int) -> Backend:
    """The packed one where it is right, else one forward per row; ModelError where nothing is."""
    return PackedBackend(model) if supports_packing(model, max_length) else solo_backend(model, max_length)


def free_memory(device: torch.device) -> int:
    """Bytes that are free where a model lives: on its accelerator, or in the machine's memory."""
    if device.type in ("cuda", "xpu"):
        free: int = torch.get_device_module(device).mem_get_info(device)[0]
        return free
    return int(psutil.virtual_memory().available)  # mps shares it
