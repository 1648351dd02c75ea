"""`etude reward` and `etude prm`: a model learns to score answers, or their steps. See `learn`."""

from __future__ import annotations

from functools import partial

from etude.app.arguments import DataArguments, ModelArguments, RunArguments
from etude.app.learn import learn
from etude.models.reward_model import load_reward_model
from etude.trainers.prm import PRMTrainer
from etude.trainers.reward import RewardTrainer
from etude.trainers.reward_config import PRMConfig, RewardConfig


def run(
    model_arguments: ModelArguments,
    data: DataArguments,
    start: RunArguments,
    config: RewardConfig | PRMConfig,
) -> None:
    """Train, and leave the model in `config.output_dir`."""
    kind = RewardTrainer if isinstance(config, RewardConfig) else PRMTrainer
    load = partial(load_reward_model, kind=kind.kind, fresh=True)
    learn(kind, model_arguments, data, start, config, load)
