"""Choosing tokens: one pass over the logits of all rows, random numbers from counter-based streams.

Each row draws from its own stream, a pure function of (seed, position): what a row samples doesn't
depend on which rows it shared a batch with. The distribution is inverted (one cumulative sum, one search)
rather than handed to `torch.multinomial`, which is several times slower and draws from a global state.

Not covered: what cuts a distribution before it is drawn from (`cuts`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from etude.errors import SamplerError
from etude.math.counters import mix, mix_pairs
from etude.math.placing import Fetch, place
from etude.models.cached_attention import token_kernels
from etude.sampling.cuts import Row, edit, edits_in_force, on_rows, warp

_BLOCK = 128  # tokens


def uniform(seed: int, position: int) -> float:
    """The number in (0, 1) that decides the token at `position` of the stream `seed`."""
    return ((mix(seed, position) >> 40) + 0.5) * 2.0**-24


def uniforms(rows: Sequence[Row]) -> np.ndarray:
    """`uniform` of each row's seed and position, [R] float64."""
    mixed_R = mix_pairs([(row.seed, row.position) for row in rows])
    numbers_R: np.ndarray = ((mixed_R >> np.uint64(40)).astype(np.float64) + 0.5) * 2.0**-24
    return numbers_R


class Numbers(Protocol):
    """What was drawn [R, 3], once it is known."""

    def tolist(self) -> list[list[float]]: ...


@dataclass(slots=True)
class Drawn:
    """Per row: token ids, and their log-probabilities before and after the distribution was cut.

    `failures` has the rows from which nothing could be drawn; what the lists say of them means nothing.
    """

    token_ids: list[int]
    logprobs: list[float]
    sampling_logprobs: list[float]
    failures: dict[int, SamplerError] = field(default_factory=dict)


class Draw:
    """One token per row, drawn on the device but not known to Python yet.

    Attributes:
        tokens_R: the tokens, on the device.
        places: for each row, where its token is in `tokens_R`.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        numbers: Numbers,
        tokens_R: Tensor,
        failures: dict[int, SamplerError],
        places: Sequence[int] | None = None,
    ) -> None:
        self.tokens_R = tokens_R
        self.places = range(len(rows)) if places is None else places
        self._rows = rows
        self._numbers = numbers
        self._failures = failures

    def known(self) -> Drawn:
        """Waits for the device."""
        numbers = self._numbers.tolist()
        columns = zip(*(numbers[place] for place in self.places), strict=True)
        token_ids, logprobs, sampling = map(list, columns)
        failures = dict(self._failures)
        for i, row in enumerate(self._rows):
            if sampling[i] != sampling[i]:  # NaN, and so are all of the row's: it has no distribution
                failures.setdefault(i, _undrawable(row, of_model=logprobs[i] != logprobs[i]))
        return Drawn([int(token) for token in token_ids], logprobs, sampling, failures)


def draw(logits_RV: Tensor, rows: Sequence[Row]) -> Drawn:
    """Sample one token per row from `logits_RV` (float32 or float64, [rows, vocabulary])."""
    return begin_draw(logits_RV, rows).known()


def begin_draw(logits_RV: Tensor, rows: Sequence[Row]) -> Draw:
    """`draw`, without waiting for the device."""
    numbers_R3, failures = _draw(logits_RV, rows)
    return Draw(rows, Fetch.of(numbers_R3), numbers_R3[:, 0].long(), failures)


def begin_draw_each(logits_RV: Tensor, rows: Sequence[Row]) -> Draw:
    """`begin_draw`, row by row, for the same bits beside any rows.

    How a cumulative sum is cut up on a GPU depends on the number of rows.
    """
    each = [_draw(logits_RV[i : i + 1].clone(), [row]) for i, row in enumerate(rows)]
    failures = {i: failed[0] for i, (_, failed) in enumerate(each) if failed}
    numbers_R3 = torch.cat([numbers for numbers, _ in each])
    return Draw(rows, Fetch.of(numbers_R3), numbers_R3[:, 0].long(), failures)


def draw_plain(
    logits_RV: Tensor, u_R: Tensor, temperature_R: Tensor, numbers_R3: Tensor, tokens_R: Tensor
) -> None:
    """Draw from whole distributions, which nothing edits or cuts; nothing depends on values that Python sees.

    Args:
        u_R: the rows' random numbers, float64.
        temperature_R: float64; 0 takes the likeliest token.
        numbers_R3: gets token, log-probability and again log-probability, float64.
        tokens_R: gets the tokens.
    """
    if token_kernels(logits_RV.device, logits_RV.dtype) is not None:
        from etude.sampling import token_draw

        token_draw.draw(logits_RV, u_R, temperature_R, numbers_R3, tokens_R)
        return
    greedy_R1 = (temperature_R == 0)[:, None]
    logits_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
    probs_RV = (logits_RV / temperature_R[:, None].masked_fill(greedy_R1, 1.0).to(logits_RV.dtype)).softmax(
        -1
    )
    drawn_R1 = _invert(probs_RV, u_R.to(probs_RV.dtype)[:, None])
    tokens_R1 = torch.where(greedy_R1, logits_RV.argmax(-1, keepdim=True), drawn_R1)
    logprobs_R1 = probs_RV.gather(-1, tokens_R1).log()
    tokens_R.copy_(tokens_R1[:, 0])
    numbers_R3.copy_(torch.cat([tokens_R1.double(), logprobs_R1.double(), logprobs_R1.double()], dim=1))


def _draw(logits_RV: Tensor, rows: Sequence[Row]) -> tuple[Tensor, dict[int, SamplerError]]:
    """Token, log-probability before and after the cuts [R, 3], as one tensor to be fetched at once.

    In float64, where a token's number is exact.
    """
    if logits_RV.dtype not in (torch.float32, torch.float64):
        logits_RV = logits_RV.float()
    scaled_RV = _scale(logits_RV, rows)
    scores_RV, failures = _edited(logits_RV, scaled_RV, rows)
    scores_RV = warp(scores_RV, rows)
    tokens_R1, sampling_R1 = _choose(scores_RV, rows)
    logprobs_R1 = sampling_R1
    if scores_RV is not scaled_RV:
        logprobs_R1 = scaled_RV.log_softmax(-1).gather(-1, tokens_R1)
    numbers = tokens_R1.double(), logprobs_R1.double(), sampling_R1.double()
    return torch.cat(numbers, dim=1), failures


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


def _choose(scores_RV: Tensor, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """A token per row and its log-probability, both [R, 1]."""
    greedy = [row.params.temperature == 0 for row in rows]
    if all(greedy):
        tokens_R1 = scores_RV.argmax(-1, keepdim=True)
        return tokens_R1, scores_RV.log_softmax(-1).gather(-1, tokens_R1)
    # Not the exponential of a log-softmax, which is slow where most of a row is -inf. What was drawn is
    # likely enough for its probability's logarithm to be exact.
    probs_RV = scores_RV.softmax(-1)
    u_R = torch.from_numpy(uniforms(rows)).to(probs_RV.dtype)
    tokens_R1 = _invert(probs_RV, place(u_R, probs_RV.device)[:, None])
    if any(greedy):
        is_greedy_R1 = torch.tensor(greedy, device=scores_RV.device)[:, None]
        tokens_R1 = torch.where(is_greedy_R1, scores_RV.argmax(-1, keepdim=True), tokens_R1)
    return tokens_R1, probs_RV.gather(-1, tokens_R1).log()


def _invert(probs_RV: Tensor, u_R1: Tensor) -> Tensor:
    """The first token whose cumulative probability exceeds the row's random number, [R, 1].

    In two steps, first the block of tokens and then the token in it: only a row's sums over blocks and one
    block of it are accumulated.
    """
    vocabulary = probs_RV.shape[-1]
    if vocabulary % _BLOCK:
        probs_RV = pad(probs_RV, (0, _BLOCK - vocabulary % _BLOCK))
    probs_RKB = probs_RV.unflatten(-1, (-1, _BLOCK))
    upto_RK = probs_RKB.sum(-1).cumsum(-1)
    threshold_R1 = u_R1 * upto_RK[:, -1:]
    block_R1 = _first_above(upto_RK, threshold_R1)
    before_R1 = pad(upto_RK, (1, 0)).gather(-1, block_R1)
    index_R1B = block_R1[:, :, None].expand(-1, -1, _BLOCK)
    within_RB = probs_RKB.gather(1, index_R1B)[:, 0].cumsum(-1)
    return (block_R1 * _BLOCK + _first_above(within_RB, threshold_R1 - before_R1)).clamp(max=vocabulary - 1)


def _first_above(upto_RN: Tensor, threshold_R1: Tensor) -> Tensor:
    """Where a running sum first exceeds a threshold, [R, 1].

    The threshold is kept strictly below the total, so that rounding can't step past the last token that
    has any mass. A row of NaN is searched to its end.
    """
    total_R1 = upto_RN[:, -1:]
    below_R1 = torch.nextafter(total_R1, torch.zeros_like(total_R1))
    first_R1 = torch.searchsorted(upto_RN, torch.minimum(threshold_R1, below_R1), right=True)
    return first_R1.clamp(max=upto_RN.shape[-1] - 1)


def _undrawable(row: Row, *, of_model: bool) -> SamplerError:
    if of_model:
        return SamplerError(
            "the model's logits have a NaN or +inf, or are all -inf: there is nothing to draw from; "
            "look at the weights, and at the precision they are computed in"
        )
    return SamplerError(
        f"no token can be drawn: after {edits_in_force(row)} the scores have a NaN or +inf, or are all -inf"
    )
