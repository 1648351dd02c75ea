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


class Fetched:
    """A tensor on its way to Python: copied once what it is computed from has run, and not after what follows."""

    def __init__(self, tensor: Tensor) -> None:
        self._host, self._event = tensor, None
        if tensor.device.type == "cuda":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensor.device))

    def tolist(self) -> list[Any]:
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()
