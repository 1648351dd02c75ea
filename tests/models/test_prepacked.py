"""Rearranged weights give the numbers of the plain ones, follow their changes, and leave no trace."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from etude.models.prepacked import PrepackedLinears

SIZES = {"vocab_size": 97, "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None}
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**SIZES, n_embd=32, n_layer=2, n_head=4)).eval()


def ids(count: int) -> torch.Tensor:
    return torch.arange(count)[None] % 97


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("count", [1, 3, 32, 70])
@torch.no_grad()
def test_same_logits(make, count):
    model = make()
    linears = PrepackedLinears(model)
    assert linears.nbytes == sum(
        module.weight.nbytes for module in model.modules() if type(module).__name__ in ("Linear", "Conv1D")
    )
    plain = model(ids(count)).logits
    with linears.active():
        torch.testing.assert_close(model(ids(count)).logits, plain, rtol=1e-5, atol=1e-5)
    assert model(ids(count)).logits.equal(plain), "the plain forward is back"


@torch.no_grad()
def test_changed_weights_are_rearranged_again():
    model = llama()
    linears = PrepackedLinears(model)
    with linears.active():
        before = model(ids(9)).logits
    for parameter in model.parameters():
        parameter.mul_(1.5)
    with linears.active():
        assert not torch.allclose(model(ids(9)).logits, model.double()(ids(9)).logits.float())
    model.float()
    linears.forget()
    with linears.active():
        after = model(ids(9)).logits
    torch.testing.assert_close(after, model(ids(9)).logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, after)


def test_gradients_go_the_plain_way():
    model = llama()
    with PrepackedLinears(model).active():
        model(ids(5)).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@torch.no_grad()
def test_autocast():
    model = llama()
    linears = PrepackedLinears(model)
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(ids(9)).logits
        with linears.active():
            packed = model(ids(9)).logits
    assert packed.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(packed, plain, rtol=0.05, atol=0.05)
    with linears.active():
        full = model(ids(9)).logits
    torch.testing.assert_close(full, model(ids(9)).logits, rtol=1e-5, atol=1e-5)


def test_what_is_not_a_plain_linear_layer_is_left_alone():
    class Doubling(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Doubling(4, 4), nn.Linear(4, 4).double(), nn.LayerNorm(4))
    linears = PrepackedLinears(model)
    assert linears.nbytes == 0
    wrapped = nn.Linear(4, 4)
    wrapped.forward = lambda x: x  # what hooks of other libraries do
    assert PrepackedLinears(wrapped).nbytes == 0
    with PrepackedLinears(wrapped).active():
        assert wrapped.forward(3) == 3
