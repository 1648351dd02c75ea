"""Scores read off packed or padded batches equal those of each text alone, whatever the padding token."""

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from scoring_models import SCORERS, make
from transformers import XLNetConfig, XLNetForSequenceClassification

from etude.data.scored import pack_scored
from etude.errors import ModelError
from etude.models.adapters import current_peft
from etude.models.reward_model import add_scoring_adapter
from etude.models.score_reader import ScoreReader

HEADS = {"sequence": "SequenceClassification", "token": "TokenClassification"}
WITHOUT_TOKENS = {"OPT", "Bart"}


def texts(end):
    """Three sequences, two of which begin alike for 20 tokens; each ends with `end`."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(5, 60, (n,), generator=generator).tolist() for n in (30, 27, 6)]
    rows[1][:20] = rows[0][:20]
    return [[*row[:-1], end] for row in rows]


def alone(model, row, ends, kind):
    logits = model(input_ids=torch.tensor([row])).logits
    return logits if kind == "sequence" else logits[0, ends]


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("family", SCORERS)
def test_scores_are_those_of_each_text_alone(family, kind):
    if kind == "token" and family in WITHOUT_TOKENS:
        return
    model, packs = make(family, HEADS[kind]), SCORERS[family][2]
    reader = ScoreReader(model)
    assert (reader.kind, reader.packs) == (kind, packs)
    rows = texts(end=3)
    ends = [[len(row) - 1] if kind == "sequence" else [4, len(row) - 1] for row in rows]
    batch = pack_scored(rows, ends, share=reader.packs)
    assert len(batch["lengths"]) == (4 if packs else 3)  # the common beginning, and three rests
    with torch.no_grad():
        scores = reader(model, batch)
        expected = torch.cat([alone(model, *pair, kind) for pair in zip(rows, ends, strict=True)])
    assert scores.std() > 1e-3
    torch.testing.assert_close(scores, expected, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["Llama", "Bloom"])
@pytest.mark.parametrize("pad", [None, 3, 7, 59])
def test_the_padding_token_changes_nothing(family, pad):
    """3 ends every text, 7 is among the words, and 59 in no text."""
    model = make(family, HEADS["sequence"])
    reader = ScoreReader(model)
    rows = texts(end=3)
    batch = pack_scored(rows, [[len(row) - 1] for row in rows], share=reader.packs)
    model.config.pad_token_id = None
    with torch.no_grad():
        expected = torch.cat([alone(model, row, [], "sequence") for row in rows])
        model.config.pad_token_id = pad
        torch.testing.assert_close(reader(model, batch), expected, atol=1e-6, rtol=1e-5)
    assert model.config.pad_token_id == pad


@pytest.mark.parametrize("family", ["Llama", "Mpt", "Bert"])
def test_gradients_are_those_of_each_text_alone(family):
    model = make(family, HEADS["sequence"])
    reader = ScoreReader(model)
    rows, weights = texts(end=3), torch.tensor([1.0, -2.0, 0.5])
    (
        reader(model, pack_scored(rows, [[len(r) - 1] for r in rows], share=reader.packs))[:, 0] @ weights
    ).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    sum(w * alone(model, row, [], "sequence").sum() for w, row in zip(weights, rows, strict=True)).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=2e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_head_scores_in_float32_on_a_trunk_in_half_precision(autocast):
    """In bfloat16 a score near 8 comes in steps of 1/16: 40 of them wouldn't differ by themselves."""
    model = make("Llama", HEADS["sequence"])
    with torch.no_grad():
        model.score.weight.mul_(20)
    model = model if autocast else model.bfloat16()
    reader = ScoreReader(model)
    rows = [[5 + i, 9, 3] for i in range(40)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        scores = reader(model, pack_scored(rows, [[2]] * 40))[:, 0]
        theirs = model(input_ids=torch.tensor(rows[:1])).logits
    assert theirs.dtype == torch.bfloat16
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())
    torch.testing.assert_close(scores[:1], theirs[0].float(), atol=0.1, rtol=0.02)


def test_an_adapter_scores_by_the_head_it_trains():
    model = add_scoring_adapter(
        make("Llama", HEADS["sequence"]), LoraConfig(target_modules="all-linear", init_lora_weights=False)
    ).eval()
    with torch.no_grad():
        model.base_model.model.score.modules_to_save["default"].weight.normal_()
    rows = texts(end=3)
    batch = pack_scored(rows, [[len(row) - 1] for row in rows], share=True)
    with torch.no_grad():
        reader = ScoreReader(model)
        torch.testing.assert_close(
            reader(model, batch), torch.cat([alone(model, row, [], "sequence") for row in rows])
        )
        with model.disable_adapter():
            torch.testing.assert_close(
                reader(model, batch), torch.cat([alone(model, row, [], "sequence") for row in rows])
            )


def test_models_that_are_refused():
    with pytest.raises(ModelError, match="LlamaForCausalLM continues text"):
        ScoreReader(make("Llama", "CausalLM"))
    xlnet = XLNetForSequenceClassification(
        XLNetConfig(vocab_size=60, d_model=32, n_layer=1, n_head=2, d_inner=32, num_labels=1)
    )
    with pytest.raises(ModelError, match="otherwise where it is padded on the right"):
        ScoreReader(xlnet)
    prompt = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    with current_peft():
        tuned = get_peft_model(make("Llama", HEADS["sequence"]), prompt)
    with pytest.raises(ModelError, match="virtual tokens"):
        ScoreReader(tuned)
