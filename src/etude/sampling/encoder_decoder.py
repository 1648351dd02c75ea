"""The packed backend for encoder–decoders: sources are read once, their decoders run in one flat step.

A slot holds a sequence's own keys and values and those of its source. A source that several sequences have (a
group's) is encoded once; the others' slots get a copy. Not covered: families whose decoder can't be packed
(`solo`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

from torch import Tensor
from transformers import PreTrainedModel

from etude.math.placing import place
from etude.models.cross_attention import CrossPlan
from etude.models.encoder_decoder import decode, encode
from etude.models.plans import PackedPlan
from etude.models.slot_cache import SlotCache
from etude.sampling.cuts import Row
from etude.sampling.draw import Draw
from etude.sampling.feeds import Feed
from etude.sampling.memory import CacheCost, CacheLimits

Source = tuple[int, ...]

_FORESEEN = 1024  # sources that wait whose lengths are thought of when slots grow
_TOGETHER = 8  # sources that the encoder reads at once, if so many wait: it is faster than one by one


class EncoderDecoderBackend:
    """`feeds.Backend` over two preallocated caches.

    Args:
        max_source_length: tokens that a source may have.
        upcoming: the next n sources that sessions wait with.
    """

    closes_up = True
    runs_ahead = False

    def __init__(
        self,
        model: PreTrainedModel,
        max_source_length: int,
        upcoming: Callable[[int], Sequence[Sequence[int]]] = lambda n: (),
    ) -> None:
        self.model = model
        self.upcoming = upcoming
        self.max_source_length = max_source_length
        self.cache = SlotCache(slots=0, length=0)
        self.sources = SlotCache(slots=0, length=0)
        self.sources_encoded = 0
        self._ahead: dict[Source, Tensor] = {}  # states of sources that no slot has yet
        self._held: dict[int, Source] = {}  # by slot, the source whose keys and values are there
        self._current: set[int] = set()  # slots whose source was read by the present weights

    def logits(self, feeds: Sequence[Feed], drawn_R: Tensor | None = None) -> Tensor:
        assert drawn_R is None, "this backend doesn't run ahead"
        device = self.model.device
        lengths, slots = [len(feed.token_ids) for feed in feeds], [feed.slot for feed in feeds]
        new, places = self._read([feed for feed in feeds if feed.past == 0])
        cross = CrossPlan(
            self.sources,
            slots=slots,
            lengths=lengths,
            source_lengths=[len(self._held[slot]) for slot in slots],
            new=new,
            places=places,
            device=device,
        )
        plan = PackedPlan(
            lengths,
            past=[feed.past for feed in feeds],
            cache=self.cache,
            slots=slots,
            device=device,
            cross=cross,
        )
        ids_T = place([token for feed in feeds for token in feed.token_ids], device)
        ends = place([end - 1 for end in accumulate(lengths)], device)
        return decode(self.model, ids_T, plan)[ends]

    def _read(self, feeds: Sequence[Feed]) -> tuple[list[Tensor], list[tuple[int, int]]]:
        """States of sources that no slot has, and (slot, index of its source's states) to write them to."""
        longest = max((len(feed.source_ids) for feed in feeds), default=0)
        if longest > self.sources.length:
            longest = max(longest, *map(len, self.upcoming(_FORESEEN)), 0)
            length = min(self.max_source_length, max(longest, 2 * self.sources.length))
            self.sources.resize(self.sources.slots, length, range(self.sources.slots) if self._held else ())
        places = []
        needed: dict[Source, int] = {}
        begun: dict[int, Source] = {feed.slot: tuple(feed.source_ids) for feed in feeds}
        kept = {slot for slot in self._current if begun.get(slot, self._held[slot]) == self._held[slot]}
        at_hand = {self._held[slot]: slot for slot in kept}
        for slot, source in begun.items():
            if slot in kept:
                continue
            if (holder := at_hand.get(source)) is not None:
                self.sources.copy(holder, slot, len(source))
            else:
                places.append((slot, needed.setdefault(source, len(needed))))
            self._held[slot] = source
            self._current.add(slot)
        return self._states(list(needed)), places

    def _states(self, needed: Sequence[Source]) -> list[Tensor]:
        """What the encoder makes of these. If it has to read some, it reads ones that wait with them."""
        unread = [source for source in needed if source not in self._ahead]
        if unread:
            room = max(0, _TOGETHER - len(unread))
            next_ones = dict.fromkeys(map(tuple, self.upcoming(room)))
            self._ahead = {s: states for s, states in self._ahead.items() if s in needed or s in next_ones}
            known = {*self._ahead, *unread, *(self._held[slot] for slot in self._current)}
            unread += [source for source in next_ones if source not in known]
            self._ahead |= zip(unread, encode(self.model, unread), strict=True)
            self.sources_encoded += len(unread)
        return [self._ahead.pop(source) for source in needed]

    def draw(
        self, feeds: Sequence[Feed], ready: Sequence[int], rows: Sequence[Row], drawn_R: Tensor | None
    ) -> Draw | None:
        return None

    def weights_changed(self) -> None:
        """What was read by other weights is read again when its sequence begins anew."""
        self._current.clear()
        self._ahead.clear()

    def copy(self, source: int, target: int, length: int) -> bool:
        """A sequence moves to another slot, and its source with it."""
        self.cache.copy(source, target, length)
        if (held := self._held.get(source)) is not None:
            self.sources.copy(source, target, len(held))
            self._held[target] = held
            self._current.discard(target)
            if source in self._current:
                self._current.add(target)
        return True

    def limits(self, limits: CacheLimits) -> CacheLimits:
        return limits

    def resize(self, slots: int, length: int, kept: Sequence[int]) -> None:
        self.cache.resize(slots, length, kept)
        self.sources.resize(slots, self.sources.length, kept)
        self._held = {new: self._held[old] for new, old in enumerate(kept) if old in self._held}
        self._current = {new for new, old in enumerate(kept) if old in self._current}

    def measure(self) -> CacheCost:
        """A session's source is counted at its full length."""
        probe = EncoderDecoderBackend(self.model, 1)
        probe.resize(1, 1, kept=[])
        probe.logits([Feed(slot=0, past=0, token_ids=[0], source_ids=[0])])
        caches = probe.cache, probe.sources
        own, read = ([t.nbytes for layer in cache.layers.values() for t in layer] for cache in caches)
        session = (sum(read) + max(read)) * self.max_source_length
        return CacheCost(token=sum(own), growth=max(own), session=session)

    @property
    def nbytes(self) -> int:
        return self.cache.nbytes + self.sources.nbytes
