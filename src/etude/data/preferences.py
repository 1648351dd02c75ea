"""Dataset rows → preferences and ratings.

Not covered: answers in steps (`steps`), encoder-decoder models (`source_target`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from etude.data.conversions import split_prompt
from etude.data.formats import to_episode, to_episodes
from etude.errors import DataError, TemplateError
from etude.types import Episode, Preference, Rating


def to_preference(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    append_eos: bool = True,
    scored: bool = False,
) -> Preference:
    """Tokenise a row of `[prompt,] chosen, rejected [, margin] [, tools]`; both answers are targets.

    Args:
        row: prompts and answers are strings or lists of messages; see `split_prompt` for implicit prompts.
        tokenizer: of the model to train.
        append_eos: end answers that are strings with the EOS. Messages end as their template ends them.
        scored: the answers are to be read, not learned. Then one text does for a conversation whose earlier
            turns the template rewrites: the last that `to_episodes` makes, which is all of it.

    Raises:
        DataError: a value has the wrong type, or the template can't render it.
    """
    row = split_prompt(row)
    chosen, rejected = (
        _answer(row, row[name], tokenizer, append_eos=append_eos, scored=scored)
        for name in ("chosen", "rejected")
    )
    if not scored and _prompt_ids(chosen) != _prompt_ids(rejected):
        raise TemplateError(
            "the chat template renders the prompt differently before the chosen and the rejected answer: "
            f"{_prompt_text(chosen)[-60:]!r} and {_prompt_text(rejected)[-60:]!r}"
        )
    return Preference(chosen, rejected, _margin(row.get("margin")))


def to_rating(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, *, append_eos: bool = True
) -> Rating:
    """Tokenise a row of `prompt, completion, label [, tools]`; the completion is a target.

    Raises:
        DataError: a value has the wrong type, or the template can't render it.
    """
    label = row["label"]
    if label not in (True, False):  # 1 and 0 are among them
        raise DataError(f"label is {label!r}; expected true (wanted) or false")
    return Rating(_answer(row, row["completion"], tokenizer, append_eos=append_eos), bool(label))


def _answer(
    row: Mapping[str, Any],
    completion: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    append_eos: bool,
    scored: bool = False,
) -> Episode:
    beside = {name: row[name] for name in row if name in ("tools", "chat_template_kwargs")}
    plain = {"prompt": row["prompt"], "completion": completion, **beside}
    if scored:
        episode = to_episodes(plain, tokenizer, append_eos=append_eos)[-1]
    else:
        episode = to_episode(plain, tokenizer, append_eos=append_eos)
    episode.task = dict(row)
    return episode


def _prompt_ids(episode: Episode) -> list[int]:
    target = episode.target
    return episode.token_ids[: target.index(True) if True in target else None]


def _prompt_text(episode: Episode) -> str:
    first = next((i for i, s in enumerate(episode.segments) if s.target), None)
    return "".join(s.text for s in episode.segments[:first])


def _margin(value: Any) -> float | None:
    if value is None:
        return None
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"margin is {value!r}; expected a finite number: by how much chosen is better")
    return float(value)
