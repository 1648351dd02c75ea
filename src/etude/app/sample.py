"""`etude sample`: a model plays tasks several times each, and what is good becomes a dataset.

The script behind the command: copy it and change what you like.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from etude.app.arguments import EnvironmentArguments, FixedModelArguments
from etude.app.environment import EnvironmentCode
from etude.app.sample_arguments import SampleArguments
from etude.data.files import load_rows
from etude.data.selection import Selection
from etude.environments.rejection import sample_dataset
from etude.environments.text import TextEnvironment
from etude.errors import ConfigError
from etude.models.loading import best_device, load_language_model, load_tokenizer
from etude.reporting.report import write_report
from etude.reporting.terminal import TrainingDisplay
from etude.runtime.run import RunDirectory
from etude.sampling.local import LocalSampler
from etude.types import Episode

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
    code = EnvironmentCode.load(episodes)
    tasks = load_rows(arguments.dataset, split=arguments.dataset_split, name=arguments.dataset_config)
    environment, sampler = _environment(model_arguments, code, arguments)
    display = TrainingDisplay(len(tasks) * arguments.num_samples, title=Path(arguments.output_dir).name)
    display.message(sampler.describe())
    stored = RunDirectory(arguments.output_dir).read_groups().values()
    rewards: list[float] = []

    def count(group: Sequence[Episode]) -> None:
        rewards.extend(episode.reward for episode in group)
        done = sum(map(len, stored)) + len(rewards)
        display.update(done, {"reward": sum(rewards) / len(rewards)})

    with display:
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
            on_group=count,
        )
    print(
        f"{summary.episodes} episodes of {summary.tasks} tasks: mean reward {summary.reward:.4g}, "
        f"best of {arguments.num_samples} {summary.best_reward:.4g}"
    )
    if summary.kl_bound:
        print(f"the best of {arguments.num_samples} is at most {summary.kl_bound:.3g} nats from the model")
    print(f"{summary.rows} row{'' if summary.rows == 1 else 's'}: {summary.file}")
    if not summary.rows:
        print(
            "nothing is good enough to be a row; with --resume another --min_reward, --min_margin or "
            "--num_samples chooses again"
        )
    print(f"report: {write_report(arguments.output_dir)}")


def _environment(
    model_arguments: FixedModelArguments, code: EnvironmentCode, arguments: SampleArguments
) -> tuple[TextEnvironment, LocalSampler]:
    tokenizer = load_tokenizer(**model_arguments.tokenizer_place)
    model = load_language_model(
        model_arguments.model_name_or_path,
        device=best_device(),
        is_trainable=False,
        **model_arguments.loading,
    )
    sampler = LocalSampler(
        model,
        tokenizer,
        slots=arguments.slots,
        max_length=code.settings.max_length,
        cache_bytes=arguments.cache_bytes,
    )
    options = {"sampler": sampler, "slots": arguments.slots, "seed": arguments.seed}
    return code.environment(model, tokenizer, **options), sampler
