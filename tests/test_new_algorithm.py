"""The example of a new algorithm: its formula by hand, its step by brute force, its run, and its page."""

import importlib
import math
import re
import statistics
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import etude
from etude.data.batch import Trajectory
from etude.errors import ConfigError
from etude.runtime.run import RunDirectory

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "new-algorithm.md"
FILE = ROOT / "examples" / "new_algorithm.py"
F64 = torch.float64


@pytest.fixture(scope="module")
def sapo():
    """The example as a user's own module, found beside the calculator example that it imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FILE.parent)
        yield importlib.import_module("new_algorithm")
    for name in ("new_algorithm", "calculator"):
        sys.modules.pop(name, None)


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)


def plain_loss(ratio, advantage, tau_pos=1.0, tau_neg=1.05):
    tau = tau_pos if advantage > 0 else tau_neg
    return -advantage * 4 / tau / (1 + math.exp(-tau * (ratio - 1)))


@given(st.floats(-2, 2), st.floats(-3, 3), st.floats(0.2, 5), st.floats(0.2, 5))
def test_the_formula(sapo, moved, advantage, tau_pos, tau_neg):
    logprobs = torch.tensor([[-1.0 + moved]], dtype=F64, requires_grad=True)
    old, advantages = torch.tensor([[-1.0]], dtype=F64), torch.tensor([[advantage]], dtype=F64)
    loss, ratio = sapo.sapo_loss(logprobs, old, advantages, tau_pos, tau_neg)
    assert ratio.item() == pytest.approx(math.exp(moved))
    assert loss.item() == pytest.approx(plain_loss(math.exp(moved), advantage, tau_pos, tau_neg))
    [gradient] = torch.autograd.grad(loss.sum(), logprobs)
    # 4 σ (1 − σ) · ρ A, the weight that the paper gives a token
    tau = tau_pos if advantage > 0 else tau_neg
    gate = 1 / (1 + math.exp(-tau * (math.exp(moved) - 1)))
    assert gradient.item() == pytest.approx(-4 * gate * (1 - gate) * math.exp(moved) * advantage)


def test_numbers_by_hand(sapo):
    """ρ = 1: σ(0) = ½, so −2 A / τ, and the gradient is the policy gradient, −A."""
    logprobs = torch.zeros(1, 2, dtype=F64, requires_grad=True)
    loss, _ = sapo.sapo_loss(logprobs, torch.zeros(1, 2, dtype=F64), torch.tensor([[3.0, -2.0]]), 1.0, 2.0)
    assert loss.tolist() == [[-6.0, 2.0]]
    [gradient] = torch.autograd.grad(loss.sum(), logprobs)
    assert gradient.tolist() == [[-3.0, 2.0]]


def episodes(vocabulary):
    """Two tasks, three times each; tokens that weren't sampled in between; in one, none was."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for i, score in enumerate((1.0, 0.0, 0.5, 0.0, 2.0, 1.0)):
        tokens = torch.randint(0, vocabulary, (6 + i,), generator=generator)
        mask = torch.tensor([1, 1, 0, 1] + [i % 2] * (i + 1)) if i != 5 else torch.zeros(10)
        rows.append(Trajectory.of_response(tokens[:1], tokens[1:], score, mask[: len(tokens) - 1]))
    return rows


def logprobs_of(model, row):
    logits = model(row.token_ids[None]).logits[0].log_softmax(-1)
    return logits[row.sampled - 1].gather(-1, row.token_ids[row.sampled][:, None])[:, 0]


def test_two_steps_on_a_batch_equal_a_brute_force(sapo, tokenizer, make_llama):
    """In the second one the policy has moved: it takes the gate to get it right."""
    rate, ours, plain = 0.5, make_llama(0, F64), make_llama(0, F64)
    config = sapo.SAPOConfig(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        num_generations=3,
        num_iterations=2,
        tau_pos=1.5,
        tau_neg=4.0,
        max_grad_norm=None,
    )
    optimizer = torch.optim.SGD(ours.parameters(), lr=rate)
    trainer = sapo.SAPOTrainer(ours, config, processing_class=tokenizer, optimizers=(optimizer, None))
    rows = episodes(len(tokenizer))
    stats = trainer.learn(rows)

    acting = [i for i, row in enumerate(rows) if len(row.sampled)]
    assert acting == [0, 1, 2, 3, 4]
    with torch.no_grad():
        old = {i: logprobs_of(plain, rows[i]) for i in acting}
    ratios = []
    for _ in range(2):
        loss = torch.zeros((), dtype=F64)
        for i in acting:
            group = [rows[j].score for j in acting if j // 3 == i // 3]
            advantage = (rows[i].score - statistics.fmean(group)) / (statistics.stdev(group) + 1e-4)
            tau = 1.5 if advantage > 0 else 4.0
            ratio = (logprobs_of(plain, rows[i]) - old[i]).exp()
            ratios += ratio.tolist()
            gate = 4 / tau / (1 + (-tau * (ratio - 1)).exp())
            loss = loss - (gate * advantage).mean() / len(acting)
        plain.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter -= rate * parameter.grad
    for (name, parameter), expected in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, atol=1e-10, rtol=0, msg=name)
    assert min(ratios) < 0.7, "far from 1"
    assert max(ratios) > 1.3
    assert stats["ratio"] == pytest.approx(statistics.fmean(ratios))
    assert stats["clip_ratio"] == 0.0


@pytest.mark.parametrize("settings", [{"tau_pos": 0.0}, {"tau_neg": -1.0}, {"beta": 0.1}], ids=str)
def test_settings_that_mean_nothing(sapo, settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        sapo.SAPOConfig(**settings)


def test_the_whole_way(sapo, tmp_path, monkeypatch):
    """With a few steps of each kind, and a reward that a model without practice gets, too."""
    monkeypatch.chdir(ROOT)
    example = importlib.import_module("calculator")
    monkeypatch.setattr(example, "SIZES", {"train": 64, "validation": 1, "test": 8})
    monkeypatch.setattr(example, "DEMONSTRATIONS", 64)
    monkeypatch.setattr(example, "exact_answer", lambda completions: [len(text) % 2 for text in completions])
    sapo.train(tmp_path, warm_up=2, max_steps=8)
    run = RunDirectory(tmp_path)
    assert [row["step"] for row in run.read_metrics() if "reward" in row] == [1, 2]
    assert run.read_config()["tau_neg"] == 1.05
    assert "SAPOTrainer" in (tmp_path / "README.md").read_text("utf-8")
    assert len(run.read_episodes(split="after")) == 8


def test_the_page_shows_the_file_as_it_is():
    assert FILE.read_text("utf-8") in blocks("python")
    assert len(FILE.read_text("utf-8").splitlines()) <= 120
    imported = re.findall(r"^from (etude\S*) import (.*)$", FILE.read_text("utf-8"), re.MULTILINE)
    assert {module for module, _ in imported} == {
        *("etude", "etude.app.cli", "etude.errors", "etude.math.group", "etude.math.losses"),
        "etude.tools.calculator",
    }


def test_the_page_s_hooks_are_the_trainer_s():
    """Each method in the table is one that an algorithm may override, or has to."""
    rows = dict(re.findall(r"^\| `(\w+)` \| (\w+)", PAGE.read_text("utf-8"), re.MULTILINE))
    trainer = etude.GroupTrainer
    algorithm = {"credit", "loss", "penalised", "spread", "chosen"}
    assert set(rows) == algorithm
    assert {name for name, needed in rows.items() if needed == "yes"} == algorithm & set(
        trainer.__abstractmethods__
    )
    assert trainer.__abstractmethods__ == {"credit", "loss"}
    for method in algorithm:
        assert callable(getattr(trainer, method))


def test_the_page_s_other_snippets(sapo, tmp_path, monkeypatch, tokenizer, make_llama):
    monkeypatch.chdir(tmp_path)
    model = make_llama()
    names = {
        "model": model,
        "env": etude.TextEnvironment(
            None,
            tokenizer,
            rewards=lambda completions: [float("e" in text) for text in completions],
            generation_kwargs={"max_new_tokens": 6},
        ),
        "tasks": [{"prompt": "say:"}] * 8,
    }
    others = [block for block in blocks("python") if block != FILE.read_text("utf-8")]
    assert others
    for block in others:
        exec(block.replace("max_steps=500", "max_steps=1, disable_progress=True"), names)
    assert (tmp_path / "runs" / "sapo" / "report.html").exists()
