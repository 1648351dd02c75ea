"""Groups of processes: what accelerate, which makes them, has to be told, and how to leave one."""

from __future__ import annotations

import gc
import os

import torch
from accelerate import Accelerator


def several_on_cpu() -> bool:
    """Whether this is one of several processes without a GPU that such could share (Apple's can't).

    Left to itself, accelerate takes those for so many runs of their own.
    """
    device = torch.accelerator.current_accelerator(check_available=True)
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and (device is None or device.type == "mps")


def leave_group(accelerator: Accelerator) -> None:
    """Wait for the other processes, finish the trackers and leave the group.

    Whoever calls has given up the models that `accelerator` wrapped. As the group's last holder
    `DistributedDataParallel` would end it with the interpreter's lock held, and wait for a thread of gloo
    that needs the lock to let go of its tensors: now and then, for ever.
    """
    accelerator.wait_for_everyone()
    if accelerator.num_processes > 1:
        accelerator.free_memory()  # which keeps the wrapped models as well
        gc.collect()
    accelerator.end_training()
