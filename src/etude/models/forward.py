"""The training forward: one module whose `forward` gives log-probabilities, entropies and values.

It is what `accelerator.prepare` wraps. Nobody calls trunk or head around it: gradient synchronisation,
parameter gathering and autocast would be lost; a value model beside the policy is a part of it, too.
Sequences come packed end to end; models that can't be packed are padded in here, so that callers never
notice. An encoder–decoder's encoder reads each source once (`sources`); its decoder's sequences are padded.
Logits are computed at the asked positions only, and chunk by chunk (`head`), unless they are asked for
themselves.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from etude.models.attention import steady_kernels
from etude.models.compiled import compile_layers
from etude.models.encoder_decoder import is_encoder_decoder
from etude.models.head import ChunkedHead, token_scores
from etude.models.packing import supports_packing
from etude.models.plans import PackedPlan, packed_inputs, padded_inputs
from etude.models.sources import Sources, check_sources, encoded
from etude.models.value_model import ValueModel
from etude.models.wrappers import decoder_of, trunk_of


class PolicyOutput(NamedTuple):
    """For M states and K last states.

    Attributes:
        logprobs: of the tokens sampled there, [M] float32, with gradient.
        entropies: of the next-token distributions, [M], with gradient if asked for.
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
    """`model` (with or without a value head) as the trainers call it.

    Args:
        model: the policy.
        chunk_bytes: what logits may take at a time, in float32. Those of more states are computed in chunks,
            and again in the backward pass; a model that `models.head` can't serve computes all at once. By
            default 64 MiB, on a GPU a part of its memory.
        value_model: what gives the values; by default the policy's value head, if it has one.
    """

    def __init__(
        self, model: nn.Module, chunk_bytes: int | None = None, value_model: ValueModel | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.value_model = value_model
        self.values_pack = value_model is not None and supports_packing(decoder_of(value_model.model))
        trunk = trunk_of(model)
        self.is_encoder_decoder = is_encoder_decoder(trunk)
        self.packs = not self.is_encoder_decoder and supports_packing(trunk)
        self.head = ChunkedHead.of(trunk, chunk_bytes)
        self._keeps_logits = "logits_to_keep" in inspect.signature(trunk.forward).parameters
        self._has_values = hasattr(model, "v_head")
        self._settings = steady_kernels(trunk) if self.is_encoder_decoder else {}

    def compile_parts(self) -> None:
        """Fuse what can be fused: within decoder layers, and from the output layer to log-probabilities."""
        if self.packs:
            compile_layers(self.model)
        if self.values_pack and self.value_model is not None:
            compile_layers(self.value_model.model)
        if self.head is not None:
            self.head.passes.compile()

    def forward(
        self,
        input_ids: Tensor,
        lengths: Sequence[int],
        states: Tensor,
        targets: Tensor,
        last_states: Tensor,
        temperature: float = 1.0,
        keep_logits: bool = False,
        entropy_gradient: bool = False,
        prefixes: Sequence[int | None] = (),
        with_values: bool = True,
        sources: Sources | None = None,
    ) -> PolicyOutput:
        """See `data.batch.PackedBatch` for the arguments; without `prefixes`, no sequence has one.

        Without `with_values`, no value model is asked.

        Raises:
            DataError: there are sources for a decoder, or none for an encoder–decoder.
        """
        check_sources(trunk_of(self.model), sources)
        head = None if keep_logits else self.head
        wanted = torch.cat([states, last_states])
        if sources is not None:
            outputs, values = self._decoded(head, input_ids, lengths, sources, wanted)
        else:
            run = self._packed if self.packs else self._padded
            outputs, values = run(head, input_ids, lengths, prefixes, wanted)
        if self.value_model is not None and with_values:
            values = self._values_apart(self.value_model, input_ids, lengths, prefixes, wanted)
        outputs, count = outputs[: len(states)], len(states)
        score = token_scores if head is None else head
        logprobs, entropies, *_ = score(outputs, targets, temperature, entropy_gradient)
        return PolicyOutput(
            logprobs=logprobs,
            entropies=entropies,
            # Copies: what FSDP watches for the backward pass must be no view.
            values=None if values is None else values[:count].clone(),
            last_values=None if values is None else values[count:].clone(),
            logits=outputs if keep_logits else None,
        )

    def _packed(
        self,
        head: ChunkedHead | None,
        input_ids: Tensor,
        lengths: Sequence[int],
        prefixes: Sequence[int | None],
        wanted: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        plan = PackedPlan(lengths, prefixes=prefixes, device=input_ids.device)
        inputs = packed_inputs(input_ids, plan)
        if self._keeps_logits:
            outputs, values = self._call(head, **inputs, logits_to_keep=wanted)
            return outputs[0], None if values is None else values[0]
        outputs, values = self._call(head, **inputs)
        return outputs[0, wanted], None if values is None else values[0, wanted]

    def _padded(
        self,
        head: ChunkedHead | None,
        input_ids: Tensor,
        lengths: Sequence[int],
        prefixes: Sequence[int | None],
        wanted: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        inputs, own = padded_inputs(input_ids, lengths, prefixes)
        outputs, values = self._call(head, **inputs)
        return outputs[own][wanted], None if values is None else values[own][wanted]

    def _decoded(
        self,
        head: ChunkedHead | None,
        input_ids: Tensor,
        lengths: Sequence[int],
        sources: Sources,
        wanted: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """Of an encoder–decoder. Its decoder needs no mask: padding comes after all that is asked for."""
        inputs, own = padded_inputs(input_ids, lengths)
        read = encoded(trunk_of(self.model), sources, **self._settings)
        written = {"decoder_input_ids": inputs["input_ids"], "use_cache": False}
        outputs, values = self._call(head, **read, **written, **self._settings)
        return outputs[own][wanted], None if values is None else values[own][wanted]

    def _values_apart(
        self,
        value_model: ValueModel,
        input_ids: Tensor,
        lengths: Sequence[int],
        prefixes: Sequence[int | None],
        wanted: Tensor,
    ) -> Tensor:
        if self.values_pack:
            plan = PackedPlan(lengths, prefixes=prefixes, device=input_ids.device)
            return value_model(**packed_inputs(input_ids, plan))[0, wanted]
        inputs, own = padded_inputs(input_ids, lengths, prefixes)
        return value_model(**inputs)[own][wanted]

    def _call(self, head: ChunkedHead | None, **inputs: object) -> tuple[Tensor, Tensor | None]:
        """Logits or, with `head`, the states that are left for it to turn into them; and values."""
        if head is None:
            output = self.model(**inputs)
            return (output[0], output[2]) if self._has_values else (output.logits, None)
        with head.postponed() as states:
            output = self.model(**inputs)
        return states[0], output[2] if self._has_values else None
