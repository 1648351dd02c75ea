"""`etude ppo`, `grpo` and `rloo`: a model plays tasks with tools and learns from its scores.

The script behind the commands, but for the trainer that each of them brings: copy it and change what you
like.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from etude.app.arguments import ModelArguments, RunArguments, TaskArguments
from etude.app.environment import build_environment
from etude.app.mixed_arguments import PlayArguments
from etude.trainers.policy import PolicyTrainer


def train_by_playing(
    load_model: Callable[..., Any],
    make_trainer: Callable[..., PolicyTrainer],
    model_arguments: ModelArguments,
    tasks: TaskArguments,
    episodes: PlayArguments,
    start: RunArguments,
    seed: int,
) -> None:
    """Train, and leave everything in the configuration's `output_dir`.

    Args:
        load_model: from a name and what `ModelArguments` say.
        make_trainer: from the model, the environment and the three datasets, by keyword.
        seed: of what starts at random.
    """
    # Data come before the model: mistakes in them show at once.
    train, validation, held_out = (episodes.rows(part, tasks) for part in ("train", "eval", "test"))
    environment = build_environment(load_model, model_arguments, episodes, seed)
    trainer = make_trainer(
        model=environment.model,
        environment=environment,
        train_dataset=train,
        eval_dataset=validation,
        test_dataset=held_out,
    )
    trainer.run_config = {**asdict(model_arguments), **asdict(tasks), **asdict(episodes)}
    summary = trainer.train(resume_from_checkpoint=start.resume_from_checkpoint)
    if trainer.accelerator.is_main_process:
        if summary.before is not None and summary.after is not None:
            print(f"success on held-out tasks: {summary.before:.1%} before, {summary.after:.1%} after")
        for line in by_environment(summary.environments):
            print(line)
        print(f"report: {summary.report}")


def by_environment(summary: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Iterator[str]:
    """A line for each environment of a mixed run: what it came to before and after."""
    for name, both in summary.items():
        before, after = both.get("before", {}), both.get("after", {})
        pairs = [f"{key} {before[key]:.3g} → {after[key]:.3g}" for key in before if key in after]
        if pairs:
            yield f"  {name}: {', '.join(pairs)}"
