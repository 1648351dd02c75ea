"""The optimisation step cut up: mini-batches, accumulation and token budgets end in the same weights."""

import pytest
import torch
from accelerate import Accelerator

from etude.data.batch import Trajectory
from etude.errors import ConfigError
from etude.models.forward import PolicyForward
from etude.models.value_head import AutoModelForCausalLMWithValueHead
from etude.trainers.learner import Learner
from etude.trainers.ppo_config import PPOConfig

F64 = torch.float64
LENGTHS = (5, 9, 30, 4, 12, 7, 8, 11)
DEFAULTS = {
    "mini_batch_size": 8,
    "accumulation": 1,
    "epochs": 2,
    "max_grad_norm": 1.0,
    "temperature": 0.9,
    "kl_kind": "k1",
}


def played(vocabulary):
    generator = torch.Generator().manual_seed(2)
    trajectories = []
    for n in LENGTHS:
        ids = torch.randint(0, vocabulary, (n,), generator=generator)
        sampled = (torch.rand(n, generator=generator) < 0.7).nonzero()[:, 0]
        trajectories.append(Trajectory(ids, sampled[sampled > 1], 1.0, bootstrap=n % 2 == 0))
    return trajectories


def shuffled_groups(vocabulary):
    """Three prompts, of which the longest is a group's, four samples each."""
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(0, vocabulary, (n,), generator=generator) for n in (20, 31, 18)]
    trajectories = []
    for i in torch.randperm(12, generator=generator).tolist():
        answer = torch.randint(0, vocabulary, (3 + i % 5,), generator=generator)
        trajectories.append(Trajectory.of_response(prompts[i % 3], answer, 1.0))
        trajectories[-1].bootstrap = i % 2 == 0
    return trajectories


def weighted_likelihood(minibatch):
    """A loss in which no two tokens weigh the same."""
    width = minibatch.observed.mask.shape[1]
    weights = torch.tensor(minibatch.indices, dtype=F64)[:, None] + torch.arange(width) / 40
    terms = (minibatch.values**2 - weights * minibatch.logprobs) * minibatch.observed.mask
    loss = terms.sum() / minibatch.denominator
    return loss, {"loss": loss}


@pytest.fixture
def outcome(tokenizer, make_llama):
    """For some settings: what was observed, the weights after an update, and each pass's lengths."""

    def run(make=make_llama, trajectories=played, **settings):
        torch.manual_seed(0)
        model = AutoModelForCausalLMWithValueHead(make(dtype=F64))
        accelerator = Accelerator()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        policy, optimizer = accelerator.prepare(PolicyForward(model), optimizer)
        reference = PolicyForward(make(5, F64))
        learner = Learner(accelerator, policy, reference, optimizer, **{**DEFAULTS, **settings})
        passes = []
        policy.register_forward_pre_hook(lambda _, args: passes.append(args[1]))
        experience = learner.observe(trajectories(len(tokenizer)))
        learner.update(experience, weighted_likelihood, torch.Generator().manual_seed(3))
        return experience, model.state_dict(), passes

    return run


OBSERVED = ("mask", "logprobs", "values", "ref_logprobs", "kl", "last_values", "entropies")


@pytest.mark.parametrize(
    "settings",
    [
        {"mini_batch_size": 1, "accumulation": 8},
        {"max_tokens_per_pass": 1},
        {"max_tokens_per_pass": 30},
        {"max_tokens_per_pass": 10_000},
        {"max_tokens_per_pass": 20, "mini_batch_size": 4, "accumulation": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("kl_kind", ["k1", "full"])
def test_cutting_a_step_up_changes_nothing(kl_kind, settings, outcome):
    experience, weights, whole = outcome(kl_kind=kl_kind)
    observed, cut_weights, passes = outcome(kl_kind=kl_kind, **settings)
    for name in OBSERVED:
        torch.testing.assert_close(getattr(observed, name), getattr(experience, name), rtol=0, atol=1e-11)
    assert observed.kl.abs().max() > 0.01
    torch.testing.assert_close(cut_weights, weights, rtol=0, atol=1e-10)
    limit = settings.get("max_tokens_per_pass")
    if limit is not None:
        assert all(sum(lengths) <= limit or len(lengths) == 1 for lengths in passes)
        assert (len(passes) > len(whole)) == (limit < sum(LENGTHS))


@pytest.mark.parametrize(
    "settings",
    [
        {"mini_batch_size": 12},
        {"mini_batch_size": 4, "accumulation": 3},
        {"mini_batch_size": 3, "accumulation": 2},
        {"mini_batch_size": 12, "max_tokens_per_pass": 45},
    ],
    ids=str,
)
@pytest.mark.parametrize("kl_kind", ["k1", "full"])
def test_sharing_prefixes_changes_nothing_but_the_tokens(kl_kind, settings, outcome, make_gpt2):
    """Shuffled over passes as they are: what is observed comes back in the order in which it was given."""
    given = {"make": make_gpt2, "trajectories": shuffled_groups, "kl_kind": kl_kind, **settings}
    experience, weights, passes = outcome(**given, share_prefixes=False)
    shared, shared_weights, fewer = outcome(**given)
    for name in OBSERVED:
        torch.testing.assert_close(getattr(shared, name), getattr(experience, name), rtol=0, atol=1e-11)
    torch.testing.assert_close(shared_weights, weights, rtol=0, atol=1e-10)
    assert sum(map(sum, fewer)) < 0.75 * sum(map(sum, passes))
    limit = settings.get("max_tokens_per_pass")
    assert limit is None or (max(map(sum, fewer)) <= limit and len(fewer) < len(passes))


def test_models_that_are_padded_share_nothing(outcome, make_gpt2, monkeypatch):
    monkeypatch.setattr("etude.models.forward.supports_packing", lambda model: False)
    given = {"make": make_gpt2, "trajectories": shuffled_groups, "mini_batch_size": 4, "accumulation": 3}
    assert outcome(**given)[2] == outcome(**given, share_prefixes=False)[2]


def test_the_update_moves_the_weights(outcome, make_llama):
    weights = outcome()[1]
    start = AutoModelForCausalLMWithValueHead(make_llama(dtype=F64)).state_dict()
    name = "pretrained_model.lm_head.weight"
    assert (weights[name] - start[name]).abs().max() > 1e-3


def test_a_budget_of_nothing():
    with pytest.raises(ConfigError, match="max_tokens_per_pass is 0; expected at least 1"):
        PPOConfig(max_tokens_per_pass=0)
