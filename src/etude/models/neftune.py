"""Noise on the input embeddings while fine-tuning (NEFTune)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def noisy_embeddings(
    embeddings: nn.Module, alpha: float, lengths: Sequence[int], *, flat: bool
) -> Iterator[None]:
    """Inside, `embeddings` adds uniform noise in ± α / √(L · D) to the vectors of sequences of L tokens.

    Jain et al. 2023, "NEFTune: noisy embeddings improve instruction finetuning", algorithm 1. L is each
    sequence's own length, padding and neighbours not counted.

    Args:
        embeddings: of D dimensions.
        alpha: 5 to 15 in the paper.
        lengths: of the sequences.
        flat: they lie end to end, [1, T]; else in rows, [B, T].
    """

    def add_noise(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        lengths_B = torch.tensor(lengths, device=output.device)
        scale_B = alpha / (lengths_B * output.shape[-1]).to(output.dtype).sqrt()
        scale = scale_B.repeat_interleave(lengths_B)[None, :, None] if flat else scale_B[:, None, None]
        return output + torch.empty_like(output).uniform_(-1, 1) * scale

    handle = embeddings.register_forward_hook(add_noise)
    try:
        yield
    finally:
        handle.remove()
