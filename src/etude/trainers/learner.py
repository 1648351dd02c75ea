"""The optimisation step that every online algorithm shares: observe a batch, then go through it.

`observe` computes what stays fixed while the batch is used: log-probabilities and values under the weights
that sampled it, and the reference policy's. `update` runs epochs of mini-batches over it with whatever
loss an algorithm gives. Denominators are global, over accumulation steps and processes, so that 1 × 8
equals 8 × 1, and so that a mini-batch may be cut up to save memory. Between the passes of an optimizer step
nothing waits for the device: the next one is prepared and launched while one runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from etude.data.batch import PackedBatch, Trajectory
from etude.data.families import into_passes
from etude.math.kl import KLKind, kl_estimate, kl_full
from etude.math.placing import place
from etude.models.forward import PolicyForward, PolicyOutput
from etude.models.reference import reference_by_disabled_adapters
from etude.models.update_mode import update_mode
from etude.trainers.experience import Experience, LossFunction, Minibatch, UpdateLog


class Learner:
    """Policy, reference and optimizer, and the passes over them.

    Args:
        accelerator: devices, precision, gradient synchronisation.
        policy: prepared by the accelerator.
        reference: a frozen policy; None for the policy's own base model, adapters switched off.
        optimizer: prepared by the accelerator.
        mini_batch_size: trajectories per mini-batch, one forward and backward pass.
        accumulation: mini-batches per optimizer step.
        epochs: times a batch is gone through.
        max_grad_norm: clip gradients to this norm; None: don't.
        temperature: that the trajectories were sampled at.
        kl_kind: how the KL per token is estimated.
        uses_reference: False where nothing is held close to a reference: it isn't computed, and the KL is 0.
        max_tokens_per_pass: cut up mini-batches of more tokens, a longer trajectory by itself; None: don't.
            Processes may then differ in their number of passes: not for parameters sharded over them.
        entropy_gradient: let gradients flow through entropies, for losses with a bonus for them.
        share_prefixes: compute what the trajectories of a pass begin with once for all of them, and put those
            of an optimizer step that begin alike into the same passes. For models that can be packed, and
            for encoder–decoders, whose beginning is what the encoder reads.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        policy: nn.Module,
        reference: nn.Module | None,
        optimizer: torch.optim.Optimizer,
        *,
        mini_batch_size: int,
        accumulation: int,
        epochs: int,
        max_grad_norm: float | None,
        temperature: float,
        kl_kind: KLKind | str,
        uses_reference: bool = True,
        max_tokens_per_pass: int | None = None,
        entropy_gradient: bool = False,
        share_prefixes: bool = True,
    ) -> None:
        self.accelerator = accelerator
        self.policy = policy
        self.reference = reference
        self.optimizer = optimizer
        self.mini_batch_size = mini_batch_size
        self.accumulation = accumulation
        self.epochs = epochs
        self.max_grad_norm = max_grad_norm
        self.temperature = temperature
        self.kl_kind = kl_kind
        self.uses_reference = uses_reference
        self.max_tokens_per_pass = max_tokens_per_pass
        self.entropy_gradient = entropy_gradient
        unwrapped: PolicyForward = accelerator.unwrap_model(policy)
        self.share_prefixes = share_prefixes and (unwrapped.packs or unwrapped.is_encoder_decoder)

    @torch.no_grad()
    def observe(
        self,
        trajectories: Sequence[Trajectory],
        order: torch.Generator | None = None,
        *,
        postpone: bool = False,
    ) -> Experience:
        """Score trajectories under the present weights and the reference.

        Args:
            order: what `update` will shuffle by. The passes are then those of its first epoch: rounding
                depends on who shares a pass, and in bfloat16 that can move a ratio of 1 by several percent.
            postpone: leave the policy's part to the update, which computes the same. Only right where weights
                change once all rows have been passed, and nothing before that needs to know.
        """
        self.policy.eval()
        rows = None if order is None else self._shuffled(trajectories, order)
        steps = self._steps(rows or list(range(len(trajectories))))
        telling = [[i for i in step if len(trajectories[i].sampled)] for step in steps]
        passes = [rows for step in telling for rows in self._passes(trajectories, step)] or [[0]]
        parts = [self._observe([trajectories[i] for i in indices], postpone) for indices in passes]
        place = torch.tensor([i for indices in passes for i in indices], device=parts[0].mask.device)
        longest = max(part.mask.shape[1] for part in parts)

        def in_place(pieces: list[Tensor]) -> Tensor:
            """Each row at its trajectory's index; 0 where no token was sampled, which wasn't computed."""
            merged = torch.cat(pieces)
            return merged.new_zeros(len(trajectories), *merged.shape[1:]).index_copy(0, place, merged)

        per_token = ("mask", "logprobs", "values", "ref_logprobs", "kl", "entropies")
        merged: dict[str, Any] = {
            name: in_place([_widened(getattr(part, name), longest) for part in parts]) for name in per_token
        }
        last_values = in_place([part.last_values for part in parts])
        return Experience(list(trajectories), **merged, last_values=last_values, order=rows, pending=postpone)

    def _observe(self, trajectories: Sequence[Trajectory], postpone: bool) -> Experience:
        batch = PackedBatch.of(trajectories, self.accelerator.device, self.share_prefixes)
        full = self.uses_reference and self.kl_kind == "full"
        if postpone:
            dtype = torch.promote_types(torch.float32, next(self.policy.parameters()).dtype)
            nothing = torch.zeros(len(batch.targets), dtype=dtype, device=batch.mask.device)
            output = PolicyOutput(nothing, nothing, None, None, None)
        else:
            output = self._forward(self.policy, batch, keep_logits=full)
        expected = output
        if self.uses_reference:
            with self._as_reference() as reference:
                expected = self._forward(reference, batch, keep_logits=full, with_values=False)
        kl = torch.zeros_like(output.logprobs)
        if full and not postpone:
            assert output.logits is not None
            assert expected.logits is not None
            kl = kl_full(output.logits, expected.logits, self.temperature)
        elif self.uses_reference and not postpone:
            kl = kl_estimate(output.logprobs, expected.logprobs, self.kl_kind)  # type: ignore[arg-type]
        last_values = torch.zeros(len(trajectories), device=batch.mask.device)
        if output.last_values is not None:
            last_values[batch.bootstrap] = output.last_values.float()
        values = torch.zeros_like(output.logprobs) if output.values is None else output.values
        return Experience(
            list(trajectories),
            batch.mask,
            batch.unpack(output.logprobs),
            batch.unpack(values),
            batch.unpack(expected.logprobs),
            batch.unpack(kl),
            last_values,
            batch.unpack(output.entropies),
        )

    def update(
        self,
        experience: Experience,
        loss: LossFunction,
        order: torch.Generator,
        enough: Callable[[UpdateLog], bool] = lambda log: False,
    ) -> UpdateLog:
        """Go through the batch `epochs` times.

        Args:
            loss: of a mini-batch.
            order: shuffles the trajectories, anew for each epoch.
            enough: asked after each epoch, with that epoch's log; True leaves the batch.
        """
        log = UpdateLog()
        if self.global_count(experience.mask.sum()) == 0:
            return log
        first = experience.order
        for _ in range(self.epochs):
            epoch = UpdateLog()
            shuffled, first = first or self._shuffled(experience.trajectories, order), None
            with update_mode(self.policy):
                for rows in self._steps(shuffled):
                    self._optimizer_step(experience, rows, loss, epoch)
            log.numbers += epoch.numbers
            log.weights += epoch.weights
            log.gradient_norms += epoch.gradient_norms
            if enough(epoch):
                break
        return log

    def _optimizer_step(
        self, experience: Experience, indices: list[int], loss: LossFunction, log: UpdateLog
    ) -> None:
        mask = experience.mask[indices]
        denominator, sequences = self.global_count(mask.sum()), self.global_count(mask.any(1).sum())
        if denominator == 0:
            return  # nothing was sampled in any of these, on any process
        # Rows without a token to learn from have no gradient. A process without others passes one of them.
        telling = [i for i, tells in zip(indices, mask.any(1).tolist(), strict=True) if tells]
        passes = self._passes(experience.trajectories, telling or indices[:1])
        for i, rows in enumerate(passes):
            minibatch = self._minibatch(experience, rows, denominator, sequences, i == len(passes) - 1)
            with self._synchronised(i == len(passes) - 1):
                value, numbers = loss(minibatch)
                # Gradients are averaged over processes, and the denominator already counts all of them.
                self.accelerator.backward(value * self.accelerator.num_processes)
            if telling:
                log.numbers.append(numbers)
                log.weights.append(minibatch.observed.mask.sum())
        if self.max_grad_norm is not None:
            norm = self.accelerator.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
            if norm is not None:
                log.gradient_norms.append(norm.detach())
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _shuffled(self, trajectories: Sequence[Trajectory], order: torch.Generator) -> list[int]:
        return torch.randperm(len(trajectories), generator=order).tolist()

    def _steps(self, rows: list[int]) -> list[list[int]]:
        """Rows of each optimizer step of an epoch."""
        size = self.mini_batch_size * self.accumulation
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def _passes(self, trajectories: Sequence[Trajectory], indices: Sequence[int]) -> list[list[int]]:
        """The trajectories at `indices` as the forward passes they take; those that begin alike together."""
        sequences = [trajectories[i].token_ids for i in indices]
        given = [source for i in indices if (source := trajectories[i].source_ids) is not None]
        sources = given if len(given) == len(indices) else None
        passes = into_passes(
            sequences, self.mini_batch_size, self.max_tokens_per_pass, self.share_prefixes, sources
        )
        return [[indices[place] for place in places] for places in passes]

    def _minibatch(
        self,
        experience: Experience,
        indices: list[int],
        denominator: Tensor,
        sequences: Tensor,
        is_last: bool,
    ) -> Minibatch:
        trajectories = [experience.trajectories[i] for i in indices]
        batch = PackedBatch.of(trajectories, self.accelerator.device, self.share_prefixes)
        with self._synchronised(is_last):
            output = self._forward(self.policy, batch, entropy_gradient=self.entropy_gradient)
        values = torch.zeros_like(output.logprobs) if output.values is None else output.values
        logprobs, entropies, values = (batch.unpack(x) for x in (output.logprobs, output.entropies, values))
        if experience.pending:
            rows = place(indices, logprobs.device)
            known = {"logprobs": logprobs, "entropies": entropies, "values": values}
            if self.uses_reference:
                ref_logprobs = experience.ref_logprobs[rows, : logprobs.shape[1]]
                known["kl"] = kl_estimate(logprobs, ref_logprobs, self.kl_kind)  # type: ignore[arg-type]
            for name, now in known.items():
                getattr(experience, name)[rows, : now.shape[1]] = now.detach().to(experience.logprobs.dtype)
        return Minibatch(
            indices,
            experience.rows(indices),
            logprobs,
            entropies,
            values,
            denominator,
            sequences,
        )

    def _forward(
        self,
        policy: nn.Module,
        batch: PackedBatch,
        keep_logits: bool = False,
        entropy_gradient: bool = False,
        with_values: bool = True,
    ) -> PolicyOutput:
        with self.accelerator.autocast():
            return policy(
                batch.input_ids,
                batch.lengths,
                batch.states,
                batch.targets,
                batch.last_states,
                self.temperature,
                keep_logits,
                entropy_gradient,
                batch.prefixes,
                with_values,
                batch.sources,
            )

    def unwrap(self) -> None:
        """Give up what `accelerator` put around the policy: see `leave_group`."""
        self.policy = self.accelerator.unwrap_model(self.policy)

    @contextmanager
    def _as_reference(self) -> Iterator[nn.Module]:
        if self.reference is not None:
            yield self.reference
        else:
            unwrapped: PolicyForward = self.accelerator.unwrap_model(self.policy)
            with reference_by_disabled_adapters(unwrapped.model):
                yield self.policy

    def _synchronised(self, synchronise: bool) -> AbstractContextManager[object]:
        return nullcontext() if synchronise else self.accelerator.no_sync(self.policy)

    def global_count(self, count: Tensor) -> Tensor:
        """Sum over processes, as float32."""
        return self.accelerator.reduce(count.to(self.accelerator.device, torch.float32), "sum")


def _widened(rows_BN: Tensor, width: int) -> Tensor:
    return nn.functional.pad(rows_BN, (0, width - rows_BN.shape[1]))
