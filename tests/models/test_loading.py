"""Loading models and tokenizers, what is said when that fails, and the way out of wrappers."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from encoder_decoders import make_seq2seq
from huggingface_hub import constants
from peft import PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    CLIPVisionConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
)

from etude.errors import ModelError
from etude.models.adapters import add_adapter, lora_config
from etude.models.loading import best_device, holds_encoder_decoder, load_causal_lm, load_tokenizer
from etude.models.value_head import AutoModelForCausalLMWithValueHead
from etude.models.wrappers import trunk_of, unwrapped


@pytest.fixture(autouse=True)
def _offline_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    torch.set_num_threads(1)
    torch.manual_seed(0)


def tiny_llama() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.1,
        tie_word_embeddings=False,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def tiny_gpt2() -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=31,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        initializer_range=0.1,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def tiny_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["[UNK]", "<pad>", "</s>", "a", "b"])}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="[UNK]")), unk_token="[UNK]", **special
    )


def logits_of(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[3, 9, 27, 4], [5, 25, 1, 7]])).logits


# -- tokenizers ---------------------------------------------------------------------------------------


def test_the_end_of_sequence_stands_in_for_a_missing_pad_token(tmp_path: Path) -> None:
    tiny_tokenizer(eos_token="</s>").save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token == "</s>"


def test_a_pad_token_is_kept(tmp_path: Path) -> None:
    tiny_tokenizer(eos_token="</s>", pad_token="<pad>").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<pad>", "</s>")
    assert len(tokenizer) == 5


def test_a_tokenizer_without_either_is_left_alone(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token is None


@pytest.mark.parametrize(
    "config", [GPT2Config(), OPTConfig(), T5Config(), LlamaConfig()], ids=lambda config: config.model_type
)
def test_a_directory_without_a_tokenizer(config: object, tmp_path: Path) -> None:
    """transformers would build one from the configuration, with no vocabulary in it."""
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"tokenizer.*{tmp_path.name}|{tmp_path.name}.*tokenizer"):
        load_tokenizer(tmp_path)


def test_a_directory_of_something_else_holds_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no tokenizer; expected .*It holds nothing"):
        load_tokenizer(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ModelError, match=r"holds no tokenizer; expected .*It holds metrics\.jsonl"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_is_nowhere(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no directory .*missing.*a tokenizer"):
        load_tokenizer(tmp_path / "missing")
    with pytest.raises(ModelError, match=r"neither a directory .* nor found on the hub"):
        load_tokenizer("someone/nothing")


# -- models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_loads_what_was_saved(make: type, tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    loaded = load_causal_lm(tmp_path)
    assert not loaded.training
    assert torch.equal(logits_of(loaded), logits_of(model))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", torch.float64])
def test_dtype(dtype: str | torch.dtype, tmp_path: Path) -> None:
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path)
    expected = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
    assert load_causal_lm(tmp_path, dtype=dtype).dtype == expected
    assert load_causal_lm(tmp_path, dtype="auto").dtype == torch.bfloat16


def test_device_and_attention(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    model = load_causal_lm(tmp_path, device="meta", attn_implementation="eager")
    assert model.device.type == "meta"
    assert model.config._attn_implementation == "eager"


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny_llama().save_pretrained(tmp_path / "model")
    assert load_causal_lm("~/model").dtype == torch.float32


def test_frozen_where_asked(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    assert not any(p.requires_grad for p in load_causal_lm(tmp_path, is_trainable=False).parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float23"}, "dtype is 'float23'; expected a torch.dtype or one of float32"),
        ({"devcie_map": "auto"}, "'devcie_map' is not an option"),
        ({"load_in_8bit": True}, "BitsAndBytesConfig"),
        ({"attn_implementation": "fast"}, "can't be loaded from the directory"),
        ({"peft_config": {"r": 4}}, "peft_config is a dict; expected a peft.PeftConfig"),
    ],
)
def test_wrong_options(options: dict[str, object], message: str, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=message):
        load_causal_lm(tmp_path, **options)


@pytest.mark.parametrize("name", ["./missing", "runs/calculator/missing", "/missing", "~/missing", "-x"])
def test_a_path_that_leads_nowhere_is_one_short_error(name: str) -> None:
    with pytest.raises(ModelError, match="there is no directory") as caught:
        load_causal_lm(name)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize("name", ["missing", "runs/missing"])
def test_what_may_be_a_path_or_a_hub_id_is_explained_as_both(name: str) -> None:
    with pytest.raises(ModelError, match=r"neither a directory .* nor found on the hub") as caught:
        load_causal_lm(name)
    assert "check the path" in str(caught.value)
    assert "HF_HUB_OFFLINE" in str(caught.value)
    assert caught.value.__suppress_context__


def test_directories_that_hold_no_decoder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json.*It holds nothing"):
        load_causal_lm(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ModelError, match=r"It holds notes\.txt"):
        load_causal_lm(tmp_path)
    with pytest.raises(ModelError, match=r"notes\.txt' is a file"):
        load_causal_lm(tmp_path / "notes.txt")
    LlamaConfig().save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match="can't be loaded from the directory"):
        load_causal_lm(tmp_path / "bare")
    CLIPVisionConfig().save_pretrained(tmp_path / "vision")
    with pytest.raises(ModelError, match="clip_vision_model model, of which transformers knows no causal"):
        load_causal_lm(tmp_path / "vision")


def test_an_encoder_is_no_decoder(tmp_path: Path) -> None:
    """transformers would load it, and let each position see the token that it is to say."""
    config = BertConfig(
        vocab_size=31, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"is an encoder \(bert\)"):
        load_causal_lm(tmp_path)
    config.is_decoder = True
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert load_causal_lm(tmp_path).config.is_decoder


def test_an_encoder_decoder_is_refused_before_its_decoder_is_torn_out(tmp_path: Path) -> None:
    config = BartConfig(
        vocab_size=31,
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        max_position_embeddings=16,
    )
    BartForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="encoder-decoder"):
        load_causal_lm(tmp_path)


@pytest.mark.parametrize("labels", [1, 3])
def test_no_head_is_left_at_random(labels: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A reward model given as the policy would answer at random, and train."""
    config = LlamaConfig(**{**tiny_llama().config.to_dict(), "num_labels": labels})
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(
        ModelError, match=r"lacks 'lm_head.weight'.*random.*LlamaForSequenceClassification; expected a lang"
    ):
        load_causal_lm(tmp_path)
    assert "LOAD REPORT" not in caplog.text


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelError, match="can't be loaded from the directory"):
        load_causal_lm(tmp_path)


def test_code_in_a_checkpoint_runs_only_when_trusted(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_type"] = "homemade"
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig):\n    model_type = 'homemade'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    with pytest.raises(ModelError, match="trust_remote_code"):
        load_causal_lm(tmp_path)
    assert not (tmp_path / "ran").exists()
    assert type(load_causal_lm(tmp_path, trust_remote_code=True)).__name__ == "Model"
    assert (tmp_path / "ran").exists()


# -- adapters -----------------------------------------------------------------------------------------


def test_lora_config() -> None:
    config = lora_config(4, 8, 0.05)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 8, 0.05)
    assert config.target_modules == "all-linear"
    assert lora_config(4, 8, target_modules=["q_proj"]).target_modules == {"q_proj"}
    assert lora_config(4, 8, target_modules=r".*\.q_proj").target_modules == r".*\.q_proj"


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_fresh_adapter_changes_nothing_and_trains_alone(make: type, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    config = lora_config(4, 8)
    before = json.dumps(config.to_dict(), default=sorted)
    model = load_causal_lm(tmp_path, peft_config=config)
    assert isinstance(model, PeftModel)
    assert json.dumps(config.to_dict(), default=sorted) == before
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) >= 8
    assert all("lora_" in name for name in trained)
    assert not any("lm_head" in name for name in trained)
    assert torch.equal(logits_of(model), logits_of(load_causal_lm(tmp_path)))


def test_adapter_directory(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    model = load_causal_lm(tmp_path / "base", peft_config=lora_config(4, 8))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "adapter")
    again = load_causal_lm(tmp_path / "adapter")
    assert torch.equal(logits_of(again), logits_of(model))
    assert not torch.equal(logits_of(again), logits_of(load_causal_lm(tmp_path / "base")))
    assert any(parameter.requires_grad for parameter in again.parameters())
    frozen = load_causal_lm(tmp_path / "adapter", is_trainable=False)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())

    shutil.rmtree(tmp_path / "base")
    with pytest.raises(ModelError, match=r"base'; expected one with the base model of the adapter in"):
        load_causal_lm(tmp_path / "adapter")


def test_an_adapter_that_names_no_base(tmp_path: Path) -> None:
    add_adapter(tiny_llama(), lora_config(4, 8)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"doesn't say .*adapter_config\.json"):
        load_causal_lm(tmp_path)


def test_an_adapter_whose_base_is_gone(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    load_causal_lm(tmp_path / "base", peft_config=lora_config(4, 8)).save_pretrained(tmp_path / "adapter")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(ModelError, match=r"base model of the adapter in '.*adapter', .*adapter_config\.json"):
        load_causal_lm(tmp_path / "adapter")


# -- out of wrappers ----------------------------------------------------------------------------------


def test_trunk_of() -> None:
    model = tiny_llama()
    assert trunk_of(model) is model
    assert trunk_of(AutoModelForCausalLMWithValueHead(model)) is model
    with pytest.raises(ModelError, match="no transformers model inside Sequential"):
        trunk_of(nn.Sequential(model))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, on loading its compiler
def test_trunk_of_a_compiled_model() -> None:
    model = tiny_llama()
    assert trunk_of(torch.compile(AutoModelForCausalLMWithValueHead(model))) is model


def test_trunk_of_an_adapted_model_computes_with_its_adapter() -> None:
    base = logits_of(tiny_llama())
    torch.manual_seed(0)
    adapted = add_adapter(tiny_llama(), lora_config(4, 8))
    assert torch.equal(logits_of(adapted), base)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    wrapped = AutoModelForCausalLMWithValueHead(adapted)
    trunk = trunk_of(wrapped)
    assert type(trunk).__name__ == "LlamaForCausalLM"
    assert torch.equal(logits_of(trunk), logits_of(adapted))
    assert not torch.equal(logits_of(trunk), base)
    assert list(unwrapped(wrapped)) == [wrapped, adapted, trunk]


def test_trunk_of_a_distributed_model(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = tiny_llama()
        assert trunk_of(DistributedDataParallel(AutoModelForCausalLMWithValueHead(model))) is model
        gc.collect()  # the wrapper mustn't be the group's last holder: it may wait for ever then
    finally:
        dist.destroy_process_group()


def test_best_device_works() -> None:
    assert best_device() in ("cuda", "mps", "cpu")
    assert torch.ones(2, device=best_device()).sum().item() == 2
    assert (best_device() == "cuda") == torch.cuda.is_available()


def test_whether_an_encoder_decoder_is_there(tmp_path: Path) -> None:
    """By the configuration alone; an adapter is of the kind that its base is."""
    adapted = add_adapter(make_seq2seq("bart"), lora_config(2, 4))
    adapted.get_base_model().save_pretrained(tmp_path / "bart")
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "bart")
    adapted.save_pretrained(tmp_path / "adapter")
    tiny_llama().save_pretrained(tmp_path / "llama")
    assert holds_encoder_decoder(tmp_path / "bart")
    assert holds_encoder_decoder(tmp_path / "adapter")
    assert not holds_encoder_decoder(tmp_path / "llama")
    (tmp_path / "llama" / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        holds_encoder_decoder(tmp_path / "llama")
