"""An evaluation as files: `evaluation.json`, episodes that can be read and replayed, a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etude.evaluation.evaluate import Evaluation, record_of
from etude.reporting.report import write_report
from etude.runtime.run import RunDirectory
from etude.types import Episode


def write_evaluation(
    directory: RunDirectory | str | Path,
    evaluations: Sequence[Evaluation],
    tokenizers: Sequence[Any] | None = None,
    *,
    episodes_to_log: int = -1,
) -> Path:
    """Write one or two evaluations of the same tasks, and return the path of the report.

    Episodes are rows of `episodes.jsonl`, their split "A/<condition>"; "B/<condition>" for the second model.

    Args:
        tokenizers: of the models: the report then shows each token's spelling.
        episodes_to_log: per model and condition; -1: all. All samples of a task are kept, or none.
    """
    run = directory if isinstance(directory, RunDirectory) else RunDirectory(directory)
    record = record_of(*evaluations)
    for place, (label, evaluation) in enumerate(zip(record["models"], evaluations, strict=True)):
        for condition, episodes_NS in evaluation.episodes.items():
            kept = _kept(episodes_NS, episodes_to_log)
            run.append_episodes(0, f"{label}/{condition}", kept, tokenizers[place] if tokenizers else None)
    run.update_summary({"seconds": sum(evaluation.seconds for evaluation in evaluations)})
    run.write_evaluation(record)
    return write_report(run.path)


def _kept(episodes_NS: Sequence[Sequence[Episode]], limit: int) -> list[Episode]:
    kept: list[Episode] = []
    for task in episodes_NS:
        if limit >= 0 and len(kept) + len(task) > limit:
            break
        kept += task
    return kept
