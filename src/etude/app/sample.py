"""`etude sample`: a model plays tasks several times each, and what is good becomes a dataset.

The script behind the command: copy it and change what you like.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from functools import partial

from etude.app.arguments import EnvironmentArguments, FixedModelArguments
from etude.app.environment import build_environment
from etude.app.sample_arguments import SampleArguments
from etude.data.files import load_rows
from etude.data.selection import Selection
from etude.environments.rejection import sample_dataset
from etude.errors import ConfigError
from etude.models.loading import best_device, load_causal_lm
from etude.reporting.report import write_report

# Where the tasks are, beside what the model and the environment say, is how the episodes come about.
_TASKS = ("dataset", "dataset_split", "dataset_config")


def run(
    model_arguments: FixedModelArguments, episodes: EnvironmentArguments, arguments: SampleArguments
) -> None:
    """Play, choose, and leave everything in `arguments.output_dir`."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "etude sample runs in one process; start several by hand, each with its own part of the tasks "
            "and its own output_dir"
        )
    selection = Selection(arguments.format, arguments.keep, arguments.min_reward, arguments.min_margin)
    tasks = load_rows(arguments.dataset, split=arguments.dataset_split, name=arguments.dataset_config)
    load = partial(load_causal_lm, device=best_device(), is_trainable=False)
    environment = build_environment(
        load,
        model_arguments,
        episodes,
        arguments.seed,
        slots=arguments.slots,
        cache_bytes=arguments.cache_bytes,
    )
    summary = sample_dataset(
        environment,
        tasks.to_list(),
        arguments.output_dir,
        selection,
        num_samples=arguments.num_samples,
        seed=arguments.seed,
        resume=arguments.resume,
        settings={
            **asdict(model_arguments),
            **{name: getattr(arguments, name) for name in _TASKS},
            **asdict(episodes),
        },
    )
    print(
        f"{summary.episodes} episodes of {summary.tasks} tasks: mean reward {summary.reward:.4g}, "
        f"best of {arguments.num_samples} {summary.best_reward:.4g}"
    )
    if summary.kl_bound is not None:
        print(f"the best of {arguments.num_samples} is at most {summary.kl_bound:.3g} nats from the model")
    print(f"{summary.rows} rows: {summary.file}")
    print(f"report: {write_report(arguments.output_dir)}")
