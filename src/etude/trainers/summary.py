"""What a run of online training came to, in `summary.json` and as `train()` returns it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from etude.runtime.run import RunDirectory, Split
from etude.trainers.episode_metrics import measures_by_environment


@dataclass(slots=True)
class TrainSummary:
    """What a run came to.

    Attributes:
        steps: iterations done, by this call and the ones it resumed.
        before, after: success on the test tasks, before training and of the final weights; None without.
        best_step, best: the validation's best iteration and success; None without validation tasks.
        seconds: wall time of this call.
        report: the page to look at.
        environments: of a mixed run, by name and then "before" and "after": success, reward and each reward
            on its test tasks.
    """

    steps: int
    before: float | None
    after: float | None
    best_step: int | None
    best: float | None
    seconds: float
    report: Path | None
    environments: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)

    @classmethod
    def of(cls, run: RunDirectory, steps: int, seconds: float, report: Path | None) -> TrainSummary:
        """What the run directory's summary says, and what only this call knows."""
        stored = run.read_summary()
        return cls(
            steps=steps,
            before=stored.get("before"),
            after=stored.get("after"),
            best_step=stored.get("best_step"),
            best=stored.get("best"),
            seconds=seconds,
            report=report,
            environments=stored.get("environments", {}),
        )


def store_measure(
    run: RunDirectory, split: Split, metrics: Mapping[str, float], environments: Collection[str]
) -> None:
    """Keep the success on test tasks, and what each environment of a mixed run came to, beside each other."""
    run.update_summary({split: metrics["success"]})
    found = measures_by_environment(metrics, environments)
    if found:
        known = run.read_summary().get("environments", {})
        both = {name: {**known.get(name, {}), split: numbers} for name, numbers in found.items()}
        run.update_summary({"environments": both})
