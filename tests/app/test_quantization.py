"""QLoRA by the command line; where bitsandbytes isn't installed there is nothing to test."""

import json

import pytest
import torch

from etude.app.cli import main
from etude.models.loading import load_causal_lm

pytest.importorskip("bitsandbytes", reason="an extra: etude[quantization]")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", ["4", "8"])
def test_an_adapter_on_weights_of_few_bits(tmp_path, make_llama, tokenizer, bits):
    make_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"{a}+1=", "completion": str(a + 1)} for a in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "model_name_or_path": tmp_path / "model",
        "train_dataset": tmp_path / "rows.jsonl",
        "output_dir": tmp_path / "run",
        f"load_in_{bits}bit": "true",
        "use_peft": "true",
        "max_steps": 20,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "use_cpu": "true",
    }
    assert main(["sft", *(f"--{name}={value}" for name, value in options.items())]) == 0
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").open()]
    assert losses[-1] < 0.8 * losses[0]
    tuned = load_causal_lm(tmp_path / "run")
    assert tuned(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
