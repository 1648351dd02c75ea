"""Our reward models' numbers against TRL 1.16's: losses, gradients, scores, metrics, and the tokens of rows.

`make test` compares with `trl1_reward.json`; `make test-peers` lets TRL make these numbers again and fails
where they have changed. Where we differ from TRL, and on purpose, the inputs leave that out:

- Pairs longer than `max_length` are dropped by TRL; ours lose their prompt's beginning.
- TRL reads the score at the last token that isn't the padding token, so before an EOS that is also that;
  ours at the last token, whatever the padding token.
- TRL's loss is the mean of each process's and small batch's means; ours is that over the whole step.
- TRL 1.16 has no trainer of process reward models any more.
"""

import json
from pathlib import Path

import pytest
import torch
from peer_numbers import made_again, require_same
from tests.peers.test_trl1 import close
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from etude.math.reward_model import centring_penalty, pair_loss
from etude.trainers.reward import RewardTrainer
from etude.trainers.reward_config import RewardConfig

VALUES = Path(__file__).with_name("trl1_reward.json")
PEER = json.loads(VALUES.read_text())


def peer_model():
    model = LlamaForSequenceClassification(LlamaConfig(**PEER["model"]["config"]))
    model.load_state_dict({name: torch.tensor(values) for name, values in PEER["model"]["weights"].items()})
    return model


@pytest.fixture(scope="module")
def peer_tokenizer():
    words = PEER["words"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[2]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=words[0], pad_token=words[1])


@pytest.fixture
def make_trainer(tmp_path, peer_tokenizer):
    def make(theirs):
        rows = PEER["rows"]
        if not theirs["with_margin"]:
            rows = [{name: value for name, value in row.items() if name != "margin"} for row in rows]
        args = RewardConfig(output_dir=str(tmp_path), use_cpu=True, **theirs["settings"])
        return RewardTrainer(peer_model(), args, train_dataset=rows, processing_class=peer_tokenizer)

    return make


@pytest.mark.parametrize("name", PEER["losses"])
def test_losses_of_given_scores(name):
    theirs = PEER["losses"][name]
    scores_P2 = torch.tensor(PEER["given_scores"], requires_grad=True)
    margins = torch.tensor([row["margin"] for row in PEER["rows"]]) if theirs["with_margin"] else None
    loss = pair_loss(*scores_P2.unbind(1), margins).mean()
    coefficient = theirs["settings"].get("center_rewards_coefficient", 0)
    loss = loss + coefficient * centring_penalty(*scores_P2.unbind(1)).mean()
    loss.backward()
    close(loss.detach(), theirs["given"]["loss"])
    close(scores_P2.grad, theirs["given"]["gradients"])


@pytest.mark.parametrize("name", PEER["losses"])
def test_a_whole_model_packed_and_padded(name, make_trainer):
    """Rows of text to tokens, scores, loss, gradients and metrics: theirs padded, ours end to end."""
    theirs = PEER["losses"][name]
    trainer = make_trainer(theirs)
    rows = [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]
    assert [{name: row[name] for name in ("chosen_ids", "rejected_ids")} for row in rows] == theirs["tokens"]
    batch = trainer.collate(rows)
    trainer.model.train()
    scores_P2, _ = trainer.predictions(trainer.model, batch)
    close(scores_P2.detach(), theirs["scores"])
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    close(loss.detach(), theirs["loss"])
    gradients = {name: p.grad for name, p in trainer.model.named_parameters() if name in theirs["gradients"]}
    assert gradients.keys() == theirs["gradients"].keys()
    for parameter, gradient in gradients.items():
        close(gradient, theirs["gradients"][parameter])
    _, sums = trainer.losses(trainer.model, batch)
    for metric, value in theirs["metrics"].items():
        total, count = sums[metric]
        close(total / count, value)


@pytest.mark.peers
def test_the_numbers_are_those_of_trl(tmp_path):
    require_same(made_again(VALUES.with_name("trl1_reward.py"), tmp_path), PEER, "values")
