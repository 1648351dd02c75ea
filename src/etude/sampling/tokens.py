"""Steps on an accelerator: tokens of any rows, each told where it lies, in a few sizes that can be captured.

A step of the engine has some hundred tokens: one for each row that decodes, and those of prompts and tools'
answers that came in. They go through one forward of as many tokens, rounded up to a size that was captured
before; the ones too many take no part. So a model of hundreds of small kernels costs one launch. Larger
steps, those of many or long prompts, go to the packed backend over the same cache: there the device has
enough to do at each launch.

Not covered: the same bits whatever runs beside (`static`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from etude.math.placing import place
from etude.models.plans import TokenPlan, packed_inputs
from etude.sampling.capture import Capture, Replays, uncached_autocast
from etude.sampling.feeds import Feed
from etude.sampling.memory import CacheCost, CacheLimits
from etude.sampling.packed import PackedBackend

LEAST, MOST = 32, 1024  # tokens of a captured step; sizes double in between
FIRST_LENGTH = 1024  # tokens that slots have room for at first: growing moves the cache, and captures with it

_NUMBERS = 5  # that a step is told of each of its tokens


class TokenBackend:
    """Steps of at most `MOST` tokens by `TokenStep`, others by `packed`, over one cache.

    Args:
        packed: for large steps, and for what concerns the cache.
        capture: makes what captures steps, such as `CudaCapture`; None to run every step eagerly.
    """

    closes_up = False  # a token reads its own slot only, wherever that is
    runs_ahead = True

    def __init__(self, packed: PackedBackend, capture: Callable[[], Capture] | None = None) -> None:
        self.packed = packed
        self.step = TokenStep(packed)
        self.replays = Replays(self.step, capture) if capture else None

    def logits(self, feeds: Sequence[Feed], drawn_R: Tensor | None = None) -> Tensor:
        tokens = sum(len(feed.token_ids) for feed in feeds)
        if tokens > MOST:
            return self.packed.logits(feeds, drawn_R)
        size = max(LEAST, 1 << (tokens - 1).bit_length())
        self.step.fill(feeds, size, drawn_R)
        return (self.replays(size) if self.replays else self.step(size))[: len(feeds)]

    def weights_changed(self) -> None:
        if self.replays:
            self.replays.weights_changed()

    def limits(self, limits: CacheLimits) -> CacheLimits:
        return replace(limits, first=FIRST_LENGTH) if self.replays else limits

    def resize(self, slots: int, length: int, kept: Sequence[int]) -> None:
        self.packed.resize(slots, length, kept)

    def measure(self) -> CacheCost:
        return self.packed.measure()

    def copy(self, source: int, target: int, length: int) -> bool:
        return self.packed.copy(source, target, length)

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes


class TokenStep:
    """A model's forward over single tokens of any slots, its inputs in tensors that stay.

    Nothing in a call depends on values that Python sees, and nothing waits for the device.
    """

    def __init__(self, packed: PackedBackend) -> None:
        self.model = packed.model
        self.cache = packed.cache
        self.keeps_logits = packed.keeps_logits
        self.inputs = torch.zeros(_NUMBERS * MOST, dtype=torch.long, device=self.model.device)
        self.drawn_R = torch.zeros(MOST, dtype=torch.long, device=self.model.device)

    def fill(self, feeds: Sequence[Feed], size: int, drawn_R: Tensor | None) -> None:
        """Set what `size` tokens are told, and what the step before drew."""
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        ends: list[int] = []
        drawn: list[int] = []
        for feed in feeds:
            ids += feed.token_ids
            if len(feed.token_ids) == 1:
                positions.append(feed.past)
                slots.append(feed.slot)
                drawn.append(-1 if feed.drawn is None else feed.drawn)
            else:
                count = len(feed.token_ids)
                positions += range(feed.past, feed.past + count)
                slots += [feed.slot] * count
                drawn += [-1] * count
            ends.append(len(ids) - 1)
        numbers = np.zeros((_NUMBERS, size), dtype=np.int64)
        numbers[2] = numbers[4] = -1
        for row, values in zip(numbers, (ids, positions, slots, ends, drawn), strict=True):
            row[: len(values)] = values
        self.inputs[: _NUMBERS * size] = place(torch.from_numpy(numbers).flatten(), self.inputs.device)
        if drawn_R is not None:
            self.drawn_R[: len(drawn_R)] = drawn_R

    def __call__(self, size: int) -> Tensor:
        """Logits after each feed, [size, vocabulary] or as many rows as there are slots."""
        ids, positions, slots, ends, drawn = self.inputs[: _NUMBERS * size].view(_NUMBERS, size)
        ids = torch.where(drawn < 0, ids, self.drawn_R[drawn.clamp(min=0)])
        ends = ends[: self.cache.slots]
        inputs = packed_inputs(ids, TokenPlan(self.cache, positions, slots))
        with uncached_autocast(self.inputs.device):
            if self.keeps_logits:
                return self.model(**inputs, logits_to_keep=ends).logits[0]
            return self.model(**inputs).logits[0, ends]
