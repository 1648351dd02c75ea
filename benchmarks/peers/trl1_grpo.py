"""TRL 1.16's side of the GRPO benchmarks, in a worker process: a step with tools, or the memory of updates.

Both let `GRPOTrainer.train()` do its steps, and time what lies between a step's beginning and its end.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    LogitsProcessorList,
    PrinterCallback,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer

from benchmarks import wide
from benchmarks.common import Answer, Stopwatch, serve
from benchmarks.scripted import Echo, ForcedTokens, check_played, describe, load_script

# The script's own protocol, as a chat template: a message is its text, a tool's one ends with "<response>".
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.content }}"
    "{% for call in message.tool_calls or [] %}"
    "<request><{{ call.function.name }}>{{ call.function.arguments | tojson }}CALL_END{% endfor %}"
    "{% if message.role == 'tool' %}<response>{% endif %}{% endfor %}"
)


def response_template(call_end: str, answer_end: str) -> dict[str, Any]:
    """How a turn's text is read: as a call of a tool with one argument, or as an answer."""
    function = {"name": "{name}", "arguments": {"query": "{content}"}}
    return {
        "defaults": {"role": "assistant"},
        "start_anchor_pattern": r"\Z",  # no turn begins in the prompt
        "fields": {
            "tool_calls": {
                "open_pattern": r"<request><(?P<name>\w+)>",
                "close": call_end,
                "repeats": True,
                "content": "text",
                "transform": {"type": "function", "function": function},
            },
            "content": {"close": answer_end, "content": "text"},
        },
    }


class Watched(GRPOTrainer):
    """Keeps what each pass learned from."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *arguments: Any, **options: Any) -> Any:
        self.passes.append(inputs)
        return super().compute_loss(model, inputs, *arguments, **options)

    @property
    def episodes(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Queries, responses and masks, without padding."""
        found = []
        for inputs in self.passes:
            names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask")
            for prompt, has_prompt, completion, has_completion, mask in zip(
                *(inputs[name] for name in names), strict=True
            ):
                there = has_completion.bool()
                found.append((prompt[has_prompt.bool()], completion[there], mask[there]))
        return found


class Clock(TrainerCallback):
    """Times the steps of a training run."""

    def __init__(self) -> None:
        self.steps: list[Stopwatch] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.steps.append(Stopwatch().__enter__())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps[-1].__exit__()


def step(model: Any, tokenizer: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Play the script's episodes, each task as a group, and learn from them in one optimizer step."""
    episodes = load_script(Path(request["script"])).episodes
    tokenizer.chat_template = CHAT_TEMPLATE.replace("CALL_END", request["call_end"])
    tokenizer.response_template = response_template(request["call_end"], request["answer_end"])
    ends = tokenizer.convert_tokens_to_ids([request["call_end"], request["answer_end"]])
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *ends]
    processors = LogitsProcessorList([ForcedTokens(episodes, tokenizer.pad_token_id)])
    model.generate = partial(type(model).generate, model, logits_processor=processors)
    tasks = list(dict.fromkeys(episode.task for episode in episodes))
    echo = Echo(request["tool_ms"])

    def Echo_(query: str) -> str:
        """Say a word back.

        Args:
            query: the word.
        """
        return echo(query)

    Echo_.__name__ = "Echo"
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Watched(
            model,
            lambda completions, **_: [float(len(messages[-1]["content"])) for messages in completions],
            configure(
                folder,
                request["pass"],
                len(episodes) // request["pass"],
                num_generations=request["samples"],
                beta=request["beta"],
                max_completion_length=1024,  # of all turns and tools' answers; no episode is near it
                top_k=0,
            ),
            train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": t}]} for t in tasks]),
            processing_class=tokenizer,
            callbacks=[clock],
            tools=[Echo_],
        )
        trainer.passes = []
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    order = {episode.task_token: i for i, episode in enumerate(episodes)}
    start = episodes[0].task_start
    played = sorted(trainer.episodes, key=lambda parts: order[int(parts[0][start])])
    check_played(episodes, *zip(*played, strict=True))
    log = trainer.state.log_history[0]
    return {**clock.steps[0].times, "loss": log["loss"], "grad_norm": log["grad_norm"]}


def configure(folder: str, episodes: int, passes: int, **settings: Any) -> GRPOConfig:
    """One optimizer step on `passes` × `episodes`, in float32 on the CPU, and nothing beside it."""
    return GRPOConfig(
        **{
            "output_dir": folder,
            "max_steps": 1,
            "per_device_train_batch_size": episodes,
            "gradient_accumulation_steps": passes,
            "shuffle_dataset": False,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "dataloader_pin_memory": False,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "log_level": "error",
            **settings,
        }
    )


def start_steps(checkpoint: str) -> tuple[dict[str, Any], Answer]:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    return describe(model, "trl", "accelerate"), partial(step, model, tokenizer)


def updates(model: LlamaForCausalLM, before: int, request: dict[str, Any]) -> dict[str, Any]:
    """Learn "updates" times from "episodes" of "tokens" tokens, in passes of "pass" episodes."""
    count, prompt = request["episodes"], request["tokens"] // 2
    token_ids = wide.random_episodes(count, request["tokens"])

    def rollout(*_: Any) -> dict[str, Any]:
        return {
            "prompt_ids": [ids[:prompt].tolist() for ids in token_ids],
            "completion_ids": [ids[prompt:].tolist() for ids in token_ids],
            "logprobs": None,
        }

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model,
            lambda completions, **_: wide.scores(count),
            configure(
                folder,
                request["pass"],
                count // request["pass"],
                max_steps=request["updates"],
                num_generations=count,
                max_completion_length=request["tokens"] - prompt,
                gradient_checkpointing=request["checkpointing"],
            ),
            train_dataset=Dataset.from_dict({"prompt": ["?"] * request["updates"]}),
            processing_class=wide.any_tokenizer(),
            callbacks=[clock],
            rollout_func=rollout,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return {
        "seconds": sum(watch.times["seconds"] for watch in clock.steps),
        "bytes": wide.peak_bytes() - before,
        "grad_norm": trainer.state.log_history[0]["grad_norm"],
    }


def start_updates() -> tuple[dict[str, Any], Answer]:
    before = psutil.Process().memory_info().rss
    torch.manual_seed(0)
    model = LlamaForCausalLM(wide.WIDE_VOCABULARY)
    return describe(model, "trl", "accelerate"), partial(updates, model, before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", nargs="?", help="play and learn with this model; without, only learn")
    checkpoint = parser.parse_args().checkpoint
    serve(partial(start_steps, checkpoint) if checkpoint else start_updates)


if __name__ == "__main__":
    main()
