"""Value-head models: where values come from, and that they survive saving in every layout."""

from __future__ import annotations

import base64
import json
import logging
import os
import pickle
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, PeftModel, PromptTuningConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    T5Config,
    T5ForConditionalGeneration,
)

from etude.errors import ModelError
from etude.models.adapters import add_adapter, lora_config
from etude.models.value_head import AutoModelForCausalLMWithValueHead
from etude.models.with_value_head import ValueHead

ValueModel = AutoModelForCausalLMWithValueHead

VOCAB = 61
_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "gpt2": GPT2Config(
        vocab_size=VOCAB,
        n_embd=24,
        n_layer=2,
        n_head=2,
        n_positions=64,
        initializer_range=0.1,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "llama": LlamaConfig(**_DECODER),
    "qwen2": Qwen2Config(**_DECODER),
    "qwen3": Qwen3Config(**_DECODER, head_dim=6),
    # The hidden state is projected to 16 before it meets the output layer.
    "opt": OPTConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        word_embed_proj_dim=16,
        ffn_dim=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        init_std=0.1,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
}
FAMILIES = sorted(CONFIGS)


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def transformers_log() -> list[str]:
    """What transformers says at warning level; its logger doesn't propagate, so caplog doesn't see it."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def trunk(family: str = "llama", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(CONFIGS[family], dtype=dtype).eval()


def value_model(family: str = "llama", dtype: torch.dtype = torch.float32) -> ValueModel:
    return ValueModel(trunk(family, dtype), v_head_init_strategy="normal")


def batch() -> dict[str, torch.Tensor]:
    """Three rows of 9, 6 and 3 tokens, padded on the right."""
    lengths = torch.tensor([9, 6, 3])
    return {
        "input_ids": torch.randint(3, VOCAB, (3, 9), generator=torch.Generator().manual_seed(1)),
        "attention_mask": (torch.arange(9) < lengths[:, None]).long(),
    }


def assert_same_outputs(one: ValueModel, other: ValueModel) -> None:
    with torch.no_grad():
        logits, _, values = one(**batch())
        other_logits, _, other_values = other(**batch())
    assert values.std() > 0.01  # a head that gives a constant would pass any comparison
    assert torch.equal(logits, other_logits)
    assert torch.equal(values, other_values)


# -- forward ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_values_are_the_head_on_what_enters_the_output_layer(family: str) -> None:
    model = value_model(family, torch.float64)
    with torch.no_grad():
        logits, loss, values = model(**batch())
        hidden = model.pretrained_model.base_model(**batch()).last_hidden_state
        expected_logits = hidden @ model.pretrained_model.lm_head.weight.T
    assert loss is None
    torch.testing.assert_close(logits, expected_logits, rtol=1e-12, atol=1e-12)
    assert values.shape == (3, 9)
    by_hand = hidden @ model.v_head.summary.weight[0] + model.v_head.summary.bias
    torch.testing.assert_close(values, by_hand, rtol=1e-12, atol=1e-12)


def test_the_head_is_as_wide_as_the_output_layers_input() -> None:
    assert value_model("opt").v_head.summary.in_features == 16
    assert value_model("llama").v_head.summary.in_features == 24


def test_labels_give_the_trunks_loss() -> None:
    model = value_model()
    labels = batch()["input_ids"].masked_fill(batch()["attention_mask"] == 0, -100)
    _, loss, _ = model(**batch(), labels=labels)
    assert torch.equal(loss, model.pretrained_model(**batch(), labels=labels).loss)


@pytest.mark.parametrize("keep", [2, torch.tensor([0, 4, 5])], ids=["last", "indices"])
def test_logits_to_keep_keeps_the_same_values(keep: int | torch.Tensor) -> None:
    model = value_model(dtype=torch.float64)
    with torch.no_grad():
        _, _, values = model(**batch())
        kept_logits, _, kept_values = model(**batch(), logits_to_keep=keep)
    expected = values[:, -keep:] if isinstance(keep, int) else values[:, keep]
    assert kept_logits.shape[:2] == expected.shape
    torch.testing.assert_close(kept_values, expected, rtol=1e-12, atol=1e-12)


def test_half_precision_trunk_keeps_a_float32_head_and_float32_outputs() -> None:
    model = value_model(dtype=torch.bfloat16)
    logits, _, values = model(**batch())
    assert model.v_head.summary.weight.dtype == torch.float32
    assert logits.dtype == values.dtype == torch.float32
    assert model.dtype == torch.bfloat16


def test_autocast_leaves_the_head_in_float32() -> None:
    head, hidden = ValueHead(24, summary_dropout_prob=0.0), torch.randn(2, 5, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = head(hidden)
    assert torch.equal(values, nn.functional.linear(hidden, head.summary.weight, head.summary.bias))


def test_a_head_cast_to_half_precision_still_returns_float32() -> None:
    model = value_model().to(torch.bfloat16)
    assert model.v_head.summary.weight.dtype == torch.bfloat16
    assert model(**batch())[2].dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loss_on_values_and_logits_trains_head_and_trunk(family: str) -> None:
    model = value_model(family).train()
    logits, _, values = model(**batch())
    (values.square().mean() + logits.logsumexp(-1).mean()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A key's bias shifts all scores of a query alike: its gradient is zero but for rounding.
    assert [name for name in without if "k_proj.bias" not in name] == []


def test_a_loss_on_values_alone_reaches_the_trunk() -> None:
    model = value_model()
    model(**batch())[2].square().mean().backward()
    assert model.pretrained_model.model.embed_tokens.weight.grad.abs().sum() > 0
    assert model.pretrained_model.lm_head.weight.grad is None


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model = value_model(dtype=torch.float64).train()
    model.v_head.eval()
    gradients = []
    for switch in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        switch()
        model.zero_grad()
        model(**batch(), use_cache=False)[2].square().mean().backward()
        gradients.append(model.pretrained_model.model.embed_tokens.weight.grad.clone())
    assert model.pretrained_model.model.layers[0].gradient_checkpointing
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_generate_is_the_trunks() -> None:
    model = value_model()
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(batch()["input_ids"], **options)
    assert torch.equal(tokens, model.pretrained_model.generate(batch()["input_ids"], **options))
    assert len(tokens[:, 9:].unique()) > 5


def test_the_hook_is_gone_after_a_forward_that_fails() -> None:
    model = value_model()
    with pytest.raises(IndexError):
        model(input_ids=torch.full((1, 3), VOCAB + 5))
    assert not model.pretrained_model.lm_head._forward_pre_hooks


def test_a_resized_vocabulary_is_followed() -> None:
    model = value_model()
    model.pretrained_model.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
    logits, _, values = model(**batch())
    assert logits.shape == (3, 9, VOCAB + 3)
    assert values.shape == (3, 9)


def test_a_forward_that_skips_the_output_layer_is_an_error() -> None:
    model = value_model()
    aside = nn.Linear(24, VOCAB)
    model.pretrained_model.get_output_embeddings = lambda: aside
    with pytest.raises(ModelError, match="0 times"):
        model(**batch())


# -- construction -------------------------------------------------------------------------------------


def test_attributes() -> None:
    model = value_model("gpt2")
    assert not model.is_peft_model
    assert model.config is model.pretrained_model.config
    assert model.device == torch.device("cpu")
    assert model.dtype == torch.float32


def test_head_options() -> None:
    model = ValueModel(trunk(), v_head_init_strategy="normal", v_head_initializer_range=3.0)
    assert 1.5 < model.v_head.summary.weight.std() < 5
    assert model.v_head.summary.bias.item() == 0
    assert ValueModel(trunk()).v_head.dropout.p == 0.1
    assert ValueModel(trunk(), summary_dropout_prob=0.4).v_head.dropout.p == 0.4
    assert isinstance(ValueModel(trunk(), summary_dropout_prob=0.0).v_head.dropout, nn.Identity)
    with pytest.raises(ModelError, match="v_head_init_strategy is 'uniform'"):
        ValueModel(trunk(), v_head_init_strategy="uniform")


def test_the_configurations_dropout_is_the_default() -> None:
    model = trunk()
    model.config.summary_dropout_prob = 0.25
    assert ValueModel(model).v_head.dropout.p == 0.25
    assert ValueModel(model, summary_dropout_prob=0.5).v_head.dropout.p == 0.5


def test_it_starts_in_the_trunks_mode() -> None:
    assert not ValueModel(trunk().eval()).v_head.training
    assert ValueModel(trunk().train()).v_head.training


def test_models_that_cannot_carry_values() -> None:
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=VOCAB, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
    )
    with pytest.raises(ModelError, match="encoder-decoder"):
        ValueModel(t5)
    bert = BertConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(ModelError, match="no language-model head"):
        ValueModel(BertForSequenceClassification(bert))
    with pytest.raises(ModelError, match="no language-model head"):
        ValueModel(trunk().model)
    with pytest.raises(ModelError, match="virtual tokens"):
        ValueModel(add_adapter(trunk(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)))
    with pytest.raises(ModelError, match="no transformers model inside Linear"):
        ValueModel(nn.Linear(3, 3))


def test_an_offloaded_model_is_refused(tmp_path: Path) -> None:
    trunk().save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match="offloaded"):
        ValueModel.from_pretrained(
            tmp_path / "model",
            device_map={"model": "cpu", "lm_head": "disk"},
            offload_folder=str(tmp_path / "offload"),
        )


# -- from_pretrained and save_pretrained --------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_reload(family: str, tmp_path: Path, transformers_log: list[str]) -> None:
    model = value_model(family)
    model.save_pretrained(tmp_path)
    assert_same_outputs(model, ValueModel.from_pretrained(tmp_path))
    assert_same_outputs(model, ValueModel.from_pretrained(str(tmp_path), device_map="cpu"))
    assert transformers_log == []


@pytest.mark.parametrize("family", FAMILIES)
def test_anything_loads_the_saved_trunk(family: str, tmp_path: Path, transformers_log: list[str]) -> None:
    model = value_model(family)
    model.save_pretrained(tmp_path)
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert transformers_log == []
    with torch.no_grad():
        assert torch.equal(plain(**batch()).logits, model(**batch())[0])


def test_save_and_reload_in_shards(tmp_path: Path) -> None:
    model = value_model("gpt2")
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_outputs(model, ValueModel.from_pretrained(tmp_path))


def test_saving_a_gathered_state_dict(tmp_path: Path) -> None:
    model, other = value_model(), value_model()
    other.save_pretrained(tmp_path, state_dict=model.state_dict())
    assert_same_outputs(model, ValueModel.from_pretrained(tmp_path))
    with pytest.raises(ModelError, match=r"no v_head\.\* keys"):
        other.save_pretrained(tmp_path, state_dict=other.pretrained_model.state_dict())


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    value_model().save_pretrained(tmp_path, is_main_process=False)
    assert list(tmp_path.iterdir()) == []


def test_where_not_to_save(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="is a file"):
        value_model().save_pretrained(tmp_path / "file")
    with pytest.raises(ModelError, match="push_to_hub"):
        value_model().save_pretrained(tmp_path, push_to_hub=True)


def test_dtype_is_float32_unless_given(tmp_path: Path) -> None:
    model = value_model(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert ValueModel.from_pretrained(tmp_path).dtype == torch.float32
    assert ValueModel.from_pretrained(tmp_path, torch_dtype=None).dtype == torch.float32
    assert ValueModel.from_pretrained(tmp_path, torch_dtype=torch.float16).dtype == torch.float16
    assert_same_outputs(model, ValueModel.from_pretrained(tmp_path, dtype="auto"))
    with pytest.raises(ModelError, match="two names"):
        ValueModel.from_pretrained(tmp_path, dtype="auto", torch_dtype="auto")


def test_a_plain_checkpoint_gets_a_new_head(tmp_path: Path) -> None:
    plain = trunk()
    plain.save_pretrained(tmp_path)
    model = ValueModel.from_pretrained(tmp_path, v_head_init_strategy="normal", summary_dropout_prob=0.3)
    assert model.v_head.summary.bias.item() == 0
    assert model.v_head.dropout.p == 0.3
    with torch.no_grad():
        assert torch.equal(model(**batch())[0], plain(**batch()).logits)


def test_wrapping_a_loaded_model() -> None:
    plain = trunk()
    assert ValueModel.from_pretrained(plain).pretrained_model is plain
    assert (
        ValueModel.from_pretrained(plain, device_map=None, trust_remote_code=False).pretrained_model is plain
    )
    adapted = add_adapter(trunk(), lora_config(4, 8))
    assert ValueModel.from_pretrained(adapted).pretrained_model is adapted
    with pytest.raises(ModelError, match="adapter already"):
        ValueModel.from_pretrained(adapted, peft_config=lora_config(4, 8))
    with pytest.raises(ModelError, match="device_map, foo"):
        ValueModel.from_pretrained(plain, foo=1, device_map="auto")
    with pytest.raises(ModelError, match="from_pretrained got a int"):
        ValueModel.from_pretrained(3)


def test_unknown_option(tmp_path: Path) -> None:
    trunk().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="'num_share_layers' is not an option"):
        ValueModel.from_pretrained(tmp_path, num_share_layers=2)


def test_is_trainable_false_freezes_everything(tmp_path: Path) -> None:
    value_model().save_pretrained(tmp_path)
    frozen = ValueModel.from_pretrained(tmp_path, is_trainable=False)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert all(parameter.requires_grad for parameter in ValueModel.from_pretrained(tmp_path).parameters())


def test_a_head_of_another_model_is_an_error(tmp_path: Path) -> None:
    value_model("llama").save_pretrained(tmp_path)
    value_model("opt").save_pretrained(tmp_path / "opt")
    shutil.copy(tmp_path / "opt" / "value_head.safetensors", tmp_path)
    with pytest.raises(ModelError, match=r"summary.weight \[1, 16\].*takes.*\[1, 24\]"):
        ValueModel.from_pretrained(tmp_path)


def test_a_damaged_head_is_named(tmp_path: Path) -> None:
    value_model().save_pretrained(tmp_path)
    (tmp_path / "value_head.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelError, match="the value head can't be loaded from the directory"):
        ValueModel.from_pretrained(tmp_path)


# -- the hub ------------------------------------------------------------------------------------------


class _Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload needs: create, preupload, commit. Files go to a directory."""

    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/repos/create"):
            self._answer({"url": f"{constants.ENDPOINT}/someone/model"})
        elif "/preupload/" in self.path:
            kept = {"uploadMode": "regular", "shouldIgnore": False}
            self._answer({"files": [{"path": f["path"], **kept} for f in json.loads(body)["files"]]})
        else:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    file = self.server.directory / line["value"]["path"]
                    file.write_bytes(base64.b64decode(line["value"]["content"]))
            self._answer({"commitUrl": f"{constants.ENDPOINT}/someone/model/commit/0", "commitOid": "0" * 40})

    def _answer(self, answer: dict[str, object]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Silence."""


def test_push_to_hub_uploads_trunk_and_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        server.directory = tmp_path
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        model = value_model()
        model.push_to_hub("someone/model", token="hf_none", max_shard_size="10KB")
        server.shutdown()
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert_same_outputs(model, ValueModel.from_pretrained(tmp_path))


@pytest.mark.parametrize("layout", ["ours", "safetensors", "sharded bin"])
def test_loads_head_and_trunk_by_hub_id(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository, commit = tmp_path / "models--someone--model", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    model = value_model("gpt2")
    model.save_pretrained(repository / "snapshots" / commit)
    if layout != "ours":
        _as_trl(repository / "snapshots" / commit, layout)
    assert_same_outputs(model, ValueModel.from_pretrained("someone/model", cache_dir=str(tmp_path)))


# -- LoRA ---------------------------------------------------------------------------------------------


def adapted_model(base: Path, family: str, config: LoraConfig) -> ValueModel:
    """A value-head model with an adapter that does something, on a base saved in `base`."""
    trunk(family).save_pretrained(base)
    model = ValueModel.from_pretrained(base, peft_config=config, v_head_init_strategy="normal")
    with torch.no_grad():
        for name, parameter in model.pretrained_model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_save_and_reload(family: str, tmp_path: Path, transformers_log: list[str]) -> None:
    model = adapted_model(tmp_path / "base", family, lora_config(4, 8, dropout=0.1))
    base = ValueModel.from_pretrained(tmp_path / "base")
    assert model.is_peft_model
    assert (model(**batch())[0] - base(**batch())[0]).abs().max() > 0.1

    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    again = ValueModel.from_pretrained(tmp_path / "adapter")
    assert isinstance(again.pretrained_model, PeftModel)
    assert_same_outputs(model, again)
    assert transformers_log == []

    def trained(model: ValueModel) -> set[str]:
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    assert trained(again) == trained(model) >= {"v_head.summary.weight", "v_head.summary.bias"}
    assert all("lora_" in name or "v_head" in name for name in trained(again))
    assert not trained(ValueModel.from_pretrained(tmp_path / "adapter", is_trainable=False))


def test_lora_on_a_saved_output_layer(tmp_path: Path) -> None:
    """Values follow the output layer where PEFT wraps or copies it."""
    for name, options in {"target": {}, "saved": {"modules_to_save": ["lm_head"]}}.items():
        targets = ["q_proj", "lm_head"] if name == "target" else ["q_proj"]
        config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets, **options)
        model = adapted_model(tmp_path / "base", "llama", config)
        assert model.v_head.summary.in_features == 24
        _, _, values = model(**batch())
        hidden = model.pretrained_model(**batch(), output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(values, model.v_head(hidden).squeeze(-1))


def test_an_adapter_is_not_buried_under_a_new_one(tmp_path: Path) -> None:
    adapted_model(tmp_path / "base", "llama", lora_config(4, 8)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match="is an adapter already"):
        ValueModel.from_pretrained(tmp_path / "adapter", peft_config=lora_config(4, 8))


# -- TRL 0.7.4's checkpoints --------------------------------------------------------------------------


def _as_trl(directory: Path, layout: str) -> None:
    """Rewrite what we saved as TRL 0.7.4 saves it: the head among the trunk's weights."""
    head = load_file(directory / "value_head.safetensors")
    state = load_file(directory / "model.safetensors") | {f"v_head.{k}": v for k, v in head.items()}
    (directory / "value_head.safetensors").unlink()
    (directory / "model.safetensors").unlink()
    if layout == "bin":
        torch.save(state, directory / "pytorch_model.bin")
    elif layout == "safetensors":
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    else:
        suffix = "bin" if layout == "sharded bin" else "safetensors"
        stem = "pytorch_model" if suffix == "bin" else "model"
        keys = sorted(state)
        weight_map = {key: f"{stem}-{i % 3 + 1:05d}-of-00003.{suffix}" for i, key in enumerate(keys)}
        for file in set(weight_map.values()):
            part = {key: state[key] for key in keys if weight_map[key] == file}
            if suffix == "bin":
                torch.save(part, directory / file)
            else:
                save_file(part, directory / file, metadata={"format": "pt"})
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("layout", ["safetensors", "sharded safetensors", "bin", "sharded bin"])
@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_reads_trl_checkpoints(family: str, layout: str, tmp_path: Path, transformers_log: list[str]) -> None:
    model = value_model(family)
    model.save_pretrained(tmp_path)
    _as_trl(tmp_path, layout)
    assert_same_outputs(model, ValueModel.from_pretrained(tmp_path))
    assert transformers_log == []


def test_reads_a_trl_adapter_whose_head_is_in_a_bin(tmp_path: Path) -> None:
    model = adapted_model(tmp_path / "base", "gpt2", lora_config(4, 8))
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "value_head.safetensors").unlink()
    head = {f"v_head.{key}": tensor for key, tensor in model.v_head.state_dict().items()}
    torch.save(head, tmp_path / "adapter" / "pytorch_model.bin")
    assert_same_outputs(model, ValueModel.from_pretrained(tmp_path / "adapter"))


def test_other_stray_weights_are_still_reported(tmp_path: Path, transformers_log: list[str]) -> None:
    value_model("gpt2").save_pretrained(tmp_path)
    _as_trl(tmp_path, "safetensors")
    state = load_file(tmp_path / "model.safetensors")
    save_file(state | {"stray.weight": torch.ones(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    ValueModel.from_pretrained(tmp_path)
    assert any("stray.weight" in message for message in transformers_log)


class _Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(Path(os.environ["ETUDE_TEST_DIRECTORY"]) / "ran"),)


def test_a_pickle_with_code_in_it_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ETUDE_TEST_DIRECTORY", str(tmp_path))
    adapted_model(tmp_path / "base", "gpt2", lora_config(4, 8)).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "value_head.safetensors").unlink()
    file = tmp_path / "adapter" / "pytorch_model.bin"
    torch.save({"v_head.summary.weight": _Payload()}, file)
    with pytest.raises(ModelError, match="more than tensors"):
        ValueModel.from_pretrained(tmp_path / "adapter")
    file.write_bytes(pickle.dumps({"v_head.summary.weight": _Payload()}, protocol=2))
    with pytest.raises(ModelError, match="more than tensors"):
        ValueModel.from_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "ran").exists()


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    model = adapted_model(tmp_path / "base", "gpt2", lora_config(4, 8))
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "value_head.safetensors").unlink()
    index = {"weight_map": {"v_head.summary.weight": "model-00002-of-00002.safetensors"}}
    (tmp_path / "adapter" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="lacks model-00002-of-00002"):
        ValueModel.from_pretrained(tmp_path / "adapter")
