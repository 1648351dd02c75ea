"""The training forward against a plain forward of each sequence by itself."""

import pytest
import torch
from transformers import GPTJConfig, GPTJForCausalLM

from etude.data.batch import PackedBatch, Trajectory
from etude.models.forward import PolicyForward
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


# Nearly equal lengths are computed as a rectangle, uneven ones each by itself.
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
    from etude.trainers.learner import training_mode

    model = AutoModelForCausalLMWithValueHead(make_llama(dtype=torch.float64, attention_dropout=0.3))
    forward = PolicyForward(model)
    batch = PackedBatch.of(trajectories((9, 10, 11), len(tokenizer)))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        training_mode(forward)
        model.zero_grad()
        output = forward(batch.input_ids, batch.lengths, batch.states, batch.targets, batch.last_states)
        (output.logprobs.sum() + output.values.sum()).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1])
