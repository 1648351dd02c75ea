"""Tensors onto a device without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def place(values: Tensor | Sequence[Any], device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """`values` on `device`; to a GPU from pinned memory.

    A plain copy there waits until the device has done all that it was given before: whoever prepares the next
    step while one runs would lose that time.
    """
    tensor, device = torch.as_tensor(values, dtype=dtype), torch.device(device)
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
