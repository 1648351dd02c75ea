"""Expert iteration: who is imitated, the gradient, and a step on texts of one's own."""

import pytest
import torch

from etude.data.batch import Trajectory
from etude.environments.text import TextEnvironment
from etude.errors import ConfigError, DataError
from etude.runtime.run import RunDirectory
from etude.trainers.group_config import IterativeSFTConfig
from etude.trainers.iterative_sft import IterativeSFTTrainer

F64 = torch.float64


@pytest.fixture
def make_trainer(tokenizer, make_llama):
    def make(model=None, **settings):
        config = IterativeSFTConfig(
            **{
                "per_device_train_batch_size": 6,
                "num_generations": 3,
                "learning_rate": 0.1,
                "max_grad_norm": None,
                **settings,
            }
        )
        model = model or make_llama(0, F64)
        optimizer = torch.optim.SGD(model.parameters(), lr=config.learning_rate)
        return IterativeSFTTrainer(model, config, processing_class=tokenizer, optimizers=(optimizer, None))

    return make


def rows_with(scores, vocabulary):
    generator = torch.Generator().manual_seed(1)
    return [
        Trajectory.of_response(
            torch.randint(0, vocabulary, (3,), generator=generator),
            torch.randint(0, vocabulary, (4 + i,), generator=generator),
            score,
        )
        for i, score in enumerate(scores)
    ]


def imitated(model, rows, learning_rate=0.1):
    """Weights after one step on the mean of −log π over the tokens of `rows`, one sequence at a time."""
    parts = []
    for row in rows:
        logits = model(row.token_ids[None]).logits[0].log_softmax(-1)
        parts.append(-logits[row.sampled - 1].gather(-1, row.token_ids[row.sampled][:, None]))
    torch.cat(parts).mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= learning_rate * parameter.grad
    return model.state_dict()


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, [1, 3]),
        ({"keep_best": 2}, [1, 2, 3, 5]),
        ({"min_reward": 0.8}, [1]),
        ({"num_generations": 2, "min_reward": 0.5, "keep_best": 2}, [1, 2, 3, 5]),
    ],
    ids=str,
)
def test_the_best_of_each_task_are_imitated(make_trainer, make_llama, tokenizer, settings, kept):
    rows = rows_with([0.1, 0.9, 0.5, 0.7, 0.2, 0.7], len(tokenizer))
    trainer = make_trainer(**settings)
    trainer.learn(rows)
    expected = imitated(make_llama(0, F64), [rows[i] for i in kept])
    for name, parameter in trainer.model.state_dict().items():
        torch.testing.assert_close(parameter, expected[name], atol=1e-12, rtol=0, msg=name)


def test_tasks_that_tell_nothing_are_left_out(make_trainer, make_llama, tokenizer):
    rows = rows_with([0.5, 0.5, 0.5, 0.1, 0.2, 0.9], len(tokenizer))
    trainer = make_trainer()
    stats = trainer.learn(rows)
    assert stats["frac_reward_zero_std"] == 0.5
    expected = imitated(make_llama(0, F64), rows[5:])
    for name, parameter in trainer.model.state_dict().items():
        torch.testing.assert_close(parameter, expected[name], atol=1e-12, rtol=0, msg=name)


def test_a_step_on_texts_of_your_own(make_trainer, make_llama, tokenizer):
    texts = ["1+1=2", "say something longer"]
    trainer = make_trainer()
    stats = trainer.step(texts=texts)
    tokens = [torch.tensor([*tokenizer(text).input_ids, tokenizer.eos_token_id]) for text in texts]
    rows = [Trajectory(ids, torch.arange(1, len(ids)), 0.0) for ids in tokens]
    model = make_llama(0, F64)
    losses = [model(ids[None], labels=ids[None]).loss * (len(ids) - 1) for ids in tokens]
    assert stats["loss"] == pytest.approx((sum(losses) / sum(len(ids) - 1 for ids in tokens)).item())
    expected = imitated(make_llama(0, F64), rows)
    for name, parameter in trainer.model.state_dict().items():
        torch.testing.assert_close(parameter, expected[name], atol=1e-12, rtol=0, msg=name)
    assert trainer.current_step == 1

    again, ids = make_trainer(), tokens[1]
    labels = ids.clone()
    labels[:5] = -100
    again.step([ids], [labels])
    expected = imitated(make_llama(0, F64), [Trajectory(ids, torch.arange(5, len(ids)), 0.0)])
    torch.testing.assert_close(again.model.lm_head.weight, expected["lm_head.weight"], atol=1e-12, rtol=0)


def test_what_users_get_wrong(make_trainer, tokenizer):
    trainer = make_trainer()
    ids = torch.arange(4)
    with pytest.raises(DataError, match="either texts or input_ids"):
        trainer.step()
    with pytest.raises(DataError, match="labels belong to input_ids"):
        trainer.step(labels=[ids], texts=["a"])
    with pytest.raises(DataError, match="1 input_ids and 2 labels"):
        trainer.step([ids], [ids, ids])
    with pytest.raises(DataError, match=r"input_ids\[0\] has shape \(4,\) and labels\[0\] \(3,\)"):
        trainer.step([ids], [ids[:3]])
    with pytest.raises(DataError, match="nothing to imitate"):
        trainer.step([ids], [torch.full((4,), -100)])
    with pytest.raises(DataError, match="nothing to imitate"):
        trainer.step([])
    with pytest.raises(ConfigError, match="beta does nothing"):
        IterativeSFTConfig(beta=0.1)


def test_it_learns(tokenizer, make_llama, tmp_path):
    model = make_llama()

    def vowel_share(completions):
        return [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in completions]

    environment = TextEnvironment(
        model, tokenizer, rewards=vowel_share, max_turns=1, generation_kwargs={"max_new_tokens": 8}
    )
    config = IterativeSFTConfig(
        output_dir=str(tmp_path / "run"),
        per_device_train_batch_size=8,
        num_generations=8,
        steps_per_generation=2,
        max_steps=30,
        learning_rate=3e-3,
        eval_steps=0,
        disable_progress=True,
    )
    tasks = [{"prompt": f"say {word}:"} for word in ("one", "two", "three", "four")]
    IterativeSFTTrainer(model, config, environment=environment, train_dataset=tasks).train()
    rewards = [row["reward"] for row in RunDirectory(tmp_path / "run").read_metrics() if "reward" in row]
    assert sum(rewards[-4:]) > sum(rewards[:4]) + 0.3
