"""What the robustness comparison asks of a worker process.

Requests by their "kind": make a "start" (supervised, from which both sides go on), "practise" from it by PPO,
or "imitate" for as long; "evaluate" weights by time; put the final ones under "noise"; let them "adapt" to a
second task with another tool.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import torch
from examples.calculator import exact_answer
from safetensors.torch import load_file
from torch.optim import AdamW
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)

from benchmarks.etude_learning import EVALUATION_SEED, EXAMPLES, evaluate, train
from benchmarks.learning_watch import Watch, serve_runs
from benchmarks.robustness_tasks import (
    NOISE,
    TOOL_NOISE,
    demonstrations,
    lookup,
    second_task,
    write_start,
)
from etude import SFTConfig, SFTTrainer, TextEnvironment
from etude import evaluate as evaluate_model
from etude.app.cli import run_command
from etude.evaluation.evaluate import Evaluation
from etude.tools.calculator import calculator

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]

BATCH = 64
FRESH = 20_000  # demonstrations that the imitating side has not seen
SHOWN = 2000  # demonstrations of the second task
START_STEPS = 700


def make_start(request: dict[str, Any]) -> dict[str, Any]:
    """A model that has seen somebody guess, and sometimes calculate, as the example's has."""
    folder = Path(request["folder"])
    write_start(folder, request["seed"])
    run_command(
        "sft",
        config=EXAMPLES / "calculator_sft.yaml",
        model_name_or_path=folder / "untrained",
        train_dataset=folder / "data/demonstrations.jsonl",
        output_dir=folder / "model",
        max_steps=START_STEPS,
        seed=request["seed"],
    )
    return {}


def imitate(request: dict[str, Any]) -> dict[str, Any]:
    """Go on with supervised fine-tuning on fresh demonstrations, made as the first ones were."""
    folder = Path(request["folder"])
    model, tokenizer = load(request)
    watch = supervise(model, tokenizer, demonstrations(request["seed"] + 1000, FRESH), request)
    return watch.save(folder)


def adapt(request: dict[str, Any]) -> dict[str, Any]:
    """Imitate a few demonstrations of the second task; success on it at each of the marks."""
    model, tokenizer = load(request)
    shown, held_out = second_task(request["seed"], SHOWN, request["tasks"])
    watch = supervise(model, tokenizer, shown, request)
    measured = {}
    for mark, weights in watch.kept.items():
        model.load_state_dict(weights)
        measured[f"{mark:g}"] = as_json(play(model, tokenizer, held_out, tool=lookup))["clean"]
    return {"marks": measured, "steps": len(watch.history)}


def supervise(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[Any], request: dict[str, Any]
) -> Watch:
    """Fine-tune until the time is up, the rate falling to zero with the clock."""
    watch = Watch(model, request)
    optimizer = AdamW(model.parameters(), lr=request["settings"]["learning_rate"], weight_decay=0.0)
    config = SFTConfig(
        output_dir=str(Path(request["folder"]) / "run"),
        overwrite_output_dir=True,
        per_device_train_batch_size=BATCH,
        max_steps=10**6,
        append_eos=False,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        seed=request["seed"],
    )
    trainer = SFTTrainer(
        model,
        config,
        train_dataset=rows,
        processing_class=tokenizer,
        optimizers=(optimizer, watch.schedule(optimizer)),
        callbacks=[Clock(watch)],
    )
    watch.start()
    trainer.train()
    return watch


class Clock(TrainerCallback):
    """Looks at the clock at the end of each step."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.watch.iteration(float("nan")):
            control.should_training_stop = True


def noise(request: dict[str, Any]) -> dict[str, Any]:
    """Held-out tasks clean and under each noise; the same for every side."""
    model, tokenizer = load(request)
    rows = test_rows(request)
    sampled = play(model, tokenizer, rows, noise=NOISE, tool_noise=TOOL_NOISE)
    greedy = play(model, tokenizer, rows, greedy=True)
    return {"sampled": as_json(sampled), "greedy": as_json(greedy)}


def play(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Any],
    tool: Any = calculator,
    **options: Any,
) -> Evaluation:
    environment = TextEnvironment(
        model,
        tokenizer,
        tools=[tool],
        rewards=exact_answer,
        max_turns=2,
        max_tool_response=100,  # so that what is added to a reply arrives
        generation_kwargs={"max_new_tokens": 24},
        slots=128,
    )
    return evaluate_model(environment, rows, seed=EVALUATION_SEED, **options)


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """Every measure's value and interval by condition."""
    return evaluation.to_json()["conditions"]


def load(request: dict[str, Any]) -> Loaded:
    """The start's model and tokenizer, with the weights that a side has kept."""
    place = Path(request["start"]) / "model"
    model = AutoModelForCausalLM.from_pretrained(place).eval()
    if request.get("weights") is not None:
        model.load_state_dict(load_file(request["weights"]))
    return model, AutoTokenizer.from_pretrained(place)


def test_rows(request: dict[str, Any]) -> list[Any]:
    lines = (Path(request["start"]) / "data/test.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[: request["tasks"]]]


if __name__ == "__main__":
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    serve_runs(
        {
            "start": make_start,
            "practise": train,
            "imitate": imitate,
            "evaluate": evaluate,
            "noise": noise,
            "adapt": adapt,
        },
        "etude",
    )
