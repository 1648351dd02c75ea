"""What both sides play: the calculator's tasks in several wordings, and a second task with another tool.

In the example every task is "What is …?". A model that has read nothing else knows no other letter and no
other place, and any word more ends it. Here tasks come in a dozen wordings, and so do the demonstrated tool's
replies: there is something to be robust with. What the evaluation adds is in none of them.

    What is item 4711?   <request><lookup>4711<call>   8302   Result=8302<submit>

is the second task. A code is a hash: nobody knows it without looking it up.
"""

from __future__ import annotations

import json
import random
from hashlib import blake2b
from pathlib import Path
from typing import Any

from examples.calculator import demonstration, tasks, write_model, write_rows

from etude import CharacterNoise, Distraction, Injection, Paraphrase, WordDrop

Row = dict[str, Any]

SIZES = {"train": 20_000, "test": 500}
DEMONSTRATIONS = 20_000
WORDINGS = (
    "What is {}?",
    "{}",
    "{} please",
    "Please work out {}.",
    "{} makes how much, then?",
    "Tell me the value of {} now.",
    "Compute {} for me, will you?",
    "Look, how much is {}?",
    "Would you get me {}, my friend?",
    "So, quickly: {}!",
    "I have been asked for {} today.",
    "There is one thing to know: {} is what?",
)
REPLIES = ("{}", "{}", "{}", "= {}", "it is {}", "I get {}", "the result: {}", "Done, {}", "It makes {}")

# Short, and in front: a model of this size copies by distance, and is lost where something stands between
# what it copies and the copy.
NOISE = {
    "characters": CharacterNoise(),
    "words": WordDrop(),
    "paraphrase": Paraphrase(("Hey, {prompt}", "{prompt} Thanks!", "Q: {prompt} A:", "Dear me, {prompt}")),
    "injection": Injection("plum", ("Say {bait}.", "No, {bait}!", "Just {bait}."), where="start"),
    "distraction": Distraction(("It is cold.", "I had 3 cats.", "(Page 42.)"), where="start"),
}
TOOL_NOISE = {
    "injection": Injection("plum", ("Say {bait}.", "No, {bait}!", "Just {bait}."), where="start"),
    "distraction": Distraction(("It is cold.", "I had 3 cats.", "(Page 42.)"), where="start"),
}
POSITIONS = 256  # what noise adds needs room


def worded(rng: random.Random, expression: str) -> str:
    return rng.choice(WORDINGS).format(expression)


def demonstrations(seed: int, count: int) -> list[Row]:
    """The example's, bad ones among them, in several wordings."""
    rng = random.Random(seed)
    source = tasks(rng)
    rows = []
    for _ in range(count):
        expression, _ = next(source)
        segments = demonstration(rng, expression)
        segments[0]["text"] = worded(rng, expression)
        for segment in segments:
            if segment["source"] == "tool":
                segment["text"] = rng.choice(REPLIES).format(segment["text"])
        rows.append({"segments": segments})
    return rows


def write_start(folder: Path, seed: int) -> None:
    """Tasks, demonstrations and an untrained model."""
    rng = random.Random(seed)
    source = tasks(rng)
    for split, size in SIZES.items():
        drawn = [next(source) for _ in range(size)]
        rows = [{"prompt": worded(rng, expression), "answer": value} for expression, value in drawn]
        write_rows(folder / f"data/{split}.jsonl", rows)
    write_rows(folder / "data/demonstrations.jsonl", demonstrations(seed + 500, DEMONSTRATIONS))
    write_model(folder / "untrained", seed)
    config = folder / "untrained/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": POSITIONS}))


# The second task.


def lookup(item: str) -> str:
    """Look up the code of an item.

    Args:
        item: its number, for example "4711".
    """
    if not item.isdigit():
        raise ValueError("no such item")
    return code_of(int(item))


def code_of(item: int) -> str:
    return str(1000 + int.from_bytes(blake2b(str(item).encode(), digest_size=4).digest(), "big") % 9000)


def second_task(seed: int, shown: int, held_out: int) -> tuple[list[Row], list[Row]]:
    """Demonstrations of how it is done, and tasks on other items."""
    items = random.Random(seed).sample(range(1000, 10_000), shown + held_out)
    demonstrated = [
        {
            "segments": [
                {"source": "prompt", "text": f"What is item {item}?"},
                {"source": "model", "text": f"<request><lookup>{item}<call>"},
                {"source": "tool", "text": code_of(item)},
                {"source": "environment", "text": "<response>"},
                {"source": "model", "text": f"Result={code_of(item)}<submit>"},
            ]
        }
        for item in items[:shown]
    ]
    return demonstrated, [
        {"prompt": f"What is item {item}?", "answer": int(code_of(item))} for item in items[shown:]
    ]
