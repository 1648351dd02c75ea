"""The training forward against a plain forward of each sequence by itself."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from peft import LoraConfig, get_peft_model
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
)

from etude.data.batch import PackedBatch, Trajectory
from etude.models import plans
from etude.models.forward import PolicyForward
from etude.models.update_mode import update_mode
from etude.models.value_head import AutoModelForCausalLMWithValueHead


def trajectories(lengths, vocabulary, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for n in lengths:
        ids = torch.randint(0, vocabulary, (n,), generator=generator)
        sampled = (torch.rand(n, generator=generator) < 0.6).nonzero()[:, 0]
        made.append(Trajectory(ids, sampled[sampled > 0], 0.0, bootstrap=n % 2 == 0))
    return made


def make_gptj(tokenizer):
    torch.manual_seed(0)
    config = GPTJConfig(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        rotary_dim=4,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPTJForCausalLM(config).double().eval()


@pytest.fixture(params=["one by one", "together"])
def kernels(request, monkeypatch):
    """As on a CPU, and as elsewhere: nearly equal lengths as a rectangle, uneven ones each by itself."""
    if request.param == "together":
        monkeypatch.setattr(plans, "ONE_BY_ONE", frozenset())


def test_where_sequences_are_computed_together(monkeypatch):
    assert plans.PackedPlan((9, 10, 11, 10)).rectangle is None
    monkeypatch.setattr(plans, "ONE_BY_ONE", frozenset())
    assert plans.PackedPlan((9, 10, 11, 10)).rectangle.rows == 4
    assert plans.PackedPlan((2, 31, 5, 14)).rectangle is None
    assert plans.PackedPlan((7,)).rectangle is None


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("lengths", [(9, 10, 11, 10), (2, 31, 5, 14), (7,)], ids=["even", "uneven", "one"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj"])
@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_equals_sequences_one_by_one(family, lengths, temperature, tokenizer, make_llama, make_gpt2):
    makers = {
        "llama": lambda: make_llama(dtype=torch.float64),
        "gpt2": lambda: make_gpt2(dtype=torch.float64),
        "gptj": lambda: make_gptj(tokenizer),
    }
    model = AutoModelForCausalLMWithValueHead(makers[family]())
    batch_of = trajectories(lengths, len(tokenizer))
    expected_logprobs, expected_values, expected_last, expected_entropies = [], [], [], []
    for t in batch_of:
        logits, _, values = model(t.token_ids[None])
        distribution = (logits[0] / temperature).log_softmax(-1)
        expected_logprobs.append(distribution[t.sampled - 1, t.token_ids[t.sampled]])
        expected_entropies.append(-(distribution.exp() * distribution).sum(-1)[t.sampled - 1])
        expected_values.append(values[0, t.sampled - 1])
        if t.bootstrap:
            expected_last.append(values[0, -1:])

    forward = PolicyForward(model)
    assert forward.packs == (family != "gptj")
    batch = PackedBatch.of(batch_of)
    output = forward(
        batch.input_ids, batch.lengths, batch.states, batch.targets, batch.last_states, temperature, True
    )
    torch.testing.assert_close(output.logprobs, torch.cat(expected_logprobs))
    torch.testing.assert_close(output.values, torch.cat(expected_values))
    torch.testing.assert_close(output.entropies, torch.cat(expected_entropies))
    if expected_last:
        torch.testing.assert_close(output.last_values, torch.cat(expected_last))
    assert output.logits.shape == (len(batch.states), len(tokenizer))


@pytest.mark.parametrize("lengths", [(9, 10, 11, 10), (2, 31, 5, 14)])
@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_gradients_of_entropies_equal_sequences_one_by_one(family, lengths, tokenizer, make_llama):
    model = make_llama(dtype=torch.float64) if family == "llama" else make_gptj(tokenizer)
    batch_of = trajectories(lengths, len(tokenizer))
    for t in batch_of:
        logprobs = (model(t.token_ids[None]).logits[0, t.sampled - 1] / 0.8).log_softmax(-1)
        entropies = -(logprobs.exp() * logprobs).sum(-1)
        (entropies**2).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    batch = PackedBatch.of(batch_of)
    for chunk_bytes in (2**30, 4 * len(tokenizer) * 3):
        model.zero_grad()
        forward = PolicyForward(model, chunk_bytes)
        assert forward.packs == (family == "llama")
        output = forward(
            batch.input_ids,
            batch.lengths,
            batch.states,
            batch.targets,
            batch.last_states,
            temperature=0.8,
            entropy_gradient=True,
        )
        (output.entropies**2).sum().backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        exact = {"rtol": 1e-10, "atol": 1e-12} if family == "llama" else {"rtol": 1e-4, "atol": 1e-6}
        torch.testing.assert_close(found, expected, **exact)  # GPT-J's attention is in single precision


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("lengths", [(9, 10, 11, 10), (2, 31, 5, 14)])
def test_gradients_equal_sequences_one_by_one(lengths, tokenizer, make_llama):
    model = AutoModelForCausalLMWithValueHead(make_llama(dtype=torch.float64))
    batch_of = trajectories(lengths, len(tokenizer))
    for t in batch_of:
        logits, _, values = model(t.token_ids[None])
        chosen = logits[0].log_softmax(-1)[t.sampled - 1, t.token_ids[t.sampled]]
        (chosen.sum() + (values[0, t.sampled - 1] ** 2).sum()).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    batch = PackedBatch.of(batch_of)
    forward = PolicyForward(model)
    output = forward(batch.input_ids, batch.lengths, batch.states, batch.targets, batch.last_states)
    (output.logprobs.sum() + (output.values**2).sum()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


def test_without_a_value_head(tokenizer, make_llama):
    forward = PolicyForward(make_llama())
    batch = PackedBatch.of(trajectories((5, 8), len(tokenizer)))
    output = forward(batch.input_ids, batch.lengths, batch.states, batch.targets, batch.last_states)
    assert output.values is None
    assert output.last_values is None


def test_activation_checkpointing_changes_nothing(tokenizer, make_llama):
    model = AutoModelForCausalLMWithValueHead(make_llama(dtype=torch.float64, attention_dropout=0.3))
    forward = PolicyForward(model)
    batch = PackedBatch.of(trajectories((9, 10, 11), len(tokenizer)))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        with update_mode(forward):
            output = forward(batch.input_ids, batch.lengths, batch.states, batch.targets, batch.last_states)
            (output.logprobs.sum() + output.values.sum()).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1])


# Grouped heads, learnt positions, normed heads, windows with and without soft caps, sinks, no packing.
ARCHITECTURES = {
    "llama": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 9},
    "gemma2": {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 9,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
    },
    "gemma3_text": {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 9,
        "sliding_window_pattern": 2,
    },
    "gpt_oss": {"head_dim": 8, "sliding_window": 9, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 4},
}


def make_model(architecture):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 53,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    own = ARCHITECTURES[architecture]
    config = AutoConfig.for_model(
        architecture,
        **({"vocab_size": 53} if "n_embd" in own else sizes),
        **own,
        initializer_range=0.2,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    config._experts_implementation = "eager"
    return AutoModelForCausalLM.from_config(config).double().eval()


def families_of_trajectories(shape, seed=0):
    """`shape`: for each family, the length of what its members begin with, and those of what they go on with.

    The first token that is sampled may be in the beginning, the first after it, or a later one.
    """
    generator = torch.Generator().manual_seed(seed)
    made = []
    for shared, rests in shape:
        beginning = torch.randint(0, 53, (shared,), generator=generator)
        for n in rests:
            ids = torch.cat([beginning, torch.randint(0, 53, (n,), generator=generator)])
            sampled = torch.arange(len(ids))[max(1, shared - 2 + len(made) % 4) :]
            made.append(Trajectory(ids, sampled, 0.0, bootstrap=len(made) % 2 == 0))
    return [made[i] for i in torch.randperm(len(made), generator=generator)]


class AllFloat64(TorchFunctionMode):
    """Norms and rotations, too, which models otherwise compute in single precision."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        lowers = func is torch.Tensor.float or (func is torch.Tensor.to and torch.float32 in args[1:])
        if lowers and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))


def results(forward, trajectories, share):
    """Outputs and gradients; no two tokens weigh the same."""
    forward.zero_grad()
    batch = PackedBatch.of(trajectories, share=share)
    output = forward(
        batch.input_ids,
        batch.lengths,
        batch.states,
        batch.targets,
        batch.last_states,
        temperature=0.9,
        prefixes=batch.prefixes,
    )
    weights = torch.linspace(-1, 2, len(batch.states), dtype=torch.float64)
    loss = (weights * output.logprobs).sum()
    if output.values is not None:
        loss = loss + (weights * output.values**2).sum() + (output.last_values**3).sum()
    loss.backward()
    named = {name: p.grad.clone() for name, p in forward.named_parameters() if p.grad is not None}
    outputs = {name: x.detach() for name, x in output._asdict().items() if x is not None}
    return outputs, named, len(batch.input_ids)


def check_sharing(forward, trajectories, least_saved=1, tolerance=1e-10):
    with AllFloat64():
        expected, gradients, tokens = results(forward, trajectories, share=False)
        outputs, shared_gradients, fewer = results(forward, trajectories, share=True)
    assert fewer <= tokens - least_saved
    torch.testing.assert_close(outputs, expected, rtol=0, atol=tolerance)
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients.values())
    torch.testing.assert_close(shared_gradients, gradients, rtol=tolerance, atol=tolerance)


SHAPES = {
    "even": [(20, (6, 7, 5, 6)), (17, (5, 6)), (0, (9,))],
    "uneven": [(31, (1, 12, 3)), (16, (20, 2)), (0, (25, 4))],
    "short": [(17, (40, 41, 38)), (16, (50, 3))],
    "whole": [(20, (0, 4, 0))],
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sharing_a_beginning_changes_nothing(architecture, shape):
    forward = PolicyForward(AutoModelForCausalLMWithValueHead(make_model(architecture)))
    assert forward.packs == (architecture != "gptj")
    check_sharing(forward, families_of_trajectories(shape), least_saved=16)


def test_sharing_without_a_value_head():
    check_sharing(PolicyForward(make_model("llama")), families_of_trajectories(SHAPES["even"]))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
def test_sharing_with_adapters():
    config = LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(make_model("llama"), config).double()
    check_sharing(PolicyForward(model), families_of_trajectories(SHAPES["even"]))


def test_sharing_with_activation_checkpointing(make_gpt2):
    model = AutoModelForCausalLMWithValueHead(make_gpt2(dtype=torch.float64))
    forward = PolicyForward(model)
    model.gradient_checkpointing_enable()
    with update_mode(forward):
        check_sharing(forward, families_of_trajectories(SHAPES["uneven"]))


@pytest.fixture(scope="module")
def windowed():
    return {name: PolicyForward(make_model(name)) for name in ("gpt2", "mistral")}


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(
        st.tuples(st.integers(0, 30), st.lists(st.integers(0, 12), min_size=1, max_size=4)),
        min_size=1,
        max_size=4,
    ),
    seed=st.integers(0, 99),
    architecture=st.sampled_from(["gpt2", "mistral"]),
)
def test_sharing_any_beginnings(windowed, shape, seed, architecture):
    trajectories = [t for t in families_of_trajectories(shape, seed) if len(t.token_ids) > 2]
    if trajectories:
        check_sharing(windowed[architecture], trajectories, least_saved=0)
