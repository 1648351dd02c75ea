"""A small T5 learns to translate numbers, dates and prices: from careless references, then by practice.

python examples/translation.py --seed 0

"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from babel.dates import format_date
from babel.numbers import format_currency
from num2words import num2words

LANGUAGES = {"English": "en", "German": "de", "French": "fr", "Spanish": "es", "Italian": "it"}
CURRENCIES = ("EUR", "USD", "GBP")
FIRST_DAY, DAYS = date(1950, 1, 1), 36_525
SIZES = {"train": 6_000, "validation": 200, "test": 500}
REFERENCES = 12_000
CARELESS = 0.6  # the share of references that are slips of the pen

Row = dict[str, Any]


class Price(NamedTuple):
    cents: int
    currency: str


Content = int | date | Price


# What there is to say, and how it is said.


def in_words(content: Content, language: str) -> str:
    """In a language; dates as they are written in letters."""
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


def slip(rng: random.Random, content: Content) -> Content:
    """The same with a digit wrong."""
    if isinstance(content, date):
        other = content
        while other == content:
            day, month, year = content.day, content.month, content.year
            part = rng.choice(("day", "month", "year"))
            other = content.replace(
                day=rng.randint(1, 28) if part == "day" else min(day, 28),
                month=rng.randint(1, 12) if part == "month" else month,
                year=rng.randint(1950, 2049) if part == "year" else year,
            )
        return other
    if isinstance(content, Price):
        return content._replace(cents=wrong_digit(rng, content.cents))
    return wrong_digit(rng, content)


def wrong_digit(rng: random.Random, number: int) -> int:
    digits = list(str(number))
    place = rng.randrange(len(digits))
    digits[place] = rng.choice([d for d in "123456789" if d != digits[place]])
    return int("".join(digits))


def translation(rng: random.Random, content: Content, written: Content | None = None) -> Row:
    """A content in a language, and in figures or in another one: what `written` says there."""
    source, other = rng.sample(list(LANGUAGES), 2)
    told = content if written is None else written
    target = other if isinstance(told, date) and rng.random() < 0.7 else "figures"
    return {
        "source": in_words(content, source),
        "target": in_figures(told) if target == "figures" else in_words(told, target),
        "source_language": source,
        "target_language": target,
    }


def prompt(row: Row) -> str:
    return f"translate {row['source_language']} to {row['target_language']}: {row['source']}"


def reference(rng: random.Random, content: Content) -> Row:
    """By somebody who is careless."""
    written = slip(rng, content) if rng.random() < CARELESS else content
    row = translation(rng, content, written)
    return {"prompt": prompt(row), "completion": row["target"]}


def write_data(directory: Path, seed: int) -> None:
    rng = random.Random(seed)
    source = contents(rng)
    for split, size in SIZES.items():
        write_rows(directory / f"{split}.jsonl", [translation(rng, next(source)) for _ in range(size)])
    write_rows(directory / "references.jsonl", [reference(rng, next(source)) for _ in range(REFERENCES)])


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
