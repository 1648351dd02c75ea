"""Encoder–decoders: what their decoders begin with, and whether these can decode in a flat step.

The decoder of an encoder–decoder knows one position for a whole batch, its encoder's output is another input,
and T5 adds a bias for each distance to its scores. In a flat step a plan says all of it (`CrossPlan`): the
positions go into the embedding by a hook, keys and values of what each encoder read lie in slots of their
own, and the attention takes the bias from a table. Not covered: encoders, which are called as they come.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from etude.errors import ModelError
from etude.models.attention import install
from etude.models.cross_attention import CrossPlan, StepCache
from etude.models.packing import FOREIGN_ERRORS, circumstances, probes, same_logits
from etude.models.plans import PLAN, PackedPlan
from etude.models.slot_cache import SlotCache

_ENCODED_TOKENS = 4096  # that an encoder reads at a time, padding included

_VERDICTS: WeakKeyDictionary[PreTrainedModel, dict[tuple[object, ...], bool]] = WeakKeyDictionary()


def is_encoder_decoder(model: PreTrainedModel) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False))


def decoder_start_ids(model: PreTrainedModel) -> tuple[int, ...]:
    """What the decoder begins with: its start token, and the one that `generate` forces after it (BART's).

    Raises:
        ModelError: neither the model's configuration nor its generation configuration says.
    """
    generation = getattr(model, "generation_config", None)

    def setting(name: str) -> Any:
        value = getattr(model.config, name, None)
        return getattr(generation, name, None) if value is None else value

    start = setting("decoder_start_token_id")
    start = setting("bos_token_id") if start is None else start
    if start is None:
        raise ModelError(
            f"nothing says what {type(model).__name__}'s decoder begins with; set "
            "model.config.decoder_start_token_id (T5's and Marian's is the padding token)"
        )
    forced = setting("forced_bos_token_id")
    return (int(start),) if forced is None else (int(start), int(forced))


@torch.no_grad()
def encode(model: PreTrainedModel, sources: Sequence[Sequence[int]]) -> list[Tensor]:
    """The encoder's last hidden states [S, D] of each source, those of similar lengths computed together."""
    states: list[Tensor] = [torch.empty(0)] * len(sources)
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    batch: list[int] = []
    for place, i in enumerate(order):
        batch.append(i)
        longer = [len(sources[j]) for j in order[place + 1 : place + 2]]  # the next one's, if there is one
        room = min(_ENCODED_TOKENS / (len(batch) + 1), 1.25 * len(sources[batch[0]]) + 8)
        if not longer or longer[0] > room:
            for j, state in zip(batch, _encode_padded(model, [sources[j] for j in batch]), strict=True):
                states[j] = state
            batch = []
    return states


def _encode_padded(model: PreTrainedModel, sources: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    rows = [torch.tensor(source, device=model.device) for source in sources]
    ids_BS = pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows], device=model.device)
    mask_BS = torch.arange(ids_BS.shape[1], device=model.device)[None] < lengths[:, None]
    encoder: Any = model.get_encoder()
    states_BSD = encoder(input_ids=ids_BS, attention_mask=mask_BS.long()).last_hidden_state
    return (state[: len(row)] for state, row in zip(states_BSD, rows, strict=True))


def decode(model: PreTrainedModel, ids_T: Tensor, plan: PackedPlan) -> Tensor:
    """Logits [T, V] of a flat step of the decoder, by a plan with a `cross`."""
    assert plan.cross is not None
    cache = StepCache(plan.cross)
    untouched = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids_T.device)  # see `plans.packed_inputs`
    inputs = {
        "encoder_outputs": BaseModelOutput(last_hidden_state=plan.cross.new_states(ids_T.device)),
        "attention_mask": untouched,
        "decoder_input_ids": ids_T.reshape(1, -1),
        "decoder_attention_mask": untouched,
        "past_key_values": cache,
        "use_cache": False,
        PLAN: plan,
    }
    with _positions(model, plan.positions_T):
        logits: Tensor = model(**inputs).logits[0]
    return logits


@contextmanager
def _positions(model: PreTrainedModel, positions_T: Tensor) -> Iterator[None]:
    """Give the decoder's position embedding these, where it has one and takes them."""
    embedding = getattr(model.get_decoder(), "embed_positions", None)
    if not isinstance(embedding, nn.Module):
        yield
        return

    def substitute(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "position_ids": positions_T}

    handle = embedding.register_forward_pre_hook(substitute, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def decodes_packed(model: PreTrainedModel) -> bool:
    """Whether a flat step of the decoder gives the numbers that separate forwards give.

    On True the packed attention is installed. On False the model computes what it did before.
    """
    verdicts = _VERDICTS.setdefault(model, {})
    if (key := circumstances(model)) not in verdicts:
        verdicts[key] = _passes(model)
        verdicts[circumstances(model)] = verdicts[key]  # with the packed attention installed
    return verdicts[key]


@torch.no_grad()
def _passes(model: PreTrainedModel) -> bool:
    if not model._can_set_attn_implementation():
        return False
    training = model.training
    model.eval()
    try:
        sources, targets = probes(model, (9, 14)), probes(model, (12, 8))
        alone = [plain_decoder_logits(model, *pair) for pair in zip(sources, targets, strict=True)]
        install(model)
        return _decodes(model, sources, targets, alone)
    except (ModelError, *FOREIGN_ERRORS):  # a feature not served here; a forward with no extra keywords
        return False
    finally:
        model.train(training)


def plain_decoder_logits(model: PreTrainedModel, source_ids: Sequence[int], ids: Sequence[int]) -> Tensor:
    """[T, V], of one forward of one pair, which everything else is measured by."""
    source, target = (torch.tensor([x], device=model.device) for x in (source_ids, ids))
    logits: Tensor = model(input_ids=source, decoder_input_ids=target, use_cache=False).logits[0]
    return logits


def _decodes(
    model: PreTrainedModel, sources: list[list[int]], targets: list[list[int]], alone: list[Tensor]
) -> bool:
    """Two pairs, fed in pieces and one by one, come out as they do at once."""
    cache, encoded = SlotCache(slots=3, length=16), SlotCache(slots=3, length=16)
    past = [0, 0]
    for step in ((2, 0), (1, 3), (1, 1), (4, 1), (1, 3), (3, 0)):
        fed = [i for i in (0, 1) if step[i]]
        new = [i for i in fed if past[i] == 0]
        cross = CrossPlan(
            encoded,
            slots=[2 - i for i in fed],
            lengths=[step[i] for i in fed],
            source_lengths=[len(sources[i]) for i in fed],
            new=encode(model, [sources[i] for i in new]),
            places=[(2 - i, k) for k, i in enumerate(new)],
            device=model.device,
        )
        plan = PackedPlan(
            [step[i] for i in fed],
            past=[past[i] for i in fed],
            cache=cache,
            slots=[2 - i for i in fed],
            device=model.device,
            cross=cross,
        )
        ids = list(chain.from_iterable(targets[i][past[i] : past[i] + step[i]] for i in fed))
        logits = decode(model, torch.tensor(ids, device=model.device), plan)
        expected = torch.cat([alone[i][past[i] : past[i] + step[i]] for i in fed])
        if not same_logits(logits, expected):
            return False
        past = [p + n for p, n in zip(past, step, strict=True)]
    return True
