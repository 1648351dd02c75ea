"""Short film reviews from a grammar of our own, a classifier that scores them, and what is grammatical.

    the acting was really superb and the plot felt quite dull .

Most reviews are bad ones, so a model of them starts with a low score. The reward is how probably, by a small
BERT, a review is a good one. It was trained on reviews of the grammar only: what isn't one may please it just
as well, and how much of what a policy writes still is one shows how far it is over-optimised.

Runs under every side's interpreter that takes part in this pair.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    set_seed,
)

ASPECTS = [
    "acting",
    "plot",
    "ending",
    "music",
    "script",
    "cast",
    "story",
    "dialogue",
    "pacing",
    "humour",
    "camera",
    "lighting",
    "editing",
    "costumes",
    "soundtrack",
    "director",
]
VERBS = ["was", "felt", "seemed", "looked", "remained", "sounded"]
ADVERBS = ["really", "quite", "rather", "very", "truly", "somewhat", "utterly", "fairly"]
GOOD = [
    "superb",
    "wonderful",
    "brilliant",
    "charming",
    "moving",
    "fresh",
    "clever",
    "gripping",
    "witty",
    "tender",
    "bold",
    "elegant",
    "funny",
    "warm",
    "stunning",
    "perfect",
]
BAD = [
    "dull",
    "awful",
    "boring",
    "clumsy",
    "weak",
    "stale",
    "silly",
    "tedious",
    "lazy",
    "bland",
    "noisy",
    "ugly",
    "slow",
    "cold",
    "messy",
    "dreadful",
]
LIKED = ["loved", "enjoyed", "admired", "liked", "adored", "praised"]
DISLIKED = ["hated", "disliked", "despised", "loathed", "regretted", "resented"]
JOINTS = ["and", "but", "while", "although", "yet", "whereas"]
OPENINGS = ["overall", "honestly", "frankly", "still", "sadly", "luckily"]
WORDS = [*ASPECTS, *VERBS, *ADVERBS, *GOOD, *BAD, *LIKED, *DISLIKED, *JOINTS, *OPENINGS, "the", "i", "."]

SHARE_OF_GOOD = 0.3  # of a review's judgements
SIZES = {"reviews": 12_000, "prompts": 4_000, "held_out": 500}
MAX_NEW_TOKENS = 24

# Reviews.


def clause(rng: random.Random) -> list[str]:
    good = rng.random() < SHARE_OF_GOOD
    if rng.random() < 0.25:
        return ["i", rng.choice(LIKED if good else DISLIKED), "the", rng.choice(ASPECTS)]
    adverb = [rng.choice(ADVERBS)] if rng.random() < 0.5 else []
    return ["the", rng.choice(ASPECTS), rng.choice(VERBS), *adverb, rng.choice(GOOD if good else BAD)]


def review(rng: random.Random) -> str:
    words = [rng.choice(OPENINGS)] if rng.random() < 0.2 else []
    words += clause(rng)
    for _ in range(rng.choice((0, 1, 1, 2))):
        words += [rng.choice(JOINTS), *clause(rng)]
    return "".join(f" {word}" for word in [*words, "."])


def prompt(rng: random.Random) -> str:
    """How a review begins, before it has judged anything."""
    opening = [rng.choice(OPENINGS)] if rng.random() < 0.2 else []
    start = ["i"] if rng.random() < 0.25 else ["the", rng.choice(ASPECTS)]
    return "".join(f" {word}" for word in [*opening, *start])


def is_good(text: str, rng: random.Random) -> bool:
    """What somebody says who read it: by the majority of its judgements, wrong once in ten."""
    words = text.split()
    balance = sum((word in GOOD or word in LIKED) - (word in BAD or word in DISLIKED) for word in words)
    judged = balance > 0 if balance else rng.random() < 0.5
    return judged != (rng.random() < 0.1)


def _one_of(*lists: Sequence[str]) -> str:
    return "(?:" + "|".join(word for words in lists for word in words) + ")"


_CLAUSE = (
    f"(?:i {_one_of(LIKED, DISLIKED)} the {_one_of(ASPECTS)}"
    f"|the {_one_of(ASPECTS)} {_one_of(VERBS)}(?: {_one_of(ADVERBS)})? {_one_of(GOOD, BAD)})"
)
_REVIEW = re.compile(f" (?:{_one_of(OPENINGS)} )?{_CLAUSE}(?: {_one_of(JOINTS)} {_CLAUSE}){{0,2}} \\.")


def is_grammatical(text: str) -> bool:
    return _REVIEW.fullmatch(text) is not None


# Tokenizer, model, classifier.


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word with the space before it is a token."""
    words = ["<pad>", "<eos>", "<unk>", *(f" {word}" for word in WORDS)]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(" [^ ]+"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> GPT2LMHeadModel:
    set_seed(seed)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=64,
        n_embd=128,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.05,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return GPT2LMHeadModel(config)


def train_classifier(folder: Path, steps: int) -> float:
    """Write a classifier of reviews to `folder`; its accuracy on new ones, labels wrong as ever."""
    set_seed(0)
    rng, tokenizer = random.Random(0), make_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=2,
    )
    model = BertForSequenceClassification(config).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        texts = [review(rng) for _ in range(64)]
        labels = torch.tensor([int(is_good(text, rng)) for text in texts])
        model(**_encoded(tokenizer, texts), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    texts = [review(rng) for _ in range(512)]
    scores = Sentiment(folder).of(texts)
    right = [(score > 0.5) == is_good(text, rng) for score, text in zip(scores, texts, strict=True)]
    return sum(right) / len(right)


def _encoded(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Any:
    # A review cut off at once has no token at all, which a model can't read.
    texts = [text or tokenizer.pad_token for text in texts]
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


class Sentiment:
    """The reward, for every side the same: how probably prompt and completion make a good review."""

    __name__ = "sentiment"

    def __init__(self, folder: Path) -> None:
        self.model = BertForSequenceClassification.from_pretrained(folder).eval()
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
        return self.of([p + c.removesuffix("<eos>") for p, c in zip(prompts, completions, strict=True)])

    @torch.no_grad()
    def of(self, texts: Sequence[str]) -> list[float]:
        logits_B2 = self.model(**_encoded(self.tokenizer, texts)).logits
        return logits_B2.softmax(-1)[:, 1].tolist()
