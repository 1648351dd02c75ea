"""Compiled layers compute what they computed before, compiled once for all of a kind."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import GPTJConfig, GPTJForCausalLM

from etude.models.compiled import compile_layers
from etude.models.forward import PolicyForward
from etude.models.packing import supports_packing
from etude.sampling.generate import continue_all
from etude.sampling.local import LocalSampler
from etude.types import SamplingParams

# What the compiler looks at is no leaf; torch warns of that.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

IDS = torch.arange(40) % 17
STATES = torch.tensor([3, 4, 5, 20, 38])


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def scores(policy, lengths):
    policy.zero_grad()
    output = policy(IDS[: sum(lengths)], lengths, STATES, IDS[STATES + 1], STATES[:0])
    output.logprobs.sum().backward()
    return output.logprobs.detach(), [p.grad.clone() for p in policy.parameters()]


def test_updates_and_sampling_are_the_same_and_compiled_once(make_llama, tokenizer):
    model = make_llama(num_hidden_layers=9)  # more than may be compiled anew
    policy, counter = PolicyForward(model), CompileCounterWithBackend("aot_eager")
    queries, params = [[5, 6, 7], [9] * 12, [3]], SamplingParams(max_new_tokens=6)
    expected = scores(policy, [15, 25]), scores(policy, [10, 10, 20])
    sampled = continue_all(LocalSampler(model, tokenizer), queries, params, seeds=range(3))
    assert compile_layers(model, backend=counter) == 9
    compilations = []
    for lengths, before in zip(([15, 25], [10, 10, 20]), expected, strict=True):
        torch.testing.assert_close(scores(policy, lengths), before)
        compilations.append(counter.frame_count)
    assert 0 < compilations[0] < 9
    assert compilations[1] == compilations[0], "for any number of tokens"
    again = continue_all(LocalSampler(model, tokenizer), queries, params, seeds=range(3))
    assert [turn.token_ids for turn in again] == [turn.token_ids for turn in sampled]
    assert counter.frame_count < 40


def test_calls_without_a_plan_and_copies_are_not_compiled(make_llama):
    model, counter = make_llama(), CompileCounterWithBackend("aot_eager")
    assert supports_packing(model)
    ids = torch.tensor([[5, 6, 7]])
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    compile_layers(model, backend=counter)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)
    scores(PolicyForward(copy.deepcopy(model)), [15, 25])
    assert counter.frame_count == 0


def test_families_that_are_not_packed_stay_as_they_are():
    small = {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "vocab_size": 61}
    model = GPTJForCausalLM(GPTJConfig(**small))
    assert not supports_packing(model)
    assert compile_layers(model) == 0


def test_the_head_s_passes_compile_to_the_same(make_llama, tokenizer):
    model = make_llama()
    policy = PolicyForward(model, chunk_bytes=4 * len(tokenizer) * 2)
    before = scores(policy, [15, 25])
    policy.head.passes.compile(backend="aot_eager")
    torch.testing.assert_close(scores(policy, [15, 25]), before)
