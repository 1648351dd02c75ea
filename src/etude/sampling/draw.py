"""Choosing tokens: one pass over the logits of all rows, random numbers from counter-based streams.

Each row draws from its own stream, a pure function of (seed, position): what a row samples doesn't
depend on which rows it shared a batch with. The distribution is inverted (one cumulative sum, one search)
rather than handed to `torch.multinomial`, which is several times slower and draws from a global state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from etude.types import SamplingParams

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
class Row:
    """What one row's draw depends on.

    Attributes:
        params: of the turn.
        seed: of the session's stream.
        position: of the token to be drawn: the number of tokens so far.
        history: gives the tokens so far, [1, position], to processors.
        generated: tokens sampled in this turn so far.
    """

    params: SamplingParams
    seed: int
    position: int
    history: Callable[[], Tensor]
    generated: int


@dataclass(slots=True)
class Drawn:
    """Per row: token ids, and their log-probabilities before and after the distribution was cut."""

    token_ids: list[int]
    logprobs: list[float]
    sampling_logprobs: list[float]


def draw(logits_RV: Tensor, rows: Sequence[Row]) -> Drawn:
    """Sample one token per row from `logits_RV` (float32 or float64, [rows, vocabulary])."""
    if logits_RV.dtype not in (torch.float32, torch.float64):
        logits_RV = logits_RV.float()
    temperatures = [row.params.temperature or 1.0 for row in rows]
    base_RV = logits_RV
    if any(t != 1.0 for t in temperatures):
        base_RV = logits_RV / logits_RV.new_tensor(temperatures)[:, None]
    base_RV = base_RV.log_softmax(-1)
    cut_RV = _cut(logits_RV, base_RV, rows, temperatures)

    greedy = [row.params.temperature == 0 for row in rows]
    if all(greedy):
        tokens_R = cut_RV.argmax(-1)
    else:
        tokens_R = _invert(cut_RV, rows)
        if any(greedy):
            tokens_R = torch.where(torch.tensor(greedy, device=tokens_R.device), cut_RV.argmax(-1), tokens_R)
    logprobs = base_RV.gather(-1, tokens_R[:, None])[:, 0].tolist()
    sampling = logprobs if cut_RV is base_RV else cut_RV.gather(-1, tokens_R[:, None])[:, 0].tolist()
    return Drawn(tokens_R.tolist(), logprobs, sampling)


def draw_each(logits_RV: Tensor, rows: Sequence[Row]) -> Drawn:
    """`draw`, row by row, for the same bits beside any rows.

    How a cumulative sum is cut up on a GPU depends on the number of rows.
    """
    each = [draw(logits_RV[i : i + 1].clone(), [row]) for i, row in enumerate(rows)]
    return Drawn(
        [one.token_ids[0] for one in each],
        [one.logprobs[0] for one in each],
        [one.sampling_logprobs[0] for one in each],
    )


def _invert(logprobs_RV: Tensor, rows: Sequence[Row]) -> Tensor:
    """The first token whose cumulative probability exceeds the row's random number."""
    cdf_RV = logprobs_RV.exp().cumsum(-1)
    u_R = cdf_RV.new_tensor([uniform(row.seed, row.position) for row in rows])
    total_R = cdf_RV[:, -1]
    # Strictly below the total, so that rounding can't step past the last token that has any mass.
    threshold_R = torch.minimum(u_R * total_R, torch.nextafter(total_R, torch.zeros_like(total_R)))
    return torch.searchsorted(cdf_RV, threshold_R[:, None], right=True)[:, 0]


def _cut(logits_RV: Tensor, base_RV: Tensor, rows: Sequence[Row], temperatures: list[float]) -> Tensor:
    """Log-probabilities of the distribution really sampled from; `base_RV` itself where nothing is cut."""
    changed = [
        i
        for i, row in enumerate(rows)
        if row.params.processors
        or row.params.top_k
        or row.params.top_p < 1
        or row.params.min_p
        or (row.generated < row.params.min_new_tokens and row.params.eos_token_ids)
    ]
    if not changed:
        return base_RV
    scores = torch.stack([_cut_row(logits_RV[i], rows[i], temperatures[i]) for i in changed]).log_softmax(-1)
    if len(changed) == len(rows):
        return scores
    return base_RV.index_copy(0, torch.tensor(changed, device=base_RV.device), scores)


def _cut_row(logits_V: Tensor, row: Row, temperature: float) -> Tensor:
    """Processors, minimum length, temperature, top-k, top-p, min-p: the order of `transformers`."""
    params = row.params
    scores_V = logits_V
    if params.processors:
        scores_1V = logits_V[None].clone()  # a processor may write into it
        for processor in params.processors:
            scores_1V = processor(row.history(), scores_1V)
        scores_V = scores_1V[0]
    if temperature != 1.0:
        scores_V = scores_V / temperature
    if row.generated < params.min_new_tokens and params.eos_token_ids:
        eos = torch.tensor(params.eos_token_ids, device=scores_V.device)
        scores_V = scores_V.index_fill(0, eos, -torch.inf)
    if params.top_k and params.top_k < scores_V.numel():
        scores_V = scores_V.masked_fill(scores_V < scores_V.topk(params.top_k).values[-1], -torch.inf)
    if params.top_p < 1:
        sorted_V, order_V = scores_V.sort(descending=True)
        probs_V = sorted_V.softmax(-1)
        mass_before_V = probs_V.cumsum(-1) - probs_V
        scores_V = scores_V.index_fill(0, order_V[mass_before_V >= params.top_p], -torch.inf)
    if params.min_p:
        least = scores_V.max() + math.log(params.min_p)
        scores_V = scores_V.masked_fill(scores_V < least, -torch.inf)
    return scores_V
