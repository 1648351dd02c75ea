"""The classic pipeline on short film reviews: imitate, learn what readers prefer, then practise for it.

    python examples/reviews.py --seed 0

It makes what is otherwise found on a hub (a tokenizer, a model, reviews, readers' preferences), then runs
three ordinary commands, whose settings are in the three files beside this one:

    etude sft --config examples/reviews_sft.yaml          a language model of reviews, most of them bad ones
    etude reward --config examples/reviews_reward.yaml    a reward model: which of two reviews readers prefer
    etude ppo --config examples/reviews_ppo.yaml          the language model learns to please the reward model

The reviews have a grammar, which the reward model never learned to ask for: the share of them that are still
grammatical shows what pleasing it costs, and `init_kl_coef` decides. Under four minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
from collections.abc import Sequence
from pathlib import Path

from etude import reward
from etude.app.cli import run_command

ASPECTS = "acting plot ending music script cast story dialogue pacing humour camera lighting editing costumes"
VERBS = "was felt seemed looked remained sounded"
ADVERBS = "really quite rather very truly somewhat utterly fairly"
GOOD = "superb wonderful brilliant charming moving fresh clever gripping witty tender bold elegant funny warm"
BAD = "dull awful boring clumsy weak stale silly tedious lazy bland noisy ugly slow cold"
LIKED = "loved enjoyed admired liked adored praised"
DISLIKED = "hated disliked despised loathed regretted resented"
JOINTS = "and but while although yet whereas"
OPENINGS = "overall honestly frankly still sadly luckily"
WORDS = " ".join((ASPECTS, VERBS, ADVERBS, GOOD, BAD, LIKED, DISLIKED, JOINTS, OPENINGS, "the i .")).split()

SHARE_OF_GOOD = 0.3  # of a review's judgements
SIZES = {
    "reviews": 12_000,
    "preferences": 6_000,
    "held_out_preferences": 500,
    "prompts": 4_000,
    "held_out_prompts": 250,
}


# Reviews, and what readers think of them.


def pick(rng: random.Random, words: str) -> str:
    return rng.choice(words.split())


def subject(rng: random.Random) -> list[str]:
    return ["i"] if rng.random() < 0.25 else ["the", pick(rng, ASPECTS)]


def judgement(rng: random.Random, subject: Sequence[str]) -> list[str]:
    good = rng.random() < SHARE_OF_GOOD
    if subject[-1] == "i":
        return [pick(rng, LIKED if good else DISLIKED), "the", pick(rng, ASPECTS)]
    adverb = [pick(rng, ADVERBS)] if rng.random() < 0.5 else []
    return [pick(rng, VERBS), *adverb, pick(rng, GOOD if good else BAD)]


def beginning(rng: random.Random) -> list[str]:
    """Of a review, before it has judged anything: what it is a prompt for."""
    return [*([pick(rng, OPENINGS)] if rng.random() < 0.2 else []), *subject(rng)]


def ending(rng: random.Random, start: Sequence[str]) -> list[str]:
    words = judgement(rng, start)
    for _ in range(rng.choice((0, 1, 1, 2))):
        other = subject(rng)
        words += [pick(rng, JOINTS), *other, *judgement(rng, other)]
    return [*words, "."]


def text(words: Sequence[str]) -> str:
    return "".join(f" {word}" for word in words)


def balance(words: Sequence[str]) -> int:
    """Good words less bad ones: what readers go by."""
    good, bad = f"{GOOD} {LIKED}".split(), f"{BAD} {DISLIKED}".split()
    return sum((word in good) - (word in bad) for word in words)


def preference(rng: random.Random) -> dict[str, str]:
    """Two reviews of one beginning, and the choice of a reader, who errs at times (Bradley and Terry)."""
    start = beginning(rng)
    first = second = ending(rng, start)
    while first == second:
        second = ending(rng, start)
    takes_first = rng.random() < 1 / (1 + math.exp(2 * (balance(second) - balance(first))))
    chosen, rejected = (first, second) if takes_first else (second, first)
    return {"prompt": text(start), "chosen": text(chosen), "rejected": text(rejected)}


def demonstration(rng: random.Random) -> dict[str, str]:
    start = beginning(rng)
    return {"prompt": text(start), "completion": text(ending(rng, start))}


# Rewards that only watch: their weight is 0, their curves are in the report.


@reward(weight=0.0)
def sentiment(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """What readers would go by, which the reward model has to guess from their choices."""
    return [float(balance((p + c).split())) for p, c in zip(prompts, completions, strict=True)]


@reward(weight=0.0)
def grammatical(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """1 for a whole review by the grammar."""
    return [float(is_grammatical(p + c)) for p, c in zip(prompts, completions, strict=True)]


def is_grammatical(review: str) -> bool:
    return _REVIEW.fullmatch(review) is not None


def _one_of(*lists: str) -> str:
    return f"(?:{'|'.join(' '.join(lists).split())})"


_CLAUSE = (
    f"(?:i {_one_of(LIKED, DISLIKED)} the {_one_of(ASPECTS)}"
    f"|the {_one_of(ASPECTS)} {_one_of(VERBS)}(?: {_one_of(ADVERBS)})? {_one_of(GOOD, BAD)})"
)
_REVIEW = re.compile(f" (?:{_one_of(OPENINGS)} )?{_CLAUSE}(?: {_one_of(JOINTS)} {_CLAUSE}){{0,2}} \\.")


# Data, tokenizer and model.


def write_data(directory: Path, seed: int) -> None:
    rng = random.Random(seed)
    kinds = {
        "reviews": demonstration,
        "preferences": preference,
        "held_out_preferences": preference,
        "prompts": lambda rng: {"prompt": text(beginning(rng))},
        "held_out_prompts": lambda rng: {"prompt": text(beginning(rng))},
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, make in kinds.items():
        lines = (json.dumps(make(rng)) + "\n" for _ in range(SIZES[name]))
        (directory / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def write_model(directory: Path, seed: int) -> None:
    """A tokenizer whose tokens are the words, and a small GPT-2 that knows nothing yet."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, set_seed
    from transformers.utils import logging

    logging.disable_progress_bar()
    words = ["<pad>", "<eos>", "<unk>", *(f" {word}" for word in WORDS)]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(" [^ ]+"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(directory)
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
    GPT2LMHeadModel(config).save_pretrained(directory)


# The run.


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything: data, weights, episodes")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/reviews"))
    arguments = parser.parse_args()
    started, here, directory = time.monotonic(), Path(__file__).parent, arguments.output_dir

    print(f"making a tokenizer, a model, reviews and preferences in {directory}", flush=True)
    write_data(directory / "data", arguments.seed)
    write_model(directory / "model", arguments.seed)
    run_command(
        "sft",
        config=here / "reviews_sft.yaml",
        model_name_or_path=directory / "model",
        train_dataset=directory / "data/reviews.jsonl",
        output_dir=directory / "sft",
        overwrite_output_dir="true",
        seed=arguments.seed,
    )
    run_command(
        "reward",
        config=here / "reviews_reward.yaml",
        model_name_or_path=directory / "sft",
        train_dataset=directory / "data/preferences.jsonl",
        eval_dataset=directory / "data/held_out_preferences.jsonl",
        output_dir=directory / "reward_model",
        overwrite_output_dir="true",
        seed=arguments.seed,
    )
    run_command(
        "ppo",
        config=here / "reviews_ppo.yaml",
        model_name_or_path=directory / "sft",
        reward_model=directory / "reward_model",
        reward=[f"{here / 'reviews.py'}:{watching.name}" for watching in (sentiment, grammatical)],
        train_dataset=directory / "data/prompts.jsonl",
        eval_dataset=directory / "data/held_out_prompts.jsonl",
        output_dir=directory / "ppo",
        overwrite_output_dir="true",
        seed=arguments.seed,
    )
    show(directory, arguments.seed, started)


def show(directory: Path, seed: int, started: float) -> None:
    """Reviews of held-out beginnings before and after, and what it came to."""
    from etude.runtime.run import RunDirectory

    run = RunDirectory(directory / "ppo")
    metrics = run.read_metrics()
    measured = [row for row in metrics if "validation/reward" in row]
    print()
    for row in (measured[0], measured[-1]):
        for episode in run.read_episodes(step=row["step"], split="validation", limit=3):
            print(f"iteration {row['step']:>2} |{episode.prompt} …{episode.completion}")
    for name in ("reward_model", "sentiment", "grammatical"):
        before, after = (row[f"validation/rewards/{name}"] for row in (measured[0], measured[-1]))
        print(f"{name} before={before:.2f} after={after:.2f}", end=" ")
    accuracy = RunDirectory(directory / "reward_model").read_metrics()[-1]["validation/accuracy"]
    kl = [row["objective/kl"] for row in metrics if "objective/kl" in row][-1]
    seconds = time.monotonic() - started
    print(f"kl={kl:.2f} reward_accuracy={accuracy:.2f} seed={seed} seconds={seconds:.0f}")


if __name__ == "__main__":
    main()
