"""Mean, variance and whitening over the positions that a mask selects.

Covered: statistics of one tensor. Not covered: statistics over several processes (gather first), and the
averaging of losses, whose denominators must be global (`losses.aggregate`).

Positions that the mask leaves out may hold anything, NaN included. A mask that selects nothing is an
error: there is no mean of nothing, and a made-up 0 would look like a measurement.
"""

from __future__ import annotations

import torch
from torch import Tensor

from etude.errors import DataError


def require_same_shape(**tensors: Tensor) -> None:
    """Broadcasting hides mistakes ([B] against [B, T] with B = T): ask for equal shapes instead.

    Raises:
        DataError: the shapes differ.
    """
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise DataError(f"shapes differ: {shapes}; expected the same shape for all")


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of the selected values, over all positions or along one dimension.

    Args:
        values: any shape; flags count as 0 and 1.
        mask: the same shape; nonzero selects.
        dim: the dimension to average over; None is all.

    Raises:
        DataError: the shapes differ, or the mask selects nothing (with `dim`: in some slice).
    """
    require_same_shape(values=values, mask=mask)
    selected = mask.bool()
    kept = torch.where(selected, values, 0)
    count = selected.sum() if dim is None else selected.sum(dim)
    empty = int((count == 0).sum())
    if empty:
        where = "" if dim is None else f" in {empty} of {count.numel()} slices along dimension {dim}"
        raise DataError(
            f"the mask selects nothing{where}, so there is no mean; expected at least one selected position. "
            "Drop what has no sampled tokens before taking statistics of it"
        )
    return (kept.sum() if dim is None else kept.sum(dim)) / count


def masked_var(values: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Variance of the selected values, a scalar.

    Args:
        values: any shape.
        mask: the same shape; nonzero selects.
        unbiased: divide by n − 1 (Bessel) instead of n. A single value has no unbiased variance; it is
            defined as 0, as the biased one.

    Raises:
        DataError: the shapes differ, or the mask selects nothing.
    """
    mean = masked_mean(values, mask)
    squares = masked_mean((values - mean) ** 2, mask)
    if not unbiased:
        return squares
    count = mask.bool().sum()
    return squares * count / (count - 1).clamp_min(1)


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Selected values scaled to unit (unbiased) variance and, with `shift_mean`, shifted to mean 0.

    (v − mean) / sqrt(var + 1e-8), as in the code of Ziegler et al. 2019. Equal values (a single one is the
    same case) have no scale and are shifted only: exactly 0, where dividing the rounding error of their mean
    by 1e-4 would invent advantages. Without `shift_mean` they stay what they are.

    Args:
        values: any shape, floating point.
        mask: the same shape; nonzero selects.
        shift_mean: False keeps the mean and changes the scale around it.

    Returns:
        The shape of `values`; 0 where the mask does not select.

    Raises:
        DataError: the shapes differ, or the mask selects nothing.
    """
    selected = mask.bool()
    mean, var = masked_mean(values, mask), masked_var(values, mask)
    chosen = values[selected]
    if bool((chosen == chosen[0]).all()):
        whitened = torch.zeros_like(values) if shift_mean else values
    else:
        whitened = (values - mean) * torch.rsqrt(var + 1e-8) + (0 if shift_mean else mean)
    return torch.where(selected, whitened, 0)
