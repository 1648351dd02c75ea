"""A reward adapter scores the episodes of a run by the very weights that the run trains."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from etude.environments.text import TextEnvironment
from etude.errors import ConfigError, ModelError, RewardError
from etude.models.adapters import current_peft, lora_config
from etude.models.value_head import AutoModelForCausalLMWithValueHead
from etude.protocols import Reward
from etude.rewards.adapter import AdapterReward
from etude.runtime.loop import run_sync
from etude.runtime.run import RunDirectory
from etude.trainers.ppo import PPOTrainer
from etude.trainers.ppo_config import PPOConfig

TASKS = [{"prompt": f"say {word}:"} for word in ("one", "two", "three", "forty four")]


@pytest.fixture
def make(make_llama, tmp_path):
    """A model with a policy adapter and a reward adapter, and peft's own reward model."""

    def of(labels=1):
        make_llama().save_pretrained(tmp_path / "base")
        options = {"num_labels": labels, "pad_token_id": 0}
        classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", **options)
        config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear", init_lora_weights=False)
        torch.manual_seed(1)
        with current_peft():
            reward_model = get_peft_model(classifier, config).eval()
        reward_model.save_pretrained(tmp_path / "reward")
        model = AutoModelForCausalLMWithValueHead.from_pretrained(
            tmp_path / "base", peft_config=lora_config(4, 8), reward_adapter=tmp_path / "reward"
        )
        return model, reward_model

    return of


def environment(model, tokenizer, rewards):
    return TextEnvironment(
        model, tokenizer, rewards=rewards, max_turns=1, generation_kwargs={"max_new_tokens": 9}, seed=0
    )


def expected_scores(reward_model, episodes, label=0):
    with torch.no_grad():
        ids = [torch.tensor([episode.token_ids]) for episode in episodes]
        return [reward_model(input_ids=each).logits[0, label].item() for each in ids]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize(("labels", "label"), [(1, None), (2, None), (2, 0)])
def test_the_score_of_an_episode_is_that_of_its_last_token(make, tokenizer, batch_size, labels, label):
    model, reward_model = make(labels)
    reward = AdapterReward(model, label=label, batch_size=batch_size)
    assert isinstance(reward, Reward)
    episodes = run_sync(environment(model, tokenizer, reward).run_episodes(TASKS))
    assert len({len(episode.token_ids) for episode in episodes}) > 1
    scores = [episode.reward for episode in episodes]
    chosen = labels - 1 if label is None else label
    assert scores == pytest.approx(expected_scores(reward_model, episodes, chosen), abs=1e-5)
    assert len(set(scores)) == len(scores)
    assert run_sync(reward([])) == []


def test_a_run_whose_reward_is_an_adapter(make, tokenizer, tmp_path):
    model, reward_model = make()
    reward = AdapterReward(model)
    kept = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert not any("reward" in name for name in trained)
    config = PPOConfig(
        output_dir=str(tmp_path / "run"),
        batch_size=4,
        mini_batch_size=2,
        steps=12,
        eval_steps=0,
        save_steps=1,
        save_total_limit=None,
        learning_rate=1e-2,
        disable_progress=True,
    )

    def trainer():
        env = environment(model, tokenizer, reward)
        return PPOTrainer(config, model, environment=env, train_dataset=TASKS)

    first = trainer()
    seen, learn = [], first.learn

    def watched(trajectories):
        seen.append((first.sampler.policy_version, trajectories))
        return learn(trajectories)

    first.learn = watched
    first.train()
    # One version per update and none for scoring, and the sampler's log-probabilities are the policy's own.
    assert [version for version, _ in seen] == [0, 1, 2]
    metrics = [row for row in RunDirectory(config.output_dir).read_metrics() if "reward" in row]
    assert max(row["sampler/gap_max"] for row in metrics) < 2e-4
    assert abs(metrics[0]["objective/kl"]) < 1e-5
    assert abs(metrics[-1]["objective/kl"]) > 1e-4, "the policy moved; its reference and its judge did not"
    for _, trajectories in seen:
        for t in trajectories:
            with torch.no_grad():
                score = reward_model(input_ids=t.token_ids[None]).logits[0, 0].item()
            assert t.score == pytest.approx(score, abs=1e-5)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    for name, parameter in model.named_parameters():
        if name in kept:
            assert torch.equal(parameter, kept[name]), name
    for place in ("run", "run/checkpoint-2"):
        assert not list((tmp_path / place).glob("*reward*"))

    # Checkpoints hold the policy alone, and put it back beside the reward adapter.
    after = {name: p.clone() for name, p in model.named_parameters()}
    trainer().train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, after[name]), name


def test_what_users_get_wrong(make, tokenizer, make_llama):
    model, _ = make(3)
    with pytest.raises(ConfigError, match="which of 3 scores counts; expected 0 to 2"):
        AdapterReward(model)
    with pytest.raises(ConfigError, match="which of 3 scores"):
        AdapterReward(model, label=3)
    with pytest.raises(ConfigError, match="batch_size is 0"):
        AdapterReward(model, label=1, batch_size=0)
    for without in (AutoModelForCausalLMWithValueHead(make_llama()), make_llama()):
        with pytest.raises(ModelError, match="has no reward adapter; expected a value-head model"):
            AdapterReward(without)
    reward = AdapterReward(model, label=1)
    with torch.no_grad():
        reward.adapter.score.weight.fill_(float("nan"))
    with pytest.raises(RewardError, match="'reward_adapter' returned nan"):
        run_sync(environment(model, tokenizer, reward).run_episodes(TASKS))
