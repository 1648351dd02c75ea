import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from etude.data.collate import IGNORED
from etude.errors import DataError
from etude.trainers.kto import KTOTrainer, mismatches, tokenize_ratings, with_mismatches
from etude.trainers.kto_config import KTOConfig

ROWS = [
    {"prompt": f"{a}+{b}=", "completion": str(a + b + (1 - good)) * (1 + a), "label": bool(good)}
    for a, b, good in ((0, 1, 1), (1, 2, 0), (2, 3, 1), (1, 5, 1), (0, 7, 0))
]


def settings(directory, **options):
    defaults = {
        "output_dir": str(directory),
        "overwrite_output_dir": True,
        "max_steps": 1,
        "per_device_train_batch_size": 5,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 1,
    }
    return KTOConfig(**{**defaults, **options})


def test_kto_from_the_text_on(make_llama, tokenizer, tmp_path):
    """Single rows, plain forwards and the paper's equations; each prompt with the answer of the row before
    it."""
    policy = make_llama(0, torch.float64)
    reference = make_llama(1, torch.float64, initializer_range=0.5)

    def log_ratio(prompt, answer):
        before = tokenizer.encode(prompt)
        ids = [*before, *tokenizer.encode(answer), tokenizer.eos_token_id]
        places = torch.arange(len(before), len(ids))
        sums = []
        for model in (policy, reference):
            with torch.no_grad():
                logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            sums.append(logprobs[places - 1, torch.tensor(ids)[places]].sum().item())
        return sums[0] - sums[1]

    mismatched = [log_ratio(ROWS[i]["prompt"], ROWS[i - 1]["completion"]) for i in range(5)]
    baseline = sum(mismatched) / 5
    assert baseline > 0
    expected = []
    for row in ROWS:
        gain = (log_ratio(row["prompt"], row["completion"]) - baseline) * (1 if row["label"] else -1)
        expected.append((1.5 if row["label"] else 0.5) * (1 - 1 / (1 + math.exp(-0.2 * gain))))
    args = settings(tmp_path, beta=0.2, desirable_weight=1.5, undesirable_weight=0.5)
    for batch_size in (1, 2, 5):  # the reference point is the whole dataset's
        args.per_device_eval_batch_size = batch_size
        trainer = KTOTrainer(policy, reference, args, eval_dataset=ROWS, processing_class=tokenizer)
        metrics = trainer.evaluate()
        assert metrics["eval_kl"] == pytest.approx(baseline, rel=1e-9)
        assert metrics["eval_loss"] == pytest.approx(sum(expected) / 5, rel=1e-9)
    difference = metrics["eval_rewards/chosen"] - metrics["eval_rewards/rejected"]
    assert metrics["eval_rewards/margins"] == pytest.approx(difference)


def test_without_an_estimate_of_the_kl(make_llama, tokenizer, tmp_path):
    args = settings(tmp_path, loss_type="apo_zero_unpaired")
    trainer = KTOTrainer(
        make_llama(), args=args, train_dataset=ROWS, eval_dataset=ROWS, processing_class=tokenizer
    )
    assert "other_ids" not in trainer.train_dataset.column_names
    trainer.train()
    metrics = trainer.evaluate()
    assert "eval_kl" not in metrics
    assert metrics["eval_loss"] != pytest.approx(0.5)


@given(st.lists(st.sampled_from("abc"), min_size=2, max_size=12))
def test_answers_of_other_prompts(prompts):
    if len(set(prompts)) == 1:
        with pytest.raises(DataError, match="all rows have the same prompt"):
            mismatches(prompts)
        return
    for i, other in enumerate(mismatches(prompts)):
        between = [(i - step) % len(prompts) for step in range(1, (i - other) % len(prompts))]
        assert prompts[other] != prompts[i]
        assert all(prompts[j] == prompts[i] for j in between)


def test_paired_rows_become_two_and_are_not_mismatched_with_each_other(tokenizer, tmp_path):
    pairs = [{"prompt": f"{a}:", "chosen": "yes" * (1 + a), "rejected": "no"} for a in range(3)]
    dataset = with_mismatches(tokenize_ratings(pairs, tokenizer, settings(tmp_path)), None)
    assert [row["desirable"] for row in dataset] == [True, False] * 3

    def text(row, prefix):
        labels = row[f"{prefix}labels"]
        start = labels.index(next(label for label in labels if label != IGNORED))
        ids = row[f"{prefix}ids"]
        return tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:])

    assert [text(row, "") for row in dataset][:2] == [("0:", "yes[eos]"), ("0:", "no[eos]")]
    assert [text(row, "other_") for row in dataset] == [
        ("0:", "no[eos]"),  # the last row's
        ("0:", "no[eos]"),
        ("1:", "no[eos]"),
        ("1:", "no[eos]"),
        ("2:", "no[eos]"),
        ("2:", "no[eos]"),
    ]


def test_a_mismatched_answer_is_cut_too(tokenizer, tmp_path):
    rows = [
        {"prompt": "1234", "completion": "5", "label": True},
        {"prompt": "1", "completion": "2345", "label": False},
    ]
    dataset = with_mismatches(tokenize_ratings(rows, tokenizer, settings(tmp_path, max_length=6)), 6)
    assert [tokenizer.decode(row["other_ids"]) for row in dataset] == ["123423", "15[eos]"]
    assert all(len(row["other_ids"]) == len(row["other_labels"]) for row in dataset)


def test_data_out_of_balance_is_said(make_llama, tokenizer, tmp_path, caplog):
    def begin(**options):
        caplog.clear()
        KTOTrainer(
            make_llama(), args=settings(tmp_path, **options), train_dataset=ROWS, processing_class=tokenizer
        )
        return caplog.text

    assert "3 answers are good and 2 bad, and weigh 3 and 2 in all" in begin()
    assert begin(undesirable_weight=1.3) == ""


def test_labels_that_are_none(tokenizer, tmp_path):
    with pytest.raises(DataError, match="row 1: label is None; expected true"):
        tokenize_ratings([ROWS[0], {**ROWS[1], "label": None}], tokenizer, settings(tmp_path))
