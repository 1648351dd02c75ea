"""Ctrl-C at a safe place: a block that an interrupt waits for."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interrupt_after() -> Iterator[list[int]]:
    """Hold back Ctrl-C until the block has ended, then raise it: an update is never left half done.

    The block is given a list that is no longer empty once there was one. A second Ctrl-C inside the block
    doesn't wait. Outside the main thread this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield []
        return
    held: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def hold(number: int, frame: FrameType | None) -> None:
        if held:
            raise KeyboardInterrupt
        held.append(number)

    signal.signal(signal.SIGINT, hold)
    try:
        yield held
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        raise KeyboardInterrupt
