"""The chunked output layer against whole logits: values, gradients, and what is ever held at once."""

import gc
import math

import hypothesis.strategies as st
import pytest
import torch
import transformers as t
from hypothesis import given
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode

from etude.data.batch import PackedBatch, Trajectory
from etude.models import linear_head
from etude.models.adapters import add_adapter
from etude.models.forward import PolicyForward
from etude.models.head import ChunkedHead, chunk_rows
from etude.models.linear_head import Finish, LinearHead, LinearTotal
from etude.models.update_mode import update_mode
from etude.models.value_head import AutoModelForCausalLMWithValueHead

VOCABULARY = 61
ROWS = 4  # states per chunk, at most
CHUNK = ROWS * 4 * VOCABULARY
WHOLE = 2**40
BLOCK = 3 * 4 * VOCABULARY  # what a CPU goes over at a time: no divisor of a chunk
F64 = torch.float64

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GEMMA = {**SMALL, "head_dim": 8, "final_logit_softcapping": 2.0}
GPTJ = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4, "initializer_range": 0.2}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(linear_head, "BLOCK_BYTES", BLOCK)


def llama(**settings):
    return t.LlamaForCausalLM(t.LlamaConfig(**{**SMALL, **settings}))


def gptj():
    """With a bias in its output layer, one token of which is impossible, and not to be packed."""
    tokens = {name: SMALL[name] for name in ("vocab_size", "bos_token_id", "eos_token_id")}
    model = t.GPTJForCausalLM(t.GPTJConfig(**GPTJ, **tokens, tie_word_embeddings=False))
    torch.nn.init.normal_(model.lm_head.bias)
    with torch.no_grad():
        model.lm_head.bias[-1] = -torch.inf
    return model


def adapted(**settings):
    config = LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **settings)
    return add_adapter(llama(), config)


MAKERS = {
    "llama": llama,
    "tied": lambda: llama(tie_word_embeddings=True),
    "gptj": gptj,
    "softcap": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**GEMMA)),
    "scale": lambda: t.CohereForCausalLM(t.CohereConfig(**SMALL, logit_scale=0.25)),
    "divisor": lambda: t.GraniteForCausalLM(t.GraniteConfig(**SMALL, logits_scaling=4.0)),
    "lora": lambda: adapted(target_modules=["q_proj"]),
    "lora-head": lambda: adapted(target_modules=["q_proj", "lm_head"]),
    "trained-head": lambda: adapted(target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


def make(name, dtype=F64):
    torch.manual_seed(0)
    return AutoModelForCausalLMWithValueHead(MAKERS[name]().to(dtype).eval())


def packed_batch(lengths=(9, 10, 5, 11), vocabulary=VOCABULARY - 1):
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(1, vocabulary, (n,), generator=generator) for n in lengths]
    return PackedBatch.of([Trajectory(ids, torch.arange(2, len(ids)), 0.0, bootstrap=True) for ids in rows])


def scored(forward, batch, temperature=0.8, keep_logits=False, entropy_gradient=False):
    """Outputs, and the gradients of a loss in which every state weighs differently."""
    forward.zero_grad()
    output = forward(
        batch.input_ids,
        batch.lengths,
        batch.states,
        batch.targets,
        batch.last_states,
        temperature,
        keep_logits,
        entropy_gradient,
    )
    weights = torch.linspace(-1, 2, len(batch.states), dtype=F64)
    loss = (output.logprobs * weights).sum() + (output.values**2).mean() + output.last_values.sum()
    if entropy_gradient:
        loss = loss + (output.entropies * weights.flip(0).exp()).sum()
    loss.backward()
    gradients = {name: p.grad for name, p in forward.named_parameters() if p.requires_grad}
    return output, {name: None if g is None else g.clone() for name, g in gradients.items()}


@pytest.mark.parametrize("chunk_bytes", [CHUNK, WHOLE])
@pytest.mark.parametrize("name", MAKERS)
def test_equals_the_model_s_own_logits(name, chunk_bytes):
    model, batch = make(name), packed_batch()
    chunked = PolicyForward(model, chunk_bytes)
    assert chunked.head is not None
    assert len(batch.states) > 2 * ROWS
    output, gradients = scored(chunked, batch)
    expected, expected_gradients = scored(PolicyForward(model), batch, keep_logits=True)
    assert expected.logits.shape == (len(batch.states), VOCABULARY)
    for field in ("logprobs", "entropies", "values", "last_values"):
        torch.testing.assert_close(getattr(output, field), getattr(expected, field), rtol=1e-12, atol=1e-12)
    assert not output.entropies.requires_grad
    assert gradients.keys() == expected_gradients.keys()
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("chunk_bytes", [CHUNK, WHOLE])
@pytest.mark.parametrize("name", MAKERS)
def test_an_entropy_bonus_equals_that_of_the_model_s_own_logits(name, chunk_bytes):
    model, batch = make(name), packed_batch()
    output, gradients = scored(PolicyForward(model, chunk_bytes), batch, entropy_gradient=True)
    expected, expected_gradients = scored(
        PolicyForward(model), batch, keep_logits=True, entropy_gradient=True
    )
    assert output.entropies.requires_grad
    for field in ("logprobs", "entropies"):
        torch.testing.assert_close(getattr(output, field), getattr(expected, field), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-10, atol=1e-11)
    without = scored(PolicyForward(model, CHUNK), batch)[1]
    assert max((gradients[n] - g).abs().max() for n, g in without.items() if g is not None) > 0.01


@pytest.mark.parametrize("finish", [Finish(), Finish(0.5), Finish(softcap=2.0), Finish(2.0, 3.0)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [2, 5])
def test_gradients_of_entropies_by_finite_differences(finish, bias, rows, monkeypatch):
    monkeypatch.setattr(linear_head, "BLOCK_BYTES", 2 * 4 * 7)
    torch.manual_seed(0)
    states, weight = (torch.randn(5, 4, dtype=F64), torch.randn(7, 4, dtype=F64))
    inputs = [states, weight, torch.randn(7, dtype=F64) if bias else None]
    for tensor in inputs[: 2 + bias]:
        tensor.requires_grad_()
    targets = torch.tensor([0, 6, 3, 3, 1])

    def scores(*inputs):
        return LinearHead.apply(*inputs, targets, finish, rows, 0.7, True)[:2]

    assert torch.autograd.gradcheck(scores, inputs)


@pytest.mark.parametrize("rows", [2, 5])
def test_a_second_backward_pass(rows):
    """The logits that were kept are used up by the first."""
    torch.manual_seed(0)
    inputs = [torch.randn(5, 4, dtype=F64).requires_grad_(), torch.randn(7, 4, dtype=F64).requires_grad_()]
    targets = torch.tensor([0, 6, 3, 3, 1])
    logprobs, _, _ = LinearHead.apply(*inputs, None, targets, Finish(), rows, 1.0, False)
    first = torch.autograd.grad(logprobs.sum(), inputs, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(logprobs.sum(), inputs), first)


@pytest.mark.parametrize("asked", [False, True])
def test_entropies_of_a_loss_without_them(asked):
    """Their gradient is there if asked for, and none of it reaches a loss that leaves them out."""
    model, batch = make("llama"), packed_batch()
    forward = PolicyForward(model, CHUNK)
    inputs = batch.input_ids, batch.lengths, batch.states, batch.targets, batch.last_states
    output = forward(*inputs, entropy_gradient=asked)
    assert output.entropies.requires_grad is asked
    output.logprobs.sum().backward()
    gradient = model.pretrained_model.lm_head.weight.grad.clone()
    forward.zero_grad()
    forward(*inputs).logprobs.sum().backward()
    torch.testing.assert_close(model.pretrained_model.lm_head.weight.grad, gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["llama", "tied", "lora-head"])
def test_single_precision(name):
    model, batch = make(name, torch.float32), packed_batch()
    output, gradients = scored(PolicyForward(model, CHUNK), batch)
    expected, expected_gradients = scored(PolicyForward(model, WHOLE), batch)
    torch.testing.assert_close(output.logprobs, expected.logprobs, rtol=1e-6, atol=1e-6)
    for key, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[key], gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max())


@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("name", ["llama", "tied", "softcap", "lora-head"])
def test_autocast(name, entropy_gradient):
    model, batch = make(name, torch.float32), packed_batch()
    results = []
    for chunk_bytes in (CHUNK, WHOLE):
        forward = PolicyForward(model, chunk_bytes)
        with torch.autocast("cpu", torch.bfloat16):
            results.append(scored(forward, batch, entropy_gradient=entropy_gradient))
    (output, gradients), (expected, expected_gradients) = results
    assert output.logprobs.dtype == expected.logprobs.dtype == torch.float32
    torch.testing.assert_close(output.logprobs, expected.logprobs, rtol=0, atol=0.02)
    for key, gradient in expected_gradients.items():
        assert gradients[key].dtype == gradient.dtype
        assert (gradients[key] - gradient).norm() <= 0.02 * gradient.norm(), key


def test_activation_checkpointing():
    model, batch = make("llama"), packed_batch()
    forward = PolicyForward(model, CHUNK)
    expected = scored(forward, batch)[1]
    model.gradient_checkpointing_enable()
    with update_mode(forward):
        torch.testing.assert_close(scored(forward, batch)[1], expected)


def test_distributed_data_parallel(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    model, batch = make("llama"), packed_batch()
    forward = PolicyForward(model, CHUNK)
    expected = scored(forward, batch)[1]
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        # Not kept: as the group's last holder it may wait for ever for a thread that waits for its lock.
        gradients = scored(torch.nn.parallel.DistributedDataParallel(forward), batch)[1]
        gc.collect()
    finally:
        torch.distributed.destroy_process_group()
    for key, gradient in expected.items():
        torch.testing.assert_close(gradients[f"module.{key}"], gradient)


class Softened(t.LlamaForCausalLM):
    """Does something to its logits that no setting announces."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits / (1 + output.logits.abs())
        return output


@pytest.mark.parametrize("spread", [0.2, 1e-3], ids=["wide", "too narrow to show"])
def test_logits_that_nothing_explains_are_computed_whole(spread):
    torch.manual_seed(0)
    model = Softened(t.LlamaConfig(**{**SMALL, "initializer_range": spread})).double().eval()
    model.lm_head.weight.data *= spread
    forward, batch = PolicyForward(model, CHUNK), packed_batch((12,))
    assert forward.head is None
    output = forward(batch.input_ids, batch.lengths, batch.states, batch.targets, batch.last_states)
    distribution = model(input_ids=batch.input_ids[None]).logits[0].log_softmax(-1)
    torch.testing.assert_close(output.logprobs, distribution[batch.states, batch.targets])


def test_a_postponed_layer_leaves_nothing_for_the_backward_pass():
    model = llama()
    head = ChunkedHead.of(model)
    with head.postponed() as states:
        logits = model(input_ids=torch.tensor([[1, 2, 3]])).logits
    assert logits.shape == (1, 0, VOCABULARY)
    assert not logits.requires_grad
    assert states[0].requires_grad
    torch.testing.assert_close(head.layer(states[0]), model(input_ids=torch.tensor([[1, 2, 3]])).logits)


def test_a_setting_that_the_model_ignores_is_ignored():
    model = llama(logit_scale=3.0)
    assert model.config.logit_scale == 3.0
    assert Finish.announced(model.config) == Finish(3.0)
    assert ChunkedHead.of(model).finish == Finish()


class Sizes(TorchDispatchMode):
    """Collects the shape and storage of whatever an operation makes."""

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, torch.Tensor):
                self.made.setdefault(tuple(tensor.shape), []).append(tensor)
        return output


@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("name", ["llama", "lora-head"])
def test_whole_logits_never_exist(name, entropy_gradient):
    model, batch = make(name), packed_batch((20, 20, 20))
    forward = PolicyForward(model, CHUNK)
    with Sizes() as sizes:
        scored(forward, batch, entropy_gradient=entropy_gradient)
    rows = {shape[0] for shape in sizes.made if len(shape) == 2 and shape[1] == VOCABULARY}
    assert max(rows - {32}) <= ROWS, "32 is the hidden size: a transposed weight"
    if name == "llama":  # one buffer for the layer's gradient, not one for each chunk
        known = {p.data_ptr() for p in model.parameters()}
        made = {x.data_ptr() for x in sizes.made[VOCABULARY, 32]} - known
        assert len(made) <= 6 < len(batch.states) / ROWS, "the embedding's, the layer's, copies of both"


@given(
    count=st.integers(1, 5000), vocabulary=st.integers(2, 200_000), chunk_bytes=st.integers(1, 200 * 2**20)
)
def test_chunks_are_few_and_fit(count, vocabulary, chunk_bytes):
    rows = chunk_rows(count, vocabulary, chunk_bytes)
    assert rows == 1 or rows * vocabulary * 4 <= chunk_bytes
    most = max(1, chunk_bytes // (4 * vocabulary))
    assert math.ceil(count / rows) == math.ceil(count / most), "evening them out adds none"


def test_no_states_at_all():
    batch = PackedBatch.of([Trajectory(torch.tensor([1, 2, 3]), torch.tensor([], dtype=torch.long), 0.0)])
    forward = PolicyForward(make("llama"), CHUNK)
    output = forward(batch.input_ids, batch.lengths, batch.states, batch.targets, batch.last_states)
    assert output.logprobs.shape == output.entropies.shape == (0,)
    output.logprobs.sum().backward()


@pytest.mark.parametrize("finish", [Finish(), Finish(0.5), Finish(softcap=2.0), Finish(2.0, 3.0)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weigh", [torch.ones_like, torch.exp], ids=["ones", "probabilities"])
def test_a_total_is_the_sum_of_the_scores(finish, bias, weigh, monkeypatch):
    """Value and gradients of autograd's own sum, the weights held fixed; scaled by what comes after."""
    monkeypatch.setattr(linear_head, "BLOCK_BYTES", 2 * 4 * 7)
    torch.manual_seed(0)
    inputs = [torch.randn(5, 4, dtype=F64), torch.randn(7, 4, dtype=F64)]
    inputs += [torch.randn(7, dtype=F64) if bias else None]
    given = inputs[: 2 + bias]
    for tensor in given:
        tensor.requires_grad_()
    targets = torch.tensor([0, 6, 3, 3, 1])
    logprobs, entropies, hits = LinearHead.apply(*inputs, targets, finish, 2, 1.0, False)
    expected = (weigh(logprobs.detach()) * logprobs).sum()
    total, *scores = LinearTotal.apply(*inputs, targets, finish, 3, weigh, True)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scores, [logprobs.detach(), entropies, hits], rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad(3 * expected, given)
    torch.testing.assert_close(torch.autograd.grad(3 * total, given), wanted, rtol=1e-11, atol=1e-12)


def test_a_total_without_gradients():
    states, weight = torch.randn(3, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    with torch.no_grad():
        total, *_ = LinearTotal.apply(
            states,
            weight,
            None,
            torch.tensor([1, 2, 3]),
            Finish(),
            2,
            torch.ones_like,
            torch.is_grad_enabled(),
        )
    assert not total.requires_grad
