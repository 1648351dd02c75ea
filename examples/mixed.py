"""One small model learns three skills in one run: to use a calculator, to translate, and to summarise.

    python examples/mixed.py --seed 0

Each skill is an environment of its own, with its own prompt, rewards and metrics; the run mixes them by weight.
Offline, in a few minutes. What is otherwise found on a hub is made here: a tokenizer, a model, tasks, and
demonstrations by somebody careless. Then two ordinary commands, whose settings are beside this file:

    etude sft --config examples/mixed_sft.yaml       imitation, of all three
    etude ppo --config examples/mixed.yaml           practice, for three kinds of reward

Numbers in words are from num2words, descriptions of packages from Debian (`data/packages.py` says how).
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from calculator import demonstration, etude, slip, tasks, write_rows
from num2words import num2words

LANGUAGES = {"English": "en", "German": "de", "French": "fr", "Spanish": "es"}
SKILLS = ("calculator", "translation", "summarization")
SIZES = {"train": 4_000, "validation": 100, "test": 200}
DEMONSTRATIONS = 6_000  # of each skill
CARELESS = 0.6  # the share of translations with a wrong digit, and of summaries that only begin to copy
PACKAGES = Path(__file__).parent / "data/packages.jsonl.gz"
VOCABULARY = 2_000

Row = dict[str, Any]


# The skills: rows as their environments read them, and how somebody shows them.


def sums(rng: random.Random) -> Iterator[Row]:
    for text, value in tasks(rng):
        yield {"prompt": f"What is {text}?", "answer": value, "expression": text}


def show_sum(rng: random.Random, row: Row) -> list[Row]:
    return demonstration(rng, row["expression"])


def numbers(rng: random.Random) -> Iterator[Row]:
    """Numbers in words of a language, and in digits; the order of the words differs, and how they are joined."""
    while True:
        every = [(n, language) for n in range(1, 10_000) for language in LANGUAGES]
        for number, language in rng.sample(every, len(every)):
            words = num2words(number, lang=LANGUAGES[language])
            yield {"source": words, "target": str(number), "source_language": language, "target_language": "Digits"}


def show_number(rng: random.Random, row: Row) -> list[Row]:
    written = slip(rng, row["target"]) if rng.random() < CARELESS else row["target"]
    return said(f"{row['source_language']}: {row['source']}\n{row['target_language']}:", f" {written}")


def packages(rng: random.Random) -> Iterator[Row]:
    """Descriptions of packages, and the few words that sum each of them up."""
    with gzip.open(PACKAGES, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    while True:
        yield from rng.sample(rows, len(rows))


def show_package(rng: random.Random, row: Row) -> list[Row]:
    words = row["document"].split()
    copied = " ".join(words[: rng.randint(8, 16)])
    summary = copied if rng.random() < CARELESS else row["summary"]
    return said(f"{row['document']}\n\nTL;DR:", f" {summary}")


def said(prompt: str, answer: str) -> list[Row]:
    return [{"source": "prompt", "text": prompt}, {"source": "model", "text": answer}]
