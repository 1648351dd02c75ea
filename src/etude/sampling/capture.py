"""Capturing a step of fixed shape once and replaying it, which saves hundreds of launches.

Weights that are updated in place stay valid in a capture; tensors that moved make it be taken anew. Captures
are CUDA graphs. On a CPU, tests put a trace of the step's operations in their place (`make_fx`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from etude.models.slot_cache import SlotCache

Replay = Callable[[], Tensor]
Capture = Callable[[Replay], Replay]


class Step(Protocol):
    """A forward whose inputs lie in tensors that stay, and whose shapes follow from its size."""

    model: PreTrainedModel
    cache: SlotCache
    inputs: Tensor

    def __call__(self, size: int, /) -> Tensor:
        """Logits, [rows, vocabulary]."""
        ...


class Replays:
    """A step's captures, one per size; made anew when a tensor that they read has moved.

    Whether a weight has moved is looked at when `weights_changed` has been called, not at every step.
    """

    def __init__(self, step: Step, new_capture: Callable[[], Capture]) -> None:
        self.step = step
        self.new_capture = new_capture
        self.possible = True
        self._replays: dict[tuple[int, torch.dtype | None], Replay] = {}
        self._weights: list[int] | None = None
        self._captured_at: list[object] = []

    def weights_changed(self) -> None:
        """Weights may be other tensors than before."""
        self._weights = None

    def has(self, size: int) -> bool:
        """Whether a step of that size was captured before (and may have to be again)."""
        return (size, autocast_dtype(self.step.inputs.device)) in self._replays

    def __call__(self, size: int) -> Tensor:
        """Logits, [rows, vocabulary]; the next call may overwrite them."""
        if not self.possible:
            return self.step(size)
        key = (size, autocast_dtype(self.step.inputs.device))
        if key in self._replays and self._addresses() == self._captured_at:
            return self._replays[key]()
        logits = self.step(size)  # a first time: it may allocate the cache's layers, and compile kernels
        addresses = self._addresses()
        if addresses != self._captured_at:
            self._replays.clear()
            self._captured_at, self._capture = addresses, self.new_capture()
        try:
            self._replays[key] = self._capture(lambda: self.step(size))
        except RuntimeError as error:  # the boundary to whatever the model does that a capture can't hold
            name = type(self.step.model).__name__
            warnings.warn(f"{name} can't be captured, so it decodes eagerly: {error}", stacklevel=2)
            self.possible = False
        return logits

    def _addresses(self) -> list[object]:
        if self._weights is None:
            model = self.step.model
            self._weights = [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]
        cached = [tensor.data_ptr() for layer in self.step.cache.layers.values() for tensor in layer]
        return [self._weights, self.step.inputs.data_ptr(), self.step.cache.length, cached]


class CudaCapture:
    """Captures calls in CUDA graphs that share one pool of memory, so only one may be replayed at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Replay) -> Replay:
        """Capture `step`, which has run before; other threads may use the device meanwhile."""
        current = torch.cuda.current_stream(self.device)
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.stream(current),  # which a capture that fails doesn't go back to
            torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"),
        ):
            logits = step()

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay


def capturable(model: PreTrainedModel) -> bool:
    """Whether a decode step may be captured: on one CUDA device, its shapes and constants always the same."""
    devices = {parameter.device for parameter in model.parameters()}
    return len(devices) == 1 and devices.pop().type == "cuda" and not _frequencies_follow_positions(model)


def _frequencies_follow_positions(model: PreTrainedModel) -> bool:
    """Whether rotary embeddings look at the longest sequence of a forward, to choose their frequencies.

    Within a sampler's `max_length` they choose the same ones always (`packing.crosses_switch` sees to it),
    so that rows don't affect each other; but Python waits for the device.
    """
    kinds: set[str] = set()
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        kinds.update(kind.values() if isinstance(kind, dict) else [kind] if isinstance(kind, str) else [])
    return not kinds.isdisjoint({"dynamic", "longrope"})


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def uncached_autocast(device: torch.device) -> AbstractContextManager[object]:
    """The autocast in force, but casting anew: a cached copy of a weight would be frozen into a capture."""
    dtype = autocast_dtype(device)
    return torch.autocast(device.type, dtype=dtype, cache_enabled=False) if dtype else nullcontext()
