"""How the engine gets logits out of a model: packed, for almost every family, in fixed shapes, or row by row.

A backend owns the key–value cache of a number of slots. The engine tells it how many and how long they are,
which tokens follow in which slots, and gets the logits after the last of them. `choose_backend` asks the
model which one is right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import psutil
import torch
from transformers import PreTrainedModel

from etude.errors import ConfigError
from etude.models.cached_attention import token_kernels
from etude.models.encoder_decoder import decodes_packed, is_encoder_decoder
from etude.models.packing import supports_packing
from etude.sampling.capture import CudaCapture, capturable
from etude.sampling.encoder_decoder import EncoderDecoderBackend
from etude.sampling.feeds import Backend
from etude.sampling.packed import PackedBackend
from etude.sampling.solo import solo_backend
from etude.sampling.static import StaticBackend
from etude.sampling.tokens import TokenBackend


def choose_backend(
    model: PreTrainedModel,
    max_length: int,
    *,
    max_source_length: int = 0,
    upcoming: Callable[[int], Sequence[Sequence[int]]] = lambda n: (),
    deterministic: bool = False,
    cuda_graphs: bool = False,
) -> Backend:
    """The packed one, or the static one where asked for, if that is right; else one forward per row.

    Args:
        upcoming: the next n sources that sessions wait with, for an encoder to read ahead.

    Raises:
        ConfigError: `cuda_graphs` was asked for and can't be had.
        ModelError: nothing is right.
    """
    if is_encoder_decoder(model):
        if cuda_graphs:
            raise ConfigError("cuda_graphs=True needs a decoder; leave it out for an encoder–decoder")
        if not deterministic and decodes_packed(model):
            return EncoderDecoderBackend(model, max_source_length, upcoming)
        return solo_backend(model, max_length, max_source_length)
    packs = supports_packing(model, max_length)
    if cuda_graphs and not (packs and capturable(model)):
        raise ConfigError(
            "cuda_graphs=True needs a model that runs packed, is on one CUDA device and has rotary "
            "frequencies that don't depend on the positions; leave cuda_graphs out"
        )
    if not packs:
        return solo_backend(model, max_length)
    if not deterministic and not cuda_graphs:
        return PackedBackend(model)
    capture = partial(CudaCapture, model.device) if cuda_graphs else None
    if not deterministic and token_kernels(model.device, model.dtype) is not None:
        return TokenBackend(PackedBackend(model), capture)
    return StaticBackend(PackedBackend(model), max_length, deterministic=deterministic, capture=capture)


def free_memory(device: torch.device) -> int:
    """Bytes that are free where a model lives: on its accelerator, or in the machine's memory."""
    if device.type in ("cuda", "xpu"):
        free: int = torch.get_device_module(device).mem_get_info(device)[0]
        return free
    return int(psutil.virtual_memory().available)  # mps shares it
