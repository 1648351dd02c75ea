"""Our side of the learning comparison, and what all sides share: starting points and the one evaluation.

Requests by their "kind": make a "start" (supervised, from which every side goes on), "train" from it with one
of our trainers, or "evaluate" weights that some side kept.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from examples.calculator import exact_answer, write_data, write_model, write_rows
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Adam
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from benchmarks import learning_reviews as reviews
from benchmarks.learning_watch import TimeIsUp, Watch, serve_runs
from etude import (
    AutoModelForCausalLMWithValueHead,
    GRPOConfig,
    GRPOTrainer,
    PPOConfig,
    PPOTrainer,
    RLOOConfig,
    RLOOTrainer,
    TextEnvironment,
)
from etude.app.cli import run_command
from etude.data.batch import Trajectory
from etude.tools.calculator import calculator
from etude.trainers.policy import PolicyTrainer
from etude.types import Episode

EXAMPLES = Path(__file__).parent.parent / "examples"
EVALUATION_SEED = 4242
GROUP_TRAINERS = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}

# Starting points.


def make_start(request: dict[str, Any]) -> dict[str, Any]:
    make = {"calculator": start_calculator, "reviews": start_reviews}[request["task"]]
    make(Path(request["folder"]), request["seed"])
    return {}


def start_calculator(folder: Path, seed: int) -> None:
    """The example's: a model that has seen somebody guess, and sometimes calculate."""
    write_data(folder / "data", seed)
    write_model(folder / "untrained", seed)
    run_command(
        "sft",
        config=EXAMPLES / "calculator_sft.yaml",
        model_name_or_path=folder / "untrained",
        train_dataset=folder / "data/demonstrations.jsonl",
        output_dir=folder / "model",
        seed=seed,
    )


def start_reviews(folder: Path, seed: int) -> None:
    """A model that has read reviews, and the classifier that scores what it writes."""
    rng, sizes = random.Random(seed), reviews.SIZES
    texts = [{"text": reviews.review(rng)} for _ in range(sizes["reviews"])]
    write_rows(folder / "data/reviews.jsonl", texts)
    for split, size in (("train", sizes["prompts"]), ("test", sizes["held_out"])):
        write_rows(folder / f"data/{split}.jsonl", [{"prompt": reviews.prompt(rng)} for _ in range(size)])
    tokenizer = reviews.make_tokenizer()
    tokenizer.save_pretrained(folder / "untrained")
    reviews.make_model(tokenizer, seed).save_pretrained(folder / "untrained")
    run_command(
        "sft",
        model_name_or_path=folder / "untrained",
        train_dataset=folder / "data/reviews.jsonl",
        output_dir=folder / "model",
        max_steps=400,
        per_device_train_batch_size=64,
        learning_rate=2e-3,
        lr_scheduler_type="linear",
        warmup_steps=20,
        save_strategy="no",
        seed=seed,
    )
    accuracy = reviews.train_classifier(folder / "classifier", steps=400)
    print(f"classifier: {accuracy:.2f} right, of 0.90 possible")


# Training.


def train(request: dict[str, Any]) -> dict[str, Any]:
    """One run of `train()` from the start, until the time is up."""
    start, folder = Path(request["start"]), Path(request["folder"])
    tokenizer = AutoTokenizer.from_pretrained(start / "model")
    model = AutoModelForCausalLM.from_pretrained(start / "model")
    watch = Watch(model, request)
    run: dict[str, Any] = {
        "environment": make_environment(request["task"], start, tokenizer),
        "train_dataset": str(start / "data/train.jsonl"),
    }
    settings = {
        "output_dir": str(folder / "run"),
        "overwrite_output_dir": True,
        "disable_progress": True,
        "eval_steps": 0,
        "seed": request["seed"],
        **request["settings"],
    }
    trainer: PolicyTrainer
    if request["algorithm"] == "ppo":
        policy = AutoModelForCausalLMWithValueHead(model)
        optimizer = Adam(policy.parameters(), lr=settings["learning_rate"])
        run |= {"optimizer": optimizer, "lr_scheduler": watch.schedule(optimizer)}
        trainer = watched(PPOTrainer, watch)(PPOConfig(**settings), policy, **run)
    else:
        optimizer = Adam(model.parameters(), lr=settings["learning_rate"])
        run["optimizers"] = (optimizer, watch.schedule(optimizer))
        kind, config = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}[
            request["algorithm"]
        ]
        trainer = watched(kind, watch)(model, config(**settings), **run)
    assert trainer.train_rows  # loaded now, as the peers' are
    watch.start()
    try:
        trainer.train()
    except TimeIsUp:
        return watch.save(folder)
    raise RuntimeError("train() ended before the time was up; give it more steps")


def watched(trainer: Any, watch: Watch) -> Any:
    """The trainer, with a look at the clock at the end of each iteration."""

    class Watched(trainer):
        def learn(self, trajectories: Sequence[Trajectory]) -> dict[str, Any]:
            stats: dict[str, Any] = super().learn(trajectories)
            if watch.iteration(sum(t.score for t in trajectories) / len(trajectories)):
                raise TimeIsUp
            return stats

    return Watched


def make_environment(
    task: str, start: Path, tokenizer: PreTrainedTokenizerBase, model: nn.Module | None = None
) -> TextEnvironment:
    if task == "calculator":
        return TextEnvironment(
            model,
            tokenizer,
            tools=[calculator],
            rewards=exact_answer,
            max_turns=2,
            max_tool_response=24,
            generation_kwargs={"max_new_tokens": 24},
            seed=EVALUATION_SEED,
            slots=128,
        )
    return TextEnvironment(
        model,
        tokenizer,
        rewards=reviews.Sentiment(start / "classifier"),
        max_turns=1,
        generation_kwargs={"max_new_tokens": reviews.MAX_NEW_TOKENS},
        seed=EVALUATION_SEED,
        slots=128,
    )


# Evaluation.


def evaluate(request: dict[str, Any]) -> dict[str, Any]:
    """Held-out tasks, sampled at temperature 1, with the weights of each mark; the same draws for all."""
    start = Path(request["start"])
    tokenizer = AutoTokenizer.from_pretrained(start / "model")
    model = AutoModelForCausalLM.from_pretrained(start / "model").eval()
    before = AutoModelForCausalLM.from_pretrained(start / "model").eval()
    rows = [json.loads(line) for line in (start / "data/test.jsonl").read_text().splitlines()]
    measured = {}
    for mark, file in request["snapshots"].items():
        if file is not None:
            model.load_state_dict(load_file(file))
        environment = make_environment(request["task"], start, tokenizer, model)
        *_, histories = environment.run(rows[: request["tasks"]])
        episodes = [history.episode for history in histories]
        measured[mark] = measures(request["task"], episodes, model, before)
    return {"marks": measured}


def measures(task: str, episodes: Sequence[Episode], model: nn.Module, before: nn.Module) -> dict[str, float]:
    well_formed: Callable[[Episode], bool] = {
        "calculator": lambda episode: bool(episode.tool_calls),
        "reviews": lambda episode: reviews.is_grammatical(episode.text.removesuffix("<eos>")),
    }[task]
    kl_B = episode_logprobs(model, episodes) - episode_logprobs(before, episodes)
    return {
        "reward": sum(episode.reward for episode in episodes) / len(episodes),
        "well_formed": sum(map(well_formed, episodes)) / len(episodes),
        "kl": kl_B.mean().item(),
        "length": sum(sum(episode.sampled) for episode in episodes) / len(episodes),
    }


@torch.no_grad()
def episode_logprobs(model: nn.Module, episodes: Sequence[Episode]) -> Tensor:
    """log π of what was sampled in each episode, [B]."""
    ids_BT = nn.utils.rnn.pad_sequence([torch.tensor(e.token_ids) for e in episodes], batch_first=True)
    mask_BT = nn.utils.rnn.pad_sequence([torch.tensor(e.sampled) for e in episodes], batch_first=True)
    logprobs_BTV = model(input_ids=ids_BT).logits[:, :-1].log_softmax(-1)
    logprobs_BT = logprobs_BTV.gather(-1, ids_BT[:, 1:, None])[..., 0]
    return (logprobs_BT * mask_BT[:, 1:]).sum(1)


if __name__ == "__main__":
    serve_runs({"start": make_start, "train": train, "evaluate": evaluate}, "etude")
