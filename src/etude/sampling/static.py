"""Decoding in a fixed shape: a row for every slot, idle ones too, whatever is in them.

Rows that add one token go through one forward of `rows` tokens, row i over slot i, with attention over a
power of two of keys and the rest masked. Rows that take no part are computed and thrown away; they write
to a spare slot. Prompts are left to the packed backend, over the same cache. Two things rest on it:

**deterministic.** The last bits of a matrix product depend on its shape. Here every shape that a session's
numbers go through follows from its own history: prompts are fed one session at a time in the session's own
pieces, each row gets the width of its own length, and a cache that was evicted is rebuilt in the pieces
that it was first fed in. A row's place in the block can matter too (MKL computes rows left over by a multiple
of 4 with other instructions), so the block has a multiple of 8 rows, and before the first step it is
tried out whether rows in other places and beside other rows give the same bits. Where they don't
(mixtures of experts, for one), rows are decoded one at a time: slow, and the same by construction. What a
session samples is then the same to the last bit for the same weights, seed, tokens and sampling
parameters. It may change with the device, library versions, number of threads, `slots`, `max_length`,
`prefill_tokens`, and with `cache_bytes` where that leaves fewer slots than `slots`. The trial is evidence,
not proof: it covers a few steps of the real model.

**CUDA graphs.** A fixed shape can be captured once per width and replayed, which saves the launches of
hundreds of small kernels. Weights that are updated in place stay valid in a graph; tensors that moved make
it be captured anew.

The number of slots is one for the sampler's life: what the budget holds at full length, the block's idle
rows counted. Slots grow longer as everywhere.

Run on CPUs and, deterministic with and without captures, on an H100: the same bits. In place of CUDA graphs
the tests trace the step to a list of operations (`make_fx`) and replay that. Captures of what isn't
deterministic are of single tokens (`tokens`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from etude.errors import CacheBudgetError
from etude.models.plans import StaticPlan, packed_inputs
from etude.models.slot_cache import SlotCache
from etude.sampling.capture import Capture, Replays, uncached_autocast
from etude.sampling.cuts import Row
from etude.sampling.draw import Draw
from etude.sampling.feeds import Feed
from etude.sampling.memory import CacheCost, CacheLimits, format_size

if TYPE_CHECKING:
    from etude.sampling.packed import PackedBackend

ROWS = 8  # a block's rows are a multiple of this where their bits matter
KEYS = 64  # … and a slot's positions of this, so that every slot is aligned alike; also the least width


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


class StaticBackend:
    """Single tokens in blocks of fixed shape; prompts by `packed`, over the same cache.

    Args:
        packed: its cache gets one slot more than there are rows, the spare one.
        max_length: of a session.
        deterministic: each row at its own width, prompts one by one.
        capture: makes what captures steps, such as `CudaCapture`; None to run every step eagerly.
    """

    closes_up = False  # idle rows are computed anyway
    runs_ahead = False

    def __init__(
        self,
        packed: PackedBackend,
        max_length: int,
        *,
        deterministic: bool = False,
        capture: Callable[[], Capture] | None = None,
    ) -> None:
        self.packed = packed
        self.cache = packed.cache
        self.max_length = round_up(max_length, KEYS)
        self.deterministic = deterministic
        self.step = StaticStep(packed.model, self.cache)
        self.replays = Replays(self.step, capture) if capture else None

    def logits(self, feeds: Sequence[Feed], drawn_R: Tensor | None = None) -> Tensor:
        assert drawn_R is None, "this backend doesn't run ahead"
        blocks, prompts = self._arrange(feeds)
        rows: dict[int, Tensor] = {}
        for members in [[i] for i in prompts] if self.deterministic else [prompts] if prompts else []:
            logits = self.packed.logits([feeds[i] for i in members])
            rows.update(zip(members, logits, strict=True))
        for width, members in blocks.items():
            self.step.fill((feeds[i].slot, feeds[i].past, feeds[i].token_ids[0]) for i in members)
            logits = self.replays(width) if self.replays else self.step(width)
            # Taken out of the block at once: the next replay writes over it.
            rows.update(zip(members, logits[[feeds[i].slot for i in members]], strict=True))
        return torch.stack([rows[i] for i in range(len(feeds))])

    def draw(
        self, feeds: Sequence[Feed], ready: Sequence[int], rows: Sequence[Row], drawn_R: Tensor | None
    ) -> Draw | None:
        return None

    def weights_changed(self) -> None:
        if self.replays:
            self.replays.weights_changed()

    def limits(self, limits: CacheLimits) -> CacheLimits:
        """As many slots as there are to be from now on, and what the block has beside them.

        Raises:
            CacheBudgetError: the budget doesn't hold the smallest block at full length.
        """
        slot = limits.cost.of_session(self.max_length)
        multiple = self._rows(1)
        rows = min(self._rows(limits.slots), (limits.budget // slot - 1) // multiple * multiple)
        if rows < multiple:
            least = (multiple + 1) * slot
            raise CacheBudgetError(
                f"decoding in a fixed block needs at least {multiple + 1} slots of {self.max_length:,} "
                f"tokens, {format_size(least)} ({least:,} bytes) of keys and values, and the budget is "
                f"{format_size(limits.budget)} ({limits.budget:,} bytes); raise cache_bytes, or shorten "
                "max_length"
            )
        slots = min(limits.slots, rows)
        return replace(limits, slots=slots, idle=rows + 1 - slots)

    def resize(self, slots: int, length: int, kept: Sequence[int]) -> None:
        self.packed.resize(self._rows(slots) + 1, self._width(length), kept)

    def measure(self) -> CacheCost:
        return replace(self.packed.measure(), multiple=KEYS)

    def copy(self, source: int, target: int, length: int) -> bool:
        return self.packed.copy(source, target, length)

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes

    def _arrange(self, feeds: Sequence[Feed]) -> tuple[dict[int, list[int]], list[int]]:
        """Which feeds are decoded in a block, by its width, and which ones as prompts."""
        single = [i for i, feed in enumerate(feeds) if len(feed.token_ids) == 1]
        if self.deterministic:  # tried out at the first step, while the cache is empty: it takes memory
            single = single if self._alike else []
        blocks: dict[int, list[int]] = defaultdict(list)
        widest = max((feeds[i].past + 1 for i in single), default=0)
        for i in single:
            blocks[self._width(feeds[i].past + 1 if self.deterministic else widest)].append(i)
        taken = set(single)
        return blocks, [i for i in range(len(feeds)) if i not in taken]

    def _width(self, length: int) -> int:
        return min(max(KEYS, 1 << (length - 1).bit_length()), self.max_length)

    def _rows(self, slots: int) -> int:
        return round_up(slots, ROWS) if self.deterministic else slots

    @cached_property
    def _alike(self) -> bool:
        return rows_are_alike(self.packed.model, self.step.rows)


class StaticStep:
    """A model's forward over one token for each row of a block, its inputs in tensors that stay.

    Nothing in a call depends on values that Python sees, and nothing waits for the device.
    """

    def __init__(self, model: PreTrainedModel, cache: SlotCache) -> None:
        self.model = model
        self.cache = cache
        self.inputs = torch.zeros(3, self.rows, dtype=torch.long, device=model.device)

    @property
    def rows(self) -> int:
        return max(0, self.cache.slots - 1)

    def fill(self, taking_part: Iterable[tuple[int, int, int]]) -> None:
        """Set (slot, position, token) of the rows that take part; the others write to the spare slot."""
        rows = [(0, 0, self.rows)] * self.rows
        for slot, position, token in taking_part:
            rows[slot] = (token, position, slot)
        if self.inputs.shape[1] != self.rows:
            self.inputs = self.inputs.new_zeros(3, self.rows)
        self.inputs.copy_(torch.tensor(rows).T)

    def __call__(self, width: int) -> Tensor:
        """Logits, [rows, vocabulary]."""
        ids, positions, slots = self.inputs
        plan = StaticPlan(self.cache, width, positions, slots)
        with uncached_autocast(self.inputs.device):
            return self.model(**packed_inputs(ids, plan)).logits[0]


@torch.no_grad()
def rows_are_alike(model: PreTrainedModel, rows: int) -> bool:
    """Whether a row's logits are the same bits at every place of a block and beside any other rows."""
    vocab = model.config.get_text_config().vocab_size
    tokens = [(7919 * i + 13) % vocab for i in range(rows)]

    def run(order: list[int]) -> Tensor:
        step = StaticStep(model, SlotCache(rows + 1, KEYS))
        logits = []
        for position in range(4):
            step.fill((slot, position, (t + 31 * position) % vocab) for slot, t in enumerate(order))
            logits.append(step(KEYS))
        return torch.stack(logits)

    together = run(tokens)
    for shift in (1, rows // 2 - 1):
        moved = run(tokens[-shift:] + tokens[:-shift])
        if not torch.equal(moved, together.roll(shift, dims=1)):
            return False
    return bool((run([tokens[0]] * rows) == together[:, :1]).all())
