"""Two processes end in the weights of one, and log the same: pairs, single answers, references beforehand."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]

STEP = """
import gc, json, sys, torch
from safetensors.torch import save_file
from transformers import AutoTokenizer
from etude.models.loading import load_causal_lm
from etude.trainers.dpo import DPOTrainer
from etude.trainers.kto import KTOTrainer
from etude.trainers.orpo import ORPOTrainer

directory, processes = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained(f"{directory}/model")
rows = [{"prompt": f"{a}+{b}=", "chosen": str(a + b) * (1 + a), "rejected": "no" * (1 + b)}
        for a, b in ((0, 1), (3, 0), (2, 2), (1, 3))]
kinds = {
    "dpo": (DPOTrainer, {}),
    "beforehand": (DPOTrainer, {"precompute_ref_log_probs": True, "ld_alpha": 0.5}),
    "kto": (KTOTrainer, {}),
    "orpo": (ORPOTrainer, {}),
}
for name, (kind, settings) in kinds.items():
    model = load_causal_lm(f"{directory}/model", dtype="float64")
    referred = {} if kind is ORPOTrainer else {
        "ref_model": load_causal_lm(f"{directory}/reference", dtype="float64")}
    size = 2 if kind is KTOTrainer else 1
    args = kind.config_class(
        output_dir=f"{directory}/{name}-{processes}", max_steps=1, per_device_train_batch_size=size,
        gradient_accumulation_steps=4 // processes, use_cpu=True, save_strategy="no", disable_tqdm=True,
        logging_steps=1, per_device_eval_batch_size=2, report_to="none", **settings)
    trainer = kind(model, args=args, train_dataset=rows, eval_dataset=rows[:3], processing_class=tokenizer,
                   optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None), **referred)
    trainer.train()
    logged = trainer.state.log_history[0] | trainer.evaluate()
    if trainer.is_world_process_zero():
        save_file(model.state_dict(), f"{directory}/{name}-{processes}.safetensors")
        with open(f"{directory}/{name}-{processes}.json", "w") as file:
            json.dump(logged, file)
    trainer.accelerator.wait_for_everyone()
trainer.end_training()
# As the group's last holder it would now and then never end.
assert not any(isinstance(each, torch.nn.parallel.DistributedDataParallel) for each in gc.get_objects())
"""


def test_two_processes_train_as_one_does(tmp_path, make_llama, tokenizer, monkeypatch):
    make_llama().save_pretrained(tmp_path / "model")
    make_llama(1, initializer_range=0.3).save_pretrained(tmp_path / "reference")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "step.py").write_text(STEP)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    script = str(tmp_path / "step.py")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache-of-one")
    monkeypatch.setattr(sys, "argv", [script, str(tmp_path), "1"])
    runpy.run_path(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, script, str(tmp_path), "2"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    before = load_file(tmp_path / "model" / "model.safetensors")
    for name in ("dpo", "beforehand", "kto", "orpo"):
        one, two = (load_file(tmp_path / f"{name}-{n}.safetensors") for n in (1, 2))
        assert max((one[key] - before[key].double()).abs().max().item() for key in one) > 1e-4
        for key, parameter in one.items():
            torch.testing.assert_close(parameter, two[key], atol=1e-7, rtol=1e-6, msg=f"{name} {key}")
        alone, together = (json.loads((tmp_path / f"{name}-{n}.json").read_text()) for n in (1, 2))
        compared = {
            key for key in alone if key.partition("_")[0] in ("loss", "kl", "rewards/margins", "logps/chosen")
        }
        compared |= {f"eval_{key}" for key in compared if f"eval_{key}" in alone}
        assert {"loss", "eval_loss", "rewards/margins"} <= compared
        for key in compared:
            assert together[key] == pytest.approx(alone[key], rel=1e-5), f"{name} {key}"
