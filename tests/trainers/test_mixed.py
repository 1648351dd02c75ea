"""One run over several environments, and over an environment of somebody else's."""

import json
from collections import Counter

import pytest
import torch

from etude import GRPOConfig, GRPOTrainer, PPOConfig, PPOTrainer, TextEnvironment
from etude.environments.mixed import MixedEnvironment
from etude.errors import ConfigError
from etude.runtime.run import RunDirectory
from etude.tools.calculator import calculator
from etude.trainers.group import Scores
from etude.types import Episode, NamedReward, Segment, StopReason


def vowels(completions, **_):
    """The share of vowels: a few steps suffice to see it rise."""
    return [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in completions]


def many_digits(completions, **_):
    """The same on another scale."""
    return [100.0 * sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


def rows_of(*words, **columns):
    return [{"prompt": f"say {word}:", **columns} for word in words]


TASKS = {
    "words": rows_of("one", "two", "three", "four", "five"),
    "sums": rows_of("six", "seven", "eight", answer=3),
}


@pytest.fixture
def mixed(tokenizer):
    def make(**settings):
        generation = {"generation_kwargs": {"max_new_tokens": 8}, "max_turns": 1}
        parts = {
            "words": TextEnvironment(None, tokenizer, rewards=vowels, **generation),
            "sums": TextEnvironment(
                None, tokenizer, tools=[calculator], rewards=many_digits, max_length=64, **generation
            ),
        }
        return MixedEnvironment(parts, **settings)

    return make


@pytest.fixture
def make_trainer(make_llama, tmp_path, mixed):
    def make(directory="run", environment=None, **settings):
        torch.manual_seed(3)
        settings = {
            "output_dir": str(tmp_path / directory),
            "batch_size": 8,
            "mini_batch_size": 4,
            "ppo_epochs": 2,
            "steps": 8 * 6,
            "learning_rate": 3e-3,
            "eval_steps": 3,
            "success_reward": {"words": 0.3, "sums": 20.0},
            "disable_progress": True,
            "init_kl_coef": 0.0,
            "adap_kl_ctrl": False,
            "use_score_scaling": True,
            **settings,
        }
        return PPOTrainer(
            PPOConfig(**settings),
            make_llama(),
            environment=environment or mixed(weights={"words": 3, "sums": 1}),
            train_dataset=TASKS,
            eval_dataset=TASKS,
            test_dataset=TASKS,
        )

    return make


def timeless(directory):
    timed = ("time", "tokens_per_second")
    return [
        {name: value for name, value in row.items() if not name.startswith(timed)}
        for row in RunDirectory(directory).read_metrics()
    ]


def test_a_mixed_run(make_trainer, tmp_path, capsys):
    trainer = make_trainer(disable_progress=False)
    summary = trainer.train()
    run = RunDirectory(tmp_path / "run")
    train = [row for row in run.read_metrics() if "reward" in row]
    assert len(train) == 6
    for row in train:
        shares = 6 * row["words/reward"] + 2 * row["sums/reward"]
        assert row["reward"] == pytest.approx(shares / 8), "three in four tasks are of words"
        assert row["words/rewards/vowels"] == row["words/reward"]
    validation = [row for row in run.read_metrics() if "validation/success" in row]
    assert [row["step"] for row in validation] == [0, 3, 6]
    for row in validation:
        both = 5 * row["validation/words/success"] + 3 * row["validation/sums/success"]
        assert row["validation/success"] == pytest.approx(both / 8)

    stored = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary.environments == stored["environments"]
    assert list(summary.environments) == ["words", "sums"]
    for each in summary.environments.values():
        assert set(each["before"]) == set(each["after"]) >= {"success", "reward"}
    successes = [summary.environments[name]["after"]["success"] for name in ("words", "sums")]
    assert summary.after == pytest.approx((5 * successes[0] + 3 * successes[1]) / 8)
    kept = Counter(e.environment for e in run.read_episodes(split="train"))
    assert kept == {"words": 36, "sums": 12}
    out = capsys.readouterr().out
    assert "validation success" in out
    assert "(words 0." in out
    assert "words " in out.splitlines()[-1]
    page = summary.report.read_text()
    assert page.index("Words · ") < page.index("Sums · ")
    assert "all environments" in page


def test_a_resumed_mixed_run_is_the_same_run(make_trainer, tmp_path):
    whole = make_trainer("whole")
    whole.train()
    first = make_trainer("parts", save_steps=3)
    first.config.steps = 8 * 3
    first.train()
    second = make_trainer("parts")
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    assert timeless(tmp_path / "parts") == timeless(tmp_path / "whole")
    for name, parameter in whole.model.state_dict().items():
        assert torch.equal(parameter, second.model.state_dict()[name]), name


def test_episodes_of_each_environment_are_kept(make_trainer, tmp_path):
    trainer = make_trainer(episodes_to_log=4, steps=8, eval_steps=1)
    trainer.train()
    run = RunDirectory(tmp_path / "run")
    for split in ("train", "before"):
        assert Counter(e.environment for e in run.read_episodes(split=split)) == {"words": 2, "sums": 2}


def test_scores_are_scaled_by_their_environments_own_deviation(make_trainer):
    trainer = make_trainer(steps=8)
    episodes, _ = trainer.collect(0)
    scores, scales = trainer._scaled([trainer.trajectory(episode) for episode in episodes])
    for name in ("words", "sums"):
        own = torch.tensor([episode.environment == name for episode in episodes])
        rewards = torch.tensor([episode.reward for episode in episodes])[own]
        assert rewards.std() > 0
        torch.testing.assert_close(scales[own], rewards.std().expand(int(own.sum())))
        torch.testing.assert_close(scores[own], rewards / rewards.std())


def test_rewards_that_an_environment_does_not_have_are_not_compared(make_llama, mixed, tmp_path):
    """Each reward by itself: in a group of one environment those of the other don't apply."""
    config = GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=16,
        num_generations=8,
        max_steps=1,
        multi_objective_aggregation="normalize_then_sum",
        eval_steps=0,
        disable_progress=True,
    )
    trainer = GRPOTrainer(
        make_llama(), config, environment=mixed(weights={"words": 1, "sums": 1}), train_dataset=TASKS
    )
    episodes, _ = trainer.collect(0)
    trajectories = [trainer.trajectory(episode) for episode in episodes]
    scores = Scores(
        torch.tensor([t.score for t in trajectories]),
        trainer.groups(16),
        torch.ones(16, dtype=torch.bool),
        trajectories,
    )
    advantages = trainer.credit(scores).view(2, 8)
    assert advantages.isfinite().all()
    torch.testing.assert_close(advantages.mean(1), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(*advantages.std(1), atol=0.02, rtol=0)
    assert (advantages.std(1) > 0.5).all()


def test_a_group_is_one_task_of_one_environment(make_llama, mixed, tmp_path):
    config = GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        num_generations=4,
        max_steps=2,
        dynamic_sampling=True,
        max_sampling_rounds=2,
        eval_steps=0,
        episodes_to_log=-1,
        disable_progress=True,
    )
    trainer = GRPOTrainer(
        make_llama(), config, environment=mixed(weights={"words": 1, "sums": 1}), train_dataset=TASKS
    )
    trainer.train()
    for step in (1, 2):
        played = RunDirectory(tmp_path).read_episodes(step=step)
        assert len(played) >= 16
        groups: dict[str, int] = Counter(e.task["prompt"] for e in played)
        assert all(count % 4 == 0 for count in groups.values())
        first = Counter(e.environment for e in trainer.collect(step - 1)[1][:16])
        assert first == {"words": 8, "sums": 8}


class Foreign:
    """Two methods and nothing else."""

    def __init__(self, params):
        self._params = params

    async def play(self, task, sampler, *, seed):
        session = sampler.session(seed=seed)
        sampled = await session.sample([3, 4, 5], self._params)
        session.close()
        segments = [Segment("prompt", "345", [3, 4, 5]), *sampled.segments()]
        return Episode(task=task, segments=segments, stop=StopReason.TURN_TOKENS, seed=seed)

    async def score(self, episodes):
        for episode in episodes:
            episode.rewards.append(NamedReward("vowels", vowels([episode.completion])[0]))


def test_any_environment_can_be_trained_in(make_llama, mixed, tokenizer, tmp_path):
    foreign = Foreign(mixed().environments["words"].params)
    settings = {"batch_size": 16, "mini_batch_size": 8, "steps": 16 * 12, "learning_rate": 3e-3}
    config = PPOConfig(
        output_dir=str(tmp_path), eval_steps=0, disable_progress=True, init_kl_coef=0.02, **settings
    )
    with pytest.raises(ConfigError, match="needs the model's tokenizer; pass it"):
        PPOTrainer(config, make_llama(), environment=foreign, train_dataset=["x"])
    with pytest.raises(ConfigError, match=r"environment is a Llama.*expected something with play"):
        PPOTrainer(config, make_llama(), tokenizer=tokenizer, environment=make_llama())
    trainer = PPOTrainer(
        config, make_llama(), tokenizer=tokenizer, environment=foreign, train_dataset=["x", "y"]
    )
    trainer.train()
    rewards = [row["reward"] for row in RunDirectory(tmp_path).read_metrics()]
    assert sum(rewards[-3:]) > sum(rewards[:3]), "it learns"


def test_settings_that_do_not_fit(make_trainer, make_llama, mixed, tokenizer):
    with pytest.raises(ConfigError, match="success_reward is of words; expected a number, or one for each"):
        make_trainer(success_reward={"words": 1.0})
    alone = TextEnvironment(None, tokenizer, rewards=vowels)
    with pytest.raises(ConfigError, match="none: the environment isn't mixed"):
        make_trainer(environment=alone)
    config = GRPOConfig(temperature=0.7, per_device_train_batch_size=8, num_generations=8)
    with pytest.raises(ConfigError, match="the environment words samples at temperature 1"):
        GRPOTrainer(make_llama(), config, environment=mixed())
