"""Choosing tokens: one pass over the logits of all rows, random numbers from counter-based streams.

Each row draws from its own stream, a pure function of (seed, position): what a row samples doesn't
depend on which rows it shared a batch with. The distribution is inverted (one cumulative sum, one search)
rather than handed to `torch.multinomial`, which is several times slower and draws from a global state.

Not covered: what cuts a distribution before it is drawn from (`cuts`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from etude.errors import SamplerError
from etude.sampling.cuts import Row, edit, edits_in_force, on_rows, warp

_MASK = (1 << 64) - 1


def mix(*words: int) -> int:
    """Hash integers to 64 bits by the SplitMix64 finaliser (Steele, Lea & Flood 2014), word by word."""
    state = 0
    for word in words:
        state = (state + word + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def uniform(seed: int, position: int) -> float:
    """The number in (0, 1) that decides the token at `position` of the stream `seed`."""
    return ((mix(seed, position) >> 40) + 0.5) * 2.0**-24


@dataclass(slots=True)
class Drawn:
    """Per row: token ids, and their log-probabilities before and after the distribution was cut.

    `failures` has the rows from which nothing could be drawn; what the lists say of them means nothing.
    """

    token_ids: list[int]
    logprobs: list[float]
    sampling_logprobs: list[float]
    failures: dict[int, SamplerError] = field(default_factory=dict)


def draw(logits_RV: Tensor, rows: Sequence[Row]) -> Drawn:
    """Sample one token per row from `logits_RV` (float32 or float64, [rows, vocabulary])."""
    if logits_RV.dtype not in (torch.float32, torch.float64):
        logits_RV = logits_RV.float()
    scaled_RV = _scale(logits_RV, rows)
    base_RV = scaled_RV.log_softmax(-1)
    scores_RV, failures = _edited(logits_RV, scaled_RV, rows)
    scores_RV = warp(scores_RV, rows)
    cut_RV = base_RV if scores_RV is scaled_RV else scores_RV.log_softmax(-1)

    greedy = [row.params.temperature == 0 for row in rows]
    if all(greedy):
        tokens_R = cut_RV.argmax(-1)
    else:
        tokens_R = _invert(cut_RV, rows)
        if any(greedy):
            tokens_R = torch.where(torch.tensor(greedy, device=tokens_R.device), cut_RV.argmax(-1), tokens_R)
    logprobs = base_RV.gather(-1, tokens_R[:, None])[:, 0].tolist()
    sampling = logprobs if cut_RV is base_RV else cut_RV.gather(-1, tokens_R[:, None])[:, 0].tolist()
    for i, row in enumerate(rows):
        if sampling[i] != sampling[i]:  # NaN, and so are all of the row's: it has no distribution
            failures.setdefault(i, _undrawable(row, of_model=logprobs[i] != logprobs[i]))
    return Drawn(tokens_R.tolist(), logprobs, sampling, failures)


def _scale(logits_RV: Tensor, rows: Sequence[Row]) -> Tensor:
    """Divide by the temperature; `logits_RV` itself where that changes nothing."""
    temperatures = [row.params.temperature or 1.0 for row in rows]
    if all(t == 1 for t in temperatures):
        return logits_RV
    return logits_RV / logits_RV.new_tensor(temperatures)[:, None]


def _edited(
    logits_RV: Tensor, scaled_RV: Tensor, rows: Sequence[Row]
) -> tuple[Tensor, dict[int, SamplerError]]:
    """The scaled logits, those of edited rows scaled after their edit, and failures by row."""
    which = [i for i, row in enumerate(rows) if row.is_edited]
    if not which:
        return scaled_RV, {}
    part = [rows[i] for i in which]
    edited_RV = logits_RV[which]  # a copy, to be written into
    failures = edit(edited_RV, part)
    scores_RV = on_rows(scaled_RV, which, lambda _: _scale(edited_RV, part))
    return scores_RV, {which[i]: failure for i, failure in failures.items()}


def _invert(logprobs_RV: Tensor, rows: Sequence[Row]) -> Tensor:
    """The first token whose cumulative probability exceeds the row's random number."""
    cdf_RV = logprobs_RV.exp().cumsum(-1)
    u_R = cdf_RV.new_tensor([uniform(row.seed, row.position) for row in rows])
    total_R = cdf_RV[:, -1]
    # Strictly below the total, so that rounding can't step past the last token that has any mass.
    threshold_R = torch.minimum(u_R * total_R, torch.nextafter(total_R, torch.zeros_like(total_R)))
    tokens_R = torch.searchsorted(cdf_RV, threshold_R[:, None], right=True)[:, 0]
    return tokens_R.clamp(max=logprobs_RV.shape[-1] - 1)  # a row of NaN is searched to its end


def _undrawable(row: Row, *, of_model: bool) -> SamplerError:
    if of_model:
        return SamplerError(
            "the model's logits have a NaN or +inf, or are all -inf: there is nothing to draw from; "
            "look at the weights, and at the precision they are computed in"
        )
    return SamplerError(
        f"no token can be drawn: after {edits_in_force(row)} the scores have a NaN or +inf, or are all -inf"
    )
