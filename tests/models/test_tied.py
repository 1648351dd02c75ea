import logging

import pytest
from encoder_decoders import make_seq2seq
from safetensors.torch import load_file, save_file

from etude.models.tied import are_elsewhere, quiet_about_tied
from etude.trainers.sft import SFTTrainer
from etude.trainers.sft_config import SFTConfig

EMBEDDINGS = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}


def test_weights_that_have_another_name(make_llama):
    tied = make_seq2seq("t5")
    assert are_elsewhere(tied, EMBEDDINGS)
    assert not are_elsewhere(tied, {*EMBEDDINGS, "shared.weight"}), "then all of its names are missing"
    assert not are_elsewhere(tied, {"encoder.final_layer_norm.weight"})
    assert not are_elsewhere(tied, {"unheard.of"})
    assert not are_elsewhere(make_llama(), {"lm_head.weight"})


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_that_holds_them_once(tmp_path, tokenizer, make_llama, caplog, monkeypatch, tied):
    """As resuming reads it: into the model, key by key."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    options = {"use_cpu": True, "disable_tqdm": True, "save_steps": 1, "output_dir": str(tmp_path)}
    rows = [{"text": "a dog barks"}]
    for steps in (1, 2):
        config = SFTConfig(max_steps=steps, **options)
        model = make_llama(tie_word_embeddings=tied)
        trainer = SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
        if steps == 2 and not tied:
            forget(tmp_path / "checkpoint-1" / "model.safetensors", "lm_head.weight")
        trainer.train(resume_from_checkpoint=steps == 2)
    assert any("missing keys" in message for message in caplog.messages) is not tied
    with quiet_about_tied(model):
        logging.getLogger("transformers.trainer").warning("Another thing")
    assert caplog.messages[-1] == "Another thing"


def forget(file, name):
    weights = load_file(file)
    del weights[name]
    save_file(weights, file, metadata={"format": "pt"})
