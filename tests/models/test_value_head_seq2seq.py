"""Value heads on encoder–decoders: values are of the decoder's last hidden states, and survive saving."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from encoder_decoders import BOS, FAMILIES, FIRST, PAD, START, VOCAB, make_seq2seq
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertLMHeadModel,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GPT2Config,
    GPT2LMHeadModel,
)
from transformers.modeling_outputs import BaseModelOutput

from etude import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead
from etude.errors import ModelError
from etude.models.adapters import lora_config
from etude.models.value_head import load_with_value_head
from etude.models.value_model import ValueModel

F64 = torch.float64


def with_values(family: str = "t5", dtype: torch.dtype = torch.float32) -> AutoModelForSeq2SeqLMWithValueHead:
    model = make_seq2seq(family, dtype)
    return AutoModelForSeq2SeqLMWithValueHead(model, v_head_init_strategy="normal")


def batch() -> dict[str, torch.Tensor]:
    """Sources of 7, 4 and 5 tokens and decoder inputs of 6, padded on the right."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(FIRST, VOCAB, (3, 7), generator=generator)
    mask = (torch.arange(7) < torch.tensor([7, 4, 5])[:, None]).long()
    decoder = torch.randint(FIRST, VOCAB, (3, 6), generator=generator)
    decoder[:, 0] = START
    return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": decoder}


def assert_same_outputs(one: nn.Module, other: nn.Module) -> None:
    with torch.no_grad():
        logits, _, values = one(**batch())
        other_logits, _, other_values = other(**batch())
    assert values.std() > 0.01
    assert torch.equal(logits, other_logits)
    assert torch.equal(values, other_values)


@pytest.mark.parametrize("family", FAMILIES)
def test_values_are_the_head_on_the_decoder_s_last_hidden_states(family: str) -> None:
    model = with_values(family, F64)
    with torch.no_grad():
        logits, loss, values = model(**batch())
        plain = model.pretrained_model(**batch(), output_hidden_states=True)
    hidden = plain.decoder_hidden_states[-1]
    assert loss is None
    assert values.shape == (3, 6)
    assert torch.equal(logits, plain.logits)
    by_hand = hidden @ model.v_head.summary.weight[0] + model.v_head.summary.bias
    torch.testing.assert_close(values, by_hand, rtol=1e-12, atol=1e-12)
    assert values.std() > 0.1


def test_a_tied_t5_scales_its_logits_and_not_its_values() -> None:
    model, entered = with_values("t5", F64), []
    model.pretrained_model.lm_head.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    model(**batch())
    hidden = model.pretrained_model(**batch(), output_hidden_states=True).decoder_hidden_states[-1]
    torch.testing.assert_close(entered[0] * 16**0.5, hidden)
    assert hidden.std() > 0.5


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_labels_and_encoder_outputs(family: str) -> None:
    """Labels make the decoder's input and a loss; what an encoder gave stands in for what it reads."""
    model = with_values(family)
    sources = {name: batch()[name] for name in ("input_ids", "attention_mask")}
    labels = batch()["decoder_input_ids"].masked_fill(batch()["attention_mask"][:, :6] == 0, -100)
    logits, loss, values = model(**sources, labels=labels)
    torch.testing.assert_close(loss, cross_entropy(logits.flatten(0, 1), labels.flatten()))
    shifted = torch.cat(
        [torch.full((3, 1), START), labels[:, :-1].masked_fill(labels[:, :-1] == -100, PAD)], 1
    )
    _, _, again = model(**sources, decoder_input_ids=shifted)
    torch.testing.assert_close(values, again)
    states = model.pretrained_model.get_encoder()(**sources).last_hidden_state
    _, _, read = model(
        attention_mask=sources["attention_mask"],
        encoder_outputs=BaseModelOutput(last_hidden_state=states),
        decoder_input_ids=shifted,
    )
    torch.testing.assert_close(read, again)


def test_values_train_the_decoder_and_the_encoder() -> None:
    model = with_values().train()
    model(**batch())[2].square().mean().backward()
    trunk = model.pretrained_model
    for layer in (trunk.encoder.block[0], trunk.decoder.block[0]):
        assert layer.layer[0].SelfAttention.v.weight.grad.abs().sum() > 0
    assert trunk.decoder.block[0].layer[1].EncDecAttention.v.weight.grad.abs().sum() > 0


def test_half_precision_and_generate() -> None:
    model = with_values(dtype=torch.bfloat16)
    logits, _, values = model(**batch())
    assert model.v_head.summary.weight.dtype == logits.dtype == values.dtype == torch.float32
    tokens = model.generate(batch()["input_ids"], max_new_tokens=5, do_sample=True)
    assert (tokens[:, 0] == START).all()


def test_a_decoder_with_an_output_layer_of_its_own() -> None:
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    bert = BertConfig(**sizes, num_attention_heads=2, initializer_range=0.3)
    config = EncoderDecoderConfig.from_encoder_decoder_configs(bert, bert)
    model = AutoModelForSeq2SeqLMWithValueHead(EncoderDecoderModel(config).eval())
    assert isinstance(model.pretrained_model.decoder, BertLMHeadModel)
    logits, _, values = model(**batch())
    assert logits.shape == (3, 6, VOCAB)
    hidden = model.pretrained_model(**batch(), output_hidden_states=True).decoder_hidden_states[-1]
    torch.testing.assert_close(values, model.v_head(hidden).squeeze(-1))


@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_reload(family: str, tmp_path: Path) -> None:
    model = with_values(family)
    model.save_pretrained(tmp_path)
    assert_same_outputs(model, AutoModelForSeq2SeqLMWithValueHead.from_pretrained(tmp_path))
    found = load_with_value_head(tmp_path)
    assert type(found) is AutoModelForSeq2SeqLMWithValueHead
    plain, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        assert torch.equal(plain(**batch()).logits, model(**batch())[0])
    frozen = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(tmp_path, is_trainable=False)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_reads_a_trl_checkpoint(tmp_path: Path) -> None:
    """Whose head lies among the trunk's weights."""
    model = with_values("bart")
    model.save_pretrained(tmp_path)
    head = load_file(tmp_path / "value_head.safetensors")
    (tmp_path / "value_head.safetensors").unlink()
    state = load_file(tmp_path / "model.safetensors") | {f"v_head.{k}": v for k, v in head.items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same_outputs(model, AutoModelForSeq2SeqLMWithValueHead.from_pretrained(tmp_path))


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_save_and_reload(family: str, tmp_path: Path) -> None:
    make_seq2seq(family).save_pretrained(tmp_path / "base")
    model = load_with_value_head(
        tmp_path / "base", peft_config=lora_config(4, 8), v_head_init_strategy="normal"
    )
    assert isinstance(model.pretrained_model, PeftModel)
    assert model.pretrained_model.active_peft_config.task_type == "SEQ_2_SEQ_LM"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    assert (model(**batch())[0] - load_with_value_head(tmp_path / "base")(**batch())[0]).abs().max() > 0.1
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    again = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(tmp_path / "adapter")
    assert_same_outputs(model, again)
    assert all("lora_" in n or "v_head" in n for n, p in again.named_parameters() if p.requires_grad)
    modules = {n.split(".")[3] for n, _ in again.named_parameters() if "lora_" in n}
    assert modules >= {"encoder", "decoder"} or family in ("bart", "mbart", "marian")


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, bos_token_id=BOS))


def test_each_class_names_the_other(tmp_path: Path) -> None:
    make_seq2seq().save_pretrained(tmp_path / "t5")
    gpt2().save_pretrained(tmp_path / "gpt2")
    for source in (make_seq2seq(), tmp_path / "t5"):
        with pytest.raises(
            ModelError, match=r"is an encoder-decoder model; expected a decoder: AutoModelForSeq2"
        ):
            AutoModelForCausalLMWithValueHead.from_pretrained(source)
        assert isinstance(load_with_value_head(source), AutoModelForSeq2SeqLMWithValueHead)
    for source in (gpt2(), tmp_path / "gpt2"):
        with pytest.raises(
            ModelError, match=r"is not an encoder-decoder model; expected one.*AutoModelForCausal"
        ):
            AutoModelForSeq2SeqLMWithValueHead.from_pretrained(source)
        assert isinstance(load_with_value_head(source), AutoModelForCausalLMWithValueHead)


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match="no language-model head; expected a …ForConditionalGeneration model"
    ):
        AutoModelForSeq2SeqLMWithValueHead(make_seq2seq("bart").model)
    with pytest.raises(ModelError, match="is an encoder-decoder model; expected a decoder"):
        ValueModel.from_pretrained(with_values())
    adapted = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(
        make_seq2seq(), peft_config=lora_config(2, 4)
    )
    with pytest.raises(ModelError, match="a reward adapter scores what a decoder reads"):
        adapted.add_and_load_reward_modeling_adapter(tmp_path)
