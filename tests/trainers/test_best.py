import math

import pytest
from datasets import Dataset

from etude.errors import ConfigError
from etude.runtime.run import RunDirectory
from etude.trainers.best import evaluations_since_the_best
from etude.trainers.sft import SFTTrainer
from etude.trainers.sft_config import SFTConfig

ROWS = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(4) for b in (5, 60)]
OTHERS = [{"prompt": "a dog ", "completion": "barks"}]  # what training on sums makes worse


def settings(directory, **options):
    defaults = {
        "output_dir": str(directory), "overwrite_output_dir": True, "max_steps": 30, "learning_rate": 0.1,
        "eval_strategy": "steps", "eval_steps": 2, "early_stopping_patience": 3, "disable_tqdm": True,
        "use_cpu": True,
    }  # fmt: skip
    return SFTConfig(**defaults | options)


@pytest.mark.parametrize(
    ("values", "greater", "expected"),
    [
        ([], False, None),
        ([2.0], False, 0),
        ([2.0, 1.0, 1.0], False, 1),  # an equal one is no better
        ([2.0, 1.0, 3.0, 0.5], False, 0),
        ([0.1, 0.5, 0.4], True, 1),
        ([math.nan, math.nan], False, 2),
        ([math.nan, 5.0, math.nan], False, 1),
    ],
)
def test_evaluations_since_the_best(values, greater, expected):
    assert evaluations_since_the_best(values, greater) == expected


@pytest.mark.parametrize(
    "options",
    [
        {},  # checkpoints by steps of their own, which never come
        {"eval_strategy": "epoch", "per_device_train_batch_size": 8},
        {"save_steps": 5, "eval_steps": 3},
        {"save_strategy": "best"},
    ],
)
def test_training_ends_and_goes_back_to_the_best_whenever_checkpoints_are_due(
    tmp_path, tokenizer, make_llama, options
):
    config = settings(tmp_path, **options)
    trainer = SFTTrainer(
        make_llama(), config, train_dataset=ROWS, eval_dataset=OTHERS, processing_class=tokenizer
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.state.global_step < 30
    assert evaluations_since_the_best(losses, False) == 3
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)


def test_the_count_goes_on_where_training_resumes(tmp_path, tokenizer, make_llama):
    """With checkpoints at every evaluation: each of them goes on to the same end."""

    def trained(directory, checkpoint=None):
        trainer = SFTTrainer(
            make_llama(),
            settings(directory, save_steps=2),
            train_dataset=ROWS,
            eval_dataset=OTHERS,
            processing_class=tokenizer,
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    whole = trained(tmp_path / "whole")
    last = whole.state.global_step
    resumed = trained(tmp_path / "whole", str(tmp_path / "whole" / f"checkpoint-{last - 2}"))
    assert resumed.state.global_step == last
    assert resumed.state.best_global_step == whole.state.best_global_step


def test_of_several_data_sets_one_counts(tmp_path, tokenizer, make_llama):
    several = {"sums": Dataset.from_list(ROWS[:3]), "more": Dataset.from_list(OTHERS)}
    arguments = {"train_dataset": ROWS, "eval_dataset": several, "processing_class": tokenizer}
    with pytest.raises(ConfigError, match=r"'loss', and eval_dataset is several: .* as in 'sums_loss'"):
        SFTTrainer(make_llama(), settings(tmp_path), **arguments)
    config = settings(tmp_path, metric_for_best_model="more_loss", eval_on_start=True)
    trainer = SFTTrainer(make_llama(), config, **arguments)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if entry["step"]]  # what was before isn't kept
    losses = [entry["eval_more_loss"] for entry in logged if "eval_more_loss" in entry]
    assert trainer.evaluate()["eval_more_loss"] == pytest.approx(min(losses), rel=1e-6)
    summary = RunDirectory(tmp_path).read_summary()
    assert {"more_loss", "sums_loss"} <= set(summary["before"]), "all sets are in the report"
    best = {name: summary["after"][name] for name in ("sums_loss", "more_loss")}
    assert best["more_loss"] == min(losses), "of the weights that were gone back to"
    at_best = [entry for entry in logged if entry["step"] == trainer.state.best_global_step]
    assert [entry["eval_sums_loss"] for entry in at_best if "eval_sums_loss" in entry] == [best["sums_loss"]]


def test_a_measure_that_no_evaluation_has(tmp_path, tokenizer, make_llama):
    config = settings(tmp_path, metric_for_best_model="accuracy")
    trainer = SFTTrainer(
        make_llama(), config, train_dataset=ROWS, eval_dataset=ROWS, processing_class=tokenizer
    )
    with pytest.raises(ConfigError, match="'accuracy', which no evaluation has; expected one of loss, "):
        trainer.train()
