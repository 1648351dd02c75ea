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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from etude.math.logprobs import entropy, token_logprobs
from etude.models.linear_head import ChunkPasses, Finish, LinearHead, LinearTotal, Weigh
from etude.models.packing import FOREIGN_ERRORS, probes, same_logits

# Of float32 logits; a pass whose logits fit keeps them and computes nothing twice.
CHUNK_BYTES = 64 * 2**20
# On a GPU a chunk of so few rows would cost more than its product: the weight's gradient is read and written
# for each. There it is this part of the device's memory.
CHUNK_SHARE = 64


class TokenScores(NamedTuple):
    """What is known of M tokens.

    Attributes:
        logprobs: [M] float32 or better, with gradient.
        entropies: of the distributions that they were drawn from [M], with gradient where asked.
        hits: whether each token was the likeliest [M].
        total: where weights were given, Σ weight · log-probability, with gradient; `logprobs` have none then.
    """

    logprobs: Tensor
    entropies: Tensor
    hits: Tensor
    total: Tensor | None = None


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

        with self._hooks(take, detach):
            yield states

    @contextmanager
    def scoring(
        self,
        wanted: Tensor | None,
        targets_M: Tensor,
        temperatures: Sequence[float] = (),
        weigh: Weigh | None = None,
    ) -> Iterator[list[TokenScores]]:
        """Inside, the model's forward gives logits of no position and leaves the scores of `targets_M` here.

        They are computed within that forward, where all that wraps the model (sharded weights, autocast)
        is in force, so that it can be called from outside the wrapper.

        Args:
            wanted: flat positions of the states of the targets; None if no others enter the layer.
            temperatures: besides 1, to score at without gradient; these scores come after.
            weigh: from log-probabilities to weights, for a `total`.
        """
        scores: list[TokenScores] = []
        layer = self.layer
        assert layer is not None
        is_plain, call = _is_plain(layer), layer.forward  # before there are hooks of ours, and past them

        def score(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            whole, *others = args
            states_MD = whole.flatten(0, -2)
            if wanted is not None:
                states_MD = states_MD[wanted]
            if weigh is None:
                scores.append(self._score(layer, call, is_plain, states_MD, targets_M, (1.0, False)))
            else:
                scores.append(self._total(layer, call, is_plain, states_MD, targets_M, weigh))
            with torch.no_grad():
                for temperature in temperatures:
                    how = (temperature, False)
                    scores.append(self._score(layer, call, is_plain, states_MD.detach(), targets_M, how))
            return whole[..., :0, :], *others

        def connect(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            # DDP looks among what the outputs depend on for the parameters that will have a gradient.
            found = scores[0].logprobs if scores[0].total is None else scores[0].total
            return output.detach() + 0 * found.sum()

        with self._hooks(score, connect):
            yield scores

    @contextmanager
    def _hooks(
        self, before: Callable[..., tuple[Tensor, ...]], after: Callable[..., Tensor]
    ) -> Iterator[None]:
        layer = self.layer
        assert layer is not None
        handles = [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __call__(
        self, states_MD: Tensor, targets_M: Tensor, temperature: float, entropy_gradient: bool = False
    ) -> TokenScores:
        """Scores of `targets_M` at the states before them; entropies have a gradient where asked."""
        layer = self.layer
        assert layer is not None
        how = (temperature, entropy_gradient)
        return self._score(layer, layer, _is_plain(layer), states_MD, targets_M, how)

    def _rows(self, states_MD: Tensor) -> int:
        """Of a chunk."""
        vocabulary = self.model.config.get_text_config().vocab_size
        return chunk_rows(len(states_MD), vocabulary, self.chunk_bytes or default_chunk(states_MD.device))

    def _score(
        self,
        layer: nn.Module,
        call: Callable[[Tensor], Tensor],
        is_plain: bool,
        states_MD: Tensor,
        targets_M: Tensor,
        how: tuple[float, bool],
    ) -> TokenScores:
        """By `call`, which is the layer, or what is left of it within its own hooks.

        Args:
            how: the temperature, and whether entropies have a gradient.
        """
        rows = self._rows(states_MD)
        if is_plain and rows < len(states_MD):
            parameters = layer.weight, layer.bias
            settings = targets_M, self.finish, rows, *how, self.passes
            return TokenScores(*LinearHead.apply(states_MD, *parameters, *settings))

        def at_once(states_CD: Tensor, targets_C: Tensor) -> TokenScores:
            return token_scores(self.finish(call(states_CD)), targets_C, *how)

        if rows >= len(states_MD):
            return at_once(states_MD, targets_M)
        parts = [
            checkpoint(at_once, states_CD, targets_C, use_reentrant=False)
            for states_CD, targets_C in zip(states_MD.split(rows), targets_M.split(rows), strict=True)
        ]
        logprobs, entropies, hits, _ = zip(*parts, strict=True)
        return TokenScores(torch.cat(logprobs), torch.cat(entropies), torch.cat(hits))

    def _total(
        self,
        layer: nn.Module,
        call: Callable[[Tensor], Tensor],
        is_plain: bool,
        states_MD: Tensor,
        targets_M: Tensor,
        weigh: Weigh,
    ) -> TokenScores:
        if is_plain and len(states_MD):
            rows = self._rows(states_MD)
            inputs = states_MD, layer.weight, layer.bias, targets_M
            total, logprobs, entropies, hits = LinearTotal.apply(
                *inputs, self.finish, rows, weigh, torch.is_grad_enabled()
            )
            return TokenScores(logprobs, entropies, hits, total)
        scores = self._score(layer, call, is_plain, states_MD, targets_M, (1.0, False))
        return weighted(scores, weigh)

    @torch.no_grad()
    def _explains_logits(self) -> bool:
        """Whether the model's logits are the layer's output, finished, at the positions that enter it."""
        if self.layer is None:
            return False
        keep: dict[str, Any] = {}
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            keep["logits_to_keep"] = torch.tensor([3, 7], device=self.model.device)
        ids = torch.tensor(probes(self.model, (9,)), device=self.model.device)
        if self.model.config.is_encoder_decoder:
            keep["decoder_input_ids"] = ids
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
) -> TokenScores:
    """Of whole logits; entropies have a gradient where asked."""
    logprobs_M = token_logprobs(logits_MV, targets_M, temperature)
    if entropy_gradient:
        entropies_M = entropy(logits_MV, temperature)
    with torch.no_grad():  # last, where a checkpoint's second forward needn't reach
        logits_MV = logits_MV.detach()
        hits_M = logits_MV.gather(-1, targets_M[:, None])[:, 0] >= logits_MV.amax(-1)
        if not entropy_gradient:
            entropies_M = entropy(logits_MV, temperature)
    return TokenScores(logprobs_M, entropies_M, hits_M)


def weighted(scores: TokenScores, weigh: Weigh) -> TokenScores:
    """The same with a `total`."""
    logprobs_M = scores.logprobs.detach()
    total = (weigh(logprobs_M) * scores.logprobs).sum()
    return TokenScores(logprobs_M, scores.entropies, scores.hits, total)


def _is_plain(layer: nn.Module) -> bool:
    """Whether `layer` is its weight and bias and nothing else: no adapter, quantization, hook or sharding."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks
    return type(layer) is nn.Linear and not hooks and "forward" not in vars(layer)
