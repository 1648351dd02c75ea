"""TRL 1.16's side of the learning comparison: `GRPOTrainer(tools=…)` and `RLOOTrainer`.

The little model writes `<request><calculator>1*2+3<call>` and reads `5<response>`. Two things make TRL play
that: a chat template that renders messages as just these tokens, and a response template by which it parses
them back. Its turns end with an end-of-sequence token; `<call>` and `<submit>` are declared as such.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from examples.calculator import exact_answer
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from benchmarks.learning_reviews import MAX_NEW_TOKENS, Sentiment
from benchmarks.learning_watch import Watch, serve_runs
from etude.tools.calculator import calculator  # the tool itself: no library in it

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'tool' %}{{ message.content }}<response>"
    "{% elif message.tool_calls %}{% for call in message.tool_calls %}"
    "<request><{{ call.function.name }}>"
    "{% for name, value in call.function.arguments.items() %}"
    "{% if name != 'expression' %}{{ name }}={% endif %}{{ value }}"  # TRL checks that no name gets lost
    "{% endfor %}<call>"
    "{% endfor %}"
    "{% else %}{{ message.content }}{% endif %}"
    "{% endfor %}"
)
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor_pattern": r"\?|<response>",
    "fields": {
        "tool_calls": {
            "open_pattern": "<request><(?P<name>[^<>]*)>",
            "close": "<call>",
            "content": "text",
            "repeats": True,
            "transform": {
                "type": "function",
                "function": {"name": "{name}", "arguments": {"expression": "{content}"}},
            },
        },
        "content": {"content": "text"},
    },
}
ENDS = ("<call>", "<submit>", "<eos>")

SETTINGS = {
    "max_steps": 1_000_000,  # the clock ends the run
    "logging_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
}


def train(request: dict[str, Any]) -> dict[str, Any]:
    start, folder = Path(request["start"]), Path(request["folder"])
    tokenizer = AutoTokenizer.from_pretrained(start / "model", padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(start / "model")
    watch = Watch(model, request)
    rows = [json.loads(line) for line in (start / "data/train.jsonl").read_text().splitlines()]
    settings = {**SETTINGS, "output_dir": str(folder), "seed": request["seed"], **request["settings"]}
    optimizer = torch.optim.Adam(model.parameters(), lr=settings["learning_rate"])
    optimizers = (optimizer, watch.schedule(optimizer))
    if request["algorithm"] == "grpo":
        clock = Clock(watch, exact_answer_of_messages)
        tokenizer.chat_template, tokenizer.response_template = CHAT_TEMPLATE, RESPONSE_TEMPLATE
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(list(ENDS))
        rows = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
        trainer = GRPOTrainer(
            model,
            clock.reward,
            GRPOConfig(max_completion_length=40, max_tool_calling_iterations=1, **settings),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[clock],
            optimizers=optimizers,
            tools=[calculator],
        )
    else:
        clock = Clock(watch, Sentiment(start / "classifier"))
        trainer = RLOOTrainer(
            model,
            clock.reward,
            RLOOConfig(max_completion_length=MAX_NEW_TOKENS, **settings),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[clock],
            optimizers=optimizers,
        )
    trainer.remove_callback(PrinterCallback)  # its last line isn't part of the benchmark's output
    watch.start()
    trainer.train()
    return watch.save(folder)


class Clock(TrainerCallback):
    """Notes the reward of each batch, and looks at the watch when the optimizer is through with it."""

    def __init__(self, watch: Watch, function: Any) -> None:
        self.watch = watch
        self.function = function
        self.mean = 0.0

    def reward(self, **columns: Any) -> list[float]:
        scores: list[float] = self.function(**columns)
        self.mean = sum(scores) / len(scores)
        return scores

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        steps = args.steps_per_generation // args.gradient_accumulation_steps * args.num_iterations
        if state.global_step % steps == 0 and self.watch.iteration(self.mean):
            control.should_training_stop = True


def exact_answer_of_messages(completions: Sequence[Any], answer: Sequence[int], **_: Any) -> list[float]:
    """The same reward; what the assistant wrote, without what the tool said."""
    texts = ["".join(m["content"] for m in each if m["role"] == "assistant") for each in completions]
    return exact_answer(texts, answer)


if __name__ == "__main__":
    serve_runs({"train": train}, "trl", "accelerate")
