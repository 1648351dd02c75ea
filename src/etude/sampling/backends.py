"""How the engine gets logits out of a model: packed, for almost every family, in fixed shapes, or row by row.

A backend owns the key–value cache of a number of slots. The engine tells it how many and how long they are,
which tokens follow in which slots, and gets the logits after the last of them. `choose_backend` asks the
model which one is right.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel

from etude.errors import ConfigError
from etude.models.packing import supports_packing
from etude.models.plans import PackedPlan, packed_inputs
from etude.models.slot_cache import SlotCache
from etude.sampling.feeds import Backend, Feed
from etude.sampling.memory import CacheCost, CacheLimits
from etude.sampling.solo import solo_backend
from etude.sampling.static import CudaCapture, StaticBackend, capturable


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
        ends = torch.tensor(plan.lengths, device=self.model.device).cumsum(0) - 1
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


def choose_backend(
    model: PreTrainedModel, max_length: int, *, deterministic: bool = False, cuda_graphs: bool = False
) -> Backend:
    """The packed one, or the static one where asked for, if that is right; else one forward per row.

    Raises:
        ConfigError: `cuda_graphs` was asked for and can't be had.
        ModelError: nothing is right.
    """
    packs = supports_packing(model, max_length)
    if cuda_graphs and not (packs and capturable(model)):
        raise ConfigError(
            "cuda_graphs=True needs a model that runs packed, is on one CUDA device and has rotary "
            "frequencies that don't depend on the positions; leave cuda_graphs out"
        )
    if not packs:
        return solo_backend(model, max_length)
    if not deterministic and not cuda_graphs:
        return PackedBackend(model)
    capture = partial(CudaCapture, model.device) if cuda_graphs else None
    return StaticBackend(PackedBackend(model), max_length, deterministic=deterministic, capture=capture)


def free_memory(device: torch.device) -> int:
    """Bytes that are free where a model lives: on its accelerator, or in the machine's memory."""
    if device.type in ("cuda", "xpu"):
        free: int = torch.get_device_module(device).mem_get_info(device)[0]
        return free
    return int(psutil.virtual_memory().available)  # mps shares it
