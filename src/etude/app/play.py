"""`etude ppo`, `grpo` and `rloo`: a model plays tasks with tools and learns from its scores.

The script behind the commands, but for the trainer that each of them brings: copy it and change what you
like.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import set_seed

from etude.app.arguments import EnvironmentArguments, ModelArguments, RunArguments, TaskArguments
from etude.app.references import load_object
from etude.environments.text import TextEnvironment
from etude.models.loading import load_tokenizer
from etude.models.reward_adapter import RewardAdapter
from etude.models.reward_model import kind_in
from etude.rewards.adapter import AdapterReward
from etude.rewards.model import ModelReward
from etude.rewards.process import ProcessReward
from etude.trainers.policy import PolicyTrainer


def train_by_playing(
    load_model: Callable[..., Any],
    make_trainer: Callable[..., PolicyTrainer],
    model_arguments: ModelArguments,
    tasks: TaskArguments,
    episodes: EnvironmentArguments,
    start: RunArguments,
    seed: int,
) -> None:
    """Train, and leave everything in the configuration's `output_dir`.

    Args:
        load_model: from a name and what `ModelArguments` say.
        make_trainer: from the model, the environment and the three datasets, by keyword.
        seed: of what starts at random.
    """
    # Code and data come before the model: mistakes in them show at once.
    tools = [load_object(reference, "etude.tools") for reference in episodes.tools]
    rewards = [load_object(reference, "etude.rewards") for reference in episodes.rewards]
    reward_fn = load_object(episodes.reward_fn, "etude.rewards") if episodes.reward_fn else None
    train, validation, held_out = (tasks.rows(part) for part in ("train", "eval", "test"))

    set_seed(seed)  # a value head and an adapter start at random
    tokenizer = load_tokenizer(**model_arguments.tokenizer_place)
    model = load_model(
        model_arguments.model_name_or_path,
        peft_config=model_arguments.peft_config(),
        **model_arguments.loading,
    )
    if episodes.reward_adapter is not None:
        rewards.append(AdapterReward(RewardAdapter.load(model, episodes.reward_adapter)))
    rewards += [_reward_of(place) for place in episodes.reward_models]
    environment = TextEnvironment(
        model,
        tokenizer,
        tools=tools,
        rewards=rewards,
        reward_fn=reward_fn,
        prompt=episodes.prompt_text(),
        max_turns=episodes.max_turns,
        max_tool_reponse=episodes.max_tool_response,
        max_tool_response_tokens=episodes.max_tool_response_tokens,
        max_tool_calls=episodes.max_tool_calls,
        max_length=episodes.max_length,
        tool_timeout=episodes.tool_timeout,
        generation_kwargs=episodes.generation,
    )
    trainer = make_trainer(
        model=model,
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
        print(f"report: {summary.report}")


def _reward_of(place: str) -> ModelReward | ProcessReward:
    name = Path(place).name
    if kind_in(place) == "token":
        return ProcessReward(place, name=name)
    return ModelReward(place, name=name)
