"""Leaving a group of processes. Not covered: joining one, which accelerate does."""

from __future__ import annotations

import gc

from accelerate import Accelerator


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
