"""Rows of a dataset → rows to train on, with what got lost on the way counted and said."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset

from etude.errors import DataError
from etude.trainers.data_config import DataConfig

logger = logging.getLogger(__name__)


def map_rows(
    dataset: Dataset,
    convert: Callable[..., dict[str, Any] | list[dict[str, Any]]],
    config: DataConfig,
    what: str = "have nothing to learn",
    **options: Any,
) -> Dataset:
    """A dataset of what `convert(row, **options)` makes of each row: another row, or several.

    Its entries "cut" (the row lost tokens to max_length) and "learned" (something is left to learn) are
    counted in warnings; rows without anything are left out.

    Raises:
        DataError: a row is wrong (named by its number), or none is left.
    """
    with config.main_process_first(desc="tokenising"):  # the others read what it cached
        converted = dataset.map(
            _numbered,
            with_indices=True,
            batched=True,
            batch_size=100,
            fn_kwargs={"convert": convert, **options},
            remove_columns=dataset.column_names,
            num_proc=config.dataset_num_proc,
            desc="Tokenizing",
        )
    total, cut = len(converted), sum(converted["cut"])
    if cut:
        logger.warning(
            "%d of %d rows are longer than max_length=%s and are cut", cut, total, config.max_length
        )
    useful = [index for index, learned in enumerate(converted["learned"]) if learned]
    if not useful:
        raise DataError(
            f"none of the {total} rows is left: all {what} (max_length={config.max_length} cuts {cut})"
        )
    if len(useful) < total:
        logger.warning("%d of %d rows %s and are left out", total - len(useful), total, what)
        converted = converted.select(useful)
    return converted.remove_columns(["cut", "learned"])


def _numbered(
    batch: Mapping[str, list[Any]], indices: Sequence[int], convert: Callable[..., Any], **options: Any
) -> dict[str, list[Any]]:
    rows: list[dict[str, Any]] = []
    for index, values in zip(indices, zip(*batch.values(), strict=True), strict=True):
        try:
            converted = convert(dict(zip(batch, values, strict=True)), **options)
        except DataError as error:
            raise type(error)(f"row {index}: {error}") from error
        rows += converted if isinstance(converted, list) else [converted]
    return {name: [row[name] for row in rows] for name in rows[0]}
