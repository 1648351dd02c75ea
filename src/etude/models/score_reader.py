"""Scores at chosen tokens: what reward models are trained on, and what they give.

The model is called as it comes, inside whatever wraps it, and its head is applied within that call: gradient
synchronisation, parameter gathering and autocast stay in force. A head that is a linear layer is applied in
float32 on a trunk in half precision, whose eight bits couldn't tell close scores apart.

Sequences come end to end (`data.scored.pack_scored`). Decoders are packed without padding; those that can't
be are padded in here, and so are encoders. A decoder's score is that of the token that was asked for:
whatever the padding token is, it is never searched for. Not covered: models that read text padded on the
right otherwise than alone (XLNet), which are refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from etude.errors import DataError, ModelError
from etude.models.encoder_decoder import is_encoder_decoder
from etude.models.packing import probes, supports_packing
from etude.models.plans import PackedPlan, packed_inputs, padded_inputs
from etude.models.score_head import Kind, kind_of, score_layer
from etude.models.wrappers import decoder_of, trunk_of, unwrapped

Batch = Mapping[str, Any]


class ScoreReader:
    """Reads scores off a model. Not a module: it belongs to the model.

    Attributes:
        per_token: the model has a score for each token; else one for each sequence (an encoder's), which is
            read at its last.
        packs: it computes sequences that lie end to end, and what several begin with only once.

    Args:
        model: a sequence or token classifier of transformers, perhaps with adapters.

    Raises:
        ModelError: the model doesn't score, or scores a text beside a longer one otherwise than alone.
    """

    def __init__(self, model: nn.Module) -> None:
        for part in unwrapped(model):
            if isinstance(part, PeftModel) and part.active_peft_config.is_prompt_learning:
                raise ModelError(
                    f"{part.active_peft_config.peft_type} adapters put virtual tokens before the text, which "
                    "have no place among the tokens; use LoRA or another adapter of weights"
                )
        self.model = trunk_of(model)
        kind = kind_of(self.model)
        if kind is None:
            raise ModelError(
                f"{type(self.model).__name__} continues text; expected a model that scores it, of "
                "transformers' sequence or token classifiers"
            )
        self.kind: Kind = kind
        self.per_token = kind == "token" or self._scores_each_token()
        self.packs = self.per_token and supports_packing(decoder_of(self.model))
        self._caches = "use_cache" in inspect.signature(self.model.forward).parameters
        if not self.packs:
            self._check_padding()

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Scores [M, L] of L labels, in float32 (or float64), with gradient.

        Args:
            model: what this reader was made for, in its wrappers.
            batch: as `data.scored.pack_scored` makes it, on the model's device.
        """
        ids, lengths, prefixes = batch["input_ids"], batch["lengths"], batch["prefixes"]
        places: Tensor = batch["places"]
        if self.packs:
            plan = PackedPlan(lengths, prefixes=prefixes, device=ids.device, dropout=True)
            return self._read(model, packed_inputs(ids, plan), places)
        inputs, own = padded_inputs(ids, lengths, prefixes)
        if not self._caches:
            del inputs["use_cache"]
        if self.per_token:
            return self._read(model, inputs, own.flatten().nonzero()[:, 0][places])
        assert not any(before is not None for before in prefixes)
        if is_encoder_decoder(self.model):
            self._check_ends(ids, lengths)
        return _precise(model(**inputs).logits)

    def _check_ends(self, ids: Tensor, lengths: Sequence[int]) -> None:
        """Raise unless transformers finds the last end token of each text: it asks for as many in all."""
        end = self.model.config.eos_token_id
        counts = torch.stack([row.eq(end).sum() for row in ids.split(list(lengths))])
        if counts.min() != counts.max() or not counts.min():
            raise DataError(
                f"{type(self.model).__name__} scores a text at its end-of-sequence token, and texts of one "
                f"batch have {int(counts.min())} to {int(counts.max())} of them; expected one, at the end of "
                "each: leave append_eos on, and write no such token into texts"
            )

    def _read(self, model: nn.Module, inputs: dict[str, Any], places: Tensor) -> Tensor:
        with self._scoring(places) as scores, _padding_allowed(self.model):
            model(**inputs)
        if len(scores) != 1:
            raise ModelError(
                f"{type(self.model).__name__} called its score layer {len(scores)} times in a forward; "
                "expected once"
            )
        return scores[0]

    @contextmanager
    def _scoring(self, places: Tensor) -> Iterator[list[Tensor]]:
        """Inside, the model's forward leaves the scores at flat `places` of its tokens here."""
        scores: list[Tensor] = []

        def read(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            states_MD = args[0].flatten(0, -2)[places]
            active = _active(layer)
            if type(active) is not nn.Linear:
                scores.append(_precise(output.flatten(0, -2)[places]))
                return
            dtype = torch.promote_types(active.weight.dtype, torch.float32)
            with torch.autocast(states_MD.device.type, enabled=False):
                bias = None if active.bias is None else active.bias.to(dtype)
                scores.append(linear(states_MD.to(dtype), active.weight.to(dtype), bias))

        # Looked up each time: adapters and FSDP put another module there.
        handle = score_layer(self.model)[1].register_forward_hook(read)
        try:
            yield scores
        finally:
            handle.remove()

    @torch.no_grad()
    def _scores_each_token(self) -> bool:
        """Whether the last layer computes scores for every token, from which the model then takes one."""
        shapes: list[torch.Size] = []

        def note(_: nn.Module, __: Any, output: Any) -> None:
            shapes.append(output.shape if isinstance(output, Tensor) else torch.Size())

        handle = score_layer(self.model)[1].register_forward_hook(note)
        try:
            with _evaluated(self.model):
                self.model(input_ids=self._probe(9)[None])
        finally:
            handle.remove()
        return len(shapes) == 1 and shapes[0][:2] == (1, 9)

    @torch.no_grad()
    def _check_padding(self) -> None:
        """Raise unless a text's score is the same beside a longer one."""
        both = [self._probe(9), self._probe(5)]
        with _evaluated(self.model):
            alone = [self(self.model, _batch([ids])) for ids in both]
            together = self(self.model, _batch(both))
        spread = torch.cat(alone).abs().max().clamp(min=1e-6)
        rough = self.model.dtype in (torch.float16, torch.bfloat16)
        if not bool(((together - torch.cat(alone)).abs().max() / spread) <= (0.1 if rough else 1e-3)):
            raise ModelError(
                f"{type(self.model).__name__} scores a text otherwise where it is padded on the right than "
                "alone; expected a decoder, or an encoder that reads its score off the first token"
            )

    def _probe(self, length: int) -> Tensor:
        """Token ids that end as some encoder-decoders want texts to end."""
        config = self.model.config.get_text_config()
        special = {config.pad_token_id, config.eos_token_id, getattr(config, "bos_token_id", None)}
        ids = [i for i in probes(self.model, (4 * length,))[0] if i not in special][: length - 1]
        end = config.eos_token_id if isinstance(config.eos_token_id, int) else ids[0]
        return torch.tensor([*ids, end], device=self.model.device)


def _batch(rows: list[Tensor]) -> Batch:
    lengths = [len(row) for row in rows]
    places = torch.tensor(lengths, device=rows[0].device).cumsum(0) - 1
    return {
        "input_ids": torch.cat(rows), "lengths": lengths, "prefixes": [None] * len(rows), "places": places
    }  # fmt: skip


def _active(layer: nn.Module) -> nn.Module:
    """The copy of a layer that an adapter trains, where one does."""
    if isinstance(layer, ModulesToSaveWrapper):
        copies: Any = layer.modules_to_save
        return layer.original_module if layer.disable_adapters else copies[layer.active_adapter]
    return layer


def _precise(scores: Tensor) -> Tensor:
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _padding_allowed(model: PreTrainedModel) -> Iterator[None]:
    """Decoders without a padding token refuse several texts, whose ends they would search for by it."""
    config = model.config.get_text_config()
    before = config.pad_token_id
    config.pad_token_id = 0 if before is None else before
    try:
        yield
    finally:
        config.pad_token_id = before
