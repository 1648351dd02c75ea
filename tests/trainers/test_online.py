"""The online loop: a run from beginning to end, killed and resumed, and what it leaves behind."""

import json
import signal
from pathlib import Path

import pytest
import torch

from etude.environments.text import TextEnvironment
from etude.errors import CheckpointError, ConfigError, DataError, RewardError
from etude.models.value_head import AutoModelForCausalLMWithValueHead
from etude.runtime.loop import run_sync
from etude.runtime.run import RunDirectory
from etude.sampling.generate import continue_all
from etude.trainers.ppo import PPOTrainer
from etude.trainers.ppo_config import PPOConfig
from etude.types import SamplingParams


def vowels(completions):
    """The share of vowels: a few steps suffice to see it rise."""
    return [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in completions]


TASKS = [{"prompt": f"say {word}:"} for word in ("one", "two", "three", "four", "five", "six", "seven")]


@pytest.fixture
def make_trainer(tokenizer, make_llama, tmp_path):
    def make(directory="run", rewards=vowels, train=TASKS, **settings):
        torch.manual_seed(3)
        model = AutoModelForCausalLMWithValueHead(make_llama(), v_head_init_strategy="normal")
        env = TextEnvironment(
            model, tokenizer, rewards=rewards, max_turns=1, generation_kwargs={"max_new_tokens": 8}
        )
        settings = {
            "output_dir": str(tmp_path / directory),
            "batch_size": 8,
            "mini_batch_size": 4,
            "ppo_epochs": 2,
            "steps": 8 * 6,
            "learning_rate": 3e-3,
            "eval_steps": 2,
            "success_reward": 0.3,
            "disable_progress": True,
            "init_kl_coef": 0.02,
            **settings,
        }
        return PPOTrainer(
            PPOConfig(**settings),
            model,
            environment=env,
            train_dataset=train,
            eval_dataset=TASKS[:4],
            test_dataset=TASKS[4:],
        )

    return make


def weights(trainer):
    return {name: parameter.clone() for name, parameter in trainer.model.state_dict().items()}


def rows(directory):
    """Metrics without what depends on the clock."""
    timed = ("time", "tokens_per_second")
    return [
        {name: value for name, value in row.items() if not name.startswith(timed)}
        for row in RunDirectory(directory).read_metrics()
    ]


def test_a_run_from_beginning_to_end(make_trainer, tmp_path, tokenizer):
    trainer = make_trainer(steps=8 * 12)
    summary = trainer.train()
    run = RunDirectory(tmp_path / "run")
    assert summary.steps == 12
    train = [row for row in run.read_metrics() if "reward" in row]
    assert [row["step"] for row in train] == list(range(1, 13))
    assert sum(row["reward"] for row in train[-3:]) > sum(row["reward"] for row in train[:3]), "it learns"
    for name in ("kl", "loss", "success", "tokens_per_second", "stop/turn_tokens"):
        assert name in train[0]
    assert max(row["sampler/gap_max"] for row in train) < 2e-4
    validation = [row for row in run.read_metrics() if "validation/success" in row]
    assert [row["step"] for row in validation] == [0, 2, 4, 6, 8, 10, 12]
    best = max(validation, key=lambda row: row["validation/success"])
    assert summary.best == best["validation/success"]
    assert summary.best_step == best["step"]

    stored = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert stored["before"] == summary.before
    assert stored["after"] == summary.after
    assert "<html" in summary.report.read_text()
    assert {e.stop for e in run.read_episodes(split="train")} <= {e.stop for e in run.read_episodes()}
    assert run.read_episodes(split="before")
    assert run.read_episodes(split="after")
    # The root is a checkpoint that anything loads, with the best weights in it.
    reloaded = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "run")
    for name, parameter in reloaded.state_dict().items():
        torch.testing.assert_close(parameter, trainer.model.state_dict()[name])
    assert run.read_config()["learning_rate"] == 3e-3


def test_the_sampler_says_its_sizes_at_the_start(make_trainer, tmp_path, capsys):
    trainer = make_trainer(steps=8, slots=3, cache_bytes="1MiB", disable_progress=False)
    trainer.train()
    batches, first, *_ = capsys.readouterr().out.splitlines()
    assert batches == trainer.describe_batches()
    assert first == trainer.sampler.describe()
    assert first.startswith("sampler: 3 slots × up to ")
    assert trainer.sampler.limits.budget == 1 << 20
    assert first.endswith(RunDirectory(tmp_path / "run").read_summary()["sampler"])


@pytest.mark.parametrize("keep", [False, True])
def test_a_session_held_open_over_an_update(make_trainer, keep):
    """Its keys and values go, unless the run says otherwise; the version counts updates either way."""
    trainer = make_trainer(steps=8, keep_cache=keep, load_best_model_at_end=False)
    sampler, params = trainer.sampler, SamplingParams(max_new_tokens=4)

    async def first():
        session = sampler.session(seed=0)
        return session, await session.sample([5, 6, 7], params)

    session, turn = run_sync(first())
    trainer.train()
    fed = sampler.tokens_fed
    again = run_sync(session.sample([8], params))
    assert (turn.policy_version, again.policy_version) == (0, 1)
    assert sampler.tokens_fed - fed == 3 + (2 if keep else 3 + 4 + 1)


def test_a_resumed_run_is_the_same_run(make_trainer, tmp_path):
    whole = make_trainer("whole", save_steps=3)
    whole.train()
    first = make_trainer("parts", save_steps=3)
    first.config.steps = 8 * 3
    first.train()
    second = make_trainer("parts", save_steps=3)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    for name, parameter in whole.model.state_dict().items():
        assert torch.equal(parameter, second.model.state_dict()[name]), name
    episodes = [RunDirectory(tmp_path / name).read_episodes(split="train") for name in ("whole", "parts")]
    assert [e.token_ids for e in episodes[0]] == [e.token_ids for e in episodes[1]]


def test_ctrl_c_finishes_the_update_and_leaves_a_checkpoint(make_trainer, tmp_path):
    trainer = make_trainer("interrupted", eval_steps=0)
    learn = trainer.learn

    def interrupted(trajectories):
        if trainer.current_step == 2:
            signal.raise_signal(signal.SIGINT)
        return learn(trajectories)

    trainer.learn = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    run = RunDirectory(tmp_path / "interrupted")
    assert list(run.checkpoints()) == [3], "the iteration that was running is in it"
    assert (tmp_path / "interrupted" / "report.html").exists()
    whole = make_trainer("whole", eval_steps=0)
    whole.train()
    again = make_trainer("interrupted", eval_steps=0)
    again.train(resume_from_checkpoint=True)
    for name, parameter in whole.model.state_dict().items():
        assert torch.equal(parameter, again.model.state_dict()[name]), name


def test_ctrl_c_while_tools_run(make_trainer, tmp_path):
    def interrupting(completions):
        signal.raise_signal(signal.SIGINT)
        return [0.0 for _ in completions]

    trainer = make_trainer("early", rewards=interrupting, eval_steps=0)
    trainer.test_dataset = None
    before = weights(trainer)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert list(RunDirectory(tmp_path / "early").checkpoints()) == [0]
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.state_dict().items())


def test_a_reward_that_breaks_loses_nothing(make_trainer, tmp_path):
    calls = []

    def breaks_later(completions):
        calls.append(len(completions))
        return [float("nan") if len(calls) > 3 else 0.5 for _ in completions]

    trainer = make_trainer("broken", rewards=breaks_later, eval_steps=0)
    trainer.test_dataset = None
    with pytest.raises(RewardError, match="breaks_later"):
        trainer.train()
    run = RunDirectory(tmp_path / "broken")
    assert list(run.checkpoints()) == [3]
    assert len(run.read_metrics()) == 3
    again = make_trainer("broken", eval_steps=0)
    again.test_dataset = None
    assert again.train(resume_from_checkpoint=True).steps == 6


def test_push_to_hub(make_trainer, monkeypatch):
    """There is no hub here: what would be sent is looked at."""
    sent = {}

    class Hub:
        def create_repo(self, name, exist_ok):
            return type("Repo", (), {"repo_id": f"me/{name}"})

        def upload_folder(self, repo_id, folder_path, commit_message):
            sent[repo_id] = {path.name for path in Path(folder_path).iterdir()}

    monkeypatch.setattr("etude.trainers.policy.HfApi", Hub)
    make_trainer(steps=8, push_to_hub=True, hub_model_id="vowels", eval_steps=0).train()
    assert {"README.md", "config.json", "model.safetensors", "value_head.safetensors"} <= sent["me/vowels"]
    assert not {"metrics.jsonl", "episodes.jsonl", "run.yaml"} & sent["me/vowels"]


def test_an_earlier_run_is_not_overwritten(make_trainer, tmp_path):
    make_trainer(steps=8).train()
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(ConfigError, match=r"resume_from_checkpoint.*overwrite_output_dir"):
        make_trainer().train()
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == metrics
    make_trainer(steps=16, overwrite_output_dir=True).train()
    steps = [row["step"] for row in RunDirectory(tmp_path / "run").read_metrics() if "reward" in row]
    assert steps == [1, 2]


@pytest.mark.parametrize(("count", "kept"), [(0, 0), (2, 2), (-1, 8)])
def test_how_many_episodes_are_written(make_trainer, tmp_path, count, kept):
    make_trainer(steps=8, episodes_to_log=count, eval_steps=1).train()
    run = RunDirectory(tmp_path / "run")
    assert len(run.read_episodes(split="train")) == kept
    assert len(run.read_episodes(split="after")) == min(kept, len(TASKS) - 4)


def test_every_task_is_played_once_per_epoch(make_trainer):
    trainer = make_trainer()
    seen = [trainer._task(step, i)["prompt"] for step in range(7) for i in range(8)]
    for epoch in range(8):
        assert sorted(seen[7 * epoch : 7 * epoch + 7]) == sorted(row["prompt"] for row in TASKS)
    assert seen[:7] != seen[7:14]
    other = make_trainer(seed=1)
    assert [other._task(0, i)["prompt"] for i in range(8)] != seen[:8]


def test_deterministic_rollouts(make_trainer):
    """The option reaches the sampler: log-probabilities are equal, not close, in any order and company."""
    sampler = make_trainer(deterministic=True, slots=3).sampler
    queries, params = [[5 + i] * (1 + 3 * i) for i in range(7)], SamplingParams(max_new_tokens=6)
    together = continue_all(sampler, queries, params, seeds=range(7))
    backwards = continue_all(sampler, queries[::-1], params, seeds=range(7)[::-1])[::-1]
    assert [turn.logprobs for turn in together] == [turn.logprobs for turn in backwards]
    assert sampler.deterministic
    assert not make_trainer("other").sampler.deterministic


def test_evaluate(make_trainer):
    trainer = make_trainer()
    metrics = trainer.evaluate()
    assert metrics == trainer.evaluate(), "evaluation draws the same episodes for the same weights"
    assert 0 <= metrics["success"] <= 1
    assert trainer.evaluate(TASKS[:1])["turns"] == 1.0
    trainer.eval_dataset = None
    del trainer.eval_rows
    with pytest.raises(ConfigError, match="nothing to evaluate on"):
        trainer.evaluate()


def test_what_users_get_wrong(make_trainer, tmp_path, tokenizer, make_llama):
    with pytest.raises(ConfigError, match="no checkpoint to resume from"):
        make_trainer().train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match="lacks trainer_state"):
        make_trainer().train(resume_from_checkpoint=str(tmp_path))
    with pytest.raises(ConfigError, match="environment and train_dataset"):
        make_trainer(train=None).train()
    with pytest.raises(DataError, match="nowhere"):
        make_trainer(train=str(tmp_path / "nowhere.jsonl")).train()
    with pytest.raises(DataError, match="'prompt'"):
        make_trainer(train=[{"question": "1+1"}]).train()
