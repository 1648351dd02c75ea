import logging
import random
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig
from scoring_models import encoder_tokenizer, make
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification

from etude.errors import ConfigError, DataError, ModelError
from etude.math.calibration import expected_calibration_error, reliability_bins
from etude.models.reward_model import load_reward_model
from etude.models.score_reader import ScoreReader
from etude.models.value_head import AutoModelForCausalLMWithValueHead
from etude.models.value_model import ValueModel
from etude.trainers.reward import RewardTrainer
from etude.trainers.reward_config import RewardConfig
from etude.trainers.sft_config import SFTConfig

# Of different lengths, with prompts long enough to be shared.
ROWS = [
    {
        "prompt": f"which of these is better, say {a}:",
        "chosen": "ab" * (1 + a),
        "rejected": "c" * (4 - a // 2),
        "margin": a / 4,
    }
    for a in range(8)
]
PLAIN = [{name: value for name, value in row.items() if name != "margin"} for row in ROWS]


def preferences(count: int, seed: int) -> list[dict[str, str]]:
    """The larger number is the better answer."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        low, high = sorted(draw.sample(range(10, 100), 2))
        rows.append({"prompt": "more: ", "chosen": str(high), "rejected": str(low)})
    return rows


def settings(directory: Any, **options: Any) -> RewardConfig:
    defaults: dict[str, Any] = {
        "output_dir": str(directory),
        "overwrite_output_dir": True,
        "max_steps": 1,
        "per_device_train_batch_size": len(ROWS),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 1,
    }
    return RewardConfig(**defaults | options)


@pytest.fixture
def make_trainer(tmp_path, tokenizer):
    def build(
        model: Any = None, rows: Any = ROWS, tokenizer: Any = tokenizer, **options: Any
    ) -> RewardTrainer:
        parts = {
            name: options.pop(name)
            for name in ("eval_dataset", "peft_config", "compute_metrics")
            if name in options
        }
        if model is None:
            model = make("Llama", "SequenceClassification", len(tokenizer))
        return RewardTrainer(
            model, settings(tmp_path, **options), train_dataset=rows, processing_class=tokenizer, **parts
        )

    return build


def score(model: Any, tokenizer: Any, text: str) -> torch.Tensor:
    """Of the text alone, after its end-of-sequence token."""
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([ids])).logits[0, 0]
    return logits


def scores(model: Any, tokenizer: Any, rows: Any) -> torch.Tensor:
    """[P, 2]"""
    return torch.stack(
        [
            torch.stack(
                [score(model, tokenizer, row["prompt"] + row[name]) for name in ("chosen", "rejected")]
            )
            for row in rows
        ]
    )


# ---- the loss and the metrics ----


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Bloom"])
@pytest.mark.parametrize("coefficient", [None, 0.1])
@pytest.mark.parametrize("rows", [ROWS, PLAIN], ids=["margins", "none"])
def test_the_logged_loss_is_that_of_each_pair_alone(make_trainer, tokenizer, family, coefficient, rows):
    """The padding token is the end-of-sequence token, after which the score is read."""
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    model = make(family, "SequenceClassification", len(tokenizer), pad_token_id=None)
    scores_P2 = scores(model, tokenizer, rows)
    margins_P = torch.tensor([row.get("margin", 0.0) for row in rows])
    expected = -logsigmoid(scores_P2[:, 0] - scores_P2[:, 1] - margins_P).mean()
    expected = expected + (coefficient or 0) * scores_P2.sum(1).square().mean()
    trainer = make_trainer(model, rows, center_rewards_coefficient=coefficient)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert logged["margin"] == pytest.approx((scores_P2[:, 0] - scores_P2[:, 1]).mean().item(), abs=1e-5)
    assert logged["mean_reward"] == pytest.approx(scores_P2.mean().item(), abs=1e-5)
    assert logged["accuracy"] == (scores_P2[:, 0] > scores_P2[:, 1]).float().mean().item()


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_metrics_of_an_evaluation_are_those_of_its_pairs(make_trainer, tokenizer, batch):
    model = make("Llama", "SequenceClassification", len(tokenizer))
    scores_P2 = scores(model, tokenizer, ROWS)
    probabilities = (scores_P2[:, 0] - scores_P2[:, 1]).sigmoid()
    bins = reliability_bins(probabilities, torch.ones(len(ROWS)))
    trainer = make_trainer(model, eval_dataset=ROWS, per_device_eval_batch_size=batch)
    metrics = trainer.evaluate()
    expected = {
        "accuracy": (scores_P2[:, 0] > scores_P2[:, 1]).float().mean(),
        "margin": (scores_P2[:, 0] - scores_P2[:, 1]).mean(),
        "mean_reward": scores_P2.mean(),
        "brier": (1 - probabilities).square().mean(),
        "calibration_error": expected_calibration_error(bins),
    }
    assert 0 < expected["accuracy"] < 1
    for name, value in expected.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value.item(), abs=1e-5), name
    assert not any("gap" in name for name in metrics)


def test_your_own_metrics_get_the_scores_of_both(make_trainer, tokenizer):
    model = make("Llama", "SequenceClassification", len(tokenizer))
    expected = scores(model, tokenizer, ROWS)
    seen = {}

    def lowest(evaluated: Any) -> dict[str, float]:
        seen["labels"], seen["scores"] = evaluated.label_ids, evaluated.predictions
        return {"lowest": float(evaluated.predictions.min())}

    trainer = make_trainer(model, eval_dataset=ROWS, per_device_eval_batch_size=3, compute_metrics=lowest)
    assert trainer.evaluate()["eval_lowest"] == pytest.approx(expected.min().item(), abs=1e-5)
    np.testing.assert_allclose(seen["scores"], expected.numpy(), atol=1e-5)
    assert seen["labels"].tolist() == [0] * len(ROWS)


@pytest.mark.parametrize("family", ["Llama", "Bert"])
def test_accumulated_batches_equal_one_batch(make_trainer, tokenizer, family):
    tokenizer = tokenizer if family == "Llama" else encoder_tokenizer()

    def trained(size: int) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        model = make(family, "SequenceClassification", len(tokenizer)).double()
        trainer = make_trainer(
            model, per_device_train_batch_size=size, gradient_accumulation_steps=-(-8 // size), optim="sgd",
            learning_rate=0.5, lr_scheduler_type="constant", center_rewards_coefficient=0.1,
            tokenizer=tokenizer,
        )  # fmt: skip
        trainer.train()
        return model.state_dict(), trainer.state.log_history[0]

    (whole, whole_log), start = (
        trained(8),
        make(family, "SequenceClassification", len(tokenizer)).state_dict(),
    )
    assert max((whole[name] - start[name]).abs().max().item() for name in start) > 1e-2
    for size in (1, 3):
        parts, parts_log = trained(size)
        for name in ("loss", "accuracy", "margin", "brier", "calibration_error"):
            assert parts_log[name] == pytest.approx(whole_log[name], rel=1e-6)
        for name, weight in whole.items():
            torch.testing.assert_close(parts[name], weight, rtol=1e-6, atol=1e-7)


# ---- it learns ----


@pytest.mark.parametrize("way", ["Llama", "GPT2 by LoRA", "Bert"])
def test_it_learns_what_people_prefer(make_trainer, tokenizer, way):
    """Pairs that were not trained on are told apart; what is saved scores as what was trained."""
    family = way.split()[0]
    tokenizer = encoder_tokenizer() if family == "Bert" else tokenizer
    model = make(family, "SequenceClassification", len(tokenizer))
    adapter = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear") if "LoRA" in way else None
    trainer = make_trainer(
        model, preferences(256, seed=1), tokenizer, eval_dataset=preferences(100, seed=2),
        peft_config=adapter, max_steps=40, per_device_train_batch_size=32,
        learning_rate=3e-3 if adapter is None else 1e-2,
        lr_scheduler_type="constant", per_device_eval_batch_size=50,
    )  # fmt: skip
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] > 0.85
    assert metrics["eval_margin"] > 1
    assert metrics["eval_loss"] < 0.3


# ---- rows ----


def tokens(trainer: RewardTrainer, tokenizer: Any, number: int = 0) -> tuple[str, str]:
    row = trainer.train_dataset[number]
    return tuple(
        "".join(tokenizer.convert_ids_to_tokens(row[f"{name}_ids"])) for name in ("chosen", "rejected")
    )


def test_what_is_read_of_a_row(make_trainer, tokenizer):
    implicit = [{"chosen": "is it? yes", "rejected": "is it? no"}]
    assert tokens(make_trainer(rows=implicit), tokenizer) == ("is it? yes[eos]", "is it? no[eos]")
    trainer = make_trainer(rows=implicit, append_eos=False)
    assert tokens(trainer, tokenizer) == ("is it? yes", "is it? no")
    encoders = encoder_tokenizer()
    model = make("Bert", "SequenceClassification", len(encoders))
    trainer = make_trainer(model, implicit, encoders)
    assert tokens(trainer, encoders) == ("[CLS]is it? yes[SEP]", "[CLS]is it? no[SEP]")


def test_messages_end_with_the_models_turn(make_trainer, tokenizer):
    """What the template puts behind its end-of-turn marker is left out: no model samples it."""
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}[eos]\n{% endfor %}"
        "{% if add_generation_prompt %}a: {% endif %}"
    )
    try:
        user = {"role": "user", "content": "hi"}
        answers = {
            name: [user, {"role": "assistant", "content": text}]
            for name, text in (("chosen", "hello"), ("rejected", "no"))
        }
        trainer = make_trainer(rows=[answers])
    finally:
        tokenizer.chat_template = None
    chosen, rejected = tokens(trainer, tokenizer)
    assert (chosen[-11:], rejected[-8:]) == ("a: hello[eos]"[-11:], "a: no[eos]"[-8:])


def test_what_is_cut_and_left_out_is_said(make_trainer, tokenizer, caplog):
    rows = [
        {"prompt": "abcdef", "chosen": "gh", "rejected": "i"},
        {"prompt": "ab", "chosen": "xyzwvu", "rejected": "qyzwvu"},  # the end is the same
        {"prompt": "a", "chosen": "b", "rejected": "c"},
    ]
    with caplog.at_level(logging.WARNING, logger="etude"):
        trainer = make_trainer(rows=rows, max_length=5)
    assert [tokens(trainer, tokenizer, i) for i in range(2)] == [
        ("efgh[eos]", "defi[eos]"),
        ("ab[eos]", "ac[eos]"),
    ]
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 3 rows are longer than max_length=5 and are cut",
        "1 of 3 rows have two answers that are the same as far as they are read and are left out",
    ]


def test_the_models_own_limit_holds(make_trainer, tokenizer):
    model = make("Llama", "SequenceClassification", len(tokenizer), max_position_embeddings=12)
    trainer = make_trainer(model)
    assert max(len(row["chosen_ids"]) for row in trainer.train_dataset) == 12


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([{"prompt": "a", "completion": "b"}], r"expected one of these combinations: \[prompt \+\] chosen"),
        ([{"chosen": "a", "rejected": 3}], "row 0: "),
        ([{"prompt": "a", "chosen": "b", "rejected": "b"}], "none of the 1 rows is left"),
    ],
)
def test_data_that_is_wrong(make_trainer, rows, match):
    with pytest.raises(DataError, match=match):
        make_trainer(rows=rows)


# ---- models ----


def test_where_training_can_start(make_trainer, tokenizer, tmp_path):
    language_model = make("Llama", "CausalLM", len(tokenizer))
    language_model.save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    named = make_trainer(str(tmp_path / "start"), model_init_kwargs={"dtype": "float64"}).model
    assert named.dtype == torch.float64
    again = make_trainer(str(tmp_path / "start")).model
    assert torch.equal(again.score.weight, make_trainer(language_model).model.score.weight), "by the seed"
    policy = AutoModelForCausalLMWithValueHead(make("Llama", "CausalLM", len(tokenizer)))
    assert torch.equal(make_trainer(policy).model.score.weight, policy.v_head.summary.weight)
    critic = ValueModel(make("GPT2", "CausalLM", len(tokenizer)))
    assert torch.equal(make_trainer(critic).model.score.weight, critic.v_head.summary.weight)
    with pytest.raises(ModelError, match="has 2 labels; expected one"):
        make_trainer(make("Bert", "SequenceClassification", len(tokenizer), num_labels=2))
    with pytest.raises(ConfigError, match="args are of SFTConfig; expected RewardConfig"):
        RewardTrainer(language_model, SFTConfig(output_dir=str(tmp_path)), processing_class=tokenizer)
    with pytest.raises(ConfigError, match="center_rewards_coefficient is -1"):
        settings(tmp_path, center_rewards_coefficient=-1)


def test_dropout_is_off_unless_it_is_asked_for(make_trainer, tokenizer):
    def losses(**options: Any) -> set[float]:
        model = make("GPT2", "SequenceClassification", len(tokenizer))
        trainer = make_trainer(model, **options)
        batch = trainer.collate(list(trainer.train_dataset))
        trainer.model.train()
        return {round(trainer.compute_loss(trainer.model, batch).item(), 5) for _ in range(4)}

    assert len(losses()) == 1
    assert len(losses(disable_dropout=False)) == 4


def test_no_padding_token_is_saved_that_would_hide_the_end_of_a_text(make_trainer, tokenizer, tmp_path):
    """By transformers itself, the saved model scores what it was trained on, or nothing."""
    trainer = make_trainer()
    trainer.train()
    assert trainer.model.config.pad_token_id == tokenizer.eos_token_id, "as transformers' trainer sets it"
    trainer.save_model(str(tmp_path))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    batch = trainer.collate([trainer.train_dataset[0]])
    expected, _ = trainer.predictions(trainer.model.eval(), batch)
    torch.testing.assert_close(scores(loaded, tokenizer, ROWS[:1]), expected.detach(), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="no padding token"):
        loaded(input_ids=torch.ones(2, 3, dtype=torch.long))
    assert trainer.model.config.pad_token_id == tokenizer.eos_token_id


def test_what_is_saved(make_trainer, tokenizer, tmp_path):
    make("Llama", "CausalLM", len(tokenizer)).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    for adapter in (None, LoraConfig(r=2, target_modules="all-linear")):
        trainer = make_trainer(str(tmp_path / "start"), learning_rate=1e-2, peft_config=adapter)
        trainer.train()
        trainer.save_model(str(tmp_path / "saved"))
        loaded = load_reward_model(tmp_path / "saved")
        weights = trainer.model.state_dict()
        for name, weight in loaded.state_dict().items():
            assert torch.equal(weight, weights[name]) or "original_module" in name, name
        batch = trainer.collate(list(trainer.train_dataset))
        expected, _ = trainer.predictions(trainer.model.eval(), batch)
        found = ScoreReader(loaded)(loaded, batch).view(-1, 2)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        card = ModelCard.load(tmp_path / "saved" / "README.md")
        assert card.data.tags == ["etude", "reward"]
        assert "| center_rewards_coefficient | `None` |" in card.text
        shutil.rmtree(tmp_path / "saved")


@pytest.mark.parametrize("adapter", [False, True])
def test_a_run_that_is_resumed_ends_where_an_unbroken_one_does(make_trainer, tokenizer, tmp_path, adapter):
    make("Llama", "CausalLM", len(tokenizer)).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")

    def trained(resume: bool = False) -> dict[str, torch.Tensor]:
        trainer = make_trainer(
            str(tmp_path / "start"), save_strategy="steps", save_steps=2, max_steps=5, learning_rate=1e-2,
            per_device_train_batch_size=3,
            peft_config=LoraConfig(r=2, target_modules="all-linear") if adapter else None,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resume else None)
        return {name: weight.clone() for name, weight in trainer.model.state_dict().items()}

    unbroken, resumed = trained(), trained(resume=True)
    for name, weight in unbroken.items():
        assert torch.equal(resumed[name], weight), name
