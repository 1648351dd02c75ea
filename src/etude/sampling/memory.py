"""Bytes of the sampler's cache: how many sessions of which length fit into a budget, and sizes as text.

All slots of the cache are equally long, so what it takes is (number of slots) × (their length). Slots grow
with the longest session; where the budget is short, there are fewer of them the longer they get. Plain
arithmetic; not covered: who holds a slot (`slots`), the tensors (`models.attention`, `backends`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from etude.errors import CacheBudgetError, ConfigError

FIRST_LENGTH = 256  # tokens that slots have room for at first

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_size(size: int | str) -> int:
    """Bytes, from a number of them or a text such as "512MiB", "1.5 GiB" or "2GB".

    Raises:
        ConfigError: it is neither, or not positive.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?b)?", str(size).strip().lower())
    amount = round(float(found[1]) * _UNITS[found[2] or ""]) if found else 0
    if amount < 1 or isinstance(size, bool):
        raise ConfigError(f"{size!r} is not a size; expected bytes or a text such as '512MiB' or '2GB'")
    return amount


def format_size(amount: int) -> str:
    """Bytes as text: 17 B, 6.0 KiB, 192 MiB."""
    value, units = float(amount), ["B", "KiB", "MiB", "GiB"]
    while value >= 1023.5 and len(units) > 1:
        value, units = value / 1024, units[1:]
    decimals = 1 if value < 10 and units[0] != "B" else 0
    return f"{value:,.{decimals}f} {units[0]}"


@dataclass(frozen=True)
class CacheCost:
    """What a model's cache takes, in bytes.

    Attributes:
        token: keys and values of one token, over all layers.
        growth: of that, the largest tensor's: while the cache grows, this much exists twice.
        session: of a session however short, where a family keeps more than keys and values.
        multiple: slots have room for a multiple of so many tokens.
    """

    token: int
    growth: int
    session: int = 0
    multiple: int = 1

    @property
    def per_token(self) -> int:
        """Growth included."""
        return max(1, self.token + self.growth)

    def of_session(self, length: int) -> int:
        """Bytes of one slot of `length` tokens, growth included."""
        return self.session + -(-length // self.multiple) * self.multiple * self.per_token


@dataclass(frozen=True)
class CacheLimits:
    """How many slots there are, by their length.

    Attributes:
        slots, max_length: at most.
        budget: bytes that the cache may take at any time, growth included.
        idle: slots beside those, as long as they are, that no session gets.
        first: tokens that slots have room for at first.

    Raises:
        CacheBudgetError: the budget doesn't hold one session of `max_length` tokens.
    """

    slots: int
    max_length: int
    cost: CacheCost
    budget: int
    idle: int = 0
    first: int = FIRST_LENGTH

    def __post_init__(self) -> None:
        needed = self.cost.of_session(self.max_length)
        if needed > self.budget:
            fits = (self.budget - self.cost.session) // self.cost.per_token
            shorten = f", or shorten max_length to {fits:,} tokens or less" if fits > 0 else ""
            raise CacheBudgetError(
                f"one session of {self.max_length:,} tokens needs {format_size(needed)} ({needed:,} bytes) "
                f"of keys and values, and cache_bytes is {format_size(self.budget)} ({self.budget:,} bytes); "
                f"raise cache_bytes{shorten}"
            )

    def slots_at(self, length: int) -> int:
        """Slots that the budget holds when each has room for `length` tokens."""
        return min(self.slots, self.budget // self.cost.of_session(length) - self.idle)

    def started(self) -> tuple[int, int]:
        """Slots, and their length, before anyone holds one."""
        return self.grown(min(self.first, self.max_length))

    def grown(self, needed: int, length: int = 0) -> tuple[int, int]:
        """Slots, and their new length, where slots of `length` tokens have become too short for `needed`.

        Slots double, so that growing is rare; less where doubling would cost more slots than are lost anyway.
        """
        slots = self.slots_at(needed)
        affordable = (self.budget // (slots + self.idle) - self.cost.session) // self.cost.per_token
        return slots, min(self.max_length, affordable, max(needed, 2 * length))

    def describe(self) -> str:
        """One line, for the start of a run."""
        full = self.slots_at(self.max_length)
        most = min(self.budget, (self.slots + self.idle) * self.cost.of_session(self.max_length))
        line = (
            f"{self.slots} slots × up to {self.max_length:,} tokens, {format_size(self.cost.token)} per "
            f"token: at most {format_size(most)} of keys and values"
        )
        if full < self.slots:
            line += f", which hold {full} sessions of full length at once"
        return line
