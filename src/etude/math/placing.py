"""Tensors to and from a device without waiting for all that it was given before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def place(
    values: Tensor | Sequence[Any], device: torch.device | str, dtype: torch.dtype | None = None
) -> Tensor:
    """`values` on `device`; to a GPU from pinned memory.

    A plain copy there waits until the device has done all that it was given before: whoever prepares the next
    step while one runs would lose that time.
    """
    tensor, device = torch.as_tensor(values, dtype=dtype), torch.device(device)
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class Send:
    """Numbers on their way to a device, from pinned memory that is written anew each time.

    Args:
        count: numbers at most.
        device: to which they go.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._host = torch.zeros(count, dtype=torch.long, pin_memory=self._pinned)
        self._sent: torch.cuda.Event | None = None

    def memory(self, count: int) -> Tensor:
        """The first `count` numbers, to be written; waits until those sent before have arrived."""
        if self._sent is not None:
            self._sent.synchronize()
        return self._host[:count]

    def to(self, target: Tensor) -> None:
        """Send as many as `target` has."""
        target.copy_(self._host[: len(target)], non_blocking=True)
        if self._pinned:
            self._sent = torch.cuda.Event()
            self._sent.record(torch.cuda.current_stream(target.device))


class Fetch:
    """A tensor on its way to Python: copied once it has been computed, and not after what follows.

    Args:
        host: where it is copied to, as large at least; pinned memory if it comes from a GPU.
    """

    def __init__(self, host: Tensor) -> None:
        self._host = self._copied = host
        self._event: torch.cuda.Event | None = None

    @classmethod
    def of(cls, tensor: Tensor) -> Fetch:
        fetch = cls(torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda"))
        fetch.begin(tensor)
        return fetch

    def begin(self, tensor: Tensor) -> None:
        """Forgets what was fetched before."""
        self._copied = self._host[: len(tensor)]
        self._copied.copy_(tensor, non_blocking=True)
        if tensor.device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensor.device))

    def tolist(self) -> list[Any]:
        """Waits for it."""
        if self._event is not None:
            self._event.synchronize()
        values: list[Any] = self._copied.tolist()
        return values
