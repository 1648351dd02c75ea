"""Language models with a value head: one trunk gives the policy's logits and the critic's values.

The public behaviour is TRL 0.7.4's. Decoders and encoder-decoders differ in where their last hidden states
are found, and in nothing else; what they have in common is in `with_value_head`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from etude.errors import ModelError
from etude.models.encoder_decoder import is_encoder_decoder
from etude.models.loading import holds_encoder_decoder
from etude.models.with_value_head import ModelWithValueHead
from etude.models.wrappers import trunk_of


class AutoModelForCausalLMWithValueHead(ModelWithValueHead):
    """A decoder with a value head on what enters its output layer; see `ModelWithValueHead`."""

    is_encoder_decoder = False
    other_kind = (
        "is an encoder-decoder model; expected a decoder: AutoModelForSeq2SeqLMWithValueHead takes "
        "encoder-decoders"
    )

    def _width(self) -> int:
        lm_head = self._lm_head()
        # A quantized layer's weight is packed: only in_features tells its width.
        return getattr(lm_head, "in_features", None) or lm_head.weight.shape[-1]

    @contextmanager
    def _last_states(self) -> Iterator[list[Tensor]]:
        """`output_hidden_states=True` would keep every layer's output instead."""
        inputs: list[Tensor] = []

        def collect(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs.append(args[0] if args else next(iter(kwargs.values())))

        # First of all hooks: another may keep the layer from computing most of it.
        handle = self._lm_head().register_forward_pre_hook(collect, with_kwargs=True, prepend=True)
        try:
            yield inputs
        finally:
            handle.remove()


class AutoModelForSeq2SeqLMWithValueHead(ModelWithValueHead):
    """An encoder-decoder with a value head on its decoder's last hidden states; see `ModelWithValueHead`.

    Values are of the decoder's tokens: that at t is of the state in which the token at t + 1 is chosen.
    """

    is_encoder_decoder = True
    other_kind = (
        "is not an encoder-decoder model; expected one, such as T5 or BART: "
        "AutoModelForCausalLMWithValueHead takes decoders"
    )

    def _width(self) -> int:
        width: int = self._decoder().config.hidden_size
        return width

    @contextmanager
    def _last_states(self) -> Iterator[list[Tensor]]:
        """Not what enters the output layer: a T5 with tied embeddings makes that √D times smaller."""
        outputs: list[Tensor] = []

        def collect(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            outputs.append(output[0])

        handle = self._decoder().register_forward_hook(collect)
        try:
            yield outputs
        finally:
            handle.remove()

    def _decoder(self) -> PreTrainedModel:
        """Without an output layer, which it has where it is a model of its own (`EncoderDecoderModel`)."""
        trunk = trunk_of(self.pretrained_model)
        decoder = trunk.get_decoder()
        if not isinstance(decoder, PreTrainedModel):  # FSMT
            raise ModelError(
                f"the decoder of {type(trunk).__name__} gives no last hidden states that a value head "
                "could read; expected a family such as T5, BART, mBART or Marian"
            )
        inner = decoder.base_model
        assert isinstance(inner, PreTrainedModel)
        return inner


def load_with_value_head(
    source: str | os.PathLike[str] | PreTrainedModel | PeftModel, **options: Any
) -> ModelWithValueHead:
    """`from_pretrained` of the class that is for this model, by its configuration."""
    if isinstance(source, PreTrainedModel | PeftModel):
        seq2seq = is_encoder_decoder(trunk_of(source))
    else:
        seq2seq = holds_encoder_decoder(source, **options)
    cls = AutoModelForSeq2SeqLMWithValueHead if seq2seq else AutoModelForCausalLMWithValueHead
    return cls.from_pretrained(source, **options)
