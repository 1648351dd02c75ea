"""Log-probabilities and entropy of a categorical distribution given by logits.

Covered: log π(token | context) and H(π) at a temperature. Not covered: top-k, top-p and other changes of
the distribution (the sampler records those), and chunking over rows to save memory (`models.head` does).
"""

from __future__ import annotations

import torch
from torch import Tensor

from etude.errors import ConfigError, DataError


def scaled_logits(logits: Tensor, temperature: float) -> Tensor:
    """Logits divided by the temperature, in float32 (float64 stays float64).

    Args:
        logits: [..., V], any float dtype.
        temperature: above 0; at 1 a float32 input is returned as it is, without a copy.

    Raises:
        ConfigError: the temperature is not a positive finite number.
    """
    if not 0 < temperature < float("inf"):
        raise ConfigError(
            f"temperature is {temperature}; expected a finite number > 0. Greedy decoding (temperature 0) "
            "has no log-probabilities of its own: score its tokens at temperature 1"
        )
    # bf16 has 8 bits: a logsumexp of 20 would be rounded to a multiple of 1/8, and a probability by 6 %.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if temperature == 1 else logits / temperature


def token_logprobs(logits_TV: Tensor, token_ids_T: Tensor, temperature: float = 1.0) -> Tensor:
    """log π(token) in nats: the token's logit minus the logsumexp of all of them.

    The log-softmax over the vocabulary is never stored: backward needs the logits and one number per row.
    logsumexp subtracts the row's maximum first, so large logits don't overflow, and the result is never
    above 0.

    Args:
        logits_TV: [..., V], any leading shape.
        token_ids_T: [...], int64, the leading shape of the logits.
        temperature: divides the logits.

    Returns:
        [...], float32 (float64 for float64 logits).

    Raises:
        ConfigError: the temperature is not a positive finite number.
        DataError: the shapes don't fit.
    """
    if logits_TV.shape[:-1] != token_ids_T.shape:  # gather would silently take a corner of the logits
        raise DataError(
            f"logits have shape {tuple(logits_TV.shape)} and token_ids {tuple(token_ids_T.shape)}; expected "
            "one token id per row of logits. A causal model's logits at t belong to the token at t + 1"
        )
    scaled_TV = scaled_logits(logits_TV, temperature)
    selected_T = scaled_TV.gather(-1, token_ids_T.unsqueeze(-1)).squeeze(-1)
    return selected_T - scaled_TV.logsumexp(-1)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """H(π) = −Σ π log π in nats; between 0 and log V.

    A token with logit −inf has probability 0 and adds 0, to the entropy and to its gradient.

    Args:
        logits: [..., V], any leading shape.
        temperature: divides the logits.

    Returns:
        [...], float32 (float64 for float64 logits).

    Raises:
        ConfigError: the temperature is not a positive finite number.
    """
    logprobs = scaled_logits(logits, temperature).log_softmax(-1)
    # 0 · log 0 is 0 here, but 0 · −inf is NaN: give such tokens a finite logarithm before multiplying.
    finite = logprobs.masked_fill(logprobs == -torch.inf, 0.0)
    return -(logprobs.exp() * finite).sum(-1)
