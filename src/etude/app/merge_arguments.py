"""What `etude merge` needs. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class MergeArguments:
    """Adapters to merge into their base model, or models to average."""

    sources: str | list[str] = field(
        metadata={
            "help": "directories or hub ids of an adapter, several of one base, or full models to average"
        }
    )
    output_dir: str = field(metadata={"help": "directory for the model; must not exist, or be empty"})
    weights: list[float] | None = field(
        default=None,
        metadata={"help": "one for each source: 1 each by default for adapters; a mean's, for full models"},
    )
    combination: Literal[
        "cat",
        "linear",
        "svd",
        "ties",
        "ties_svd",
        "dare_ties",
        "dare_linear",
        "dare_ties_svd",
        "dare_linear_svd",
        "magnitude_prune",
        "magnitude_prune_svd",
    ] = field(
        default="cat",
        metadata={"help": "of several adapters, as peft names it; cat is the weighted sum of their updates"},
    )
    density: float | None = field(
        default=None, metadata={"help": "share of the updates that ties, dare and magnitude_prune leave"}
    )
    base_model: str | None = field(
        default=None, metadata={"help": "directory or hub id of the base, instead of the one adapters name"}
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = field(
        default="auto", metadata={"help": "of the weights; auto: as the base, or the first model, has them"}
    )
    max_shard_size: str = field(default="5GB", metadata={"help": "of a file of weights"})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "run code that comes with the base model"}
    )

    @property
    def places(self) -> list[str]:
        return [self.sources] if isinstance(self.sources, str) else self.sources
