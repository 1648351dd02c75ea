"""Steps on an accelerator: tokens of any rows, each told where it lies, in a few sizes that can be captured.

A step of the engine has some hundred tokens: one for each row that decodes, and those of prompts and tools'
answers that came in. They go through one forward of as many tokens, rounded up to a size that was captured
before; the ones too many take no part. So a model of hundreds of small kernels costs one launch. Larger
steps, those of many or long prompts, go to the packed backend over the same cache: there the device has
enough to do at each launch.

Not covered: the same bits whatever runs beside (`static`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from etude.math.placing import Fetch, Send
from etude.models.plans import TokenPlan, packed_inputs
from etude.sampling.capture import Capture, Replays, uncached_autocast
from etude.sampling.cuts import Row
from etude.sampling.draw import Draw, draw_plain, uniforms
from etude.sampling.feeds import Feed
from etude.sampling.memory import CacheCost, CacheLimits
from etude.sampling.packed import PackedBackend

LEAST, MOST = 64, 1024  # tokens of a captured step; sizes double in between
FIRST_LENGTH = 1024  # tokens that slots have room for at first: growing moves the cache, and captures with it
PATIENCE = 32  # steps that a larger captured size serves before a smaller one is captured

_NUMBERS = 7  # that a step is told of each of its tokens


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
        self._wanted: Counter[int] = Counter()

    def logits(self, feeds: Sequence[Feed], drawn_R: Tensor | None = None) -> Tensor:
        if not self._serves(feeds, drawn_R):
            return self.packed.logits(feeds, drawn_R)
        return self._run(feeds, {}, drawn_R)[: len(feeds)]

    def draw(
        self, feeds: Sequence[Feed], ready: Sequence[int], rows: Sequence[Row], drawn_R: Tensor | None
    ) -> Draw | None:
        if not self._serves(feeds, drawn_R):
            return None
        self._run(feeds, dict(zip(ready, rows, strict=True)), drawn_R)
        return Draw(rows, self.step.fetched(len(feeds)), self.step.drawn_R, {}, ready)

    def _serves(self, feeds: Sequence[Feed], drawn_R: Tensor | None) -> bool:
        drawn = 0 if drawn_R is None else len(drawn_R)
        return drawn <= MOST and sum(len(feed.token_ids) for feed in feeds) <= MOST

    def _run(self, feeds: Sequence[Feed], rows: Mapping[int, Row], drawn_R: Tensor | None) -> Tensor:
        tokens = sum(len(feed.token_ids) for feed in feeds)
        size = self._size(max(LEAST, 1 << (tokens - 1).bit_length()))
        self.step.fill(feeds, size, rows, drawn_R)
        return self.replays(size) if self.replays else self.step(size)

    def _size(self, least: int) -> int:
        """A captured size, if there is one; a smaller one is captured when it has been wanted some times."""
        if not self.replays or self.replays.has(least):
            return least
        self._wanted[least] += 1
        larger = (least << shift for shift in range(1, MOST.bit_length()))
        there = next((size for size in larger if size <= MOST and self.replays.has(size)), None)
        return least if there is None or self._wanted[least] > PATIENCE else there

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
    """A model's forward over single tokens of any slots, and a draw after it, in tensors that stay.

    Nothing in a call depends on values that Python sees, and nothing waits for the device.

    Attributes:
        drawn_R: the tokens that the latest call drew, by feed. The next one may be fed them.
    """

    def __init__(self, packed: PackedBackend) -> None:
        self.model = packed.model
        self.cache = packed.cache
        self.keeps_logits = packed.keeps_logits
        device = self.model.device
        self.inputs = torch.zeros(_NUMBERS * MOST, dtype=torch.long, device=device)
        self.drawn_R = torch.zeros(MOST, dtype=torch.long, device=device)
        self._numbers_R3 = torch.zeros(MOST, 3, dtype=torch.float64, device=device)
        # Two of each: a step is filled while the one before runs, and what that drew is read after that.
        pinned = device.type == "cuda"
        self._sent = [Send(_NUMBERS * MOST, device) for _ in range(2)]
        self._fetched = [
            Fetch(torch.zeros(MOST, 3, dtype=torch.float64, pin_memory=pinned)) for _ in range(2)
        ]

    def fill(self, feeds: Sequence[Feed], size: int, rows: Mapping[int, Row], drawn_R: Tensor | None) -> None:
        """Set what `size` tokens are told, how feeds in `rows` are drawn for, and what was drawn before."""
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
        self._sent.reverse()
        numbers = self._sent[0].memory(_NUMBERS * size).numpy().reshape(_NUMBERS, size)
        numbers[:] = 0
        numbers[2] = numbers[4] = -1
        for row, values in zip(numbers, (ids, positions, slots, ends, drawn), strict=False):
            row[: len(values)] = values
        if rows:
            drawing = list(rows)
            numbers[5].view(np.float64)[drawing] = uniforms(list(rows.values()))
            numbers[6].view(np.float64)[drawing] = [row.params.temperature for row in rows.values()]
        self._sent[0].to(self.inputs[: _NUMBERS * size])
        if drawn_R is not None and drawn_R is not self.drawn_R:
            self.drawn_R[: len(drawn_R)] = drawn_R

    def __call__(self, size: int) -> Tensor:
        """Logits after each feed, [size, vocabulary] or as many rows as there are slots."""
        numbers = self.inputs[: _NUMBERS * size].view(_NUMBERS, size)
        ids, positions, slots, ends, drawn = numbers[:5]
        ids = torch.where(drawn < 0, ids, self.drawn_R[drawn.clamp(min=0)])
        ends = ends[: self.cache.slots]
        inputs = packed_inputs(ids, TokenPlan(self.cache, positions, slots))
        with uncached_autocast(self.inputs.device):
            if self.keeps_logits:
                logits = self.model(**inputs, logits_to_keep=ends).logits[0]
            else:
                logits = self.model(**inputs).logits[0, ends]
        u, temperature = numbers[5:].view(torch.float64)[:, : len(ends)]
        draw_plain(logits, u, temperature, self._numbers_R3[: len(ends)], self.drawn_R[: len(ends)])
        return logits

    def fetched(self, count: int) -> Fetch:
        """What the latest call drew for its first `count` feeds, on its way to Python."""
        self._fetched.reverse()
        self._fetched[0].begin(self._numbers_R3[:count])
        return self._fetched[0]
