"""What changes a distribution before a token is drawn from it, in the order of `transformers`.

    edit:  repetition penalty ─► min_new_tokens ─► allowed tokens ─► processors
    warp:  (after the temperature)  top-k ─► top-p ─► min-p

Rows that have the same kind of cut are cut together, each with its own number. Only processors, which are
other people's code, are called row by row: nothing is known of what they remember. As in `transformers`,
greedy rows are edited, not warped.

Not covered: temperature and the draw itself (`draw`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from etude.errors import SamplerError
from etude.types import SamplingParams

# Most nuclei have fewer tokens than the first, nearly all fewer than the second: only those are sorted.
_CANDIDATES = (512, 16_384)


@dataclass(slots=True)
class Row:
    """What one row's draw depends on.

    Attributes:
        params: of the turn.
        seed: of the session's stream.
        position: of the token to be drawn: the number of tokens so far.
        history: gives the tokens so far, [1, position].
        generated: tokens of this turn so far.
    """

    params: SamplingParams
    seed: int
    position: int
    history: Callable[[], Tensor]
    generated: int
    _forbidden: Tensor | None = None

    def forbidden(self, vocabulary: int, device: torch.device) -> Tensor:
        """Looked up once per row: hashing a long tuple takes longer than cutting by it."""
        if self._forbidden is None:
            assert self.params.allowed_token_ids is not None
            self._forbidden = forbidden_tokens(self.params.allowed_token_ids, vocabulary, device)
        return self._forbidden

    @property
    def is_edited(self) -> bool:
        """True where `edit` changes the row's scores."""
        params = self.params
        return bool(
            params.repetition_penalty != 1
            or params.allowed_token_ids is not None
            or params.processors
            or (params.eos_token_ids and self.generated < params.min_new_tokens)
        )


@lru_cache(maxsize=32)
def forbidden_tokens(allowed: tuple[int, ...], vocabulary: int, device: torch.device) -> Tensor:
    """[vocabulary], True for tokens that are not in `allowed`."""
    if max(allowed) >= vocabulary:
        raise SamplerError(
            f"allowed_token_ids has token {max(allowed)}; the model's vocabulary ends at {vocabulary - 1}"
        )
    mask_V = torch.ones(vocabulary, dtype=torch.bool)
    mask_V[list(allowed)] = False
    return mask_V.to(device)


def edit(scores_RV: Tensor, rows: Sequence[Row]) -> dict[int, SamplerError]:
    """Change the scores in place; rows that can't be edited are returned with what went wrong."""
    _penalise(scores_RV, rows)
    _postpone_end(scores_RV, rows)
    failures = _forbid(scores_RV, rows)
    for i, row in enumerate(rows):
        if row.params.processors and i not in failures:
            try:
                _process(scores_RV[i : i + 1], row)
            except SamplerError as error:
                failures[i] = error
    return failures


def _penalise(scores_RV: Tensor, rows: Sequence[Row]) -> None:
    """Make tokens of the history, prompt included, less likely (Keskar et al. 2019, §4.1)."""
    which = [i for i, row in enumerate(rows) if row.params.repetition_penalty != 1]
    if not which:
        return
    histories = [rows[i].history()[0] for i in which]
    tokens_N = torch.cat(histories)
    rows_N = torch.repeat_interleave(
        torch.tensor(which, device=tokens_N.device),
        torch.tensor([len(history) for history in histories], device=tokens_N.device),
        output_size=len(tokens_N),
    )
    scored_N = tokens_N < scores_RV.shape[-1]  # an embedding may have more tokens than the head
    rows_N, tokens_N = rows_N[scored_N], tokens_N[scored_N]
    penalty_N = scores_RV.new_tensor([row.params.repetition_penalty for row in rows])[rows_N]
    scores_N = scores_RV[rows_N, tokens_N]
    # A token that is there twice gets the same score twice.
    scores_RV[rows_N, tokens_N] = torch.where(scores_N < 0, scores_N * penalty_N, scores_N / penalty_N)


def _postpone_end(scores_RV: Tensor, rows: Sequence[Row]) -> None:
    ends = [
        (i, token)
        for i, row in enumerate(rows)
        if row.generated < row.params.min_new_tokens
        for token in row.params.eos_token_ids
        if token < scores_RV.shape[-1]
    ]
    if ends:
        which, tokens = zip(*ends, strict=True)
        scores_RV[list(which), list(tokens)] = -torch.inf


def _forbid(scores_RV: Tensor, rows: Sequence[Row]) -> dict[int, SamplerError]:
    """Leave each row its allowed tokens."""
    masks, failures = {}, {}
    for i, row in enumerate(rows):
        if row.params.allowed_token_ids is not None:
            try:
                masks[i] = row.forbidden(scores_RV.shape[-1], scores_RV.device)
            except SamplerError as error:
                failures[i] = error
    if masks:
        which, masks_V = list(masks), list(masks.values())
        shared = all(mask is masks_V[0] for mask in masks_V)
        scores_RV[which] = scores_RV[which].masked_fill(
            masks_V[0] if shared else torch.stack(masks_V), -torch.inf
        )
    return failures


def _process(scores_1V: Tensor, row: Row) -> None:
    result = scores_1V
    for processor in row.params.processors:
        try:
            result = processor(row.history(), result)
        except Exception as error:  # the boundary: a processor is the user's, anything can go wrong in it
            raise SamplerError(f"the logits processor {_name(processor)} failed: {error!r}") from error
        if not isinstance(result, Tensor) or result.shape != scores_1V.shape:
            given = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
            expected = list(scores_1V.shape)
            raise SamplerError(
                f"the logits processor {_name(processor)} gave {given}; expected scores {expected}"
            )
    if result is not scores_1V:
        scores_1V.copy_(result)


def _name(processor: object) -> str:
    return getattr(processor, "__name__", None) or type(processor).__name__


def edits_in_force(row: Row) -> str:
    """Names what may have left a row without a token, for messages."""
    params = row.params
    names = [f"the logits processor {_name(processor)}" for processor in params.processors]
    if params.allowed_token_ids is not None:
        names.append("allowed_token_ids")
    if row.generated < params.min_new_tokens:
        names.append("min_new_tokens")
    return ", ".join(names) or "sampling parameters"


def warp(scores_RV: Tensor, rows: Sequence[Row]) -> Tensor:
    """Top-k, top-p and min-p; `scores_RV` itself where no row has any of them."""
    size = scores_RV.shape[-1]
    settings = [row.params for row in rows]
    sampled = [params.temperature > 0 for params in settings]
    top_k = {i: p.top_k for i, p in enumerate(settings) if sampled[i] and 0 < p.top_k < size}
    top_p = {i: 1 - p.top_p for i, p in enumerate(settings) if sampled[i] and p.top_p < 1}
    min_p = {i: math.log(p.min_p) for i, p in enumerate(settings) if sampled[i] and p.min_p}
    scores_RV = on_rows(scores_RV, list(top_k), lambda part: _top_k(part, list(top_k.values())))
    scores_RV = on_rows(scores_RV, list(top_p), lambda part: _top_p(part, part.new_tensor([*top_p.values()])))
    return on_rows(scores_RV, list(min_p), lambda part: _min_p(part, part.new_tensor([*min_p.values()])))


def on_rows(scores_RV: Tensor, which: list[int], change: Callable[[Tensor], Tensor]) -> Tensor:
    """The scores with rows `which` changed, all in one call."""
    if not which:
        return scores_RV
    if len(which) == len(scores_RV):
        return change(scores_RV)
    index = torch.tensor(which, device=scores_RV.device)
    return scores_RV.index_copy(0, index, change(scores_RV[index]))


def _top_k(scores_RV: Tensor, k: list[int]) -> Tensor:
    """Ties with the k-th are kept."""
    kth_R1 = torch.tensor(k, device=scores_RV.device)[:, None] - 1
    least_R1 = scores_RV.topk(max(k)).values.gather(-1, kth_R1)
    return scores_RV.masked_fill(scores_RV < least_R1, -torch.inf)


def _top_p(scores_RV: Tensor, removable_R: Tensor) -> Tensor:
    """From the least likely up, remove tokens while their mass stays within 1 - p (Holtzman et al. 2020).

    Where equally likely tokens lie across that border, as many are kept as in `transformers`; which of
    them is left to the sort, there as here.
    """
    vocabulary = scores_RV.shape[-1]
    first, *wider = (*(size for size in _CANDIDATES if size < vocabulary), vocabulary)
    cut_RV, complete_R = _nucleus(scores_RV, removable_R, first)
    for size in wider:
        wide = (~complete_R).nonzero()[:, 0]
        if not len(wide):
            break
        cut_RV[wide], complete_R[wide] = _nucleus(scores_RV[wide], removable_R[wide], size)
    return cut_RV


def _nucleus(scores_RV: Tensor, removable_R: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Top-p among the `size` most likely tokens (C), and whether the nucleus ends among them, per row."""
    if size == scores_RV.shape[-1]:
        scores_RC, ids_RC = scores_RV.sort(-1)
        mass_RC = scores_RC.softmax(-1).cumsum(-1)
    else:
        scores_RC, ids_RC = (part.flip(-1) for part in scores_RV.topk(size))
        probs_RV = scores_RV.softmax(-1)
        probs_RC = probs_RV.gather(-1, ids_RC)
        mass_RC = probs_RV.scatter_(-1, ids_RC, 0.0).sum(-1, keepdim=True) + probs_RC.cumsum(-1)
    removed_RC = mass_RC <= removable_R[:, None]
    removed_RC[:, -1] = False
    least_R = scores_RC.masked_fill(removed_RC, torch.inf).amin(-1)
    cut_RC = scores_RC.masked_fill(removed_RC, -torch.inf)
    return torch.full_like(scores_RV, -torch.inf).scatter_(-1, ids_RC, cut_RC), least_R > scores_RC[:, 0]


def _min_p(scores_RV: Tensor, log_min_R: Tensor) -> Tensor:
    least_R1 = scores_RV.amax(-1, keepdim=True) + log_min_R[:, None]
    return scores_RV.masked_fill(scores_RV < least_R1, -torch.inf)
