import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from peft import LoraConfig
from scoring_models import encoder_tokenizer, make
from torch.nn.functional import cross_entropy
from transformers import AutoModelForTokenClassification

from etude.errors import ConfigError, DataError, ModelError
from etude.models.reward_model import load_reward_model
from etude.trainers.prm import PRMTrainer
from etude.trainers.reward_config import PRMConfig

ROWS = [
    {
        "prompt": f"count to {a}:",
        "completions": [f"step {b}" + "o" * a for b in range(1 + a % 3)],
        "labels": [b != a % 2 for b in range(1 + a % 3)],
    }
    for a in range(6)
]


def climbing(count: int, seed: int) -> list[dict[str, Any]]:
    """A step is right if its digit is larger than the one before."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        digits = [draw.randrange(10) for _ in range(4)]
        right = [after > before for before, after in pairwise(digits)]
        steps = [str(digit) for digit in digits[1:]]
        rows.append({"prompt": f"from {digits[0]}: ", "completions": steps, "labels": right})
    return rows


@pytest.fixture
def make_trainer(tmp_path, tokenizer):
    def build(model: Any = None, rows: Any = ROWS, tokenizer: Any = tokenizer, **options: Any) -> PRMTrainer:
        given = {name: options.pop(name) for name in ("eval_dataset", "peft_config") if name in options}
        if model is None:
            model = make("Llama", "TokenClassification", len(tokenizer))
        defaults: dict[str, Any] = {
            "output_dir": str(tmp_path), "overwrite_output_dir": True, "max_steps": 1,
            "per_device_train_batch_size": len(ROWS), "save_strategy": "no", "disable_tqdm": True,
            "use_cpu": True, "logging_steps": 1, "step_separator": ".",
        }  # fmt: skip
        args = PRMConfig(**defaults | options)
        return PRMTrainer(model, args, train_dataset=rows, processing_class=tokenizer, **given)

    return build


def logits_of_steps(model: Any, tokenizer: Any, rows: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [M, 2] after each step's separator, each answer alone, and labels [M]."""
    logits, labels = [], []
    for row in rows:
        text = row["prompt"]
        ends = []
        for step in row["completions"]:
            text += step + "."
            ends.append(len(tokenizer(text)["input_ids"]) - 1)
        with torch.no_grad():
            logits.append(model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0, ends])
        labels += row["labels"]
    return torch.cat(logits), torch.tensor(labels).long()


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Bloom"])
def test_the_logged_loss_and_metrics_are_those_of_each_answer_alone(make_trainer, tokenizer, family):
    model = make(family, "TokenClassification", len(tokenizer))
    logits, labels = logits_of_steps(model, tokenizer, ROWS)
    trainer = make_trainer(model, eval_dataset=ROWS, per_device_eval_batch_size=4)
    metrics = trainer.evaluate()
    trainer.train()
    logged = next(row for row in trainer.state.log_history if "loss" in row)
    expected = cross_entropy(logits, labels).item()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert logged["loss"] == pytest.approx(expected, rel=1e-5)
    hits = logits.argmax(1) == labels
    right = logits.softmax(1)[:, 1]
    for found, prefix in ((metrics, "eval_"), (logged, "")):
        assert found[f"{prefix}accuracy"] == pytest.approx(hits.float().mean().item())
        assert found[f"{prefix}accuracy_right"] == pytest.approx(hits[labels == 1].float().mean().item())
        assert found[f"{prefix}accuracy_wrong"] == pytest.approx(hits[labels == 0].float().mean().item())
        assert found[f"{prefix}brier"] == pytest.approx((right - labels).square().mean().item(), abs=1e-5)
        assert 0 <= found[f"{prefix}calibration_error"] <= 1


@pytest.mark.parametrize("size", [1, 4])
def test_accumulated_batches_equal_one_batch(make_trainer, tokenizer, size):
    """Answers differ in their steps: a mean of means would give other weights."""

    def trained(size: int) -> dict[str, torch.Tensor]:
        model = make("Llama", "TokenClassification", len(tokenizer)).double()
        make_trainer(
            model, per_device_train_batch_size=size, gradient_accumulation_steps=-(-len(ROWS) // size),
            optim="sgd", learning_rate=0.5, lr_scheduler_type="constant",
        ).train()  # fmt: skip
        return model.state_dict()

    whole, parts, start = (
        trained(len(ROWS)),
        trained(size),
        make("Llama", "TokenClassification", len(tokenizer)),
    )
    assert max((whole[name] - w).abs().max().item() for name, w in start.state_dict().items()) > 1e-2
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("way", ["Llama", "GPT2 by LoRA"])
def test_it_learns_which_steps_are_right(make_trainer, tokenizer, tmp_path, way):
    adapter = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear") if "LoRA" in way else None
    make(way.split()[0], "CausalLM", len(tokenizer)).save_pretrained(tmp_path / "start")
    trainer = make_trainer(
        str(tmp_path / "start"), climbing(300, seed=1), eval_dataset=climbing(100, seed=2),
        peft_config=adapter, max_steps=60, per_device_train_batch_size=32,
        learning_rate=3e-3 if adapter is None else 1e-2,
        lr_scheduler_type="constant", per_device_eval_batch_size=50,
    )  # fmt: skip
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy_wrong"] > 0.55
    assert metrics["eval_accuracy_right"] > 0.8
    trainer.save_model(str(tmp_path / "saved"))
    loaded = load_reward_model(tmp_path / "saved", "token")
    ours, theirs = (logits_of_steps(m, tokenizer, ROWS)[0] for m in (trainer.model.eval(), loaded))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    if adapter is None:
        assert AutoModelForTokenClassification.from_pretrained(tmp_path / "saved").config.num_labels == 2


def read(trainer: PRMTrainer, tokenizer: Any, number: int = 0) -> list[str]:
    """The text up to each step that is judged, and all of it."""
    row = trainer.train_dataset[number]
    ends = [*row["ends"], len(row["input_ids"]) - 1]
    return ["".join(tokenizer.convert_ids_to_tokens(row["input_ids"][: end + 1])) for end in ends]


def test_what_is_read_of_a_row(make_trainer, tokenizer):
    row = [{"prompt": "q ", "completions": ["a", "bc"], "labels": [True, False]}]
    assert read(make_trainer(rows=row), tokenizer) == ["q a.", "q a.bc.", "q a.bc."]
    trainer = make_trainer(rows=row, step_separator="", train_on_last_step_only=True)
    assert read(trainer, tokenizer) == ["q abc", "q abc"]
    assert trainer.train_dataset[0]["labels"] == [0]
    encoders = encoder_tokenizer()
    model = make("Bert", "TokenClassification", len(encoders))
    trainer = make_trainer(model, row, encoders)
    assert read(trainer, encoders) == ["[CLS]q a.", "[CLS]q a.bc.", "[CLS]q a.bc.[SEP]"]


def test_steps_that_max_length_cuts_off_are_not_learned(make_trainer, tokenizer, caplog):
    row = {"prompt": "q ", "completions": ["a", "bcd"], "labels": [True, False]}
    trainer = make_trainer(rows=[row], max_length=5)
    assert read(trainer, tokenizer) == [".", ".bcd.", ".bcd."]
    trainer = make_trainer(rows=[row], max_length=4)
    assert (read(trainer, tokenizer), trainer.train_dataset[0]["labels"]) == (["bcd.", "bcd."], [0])
    assert "1 of 1 rows are longer than max_length=4 and are cut" in caplog.text
    with pytest.raises(DataError, match=r"expected one of these combinations: prompt \+ completions"):
        make_trainer(rows=[{"prompt": "a", "completion": "b"}])
    with pytest.raises(DataError, match="row 0: there are 1 steps and 2 labels"):
        make_trainer(rows=[{"prompt": "a", "completions": ["b"], "labels": [True, False]}])


def test_models_and_settings_that_do_not_fit(make_trainer, tokenizer, tmp_path):
    with pytest.raises(ModelError, match="scores sequences; expected a model that scores tokens"):
        make_trainer(make("Llama", "SequenceClassification", len(tokenizer)))
    with pytest.raises(ConfigError, match="append_eos does nothing here"):
        PRMConfig(output_dir=str(tmp_path), append_eos=True)
