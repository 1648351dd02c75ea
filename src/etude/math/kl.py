"""KL divergence from a reference policy: estimators, the exact sum, and controllers of its coefficient.

Covered: KL(π ‖ π_ref) per token, and how β moves between updates. Not covered: where the KL goes (into the
reward or into the loss, not both: the trainers decide) and how it is averaged (`losses.aggregate`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from etude.errors import ConfigError, DataError
from etude.math.logprobs import scaled_logits
from etude.math.masked import require_same_shape

KLKind = Literal["k1", "k2", "k3", "abs", "kl", "mse"]


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: KLKind) -> Tensor:
    """KL(π ‖ π_ref) estimated from the sampled token alone, with d = log π − log π_ref.

    John Schulman, "Approximating KL divergence", 2020 (joschu.net/blog/kl-approx.html); his ratio
    r = π_ref / π is exp(−d).

    - "k1" (TRL 0.7.4: "kl"): d. Unbiased; a single one, and by chance a mean, may be negative.
    - "k2" (TRL 0.7.4: "mse"): d² / 2. Biased, low variance, never negative.
    - "k3": exp(−d) − 1 + d. Unbiased and never negative.
    - "abs": |d|. No estimate of the KL; a penalty that grows with any change.

    That is about their *values*, which is what a reward needs. As terms of a loss over tokens sampled from
    π they behave otherwise: the expected gradient is 0 for k1, that of KL(π ‖ π_ref) for k2, and that of
    the reverse, KL(π_ref ‖ π), for k3.

    Args:
        logprobs: any shape, log π(token), the tokens sampled from π.
        ref_logprobs: the same shape, log π_ref(token).
        kind: see above.

    Raises:
        ConfigError: the kind is unknown.
        DataError: the shapes differ.
    """
    require_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    difference = logprobs - ref_logprobs
    match kind:
        case "k1" | "kl":
            return difference
        case "k2" | "mse":
            return difference**2 / 2
        case "k3":
            # exp(−d) − 1 would lose small differences; expm1 keeps them, but for its last digit.
            return (torch.expm1(-difference) + difference).clamp_min(0)
        case "abs":
            return difference.abs()
    raise ConfigError(
        f"KL kind is {kind!r}; expected one of {', '.join(get_args(KLKind))}. The exact KL ('full') needs "
        "the logits of both policies: use kl_full"
    )


def kl_full(logits: Tensor, ref_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(π ‖ π_ref) = Σ_v π(v) (log π(v) − log π_ref(v)), summed over the vocabulary.

    A token that π gives probability 0 adds 0; one that only π_ref gives 0 makes it infinite.

    Args:
        logits: [..., V], of π.
        ref_logits: the same shape, of π_ref.
        temperature: divides both.

    Returns:
        [...], nats, >= 0, in float32 (float64 for float64 logits).

    Raises:
        ConfigError: the temperature is not a positive finite number.
        DataError: the shapes differ.
    """
    require_same_shape(logits=logits, ref_logits=ref_logits)
    logprobs = scaled_logits(logits, temperature).log_softmax(-1)
    ref_logprobs = scaled_logits(ref_logits, temperature).log_softmax(-1)
    difference = (logprobs - ref_logprobs).masked_fill(logprobs == -torch.inf, 0.0)
    return (logprobs.exp() * difference).sum(-1).clamp_min(0)  # rounding can make the sum of equals −1e-8


def best_of_n_kl(n: int) -> float:
    """KL(best of n ‖ policy) at most, in nats: log n − (n − 1) / n.

    Beirami et al. 2024, "Theoretical guarantees on the best-of-n alignment policy" (arXiv:2401.01879). It is
    the KL itself where no two of the policy's answers score the same and each of them is rare (n times its
    probability is small); ties and frequent answers bring it down.

    Raises:
        ConfigError: n is less than 1.
    """
    if n < 1:
        raise ConfigError(f"n is {n}; the best is one of at least 1")
    return math.log(n) - (n - 1) / n


class KLController(ABC):
    """The coefficient β of a KL penalty, and how it moves.

    Attributes:
        value: β now.
    """

    def __init__(self, value: float) -> None:
        self.value = value

    @abstractmethod
    def update(self, current: float, n_samples: int) -> None:
        """Take in the measured KL of one batch.

        Args:
            current: mean over the batch's sequences of their summed KL, nats.
            n_samples: number of sequences in the batch.
        """

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.value = float(state["value"])


class FixedKLController(KLController):
    """β stays what it is."""

    def update(self, current: float, n_samples: int) -> None:
        pass


class AdaptiveKLController(KLController):
    """β ← β (1 + e n/horizon), e = clip(KL/target − 1, −0.2, 0.2): it steers the KL towards a target.

    Ziegler et al. 2019, "Fine-tuning language models from human preferences", section 2.2; their gain K_β
    is n/horizon here, as in their code, so that β moves equally fast in many small batches and in few large
    ones.

    Args:
        value: β at the start.
        target: KL per sequence to steer to, nats.
        horizon: number of sequences over which β can change by a factor of about exp(±0.2).

    Raises:
        ConfigError: target or horizon is not above 0.
    """

    MAX_ERROR = 0.2

    def __init__(self, value: float, target: float, horizon: float) -> None:
        super().__init__(value)
        for name, setting in (("target", target), ("horizon", horizon)):
            if not setting > 0:
                raise ConfigError(f"KL {name} is {setting}; expected a number > 0")
        self.target = target
        self.horizon = horizon

    def update(self, current: float, n_samples: int) -> None:
        """See `KLController.update`.

        Raises:
            DataError: the KL is NaN, which would stay in β for ever.
            ConfigError: the batch is so large against the horizon that β could reach 0 or change its sign.
        """
        if math.isnan(current):
            raise DataError("the measured KL is NaN; check the log-probabilities of policy and reference")
        if n_samples * self.MAX_ERROR >= self.horizon:
            raise ConfigError(
                f"the KL horizon is {self.horizon:g} for batches of {n_samples}, so one update could make "
                f"the coefficient negative; expected a horizon above {n_samples * self.MAX_ERROR:g}, better "
                "several batches long"
            )
        error = min(max(current / self.target - 1, -self.MAX_ERROR), self.MAX_ERROR)
        self.value *= 1 + error * n_samples / self.horizon
