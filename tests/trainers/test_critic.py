"""A run with a value model of its own: it learns, is saved, resumed, and kept with the best."""

import copy

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from etude.environments.text import TextEnvironment
from etude.errors import CheckpointError, ConfigError, ModelError
from etude.models.adapters import add_adapter, lora_config
from etude.models.value_head import AutoModelForCausalLMWithValueHead
from etude.models.value_model import ValueModel
from etude.runtime.run import RunDirectory
from etude.trainers.ppo import PPOTrainer
from etude.trainers.ppo_config import PPOConfig

TASKS = [{"prompt": f"say {word}:"} for word in ("one", "two", "three", "four", "five", "six", "seven")]
IDS = torch.tensor([[3, 9, 27, 4, 8], [5, 25, 1, 7, 2]])
SETTINGS = {"batch_size": 8, "mini_batch_size": 4, "ppo_epochs": 2, "init_kl_coef": 0.02}


def vowels(completions):
    return [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in completions]


@pytest.fixture
def make_trainer(tokenizer, make_llama, make_gpt2, tmp_path):
    def make(directory="run", policy=None, critic="gpt2", **settings):
        policy = make_llama() if policy is None else policy
        torch.manual_seed(3)
        if critic == "gpt2":
            critic = ValueModel(make_gpt2(7))
        elif critic == "lora":
            base = tmp_path / "critic-base"
            make_gpt2(7).save_pretrained(base)
            critic = AutoModelForCausalLMWithValueHead.from_pretrained(base, peft_config=lora_config(2, 8))
        env = TextEnvironment(
            policy, tokenizer, rewards=vowels, max_turns=1, generation_kwargs={"max_new_tokens": 8}
        )
        settings = {
            **SETTINGS,
            "output_dir": str(tmp_path / directory),
            "steps": 8 * 4,
            "learning_rate": 3e-3,
            "eval_steps": 0,
            "success_reward": 0.3,
            "disable_progress": True,
            **settings,
        }
        return PPOTrainer(
            PPOConfig(**settings),
            policy,
            value_model=critic,
            environment=env,
            train_dataset=TASKS,
            eval_dataset=TASKS[:4],
        )

    return make


def weights(*models):
    return [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in models]


def assert_equal(one, other):
    for mine, theirs in zip(one, other, strict=True):
        for name, tensor in mine.items():
            assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("critic", ["gpt2", "lora"])
def test_a_resumed_run_is_the_same_run(make_trainer, tmp_path, critic):
    whole = make_trainer("whole", save_steps=2, critic=critic)
    before = weights(whole.value_model)
    whole.train()
    assert isinstance(whole.value_model, ValueModel)
    moved = {
        name for name, tensor in whole.value_model.state_dict().items() if (tensor != before[0][name]).any()
    }
    assert any("v_head" in name for name in moved)
    assert any("h.0." in name for name in moved)
    assert critic != "lora" or all("lora" in name or "v_head" in name for name in moved)
    first = make_trainer("parts", save_steps=2, critic=critic)
    first.config.steps = 8 * 2
    first.train()
    second = make_trainer("parts", save_steps=2, critic=critic)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    assert_equal(weights(whole.model, whole.value_model), weights(second.model, second.value_model))
    losses = [
        [row["ppo/loss/value"] for row in RunDirectory(tmp_path / run).read_metrics()]
        for run in ("whole", "parts")
    ]
    assert losses[0] == losses[1]

    # It lies beside the policy, in the run and in each checkpoint, and is a value model by itself.
    for place in ("whole", "whole/checkpoint-4"):
        saved = ValueModel.from_pretrained(tmp_path / place / "value_model").eval()
        with torch.no_grad():
            torch.testing.assert_close(saved(input_ids=IDS), whole.value_model.eval()(input_ids=IDS))


def test_values_improve_and_the_policy_s_trunk_is_not_moved_by_them(make_trainer):
    """With a policy that doesn't learn, the value loss still falls."""
    trainer = make_trainer(learning_rate=0.0, value_learning_rate=3e-3, steps=8 * 10, ppo_epochs=4)
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [0.0, 3e-3]
    before = weights(trainer.model)
    trainer.train()
    assert_equal(before, weights(trainer.model))
    losses = [row["ppo/val/error"] for row in RunDirectory(trainer.config.output_dir).read_metrics()]
    assert sum(losses[-3:]) < sum(losses[:3]) / 2


def test_the_best_checkpoint_s_value_model_is_kept(make_trainer):
    trainer = make_trainer(eval_steps=1)
    scores = iter([0.0, 0.5, 1.0, 0.25, 0.0])  # validation before training and after each iteration
    best = []

    def evaluate(rows):
        success = next(scores)
        if success == 1.0:
            best.extend(weights(trainer.model, trainer.value_model))
        return {"success": success}, []

    trainer._evaluate = evaluate
    assert trainer.train().best_step == 2
    assert_equal(weights(trainer.model, trainer.value_model), best)
    saved = ValueModel.from_pretrained(f"{trainer.config.output_dir}/value_model")
    assert_equal(weights(saved), best[1:])


def test_beside_a_policy_with_adapters(make_trainer, make_llama):
    policy = add_adapter(make_llama(), lora_config(4, 8))
    trainer = make_trainer(policy=policy)
    asked = []
    trainer.value_model.register_forward_hook(lambda *_: asked.append(torch.is_grad_enabled()))
    frozen = {name: p.clone() for name, p in policy.named_parameters() if not p.requires_grad}
    before = weights(trainer.model, trainer.value_model)
    trainer.train()
    assert trainer.model is policy
    for name, parameter in policy.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
    after = weights(trainer.model, trainer.value_model)
    for one, other in zip(before, after, strict=True):
        assert any(not torch.equal(one[name], other[name]) for name in one)
    assert asked.count(False) == 4 * 2, "once for each observed mini-batch: the reference needs no values"


def test_a_reward_model_gives_the_first_values(tokenizer, make_llama, tmp_path):
    make_llama(7).save_pretrained(tmp_path / "base")
    options = {"num_labels": 1, "pad_token_id": tokenizer.pad_token_id}
    reward_model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", **options).eval()
    reward_model.save_pretrained(tmp_path / "reward")
    config = PPOConfig(batch_size=2, mini_batch_size=2, learning_rate=0.0)
    policy = make_llama(dtype=torch.float64)
    trainer = PPOTrainer(config, policy, tokenizer=tokenizer, value_model=str(tmp_path / "reward"))
    assert trainer.value_model.dtype == torch.float64, "in the policy's precision"
    observed = []
    observe = trainer.learner.observe
    trainer.learner.observe = lambda *args: observed.append(observe(*args)) or observed[0]
    trainer.step([IDS[0, :2], IDS[1, :3]], [IDS[0, 2:], IDS[1, 3:]], [1.0, 0.0])
    reward_model.double()
    for row, (ids, start) in enumerate(zip(IDS, (2, 3), strict=True)):
        for n, t in enumerate(range(start, 5)):
            expected = reward_model(input_ids=ids[None, :t]).logits[0, 0]
            torch.testing.assert_close(observed[0].values[row, n], expected)


def test_a_value_head_that_the_policy_came_with_is_left_out(make_trainer, make_llama, tmp_path):
    policy = AutoModelForCausalLMWithValueHead(make_llama())
    trainer = make_trainer(policy=policy, steps=8)
    assert trainer.model is policy.pretrained_model
    trainer.train()
    assert not (tmp_path / "run" / "value_head.safetensors").exists()


def test_what_users_get_wrong(make_trainer, make_llama, make_gpt2, tokenizer, tmp_path):
    policy = make_llama()
    with pytest.raises(ConfigError, match=r"made of the policy's own weights; pass a copy"):
        make_trainer(policy=policy, critic=policy)
    make_trainer(policy=policy, critic=copy.deepcopy(policy))
    with pytest.raises(ModelError, match=r"knows 40 tokens and the policy's tokenizer has"):
        make_trainer(critic=make_gpt2(vocab_size=40))
    with pytest.raises(ConfigError, match="value_learning_rate is of a value model"):
        PPOTrainer(PPOConfig(value_learning_rate=1e-3), policy, tokenizer=tokenizer)
    critic = ValueModel(make_gpt2())
    config = PPOConfig(**SETTINGS)
    for parameters in (policy.parameters(), [*policy.parameters(), *critic.v_head.parameters()]):
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        with pytest.raises(ConfigError, match="doesn't hold the value model's parameters"):
            PPOTrainer(config, policy, tokenizer=tokenizer, optimizer=optimizer, value_model=critic)
    optimizer = torch.optim.SGD([*policy.parameters(), *critic.parameters()], lr=0.1)
    config = PPOConfig(**SETTINGS, value_learning_rate=0.1)
    with pytest.raises(ConfigError, match="give yours a group of its own"):
        PPOTrainer(config, policy, tokenizer=tokenizer, optimizer=optimizer, value_model=critic)

    shared = make_trainer("shared", critic=None, save_steps=1, steps=8)
    shared.train()
    with pytest.raises(CheckpointError, match=r"holds no value_model.*resume it without value_model"):
        make_trainer("shared").train(resume_from_checkpoint=True)
