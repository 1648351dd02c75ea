"""Linear layers in oneDNN's own weight layout, for sampling on a CPU.

A step of the sampler multiplies a few dozen rows by every weight matrix. A CPU library first rearranges the
matrix into the blocks its kernels read, at each call, and for so few rows that takes as long as the product.
Rearranged once per version of the weights, small steps run up to three times as fast. The parameters stay
the trainer's; this is a second copy in another layout, of the linear layers only, made anew when they change.

Only exact `nn.Linear` and GPT-2's `Conv1D` modules with plain CPU weights are served, in float32 and bfloat16
(autocast's, too); everything else computes as before, and so does any call that needs gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from etude.models.onednn import has_onednn


class PrepackedLinears:
    """Makes a model's linear layers compute from rearranged weights while `active`.

    Args:
        model: the model; its parameters are not changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [m for m in model.modules() if _is_served(m)] if has_onednn() else []
        self._forwards: list[Callable[[Tensor], Tensor]] = []
        self._dtype: torch.dtype | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the rearranged weights."""
        return sum(_weight(module).nbytes for module in self._modules)

    def forget(self) -> None:
        """The weights have changed: rearrange them before they are used again."""
        self._forwards = []

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within it, the layers' forwards under `torch.no_grad` use the rearranged weights."""
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        if not self._forwards or dtype != self._dtype:
            self._dtype = dtype
            self._forwards = [_packed_forward(module, dtype) for module in self._modules]
        for module, forward in zip(self._modules, self._forwards, strict=True):
            module.__dict__["forward"] = forward  # not by setattr, which takes ten times as long
        try:
            yield
        finally:
            for module in self._modules:
                del module.__dict__["forward"]


def _is_served(module: nn.Module) -> bool:
    if type(module) not in (nn.Linear, Conv1D) or "forward" in module.__dict__:
        return False
    weight = module._parameters.get("weight")
    if type(weight) is not nn.Parameter or weight.device.type != "cpu":
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _weight(module: nn.Module) -> Tensor:
    return module.get_parameter("weight").detach()


def _packed_forward(module: nn.Module, dtype: torch.dtype | None) -> Callable[[Tensor], Tensor]:
    weight = _weight(module)
    bias: Tensor | None = module.bias  # type: ignore[assignment]
    if type(module) is Conv1D:
        weight = weight.t().contiguous()
    if dtype is not None:
        weight, bias = weight.to(dtype), None if bias is None else bias.detach().to(dtype)
    dtype = weight.dtype
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    original = module.forward
    linear = torch.ops.mkldnn._linear_pointwise

    def forward(x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return original(x)
        return linear(x if x.dtype == dtype else x.to(dtype), packed, bias, "none", [], "")

    return forward
