"""Our losses of preferences against TRL 1.16's, on the same log-probabilities and through the same model.

`make test` compares with `trl1_preference.json`; `make test-peers` lets TRL make these numbers again and
fails where they have changed. Where we differ from TRL, and on purpose, the inputs leave that out:

- The imitation term (`sft`, `cpo_alpha`, ORPO's) is a mean over the tokens of a batch in TRL, over the tokens
  of each answer and then over pairs in ours: compared on one pair. ORPO's is of the prompt, too, in TRL:
  compared behind a prompt of one token, which has nothing before it to be predicted from.
- Mismatched pairs for KTO's baseline are made within a batch in TRL, of the whole dataset in ours: compared
  on a batch that is one.
- `label_smoothing` does nothing for TRL's `sigmoid` and `sigmoid_norm`; ours is conservative DPO.
"""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from peer_numbers import made_again, require_same
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from etude.math.likelihood import odds_ratio_loss, sequence_sums
from etude.math.unpaired import kto_baseline, kto_loss
from etude.trainers.cpo import CPOTrainer, contrast
from etude.trainers.dpo import DPOTrainer
from etude.trainers.kto import KTOTrainer
from etude.trainers.means import Means
from etude.trainers.orpo import ORPOTrainer
from etude.trainers.preference import Pairs
from etude.trainers.preference_config import CPOConfig
from etude.trainers.simpo import SimPOTrainer

VALUES = Path(__file__).with_name("trl1_preference.json")
PEER = json.loads(VALUES.read_text())
COUNTS = [len(answer) for answer in PEER["answers"]]
ATOL = 1e-5


def close(ours, theirs):
    theirs = torch.as_tensor(theirs, dtype=ours.dtype)
    torch.testing.assert_close(ours, theirs, atol=ATOL, rtol=ATOL)


def flat(rows):
    return torch.tensor([value for row in rows for value in row])


def given(name, pairs=4):
    """What the file has per token of chosen and rejected answers, end to end."""
    rows = PEER["given"][name]
    return flat([*rows[:pairs], *rows[4 : 4 + pairs]])


def counts_of(pairs=4):
    return [*COUNTS[:pairs], *COUNTS[4 : 4 + pairs]]


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {f"w{i}": i for i in range(PEER["model"]["config"]["vocab_size"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="w2"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w0", pad_token="w1")


@cache
def weights():
    return {name: torch.tensor(values) for name, values in PEER["model"]["weights"].items()}


def peer_model(scale=1.0):
    model = LlamaForCausalLM(LlamaConfig(**PEER["model"]["config"]))
    model.load_state_dict({name: scale * weight for name, weight in weights().items()})
    return model.eval()


def trainer_of(kind, settings, tokenizer, directory, **options):
    config = kind.config_class(output_dir=str(directory), use_cpu=True, **settings)
    return kind(peer_model(), args=config, processing_class=tokenizer, **options)


# ---- given log-probabilities ----


@pytest.mark.parametrize("name", PEER["losses"])
def test_losses_of_pairs_and_their_gradients(name, tokenizer, tmp_path):
    theirs = PEER["losses"][name]
    pairs = len(theirs["gradients"]) // 2
    counts = counts_of(pairs)
    trainer = trainer_of(DPOTrainer, theirs["settings"], tokenizer, tmp_path)
    logprobs = given("now", pairs).requires_grad_()
    policy = trainer.of_answers(logprobs, counts).chunk(2)
    reference = trainer.of_answers(given("ref", pairs), counts).chunk(2)
    sharper = 2 * logprobs - given("collisions", pairs)  # the same at temperature ½
    weights = trainer.weights(logprobs, [sharper], counts)
    compared = trainer.compare(Pairs(*policy, *torch.tensor(counts).chunk(2), *reference, weights))
    loss = compared.losses.mean()
    close(loss, theirs["loss"])
    (gradients,) = torch.autograd.grad(loss, logprobs)
    close(gradients, flat(theirs["gradients"]))


@pytest.mark.parametrize("name", PEER["rated"])
def test_losses_of_single_answers_and_their_gradients(name):
    theirs = PEER["rated"][name]
    settings = dict(theirs["settings"])
    baseline = 0.0
    if settings.pop("loss_type", "kto") == "kto":
        baseline = kto_baseline(sequence_sums(given("other") - given("other_ref"), COUNTS))
        close(baseline, theirs["kl"])
    logprobs = given("now").requires_grad_()
    log_ratio = sequence_sums(logprobs - given("ref"), COUNTS)
    beta = settings.pop("beta", 0.1)
    loss = kto_loss(log_ratio, torch.tensor(PEER["labels"]), baseline, beta, **settings).mean()
    close(loss, theirs["loss"])
    (gradients,) = torch.autograd.grad(loss, logprobs)
    close(gradients, flat(theirs["gradients"]))


@pytest.mark.parametrize("name", PEER["free"])
def test_losses_without_a_reference_and_their_gradients(name, tmp_path):
    theirs = PEER["free"][name]
    logprobs = given("now").requires_grad_()
    sums = sequence_sums(logprobs, COUNTS)
    means = sums / torch.tensor(COUNTS)
    if name == "orpo":
        losses = odds_ratio_loss(*means.chunk(2))
    else:
        config = CPOConfig(output_dir=str(tmp_path), use_cpu=True, **theirs["settings"])
        of_means = config.loss_type in ("ipo", "simpo", "alphapo")
        losses = contrast(*(means if of_means else sums).chunk(2), config)
    loss = losses.mean()
    close(loss, theirs["loss"])
    (gradients,) = torch.autograd.grad(loss, logprobs)
    close(gradients, flat(theirs["gradients"]))


# ---- the whole path ----


def answer(i, prompt):
    ids = [*prompt, *PEER["answers"][i]]
    return ids, [*[-100] * len(prompt), *PEER["answers"][i]]


def pair_rows(count):
    rows = []
    for i, prompt in enumerate(PEER["prompts"][:count]):
        (chosen, chosen_labels), (rejected, rejected_labels) = answer(i, prompt), answer(4 + i, prompt)
        rows.append(
            {
                "chosen_ids": chosen,
                "chosen_labels": chosen_labels,
                "rejected_ids": rejected,
                "rejected_labels": rejected_labels,
            }
        )
    return rows


def rated_rows():
    rows = []
    for i, prompt in enumerate(PEER["prompts"]):
        (ids, labels), (other, other_labels) = answer(i, prompt), answer(i - 1 if i else 3, prompt)
        rows.append(
            {
                "ids": ids,
                "labels": labels,
                "other_ids": other,
                "other_labels": other_labels,
                "desirable": PEER["labels"][i + 1],
            }
        )
    return rows


@pytest.mark.parametrize("name", PEER["whole"])
def test_the_same_batch_through_the_same_model(name, tokenizer, tmp_path):
    """Packed end to end, prompts once, logits at the answers only; theirs padded, each answer by itself."""
    theirs = PEER["whole"][name]
    kind, rows = {
        "dpo": (DPOTrainer, pair_rows(4)),
        "kto": (KTOTrainer, rated_rows()),
        "orpo": (ORPOTrainer, pair_rows(1)),
        "cpo": (CPOTrainer, pair_rows(1)),
        "simpo": (CPOTrainer, pair_rows(1)),
    }[name.partition(",")[0]]
    referred = kind in (DPOTrainer, KTOTrainer)
    options = {"ref_model": peer_model(PEER["reference"])} if referred else {}
    trainer = trainer_of(kind, theirs["settings"], tokenizer, tmp_path, **options)
    trainer.model.train()
    total, sums = trainer.losses(trainer.model, trainer.collate(rows))
    loss = total / len(rows)
    close(loss, theirs["loss"])
    loss.backward()
    close(trainer.model.get_parameter(PEER["weight"]).grad, theirs["gradient"])
    means = Means()
    means.add(sums)
    ours = trainer.summary(means.take(trainer.accelerator))
    for metric, value in theirs["logged"].items():
        # TRL logs a mean per token under this name where its loss takes one; ours is of the whole answer.
        if name in ("orpo", "simpo") and metric.startswith("logps/"):
            value *= COUNTS[0 if metric.endswith("chosen") else 4]
        assert ours[metric] == pytest.approx(value, abs=ATOL, rel=ATOL), metric


def test_simpo_by_itself_is_cpos(tokenizer, tmp_path):
    theirs = PEER["whole"]["simpo"]
    settings = {"beta": theirs["settings"]["beta"], "simpo_gamma": 0.5}
    trainer = trainer_of(SimPOTrainer, settings, tokenizer, tmp_path)
    total, _ = trainer.losses(trainer.model, trainer.collate(pair_rows(1)))
    close(total, theirs["loss"])


@pytest.mark.peers
def test_the_numbers_are_those_of_trl(tmp_path):
    require_same(made_again(VALUES.with_name("trl1_preference.py"), tmp_path), PEER, "values")
