"""Two processes train reward models as one does, and evaluate each row once."""

import re

import torch
from safetensors.torch import load_file
from scoring_models import make
from tests.trainers.test_processes import launch

STEP = """
import gc, sys, torch
from peft import LoraConfig
from etude import PRMConfig, PRMTrainer, RewardConfig, RewardTrainer

directory, processes = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
pairs = [{"prompt": "which of these: ", "chosen": "cde" * (1 + i), "rejected": "f" * (1 + i % 3)}
         for i in range(8)]
steps = [{"prompt": "ab"[:1 + i % 2], "completions": ["c" * i, "de"][: 1 + i % 2],
          "labels": [i > 3, True][: 1 + i % 2]} for i in range(8)]
lora = LoraConfig(r=2, target_modules="all-linear")
kinds = {
    "reward": (RewardTrainer, RewardConfig, pairs, {"center_rewards_coefficient": 0.1}, None),
    "lora": (RewardTrainer, RewardConfig, pairs, {}, lora),
    "prm": (PRMTrainer, PRMConfig, steps, {}, None),
}
for name, (trainer, config, rows, options, adapter) in kinds.items():
    args = config(output_dir=f"{directory}/{name}-{processes}", per_device_train_batch_size=2, max_steps=1,
                  gradient_accumulation_steps=4 // processes, per_device_eval_batch_size=2, max_grad_norm=0.5,
                  learning_rate=0.1, optim="sgd", lr_scheduler_type="constant", use_cpu=True, logging_steps=1,
                  save_strategy="no", disable_tqdm=True, model_init_kwargs={"dtype": "float64"}, **options)
    run = trainer(f"{directory}/model", args, train_dataset=rows, eval_dataset=rows[:7], peft_config=adapter)
    before = run.evaluate()
    run.train()
    logged = next(row for row in run.state.log_history if "loss" in row)
    names = ("loss", "accuracy", "brier", "calibration_error")
    if run.is_world_process_zero():
        print(name, *(f"{before['eval_' + each]:.6f}" for each in names),
              *(f"{logged[each]:.4f}" for each in names), end=";")
    run.save_model(f"{directory}/{name}-{processes}/saved")
    run.accelerator.wait_for_everyone()
run.end_training()
# As the group's last holder it would now and then never end.
assert not any(isinstance(each, torch.nn.parallel.DistributedDataParallel) for each in gc.get_objects())
"""


def test_two_processes_end_in_the_weights_of_one(tmp_path, tokenizer):
    """Answers differ in length and steps; of seven rows to evaluate, the second process gets three."""
    make("Llama", "CausalLM", len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "step.py").write_text(STEP)
    said = []
    for processes in (1, 2):
        done = launch(processes, str(tmp_path / "step.py"), str(tmp_path), str(processes))
        assert done.returncode == 0, done.stderr[-3000:]
        said.append(re.findall("(?:reward|lora|prm) [0-9. ]+;", done.stdout))
    assert len(said[0]) == 3
    assert said[0] == said[1]
    start = load_file(tmp_path / "model" / "model.safetensors")
    for name in ("reward", "lora", "prm"):
        file = "adapter_model.safetensors" if name == "lora" else "model.safetensors"
        one, two = (load_file(tmp_path / f"{name}-{count}" / "saved" / file) for count in (1, 2))
        assert one.keys() == two.keys()
        moved = [(w - start[k].double()).abs().max().item() for k, w in one.items() if k in start]
        assert name == "lora" or max(moved) > 1e-3
        for key, weight in one.items():
            torch.testing.assert_close(weight, two[key], atol=1e-6, rtol=0, msg=f"{name} {key}")
