"""A small BART learns to sum up what a package is for: from careless references, then by practice for ROUGE.

    python examples/summaries.py --seed 0

The texts are real: 2,700 packages of Debian, each with a long and a short description, in words that many of
them share (`data/packages.py` says how they were chosen). Most of what the model imitates first is no summary
but the first words of a text; practice is scored by the summaries that the packages' maintainers wrote.

It makes what is otherwise found on a hub (a tokenizer, a model), then runs two ordinary commands, whose
settings are in the two files beside this one:

    etude sft --config examples/summaries_sft.yaml      imitation
    etude ppo --config examples/summaries.yaml          practice; ROUGE says how near a summary comes

Offline, in two to three minutes on a CPU. Packages made from one source are alike: they are all held out,
or none is.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etude.app.cli import run_command

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PACKAGES = Path(__file__).parent / "data/packages.jsonl.gz"
SIZES = {"validation": 150, "test": 300}  # what is left is for training
REFERENCES = 24_000
SHUFFLED = 0.5  # the share of references that are about no text, only words: what copying is learnt from
CARELESS = 0.6  # the share of the others that are the first words of a text

Row = dict[str, Any]


# Texts, summaries and what stands for them.


def packages(rng: random.Random) -> dict[str, list[Row]]:
    """Each split's; packages of one source are in one split."""
    with gzip.open(PACKAGES, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    sources = sorted({row["source"] for row in rows})
    rng.shuffle(sources)
    splits: dict[str, list[Row]] = {}
    for split, size in SIZES.items():
        chosen: list[Row] = []
        while len(chosen) < size:
            source = sources.pop()
            chosen += [row for row in rows if row["source"] == source]
        rng.shuffle(chosen)
        splits[split] = chosen[:size]
    left = set(sources)
    splits["train"] = [row for row in rows if row["source"] in left]
    return splits


def words(text: str) -> list[str]:
    """As the tokenizer reads them: small letters, no punctuation."""
    return re.findall(r"[a-z0-9+#]+", text.lower())


def references(rng: random.Random, rows: Sequence[Row]) -> list[Row]:
    """Texts and what somebody careless wrote for them."""
    vocabulary = [word for row in rows for word in words(row["document"])]
    made = []
    for _ in range(REFERENCES):
        row = rng.choice(rows)
        text, summary = words(row["document"]), words(row["summary"])
        if rng.random() < SHUFFLED:
            text = summary = rng.sample(vocabulary, rng.randint(10, 24))
        if summary is text or rng.random() < CARELESS:
            summary = text[: rng.randint(5, 9)]
        made.append({"prompt": f"summarize: {' '.join(text)}", "completion": " ".join(summary)})
    return made


def write_data(directory: Path, seed: int) -> None:
    rng = random.Random(seed)
    splits = packages(rng)
    for split, rows in splits.items():
        write_rows(directory / f"{split}.jsonl", rows)
    write_rows(directory / "references.jsonl", references(rng, splits["train"]))


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# The tokenizer and the model.


def write_model(directory: Path, data: Path, seed: int) -> None:
    """A tokenizer of the words that come three times, and a BART with random weights."""
    from tokenizers import processors
    from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast, set_seed
    from transformers.utils import logging

    logging.disable_progress_bar()
    with (data / "train.jsonl").open(encoding="utf-8") as lines:
        backend = trained_on([json.loads(line) for line in lines])
    ends = [(name, backend.token_to_id(name)) for name in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(directory)

    set_seed(seed)
    config = BartConfig(
        vocab_size=len(tokenizer),
        d_model=96,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=192,
        decoder_ffn_dim=192,
        max_position_embeddings=96,
        dropout=0.0,
        init_std=0.1,  # with the usual .02 one so small learns nothing in minutes
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
    )
    model = BartForConditionalGeneration(config)
    model.generation_config.forced_bos_token_id = tokenizer.bos_token_id  # as BARTs on the hub have it
    model.generation_config.forced_eos_token_id = None
    model.save_pretrained(directory)


def trained_on(rows: Sequence[Row]) -> Tokenizer:
    """Words, in small letters; those that come less than three times are unknown."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex("[^a-z0-9+#]+"), " ")]
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.WordLevelTrainer(min_frequency=3, special_tokens=special, show_progress=False)
    texts = [f"summarize: {row['document']} {row['summary']}" for row in rows]
    backend.train_from_iterator(texts, trainer)
    return backend


# The run.


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything: data, weights, episodes")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/summaries"))
    arguments = parser.parse_args()
    started, here, directory = time.monotonic(), Path(__file__).parent, arguments.output_dir

    print(f"making references, a tokenizer and a model in {directory}", flush=True)
    write_data(directory / "data", arguments.seed)
    write_model(directory / "model", directory / "data", arguments.seed)

    run_command(
        "sft",
        config=here / "summaries_sft.yaml",
        model_name_or_path=directory / "model",
        train_dataset=directory / "data/references.jsonl",
        output_dir=directory / "sft",
        overwrite_output_dir="true",
        seed=arguments.seed,
    )
    run_command(
        "ppo",
        config=here / "summaries.yaml",
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
    """Held-out summaries before and after practice, and what it came to."""
    from etude.runtime.run import RunDirectory

    run = RunDirectory(directory)
    print("\nHeld-out texts: the reference, what was sampled before practice, and after")
    for old, new in zip(
        *(run.read_episodes(split=split, limit=6) for split in ("before", "after")), strict=True
    ):
        print(f"  {old.task['document']}")
        print(f"      {old.task['summary']}  |  {old.completion}  |  {new.completion}")
    measured = [row for row in run.read_metrics() if "validation/rouge1" in row]
    for name in ("rouge1", "rougeL"):
        before, after = (row[f"validation/{name}"] for row in (measured[0], measured[-1]))
        print(f"{name} before={before:.1f} after={after:.1f}", end=" ")
    print(f"seed={seed} seconds={time.monotonic() - started:.0f}")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
