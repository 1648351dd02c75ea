"""Slots of the cache: who holds one, who has to give one up, and whose first tokens can be copied.

A session takes a slot with its first turn and keeps it while its tool runs. When every slot is held and
somebody waits, the cheapest to rebuild of the sessions whose tools take long gives its slot up; its keys
and values are computed again when it comes back. The same when slots have to be longer than the budget
allows for so many of them.
"""

from __future__ import annotations

import heapq

from etude.sampling.memory import CacheLimits
from etude.sampling.prefixes import Prefixes
from etude.sampling.session import LocalSession

_PATIENCE = 8  # steps that an idle session keeps its slot for while others wait for one


class Slots:
    """Slots 0 … count − 1, each with room for `length` tokens, and the sessions that hold them."""

    def __init__(self, limits: CacheLimits) -> None:
        self.limits = limits
        self.holders: dict[int, LocalSession] = {}
        self._prefixes: Prefixes[LocalSession] = Prefixes()
        self.count, self.length = limits.started()
        self._free = list(range(self.count))

    @property
    def free(self) -> int:
        """Slots that nobody holds."""
        return len(self._free)

    def take(self, session: LocalSession, step: int, *, idle: bool) -> bool:
        """Give `session` a slot; False if it has to wait.

        Args:
            step: the engine's step, by which a holder's idle time is counted.
            idle: nothing else runs, so that a holder that waits for its tool needn't be spared.
        """
        if not self._free:
            self._evict(step, patience=0 if idle else _PATIENCE)
        if not self._free:
            return False
        session.slot = heapq.heappop(self._free)  # the lowest, so that busy slots lie close together
        self.holders[session.slot] = session
        if not session.source_ids:  # behind different sources the same tokens have other keys and values
            session.source = self._prefixes.longest(session.token_ids)
            self._prefixes.add(session, session.token_ids)
        return True

    def release(self, session: LocalSession) -> None:
        if session.slot is not None:
            del self.holders[session.slot]
            heapq.heappush(self._free, session.slot)
            self._prefixes.remove(session)
        session.slot, session.cached, session.source = None, 0, None

    def hole(self) -> tuple[LocalSession, int] | None:
        """The session in the highest slot and a lower one that is free, which `move` would take it to."""
        if not self._free or not self.holders or self._free[0] > max(self.holders):
            return None
        return self.holders[max(self.holders)], self._free[0]

    def move(self, session: LocalSession, target: int) -> None:
        """Hold the free slot `target` instead; the caller has copied what was in the old one."""
        assert session.slot is not None
        assert target == self._free[0]
        heapq.heapreplace(self._free, session.slot)
        self.holders[target] = self.holders.pop(session.slot)
        session.slot = target

    def grow(self, needed: int) -> list[int]:
        """Give every slot room for `needed` tokens. What is held moves to the lowest slots.

        Where fewer slots are left than are held, idle sessions give theirs up, then the cheapest to rebuild.

        Returns:
            the old numbers of the slots that are still held, in the order of their new ones.
        """
        self.count, self.length = self.limits.grown(needed, self.length)
        dearest = sorted(self.holders.values(), key=lambda s: (s.busy, len(s.token_ids)), reverse=True)
        for session in dearest[self.count :]:
            self.release(session)
        kept = sorted(self.holders)
        self.holders = {new: self.holders[old] for new, old in enumerate(kept)}
        for slot, session in self.holders.items():
            session.slot = slot
        self._free = list(range(len(kept), self.count))
        return kept

    def restart(self) -> bool:
        """Go back to many short slots where long sessions have left few; False while somebody holds one."""
        count, length = self.limits.started()
        if self.holders or self.count == count:
            return False
        self.count, self.length, self._free = count, length, list(range(count))
        return True

    def forget_prefixes(self) -> None:
        """From now on nobody copies what the present holders have in their slots."""
        self._prefixes = Prefixes()
        for session in self.holders.values():
            session.source = session.family = None

    def _evict(self, step: int, patience: int) -> None:
        idle = [
            holder
            for holder in self.holders.values()
            if not holder.busy and step - holder.idle_since >= patience
        ]
        if idle:
            self.release(min(idle, key=lambda holder: len(holder.token_ids)))
