"""A plain output layer's scores of tokens, in chunks of the vocabulary projection, as autograd functions.

Two of them: `LinearHead` for any function of log-probabilities, which computes each chunk's logits again in
the backward pass; and `LinearTotal` for a weighted sum of them, whose gradient is known at once.
Not covered: layers that are more than a weight and a bias (`head` computes those by autograd).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import softmax
from transformers import PreTrainedConfig

from etude.math.logprobs import scaled_logits
from etude.models.onednn import product

BLOCK_BYTES = 2**20  # of logits, on a CPU: what stays in its cache while it is gone over a dozen times

# By these settings some families multiply their logits (1), or divide them (−1).
_SCALES = {"logit_scale": 1, "lm_head_multiplier": 1, "logits_scaling": -1}


@dataclass(frozen=True)
class Finish:
    """What a family does with the output layer's numbers: softcap · tanh(scale · number / softcap).

    Attributes:
        scale: Cohere's, Granite's, Falcon-H1's.
        softcap: Gemma 2's; None leaves out the tanh.
    """

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def announced(cls, config: PreTrainedConfig) -> Finish:
        """As the configuration has it, which the modelling file needn't follow."""
        config = config.get_text_config()
        settings = {name: getattr(config, name, None) for name in _SCALES}
        factors = [v ** _SCALES[name] for name, v in settings.items() if isinstance(v, int | float)]
        return cls(float(math.prod(factors)), getattr(config, "final_logit_softcapping", None))

    def __call__(self, logits: Tensor) -> Tensor:
        """In float32 (float64 stays float64), in which a capped logit keeps its last digits."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def slope(self, logits: Tensor) -> Tensor | None:
        """How much a finished logit moves with its number, `scale` left out; None for 1."""
        return None if self.softcap is None else 1 - (logits / self.softcap) ** 2


class LinearHead(torch.autograd.Function):
    """A plain linear layer, its finish and the scores of tokens, in chunks.

    Backward turns each chunk's logits, computed again, in place into their own gradient, and adds up the
    weight's gradient in one buffer of the weight's precision: autograd would make a [V, D] for each chunk.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states_MD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_M: Tensor,
        finish: Finish,
        rows: int,
        temperature: float,
        entropy_gradient: bool,
        passes: ChunkPasses | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        passes = passes or ChunkPasses()
        dtype = _computing_dtype(weight_VD)
        precise = torch.promote_types(dtype, torch.float32)
        totals_M, logprobs_M, entropies_M = (
            states_MD.new_empty(len(states_MD), dtype=precise) for _ in range(3)
        )
        hits_M = torch.empty_like(totals_M, dtype=torch.bool)
        with torch.autocast(weight_VD.device.type, enabled=False):
            weight, bias = weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)
            for here in _chunks(len(states_MD), rows):
                raw_CV = product(states_MD[here].to(dtype), weight, bias)
                scores = passes.scores(raw_CV, targets_M[here, None], finish, temperature)
                logprobs_M[here], entropies_M[here], totals_M[here], hits_M[here] = scores
        kept_M = entropies_M if entropy_gradient else None
        ctx.save_for_backward(states_MD, weight_VD, bias_V, targets_M, totals_M, kept_M)
        ctx.settings = finish, temperature, rows, dtype, passes
        ctx.mark_non_differentiable(hits_M, *(() if entropy_gradient else (entropies_M,)))
        return logprobs_M, entropies_M, hits_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        states_MD, weight_VD, bias_V, targets_M, totals_M, entropies_M = ctx.saved_tensors
        finish, temperature, rows, dtype, passes = ctx.settings
        inputs = states_MD, weight_VD, bias_V
        d_states, d_weight, d_bias = (
            torch.zeros_like(tensor) if needed else None
            for tensor, needed in zip(inputs, ctx.needs_input_grad, strict=False)
        )
        with torch.autocast(weight_VD.device.type, enabled=False):
            weight, bias = weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)
            for here in _chunks(len(states_MD), rows):
                states_CD = states_MD[here].to(dtype)
                d_raw = passes.gradient(
                    product(states_CD, weight, bias),
                    targets_M[here, None],
                    totals_M[here, None],
                    gradients[0][here, None],
                    None if entropies_M is None else (entropies_M[here, None], gradients[1][here, None]),
                    finish,
                    temperature,
                )
                _accumulate(d_raw, states_CD, weight, here, d_states, d_weight, d_bias)
        return d_states, d_weight, d_bias, None, None, None, None, None, None


Weigh = Callable[[Tensor], Tensor]  # log-probabilities → weights


class LinearTotal(torch.autograd.Function):
    """Σ weight · log π(target) of a plain linear layer, in chunks; also the scores, without gradient.

    The weights are a function of the log-probabilities, taken as constants. So a chunk's gradient is known
    with its logits, and nothing is computed twice: the backward pass only scales what the forward left.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states_MD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_M: Tensor,
        finish: Finish,
        rows: int,
        weigh: Weigh,
        learning: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dtype = _computing_dtype(weight_VD)
        logprobs_M, entropies_M = (
            states_MD.new_empty(len(states_MD), dtype=torch.promote_types(dtype, torch.float32))
            for _ in range(2)
        )
        hits_M = torch.empty_like(logprobs_M, dtype=torch.bool)
        inputs = states_MD, weight_VD, bias_V
        d_states, d_weight, d_bias = (
            torch.zeros_like(tensor) if tensor is not None and learning and needed else None
            for tensor, needed in zip(inputs, ctx.needs_input_grad, strict=False)
        )
        with torch.autocast(weight_VD.device.type, enabled=False):
            weight, bias = weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)
            for here in _chunks(len(states_MD), rows):
                states_CD = states_MD[here].to(dtype)
                raw_CV = product(states_CD, weight, bias)
                for part, raw_BV in _blocks(here, raw_CV):
                    logits_BV, targets_B1 = finish(raw_BV), targets_M[part, None]
                    slope_BV = finish.slope(logits_BV) if learning else None
                    scores = _probabilities(logits_BV, targets_B1)
                    logprobs_M[part], entropies_M[part], probs_BV, hits_M[part] = scores
                    if learning:
                        weights_B1 = weigh(logprobs_M[part])[:, None] * finish.scale
                        d_raw_BV = probs_BV.mul_(-weights_B1).scatter_add_(-1, targets_B1, weights_B1)
                        raw_BV.copy_(d_raw_BV if slope_BV is None else d_raw_BV.mul_(slope_BV))
                if learning:
                    _accumulate(raw_CV, states_CD, weight, here, d_states, d_weight, d_bias)
        ctx.gradients = d_states, d_weight, d_bias
        ctx.mark_non_differentiable(logprobs_M, entropies_M, hits_M)
        return (weigh(logprobs_M) * logprobs_M).sum(), logprobs_M, entropies_M, hits_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (None if each is None else each.mul_(gradient) for each in ctx.gradients)
        del ctx.gradients  # they are scaled in place: once
        return (*gradients, None, None, None, None, None)


def _accumulate(
    d_raw_CV: Tensor,
    states_CD: Tensor,
    weight_VD: Tensor,
    here: slice,
    d_states: Tensor | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
) -> None:
    """Add a chunk's gradient by the layer's output to those by its inputs."""
    if d_states is not None:
        d_states[here] = product(d_raw_CV, weight_VD.t()).to(d_states.dtype)
    if d_weight is not None and d_weight.dtype == d_raw_CV.dtype:
        d_weight.addmm_(d_raw_CV.t(), states_CD)
    elif d_weight is not None:
        d_weight += d_raw_CV.t() @ states_CD
    if d_bias is not None:
        d_bias += d_raw_CV.sum(0)


def _probabilities(logits_CV: Tensor, targets_C1: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities of the targets, entropies, probabilities [C, V], hits. Overwrites the logits."""
    logits_CV.sub_(logits_CV.amax(-1, keepdim=True))
    chosen_C = logits_CV.gather(-1, targets_C1)[:, 0]
    probs_CV = softmax(logits_CV, -1)  # on a CPU faster than the exponentials alone
    log_totals_C = -probs_CV.amax(-1).log()  # the likeliest one's logit is 0
    logits_CV.clamp_(min=torch.finfo(logits_CV.dtype).min)  # 0 · −inf would be NaN
    entropies_C = log_totals_C - torch.linalg.vecdot(probs_CV, logits_CV)
    return chosen_C - log_totals_C, entropies_C, probs_CV, chosen_C == 0


def _scores(
    raw_CV: Tensor, targets_C1: Tensor, finish: Finish, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities of the targets, entropies, logsumexps, hits; [C] each.

    Overwrites `raw_CV`, where it can.
    """
    logits_CV = scaled_logits(finish(raw_CV), temperature)
    highest_C = logits_CV.amax(-1)
    logits_CV.sub_(highest_C[:, None])
    chosen_C = logits_CV.gather(-1, targets_C1)[:, 0]
    weights_CV = logits_CV.exp()
    totals_C = weights_CV.sum(-1)
    logits_CV.clamp_(min=torch.finfo(logits_CV.dtype).min)  # 0 · −inf would be NaN
    mean_C = weights_CV.mul_(logits_CV).sum(-1) / totals_C
    totals_C.log_()
    return chosen_C - totals_C, totals_C - mean_C, highest_C + totals_C, chosen_C == 0


def _logits_gradient(
    raw_CV: Tensor,
    targets_C1: Tensor,
    totals_C1: Tensor,
    gradient_C1: Tensor,
    entropies_C1: tuple[Tensor, Tensor] | None,
    finish: Finish,
    temperature: float,
) -> Tensor:
    """Of Σ gradient · log π(target), by the layer's output: gradient · (1[v = target] − π(v)) · slope.

    With entropies H and their gradients, of Σ gradient · H too: −gradient · π(v) · (log π(v) + H) · slope.
    In the precision of `raw_CV`, which it overwrites where it can.
    """
    logits_CV = finish(raw_CV)
    slope_CV = finish.slope(logits_CV)
    factor = finish.scale / temperature
    gradient_C1 = gradient_C1 * factor
    logprobs_CV = scaled_logits(logits_CV, temperature).sub_(totals_C1)
    if entropies_C1 is None:
        d_raw = logprobs_CV.exp_().mul_(-gradient_C1)
    else:
        entropy_C1, entropy_gradient_C1 = entropies_C1
        probs_CV = logprobs_CV.exp()
        finite_CV = logprobs_CV.clamp_(min=torch.finfo(logprobs_CV.dtype).min)  # 0 · −inf would be NaN
        d_raw = finite_CV.add_(entropy_C1).mul_(probs_CV).mul_(-factor * entropy_gradient_C1)
        d_raw.addcmul_(probs_CV, gradient_C1, value=-1)
    chosen_C1 = d_raw.gather(-1, targets_C1).add_(gradient_C1)
    if slope_CV is not None:
        d_raw, chosen_C1 = d_raw.mul_(slope_CV), chosen_C1.mul_(slope_CV.gather(-1, targets_C1))
    return d_raw.to(raw_CV.dtype).scatter_(-1, targets_C1, chosen_C1.to(raw_CV.dtype))


class ChunkPasses:
    """What is done to a chunk's logits, forward and backward; if compiled, in one or two passes over them."""

    def __init__(self) -> None:
        self.scores: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = _scores
        self.gradient: Callable[..., Tensor] = _logits_gradient

    def compile(self, **options: Any) -> None:
        """With options of `torch.compile`."""
        compiled: Any = [
            torch.compile(f, **{"dynamic": True, **options}) for f in (_scores, _logits_gradient)
        ]
        self.scores, self.gradient = compiled


def _chunks(count: int, rows: int) -> Iterator[slice]:
    return (slice(start, start + rows) for start in range(0, count, rows))


def _blocks(chunk: slice, raw_CV: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """A chunk's rows, a few at a time on a CPU: where they are among all, and what is to be gone over."""
    count, vocabulary = raw_CV.shape
    rows = count if raw_CV.device.type != "cpu" else max(1, BLOCK_BYTES // (4 * vocabulary))
    for start in range(0, count, max(1, rows)):
        block = raw_CV[start : start + rows]
        yield slice(chunk.start + start, chunk.start + start + len(block)), block


def _computing_dtype(weight: Tensor) -> torch.dtype:
    """That of a linear layer: autocast's, which leaves float64 alone, or else its weight's."""
    device = weight.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype
