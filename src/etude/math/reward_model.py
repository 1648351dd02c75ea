"""Losses of reward models and of process reward models, one per pair or step.

Covered: Bradley–Terry with a margin, the penalty that keeps scores around zero, and the loss of a step's
label. Not covered: their averages (denominators are global over processes, the trainer's business), how well
the probabilities are calibrated (`calibration`), rankings of more than two answers (give their pairs).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from etude.math.masked import require_same_shape


def pair_loss(chosen_P: Tensor, rejected_P: Tensor, margins_P: Tensor | None = None) -> Tensor:
    """−log σ(r(x, y_chosen) − r(x, y_rejected) − m), for each of P pairs.

    Ouyang et al. 2022, "Training language models to follow instructions with human feedback", eq. 1, of which
    this is one pair's term; the margin m is that of Touvron et al. 2023, "Llama 2", eq. 2: the clearer the
    preference, the farther apart the scores should be.

    Args:
        chosen_P: scores of the answers that were preferred.
        rejected_P: scores of the others.
        margins_P: None is 0.

    Raises:
        DataError: the shapes differ.
    """
    require_same_shape(chosen=chosen_P, rejected=rejected_P)
    distances_P = chosen_P - rejected_P
    if margins_P is not None:
        require_same_shape(scores=chosen_P, margins=margins_P)
        distances_P = distances_P - margins_P
    return -logsigmoid(distances_P)


def centring_penalty(chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
    """(r(x, y_chosen) + r(x, y_rejected))², for each of P pairs, to be added times a small coefficient.

    Eisenstein et al. 2023, "Helping or herding? Reward model ensembles mitigate but do not eliminate reward
    hacking", eq. 2. A preference says nothing about a constant that all scores have in common; this sets it.

    Raises:
        DataError: the shapes differ.
    """
    require_same_shape(chosen=chosen_P, rejected=rejected_P)
    return (chosen_P + rejected_P).square()


def pair_probabilities(chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
    """σ(r(x, y_chosen) − r(x, y_rejected)): how probable the model finds each of the P preferences."""
    require_same_shape(chosen=chosen_P, rejected=rejected_P)
    return torch.sigmoid(chosen_P - rejected_P)


def step_log_odds(logits_M2: Tensor) -> Tensor:
    """log(p / (1 − p)) of "this step is right" [M], from the logits of its two labels (wrong, right)."""
    return logits_M2[:, 1] - logits_M2[:, 0]


def step_loss(log_odds_M: Tensor, labels_M: Tensor) -> Tensor:
    """−y log p − (1 − y) log(1 − p), for each of M steps.

    The cross entropy of a step's label, read off after the step's last token: Lightman et al. 2023, "Let's
    verify step by step", section 2.6. A label between 0 and 1 is the share of solutions that end well from
    there (Wang et al. 2024, "Math-Shepherd", eq. 4, with estimates that are hard or soft).

    Args:
        log_odds_M: see `step_log_odds`.
        labels_M: 1 for a step that is right, 0 for a wrong one.

    Raises:
        DataError: the shapes differ.
    """
    require_same_shape(log_odds=log_odds_M, labels=labels_M)
    labels_M = labels_M.to(log_odds_M.dtype)
    return -(labels_M * logsigmoid(log_odds_M) + (1 - labels_M) * logsigmoid(-log_odds_M))
