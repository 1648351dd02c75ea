"""Two processes: the same weights as one, and the command line under a launcher."""

import json
import os
import re
import runpy
import subprocess
import sys

import pytest
import torch
from encoder_decoders import make_seq2seq
from launching import launch
from safetensors.torch import load_file

from etude.runtime.run import RunDirectory

STEP = """
import gc, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM, AutoTokenizer
from etude import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

directory, processes, silent = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "silent"
torch.set_num_threads(1)
torch.manual_seed(0)
model = AutoModelForCausalLMWithValueHead.from_pretrained(f"{directory}/model", dtype="float64")
torch.nn.init.normal_(model.v_head.summary.weight, generator=torch.Generator().manual_seed(1))
config = PPOConfig(batch_size=8 // processes, mini_batch_size=2, gradient_accumulation_steps=4 // processes,
                   ppo_epochs=1, init_kl_coef=0.1, max_grad_norm=0.5, early_stopping=True, target_kl=100.0)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
tokenizer = AutoTokenizer.from_pretrained(f"{directory}/model")
trainer = PPOTrainer(config, model, tokenizer=tokenizer, optimizer=optimizer)
generator = torch.Generator().manual_seed(2)
ids = lambda n: torch.randint(0, 50, (n,), generator=generator)
rows = [(ids(3 + i % 2), ids(4 + i), float(i % 3)) for i in range(8)]
masks = [torch.full((4 + i,), int(i < 4 or not silent)) for i in range(8)]  # the second process's, if silent
rank = trainer.accelerator.process_index
mine = slice(rank * 8 // processes, (rank + 1) * 8 // processes)
stats = trainer.step(*map(list, zip(*rows[mine])), masks[mine])
mean = trainer._average({name: value for name, value in stats.items() if isinstance(value, float)})
print(f"<loss {mean['loss']:.5f}, coefficient {trainer.kl_ctl.value:.7f}>")
if rank == 0:
    trainer.model.save_pretrained(f"{directory}/after-{processes}")
trainer.end_training()
# As the group's last holder it would now and then never end: it waits for a thread that waits for its lock.
assert not any(isinstance(each, torch.nn.parallel.DistributedDataParallel) for each in gc.get_objects())
"""

CRITIC_STEP = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from etude import PPOConfig, PPOTrainer
from etude.models.loading import load_causal_lm
from etude.models.value_model import ValueModel

directory, processes = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
model = load_causal_lm(f"{directory}/model", dtype="float64")
critic = ValueModel.from_pretrained(f"{directory}/critic", dtype="float64")
torch.nn.init.normal_(critic.v_head.summary.weight, generator=torch.Generator().manual_seed(1))
torch.nn.init.zeros_(critic.v_head.summary.bias)
config = PPOConfig(batch_size=8 // processes, mini_batch_size=2, gradient_accumulation_steps=4 // processes,
                   ppo_epochs=2, init_kl_coef=0, adap_kl_ctrl=False, max_grad_norm=0.5)
optimizer = torch.optim.SGD([*model.parameters(), *critic.parameters()], lr=0.1)
tokenizer = AutoTokenizer.from_pretrained(f"{directory}/model")
trainer = PPOTrainer(config, model, tokenizer=tokenizer, optimizer=optimizer, value_model=critic)
generator = torch.Generator().manual_seed(2)
ids = lambda n: torch.randint(0, 50, (n,), generator=generator)
rows = [(ids(3 + i % 2), ids(4 + i), float(i % 3)) for i in range(8)]
rank = trainer.accelerator.process_index
mine = rows[rank * 8 // processes:(rank + 1) * 8 // processes]
trainer.step([q for q, _, _ in mine], [r for _, r, _ in mine], [s for _, _, s in mine])
trainer.save_model(f"{directory}/after-{processes}")
trainer.end_training()
"""

SEQ2SEQ_STEP = """
import sys, torch
from transformers import AutoTokenizer
from etude import AutoModelForSeq2SeqLMWithValueHead, PPOConfig, PPOTrainer

directory, processes = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained(f"{directory}/model")
for family in ("t5", "bart"):
    model = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(f"{directory}/{family}", dtype="float64")
    torch.nn.init.normal_(model.v_head.summary.weight, generator=torch.Generator().manual_seed(1))
    torch.nn.init.zeros_(model.v_head.summary.bias)
    config = PPOConfig(batch_size=8 // processes, mini_batch_size=2, ppo_epochs=2, init_kl_coef=0.1,
                       gradient_accumulation_steps=4 // processes, max_grad_norm=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = PPOTrainer(config, model, tokenizer=tokenizer, optimizer=optimizer)
    generator = torch.Generator().manual_seed(2)
    ids = lambda n: torch.randint(5, 40, (n,), generator=generator)
    sources = [ids(3), ids(6), ids(4)]
    start = torch.tensor(trainer.starts[0])
    rows = [(sources[i % 3], torch.cat([start, ids(3 + i)]), float(i % 3)) for i in range(8)]
    rank = trainer.accelerator.process_index
    mine = rows[rank * 8 // processes:(rank + 1) * 8 // processes]
    trainer.step(*map(list, zip(*mine)))
    trainer.save_model(f"{directory}/{family}-{processes}")
    trainer.accelerator.wait_for_everyone()
trainer.end_training()
"""

GROUP_STEP = """
import sys, torch
from transformers import AutoTokenizer
from etude import GRPOConfig, GRPOTrainer
from etude.models.loading import load_causal_lm
from etude.data.batch import Trajectory

directory, processes, silent = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "silent"
torch.set_num_threads(1)
model = load_causal_lm(f"{directory}/model", dtype="float64")
config = GRPOConfig(per_device_train_batch_size=2, gradient_accumulation_steps=4 // processes,
                    num_generations=4, scale_rewards="batch", loss_type="grpo", max_grad_norm=0.5)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
tokenizer = AutoTokenizer.from_pretrained(f"{directory}/model")
trainer = GRPOTrainer(model, config, processing_class=tokenizer, optimizers=(optimizer, None))
generator = torch.Generator().manual_seed(2)
ids = lambda n: torch.randint(0, 50, (n,), generator=generator)
mask = lambda i: torch.full((4 + i,), int(i < 4 or not silent))  # the second process's, if silent
rows = [Trajectory.of_response(ids(3 + i % 2), ids(4 + i), float(i % 3), mask(i)) for i in range(8)]
rank = trainer.accelerator.process_index
stats = trainer.learn(rows[rank * 8 // processes:(rank + 1) * 8 // processes])
mean = trainer._average(stats)
print(f"<entropy {mean['entropy']:.5f}, gradient {mean['grad_norm']:.5f}>")
if rank == 0:
    trainer.model.save_pretrained(f"{directory}/after-{processes}")
trainer.end_training()
"""

ALGORITHMS = """
import sys, torch
import etude
from transformers import AutoTokenizer
from etude.models.loading import load_causal_lm
from etude.data.batch import Trajectory
from etude.types import NamedReward
from safetensors.torch import save_file

directory, processes = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained(f"{directory}/model")
generator = torch.Generator().manual_seed(2)
ids = lambda n: torch.randint(0, 50, (n,), generator=generator)
rows = [Trajectory.of_response(ids(3 + i % 2), ids(4 + i), float(i % 3)) for i in range(8)]
for i, row in enumerate(rows):
    row.rewards = (NamedReward("end", float(i % 3)), NamedReward("form", float(i % 2), 0.5))
    row.score = sum(reward.weighted for reward in row.rewards)
for row in rows[5:]:  # the second process's only
    row.rewards += (NamedReward("turn", 1.0, position=int(row.sampled[1])),)
    row.score += 1.0
kinds = {
    "process": ("GRPO", {"scale_rewards": "batch"}),
    "several": ("GRPO", {"multi_objective_aggregation": "normalize_then_sum"}),
    "rloo": ("RLOO", {"beta": 0.0, "normalize_advantages": True}),
    "reinforce": ("Reinforce", {"normalize_advantages": True, "entropy_coef": 0.1}),
    "plus_plus": ("ReinforcePlusPlus", {"beta": 0.0}),
    "imitate": ("IterativeSFT", {"keep_best": 1}),
}
for name, (kind, settings) in kinds.items():
    model = load_causal_lm(f"{directory}/model", dtype="float64")
    config = getattr(etude, kind + "Config")(
        per_device_train_batch_size=2, gradient_accumulation_steps=4 // processes, max_grad_norm=0.5,
        **({} if "Reinforce" in kind else {"num_generations": 4}), **settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = getattr(etude, kind + "Trainer")(
        model, config, processing_class=tokenizer, optimizers=(optimizer, None))
    rank = trainer.accelerator.process_index
    trainer.learn(rows[rank * 8 // processes:(rank + 1) * 8 // processes])
    if rank == 0:
        save_file(model.state_dict(), f"{directory}/{name}-{processes}.safetensors")
    trainer.accelerator.wait_for_everyone()
trainer.end_training()
"""

SFT_STEP = """
import sys, torch
from transformers import AutoTokenizer
from etude import SFTConfig, SFTTrainer
from etude.models.loading import load_causal_lm

directory, processes = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
model = load_causal_lm(f"{directory}/model", dtype="float64")
rows = [{"prompt": "ab"[:1 + i % 2], "completion": "cde" * (1 + i)} for i in range(8)]
config = SFTConfig(output_dir=f"{directory}/run-{processes}", per_device_train_batch_size=2, max_steps=1,
                   gradient_accumulation_steps=4 // processes, per_device_eval_batch_size=4 // processes,
                   max_grad_norm=0.5, use_cpu=True, logging_steps=1, save_strategy="no", disable_tqdm=True)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
trainer = SFTTrainer(model, config, train_dataset=rows, eval_dataset=rows, optimizers=(optimizer, None),
                     processing_class=AutoTokenizer.from_pretrained(f"{directory}/model"))
before = trainer.evaluate()["eval_loss"]
trainer.train()
logged = next(row for row in trainer.state.log_history if "loss" in row)
if trainer.is_world_process_zero():
    print(f"<{before:.6f} {logged['loss']:.4f} {logged['entropy']:.5f} {logged['mean_token_accuracy']:.5f}>")
    trainer.accelerator.unwrap_model(trainer.model).save_pretrained(f"{directory}/after-{processes}")
trainer.accelerator.wait_for_everyone()
trainer.end()
"""


@pytest.fixture
def model_directory(tmp_path, make_llama, tokenizer):
    make_llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path


def test_two_processes_train_a_value_model_as_one_does(model_directory, make_gpt2):
    """Each step is of all 8 episodes, whatever the order in which the processes go through their share."""
    make_gpt2(7).save_pretrained(model_directory / "critic")
    (model_directory / "step.py").write_text(CRITIC_STEP)
    for processes in (1, 2):
        done = launch(processes, str(model_directory / "step.py"), str(model_directory), str(processes))
        assert done.returncode == 0, done.stderr[-2000:]
    for part, start in (("", "model"), ("value_model", "critic")):
        one, two = (
            load_file(model_directory / d / part / "model.safetensors") for d in ("after-1", "after-2")
        )
        before = load_file(model_directory / start / "model.safetensors")
        assert set(one) == set(two)
        strip = lambda name: name.removeprefix("transformer.")  # noqa: E731
        before = {strip(name): tensor.double() for name, tensor in before.items()}
        moved = [(tensor.double() - before[strip(name)]).abs().max().item() for name, tensor in one.items()]
        assert max(moved) > 1e-3
        for name, tensor in one.items():
            torch.testing.assert_close(tensor, two[name], atol=1e-6, rtol=0, msg=f"{part} {name}")
    heads = [
        load_file(model_directory / d / "value_model" / "value_head.safetensors")
        for d in ("after-1", "after-2")
    ]
    torch.testing.assert_close(*heads, atol=1e-6, rtol=0)


def test_two_processes_train_encoder_decoders_as_one_does(model_directory, monkeypatch):
    """Whoever encodes a source, and where several encode the same one."""
    for family in ("t5", "bart"):
        make_seq2seq(family).save_pretrained(model_directory / family)
    (model_directory / "step.py").write_text(SEQ2SEQ_STEP)
    monkeypatch.setattr(sys, "argv", ["step.py", str(model_directory), "1"])
    runpy.run_path(str(model_directory / "step.py"))
    done = launch(2, str(model_directory / "step.py"), str(model_directory), "2")
    assert done.returncode == 0, done.stderr[-2000:]
    for family in ("t5", "bart"):
        one, two, before = (
            load_file(model_directory / d / "model.safetensors")
            for d in (f"{family}-1", f"{family}-2", family)
        )
        moved = [(one[name] - before[name].double()).abs().max().item() for name in one if "encoder" in name]
        assert max(moved) > 1e-4
        for name, parameter in one.items():
            torch.testing.assert_close(parameter, two[name], atol=1e-6, rtol=0, msg=f"{family} {name}")


@pytest.mark.parametrize("batch", ["whole", "silent"])
@pytest.mark.parametrize("script", [STEP, GROUP_STEP], ids=["ppo", "grpo"])
def test_two_processes_end_in_the_weights_of_one(model_directory, script, batch):
    """Also where nothing was sampled in the second one's part of the batch."""
    (model_directory / "step.py").write_text(script)
    said = []
    for processes in (1, 2):
        done = launch(
            processes, str(model_directory / "step.py"), str(model_directory), str(processes), batch
        )
        assert done.returncode == 0, done.stderr[:3000]
        said += re.findall("<.*?>", done.stdout)
    assert len(said) == 3
    if batch == "silent":
        assert len(set(said)) == 1, "processes agree on what was learned from one's rows"
    one, two, before = (
        {**load_file(model_directory / d / "model.safetensors")} for d in ("after-1", "after-2", "model")
    )
    moved = max((one[name].double() - before[name].double()).abs().max().item() for name in one)
    assert moved > 1e-3
    for name, parameter in one.items():
        torch.testing.assert_close(parameter, two[name], atol=1e-6, rtol=0, msg=name)


def test_two_processes_imitate_as_one_does(model_directory):
    """Rows differ in their tokens; a token counts the same whoever has it, and so it does in the metrics."""
    (model_directory / "step.py").write_text(SFT_STEP)
    said = []
    for processes in (1, 2):
        done = launch(processes, str(model_directory / "step.py"), str(model_directory), str(processes))
        assert done.returncode == 0, done.stderr[-3000:]
        said += re.findall("<[^<]*?>", done.stdout)
    assert len(said) == 2
    assert said[0] == said[1]
    one, two, before = (
        load_file(model_directory / d / "model.safetensors") for d in ("after-1", "after-2", "model")
    )
    assert max((one[name].double() - before[name].double()).abs().max().item() for name in one) > 1e-3
    for name, parameter in one.items():
        torch.testing.assert_close(parameter, two[name], atol=1e-6, rtol=0, msg=name)


def test_every_algorithm_compares_the_episodes_of_all_processes(model_directory):
    """Statistics over the batch are those of both, also where only one has rewards at turns."""
    (model_directory / "step.py").write_text(ALGORITHMS)
    for processes in (1, 2):
        done = launch(processes, str(model_directory / "step.py"), str(model_directory), str(processes))
        assert done.returncode == 0, done.stderr[-3000:]
    before = load_file(model_directory / "model" / "model.safetensors")
    for name in ("process", "several", "rloo", "reinforce", "plus_plus", "imitate"):
        one, two = (load_file(model_directory / f"{name}-{count}.safetensors") for count in (1, 2))
        assert max((one[key] - before[key].double()).abs().max().item() for key in one) > 1e-3
        for key, parameter in one.items():
            torch.testing.assert_close(parameter, two[key], atol=1e-6, rtol=0, msg=f"{name} {key}")


@pytest.fixture
def options(model_directory):
    """Of a run of `etude ppo` in `model_directory`."""
    (model_directory / "tasks.jsonl").write_text('{"prompt": "say one:"}\n{"prompt": "say two:"}\n')
    (model_directory / "reward.py").write_text(
        "def vowels(completions):\n    return [float(c.count('a') + c.count('e')) for c in completions]\n"
    )
    values = {
        "model_name_or_path": "model",
        "train_dataset": "tasks.jsonl",
        "eval_dataset": "tasks.jsonl",
        "test_dataset": "tasks.jsonl",
        "reward": "reward.py:vowels",
        "output_dir": "run",
        "steps": 16,
        "batch_size": 4,
        "mini_batch_size": 2,
        "max_turns": 1,
        "generation.max_new_tokens": 6,
        "eval_steps": 1,
    }
    return [f"--{name}={value}" for name, value in values.items()]


def steps_of(directory):
    return [row["step"] for row in RunDirectory(directory / "run").read_metrics() if "reward" in row]


WORLD = """
from etude import TextEnvironment

class World(TextEnvironment):
    def metrics(self, episodes):
        return {"squares": sum(len(episode.task["prompt"]) for episode in episodes) ** 2}
"""


def test_the_command_line_in_two_processes(model_directory, options):
    (model_directory / "world.py").write_text(WORLD)
    done = launch(2, "-m", "etude", "ppo", *options, "--environment=world.py:World", cwd=model_directory)
    assert done.returncode == 0, done.stderr[:3000]
    rows = RunDirectory(model_directory / "run").read_metrics()
    squares = [row["validation/squares"] for row in rows if "validation/squares" in row]
    assert squares == [(8 + 8) ** 2] * 3, "of both processes' episodes together"
    assert len(re.findall("report:", done.stdout)) == 1, "only the main process speaks"
    assert steps_of(model_directory) == [1, 2], "16 episodes, 2 × 4 at a time"


def test_training_on_data_from_the_command_line_in_two_processes(model_directory):
    """Nobody says that there is no GPU, and the two are one run all the same."""
    lines = [json.dumps({"text": "ab" * (1 + i)}) for i in range(6)]
    (model_directory / "texts.jsonl").write_text("\n".join(lines))
    values = {
        "model_name_or_path": "model", "train_dataset": "texts.jsonl", "num_train_epochs": 1,
        "per_device_train_batch_size": 1, "logging_steps": 1, "save_strategy": "no",
    }  # fmt: skip

    def losses(processes):
        options = [f"--{name}={value}" for name, value in values.items()]
        options += [f"--output_dir=run-{processes}", f"--gradient_accumulation_steps={2 // processes}"]
        done = launch(processes, "-m", "etude", "sft", *options, cwd=model_directory)
        assert done.returncode == 0, done.stderr[-3000:]
        assert len(re.findall("report:", done.stdout)) == 1, "only the main process speaks"
        return [row["loss"] for row in RunDirectory(model_directory / f"run-{processes}").read_metrics()]

    expected = losses(1)
    assert len(expected) == 3, "six rows, two a step"
    assert losses(2) == pytest.approx(expected, rel=1e-5)


def test_accelerate_launch(model_directory, options):
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes=1",
        "-m",
        "etude",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def run(*more):
        return subprocess.run(
            [*command, "ppo", *options, *more],
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
            cwd=model_directory,
        )

    done = run()
    assert done.returncode == 0, done.stderr[:3000]
    assert steps_of(model_directory) == [1, 2, 3, 4]
    wrong = run("--batch_sise=4")
    assert "etude: error: unknown option --batch_sise; did you mean --batch_size?" in wrong.stderr
