"""One small model practises three skills in one run: to use a calculator, to translate, and to summarise.

    python examples/mixed.py --seed 0

Each skill is an environment of its own, with its own prompt, rewards and metrics. Offline, in a few minutes.
What is otherwise found on a hub is made here: a tokenizer, a model, tasks, and demonstrations by somebody
careless. Then two ordinary commands, whose settings are in the two files beside this one:

    etude sft --config examples/mixed_sft.yaml      imitation of demonstrations of all three, most of them bad
    etude ppo --config examples/mixed.yaml          practice, each skill for its own score
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

from calculator import demonstration, slip, tasks, write_rows
from num2words import num2words

from etude.app.cli import run_command

LANGUAGES = {"English": "en", "German": "de", "French": "fr", "Spanish": "es"}
PACKAGES = Path(__file__).parent / "data/packages.jsonl.gz"  # packages.py beside it says where they are from
SIZES = {"test": 200, "validation": 100, "train": 2_300}
DEMONSTRATIONS = 6_000  # of each skill
CARELESS = 0.6  # the share of translations with a wrong digit, and of summaries that are none
VOCABULARY = 2_000

Row = dict[str, Any]


# Tasks, as their environments read them. Each comes once.


def sums(rng: random.Random) -> Iterator[Row]:
    for expression, value in tasks(rng):
        yield {"prompt": f"What is {expression}?", "expression": expression, "answer": value}


def numbers(rng: random.Random) -> Iterator[Row]:
    """In words, whose order and spelling differ by language, and in digits."""
    for number in rng.sample(range(1, 10_000), 9_999):
        language = rng.choice(list(LANGUAGES))
        words = num2words(number, lang=LANGUAGES[language])
        yield {
            "source": words,
            "target": str(number),
            "source_language": language,
            "target_language": "digits",
        }


def packages(rng: random.Random) -> Iterator[Row]:
    """Descriptions, and what sums them up. Those from one source are alike, and come one after the other."""
    with gzip.open(PACKAGES, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    sources = sorted({row["source"] for row in rows})
    rng.shuffle(sources)
    yield from sorted(rows, key=lambda row: sources.index(row["source"]))


# Demonstrations.


def show_sum(rng: random.Random, task: Row) -> list[Row]:
    return demonstration(rng, task["expression"])


def show_number(rng: random.Random, task: Row) -> list[Row]:
    digits = slip(rng, task["target"]) if rng.random() < CARELESS else task["target"]
    return said(f"{task['source_language']}: {task['source']}\n{task['target_language']}:", f" {digits}")


def show_package(rng: random.Random, task: Row) -> list[Row]:
    """A summary, or by somebody careless the first words."""
    words = task["document"].split()
    copied = " ".join(words[: rng.randint(8, 16)])
    return said(f"{task['document']}\n\nTL;DR:", f" {copied if rng.random() < CARELESS else task['summary']}")


def said(prompt: str, answer: str) -> list[Row]:
    return [{"source": "prompt", "text": prompt}, {"source": "model", "text": answer}]


SKILLS = {
    "calculator": (sums, show_sum),
    "translation": (numbers, show_number),
    "summarization": (packages, show_package),
}


def write_data(directory: Path, seed: int) -> None:
    rng, demonstrations = random.Random(seed), []
    for skill, (tasks_of, show) in SKILLS.items():
        source = tasks_of(rng)
        rows = {split: [next(source) for _ in range(size)] for split, size in SIZES.items()}
        for split, own in rows.items():
            write_rows(directory / skill / f"{split}.jsonl", own)
        demonstrations += [show(rng, rng.choice(rows["train"])) for _ in range(DEMONSTRATIONS)]
    write_rows(directory / "demonstrations.jsonl", [{"segments": segments} for segments in demonstrations])


# The tokenizer and the model.


def write_model(directory: Path, data: Path, seed: int) -> None:
    """A tokenizer that has learnt its pieces from the demonstrations, and a Llama with random weights."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
    from transformers.utils import logging

    logging.disable_progress_bar()
    tags = [AddedToken(f"<{tag}>", normalized=False) for tag in ("request", "call", "response", "submit")]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    with (data / "demonstrations.jsonl").open(encoding="utf-8") as lines:
        texts = ["".join(segment["text"] for segment in json.loads(line)["segments"]) for line in lines]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False, special_tokens=["<eos>"]
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_tokens(tags)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")
    tokenizer.save_pretrained(directory)

    set_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        initializer_range=0.05,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(directory)


# The run.


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything: data, weights, episodes")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/mixed"))
    arguments = parser.parse_args()
    started, here, directory = time.monotonic(), Path(__file__).parent, arguments.output_dir

    print(f"making a tokenizer, a model, tasks and demonstrations in {directory}", flush=True)
    write_data(directory / "data", arguments.seed)
    write_model(directory / "model", directory / "data", arguments.seed)

    run_command(
        "sft",
        config=here / "mixed_sft.yaml",
        model_name_or_path=directory / "model",
        train_dataset=directory / "data/demonstrations.jsonl",
        output_dir=directory / "sft",
        overwrite_output_dir="true",
        seed=arguments.seed,
    )
    run_command(
        "ppo",
        config=here / "mixed.yaml",
        model_name_or_path=directory / "sft",
        output_dir=directory,
        overwrite_output_dir="true",
        seed=arguments.seed,
        **places(directory),
    )
    show(directory, arguments.seed, started)


def places(directory: Path) -> dict[str, Path]:
    """Options that say where the tasks are."""
    parts = (("train", "train"), ("eval", "validation"), ("test", "test"))
    return {
        f"environments.{skill}.{part}_dataset": directory / f"data/{skill}/{split}.jsonl"
        for skill in SKILLS
        for part, split in parts
    }


def show(directory: Path, seed: int, started: float) -> None:
    """An episode of each skill, and what it came to."""
    from rich.console import Console

    from etude.reporting.episodes import episode_text, legend
    from etude.runtime.run import RunDirectory

    run, console = RunDirectory(directory), Console()
    console.print("\n[bold]Held-out tasks, after training[/bold]")
    console.print(legend(), "\n", soft_wrap=True)
    episodes = {episode.environment: episode for episode in reversed(run.read_episodes(split="after"))}
    for skill in SKILLS:
        console.print(episode_text(episodes[skill]), "\n", soft_wrap=True)
    for skill, both in run.read_summary()["environments"].items():
        pairs = ((name, before, both["after"][name]) for name, before in both["before"].items())
        print(f"{skill}:", ", ".join(f"{name} {before:.2f} → {after:.2f}" for name, before, after in pairs))
    summary, seconds = run.read_summary(), time.monotonic() - started
    before, after = summary["before"], summary["after"]
    print(f"success before={before:.2f} after={after:.2f} seed={seed} seconds={seconds:.0f}")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
