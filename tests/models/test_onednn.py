"""oneDNN's products give the numbers and gradients of torch's own, where they serve, and leave no trace."""

from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from etude.models import onednn
from etude.models.onednn import onednn_linears, product
from etude.trainers.sft import SFTTrainer
from etude.trainers.sft_config import SFTConfig

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=256,
        intermediate_size=320,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        attention_bias=True,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def replaced(model: nn.Module) -> set[str]:
    return {name.split(".")[-1] for name, module in model.named_modules() if "forward" in vars(module)}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def loss(model: nn.Module) -> torch.Tensor:
    return model(torch.arange(34).view(2, 17) % 300).logits.log_softmax(-1)[..., 7].mean()


def test_same_loss_and_gradients(model):
    expected = loss(model)
    expected.backward()
    plain = gradients(model)
    with onednn_linears(model):
        assert replaced(model) == {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}, "the large ones"
        actual = loss(model)
        actual.backward()
    assert not replaced(model)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradients(model), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
def test_frozen_weights_under_an_adapter_get_no_gradient(model):
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    loss(adapted).backward()
    plain = gradients(adapted)
    with onednn_linears(adapted):
        assert "base_layer" in replaced(adapted)
        loss(adapted).backward()
    actual = gradients(adapted)
    assert actual.keys() == plain.keys()
    assert all("lora" in name for name in actual)
    torch.testing.assert_close(actual, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(256,), (0, 256), (5, 256), (2, 3, 256)])
@pytest.mark.parametrize("bias", [True, False])
def test_any_shape_and_layout(shape, bias):
    layer = nn.Linear(256, 260, bias=bias)
    with torch.no_grad():
        weight, x = layer.weight, torch.randn(*shape[:-1], 256)
        torch.testing.assert_close(product(x, weight, layer.bias), layer(x))
        wide = torch.randn(*shape[:-1], 260)
        torch.testing.assert_close(product(wide, weight.t()), wide @ weight, rtol=1e-5, atol=1e-5)
        every_other = torch.randn(*shape[:-1], 512)[..., ::2]
        torch.testing.assert_close(product(every_other, weight), every_other @ weight.t())
    x.requires_grad_()
    results = []
    for output in (layer(x), onednn._Linear.apply(x, layer.weight, layer.bias)):
        output.sum().backward()  # whose gradient is one number, expanded
        results.append([tensor.grad for tensor in (x, *layer.parameters())])
        x.grad = None
        layer.zero_grad()
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_what_is_left_alone(model):
    class Doubling(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    patched = nn.Linear(256, 256)
    patched.forward = lambda x: x  # what hooks of other libraries do
    model.others = nn.ModuleList([Doubling(256, 256), nn.Linear(256, 256).double(), nn.Linear(8, 8), patched])
    with onednn_linears(model):
        assert replaced(model.others) == {"3"}
        assert patched.forward(3) == 3
        with torch.autocast("cpu", torch.bfloat16):
            assert model.model.layers[0].mlp.up_proj(torch.randn(3, 256)).dtype == torch.bfloat16
    assert patched.forward(3) == 3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_of_training(model, checkpointing, tokenizer, tmp_path, monkeypatch):
    """The products are oneDNN's from the forward to the end of the backward pass, which repeats a forward."""
    config = SFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    rows = [{"text": "two and two is four"}, {"text": "one"}]
    model.resize_token_embeddings(max(300, len(tokenizer)))
    trainer = SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
    if checkpointing:
        model.activation_checkpointing_enable()
    batch = trainer.collate(trainer.train_dataset.to_list())
    calls = []
    apply = onednn.product
    monkeypatch.setattr(onednn, "product", lambda *args: calls.append(args) or apply(*args))
    model.train()
    actual = trainer.training_step(model, dict(batch), num_items_in_batch=9)
    forwards = 2 if checkpointing else 1
    assert len(calls) == (forwards + 1) * 2 * 5  # and the inputs' gradients, in two layers
    got = gradients(model)
    monkeypatch.setattr("etude.trainers.data_trainer.onednn_linears", lambda model: nullcontext())
    expected = trainer.training_step(model, dict(batch), num_items_in_batch=9)
    assert len(calls) == (forwards + 1) * 2 * 5
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(got, gradients(model), rtol=1e-4, atol=1e-5)
