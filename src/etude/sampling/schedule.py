"""Whose turn it is: which turns wait and which run, and what each of these is fed next.

Turns that decode take part in every step; prompts share a step's budget of tokens. Not covered: who has to
give up a slot (`slots`), the step itself (`local`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import islice

from etude.sampling.feeds import Backend, Feed
from etude.sampling.session import LocalSession, Turn
from etude.sampling.slots import Slots

_UNKNOWN = (0,)  # stands in for a token that Python doesn't know yet


class Schedule:
    """The turns of a sampler.

    Args:
        slots: those of its cache.
        prefill_tokens: prompt tokens fed per step at most.
        deterministic: each session is fed in pieces that follow from its own history alone.
    """

    def __init__(self, slots: Slots, *, prefill_tokens: int, deterministic: bool) -> None:
        self.slots = slots
        self.prefill_tokens = prefill_tokens
        self.deterministic = deterministic
        self.waiting: deque[Turn] = deque()
        self.running: list[Turn] = []
        self.tokens_copied = 0

    @property
    def turns(self) -> list[Turn]:
        """All, those that run first."""
        return [*self.running, *self.waiting]

    def upcoming(self, count: int) -> list[Sequence[int]]:
        """What an encoder will read for the next turns that wait for a slot."""
        turns = (turn for turn in self.waiting if turn.session.slot is None)
        return [turn.session.source_ids for turn in islice(turns, count)]

    def admit(self, backend: Backend, step: int) -> None:
        """Waiting turns become running ones: those whose session kept its slot, others while slots last."""
        if self.slots.restart():
            backend.resize(self.slots.count, self.slots.length, kept=[])
        self._line_up()
        still_waiting: deque[Turn] = deque()
        for turn in self.waiting:
            if turn.session.slot is None and not self.slots.take(turn.session, step, idle=not self.running):
                still_waiting.append(turn)
            else:
                self.running.append(turn)
        self.waiting = still_waiting
        if not self.waiting and backend.closes_up:
            self._close_up(backend)

    def _line_up(self) -> None:
        """Those that wait go in the order of their lengths: a step's rows are padded to the longest of them.

        Who comes later waits until all of these have gone, so that nobody waits for ever.
        """
        if any(turn.in_line for turn in self.waiting):
            return
        self.waiting = deque(sorted(self.waiting, key=lambda turn: turn.read))
        for turn in self.waiting:
            turn.in_line = True

    def _close_up(self, backend: Backend) -> None:
        """Nobody waits for the slots that became free: fill them from above, so that steps read no holes."""
        while (hole := self.slots.hole()) is not None:
            session, target = hole
            assert session.slot is not None
            backend.copy(session.slot, target, session.cached)
            self.slots.move(session, target)

    def grow(self, backend: Backend, needed: int) -> None:
        """Make slots longer. Turns whose session loses its slot by that wait, before all others."""
        kept = self.slots.grow(needed)
        backend.resize(self.slots.count, self.slots.length, kept)
        evicted = [turn for turn in self.running if turn.session.slot is None]
        self.running = [turn for turn in self.running if turn.session.slot is not None]
        self.waiting.extendleft(reversed(evicted))

    def feeds(self, backend: Backend, version: int) -> tuple[list[Feed], list[Turn]]:
        """What the next step feeds, and to which turns.

        Args:
            version: of the weights.
        """
        feeds, turns = [], []
        budget = self.prefill_tokens
        for turn in self.running:
            session = turn.session
            assert session.slot is not None, "a running turn has a slot"
            if turn.coming is not None:
                if not turn.ends_by_length:
                    feeds.append(Feed(session.slot, session.cached, _UNKNOWN, session.family, turn.coming))
                    turns.append(turn)
                continue
            if (
                not self.deterministic
                and session.source is not None
                and not self._copy_prefix(backend, session)
            ):
                continue
            prompt = session.cached + 1 < len(session.token_ids)
            pending = self._pending(session, budget if prompt else 1, version)
            if prompt:
                budget -= len(pending)
            if pending:
                source = session.source_ids
                feeds.append(Feed(session.slot, session.cached, pending, session.family, source_ids=source))
                turns.append(turn)
        # Rows that decode first and by slot: in this order they are one block of the cache as they stand.
        order = sorted(range(len(feeds)), key=lambda i: (len(feeds[i].token_ids) > 1, feeds[i].slot))
        return [feeds[i] for i in order], [turns[i] for i in order]

    def _pending(self, session: LocalSession, budget: int, version: int) -> list[int]:
        """What the session is fed next; deterministic: its own next piece, whole, while there is budget."""
        if budget <= 0:
            return []
        end = session.cached + budget
        if self.deterministic:
            end = session.next_end(self.prefill_tokens, version)
        return session.token_ids[session.cached : end]

    def _copy_prefix(self, backend: Backend, session: LocalSession) -> bool:
        """Take the shared beginning from its holder's slot; False while the holder is still being fed it."""
        assert session.source is not None
        assert session.slot is not None
        holder, length = session.source
        if holder.slot is not None and holder.cached >= length:
            if backend.copy(holder.slot, session.slot, length):
                session.cached = length
                session.join(holder, length)
                self.tokens_copied += length
        elif holder.slot is not None and holder.busy:
            return False
        session.source = None
        return True

    def leave(self, turn: Turn) -> None:
        """It is given up."""
        turn.over = True
        for turns in (self.waiting, self.running):
            if turn in turns:
                turns.remove(turn)

    def drop_finished(self) -> None:
        self.running = [turn for turn in self.running if not turn.over]

    def clear(self) -> None:
        self.running.clear()
        self.waiting.clear()
