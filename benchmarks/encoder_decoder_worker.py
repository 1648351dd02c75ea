"""A side of the encoder–decoder benchmark, in a process and on a core of its own.

From one undertrained start, a small T5 or BART either practises by PPO or goes on imitating, for so many
seconds; the learning rate falls linearly with them to zero. Then it is measured on held-out tasks.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from examples import summaries, translation
from tokenizers import processors
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
    set_seed,
)

from benchmarks.common import Json
from etude import (
    AutoModelForSeq2SeqLMWithValueHead,
    PPOConfig,
    PPOTrainer,
    SFTConfig,
    SFTTrainer,
    SummarizationEnvironment,
    TextEnvironment,
    TranslationEnvironment,
)
from etude.evaluation.evaluate import evaluate
from etude.models.loading import load_tokenizer

Row = dict[str, Any]

TEST, TRAIN, REFERENCES = 300, 6_000, 12_000
NEW_TOKENS = {"translation": 24, "summaries": 14}
STEPS = {"t5": 1_500, "bart": 900}  # of the start's SFT: T5 is slower to be sure enough for practice to help
START = {"t5": 5e-3, "bart": 2e-3}
PRACTICE: Json = {
    "batch_size": 128,
    "mini_batch_size": 64,
    "ppo_epochs": 2,
    "init_kl_coef": 0.0,
    "adap_kl_ctrl": False,
    "lam": 1.0,
    "vf_coef": 0.5,
    "max_grad_norm": 1.0,
}
RATES = {
    ("translation", "t5"): {"ppo": 7e-4, "sft": 1e-3},
    ("translation", "bart"): {"ppo": 4e-4, "sft": 1e-3},
    ("summaries", "t5"): {"ppo": 5e-4, "sft": 1e-3},
    ("summaries", "bart"): {"ppo": 3e-4, "sft": 1e-3},
}


# Data.


def write_data(task: str, directory: Path, seed: int) -> None:
    """`train` and `test` tasks with true references, and `references` to imitate."""
    rng = random.Random(seed)
    directory.mkdir(parents=True, exist_ok=True)
    {"translation": _translations, "summaries": _summaries}[task](rng, directory)


def _translations(rng: random.Random, directory: Path) -> None:
    """References are careless: in most of them the last two digits are the wrong way round."""
    source = translation.contents(rng)
    for split, size in {"train": TRAIN, "test": TEST}.items():
        write_rows(
            directory / f"{split}.jsonl", [translation.translation(rng, next(source)) for _ in range(size)]
        )
    references = [translation.reference(rng, next(source)) for _ in range(REFERENCES)]
    write_rows(directory / "references.jsonl", references)


def _summaries(rng: random.Random, directory: Path) -> None:
    """Packages of one source are on one side. References are careless: 60 % are a text's first words."""
    splits = summaries.packages(rng)
    for split in ("train", "test"):
        write_rows(directory / f"{split}.jsonl", splits[split])
    write_rows(directory / "references.jsonl", summaries.references(rng, splits["train"]))


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


# Models.


def make_tokenizer(task: str, family: str, directory: Path) -> PreTrainedTokenizerFast:
    """The task's; texts end, and BART's begin, as the family's do."""
    if task == "translation":
        references = read_rows(directory / "references.jsonl")
        backend = translation.trained_on([text for row in references for text in row.values()])
    else:
        backend = summaries.trained_on(read_rows(directory / "train.jsonl"))
    frame = "<s> $A </s>" if family == "bart" else "$A </s>"
    ids = [(name, backend.token_to_id(name)) for name in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(single=frame, special_tokens=ids)
    names = {"pad_token": "<pad>", "eos_token": "</s>"}
    names |= {"bos_token": "<s>"} if family == "bart" else {}
    names |= {"unk_token": "<unk>"} if task == "summaries" else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def make_model(family: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Two layers on either side; .3 to .5 million parameters."""
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    if family == "bart":
        layers = {
            f"{part}_{name}": value
            for part in ("encoder", "decoder")
            for name, value in {"layers": 2, "attention_heads": 4, "ffn_dim": 192}.items()
        }
        ids |= {"bos_token_id": tokenizer.bos_token_id, "decoder_start_token_id": tokenizer.eos_token_id}
        config = BartConfig(
            vocab_size=len(tokenizer),
            d_model=96,
            max_position_embeddings=160,
            dropout=0.0,
            init_std=0.1,
            **layers,
            **ids,
        )
        model = BartForConditionalGeneration(config)
        model.generation_config.forced_bos_token_id = tokenizer.bos_token_id
        model.generation_config.forced_eos_token_id = None
        return model
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=64,
        d_kv=8,
        d_ff=128,
        num_layers=2,
        num_heads=8,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        scale_decoder_outputs=False,  # as in T5 1.1
        decoder_start_token_id=tokenizer.pad_token_id,
        **ids,
    )
    model = T5ForConditionalGeneration(config)
    torch.nn.init.normal_(model.shared.weight, std=0.1)  # the head's, too
    for name, parameter in model.named_parameters():
        if "relative_attention_bias" in name:  # else such a small one takes long to tell places apart
            torch.nn.init.normal_(parameter, std=2.0)
    return model


def make_start(task: str, family: str, directory: Path, seed: int) -> None:
    """The undertrained model that both sides start from, and its data."""
    write_data(task, directory, seed)
    references = read_rows(directory / "references.jsonl")
    tokenizer = make_tokenizer(task, family, directory)
    set_seed(seed)
    model = make_model(family, tokenizer)
    imitation = directory / "imitation"
    imitate(model, tokenizer, references, START[family], seed, imitation, max_steps=STEPS[family])
    model.save_pretrained(directory / "start")
    tokenizer.save_pretrained(directory / "start")


# The two sides.


class Clock:
    """Seconds of this process's own time, or by the wall."""

    def __init__(self, kind: str) -> None:
        self.now: Callable[[], float] = time.process_time if kind == "cpu" else time.monotonic
        self.started = self.now()

    @property
    def seconds(self) -> float:
        return self.now() - self.started


class TimeIsUpError(Exception):
    """The time is up."""


def practise(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    environment: TextEnvironment,
    rows: Sequence[Row],
    settings: Json,
) -> int:
    """PPO until the time is up; how many iterations."""
    policy = AutoModelForSeq2SeqLMWithValueHead(model)
    optimizer = torch.optim.Adam(policy.parameters(), lr=settings["rate"])
    clock, seconds = Clock(settings["clock"]), settings["seconds"]
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: max(0.0, 1 - clock.seconds / seconds))
    config = PPOConfig(
        output_dir=settings["run"],
        overwrite_output_dir=True,
        disable_progress=True,
        seed=settings["seed"],
        steps=10**9,
        eval_steps=0,
        save_steps=0,
        episodes_to_log=0,
        **PRACTICE,
    )

    class Timed(PPOTrainer):
        def learn(self, trajectories: Any) -> Any:
            stats = super().learn(trajectories)
            if clock.seconds >= seconds:
                raise TimeIsUpError
            return stats

    trainer = Timed(
        config,
        policy,
        tokenizer=tokenizer,
        environment=environment,
        train_dataset=list(rows),
        optimizer=optimizer,
        lr_scheduler=falling,
    )
    clock.started = clock.now()
    with suppress(TimeIsUpError):
        trainer.train()
    return trainer.current_step


class _UntilTimeIsUp(TrainerCallback):
    def __init__(self, clock: Clock, seconds: float) -> None:
        self.clock, self.seconds = clock, seconds

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.clock.started = self.clock.now()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = self.clock.seconds >= self.seconds


def imitate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    references: Sequence[Row],
    rate: float,
    seed: int,
    directory: Path,
    max_steps: int = 10**7,
    clock: Clock | None = None,
    seconds: float = 0.0,
) -> int:
    """SFT for so many steps, or until the time is up; how many steps."""
    config = SFTConfig(
        output_dir=str(directory),
        overwrite_output_dir=True,
        max_steps=max_steps,
        per_device_train_batch_size=32,
        learning_rate=rate,
        lr_scheduler_type="linear" if clock is None else "constant",
        warmup_steps=max_steps // 10 if clock is None else 0,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        seed=seed,
    )
    extra: Json = {}
    if clock is not None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
        falling = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda _: max(0.0, 1 - clock.seconds / seconds)
        )
        extra = {"optimizers": (optimizer, falling), "callbacks": [_UntilTimeIsUp(clock, seconds)]}
    trainer = SFTTrainer(model, config, train_dataset=list(references), processing_class=tokenizer, **extra)
    trainer.train()
    return int(trainer.state.global_step)


# Measuring.


def environment_of(
    task: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **generation: Any
) -> TextEnvironment:
    """chrF of a translation, mean of ROUGE-1 and ROUGE-L of a summary, in [0, 1]."""
    options: Json = {
        "generation_kwargs": {"max_new_tokens": NEW_TOKENS[task], **generation},
        "slots": 128,
        "seed": 7,
    }
    if task == "translation":
        return TranslationEnvironment(model, tokenizer, **options)
    return SummarizationEnvironment(
        model, tokenizer, reward_weights={"rouge1": 0.5, "rougeL": 0.5}, **options
    )


def measure(
    task: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]
) -> Json:
    """Mean score, sampled and greedy; of translations also the share that is right to the letter."""
    model.eval()
    found = {}
    for way, generation in {"sampled": {}, "greedy": {"do_sample": False}}.items():
        environment = environment_of(task, model, tokenizer, **generation)
        evaluation = evaluate(environment, list(rows), seed=1)
        found[way] = evaluation.measures["clean"]["reward"].value
        if task == "translation":
            episodes = [episode for (episode,) in evaluation.episodes["clean"]]
            right = [episode.completion.strip() == episode.task["target"] for episode in episodes]
            found[f"{way}_exact"] = sum(right) / len(right)
    return found


@contextmanager
def on_core(core: int | None) -> Iterator[None]:
    if core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    yield


def play(settings: Json) -> Json:
    """One side, from its start to its measures."""
    task, family = settings["task"], settings["family"]
    directory = Path(settings["directory"])
    tokenizer = load_tokenizer(directory / "start")
    model = AutoModelForSeq2SeqLM.from_pretrained(directory / "start").eval()
    set_seed(settings["seed"])
    test = read_rows(directory / "test.jsonl")
    before = measure(task, model, tokenizer, test)
    rate = settings.get("rate") or RATES[task, family][settings["side"]]
    if settings["side"] == "ppo":
        environment = environment_of(task, model, tokenizer)
        rows = read_rows(directory / "train.jsonl")
        steps = practise(model, tokenizer, environment, rows, {**settings, "rate": rate})
    else:
        clock, references = Clock(settings["clock"]), read_rows(directory / "references.jsonl")
        random.Random(settings["seed"] + 1).shuffle(references)
        steps = imitate(
            model,
            tokenizer,
            references,
            rate,
            settings["seed"],
            directory / "imitation",
            clock=clock,
            seconds=settings["seconds"],
        )
    return {"before": before, "after": measure(task, model, tokenizer, test), "steps": steps, "rate": rate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", type=json.loads, help="what the benchmark asks for, in JSON")
    parser.add_argument("answer", type=Path, help="where the answer goes, in JSON")
    given = parser.parse_args()
    torch.set_num_threads(1)
    settings = given.settings
    with on_core(settings.get("core")):
        if settings["side"] == "start":
            make_start(settings["task"], settings["family"], Path(settings["directory"]), settings["seed"])
            answer = {}
        else:
            answer = play(settings)
    given.answer.write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
