"""Memory in huge pages, for the keys and values that a decoding step reads from end to end.

A step of the sampler streams through tens of megabytes. In pages of 4 KiB the processor needs a new address
translation every few dozen cache lines, which in a virtual machine takes as long as reading them: attention
runs up to a quarter faster in pages of 2 MiB. Linux hands them out to those who ask. Elsewhere, and on an
accelerator, nothing is asked for.
"""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

_PAGE = 1 << 21


def zeros(like: Tensor, *shape: int) -> Tensor:
    """Zeros of `shape`, of the type and device of `like`."""
    size = math.prod(shape) * like.element_size()
    if like.device.type != "cpu" or size < _PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return like.new_zeros(shape)
    memory = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    view = torch.frombuffer(memory, dtype=torch.uint8)
    first = -view.data_ptr() % _PAGE
    return view[first : first + size].view(like.dtype).view(shape)
