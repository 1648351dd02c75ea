"""What an encoder–decoder's encoder reads in the training forward: each source once, whoever goes on from it.

Covered: encoders of text, padded on the right under a mask. Not covered: the decoder's side (`forward`), and
sampling, which keeps what the encoder gave for a session.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from etude.errors import DataError
from etude.models.encoder_decoder import is_encoder_decoder
from etude.models.plans import padded_inputs

# Token ids of all sources end to end [S], their lengths, and for each row of the decoder's the number of its
# source [B]; see `data.sources.Sources`.
Sources = tuple[Tensor, Sequence[int], Tensor]


def encoded(model: PreTrainedModel, sources: Sources, **settings: Any) -> dict[str, Any]:
    """Keywords of the model's forward in place of `input_ids`, for rows that have these sources.

    Args:
        settings: for the encoder's forward.
    """
    ids, lengths, rows_B = sources
    inputs, _ = padded_inputs(ids, lengths)
    mask = inputs["attention_mask"]
    encoder: Any = model.get_encoder()
    outputs = encoder(**inputs, return_dict=True, **settings)
    if len(lengths) < len(rows_B):  # else each row has its own, in the rows' order
        outputs["last_hidden_state"], mask = outputs.last_hidden_state[rows_B], mask[rows_B]
    return {"encoder_outputs": outputs, "attention_mask": mask}


def check_sources(model: PreTrainedModel, sources: Sources | None) -> None:
    """Raise `DataError` where an encoder has nothing to read, or there is a source and no encoder."""
    name = type(model).__name__
    if is_encoder_decoder(model) and sources is None:
        raise DataError(
            f"{name} is an encoder-decoder model, and these trajectories have no source_ids; expected what "
            "its encoder read there, and in token_ids what its decoder read and wrote"
        )
    if sources is not None and not is_encoder_decoder(model):
        raise DataError(
            f"these trajectories have source_ids, and {name} is a decoder, without an encoder to read them; "
            "expected the prompt at the beginning of token_ids"
        )
