"""Whether probabilities mean what they say: reliability bins, expected calibration error, Brier score.

Of a choice between two: the *confidence* is the probability of what the model prefers, at least one half,
and it is right or wrong. Bins are kept as sums, so those of several batches and processes add up exactly.
Not covered: choices among more than two.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from etude.errors import DataError
from etude.math.masked import require_same_shape


class Bins(NamedTuple):
    """Choices by confidence: K bins of equal width between one half and one.

    Attributes:
        counts: choices in each bin, [K].
        confidence: the sum of their confidences, [K].
        right: how many of them were right, [K]; one that was undecided counts half.
    """

    counts: Tensor
    confidence: Tensor
    right: Tensor


def reliability_bins(probabilities_N: Tensor, outcomes_N: Tensor, bins: int = 10) -> Bins:
    """Sort N choices into bins, of which a reliability diagram is made.

    Args:
        probabilities_N: that the first of two is the better one.
        outcomes_N: 1 where it was, 0 where the second was.
        bins: K.

    Raises:
        DataError: the shapes differ.
    """
    require_same_shape(probabilities=probabilities_N, outcomes=outcomes_N)
    probabilities_N = probabilities_N.double()
    confidence_N = torch.maximum(probabilities_N, 1 - probabilities_N)
    right_N = ((probabilities_N > 0.5) == (outcomes_N == 1)).double()
    right_N[probabilities_N == 0.5] = 0.5
    places_N = ((confidence_N - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    sums = torch.zeros(3, bins, dtype=torch.float64, device=probabilities_N.device)
    sums.index_add_(1, places_N, torch.stack([torch.ones_like(right_N), confidence_N, right_N]))
    return Bins(*sums)


def expected_calibration_error(bins: Bins) -> Tensor:
    """Σ_k (n_k / N) |right_k − confidence_k|, with the means of each bin.

    Naeini et al. 2015, "Obtaining well calibrated probabilities using Bayesian binning"; as Guo et al. 2017,
    "On calibration of modern neural networks", eq. 3.

    Raises:
        DataError: there are no choices.
    """
    if not bins.counts.sum():
        raise DataError("the calibration error of no choices has no value; expected at least one")
    return (bins.right - bins.confidence).abs().sum() / bins.counts.sum()


def brier(probabilities_N: Tensor, outcomes_N: Tensor) -> Tensor:
    """(p − y)² [N], whose mean is the Brier score (Brier 1950): 0 for certainty that is right.

    Raises:
        DataError: the shapes differ.
    """
    require_same_shape(probabilities=probabilities_N, outcomes=outcomes_N)
    return (probabilities_N - outcomes_N.to(probabilities_N.dtype)).square()
