"""Losses over pairs of a preferred and a rejected answer, measured against a reference policy.

All are functions of how far the policy has moved on each answer y to a prompt x, its *log-ratio*
h(y) = log π(y|x) − log π_ref(y|x), both summed over the answer's tokens:

    score s(y) = f′(π / π_ref) with log π − log π_ref = h;  s = h for the reverse KL      `divergence_score`
    functions of the margin s(y_w) − s(y_l): `sigmoid_loss`, `robust_loss`, `hinge_loss`, `ipo_loss`,
        `exo_loss`, `discopop_loss`
    functions of both log-ratios: `nca_loss`, `bco_loss`, `sppo_loss`, `apo_zero_loss`, `apo_down_loss`
    functions of a whole batch, sorted: `aot_loss`, `aot_unpaired_loss`

Each returns one loss per pair; averaging is the caller's. Without a reference, h is log π(y|x) itself. Not
covered: answers judged one by one (`unpaired`), terms of the policy alone and what is done with single tokens
(`likelihood`).
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from etude.errors import ConfigError
from etude.math.masked import require_same_shape

Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]

LARGEST_EXPONENT = 80.0  # exp(80) is 5.5e34: representable in float32 and bfloat16, with room for a factor


def divergence_score(log_ratio: Tensor, kind: Divergence = "reverse_kl", alpha: float = 0.5) -> Tensor:
    """s(y) = f′(u) at u = π/π_ref, where f is the divergence that holds the policy to its reference.

    Wang et al. 2024, "Beyond reverse KL: generalizing direct preference optimization with diverse divergence
    constraints" (f-DPO), theorem 1 and table 1; the constant that f′ lacks cancels in the margin, and only
    there.

    - "reverse_kl": log u, that is h: DPO.
    - "forward_kl": 1 − 1/u.
    - "js_divergence": log 2u/(1 + u).
    - "alpha_divergence": (u^(α−1) − 1)/(α − 1). The paper's α is 1 − α here, as in TRL: 1 is the reverse KL,
      0 the forward KL.

    Exponents above 80 count as 80, and have no gradient.

    Args:
        log_ratio: any shape, h.
        kind: see above.
        alpha: of the α-divergence.

    Raises:
        ConfigError: the kind is unknown.
    """
    match kind:
        case "reverse_kl":
            return log_ratio
        case "forward_kl":
            return power_score(log_ratio, 1.0)
        case "js_divergence":
            return math.log(2) + logsigmoid(log_ratio)
        case "alpha_divergence":
            return power_score(log_ratio, 1 - alpha)
    raise ConfigError(f"the divergence is {kind!r}; expected one of {', '.join(get_args(Divergence))}")


def power_score(logarithm: Tensor, exponent: float) -> Tensor:
    """(1 − p^(−exponent)) / exponent at log p = `logarithm`; at exponent 0 its limit, log p."""
    if abs(exponent) < 1e-6:
        return logarithm
    return -torch.expm1((-exponent * logarithm).clamp(max=LARGEST_EXPONENT)) / exponent


# ---- of the margin ----


def sigmoid_loss(margin: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """−(1 − ε) log σ(β m) − ε log σ(−β m), m = s(y_w) − s(y_l).

    Rafailov et al. 2023, "Direct preference optimization", eq. 7 (ε = 0). With label smoothing: Mitchell
    2023, "A note on DPO with noisy preferences & relationship to IPO" (conservative DPO), where ε is the
    share of pairs that are labelled the wrong way round.

    Args:
        margin: any shape; the only input that takes part in the gradient.
        beta: of the divergence, > 0.
        label_smoothing: ε in [0, ½).
    """
    loss = -logsigmoid(beta * margin)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * logsigmoid(-beta * margin)
    return loss


def robust_loss(margin: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """[−(1 − ε) log σ(β m) + ε log σ(−β m)] / (1 − 2 ε): its mean over wrong labels is DPO's over right ones.

    Chowdhury et al. 2024, "Provably robust DPO: aligning language models with noisy feedback" (rDPO).

    Args:
        margin, beta: as for `sigmoid_loss`.
        label_smoothing: ε in [0, ½), the share of pairs that are labelled the wrong way round.
    """
    right, flipped = -logsigmoid(beta * margin), -logsigmoid(-beta * margin)
    return ((1 - label_smoothing) * right - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def hinge_loss(margin: Tensor, beta: float) -> Tensor:
    """max(0, 1 − β m).

    Liu et al. 2024, "Statistical rejection sampling improves preference optimization" (RSO); without a
    reference and with δ = 1/β, the rank calibration of Zhao et al. 2023, "SLiC-HF", eq. 1, times β.
    """
    return torch.relu(1 - beta * margin)


def ipo_loss(margin: Tensor, beta: float) -> Tensor:
    """(m − 1/(2β))².

    Azar et al. 2024, "A general theoretical paradigm to understand learning from human preferences", eq. 17,
    with β for its τ. Its authors average s over the tokens of each answer, as TRL and our trainers do: a
    squared error of sums would grow with the square of the length.

    Args:
        margin: any shape; of averages, or of sums.
        beta: > 0.
    """
    return (margin - 1 / (2 * beta)) ** 2


def exo_loss(margin: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """KL(q ‖ p) of q = (σ(β m), σ(−β m)) from the labels p = (1 − ε, ε).

    Ji et al. 2024, "Towards efficient exact optimization of language model alignment", eq. 16 (EXO-pref) with
    two answers. DPO's is the KL the other way round.

    Args:
        margin, beta: as for `sigmoid_loss`.
        label_smoothing: ε in (0, ½); the paper takes 1e-3. At 0 the loss is infinite.
    """
    chosen, rejected = logsigmoid(beta * margin), logsigmoid(-beta * margin)
    from_chosen = chosen.exp() * (chosen - math.log1p(-label_smoothing))
    return from_chosen + rejected.exp() * (rejected - math.log(label_smoothing))


def discopop_loss(margin: Tensor, beta: float, tau: float = 0.05) -> Tensor:
    """(1 − w) (−log σ(β m)) + w exp(−β m), w = σ(β m / τ).

    Lu et al. 2024, "Discovering preference optimization algorithms with and for large language models", eq. 5
    (log-ratio modulated loss).

    Args:
        margin, beta: as for `sigmoid_loss`.
        tau: how soon one part takes over from the other, > 0.
    """
    scaled = beta * margin
    weight = torch.sigmoid(scaled / tau)
    # Where the exponential would overflow its weight is 0; 0 · inf is not.
    return (1 - weight) * -logsigmoid(scaled) + weight * torch.exp((-scaled).clamp(max=LARGEST_EXPONENT))


# ---- of both log-ratios ----


def nca_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """−log σ(β h_w) − ½ log σ(−β h_w) − ½ log σ(−β h_l).

    Chen et al. 2024, "Noise contrastive alignment of language models with explicit rewards": NCA with
    two answers, of which the better one's reward is infinitely higher.

    Args:
        chosen, rejected: any shape, the same: log-ratios.
        beta: > 0.

    Raises:
        DataError: the shapes differ.
    """
    require_same_shape(chosen=chosen, rejected=rejected)
    noise = (logsigmoid(-beta * chosen) + logsigmoid(-beta * rejected)) / 2
    return -logsigmoid(beta * chosen) - noise


def bco_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """−log σ(β h_w) − log σ(−β h_l): a classifier of good answers whose logit is the reward.

    Jung et al. 2024, "Binary classifier optimization for large language model alignment", with its reward
    shift δ at 0, as in TRL 1.16.

    Args, raises: as for `nca_loss`.
    """
    require_same_shape(chosen=chosen, rejected=rejected)
    return -logsigmoid(beta * chosen) - logsigmoid(-beta * rejected)


def sppo_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """(h_w − 1/(2β))² + (h_l + 1/(2β))².

    Wu et al. 2024, "Self-play preference optimization for language model alignment", eq. 4.7 with η = 1/β and
    the preference of the winner certain ("hard": P is 1 for it, 0 for the other).

    Args, raises: as for `nca_loss`.
    """
    require_same_shape(chosen=chosen, rejected=rejected)
    return (chosen - 1 / (2 * beta)) ** 2 + (rejected + 1 / (2 * beta)) ** 2


def apo_zero_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """[1 − σ(β h_w)] + σ(β h_l): up with the chosen, down with the rejected.

    D'Oosterlinck et al. 2024, "Anchored preference optimization and contrastive revisions", eq. 7: for chosen
    answers that are better than the model's own.

    Args, raises: as for `nca_loss`.
    """
    require_same_shape(chosen=chosen, rejected=rejected)
    return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)


def apo_down_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """σ(β h_w) + [1 − σ(β (h_w − h_l))]: down with both, with the rejected one further.

    D'Oosterlinck et al. 2024, eq. 8: for chosen answers that are worse than the model's own.

    Args, raises: as for `nca_loss`.
    """
    require_same_shape(chosen=chosen, rejected=rejected)
    return torch.sigmoid(beta * chosen) + torch.sigmoid(-beta * (chosen - rejected))


# ---- of a batch ----


def aot_loss(margins_B: Tensor, ref_margins_B: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """`sigmoid_loss` of sorted policy margins against sorted reference margins.

    Melnyk et al. 2024, "Distributional preference alignment of LLMs via optimal transport", section 3
    (paired): the distribution of log π(y_w) − log π(y_l) over the batch is to dominate that of the reference.

    Args:
        margins_B: [B], log π(y_w) − log π(y_l).
        ref_margins_B: [B], the same under the reference.
        beta, label_smoothing: as for `sigmoid_loss`.

    Returns:
        [B], in the order of the margins' ranks, not of the pairs.

    Raises:
        DataError: the shapes differ.
    """
    require_same_shape(margins=margins_B, ref_margins=ref_margins_B)
    return sigmoid_loss(margins_B.sort().values - ref_margins_B.sort().values, beta, label_smoothing)


def aot_unpaired_loss(
    chosen_B: Tensor, rejected_B: Tensor, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """`sigmoid_loss` of sorted log-ratios of the chosen against sorted ones of the rejected.

    Melnyk et al. 2024, section 3 (unpaired): which answer belonged to which doesn't matter.

    Args:
        chosen_B, rejected_B: [B], log-ratios.
        beta, label_smoothing: as for `sigmoid_loss`.

    Returns:
        [B], in the order of ranks.

    Raises:
        DataError: the shapes differ.
    """
    require_same_shape(chosen=chosen_B, rejected=rejected_B)
    return sigmoid_loss(chosen_B.sort().values - rejected_B.sort().values, beta, label_smoothing)
