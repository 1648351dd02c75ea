"""Our supervised fine-tuning's numbers against TRL 1.16's: rows to tokens, losses, gradients, metrics.

`make test` compares with `trl1_sft.json`; `make test-peers` lets TRL make these numbers again and fails where
they have changed. Where we differ from TRL, and on purpose, the inputs leave that out:

- Messages teach what the assistant says; TRL's `assistant_only_loss` is off unless asked for.
- TRL tokenises prompt and completion together, ours each by itself: the same where they meet at a space.
- Metrics of several passes are means over all tokens; TRL's are means of the passes' means, and its eval_loss
  that of the batches' losses. Compared in one pass.
- TRL packs the rows that it evaluates, too; ours never are.
- 'wrapped' packing, in which texts read their neighbours, isn't offered.
- With label smoothing ours logs no accuracy and no entropy.
"""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from peer_numbers import made_again, require_same
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from etude import SFTConfig, SFTTrainer

VALUES = Path(__file__).with_name("trl1_sft.json")
PEER = json.loads(VALUES.read_text())
METRICS = ("mean_token_accuracy", "entropy")
OF_TRL_ONLY = ("padding_free",)  # nothing is ever padded


@cache
def peer_tokenizer():
    backend = Tokenizer.from_str(PEER["tokenizer"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **PEER["special"])


def peer_model():
    model = LlamaForCausalLM(LlamaConfig(**PEER["model"]["config"]))
    model.load_state_dict({name: torch.tensor(values) for name, values in PEER["model"]["weights"].items()})
    return model


@pytest.fixture
def make_trainer(tmp_path):
    def make(name):
        theirs = PEER["cases"][name]
        settings = {key: value for key, value in theirs["settings"].items() if key not in OF_TRL_ONLY}
        args = SFTConfig(
            **{
                "output_dir": str(tmp_path),
                "per_device_train_batch_size": 16,
                "max_steps": 1,
                "learning_rate": 0.01,
                "use_cpu": True,
                "logging_steps": 1,
                "save_strategy": "no",
                "disable_tqdm": True,
                "assistant_only_loss": False,
                **settings,
            }
        )
        rows = PEER["rows"][theirs["rows"]]
        trainer = SFTTrainer(
            peer_model(), args, train_dataset=rows, eval_dataset=rows, processing_class=peer_tokenizer()
        )
        if "in chunks" in name:
            trainer.scorer.head.chunk_bytes = 3 * 4 * PEER["model"]["config"]["vocab_size"]
        return trainer

    return make


def close(ours, theirs):
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", PEER["cases"])
def test_the_same_tokens_are_learned(name, make_trainer):
    """In the same bins, too, but for the order of what is equally long."""

    def without_first_label(bins):
        return sorted(
            sorted((row["input_ids"], [-100, *row["labels"][1:]]) for row in members) for members in bins
        )

    trainer = make_trainer(name)
    theirs = PEER["cases"][name]
    ours = [item if isinstance(item, list) else [item] for item in trainer.train_dataset]
    assert without_first_label(ours) == without_first_label(theirs["bins"])


@pytest.mark.parametrize("name", PEER["cases"])
def test_a_step(name, make_trainer):
    trainer = make_trainer(name)
    theirs = PEER["cases"][name]
    evaluated = trainer.evaluate()
    trainer.train()
    ours = next(entry for entry in trainer.state.log_history if "loss" in entry)
    close(ours["loss"], theirs["loss"])
    close(ours["grad_norm"], theirs["grad_norm"])
    close(evaluated["eval_loss"], theirs["evaluated"]["loss"])
    if "smoothed" not in name:
        in_one_pass = PEER["cases"][name.removesuffix(", accumulated")]
        for metric in METRICS:
            close(ours[metric], in_one_pass[metric])
            close(evaluated[f"eval_{metric}"], theirs["evaluated"][metric])


@pytest.mark.peers
def test_the_numbers_are_those_of_trl(tmp_path):
    require_same(made_again(VALUES.with_name("trl1_sft.py"), tmp_path), PEER, "values")
