"""A model's output layer at the sampled positions only, a chunk of them at a time.

With a vocabulary of 150,000 the logits [M, V] of an update are larger than all else it holds. Nothing needs
them together: each chunk's logits give its log-probabilities and entropies and are dropped; the backward pass
computes them again. Covered: any layer that turns states into logits, in every family whose forward only
scales or squashes these afterwards; `ChunkedHead.of` tries that out. Not covered: other families, and what
needs the logits themselves (the exact KL); `forward` computes whole logits for both.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel

from etude.math.logprobs import entropy, scaled_logits, token_logprobs
from etude.models.packing import FOREIGN_ERRORS, probes, same_logits

# Of float32 logits; a pass whose logits fit keeps them and computes nothing twice.
CHUNK_BYTES = 64 * 2**20
# On a GPU a chunk of so few rows would cost more than its product: the weight's gradient is read and written
# for each. There it is this part of the device's memory.
CHUNK_SHARE = 64

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


class ChunkedHead:
    """The output layer of `model`, at chosen states and in chunks. Not a module: it belongs to the model.

    Args:
        model: the transformers model, inside its wrappers.
        finish: what its forward does with the layer's output.
        chunk_bytes: what a chunk's logits may take in float32; by default 64 MiB, more on a GPU.
    """

    def __init__(self, model: PreTrainedModel, finish: Finish, chunk_bytes: int | None = None) -> None:
        self.model = model
        self.finish = finish
        self.chunk_bytes = chunk_bytes
        self.passes = ChunkPasses()

    @classmethod
    def of(cls, model: PreTrainedModel, chunk_bytes: int | None = None) -> ChunkedHead | None:
        """None for a model whose logits can't be told from what enters its output layer."""
        for finish in (Finish.announced(model.config), Finish()):
            head = cls(model, finish, chunk_bytes)
            if head._explains_logits():
                return head
        return None

    @property
    def layer(self) -> nn.Module | None:
        # Looked up each time: resizing the vocabulary, adapters and FSDP put another module there.
        return self.model.get_output_embeddings()

    @contextmanager
    def postponed(self) -> Iterator[list[Tensor]]:
        """Inside, the model's forward gives logits of no position; what should enter the layer is kept."""
        states: list[Tensor] = []

        def take(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            whole, *others = args
            states.append(whole)
            return whole[..., :0, :], *others

        def detach(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output.detach()  # else its backward would fill a gradient [V, D] with zeros

        layer = self.layer
        assert layer is not None
        handles = [layer.register_forward_pre_hook(take), layer.register_forward_hook(detach)]
        try:
            yield states
        finally:
            for handle in handles:
                handle.remove()

    def __call__(
        self, states_MD: Tensor, targets_M: Tensor, temperature: float, entropy_gradient: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities [M] of `targets_M`, with gradient, and entropies [M], with one where asked."""
        layer = self.layer
        assert layer is not None
        vocabulary = self.model.config.get_text_config().vocab_size
        rows = chunk_rows(len(states_MD), vocabulary, self.chunk_bytes or default_chunk(states_MD.device))
        if rows >= len(states_MD):
            return self._at_once(layer, states_MD, targets_M, temperature, entropy_gradient)
        if _is_plain(layer):
            parameters = layer.weight, layer.bias
            scores: tuple[Tensor, Tensor] = _LinearHead.apply(
                states_MD,
                *parameters,
                targets_M,
                self.finish,
                temperature,
                entropy_gradient,
                rows,
                self.passes,
            )
            return scores
        score = partial(self._at_once, temperature=temperature, entropy_gradient=entropy_gradient)
        parts = [
            checkpoint(score, layer, states_CD, targets_C, use_reentrant=False)
            for states_CD, targets_C in zip(states_MD.split(rows), targets_M.split(rows), strict=True)
        ]
        logprobs, entropies = zip(*parts, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)

    def _at_once(
        self,
        layer: nn.Module,
        states_CD: Tensor,
        targets_C: Tensor,
        temperature: float,
        entropy_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        return token_scores(self.finish(layer(states_CD)), targets_C, temperature, entropy_gradient)

    @torch.no_grad()
    def _explains_logits(self) -> bool:
        """Whether the model's logits are the layer's output, finished, at the positions that enter it."""
        if self.layer is None:
            return False
        keep: dict[str, Any] = {}
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            keep["logits_to_keep"] = torch.tensor([3, 7], device=self.model.device)
        ids = torch.tensor(probes(self.model, (9,)), device=self.model.device)
        training = self.model.training
        self.model.eval()
        try:
            with self._known_output() as outputs:
                logits = self.model(input_ids=ids, use_cache=False, **keep).logits
            with self.postponed() as states:
                self.model(input_ids=ids, use_cache=False, **keep)
        except FOREIGN_ERRORS:
            return False
        finally:
            self.model.train(training)
        if len(outputs) != 1 or outputs[0].shape != logits.shape or len(states) != 1:
            return False
        if states[0].shape[:-1] != logits.shape[:-1]:
            return False
        return same_logits(self.finish(outputs[0][0]), logits[0])

    @contextmanager
    def _known_output(self) -> Iterator[list[Tensor]]:
        """Inside, the layer gives numbers up to ± 30: a random model's own are too small to show a cap."""
        outputs: list[Tensor] = []

        def replace(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            spread = torch.linspace(-30, 30, output.numel(), device=output.device).to(output.dtype)
            outputs.append(spread.view(output.shape))
            return spread.view(output.shape).clone()  # which the model may change in place

        assert self.layer is not None
        handle = self.layer.register_forward_hook(replace)
        try:
            yield outputs
        finally:
            handle.remove()


def default_chunk(device: torch.device) -> int:
    """Bytes of a chunk's logits in float32, by the device."""
    if device.type != "cuda":
        return CHUNK_BYTES
    return max(CHUNK_BYTES, torch.cuda.get_device_properties(device).total_memory // CHUNK_SHARE)


def chunk_rows(count: int, vocabulary: int, chunk_bytes: int) -> int:
    """States per chunk: as few chunks as fit `chunk_bytes` of float32 logits each, of nearly equal size."""
    most = max(1, chunk_bytes // (4 * vocabulary))
    return math.ceil(count / max(1, math.ceil(count / most)))


def token_scores(
    logits_MV: Tensor, targets_M: Tensor, temperature: float, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [M], with gradient, and entropies [M], with one where asked."""
    logprobs_M = token_logprobs(logits_MV, targets_M, temperature)
    if entropy_gradient:
        return logprobs_M, entropy(logits_MV, temperature)
    with torch.no_grad():  # last, where a checkpoint's second forward needn't reach
        return logprobs_M, entropy(logits_MV.detach(), temperature)


def _is_plain(layer: nn.Module) -> bool:
    """Whether `layer` is its weight and bias and nothing else: no adapter, quantization, hook or sharding."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks
    return type(layer) is nn.Linear and not hooks and "forward" not in vars(layer)


class _LinearHead(torch.autograd.Function):
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
        temperature: float,
        entropy_gradient: bool,
        rows: int,
        passes: ChunkPasses | None = None,
    ) -> tuple[Tensor, Tensor]:
        passes = passes or ChunkPasses()
        dtype = _computing_dtype(weight_VD)
        precise = torch.promote_types(dtype, torch.float32)
        totals_M, logprobs_M, entropies_M = (
            states_MD.new_empty(len(states_MD), dtype=precise) for _ in range(3)
        )
        with torch.autocast(weight_VD.device.type, enabled=False):
            weight, bias = weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)
            for here in _chunks(len(states_MD), rows):
                raw_CV = linear(states_MD[here].to(dtype), weight, bias)
                scores = passes.scores(raw_CV, targets_M[here, None], finish, temperature)
                logprobs_M[here], entropies_M[here], totals_M[here] = scores
        kept_M = entropies_M if entropy_gradient else None
        ctx.save_for_backward(states_MD, weight_VD, bias_V, targets_M, totals_M, kept_M)
        ctx.settings = finish, temperature, rows, dtype, passes
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropies_M)
        return logprobs_M, entropies_M

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
                    linear(states_CD, weight, bias),
                    targets_M[here, None],
                    totals_M[here, None],
                    gradients[0][here, None],
                    None if entropies_M is None else (entropies_M[here, None], gradients[1][here, None]),
                    finish,
                    temperature,
                )
                if d_states is not None:
                    d_states[here] = (d_raw @ weight).to(d_states.dtype)
                if d_weight is not None and d_weight.dtype == dtype:
                    d_weight.addmm_(d_raw.t(), states_CD)
                elif d_weight is not None:
                    d_weight += d_raw.t() @ states_CD
                if d_bias is not None:
                    d_bias += d_raw.sum(0)
        return d_states, d_weight, d_bias, None, None, None, None, None, None


def _scores(
    raw_CV: Tensor, targets_C1: Tensor, finish: Finish, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the targets, entropies, logsumexps; [C] each. Overwrites `raw_CV`, where it can."""
    logits_CV = scaled_logits(finish(raw_CV), temperature)
    highest_C = logits_CV.amax(-1)
    logits_CV.sub_(highest_C[:, None])
    chosen_C = logits_CV.gather(-1, targets_C1)[:, 0]
    weights_CV = logits_CV.exp()
    totals_C = weights_CV.sum(-1)
    logits_CV.clamp_(min=torch.finfo(logits_CV.dtype).min)  # 0 · −inf would be NaN
    mean_C = weights_CV.mul_(logits_CV).sum(-1) / totals_C
    totals_C.log_()
    return chosen_C - totals_C, totals_C - mean_C, highest_C + totals_C


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
    slope_CV = None if finish.softcap is None else 1 - (logits_CV / finish.softcap) ** 2
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
    d_raw, chosen_C1 = d_raw.to(raw_CV.dtype), chosen_C1.to(raw_CV.dtype)
    return d_raw.scatter_(-1, targets_C1, chosen_C1)


class ChunkPasses:
    """What is done to a chunk's logits, forward and backward; each in one or two passes over them if compiled."""

    def __init__(self) -> None:
        self.scores, self.gradient = _scores, _logits_gradient

    def compile(self, **options: Any) -> None:
        """With options of `torch.compile`."""
        options = {"dynamic": True, **options}
        self.scores, self.gradient = (torch.compile(f, **options) for f in (_scores, _logits_gradient))


def _chunks(count: int, rows: int) -> Iterator[slice]:
    return (slice(start, start + rows) for start in range(0, count, rows))


def _computing_dtype(weight: Tensor) -> torch.dtype:
    """That of a linear layer: autocast's, which leaves float64 alone, or else its weight's."""
    device = weight.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype
