"""Which models can be packed: what their layers say of themselves, and a leak test.

The leak test runs the model and trusts nothing; but it is short, and a window of 4096 tokens, a chunk or
a choice of 2048 keys doesn't show in it. So the layers' kinds and windows are compared, too: with those of
the cache that `generate` would use. A model that is refused takes a slower way elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from etude.errors import ModelError
from etude.models.attention import install
from etude.models.plans import PackedPlan, packed_inputs
from etude.models.slot_cache import SlotCache

# What a modelling file raises when it is called in a way that it wasn't written for.
FOREIGN_ERRORS = (TypeError, ValueError, AttributeError, LookupError, RuntimeError, AssertionError)


# Every sampler asks: a model is tested once, until something that the answer depends on changes.
_VERDICTS: WeakKeyDictionary[PreTrainedModel, dict[tuple[object, ...], bool]] = WeakKeyDictionary()


def supports_packing(model: PreTrainedModel, max_length: int | None = None) -> bool:
    """Whether a flat step gives this model the numbers that separate forwards give.

    On True the packed attention is installed. On False the model computes what it did before.

    Args:
        max_length: of the sequences; the model's own limit by default.
    """
    verdicts = _VERDICTS.setdefault(model, {})
    if (key := circumstances(model, max_length)) not in verdicts:
        verdicts[key] = _passes(model, max_length)
        verdicts[circumstances(model, max_length)] = verdicts[key]  # with the packed attention installed
    return verdicts[key]


def circumstances(model: PreTrainedModel, max_length: int | None = None) -> tuple[object, ...]:
    """What the answer depends on."""
    implementation = model.config._attn_implementation
    switched = crosses_switch(model, max_length)
    return model.dtype, model.device, implementation, switched, model.config.to_json_string()


@torch.no_grad()
def _passes(model: PreTrainedModel, max_length: int | None) -> bool:
    if not getattr(model, "_supports_attention_backend", False) or not model._can_set_attn_implementation():
        return False
    if crosses_switch(model, max_length) or not _caches_keys_only(model):
        return False
    training = model.training
    model.eval()
    try:
        a, b, c = probes(model, (9, 14, 3))
        alone = [plain_logits(model, ids) for ids in (a, b, c)]
        install(model)
        return _packs(model, [a, b, c], alone) and _continues(model, [a, b], alone)
    except (ModelError, *FOREIGN_ERRORS):  # a feature not served here; a forward with no extra keywords
        return False
    finally:
        model.train(training)


def probes(model: PreTrainedModel, lengths: Sequence[int]) -> list[list[int]]:
    """Sequences of those lengths that differ from their first token on."""
    vocabulary = model.config.get_text_config().vocab_size
    return [[(7 * i + 5 * k + 1) % vocabulary for i in range(n)] for k, n in enumerate(lengths)]


def plain_logits(model: PreTrainedModel, token_ids: Sequence[int]) -> Tensor:
    """[T, V], of one forward of one sequence, which everything else is measured by.

    A model without a head gives its last hidden states [T, D] instead.
    """
    return model(input_ids=torch.tensor([token_ids], device=model.device), use_cache=False)[0][0]


def same_logits(actual: Tensor, expected: Tensor) -> bool:
    """Whether [T, V] logits differ by rounding only.

    The distance is measured by the logits' usual spread: far above rounding, far below a leak.
    In half precision a router's tie may fall the other way, so that a quarter of the positions is let off.
    """
    rough = expected.element_size() < 4 or torch.get_float32_matmul_precision() != "highest"
    actual, expected = actual.float(), expected.float()
    spread = (expected - expected.mean(-1, keepdim=True)).norm(dim=-1).mean()
    distances = (actual - expected).norm(dim=-1) / spread.clamp(min=torch.finfo(torch.float32).tiny)
    return bool(distances.quantile(0.75) <= 0.1 if rough else distances.max() <= 1e-4)


def rotary_switch(model: PreTrainedModel) -> int | None:
    """The length beyond which LongRoPE rotates all tokens otherwise, the early ones too; None without one.

    Beyond it neither cached keys nor a neighbour in a batch leave a sequence as it is alone.
    """
    parameters = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    each = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    switches = [
        rope["original_max_position_embeddings"] for rope in each if rope.get("rope_type") == "longrope"
    ]
    return min(switches, default=None)


def crosses_switch(model: PreTrainedModel, max_length: int | None = None) -> bool:
    """Whether sequences of up to `max_length` tokens (the model's own limit by default) reach beyond it."""
    switch = rotary_switch(model)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or float("inf")
    return switch is not None and switch < (max_length or limit)


def _caches_keys_only(model: PreTrainedModel) -> bool:
    """Whether each layer keeps keys and values and nothing else, of all positions or of a window."""
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
    return kinds <= {DynamicLayer, DynamicSlidingWindowLayer, DummyLayer}


def _same_windows(model: PreTrainedModel, asked: dict[int, int | None]) -> bool:
    """Whether the layers asked for the windows that `generate` keeps; layers that borrow keys keep none."""
    layers = DynamicCache(config=model.config).layers
    kept = {i: getattr(layer, "sliding_window", None) for i, layer in enumerate(layers)}
    borrowing = {i for i, layer in enumerate(layers) if isinstance(layer, DummyLayer)}
    return all(window == kept.get(i) for i, window in asked.items() if i not in borrowing)


def _packs(model: PreTrainedModel, sequences: list[list[int]], alone: list[Tensor]) -> bool:
    """Neighbours of similar and of different lengths leave each sequence as it is alone."""
    for order in ((0, 1), (1, 0), (2, 1), (2, 1, 0, 2)):
        plan = PackedPlan([len(sequences[i]) for i in order], device=model.device)
        flat = list(chain.from_iterable(sequences[i] for i in order))
        logits = model(**packed_inputs(flat, plan))[0][0]
        if not same_logits(logits, torch.cat([alone[i] for i in order])):
            return False
        if not _same_windows(model, plan.windows):
            return False
    return True


def _continues(model: PreTrainedModel, sequences: list[list[int]], alone: list[Tensor]) -> bool:
    """Two sequences fed from a cache, in pieces and one by one, come out as they do at once."""
    cache = SlotCache(slots=3, length=16)
    past = [0, 0]
    for step in ((3, 5), (1, 1), (4, 1), (1, 6), (0, 1)):
        fed = [i for i in (0, 1) if step[i]]
        pieces = [sequences[i][past[i] : past[i] + step[i]] for i in fed]
        plan = PackedPlan(
            [step[i] for i in fed],
            past=[past[i] for i in fed],
            cache=cache,
            slots=[2 - i for i in fed],
            device=model.device,
        )
        logits = model(**packed_inputs(list(chain.from_iterable(pieces)), plan))[0][0]
        expected = torch.cat([alone[i][past[i] : past[i] + step[i]] for i in fed])
        if not same_logits(logits, expected):
            return False
        past = [p + n for p, n in zip(past, step, strict=True)]
    return True
