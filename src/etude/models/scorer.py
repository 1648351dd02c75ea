"""Log-probabilities of given tokens: what losses on data are made of, supervised ones and preferences.

The model is called as it comes, inside whatever wraps it, and everything happens within that call: gradient
synchronisation, parameter gathering and autocast stay in force. Sequences come end to end
(`data.collate.pack`); decoders that can't be packed, and encoder-decoders, are padded in here. Not covered:
episodes that a policy sampled, with temperatures and values (`forward`).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from etude.errors import ModelError
from etude.models.head import ChunkedHead, TokenScores, token_scores, weighted
from etude.models.linear_head import Weigh
from etude.models.neftune import noisy_embeddings
from etude.models.packing import supports_packing
from etude.models.plans import PackedPlan, packed_inputs, padded_inputs
from etude.models.wrappers import trunk_of, unwrapped

Batch = Mapping[str, Any]


class TokenScorer:
    """Scores the tokens that a batch asks for. Not a module: it belongs to the model.

    Args:
        model: a language model of transformers, decoder or encoder-decoder, perhaps with adapters.
        chunk_bytes: what logits may take at a time, in float32; see `models.head`.

    Raises:
        ModelError: the model's adapter puts virtual tokens before the text.
    """

    def __init__(self, model: nn.Module, chunk_bytes: int | None = None) -> None:
        for part in unwrapped(model):
            if isinstance(part, PeftModel) and part.active_peft_config.is_prompt_learning:
                raise ModelError(
                    f"{part.active_peft_config.peft_type} adapters put virtual tokens before the text, which "
                    "have no place among the rows; use LoRA or another adapter of weights"
                )
        self.trunk = trunk_of(model)
        self.is_encoder_decoder = bool(self.trunk.config.is_encoder_decoder)
        self.packs = not self.is_encoder_decoder and supports_packing(self.trunk)
        self.head = ChunkedHead.of(self.trunk, chunk_bytes)
        self._keeps_logits = "logits_to_keep" in inspect.signature(self.trunk.forward).parameters

    def __call__(self, model: nn.Module, batch: Batch, noise: float = 0.0) -> TokenScores:
        """Scores [M] of the batch's targets.

        Args:
            model: what this scorer was made for, in its wrappers.
            batch: as `data.collate.pack` makes it, on the model's device.
            noise: NEFTune's α.
        """
        return self.at_temperatures(model, batch, (), noise)[0]

    def at_temperatures(
        self, model: nn.Module, batch: Batch, others: Sequence[float], noise: float = 0.0
    ) -> list[TokenScores]:
        """The same, and after it the scores at other temperatures, without gradient, of the same forward."""
        targets = batch["targets"]
        if self.head is None:
            logits = self.logits(model, batch, noise)
            with torch.no_grad():
                more = [token_scores(logits.detach(), targets, temperature) for temperature in others]
            return [token_scores(logits, targets, temperature=1.0), *more]
        inputs, states = self._inputs(batch)
        with self._noisy(batch, noise), self.head.scoring(states, targets, others) as scores:
            model(**inputs)
        return scores

    def total(self, model: nn.Module, batch: Batch, weigh: Weigh, noise: float = 0.0) -> TokenScores:
        """Scores with a `total`, Σ weight · log-probability, and its gradient: cheaper than to sum them up.

        Args:
            weigh: from log-probabilities [C] to weights [C], which count as constants.
        """
        if self.head is None:
            return weighted(self(model, batch, noise), weigh)
        inputs, states = self._inputs(batch)
        with self._noisy(batch, noise), self.head.scoring(states, batch["targets"], weigh=weigh) as scores:
            model(**inputs)
        return scores[0]

    def logits(self, model: nn.Module, batch: Batch, noise: float = 0.0) -> Tensor:
        """Logits [M, V] of the distributions that the batch's targets are drawn from."""
        inputs, states = self._inputs(batch)
        with self._noisy(batch, noise):
            logits: Tensor = model(**inputs).logits
        return logits.flatten(0, -2) if states is None else logits.flatten(0, -2)[states]

    def padded_logits(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits [B, T, V] of all positions, and labels [B, T], as transformers' own models pair them.

        A decoder's logits at t belong to the label at t + 1, an encoder-decoder's to the label at t.
        """
        inputs, own = self._padded(batch)
        labels = torch.full_like(batch["input_ids"], -100)
        ahead = 0 if self.is_encoder_decoder else 1
        labels[batch["states"] + ahead] = batch["targets"]
        labels_BT = own.long().masked_fill(~own, -100).masked_scatter(own, labels)
        return model(**inputs).logits, labels_BT

    def _inputs(self, batch: Batch) -> tuple[dict[str, Any], Tensor | None]:
        """Keywords of the forward, and flat places of the states; None if it gives no others."""
        states: Tensor = batch["states"]
        if not self.packs:
            inputs, own = self._padded(batch)
            return inputs, own.flatten().nonzero()[:, 0][states]
        ids = batch["input_ids"]
        plan = PackedPlan(batch["lengths"], prefixes=batch["prefixes"], device=ids.device, dropout=True)
        inputs = packed_inputs(ids, plan)
        if self._keeps_logits and len(states):  # of none, some families would give all
            return {**inputs, "logits_to_keep": states}, None
        return inputs, states

    def _padded(self, batch: Batch) -> tuple[dict[str, Any], Tensor]:
        """Keywords of the forward for padded rows, and where their tokens are [B, T]."""
        inputs, own = padded_inputs(batch["input_ids"], batch["lengths"], batch["prefixes"])
        if not self.is_encoder_decoder:
            return inputs, own
        sources, _ = padded_inputs(batch["source_ids"], batch["source_lengths"])
        labels = pad_sequence(
            batch["input_ids"].split(list(batch["lengths"])), batch_first=True, padding_value=-100
        )
        shift: Any = self.trunk.prepare_decoder_input_ids_from_labels
        return {**sources, "decoder_input_ids": shift(labels=labels)}, own

    def _noisy(self, batch: Batch, noise: float) -> AbstractContextManager[None]:
        if not noise:
            return nullcontext()
        embeddings = self.trunk.get_input_embeddings()
        return noisy_embeddings(embeddings, noise, batch["lengths"], flat=self.packs)
