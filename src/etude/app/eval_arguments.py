"""What `etude eval` needs besides a model and an environment: the tasks, and how to play and count."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from etude.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class EvalTaskArguments:
    """The tasks to play: a file, a folder, or a data set of the hub."""

    test_dataset: str = field(metadata={"help": "file, folder or hub id of the tasks to play"})
    test_split: str | None = field(
        default=None, metadata={"help": "split of test_dataset, if it has several"}
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "configuration of the hub's data set, such as gsm8k's main"}
    )
    max_tasks: int | None = field(default=None, metadata={"help": "play the first so many tasks; none: all"})

    def __post_init__(self) -> None:
        if self.max_tasks is not None and self.max_tasks < 1:
            raise ConfigError(f"max_tasks is {self.max_tasks}; expected at least 1, or none for all")

    def rows(self) -> Dataset:
        """Raises `DataError` where they can't be found or read."""
        from etude.data.files import load_rows  # loads the data set library

        rows = load_rows(self.test_dataset, split=self.test_split, name=self.dataset_config)
        return rows if self.max_tasks is None else rows.select(range(min(self.max_tasks, len(rows))))


@dataclass
class EvaluationArguments:
    """How to play and count, and what to compare with."""

    output_dir: str = field(metadata={"help": "directory for evaluation.json, the episodes and the report"})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "replace an earlier evaluation in output_dir"}
    )
    compare_to: str | None = field(
        default=None,
        metadata={"help": "directory or hub id of a second model (B), which plays the same tasks"},
    )
    compare_revision: str | None = field(
        default=None, metadata={"help": "branch, tag or commit of compare_to on the hub"}
    )
    samples: int = field(default=1, metadata={"help": "episodes per task"})
    greedy: bool = field(
        default=False, metadata={"help": "take the most probable token at each step instead of sampling"}
    )
    pass_at: list[int] = field(
        default_factory=list,
        metadata={"help": "k of pass@k; by default powers of 2 up to samples, and samples"},
    )
    distinct: list[int] = field(default_factory=lambda: [1, 2], metadata={"help": "n of distinct-n"})
    success_reward: float = field(
        default=1.0, metadata={"help": "an episode with at least this reward counts as a success"}
    )
    noise: list[str] = field(
        default_factory=list,
        metadata={
            "help": "what is done to prompts, each by itself: characters, words, paraphrase, injection, "
            "distraction, with arguments such as characters(rate=0.2); code references of functions "
            "(text, seed) -> text; all: all that are named here"
        },
    )
    tool_noise: list[str] = field(
        default_factory=list,
        metadata={
            "help": "the same for what tools reply: characters, words, injection, distraction; your own; all"
        },
    )
    paraphrases: list[str] = field(
        default_factory=list,
        metadata={"help": "templates of the noise paraphrase, with {prompt} in each, instead of the shipped"},
    )
    noise_columns: list[str] = field(
        default_factory=lambda: ["prompt", "query"],
        metadata={"help": "columns of the tasks that noise in prompts changes"},
    )
    confidence: float = field(default=0.95, metadata={"help": "of the intervals"})
    seed: int = field(default=0, metadata={"help": "seed of noise and episodes"})
    episodes_to_log: int = field(
        default=100, metadata={"help": "episodes per model and condition that are written down; -1: all"}
    )
    slots: int = field(default=64, metadata={"help": "episodes decoded at once, at most"})
    cache_bytes: int | str | None = field(
        default=None,
        metadata={"help": "what the sampler's keys and values may take, such as 2GiB; half of what is free"},
    )
    deterministic: bool = field(
        default=False, metadata={"help": "sample the same to the last bit whatever the timing; slower"}
    )

    def __post_init__(self) -> None:
        for name in ("samples", "slots"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1")
        if not 0 < self.confidence < 1:
            raise ConfigError(f"confidence is {self.confidence}; expected between 0 and 1, such as 0.95")
        if self.compare_revision is not None and self.compare_to is None:
            raise ConfigError("compare_revision does nothing without compare_to; set that too")
        if self.paraphrases and not {"paraphrase", "all"} & set(self.noise):
            raise ConfigError("paraphrases does nothing without the noise paraphrase; add it to noise")
