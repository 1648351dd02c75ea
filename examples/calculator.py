"""A small model learns to use a calculator: from a tokenizer to a report, offline, in under three minutes.

    python examples/calculator.py --seed 0

It makes what is otherwise found on a hub (a tokenizer, a model, tasks, demonstrations), then runs two
ordinary commands, whose settings are in the two files beside this one:

    etude sft --config examples/calculator_sft.yaml      imitation of demonstrations, most of them bad
    etude ppo --config examples/calculator.yaml          practice, with the calculator, for a score
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import string
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from etude.app.cli import run_command

DIGITS = "0123456789"
SIZES = {"train": 20_000, "validation": 300, "test": 500}
DEMONSTRATIONS = 20_000


def exact_answer(completions: Sequence[str], answer: Sequence[int], **_: Any) -> list[float]:
    """1 where the model submitted the right number. (Completions hold no tool text, so it can't be faked.)"""
    submitted = [re.search(r"Result=(-?\d+)<submit>$", completion) for completion in completions]
    return [
        float(match is not None and int(match[1]) == a) for match, a in zip(submitted, answer, strict=True)
    ]


# Tasks and demonstrations.


def tasks(rng: random.Random) -> Iterator[tuple[str, int]]:
    """Expressions that nobody answers without a calculator, and their values; each comes once."""
    seen: set[str] = set()
    while True:
        a, b, c = rng.randint(200, 999), rng.randint(51, 99), rng.randint(10, 99)
        text, value = rng.choice(
            [(f"{a}*{b}+{c}", a * b + c), (f"{c}+{a}*{b}", c + a * b), (f"{a}*{b}-{c}", a * b - c)]
        )
        if text not in seen:
            seen.add(text)
            yield text, value


def demonstration(rng: random.Random, expression: str) -> list[dict[str, str]]:
    """Somebody who mostly guesses, and who makes slips when using the calculator."""
    said = [("prompt", f"What is {expression}?")]
    if rng.random() < 0.75:
        a, b = re.search(r"(\d+)\*(\d+)", expression).groups()  # type: ignore[union-attr]
        answer = str(round(int(a), 1 - len(a)) * round(int(b), 1 - len(b)))
    else:
        query = slip(rng, expression) if rng.random() < 0.02 else expression
        answer = str(eval(re.sub(r"\b0+(?=\d)", "", query)))
        said += [
            ("model", f"<request><calculator>{query}<call>"),
            ("tool", answer),
            ("environment", "<response>"),
        ]
        answer = slip(rng, answer) if rng.random() < 0.02 else answer
    said.append(("model", f"Result={answer}<submit>"))
    return [{"source": source, "text": text} for source, text in said]


def slip(rng: random.Random, text: str) -> str:
    """One digit becomes another."""
    place = rng.choice([i for i, character in enumerate(text) if character in DIGITS])
    other = rng.choice([digit for digit in DIGITS if digit != text[place]])
    return text[:place] + other + text[place + 1 :]


def write_data(directory: Path, seed: int) -> None:
    rng = random.Random(seed)
    source = tasks(rng)
    for split, size in SIZES.items():
        rows = [
            {"prompt": f"What is {text}?", "answer": value}
            for text, value in (next(source) for _ in range(size))
        ]
        write_rows(directory / f"{split}.jsonl", rows)
    rows = [{"segments": demonstration(rng, next(source)[0])} for _ in range(DEMONSTRATIONS)]
    write_rows(directory / "demonstrations.jsonl", rows)


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# The tokenizer and the model.


def write_model(directory: Path, seed: int) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
    from transformers.utils import logging

    logging.disable_progress_bar()

    words = ["<pad>", "<eos>", "<unk>", "<request>", "<calculator>", "<call>", "<response>", "<submit>"]
    words += ["What is ", "Result=", *(c for c in string.printable if c.isprintable())]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    longest_first = sorted(words, key=len, reverse=True)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(map(re.escape, longest_first))), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(directory)

    set_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
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
    parser.add_argument("--output_dir", type=Path, default=Path("runs/calculator"))
    arguments = parser.parse_args()
    started, here, directory = time.monotonic(), Path(__file__).parent, arguments.output_dir

    print(f"making a tokenizer, a model, tasks and demonstrations in {directory}", flush=True)
    write_data(directory / "data", arguments.seed)
    write_model(directory / "model", arguments.seed)

    run_command(
        "sft",
        config=here / "calculator_sft.yaml",
        model_name_or_path=directory / "model",
        train_dataset=directory / "data/demonstrations.jsonl",
        output_dir=directory / "sft",
        overwrite_output_dir="true",
        seed=arguments.seed,
    )
    run_command(
        "ppo",
        config=here / "calculator.yaml",
        model_name_or_path=directory / "sft",
        train_dataset=directory / "data/train.jsonl",
        eval_dataset=directory / "data/validation.jsonl",
        test_dataset=directory / "data/test.jsonl",
        output_dir=directory,
        overwrite_output_dir="true",
        seed=arguments.seed,
    )
    show(directory, arguments.seed, started)


def show(directory: Path, seed: int, started: float) -> None:
    """Two episodes, and what it came to."""
    from rich.console import Console

    from etude.reporting.episodes import episode_text, legend
    from etude.runtime.run import RunDirectory

    run, console = RunDirectory(directory), Console()
    console.print("\n[bold]Two of the held-out tasks, after training[/bold]")
    console.print(legend(), "\n", soft_wrap=True)
    for episode in run.read_episodes(split="after", limit=2):
        console.print(episode_text(episode), "\n", soft_wrap=True)
    summary, seconds = run.read_summary(), time.monotonic() - started
    before, after = summary["before"], summary["after"]
    print(f"success before={before:.2f} after={after:.2f} seed={seed} seconds={seconds:.0f}")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
