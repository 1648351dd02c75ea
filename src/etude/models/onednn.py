"""Products of linear layers by oneDNN, in training on a CPU.

torch multiplies float32 matrices by MKL, which on processors of other makers than its own takes older
instructions: there oneDNN, which torch brings along, is an eighth to a quarter faster. Used for a layer's
output and for its input's gradient; the weight's gradient is as fast either way. The numbers differ by
rounding only.

Covered: exact `nn.Linear` modules with plain float32 weights, an adapter's base layers among them. Everything
else computes as before: small layers, where the call costs more than it saves; autocast's products, which go
to oneDNN anyway; compiled layers; GPT-2's `Conv1D`. Not covered: sampling (`prepacked`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from etude.models.wrappers import trunk_of

_SMALLEST = 1 << 16  # elements of a weight that it pays for


def has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and all(
        hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight")
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias, without gradient: `x` [..., D], `weight` [V, D], which may be a transposed view."""
    if _serves(weight) and x.dtype == weight.dtype:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return linear(x, weight, bias)


@contextmanager
def onednn_linears(model: nn.Module) -> Iterator[None]:
    """Inside, the linear layers of `model` compute by `product`, forward and backward.

    The output layer doesn't: it is left as `models.head` has to find it.

    Args:
        model: of transformers, in its wrappers.
    """
    head = trunk_of(model).get_output_embeddings()
    modules = [module for module in model.modules() if module is not head and _is_served(module)]
    for module in modules:
        module.__dict__["forward"] = partial(_forward, module, module.forward)  # past setattr, which is slow
    try:
        yield
    finally:
        for module in modules:
            del module.__dict__["forward"]


def _is_served(module: nn.Module) -> bool:
    if type(module) is not nn.Linear or "forward" in module.__dict__:
        return False
    weight = module._parameters.get("weight")
    return type(weight) is nn.Parameter and _serves(weight)


def _serves(weight: Tensor) -> bool:
    fits = weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= _SMALLEST
    return fits and has_onednn()


def _forward(module: nn.Module, original: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or x.dtype != torch.float32:
        return original(x)
    output: Tensor = _Linear.apply(x, module.weight, module.bias)
    return output


class _Linear(torch.autograd.Function):
    """`nn.functional.linear` by `product`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = gradient.reshape(-1, gradient.shape[-1])
        return (
            product(gradient, weight.t()) if needs_x else None,
            rows.t() @ x.reshape(-1, x.shape[-1]) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )
