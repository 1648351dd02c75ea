"""A mixed run in two processes is the one that a single process does."""

import json

import pytest
import torch
from launching import launch
from safetensors.torch import load_file

RUN = """
import json, sys, torch
from transformers import AutoTokenizer
from etude import AutoModelForCausalLMWithValueHead, MixedEnvironment, PPOConfig, PPOTrainer, TextEnvironment

directory, processes = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
torch.manual_seed(0)
model = AutoModelForCausalLMWithValueHead.from_pretrained(f"{directory}/model", dtype="float64")
torch.nn.init.normal_(model.v_head.summary.weight, generator=torch.Generator().manual_seed(1))
tokenizer = AutoTokenizer.from_pretrained(f"{directory}/model")

def vowels(completions):
    return [float(sum(c in "aeiou" for c in text)) for text in completions]

def digits(completions):
    return [100.0 * sum(c.isdigit() for c in text) for text in completions]

play = {"max_turns": 1, "generation_kwargs": {"max_new_tokens": 8}}
parts = {name: TextEnvironment(None, tokenizer, rewards=reward, **play)
         for name, reward in (("words", vowels), ("sums", digits))}
rows = {"words": ["say one:", "say two:", "say three:", "say four:"], "sums": ["1+1=", "2+3=", "4+5="]}
config = PPOConfig(output_dir=f"{directory}/run-{processes}", batch_size=8 // processes, mini_batch_size=2,
                   gradient_accumulation_steps=4 // processes, ppo_epochs=1, steps=8, init_kl_coef=0,
                   adap_kl_ctrl=False, use_score_scaling=True, success_reward={"words": 2, "sums": 100},
                   eval_steps=1, load_best_model_at_end=False, disable_progress=True)
trainer = PPOTrainer(config, model, environment=MixedEnvironment(parts, {"words": 5, "sums": 3}),
                     optimizer=torch.optim.SGD(model.parameters(), lr=0.02),
                     train_dataset=rows, eval_dataset=rows, test_dataset=rows)
summary = trainer.train()
if trainer.accelerator.is_main_process:
    print(json.dumps(summary.environments))
"""


def test_two_processes_play_and_learn_what_one_does(tmp_path, make_llama, tokenizer):
    """Their shares of each environment differ, and so do the weights that its means have."""
    make_llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "run.py").write_text(RUN)
    summaries = []
    for processes in (1, 2):
        done = launch(processes, str(tmp_path / "run.py"), str(tmp_path), str(processes))
        assert done.returncode == 0, done.stderr[-3000:]
        summaries.append(json.loads(done.stdout.splitlines()[-1]))
    assert set(summaries[0]) == {"words", "sums"}
    for name, both in summaries[0].items():
        for side in ("before", "after"):
            assert summaries[1][name][side] == pytest.approx(both[side])
    one, two = (
        [json.loads(line) for line in (tmp_path / f"run-{n}" / "metrics.jsonl").read_text().splitlines()]
        for n in (1, 2)
    )
    assert len(one) == len(two) == 3
    compared = 0
    for row, other in zip(one, two, strict=True):
        names = [
            name for name in row if "std" not in name and name.startswith(("words", "sums", "validation"))
        ]
        assert {name: other[name] for name in names} == pytest.approx({name: row[name] for name in names})
        compared += len(names)
    assert compared > 80
    one, two = (load_file(tmp_path / f"run-{n}" / "model.safetensors") for n in (1, 2))
    for name, parameter in one.items():
        torch.testing.assert_close(parameter, two[name], atol=1e-6, rtol=0, msg=name)
