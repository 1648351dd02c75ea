"""One dataset format made of another, where it says all that the other needs.

    preference            → unpaired-preference   two rows, chosen wanted and rejected not
    preference            → prompt-completion     the chosen answer is imitated
    unpaired-preference   → prompt-completion     answers that aren't wanted are left out
    chosen, rejected      → with their prompt     what both begin with

Not covered: what needs an opinion (pairs of unpaired answers, labels of steps).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset, Features, Json, List, Value

from etude.data.files import as_json
from etude.data.formats import COLUMNS, Format, detect_format, fitting_formats
from etude.errors import DataError

logger = logging.getLogger(__name__)


def convert(dataset: Dataset, accepted: Sequence[Format], *, num_proc: int | None = None) -> Dataset:
    """The dataset in one of the accepted formats: as it is, or made of another; what was made is logged.

    Args:
        dataset: of any format.
        accepted: what a trainer takes. What the dataset has wins over a conversion.
        num_proc: processes that convert.

    Raises:
        DataError: it is in no accepted format and none can be made of it, or a row is wrong (named by its
            number).
    """
    columns = dataset.column_names
    if _rates(dataset) and "unpaired-preference" not in accepted and "prompt-completion" in accepted:
        return _wanted(dataset)
    if fitting_formats(columns, accepted) or not fitting_formats(columns, ["preference"]):
        detect_format(columns, accepted)  # raises where the columns are wrong
        return dataset
    if "unpaired-preference" in accepted:
        logger.info("each preference becomes two rated answers: the chosen one wanted, the rejected one not")
        return _map(dataset, unpair, {"label": Value("bool")}, num_proc)
    if "prompt-completion" in accepted:
        logger.warning(
            "the dataset has preferences: the chosen answers are imitated, the rejected ones unused"
        )
        return _map(dataset, _choose, {}, num_proc)
    if "prompt" in accepted:  # an implicit one: with a column of that name it would have fitted
        return _map(dataset, _ask, {}, num_proc)
    detect_format(columns, accepted)
    raise AssertionError("what fits no accepted format is refused")


def _rates(dataset: Dataset) -> bool:
    """Has it a label per answer? A label that isn't true or false (1 or 0) is another column."""
    if not fitting_formats(dataset.column_names, ["unpaired-preference"]):
        return False
    kind = getattr(dataset.features["label"], "dtype", "")
    return kind == "bool" or ("int" in kind and set(dataset.unique("label")) <= {0, 1})


def _wanted(dataset: Dataset) -> Dataset:
    kept = dataset.select([index for index, wanted in enumerate(dataset["label"]) if wanted])
    if not len(kept):
        raise DataError(f"none of the {len(dataset)} answers is wanted: label is false in all of them")
    logger.warning("%d of %d answers are wanted (label) and are imitated", len(kept), len(dataset))
    return kept.remove_columns("label")


def _map(
    dataset: Dataset,
    change: Callable[[Mapping[str, Any]], list[dict[str, Any]]],
    added: Mapping[str, Any],
    num_proc: int | None,
) -> Dataset:
    """`change` makes rows of each row: other columns are kept, answers become `completion`."""
    features: dict[str, Any] = dict(dataset.features)
    answer = features.pop("chosen")
    features.pop("rejected")
    messages = not isinstance(answer, Value)
    if messages and answer != Json():  # which holds texts beside messages
        answer = List(Json())  # so that messages with different keys fit in one column
    if messages or "prompt" not in features:
        features["prompt"] = answer
    if change is not _ask:
        features["completion"] = answer
    features |= added
    return dataset.map(
        _batch,
        with_indices=True,
        fn_kwargs={"change": change, "features": Features(features)},
        batched=True,
        batch_size=100,
        remove_columns=dataset.column_names,
        features=Features(features),
        num_proc=num_proc,
        desc="Converting",
    )


def _batch(
    batch: Mapping[str, list[Any]],
    indices: Sequence[int],
    change: Callable[[Mapping[str, Any]], list[dict[str, Any]]],
    features: Features,
) -> dict[str, list[Any]]:
    changed: list[dict[str, Any]] = []
    for index, values in zip(indices, zip(*batch.values(), strict=True), strict=True):
        try:
            changed += [as_json(row, features) for row in change(dict(zip(batch, values, strict=True)))]
        except DataError as error:
            raise type(error)(f"row {index}: {error}") from error
    return {name: [row[name] for row in changed] for name in features}


def unpair(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A preference as two rows of `prompt`, `completion` and `label`; other columns go into both."""
    row = split_prompt(row)
    rest = {name: value for name, value in row.items() if name not in COLUMNS["preference"]}
    return [
        {**rest, "completion": row["chosen"], "label": True},
        {**rest, "completion": row["rejected"], "label": False},
    ]


def split_prompt(row: Mapping[str, Any]) -> dict[str, Any]:
    """A preference with its prompt in a column of its own.

    An implicit prompt is what `chosen` and `rejected` begin with: whole messages, or text up to the beginning
    of the word in which they part. The space before that word goes to the answers, as tokenizers have it, and
    each answer keeps at least something. Where answers are conversations and the prompt is a string, which
    repeats the user's message, the conversations count.

    Raises:
        DataError: the answers are not two strings or two lists of messages, or have no common beginning.
    """
    chosen, rejected = row["chosen"], row["rejected"]
    kinds = {
        name: type(row[name]).__name__
        for name in ("prompt", "chosen", "rejected")
        if row.get(name) is not None
    }
    conversations = isinstance(chosen, list) and isinstance(rejected, list)
    if not conversations and not (isinstance(chosen, str) and isinstance(rejected, str)):
        listed = ", ".join(f"{name} is a {kind}" for name, kind in kinds.items())
        raise DataError(f"{listed}; expected two strings or two lists of messages")
    prompt = row.get("prompt")
    if type(prompt) is type(chosen):
        return dict(row)
    if prompt is not None and not (conversations and isinstance(prompt, str)):
        raise DataError(
            f"prompt is a {kinds['prompt']} and the answers are {kinds['chosen']}s; expected strings in all "
            "of them, or lists of messages"
        )
    end = _common(chosen, rejected) if conversations else _common_words(chosen, rejected)
    if end == 0:
        raise DataError(
            "the row has no prompt, and chosen and rejected begin with nothing in common: "
            f"{str(chosen)[:60]!r} and {str(rejected)[:60]!r}. Give a column prompt"
        )
    return {**row, "prompt": chosen[:end], "chosen": chosen[end:], "rejected": rejected[end:]}


def _common(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """How many items both begin with, so that something is left of each."""
    most = min(len(chosen), len(rejected)) - 1
    return next((i for i in range(most) if _plain(chosen[i]) != _plain(rejected[i])), max(most, 0))


def _plain(item: Any) -> Any:
    """A message without the keys that tables fill up; a character as it is."""
    return {k: v for k, v in item.items() if v is not None} if isinstance(item, Mapping) else item


def _common_words(chosen: str, rejected: str) -> int:
    end = _common(chosen, rejected)
    if any(re.match(r"\w", text[end:]) for text in (chosen, rejected)):  # not within a word
        end -= len(re.search(r"\w*\Z", chosen[:end])[0])  # type: ignore[index]  # matches always
    return end - chosen[:end].endswith(" ")


def _choose(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    row = split_prompt(row)
    return [{**row, "completion": row["chosen"]}]


def _ask(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [split_prompt(row)]
