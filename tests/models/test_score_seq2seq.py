"""Reward models on encoder–decoders: of which models they are made, what they score, and which texts."""

import copy

import pytest
import torch
from encoder_decoders import EOS, FIRST, make_seq2seq, seq2seq_tokenizer
from transformers import AutoModelForSequenceClassification

from etude.data.scored import pack_scored
from etude.errors import DataError, ModelError, RewardError
from etude.models.adapters import lora_config
from etude.models.score_head import with_score_head
from etude.models.score_reader import ScoreReader
from etude.models.value_head import load_with_value_head
from etude.rewards.model import ModelReward
from etude.runtime.loop import run_sync
from etude.trainers.reward import RewardTrainer
from etude.trainers.reward_config import RewardConfig
from etude.types import Episode, Segment

# Marian has no sequence classifier.
FAMILIES = ["t5", "t5 gated", "bart", "mbart"]
ROWS = [
    {"prompt": f"say {n}: ", "chosen": "yes" + "s" * (n % 4), "rejected": "no" + "o" * (n % 3)}
    for n in range(12)
]


@pytest.fixture(scope="module")
def tokenizer():
    return seq2seq_tokenizer()


def texts(*lengths):
    generator = torch.Generator().manual_seed(0)
    made = [torch.randint(FIRST, 40, (n,), generator=generator).tolist() for n in lengths]
    return [[*ids, EOS] for ids in made]


def batch(rows):
    return pack_scored(rows, [[len(row) - 1] for row in rows])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_on_a_loaded_language_model(family):
    """Its weights are taken over; a text's score is what transformers gives for it alone."""
    language_model = make_seq2seq(family)
    model = with_score_head(language_model, "sequence")
    assert type(model).__name__.endswith("ForSequenceClassification")
    assert model.get_input_embeddings().weight is language_model.get_input_embeddings().weight
    rows = texts(4, 9, 2)
    reader = ScoreReader(model)
    assert not reader.per_token
    with torch.no_grad():
        scores = reader(model, batch(rows))
        alone = [model(input_ids=torch.tensor([row])).logits[0] for row in rows]
    torch.testing.assert_close(scores, torch.stack(alone), rtol=1e-5, atol=1e-5)
    assert scores.std() > 1e-3


@pytest.mark.parametrize("peft_config", [None, lora_config(4, 8)], ids=["whole", "lora"])
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_preferences_are_learned_and_the_model_is_a_reward(family, peft_config, tokenizer, tmp_path):
    config = RewardConfig(
        output_dir=str(tmp_path / "reward"),
        num_train_epochs=12,
        per_device_train_batch_size=6,
        learning_rate=1e-2,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
    )
    make_seq2seq(family).save_pretrained(tmp_path / "base")
    trainer = RewardTrainer(
        model=str(tmp_path / "base"),
        args=config,
        train_dataset=ROWS,
        eval_dataset=ROWS,
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    row = trainer.train_dataset[1]
    expected = tokenizer("say 1: yess", add_special_tokens=False).input_ids
    assert row["chosen_ids"] == [*expected, EOS], "prompt and answer as one text, with its end"
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] > 0.9
    trainer.save_model()
    reward = ModelReward(tmp_path / "reward")
    scores = {
        answer: reward.score_texts([{"prompt": r["prompt"], "completion": r[answer]} for r in ROWS])
        for answer in ("chosen", "rejected")
    }
    better = [c > r for c, r in zip(*scores.values(), strict=True)]
    assert sum(better) > 0.9 * len(ROWS)
    # What an encoder–decoder played is read as one text, too, though its tokens are two sequences.
    assert run_sync(reward([played(tokenizer, r, "chosen") for r in ROWS])) == pytest.approx(
        scores["chosen"], abs=1e-5
    )
    by_tokens = ModelReward(tmp_path / "reward", read="tokens")
    with pytest.raises(
        RewardError, match="episode 0 is an encoder-decoder's, whose tokens are two sequences"
    ):
        run_sync(by_tokens([played(tokenizer, ROWS[0], "chosen")]))
    if peft_config is None:
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
        with torch.no_grad():
            [[score]] = plain(input_ids=torch.tensor([row["chosen_ids"]])).logits.tolist()
        assert score == pytest.approx(scores["chosen"][1], abs=1e-5)


def played(tokenizer, row, answer):
    said = tokenizer(row[answer]).input_ids
    zeros = [0.0] * len(said)
    return Episode(
        segments=[
            Segment("prompt", row["prompt"], tokenizer(row["prompt"]).input_ids, encoder=True),
            Segment("environment", "", [2]),
            Segment("model", row[answer], said, logprobs=zeros, sampling_logprobs=zeros, policy_version=0),
        ]
    )


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_padding_token_that_also_ends_texts_is_kept(family, tokenizer, tmp_path):
    """Without any, the decoder of what was saved couldn't begin."""
    language_model = make_seq2seq(family)
    language_model.config.pad_token_id = EOS
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    config = RewardConfig(output_dir=str(tmp_path), report_to="none")
    trainer = RewardTrainer(language_model, config, train_dataset=ROWS, processing_class=tokenizer)
    trainer.save_model()
    text = {"prompt": "say 1: ", "completion": "yess"}
    before = ModelReward(trainer.model, tokenizer).score_texts([text, {**text, "completion": "no"}])
    after = ModelReward(tmp_path).score_texts([text, {**text, "completion": "no"}])
    assert after == pytest.approx(before, abs=1e-6)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_texts_that_end_otherwise(family):
    model = with_score_head(make_seq2seq(family), "sequence")
    reader = ScoreReader(model)
    first, second = texts(5, 7)
    with pytest.raises(DataError, match=r"batch have 1 to 2 of them; expected one, at the end"):
        reader(model, batch([first, [*first, *second]]))
    with pytest.raises(DataError, match=r"batch have 0 to 1 of them"):
        reader(model, batch([first, second[:-1]]))


def test_a_value_head_has_no_such_layer_to_go_to():
    with pytest.raises(ModelError, match="give the language model without the value head"):
        with_score_head(load_with_value_head(make_seq2seq()), "sequence")
    with pytest.raises(ModelError, match="no ForSequenceClassification for marian models"):
        with_score_head(make_seq2seq("marian"), "sequence")
