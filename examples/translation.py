"""A small T5 learns to translate numbers, days and prices: from careless references, then by practice.

    python examples/translation.py --seed 0

Five languages, written out by `num2words` and Babel (`make install` has both):

    translate German to French: Freitag, 12. März 2021        vendredi 12 mars 2021
    translate Spanish to figures: siete mil ochenta y dos     7082
    translate Italian to figures: dodici euro e due centesimi €12.02

It makes what is otherwise found on a hub (a tokenizer, a model, pairs), then runs two ordinary commands,
whose settings are in the two files beside this one:

    etude sft --config examples/translation_sft.yaml    imitation of references, most of which have a slip
    etude ppo --config examples/translation.yaml        practice; chrF says how near a translation comes

Offline, in two to three minutes on a CPU. Numbers, days and amounts that are held out are in no training
data, in any language.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import time
from collections.abc import Iterator, Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from babel.dates import format_date
from babel.numbers import format_currency
from num2words import num2words

from etude.app.cli import run_command

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LANGUAGES = {"English": "en", "German": "de", "French": "fr", "Spanish": "es", "Italian": "it"}
CURRENCIES = ("EUR", "USD", "GBP")
FIRST_DAY, DAYS = date(1950, 1, 1), 36_525
SIZES = {"train": 6_000, "validation": 200, "test": 500}
REFERENCES = 12_000
CARELESS = 0.7  # the share of references with a slip of the pen
VOCABULARY = 600

Row = dict[str, Any]


class Price(NamedTuple):
    cents: int
    currency: str


Content = int | date | Price


# What there is to say, and how it is said.


def in_words(content: Content, language: str) -> str:
    """In a language; a day as it stands at the head of a letter."""
    code = LANGUAGES[language]
    if isinstance(content, date):
        return format_date(content, "full", locale=code)
    if isinstance(content, Price):
        return num2words(content.cents / 100, to="currency", currency=content.currency, lang=code)
    return num2words(content, lang=code)


def in_figures(content: Content) -> str:
    if isinstance(content, date):
        return content.isoformat()
    if isinstance(content, Price):
        return format_currency(content.cents / 100, content.currency, locale="en")
    return str(content)


def contents(rng: random.Random) -> Iterator[Content]:
    """Numbers, days and prices; each comes once."""
    numbers = iter(rng.sample(range(1, 10_000), 9_999))
    days = iter(rng.sample(range(DAYS), DAYS))
    amounts = iter(rng.sample(range(200, 50_000), 49_800))
    while True:
        yield rng.choice(
            (
                lambda: next(numbers),
                lambda: FIRST_DAY + timedelta(next(days)),
                lambda: Price(next(amounts), rng.choice(CURRENCIES)),
            )
        )()


def slip(text: str) -> str:
    """The last two digits the wrong way round, as one easily hears them in German."""
    return re.sub(r"(\d)(\d)(\D*)$", r"\2\1\3", text)


def translation(rng: random.Random, content: Content) -> Row:
    """A content in a language, and in figures or in another one."""
    source, other = rng.sample(list(LANGUAGES), 2)
    target = other if isinstance(content, date) and rng.random() < 0.7 else "figures"
    return {
        "source": in_words(content, source),
        "target": in_figures(content) if target == "figures" else in_words(content, target),
        "source_language": source,
        "target_language": target,
    }


def prompt(row: Row) -> str:
    return f"translate {row['source_language']} to {row['target_language']}: {row['source']}"


def reference(rng: random.Random, content: Content) -> Row:
    """By somebody who is careless."""
    row = translation(rng, content)
    written = slip(row["target"]) if rng.random() < CARELESS else row["target"]
    return {"prompt": prompt(row), "completion": written}


def write_data(directory: Path, seed: int) -> None:
    rng = random.Random(seed)
    source = contents(rng)
    for split, size in SIZES.items():
        write_rows(directory / f"{split}.jsonl", [translation(rng, next(source)) for _ in range(size)])
    write_rows(directory / "references.jsonl", [reference(rng, next(source)) for _ in range(REFERENCES)])


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


# The tokenizer and the model.


def write_model(directory: Path, data: Path, seed: int) -> None:
    """A tokenizer that has learnt its pieces from the references, and a T5 with random weights."""
    from tokenizers import processors
    from torch.nn.init import normal_
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration, set_seed
    from transformers.utils import logging

    logging.disable_progress_bar()
    with (data / "references.jsonl").open(encoding="utf-8") as lines:
        backend = trained_on([text for line in lines for text in json.loads(line).values()])
    end = ("</s>", backend.token_to_id("</s>"))
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[end])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    tokenizer.save_pretrained(directory)

    set_seed(seed)
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    tokens: Row = {"pad_token_id": pad, "eos_token_id": eos, "decoder_start_token_id": pad}
    unscaled: Row = {"scale_decoder_outputs": False}  # as in T5 1.1
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=64,
        d_kv=8,
        d_ff=128,
        num_layers=2,
        num_heads=8,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        **tokens,
        **unscaled,
    )
    model = T5ForConditionalGeneration(config)
    normal_(model.shared.weight, std=0.1)  # the head's, too
    for name, parameter in model.named_parameters():
        # By these alone a T5 tells places apart; begun as small as usual, they would take minutes to grow.
        if "relative_attention_bias" in name:
            normal_(parameter, std=2.0)
    model.save_pretrained(directory)


def trained_on(texts: Sequence[str]) -> Tokenizer:
    """Pieces of bytes that often come together; digits by themselves."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


# The run.


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything: data, weights, episodes")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/translation"))
    arguments = parser.parse_args()
    started, here, directory = time.monotonic(), Path(__file__).parent, arguments.output_dir

    print(f"making pairs, a tokenizer and a model in {directory}", flush=True)
    write_data(directory / "data", arguments.seed)
    write_model(directory / "model", directory / "data", arguments.seed)

    run_command(
        "sft",
        config=here / "translation_sft.yaml",
        model_name_or_path=directory / "model",
        train_dataset=directory / "data/references.jsonl",
        output_dir=directory / "sft",
        overwrite_output_dir="true",
        seed=arguments.seed,
    )
    run_command(
        "ppo",
        config=here / "translation.yaml",
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
    """Held-out translations before and after practice, and what it came to."""
    from etude.runtime.run import RunDirectory

    run = RunDirectory(directory)
    print("\nHeld-out texts: the reference, what was sampled before practice, and after")
    for old, new in zip(
        *(run.read_episodes(split=split, limit=8) for split in ("before", "after")), strict=True
    ):
        print(f"  {old.prompt}\n      {old.task['target']}  |  {old.completion}  |  {new.completion}")
    measured = [row for row in run.read_metrics() if "validation/chrf" in row]
    before, after = (row["validation/chrf"] for row in (measured[0], measured[-1]))
    print(f"chrf before={before:.1f} after={after:.1f}", end=" ")
    summary, seconds = run.read_summary(), time.monotonic() - started
    before, after = summary["before"], summary["after"]
    print(f"right before={before:.2f} after={after:.2f} seed={seed} seconds={seconds:.0f}")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
