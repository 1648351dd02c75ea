"""Generation keywords, as `transformers` users write them, to `SamplingParams`."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import (
    NoBadWordsLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    PreTrainedTokenizerBase,
)

from etude.data.encoding import encode_control
from etude.errors import ConfigError
from etude.types import SamplingParams

_TAKEN = {
    "max_new_tokens",
    "min_new_tokens",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "allowed_token_ids",
    "bad_words_ids",
    "prefix_allowed_tokens_fn",
    "forced_prefix",
    "eos_token_id",
    "stop_strings",
    "logits_processor",
}
_OF_START = {"decoder_start_token_id", "forced_bos_token_id"}  # see `decoder_start`
# Meaningless here, but harmless at these values: scripts written for `generate` pass them.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "min_length": (-1, 0, None),
    "num_beams": (1, None),
    "num_return_sequences": (1, None),
    "use_cache": (True, None),
}
_IGNORED = {"pad_token_id"}  # nothing is padded


def sampling_params(
    generation_kwargs: Mapping[str, Any] | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    do_sample: bool = True,
    stop: tuple[str, ...] = (),
) -> SamplingParams:
    """Translate generation keywords; the mapping is not changed.

    Beside those of `generate`: `allowed_token_ids`, and `forced_prefix`, as token ids or as text.
    `prefix_allowed_tokens_fn(batch_id, input_ids)` is called for one row at a time, its `batch_id` always 0.

    Args:
        do_sample: the default where the keywords don't say.
        stop: strings that end a turn, besides `stop_strings`.

    Raises:
        ConfigError: a keyword is unknown, or has a value that can't be honoured.
    """
    given = dict(generation_kwargs or {})
    for name in given:
        if name in _NEUTRAL:
            if given[name] not in _NEUTRAL[name]:
                raise ConfigError(f"generation keyword {name}={given[name]!r} isn't supported; leave it out")
        elif name not in _TAKEN | _IGNORED | _OF_START:
            near = difflib.get_close_matches(name, _TAKEN, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(sorted(_TAKEN))}"
            raise ConfigError(f"unknown generation keyword {name!r}; {hint}")
    sample = given.get("do_sample", do_sample)
    strings = given.get("stop_strings") or ()
    allowed = given.get("allowed_token_ids")
    eos_token_ids = _eos_ids(given.get("eos_token_id", tokenizer.eos_token_id))
    limit = {"max_new_tokens": int(given["max_new_tokens"])} if given.get("max_new_tokens") else {}
    return SamplingParams(
        **limit,
        min_new_tokens=int(given.get("min_new_tokens") or 0),
        temperature=float(given.get("temperature") or 1.0) if sample else 0.0,
        top_k=int(given.get("top_k") or 0),
        top_p=float(given["top_p"]) if given.get("top_p") is not None else 1.0,
        min_p=float(given.get("min_p") or 0.0),
        stop=(*stop, *((strings,) if isinstance(strings, str) else strings)),
        eos_token_ids=eos_token_ids,
        processors=_processors(given, eos_token_ids),
        repetition_penalty=1.0 if (penalty := given.get("repetition_penalty")) is None else float(penalty),
        allowed_token_ids=None if allowed is None else tuple(int(i) for i in allowed),
        forced_prefix=_forced_ids(given.get("forced_prefix"), tokenizer),
    )


def decoder_start(generation_kwargs: Mapping[str, Any] | None, default: Sequence[int]) -> tuple[int, ...]:
    """What an encoder–decoder's decoder begins with, where the keywords choose it: mBART's target language.

    Args:
        default: the model's own, its first token and what is forced after it; empty for a decoder.

    Raises:
        ConfigError: the keywords choose it for a decoder, which begins with its prompt.
    """
    given = generation_kwargs or {}
    chosen = {name: int(given[name]) for name in _OF_START if given.get(name) is not None}
    if not default:
        if chosen:
            raise ConfigError(
                f"{' and '.join(sorted(chosen))}: the model is a decoder and begins with its prompt: leave "
                "that out, or end the prompt with such a token"
            )
        return ()
    first, *forced = default
    if "forced_bos_token_id" in chosen:
        forced = [chosen["forced_bos_token_id"]]
    return (chosen.get("decoder_start_token_id", first), *forced)


def _processors(given: Mapping[str, Any], eos_token_ids: tuple[int, ...]) -> tuple[Callable[..., Any], ...]:
    """Keywords that are processors in `transformers` too, in its order, and the caller's own."""
    processors: list[Callable[..., Any]] = []
    if given.get("bad_words_ids"):
        processors.append(NoBadWordsLogitsProcessor(given["bad_words_ids"], list(eos_token_ids) or None))
    if given.get("prefix_allowed_tokens_fn") is not None:
        processors.append(PrefixConstrainedLogitsProcessor(given["prefix_allowed_tokens_fn"], 1))
    return (*processors, *(given.get("logits_processor") or ()))


def _forced_ids(prefix: str | Sequence[int] | None, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    ids = encode_control(tokenizer, prefix) if isinstance(prefix, str) else prefix or ()
    return tuple(int(i) for i in ids)


def _eos_ids(value: int | list[int] | tuple[int, ...] | None) -> tuple[int, ...]:
    """-1 is how scripts say "no end of sequence"."""
    if value is None:
        return ()
    ids = value if isinstance(value, list | tuple) else [value]
    return tuple(int(i) for i in ids if int(i) >= 0)
