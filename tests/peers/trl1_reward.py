"""What TRL 1.16's RewardTrainer computes, as numbers that `test_trl1_reward.py` compares ours with:
`trl1_reward.json` beside this.

Runs in the peer's environment, by `make test-peers`; with the name of a file to write, by itself.

TRL's own trainer is built around a tiny model, its own data is made of rows, and its own `compute_loss`
evaluated: on given scores, and on the model's, of answers of different lengths, padded.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl import RewardConfig, RewardTrainer
from written import write

WORDS = "abcdefghijklmnop"
VOCABULARY = len(WORDS)
MODEL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "initializer_range": 0.5,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "num_labels": 1,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "margin": {},
    "centred": {"center_rewards_coefficient": 0.01},
    "margin, centred": {"center_rewards_coefficient": 0.5},
}
SCORES = [[1.5, -0.5], [0.25, 0.75], [-2.0, -3.0], [4.0, 4.0], [-1.0, 6.0]]
MARGINS = [0.0, 1.0, 0.5, 2.0, 0.25]
WEIGHTS = ("score.weight", "model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight")


def rows() -> list[dict[str, Any]]:
    torch.manual_seed(1)

    def words(count: int) -> str:
        return "".join(f" {WORDS[i]}" for i in torch.randint(2, VOCABULARY, (count,)).tolist())

    return [
        {
            "prompt": words(3 + i).strip(),
            "chosen": words(1 + 2 * i),
            "rejected": words(6 - i),
            "margin": margin,
        }
        for i, margin in enumerate(MARGINS)
    ]


class Peer:
    def __init__(self, folder: str) -> None:
        self.folder = folder
        torch.manual_seed(0)
        LlamaForSequenceClassification(LlamaConfig(**MODEL)).save_pretrained(folder)
        words = {word: i for i, word in enumerate(WORDS)}
        backend = Tokenizer(models.WordLevel(words, unk_token=WORDS[2]))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, eos_token=WORDS[0], pad_token=WORDS[1]
        )

    def trainer(self, settings: dict[str, Any], with_margin: bool) -> RewardTrainer:
        model = LlamaForSequenceClassification.from_pretrained(self.folder, dtype=torch.float32)
        dataset = Dataset.from_list(rows())
        # An EOS of its own word: TRL writes it behind the text.
        dataset = dataset.map(lambda row: {name: row[name] + " " for name in ("chosen", "rejected")})
        arguments = RewardConfig(
            output_dir=self.folder, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
            **settings,
        )  # fmt: skip
        return RewardTrainer(
            model,
            arguments,
            train_dataset=dataset if with_margin else dataset.remove_columns("margin"),
            processing_class=self.tokenizer,
        )

    def values(self, settings: dict[str, Any], with_margin: bool) -> dict[str, Any]:
        trainer = self.trainer(settings, with_margin)
        trainer.model.train()
        tokenized = [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]
        batch = trainer.data_collator(tokenized)
        loss, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
        loss.backward()
        metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
        given = torch.tensor(SCORES, requires_grad=True)
        logits = given.T.reshape(-1, 1)
        given_loss = trainer.compute_loss(lambda **_: SimpleNamespace(logits=logits), dict(batch))
        given_loss.backward()
        gradients = {name: dict(trainer.model.named_parameters())[name].grad.tolist() for name in WEIGHTS}
        return {
            "settings": settings,
            "with_margin": with_margin,
            "loss": loss.item(),
            "scores": outputs.logits.detach().view(2, -1).T.tolist(),
            "gradients": gradients,
            "metrics": {name: metrics[name] for name in ("accuracy", "margin", "mean_reward")},
            "given": {"loss": given_loss.item(), "gradients": given.grad.tolist()},
            "tokens": [{name: row[name] for name in ("chosen_ids", "rejected_ids")} for row in tokenized],
        }


def values(folder: str) -> dict[str, Any]:
    """Everything there is to compare."""
    peer = Peer(folder)
    state = LlamaForSequenceClassification.from_pretrained(folder).state_dict()
    return {
        "model": {"config": MODEL, "weights": {name: weight.tolist() for name, weight in state.items()}},
        "words": WORDS,
        "rows": rows(),
        "given_scores": SCORES,
        "losses": {name: peer.values(settings, "margin" in name) for name, settings in SETTINGS.items()},
    }


if __name__ == "__main__":
    write(values)
