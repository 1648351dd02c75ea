"""What `etude sample` needs besides model and environment. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field

from etude.data.selection import SelectionFormat
from etude.errors import ConfigError


@dataclass
class SampleArguments:
    """What is sampled, and what of it becomes a dataset."""

    dataset: str = field(metadata={"help": "file, folder or hub id of the tasks"})
    output_dir: str = field(metadata={"help": "directory for episodes, dataset and report"})
    dataset_split: str | None = field(default=None, metadata={"help": "split of dataset, if it has several"})
    dataset_config: str | None = field(
        default=None, metadata={"help": "configuration of a hub data set, such as gsm8k's main"}
    )
    num_samples: int = field(default=4, metadata={"help": "episodes per task"})
    format: SelectionFormat = field(
        default="segments",
        metadata={
            "help": "of the rows: episodes as they were played, tools and all; prompt and completion; the "
            "best and the worst of each task as chosen and rejected; or each with a label, whether it is good"
        },
    )
    keep: int | None = field(
        default=1, metadata={"help": "best episodes of a task that become rows; none: all"}
    )
    min_reward: float | None = field(
        default=None, metadata={"help": "episodes with less are not kept, or labelled false"}
    )
    min_margin: float = field(
        default=0.0,
        metadata={"help": "a chosen episode's reward exceeds the rejected one's by more than this"},
    )
    seed: int = field(default=0, metadata={"help": "of the episodes"})
    resume: bool = field(
        default=False,
        metadata={"help": "go on with the episodes in output_dir, which the same model has played"},
    )
    slots: int = field(default=32, metadata={"help": "episodes decoded at once"})
    cache_bytes: str | None = field(
        default=None,
        metadata={"help": "memory for keys and values, such as 2GiB; half of what is free by default"},
    )

    def __post_init__(self) -> None:
        if self.slots < 1:
            raise ConfigError(f"slots is {self.slots}; expected at least 1")
