"""The training forward: one module whose `forward` gives log-probabilities, entropies and values.

It is what `accelerator.prepare` wraps. Nobody calls trunk or head around it: gradient synchronisation,
parameter gathering and autocast would be lost. Sequences come packed end to end; models that can't be
packed are padded in here, so that callers never notice.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from etude.math.logprobs import entropy, token_logprobs
from etude.models.loading import trunk_of
from etude.models.packing import supports_packing
from etude.models.plans import PackedPlan, packed_inputs


class PolicyOutput(NamedTuple):
    """For M states and K last states.

    Attributes:
        logprobs: of the tokens sampled there, [M] float32, with gradient.
        entropies: of the next-token distributions, [M], without gradient.
        values: of the states [M], or None for a model without value head.
        last_values: of the last states [K], or None.
        logits: [M, V] if asked for.
    """

    logprobs: Tensor
    entropies: Tensor
    values: Tensor | None
    last_values: Tensor | None
    logits: Tensor | None


class PolicyForward(nn.Module):
    """`model` (with or without a value head) as the trainers call it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        trunk = trunk_of(model)
        self.packs = supports_packing(trunk)
        self._keeps_logits = "logits_to_keep" in inspect.signature(trunk.forward).parameters
        self._has_values = hasattr(model, "v_head")

    def forward(
        self,
        input_ids: Tensor,
        lengths: Sequence[int],
        states: Tensor,
        targets: Tensor,
        last_states: Tensor,
        temperature: float = 1.0,
        keep_logits: bool = False,
    ) -> PolicyOutput:
        """See `data.batch.PackedBatch` for the arguments."""
        wanted = torch.cat([states, last_states])
        run = self._packed if self.packs else self._padded
        logits, values = run(input_ids, lengths, wanted)
        logits, count = logits[: len(states)], len(states)
        with torch.no_grad():
            entropies = entropy(logits.detach(), temperature)
        return PolicyOutput(
            logprobs=token_logprobs(logits, targets, temperature),
            entropies=entropies,
            values=None if values is None else values[:count],
            last_values=None if values is None else values[count:],
            logits=logits if keep_logits else None,
        )

    def _packed(
        self, input_ids: Tensor, lengths: Sequence[int], wanted: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        plan = PackedPlan(lengths, device=input_ids.device)
        inputs = packed_inputs(input_ids, plan)
        if self._keeps_logits:
            logits, values = self._call(**inputs, logits_to_keep=wanted)
            return logits[0], None if values is None else values[0]
        logits, values = self._call(**inputs)
        return logits[0, wanted], None if values is None else values[0, wanted]

    def _padded(
        self, input_ids: Tensor, lengths: Sequence[int], wanted: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        rows = input_ids.split(list(lengths))
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        sizes = torch.tensor(lengths, device=input_ids.device)
        columns = torch.arange(padded.shape[1], device=input_ids.device)
        mask = columns[None] < sizes[:, None]
        logits, values = self._call(input_ids=padded, attention_mask=mask.long(), use_cache=False)
        return logits[mask][wanted], None if values is None else values[mask][wanted]

    def _call(self, **inputs: object) -> tuple[Tensor, Tensor | None]:
        if self._has_values:
            logits, _, values = self.model(**inputs)
            return logits, values
        return self.model(**inputs).logits, None
