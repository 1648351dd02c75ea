"""Evaluations in which each row counts once, in several processes, too.

accelerate fills up a dataset's last batch with rows of its beginning, so that it can be divided. Batches are
left as rows until it is known which of them count here (`own_batch`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import Trainer


class EachRowOnce(Trainer):
    """A trainer that is handed evaluation batches as `{"rows": …}`, for `own_batch`."""

    @abstractmethod
    def collate(self, rows: Sequence[Any]) -> dict[str, Any]:
        """A batch of rows."""

    def own_batch(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
        """A batch of those rows of an evaluation's that count here, and whether any does.

        Where none does it is of one row all the same: other processes may wait for a forward.
        """
        rows = inputs["rows"].rows
        own = self._own(len(rows))
        batch: Any = self._prepare_inputs(self.collate(rows[: own or 1]))
        return batch, own > 0

    def _own(self, count: int) -> int:
        """How many of a batch's rows count here: the last one is filled up, so that it can be divided."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder < 1:
            return count
        return min(max(state.remainder - self.accelerator.process_index * count, 0), count)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Of rows that are no batch yet, see `_own`."""
        with self._uncollated():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        with self._uncollated():
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _uncollated(self) -> Iterator[None]:
        collate, self.data_collator = self.data_collator, _keep_rows
        try:
            yield
        finally:
            self.data_collator = collate


@dataclass
class _Rows:
    """Rows of a dataset. A class of its own, into which nobody looks for tensors to move."""

    rows: list[Any]


def _keep_rows(rows: list[Any]) -> dict[str, Any]:
    return {"rows": _Rows(rows)}
