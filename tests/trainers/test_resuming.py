import logging

import pytest
from peft import LoraConfig

from etude.errors import CheckpointError, ConfigError
from etude.trainers.resuming import checkpoint_to_resume, newest_checkpoint
from etude.trainers.sft import SFTTrainer
from etude.trainers.sft_config import SFTConfig

ROWS = [{"prompt": f"{a}+5=", "completion": str(a + 5)} for a in range(4)]


@pytest.fixture
def make_trainer(tmp_path, tokenizer, make_llama):
    """Makes trainers of a run with a checkpoint at each of its three steps."""

    def make(model=None, overwrite=False, **options):
        settings = {
            "max_steps": 3,
            "save_steps": 1,
            "logging_steps": 1,
            "use_cpu": True,
            "disable_tqdm": True,
        }
        config = SFTConfig(output_dir=str(tmp_path / "run"), overwrite_output_dir=overwrite, **settings)
        model = model or make_llama()
        return SFTTrainer(model, config, train_dataset=ROWS, processing_class=tokenizer, **options)

    make().train()
    return make


def test_the_newest_is_the_newest_that_was_written_to_its_end(tmp_path, make_trainer, caplog):
    run = tmp_path / "run"
    (run / "checkpoint-10").mkdir()
    (run / "checkpoint-10" / "trainer_state.json").write_text("{")
    (run / "checkpoint-x").mkdir()
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(run) == str(run / "checkpoint-3")
    assert "checkpoint-10 was not written to its end and is passed over" in caplog.text
    make_trainer().train(resume_from_checkpoint=True)


def test_what_is_no_checkpoint(tmp_path, make_trainer):
    assert checkpoint_to_resume(False, str(tmp_path)) is None
    with pytest.raises(CheckpointError, match="holds no checkpoint; leave resume_from_checkpoint out"):
        checkpoint_to_resume(True, str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="run is no checkpoint, or not a whole one"):
        make_trainer().train(resume_from_checkpoint=str(tmp_path / "run"))


def test_a_checkpoint_of_another_model(make_trainer, make_gpt2):
    with pytest.raises(CheckpointError, match=r"holds another model's weights, such as 'model\."):
        make_trainer(make_gpt2()).train(resume_from_checkpoint=True)
    adapter = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    with pytest.raises(CheckpointError, match="trained a whole model, and this one trains an adapter"):
        make_trainer(peft_config=adapter).train(resume_from_checkpoint=True)


def test_a_checkpoint_that_is_broken(tmp_path, make_trainer, caplog):
    newest = tmp_path / "run" / "checkpoint-3"
    (newest / "optimizer.pt").unlink()
    with caplog.at_level(logging.WARNING):
        make_trainer().train(resume_from_checkpoint=True)
    assert "checkpoint-3 has no state of the optimizer, which starts anew" in caplog.text
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors can't be read .*; name an earlier"):
        make_trainer().train(resume_from_checkpoint=True)
    weights.unlink()
    with pytest.raises(CheckpointError, match="checkpoint-3 holds no weights; name an earlier checkpoint"):
        make_trainer().train(resume_from_checkpoint=True)


def test_an_earlier_run_is_not_overwritten_unasked(tmp_path, make_trainer):
    rows = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(ConfigError, match="run holds an earlier run; resume it with resume_from_checkpoint"):
        make_trainer().train()
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == rows
    trainer = make_trainer(overwrite=True, eval_dataset=ROWS)
    trainer.evaluate()  # its row is no earlier run
    (tmp_path / "run" / "checkpoint-7").mkdir()
    trainer.train()
    assert newest_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-3")
    assert not (tmp_path / "run" / "checkpoint-7").exists()
    trainer.train()  # the same trainer once more goes on in its own run


def test_evaluating_first_is_no_earlier_run(tmp_path, tokenizer, make_llama):
    settings = {"max_steps": 1, "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    rows = {"train_dataset": ROWS, "eval_dataset": ROWS}
    trainer = SFTTrainer(
        make_llama(), SFTConfig(str(tmp_path), **settings), processing_class=tokenizer, **rows
    )
    trainer.evaluate()
    assert trainer.train().global_step == 1
