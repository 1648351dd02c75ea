"""Seconds between the parts of a step."""

from __future__ import annotations

import time


class Clock:
    """Seconds between laps, under TRL's keys."""

    def __init__(self) -> None:
        self.started = self.last = time.monotonic()
        self.times: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.times[f"time/ppo/{name}"] = now - self.last
        self.last = now

    def laps(self) -> dict[str, float]:
        return {**self.times, "time/ppo/total": self.last - self.started}
